"""Low-rank adaptation of text-to-image diffusion models: the book that you can run.

Importing the package loads nothing else. Every public function and class of every module is offered here too, and its
module is imported at the first use (PEP 562): `from lora_nb import Lora, apply_lora, load_base`.
"""
from functools import lru_cache
from importlib import import_module

_MODULES = ("core", "show", "layers", "lora", "injection", "formats", "kohya", "conversion", "extraction", "checkpoints",
            "composition", "mixing", "bases", "memory", "evaluation", "scheduling", "preprocessing", "dataset", "training",
            "dreambooth", "textual_inversion", "pti", "sd3", "turbo", "studio", "lessons", "cli")


@lru_cache
def _public():
    "name -> module, read from each module's `__all__` without importing it; earlier chapters win."
    import ast, pathlib, re
    names = {}
    for m in _MODULES:
        file = pathlib.Path(__file__).with_name(f"{m}.py")
        if not file.exists(): continue
        listed = re.search(r"^__all__ = (\[.*?\])", file.read_text(encoding="utf-8"), re.S | re.M)
        for name in ast.literal_eval(listed[1]) if listed else (): names.setdefault(name, m)
    return names


def __getattr__(name):
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version
        try: return version("lora_nb")
        except PackageNotFoundError: return "unknown (not installed)"
    if name.startswith("_"): raise AttributeError(f"module 'lora_nb' has no attribute {name!r}")
    if name in _MODULES:                                                # a module's name is always the module
        try: return import_module(f"lora_nb.{name}")
        except ModuleNotFoundError as e:
            if e.name != f"lora_nb.{name}": raise
    if module := _public().get(name): return getattr(import_module(f"lora_nb.{module}"), name)
    raise AttributeError(f"module 'lora_nb' has no attribute {name!r}")


def __dir__(): return sorted({*globals(), *_public(), "__version__"})
