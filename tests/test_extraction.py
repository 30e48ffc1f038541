import copy, itertools, warnings

import pytest
import torch

from lora_nb.core import LoraError, ShapeError, TargetError
from lora_nb.extraction import allocate, distill, distillation, low_rank, recompress, resize, spectra
from lora_nb.injection import apply_lora, inject_lora
from lora_nb.lora import Factors, Lora
from lora_nb.random_pipes import random_pipe

torch.set_num_threads(1)
close = lambda a, b, eps=1e-5: torch.allclose(a, b, atol=eps, rtol=eps)


def three(): return [Factors(torch.randn(96, 4), torch.randn(4, 64), alpha=a) for a in (None, 8, 1.)]

def file_size(lora, folder):
    "Bytes of its peft file, each layer at its own rank"
    lora.save(folder / "x.safetensors", pad=False)
    return (folder / "x.safetensors").stat().st_size


# Recompress

def test_kernels_groups_and_middle_kernels():
    conv = Factors(torch.randn(16, 3, 1, 1), torch.randn(3, 8, 3, 3), alpha=1.5, groups=2)
    cp = Factors(torch.randn(16, 3, 1, 1), torch.randn(3, 8, 1, 1), mid=torch.randn(3, 3, 3, 3))
    both = recompress([conv, cp], 6)
    assert (both.up.shape, both.down.shape, both.groups) == ((16, 6, 1, 1), (6, 8, 3, 3), 2)
    assert close(both.delta(), conv.delta() + cp.delta(), 1e-3)


def test_equal_zero_and_half_precision():
    f = three()[0]
    assert close(recompress([f, f], 4).delta(), 2 * f.delta(), 1e-3)               # a singular core
    zero = Factors(torch.zeros(96, 4), torch.randn(4, 64))
    assert recompress(zero, 2).delta().norm() == 0 and recompress(zero, energy=.9).rank == 1
    half = recompress(f.to(dtype=torch.float16), 4)
    assert half.up.dtype == torch.float16 and close(half.delta().float(), f.delta(), .05)


def test_errors_of_recompress():
    small = recompress(three()[0], 2)
    dora = Factors(torch.randn(8, 2), torch.randn(2, 8), magnitude=torch.ones(8))
    conv = Factors(torch.randn(16, 3, 1, 1), torch.randn(3, 8, 3, 3))
    with pytest.raises(LoraError, match="DoRA"): recompress(dora, 1)
    with pytest.raises(ShapeError, match="different bases"): recompress([conv, small], 1)
    with pytest.raises(LoraError, match="exactly one"): recompress(small)
    with pytest.raises(LoraError, match="exactly one"): recompress(small, 1, .5)
    with pytest.raises(LoraError, match="at least 1"): recompress(small, 0)
    with pytest.raises(LoraError, match="energy"): recompress(small, energy=1.5)
    with pytest.raises(LoraError, match="2 weights for 1"): recompress(small, 1, weights=[1, 2])


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (3, 50, 20)])
def test_low_rank_of_tall_wide_and_stacked(shape):
    a = torch.randn(shape)
    s = torch.linalg.svdvals(a)
    t = low_rank(a, 7)
    assert close(t.s, s[..., :7], 1e-3) and close(t.tail.float(), s[..., 7:].norm(dim=-1), 1e-3)
    t = low_rank(a, energy=.8)
    kept = t.s.square().sum(-1) / s.square().sum(-1)
    assert (kept >= .8 - 1e-5).all() and close(low_rank(a, 10**6).tail.float(), torch.zeros(()), 1e-3)


# Sizes

def test_greedy_is_best_for_equal_costs():
    some = {n: torch.rand(4).sort(descending=True).values for n in "abc"}
    kept = lambda ranks: sum(some[n][:r].square().sum().item() for n, r in ranks.items())
    for budget in range(1, 13):
        best = max(kept(dict(zip("abc", rs))) for rs in itertools.product(range(5), repeat=3) if sum(rs) <= budget)
        assert kept(allocate(some, dict.fromkeys("abc", 1), budget)) == pytest.approx(best)


@pytest.fixture(scope="module")
def pipes():
    "A base, what it became, and the LoRA between them"
    torch.manual_seed(0)
    base = random_pipe()
    tuned = copy.deepcopy(base)
    branch = inject_lora(tuned, "extended", rank=6)
    for m in branch.layers.values(): torch.nn.init.normal_(m.lora_up.weight, std=.1)
    true = branch.lora(); branch.remove()
    apply_lora(tuned, true)
    return base, tuned, true


