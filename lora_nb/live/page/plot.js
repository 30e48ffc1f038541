// The loss, as it comes: every step a dot, their running mean a line.

export class Plot {
  /** @param {HTMLCanvasElement} canvas @param {number} steps that are planned */
  constructor(canvas, steps) { this.canvas = canvas; this.steps = steps; this.values = []; this.paint() }
  add(value) { this.values.push(value); this.paint() }
  /** Mean of the last `n` values. */
  mean(n = 20) { const last = this.values.slice(-n); return last.reduce((a, b) => a + b, 0) / last.length }
  paint() {
    const c = this.canvas.getContext('2d'), {width: w, height: h} = this.canvas, style = getComputedStyle(this.canvas), v = this.values
    c.clearRect(0, 0, w, h)
    c.fillStyle = c.strokeStyle = style.color; c.font = '11px system-ui, sans-serif'
    const top = Math.max(.1, ...v) * 1.05, x = k => 34 + (w - 40) * k / Math.max(1, this.steps - 1), y = a => 6 + (h - 24) * (1 - a / top)
    c.globalAlpha = .5; c.lineWidth = 1
    for (const a of [0, top / 2, top]) { c.beginPath(); c.moveTo(34, y(a)); c.lineTo(w - 6, y(a)); c.globalAlpha = .2; c.stroke(); c.globalAlpha = .8; c.fillText(a.toFixed(2), 4, y(a) + 4) }
    c.fillText('0', 32, h - 4); c.fillText(`${this.steps} steps`, w - 58, h - 4)
    c.globalAlpha = .35
    v.forEach((a, k) => c.fillRect(x(k) - 1, y(a) - 1, 2.5, 2.5))
    c.globalAlpha = 1; c.lineWidth = 2; c.beginPath()
    let mean = null
    v.forEach((a, k) => { mean = mean === null ? a : mean + (a - mean) / Math.min(k + 1, 10); k ? c.lineTo(x(k), y(mean)) : c.moveTo(x(k), y(mean)) })
    c.stroke()
    this.canvas.setAttribute('aria-label', v.length ? `loss: ${v[0].toFixed(3)} at first, ${this.mean().toFixed(3)} over the last steps` : 'loss')
  }
}
