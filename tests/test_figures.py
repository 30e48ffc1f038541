"Strips of pictures that the site turns into sliders: tools/docs.py writes the figure, tools/site/figures.js moves it."
import re, shutil, sys
from pathlib import Path

import numpy as np
import pytest
from helpers_browser import chromium, needs_browser
from PIL import Image

from lora_nb.live import PAGE, serve_live
from lora_nb.show import frames

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from docs import LIVE as PLACE, moving, to_live, with_page  # noqa: E402

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (220, 210, 20)]
WISH = dict(prompt="a <cat> & \"dog\"", seed=0, steps=2, guidance=1, worn=[dict(name="a", strength=0)])
LIVE = dict(wish=WISH, set="worn.0.strength", range=[-1, 1, .25], loras=["a"])

# What the page's client does is tested in test_live.py; here one that paints what it is asked for: the strength as a shade of grey.
CLIENT = """export class Client {
  async ask(call, args, report) {
    (window.asked ??= []).push([call, args])
    if (call === 'open') { report({got: 5e6, all: 20e6}); return {manifest: {latents: {size: 4}}} }
    if (call === 'lora') return {}
    if (window.drawing) window.overlap = true
    window.drawing = true; await new Promise(go => setTimeout(go, 60)); window.drawing = false
    const pixels = new Uint8ClampedArray(64).fill(255), shade = 100 + 100 * args.worn[0].strength
    for (let i = 0; i < 16; i++) pixels.fill(shade, 4 * i, 4 * i + 3)
    return {pixels, seconds: .06}
  }
}"""


def flat(colour): return Image.new("RGB", (64, 64), colour)


def figure(pictures, label="strength", live=None):
    "A strip as the site has it"
    data, note = frames(pictures, label, live)._repr_mimebundle_()
    import base64
    output = dict(data={"image/jpeg": base64.b64encode(data["image/jpeg"]).decode()}, metadata=note)
    moving(output)
    return output["data"]["text/html"]


def site(folder, *figures, client=None):
    "A page with figures, as the site has it, and where the model's client would be"
    (folder / "_static").mkdir(parents=True)
    for n in ("figures.js", "style.css"): shutil.copy(ROOT / "tools/site" / n, folder / "_static")
    if client: (folder / "live").mkdir(); (folder / "live/client.js").write_text(client)
    (folder / "index.html").write_text('<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="_static/style.css">'
                                      f'<main>{"".join(figures)}</main><script type="module" src="_static/figures.js"></script>')
    return folder


STRENGTHS = dict(zip(("-1", "0", "0.5", "1"), map(flat, COLOURS)))


@pytest.fixture(scope="module")
def browser():
    with chromium() as b: yield b


@pytest.fixture
def visit(browser, tmp_path):
    "visit(figures, client=..., **options of the browser) -> a page that is open; errors in it fail the test"
    closing, wrong = [], []
    def go(*figures, client=None, **options):
        server, context = serve_live(site(tmp_path / f"site{len(closing)}", *figures, client=client)), browser.new_context(**options)
        page = context.new_page()
        closing.extend([context.close, server.shutdown])
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.goto(f"http://127.0.0.1:{server.server_address[1]}/index.html")
        return page
    yield go
    for close in closing: close()
    assert not wrong, wrong


def pixel(page, x=.5, y=.5, which=0):
    "Colour of the canvas at a share of its width and height"
    return page.evaluate("""([x, y, which]) => { const c = document.querySelectorAll('.moving canvas')[which], at = [x * c.width, y * c.height]
        return Array.from(c.getContext('2d').getImageData(...at.map(Math.floor), 1, 1).data.slice(0, 3)) }""", [x, y, which])


def move(page, value, which=0): page.locator(".moving input").nth(which).evaluate(
    "(e, v) => { e.value = v; e.dispatchEvent(new Event('input')) }", str(value))


def near(a, b): return np.abs(np.array(a) - np.array(b)).max() < 12       # JPEG


def test_html_holds_the_note_and_nothing_breaks_out():
    html = figure({"<b>": flat("red"), '"': flat("blue"), "'&": flat("green")}, "it's \"<i>\"", LIVE)
    assert "<b>" not in html and "<i>" not in html and len(re.findall("<[a-z]+", html)) == 2     # one figure, one image
    plain = dict(data={"image/jpeg": "xx"}, metadata={})
    moving(plain)
    assert plain["data"] == {"image/jpeg": "xx"}                              # a picture without a note stays a picture


