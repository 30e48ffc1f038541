"The embedded world: bundled material is found by name or by path, and the drawing functions refuse or keep what they should."
import random
from pathlib import Path
import pytest
import torch
from lora_nb.core import DataError, data_path
from lora_nb.zoo import world as w


def test_material_is_complete():
    assert {n.replace("_", " ") for n in w.material("subjects")} == set(w.HELD_OUT)
    assert {n.replace("_", " ") for n in w.material("styles")} == set(w.STYLES)
    assert all(len(list(p.glob("*.jpg"))) == n for kind, n in (("subjects", 5), ("styles", 8)) for p in w.material(kind).values())


def test_each_base_has_its_own_loras():
    first, second = w.material("loras"), w.material("loras", "tiny-sd3")
    assert first["neon"] == data_path("loras", "neon.safetensors")
    assert second["neon"] == data_path("loras", "tiny-sd3", "neon.safetensors")
    assert first.keys() == second.keys() >= {"neon", "line_sketch", "teapot", "jack-o-lantern"}
    assert w.material("loras", "somebody/else") == first             # of another base: those that are there


def test_a_base_given_by_its_path_finds_nothing_outside_the_package(tmp_path):
    (tmp_path / "mine.safetensors").touch()
    assert w.material("loras", str(tmp_path)) == w.material("loras")


def test_material_of_an_unknown_kind():
    with pytest.raises(DataError, match="'subjects'"): w.material("subject")


@pytest.mark.parametrize("text", ["teddy bear", "Teddy_Bear ", w.material("subjects")["teddy_bear"], str(w.material("subjects")["teddy_bear"])])
def test_a_subject_by_its_name_or_its_folder(text):
    assert w.find_material(text) == (data_path("subjects", "teddy_bear"), "subject", "toy")


def test_a_folder_of_ones_own(tmp_path):
    assert w.find_material(tmp_path) == (tmp_path, None, "")


def test_only_the_kinds_that_are_asked_for():
    assert w.find_material("neon")[1:] == ("style", "style")
    with pytest.raises(DataError, match="no pictures 'neon'"): w.find_material("neon", ("subjects",))


@pytest.mark.parametrize("text", ["", "  ", "teddy beer", "/nowhere"])
def test_no_pictures_by_this_name(text):
    with pytest.raises(DataError, match="expected a folder, or one of cherry_pie"): w.find_material(text)


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path)); (tmp_path / "photos").mkdir()
    assert w.find_material("~/photos")[0] == tmp_path / "photos"


def test_captions_without_their_class():
    said = {w.caption("owl", "blue", "plain", random.Random(i), class_p=0) for i in range(40)}
    assert all("owl" in s and "animal" not in s for s in said) and any("plain" in s for s in said) and any("plain" not in s for s in said)


@pytest.mark.parametrize("size", [(48, 96), (96, 48)])
def test_a_background_of_another_shape_continues_the_pattern(size):
    i = torch.arange(5)
    wide, square = w.backgrounds(i, i, size), w.backgrounds(i, i, 48)
    assert wide.shape == (5, 3, *size)
    assert torch.equal(wide[:4, :, :48, :48], square[:4])            # a gradient spans the whole height instead


def test_the_edge_is_repeated_by_a_shift():
    x = torch.rand(2, 3, 8, 8)
    moved = w.shift(x, torch.tensor([0, 3]), torch.tensor([2, 0]))
    assert torch.equal(moved[0, :, :, 2:], x[0, :, :, :-2]) and torch.equal(moved[0, :, :, 0], x[0, :, :, 0])
    assert torch.equal(moved[1, :, 3:], x[1, :, :-3]) and torch.equal(moved[1, :, 2], x[1, :, 0])


@pytest.mark.parametrize("style", w.STYLES)
def test_styles_stay_in_range(style):
    out = w.stylize(torch.rand(2, 3, 64, 64) * 2 - 1, style)
    assert out.shape == (2, 3, 64, 64) and out.min() >= -1 and out.max() <= 1


def test_the_atlas_needs_the_font():
    if w.have_font(): assert w.glyph_atlas([0x1f431], (20,), 32).shape == (1, 1, 4, 32, 32)
    with pytest.raises(DataError, match="fonts-noto-color-emoji"): w.draw_glyph(0x1f431, 20, Path("/nowhere/font.ttf"))
