"""Low-rank adaptation of text-to-image diffusion models: a book of notebooks that export this package. `import lora_nb` is instant,
because each public name is fetched only when it is first used.

```python
from lora_nb import apply_lora, before_after, data_path, load_base, save_jpeg, train_dreambooth

base = load_base("tiny-sd")                                             # or "tiny-sd3", "sd3.5-medium", a folder, a hub id
prompts = ["a sks face on a striped blue background", "a sks face on a dotted yellow background"]
before = base.generate(prompts, seeds=[0, 1])
lora = train_dreambooth(base, data_path("subjects", "jack-o-lantern"), "a sks face", class_prompt="a face", steps=150)
lora.save("lantern.safetensors")                                        # plain diffusers loads this file too
apply_lora(base.pipe, lora)
after = base.generate(prompts, seeds=[0, 1])
save_jpeg(before_after(dict(zip(prompts, zip(before, after))), ["base", "with the LoRA"]), "lantern.jpg")
```

Modules:

- `lora_nb.composition`: LoRAs are values, so they can be added, subtracted and blended: exactly, of any ranks, without a model in memory.
- `lora_nb.conversion`: Look into a LoRA file without a pipeline, and convert it to another format with a list of everything that does not fit.
- `lora_nb.evaluation`: Did it learn the subject, does it follow the prompt, do its pictures vary, and what did it forget? Four questions, each with a number.
- `lora_nb.extraction`: A LoRA from a model whose weights were all fine-tuned, and a small LoRA from a large one, with an error that you can trust.
- `lora_nb.formats`: Read every LoRA file exactly as it was meant, write files that other programs read, and lose nothing silently.
- `lora_nb.injection`: Put a LoRA into a model, as trainable branches or merged into the weights, and take it out again without a trace.
- `lora_nb.lora`: A LoRA is a value: named pairs of thin matrices, the words it taught, and what a person must know about it.
- `lora_nb.similarity`: How alike are two pictures? Likeness to given pictures, diversity, copies and drift, as DINO, CLIP or a thumbnail sees them.
- `lora_nb.zoo.judge`: A small classifier that says what a drawn picture shows, and a comparison that reads its background. Neither takes part in the drawing."""

from importlib import import_module
from importlib.util import find_spec

from .reference import FRONT, described, owners

__all__ = [name for names in FRONT.values() for name in names.split()]   # the list is in the chapter `reference`
# Names of the package `lora_diffusion` are importable from the top, too, but not listed: code written for it runs. They are in the
# chapter of that name.


def __getattr__(name):
    "A public name, from the module that defines it, imported now."
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version
        try: return version("lora_nb")
        except PackageNotFoundError: return "unknown (not installed)"
    missing = f"module 'lora_nb' has no attribute {name!r}"
    if name.startswith("_"): raise AttributeError(missing)
    if find_spec(f"lora_nb.{name}"): return import_module(f"lora_nb.{name}")      # a module's name is always the module
    module = owners().get(name)
    if name in __all__ or module == "lora_diffusion":
        if module == "composition": import_module("lora_nb.mixing")                   # enters its methods for `compose`
        found = globals()[name] = described(getattr(import_module(f"lora_nb.{module}"), name))
        return found
    raise AttributeError(missing + (f"; it is in lora_nb.{module}: from lora_nb.{module} import {name}" if module else ""))


def __dir__(): return sorted([*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__", "__version__"])
