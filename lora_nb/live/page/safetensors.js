// Reading and writing .safetensors: eight bytes of length, a JSON header, and the numbers.
import {narrow, widen} from './half.js'

/** @typedef {{shape: number[], data: Float32Array}} Tensor */

const MOST = 100_000_000                                  // bytes of a header, the format's own limit

/** The tensors of a file, in single precision, and its metadata. Throws an Error that a person can read.
 * @param {ArrayBuffer} buffer @returns {{tensors: Object<string, Tensor>, metadata: Object<string, string>}} */
export function read(buffer) {
  if (buffer.byteLength < 8) throw new Error(`Not a .safetensors file: it has ${buffer.byteLength} bytes.`)
  const length = Number(new DataView(buffer).getBigUint64(0, true))
  if (length > MOST || 8 + length > buffer.byteLength) throw new Error('Not a .safetensors file, or one that was cut off.')
  let header
  try { header = JSON.parse(new TextDecoder('utf-8', {fatal: true}).decode(new Uint8Array(buffer, 8, length))) }
  catch { throw new Error('Not a .safetensors file: its header cannot be read.') }
  const tensors = Object.create(null), metadata = Object.create(null)
  for (const [k, v] of Object.entries(header)) {
    if (k === '__metadata__') { for (const [n, t] of Object.entries(v)) metadata[n] = String(t); continue }
    const [a, b] = v.data_offsets ?? [], n = (v.shape ?? []).reduce((x, y) => x * y, 1)
    const bytes = {F32: 4, F16: 2, BF16: 2}[v.dtype]
    if (!bytes) throw new Error(`The tensor ${k} is of type ${v.dtype}; this page reads F32, F16 and BF16.`)
    if (!(b - a === n * bytes) || a < 0 || 8 + length + b > buffer.byteLength) throw new Error(`The tensor ${k} is cut off.`)
    const raw = buffer.slice(8 + length + a, 8 + length + b)               // a copy is aligned
    let data
    if (v.dtype === 'F32') data = new Float32Array(raw)
    else if (v.dtype === 'F16') data = widen(new Uint16Array(raw))
    else data = new Float32Array(Uint32Array.from(new Uint16Array(raw), h => h << 16).buffer)
    tensors[k] = {shape: v.shape, data}
  }
  return {tensors, metadata}
}

/** The bytes of a file. @param {Object<string, Tensor>} tensors @param {Object<string, string>} [metadata]
 * @param {'F16'|'F32'} [dtype] @returns {Uint8Array} */
export function write(tensors, metadata = {}, dtype = 'F16') {
  const header = {__metadata__: metadata}, parts = []
  let at = 0
  for (const k of Object.keys(tensors).sort()) {
    const {shape, data} = tensors[k], raw = dtype === 'F16' ? narrow(data) : data
    header[k] = {dtype, shape, data_offsets: [at, at += raw.byteLength]}
    parts.push(new Uint8Array(raw.buffer, raw.byteOffset, raw.byteLength))
  }
  let json = new TextEncoder().encode(JSON.stringify(header))
  const pad = (8 - json.length % 8) % 8, out = new Uint8Array(8 + json.length + pad + at)
  new DataView(out.buffer).setBigUint64(0, BigInt(json.length + pad), true)
  out.set(json, 8); out.fill(32, 8 + json.length, 8 + json.length + pad)
  at = 8 + json.length + pad
  for (const p of parts) { out.set(p, at); at += p.length }
  return out
}
