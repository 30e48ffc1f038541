import json
import types
import numpy as np
import pytest
import torch

from lora_nb.core import DataError, LoraError, data_path
from lora_nb.evaluation import (GROUPS, PROMPTS, Evaluation, Question, _exam_for, _eyes, _trigger_of, bootstrap, evaluate, marks,
                                paired_bootstrap, pick_groups, prompt_exam, score_pictures, wearing)
from lora_nb.injection import apply_lora, inject_lora
from lora_nb.loading import load_base
from lora_nb.lora import Lora
from lora_nb.similarity import Clip, Dino, to_batch
from lora_nb.zoo.judge import load_judge, read_background, subject_mask

judge = load_judge()
files = sorted(data_path("subjects", "teddy_bear").glob("*.jpg"))
bears = to_batch(files, 64)
stranger = dict(subject=[Question("", None, *b) for b in read_background(bears)])
quick = dict(n=2, groups=("subject",), steps=1)
token = Lora({}, embeddings={"<s1>": {"text_encoder": torch.ones(1, 8)}})


@pytest.fixture(scope="module")
def base(): return load_base("tiny-sd", device="cpu")


@pytest.fixture(scope="module")
def nothing(base):
    on = inject_lora(base.pipe, "attention", rank=4)
    try: return on.lora()
    finally: on.remove()


def test_a_question_shows_its_prompt():
    q = Question("a cat", "cat", "red", "plain", 7)
    assert repr(q) == "'a cat' (seed 7)" and list(vars(q)) == ["prompt", "obj", "color", "pattern", "seed", "style"]


def test_exams_of_prompts():
    paper = prompt_exam("sks dog", PROMPTS, n=12)
    assert (list(paper), [len(v) for v in paper.values()]) == (["subject", "class", "noun"], [12] * 3)
    assert paper["subject"][11].prompt == "a sks dog in the snow" and paper["noun"][0].prompt == "a photo of a dog"
    style = prompt_exam("sks", ["a {} ocean"], kind="style", n=1, subject="neon")
    assert (style["subject"][0].style, style["subject"][0].obj, style["class"][0].style) == ("neon", None, None)
    assert prompt_exam("sks owl", n=1)["class"][0].prompt == "an owl in the jungle"
    with pytest.raises(DataError, match="no {}"): prompt_exam("x", ["a dog"])
    with pytest.raises(DataError, match="expected some of subject"): prompt_exam("x", groups=("subjects",))
    assert pick_groups({}, GROUPS) == {}


def test_intervals():
    assert np.allclose(paired_bootstrap([0, 1] * 10, [.1, 1.1] * 10), .1)
    assert bootstrap([1, 2, 3, 4], groups=list("aabb")) == bootstrap([1.5, 3.5])
    assert bootstrap([1., 1., 1.]) == (1., 1.)
    lo, hi = bootstrap([0, 1] * 200)
    assert lo < .5 < hi and hi - lo < .11
    with pytest.raises(DataError, match="expected pairs"): paired_bootstrap([1], [1, 2])
    with pytest.raises(DataError, match="at least one"): bootstrap([])


def test_a_subject_that_the_judge_does_not_know():
    with pytest.raises(DataError, match="references"): marks(stranger, dict(subject=bears), judge)
    assert marks(stranger, dict(subject=bears), judge, files)["subject_fidelity"].min() > .7


def test_colours_count():
    sheet = dict(subject=[Question("", "teddy bear", c, p) for c, p in read_background(bears)])
    sheet["subject"][0].color = "red"
    assert abs(marks(sheet, dict(subject=bears), judge)["prompt_fidelity"].mean() - .8) < 1e-6


def test_what_cannot_be_scored():
    with pytest.raises(DataError, match="5 pictures for 1"): score_pictures(bears, ["a bear"])
    with pytest.raises(DataError, match="Did you mean"): score_pictures(bears, ["a"] * 5, kind="styles")
    ones = dict(references=bears, dino=Dino(), masks=torch.ones(5, 8, 8))
    with pytest.raises(DataError, match="reference_masks"): score_pictures(bears, ["a"] * 5, **ones)


def test_marks_follow_the_eyes():
    eyes = dict(references=bears, dino=Dino(), clip=Clip(), masks=subject_mask)
    only = score_pictures(bears, ["a teddy bear"] * 5, **eyes)
    assert set(only) == {"dino", "dino_masked", "clip_i", "clip_i_masked", "clip_t", "size", "right", "down"}
    asked = [Question("", "teddy bear", c, p) for c, p in read_background(bears)]
    assert not set(score_pictures(bears, asked, judge, bears, dino=Dino(), masks=False)) & {"size", "dino_masked"}


def test_the_trigger_comes_from_the_lora_or_is_asked_for(base, nothing):
    assert _trigger_of(token) == "<s1>" and _trigger_of(None, {"subject": [Question("a cat")]}) is None
    with pytest.raises(DataError, match="Pass `trigger`"): evaluate(base, nothing, **quick)


def test_a_large_base_is_not_judged_by_the_embedded_world():
    large = types.SimpleNamespace(small=False)
    assert _eyes(large, None, Dino(), None)[0] is None and _eyes(types.SimpleNamespace(small=True), None, None, None)[0] is not None
    with pytest.raises(DataError, match="nothing can be measured"): _eyes(large, None, None, None)
    paper = _exam_for(large, None, "sks dog", None, None, 2, None, GROUPS, 1, None)
    assert paper["subject"][0].prompt == "a sks dog in the jungle"
    assert "background" in _exam_for(large, judge, "sks dog", None, None, 2, None, GROUPS, 1, None)["subject"][0].prompt


