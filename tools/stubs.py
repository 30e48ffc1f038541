"""Type stubs for editors and type checkers: python tools/stubs.py [folder of the package]

Three things are invisible to them: names that `lora_nb` fetches when they are first used, methods that a chapter adds to a
class with `@patch_to`, and options that a function takes by `@delegates`. This writes `__init__.pyi`, and a `.pyi` beside each
module that has one of the latter, in which classes have all their methods and functions all their options. Other modules are
read as they are. Nothing is imported: it works on the source alone.
"""
import ast, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = "# Written by tools/stubs.py from the exported modules (make export): do not edit.\n"
KEPT = {"dataclass", "contextmanager", "staticmethod", "classmethod", "property", "overload", "lru_cache", "cached_property",
        "torch.no_grad()", "abstractmethod"}


def module_name(file, package):
    "`studio.easel` of lora_nb/studio/easel.py."
    return ".".join(file.relative_to(package).with_suffix("").parts).removesuffix(".__init__")


def imports_of(tree):
    "Imports at the top of a module, those under TYPE_CHECKING included."
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)): yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from (n for n in node.body if isinstance(n, (ast.Import, ast.ImportFrom)))


def type_of(value):
    "The type of a constant, as far as its expression shows it."
    match value:
        case ast.Constant(value=None): return "Any"
        case ast.Constant(): return type(value.value).__name__
        case ast.JoinedStr(): return "str"
        case ast.Dict() | ast.DictComp(): return "dict[Any, Any]"
        case ast.Call(func=ast.Name(id="dict")): return "dict[str, Any]"
        case ast.List() | ast.ListComp(): return "list[Any]"
        case ast.Tuple(): return "tuple[Any, ...]"
        case ast.Set() | ast.SetComp(): return "set[Any]"
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant()): return type(value.operand.value).__name__
        case ast.Compare() | ast.BoolOp() if all(isinstance(n, ast.Compare) for n in getattr(value, "values", [value])): return "bool"
    return "Any"


def default_of(node):
    "A default as the stub shows it: plain constants, else `...`."
    plain = isinstance(node, ast.Constant) or isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant)
    return node if plain else ast.Constant(...)


def function_stub(node, extra=()):
    "Lines of a function without its body."
    a = node.args
    a.defaults = [default_of(d) for d in a.defaults]
    a.kw_defaults = [d and default_of(d) for d in a.kw_defaults]
    kept = [ast.unparse(d) for d in node.decorator_list if re.split(r"[(]", ast.unparse(d))[0] in KEPT]
    returns = node.returns and ast.unparse(node.returns)
    if "contextmanager" in kept and (returns is None or "Iterator" not in returns and "Generator" not in returns):
        returns = f"Iterator[{returns or 'Any'}]"
    if returns is None and node.name in ("__init__", "__setattr__", "__exit__"): returns = "None"
    lines = [f"@{d}" for d in [*extra, *kept]]
    return [*lines, f"def {node.name}({ast.unparse(a)}){f' -> {returns}' if returns else ''}: ..."]


def own_attributes(functions):
    "name -> annotation of what methods assign to `self`."
    found = {}
    for f in functions:
        given = {x.arg: ast.unparse(x.annotation) for x in [*f.args.args, *f.args.kwonlyargs] if x.annotation}
        if not f.args.args: continue
        me = f.args.args[0].arg
        for node in ast.walk(f):
            pairs = []
            if isinstance(node, ast.Assign):
                for t in node.targets:
                    if isinstance(t, ast.Tuple) and isinstance(node.value, ast.Tuple) and len(t.elts) == len(node.value.elts):
                        pairs += zip(t.elts, node.value.elts)
                    elif isinstance(t, ast.Tuple): pairs += [(e, None) for e in t.elts]
                    else: pairs.append((t, node.value))
            elif isinstance(node, ast.AnnAssign): pairs = [(node.target, node)]
            for t, v in pairs:
                if not (isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name) and t.value.id == me): continue
                said = ast.unparse(v.annotation) if isinstance(v, ast.AnnAssign) else \
                    given.get(v.id, "Any") if isinstance(v, ast.Name) else type_of(v) if v is not None else "Any"
                found.setdefault(t.attr, said)
    return found


