import math
from dataclasses import replace

import diffusers
import pytest
import torch
from PIL import Image
from torch import nn

from lora_nb.core import LoraError, TargetError
from lora_nb.injection import apply_lora, inject_lora, remove_lora, set_scale
from lora_nb.loading import load_base
from lora_nb.lora import Factors, Lora
from lora_nb.random_pipes import random_pipe
from lora_nb.schedule import LoraComposite, LoraSchedule, lora_switch, ramp
from lora_nb.scheduling import Clock, Site, WeightCache, rank_masked, scheduled
from lora_nb.worn import places, resolve_components

diffusers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)


def random_lora(pipe, kinds=("attn1", "conv1", "attn2.to_q"), rank=2, std=.3, seed=0, text=False):
    "Random factors for the layers whose path holds one of `kinds`"
    g, out = torch.Generator().manual_seed(seed), {}
    for c, m in resolve_components(pipe).items():
        if c.startswith("text") and not text: continue
        for n, p in places(m).items():
            w = p.module.weight
            if not any(k in n for k in (*kinds, "q_proj")): continue
            down = torch.randn(rank, *w.shape[1:], generator=g) * std / w[0].numel()**.5
            out[f"{c}.{n}"] = Factors(torch.randn(len(w), rank, *[1] * (w.ndim - 2), generator=g) * std, down)
    return Lora(out, metadata={"base": "random"})

def state(pipe):
    "Everything that must be as before: bits, places of tensors, hooks, modules, words"
    out = {}
    for c, m in resolve_components(pipe).items():
        out |= {(c, n): (p.data_ptr(), p.detach().clone(), p.requires_grad) for n, p in m.named_parameters()}
        own = lambda x: (id(x), sorted(k for k in x.__dict__ if k != "_lora_worn"), len(x._forward_pre_hooks))
        out |= {(c, "modules", n): (*own(x), len(x._forward_hooks)) for n, x in m.named_modules()}
    if getattr(pipe, "tokenizer", None): out["words"] = sorted(pipe.tokenizer.get_vocab())
    return out

def same(a, b):
    eq = lambda x, y: torch.equal(x.view(torch.uint8), y.view(torch.uint8)) if isinstance(x, torch.Tensor) and x.ndim \
        else torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    return a.keys() == b.keys() and all(eq(x, y) for k in a for x, y in zip(a[k], b[k]))

def draw(pipe, n=4, seed=0, prompt="a", **kw):
    kw = dict(num_inference_steps=n, guidance_scale=3., output_type="latent", height=64, width=64) | kw
    kw = {k: v for k, v in kw.items() if v is not None}
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **kw).images

def near(a, b, eps=1e-4): return (torch.as_tensor(a) - torch.as_tensor(b)).abs().max() <= eps

def quiet_pipe(*args):
    pipe = load_base(random_pipe(*args)).pipe
    pipe.set_progress_bar_config(disable=True)
    draw(pipe, 1, **(dict(max_sequence_length=16) if args == ("sd3",) else {}))    # transformers leaves notes at the first call
    return pipe

@pytest.fixture(scope="module")
def shared(): return quiet_pipe("sd")

@pytest.fixture
def pipe(shared):
    "A pipeline that each test must leave as it was"
    before = state(shared)
    yield shared
    assert same(before, state(shared))

@pytest.fixture(scope="module")
def lora(shared): return random_lora(shared)

@pytest.fixture(scope="module")
def other(shared): return random_lora(shared, seed=2)

@pytest.fixture(scope="module")
def dora(shared, lora):
    return Lora({n: replace(f, magnitude=places(shared.unet)[n[5:]].module.weight.detach().flatten(1).norm(dim=1) * 1.1)
                 for n, f in lora.layers.items()})

def moments(pipe, **kw):
    "The places in progress that a run visits"
    seen = []
    draw(pipe, **kw)
    denoiser = {c: m for c, m in resolve_components(pipe).items() if not c.startswith("text")}
    some_lora, was = random_lora(denoiser), state(pipe)
    with scheduled(pipe, {some_lora: lambda p: seen.append(round(p, 3)) or p}) as handle:
        draw(pipe, **kw)
        assert handle.stats.swaps == len(set(seen)) - (0. in seen)
    assert same(was, state(pipe))
    return seen


