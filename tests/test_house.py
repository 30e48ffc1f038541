"The rules of the house (CONTRIBUTING.md), read from the source: nothing is imported."
import ast, json, re, sys
from pathlib import Path
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, NBS = ROOT / "lora_nb", ROOT / "nbs"
sys.path.insert(0, str(ROOT / "tools"))
import stubs                                            # tools/stubs.py

MODULES = {m: tree for m, (_, tree) in stubs.read(PACKAGE).items()}
SOURCES = {m: file for m, (file, _) in stubs.read(PACKAGE).items()}
FETCHED = {("lora", "load", "formats"), ("lora", "save", "formats"), ("lora", "report", "report")}   # the one exception


def sources(path):
    "Sources of the code cells of a notebook."
    return ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


def sidebar(contents=None):
    "Notebooks in the order of the site's sidebar."
    for item in yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"] if contents is None else contents:
        if isinstance(item, str): yield from sorted(NBS.glob(item))
        elif "href" in item: yield NBS / item["href"]
        elif "auto" in item: yield from sorted(NBS.glob(item["auto"]))
        else: yield from sidebar([item["contents"]] if isinstance(item["contents"], str) else item["contents"])


def exported_by(path):
    "The module that a notebook writes, or None."
    found = [m[1] for s in sources(path) if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", s, re.M))]
    return found[0].removesuffix(".__init__") if found else None


PAGES = list(sidebar())
ORDER = [m for m in map(exported_by, PAGES) if m]


def is_type_checking(node): return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(module):
    "(function or None, module, name) of each import from lora_nb, inside functions too, without those for type checkers."
    found = []

    def visit(node, function):
        if is_type_checking(node): return
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): function = node.name
        if isinstance(node, ast.Import):
            found.extend((function, a.name[8:], None) for a in node.names if a.name.startswith("lora_nb."))
        if isinstance(node, ast.ImportFrom):
            folder = module.split(".") if SOURCES[module].name == "__init__.py" and module != "__init__" else module.split(".")[:-1]
            if node.level:
                base = folder[:len(folder) - node.level + 1]
                target = ".".join([*base, *([node.module] if node.module else [])])
            elif (node.module or "").split(".")[0] == "lora_nb": target = node.module[8:]
            else: target = None
            for a in node.names if target is not None else ():
                whole = f"{target}.{a.name}".strip(".")
                found.append((function, whole, None) if whole in MODULES else (function, target, a.name))
        for child in ast.iter_child_nodes(node): visit(child, function)

    visit(MODULES[module], None)
    return found


def listed(module):
    "Names in a module's `__all__`."
    return [x for n in MODULES[module].body if isinstance(n, (ast.Assign, ast.AugAssign))
            and ast.unparse(n.targets[0] if isinstance(n, ast.Assign) else n.target) == "__all__" for x in ast.literal_eval(n.value)]


OURS = [m for m in MODULES if m != "__init__"]


def test_every_module_has_its_place_in_the_sidebar():
    assert len(set(ORDER)) == len(ORDER)
    assert set(OURS) - {"zoo"} <= set(ORDER) | {m for m in OURS if SOURCES[m].stat().st_size < 1500}, set(OURS) - set(ORDER)


def test_chapters_are_numbered_in_the_order_of_the_sidebar():
    numbers = [p.name for p in PAGES if p.parent == NBS and re.match(r"\d\d", p.name)]
    assert numbers == sorted(numbers) and len(numbers) > 25
    assert sorted({int(n[:2]) for n in numbers}) == list(range(int(numbers[-1][:2]) + 1))      # `NNb` goes with its neighbour NN


def test_arrows_point_down():
    place = {m: i for i, m in enumerate(ORDER)}
    up = [f"{m} -> {to} ({function or 'top'})" for m in OURS if m in place for function, to, _ in imports(m)
          if to in place and place[to] >= place[m] and (m, function, to) not in FETCHED]
    assert not (found := up), found


def test_the_value_stands_on_the_ground():
    assert {to for f, to, _ in imports("lora") if ("lora", f, to) not in FETCHED} <= {"core", "names"}
    assert {to for _, to, _ in imports("names")} <= {"core"}


def test_private_names_stay_at_home():
    across = [f"{m}: {name} of {to}" for m in OURS for _, to, name in imports(m) if name and name.startswith("_") and name[:2] != "__"]
    assert not across, across


def test_the_drop_in_is_a_room_of_its_own():
    assert not [m for m in OURS for _, to, _ in imports(m) if to == "lora_diffusion"]
    drop = set(listed("lora_diffusion"))
    names = {"inject_trainable_lora", "monkeypatch_add_lora", "patch_pipe", "save_all"}
    assert names <= drop, names - drop
    may = lambda m: m == "lora_diffusion" or m.split(".")[0] == "cli"                 # a command is called as it was there
    assert not (own := {(m, n) for m in OURS if not may(m) for n in listed(m) if n in drop}), own


def test_the_toolbox_does_not_know_the_toy_world():
    may = lambda m: m.split(".")[0] in ("zoo", "studio") or m in ("lessons", "cli.pages", "cli.demo")
    assert not (found := {f"{m} -> {to}" for m in OURS if not may(m) for _, to, _ in imports(m) if to.split(".")[0] == "zoo"}), found


def test_rooms_that_one_can_take_in():
    lines = {m: len(SOURCES[m].read_text().splitlines()) for m in OURS}
    assert not (found := {m for m, n in lines.items() if n > 650}), found


