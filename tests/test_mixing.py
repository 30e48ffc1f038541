from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_nb.composition import compose
from lora_nb.core import LoraError, ShapeError, data_path
from lora_nb.similarity import to_batch
from lora_nb.evaluation import wearing
from lora_nb.families import as_base
from lora_nb.injection import inject_lora
from lora_nb.loading import load_base
from lora_nb.lora import Factors, Lora, gather
from lora_nb.mixing import (Columns, LearnedWeights, Mixture, composite, keep_loss, klora, learn_weights, samples, switch,
                            zip_columns)
from lora_nb.random_pipes import random_pipe
from lora_nb.schedule import LoraComposite, lora_switch
from lora_nb.scheduling import scheduled

torch.set_num_threads(1)
close = lambda a, b, eps=1e-4: torch.allclose(torch.as_tensor(a), torch.as_tensor(b), atol=eps, rtol=eps)

@pytest.fixture(scope="module")
def base(): return load_base("tiny-sd", device="cpu", dtype=torch.float32)

@pytest.fixture(scope="module")
def pair(): return [Lora.load(data_path("loras", f"{n}.safetensors")) for n in ("jack-o-lantern", "neon")]

@pytest.fixture(scope="module")
def few(pair): return [l.only("text_encoder") for l in pair]

@pytest.fixture(scope="module")
def prompts(pair):
    face, style = (l.metadata["trigger"] for l in pair)
    return [f"a {face} on a {c} background, in {style} style" for c in ("blue", "red")]

def distance(a, b): return sum(f.norm()**2 for f in (a - b).layers.values())**.5


def test_wrong_parameters(pair, few):
    with pytest.raises(LoraError, match="or more"): compose(pair, method="np", mu=-1)
    with pytest.raises(LoraError, match="once"): compose(pair, method="orthogonal", order=[0, 0])
    with pytest.raises(LoraError, match="below 1"): compose(few, method="dare", p=1.)
    with pytest.raises(LoraError, match="found 1"): klora(pair[:1])
    with pytest.raises(LoraError, match="pass base="): compose(pair, method="learned")
    with pytest.raises(LoraError, match="pass base="): compose(pair, method="zip")
    with pytest.raises(LoraError, match="what layers see"): compose(pair, method="fusion")
    with pytest.raises(LoraError, match="above 0"): LoraComposite({"a": 1, "b": 1}, shares=[1, 0])


def test_limits_of_ties_and_dare(few):
    assert distance(compose(few, method="dare", p=0.), compose(few)) < 1e-2
    assert compose(few, method="ties", rank=3).rank == 3
    alone = compose([few[0]], method="ties", density=1.)
    assert distance(alone, few[0]) < 1e-3 * distance(few[0], 0 * few[0])
    small = [Lora({"unet.c": Factors(torch.randn(6, r, 1, 1), torch.randn(r, 4, 3, 3))}) for r in (2, 3)]
    assert compose(small, method="ties").layers["unet.c"].shape == (6, 4, 3, 3)


def test_limits_of_klora(pair):
    pumpkin, neon = pair
    silent, late = klora([pumpkin, neon.scaled(0.)]), klora(pair, alpha=1e9)
    unet = [n for n in gather(pair) if n.startswith("unet")]
    assert all(silent(n, p)[0] == 1 for n in unet for p in (0., 1.))                    # a zero LoRA gets nothing
    assert all(late(n, 1.)[1] == 1 for n in neon.layers if n.startswith("unet"))
    start, end = (compose(pair, method="klora", progress=p) for p in (0., 1.))
    assert distance(start, end) > .1 * distance(start, 0 * start)


def test_limits_of_zip(base, pair):
    ones = Columns(Mixture(base, pair)).requires_grad_(False)
    assert distance(compose(pair, method="zip", columns=ones), pair[0] + pair[1]) < 1e-3


def test_steps_are_counted(base, pair, prompts):
    assert [switch(2, 3)("unet.x", .1, s).tolist() for s in range(7)] == [[1, 0]] * 3 + [[0, 1]] * 3 + [[1, 0]]
    seen = []
    def spy(name, progress, step):
        if name.endswith("mid_block.attentions.0.transformer_blocks.0.attn1.to_q"): seen.append(step)
        return torch.ones(2)
    with Mixture(base, pair, spy):
        for _ in range(2): base.generate(prompts[:1], seeds=[1], steps=4)
    assert seen == [0, 1, 2, 3] * 2


