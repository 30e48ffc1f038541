import random

import pytest
import torch
from PIL import Image
from torch import nn

from lora_nb.core import LoraError
from lora_nb.evaluation import wearing
from lora_nb.families import as_base
from lora_nb.lora import Lora
from lora_nb.loading import load_base
from lora_nb.random_pipes import random_pipe
from lora_nb.textual_inversion import (InversionRecipe, NewWords, TextualInversion, WordTable, concepts_of, fingerprint, first_vectors,
                                       inversion_recipe_for, neighbours, train_textual_inversion, wording_of)

RED = [Image.new("RGB", (64, 64), "red")]


@pytest.fixture(scope="module")
def base(): return load_base("tiny-sd", device="cpu")


@pytest.fixture(scope="module")
def sd3(): return as_base(random_pipe("sd3"))


def table_of(base): return base.pipe.text_encoder.get_input_embeddings().weight


def test_vectors_that_begin_a_word(base):
    enc, tok, table = base.pipe.text_encoder, base.pipe.tokenizer, table_of(base)
    assert first_vectors(enc, tok, "<mean>", 3)[2].allclose(table.mean(0), atol=1e-6)
    assert first_vectors(enc, tok, "<rand>", 2, seed=5).equal(first_vectors(enc, tok, "<rand>", 2, seed=5))
    assert first_vectors(enc, tok, "a red toy", 4)[3].equal(first_vectors(enc, tok, "a")[0])      # pieces take turns
    with pytest.raises(LoraError, match="no tokens"): first_vectors(enc, tok, " ")
    with pytest.raises(LoraError, match=r"\(2, 144\)"): first_vectors(enc, tok, torch.zeros(2, 7), 2)


@pytest.mark.parametrize("family", ("sdxl", "sd3"))
def test_a_word_has_a_row_in_each_clip(family):
    base = as_base(random_pipe(family)); words = NewWords(base, {"<x>": "<rand>"})
    assert sorted(words.embeddings()["<x>"]) == ["text_encoder", "text_encoder_2"]
    words.remove()


def test_words_that_cannot_be_added(base):
    with pytest.raises(LoraError, match="text_encoder_2"): NewWords(base, {"<x>": "toy"}, components=["text_encoder_2"])
    with pytest.raises(LoraError, match="already"): NewWords(base, {"toy": "face"})
    assert type(base.pipe.text_encoder.get_input_embeddings()) is nn.Embedding


def test_removing_words_twice_is_harmless(sd3):
    was = fingerprint(sd3); words = NewWords(sd3, {"<x>": "<rand>"}, vectors=2)
    words.remove(); words.remove()
    assert fingerprint(sd3) == was


def test_only_the_new_rows_have_gradients():
    small = nn.Embedding(5, 3).requires_grad_(False)
    beside = WordTable(small, [3, 4], small.weight[[3, 4]])
    beside(torch.tensor([[0, 3, 4, 3]])).sum().backward()
    assert beside.words.grad.tolist() == [[2.] * 3, [1.] * 3] and small.weight.grad is None


def test_wordings():
    assert wording_of("caption", "<x>") is None
    assert wording_of(["only {trigger}"], "<x>")("", random.Random(0)) == "only <x>"
    with pytest.raises(LoraError, match="expected"): wording_of("objct", "<x>")
    with pytest.raises(LoraError, match="hole"): wording_of(["no hole"], "<x>")
    with pytest.raises(LoraError, match="hole"): wording_of([], "<x>")


def test_recipes(sd3):
    assert inversion_recipe_for(sd3, "style", steps=7).steps == 7 and inversion_recipe_for(sd3, "style").template == "caption"
    with pytest.raises(LoraError, match="vectors"): InversionRecipe(vectors=0)
    with pytest.raises(LoraError, match="vectors"): InversionRecipe().replace(vektors=2)
    with pytest.raises(LoraError, match="0 to 10"): InversionRecipe(words_learning_rate=-1.)


