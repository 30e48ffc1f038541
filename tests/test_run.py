import inspect

import pytest
import torch
from PIL import Image

from lora_nb.core import LoraError
from lora_nb.dreambooth import DreamBooth, train_dreambooth
from lora_nb.families import as_base
from lora_nb.injection import inject_lora
from lora_nb.lora import Lora
from lora_nb.pti import PivotalTuning, train_pti
from lora_nb.random_pipes import random_pipe
from lora_nb.recipe import Recipe
from lora_nb.run import PriorOptions, RunOptions, TrainingRun, delegates, taken
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
    still = dict(QUICK, steps=1, learning_rate=0., weight_decay=0., targets="attention", guard=False)
    again = train_dreambooth(base, WALL, "a sks wall", start=taught, **still)
    for n, f in taught.layers.items():
        assert again.layers[n].magnitude.flatten().allclose(f.magnitude.flatten())
        assert again.layers[n].up.allclose(f.up) and again.layers[n].down.allclose(f.down)
    assert bare(base)


def test_a_start_of_other_layers_or_rank(base):
    first = train_dreambooth(base, WALL, "a sks wall", **QUICK)
    with pytest.raises(LoraError, match="has rank 3 here and 2"): train_dreambooth(base, WALL, "a sks wall", start=first, **dict(QUICK, rank=3))
    with pytest.raises(LoraError, match="differ in"): DreamBooth(base, WALL, "a sks wall", start=first, targets="attention", **QUICK)
    assert bare(base)


def test_a_start_goes_on_where_it_was(base):
    first = train_dreambooth(base, WALL, "a sks wall", alpha=1., **QUICK)          # another strength than the run's
    again = train_dreambooth(base, WALL, "a sks wall", start=first, **dict(QUICK, steps=1, learning_rate=0.))
    assert isinstance(again, Lora)
    for n, f in first.layers.items(): assert again.layers[n].delta().allclose(f.delta(), atol=1e-5)


@pytest.mark.parametrize("method, words", ((DreamBooth, ["a sks wall"]), (TextualInversion, ["<x>"]), (PivotalTuning, ["<x>"])))
def test_a_callback_may_be_set_later(base, method, words):
    run = method(base, WALL, *words, **QUICK)
    run.callback = lambda trainer: trainer.done == 1
    run.fit()
    assert run.log.steps == 1 and bare(base)