@pytest.mark.parametrize("size", [40_000, 90_000])
def test_the_size_of_a_file_is_a_promise(pipes, tmp_path, size):
    "Words and metadata included"
    base, tuned, true = pipes
    told = Lora(true.layers, {"<cat>": {"text_encoder": torch.randn(4, 144)}}, {"trigger": "sks \"face\" ü" * 20})
    small = resize(told, bytes=size)
    assert .9 * size < file_size(small, tmp_path) <= size
    d = distillation(base, tuned, bytes=size)
    assert .9 * size < file_size(d.lora, tmp_path) <= size and d.layers.keys() == true.layers.keys()
    kept = {n: f.delta().flatten(1) for n, f in d.lora.layers.items()}
    missed = sum((f.delta().flatten(1) - kept.get(n, 0)).square().sum() for n, f in true.layers.items()).sqrt()
    assert missed / sum(f.norm()**2 for f in true.layers.values())**.5 == pytest.approx(d.error, abs=.01)


def test_errors_and_limits_of_resize(pipes):
    _, _, true = pipes
    with pytest.raises(LoraError, match="cannot hold"): resize(true, bytes=100)
    same, n = resize(true, rank=64), next(iter(true.layers))
    assert same.layers[n].up.equal(true.layers[n].up)                              # what is small enough stays as it is
    assert all(len(s) >= f.rank for s, f in zip(spectra(true).values(), true.layers.values()))


# Distill

def test_what_factors_cannot_hold(pipes):
    base, tuned, _ = pipes
    odd = copy.deepcopy(tuned)
    odd.unet.conv_in.bias.data += 1
    odd.unet.conv_norm_out.weight.data *= 2
    odd.vae.decoder.conv_out.weight.data += 1
    said = distillation(base, odd, energy=.9)
    assert set(said.lost) == {"unet.conv_in.bias", "unet.conv_norm_out.weight", "vae.decoder.conv_out.weight"}
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter("always"); distill(base, odd, rank=1)
    assert any("3 tensors changed that a LoRA cannot hold" in str(x.message) for x in w)
    inject_lora(odd, "attention", rank=1)
    with pytest.raises(LoraError, match="branches"): distill(base, odd, rank=1)


def test_targets_and_errors_of_distill(pipes):
    base, tuned, _ = pipes
    part = distillation(base, tuned, rank=2, targets={"unet": "attention"})
    assert all(".to_" in n for n in part.lora.layers) and "unet.mid_block.resnets.0.conv1.weight" in part.lost
    with pytest.raises(LoraError, match="equal"): distill(base, base, rank=1)
    with pytest.raises(LoraError, match="exactly one"): distill(base, tuned)
    with pytest.raises(LoraError, match="clamp_quantile"): distillation(base, tuned, rank=1, clamp_quantile=0.)
    with pytest.raises(TargetError, match="same parts"): distill(base, random_pipe("sd3"), rank=1)
    with pytest.raises(ShapeError, match="same architecture"): distill(base, random_pipe("sd_inpaint"), rank=1)


def test_another_family_with_a_word():
    sd3 = random_pipe("sd3")
    talking = copy.deepcopy(sd3)
    branch = inject_lora(talking, dict.fromkeys(["transformer", "text_encoder", "text_encoder_3"], "attention"), rank=1)
    for m in branch.layers.values(): torch.nn.init.normal_(m.lora_up.weight, std=.1)
    want = branch.lora(); branch.remove()
    width = talking.text_encoder.get_input_embeddings().weight.shape[1]
    want = Lora(want.layers, {"<cat>": {"text_encoder": torch.randn(3, width)}})
    apply_lora(talking, want)
    got = distill(sd3, talking, rank=1, dtype=torch.float32, device="cpu")
    assert set(got.layers) == set(want.layers)
    assert got.embeddings["<cat>"]["text_encoder"].equal(want.embeddings["<cat>"]["text_encoder"])
    n = next(iter(want.layers))
    assert close(got.layers[n].delta(), want.layers[n].delta(), 1e-4)


def test_from_folder_to_file(pipes, tmp_path):
    base, tuned, true = pipes
    for p, n in ((base, "base"), (tuned, "tuned")): p.save_pretrained(tmp_path / n, safe_serialization=True)
    distill(tmp_path / "base", tmp_path / "tuned", 6, dtype=torch.float32).save(tmp_path / "filed.safetensors")
    back = Lora.load(tmp_path / "filed.safetensors")
    assert set(back.layers) == set(true.layers)
    assert max((back.layers[n].delta() - f.delta()).norm() / f.norm() for n, f in true.layers.items()) < 1e-4


# Precision, and models that do not fit

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"

def saved(pipe, path, dtype):
    copy.deepcopy(pipe).to(dtype).save_pretrained(path, safe_serialization=True)
    return path


@pytest.mark.parametrize("base_type, tuned_type", list(itertools.product((torch.float32, torch.float16, torch.bfloat16), repeat=2)), ids=str)
def test_one_tuned_layer_is_one_layer_in_any_precision(tmp_path, base_type, tuned_type):
    "By path: rounding to half precision is no change, whichever of the two models was rounded"
    base = random_pipe()
    tuned = copy.deepcopy(base)
    tuned.unet.get_parameter(TO_Q).data += torch.randn(16, 2) @ torch.randn(2, 16) * .1
    d = distillation(saved(base, tmp_path / "base", base_type), saved(tuned, tmp_path / "tuned", tuned_type), rank=2)
    assert list(d.lora.layers) == [f"unet.{TO_Q.removesuffix('.weight')}"] and not d.lost, (list(d.lora.layers)[:3], list(d.lost)[:3])


