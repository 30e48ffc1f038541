"The commands at their edges: every flag is used or refused, wrong usage is found before a model is loaded, help needs no PyTorch."
import ast, json, os, shlex, subprocess, sys
from configparser import ConfigParser
from dataclasses import replace
from pathlib import Path
import pytest
import torch
import lora_nb.loading
from PIL import Image

from lora_nb.cli import main
from lora_nb.cli.draw import lora_evaluate, lora_generate
from lora_nb.cli.files import add_command, lora_convert, lora_distill, lora_info, lora_memory, lora_ppim, lora_resize
from lora_nb.cli.flags import COMMANDS, CONFIG, REQUIRED, asks_for_the_same, help_text, terminal
from lora_nb.cli.train import lora_dreambooth, lora_pti, lora_ti
from lora_nb.core import data_path
from lora_nb.lora import Lora
from lora_nb.random_pipes import random_pipe
from lora_nb.studio.code import python_of, read_settings

ROOT = Path(__file__).resolve().parent.parent
BEAR = data_path("subjects", "teddy_bear")
NEON, PUMPKIN = (data_path("loras", f"{n}.safetensors") for n in ("neon", "jack-o-lantern"))
SUBJECT = ("--instance_data_dir", BEAR, "--instance_prompt", "a sks toy", "--device", "cpu", "--train_batch_size", 1, "--max_train_steps", 1)
WORDS = ("--instance_data_dir", BEAR, "--device", "cpu", "--train_batch_size", 1, "--max_train_steps_ti", 1, "--initializer_tokens", "toy")
NAMES = ("lora_dreambooth", "lora_ti", "lora_pti", "lora_generate", "lora_evaluate", "lora_ppim", "lora_info", "lora_convert", "lora_add",
         "lora_resize", "lora_distill", "lora_memory", "lora_studio", "lora_live", "demo")


def works(command, *argv):
    code, text = terminal(command, *argv)
    assert code == 0, text
    return text


def refused(command, *argv):
    "What the command says, in one line and with exit code 2."
    code, text = terminal(command, *argv)
    assert code == 2 and text and "\n" not in text and "Traceback" not in text, (code, text)
    return text


@pytest.fixture
def no_base(monkeypatch):
    "Loading a base fails the test."
    import lora_nb.checkpoints, lora_nb.evaluation, lora_nb.loading, lora_nb.studio      # these import `load_base`, so before it is replaced
    def load_base(*a, **kw): pytest.fail("a base was loaded")
    monkeypatch.setattr(lora_nb.loading, "load_base", load_base)


# ------------------------------------------------------------------------------------------ flags
def uses(node):
    "Attributes read from `a` in a function, and whether it reads all of them."
    names = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "a"}
    return names, any(isinstance(n, ast.Call) and ast.unparse(n) == "vars(a)" for n in ast.walk(node))


def functions():
    trees = [ast.parse((ROOT / "lora_nb/cli" / f"{m}.py").read_text()) for m in ("flags", "runs", "train", "draw", "files", "demo", "pages")]
    return {n.name: n for t in trees for n in t.body if isinstance(n, ast.FunctionDef)}


@pytest.mark.parametrize("name", NAMES)
def test_no_flag_is_accepted_and_forgotten(name):
    c, found = COMMANDS[name], functions()
    reached, todo = set(), [c.work.__name__]
    while todo:
        f = todo.pop()
        if f in reached or f not in found: continue
        reached.add(f)
        todo += [n.id for n in ast.walk(found[f]) if isinstance(n, ast.Name)]
    read, everything = set(), False
    for f in reached:
        names, whole = uses(found[f])
        read |= names; everything |= whole
    settings = bool({"given", "settings_of", "flag_settings"} & reached)
    unread = [f.name for flags in c.groups.values() for f in flags
              if not everything and f.name not in read and not (settings and f.sets) and f != CONFIG]     # Command.parse reads that one
    assert not unread, unread


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_is_explained_once(name):
    c = COMMANDS[name]
    rows = [f for flags in c.groups.values() for f in flags]
    names = [*(f.name for f in rows), *c.old]
    assert len(set(names)) == len(names) and all(f.help for f in rows) and all(o.why and o.do for o in c.old.values())
    text = works(c, "--help-all").replace("\n", " ")
    assert "usage" in text and all(f"--{n}" in text for n in [*c.old, *(f.name for f in rows if not f.place)])


@pytest.mark.parametrize("name", NAMES)
def test_help_begins_with_what_matters_and_fits_a_terminal(name):
    c = COMMANDS[name]
    rows = [f for flags in c.groups.values() for f in flags]
    short, whole = help_text(c, width=80), help_text(c, True, 80)
    shown = [f for f in rows if f"  --{f.name} " in short.replace("\n", " \n") or (f.place and f"  {f.place} " in short)]
    assert len(shown) <= 18 and {f.name for f in rows if f.default is REQUIRED} <= {f.name for f in shown}
    assert set(c.first) <= {f.name for f in rows} and {f.name for f in shown} >= set(c.first)
    assert len(shown) == len(rows) or f"{name} --help-all shows all {len(rows)} flags" in short
    for text in (short, whole):
        lines = text.partition("examples:")[0].splitlines()
        assert "default: None" not in text and all(len(line) <= 80 for line in lines), [x for x in lines if len(x) > 80]
    for example in " ".join(c.examples).replace("\\", "").split(f"{name} ")[1:]:
        flags = [w.partition("=")[0][2:] for w in example.split() if w.startswith("--")]
        assert set(flags) <= {n for f in rows for n in (f.name, *f.also.split())}, example


def recipes():
    from lora_nb.pti import PivotalRecipe
    from lora_nb.recipe import Recipe
    from lora_nb.textual_inversion import InversionRecipe
    return {"lora_dreambooth": Recipe, "lora_ti": InversionRecipe, "lora_pti": PivotalRecipe}


@pytest.mark.parametrize("name", ("lora_dreambooth", "lora_ti", "lora_pti"))
def test_flags_set_settings_that_exist(name):
    recipe = recipes()[name]()
    unknown = [f.sets for flags in COMMANDS[name].groups.values() for f in flags if f.sets and not hasattr(recipe, f.sets)]
    assert not unknown, unknown


OLD = [(n, flag) for n in ("lora_dreambooth", "lora_ti", "lora_pti") for flag in COMMANDS[n].old]


@pytest.mark.parametrize("name, flag", OLD, ids=lambda x: x)
def test_flags_of_the_reference_are_refused_or_named(name, flag, no_base):
    c, old = COMMANDS[name], COMMANDS[name].old[flag]
    need = SUBJECT if name == "lora_dreambooth" else (*WORDS, "--output_dir", "unused")
    for value in old.same:
        code, text = terminal(c.parser().parse_args, *need, f"--{flag}={'x' if value == 'any' else value}")
        assert code == 0 and text == f"{name}: --{flag} changes nothing: {old.why}.", text
    if old.same == ("any",): return
    other = (f"--{flag}",) if not asks_for_the_same(old, True) else (f"--{flag}=False",)
    for spelled in (other, (f"--{flag}", "0.123")):
        text = refused(c, *need, *spelled)
        assert f"--{flag} cannot be honoured: {old.why}. {old.do}." in text, text


