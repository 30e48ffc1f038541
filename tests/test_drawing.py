import math
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lora_nb.families import as_base
from lora_nb.core import LoraError
from lora_nb.loading import load_base
from lora_nb.random_pipes import RANDOM, random_pipe

FAMILIES = ("sd", "sdxl", "sd3")


def distance(a, b): return np.abs(np.asarray(a, float) - np.asarray(b, float)).max()


@pytest.fixture(scope="module")
def bases(): return {f: as_base(random_pipe(f), f) for f in RANDOM}


@pytest.fixture(scope="module")
def tiny(): return load_base("tiny-sd", device="cpu")


@pytest.fixture(scope="module")
def scenes(): return [Image.effect_noise((64, 64), 60).convert("RGB") for _ in range(2)]


@pytest.fixture(scope="module")
def hole():
    mask = Image.new("L", (64, 64)); mask.paste(255, (8, 8, 56, 56)); return mask


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes(family, bases, scenes):
    assert bases[family].generate("a", steps=1, size=(96, 64))[0].size == (96, 64)
    assert bases[family].img2img(scenes[0], "a", steps=2, size=(96, 64))[0].size == (96, 64)


def test_sizes_that_cannot_be_drawn(bases, tiny):
    sd3 = bases["sd3"]
    assert sd3.generate("a", steps=1, size=sd3.max_size)[0].size == (sd3.max_size,) * 2
    with pytest.raises(LoraError, match="multiples of 16, such as 96 x 96"): sd3.generate("a", size=100)
    with pytest.raises(LoraError, match="multiples of 8"): tiny.generate("a", size=(60, 64))


def test_sizes_outside_what_a_base_was_made_for_are_a_warning():
    from test_families import MEDIUM, shaped
    from lora_nb.drawing import _size
    assert _size(shaped(**MEDIUM), (1440, 1440)) == (1440, 1440)
    with pytest.warns(UserWarning, match="made for 0.25 to 2.0"): _size(shaped(**MEDIUM), 256)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_does_not_depend_on_its_neighbours(family, bases):
    b = bases[family]
    two, one = b.generate(["a cat", "a dog"], seeds=[3, 4], steps=2), b.generate("a dog", seeds=4, steps=2)
    assert distance(two[1], one[0]) <= 3
    assert len(b.generate("a dog", seeds=[1, 2, 3], steps=1)) == 3
    with pytest.raises(LoraError, match="1 seeds for 2 prompts"): b.generate(["a", "b"], seeds=[1])


def test_skip_layer_guidance_and_shift(bases, tiny):
    sd3 = bases["sd3"]; kept = sd3.pipe.scheduler
    look = lambda **kw: np.asarray(sd3.generate("a cat", seeds=3, steps=4, **kw)[0], float)
    plain, window = look(guidance_scale=4.), dict(skip_layer_guidance_start=-1., skip_layer_guidance_stop=1.)
    mine = look(skip_layers=[0], **window)
    assert distance(mine, plain) > 1
    assert (mine == look(guidance_scale=4., skip_guidance_layers=[0], skip_layer_guidance_scale=2.5, **window)).all()
    assert (look(guidance_scale=4., shift=3.) == plain).all() and distance(look(guidance_scale=4., shift=1.), plain) > 1
    assert sd3.pipe.scheduler is kept and kept.config.shift == 3
    for match, kw in (("set none", dict(skip_layers=True)), ("0 to 1", dict(skip_layers=[2])),
                      ("needs guidance", dict(skip_layers=[0], guidance_scale=1.))):
        with pytest.raises(LoraError, match=match): sd3.generate("a", **kw)
    for match, kw in (("has a UNet", dict(skip_layers=[0])), ("a flow's", dict(shift=2.))):
        with pytest.raises(LoraError, match=match): tiny.generate("a", **kw)


