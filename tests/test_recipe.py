import json, warnings
from dataclasses import fields
from types import SimpleNamespace

import pytest

from lora_nb.core import LoraError
from lora_nb.families import as_base
from lora_nb.random_pipes import random_pipe
from lora_nb.recipe import CARDS, INTENTS, Recipe, card_name, check_rate, learning_encoders, recipe_card, recipe_for


def shaped_as(family, layers=None, flow=False):
    "What a card asks of a large base"
    about = {} if layers is None else dict(denoiser=SimpleNamespace(config=SimpleNamespace(num_layers=layers)))
    return SimpleNamespace(family=family, resolution=1024, flow=flow, **about)


def test_a_recipe_survives_json():
    recipe = Recipe(steps=40, learning_rate=2e-3, targets=["to_q", "to_k"])
    assert Recipe(**json.loads(recipe.to_json())).to_dict() == recipe.to_dict()


def test_a_function_is_noted_by_its_name():
    def only_queries(name, module): return name.endswith("to_q")
    assert json.loads(Recipe(targets=only_queries).to_json())["targets"] == "only_queries"


def test_a_line_for_each_setting(): assert str(Recipe()).count("\n") == len(fields(Recipe)) - 1


@pytest.mark.parametrize("wrong, match", (
    (dict(steps=0), "at least 1"), (dict(learning_rate=-1.), "0 to 10"), (dict(caption_dropout=2.), "0 to 1"),
    (dict(mask_floor=-.1), "0 to 1"), (dict(dropout=1.), "below 1"), (dict(snr_gamma=-1.), "above zero"),
    (dict(keep_checkpoints=0), "at least 1"), (dict(validate_every=-5), "zero or more"),
    (dict(rank_min=17), "the rank"), (dict(holes="some"), "expected one of random"),
    (dict(mixed_precision="fp8"), "expected one of auto"), (dict(lr_schedule="cosin"), "cosine, "),
    (dict(weighting="x1"), "None, v, x0"), (dict(weighting="x0", snr_gamma=5.), "choose one"),
    (dict(snr_gamma=0), "above zero"), (dict(snr_gamma=-5.), "above zero"), (dict(snr_gamma=float("nan")), "a number"),
    (dict(alpha=0), "None or above zero"), (dict(alpha=-4.), "above zero"), (dict(dropout=1.5), "below 1"),
    (dict(weight_decay=-.1), "0 to 1"), (dict(learning_rate=float("inf")), "a number"), (dict(steps=2.5), "a whole number"),
    (dict(steps="100"), "a whole number"), (dict(rank=True), "a whole number"), (dict(flip="yes"), "True or False"),
    (dict(lr_schedule="constant_with_warmup"), "one of constant"), (dict(optimizer="lion"), "adamw8bit"),
    (dict(optimizer="prodigy", learning_rate=1e-4), "about 1"), (dict(lora_plus=0), "above zero"), (dict(ema=2.), "0 to below 1"),
    (dict(ema=1.), "below 1"), (dict(mask_floor=2), "0 to 1"), (dict(learning_rate=11.), "0 to 10"), (dict(offset_noise=1.5), "0 to 1"),
    (dict(input_perturbation=2.), "0 to 1"), (dict(prior_weight=1e6), "0 to 100"),
    (dict(weight_decay=2.), "0 to 1"),
    (dict(layer_rates={"mid": -1}), "factor"), (dict(layer_rates=[1]), "factor"), (dict(t_range=(0, float("nan"))), "from < to"),
    (dict(t_range=.5), "two numbers"),
    (dict(t_range=(.5, .2)), "from < to"), (dict(learning_rat=1), "Did you mean 'learning_rate'")))
def test_impossible_settings(wrong, match):
    with pytest.raises(LoraError, match=match): Recipe().replace(**wrong)


@pytest.mark.parametrize("family", ("sd", "sdxl", "sd3"))
@pytest.mark.parametrize("intent", INTENTS)
def test_every_card_makes_a_recipe(family, intent):
    assert recipe_for(shaped_as(family), intent).learning_rate == 1e-4


def test_a_style_has_no_prior(): assert recipe_for(shaped_as("sd"), "style").prior_batch == 0


def test_cards_of_a_family_differ_by_size():
    large, medium = shaped_as("sd3", 38, True), shaped_as("sd3", 24, True)
    assert [card_name(b) for b in (large, medium)] == ["sd3", "sd3-medium"]
    assert (recipe_for(large).gradient_checkpointing, recipe_for(medium).batch_size) == (True, 2)
    assert card_name(shaped_as("sdxl", 24)) == "sdxl"          # it has no smaller card


def test_words_that_name_no_card():
    with pytest.raises(LoraError, match="expected small"): recipe_card("sd4")
    with pytest.raises(LoraError, match="expected subject"): recipe_card("sd", "pet")


def test_every_setting_has_a_reason():
    assert all(why for rows in [*CARDS.values(), *INTENTS.values()] for _, why in rows.values())


@pytest.mark.parametrize("rate, warns", ((0., False), (1e-4, False), (1e-3, False), (1e-2, True), (1e-8, True)))
def test_rates_outside_the_family_s_range(rate, warns):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        check_rate(shaped_as("sdxl"), rate)
    assert bool(seen) is warns
    if warns: assert "is outside of 1e-07 to 0.002" in str(seen[0].message)


def test_encoders_that_learn():
    sd, sd3 = as_base(random_pipe("sd")), as_base(random_pipe("sd3"))
    assert learning_encoders(sd3) == ["text_encoder", "text_encoder_2"] and learning_encoders(sd) == ["text_encoder"]
    assert learning_encoders(sd3, "text_encoder_3") == ["text_encoder_3"]
    with pytest.raises(LoraError, match="expected clips, all, or some of text_encoder."): learning_encoders(sd, ["text_encoder_3"])


@pytest.mark.parametrize("bad, match", ((dict(seed=2**70), "seed = .*expected -2"), (dict(targets=[]), "targets = .*at least one name"),
                                        (dict(targets=""), "targets = ")))
def test_a_seed_and_targets_that_cannot_be(bad, match):
    with pytest.raises(LoraError, match=match): Recipe(**bad)
