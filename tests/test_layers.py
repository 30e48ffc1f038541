from copy import deepcopy

import pytest
import torch
from torch import nn

from lora_nb.core import LoraError
from lora_nb.layers import LoraInjectedConv2d, LoraInjectedLinear, set_scales

torch.set_num_threads(1)
close = lambda a, b, eps=1e-5: torch.allclose(a, b, atol=eps, rtol=eps)
x, image = torch.randn(5, 48), torch.randn(2, 8, 9, 9)
KINDS = {"3x3": dict(kernel_size=3, padding=1), "1x1": dict(kernel_size=1), "strided": dict(kernel_size=3, stride=2),
         "dilated": dict(kernel_size=3, dilation=2, padding=2), "oblong": dict(kernel_size=(3, 1), padding="same"),
         "grouped": dict(kernel_size=3, groups=4), "depthwise": dict(kernel_size=3, groups=8)}


def pretend_trained(layer, std=.1):
    with torch.no_grad():
        for p in (layer.lora_up.weight, layer.lora_down.weight): p.normal_(std=std)
    return layer


def merged_copy(base, layer):
    base = deepcopy(base)
    base.weight.data = (base.weight.data + layer.delta_weight()).to(base.weight.dtype)
    return base


@pytest.mark.parametrize("r, says", [(33, "at most 32"), (0, "at least 1"), (2.5, "whole number"), (True, "whole number")])
def test_impossible_ranks(r, says):
    with pytest.raises(ValueError, match=says): LoraInjectedLinear.from_base(nn.Linear(48, 32), r=r)


def test_constructors_check_too():
    with pytest.raises(ValueError, match="rank 5"): LoraInjectedLinear(4, 4, r=5)
    with pytest.raises(ValueError, match="expected 'gaussian'"): LoraInjectedLinear(4, 4, r=2, init="zero")
    with pytest.raises(ValueError, match="at most 2"): LoraInjectedConv2d(2, 8, 3, r=4)
    base = nn.Linear(48, 32); LoraInjectedLinear.from_base(base)
    assert base.weight.requires_grad is False


def test_one_scale_for_each_layer():
    with pytest.raises(ValueError): set_scales([LoraInjectedLinear(4, 4), LoraInjectedLinear(4, 4)], [1.])


def test_a_diagonal_has_one_weight_for_each_rank():
    with pytest.raises(ValueError, match=r"expected \(4,\)"): LoraInjectedLinear(8, 8).set_selector_from_diag(torch.ones(3))


@pytest.mark.parametrize("kind", KINDS)
def test_selector_in_every_geometry(kind):
    layer = pretend_trained(LoraInjectedConv2d(8, 16, **KINDS[kind], r=3, dropout_p=0.))
    layer.set_selector_from_diag([1., .5, 0.])
    assert close(layer(image), merged_copy(layer.conv, layer)(image))
    up, down = layer.realize_as_lora()
    assert up.shape == (16, 3, 1, 1) and down.shape == (3, *layer.weight.shape[1:])


@pytest.mark.parametrize("scale", [1, .4, 0])
def test_dora_of_a_grouped_convolution(scale):
    conv = nn.Conv2d(8, 16, 3, padding=1, groups=2)
    layer = pretend_trained(LoraInjectedConv2d.from_base(conv, r=3, dora=True, alpha=2))
    layer.scale = scale
    assert close(layer(image), merged_copy(conv, layer)(image))


