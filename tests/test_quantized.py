"Bases in 4 and 8 bits: each kind that runs on a CPU loads, trains, wears LoRAs and merges on request. A missing package skips its kind."
import importlib.util

import pytest
import torch
from torch import nn

from lora_nb.core import LoraError
from lora_nb.families import as_base
from lora_nb.injection import apply_lora, extract_lora, inject_lora, remove_lora, set_scale
from lora_nb.layers import LoraInjectedLinear
from lora_nb.loading import load_base
from lora_nb.lora import Lora
from lora_nb.quantize import PACKINGS, quantize_network, wanted_packings
from lora_nb.quantized import dense_weight, outline, packed_like, packing
from lora_nb.random_pipes import random_pipe


def there(package):
    try: return not package or importlib.util.find_spec(package) is not None
    except ModuleNotFoundError: return False


def kinds(*without):
    for k, p in PACKINGS.items():
        if k in without: continue
        reason = "" if p.where == "any" else f"{k} needs a GPU"
        yield pytest.param(k, marks=pytest.mark.skipif(bool(reason) or not there(p.package), reason=reason or f"{p.package} is not installed"))


EACH, PACKED = list(kinds()), list(kinds("fp8"))
NAME = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A FLUX whose sides are multiples of 64, as those of all published models are"
    path, pipe = tmp_path_factory.mktemp("flux"), random_pipe("flux")
    torch.manual_seed(0)
    pipe.transformer = type(pipe.transformer).from_config({**pipe.transformer.config, "num_attention_heads": 4, "joint_attention_dim": 64})
    config = {**pipe.text_encoder_2.config.to_dict(), "d_model": 64, "num_heads": 8}
    pipe.text_encoder_2 = type(pipe.text_encoder_2)(type(pipe.text_encoder_2.config)(**config))
    pipe.save_pretrained(path); return path


def layer(kind, rows=64, columns=128):
    "One packed linear, and a plain one with the same numbers"
    torch.manual_seed(0)
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.linear = nn.Linear(columns, rows)
    net = Net(); quantize_network(net, kind, torch.float32)
    same = nn.Linear(columns, rows)
    same.weight.data, same.bias.data = dense_weight(net.linear).float(), net.linear.bias.data.float()
    return net.linear, same.requires_grad_(False)


def bits(net): return {n: str(getattr(p, "data", p)) + str(getattr(p, "quant_state", "")) for n, p in net.named_parameters()}


@pytest.mark.parametrize("kind", PACKED)
def test_shape_and_numbers_of_a_packed_layer(kind):
    m, same = layer(kind); x = torch.randn(5, 128)
    assert packing(m) and outline(m).shape == (64, 128) and outline(m).device == m.weight.device
    assert dense_weight(m).shape == (64, 128)
    assert torch.allclose(m(x), same(x), atol=1e-4)          # the numbers that it computes with


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("dora", (False, True))
def test_gradients_are_those_beside_the_same_numbers_unpacked(kind, dora):
    grads = []
    for m in layer(kind):
        torch.manual_seed(1)
        branch = LoraInjectedLinear.from_base(m, 3, dora=dora, dtype=torch.float32)
        nn.init.normal_(branch.lora_up.weight, std=.1)
        x = torch.randn(5, 128, requires_grad=True); branch(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in branch.parameters() if p.grad is not None)])
    assert len(grads[0]) == len(grads[1]) == (4 if dora else 3)
    for a, b in zip(*grads): assert torch.allclose(a, b, atol=2e-3, rtol=2e-3) and b.abs().max() > 0


@pytest.mark.parametrize("kind", PACKED)
def test_packed_again_and_put_back(kind):
    m, same = layer(kind); before = dense_weight(m)
    other = packed_like(m, before + .5)
    assert type(other.data) is type(m.weight.data) and type(other) is type(m.weight) and outline(m).shape == (64, 128)
    again = packed_like(m, before)
    assert (again.data.dequantize() if hasattr(again.data, "qtype") else again).shape == m.weight.shape


