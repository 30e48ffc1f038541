"""The site without Quarto: python tools/docs.py [_docs]

`_quarto.yml` says what is on the site and in which order. nbdev's own processors turn each notebook into a page, and
Sphinx with MyST-NB draws it (tools/site/conf.py). No notebook is run: what is stored in it is what is shown.
"""
import ast, html, json, os, re, shutil, sys
from pathlib import Path
import yaml
from fastcore.foundation import L
from fastcore.nbio import mk_cell, read_nb, write_nb
from nbdev.config import nbpath2html
from nbdev.doclinks import NbdevLookup
from nbdev.process import NBProcessor, Processor
from nbdev.processors import (_def_types, _want_doc, clean_magics, hide_, hide_line, rm_export, rm_header_dash,
                              strip_ansi)
from nbdev.showdoc import showdoc_nm

ROOT = Path(__file__).resolve().parent.parent
NBS, STAGE = ROOT / "nbs", ROOT / "_proc/sphinx"
QUARTO = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
SITE = QUARTO["website"]
IMAGES = {".jpg", ".jpeg", ".png", ".svg", ".gif"}


# ------------------------------------------------------------------------------------------ what is on the site
def entries(contents):
    "(title or None, notebook) of every page that contents of the sidebar name: paths, globs, `auto` and `href` items."
    for item in [contents] if isinstance(contents, (str, dict)) else contents:
        item = {"auto": item} if isinstance(item, str) else item
        if "contents" in item: yield from entries(item["contents"])
        elif "href" in item: yield item.get("text"), NBS / item["href"]
        else: yield from ((None, p) for p in sorted(NBS.glob(item["auto"])))


def sections():
    "(caption or None, pages) of each entry at the top of the sidebar, in order."
    return [(e.get("section") if isinstance(e, dict) else None, list(entries(e))) for e in SITE["sidebar"]["contents"]]


def docname(notebook):
    "The name of a notebook's page: the one that nbdev gives it, so both builds have the same addresses."
    return nbpath2html(notebook.relative_to(NBS)).with_suffix("").as_posix()


# ------------------------------------------------------------------------------------------ symbols
def signature(node, source):
    "Lines of a definition up to its body, docments and docstring included; of a class also its fields and `__init__`."
    lines, first = source.splitlines(), min([d.lineno for d in node.decorator_list] + [node.lineno]) - 1
    body = node.body
    if not isinstance(node, ast.ClassDef):
        said = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
        return lines[node.lineno - 1:body[0].end_lineno if said else max(body[0].lineno - 1, node.lineno)]
    inner = [n for n in body if isinstance(n, ast.FunctionDef)]
    until = min([d.lineno for n in inner for d in (n, *n.decorator_list)], default=node.end_lineno + 1) - 1
    made = [signature(n, source) for n in inner if n.name == "__init__"]
    return [*lines[first:until], *(line for m in made for line in m)]


def entry(kind, symbol, module, text=""):
    "A symbol as an object of Sphinx: an anchor, a line of the index, a link to its source on GitHub."
    return mk_cell(f"::::{{py:{kind}}} {symbol}\n:module: {module}\n\n{text}\n::::", "markdown")


class Symbols(Processor):
    "An entry for every public symbol: its name above the source where that is shown, its signature where it is hidden."
    def __init__(self, nb, known): self.nb, self.known = nb, known

    def begin(self):
        name = next((c.directives_["default_exp"] for c in self.nb.cells if "default_exp" in c.directives_), None)
        if name: self.nb.cells = [made for cell in self.nb.cells for made in self.entries(cell, f"lora_nb.{name}")]

    def entries(self, cell, module):
        wanted = cell.cell_type == "code" and _want_doc(cell)
        for node in (n for n in cell.parsed_() if isinstance(n, _def_types)) if wanted else ():
            for symbol in L(showdoc_nm(node)):
                public = not any(part.startswith("_") for part in symbol.split("."))
                if not public or f"{module}.{symbol}" in self.known.values(): continue       # e.g. a property's setter
                self.known.setdefault(symbol, f"{module}.{symbol}")
                kind = "class" if isinstance(node, ast.ClassDef) else "method" if "." in symbol else "function"
                code = "\n".join(["```python", *signature(node, cell.source), "```"])
                yield entry(kind, symbol, module, "" if "exports" in cell.directives_ else code)
        yield cell


