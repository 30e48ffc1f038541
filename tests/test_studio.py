"The studio: edge cases of settings, easel, code, panel, training tab and of the studio itself."
import ast
import contextlib
import html
import http.client
import json
import re
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_nb.core import DataError, LoraError, data_path
from lora_nb.loading import load_base
from lora_nb.lora import Lora
from lora_nb.studio.easel import Easel, bundled_loras, find_lora, weights_id
from lora_nb.studio.training import Lesson, find_concept
from lora_nb.studio.settings import Settings, Wear, settings_from, sparkline
from lora_nb.cli import lora_studio
from lora_nb.cli.flags import terminal
from lora_nb.studio import Studio
from lora_nb.studio.panel import Worker, style_sheet, with_trigger
from lora_nb.studio.code import python_of, read_settings
from lora_nb.studio.settings import SCALES

PACKAGE = Path(sys.modules["lora_nb"].__file__).parent
NEON = Wear("neon", "neon")
CAT = Settings("a cat on a blue background, in <neon> style", seed=3, steps=3, loras=(NEON,))


@pytest.fixture(scope="module")
def base(): return load_base("tiny-sd", device="cpu")


@pytest.fixture
def easel(base):
    made = Easel(base)
    for name in ("neon", "teapot"): made.loras[name], _ = find_lora(name, base)
    return made


@pytest.fixture
def studio(base, tmp_path):
    made = Studio(base, folder=tmp_path, background=False)
    yield made
    made.close()


def bare(base): return base.generate(["a dog on a red background"], seeds=[1], steps=2)[0].tobytes()


def said(where): return html.unescape(re.sub(r"<[^>]+>", "", where.words.value))


