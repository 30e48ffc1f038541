"Whatever is interrupted, nothing is lost: the bits of the base come back."
import contextlib, signal, sys, time

import pytest
import torch
from helpers_faults import FILES, Stop, _Calls, _Lines, injections
from helpers_ground import fingerprint, random_lora, tiny_clip, tiny_pipe
from torch import nn

from lora_nb.injection import apply_lora, inject_lora, remove_lora, set_scale
from lora_nb.lora import Factors, Lora
from lora_nb.schedule import ramp
from lora_nb.scheduling import scheduled
from lora_nb.worn import adapters, branches, worn_state

KINDS = ["lines", "calls", "after calls"]


class Net(nn.Module):
    "Few layers, so that an exception at every line takes seconds"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Conv2d(4, 6, 3), nn.Linear(6, 4)

class Pipe:
    def __init__(self):
        torch.manual_seed(0)
        self.unet, (self.text_encoder, self.tokenizer) = Net(), tiny_clip()

def state(pipe):
    "Bits, modules, storage, attributes, vocabulary: everything that must be as before"
    own = lambda m: {k for k in m.__dict__ if k != "_lora_worn"}
    return [(n, type(m).__name__, own(m)) for x in (pipe.unet, pipe.text_encoder) for n, m in x.named_modules()], \
        [fingerprint(x) for x in (pipe.unet, pipe.text_encoder)], sorted(pipe.tokenizer.get_vocab().items()), \
        [p.data_ptr() for p in pipe.unet.parameters()], pipe.text_encoder.config.vocab_size

def small_lora(seed=0, words=True):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g)
    layers = {"unet.a": Factors(r(6, 2), r(2, 6)), "unet.b": Factors(r(6, 2, 1, 1), r(2, 4, 3, 3), 1.),
              "unet.c": Factors(r(4, 1), r(1, 6)), "text_encoder.encoder.layers.0.self_attn.q_proj": Factors(r(24, 2), r(2, 24))}
    return Lora(layers, {f"<w{seed}>": {"text_encoder": r(2, 24)}} if words else {})

@pytest.fixture
def pipe(): return Pipe()

def undone(kind, act, reset, look, step=1):
    """Interrupt `act` everywhere: it must have changed nothing, or (in the few lines after its last step, where locks are released)
    everything. Returns how many places were tried"""
    reset(); before = look()
    act(); after = look()
    assert before != after
    places, late = 0, 0
    for k in injections(kind, act, reset, 3 * step if kind == "lines" else step):
        now = look()
        assert now in (before, after), f"half a change, interrupted at {k}"
        late += now == after
        places += 1
    assert look() == after and late <= 12 and places > 3
    return places

def wearing(pipe):
    "What is worn, and all bits"
    return state(pipe)[:3], adapters(pipe), [(m.scale, m._gain_tensor.item()) for s in branches(pipe).values() for m in s]

