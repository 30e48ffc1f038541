import inspect, warnings
from dataclasses import replace

import pytest
import torch
from PIL import Image

from lora_nb.core import LoraError
from lora_nb.dataset import ConceptDataset
from lora_nb.dreambooth import Concept, DreamBooth, train_dreambooth
from lora_nb.extraction import resize
from lora_nb.families import as_base
from lora_nb.injection import inject_lora
from lora_nb.lora import Lora
from lora_nb.pti import PivotalTuning, train_pti
from lora_nb.random_pipes import random_pipe
from lora_nb.recipe import Recipe
from lora_nb.run import PriorOptions, RunOptions, TrainingRun, delegates, file_dtype, taken
from lora_nb.textual_inversion import TextualInversion, train_textual_inversion

METHODS = {DreamBooth: train_dreambooth, TextualInversion: train_textual_inversion, PivotalTuning: train_pti}
WALL = [Image.new("RGB", (64, 64), "red")]
QUICK = dict(steps=2, batch_size=1, rank=2)
SHARED = {"previews", "callback", "resolution", "buckets"}


@pytest.fixture(scope="module")
def base(): return as_base(random_pipe("sd"))


def bare(base):
    "Is the base as it was: no branches, no words?"
    return not [m for m in base.denoiser.modules() if hasattr(m, "lora_up")] and type(base.pipe.text_encoder.get_input_embeddings()) \
        is torch.nn.Embedding and "<x>" not in base.pipe.tokenizer.get_vocab()


@pytest.mark.parametrize("method", METHODS)
def test_signatures_show_the_options(method):
    for f in (method, METHODS[method]):
        parameters = inspect.signature(f).parameters
        assert SHARED <= set(parameters) and {"recipe", "output_dir"} <= set(parameters)
        assert list(parameters.values())[-1].kind is inspect.Parameter.VAR_KEYWORD
    assert "previews: Pictures drawn on the way" in method.__init__.__doc__
    assert method.__init__.__code__.co_argcount <= 14                  # self, base and what is its own


@pytest.mark.parametrize("f, first", (
    (train_dreambooth, "base instance_data instance_prompt class_prompt class_data recipe output_dir prior resume"),
    (train_textual_inversion, "base instance_data placeholder_token initializer_token recipe output_dir resume"),
    (train_pti, "base instance_data placeholder_token initializer_token class_prompt class_data recipe output_dir prior resume"),
    (DreamBooth, "base instance_data instance_prompt class_prompt class_data prior recipe output_dir"),
    (TextualInversion, "base instance_data placeholder_token initializer_token recipe output_dir"),
    (PivotalTuning, "base instance_data placeholder_token initializer_token class_prompt class_data prior recipe output_dir")))
def test_the_order_of_parameters_stays(f, first):
    assert list(inspect.signature(f).parameters)[:len(first.split())] == first.split()


@pytest.mark.parametrize("method, extra", (
    (DreamBooth, "num_class_images trigger sampling start masks held_back"),
    (TextualInversion, "prompt class_noun components"),
    (PivotalTuning, "prompt class_noun components num_class_images sampling start")))
def test_every_keyword_is_still_taken(method, extra):
    assert set(extra.split()) <= set(inspect.signature(method).parameters)


def test_delegates_leaves_own_parameters_alone():
    @delegates(PriorOptions)
    def f(a, sampling="mine", **options): "Text."
    parameters = inspect.signature(f).parameters
    assert parameters["sampling"].default == "mine" and parameters["num_class_images"].default == 24
    assert list(parameters)[:2] == ["a", "sampling"] and f.__doc__.startswith("Text.\n\nOptions:\n")


def test_options_and_settings_part():
    options, settings = taken(RunOptions, dict(resolution=64, steps=3, sampling={}))
    assert options.resolution == 64 and settings == dict(steps=3, sampling={})         # sampling is no option of this kind


@pytest.mark.parametrize("wrong, match", ((dict(callbak=1), "Did you mean 'callback'"), (dict(step=1), "Did you mean 'steps'"),
                                          (dict(xyzzyx=1), "has no setting 'xyzzyx'")))
def test_misspelt_options(wrong, match):
    with pytest.raises(LoraError, match=match): TrainingRun(None, Recipe(), None, wrong)


def test_options_of_another_method(base):
    with pytest.raises(LoraError, match="num_class_images"): TextualInversion(base, WALL, "<x>", num_class_images=3)
    with pytest.raises(LoraError, match="class_noun"): DreamBooth(base, WALL, "a sks wall", class_noun="wall")


