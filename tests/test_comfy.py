"Names of ComfyUI and OneTrainer: every form of one LoRA is the same value, judged by diffusers' converters of whole checkpoints."
import re

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_sd3_transformer_checkpoint_to_diffusers
from helpers_files import pair, random_lora
from safetensors.torch import load_file, save_file

from lora_nb.comfy import write_comfy
from lora_nb.core import FormatError, LoraError
from lora_nb.formats import format_of, read_file
from lora_nb.kohya import swap_halves
from lora_nb.lora import Factors, Lora
from lora_nb.peft_files import base_layers
from lora_nb.random_pipes import random_pipe

PIPES = {f: random_pipe(f) for f in ("sd", "sdxl", "sd3")}


def refused(match, f, *args, exc=LoraError, **kw):
    with pytest.raises(exc, match=match): f(*args, **kw)


@pytest.fixture
def load(tmp_path):
    "Load a file of these tensors"
    def load(tensors, **kw):
        save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path/"w.safetensors")
        return Lora.load(tmp_path/"w.safetensors", **kw)
    return load


def written(lora, tmp_path, format, base, **kw):
    "The tensors of a file that we wrote, without its note"
    lora.save(tmp_path/"t.safetensors", format, base=base, **kw)
    return load_file(tmp_path/"t.safetensors")


def respelled(tensors, *rules):
    "The tensors under keys in which each (pattern, text) is replaced"
    for pattern, text in rules: tensors = {re.sub(pattern, text, k): t for k, t in tensors.items()}
    return tensors


def one_rank(base, seed=0):
    "Rank 2 and alpha 1 everywhere: fused projections need no note to come back"
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g)
    shapes = {n: m.weight.shape for n, m in base_layers(base).items()}
    return Lora({n: Factors(rand(w[0], 2, *[1] * (len(w) - 2)), rand(2, *w[1:]), 1.) for n, w in shapes.items()})


def same(a, b, eps=1e-5):
    assert set(a.layers) == set(b.layers)
    for n, f in a.layers.items(): assert torch.allclose(f.delta(), b.layers[n].delta(), atol=eps, rtol=eps), n


# the programs' spellings, from ComfyUI's
FORMS = {
    "ComfyUI saves": [],
    "OneTrainer, Comfy": [(r"lora_up\.weight$", "lora_B.weight"), (r"lora_down\.weight$", "lora_A.weight")],
    "OneTrainer, OMI": [(r"^diffusion_model\.(?=joint|x_emb|context_emb|final|[ty]_emb)", "transformer."), (r"^diffusion_model\.", "unet."),
                        (r"^text_encoders\.(clip_[lg])\.transformer", r"\1"), (r"^text_encoders\.t5xxl\.transformer", "t5")],
    "PEFT's adapter name": [(r"lora_up\.weight$", "lora_B.default.weight"), (r"lora_down\.weight$", "lora_A.default.weight")],
    "a checkpoint's prefix": [(r"^diffusion_model\.", "model.diffusion_model.")],
    "kohya's prefix": [(r"^diffusion_model\.", "lora_unet."), (r"^text_encoders\.clip_l\.transformer", "lora_te1"),
                       (r"^text_encoders\.clip_g\.transformer", "lora_te2"), (r"^text_encoders\.t5xxl\.transformer", "lora_te3")],
    "text encoders under diffusers' names": [(r"^text_encoders\.clip_l\.transformer", "text_encoder"),
                                             (r"^text_encoders\.clip_g\.transformer", "text_encoder_2"),
                                             (r"^text_encoders\.t5xxl\.transformer", "text_encoder_3")]}


