import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from helpers_pictures import bear, scene, tiny_blip

from lora_nb import captions
from lora_nb.captions import (PHOTO, blip_captions, caption_notes, captioner_for, captions_of, clip_captions, compose_caption,
                              edited_captions, give_captions, metadata_rows, own_caption, own_captions,
                              phrases_of, read_metadata, read_text, row_caption,
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


FILES = {"a.txt": "ein Café für {trigger}", "a.caption": "ein Café für {trigger}",
         "metadata.csv": 'file_name,text\na.jpg,"ein Café für {trigger}"\n',
         "metadata.jsonl": '{"file_name": "a.jpg", "text": "ein Café für {trigger}"}\n', "caption.txt": "ein Café für {trigger}\n"}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252", "utf-16-le"])
def test_encodings(tmp_path, name, kind):
    (tmp_path/name).write_bytes(FILES[name].encode(kind))
    file = tmp_path/("0.src.jpg" if name == "caption.txt" else "a.jpg")
    if kind in ("cp1252", "utf-16-le"):
        with pytest.raises(DataError, match=f"{name}.*UTF-8"): own_caption(file)
    else: assert captions_of([file], "x", "sks") == ["ein Café für sks"]


def test_a_file_in_another_encoding_is_named_with_its_line(tmp_path):
    (tmp_path/"a.txt").write_bytes("one\ncafé".encode("cp1252"))
    with pytest.raises(DataError, match="a.txt, line 2.*'é'"): read_text(tmp_path/"a.txt")
    with pytest.raises(DataError, match="cannot be read"): read_text(tmp_path/"none.txt")


@pytest.mark.parametrize("row, text", [
    (dict(text="a"), "a"), (dict(caption=" a "), "a"), (dict(prompt="a"), "a"), (dict(text=5), "5"), (dict(text=["a", "b"]), "a"),
    (dict(text=[], prompt="a"), "a"), (dict(text=None, caption="a"), "a"), (dict(text=float("nan")), ""), (dict(tags=["a", "b"]), "a, b"),
    (dict(text="", tags="a, b"), "a, b"), (dict(other="a"), ""), (dict(captions=["a"]), "a")])
def test_fields_of_captions(row, text): assert row_caption(row) == text


@pytest.mark.parametrize("bad", [dict(a=1), True, [["a"]], [None]])
def test_a_caption_that_is_no_text_is_named(tmp_path, bad):
    (tmp_path/"metadata.jsonl").write_text(json.dumps(dict(file_name="a.jpg", text=bad)))
    with pytest.raises(DataError, match="a.jpg: text is"): own_caption(tmp_path/"a.jpg")


def test_tables_of_captions(tmp_path):
    csv = tmp_path/"metadata.csv"
    csv.write_text('file_name,text,original_size\na.jpg,"a bear,\nbig","[40, 30]"\nb.jpg,,\n')
    assert read_metadata(tmp_path) == {"a.jpg": "a bear,\nbig"} and metadata_rows(tmp_path)["a.jpg"]["original_size"] == [40, 30]
    csv.write_text("file_name;prompt\na.jpg;ein Bär\n", "utf-8"); assert own_caption(tmp_path/"a.jpg") == "ein Bär"
    csv.write_text("image,text\na.jpg,x\n")
    with pytest.raises(DataError, match="columns image, text"): own_caption(tmp_path/"a.jpg")
    (tmp_path/"metadata.jsonl").write_text("")
    with pytest.raises(DataError, match="both"): own_caption(tmp_path/"a.jpg")


def test_a_line_of_metadata_ends_at_its_end(tmp_path):
    (tmp_path/"metadata.jsonl").write_text(json.dumps(dict(file_name="a.jpg", text="one\u2028two"), ensure_ascii=False), "utf-8")
    assert captions_of([tmp_path/"a.jpg"], "") == ["one two"]


def test_lines_of_lora_diffusion(tmp_path):
    (tmp_path/"caption.txt").write_text("first\nsecond\n")
    files = [tmp_path/f"{i}.src.jpg" for i in (1, 0)]
    assert own_captions(files) == ["second", "first"] and own_caption(tmp_path/"7.jpg") == ""
    with pytest.raises(DataError, match="2 lines.*2.src.jpg"): own_caption(tmp_path/"2.src.jpg")


def test_metadata_is_read_once_for_many_files(tmp_path, monkeypatch):
    (tmp_path/"metadata.jsonl").write_text("".join(json.dumps(dict(file_name=f"{i}.jpg", text=str(i))) + "\n" for i in range(50)))
    parsed, loads = [], json.loads
    monkeypatch.setattr(captions.json, "loads", lambda *a: parsed.append(1) or loads(*a))
    assert own_captions([tmp_path/f"{i}.jpg" for i in range(50)]) == [str(i) for i in range(50)] and len(parsed) <= 100


def test_metadata_above_the_pictures(tmp_path):
    (tmp_path/"train").mkdir()
    (tmp_path/"metadata.jsonl").write_text('{"file_name": "train/a.jpg", "text": "up there"}\n{"file_name": "a.jpg", "text": "another"}\n')
    assert own_captions([tmp_path/"train/a.jpg", tmp_path/"a.jpg", tmp_path/"train/b.jpg"]) == ["up there", "another", ""]
    (tmp_path/"metadata.jsonl").write_text("no rows of ours")
    assert own_captions([tmp_path/"train/a.jpg"]) == [""]


def test_captions_that_are_not_used_are_said(tmp_path):
    files = [tmp_path/f"{n}.jpg" for n in "ab"]
    (tmp_path/"metadata.jsonl").write_text('{"file_name": "a.jpg", "label": 3}\n{"file_name": "c.jpg"}\n')
    for n in ("b.txt", "z.txt", "caption.txt"): (tmp_path/n).write_text("x")
    assert caption_notes(files) == ["metadata.jsonl gives no caption: it has file_name, label; captions are read from "
                                    "text, caption, prompt, captions, texts, prompts, tags",
                                    "metadata.jsonl names c.jpg, not among the pictures", "no picture for caption.txt, z.txt"]
    assert own_captions(files) == ["", "x"]


def test_endings_in_upper_case(tmp_path):
    (tmp_path/"0.TXT").write_text("a"); (tmp_path/"Metadata.JSONL").write_text('{"file_name": "1.png", "text": "b"}')
    assert own_captions([tmp_path/"0.png", tmp_path/"1.png"]) == ["a", "b"]
    assert caption_notes([tmp_path/"0.png", tmp_path/"1.png"]) == []


@pytest.mark.parametrize("name", ("captions.json", "captions.csv", "0.json", "0.tags", "metadata.json", "metadata.tsv", "train.parquet"))
def test_files_that_look_like_captions_and_are_not_read(name, tmp_path):
    (tmp_path/name).write_text("[]")
    note, = caption_notes([tmp_path/"0.png"])
    assert note.startswith(f"not read as captions: {name};")


@pytest.mark.parametrize("files, used, told", (
    ({"0.txt": "a", "0.caption": "b"}, "a", "0.png has captions that differ: that of 0.txt is used, not that of 0.caption"),
    ({"0.txt": "a", "metadata.jsonl": '{"file_name": "0.png", "text": "b"}'}, "b", "that of metadata.jsonl is used, not that of 0.txt"),
    ({"metadata.jsonl": "".join('{"file_name": "0.png", "text": "%s"}\n' % t for t in "ab")}, "b", "several lines that differ for 0.png"),
    ({"0.txt": "a", "0.caption": "a\n"}, "a", "")))
def test_two_captions_for_one_picture(files, used, told, tmp_path):
    for n, text in files.items(): (tmp_path/n).write_text(text)
    assert own_caption(tmp_path/"0.png") == used
    notes = caption_notes([tmp_path/"0.png"])
    assert told in notes[0] if told else notes == []


def test_captions_of_pictures_that_are_not_chosen_are_no_strays(tmp_path):
    for n in "abc": scene().save(tmp_path/f"{n}.png"); (tmp_path/f"{n}.txt").write_text(n)
    (tmp_path/"d.txt").write_text("its picture was deleted")
    assert caption_notes([tmp_path/"a.png"]) == ["no picture for d.txt"]


@pytest.mark.parametrize("table, notes, texts", (
    ("file_name,Text\na.png,x\n", [], ["x"]), ("File_Name , CAPTION\na.png,x\n", [], ["x"]),
    ("file_name,text,tags\na.png,,\n", ["metadata.csv gives no caption: text, tags is empty for every picture"], [""]),
    ("file_name,description\na.png,x\n", ["metadata.csv gives no caption: it has file_name, description; captions are read from text, caption, "
                                           "prompt, captions, texts, prompts, tags"], [""])))
def test_a_note_on_columns_names_those_of_the_file(table, notes, texts, tmp_path):
    (tmp_path/"metadata.csv").write_text(table)
    assert caption_notes([tmp_path/"a.png"]) == notes and own_captions([tmp_path/"a.png"]) == texts


def test_one_text_for_two_pictures_is_said(tmp_path):
    "0.jpg and 0.png both find 0.txt"
    for n in ("0.jpg", "0.png", "1.png"): Image.new("RGB", (8, 8)).save(tmp_path / n)
    for n in ("0.txt", "1.txt"): (tmp_path / n).write_text("a toy")
    files = [tmp_path / n for n in ("0.jpg", "0.png", "1.png")]
    assert caption_notes(files) == ["0.txt is the caption of 0.jpg and 0.png: to tell them apart, name theirs 0.jpg.txt, 0.png.txt"]
    assert caption_notes(files[1:]) == []
    (tmp_path / "0.txt").unlink()
    for f in files[:2]: Path(f"{f}.txt").write_text(f.name)
    assert caption_notes(files) == [] and own_captions(files) == ["0.jpg", "0.png", "a toy"]


@pytest.mark.parametrize("row", ("0.jpg,a dog, on grass", "0.jpg,a dog,,", "0.jpg,a,b,c"))
def test_a_comma_without_quotes_cuts_no_caption(row, tmp_path):
    "The words behind the comma were lost without a word"
    Image.new("RGB", (8, 8)).save(tmp_path/"0.jpg"); (tmp_path/"metadata.csv").write_text("file_name,text\n" + row + "\n")
    with pytest.raises(DataError, match="row 2: . cells for 2 columns.*double quotes"): own_caption(tmp_path/"0.jpg")
    (tmp_path/"metadata.csv").write_text('file_name,text\n0.jpg,"a dog, on grass"\n')
    assert own_caption(tmp_path/"0.jpg") == "a dog, on grass"