@pytest.mark.parametrize("wrong, match", (
    (dict(sampling=dict(size=64)), "given by resolution"), (dict(sampling=dict(seeds=[1])), "the recipe's seed"), (dict(sampling=3), "a dict"),
    (dict(num_class_images=0), "from 1"), (dict(resolution=100), "multiple of 8"), (dict(resolution="64"), "multiple of 8"),
    (dict(previews=dict(seeds=[0])), "with prompts"), (dict(callback=3), "a function")))
def test_impossible_options_are_refused_at_once(wrong, match):
    with pytest.raises(LoraError, match=match): PriorOptions(**wrong)


def test_a_method_says_what_it_does():
    run = TrainingRun(None, Recipe(), None, {})
    with pytest.raises(NotImplementedError, match="phases"): run.phases()
    with pytest.raises(NotImplementedError, match="learned"): run.lora()


@pytest.mark.parametrize("method, words", ((DreamBooth, ["a sks wall"]), (TextualInversion, ["<x>"]), (PivotalTuning, ["<x>"])))
def test_a_refused_or_broken_run_leaves_the_base_as_it_was(base, method, words, tmp_path):
    wrong = dict(output_dir="/dev/null/x")
    if method is PivotalTuning:                                   # its trainer is made by `fit`
        with pytest.raises(LoraError, match="cannot write"): method(base, WALL, *words, **QUICK, **wrong).fit()
    else:
        with pytest.raises(LoraError, match="cannot write"): method(base, WALL, *words, **QUICK, **wrong)
    assert bare(base)
    def broken(trainer): raise RuntimeError("stop here")
    with pytest.raises(RuntimeError, match="stop here"): method(base, WALL, *words, **QUICK, callback=broken).fit()
    assert bare(base)


def test_a_start_keeps_dora_magnitudes(base):
    worn = inject_lora(base.denoiser, "attention", rank=2, dora=True)
    for m in worn.layers.values():
        torch.nn.init.constant_(m.lora_up.weight, .02)
        with torch.no_grad(): m.magnitude.mul_(1.3)
    taught = worn.lora(); worn.remove()
    still = dict(QUICK, steps=1, learning_rate=1e-30, weight_decay=0., targets="attention", guard=False)
    again = train_dreambooth(base, WALL, "a sks wall", start=taught, **still)
    for n, f in taught.layers.items():
        assert again.layers[n].magnitude.flatten().allclose(f.magnitude.flatten())
        assert again.layers[n].up.allclose(f.up) and again.layers[n].down.allclose(f.down)
    assert bare(base)


def test_a_start_of_other_layers_or_rank(base):
    first = train_dreambooth(base, WALL, "a sks wall", **QUICK)
    for rank in (3, 1):                                                 # higher: exact; lower: the best of rank 1
        again = train_dreambooth(base, WALL, "a sks wall", start=first, **dict(QUICK, rank=rank, steps=1, learning_rate=1e-30))
        best = first if rank == 3 else resize(first, rank=1)
        assert set(again.ranks.values()) == {rank}
        for n, f in best.layers.items(): assert again.layers[n].delta().allclose(f.delta(), atol=1e-5)
    with pytest.raises(LoraError, match="differ in"): DreamBooth(base, WALL, "a sks wall", start=first, targets="attention", **QUICK)
    assert bare(base)


def test_a_start_goes_on_where_it_was(base):
    first = train_dreambooth(base, WALL, "a sks wall", alpha=1., **QUICK)          # another strength than the run's
    again = train_dreambooth(base, WALL, "a sks wall", start=first, **dict(QUICK, steps=1, learning_rate=1e-30))
    assert isinstance(again, Lora)
    for n, f in first.layers.items(): assert again.layers[n].delta().allclose(f.delta(), atol=1e-5)


@pytest.mark.parametrize("method, words", ((DreamBooth, ["a sks wall"]), (TextualInversion, ["<x>"]), (PivotalTuning, ["<x>"])))
def test_a_callback_may_be_set_later(base, method, words):
    run = method(base, WALL, *words, **QUICK)
    run.callback = lambda trainer: trainer.done == 1
    run.fit()
    assert run.log.steps == 1 and bare(base)


# --- starts, files on the way, reports ---------------------------------------------------------------------------------

