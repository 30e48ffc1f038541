import json

import pytest
import torch
from helpers_files import pair, random_lora

from lora_nb.conversion import coarse, convert_lora, fit_format, frequent_tags, lora_file_info, short, text_bars
from lora_nb.core import FormatError, data_path
from lora_nb.formats import FORMATS, load_lora
from lora_nb.lora import Factors, Lora
from lora_nb.peft_files import base_layers
from lora_nb.random_pipes import random_pipe

CONV, Q = "unet.down_blocks.0.resnets.0.conv1", "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def pipe(): return random_pipe("sd")


@pytest.fixture(scope="module")
def both(pipe, tmp_path_factory):
    "A LoRA with DoRA, a middle kernel, an odd alpha and a word of three vectors; and its kohya file"
    torch.manual_seed(0)
    layers = {n: pair(len(m.weight), 3, m.weight.shape[1], 1.) for n, m in base_layers({"text_encoder": pipe.text_encoder}).items()
              if "self_attn" in n}
    layers[CONV] = Factors(torch.randn(16, 2, 1, 1), torch.randn(2, 16, 1, 1), 2., mid=torch.randn(2, 2, 3, 3))
    layers[Q] = Factors(torch.randn(16, 2), torch.randn(2, 16), 2., magnitude=torch.ones(16))
    lora, path = Lora(layers, {"<a>": {"text_encoder": torch.randn(3, 32)}}), tmp_path_factory.mktemp("both")/"both.safetensors"
    lora.save(path, "kohya", base=pipe)
    return lora, path


def close(a, b, eps=1e-4): assert torch.allclose(a, b, atol=eps, rtol=eps)


def test_what_positions_cannot_hold(both, pipe, tmp_path):
    lora, path = both
    with pytest.raises(FormatError, match="DoRA magnitudes"): convert_lora(path, tmp_path/"x.safetensors", "lora_diffusion", base=pipe)
    assert not list(tmp_path.iterdir())
    done = convert_lora(path, tmp_path/"flat.safetensors", "lora_diffusion", base=pipe, drop=True)
    assert len(done.lost) == 3 and done.lora.components == ["text_encoder"]
    for n, f in load_lora(tmp_path/"flat.safetensors", base=pipe).layers.items(): close(f.delta(), lora.layers[n].delta())


def test_a_middle_factor_is_folded_for_peft(both, pipe, tmp_path):
    lora, path = both
    done = convert_lora(path, tmp_path/"p.safetensors", base=pipe, drop=True)
    w = torch.ones(16, 16)
    close(load_lora(tmp_path/"p.safetensors").layers[Q].delta(w), lora.layers[Q].delta(w))
    assert any("middle" in s for s in done.notes) and any("only lora_nb reads" in s for s in done.notes)


def test_one_word_of_many_things(both, tmp_path):
    lora, _ = both
    convert_lora(lora, tmp_path/"w.safetensors", "textual_inversion", drop=True)
    assert [*load_lora(tmp_path/"w.safetensors").embeddings] == ["<a>"]
    with pytest.raises(FormatError, match="nothing of it"):
        convert_lora(Lora(lora.layers), tmp_path/"x.safetensors", "textual_inversion", drop=True)
    with pytest.raises(FormatError, match="expected one of"): convert_lora(lora, tmp_path/"x.safetensors", "webp")


def test_another_precision(both, pipe, tmp_path):
    done = convert_lora(both[1], tmp_path/"h.safetensors", "kohya", base=pipe, dtype=torch.float16)
    assert {f.up.dtype for f in done.lora.layers.values()} == {torch.float16} and "nothing was lost" not in repr(done)


@pytest.mark.parametrize("format", ["peft", "kohya", "textual_inversion", "a1111"])
def test_every_kind_of_file_is_described(format, pipe, tmp_path):
    end = FORMATS[format].ends[0]
    lora = random_lora(pipe, lambda n: ".attn" in n, embeddings={"<cat>": {"text_encoder": torch.randn(2, 32)}})
    part = Lora({}, lora.embeddings) if format in ("textual_inversion", "a1111") else lora
    part.save(tmp_path/f"f{end}", format, base=pipe)
    info = lora_file_info(tmp_path/f"f{end}", base=pipe)
    assert info.tokens == {"<cat>": {"text_encoder": 2}} and info.triggers == ["<cat>"] and f"f{end}" in repr(info)
    assert sum(info.ranks.values()) == len(part) and info._repr_markdown_().startswith("|")


def test_notes_of_others_may_be_anything():
    for text in ("", "{", "[]", "3", '{"a": 3}', '{"a": {"b": "c"}}'): assert frequent_tags({"ss_tag_frequency": text}) == []
    counts = {"a": {"cat ": 2, "dog": 5}, "b": {"cat": 4}}
    assert frequent_tags({"ss_tag_frequency": json.dumps(counts)}) == ["cat", "dog"]


def test_bars_of_characters():
    assert text_bars({}) == "" and text_bars({"a": 0.}).split() == ["a", "0"]
    assert text_bars({"a": 1., "b": .5}, 8).splitlines() == ["a  ████████ 1", "b  ████     0.5"]


def test_charts_stay_small():
    many = {f"transformer.transformer_blocks.{i}": 1. for i in range(38)} | {f"text_encoder_3.encoder.block.{i}": 1. for i in range(24)}
    bars = coarse(many)
    assert len(bars) <= 14 and bars["text_3 encoder"] == pytest.approx(24**.5)
    assert sum(v * v for v in bars.values()) == pytest.approx(sum(v * v for v in many.values()))
    assert short("unet.mid_block") == "mid" and short("text_encoder_2.encoder.layers.3") == "text_2 3"


def test_a_lora_of_a_family_without_faults_loses_nothing():
    lora = load_lora(data_path("loras", "jack-o-lantern.safetensors"))
    assert fit_format(lora, "peft") == (lora, [], []) and fit_format(lora, "kohya") == (lora, [], [])


def test_what_diffusers_makes_of_ranks_and_alphas_is_said(tmp_path):
    said = lambda *a, **kw: " ".join(convert_lora(Lora(layers), tmp_path/"a.safetensors", *a, **kw).notes)
    layers = {Q: pair(16, 2, 16, 1.), Q.replace("to_q", "to_k"): pair(16, 1, 16)}
    assert "filled up to 2" in said("peft") and "filled" not in said("peft", pad=False)
    assert "alpha" not in said("kohya")
    layers[Q.replace("to_q", "to_v")] = pair(16, 1, 16, 3.)
    assert "the alpha of 1 of 3 layers" in said("kohya") and "1 rounded" in said("kohya")
    assert "several values of alpha" in said("kohya", one_alpha=False)
    layers[Q.replace("to_q", "to_v")] = pair(16, 2, 16, 4.)
    assert "the alpha of 1 of 3 layers" in said("kohya") and "rounded" not in said("kohya")
    layers = {"unet.conv_in": pair(16, 1, 16), "unet.add_embedding.linear_1": pair(16, 1, 16)}
    assert "0.36 does not read unet.conv_in, unet.add_embedding.linear_1" in said("kohya") and not said("peft")
    layers = {"transformer.transformer_blocks.0.attn.to_q": pair(16, 1, 16)}
    assert "loads nothing of an SD3 file" in said("kohya")
