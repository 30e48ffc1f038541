// Strips of pictures become sliders; where the page's model can draw what lies between, a button wakes it.
// Without this script the strip stays as it is.

const LIVE = new URL('../live/', import.meta.url), GAP = 6, COPY = 'The model that draws is not part of this copy of the site.'
let model = null, sizes = null, last = Promise.resolve()                // one worker for all figures of a page, and one picture at a time

async function wake(report) {
  return model ??= (async () => {
    const {Client} = await import(new URL('client.js', LIVE).href).catch(() => { throw new Error(COPY) }), client = new Client()
    const {manifest} = await client.ask('open', {url: new URL('model', LIVE).href, all: await bytes()}, ({got, all}) => report(got, all))
    return {client, manifest}
  })().catch(e => { model = null; throw e })
}

/** Bytes that waking the model fetches; null where the page that has it is not there. */
const bytes = () => sizes ??= fetch(new URL('page.json', LIVE)).then(a => a.json()).then(({bytes: b}) => b.draw + b.runtime.processor).catch(() => null)

const inTurn = job => last = last.then(job, job)
const element = (tag, props = {}, ...children) => { const e = Object.assign(document.createElement(tag), props); e.append(...children); return e }

/** @param {HTMLElement} figure with data-note, around the image of a strip */
function upgrade(figure) {
  const strip = figure.querySelector('img'), note = JSON.parse(figure.dataset.note), [, , w, h] = note.boxes[0][0], n = note.boxes[0].length
  const cols = n > 4 ? Math.ceil(n / 2) : n, all = cols * (w + GAP) - GAP, scale = Math.min(Math.max(2, 256 / all), 520 / all)
  const [wide, high, gap] = [w, h, GAP].map(x => Math.round(x * scale))              // whole pixels: no seams
  const place = j => [j % cols * (wide + gap), Math.floor(j / cols) * (high + gap), wide, high]
  const canvas = element('canvas', {width: cols * (wide + gap) - gap, height: Math.ceil(n / cols) * (high + gap) - gap})
  const slider = element('input', {type: 'range', min: 0, max: note.values.length - 1, step: 1, value: 0}), said = element('output')
  const live = note.live && element('button', {type: 'button', textContent: 'Draw what lies between'}), state = element('span', {role: 'status'})
  const box = element('div', {className: 'moving'}, canvas, element('div', {}, element('label', {}, `${note.label} `, said, slider), live ?? '', state))
  const say = value => {
    said.textContent = value; slider.setAttribute('aria-valuetext', value); canvas.setAttribute('aria-label', `${note.label} ${value}`)
  }
  const frame = () => {
    note.boxes[+slider.value].forEach(([x, y], j) => canvas.getContext('2d').drawImage(strip, x + .5, y + .5, w - 1, h - 1, ...place(j)))
    say(note.values[+slider.value])
  }
  canvas.setAttribute('role', 'img'); slider.oninput = frame
  const details = element('details', {}, element('summary', {textContent: 'all side by side'}))
  addEventListener('beforeprint', () => { details.open = true })
  figure.prepend(box); details.append(strip); figure.append(details)
  if (live) bytes().then(n => { if (n && !model) live.textContent += ` (${Math.round(n / 1e6)} MB, once)` })
  if (live) live.onclick = () => alive({note, canvas, slider, say, live, state, place})
  frame()
}

/** From here on the model draws. @param {{note: any, canvas: HTMLCanvasElement, slider: HTMLInputElement, say: (value: string) => void,
 * live: HTMLButtonElement, state: HTMLElement, place: (j: number) => number[]}} figure */
async function alive({note, canvas, slider, say, live, state, place}) {
  const {wish, set, range: [least, most, step], loras = []} = note.live
  live.disabled = true
  try {
    state.textContent = 'loading the model'
    const {client, manifest} = await wake((got, all) => { state.textContent = `loading the model: ${Math.round(got / 1e6)} of ${Math.round(all / 1e6)} MB` })
    for (const name of loras) await client.ask('lora', {name, url: new URL(`loras/${encodeURIComponent(name)}.safetensors`, LIVE).href})
    const size = manifest.latents.size, small = element('canvas', {width: size, height: size})
    const shown = Number(note.values[+slider.value]), part = +slider.value / (note.values.length - 1)
    Object.assign(slider, {min: least, max: most, step}); slider.value = String(Number.isFinite(shown) ? shown : least + part * (most - least))
    let wanted = null, busy = false
    const draw = async () => {
      wanted = slider.value; say(wanted)
      if (busy) return
      busy = true
      while (wanted !== null) {                           // what was asked for while a picture was drawn: only the newest
        const value = wanted; wanted = null
        try { state.textContent = `drawn here in ${(await inTurn(() => show(+value))).toFixed(2)} s` }
        catch (e) { state.textContent = e.message }
      }
      busy = false
    }
    const show = async value => {
      let seconds = 0
      for (const [j, one] of [wish].flat().entries()) {
        const out = await client.ask('draw', put(structuredClone(one), set, value))
        small.getContext('2d').putImageData(new ImageData(out.pixels, size, size), 0, 0)
        canvas.getContext('2d').drawImage(small, ...place(j)); seconds += out.seconds
      }
      return seconds
    }
    slider.oninput = draw; live.remove(); slider.focus(); await draw()
  } catch (e) { state.textContent = e.message; live.disabled = false }
}

/** A wish in which one value is set. `set`: a path such as "worn.0.strength"; "1 - worn.1.strength" sets what is left of one; "worn.0.until"
 * and "worn.0.from" let a LoRA act up to, or from, a share of the steps. */
function put(wish, set, value) {
  for (const path of [set].flat()) {
    const rest = path.startsWith('1 - '), keys = path.replace('1 - ', '').split('.'), last = keys.pop()
    const place = keys.reduce((o, k) => o[k], wish), x = rest ? 1 - value : value
    if (last === 'until' || last === 'from') place.curve = Array.from({length: 50}, (_, i) => +(last === 'until' ? (i + .5) / 50 < x : (i + .5) / 50 > x))
    else place[last] = x
  }
  return wish
}

for (const figure of document.querySelectorAll('figure.frames')) {
  const strip = figure.querySelector('img')
  strip.decode().then(() => upgrade(figure), () => {})
}
