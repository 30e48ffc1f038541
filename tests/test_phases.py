"Encode first, then free: batches that fit, where each network is, what encoders remember. A recorder plays the card."
import functools, gc, os, warnings, weakref
from contextlib import nullcontext

import pytest
import torch
from PIL import Image

from lora_nb.core import LoraError
from lora_nb.families import as_base
from lora_nb.phases import Placement, Remembered, TextCache, encode_fitting, encoders_digest, fitting, frugal_vae, send, table_of
from lora_nb.random_pipes import random_pipe


def full(): return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.fixture
def limited(monkeypatch):
    def make(family, most):
        base = as_base(random_pipe(family)); sizes = []
        kind, own = type(base.pipe), type(base.pipe).__call__
        @functools.wraps(own)
        def call(self, *args, **kw):
            sizes.append(len(kw["prompt"]))
            if len(kw["prompt"]) > most: raise full()
            return own(self, *args, **kw)
        monkeypatch.setattr(kind, "__call__", call)
        return base, sizes
    return make


@pytest.mark.parametrize("family", ("sd", "sd3"))
def test_drawing_halves_and_goes_on(family, limited):
    base, sizes = limited(family, 2)
    with pytest.warns(UserWarning, match="going on with"): images = base.generate(["a"] * 5, seeds=range(5), steps=1, batch_size=5)
    assert sizes == [5, 2, 2, 1] and len(images) == 5
    alone = base.generate("a", seeds=3, steps=1)[0]
    assert max(abs(a - b) for a, b in zip(alone.tobytes(), images[3].tobytes())) <= 3


def test_drawing_that_never_fits_says_so_after_tiles(limited):
    base, sizes = limited("sd", 0)
    with pytest.raises(LoraError, match="one picture of 64 x 64"), warnings.catch_warnings():
        warnings.simplefilter("ignore"); base.generate(["a"] * 2, steps=1)
    assert sizes == [2, 1, 1]                         # two, one, one in tiles
    assert not base.vae.use_tiling and not base.vae.use_slicing


def test_encoding_halves_and_a_tensor_of_the_failed_try_is_let_go():
    base, sizes, kept = as_base(random_pipe("sd")), [], []
    own = base.encode_images
    class Held: pass
    def encode(x):
        sizes.append(len(x))
        if len(x) > 2:
            held = Held(); kept.append(weakref.ref(held))
            raise full()
        return own(x)
    base.encode_images = encode
    pixels = torch.rand(5, 3, 64, 64)
    def clean_sees():
        gc.collect(); return [k() for k in kept]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore"); z = encode_fitting(base, pixels, 8)
    assert sizes == [5, 2, 2, 1] and torch.allclose(z, own(pixels), atol=1e-4) and clean_sees() == [None]


def test_other_errors_pass():
    def broken(part): raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"): list(fitting([1, 2], 2, broken))


def test_overwriting_takes_batches(limited):
    "Inpainting on a base of other channels used to ignore batch_size"
    from lora_nb.loading import load_base
    base, scene = load_base("tiny-sd", device="cpu"), Image.effect_noise((128, 128), 60).convert("RGB")
    hole = Image.new("L", (128, 128)); hole.paste(255, (16, 16, 96, 96))
    both = base.inpaint([scene] * 2, hole, "a cat", seeds=[1, 2], steps=2)
    each = base.inpaint([scene] * 2, hole, "a cat", seeds=[1, 2], steps=2, batch_size=1)
    assert all(max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes())) <= 3 for a, b in zip(both, each))


# --- encoders that remember ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", ("sd", "sdxl", "sd3"))
def test_drawing_with_encoders_that_may_not_run(family):
    base = as_base(random_pipe(family))
    ask = dict(prompts=["a cat", "a dog"], seeds=[0, 1], steps=2, guidance_scale=3.)
    before = base.generate(**ask)
    place = Placement(base); place.remember()
    base.encode_prompts(["a cat", "a dog", ""])
    def refuse(*args, **kw): raise AssertionError("an encoder ran")
    for m in place.memories.values(): m.own = refuse
    after = base.generate(**ask)
    assert all(max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes())) <= 2 for a, b in zip(before, after))
    for m in place.memories.values(): m.take_off()


