"The studio: pictures to draw over, grids, history, files from the page, state after trouble, other bases, photographs before training."
import base64
import html
import io
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_nb.core import DataError, LoraError, data_path
from lora_nb.families import as_base
from lora_nb.loading import load_base
from lora_nb.random_pipes import random_pipe
from lora_nb.studio import Studio, large, opening
from lora_nb.studio.bridge import received
from lora_nb.studio.code import python_of, read_settings
from lora_nb.studio.easel import Easel, find_lora
from lora_nb.studio.grid import Axis, read_axis
from lora_nb.studio.samplers import sampler, samplers
from lora_nb.studio.settings import Settings, Wear, settings_from


@pytest.fixture(scope="module")
def base(): return load_base("tiny-sd", device="cpu")


@pytest.fixture
def studio(base, tmp_path):
    made = Studio(base, folder=tmp_path, background=False)
    made.steps.value, made.prompt.value, made.live.value = 2, "a cat on a blue background", False
    yield made
    made.close()


def plain(widget): return html.unescape(re.sub(r"<[^>]+>", "", widget.value))


def sent(*files): return dict(files=[dict(name=n, data=base64.b64encode(raw).decode()) for n, raw in files])


def png(colour="navy", size=(64, 64)):
    buffer = io.BytesIO(); Image.new("RGB", size, colour).save(buffer, "PNG"); return buffer.getvalue()


def belongs_together(studio):
    "Picture, caption, thumbnail and what Save writes are of one entry."
    e = studio.now
    marked = [x for x in studio.gallery if "ls-now" in x.thumb.children[1]._dom_classes]
    assert "ls-badge" not in studio.picture.value and f"seed {e.settings.seed}" in studio.caption.value and marked == [e]
    assert read_settings(studio.save()[0]).seed == e.settings.seed
    assert Image.open(studio.save()[0]).tobytes() == e.image.tobytes()


# ------------------------------------------------------------------------------------------ settings and grids
@pytest.mark.parametrize("axes", ['[{"what": "seed", "values": ["__import__(1)"]}]', '[{"what": "steps", "values": [0]}]',
                                  '[{"what": "x", "values": [1]}]',
                                  '[{"what": "strength", "values": [NaN]}]', '[{"what": "seed", "values": []}]',
                                  '[{"what": "word", "values": [1]}]',
                                  '[{"what": "seed", "values": [1], "of": 3}]', '[3]', '{"what": 1}',
                                  json.dumps([dict(what="seed", values=[1] * 101)])])
def test_axes_that_are_none(axes):
    with pytest.raises(DataError, match="not settings"): settings_from('{"axes": %s}' % axes)


@pytest.mark.parametrize("text, values", [("1, 2", (1, 2)), ("3-1", (3, 2, 1)), ("5", (5,)), ("0-10 [3]", (0, 5, 10))])
def test_whole_numbers_of_an_axis(text, values): assert read_axis("steps", text).values == values


@pytest.mark.parametrize("text", ["1.5", "a", "1-", "", "1-500", "--1"])
def test_numbers_that_are_none(text):
    with pytest.raises(LoraError): read_axis("seed", text)


def test_every_axis_varies_what_it_says():
    s = Settings("a cat", loras=(Wear("neon", "neon"),), compare="grid", notation=True)
    cells = lambda *axes: [f for _, f in replace(s, axes=axes).frames()]
    assert [f.loras[0].scale for f in cells(Axis("strength", (0., 1.), "neon"))] == [0., 1.]
    assert [f.prompt for f in cells(Axis("word", ("cat", "dog")))] == ["a cat", "a dog"]
    assert [f.loras[0].source for f in cells(Axis("lora", ("neon", "teapot"), "neon"))] == ["neon", "teapot"]
    assert [(f.seed, f.steps) for f in cells(Axis("seed", (1, 2)), Axis("steps", (3, 4)))] == [(1, 3), (2, 3), (1, 4), (2, 4)]
    assert [f.guidance_scale for f in cells(Axis("guidance", (1., 2.)))] == [1., 2.] and cells(Axis("sampler", ("Euler",)))[0].sampler == "Euler"
    for axes, says in (((), "needs something"), ((Axis("strength", (1.,), "x"),), "no LoRA 'x'"),
                       ((Axis("word", ("dog", "cat")),), "lacks 'dog'"),
                       ((Axis("seed", (1,)), Axis("seed", (2,))), "both sides"), ((Axis("lora", ("x",), "y"),), "no LoRA 'y'")):
        with pytest.raises(LoraError, match=says): cells(*axes)


