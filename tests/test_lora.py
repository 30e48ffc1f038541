import json, math, subprocess, sys
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch

from lora_nb.composition import compose
from lora_nb.core import LoraError, row_norms
from lora_nb.extraction import resize
from lora_nb.lora import Factors, Lora, add_factors, gather, join_words

torch.manual_seed(0)
close = lambda a, b, eps=1e-5: torch.allclose(torch.as_tensor(a), torch.as_tensor(b), atol=eps, rtol=eps)
f = Factors(torch.randn(32, 4), torch.randn(4, 48), alpha=2)
lora = Lora({"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": f,
             "unet.mid_block.resnets.0.conv1": Factors(torch.randn(16, 4, 1, 1), torch.randn(4, 8, 3, 3)),
             "text_encoder.encoder.layers.0.self_attn.q_proj": Factors(torch.randn(24, 2), torch.randn(2, 24))},
            {"<octopus>": {"text_encoder": torch.randn(2, 24)}}, {"base": "tiny-sd", "trigger": "<octopus>"})
dora = Factors(torch.randn(6, 2), torch.randn(2, 8), magnitude=torch.rand(6))


def test_middle_kernel():
    conv = Factors(torch.randn(6, 3, 1, 1), torch.randn(3, 4, 1, 1), 1.5, mid=torch.randn(3, 3, 3, 3))     # CP: lora_mid
    want = .5 * torch.einsum("oa,abhw,bi->oihw", conv.up[..., 0, 0], conv.mid, conv.down[..., 0, 0])
    assert close(conv.delta(), want) and close(conv.plain().delta(), want)
    assert conv.shape == (6, 4, 3, 3) and conv.plain().mid is None
    assert close(conv.norm(), want.norm().item(), 1e-3)


def test_dora():
    w = torch.randn(6, 8)
    assert close(row_norms(w + dora.delta(w)), dora.magnitude, 1e-4)
    with pytest.raises(ValueError, match=r"delta\(weight\)"): dora.delta()
    with pytest.raises(ValueError, match="wear it with"): dora.scaled(2)
    assert dora.scaled(1) is dora
    with pytest.raises(ValueError, match="cannot be added"): add_factors([dora, dora])


def test_half_precision_computes_in_single():
    half = f.to(dtype=torch.float16)
    assert half.up.dtype == torch.float16 and half.delta().dtype == torch.float32


def test_factors_are_frozen_and_have_no_hash():
    with pytest.raises(FrozenInstanceError): f.alpha = 1
    with pytest.raises(TypeError): hash(f)


@pytest.mark.parametrize("change", [dict(up=f.up + 1), dict(alpha=3), dict(groups=2), dict(magnitude=torch.ones(32)),
                                    dict(down=f.down.half())], ids=lambda d: next(iter(d)))
def test_unequal_factors(change): assert replace(f, **change) != f


def test_equal_factors():
    assert replace(f, up=f.up.clone()) == f and f != "f"
    assert replace(f, alpha=None) == replace(f, alpha=4)                   # the same strength


def test_equality_of_loras():
    twin = Lora(dict(reversed(lora.layers.items())), lora.embeddings, dict(lora.metadata))
    assert twin == lora and lora != "lora"
    assert lora != Lora(lora.layers, lora.embeddings) and lora != Lora(lora.layers, {}, lora.metadata)
    assert lora != lora.only("unet") and lora != lora.scaled(2) and lora.scaled(2).scaled(.5) == lora
    bent = {"<octopus>": {"text_encoder": lora.embeddings["<octopus>"]["text_encoder"] + 1}}
    assert lora != Lora(lora.layers, bent, lora.metadata)
    assert len({lora, twin}) == 2                                          # keys by identity


def test_large_numbers_are_sound():
    Lora({"unet.a": Factors(torch.full((60000, 1), 60000.), torch.ones(1, 4))}).to(dtype=torch.float16).check()


def test_infinite_words_are_found():
    word = Lora(embeddings={"<x>": {"text_encoder": torch.full((1, 4), torch.inf)}})
    with pytest.raises(ValueError, match=r"<x> \(text_encoder\)"): word.check()


def test_renaming():
    with pytest.raises(ValueError, match="holds no token '<cat>'"): lora.rename_token("<cat>", "<dog>")
    with pytest.raises(ValueError, match="already"): Lora(embeddings={"a": {}, "b": {}}).rename_token("a", "b")


def test_as_text():
    assert repr(lora) == "Lora: 3 layers of unet, text_encoder, rank 4, 816 parameters, 3.2 KB, tokens <octopus>"
    assert repr(Lora()) == "Lora: 0 layers of nothing, rank 0, 0 parameters, 0 bytes" and Lora()._repr_markdown_()


@pytest.mark.parametrize("loras, says", [([], "found none"), ([lora, "b.safetensors"], "found str"),
    ([lora, Lora({"unet.x": dora})], "cannot be summed"),
    ([Lora({"unet.x": Factors(torch.ones(6, 2), torch.ones(2, 8))}),
      Lora({"unet.x": Factors(torch.ones(6, 2), torch.ones(2, 9))})],
     "different bases")])