@pytest.mark.parametrize("family", RANDOM)
def test_siblings_share_the_networks_and_what_they_wear(family, scenes, hole):
    b = as_base(random_pipe(family)); net = b.denoiser
    tasks = ("Inpaint",) if family == "flux2" else ("Img2Img", "Inpaint")        # diffusers has no other for FLUX.2
    for task in tasks: assert getattr(b.sibling(task), b.denoiser_name) is net
    drawn = [lambda: b.img2img(scenes, "a cat", .9, steps=3), lambda: b.inpaint(scenes, hole, "a cat", steps=3)]
    plain = [call()[1] for call in drawn]
    last = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    g = torch.Generator().manual_seed(0)
    with torch.no_grad(): last.weight.add_(.5 * torch.randn(last.weight.shape, generator=g))
    for call, before in zip(drawn, plain):
        images = call(); assert [im.size for im in images] == [(64, 64)] * 2
        assert distance(images[1], before) > 5    # the same weights, seen at once
    two = b.inpaint(scenes, hole, "a cat", seeds=[4, 5], steps=2, batch_size=1, keep=False)
    one = b.inpaint(scenes[1], hole, "a cat", seeds=5, steps=2, keep=False)[0]
    assert distance(two[1], one) <= 3


def test_inpainting_alone_and_in_company(tiny, scenes, hole):
    alone = tiny.inpaint(scenes[1], hole, "a strawberry", seeds=1, steps=6, keep=False)[0]
    pair = tiny.inpaint(scenes, hole, "a strawberry", seeds=[0, 1], steps=6, keep=False)[1]
    assert tiny.overwrites and distance(alone, pair) <= 3


def test_unlike_numbers_of_pictures_and_masks(tiny, scenes, hole):
    with pytest.raises(LoraError, match="2 pictures, 3 masks, 1 prompts"): tiny.inpaint(scenes, [hole] * 3, "a cat")


def test_a_sibling_does_not_cast_the_weights():
    half = as_base(random_pipe("sd").to(dtype=torch.bfloat16)); half.sibling("Inpaint")
    assert half.dtype == torch.bfloat16


def test_a_nine_channel_unet_draws_from_nothing(bases):
    assert bases["sd_inpaint"].generate(["a", "b"], steps=1)[0].size == (64, 64)


@pytest.mark.parametrize("odd, says", [
    (dict(loras=["neon"]), "no argument 'loras'.*apply_lora"), (dict(nonsense=1), "no argument 'nonsense'"), (dict(seed=3), "use seeds"),
    (dict(num_inference_steps=3), "use steps"), (dict(sizes=64), "Did you mean 'size'"), (dict(kwargs=1), "no argument"),
    (dict(steps=0), "at least 1"), (dict(steps=-3), "at least 1"), (dict(steps=2.5), "at least 1"), (dict(steps=True), "at least 1"),
    (dict(guidance_scale=math.nan), "finite"), (dict(guidance_scale=-1.), "0 or more"), (dict(guidance_scale="much"), "finite number"),
    (dict(size=0), "size = 0"), (dict(size=(64, -64)), "expected a whole number"), (dict(size=(64, 64, 3)), "expected"),
    (dict(size="64"), "expected"), (dict(size=64.), "expected"), (dict(seeds=1.5), "seeds = 1.5"), (dict(seeds=[0.5]), "expected a whole"),
    (dict(seeds=2**70), "64 bits"), (dict(batch_size=0), "batch_size"), (dict(negative_prompt=["a"]), "are texts")])
def test_what_generate_does_not_know_is_refused(bases, tiny, odd, says):
    for b in (tiny, bases["sd3"]):
        with pytest.raises(LoraError, match=says): b.generate("a", **odd)
    if "seeds" in odd: return
    for draw in (lambda: tiny.img2img(Image.new("RGB", (64, 64)), "a", **odd),
                 lambda: tiny.inpaint(Image.new("RGB", (64, 64)), Image.new("L", (64, 64)), "a", **odd)):
        with pytest.raises(LoraError, match=says): draw()


def test_numbers_of_numpy_are_numbers(tiny):
    n = np.int64
    assert tiny.generate("a", seeds=n(1), steps=n(1), size=(n(64), n(64)))[0].tobytes() == tiny.generate("a", seeds=[1], steps=1)[0].tobytes()


@pytest.mark.parametrize("strength, steps", [(0, 10), (-.1, 10), (1.1, 10), (math.nan, 10), (.6, 1)])
def test_strengths_that_draw_nothing(tiny, strength, steps):
    with pytest.raises(LoraError, match="strength"): tiny.img2img(Image.new("RGB", (64, 64)), "a", strength, steps=steps)