def test_what_is_remembered_is_bounded():
    base = as_base(random_pipe("sd"))
    memory = Remembered(base.pipe.text_encoder, "cpu", nullcontext, most=60_000); memory.put_on()
    for i in range(12): base.encode_prompts([f"a cat {i}"])
    assert 0 < len(memory.rows) < 12 and memory.bytes <= 60_000
    memory.take_off()


def test_texts_beyond_the_bound_are_on_the_disk_and_not_encoded_again():
    base = as_base(random_pipe("sd3")); asked, own = [], base.encode_prompts
    base.encode_prompts = lambda ps: (asked.extend(ps), own(ps))[1]
    size = sum(own(["a"])[k].nbytes for k in ("prompt_embeds", "pooled"))
    texts = TextCache(base, most=3 * size, near=size)
    first = texts(list("abcdefgh"))
    assert len(texts.seen) <= 3 and texts.bytes <= 3 * size and asked == list("abcdefgh")
    again = texts(list("hgfedcba"))
    assert asked == list("abcdefgh") and again["pooled"].flip(0).equal(first["pooled"])
    folder = texts._file("a").parent; assert folder.exists()
    del texts; gc.collect(); assert not folder.exists()


def test_texts_are_shared_by_runs_and_never_by_other_encoders(tmp_path):
    asked = []
    def cache(base):
        own = base.encode_prompts
        base.encode_prompts = lambda ps: (asked.extend(ps), own(ps))[1]
        return TextCache(base, folder=tmp_path)
    first = cache(as_base(random_pipe("sd")))(["a cat", "a dog"]); asked.clear()
    again = cache(as_base(random_pipe("sd")))(["a dog"])
    assert not asked and again["prompt_embeds"][0].equal(first["prompt_embeds"][1])
    cache(as_base(random_pipe("sd", seed=1)))(["a dog"]); assert asked == ["a dog"]
    base = as_base(random_pipe("sd")); base.pipe.tokenizer.add_tokens(["<x>"])
    base.pipe.text_encoder.resize_token_embeddings(len(base.pipe.tokenizer))
    one = encoders_digest(base)
    with torch.no_grad(): base.pipe.text_encoder.get_input_embeddings().weight[-1] += 1
    assert one != encoders_digest(base)                                   # the row of one new word
    next(tmp_path.glob("*.safetensors")).write_bytes(b"broken")
    asked.clear(); cache(as_base(random_pipe("sd")))(["a dog", "a cat"]); assert len(asked) <= 1


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's own account of memory")
def test_the_latents_of_five_thousand_large_pictures_stay_on_the_disk():
    "Sparse: only rows that are used are real. 5,000 pictures of 1024 px for SD3.5: 2.6 GB in half precision"
    from lora_nb.dataset import Examples
    from lora_nb.samples import draw_samples
    def anonymous():
        rows = dict(l.split(":", 1) for l in open("/proc/self/smaps_rollup").read().splitlines()[1:])
        return int(rows["Anonymous"].split()[0]) / 1e3
    before = anonymous()
    z = table_of((5000, 1, 16, 128, 128), torch.float16, most=2**28)
    examples = Examples(z, ["a wall"] * 5000)
    z[::100] = 1.
    for micro in range(20):
        rows, sides, _, noise = draw_samples(examples, range(4 * micro, 4 * micro + 4), 0)
        assert examples.take(rows, sides)[0].shape == (4, 16, 128, 128) and len(noise) == 4
    assert z.nbytes > 2.6e9 and anonymous() - before < 200


# --- where networks are -------------------------------------------------------------------------------------------------

