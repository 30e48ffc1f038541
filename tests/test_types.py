"What an editor sees: the README's program has no error, and typical mistakes are found."
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


def errors(folder, program):
    "Messages of the type checker about a program."
    (folder / "program.py").write_text(program)
    (folder / "pyrightconfig.json").write_text(json.dumps(dict(typeCheckingMode="standard", extraPaths=[str(ROOT)])))
    checker = shutil.which("basedpyright", path=str(Path(sys.executable).parent)) or shutil.which("basedpyright")
    if not checker: pytest.fail("basedpyright is missing: pip install -e '.[dev]'")
    p = subprocess.run([checker, "--outputjson", "--pythonpath", sys.executable, "-p", str(folder)], capture_output=True, text=True)
    return [d["message"] for d in json.loads(p.stdout)["generalDiagnostics"] if d["severity"] == "error"]


def test_the_programs_of_the_readme_have_no_error(tmp_path):
    programs = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert programs
    assert not (found := errors(tmp_path, "\n".join(programs))), found


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_typical_mistake_is_found(tmp_path, mistake):
    program, word = MISTAKES[mistake]
    assert any(word in m for m in errors(tmp_path, program)), errors(tmp_path, program)