def test_what_has_no_sum(loras, says):
    with pytest.raises(ValueError, match=says): gather(loras)


def test_words_of_one_name():
    ours = Lora({}, {"<s>": {"text_encoder": torch.ones(1, 4)}})
    theirs = Lora({}, {"<s>": {"text_encoder": torch.zeros(1, 4)}})
    assert join_words([ours, ours.to(dtype=torch.float16)]) == ours.embeddings
    assert close(join_words([ours, theirs], [.25, .75])["<s>"]["text_encoder"], torch.full((1, 4), .25))
    with pytest.raises(ValueError, match="rename_token"): ours + theirs
    assert (ours - theirs).embeddings == ours.embeddings                   # what is subtracted brings no words


def test_operators_need_no_other_chapter():
    code = """from lora_nb.lora import Factors, Lora; import sys, torch
a, b = (Lora({"unet.q": Factors(torch.randn(3, 2), torch.randn(2, 5))}) for _ in range(2))
want = .5 * a.layers["unet.q"].delta() - 2 * b.layers["unet.q"].delta()
assert torch.allclose((.5 * a - b * 2).layers["unet.q"].delta(), want, atol=1e-6)
assert len(sum([a, b, -a / 2])) == 1 and not {"lora_nb.composition", "lora_nb.layers"} & set(sys.modules)
try: a + "b"
except TypeError: print("ok")"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "ok"


def test_the_operators_are_what_compose_makes():
    other = Lora({"unet.mid_block.resnets.0.conv1": Factors(torch.randn(16, 2, 1, 1), torch.randn(2, 8, 3, 3), alpha=1),
                  "unet.x": Factors(torch.randn(4, 2), torch.randn(2, 3))}, metadata={"base": "tiny-sd", "trigger": "neon"})
    made = [(lora + other, [1., 1.]), (lora - other, [1., -1.])]
    from lora_nb.composition import compose
    for total, weights in made: assert total == compose([lora, other], weights)


# Strengths are numbers, and a sum knows what it is made of

def one(trigger="", alpha=None): return Lora({"unet.q": Factors(torch.randn(3, 2), torch.randn(2, 5), alpha)},
                                             metadata={"trigger": trigger} if trigger else {})

@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300, "x", None])
def test_a_value_is_scaled_by_numbers(bad):
    a = one()
    for f in (lambda: a.scaled(bad), lambda: a.layers["unet.q"].scaled(bad)):
        with pytest.raises(LoraError, match="expected a finite number"): f()
    if isinstance(bad, float):
        with pytest.raises(LoraError): a * bad
    with pytest.raises(LoraError): a * 1e38 * 1e38
    with pytest.raises(LoraError, match="divided by 0"): a / 0

@pytest.mark.parametrize("s", [.5, np.float32(.5), np.float64(.5), torch.tensor(.5), True])
def test_numbers_of_other_libraries(s):
    a = one()
    for b in (a * s, s * a, a / (1 / float(s))): assert torch.allclose(b.layers["unet.q"].delta(), float(s) * a.layers["unet.q"].delta())

@pytest.mark.parametrize("f", [lambda a, b: a + b, lambda a, b: compose([a, b]), lambda a, b: a - b, lambda a, b: resize(b, 1)])
def test_an_alpha_that_is_no_number_is_refused(f):
    with pytest.raises(LoraError, match="alpha of unet.q"): f(one(), one(alpha=math.nan))

def test_a_sum_notes_the_weights_of_its_parts():
    a, b, c = (one(t) for t in "abc")
    parts = lambda lora: {p["trigger"]: p["weight"] for p in json.loads(lora.metadata["parts"])}
    assert parts(a + .5 * b - c / 4) == {"a": 1, "b": .5, "c": -.25}
    assert parts(2 * (a + b / 4) - c) == {"a": 2, "b": .5, "c": -1}
    assert parts(compose([a + b, 2 * c], [.5, 3])) == {"a": .5, "b": .5, "c": 6}
    assert parts(compose([compose([a, b], method="svd"), c])) == {"a, b": 1, "c": 1}
    assert (a * 2 / 2) == a and (a * 2).metadata["scaled"] == "2.0" and "scaled" not in (a + 2 * b).metadata
    assert (a + -c).metadata["trigger"] == (a - c).metadata["trigger"] == "a"
    damaged = Lora(a.layers, metadata={**(a + b).metadata, "parts": "{", "scaled": "?"})
    assert parts(damaged + c) == {"a, b": 1, "c": 1}

@pytest.mark.parametrize("x", [None, 3, [one()], object()])
def test_what_is_no_lora(x):
    for f in (lambda: resize(x, 1), lambda: Lora.load(x), lambda: one().save(x)):
        with pytest.raises(LoraError, match="expected"): f()

def test_a_file_where_a_lora_is_expected(tmp_path):
    one().save(path := tmp_path / "a.safetensors")
    assert resize(path, 1).rank == resize(str(path), 1).rank == 1
    with pytest.raises(LoraError, match="no such file"): resize(tmp_path / "b.safetensors", 1)