def test_a_tag_of_a_loaded_lora_counts_instead_of_its_strip(base):
    easel = Easel(base); easel.loras["mine"], _ = find_lora("neon", base)
    s = Settings("a cat <lora:mine:0.3>", loras=(Wear("mine", scale=2.),), steps=2, notation=True)
    assert [(x.name, x.plan().values(2)) for x in s.wears()] == [("mine", [.3, .3])]
    other = replace(s, prompt="a cat", loras=(Wear("mine", scale=.3),))
    assert easel.draw(s).tobytes() == easel.draw(other).tobytes()
    assert Settings("a (cat <lora:x:1>").wears() == ()                    # pictures from before the notation are drawn as they were
    with pytest.raises(LoraError, match="no LoRA 'noen' is loaded.*Did you mean"): easel.draw(replace(s, prompt="a cat <lora:noen:1>"))


# ------------------------------------------------------------------------------------------ samplers, pictures to draw over
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_every_sampler_draws_and_is_taken_off(family):
    small = as_base(random_pipe(family)); easel, own = Easel(small), small.pipe.scheduler
    made = {n: easel.draw(Settings("a", steps=3, sampler=n, size=(64, 64), base="x"), lambda i, look: look()) for n in samplers(small)}
    assert len(made) >= 3 and small.pipe.scheduler is own
    with pytest.raises(LoraError, match="expected one of"): sampler(small, "no such")


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "sd_inpaint"])
def test_every_family_draws_over_and_into_masks(family, tmp_path):
    easel = Easel(as_base(random_pipe(family)))
    Image.new("RGB", (64, 64), (9, 99, 9)).save(tmp_path / "a.png")
    mask = Image.new("L", (64, 64)); mask.paste(255, (0, 0, 32, 64)); mask.save(tmp_path / "m.png")
    s = Settings("a", steps=4, size=(64, 64), image=str(tmp_path / "a.png"), strength=.8)
    seen = []
    over, into = easel.draw(s), easel.draw(replace(s, mask=str(tmp_path / "m.png"), strength=1.), lambda i, look: seen.append(i))
    assert over.size == into.size == (64, 64) and into.getpixel((60, 30)) == (9, 99, 9) and into.getpixel((5, 30)) != (9, 99, 9) and seen
    def stop(i, look): raise RuntimeError("now")
    with pytest.raises(RuntimeError, match="now"): easel.draw(replace(s, mask=str(tmp_path / "m.png"), seed=5, strength=1.), stop)
    with pytest.raises(DataError, match="cannot read the picture"): easel.draw(replace(s, image=str(tmp_path / "gone.png")))
    with pytest.raises(LoraError, match="no picture that it belongs to"): easel.draw(replace(s, image="", mask=str(tmp_path / "m.png")))


def test_a_picture_written_again_is_drawn_again(base, tmp_path):
    easel, file = Easel(base), tmp_path / "a.png"
    s = Settings("a cat", steps=4, image=str(file), strength=.5, size=(64, 64))
    made = []
    for colour in ("red", "blue"):
        Image.new("RGB", (64, 64), colour).save(file); time.sleep(.01); made.append(easel.draw(s).tobytes())
    assert made[0] != made[1]


# ------------------------------------------------------------------------------------------ the panel
def test_a_grid_grows_and_its_program_draws_it(studio, base):
    studio.load("neon"); studio.compare.value = "grid"
    studio.ways.across.values.value, studio.ways.down.what.value, studio.ways.down.values.value = "0, 1", "seed", "1-2"
    shown = []; studio.picture.observe(lambda c: shown.append(c["new"]), "value")
    studio.go.click()
    assert len(shown) == 5 and ["ls-badge" in x for x in shown] == [True] * 4 + [False] and "Easel" in studio.code.value
    exec(studio.python(studio.now.settings).replace('image.save("picture.png")', ""), space := {})
    assert space["image"].tobytes() == studio.now.image.tobytes()
    studio.ways.across.values.value = "many"; studio.go.click()
    assert "no list of numbers" in plain(studio.words)
    belongs_together(studio)


