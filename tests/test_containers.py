import json, os, zipfile

import pytest
import torch
from helpers_files import TO_Q, random_lora
from safetensors.torch import save, save_file

from lora_nb.containers import (NOTE, check_seal, check_tensors, find_file, note, pack_tensor, read_header, read_note,
                                read_safetensors, seal, state_dict, unpack_tensor, unpickle, write_safetensors)
from lora_nb.conversion import convert_lora
from lora_nb.core import FormatError, LoraError
from lora_nb.lora import Factors, Lora
from lora_nb.random_pipes import random_pipe

TENSORS = {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.zeros(4, 2)}


def refused(match, f, *args, **kw):
    with pytest.raises(FormatError, match=match): f(*args, **kw)


def written(path, data): path.write_bytes(data); return path


def test_headers_that_lie(tmp_path):
    good, bad = save(TENSORS), tmp_path/"bad.safetensors"
    refused("cut short", read_header, written(bad, (1 << 60).to_bytes(8, "little") + good[8:]))
    refused("cut short", read_header, written(bad, good[:7]))
    refused("not JSON", read_header, written(bad, good[:8] + good[8:].replace(b'":', b'"x', 1)))
    deep = b"[" * 50_000
    refused("not JSON", read_header, written(bad, len(deep).to_bytes(8, "little") + deep))
    refused("twice", read_header, written(bad, good.replace(b'"a.lora_B', b'"a.lora_A', 1)))
    refused("damaged or cut short", read_safetensors, written(bad, good[:-1]))
    refused("damaged or cut short", read_safetensors, written(bad, good + b"more"))


def test_a_header_with_many_names_is_judged_quickly(tmp_path):
    entries = [f'"k{i}": 0' for i in range(20_000)] + ['"k7": 1']
    text = ("{" + ",".join(entries) + "}").encode()
    refused("twice", read_header, written(tmp_path/"many.safetensors", len(text).to_bytes(8, "little") + text))


def test_a_pickle_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self): return os.system, (f"touch {tmp_path/'ran'}",)
    torch.save([Evil()], tmp_path/"evil.pt")
    refused("holds code", unpickle, tmp_path/"evil.pt")
    assert not (tmp_path/"ran").exists()


