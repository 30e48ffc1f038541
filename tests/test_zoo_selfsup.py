"The encoder without labels: ranks on pictures whose order is known, and what it has never seen."
import pytest
import torch
from lora_nb.zoo.selfsup import class_test, nt_xent, ranks, unlabelled
from lora_nb.zoo.world import HELD_OUT, have_font

font = pytest.mark.skipif(not have_font(), reason="rendering needs the font")
background, same = torch.tensor([0, 1, 2]), torch.tensor([True, True, False])


def test_a_subject_like_itself_and_unlike_the_rest():
    assert ranks(torch.eye(2)[[0, 0, 1]], background, same) == (1., 1.)


def test_a_subject_like_the_rest():
    area, first = ranks(torch.eye(2)[[0, 1, 0]], background, same)
    assert first == 0. and area < 1


def test_pictures_on_the_same_background_are_no_partners():
    f = torch.eye(3)[[0, 0, 1, 1]]                       # 0 and 1 agree, but also share a background; 2 is the other picture of it
    area, first = ranks(f, torch.tensor([0, 0, 1, 2]), torch.tensor([True, True, True, False]))
    assert first == 0. and area == pytest.approx(0., abs=1e-6)


def test_the_loss_is_highest_for_swapped_pairs():
    a = torch.eye(8)
    assert nt_xent(a, a) < nt_xent(a, torch.zeros_like(a) + .1) < nt_xent(a, a.roll(1, 0))


@font
def test_held_out_subjects_are_never_shown():
    assert not set(unlabelled()) & set(HELD_OUT.values())


@font
def test_a_class_test_has_the_pictures_it_says():
    x, _, subject = class_test("locomotive", n=3, mates=1, g=torch.Generator().manual_seed(0))
    assert x.shape[1:] == (3, 64, 64) and int(subject.sum()) == 3 and len(x) == len(subject) == 3 + 16


def test_the_shipped_encoder_describes_with_192_numbers():
    from lora_nb.similarity import Dino
    assert Dino().images(torch.zeros(1, 3, 64, 64)).shape == (1, 192)