def test_several_pictures_have_seeds_in_a_row_and_stop_together(studio, monkeypatch):
    studio.ways.count.value = 3; studio.go.click()
    assert [e.settings.seed for e in studio.gallery] == [0, 1, 2]
    draw = studio._draw
    def stopping(job, s, live, which): draw(job, s, live, which); studio.worker.stop()
    monkeypatch.setattr(studio, "_draw", stopping); studio.seed.value = 10; studio.go.click()
    assert [e.settings.seed for e in studio.gallery] == [0, 1, 2, 10]


def test_what_is_shown_belongs_together_after_stop_and_after_errors(studio, base, monkeypatch):
    studio.go.click(); first = studio.now; belongs_together(studio)
    studio.seed.value, render = 5, studio.easel.render
    def stopped(s, on_step, on_picture): on_step(1, lambda: Image.new("RGB", (64, 64))); studio.worker.stop(); on_step(2, lambda: None)
    monkeypatch.setattr(studio.easel, "render", stopped); studio.go.click()
    assert "Stopped at step" in plain(studio.words) and studio.now is first; belongs_together(studio)
    def failing(s, on_step, on_picture): studio._preview(Image.new("RGB", (64, 64)), "x"); raise RuntimeError("no memory")
    monkeypatch.setattr(studio.easel, "render", failing); studio.go.click()
    assert "no memory" in plain(studio.words) and studio.now is first; belongs_together(studio)
    monkeypatch.setattr(studio.easel, "render", render)
    studio.load("neon"); studio.strips["neon"].preset.value = "own"; studio.strips["neon"].text.value = "0:0,2:1"; studio.go.click()
    assert "keyframes" in plain(studio.words) and studio.now is first; belongs_together(studio)


def test_nothing_to_show_is_said(base, tmp_path):
    empty = Studio(base, folder=tmp_path, background=False)
    assert "No picture yet" in empty.picture.value and empty.keep.disabled and not empty.links.value
    empty.prompt.value = "a (cat"; empty.go.click()
    assert "never closed" in plain(empty.words) and "No picture yet" in empty.picture.value
    empty.close()


def test_large_pictures_ask_first(studio, base):
    assert not large(studio.settings, 1, base) and "pictures" in large(studio.settings, 30, base)
    studio.width.value = studio.height.value = 64 * 8; studio.steps.value = 1
    studio.go.click(); assert "64 times" in plain(studio.words) and not studio.gallery
    studio.seed.value = 3; studio.go.click(); assert "64 times" in plain(studio.words) and not studio.gallery     # other settings: asked again
    studio.go.click(); assert studio.now.image.size == (512, 512)


def test_too_long_a_prompt_is_said(studio):
    studio.prompt.value = "a cat " * 60 + "on a red background"; studio.go.click()
    assert "Too long" in plain(studio.words) and "red background" in plain(studio.words)


def test_history_survives_a_restart_with_loras_from_memory(studio, base, tmp_path):
    studio.load(find_lora("neon", base)[0], "mine"); studio.go.click(); drawn = studio.now
    assert studio.strips["mine"].source == ""                            # only the history has a file for it
    later = Studio(base, folder=tmp_path, background=False)
    later.history.day.value = later.history.day.options[1][1]
    later.history.thumbs.children[0].children[1].click()
    assert later.now.image.tobytes() == drawn.image.tobytes() and "mine" in later.strips and later.prompt.value == drawn.settings.prompt
    belongs_together(later); later.close()
    studio.live.value = True; studio.seed.value = 9                      # a moved control: no history
    assert len(list((tmp_path / "history").glob("*/*.png"))) == 1
    quiet = Studio(base, folder=tmp_path / "none", background=False, history=False); quiet.steps.value = 1; quiet.go.click()
    assert quiet.gallery and not (tmp_path / "none").exists(); quiet.close()


def test_a_history_that_cannot_be_written_costs_no_picture(studio, tmp_path):
    (tmp_path / "history").write_text("a file where a folder should be"); studio.go.click()
    assert studio.gallery and "cannot write" in plain(studio.saved) and "s" in plain(studio.words)


