import json
import random
import weakref

import numpy as np
import pytest
import torch
from helpers_pictures import album, scene
from PIL import Image

from lora_nb import dataset
from lora_nb.core import DataError, LoraError
from lora_nb.dataset import (ConceptDataset, TagWording, cut_captions, derive, drop_caption, encode, hole_for, order, order_by_size,
                              random_hole, says, start_report)
from lora_nb.families import as_base
from lora_nb.pictures import find_pictures
from lora_nb.random_pipes import random_pipe


@pytest.fixture
def home(tmp_path):
    "Two scenes with masks, as preprocessing leaves them"
    folder = tmp_path/"prepared"; (folder/"masks").mkdir(parents=True)
    rows = []
    for i, (w, h) in enumerate(((96, 64), (60, 120))):
        im, name = scene(w, h), f"{i:04d}.png"
        im.save(folder/name)
        Image.fromarray((np.asarray(im)[..., 1] == 200).astype(np.uint8) * 255).save(folder/"masks"/name)
        rows.append(dict(file_name=name, source=f"IMG_{i}.jpg", text="a {trigger}", crop=[10, 20, 10 + 2*w, 20 + 2*h],
                         original_size=[300, 400], size=[w, h], mask=f"masks/{name}", quality={}))
    (folder/"metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_sources(tmp_path):
    folder = album(tmp_path/"album"); files = find_pictures(folder)
    (folder/"b_photo.txt").write_text("at night")
    assert len(ConceptDataset(folder)) == 9
    with pytest.raises(DataError, match="empty list"): ConceptDataset([])
    assert len(ConceptDataset([scene(), scene(40, 200)], size=32)) == 2
    assert ConceptDataset(files[1]).captions == ["at night"]
    assert ConceptDataset([scene()], "a {trigger}", "sks").captions == ["a sks"]
    assert ConceptDataset([str(files[0])], "a {trigger}", "sks").names == ["a_plain.png"]
    (folder/"y_empty.jpg").write_bytes(b""); (folder/"z_text.png").write_text("not a picture")
    for words in ("2 of 11 pictures", "y_empty.jpg", "z_text.png"):
        with pytest.raises(DataError, match=words): ConceptDataset(folder)


def test_masks(home, tmp_path):
    whole = ConceptDataset([scene(64, 64)], size=64)
    assert whole.ids == [[[64, 64, 0, 0, 64, 64]] * 2] and whole.masks == [None]
    assert ConceptDataset(home, masks=False).masks == [None, None]
    assert ConceptDataset(home, masks=home/"masks", size=32).masks[1].size == (32, 32)
    for masks, words in (([scene()], "1 masks for 2 pictures"), ([scene(9, 9)] * 2, "expected the same size"),
                         (album(tmp_path/"album"), "has the name of its picture")):
        with pytest.raises(DataError, match=words): ConceptDataset(home, masks=masks)
    (home/"masks"/"0001.png").unlink()
    with pytest.raises(DataError, match="cannot be read"): ConceptDataset(home)


def test_shapes_and_what_goes_with_them(home):
    shaped = ConceptDataset(home, trigger="sks", size=64, flip=True, buckets=True)
    two = encode(as_base(random_pipe("sd")), shaped)
    assert two.shapes == [(6, 10), (10, 6)] and two.pixels is None
    assert two.take([1, 1], [0, 1])[0].equal(two.latents[1]) and set(two.others([0], [1])) == {"masks"}
    assert encode(as_base(random_pipe("sd")), ConceptDataset([scene()])).masks is None
    kept = encode(as_base(random_pipe("sd_inpaint")), shaped)
    assert kept.pixels[0].shape == (2, 4, 48, 80) and kept.pixels[0][1, 3].equal(kept.pixels[0][0, 3].flip(-1))
    assert (kept.pixels[0][0, :3].permute(1, 2, 0).numpy() == np.asarray(shaped.images[0])).all()
    sdxl = as_base(random_pipe("sdxl"))
    assert encode(sdxl, shaped).ids[1, 1].tolist() == shaped.ids[1][1]
    assert encode(sdxl, ConceptDataset([scene()])).ids.shape == (1, 1, 6)


def test_walks():
    assert order(50, range(50), 0).tolist() != order(50, range(50), 1).tolist()
    assert len(order(2, range(7))) == 7                                               # a batch larger than the data set
    assert order_by_size(["a"] * 5, range(9), 4, 3).equal(order(5, range(9), 3))


def test_seeds():
    assert len({derive(s, w, i) for s in range(10) for w in "ab" for i in range(100)}) == 2000
    q = torch.tensor([torch.rand(1, generator=torch.Generator().manual_seed(derive(0, i))).item() for i in range(3000)])
    assert abs(q.mean() - .5) < .02 and torch.histc(q, 10, 0, 1).min() > 220         # neighbouring seeds do not agree


def test_holes():
    areas = [np.asarray(random_hole((64, 48), random.Random(derive(0, "hole", i)))).mean() / 255 for i in range(200)]
    assert min(areas) > .02 and 1/16 < np.mean([a == 1 for a in areas]) < 1/4 and .25 < np.mean(areas) < .6
    subject = torch.zeros(8, 8, dtype=torch.uint8); subject[2:4, 2:4] = 255
    assert hole_for(subject, "subject").sum() == 4 and hole_for(subject, "full").mean() == 1
    assert hole_for(subject, rng=random.Random(0)).shape == (1, 8, 8)
    with pytest.raises(LoraError, match="expected one of random"): hole_for(subject, "none")
    assert drop_caption("a", 0, random.Random(0)) == "a" and drop_caption("a", 1, random.Random(0)) == ""


def same(a, b): return len(a) == len(b) and all((np.asarray(x) == np.asarray(y)).all() for x, y in zip(a, b))


def test_originals_are_dropped_as_soon_as_they_are_cut(tmp_path, monkeypatch):
    for i in range(5): scene(400, 300).save(tmp_path/f"{i}.png")
    alive, read = [], dataset.read_picture
    def reading(f):
        assert sum(r() is not None for r in alive) <= 1, "an original is still in memory"
        image, facts = read(f); alive.append(weakref.ref(image))
        return image, facts
    monkeypatch.setattr(dataset, "read_picture", reading)
    assert len(ConceptDataset(tmp_path, size=32)) == len(alive) == 5


def test_pictures_beyond_the_budget_are_read_again(home):
    kept, small = (ConceptDataset(home, trigger="sks", size=64, flip=True, buckets=True, keep=k) for k in (2**29, 20_000))
    assert [im is None for im in small.images.kept] == [False, True] and small.masks.kept[1] is None
    assert same(kept.images, small.images) and same(kept.masks, small.masks) and small.images[-1].size == small.images[1].size
    base = as_base(random_pipe("sd"))
    a, b = encode(base, kept), encode(base, small)
    assert all(x.equal(y) for x, y in zip([*a.latents, *a.masks], [*b.latents, *b.masks]))
    (home/"0001.png").unlink()
    with pytest.raises(DataError, match="0001.png"): small.images[1]


def test_latents_on_disk(home, tmp_path, monkeypatch):
    base, data, folder = as_base(random_pipe("sd")), ConceptDataset(home, size=64, flip=True), tmp_path/"latents"
    first, asked, encode_images = encode(base, data, cache=folder), [], type(base).encode_images
    monkeypatch.setattr(type(base), "encode_images", lambda self, x, *a: asked.append(len(x)) or encode_images(self, x, *a))
    assert encode(base, data, cache=folder).latents.equal(first.latents) and not asked and len(list(folder.iterdir())) == 2
    assert first.latents.equal(encode(base, data).latents)
    file = next(iter(folder.iterdir())); file.write_bytes(file.read_bytes()[:50]); asked.clear()               # a damaged file is made anew
    assert torch.allclose(encode(base, data, cache=folder).latents, first.latents, atol=1e-5) and asked == [1, 1]
    asked.clear(); encode(base, ConceptDataset(home, size=64), cache=folder); assert asked == [2]                   # without mirror images
    scene(30, 30).save(home/"0000.png"); asked.clear()
    encode(base, ConceptDataset(home, size=64, flip=True, masks=False), cache=folder)      # another picture of the same name
    assert asked == [1, 1]
    next(base.vae.parameters()).data.add_(.01); asked.clear()
    assert not encode(base, data, cache=folder).latents.equal(first.latents) and asked == [2, 2]                      # another VAE


def test_layouts_of_other_programs(tmp_path):
    mask = Image.new("L", (96, 64)); mask.paste(255, (12, 16, 32, 48))
    old, one = tmp_path/"lora_diffusion", tmp_path/"onetrainer"; old.mkdir(); one.mkdir()
    for i in range(2): scene().save(old/f"{i}.src.jpg"); mask.save(old/f"{i}.mask.png"); scene().save(one/f"{i}.png")
    (old/"caption.txt").write_text("a {trigger} here\na {trigger} there\n")
    mask.resize((48, 32)).save(one/"1-masklabel.png"); (one/"0.txt").write_text("on a wall")
    a, b = ConceptDataset(old, trigger="sks"), ConceptDataset(one, "a {trigger}", "sks")
    assert a.captions == ["a sks here", "a sks there"] and a.sources.masked == [True, True] and len(a) == 2
    assert b.captions == ["on a wall", "a sks"] and b.sources.masked == [False, True] and len(b) == 2
    base = as_base(random_pipe("sd"))
    for data, i in ((a, 0), (b, 1)):                                     # the mask covers the green patch and little else
        inside = np.asarray(data.masks[i]) > 128
        assert np.asarray(data.images[i])[inside].mean(0).argmax() == 1 and encode(base, data).masks is not None
    assert ConceptDataset(one, masks=False).masks == [None, None]
    mask.resize((64, 64)).save(one/"1-masklabel.png")
    with pytest.raises(DataError, match="1.png has .*same size or shape"): ConceptDataset(one)
    assert ConceptDataset(one, masks=old.parent/"lora_diffusion").sources.masked == [True, True]


def test_pictures_in_memory_have_no_files_beside_them(tmp_path, monkeypatch):
    (tmp_path/"metadata.jsonl").write_text('{"file_name": "picture0", "text": "of somebody else"}\n')
    monkeypatch.chdir(tmp_path)
    assert ConceptDataset([scene()], "a toy").captions == ["a toy"]


def test_repeats(tmp_path):
    for n in ("10_sks dog", "20_zwx cat"): (tmp_path/n).mkdir(); scene().save(tmp_path/n/"a.png")
    (tmp_path/"20_zwx cat/b.txt").write_text("by hand"); scene(64, 64).save(tmp_path/"20_zwx cat/b.png")
    data = ConceptDataset(tmp_path, prompt=None)
    assert data.captions == ["sks dog", "zwx cat", "by hand"] and data.repeats == [1, 2, 2] and len(data) == 3
    base = as_base(random_pipe("sd")); examples = encode(base, data)
    assert examples.captions == ["sks dog", "zwx cat", "zwx cat", "by hand", "by hand"] and len(examples) == len(examples.shapes) == 5
    assert examples.take([1], [0])[0].equal(examples.take([2], [0])[0])
    assert examples.latents[1].data_ptr() == examples.latents[2].data_ptr()
    assert "seen 20 times to 40" in str(data.report(base, steps=100)) and "2 pictures count 2 times" in str(data.report(base))
    assert any("not used" in n for n in ConceptDataset(tmp_path, "a toy").sources.notes)
    assert ConceptDataset(tmp_path/"10_sks dog", None).captions == ["sks dog"]
    with pytest.raises(DataError, match="give a prompt"): ConceptDataset([scene()], None)
    sdxl = as_base(random_pipe("sdxl")); assert len(encode(sdxl, data).ids) == 5


def test_tags():
    words, caption = TagWording(keep=2, dropout=.5), "sks, dog, a, b, c, d, e"
    said = [words(caption, random.Random(i)) for i in range(400)]
    assert all(s.startswith("sks, dog") for s in said) and len(set(said)) > 100
    assert abs(np.mean([len(s.split(",")) for s in said]) - 4.5) < .3 and words(caption, random.Random(3)) == said[3]
    assert sorted(TagWording(keep=0)(caption, random.Random(0)).split(", ")) == sorted(caption.split(", "))
    assert TagWording(False)(caption, random.Random(0)) == caption
    assert [TagWording()(c, random.Random(0)) for c in ("", "a dog")] == ["", "a dog"]
    assert TagWording(dropout=1.)(caption, random.Random(0)) == "sks"
    for bad in (dict(dropout=1.5), dict(dropout=-.1), dict(keep=-1), dict(separator="")):
        with pytest.raises(LoraError, match="expected"): TagWording(**bad)


def test_a_report_says_what_is_used_and_what_is_not(tmp_path):
    base = as_base(random_pipe("sd"))
    for n, size in (("a.png", (96, 64)), ("b.png", (20, 20)), ("c.png", (64, 64))): scene(*size).save(tmp_path/n)
    (tmp_path/"a.txt").write_text("sks " + "word " * 100); (tmp_path/"b.txt").write_text("a dog"); (tmp_path/"lost.txt").write_text("x")
    (tmp_path/"d.heic").write_bytes(b"x"); (tmp_path/"e\x1b[31m.docx").write_bytes(b"x"); Image.new("L", (64, 64)).save(tmp_path/"c.mask.png")
    (tmp_path/"more").mkdir(); scene().save(tmp_path/"more/f.png")
    data = ConceptDataset(tmp_path, "a {trigger}", "sks", size=64, flip=True)
    report = data.report(base, steps=30, batch=2); text = str(report)
    for words in ("3 pictures, cut to 64x64, mirrored too", "2 of their own, 1 from the prompt; 2 of 3 say 'sks'", "masks: 1 of 3",
                  "seen 20 times", "left out: d.heic", "left out: c.mask.png (the mask of c)",
                  "more/ (a folder with 1 picture", "caption cut: a.png: tokenizer reads 77 of",
                  "no picture for lost.txt"):
        assert words in text, (words, text)
    assert report.warnings == ["pictures: 1 of 3 captions do not say 'sks': b.png", "pictures: enlarged more than twice: b.png",
                               "pictures: 1 caption is longer than a text encoder reads"]
    assert "\x1b" not in text and "\\x1b" in text
    report.more["memory"] = "4 GB"; assert "memory: 4 GB" in str(report)
    data.captions = ["a dog"] * 3
    assert "no caption says 'sks'" in str(start_report(base, dict(subject=encode(base, data)))) and start_report(base, {}).lines == []


def test_tokens_that_are_cut():
    base = as_base(random_pipe("sdxl"))
    long = "a very long story " * 40
    cut = cut_captions(base, ["short", long])
    assert list(cut) == [long] and set(cut[long]) == {"tokenizer", "tokenizer_2"}
    most, n = cut[long]["tokenizer"]
    assert most == 77 and n == len(base.pipe.tokenizer(long).input_ids)


@pytest.mark.parametrize("caption, yes", [("a photo of SKS toy", 1), ("toy, sks.", 1), ("sks", 0), ("desks toy", 0), ("", 0), ("(sks) 'toy'", 1)])
def test_captions_that_say_a_trigger(caption, yes): assert says(caption, "sks toy") == bool(yes) and says(caption, "")


@pytest.mark.parametrize("bad, match", (
    (dict(size=0), "size = 0: expected a whole number from 8"),
    (dict(size=12.5), "whole"), (dict(size="64"), "whole"), (dict(size=True), "whole"),
    (dict(buckets=[(64,)]), "buckets"), (dict(buckets=64), "buckets"), (dict(buckets=[(64, -8)]), "buckets"), (dict(buckets="x"), "buckets"),
    (dict(tags="shuffle"), "tags"), (dict(trigger=None), "texts"), (dict(prompt=3), "texts"), (dict(keep=-1), "keep")))
def test_options_that_cannot_be(bad, match):
    with pytest.raises(LoraError, match=match): ConceptDataset([scene()], **bad)


@pytest.mark.parametrize("call, match", (
    (lambda: TagWording(dropout=1.5), "dropout = 1.5: expected a number from 0 to 1"), (lambda: TagWording(keep=1.5), "keep"),
    (lambda: TagWording(dropout=float("nan")), "dropout"), (lambda: drop_caption("a", 1.5, random.Random(0)), "share"),
    (lambda: encode(None, ConceptDataset([scene()]), 0), "batch_size")))
def test_shares_and_numbers_have_a_range(call, match):
    with pytest.raises(LoraError, match=match): call()
