"The programs for large machines, on tiny pipelines"
import importlib.util, json, sys
from pathlib import Path

import pytest

from lora_nb.families import as_base
from lora_nb.injection import extract_lora, inject_lora
from lora_nb.lora import Lora
from lora_nb.random_pipes import random_pipe

TOOLS = Path(__file__).parent.parent / "tools"


def tool(name):
    sys.path.insert(0, str(TOOLS))
    try:
        spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
        module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
        return module
    finally: sys.path.remove(str(TOOLS))


def test_true_size_runs_on_tiny_pipelines(capsys):
    assert tool("true_size").main(["--tiny", "--bases", "sd1.5", "z-image"]) == 0
    said = capsys.readouterr().out
    assert "'base': 'sd1.5'" in said and "'base': 'z-image'" in said and "FAILED" not in said


def test_true_size_tells_a_failure(monkeypatch, capsys):
    t = tool("true_size")
    monkeypatch.setattr(t, "pipeline", lambda *a: 1 / 0)
    assert t.main(["--tiny", "--bases", "sd1.5"]) == 1 and "FAILED ZeroDivisionError" in capsys.readouterr().out


def test_a_layer_that_diffusers_does_not_place_is_noticed(tmp_path):
    t, base = tool("true_size"), as_base(random_pipe("sd"))
    worn = inject_lora(base.denoiser, "attention", rank=2); lora = extract_lora(base.pipe); worn.remove()
    few = Lora(dict(list(lora.layers.items())[1:]))
    few.save(tmp_path / "few.safetensors")
    assert t.worn_by_diffusers(base.pipe, tmp_path / "few.safetensors", few) == len(few.layers)
    with pytest.raises(AssertionError, match="placed"): t.worn_by_diffusers(base.pipe, tmp_path / "few.safetensors", lora)


def test_the_benchmark_of_whole_pipelines_runs_on_tiny_ones(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    assert tool("bench_gpu").main(["--tiny", "--models", "medium", "--batches", "1", "--rounds", "1", "--pipelines", "sd1.5",
                                   "--output", str(tmp_path)]) == 0
    rows = [r for r in json.loads((tmp_path / "03_gpu.json").read_text())["rows"] if "pipeline" in r]
    assert not [r for r in rows if "error" in r], rows
    done = {r["work"] for r in rows}
    assert {"encode a picture", "encode a caption", "draw, 20 steps", "step", "step, compiled", "step, checkpointing"} <= done
    assert any("fp8" in w for w in done) and "| sd1.5 | step, compiled |" in (tmp_path / "03_gpu.md").read_text()
