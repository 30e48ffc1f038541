"Compiled denoisers, attention backends, and reading network by network"
import shutil

import pytest
import torch
from PIL import Image

from lora_nb.core import LoraError, quiet
from lora_nb.dreambooth import train_dreambooth
from lora_nb.families import as_base
from lora_nb.injection import apply_lora, extract_lora, inject_lora, remove_lora
from lora_nb.lora_diffusion import tune_lora_scale
from lora_nb.loading import attention_backends, check_compiler, compile_denoiser, load_base, repeated_blocks, set_attention
from lora_nb.lora import Lora
from lora_nb.random_pipes import random_pipe

EAGER = dict(backend="eager")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def asked(base):
    g = torch.Generator().manual_seed(1)
    z = torch.randn(1, base.vae.config.latent_channels, 8, 8, generator=g)
    return z, torch.tensor([300.]), base.encode_prompts(["a cat"])


def moved(lora):
    "The same LoRA with factors that do something"
    g = torch.Generator().manual_seed(2)
    for f in lora.layers.values(): f.up.copy_(torch.randn(f.up.shape, generator=g) * .05)
    return lora


@pytest.fixture(scope="module", params=("sd", "sd3"))
def family(request): return request.param


def wrapped_by_a_person(family, backend):
    "A pipeline whose denoiser was compiled whole, as diffusers' documentation shows"
    pipe = random_pipe(family); name = as_base(pipe).denoiser_name
    setattr(pipe, name, torch.compile(getattr(pipe, name), backend=backend))
    return as_base(pipe)


@pytest.mark.parametrize("how", (lambda f: compile_denoiser(as_base(random_pipe(f)), **EAGER),
                                 lambda f: wrapped_by_a_person(f, "eager")), ids=["blocks", "whole"])
@torch.no_grad()
def test_a_compiled_denoiser_wears_what_it_did_before(family, how):
    plain, quick = as_base(random_pipe(family)), how(family)
    assert list(plain.denoiser.state_dict()) == list(quick.denoiser.state_dict())
    ask = asked(plain); bare = plain.predict(*ask)
    assert quick.predict(*ask).sub(bare).abs().max() < 1e-5
    handle = inject_lora(plain.denoiser, "attention", rank=2)
    lora = moved(extract_lora(plain.pipe)); handle.remove()
    for mode in ("inject", "merge"):
        for b in (plain, quick): apply_lora(b.pipe, lora, .7, mode=mode)
        want, got = (b.predict(*ask) for b in (plain, quick))
        assert want.sub(bare).abs().max() > 1e-3 and got.sub(want).abs().max() < 1e-5
        for b in (plain, quick): remove_lora(b.pipe)
        assert quick.predict(*ask).sub(bare).abs().max() < 1e-5


def test_gradients_of_compiled_blocks_are_those_of_plain_ones():
    grads = []
    for b in (as_base(random_pipe("sd3")), compile_denoiser(as_base(random_pipe("sd3")), backend="aot_eager")):
        torch.manual_seed(0)
        worn = inject_lora(b.denoiser, "attention", rank=2)
        b.predict(*asked(b)).square().mean().backward()
        grads.append({n: p.grad for n, p in b.denoiser.named_parameters() if p.grad is not None})
        worn.remove()
    assert list(grads[0]) == list(grads[1]) and grads[0]
    assert max((grads[0][n] - grads[1][n]).abs().max() for n in grads[0]) < 1e-5


def test_training_on_a_compiled_base_gives_the_same_lora(tmp_path):
    made = []
    for quick in (False, True):
        base = as_base(random_pipe("sd"))
        if quick: compile_denoiser(base, **EAGER)
        torch.manual_seed(0)
        made.append(train_dreambooth(base, [Image.new("RGB", (64, 64), "red")], "a sks wall", steps=2, batch_size=1, rank=2,
                                     gradient_checkpointing=quick, output_dir=tmp_path / str(quick)))
    plain, quick = made
    assert list(plain.layers) == list(quick.layers) and not any("_orig_mod" in n for n in quick.layers)
    assert max((plain.layers[n].delta() - quick.layers[n].delta()).abs().max() for n in plain.layers) < 1e-5
    kept = quick.save(tmp_path / "quick.safetensors") or tmp_path / "quick.safetensors"
    assert {*Lora.load(kept).layers} == {*quick.layers}


