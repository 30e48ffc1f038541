// A curve drawn with the pointer: factors 0..1, from the first step to the last.

export class Curve {
  /** @param {HTMLCanvasElement} canvas @param {() => void} changed */
  constructor(canvas, changed) {
    this.canvas = canvas; this.changed = changed; this.values = Array(32).fill(1); this.last = null
    canvas.addEventListener('pointerdown', e => { canvas.setPointerCapture(e.pointerId); this.last = null; this.put(e) })
    canvas.addEventListener('pointermove', e => { if (e.buttons) this.put(e) })
    canvas.addEventListener('pointerup', () => { this.last = null; this.changed() })
    canvas.addEventListener('keydown', e => {
      const d = {ArrowUp: .1, ArrowDown: -.1}[e.key]
      if (!d) return
      e.preventDefault(); this.values = this.values.map(v => Math.min(1, Math.max(0, v + d))); this.paint(); this.changed()
    })
    this.paint()
  }
  put(e) {
    const b = this.canvas.getBoundingClientRect(), n = this.values.length
    const i = Math.min(n - 1, Math.max(0, Math.floor((e.clientX - b.left) / b.width * n)))
    const v = Math.min(1, Math.max(0, 1.1 - 1.2 * (e.clientY - b.top) / b.height))
    const from = this.last ?? {i, v}, steps = Math.abs(i - from.i)
    for (let k = 0; k <= steps; k++) this.values[from.i + Math.sign(i - from.i) * k] = steps ? from.v + (v - from.v) * k / steps : v
    this.last = {i, v}; this.paint()
  }
  set(values) { this.values = values; this.paint() }
  get flat() { return this.values.every(v => v === 1) }
  paint() {
    const c = this.canvas.getContext('2d'), {width: w, height: h} = this.canvas, n = this.values.length
    c.clearRect(0, 0, w, h)
    c.fillStyle = getComputedStyle(this.canvas).color
    this.values.forEach((v, i) => { const y = (1.1 - v) / 1.2 * h; c.globalAlpha = .35; c.fillRect(i * w / n, y, w / n + .5, h - y); c.globalAlpha = 1; c.fillRect(i * w / n, y - 1, w / n + .5, 3) })
    this.canvas.setAttribute('aria-valuenow', String(Math.round(100 * this.values.reduce((a, b) => a + b) / n) / 100))
  }
}
