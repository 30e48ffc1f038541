"The page that draws and learns: its JavaScript in Chromium, against Python."
import contextlib, functools, http.server, json, random, shutil, threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers_browser import CALM, CHROMIUM, chromium, needs_browser
from helpers_firefox import firefox, needs_firefox
import torch

from lora_nb.core import LoraError, data_path
from lora_nb.families import as_base
from lora_nb.injection import apply_lora, find_targets, remove_lora
from lora_nb.live import LEARNS, PAGE, example_step, export_live, factor_layout, fetch_runtime, serve_live, training_step
from lora_nb.lora import Factors, Lora
from lora_nb.random_pipes import random_pipe

needs_runtime = pytest.mark.skipif(CHROMIUM is None or shutil.which("npm") is None, reason="Chromium or npm is not installed")


@pytest.fixture(scope="module")
def browser():
    with chromium() as b: yield b


@pytest.fixture(scope="module")
def modules(browser):
    "A page on which the JavaScript modules can be imported, without a model."
    server = serve_live(PAGE)
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{server.server_address[1]}/client.js")
    yield page
    server.shutdown()


def prompts():
    rng, letters = random.Random(0), "abc de'fgh12 ,.!?-_<>|&ÄßéΩ日🎃\t\n"
    words = ["a cat", "it's", "they've", "GREEN", "striped", "12", "naïve", "e\u0301", "<|endoftext|>", "background"]
    for i in range(1000):
        yield "".join(rng.choice(letters) for _ in range(rng.randint(0, 80))) if i % 2 else " ".join(rng.choices(words, k=rng.randint(1, 30)))


@needs_browser
def test_tokenizer(modules):
    from transformers import AutoTokenizer
    folder, texts = data_path("tiny-sd", "tokenizer"), list(prompts())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = tokenizer(texts, padding="max_length", truncation=True, max_length=77).input_ids
    found = modules.evaluate("""async ([json, texts]) => { const {Tokenizer} = await import('/tokenizer.js'), t = new Tokenizer(json)
        return texts.map(x => t.encode(x).ids) }""", [json.loads(Path(folder, "tokenizer.json").read_text()), texts])
    wrong = [t for t, a, b in zip(texts, expected, found) if a != b]
    assert not wrong, wrong[:3]


@needs_browser
@pytest.mark.parametrize("seed, n", [(0, 768), (1, 2048), (123456, 777), (7, 16), (2**32 - 1, 800)])
def test_noise_of_a_seed(modules, seed, n):
    found = modules.evaluate("async ([s, n]) => Array.from(new (await import('/random.js')).Generator(s).normal(n))", [seed, n])
    assert np.abs(np.array(found) - torch.randn(n, generator=torch.Generator().manual_seed(seed)).numpy()).max() < 2e-6


@needs_browser
def test_half_precision(modules):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(5000) * 10.**rng.integers(-9, 6, 5000), [0, -0., 65504, 65519.9, 65520, 1e30, 6e-8, 2.98e-8, 6.1e-5]])
    x = x.astype(np.float32)
    with np.errstate(over="ignore"): expected = x.astype(np.float16)
    bits, back = modules.evaluate("""async x => { const {narrow, widen} = await import('/half.js'), h = narrow(Float32Array.from(x))
        return [Array.from(h), Array.from(widen(h), String)] }""", x.tolist())
    assert bits == expected.view(np.uint16).tolist()
    assert np.array_equal(np.array([float(b.replace("Infinity", "inf")) for b in back], np.float32), expected.astype(np.float32))


@needs_browser
def test_files_that_are_none(modules):
    read = lambda raw: modules.evaluate("""async raw => { const {load} = await import('/lora.js')
        try { load(Uint8Array.from(raw).buffer, 'a.safetensors'); return 'loaded' } catch (e) { return e.message } }""", list(raw))
    whole = data_path("loras", "neon.safetensors").read_bytes()
    assert "Not a .safetensors file" in read(b"") and "Not a .safetensors file" in read(b"hello world, this is no model")
    assert "cut off" in read(whole[:60_000])
    from safetensors.torch import save
    assert "lora_convert" in read(save({"lora_unet_x.lora_down.weight": torch.zeros(1, 2)}))
    assert "only one of its two" in read(save({"unet.x.lora_A.weight": torch.zeros(1, 2)}))
    assert "of type I64" in read(save({"unet.x.lora_A.weight": torch.zeros(1, 2, dtype=torch.int64)}))


