"What people's own models and calls do to a worn LoRA: offloaded, tied, channels_last, loaded anew, twice, from threads."
import copy, os, threading, time, warnings

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from diffusers.hooks import apply_group_offloading
from helpers_faults import injections
from helpers_ground import close, fingerprint, random_lora, tiny_pipe, tiny_unet
from torch import nn

from lora_nb.checkpoints import borrowed, merge_checkpoint, save_checkpoint
from lora_nb.core import LoraError, atomic_path
from lora_nb.extraction import distill
from lora_nb.injection import apply_lora, extract_lora, inject_lora, remove_lora, set_scale
from lora_nb.layers import LoraLayer
from lora_nb.lora import Factors, Lora
from lora_nb.mixing import Mixture
from lora_nb.random_pipes import random_pipe
from lora_nb.schedule import LoraSchedule
from lora_nb.scheduling import scheduled
from lora_nb.stored import group_of, plain_modules
from lora_nb.worn import adapters, places


def answer(unet):
    "What a UNet makes of a fixed input, wherever its weights are"
    g, dtype = torch.Generator().manual_seed(0), next(iter(worn_dtype(unet)))
    x, words = torch.randn(1, 4, 8, 8, generator=g).to(dtype), torch.randn(1, 7, 24, generator=g).to(dtype)
    with torch.no_grad(): return unet(x, 5, words).sample

def worn_dtype(unet): return {p.dtype for p in unet.parameters()}

@pytest.fixture(scope="module")
def lora(): return random_lora(tiny_unet(), "extended")

@pytest.fixture(scope="module")
def want(lora):
    unet = tiny_unet(); apply_lora(unet, lora)
    return answer(unet)

def dora_of(lora, unet):
    from dataclasses import replace
    norms = lambda n: places(unet)[n[5:]].module.weight.detach().flatten(1).norm(dim=1) * 1.1
    return Lora({n: replace(f, magnitude=norms(n)) for n, f in lora.layers.items()})


# Sequential offload

@pytest.mark.parametrize("mode", ["merge", "inject"])
def test_an_offloaded_model_wears_it(lora, want, mode):
    unet = tiny_unet(); fresh, bits = answer(unet), fingerprint(unet)
    cpu_offload(unet, "cpu")
    for _ in range(2):
        apply_lora(unet, lora, mode=mode); assert close(answer(unet), want) and close(answer(unet), want)
        set_scale(unet, .0); assert close(answer(unet), fresh)
        set_scale(unet, 1.); assert close(answer(unet), want)
        remove_lora(unet); assert torch.equal(answer(unet), fresh)
    remove_hook_from_submodules(unet)
    assert fingerprint(unet) == bits


@pytest.mark.parametrize("mode", ["merge", "inject"])
def test_worn_first_and_offloaded_then(lora, want, mode):
    unet = tiny_unet(); fresh, bits = answer(unet), fingerprint(unet)
    apply_lora(unet, lora, mode=mode); cpu_offload(unet, "cpu")
    assert close(answer(unet), want)
    told = extract_lora(unet); assert all(close(told.layers[n].delta(), f.delta()) for n, f in lora.layers.items())
    remove_lora(unet)
    assert torch.equal(answer(unet), fresh)
    remove_hook_from_submodules(unet)
    assert fingerprint(unet) == bits


def test_hooks_that_go_while_it_is_worn(lora, want):
    for order in ("offload, wear", "wear, offload"):
        unet = tiny_unet(); bits = fingerprint(unet)
        for step in order.split(", "): cpu_offload(unet, "cpu") if step == "offload" else apply_lora(unet, lora)
        answer(unet); remove_hook_from_submodules(unet)
        assert close(answer(unet), want)
        with warnings.catch_warnings(action="error"): remove_lora(unet)
        assert fingerprint(unet) == bits


@pytest.mark.parametrize("mode", ["merge", "inject"])
def test_schedules_of_an_offloaded_model(lora, mode):
    unet, other = tiny_unet(), tiny_unet(); fresh = answer(unet)
    cpu_offload(unet, "cpu")
    with scheduled(other, {lora: .5}): half = answer(other)
    with scheduled(unet, {lora: .5}, mode=mode) as handle:
        assert close(answer(unet), half)
        handle.set(lora, 0); assert close(answer(unet), fresh)
    assert torch.equal(answer(unet), fresh)


