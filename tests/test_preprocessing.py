import json
import os
import time

import pytest
from helpers_pictures import bear, messy, scene, tiny_swin
from PIL import Image, ImageFilter

from lora_nb import preprocessing
from lora_nb.core import DataError, LoraError, data_path
from lora_nb.pictures import list_sources, measure, open_picture, square
from lora_nb.preprocessing import PreprocessSettings, faults, preprocess, prepare_picture, settings_for

SETTINGS = settings_for("embedded", masks="saliency", crop="salience", subject="{trigger}")
PLAIN = SETTINGS.replace(captions="keep", masks="none", crop="center")


@pytest.fixture(scope="module")
def raw(tmp_path_factory): return messy(tmp_path_factory.mktemp("messy")/"raw")


def files_of(folder):
    "All but the state, which knows when the originals were last changed"
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "preprocess.json"}


@pytest.mark.parametrize("bad, words", [
    (dict(crop="middle"), "crop"), (dict(masks="clipseg"), "mask_prompt"), (dict(zoom=.2), "salience"), (dict(copies=2), "flip"),
    (dict(sise=64), "Did you mean 'size'"), (dict(fill="reddish"), "colour"), (dict(size=4), "whole number from 8"),
    (dict(temperature=0.), "above 0"), (dict(mask_floor=2.), "0 to 1"), (dict(jitter=1.), "0 to 0.99"),
    (dict(size=32, buckets=True), "at most size")])
def test_settings_that_are_refused(bad, words):
    with pytest.raises(LoraError, match=words): settings_for(**bad)


def test_settings():
    with pytest.raises(LoraError, match="Did you mean 'photo'"): settings_for("photos")
    assert settings_for(flip=True).variations == 1 and settings_for(flip=True, copies=3).variations == 3
    assert settings_for().least_side == 256 and SETTINGS.least_side == 32 and settings_for(min_side=5).least_side == 5


def test_faults():
    look = lambda im: faults(measure(square(im, 64)), SETTINGS)
    assert look(bear()) == [] and "under" in look(bear().point(lambda v: v * .12))[0]
    assert "blurred" in look(bear().filter(ImageFilter.GaussianBlur(12)))[0]
    for f in [*data_path("subjects").glob("*/*.jpg"), *data_path("styles").glob("*/*.jpg")]:    # everything that ships passes
        assert look(open_picture(f)) == [], f


def test_a_messy_folder(raw, tmp_path):
    before, out = files_of(raw), tmp_path/"ready"
    report = preprocess(raw, out, SETTINGS)
    assert (len(report.kept), len(report.rows)) == (6, 16) and files_of(raw) == before
    by = {r["source"]: r for r in report.rows}
    assert "turned upright (EXIF)" in by["b_sideways.jpg"]["notes"] and "CMYK" in by["c_print.jpg"]["notes"]
    assert "first of 3 frames" in by["k_moving.gif"]["notes"] and "under-exposed" in str(by["i_dark.png"]["why"])
    meta = [json.loads(line) for line in (out/"metadata.jsonl").read_text().splitlines()]
    for m in meta:
        im, mask = Image.open(out/m["file_name"]), Image.open(out/m["mask"])
        assert (im.mode, im.size, m["size"], mask.mode, mask.size) == ("RGB", (64, 64), [64, 64], "L", im.size)
        l, t, r, b = m["crop"]
        assert mask.getextrema()[1] > 200 and 0 <= l < r <= m["original_size"][0] and 0 <= t < b <= m["original_size"][1]
        assert list(m)[:8] == ["file_name", "source", "text", "crop", "original_size", "size", "mask", "quality"]
    assert meta[0]["crop"][0] > 100 and not [p for p in out.iterdir() if p.name.startswith(".")]
    first = files_of(out)
    assert preprocess(raw, out, SETTINGS).changed == 0 and files_of(out) == first
    preprocess(raw, out, SETTINGS, crop="pad", copies=2, rotate=8., jitter=.1, masks="none", captions="keep")
    assert len(list(out.glob("*.png"))) == 3 * len(report.kept) and not list(out.glob("masks/*"))
    preprocess(raw, out, SETTINGS); assert files_of(out) == first


def test_nothing_is_left(raw, tmp_path):
    with pytest.raises(DataError, match="too small"): preprocess([raw/"j_dot.png"], tmp_path/"none", SETTINGS)
    assert not (tmp_path/"none").exists()