def class_stub(node, patches):
    "Lines of a class with the methods that other cells and chapters add."
    decorators = [f"@{ast.unparse(d)}" for d in node.decorator_list if ast.unparse(d).split("(")[0] in KEPT]
    bases = ", ".join([*map(ast.unparse, node.bases), *(f"{k.arg}={ast.unparse(k.value)}" for k in node.keywords)])
    body, names, functions = [], set(), []
    for n in node.body:
        if isinstance(n, ast.AnnAssign):
            names.add(n.target.id)
            body.append(f"{ast.unparse(n.target)}: {ast.unparse(n.annotation)}{' = ...' if n.value is not None else ''}")
        elif isinstance(n, ast.Assign):
            for t in (e for t in n.targets for e in (t.elts if isinstance(t, ast.Tuple) else [t]) if isinstance(e, ast.Name)):
                names.add(t.id)
                body.append(f"{t.id}: {type_of(n.value)}" if not isinstance(n.value, ast.Name) else f"{t.id} = {n.value.id}")
        elif isinstance(n, ast.FunctionDef): functions.append((n, []))
    functions += patches
    known = names | {f.name for f, _ in functions}
    for name, said in own_attributes([f for f, _ in functions]).items():
        if name not in known: body.append(f"{name}: {said}")
    shown = {f.name: (f, extra) for f, extra in functions}   # a later definition of one name replaces an earlier one
    for f, extra in shown.values(): body += function_stub(f, extra)
    head = f"class {node.name}{f'({bases})' if bases else ''}:"
    return [*decorators, head, *(f"    {line}" for line in body or ["..."]), ""]


def patch_of(node):
    "(class, decorators) if a function is added to a class, else None."
    for d in node.decorator_list:
        text = ast.unparse(d)
        if text.startswith("patch_to("):
            prop = any(k.arg == "as_prop" and ast.unparse(k.value) == "True" for k in d.keywords)
            prop |= len(d.args) > 1 and ast.unparse(d.args[1]) == "True"
            whole = any(k.arg == "cls_method" and ast.unparse(k.value) == "True" for k in d.keywords)
            return ast.unparse(d.args[0]), ["property"] if prop else ["classmethod"] if whole else []
        if text.split("(")[0] == "patch" and node.args.args and node.args.args[0].annotation:
            return ast.unparse(node.args.args[0].annotation), ["property"] if "as_prop=True" in text else []


def assigned_methods(tree):
    "(class, name, function, decorators) of each `Class.name = function`, classmethod(function) or property(function)."
    functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    for n in tree.body:
        if not isinstance(n, ast.Assign): continue
        for t in n.targets:
            if not (isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name)): continue
            v, extra = n.value, []
            if isinstance(v, ast.Call) and isinstance(v.func, ast.Name) and v.func.id in ("classmethod", "property", "staticmethod"):
                v, extra = v.args[0], [v.func.id]
            if isinstance(v, ast.Name) and v.id in functions: yield t.value.id, t.attr, functions[v.id], extra


def read(package):
    "module -> its syntax tree, for every module of the package."
    files = [f for f in sorted(package.rglob("*.py")) if f.name != "_modidx.py" and "data" not in f.relative_to(package).parts]
    return {module_name(f, package): (f, ast.parse(f.read_text(encoding="utf-8"))) for f in files}


def delegated(f):
    "X of a function that is decorated with `delegates(X)`, else None."
    return next((ast.unparse(d.args[0]) for d in f.decorator_list if ast.unparse(d).startswith("delegates(")), None)