def test_what_an_offloaded_model_cannot_do_is_refused(lora):
    pipe = tiny_pipe(); unet = pipe.unet; dora = dora_of(lora, unet); cpu_offload(unet, "cpu")
    with pytest.raises(LoraError, match="nothing can be trained"): inject_lora(unet)
    with pytest.raises(LoraError, match="wear it with mode='merge'"): apply_lora(unet, dora, mode="inject")
    cpu_offload(pipe.text_encoder, "cpu")
    with pytest.raises(LoraError, match="no word can be added"): apply_lora(pipe, Lora(embeddings={"<x>": {"text_encoder": torch.randn(24)}}))
    blocks = nn.Sequential(nn.Sequential(nn.Linear(6, 6)))
    cpu_offload(blocks, "cpu", preload_module_classes=["Sequential"])
    for mode in ("merge", "inject"):
        with pytest.raises(LoraError, match="in blocks of modules"):
            apply_lora({"unet": blocks}, Lora({"unet.0.0": Factors(torch.ones(6, 1), torch.ones(1, 6))}), mode=mode)
    assert not adapters(pipe) and not adapters(blocks)


def test_what_reads_weights_does_not_read_empty_ones(tmp_path):
    pipe, other = random_pipe("sd"), random_pipe("sd"); lora = random_lora(pipe.unet); apply_lora(other, lora); told = repr(lora.report(pipe))
    for p in (pipe, other): cpu_offload(p.unet, "cpu")
    assert repr(lora.report(pipe)) == told
    with pytest.raises(LoraError, match="unet is offloaded layer by layer, so comparing it is impossible"): distill(pipe, other, rank=2)
    for format in ("folder", "single_file"):
        for write in (lambda p: save_checkpoint(pipe, p, format), lambda p: merge_checkpoint(pipe, lora, p, format)):
            with pytest.raises(LoraError, match="so writing it into a file is impossible"): write(tmp_path / "x.safetensors")
    assert not any(tmp_path.iterdir()) and not adapters(pipe)
    third = random_pipe("sd"); in_groups(third.vae, offload_to_disk_path=str(tmp_path / "vae"))
    with pytest.raises(LoraError, match="AutoencoderKL is offloaded in groups, and files"): save_checkpoint(third, tmp_path / "y")


def test_a_weight_in_two_places_is_not_scheduled():
    "One tensor for two layers: a schedule would have changed both"
    for same in (True, False):
        first, second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        if not same: second.weight = first.weight
        model = nn.Module(); model.a = nn.Sequential(first, first if same else second)
        lora, was = Lora({"unet.a.0": Factors(torch.ones(6, 1), torch.ones(1, 6))}), first.weight.detach().clone()
        with pytest.raises(LoraError, match="the weight is used in several places"):
            with scheduled({"unet": model}, lora): pass
        with scheduled({"unet": model}, lora, mode="inject"): pass
        assert torch.equal(first.weight, was) and "_lora_schedule" not in model.__dict__ and not hasattr(first, "_kept_weight")


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_computed_weight_is_refused(wrap):
    model = nn.Sequential(wrap(nn.Linear(6, 6, bias=False)))
    lora = Lora({"unet.0": Factors(torch.ones(6, 1), torch.ones(1, 6))})
    for mode in ("merge", "inject"):
        with pytest.raises(LoraError, match="0: the weight is computed from other parameters"): apply_lora({"unet": model}, lora, mode=mode)
    with pytest.raises(LoraError, match="Take the parametrization off"): inject_lora({"unet": model}, "all", rank=1)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    apply_lora({"unet": model}, lora); remove_lora({"unet": model})


# Group offloading of diffusers

def in_groups(model, kind="leaf_level", **kw):
    cpu = torch.device("cpu")
    apply_group_offloading(model, **{**dict(onload_device=cpu, offload_device=cpu, offload_type=kind, num_blocks_per_group=1), **kw})

@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
@pytest.mark.parametrize("mode", ["merge", "inject"])
def test_groups_in_memory_wear_it(lora, want, mode, kind):
    unet = tiny_unet(); fresh, bits = answer(unet), fingerprint(unet)
    in_groups(unet, kind)
    apply_lora(unet, lora, mode=mode); assert close(answer(unet), want) and close(answer(unet), want)
    remove_lora(unet); assert torch.equal(answer(unet), fresh)
    with scheduled(unet, lora, mode=mode): assert close(answer(unet), want)
    assert torch.equal(answer(unet), fresh) and fingerprint(unet) == bits


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_groups_on_disk_are_refused(lora, want, kind, tmp_path):
    "diffusers reads its own files at each call: what was merged had no effect, without a word"
    pipe = tiny_pipe(); unet, text = pipe.unet, pipe.text_encoder; fresh = answer(unet)
    for i, m in enumerate((unet, text)): in_groups(m, kind, offload_to_disk_path=str(tmp_path / str(i)))
    for mode in ("merge", "inject"):
        with pytest.raises(LoraError, match="ConditionModel is offloaded in groups, and files of diffusers"):
            apply_lora(unet, lora, mode=mode)
    with pytest.raises(LoraError, match="scheduling merged LoRAs is impossible"):
        with scheduled(unet, lora): pass
    with pytest.raises(LoraError, match="nothing can be trained"): inject_lora(unet)
    with pytest.raises(LoraError, match="adding a word is impossible"):
        apply_lora(pipe, Lora(embeddings={"<x>": {"text_encoder": torch.randn(24)}}))
    assert not adapters(pipe) and close(answer(unet), fresh)
    for mode in ("merge", "inject"):
        unet = tiny_unet(); apply_lora(unet, lora, mode=mode); in_groups(unet, kind, offload_to_disk_path=str(tmp_path / mode))
        assert close(answer(unet), want), mode                             # worn first
        if mode == "inject": continue
        with pytest.raises(LoraError, match="leave out offload_to_disk_path"): remove_lora(unet)
        assert adapters(unet) and close(answer(unet), want)