@needs_browser
def test_runs_take_turns_and_a_lost_graphics_card_is_no_end(modules):
    found = modules.evaluate("""async () => { const {Engine} = await import('/engine.js'), e = new Engine(), log = []
        const slow = {run: async x => { log.push(`+${x}`); await new Promise(go => setTimeout(go, 20)); log.push(`-${x}`); return x }}
        const lost = {run: async () => { throw new Error('device lost') }}
        Object.assign(e, {last: Promise.resolve(), racing: false, providers: {denoiser: 'webgpu', decoder: 'webgpu'},
            sessions: {'denoiser webgpu': lost, 'denoiser wasm': slow, 'decoder wasm': slow}})
        const out = [await e.run('denoiser', 1), ...await Promise.all([e.run('denoiser', 2), e.run('decoder', 3)])]
        e.providers = {denoiser: 'webgpu'}; e.racing = true
        const raced = await e.run('denoiser', 4).catch(x => x.message)
        return {out, log: log.join(' '), raced} }""")
    assert found == dict(out=[1, 2, 3], log="+1 -1 +2 -2 +3 -3", raced="device lost")


@needs_browser
def test_few_steps_see_every_picture_and_every_noise_level(modules):
    found = modules.evaluate("""async () => { const {Trainer} = await import('/trainer.js'), {Generator} = await import('/random.js')
        const t = new Trainer()
        Object.assign(t, {batch: 6, random: new Generator(0), decks: {subject: [], prior: []}, engine: {schedule: {trained: 1000}}})
        const list = (n, at) => Array.from({length: n}, (_, i) => ({latents: new Float32Array(16).fill(at + i), states: new Float32Array(2)}))
        return Array.from({length: 20}, () => { const b = t.sample(list(5, 0), list(8, 100), 4)
            return {times: b.times, who: b.times.map((_, i) => b.latents[16 * i]), weight: Array.from(b.weight)} }) }""")
    own = [w for b in found for w in b["who"][:4]]
    assert all(sorted(own[i:i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 80, 5)), "every picture once before one comes again"
    assert all(sorted(x) == list(range(100, 108)) for x in np.array([b["who"][4:] for b in found]).reshape(-1, 8))
    for b in found:
        assert [t // 250 for t in b["times"][:4]] == [0, 1, 2, 3] and [t // 500 for t in b["times"][4:]] == [0, 1]
        assert b["weight"] == [.25] * 4 + [.5] * 2
    assert len({b["times"][0] for b in found}) > 10


def random_lora(base, seed, rank=2):
    g = torch.Generator().manual_seed(seed)
    layers = {}
    for c, net, targets in (("unet", base.denoiser, "extended"), ("text_encoder", base.pipe.text_encoder, "attention")):
        for path in find_targets(net, targets, c):
            w = net.get_submodule(path).weight
            up = torch.randn(w.shape[0], rank, *[1] * (w.ndim - 2), generator=g) * .1
            layers[f"{c}.{path}"] = Factors(up, torch.randn(rank, *w.shape[1:], generator=g) * .1, alpha=rank / 2)
    words = {"<thing>": {"text_encoder": torch.randn(2, base.pipe.text_encoder.config.hidden_size, generator=g)}}
    return Lora(layers, words, {"trigger": "<thing>"})


@pytest.fixture(scope="module")
def live(tmp_path_factory, browser):
    "A page with a random base and two random LoRAs: (page, base, loras)."
    base, folder = as_base(random_pipe("sd"), "random"), tmp_path_factory.mktemp("live")
    try: runtime = fetch_runtime(folder / "ort")
    except LoraError as e: pytest.skip(str(e))
    for net in base.parts().values(): net.half().float()
    loras = {n: random_lora(base, i) for i, n in enumerate(("one", "two"))}
    for n, lora in loras.items(): lora.save(folder / f"{n}.safetensors")
    out = export_live(base, folder / "page", {n: folder / f"{n}.safetensors" for n in loras}, training=(2,), rank=2, runtime=runtime)
    server = serve_live(out)
    page = browser.new_page()
    page.folder = str(out)
    page.goto(f"http://127.0.0.1:{server.server_address[1]}/client.js")
    page.evaluate("""async () => { const {Client} = await import('/client.js'); window.client = new Client()
        await client.ask('open', {url: new URL('/model', location.href).href, threads: 1})
        for (const name of ['one', 'two']) await client.ask('lora', {name, url: new URL(`/loras/${name}.safetensors`, location.href).href}) }""")
    yield page, base, {n: Lora.load(folder / f"{n}.safetensors") for n in loras}
    server.shutdown()


@needs_runtime
@pytest.mark.parametrize("worn", [{}, {"one": 1.}, {"one": .7, "two": -.4}], ids=["base", "one", "two"])
def test_pictures_equal_pythons(live, worn):
    page, base, loras = live
    prompt, how = "a <thing> on a striped blue background" if worn else "a cat", dict(steps=4, guidance_scale=3.)
    for n, s in worn.items(): apply_lora(base.pipe, Lora(loras[n].layers, loras[n].embeddings if n == "one" else {}), scale=s, name=n)
    expected = np.asarray(base.generate([prompt], seeds=[5], **how)[0]).astype(int)
    remove_lora(base.pipe)
    found = page.evaluate("""async ([prompt, worn]) => Array.from((await client.ask('draw', {prompt, seed: 5, steps: 4, guidance: 3,
        worn: Object.entries(worn).map(([name, strength]) => ({name, strength}))})).pixels)""", [prompt, worn])
    found = np.array(found).reshape(*expected.shape[:2], 4)[..., :3]
    assert np.abs(found - expected).max() <= 2, np.abs(found - expected).max()


def ten_steps(base):
    "Ten steps on one batch: what the worker is asked for, and torch's losses."
    layout = factor_layout(base.denoiser, list(find_targets(base.denoiser, LEARNS, "unet")), 2)
    first = example_step(base, layout, 2, batch=2)
    step, losses, inputs = training_step(base, layout, 2), [], list(first)
    for k in range(1, 11):
        inputs[3] = torch.tensor([float(k)])
        *inputs[:3], loss = step(*inputs); losses.append(float(loss))
    theta, _, _, _, lr, z, noise, t, states, *_ = first
    flat = dict(theta=theta, latents=z, noise=noise, times=t, states=states)
    return dict(batch=2, n=10, lr=float(lr), **{k: x.flatten().tolist() for k, x in flat.items()}), losses


@needs_runtime
def test_ten_training_steps_equal_torchs(live):
    page, base, _ = live
    inputs, losses = ten_steps(base)
    found = page.evaluate("async inputs => client.ask('steps', inputs)", inputs)
    assert np.abs(np.array(found) - losses).max() < 1e-5, (found, losses)


LESSON = """async ([pictures, stop]) => {
    const plan = {pictures: pictures.map(x => Float32Array.from(x)), captions: ['a sks toy on a red background', 'a sks toy'],
        classPrompt: 'a toy', trigger: 'sks', noun: 'toy', steps: 6, lr: 1e-2, seed: 3, every: 0, preview: null}
    const losses = []
    await client.ask('prepare', plan)
    const seen = ({step, loss}) => { losses.push(loss); if (step === stop) client.ask('stop', {what: 'train'}) }
    let out = await client.ask('train', {}, seen)
    const stopped = out.stopped
    if (stopped) out = await client.ask('train', {}, seen)
    const file = await client.ask('learned', {name: 'toy'})
    const drawn = await client.ask('draw', {prompt: 'a sks toy', seed: 5, steps: 4, guidance: 3, worn: [{name: 'toy', strength: 1}]})
    return {losses, stopped, out, file: Array.from(file), pixels: Array.from(drawn.pixels)} }"""


@needs_runtime
def test_what_the_page_taught_draws_the_same_in_python_and_diffusers(live, tmp_path):
    page, base, _ = live
    size, g = base.resolution, torch.Generator().manual_seed(0)
    pictures = [(torch.rand(3, size, size, generator=g) * 2 - 1).flatten().tolist() for _ in range(2)]
    whole, parts = page.evaluate(LESSON, [pictures, 0]), page.evaluate(LESSON, [pictures, 2])
    assert not whole["stopped"] and parts["stopped"] and whole["out"]["step"] == 6
    assert np.allclose(whole["losses"], parts["losses"], atol=1e-6), "a lesson that was stopped goes on as if it had not been"
    path = tmp_path / "toy.safetensors"
    path.write_bytes(bytes(whole["file"]))
    lora = Lora.load(path)
    assert lora.metadata["trigger"] == "sks" and len(lora.layers) == len(find_targets(base.denoiser, LEARNS, "unet"))
    assert any(f.up.abs().max() > 0 for f in lora.layers.values())
    how = dict(seeds=[5], steps=4, guidance_scale=3.)
    plain = np.asarray(base.generate(["a sks toy"], **how)[0]).astype(int)
    apply_lora(base.pipe, lora)
    ours = np.asarray(base.generate(["a sks toy"], **how)[0]).astype(int)
    remove_lora(base.pipe)
    base.pipe.load_lora_weights(str(path))
    theirs = np.asarray(base.generate(["a sks toy"], **how)[0]).astype(int)
    base.pipe.unload_lora_weights()
    found = np.array(whole["pixels"]).reshape(size, size, 4)[..., :3]
    assert np.abs(ours - plain).max() > 3, "what was learned shows"
    assert np.abs(found - ours).max() <= 2 and np.abs(theirs - ours).max() <= 2


@needs_runtime
def test_pictures_given_become_numbers_as_in_python(live):
    page, base, _ = live
    from lora_nb.similarity import to_tensor
    path = next(data_path("subjects", "robot").glob("*.jpg"))
    found = page.evaluate("""async ([bytes, size]) => { const {ground, numbers, pictureOf} = await import('/pictures.js')
        const c = await pictureOf(new Blob([Uint8Array.from(bytes)]), 'a.jpg', size), plain = document.createElement('canvas')
        plain.width = plain.height = size
        const k = plain.getContext('2d')
        k.fillStyle = '#34a046'; k.fillRect(0, 0, size, size); k.fillStyle = '#d62828'; k.fillRect(20, 20, 24, 24)
        return {x: Array.from(numbers(c)), said: ground(plain)} }""", [list(path.read_bytes()), base.resolution])
    x = np.array(found["x"]).reshape(3, base.resolution, base.resolution)
    assert np.abs(x - to_tensor(path, base.resolution).numpy()).mean() < .04 and found["said"] == "on a green background"
    said = page.evaluate("""async () => { const {pictureOf} = await import('/pictures.js')
        try { await pictureOf(new Blob(['no picture']), 'notes.txt', 64); return '' } catch (e) { return e.message } }""")
    assert said.startswith("notes.txt is no picture")


@needs_runtime
@pytest.mark.parametrize("width", [1280, 420])
def test_a_reader_teaches_the_page(live, browser, tmp_path, width):
    page, base, _ = live
    p = browser.new_context(viewport=dict(width=width, height=900)).new_page()
    wrong = []
    p.on("pageerror", lambda e: wrong.append(str(e)))
    p.on("dialog", lambda d: wrong.append(d.message))
    p.goto(page.url.rsplit("/", 1)[0] + "/index.html#teach")
    p.click("#load:enabled")
    p.wait_for_selector("#teach:visible", timeout=60000)
    p.wait_for_selector("#stop:disabled", state="attached", timeout=60000)
    hostile = tmp_path / "<img src=x onerror=alert(1)>.png"
    from PIL import Image
    for i, path in enumerate((hostile, tmp_path / "b.png")): Image.new("RGB", (90, 70), ("red", "blue")[i]).save(path)
    (tmp_path / "notes.txt").write_text("no picture")
    p.set_input_files("#files", [hostile, tmp_path / "b.png", tmp_path / "notes.txt"])
    p.wait_for_selector("#error:has-text('notes.txt is no picture')")
    assert p.locator("#tiles figure").count() == 2 and p.locator("#tiles textarea").first.input_value() == "a sks toy on a red background"
    p.fill("#trigger", "<b>x</b>"); p.fill("#many", "20"); p.uncheck("#prior")
    p.click("#learn")
    p.wait_for_selector("#progress:has-text('20 steps, loss')", timeout=60000)
    p.wait_for_selector("#learn:enabled", timeout=60000)
    assert p.locator("#previews figure").count() == 6 and p.locator("#pairs canvas").count() == 8
    assert p.evaluate("document.documentElement.scrollWidth") <= width
    with p.expect_download() as d: p.click("#save")
    d.value.save_as(tmp_path / "x.safetensors")
    assert Lora.load(tmp_path / "x.safetensors").metadata["trigger"] == "<b>x</b>"
    p.click("#playit")
    p.wait_for_selector("#said:has-text('<b>x</b> toy on a striped purple background')", timeout=60000)
    assert not wrong and p.locator("#loras b").count() == 0
    p.context.close()


@needs_runtime
@needs_firefox
def test_firefox_draws_and_learns_the_same(live):
    page, base, loras = live
    with firefox() as f:
        f.goto(page.url.rsplit("/", 1)[0] + "/index.html")
        f.wait("!document.querySelector('#load').disabled")
        f.evaluate("async () => document.querySelector('#load').click()")
        f.wait("lora_nb.ready()")
        assert f.evaluate("async () => document.querySelector('#error').textContent") == ""
        apply_lora(base.pipe, Lora(loras["two"].layers), scale=.7)
        expected = np.asarray(base.generate(["a cat"], seeds=[5], steps=4, guidance_scale=3.)[0]).astype(int)
        remove_lora(base.pipe)
        found = f.evaluate("""async () => { const m = lora_nb.model
            await m.load('two')
            const wish = {prompt: 'a cat', seed: 5, steps: 4, guidance: 3, worn: [{name: 'two', strength: .7}]}
            return Array.from((await m.client.ask('draw', wish)).pixels) }""")
        assert np.abs(np.array(found).reshape(*expected.shape[:2], 4)[..., :3] - expected).max() <= 2
        inputs, losses = ten_steps(base)
        found = f.evaluate("async (...x) => lora_nb.model.client.ask('steps', Object.fromEntries(x))", *inputs.items())
        assert np.abs(np.array(found) - losses).max() < 1e-5, (found, losses)
        f.goto(f"file://{page.folder}/index.html")
        f.wait("document.querySelector('#error').textContent.includes('python -m http.server')")


def opened(page, p, tab="play"):
    "A new page of the same address, with its model loaded."
    p.goto(page.url.rsplit("/", 1)[0] + f"/index.html#{tab}")
    p.click("#load:enabled")
    ready(p)
    return p


def ready(p, seconds=60):
    "Wait until the model is there and has nothing to do. (Not `wait_for_function`: the page's policy forbids its `eval`.)"
    for _ in range(10 * seconds):
        if p.evaluate("lora_nb.ready()"): return
        p.wait_for_timeout(100)
    raise AssertionError(p.inner_text("#error") or "not ready")


@needs_runtime
def test_only_what_is_needed_is_fetched(live, browser):
    page, _, _ = live
    p, asked = browser.new_page(), []
    p.on("request", lambda r: asked.append(r.url.rsplit("/", 1)[-1]))
    opened(page, p)
    said = p.evaluate("lora_nb.model.bytes")
    assert {"draw.gzip", "denoiser.onnx.gzip", "ort-wasm-simd-threaded.wasm.gzip"} <= set(asked)
    assert not {"learn.gzip", "train2.onnx.gzip", "ort.jspi.min.mjs"} & set(asked)
    p.click("#tab-teach")
    p.wait_for_selector("#fetching", state="hidden")
    packed = [a for a in asked if a.endswith(".gzip")]
    assert {"learn.gzip", "encoder.onnx.gzip", "train2.onnx.gzip"} <= set(packed) and len(packed) == len(set(packed)), "once each"
    files = "manifest.json", "draw.gzip", "denoiser.onnx.gzip", "text_encoder.onnx.gzip", "decoder.onnx.gzip"
    assert sum(Path(page.folder, "model", f).stat().st_size for f in files) == said["draw"], "what is said beforehand is what comes"
    p.close()


@needs_runtime
@pytest.mark.parametrize("how, expected", [("cut", "draw.gzip has 1000 bytes, expected"), ("changed", "draw.gzip is damaged"),
                                           ("gone", "draw.gzip could not be loaded (404)"),
                                           ("offline", "draw.gzip could not be loaded: is the network down?")])
def test_a_broken_download_is_a_sentence_and_can_be_tried_again(live, browser, how, expected):
    page, _, _ = live
    p = browser.new_page()
    def fault(route):
        if how == "offline": return route.abort()
        if how == "gone": return route.fulfill(status=404, body="no")
        body = route.fetch().body()
        route.fulfill(body=body[:1000] if how == "cut" else body[:3000] + bytes(200) + body[3200:])
    p.route("**/draw.gzip", fault)
    p.goto(page.url.rsplit("/", 1)[0] + "/index.html")
    p.click("#load:enabled")
    p.wait_for_selector(f"#error:has-text('{expected}')")
    p.unroute("**/draw.gzip")
    p.click("#load:enabled")
    ready(p)
    assert not p.is_visible("#error") and p.inner_text("#said")
    p.close()


@needs_runtime
def test_a_lesson_whose_files_do_not_come(live, browser):
    page, _, _ = live
    p = browser.new_page()
    p.route("**/learn.gzip", lambda route: route.abort())
    opened(page, p, "teach")
    p.wait_for_selector("#error:has-text('learn.gzip could not be loaded')")
    assert p.is_disabled("#learn")
    p.unroute("**/learn.gzip")
    p.click("#tab-play"); p.click("#tab-teach")
    p.wait_for_selector("#fetching", state="hidden")
    p.wait_for_selector("#error", state="hidden")
    p.close()


@needs_runtime
def test_a_wrong_file_is_a_sentence(live, browser, tmp_path):
    page, _, loras = live
    p = opened(page, browser.new_page())
    (tmp_path / "<b>cat.safetensors").write_text("no LoRA at all, but a text")
    p.set_input_files("#file", tmp_path / "<b>cat.safetensors")
    p.wait_for_selector("#error:has-text('Not a .safetensors file')")
    name, f = next((n, f) for n, f in loras["one"].layers.items() if n.endswith("attn1.to_q"))
    wide = Factors(f.up, torch.zeros(f.down.shape[0], f.down.shape[1] + 1), alpha=f.alpha)
    for odd, why in (({name: wide}, f"{f.down.shape[1]} to {f.up.shape[0]} here"), ({name.replace("to_q", "to_x"): f}, "not among those")):
        Lora(odd).save(tmp_path / "other.safetensors")
        p.set_input_files("#file", tmp_path / "other.safetensors")
        p.wait_for_selector(f"#error:has-text('made for another model than random: 1 of its 1 layers do not fit'):has-text('{why}')")
    assert p.locator("#loras .lora").count() == 2 and p.is_enabled("#draw")
    p.close()


@contextlib.contextmanager
def another(browser, *flags):
    "A Chromium with flags of its own."
    b = browser.browser_type.launch(executable_path=CHROMIUM, args=[*CALM, *flags])
    try: yield b
    finally: b.close()


@needs_runtime
def test_without_simd_a_sentence_before_any_download(live, browser):
    page, _, _ = live
    with another(browser, "--js-flags=--no-enable-sse4-1 --no-enable-ssse3") as b:
        p, asked = b.new_page(), []
        p.on("request", lambda r: asked.append(r.url))
        p.goto(page.url.rsplit("/", 1)[0] + "/index.html")
        p.wait_for_selector("#error:has-text('it has no WebAssembly with SIMD')")
        assert p.is_disabled("#load") and not any("model/" in a or "ort/" in a for a in asked)


@needs_runtime
def test_too_little_memory_is_a_sentence(live, browser):
    page, _, _ = live
    with another(browser, "--js-flags=--wasm-max-mem-pages=64") as b:        # 4 MiB
        p = b.new_page()
        p.goto(page.url.rsplit("/", 1)[0] + "/index.html")
        p.click("#load:enabled")
        p.wait_for_selector("#error:has-text('too little free memory')")


class Plain(http.server.SimpleHTTPRequestHandler):
    "A server that knows nothing of the page: no headers of its own."
    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}
    def log_message(self, *args): pass


@pytest.fixture
def plain(live):
    "The same page from a server without headers: its address."
    page, _, _ = live
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Plain, directory=page.folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


CORES = "Object.defineProperty(navigator, 'hardwareConcurrency', {get: () => %d})"
PICTURE = """() => lora_nb.model.client.ask('draw', {prompt: 'a cat', seed: 5, steps: 4, guidance: 3, worn: []})
    .then(o => Array.from(o.pixels))"""


@needs_runtime
@pytest.mark.parametrize("cores, threads", [(8, "4 threads"), (2, "one thread")])
def test_threads_by_a_service_worker(live, browser, plain, cores, threads):
    page, base, _ = live
    context = browser.new_context()
    context.add_init_script(CORES % cores)
    p, loads = context.new_page(), []
    p.on("load", lambda _: loads.append(1))
    p.goto(plain + "/index.html")
    p.click("#load:enabled")
    ready(p)
    assert p.evaluate("[crossOriginIsolated, lora_nb.model.runs]") == [cores > 2, threads] and len(loads) == 1 + (cores > 2)
    expected = np.asarray(base.generate(["a cat"], seeds=[5], steps=4, guidance_scale=3.)[0]).astype(int)
    assert np.abs(np.array(p.evaluate(PICTURE)).reshape(*expected.shape[:2], 4)[..., :3] - expected).max() <= 2
    context.close()


@needs_runtime
@pytest.mark.parametrize("broken", ["delete Navigator.prototype.serviceWorker",
                                    "navigator.serviceWorker.register = () => Promise.reject(new Error('no'))",
                                    "navigator.serviceWorker.register = () => Promise.resolve()"], ids=["none", "refused", "idle"])
def test_where_a_service_worker_is_not_possible_one_thread_does_it(live, browser, plain, broken):
    context = browser.new_context()
    context.add_init_script(f"{CORES % 8}; {broken}")
    p, loads, wrong = context.new_page(), [], []
    p.on("load", lambda _: loads.append(1)); p.on("pageerror", lambda e: wrong.append(str(e)))
    p.goto(plain + "/index.html")
    p.click("#load:enabled", timeout=60000)
    ready(p)
    assert p.evaluate("[crossOriginIsolated, lora_nb.model.runs]") == [False, "one thread"] and len(loads) == 1 and not wrong
    context.close()


@needs_runtime
def test_memory_is_flat_over_fifty_pictures(live, browser):
    page, _, _ = live
    p = opened(page, browser.new_page())
    draw = """async n => { for (let k = 0; k < n; k++) await lora_nb.model.client.ask('draw', {prompt: `cat ${k}`, seed: k, steps: 2,
        guidance: 3, show: 1, worn: [{name: 'one', strength: k / 50}]}); return (await performance.measureUserAgentSpecificMemory()).bytes }"""
    p.evaluate("lora_nb.model.load('one')")
    before, after = p.evaluate(draw, 10), p.evaluate(draw, 50)
    assert after < before + 4e6, (before, after)
    p.close()


@needs_runtime
def test_by_hand_from_a_file_one_sentence(live, browser):
    page, _, _ = live
    p = browser.new_page()
    p.goto(f"file://{page.folder}/index.html")
    p.wait_for_selector("#error:has-text('python -m http.server')")
    assert p.is_disabled("#load")
    p.close()


@needs_runtime
def test_a_graphics_card_draws_the_same_or_is_left_alone(live, browser):
    page, base, _ = live
    expected = np.asarray(base.generate(["a cat"], seeds=[5], steps=4, guidance_scale=3.)[0]).astype(int)
    with another(browser, "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan") as b:
        p = b.new_page()
        p.goto(page.url.rsplit("/", 1)[0] + "/client.js")
        able = p.evaluate("'Suspending' in WebAssembly && navigator.gpu && navigator.gpu.requestAdapter().then(a => !!a)")
        if not able: pytest.skip("no WebGPU here")
        found = p.evaluate("""async () => { const {Client} = await import('/client.js'), c = new Client()
            await c.ask('open', {url: new URL('/model', location.href).href, graphics: true})
            const draw = () => c.ask('draw', {prompt: 'a cat', seed: 5, steps: 4, guidance: 3, worn: []}).then(o => Array.from(o.pixels))
            const race = await c.ask('race', {prompt: 'a cat', seed: 5, steps: 4, guidance: 3})
            return {race, pixels: await draw()} }""")
        assert found["race"]["difference"] <= 2, found["race"]
        assert np.abs(np.array(found["pixels"]).reshape(*expected.shape[:2], 4)[..., :3] - expected).max() <= 2


CONTRAST = """() => {
    const numbers = c => c.match(/[\\d.]+/g).map(Number), light = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0)
    const ground = e => {
        for (; e; e = e.parentElement) { const c = numbers(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3]) return c }
        return [255, 255, 255] }
    const poor = []
    for (const e of document.querySelectorAll('main *')) {
        const text = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || e.value
        if (!text || e.disabled || !e.checkVisibility() || ['OPTION', 'CANVAS'].includes(e.tagName)) continue
        const a = light(numbers(getComputedStyle(e).color)), b = light(ground(e)), ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05)
        if (ratio < 4.5) poor.push([e.tagName, e.id, ratio])
    }
    return poor }"""


@needs_runtime
@pytest.mark.parametrize("width, scheme", [(1280, "dark"), (420, "light"), (420, "dark")])
def test_looks(live, browser, tmp_path, width, scheme):
    page, _, _ = live
    context = browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme)
    p = context.new_page()
    opened(page, p)
    from PIL import Image
    for tab in ("play", "teach"):
        p.click(f"#tab-{tab}")
        if tab == "teach":
            for i in range(3): Image.new("RGB", (40, 40), ("red", "blue", "green")[i]).save(tmp_path / f"{i}.png")
            p.set_input_files("#files", [tmp_path / f"{i}.png" for i in range(3)])
            p.wait_for_selector("#learn:enabled")
        assert p.evaluate("document.documentElement.scrollWidth") <= width
        assert not p.evaluate(CONTRAST)
        wide = p.evaluate("""w => [...document.querySelectorAll('main *')].filter(e => e.checkVisibility() && e.getBoundingClientRect().right > w)
            .map(e => e.outerHTML.slice(0, 80))""", width)
        assert not wide, wide
        p.focus(f"#tab-{tab}")
        seen = []
        while len(seen) < 60:                               # the Tab key goes down the page, column by column
            p.keyboard.press("Tab")
            at = p.evaluate("""() => { const e = document.activeElement, r = (e.closest('figure') ?? e).getBoundingClientRect()
                return e === document.body || e.id.startsWith('tab-') ? null : [e.tagName, e.id, r.top + scrollY, r.height] }""")
            if at is None: break
            seen.append(at)
        assert len(seen) >= 10 and not [(a, b) for a, b in zip(seen, seen[1:]) if b[2] + b[3] < a[2]], seen
    context.close()


