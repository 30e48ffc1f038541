import numpy as np
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


def test_cog_sdxl_keeps_one_word_in_two_encoders(tmp_path):
    two = {"text_encoders_0": torch.randn(2, 768), "text_encoders_1": torch.randn(2, 1280)}
    save_file(two, tmp_path/"embeddings.pti")
    want = {"text_encoder": two["text_encoders_0"], "text_encoder_2": two["text_encoders_1"]}
    same = lambda lora, token: [*lora.embeddings] == [token] and all(t.equal(want[c]) for c, t in lora.embeddings[token].items())
    assert same(Lora.load(tmp_path/"embeddings.pti"), "embeddings")
    (tmp_path/"special_params.json").write_text('{"TOK": "<s0><s1>"}')
    assert same(Lora.load(tmp_path/"embeddings.pti"), "TOK")
    (tmp_path/"special_params.json").write_text('{"TOK"')
    refused("special_params.json", Lora.load, tmp_path/"embeddings.pti")


@pytest.mark.parametrize("keys", [["clip_l", "clip_g"], ["clip_g"], ["clip_l", "clip_g", "t5xxl"], ["clip_l", "clip_g", "t5"]])
@pytest.mark.parametrize("name, save", [("pose v2.safetensors", save_file), ("pose v2.pt", torch.save), ("pose v2.bin", torch.save)])
def test_a_file_of_encoders_is_called_after_its_file(tmp_path, keys, name, save):
    save({k: torch.randn(2, d) for k, d in zip(keys, (768, 1280, 4096))}, tmp_path/name)
    lora = Lora.load(tmp_path/name)
    assert [*lora.embeddings] == ["pose v2"] and len(lora.embeddings["pose v2"]) == len(keys) and not lora.metadata
    lora.save(tmp_path/"renamed.safetensors", "textual_inversion")                # the word stays what it was
    assert Lora.load(tmp_path/"renamed.safetensors") == lora


def test_a_word_called_t5_is_a_word(tmp_path):
    save_file({"t5": torch.ones(2, 768)}, tmp_path/"x.safetensors")
    assert [*Lora.load(tmp_path/"x.safetensors").embeddings["t5"]] == ["text_encoder"]
    save_file({"t5": torch.ones(2, 4096)}, tmp_path/"x.safetensors")
    assert [*Lora.load(tmp_path/"x.safetensors").embeddings["x"]] == ["text_encoder_3"]


LAYER = {f"lora_unet_mid_block_attentions_0_proj_in.lora_{part}.weight": torch.ones(*shape) for part, shape in (("up", (8, 1)), ("down", (1, 8)))}

@pytest.mark.parametrize("held", [{"clip_l": 768, "clip_l_out": 768}, {"clip_l_out": 768}, {"clip_l": 768, "clip_g": 1280, "t5_out": 4096}])
def test_output_embeddings_are_refused_by_name(tmp_path, held):
    held = {k: torch.ones(1, d) for k, d in held.items()}
    save_file(held, tmp_path/"x.safetensors")
    refused("_out: vectors for the output", Lora.load, tmp_path/"x.safetensors")
    save_file({f"bundle_emb.cat.{k}": t for k, t in held.items()} | LAYER, tmp_path/"x.safetensors")
    refused("_out: vectors for the output", Lora.load, tmp_path/"x.safetensors")


