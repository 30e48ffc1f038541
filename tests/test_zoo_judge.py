import numpy as np
import pytest
import torch

from lora_nb.core import DataError, data_path
from lora_nb.evaluation import Question, bundled_judge, score_pictures
from lora_nb.similarity import to_batch
from lora_nb.zoo.judge import (Judge, JudgeWorld, _fill, background_templates, frame, load_judge, obeys, read_background,
                               recognise, save_judge, shows, subject_mask, train_judge)
from lora_nb.zoo.subjects import STYLE_OBJECTS
from lora_nb.zoo.world import OBJECTS, PATTERNS, STYLES, have_font

judge = load_judge()
bears = to_batch(data_path("subjects", "teddy_bear"), 64)
every = sorted(data_path("subjects").glob("*/*.jpg"))
noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_a_judge_survives_its_file(tmp_path):
    tiny = Judge(["owl", "teapot"])
    save_judge(tiny, tmp_path/"new"/"j.safetensors")
    again = load_judge(tmp_path/"new"/"j.safetensors")
    assert (again.names, again.styles) == (tiny.names, tiny.styles)
    assert torch.allclose(again(bears)[0], tiny.eval()(bears)[0], atol=1e-2)
    assert not any(p.requires_grad for p in again.parameters())


def test_the_bundled_one_is_small_and_knows_every_subject():
    assert data_path("judge", "judge.safetensors").stat().st_size < 1.3e6
    assert [n.replace(" ", "_") for n in recognise(judge, every)[0]] == [f.parent.name for f in every]
    assert bundled_judge().names == judge.names


def test_a_stranger_is_an_error():
    with pytest.raises(DataError, match="does not know"): shows(judge, bears, "my dog")


def test_the_methods_are_the_functions():
    asked = [Question("", "teddy bear", c, p) for c, p in read_background(bears)]
    assert judge.shows(bears, "teddy bear").tolist() == [1] * 5 == judge.obeys(bears, asked).tolist()
    assert judge.subject_mask(bears).equal(subject_mask(bears)) and set(judge.styles_seen(bears)) == {"none"}
    assert judge.features(bears).shape == (5, 128)
    paper = judge.exam("sks toy", "teddy bear", n=60, references=bears, groups=("subject",))
    assert not {(q.color, q.pattern) for q in paper["subject"]} & set(read_background(bears))
    assert judge.exam("sks", kind="style", n=2, references=bears)["subject"][0].style == "sks"


def test_masks_of_no_subject_and_of_no_scene():
    assert subject_mask(background_templates() * 2 - 1).sum() == 0
    assert subject_mask(noise).mean() == 1
    assert read_background(noise) == [(None, None)]


def test_holes_are_filled_from_outside():
    y, x = torch.meshgrid(torch.arange(64.), torch.arange(64.), indexing="ij")
    r = ((x - 31.5) ** 2 + (y - 31.5) ** 2).sqrt()
    assert _fill(((r <= 20) & (r > 12))[None, None])[0, 0].equal(r <= 20)
    assert frame(1).sum() == 4 * 63


def test_a_style_is_compared_with_redrawn_backgrounds():
    asked = [Question("", color="red", pattern="striped"), Question("", color="blue", pattern="striped")]
    red = background_templates("line sketch")[[11, 11]] * 2 - 1                        # red stripes, as a sketch: colour is lost
    assert obeys(red, asked, "line sketch").tolist() == [1, 1]
    assert obeys(background_templates()[[11, 11]] * 2 - 1, asked).tolist() == [1, 0]


def style_marks(style, taken_for=None):
    files = sorted(data_path("styles", style.replace(" ", "_")).glob("*.jpg"))
    text = [f.with_suffix(".txt").read_text().split(" background")[0].split() for f in files]
    asked = [Question("", o, t[-1], t[-2] if t[-2] in PATTERNS else "plain", style=taken_for or style)
             for o, t in zip(STYLE_OBJECTS, text)]
    return score_pictures(files, asked, judge, kind="style")


@pytest.mark.parametrize("style", STYLES)
def test_the_styles_own_pictures_pass(style): assert style_marks(style)["product"].mean() >= .75


def test_a_style_taken_for_another_fails(): assert style_marks("neon", taken_for="pixel art")["subject_fidelity"].mean() == 0


@pytest.mark.skipif(not have_font(), reason="fonts-noto-color-emoji is not installed")
def test_training_runs_and_can_be_repeated():
    few, losses = JudgeWorld(dict(list(OBJECTS.items())[:3])), []
    quick = train_judge(few, steps=2, batch=8, report=lambda step, loss: losses.append(loss))
    assert (len(losses), quick.names) == (1, few.names + ["nothing"]) and np.isfinite(losses).all()
    a, b = (few.sample(4, torch.Generator().manual_seed(3))[0] for _ in range(2))
    assert a.equal(b)
