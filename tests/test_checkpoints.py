import contextlib, errno, io
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
    with patch.object(type(base.pipe.scheduler), "save_pretrained", side_effect=OSError(errno.ENOSPC, "no space left")):   # in the middle
        with pytest.raises(LoraError, match="no space"): merge_checkpoint(base, teapot, tmp_path / "folder", overwrite=True)
    assert (tmp_path / "folder" / WEIGHTS).read_bytes() == old and not adapters(base)
    assert not list(tmp_path.glob(".*"))


def test_two_halves_in_half_precision_replace_a_pipeline(base, lora, tmp_path):
    save_checkpoint(base, tmp_path / "folder")
    merge_checkpoint(base, [lora, lora], tmp_path / "folder", scale=[.5, .5], dtype=torch.float16, overwrite=True)
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


# ------------------------------------------------------------------------------------------ one file for every family
def pipe_of(family):
    "A random pipeline whose files other programs can hold"
    p = random_pipe("sd" if family in ("sd1", "sd2") else family)
    if family == "sd2":
        config = {**p.unet.config, "use_linear_projection": True}
        p.register_modules(unet=type(p.unet).from_config(config))
    if family in ("sdxl", "sd3"):                     # diffusers tells the encoders in a file apart by their widths
        config = type(p.text_encoder_2.config)(**{**p.text_encoder_2.config.to_dict(), "hidden_size": 48, "projection_dim": 48})
        p.register_modules(text_encoder_2=type(p.text_encoder_2)(config))
    if family == "sd3": torch.nn.init.eye_(p.text_encoder.text_projection.weight)
    return p


FAMILIES = ["sd1", "sd2", "sdxl", "sd3"]

@pytest.mark.parametrize("family", FAMILIES)
def test_one_file_of_every_family_is_read_by_diffusers(family, tmp_path):
    p = pipe_of(family)
    save_checkpoint(p, tmp_path / "one.safetensors", "single_file"); save_checkpoint(p, tmp_path / "folder")
    parts, rest = read_single_file(tmp_path / "one.safetensors", p)
    assert rest == [] and {"vae", "text_encoder"} < set(parts)
    back = type(p).from_single_file(str(tmp_path / "one.safetensors"), config=str(tmp_path / "folder"))
    for c, found in parts.items():
        want = {canonical(n): t for n, t in p.components[c].state_dict().items()}
        theirs = {canonical(n): t for n, t in back.components[c].state_dict().items()}
        assert all(torch.equal(t, found[n]) and torch.equal(t, theirs[n]) for n, t in want.items() if "shared" not in n), c
    assert load_base(tmp_path / "one.safetensors", device="cpu", config=str(tmp_path / "folder")).family[:2] == "sd"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_merged_into_one_file_is_what_is_worn(family, tmp_path):
    p = pipe_of(family)
    main = "transformer" if family == "sd3" else "unet"
    torch.manual_seed(1)
    tried = inject_lora(p, "attention", rank=2, component=[main, "text_encoder"])
    for x in tried.params(): x.data.normal_(std=.2)
    mine = tried.lora(); tried.remove()
    mine.save(tmp_path / "lora.safetensors")
    save_checkpoint(p, tmp_path / "folder")
    merge_checkpoint(tmp_path / "folder", tmp_path / "lora.safetensors", tmp_path / "one.safetensors", "single_file", scale=.5)
    parts, _ = read_single_file(tmp_path / "one.safetensors", p)
    name = apply_lora(p, mine, .5)
    worn = {c: {canonical(n): t.clone() for n, t in p.components[c].state_dict().items()} for c in (main, "text_encoder")}
    remove_lora(p, name)
    plain = {canonical(n): t for n, t in p.components[main].state_dict().items()}
    assert all(torch.equal(t, parts[c][n]) for c in worn for n, t in worn[c].items())
    assert any(not torch.equal(t, plain[n]) for n, t in worn[main].items())


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3"])
def test_words_beside_one_file(family, tmp_path):
    p = pipe_of(family)
    width = {c: m.get_input_embeddings().weight.shape[1] for c, m in p.components.items() if c.startswith("text_encoder") and m is not None}
    words = {t: {c: torch.randn(n, d) for c, d in width.items()} for t, n in (("<cat>", 2), ("<dog>", 1))}
    merge = lambda **kw: merge_checkpoint(p, Lora({}, words), tmp_path / "w.safetensors", "single_file", **kw)
    with pytest.raises(FormatError, match="<cat>, <dog>"): merge()
    assert not list(tmp_path.iterdir())
    merge(words="separate")
    parts, rest = read_single_file(tmp_path / "w.safetensors", p)                     # the shapes fit: the words' rows are gone
    found = {}
    for f in sorted(tmp_path.glob("w.*.safetensors")): found |= Lora.load(f).embeddings
    assert rest == [] and Lora({}, found) == Lora({}, words)


