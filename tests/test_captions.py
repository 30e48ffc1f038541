import json
from types import SimpleNamespace

import pytest
from helpers_pictures import bear, scene, tiny_blip

from lora_nb.captions import (PHOTO, blip_captions, captioner_for, captions_of, clip_captions, compose_caption,
                              edited_captions, give_captions, metadata_rows, own_caption, phrases_of, read_metadata,
                              sentence)
from lora_nb.core import DataError, data_path
from lora_nb.similarity import Clip
from lora_nb.zoo.world import PHRASES


def test_metadata(tmp_path):
    meta = tmp_path/"metadata.jsonl"
    assert metadata_rows(tmp_path) == {}
    meta.write_text('{"file_name": "sub/x.jpg", "caption": "a"}\n\n{"file_name": "y.jpg", "text": ""}\n')
    assert read_metadata(tmp_path) == {"x.jpg": "a"}
    for bad in ("not json", "{}", "[1]"):
        meta.write_text('{"file_name": "x.jpg", "text": "a"}\n\n' + bad + "\n")
        with pytest.raises(DataError, match="line 3"): read_metadata(tmp_path)
        with pytest.raises(DataError, match="line 3"): own_caption(tmp_path/"x.jpg")


def test_own_captions(tmp_path):
    file = data_path("subjects", "teddy_bear", "0.jpg")
    assert own_caption(file) == file.with_suffix(".txt").read_text().strip()
    assert own_caption(tmp_path/"a.jpg") == ""
    (tmp_path/"a.caption").write_text(" by kohya \n"); assert own_caption(tmp_path/"a.jpg") == "by kohya"
    (tmp_path/"a.txt").write_text("by hand"); assert own_caption(tmp_path/"a.jpg") == "by hand"
    (tmp_path/"metadata.jsonl").write_text('{"file_name": "a.jpg", "caption": "by line"}\n')
    assert own_caption(tmp_path/"a.jpg") == "by line"


def test_captions_of_files(tmp_path):
    (tmp_path/"a.txt").write_text("a photo of {trigger} on a wall\n")
    files = [tmp_path/"a.jpg", tmp_path/"b.jpg"]
    assert captions_of(files, "a {trigger}", "sks") == ["a photo of sks on a wall", "a sks"]
    assert captions_of(files, "{trigger}, {caption}", "sks") == ["sks, a photo of sks on a wall", "sks"]
    assert captions_of(files, "a {trigger}", "sks", own=False) == ["a sks"] * 2


@pytest.mark.parametrize("want, args", [("sks, a bear on a wall", ("a bear on a wall", "", "", "sks")), ("sks", ("", "", "", "sks")),
                                        ("", ("",)), ("b a c", ("a", "b", "c")), ("b", ("", "b,", "")), ("a, c", ("a", "", ", c"))])
def test_composing(want, args): assert compose_caption(*args) == want


def test_phrases(tmp_path):
    assert phrases_of() == phrases_of(Clip()) == json.loads(json.dumps(PHRASES))     # the file beside the bundled CLIP is fresh
    assert phrases_of("openai/clip-vit-base-patch32") is PHOTO and phrases_of(tmp_path) is PHOTO
    mine = dict(template="{what}", slots=dict(what=["{}", ["a owl", "a cat"]]))
    (tmp_path/"phrases.json").write_text(json.dumps(mine)); assert phrases_of(tmp_path) == mine
    for bad in ("{", "[]", '{"template": ""}'):
        (tmp_path/"phrases.json").write_text(bad)
        with pytest.raises(DataError, match="template"): phrases_of(tmp_path)
    assert sentence(PHRASES, dict(object="owl", background="red")) == "an owl on a red background"


def test_ranked_captions():
    clip = Clip()
    photo = clip_captions([bear()], clip, PHOTO)[0]                           # a foreign vocabulary: form only
    assert photo.count(",") == 1 and " of a" in photo, photo
    assert clip_captions([bear()], clip, look=1)[0].endswith("background")
    assert clip_captions([bear()], subject="{trigger}")[0] == clip_captions([bear()], clip, PHRASES, "{trigger}")[0]
    with pytest.raises(DataError, match="at least one"): clip_captions([], clip)


def test_blip(tmp_path):
    blip = tiny_blip(tmp_path)
    out = blip_captions([bear(), scene(), bear()], blip, device="cpu", max_new_tokens=6, batch_size=2)
    assert len(out) == 3 and out[0] == out[2]


def test_whose_caption_counts(tmp_path):
    scene().save(tmp_path/"p.png")
    s = SimpleNamespace(recaption=False, prefix="", suffix=", a photo", trigger="", captions="keep")
    (tmp_path/"a.txt").write_text("by hand")
    rows = [dict(path=str(tmp_path/f"{n}.jpg")) for n in "abc"]
    asked = []
    def captioner(images, paths): asked.extend(p.name for p in paths); return ["by a model"] * len(images)
    give_captions([(r, (tmp_path/"p.png", None)) for r in rows], s, captioner, {rows[2]["path"]: "edited"})
    assert [r["text"] for r in rows] == ["by hand, a photo", "by a model, a photo", "edited"] and asked == ["b.jpg"]
    with pytest.raises(ValueError): give_captions([(rows[1], (tmp_path/"p.png", None))], s, lambda images, paths: [], {})
    assert captioner_for(s) is None and edited_captions(tmp_path/"nowhere", dict(rows=[])) == {}


def test_a_missing_caption_leaves_no_comma(tmp_path):
    from PIL import Image
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert captions_of([tmp_path / "a.png"], "{trigger}, {caption}", "sks") == ["sks"]
