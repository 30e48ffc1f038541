// Play: prompt, LoRAs, a curve over the steps, and the picture as it forms.
import {Curve} from './curve.js'
import {$, fail, model, say, show} from './model.js'

let busy = false, again = false
const worn = new Map()                                   // name -> strength
const curve = new Curve($('curve'), () => wish())

function row(card) {                                     // names come from files: they are text, never HTML
  const box = document.createElement('div'), label = document.createElement('label'), slider = document.createElement('input'), value = document.createElement('output')
  box.className = 'lora'
  slider.type = 'range'; slider.min = '-0.5'; slider.max = '1.5'; slider.step = '0.05'; slider.value = '0'; slider.dataset.name = card.name
  label.textContent = card.name.replaceAll('_', ' ') + (card.trigger ? ` (say “${card.trigger}”)` : '')
  label.append(slider); value.textContent = '0'
  slider.oninput = () => { value.textContent = slider.value; worn.set(card.name, +slider.value); wish() }
  box.append(label, value); $('loras').append(box)
}

/** Called once, when the model is there. */
export async function open() {
  const {size, manifest, cards} = model
  for (const c of ['with', 'without']) $(c).width = $(c).height = size
  $('steps').value = manifest.sampling.steps; $('guidance').value = manifest.sampling.guidance_scale
  cards.filter(c => !c.turbo).forEach(row)
  $('few').disabled = !cards.some(c => c.turbo)
  await draw()
  if (model.graphics) await race()
}

/** Once, after the first picture: the graphics card may be faster. */
async function race() {
  busy = model.busy = true; $('draw').disabled = true
  const said = $('state').textContent
  $('state').textContent = `${said}; trying the graphics card …`
  try { await model.race({prompt: $('prompt').value, seed: 0, steps: 8, guidance: model.manifest.sampling.guidance_scale}) } catch (e) { fail(e) }
  $('state').textContent = `${said}; from now on with ${model.runs}`
  busy = false; model.free(); $('draw').disabled = false
}

/** A LoRA that has just been made or given gets a slider. */
export function add(card, strength = 0) {
  if (!model.cards.some(c => c.name === card.name)) { model.cards.push(card); row(card) }
  for (const x of $('loras').querySelectorAll('input')) if (x.dataset.name === card.name) { x.value = String(strength); x.oninput() }
}

function wish() {                                        // a slider moved: draw again with few steps, as soon as there is time
  if ($('few').checked) { if (busy) { again = true } else draw() }
}

export async function draw() {
  if (busy) return
  busy = model.busy = true; again = false; $('draw').disabled = true; $('stop').disabled = false; say()
  const turbo = $('few').checked ? model.turbo : null
  const list = [...worn].filter(([, s]) => s !== 0)
  const settings = {prompt: $('prompt').value, seed: Math.max(0, Math.floor(+$('seed').value || 0)), turbo: turbo?.name ?? null, show: turbo ? 0 : 6,
    steps: turbo ? turbo.turbo.steps : Math.min(50, Math.max(1, Math.floor(+$('steps').value || 25))), guidance: turbo ? turbo.turbo.guidance_scale : +$('guidance').value || 1}
  try {
    for (const name of [...list.map(([n]) => n), ...turbo ? [turbo.name] : []]) await model.load(name)
    const ask = (names, canvas) => model.client.ask('draw', {...settings, worn: names.map(([name, strength]) => ({name, strength, curve: curve.flat ? undefined : curve.values}))},
      ({step, pixels}) => { $('state').textContent = `step ${step} of ${settings.steps}`; if (pixels) show(canvas, pixels) })
    const out = await ask(list, 'with')
    show('with', out.pixels); model.drawn++
    $('said').textContent = `${settings.prompt}, seed ${settings.seed}${list.map(([n, s]) => `, ${n} ${s}`).join('')}`
    $('note').textContent = out.lost ? `The prompt is longer than 77 tokens: the last ${out.lost} are left out.` : ''
    if ($('beside').checked && !out.stopped) { $('other').hidden = false; show('without', (await ask([], 'without')).pixels) } else $('other').hidden = true
    $('state').textContent = out.stopped ? 'stopped: this is a preview' : `${out.seconds.toFixed(1)} s`
  } catch (e) { fail(e) }
  busy = false; model.free(); $('draw').disabled = false; $('stop').disabled = true
  if (again) draw()
}

$('form').onsubmit = e => { e.preventDefault(); draw() }
$('prompt').onkeydown = e => { if (e.key === 'Enter' && (e.ctrlKey || e.metaKey)) { e.preventDefault(); draw() } }
$('stop').onclick = () => model.client.ask('stop', {what: 'draw'})
$('flat').onclick = () => { curve.set(Array(32).fill(1)); wish() }
$('few').onchange = () => { for (const x of ['steps', 'guidance']) $(x).disabled = $('few').checked; draw() }
$('file').onchange = async () => {
  const f = $('file').files[0]
  if (!f) return
  $('file').value = ''                                   // so that the same file, mended, can be chosen again
  try {
    const buffer = await f.arrayBuffer(), name = f.name.replace(/\.safetensors$/, '')
    const about = await model.client.ask('lora', {name, buffer}, undefined, [buffer])
    say(); add({name, trigger: about.trigger})
    $('note').textContent = `${name}: ${about.layers} layers of rank ${about.rank}${about.words.length ? `, words ${about.words.join(', ')}` : ''}`
  } catch (e) { fail(e) }
}

$('prompt').value = 'a cat face on a striped blue background'