def test_the_site_takes_the_page_of_this_version_only(tmp_path, capsys):
    page, target = tmp_path / "made", tmp_path / "site/live"
    with_page(page, target)
    assert "without the page that draws" in capsys.readouterr().out and not target.exists()
    (page / "model").mkdir(parents=True); (page / "play.js").write_text("old"); (page / "model/draw.gzip").write_text("weights")
    (page / "page.json").write_text('{"bytes": {"model": 1, "runtime": 2}}')
    with pytest.raises(SystemExit, match="make live"): with_page(page, target)
    (page / "page.json").write_text('{"bytes": {"draw": 1}}')
    target.mkdir(parents=True); (target / "weights.bin").write_text("of an earlier version")
    with_page(page, target)
    assert (target / "play.js").read_text() == (PAGE / "play.js").read_text() and (target / "model/draw.gzip").exists()
    assert not (target / "weights.bin").exists()


def test_a_picture_that_leads_to_the_page_is_one_link(tmp_path):
    from sphinx.application import Sphinx
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "conf.py").write_text("extensions = ['myst_parser']; myst_enable_extensions = ['html_image']; html_theme = 'basic'")
    (tmp_path / "index.md").write_text(to_live(f'# A\n\n[<img src="a.png" width="4" alt="x">]({PLACE}) and [the page]({PLACE}#teach)\n', "index"))
    Sphinx(tmp_path, tmp_path, tmp_path / "out", tmp_path / "trees", "html", status=None, warning=None).build()
    body = re.search(r"<h1>.*?</section>", (tmp_path / "out/index.html").read_text(), re.S)[0]
    links = re.findall(r'<a (?!class="headerlink")[^>]*href="([^"]*)"', body)
    assert links == ["live/index.html", "live/index.html#teach"] and "<img" in body


@needs_browser
def test_slider_shows_the_picture_of_each_value(visit):
    page = visit(figure(STRENGTHS))
    page.wait_for_selector(".moving input")
    for i, (value, colour) in enumerate(zip(STRENGTHS, COLOURS)):
        move(page, i)
        for at in ((.5, .5), (.03, .03), (.97, .97)): assert near(pixel(page, *at), colour), (value, at)
        assert page.inner_text(".moving output") == value
        assert page.locator(".moving canvas").get_attribute("aria-label") == f"strength {value}"
        assert page.locator(".moving input").get_attribute("aria-valuetext") == value
    page.focus(".moving input"); page.keyboard.press("ArrowLeft")
    assert page.inner_text(".moving output") == "0.5"
    assert page.locator(".moving button").count() == 0                       # nothing to press where no model can draw
    assert not page.locator("details img").is_visible()
    page.click("summary"); assert page.locator("details img").is_visible()


