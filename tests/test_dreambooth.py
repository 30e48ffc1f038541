import json, warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_nb.core import DataError, LoraError
from lora_nb.dreambooth import (Concept, DreamBooth, check_prior, class_noun, class_pictures, concept_streams, load_concepts,
                                swapped, train_dreambooth, trigger_of)
from lora_nb.similarity import to_tensor
from lora_nb.evaluation import wearing
from lora_nb.families import as_base
from lora_nb.random_pipes import random_pipe
from lora_nb.recipe import recipe_for

NOISE = [Image.effect_noise((70, 50), 60 + i) for i in range(2)]
QUICK = dict(steps=2, batch_size=2, prior_batch=1, rank=2)
FEW = dict(num_class_images=2, sampling=dict(steps=1))


@pytest.fixture(scope="module")
def sd(): return as_base(random_pipe("sd"))


@pytest.mark.parametrize("prompt, trigger", (("a sks toy", "sks toy"), ("A photo of the sks dog", "sks dog"), ("sks", "sks"),
                                             ("picture of my xyz cat", "xyz cat"), ("  the one  ", "one")))
def test_the_words_that_name_a_subject(prompt, trigger): assert trigger_of(prompt) == trigger


def test_folders_that_hold_no_class_pictures(sd, tmp_path):
    (tmp_path / "note").write_text("x")
    with pytest.raises(DataError, match="expected a folder"): class_pictures(sd, "a toy", folder=tmp_path / "note")
    with pytest.raises(DataError, match="No pictures"): class_pictures(sd, "a toy", folder=tmp_path)


@pytest.mark.parametrize("text, match", (("{", "cannot be read"), ("[]", "no list"), ("{}", "no list"),
                                         ('[{"instance_prompt": 1}]', "no instance_data")))
def test_lists_of_concepts_that_are_none(tmp_path, text, match):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(DataError, match=match): load_concepts(tmp_path / "c.json")
    with pytest.raises(DataError, match="cannot be read"): load_concepts(tmp_path / "nowhere.json")


def test_concepts_of_a_class_share_its_pictures(sd):
    toys = [Concept([Image.new("RGB", (64, 64))], f"a {w} toy", "a toy") for w in ("sks", "zwx")]
    recipe = recipe_for(sd, batch_size=8, prior_batch=4)
    made = concept_streams(sd, toys, "images", recipe, n=2, sampling=dict(steps=1))
    assert [(s.name, s.batch, s.weight) for s in made] == [
        ("subject: sks toy", 4, .5), ("subject: zwx toy", 4, .5), ("prior: sks toy", 4, 1.)]
    toys[1].class_prompt = None
    assert [s.name for s in concept_streams(sd, toys, "prediction", recipe)][2:] == ["prior: sks toy"]


