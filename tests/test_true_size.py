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


class Clock:
    "A clock that moves when it is told"
    def __init__(self): self.t = 0.
    def __call__(self): return self.t


def test_a_budget_leaves_out_what_does_not_fit():
    b = tool("bench_gpu"); clock = Clock(); budget = b.Budget(100, clock)
    assert budget.refuses(100) == "" and "left out: about 101 s, and 100 s are left" == budget.refuses(101)
    clock.t = 95; assert budget.refuses(5) == "" and "5 s are left" in budget.refuses(6)
    clock.t = 130; assert "and 0 s are left" in budget.refuses(1) and b.Budget(None, clock).refuses(1e9) == ""


def test_rows_that_do_not_fit_are_named_and_small_ones_still_run(monkeypatch):
    b, clock, ran = tool("bench_gpu"), Clock(), []
    device = b.torch.device("cpu")
    def takes(what, s):
        def work(): clock.t += s / 2; ran.append(what)                      # once to warm up, once to measure
        return what, lambda: (work, lambda: None)
    monkeypatch.setattr(b, "works", lambda *a: iter([takes("encode a picture", 20), takes("step, compiled", 300), takes("step", 10)]))
    monkeypatch.setattr(b, "now", lambda d: clock.t)
    args = b.parser().parse_args(["--check"]); args.steps = 1
    rows = [*b.pipeline_rows("sdxl", args, device, b.Budget(120, clock))]
    assert [r["work"] for r in rows] == ["encode a picture", "step, compiled", "step"] and set(ran) == {"encode a picture", "step"}
    assert "left out: about 150 s, and 100 s are left" == rows[1]["error"] and rows[2]["seconds"] == 5
    assert "| sdxl | step, compiled | left out: about 150 s" in b.pipeline_report(rows) and clock.t <= 120


def test_steps_beside_the_peer_are_budgeted(monkeypatch):
    b, clock = tool("bench_gpu"), Clock()
    monkeypatch.setattr(b, "measure", lambda *a: (setattr(clock, "t", clock.t + 30), ([1.], None))[1])
    monkeypatch.setattr(b, "operations", lambda config: 1e12); monkeypatch.setattr(b, "transformer", lambda *a: b.torch.nn.Linear(1, 1))
    args = b.parser().parse_args(["--tiny", "--rounds", "1", "--steps", "4", "--batches", "1", "4"])
    rows = [*b.rows_of("medium", args, None, None, 1e12, b.Budget(150, clock))]     # 1 s a step at the full rate, 4 s expected
    ran = [(r["batch"], r["checkpointing"]) for r in rows if "error" not in r]
    assert ran == [(1, True), (1, True), (1, False), (1, False)] and clock.t == 120
    assert [(r["batch"], r["side"]) for r in rows if "left out" in r.get("error", "")] == [(4, "both"), (4, "both")]
    assert all(b.KINDS.keys() >= {"load"} and n in b.SIZE for n in b.PIPELINES)
