"Several processes: they meet before a base is loaded, each takes its own device, and one run is in the folder."
import json, os, subprocess, sys
from pathlib import Path


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


def launch(*command):
    "Two processes on this machine"
    env = dict(os.environ, OMP_NUM_THREADS="1", LORA_NB_QUIET="1", PYTHONPATH=str(Path(__import__("lora_nb").__file__).parent.parent))
    p = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, command)], env=env,
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
