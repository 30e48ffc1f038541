import contextlib, io
from unittest.mock import patch

import diffusers
import pytest
import torch
import transformers
from diffusers import StableDiffusionPipeline
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from lora_nb.checkpoints import merge_checkpoint, no_bars, read_single_file, save_checkpoint
from lora_nb.core import FormatError, LoraError, data_path
from lora_nb.injection import apply_lora, inject_lora, remove_lora
from lora_nb.loading import load_base
from lora_nb.lora import Lora
from lora_nb.names import canonical
from lora_nb.random_pipes import random_pipe
from lora_nb.worn import adapters

logs = diffusers.utils.logging, transformers.utils.logging
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

@pytest.fixture(autouse=True)
def bars():
    "Each test may switch progress bars; the old setting comes back"
    was = bars_now()
    yield
    set_bars(*was)

def bars_now(): return [*(l.is_progress_bar_enabled() for l in logs), not are_progress_bars_disabled()]

def set_bars(*on):
    for l, o in zip(logs, on): l.enable_progress_bar() if o else l.disable_progress_bar()
    enable_progress_bars() if on[2] else disable_progress_bars()

@pytest.fixture(scope="module")
def base(): return load_base("tiny-sd", device="cpu", dtype=torch.float32)

@pytest.fixture(scope="module")
def lora(): return Lora.load(data_path("loras", "jack-o-lantern.safetensors"))


def test_a_full_disk_leaves_the_old_folder(base, lora, tmp_path):
    merge_checkpoint(base, lora, tmp_path / "folder")
    old = (tmp_path / "folder" / WEIGHTS).read_bytes()
    teapot = Lora.load(data_path("loras", "teapot.safetensors"))
    with patch.object(type(base.pipe.scheduler), "save_pretrained", side_effect=OSError("no space left")):   # in the middle
        with pytest.raises(OSError, match="no space"): merge_checkpoint(base, teapot, tmp_path / "folder")
    assert (tmp_path / "folder" / WEIGHTS).read_bytes() == old and not adapters(base)
    assert not list(tmp_path.glob(".*"))


def test_two_halves_in_half_precision_replace_a_pipeline(base, lora, tmp_path):
    save_checkpoint(base, tmp_path / "folder")
    merge_checkpoint(base, [lora, lora], tmp_path / "folder", scale=[.5, .5], dtype=torch.float16)
    half = StableDiffusionPipeline.from_pretrained(tmp_path / "folder", dtype=torch.float16)
    assert half.unet.dtype == torch.float16
    name = apply_lora(base, lora)
    worn = base.denoiser.mid_block.attentions[0].proj_in.weight.detach().clone()
    remove_lora(base, name)
    assert torch.allclose(half.unet.mid_block.attentions[0].proj_in.weight.float(), worn, atol=2e-3)


def test_from_paths_to_a_folder(tmp_path):
    path = merge_checkpoint(str(data_path("tiny-sd")), data_path("loras", "jack-o-lantern.safetensors"), tmp_path / "made")
    assert path == tmp_path / "made" and (path / "model_index.json").is_file()


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_every_family_into_a_folder_quietly(family, tmp_path):
    p, main = random_pipe(family), "transformer" if family == "sd3" else "unet"
    set_bars(True, True, True)
    with contextlib.redirect_stderr(io.StringIO()) as said: save_checkpoint(p, tmp_path / family)
    assert (said.getvalue(), bars_now()) == ("", [True] * 3)
    set_bars(False, False, True)
    if family != "sd":
        with pytest.raises(FormatError, match="SD1.x only"): save_checkpoint(p, tmp_path / "x.safetensors", "single_file")
    back = type(p).from_pretrained(tmp_path / family).components[main].state_dict()
    assert all(torch.equal(t, back[k]) for k, t in p.components[main].state_dict().items())


@pytest.mark.parametrize("on", [(a, b, c) for a in (True, False) for b in (True, False) for c in (True, False)])
def test_bars_come_back(on):
    set_bars(*on)
    with pytest.raises(KeyboardInterrupt), no_bars():
        assert bars_now()[:2] == [False, False]
        raise KeyboardInterrupt
    assert bars_now() == list(on)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_single_files_hold_every_weight(suffix, tmp_path):
    p = random_pipe("sd")
    save_checkpoint(p, tmp_path / f"tiny{suffix}", "single_file")
    parts, rest = read_single_file(tmp_path / f"tiny{suffix}", p)
    assert rest == []
    for c, found in parts.items():
        want = {canonical(n): t for n, t in getattr(p, c).state_dict().items()}
        assert set(want) == set(found) and all(torch.equal(t, found[n]) for n, t in want.items())


def test_files_that_are_odd_or_broken(base, tmp_path):
    p = random_pipe("sd")
    for n in ("tiny.ckpt", "tiny.safetensors"): save_checkpoint(p, tmp_path / n, "single_file")
    held = torch.load(tmp_path / "tiny.ckpt", weights_only=True)["state_dict"]
    torch.save({"state_dict": {**held, "model_ema.decay": torch.ones(())}}, tmp_path / "ema.ckpt")
    assert read_single_file(tmp_path / "ema.ckpt", p)[1] == ["model_ema.decay"]
    with pytest.raises(FormatError, match="does not fit"): read_single_file(tmp_path / "tiny.ckpt", base.pipe)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "tiny.safetensors").read_bytes()[:5000])
    with pytest.raises(FormatError, match="cannot be read"): read_single_file(tmp_path / "cut.safetensors", p)


def test_what_cannot_be_written(lora, tmp_path):
    p = random_pipe("sd")
    with pytest.raises(FormatError, match=".ckpt"): save_checkpoint(p, tmp_path / "x.bin", "single_file")
    with pytest.raises(FormatError, match="unknown"): save_checkpoint(p, tmp_path / "x", "zip")
    with pytest.raises(LoraError, match="expected one for each"): merge_checkpoint(p, [lora], tmp_path / "x", scale=[1, 2])
    inject_lora(p, "attention", rank=1)
    with pytest.raises(LoraError, match="branches"): save_checkpoint(p, tmp_path / "x")
    assert not list(tmp_path.iterdir())