def test_what_one_file_has_no_place_for(tmp_path):
    save = lambda p: save_checkpoint(p, tmp_path / "x.safetensors", "single_file")
    with pytest.raises(FormatError, match="not the identity"): save(random_pipe("sd3"))
    p = random_pipe("sd"); p.unet.class_embedding = torch.nn.Linear(4, 4)
    with pytest.raises(FormatError, match="class_embedding|no names"): save(p)
    p = random_pipe("sdxl"); p.register_modules(text_encoder_2=None)
    p.unet.add_embedding.strange = torch.nn.Linear(4, 4)
    with pytest.raises(FormatError): save(p)
    assert not list(tmp_path.iterdir())


def test_a_pipeline_that_predicts_velocity_says_so(tmp_path):
    from diffusers import EulerDiscreteScheduler
    p = random_pipe("sdxl")
    p.scheduler = EulerDiscreteScheduler.from_config(p.scheduler.config, prediction_type="v_prediction")
    save_checkpoint(p, tmp_path / "v.safetensors", "single_file")
    assert read_single_file(tmp_path / "v.safetensors", p)[1] == ["v_pred"]


# ------------------------------------------------------------------------------------------ precision, and what is there already
def weights_of(folder): return {f.relative_to(folder).as_posix(): f.stat().st_size for f in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("stored", [dict(default=torch.float16), dict(default=torch.bfloat16), dict(default=torch.float16, vae=torch.float32),
                                    dict(default=torch.float32, text_encoder=torch.bfloat16)], ids=str)
def test_a_merged_folder_is_as_large_as_its_base(stored, tmp_path):
    p = random_pipe("sd")
    for c in ("unet", "vae", "text_encoder"): getattr(p, c).to(stored.get(c, stored["default"]))
    save_checkpoint(p, tmp_path / "base")
    tried = inject_lora(p, "attention", rank=1)
    for x in tried.params(): x.data.normal_(std=.1)
    mine = tried.lora(); tried.remove()
    merge_checkpoint(tmp_path / "base", mine, tmp_path / "made")
    assert weights_of(tmp_path / "made") == weights_of(tmp_path / "base")
    name = apply_lora(p, mine)
    back = StableDiffusionPipeline.from_pretrained(tmp_path / "made")
    same = [torch.equal(t.float(), back.unet.state_dict()[n].float()) for n, t in p.unet.state_dict().items()]
    remove_lora(p, name)
    assert all(same)


@pytest.mark.parametrize("format, name", [("folder", "out"), ("single_file", "out.safetensors"), ("single_file", "out.ckpt")])
def test_nothing_is_replaced_without_being_asked(base, lora, format, name, tmp_path):
    import shutil
    save_checkpoint(base, tmp_path / "base"); (tmp_path / "other").mkdir()
    path, files = tmp_path / "other" / name, lambda: {f: f.read_bytes() for f in (tmp_path / "other").rglob("*") if f.is_file()}
    def photos(): path.mkdir(); (path / "photo.jpg").write_text("dear")
    makers = [lambda: save_checkpoint(base, path, format), photos, lambda: path.write_text("letter")]
    for make in makers + [lambda: lora.save(path)] * (path.suffix == ".safetensors"):
        make(); kept = files()
        for source in (base, tmp_path / "base"):
            with pytest.raises(LoraError, match="exists"): merge_checkpoint(source, lora, path, format)
        assert files() == kept
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_the_base_is_never_its_own_output(lora, tmp_path, base):
    save_checkpoint(base, tmp_path / "base")
    (tmp_path / "link").symlink_to("base")
    before = {f: f.read_bytes() for f in (tmp_path / "base").rglob("*") if f.is_file()}
    for out in ("base", "link", "base/merged", "base/unet"):
        with pytest.raises(LoraError, match="base would be lost"): merge_checkpoint(tmp_path / "base", lora, tmp_path / out, overwrite=True)
    assert {f: f.read_bytes() for f in (tmp_path / "base").rglob("*") if f.is_file()} == before


@pytest.mark.parametrize("format, name", [("folder", "out"), ("single_file", "out.safetensors"), ("single_file", "out.ckpt")])
def test_a_full_disk_while_a_checkpoint_is_written(format, name, tmp_path):
    import resource
    p, was = random_pipe("sd"), resource.getrlimit(resource.RLIMIT_FSIZE)
    save_checkpoint(p, tmp_path / name, format)
    kept = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, was[1]))
    try:
        with pytest.raises(LoraError, match="cannot write .*unchanged"): save_checkpoint(p, tmp_path / name, format, overwrite=True)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, was)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == kept


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".safetensors", "x" * 300 + "/y.safetensors", "a\0b.safetensors",
                                  "a.safetensors/b.safetensors"])
