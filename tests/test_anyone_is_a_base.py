"Whatever takes a base takes a pipeline, too."
import warnings

import pytest
from PIL import Image

import lora_nb as l
from lora_nb.loading import load_base
from lora_nb.random_pipes import random_pipe


@pytest.fixture(scope="module")
def pipe(): return random_pipe("sd")

def pictures(): return [Image.new("RGB", (64, 64), c) for c in ("red", "green")]

SHORT = dict(steps=1, batch_size=1)

@pytest.mark.parametrize("train", [l.train_dreambooth, l.train_textual_inversion, l.train_pti], ids=lambda f: f.__name__)
def test_a_pipeline_can_be_trained(pipe, train):
    about = dict(instance_prompt="a sks toy") if train is l.train_dreambooth else dict(placeholder_token="<toy>")
    small = {"ti_steps": 1} if train is l.train_pti else {}
    with warnings.catch_warnings(action="ignore"): lora = train(pipe, pictures(), **about, **SHORT, **small)
    assert isinstance(lora, l.Lora) and (lora.layers or lora.embeddings)


@pytest.mark.parametrize("ask", [l.recipe_for, l.inversion_recipe_for, l.pivotal_recipe_for, l.turbo_plan, l.turbo_recipe],
                         ids=lambda f: f.__name__)
def test_recipes_of_a_pipeline(pipe, ask): assert ask(pipe) == ask(load_base(pipe))


def test_drawing_judging_and_wearing(pipe):
    made, _ = l.class_pictures(pipe, "a toy", 1, steps=1)
    assert len(made) == 1
    with l.wearing(pipe, None) as base: assert base.pipe is pipe
