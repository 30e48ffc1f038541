import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file

from lora_nb.containers import note, seal
from lora_nb.core import FormatError, ShapeError
from lora_nb.lora import Factors, Lora
from lora_nb.lora_diffusion import load_safeloras
from lora_nb.positional import (WORD_FLAG, filled_walk, legacy_order, positional_faults, positional_slots, pt_paths, read_lora_diffusion,
                                read_pt, skeleton, write_lora_diffusion)
from lora_nb.random_pipes import random_pipe

SLOTS = positional_slots(skeleton("unet", "SD1"), {"Attention", "GEGLU"})
EXTENDED = positional_slots(skeleton("unet", "SD1"), {"ResnetBlock2D", "Attention", "GEGLU"}, convs=True)
FIRST = "unet.down_blocks.0.attentions.0.transformer_blocks.0"


def refused(match, f, *args, exc=FormatError, **kw):
    with pytest.raises(exc, match=match): f(*args, **kw)


@pytest.fixture(scope="module")
def pipe(): return random_pipe("sd")


def old_file(order=legacy_order, targets=("CrossAttention", "GEGLU"), slots=SLOTS):
    "A file whose i-th pair is worth i"
    tensors, metadata = {}, {"unet": json.dumps(targets)}
    for i, p in enumerate(order(slots)):
        w = slots[p].weight
        tensors[f"unet:{i}:up"] = torch.full((w.shape[0], 1, *(1,)*(w.ndim-2)), float(i))
        tensors[f"unet:{i}:down"] = torch.ones(1, *w.shape[1:])
        metadata[f"unet:{i}:rank"] = "1"
    tensors["<s1>"], metadata["<s1>"] = torch.randn(768), WORD_FLAG
    return tensors, metadata


@pytest.mark.parametrize("order, want", [(legacy_order, 4), (list, 8)])
def test_extended_files(order, want):
    wide = read_lora_diffusion(*old_file(order, ("ResnetBlock2D", "CrossAttention", "GEGLU"), EXTENDED))
    conv1 = "down_blocks.0.resnets.0.conv1"
    assert len(wide) == 224 and int(wide.layers[f"{FIRST}.ff.net.0.proj"].up[0, 0]) == want
    assert int(wide.layers[f"unet.{conv1}"].up[0, 0]) == list(order(EXTENDED)).index(conv1)


def test_broken_files(pipe):
    tensors, metadata = old_file()
    without = lambda *keys: {k: t for k, t in tensors.items() if k not in keys}
    refused("no up", read_lora_diffusion, without("unet:7:up"), metadata)
    refused("unet:7 missing", read_lora_diffusion, without("unet:7:up", "unet:7:down"), metadata)
    refused("143 pairs that fit no known order", read_lora_diffusion, without("unet:143:up", "unet:143:down"), metadata, exc=ShapeError)
    refused("first difference at 5", read_lora_diffusion, tensors | {"unet:5:up": torch.zeros(640, 1)}, metadata, exc=ShapeError)
    refused("stray", read_lora_diffusion, tensors | {"stray": torch.zeros(3)}, metadata)
    refused("use its own base", read_lora_diffusion, tensors, metadata, pipe, exc=ShapeError)
    refused("tried nothing", read_lora_diffusion, {"vae:0:up": torch.ones(2, 1), "vae:0:down": torch.ones(1, 2)}, {}, exc=ShapeError)


def test_the_loader_of_lora_diffusion_sees_todays_order(tmp_path):
    save_file(*old_file()[:1], tmp_path/"old.safetensors", old_file()[1])
    assert load_safeloras(tmp_path/"old.safetensors")["unet"][0][16][0, 0].item() == 4.        # legacy 4 is today's 8


def test_class_names_are_not_needed(pipe):
    tensors, metadata = old_file()
    bare = read_lora_diffusion({k: t for k, t in tensors.items() if k != "<s1>"}, {})
    assert {n: f.up[0, 0].item() for n, f in bare.layers.items()} == {
        n: f.up[0, 0].item() for n, f in read_lora_diffusion(tensors, metadata).layers.items()}


def test_what_others_noted_is_kept():
    tensors, metadata = old_file()
    assert read_lora_diffusion(tensors, metadata | {"author": "someone"}).metadata == {"author": "someone"}