def test_groups_of_a_stream_are_refused_and_branches_go_where_groups_go(lora):
    def groups(kind, **what):
        unet = tiny_unet(); in_groups(unet, kind)
        for g in filter(None, map(group_of, plain_modules(unet))): g.__dict__.update(what)
        return unet
    unet = groups("leaf_level", stream=object())
    with pytest.raises(LoraError, match="leave out use_stream"): apply_lora(unet, lora)
    for kind in ("leaf_level", "block_level"):
        unet = groups(kind, onload_device=torch.device("meta"))            # in place of a GPU
        with pytest.raises(LoraError, match="wear it with mode='merge'") if kind == "leaf_level" else warnings.catch_warnings():
            apply_lora(unet, dora_of(lora, tiny_unet()), mode="inject")
        remove_lora(unet); apply_lora(unet, lora, mode="inject")
        assert {m.lora_up.weight.device.type for m in unet.modules() if isinstance(m, LoraLayer)} == {"meta"}


# Strengths

BAD = [float("nan"), float("inf"), -float("inf"), "loud", None, 1e39]

@pytest.mark.parametrize("odd", ["unett", "te", "nonsense", "down_blocks.0"])
def test_strengths_of_nothing_are_refused(lora, odd):
    unet = tiny_unet(); bits = fingerprint(unet)
    for mode in ("merge", "inject"):
        with pytest.raises(LoraError, match=f"'{odd}' is no component of this model: expected unet"): apply_lora(unet, lora, {odd: 0.}, mode)
    assert fingerprint(unet) == bits

@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_strength_is_a_number(lora, bad):
    unet = tiny_unet(); bits = fingerprint(unet)
    for mode in ("merge", "inject"):
        for s in (bad, {"unet": bad}):
            with pytest.raises(LoraError, match="finite number"): apply_lora(unet, lora, s, mode)
        apply_lora(unet, lora, mode=mode); on = answer(unet)
        for s in (bad, {"unet": bad}, {"down_blocks": bad}):
            with pytest.raises(LoraError, match="finite number"): set_scale(unet, s)
        assert torch.equal(answer(unet), on)
        remove_lora(unet)
    handle = inject_lora(unet)
    with pytest.raises(LoraError, match="finite number"): handle.set_scale(bad)
    handle.remove()
    if bad is not None:
        with pytest.raises(LoraError, match="finite number"): inject_lora(unet, alpha=bad)
    assert fingerprint(unet) == bits


@pytest.mark.parametrize("alpha", [float("nan"), float("1e999")])
def test_an_alpha_is_a_number(lora, alpha):
    from dataclasses import replace
    unet = tiny_unet(); bits = fingerprint(unet); n = list(lora.layers)[3]
    bad = Lora({**lora.layers, n: replace(lora.layers[n], alpha=alpha)})
    for mode in ("merge", "inject"):
        with pytest.raises(LoraError, match=f"alpha of {n}"): apply_lora(unet, bad, mode=mode)
    with pytest.raises(LoraError, match="alpha of"), scheduled(unet, {bad: 1}): pass
    assert fingerprint(unet) == bits


@pytest.mark.parametrize("mode", ["merge", "inject"])
def test_half_precision_never_gets_infinities(lora, mode):
    unet = tiny_unet().half(); bits = fingerprint(unet)
    with pytest.raises(LoraError, match="choose a lower strength"): apply_lora(unet, lora, 1e6, mode)
    apply_lora(unet, lora, mode=mode); on = answer(unet.float()); unet.half()
    with pytest.raises(LoraError, match="choose a lower strength"): set_scale(unet, 1e6)
    assert torch.equal(answer(unet.float()), on)
    remove_lora(unet.half())
    assert fingerprint(unet) == bits


def test_nor_does_a_schedule(lora):
    unet = tiny_unet().half(); bits = fingerprint(unet)
    with pytest.raises(LoraError, match="would hold NaN or infinity"), scheduled(unet, {lora: 1e6}): answer(unet)
    assert fingerprint(unet) == bits and bool(torch.isfinite(answer(unet.float())).all())


