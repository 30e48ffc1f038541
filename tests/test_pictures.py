import io
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_pictures import album, bear, broken_files, scene, tiny_swin
from PIL import Image, ImageCms

from lora_nb.core import DataError, data_path
from lora_nb.pictures import (IMAGENET_NORM, bucket_sizes, crop_box, cut, drop_duplicates, enlarge, find_pictures,
                              hash_distance, list_sources, load_pair, measure, nearest_bucket, open_picture, phash,
                              pixels_for, profile_name, read_picture, rotate, seeded, square, to_rgb, vary)


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