@pytest.mark.parametrize("kind", EACH)
def test_a_base_is_loaded_packed(kind, folder):
    base, plain = load_base(folder, device="cpu", quantize=kind), load_base(folder, device="cpu")
    m = base.denoiser.get_submodule(NAME)
    assert (packing(m) != "") == (kind != "fp8") and base.dtype == torch.float32
    if kind == "fp8": assert m.weight.dtype == torch.float8_e4m3fn
    assert all(not packing(x) for x in base.pipe.text_encoder_2.modules())
    torch.manual_seed(0)
    z, t, c = torch.randn(2, 16, 8, 8), torch.tensor([300., 800.]), plain.encode_prompts(["a", "b"])
    a, b = base.predict(z, t, c), plain.predict(z, t, c)
    assert 1e-6 < (a - b).norm() / b.norm() < .25            # rounded, but the same network
    assert base.generate("a cat", steps=1)[0].size == (64, 64)


@pytest.mark.parametrize("kind", EACH)
def test_a_lora_trains_on_it_and_fits_the_plain_base(kind, folder, tmp_path):
    base, plain = load_base(folder, device="cpu", quantize=kind), load_base(folder, device="cpu")
    was = bits(base.denoiser)
    worn = inject_lora(base.pipe, "feed-forward", rank=4)
    assert {p.dtype for p in worn.params()} == {torch.float32}
    optimizer = torch.optim.AdamW(worn.params(), 1e-2)
    torch.manual_seed(0)
    z, noise, t = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8), torch.tensor([300., 800.])
    c, losses = base.encode_prompts(["a", "b"]), []
    for _ in range(12):
        loss = (base.predict(base.add_noise(z, noise, t), t, c) - base.target(z, noise, t)).square().mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step(); losses.append(loss.item())
    assert losses[-1] < .97 * losses[0]
    lora = worn.lora(); worn.remove()
    assert bits(base.denoiser) == was
    lora.save(tmp_path / "a.safetensors")
    apply_lora(plain.pipe, Lora.load(tmp_path / "a.safetensors", base=plain.pipe))       # shapes are the true ones


def lora_for(base, size=.3):
    torch.manual_seed(0); worn = inject_lora(base.pipe, "attention", rank=2)
    for p in worn.params(): p.data.normal_(std=size)
    lora = worn.lora(); worn.remove(); return lora


@pytest.mark.parametrize("kind", PACKED)
def test_worn_as_branches_or_merged_on_request(kind, folder):
    base = load_base(folder, device="cpu", quantize=kind); lora = lora_for(base); was = bits(base.denoiser)
    z, t, c = torch.randn(1, 16, 8, 8), torch.tensor([500.]), base.encode_prompts(["a"])
    plain = base.predict(z, t, c)
    with pytest.raises(LoraError, match="requantize=True"): apply_lora(base.pipe, lora)
    assert bits(base.denoiser) == was and base.predict(z, t, c).equal(plain)
    apply_lora(base.pipe, lora, mode="inject"); branches = base.predict(z, t, c)
    got = extract_lora(base.pipe); assert set(got.layers) == set(lora.layers)
    remove_lora(base.pipe); assert bits(base.denoiser) == was
    apply_lora(base.pipe, lora, requantize=True); merged = base.predict(z, t, c)
    moved = (branches - plain).norm()
    assert (merged - branches).norm() < .5 * moved and moved > 1e-2        # rounded, but that LoRA
    set_scale(base.pipe, 0.); assert base.predict(z, t, c).isfinite().all()
    set_scale(base.pipe, 1.); assert torch.allclose(base.predict(z, t, c), merged, atol=1e-4)
    remove_lora(base.pipe)
    assert bits(base.denoiser) == was and base.predict(z, t, c).equal(plain)


@pytest.mark.parametrize("kind", PACKED)
def test_a_dora_beside_packed_weights(kind, folder):
    base = load_base(folder, device="cpu", quantize=kind)
    worn = inject_lora(base.pipe, "attention", rank=2, dora=True); lora = worn.lora()
    m = next(iter(worn.layers.values()))
    assert torch.allclose(m.magnitude, dense_weight(m.root).float().norm(dim=1), rtol=1e-3)
    worn.remove(); apply_lora(base.pipe, lora, mode="inject"); remove_lora(base.pipe)
    with pytest.raises(LoraError, match="PiSSA"): inject_lora(base.pipe, "attention", rank=2, init="pissa")