def test_a_start_may_be_a_file_and_new_directions_learn(base, tmp_path):
    first = train_dreambooth(base, WALL, "a sks wall", **QUICK)
    first.save(tmp_path / "first.safetensors")
    wider = train_dreambooth(base, WALL, "a sks wall", start=tmp_path / "first.safetensors", **dict(QUICK, rank=4, steps=1))
    grown = [f.up.flatten(1)[:, 2:].abs().max() for f in wider.layers.values()]
    assert max(grown) > 0 and bare(base)
    with pytest.raises(LoraError, match="absent"): DreamBooth(base, WALL, "a sks wall", start=tmp_path / "absent.safetensors", **QUICK)
    assert bare(base)


def test_a_dora_of_another_rank_is_refused(base):
    worn = inject_lora(base.denoiser, "attention", rank=2, dora=True); taught = worn.lora(); worn.remove()
    with pytest.raises(LoraError, match="is a DoRA"):
        DreamBooth(base, WALL, "a sks wall", start=taught, targets="attention", **dict(QUICK, rank=3))
    assert bare(base)


@pytest.mark.parametrize("method, words", ((DreamBooth, ["a sks wall"]), (TextualInversion, ["<x>"]), (PivotalTuning, ["<x>"])))
def test_a_file_that_can_be_used_at_each_checkpoint(base, method, words, tmp_path):
    lora = method(base, WALL, *words, output_dir=tmp_path, checkpoint_every=1, **QUICK).fit()
    files = sorted(tmp_path.rglob("loras/*.safetensors"))
    assert [f.stem for f in files][-2:] == ["step-000001", "step-000002"]
    last, before = Lora.load(files[-1]), Lora.load(files[-2])
    for n, f in lora.layers.items(): assert last.layers[n].delta().allclose(f.delta(), atol=1e-5)
    for w, e in lora.embeddings.items(): assert last.embeddings[w]["text_encoder"].allclose(e["text_encoder"])
    assert last.content_hash() != before.content_hash()
    if lora.layers: base.pipe.load_lora_weights(str(files[-1])); base.pipe.unload_lora_weights()      # plain diffusers


@pytest.mark.parametrize("dtype, written", ((torch.float32, torch.float32), (torch.bfloat16, torch.float16), (torch.float16, torch.float16)))
def test_files_are_fp16_beside_a_half_precision_base(base, dtype, written, tmp_path):
    from types import SimpleNamespace
    worn = inject_lora(base.denoiser, "attention", rank=2); lora = worn.lora(); worn.remove()
    like = SimpleNamespace(dtype=dtype)
    assert (file_dtype(like, lora) or torch.float32) == written
    huge = lora.map(lambda f: replace(f, up=torch.full_like(f.up, 1e6)))
    assert file_dtype(like, huge) is None                                     # fp16 would make infinities of it


def test_the_start_report_is_said_before_training(base, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("LORA_NB_QUIET", "0")
    for i, text in enumerate(("a sks wall", "a sks wall, " + "very " * 90 + "red")):
        WALL[0].save(tmp_path / f"{i}.png"); (tmp_path / f"{i}.txt").write_text(text)
    (tmp_path / "notes.pdf").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"longer than a text encoder reads[\s\S]*1.png: tokenizer reads 77 of"):
        train_dreambooth(base, tmp_path, "a sks wall", **QUICK)
    said = capsys.readouterr().err
    for part in ("subject: 2 pictures", "2 of 2 say 'sks wall'", "notes.pdf", "caption cut: 1.png", "is seen 1 times", "GiB of a GPU"):
        assert part in said, (part, said)


def test_a_tracker_hears_every_step(base, monkeypatch, tmp_path):
    heard = []
    class Ear:
        def log(self, values, step): heard.append((step, values["loss"]))
        def finish(self): heard.append("end")
    import lora_nb.run
    monkeypatch.setattr(lora_nb.run, "open_trackers", lambda names, folder, recipe: [Ear()])
    monkeypatch.setattr(lora_nb.run, "tracker_names", lambda names: [names])
    run = PivotalTuning(base, WALL, "<x>", output_dir=tmp_path, report_to="wandb", ti_steps=2, **QUICK); run.fit()
    assert heard == [(i + 1, x) for i, x in enumerate(run.log.losses)] + ["end"]
    with pytest.raises(LoraError, match="needs an output_dir"): train_dreambooth(base, WALL, "a sks wall", report_to="wandb", **QUICK)