def off(pipe, name): return lambda: name in adapters(pipe) and remove_lora(pipe, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["merge", "inject"])
def test_an_interrupted_apply_changed_nothing(pipe, mode, kind):
    fresh = state(pipe)
    apply_lora(pipe, small_lora(1), mode="merge", name="before")
    lora = small_lora()
    assert undone(kind, lambda: apply_lora(pipe, lora, mode=mode, name="x"), off(pipe, "x"), lambda: wearing(pipe)) > 15
    remove_lora(pipe)
    assert state(pipe) == fresh


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["merge", "inject"])
def test_an_interrupted_removal_can_be_called_again(pipe, mode, kind):
    fresh, a, b = state(pipe), small_lora(), small_lora(1)
    apply_lora(pipe, a, name="a"); alone = wearing(pipe)
    def both(): "b" in adapters(pipe) or apply_lora(pipe, b, .5, mode, name="b")
    assert undone(kind, lambda: remove_lora(pipe, "b"), both, lambda: wearing(pipe)) > 15
    for k in injections(kind, lambda: remove_lora(pipe, "b"), both, 5):
        off(pipe, "b")()
        assert wearing(pipe) == alone, k
    for k in injections(kind, lambda: remove_lora(pipe), lambda: adapters(pipe) or apply_lora(pipe, a, mode=mode), 3):
        remove_lora(pipe)
        assert state(pipe) == fresh, k


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["merge", "inject"])
def test_an_interrupted_change_of_strength(pipe, mode, kind):
    fresh = state(pipe); apply_lora(pipe, small_lora(), mode=mode)
    look = lambda: (wearing(pipe), [s for m in (pipe.unet, pipe.text_encoder) for _, s in worn_state(m).merged.values()])
    undone(kind, lambda: set_scale(pipe, .25), lambda: set_scale(pipe, 1.), look)
    remove_lora(pipe)
    assert state(pipe) == fresh


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["gaussian", "pissa"])
def test_an_interrupted_injection_changed_nothing(pipe, init, kind):
    fresh = state(pipe)
    def inject():
        torch.manual_seed(0)
        inject_lora(pipe, {"unet": ["a", "b", "c"], "text_encoder": ["layers.0.self_attn.q_proj"]}, 2, init=init)
    assert undone(kind, inject, lambda: remove_lora(pipe), lambda: wearing(pipe), 2) > 15
    for k in injections(kind, lambda: remove_lora(pipe), lambda: adapters(pipe) or inject(), 2):
        remove_lora(pipe)
        assert state(pipe) == fresh, k


@pytest.mark.parametrize("then", [2, 5, 9, 14])
def test_interrupted_again_while_it_is_taken_back(pipe, then):
    fresh, lora = state(pipe), small_lora()
    for act, ready in ((lambda: apply_lora(pipe, lora, name="x"), lambda: None),
                       (lambda: remove_lora(pipe), lambda: adapters(pipe) or apply_lora(pipe, lora, name="x"))):
        for k in range(20, 400, 13):
            ready()
            n = [0]
            def trace(frame, event, arg):
                if not frame.f_code.co_filename.endswith(FILES): return None
                if event == "line":
                    n[0] += 1
                    if n[0] in (k, k + then, k + then + 3): sys.settrace(trace); raise Stop
                return trace
            class Again:                                                  # a trace function that raised is forgotten by Python
                def __enter__(self): sys.settrace(trace)
                def __exit__(self, *e): sys.settrace(None)
            with contextlib.suppress(Stop), Again(): act()
            if n[0] < k: break
            remove_lora(pipe)
            assert state(pipe) == fresh, k


def test_a_roll_back_that_fails_is_done_by_the_next_call(pipe, monkeypatch):
    import lora_nb.worn as worn
    was, put, n = state(pipe), worn.store_weight, [0]
    def fails(root, weight):
        n[0] += 1
        if n[0] >= 2: raise MemoryError
        put(root, weight)
    monkeypatch.setattr(worn, "store_weight", fails)
    with pytest.raises(MemoryError): apply_lora(pipe, small_lora(), name="x")
    monkeypatch.setattr(worn, "store_weight", put)
    assert state(pipe) != was                                             # it could not be taken back
    remove_lora(pipe)                                                     # now it can
    assert state(pipe) == was


@pytest.mark.parametrize("mode", ["merge", "inject"])
def test_real_interrupts(mode):
    pipe = tiny_pipe(); lora = random_lora(pipe.unet, "extended")
    lora = Lora(lora.layers, {"<toy>": {"text_encoder": torch.randn(2, 24)}})
    fresh, hits = (fingerprint(pipe.unet), fingerprint(pipe.text_encoder), pipe.tokenizer.get_vocab()), 0
    apply_lora(pipe, lora, mode=mode); remove_lora(pipe)                  # the first time is slower
    start = time.perf_counter(); apply_lora(pipe, lora, mode=mode); remove_lora(pipe); took = time.perf_counter() - start
    for i in range(40):
        handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, took * (i + 1) / 44)
            apply_lora(pipe, lora, mode=mode)
            remove_lora(pipe)
        except KeyboardInterrupt: hits += 1
        finally: signal.setitimer(signal.ITIMER_REAL, 0); signal.signal(signal.SIGALRM, handler)
        remove_lora(pipe)
        assert (fingerprint(pipe.unet), fingerprint(pipe.text_encoder), pipe.tokenizer.get_vocab()) == fresh, i
    assert hits > 10


