"Several processes: they meet before a base is loaded, each takes its own device, and one run is in the folder."
import json, os, runpy, socket, subprocess, sys
from pathlib import Path

import pytest
import torch

from lora_nb.core import data_path

MEET = '''
import sys, torch, accelerate
from unittest.mock import patch
kept = accelerate.PartialState._prepare_backend
def gloo(self, cpu=False, *a, **kw): return ("gloo", kept(self, cpu, *a, **kw)[1])
with patch("torch.cuda.is_available", lambda: True), patch("torch.cuda.device_count", lambda: 2), patch("torch.cuda.set_device") as took, \\
     patch.object(accelerate.PartialState, "_prepare_backend", gloo):
    from lora_nb.processes import is_main_process, join_processes, main_process_first, number_of_processes
    from lora_nb.core import LoraError
    own = join_processes("cuda")
    assert torch.distributed.is_initialized() and took.call_args.args == (own,)
    wrong = ""
    try: join_processes(f"cuda:{1 - own.index}")
    except LoraError as e: wrong = str(e)
    print(f"{own} of {number_of_processes()}, first {is_main_process()}; {wrong}\\n", end="")
'''


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def environment(**more):
    return dict(os.environ, OMP_NUM_THREADS="1", LORA_NB_QUIET="1", PYTHONPATH=str(Path(__import__("lora_nb").__file__).parent.parent), **more)


def launch(*command, **env):
    "Two processes on this machine"
    p = subprocess.run([*TORCHRUN, "--standalone", "--nproc-per-node=2", *map(str, command)], env=environment(**env),
                       capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr[-3000:]
    return p.stdout


def test_two_processes_on_two_imagined_gpus(tmp_path):
    (tmp_path / "meet.py").write_text(MEET)
    said = sorted(launch(tmp_path / "meet.py").splitlines())
    assert [s.split(";")[0] for s in said] == ["cuda:0 of 2, first True", "cuda:1 of 2, first False"]
    assert all("Leave the number of the device out" in s for s in said)


def test_the_command_makes_one_run_of_two_processes(tmp_path):
    "Without a GPU, a launcher's two processes used to be two runs in one folder"
    said = launch("-m", "lora_nb.cli", "lora_dreambooth", "--instance_data_dir", data_path("subjects", "teddy_bear"), "--instance_prompt",
                  "a sks toy", "--device", "cpu", "--train_batch_size", 1, "--max_train_steps", 2, "--targets", "attention", "--output_dir",
                  tmp_path / "run", "--with_prior_preservation", "--class_prompt", "a toy", "--class_data_dir", tmp_path / "toys",
                  "--num_class_images", 2, "--sample_batch_size", 1, "--save_steps", 1)
    assert said.count("Trained 2 steps") == 1, said
    assert sorted(p.name for p in (tmp_path / "toys").glob("*.png")) == ["class-0000.png", "class-0001.png"]
    assert len(json.loads((tmp_path / "run/log.json").read_text())["losses"]) == 2
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 2


TRAIN = '''
import contextlib, json, sys, torch
from pathlib import Path
from PIL import Image
from lora_nb.dataset import ConceptDataset, encode
from lora_nb.families import as_base
from lora_nb.injection import inject_lora
from lora_nb.processes import average, join_processes, number_of_processes, sharding_wanted
from lora_nb.random_pipes import random_pipe
from lora_nb.recipe import Recipe
from lora_nb.samples import Stream
from lora_nb.training import Trainer

def run(folder, batch, steps=3):
    join_processes("cpu")
    base = as_base(random_pipe("sd3"))
    data = ConceptDataset([Image.new("RGB", (64, 64), c) for c in ("red", "green", "blue")], "a wall", size=64)
    torch.manual_seed(0); worn = inject_lora(base.denoiser, "attention", rank=2)
    sent = []
    if number_of_processes() > 1:
        own = torch.distributed.all_reduce
        torch.distributed.all_reduce = lambda t, *a, **kw: (sent.append(t.numel()), own(t, *a, **kw))[1]
    previews = dict(prompts=["a cat", "a dog", "a bird"], seeds=[0, 1, 2], steps=1)
    recipe = Recipe(steps=steps, rank=2, guard=False, mixed_precision="no", preview_every=steps, checkpoint_every=steps)
    trainer = Trainer(base, worn, [Stream("subject", encode(base, data), batch)], recipe, previews=previews, output_dir=folder)
    trainer.fit()
    frozen = [p for p in base.denoiser.parameters() if not p.requires_grad]
    own = lambda p: p.to_local().numel() if hasattr(p, "to_local") else p.numel()
    share = sum(map(own, frozen)) / sum(p.numel() for p in frozen)
    images = [im.tobytes() for im in trainer.log.previews[-1][1]]
    return [p.detach().clone() for p in trainer.all_params()], list(trainer.log.losses), share, sent, images

if __name__ == "__main__":
    out = run(Path(sys.argv[1]), 2)
    import torch.distributed as dist
    torch.save(out, f"{sys.argv[1]}/rank{dist.get_rank()}.pt")
'''


def far(a, b): return max((x - y).abs().max().item() for x, y in zip(a, b))


def near_pictures(a, b): return len(a) == len(b) and all(max(abs(x - y) for x, y in zip(p, q)) <= 3 for p, q in zip(a, b))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone"); (folder / "train.py").write_text(TRAIN)
    return folder, runpy.run_path(str(folder / "train.py"))["run"](folder, 4)


def test_frozen_weights_in_two_halves_train_what_one_process_trains(alone, tmp_path):
    "FSDP2 on gloo: each process keeps half of the frozen weights, the LoRA is whole in both"
    params, losses, _, _, images = alone[1]
    launch(alone[0] / "train.py", tmp_path, ACCELERATE_USE_FSDP="true", ACCELERATE_USE_CPU="true")
    for rank in range(2):
        p, l, share, sent, drawn = torch.load(tmp_path / f"rank{rank}.pt")
        assert far(params, p) < 1e-5 and max(abs(a - b) for a, b in zip(losses, l)) < 1e-5
        assert .4 < share < .6 and near_pictures(images, drawn)


def test_gradients_travel_in_one_bucket_and_previews_are_shared(alone, tmp_path):
    params, losses, share, _, images = alone[1]
    launch(alone[0] / "train.py", tmp_path, ACCELERATE_USE_CPU="true")
    for rank in range(2):
        p, l, mine, sent, drawn = torch.load(tmp_path / f"rank{rank}.pt")
        assert far(params, p) < 1e-5 and share == mine == 1 and near_pictures(images, drawn)
        assert sent.count(sum(x.numel() for x in params)) == 3 and len(sent) <= 3 * 2 + 2     # a bucket and the losses, each step
    assert len(list((tmp_path / "previews").glob("*.png"))) == 6                              # at the start and at the end


def test_two_machines_are_two_groups_that_meet(alone, tmp_path):
    "What --num_machines 2 does, with both machines on this host"
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    started = []
    for rank in range(2):
        command = [*TORCHRUN, "--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}",
                   str(alone[0] / "train.py"), str(tmp_path)]
        started.append(subprocess.Popen(command, env=environment(ACCELERATE_USE_CPU="true"), stderr=subprocess.PIPE, text=True))
    for p in started: assert p.wait(300) == 0, p.stderr.read()[-3000:]
    for rank in range(2): assert far(alone[1][0], torch.load(tmp_path / f"rank{rank}.pt")[0]) < 1e-5
