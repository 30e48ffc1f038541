import json

import pytest
from PIL import Image

from lora_nb.core import LoraError
from lora_nb.families import as_base
from lora_nb.lora import Lora
from lora_nb.pti import PivotalTuning, pivotal_recipe_for, train_pti
from lora_nb.random_pipes import random_pipe
from lora_nb.textual_inversion import fingerprint

WALL = [Image.new("RGB", (64, 64), c) for c in ("red", "green")]
QUICK = dict(steps=3, ti_steps=3, batch_size=1, prior_batch=1, rank=2, num_class_images=1, sampling=dict(steps=1), guard=False)
WORDS = dict(placeholder_token="<w>", initializer_token="<rand>", class_prompt="a wall")


@pytest.fixture(scope="module")
def sd(): return as_base(random_pipe("sd"))


@pytest.mark.parametrize("wrong, match", ((dict(mode="both"), "two-phase"), (dict(words_turn=1), "words_turn"), (dict(ti_step=1), "ti_steps"),
                                          (dict(ti_steps=-1), "ti_steps"), (dict(tuning_words_learning_rate=-1.), "tuning_words_learning_rate")))
def test_impossible_settings(sd, wrong, match):
    with pytest.raises(LoraError, match=match): pivotal_recipe_for(sd, **wrong)


def test_a_style_has_no_prior(sd): assert pivotal_recipe_for(sd, "style", ti_steps=3).prior_weight == 0.


@pytest.mark.parametrize("mode", ("two-phase", "joint"))
@pytest.mark.parametrize("stop", (2, 3))
def test_a_stopped_run_goes_on_bit_for_bit(sd, mode, stop, tmp_path):
    kw = dict(QUICK, **WORDS, mode=mode, checkpoint_every=1, ti_steps=2 if stop == 3 else 3)      # 3: stopped in the second phase
    whole = train_pti(sd, WALL, **kw)
    train_pti(sd, WALL, **kw, output_dir=tmp_path, callback=lambda trainer: trainer.done == stop)
    assert train_pti(sd, WALL, **kw, output_dir=tmp_path, resume=True).content_hash() == whole.content_hash()


def test_a_stop_in_the_first_phase_ends_the_run(sd):
    run = PivotalTuning(sd, WALL, **WORDS, **QUICK, callback=lambda trainer: trainer.done == 2)
    lora = run.fit()
    assert run.log.steps == 2 and len(run.logs) == 1 and run.log.phases == []
    assert all(not f.up.any() for f in lora.layers.values())                  # the LoRA has not begun


def test_the_seam_is_marked(sd):
    run = PivotalTuning(sd, WALL, **WORDS, **dict(QUICK, ti_steps=2))
    assert not hasattr(run, "trainer")                                        # each phase makes its own
    run.fit()
    assert run.log.phases == [(2, "tuning")] and run.log.steps == 5 and "tuning" in run.log.curve().svg
    prior = run.log.parts["prior"]
    assert all(v != v for v in prior[:2]) and all(v == v for v in prior[2:])


def test_a_text_encoder_joins_on_request(sd):
    lora = train_pti(sd, WALL, **WORDS, **dict(QUICK, steps=2, ti_steps=1), train_text_encoder=True, prior="prediction")
    assert any(n.startswith("text_encoder.") for n in lora.layers)
    assert json.loads(lora.metadata["recipe"])["train_text_encoder"] is True and lora.metadata["prior"] == "prediction"


def test_two_words_for_one_thing(sd):
    pair = train_pti(sd, WALL, "<a>|<b>", "face|tangerine", **dict(QUICK, steps=1, ti_steps=1))
    assert set(pair.embeddings) == {"<a>", "<b>"} and json.loads(pair.metadata["tokens"]) == ["<a>", "<b>"]


def test_words_to_begin_with(sd):
    taught = train_pti(sd, WALL, **WORDS, **dict(QUICK, steps=1))
    given = Lora(embeddings={"<v>": taught.embeddings["<w>"]})
    again = train_pti(sd, WALL, "<v>", "<zero>", start=given, tuning_words_learning_rate=0., norm_prior=0., **dict(QUICK, steps=1, ti_steps=0))
    assert again.embeddings["<v>"]["text_encoder"].allclose(taught.embeddings["<w>"]["text_encoder"], atol=1e-6)


def test_refused_runs_leave_nothing_behind(sd):
    was = fingerprint(sd)
    with pytest.raises(LoraError, match="class prompt"): train_pti(sd, WALL, "<w>", "face", prior="images")
    with pytest.raises(LoraError, match="nothing"): train_pti(sd, WALL, "<w>", "face", targets="nothing")
    assert fingerprint(sd) == was and "<w>" not in sd.pipe.tokenizer.get_vocab()


@pytest.mark.parametrize("mode", ("two-phase", "joint"))
def test_t5_joins_on_request(mode):
    base = as_base(random_pipe("sd3")); was = fingerprint(base)
    kw = dict(QUICK, batch_size=3, prior_batch=2, ti_steps=2, encoders="all", train_text_encoder=True, vectors=2, num_class_images=2)
    lora = train_pti(base, WALL[:1], **WORDS, mode=mode, validate_every=1, validation_samples=2, **kw)
    assert sorted(lora.embeddings["<w>"]) == ["text_encoder", "text_encoder_2", "text_encoder_3"]
    assert {"transformer", *base.text_encoders} <= set(lora.components) and fingerprint(base) == was


@pytest.mark.parametrize("kw, seen", ((dict(), 3.5), (dict(ti_batch_size=2), 5), (dict(mode="joint"), 2), (dict(ti_steps=0), 2)))
def test_the_start_report_counts_both_phases(sd, kw, seen):
    run = PivotalTuning(sd, WALL, **WORDS, **dict(QUICK, steps=4, **kw))
    text = str(run.start_report())
    assert "subject: 2 pictures" in text and f"each picture is seen {seen:g} times" in text, text
    assert run.looks()["prior"] == 4
    run.remove()
