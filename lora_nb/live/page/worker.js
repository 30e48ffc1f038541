// The model works here, so that the page never freezes. Messages in: {id, call, args}; out: {id, value | error | progress}.
import {fetchBytes} from './download.js'
import {Engine} from './engine.js'
import {load, save} from './lora.js'
import {Lesson} from './lesson.js'
import {openRuntime, unable} from './runtime.js'
import {Trainer} from './trainer.js'

let engine = null, lesson = null
const halt = {draw: false, train: false}
const loras = new Map()

const calls = {
  /** `threads`, `graphics`: of the runtime; `all`: bytes that are to come, to report with what has come */
  async open({url, threads, graphics, all}, report) {
    const no = unable()
    if (no) throw new Error(no)
    const got = [0, 0], tell = i => n => { got[i] = n; report({got: got[0] + got[1], all}) }
    const [ort, opened] = await Promise.all([openRuntime(new URL('./ort', import.meta.url).href, {threads, graphics}, tell(0)), Engine.open(url, tell(1))])
    engine = opened; engine.ort = ort
    return {manifest: {...engine.manifest, tokenizer: null, entries: null, schedule: null}}
  },
  /** What learning needs, which drawing does not. */
  async learn(args, report) { await engine.learn((got, all) => report({got, all})) },
  /** Make the training's session before somebody waits for it. */
  async warm({prior}) { await Lesson.warm(engine, prior) },
  /** Whether a graphics card draws the same, and faster. */
  async race(wish) { return engine.race({worn: [], ...wish}) },
  async lora({name, url, buffer}, report) {
    if (!loras.has(name) || buffer) {
      const l = load(buffer ?? await fetchBytes(url), name)
      engine.fits(l)
      loras.set(name, l)
    }
    const l = loras.get(name), first = Object.values(l.layers)[0]
    return {name, layers: Object.keys(l.layers).length, rank: first.rank, words: Object.keys(l.words), trigger: String(l.note.trigger ?? '')}
  },
  async draw(wish, report) {
    halt.draw = false
    const worn = wish.worn.map(w => ({...w, lora: loras.get(w.name)}))
    const began = performance.now()
    const out = await engine.draw({...wish, worn, turbo: wish.turbo ? loras.get(wish.turbo) : null}, (step, pixels) => { report({step, pixels}); return halt.draw })
    return {...out, seconds: (performance.now() - began) / 1000}
  },
  async steps({batch, theta, lr, latents, noise, times, states, n}) {       // n steps on one batch: a test, and a measure of speed
    const t = await Trainer.open(engine, {batch}), losses = []
    t.theta = Float32Array.from(theta)
    const b = {latents: Float32Array.from(latents), noise: Float32Array.from(noise), times, states: Float32Array.from(states), weight: new Float32Array(batch).fill(1 / batch)}
    for (let k = 0; k < n; k++) losses.push(await t.step(b, lr))
    return losses
  },
  /** Prepare a lesson: pictures as latents, captions as states, class pictures. */
  async prepare(wish, report) {
    halt.train = false; lesson = null
    lesson = await Lesson.open(engine, wish, p => { report(p); return halt.train })
    return {stopped: halt.train}
  },
  /** Train from where the lesson stands to its end, or until it is stopped. */
  async train(args, report) {
    halt.train = false
    return lesson.run(p => { report(p); return halt.train })
  },
  /** What has been learned becomes a LoRA like the others; its file comes back. */
  async learned({name}) {
    const l = lesson.lora(name)
    loras.set(name, l)
    return save(l)
  },
  /** Cosine of drawn pictures and given ones, mean over both. */
  async alike({drawn, given}) {
    const vectors = async list => { const out = []; for (const x of list) out.push(await engine.describe(x)); return out }
    const a = await vectors(drawn), b = await vectors(given)
    return a.map(x => b.reduce((sum, y) => sum + x.reduce((s, v, i) => s + v * y[i], 0), 0) / b.length)
  },
  async stop({what}) { halt[what] = true },
}

onmessage = async ({data: {id, call, args}}) => {
  try { postMessage({id, value: await calls[call](args ?? {}, progress => postMessage({id, progress}))}) }
  catch (e) { postMessage({id, error: sentence(e)}) }
}

function sentence(e) {
  const text = String(e?.message ?? e)
  if (/out of memory|allocat|bad_alloc|memory access|WebAssembly\.Memory/i.test(text)) return 'This device has too little free memory for the model. Close other tabs and reload the page.'
  return text
}
