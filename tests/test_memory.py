import os

import pytest
import torch
import torch.nn.functional as F

from lora_nb.core import LoraError
from lora_nb.families import HUB, as_base
from lora_nb.injection import find_targets
from lora_nb.memory import SHAPES, estimate_memory, meta_part, shapes_of
from lora_nb.random_pipes import random_pipe


def count(net): return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name, part, n", (
    ("sd3.5-large", "transformer", 8_056_627_520), ("sd3.5-medium", "transformer", 2_243_171_520),
    ("sdxl", "unet", 2_567_463_684), ("sd1.5", "unet", 859_520_964), ("sd1.5", "vae", 83_653_863),
    ("sdxl", "text_encoder_2", 694_659_840), ("sd3.5-large", "text_encoder_3", 4_762_310_656),
    ("sd3.5-large", "vae", 83_819_683), ("sd3.5-large", "text_encoder", 123_650_304)))
def test_published_sizes(name, part, n): assert count(meta_part(name, part)) == n


def test_every_name_of_the_hub_has_its_shapes(): assert set(HUB) == set(SHAPES)


FEW = dict(resolution=256, gradient_checkpointing=True)


@pytest.fixture(scope="module")
def answers():
    asked = dict(plain={}, large=dict(batch_size=4), r=dict(rank=64), lean=dict(optimizer="adafactor"),
                 bare=dict(allowance=False), single=dict(dtype=torch.float32), off=dict(offload="model"),
                 layer=dict(offload="sequential"))
    return {k: estimate_memory("sd1.5", **{**FEW, **kw}) for k, kw in asked.items()}


def test_what_settings_cost(answers):
    step = {k: x.phases["step"] for k, x in answers.items()}
    assert step["large"]["activations"] > 2 * step["plain"]["activations"]
    assert step["r"]["LoRA"] == pytest.approx(4 * step["plain"]["LoRA"]) and step["lean"]["optimizer"] == step["plain"]["optimizer"] / 8
    assert step["single"]["weights: unet"] == pytest.approx(2 * step["plain"]["weights: unet"])
    assert not any("vae" in n or "encoder" in n for n in step["plain"])               # they have left the card by then
    assert step["off"] == step["plain"] and answers["off"].sums["prepare"] < answers["plain"].sums["prepare"]
    assert answers["layer"].sums["step"] < answers["off"].sums["step"]
    assert set(step["plain"]) - set(step["bare"]) == {"allowance (a guess)"}


def test_the_lora_is_counted_exactly(answers):
    targets = find_targets(meta_part("sd1.5", "unet"), "attention").values()
    assert answers["plain"].phases["step"]["LoRA"] == 4 * 16 * sum(sum(x.weight.shape) for x in targets)


def test_t5_whole_in_8_bits_and_left_out():
    phases = lambda t5: estimate_memory("sd3-medium", "generate", resolution=256, t5=t5).phases
    t5 = [phases(t)["draw"].get("weights: text_encoder_3", 0)
          for t in (True, "8bit", False)]
    assert t5[0] > 1.9 * t5[1] > t5[2] == 0


def test_decoding_is_the_peak_of_drawing():
    assert estimate_memory("sd1.5", "generate", resolution=(512, 256), guidance=False, allowance=False).peak == "decode"


@pytest.mark.parametrize("match, args, kw", (
    ("Did you mean 'sd3.5-large'", ["sd3.5-lrge"], {}), ("expected 'train'", ["sd1.5", "run"], {}),
    ("adamw8bit", ["sd1.5"], dict(optimizer="lion"))))
def test_questions_that_cannot_be_answered(match, args, kw):
    with pytest.raises(LoraError, match=match): estimate_memory(*args, **kw)