def test_composite_is_the_mean_of_the_answers(base, pair, prompts):
    z, t = torch.randn(2, base.denoiser.config.in_channels, 8, 8), torch.tensor(500)
    with Mixture(base, pair) as m, torch.no_grad():
        cond, solos = base.encode_prompts(prompts), []
        for m.only in range(2): solos.append(base.predict(z, t, cond))
        m.only = None
        with composite(m): assert close(base.predict(z, t, cond), sum(solos) / 2)
        with composite(m, [3, 1]): assert close(base.predict(z, t, cond), .75 * solos[0] + .25 * solos[1])
    assert "forward" not in base.denoiser.__dict__


@pytest.mark.parametrize("plan, weights, shares", [
    (lambda pair: lora_switch(pair, components={"text_encoder": 1.}), switch(2), None),
    (lambda pair: LoraComposite({l: 1 for l in pair}), None, [1, 1]),
    (lambda pair: LoraComposite({l: 1 for l in pair}, shares=[2, 1]), None, [2, 1])], ids=["switch", "composite", "shares"])
def test_a_mixture_draws_what_a_schedule_draws(base, pair, prompts, plan, weights, shares):
    draw = lambda: to_batch(base.generate(prompts, seeds=[3, 4], steps=4))
    with scheduled(base, plan(pair)): merged = draw()
    with Mixture(base, pair, weights) as m:
        if shares is None: hooked = draw()
        else:
            with composite(m, shares): hooked = draw()
    assert (merged - hooked).abs().max() < .05


class Asked:
    "A base that notes the timesteps it is asked at"
    def __init__(self, base): self.base, self.seen = base, []
    def __getattr__(self, name): return getattr(self.base, name)
    def predict(self, noisy, t, cond): self.seen += t.tolist(); return self.base.predict(noisy, t, cond)

def test_losses_at_given_times_and_of_two_sizes(base, pair, prompts):
    data = [(torch.randn(2, base.denoiser.config.in_channels, 8, 8), prompts) for _ in pair]
    asked = Asked(base)
    with Mixture(base, pair) as m, torch.no_grad():
        for against in ("lora", "noise"): keep_loss(asked, data, against, batch=2, times=[100, 300])(m)
        assert set(asked.seen) <= {100, 300} and len(asked.seen) == 12
        small = [(data[0][0][..., :4], prompts), data[1]]                # pictures of two sizes are asked one by one
        assert keep_loss(base, small, batch=1)(m) > 0
        assert keep_loss(base, data[:1], batch=1)(Mixture(base, pair[:1])) >= 0


def test_shapes_of_learned_weights(pair):
    names = list(gather(pair))
    assert LearnedWeights(2, names, bins=3)(names[0], torch.tensor([.1, .9, .9])).shape == (3, 2)
    assert LearnedWeights(2, iter(names), per_layer=False, bins=3).table.shape == (3, 1, 2)
    assert LearnedWeights(2, iter(names)).table.shape == (1, len(names), 2)


def test_layers_that_do_not_fit(base):
    with pytest.raises(LoraError, match="1 layers \\(unet.nowhere\\) are not in this model"):
        Mixture(base, [Lora({"unet.nowhere": Factors(torch.ones(2, 1), torch.ones(1, 2))})])


def test_convolutions_in_groups():
    conv = nn.Conv2d(4, 6, 3, groups=2, padding=1)
    holder = nn.Sequential(conv, nn.Conv2d(6, 4, 1))
    parts = [Lora({"unet.0": Factors(torch.randn(6, r, 1, 1), torch.randn(r, 2, 3, 3), groups=2)}) for r in (1, 3)]
    x, each = torch.randn(3, 4, 8, 8), torch.randn(3, 2)
    delta = [l.layers["unet.0"].delta() for l in parts]
    plain = lambda w: F.conv2d(x, w, conv.bias, padding=1, groups=2)
    answers = [plain(conv.weight + d) - conv(x) for d in delta]
    with Mixture(SimpleNamespace(unet=holder), parts, lambda *a: each):
        assert close(conv(x), plain(conv.weight) + sum(each[:, i].view(-1, 1, 1, 1) * a for i, a in enumerate(answers)), 1e-3)
    for how, kw in (("np", dict(mu=0)), ("dare", dict(p=0.)), ("zip", dict(columns={"unet.0": torch.ones(2, 2)}))):
        assert close(compose(parts, method=how, **kw).layers["unet.0"].delta(), sum(delta), 1e-3)
    with pytest.raises(LoraError, match="grouped convolutions"):
        compose(parts, method="fusion", grams=[{"unet.0": torch.eye(18)}] * 2)
    with pytest.raises(ShapeError, match="in 1: the"):
        Mixture(SimpleNamespace(unet=nn.Sequential(nn.Conv2d(2, 6, 3))), parts)


