"The commands as a person meets them: quick answers, hints, settings from a file, reports for programs, lines that a terminal can show."
import json, os, subprocess, sys, tomllib
from pathlib import Path
import pytest
import torch
from PIL import Image

import lora_nb.drawing
from lora_nb.cli import door, full_name, main
from lora_nb.cli.draw import lora_evaluate, lora_generate
from lora_nb.cli.files import add_command, lora_convert, lora_info, lora_memory, lora_resize
from lora_nb.cli.flags import BASE_NAMES, COMMANDS, QUANTIZE_NAMES, bundled, plain, terminal, text_table
from lora_nb.recipe_file import toml_value
from lora_nb.cli.train import lora_dreambooth, lora_pti, lora_ti
from lora_nb.core import data_path, printable
from lora_nb.lora import Lora

ROOT = Path(__file__).resolve().parent.parent
BEAR = data_path("subjects", "teddy_bear")
NEON, PUMPKIN = (data_path("loras", f"{n}.safetensors") for n in ("neon", "jack-o-lantern"))
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
SHORT = ("--instance_data_dir", BEAR, "--device", "cpu", "--train_batch_size", 2, "--targets", "attention", "--lora_rank", 2)


def works(command, *argv):
    code, text = terminal(command, *argv)
    assert code == 0, text
    return text


def refused(command, *argv):
    code, text = terminal(command, *argv)
    assert code == 2 and text and "\n" not in text, (code, text)
    return text


def same(a, b):
    "Two LoRAs, bit for bit."
    a, b = Lora.load(a), Lora.load(b)
    assert list(a.layers) == list(b.layers) and a.embeddings.keys() == b.embeddings.keys()
    assert all(torch.equal(x, y) for n in a.layers for x, y in zip(a.layers[n].tensors, b.layers[n].tensors))
    assert all(torch.equal(v, b.embeddings[t][c]) for t, e in a.embeddings.items() for c, v in e.items())


# ------------------------------------------------------------------------------------------ quick answers
QUICK = [["--help"], ["--version"], ["info", "--help"], ["lora_dreambooth", "--help-all"], ["inof"], ["memory", "--version"],
         ["dreambooth", "--lora_ran", "4"], ["dreambooth", "--instance_data_dir", "nowhere", "--instance_prompt", "x"],
         ["dreambooth", "--instance_data_dir", str(BEAR), "--instance_prompt", "x", "--pretrained_model_name_or_path", "tiny"],
         ["dreambooth", "--instance_data_dir", str(BEAR), "--instance_prompt", "x", "--class_prompt", "y"],
         ["pti", "--instance_data_dir", str(BEAR), "--output_dir", "x", "--words_turn", "3"],
         ["generate", "--prompt", "x", "--lora", "noen"], ["generate", "--num_images", "0"], ["info", "absent.safetensors"],
         ["convert", "absent.safetensors", "x.safetensors"], ["evaluate", "--lora", "absent", "--instance_data_dir", "x"],
         ["memory", "sdxx"], ["distill", "--base_model", "sd1.6", "--target_model", "x/y"], ["dreambooth", "--config", "absent.toml"],
         ["studio", "--help"], ["studio", "--port", "0"], ["studio", "--lora", "noen"], ["lora_studio", "--theme", "drak"], ["live", "--help"],
         ["live", "serve", "--no_training"], ["live", "--port", "8000"], ["live", "export", "--lora", "absent.safetensors"]]


def test_answers_need_no_pytorch(tmp_path):
    "Help, versions and usage errors of all kinds, in one fresh Python: nothing heavy is imported."
    program = ("import sys, json, time; from lora_nb.cli import main\n"
               "for words in json.loads(sys.argv[1]):\n"
               "    try: main(words)\n"
               "    except SystemExit as e: code = e.code\n"
               "    heavy = [m for m in ('torch', 'numpy', 'diffusers', 'transformers', 'PIL') if m in sys.modules]\n"
               "    if heavy: print('HEAVY', words, heavy); break\n"
               "print('seconds', time.process_time())")
    r = subprocess.run([sys.executable, "-c", program, json.dumps(QUICK)], capture_output=True, text=True, env=ENV, cwd=tmp_path)
    assert r.returncode == 0 and "HEAVY" not in r.stdout, r.stdout[-2000:] + r.stderr[-2000:]
    assert float(r.stdout.rsplit(" ", 1)[1]) < .5                     # of processor time, for all of them


