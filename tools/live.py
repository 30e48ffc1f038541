"""The page that draws and learns, measured in Chromium: python tools/live.py table|picture|times|parity [out/live]

table    trains five held-out subjects in the page, with its buttons, and lets the judge look at eight unseen prompts of each
         (nbs/results/live.json)
picture  the moving picture of the README (nbs/images/live.gif)
times    seconds of what a reader waits for, and memory after fifty pictures
parity   the largest difference from Python's pictures: the base, each bundled LoRA, the turbo LoRA
"""
import io, json, os, shutil, sys, tempfile, time
from pathlib import Path

import numpy as np
from PIL import Image

from lora_nb import load_base
from lora_nb.core import atomic_path, data_path
from lora_nb.evaluation import answers, marks, wearing
from lora_nb.injection import apply_lora, remove_lora
from lora_nb.live import serve_live
from lora_nb.lora import Lora
from lora_nb.pictures import find_pictures

ROOT = Path(__file__).resolve().parent.parent
SUBJECTS = ["jack-o-lantern", "teapot", "robot", "teddy_bear", "octopus"]


def opened(playwright, folder, tab="teach", width=1280, height=900, threads=True):
    "The page with its model loaded: (page, seconds until it was ready)."
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    args = ["--no-sandbox", "--disable-gpu", *([] if threads else ["--disable-features=SharedArrayBuffer"])]
    browser = playwright.chromium.launch(executable_path=chromium, args=args)
    page = browser.new_page(viewport=dict(width=width, height=height), bypass_csp=True)
    page.on("pageerror", lambda e: print("error in the page:", e))
    server = serve_live(folder)
    began = time.time()
    page.goto(f"http://127.0.0.1:{server.server_address[1]}/index.html#{tab}")
    page.click("#load:enabled")
    page.wait_for_function("lora_nb.ready()", timeout=120_000)
    if tab == "teach": page.wait_for_selector("#fetching", state="hidden")
    return page, time.time() - began


def taught(page, subject, steps=None, each=lambda: None):
    "Press the page's buttons until it has learned a bundled subject: (text of the measurement, seconds up to its last step, of all)."
    page.select_option("#example", subject)
    page.wait_for_function("document.querySelectorAll('#tiles figure').length === 5")
    if steps: page.fill("#many", str(steps))
    began, last = time.time(), None
    page.click("#learn:enabled")
    while True:
        said = page.inner_text("#progress")
        if last is None and "Looking" in said: last = time.time()
        if not page.evaluate("lora_nb.model.busy"): break
        each(); time.sleep(.05)
    if page.inner_text("#error"): raise SystemExit(page.inner_text("#error"))
    return page.inner_text("#measure"), last - began, time.time() - began


def table(page):
    "Five subjects, trained in the page, judged in Python."
    from lora_nb.zoo.judge import load_judge
    from lora_nb.zoo.subjects import CLASS_OF
    base, judge, target = load_base("tiny-sd", device="cpu"), load_judge(), ROOT / "nbs/results/live.json"
    rows = json.loads(target.read_text()) if sys.argv[3:] else {}          # some subjects: the others' rows stay
    for subject in (sys.argv[3:] or SUBJECTS):
        measure, seconds, total = taught(page, subject)
        with page.expect_download() as d, tempfile.TemporaryDirectory() as box:
            page.click("#save")
            d.value.save_as(f"{box}/lora.safetensors")
            lora = Lora.load(f"{box}/lora.safetensors")
        name, pictures = subject.replace("_", " "), find_pictures(data_path("subjects", subject))
        paper = judge.exam("sks", name, CLASS_OF[name], 8, pictures)
        with wearing(base, lora): after = marks(paper, answers(base, paper, steps=25), judge, pictures)
        rows[subject] = dict(steps=int(lora.metadata["steps"]), of=8, subject=int(np.sum(after["subject_fidelity"])),
                             ground=int(np.sum(after["prompt_fidelity"])),
                             similarity=round(float(np.mean(after["subject_similarity"])), 2),
                             others_of_its_class=round(float(np.mean(after["class_retention"])), 2),
                             train_seconds=round(seconds, 1), total_seconds=round(total, 1), page_says=measure)
        print(subject, rows[subject], flush=True)
        with atomic_path(target) as tmp: Path(tmp).write_text(json.dumps(rows, indent=1) + "\n")


def picture(page):
    "The page while it learns, as a moving picture: one frame for each preview and each pair of the result."
    frames, seen = [], [-1]

    def look():
        n = page.evaluate("document.querySelectorAll('#previews figure, #pairs canvas').length")
        if n == seen[0]: return
        seen[0] = n
        page.wait_for_timeout(60)
        frames.append(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
    taught(page, "robot", each=look)
    seen[0] = -1
    look()
    small = [f.resize((640, round(640 * f.height / f.width)), Image.LANCZOS) for f in frames]
    palette = small[-1].quantize(96, dither=Image.Dither.NONE)
    out = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in small]
    with atomic_path(ROOT / "nbs/images/live.gif") as tmp:
        out[0].save(tmp, "GIF", save_all=True, append_images=out[1:], duration=[500] * (len(out) - 1) + [4000], loop=0, optimize=True)
    print(len(out), "frames", (ROOT / "nbs/images/live.gif").stat().st_size)


