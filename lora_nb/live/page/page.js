// The page: load the model, then play or teach.
import {$, fail, model, say} from './model.js'
import * as play from './play.js'
import * as teach from './teach.js'

const megabytes = n => `${(n / 1e6).toFixed(0)} MB`
const tabs = {play: [$('tab-play'), $('panel')], teach: [$('tab-teach'), $('teach')]}

function choose(name, focus = false) {
  for (const [k, [tab, panel]] of Object.entries(tabs)) {
    tab.setAttribute('aria-selected', String(k === name)); tab.tabIndex = k === name ? 0 : -1; panel.hidden = k !== name
    if (focus && k === name) tab.focus()
  }
  history.replaceState(null, '', `#${name}`)
}

async function start() {
  $('load').disabled = true; $('bar').hidden = false; say()
  try {
    await model.open((got, all) => { $('bar').value = got / all; $('size').textContent = `${megabytes(got)} of ${megabytes(all)}` })
    teach.open(choose)
    $('begin').hidden = true; $('tabs').hidden = false
    choose(location.hash === '#teach' ? 'teach' : 'play')
    await play.open()
  } catch (e) { fail(e); $('load').disabled = false }
}

for (const [k, [tab]] of Object.entries(tabs)) {
  tab.onclick = () => choose(k)
  tab.onkeydown = e => { if (['ArrowLeft', 'ArrowRight'].includes(e.key)) choose(k === 'play' ? 'teach' : 'play', true) }
}
$('load').onclick = start
model.list().then(() => {
  const {model: m, runtime} = model.bytes
  $('size').textContent = `${megabytes(m + runtime)} once (the model ${megabytes(m)}, what runs it ${megabytes(runtime)}), then from your browser's cache`
  $('load').disabled = false
}, fail)
window.lora_nb = {model, ready: () => model.client && !model.busy}          // for tests