def options_of(name, trees):
    "(module, annotated parameter, default) of what a class or function takes by name; fields of a dataclass with those of its bases."
    m, node = next((m, n) for m, (_, t) in trees.items() for n in t.body
                   if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name == name)
    inside = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"] if isinstance(node, ast.ClassDef) else [node]
    if not inside:
        found = {a.arg: (at, a, d) for base in node.bases[::-1] for at, a, d in options_of(ast.unparse(base), trees)}
        for n in (n for n in node.body if isinstance(n, ast.AnnAssign)):
            plain = n.value.args[0] if isinstance(n.value, ast.Call) and n.value.args else n.value     # of setting(default, doc)
            found[n.target.id] = m, ast.arg(n.target.id, n.annotation), plain
        return list(found.values())
    f = inside[0]
    spread(m, f, trees)
    named = [*zip(f.args.args[::-1], [*f.args.defaults[::-1], *[None] * len(f.args.args)]), *zip(f.args.kwonlyargs, f.args.kw_defaults)]
    return [(m, a, d) for a, d in named if d is not None]


def spread(m, f, trees):
    "Write the options that a function of module `m` takes by `delegates` into its signature; the (module, parameter) that were added."
    if not hasattr(f, "brought"):
        name, own = delegated(f), {a.arg for a in [*f.args.args, *f.args.kwonlyargs]}
        more = [(at, a, d) for at, a, d in options_of(name, trees) if a.arg not in own] if name else []
        f.args.kwonlyargs += [a for _, a, _ in more]
        f.args.kw_defaults += [d or ast.Constant(...) for _, _, d in more]
        f.brought = [(at, a) for at, a, _ in more if at != m]
    return f.brought


def spread_all(trees):
    "module -> [(module of origin, function)] for the annotations that options bring with them, of every module that has options."
    found = {}
    for m, (_, tree) in trees.items():
        for f in [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and delegated(n)]:
            found.setdefault(m, [])
            for at, a in spread(m, f, trees):
                carrier = ast.arguments(posonlyargs=[], args=[a], kwonlyargs=[], kw_defaults=[], defaults=[])
                found[m].append((at, ast.FunctionDef(name="options", args=carrier, body=[], decorator_list=[], returns=None)))
    return found


def stubs(package):
    "path -> text of every stub."
    trees = read(package)
    brought = spread_all(trees)
    home = {n.name: m for m, (_, t) in trees.items() for n in t.body if isinstance(n, ast.ClassDef)}
    patches, needed = {}, {}
    for m, (_, tree) in trees.items():
        for n in tree.body:
            found = [(*patch_of(n)[:1], n, patch_of(n)[1])] if isinstance(n, ast.FunctionDef) and patch_of(n) else []
            for cls, f, extra in found:
                patches.setdefault(cls, []).append((f, extra))
                if home.get(cls) != m: needed.setdefault(home.get(cls), []).append((m, f))
        for cls, name, f, extra in assigned_methods(tree):
            copy = ast.parse(ast.unparse(f)).body[0]
            copy.name = name
            patches.setdefault(cls, []).append((copy, extra))
            if home.get(cls) != m: needed.setdefault(home.get(cls), []).append((m, copy))
    made = {}
    for m, (file, tree) in trees.items():
        if m == "__init__": continue
        if m not in brought and not any(isinstance(n, ast.ClassDef) and patches.get(n.name) for n in tree.body): continue
        more = foreign_imports(m, [*needed.get(m, []), *brought.get(m, [])], trees, home)
        made[file.with_suffix(".pyi")] = module_stub(tree, patches, more)
    made[package / "__init__.pyi"] = front_stub(trees)
    return made


def dotted(m, here):
    "The import path of module `m` as seen from module `here`."
    up = here.count(".") + 1
    return "." * up + m