# Layouts, ties, other code

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_channels_last(lora, dtype):
    plain, unet = tiny_unet().to(dtype), tiny_unet().to(dtype).to(memory_format=torch.channels_last)
    bits, strides = fingerprint(unet), [p.stride() for p in unet.parameters()]
    for lora_ in (lora, dora_of(lora, tiny_unet())):
        apply_lora(unet, lora_); apply_lora(plain, lora_)
        assert fingerprint(unet) == fingerprint(plain) and [p.stride() for p in unet.parameters()] == strides
        remove_lora(unet); remove_lora(plain)
    with scheduled(unet, {lora: 1.}): answer(unet)
    assert fingerprint(unet) == bits and [p.stride() for p in unet.parameters()] == strides


class Tied(nn.Module):
    "A token table that is also the last layer, and two layers that share a weight"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.head.weight, self.b.weight = self.table.weight, self.a.weight
    def forward(self, ids): return self.head(self.b(self.a(self.table(ids)))).detach()

@pytest.mark.parametrize("names", [["a"], ["b"], ["a", "b"], ["head"], ["a", "b", "head"]], ids=str)
def test_tied_weights_are_merged_as_branches_are_worn(names):
    net, ids = Tied(), torch.arange(9); fresh, params = net(ids), [id(p) for p in net.parameters()]
    lora = Lora({f"unet.{n}": Factors(torch.randn(9 if n == "head" else 6, 2), torch.randn(2, 6)) for n in names})
    apply_lora(net, lora, mode="inject"); branch = net(ids); remove_lora(net)
    apply_lora(net, lora); merged = net(ids)
    apply_lora(net, lora, .5, name="second"); set_scale(net, .25, "second"); remove_lora(net, "second"); assert close(net(ids), merged)
    twin = copy.deepcopy(net); remove_lora(twin); assert torch.equal(twin(ids), fresh) and twin.head.weight is twin.table.weight
    remove_lora(net)
    assert close(merged, branch, 1e-4) and torch.equal(net(ids), fresh)
    assert [id(p) for p in net.parameters()] == params and net.head.weight is net.table.weight and net.a.weight is net.b.weight


def test_one_module_in_two_places():
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)); net[1] = net[0]
    one = Factors(torch.randn(6, 1), torch.randn(1, 6))
    with pytest.raises(LoraError, match="one and the same module"): apply_lora(net, Lora({"unet.0": one, "unet.1": one}))
    assert not adapters(net)


@pytest.mark.parametrize("assign", [False, True])
def test_weights_loaded_while_it_was_merged_stay(lora, assign):
    unet, new = tiny_unet(), tiny_unet(3)
    apply_lora(unet, lora); unet.load_state_dict(copy.deepcopy(new.state_dict()), assign=assign)
    with pytest.raises(LoraError, match="written over while lora was merged"): set_scale(unet, .5)
    with pytest.raises(LoraError, match="loaded, trained, replaced or written over"): apply_lora(unet, lora, name="again")
    with pytest.warns(UserWarning, match="They stay as they are"): remove_lora(unet)
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), new.parameters())) and not adapters(unet)
    apply_lora(unet, lora); remove_lora(unet)
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), new.parameters()))


def test_what_changed_no_number_is_undone(lora):
    unet = tiny_unet(); bits = fingerprint(unet)
    apply_lora(unet, lora)
    unet.load_state_dict(copy.deepcopy(unet.state_dict()))               # the same numbers
    twin = copy.deepcopy(unet)
    with warnings.catch_warnings(action="error"): remove_lora(unet); remove_lora(twin)
    assert fingerprint(unet) == fingerprint(twin) == bits
    unet.half(); bits = fingerprint(unet); apply_lora(unet, lora); unet.float().half()
    with warnings.catch_warnings(action="error"): remove_lora(unet)
    assert fingerprint(unet) == bits


# Twice, lists

@pytest.mark.parametrize("mode", ["merge", "inject"])
def test_a_cell_that_runs_twice_puts_it_on_once(lora, want, mode, tmp_path):
    pipe = tiny_pipe(); unet = pipe.unet; words = {"<toy>": {"text_encoder": torch.randn(2, 24)}}
    full = Lora(lora.layers, words); file = tmp_path / "toy.safetensors"; full.save(file)
    names = [apply_lora(pipe, full, mode=mode)]
    for again in (full, Lora(dict(full.layers), words), file):
        with pytest.warns(UserWarning, match="worn once"): names.append(apply_lora(pipe, again, mode=mode))
    assert {*names} == {"lora"} == {*adapters(pipe)} and close(answer(unet), want)
    with warnings.catch_warnings(action="error"):
        assert apply_lora(pipe, full, .5, mode, "lora") == "lora"                                # asked for by name
    half = answer(unet)
    with pytest.warns(UserWarning): apply_lora(pipe, full, .5, mode={"merge": "inject", "inject": "merge"}[mode])
    assert close(answer(unet), half) and set(adapters(pipe).values()) == {"inject" if mode == "merge" else "merge"}
    with pytest.raises(LoraError, match="another LoRA named 'lora'"): apply_lora(unet, random_lora(tiny_unet(), seed=9), name="lora")
    remove_lora(pipe)
    apply_lora(unet, lora, .5, mode); apply_lora(unet, lora, .5, mode, name="twice"); assert close(answer(unet), want)   # by intent
    remove_lora(unet)


