import io
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_pictures import album, bear, broken_files, scene, tiny_swin
from PIL import Image, ImageCms

from lora_nb.core import DataError, LoraError, data_path
from lora_nb.pictures import (IMAGENET_NORM, bucket_sizes, can_read, crop_box, cut, drop_duplicates, enlarge, find_pictures, folder_words,
                              hash_distance, list_sources, load_pair, mask_owner, masks_beside, measure, nearest_bucket, open_picture, phash,
                              pixels_for, profile_name, read_mask, read_picture, rotate, seeded, square, to_rgb, vary)


def same(a, b): return a.size == b.size and (np.asarray(a) == np.asarray(b)).all()


def test_transparent_parts():
    rgba = scene().convert("RGBA"); rgba.putalpha(0)
    assert to_rgb(rgba).getpixel((3, 3)) == (255, 255, 255)
    assert to_rgb(rgba, (0, 0, 0)).getpixel((3, 3)) == (0, 0, 0)
    palette = Image.new("P", (4, 4), 0); palette.putpalette([9, 9, 9] * 256); palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("LA", (2, 2), (0, 0))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("image, grey", [
    (Image.new("1", (2, 2), 1), 255), (Image.new("F", (2, 2), .5), 128),
    (Image.fromarray(np.full((2, 2), 65535, np.int32)), 255),
    (Image.new("I;16", (2, 2), 200), 1)], ids=["bits", "floats", "32 bits", "dark stays dark"])
def test_greys(image, grey):
    assert to_rgb(image).getpixel((0, 0)) == (grey,) * 3


def test_colour_profiles():
    odd = scene(); odd.info["icc_profile"] = b"nonsense"
    assert same(to_rgb(odd), scene()) and profile_name(odd) == ""
    odd.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert "sRGB" in profile_name(odd) and same(to_rgb(odd), scene())


def test_every_mode_reads_the_same(tmp_path):
    for f in find_pictures(album(tmp_path/"album")):
        want = scene().convert("L").convert("RGB") if "grey" in f.stem or "16bit" in f.stem else scene()
        seen = np.asarray(open_picture(f), float)
        assert seen.shape == (64, 96, 3) and np.abs(seen - np.asarray(want, float)).mean() < 8, f.name


@pytest.mark.parametrize("name, words", [("cut.jpg", "damaged"), ("text.jpg", "not a picture"), ("empty.png", "empty file"),
                                         ("phone.jpg", "HEIC"), ("bomb.png", "megapixels"), ("absent.jpg", "absent.jpg")])
def test_files_that_cannot_be_read(tmp_path, name, words):
    with pytest.raises(DataError, match=words): open_picture(broken_files(tmp_path)/name)


def test_a_file_that_is_cut_in_its_header(tmp_path):
    scene().save(tmp_path/"a.jpg"); (tmp_path/"a.jpg").write_bytes((tmp_path/"a.jpg").read_bytes()[:300])
    with pytest.raises(DataError, match="damaged"): open_picture(tmp_path/"a.jpg")


def test_large_files_are_read_small(tmp_path):
    scene(1200, 800).save(tmp_path/"large.png")
    assert read_picture(tmp_path/"large.png", at_least=100)[0].size == (150, 100)
    assert read_picture(tmp_path/"large.png", at_least=900)[0].size == (1200, 800)
    frames = [Image.new("RGB", (9, 9), c) for c in ("red", "green", "blue")]
    frames[0].save(tmp_path/"moving.gif", save_all=True, append_images=frames[1:])
    assert "first of 3 frames" in read_picture(tmp_path/"moving.gif")[1]["notes"]


def test_finding(tmp_path):
    files = sorted(broken_files(tmp_path/"broken").iterdir())
    assert list_sources(tmp_path/"broken") == files and list_sources(str(files[0])) == files[:1]
    with pytest.raises(DataError, match="empty list"): list_sources([])
    for find in (list_sources, find_pictures):
        with pytest.raises(DataError, match="No folder"): find(tmp_path/"no where")
    (tmp_path/"none").mkdir()
    with pytest.raises(DataError, match="found nothing"): list_sources(tmp_path/"none")
    for name in ("a.mask.png", ".hidden.png", "b.PNG", "c.heic"): scene().save(tmp_path/"none"/name, "PNG")
    assert [f.name for f in find_pictures(tmp_path/"none")] == ["b.PNG"]
    assert [f.name for f in list_sources(tmp_path/"none")] == ["b.PNG", "c.heic"]


