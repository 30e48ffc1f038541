"Weights and LoRAs in prompts: odd texts, every family, and pipelines for other tasks."
import warnings

import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image

from lora_nb.core import LoraError
from lora_nb.families import as_base
from lora_nb.prompts import Prompt, cut_off, parse_prompt, token_weights, weighing
from lora_nb.random_pipes import random_pipe
from lora_nb.schedule import parse_schedule


@pytest.fixture(scope="module", params=["sd", "sdxl", "sd3"])
def base(request): return as_base(random_pipe(request.param))


@given(st.text(alphabet="ab ()[]:1.\\<>lor,", max_size=24))
def test_any_text_is_read_or_refused_in_words(text):
    try: p = parse_prompt(text)
    except LoraError as e: assert "expected" in str(e) or "never closed" in str(e)
    else: assert p.text == "".join(t for t, _ in p.pieces) and all(isinstance(w, float) for _, w in p.pieces)


@given(st.text(alphabet="ab ()[]:1.5\\,", max_size=24))
def test_the_notation_is_read_back(text):
    try: p = parse_prompt(text + " <lora:neon:0.5>")
    except LoraError: return
    assert parse_prompt(str(p)) == p


@given(st.text(alphabet="abc ,.-:;!?1", max_size=30))
def test_text_without_brackets_is_itself(text):
    p = parse_prompt(text)
    assert p.text == text.strip() and not p.weighted and not p.loras


@pytest.mark.parametrize("text, name, values", [
    ("<lora:neon>", "neon", [1, 1, 1]), ("<lora:neon:.5>", "neon", [.5] * 3), ("<lora:neon:-1>", "neon", [-1] * 3),
    ("<lora: my style :0.5>", "my style", [.5] * 3), ("<lora:neon:ramp:0:1>", "neon", [0, .5, 1]),
    ("<lora:neon:2:0.4-1.0>", "neon", [0, 2, 2]), ("<lora:a/b.safetensors:0.8:0.0-0.2>", "a/b.safetensors", [.8, 0, 0]),
    (r"<lora:C:\x\b.safetensors:0.5>", r"C:\x\b.safetensors", [.5] * 3), ("<lora:n:+0.5>", "n", [.5] * 3)])
def test_tags(text, name, values):
    (lora,) = parse_prompt(f"a cat {text}").loras
    assert lora.name == name and parse_schedule(lora.schedule).values(3) == pytest.approx(values)


@pytest.mark.parametrize("text, plain", [("a cat, <lora:x:1>, blue", "a cat, blue"), ("<lora:x> a cat", "a cat"), ("a <lora:x> cat", "a cat"),
                                         ("a cat,<lora:x>", "a cat"), ("<lora:x>", "")])
def test_a_tag_leaves_no_gap(text, plain): assert parse_prompt(text).text == plain


@pytest.mark.parametrize("text, says", [("(a", "never closed"), ("a [b", "never closed"), ("[a:b:0.3]", "another step"),
                                        ("[a|b]", "another step"),
                                        ("<lora:>", "expected <lora:NAME"),
                                        ("<lora:a:1:1>", "two strengths")])
def test_what_is_refused(text, says):
    with pytest.raises(LoraError, match=says): parse_prompt(text)


def test_every_family_weighs_where_the_weights_are_and_nowhere_else(base):
    plain = base.encode_prompts(["abc de", ""])
    with weighing(base, "(abc:1.5) de") as text: now = base.encode_prompts([text, ""])
    assert text == "abc de" and torch.equal(now["prompt_embeds"][1], plain["prompt_embeds"][1])
    moved = (now["prompt_embeds"][0] != plain["prompt_embeds"][0]).any(-1).nonzero().flatten().tolist()
    length = base.pipe.tokenizer.model_max_length
    t5 = [length + i for i in range(4)] if base.family == "sd3" else []       # T5: a piece for the space before the word, too
    assert moved[:3] == [1, 2, 3] and set(moved) <= {1, 2, 3, *t5} and bool(t5) == (len(moved) > 3)
    if "pooled" in now.keys(): assert torch.equal(now["pooled"], plain["pooled"])
    e, z = plain["prompt_embeds"][1, 2], plain["prompt_embeds"][0, 2]
    assert torch.allclose(now["prompt_embeds"][0, 2], e + 1.5 * (z - e), atol=1e-5)
    assert torch.equal(base.encode_prompts(["abc de"])["prompt_embeds"], plain["prompt_embeds"][:1])


def test_pictures_of_other_pipelines_and_negative_prompts_obey(base):
    gray = Image.new("RGB", (64, 64), (90,) * 3)
    for draw in (lambda p, n: base.generate([p], n, [1], 2, 5., 64), lambda p, n: base.img2img(gray, p, .9, n, [1], 2, 5., 64)):
        bare = draw("abc", "de")[0].tobytes()
        for texts in (["(abc:3)", "de"], ["abc", "(de:3)"]):
            with weighing(base, texts) as (p, n): assert draw(p, n)[0].tobytes() != bare
        with weighing(base, ["abc", "de"]) as (p, n): assert draw(p, n)[0].tobytes() == bare
        assert draw("abc", "de")[0].tobytes() == bare


def test_hooks_go_when_the_body_fails(base):
    before = [len(m._forward_hooks) for m in base.text_encoders.values()]
    with pytest.raises(ZeroDivisionError), weighing(base, "(a:2)"): raise ZeroDivisionError
    assert [len(m._forward_hooks) for m in base.text_encoders.values()] == before


def test_weights_without_effect_are_told(base):
    with pytest.warns(UserWarning, match="no text encoder met 'a b'"):
        with weighing(base, "(a:2) b"): base.encode_prompts(["something else"])
    with pytest.raises(LoraError, match="two sets of weights"):
        with weighing(base, ["(a:2) b", "a b"]): pass
    with pytest.raises(LoraError, match="wears neon"):
        with weighing(base, "a <lora:neon:1>"): pass
    with pytest.raises(LoraError, match="no text encoder"):
        with weighing(torch.nn.Linear(1, 1), "(a:2)"): pass
    with warnings.catch_warnings(action="error"), weighing(base, ["a", "b"]): pass


def test_a_word_of_several_vectors_is_one_word():
    tokenizer = random_pipe("sd").tokenizer
    tokenizer.add_tokens(["<x>", "<x>_1"])
    w = token_weights(tokenizer, parse_prompt("a (<x>:2) b"), 77)
    assert w[:6] == [1, 1, 2, 2, 1, 1] and set(w[6:]) == {1.}


def test_long_prompts():
    base = as_base(random_pipe("sd3"))
    lost = cut_off(base, "a " * 74 + "xy z")
    assert lost["text_encoder"] == "xy z" and set(lost) == {"text_encoder", "text_encoder_2", "text_encoder_3"}
    assert set(cut_off(base, "a " * 20)) == {"text_encoder_3"}        # letters and spaces are pieces of this T5
    w = token_weights(base.pipe.tokenizer, parse_prompt("(" + "a " * 100 + ":2)"), 77)
    assert w == [1.] + [2.] * 75 + [1.]
    assert not cut_off(base, "") and Prompt(()).text == ""