# The clock and the cache

def test_clock_without_a_scheduler():
    clock = Clock()
    assert clock(999.)[:3] == (0, 0, 1000) and clock(0.)[:3] == (1, 999, 1000) and clock(400.).noise == .4
    assert clock(400.2) == clock(400.)._replace(noise=.4002)             # a level between two belongs to the nearer step


def test_clock_of_a_new_run(shared):
    clock = Clock(shared)
    for n in (4, 7):
        shared.scheduler.set_timesteps(n)
        seen = [clock(float(t)) for t in shared.scheduler.timesteps]
        assert [m.step for m in seen] == list(range(n)) and seen[-1].progress == 1


def test_cache_drops_the_least_recently_used_and_fills_its_memory_again():
    cache, used = WeightCache(40), {}
    for k in "ab": cache.put((k, 1), torch.ones(5), used.get)
    old = cache.get(("b", 1)); cache.get(("a", 1))
    cache.put(("c", 1), torch.ones(5), used.get)
    assert list(cache.kept) == [("a", 1), ("c", 1)] and cache.bytes == 40
    assert cache.buffer(torch.empty(5)) is old
    used["a"] = cache.get(("a", 1)); cache.get(("c", 1))
    cache.put(("d", 1), torch.ones(5), used.get)                         # in use: memory of "a" is not filled again
    assert cache.buffer(torch.empty(5)) is not used["a"]
    cache.clear(); assert (cache.bytes, len(cache.kept)) == (0, 0)


# Tasks and families

@pytest.mark.parametrize("kind", ["inpaint", "inpainting model", "sdxl", "several pictures", "no guidance"])
def test_every_task_sees_progress_from_0_to_1(shared, kind):
    gray, white = Image.new("RGB", (64, 64), "gray"), Image.new("L", (64, 64), 255)
    found = {"inpaint": lambda: (load_base(shared).sibling("Inpaint"), dict(image=gray, mask_image=white, strength=1.)),
             "inpainting model": lambda: (load_base(random_pipe("sd_inpaint")).pipe, dict(image=gray, mask_image=white)),
             "sdxl": lambda: (load_base(random_pipe("sdxl")).pipe, {}), "no guidance": lambda: (shared, dict(guidance_scale=1.)),
             "several pictures": lambda: (shared, dict(prompt=["a", "b"], num_images_per_prompt=2))}[kind]()
    assert moments(found[0], n=3, **found[1]) == [0, .5, 1]


def test_sd3_sees_progress_from_0_to_1(sd3): assert moments(sd3, n=3, max_sequence_length=16) == [0, .5, 1]


@pytest.fixture
def half():
    pipe = quiet_pipe("sd"); pipe.unet.to(torch.bfloat16)
    return pipe

def test_half_precision_equals_the_merged_lora(half):
    bf, was = random_lora(half), state(half)
    x = (torch.randn(1, 4, 8, 8).bfloat16(), 500, torch.randn(1, 3, 32).bfloat16())
    with scheduled(half.unet, {bf: .5}), torch.no_grad(): got = half.unet(*x).sample
    apply_lora(half.unet, bf, scale=.5)
    with torch.no_grad(): assert torch.equal(got, half.unet(*x).sample)
    remove_lora(half.unet); assert same(was, state(half))


def test_moved_to_another_precision_meanwhile(half):
    bf = random_lora(half)
    x = (torch.randn(1, 4, 8, 8).bfloat16(), 500, torch.randn(1, 3, 32).bfloat16())
    y = [v.float() if isinstance(v, torch.Tensor) else v for v in x]
    with scheduled(half.unet, {bf: .5}), torch.no_grad():
        half.unet(*x)
        half.unet.to(torch.float32)
        got = half.unet(*y).sample
    apply_lora(half.unet, bf, scale=.5)
    with torch.no_grad(): assert torch.equal(got, half.unet(*y).sample)
    remove_lora(half.unet)
    assert not any("_kept_weight" in p.module.__dict__ for p in places(half.unet).values())


def test_composed_inside_and_outside_of_inference_mode(pipe, lora):
    with scheduled(pipe, {lora: ramp(0, 1)}): want = draw(pipe)
    with scheduled(pipe, {lora: ramp(0, 1)}):
        with torch.inference_mode(): assert torch.equal(want, draw(pipe))
        assert torch.equal(want, draw(pipe))


