// The model in the page: weights, ONNX sessions, prompts, and the loop that draws.
import {fetchAll, fetchBytes} from './download.js'
import {widenPlanes} from './half.js'
import {together} from './lora.js'
import {Generator} from './random.js'
import {ddimStep, lcmStep, lcmTimesteps} from './scheduler.js'
import {Tokenizer} from './tokenizer.js'

/** @typedef {import('./lora.js').Lora} Lora
 * @typedef {{lora: Lora, strength: number, curve?: number[]}} Worn `curve`: factors of the strength, over the steps
 * @typedef {{prompt: string, seed: number, steps: number, guidance: number, worn: Worn[], turbo?: Lora|null, show?: number,
 *  raw?: boolean}} Wish `raw`: latents only */

const WEIGHTS = 'weights'                                 // what the graphs call the file that they share
const GRAPHICS = ['denoiser', 'decoder']                  // what a graphics card may draw with

/** Let waiting messages in, such as "stop": without threads the runtime gives them no time. @returns {Promise<void>} */
export function breathe() {
  return new Promise(go => { const c = new MessageChannel(); c.port1.onmessage = () => { c.port1.close(); go() }; c.port2.postMessage(0) })
}

export class Engine {
  /** Load what drawing needs. @param {string} url of the folder with manifest.json @param {(got: number) => void} [report] bytes
   * @returns {Promise<Engine>} without `ort`, the runtime, which is to be set */
  static async open(url, report = () => {}) {
    let before = 0
    const manifest = JSON.parse(new TextDecoder().decode(await fetchBytes(`${url}/manifest.json`, got => { before = got; report(got) })))
    const engine = new Engine()
    engine.ort = null; engine.url = url; engine.manifest = manifest
    engine.weights = new Float32Array(manifest.weights.total)
    engine.models = {}; engine.sessions = {}; engine.providers = {}; engine.last = Promise.resolve(); engine.racing = false; engine.learns = null
    engine.tokenizer = new Tokenizer(manifest.tokenizer)
    const s = manifest.schedule
    engine.schedule = {alphas: Float64Array.from(s.alphas), prediction: s.prediction, last: s.last, trained: s.trained, timesteps: s.timesteps}
    await engine.take('draw', got => report(before + got))
    return engine
  }

  /** Load a part of the model: its weights into their place, its graphs as they are. @param {'draw'|'learn'} part @param {(got: number) => void} [report] */
  async take(part, report) {
    const files = await fetchAll(this.url, this.manifest.files[part], report), {total, learn} = this.manifest.weights
    for (const [file, data] of Object.entries(files)) {
      if (file.endsWith('.onnx.gzip')) this.models[file.replace('.onnx.gzip', '')] = new Uint8Array(data)
      else widenPlanes(new Uint8Array(data), part === 'draw' ? this.weights.subarray(0, learn) : this.weights.subarray(learn, total))
    }
  }

  /** Load what learning needs, once. @param {(got: number, all: number) => void} [report] */
  async learn(report = () => {}) {
    const files = this.manifest.files.learn
    if (!files) throw new Error('This page was made without what it needs to learn.')
    const all = Object.values(files).reduce((a, b) => a + b, 0)
    return this.learns ??= this.take('learn', got => report(got, all)).catch(e => { this.learns = null; throw e })
  }

  /** @param {string} graph of the manifest @param {string} [provider] @returns {Promise<any>} an InferenceSession, made when first asked for */
  async session(graph, provider = this.providers[graph] ?? 'wasm') {
    const key = `${graph} ${provider}`
    return this.sessions[key] ??= (async () => {
      if (!this.models[graph]) await this.learn()
      return this.ort.InferenceSession.create(this.models[graph], {executionProviders: [provider], graphOptimizationLevel: 'all', logSeverityLevel: 3,
        externalData: [{path: WEIGHTS, data: new Uint8Array(this.weights.buffer)}]})
    })().catch(e => { delete this.sessions[key]; throw e })
  }

  /** Run a graph; one run at a time, whoever asks. If the graphics card is lost, the processor goes on. @param {string} graph
   * @param {Object<string, any>} inputs */
  async run(graph, inputs) {
    const provider = this.providers[graph] ?? 'wasm'
    try {
      const session = await this.session(graph, provider), go = () => session.run(inputs), out = this.last.then(go, go)
      this.last = out.catch(() => {})
      return await out
    } catch (e) {
      if (provider === 'wasm' || this.racing) throw e
      this.providers = {}
      return this.run(graph, inputs)
    }
  }

  /** Numbers of a weight, as a view. @param {string} path @returns {Float32Array} */
  weight(path) {
    const e = this.manifest.entries[path]
    return this.weights.subarray(e.offset, e.offset + e.shape.reduce((a, b) => a * b, 1))
  }

