"""The studio in a real browser: headless Chromium clicks through it in JupyterLab and Voila, with ipywidgets 8 and 7.7.1.

    python tools/browser.py               all of it
    python tools/browser.py lab voila7    some of: lab, live, voila, voila7
    python tools/browser.py picture       nbs/images/studio.jpg, the picture of the book, drawn again
Screenshots are left in out/browser/.
"""
import contextlib, json, os, re, shutil, socket, subprocess, sys, sysconfig, tempfile, time, venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHOTS = ROOT / "out" / "browser"
BOOK = ROOT / "nbs" / "images" / "studio.jpg"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OLD_WIDGETS = ("ipywidgets==7.7.1", "jupyterlab_widgets==1.1.1", "ipython_genutils==0.2.0")    # Colab's
SLOW = float(os.environ.get("SLOW", 1))               # SLOW=5: have patience on a busy machine
PATIENCE = 150 * SLOW                                 # seconds for a kernel to load a base
SIZE = dict(width=1280, height=900)
ENV = {"OMP_NUM_THREADS": "1", **os.environ, "LORA_NB_QUIET": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore",
       "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}


class Missing(Exception): "Something that the test needs is not on this machine"


# ------------------------------------------------------------------------------------------ servers
def free_port():
    "A port that nobody listens on"
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); return s.getsockname()[1]


@contextlib.contextmanager
def serving(command, url, cwd, **env):
    "A server while the block runs; its output is shown if it does not answer"
    log = Path(cwd) / "server.log"
    with open(log, "w") as out:
        p = subprocess.Popen([str(c) for c in command], cwd=cwd, env={**ENV, **env}, stdout=out, stderr=out,
                             stdin=subprocess.DEVNULL)
    try:
        began = time.time()
        while True:
            with contextlib.suppress(OSError):
                with socket.create_connection(("127.0.0.1", int(re.search(r":(\d+)", url)[1])), 1): break
            if p.poll() is not None or time.time() - began > PATIENCE:
                raise AssertionError(f"{command[:4]} does not answer\n{log.read_text()[-3000:]}")
            time.sleep(.2)
        yield
    finally:
        p.terminate()
        try: p.wait(15)
        except subprocess.TimeoutExpired: p.kill()


def old_widgets(folder):
    "Python of an environment like ours, but with the widgets of Colab"
    home = Path(folder) / "widgets7"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin/python"
    site = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True,
                          text=True, check=True).stdout.strip()
    Path(site, "ours.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--ignore-installed", *OLD_WIDGETS]
    p = subprocess.run([str(x) for x in pip], capture_output=True, text=True)
    if p.returncode: raise Missing(f"{', '.join(OLD_WIDGETS)} cannot be installed: {p.stderr.strip()[-200:]}")
    return python


# ------------------------------------------------------------------------------------------ a hand and an eye
PIXELS = """async () => {
  let img = document.querySelector('.ls-frame img');
  if (!img) return '';
  for (let i = 0; i < 40; i++) {                        // a picture may be replaced while it is read
    try { await img.decode(); break; } catch (e) { await new Promise(r => setTimeout(r, 50)); }
    img = document.querySelector('.ls-frame img');
  }
  const c = document.createElement('canvas'); c.width = c.height = 32;
  const g = c.getContext('2d'); g.drawImage(img, 0, 0, 32, 32);
  return Array.from(g.getImageData(0, 0, 32, 32).data).join();
}"""
WIDE = """() => Array.from(document.querySelectorAll('.ls *')).filter(e => {
  const r = e.getBoundingClientRect(), p = document.querySelector('.ls').getBoundingClientRect();
  return r.width && e.offsetParent && !e.closest('pre') && !e.closest('svg') && (r.right > innerWidth + 1 || r.right > p.right + 2);
}).map(e => e.className + ' ' + e.innerText.slice(0, 30))"""


