// The page's side of the worker: one promise for each call.

export class Client {
  constructor() {
    try { this.worker = new Worker(new URL('./worker.js', import.meta.url), {type: 'module'}) }
    catch { throw new Error('A browser does not start this page from a file. Serve the folder: python -m http.server, then open the address it prints.') }
    this.next = 0; this.waiting = new Map()
    this.worker.onmessage = ({data}) => {
      const w = this.waiting.get(data.id)
      if (!w) return
      if (data.progress) return w.progress?.(data.progress)
      this.waiting.delete(data.id)
      data.error !== undefined ? w.no(new Error(data.error)) : w.yes(data.value)
    }
    this.worker.onerror = e => {
      e.preventDefault()
      const text = location.protocol === 'file:' ? 'A browser does not start this page from a file. Serve the folder: python -m http.server, then open the address it prints.'
        : 'This browser cannot run the model: it needs modules in workers and WebAssembly with SIMD, as Chrome 91, Firefox 114 and Safari 16.4 have.'
      for (const w of this.waiting.values()) w.no(new Error(text))
      this.waiting.clear()
    }
  }
  /** @param {string} call @param {any} [args] @param {(progress: any) => void} [progress] @param {Transferable[]} [transfer] @returns {Promise<any>} */
  ask(call, args, progress, transfer = []) {
    return new Promise((yes, no) => { this.waiting.set(++this.next, {yes, no, progress}); this.worker.postMessage({id: this.next, call, args}, transfer) })
  }
}