class Recorder(Placement):
    "A placement on an imagined card: it writes down where each network would be"
    moves = True
    def __init__(self, base, stay=()):
        super().__init__(base, stay)
        self.where, self.host, self.moved = dict.fromkeys(self.homes, "card"), "host", []
    def _move(self, name, device):
        self.where[name] = "host" if device == "host" else "card"; self.moved.append((name, self.where[name]))


def test_t5_leaves_first_and_all_come_home():
    base = as_base(random_pipe("sd3"))
    place = Recorder(base)
    with place.training(lambda: base.encode_prompts(["a cat"])):
        assert {n for n, w in place.where.items() if w == "card"} == {"transformer"}
        sizes = [sum(p.nbytes for p in base.parts()[n].parameters()) for n, _ in place.moved]
        assert sizes == sorted(sizes, reverse=True) and len(sizes) == 4
        with place.back("vae"): assert place.where["vae"] == "card"
        assert place.where["vae"] == "host"
        base.encode_prompts(["a cat"]); assert place.where["text_encoder_3"] == "host" and len(place.moved) == 6
        base.encode_prompts(["a dog"])                                    # new: each encoder comes and goes
        assert len(place.moved) == 12 and place.where["text_encoder_3"] == "host"
    assert set(place.where.values()) == {"card"} and not place.memories


def test_an_encoder_that_learns_stays():
    base = as_base(random_pipe("sd3"))
    place = Recorder(base, stay=["text_encoder"])
    with place.training(lambda: None, ["text_encoder"]):
        assert place.where["text_encoder"] == "card" and "text_encoder" not in place.memories
        assert place.where["text_encoder_2"] == place.where["text_encoder_3"] == "host"


def test_an_error_in_encoding_leaves_all_as_it_was():
    base = as_base(random_pipe("sd"))
    place = Recorder(base)
    with pytest.raises(ZeroDivisionError):
        with place.training(lambda: 1 / 0): pass
    assert set(place.where.values()) == {"card"} and "forward" not in vars(base.pipe.text_encoder)


def test_diffusers_hooks_are_off_while_training_and_on_again_afterwards():
    "Real hooks of accelerate, with the CPU as the card they know"
    base = as_base(random_pipe("sd3"))
    base.pipe.enable_model_cpu_offload(device="cpu")
    assert hasattr(base.pipe.transformer, "_hf_hook")
    place = Placement(base); place.__class__ = type("Moving", (Placement,), dict(moves=True))
    with place.training(lambda: base.encode_prompts(["a cat"])):
        assert not hasattr(base.pipe.transformer, "_hf_hook") and not hasattr(base.pipe.transformer, "_old_forward")
        assert not hasattr(base.pipe.vae, "_hf_hook")
        base.encode_prompts(["a cat"])
    assert type(base.pipe.transformer._hf_hook).__name__ == "CpuOffload"
    assert base.generate("a cat", steps=1)[0].size == (64, 64)


# --- copies and tables --------------------------------------------------------------------------------------------------

def test_what_is_sent_keeps_its_numbers():
    "The block's views hold what was put in: read on the CPU, where the block is made"
    tensors = [torch.randn(3, 5), torch.arange(7), torch.randn(2).half(), torch.tensor(4.), torch.zeros(0, 3), torch.randn(4, 6).t()]
    class Twice(torch.Tensor): pass
    kept, own = [], torch.Tensor.to
    def to(self, device, *a, **kw):
        if torch.device(device).type == "meta": kept.append(self)
        return own(self, device, *a, **kw)
    torch.Tensor.to = to
    try: sent = send(tensors, "meta")
    finally: torch.Tensor.to = own
    block, = kept
    for t, s in zip(tensors, sent):
        o = s.storage_offset() * s.element_size()
        assert block[o:o + t.nbytes].view(t.dtype).view(t.shape).equal(t) and s.shape == t.shape


