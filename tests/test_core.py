import os
from pathlib import Path

import pytest
import torch

from lora_nb.core import LoraError, atomic_path, data_path, default_dtype, fast_bf16, finite, finite_number, free_name, quick, quiet, some


def write(path, make):
    with atomic_path(path) as p: make(p)


def test_files_can_be_read_by_all(tmp_path):
    with atomic_path(tmp_path / "a.txt") as p: p.write_text("whole"); p.chmod(0o600)       # as safetensors leaves its files
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_folders_replace_folders_and_leave_nothing_else(tmp_path):
    for text in ("one", "two"): write(tmp_path / "folder", lambda p, text=text: (p.mkdir(), (p / "x").write_text(text)))
    assert (tmp_path / "folder/x").read_text() == "two" and os.listdir(tmp_path) == ["folder"]


def test_a_folder_is_never_lost_to_a_file_nor_the_reverse(tmp_path):
    write(tmp_path / "a.txt", lambda p: p.write_text("whole")); write(tmp_path / "folder", Path.mkdir)
    with pytest.raises(LoraError, match="is a folder"): write(tmp_path / "folder", Path.touch)
    with pytest.raises(LoraError, match="is a file"): write(tmp_path / "a.txt", Path.mkdir)
    assert (tmp_path / "a.txt").read_text() == "whole" and (tmp_path / "folder").is_dir()


def test_unwritable_places_are_reported_at_once(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(LoraError, match="cannot write"): write(tmp_path / "a.txt" / "b.txt", Path.touch)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "a.txt"; path.write_text("whole")
    with pytest.raises(error), atomic_path(path) as p:
        p.write_text("ha")
        raise error
    assert path.read_text() == "whole" and os.listdir(tmp_path) == ["a.txt"]


def test_missing_data_suggests_what_there_is():
    with pytest.raises(LoraError, match="Did you mean 'teapot'"): data_path("subjects", "teapott")


@pytest.mark.parametrize("t, sound", [(torch.ones(3), True), (torch.tensor([1, torch.inf]), False),
    (torch.tensor([torch.inf, -torch.inf]), False), (torch.full((60000,), 60000.).half(), True), (torch.full((4,), 3e38), True),
    (torch.empty(0), True), (torch.empty(3, device="meta"), True)],
    ids=str)
def test_finite(t, sound): assert finite(t) is sound


@pytest.mark.parametrize("x", ["a", None, "nan", float("inf"), []])
def test_no_finite_number(x):
    with pytest.raises(LoraError, match="scale is .*expected a finite number"): finite_number(x, "scale")


@pytest.mark.parametrize("name, taken, kw, want", [("cat", [], {}, "cat"), ("<cat>", ["<cat>"], {}, "<cat-1>"),
    ("lora", {"lora": 1, "lora_2": 1}, dict(sep="_", first=2), "lora_3"), ("a", lambda n: n in ("a", "a-1"), {}, "a-2")])
def test_free_names(name, taken, kw, want): assert free_name(name, taken, **kw) == want


def test_some(): assert (some([]), some("ab"), some(range(7))) == ("", "a, b", "0, 1, 2, 3 and 3 more")


def test_quick_restores_what_was():
    import gc
    gc.disable()
    try:
        with quick(): pass
        assert not gc.isenabled()
    finally: gc.enable()
    with pytest.raises(ValueError), quick(): raise ValueError
    assert gc.isenabled()


def test_quiet_restores_even_after_an_error():
    import transformers
    log = transformers.utils.logging
    before = log.get_verbosity(), log.is_progress_bar_enabled()
    with pytest.raises(ValueError), quiet(): raise ValueError
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before


@pytest.mark.parametrize("capability, dtype", [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16),
                                               ((8, 9), torch.bfloat16), ((12, 0), torch.bfloat16)], ids=str)
def test_precision_follows_what_the_card_multiplies(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)      # counts emulation: not asked
    assert default_dtype("cuda") == dtype and fast_bf16("cuda") == (dtype == torch.bfloat16)
    assert default_dtype("mps") == default_dtype("cpu") == torch.float32
