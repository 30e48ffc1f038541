import json
import random

import numpy as np
import pytest
import torch
from helpers_pictures import album, scene
from PIL import Image

from lora_nb.core import DataError, LoraError
from lora_nb.dataset import (ConceptDataset, derive, drop_caption, encode, hole_for, order, order_by_size, random_hole)
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