def test_a_table_on_disk_has_no_name_and_is_bounded(tmp_path):
    t = table_of((64, 1024), torch.float16, most=1000, folder=tmp_path)
    t.fill_(1.5); assert t.sum() == 1.5 * 64 * 1024
    if os.name != "nt": assert not list(tmp_path.iterdir())
    mapped = lambda: "lora_nb-" in open("/proc/self/maps").read()
    if os.path.exists("/proc/self/maps"):
        assert mapped(); del t; gc.collect(); assert not mapped()


def test_slices_for_large_batches_only():
    vae = random_pipe("sd").vae
    with frugal_vae(vae, 1000): assert not vae.use_slicing
    with pytest.raises(KeyError), frugal_vae(vae, 2**20): assert vae.use_slicing; raise KeyError
    assert not vae.use_slicing


# --- a whole run --------------------------------------------------------------------------------------------------------

def watched(trainer):
    "The trainer on an imagined card; what is on it whenever a network works"
    base = trainer.base
    trainer.place = Recorder(base, trainer._busy())
    seen = []
    def note(name):
        def hook(m, args): seen.append((name, {n for n, w in trainer.place.where.items() if w == "card"}, torch.is_grad_enabled()))
        return hook
    for n, m in base.parts().items(): m.register_forward_pre_hook(note(n))
    for n in ("encode", "decode"):                   # the VAE's doors are not its forward
        own = getattr(base.vae, n)
        def door(*a, own=own, **kw): note("vae")(0, 0); return own(*a, **kw)
        setattr(base.vae, n, door)
    return seen


def trainer_of(family, params=None, **kw):
    from lora_nb.dataset import ConceptDataset, TagWording, encode
    from lora_nb.injection import inject_lora
    from lora_nb.recipe import Recipe
    from lora_nb.samples import Stream
    from lora_nb.training import Trainer
    base = as_base(random_pipe(family))
    data = ConceptDataset([Image.new("RGB", (64, 64), c) for c in ("red", "green")], "red, a wall, old", size=64, tags=TagWording(keep=0))
    torch.manual_seed(0)
    worn = inject_lora(base.pipe, {base.denoiser_name: "attention", **(params or {})}, rank=2)
    streams = [Stream("subject", encode(base, data), 1), Stream("prior", encode(base, data), 1, .5, teacher=True)]
    recipe = Recipe(steps=4, rank=2, preview_every=2, validate_every=2, validation_samples=2, caption_dropout=.3)
    return Trainer(base, worn, streams, recipe, previews=dict(prompts=["a cat", "a dog"], seeds=[0, 1], steps=1), **kw)


@pytest.mark.parametrize("family", ("sd", "sdxl", "sd3"))
def test_only_the_denoiser_is_on_the_card_while_it_trains(family):
    trainer = trainer_of(family); seen = watched(trainer)
    own = trainer.base.encode_prompts; read = []
    trainer.base.encode_prompts = lambda ps: (read.append(len(ps)), own(ps))[1]
    encoders = set(trainer.base.text_encoders)
    trainer.fit()
    steps = [on for n, on, learn in seen if n == trainer.base.denoiser_name and learn]
    assert len(steps) >= 4 and all(on == {trainer.base.denoiser_name} for on in steps)
    draws = [on for n, on, learn in seen if n == "vae"]
    assert draws and all("vae" in on and not on & encoders for on in draws)                # previews: the VAE, no encoder
    assert read and set(trainer.place.where.values()) == {"card"}
    assert len(trainer.log.previews) == 3


def test_no_text_is_read_after_the_first_step():
    "Shuffled tags, dropped captions, validation and previews: all were read before"
    trainer = trainer_of("sd3"); watched(trainer)
    asked = []
    place = trainer.place
    own = Recorder.remember
    def remember(self, learning=()):
        own(self, learning)
        for n, m in self.memories.items():
            def ask(args, kwargs, n=n, inner=m._ask): asked.append((n, trainer.done, trainer.learning)); return inner(args, kwargs)
            m._ask = ask
    place.remember = remember.__get__(place)
    trainer.fit()
    assert asked and not any(done or learning for _, done, learning in asked)