# ------------------------------------------------------------------------------------------ the package
def test_widgets_are_imported_only_where_they_are_built():
    code = ("import sys; import lora_nb.studio.settings, lora_nb.studio.easel, lora_nb.studio.code, lora_nb.lessons, lora_nb.show\n"
            "from lora_nb.studio import Studio, serve_studio\n"
            "found = {'ipywidgets', 'matplotlib'} & set(sys.modules); assert not found, found\n"
            "from lora_nb.studio import button; button('a', print); assert 'ipywidgets' in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_style_sheet_knows_every_class_that_is_used():
    css = style_sheet()
    assert css.startswith("<style>") and css.endswith("</style>") and css.count("{") == css.count("}")
    source = "".join((PACKAGE / "studio" / f"{m}.py").read_text()
                     for m in ("__init__", "panel", "training", "bridge", "history", "ways", "photos", "layout", "cards", "extras"))
    known = css + (PACKAGE / "studio/page.js").read_text()                 # some classes are only handles of the script
    used = set(re.findall(r"""["' ](ls-[a-z]+)(?=["' ])""", source))
    assert len(used) > 20 and not {c for c in used if f".{c}" not in known}, {c for c in used if f".{c}" not in known}


# ------------------------------------------------------------------------------------------ settings and code
def test_frames():
    assert len(replace(CAT, compare="scale", over="neon").frames()) == len(SCALES)
    off = replace(CAT, loras=(replace(NEON, on=False),))
    assert off.frames()[0][1].loras == () and off.frames()[0][1].compare == "one"
    assert all(f.loras[0].on for _, f in replace(off, compare="scale", over="neon").frames())
    with pytest.raises(LoraError, match="one of neon, found none"): replace(CAT, compare="scale").frames()
    with pytest.raises(LoraError, match="found teapot"): replace(CAT, compare="scale", over="teapot").frames()


@pytest.mark.parametrize("text", ["", "[]", "nonsense", '{"size": 3}', '{"loras": [{"nam": "x"}]}', '{"promt": "a"}', '{"steps": 0}',
                                  '{"steps": "__import__(1)"}', '{"seed": 1.5}', '{"guidance_scale": NaN}', '{"size": [8, "x()"]}',
                                  '{"loras": [{"name": "a", "scale": Infinity}]}', '{"loras": [{"name": "a", "on": 1}]}', "[" * 10**5,
                                  '{"loras": [{"name": "a"}, {"name": "a"}]}', '{"compare": "else"}', '{"prompt": null}'])
def test_what_is_not_settings(text):
    with pytest.raises(DataError, match="not settings of the studio"): settings_from(text)


@pytest.mark.parametrize("values", [[1.], [0., 9., -9.], (0, 1)])
def test_a_curve_of_any_schedule_stays_inside(values):
    points = re.search(r'polyline points="(.*?)"', sparkline(values))[1].split()
    assert len(points) == max(2, len(values))
    assert all(0 <= float(x) <= 150 and 0 <= float(y) <= 36 for x, y in (p.split(",") for p in points))


def test_settings_are_read_from_json_and_from_nothing_else(tmp_path):
    (tmp_path / "a.json").write_text(CAT.to_json())
    assert read_settings(tmp_path / "a.json") == CAT
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    for name, says in (("plain.png", "holds no settings"), ("gone.png", "cannot read")):
        with pytest.raises(DataError, match=says): read_settings(tmp_path / name)


def test_code_of_a_lora_from_a_file_and_without_loras():
    assert "Lora.load('mine.safetensors', base=base)" in python_of(replace(CAT, loras=(Wear("mine"),)))
    assert "scheduled" not in python_of(replace(CAT, loras=(replace(NEON, on=False),)))


HOSTILE = ["{__import__('os').system('x')}", "'+__import__('os')+'", "\"\"\"\n__import__('os')", "a\\",
           "{scale!r:{x}}", "\x1b[2J\u2028\udc80", "<b>%s"]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("how", [dict(), dict(compare="without"), dict(compare="scale"), dict(method="ties"), dict(method="switch"),
                                 dict(method="composite", compare="scale")])
def test_names_and_prompts_are_literals_in_the_program(name, how):
    worn = (Wear(name, name, schedule=name), Wear("neon", "neon", .5))
    s = Settings(name, name, loras=worn, base=name, over=name, **how)
    program = ast.parse(code := python_of(s, name))
    called = {n.func.id if isinstance(n.func, ast.Name) else n.func.attr for n in ast.walk(program) if isinstance(n, ast.Call)}
    names = {n.id for n in ast.walk(program) if isinstance(n, ast.Name)}
    inside = [ast.unparse(v.value) for n in ast.walk(program) if isinstance(n, ast.JoinedStr) for v in n.values
              if isinstance(v, ast.FormattedValue)]
    ours = {"Lora", "LoraComposite", "compose", "data_path", "grid", "load_base", "parse_schedule", "scheduled", "turbo_settings",
            "turbo_scheduler", "replace", "dict"}
    assert called <= ours | {"load", "scaled", "generate", "save", "append"} and set(inside) <= {"scale"}
    assert names <= ours | {"base", "loras", "how", "plan", "image", "images", "scale", "without"} and code.encode()
    assert name in {n.value for n in ast.walk(program) if isinstance(n, ast.Constant)}


@pytest.mark.parametrize("odd", [dict(steps="__import__('os')"), dict(seed=float("nan")), dict(loras=(Wear("a", scale=float("inf")),))])
def test_what_is_no_plain_data_makes_no_program(odd):
    with pytest.raises(DataError, match="not settings"): python_of(replace(CAT, **odd), "neon")


# ------------------------------------------------------------------------------------------ easel
def test_stopping_leaves_no_trace(easel, base):
    before = bare(base)
    def stops(i, look):
        if i == 2: raise RuntimeError("stop")
    with pytest.raises(RuntimeError, match="stop"): easel.draw(CAT, stops)
    assert bare(base) == before and not easel.drawn
    looks = []
    image = easel.draw(CAT, lambda i, look: looks.append(look()))
    numbers = lambda im: torch.frombuffer(bytearray(im.tobytes()), dtype=torch.uint8).float()
    assert len(looks) == 3 and (numbers(looks[-1]) - numbers(image)).abs().mean() < 1
    assert easel.draw(CAT) is image and bare(base) == before


def test_weights_that_were_written_to_are_other_weights(base):
    was = weights_id(base.denoiser)
    assert weights_id(base.denoiser) == was
    with torch.no_grad(): base.denoiser.conv_in.bias.add_(0)
    assert weights_id(base.denoiser) != was


def test_caches_are_bounded(easel, base):
    small = Easel(base, budget=1)
    small.loras = easel.loras
    for scale in (.1, .2): small.draw(replace(CAT, steps=1, loras=(replace(NEON, scale=scale),)))
    assert sum(c.bytes for c in small.caches.values()) <= 1 and len(small.drawn) == 2
    two = replace(CAT, method="lerp", loras=(NEON, Wear("teapot", "teapot")))
    for k in range(10): easel.plan(replace(two, loras=(replace(NEON, scale=k / 10), two.loras[1])))
    assert len(easel.mixes) == 8


def test_loras_that_cannot_be_found(easel, base):
    with pytest.raises(LoraError, match="no LoRA 'noen' is loaded.*Did you mean 'neon'"): easel.draw(Settings(loras=(Wear("noen", "x"),)))
    with pytest.raises(DataError, match="Did you mean 'neon'"): find_lora("noen", base)
    with pytest.raises(DataError, match="no LoRA ''"): find_lora("  ", base)
    assert find_lora(easel.loras["neon"], base) == (easel.loras["neon"], "")
    assert {"neon", "teapot"} <= set(bundled_loras("tiny-sd"))


# ------------------------------------------------------------------------------------------ panel
def slow(seen, name):
    def work(job):
        for _ in range(100): job.check(); time.sleep(.005)
        seen.append(name)
    return work


def test_a_stopped_job_ends_and_the_waiting_one_is_forgotten():
    seen, worker = [], Worker(background=True)
    job = worker(slow(seen, "a")); time.sleep(.05); waiting = worker(slow(seen, "b")); worker.stop(); worker.wait()
    assert seen == [] and job.halt and worker.now is None and worker.next is None and not waiting.halt
    worker(slow(seen, "c")); worker.wait()
    assert seen == ["c"]


def test_on_colab_the_work_is_done_within_the_call():
    seen, here = [], Worker(background=False)
    here(lambda job: seen.append("a"))
    assert seen == ["a"] and here.thread is None
    with pytest.raises(ZeroDivisionError): here(lambda job: 1 / 0)
    assert here.now is None


@pytest.mark.parametrize("prompt, trigger, kind, expected", [
    ("a face on a red background", "sks face", "", "a sks face on a red background"),
    ("faces on a red background", "sks face", "", "sks face, faces on a red background"),
    ("", "<teapot>", "object", "a <teapot>"), ("", "<neon>", "style", "a picture in <neon> style"),
    ("a cat.", "<neon>", "style", "a cat, in <neon> style"), ("a <neon> cat", "<neon>", "style", "a <neon> cat")])
def test_where_a_trigger_goes(prompt, trigger, kind, expected): assert with_trigger(prompt, trigger, kind)[0] == expected


# ------------------------------------------------------------------------------------------ studio
def test_wrong_settings_are_told_and_an_error_from_elsewhere_is_kept(studio, base, monkeypatch):
    studio.file.value = "noen"; studio.add.click()
    assert "Did you mean 'neon'" in html.unescape(studio.loaded.value) and "ls-error" in studio.loaded.value and not studio.trouble
    monkeypatch.setattr(base, "generate", None)
    studio.go.click()
    assert "studio.trouble" in said(studio) and "ls-error" in studio.words.value and "Traceback" in studio.trouble
    with pytest.raises(LoraError, match="no picture yet"): studio.save()


def test_a_background_drawing_is_stopped_and_replaced(base, tmp_path):
    late = Studio(base, folder=tmp_path, background=True)
    late.steps.value, late.prompt.value = 400, "a dog"
    late.draw(); time.sleep(1); late.stop(); late.worker.wait()
    assert "Stopped at step" in said(late) and late.halt.disabled and not late.gallery
    late.steps.value = 40
    for v in (1, 2, 3): late.seed.value = v; late.draw()
    late.worker.wait()
    assert [e.settings.seed for e in late.gallery] == [3]
    late.close()


def test_what_a_lora_brings_goes_with_it(studio):
    studio.load("neon"); studio.load("neon")
    assert list(studio.strips) == ["neon", "neon-2"] and studio.over.options == ("neon", "neon-2")
    prompt = studio.prompt.value
    for name in ("neon-2", "neon"): studio.remove(name)
    assert "<neon>" in prompt and studio.prompt.value == "" and not studio.easel.loras and not studio.rack.children


def test_a_lora_in_memory_gets_a_file(studio, tmp_path):
    studio.load(Lora.load(data_path("loras", "neon.safetensors")), name="mine")
    studio.steps.value = 1; studio.go.click()
    assert studio.now.settings.loras[0].source == ""
    paths = studio.save()
    assert (tmp_path / "mine.safetensors").exists() and [p.suffix for p in paths] == [".png", ".json", ".py"]
    other = Studio(studio.base, folder=tmp_path, background=False)
    other.recall(paths[1])
    assert other.settings == studio.now.settings


def test_a_turbo_lora_sets_its_steps_and_its_program_draws_the_same(studio, base):
    studio.load("turbo-tiny-sd"); studio.prompt.value = "a cat on a blue background"
    assert studio.steps.value <= 8
    kept = base.pipe.scheduler
    studio.go.click()
    code = studio.python(studio.now.settings).replace('image.save("picture.png")', "").replace("base = load_base('tiny-sd')", "")
    try: exec(code, space := dict(base=base))
    finally: base.pipe.scheduler = kept
    assert "turbo_scheduler" in code and space["image"].tobytes() == studio.now.image.tobytes()


def test_another_family_refuses_what_does_not_fit_and_its_program_draws_the_same(tmp_path):
    flow = Studio("tiny-sd3", folder=tmp_path, background=False)
    flow.prompt.value, flow.steps.value = "a cat on a blue background", 2
    flow.load("neon"); flow.go.click()
    flow.file.value = str(data_path("loras", "neon.safetensors")); flow.add.click()
    assert "ls-error" in flow.loaded.value and len(flow.strips) == 1 and flow.now.settings.base == "tiny-sd3"
    exec(flow.python().replace('image.save("picture.png")', ""), space := {})
    assert space["image"].tobytes() == flow.now.image.tobytes()


def test_a_name_from_a_file_stays_inside_the_folder(studio, tmp_path):
    folder = tmp_path / "a" / "b"; studio.folder = folder
    for concept in ("../../x", "/etc/x", "<img src=x>", "..", "x" * 300):
        lora, _ = find_lora("neon", studio.base)
        lora = Lora(lora.layers, lora.embeddings, {**lora.metadata, "concept": concept})
        strip = studio.load(lora); studio._write_lora(strip.name)
        assert Path(strip.source).parent == folder and Path(strip.source).is_file() and "<" not in strip.name
        studio.remove(strip.name)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == sorted(p.name for p in folder.iterdir())


def test_nothing_saved_is_overwritten(studio, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *a: "20260101-000000")
    studio.steps.value = 1
    lora, _ = find_lora("neon", studio.base)
    studio.load(lora, "mine"); studio.draw()
    (tmp_path / "mine.safetensors").write_bytes(b"another")
    first, second = studio.save(), studio.save()
    assert not {*first} & {*second} and all(p.is_file() for p in first + second)
    assert (tmp_path / "mine.safetensors").read_bytes() == b"another" and Path(studio.strips["mine"].source).name == "mine-2.safetensors"


def test_settings_that_the_panel_cannot_show_change_nothing(studio):
    was = studio.settings
    for odd in (dict(seed=2**40), dict(steps=10**6), dict(guidance_scale=1e3), dict(method="sumsum")):
        with pytest.raises(DataError, match="cannot show|no way"): studio.show(replace(was, **odd))
        assert studio.settings == was


def test_a_saved_picture_brings_its_own_lora(studio, tmp_path):
    studio.load("neon", "same")
    other = tmp_path / "other.safetensors"; find_lora("teapot", studio.base)[0].save(other)
    studio.show(replace(CAT, loras=(Wear("same", str(other)),)))
    assert studio.strips["same"].lora.content_hash() == Lora.load(other).content_hash()


# ------------------------------------------------------------------------------------------ training tab
def test_a_folder_is_never_taken_for_a_bundled_style(tmp_path, monkeypatch):
    (tmp_path / "neon").mkdir(); monkeypatch.chdir(tmp_path)
    for text, folder in ((str(tmp_path), tmp_path), (".", Path(".")), (str(tmp_path / "neon"), tmp_path / "neon"), ("./neon", Path("neon"))):
        assert find_concept(text) == (folder, None, ""), text


def test_subjects_of_one_name_have_folders_of_their_own(studio, base, tmp_path, monkeypatch):
    tab, made = studio.training, []
    for place in ("a", "b", "a"):
        folder = tmp_path / place / "photos"; folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (9, 99, 9)).save(folder / "1.png")
        out = tab.out(Lesson(str(folder)))
        out.mkdir(parents=True, exist_ok=True); (out / "pictures.txt").write_text(str(folder.resolve()))
        made.append(out)
    assert made[0] == made[2] != made[1] and {p.parent for p in made} == {studio.folder / "training"}
    (studio.folder / "training" / "of-before").mkdir()          # without a note: somebody's, but whose?
    other = tmp_path / "of before"; other.mkdir()
    assert tab.out(Lesson(str(other))).name == "of-before-2"
    monkeypatch.setattr("lora_nb.studio.training.DreamBooth", lambda *a, **kw: kw)
    assert Lesson(str(tmp_path / "a/photos"), noun="../../toy").start(base, made[0])["class_data"].parent == made[0]


