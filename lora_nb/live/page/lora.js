// A LoRA is a value here, too: named pairs of thin matrices, the words it brings, and what a person must know.
import {widen} from './half.js'
import {read, write} from './safetensors.js'

/** @typedef {{rank: number, inner: number, outer: number, downShape: number[], upShape: number[], down: Float32Array, up: Float32Array}} Factors
 *  down (rank, inner), up (outer, rank) with the scale folded in
 * @typedef {{name: string, layers: Object<string, Factors>, words: Object<string, Object<string, {n: number, data: Float32Array}>>,
 *  note: Object<string, any>}} Lora */

const named = {'.lora_A.weight': 0, '.lora_B.weight': 1, '.lora.down.weight': 0, '.lora.up.weight': 1}

/** A LoRA from the bytes of a .safetensors file in PEFT's names, as lora_nb and diffusers write it. Throws an Error for people.
 * @param {ArrayBuffer} buffer @param {string} name of the file @returns {Lora} */
export function load(buffer, name) {
  const {tensors, metadata} = read(buffer), halves = Object.create(null), odd = []
  for (const key of Object.keys(tensors)) {
    const end = Object.keys(named).find(e => key.endsWith(e))
    if (!end || !/^(unet|text_encoder)\./.test(key)) { odd.push(key); continue }
    const path = key.slice(0, -end.length).replace('text_encoder.text_model.', 'text_encoder.')
    ;(halves[path] ??= [])[named[end]] = tensors[key]
  }
  if (odd.length) throw new Error(`${name}: this page reads LoRAs in PEFT's names for Stable Diffusion 1.x, and ${odd.length} tensors ` +
    `such as ${odd[0].slice(0, 80)} have others. In Python: lora_convert ${name} out.safetensors --format peft`)
  const note = {...metadata, ...parse(metadata.lora_nb)}, peft = parse(metadata.lora_adapter_metadata) ?? {}, layers = Object.create(null)
  for (const [path, [A, B]] of Object.entries(halves)) {
    if (!A || !B) throw new Error(`${name}: ${path} has only one of its two matrices.`)
    const rank = A.shape[0], inner = A.data.length / rank, outer = B.shape[0]
    if (B.data.length !== outer * rank) throw new Error(`${name}: the matrices of ${path} do not fit: ${A.shape} and ${B.shape}.`)
    const alpha = alphaOf(peft, path) ?? rank                          // ours is multiplied into `up` already
    layers[path] = {rank, inner, outer, downShape: A.shape, upShape: B.shape, down: A.data, up: B.data.map(x => x * alpha / rank)}
  }
  if (!Object.keys(layers).length) throw new Error(`${name} holds no layers.`)
  return {name, layers, words: wordsOf(note), note}
}

function parse(text) { try { return JSON.parse(text) } catch { return null } }

function alphaOf(peft, path) {
  const c = path.split('.')[0], alpha = peft[`${c}.lora_alpha`], own = peft[`${c}.alpha_pattern`]?.[path.slice(c.length + 1)]
  return own ?? alpha
}

function wordsOf(note) {
  const words = Object.create(null)
  for (const [word, parts] of Object.entries(note.embeddings ?? {})) {
    for (const [c, v] of Object.entries(parts)) {
      const bytes = Uint8Array.from(atob(v.data), x => x.charCodeAt(0))
      const data = {float16: () => widen(new Uint16Array(bytes.buffer)), float32: () => new Float32Array(bytes.buffer)}[v.dtype]
      if (!data) throw new Error(`The word ${word} is stored as ${v.dtype}; this page reads float16 and float32.`)
      ;(words[word] ??= Object.create(null))[c] = {n: v.shape[0], data: data()}
    }
  }
  return words
}

/** The factors that some LoRAs have together at some strengths: put side by side, which is their exact sum.
 * @param {{lora: Lora, strength: number|((path: string) => number)}[]} worn @param {string[]} paths with their component
 * @param {Object<string, {down: number[], up: number[]}>} shapes of a layer's factors of rank 1
 * @returns {{down: Float32Array, up: Float32Array, rank: number}[]} one for each path; zeros where no LoRA has it */
export function together(worn, paths, shapes) {
  return paths.map(path => {
    const parts = worn.map(w => ({f: w.lora.layers[path], s: typeof w.strength === 'function' ? w.strength(path) : w.strength}))
      .filter(p => p.f && p.s !== 0)
    const size = s => s.reduce((a, b) => a * b, 1)
    if (!parts.length) return {rank: 1, down: new Float32Array(size(shapes[path].down)), up: new Float32Array(size(shapes[path].up))}
    const rank = parts.reduce((n, p) => n + p.f.rank, 0), outer = parts[0].f.outer
    const down = new Float32Array(rank * parts[0].f.inner), up = new Float32Array(outer * rank)
    let r = 0
    for (const {f, s} of parts) {
      down.set(f.down, r * f.inner)
      for (let o = 0; o < outer; o++) for (let i = 0; i < f.rank; i++) up[o * rank + r + i] = s * f.up[o * f.rank + i]
      r += f.rank
    }
    return {rank, down, up}
  })
}

/** The bytes of a LoRA's file: PEFT's names, as diffusers and ComfyUI read them. @param {Lora} lora @returns {Uint8Array} */
export function save(lora) {
  const tensors = {}
  for (const [path, f] of Object.entries(lora.layers)) {
    tensors[`${path}.lora_A.weight`] = {shape: f.downShape, data: f.down}
    tensors[`${path}.lora_B.weight`] = {shape: f.upShape, data: f.up}
  }
  const text = v => typeof v === 'string' ? v : JSON.stringify(v)
  return write(tensors, {...Object.fromEntries(Object.entries(lora.note).map(([k, v]) => [k, text(v)])), format: 'pt'})
}