class Hand:
    "What a person does to the panel"
    def __init__(self, page, name): self.page, self.name, self.shots = page, name, 0

    def find(self, css, **kw): return self.page.locator(css, **kw).locator("visible=true")
    def field(self, label):
        head = self.page.locator(".ls-label, .widget-label", has_text=re.compile(rf"^\s*{re.escape(label)}\s*$"))
        return self.find(".ls-field", has=head)
    def click(self, text): self.find(".jupyter-button", has_text=re.compile(f"^{re.escape(text)}$")).first.click()
    def said(self): return "\n".join(self.find(".ls-say").all_inner_texts())
    def pixels(self): return self.page.evaluate(PIXELS)

    def hear(self, pattern, seconds=60):
        "Wait until the panel says something"
        end = time.time() + seconds * SLOW
        while not re.search(pattern, text := self.said(), re.M):
            if time.time() > end: self.shot("failed"); raise AssertionError(f"expected {pattern!r}, the panel says {text!r}")
            self.page.wait_for_timeout(50)
        return text

    def another(self, was, seconds=60):
        "Wait until the picture has changed and is finished"
        end = time.time() + seconds * SLOW
        while (now := self.pixels()) == was or not re.search(r"^\d+\.\d\d s$", self.said(), re.M):
            if time.time() > end: self.shot("failed"); raise AssertionError(f"the picture is the same; the panel says {self.said()!r}")
            self.page.wait_for_timeout(50)
        return now

    def fill(self, label, text):
        "Type into a field, and leave it"
        box = self.field(label).locator("textarea, input").first
        box.click(); box.fill(str(text)); box.press("Tab")

    def slide(self, share, strip=0):
        "Drag a strip's slider to a share of its length"
        handle = self.find(".ls-strip .noUi-handle, .ls-strip .ui-slider-handle").nth(strip)
        track = self.find(".ls-strip .noUi-target, .ls-strip .ui-slider").nth(strip).bounding_box()
        a = handle.bounding_box()
        self.page.mouse.move(a["x"] + a["width"] / 2, a["y"] + a["height"] / 2); self.page.mouse.down()
        self.page.mouse.move(track["x"] + share * track["width"], a["y"] + a["height"] / 2, steps=4); self.page.mouse.up()

    def shot(self, what):
        "A screenshot of the page"
        SHOTS.mkdir(parents=True, exist_ok=True); self.shots += 1
        self.page.screenshot(path=SHOTS / f"{self.name}-{self.shots}-{what}.png")


# ------------------------------------------------------------------------------------------ what is clicked
def draws(hand, times):
    "Type, draw, load a LoRA, move a slider, recall, compare, stop, read an error"
    hand.fill("Prompt", "a cat on a blue background"); hand.fill("Steps", 12); hand.fill("Seed", 3)
    was = hand.pixels(); hand.click("Draw")
    first = hand.another(was); hand.shot("first")
    load = hand.field("LoRA").locator("input").first
    load.fill("neon"); load.press("Tab"); hand.click("Load"); hand.hear("Loaded neon")
    assert "<neon>" in hand.field("Prompt").locator("textarea").input_value(), "the trigger did not insert itself"
    hand.click("Draw"); styled = hand.another(first)
    hand.fill("Steps", 25); styled = hand.another(styled)
    began = time.time(); hand.slide(.45); hand.another(styled); times["slider"] = round(time.time() - began, 2)
    hand.shot("slider")
    hand.find(".ls-thumb").last.click(); hand.hear("Recalled"); assert hand.pixels() == first, "recalled another picture"
    assert hand.field("Prompt").locator("textarea").input_value() == "a cat on a blue background"
    load.fill("noen"); load.press("Tab"); hand.click("Load"); hand.hear("Did you mean 'neon'"); hand.shot("error")
    load.fill(""); load.press("Tab")
    hand.fill("Steps", 400); hand.hear("Step"); hand.click("Stop"); hand.hear("Stopped at step"); hand.fill("Steps", 12)
    hand.hear(r"^\d+\.\d\d s$")


def trains(hand, times):
    "Train, stop, resume, try"
    hand.page.get_by_text("Train", exact=True).first.click()
    hand.fill("Pictures", "teapot")
    hand.find(".ls-pics img").first.wait_for()
    hand.fill("Steps", 6); hand.fill("Rank", 4)
    began = time.time(); hand.click("Train"); hand.hear(r"Step [123] of 6", 90); hand.click("Stop")
    hand.hear("Stopped at step", 60); hand.shot("stopped")
    hand.click("Resume"); hand.hear("Learned sks object", 90); times["training"] = round(time.time() - began, 1)
    hand.find(".ls-chart svg").wait_for(); hand.shot("trained")
    hand.click("Try it"); hand.hear(r"^\d+\.\d\d s$")
    hand.shot("tried")