@pytest.mark.parametrize("family", ("sd", "sdxl", "sd3"))
def test_a_pipeline_is_asked_and_not_changed(family):
    pipe = random_pipe(family); before = {n: p.device.type for n, p in pipe.components["vae"].named_parameters()}
    estimate_memory(pipe, dtype=torch.float32); estimate_memory(as_base(pipe), "generate")
    for c, net in shapes_of(pipe).items(): assert count(net) == count(pipe.components[c])
    assert {n: p.device.type for n, p in pipe.components["vae"].named_parameters()} == before


def test_shared_networks_are_left_as_they_were(answers):
    net = meta_part("sd1.5", "unet")
    assert not any("lora" in n for n, _ in net.named_parameters())
    assert F.scaled_dot_product_attention.__name__ != "<lambda>"


# Peaks in GiB of the second step of `Trainer`, simulated at true shapes: fake CPU tensors, PyTorch's MemTracker, CUDA's autocast
# played by a TorchFunctionMode; rank 16 on attention, batch 1. The simulator keeps the MMDiTs' table of places in fp32; files in half
# precision do not, and what that adds (.421 for Medium, .167 for Large) is taken off. UNets without checkpointing: the estimate is
# 2 to 4 % above the simulation; where the difference comes from is not known.
SIMULATED = (
    ("sd1.5", dict(resolution=512), 2.682, .02), ("sdxl", dict(gradient_checkpointing=True), 5.714, .02), ("sdxl", {}, 11.883, .045),
    ("sdxl", dict(prior_batch=1), 18.679, .045), ("sdxl", dict(dtype=torch.float16), 11.883, .045),
    ("sd3.5-medium", dict(gradient_checkpointing=True), 5.922 - .421, .02), ("sd3.5-medium", {}, 14.008 - .421, .02),
    ("sd3.5-large", dict(gradient_checkpointing=True), 16.991 - .167, .02), ("sd3.5-large", {}, 32.664 - .167, .02))


LIGHT = (0, 1, 5)        # one of each family; the others take minutes: LORA_NB_TRUE_SIZE=1, which `make true-size` sets


@pytest.mark.parametrize("name, settings, simulated, within", SIMULATED if os.environ.get("LORA_NB_TRUE_SIZE") else
                         [SIMULATED[i] for i in LIGHT])
def test_the_estimate_agrees_with_a_simulated_step(name, settings, simulated, within):
    step = estimate_memory(name, allowance=False, **settings).sums["step"] / 2**30
    assert -.02 < step / simulated - 1 < within, step


def test_a_plan_is_the_first_that_fits_and_quantises_last():
    from lora_nb.plan import plan_that_fits
    few = dict(resolution=256, rank=4)
    plans = [plan_that_fits("sd1.5", g, batch_size=4, prior_batch=4, **few) for g in (3, 4, 24)]
    assert plans[-1].settings == dict(batch_size=4, prior_batch=4, accumulate=1) and plans[-1].tried == 1
    assert all(p.memory.total <= p.card * .94 * 2**30 and p.settings["batch_size"] * p.settings["accumulate"] == 4 for p in plans)
    with pytest.raises(LoraError, match="the least is"): plan_that_fits("sd1.5", 1, **few)
    assert plan_that_fits("sd1.5", 2.2, **few).loading.get("quantize") == "nf4"
    with pytest.raises(LoraError): plan_that_fits("sd1.5", 2.2, can_quantize=False, **few)


def test_batches_follow_the_free_memory(monkeypatch):
    from lora_nb import plan
    base = as_base(random_pipe("sd"))
    assert plan.batch_that_fits(base, "draw", 64, 24) == 24                        # a CPU
    monkeypatch.setattr(plan, "free_memory", lambda device: room)
    found = []
    for room in (0, 3_000_000, 30_000_000, 2**40): found.append(plan.batch_that_fits(base, "draw", 64, 24))
    assert found[0] == 1 and found[-1] == 24 and found == sorted(found) and 1 < found[1] < 24
    room = 2**40
    assert plan.batch_that_fits(base, "encode", 64, 8) == 8
