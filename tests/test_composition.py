import copy, errno, itertools, json, time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from helpers_ground import close, lora_for
from lora_nb.composition import METHODS, add_files, compose, find_method, method, number_words, renamed
from lora_nb.core import DataError, LoraError, ShapeError, TargetError, data_path
from lora_nb.formats import format_of, read_file
from lora_nb.injection import apply_lora, remove_lora
from lora_nb.lora import Factors, Lora, gather, join_words
from lora_nb.loading import load_base
from lora_nb.names import canonical
from lora_nb.random_pipes import random_pipe


one_layer = lambda r, out=6, into=8: Lora({"unet.x": Factors(torch.randn(out, r), torch.randn(r, into))})
ours = Lora({}, {"<s>": {"text_encoder": torch.ones(1, 4)}}, {"trigger": "<s> toy"})
theirs = Lora({}, {"<s>": {"text_encoder": torch.zeros(1, 4)}}, {"trigger": "<s>"})


def test_what_cannot_be_summed():
    a = one_layer(2)
    dora = Lora({"unet.x": replace(a.layers["unet.x"], magnitude=torch.rand(6))})
    with pytest.raises(LoraError, match="cannot be summed"): gather([a, dora])
    with pytest.raises(ShapeError): gather([a, one_layer(2, into=9)])
    with pytest.raises(LoraError, match="found none"): gather([])
    with pytest.raises(LoraError, match="found str"): gather([a, "b.safetensors"])


def test_words_that_are_the_same_are_one_word():
    assert join_words([ours, ours]) == ours.embeddings
    half = join_words([ours, ours.to(dtype=torch.float16)])
    assert half["<s>"]["text_encoder"].equal(ours.embeddings["<s>"]["text_encoder"])
    assert close(join_words([ours, theirs], [.25, .75])["<s>"]["text_encoder"], torch.full((1, 4), .25))
    with pytest.raises(DataError, match="rename_token"): join_words([ours, theirs])


def test_renaming_takes_no_name_twice():
    assert [list(l.embeddings) for l in renamed([ours, theirs, ours])] == [["<s>"], ["<s-1>"], ["<s>"]]
    assert list(compose([ours, theirs, ours], rename=True).embeddings) == ["<s>", "<s-1>"]


def test_weights_by_path():
    worded = Lora({"unet.down_blocks.1.attn1.to_q": Factors(torch.randn(3, 2), torch.randn(2, 5))},
                  {"<s>": {"text_encoder": torch.ones(1, 4)}})
    delta = next(iter(worded.layers.values())).delta()
    twice = compose([worded, worded], [{"down_blocks.1": .5}, 1.], rename=True)
    assert list(twice.embeddings) == ["<s>"] and close(next(iter(twice.layers.values())).delta(), 1.5 * delta)
    by_function = compose([worded, worded], [lambda n: 2. if "attn1" in n else 0., 1.])
    assert close(next(iter(by_function.layers.values())).delta(), 3 * delta)
    with pytest.raises(TargetError, match="Did you mean 'attn1'"): compose([worded, worded], [{"attn9": .1}, 1.])
    with pytest.raises(LoraError, match="finite"): compose([worded, worded], [float("nan"), 1.])
    with pytest.raises(LoraError, match="finite"): compose([worded, worded], [{"attn1": float("inf")}, 1.])


def test_errors_of_compose():
    a, b = one_layer(2), one_layer(3)
    with pytest.raises(LoraError, match="1 weights for 2"): compose([a, b], [1])
    with pytest.raises(LoraError, match="Did you mean"): compose([a, b], method="svg")
    with pytest.raises(DataError, match="rename=True"): compose([ours, theirs])
    with pytest.raises(LoraError, match="blends two"): compose([a, b, a], method="lerp", t=.5)
    with pytest.raises(LoraError, match="not zero"): compose([a, b], [1, -1], method="lerp")


def test_a_subtracted_lora_leaves_its_words_behind():
    assert list(compose([ours, theirs], rename=True).embeddings) == ["<s>", "<s-1>"]
    assert json.loads(compose([ours, theirs], [1, -1]).metadata["triggers"]) == ["<s> toy"]