def test_others_of_the_same_shape_add_up(lora):
    unet, other = tiny_unet(), random_lora(tiny_unet(), "extended", seed=5)
    with warnings.catch_warnings(action="error"):
        assert [apply_lora(unet, l) for l in (lora, other, lora.scaled(.5))] == ["lora", "lora_2", "lora_3"]


def test_a_schedule_takes_a_list(lora, want):
    unet, other = tiny_unet(), random_lora(tiny_unet(), seed=2); fresh = answer(unet)
    with scheduled(unet, [lora]): assert close(answer(unet), want)
    with scheduled(unet, lora): assert close(answer(unet), want)
    with scheduled(unet, {lora: 1, other: 1}): both = answer(unet)
    with scheduled(unet, [lora, other]) as handle: assert torch.equal(answer(unet), both)
    assert torch.equal(answer(unet), fresh) and len(handle.loras) == 2
    for wrong, says in (([(lora, .5)], "expected {lora: schedule}"), ([], "no LoRAs"), ([lora, lora], "listed twice")):
        with pytest.raises(LoraError, match=says), scheduled(unet, wrong): pass


# Borrowing, threads, memory

@pytest.mark.parametrize("kind", ["lines", "calls"])
def test_a_borrowed_base_comes_back(lora, kind):
    pipe, n = tiny_pipe(), [0]; pipe.unet = nn.Sequential(nn.Linear(6, 6)); bits = fingerprint(pipe.unet)
    one = Lora({"unet.0": Factors(torch.randn(6, 2), torch.randn(2, 6))})
    def merge():
        with borrowed(pipe, [one, one], [1., .5]): n[0] += fingerprint(pipe.unet) != bits
    late = 0
    for k in injections(kind, merge, lambda: None, 7 if kind == "lines" else 2):
        late += fingerprint(pipe.unet) != bits
        remove_lora(pipe)
        assert fingerprint(pipe.unet) == bits, k
    assert late <= 4 and n[0] > 2 and not adapters(pipe)


@pytest.mark.parametrize("mode", ["merge", "inject"])
def test_threads(mode):
    pipe, errors = tiny_pipe(), []; bits, vocabulary = fingerprint(pipe.unet), pipe.tokenizer.get_vocab()
    loras = [random_lora(pipe.unet, seed=i) for i in range(4)]
    loras = [Lora(l.layers, {f"<w{i}>": {"text_encoder": torch.randn(1, 24)}}) for i, l in enumerate(loras)]
    def work(i):
        try:
            for n in range(5):
                apply_lora(pipe, loras[i], mode=mode, name=f"l{i}")
                set_scale(pipe, .5, f"l{i}")
                remove_lora(pipe, f"l{i}")
        except BaseException as e: errors.append(e)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join(60)
    assert not errors and fingerprint(pipe.unet) == bits and pipe.tokenizer.get_vocab() == vocabulary and not adapters(pipe)


def test_a_thread_that_waits_is_let_in_after_an_error(lora):
    unet, seen = tiny_unet(), []
    with pytest.raises(LoraError): apply_lora(unet, lora, float("nan"))
    t = threading.Thread(target=lambda: seen.append(apply_lora(unet, lora))); t.start(); t.join(10)
    assert seen == ["lora"]


def test_writing_a_file_leaves_the_umask_alone(tmp_path):
    masks, done = set(), []
    def look():
        n = 0
        while not done: n += 1; f = tmp_path / f"other-{n}"; f.touch(); masks.add(f.stat().st_mode & 0o777); f.unlink()
    was = os.umask(0o077)
    try:
        t = threading.Thread(target=look); t.start()
        for i in range(50):
            with atomic_path(tmp_path / "file.txt") as tmp: tmp.write_text("x")
        done.append(1); t.join()
        assert masks == {0o600} and (tmp_path / "file.txt").stat().st_mode & 0o777 == 0o600
    finally: done.append(1); os.umask(was)
    with atomic_path(tmp_path / "open.txt") as tmp: tmp.write_text("x")
    assert (tmp_path / "open.txt").stat().st_mode & 0o777 == 0o666 & ~was and not list(tmp_path.glob("*.mode"))