def test_initialisers_for_words():
    with pytest.raises(LoraError, match="No initialiser for"): concepts_of("pics", "<a>|<b>", {"<a>": "toy"})
    assert concepts_of("pics", "<a>", torch.zeros(1, 3))[0]["<a>"].shape == (1, 3)


def test_a_word_is_its_own_neighbour(base):
    row = base.pipe.tokenizer.convert_tokens_to_ids("toy</w>")
    assert neighbours(base, table_of(base)[[row]].detach(), 1)[0] == [("toy", 1.)]


@pytest.mark.parametrize("family, parts", (("sd", 1), ("sdxl", 2), ("sd3", 2)))
def test_every_family_learns_and_saves_a_word(family, parts, tmp_path):
    base = as_base(random_pipe(family)); was = fingerprint(base)
    lora = train_textual_inversion(base, RED, "<red>", "<rand>", steps=2, batch_size=1, vectors=2, template="object")
    assert {c: len(e) for c, e in lora.embeddings["<red>"].items()} == dict.fromkeys(["text_encoder", "text_encoder_2"][:parts], 2)
    assert fingerprint(base) == was
    lora.save(tmp_path / "w.safetensors")
    again = Lora.load(tmp_path / "w.safetensors").embeddings["<red>"]
    assert all(again[c].equal(e) for c, e in lora.embeddings["<red>"].items())


def test_t5_learns_on_request(sd3, tmp_path):
    lora = train_textual_inversion(sd3, RED, "<red>", "<rand>", steps=3, batch_size=2, vectors=2, encoders="all", guard=False,
                                   words_learning_rate=.1, norm_prior=0.)
    assert list(lora.embeddings["<red>"]) == ["text_encoder", "text_encoder_2", "text_encoder_3"]
    words = NewWords(sd3, {"<red>": "<rand>"}, 2, list(sd3.text_encoders)); start = words.embeddings()["<red>"]; words.remove()
    assert all((e - start[c]).abs().max() > .05 for c, e in lora.embeddings["<red>"].items())        # all three have moved
    lora.save(tmp_path / "three.safetensors")
    heard = lambda base: base.encode_prompts(["a <red> wall"])["prompt_embeds"]
    with wearing(sd3, lora): ours = heard(sd3)
    other = as_base(random_pipe("sd3"))
    with wearing(other, Lora.load(tmp_path / "three.safetensors")): assert heard(other).equal(ours)


def test_nothing_is_left_behind(sd3, base, tmp_path):
    with pytest.raises(LoraError, match="text_encoder_4"): train_textual_inversion(sd3, RED, "<w>", "toy", encoders=["text_encoder_4"])
    for _ in range(2): train_textual_inversion(sd3, RED, "<w>", "<rand>", steps=1, batch_size=1)
    assert "<w>" not in sd3.pipe.tokenizer.get_vocab()
    was = fingerprint(base)
    with pytest.raises(LoraError, match="already"): train_textual_inversion(base, RED, "face", "toy")
    with pytest.raises(LoraError, match="nowhere"): train_textual_inversion(base, tmp_path / "nowhere", "<w>", "toy")
    assert fingerprint(base) == was


# --- words that no caption says ----------------------------------------------------------------------------------------

def captioned(folder, *texts):
    for i, text in enumerate(texts):
        Image.new("RGB", (64, 64), "red").save(folder / f"{i}.png")
        if text: (folder / f"{i}.txt").write_text(text)
    return folder


def test_a_word_that_no_caption_says_is_refused(base, tmp_path):
    from lora_nb.pti import PivotalTuning
    said = captioned(tmp_path, "a red wall", "a wall in the sun")
    for method, kw in ((TextualInversion, {}), (PivotalTuning, dict(rank=2))):
        with pytest.raises(LoraError, match="No caption says '<x>'.*0.png: 'a red wall'.*{trigger}"): method(base, said, "<x>", **kw)
        assert "<x>" not in base.pipe.tokenizer.get_vocab() and not [m for m in base.denoiser.modules() if hasattr(m, "lora_up")]
    TextualInversion(base, said, "<x>", template="object").remove()                         # sentences say it
    with pytest.raises(LoraError, match="caption_dropout"): TextualInversion(base, said, "<x>", template="object", caption_dropout=1.)


