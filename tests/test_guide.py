"The how-to pages and the README: every command that they print can be typed, and runs in order on the embedded bases."
import json, re, shlex, shutil
from pathlib import Path
import pytest

from lora_nb.cli import full_name, main
from lora_nb.cli.flags import COMMANDS, terminal
from lora_nb.core import data_path

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "nbs/guide").glob("*.ipynb"))
HOW_TO = [p for p in PAGES if int(p.name[:2]) >= 10]


def markdown(path):
    if path.suffix == ".md": return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def commands(path):
    "(name, words) of each of our commands in the shell blocks of a page."
    found = []
    for block in re.findall(r"(?ms)^```(?:sh|bash)\n(.*?)^```", markdown(path)):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:2] == ["accelerate", "launch"] or words[:1] == ["torchrun"]: words = words[words.index("lora_nb.cli") + 1:]
            if words[:2] == ["python", "-m"] and words[2:3] in (["lora_nb"], ["lora_nb.cli"]): words = words[3:]
            if words[:1] == ["lora_nb"]: words = words[1:]
            if words and full_name(words[0]) in COMMANDS: found.append((full_name(words[0]), words[1:]))
    return found


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda p: p.stem)
def test_commands_can_be_typed(page):
    for name, words in commands(page):
        code, text = terminal(COMMANDS[name].parser().parse_args, *words)
        assert code == 0, f"{name} {' '.join(words)}: {text}"


@pytest.mark.parametrize("page", HOW_TO, ids=lambda p: p.stem)
def test_a_page_says_what_one_needs(page):
    "A command, ten lines of Python that run, memory and time, and what to do if it goes wrong."
    text = markdown(page)
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    shown = ["".join(c["source"]) for c in cells if c["cell_type"] == "code" and "#| hide" not in "".join(c["source"])]
    assert commands(page) and "## Memory and time" in text
    assert "## If it goes wrong" in text or "## The causes" in text
    assert any(3 <= len(code.splitlines()) <= 16 for code in shown) or page.stem == "19_several_gpus"
    known = {n for c in COMMANDS.values() for group in c.groups.values() for f in group for n in (f.name, *f.also.split())}
    assert not set(re.findall(r"`--(\w+)", text)) - known


# what stands for a real base here, and what makes a run short
EMBEDDED = {"sdxl": "tiny-sd", "sd1.5": "tiny-sd", "sd3.5-medium": "tiny-sd3", "sd3.5-large": "tiny-sd3", "tuned.safetensors": "tuned"}
SHORT = {"lora_dreambooth": ["--max_train_steps", "1", "--train_batch_size", "1", "--device", "cpu"],
         "lora_pti": ["--max_train_steps_ti", "1", "--max_train_steps_tuning", "1", "--train_batch_size", "1", "--device", "cpu"],
         "lora_generate": ["--num_images", "1", "--num_inference_steps", "1", "--device", "cpu"],
         "lora_evaluate": ["--num_images", "2", "--num_inference_steps", "1", "--device", "cpu"],
         "demo": ["--steps", "1", "--pictures", "2", "--num_inference_steps", "1", "--num_class_images", "1", "--device", "cpu"]}


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder with what the pages start from."
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data_path("subjects", "teddy_bear"), "photos")
    for new, name in dict(lora="jack-o-lantern", big="jack-o-lantern", a="jack-o-lantern", b="neon").items():
        shutil.copy(data_path("loras", f"{name}.safetensors"), f"{new}.safetensors")
    terminal(COMMANDS["lora_convert"], "lora.safetensors", "civitai.safetensors", "--format", "kohya")
    return tmp_path


@pytest.mark.parametrize("page", HOW_TO, ids=lambda p: p.stem)
def test_commands_run_in_order_on_the_embedded_bases(page, place):
    from lora_nb.checkpoints import merge_checkpoint
    for name, words in commands(page):
        if "tuned.safetensors" in words: merge_checkpoint("tiny-sd", "lora.safetensors", "tuned")
        words = [EMBEDDED.get(w, w) for w in words]
        if name == "lora_ppim":                                                   # the embedded bases are small: so are their pictures
            words = [("embedded" if before == "--preset" else w) for before, w in zip(["", *words], words)]
        if "--clip" in words: del words[(i := words.index("--clip")):i + 2]      # an embedded base brings its own judge
        short = [*SHORT.get(name, []), *(["--num_class_images", "1"] if "--class_prompt" in words else [])]       # the last of a flag counts
        code, text = terminal(main, name, *words, *short)
        assert code == 0, f"{name} {' '.join(words)}: {text}"


def test_tasks_are_found_first():
    "The words that people search for are in the titles of the how-to pages, and the site lists these pages before the chapters."
    titles = {p.stem: markdown(p).partition("\n")[0].lower() for p in HOW_TO}
    asked = {"train own photos sdxl": "10_photos", "train style": "11_style", "train face": "12_face", "several subjects": "13_several",
             "lora civitai diffusers": "14_civitai", "lora no effect": "15_no_effect", "lora smaller": "16_smaller",
             "merge checkpoint": "17_merge", "four steps": "18_four_steps", "train several gpus": "19_several_gpus",
             "train without gpu": "20_cpu"}
    for query, page in asked.items():
        best = max(titles, key=lambda p: sum(w in re.findall(r"\w[\w.]*", titles[p]) for w in query.split()))
        assert best == page, (query, best)
