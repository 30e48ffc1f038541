import pytest

from lora_nb.core import DataError, LoraError
from lora_nb.families import as_base
from lora_nb.lora import Lora
from lora_nb.random_pipes import random_pipe
from lora_nb.turbo import TurboRun, teacher_paths, turbo_plan, turbo_settings

FEW = dict(pictures=2, teacher_steps=2, steps=1, rank=2, batch_size=2, substeps=1)


@pytest.fixture(scope="module")
def small(): return as_base(random_pipe("sd"), "tiny")


def test_a_technique_of_another_family(small):
    with pytest.raises(LoraError, match="does not fit"): TurboRun(small, ["a"], technique="windows", **FEW)
    with pytest.raises(LoraError, match="expected windows or consistency"): turbo_plan(small, technique="magic")


@pytest.mark.parametrize("prompts, match", (("a cat", "a list of texts"), ([], "list is empty"), (None, "No prompts")))
def test_prompts_that_are_no_list(small, prompts, match):
    with pytest.raises(DataError, match=match): TurboRun(small, prompts, **FEW)


def test_steps_that_do_not_divide(small):
    with pytest.raises(LoraError, match="multiple"): teacher_paths(small, ["a"], windows=4, steps=6)
    with pytest.raises(LoraError, match="at least one step"): turbo_plan(small, few=0)


def test_a_lora_that_is_no_turbo():
    with pytest.raises(LoraError, match="Not a turbo LoRA"): turbo_settings(Lora({}))


def test_a_run_leaves_the_base_as_it_was(small):
    before = {k: v.clone() for k, v in small.denoiser.state_dict().items()}
    lora = TurboRun(small, ["a", "b"], **FEW).fit()
    after = small.denoiser.state_dict()
    assert turbo_settings(lora)["steps"] == 4 and set(before) == set(after)
    assert all(v.equal(after[k]) for k, v in before.items())
