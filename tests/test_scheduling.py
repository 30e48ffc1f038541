import copy, math, warnings
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
        with pytest.raises(LoraError, match="while they are scheduled"): unet(x, 100, words)
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), new.parameters()))


# Written over inside, without a trace in the tensor

def _data(unet, w, new): w.data.copy_(new)
def _in_place(unet, w, new):
    with torch.no_grad(): w.copy_(new)
def _one(unet, w, new): w.data.view(-1)[-1] += 1e-3
def _add(unet, w, new): w.data.add_(1e-6 * torch.randn(w.shape))
def _shuffle(unet, w, new): w.data.copy_(w.flip(0))
def _swap(unet, w, new): w.data = new.clone()
def _load(unet, w, new): unet.load_state_dict({WEIGHT: new}, strict=False)
def _assign(unet, w, new): unet.load_state_dict({WEIGHT: new.clone()}, strict=False, assign=True)
def _step(unet, w, new):
    w.requires_grad_().grad = new.clone()
    torch.optim.SGD([w], lr=.1).step()
    w.grad = None; w.requires_grad_(False)

WRITES = [_data, _in_place, _one, _add, _shuffle, _swap, _load, _assign, _step]
WEIGHT = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"

def one_written(write, plan, calls=(), dtype=None, offload=False, says="1 weights .*written over while they were scheduled", **kw):
    "Write one weight inside `scheduled`, after calls at some timesteps; it must stay, and all others come back"
    from helpers_ground import random_lora, tiny_unet
    unet = tiny_unet().to(dtype); path = WEIGHT.removesuffix(".weight")
    x = torch.randn(1, 4, 8, 8).to(unet.dtype), torch.randn(1, 7, 24).to(unet.dtype)
    new, rest = torch.randn(16, 16).to(unet.dtype), {n: p.detach().clone() for n, p in unet.named_parameters()}
    with pytest.warns(UserWarning, match=says), scheduled(unet, {random_lora(tiny_unet(), "extended"): plan}, **kw) as handle, torch.no_grad():
        for t in calls: unet(x[0], t, x[1])
        with torch.enable_grad(): write(unet, unet.get_submodule(path).weight, new)
        written = unet.get_submodule(path).weight.detach().clone()
        if len(handle.state.values or ()) and plan != 1:
            with pytest.raises(LoraError, match=r"1 weights .*while they are scheduled"): unet(x[0], 100, x[1])
            assert torch.equal(written, unet.get_submodule(path).weight)
    now = dict(unet.named_parameters())
    assert torch.equal(now[WEIGHT], written) and all(torch.equal(now[n], b) for n, b in rest.items() if n != WEIGHT)
    assert not [m for m in unet.modules() if {"_kept_weight", "_lora_schedule"} & m.__dict__.keys()]

@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("plan", [1, ramp(0, 1), {0: 0, .4: 0, 1: 1}], ids=["constant", "ramp", "off"])
def test_a_weight_written_inside_stays(write, plan): one_written(write, plan, (999, 900, 700))

@pytest.mark.parametrize("write", WRITES)
def test_a_weight_written_inside_a_cached_run_stays(write):
    "The second run takes composed weights from the cache, and one of them was written over"
    one_written(write, ramp(0, 1), (900, 500, 900, 500), budget=1 << 30)
    one_written(write, ramp(0, 1), (900, 500, 900, 500), budget=0)

@pytest.mark.parametrize("write", [_data, _one])
def test_a_weight_written_before_the_first_step_or_in_half_precision_stays(write):
    one_written(write, ramp(0, 1))
    one_written(write, ramp(0, 1), (900,), torch.bfloat16)

def test_a_weight_of_the_base_written_through_an_old_view_stays():
    from helpers_ground import random_lora, tiny_unet
    unet = tiny_unet(); w = unet.get_parameter(WEIGHT).data
    with pytest.warns(UserWarning, match="1 weights"), scheduled(unet, {random_lora(tiny_unet(), "extended"): 1}), torch.no_grad():
        unet(torch.randn(1, 4, 8, 8), 500, torch.randn(1, 7, 24)); w.zero_()
    assert not unet.get_parameter(WEIGHT).any()

@pytest.mark.parametrize("mode", ["merge", "inject"])
def test_a_weight_written_in_a_store_of_offloaded_ones_stays(mode):
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules
    from helpers_ground import random_lora, tiny_unet
    unet = tiny_unet(); store = {n: p.detach().clone() for n, p in unet.state_dict().items()}
    cpu_offload(unet, "cpu", state_dict=store)
    x, path = (torch.randn(1, 4, 8, 8), torch.randn(1, 7, 24)), WEIGHT.removesuffix(".weight")
    lora, new, rest = random_lora(tiny_unet(), "extended"), torch.randn(16, 16), {n: b.clone() for n, b in store.items()}
    with warnings.catch_warnings(record=True) as said, torch.no_grad(), scheduled(unet, {lora: ramp(0, 1)}, mode=mode):
        warnings.simplefilter("always")
        unet(x[0], 500, x[1])
        module = unet.get_submodule(path); module = getattr(module, "root", module)
        module._hf_hook.weights_map["weight"].copy_(new)
        if mode == "merge":
            with pytest.raises(LoraError, match="1 weights"): unet(x[0], 100, x[1])
    assert any("written over while they were scheduled" in str(w.message) for w in said) == (mode == "merge")
    remove_hook_from_submodules(unet)
    assert torch.equal(unet.get_parameter(WEIGHT), new)
    assert all(torch.equal(p, rest[n]) for n, p in unet.named_parameters() if n != WEIGHT)