def losses(base, folder, prior, batch):
    "Losses by stream of the first batches of a run whose LoRA answers something"
    kw = dict(QUICK, batch_size=batch, prior_batch=batch)
    pictures = [Image.effect_noise((64, 64), 40 + 20 * i) for i in range(3)]
    kept = [folder / f"noise-{i}.png" for i in range(3)]
    for im, path in zip(pictures, kept):
        if not path.exists(): im.save(path)
    run = DreamBooth(base, kept, "a sks toy", "a toy", folder / "toys" if prior == "images" else None, prior, **kw, **FEW)
    for m in run.worn.layers.values(): torch.nn.init.constant_(m.lora_up.weight, .03)
    found = [{n: v.item() for n, v in run.trainer.loss(i)[1].items()} for i in range(max(1, 6 // batch))]
    run.remove()
    return found


@pytest.mark.parametrize("prior", ("images", "prediction"))
@pytest.mark.parametrize("family", ("sd3", "sdxl"))
def test_a_batch_is_the_mean_of_its_samples(family, prior, tmp_path):
    base = as_base(random_pipe(family))
    single = losses(base, tmp_path, prior, 1)
    for batch in (2, 5):
        first = losses(base, tmp_path, prior, batch)[0]
        for n in ("subject", "prior"): assert abs(first[n] - sum(p[n] for p in single[:batch]) / batch) < 1e-5
    assert all(p["prior"] > 1e-9 for p in single)


def test_text_encoders_that_learn():
    for family in ("sdxl", "sd3"):
        lora = train_dreambooth(as_base(random_pipe(family)), NOISE, "a sks toy", prior=None, train_text_encoder=True, **QUICK)
        assert [c for c in lora.components if c.startswith("text")] == ["text_encoder", "text_encoder_2"]     # never T5 by itself
    every = train_dreambooth(as_base(random_pipe("sd3")), NOISE, "a sks toy", prior=None, train_text_encoder=True, encoders="all", **QUICK)
    assert "text_encoder_3" in every.components


@pytest.mark.parametrize("family", ("sd", "sd3"))
def test_plain_diffusers_draws_the_same(family, tmp_path):
    base, ask = as_base(random_pipe(family)), dict(prompts="a sks toy", seeds=[3], steps=2)
    lora = train_dreambooth(base, NOISE, "a sks toy", prior=None, **{**QUICK, "steps": 3, "learning_rate": .02})
    lora.save(tmp_path / "l.safetensors")
    before = to_tensor(base.generate(**ask)[0])
    with wearing(base, lora): ours = to_tensor(base.generate(**ask)[0])
    plain = as_base(random_pipe(family))
    plain.pipe.load_lora_weights(str(tmp_path / "l.safetensors"))
    assert (ours - before).abs().max() > .03, "the LoRA changed nothing"
    assert (ours - to_tensor(plain.generate(**ask)[0])).abs().max() <= .03


@pytest.mark.parametrize("prior", ("images", "prediction"))
def test_shapes_masks_and_holes_in_one_run(prior):
    fill = as_base(random_pipe("sd_inpaint"))
    wide = [Image.effect_noise((80, 48), 60), Image.effect_noise((48, 80), 60)]
    run = DreamBooth(fill, wide, "a sks toy", "a toy", prior=prior, buckets=True, masks=[Image.new("L", im.size, 255) for im in wide],
                     mask_floor=.1, flip=True, caption_dropout=.5, held_back=NOISE, validate_every=1, validation_samples=2, **QUICK, **FEW)
    lora = run.fit()
    assert max(f.norm() for f in lora.layers.values()) > 0 and set(run.log.val) == {"subject", "prior"}
    assert len(run.streams[0].examples.latents[0]) == 2


@pytest.mark.parametrize("data, kw, match", (
    ([Concept(NOISE, "a sks toy")] * 2, {}, "triggers of their own"),
    ([Concept(NOISE, "a sks toy")], dict(instance_prompt="a sks toy"), "bring their own instance"),
    (NOISE, {}, "No instance_prompt"),
    (NOISE, dict(instance_prompt="a sks toy", rank=999), "999"),
    (NOISE, dict(instance_prompt="a sks toy", targets=["no_such_layer"]), "no_such_layer")))
def test_runs_that_cannot_begin(sd, data, kw, match):
    with pytest.raises(LoraError, match=match): DreamBooth(sd, data, **kw)
    assert not [m for m in sd.denoiser.modules() if hasattr(m, "lora_up")], "a refused run left branches behind"


def test_pictures_that_are_none(sd, tmp_path):
    with pytest.raises(DataError, match="No pictures"): train_dreambooth(sd, tmp_path, "a sks toy")
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="a.png"): train_dreambooth(sd, tmp_path, "a sks toy")


def test_kinds_of_prior():
    assert check_prior("auto", "a toy") == "images" and check_prior("auto", None) is None and check_prior(None, "a toy") is None
    with pytest.raises(LoraError, match="class prompt"): check_prior("prediction", None)
    with pytest.raises(LoraError, match="expected 'images'"): check_prior("both", "a toy")


def test_a_folder_beside_the_list(tmp_path):
    (tmp_path / "bear").mkdir()
    row = dict(instance_prompt="a sks toy", instance_data_dir="bear", class_data_dir="toys", class_prompt="a toy")
    (tmp_path / "c.json").write_text(json.dumps([row]))
    (concept,) = load_concepts(tmp_path / "c.json")
    assert Path(concept.data) == tmp_path / "bear" and concept.class_data == "toys" and concept.trigger == "sks toy"


def test_a_class_picture_that_was_deleted_is_drawn_again(sd, tmp_path):
    how = dict(folder=tmp_path, steps=1)
    files, _ = class_pictures(sd, ["a toy", "an animal"], n=4, **how)
    before = {f.name: f.read_bytes() for f in files}
    files[1].unlink()
    again, captions = class_pictures(sd, ["a toy", "an animal"], n=4, **how)
    assert {f.name: f.read_bytes() for f in again} == before and len(set(again)) == 4
    assert sorted(captions) == ["a toy", "a toy", "an animal", "an animal"]


@pytest.mark.parametrize("caption, trigger, noun, expected", (
    ("a photo of a sks toy at night", "sks toy", "toy", "a photo of a toy at night"), ("A Sks Toy, red", "sks toy", "toy", "A toy, red"),
    ("sks, sitting", "sks toy", "toy", "toy, sitting"), ("a sks plush toy", "sks toy", "toy", "a toy plush toy"),
    ("desks and a sks", "sks", "toy", "desks and a toy"), ("a <s1> <s2> toy", "<s1> <s2> toy", "toy", "a toy"),
    ("a <s1> on grass", "<s1> toy", "toy", "a toy on grass"), ("a wall", "sks toy", "toy", "a wall"),
    ("sks toys on a table", "sks toy", "toy", "toys on a table"), ("a sks-toy", "sks toy", "toy", "a toy"),
    ("a <w> toy at night", "<w>", "toy", "a toy at night"), ("SKS toys, a sks", "sks", "toy", "toys, a toy"),
    ("a <a> <b> toy, <a>", "<a> <b>", "toy", "a toy, toy"), ("a sks toyshop", "sks toy", "toy", "a toy toyshop")))
def test_the_subject_s_words_become_those_of_the_class(caption, trigger, noun, expected): assert swapped(caption, trigger, noun) == expected


def test_the_base_s_predictions_follow_each_caption(sd, tmp_path):
    "The teacher sees what the student sees, with the class in the subject's place"
    for i, text in enumerate(("a sks wall at night", "a {trigger} in the rain", "")):
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"{i}.png")
        if text: (tmp_path / f"{i}.txt").write_text(text)
    run = DreamBooth(sd, tmp_path, "a sks wall", ["a wall", "a photo of a wall", "a painted wall"], prior="prediction", rank=2, batch_size=1)
    subject, prior = run.streams
    assert subject.examples.captions == ["a sks wall at night", "a sks wall in the rain", "a sks wall"]
    assert prior.examples.captions == ["a wall at night", "a wall in the rain", "a painted wall"] and prior.teacher
    run.remove()


def test_a_trigger_that_no_caption_says_is_warned_of(sd, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "0.png"); (tmp_path / "0.txt").write_text("a red wall")
    with pytest.warns(UserWarning, match="No caption of the subject says 'sks wall' .0.png: 'a red wall'"):
        DreamBooth(sd, tmp_path, "a sks wall", rank=2, batch_size=1).remove()


@pytest.mark.parametrize("before, warned", ((90, True), (3, False)))
def test_a_trigger_beyond_what_is_read_is_warned_of(sd, before, warned, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "0.png"); (tmp_path / "0.txt").write_text("red " * before + "sks wall" + " red" * 90)
    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter("always")
        DreamBooth(sd, tmp_path, "a sks wall", rank=2, batch_size=1).remove()
    assert any("'sks wall' only beyond what the text encoder reads" in str(w.message) for w in got) == warned


@pytest.mark.parametrize("left", (".DS_Store", ".ipynb_checkpoints/", "Thumbs.db", "class-0000.txt"))
def test_a_class_folder_with_no_pictures_but_traces_of_a_system(sd, left, tmp_path):
    (tmp_path / left).mkdir() if left.endswith("/") else (tmp_path / left).write_text("a wall")
    made, captions = class_pictures(sd, "a wall", 1, tmp_path, steps=1)
    assert [f.name for f in made] == ["class-0000.png"] and captions == ["a wall"]


def test_class_pictures_take_free_names_until_there_are_enough(sd, tmp_path):
    how = dict(folder=tmp_path, steps=1)
    (tmp_path / ".DS_Store").write_bytes(b"x"); (tmp_path / ".ipynb_checkpoints").mkdir()          # no class pictures, no reason to refuse
    files, _ = class_pictures(sd, "a toy", n=6, **how)
    assert len(files) == 6
    for f in (files[0], files[3]): f.unlink()
    mine = tmp_path / "class-0003.jpg"; Image.new("RGB", (64, 64), "red").save(mine); mine.with_suffix(".txt").write_text("mine")
    kept = {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file() and f.stem not in ("class-0000",)}
    again, captions = class_pictures(sd, "a toy", n=6, **how)
    assert len(set(again)) == 6 and all((tmp_path / n).read_bytes() == b for n, b in kept.items()), "a good picture was overwritten"
    assert [c for f, c in zip(again, captions) if f == mine] == ["mine"] and set(captions) == {"mine", "a toy"}
    for f in again: f.unlink()                                          # only captions are left: the folder is empty
    assert len(class_pictures(sd, "a toy", n=2, **how)[0]) == 2


@pytest.mark.parametrize("kind", ["utf-8-sig", "utf-16", "cp1252"])
def test_lists_of_concepts_in_other_encodings(tmp_path, kind):
    (tmp_path / "c.json").write_bytes(json.dumps([dict(instance_prompt="ein Bär", instance_data_dir="x")], ensure_ascii=False).encode(kind))
    if kind != "cp1252": assert load_concepts(tmp_path / "c.json")[0].prompt == "ein Bär"
    else:
        with pytest.raises(DataError, match="c.json.*UTF-8"): load_concepts(tmp_path / "c.json")


@pytest.mark.parametrize("rates", (dict(learning_rate=0.), dict(layer_rates={"unet": 0.}),
                                   dict(learning_rate=0., train_text_encoder=True, text_learning_rate=0.)))
def test_rates_with_which_nothing_is_learned(sd, rates):
    with pytest.raises(LoraError, match="Nothing would be learned"):
        train_dreambooth(sd, NOISE, "a sks toy", rank=2, steps=1, batch_size=1, **rates)


@pytest.mark.parametrize("prompt", ("   ", "a photo of a", "the"))
def test_a_prompt_without_a_subject(sd, prompt):
    with pytest.raises(LoraError, match="names no subject|No instance_prompt"): train_dreambooth(sd, NOISE, prompt, steps=1, rank=1)


def test_a_class_that_has_the_subject_s_words_is_warned_of():
    with pytest.warns(UserWarning, match="says 'sks toy', the subject's own words"): Concept("x", "a sks toy", ["a toy", "a sks toy"])


@pytest.mark.parametrize("prompts, trigger, noun", (
    (["a face"], "sks face", "face"), (["a face on a red background", "a face on a blue background"], "sks face", "face"),
    (["a toy on a shelf", "a toy on a bed"], "sks", "toy"), (["a photo of a wooden toy"], "sks", "wooden toy"),
    (["a cat", "a dog"], "sks", "cat"),
    (["a plush toy in snow"], "sks plush toy", "plush toy")))
def test_the_noun_of_class_prompts(prompts, trigger, noun): assert class_noun(prompts, trigger) == noun


@pytest.mark.parametrize("args, kw, match", (
    (("a toy", 0), {}, "n = 0"), (("a toy", 1.5), {}, "n = 1.5"), (("a toy", 1), dict(batch_size=0), "batch_size"),
    (([], 1), {}, "Class prompts"), (([" "], 1), {}, "Class prompts")))
def test_class_pictures_that_cannot_be_drawn(sd, args, kw, match):
    with pytest.raises(LoraError, match=match): class_pictures(sd, *args, **kw)


def test_a_caption_of_somebody_s_own_is_not_replaced(sd, tmp_path):
    "A caption whose picture was deleted keeps its words: the picture takes another number"
    how = dict(folder=tmp_path, steps=1)
    files, _ = class_pictures(sd, "a toy", n=2, **how)
    files[1].unlink(); files[1].with_suffix(".txt").write_text("a toy of my own")
    again, captions = class_pictures(sd, "a toy", n=2, **how)
    assert [f.name for f in again] == ["class-0000.png", "class-0002.png"] and captions == ["a toy"] * 2
    assert files[1].with_suffix(".txt").read_text() == "a toy of my own"


@pytest.mark.parametrize("left", ("README.md", "class-0000.npz", "class-0000.caption", "empty/"))
def test_a_class_folder_with_traces_of_other_programs(sd, left, tmp_path):
    (tmp_path / left).mkdir() if left.endswith("/") else (tmp_path / left).write_text("a wall")
    assert len(class_pictures(sd, "a wall", 1, tmp_path, steps=1)[0]) == 1
    assert left.endswith("/") or (tmp_path / left).read_text() == "a wall"


@pytest.mark.parametrize("row, match", (
    (dict(instance_prompt="a sks toy", instance_data_dir=3), "instance_data_dir is 3, expected a text"),
    (dict(instance_prompt=["a"], instance_data_dir="x"), "instance_prompt is .'a'., expected a text"),
    (dict(instance_prompt="a sks toy", instance_data_dir="x", class_prompt={"a": 1}), "class_prompt is"), ("bear", "'bear': expected an object")))
def test_concepts_that_are_no_texts(row, match, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps([row]))
    with pytest.raises(DataError, match=match): load_concepts(tmp_path / "c.json")


def test_keys_of_a_concept_that_are_not_read_are_said(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps([dict(instance_prompt="a sks toy", instance_data_dir="x", num_class_images=200)]))
    with pytest.warns(UserWarning, match="num_class_images not read. Read are instance_data_dir"): load_concepts(tmp_path / "c.json")


def test_a_class_s_captions_stand_where_the_subject_s_do(sd, tmp_path):
    "A prompt with {caption} goes around each caption in the prior's predictions, too"
    for i in range(2): Image.new("RGB", (64, 64), "red").save(tmp_path / f"{i}.png")
    (tmp_path / "0.txt").write_text("in the rain")
    run = DreamBooth(sd, tmp_path, "a sks wall, {caption}", "a wall", prior="prediction", trigger="sks wall", rank=2, batch_size=1)
    subject, prior = run.streams
    assert subject.examples.captions == ["a sks wall, in the rain", "a sks wall"] and prior.examples.captions == ["a wall, in the rain", "a wall"]
    run.remove()