@pytest.mark.parametrize("words, expected", [
    (("--train_text_encoder",), True), (("--train_text_encoder=True",), True), (("--train_text_encoder", "False"), False), ((), None)])
def test_switches_are_written_as_people_write_them(words, expected):
    for c, need in ((lora_dreambooth, SUBJECT), (lora_pti, (*WORDS, "--output_dir", "x"))):
        assert c.parser().parse_args([str(w) for w in (*need, *words)]).train_text_encoder is expected


def test_flags_of_other_trainers_are_ours():
    "diffusers' and kohya's names"
    a = lora_dreambooth.parser().parse_args([str(w) for w in (
        *SUBJECT[:4], "--rank", 3, "--network_alpha", 2, "--checkpointing_steps", 7, "--validation_prompt", "x", "--unet_lr", "2e-3",
        "--text_encoder_lr", "1e-3", "--noise_offset", ".05", "--min_snr_gamma", 5, "--random_flip", "--enable_bucket", "--use_dora",
        "--layer_rates", "down_blocks=.5,mid_block=0", "--use_8bit_adam")])
    from lora_nb.cli.runs import settings_of
    s = settings_of(a, lora_dreambooth)
    assert (s["rank"], s["alpha"], s["checkpoint_every"], s["learning_rate"], s["text_learning_rate"]) == (3, 2, 7, 2e-3, 1e-3)
    assert (s["offset_noise"], s["snr_gamma"], s["flip"], s["dora"], s["optimizer"]) == (.05, 5, True, True, "adamw8bit")
    assert s["layer_rates"] == {"down_blocks": .5, "mid_block": 0} and a.buckets and a.preview_prompt == "x"