# ------------------------------------------------------------------------------------------ files from the page
def test_what_is_dropped_finds_its_place(studio, tmp_path):
    studio.go.click(); kept = studio.save()[0].read_bytes()
    studio.prompt.value = "something else"
    studio.drop.wire.value = json.dumps(sent(("kept.png", kept))); assert studio.prompt.value == "a cat on a blue background"
    raw = data_path("loras", "teapot.safetensors").read_bytes()
    studio.drop.wire.value = json.dumps(sent(("x.safetensors", raw))); assert "x" in studio.strips
    studio.drop.wire.value = json.dumps(sent(("photo.png", png()))); assert Path(studio.redraw.image).is_file() and studio.drop.wire.value == ""
    studio.drop.wire.value = json.dumps(sent(("bad.safetensors", b"no LoRA"))); assert "ls-error" in studio.loaded.value
    studio.drop.wire.value = json.dumps(sent(("bad.png", b"no picture"))); assert "cannot read the picture" in plain(studio.loaded)
    studio.drop.wire.value = json.dumps(dict(large=["big.safetensors"], size=10**9, most=10))
    assert "Give the file's path" in plain(studio.loaded)


@pytest.mark.parametrize("name", ["../../x.png", "/etc/x.png", "..\\x.png", "<img>.png", "a" * 400 + ".png", "con\x00.png"])
def test_a_dropped_name_stays_inside_the_folder(tmp_path, name):
    path, = received(sent((name, png())), tmp_path / "in")
    assert path.parent == tmp_path / "in" and path.is_file() and [p.name for p in tmp_path.iterdir()] == ["in"]


def test_pictures_are_sent_on(studio, tmp_path):
    studio.go.click(); studio.send.click()
    assert Image.open(studio.redraw.image).tobytes() == studio.now.image.tobytes()
    studio.go.click(); assert studio.now.settings.image and "over a picture" in studio.caption.value
    studio.teach.click(); assert studio.training.lesson.pictures == str(tmp_path / "collected") and len(studio.training.photos.found) == 1
    studio.recall(0); assert studio.redraw.image == "" and studio.settings == studio.gallery[0].settings


def test_a_mask_from_a_file_has_the_size_of_its_picture(studio):
    studio.redraw.use(Image.new("RGB", (64, 64)))
    studio.redraw.take_mask(sent(("m.png", png("white", (32, 32))))); assert "expected the same" in plain(studio.words) and not studio.redraw.mask
    studio.redraw.take_mask(sent(("m.png", png("white")))); assert studio.settings.mask == studio.redraw.mask != ""
    studio.redraw.take_paint(dict(mask="")); assert not studio.redraw.mask


def test_another_base(studio):
    studio.load("neon")
    studio.other.value = "tiny-sdd"; studio.swap.click(); assert "Did you mean" in plain(studio.words) and studio.source == "tiny-sd"
    studio.other.value = "tiny-sd3"; studio.swap.click()
    assert studio.base.family == "sd3" and "tiny-sd3" in studio.title.value and studio.settings.base == "tiny-sd3"
    studio.steps.value = 2; studio.go.click(); assert studio.now.settings.base == "tiny-sd3"
    exec(python_of(studio.now.settings).replace('image.save("picture.png")', ""), space := {})
    assert space["image"].tobytes() == studio.now.image.tobytes()


def test_the_page_says_when_it_cannot_load():
    box = opening("no-such-base")
    for _ in range(200):
        if "could not be loaded" in box.children[0].value: break
        time.sleep(.05)
    assert "no-such-base could not be loaded" in plain(box.children[0])


# ------------------------------------------------------------------------------------------ training
def test_another_method_keeps_what_was_typed(studio):
    tab = studio.training; tab.pictures.value = "teapot"
    tab.method.value = "pti"; assert tab.trigger.value == "<teapot>" and not tab.words_first.disabled
    tab.trigger.value, tab.steps.value, tab.preview.value, tab.rate.value = "<pot>", 7, "a <pot> at sea", .5
    for m in ("dreambooth", "pti"):
        tab.method.value = m
        assert [tab.trigger.value, tab.steps.value, tab.preview.value, tab.rate.value] == ["<pot>", 7, "a <pot> at sea", .5]


