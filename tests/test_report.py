from dataclasses import replace

import pytest
import torch
from helpers_ground import random_lora, tiny_pipe, tiny_unet

from lora_nb.injection import apply_lora, set_scale
from lora_nb.lora import Factors, Lora
from lora_nb.names import kind_of

unet = tiny_unet()
good = random_lora(unet, ["attn1"])
first, f = next(iter(good.layers.items()))
says = lambda lora, model=unet: " ".join(lora.report(model).advice)


def test_names_are_sorted():
    odd = Lora({**good.layers, "unet.down_blocks.7.attn1.to_q": f})
    r = odd.report(unet)
    assert (len(r.matched), r.unexpected, r.misshaped, r.ok) == (len(good), ["unet.down_blocks.7.attn1.to_q"], [], False)
    assert good.report(unet).ok and "1 unexpected" in repr(r)


def test_missing_are_modules_of_a_kind_adapted_elsewhere():
    part = Lora({first: f})
    same = [n for n in good.layers if kind_of(n) == kind_of(first) and n != first]
    assert set(same) <= set(part.report(unet).missing)


@pytest.mark.parametrize("lora, phrase", [
    (Lora({first: Factors(torch.ones(99, 4), torch.ones(4, 77))}), "made for another base"),
    (Lora({first: replace(f, up=f.up * torch.nan)}), "NaN"),
    (Lora({**good.layers, "text_encoder.encoder.layers.0.mlp.fc1": f}), "give the whole pipeline"),
    (Lora(embeddings={"<x>": {"text_encoder": torch.ones(1, 4)}}), "no layers, only words"), (Lora(), "the file was empty")])
def test_advice(lora, phrase): assert phrase in says(lora)


def test_misshaped():
    assert Lora({first: Factors(torch.ones(99, 4), torch.ones(4, 77))}).report(unet).misshaped == [first]


def test_norms_add_up():
    total = sum(f.norm()**2 for f in good.layers.values())**.5
    assert abs(sum(d * d for d, _ in good.report(unet).norms.values())**.5 - total) < 1e-3 * total


@pytest.mark.parametrize("mode", ["merge", "inject"])
def test_worn_in_both_modes(mode):
    model = tiny_unet(); apply_lora(model, good, mode=mode)
    assert good.report(model).advice == []
    set_scale(model, 0)
    assert "at scale 0" in says(good, model)
    assert "another LoRA" in says(random_lora(tiny_unet(), ["attn1"], seed=7), model)


def test_words_of_a_pipeline():
    pipe = tiny_pipe()
    wordy = Lora(good.layers, {"<octopus>": {"text_encoder": torch.randn(2, 24)}})
    assert "'<octopus>' is not in the vocabulary" in says(wordy, pipe)
    apply_lora(pipe, wordy)
    assert "vocabulary" not in says(wordy, pipe)