def test_strengths_change_without_compiling_again():
    from torch._dynamo.testing import CompileCounter
    counter = CompileCounter()
    base = compile_denoiser(as_base(random_pipe("sd3")), backend=counter)
    handle = inject_lora(base.denoiser, "attention", rank=2); lora = moved(extract_lora(base.pipe)); handle.remove()
    apply_lora(base.pipe, lora, 1., mode="inject"); ask = asked(base)
    with torch.no_grad():
        base.predict(*ask); graphs = counter.frame_count
        for s in (.1, .5, .9): tune_lora_scale(base.denoiser, s); base.predict(*ask)
    assert graphs and counter.frame_count == graphs


@pytest.mark.parametrize("f", ("sd", "sdxl", "sd3", "flux", "flux2", "zimage"))
def test_every_family_has_blocks(f): assert repeated_blocks(as_base(random_pipe(f)).denoiser)


# --- refusals ----------------------------------------------------------------------------------------------------------

def test_a_missing_compiler_is_told_before_anything_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(LoraError, match="C\\+\\+ compiler"): load_base(tmp_path, device="cpu", compile=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LoraError, match="triton"): check_compiler(torch.device("cuda"))
    check_compiler(torch.device("cuda"), "aot_eager")


@pytest.mark.parametrize("kw, match", ((dict(compile="fast"), "expected True"), (dict(compile=dict(backend="inducter")), "inductor"),
                                       (dict(attention_backend="flush"), "expected one of .*flash")))
def test_unknown_wishes_are_refused_with_the_list(kw, match):
    for source in ("tiny-sd", random_pipe("sd")):
        with pytest.raises(LoraError, match=match): load_base(source, device="cpu", **kw)


def test_a_network_that_would_ignore_a_backend_refuses_it(family):
    with pytest.raises(LoraError, match="would ignore it"): set_attention(as_base(random_pipe(family)), "native")


def test_flux_takes_a_backend_and_answers_as_before():
    base = as_base(random_pipe("flux")); z = torch.randn(1, base.vae.config.latent_channels, 8, 8)
    ask = z, torch.tensor([300.]), base.encode_prompts(["a cat"])
    try:
        with torch.no_grad():
            want = base.predict(*ask)
            assert load_base(base, attention_backend="_native_math").predict(*ask).sub(want).abs().max() < 1e-5
        with pytest.raises(LoraError, match="cannot be used here"): set_attention(base, "sage")      # not installed
        assert {"native", "flash", "sage"} <= {*attention_backends()}
    finally: base.denoiser.reset_attention_backend(); set_attention(base, "native")


# --- network by network ------------------------------------------------------------------------------------------------

def test_each_network_is_placed_before_the_next_is_read(monkeypatch, tmp_path):
    from diffusers import DiffusionPipeline
    with quiet(): random_pipe("sd3").save_pretrained(tmp_path)
    seen, real = [], DiffusionPipeline.from_pretrained.__func__
    def noted(cls, *args, **kw): seen.append(kw.get("device_map")); return real(cls, *args, **kw)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(noted))
    base = load_base(tmp_path, device="cpu")
    assert seen == ["cpu"] and {m.device.type for m in base.parts().values()} == {"cpu"}
    want = as_base(random_pipe("sd3")); ask = asked(want)
    with torch.no_grad(): assert base.predict(*ask).sub(want.predict(*ask)).abs().max() < 1e-5
    base.pipe.to("cpu", torch.float64)                      # it can still be moved: phases of a training do
    assert base.dtype == torch.float64