@pytest.mark.parametrize("words, said", [
    (["lora_inof"], "lora_info"), (["dreambooth", "--lora_rnk", 4], "--lora_rank"), (["memory", "sdlx"], "sdxl"),
    (["generate", "--prompt", "x", "--lora", "jack-o-lanter"], "jack-o-lantern"), (["generate", "--together", "swich"], "switch"),
    (["convert", "a", "b", "--format", "khoya"], "kohya")])
def test_hints(words, said): assert f"Did you mean {said}?" in refused(main, *words)


def test_a_file_of_nearly_that_name(tmp_path):
    (tmp_path / "bear.safetensors").touch()
    assert f"Did you mean {tmp_path / 'bear.safetensors'}?" in refused(lora_info, tmp_path / "baer.safetensors")


def test_names_are_those_of_the_chapters():
    "Names are written out in the tables, so that hints need no PyTorch."
    from lora_nb.families import HUB
    from lora_nb.loading import embedded_bases
    from lora_nb.studio.easel import bundled_files
    assert set(BASE_NAMES) == {*embedded_bases(), *HUB}
    from lora_nb.quantize import PACKINGS
    assert list(QUANTIZE_NAMES) == list(PACKINGS)
    assert set(bundled("loras")) >= {*bundled_files("tiny-sd"), *bundled_files("tiny-sd3")}
    assert {"teapot", "octopus"} <= set(bundled("subjects")) and "neon" in bundled("styles")


def test_one_door():
    r = subprocess.run([sys.executable, "-m", "lora_nb", "memory", "--version"], capture_output=True, text=True, env=ENV)
    assert r.returncode == 0 and r.stdout.startswith("lora_nb"), r.stderr
    assert all(full_name(n.removeprefix("lora_")) == n for n in COMMANDS)
    import configparser
    ini = configparser.ConfigParser(delimiters=["="]); ini.read(ROOT / "settings.ini", encoding="utf-8")
    scripts = ini["DEFAULT"]["console_scripts"].split()
    assert "lora_nb=lora_nb.cli:main" in scripts and {f"{n}=lora_nb.cli:{n}" for n in COMMANDS if n.startswith("lora_")} <= set(scripts)


def test_completion():
    pytest.importorskip("argcomplete")
    line = "lora_nb lora_generate --toge"
    env = {**ENV, "_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": " ",
           "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    ask = lambda **kw: subprocess.run(f"'{sys.executable}' -m lora_nb 8>&1 9>/dev/null", shell=True, capture_output=True, text=True,
                                      env={**env, **kw}).stdout.split()
    assert ask() == ["--together"]
    line = "lora_nb lora_generate --together s"
    assert set(ask(COMP_LINE=line, COMP_POINT=str(len(line)))) == {"sum", "switch"}
    line = "lora_nb lora_me"
    assert ask(COMP_LINE=line, COMP_POINT=str(len(line))) == ["lora_memory"]


def test_the_door_for_completion_knows_every_command():
    assert list(next(a for a in door()._actions if a.choices).choices) == list(COMMANDS)


# ------------------------------------------------------------------------------------------ settings from a file
def test_a_run_is_repeated_by_one_command(tmp_path):
    first = tmp_path / "first"
    how = ("--max_train_steps", 3, "--learning_rate", "2e-3", "--scale_lr", "--train_text_encoder", "--caption_dropout", ".3", "--seed", 7)
    works(lora_dreambooth, *SHORT, "--instance_prompt", "a sks toy", "--with_prior_preservation", "--class_prompt", "a toy",
          "--num_class_images", 2, *how, "--output_dir", first)
    kept = tomllib.loads((first / "recipe.toml").read_text())
    assert kept["command"] == "lora_dreambooth" and kept["recipe"]["learning_rate"] > 2e-3 and "scale_lr" not in kept
    works(lora_dreambooth, "--config", first / "recipe.toml", "--output_dir", tmp_path / "again")
    same(first / "lora.safetensors", tmp_path / "again/lora.safetensors")
    again = tomllib.loads((tmp_path / "again/recipe.toml").read_text())
    assert again.pop("output_dir") != kept.pop("output_dir") and again == kept
    works(lora_dreambooth, f"--config={first / 'recipe.toml'}", "--max_train_steps", 2, "--lora_rank", 3, "--output_dir", tmp_path / "other")
    other = tomllib.loads((tmp_path / "other/recipe.toml").read_text())["recipe"]
    assert {k for k in other if other[k] != kept["recipe"][k]} == {"steps", "rank"}


