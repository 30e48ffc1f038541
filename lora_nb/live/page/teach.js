// Teach it your own: pictures, a name, the training with its loss and previews, and what came of it.
import {camera, ground, numbers, Paint, pictureOf, square} from './pictures.js'
import {Plot} from './plot.js'
import {add} from './play.js'
import {$, fail, megabytes, model, say, show} from './model.js'

const MOST = 8, GROUNDS = ['a striped blue background', 'a dotted green background', 'a yellow background', 'a checkered red background']
const RATE = 4e-3, PREVIEWS = 5
const tiles = []                                          // {canvas, input, words}: what is learned from; `words`: its caption as long as nobody typed one
let loaded = null, plot = null, plan = null, made = null, stop = null, choose = () => {}

const canvasOf = () => { const c = document.createElement('canvas'); c.width = c.height = model.size; return c }
const words = () => ({trigger: $('trigger').value.trim() || 'sks', noun: $('noun').value.trim() || 'thing'})
const a = noun => `${/^[aeiou]/i.test(noun) ? 'an' : 'a'} ${noun}`

/** Called once, when the model is there. @param {(tab: string) => void} chooser */
export function open(chooser) {
  choose = chooser
  for (const [name, e] of Object.entries(model.examples)) {
    const o = document.createElement('option')
    o.value = name; o.textContent = name.replaceAll('_', ' '); $('example').append(o)
    if (![...$('nouns').children].some(n => n.value === e.noun)) { const n = document.createElement('option'); n.value = e.noun; $('nouns').append(n) }
  }
  const paint = new Paint($('paint'), $('colours'))
  $('brush').oninput = () => { paint.size = +$('brush').value }
  $('fill').onclick = () => paint.fill()
  $('wipe').onclick = () => paint.clear()
  refresh()
}

/** Fetch what learning needs, which drawing does not: once, when the reader comes here. */
export async function load() {
  if (loaded !== null) return
  loaded = false; $('fetching').hidden = false; say()
  const tell = (got, all) => { $('more').value = got / all; $('much').textContent = `Fetching what learns: ${megabytes(got)} of ${megabytes(all)}. You can choose pictures meanwhile.` }
  tell(0, model.bytes.learn)
  try { await model.client.ask('learn', {}, ({got, all}) => tell(got, all)); loaded = true; warm() }
  catch (e) { loaded = null; fail(e) }
  $('fetching').hidden = true
  refresh()
}

/** What trains is made ready while the reader chooses pictures; what goes wrong with it is said when it is needed. */
function warm() { if (loaded && !model.busy) model.client.ask('warm', {prior: $('prior').checked}).catch(() => {}) }

function refresh() {
  const said = `${words().trigger} ${words().noun}`
  $('caption').textContent = said
  for (const t of tiles) {
    if (t.words !== null) t.input.value = t.words.replaceAll('{trigger}', said)
    t.input.title = t.input.value; t.input.classList.toggle('unsaid', !t.input.value.includes(said))
  }
  $('learn').disabled = !tiles.length || model.busy || !loaded
  $('learn').textContent = !model.busy && plan && !plan.done && tiles.length && key(plan) === key(newPlan()) ? 'Resume' : 'Train'
  $('hint').textContent = tiles.length ? `${tiles.length} picture${tiles.length > 1 ? 's' : ''} to learn from.${tiles.length < 3 ? ' Three to eight teach more.' : ''}`
    : 'Drop pictures of one thing here. The middle square of each is used. They stay on your machine.'
}

const WORDINGS = ['a {trigger}', 'a picture of a {trigger}', 'a {trigger}', 'an image of a {trigger}', 'a photo of a {trigger}']   // not one sentence by heart

function tile(canvas, what, words = `${WORDINGS[tiles.length % WORDINGS.length]} ${ground(canvas)}`.trim()) {
  if (tiles.length >= MOST) throw new Error(`Eight pictures are enough here: ${what} was left out.`)
  const box = document.createElement('figure'), away = document.createElement('button'), input = document.createElement('textarea'), t = {canvas, input, words}
  input.spellcheck = false; input.maxLength = 200; input.rows = 3; input.setAttribute('aria-label', `caption of ${what}`)
  input.oninput = () => { t.words = null; refresh() }
  canvas.setAttribute('role', 'img'); canvas.setAttribute('aria-label', what)
  away.type = 'button'; away.textContent = '×'; away.title = 'leave it out'; away.setAttribute('aria-label', `leave out ${what}`)
  away.onclick = () => { tiles.splice(tiles.indexOf(t), 1); box.remove(); refresh() }
  box.append(canvas, away, input); $('tiles').append(box); tiles.push(t); refresh()
}

