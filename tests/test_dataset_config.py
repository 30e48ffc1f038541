"Dataset files of kohya's scripts: every key is honoured, refused by name, or noted."
import json
import random

import pytest
import torch
from helpers_pictures import scene
from PIL import Image

from lora_nb.core import DataError, LoraError
from lora_nb.dataset import TagWording
from lora_nb.dataset_config import (KEYS, Rule, Said, by_own_rule, config_examples, joined_examples, load_dataset_config, subset_data,
                                    subset_pictures, subset_sizes)
from lora_nb.dreambooth import DreamBooth, train_dreambooth
from lora_nb.families import as_base
from lora_nb.random_pipes import random_pipe


@pytest.fixture(scope="module")
def sd(): return as_base(random_pipe("sd"))


@pytest.fixture
def write(tmp_path):
    for folder, n in (("a", 3), ("b", 2), ("reg", 2)):
        (tmp_path / folder).mkdir()
        for i in range(n): scene(64 + 8 * i, 64).save(tmp_path / folder / f"{i}.png")

    def one(subset="", dataset="", general="", more="", name="data.toml"):
        text = (f'[general]\n{general}\n[[datasets]]\nresolution = 64\n{dataset}\n'
                f'[[datasets.subsets]]\nimage_dir = "a"\nclass_tokens = "sks toy"\n{subset}\n')
        (tmp_path / name).write_text(text + more)
        return tmp_path / name
    return one


def test_lower_places_win(write):
    file = write(general="num_repeats = 2\nkeep_tokens = 1\nshuffle_caption = true", dataset="num_repeats = 3", subset="keep_tokens = 2",
                 more='[[datasets.subsets]]\nimage_dir = "b"\nclass_tokens = "sks toy"\n')
    a, b = load_dataset_config(file).subsets
    assert [s.options["num_repeats"] for s in (a, b)] == [3, 3] and [s.options["keep_tokens"] for s in (a, b)] == [2, 1]
    assert a.folder == file.parent / "a"                                      # beside the file


REFUSED = [k for k, key in KEYS.items() if key.instead]


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_without_a_counterpart_is_refused_by_name_if_it_asks_for_something(key, write):
    asks = {bool: "true", str: '"x"', int: "2", list: "[1.0, 3.0]"}[KEYS[key].kind[0]]
    with pytest.raises(DataError, match=f"{key} = .*no counterpart here. {KEYS[key].instead[:12]}"):
        load_dataset_config(write(f"{key} = {asks}"))
    if KEYS[key].usual is not None: load_dataset_config(write(f"{key} = {json.dumps(KEYS[key].usual)}"))


@pytest.mark.parametrize("places, match", (
    (dict(subset="num_repeat = 2"), "Did you mean 'num_repeats'"), (dict(subset="batch_size = 2"), r"subset 1: batch_size = 2: this key belongs"),
    (dict(general='image_dir = "a"'), r"\[general\]: image_dir.*belongs into \[\[datasets.subsets"),
    (dict(subset="num_repeats = 0"), "expected 1 to"),
    (dict(subset="num_repeats = true"), "expected a whole number"), (dict(subset='num_repeats = "3"'), "expected a whole number"),
    (dict(subset="caption_dropout_rate = 1.5"), "expected 0 to 1"), (dict(subset="keep_tokens = -1"), "expected 0 to"),
    (dict(subset="caption_tag_dropout_rate = nan"), "expected 0 to 1"), (dict(dataset="resolution = 64"), "cannot be read as TOML"),
    (dict(general="resolution = [64]"), "expected pixels"),
    (dict(dataset="min_bucket_reso = 512\nmax_bucket_reso = 64"), "above max_bucket_reso"),
    (dict(subset="is_reg = true"), "to learn from"), (dict(more='[[datasets.subsets]]\nimage_dir = "zzz"\n'), "there is no folder .*zzz"),
    (dict(more='[[datasets.subsets]]\nclass_tokens = "x"\n'), "subset 2: expected an image_dir"),
    (dict(more='[[datasets.subsets]]\nimage_dir = "a"\n'), "is subset 1, too"),
    (dict(more='[[datasets.subsets]]\nimage_dir = "b"\nmetadata_file = "m.json"\n'), "in all of its subsets, or in none"),
    (dict(more="[[datasets]]\nresolution = 64\n"), r"datasets 2 has no \[\[datasets.subsets"),
    (dict(more="[models]\nx = 1\n"), "has models: expected"),
    (dict(dataset="batch_size = 2", more='[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "b"\n'), "batch_size is 2, None")))
def test_mistakes_are_named_with_their_place(places, match, write):
    with pytest.raises(DataError, match=match): load_dataset_config(write(**places))


