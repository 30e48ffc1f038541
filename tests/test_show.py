import math
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_nb.core import DataError, data_path
from lora_nb.show import FONT_SIZE, LIMIT_KB, WIDTH, Jpeg, bars, curve, grid, heat, running_mean, save_jpeg, show, to_image

bear = Image.open(data_path("subjects", "teddy_bear", "0.jpg"))
x = torch.from_numpy(np.array(bear.resize((64, 64), Image.LANCZOS))).permute(2, 0, 1) / 127.5 - 1
noisy = torch.stack([x * (1 - s) for s in (0, .2, .4, .6, .8, 1)])
losses = torch.rand(300, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("a, pixel", [(np.ones((4, 5), bool), (255,) * 3),
    (Image.new("RGBA", (2, 2), (0, 0, 0, 0)), (255,) * 3),
    (torch.tensor([300, 0, 0]).view(3, 1, 1), (255, 0, 0)), (torch.full((3, 2, 2), 1.7), (255,) * 3)],
    ids=["bool", "transparent", "too bright", "a VAE overshoots a little"])
def test_pictures_of_any_kind(a, pixel): assert to_image(a).getpixel((0, 0)) == pixel


def test_size_of_a_plain_array(): assert to_image(np.zeros((4, 5))).size == (5, 4)


@pytest.mark.parametrize("a, says", [(torch.zeros(2, 3, 4, 4), r"\(2, 3, 4, 4\)"), ("no/such.jpg", "cannot read"),
                                     (torch.zeros(3, 0, 4), "empty")])
def test_what_is_not_a_picture(a, says):
    with pytest.raises(ValueError, match=says): to_image(a)


def test_show_passes_on_what_draws_itself():
    red = Image.new("RGB", (8, 8), "red")
    assert repr(show(red)) == repr(Jpeg(red)) and show(show(red)).data == show(red).data
    with pytest.raises(ValueError, match="NoneType"): show(None)


def test_noise_is_made_to_fit(): assert len(Jpeg(torch.rand(3, 400, 400) * 2 - 1).data) <= LIMIT_KB * 1000


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"): save_jpeg(bear, tmp_path / "file" / "bear.jpg")


@pytest.mark.parametrize("kw, size", [(dict(cols=3, size=50, pad=0), (150, 100)), (dict(rows=2, size=50, pad=10), (170, 110))])
def test_sizes_of_grids(kw, size): assert grid(noisy, **kw).size == size


def test_grids_of_rows_and_of_one():
    assert grid(noisy[0]).size == grid(x).size
    assert grid([noisy[:2], noisy[2:4]], size=50, pad=0).size == (100, 100)
    assert np.array_equal(np.asarray(grid(noisy[:1], size=64)), np.asarray(to_image(noisy[0])))   # at its own size: the picture


def test_wide_grids_and_long_titles():
    many = noisy.repeat(4, 1, 1, 1)
    assert 700 < grid(many, cols=12).width <= WIDTH and grid(many, cols=24).width >= 24 * 64
    assert grid(noisy, row_titles=["a"], cols=6, size=64).width > grid(noisy, cols=6, size=64).width
    assert grid([noisy[:2]] * 2, row_titles=["a long row title"] * 2).width <= WIDTH
    shapes = [Image.new("RGB", (64, 32)), Image.new("RGB", (32, 64))]
    assert grid(shapes, titles=["", "tall " * 40]).height > grid(shapes).height + 3 * FONT_SIZE


def test_a_mean_goes_on_after_what_is_missing():
    for gap in (math.nan, math.inf):
        got = running_mean([1, gap, gap, 0, 1])
        assert np.isnan(got[1:3]).all() and np.allclose(got[[0, 3, 4]], running_mean([1, 0, 1]))
    assert np.isnan(running_mean([math.nan] * 3)).all() and len(running_mean([])) == 0
    assert np.array_equal(running_mean(torch.tensor([1., 0.])), running_mean([1, 0]))


def test_plots_are_well_formed_and_small(tmp_path):
    plot = curve(losses, title="loss")
    xml.etree.ElementTree.fromstring(plot.svg)
    assert Image.open(plot.save(tmp_path / "loss.png")).format == "PNG"
    assert Path(plot.save(tmp_path / "loss.svg")).read_text() == plot.svg
    with pytest.raises(ValueError, match=".svg or .png"): plot.save(tmp_path / "loss.gif")
    assert len(curve(np.random.default_rng(0).normal(size=100_000), smooth=.9).svg) < 60_000


@pytest.mark.parametrize("f, says", [(lambda: curve(losses, smooth=2), "smooth=2"), (lambda: curve({"a": "ab"}), "a: found"),
    (lambda: curve([math.nan] * 3), "among 3"), (lambda: curve(None), "expected numbers"),
    (lambda: heat([1, 2]), r"found shape \(2,\)"),
    (lambda: heat(torch.ones(6, 6), ["a"]), "found 1 row titles, expected 6"), (lambda: bars({}), "found no values"),
    (lambda: bars({"a": "x"}), "expected numbers")])
def test_what_cannot_be_drawn(f, says):
    with pytest.raises(ValueError, match=says): f()


def test_curves_of_pairs_and_gaps():
    both = curve({"val": [(0, 1.), (50, .5)], "train": torch.rand(60, requires_grad=True)}).svg
    assert "val" in both and "train" in both and "<svg" in curve([1, math.nan, 3], log=True).svg
    assert "tuning" in curve(losses, marks={150: "tuning"}).svg


def test_the_legend_is_outside_of_the_axes():
    figure = curve({"a": losses, "b": losses / 2}).figure
    figure.canvas.draw()
    legend = figure.legends[0].get_window_extent()
    assert not legend.overlaps(figure.axes[0].get_window_extent())


def test_numbers_on_heat_maps_and_bars():
    sim = torch.rand(6, 6)
    count = lambda m, **kw: heat(m, **kw).svg.count("<text")
    assert count(sim) == count(sim, numbers=False) + sim.numel()
    assert count(torch.rand(4, 60)) == count(torch.rand(4, 60), numbers=False)
    assert "-200000" in bars({"a": 1, "b": -2e5, "c": torch.tensor(.5)}).svg.replace("\u2212", "-")
    assert "y" in bars({"a": {"x": 1}, "b": {"y": 2}}).svg


def test_a_picture_replaces_pictures_only(tmp_path):
    im = Image.new("RGB", (8, 8))
    save_jpeg(im, tmp_path / "a.jpg"); im.save(tmp_path / "b.png"); curve([1, 2], path=tmp_path / "c.svg")
    for name in ("a.jpg", "b.png", "c.svg", "empty"):
        if name == "empty": (tmp_path / name).touch()
        assert Image.open(save_jpeg(im, tmp_path / name)).format == "JPEG"
    for name in ("notes.txt", "lora.safetensors", "d.svg", "e.png"):
        (tmp_path / name).write_bytes(b"mine")
        with pytest.raises(DataError, match="exists and is no picture"):
            curve([1, 2], path=tmp_path / name) if name.endswith(("svg", "png")) else save_jpeg(im, tmp_path / name)
        assert (tmp_path / name).read_bytes() == b"mine"