def test_precision_and_device():
    a, b = one_layer(2), one_layer(3)
    half = compose([a.to(dtype=torch.float16), b.to(dtype=torch.bfloat16)], dtype=torch.float16)
    assert {t.dtype for t in half.tensors} == {torch.float16}
    assert close(half.layers["unet.x"].delta().float(), a.layers["unet.x"].delta() + b.layers["unet.x"].delta(), .1)
    away = compose([a.to("meta"), Lora(b.layers, ours.embeddings)], [1, .5])     # "meta" stands for any other device
    assert {t.device.type for t in away.tensors} == {"meta"} and away.layers["unet.x"].shape == (6, 8)


def test_convolutions_and_groups():
    conv = [Lora({"unet.c": Factors(torch.randn(6, r, 1, 1), torch.randn(r, 4, 3, 3), 1.)}) for r in (2, 3)]
    want = sum(l.layers["unet.c"].delta() for l in conv)
    assert close(compose(conv).layers["unet.c"].delta(), want)
    assert close(compose(conv, rank=5).layers["unet.c"].delta(), want, 1e-4)
    grouped = [Lora({"unet.g": Factors(torch.randn(6, r, 1, 1), torch.randn(r, 2, 3, 3), groups=2)}) for r in (1, 2)]
    want = grouped[0].layers["unet.g"].delta() - .5 * grouped[1].layers["unet.g"].delta()
    for kw in ({}, dict(rank=3)):
        both = compose(grouped, [1, -.5], **kw).layers["unet.g"]
        assert both.groups == 2 and close(both.delta(), want)
    with pytest.raises(ShapeError):
        compose([grouped[0], Lora({"unet.g": replace(grouped[1].layers["unet.g"], groups=1)})])


def test_compression_is_the_best_of_its_rank():
    torch.manual_seed(0)
    parts = [one_layer(r, 40, 30) for r in (4, 5, 6)]
    exact = compose(parts).layers["unet.x"]
    short = compose(parts, method="svd").layers["unet.x"]
    assert short.rank == 6
    tail = torch.linalg.svdvals(exact.delta())[6:].norm()
    assert (short.delta() - exact.delta()).norm() <= 1.01 * tail
    assert compose(parts, energy=.5).rank < compose(parts, energy=.9).rank < 15


def test_large_loras_are_summed_in_moments():
    shapes = [(640, 640)] * 40 + [(1280, 1280)] * 40 + [(1280, 5120)] * 8
    big = [Lora({f"unet.l{i}": Factors(torch.randn(m, 32), torch.randn(32, n)) for i, (m, n) in enumerate(shapes)})
           for _ in range(3)]
    start = time.process_time(); compose(big); assert time.process_time() - start < 1.5


@pytest.mark.parametrize("t", [0, .3, 1])
def test_blend_of_two(t):
    a, b = one_layer(2), one_layer(3)
    mid = compose([a, b], method="lerp", t=t).layers["unet.x"].delta()
    assert close(mid, (1 - t) * a.layers["unet.x"].delta() + t * b.layers["unet.x"].delta())


def test_blend_of_several_and_of_words():
    three = [one_layer(r) for r in (1, 2, 3)]
    d = [l.layers["unet.x"].delta() for l in three]
    assert close(compose(three, [1, 1, 2], method="lerp").layers["unet.x"].delta(), (d[0] + d[1]) / 4 + d[2] / 2)
    mixed = compose([ours, theirs], method="lerp", t=.75)
    assert close(mixed.embeddings["<s>"]["text_encoder"], torch.full((1, 4), .25))


def test_operators():
    a, b = one_layer(2), Lora(one_layer(3).layers, ours.embeddings, {"trigger": "<s>"})
    d, e = a.layers["unet.x"].delta(), b.layers["unet.x"].delta()
    assert close(sum([a, b]).layers["unet.x"].delta(), d + e) and close((-a).layers["unet.x"].delta(), -d)
    for f in (lambda: a + 3, lambda: a * "x"):
        with pytest.raises(TypeError): f()
    assert not (a - b).embeddings and "<s>" not in (a - b).metadata.get("trigger", "")


def test_a_method_is_entered_under_its_name():
    try:
        @method("last")
        def last(layers, loras, n=1): return {k: fs[-n:] for k, fs in layers.items()}
        assert find_method("last") is last
        a, b = one_layer(2), one_layer(3)
        assert compose([a, b], method="last").rank == 3 and compose([a, b], method="last", n=2).rank == 5
    finally: METHODS.pop("last")