# Errors

def test_errors_change_nothing(pipe, lora):
    bad = Lora({**lora.layers, "unet.nowhere": next(iter(lora.layers.values()))})
    for wrong, kind in (({bad: 1}, TargetError), ({lora: LoraSchedule(blocks="IN99=0")}, TargetError), ({}, LoraError),
                        ({"nobody": 1}, TargetError), ({lora: "loud"}, LoraError), ({lora: "rank:x"}, LoraError)):
        was = state(pipe)
        with pytest.raises(kind), scheduled(pipe, wrong): pass
        assert same(was, state(pipe))
    with pytest.raises(LoraError, match="mode="), scheduled(pipe, {lora: 1}, mode="x"): pass
    with pytest.raises(TargetError, match="text encoder alone"), scheduled(pipe.text_encoder, {lora: 1}): pass


def test_errors_inside(pipe, lora):
    with scheduled(pipe, {lora: 1}) as handle:
        with pytest.raises(LoraError, match="scheduled already"), scheduled(pipe, {lora: 1}): pass
        with pytest.raises(TargetError): handle.set("other", 1)
        with pytest.raises(TargetError): handle.set(lora, "IN99=0")
        with pytest.raises(LoraError, match="without a timestep"): pipe.unet(torch.randn(1, 4, 8, 8), encoder_hidden_states=None)
    with pytest.raises(LoraError, match="function"), scheduled(pipe, {lora: lambda p: math.inf}): draw(pipe, 2)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_exchange_is_done_again(pipe, lora, monkeypatch, error):
    with scheduled(pipe, {lora: .5}): want = draw(pipe)
    compose, calls = Site.compose, []
    def trip(*args):
        calls.append(1)
        if len(calls) == 7: raise error("stop")
        return compose(*args)
    monkeypatch.setattr(Site, "compose", trip)
    with scheduled(pipe, {lora: .5}) as handle:
        with pytest.raises(error): draw(pipe)
        assert handle.state.groups is None                               # stale: the next call makes everything right
        assert torch.equal(draw(pipe), want)


# Beside others

def worn_then(pipe, mode, loras, **kw):
    "Wear LoRAs in a mode, then schedule; give the picture, and check that the worn pipeline comes back"
    names = [apply_lora(pipe, l, scale=s, mode=mode, name=n) for n, (l, s) in kw.items()]
    was = state(pipe)
    with scheduled(pipe, loras): out = draw(pipe)
    assert same(was, state(pipe))
    for n in names: remove_lora(pipe, n)
    return out

@pytest.mark.parametrize("mode", ["merge", "inject"])
@pytest.mark.parametrize("change, s", [("on", .5), ("scale", .25), ("off", 0.)])
def test_others_change_meanwhile(pipe, lora, other, mode, change, s):
    if change != "on": apply_lora(pipe, other, scale=.5, mode=mode, name="other")
    with scheduled(pipe, {lora: .7}):
        draw(pipe, 2)
        if change == "on": apply_lora(pipe, other, scale=.5, mode=mode, name="other")
        if change == "off": remove_lora(pipe, "other")
        if change == "scale": set_scale(pipe, .25, "other")
        inner = draw(pipe)
    outer = draw(pipe)
    if change != "off": remove_lora(pipe, "other")
    assert near(inner, worn_then(pipe, "merge", {lora: .7, other: s}), 2e-3)
    apply_lora(pipe, other, scale=s); assert near(outer, draw(pipe), 1e-3); remove_lora(pipe)


@pytest.mark.parametrize("mode", ["merge", "inject"])
def test_dora(pipe, lora, dora, mode):
    apply_lora(pipe, dora, scale=.5); a = draw(pipe); remove_lora(pipe)
    with scheduled(pipe, {dora: .5}, mode=mode): assert near(draw(pipe), a, 1e-5 if mode == "merge" else 2e-3)
    with pytest.raises(LoraError, match="no ranks to mask"), scheduled(pipe, {dora: LoraSchedule(rank_min=1)}, mode=mode): pass
    with scheduled(pipe, {dora: 1, lora: .5}, mode=mode) as handle:
        draw(pipe, 2)
        with pytest.raises(LoraError, match="no ranks"): handle.set(dora, "rank:1")


