// Training in the page: a step is one graph, `train<batch>`; this keeps its state and chooses what it learns from.
import {Generator} from './random.js'

/** @typedef {import('./engine.js').Engine} Engine
 * @typedef {{latents: Float32Array, states: Float32Array}} Example a picture's latents and its caption's states */

export class Trainer {
  /** @param {Engine} engine @param {{batch: number, seed?: number}} how `batch`: samples in a step, one of the manifest's */
  static async open(engine, {batch, seed = 0}) {
    const t = new Trainer(), {layout, rank} = engine.manifest.training, n = layout[layout.length - 1].end
    t.engine = engine; t.batch = batch; t.rank = rank; t.layout = layout; t.random = new Generator(seed)
    t.decks = {subject: [], prior: []}
    t.graph = `train${batch}`
    await engine.session(t.graph)                        // it takes seconds: before the first step, not in it
    t.theta = new Float32Array(n); t.m = new Float32Array(n); t.v = new Float32Array(n); t.k = 0
    for (const r of layout) {                            // `down` is random, `up` zero: at first nothing changes
      const size = r.up - r.down
      t.theta.set(t.random.normal(Math.max(16, size)).subarray(0, size).map(x => x / rank), r.down)
    }
    return t
  }

  /** One step. @param {{latents: Float32Array, noise: Float32Array, times: number[], states: Float32Array, weight: Float32Array}} b
   * @param {number} lr @returns {Promise<number>} the loss before the step; an Error if it is not finite */
  async step({latents, noise, times, states, weight}, lr) {
    const e = this.engine, B = this.batch, {shape} = e.manifest.latents, {length, width} = e.manifest.text, n = this.theta.length
    const a = e.schedule.alphas, f = (x, s) => e.tensor(x, s)
    const out = await e.run(this.graph, {
      theta: f(this.theta, [n]), m: f(this.m, [n]), v: f(this.v, [n]), k: f(Float32Array.of(this.k + 1), [1]), lr: f(Float32Array.of(lr), [1]),
      latents: f(latents, [B, ...shape]), noise: f(noise, [B, ...shape]), timesteps: f(BigInt64Array.from(times, BigInt), [B]),
      states: f(states, [B, length, width]), weight: f(weight, [B]),
      signal: f(Float32Array.from(times, t => Math.sqrt(a[t])), [B]), sigma: f(Float32Array.from(times, t => Math.sqrt(1 - a[t])), [B])})
    const loss = out.loss.data[0]
    if (!Number.isFinite(loss)) throw new Error(`The training diverged at step ${this.k + 1}: choose a lower learning rate.`)
    this.theta = out.theta2.data; this.m = out.m2.data; this.v = out.v2.data; this.k++
    return loss
  }

  /** The next of some examples: all of them in a random order before one comes again. @param {Example[]} list @param {'subject'|'prior'} which */
  next(list, which) {
    const deck = this.decks[which]
    if (!deck.length) {
      for (let i = 0; i < list.length; i++) deck.push(i)
      for (let i = deck.length - 1; i > 0; i--) { const o = this.random.below(i + 1), x = deck[i]; deck[i] = deck[o]; deck[o] = x }
    }
    return list[deck.pop()]
  }

  /** A random batch: `own` examples of the subject, the rest of the class. The noise levels of each kind are spread over the whole range,
   * one at random in each equal part of it: few steps see them all. @param {Example[]} subject @param {Example[]} prior
   * @param {number} own @param {number} priorWeight */
  sample(subject, prior, own, priorWeight = 1) {
    const B = this.batch, n = subject[0].latents.length, w = subject[0].states.length, rest = B - own
    const b = {latents: new Float32Array(B * n), noise: new Float32Array(B * n), times: [], states: new Float32Array(B * w), weight: new Float32Array(B)}
    for (let i = 0; i < B; i++) {
      const mine = i < own, x = mine ? this.next(subject, 'subject') : this.next(prior, 'prior'), T = this.engine.schedule.trained
      const part = ((mine ? i : i - own) + this.random.uniform()) / (mine ? own : rest)
      b.latents.set(x.latents, i * n); b.states.set(x.states, i * w); b.noise.set(this.random.normal(n), i * n)
      b.times.push(Math.min(T - 1, Math.floor(part * T)))
      b.weight[i] = mine ? 1 / own : priorWeight / rest
    }
    return b
  }

  /** What has been learned, as a LoRA. @param {string} name @param {Object<string, any>} note @returns {import('./lora.js').Lora} */
  lora(name, note = {}) {
    const layers = {}
    for (const r of this.layout) {
      layers[`${this.engine.manifest.training.component}.${r.path}`] = {rank: this.rank, inner: r.inner, outer: r.outer,
        downShape: [this.rank, r.inner], upShape: [r.outer, this.rank], down: this.theta.slice(r.down, r.up), up: this.theta.slice(r.up, r.end)}
    }
    return {name, layers, words: {}, note: {base: this.engine.manifest.base, ...note}}
  }
}
