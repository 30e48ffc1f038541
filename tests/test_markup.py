"Text from files, folders and prompts is shown as letters, never obeyed: in notebooks, on terminals, in exported Python."
import os
import random
import re
from html.parser import HTMLParser

import markdown_it
import pytest
import torch
from PIL import Image

from helpers_files import small_lora
from lora_nb.core import LoraError, Markup, escaped, printable, table
from lora_nb.lora import Factors, Lora

ATTACK = ("<img src=x onerror=alert(1)>\x1b[2J</pre></code><script>alert(2)</script> [a](javascript:b) ![c](http://d) | *e* `f`\n\n"
          "# g\n<iframe> $\\href{javascript:h}{i}$ \u202e https://j.k www.l.m n@o.p &lt;b&gt; __q__ ~~r~~")
ALLOWED = {"p", "table", "thead", "tbody", "tr", "th", "td", "strong", "code", "pre", "ul", "li", "span", "br", "a"}


class Rendered(HTMLParser):
    "Elements and text of a page"
    def __init__(self, page):
        super().__init__(); self.tags, self.attributes, self.text = set(), [], ""
        self.feed(page)
    def handle_starttag(self, tag, attrs): self.tags.add(tag); self.attributes += attrs
    def handle_data(self, data): self.text += data


def rendered(markdown):
    page = markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown)
    return Rendered(page)


def acts(markdown):
    "What of a Markdown text would act in a notebook: elements, attributes, formulas"
    found = rendered(markdown)
    formulas = re.findall(r"\$[^$<]*\$", re.sub(r"<pre>.*?</pre>", "", markdown, flags=re.S))
    return found.tags - ALLOWED, [a for a in found.attributes if a[0] not in ("class", "style")], formulas


def test_escaped_text_is_shown_letter_by_letter():
    rng, marks = random.Random(0), "<>&\"'`*_[]()!#|~$\\-+=.:/@ ab1\n\t\x1b"
    for _ in range(2000):
        text = "".join(rng.choice(marks) for _ in range(rng.randrange(1, 25)))
        shown = rendered(f"x {escaped(text)} y\n\n- {escaped(text)}\n\n{table(['a'], [[text]])}")
        want = " ".join(printable(text).split())
        assert shown.tags <= {"p", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "span"}, text
        assert [" ".join(l.split()) for l in shown.text.split("\n") if l.strip()] == \
            [f"x {want} y".replace("  ", " "), *[want] * bool(want), "a", *[want] * bool(want)], text


def test_what_is_marked_as_markup_stays(): assert "**a**" in table(["x"], [[Markup("**a**")]]) and escaped(Markup("<b>")) == "<b>"


def test_control_characters_are_spelled_out():
    for bad in ("\x1b]0;title\x07", "\r", "\x9b", "\u202e", "\udc80", "\0"):
        assert bad not in printable(f"a{bad}b") and printable(f"a{bad}b").isprintable()
        assert printable(f"a{bad}b").encode() and bad not in str(LoraError(f"no file a{bad}b"))
    assert printable("naïve 日本語 👩‍🚀\t\n") == "naïve 日本語 👩‍🚀\t\n"


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    "A LoRA file in which every text is an attack, and a folder of pictures with such captions"
    lora, folder = small_lora(), tmp_path_factory.mktemp("nasty")
    layers = {**lora.layers, f"unet.{ATTACK}": Factors(torch.ones(2, 1), torch.ones(1, 2))}
    words = {f"<{ATTACK}>": {"text_encoder": torch.ones(1, 32)}}
    about = {k: ATTACK for k in ("trigger", "base", "concept", "recipe", "ss_base_model_version", "ss_tag_frequency", ATTACK)}
    for i in range(2):
        Image.new("RGB", (16, 16), (i * 90, 40, 40)).save(folder / f"<img src=x onerror=alert({i})>.png")
        (folder / f"<img src=x onerror=alert({i})>.txt").write_text(ATTACK)
    return Lora(layers, words, about), folder


def reports(nasty, tmp_path):
    "name -> anything of ours that shows text from elsewhere"
    from lora_nb.families import as_base
    from lora_nb.conversion import convert_lora, lora_file_info
    from lora_nb.dataset import ConceptDataset
    from lora_nb.evaluation import Evaluation
    from lora_nb.preprocessing import PreprocessReport
    from lora_nb.random_pipes import random_pipe
    from lora_nb.recipe import Recipe
    (lora, folder), pipe = nasty, random_pipe("sd")
    row = dict(source=ATTACK, mask=False, why=[ATTACK], files=[ATTACK], notes=[ATTACK], text=ATTACK)
    file = tmp_path / "<b>.safetensors"
    converted = convert_lora(Lora(small_lora().layers, lora.embeddings, lora.metadata), file, "peft")
    base = as_base(pipe); base.name = ATTACK
    number = dict(before=1., after=1., n=1)
    return dict(lora=lora, info=lora_file_info(file), report=lora.report(pipe), conversion=converted, data=ConceptDataset(folder, size=16),
                evaluation=Evaluation({ATTACK: number}), prepared=PreprocessReport([row, {**row, "why": []}], tmp_path),
                recipe=Recipe(targets=ATTACK), base=base)


