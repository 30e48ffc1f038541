"LoRAs of FLUX.1, FLUX.2 and Z-Image under their authors' names: out and in again, and by diffusers' own converters."
import re

import pytest
import torch
from diffusers import Flux2KleinPipeline, FluxPipeline, ZImagePipeline
from safetensors.torch import load_file, save_file
from torch import nn

from lora_nb.core import FormatError
from lora_nb.flow_files import FLOW_NAMES, flow_family, flow_paths
from lora_nb.formats import format_of, load_lora, read_file, save_lora
from lora_nb.injection import inject_lora
from lora_nb.lora import Factors, Lora
from lora_nb.random_pipes import random_pipe

PIPES = {"flux": FluxPipeline, "flux2": Flux2KleinPipeline, "zimage": ZImagePipeline}
FAMILY = {"flux": "FLUX", "flux2": "FLUX.2", "zimage": "Z-Image"}


@pytest.fixture(scope="module")
def pipes(): return {f: random_pipe(f) for f in PIPES}


def lora_of(pipe, targets="all-linear", rank=2, alpha=None, **parts):
    torch.manual_seed(0)
    worn = inject_lora(pipe, {"transformer": targets, **parts}, rank=rank, alpha=alpha)
    for p in worn.params(): p.data.normal_()
    lora = worn.lora(); worn.remove()
    return lora


@pytest.mark.parametrize("alpha", (None, 1., 3.))
@pytest.mark.parametrize("style", ("kohya", "comfy"))
@pytest.mark.parametrize("family", PIPES)
def test_out_and_in_again(family, style, alpha, pipes, tmp_path):
    lora, path = lora_of(pipes[family], alpha=alpha), tmp_path / "a.safetensors"
    save_lora(lora, path, style, base=pipes[family])
    assert format_of(*read_file(path)) == style
    again = load_lora(path, base=pipes[family])
    assert set(again.layers) == set(lora.layers)
    for n, f in lora.layers.items(): assert torch.allclose(again.layers[n].delta(), f.delta(), atol=1e-5), n
    folded = style == "comfy" and family != "flux"                 # there alpha is multiplied into the factors
    if alpha != 3. or not folded: assert all(again.layers[n] == f for n, f in lora.layers.items())
    assert load_lora(path).layers.keys() == lora.layers.keys()     # without a base, too


@pytest.mark.parametrize("style", ("kohya", "comfy"))
def test_text_encoders_of_flux(style, pipes, tmp_path):
    lora = lora_of(pipes["flux"], "attention", text_encoder="attention", text_encoder_2="attention")
    save_lora(lora, tmp_path / "a.safetensors", style, base=pipes["flux"])
    assert load_lora(tmp_path / "a.safetensors") == lora


def attention(family, lora):
    "What diffusers' converters know, at the sizes of a small model"
    odd = {"flux": r"norm_out|proj_out$|proj_mlp|single_transformer_blocks.*attn", "flux2": r"norm_out|modulation|norm|time_guidance",
           "zimage": r"all_|cap_embedder|t_embedder|context_refiner|noise_refiner|adaLN"}[family]
    return Lora({n: f for n, f in lora.layers.items() if not re.search(odd, n)})


@pytest.mark.parametrize("style", ("kohya", "comfy"))
@pytest.mark.parametrize("family", PIPES)
def test_diffusers_reads_the_same(family, style, pipes, tmp_path):
    "FLUX.1's single blocks are left out here: diffusers cuts them at 3072 rows; see below at true width"
    lora = attention(family, lora_of(pipes[family], alpha=1.))
    assert len(lora) > 8
    save_lora(lora, tmp_path / "a.safetensors", style, base=pipes[family])
    found = PIPES[family].lora_state_dict(tmp_path, weight_name="a.safetensors")
    if isinstance(found, tuple): found = found[0]
    found = {k if k.startswith("transformer.") else f"transformer.{k}": t for k, t in found.items()}     # forgotten by diffusers in FLUX's top
    theirs = {k.removesuffix(".lora_A.weight") for k in found if k.endswith("lora_A.weight")}
    assert theirs == set(lora.layers)
    for n, f in lora.layers.items():
        assert torch.allclose(found[f"{n}.lora_B.weight"] @ found[f"{n}.lora_A.weight"], f.delta(), atol=1e-4), n