@pytest.mark.parametrize("family", PIPES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_one_lora(form, family, tmp_path, load):
    pipe = PIPES[family]
    lora = one_rank(pipe)
    tensors = respelled(written(lora, tmp_path, "comfy", pipe), *FORMS[form])
    assert format_of(tensors) == "comfy"
    same(load(tensors, base=pipe), lora)


def test_the_original_form_has_no_prefix(tmp_path, load):
    for family in PIPES:
        lora = one_rank(PIPES[family]).only("unet", "transformer")
        tensors = respelled(written(lora, tmp_path, "comfy", PIPES[family]), (r"^diffusion_model\.", ""), *FORMS["OneTrainer, Comfy"])
        same(load(tensors, base=PIPES[family]), lora)


def test_onetrainer_keeps_query_key_and_value_apart(tmp_path, load):
    lora, tensors = one_rank(PIPES["sd3"]), {}
    names = {"to_q": "x_block.attn.qkv.0", "to_k": "x_block.attn.qkv.1", "to_v": "x_block.attn.qkv.2", "add_q_proj": "context_block.attn.qkv.0"}
    for own, omi in names.items():
        f = lora.layers[f"transformer.transformer_blocks.0.attn.{own}"]
        tensors |= {f"transformer.joint_blocks.0.{omi}.{k}": t for k, t in (("lora_up.weight", f.up), ("lora_down.weight", f.down),
                                                                           ("alpha", torch.tensor(1.)))}
    same(load(tensors), Lora({n: lora.layers[n] for n in (f"transformer.transformer_blocks.0.attn.{x}" for x in names)}))


def test_our_file_comes_back_as_it_was(tmp_path):
    for family, pipe in PIPES.items():
        lora = random_lora(pipe, embeddings={"<a>": {"text_encoder": torch.randn(1, 32)}}, metadata={"base": "x", "ss_tag_frequency": "{}"})
        lora.save(tmp_path/"c.safetensors", "comfy", base=pipe)
        assert Lora.load(tmp_path/"c.safetensors", base=pipe) == lora
        assert Lora.load(tmp_path/"c.safetensors", base=pipe).metadata == lora.metadata


def test_the_checkpoint_converter_finds_our_names_for_sd3(tmp_path):
    "Each written delta, put into a checkpoint of Stability's, arrives where the LoRA has it"
    lora, state = one_rank(PIPES["sd3"]).only("transformer"), {}
    tensors = written(lora, tmp_path, "comfy", PIPES["sd3"])
    for key in {k.rsplit(".lora_", 1)[0] for k in tensors if ".lora_" in k}:
        up, down = tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"]
        scale = tensors[f"{key}.alpha"].item() / len(down)
        state[f"{key.removeprefix('diffusion_model.')}.weight"] = torch.einsum("or,r...->o...", up.flatten(1), down) * scale
    state |= {k.replace("weight", "bias"): torch.zeros(len(d)) for k, d in state.items()}
    norms = [f"{i}.{b}.attn.ln_{x}" for i in range(2) for b in ("x_block", "context_block") for x in "qk"]
    state |= {f"joint_blocks.{n}.weight": torch.ones(8) for n in [*norms, "0.x_block.attn2.ln_q", "0.x_block.attn2.ln_k"]}
    judged = convert_sd3_transformer_checkpoint_to_diffusers(state | {"pos_embed": torch.zeros(1, 144, 16)})
    for n, f in lora.layers.items(): assert torch.allclose(judged[f"{n.removeprefix('transformer.')}.weight"], f.delta(), atol=1e-5), n


def test_the_checkpoint_converter_finds_our_names_for_sd1():
    "Without a base, too: the upsampler of SD1's first up block is output_blocks.2.1, where SDXL's is 2.2"
    names = [f"unet.{p}" for p in ("conv_in", "conv_out", "time_embedding.linear_1", "down_blocks.0.downsamplers.0.conv",
             "up_blocks.0.upsamplers.0.conv", "up_blocks.1.upsamplers.0.conv", "mid_block.attentions.0.proj_in", "mid_block.resnets.1.conv1",
             *(f"{side}_blocks.{b}.attentions.1.transformer_blocks.0.attn2.to_k" for side, bs in (("down", (0, 1, 2)), ("up", (1, 2, 3)))
               for b in bs), "down_blocks.3.resnets.1.conv2", "up_blocks.0.resnets.2.conv_shortcut")]
    lora = Lora({n: Factors(torch.ones(320, 1, 1, 1), torch.ones(1, 320, 1, 1)) if "conv" in n or "proj_in" in n else pair(320, 1, 768)
                 for n in names})
    keys = [k.removesuffix(".lora_up.weight") for k in write_comfy(lora)[0] if k.endswith("up.weight")]
    assert "diffusion_model.output_blocks.2.1.conv" in keys and "diffusion_model.output_blocks.5.2.conv" in keys
    filler = {f"model.diffusion_model.{side}_blocks.{i}.0.in_layers.2.{w}": torch.tensor(-1) for side in ("input", "output")
              for i in range(12) for w in ("weight", "bias")}
    filler |= {f"model.diffusion_model.middle_block.{i}.norm.{w}": torch.tensor(-1) for i in range(3) for w in ("weight", "bias")}
    marks = filler | {f"model.{k}.{w}": torch.tensor(i) for i, k in enumerate(keys) for w in ("weight", "bias")}
    for w in ("time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2"):
        for end in ("weight", "bias"): marks.setdefault(f"model.diffusion_model.{w}.{end}", torch.tensor(-1))
    judged = convert_ldm_unet_checkpoint(marks, dict(layers_per_block=2))
    assert [judged[f"{n.removeprefix('unet.')}.weight"].item() for n in names] == list(range(len(names)))


def test_dora_and_lokr_under_dotted_names(load):
    n, key = "transformer.transformer_blocks.0.ff.net.2", "diffusion_model.joint_blocks.0.x_block.mlp.fc2"
    f = Factors(torch.randn(6, 2), torch.randn(2, 8), 1., torch.rand(6))
    got = load({f"{key}.lora_A.weight": f.down, f"{key}.lora_B.weight": f.up, f"{key}.alpha": torch.tensor(1.),
                f"{key}.lora_magnitude_vector": f.magnitude})
    assert got.layers[n].magnitude.equal(f.magnitude) and got.layers[n].up.equal(f.up)
    w1, w2 = torch.randn(2, 2), torch.randn(3, 4)
    got = load({f"{key}.lokr_w1": w1, f"{key}.lokr_w2": w2})
    assert torch.allclose(got.layers[n].delta(), torch.kron(w1, w2), atol=1e-6)


def half(key, out=16, n=16): return {f"{key}.lora_down.weight": torch.randn(2, n), f"{key}.lora_up.weight": torch.randn(out, 2)}


@pytest.mark.parametrize("key", ["unet.output_blocks.95.1.proj_in", "diffusion_model.input_blocks.4.1.nothing", "joint_blocks.0.x_block.attn.qqq",
                                 "diffusion_model.input_blocks.4.0.op", "unet.middle_block.7.proj_in",
                                 "clip_l.text_model.encoder.layer.0.mlp.fc1",
                                 "unet.output_blocks.3.0.proj_in", "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding",
                                 "unet.down_block.0.attentions.0.proj_in", "transformer.blocked.0.attn.to_q", "text_encoder.layers_0.q_proj"])
def test_a_path_that_no_model_has_is_an_error_on_reading(key, load):
    refused(re.escape(key), load, half(key), exc=FormatError)


@pytest.mark.parametrize("key, family", [("diffusion_model.blocks.0.self_attn.q", "Wan"),
                                         ("lora_prior_unet_down_blocks_0_1_attn", "Cascade"),
                                         ("lora_unet_blocks_0_cross_attn_kv_linear", "PixArt")])
def test_a_family_that_is_not_read_is_named(key, family, load): refused(family, load, half(key), exc=FormatError)


def test_a_lora_behind_a_checkpoints_prefix_is_none(load):
    assert len(load(half("model.diffusion_model.input_blocks.4.1.proj_in"))) == 1
    refused("whole model", load, {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1, 2)})


