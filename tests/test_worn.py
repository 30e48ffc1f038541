import pytest
import torch
from helpers_ground import tiny_unet
from torch import nn

from lora_nb.layers import LoraInjectedLinear
from lora_nb.lora import Factors
from lora_nb.stored import root_module, stack_of
from lora_nb.worn import (branch_index, branches, component_of, detach_branches, layer_factors, original_weight, places,
                          resolve_components, summed_weight)


class Box(nn.Module): pass
class CLIPTextModel(nn.Module): pass
class SD3Transformer2DModel(nn.Module): pass


def text_models():
    "The same layer, as transformers 4 and as transformers 5 nest it"
    old, new = nn.Module(), nn.Module()
    old.text_model = nn.Module(); old.text_model.fc1 = nn.Linear(2, 2); new.fc1 = nn.Linear(2, 2)
    return old, new


def test_one_name_for_transformers_4_and_5():
    old, new = text_models()
    assert list(places(old)) == list(places(new)) == ["fc1"]


def test_components_by_class():
    assert [component_of(k()) for k in (CLIPTextModel, SD3Transformer2DModel, Box)] == ["text_encoder", "transformer", "unet"]


def test_components_of_a_pipeline_and_of_a_base():
    pipe = type("Pipe", (), {})(); pipe.unet, pipe.text_encoder, pipe.vae = nn.Linear(1, 1), text_models()[1], nn.Linear(1, 1)
    base = type("Base", (), {})(); base.pipe = pipe
    assert list(resolve_components(pipe)) == list(resolve_components(base)) == ["unet", "text_encoder"]
    with pytest.raises(ValueError, match="expected a diffusers pipeline"): resolve_components("tiny-sd")


def stacked():
    "A model whose one linear wears two branches"
    model = nn.Sequential(nn.Linear(8, 6))
    inner = LoraInjectedLinear.from_base(model[0], 2); inner.adapter = "a"
    outer = LoraInjectedLinear.from_base(inner, 3); outer.adapter = "b"
    model[0] = outer
    return model, outer, inner


def test_stacks():
    model, outer, inner = stacked()
    assert stack_of(model[0]) == [outer, inner] and root_module(outer) is inner.linear
    assert branches(model, "a") == {"unet.0": [inner]} and stack_of(nn.Linear(1, 1)) == []


@pytest.mark.parametrize("name, left", [("a", ["b"]), ("b", ["a"]), (None, [])])
def test_detaching_from_the_middle_of_a_stack(name, left):
    model, outer, inner = stacked()
    detach_branches(places(model)["0"], name)
    assert [m.adapter for m in stack_of(model[0])] == left and root_module(model[0]) is inner.linear


def test_the_index_notices_what_came_and_went():
    model, outer, inner = stacked()
    assert branch_index(model) == {"a": {"0": inner}, "b": {"0": outer}}
    assert branch_index(model) is branch_index(model)                      # looked up once
    model[0] = inner
    assert branch_index(model) == {"a": {"0": inner}}
    top = LoraInjectedLinear.from_base(inner, 1); top.adapter = "c"
    model[0] = top
    assert set(branch_index(model)) == {"a", "c"}


@pytest.mark.parametrize("options", [dict(), dict(alpha=8), dict(rslora=True, alpha=2), dict(scale=.3),
                                     dict(init="pissa")], ids=str)
def test_factors_of_a_layer(options):
    layer = LoraInjectedLinear.from_base(nn.Linear(8, 6), 2, **options)
    with torch.no_grad():
        for p in (layer.lora_up.weight, layer.lora_down.weight): p.normal_()
    assert torch.allclose(layer_factors(layer).delta(), layer.delta_weight(), atol=1e-5)


def test_factors_of_a_selected_layer():
    layer = LoraInjectedLinear.from_base(nn.Linear(8, 6), 2)
    nn.init.normal_(layer.lora_up.weight)
    layer.set_selector_from_diag([1., 0.])
    assert torch.allclose(layer_factors(layer).delta(), layer.delta_weight(), atol=1e-5)


def test_a_dora_at_another_scale_has_no_factors():
    layer = LoraInjectedLinear.from_base(nn.Linear(8, 6), 2, dora=True, scale=.5)
    with pytest.raises(ValueError, match="set its scale to 1"): layer_factors(layer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_round_once(dtype):
    linear = nn.Linear(8, 6).to(dtype)
    fs = [(Factors(torch.randn(6, 2), torch.randn(2, 8)), s) for s in (.5, -1, 2)]
    want = linear.weight.detach().double() + sum(s * f.delta().double() for f, s in fs)
    got = summed_weight(original_weight(linear), fs)
    assert got.dtype == dtype and torch.allclose(got.double(), want, atol=float(torch.finfo(dtype).eps) * 8)


def test_places_of_a_unet_are_its_linears_and_convolutions():
    unet = tiny_unet()
    kinds = [m for m in unet.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert len(places(unet)) == len(kinds)