def test_words_and_pivots_are_repeated(tmp_path):
    words = ("--placeholder_tokens", "<bear>", "--initializer_tokens", "toy", "--max_train_steps_ti", 2)
    works(lora_ti, *SHORT[:6], *words, "--use_template", "object", "--vectors", 2, "--output_dir", tmp_path / "ti")
    works(lora_ti, "--config", tmp_path / "ti/recipe.toml", "--output_dir", tmp_path / "ti2")
    same(tmp_path / "ti/learned_embeds.safetensors", tmp_path / "ti2/learned_embeds.safetensors")
    works(lora_pti, *SHORT, *words, "--max_train_steps_tuning", 2, "--lora_scale", ".5", "--continue_inversion", "--clip_ti_decay=False",
          "--lr_scheduler", "linear", "--class_prompt", "a toy", "--prior", "prediction", "--output_dir", tmp_path / "pti")
    works(lora_pti, "--config", tmp_path / "pti/recipe.toml", "--output_dir", tmp_path / "pti2")
    same(tmp_path / "pti/lora.safetensors", tmp_path / "pti2/lora.safetensors")
    assert (tmp_path / "pti/log.json").read_text() and Lora.load(tmp_path / "pti2/lora.safetensors").metadata["trigger"]


@pytest.mark.parametrize("text, said", [
    ("instance_prmpt = 'x'", "no flag 'instance_prmpt'. Did you mean instance_prompt?"), ("lora_rank = 0", "at least 1"),
    ("lora_rank = [1, 2]", "takes one value"), ("lora_rank = true", "whole number"), ("command = 'lora_ti'", "is for lora_ti"),
    ("flip = 'perhaps'", "True or False"), ("rank = 'x' y", "is not TOML"), ("[recipe]\nlearning_rat = 1e-3", "learning_rate"),
    ("[recipe]\nrank = 0", "rank = 0"), ("recipe = 3", "expected a table"), ("config = 'x'", "no flag 'config'"), ("json = 3", "true or false"),
    ("[recipe]\nrank = 'many'", "a whole number")])
def test_files_that_cannot_be_meant(text, said, tmp_path, monkeypatch):
    import lora_nb.loading
    monkeypatch.setattr(lora_nb.loading, "load_base", lambda *a, **kw: pytest.fail("a base was loaded"))
    file = tmp_path / "recipe.toml"; file.write_text(text)
    assert said in refused(lora_dreambooth, "--config", file, *SHORT[:2], "--instance_prompt", "x", "--output_dir", tmp_path / "out")


def test_a_file_written_by_hand(tmp_path):
    "Aliases, lists and switches; required flags may stand in the file; none is none."
    file = tmp_path / "mine.toml"
    file.write_text(f"train_data_dir = {toml_value(str(BEAR))}\ninstance_prompt = 'a sks toy'\nrank = 4\nflip = true\n"
                    "[recipe]\nsnr_gamma = 'none'")
    from lora_nb.cli.runs import settings_of
    a = lora_dreambooth.parse(["--config", str(file), "--lora_rank", "8"])
    assert settings_of(a, lora_dreambooth) == {"snr_gamma": None, "rank": 8, "flip": True, "seed": 0, "checkpoint_every": 0}
    assert a.instance_data_dir == str(BEAR)


def test_a_prompt_that_is_also_a_folder(tmp_path, monkeypatch):
    "Paths are written whole; a text stays a text, even if there is a folder of that name."
    monkeypatch.chdir(tmp_path); (tmp_path / "toy").mkdir(); (tmp_path / "bears").symlink_to(BEAR)
    from lora_nb.cli.runs import recipe_toml
    from lora_nb.recipe import Recipe
    a = lora_dreambooth.parse(["--instance_data_dir", "bears", "--instance_prompt", "toy", "--output_dir", "new", "--preview_prompt", ""])
    kept = tomllib.loads(recipe_toml(a, lora_dreambooth, Recipe()))
    assert kept["instance_prompt"] == "toy" and kept["pretrained_model_name_or_path"] == "tiny-sd"
    assert Path(kept["instance_data_dir"]).is_absolute()