class Links(NbdevLookup):
    "Symbols in backticks lead to their entries; headings and what is a link already stay as they are."
    def __init__(self, known): self.known = known

    def doc(self, symbol):
        owner = symbol.rpartition(".")[0]
        found = self.known.get(symbol) or (self.known.get(owner) if owner[:1].isupper() else None)
        return found and f"#{found}"

    def link_line(self, line):
        if line.startswith("#"): return line
        link = super().link_line
        return re.sub(r"(\[[^\]]*\]\([^)]*\))|`[^`\s]+?`", lambda m: m[0] if m[1] else link(m[0]), line)


# ------------------------------------------------------------------------------------------ a page
def moved(notebook, pages, faults):
    "The function that makes links of a notebook those of its page; what is not on the site is linked on GitHub."
    here = Path(docname(notebook)).parent

    def move(m):
        if re.match(r"[a-z]+:|#", m[2]): return m[0]
        path, _, anchor = m[2].partition("#")
        file = (notebook.parent / path).resolve()
        if file in pages: new = os.path.relpath(docname(file), here) + ".ipynb" + ("#" + anchor if anchor else "")
        elif file.suffix in IMAGES and file.is_file() and file.is_relative_to(NBS):
            new = os.path.relpath(file.relative_to(NBS), here)
            (STAGE / file.relative_to(NBS)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, STAGE / file.relative_to(NBS))
        elif file.exists():
            kind = "tree" if file.is_dir() else "blob"
            new = f"{SITE['repo-url']}/{kind}/{SITE['repo-branch']}/{file.relative_to(ROOT)}"
        else: faults.append(f"{notebook.relative_to(ROOT)}: {m[2]} is not there"); new = m[2]
        return m[1] + new
    def outside_fences(text):
        parts, link = re.split(r"(?ms)(^```.*?^```$)", text), r"(\]\(|src=\"|href=\")([^)\"\s]+)"
        return "".join(p if p.startswith("```") else re.sub(link, move, p) for p in parts)
    return outside_fences


def page(notebook, known):
    "One notebook after nbdev's processors, with an entry for every symbol; what `#| echo: false` hides is tagged."
    nb = read_nb(notebook)
    procs = [strip_ansi, hide_line, rm_header_dash, clean_magics, hide_, Symbols(nb, known), rm_export]
    NBProcessor(nb=nb, procs=procs, process=True)
    nb.cells = [c for c in nb.cells if c.cell_type != "raw" and c.source.strip()]
    nb.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    for c in nb.cells:
        if c.cell_type != "code": continue
        c.metadata["tags"] = [tag for tag, on in {"remove-input": c.directives_.get("echo") == "false",
                                                  "exports": "exports" in c.directives_}.items() if on]
    return nb


def moving(output):
    "A strip of pictures with a note, as a figure of which tools/site/figures.js makes a slider."
    note = output.get("metadata", {}).get("lora_nb_frames")
    if not note: return
    kind = next(k for k in ("image/jpeg", "image/png") if k in output["data"])
    data, alt = "".join(output["data"][kind]).replace("\n", ""), f"{note['label']}: {', '.join(note['values'])}"
    output["data"] = {"text/html": f'<figure class="frames" data-note="{html.escape(json.dumps(note))}"><img src="data:{kind};base64,{data}" '
                                   f'alt="{html.escape(alt)}"></figure>'}


LIVE = f"{SITE['site-url']}/live/"      # the page that draws; in Markdown its full address, on the site a relative one


def to_live(text, docname):
    "Links to the live page as plain HTML, which Sphinx does not take for a page of its own."
    here = "../" * docname.count("/") + "live/index.html"
    def said(x): return x.replace("<img ", '<img class="no-scaled-link" ', 1) if x.startswith("<img ") else html.escape(x)   # no link in a link
    def link(m): return f'<a href="{here}{m[2]}">{said(m[1])}</a>'
    return re.sub(r"\[([^\]]*)\]\(" + re.escape(LIVE) + r"([^)]*)\)", link, text)