def test_a_setting_that_no_flag_names_is_the_recipes():
    from types import SimpleNamespace
    from lora_nb.cli.train import dreambooth_recipe, pti_recipe
    from lora_nb.pti import pivotal_recipe_for
    from lora_nb.recipe import recipe_for
    base = SimpleNamespace(family="sd3", flow=True, small=False, resolution=1024, name="x", denoiser=None)
    a = lora_pti.parser().parse_args([str(w) for w in (*WORDS[:2], "--output_dir", "x")])
    assert pti_recipe(a, base) == pivotal_recipe_for(base).replace(seed=42)
    a = lora_dreambooth.parser().parse_args([str(w) for w in SUBJECT[:4]])
    assert dreambooth_recipe(a, base, 5) == recipe_for(base)
    a = lora_dreambooth.parser().parse_args([*(str(w) for w in SUBJECT[:4]), "--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "7"])
    r = dreambooth_recipe(a, base, 5)
    assert (r.lr_schedule, r.warmup) == ("constant", 7)


def test_pti_flags_depend_on_each_other():
    from types import SimpleNamespace
    from lora_nb.cli.train import pti_recipe
    base = SimpleNamespace(family="sd", flow=False, small=False, resolution=512, name="x")
    def recipe(*words): return pti_recipe(lora_pti.parser().parse_args([str(w) for w in (*WORDS[:2], "--output_dir", "x", *words)]), base)
    assert recipe("--perform_inversion=False").ti_steps == 0
    assert recipe("--lr_scheduler", "linear").lr_schedule == "linear" == recipe("--lr_scheduler", "linear").ti_lr_schedule
    assert recipe("--lr_scheduler", "linear", "--lr_scheduler_lora", "cosine").lr_schedule == "cosine"
    assert (recipe("--lr_warmup_steps", 5).warmup, recipe("--lr_warmup_steps", 5, "--lr_warmup_steps_lora", 0).warmup) == (5, 0)
    assert recipe("--continue_inversion", "--learning_rate_ti", "3e-4").tuning_words_learning_rate == 3e-4
    assert recipe("--lora_scale", "0.5", "--lora_rank", 8).alpha == 4 and recipe("--use_extended_lora").targets == "extended"
    assert recipe("--clip_ti_decay=False").norm_prior == 0 and recipe("--use_mask_captioned_data").mask_floor == 0


# ------------------------------------------------------------------------------------------ wrong usage, before a base is loaded
WRONG = {
    "no folder": (lora_dreambooth, (*SUBJECT, "--instance_data_dir", "nowhere"), "No folder nowhere"),
    "no such base": (lora_dreambooth, (*SUBJECT, "--pretrained_model_name_or_path", "tiny-ds"), "Did you mean tiny-sd?"),
    "steps twice": (lora_dreambooth, (*SUBJECT, "--num_train_epochs", 3), "give one of them"),
    "class of nothing": (lora_dreambooth, (*SUBJECT, "--num_class_images", 3), "--with_prior_preservation"),
    "class prompt alone": (lora_dreambooth, (*SUBJECT, "--class_prompt", "a toy"), "--with_prior_preservation"),
    "no class in pti": (lora_pti, (*WORDS, "--output_dir", "x", "--prior", "prediction"), "--class_prompt"),
    "rate of nothing": (lora_pti, (*WORDS, "--output_dir", "x", "--continue_inversion_lr", "1e-3"), "--continue_inversion"),
    "no phase": (lora_pti, (*WORDS, "--output_dir", "x", "--perform_inversion=False"), "--perform_inversion"),
    "regex": (lora_dreambooth, (*SUBJECT, "--targets", "attn["), "regular expression"),
    "encoders": (lora_ti, (*WORDS, "--output_dir", "x", "--encoders", "clip"), "text_encoder_2"),
    "misspelt LoRA": (lora_generate, ("--prompt", "x", "--lora", "noen:0.5"), "Did you mean neon?"),
    "nothing to draw": (lora_generate, ("--lora", "neon"), "--from_png"),
    "size of a page": (lora_generate, ("--prompt", "x", "--size", "999999"), "8 to 16384"),
    "a weight that is none": (add_command, (PUMPKIN, NEON, "x.safetensors", "--lora", f"{NEON}:nan"), "a file and its weight"),
    "rank of a drawing": (lora_memory, ("sd1.5", "--task", "generate", "--rank", 4), "has no effect"),
    "prior without class": (lora_dreambooth, (*SUBJECT, "--with_prior_preservation"), "--class_prompt"),
    "class folder without prior": (lora_dreambooth, (*SUBJECT, "--class_data_dir", "x"), "--with_prior_preservation"),
    "resolution": (lora_dreambooth, (*SUBJECT, "--resolution", 100), "multiple of 8"),
    "epochs": (lora_dreambooth, (*SUBJECT, "--num_train_epochs", 0), "at least 1"),
    "rank": (lora_dreambooth, (*SUBJECT, "--lora_rank", "1.5"), "whole number"),
    "rate": (lora_dreambooth, (*SUBJECT, "--learning_rate", "nan"), "finite number"),
    "half a name": (lora_dreambooth, (*SUBJECT, "--lora_ran", 4), "Did you mean --lora_rank?"),
    "resume file": (lora_dreambooth, (*SUBJECT, "--resume_unet", "absent.safetensors"), "absent.safetensors"),
    "schedule": (lora_ti, (*WORDS, "--output_dir", "x", "--lr_scheduler", "zigzag"), "expected one of linear"),
    "words folder": (lora_ti, (*WORDS, "--output_dir", "x", "--instance_data_dir", "nowhere"), "No folder nowhere"),
    "initialisers": (lora_pti, (*WORDS, "--output_dir", "x", "--initializer_tokens", "a|b|c"), "3 initialisers for 1 words"),
    "no word": (lora_pti, (*WORDS, "--output_dir", "x", "--placeholder_tokens", "<a>||<b>"), "<s1>|<s2>"),
    "switch": (lora_pti, (*WORDS, "--output_dir", "x", "--clip_ti_decay", "perhaps"), "True or False"),
    "template": (lora_pti, (*WORDS, "--output_dir", "x", "--use_template", "objct"), "object"),
    "class": (lora_pti, (*WORDS, "--output_dir", "x", "--class_data_dir", "y"), "--class_prompt"),
    "decay": (lora_pti, (*WORDS, "--output_dir", "x", "--weight_decay_ti", "0.1"), "cannot be honoured"),
    "floor": (lora_pti, (*WORDS, "--output_dir", "x", "--mask_floor", "0.1"), "--use_mask_captioned_data"),
    "turn": (lora_pti, (*WORDS, "--output_dir", "x", "--words_turn", 2), "--mode joint"),
    "alpha twice": (lora_pti, (*WORDS, "--output_dir", "x", "--lora_alpha", 4, "--lora_scale", .5), "give one of them"),
    "layers twice": (lora_pti, (*WORDS, "--output_dir", "x", "--use_extended_lora", "--targets", "attention"), "give one of them"),
    "no gamma": (lora_dreambooth, (*SUBJECT, "--snr_gamma", 0), "above 0"),
    "no alpha": (lora_dreambooth, (*SUBJECT, "--lora_alpha", 0), "expected above 0"),
    "decay below zero": (lora_dreambooth, (*SUBJECT, "--adam_weight_decay", -1), "at least 0"),
    "all dropped": (lora_pti, (*WORDS, "--output_dir", "x", "--lora_dropout_p", 1.5), "below 1"),
    "no scale": (lora_pti, (*WORDS, "--output_dir", "x", "--lora_scale", 0), "above 0"),
    "many vectors": (lora_ti, (*WORDS, "--output_dir", "x", "--vectors", 100), "at most 70"),
    "size of a random word": (lora_ti, (*WORDS, "--output_dir", "x", "--initializer_tokens", "<rand-x>"), "'<rand-0.02>'"),
    "no GPU": (lora_dreambooth, (*SUBJECT, "--device", "cuda:9"), "this machine has"),
    "constant with no warmup": (lora_dreambooth, (*SUBJECT, "--lr_scheduler", "constant_with_warmup"), "--lr_warmup_steps"),
    "the LoRA's warmup": (lora_pti, (*WORDS, "--output_dir", "x", "--lr_scheduler_lora", "constant_with_warmup"), "--lr_warmup_steps_lora"),
    "two optimisers": (lora_ti, (*WORDS, "--output_dir", "x", "--use_8bit_adam", "--optimizer", "adafactor"), "give one of them"),
    "prodigy's rate": (lora_dreambooth, (*SUBJECT, "--optimizer", "prodigy", "--learning_rate", "1e-4"), "expected about 1"),
    "resume as in diffusers": (lora_dreambooth, (*SUBJECT, "--resume_from_checkpoint", "latest"), "Write --resume"),
    "rates of layers": (lora_dreambooth, (*SUBJECT, "--layer_rates", "mid_block"), "down_blocks=0.5"),
    "old words": (lora_pti, (*WORDS, "--output_dir", "x", "--load_pretrained_inversion_embeddings_path", "absent.pt"), "absent.pt"),
    "plain strength": (lora_generate, ("--prompt", "x", "--lora", f"{NEON}:ramp:0:1", "--together", "switch"), "plain strength"),
    "together alone": (lora_generate, ("--prompt", "x", "--lora", NEON, "--together", "composite"), "no effect with 1 LoRA"),
    "together with none": (lora_generate, ("--prompt", "x", "--together", "sum"), "no effect with no LoRA"),
    "half a ramp": (lora_generate, ("--prompt", "x", "--lora", f"{NEON}:ramp:0"), "ramp"),
    "no LoRA": (lora_generate, ("--prompt", "x", "--lora", "none.safetensors"), "none.safetensors"),
    "LoRA twice": (lora_generate, ("--prompt", "x", "--lora", NEON, "--lora", f"{NEON}:2"), "same file twice"),
    "size": (lora_generate, ("--prompt", "x", "--size", "wide"), "1024x768"),
    "no eyes": (lora_evaluate, ("--pretrained_model_name_or_path", "a/b", "--lora", NEON, "--instance_data_dir", BEAR), "--clip"),
    "no pictures": (lora_evaluate, ("--lora", NEON, "--instance_data_dir", "nowhere"), "No folder nowhere"),
    "nothing to measure": (lora_evaluate, ("--lora", "none.safetensors", "--instance_data_dir", BEAR), "none.safetensors"),
    "dialect": (lora_convert, (NEON, "x.safetensors", "--dialect", "sgm", "--base", "tiny-sd"), "--format kohya"),
    "own alphas": (lora_convert, (NEON, "x.safetensors", "--own_alphas"), "--own_alphas is for --format kohya"),
    "absent": (lora_convert, ("absent", "x.safetensors"), "absent"),
    "mode": (add_command, (PUMPKIN, NEON, "x.safetensors", "--mode", "ljl", "--method", "ties"), "--mode lpl"),
    "text": (add_command, ("tiny-sd", NEON, "x.safetensors", "--mode", "upl-ckpt-v2", "--with_text_lora"), "--mode lpl"),
    "rank of a merge": (add_command, ("tiny-sd", NEON, "x", "--mode", "upl", "--rank", 4), "leave it out"),
    "ending": (add_command, ("tiny-sd", NEON, "x.bin", "--mode", "upl-ckpt-v2"), ".ckpt or .safetensors"),
    "no rank": (lora_resize, (NEON, "x.safetensors"), "give one of them"),
    "ranks of a LoRA twice": (lora_resize, (NEON, "x.safetensors", "--rank", 4, "--megabytes", 1), "give one of them"),
    "half a weight": (add_command, (PUMPKIN, NEON, "x.safetensors", "--lora", NEON), "expected a file and its weight"),
    "third of a merge": (add_command, ("tiny-sd", NEON, "x", "--mode", "upl", "--lora", f"{NEON}:1"), "one after the other"),
    "format of a name": (lora_distill, ("--base_model", "tiny-sd", "--target_model", "b/c", "--format", "kohya", "--save_path", "x.pt"),
                         ".safetensors"),
    "ranks twice": (lora_distill, ("--base_model", "tiny-sd", "--target_model", "b/c", "--rank", 4, "--energy", .9), "give one of them"),
    "no file": (lora_info, ("absent.safetensors",), "absent.safetensors"),
    "no base": (lora_memory, ("sd9",), "sd3.5-medium"),
    "no command": (main, ("lora_paint",), "lora_paint"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage_is_refused_before_a_base_is_loaded(case, no_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, words, said = WRONG[case]
    assert said in refused(command, *words)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_what_only_the_base_can_tell(tmp_path):
    out = ("--output_dir", tmp_path / "out")
    assert "10000" in refused(lora_dreambooth, *SUBJECT, *out, "--lora_rank", 10000)
    assert "channels for a hole" in refused(lora_pti, *WORDS, *out, "--train_inpainting")
    assert "offload" in refused(lora_generate, "--prompt", "x", "--offload", "model", "--device", "cpu", *out)
    sd3 = ("--pretrained_model_name_or_path", "tiny-sd3", "--device", "cpu")
    refused(lora_generate, *sd3, "--prompt", "a cat", "--lora", PUMPKIN, *out)           # a UNet's LoRA on a transformer
    assert not list((tmp_path / "out").iterdir())


# ------------------------------------------------------------------------------------------ training
def test_somebody_else_s_log_and_recipe_stay(tmp_path):
    "A log.json of another program was replaced when a training ended"
    out = tmp_path / "run"; out.mkdir()
    (out / "log.json").write_text('{"mine": 1}')
    for _ in range(2): works(lora_dreambooth, *SUBJECT, "--output_dir", out, "--targets", "attention")
    assert (out / "log.json").read_text() == '{"mine": 1}' and json.loads((out / "log-2.json").read_text())["losses"]
    assert sorted(p.name for p in out.glob("*.json")) == ["log-2.json", "log.json"]


def test_dreambooth_writes_old_formats_previews_and_checkpoints_and_goes_on(tmp_path):
    out = tmp_path / "old"
    works(lora_dreambooth, *SUBJECT, "--output_dir", out, "--output_format", "both", "--targets", "attention",
          "--preview_prompt", "a sks toy", "--save_steps", 1)
    assert {"previews.jpg", "lora.safetensors", "lora.pt", "loss.svg", "log.json"} <= {p.name for p in out.iterdir()}
    works(lora_dreambooth, *SUBJECT, "--output_dir", out, "--output_format", "both", "--targets", "attention", "--resume",
          "--max_train_steps", 2)
    assert json.loads((out / "log.json").read_text())
    works(lora_dreambooth, *SUBJECT, "--output_dir", tmp_path / "warm", "--resume_unet", PUMPKIN, "--lora_rank", 8)
    assert Lora.load(tmp_path / "warm/lora.safetensors").layers


def test_words_then_both_in_turns_around_them(tmp_path):
    works(lora_ti, *WORDS, "--output_dir", tmp_path / "ti", "--placeholder_tokens", "<bear>|<toy2>")
    made = sorted(p.name for p in (tmp_path / "ti").glob("*.safetensors"))
    assert made == ["learned_embeds-1.safetensors", "learned_embeds-2.safetensors"]
    works(lora_pti, *WORDS, "--output_dir", tmp_path / "pti", "--max_train_steps_tuning", 2, "--mode", "joint", "--words_turn", 2,
          "--class_prompt", "a toy", "--num_class_images", 2, "--output_format", "both", "--targets", "attention", "--out_name", "bear",
          "--placeholder_tokens", "<bear>", "--load_pretrained_inversion_embeddings_path", tmp_path / "ti/learned_embeds-1.safetensors")
    assert {"bear.pt", "bear.safetensors"} <= {p.name for p in (tmp_path / "pti").iterdir()}


# ------------------------------------------------------------------------------------------ drawing
def test_several_loras_take_turns_or_are_averaged(tmp_path):
    for mode in ("switch", "composite"):
        works(lora_generate, "--prompt", "x", "--lora", PUMPKIN, "--lora", f"{NEON}:0.5", "--together", mode, "--num_images", 1,
              "--num_inference_steps", 2, "--device", "cpu", "--output_dir", tmp_path / mode)
    works(lora_generate, "--prompt", "x", "--size", "80x64", "--num_images", 1, "--num_inference_steps", 2, "--output_dir", tmp_path / "wide")
    assert Image.open(tmp_path / "wide/000000.png").size == (80, 64)


def test_a_word_without_the_encoder_that_was_dropped(tmp_path):
    sd3 = ("--pretrained_model_name_or_path", "tiny-sd3")
    works(lora_ti, *WORDS, *sd3, "--encoders", "all", "--output_dir", tmp_path)
    works(lora_generate, *sd3, "--device", "cpu", "--t5", "drop", "--prompt", "a <s1>", "--num_images", 1, "--num_inference_steps", 1,
          "--lora", tmp_path / "learned_embeds.safetensors", "--output_dir", tmp_path)


def test_an_evaluation_saves_its_numbers(tmp_path):
    works(lora_evaluate, "--lora", NEON, "--subject", "neon", "--instance_data_dir", data_path("styles", "neon"), "--num_images", 2,
          "--num_inference_steps", 1, "--output_dir", tmp_path, "--device", "cpu")
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert "subject_fidelity" in saved["metrics"] and saved["about"]["trigger"]


NUMBERS = [(n, f) for n in NAMES for flags in COMMANDS[n].groups.values() for f in flags if f.kind in (int, float)]


def recipe_of(name):
    "What checks the settings of a command, or None."
    from lora_nb.preprocessing import PreprocessSettings
    if name == "lora_ppim": return lambda **kw: PreprocessSettings(**{**dict(crop="salience", flip=True), **kw})
    if name in recipes(): return lambda **kw: recipes()[name]().replace(**kw)


@pytest.mark.parametrize("name, flag", NUMBERS, ids=lambda x: getattr(x, "name", x))
def test_every_number_has_a_range_that_makes_sense(name, flag):
    "-1, 0, a billion, nan and the like are refused in a sentence, or are inside of a range whose ends the recipe accepts"
    assert flag.least is not None and flag.most is not None and flag.least < flag.most
    read = COMMANDS[name].parser()
    named = flag.place or f"--{flag.name}"
    for text in ["-1", "0", "1e9" if flag.kind is float else "1000000000", "-" + "9" * 19, "x", "", "nan", "inf", "-inf", "1e999",
                 "1" + "0" * 400, *(["1.5", "1e3"] if flag.kind is int else [])]:
        try: value = flag.kind(text)
        except ValueError: value = None
        good = value is not None and flag.least <= value <= flag.most
        good = good and not (value == flag.least and "least" in flag.open or value == flag.most and "most" in flag.open)
        words = dict(lora_add=["a", "b", "c", *(["1"] if flag.name == "alpha_2" else [])]).get(name, []) if flag.place else []
        code, said = terminal(read.parse_args, *words, *([text] if flag.place else [f"--{flag.name}={text}"]))
        if good: assert f"argument {named}:" not in said and f"argument --{flag.name}" not in said, said
        else: assert code == 2 and "\n" not in said and (named in said or text[:1] == "-" and flag.place) and len(said) < 300, said
    if not flag.sets or (make := recipe_of(name)) is None: return
    step = 1 if flag.kind is int else 1e-6
    for value, open in ((flag.least, "least" in flag.open), (flag.most, "most" in flag.open)):
        value = flag.kind(value + (step if value == flag.least else -step) * open)
        if flag.sets == "bucket_step": value = min(value, 64)
        make(**{flag.sets: value})


@pytest.mark.parametrize("text, said", [("0x64", "1024x768"), ("0", "1024x768"), ("-64", "1024x768"), ("64x", "1024x768"), ("9" * 9, "1024x768")])
def test_sizes_that_no_picture_has(text, said): assert said in refused(lora_generate, "--prompt", "x", f"--size={text}")


def test_a_picture_is_its_own_recipe_and_nothing_is_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bear = tmp_path / "bear.safetensors"; bear.write_bytes(PUMPKIN.read_bytes())
    one = ("--device", "cpu", "--num_images", 1, "--output_dir", ".")
    works(lora_generate, *one, "--prompt", "a <neon> {cat}", "--negative_prompt", "dog", "--lora", "neon:ramp:0:1",
          "--lora", "bear.safetensors:0.5", "--num_inference_steps", 3, "--seed", 7, "--size", "72x64")
    first = Image.open("000007.png"); kept = Path("000007.png").read_bytes()
    s = read_settings("000007.png")
    assert (s.prompt, s.negative_prompt, s.seed, s.steps, s.size, s.base) == ("a <neon> {cat}", "dog", 7, 3, (72, 64), "tiny-sd")
    assert [(x.source, x.schedule) for x in s.loras] == [("neon", "ramp:0:1"), ("bear.safetensors", "0.5")]
    works(lora_generate, *one, "--from_png", "000007.png")
    assert Path("000007.png").read_bytes() == kept and Image.open("000007-2.png").tobytes() == first.tobytes()
    works(lora_generate, *one, "--from_png", "000007.png", "--seed", 8, "--prompt", "a dog")
    assert read_settings("000008.png") == replace(s, seed=8, prompt="a dog")
    exec(python_of(s).replace('image.save("picture.png")', ""), space := {})
    assert space["image"].tobytes() == first.tobytes()
    before = sorted(tmp_path.iterdir())
    for words, said in ((("--from_png", "000007.png", "--lora", "neon"), "its own LoRAs"), (("--from_png", "gone.png"), "no such file"),
                        (("--prompt", "x", "--lora", "noen"), "Did you mean neon?"), ((), "--from_png"),
                        (("--prompt", "x", "--seed", 10**30), "at most 1")):
        assert said in refused(lora_generate, *one, *words)
    assert sorted(tmp_path.iterdir()) == before


def test_weights_and_loras_in_a_prompt(tmp_path, monkeypatch):
    "A prompt in the notation draws what flags and Python draw, and its PNG repeats it; what is cut off is said."
    monkeypatch.chdir(tmp_path)
    one = ("--device", "cpu", "--num_images", 1, "--num_inference_steps", 2, "--output_dir", ".")
    works(lora_generate, *one, "--prompt", "a cat face, <neon> style", "--lora", "neon:0.5", "--seed", 1)
    works(lora_generate, *one, "--prompt", "a cat face, <neon> style <lora:neon:0.5>", "--seed", 1)
    pixels = lambda name: Image.open(name).tobytes()
    assert pixels("000001.png") == pixels("000001-2.png")
    works(lora_generate, *one, "--prompt", "a (cat:1.6) face, <neon> style <lora:neon:0.5>", "--negative_prompt", "(dog:1.2)", "--seed", 1)
    s = read_settings("000001-3.png")
    assert pixels("000001-3.png") != pixels("000001.png") and s.notation and [x.source for x in s.wears()] == ["neon"]
    works(lora_generate, *one, "--from_png", "000001-3.png")
    exec(python_of(s).replace('image.save("picture.png")', ""), space := {})
    assert pixels("000001-4.png") == pixels("000001-3.png") == space["image"].tobytes()
    works(lora_generate, *one, "--from_png", "000001.png", "--prompt", "a (cat:1.6) face, <neon> style", "--negative_prompt", "(dog:1.2)")
    assert pixels("000001-5.png") == pixels("000001-3.png")
    assert "does not read" in works(lora_generate, *one, "--prompt", "a cat face " * 60, "--seed", 2)
    assert "the prompt is too long" in works(lora_generate, *one, "--from_png", "000002.png")
    assert "the negative prompt is too long" in works(lora_generate, *one, "--prompt", "x", "--negative_prompt", "a dog " * 60, "--seed", 3)
    assert "the negative prompt is too long" in works(lora_generate, *one, "--from_png", "000003.png")
    assert "does not read" not in works(lora_generate, *one, "--from_png", "000001-3.png")
    for words, said in ((("--prompt", "(a cat"), "never closed"), (("--prompt", "x <lora:noen>"), "Did you mean neon?"),
                        (("--prompt", "x", "--negative_prompt", "<lora:neon>"), "expected LoRAs in --prompt")):
        assert said in refused(lora_generate, *one, *words)


def test_a_packed_base(tmp_path, monkeypatch):
    "--quantize reaches the base of every command that loads one, and a picture's file repeats it."
    monkeypatch.chdir(tmp_path)
    one = ("--device", "cpu", "--num_images", 1, "--num_inference_steps", 2, "--output_dir", ".", "--prompt", "a cat face")
    works(lora_generate, *one); works(lora_generate, *one, "--quantize", "fp8")
    pixels = lambda name: Image.open(name).tobytes()
    assert pixels("000000.png") != pixels("000000-2.png") and read_settings("000000-2.png").quantize == "fp8"
    assert "quantize='fp8'" in python_of(read_settings("000000-2.png"))
    works(lora_generate, "--device", "cpu", "--output_dir", ".", "--from_png", "000000-2.png")
    assert pixels("000000-3.png") == pixels("000000-2.png")
    works(lora_dreambooth, "--instance_data_dir", BEAR, "--instance_prompt", "a sks toy", "--max_train_steps", 1, "--train_batch_size", 1,
          "--device", "cpu", "--quantize", "fp8", "--output_dir", "out")
    assert 'quantize = "fp8"' in Path("out/recipe.toml").read_text()
    works(lora_generate, *one, "--quantize", "unet=fp8")
    assert pixels("000000-4.png") == pixels("000000-2.png") and read_settings("000000-4.png").quantize == "unet=fp8"
    assert "nf4" in refused(lora_generate, *one, "--quantize", "nf5") and "nf4" in refused(lora_generate, *one, "--quantize", "unet=nf5")


def test_a_compiled_base_and_another_attention(tmp_path, monkeypatch):
    "--compile and --attention_backend reach `load_base` in every command that loads a base, and its errors the person"
    asked, real = [], lora_nb.loading.load_base
    def spied(*a, **kw): asked.append((kw.pop("compile"), kw.pop("attention_backend"))); return real(*a, **kw)
    monkeypatch.setattr(lora_nb.loading, "load_base", spied); monkeypatch.chdir(tmp_path)
    more = ("--device", "cpu", "--compile", "--attention_backend", "native")
    works(lora_generate, "--prompt", "a cat", "--num_images", 1, "--num_inference_steps", 1, "--output_dir", ".", *more)
    works(lora_dreambooth, "--instance_data_dir", BEAR, "--instance_prompt", "a sks toy", "--max_train_steps", 1, "--train_batch_size", 1,
          "--output_dir", "out", *more)
    assert asked == [(True, "native")] * 2
    monkeypatch.setattr(lora_nb.loading, "load_base", real)
    said = refused(lora_generate, "--prompt", "a cat", "--device", "cpu", "--output_dir", ".", "--attention_backend", "flsh")
    assert "flash" in said


def test_settings_that_fit_cards():
    text = works(lora_memory, "flux.1-dev", "--fit", 12, 24)
    from lora_nb.plan import plan_that_fits
    assert "--quantize nf4" in text and "--quantize fp8" in text and f"{plan_that_fits('flux.1-dev', 24).memory.total / 2**30:.1f}" in text
    found = json.loads(works(lora_memory, "sd1.5", "--fit", 2, 16, "--json"))["cards"]
    assert "Nothing fits" in found[0]["error"] and "--train_batch_size 1" in found[1]["flags"]
    assert "leave out --offload" in refused(lora_memory, "sdxl", "--fit", 12, "--offload", "model")


def test_the_studio_and_the_command_read_each_other(tmp_path):
    from lora_nb.studio import Studio
    studio = Studio("tiny-sd", ["neon"], tmp_path, background=False)
    studio.steps.value, studio.compare.value = 2, "without"; studio.draw()
    png = studio.save()[0]
    works(lora_generate, "--from_png", png, "--device", "cpu", "--output_dir", tmp_path / "again")
    assert Image.open(tmp_path / "again" / f"{studio.seed.value:06d}.png").tobytes() == studio.now.image.tobytes()
    studio.compare.value = "one"; studio.recall(tmp_path / "again" / f"{studio.seed.value:06d}.png")
    assert studio.compare.value == "without"; studio.close()


def test_a_similarity_is_called_one(tmp_path):
    "Pictures of one's own: the judge does not know them, and compares."
    own = tmp_path / "own"; own.mkdir()
    for i in range(2): (own / f"{i}.jpg").write_bytes((BEAR / f"{i}.jpg").read_bytes())
    text = works(lora_evaluate, "--lora", NEON, "--instance_data_dir", own, "--num_images", 2, "--num_inference_steps", 1, "--kind", "toy",
                 "--trigger", "sks toy", "--output_dir", tmp_path / "e", "--device", "cpu")
    line = next(x for x in text.splitlines() if x.startswith("subject_fidelity"))
    assert "likeness" in line and "the picture shows" not in text and "change" in text.splitlines()[0]
    known = works(lora_evaluate, "--lora", NEON, "--subject", "neon", "--instance_data_dir", data_path("styles", "neon"), "--num_images", 2,
                  "--num_inference_steps", 1, "--output_dir", tmp_path / "k", "--device", "cpu")
    assert "the picture shows the subject" in known


# ------------------------------------------------------------------------------------------ files
def test_ppim_refuses_what_it_cannot_do(tmp_path):
    raw = tmp_path / "raw"; raw.mkdir()
    Image.open(BEAR / "0.jpg").resize((300, 200)).save(raw / "0.png")
    ppim = ("--instance_data_dir", raw, "--output_dir", tmp_path / "ready", "--preset", "embedded", "--subject", "{trigger}")
    for flags, said in ((("--instance_data_dir", "nowhere"), "nowhere"), (("--output_dir", raw), "originals are never"),
                        (("--crop", "middle"), "expected one of center"), (("--zoom", ".2", "--crop", "pad"), "salience"),
                        (("--min_side", "9000"), "too small"), (("--use_8bit", "1"), "no flag")):
        assert said in refused(lora_ppim, *ppim, *flags)
    assert not [p for p in raw.iterdir() if p.suffix == ".jsonl"]
    assert "98 %" in works(lora_ppim, "--help-all")


def test_names_that_no_file_can_have(tmp_path):
    (tmp_path / "folder").mkdir(); (tmp_path / "folder/keep.txt").write_text("mine")
    for out in ("folder", "no_suffix", "wrong.txt"):
        assert out in refused(add_command, PUMPKIN, NEON, tmp_path / out)
        refused(lora_convert, PUMPKIN, tmp_path / out)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["keep.txt"]


def test_broken_files_are_named(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    assert "broken.safetensors" in refused(lora_info, tmp_path / "broken.safetensors")


def test_a_lora_goes_into_a_base(tmp_path):
    works(add_command, "tiny-sd", NEON, tmp_path / "merged", "1", "--mode", "upl")
    assert (tmp_path / "merged/model_index.json").exists()
    works(add_command, PUMPKIN, NEON, tmp_path / "joined.safetensors", "--mode", "ljl")
    assert list(Lora.load(tmp_path / "joined.safetensors").embeddings) == ["<s1-0>"]


def test_a_model_that_is_not_there_is_named(tmp_path):
    random_pipe().save_pretrained(tmp_path / "plain")
    assert "absent" in refused(lora_distill, "--base_model", tmp_path / "plain", "--target_model", tmp_path / "absent", "--device", "cpu",
                               "--save_path", tmp_path / "x.safetensors")


def test_a_lora_is_resized_and_the_command_says_what_it_costs(tmp_path):
    whole = Lora.load(PUMPKIN)
    for flags, said in ((("--rank", 2), "rank 8 -> 2"), (("--energy", .5), "misses"), (("--megabytes", .3), "of 115 layers"),
                        (("--rank", 4, "--format", "kohya", "--dtype", "float32"), "kohya form")):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        text = works(lora_resize, PUMPKIN, out, *flags)
        small = Lora.load(out)
        assert said in text and small.bytes < whole.bytes * 2
        missed = sum((f.delta() - (small.layers[n].delta() if n in small.layers else 0)).square().sum() for n, f in whole.layers.items())
        share = float(missed / sum(f.delta().square().sum() for f in whole.layers.values())) ** .5
        assert f"misses {share:.1%}"[:9] in text, (share, text)
    assert (tmp_path / "2.safetensors").stat().st_size <= 300_000


def test_files_of_others_and_inputs_are_kept(tmp_path):
    import shutil
    from lora_nb.formats import is_lora_file
    weights = tmp_path / "base.safetensors"; shutil.copy(data_path("tiny-sd", "vae", "diffusion_pytorch_model.safetensors"), weights)
    mine = tmp_path / "mine.safetensors"; shutil.copy(NEON, mine)
    kept = {p: p.read_bytes() for p in tmp_path.iterdir()}
    for target, said in ((weights, "not a LoRA"), (mine, "that is read|that are read")):
        import re
        for words in ((lora_convert, mine, target), (lora_convert, mine, target, "--format", "kohya"), (lora_resize, mine, target, "--rank", 2),
                      (add_command, mine, PUMPKIN, target), (add_command, mine, PUMPKIN, target, 1, 1, "--method", "svd"),
                      (add_command, mine, PUMPKIN, target, 1, 1, "--mode", "ljl")):
            text = refused(*words)
            assert re.search(said, text) and "--overwrite" in text and "overwrite=" not in text, text
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == kept
    works(lora_convert, PUMPKIN, weights, "--overwrite"); assert is_lora_file(weights)
    works(lora_resize, mine, mine, "--rank", 2, "--overwrite"); assert Lora.load(mine).rank == 2
    works(lora_convert, PUMPKIN, mine)                                            # a LoRA for a LoRA


def test_a_merge_keeps_its_base(tmp_path, no_base):
    import shutil
    shutil.copytree(data_path("tiny-sd"), tmp_path / "base")
    kept = {p: p.read_bytes() for p in (tmp_path / "base").rglob("*") if p.is_file()}
    for words in (("base",), ("base", "--overwrite"), ("base/merged", "--overwrite")):
        assert "would be lost" in refused(add_command, tmp_path / "base", NEON, tmp_path / words[0], 1, 1, "--mode", "upl", *words[1:])
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    assert "--overwrite" in refused(add_command, tmp_path / "base", NEON, tmp_path / "other", 1, 1, "--mode", "upl")
    assert {p: p.read_bytes() for p in (tmp_path / "base").rglob("*") if p.is_file()} == kept


def test_three_loras_with_weights(tmp_path):
    works(add_command, PUMPKIN, NEON, tmp_path / "sum.safetensors", .5, .25, "--lora", f"{PUMPKIN}:0.5", "--lora", f"{NEON}:-.25")
    one, total = Lora.load(PUMPKIN), Lora.load(tmp_path / "sum.safetensors")
    assert all(torch.allclose(f.delta().float(), total.layers[n].delta().float(), atol=1e-3) for n, f in one.layers.items())
    works(add_command, PUMPKIN, NEON, tmp_path / "svd.safetensors", .5, .25, "--lora", f"{PUMPKIN}:0.5", "--method", "svd", "--rank", 8)
    assert Lora.load(tmp_path / "svd.safetensors").rank == 8


def test_distilling_does_not_depend_on_the_device(tmp_path, monkeypatch):
    "A large card computes in bf16; the models are read in the precision of their files all the same"
    import copy
    import lora_nb.loading
    monkeypatch.setattr(lora_nb.loading, "default_dtype", lambda device=None: torch.bfloat16)
    base = random_pipe()
    tuned = copy.deepcopy(base)
    m = tuned.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    change = torch.outer(torch.randn(len(m.weight)), torch.randn(m.weight.shape[1])) * m.weight.norm() * .001 / len(m.weight)
    m.weight.data += change
    base.save_pretrained(tmp_path / "base"); tuned.save_pretrained(tmp_path / "tuned")
    models = "--base_model", tmp_path / "base", "--target_model", tmp_path / "tuned", "--device", "cpu"
    distil = lambda *words: works(lora_distill, *models, *words)
    distil("--rank", 1, "--save_path", tmp_path / "d.safetensors", "--format", "kohya")
    (f,) = Lora.load(tmp_path / "d.safetensors").layers.values()
    assert (f.delta().float() - change).norm() < .01 * change.norm()
    from lora_nb.formats import format_of, read_file
    assert format_of(*read_file(tmp_path / "d.safetensors")) == "kohya"
    assert "targets" in refused(lora_distill, *models, "--save_path", tmp_path / "no.safetensors", "--targets", "attn2")
    assert "equal" in refused(lora_distill, *models, "--save_path", tmp_path / "no.safetensors", "--min_difference", 1)


def test_pictures_of_an_earlier_run_are_kept(tmp_path, no_base):
    (tmp_path / "before_after.jpg").write_text("mine"); (tmp_path / "evaluation.json").write_text("mine")
    assert "--overwrite" in refused(lora_evaluate, "--lora", NEON, "--instance_data_dir", BEAR, "--output_dir", tmp_path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"before_after.jpg": "mine", "evaluation.json": "mine"}


# ------------------------------------------------------------------------------------------ the door
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def test_help_needs_no_pytorch_and_is_quick():
    program = ("import sys, time; began = time.perf_counter(); from lora_nb.cli import COMMANDS\n"
               "for c in COMMANDS.values(): c.parser().format_help()\n"
               "print([m for m in ('torch', 'numpy', 'diffusers') if m in sys.modules], time.perf_counter() - began)")
    heavy, seconds = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ENV, check=True).stdout.rsplit(" ", 1)
    assert heavy == "[]" and float(seconds) < 1, (heavy, seconds)


def test_the_door_knows_every_command():
    assert set(COMMANDS) == set(NAMES)
    text = works(main, "--help")
    assert all(n in text for n in NAMES)
    r = subprocess.run([sys.executable, "-m", "lora_nb.cli", "lora_info", "absent"], capture_output=True, text=True, env=ENV)
    assert r.returncode == 2 and r.stderr.startswith("lora_info: ") and r.stderr.count("\n") == 1, r.stderr


def test_entry_points_are_the_commands():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    import lora_nb.cli
    for line in ini["DEFAULT"]["console_scripts"].split():
        name, target = line.split("=")
        if name == "lora_nb": assert lora_nb.cli.main is main and target == "lora_nb.cli:main"
        elif target.startswith("lora_nb.cli:"): assert getattr(lora_nb.cli, target.split(":")[1]) is COMMANDS[name]
    assert {"lora_nb", *COMMANDS} - {"demo"} == {s.split("=")[0] for s in ini["DEFAULT"]["console_scripts"].split() if "lora_nb.cli:" in s}


def test_required_flags_are_asked_for():
    for c in COMMANDS.values():
        need = [f.place or f.name for flags in c.groups.values() for f in flags if f.default is REQUIRED]
        if need:
            text = refused(c)
            assert all(n in text for n in need), text


def test_choices_are_those_of_the_chapters():
    "Choices are written out in the tables, so that help needs no PyTorch."
    from lora_nb.recipe import LR_SCHEDULES, WEIGHTINGS
    from lora_nb.textual_inversion import SENTENCES
    kind = lambda c, name: next(f.kind for flags in c.groups.values() for f in flags if f.name == name)
    assert set(kind(lora_pti, "lr_scheduler")) == {*LR_SCHEDULES, "constant_with_warmup"}
    assert set(kind(lora_pti, "weighting")) == set(WEIGHTINGS) - {None} and set(kind(lora_pti, "use_template")) == set(SENTENCES)


def test_a_device_that_is_not_here_is_refused(monkeypatch):
    from lora_nb.cli.flags import UsageError, available_device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="this machine has cpu"): available_device("cuda:0")
    with pytest.raises(UsageError, match="this machine has cpu"): available_device("gpu")
    assert available_device("cpu") == "cpu" and available_device(None) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True); monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert available_device("cuda:1") == "cuda:1" and available_device("cuda") == "cuda"
    with pytest.raises(UsageError, match="cuda:0 to cuda:1"): available_device("cuda:2")


def test_a_dataset_file_takes_the_place_of_a_folder(tmp_path):
    file = tmp_path / "data.toml"
    file.write_text('[[datasets]]\nresolution = 64\nbatch_size = 1\n[[datasets.subsets]]\nnum_repeats = 2\ncaption_extension = ".none"\n'
                    f'class_tokens = "sks toy"\nimage_dir = "{BEAR}"\n')
    few = ("--dataset_config", file, "--output_dir", tmp_path / "out", "--device", "cpu")
    for flags, said in ((("--recursive",), "data.toml says it already"), (("--train_batch_size", 2), "--train_batch_size"),
                        (("--class_prompt", "a toy"), "needs --with_prior_preservation"), (("--instance_data_dir", BEAR), "--instance_data_dir")):
        assert said in refused(lora_dreambooth, *few, *flags)
    assert "or a --dataset_config" in refused(lora_dreambooth, "--instance_data_dir", BEAR)
    text = works(lora_dreambooth, *few, "--max_train_steps", 1, "--lora_rank", 1, "--targets", "attention")
    assert "Trigger: 'sks toy'" in text and Lora.load(tmp_path / "out/lora.safetensors").metadata["trigger"] == "sks toy"


@pytest.mark.parametrize("name", ("", " ", "..", "a/b", "../x", "a\\b", "a" * 201, "\N{SNOWMAN}" * 70))
def test_names_of_trained_files_stay_in_their_folder(name, no_base, tmp_path):
    "Found before the training, not after it"
    for command in (lora_ti, lora_pti):
        assert "expected the name of a file" in refused(command, *WORDS, "--output_dir", tmp_path / "out", f"--out_name={name}")
    assert not list(tmp_path.iterdir())


def test_dataset_files_are_for_dreambooth(no_base, tmp_path):
    for command in (lora_ti, lora_pti):
        assert "lora_dreambooth --dataset_config" in refused(command, *WORDS, "--output_dir", tmp_path, "--dataset_config", "set.toml")


def test_what_was_learned_outlives_a_full_disk(tmp_path, monkeypatch):
    import tempfile
    from lora_nb.run import kept
    from lora_nb.core import LoraError
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lora = Lora.load(NEON)
    def full(): raise LoraError("cannot write out/lora.safetensors: No space left on device.")
    with pytest.raises(LoraError, match="No space left on device. What was learned is in") as e: kept(full, lora)
    (path,) = tmp_path.glob("*/lora.safetensors")
    assert str(path) in str(e.value) and Lora.load(path) == lora
    monkeypatch.setattr(Lora, "save", lambda *a, **kw: full())
    with pytest.raises(LoraError, match="left on device.$"): kept(full, lora)
    assert kept(lambda: [path], lora) == [path]


def test_a_preview_that_cannot_be_written_loses_nothing(tmp_path, monkeypatch):
    "A full disk in the middle of a run"
    import tempfile
    import lora_nb.training
    from lora_nb.core import LoraError
    rest, write = tmp_path / "elsewhere", lora_nb.training.write_previews
    rest.mkdir(); monkeypatch.setattr(tempfile, "tempdir", str(rest))
    def full(folder, step, images):
        if step: raise LoraError("cannot write a preview: No space left on device.")
        return write(folder, step, images)
    monkeypatch.setattr(lora_nb.training, "write_previews", full)
    said = refused(lora_dreambooth, *SUBJECT, "--output_dir", tmp_path / "out", "--preview_prompt", "a toy", "--lora_rank", 2)
    (path,) = rest.glob("*/lora.safetensors")
    assert "No space left" in said and str(path) in said and any(f.up.any() for f in Lora.load(path).layers.values())


def test_flags_that_fit_a_card_can_be_typed(tmp_path):
    "What --fit prints is pasted behind a training command: it must parse there, with the T5 as it was counted."
    for name, card in (("sdxl", 8), ("sd3.5-medium", 12), ("sd3.5-large", 12), ("flux.1-dev", 12)):
        for plan in json.loads(works(lora_memory, name, "--fit", card, "--json"))["cards"]:
            words = shlex.split(" ".join(plan["flags"]))
            a = lora_dreambooth.parser().parse_args(["--instance_data_dir", str(tmp_path), "--pretrained_model_name_or_path", name, *words])
            assert a.t5 == {True: "keep", False: "drop"}.get(plan["settings"].get("t5", True), "8bit")


def test_bundled_loras_have_names_everywhere(tmp_path):
    "lora_generate knows them by name, so the commands for files do; a misspelt one is said before anything is loaded."
    assert "trigger  sks face" in works(lora_info, "jack-o-lantern")
    works(lora_convert, "jack-o-lantern", tmp_path / "a.safetensors", "--format", "kohya")
    works(lora_resize, "neon", tmp_path / "b.safetensors", "--rank", 2)
    assert "one LoRA" in works(add_command, "jack-o-lantern", "neon", tmp_path / "c.safetensors", 1, .7)
    for command in (lora_info, lora_convert, lora_resize):
        assert "Did you mean neon?" in refused(command, "neno", *([tmp_path / "d.safetensors"] if command is not lora_info else []))
    assert "Did you mean neon?" in refused(add_command, "neno", "neon", tmp_path / "d.safetensors")
    assert "Did you mean neon?" in refused(lora_evaluate, "--lora", "neno", "--instance_data_dir", tmp_path)
    assert not (tmp_path / "d.safetensors").exists()


def test_the_demo_is_called_as_it_is_typed():
    assert terminal(COMMANDS["demo"], "--help")[1].startswith("usage: lora_nb demo ")
    assert refused(COMMANDS["demo"], "--stesp", 3).startswith("lora_nb demo: no flag --stesp. Did you mean --steps?")


def test_a_sampler_by_name(tmp_path):
    "The samplers that the studio offers, also from a terminal; the picture's file knows its own, and draws the same again."
    from lora_nb.cli.draw import SAMPLER_NAMES
    from lora_nb.studio.samplers import FLOW_SAMPLERS, SAMPLERS
    assert set(SAMPLER_NAMES) == {*SAMPLERS, *FLOW_SAMPLERS}
    one = ("--prompt", "a cat face", "--num_images", 1, "--num_inference_steps", 3, "--device", "cpu", "--output_dir", tmp_path)
    works(lora_generate, *one); works(lora_generate, *one, "--sampler", "Euler a")
    plain, other = tmp_path / "000000.png", tmp_path / "000000-2.png"
    assert read_settings(other).sampler == "Euler a" and Image.open(plain).tobytes() != Image.open(other).tobytes()
    works(lora_generate, "--from_png", other, "--device", "cpu", "--output_dir", tmp_path / "again")
    assert Image.open(tmp_path / "again/000000.png").tobytes() == Image.open(other).tobytes()
    works(lora_generate, "--from_png", plain, "--sampler", "Euler a", "--device", "cpu", "--output_dir", tmp_path / "new")
    assert Image.open(tmp_path / "new/000000.png").tobytes() == Image.open(other).tobytes()
    assert "Did you mean 'Euler a'" in (text := refused(lora_generate, *one, "--sampler", "Eular a")) or "Did you mean Euler a" in text
    assert "expected one of Euler, DPM++ 2M, UniPC" in terminal(lora_generate, *one, "--pretrained_model_name_or_path", "tiny-sd3",
                                                                "--sampler", "LCM")[1]
    turbo = ("--lora", "turbo-tiny-sd", "--sampler", "LCM")
    works(lora_generate, *one, *turbo)
