"The book's links: each leads somewhere, each badge opens its own page, and `Next` leads on."
import json, re
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
TEXTS = sorted([*(ROOT / "nbs").rglob("*.ipynb"), *ROOT.glob("*.md"), *(ROOT / "data").rglob("*.md")])
LINK = re.compile(r"(?<!\\)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
BADGE = "https://colab.research.google.com/github/lora-nb/lora_nb/blob/main/"


def prose(path):
    "The text without its blocks of code."
    if path.suffix == ".ipynb":
        text = "\n\n".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown")
    else: text = path.read_text(encoding="utf-8")
    return re.sub(r"(?ms)^```.*?^```", "", text)


def anchors(path):
    heads = re.findall(r"(?m)^#+ (.*)$", prose(path))
    return {re.sub(r"[^\w\- ]", "", LINK.sub(r"\1", h).strip().lower()).replace(" ", "-") for h in heads}


def broken(path):
    for _, url in LINK.findall(prose(path)):
        if url.startswith(BADGE) and ROOT / url[len(BADGE):] != path: yield f"the badge opens {url[len(BADGE):]}"
        if re.match(r"\w+:", url): continue
        to, _, part = url.partition("#")
        target = path.parent / to if to else path
        if not target.exists(): yield f"{url}: there is no such file"
        elif part and target.suffix in (".ipynb", ".md") and part.lower() not in anchors(target): yield f"{url}: there is no such heading"


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    assert not list(broken(path))


def test_broken_links_are_seen(tmp_path, monkeypatch):
    page = tmp_path / "a.md"
    page.write_text("# One\n[x](a.md#one) [x](a.md#two) [x](b.md) `[x](c.md)`\n```\n[x](d.md)\n```\n" + f"[x]({BADGE}nbs/00_core.ipynb)")
    assert list(broken(page)) == ["a.md#two: there is no such heading", "b.md: there is no such file", "c.md: there is no such file",
                                  "the badge opens nbs/00_core.ipynb"]


def test_next_leads_on():
    "The closing link of a chapter goes to one of the chapters that follow soon: nobody is sent back, or across half the book."
    place = {p.name: i for i, p in enumerate(CHAPTERS)}
    wrong = []
    for i, p in enumerate(CHAPTERS):
        for name in re.findall(r"(?m)^(?:- )?Next(?: chapter)?[,:][^\[]*\[[^\]]*\]\(([^)]*)\)", prose(p)):
            if not 0 < place[name] - i <= 7: wrong.append((p.name, name))
    assert not wrong


def test_chapters_are_named_by_links():
    "No chapter is named by its number alone: numbers change, and a link that follows a rename is checked above."
    for p in TEXTS:
        if p.name == "CHANGELOG.md": continue                                                 # it tells of earlier editions
        assert not re.findall(r"(?i)\bchapters? \d+b?\b", prose(p)), p.name