def test_the_cache_fits_the_model_and_is_given_back(lora):
    unet = tiny_unet(); adapted = sum(places(unet)[n[5:]].module.weight.nbytes for n in lora.layers)
    with scheduled(unet, {lora: LoraSchedule({0: 0., 1: 1.})}) as handle:
        answer(unet)
        assert 0 < handle.cache.budget <= 64 * adapted and handle.cache.bytes > 0
        assert handle.sites
    assert handle.cache.bytes == handle.stats.bytes == 0 and not handle.sites and handle.room is None and not handle.cache.free
    with scheduled(unet, {lora: 1}, budget=7) as handle: assert handle.cache.budget == 7


def test_the_time_to_put_on_many_grows_with_their_number():
    unet = tiny_unet(); loras = [random_lora(unet, seed=i) for i in range(40)]
    took = []
    for l in loras:
        start = time.perf_counter(); apply_lora(unet, l, .01); took.append(time.perf_counter() - start)
    exact = {n: p.module.weight.detach().double() for n, p in places(tiny_unet()).items()}
    for l in loras:
        for n, f in l.layers.items(): exact[n[5:]] = exact[n[5:]] + .01 * f.delta().double()
    assert all(torch.allclose(p.module.weight.double(), exact[n], atol=1e-5) for n, p in places(unet).items())
    assert sorted(took[-9:])[4] < 12 * sorted(took[:9])[4]                # a ninth part of what one by one takes


# Written over while it is worn, without a trace in the tensor

def _swap(p, new): p.data = new.data.clone()
def _ema(p, new): p.data.copy_(new.data)
def _one(p, new): p.data.view(-1)[-1] += 1e-3
def _add(p, new): p.data.add_(1e-6 * torch.randn(p.shape))

@pytest.mark.parametrize("write", [_swap, _ema, _one, _add])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_written_through_data_stay(lora, write, dtype):
    unet, new = tiny_unet().to(dtype), tiny_unet(3).to(dtype)
    apply_lora(unet, lora)
    path = next(iter(lora.layers)).partition(".")[2]
    layer, other = unet.get_submodule(path), new.get_submodule(path)
    bits = layer.weight.detach().clone()
    write(layer.weight, other.weight)
    if torch.equal(bits, layer.weight): return                              # bf16 rounds so little away
    written, rest = layer.weight.detach().clone(), {n: p.clone() for n, p in tiny_unet().to(dtype).named_parameters()}
    with pytest.raises(LoraError, match="written over while lora was merged"): set_scale(unet, .5)
    with pytest.warns(UserWarning, match=r"1 weights .*They stay as they are"): remove_lora(unet)
    assert torch.equal(layer.weight, written) and not adapters(unet)
    assert all(torch.equal(p, rest[n]) for n, p in unet.named_parameters() if n != f"{path}.weight")

def test_an_average_copied_into_the_model_stays(lora):
    from diffusers.training_utils import EMAModel
    unet, new = tiny_unet(), tiny_unet(3)
    apply_lora(unet, lora); EMAModel(new.parameters()).copy_to(unet.parameters())
    with pytest.warns(UserWarning, match="They stay as they are"): remove_lora(unet)
    assert fingerprint(unet) == fingerprint(new)

@pytest.mark.parametrize("trip", [lambda m: m.to(memory_format=torch.channels_last), lambda m: m.half().float(), lambda m: m.bfloat16().float(),
                                  lambda m: m.double().float(), lambda m: m.double(), lambda m: m.half(), lambda m: m.bfloat16()])
def test_a_model_that_only_moved_is_unmerged(lora, trip):
    unet, twin = tiny_unet(), tiny_unet()
    apply_lora(unet, lora); trip(unet); trip(twin)
    set_scale(unet, .5)
    with warnings.catch_warnings(action="error"): remove_lora(unet)
    assert all(torch.equal(p, places(tiny_unet().to(p.dtype))[n[5:]].module.weight) for n in lora.layers
               for p in [places(unet)[n[5:]].module.weight])

def test_a_split_weight_written_over_stays():
    unet = tiny_unet()
    run = inject_lora(unet, init="pissa")
    layer = next(iter(run.layers.values()))
    layer.linear.weight.data.add_(.1); written = layer.linear.weight.detach().clone()
    with pytest.warns(UserWarning, match="stays as it is"): run.remove()
    assert torch.equal(layer.linear.weight, written)

@pytest.mark.parametrize("more", [False, True])
def test_a_token_table_written_over_stays(more):
    pipe = tiny_pipe()
    table = lambda: pipe.text_encoder.get_input_embeddings().weight
    words = lambda t: Lora({}, {t: {"text_encoder": torch.randn(1, table().shape[1])}})
    want, vocabulary = table().detach().clone(), pipe.tokenizer.get_vocab()
    want[3] += 1
    apply_lora(pipe, words("<a>")); table().data[3] += 1
    if more: apply_lora(pipe, words("<b>"), name="b")
    else:
        with pytest.warns(UserWarning, match="1 rows of the token table"): remove_lora(pipe, "lora")
    remove_lora(pipe)
    assert torch.equal(table(), want) and pipe.tokenizer.get_vocab() == vocabulary