@pytest.mark.parametrize("kw", (dict(dora=True), dict(rslora=True), dict(lora_plus=16.), dict(layer_rates={"down_blocks": .5, "mid_block": 0}),
                                dict(ema=.9), dict(optimizer="adafactor")), ids=lambda kw: next(iter(kw)))
def test_recipes_of_other_kinds_train_stop_and_go_on(base, kw, tmp_path):
    kw = dict(QUICK, steps=4, targets="attention", checkpoint_every=2, **kw)
    through = train_dreambooth(base, WALL, "a sks wall", **kw)
    train_dreambooth(base, WALL, "a sks wall", output_dir=tmp_path, callback=lambda t: t.done == 2, **kw)
    again = train_dreambooth(base, WALL, "a sks wall", output_dir=tmp_path, resume=True, **kw)
    assert again.content_hash() == through.content_hash() and bare(base)
    usual = dict(dora=False, rslora=False, lora_plus=1., layer_rates=None, ema=0., optimizer="adamw")
    plain = train_dreambooth(base, WALL, "a sks wall", **{**kw, **usual})
    assert plain.content_hash() != through.content_hash()
    held = [f.up.abs().max() for n, f in through.layers.items() if "mid_block" in n]
    assert "layer_rates" not in kw or (held and max(held) == 0)
    assert not kw.get("dora") or all(f.magnitude is not None for f in through.layers.values())


def test_layers_that_no_rate_finds(base):
    with pytest.raises(LoraError, match="'middle'"): DreamBooth(base, WALL, "a sks wall", layer_rates={"middle": 2.}, **QUICK)
    assert bare(base)


def test_trackers_and_optimisers_that_are_not_there(base, monkeypatch, tmp_path):
    import sys
    from accelerate import tracking
    monkeypatch.setattr(tracking, "is_wandb_available", lambda: False)
    there = dict(output_dir=tmp_path, **QUICK)
    with pytest.raises(LoraError, match="expected tensorboard, wandb"): DreamBooth(base, WALL, "a sks wall", report_to="mlflow", **there)
    with pytest.raises(LoraError, match="pip install wandb"): DreamBooth(base, WALL, "a sks wall", report_to="wandb", **there)
    for name, package in (("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")):
        monkeypatch.setitem(sys.modules, {"bitsandbytes": "bitsandbytes.optim"}.get(package, package), None)
        with pytest.raises(LoraError, match=f"pip install {package}"):
            DreamBooth(base, WALL, "a sks wall", output_dir=tmp_path, optimizer=name, learning_rate=1., **QUICK)
    assert bare(base) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, module, kind", (("adamw8bit", "bitsandbytes.optim", "AdamW8bit"), ("prodigy", "prodigyopt", "Prodigy")))
def test_optimisers_of_other_packages(base, name, module, kind, monkeypatch):
    "Fakes that note what they are given"
    import sys, types
    class Fake(torch.optim.SGD):
        def __init__(self, groups, lr=1e-3, **kw): made.append((groups, kw)); super().__init__(groups, lr=lr)
    made, fake = [], types.ModuleType(module)
    setattr(fake, kind, Fake); monkeypatch.setitem(sys.modules, module, fake); monkeypatch.setitem(sys.modules, module.split(".")[0], fake)
    lora = train_dreambooth(base, WALL, "a sks wall", optimizer=name, learning_rate=1., train_text_encoder=True, guard=False, **QUICK)
    (groups, kw), = made
    assert max(f.up.abs().max() for f in lora.layers.values()) > 0 and [g["name"] for g in groups] == ["unet", "text_encoder"]
    assert name != "prodigy" or ({g["lr"] for g in groups} == {1.} and kw["safeguard_warmup"])
    assert name != "adamw8bit" or [g["lr"] for g in groups] == [1., 1e-4]


@pytest.mark.parametrize("folder, floor, told", (("masks", None, "masks: 1 of 2, not used (mask_floor is None)"),
                                                 ("mask", .1, "masks: 1 of 2\n")))
def test_the_start_report_says_whether_masks_count(base, folder, floor, told, tmp_path):
    (tmp_path/folder).mkdir()
    for i in range(2): Image.new("RGB", (64, 64), "red").save(tmp_path/f"{i}.png")
    Image.new("L", (64, 64), 255).save(tmp_path/folder/"0.png")
    run = DreamBooth(base, tmp_path, "a sks wall", rank=2, batch_size=1, mask_floor=floor)
    assert told in str(run.start_report()) + "\n"
    run.remove()


