"What the lessons share, and the cell with which each of them installs the package."
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import lora_nb.lessons as lessons
from lora_nb.core import DataError, LoraError
from lora_nb.pictures import find_pictures

LESSONS = sorted((Path(__file__).resolve().parent.parent / "nbs" / "tutorials").glob("*.ipynb"))


# ------------------------------------------------------------------------------------------ the installing cell
def first_cell(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return next("".join(c["source"]) for c in cells if c["cell_type"] == "code")


@pytest.fixture
def pip(monkeypatch):
    "What pip is asked for; `pip.has` are the places that answer."
    asked = types.SimpleNamespace(calls=[], has=())
    def run(command, **kw):
        assert command[:4] == [sys.executable, "-m", "pip", "install"]
        asked.calls.append(command[-1])
        return types.SimpleNamespace(returncode=int(not any(h in command[-1] for h in asked.has)))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    return asked


def test_all_lessons_install_in_the_same_way(): assert len(LESSONS) >= 6 and len({first_cell(p) for p in LESSONS}) == 1


@pytest.mark.parametrize("has, asks", [(("==", "git"), 1), (("git",), 2)], ids=["index", "repository"])
def test_the_package_index_first_then_the_repository(pip, has, asks):
    pip.has = has
    exec(first_cell(LESSONS[0]), {})
    version = re.search(r'^VERSION = "(.+)"$', first_cell(LESSONS[0]), re.M)[1]
    assert pip.calls == [f"lora_nb=={version}", "git+https://github.com/lora-nb/lora_nb"][:asks]


def test_where_neither_answers_one_sentence_says_so(pip):
    with pytest.raises(SystemExit) as e: exec(first_cell(LESSONS[0]), {})
    assert len(pip.calls) == 2 and "neither from the package index nor from" in str(e.value) and "\n" not in str(e.value)


def test_what_is_installed_is_not_touched(pip, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    exec(first_cell(LESSONS[0]), {})
    assert not pip.calls


# ------------------------------------------------------------------------------------------ a base that always loads
@pytest.fixture
def gpu(monkeypatch): monkeypatch.setattr(lessons, "default_device", lambda: torch.device("cuda"))


def test_with_the_hub_a_fault_stays_an_error(gpu, monkeypatch):
    def load(*a, **k): raise LoraError("No pipeline could be loaded")
    monkeypatch.setattr(lessons, "load_base", load); monkeypatch.setattr(lessons, "hub_answers", lambda: True)
    with pytest.raises(LoraError, match="No pipeline"): lessons.lesson_base("owner/private")


@pytest.mark.parametrize("bf16, name, dtype", [(False, "sd1.5", torch.float16), (False, "sdxl", None), (True, "sd1.5", None)])
def test_precision_on_a_gpu(gpu, monkeypatch, bf16, name, dtype):
    sliced, asked = [], {}
    loaded = types.SimpleNamespace(vae=types.SimpleNamespace(enable_slicing=lambda: sliced.append(1)))
    monkeypatch.setattr(lessons, "fast_bf16", lambda: bf16)
    monkeypatch.setattr("lora_nb.plan.free_memory", lambda device: 15 << 30)
    monkeypatch.setattr(lessons, "load_base", lambda *a, **k: asked.update(k) or loaded)
    assert lessons.lesson_base(name) is loaded and sliced == [1] and asked.get("dtype") == dtype


@pytest.mark.parametrize("name, gib, settings", [("sdxl", 15, {}), ("sd3.5-medium", 15, dict(offload="model")), ("owner/other", 1, {}),
                                                 ("sd1.5", .1, {})])
def test_a_lesson_loads_what_fits_the_card(gpu, monkeypatch, name, gib, settings):
    asked = {}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("lora_nb.plan.free_memory", lambda device: int(gib * 2**30))
    monkeypatch.setattr(lessons, "fast_bf16", lambda: True)
    loaded = types.SimpleNamespace(vae=types.SimpleNamespace(enable_slicing=int))
    monkeypatch.setattr(lessons, "load_base", lambda *a, **k: asked.update(k) or loaded)
    lessons.lesson_base(name)
    assert asked == settings
    asked.clear(); lessons.lesson_base(name, offload="sequential"); assert asked["offload"] == "sequential"


def test_a_folder_is_loaded_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(lessons, "load_base", lambda name, **k: name)
    assert lessons.lesson_base(str(tmp_path)) == str(tmp_path)


# ------------------------------------------------------------------------------------------ pictures and files
@pytest.fixture
def colab(monkeypatch, tmp_path):
    "Colab's file functions: what is sent, and what was saved."
    files = types.SimpleNamespace(sent={}, saved=[])
    files.upload, files.download = (lambda: files.sent), files.saved.append
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(files=files))
    monkeypatch.chdir(tmp_path)
    return files


def test_uploaded_pictures(colab):
    colab.sent["../a b.jpg"] = (lessons.lesson_pictures() / "0.jpg").read_bytes()
    folder = lessons.lesson_pictures("upload")
    assert [p.name for p in find_pictures(folder)] == ["a b.jpg"] and os.listdir(".") == ["pictures"]


@pytest.mark.parametrize("how, says", [(dict(folder="nowhere"), "nowhere"), (dict(bundled="subjects/teepot"), "teapot")])
def test_pictures_that_are_not_there(how, says):
    with pytest.raises(LoraError, match=says): lessons.lesson_pictures(**how)


def test_files_are_downloaded_on_colab(colab):
    photo = lessons.lesson_pictures() / "0.jpg"
    assert list(lessons.take_away(photo)) == [str(photo)] and colab.saved == [str(photo)]
    with pytest.raises(DataError, match="nothing.bin is not there"): lessons.take_away("nothing.bin")


def test_offline_there_is_no_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not lessons.hub_answers()