class Denoiser(Net):
    def forward(self, x, timestep): return self.c(self.a(x))

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("worn", [False, True])
@pytest.mark.parametrize("mode", ["merge", "inject"])
def test_a_schedule_interrupted_anywhere_leaves_the_base_as_it_was(mode, worn, kind):
    "On entering, at a step or on leaving: nothing is left, without another call, and the next schedule works"
    torch.manual_seed(0); net, x = Denoiser(), torch.ones(1, 6)
    a, b = (small_lora(i, words=False).only("unet") for i in (0, 1))
    if worn: apply_lora(net, a, name="a", mode=mode)
    own = lambda m: sorted(k for k in m.__dict__ if k != "_lora_worn")
    look = lambda: ([(n, type(m).__name__, own(m), len(m._forward_pre_hooks)) for n, m in net.named_modules()], fingerprint(net), adapters(net),
                    [p.data_ptr() for p in net.parameters()])
    def act():
        with scheduled(net, {("a" if worn else a): ramp(0, 1), b: .5}, 4096, mode), torch.no_grad():
            return [net(x, t) for t in (900, 500, 100)]
    before, want, k, stopped = look(), act(), 1, 0
    while True:
        trap = _Lines(k, (*FILES, "scheduling.py", "weight_cache.py")) if kind == "lines" else _Calls(k, kind == "after calls")
        try:
            with trap: act()
        except Stop: stopped += 1
        assert look() == before, k
        if trap.n < k: break
        k += 37 if kind == "lines" else 7
    assert stopped > 15 and all(torch.equal(g, w) for g, w in zip(act(), want))

@pytest.mark.parametrize("act", ["apply", "set", "remove"])
def test_another_lora_inside_a_schedule_interrupted_at_sampled_lines(act):
    "It is worn or it is not, the next picture says so, and on leaving every bit is back"
    torch.manual_seed(0); net, x = Denoiser(), torch.ones(1, 6)
    a, b, c = (small_lora(i, words=False).only("unet") for i in range(3))
    bits, k, tried = (fingerprint(net), [p.data_ptr() for p in net.parameters()]), 1, 0
    apply_lora(net, c, name="c"); before = fingerprint(net), adapters(net)
    def picture(*more):
        with scheduled(net, {a: .5, **dict.fromkeys(more, .3)}), torch.no_grad(): return net(x, 500)
    want = {False: picture(), True: picture(b)}
    while True:
        trap = _Lines(k, (*FILES, "scheduling.py", "weight_cache.py"))
        with scheduled(net, {a: .5}, 4096), torch.no_grad():
            net(x, 500)
            if act != "apply": apply_lora(net, b, .3, name="b"); net(x, 400)
            with contextlib.suppress(Stop), trap:
                {"apply": lambda: apply_lora(net, b, .3, name="b"), "set": lambda: set_scale(net, .6, "b"),
                 "remove": lambda: remove_lora(net, "b")}[act]()
            on, tried = "b" in adapters(net), tried + 1
            if act == "set": set_scale(net, .3, "b")
            assert torch.allclose(net(x, 500), want[on], atol=1e-4), k
            if on: remove_lora(net, "b")
            assert torch.allclose(net(x, 300), want[False], atol=1e-4), k
        assert (fingerprint(net), adapters(net)) == before, k
        if trap.n < k: break
        k += 31
    remove_lora(net)
    assert tried > 15 and (fingerprint(net), [p.data_ptr() for p in net.parameters()]) == bits