def test_corrected_photographs_are_trained_on(studio, monkeypatch):
    tab = studio.training
    tab.drop.wire.value = json.dumps(sent(("a.png", png("red", (128, 64))), ("b.png", png("green"))))
    assert len(tab.photos.found) == 2 and Path(tab.pictures.value).is_absolute()
    tab.photos.rows[0][1].value, tab.photos.rows[1][0].value = "a {trigger} flag", False
    seen = {}
    monkeypatch.setattr("lora_nb.studio.training.DreamBooth", lambda base, folder, *a, **kw: seen.update(folder=folder) or 1 / 0)
    tab.go.click()
    assert "ZeroDivisionError" in plain(tab.words) and sorted(p.name for p in seen["folder"].iterdir()) == ["000.png", "000.txt"]
    assert Image.open(seen["folder"] / "000.png").size == (64, 64) and (seen["folder"] / "000.txt").read_text() == "a {trigger} flag"
    for use, *_ in tab.photos.rows: use.value = False
    tab.go.click(); assert "no picture is left" in plain(tab.words)


def test_pivotal_tuning_from_end_to_end(studio, tmp_path):
    folder = tmp_path / "my pictures"; folder.mkdir()
    for p in sorted(data_path("subjects", "teapot").glob("*.*"))[:3]:
        if p.suffix in (".png", ".jpg"): (folder / p.name).write_bytes(p.read_bytes())
    tab = studio.training; tab.pictures.value = str(folder); tab.method.value = "pti"
    tab.noun.value, tab.steps.value, tab.words_first.value, tab.rank.value, tab.preview.value = "", 2, 2, 2, ""
    assert tab.trigger.value == "<my-pictures>"
    tab.go.click()
    assert plain(tab.words).startswith("Learned <my-pictures>"), plain(tab.words)
    strip = tab.result
    assert list(strip.lora.embeddings) == ["<my-pictures>"] and tab.log().steps == 4 and Path(strip.source).is_file()
    tab.taste.click(); assert "<my-pictures>" in studio.now.settings.prompt and studio.now.settings.loras