def test_faults():
    f = Factors(torch.ones(4, 1), torch.ones(1, 4))
    wrong = Lora({"unet.a": replace(f, magnitude=torch.ones(4)), "text_encoder_2.b": f},
                 {"<two>": {"text_encoder": torch.ones(2, 8)}, "a:b": {"text_encoder": torch.ones(1, 8)}})
    faults = {what: names for what, names in positional_faults(wrong).items() if names}
    assert faults == {"DoRA magnitudes": ["unet.a"], "layers of components that it has no list for": ["text_encoder_2.b"],
                      "more than one vector for a token": ["<two>"], "such a token": ["a:b"]}
    refused("DoRA magnitudes", write_lora_diffusion, wrong)
    refused("no layers are known for text_encoder_2", filled_walk, "text_encoder_2", {"b"}, None)


def test_files_of_a_pt_lora(pipe, tmp_path):
    paths = [f"text_encoder.{p}" for p in positional_slots(pipe.text_encoder, {"CLIPAttention"})]
    lora = Lora({n: Factors(torch.randn(32, 2), torch.randn(2, 32), 1.) for n in paths}, {"<s1>": {"text_encoder": torch.randn(1, 32)}})
    lora.save(tmp_path/"own.pt", "pt", base=pipe)
    assert Lora.load(tmp_path/"own.pt", base=pipe) == lora
    refused("earlier LoRA", Lora(lora.layers).save, tmp_path/"own.pt", "pt", base=pipe)
    refused("end in .pt", lora.save, tmp_path/"own.safetensors", "pt", base=pipe)
    for path in pt_paths(tmp_path/"own.ti.pt").values(): assert path.exists()
    (tmp_path/"own.json").unlink()                                # a stranger's file has no note: alpha stays in `up`
    bare = Lora.load(tmp_path/"own.pt", base=pipe)
    assert all(torch.allclose(bare.layers[n].delta(), f.delta(), atol=1e-5) for n, f in lora.layers.items()) and not bare.metadata
    (tmp_path/"own.pt").unlink()
    assert "unet:0:up" not in read_pt(tmp_path/"own.pt")[0] and len(read_pt(tmp_path/"own.pt")[0]) == 2 * len(lora) + 1


WALKS = {c: [f"{c}.{p}" for p in positional_slots(getattr(random_pipe("sd"), c), k)]
         for c, k in (("unet", {"Attention", "GEGLU"}), ("text_encoder", {"CLIPAttention"}))}
WHOLE = [WALKS["unet"], WALKS["text_encoder"], WALKS["unet"] + WALKS["text_encoder"]]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.sampled_from(WHOLE), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.integers(0, 99),
       st.sampled_from([None, 1., 3.]), st.sets(st.sampled_from(["<a>", "é b"])))
def test_round_trips(pipe, names, dtype, seed, alpha, words):
    from lora_nb.peft_files import base_layers, fold_alpha, with_note
    g, shapes = torch.Generator().manual_seed(seed), {n: m.weight.shape for n, m in base_layers(pipe).items()}
    rand = lambda *s: torch.randn(*s, generator=g).to(dtype)
    lora = Lora({n: Factors(rand(shapes[n][0], 2), rand(2, *shapes[n][1:]), alpha) for n in names},
                {t: {"text_encoder": torch.randn(1, 32, generator=g)} for t in words}, {"trigger": "x"})
    tensors, metadata = write_lora_diffusion(lora, pipe)
    metadata = seal(tensors, metadata)
    back = with_note(read_lora_diffusion(tensors, metadata, pipe), metadata)
    if all(fold_alpha(f)[1] is not None or f.alpha is None for f in lora.layers.values()) and dtype != torch.float16: assert back == lora
    else:
        for n, f in lora.layers.items(): assert torch.allclose(back.layers[n].delta(), f.delta(), atol=.02, rtol=.02)
    assert back.metadata == lora.metadata and set(back.embeddings) == words


def test_the_note_is_no_word():
    tensors, metadata = old_file()
    assert set(read_lora_diffusion(tensors, {**metadata, **seal(tensors, note(Lora(), {}))}).embeddings) == {"<s1>"}