def random_pair(pipe, family):
    "Two LoRAs of different ranks and layers"
    out, wide = [], ("transformer" if family == "sd3" else "unet", "text_encoder", "text_encoder_2")
    for r, where in ((2, wide), (3, wide[:2])):
        worn = inject_lora(pipe, {c: "attention" for c in where}, rank=r)
        for m in worn.layers.values(): nn.init.normal_(m.lora_up.weight, std=.1)
        out.append(worn.lora()); worn.remove()
    return out

@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_other_families(family, tmp_path):
    "All their text encoders: what a mixture draws with learned weights, a file draws too"
    other = as_base(random_pipe(family))
    two = random_pair(other.pipe, family)
    one = lambda n: to_batch(other.generate("a cat", seeds=[1], steps=n))
    loss = keep_loss(other, samples(other, two, [["a cat"], ["a car"]], steps=2), batch=1)
    w, c = learn_weights(other, two, loss, steps=2), zip_columns(other, two, loss, steps=2)
    assert all(v == v for v in w.curve + c.curve) and (w.table != 1).any() and c.overlap() < 1 - 1e-6
    for how, kw, mixture in (("learned", dict(learned=w), Mixture(other, two, w)), ("zip", dict(columns=c), Mixture(other, two))):
        mixture.columns = kw.get("columns", {})
        with mixture: want = one(2)
        compose(two, method=how, **kw).save(tmp_path / "made.safetensors")
        with wearing(other, Lora.load(tmp_path / "made.safetensors")): assert (one(2) - want).abs().max() < .05
    for how in ("np", "orthogonal", "ties", "dare", "klora"):                # names of an MMDiT, of SDXL: no method stumbles
        apart = compose(two, method=how)
        assert len(apart) <= len(gather(two)) and all(f.norm() < 1e4 for f in apart.layers.values())
    for weights in (switch(2), klora(two)):
        with Mixture(other, two, weights): assert (one(2) - want).abs().max() > 0
    with Mixture(other, two) as both, composite(both): assert torch.isfinite(one(2)).all()
    half = compose(two, [{"transformer_blocks.1" if family == "sd3" else "mid_block": .5}, 1.])
    assert distance(half, compose(two)) > 0


@pytest.mark.parametrize("weights, says", [(lambda *a: [1, float("nan")], "finite"), (lambda *a: [1, 1, 1], "each of 2"),
                                           (lambda *a: [1], "each of 2"),
                                           (2., "expected f"), ([1, 1], "expected f")])
def test_weights_of_a_mixture_are_numbers_for_each(base, pair, weights, says):
    x, words = torch.randn(1, base.denoiser.config.in_channels, 8, 8), torch.randn(1, 7, base.denoiser.config.cross_attention_dim)
    with pytest.raises(LoraError, match=says), Mixture(base, pair, weights): base.denoiser(x, 5, words)
    base.denoiser(x, 5, words)                                                # no hook is left

@pytest.mark.parametrize("shares", [[float("nan"), 1], [0, 0], [1], [-1, 1]])
def test_shares_of_a_composite(base, pair, shares):
    with Mixture(base, pair) as m, pytest.raises(LoraError, match="shares|share"), composite(m, shares): pass

@pytest.mark.parametrize("method, kw", [("np", dict(mu=float("nan"))), ("np", dict(protect=7)), ("ties", dict(density=2)),
                                        ("ties", dict(density=float("nan"))),
                                        ("ties", dict(scale=float("nan"))), ("lerp", dict(t=float("inf"))), ("klora", dict(alpha=float("nan"))),
                                        ("dare", dict(ties=True, density=-1)), ("cat", dict(nonsense=1)), ("svd", dict(rank=2.5))])
def test_settings_that_mean_nothing(pair, method, kw):
    with pytest.raises(LoraError): compose(pair, method=method, **kw)