# Text encoders and files

@pytest.fixture(scope="module")
def texty(shared):
    lora = random_lora(shared, seed=3, text=True)
    return Lora(lora.layers, {"<toy>": {"text_encoder": torch.randn(2, 32)}}, lora.metadata)

def encode(pipe): return pipe.encode_prompt("a <toy>", "cpu", 1, False)[0]

@pytest.mark.parametrize("mode", ["merge", "inject"])
def test_text_encoders_of_worn_loras(shared, texty, mode):
    pipe = shared
    apply_lora(pipe, texty, scale=2., mode=mode, name="t"); was = state(pipe); full = encode(pipe)
    with scheduled(pipe, {"t": .25}) as handle:
        got = encode(pipe)
        handle.set("t", 1.); assert near(encode(pipe), full, 1e-6)
        handle.set("t", .25); assert near(encode(pipe), got, 1e-6)
    assert same(was, state(pipe)) if mode == "inject" else torch.equal(encode(pipe), full)
    remove_lora(pipe); apply_lora(pipe, texty, scale=.5); assert near(encode(pipe), got, 1e-5); remove_lora(pipe)


def test_base_weighs_text_encoders(pipe, texty):
    alone = Lora({n: f for n, f in texty.layers.items() if n.startswith("text")}, texty.embeddings)
    with scheduled(pipe, {texty: 1.}) as handle:
        handle.set(texty, "BASE=0.5"); got = encode(pipe)
    apply_lora(pipe, alone, scale=.5); assert torch.equal(got, encode(pipe)); remove_lora(pipe)


def test_files_get_the_names_of_files(pipe, lora, tmp_path):
    for folder in ("a", "b"): (tmp_path / folder).mkdir(); lora.save(tmp_path / folder / "toy.safetensors")
    files = [tmp_path / folder / "toy.safetensors" for folder in ("a", "b")]
    with scheduled(pipe, {files[0]: ramp(0, 1), files[1]: 0, lora: 0}) as handle: out = draw(pipe)
    assert handle.names == ["toy", "toy_2", "lora"]
    with scheduled(pipe, {lora: ramp(0, 1)}): assert near(draw(pipe), out, 1e-5)


def test_a_cache_can_be_lent(pipe, lora):
    cache = WeightCache(2 << 30)
    for hits in (0, len(lora)):
        with scheduled(pipe, {lora: .5}) as handle:
            handle.cache = cache
            draw(pipe, 2)
            assert handle.stats.hits == hits
            handle.cache = WeightCache(0)                                # leaving clears what it holds
    assert len(cache.kept) == len(lora)


# Switch, Composite, masks

@pytest.fixture(scope="module")
def sd3(): return quiet_pipe("sd3")

def test_composite_of_equals_is_one(pipe, lora):
    with scheduled(pipe, {lora: 1}): one = draw(pipe)
    with scheduled(pipe, LoraComposite({lora: 1, lora.scaled(1): 1})): assert near(draw(pipe), one)


def test_composite_and_switch_on_an_mmdit(sd3):
    a = random_lora(sd3, kinds=("attn.to_q", "attn2"))
    b, was = random_lora(sd3, kinds=("transformer_blocks",)), state(sd3)
    with scheduled(sd3, LoraComposite({a: 1, a.scaled(-1): 1})) as handle: draw(sd3, 3, max_sequence_length=16)
    assert handle.stats.recompositions == 2 and same(was, state(sd3))
    with scheduled(sd3, lora_switch([a, b])) as handle: draw(sd3, 4, max_sequence_length=16)
    assert handle.stats.swaps == 4 and same(was, state(sd3))


@pytest.mark.parametrize("mode", ["merge", "inject"])
def test_blocks_of_an_mmdit(sd3, mode):
    lora = random_lora(sd3, kinds=("transformer_blocks",))
    short, half, was = dict(n=2, max_sequence_length=16), lora.map(lambda f: f.scaled(.5)), state(sd3)
    with scheduled(sd3, {Lora({n: (f if ".0." in n[:33] else half.layers[n]) for n, f in lora.layers.items()}): 1}):
        want = draw(sd3, **short)
    for plan in (LoraSchedule(blocks={"transformer_blocks.1": .5}), "1@B01=.5"):
        with scheduled(sd3, {lora: plan}, mode=mode): assert near(draw(sd3, **short), want)
    assert same(was, state(sd3))