BADGE = re.compile(r"\[!\[[^\]]*\]\([^)]*colab-badge[^)]*\)\]\(([^)]*)\)")      # its picture would be missing offline


def stage():
    "All pages, linked with each other, in STAGE, the tree of contents on the first; what is as before is not touched."
    pages = [p.resolve() for _, part in sections() for _, p in part]
    left = [p for p in sorted(NBS.rglob("[!.]*.ipynb")) if p not in pages and ".ipynb_checkpoints" not in p.parts]
    faults = [f"{p.relative_to(ROOT)} is not in the sidebar of _quarto.yml" for p in left]
    faults += [f"_quarto.yml names {p.relative_to(ROOT)}, which is not there" for p in pages if not p.exists()]
    if faults: raise SystemExit("\n".join(faults))
    known = {}
    books = {p: page(p, known) for p in pages}
    for p, nb in books.items():
        move = moved(p, pages, faults)                        # names of the zoo are short: linked within the zoo only
        links = Links({k: v for k, v in known.items() if "zoo" in p.parts or ".zoo." not in v})
        for c in nb.cells:
            for o in c.get("outputs", []): moving(o)
            said = [(c, "source")] if c.cell_type == "markdown" else []
            said += [(o["data"], k) for o in c.get("outputs", []) for k in o.get("data", {}) if k == "text/markdown"]
            for place, k in said:
                text = BADGE.sub(r"[Open in Colab](\1){.colab}", "".join(place[k]))
                place[k] = to_live(links.linkify(move(text)), docname(p))
        if p == pages[0]: nb.cells.append(mk_cell(tree(), "markdown"))
        (STAGE / docname(p)).parent.mkdir(parents=True, exist_ok=True)
        write_nb(nb, (STAGE / docname(p)).with_suffix(".ipynb"))
    for old in STAGE.rglob("*.ipynb"):
        if old.relative_to(STAGE).with_suffix("").as_posix() not in map(docname, pages): old.unlink()
    if faults: raise SystemExit("\n".join(faults))


def tree():
    "The order of the pages, for Sphinx."
    def line(title, p): return f"{title} <{docname(p)}>" if title else docname(p)
    trees = ["\n".join(["```{toctree}", ":hidden:", *([f":caption: {caption}"] if caption else []), "",
                        *(line(*e) for e in part), "```"]) for caption, part in sections() if part]
    trees.append("```{toctree}\n:hidden:\n\nAll names <genindex>\n```")
    title, first = sections()[0][1][0]
    return "\n\n".join(trees).replace(line(title, first), f"{title or SITE['title']} <self>", 1)


def build(target):
    "The site in a folder; anything that Sphinx has to warn of is an error."
    from sphinx.cmd.build import main
    stage()
    strict, made = ["-n", "-W", "--keep-going", "-q"], STAGE.parent / "site"         # MyST-NB writes beside it, too
    shutil.rmtree(made, ignore_errors=True)                                          # pages that are no more
    places = ["-c", ROOT / "tools/site", "-d", STAGE.parent / "doctrees", STAGE, made]
    failed = main(["-b", "html", *strict, *map(str, places)])
    if failed: return failed
    shutil.copytree(made, target, dirs_exist_ok=True)
    with_page(ROOT / "out/live", Path(target, "live"))
    return failed


def with_page(page, target):
    "The page that draws, with its scripts as they are today."
    if not (page / "page.json").exists(): return print(f"{page.name} is not there: the site comes without the page that draws (make live)")
    if "draw" not in json.loads((page / "page.json").read_text())["bytes"]:
        raise SystemExit(f"{page} was made by an earlier version of the chapter `live`: make it again (make live)")
    shutil.rmtree(target, ignore_errors=True)
    for folder in (page, ROOT / "lora_nb/live/page"): shutil.copytree(folder, target, dirs_exist_ok=True)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("-") or len(sys.argv) > 2: sys.exit(__doc__)      # --help is no folder
    if len(sys.argv) < 2: shutil.rmtree(ROOT / "_docs", ignore_errors=True)
    sys.exit(build(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_docs"))