def test_what_evaluate_refuses(base, nothing):
    with pytest.raises(DataError, match="references"): evaluate(base, nothing, "sks dog", **quick)
    with pytest.raises(DataError, match="nothing can be"): evaluate(base, nothing, "sks dog", judge=False, dino=False, **quick)
    first = evaluate(base, None, "sks toy", "teddy bear", **quick)
    assert {k: m["before"] for k, m in first.items()} == {k: m["after"] for k, m in first.items()}
    with pytest.raises(DataError, match="another exam"):
        evaluate(base, nothing, "sks toy", "teddy bear", before=first, n=2, groups=("subject",), steps=1, seed=2)
    with pytest.raises(DataError, match="No pictures"): first.grid("class")
    assert not [m for m in base.denoiser.modules() if hasattr(m, "lora_up")]


def test_a_lora_in_hand_in_a_file_and_worn_are_one_and_the_same(base, nothing, tmp_path):
    torch.manual_seed(0)
    vandal = nothing.map(lambda f: type(f)(torch.randn(f.up.shape) * .5, f.down))
    vandal.save(tmp_path/"v.safetensors")
    three = dict(n=2, groups=("subject", "others"), steps=2)
    filed = evaluate(base, tmp_path/"v.safetensors", "sks toy", "teddy bear", **three)
    tuned = load_base("tiny-sd", device="cpu"); apply_lora(tuned.pipe, vandal)
    assert dict(evaluate(base, tuned.pipe, "sks toy", "teddy bear", before=filed, **three)) == dict(filed)
    filed.save(tmp_path/"e.json"); held = json.loads((tmp_path/"e.json").read_text())
    assert held["metrics"] == dict(filed) and len(held["marks"]["after"]["retention"]) == 2
    assert "prior_drift" in filed._repr_markdown_() and filed.about["base"] == "tiny-sd" and filed.about["kind"] == "toy"


def test_styles(base, nothing):
    styled = evaluate(base, nothing, "sks", "neon", n=2, steps=2)
    assert {"subject_fidelity", "leak", "retention", "prior_drift"} <= set(styled) and "class_retention" not in styled


class Painter:
    "A judge of a world of plain colours."
    names, styles, classes = ["red", "blue"], [], {"red": "colour", "blue": "colour"}
    def exam(self, trigger, subject=None, kind=None, n=24, references=None, groups=GROUPS, seed=1, prompts=None):
        return pick_groups({"subject": [Question(f"a {trigger}", subject, seed=i) for i in range(n)]}, groups)
    def shows(self, images, names):
        names = [names] * len(images) if isinstance(names, str) else names
        return np.array([float(x.mean((1, 2)).argmax() == {"red": 0, "blue": 2}[n]) for x, n in zip(to_batch(images), names)])
    def subject_mask(self, images): return torch.ones(len(images), 8, 8)


def test_a_judge_of_another_world_is_handed_in(base, nothing):
    e = evaluate(base, nothing, "red apple on a red background", "red", judge=Painter(), n=2, steps=4, dino=False)
    assert e["subject_fidelity"]["after"] == 1 and e.about["kind"] == "colour" and "prompt_fidelity" not in e


def test_an_exam_is_handed_in(base):
    asked = {"subject": [Question("a cat on a red background", "cat", "red", "plain", seed=3)]}
    e = evaluate(base, exam=asked, dino=False, steps=4)
    assert e.exam is asked and e["prompt_fidelity"]["n"] == 1 and e.about["trigger"] is None


def test_the_base_is_undressed_after_an_error(base, nothing):
    with pytest.raises(RuntimeError), wearing(base, nothing): raise RuntimeError
    assert not [m for m in base.denoiser.modules() if hasattr(m, "lora_up")]


def test_an_evaluation_of_nothing(): assert Evaluation({}).to_dict() == dict(about={}, metrics={}, marks={}, prompts={})


def test_an_evaluation_replaces_an_evaluation_only(tmp_path):
    "What else lies at its place is kept, to the last byte"
    path = tmp_path / "marks.json"
    Evaluation({}).save(path); Evaluation({}).save(path)
    assert json.loads(path.read_text()) == Evaluation({}).to_dict()
    for other in (b'{"weights": 1}', b"\0" * 9, b'{"metrics": 3}'):
        path.write_bytes(other)
        with pytest.raises(DataError, match="is no evaluation: nothing was written"): Evaluation({}).save(path)
        assert path.read_bytes() == other and [p.name for p in tmp_path.iterdir()] == ["marks.json"]
    with pytest.raises(LoraError, match="too long"): Evaluation({}).save(tmp_path / ("a" * 300))


@pytest.mark.parametrize("many", ([], (token,), {"a": token}), ids=("list", "tuple", "dict"))
def test_several_loras_are_no_lora(base, many):
    with pytest.raises(LoraError, match="takes one LoRA"): evaluate(base, many)


@pytest.mark.parametrize("judge", (Clip, Dino))
def test_a_judge_that_is_not_there(judge):
    with pytest.raises(DataError, match="No .* could be loaded from '/nowhere'"): judge("/nowhere")
    with pytest.raises(LoraError, match="expected a name such as cpu"): judge(device="gpu")