def test_names_that_no_file_can_have(base, lora, name, tmp_path):
    from PIL import Image
    from lora_nb.composition import add_files
    from lora_nb.schedule import parse_lora
    from lora_nb.scheduling import scheduled
    from lora_nb.states import newest_state, read_previews, read_state, write_previews, write_state
    lora.save(a := tmp_path / "a.safetensors"); path = tmp_path / name
    writers = [lambda: save_checkpoint(base, path), lambda: save_checkpoint(base, path, "single_file"),
               lambda: merge_checkpoint(base, lora, path),
               lambda: merge_checkpoint(str(path), lora, tmp_path / "out"), lambda: add_files(a, a, path),
               lambda: add_files(path, a, tmp_path / "out"),
               lambda: add_files(tmp_path / "base", a, path, mode="upl"), lambda: write_state(path, {"step": 1}), lambda: read_state(path),
               lambda: write_previews(path, 1, [Image.new("RGB", (8, 8))]), lambda: lora.save(path), lambda: Lora.load(path),
               lambda: scheduled(base, {str(path): 1}).__enter__()]
    for f in writers:
        with pytest.raises(LoraError): f()
    for f in (newest_state, lambda p: read_previews(p, 1), lambda p: parse_lora(str(p))):
        try: f(path)
        except LoraError: pass
    assert [*tmp_path.iterdir()] == [a]


@pytest.mark.parametrize("what", ["state", "preview", "sum"])
def test_a_full_disk_while_smaller_files_are_written(lora, what, tmp_path):
    import resource
    from PIL import Image
    from lora_nb.composition import add_files
    from lora_nb.states import write_previews, write_state
    noise = Image.effect_noise((128, 128), 99)
    lora.save(a := tmp_path / "a.safetensors"); write_state(tmp_path / "step-000001.pt", {"step": 1}); write_previews(tmp_path, 1, [noise])
    add_files(a, a, tmp_path / "sum.safetensors")
    write = dict(state=lambda: write_state(tmp_path / "step-000001.pt", {"step": 1, "params": torch.randn(9999)}),
                 preview=lambda: write_previews(tmp_path, 1, [noise]), sum=lambda: add_files(a, a, tmp_path / "sum.safetensors"))[what]
    kept, was = {f: f.read_bytes() for f in tmp_path.rglob("*")}, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, was[1]))
    try:
        with pytest.raises(LoraError, match="cannot write .*unchanged"): write()
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, was)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*")} == kept


@pytest.mark.parametrize("pipe, kw, says", [(None, {}, "found NoneType"), ("x", {}, "found str"), ("unet", {}, "found UNet2DConditionModel"),
                                            ("base", dict(path=None), "path of a folder"), ("base", dict(dtype="half-ish"), "dtype")])
def test_what_is_no_pipeline(base, pipe, kw, says, tmp_path):
    pipe = base if pipe == "base" else base.denoiser if pipe == "unet" else pipe
    with pytest.raises(LoraError, match=says): save_checkpoint(pipe, **{"path": tmp_path / "o", **kw})
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_merged_into_one_file_is_base_plus_product_in_every_layer(family, tmp_path):
    "Text encoders and convolutions included; read back by diffusers, and compared with the sum made by hand"
    from lora_nb.lora import Factors
    from lora_nb.worn import places
    p, g = pipe_of(family), torch.Generator().manual_seed(3)
    r, layers = lambda *s: .2 * torch.randn(*s, generator=g), {}
    for c, m in p.components.items():
        if c.startswith("text_encoder") or c in ("unet", "transformer"):
            for n, place in places(m).items():
                w = place.module.weight
                if n == "text_projection" or min(w.shape[:2]) < 2: continue          # SD3's must stay the identity
                layers[f"{c}.{n}"] = Factors(r(len(w), 2, *[1] * (w.ndim - 2)), r(2, *w.shape[1:]), alpha=1.)
    want = {c: {canonical(n): t.clone() for n, t in m.state_dict().items()} for c, m in p.components.items() if hasattr(m, "state_dict")}
    for n, f in layers.items():
        c, path = n.split(".", 1)
        want[c][f"{path}.weight"] += .5 * .5 * (f.up.flatten(1) @ f.down.flatten(1)).view_as(want[c][f"{path}.weight"])
    save_checkpoint(p, tmp_path / "folder")
    merge_checkpoint(p, Lora(layers), tmp_path / "one.safetensors", "single_file", scale=.5)
    back, seen = type(p).from_single_file(str(tmp_path / "one.safetensors"), config=str(tmp_path / "folder")), set()
    parts, rest = read_single_file(tmp_path / "one.safetensors", p)
    for c in {n.split(".")[0] for n in layers}:
        theirs = {canonical(n): t for n, t in back.components[c].state_dict().items()}
        for n, t in want[c].items():
            if "shared" in n: continue
            changed = f"{c}.{n.removesuffix('.weight')}" in layers
            same = (lambda a, b: torch.allclose(a, b, atol=1e-6)) if changed else torch.equal
            assert same(theirs[n], t) and torch.equal(parts[c][n], theirs[n]), (c, n)
            seen |= {f"{c}.{n.removesuffix('.weight')}"} if changed else set()
    assert seen == set(layers) and rest == [] and len(seen) > 60
