"Runs that end early: real signals, in this process and in another one, and levels that are no numbers."
import os, signal, subprocess, sys, threading, time
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_nb.core import TrainingError, data_path
from lora_nb.dataset import ConceptDataset, encode
from lora_nb.dreambooth import DreamBooth, train_dreambooth
from lora_nb.families import as_base
from lora_nb.injection import inject_lora
from lora_nb.lora import Lora
from lora_nb.log import TrainingLog
from lora_nb.pti import PivotalTuning
from lora_nb.random_pipes import random_pipe
from lora_nb.recipe import Recipe
from lora_nb.stopping import RunStopped, rise, stop_signals, superfluous, worse
from lora_nb.training import Stream, Trainer

WALL = [Image.new("RGB", (64, 64), "red")]
QUICK = dict(batch_size=1, rank=2, targets="attention", guard=False, steps=6)


@pytest.fixture(scope="module")
def base(): return as_base(random_pipe("sd"))


def bare(base): return not [m for m in base.denoiser.modules() if hasattr(m, "lora_up")]


def send(number, step): return lambda trainer: trainer.done == step and signal.raise_signal(number)


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_ends_a_run_after_its_step_with_everything_saved(base, number, tmp_path):
    before = signal.getsignal(number)
    with pytest.raises(RunStopped, match=r"after step 3 of 6. Saved .*step-000003.pt, .*loras.step-000003.safetensors. resume") as e:
        train_dreambooth(base, WALL, "a sks wall", output_dir=tmp_path, callback=send(number, 3), **QUICK)
    assert e.value.signal == number and signal.getsignal(number) is before and bare(base)
    saved = Lora.load(tmp_path / "loras/step-000003.safetensors")
    assert saved == e.value.lora or saved.content_hash() == e.value.lora.content_hash()
    again = train_dreambooth(base, WALL, "a sks wall", output_dir=tmp_path, resume=True, **QUICK)
    assert again.content_hash() == train_dreambooth(base, WALL, "a sks wall", **QUICK).content_hash()


def test_without_a_folder_the_error_holds_what_was_learned(base):
    with pytest.raises(KeyboardInterrupt, match="attribute `lora`") as e:
        train_dreambooth(base, WALL, "a sks wall", callback=send(signal.SIGINT, 2), **QUICK)
    two = train_dreambooth(base, WALL, "a sks wall", **{**QUICK, "steps": 2})
    assert e.value.lora.content_hash() == two.content_hash() and bare(base)


def test_a_signal_at_the_end_of_a_phase_is_not_lost(base, tmp_path):
    run = PivotalTuning(base, WALL, "<x>", output_dir=tmp_path, ti_steps=2, callback=send(signal.SIGINT, 2), **QUICK)
    with pytest.raises(RunStopped, match="after step 2 of 2"): run.fit()
    assert list((tmp_path / "inversion/loras").iterdir()) and bare(base)


def test_the_second_signal_interrupts_at_once(base):
    def impatient(trainer): signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as e: train_dreambooth(base, WALL, "a sks wall", callback=impatient, **QUICK)
    assert not isinstance(e.value, RunStopped) and bare(base)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ignored_signals_stay_ignored_and_other_threads_train(base):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stop_signals() as noted: signal.raise_signal(signal.SIGTERM)
        assert noted.signal is None and signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally: signal.signal(signal.SIGTERM, before)
    out = []
    thread = threading.Thread(target=lambda: out.append(train_dreambooth(base, WALL, "a sks wall", **{**QUICK, "steps": 1})))
    thread.start(); thread.join()
    assert len(out) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a program at once")