@pytest.mark.parametrize("name, text", (
    ("a.toml", "x = ["), ("a.json", "{"), ("a.toml", "datasets = 3"), ("a.json", '{"datasets": [3]}'), ("a.toml", "")))
def test_files_that_are_none(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError): load_dataset_config(tmp_path / name)
    with pytest.raises(DataError, match="cannot be read"): load_dataset_config(tmp_path / "missing.toml")


def test_json_is_read_too(write, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(dict(datasets=[dict(resolution=64, subsets=[dict(image_dir="a", class_tokens="sks toy")])])))
    assert load_dataset_config(tmp_path / "c.json").words == load_dataset_config(write()).words == ["sks toy"]


def test_captions(write, tmp_path):
    for name, text in (("0.txt", "first line\nsecond line"), ("1.cap", "by extension"), ("2.caption", "c")):
        (tmp_path / "a" / name).write_text(text)
    said = lambda **kw: subset_data(load_dataset_config(write(**kw)).subsets[0]).captions
    assert said() == ["first line", "sks toy", "c"] and said(subset='caption_extension = ".cap"') == ["sks toy", "by extension", "sks toy"]
    assert said(subset='caption_prefix = "best,"\ncaption_suffix = ", from side"')[1] == "best, sks toy , from side"
    (tmp_path / "a/0.txt").write_text("{trigger} on a table")
    data = subset_data(load_dataset_config(write()).subsets[0], trigger="sks toy")
    assert data.captions[0] == "sks toy on a table" and data.sources.own == [True, False, True]
    file = write(); file.write_text(file.read_text().replace('class_tokens = "sks toy"', ""))
    with pytest.raises(DataError, match="no caption for 1.png"): subset_data(load_dataset_config(file).subsets[0])


def test_a_metadata_file(write, tmp_path):
    rows = {"0": dict(caption="a cat", tags="cat, sofa"), str(tmp_path / "b/1.png"): dict(tags="dog"), "gone": dict(caption="x"), "2": {}}
    (tmp_path / "m.json").write_text(json.dumps(rows))
    s = load_dataset_config(write('metadata_file = "m.json"')).subsets[0]
    found, said = subset_pictures(s)
    assert [f.name for f in found] == ["0.png", "1.png", "2.png"] and said == ["a cat, cat, sofa", "dog", ""] and list(found.left_out) == ["gone"]
    (tmp_path / "m.json").write_text("[1]")
    with pytest.raises(DataError, match="expected an object"): subset_pictures(s)


def test_rewording_is_by_subset(write, sd):
    rule = Rule(TagWording(shuffle=True, keep=1))
    assert {by_own_rule(Said("a, b, c", rule), random.Random(i)) for i in range(20)} == {"a, b, c", "a, c, b"}
    assert by_own_rule("a, b, c", random.Random(0)) == "a, b, c"
    drops = Said("a, b", Rule(dropout=.5))
    assert 20 < sum(by_own_rule(drops, random.Random(i)) == "" for i in range(80)) < 60
    file = write("shuffle_caption = true", more='[[datasets.subsets]]\nimage_dir = "b"\nclass_tokens = "x, y, z"\ncaption_dropout_rate = 1.0\n')
    examples = config_examples(sd, load_dataset_config(file))
    assert [examples.wording(c, random.Random(0)) for c in examples.captions] == ["sks toy"] * 3 + [""] * 2


def test_repeats_shapes_flips_and_masks_join(write, sd, tmp_path):
    Image.new("L", (64, 64), 0).save(tmp_path / "a/0.mask.png")
    file = write("num_repeats = 6\nflip_aug = true", general="enable_bucket = true\nmin_bucket_reso = 32\nbucket_reso_steps = 16",
                 more='[[datasets.subsets]]\nimage_dir = "b"\nclass_tokens = "x"\nnum_repeats = 4\n')
    examples = config_examples(sd, load_dataset_config(file))
    assert examples.sources.repeats == [3] * 3 + [2] * 2 and len(examples) == len(examples.prints) == 13 and examples.sources.flip
    assert [z.shape[0] for z in examples.latents] == [2] * 9 + [1] * 4 and len(examples.masks) == 13
    assert examples.masks[0].max() == 0 and examples.masks[-1].min() == 1 and sum(examples.sources.masked) == 1
    z, _ = examples.take([0, 12], [1, 1])
    assert z[1].equal(examples.latents[12][0])


def test_sizes_that_sdxl_is_told_follow_the_side(write):
    base = as_base(random_pipe("sdxl"))
    file = write("flip_aug = true", more='[[datasets.subsets]]\nimage_dir = "b"\nclass_tokens = "x"\n')
    examples = config_examples(base, load_dataset_config(file))
    ids = examples.others([0, 3], [1, 1])["ids"]
    assert examples.ids.shape == (5, 2, 6) and ids[1].equal(examples.ids[3, 0])


