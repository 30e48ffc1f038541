import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
from helpers_pictures import bear, scene, tiny_clipseg
from PIL import Image

from lora_nb.core import LoraError
from lora_nb.masks import (clipseg_logits, face_mask, fill_holes, find_faces, mask_center, mask_extent, masker_for, otsu,
                           saliency_mask, soft, to_lab, to_mask)


def test_thresholds_and_holes():
    ring = np.zeros((9, 9), bool); ring[2:7, 2:7] = True; ring[4, 4] = False
    assert fill_holes(ring)[4, 4] and fill_holes(ring).sum() == 25
    assert 0 <= otsu(np.r_[np.zeros(50), np.ones(50)]) <= 1
    np.testing.assert_allclose(to_lab(Image.new("RGB", (1, 1), "white"))[0, 0], [100, 0, 0], atol=.1)
    assert soft(0, 0) == .5
    np.testing.assert_allclose(soft(np.array([-9., 9.]), 1e-9), [0, 1], atol=1e-9)


@pytest.mark.parametrize("image", [Image.new("RGB", (50, 40), "green"), Image.new("RGB", (1, 1)), Image.new("RGB", (900, 3), "red")],
                         ids=["uniform", "dot", "line"])
def test_nothing_to_see(image): assert saliency_mask(image).max() == 0


def test_sizes_and_centres():
    assert to_mask(np.ones((2, 2)), (5, 7)).size == (5, 7)
    empty = Image.new("L", (10, 6))
    assert mask_center(empty) == (5., 3.) and mask_extent(empty) is None
    dot = empty.copy(); dot.putpixel((7, 2), 255)
    assert mask_center(dot) == (7.5, 2.5) and mask_extent(dot) == (7, 2, 8, 3)


def test_clipseg():
    seg = tiny_clipseg()
    look = lambda images, prompts: clipseg_logits(images, prompts, model=seg, device="cpu")
    assert np.abs(look([bear()], "")[0]).max() < 1e-4                                   # no text, no answer
    one, both = look([bear(), scene()], ["a bear", "a wall"]), look([bear(), scene()], "a bear")
    np.testing.assert_allclose(both[0], one[0], atol=1e-5); assert np.abs(both[0]).max() > 0
    with pytest.raises(ValueError): look([bear()], ["a", "b"])


def test_faces():
    if importlib.util.find_spec("cv2") is None:
        with pytest.raises(LoraError, match="pip install"): find_faces(bear())
    else: assert isinstance(find_faces(bear()), list)
    assert face_mask(bear(), detect=lambda im: []).getbbox() is None
    assert face_mask(bear(), detect=lambda im: [(0, 0, 256, 256)]).getpixel((128, 128)) > 200
    assert face_mask(bear(), detect=lambda im: iter([(0, 0, 256, 256)])).getpixel((128, 128)) > 200


def test_a_masker_for_settings():
    s = SimpleNamespace(masks="none", crop="center", temperature=1., mask_prompt="a bear", mask_model=tiny_clipseg())
    assert masker_for(s) is None
    s.crop = "salience"; crop = masker_for(s)(bear(), None)
    s.masks = "saliency"; assert (np.asarray(masker_for(s)(bear(), None)) == np.asarray(crop)).all()
    s.masks = "clipseg"; assert masker_for(s)(bear(), None).size == bear().size