def methods_of(name, module):
    "Functions of a class: those in its body and those added to it anywhere in the package."
    body = [n for t in MODULES.values() for n in t.body if isinstance(n, ast.ClassDef) and n.name == name for n in n.body]
    inside = [n for n in body if isinstance(n, ast.FunctionDef)]
    added = [n for t in MODULES.values() for n in t.body if isinstance(n, ast.FunctionDef) and (p := stubs.patch_of(n)) and p[0] == name]
    return body, inside, added


def test_a_class_declares_its_state_in_one_place():
    late = []
    for m in OURS:
        for cls in (n for n in MODULES[m].body if isinstance(n, ast.ClassDef)):
            body, inside, added = methods_of(cls.name, m)
            declared = {t.id for n in body if isinstance(n, (ast.Assign, ast.AnnAssign))
                        for t in (n.targets if isinstance(n, ast.Assign) else [n.target]) for t in ast.walk(t) if isinstance(t, ast.Name)}
            first = [f for f in inside if f.name in ("__init__", "__post_init__", "__new__")]
            declared |= set(stubs.own_attributes(first)) | {f.name for f in [*inside, *added]}
            bases = {ast.unparse(b).split(".")[-1] for b in cls.bases}
            if not first and not declared or bases - {"dict", "object"} and not first: continue    # state of a base class
            for f in [*inside, *added]:
                if f in first or not f.args.args: continue
                new = set(stubs.own_attributes([f])) - declared
                if bases - {"dict", "object"}:
                    parents = {x for b in bases for x in stubs.own_attributes(methods_of(b, m)[1])}
                    parents |= {t.target.id for b in bases for t in methods_of(b, m)[0] if isinstance(t, ast.AnnAssign)}
                    new -= parents
                late += [f"{m}.{cls.name}.{a}, first set in {f.name}" for a in new]
    assert not (found := late), found


def front():
    return {t: ns.split() for n in MODULES["reference"].body if isinstance(n, (ast.Assign, ast.AugAssign))
            and ast.unparse(n.targets[0] if isinstance(n, ast.Assign) else n.target) == "FRONT"
            for t, ns in ast.literal_eval(n.value).items()}


def test_a_small_front_door():
    names = [n for ns in front().values() for n in ns]
    assert 100 <= len(names) <= 150 and len(set(names)) == len(names), len(names)
    public = {x for m in OURS for x in listed(m)}
    assert set(names) <= public, set(names) - public


def test_no_two_modules_offer_one_name():
    owners = {}
    for m in OURS:
        if SOURCES[m].name == "__init__.py": continue               # a package hands on what its modules offer
        for n in listed(m): owners.setdefault(n, []).append(m)
    twice = {n: ms for n, ms in owners.items() if len(ms) > 1 and not all(m.startswith("zoo.") for m in ms)}
    assert not (found := {f"{n}: {', '.join(sorted(ms))}" for n, ms in twice.items()}), found


def test_every_name_at_the_front_door_is_shown_in_use():
    cells = [s for p in NBS.rglob("*.ipynb") if not p.name.startswith(".") for s in sources(p) if not re.match(r"#\|\s*(exports?|hide)\b", s)]
    text = "\n".join(re.sub(r"^\s*from .*$", "", s, flags=re.M) for s in cells)
    commands = text + "\n".join("".join(c["source"]) for p in NBS.rglob("*.ipynb") if not p.name.startswith(".")
                                for c in json.loads(p.read_text())["cells"] if c["cell_type"] == "markdown")
    hidden = [n for topic, ns in front().items() for n in ns if not re.search(rf"\b{n}\b", commands if topic in ("commands", "studio") else text)]
    assert not (found := hidden), found


def test_public_functions_are_documented():
    bare = [f"{m}.{n.name}" for m in OURS if not m.startswith("zoo") for n in MODULES[m].body
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in listed(m) and not ast.get_docstring(n)]
    assert not (found := bare), found


def test_stubs_are_fresh():
    made = stubs.stubs(PACKAGE)
    stale = [str(p.relative_to(ROOT)) for p, text in made.items() if not p.exists() or p.read_text() != text]
    assert not stale and set(PACKAGE.rglob("*.pyi")) == set(made), f"run make export: {stale}"
    assert (PACKAGE / "py.typed").exists()


CHAPTERS = [p for p in PAGES if p.parent == NBS and re.match(r"\d\d", p.name)]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_exported_cells_are_short(path):
    long = [(len(s.splitlines()), s.splitlines()[1][:60]) for s in sources(path) if re.match(r"#\|\s*exports?\b", s)
            and sum(1 for line in s.splitlines() if line.strip()) > 41]
    assert not long, long


def test_tests_that_the_text_names_are_there():
    named = {(p.name, t) for p in NBS.rglob("[!.]*.ipynb") for t in re.findall(r"tests/test_\w+\.py", p.read_text(encoding="utf-8"))}
    assert not (gone := {(p, t) for p, t in named if not (ROOT / t).exists()}), gone


@pytest.mark.parametrize("path", sorted((ROOT / "lora_nb").rglob("*.py")), ids=lambda p: "/".join(p.with_suffix("").parts[-2:]))
def test_nothing_is_defined_twice(path):
    "A second definition hides the first, with all that was mended in it: a merge once left the studio's `show` so"
    on = lambda n: next((ast.unparse(d.args[0]) for d in n.decorator_list if isinstance(d, ast.Call) and ast.unparse(d.func) == "patch_to"), "")
    names = [(on(n), n.name) for n in ast.parse(path.read_text()).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    assert not (twice := {n for n in names if names.count(n) > 1}), twice
