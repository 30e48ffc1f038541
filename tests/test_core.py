import errno, os
from pathlib import Path

import pytest
import torch

from lora_nb.core import (LoraError, atomic_path, atomic_paths, check_free, data_path, default_dtype, fast_bf16, finite,
                          finite_number, finish_writing, free_name, quick, quiet, some)


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


# ------------------------------------------------------------------------------------------ writers that fail or are killed
@pytest.fixture
def small_disk():
    "No file may grow beyond 4 KB: what a full disk does to a writer"
    import resource
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, was[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, was)


def big(kind, p):
    import safetensors.torch
    held = {"a": torch.zeros(10_000)}
    if kind == "safetensors": safetensors.torch.save_file(held, p)
    elif kind == "pickle": torch.save(held, p)
    elif kind == "folder": p.mkdir(); (p / "ok").write_text("small"); (p / "x").write_bytes(bytes(40_000))
    elif kind == "picture":
        from PIL import Image
        Image.effect_noise((200, 200), 90).save(p, format="PNG")
    else: p.write_text("x" * 40_000)


@pytest.mark.parametrize("kind", ["safetensors", "pickle", "text", "folder", "picture"])
def test_a_full_disk_is_an_error_of_ours(tmp_path, small_disk, kind):
    path = tmp_path / "a"
    write(path, lambda p: (p.mkdir(), (p / "x").write_text("whole")) if kind == "folder" else p.write_text("whole"))
    with pytest.raises(LoraError, match="cannot write .*a: .*unchanged.*[Ff]ree some space"): write(path, lambda p: big(kind, p))
    assert (path / "x" if kind == "folder" else path).read_text() == "whole" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("number, advice", [(errno.EROFS, "may write"), (errno.EACCES, "may write"), (errno.ENOSPC, "space"),
                                            (errno.EDQUOT, "space"), (errno.EIO, "another place")])
@pytest.mark.parametrize("where", ["mkdtemp", "fsync", "replace", "inside"])
def test_each_step_that_can_fail(tmp_path, monkeypatch, number, advice, where):
    path = tmp_path / "a.txt"; path.write_text("whole")
    def fail(*args, **kw): raise OSError(number, os.strerror(number))
    if where != "inside": monkeypatch.setattr({"mkdtemp": "tempfile.mkdtemp", "fsync": "os.fsync", "replace": "os.replace"}[where], fail)
    with pytest.raises(LoraError, match=f"cannot write .*{advice}"):
        write(path, fail if where == "inside" else lambda p: p.write_text("new"))
    monkeypatch.undo()
    assert path.read_text() == "whole" and os.listdir(tmp_path) == ["a.txt"]


def test_errors_that_are_not_about_the_disk_pass(tmp_path):
    for error in (FileNotFoundError(2, "No such file", "/elsewhere/picture.png"), ConnectionResetError(104, "reset"),
                  RuntimeError("CUDA out of memory"), OSError("cannot write mode F as PNG")):
        def fail(p, error=error): raise error
        with pytest.raises(type(error)) as caught: write(tmp_path / "x", fail)
        assert caught.value is error and not os.listdir(tmp_path)


def test_names_and_places(tmp_path, monkeypatch):
    with pytest.raises(LoraError, match="shorter name"): write(tmp_path / ("x" * 300), lambda p: p.write_text("new"))
    with pytest.raises(LoraError, match="shorter name"): check_free(tmp_path / ("x" * 300))
    write(tmp_path / ("x" * 255), lambda p: p.write_text("new"))                    # as long as a name may be
    held = tmp_path / "kept.txt"; held.write_text("whole"); held.chmod(0o444)
    with pytest.raises(LoraError, match="write-protected"): write(held, lambda p: p.write_text("new"))
    assert held.read_text() == "whole"


def test_what_may_be_replaced(tmp_path):
    path = tmp_path / "a"; path.mkdir(); check_free(path); check_free(tmp_path / "b")
    (path / "x").touch(); check_free(path / "x"); (path / "x").write_text("held")
    for at in (path, path / "x"):
        with pytest.raises(LoraError, match="nothing was written"): check_free(at)
        check_free(at, overwrite=True); check_free(at, same=lambda p: True)
        with pytest.raises(LoraError, match="is not a LoRA"): check_free(at, same=lambda p: False, kind="a LoRA")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(LoraError, match="exists"): check_free(tmp_path / "dangling")


KILLED_WRITER = """
import os, sys
from pathlib import Path
from lora_nb import core
step, folder, names = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(",")
left = [step]
def counted(f):
    def g(*a, **kw):
        left[0] -= 1
        if left[0] == 0: os.kill(os.getpid(), 9)
        return f(*a, **kw)
    return g
for n in ("replace", "fsync", "chmod", "unlink", "rmdir"): setattr(os, n, counted(getattr(os, n)))
core.Path.unlink = counted(Path.unlink)
def write(p, text): p.mkdir(); (p / "x").write_text(text)
def file(p, text): p.write_text(text)
make = write if names == ["folder"] else file
with core.atomic_paths([folder / n for n in names]) as tmps:
    for t in tmps: make(t, "new")
print("done")
"""


@pytest.mark.parametrize("names", ["a", "folder", "a,b,c"])
def test_killed_at_every_step_all_is_old_or_all_is_new(tmp_path, names):
    split, seen = names.split(","), []
    for step in range(1, 40):
        folder = tmp_path / str(step); folder.mkdir()
        for n in split:
            if n == "folder": (folder / n).mkdir()
            (folder / n / "x" if n == "folder" else folder / n).write_text("old")
        done = forked(KILLED_WRITER, [str(step), str(folder), names])
        finish_writing(folder)
        state = {(folder / n / "x" if n == "folder" else folder / n).read_text() for n in split}
        assert len(state) == 1 and sorted(os.listdir(folder)) == sorted(split), (step, state, os.listdir(folder))
        seen += state
        if done: break
    assert done and seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}