def test_a_small_change_in_files_of_half_precision_is_not_rounded_again(tmp_path):
    "A thousandth of each weight, in fp16 files: bf16, the precision of large cards, would lose most of it"
    base = random_pipe()
    tuned = copy.deepcopy(base)
    w = tuned.unet.get_parameter(TO_Q)
    w.data += w.abs().mean() * .001 * torch.outer(torch.randn(16).sign(), torch.randn(16).sign())
    w.data += base.unet.get_parameter(TO_Q).half().float() - base.unet.get_parameter(TO_Q)
    for x in (base, tuned): x.unet.get_parameter(TO_Q).data = x.unet.get_parameter(TO_Q).data.half().float()
    true = w.data - base.unet.get_parameter(TO_Q).data
    got = distill(saved(base, tmp_path / "b", torch.float16), saved(tuned, tmp_path / "t", torch.float16), rank=16, dtype=torch.float32)
    (f,) = got.layers.values()
    assert (f.delta() - true).norm() < 1e-4 * true.norm()


def test_networks_on_the_disk_are_not_read_whole(tmp_path):
    "Mapped: the two UNets take no memory of their own"
    from lora_nb.loading import load_as_stored
    base = random_pipe()
    saved(base, tmp_path / "b", torch.float16)
    unet = load_as_stored(tmp_path / "b").pipe.unet
    with open("/proc/self/maps") as f: maps = [line.split(None, 5) for line in f]
    mine = [tuple(int(x, 16) for x in m[0].split("-")) for m in maps if len(m) > 5 and str(tmp_path / "b" / "unet") in m[5]]
    inside = [any(a <= p.data_ptr() < b for a, b in mine) for p in unet.parameters()]
    assert all(inside) and {p.dtype for p in unet.parameters()} == {torch.float16}


def test_a_threshold_leaves_out_small_differences(pipes):
    base, tuned, true = pipes
    whole = distillation(base, tuned, rank=1)
    sizes = {n: (f.delta()).abs().max().item() for n, f in true.layers.items()}
    least = sorted(sizes.values())[len(sizes) // 2]
    some_of_them = distillation(base, tuned, rank=1, min_difference=least * 1.0001)
    assert set(some_of_them.lora.layers) == {n for n, x in sizes.items() if x > least * 1.0001} < set(whole.lora.layers)
    with pytest.raises(LoraError, match="equal"): distill(base, tuned, rank=1, min_difference=1e9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["base", "tuned model"])
def test_numbers_that_are_none_are_named(pipes, bad, which):
    base, tuned, _ = pipes
    broken = copy.deepcopy(base if which == "base" else tuned)
    broken.unet.get_parameter(TO_Q).data[3, 2] = bad
    pair = (broken, tuned) if which == "base" else (base, broken)
    for kw in (dict(rank=1), dict(energy=.9), dict(bytes=50_000)):
        with pytest.raises(LoraError, match=f"{which} holds NaN or infinity in unet: {TO_Q}"): distill(*pair, **kw)


def test_an_inpainting_model_without_its_first_convolution():
    base, tuned = random_pipe("sd"), random_pipe("sd_inpaint")
    own = {n: p.data.clone() for n, p in base.unet.named_parameters() if "conv_in" not in n}
    tuned.unet.load_state_dict(own, strict=False); tuned.text_encoder.load_state_dict(base.text_encoder.state_dict())
    tuned.vae.load_state_dict(base.vae.state_dict())
    tuned.unet.conv_in.bias.data.copy_(base.unet.conv_in.bias.data)
    tuned.unet.get_parameter(TO_Q).data += 1
    for targets in ("attention", {"unet": "attention"}):
        d = distillation(base, tuned, rank=1, targets=targets)
        assert list(d.lora.layers) == [f"unet.{TO_Q.removesuffix('.weight')}"] and list(d.lost) == ["unet.conv_in.weight"]
        change, size = d.lost["unet.conv_in.weight"]
        wide = torch.zeros_like(tuned.unet.conv_in.weight); wide[:, :4] = base.unet.conv_in.weight.data
        assert change == pytest.approx((tuned.unet.conv_in.weight - wide).norm().item()) and size == pytest.approx(wide.norm().item())
    with pytest.raises(ShapeError, match="conv_in.weight.*targets"): distill(base, tuned, rank=1)
    with pytest.raises(ShapeError, match="conv_in.weight"): distill(base, tuned, rank=1, targets={"unet": ["conv_in"]})


def test_a_model_that_wears_adapters_of_diffusers_is_not_compared():
    "Their branches would be taken for new layers"
    from peft import LoraConfig
    base, worn = random_pipe("sd"), random_pipe("sd")
    worn.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    for pair in ((base, worn), (worn, base)):
        with pytest.raises(TargetError, match="wear an adapter that diffusers or peft put on.*unload_lora_weights"): distill(*pair, rank=1)