@pytest.mark.parametrize("write", WRITES)
def test_a_weight_written_beside_branches_stays_without_a_word(write):
    from helpers_ground import random_lora, tiny_unet
    unet, lora = tiny_unet(), random_lora(tiny_unet(), "extended")
    with warnings.catch_warnings(action="error"), scheduled(unet, {lora: ramp(0, 1)}, mode="inject"), torch.no_grad():
        unet(torch.randn(1, 4, 8, 8), 500, torch.randn(1, 7, 24))
        m = unet.get_submodule(WEIGHT.removesuffix(".weight")).root
        with torch.enable_grad(): write(m, m.weight, torch.ones(16, 16)) if write not in (_load, _assign) else m.load_state_dict(
            {"weight": torch.ones(16, 16)}, strict=False, assign=write is _assign)
        written = m.weight.detach().clone()
        unet(torch.randn(1, 4, 8, 8), 100, torch.randn(1, 7, 24))
    assert torch.equal(unet.get_parameter(WEIGHT), written)

@pytest.mark.parametrize("trip", [lambda m: m.to(memory_format=torch.channels_last), lambda m: m.half().float(), lambda m: m.double().float(),
                                  lambda m: m.double(), lambda m: m.bfloat16(), lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()))])
def test_a_scheduled_model_that_only_moved_comes_back(trip):
    from helpers_ground import random_lora, tiny_unet
    unet = tiny_unet()
    lora = random_lora(tiny_unet(), "extended")
    with warnings.catch_warnings(action="error"), scheduled(unet, {lora: ramp(0, 1)}), torch.no_grad():
        unet(torch.randn(1, 4, 8, 8), 500, torch.randn(1, 7, 24)); trip(unet)
        unet(torch.randn(1, 4, 8, 8).to(unet.dtype), 100, torch.randn(1, 7, 24).to(unet.dtype))
    want = places(tiny_unet().to(unet.dtype))
    assert all(torch.equal(places(unet)[n[5:]].module.weight, want[n[5:]].module.weight) for n in lora.layers)

def test_another_lora_on_and_off_again_between_two_steps(pipe, lora, other):
    "The names and strengths of what is merged are as before: the weights are not"
    with scheduled(pipe, {lora: .5}): want = draw(pipe)
    with scheduled(pipe, {lora: .5}):
        draw(pipe, 2); apply_lora(pipe, other, name="other"); remove_lora(pipe, "other")
        assert torch.equal(draw(pipe), want)

def test_a_weight_written_over_is_noticed_by_another_lora_inside(lora):
    from helpers_ground import random_lora, tiny_unet
    unet = tiny_unet(); mine, more = (random_lora(unet, "extended", seed=s) for s in (1, 2))
    x = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 24)
    with pytest.warns(UserWarning, match="1 weights"), torch.no_grad(), scheduled(unet, {mine: .5}):
        unet(x[0], 500, x[1]); unet.get_parameter(WEIGHT).data.add_(1); written = unet.get_parameter(WEIGHT).detach().clone()
        with pytest.raises(LoraError, match="1 weights"): apply_lora(unet, more)
    assert torch.equal(unet.get_parameter(WEIGHT), written)
    unet = tiny_unet(); apply_lora(unet, more, name="a"); unet.get_parameter(WEIGHT).data.add_(1)
    written = unet.get_parameter(WEIGHT).detach().clone()
    with warnings.catch_warnings(action="error"):
        for plan in ({"a": 1}, {mine: 1}):
            with pytest.raises(LoraError, match="1 weights .*remove_lora forgets"), scheduled(unet, plan): pass
    with pytest.warns(UserWarning, match="1 weights"): remove_lora(unet)
    assert torch.equal(unet.get_parameter(WEIGHT), written)

def test_a_text_encoder_written_over_stays_and_all_else_comes_back(shared, texty):
    pipe = shared; was = state(pipe); encoder = pipe.text_encoder
    q = next(n for n, _ in encoder.named_parameters() if "q_proj.weight" in n)
    bits = encoder.get_parameter(q).detach().clone()
    for worn in (True, False):
        if worn: apply_lora(pipe, texty, name="t")
        with warnings.catch_warnings(record=True) as said, scheduled(pipe, {"t" if worn else texty: .25}):
            warnings.simplefilter("always")
            draw(pipe, 2); encoder.get_parameter(q).data.add_(1)
            written = encoder.get_parameter(q).detach().clone()
        assert any("written over" in str(w.message) for w in said) and "_lora_schedule" not in pipe.unet.__dict__
        if worn:
            with pytest.warns(UserWarning, match="They stay as they are"): remove_lora(pipe)
        assert torch.equal(encoder.get_parameter(q), written)
        encoder.get_parameter(q).data = bits.clone()
    now = state(pipe)
    assert all(torch.equal(now[k][1], was[k][1]) for k in was if isinstance(was[k][1], torch.Tensor)) and now["words"] == was["words"]

def test_a_cache_that_is_lent_again_never_mixes_two_bases(lora):
    from helpers_ground import random_lora, tiny_unet
    unet, mine, cache = tiny_unet(), random_lora(tiny_unet(), "extended"), WeightCache(1 << 30)
    x, found = (torch.randn(1, 4, 8, 8), torch.randn(1, 7, 24)), []
    for shift in (0, .5):
        unet.get_parameter(WEIGHT).data.add_(shift)
        with scheduled(unet, {mine: .5}) as handle, torch.no_grad():
            handle.cache = cache; unet(x[0], 500, x[1]); handle.cache = WeightCache(0)
            found.append(unet.get_parameter(WEIGHT).detach().clone())
    assert near(found[1], found[0] + .5, 1e-6) and handle.stats.composed == 1
