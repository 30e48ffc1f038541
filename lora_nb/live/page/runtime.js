// What runs the graphs: onnxruntime-web, in the build that suits this browser.
import {fetchBytes, unpack} from './download.js'

const SIMD = Uint8Array.of(0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11)   // a function of one vector

/** Why this browser cannot run the model, as a sentence; '' if it can. @returns {string} */
export function unable() {
  const lacks = typeof WebAssembly !== 'object' ? 'WebAssembly' : !WebAssembly.validate(SIMD) ? 'WebAssembly with SIMD' : typeof DecompressionStream !== 'function' ? 'DecompressionStream' : ''
  return lacks && `This browser or device cannot run the model: it has no ${lacks}. Chrome 91, Firefox 114 and Safari 16.4 have it, and later ones.`
}

/** Whether there is a graphics card that WebGPU can use from WebAssembly. @returns {Promise<boolean>} */
export async function hasGraphics() {
  if (typeof WebAssembly !== 'object' || !('Suspending' in WebAssembly) || !navigator.gpu) return false
  try { const adapter = await navigator.gpu.requestAdapter(); return !!adapter && !(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter) } catch { return false }
}

/** How many threads pay: each of them wants a core of its own, and the page another one. @returns {number} */
export function threadsHere() {
  return globalThis.crossOriginIsolated ? Math.max(1, Math.min(4, (navigator.hardwareConcurrency || 1) >> 1)) : 1
}

/** The runtime. @param {string} folder @param {{threads?: number, graphics?: boolean}} how @param {(got: number) => void} [report] bytes */
export async function openRuntime(folder, {threads = 1, graphics = false}, report) {
  const [script, loader] = graphics ? ['ort.jspi.min.mjs', 'ort-wasm-simd-threaded.jspi'] : ['ort.wasm.min.mjs', 'ort-wasm-simd-threaded']
  let ort
  try { ort = await import(`${folder}/${script}`) } catch { throw new Error(`${script} could not be loaded: is the network down?`) }
  ort.env.wasm.wasmBinary = await unpack(await fetchBytes(`${folder}/${loader}.wasm.gzip`, report), `${loader}.wasm.gzip`)
  ort.env.wasm.wasmPaths = {mjs: `${folder}/${loader}.mjs`}
  ort.env.wasm.numThreads = threads
  ort.env.logLevel = 'error'
  return ort
}
