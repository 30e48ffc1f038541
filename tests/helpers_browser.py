"A Chromium for tests of pages."
import contextlib, shutil

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CALM = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@contextlib.contextmanager
def chromium():
    "A browser that talks to nobody but its pages."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=CALM)
        try: yield b
        finally: b.close()


UNNAMED = """() => [...document.querySelectorAll('.ls input, .ls textarea, .ls select, .ls button, .ls img, .ls canvas')].filter(e => {
  if (e.classList.contains('ls-boot') || !(e.offsetParent || e.closest('label'))) return false;
  const named = e.labels && [...e.labels].some(l => l.innerText.trim()) || e.getAttribute('aria-label') || e.title || e.alt || e.placeholder
    || (e.tagName === 'BUTTON' && e.innerText.trim());
  return !named;
}).map(e => e.outerHTML.slice(0, 150))"""

FAINT = """() => {
  const nums = c => (c.match(/[\\d.]+/g) || []).map(Number), pen = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = c => { pen.clearRect(0, 0, 1, 1); pen.fillStyle = c; pen.fillRect(0, 0, 1, 1); const d = pen.getImageData(0, 0, 1, 1).data;
                      return [d[0], d[1], d[2], d[3] / 255]; };
  const light = ([r, g, b]) => { const f = [r, g, b].map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
                                 return .2126 * f[0] + .7152 * f[1] + .0722 * f[2]; };
  const under = e => { let out = [255, 255, 255], all = []; for (; e; e = e.parentElement) all.unshift(rgba(getComputedStyle(e).backgroundColor));
                       for (const [r, g, b, a] of all) out = [r, g, b].map((v, i) => a * v + (1 - a) * out[i]); return out; };
  const found = [];
  for (const e of document.querySelectorAll('.ls *')) {
    const text = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join('')
      || (e.value && e.type !== 'checkbox' && e.type !== 'range' ? e.value : '');
    if (!text || !e.offsetParent || e.disabled || e.closest('style, svg, option')
        || e.tagName === 'OPTION' || getComputedStyle(e).opacity < 1) continue;
    const back = under(e), [r, g, b, a] = rgba(getComputedStyle(e).color), ink = [r, g, b].map((v, i) => a * v + (1 - a) * back[i]);
    const [x, y] = [light(ink), light(back)].sort((p, q) => q - p), ratio = (x + .05) / (y + .05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${e.className} ${text.slice(0, 40)}`);
  }
  return found;
}"""

STICKS_OUT = """() => [...document.querySelectorAll('.ls *')].filter(e => {
  const r = e.getBoundingClientRect();
  return r.width && e.offsetParent && !e.closest('pre, svg, .ls-drop, .widget-readout') && (r.right > innerWidth + 1 || r.left < -1);
}).map(e => e.className + ' ' + (e.innerText || '').slice(0, 30))"""


def unnamed(page):
    "Controls and pictures of the studio that a screen reader cannot name."
    return page.evaluate(UNNAMED)


def faint(page):
    "Texts of the studio whose contrast with what is behind them is below 4.5."
    return page.evaluate(FAINT)


def sticks_out(page):
    "Elements of the studio that are wider than the window."
    return page.evaluate(STICKS_OUT)
