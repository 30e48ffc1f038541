"Formats held against their formulas, at random: files from raw tensors, round trips, mixed spellings, and damage of every kind."
import json, math, random, re, time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file, save_file

from lora_nb.containers import checksum
from lora_nb.core import FormatError, LoraError, peak_rss_mb
from lora_nb.formats import FORMATS, load_lora, save_lora
from lora_nb.injection import apply_lora
from lora_nb.kohya import full_names, kohya_name, with_one_alpha
from lora_nb.lora import Factors, Lora
from lora_nb.peft_files import base_layers
from lora_nb.random_pipes import random_pipe
from lora_nb.worn import adapters

ANY = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
PIPES = {f: random_pipe(f) for f in ("sd", "sdxl", "sd3")}
MODULES = {f: {n: tuple(m.weight.shape) for n, m in base_layers(p).items()} for f, p in PIPES.items()}
SWAPPED = ("transformer.transformer_blocks.1.norm1_context.linear", "transformer.norm_out.linear")


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("exact")


# ---- the formulas, in double precision

def cp(t, b, a): return torch.einsum("ijkl,jr,ip->prkl", t, b, a)


def lora_delta(p):
    up, down = p["lora_up.weight"].flatten(1), p["lora_down.weight"]
    if "lora_mid.weight" in p: return torch.einsum("nmkl,in,mj->ijkl", p["lora_mid.weight"], up, down.flatten(1)), len(down)
    return up @ down.flatten(1), len(down)


def loha_delta(p):
    if "hada_t1" in p: sides = [cp(p[f"hada_t{i}"], p[f"hada_w{i}_b"], p[f"hada_w{i}_a"]) for i in (1, 2)]
    else: sides = [p[f"hada_w{i}_a"] @ p[f"hada_w{i}_b"] for i in (1, 2)]
    return sides[0] * sides[1], len(p["hada_w1_b"])


