import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers_files import TO_Q, random_lora
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from lora_nb.core import FormatError, ShapeError, TargetError
from lora_nb.injection import apply_lora, remove_lora
from lora_nb.lora import Factors, Lora
from lora_nb.peft_files import config_alpha, fit_base, fold_alpha, group_parts, peft_faults, read_peft, refuse, split_key, to_factors
from lora_nb.random_pipes import random_pipe


def refused(match, f, *args, exc=FormatError, **kw):
    with pytest.raises(exc, match=match): f(*args, **kw)


def close(a, b, eps=1e-4): assert torch.allclose(a, b, atol=eps, rtol=eps), (a - b).abs().max()


@pytest.fixture(scope="module")
def pipe():
    pipe = random_pipe("sd")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe):
    g = torch.Generator().manual_seed(1)
    return pipe("a mascot", num_inference_steps=2, guidance_scale=1., output_type="pt", generator=g).images[0]


def test_spellings():
    attn = "mid_block.attentions.0.transformer_blocks.0.attn1"
    assert split_key(f"unet.{attn}.processor.to_out_lora.up.weight") == (f"unet.{attn}.to_out.0", "up")
    assert split_key(f"unet.{attn}.to_q.lora_magnitude_vector.default.weight") == (f"unet.{attn}.to_q", "magnitude")
    assert split_key(f"unet.{attn}.to_q.lora.alpha") == (f"unet.{attn}.to_q", "alpha")
    assert split_key("first_stage_model.decoder.conv_in.weight") is None
    assert split_key("") is None and split_key("unet.conv_in.weight") is None


def test_parts_that_do_not_fit():
    refused("alpha has shape", to_factors, "m", dict(up=torch.ones(4, 1), down=torch.ones(1, 4), alpha=torch.ones(2)), exc=ShapeError)
    refused("magnitude has shape", to_factors, "m", dict(up=torch.ones(4, 1), down=torch.ones(1, 4), magnitude=torch.ones(3)), exc=ShapeError)
    refused("floating-point", to_factors, "m", dict(up=torch.ones(4, 1).int(), down=torch.ones(1, 4)))
    refused(r"expected \(out, r\)", to_factors, "m", dict(up=torch.ones(4, 0), down=torch.ones(0, 4)), exc=ShapeError)
    refused("no up", to_factors, "m", dict(down=torch.ones(1, 4)))
    refused("two tensors", group_parts, {"unet.a.lora_A.weight": 0, "unet.a.lora.down.weight": 0})


def test_the_configuration_of_peft_gives_alpha():
    name, up, down = "transformer.transformer_blocks.0.attn.to_q", torch.randn(16, 4), torch.randn(4, 16)
    config = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.target_modules": ["to_q"], "transformer.alpha_pattern": {}}
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    for alpha, extra in ((8, {}), (2, {"transformer.alpha_pattern": {"attn.to_q": 2}}), (16, {"transformer.use_rslora": True})):
        lora = read_peft(tensors, {"lora_adapter_metadata": json.dumps(config | extra)})
        close(lora.layers[name].delta(), up @ down * alpha / 4, 1e-5)
    refused("not JSON", read_peft, tensors, {"lora_adapter_metadata": "{"})
    assert config_alpha({}, "x", 4) is None and config_alpha({"r": 4}, "x", 4) is None


@pytest.mark.parametrize("alpha", [None, 1., 2., 3., .1, 0., -2.])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_folded_alpha(alpha, dtype):
    torch.manual_seed(0)
    f = Factors(torch.randn(6, 4).to(dtype), torch.randn(4, 5).to(dtype), alpha)
    up, kept = fold_alpha(f)
    close(Factors(up, f.down).delta(), f.delta(), 2e-2 if dtype != torch.float32 else 1e-6)
    assert kept == (alpha if alpha in (1., 2.) else None)


def fill(model, targets, **kw):
    "Give a model peft's layers with random numbers; returns what diffusers would save"
    model.add_adapter(LoraConfig(target_modules=targets, **kw))
    for n, p in model.named_parameters():
        if "lora_B" in n: nn.init.normal_(p, std=.3)
    return get_peft_model_state_dict(model, adapter_name="default"), model.peft_config["default"].to_dict()


@pytest.mark.parametrize("kw", [dict(use_dora=True), dict(lora_alpha=8, use_rslora=True), dict(lora_alpha=6, alpha_pattern={"attn1.to_q": 1})])
def test_what_peft_draws_we_draw(pipe, tmp_path, kw):
    torch.manual_seed(5)
    state = {}
    for c, targets in dict(unet=["to_q", "to_v", "conv1", "ff.net.0.proj"], text_encoder=["q_proj", "out_proj"]).items():
        state[f"{c}_lora_layers"], state[f"{c}_lora_adapter_metadata"] = fill(getattr(pipe, c), targets, r=4, **{"lora_alpha": 4, **kw})
    pipe.save_lora_weights(tmp_path, **state)
    theirs = draw(pipe)
    pipe.unload_lora_weights()
    for _ in range(2):                            # as peft wrote it, and after one trip through our writer
        back = Lora.load(tmp_path, base=pipe)
        apply_lora(pipe, back)
        close(draw(pipe), theirs)
        remove_lora(pipe)
        back.save(tmp_path/"pytorch_lora_weights.safetensors")
    pipe.load_lora_weights(tmp_path)
    close(draw(pipe), theirs)
    pipe.unload_lora_weights()