  tensor(data, shape) { return new this.ort.Tensor(data instanceof BigInt64Array ? 'int64' : 'float32', data, shape) }

  /** An Error for people if a LoRA has layers that the model has not. @param {Lora} lora */
  fits(lora) {
    const shapes = Object.assign({}, ...Object.values(this.manifest.graphs).map(g => g.shapes)), product = s => s.reduce((a, b) => a * b, 1)
    const odd = Object.entries(lora.layers).filter(([path, f]) => !Object.hasOwn(shapes, path) || f.inner !== product(shapes[path].down) || f.outer !== shapes[path].up[0])
    if (!odd.length) return
    const [path, {inner, outer}] = odd[0], own = Object.hasOwn(shapes, path) ? `is ${product(shapes[path].down)} to ${shapes[path].up[0]} here, and ${inner} to ${outer} in the file` : 'is not among those that this page can adapt'
    throw new Error(`${lora.name} was made for another model than ${this.manifest.base}: ${odd.length} of its ${Object.keys(lora.layers).length} layers do not fit, such as ${path.slice(0, 100)}, which ${own}.`)
  }

  /** The inputs of a graph that are LoRA factors. @param {string} component @param {{lora: Lora, strength: number|((path: string) => number)}[]} worn */
  factors(component, worn) {
    const g = this.manifest.graphs[component], out = {}
    together(worn, g.paths, g.shapes).forEach(({rank, down, up}, i) => {
      const s = g.shapes[g.paths[i]]
      out[`${g.paths[i]}.down`] = this.tensor(down, [rank, ...s.down.slice(1)])
      out[`${g.paths[i]}.up`] = this.tensor(up, [s.up[0], rank, ...s.up.slice(2)])
    })
    return out
  }

  /** The text encoder's states of some prompts. @param {string[]} prompts @param {Worn[]} worn
   * @returns {Promise<{states: Float32Array, lost: number}>} (n, 77, width) */
  async encode(prompts, worn) {
    const table = this.weight(this.manifest.table), {width, length} = this.manifest.text, extra = []
    let next = table.length / width
    this.tokenizer.words.clear()
    for (const {lora} of worn) {
      for (const [word, parts] of Object.entries(lora.words)) {
        const v = parts.text_encoder
        if (!v || this.tokenizer.words.has(word)) continue
        this.tokenizer.words.set(word, Array.from({length: v.n}, (_, i) => next + i))
        for (let i = 0; i < v.n; i++) extra.push(v.data.subarray(i * width, (i + 1) * width))
        next += v.n
      }
    }
    const embeds = new Float32Array(prompts.length * length * width), rows = table.length / width
    let lost = 0
    prompts.forEach((p, k) => {
      const {ids, lost: l} = this.tokenizer.encode(p)
      lost = Math.max(lost, l)
      ids.forEach((id, i) => embeds.set(id < rows ? table.subarray(id * width, (id + 1) * width) : extra[id - rows], (k * length + i) * width))
    })
    const out = await this.run('text_encoder', {embeds: this.tensor(embeds, [prompts.length, length, width]), ...this.factors('text_encoder', worn)})
    return {states: out.states.data, lost}
  }

  /** A picture's latents, as the denoiser takes them. @param {Float32Array} pixels (3, size, size) in -1..1 @returns {Promise<Float32Array>} */
  async latents(pixels) {
    const {scale, shift, size} = this.manifest.latents
    const z = (await this.run('encoder', {pixels: this.tensor(pixels, [1, 3, size, size])})).latents.data
    return z.map(x => (x - shift) * scale)
  }

  /** What shows in a picture, as a vector of length one: the describer that comes with the page. @param {Float32Array} pixels
   * @returns {Promise<Float32Array>} */
  async describe(pixels) {
    const {size} = this.manifest.latents
    return (await this.run('describer', {pixels: this.tensor(pixels, [1, 3, size, size])})).description.data
  }

  /** Forget a session that is large and seldom used. @param {string} graph */
  async release(graph) {
    for (const key of Object.keys(this.sessions)) {
      if (key.split(' ')[0] !== graph) continue
      const s = this.sessions[key]
      delete this.sessions[key]
      await this.last
      await (await s).release()
    }
  }

  /** Latents as a picture. @param {Float32Array} z @returns {Promise<Uint8ClampedArray>} RGBA */
  async decode(z) {
    const {scale, shift, shape, size} = this.manifest.latents, x = z.map(v => v / scale + shift)
    const y = (await this.run('decoder', {latents: this.tensor(x, [1, ...shape])})).pixels.data
    const n = size * size, out = new Uint8ClampedArray(4 * n)
    for (let i = 0; i < n; i++) {
      for (let c = 0; c < 3; c++) out[4 * i + c] = Math.round(Math.min(1, Math.max(0, y[c * n + i] / 2 + .5)) * 255)
      out[4 * i + 3] = 255
    }
    return out
  }

