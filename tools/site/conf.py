"Sphinx's settings: what is said of the site comes from _quarto.yml, what is said of the package from settings.ini."
import sys
from configparser import ConfigParser
from pathlib import Path
from docutils import nodes
from latex2mathml.converter import convert
from nbdev.doclinks import NbdevLookup, _lineno

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from docs import NBS, QUARTO, docname, sections  # noqa: E402

SITE, PAGES = QUARTO["website"], {docname(p): p for _, part in sections() for _, p in part}
ini = ConfigParser(delimiters=["="])
ini.read(ROOT / "settings.ini", encoding="utf-8")

project, author, version = SITE["title"], ini["DEFAULT"]["author"], ini["DEFAULT"]["version"]
project_copyright = author
extensions = ["myst_nb", "sphinx.ext.linkcode"]
root_doc, language = "index", "en"
nitpicky = True

# ---- pages
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {}                                                           # no script from elsewhere
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "dollarmath", "html_image"]
card = f"{SITE['site-url']}/_static/{Path(SITE['image']).name}"
myst_html_meta = {"description": SITE["description"], "property=og:title": project, "property=og:image": card,
                  "property=og:description": SITE["description"], "twitter:card": "summary_large_image"}
add_function_parentheses = False
add_module_names = False
toc_object_entries_show_parents = "hide"

# ---- looks
html_theme = "furo"
html_title = html_short_title = project
html_baseurl = SITE["site-url"] + "/"
html_favicon = str(NBS / SITE["favicon"])
html_static_path = ["style.css", "figures.js", "copy.js", str(NBS / SITE["image"])]
html_css_files = ["style.css"]
html_js_files = [("figures.js", {"type": "module"}), ("copy.js", {"type": "module"})]
html_search_scorer = str(ROOT / "tools/site/scorer.js")
html_extra_path = [str(p) for p in [NBS / "llms.txt"] if p.exists()]
html_copy_source = html_show_sourcelink = html_show_sphinx = False
pygments_style, pygments_dark_style = "default", "github-dark"
html_theme_options = {"footer_icons": [], "source_repository": SITE["repo-url"], "source_branch": SITE["repo-branch"],
                      "source_directory": SITE["repo-subdir"] + "/"}


def linkcode_resolve(domain, info):
    "The line on GitHub where a symbol is defined."
    found = NbdevLookup()[f"{info['module']}.{info['fullname']}"]
    line = found and _lineno(info["fullname"], found[1])
    return found and found[2] + (f"#L{line}" if line else "")


def source_links(app, pagename, templatename, context, doctree):
    "A page's source is the numbered notebook, not the name of the page."
    if pagename in PAGES:
        path = f"{SITE['repo-branch']}/{PAGES[pagename].relative_to(ROOT).as_posix()}"
        context["theme_source_view_link"] = f"{SITE['repo-url']}/blob/{path}"
        context["theme_source_edit_link"] = f"{SITE['repo-url']}/edit/{path}"


def mathematics(display):
    "LaTeX as MathML, which browsers draw by themselves: no script, no font, nothing to fetch."
    def visit(self, node):
        self.body.append(convert(node.astext(), display=display))
        raise nodes.SkipNode
    return visit, None


def setup(app):
    app.add_html_math_renderer("mathml", mathematics("inline"), mathematics("block"))
    app.connect("html-page-context", source_links)


html_math_renderer = "mathml"