@needs_browser
def test_several_pictures_and_two_rows(visit):
    many = {str(i): flat(COLOURS[i % 4]) for i in range(13)}
    pairs = {str(i): [flat(COLOURS[i]), flat(COLOURS[3 - i])] for i in range(4)}
    sixes = {str(i): [flat(COLOURS[(i + j) % 4]) for j in range(6)] for i in range(3)}
    page = visit(figure(many, "step"), figure(pairs, "pair"), figure(sixes, "six"))
    page.wait_for_function("document.querySelectorAll('.moving').length == 3")
    for i in (0, 6, 7, 12):
        move(page, i)
        assert near(pixel(page), COLOURS[i % 4]), i
    for i in range(4):
        move(page, i, 1)
        assert near(pixel(page, .25, .5, 1), COLOURS[i]) and near(pixel(page, .75, .5, 1), COLOURS[3 - i]), i
    move(page, 1, 2)
    for j in range(6): assert near(pixel(page, (j % 3 + .5) / 3, (j // 3 + .5) / 2, 2), COLOURS[(1 + j) % 4]), j


@needs_browser
def test_without_javascript_the_strip_is_there(visit):
    page = visit(figure(STRENGTHS, live=LIVE), java_script_enabled=False)
    assert page.locator("figure img").is_visible() and page.locator("button, canvas, input").count() == 0
    assert page.locator("figure img").get_attribute("alt") == "strength: -1, 0, 0.5, 1"


@needs_browser
@pytest.mark.parametrize("client", [None, "throw new Error('x')"])
def test_no_model_there_gives_a_sentence(visit, client):
    page = visit(figure(STRENGTHS, live=LIVE), client=client)
    page.click(".moving button")
    page.wait_for_selector("[role=status]:has-text('not part of this copy')")
    assert page.locator(".moving button").is_enabled()
    move(page, 2); assert near(pixel(page), COLOURS[2]) and page.inner_text(".moving output") == "0.5"


@needs_browser
def test_a_model_that_does_not_load_can_be_asked_again(visit):
    failing = CLIENT.replace("if (call === 'open') {", "if (!window.tried) { window.tried = true; throw new Error('weights.bin broke off') }\n"
                                                        "    if (call === 'open') {")
    page = visit(figure(STRENGTHS, live=LIVE), client=failing)
    page.click(".moving button"); page.wait_for_selector("[role=status]:has-text('weights.bin broke off')")
    page.click(".moving button"); page.wait_for_selector("[role=status]:has-text('drawn here in 0.06 s')")


@needs_browser
def test_what_waking_fetches_is_said_beforehand(visit, tmp_path):
    page = visit(figure(STRENGTHS, live=LIVE), client=CLIENT)
    (tmp_path / "site0/live/page.json").write_text('{"bytes": {"draw": 25300000, "learn": 1, "runtime": {"processor": 3700000, "graphics": 1}}}')
    page.reload()
    page.wait_for_selector(".moving button:has-text('Draw what lies between (29 MB, once)')")
    page.click(".moving button"); page.wait_for_selector("[role=status]:has-text('drawn here')")
    assert page.evaluate("asked")[0][1]["all"] == 29e6


@needs_browser
def test_the_model_draws_what_lies_between(visit):
    page = visit(figure(STRENGTHS, live=LIVE), client=CLIENT)
    page.wait_for_selector(".moving input"); move(page, 2)
    page.click(".moving button")
    page.wait_for_selector("[role=status]:has-text('drawn here')")
    assert page.inner_text(".moving output") == "0.5" and pixel(page) == [150] * 3        # goes on where the slider was
    move(page, -.25); page.wait_for_function("document.querySelector('.moving output').textContent == '-0.25'")
    page.wait_for_timeout(150)
    assert pixel(page) == [75] * 3
    page.locator(".moving input").evaluate("""e => { for (const v of [-1, -.75, -.5, 0, .25, .75]) {      // quickly: the newest counts
        e.value = v; e.dispatchEvent(new Event('input')) } }""")
    for _ in range(100):
        if pixel(page) == [175] * 3: break
        page.wait_for_timeout(50)
    assert pixel(page) == [175] * 3
    asked = page.evaluate("asked")
    assert [c for c, _ in asked[:2]] == ["open", "lora"] and asked[1][1]["url"].endswith("/live/loras/a.safetensors")
    drawn = [a for c, a in asked if c == "draw"]
    assert len(drawn) <= 5 and all({**a, "worn": WISH["worn"]} == WISH for a in drawn)    # nothing else has moved


@needs_browser
def test_paths_of_a_wish(visit):
    worn = [dict(name="a", strength=1), dict(name="b", strength=0)]
    two = dict(LIVE, wish=[dict(WISH, worn=worn), dict(WISH, worn=worn[::-1])], set=["worn.1.strength", "1 - worn.0.strength"], range=[0, 1, .25])
    part = dict(LIVE, set="worn.0.until", range=[0, 1, .05])
    pairs = {str(i / 4): [flat(c), flat(c)] for i, c in enumerate(COLOURS)}
    page = visit(figure(pairs, "t", two), figure(STRENGTHS, "share", part), client=CLIENT)
    for i in (0, 1): page.locator(".moving button").first.click()
    page.wait_for_function("[...document.querySelectorAll('[role=status]')].every(e => e.textContent.startsWith('drawn here'))")
    move(page, .25); move(page, .25, 1)
    page.wait_for_timeout(600)
    drawn = [a for c, a in page.evaluate("asked") if c == "draw"]
    strengths = [tuple(w["strength"] for w in a["worn"]) for a in drawn if len(a["worn"]) == 2]
    assert strengths[-2:] == [(.75, .25), (.75, .25)]
    last = [a for a in drawn if len(a["worn"]) == 1][-1]["worn"][0]["curve"]
    assert len(last) == 50 and last == [1] * 12 + [0] * 38
    assert [last[int(k / 20 * 50)] for k in range(20)] == [1] * 5 + [0] * 15              # a quarter of twenty steps
    assert not page.evaluate("window.overlap")                                            # two figures take turns


@needs_browser
@pytest.mark.parametrize("width", [1280, 420])
def test_it_fits_the_page(visit, width):
    wide = {str(i): [flat(c)] * 6 for i, c in enumerate(COLOURS)}
    page = visit(figure(wide, live=LIVE), viewport=dict(width=width, height=800))
    page.wait_for_selector(".moving canvas")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box = page.locator(".moving canvas").bounding_box()
    shape = page.evaluate("(c => [c.width, c.height])(document.querySelector('canvas'))")
    assert abs(box["width"] / box["height"] - shape[0] / shape[1]) < .1                   # shrunk, not squeezed


def test_the_client_is_where_figures_look_for_it():
    assert "export class Client" in (PAGE / "client.js").read_text()
    assert {"open", "lora", "draw"} <= set(re.findall(r"async (\w+)\(", (PAGE / "worker.js").read_text()))
