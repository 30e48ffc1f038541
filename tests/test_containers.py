import json, os

import pytest
import torch
from safetensors.torch import save, save_file

from lora_nb.containers import (NOTE, check_seal, check_tensors, find_file, note, pack_tensor, read_header, read_note,
                                read_safetensors, seal, state_dict, unpack_tensor, unpickle, write_safetensors)
from lora_nb.core import FormatError
from lora_nb.lora import Lora

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
    refused("holds 0 safetensors", find_file, tmp_path)
    save_file(TENSORS, tmp_path/"one.safetensors")
    assert find_file(tmp_path).name == "one.safetensors"
    save_file(TENSORS, tmp_path/"two.safetensors")
    refused("holds 2 safetensors", find_file, tmp_path)
    save_file(TENSORS, tmp_path/"pytorch_lora_weights.safetensors")
    assert find_file(tmp_path).name == "pytorch_lora_weights.safetensors"
    save_file(TENSORS, tmp_path/"adapter_model.safetensors")
    refused("holds 2 safetensors", find_file, tmp_path)
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