DRAW = """async ({turbo, worn}) => { const m = lora_nb.model, t = turbo ? m.turbo : null
    for (const n of [...Object.keys(worn), ...t ? [t.name] : []]) await m.load(n)
    const began = performance.now()
    const how = t ? {turbo: t.name, steps: t.turbo.steps, guidance: t.turbo.guidance_scale} : {turbo: null, steps: 25, guidance: 4}
    await m.client.ask('draw', {prompt: 'a cat face on a striped blue background', seed: 1, show: 0, ...how,
        worn: Object.entries(worn).map(([name, strength]) => ({name, strength}))})
    return (performance.now() - began) / 1000 }"""
SLIDE = """() => new Promise(done => {                      // from the slider's move to the picture on the canvas
    const slider = document.querySelector('#loras input[data-name=neon]'), began = performance.now(), was = lora_nb.model.drawn
    slider.value = String(1 - slider.value); slider.dispatchEvent(new Event('input'))
    const look = () => lora_nb.model.drawn > was ? done((performance.now() - began) / 1000) : requestAnimationFrame(look)
    look() })"""


def times(page):
    "Seconds of what a reader waits for, least of five and median; memory before and after fifty pictures."
    def row(what, goal, seconds): print(f"{what:34} {min(seconds):6.2f} {sorted(seconds)[len(seconds) // 2]:6.2f}   goal {goal}", flush=True)
    print(f"{page.evaluate('lora_nb.model.runs')}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; seconds: least, median")
    page.evaluate(DRAW, dict(turbo=False, worn={}))
    row("25 guided steps", "1.5", [page.evaluate(DRAW, dict(turbo=False, worn={})) for _ in range(5)])
    page.click("#tab-play"); page.set_checked("#few", True); page.wait_for_function("lora_nb.ready()")
    page.evaluate(SLIDE)
    row("slider moved, turbo picture seen", "0.5", [page.evaluate(SLIDE) for _ in range(5)])
    page.click("#tab-teach"); page.wait_for_selector("#fetching", state="hidden")
    for prior, what, goal in ((False, "100 steps of 4", "25"), (True, "100 steps of 4, prior preservation", "40")):
        page.set_checked("#prior", prior)
        page.wait_for_timeout(6000)                      # the page makes the training ready, while a reader chooses pictures
        row(what, goal, [taught(page, "teapot", 100)[1]])
    memory = lambda: page.evaluate("performance.measureUserAgentSpecificMemory().then(m => m.bytes)") / 2**20
    before = memory()
    for k in range(50): page.evaluate(DRAW, dict(turbo=True, worn={"neon": k / 50}))
    print(f"memory: {before:.0f} MiB, after fifty pictures {memory():.0f} MiB")


def parity(page):
    "The base, each bundled LoRA at strength 0.8 with its word, and the turbo LoRA: largest difference in any channel, of 255."
    from lora_nb.turbo import turbo_scheduler, turbo_settings
    base, cards = load_base("tiny-sd", device="cpu"), page.evaluate("lora_nb.model.cards")
    plain, worst = base.pipe.scheduler, 0
    for card in [dict(name=None), *cards]:
        lora = card["name"] and Lora.load(data_path("loras", f"{card['name']}.safetensors"))
        turbo, prompt = bool(card.get("turbo")), f"a {card.get('trigger') or 'cat face'} on a striped blue background"
        strength, how = (1. if turbo else .8), turbo_settings(lora) if turbo else dict(steps=25, guidance_scale=4.)
        base.pipe.scheduler = turbo_scheduler(base.pipe, lora) if turbo else plain
        if lora: apply_lora(base, lora, scale=strength)
        expected = np.asarray(base.generate([prompt], seeds=[1], **how)[0]).astype(int)
        if lora: remove_lora(base)
        found = page.evaluate("""async ([name, turbo, strength, prompt, steps, guidance]) => { const m = lora_nb.model
            if (name) await m.load(name)
            const wish = {prompt, seed: 1, steps, guidance, worn: name && !turbo ? [{name, strength}] : [], turbo: turbo ? name : null}
            return Array.from((await m.client.ask('draw', wish)).pixels) }""",
                              [card["name"], turbo, strength, prompt, how["steps"], how["guidance_scale"]])
        difference = np.abs(np.array(found).reshape(*expected.shape[:2], 4)[..., :3] - expected).max()
        worst = max(worst, difference)
        print(f"{card['name'] or 'base':20} {difference} of 255", flush=True)
    if worst > 2: raise SystemExit("the page does not draw what Python draws")


if __name__ == "__main__":
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        page, seconds = opened(p, sys.argv[2] if len(sys.argv) > 2 else ROOT / "out/live")
        print(f"ready after {seconds:.1f} s")
        dict(table=table, picture=picture, times=times, parity=parity)[sys.argv[1]](page)