@pytest.mark.parametrize("want, size, options", [
    ([16, 0, 80, 64], (96, 64), {}), ([0, -16, 96, 80], (96, 64), dict(how="pad")),
    ([0, 0, 64, 64], (96, 64), dict(how="salience", focus=(22, 32))),
    ([32, 0, 96, 64], (96, 64), dict(how="salience", focus=(90, 32))),
    ([40, 24, 56, 40], (96, 64), dict(how="salience", focus=(48, 32), extent=(16, 8))),
    ([0, 0, 1, 1], (1, 1), {}), ([0, 32, 64, 64], (64, 96), dict(aspect=2.)), ([499, 0, 500, 1], (1000, 1), {})])
def test_crop_boxes(want, size, options): assert crop_box(size, **options) == want


def test_cuts():
    boxes = [crop_box((96, 64)), crop_box((96, 64), how="pad"), crop_box((96, 64), how="random", rng=seeded(0))]
    for b in boxes: assert cut(scene(), b, (40, 40)).size == (40, 40)
    assert cut(scene().reduce(2), [0, 0, 64, 64], (32, 32), (96, 64)).getpixel((10, 15)) == (60, 200, 80)
    assert cut(Image.new("L", (96, 64), 255), boxes[1], (48, 48), fill=0).getpixel((2, 2)) == 0
    assert cut(Image.new("RGB", (1, 1), "red"), [0, 0, 1, 1], (8, 8)).getpixel((4, 4)) == (255, 0, 0)
    assert cut(Image.new("RGB", (3000, 1), "red"), crop_box((3000, 1), how="pad"), (64, 64)).size == (64, 64)
    assert square(scene(), 32).size == (32, 32)