def looks(hand):
    "Nothing is cut off or sticks out"
    wide = hand.page.evaluate(WIDE)
    assert not wide, f"sticks out at {SIZE['width']} px: {wide[:5]}"


def compares(hand):
    "The page as the book shows it: two LoRAs, one on a schedule, with and without"
    hand.fill("Prompt", "a cat on a blue background")
    load = hand.field("LoRA").locator("input").first
    load.fill("teapot"); load.press("Tab"); hand.click("Load"); hand.hear("Loaded teapot")
    hand.fill("Prompt", "a <teapot> on a blue background, in <neon> style")
    hand.field("Compare, X/Y plot").locator("select").select_option("with and without LoRAs")
    hand.find(".ls-strip input[type=checkbox]").first.check(); hand.slide(.667)
    hand.find(".ls-strip select").first.select_option("fade in"); hand.hear(r"^\d+\.\d\d s$")
    hand.click("Draw"); hand.hear(r"^\d+\.\d\d s$")
    hand.page.wait_for_timeout(300); hand.page.mouse.wheel(0, -2000); hand.shot("compared")


# ------------------------------------------------------------------------------------------ the three places
def new_page(browser):
    "A window with patience"
    page = browser.new_page(viewport=SIZE)
    page.set_default_timeout(30_000 * SLOW)
    return page


def ready(page, name, times, began):
    "Wait for the panel"
    hand = Hand(page, name)
    try: page.locator(".ls .ls-go").first.wait_for(timeout=PATIENCE * 1000)
    except Exception: hand.shot("failed"); raise
    times["panel"] = round(time.time() - began, 1)
    return hand


@contextlib.contextmanager
def in_lab(browser, folder, code):
    "JupyterLab's page after a cell with this code was started"
    port, settings = free_port(), Path(folder, "settings", "@jupyterlab", "apputils-extension")
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    cell = dict(cell_type="code", id="a", metadata={}, execution_count=None, outputs=[],
                source="import warnings; warnings.filterwarnings('ignore')\n" + code)
    spec = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    Path(folder, "studio.ipynb").write_text(json.dumps(dict(cells=[cell], metadata=spec, nbformat=4, nbformat_minor=5)))
    url = f"http://127.0.0.1:{port}/lab/tree/studio.ipynb"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root",
               "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"]
    with serving(command, url, folder, JUPYTERLAB_SETTINGS_DIR=str(Path(folder, "settings")),
                 JUPYTER_CONFIG_DIR=str(Path(folder, "config"))):
        page = new_page(browser); page.goto(url)
        page.locator(".jp-Notebook .cm-content").first.click(timeout=PATIENCE * 1000)
        page.locator(".jp-NotebookPanel-toolbar .jp-Notebook-ExecutionIndicator[data-status='idle']").first.wait_for(timeout=60_000 * SLOW)
        page.keyboard.press("Shift+Enter")
        yield page
        page.close()


def lab(browser, folder, times):
    "JupyterLab 4 with ipywidgets 8"
    began = time.time()
    with in_lab(browser, folder, "from lora_nb import Studio\nStudio('tiny-sd', folder='pictures')") as page:
        hand = ready(page, "lab", times, began)
        page.locator(".ls").first.scroll_into_view_if_needed()
        draws(hand, times); looks(hand); compares(hand); looks(hand); trains(hand, times); looks(hand)


def live(browser, folder, times):
    "The page that draws, shown by a cell of JupyterLab from local files"
    if not shutil.which("npm"): raise Missing("the page's runtime comes from npm, which is not installed")
    code = """from lora_nb import export_live, show_live
from lora_nb.families import as_base
from lora_nb.random_pipes import random_pipe
show_live(export_live(as_base(random_pipe('sd'), 'random'), 'page', training=()))"""
    began = time.time()
    with in_lab(browser, folder, code) as page:
        inner = page.frame_locator(".jp-OutputArea iframe")
        inner.locator("#load:enabled").click(timeout=2 * PATIENCE * 1000)
        inner.locator("#state", has_text=re.compile(r"^\d+\.\d s$")).wait_for(timeout=PATIENCE * 1000)
        times["first picture"] = round(time.time() - began, 1)
        assert not inner.locator("#tab-teach").is_visible(), "a page without training graphs offers no lesson"
        Hand(page, "live").shot("drawn")


