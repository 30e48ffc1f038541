import pytest
import torch
from helpers_files import pair
from safetensors.torch import save_file

from lora_nb.containers import read_safetensors
from lora_nb.core import FormatError, LoraError
from lora_nb.lora import Lora
from lora_nb.random_pipes import random_pipe
from lora_nb.words import is_embedding, read_embedding

WORD = Lora({}, {"<mascot>": {"text_encoder": torch.randn(2, 32)}}, {"base": "random"})
XL = Lora({}, {"<a>": {"text_encoder": torch.randn(1, 8), "text_encoder_2": torch.randn(1, 12)}})
SD3 = Lora({}, {"<a>": {c: torch.randn(2, d) for c, d in (("text_encoder", 8), ("text_encoder_2", 12), ("text_encoder_3", 16))}})
T5 = Lora({}, {"<t>": {"text_encoder_3": torch.randn(3, 16)}})


def refused(match, f, *args, exc=FormatError, **kw):
    with pytest.raises(exc, match=match): f(*args, **kw)


@pytest.mark.parametrize("lora, keys", [(WORD, ["<mascot>"]), (XL, ["clip_g", "clip_l"]), (SD3, ["clip_g", "clip_l", "t5xxl"]), (T5, ["t5xxl"])])
def test_one_word_for_any_encoders(lora, keys, tmp_path):
    lora.save(tmp_path/"w.safetensors", "textual_inversion")
    assert sorted(read_safetensors(tmp_path/"w.safetensors")[0]) == keys
    assert Lora.load(tmp_path/"w.safetensors") == lora


def test_what_a_file_of_one_word_cannot_hold(tmp_path):
    save = lambda lora, format="textual_inversion", name="x.safetensors": lora.save(tmp_path/name, format)
    word = {"text_encoder": torch.ones(1, 8)}
    refused("cannot hold layers", save, Lora({"unet.conv_in": pair(4, 1, 4)}))
    refused("one file each", save, Lora({}, {"<a>": word, "<b>": word}))
    refused("part's name", save, Lora({}, {"clip_l": word}))
    refused("other encoders", save, Lora({}, {"<a>": {"image_encoder": torch.ones(1, 8)}}))
    refused("no word to write", save, Lora())
    for lora in (XL, SD3, T5): refused("several text encoders", save, lora, "a1111", "x.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [SD3.embeddings, T5.embeddings, {**SD3.embeddings, **T5.embeddings}])
@pytest.mark.parametrize("format, kw", [("peft", {}), ("kohya", {}), ("kohya", dict(bundle=True))])
def test_words_beside_the_layers_of_sd3(words, format, kw, tmp_path):
    full = Lora({f"transformer.transformer_blocks.0.attn.to_{x}": pair(16, 2, 16) for x in "qkv"}, words)
    full.save(tmp_path/"w.safetensors", format, **kw)
    assert Lora({}, Lora.load(tmp_path/"w.safetensors").embeddings) == Lora({}, words)
    refused("cannot hold", full.save, tmp_path/"x.pt", "a1111")


def test_older_files(tmp_path):
    torch.save({"<old>": torch.ones(8)}, tmp_path/"learned_embeds.bin")
    assert Lora.load(tmp_path/"learned_embeds.bin").embeddings["<old>"]["text_encoder"].equal(torch.ones(1, 8))
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 8)}, "name": "a1111"}, tmp_path/"web.pt")
    assert Lora.load(tmp_path/"web.pt").embeddings["a1111"]["text_encoder"].shape == (2, 8)
    torch.save({"string_to_param": {"*": torch.ones(2, 8)}, "name": None}, tmp_path/"nameless.pt")
    assert [*Lora.load(tmp_path/"nameless.pt").embeddings] == ["nameless"]
    save_file({"emb_params": torch.ones(2, 8)}, tmp_path/"easy.safetensors")
    assert [*Lora.load(tmp_path/"easy.safetensors").embeddings] == ["easy"]
    torch.save({"string_to_param": {"*": torch.ones(1, 8), "x": torch.ones(1, 8)}}, tmp_path/"two.pt")
    refused("one tensor", Lora.load, tmp_path/"two.pt")


def test_what_is_no_word(tmp_path):
    small = torch.ones(2, 8)
    assert is_embedding({"a": small}, {}) and is_embedding({"a": small[0]}, {})
    for bad in ({}, {"a.weight": small}, {"a.bias": small[0]}, {"a": torch.ones(78, 8)}, {"a": small[None]}, {"a": 3},
                {str(i): small for i in range(33)}): assert not is_embedding(bad, {}), bad
    refused("should hold vectors", read_embedding, {"a": torch.ones(2, 8).int()}, {})
    refused("should hold vectors", read_embedding, {"a": torch.ones(0, 8)}, {})
    save_file({"clip_l": torch.ones(1, 8), "clip_x": torch.ones(1, 8)}, tmp_path/"x.safetensors")
    refused("clip_x", Lora.load, tmp_path/"x.safetensors", exc=LoraError)


def test_diffusers_reads_our_pickle_for_a1111(tmp_path):
    pipe = random_pipe("sd")
    WORD.save(tmp_path/"mascot.pt", "a1111")
    held = torch.load(tmp_path/"mascot.pt", weights_only=True)
    assert (held["name"], [*held["string_to_param"]]) == ("<mascot>", ["*"])
    pipe.load_textual_inversion(tmp_path/"mascot.pt")
    row = pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer.convert_tokens_to_ids("<mascot>")]
    assert row.equal(WORD.embeddings["<mascot>"]["text_encoder"][0])