  /** Draw one picture. @param {Wish} wish @param {(step: number, pixels: Uint8ClampedArray|null) => (boolean|void)} [seen] called after each
   * step, with a picture of the clean latents every `wish.show` steps; true stops
   * @returns {Promise<{pixels: Uint8ClampedArray, lost: number, stopped: boolean}>} */
  async draw(wish, seen = () => {}) {
    const {shape} = this.manifest.latents, n = shape.reduce((a, b) => a * b, 1), random = new Generator(wish.seed)
    const few = !!wish.turbo, guided = wish.guidance !== 1
    const always = wish.worn.map(w => ({...w, strength: w.strength}))
    const {states, lost} = await this.encode(guided ? [wish.prompt, ''] : [wish.prompt], always)
    const width = states.length / (guided ? 2 : 1), batch = guided ? 2 : 1
    const all = few ? [...always, {lora: wish.turbo, strength: 1}] : always
    const times = few ? lcmTimesteps(wish.steps, wish.original ?? 50, this.schedule.trained) : this.schedule.timesteps[wish.steps - 1]
    let z = random.normal(n), factors = null, worn = null, step = {z, clean: z}, stopped = false
    const e = this.tensor(states, [batch, this.manifest.text.length, this.manifest.text.width])
    for (let k = 0; k < times.length; k++) {
      const now = all.map(w => w.strength * (w.curve ? w.curve[Math.min(w.curve.length - 1, Math.floor(k / times.length * w.curve.length))] : 1))
      if (now.join() !== worn) { worn = now.join(); factors = this.factors('denoiser', all.map((w, i) => ({lora: w.lora, strength: now[i]}))) }
      const zz = new Float32Array(batch * n), t = BigInt64Array.from({length: batch}, () => BigInt(times[k]))
      for (let i = 0; i < batch; i++) zz.set(z, i * n)
      const out = (await this.run('denoiser', {latents: this.tensor(zz, [batch, ...shape]), timesteps: this.tensor(t, [batch]), states: e, ...factors})).answer.data
      const answer = guided ? out.slice(0, n) : out
      if (guided) for (let i = 0; i < n; i++) answer[i] = out[n + i] + wish.guidance * (out[i] - out[n + i])
      const before = few ? (k + 1 < times.length ? times[k + 1] : -1) : times[k] - Math.floor(this.schedule.trained / times.length)
      step = few ? lcmStep(this.schedule, z, answer, times[k], before, before >= 0 ? random.normal(n) : null)
                 : ddimStep(this.schedule, z, answer, times[k], before)
      z = step.z
      const last = k + 1 === times.length, look = wish.show && k % wish.show === wish.show - 1 && k + 1 + wish.show / 2 < times.length   // not just before the end
      const picture = look ? await this.decode(step.clean) : null
      await breathe()
      if (seen(k + 1, picture) && !last) { stopped = true; break }
    }
    return {pixels: wish.raw ? null : await this.decode(stopped ? step.clean : z), latents: z, lost, stopped}
  }

  /** Draw a picture on the processor and on the graphics card, and go on with the faster, if both draw the same. @param {Wish} wish
   * @returns {Promise<{provider: string, seconds: Object<string, number>, difference: number, why?: string}>} `difference`: of 255, in any channel */
  async race(wish) {
    const seconds = {}, drawn = {}, choose = p => { for (const g of GRAPHICS) this.providers[g] = p }
    const time = async p => {
      choose(p)
      await this.draw({...wish, steps: 1})               // makes the sessions, and compiles
      const began = performance.now()
      drawn[p] = (await this.draw(wish)).pixels; seconds[p] = (performance.now() - began) / 1000
    }
    let difference = NaN, why
    this.racing = true
    try {
      await time('wasm'); await time('webgpu')
      difference = drawn.wasm.reduce((d, x, i) => Math.max(d, Math.abs(x - drawn.webgpu[i])), 0)
    } catch (e) { why = String(e?.message ?? e) } finally { this.racing = false }
    const provider = difference <= 2 && seconds.webgpu < seconds.wasm ? 'webgpu' : 'wasm'
    choose(provider)
    for (const g of GRAPHICS) {                           // the loser's memory is given back
      const lost = `${g} ${provider === 'wasm' ? 'webgpu' : 'wasm'}`, s = this.sessions[lost]
      delete this.sessions[lost]
      try { await (await s)?.release() } catch { }
    }
    return {provider, seconds, difference, why}
  }
}