def test_the_single_blocks_of_flux_at_true_width(tmp_path):
    layers = {f"transformer.single_transformer_blocks.37.{n}": Factors(torch.randn(rows, 2), torch.randn(2, columns), 1.)
              for n, rows, columns in (("attn.to_q", 3072, 3072), ("attn.to_k", 3072, 3072), ("attn.to_v", 3072, 3072),
                                       ("proj_mlp", 12288, 3072), ("proj_out", 3072, 15360), ("norm.linear", 9216, 3072))}
    lora = Lora({**layers, "transformer.proj_out": Factors(torch.randn(64, 2), torch.randn(2, 3072))})
    save_lora(lora, tmp_path / "a.safetensors", "kohya")
    assert load_lora(tmp_path / "a.safetensors") == lora
    found = FluxPipeline.lora_state_dict(tmp_path, weight_name="a.safetensors")
    for n, f in layers.items():
        assert torch.allclose(found[f"{n}.lora_B.weight"] @ found[f"{n}.lora_A.weight"], f.delta(), atol=1e-3), n


def test_a_shared_down_is_read_as_diffusers_reads_it(tmp_path):
    "A file of a trainer that adapts the fused matrix itself"
    torch.manual_seed(0)
    names = {"double_blocks_3_img_attn_qkv": (9216, 3072), "single_blocks_5_linear1": (21504, 3072), "double_blocks_3_txt_mlp_2": (3072, 12288)}
    tensors = {}
    for n, (rows, columns) in names.items():
        tensors |= {f"lora_unet_{n}.lora_up.weight": torch.randn(rows, 4), f"lora_unet_{n}.lora_down.weight": torch.randn(4, columns),
                    f"lora_unet_{n}.alpha": torch.tensor(2.)}
    save_file(tensors, tmp_path / "a.safetensors")
    mine, found = load_lora(tmp_path / "a.safetensors"), FluxPipeline.lora_state_dict(tmp_path, weight_name="a.safetensors")
    assert {k.removesuffix(".lora_A.weight") for k in found if "lora_A" in k} == set(mine.layers) and len(mine) == 8
    for n, f in mine.layers.items():
        assert torch.allclose(found[f"{n}.lora_B.weight"] @ found[f"{n}.lora_A.weight"], f.delta(), atol=1e-3), n


def test_every_module_of_the_models_is_in_the_dictionary(pipes):
    for family, pipe in pipes.items():
        known = {p for paths in FLOW_NAMES[FAMILY[family]].values() for p in paths}
        linear = {re.sub(r"(_blocks|layers|refiner)\.\d+", r"\1.#", n) for n, m in pipe.transformer.named_modules() if isinstance(m, nn.Linear)}
        assert linear <= known, linear - known


@pytest.mark.parametrize("key, family", [
    ("lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight", "FLUX"), ("diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight", "FLUX"),
    ("diffusion_model.double_stream_modulation_img.lin.lora_A.weight", ""), ("diffusion_model.layers.0.attention.to_q.lora_A.weight", "Z-Image"),
    ("lora_unet_layers_0_feed_forward_w1.lora_down.weight", "Z-Image"), ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", ""),
    ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight", ""),
    ("lora_transformer_single_transformer_blocks_0_attn_to_q.alpha", "FLUX")])
def test_families_by_names(key, family): assert flow_family({key: torch.ones(2, 2)}) == family


def test_plain_files_of_diffusers_stay_peft(pipes, tmp_path):
    for family, pipe in pipes.items():
        lora = lora_of(pipe, "attention")
        lora.save(tmp_path / f"{family}.safetensors")
        assert format_of(*read_file(tmp_path / f"{family}.safetensors")) == "peft"
        if family == "zimage": continue                                   # without a prefix its names are not known to be a LoRA's
        bare = {k.removeprefix("transformer."): t for k, t in load_file(tmp_path / f"{family}.safetensors").items()}
        save_file(bare, tmp_path / "bare.safetensors")
        assert set(load_lora(tmp_path / "bare.safetensors", base=pipe).layers) == set(lora.layers)


def test_what_does_not_fit_is_named(pipes, tmp_path):
    lora = lora_of(pipes["flux"], "attention")
    odd = Lora({**lora.layers, "transformer.single_transformer_blocks.0.something": Factors(torch.ones(4, 1), torch.ones(1, 4))})
    with pytest.raises(FormatError, match="without a name"): save_lora(odd, tmp_path / "a.safetensors", "kohya", base=pipes["flux"])
    assert not (tmp_path / "a.safetensors").exists()
    save_file({"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(24, 2),
               "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 8),
               "lora_unet_double_blocks_0_img_nonsense.lora_up.weight": torch.ones(2, 2)}, tmp_path / "b.safetensors")
    with pytest.raises(FormatError, match="no known place.*nonsense"): load_lora(tmp_path / "b.safetensors")
    assert flow_paths("lora_unet_double_blocks_0_img_nonsense", "FLUX") == ()