@pytest.mark.parametrize("kw, match", (
    (dict(rank=0), "rank = 0"), (dict(rank=1.5), "rank"), (dict(training=(0,)), "training = 0"), (dict(training=4), "batch sizes"),
    (dict(training="46"), "training"), (dict(loras={"../x": "a"}), "becomes a file's"), (dict(loras={"": "a"}), "becomes a file's"),
    (dict(loras={"x": "none.safetensors"}), "none.safetensors"), (dict(examples={"x": "folder"}), "class noun"),
    (dict(examples={"x": ("nowhere", "toy")}), "No folder nowhere"), (dict(examples={"x": ("nowhere", " ")}), "class noun"),
    (dict(runtime="nowhere"), "onnxruntime-web"), (dict(loras={"x": "kohya"}), "kohya form"), (dict(loras={"x": "other"}), "another base"),
    (dict(loras={"x": "dora"}), "no plain pair")))
def test_an_export_is_refused_before_any_work(kw, match, tmp_path):
    base = as_base(random_pipe("sd"), "random")
    layers = {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": Factors(torch.zeros(32, 2), torch.zeros(2, 32))}
    name = next(iter(layers))
    dora = {name: replace(layers[name], magnitude=torch.ones(32))}
    Lora(layers).save(tmp_path / "kohya.safetensors", "kohya"); Lora(dora).save(tmp_path / "dora.safetensors")
    Lora({"unet.nowhere.to_q": layers[name]}).save(tmp_path / "other.safetensors")
    if "loras" in kw and (file := tmp_path / f"{kw['loras'].get('x')}.safetensors").exists(): kw = dict(loras={"x": file})
    with pytest.raises(LoraError, match=match): export_live(base, tmp_path / "page", **kw)
    assert not (tmp_path / "page").exists()