@pytest.mark.parametrize("bad", (dict(recursive="no"), dict(folder_words=2), dict(num_class_images=True)))
def test_switches_are_switches(bad):
    with pytest.raises(LoraError, match=next(iter(bad))): PriorOptions(**bad)


def test_a_recipe_that_fits_a_small_card_takes_the_same_steps(base, monkeypatch):
    from lora_nb import plan
    need = lambda n: plan.estimate_memory(base, rank=2, targets="attention", batch_size=n, dtype=torch.float32).total
    small = need(2) / plan.usable(1) + 1e-6
    run = DreamBooth(base, WALL, "a sks wall", fit=small, **{**QUICK, "batch_size": 8, "targets": "attention"})
    assert (run.recipe.batch_size, run.recipe.accumulate) == (2, 4) and run.streams[0].batch == 2
    run.remove()
    with pytest.raises(LoraError, match="the least is"): DreamBooth(base, WALL, "a sks wall", fit=.1, **QUICK)
    assert bare(base)


def test_texts_are_kept_beside_the_latents(base, tmp_path):
    run = DreamBooth(base, WALL, "a sks wall", latent_cache=tmp_path, **QUICK)
    run.fit()
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 and len(list((tmp_path / "texts").glob("*.safetensors"))) == 1


# --- what a person is warned of --------------------------------------------------------------------------------------
LONG = "a toy " * 60                                   # a letter is a token here

def album(folder, **captions):
    for n, text in captions.items():
        WALL[0].save(folder / f"{n}.png"); (folder / f"{n}.txt").write_text(text)
    return folder


def warned(f):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made = f()
    return made, [str(w.message) for w in told]


def test_captions_that_are_cut_are_named_once(base, tmp_path, capfd):
    "By file, and not again at each step of a text encoder that learns"
    album(tmp_path, short="a sks toy", long=f"a sks toy {LONG}")
    train = lambda: train_dreambooth(base, tmp_path, "a sks toy", train_text_encoder=True, **{**QUICK, "steps": 6})
    said = [w for w in warned(train)[1] if "longer than a text encoder reads" in w]
    assert len(said) == 1 and "long.png: tokenizer reads 77 of" in said[0] and "short.png" not in said[0]
    assert capfd.readouterr().err.count("truncated") <= 2


@pytest.mark.parametrize("prompt, class_prompt, said", [
    ("a sks toy", "a sks toy", True), ("a sks toy", "A toy, SKS", True), ("a sks toy", "a toy", False), ("sks", "a person", False)])
def test_a_class_prompt_that_says_the_new_word(prompt, class_prompt, said):
    assert any("nothing tells the class from it" in w for w in warned(lambda: Concept(WALL, prompt, class_prompt))[1]) == said


@pytest.mark.parametrize("captions, said", [
    (dict(a="a toy", b="red"), "No caption of the subject says 'sks toy'"), (dict(a="a sks toy", b="red"), ""),
    (dict(a="a {trigger}", b="red"), ""), (dict(a=f"{LONG} sks toy"), "only beyond what the text encoder reads")])
def test_words_that_no_caption_says(base, captions, said, tmp_path):
    run, told = warned(lambda: DreamBooth(base, album(tmp_path, **captions), "a sks toy", **QUICK))
    run.remove()
    told = [w for w in told if "say" in w]
    assert any(said in w for w in told) if said else not told


def test_a_word_that_some_captions_say(base, tmp_path):
    "An error where none does, a warning with the files where some do not"
    make = lambda: TextualInversion(base, tmp_path, "<x>", "toy", **{**QUICK, "rank": 1})
    album(tmp_path, a="a <x>", b="red")
    run, told = warned(make); run.remove()
    assert [w for w in told if "1 of 2 captions do not say '<x>'" in w and "b.png: 'red'" in w]
    album(tmp_path, a="red")
    with pytest.raises(LoraError, match="No caption says '<x>'"): make()
    assert bare(base)


def test_a_trigger_that_nobody_gave(tmp_path):
    album(tmp_path, a="")
    assert any("{trigger} in the prompt stays empty" in n for n in ConceptDataset(tmp_path).sources.notes)
    assert ConceptDataset(tmp_path).captions == ["a photo of"] and ConceptDataset(tmp_path, trigger="sks").captions == ["a photo of sks"]
    assert not any("{trigger}" in n for n in ConceptDataset(tmp_path, "a toy").sources.notes)