def test_dora_learns_magnitudes_and_is_no_pair_of_factors():
    layer = pretend_trained(LoraInjectedConv2d.from_base(nn.Conv2d(8, 16, 3), r=3, dora=True))
    layer(image).mean().backward()
    learns = {n for n, p in layer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learns == {"lora_down.weight", "lora_up.weight", "magnitude"}
    with pytest.raises(ValueError, match="magnitude would be lost"): layer.realize_as_lora()


@pytest.mark.parametrize("cls, base, inp", [(LoraInjectedLinear, nn.Linear(48, 32), x),
                                            (LoraInjectedConv2d, nn.Conv2d(8, 16, 3, groups=2), image)])
def test_pissa_at_every_scale_off_and_removed(cls, base, inp):
    before, want = base.weight.detach().clone(), base(inp).detach()
    layer = pretend_trained(cls.from_base(base, 4, init="pissa"))
    for s in (1, .3, 0):
        layer.scale = s
        twin = deepcopy(base); twin.weight.data = before + layer.delta_weight()
        assert close(layer(inp), twin(inp), 1e-4)
    layer.enabled = False
    assert close(layer(inp), want, 1e-4)
    with pytest.raises(ValueError, match="wears another LoRA"): cls.from_base(layer, 2, init="pissa")
    layer.restore_base()
    assert torch.equal(base.weight, before)


def answers(layer, x):
    "With and without gradients; what a hook on the base saw, and the base's own answer"
    with torch.no_grad(): quick = layer(x)
    seen = []
    hook = layer.base.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad(): watched, said = layer(x), layer.base(x)
    hook.remove()
    return quick, watched, layer(x).detach(), seen[0], said


def check_nobody_notices(layer, x):
    quick, watched, slow, seen, said = answers(layer, x)
    assert close(quick, slow) and close(watched, slow) and torch.equal(seen, said)


def test_in_place_additions_stay_unseen_in_a_stack():
    first = pretend_trained(LoraInjectedLinear.from_base(nn.Linear(48, 32), r=4))
    check_nobody_notices(pretend_trained(LoraInjectedLinear.from_base(first, r=2, scale=.5)), x)


@pytest.mark.parametrize("kw", [dict(kernel_size=1), dict(kernel_size=3, padding=1, stride=2),
                                dict(kernel_size=3, groups=2)], ids=str)
@pytest.mark.parametrize("img", [torch.randn(2, 8, 6, 6), torch.randn(8, 6, 6), torch.randn(2, 6, 6, 8).permute(0, 3, 1, 2)],
                         ids=["batch", "single", "channels last"])
def test_in_place_additions_stay_unseen_in_convolutions(kw, img):
    check_nobody_notices(pretend_trained(LoraInjectedConv2d.from_base(nn.Conv2d(8, 16, **kw), r=4)).eval(), img)


def test_autocast_gives_what_peft_gives():
    from peft import LoraConfig
    from peft.tuners.lora import layer as peft_layer
    layer = pretend_trained(LoraInjectedLinear.from_base(nn.Linear(48, 32), r=4))
    twin = peft_layer.Linear(deepcopy(layer.linear), "default", config=LoraConfig(r=4, lora_alpha=4), r=4, lora_alpha=4)
    twin.lora_A["default"].weight.data = layer.lora_down.weight.data.clone()
    twin.lora_B["default"].weight.data = layer.lora_up.weight.data.clone()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert close(layer(x), twin.eval()(x), 3e-2)


def every_path():
    yield LoraInjectedLinear.from_base(nn.Linear(48, 32), 4, dora=True), x
    yield LoraInjectedLinear.from_base(nn.Linear(48, 32), 4, init="pissa"), x
    yield LoraInjectedConv2d.from_base(nn.Conv2d(8, 16, 3, groups=2), 4), image
    yield LoraInjectedLinear.from_base(pretend_trained(LoraInjectedLinear.from_base(nn.Linear(48, 32), 4)), 2), x


@pytest.mark.parametrize("i", range(4))
def test_every_path_of_the_forward_pass_compiles(i):
    layer, inp = list(every_path())[i]
    pretend_trained(layer).eval()
    assert close(torch.compile(layer, fullgraph=True, backend="eager")(inp), layer(inp))
    torch._dynamo.reset()


def test_layers_that_only_wear_share_their_idle_parts():
    a, b = (LoraInjectedLinear.from_factors(nn.Linear(4, 4), torch.ones(4, 1), torch.ones(1, 4)) for _ in range(2))
    assert a.selector is b.selector
    a.set_selector_from_diag([0.])
    assert a.selector is not b.selector and not torch.equal(a(torch.ones(1, 4)), b(torch.ones(1, 4)))


# Many branches as one

def stacked(base, n=12, r=2, dtype=torch.float32, **kw):
    "A stack of n branches of different strengths, and the same sum computed one by one"
    kind, g, layers = LoraInjectedConv2d if isinstance(base, nn.Conv2d) else LoraInjectedLinear, torch.Generator().manual_seed(5), []
    for i in range(n):
        layers.append(kind.from_base(layers[-1] if layers else base, r=r, scale=float(torch.randn((), generator=g)), **kw).eval())
        up = layers[-1].lora_up.weight
        with torch.no_grad(): up.copy_(torch.randn(up.shape, generator=g).to(up) / 4)
    return layers[-1], layers

def one_by_one(x, layers):
    y = base = layers[0].base
    y = y(x)
    for m in layers: y, base = m._on_top(x, y.clone(), base), m
    return y

GEOMETRIES = [(lambda: nn.Linear(48, 32), (2, 7, 48)), (lambda: nn.Linear(48, 160, bias=False), (8, 64, 48)),
              (lambda: nn.Conv2d(8, 16, 3, padding=1, stride=2), (2, 8, 9, 9)), (lambda: nn.Conv2d(8, 6, 1), (8, 5, 5)),
              (lambda: nn.Conv2d(8, 16, 3, padding=1, padding_mode="circular"), (2, 8, 40, 40)),
              (lambda: nn.Conv2d(8, 16, 3, groups=4), (2, 8, 9, 9))]

@pytest.mark.parametrize("i", range(len(GEOMETRIES)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_stack_is_the_sum_of_its_branches(i, dtype):
    make, shape = GEOMETRIES[i]
    top, layers = stacked(make().to(dtype)); x = torch.randn(shape, dtype=dtype)
    near = lambda: torch.testing.assert_close(top(x), one_by_one(x, layers), rtol=3e-5 if dtype == torch.float32 else 6e-2,
                                              atol=3e-5 if dtype == torch.float32 else 2e-1)
    for grad in (torch.no_grad, torch.enable_grad):
        with grad():
            near()
            layers[2].enabled, layers[4].scale, layers[5].scale = False, 0., 7.; near()
            for m in layers: m.enabled, m.scale = True, .5
            near()
            with torch.no_grad(): layers[1].lora_down.weight.data.mul_(-2)            # nothing is remembered
            near()
    for m in layers: m.enabled = False
    assert torch.equal(top(x), layers[0].base(x))

def test_a_stack_with_branches_of_other_kinds():
    base, x = nn.Linear(48, 32), torch.randn(4, 48)
    _, layers = stacked(base, 10)
    top = LoraInjectedLinear.from_base(layers[-1], r=2, dora=True); layers.append(top)
    with torch.no_grad(): top.lora_up.weight.normal_()
    for i in range(4): layers.append(LoraInjectedLinear.from_base(layers[-1], r=3)); torch.nn.init.normal_(layers[-1].lora_up.weight)
    layers[3].set_selector_from_diag(torch.tensor([1., .2]))
    torch.testing.assert_close(layers[-1](x), one_by_one(x, layers), rtol=1e-5, atol=1e-5)
    assert [len(m._run()[0]) for m in layers[::-1]] == [4, 3, 2, 1, 0, 6, 5, 4, 3, 2, 1, 0, 3, 2, 1]

def test_hooks_and_dropout_interrupt_a_run():
    _, layers = stacked(nn.Linear(48, 32), 8); seen = []
    layers[4].register_forward_hook(lambda m, args, out: seen.append(out))
    x = torch.randn(4, 48); out = layers[-1](x)
    assert len(seen) == 1 and torch.allclose(seen[0], one_by_one(x, layers[:5]), atol=1e-5) and torch.allclose(out, one_by_one(x, layers),
                                                                                                               atol=1e-5)
    _, layers = stacked(nn.Linear(48, 32), 8, dropout_p=.5)
    layers[-1].train(); assert len(layers[-1]._run()[0]) == 0

def test_gradients_and_autocast_of_a_stack():
    top, layers = stacked(nn.Linear(48, 160), 6); x = torch.randn(70, 48)
    grads = []
    for f in (lambda: top(x), lambda: one_by_one(x, layers)):
        top.zero_grad(); f().square().sum().backward()
        grads.append([p.grad.clone() for m in layers for p in (m.lora_up.weight, m.lora_down.weight)])
    for a, b in zip(*grads): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(top(x), one_by_one(x, layers)) and top(x).dtype == torch.bfloat16

def test_more_branches_than_python_has_frames():
    top, layers = stacked(nn.Linear(8, 8), 700, r=1)
    assert torch.isfinite(top(torch.randn(2, 8))).all()

@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_strengths_of_a_layer_are_numbers(bad):
    with pytest.raises(LoraError): LoraInjectedLinear.from_base(nn.Linear(4, 4), r=2, scale=bad)
    with pytest.raises(LoraError): LoraInjectedLinear.from_base(nn.Linear(4, 4), r=2, alpha=bad)
    layer = LoraInjectedLinear.from_base(nn.Linear(4, 4), r=2, alpha=1)
    for change in (lambda: setattr(layer, "scale", bad), lambda: setattr(layer, "alpha", bad),
                   lambda: layer.set_selector_from_diag(torch.tensor([bad, 1]))):
        with pytest.raises(LoraError): change()
    assert layer.scale == 1 and layer.alpha == 1 and type(layer.selector) is nn.Identity
