"README.md from nbs/index.ipynb, by nbdev's processing and nbconvert: python tools/readme.py [README.md]"
import posixpath, re, sys
from pathlib import Path
import nbformat
from fastcore.nbio import nb2str, read_nb
from nbconvert import MarkdownExporter
from traitlets.config import Config
from nbdev.processors import (FilterDefaults, clean_magics, hide_, hide_line, rm_export, rm_header_dash, strip_ansi,
                              strip_hidden_metadata)


class ForGitHub(FilterDefaults):
    "Without what only the site needs: front matter, links into the API pages, folds."
    def base_procs(self):
        return [strip_ansi, hide_line, rm_header_dash, rm_export, clean_magics, hide_, strip_hidden_metadata]


def from_root(text, folder="nbs"):
    "Links that were relative to the notebook become relative to the repository."
    def moved(m): return m[1] + (m[2] if re.match(r"[a-z]+:|#|/", m[2]) else posixpath.normpath(f"{folder}/{m[2]}"))
    return re.sub(r'(\]\(|src="|href=")([^)"\s]+)', moved, text)


def readme(notebook):
    "Markdown of the index."
    nb = read_nb(notebook)
    ForGitHub()(nb)
    nb.metadata["language_info"] = {"name": "python"}
    for c in nb.cells:
        if re.search(r"^#\|\s*echo:\s*false", c.source, re.M): c.metadata["tags"] = ["no-source"]
        c.source = re.sub(r"^#\|.*\n", "", c.source, flags=re.M)
    options = Config(TagRemovePreprocessor=dict(enabled=True, remove_input_tags=["no-source"]))
    text, found = MarkdownExporter(config=options).from_notebook_node(nbformat.reads(nb2str(nb), as_version=4))
    if found["outputs"]: raise SystemExit("the index has pictures among its outputs: they belong in files")
    note = "<!-- Written by `make readme` from nbs/index.ipynb: edit that. -->\n\n"
    return note + from_root(re.sub(r"\n{3,}", "\n\n", text).strip()) + "\n"


if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else root / "README.md"
    target.write_text(readme(root / "nbs/index.ipynb"), encoding="utf-8")
