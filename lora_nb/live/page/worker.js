// The model works here, so that the page never freezes. Messages in: {id, call, args}; out: {id, value | error | progress}.
import * as ort from './ort/ort.wasm.min.mjs'
import {Engine} from './engine.js'
import {load} from './lora.js'
import {Trainer} from './trainer.js'

ort.env.wasm.wasmPaths = new URL('./ort/', import.meta.url).href
ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1
ort.env.logLevel = 'error'

let engine = null, halt = false
const loras = new Map()

const calls = {
  async open({url}, report) {
    engine = await Engine.open(ort, url, (got, all) => report({got, all}))
    return {manifest: {...engine.manifest, tokenizer: null, entries: null, schedule: null}}
  },
  async lora({name, url, buffer}, report) {
    if (!loras.has(name) || buffer) loras.set(name, load(buffer ?? await (await fetch(url)).arrayBuffer(), name))
    const l = loras.get(name), first = Object.values(l.layers)[0]
    return {name, layers: Object.keys(l.layers).length, rank: first.rank, words: Object.keys(l.words), trigger: String(l.note.trigger ?? '')}
  },
  async draw(wish, report) {
    halt = false
    const worn = wish.worn.map(w => ({...w, lora: loras.get(w.name)}))
    const began = performance.now()
    const out = await engine.draw({...wish, worn, turbo: wish.turbo ? loras.get(wish.turbo) : null}, (step, pixels) => { report({step, pixels}); return halt })
    return {...out, seconds: (performance.now() - began) / 1000}
  },
  async steps({batch, theta, lr, latents, noise, times, states, n}) {       // n steps on one batch: a test, and a measure of speed
    const t = await Trainer.open(engine, {batch}), losses = []
    t.theta = Float32Array.from(theta)
    const b = {latents: Float32Array.from(latents), noise: Float32Array.from(noise), times, states: Float32Array.from(states), weight: new Float32Array(batch).fill(1 / batch)}
    for (let k = 0; k < n; k++) losses.push(await t.step(b, lr))
    return losses
  },
  async stop() { halt = true },
}

onmessage = async ({data: {id, call, args}}) => {
  try { postMessage({id, value: await calls[call](args ?? {}, progress => postMessage({id, progress}))}) }
  catch (e) { postMessage({id, error: sentence(e)}) }
}

function sentence(e) {
  const text = String(e?.message ?? e)
  if (/out of memory|Array buffer allocation|bad_alloc|memory access/i.test(text)) return 'This device has too little free memory for the model. Close other tabs and reload the page.'
  return text
}