@pytest.mark.parametrize("kw, match", (
    (dict(previews=dict(prompts=["x"], foo=1), preview_every=1), "no argument 'foo'"),
    (dict(previews=dict(prompts="x", steps=0), preview_every=5), "steps = 0"),
    (dict(previews=dict(prompts=["x"], seeds=[1, 2]), preview_every=1), "2 seeds"),
    (dict(previews=dict(prompts=["x"], size=7), preview_every=1), "7 x 7"),
    (dict(previews=dict(prompts=[3]), preview_every=1), "texts"), (dict(previews=dict(prompts=["x"])), "preview_every is 0"),
    (dict(sampling=dict(nonsense=1)), "no argument 'nonsense'"), (dict(sampling=dict(guidance_scale="x")), "guidance_scale"),
    (dict(sampling=dict(steps=1, batch_size=0)), "batch_size"), (dict(targets=3), "targets = 3")))
def test_pictures_that_cannot_be_drawn_are_refused_before_any_is_read(base, kw, match, monkeypatch, tmp_path):
    def never(*a, **k): raise AssertionError("the pictures were read first")
    monkeypatch.setattr("lora_nb.dreambooth.encode", never)
    with pytest.raises(LoraError, match=match): DreamBooth(base, WALL, "a sks wall", "a wall", **{**QUICK, **kw})


def test_a_mask_floor_without_masks_is_said(base):
    with pytest.warns(UserWarning, match="mask_floor = 0.1 has no effect: no picture has a mask"):
        train_dreambooth(base, WALL, "a sks wall", mask_floor=.1, **QUICK)


def test_resuming_beyond_the_steps_asked_for_is_said(base, tmp_path):
    kw = dict(QUICK, checkpoint_every=1, output_dir=tmp_path)
    train_dreambooth(base, WALL, "a sks wall", **kw)
    with pytest.warns(UserWarning, match="checkpoint is of step 2, beyond the 1 steps"):
        train_dreambooth(base, WALL, "a sks wall", **dict(kw, steps=1), resume=True)


def test_the_start_report_counts_what_is_read(base, tmp_path):
    "A trigger behind the last token that is read is not said; the reasons that matter come before the masks"
    for i in range(22):
        WALL[0].save(tmp_path / f"{i:02}.png"); Image.new("L", (64, 64), 255).save(tmp_path / f"{i:02}.mask.png")
    (tmp_path / "00.txt").write_text("red " * 90 + "sks wall"); (tmp_path / "zz.docx").write_bytes(b"x")
    with pytest.warns(UserWarning, match="only beyond"): run = DreamBooth(base, tmp_path, "a sks wall", rank=2, batch_size=1)
    text = str(run.start_report()); run.remove()
    assert "21 of 22 say 'sks wall'" in text and "left out: zz.docx" in text and "do not say 'sks wall': 00.png" in text, text


def test_pictures_of_one_name_are_told_apart(base, tmp_path):
    for d in ("a", "b"):
        (tmp_path / d).mkdir(); WALL[0].save(tmp_path / d / "0.png"); (tmp_path / d / "0.txt").write_text("a sks wall " + "red " * 90)
    run = DreamBooth(base, tmp_path, "a sks wall", rank=2, batch_size=1, recursive=True)
    text = str(run.start_report()); run.remove()
    assert "caption cut: a/0.png" in text and "caption cut: b/0.png" in text, text


@pytest.mark.parametrize("start", (3, {"a": 1}, ["a.safetensors"]))
def test_a_start_that_is_no_lora(base, start):
    with pytest.raises(LoraError, match="expected a LoRA, or its file"): train_dreambooth(base, WALL, "a sks wall", start=start, **QUICK)
    assert bare(base)


def test_a_recipe_that_somebody_else_wrote_is_kept(base, tmp_path):
    "A configuration written by hand, under the name of ours, was replaced without a word"
    own = tmp_path / "recipe.toml"; own.write_text("# mine\nlearning_rate = 1e-4\n")
    with pytest.raises(LoraError, match="exists and is not a recipe that lora_nb wrote"):
        train_dreambooth(base, WALL, "a sks toy", output_dir=tmp_path, **QUICK)
    assert own.read_text().startswith("# mine") and bare(base)
    own.unlink()
    for steps in (1, 2): train_dreambooth(base, WALL, "a sks toy", output_dir=tmp_path, **{**QUICK, "steps": steps})
    assert "steps = 2" in own.read_text()