def test_a_folder_of_peft_alone(tmp_path):
    pipe = random_pipe("sd")
    wrapped = get_peft_model(pipe.unet, LoraConfig(r=2, lora_alpha=8, target_modules=["to_q"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path)
    want = wrapped.base_model.model.get_submodule(TO_Q.removeprefix("unet.")).get_delta_weight("default")
    close(Lora.load(tmp_path, base=random_pipe("sd")).layers[TO_Q].delta(), want, 1e-5)


def test_sd3_in_plain_diffusers(tmp_path):
    pipe = random_pipe("sd3")
    net = pipe.transformer
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, net.config.in_channels, 8, 8, generator=g)
    c, p = torch.randn(1, 3, net.config.joint_attention_dim, generator=g), torch.randn(1, net.config.pooled_projection_dim, generator=g)
    run = lambda: net(x, encoder_hidden_states=c, pooled_projections=p, timestep=torch.tensor([500.]), return_dict=False)[0].detach()
    bare = run()
    lora = random_lora(pipe, lambda n: n.startswith("transformer.") and ".attn" in n)
    lora.map(lambda f: Factors(f.up * .3, f.down, f.alpha)).save(tmp_path/"a.safetensors")
    apply_lora(pipe, Lora.load(tmp_path/"a.safetensors", base=pipe)); ours = run(); remove_lora(pipe)
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors"); theirs = run(); pipe.unload_lora_weights()
    close(ours, theirs, 1e-3)
    assert run().equal(bare) and (ours - bare).abs().max() > .01
    layers, config = fill(net, ["to_q", "add_k_proj", "to_out.0"], r=4, lora_alpha=6)
    theirs = run()
    pipe.save_lora_weights(tmp_path/"b", transformer_lora_layers=layers, transformer_lora_adapter_metadata=config)
    pipe.unload_lora_weights()
    apply_lora(pipe, Lora.load(tmp_path/"b", base=pipe))
    close(run(), theirs, 1e-3)
    remove_lora(pipe)


def test_what_peft_cannot_hold():
    mixed = Lora({n: Factors(torch.ones(4, 1), torch.ones(1, 4), None, m) for n, m in (("unet.a", torch.ones(4)), ("unet.b", None))})
    refused("DoRA in only some layers", refuse, "peft", peft_faults(mixed))
    grouped = Lora({"unet.conv_in": Factors(torch.ones(4, 2, 1, 1), torch.ones(2, 2, 1, 1), None, groups=2)})
    refused("grouped", refuse, "peft", peft_faults(grouped))
    mid = Lora({"unet.conv_in": Factors(torch.ones(4, 2, 1, 1), torch.ones(2, 2, 1, 1), mid=torch.ones(2, 2, 3, 3))})
    refused("middle factor", refuse, "peft", peft_faults(mid))


def test_held_against_a_base(pipe):
    proj = "unet.down_blocks.0.attentions.0.proj_in"
    square = Factors(torch.randn(16, 2), torch.randn(2, 16))
    fitted = fit_base(Lora({proj: square}), pipe).layers[proj]
    assert fitted.shape == (16, 16, 1, 1) and fitted.delta().flatten(1).equal(square.delta())
    refused("is for SDXL", fit_base, Lora({proj: Factors(torch.ones(8, 1), torch.ones(1, 8))}, metadata={"base": "SDXL"}), pipe, exc=ShapeError)
    refused("1 of 1 modules are not in this base", fit_base, Lora({"unet.x": square}), pipe, exc=TargetError)
    with pytest.raises(ShapeError):                                    # a 3x3 convolution has no linear form
        fit_base(Lora({"unet.conv_in": Factors(torch.ones(16, 1), torch.ones(1, 4))}), pipe)


def test_groups_come_from_the_base():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    lora = Lora({"unet.0": Factors(torch.randn(8, 2, 1, 1), torch.randn(2, 2, 3, 3))})
    assert fit_base(lora, {"unet": model}).layers["unet.0"].groups == 2


def test_an_adapter_config_counts_whatever_the_file_is_called(tmp_path):
    tensors = {f"{TO_Q}.lora_A.weight": torch.ones(2, 4), f"{TO_Q}.lora_B.weight": torch.ones(4, 2)}
    (tmp_path/"adapter_config.json").write_text('{"lora_alpha": 8, "r": 2}')
    for name in ("adapter_model", "renamed"):
        save_file(tensors, tmp_path/f"{name}.safetensors")
        torch.save(tensors, tmp_path/f"{name}.bin")
        for end in ("safetensors", "bin"):
            f = Lora.load(tmp_path/f"{name}.{end}").layers[TO_Q]
            assert f.scaling == 4 and f.delta().equal(torch.full((4, 4), 8.))
    (tmp_path/"adapter_config.json").write_text('{"lora_alpha": 8, "r": 4}')
    refused("configuration of another file", Lora.load, tmp_path/"renamed.safetensors")
    small = Lora({TO_Q: Factors(torch.ones(16, 2), torch.ones(2, 16))})
    small.save(tmp_path/"ours.safetensors")                                 # our own note counts
    assert Lora.load(tmp_path/"ours.safetensors") == small