# Files

@pytest.fixture(scope="module")
def tiny(): return random_pipe("sd")

@pytest.fixture(scope="module")
def mine(tiny): return words(lora_for(tiny, 4, "unet", "text_encoder"), "<cat>", 0)

@pytest.fixture(scope="module")
def yours(tiny): return words(lora_for(tiny, 2, "unet", seed=1), "<cat>", 1)

def words(lora, token, seed):
    vectors = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed))
    return Lora(lora.layers, {token: {"text_encoder": vectors}}, {"trigger": token})

@pytest.fixture
def paths(tiny, mine, yours, tmp_path):
    found = [tmp_path / f"{n}.safetensors" for n in ("mine", "yours")]
    for l, p in zip((mine, yours), found): l.save(p, format="lora_diffusion", base=tiny)
    return found

@pytest.fixture
def folder(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"

def state_of(tmp_path): return {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}


def test_numbered_words(mine):
    assert list(number_words(mine, 3).embeddings) == ["<s3-0>"] and list(mine.embeddings) == ["<cat>"]


def test_join_keeps_both_whole(tiny, mine, yours, paths, tmp_path):
    joined = Lora.load(add_files(*paths, tmp_path / "ljl.safetensors", .1, .1, mode="ljl", base=tiny), base=tiny)
    assert sorted(joined.embeddings) == ["<s0-0>", "<s1-0>"]
    for n, f in joined.layers.items():
        assert close(f.delta(), mine.layers[n].delta() + (yours.layers[n].delta() if n in yours.layers else 0))


@pytest.mark.parametrize("text", [False, True])
def test_pt_families(tiny, mine, yours, tmp_path, text):
    for l, name in ((Lora(mine.layers), "a"), (Lora(yours.layers), "b")):
        l.save(tmp_path / f"{name}.pt", format="pt", base=tiny)
    add_files(*(tmp_path / f"{n}.pt" for n in "abc"), .5, .5, with_text_lora=text, base=tiny)
    back = Lora.load(tmp_path / "c.pt", base=tiny)
    assert ("text_encoder" in back.components) == text
    n = next(iter(yours.layers))
    assert close(back.layers[n].delta().float(), (mine.layers[n].delta() + yours.layers[n].delta()) / 2, 1e-2)


def test_rank_and_format_of_a_sum(tiny, mine, paths, tmp_path):
    assert Lora.load(add_files(*paths, tmp_path / "r.safetensors", rank=2, base=tiny), base=tiny).rank == 2
    mine.save(tmp_path / "peft.safetensors")
    assert format_of(*read_file(add_files(tmp_path / "peft.safetensors", paths[1], tmp_path / "p.safetensors", base=tiny))) == "peft"


def test_errors_of_add_files(tiny, paths, tmp_path):
    before = state_of(tmp_path)
    with pytest.raises(LoraError, match="Did you mean 'lpl'"): add_files(*paths, tmp_path / "no.safetensors", mode="lp")
    with pytest.raises(LoraError):
        add_files(paths[0], data_path("loras", "neon.safetensors"), tmp_path / "no.safetensors", base=tiny)
    with pytest.raises(LoraError, match=".ckpt"): add_files("tiny-sd", paths[0], tmp_path / "no.txt", mode="upl-ckpt-v2")
    assert state_of(tmp_path) == before


@pytest.mark.parametrize("text", [False, True])
def test_a_merged_folder_has_the_worn_weights(tiny, mine, folder, tmp_path, text):
    Lora(mine.layers).save(tmp_path / "mine.pt", format="pt", base=tiny)
    name = apply_lora(tiny, Lora(mine.layers), .8)
    parts = ("unet", "text_encoder", "vae")
    worn = {c: {canonical(k): v.clone() for k, v in getattr(tiny, c).state_dict().items()} for c in parts}
    remove_lora(tiny, name)
    add_files(folder, tmp_path / "mine.pt", tmp_path / "up", .8, mode="upl", with_text_lora=text)
    back = load_base(tmp_path / "up", device="cpu", dtype=torch.float32).pipe
    for c in worn:
        found = {canonical(k): v for k, v in getattr(back, c).state_dict().items()}
        assert found.keys() == worn[c].keys() and all(close(v, worn[c][k], 2e-3) for k, v in found.items())


def test_nothing_is_written_if_anything_is_wrong(paths, folder, tmp_path):
    to_ckpt = lambda lora, name="model.ckpt": add_files(folder, lora, tmp_path / name, mode="upl-ckpt-v2", overwrite=True)
    to_ckpt(paths[0])
    kept, real, calls = state_of(tmp_path), torch.save, itertools.count(1)
    def full_disk(held, path):
        if next(calls) == 2: Path(path).write_bytes(b"half"); raise OSError(errno.ENOSPC, "no space left")
        real(held, path)
    with patch.object(torch, "save", full_disk), pytest.raises(LoraError, match="no space"): to_ckpt(paths[0])
    assert next(calls) == 3 and state_of(tmp_path) == kept
    for mode, name in (("upl", "new"), ("upl-ckpt-v2", "new.ckpt")):
        for lora in (data_path("loras", "neon.safetensors"), tmp_path / "nowhere.safetensors"):
            with pytest.raises(LoraError): add_files(folder, lora, tmp_path / name, mode=mode)
    assert state_of(tmp_path) == kept and not (tmp_path / "new").exists() and not list(tmp_path.glob(".writing*"))


def test_any_number_of_files_with_weights(tiny, mine, yours, paths, tmp_path):
    more = [(paths[0], .25), (paths[1], -1.), (paths[0], 2)]
    total = Lora.load(add_files(*paths, tmp_path / "five.safetensors", .7, .3, base=tiny, more=more), base=tiny)
    for n in mine.layers:
        want = 2.95 * mine.layers[n].delta() + (-.7 * yours.layers[n].delta() if n in yours.layers else 0)
        assert close(total.layers[n].delta().float(), want, 1e-4)
    joined = Lora.load(add_files(*paths, tmp_path / "j.safetensors", mode="ljl", base=tiny, more=[(paths[0], .5)]), base=tiny)
    assert list(joined.embeddings) == ["<s0-0>", "<s1-0>", "<s2-0>"]
    n = next(iter(mine.layers))
    want = 1.5 * mine.layers[n].delta() + (yours.layers[n].delta() if n in yours.layers else 0)
    assert close(joined.layers[n].delta().float(), want, 1e-4)
    for mode in ("upl", "upl-ckpt-v2"):
        with pytest.raises(LoraError, match="more="): add_files("tiny-sd", paths[0], tmp_path / "no.ckpt", mode=mode, more=more)


def test_inputs_and_bases_are_kept(tiny, paths, folder, tmp_path):
    before, whole = state_of(tmp_path), {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    for mode in ("lpl", "ljl"):
        with pytest.raises(LoraError, match="files that are read"): add_files(*paths, paths[1], mode=mode, base=tiny)
        with pytest.raises(LoraError, match="files that are read"):
            add_files(*paths[:1] * 2, paths[1], mode=mode, base=tiny, more=[(paths[1], 1.)])
    with pytest.raises(LoraError, match="would be lost"): add_files(folder, paths[0], folder, mode="upl", overwrite=True)
    weights = next(Path(folder).glob("unet/*.safetensors"))
    with pytest.raises(LoraError, match="not a LoRA"): add_files(*paths, weights, base=tiny)
    assert state_of(tmp_path) == before and {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()} == whole


def test_a_folder_is_merged_in_its_own_precision(tiny, paths, tmp_path):
    half = copy.deepcopy(tiny).to(torch.float16)
    half.save_pretrained(tmp_path / "half")
    add_files(tmp_path / "half", paths[0], tmp_path / "up", 1., mode="upl")
    sizes = lambda d: {p.name: p.stat().st_size for p in (tmp_path / d / "unet").glob("*.safetensors")}
    assert sizes("up") == sizes("half")


def test_words_of_several_encoders_are_beside_the_file(tmp_path):
    p = random_pipe("sdxl"); p.save_pretrained(tmp_path / "xl")
    words = {"<cat>": {c: torch.randn(2, 32) for c in ("text_encoder", "text_encoder_2")}}
    Lora({}, words).save(tmp_path / "cat.safetensors")
    add_files(tmp_path / "xl", tmp_path / "cat.safetensors", tmp_path / "m.safetensors", 1., mode="upl-ckpt-v2")
    assert Lora({}, Lora.load(tmp_path / "m.cat.safetensors").embeddings) == Lora({}, words)
