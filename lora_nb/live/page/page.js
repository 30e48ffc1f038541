// The page: load the model, then play or teach.
import {isolate} from './isolate.js'
import {$, fail, megabytes, model, say} from './model.js'
import * as play from './play.js'
import {hasGraphics, unable} from './runtime.js'
import * as teach from './teach.js'

const tabs = {play: [$('tab-play'), $('panel')], teach: [$('tab-teach'), $('teach')]}

function choose(name, focus = false) {
  for (const [k, [tab, panel]] of Object.entries(tabs)) {
    tab.setAttribute('aria-selected', String(k === name)); tab.tabIndex = k === name ? 0 : -1; panel.hidden = k !== name
    if (focus && k === name) tab.focus()
  }
  history.replaceState(null, '', `#${name}`)
  if (name === 'teach') teach.load()
}

async function start() {
  $('load').disabled = true; $('bar').hidden = false; say()
  try {
    await model.open((got, all) => { $('bar').value = got / all; $('size').textContent = `${megabytes(got)} of ${megabytes(all)}` })
    teach.open(choose)
    $('begin').hidden = true; $('tabs').hidden = false
    choose(location.hash === '#teach' ? 'teach' : 'play')
    await play.open()
  } catch (e) { fail(e); $('load').disabled = false; $('bar').hidden = true }
}

for (const [k, [tab]] of Object.entries(tabs)) {
  tab.onclick = () => choose(k)
  tab.onkeydown = e => { if (['ArrowLeft', 'ArrowRight'].includes(e.key)) choose(k === 'play' ? 'teach' : 'play', true) }
}
$('load').onclick = start

async function offer() {
  const no = unable()
  if (no) return say(no)
  if (await isolate()) return
  await model.list(); model.graphics = await hasGraphics()
  const {draw, learn} = model.bytes, runtime = model.runtime
  tabs.teach[0].hidden = !learn
  $('size').textContent = `${megabytes(draw + runtime)} once (the model ${megabytes(draw)}, what runs it ${megabytes(runtime)}), then from your browser's cache.` +
    (learn ? ` Teaching it fetches ${megabytes(learn)} more.` : '')
  $('load').disabled = false
}
offer().catch(fail)
window.lora_nb = {model, ready: () => model.manifest && !model.busy}          // for tests
