"The drop-in's masks and captions (the chapter lora_diffusion)."
import pytest
from helpers_pictures import bear, scene, tiny_blip, tiny_clipseg, tiny_swin
from PIL import Image

from lora_nb.core import data_path
from lora_nb.lora_diffusion import (_center_of_mass, _crop_to_square, clipseg_mask_generator, face_mask_google_mediapipe,
                                    load_and_save_masks_and_captions, swin_ir_sr)
from lora_nb.pictures import find_pictures


def test_files_under_the_old_names(tmp_path):
    blip, seg = tiny_blip(tmp_path), tiny_clipseg()
    subjects = sorted(data_path("subjects", "teddy_bear").glob("*.jpg"))
    load_and_save_masks_and_captions([str(f) for f in subjects[:2]], tmp_path/"old", target_size=64, caption_model=blip, mask_model=seg)
    assert [f.name for f in find_pictures(tmp_path/"old")] == ["0.src.jpg", "1.src.jpg"]          # masks are no pictures
    assert Image.open(tmp_path/"old"/"1.mask.png").size == (64, 64)
    for source in (str(subjects[0].parent), f"{subjects[0].parent}/*.jpg"):
        load_and_save_masks_and_captions(source, tmp_path/"one", "a photo of", "a thing", 32, False, n_length=1, caption_model=blip,
                                         mask_model=seg)
        assert len(list((tmp_path/"one").iterdir())) == 3
    assert (tmp_path/"one"/"caption.txt").read_text().startswith("a photo of")


def test_masks_and_crops():
    dot = Image.new("L", (10, 6)); dot.putpixel((7, 2), 255)
    assert _center_of_mass(dot) == pytest.approx((7, 2)) and _crop_to_square(scene(), (22, 32), 16).size == (16, 16)
    assert _crop_to_square(scene(), (0, 0)).size == (64, 64)
    assert face_mask_google_mediapipe([bear()], detect=lambda im: [])[0].getextrema() == (13, 13)
    assert clipseg_mask_generator([bear()], "a bear", tiny_clipseg(), "cpu")[0].getextrema()[1] == 255


def test_swin():
    small, large = scene(20, 13), scene(64, 64)
    assert [i.size for i in swin_ir_sr([small, large], tiny_swin(), (64, 64), "cpu")] == [(40, 26), (64, 64)]
    assert swin_ir_sr([large], tiny_swin(), (64, 64), "cpu")[0] is large
    assert [i.size for i in swin_ir_sr([large], tiny_swin(), device="cpu")] == [(128, 128)]
