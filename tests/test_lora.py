import subprocess, sys
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from lora_nb.core import row_norms
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