@pytest.mark.parametrize("word", ["cat", "my.cat", "cat.v2.1"])
@pytest.mark.parametrize("ends", [{"string_to_param.*": "text_encoder"}, {"clip_l": "text_encoder", "clip_g": "text_encoder_2"},
                                  {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5": "text_encoder_3"}])
def test_bundled_words_with_dots_and_t5(tmp_path, word, ends):
    held = {e: torch.randn(2, 8) for e in ends}
    save_file({f"bundle_emb.{word}.{e}": t for e, t in held.items()} | LAYER, tmp_path/"x.safetensors")
    lora = Lora.load(tmp_path/"x.safetensors")
    assert len(lora) == 1 and [*lora.embeddings] == [word]
    assert all(lora.embeddings[word][c].equal(held[e]) for e, c in ends.items())


NO_WORDS = {"IA3": {"base_model.model.down_blocks.0.attn1.to_k.ia3_l": torch.ones(8, 1)},
            "IA3, feed-forward": {"base_model.model.ff.net.0.ia3_l": torch.ones(1, 8)},
            "VeRA": {"base_model.model.mid.to_q.vera_lambda_b": torch.ones(8), "base_model.model.mid.to_q.vera_lambda_d": torch.ones(2)},
            "VeRA with its projections": {"base_model.vera_A": torch.ones(2, 8), "base_model.vera_B": torch.ones(8, 2),
                                          "x.to_q.vera_lambda_d": torch.ones(2)},
            "FourierFT": {"base_model.model.to_q.fourierft_spectrum": torch.ones(10)}, "differences": {"mid_block.norm.diff": torch.ones(8)},
            "a norm": {"unet.conv_norm_out.scale": torch.ones(8)}, "an MLP": {"layers.0.w": torch.ones(2, 8)}}

@pytest.mark.parametrize("kind", NO_WORDS)
def test_adapters_of_vectors_are_no_words(tmp_path, kind):
    assert not is_embedding(NO_WORDS[kind], {})
    save_file(NO_WORDS[kind], tmp_path/"adapter_model.safetensors")
    with pytest.raises(LoraError): Lora.load(tmp_path/"adapter_model.safetensors")


@pytest.mark.parametrize("word", ["<cat>", "bad_norm", "lora_style", "my.cat", "easynegative", "blocks", "attention", "v1.5", "sks-dog_2"])
def test_words_that_are_words(tmp_path, word):
    Lora({}, {word: {"text_encoder": torch.ones(1, 8)}}).save(tmp_path/"x.safetensors", "textual_inversion")
    assert [*Lora.load(tmp_path/"x.safetensors").embeddings] == [word]


def test_the_first_textual_inversions(tmp_path):
    "A ParameterDict, as the original program saved it, in its own and in today's layout"
    from torch.nn import Parameter, ParameterDict
    vectors = torch.randn(3, 8)
    today = ParameterDict({"*": Parameter(vectors)})
    first = ParameterDict(); first.__dict__.update(_parameters={"*": Parameter(vectors)}); first.__dict__.pop("_keys", None)
    for i, params in enumerate((today, first)):
        torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": params}, tmp_path/f"style{i}.pt")
        got = Lora.load(tmp_path/f"style{i}.pt").embeddings
        assert [*got] == [f"style{i}"] and got[f"style{i}"]["text_encoder"].equal(vectors) and not got[f"style{i}"]["text_encoder"].requires_grad


@pytest.mark.parametrize("step", [np.int64(500), np.float32(.5), np.float64(1e-3), np.bool_(True)], ids=repr)
def test_scalars_of_numpy_beside_the_vectors(tmp_path, step):
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 8)}, "name": "web", "step": step}, tmp_path/"w.pt")
    assert [*Lora.load(tmp_path/"w.pt").embeddings] == ["web"]


def test_a_module_in_the_place_of_the_dictionary_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self): return print, ("ran",)
    for held in (Evil(), torch.nn.Linear(2, 2), np.array([1, Evil()], dtype=object)):
        torch.save({"string_to_param": {"*": torch.ones(1, 8)}, "name": held}, tmp_path/"evil.pt")
        refused("holds code", Lora.load, tmp_path/"evil.pt")


@pytest.mark.parametrize("names", (["prompt_embeddings"], ["768.0.linear1"], ["image_proj"], ["latents_mean", "latents_std"], ["mean", "std"]))
def test_vectors_of_other_things_are_no_words(tmp_path, names):
    save_file({n: torch.ones(2, 8) for n in names}, tmp_path/"x.safetensors")
    with pytest.raises(LoraError, match=f"x.safetensors: .*{names[0]}"): Lora.load(tmp_path/"x.safetensors")


def test_a_word_of_ours_may_have_any_name(tmp_path):
    lora = Lora({}, {"mean": {"text_encoder": torch.ones(2, 8)}})
    lora.save(tmp_path/"x.safetensors", "textual_inversion")
    assert Lora.load(tmp_path/"x.safetensors") == lora