def test_masks_and_gradients(shared):
    pipe, (ts, x, e) = shared, (torch.tensor([999, 500, 0]), torch.randn(3, 4, 8, 8), torch.randn(3, 3, 32))
    injected = inject_lora(pipe, "attention", rank=2)
    layers = injected.layers.values()
    with rank_masked(pipe.unet, layers, 1):
        pipe.unet(x, ts, e).sample.mean().backward()
        inner = injected.lora()
        with pytest.raises(LoraError, match="selector"), rank_masked(pipe.unet, layers, 1): pass
    assert near(*([f.delta() for f in l.layers.values()][0] for l in (inner, injected.lora())))
    ups = [m.lora_up.weight for m in layers]
    assert all(u.grad is not None for u in ups)
    for u in ups: u.grad = None
    with rank_masked(pipe.unet, layers, 1): pipe.unet(x[:1], ts[:1], e[:1]).sample.mean().backward()
    assert all((u.grad[:, 1:] == 0).all() for u in ups) and any((u.grad[:, :1] != 0).any() for u in ups)   # rank 1 learns
    assert all(type(m._modules["selector"]) is nn.Identity for m in layers)
    injected.remove()


# As branches

def test_worn_branches_on_a_schedule(shared, lora, other):
    pipe = shared
    apply_lora(pipe, lora, mode="inject", scale=.5, name="w"); was = state(pipe)
    for plan in ({"w": ramp(0, 1)}, {"w": LoraSchedule(rank_min=1)}, {"w": .5, other: 1}):
        with scheduled(pipe, plan): want = draw(pipe)
        with scheduled(pipe, plan, mode="inject") as handle:
            assert near(draw(pipe), want, 2e-3)
            handle.set("w", 1); handle.set("w", "rank:1"); draw(pipe, 2)
        assert same(was, state(pipe))
    calls = []
    def stop(*args):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), scheduled(pipe, {lora: ramp(1, .1), "w": .5}, mode="inject"):
        hook = pipe.unet.conv_in.register_forward_hook(stop)
        draw(pipe, 4)
    hook.remove()
    assert len(calls) == 2 and same(was, state(pipe))
    remove_lora(pipe)


def test_a_merged_lora_cannot_be_scheduled_as_branches(shared, lora):
    apply_lora(shared, lora, name="w")
    with pytest.raises(LoraError, match="merged into the weights"), scheduled(shared, {"w": 1}, mode="inject"): pass
    remove_lora(shared)


@pytest.mark.parametrize("how", ["load", "assign", "swap"])
def test_weights_written_over_while_scheduled_stay(how):
    from helpers_ground import fingerprint, random_lora, tiny_unet
    unet, new = tiny_unet(), tiny_unet(3)
    x, words = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 24)
    with pytest.warns(UserWarning, match="written over while they were scheduled"), scheduled(unet,
            {random_lora(tiny_unet(), "extended"): ramp(0, 1)}):
        with torch.no_grad(): unet(x, 500, words)
        if how == "swap":
            for a, b in zip(unet.parameters(), new.parameters()): a.data = b.data.clone()
        else: unet.load_state_dict({k: v.clone() for k, v in new.state_dict().items()}, assign=how == "assign")
    for p in (*unet.parameters(), *new.parameters()): p.requires_grad_(False)
    assert fingerprint(unet) == fingerprint(new) and not [m for m in unet.modules() if "_kept_weight" in m.__dict__]

def test_loading_in_the_middle_of_a_run_is_an_error():
    from helpers_ground import random_lora, tiny_unet
    unet, new = tiny_unet(), tiny_unet(3)
    x, words = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 24)
    with pytest.warns(UserWarning, match="written over"), torch.no_grad(), scheduled(unet, {random_lora(tiny_unet(), "extended"): ramp(0, 1)}):
        unet(x, 500, words); unet.load_state_dict(new.state_dict())
        with pytest.raises(LoraError, match="while it is scheduled"): unet(x, 100, words)
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), new.parameters()))