def test_concepts(tmp_path):
    assert find_concept(" Jack-O-Lantern ")[1:] == ("subject", "face") and find_concept("neon")[1] == "style"
    assert find_concept(str(tmp_path)) == (tmp_path, None, "")
    with pytest.raises(DataError, match="no pictures 'teepot'.*Did you mean 'teapot'"): find_concept("teepot")
    with pytest.raises(DataError, match="no pictures ''"): find_concept("")


def test_words_of_a_lesson():
    toy = Lesson("x", noun="toy")
    assert toy.words == "sks toy" and replace(toy, trigger="my toy").words == "my toy"
    assert replace(toy, method="pti", trigger="<x>").words == "<x>" and replace(toy, intent="style").words == "sks"


def test_the_tab_fills_in_what_is_known_and_tells_what_is_wrong(studio):
    tab = studio.training
    tab.pictures.value = "teapot"; tab.method.value = "pti"
    assert tab.trigger.value == "<teapot>" and tab.lesson.words == "<teapot>"
    tab.pictures.value = "neon"
    assert [tab.intent.value, tab.preview.value] == ["style", "a cat on a blue background, in <neon> style"]
    tab.pictures.value = "nothing"; assert "no pictures 'nothing'" in said(tab)
    tab.go.click(); assert "no pictures" in said(tab) and not tab.running and tab.taste.disabled
    tab.pictures.value = "neon"; tab.trigger.value = " "; tab.go.click(); assert "no trigger word" in said(tab)