async function give(files) {
  say()
  for (const f of files) try { tile(await pictureOf(f, f.name, model.size), f.name) } catch (e) { fail(e) }
}

async function example(name) {
  const e = model.examples[name]
  try {
    for (const t of [...$('tiles').children]) t.remove()
    tiles.length = 0; $('noun').value = e.noun
    for (const [file, caption] of e.pictures) {
      const answer = await fetch(`examples/${name}/${file}`)
      if (!answer.ok) throw new Error(`${file} could not be loaded (${answer.status}).`)
      tile(await pictureOf(await answer.blob(), file, model.size), `${name} ${file}`, caption ?? undefined)
    }
  } catch (e) { fail(e) }
  refresh()
}

const newPlan = () => {
  const {trigger, noun} = words(), steps = Math.min(400, Math.max(20, Math.floor(+$('many').value || 100))), {sampling} = model.manifest
  return {pictures: tiles.map(t => numbers(t.canvas)), captions: tiles.map(t => t.input.value.trim().replace(/\s+/g, ' ') || `a ${trigger} ${noun}`),
    classPrompt: $('prior').checked ? a(noun) : null, trigger, noun, steps, lr: RATE, seed: 0, every: Math.ceil(steps / PREVIEWS),
    preview: {prompt: `a ${trigger} ${noun} on ${GROUNDS[0]}`, seed: 1, steps: 5, guidance: sampling.guidance_scale}}
}

/** What must not change between stopping and going on. */
const key = p => JSON.stringify([p.captions, p.classPrompt, p.steps, p.pictures.map(x => x.reduce((s, v, i) => (s * 31 + v * (i % 97)) % 1e9, 7))])

async function learn() {
  const wish = newPlan(), on = plan && !plan.done && key(plan) === key(wish)
  model.busy = true; refresh(); say(); $('halt').disabled = false
  const said = text => { $('progress').textContent = text }
  try {
    if (!on) {
      plan = wish; made = null; $('previews').replaceChildren(); $('result').hidden = true
      $('soon').hidden = true; $('loss').hidden = false
      plot = new Plot($('loss'), plan.steps)
      said('preparing the pictures …')
      preview('0', (await model.client.ask('draw', {...plan.preview, worn: []})).pixels)
      const {stopped} = await model.client.ask('prepare', plan,
        ({done, all}) => said(`drawing ${plan.noun} pictures to keep: ${done} of ${all}`))
      if (stopped) { plan = null; said('stopped'); return }
      said('starting …')
    }
    const out = await model.client.ask('train', {}, ({step, loss, seconds, preview: pixels}) => {
      if (pixels) return preview(String(step), pixels)
      plot.add(loss)
      said(`step ${step} of ${plan.steps}, loss ${plot.mean().toFixed(3)}, ${Math.ceil((plan.steps - step) * seconds)} s left`)
    })
    plan.done = !out.stopped
    said(out.stopped ? `stopped after ${out.step} steps; Resume goes on from here` : `${out.step} steps, loss ${plot.mean().toFixed(3)}. Looking at what it learned …`)
    await result(out.step)
    if (!out.stopped) said(`${out.step} steps, loss ${plot.mean().toFixed(3)}`)
  } catch (e) { plan = null; fail(e); said('') } finally { model.free(); $('halt').disabled = true }
}

function preview(step, pixels) {
  const f = document.createElement('figure'), c = canvasOf(), t = document.createElement('figcaption')
  t.textContent = step === '0' ? 'before' : `step ${step}`
  c.setAttribute('role', 'img'); c.setAttribute('aria-label', `${plan.preview.prompt}, ${t.textContent}`)
  show(c, pixels); f.append(c, t); $('previews').append(f)
}

