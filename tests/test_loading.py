import pickle, shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_nb.families import as_base
from lora_nb.checkpoints import save_checkpoint, vae_key
from lora_nb.core import LoraError, quiet
from lora_nb.loading import load_base, variants_in
from lora_nb.random_pipes import random_pipe

CPU = dict(device="cpu")


@pytest.fixture(scope="module")
def sd3(): return as_base(random_pipe("sd3"), "random sd3")


def fails(match, source, **kw):
    with pytest.raises(LoraError, match=match): load_base(source, **{**CPU, **kw})


def test_files_that_are_no_base(tmp_path):
    fails("model_index.json", tmp_path)
    save_file({"unet.x.lora_A.weight": torch.zeros(1)}, tmp_path/"l.safetensors")
    fails("If this is a LoRA", tmp_path/"l.safetensors")
    (tmp_path/"cut.safetensors").write_bytes((tmp_path/"l.safetensors").read_bytes()[:20])
    fails("cannot be read", tmp_path/"cut.safetensors")
    (tmp_path/"evil.ckpt").write_bytes(pickle.dumps({"x": print}))
    fails("cannot be read", tmp_path/"evil.ckpt")


def test_a_single_file_without_its_configurations(tmp_path):
    save_checkpoint(random_pipe("sd"), f"{tmp_path}/whole.safetensors", "single_file")
    (tmp_path/"empty").mkdir()
    fails("config=", tmp_path/"whole.safetensors", config=f"{tmp_path}/empty")


def test_a_hub_id_that_cannot_be_reached(): fails("HF_HUB_OFFLINE is set|hub", "nobody/no-such-model")


@pytest.mark.parametrize("shards", ["10GB", "20KB"], ids=["whole", "shards"])
def test_a_folder_of_fp16_files_only(tmp_path, shards):
    pipe = random_pipe("sdxl").to(torch.float16)
    with quiet(): pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size=shards)
    names = [f.name for f in (tmp_path/"unet").iterdir()]
    assert not any(f == "diffusion_pytorch_model.safetensors" for f in names) and (len(names) > 3) == (shards == "20KB")
    base = load_base(tmp_path, **CPU)
    assert base.dtype == torch.float32                      # computes in fp32 on a CPU
    for name, p in pipe.unet.named_parameters(): assert p.float().equal(base.pipe.unet.get_parameter(name)), name
    assert load_base(tmp_path, variant="fp16", dtype=torch.float16, **CPU).dtype == torch.float16
    fails("variant='bf16'.* has fp16", tmp_path, variant="bf16")


def test_a_folder_with_both_is_loaded_as_it_was(tmp_path):
    pipe = random_pipe("sd")
    with quiet():
        pipe.save_pretrained(tmp_path)
        random_pipe("sd").to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert variants_in(tmp_path)["unet"] == {"", "fp16"}
    w = pipe.unet.conv_in.weight
    assert load_base(tmp_path, **CPU).pipe.unet.conv_in.weight.equal(w)
    fails("no variants", "tiny-sd", variant="fp16")


@pytest.mark.parametrize("dtype, has, asked", [(torch.float16, True, ["fp16"]), (torch.bfloat16, False, ["fp16", None]),
                                               (torch.float32, True, [None])], ids=str)
def test_the_hub_is_asked_for_half_the_bytes_first(monkeypatch, dtype, has, asked):
    import diffusers
    seen, pipe = [], random_pipe("sd")
    def fetch(source, variant=None, **kw):
        assert source == "someone/model" and kw["revision"] == "v2"
        seen.append(variant)
        if variant and not has: raise ValueError(f"You are trying to load the model files of the `variant={variant}`, but no such files")
        return pipe
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", staticmethod(fetch))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", lambda *a, **kw: {"_class_name": "StableDiffusionPipeline"})
    load_base("someone/model", dtype=dtype, revision="v2", **CPU)
    assert seen == asked


def test_a_hub_that_refuses_says_what_to_do(monkeypatch):
    import diffusers, httpx
    from huggingface_hub import errors
    reply = httpx.Response(403, request=httpx.Request("GET", "https://hub"))
    def refuse(kind, *args, **kw):
        def load(*a, **k):
            try: raise kind(*args, **kw)
            except Exception: raise OSError("someone/model is not a local folder")
        monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", load)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    refuse(errors.GatedRepoError, "gated", response=reply); fails("Accept its licence on https://huggingface.co/someone/model", "someone/model")
    refuse(errors.RepositoryNotFoundError, "none", response=reply); fails("no such repository", "someone/model")
    refuse(errors.RevisionNotFoundError, "none", response=reply); fails("no such revision", "someone/model", revision="x")
    refuse(httpx.ConnectError, "down"); fails("hf download someone/model --local-dir", "someone/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1"); fails("HF_HUB_OFFLINE is set", "someone/model")


def test_wishes_are_checked(sd3):
    fails("is not one", "tiny-sd", revision="main")
    fails("loaded already", sd3, variant="fp16")
    fails("expected True, False or '8bit'", "tiny-sd", t5="no")
    fails("'sequential'", "tiny-sd", offload="disk")
    fails("loaded already", sd3, t5=False)
    assert load_base("tiny-sd", t5=False, **CPU).family == "sd"          # nothing to leave out


