"""The peft and kohya files that we write load at the right scale in plain diffusers: in the installed version, and in others beside it.

LORA_NB_BESIDE names folders (pip install --target) with diffusers, peft and transformers of other versions, separated by ':'."""
import json, os, subprocess, sys
from pathlib import Path

import pytest
from helpers_files import random_lora
from helpers_plain import plain_config, wrong_layers
from safetensors.torch import load_file, save_file

from lora_nb.lora import Lora
from lora_nb.random_pipes import random_pipe

FAMILIES = ("sd", "sdxl", "sd3")
BESIDE = [p for p in os.environ.get("LORA_NB_BESIDE", "").split(os.pathsep) if p]
KOHYA = {"sd": [("kohya", {})], "sdxl": [("kohya", {}), ("kohya sgm", dict(dialect="sgm"))]}      # of SD3 diffusers loads nothing
OLD_READER = {f"unet.{n}" for n in ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2", "add_embedding.linear_1",
                                    "add_embedding.linear_2")}     # diffusers 0.36 has no kohya names for these
LEAVES = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    "LoRAs of ranks 1 to 3 and several alphas, on every layer that diffusers can adapt"
    folder, jobs = tmp_path_factory.mktemp("versions"), []
    for family in FAMILIES:
        pipe = random_pipe(family)
        parts = {c: getattr(pipe, c) for c in ("unet", "transformer", "text_encoder", "text_encoder_2") if getattr(pipe, c, None) is not None}
        fits = lambda n: n.split(".")[0] in parts and "pos_embed" not in n and (not n.startswith("text") or n.endswith(LEAVES))
        lora = random_lora(pipe, fits)
        save_file({n: f.delta().contiguous() for n, f in lora.layers.items()}, folder/f"{family}.want")
        models = {c: plain_config(m) for c, m in parts.items()}
        for name, options in (("padded", {}), ("mixed", dict(pad=False))):
            lora.save(folder/f"{family}_{name}.safetensors", **options)
            assert Lora.load(folder/f"{family}_{name}.safetensors") == lora
            jobs.append(dict(name=f"{family} {name}", file=str(folder/f"{family}_{name}.safetensors"), want=str(folder/f"{family}.want"),
                             pipe=type(pipe).__name__, models=models))
        for name, options in KOHYA.get(family, ()):
            for part, end in ((lora, ""), (lora.only("unet"), " unet")):
                path = folder/f"{family}_{name}{end}.safetensors".replace(" ", "_")
                part.save(path, "kohya", base=pipe, **options)
                assert Lora.load(path, base=pipe) == part
                save_file({n: f.delta().contiguous() for n, f in part.layers.items()}, path.with_suffix(".want"))
                jobs.append(dict(jobs[-1], name=f"{family} {name}{end}", file=str(path), want=str(path.with_suffix(".want"))))
        only = lora.only("unet", "transformer")                            # no metadata reaches diffusers
        only.save(folder/f"{family}_bare.safetensors")
        save_file({n: f.delta().contiguous() for n, f in only.layers.items()}, folder/f"{family}_bare.want")
        jobs.append(dict(jobs[-1], name=f"{family} bare", file=str(folder/f"{family}_bare.safetensors"),
                         want=str(folder/f"{family}_bare.want"), bare=True))
    return jobs


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_the_right_scale(jobs, family):
    for job in jobs:
        if job["name"].startswith(family + " "): assert not wrong_layers(job), job["name"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_written_form(jobs, family):
    "What older versions need, seen in the file: one rank a component, no alphas, a whole configuration for each"
    for job in jobs:
        if not job["name"].startswith(family + " ") or "mixed" in job["name"] or "kohya" in job["name"]: continue
        tensors = load_file(job["file"])
        with open(job["file"], "rb") as f: header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        config, ranks = json.loads(header["__metadata__"]["lora_adapter_metadata"]), {}
        for k, t in tensors.items():
            assert ".lora_A." in k or ".lora_B." in k
            ranks.setdefault(k.split(".")[0], set()).add(t.shape[0 if ".lora_A." in k else 1])
        assert all(len(r) == 1 for r in ranks.values())
        for c, (r,) in ranks.items():
            assert config[f"{c}.r"] == config[f"{c}.lora_alpha"] == r and config[f"{c}.rank_pattern"] == config[f"{c}.alpha_pattern"] == {}
            assert {*config} >= {f"{c}.{k}" for k in ("target_modules", "use_dora", "lora_bias")}


@pytest.mark.parametrize("family", KOHYA)
def test_the_written_form_of_kohya(jobs, family, tmp_path):
    "One alpha a component; without it, diffusers takes one layer's alpha for another"
    for job in jobs:
        if not job["name"].startswith(f"{family} kohya"): continue
        alphas = {}
        for k, t in load_file(job["file"]).items():
            if k.endswith(".alpha"): alphas.setdefault(k[:8], set()).add(t.item())
        assert all(len(a) == 1 for a in alphas.values()) and alphas
    lora = Lora.load(job["file"])                                           # with its own alphas, from our note
    lora.save(tmp_path/"own.safetensors", "kohya", one_alpha=False)
    assert Lora.load(tmp_path/"own.safetensors") == lora
    assert wrong_layers(dict(job, file=str(tmp_path/"own.safetensors")))


@pytest.mark.skipif(not BESIDE, reason="LORA_NB_BESIDE names no folder with another version of diffusers")
@pytest.mark.parametrize("folder", BESIDE)
def test_the_same_in_another_version(jobs, folder, tmp_path):
    (tmp_path/"jobs.json").write_text(json.dumps(jobs))
    run = subprocess.run([sys.executable, Path(__file__).with_name("helpers_plain.py"), tmp_path/"jobs.json"], capture_output=True, text=True,
                         env=dict(os.environ, PYTHONPATH=folder, HF_HUB_OFFLINE="1"))
    assert not run.returncode, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    new = [int(n) for n in found["version"].split(".")[:2]] >= [0, 39]
    for name, wrong in found["wrong"].items():
        if "sgm" in name and not new: assert "not supported" in str(wrong), (name, wrong)       # it refuses the file for the same layers
        elif "kohya" in name and not new: assert set(wrong) <= OLD_READER and set(wrong.values()) <= {"not loaded"}, (name, wrong)
        elif "kohya" in name and "unet" not in name and "IndexError" in str(wrong): assert "0.39" in found["version"], (name, wrong)
        else: assert not wrong, (name, wrong)           # 0.39 with transformers 5 fails on text encoders in any kohya file