def test_a_module_twice_is_an_error(load):
    refused("same tensor", load, half("unet.input_blocks.4.1.proj_in") | half("diffusion_model.input_blocks.4.1.proj_in"))


@pytest.mark.parametrize("prefix", ["lora_transformer", "lycoris"])
@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_onetrainers_sd3_rows_are_diffusers(kind, prefix, load):
    "norm_out and the last norm1_context: diffusers' names mean diffusers' rows, only Stability's names have the halves swapped"
    layers, tensors, g = {}, {}, torch.Generator().manual_seed(0)
    for n, m in base_layers({"transformer": PIPES["sd3"].transformer}).items():
        if m.weight.ndim > 2: continue
        key, (out, n_in) = f"{prefix}_{n.partition('.')[2].replace('.', '_')}", m.weight.shape
        if kind == "lokr": p = {"lokr_w1": torch.randn(2, 2, generator=g), "lokr_w2": torch.randn(out // 2, n_in // 2, generator=g)}
        else: p = {"lora_up.weight": torch.randn(out, 2, generator=g), "lora_down.weight": torch.randn(2, n_in, generator=g)}
        if kind == "dora": p["dora_scale"] = torch.rand(out, 1, generator=g)
        layers[n] = torch.kron(*p.values()) if kind == "lokr" else p["lora_up.weight"] @ p["lora_down.weight"]
        tensors |= {f"{key}.{k}": t for k, t in p.items()}
    got = load(tensors, base=PIPES["sd3"])
    last = [n for n in got.layers if "norm_out" in n or n.endswith("blocks.1.norm1_context.linear")]
    assert len(last) == 2 and set(got.layers) == set(layers)
    for n, f in got.layers.items():
        if kind != "dora": assert torch.allclose(f.delta(), layers[n], atol=1e-4), n
        else: assert f.magnitude.equal(tensors[f"{prefix}_{n.partition('.')[2].replace('.', '_')}.dora_scale"].flatten()) and f.up.equal(
            tensors[f"{prefix}_{n.partition('.')[2].replace('.', '_')}.lora_up.weight"])


def test_stabilitys_names_have_swapped_halves(load):
    for key in ("lora_unet_final_layer_adaLN_modulation_1", "lycoris_final_layer_adaLN_modulation_1", "final_layer.adaLN_modulation.1"):
        up, down = torch.randn(32, 2), torch.randn(2, 16)
        got = load({f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down})
        assert got.layers["transformer.norm_out.linear"].up.equal(swap_halves(Factors(up, down)).up)


def test_metadata_of_a_comfy_file_names_the_family(tmp_path):
    "SD2's text encoder is clip_h there"
    te = Lora({"text_encoder.encoder.layers.0.mlp.fc1": pair(4096, 1, 1024),
               "text_encoder.encoder.layers.0.self_attn.q_proj": pair(1024, 1, 1024)})
    te.save(tmp_path/"h.safetensors", "comfy")
    tensors, metadata = read_file(tmp_path/"h.safetensors")
    assert all(k.startswith("text_encoders.clip_h.transformer.text_model.encoder.") for k in tensors)
    assert metadata["ss_base_model_version"] == "sd_v2" and metadata["ss_v2"] == "True"
    assert Lora.load(tmp_path/"h.safetensors") == te
