import os
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers_files import small_lora
from hypothesis import HealthCheck, given, settings, strategies as st

from lora_nb.core import FormatError, LoraError
from lora_nb.formats import FORMATS, Format, format_of, load_lora, read_file, save_lora
from lora_nb.lora import Factors, Lora
from lora_nb.peft_files import base_layers, fold_alpha
from lora_nb.random_pipes import random_pipe

PIPE = random_pipe("sd")
SHAPES = {n: tuple(m.weight.shape) for n, m in base_layers(PIPE).items() if min(m.weight.shape[:2]) >= 4}


def refused(match, f, *args, exc=LoraError, **kw):
    with pytest.raises(exc, match=match): f(*args, **kw)


@st.composite
def loras(draw):
    "LoRAs of a few layers, of any rank, alpha and type, with words and metadata"
    dtype, dora = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])), draw(st.booleans())
    g, layers = torch.Generator().manual_seed(draw(st.integers(0, 99))), {}
    for n in sorted(draw(st.sets(st.sampled_from(sorted(SHAPES)), min_size=1, max_size=5))):
        r, w = draw(st.integers(1, 4)), SHAPES[n]
        up, down = torch.randn(w[0], r, *(1,)*(len(w)-2), generator=g), torch.randn(r, *w[1:], generator=g)
        alpha = draw(st.sampled_from([None, 1., float(r), r / 8, 3.]))
        layers[n] = Factors(up.to(dtype), down.to(dtype), alpha, torch.rand(w[0], generator=g) if dora else None)
    words = draw(st.sets(st.sampled_from(["<a>", "é b"])))
    return Lora(layers, {t: {"text_encoder": torch.randn(1, 32, generator=g)} for t in words}, {"trigger": draw(st.text(max_size=9))})


def equal(a, b):
    "Names, words and differences are the same; so are the bits where alpha/r is a power of two"
    exact = lambda f: f.alpha is None or (fold_alpha(f)[1] is not None and f.up.dtype != torch.float16)
    if all(map(exact, a.layers.values())): return a == b
    delta = lambda f: replace(f, magnitude=None).delta()
    close = all(torch.allclose(delta(f), delta(b.layers[n]), rtol=.02, atol=.02) for n, f in a.layers.items())
    return close and set(a.layers) == set(b.layers) and a.metadata == b.metadata


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(loras())
def test_peft_round_trips(tmp_path, lora):
    path = tmp_path/"h.safetensors"
    save_lora(lora, path)
    back = load_lora(path, base=PIPE)
    assert equal(lora, back)
    save_lora(back, path)                                     # a second trip changes nothing
    assert load_lora(path) == back


def test_damaged_files_say_so(tmp_path):
    save_lora(small_lora(), tmp_path/"good.safetensors")
    good, path = (tmp_path/"good.safetensors").read_bytes(), tmp_path/"bad.safetensors"
    def bad(match, data):
        path.write_bytes(data)
        refused(match, load_lora, path)
    flipped = bytearray(good); flipped[-5] ^= 0x10
    bad("checksum|NaN", bytes(flipped))
    bad("NaN", safetensors.torch.save({k: t.fill_(float("nan")) for k, t in read_file(tmp_path/"good.safetensors")[0].items()}))
    bad("twice", good[:8] + good[8:].replace(b'"unet.conv_in.lora_B.weight"', b'"unet.conv_in.lora_A.weight"', 1))
    bad("cut short", (1 << 60).to_bytes(8, "little") + good[8:])
    bad("no known place", safetensors.torch.save({"lora_unet_x.lora_down.weight": torch.ones(1, 2)}))
    bad("do not fit together", safetensors.torch.save({"unet.conv_in.hada_w1_a": torch.ones(1, 2)}))
    bad("whole model", safetensors.torch.save({"model.diffusion_model.x.weight": torch.ones(1, 2)}))
    bad("no known format", safetensors.torch.save({"a.weight": torch.ones(1, 2)}))
    bad("no known format", safetensors.torch.save({}))
    bad("notes are damaged", safetensors.torch.save({"unet.conv_in.lora_A.weight": torch.ones(1, 2), "unet.conv_in.lora_B.weight":
                                                     torch.ones(2, 1)}, {"lora_adapter_metadata": "[1]"}))