def test_training_in_the_tab_leaves_the_base_as_it_was(studio, base):
    before, tab = bare(base), studio.training
    tab.pictures.value = "teapot"; tab.noun.value = ""
    tab.steps.value, tab.rank.value = 2, 2
    tab.go.click()
    assert said(tab).startswith("Learned sks"), said(tab)
    assert tab.log().steps == 2 and "<svg" in tab.chart.value and tab.views.value[:4] == b"\x89PNG" and tab.log().val
    assert list(studio.strips) == ["teapot"] and tab.result is studio.strips["teapot"] and not tab.halted
    assert not tab.taste.disabled and tab.more.disabled and bare(base) == before      # the result is loaded, not worn


def test_no_drawing_while_training(studio):
    studio.training.running = True
    studio.draw()
    assert "stop it on its tab" in said(studio) and not studio.gallery
    studio.training.running = False


def test_pivotal_tuning_in_the_tab(base, tmp_path):
    run = Lesson("neon", "pti", "style", "<neon>", steps=2, rank=2).start(base, tmp_path)
    run.recipe = run.recipe.replace(ti_steps=2)
    made = run.fit()
    assert list(made.embeddings) == ["<neon>"] and run.log.steps == 4


# ------------------------------------------------------------------------------------------ command
def usage_error(*argv):
    code, text = terminal(lora_studio, *argv)
    assert code == 2 and "\n" not in text, (code, text)
    return text