@contextlib.contextmanager
def in_voila(python, name, browser, folder, times):
    "The page of the command `lora_studio`, as a person starts it"
    port = free_port(); url = f"http://127.0.0.1:{port}/"
    homes = dict.fromkeys([Path(python).parent.parent, Path(sys.prefix)])       # the first one's widgets count
    paths = os.pathsep.join([*(str(h / "share/jupyter") for h in homes), ENV.get("JUPYTER_PATH", "")]).rstrip(os.pathsep)
    start = f"from lora_nb.cli import lora_studio; lora_studio(['--no_browser', '--port={port}', '--folder=pictures'])"
    with serving([python, "-c", start], url, folder, JUPYTER_PATH=paths, JUPYTER_CONFIG_DIR=str(Path(folder, "config")),
                 JUPYTER_TOKEN="open-sesame"):
        began = time.time(); page = new_page(browser); page.goto(f"{url}?token=open-sesame", timeout=PATIENCE * 1000)
        yield ready(page, name, times, began)
        page.close()


def voila_of(python, name, browser, folder, times):
    "Draw there, and see that nothing sticks out"
    with in_voila(python, name, browser, folder, times) as hand: draws(hand, times); looks(hand)


def voila(browser, folder, times):
    "Voila with ipywidgets 8"
    voila_of(sys.executable, "voila", browser, folder, times)


def picture(browser, folder, times):
    "The studio as the book shows it"
    from PIL import Image
    with in_voila(sys.executable, "picture", browser, folder, times) as hand:
        hand.fill("Prompt", "a cat on a blue background"); hand.fill("Steps", 12); hand.fill("Seed", 3)
        hand.click("Draw"); hand.hear(r"^\d+\.\d\d s$")
        load = hand.field("LoRA").locator("input").first
        load.fill("neon"); load.press("Tab"); hand.click("Load"); hand.hear("Loaded neon")
        compares(hand); looks(hand)
        hand.page.locator(".ls-caption", has_text="teapot").wait_for(); hand.page.locator(".ls-badge").wait_for(state="detached")
        hand.hear(r"^\d+\.\d\d s$")
        hand.page.set_viewport_size(dict(width=1000, height=860)); hand.page.wait_for_timeout(500)
        hand.page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
        hand.page.screenshot(path=SHOTS / "studio.png")
    with Image.open(SHOTS / "studio.png") as shot:
        for quality in range(85, 30, -5):                 # the largest below the 60 KB of a picture in the book
            shot.convert("RGB").save(BOOK, quality=quality, optimize=True)
            if BOOK.stat().st_size <= 60_000: break


def voila7(browser, folder, times):
    "Voila with ipywidgets 7.7.1, as Colab has it"
    python = old_widgets(folder)
    version = subprocess.run([python, "-c", "import ipywidgets; print(ipywidgets.__version__)"], capture_output=True, text=True,
                             env=ENV, check=True).stdout.strip()
    assert version == "7.7.1", version
    voila_of(python, "voila7", browser, folder, times)


PLACES = dict(lab=lab, live=live, voila=voila, voila7=voila7)
MORE = dict(picture=picture)                              # only when asked for


def check():
    "Raise `Missing` where there is no browser, or nothing to drive it with"
    if not CHROMIUM: raise Missing("no Chromium: Debian's package is `chromium`")
    try:
        import jupyterlab, playwright, voila                                  # noqa: F401
    except ImportError as e: raise Missing(f"{e.name} is not installed: it belongs to the development requirements") from e


def test(name):
    "One place; gives the times"
    check()
    from playwright.sync_api import sync_playwright
    times = {}
    with tempfile.TemporaryDirectory(prefix="lora_nb-browser-") as folder, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try: (PLACES | MORE)[name](browser, Path(folder).resolve(), times)
        finally: browser.close()
    return times


def main(names):
    try: check()
    except Missing as e: print(e); return 1
    failed = 0
    for name in names or PLACES:
        began = time.time()
        try:
            times = test(name)
            print(f"ok     {time.time() - began:6.1f} s  {name}: {(PLACES | MORE)[name].__doc__}; seconds: {times}", flush=True)
        except Missing as e: print(f"missing          {name}: {e}", flush=True)
        except Exception as e: failed += 1; print(f"FAILED {time.time() - began:6.1f} s  {name}: {type(e).__name__}: {e}", flush=True)
    return bool(failed)


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