@pytest.mark.parametrize("kind", PACKED)
def test_several_parts(kind, folder):
    base = load_base(folder, device="cpu", quantize={"transformer": kind, "text_encoder_2": kind})
    assert any(packing(m) for m in base.pipe.text_encoder_2.modules()) and base.encode_prompts(["a"])["prompt_embeds"].isfinite().all()


@pytest.mark.parametrize("kind", EACH)
def test_no_kind_keeps_wide_copies_for_the_backward_pass(kind):
    "fp8 and torchao's kinds did: their layers took three bytes a weight in training, where bf16 takes two"
    net = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(4)]).to(torch.bfloat16).requires_grad_(False)
    quantize_network(net, kind, torch.bfloat16)
    x, kept = torch.randn(2, 256, dtype=torch.bfloat16, requires_grad=True), {}
    def note(t):
        if type(t) is torch.Tensor and t.dtype.itemsize > 1 and t.numel() >= 256 * 256: kept[t.data_ptr()] = t
        return t
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t): y = net(x)
    y.float().square().sum().backward()
    assert not kept and x.grad.isfinite().all() and x.grad.abs().max() > 0


def test_gradients_beside_fp8_cast_layer_by_layer():
    "Always run: no package is needed"
    base, same = as_base(random_pipe("flux")), as_base(random_pipe("flux"))
    quantize_network(base.denoiser, "fp8", torch.float32)
    for n, p in same.denoiser.named_parameters(): p.data = base.denoiser.get_parameter(n).data.float()
    z, t, c = torch.randn(1, 16, 8, 8), torch.tensor([500.]), same.encode_prompts(["a"])
    grads = []
    for b in (base, same):
        torch.manual_seed(0); worn = inject_lora(b.pipe, "feed-forward", rank=2)
        for p in worn.params(): p.data.normal_(std=.1)
        b.predict(z, t, c).square().mean().backward(); grads.append([p.grad for p in worn.params()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads)) and max(g.abs().max() for g in grads[0]) > 1e-5
    assert base.denoiser.get_submodule(NAME).root.weight.dtype == torch.float8_e4m3fn


def test_a_unet_in_fp8_learns():
    "Its convolutions stay as they are: gradients flow back through all of it, to the first branch."
    base = as_base(random_pipe("sd"))
    quantize_network(base.denoiser, "fp8", torch.float32)
    worn = inject_lora(base.pipe, "extended", rank=2)
    for p in worn.params(): p.data.normal_(std=.1)
    z, t = torch.randn(1, base.pipe.unet.config.in_channels, 8, 8), torch.tensor([500])
    base.predict(z, t, base.encode_prompts(["a"])).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in worn.params())
    assert any(m.weight.dtype == torch.float8_e4m3fn for m in base.denoiser.modules() if isinstance(m, torch.nn.Linear))


def test_what_cannot_be(folder):
    cpu = torch.device("cpu")
    with pytest.raises(LoraError, match="Did you mean 'nf4'"): load_base(folder, device="cpu", quantize="nf44")
    with pytest.raises(LoraError, match="needs a CUDA GPU"): load_base(folder, device="cpu", quantize="int4")
    with pytest.raises(LoraError, match="VAE"): wanted_packings({"vae": "fp8"}, "transformer", cpu)
    with pytest.raises(LoraError, match="fp8 is for the denoiser"): wanted_packings({"text_encoder": "fp8"}, "transformer", cpu)
    with pytest.raises(LoraError, match="no network 'unet'"): load_base(folder, device="cpu", quantize={"unet": "fp8"})
    with pytest.raises(LoraError, match="loaded already"): load_base(random_pipe("sd"), quantize="fp8")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("lora_nb.quantize._installed", lambda package: False)
    with pytest.raises(LoraError, match="package bitsandbytes: pip install bitsandbytes"): wanted_packings("nf4", "unet", torch.device("cpu"))
    with pytest.raises(LoraError, match="pip install optimum-quanto"): wanted_packings("quanto", "unet", torch.device("cpu"))
    assert wanted_packings("fp8", "unet", torch.device("cpu")) == {"unet": "fp8"}


@pytest.mark.skipif(not there("bitsandbytes"), reason="bitsandbytes is not installed")
def test_numbers_of_a_layer_that_a_cpu_has_repacked():
    "Where the CPU can, bitsandbytes changes the packing at the first drawing"
    import bitsandbytes as bnb
    m = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu").eval()
    before = dense_weight(m)
    with torch.no_grad(): m(torch.randn(4, 128, dtype=torch.bfloat16))
    assert torch.allclose(dense_weight(m).float(), before.float(), atol=2e-3)