def test_folders_that_are_refused(raw, tmp_path):
    for f in list_sources(raw)[:1]:
        with pytest.raises(DataError, match="originals are never touched"): preprocess([f], raw, PLAIN)
    foreign = tmp_path/"foreign"; foreign.mkdir(); scene().save(foreign/"mine.png")
    with pytest.raises(DataError, match="mine.png"): preprocess(raw, foreign, PLAIN)
    assert [f.name for f in foreign.iterdir()] == ["mine.png"]
    (foreign/"file").write_text("")
    with pytest.raises(DataError, match="is a file"): preprocess(raw, foreign/"file", PLAIN)
    with pytest.raises(LoraError, match="nother folder"): preprocess(raw, foreign/"file"/"x", PLAIN)
    out = tmp_path/"out"; preprocess(raw, out, PLAIN)
    with pytest.raises(DataError, match="originals are never touched"): preprocess(out, out, PLAIN)


def test_work_by_hand_is_kept(raw, tmp_path):
    out = tmp_path/"out"; preprocess(raw, out, PLAIN)
    lines = (out/"metadata.jsonl").read_text().splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), "text": "by hand"}); (out/"metadata.jsonl").write_text("\n".join(lines))
    changed = preprocess(raw, out, PLAIN, suffix=", a photo")
    assert changed.kept[0]["text"] == "by hand" and changed.kept[2]["text"].endswith(", a photo")
    open_picture(out/"0001.png").rotate(90).save(out/"0001.png")
    with pytest.raises(DataError, match="0001.png"): preprocess(raw, out, PLAIN)
    assert preprocess(raw, out, PLAIN, overwrite=True).changed
    (out/"notes.md").write_text("mine"); preprocess(raw, out, PLAIN, seed=1); assert (out/"notes.md").exists()
    (out/"0000.png").unlink(); preprocess(raw, out, PLAIN, seed=1); assert (out/"0000.png").exists()
    assert preprocess(raw, out, PLAIN, seed=1).changed == 0


def test_a_run_that_is_cut_off_leaves_nothing_behind(raw, tmp_path):
    out = tmp_path/"out"; preprocess(raw, out, PLAIN); before = files_of(out)
    def crash(images, paths): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): preprocess(raw, out, PLAIN, captioner=crash, recaption=True)
    assert files_of(out) == before
    with pytest.raises(KeyboardInterrupt): preprocess(raw, tmp_path/"new", PLAIN, captioner=crash, recaption=True)
    assert not (tmp_path/"new").exists()


def test_buckets_variations_and_zoom(raw, tmp_path):
    wide = [f for f in list_sources(raw) if f.name[0] in "abcd" and f.name[1] == "_"]
    mine = dict(captioner=lambda images, paths: [f"picture {p.stem}" for p in paths],
                masker=lambda im, path: Image.new("L", im.size, 255))
    s = SETTINGS.replace(buckets=True, crop="random")
    shaped = preprocess(wide, tmp_path/"shaped", s, mask_floor=.2, trigger="sks", caption_files=True, **mine)
    assert (shaped.folder/"0000.txt").read_text() == "sks, picture a_wide\n" and shaped.kept[0]["size"] == [80, 48]
    again = preprocess(list(reversed(wide)), tmp_path/"again", s, captions="keep")
    assert [r["crop"] for r in again.kept] == [r["crop"] for r in shaped.kept] and not (again.folder/"0000.txt").exists()
    zoomed = preprocess(wide[:1], tmp_path/"zoomed", SETTINGS, zoom=.1, captions="keep").kept[0]
    assert zoomed["crop"][2] - zoomed["crop"][0] < 256, zoomed["crop"]
    alone = preprocess(wide[:1], tmp_path/"alone", SETTINGS, captions="keep", crop="pad", fill="#000", flip=True)
    lines = [json.loads(line) for line in (alone.folder/"metadata.jsonl").read_text().splitlines()]
    assert [line["mask"] for line in lines] == ["masks/0000.png", "masks/0000_1.png"] and "varied" in lines[1]


def test_small_pictures_are_enlarged_by_a_network(tmp_path, monkeypatch):
    bear().resize((40, 40)).save(tmp_path/"small.png")
    asked, swin = [], tiny_swin()
    def enlarge(images, model): asked.append(model); return preprocessing_enlarge(images, swin, "cpu")
    preprocessing_enlarge = preprocessing.enlarge
    monkeypatch.setattr(preprocessing, "enlarge", enlarge)
    row = prepare_picture(tmp_path/"small.png", PLAIN.replace(upscale="some/swin", min_sharpness=0.), None,
                          (tmp_path/"p.png", tmp_path/"m.png"), {})
    assert asked == ["some/swin"] and row["notes"] == ["enlarged 1.6x"] and Image.open(tmp_path/"p.png").size == (64, 64)
    masked = prepare_picture(tmp_path/"small.png", PLAIN.replace(min_sharpness=0.), lambda im, path: Image.new("L", im.size),
                             (tmp_path/"p.png", tmp_path/"m.png"), {})
    assert "no subject found" in masked["notes"] and not masked["mask"]