def test_one_of_two_words_is_missing(base, tmp_path):
    with pytest.raises(LoraError, match="No caption says '<b>'"): TextualInversion(base, captioned(tmp_path, "a <a> wall"), "<a>|<b>")


def test_captions_that_do_not_say_a_word_are_named(base, tmp_path):
    with pytest.warns(UserWarning, match="1 of 2 captions do not say '<x>'.*1.png"):
        TextualInversion(base, captioned(tmp_path, "a {trigger} wall", "a wall"), "<x>").remove()


def test_a_word_behind_the_end_is_not_said(base, tmp_path):
    far = captioned(tmp_path, "very " * 90 + "red {trigger}")
    with pytest.raises(LoraError, match="as far as text_encoder reads"): TextualInversion(base, far, "<x>")
    (tmp_path / "0.txt").write_text("very " * 20 + "red {trigger}")
    with pytest.raises(LoraError, match="fewer vectors"): TextualInversion(base, far, "<x>", vectors=60)      # its vectors do not fit


@pytest.mark.parametrize("init", ("<rand-x>", "<rand", "<rand-nan>", "<rand--1>", "<zeros>", ""))
def test_initialisers_that_are_none(base, init):
    with pytest.raises(LoraError, match="nitialiser"): TextualInversion(base, [Image.new("RGB", (64, 64))], "<x>", init)
    assert "<x>" not in base.pipe.tokenizer.get_vocab()


@pytest.mark.parametrize("wrong, match", ((dict(vectors=100), "77 tokens"), (dict(template="objct"), "expected caption"),
                                          (dict(norm_prior=-1.), "0 to 100")))
def test_settings_of_words_that_are_impossible(wrong, match):
    from lora_nb.textual_inversion import InversionRecipe
    with pytest.raises(LoraError, match=match): InversionRecipe(**wrong)


def test_words_at_a_rate_of_zero():
    with pytest.raises(LoraError, match="Nothing would be learned: .*words"):
        TextualInversion(random_pipe("sd"), [Image.new("RGB", (64, 64), "red")], "<zero>", words_learning_rate=0.)


def test_words_and_initialisers_in_lists():
    assert concepts_of("x", ["<a>", "<b>"], ["toy", "face"]) == concepts_of("x", "<a>|<b>", "toy|face")
    for bad, match in ((None, "None: expected a text"), (3, "3: expected a text"), ("<a>|<a>", "named twice"), (["<a>", "<a>"], "named twice")):
        with pytest.raises(LoraError, match=match): concepts_of("x", bad, "toy")
    with pytest.raises(LoraError, match="named twice"): concepts_of({"<a>": "x", "<a>|<b>": "y"}, None, "toy")


@pytest.mark.parametrize("init, n, warns", (("teddybear zzqq", 1, True), ("a red toy", 2, True), ("a red toy", 3, False), ("toy", 1, False)))
def test_pieces_of_an_initialiser_that_are_not_used_are_said(base, init, n, warns):
    import warnings
    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter("always")
        first_vectors(base.pipe.text_encoder, base.pipe.tokenizer, init, n)
    assert bool(got) == warns and all("pieces here" in str(w.message) for w in got)


def test_the_start_report_tells_the_sentences_of_a_template(base, tmp_path):
    "Not the captions that they replace, nor what these lack"
    RED[0].save(tmp_path / "0.png"); (tmp_path / "0.txt").write_text("a wall " * 90)
    run = TextualInversion(base, tmp_path, "<w>", template="object", steps=2, batch_size=1)
    text = str(run.start_report())
    assert "1 of 1 say '<w>'" in text and "sentences such as '" in text and "cut:" not in text and "warning" not in text, text
    run.remove()