def gguf_of_zimage(path):
    "A GGUF file of a random Z-Image's transformer under its authors' names, in 8 bits"
    import gguf, numpy as np
    net = random_pipe("zimage").transformer; state = {k: t.detach().numpy() for k, t in net.state_dict().items()}
    writer = gguf.GGUFWriter(str(path), "zimage")
    for name in [k for k in state if k.endswith("to_q.weight")]:
        state[name.replace("to_q", "qkv")] = np.concatenate([state.pop(name.replace("to_q", f"to_{x}")) for x in "qkv"])
    names = (("all_x_embedder.2-1.", "x_embedder."), ("all_final_layer.2-1.", "final_layer."), (".to_out.0.", ".out."),
             (".norm_q.", ".q_norm."), (".norm_k.", ".k_norm."))
    for name, w in state.items():
        for a, b in names: name = name.replace(a, b)
        if w.ndim == 2 and w.shape[1] % 32 == 0 and "layers" in name:
            writer.add_tensor(name, gguf.quantize(w, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else: writer.add_tensor(name, w)
    writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()


@pytest.mark.skipif(not there("gguf"), reason="gguf is not installed")
def test_a_gguf_file_is_a_base(tmp_path):
    random_pipe("zimage").save_pretrained(tmp_path / "zimage"); gguf_of_zimage(tmp_path / "small.gguf")
    base = load_base(tmp_path / "small.gguf", device="cpu", config=str(tmp_path / "zimage"))
    plain = as_base(random_pipe("zimage"))
    m = base.denoiser.get_submodule("layers.0.feed_forward.w1")
    assert base.family == "zimage" and packing(m) == "GGUF"
    assert outline(m).shape == plain.denoiser.get_submodule("layers.0.feed_forward.w1").weight.shape
    torch.manual_seed(0)
    z, t, c = torch.randn(1, 16, 8, 8), torch.tensor([500.]), plain.encode_prompts(["a"])
    a, b = base.predict(z, t, c), plain.predict(z, t, c)
    assert 1e-6 < (a - b).norm() / b.norm() < .05
    worn = inject_lora(base.pipe, "feed-forward", rank=2); lora = worn.lora()
    base.predict(z, t, c).square().mean().backward()
    assert all(m.lora_up.weight.grad.abs().sum() > 0 for m in worn.layers.values()); worn.remove()
    apply_lora(base.pipe, lora, mode="inject"); remove_lora(base.pipe)
    with pytest.raises(LoraError, match="requantize=True"): apply_lora(base.pipe, lora)
    with pytest.raises(LoraError, match="cannot be packed again"): apply_lora(base.pipe, lora, requantize=True)
    assert base.predict(z, t, c).equal(a)
    with pytest.raises(LoraError, match="packed already"):
        load_base(tmp_path / "small.gguf", device="cpu", config=str(tmp_path / "zimage"), quantize="fp8")


@pytest.mark.parametrize("kind", [p for p in PACKED if p.values[0] in ("quanto", "int8-torchao")])
def test_a_folder_that_was_saved_packed(kind, folder, tmp_path):
    base = load_base(folder, device="cpu", quantize=kind)
    base.pipe.save_pretrained(tmp_path / "packed", safe_serialization=kind != "int8-torchao")
    again = load_base(tmp_path / "packed", device="cpu")
    assert packing(again.denoiser.get_submodule(NAME))
    assert dense_weight(again.denoiser.get_submodule(NAME)).equal(dense_weight(base.denoiser.get_submodule(NAME)))
    apply_lora(again.pipe, lora_for(again), mode="inject")


def test_a_unet_cast_to_fp8_can_be_trained_beside():
    "A convolution's backward pass reads its weight, which must not be fp8 by then"
    base = as_base(random_pipe("sd")); quantize_network(base.denoiser, "fp8", torch.float32)
    worn = inject_lora(base.pipe, "attention", rank=2)
    for p in worn.params(): p.data.normal_(std=.1)
    z, t = torch.randn(1, 4, 8, 8), torch.tensor([500.])
    base.predict(z, t, base.encode_prompts(["a"])).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in worn.params())