def test_an_encoder_that_learns_is_there_for_its_backward_pass():
    trainer = trainer_of("sd3", {"text_encoder": "attention"}); seen = watched(trainer)
    trainer.fit()
    steps = [on for n, on, learn in seen if n == "transformer" and learn]
    assert steps and all(on == {"transformer", "text_encoder"} for on in steps)


def test_training_equals_training_without_a_card():
    plain, moved = trainer_of("sd3", {"text_encoder": "attention"}), trainer_of("sd3", {"text_encoder": "attention"})
    watched(moved)
    plain.fit(); moved.fit()
    assert torch.allclose(torch.tensor(plain.log.losses), torch.tensor(moved.log.losses), atol=1e-6)
    assert torch.allclose(torch.tensor(plain.log.val["prior"]), torch.tensor(moved.log.val["prior"]), atol=1e-6)


def test_a_micro_batch_is_one_copy_and_the_schedule_none():
    "With a meta device in the card's place: copies from the CPU are counted"
    from torch.utils._python_dispatch import TorchDispatchMode
    from lora_nb.samples import send_batches
    class Copies(TorchDispatchMode):
        n = 0
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            to = (kwargs or {}).get("device")
            self.n += f is torch.ops.aten._to_copy.default and to is not None and to.type == "meta" and args[0].device.type == "cpu"
            return f(*args, **kwargs or {})
    trainer = trainer_of("sdxl")
    batches = [b for s in trainer.streams for b in trainer.draw(s, 0)]
    base = trainer.base; alphas = base.alphas
    with Copies() as copies:
        sent = send_batches(batches, "meta")
        first = copies.n
        t = torch.zeros(2, dtype=torch.long, device="meta")
        for b in sent: base.add_noise(b.latents[:1], b.noise[:1], t[:1]); base.target(b.latents, b.noise, t[:1]); base.min_snr(t, 5.)
    base.alphas = alphas
    assert first == 1 and copies.n == 2                       # all batches; the schedule's table, once


@pytest.mark.parametrize("family", ("sd", "sd3"))
def test_noise_from_the_device_is_a_function_of_the_place(family):
    from dataclasses import replace
    from lora_nb.samples import draw_samples
    trainer = trainer_of(family); x = trainer.streams[0].examples
    whole, half = draw_samples(x, range(4), 0, device=torch.device("cpu")), draw_samples(x, range(2, 4), 0, device=torch.device("cpu"))
    assert torch.stack(whole[3][2:]).equal(torch.stack(half[3])) and whole[2][2:].equal(half[2])
    assert abs(torch.stack(whole[3]).std() - 1) < .2 and not whole[3][0].equal(whole[3][1])
    trainer.recipe = replace(trainer.recipe, device_noise=True)
    assert trainer.draw(trainer.streams[0], 0)[0].noise.equal(trainer.draw(trainer.streams[0], 0)[0].noise)


def test_branches_share_their_input_under_autocast():
    "to_q, to_k and to_v used to keep a copy of the same tokens each"
    from torch import nn
    from lora_nb.layers import LoraInjectedLinear
    layers = [LoraInjectedLinear.from_base(nn.Linear(16, 16).bfloat16(), 4, dtype=torch.float32) for _ in range(3)]
    x, kept = torch.randn(8, 16, dtype=torch.bfloat16), set()
    def keep(t):
        if t.shape == x.shape: kept.add(t.untyped_storage().data_ptr())
        return t
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = [m(x) for m in layers]
    assert kept == {x.untyped_storage().data_ptr()} and all(o.dtype == torch.bfloat16 for o in out)
    sum(o.float().sum() for o in out).backward()
    assert all(m.lora_up.weight.grad.dtype == torch.float32 for m in layers)