async function result(step) {
  const {trigger, noun} = plan, name = `${trigger}-${noun}`.replace(/[^\p{L}\p{N}]+/gu, '-').slice(0, 60) || 'lora', {sampling} = model.manifest
  const bytes = await model.client.ask('learned', {name})
  made = {name, bytes, trigger: `${trigger} ${noun}`, step}
  $('pairs').replaceChildren(); $('result').hidden = false; $('measure').textContent = ''
  const drawn = {before: [], after: []}
  for (const [i, ground] of GROUNDS.entries()) {
    const prompt = `a ${trigger} ${noun} on ${ground}`, row = document.createElement('figure'), t = document.createElement('figcaption')
    row.className = 'pair'; t.textContent = prompt
    for (const [when, worn] of [['before', []], ['after', [{name, strength: 1}]]]) {
      const c = canvasOf()
      c.setAttribute('role', 'img'); c.setAttribute('aria-label', `${prompt}, ${when}`)
      row.append(c); if (when === 'after') row.append(t)
      $('pairs').append(row)
      show(c, (await model.client.ask('draw', {prompt, seed: 10 + i, steps: sampling.steps, guidance: sampling.guidance_scale, worn})).pixels)
      drawn[when].push(numbers(c))
    }
  }
  if (model.manifest.describer) await measure(drawn)
  $('python').textContent = ['from lora_nb import apply_lora, load_base', '', `base = load_base(${JSON.stringify(model.manifest.base)})`,
    `apply_lora(base, ${JSON.stringify(`${name}.safetensors`)})`, `base.generate([${JSON.stringify(`a ${trigger} ${noun} on a purple background`)}])[0]`, '',
    '# or in a pipeline of diffusers:', `pipe.load_lora_weights(${JSON.stringify(`${name}.safetensors`)})`].join('\n')
}

async function measure(drawn) {
  const mean = x => x.reduce((s, v) => s + v, 0) / x.length, alike = {}
  for (const when of ['before', 'after']) alike[when] = mean(await model.client.ask('alike', {drawn: drawn[when], given: plan.pictures}))
  made.alike = alike
  $('measure').textContent = `Similarity to your pictures, as a small image encoder sees them (1: the same): ${alike.before.toFixed(2)} before, ${alike.after.toFixed(2)} after.`
}

function download() {
  const link = document.createElement('a'), url = URL.createObjectURL(new Blob([made.bytes], {type: 'application/octet-stream'}))
  link.href = url; link.download = `${made.name}.safetensors`; link.click()
  setTimeout(() => URL.revokeObjectURL(url), 10_000)
}

async function shoot(start) {
  if (stop) { stop(); stop = null }
  $('shot').hidden = !start
  if (start) try { stop = await camera($('video')) } catch (e) { $('shot').hidden = true; fail(e) }
}

function taken(source, width, height, what) {
  const c = canvasOf()
  square(c, source, width, height)
  try { tile(c, what) } catch (e) { fail(e) }
}

document.addEventListener('free', refresh)
$('lesson').onsubmit = e => { e.preventDefault(); if (!$('learn').disabled) learn() }
$('halt').onclick = () => model.client.ask('stop', {what: 'train'})
$('pick').onclick = () => $('files').click()
$('files').onchange = () => { give([...$('files').files]); $('files').value = '' }
$('example').onchange = () => { if ($('example').value) example($('example').value) }
$('trigger').oninput = $('noun').oninput = $('many').oninput = refresh
$('prior').onchange = () => { refresh(); warm() }
$('snap').onclick = () => shoot(true)
$('away').onclick = () => shoot(false)
$('take').onclick = () => taken($('video'), $('video').videoWidth, $('video').videoHeight, `photo ${tiles.length + 1}`)
$('sketch').onclick = () => { $('board').hidden = !$('board').hidden }
$('unsketch').onclick = () => { $('board').hidden = true }
$('keep').onclick = () => taken($('paint'), 256, 256, `drawing ${tiles.length + 1}`)
$('save').onclick = download
$('playit').onclick = () => { add({name: made.name, trigger: made.trigger}, 1); $('prompt').value = `a ${made.trigger} on a striped purple background`; choose('play'); $('form').requestSubmit() }
for (const [type, on] of [['dragover', true], ['dragleave', false], ['drop', false]]) {
  $('teach').addEventListener(type, e => { e.preventDefault(); $('own').classList.toggle('over', on); if (type === 'drop') give([...e.dataTransfer.files]) })
}