# LoRAs that diffusers or peft put on

def lora_for(pipe, targets="attention"): return random_lora(pipe.unet, targets)

def wear_theirs(pipe, lora, folder):
    lora.save(folder / "a.safetensors")
    pipe.load_lora_weights(str(folder), weight_name="a.safetensors")

SAYS = r"\d+ layers of unet wear an adapter that diffusers or peft put on \(default_0\).*unload_lora_weights"

@pytest.mark.parametrize("what", ["save", "single", "merge", "apply", "inject", "extract", "set", "set by name", "remove by name", "scheduled",
                                  "scheduled by name", "mixture", "train"])
def test_every_way_in_names_their_adapters(what, tmp_path):
    pipe = random_pipe("sd"); lora = lora_for(pipe); wear_theirs(pipe, lora, tmp_path)
    calls = dict(save=lambda: save_checkpoint(pipe, tmp_path / "o"),
                 single=lambda: save_checkpoint(pipe, tmp_path / "o.safetensors", "single_file"),
                 merge=lambda: merge_checkpoint(pipe, lora, tmp_path / "o"), apply=lambda: apply_lora(pipe, lora),
                 inject=lambda: apply_lora(pipe, lora, mode="inject"), extract=lambda: extract_lora(pipe), set=lambda: set_scale(pipe, .5),
                 mixture=lambda: Mixture(pipe, [lora]), train=lambda: inject_lora(pipe), scheduled=lambda: scheduled(pipe, lora).__enter__())
    calls |= {"set by name": lambda: set_scale(pipe, .5, "default_0"), "remove by name": lambda: remove_lora(pipe, "default_0"),
              "scheduled by name": lambda: scheduled(pipe, "default_0").__enter__()}
    with pytest.raises(LoraError, match=SAYS): calls[what]()
    assert [*tmp_path.iterdir()] == [tmp_path / "a.safetensors"]


def test_theirs_in_a_report_and_at_removal(tmp_path):
    pipe = random_pipe("sd"); lora = lora_for(pipe); wear_theirs(pipe, lora, tmp_path)
    report = lora.report(pipe)
    assert report.ok and any("diffusers or peft" in s for s in report.advice)
    with pytest.warns(UserWarning, match=SAYS): remove_lora(pipe)

@pytest.mark.parametrize("order", ["ours first off", "theirs first off"])
def test_theirs_on_top_of_a_merged_one(order, tmp_path):
    pipe = random_pipe("sd"); lora = lora_for(pipe, "extended")
    bits = {n: p.detach().clone() for n, p in pipe.unet.named_parameters()}
    apply_lora(pipe, lora); wear_theirs(pipe, lora_for(pipe), tmp_path)
    set_scale(pipe, .5); assert len(extract_lora(pipe)) == len(lora)
    if order == "theirs first off": pipe.unload_lora_weights()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*diffusers or peft")
        remove_lora(pipe)
    if order != "theirs first off": pipe.unload_lora_weights()
    now = dict(pipe.unet.named_parameters())
    assert now.keys() == bits.keys() and all(torch.equal(now[n], b) for n, b in bits.items())

def test_theirs_fused_into_a_merged_one_stays(tmp_path):
    pipe = random_pipe("sd"); lora = lora_for(pipe)
    apply_lora(pipe, lora); wear_theirs(pipe, lora_for(pipe), tmp_path); pipe.fuse_lora()
    pipe.unload_lora_weights(); bits = fingerprint(pipe.unet)
    with pytest.raises(LoraError, match="written over while lora was merged"): set_scale(pipe, .5)
    with pytest.warns(UserWarning, match="They stay as they are"): remove_lora(pipe)
    assert fingerprint(pipe.unet) == bits

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_theirs_fused_and_unfused_again_is_forgiven(dtype, tmp_path):
    "Adding and subtracting rounds: our LoRA comes off to the bit all the same, and never while theirs is fused"
    pipe = random_pipe("sd"); pipe.unet.to(dtype); lora = lora_for(pipe)
    bits = {n: p.detach().clone() for n, p in pipe.unet.named_parameters()}
    name = apply_lora(pipe, lora); wear_theirs(pipe, lora_for(pipe), tmp_path); pipe.fuse_lora()
    for change in (lambda: remove_lora(pipe), lambda: set_scale(pipe, .5)):
        with warnings.catch_warnings(), pytest.raises(LoraError, match=r"has fused default_0 .* call pipe.unfuse_lora\(\) first"):
            warnings.simplefilter("ignore")
            change()
    pipe.unfuse_lora()
    assert adapters(pipe) == {name: "merge"}
    set_scale(pipe, .5); set_scale(pipe, 1.)
    if dtype == torch.float32: pipe.unload_lora_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*diffusers or peft")
        remove_lora(pipe)
    if dtype != torch.float32: pipe.unload_lora_weights()
    assert all(torch.equal(p, bits[n]) for n, p in pipe.unet.named_parameters())

