"What an editor sees: the programs of the README and the guide have no error, and typical mistakes are found."
import json, re, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent

MISTAKES = {
    "misspelt argument": ("from lora_nb import apply_lora, load_base\napply_lora(load_base('tiny-sd'), 'x.safetensors', scal=1.)", "scal"),
    "misspelt method": ("from lora_nb import load_base\nload_base('tiny-sd').generat(['a cat'])", "generat"),
    "misspelt name": ("from lora_nb import aply_lora", "aply_lora"),
    "unknown mode": ("from lora_nb import apply_lora, load_base\napply_lora(load_base('tiny-sd'), 'x.safetensors', mode='merged')", "merged"),
    "misspelt method of a LoRA": ("from lora_nb import Lora\nLora.load('x.safetensors').savee('y')", "savee"),
}


def errors(folder, programs):
    "Messages of the type checker about each program; `programs` maps a name to Python, all are checked in one run."
    for i, program in enumerate(programs.values()): (folder / f"program{i}.py").write_text(program)
    (folder / "pyrightconfig.json").write_text(json.dumps(dict(typeCheckingMode="standard", extraPaths=[str(ROOT)])))
    checker = shutil.which("basedpyright", path=str(Path(sys.executable).parent)) or shutil.which("basedpyright")
    if not checker: pytest.fail("basedpyright is missing: pip install -e '.[dev]'")
    p = subprocess.run([checker, "--outputjson", "--pythonpath", sys.executable, "-p", str(folder)], capture_output=True, text=True)
    report = json.loads(p.stdout)
    assert report["summary"]["filesAnalyzed"] == len(programs), report["summary"]
    found = {name: [] for name in programs}
    for d in report["generalDiagnostics"]:
        if d["severity"] == "error": found[list(programs)[int(Path(d["file"]).stem[7:])]].append(d["message"])
    return found


def programs(page):
    "The Python of a page: its code cells, one program, and each program shown in its text."
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    text = lambda kind: ["".join(c["source"]) for c in cells if c["cell_type"] == kind]
    shown = [p for t in text("markdown") for p in re.findall(r"```python\n(.*?)```", t, re.S)]
    return ["\n".join(s for s in text("code") if not s.startswith(("!", "%"))), *shown]


def test_the_programs_of_the_readme_and_the_guide_have_no_error(tmp_path):
    guide = {f"{page.stem} {i}": p for page in sorted((ROOT / "nbs/guide").glob("*.ipynb")) for i, p in enumerate(programs(page)) if p.strip()}
    readme = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert readme and len(guide) >= 5
    found = errors(tmp_path, guide | {"README": "\n".join(readme)})
    assert not any(found.values()), "\n".join(f"{name}: {m}" for name, ms in found.items() for m in ms)


def test_typical_mistakes_are_found(tmp_path):
    found = errors(tmp_path, {name: program for name, (program, _) in MISTAKES.items()})
    missed = {name: found[name] for name, (_, word) in MISTAKES.items() if not any(word in m for m in found[name])}
    assert not missed, missed