def test_python_leaves_the_same_file(tmp_path):
    "A run of Python is repeated by the command that its recipe.toml names; what no file can hold is named there."
    from lora_nb import load_base, train_dreambooth, train_pti, train_textual_inversion
    from lora_nb.recipe_file import read_recipe
    base = load_base("tiny-sd", "cpu")
    lora = train_dreambooth(base, BEAR, "a sks toy", class_prompt="a toy", prior="prediction", steps=2, batch_size=1, seed=5,
                            output_dir=tmp_path / "db")
    works(lora_dreambooth, "--config", tmp_path / "db" / "recipe.toml", "--output_dir", tmp_path / "again", "--device", "cpu")
    again = Lora.load(tmp_path / "again" / "lora.safetensors")
    assert lora.layers == again.layers and read_recipe(tmp_path / "again" / "recipe.toml") == read_recipe(tmp_path / "db" / "recipe.toml")
    train_textual_inversion(base, BEAR, "<bear>", "toy", steps=1, output_dir=tmp_path / "ti")
    a = lora_ti.parse(["--config", str(tmp_path / "ti" / "recipe.toml")])
    assert (a.placeholder_tokens, a.instance_data_dir, a.seed) == ("<bear>", str(BEAR), 0)
    picture = Image.open(BEAR / "0.jpg")
    train_pti(base, [picture], "<bear>", "toy", steps=1, ti_steps=0, class_noun="toy", output_dir=tmp_path / "pti")
    text = (tmp_path / "pti" / "recipe.toml").read_text()
    assert "not in this file: instance_data_dir" in text
    assert "instance_data_dir" in refused(lora_pti, "--config", tmp_path / "pti" / "recipe.toml")
    a = lora_pti.parse(["--config", str(tmp_path / "pti" / "recipe.toml"), "--instance_data_dir", str(BEAR)])
    assert (a.class_noun, a.recipe["ti_steps"]) == ("toy", 0)


# ------------------------------------------------------------------------------------------ reports for programs
def test_reports_as_json(tmp_path, capsys):
    def report(command, *argv):
        capsys.readouterr()
        command([*map(str, argv), "--json"])
        return json.loads(capsys.readouterr().out)
    assert report(lora_info, NEON)["triggers"] == ["<neon>"]
    need = report(lora_memory, "tiny-sd")
    assert need["bytes"] == max(sum(rows.values()) for rows in need["phases"].values())
    made = report(lora_convert, NEON, tmp_path / "k.safetensors", "--format", "kohya")
    assert made["layers"] == len(Lora.load(NEON)) and made["bytes"] == Path(made["file"]).stat().st_size and made["notes"]
    own = report(lora_convert, NEON, tmp_path / "own.safetensors", "--format", "kohya", "--own_alphas")
    assert own["layers"] == made["layers"] and not any("one_alpha" in n or "left_out=" in n for n in own["notes"] + made["notes"])
    small = report(lora_resize, PUMPKIN, tmp_path / "s.safetensors", "--rank", 2)
    assert small["rank"] == 2 and 0 < small["error"] < 1
    assert Path(report(add_command, NEON, PUMPKIN, tmp_path / "sum.safetensors")["file"]).exists()
    few = ("--num_inference_steps", 1, "--device", "cpu", "--output_dir", tmp_path)
    drawn = report(lora_generate, "--prompt", "a cat face", "--num_images", 2, *few)
    assert [x["seed"] for x in drawn["files"]] == [0, 1] and all(Path(x["file"]).exists() for x in drawn["files"])
    made = report(lora_dreambooth, *SHORT, "--instance_prompt", "a sks toy", "--max_train_steps", 1, "--output_dir", tmp_path / "db")
    assert made["steps"] == 1 and all(Path(made[k]).exists() for k in ("loss", "log", "config")) and Path(made["files"][0]).exists()