def test_sigterm_to_the_command(tmp_path):
    "What a cluster sends: the command ends with its code, and leaves a LoRA"
    env = dict(os.environ, OMP_NUM_THREADS="1", LORA_NB_QUIET="1", PYTHONPATH=str(Path(__import__("lora_nb").__file__).parent.parent))
    p = subprocess.Popen([sys.executable, "-m", "lora_nb.cli", "lora_dreambooth", "--instance_data_dir", data_path("subjects", "teddy_bear"),
                          "--instance_prompt", "a sks toy", "--device", "cpu", "--train_batch_size", "1", "--max_train_steps", "2000",
                          "--targets", "attention", "--save_steps", "1", "--output_dir", tmp_path], env=env, stderr=subprocess.PIPE, text=True)
    patience = time.time() + 120
    while not list(tmp_path.glob("loras/*.safetensors")) and p.poll() is None and time.time() < patience: time.sleep(.05)
    p.send_signal(signal.SIGTERM)
    said = p.communicate(timeout=60)[1]
    assert p.returncode == 128 + signal.SIGTERM and "Traceback" not in said, said
    assert "Stopped after step" in said and "resume goes on" in said
    last = sorted(tmp_path.glob("loras/*.safetensors"))[-1]
    assert str(last) in said and Lora.load(last).layers


# --- levels ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("levels", ([float("nan")], [1., float("nan")], [1., float("inf"), .5]))
def test_a_level_that_is_no_number_is_a_bad_one(levels): assert worse(levels)


def test_the_guard_looks_at_the_end(base, monkeypatch):
    "At 4 of 4 steps, which no pace would reach"
    levels = iter((1., 1.6))
    monkeypatch.setattr(Trainer, "level", lambda self, m=8: next(levels))
    with pytest.raises(TrainingError, match="was 1 at the start and is 1.6 at step 4"):
        train_dreambooth(base, WALL, "a sks wall", **{**QUICK, "guard": True, "steps": 4})
    assert bare(base) and next(levels, None) is None


def test_numbers_that_are_none_before_the_first_step(base):
    run = DreamBooth(base, WALL, "a sks wall", **{**QUICK, "guard": True})
    run.streams[0].examples.latents[:] = float("nan")
    with pytest.raises(TrainingError, match="nan before the first step"): run.fit()
    assert bare(base)


def test_advice_after_a_schedule_s_end_names_the_rate_that_was_used():
    text = rise(TrainingLog(lrs=[1e-3, 0.], norms=[1., 2.], level=[(0, 1.), (2, float("nan"))]), [Path("step-000001.pt")])
    assert "learning_rate = 0.0001" in text and "is nan at step 2" in text


# --- what is left when it went wrong -----------------------------------------------------------------------------------

@pytest.mark.parametrize("at, ema", ((3, 0), (12, .9), (19, 0)))
def test_a_nan_that_is_seen_late_leaves_the_numbers_from_before(base, at, ema):
    "As on a GPU, where losses are read every ten steps"
    worn, seen = inject_lora(base.denoiser, "attention", rank=2), {}
    def note(t): seen[t.done] = [p.detach().clone() for p in t.all_params()]
    trainer = Trainer(base, worn, [Stream("a", encode(base, ConceptDataset(WALL, "a wall")), 1)],
                      Recipe(rank=2, batch_size=1, steps=30, guard=False, **(dict(ema=ema) if ema else {})), callback=note,
                      penalty=lambda: {"odd": torch.tensor(float("nan") if trainer.done == at else 0.)})
    trainer.window = 10; seen[0] = [p.detach().clone() for p in trainer.all_params()]
    try:
        with pytest.raises(TrainingError, match=f"became nan at step {at + 1}"): trainer.fit()
        assert trainer.done <= at and trainer.done == at // 10 * 10
        assert all(torch.equal(a, b) for a, b in zip(trainer.all_params(), seen[trainer.done]))
        assert worn.lora().check() and (not ema or all(v.isfinite().all() for v in trainer.average.values))
    finally: worn.remove()


def test_the_checkpoint_from_before_the_rise_is_kept(tmp_path):
    for n in range(10, 60, 10): (tmp_path / f"step-{n:06d}.pt").touch()
    gone = lambda keep, levels: [int(p.stem[5:]) for p in superfluous(tmp_path, keep, levels)]
    assert gone(2, []) == [10, 20, 30] and gone(2, [(0, 1.)]) == [10, 20, 30]
    assert gone(2, [(0, 1.), (25, .5)]) == [10, 30] and gone(1, [(0, 1.), (25, .5), (50, .7)]) == [10, 30, 40]
    assert gone(2, [(0, 1.), (25, .5), (50, .4)]) == [10, 20, 30] and gone(2, [(0, 1.), (25, float("nan"))]) == [10, 20, 30]
