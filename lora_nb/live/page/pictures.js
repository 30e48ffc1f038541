// Pictures that a reader gives: files, the camera, a small canvas to paint on. All become squares of the model's size.

/** The middle square of a picture, drawn onto a canvas. @param {HTMLCanvasElement} canvas of the wanted size
 * @param {CanvasImageSource} source @param {number} width of the source @param {number} height */
export function square(canvas, source, width, height) {
  const side = Math.min(width, height), context = canvas.getContext('2d', {willReadFrequently: true})
  let from = source, x = (width - side) / 2, y = (height - side) / 2, now = side
  while (now > 2 * canvas.width) {                       // by halves: one large step would skip pixels
    const half = document.createElement('canvas'), n = Math.ceil(now / 2)
    half.width = half.height = n
    half.getContext('2d').drawImage(from, x, y, now, now, 0, 0, n, n)
    from = half; x = y = 0; now = n
  }
  context.imageSmoothingQuality = 'high'
  context.fillStyle = '#fff'; context.fillRect(0, 0, canvas.width, canvas.height)      // what is transparent becomes white
  context.drawImage(from, x, y, now, now, 0, 0, canvas.width, canvas.height)
}

/** A picture file, as a canvas. Throws an Error for people. @param {Blob} file @param {string} name @param {number} size */
export async function pictureOf(file, name, size) {
  let bitmap
  try { bitmap = await createImageBitmap(file, {imageOrientation: 'from-image'}) }
  catch { throw new Error(`${name} is no picture that this browser can read: expected PNG, JPEG, WebP or GIF.`) }
  const canvas = document.createElement('canvas')
  canvas.width = canvas.height = size
  square(canvas, bitmap, bitmap.width, bitmap.height)
  bitmap.close()
  return canvas
}

/** What the model sees of a canvas. @param {HTMLCanvasElement} canvas @returns {Float32Array} (3, size, size) in -1..1 */
export function numbers(canvas) {
  const {width: w, height: h} = canvas, {data} = canvas.getContext('2d').getImageData(0, 0, w, h), n = w * h, out = new Float32Array(3 * n)
  for (let i = 0; i < n; i++) for (let c = 0; c < 3; c++) out[c * n + i] = data[4 * i + c] / 127.5 - 1
  return out
}

const NAMED = {red: [214, 40, 40], orange: [244, 132, 25], yellow: [250, 215, 50], green: [52, 160, 70], blue: [45, 100, 215], purple: [125, 60, 180],
  pink: [245, 145, 190], brown: [125, 80, 45], white: [245, 245, 245], gray: [140, 140, 140], black: [25, 25, 25]}     // the base's own words

/** "on a green background", if the edge of a picture has one colour; else "": a caption that names what is not the subject keeps it out
 * of the subject. @param {HTMLCanvasElement} canvas @returns {string} */
export function ground(canvas) {
  const {width: w, height: h} = canvas, {data} = canvas.getContext('2d').getImageData(0, 0, w, h), edge = []
  for (let i = 0; i < w; i++) for (const k of [i, (h - 1) * w + i, i * w, i * w + w - 1]) edge.push([data[4 * k], data[4 * k + 1], data[4 * k + 2]])
  const middle = [0, 1, 2].map(c => edge.map(p => p[c]).sort((a, b) => a - b)[edge.length >> 1]), far = (a, b) => Math.hypot(a[0] - b[0], a[1] - b[1], a[2] - b[2])
  if (edge.filter(p => far(p, middle) < 60).length < .85 * edge.length) return ''
  const [name] = Object.entries(NAMED).reduce((best, e) => far(e[1], middle) < far(best[1], middle) ? e : best)
  return `on ${/^[aeiou]/.test(name) ? 'an' : 'a'} ${name} background`
}

/** The camera, shown in `video`. @param {HTMLVideoElement} video @returns {Promise<() => void>} what ends it */
export async function camera(video) {
  if (!navigator.mediaDevices?.getUserMedia) throw new Error('This browser offers no camera here: it does so on https and on localhost.')
  let stream
  try { stream = await navigator.mediaDevices.getUserMedia({video: {facingMode: 'environment'}}) }
  catch (e) { throw new Error(e.name === 'NotAllowedError' ? 'The camera was not allowed.' : 'No camera was found.') }
  video.srcObject = stream
  await video.play()
  return () => { for (const t of stream.getTracks()) t.stop(); video.srcObject = null }
}

const COLOURS = ['#222222', '#ffffff', '#d62828', '#f48419', '#fad732', '#34a046', '#2d64d7', '#7d3cb4', '#f591be', '#7d502d']

export class Paint {
  /** @param {HTMLCanvasElement} canvas @param {HTMLElement} colours where the colours to choose from go */
  constructor(canvas, colours) {
    this.canvas = canvas; this.context = canvas.getContext('2d', {willReadFrequently: true}); this.colour = COLOURS[0]; this.size = 12; this.last = null
    for (const c of COLOURS) {
      const b = document.createElement('button')
      b.type = 'button'; b.className = 'colour'; b.style.background = c; b.setAttribute('aria-label', `colour ${c}`); b.setAttribute('aria-pressed', String(c === this.colour))
      b.onclick = () => { this.colour = c; for (const o of colours.children) o.setAttribute('aria-pressed', String(o === b)) }
      colours.append(b)
    }
    canvas.addEventListener('pointerdown', e => { canvas.setPointerCapture(e.pointerId); this.last = null; this.put(e) })
    canvas.addEventListener('pointermove', e => { if (e.buttons) this.put(e) })
    this.clear()
  }
  clear() { this.context.fillStyle = '#fff'; this.context.fillRect(0, 0, this.canvas.width, this.canvas.height) }
  fill() { this.context.fillStyle = this.colour; this.context.fillRect(0, 0, this.canvas.width, this.canvas.height) }
  put(e) {
    const b = this.canvas.getBoundingClientRect(), c = this.context
    const at = {x: (e.clientX - b.left) / b.width * this.canvas.width, y: (e.clientY - b.top) / b.height * this.canvas.height}, from = this.last ?? at
    c.strokeStyle = this.colour; c.lineWidth = this.size; c.lineCap = c.lineJoin = 'round'
    c.beginPath(); c.moveTo(from.x, from.y); c.lineTo(at.x, at.y + .01); c.stroke()
    this.last = at
  }
}