def test_an_evaluation_shows_one_bar_and_reports_as_json(tmp_path, capsys, monkeypatch):
    bars = watch_bars(monkeypatch)
    lora_evaluate([str(x) for x in ("--lora", NEON, "--subject", "neon", "--instance_data_dir", data_path("styles", "neon"), "--num_images", 2,
                   "--num_inference_steps", 2, "--device", "cpu", "--output_dir", tmp_path, "--json")])
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"].keys() == json.loads((tmp_path / "evaluation.json").read_text())["metrics"].keys()
    assert len(bars) == 2 and all(b["total"] == b["done"] > 4 for b in bars), bars          # the base, then the base with the LoRA


def watch_bars(monkeypatch):
    bars = []
    class Bar:
        def __init__(self, iterable=None, total=None, desc="", **kw): bars.append(dict(total=total, desc=desc, done=0))
        def __enter__(self): return self
        def __exit__(self, *e): pass
        def update(self, n=1): bars[-1]["done"] += n
    monkeypatch.setattr(lora_nb.drawing, "progress", Bar)
    return bars


def test_class_pictures_show_one_bar(monkeypatch):
    from lora_nb.dreambooth import class_pictures
    bars = watch_bars(monkeypatch)
    class_pictures("tiny-sd", "a toy", 5, batch_size=2, steps=2)
    assert bars == [dict(total=6, desc="class pictures", done=6)]


# ------------------------------------------------------------------------------------------ lines that a terminal can show
RED = "\x1b[31mred\u202e"


def test_control_characters_are_spelled_out(tmp_path):
    assert not [c for c in map(chr, range(sys.maxunicode + 1)) if printable(c) != plain(c) and c not in "\r"]
    odd = tmp_path / f"{RED}.safetensors"
    odd.write_bytes(NEON.read_bytes())
    texts = [works(lora_info, odd), works(lora_convert, odd, tmp_path / f"{RED}2.safetensors", "--format", "kohya"),
             works(add_command, odd, NEON, tmp_path / f"{RED}3.safetensors"),
             works(lora_resize, odd, tmp_path / f"{RED}4.safetensors", "--rank", 1),
             works(lora_generate, "--prompt", RED.replace("[", r"\["), "--num_images", 1, "--num_inference_steps", 1, "--device", "cpu",
                   "--output_dir", tmp_path / RED),
             refused(lora_info, tmp_path / f"{RED}.absent"), refused(main, RED), refused(lora_info, NEON, f"--{RED}"),
             refused(lora_dreambooth, *SHORT, "--instance_prompt", "x", "--resume_from_checkpoint", RED)]
    for text in texts: assert "\x1b" not in text and "\u202e" not in text
    assert all("\\x1b[31mred\\u202e" in text for text in texts[:7])


def test_errors_of_the_system_and_warnings(tmp_path):
    import warnings
    from lora_nb.cli.flags import Command
    def fails(a): open(f"{tmp_path}/{RED}/x")
    def warns(a): warnings.warn(RED, stacklevel=1)
    for work in (fails, warns):
        text = terminal(Command("odd", work, {}, {}))[1]
        assert "\\x1b[31mred" in text and "\x1b" not in text


def test_a_terminal_without_unicode_and_a_reader_that_leaves(tmp_path):
    ask = [sys.executable, "-m", "lora_nb", "info", str(NEON)]
    r = subprocess.run(ask, capture_output=True, env={**ENV, "PYTHONIOENCODING": "ascii"})
    assert r.returncode == 0 and b"\\u2588" in r.stdout and not r.stderr, r.stderr[-500:]
    p = subprocess.Popen(ask, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV)
    p.stdout.close()
    assert b"Traceback" not in p.stderr.read() and p.wait() == 1


def test_no_command_prints_past_say():
    import ast
    for file in (ROOT / "lora_nb/cli").glob("*.py"):
        calls = [n.lineno for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call) and ast.unparse(n.func) == "print"]
        assert len(calls) == (file.name == "flags.py"), (file.name, calls)


def test_tables_fit_a_terminal():
    for text in (works(lora_memory, "sd3.5-large"), works(lora_memory, "sdxl", "--task", "generate"), works(lora_info, PUMPKIN)):
        assert all(len(line) <= 80 for line in text.splitlines()), text
    table = text_table(["", "n", "why"], [["a", "1.5", "word " * 30], ["bcd", "10", ""]], 60)
    assert all(len(line) <= 60 for line in table.splitlines()) and "bcd   10" in table