@pytest.mark.parametrize("n, step", [(64, 8), (512, 64), (1024, 64), (512, 8)])
def test_buckets(n, step):
    buckets = bucket_sizes(n, step)
    assert (n, n) in buckets and all(w % step == h % step == 0 and w * h <= n * n for w, h in buckets)
    assert nearest_bucket((800, 800), buckets) == (n, n)
    assert max(w * h for w, h in bucket_sizes(n, step, n * n // 2)) <= n * n // 2


def test_enlarging():
    assert [im.size for im in enlarge([scene(20, 13)], tiny_swin(), "cpu")] == [(40, 26)]
    assert enlarge([], tiny_swin(), "cpu") == []


def test_variations():
    white = rotate(Image.new("RGB", (64, 40), "white"), 30)
    assert np.asarray(white).min() == 255 and white.size == (64, 40)
    image, mask, done = vary(scene(), None, np.random.default_rng(0))
    assert same(image, scene()) and mask is None and not done["flip"]
    assert vary(scene(), scene().convert("L"), np.random.default_rng(3), flip=True)[1].size == (96, 64)
    a, b = (vary(bear(), None, seeded(2), flip=True, jitter=.2, angle=15) for _ in range(2))
    assert same(a[0], b[0]) and a[2] == b[2]
    assert seeded(0, "crop", "a.jpg").integers(0, 99, 3).tolist() != seeded(0, "crop", "b.jpg").integers(0, 99, 3).tolist()


def test_hashes():
    assert hash_distance("0", "f") == 4 and len(phash(scene())) == 16
    assert phash(Image.new("RGB", (1, 1))) == phash(Image.new("RGB", (900, 5)))     # uniform: no structure, no error
    b = io.BytesIO(); bear().save(b, "JPEG", quality=25)
    assert hash_distance(phash(bear()), phash(Image.open(b))) <= 2


def test_duplicates_among_files_that_were_left_out():
    row = lambda name, why: dict(source=name, original_size=[9, 9], quality=dict(measure(bear()), hash=phash(bear())), why=why)
    rows = [row("blurred", ["blurred"]), row("a", []), row("b", [])]
    drop_duplicates(rows, 0); assert rows[2]["why"] == []                            # 0 takes everything
    drop_duplicates(rows, 1)
    assert [r["why"] == [] for r in rows] == [False, True, False] and "near-duplicate of a" in rows[2]["why"][0]


def test_pictures_for_a_network():
    x = pixels_for([Image.new("RGB", (5, 9), "white"), scene()], 16, IMAGENET_NORM)
    assert x.shape == (2, 3, 16, 16)
    torch.testing.assert_close(x[0, :, 3, 3], torch.tensor([(1 - m) / s for m, s in zip(*IMAGENET_NORM)]), atol=1e-5, rtol=0)
    model, tokenizer = load_pair("CLIPModel", data_path("clip"), "cpu")
    again = load_pair("CLIPModel", (model.train(), tokenizer), "cpu")
    assert again[0] is model and not model.training and again[1] is tokenizer
    assert Path(data_path("clip")).is_dir()


def test_every_format_that_pillow_reads_is_a_picture_and_the_rest_is_named(tmp_path):
    formats = [s for s in (".bmp", ".tiff", ".tif", ".gif", ".jfif", ".avif", ".tga", ".ppm", ".JPEG", ".png") if can_read(s)]
    assert {".bmp", ".tiff", ".gif", ".jfif"} <= set(formats)
    for i, s in enumerate(formats): scene().save(tmp_path/f"{i}{s}")
    for n in ("phone.heic", "essay.docx", "raw.CR2", ".DS_Store", "Thumbs.db", "1.txt", "metadata.jsonl", "plain"):
        (tmp_path/n).write_bytes(b"x")
    (tmp_path/"older").mkdir(); scene().save(tmp_path/"older/a.png"); (tmp_path/".ipynb_checkpoints").mkdir()
    found = find_pictures(tmp_path)
    assert [f.suffix for f in found] == formats
    assert all(np.abs(np.asarray(open_picture(f), float) - np.asarray(scene(), float)).mean() < 8 for f in found)
    want = {"essay.docx": "not a picture format", "raw.CR2": "not a picture", "plain": "without a suffix", "older/": "a folder with 1 picture"}
    if not can_read(".heic"): want["phone.heic"] = "plugin"
    assert set(found.left_out) == set(want) and all(w in found.left_out[n] for n, w in want.items())
    assert len(find_pictures(tmp_path, recursive=True)) == len(formats) + 1
    assert (tmp_path/"phone.heic" in list_sources(tmp_path)) and "phone.heic" not in list_sources(tmp_path).left_out


def test_a_folder_of_files_that_cannot_be_read_says_why(tmp_path):
    (tmp_path/".DS_Store").write_bytes(b""); (tmp_path/".ipynb_checkpoints").mkdir()
    with pytest.raises(DataError, match="found nothing"): find_pictures(tmp_path)
    (tmp_path/"a.docx").write_bytes(b""); (tmp_path/"below").mkdir(); scene().save(tmp_path/"below/a.png")
    with pytest.raises(DataError, match="recursive=True") as e: find_pictures(tmp_path)
    assert "a.docx" in str(e.value)


@pytest.mark.parametrize("name, owner", [
    ("a.mask", "a"), ("a-masklabel", "a"), ("a_mask", "a"), ("A-mask", None), ("0.mask", "0.src"), ("b.mask", ""),
    ("b-masklabel", ""), ("b_mask", None), ("mask", None), ("a", None), ("venetian mask", None)])
def test_names_of_masks(name, owner): assert mask_owner(name, {"a", "0.src", "mask"}) == owner


def test_masks_are_no_pictures(tmp_path):
    for n in ("a.jpg", "0.src.jpg", "b.png", "c.png", "mask.png"): scene().save(tmp_path/n)
    for n in ("a-masklabel.png", "0.mask.png", "b_mask.jpg", "gone.mask.png", "a-condlabel.png"): Image.new("L", (96, 64)).save(tmp_path/n)
    (tmp_path/"masks").mkdir(); Image.new("L", (96, 64)).save(tmp_path/"masks/c.png")
    found = find_pictures(tmp_path, recursive=True)
    assert [f.name for f in found] == ["0.src.jpg", "a.jpg", "b.png", "c.png", "mask.png"]
    assert [m and m.name for m in masks_beside(found)] == ["0.mask.png", "a-masklabel.png", "b_mask.jpg", "c.png", None]
    assert "without its picture" in found.left_out["gone.mask.png"] and "OneTrainer" in found.left_out["a-condlabel.png"]


def test_masks_of_every_kind():
    for m, grey in ((Image.fromarray(np.full((2, 2), 65535, np.uint16)), 255), (Image.new("1", (2, 2), 1), 255),
                    (Image.new("RGB", (2, 2), "white"), 255),
                    (Image.new("RGBA", (2, 2), (255, 255, 255, 0)), 0),
                    (Image.new("LA", (2, 2), (255, 255)), 255), (Image.new("L", (2, 2), 77), 77)):
        assert read_mask(m).getpixel((0, 0)) == grey and read_mask(m).mode == "L", m.mode


def test_folders_with_repeats(tmp_path):
    assert [folder_words(n) for n in ("10_sks dog", "0_x", "dog", "10", "_x", "2024_01_trip")] == [
        (10, "sks dog"), (1, "x"), (1, ""), (1, ""), (1, ""), (2024, "01_trip")]
    for n in ("10_sks dog", "5_zwx cat", "other"): (tmp_path/n).mkdir(); scene().save(tmp_path/n/"a.png")
    found = find_pictures(tmp_path)
    assert [f.parent.name for f in found] == ["10_sks dog", "5_zwx cat"] and list(found.left_out) == ["other/"]
    scene().save(tmp_path/"top.png")                                 # beside pictures they are subfolders like any other
    assert [f.name for f in find_pictures(tmp_path)] == ["top.png"] and len(find_pictures(tmp_path).left_out) == 3


def slow_duplicates(rows, least):
    "The definition: each picture is compared with all that were kept"
    kept = []
    for r in sorted(rows, key=lambda r: (-math.prod(r["original_size"]), -r["quality"]["sharpness"])):
        d, twin = min([(hash_distance(r["quality"]["hash"], k["quality"]["hash"]), k["source"]) for k in kept], default=(64, ""))
        if d < least: r["why"].append(f"near-duplicate of {twin} ({d} of 63 bits differ)")
        else: kept.append(r)


@pytest.mark.parametrize("least", [0, 1, 2, 5, 8, 9, 20])
def test_duplicates_are_those_of_all_pairs(least):
    rng, hashes = random.Random(least), []
    for i in range(300):
        far = rng.getrandbits(63)
        for _ in range(rng.randint(0, 12)): far = rng.choice(hashes or [far]) if rng.random() < .1 else far ^ 1 << rng.randrange(63)
        hashes.append(rng.choice(hashes) ^ 1 << rng.randrange(63) if hashes and rng.random() < .4 else far)
    make = lambda: [dict(source=f"{i}.png", original_size=(9, 9 + i % 3), quality=dict(hash=f"{h:016x}", sharpness=i % 5), why=[])
                    for i, h in enumerate(hashes)]
    fast, slow = make(), make()
    drop_duplicates(fast, least); slow_duplicates(slow, least)
    assert [r["why"] for r in fast] == [r["why"] for r in slow] and (least < 2 or any(r["why"] for r in fast))


@pytest.mark.parametrize("name", ("masks", "Masks", "MASKS", "mask", "Mask"))
def test_folders_of_masks_in_any_case(name, tmp_path):
    for i in (0, 1): Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    (tmp_path / name).mkdir()
    for n in ("0.png", "1.mask.png", "7.png"): Image.new("L", (8, 8), 255).save(tmp_path / name / n)
    for recursive in (False, True):
        found = find_pictures(tmp_path, recursive)
        assert [f.name for f in found] == ["0.png", "1.png"] and found.left_out == {f"{name}/7.png": "a mask without its picture"}
    assert [m.name for m in masks_beside(found)] == ["0.png", "1.mask.png"]


@pytest.mark.parametrize("bad", ("a" * 300, "a\0b"))
@pytest.mark.parametrize("call", (find_pictures, list_sources, open_picture, read_mask))
def test_names_that_no_file_can_have(call, bad):
    with pytest.raises(DataError, match="too long|zero byte|null byte"): call(bad)


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    def refused(self): raise PermissionError(13, "Permission denied", str(self))
    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(DataError, match="cannot be read: Permission denied"): find_pictures(tmp_path)
    with pytest.raises(DataError, match="cannot be read: Permission denied"): list_sources(tmp_path)


@pytest.mark.parametrize("call, match", (
    (lambda: square(scene(), 0), "size"), (lambda: crop_box((64, 48), 0), "aspect"),
    (lambda: crop_box((64, 48), 1., "middle"), "expected one of center"),
    (lambda: crop_box((64, 48), 1., "random"), "needs rng"), (lambda: bucket_sizes(0), "size"), (lambda: bucket_sizes(64, 1000), "step"),
    (lambda: bucket_sizes(64, 8, -1), "max_area"), (lambda: nearest_bucket((3, 4), []), "bucket"),
    (lambda: nearest_bucket((0, 4), [(8, 8)]), "picture"),
    (lambda: rotate(scene(), float("nan")), "angle"), (lambda: vary(scene(), None, seeded(0), jitter=2), "jitter"),
    (lambda: vary(scene(), None, seeded(0), angle=-5), "angle")))
def test_numbers_have_a_range(call, match):
    with pytest.raises(LoraError, match=match): call()


def test_links_that_lead_nowhere_or_back(tmp_path):
    scene().save(tmp_path / "a.png")
    (tmp_path / "sub").mkdir(); scene().save(tmp_path / "sub/b.png")
    (tmp_path / "gone.png").symlink_to("nothing.png"); (tmp_path / "sub/back").symlink_to(tmp_path)
    found = find_pictures(tmp_path, recursive=True)
    assert [f.name for f in found] == ["a.png", "b.png"]
    assert found.left_out == {"gone.png": "a link to a file that is not there", "sub/back/": "a link back to a folder around it"}