def lokr_delta(p, shape):
    def side(i):
        if f"lokr_w{i}" in p: return p[f"lokr_w{i}"]
        a, b = p[f"lokr_w{i}_a"], p[f"lokr_w{i}_b"]
        return cp(p["lokr_t2"], b, a) if i == 2 and "lokr_t2" in p else a @ b
    w1, w2 = side(1), side(2)
    w2 = w2.reshape(len(w2), shape[1] // w1.shape[1], *shape[2:])
    w1 = w1.reshape(*w1.shape, *[1] * (w2.ndim - 2))
    d = torch.kron(*(w.clone(memory_format=torch.contiguous_format) for w in (w1, w2)))
    return d, next((len(p[k]) for k in ("lokr_w2_b", "lokr_w1_b") if k in p), None)


def raw_delta(p, shape):
    "What the tensors of a module mean, for a weight of this shape"
    p = {k: t.double() for k, t in p.items()}
    d, r = lora_delta(p) if "lora_up.weight" in p else loha_delta(p) if "hada_w1_a" in p else lokr_delta(p, shape)
    return d.reshape(shape) * (p["alpha"].item() / r if "alpha" in p and r else 1)


def flat_shapes(family, dialect="diffusers"):
    "Kohya's name -> (our names, shape of the tensor it adapts)"
    p, found = PIPES[family], {}
    attentive = [i for i, b in enumerate(p.unet.up_blocks) if getattr(b, "attentions", None)] if family != "sd3" else ()
    for n in MODULES[family]: found.setdefault(kohya_name(n, family != "sd", dialect, 1, attentive), []).append(n)
    qkv = lambda n: "qkv".index(re.search("(?:to|add)_([qkv])", n)[1])      # diffusers registers add_k before add_q
    found = {k: sorted(ns, key=qkv) if len(ns) == 3 else ns for k, ns in found.items()}
    return {k: (ns, (len(ns) * MODULES[family][ns[0]][0], *MODULES[family][ns[0]][1:])) for k, ns in found.items()}


FLATS = {("sd", "diffusers"): flat_shapes("sd"), ("sdxl", "diffusers"): flat_shapes("sdxl"),
         ("sdxl", "sgm"): flat_shapes("sdxl", "sgm"), ("sd3", "diffusers"): flat_shapes("sd3")}


def deltas_of(key, parts):
    "Our name -> delta, by the formulas"
    wanted = {}
    for flat, p in parts.items():
        names, shape = FLATS[key][flat]
        for n, d in zip(names, raw_delta(p, shape).chunk(len(names))):
            wanted[n] = torch.cat([d[len(d)//2:], d[:len(d)//2]]) if n in SWAPPED else d
    return wanted


def write_raw(parts, path): save_file({f"{flat}.{k}": t.contiguous() for flat, p in parts.items() for k, t in p.items()}, path)


def agree(lora, wanted):
    "Every module has its delta, to single precision, and there are no more modules"
    assert set(lora.layers) == set(wanted)
    for n, d in wanted.items():
        assert lora.layers[n].shape == tuple(d.shape)
        error = (lora.layers[n].delta() - d).abs().max() / (d.abs().max() + 1e-12)
        assert error <= 2e-5, f"{n}: relative error {error:.2e}"


# ---- files from raw tensors, which no writer of ours has touched

@st.composite
def raw_module(draw, shape):
    "part -> tensor of a module of this shape"
    (out, n), kernel = shape[:2], shape[2:]
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    rand = lambda *s: torch.randn(*s, generator=g).to(dtype)
    kind = draw(st.sampled_from(["lora", "lora", "loha", "lokr"] + ["cp", "loha cp", "lokr cp"] * (len(kernel) == 2)))
    r, area = draw(st.integers(1, 4)), math.prod(kernel)
    alpha = {} if draw(st.booleans()) else {"alpha": torch.tensor(draw(st.sampled_from([.5, 1., 3., 8., .1])))}
    ones = (1,) * len(kernel)
    if kind == "lora": return alpha | {"lora_up.weight": rand(out, r, *ones), "lora_down.weight": rand(r, n, *kernel)}
    if kind == "cp":
        return alpha | {"lora_up.weight": rand(out, r, 1, 1), "lora_down.weight": rand(r, n, 1, 1), "lora_mid.weight": rand(r, r, *kernel)}
    if kind == "loha": return alpha | {f"hada_w{i}_{x}": rand(*s) for i in (1, 2) for x, s in (("a", (out, r)), ("b", (r, n * area)))}
    if kind == "loha cp":
        sizes = {f"{x}{i}{y}": s for i in (1, 2) for x, y, s in (("w", "_a", (r, out)), ("w", "_b", (r, n)), ("t", "", (r, r, *kernel)))}
        return alpha | {f"hada_{k}": rand(*s) for k, s in sizes.items()}
    a, b = (draw(st.sampled_from([x for x in (1, 2, 4) if size % x == 0])) for size in (out, n))
    c, d = out // a, n // b
    w1 = {"lokr_w1": rand(a, b)} if draw(st.booleans()) else {"lokr_w1_a": rand(a, r), "lokr_w1_b": rand(r, b)}
    if kind == "lokr cp": return alpha | w1 | {"lokr_w2_a": rand(r, c), "lokr_w2_b": rand(r, d), "lokr_t2": rand(r, r, *kernel)}
    if draw(st.booleans()): return alpha | w1 | {"lokr_w2": rand(c, d, *kernel)}
    return alpha | w1 | {"lokr_w2_a": rand(c, r), "lokr_w2_b": rand(r, d * area)}


@st.composite
def raw_file(draw):
    "(family and dialect, kohya's name -> part -> tensor)"
    key = draw(st.sampled_from(sorted(FLATS)))
    convs = sorted(k for k, (_, s) in FLATS[key].items() if len(s) == 4)           # every other one has a kernel
    chosen = draw(st.sets(st.one_of(st.sampled_from(convs), st.sampled_from(sorted(FLATS[key]))), min_size=1, max_size=5))
    return key, {f: draw(raw_module(FLATS[key][f][1])) for f in sorted(chosen)}


def test_random_kohya_files(folder):
    seen = Counter()

    @settings(max_examples=150, **ANY)
    @given(raw_file())
    def run(file):
        key, parts = file
        write_raw(parts, folder/"raw.safetensors")
        agree(load_lora(folder/"raw.safetensors", base=PIPES[key[0]]), deltas_of(key, parts))
        for p in parts.values():
            kind = next(k for k in p if k != "alpha").split("_")[0]
            seen[kind + " cp" * any("_t" in k or "mid" in k for k in p)] += 1
    run()
    assert set(seen) == {f"{k}{c}" for k in ("lora", "hada", "lokr") for c in ("", " cp")} and min(seen.values()) >= 5, seen


# ---- what was written is read

@st.composite
def values(draw, family):
    "A random LoRA for a family"
    g, layers = torch.Generator().manual_seed(draw(st.integers(0, 999))), {}
    dtype, dora = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])), draw(st.integers(0, 3)) == 0
    pool = [n for n in MODULES[family] if ".attn" in n] if draw(st.booleans()) else sorted(MODULES[family])
    for n in sorted(draw(st.sets(st.sampled_from(pool), min_size=1, max_size=6))):
        w, r = MODULES[family][n], draw(st.integers(1, 4))
        rand = lambda *s: torch.randn(*s, generator=g).to(dtype)
        alpha, ones = draw(st.sampled_from([None, float(r), r / 8, 3., .1])), (1,) * (len(w) - 2)
        mid = rand(r, r, *w[2:]) if ones and draw(st.booleans()) else None
        down = rand(r, w[1], 1, 1) if mid is not None else rand(r, *w[1:])
        magnitude = torch.rand(w[0], generator=g) if dora and draw(st.integers(0, 5)) else None
        layers[n] = Factors(rand(w[0], r, *ones), down, alpha, magnitude, mid=mid)
    words = {t: {"text_encoder": torch.randn(draw(st.integers(1, 3)), 32, generator=g)} for t in draw(st.sets(st.sampled_from(["<a>", "é b"])))}
    return Lora(layers, words, {"trigger": draw(st.text(max_size=9))})


def exact(f, format, family):
    "Must the bits come back?"
    if f.alpha is None or (format == "kohya" and family != "sd3"): return True
    return math.frexp(f.alpha / f.rank)[0] == .5 and f.up.dtype != torch.float16


def equal(a, b, format, family):
    even, before = with_one_alpha(a) if format == "kohya" else (a, {})
    rounded = [n for n, f in even.layers.items() if f is not a.layers[n] and n not in before]      # no rank makes its alpha the others'
    if not rounded and all(exact(f, format, family) for f in a.layers.values()): return a == b
    bare = lambda f: replace(f, magnitude=None).delta()
    near = all((bare(f) - bare(b.layers[n])).abs().max() <= .01 * bare(f).abs().max() for n, f in a.layers.items())
    return near and set(a.layers) == set(b.layers) and a.metadata == b.metadata


CASES = [("sd", "peft", {}), ("sdxl", "peft", {}), ("sd3", "peft", {}), ("sd", "kohya", {}), ("sdxl", "kohya", {}),
         ("sdxl", "kohya", {"dialect": "sgm"}), ("sd3", "kohya", {}), ("sd", "kohya", {"bundle": True})]


def test_round_trips(folder):
    outcomes, path = Counter(), folder/"trip.safetensors"

    @settings(max_examples=200, **ANY)
    @given(st.data())
    def run(data):
        family, format, options = data.draw(st.sampled_from(CASES))
        lora, base = data.draw(values(family)), PIPES[family]
        path.unlink(missing_ok=True)
        if any(FORMATS[format].faults(lora, base, **options).values()):
            with pytest.raises(FormatError, match="cannot hold"): save_lora(lora, path, format, base=base, **options)
            assert not path.exists()
            outcomes["refused"] += 1
            return
        save_lora(lora, path, format, base=base, **options)
        back = load_lora(path, base=base)
        assert equal(lora, back, format, family)
        outcomes[format] += 1
        save_lora(back, path, format, base=base, **options)
        assert load_lora(path, base=base) == back
    run()
    assert outcomes["kohya"] > 50 and outcomes["peft"] > 20 and outcomes["refused"] > 3, outcomes


# ---- every historic spelling, mixed in one file

def spelled(n, style):
    "(key of down, key of up, key of alpha) of a module in one of the styles"
    c, path = n.split(".", 1)
    if c.startswith("text_encoder") and style in (1, 3): path = path.replace("encoder.layers", "text_model.encoder.layers", 1)
    n = f"{c}.{path}"
    if style == 0: return f"{n}.lora_A.weight", f"{n}.lora_B.weight", f"{n}.alpha"
    if style == 1: return f"{n}.lora.down.weight", f"{n}.lora.up.weight", f"{n}.lora.alpha"
    if style == 2: return f"{n}.lora_A.default.weight", f"{n}.lora_B.default.weight", f"{n}.alpha"
    if style == 3 and re.search(r"attn\d?\.(to_[qkv]|to_out\.0)$", n):
        n = re.sub(r"\.(to_[qkv]|to_out)(\.0)?$", r".processor.\1_lora", n)
        return f"{n}.down.weight", f"{n}.up.weight", f"{n}.alpha"
    return f"{n}.lora_linear_layer.down.weight", f"{n}.lora_linear_layer.up.weight", f"{n}.alpha"


def test_mixed_spellings(folder):
    styles = Counter()

    @settings(max_examples=60, **ANY)
    @given(st.data())
    def run(data):
        family = data.draw(st.sampled_from(sorted(PIPES)))
        names = data.draw(st.sets(st.sampled_from([n for n in MODULES[family] if "attn" in n]), min_size=2, max_size=8))
        tensors, wanted = {}, {}
        for n in sorted(names):
            w, r, style = MODULES[family][n], data.draw(st.integers(1, 3)), data.draw(st.integers(0, 4))
            alpha = data.draw(st.sampled_from([None, 1., 3.]))
            up, down = torch.randn(w[0], r), torch.randn(r, w[1])
            keys = spelled(n, style)
            styles[style] += 1
            tensors |= {keys[0]: down, keys[1]: up} | ({} if alpha is None else {keys[2]: torch.tensor(alpha)})
            wanted[n] = (up.double() @ down.double()) * (1 if alpha is None else alpha / r)
        save_file(tensors, folder/"mixed.safetensors")
        agree(load_lora(folder/"mixed.safetensors", base=PIPES[family]), wanted)
    run()
    assert set(styles) == set(range(5))


# ---- damage: each file must end in an error or in the LoRA that was meant, quickly, and leave every model as it was

def reheaded(data, change):
    "The file with another header"
    n = int.from_bytes(data[:8], "little")
    text = change(json.loads(data[8:8+n]))
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return len(text).to_bytes(8, "little") + text + data[8+n:]


def keys_of(header): return [k for k in header if k != "__metadata__"]


def on_tensor(f):
    "A change of one tensor's entry in the header"
    def change(data, rng):
        def header(h):
            f(h[rng.choice(keys_of(h))], rng)
            return h
        return reheaded(data, header)
    return change


def flip(lo, hi):
    def change(data, rng):
        data, (a, b) = bytearray(data), (lo(data), hi(data))
        for _ in range(rng.choice([1, 1, 3])): data[rng.randrange(a, max(b, a + 1))] ^= 1 << rng.randrange(8)
        return bytes(data)
    return change


def twice(data, rng):
    def header(h):
        a, b = rng.sample(keys_of(h) * 2, 2)
        return json.dumps(h).encode().replace(json.dumps(a).encode(), json.dumps(b).encode(), 1)
    return reheaded(data, header)


def renamed(data, rng):
    def header(h):
        k = rng.choice(keys_of(h))
        return {(rng.choice([k[1:], k + "x", k.replace("0", "1"), k.replace("up", "down"), ""]) if x == k else x): v for x, v in h.items()}
    return reheaded(data, header)


def lost(data, rng):
    def header(h):
        h.pop(rng.choice(keys_of(h)))
        return h
    return reheaded(data, header)


def zeroed(data, rng):
    i = rng.randrange(1, len(data))
    return data[:i] + bytes(min(64, len(data) - i)) + data[i+64:]


head = lambda d: 8 + int.from_bytes(d[:8], "little") if d[8:9] == b"{" else len(d)
ANYWHERE = {"cut": lambda d, rng: d[:rng.randrange(len(d))], "bit anywhere": flip(lambda d: 0, len), "zeroed": zeroed,
            "grown": lambda d, rng: d + bytes(rng.randrange(1, 99)), "noise": lambda d, rng: rng.randbytes(rng.randrange(64))}
TENSORWISE = {
    "bit in header": flip(lambda d: 0, head), "bit in body": flip(head, len), "twice": twice, "renamed": renamed, "lost": lost,
    "length": lambda d, rng: rng.choice([2**63, 2**40, len(d), 0, 7]).to_bytes(8, "little") + d[8:],
    "dtype": on_tensor(lambda t, rng: t.update(dtype=rng.choice(["F64", "F16", "I64", "BOOL", "U8", "F8_E4M3", "XX", 3]))),
    "shape": on_tensor(lambda t, rng: t.update(shape=rng.choice([[2**62, 2**62], [10**9], [-1, 4], [], [0, 0], t["shape"][::-1], "x"]))),
    "place": on_tensor(lambda t, rng: t.update(data_offsets=rng.choice([[-8, 8], [0, 2**60], [0, 4], [8, 0], [4, t["data_offsets"][1]], None]))),
    "deep": lambda d, rng: reheaded(d, lambda h: b"[" * 50_000)}


def sample(family, count=4, seed=0, **kw):
    g, chosen = torch.Generator().manual_seed(seed), random.Random(seed).sample([n for n in MODULES[family] if "attn" in n], count)
    rand = lambda *s: torch.randn(*s, generator=g)
    return Lora({n: Factors(rand(MODULES[family][n][0], 2), rand(2, *MODULES[family][n][1:]), 1.) for n in chosen}, **kw)


@pytest.fixture(scope="module")
def goods(folder):
    "name -> bytes of good files of every format; the family is the end of the stem"
    word = {"<a>": {"text_encoder": torch.randn(1, 32)}}
    for f in PIPES:
        sample(f, embeddings=word).save(folder/f"good_peft_{f}.safetensors")
        sample(f).save(folder/f"good_kohya_{f}.safetensors", "kohya", base=PIPES[f])
    text = Lora({n: Factors(torch.randn(w[0], 1), torch.randn(1, w[1])) for n, w in MODULES["sd"].items() if "self_attn" in n}, word)
    text.save(folder/"good_positional_sd.safetensors", "lora_diffusion", base=PIPES["sd"])
    text.save(folder/"good_pt_sd.pt", "pt", base=PIPES["sd"])
    Lora({}, word).save(folder/"good_word_sd.safetensors", "textual_inversion")
    Lora({}, word).save(folder/"good_a1111_sd.pt", "a1111")
    conv, lin = (next(k for k in FLATS["sd", "diffusers"] if k.endswith(e)) for e in ("resnets_0_conv1", "attn1_to_q"))
    r = torch.randn
    lycoris = {conv: {"hada_w1_a": r(16, 2), "hada_w1_b": r(2, 144), "hada_w2_a": r(16, 2), "hada_w2_b": r(2, 144)},
               lin: {"lokr_w1": r(2, 2), "lokr_w2_a": r(8, 2), "lokr_w2_b": r(2, 8), "alpha": torch.tensor(1.)}}
    tensors, own = {f"{flat}.{k}": t for flat, p in lycoris.items() for k, t in p.items()}, {"version": 1}
    save_file(tensors, folder/"good_lycoris_sd.safetensors", {"lora_nb": json.dumps({**own, "checksum": checksum(tensors, own)})})
    return {p.name: p.read_bytes() for p in sorted(folder.glob("good_*")) if p.suffix != ".json"}


def weights():
    return {f: {k: t.clone() for c in ("unet", "transformer", "text_encoder") if hasattr(p, c) for k, t in getattr(p, c).state_dict().items()}
            for f, p in PIPES.items()}


def test_1500_damaged_files(folder, goods):
    pipe_of = lambda name: PIPES[name.split(".")[0].split("_")[-1]]
    # hashes, since the tensors of a loaded file are a view of it, and the file is written over here
    meant = {n: load_lora(folder/n, base=pipe_of(n)).content_hash() for n in goods if not n.startswith("good_pt_sd.t")}
    rng, outcomes, before, memory, slowest = random.Random(0), Counter(), weights(), peak_rss_mb(), 0
    for _ in range(1500):
        name = rng.choice(list(goods))
        kinds = ANYWHERE | (TENSORWISE if name.endswith("safetensors") else {})
        kind = rng.choice(list(kinds))
        (folder/name).write_bytes(kinds[kind](goods[name], rng))
        main, start = "good_pt_sd.pt" if name.startswith("good_pt") else name, time.perf_counter()   # a .pt LoRA is asked for by its first file
        try: lora = load_lora(folder/main, base=pipe_of(main))
        except LoraError as e:
            assert str(folder/main) in str(e) and len(str(e)) < 3000
            outcomes[kind, "error"] += 1
            if rng.random() < .1:
                with pytest.raises(LoraError): apply_lora(pipe_of(main), folder/main)
        else:
            assert lora.content_hash() == meant[main], f"{name} ({kind}) was read wrongly"
            outcomes[kind, "right"] += 1
        slowest = max(slowest, time.perf_counter() - start)
        (folder/name).write_bytes(goods[name])
    assert {k for k, _ in outcomes} == set(ANYWHERE) | set(TENSORWISE)
    assert sum(n for (_, o), n in outcomes.items() if o == "error") > 1200 and outcomes["bit in body", "right"] == 0
    assert slowest < 5 and peak_rss_mb() - memory < 300
    now = weights()
    for f, p in PIPES.items():
        assert not adapters(p) and set(now[f]) == set(before[f]) and all(t.equal(before[f][k]) for k, t in now[f].items())


def test_strangers_files_have_no_checksum(folder):
    "A flipped bit is another number there: whatever is read must be what the damaged tensors say"
    rng, outcomes, key, path = random.Random(0), Counter(), ("sdxl", "diffusers"), folder/"s.safetensors"
    for i in range(150):
        g, parts = torch.Generator().manual_seed(i % 7), {}
        for j, (flat, (_, s)) in enumerate(FLATS[key].items()):
            r = 1 + j % 4
            p = {"lora_up.weight": torch.randn(s[0], r, *(1,) * (len(s) - 2), generator=g), "alpha": torch.tensor(1. + j % 3),
                 "lora_down.weight": torch.randn(r, *s[1:], generator=g)}
            if rng.random() < .1: parts[flat] = p
        if not parts: continue
        write_raw(parts, path)
        path.write_bytes(TENSORWISE[rng.choice(["bit in body", "bit in header", "dtype", "renamed"])](path.read_bytes(), rng))
        try: lora = load_lora(path)
        except LoraError: outcomes["error"] += 1; continue
        now = {}
        for k, t in load_file(path).items(): now.setdefault(k.partition(".")[0], {})[k.partition(".")[2]] = t
        for flat, p in now.items():
            d, (name,) = raw_delta(p, (p["lora_up.weight"].shape[0], *p["lora_down.weight"].shape[1:])), full_names(flat)
            if d.abs().max() < 1e30: assert (lora.layers[name].delta() - d).abs().max() <= 2e-5 * d.abs().max() + 1e-12
        outcomes["as the tensors say"] += 1
    assert min(outcomes["error"], outcomes["as the tensors say"]) > 20, outcomes
