"""The studio's page in a real browser: keys, files, masks, state, labels, contrast, wide and narrow, light and dark.

With ipywidgets 7.7 as well where OLD_WIDGETS names a folder made by
`pip install --no-deps --target FOLDER 'ipywidgets==7.7.*' 'jupyterlab_widgets==1.1.*' ipython_genutils`; `make test-browser` has them."""
import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from helpers_browser import chromium, faint, needs_browser, sticks_out, unnamed
from lora_nb.core import data_path
from lora_nb.studio.code import read_settings

pytestmark = needs_browser
OLD = os.environ.get("OLD_WIDGETS", "")
PATIENCE = 180_000 * float(os.environ.get("SLOW", 1))


@pytest.fixture(scope="module", params=["8", pytest.param("7.7", marks=pytest.mark.skipif(not OLD, reason="OLD_WIDGETS names no folder"))])
def server(request, tmp_path_factory):
    "A page of `lora_studio`; gives its address and its folder."
    home, root = tmp_path_factory.mktemp("studio"), Path(__file__).resolve().parent.parent
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    old = [OLD] if request.param == "7.7" else []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*old, str(root)]), "JUPYTER_TOKEN": "sesame", "LORA_NB_QUIET": "1", "HF_HUB_OFFLINE": "1",
           "OMP_NUM_THREADS": "1", **({"JUPYTER_PATH": f"{OLD}/share/jupyter"} if old else {})}
    code = f"from lora_nb.cli import lora_studio; lora_studio(['--no_browser', '--port={port}', '--folder={home}/pictures'])"
    with open(home / "log", "w") as log:
        p = subprocess.Popen([sys.executable, "-c", code], cwd=home, env=env, stdout=log, stderr=log)
    try:
        for _ in range(int(PATIENCE / 200)):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1): break
            assert p.poll() is None, (home / "log").read_text()
            time.sleep(.2)
        yield f"http://127.0.0.1:{port}/?token=sesame", home
    finally: p.terminate(); p.wait(30)


@pytest.fixture(scope="module")
def browser():
    with chromium() as b: yield b


@contextlib.contextmanager
def opened(browser, server, width, theme, height=860):
    page = browser.new_page(viewport=dict(width=width, height=height))
    page.set_default_timeout(PATIENCE)
    page.goto(f"{server[0]}&theme={theme}")
    page.locator(".ls-start .ls-go").first.wait_for()
    page.wait_for_timeout(500)
    try: yield page
    finally: page.close()


def said(page, pattern):
    lines = "[...document.querySelectorAll('.ls-say')].map(e => e.innerText).join('\\n')"
    page.wait_for_function(f"p => new RegExp(p, 'm').test({lines})", arg=pattern)


def field(page, label):
    return page.locator(".ls-field", has=page.get_by_text(re.compile(f"^{label}$"))).locator("textarea, input, select").first


def type_in(page, label, text):
    box = field(page, label); box.fill(str(text)); box.press("Tab")


def checked(page):
    "What holds for every state of the page."
    assert not (found := unnamed(page)), found
    assert not (found := faint(page)), found
    assert not (found := sticks_out(page)), found