def test_originals_are_hashed_again_only_if_they_changed(tmp_path, monkeypatch):
    raw, out, hashed = tmp_path/"raw", tmp_path/"out", []
    raw.mkdir()
    for i in range(3): bear(i).save(raw/f"{i}.png")
    for f in raw.iterdir(): os.utime(f, (1e9, 1e9))
    now, sha = time.time_ns, preprocessing._sha
    monkeypatch.setattr(preprocessing.time, "time_ns", lambda: now() + 10**10)      # the files are ten seconds old
    assert preprocess(raw, out, PLAIN).changed
    monkeypatch.setattr(preprocessing, "_sha", lambda p: hashed.append(p.name if p.parent == raw else "") or sha(p))
    assert preprocess(raw, out, PLAIN).changed == 0 and hashed == []
    hashed.clear()
    a, b = (raw/"0.png").read_bytes(), (raw/"1.png").read_bytes()
    (raw/"1.png").write_bytes(a + b"\0" * max(0, len(b) - len(a))); os.utime(raw/"1.png", (1e9, 1e9))       # an older date does not hide a change
    again = preprocess(raw, out, PLAIN)
    assert again.changed and "1.png" in hashed and "2.png" not in hashed
    (raw/"0.txt").write_text("a caption"); assert preprocess(raw, out, PLAIN).changed


def test_what_is_not_read_is_said(tmp_path):
    raw = tmp_path/"raw"; (raw/"more").mkdir(parents=True)
    bear(0).save(raw/"a.png"); bear(1).save(raw/"more/b.png"); (raw/"c.docx").write_bytes(b"x")
    Image.new("L", (9, 9)).save(raw/"a.mask.png")
    report = preprocess(raw, tmp_path/"out", PLAIN)
    assert set(report.unread) == {"more/", "c.docx", "a.mask.png"}
    assert "3 files or folders not read" in repr(report) and "c.docx" in report.path.read_text()
    assert preprocess(raw, tmp_path/"out", PLAIN).unread == report.unread
    assert len(preprocess(raw, tmp_path/"deep", PLAIN, recursive=True).kept) == 2


def test_a_contact_sheet_of_many(tmp_path):
    raw = tmp_path/"raw"; raw.mkdir(); small = {}
    for i in range(6): bear(i % 5).save(raw/f"{i}.png")
    files = list_sources(raw); staged = {f: (tmp_path/f"{f.stem}.png", tmp_path/f"{f.stem}m.png") for f in files}
    rows = preprocessing._prepare_all(files, PLAIN, None, staged, small, most=2)
    assert len(rows) == 6 and len(small) == 2
    rows = [dict(r, files=[r["source"]], text="") for r in rows]
    assert preprocessing.contact_sheet(rows, {r["path"]: small.get(f, []) for r, f in zip(rows, files)}).width > 100


def test_no_name_reaches_a_terminal_as_it_is(raw, tmp_path):
    evil = "a\x1b[2J\nleft out b.png: fine"
    for n in (f"{evil}.png", f"{evil}.docx"): (raw / n).write_bytes(b"no picture")
    lines = preprocess(raw, tmp_path / "out", size=64).lines
    assert sum("left out" in l[:8] for l in lines) == len(preprocess(raw, tmp_path / "out", size=64).left_out)
    assert sum("\\x1b[2J\\nleft" in l for l in lines) == 2 and not any(c in "".join(lines) for c in "\x1b\n")


@pytest.mark.parametrize("bad", (
    dict(mask_floor=2), dict(mask_floor=float("nan")), dict(size=float("inf")), dict(size="x"), dict(size=64.5), dict(max_area=0),
    dict(rotate=400), dict(jitter=1.), dict(temperature=float("nan")), dict(min_contrast=-1),
    dict(max_darkest=256), dict(min_distance=65), dict(min_side=-1),
    dict(seed=.5), dict(flip="no"), dict(buckets=None), dict(prefix=3), dict(fill=None), dict(copies=True), dict(zoom=-1, crop="salience")))
def test_each_setting_has_a_range(bad):
    with pytest.raises(LoraError, match=f"{next(iter(bad))} = .*expected"): PreprocessSettings(**bad)