def test_the_studio_reads_pictures_as_training_does(tmp_path):
    "A photograph that a camera marked as lying on its side, and one of 16 bits, look the same to the studio and to a training"
    from lora_nb.pictures import open_picture
    from lora_nb.show import to_image
    from lora_nb.studio.easel import picture_of
    from lora_nb.studio.photos import Photo, prepared
    tall = Image.new("RGB", (40, 60)); tall.paste("red", (0, 0, 40, 30))
    exif = Image.Exif(); exif[0x0112] = 6
    tall.save(tmp_path / "a.jpg", exif=exif, quality=95)
    Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype("uint16")).save(tmp_path / "b.png")
    for i, name in enumerate(("a.jpg", "b.png")):
        own = open_picture(tmp_path / name)
        assert picture_of(tmp_path / name).tobytes() == own.tobytes(), name
        ready = prepared([Photo(tmp_path / name)], tmp_path / f"out{i}")
        side = min(own.size); x, y = ((v - side) // 2 for v in own.size)
        assert open_picture(ready / "000.png").tobytes() == own.crop((x, y, x + side, y + side)).tobytes(), name
    assert to_image(tmp_path / "a.jpg").size == (60, 40)


def test_settings_that_no_page_can_show(studio):
    "Half of a surrogate pair cannot be sent to a page: refused before a widget changes"
    was = studio.settings
    for s in (Settings("a \ud800 cat"), Settings("a cat", negative_prompt="\udfff")):
        with pytest.raises(DataError, match="not UTF-8"): studio.show(s)
    assert studio.settings == was


# ------------------------------------------------------------------------------------------ what A1111 made usual
def made_by(studio, code=None):
    "What the program of the picture on show draws, on the studio's base."
    base, code = studio.base, code or studio.python(studio.now.settings)
    kept = base.pipe.scheduler
    try: exec(re.sub(r"base = load_base\(.*\)\n", "", code).replace('image.save("picture.png")', ""), space := dict(base=base))
    finally: base.pipe.scheduler = kept
    return space["image"]


def replays(studio, tmp_path):
    "The program and the PNG on disk draw the same pixels."
    path = studio.save()[0]
    assert made_by(studio).tobytes() == studio.now.image.tobytes() == Image.open(path).tobytes()
    assert Easel(studio.base).draw(read_settings(path)).tobytes() == studio.now.image.tobytes()
    return read_settings(path), Image.open(path).info["parameters"]


def test_hires_fix_variation_and_clip_skip_in_the_panel_replay(studio, tmp_path):
    w = studio.ways
    w.enlarge.value, w.by.value, w.again.value, w.more.value = "redraw", 1.5, .5, 4
    w.subseed.value, w.subshare.value, w.clip.value = 8, .3, 2
    studio.go.click(); s, text = replays(studio, tmp_path)
    steps = []; Easel(studio.base).draw(s, lambda i, look: steps.append((i, look().size)))            # previews of both drawings
    assert steps == [(1, (64, 64)), (2, (64, 64)), (3, (96, 96)), (4, (96, 96))] and s.denoising_steps == 4
    assert studio.now.image.size == (96, 96) and (s.enlarge, s.enlarge_steps, s.subseed, s.clip_skip) == ("redraw", 4, 8, 2)
    for name in ("Hires upscale: 1.5", "Hires steps: 4", "Denoising strength: 0.5", "Variation seed: 8", "Variation seed strength: 0.3",
                 "Clip skip: 2"):
        assert name in text, text
    w.enlarge.value, w.subshare.value, w.clip.value = "", 0, 1; assert studio.settings == Settings(*[getattr(studio.settings, f) for f in (
        "prompt", "negative_prompt", "seed", "steps", "guidance_scale", "size", "loras", "method", "compare", "over", "base")], notation=True)
    studio.recall(0); assert studio.settings == s


def test_a_style_and_wildcards_are_in_the_picture_as_words(studio, tmp_path):
    (tmp_path / "wildcards").mkdir(); (tmp_path / "wildcards" / "colours.txt").write_text("red\nblue\n")
    studio.styles.name.value, studio.prompt.value, studio.negative.value = "ink", "{prompt}, in ink", "green"; studio.styles.keep.click()
    studio.prompt.value, studio.negative.value = "a {cat|dog} on a __colours__ background", ""
    studio.styles.style.value, studio.ways.count.value = "ink", 4
    studio.go.click()
    prompts = [e.settings.prompt for e in studio.gallery]
    assert all(re.fullmatch("a (cat|dog) on a (red|blue) background, in ink", p) for p in prompts) and len(set(prompts)) > 1, prompts
    assert {e.settings.negative_prompt for e in studio.gallery} == {"green"}
    s, _ = replays(studio, tmp_path)
    assert s.prompt == prompts[-1]
    studio.recall(0); assert studio.prompt.value == prompts[0] and studio.styles.style.value == "" and studio.negative.value == "green"
    studio.prompt.value = "a __colors__ cat"; studio.go.click()
    assert "Did you mean 'colours'" in plain(studio.words) and len(studio.gallery) == 4


def test_outpainting_in_the_panel_replays(studio, tmp_path):
    studio.go.click(); first = studio.now.image; studio.send.click()
    studio.redraw.mode.value = "Outpaint"; studio.redraw.extend.click()
    assert studio.redraw.mode.value == "Inpaint" and studio.settings.size == (128, 64) and studio.settings.strength == 1
    studio.go.click(); replays(studio, tmp_path)
    assert studio.now.image.crop((40, 0, 88, 64)).tobytes() == first.crop((8, 0, 56, 64)).tobytes()
    studio.redraw.mode.value = "txt2img"; assert not studio.settings.image and studio.redraw.image


def test_a_folder_is_drawn_over(studio, tmp_path):
    source = tmp_path / "in"; source.mkdir()
    for n in ("a", "b"): (source / f"{n}.png").write_bytes(png(n == "a" and "navy" or "red"))
    (source / "c.png").write_bytes(b"no picture")
    studio.redraw.mode.value, studio.redraw.batch.value, studio.steps.value = "Batch", str(source), 4
    studio.redraw.each.click()
    assert "2 pictures are in" in plain(studio.words) and "c.png" in plain(studio.words), plain(studio.words)
    made = sorted((tmp_path / "batch").rglob("*.png"))
    assert [p.name for p in made] == ["a.png", "b.png"] and read_settings(made[1]).image == str((source / "b.png").resolve())
    assert Easel(studio.base).draw(read_settings(made[1])).tobytes() == Image.open(made[1]).tobytes()
    studio.redraw.batch.value = str(tmp_path / "none"); studio.redraw.each.click(); assert "no folder" in plain(studio.words)


def test_png_info_reads_another_programs_picture_and_extras_enlarges_it(studio, tmp_path):
    from PIL.PngImagePlugin import PngInfo
    info = PngInfo()
    info.add_text("parameters", "a dog\nNegative prompt: red\nSteps: 3, Sampler: Euler a, CFG scale: 5, Seed: 77, Size: 64x64, Clip skip: 2")
    buffer = io.BytesIO(); Image.new("RGB", (64, 64), "navy").save(buffer, "PNG", pnginfo=info)
    studio.info.drop.wire.value = json.dumps(sent(("theirs.png", buffer.getvalue())))
    assert "Sampler: Euler a" in plain(studio.info.words) and "Steps: 3" in plain(studio.info.text)
    studio.info.draw.click(); s = studio.settings
    assert (s.prompt, s.negative_prompt, s.seed, s.steps, s.clip_skip) == ("a dog", "red", 77, 3, 2)
    studio.info.over.click(); assert studio.redraw.mode.value == "img2img"
    studio.info.drop.wire.value = json.dumps(sent(("plain.png", png())))
    assert "no settings" in plain(studio.info.words) and studio.info.draw.disabled
    studio.extras.go.click(); assert "there is no picture" in plain(studio.extras.words)
    studio.extras.drop.wire.value = json.dumps(sent(("theirs.png", buffer.getvalue()))); studio.extras.by.value = 3; studio.extras.go.click()
    with Image.open(tmp_path / "extras" / "theirs-2.png") as im: assert im.size == (192, 192) and "Steps: 3" in im.info["parameters"]


def test_a_card_loads_its_lora_and_shows_its_picture(studio, tmp_path):
    lora = tmp_path / "models" / "mine.safetensors"; lora.parent.mkdir(); find_lora("neon", studio.base)[0].save(lora)
    (lora.parent / "mine.preview.png").write_bytes(png("orange"))
    studio.shelf.folder.value = str(lora.parent)
    card = next(c for c in studio.shelf.found if c.name == "mine")
    assert card.trigger == "<neon>" and card.image().getpixel((3, 3)) == (255, 165, 0)
    studio.shelf.words.value = "mine"; studio.shelf.cards.children[0].children[0].children[1].click()
    assert studio.strips["mine"].source == str(lora) and "<neon>" in studio.prompt.value


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_every_family_has_variations_and_says_whether_it_skips_layers(family, tmp_path):
    small = as_base(random_pipe(family)); easel = Easel(small)
    Image.new("RGB", (64, 64), (9, 99, 9)).save(tmp_path / "a.png")
    for s in (Settings("a", steps=2, size=(64, 64)), Settings("a", steps=4, size=(64, 64), image=str(tmp_path / "a.png"), strength=.9)):
        own, other, vary, full = (easel.draw(x).tobytes() for x in (s, replace(s, seed=8), replace(s, subseed=8, subseed_strength=.5),
                                                                    replace(s, subseed=8, subseed_strength=1.)))
        assert vary not in (own, other) and (s.image or full == other)
        assert Easel(small).draw(replace(s, subseed=8, subseed_strength=.5)).tobytes() == vary and Easel(small).draw(s).tobytes() == own
    s = Settings("a cat", steps=2, size=(64, 64))
    if family == "flux":
        with pytest.raises(LoraError, match="reads no layer of CLIP"): easel.draw(replace(s, clip_skip=2))
    else: assert easel.draw(replace(s, clip_skip=2)).tobytes() != easel.draw(s).tobytes()
    with pytest.raises(LoraError, match="clip skip 99"): easel.draw(replace(s, clip_skip=99))


@pytest.mark.parametrize("odd", ['"enlarge_by": 99', '"enlarge_strength": 2', '"subseed_strength": -1', '"clip_skip": 0', '"enlarge": "esrgan"',
                                 '"axes": [{"what": "variation", "values": [2.0]}]', '"axes": [{"what": "clip", "values": [0]}]'])
def test_numbers_that_mean_nothing(odd):
    with pytest.raises(DataError, match="not settings"): settings_from("{%s}" % odd)