def test_a_wide_light_page(browser, server, tmp_path):
    with opened(browser, server, 1280, "light") as page:
        assert "tiny-sd" in page.locator(".ls-top").inner_text()
        type_in(page, "Steps", 3)
        field(page, "Prompt").fill("a (cat:1.2) on a blue background"); page.keyboard.press("Control+Enter"); said(page, r"^\d+\.\d\d s$")
        alt = page.locator(".ls-shown img").get_attribute("alt")
        assert alt == "a (cat:1.2) on a blue background" and page.locator(".ls-badge").count() == 0
        field(page, "LoRA").fill("noen"); page.keyboard.press("Enter"); said(page, "Did you mean 'neon'")
        near = page.locator(".ls-error").bounding_box()["y"] - page.get_by_role("button", name="Load", exact=True).bounding_box()["y"]
        assert 0 < near < 90, near                                          # the error is beside the button that caused it
        field(page, "LoRA").fill("neon"); page.keyboard.press("Enter"); said(page, "Loaded neon")
        checked(page)
        # a LoRA from a file, and a saved picture whose settings come back
        files = page.locator(".ls-drop", has_text="Drop LoRAs").locator("input")
        files.set_input_files(data_path("loras", "teapot.safetensors")); said(page, "Loaded teapot")
        kept = next(iter((server[1] / "pictures" / "history").glob("*/*.png")))
        assert read_settings(kept).prompt == alt
        type_in(page, "Prompt", "something else")
        files.set_input_files(kept); said(page, "Recalled")
        assert field(page, "Prompt").input_value() == alt
        # Stop within a step, and the panel shows what was there before
        before = page.locator(".ls-shown img").get_attribute("src")
        type_in(page, "Steps", 400); page.get_by_role("button", name="Draw", exact=True).click(); page.locator(".ls-badge").wait_for()
        page.get_by_role("button", name="Stop", exact=True).first.click(); said(page, "Stopped at step")
        page.locator(".ls-badge").wait_for(state="detached")
        assert page.locator(".ls-shown img").get_attribute("src") == before


def test_a_mask_is_painted(browser, server):
    with opened(browser, server, 1280, "light", 1400) as page:
        page.get_by_role("button", name="Inpaint", exact=True).click()
        source = server[1] / "source.png"; Image.new("RGB", (64, 64), (20, 90, 200)).save(source)
        page.locator(".ls-redraw .ls-drop input").first.set_input_files(source)
        canvas = page.locator("canvas.ls-canvas"); canvas.wait_for(); canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        page.mouse.move(box["x"] + 10, box["y"] + 10); page.mouse.down()
        page.mouse.move(box["x"] + box["width"] / 3, box["y"] + box["height"] / 2, steps=5); page.mouse.up()
        page.get_by_text("Only the mask is drawn").wait_for()
        type_in(page, "Steps", 4); type_in(page, "Prompt", "a red cat")
        page.get_by_role("button", name="Draw", exact=True).click(); said(page, r"^\d+\.\d\d s$")
        drawn = max((server[1] / "pictures" / "history").glob("*/*.png"), key=lambda p: p.stat().st_mtime_ns)
        s = read_settings(drawn)
        assert s.mask and s.image and Image.open(s.mask).getextrema() == (0, 255)
        assert Image.open(drawn).convert("RGB").resize((64, 64)).getpixel((60, 60)) == (20, 90, 200)    # outside the mask nothing changed
        checked(page)
        page.get_by_role("button", name="Clear the mask").click(); page.get_by_text("All of it is drawn over").wait_for()


@pytest.mark.parametrize("width, theme", [(420, "dark"), (420, "light"), (1280, "dark")])
def test_narrow_and_dark_pages(browser, server, width, theme):
    with opened(browser, server, width, theme) as page:
        type_in(page, "Steps", 2); type_in(page, "Prompt", "a dog"); page.keyboard.press("Control+Enter"); said(page, r"^\d+\.\d\d s$")
        checked(page)
        field(page, "Compare, X/Y plot").scroll_into_view_if_needed()
        inside = lambda css: (b := page.locator(css).first.bounding_box()) and 0 <= b["y"] and b["y"] + b["height"] <= 861
        assert inside(".ls-start .ls-go"), "Draw is out of sight"
        if width == 420: assert inside(".ls-shown img"), "the picture is out of sight"
        back = page.evaluate("getComputedStyle(document.querySelector('.ls')).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", back)[:3])) < 200) == (theme == "dark"), back
        page.get_by_text("Train", exact=True).first.click(); page.get_by_role("button", name="Train", exact=True).wait_for()
        checked(page)