def foreign_imports(here, patched, trees, home):
    "Import lines for what annotations of methods from other modules name."
    lines = []
    for m, f in patched:
        used = {n.id for a in [*f.args.args, *f.args.kwonlyargs] if a.annotation for n in ast.walk(a.annotation) if isinstance(n, ast.Name)}
        if f.returns: used |= {n.id for n in ast.walk(f.returns) if isinstance(n, ast.Name)}
        for node in imports_of(trees[m][1]):
            for alias in node.names:
                if (alias.asname or alias.name.split(".")[0]) not in used: continue
                if isinstance(node, ast.ImportFrom) and node.level:
                    base = m.split(".")[:-node.level] if m.count(".") + 1 >= node.level else []
                    target = ".".join([*base, *([node.module] if node.module else [])])
                    if target == here: continue
                    lines.append(f"from {dotted(target, here)} import {alias.name}" + (f" as {alias.asname}" if alias.asname else ""))
                else:
                    lines.append(ast.unparse(type(node)(**{**{k: getattr(node, k) for k in node._fields}, "names": [alias]})))
        own = {n.name for n in trees[m][1].body if isinstance(n, (ast.ClassDef, ast.FunctionDef))}
        lines += [f"from {dotted(m, here)} import {u}" for u in sorted(used & own)]
    return list(dict.fromkeys(lines))


def module_stub(tree, patches, more):
    "A module whose classes have all their methods."
    lines = [HEAD + "from typing import Any, Iterator"]
    lines += [ast.unparse(n) for n in imports_of(tree)] + more + [""]
    for n in tree.body:
        if isinstance(n, ast.ClassDef): lines += class_stub(n, patches.get(n.name, []))
        elif isinstance(n, ast.FunctionDef) and not patch_of(n) and not n.name.startswith("_"): lines += function_stub(n)
        elif isinstance(n, ast.Assign):
            names = [e for t in n.targets for e in (t.elts if isinstance(t, ast.Tuple) else [t]) if isinstance(e, ast.Name)]
            for t in names:
                if t.id == "__all__": lines.append(ast.unparse(n))
                elif t.id.startswith("_"): continue
                elif isinstance(n.value, ast.Call) and ast.unparse(n.value.func) in ("namedtuple", "TypeVar"): lines.append(ast.unparse(n))
                elif isinstance(n.value, (ast.Name, ast.Subscript, ast.BinOp)) and t.id[0].isupper() and not t.id.isupper():
                    lines.append(ast.unparse(n))         # an alias of a type
                else: lines.append(f"{t.id}: {type_of(n.value) if len(names) == 1 else 'Any'}")
        elif isinstance(n, ast.AnnAssign): lines.append(f"{ast.unparse(n.target)}: {ast.unparse(n.annotation)}")
    return "\n".join(lines).rstrip() + "\n"


def front_stub(trees):
    "`lora_nb/__init__.pyi`: the names of the front door, then those of the drop-in."
    def literal(m, name):
        for n in trees[m][1].body:
            if isinstance(n, (ast.Assign, ast.AugAssign)):
                t = n.targets[0] if isinstance(n, ast.Assign) else n.target
                if isinstance(t, ast.Name) and t.id == name: yield ast.literal_eval(n.value)
    listed = {m: [x for part in literal(m, "__all__") for x in part] for m in trees if m != "__init__"}
    owner = {}
    for m, xs in listed.items():
        for x in xs: owner.setdefault(x, m)
    front = {topic: names for part in literal("reference", "FRONT") for topic, names in part.items()}
    lines = [HEAD + "from typing import Final", "", "__version__: Final[str]", ""]
    for topic, names in front.items():
        lines += [f"# {topic}", *(f"from .{owner[n]} import {n} as {n}" for n in names.split() if n in owner), ""]
    drop = [n for n in listed.get("lora_diffusion", []) if n not in " ".join(front.values()).split()]
    lines += ["# names of lora_diffusion, for code written for it", *(f"from .lora_diffusion import {n} as {n}" for n in drop), ""]
    modules = sorted({m.split(".")[0] for m in trees if m != "__init__"})
    lines += ["# modules", *(f"from . import {m} as {m}" for m in modules), ""]
    names = [n for ns in front.values() for n in ns.split() if n in owner]
    return "\n".join([*lines, f"__all__ = {names!r}"]) + "\n"


def write(package):
    "Write every stub, and remove those of modules that need none."
    made = stubs(package)
    for old in package.rglob("*.pyi"):
        if old not in made: old.unlink()
    for path, text in made.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text: path.write_text(text, encoding="utf-8")
    return made


if __name__ == "__main__": print(f"{len(write(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / 'lora_nb'))} stubs")