def test_nothing_that_a_notebook_shows_acts(nasty, tmp_path):
    for name, value in reports(nasty, tmp_path).items():
        text = repr(value)
        assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", text) or type(value).__repr__ is object.__repr__, name
        if not hasattr(value, "_repr_markdown_"): continue
        tags, attributes, formulas = acts(value._repr_markdown_())
        assert not tags and not attributes and not formulas, (name, tags, attributes, formulas)
        assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", value._repr_markdown_()), name
        if name not in ("conversion", "prepared"): assert "onerror" in rendered(value._repr_markdown_()).text, name


def test_a_name_that_is_not_utf8_stops_nothing(tmp_path, capsys):
    "A photograph's name in another encoding: recipe.toml, metadata.jsonl, a card and a PNG's settings were raw UnicodeEncodeErrors"
    import json, tomllib
    from lora_nb.cli.train import lora_dreambooth
    from lora_nb.dreambooth import train_dreambooth
    from lora_nb.model_card import write_card
    from lora_nb.preprocessing import preprocess
    from lora_nb.random_pipes import random_pipe
    from lora_nb.recipe_file import recipe_text
    from lora_nb.studio.code import png_bytes, read_settings
    from lora_nb.studio.settings import Settings, Wear
    bad = os.fsdecode(b"caf\xe9")
    folder = tmp_path / bad; folder.mkdir()
    for i in range(2): Image.effect_noise((64, 64), 60 + 40 * i).convert("RGB").save(folder / f"{bad}{i}.png")
    out = folder / "out"
    train_dreambooth(random_pipe("sd"), folder, "a sks toy", output_dir=out, steps=1, rank=1, batch_size=1)
    said = (out / "recipe.toml").read_text("utf-8")
    assert "Not UTF-8, so not in this file: instance_data_dir, output_dir" in said and tomllib.loads(said)["instance_prompt"] == "a sks toy"
    text = recipe_text("x", {"a": bad, "b": 1}, {"targets": [bad], "steps": 2})
    assert tomllib.loads(text) == {"command": "x", "b": 1, "recipe": {"steps": 2}} and "a, targets." in text and text.encode()
    assert len(preprocess(folder, tmp_path / "done", size=32).kept) == 2
    lines = [json.loads(l) for l in (tmp_path / "done/metadata.jsonl").read_text("utf-8").splitlines()]
    assert all((tmp_path / "done" / l["file_name"]).is_file() for l in lines) and len(lines) == 2
    card = write_card(Lora(metadata=dict(trigger=bad, base=f"\x1b[2J{bad}")), tmp_path).read_text("utf-8")
    assert "caf\\udce9" in card and "\x1b" not in card
    s = Settings(bad, loras=(Wear(bad, str(folder / "x.safetensors")),))
    assert read_settings(png_bytes(Image.new("RGB", (8, 8)), s)) == s
    with pytest.raises(SystemExit): lora_dreambooth(["--instance_prompt", bad, "--instance_data_dir", folder, "--output_dir", tmp_path / "y"])
    assert "--instance_prompt is not UTF-8" in capsys.readouterr().err and not (tmp_path / "y").exists()


def test_keys_of_a_file_are_text(tmp_path):
    import json, struct
    from lora_nb.formats import load_lora
    from lora_nb.core import FormatError
    for key in ("unet.\ud800.lora_A.weight", "<\ud800>"):
        header = json.dumps({key: dict(dtype="F32", shape=[1, 2], data_offsets=[0, 8])}).encode()
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        with pytest.raises(FormatError, match="should be text in UTF-8"): load_lora(tmp_path / "a.safetensors")
    torch.save({"\udc80": torch.ones(32)}, tmp_path / "b.bin")
    with pytest.raises(FormatError, match="should be text in UTF-8"): load_lora(tmp_path / "b.bin")


def test_the_studio_shows_formulas_and_directions_as_text():
    "ipywidgets hands the text of an HTML widget to MathJax"
    from lora_nb.studio.panel import note_html
    for error in (True, False):
        page = note_html(ATTACK, error)
        found = Rendered(page)
        assert found.tags <= {"span", "div"} and found.text == " ".join(printable(ATTACK).split())
        assert "$" not in page and "\\" not in page and "\u202e" not in page and "\x1b" not in page