def test_the_checksum_can_be_ignored(tmp_path):
    lora, path = small_lora(), tmp_path/"a.safetensors"
    save_lora(lora, path)
    data = bytearray(path.read_bytes()); data[-5] ^= 1
    path.write_bytes(data)
    refused("verify=False", load_lora, path)
    other = load_lora(path, verify=False)
    assert set(other.layers) == set(lora.layers) and other != lora


def test_pickles(tmp_path):
    class Evil:
        def __reduce__(self): return os.system, (f"touch {tmp_path/'ran'}",)
    torch.save([Evil()], tmp_path/"evil.pt")
    refused("holds code", load_lora, tmp_path/"evil.pt")
    assert not (tmp_path/"ran").exists()
    torch.save(3, tmp_path/"number.pt")
    refused("holds a int", load_lora, tmp_path/"number.pt")
    torch.save([1, 2], tmp_path/"list.pt")
    refused("should be tensors", load_lora, tmp_path/"list.pt")
    torch.save({"state_dict": {"<w>": torch.ones(8)}}, tmp_path/"nested.ckpt")
    assert [*load_lora(tmp_path/"nested.ckpt").embeddings] == ["<w>"]


def test_wishes_that_cannot_be_met(tmp_path):
    refused("expected one of", save_lora, small_lora(), tmp_path/"x.safetensors", "webp")
    refused("cannot write 'checkpoint'", save_lora, small_lora(), tmp_path/"x.safetensors", "checkpoint")
    refused("end in .safetensors", save_lora, small_lora(), tmp_path/"x.pt")
    refused("end in .pt", save_lora, small_lora(), tmp_path/"x.safetensors", "a1111")
    nan = Lora({"unet.conv_in": Factors(torch.full((4, 1), float("nan")), torch.ones(1, 4), None)})
    refused("NaN", save_lora, nan, tmp_path/"x.safetensors")
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path):
    save_lora(small_lora(), tmp_path/"mascot.safetensors")
    for place in (tmp_path/"mascot.safetensors"/"x.safetensors", Path("/proc/none/x.safetensors")):
        refused("x.safetensors", save_lora, small_lora(), place)


@pytest.mark.parametrize("error", [OSError("No space left on device"), safetensors.SafetensorError("broken")])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = tmp_path/"mascot.safetensors"
    save_lora(small_lora(), path)
    def full(*args): raise error
    monkeypatch.setattr("safetensors.torch.save_file", full)
    refused("unchanged", save_lora, small_lora(1), path)
    assert os.listdir(tmp_path) == [path.name] and load_lora(path) == small_lora()


def test_casting_on_the_way(tmp_path):
    save_lora(small_lora(), tmp_path/"half.safetensors", dtype=torch.float16)
    back = load_lora(tmp_path/"half.safetensors")
    assert {t.dtype for t in back.tensors} == {torch.float16}


def test_a_lora_on_views_and_gradients_can_be_saved(tmp_path):
    up = torch.randn(4, 8, requires_grad=True).T
    save_lora(Lora({"unet.conv_in": Factors(up, torch.randn(4, 3))}), tmp_path/"a.safetensors")
    assert load_lora(tmp_path/"a.safetensors").layers["unet.conv_in"].up.equal(up)


def test_a_new_format_is_one_entry(tmp_path, monkeypatch):
    knows = lambda tensors, metadata: metadata.get("made_by") == "me"
    read = lambda tensors, metadata, base: Lora({"unet.conv_in": Factors(tensors["u.weight"], tensors["d.weight"])})
    monkeypatch.setitem(FORMATS, "mine", Format(knows, read))
    safetensors.torch.save_file({"u.weight": torch.ones(8, 1), "d.weight": torch.ones(1, 4)}, tmp_path/"m.safetensors", {"made_by": "me"})
    assert format_of({}, {"made_by": "me"}) == "mine" and len(load_lora(tmp_path/"m.safetensors")) == 1
    refused("cannot write 'mine'", save_lora, small_lora(), tmp_path/"x.safetensors", "mine", exc=FormatError)