@pytest.mark.parametrize("options, sizes", (
    ("", [(64, 64)]),
    ("enable_bucket = true\nmin_bucket_reso = 32\nmax_bucket_reso = 128\nbucket_reso_steps = 32",
     [(32, 96), (32, 128), (64, 64), (96, 32), (128, 32)])))
def test_shapes(options, sizes, write): assert subset_sizes(load_dataset_config(write(dataset=options)).subsets[0], 512) == sizes


def test_impossible_shapes(write):
    for options, match in (("enable_bucket = true\nbucket_reso_steps = 128", "no shape"),
                           ("enable_bucket = true\nmin_bucket_reso = 30\nbucket_reso_steps = 9", "multiples of 8")):
        with pytest.raises(DataError, match=match): subset_sizes(load_dataset_config(write(dataset=options)).subsets[0], 64)


def test_small_pictures_are_skipped_on_request_and_named(write):
    data = subset_data(load_dataset_config(write(dataset="skip_image_resolution = 64")).subsets[0])
    assert data.names == ["1.png", "2.png"] and data.sources.left_out == {"0.png": "64 x 64: not larger than skip_image_resolution"}
    with pytest.raises(DataError, match="no picture is larger"):
        subset_data(load_dataset_config(write(dataset="skip_image_resolution = 640")).subsets[0])


def test_what_is_read_otherwise_is_noted_in_the_report(write, sd):
    config = load_dataset_config(write("cache_info = true", dataset="bucket_no_upscale = true"))
    assert [n.split(" (")[0] for n in config.notes] == ["bucket_no_upscale", "cache_info"]
    assert config_examples(sd, config).sources.notes[:2] == config.notes


def test_joined_examples_of_one_are_the_same(write, sd):
    one = config_examples(sd, load_dataset_config(write()))
    again = joined_examples([one])
    assert torch.stack(again.latents).equal(torch.stack(one.latents)) and again.captions == one.captions


REG = '[[datasets.subsets]]\nis_reg = true\nimage_dir = "reg"\nclass_tokens = "toy"\nnum_repeats = 2\n'


def test_a_training_by_a_file(write, sd):
    file = write(dataset="batch_size = 3", more=REG)
    run = DreamBooth(sd, dataset_config=file, steps=2, rank=2, prior_batch=1)
    assert [(s.name, s.batch, len(s.examples)) for s in run.streams] == [("subject", 3, 3), ("prior", 1, 2)] and run.prior == "images"
    assert "say 'sks toy'" in str(run.start_report())
    lora = run.fit()
    assert lora.metadata["trigger"] == "sks toy" and lora.metadata["class_prompt"] == '"toy"' and '"batch_size": 3' in lora.metadata["recipe"]
    assert max(f.norm() for f in lora.layers.values()) > 0


def test_a_prior_beside_a_file_may_be_drawn_or_left_out(write, sd):
    quick = dict(steps=1, rank=1, num_class_images=2, sampling=dict(steps=1))
    run = DreamBooth(sd, dataset_config=write(), class_prompt="a toy", **quick); run.remove()
    assert [s.name for s in run.streams] == ["subject", "prior"] and run.streams[1].examples.captions == ["a toy"] * 2
    run = DreamBooth(sd, dataset_config=write(more=REG), prior=None, **quick); run.remove()
    assert [s.name for s in run.streams] == ["subject"]


@pytest.mark.parametrize("more, kw, match", (
    ("", dict(instance_data="x"), "dataset_config and instance_data"), ("", dict(recursive=True), "recursive"), ("", dict(masks=False), "masks"),
    (REG, dict(class_prompt="a toy"), "say it twice"), (REG, dict(prior="prediction"), "is_reg"),
    ("", dict(prior="images"), "needs a class prompt"),
    (REG + "caption_dropout_rate = 0.1\n", dict(caption_dropout=.1), "give one of them")))
def test_what_the_file_says_is_not_said_twice(more, kw, match, write, sd):
    with pytest.raises(LoraError, match=match): train_dreambooth(sd, dataset_config=write(more=more), **kw)


def test_words_that_are_named_nowhere(write, sd, tmp_path):
    for i in range(3): (tmp_path / f"a/{i}.txt").write_text("ohwx bear")
    file = write(); file.write_text(file.read_text().replace('class_tokens = "sks toy"', ""))
    with pytest.raises(LoraError, match="has no class_tokens"): train_dreambooth(sd, dataset_config=file)
    run = DreamBooth(sd, dataset_config=file, instance_prompt="a photo of ohwx bear", steps=1, rank=1); run.remove()
    assert run.concepts[0].trigger == "ohwx bear"
    with pytest.raises(LoraError, match="No instance_data"): train_dreambooth(sd)