@pytest.mark.parametrize("family", ("sd", "sd3", "sd_inpaint"))
def test_a_saved_pipeline_comes_back(family, tmp_path):
    b = as_base(random_pipe(family))
    with quiet(): b.pipe.save_pretrained(tmp_path)
    c = load_base(tmp_path, **CPU)
    assert (c.family, c.inpainting) == (b.family, b.inpainting)
    one, two = (x.encode_prompts(["a cat"])["prompt_embeds"] for x in (b, c))
    assert (one - two).abs().max() <= 1e-5


HEAD = {"pos_embed.pos_embed": "pos_embed", "pos_embed.proj": "x_embedder.proj", "proj_out": "final_layer.linear",
        "context_embedder": "context_embedder", "norm_out.linear": "final_layer.adaLN_modulation.1",
        **{f"time_text_embed.{a}_embedder.linear_{i}": f"{b}_embedder.mlp.{2 * i - 2}"
           for a, b in (("timestep", "t"), ("text", "y")) for i in (1, 2)}}
INNER = {"to_out.0": "proj", "to_add_out": "proj", "norm_q": "ln_q", "norm_k": "ln_k", "norm_added_q": "ln_q",
         "norm_added_k": "ln_k", "net.0.proj": "fc1", "net.2": "fc2", "linear": "1"}
PARTS = {"ff": ("x_block", "mlp"), "ff_context": ("context_block", "mlp"), "norm1": ("x_block", "adaLN_modulation"),
         "norm1_context": ("context_block", "adaLN_modulation"), "attn2": ("x_block", "attn2")}


def single_sd3(net, vae):
    "name -> tensor in the names of Stability's files"
    sd, out, last = net.state_dict(), {}, net.config.num_layers - 1
    halves = lambda t: torch.cat(t.chunk(2)[::-1])                       # scale and shift are in the other order there
    for n, t in sd.items():
        stem, kind = n.rsplit(".", 1) if n != "pos_embed.pos_embed" else (n, "")
        if not n.startswith("transformer_blocks."):
            key = ".".join(filter(None, (HEAD[stem], kind)))
            out[key] = halves(t) if "norm_out" in n else t; continue
        _, i, part, inner = stem.split(".", 3)
        if inner in ("to_k", "to_v", "add_k_proj", "add_v_proj"): continue
        side, name = PARTS.get(part, ("context_block" if "add" in inner else "x_block", "attn"))
        if inner in ("to_q", "add_q_proj"):
            t = torch.cat([sd[n.replace("_q", f"_{x}")] for x in "qkv"]); inner = "qkv"
        if part == "norm1_context" and int(i) == last: t = halves(t)
        out[f"joint_blocks.{i}.{side}.{name}.{INNER.get(inner, inner)}.{kind}"] = t
    out = {f"model.diffusion_model.{k}": t for k, t in out.items()}
    for n, t in vae.state_dict().items():
        key = vae_key(n, len(vae.config.up_block_types))
        out[f"first_stage_model.{key}"] = t[..., None, None] if ".attn_1." in key and t.ndim == 2 else t
    return {k: t.clone().contiguous() for k, t in out.items()}


@pytest.fixture(scope="module")
def single(sd3, tmp_path_factory):
    "A single file of SD3.5 without text encoders, and a folder of configurations and text encoders"
    where = tmp_path_factory.mktemp("single")
    with quiet(): sd3.pipe.save_pretrained(where/"folder")
    save_file(single_sd3(sd3.denoiser, sd3.vae), where/"sd3.safetensors")
    return where/"sd3.safetensors", str(where/"folder")


def test_a_single_file_of_sd3_comes_back_bit_for_bit(sd3, single):
    file, folder = single
    back = load_base(file, config=folder, **CPU)
    for name, net in sd3.parts().items():
        mine = back.parts()[name].state_dict()
        assert all(torch.equal(t, mine[k]) for k, t in net.state_dict().items()), name


def test_a_single_file_of_sd3_without_t5(sd3, single):
    file, folder = single
    light = load_base(file, config=folder, t5=False, **CPU)
    assert list(light.text_encoders) == ["text_encoder", "text_encoder_2"]
    one, two = (b.encode_prompts(["a"])["prompt_embeds"][:, :77] for b in (light, sd3))
    assert (one - two).abs().max() <= 1e-5


def test_a_text_encoder_that_is_nowhere(single, tmp_path):
    file, folder = single
    shutil.copytree(folder, tmp_path/"folder"); shutil.rmtree(Path(tmp_path, "folder", "text_encoder_2"))
    fails("text encoders", file, config=str(tmp_path/"folder"))


@pytest.mark.parametrize("name, said", [
    ("cuda:99", "this machine has cpu"), ("gpu", "expected a name such as cpu"), ("", "expected a name"), (3.5, "expected a name")])
def test_a_device_that_is_not_there(name, said, tmp_path):
    "Said before anything is loaded"
    with pytest.raises(LoraError, match=said): load_base(tmp_path / "nothing", device=name)