def test_damaged_pickles(tmp_path):
    torch.save(TENSORS, tmp_path/"good.pt")
    data = (tmp_path/"good.pt").read_bytes()
    for n in (0, 1, 200, len(data) // 2): refused("damaged", unpickle, written(tmp_path/"cut.pt", data[:n]))
    refused("holds a int", state_dict, 3)
    refused("expected a list or a dict", state_dict, {1: torch.ones(1)})


def test_the_name_of_a_pickle_does_not_matter(tmp_path):
    torch.save(TENSORS, tmp_path/"pickle.safetensors")
    assert list(state_dict(unpickle(tmp_path/"pickle.safetensors"))) == list(TENSORS)


def test_which_file(tmp_path):
    refused("holds 0 LoRA", find_file, tmp_path)
    save_file(TENSORS, tmp_path/"one.safetensors")
    assert find_file(tmp_path).name == "one.safetensors"
    save_file(TENSORS, tmp_path/"two.safetensors")
    refused("holds 2 LoRA", find_file, tmp_path)
    save_file(TENSORS, tmp_path/"pytorch_lora_weights.safetensors")
    assert find_file(tmp_path).name == "pytorch_lora_weights.safetensors"
    save_file(TENSORS, tmp_path/"adapter_model.safetensors")
    refused("holds 2 LoRA", find_file, tmp_path)
    refused("Check the path", find_file, tmp_path/"nowhere"/"x.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_numbers_are_looked_at_in_every_type(dtype):
    check_tensors({"a": torch.ones(3).to(dtype), "b": torch.zeros(0).to(dtype)})
    bad = torch.tensor([1., float("nan")]).to(dtype)
    refused("1 tensors hold NaN or infinity", check_tensors, {"a": bad})
    check_tensors({"a": bad}, numbers=False)


def test_a_sum_that_overflows_is_no_infinity():
    check_tensors({"a": torch.full((1000,), 3e38)})
    refused("NaN", check_tensors, {"a": torch.tensor([float("inf"), -float("inf")])})


def test_what_is_no_number():
    refused("found list", check_tensors, {"a": [1.]})
    refused("bool", check_tensors, {"a": torch.ones(1, dtype=torch.bool)})
    refused("complex64", check_tensors, {"a": torch.ones(1, dtype=torch.complex64)})
    check_tensors({"a": torch.ones(1, dtype=torch.int64)})                  # alpha may be whole


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_packed_tensors_come_back(dtype):
    for t in (torch.randn(3, 2).to(dtype), torch.randn(2, 3).to(dtype).T, torch.tensor(1.).to(dtype)):
        back = unpack_tensor(json.loads(json.dumps(pack_tensor(t))))
        assert back.dtype == dtype and back.equal(t)


def test_notes():
    refused("not JSON", read_note, {NOTE: "{"})
    refused("JSON object", read_note, {NOTE: "[]"})
    sealed = seal(TENSORS, {"format": "pt", NOTE: dict(note(Lora(), {})[NOTE], content_hash="0")})
    refused("under the key 'lora_nc'", read_note, {"lora_nc": sealed[NOTE]})
    assert not check_seal(TENSORS, {"format": "pt"})                        # a stranger's file has no seal


@pytest.mark.parametrize("change", [
    lambda t, m: (t | {"a.lora_A.weight": t["a.lora_A.weight"] + 1e-6}, m),
    lambda t, m: ({k.replace("a.", "b."): x for k, x in t.items()}, m),
    lambda t, m: (t | {"a.lora_A.weight": t["a.lora_A.weight"].reshape(3, 2)}, m),
    lambda t, m: (t | {"a.lora_B.weight": t["a.lora_B.weight"].half()}, m),
    lambda t, m: (t, m | {NOTE: m[NOTE].replace("cat", "dog")}),
    lambda t, m: ({k: t[k] for k in list(t)[:1]}, m)])
def test_the_seal_breaks(change):
    metadata = seal(TENSORS, note(Lora(metadata={"trigger": "cat"}), {}))
    assert check_seal(TENSORS, metadata)
    refused("checksum", check_seal, *change(TENSORS, metadata))


def test_nothing_is_half_written(tmp_path, monkeypatch):
    path = tmp_path/"a.safetensors"
    write_safetensors(path, TENSORS, {})
    before = path.read_bytes()

    def full(tensors, tmp, metadata):
        tmp.write_bytes(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError): write_safetensors(path, {}, {})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


def test_a_loaded_file_is_a_copy(tmp_path):
    "Overwritten, cut to nothing or removed: what was read stays, and Python lives"
    tensors = {"a": torch.randn(300, 200), "b": torch.randn(7).half(), "c": torch.arange(3), "d": torch.ones(0, 4), "e": torch.tensor(2.),
               "f": torch.randn(5).to(torch.bfloat16), "g": torch.randn(3).to(torch.float8_e4m3fn), "h": torch.tensor([True])}
    save_file(tensors, tmp_path/"a.safetensors", {"x": "y"})
    got, metadata = read_safetensors(tmp_path/"a.safetensors")
    assert metadata == {"x": "y"} and got.keys() == tensors.keys()
    with open(tmp_path/"a.safetensors", "r+b") as f: f.write(bytes((tmp_path/"a.safetensors").stat().st_size))
    os.truncate(tmp_path/"a.safetensors", 0)
    for k, t in tensors.items():
        assert got[k].dtype == t.dtype and got[k].shape == t.shape and got[k].flatten().view(torch.uint8).equal(t.flatten().view(torch.uint8))
        assert got[k].untyped_storage().nbytes() == t.numel() * t.element_size()          # no tensor keeps the whole file
    assert "a.safetensors" not in open("/proc/self/maps").read() if os.path.exists("/proc/self/maps") else True


def test_a_lora_survives_its_file(tmp_path):
    lora = Lora({"unet.a": Factors(torch.randn(40, 4), torch.randn(4, 50))})
    for name, options in (("a.safetensors", {}), ("k.safetensors", {"format": "kohya"})):
        if options: lora = Lora({TO_Q: Factors(torch.randn(16, 2), torch.randn(2, 16))})
        lora.save(tmp_path/name, **options)
        got = Lora.load(tmp_path/name)
        os.truncate(tmp_path/name, 0)
        assert got == lora
        got.save(tmp_path/name)                                                           # onto its own file
        assert Lora.load(tmp_path/name) == lora


def header_file(path, header, data=b""):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return written(path, len(text).to_bytes(8, "little") + text + data)


def test_places_that_contradict_themselves(tmp_path):
    entry = lambda start, end, shape=(2,), dtype="F32": {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    bad = lambda match, header, n: refused(match, read_safetensors, header_file(tmp_path/"x.safetensors", header, bytes(n)))
    bad("do not make F32", {"a": entry(0, 7)}, 7)
    bad("begins at byte 4", {"a": entry(4, 12)}, 12)
    bad("begins at byte 4", {"a": entry(0, 8), "b": entry(4, 12)}, 12)                   # two on one place
    bad("there is more", {"a": entry(0, 8)}, 9)
    bad("ends inside a", {"a": entry(0, 8)}, 7)
    bad("of type 'F4'", {"a": entry(0, 8, dtype="F4")}, 8)
    for odd in (entry(0, -8), entry(8, 0), {}, [], 3, entry(0, 8, (-2,)), entry(0, 8, (2.,)), entry("0", 8), dict(entry(0, 8), shape=3)):
        with pytest.raises(FormatError): read_safetensors(header_file(tmp_path/"x.safetensors", {"a": odd}, bytes(8)))
    bad("JSON objects", [1], 0)
    bad("JSON objects", {"__metadata__": [1]}, 0)
    bad("JSON objects", {"__metadata__": {"a": 1}}, 0)
    bad("ends inside a", {"a": entry(0, 1 << 40, (1 << 38,))}, 8)


def test_a_header_is_never_longer_than_the_library_allows(tmp_path):
    path = written(tmp_path/"long.safetensors", (100_000_001).to_bytes(8, "little"))
    os.truncate(path, 200_000_000)                                                        # a sparse file: no room is taken
    refused("expected at most 100,000,000", read_header, path)


FOREIGN = {k: f"the {k}" for k in ("alphas", "version", "token", "checksum", "content_hash", "storeys", "embeddings", "ranks", "metadata", "base",
                                   "ss_steps", "unet", "lora", "note")}


@pytest.mark.parametrize("format", ["peft", "kohya", "lora_diffusion", "textual_inversion"])
def test_foreign_metadata_of_any_name_comes_through(tmp_path, format):
    save_file({f"{TO_Q}.lora_A.weight": torch.ones(2, 16), f"{TO_Q}.lora_B.weight": torch.ones(16, 2)}, tmp_path/"a.safetensors", FOREIGN)
    lora = Lora.load(tmp_path/"a.safetensors")
    assert lora.metadata == FOREIGN
    if format == "lora_diffusion": lora = random_lora(random_pipe("sd"), lambda n: ".attn" in n and n.startswith("unet"), metadata=FOREIGN)
    if format == "textual_inversion": lora = Lora({}, {"<w>": {"text_encoder": torch.ones(1, 4), "text_encoder_2": torch.ones(1, 6)}}, FOREIGN)
    base = random_pipe("sd") if format == "lora_diffusion" else None
    for _ in range(2):
        convert_lora(lora, tmp_path/"b.safetensors", format, base=base, drop=format == "lora_diffusion")
        lora = Lora.load(tmp_path/"b.safetensors", base=base)
        assert lora.metadata == FOREIGN


def test_metadata_with_a_hash_is_no_note_of_ours():
    assert read_note({"sshs": '{"content_hash": "ab", "version": 1}', "x": "3", "y": '"content_hash": "'}) == {}


def test_files_of_older_releases(tmp_path):
    "A note of version 1: metadata stood between our entries"
    up = torch.randn(16, 2)
    tensors = {f"{TO_Q}.lora_A.weight": torch.randn(2, 16), f"{TO_Q}.lora_B.weight": up * 2}
    own = {"version": 1, "alphas": {TO_Q: 4.}, "trigger": "cat", "base": "SD1.5", "metadata": "m", "content_hash": "0",
           "embeddings": {"<w>": {"text_encoder": pack_tensor(torch.ones(1, 4))}}}
    save_file(tensors, tmp_path/"a.safetensors", seal(tensors, {"format": "pt", NOTE: own, "ss_steps": "3"}))
    lora = Lora.load(tmp_path/"a.safetensors")
    assert lora.metadata == {"trigger": "cat", "base": "SD1.5", "metadata": "m", "ss_steps": "3"}
    assert lora.layers[TO_Q].alpha == 4 and lora.layers[TO_Q].up.equal(up) and list(lora.embeddings) == ["<w>"]


def test_what_a_file_is_is_said_in_words(tmp_path):
    with zipfile.ZipFile(tmp_path/"a.pt", "w") as z: z.writestr("lora.safetensors", b"x")
    refused("a zip archive that holds lora.safetensors", Lora.load, tmp_path/"a.pt")
    refused("is empty .0 bytes", Lora.load, written(tmp_path/"b.safetensors", b""))
    save_file({}, tmp_path/"c.safetensors")
    refused("holds no tensors", Lora.load, tmp_path/"c.safetensors")
    for held in ({}, [], ()):
        torch.save(held, tmp_path/"d.pt")
        refused("is empty|no tensors", Lora.load, tmp_path/"d.pt")
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    for tensors in ({f"{key}.lora_down.weight": torch.ones(2, 4)},
                    {f"{key}.lora_down.weight": torch.ones(2, 4), f"{key}.lora_up.weight": torch.ones(4, 3)},
                    {f"{key}.lora_down.weight": torch.ones(2, 4), f"{key}.lora_A.weight": torch.ones(2, 4)},
                    {"unet:0:up": torch.ones(2, 2)}, {"unet:0:up": torch.ones(4, 2), "unet:0:down": torch.ones(3, 4)},
                    {"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": torch.ones(2, 4)}):
        save_file(tensors, tmp_path/"e.safetensors")
        with pytest.raises(LoraError) as e: Lora.load(tmp_path/"e.safetensors")
        assert not any(s in str(e.value) for s in ("('", "',)", "keys like .", "damaged (")), str(e.value)


def test_a_folder_of_pickles(tmp_path):
    key = f"base_model.model.{TO_Q.removeprefix('unet.')}"
    torch.save({f"{key}.lora_A.weight": torch.ones(2, 4), f"{key}.lora_B.weight": torch.ones(4, 2)}, tmp_path/"adapter_model.bin")
    (tmp_path/"adapter_config.json").write_text('{"r": 2, "lora_alpha": 8}')
    assert find_file(tmp_path).name == "adapter_model.bin" and Lora.load(tmp_path).layers[TO_Q].scaling == 4
    save_file(TENSORS, tmp_path/"adapter_model.safetensors")
    assert find_file(tmp_path).name == "adapter_model.safetensors"