def forked(code, argv):
    "Run code in a fork of this process, which has imported torch already; True if it ends by itself"
    import sys
    child = os.fork()
    if not child:
        try:
            sys.argv = ["-c", *argv]; os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            exec(compile(code, "writer", "exec"), {})
        finally: os._exit(1 if sys.exc_info()[0] else 0)
    return os.waitpid(child, 0)[1] == 0


def test_only_the_dead_are_cleared_away(tmp_path):
    import json, time
    with atomic_path(tmp_path / "a") as p:
        p.write_text("mine"); finish_writing(tmp_path)                          # another writer looks through the folder now
        assert p.read_text() == "mine"
    young, old = tmp_path / ".writing-young", tmp_path / ".writing-old"         # of versions without locks: after a day
    for box in (young, old): box.mkdir(); (box / "half").touch()
    os.utime(old, (time.time() - 90_000,) * 2)
    dead = tmp_path / ".writing-dead"; dead.mkdir(); (dead / ".writer").touch(); (dead / ".ready").write_text(json.dumps(["b"])[:-1])
    (dead / "b").write_text("half")                                             # a list that was not complete
    finish_writing(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".writing-young", "a"]


def test_the_next_writer_clears_up(tmp_path):
    dead = tmp_path / ".writing-dead"; dead.mkdir(); (dead / ".writer").touch(); (dead / "a").write_text("half")
    write(tmp_path / "b", lambda p: p.write_text("whole"))
    assert os.listdir(tmp_path) == ["b"]


def test_several_files_are_refused_together(tmp_path):
    (tmp_path / "b").mkdir()
    with pytest.raises(LoraError, match="is a folder"), atomic_paths([tmp_path / "a", tmp_path / "b"]) as tmps:
        for t in tmps: t.write_text("new")
    assert os.listdir(tmp_path) == ["b"]
    with atomic_paths([tmp_path / "c", tmp_path / "d"]) as tmps: tmps[1].write_text("only this")
    assert sorted(os.listdir(tmp_path)) == ["b", "d"]


LONG = "x" * 300

@pytest.mark.parametrize("name", [LONG, f"{LONG}.safetensors", "/".join(["y" * 200] * 25), "a\0b"])
def test_names_that_no_file_can_have_are_errors_of_ours(name, tmp_path):
    "They were raw OSErrors where something is read, or where a folder is looked at before it is written"
    from PIL import Image
    from lora_nb.formats import load_lora
    from lora_nb.loading import load_base
    from lora_nb.log import TrainingLog
    from lora_nb.lora import Lora
    from lora_nb.model_card import write_card
    from lora_nb.recipe_file import read_recipe
    from lora_nb.studio.easel import find_lora
    from lora_nb.studio.history import keep_picture
    from lora_nb.studio.page import check_source
    from lora_nb.studio.photos import Photo, prepared
    from lora_nb.studio.settings import Settings
    from lora_nb.studio.training import find_concept
    from types import SimpleNamespace
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    path, base = tmp_path / name, SimpleNamespace(name="tiny-sd")
    reads = [load_lora, load_base, read_recipe, find_concept, check_source, lambda p: find_lora(p, base)]
    writes = [lambda p: write_card(Lora(), p), lambda p: keep_picture(p, Image.new("RGB", (8, 8)), Settings()),
              lambda p: prepared([Photo(tmp_path / "a.png")], p), TrainingLog().to_csv]
    for i, act in enumerate(reads + writes):
        with pytest.raises(LoraError):
            act(path)
            raise AssertionError(f"number {i} did not fail")
    assert os.listdir(tmp_path) == ["a.png"]


def test_folders_that_cannot_be_made_are_errors_of_ours(tmp_path):
    "A file where a folder should be: the studio's and the prior's folders were made outside `atomic_path`"
    from PIL import Image
    from lora_nb.dreambooth import train_dreambooth
    from lora_nb.random_pipes import random_pipe
    from lora_nb.studio.bridge import received
    from lora_nb.studio.history import keep_picture
    from lora_nb.studio.photos import Photo, prepared
    from lora_nb.studio.settings import Settings
    from lora_nb.studio.ways import input_file
    im = Image.effect_noise((64, 64), 50).convert("RGB"); im.save(tmp_path / "a.png")
    (tmp_path / "file").write_text("mine"); place = tmp_path / "file" / "below"
    acts = [lambda: keep_picture(place, im, Settings()), lambda: prepared([Photo(tmp_path / "a.png")], place), lambda: input_file(place, im),
            lambda: received({"files": [{"name": "a.png", "data": ""}]}, place),
            lambda: train_dreambooth(random_pipe("sd"), [im], "a sks toy", class_prompt="a toy", class_data=place, num_class_images=1,
                                     sampling=dict(steps=1), steps=1, rank=1, batch_size=1)]
    for act in acts:
        with pytest.raises(LoraError, match="cannot write|is a file"): act()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_during_preprocessing_is_an_error_of_ours(tmp_path):
    import resource, signal
    from PIL import Image
    from lora_nb.preprocessing import preprocess
    (tmp_path / "raw").mkdir(); Image.effect_noise((300, 300), 50).convert("RGB").save(tmp_path / "raw/a.png")
    was, how = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, was[1]))
        with pytest.raises(LoraError, match="cannot write into .* Free some space"): preprocess(tmp_path / "raw", tmp_path / "out", size=256)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, was); signal.signal(signal.SIGXFSZ, how)
    assert not (tmp_path / "out").exists()