def test_what_can_be_known_is_checked_before_the_server_starts():
    assert "Did you mean tiny-sd" in usage_error("--pretrained_model_name_or_path", "tiny-sdd")
    for port, why in {0: "at least 1", 65536: "at most 65535", -1: "at least 1", "http": "a whole number"}.items():
        assert why in usage_error("--port", port)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); s.listen()
        assert "choose another" in usage_error("--port", s.getsockname()[1])


def test_the_page_is_for_this_machine_and_those_who_have_its_address(tmp_path):
    "Without the token, or under a foreign name, there is nothing; a kernel without a page ends."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    cell = dict(cell_type="code", id="a", metadata={}, execution_count=None, outputs=[], source="print('made')")
    spec = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    (tmp_path / "n.ipynb").write_text(json.dumps(dict(cells=[cell], metadata=spec, nbformat=4, nbformat_minor=5)))
    code = f"from lora_nb.studio import page_server; page_server({str(tmp_path / 'n.ipynb')!r}, {port}, 'open-sesame', 4).start()"
    log = open(tmp_path / "log", "w")
    server = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log)
    def ask(path, host="127.0.0.1", whole=False, cookies="", body=None):
        door = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        heads = {"Host": f"{host}:{port}", "Content-Type": "application/x-www-form-urlencoded", "Cookie": cookies}
        door.request("POST" if body else "GET", path, body, headers=heads)
        answer = door.getresponse(); text = answer.read().decode()
        return (answer.status, answer.headers.get_all("Set-Cookie"), text) if whole else (answer.status, text)
    def kernels(): return [c for c in Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()]
    def wait(until):
        for _ in range(600):
            with contextlib.suppress(OSError):
                if until(): return True
            time.sleep(.1)
    try:
        assert wait(lambda: ask("/login")), (tmp_path / "log").read_text()
        assert ask("/")[0] in (302, 403) and ask("/?token=wrong")[0] in (302, 403) and not kernels()
        assert ask("/?token=open-sesame", "evil.example")[0] == 403 and not kernels()
        for host in ("127.0.0.1", "localhost"):
            status, page = ask("/?token=open-sesame", host); assert status == 200 and "made" in page
        assert kernels() and wait(lambda: not kernels())
        status, cookies, page = ask("/?token=open-sesame", whole=True)                     # a page that says that it was closed
        jar = "; ".join(c.split(";")[0] for c in cookies); seal = re.search("_xsrf=([^;]*)", jar)[1]
        kernel = re.search(r'"kernelId": "([^"]+)"', page)[1]
        assert len(kernels()) == 1 and ask(f"/voila/api/shutdown/{kernel}", cookies=jar, body=f"_xsrf={seal}")[0] == 204 and not kernels()
    finally: server.kill(); server.wait(); log.close()


def test_a_misspelt_lora_is_an_error_of_the_command(): assert "Did you mean neon" in usage_error("--lora", "noen")


def test_a_default_port_that_is_taken_is_refused_too():
    taken = {f.name: f for group in lora_studio.groups.values() for f in group}["port"].default
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError): s.bind(("127.0.0.1", taken)); s.listen()      # or another program has it
        assert f"cannot have port {taken}" in usage_error("--no_browser")
