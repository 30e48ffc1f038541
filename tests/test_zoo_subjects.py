import pytest

from lora_nb.core import DataError
from lora_nb.evaluation import PROMPTS
from lora_nb.zoo.subjects import STYLE_OBJECTS, exam, questions
from lora_nb.zoo.world import CLASS_OF

AVOID = [("purple", "checkered"), ("green", "gradient"), ("gray", "plain")]


def test_questions_cover_the_world_and_can_be_repeated():
    qs = questions(["owl", "cat"], 55)
    assert len({(q.color, q.pattern) for q in qs}) == 55
    assert all(q.prompt.startswith(f"{'an' if q.obj == 'owl' else 'a'} {q.obj} on a") for q in qs)
    assert [q.prompt for q in questions(["owl", "cat"], 9)] == [q.prompt for q in questions(["owl", "cat"], 9)]
    assert [q.seed for q in questions(["owl"], 2, seed=3)] == [3000, 3001]


def test_backgrounds_of_the_training_pictures_are_not_asked_for():
    assert not {(q.color, q.pattern) for q in questions(["owl"], 200, AVOID)} & set(AVOID)
    assert not {(q.color, q.pattern) for q in exam("sks toy", "teddy bear", n=200, avoid=AVOID)["subject"]} & set(AVOID)


def test_a_subject_is_asked_for_by_its_trigger_only():
    assert {CLASS_OF[q.obj] for q in exam("x", "teddy bear")["class"]} == {"toy"}
    assert "toy" not in {CLASS_OF[q.obj] for q in exam("x", "teddy bear", n=100)["others"]}
    assert not any("teddy" in q.prompt for g in exam("sks toy", "teddy bear").values() for q in g)


def test_a_style_is_asked_for_on_other_objects():
    paper = exam("sks style", "neon", n=300)
    assert not {q.obj for q in paper["subject"]} & set(STYLE_OBJECTS)
    assert (list(paper), {q.style for q in paper["subject"]}) == (["subject", "others", "noun"], {"neon"})
    assert not any("style style" in q.prompt for q in paper["subject"])
    assert {q.style for q in exam("sks", kind="style", n=2)["subject"]} == {"sks"}           # a style that has no name


def test_prompts_take_the_place_of_backgrounds():
    paper = exam("sks toy", "teddy bear", n=2, prompts=PROMPTS)
    assert [q.prompt for q in paper["class"]] == ["a toy in the jungle", "a toy in the snow"] and "others" not in paper
    assert {q.obj for q in paper["subject"]} == {"teddy bear"}


def test_unknown_groups():
    with pytest.raises(DataError, match="expected some of subject"): exam("x", groups=("subjects",))
    assert list(exam("x", "robot", groups=("noun", "subject"), n=1)) == ["noun", "subject"]
