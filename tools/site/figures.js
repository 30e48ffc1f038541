// Strips of pictures become sliders; where the page's model can draw what lies between, a button wakes it.
// Without this script the strip stays as it is.

const LIVE = new URL('../live/', import.meta.url)
let model = null                                          // one worker for all figures of a page

async function wake(report) {
  return model ??= (async () => {
    const {Client} = await import(new URL('client.js', LIVE).href), client = new Client()
    const {manifest} = await client.ask('open', {url: new URL('model', LIVE).href}, ({got, all}) => report(got / all))
    return {client, manifest}
  })().catch(e => { model = null; throw e })
}

const element = (tag, props = {}, ...children) => { const e = Object.assign(document.createElement(tag), props); e.append(...children); return e }

/** @param {HTMLElement} figure with data-note, around the image of a strip */
function upgrade(figure) {
  const strip = figure.querySelector('img'), note = JSON.parse(figure.dataset.note), [, , width, height] = note.boxes[0]
  const scale = Math.max(1, Math.min(2, Math.floor(320 / width)))
  const canvas = element('canvas', {width: width * scale, height: height * scale})
  const slider = element('input', {type: 'range', min: 0, max: note.values.length - 1, step: 1, value: 0}), said = element('output')
  const live = note.live && element('button', {type: 'button', textContent: 'Draw what lies between'}), state = element('span', {role: 'status'})
  const label = element('label', {}, `${note.label} `, said, slider)
  const box = element('div', {className: 'moving'}, canvas, element('div', {}, label, live ?? '', state))
  canvas.setAttribute('role', 'img')
  const frame = () => {
    const i = +slider.value, [x, y, w, h] = note.boxes[i]
    canvas.getContext('2d').drawImage(strip, x, y, w, h, 0, 0, canvas.width, canvas.height)
    said.textContent = note.values[i]; canvas.setAttribute('aria-label', `${note.label} ${note.values[i]}`)
  }
  slider.oninput = frame
  const details = element('details', {}, element('summary', {textContent: 'all side by side'}))
  figure.prepend(box); details.append(strip); figure.append(details)
  if (live) live.onclick = () => alive({note, canvas, slider, said, live, state})
  frame()
}

/** From here on the model draws. @param {{note: any, canvas: HTMLCanvasElement, slider: HTMLInputElement, said: HTMLOutputElement,
 * live: HTMLButtonElement, state: HTMLElement}} figure */
async function alive({note, canvas, slider, said, live, state}) {
  const {wish, set, range: [least, most, step], loras = []} = note.live
  live.disabled = true
  try {
    const {client, manifest} = await wake(share => { state.textContent = ` loading the model, ${Math.round(100 * share)} %` })
    for (const name of loras) await client.ask('lora', {name, url: new URL(`loras/${encodeURIComponent(name)}.safetensors`, LIVE).href})
    const size = manifest.latents.size, small = element('canvas', {width: size, height: size})
    const part = +slider.value / (note.values.length - 1)
    Object.assign(slider, {min: least, max: most, step}); slider.value = String(least + part * (most - least))
    let busy = false, again = false
    const draw = async () => {
      said.textContent = slider.value; canvas.setAttribute('aria-label', `${note.label} ${slider.value}`)
      if (busy) { again = true; return }
      busy = true; again = false
      try {
        const {pixels, seconds} = await client.ask('draw', put(structuredClone(wish), set, +slider.value))
        small.getContext('2d').putImageData(new ImageData(pixels, size, size), 0, 0)
        canvas.getContext('2d').drawImage(small, 0, 0, canvas.width, canvas.height)
        state.textContent = ` drawn here in ${seconds.toFixed(2)} s`
      } catch (e) { state.textContent = ` ${e.message}` }
      busy = false
      if (again) draw()
    }
    slider.oninput = draw; live.remove(); await draw()
  } catch (e) { state.textContent = ` ${e.message}`; live.disabled = false }
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
