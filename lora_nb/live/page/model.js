// What all parts of the page share: the model in its worker, the LoRAs that came with it, and how errors are said.
import {Client} from './client.js'
import {threadsHere} from './runtime.js'

export const $ = id => document.getElementById(id)
export const say = (text = '') => { $('error').textContent = text; $('error').hidden = !text }
export const fail = e => say(e.message)
export const megabytes = n => `${(n / 1e6).toFixed(n < 9.95e6 ? 1 : 0)} MB`
export const show = (canvas, pixels) => {
  const c = typeof canvas === 'string' ? $(canvas) : canvas
  c.getContext('2d').putImageData(new ImageData(pixels, c.width, c.height), 0, 0)
}

export const model = {
  client: null, manifest: null, cards: [], examples: {}, bytes: null, size: 64, busy: false, graphics: false, runs: '', drawn: 0,

  /** The worker has nothing to do: tell those who wait for it. */
  free() { this.busy = false; document.dispatchEvent(new Event('free')) },

  get turbo() { return this.cards.find(c => c.turbo) },

  /** What came with the page: LoRAs, examples to learn from, sizes. */
  async list() {
    let answer
    try { answer = await fetch('page.json') } catch { throw new Error('page.json could not be loaded: is the network down?') }
    if (!answer.ok) throw new Error(`page.json could not be loaded (${answer.status}).`)
    const {loras, examples, bytes} = await answer.json()
    this.cards = loras; this.examples = examples; this.bytes = bytes
  },

  /** Bytes of what runs the model here. */
  get runtime() { return this.bytes.runtime[this.graphics ? 'graphics' : 'processor'] },

  /** @param {(got: number, all: number) => void} report */
  async open(report) {
    this.client = new Client()
    const {graphics} = this, threads = threadsHere(), all = this.bytes.draw + this.runtime
    const {manifest} = await this.client.ask('open', {url: new URL('model', location.href).href, graphics, threads, all}, ({got}) => report(got, all))
    this.manifest = manifest; this.size = manifest.latents.size
    this.runs = threads > 1 ? `${threads} threads` : 'one thread'
  },

  /** Where there is a graphics card: whether it draws the same, and faster. @param {any} wish a picture */
  async race(wish) {
    if (!this.graphics) return null
    const found = await this.client.ask('race', wish)
    if (found.provider === 'webgpu') this.runs = 'WebGPU'
    return found
  },

  /** @param {string} name of a LoRA that came with the page, or was given or made */
  async load(name) { return this.client.ask('lora', {name, url: new URL(`loras/${encodeURIComponent(name)}.safetensors`, location.href).href}) },
}
