import copy, os, random, runpy, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_nb.core import LoraError, TrainingError
from lora_nb.dataset import ConceptDataset, encode
from lora_nb.families import as_base
from lora_nb.injection import inject_lora
from lora_nb.random_pipes import random_pipe
from lora_nb.dataset import Examples
from lora_nb.recipe import Recipe
from lora_nb.samples import Stream, position_weights
from lora_nb.stopping import worse
from lora_nb.training import Trainer, Turn

WALLS = ConceptDataset([Image.new("RGB", (64, 64), c) for c in ("red", "green", "blue")], "a wall", size=64)


@pytest.fixture(scope="module")
def sd(): return as_base(random_pipe("sd"))


@pytest.fixture(scope="module")
def examples(sd): return encode(sd, WALLS)


@pytest.fixture
def worn(sd):
    handle = inject_lora(sd.denoiser, "attention", rank=2)
    yield handle
    handle.remove()


def scene(w, h, half="red"):
    im = Image.new("RGB", (w, h), "blue"); im.paste(half, (0, 0, w // 2, h))
    return im


def left(w, h):
    m = Image.new("L", (w, h)); m.paste(255, (0, 0, w // 2, h))
    return m


def shaped(sd, **kw):
    "A stream of two wide and two tall pictures with masks"
    sizes = [(80, 48), (48, 80), (80, 48), (48, 80)]
    data = ConceptDataset([scene(*x) for x in sizes], "a sks wall", masks=[left(*x) for x in sizes], buckets=True, flip=True)
    return Stream("subject", encode(sd, data), **{"batch": 2, **kw})


# --- masks, shapes, noise ----------------------------------------------------------------------------------------------

def test_masks_that_say_nothing_weigh_nothing():
    assert position_weights(torch.zeros(1, 1, 4, 4)).equal(torch.ones(1, 1, 4, 4))
    assert position_weights(torch.ones(1, 1, 4, 4), .3).equal(torch.ones(1, 1, 4, 4))


def test_weights_follow_a_picture_to_its_mirrored_side(sd, worn):
    stream = shaped(sd)
    trainer = Trainer(sd, worn, [stream], Recipe(rank=2, mask_floor=.1))
    for micro in range(4):
        for b in trainer.draw(stream, micro):
            plain = stream.examples.latents[0 if b.latents.shape[-1] > 6 else 1][0]
            same = (b.latents - plain).abs().flatten(1).mean(1) < 1e-6
            assert (b.more["weights"][:, 0, 0, 0] > 1).equal(same)


def test_two_sizes_in_one_batch_and_half_the_batch_twice(sd, worn):
    stream = shaped(sd)
    trainer = Trainer(sd, worn, [stream], Recipe(rank=2))
    assert len(trainer.draw(replace(stream, run=1), 0)) == 2
    one = Trainer(sd, worn, [replace(stream, run=2, batch=4)], Recipe(rank=2))
    two = Trainer(sd, worn, [replace(stream, run=2, batch=2)], Recipe(rank=2, accumulate=2))
    assert abs(one.loss(0)[0].item() - (two.loss(0)[0].item() + two.loss(1)[0].item()) / 2) < 1e-5


class Oracle:
    "Answers exactly what is asked for, off by some number on the left half"
    def __init__(self, trainer, off): self.trainer, self.off, self.batches = trainer, off, []
    def __call__(self, noisy, t, cond):
        b, = self.batches
        answer = self.trainer.base.target(b.latents, b.noise, t).clone()
        answer[..., :answer.shape[-1] // 2] += self.off
        return answer


@pytest.fixture
def ask(sd, worn):
    half = encode(sd, ConceptDataset([scene(64, 64)], masks=[left(64, 64)]))
    def mean_error(off, mask_floor=None, prediction="epsilon", **recipe):
        base = copy.copy(sd); base.prediction = prediction
        stream = Stream("subject", half, 4)
        trainer = Trainer(base, worn, [stream], Recipe(rank=2, mask_floor=mask_floor, **recipe))
        oracle = Oracle(trainer, off); oracle.batches = trainer.draw(stream, 0); base.predict = oracle
        return trainer.errors(oracle.batches)["subject"].item(), oracle.batches[0]
    return mean_error


@pytest.mark.parametrize("prediction", ("epsilon", "v_prediction", "sample"))
def test_each_target_is_met_with_every_kind_of_noise(ask, prediction):
    assert ask(0., prediction=prediction, offset_noise=.1, input_perturbation=.1)[0] == 0.


def test_errors_count_where_the_mask_is(ask):
    close = lambda a, b, eps=1e-4: abs(a - b) < eps
    assert close(ask(1.)[0], .5) and close(ask(1., 1.)[0], .5)
    assert close(ask(1., 0.)[0], 1.)                               # all of the error lies on the subject
    assert close(ask(1., .5)[0], 1 / 1.5) and close(ask(2., .1)[0] / ask(1., .1)[0], 4.)
    soft, hard = ask(1., snr_gamma=5., snr_soft=True)[0], ask(1., snr_gamma=5.)[0]
    assert 0 < soft < hard < .5


def test_offset_noise_is_one_number_a_channel(ask):
    plain, offset, shaken = (ask(0., **kw)[1] for kw in ({}, dict(offset_noise=.3), dict(input_perturbation=.1)))
    shift = offset.noise - plain.noise
    assert shift.allclose(shift[..., :1, :1].expand_as(shift), atol=1e-6)
    assert .05 < shift.std() < 1 and shift[0, 0, 0, 0] != shift[1, 0, 0, 0]
    assert shaken.noise.equal(plain.noise) and abs(shaken.more["shake"].std().item() - .1) < .02


def test_validation_of_several_shapes_is_finite(sd, worn, examples):
    trainer = Trainer(sd, worn, [shaped(sd), Stream("prior", examples, 1, .5)], Recipe(rank=2, mask_floor=.1, validation_samples=4))
    found = trainer.validate()
    assert set(found) == {"subject", "prior"} and all(v == v and v < float("inf") for v in found.values())


# --- turns, wordings, refusals -----------------------------------------------------------------------------------------

def test_a_wording_is_a_function_of_the_place(examples):
    stream = Stream("prior", examples, 1, wording=lambda c, rng: rng.choice(["a plain wall", c]))
    eight, four = stream.say(["a wall"] * 8, range(8), 0), stream.say(["a wall"] * 4, range(4), 0)
    assert eight[:4] == four and set(eight) == {"a wall", "a plain wall"}


def test_a_part_without_a_turn_keeps_its_last_value(sd, worn, examples):
    odd, even = torch.nn.Parameter(torch.zeros(2)), list(worn.params())
    streams = [Stream("subject", examples, 1), Stream("prior", examples, 1, .5)]
    turned = Trainer(sd, {"unet": even, "text_encoder.words": [odd]}, streams, Recipe(), penalty=lambda: {"length": (odd - 1).square().sum()},
                     turns=[Turn(("unet",)), Turn(("text_encoder.words",), {"prior": 0.})])
    turned.step(); turned.step()
    assert [len(v) for v in turned.log.parts.values()] == [2, 2, 2] and turned.log.parts["prior"][0] == turned.log.parts["prior"][1]


def test_a_part_that_comes_late_has_no_value_before(sd, worn, examples):
    odd, even = torch.nn.Parameter(torch.zeros(2)), list(worn.params())
    streams = [Stream("subject", examples, 1), Stream("prior", examples, 1, .5)]
    late = Trainer(sd, {"unet": even, "text_encoder.words": [odd]}, streams, Recipe(), penalty=lambda: {"length": (odd - 1).square().sum()},
                   turns=[Turn(("text_encoder.words",), {"prior": 0.}), Turn(("unet",))])
    for _ in range(3): late.step()
    first, second, third = late.log.parts["prior"]
    assert first != first and second == third > 0 and len(late.log.parts["subject"]) == 3


@pytest.mark.parametrize("kw, match", (
    (dict(turns=[Turn(("vae",))]), "groups"), (dict(turns=[Turn(("unet",), {"a": 0})]), "weight 0"), (dict(streams=[]), "Nothing to train on"),
    (dict(params={}), "Nothing to train"), (dict(output_dir="/dev/null/x"), "cannot write"), (dict(batch=0), "Empty streams: a"),
    (dict(params={"unet": [torch.zeros(1)]}), "do not require"), (dict(recipe=Recipe(mixed_precision="fp16")), "on a CPU"),
    (dict(params="bare", teacher=True), "LoRA off")))
def test_trainers_that_cannot_work(sd, worn, examples, kw, match):
    kw = dict(kw)
    stream = Stream("a", examples, kw.pop("batch", 2), teacher=kw.pop("teacher", False))
    params = kw.pop("params", worn)
    if params == "bare": params = {"unet": worn.params()}
    with pytest.raises(LoraError, match=match): Trainer(sd, params, kw.pop("streams", [stream]), kw.pop("recipe", Recipe()), **kw)


def test_parameters_may_come_from_an_iterator(sd, worn, examples):
    assert len(Trainer(sd, {"unet": iter(worn.params())}, [Stream("a", examples, 1)], Recipe()).all_params()) == 64


def test_out_of_memory_becomes_advice(sd, worn, examples, monkeypatch):
    trainer = Trainer(sd, worn, [Stream("a", examples, 2)], Recipe(steps=2))
    def full(): raise torch.OutOfMemoryError("x")
    monkeypatch.setattr(trainer, "step", full)
    with pytest.raises(TrainingError, match="accumulate raised to match"): trainer.fit()


def test_two_precisions_in_one_process(sd, worn, examples):
    for p in ("bf16", "no"):
        assert Trainer(sd, worn, [Stream("a", examples, 2)], Recipe(steps=2, mixed_precision=p, gradient_checkpointing=True)).fit().steps == 2


# --- the guard ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("levels", ([.4], [.4, .5], [.4, .59], [.4, .51, .3, .51], [.4, .1, .05, .16, .16], [.4, .1, .35], [0., 0., 0.]))
def test_runs_that_go_well(levels): assert not worse(levels)


@pytest.mark.parametrize("levels", ([.4, .61], [.4, .51, .52], [.4, .1, .35, .35], [1.3, .4, 1.25, 1.25]))
def test_runs_that_went_wrong(levels): assert worse(levels)


def test_the_guard_looks_at_its_pace_or_not_at_all(sd, worn, examples):
    look = lambda **kw: [s for s, _ in Trainer(sd, worn, [Stream("a", examples, 8)], Recipe(rank=2, batch_size=8, **kw)).fit().level]
    assert look(steps=50) == [0, 25, 50] and look(steps=2, guard=False) == []


# --- checkpoints -------------------------------------------------------------------------------------------------------

def run(sd, folder, resume=False, steps=12, examples=None, **kw):
    torch.manual_seed(0)
    recipe = Recipe(**{**dict(steps=steps, batch_size=2, rank=2, dropout=.3, checkpoint_every=4, lr_schedule="cosine", warmup=3), **kw})
    worn = inject_lora(sd.denoiser, "attention", rank=2, dropout=recipe.dropout)
    try:
        trainer = Trainer(sd, worn, [Stream("subject", examples, recipe.batch_size)], recipe, output_dir=folder)
        trainer.fit(resume=resume)
        return [p.detach().clone() for p in trainer.all_params()]
    finally: worn.remove()


def test_the_last_two_checkpoints_stay(sd, examples, tmp_path):
    run(sd, tmp_path, examples=examples)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000008.pt", "step-000012.pt"]


def test_a_checkpoint_of_another_run(sd, examples, tmp_path):
    run(sd, tmp_path, steps=4, examples=examples)
    with pytest.raises(TrainingError, match="learning_rate: 0.001 there, 0.0005 here"):
        run(sd, tmp_path, resume=True, examples=examples, learning_rate=5e-4)


def test_training_draws_no_random_number_from_outside(sd, examples, tmp_path):
    run(sd, tmp_path, steps=1, examples=examples); state = torch.get_rng_state()
    torch.manual_seed(0)                       # `run` seeds with 0, then the injection draws: training draws nothing
    inject_lora(sd.denoiser, "attention", rank=2).remove()
    assert torch.get_rng_state().equal(state)


# --- other families ----------------------------------------------------------------------------------------------------

SWATCHES = ConceptDataset([Image.new("RGB", (64, 64), c) for c in ("red", "green", "blue")])
SWATCHES.captions = [f"a {c} wall" for c in ("red", "green", "blue")]


@pytest.mark.parametrize("family", ("sd3", "sdxl"))
def test_checkpointing_changes_memory_but_no_gradient(family):
    other = as_base(random_pipe(family)); coded = encode(other, SWATCHES)
    worn = inject_lora(other.pipe, {other.denoiser_name: "attention", "text_encoder_2": "attention"}, rank=2)
    for m in worn.layers.values(): torch.nn.init.constant_(m.lora_up.weight, .02)
    grads = []
    for on in (False, True):
        t = Trainer(other, worn, [Stream("subject", coded, 3)], Recipe(rank=2, gradient_checkpointing=on))
        with t.session(): t.loss(0)[0].backward(); grads.append([p.grad.clone() for p in t.all_params()])
    assert all(a.allclose(b, atol=1e-6) for a, b in zip(*grads)) and max(g.abs().max() for g in grads[0]) > 1e-5


def test_sdxl_hears_the_sizes_of_each_picture():
    other = as_base(random_pipe("sdxl"))
    ids = encode(other, ConceptDataset([Image.new("RGB", (96, 64))], buckets=[(96, 64)]))
    worn = inject_lora(other.denoiser, rank=2); t = Trainer(other, worn, [Stream("subject", ids, 2)], Recipe(rank=2))
    assert t._told(t.draw(t.streams[0], 0))["time_ids"].tolist() == [[64, 96, 0, 0, 64, 96]] * 2


def test_holes_of_an_inpainting_base():
    fill = as_base(random_pipe("sd_inpaint")); worn = inject_lora(fill.denoiser, "extended", rank=4)
    coded = encode(fill, ConceptDataset([scene(64, 64)], "a sks wall", masks=[left(64, 64)], size=64, flip=True))
    trainer = Trainer(fill, worn, [Stream("subject", coded, 4)], Recipe(rank=4))
    a, b = (trainer.draw(trainer.streams[0], 0)[0] for _ in range(2))
    assert a.more["masked"].equal(b.more["masked"]) and not a.more["hole"][0].equal(a.more["hole"][1])
    subject = Trainer(fill, worn, trainer.streams, Recipe(rank=4, holes="subject"))
    for b in (subject.draw(trainer.streams[0], i)[0] for i in range(3)):      # mirrored picture, mirrored hole
        mirrored = (b.latents - coded.latents[0, 1]).abs().flatten(1).mean(1) < 1e-6
        assert (b.more["hole"][:, 0, 0, 0] == 0).equal(mirrored)
    bare = Stream("prior", Examples(coded.latents, ["a wall"]), 1, teacher=True)                  # no pixels: all a hole
    log = Trainer(fill, worn, [*trainer.streams, bare], Recipe(rank=4, steps=1)).fit()
    assert log.losses[0] == log.losses[0] and len(worn.lora().layers) == len(worn.layers)


# --- other processes ---------------------------------------------------------------------------------------------------

NIGHT = '''
import sys, time
import torch
from PIL import Image
from lora_nb.families import as_base
from lora_nb.random_pipes import random_pipe
from lora_nb.dataset import ConceptDataset, encode
from lora_nb.injection import inject_lora
from lora_nb.recipe import Recipe
from lora_nb.training import Stream, Trainer

def run(folder, steps=30, batch=2, resume=False, pause=0., dropout=.2):
    torch.set_num_threads(1)
    base = as_base(random_pipe("sd"))
    data = ConceptDataset([Image.new("RGB", (64, 64), c) for c in ("red", "green", "blue")], "a wall")
    torch.manual_seed(0)
    worn = inject_lora(base.denoiser, "attention", rank=2, dropout=dropout)
    recipe = Recipe(steps=steps, batch_size=batch, rank=2, checkpoint_every=3, validate_every=9, validation_samples=2)
    trainer = Trainer(base, worn, [Stream("subject", encode(base, data), batch)], recipe, output_dir=folder,
                      callback=lambda t: time.sleep(pause))
    trainer.fit(resume)
    params = [p.detach().clone() for p in trainer.all_params()]; worn.remove()
    return params, trainer.log.losses, trainer.accel

if __name__ == "__main__":
    folder, task = sys.argv[1:]
    options = dict(victim=dict(pause=.1), heir=dict(resume=True), pair=dict(steps=4, dropout=0.))[task]
    params, losses, accel = run(folder, **options)
    if accel.is_main_process: torch.save((params, losses, accel.num_processes), f"{folder}/{task}.pt")
'''


@pytest.fixture
def home(tmp_path):
    (tmp_path / "night.py").write_text(NIGHT)
    return tmp_path


def start(*command):
    "A Python of its own, one thread, with this package"
    here = str(Path(__import__("lora_nb").__file__).parent.parent)
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=here, LORA_NB_QUIET="0", ACCELERATE_USE_CPU="true")
    return subprocess.Popen([sys.executable, *map(str, command)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finished(process):
    "Wait for success; gives what it said"
    said = process.communicate(timeout=900)[1]
    assert process.returncode == 0, said[-2000:]
    return said


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_at_any_moment_and_a_damaged_checkpoint(home):
    "Another process takes up what lies in the folder, bit for bit, even with the newest checkpoint cut in half"
    victim = start(home / "night.py", home / "killed", "victim")
    through, through_losses, _ = runpy.run_path(str(home / "night.py"))["run"](home / "through")
    folder, patience = home / "killed" / "checkpoints", time.time() + 900
    while not (folder / "step-000006.pt").exists() and time.time() < patience and victim.poll() is None: time.sleep(.05)
    time.sleep(random.SystemRandom().random()); victim.send_signal(signal.SIGKILL); victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    last = sorted(folder.glob("step-*.pt"))[-1]; last.write_bytes(last.read_bytes()[:last.stat().st_size // 2])
    bar = finished(start(home / "night.py", home / "killed", "heir"))
    heir, heir_losses, _ = torch.load(home / "killed" / "heir.pt")
    assert all(a.equal(b) for a, b in zip(through, heir)) and heir_losses == through_losses
    assert "loss=" in bar and "subject val=" in bar and "it/s" in bar, bar[-300:]     # speed and time left are tqdm's own
    assert f" {int(last.stem[5:]) - 3}/30" in bar                                     # it began at the checkpoint before


def test_two_processes_learn_what_one_learns_with_twice_the_batch(home):
    "Without a GPU `--multi_gpu --num_processes 2` asks for two: with `--cpu`, accelerate 1.15 starts only one"
    (home / "pair").mkdir()
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
              "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", home / "night.py", home / "pair", "pair")
    pair = start(*launch)
    alone, alone_losses, _ = runpy.run_path(str(home / "night.py"))["run"](home / "alone", steps=4, batch=4, dropout=0.)
    finished(pair)
    two, two_losses, processes = torch.load(home / "pair" / "pair.pt")
    flat = lambda params: torch.cat([p.flatten() for p in params])
    assert processes == 2 and (flat(two) - flat(alone)).abs().max() < 1e-5
    assert max(abs(a - b) for a, b in zip(two_losses, alone_losses)) < 1e-5


@pytest.mark.parametrize("kind, capability, expected", [("cuda", (7, 5), "fp16"), ("cuda", (8, 0), "bf16"), ("mps", None, "no"),
                                                        ("cpu", None, "no")])
def test_training_computes_in_what_the_weights_are_kept_in(monkeypatch, kind, capability, expected):
    from lora_nb.training import _precision
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert _precision(Recipe(), torch.device(kind)) == expected


def test_tags_are_reworded_at_each_draw(sd):
    from lora_nb.dataset import TagWording
    data = ConceptDataset([Image.new("RGB", (64, 64))], "sks, a, b, c, d, e", tags=TagWording(keep=1, dropout=.2))
    stream = Stream("subject", encode(sd, data), 1, wording=lambda text, rng: text + " !")
    said = stream.say(["sks, a, b, c, d, e"] * 40, range(40), 0)
    assert len(set(said)) > 20 and all(s.startswith("sks") and s.endswith(" !") for s in said)
    assert stream.say(["sks, a, b, c, d, e"], [17], 0) == said[17:18]                              # a function of the place: resuming is exact