def test_diffusers_refuses_our_branches_with_our_advice(tmp_path):
    pipe = random_pipe("sd"); lora = lora_for(pipe); bits = fingerprint(pipe.unet)
    apply_lora(pipe, lora, mode="inject", name="mine")
    with pytest.raises(ValueError, match=r"adapter='mine'.*put on by lora_nb: remove_lora\(pipe\) takes it off"): wear_theirs(pipe, lora,
                                                                                                                              tmp_path)
    remove_lora(pipe); assert fingerprint(pipe.unet) == bits
    wear_theirs(pipe, lora, tmp_path)

def test_a_layer_that_is_gone(lora):
    unet = tiny_unet(); apply_lora(unet, lora)
    unet.mid_block.resnets[0].conv1 = nn.Identity()
    with pytest.raises(LoraError, match=r"1 weights \(mid_block.resnets.0.conv1\) were .*replaced"): set_scale(unet, .5)
    with pytest.warns(UserWarning, match="1 weights"): remove_lora(unet)
    assert not adapters(unet)

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_theirs_fused_and_unfused_in_half_precision_and_unloaded_is_explained(dtype, tmp_path):
    "Rounding and a small training step cannot be told apart: an error that says so, and following it brings every bit back"
    pipe = random_pipe("sd"); pipe.unet.to(dtype); lora = lora_for(pipe)
    bits = {n: p.detach().clone() for n, p in pipe.unet.named_parameters()}
    apply_lora(pipe, lora); wear_theirs(pipe, lora_for(pipe), tmp_path); pipe.fuse_lora(); pipe.unfuse_lora(); pipe.unload_lora_weights()
    with pytest.raises(LoraError, match=r"differ by rounding only, .*unfuse_lora.*load that adapter again"): set_scale(pipe, .5)
    pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error"); warnings.filterwarnings("ignore", message=".*diffusers or peft")
        remove_lora(pipe)
    pipe.unload_lora_weights()
    assert all(torch.equal(p, bits[n]) for n, p in pipe.unet.named_parameters())
    apply_lora(pipe, lora); pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.data.mul_(2)
    with pytest.raises(LoraError) as e: set_scale(pipe, .5)
    assert "rounding" not in str(e.value)

def test_a_convolution_of_one_pixel_read_as_a_linear_layer_says_what_to_do(tmp_path):
    from safetensors.torch import save_file
    pipe, g = random_pipe("sd"), torch.Generator().manual_seed(0)
    path, key = "down_blocks.0.attentions.0.proj_in", "lora_unet_down_blocks_0_attentions_0_proj_in"
    w = pipe.unet.get_submodule(path).weight; before = w.detach().clone()
    r = lambda *s: torch.randn(*s, generator=g)
    a = {f"hada_w{i}_{x}": r(len(w), 2) if x == "a" else r(2, w.shape[1]) for i in (1, 2) for x in "ab"}
    save_file({f"{key}.{k}": t for k, t in a.items()}, tmp_path / "a.safetensors")
    with pytest.raises(LoraError, match=r"1 of 1 layers .*1x1 convolutions.*Lora.load\(path, base=pipe\)"):
        apply_lora(pipe, Lora.load(tmp_path / "a.safetensors"))
    apply_lora(pipe, Lora.load(tmp_path / "a.safetensors", base=pipe))
    want = before + ((a["hada_w1_a"] @ a["hada_w1_b"]) * (a["hada_w2_a"] @ a["hada_w2_b"])).view_as(before)
    assert torch.allclose(w, want, atol=1e-5)

def test_a_mixture_says_what_it_cannot_wear():
    from lora_nb.kinds import Difference
    unet = tiny_unet(); lora = random_lora(unet)
    bias = Lora({**lora.layers, "unet.conv_in.bias": Difference(dict(diff=torch.ones(16)), (16,))})
    with pytest.raises(LoraError, match=r"1 changes of norms and biases \(unet.conv_in.bias\).*apply_lora\(mode='merge'\)"): Mixture(unet, [bias])
    with pytest.raises(LoraError, match=r"1 layers \(unet.nowhere\) are not in this model"):
        Mixture(unet, [Lora({"unet.nowhere": next(iter(lora.layers.values()))})])
    apply_lora(unet, lora, mode="inject")
    with pytest.raises(LoraError, match=r"wear a LoRA as branches already: take it off with remove_lora"): Mixture(unet, [lora])
