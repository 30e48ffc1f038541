# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: python3
#     language: python
#     name: python3
# ---

# %%
#| default_exp dreambooth

# %% [markdown]
# # DreamBooth
#
# > Teach a base one thing from five pictures and a rare word, and keep everything else as it was.

# %% [markdown]
# Suppose you have carved a jack-o'-lantern. A text-to-image model knows faces, but not *yours*. DreamBooth
# ([2208.12242](https://arxiv.org/abs/2208.12242)) teaches it from a handful of pictures by tying them to a rare word in front of a
# class noun: "a **sks** face". If you simply train on five pictures, two things go wrong: the model forgets what other faces look
# like, and draws your lantern whenever you say "face". *Prior preservation* is the answer. This chapter builds it in two forms,
# measures what it keeps and what it costs, and packs it into one call, `train_dreambooth`.
#
# Read [A run](38_run.ipynb) and [Evaluation](28_evaluation.ipynb) first.

# %% [markdown]
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lora-nb/lora_nb/blob/main/nbs/39_dreambooth.ipynb)

# %%
#| export
import json, re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

# %%
#| export
from lora_nb.core import DataError, LoraError, atomic_path, patch_to, progress
from lora_nb.bases import Base
from lora_nb.lora import Lora
from lora_nb.dataset import ConceptDataset, encode
from lora_nb.preprocessing import find_pictures
from lora_nb.recipe import Recipe, recipe_for
from lora_nb.run import PriorOptions, TrainingRun, delegates
from lora_nb.training import Stream

# %%
from lora_nb.core import data_path, table as as_table
from lora_nb.loading import load_base
from lora_nb.evaluation import Question, answers, bootstrap, exam, load_judge, marks, paired_bootstrap, recognise, wearing
from lora_nb.training import Trainer
from lora_nb.show import grid, show
from PIL import Image

# %%
#| hide
import os, tempfile
os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", LORA_NB_QUIET="1")
import transformers
transformers.utils.logging.disable_progress_bar()
from fastcore.test import test_eq, test_fail
from safetensors import safe_open
from lora_nb.families import as_base
from lora_nb.random_pipes import random_pipe

# %% [markdown]
# ## The subject and its word
#
# Our subject is a jack-o'-lantern, one of twelve objects that the embedded base has never seen. Its five pictures lie in a folder
# like any photographs, with captions that name the background and leave a hole for the subject.

# %%
base = load_base("tiny-sd", device="cpu")
folder = data_path("subjects", "jack-o-lantern")
show(grid([Image.open(f) for f in find_pictures(folder)], cols=5))

# %%
ConceptDataset(folder, trigger="sks face")

# %% [markdown]
# Why "sks"? A name should be *rare*, so that it has no meaning of its own, and *short*, ideally one token, so that all learning
# goes to one place. "Face" is the class noun: it brings all that the base knows about faces. The tokenizer confirms that both are
# single tokens:

# %%
pieces = {w: base.pipe.tokenizer.tokenize(w) for w in ("sks", "face", "xylomorph")}
test_eq(len(pieces["sks"]), 1)
pieces


# %% [markdown]
# People write the instance prompt as a sentence. The part that names the subject, its **trigger**, is what remains
# without the article and words such as "photo of".

# %%
#| exports
def trigger_of(
    prompt: str,  # an instance prompt: "a photo of a sks toy"
) -> str:         # "sks toy"
    "The words of a prompt that name its subject."
    words = re.sub(r"^(an?|the|one|my)\s+", "", prompt.strip(), flags=re.I)
    words = re.sub(r"^(photo|picture|image|painting|drawing)s?\s+of\s+", "", words, flags=re.I)
    return re.sub(r"^(an?|the|one|my)\s+", "", words, flags=re.I).strip()


# %%
test_eq([trigger_of(p) for p in ("a sks toy", "A photo of the sks dog", "sks", "picture of my xyz cat")],
        ["sks toy", "sks dog", "sks", "xyz cat"])


# %% [markdown]
# ## Class pictures
#
# Along with the subject, the paper trains on pictures of the class noun that *the base itself* has drawn. They say: "a plain face
# still looks like this". Their origin matters more than their quality: the base is asked to stay as it is. `class_pictures` draws
# them in batches, each with its own seed, and keeps them in a folder with their captions, so the next run on the same class can
# start at once. It counts what is there and draws only what is missing.

# %%
#| exports
def class_pictures(
    base: Base,
    prompts: str | list[str],  # a class prompt, or several, which take turns
    n: int = 24,          # how many pictures are needed
    folder: str | Path | None = None,  # reuse what is there, save what is drawn; None keeps them in memory
    seed: int = 0,        # of the first picture; the i-th is drawn with seed + i
    batch_size: int = 24, # pictures drawn together
    **kw: Any,            # to `base.generate`
) -> tuple[list, list[str]]:  # (pictures or files, captions)
    "Pictures of the class, drawn by the base itself."
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    have = _existing(folder)
    todo = [(i, prompts[i % len(prompts)]) for i in range(len(have), n)]
    made, drawn = [], range(0, len(todo), batch_size)
    for k in progress(drawn, desc="class pictures") if todo else ():
        part = todo[k:k + batch_size]
        images = base.generate([p for _, p in part], seeds=[seed + i for i, _ in part], batch_size=batch_size, **kw)
        made += [_keep(folder, i, im, p) for (i, p), im in zip(part, images)]
    files = [*have, *made][:n]
    captions = [_caption(f, prompts[i % len(prompts)]) for i, f in enumerate(files)]
    return files, captions


# %%
#| export
def _existing(folder):
    "Pictures already in the folder of the class; an empty or missing folder holds none"
    if folder is None: return []
    path = Path(folder)
    if path.is_file(): raise DataError(f"{path} is a file: expected a folder for the class pictures.")
    return find_pictures(path) if path.is_dir() and any(path.iterdir()) else []

def _keep(folder, i, image, prompt):
    "Save one class picture with its caption, or pass it through"
    if folder is None: return image
    path = Path(folder, f"class-{i:04d}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".txt").write_text(prompt + "\n")
    with atomic_path(path) as tmp: image.save(tmp, format="PNG")
    return path

def _caption(file, prompt):
    "The caption beside a class picture; the class prompt where it has none"
    text = Path(file).with_suffix(".txt") if isinstance(file, Path) else None
    return text.read_text().strip() if text and text.is_file() else prompt


# %%
faces, captions = class_pictures(base, "a face", n=8, steps=12)
show(grid(faces, cols=8))

# %% [markdown]
# This is what the base means by "a face". A folder is filled once. A second call draws nothing, and a call for more pictures draws
# only the rest.

# %%
with tempfile.TemporaryDirectory() as d:
    first, _ = class_pictures(base, "a face", n=3, folder=f"{d}/faces", steps=2)
    stamps = [f.stat().st_mtime_ns for f in first]
    again, texts = class_pictures(base, "a toy", n=4, folder=f"{d}/faces", steps=2)
    test_eq([f.stat().st_mtime_ns for f in again[:3]], stamps)
test_eq(texts, ["a face"] * 3 + ["a toy"])

# %% [markdown]
# ## The loss
#
# Both halves of a batch go through the denoiser together, each example with its own noise $\epsilon$ and its own
# timestep $t$:
#
# $$L = \underbrace{\lVert \hat y(z_t, c_{\text{sks face}}) - y \rVert^2}_{\text{subject}}
#    + w\, \underbrace{\lVert \hat y(z'_{t'}, c_{\text{face}}) - y' \rVert^2}_{\text{prior}} .$$
#
# With class pictures, $z'$ comes from them and $y'$ is the usual target. There is also a way **without class pictures**: let $z'$
# be the subject's own latents with the prompt "a face", and take as target what the base itself would have answered,
# $y' = \hat y_{\text{base}}(z'_{t'}, c_{\text{face}})$. The LoRA is switched off for a moment to get that answer. This costs one
# more forward pass and no preparation, and guards against the very confusion we fear, between the subject and its class.
#
# The training loop knows both as *streams*. This chapter makes them from pictures and prompts.

# %%
#| exports
PRIORS = ("images", "prediction", None)
PriorKind = Literal["images", "prediction"] | None
Prior = Literal["images", "prediction", "auto"] | None

def subject_stream(
    base: Base,
    source: Any,           # a folder, files or pictures of the subject
    prompt: str,           # the instance prompt
    recipe: Recipe,
    trigger: str | None = None,  # words that fill the hole in captions; None: from the prompt
    size: int | None = None,     # pixels; None: the base's resolution
    name: str = "subject", # of its loss in the log
    **data: Any,           # of `ConceptDataset`: masks, buckets
) -> Stream:
    "The subject's pictures as a stream."
    pictures = ConceptDataset(source, prompt, trigger or trigger_of(prompt), size or base.resolution, recipe.flip, **data)
    return Stream(name, encode(base, pictures), recipe.batch_size)


# %%
#| exports
def prior_stream(
    base: Base,
    kind: PriorKind,
    source: Any,       # folder of class pictures, or None; for "prediction" the subject's pictures
    prompts: str | list[str],  # class prompt or prompts
    recipe: Recipe,
    n: int = 24,       # how many class pictures are needed
    size: int | None = None,   # pixels; None: the base's resolution
    name: str = "prior",       # of its loss in the log
    buckets: Any = None,       # as `ConceptDataset` takes them
    **kw: Any,         # to `class_pictures`
) -> Stream:
    "What keeps the class as it was, as a stream."
    shape = dict(size=size or base.resolution, masks=False, buckets=buckets)
    if kind == "prediction":
        prompt = prompts if isinstance(prompts, str) else prompts[0]
        data = ConceptDataset(source, prompt, trigger_of(prompt), flip=recipe.flip, **shape)
    else:
        pictures, captions = class_pictures(base, prompts, n, source, seed=recipe.seed, size=size, **kw)
        data = ConceptDataset(pictures, "", captions=False, **shape)
        data.captions = captions
    batch, teacher = max(1, recipe.prior_batch), kind == "prediction"
    return Stream(name, encode(base, data), batch, recipe.prior_weight, teacher)


# %%
recipe = recipe_for(base, steps=60, batch_size=8, prior_batch=4)
s = subject_stream(base, folder, "a sks face", recipe)
s.examples.captions

# %% [markdown]
# The same pictures make a prior without class pictures: the latents are the same, the hole says "face", and a teacher answers.

# %%
p = prior_stream(base, "prediction", folder, "a face", recipe)
assert p.teacher and torch.equal(p.examples.latents, s.examples.latents)
p.examples.captions[0]


# %% [markdown]
# ## Several subjects at once
#
# A LoRA can learn several things, each under its own word. A `Concept` holds the pictures of one, its prompt and its class. Every
# concept has its own streams and therefore its share of every batch, however many pictures it has; concepts of one class share the
# pictures of that class. The weights are divided by the number of concepts, so the loss, and with it the learning rate, means the
# same as for one concept.

# %%
#| exports
@dataclass
class Concept:
    "One subject to learn"
    data: Any                   # its pictures: a folder, files, or PIL pictures
    prompt: str                 # "a sks face"
    class_prompt: str | list[str] | None = None  # "a face", or several prompts
    class_data: str | Path | None = None  # folder of class pictures, filled if need be; None keeps them in memory
    trigger: str | None = None  # words that fill the hole in captions; None: from the prompt
    def __post_init__(self): self.trigger = self.trigger or trigger_of(self.prompt)

def load_concepts(
    path: str | Path,  # JSON: a list of {"instance_prompt", "instance_data_dir", "class_prompt", "class_data_dir"}
) -> list[Concept]:
    "Read the `concepts_list.json` of other trainers; folders are looked for beside the file, too."
    try: rows = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as e: raise DataError(f"{path} cannot be read as JSON: {e}") from e
    if not isinstance(rows, list) or not rows: raise DataError(f"{path} holds no list of concepts: expected [{{...}}, ...].")
    keys = dict(instance_data_dir="data", instance_prompt="prompt", class_prompt="class_prompt",
                class_data_dir="class_data")
    def one(i, row):
        lost = [k for k in ("instance_prompt", "instance_data_dir") if not row.get(k)]
        if lost: raise DataError(f"Concept {i} of {path} has no {' and no '.join(lost)}; it has {', '.join(row)}.")
        found = {new: row[old] for old, new in keys.items() if row.get(old)}
        return Concept(**{k: _beside(v, path) if k in ("data", "class_data") else v for k, v in found.items()})
    return [one(i, row) for i, row in enumerate(rows, 1)]

def _beside(folder, path):
    "The folder as it is written, or beside the file if only there it exists"
    near = Path(path).parent / folder
    return str(near) if near.exists() and not Path(folder).exists() else folder


# %%
#| exports
def concept_streams(
    base: Base,
    concepts: list[Concept],
    prior: PriorKind,
    recipe: Recipe,
    n: int = 24,     # class pictures for each class
    size: int | None = None,  # pixels; None: the base's resolution
    sampling: dict[str, Any] | None = None,  # how class pictures are drawn: settings of `base.generate`
    **data: Any,     # of `ConceptDataset`: masks, buckets
) -> list[Stream]:
    "The streams of all concepts, with weights that add up as if there were one."
    k, many = len(concepts), len(concepts) > 1
    share = recipe.replace(batch_size=max(1, recipe.batch_size // k), prior_batch=max(1, recipe.prior_batch // k))
    named = lambda kind, c: f"{kind}: {c.trigger}" if many else kind
    subjects = [subject_stream(base, c.data, c.prompt, share, c.trigger, size, named("subject", c), **data)
                for c in concepts]
    out = [replace(s, weight=1 / k) for s in subjects]
    for alike in _of_a_class(concepts, prior):
        c = alike[0]
        source = c.data if prior == "prediction" else c.class_data
        more = {} if prior == "prediction" else dict(sampling or {})
        s = prior_stream(base, prior, source, c.class_prompt, share, n, size, named("prior", c), data.get("buckets"),
                         **more)
        out.append(replace(s, batch=s.batch * len(alike), weight=s.weight * len(alike) / k))
    return out

def _of_a_class(concepts, prior):
    "Lists of concepts that share class pictures; the base's predictions are asked on each one's own pictures"
    groups = {}
    for i, c in enumerate(concepts if prior else ()):
        if not c.class_prompt: continue
        key = i if prior == "prediction" else json.dumps([c.class_prompt, str(c.class_data)])
        groups.setdefault(key, []).append(c)
    return list(groups.values())


# %%
two = [Concept(folder, "a sks face", "a face"), Concept(data_path("subjects", "cherry_pie"), "a zwx food", "a food")]
streams = concept_streams(base, two, "prediction", recipe)
[(s.name, s.batch, s.weight, s.examples.captions[0]) for s in streams]

# %% [markdown]
# Other trainers describe several concepts in a `concepts_list.json`. `load_concepts` reads it.

# %%
listed = [dict(instance_prompt="a sks toy", class_prompt="a toy", instance_data_dir="bear", class_data_dir="toys"),
          dict(instance_prompt="a zwx food", instance_data_dir="pie")]

# %%
with tempfile.TemporaryDirectory() as d:
    Path(d, "bear").mkdir()
    Path(d, "concepts_list.json").write_text(json.dumps(listed))
    concepts = load_concepts(f"{d}/concepts_list.json")
    test_eq(concepts[0].data, f"{d}/bear")
concepts[1]

# %% [markdown]
# ## The run
#
# `DreamBooth` puts it together: streams, a LoRA in the denoiser (and in the text encoders, if the recipe says so), and the trainer.
# As a class it lets a notebook look inside while it runs; `train_dreambooth` is the same in one line. When the run ends or fails,
# the base is as it was before. What was learned is in the `Lora`, with all that a person must know about it: the base's name, the
# trigger, the recipe. With `start=` a run continues from an earlier LoRA.

# %%
#| exports
class DreamBooth(TrainingRun):
    "A DreamBooth run: `fit()` trains it, `lora()` is what it has learned so far."
    @delegates(PriorOptions)
    def __init__(self,
        base: Base,
        instance_data: Any,             # pictures of the subject: a folder, files, or PIL pictures; or a list of `Concept`
        instance_prompt: str | None = None,  # "a sks toy"; concepts bring their own
        class_prompt: str | list[str] | None = None,  # "a toy", or several prompts
        class_data: str | Path | None = None,  # folder of class pictures, filled if need be; None keeps them in memory
        prior: Prior = "auto",          # auto: images if there is a class prompt
        recipe: Recipe | None = None,   # None: `recipe_for(base)`
        output_dir: str | Path | None = None,  # folder of checkpoints and previews
        trigger: str | None = None,     # words that fill the hole in captions; None: from the prompt
        start: Lora | None = None,      # a LoRA to go on from
        masks: Any = None,              # of the pictures, as `ConceptDataset` takes them
        held_back: Any = None,          # pictures of the (first) subject that are validated on, not trained on
        **options: Any,                 # options, and settings of the recipe
    ):
        super().__init__(base, recipe or recipe_for(base), output_dir, options, PriorOptions)
        o = self.options
        self.concepts = _concepts(instance_data, instance_prompt, class_prompt, class_data, trigger)
        self.prior = _prior_of(prior, self.concepts)
        self.streams = concept_streams(base, self.concepts, self.prior, self.recipe, o.num_class_images, o.resolution,
                                       o.sampling, masks=masks, buckets=o.buckets)
        held = {} if held_back is None else self._held(held_back)
        with self.whole():
            self.inject(start)
            self.trainer = self.train_on(self.worn, validation=held)


# %%
#| exports
@patch_to(DreamBooth)
def _held(self, pictures):
    "Pictures held back, as `Trainer` takes them"
    c, o = self.concepts[0], self.options
    stream = subject_stream(self.base, pictures, c.prompt, self.recipe, c.trigger, o.resolution, buckets=o.buckets)
    return {self.streams[0].name: stream.examples}

@patch_to(DreamBooth)
def phases(self) -> dict[str, Any]:
    "One phase, whose trainer is there from the beginning"
    return {"training": lambda: self.trainer}

@patch_to(DreamBooth)
def lora(self) -> Lora:
    "A snapshot of what was learned, with what a person must know about it."
    of = lambda get: [get(c) for c in self.concepts]
    one = lambda xs: xs[0] if len(xs) == 1 else json.dumps(xs)
    triggers = of(lambda c: c.trigger)
    return self.worn.lora(self.about(
        trigger=", ".join(triggers), triggers=json.dumps(triggers), instance_prompt=one(of(lambda c: c.prompt)),
        method="dreambooth", prior=str(self.prior), class_prompt=json.dumps(one(of(lambda c: c.class_prompt)))))


# %%
#| export
def _concepts(data, prompt, class_prompt, class_data, trigger):
    "The concepts that the arguments name"
    listed = [data] if isinstance(data, Concept) else data if isinstance(data, (list, tuple)) else []
    if any(isinstance(c, Concept) for c in listed):
        given = [k for k, v in dict(instance_prompt=prompt, class_prompt=class_prompt, class_data=class_data,
                                    trigger=trigger).items() if v is not None]
        if given: raise LoraError(f"Concepts bring their own {', '.join(given)}: leave them out.")
        names = [c.trigger for c in listed]
        if len(set(names)) < len(names): raise LoraError(f"Concepts need triggers of their own: found {names}.")
        return list(listed)
    if not prompt: raise LoraError("No instance_prompt: expected words for the subject, such as 'a sks toy'.")
    return [Concept(data, prompt, class_prompt, class_data, trigger)]

def check_prior(
    prior: Prior,
    class_prompt: str | list[str] | None,
) -> PriorKind:
    "What `prior` means, or why it is impossible"
    if prior == "auto": return "images" if class_prompt else None
    if prior not in PRIORS: raise LoraError(f"prior = {prior!r}: expected 'images', 'prediction', None or 'auto'.")
    if prior and not class_prompt:
        raise LoraError(f"prior = {prior!r} needs a class prompt, such as class_prompt='a toy': the words for things "
                        "like your subject, without its trigger.")
    return prior

def _prior_of(prior, concepts):
    "The kind of prior for the concepts that have a class"
    return next(filter(None, [check_prior(prior, c.class_prompt) for c in concepts]), None)


# %%
#| exports
@delegates(DreamBooth)
def train_dreambooth(
    base: Base,
    instance_data: Any,             # pictures of the subject: a folder, files, or PIL pictures; or a list of `Concept`
    instance_prompt: str | None = None,  # "a sks toy"; concepts bring their own
    class_prompt: str | list[str] | None = None,  # "a toy", or several prompts
    class_data: str | Path | None = None,  # folder of class pictures, filled if need be
    recipe: Recipe | None = None,   # None: `recipe_for(base)`
    output_dir: str | Path | None = None,  # folder of checkpoints and previews
    prior: Prior = "auto",          # auto: images if there is a class prompt
    resume: bool = False,           # go on from the newest checkpoint in `output_dir`
    **options: Any,                 # what else `DreamBooth` takes, and settings of the recipe
) -> Lora:
    "Teach a base one subject, or several."
    return DreamBooth(base, instance_data, instance_prompt, class_prompt, class_data, prior, recipe, output_dir,
                      **options).fit(resume)


# %% [markdown]
# Every family trains in the same way. Here are both, random and tiny, one with each kind of prior, and one with a text encoder that
# learns, too.

# %%
noise = [Image.effect_noise((70, 50), 60 + i) for i in range(2)]
quick = dict(steps=2, batch_size=2, prior_batch=1, rank=2, num_class_images=2, sampling=dict(steps=1))

# %%
for family, prior, text in (("sd", "images", True), ("sd3", "prediction", False)):
    other = as_base(random_pipe(family))
    clean = {k: v.clone() for k, v in other.denoiser.state_dict().items()}
    lora = train_dreambooth(other, noise, "a sks face", "a face", prior=prior, train_text_encoder=text, **quick)
    assert all(torch.equal(v, clean[k]) for k, v in other.denoiser.state_dict().items())
    assert max(f.norm() for f in lora.layers.values()) > 0 and ("text_encoder" in lora.components) == text
    print(family, prior, len(lora), "layers in", lora.components)

# %% [markdown]
# Mistakes are refused before anything is changed.

# %%
tiny = as_base(random_pipe("sd"))
test_fail(lambda: train_dreambooth(tiny, noise, "a sks face", prior="images"), contains="class prompt")
test_fail(lambda: train_dreambooth(tiny, noise, "a sks face", "a face", prior="both"), contains="expected 'images'")
test_fail(lambda: train_dreambooth(tiny, [], "a sks face"), contains="empty list")

# %% [markdown]
# ## Three ways, side by side
#
# Now the comparison that this chapter is about. The pictures, the number of steps and the seeds are the same:
#
# 1. **Naive fine-tuning**: every weight of the denoiser learns, the prompt is just "a face", and nothing protects the class.
# 2. **DreamBooth without prior**: a LoRA, and the rare word.
# 3. **DreamBooth with prior**: the same, with class pictures beside the subject's.
#
# All sit the same exam: 24 prompts that ask for the subject, and 24 seeds of "a face on a blue background".

# %%
judge = load_judge()
drawing = dict(steps=8)
paper = exam("sks face", "jack-o-lantern", n=24, groups=("subject", "noun"))
results = {"base": answers(base, paper, **drawing)}

# %% [markdown]
# Full fine-tuning needs no LoRA: the trainer takes the denoiser's own weights. We keep a copy, because nothing else can bring the
# base back afterwards. Nobody taught this model "sks", so its subject prompts say "face".

# %%
recipe = recipe_for(base, steps=60, batch_size=6, prior_batch=3, learning_rate=1.5e-3)
kept = {k: v.clone() for k, v in base.denoiser.state_dict().items()}
base.denoiser.requires_grad_(True)
naive = Trainer(base, {"unet": base.denoiser.parameters()}, [subject_stream(base, folder, "a face", recipe)],
                recipe.replace(learning_rate=3e-4))
naive.fit();

# %%
plain = [Question(q.prompt.replace("sks face", "face"), q.obj, q.color, q.pattern, q.seed) for q in paper["subject"]]
results["naive"] = answers(base, {**paper, "subject": plain}, **drawing)
base.denoiser.load_state_dict(kept); base.denoiser.requires_grad_(False);

# %% [markdown]
# The two LoRAs differ in one argument: class prompts, which ask for faces on four backgrounds.

# %%
faces = [f"a face on a {color} background" for color in ("red", "green", "blue", "gray")]
loras = {"no prior": train_dreambooth(base, folder, "a sks face", recipe=recipe)}
run = DreamBooth(base, folder, "a sks face", faces, recipe=recipe, num_class_images=12, sampling=drawing)
loras["prior"] = run.fit()

# %%
for name, lora in loras.items():
    with wearing(base, lora): results[name] = answers(base, paper, **drawing)

# %% [markdown]
# **The subject.** Each row is a model, each column a background that was not in the pictures.

# %%
show(grid([im for r in results.values() for im in r["subject"][:8]], cols=8, row_titles=list(results)))

# %% [markdown]
# **The class noun.** Eight seeds of "a face on a blue background" show what each method cost.

# %%
show(grid([im for r in results.values() for im in r["noun"][:8]], cols=8, row_titles=list(results)))

# %% [markdown]
# **In numbers.** *Fidelity* is the share of subject prompts in whose picture the judge recognises the lantern, and *leak* the share
# of class-noun pictures in which it does. *Diversity* says how much the 24 faces differ from each other (mean cosine distance of
# their features). The brackets hold 95 % bootstrap intervals over the 24 pictures: another 24 seeds would give other numbers, and
# this says how far off they may be. Another training seed can differ more; the [table of many runs](results.ipynb) covers that.

# %%
METRICS = {"subject_fidelity": "fidelity", "leak": "leak", "diversity": "diversity"}
table = {name: marks(paper, r, judge) for name, r in results.items()}
cell = lambda v: "{:.2f} ({:.2f} to {:.2f})".format(v.mean(), *bootstrap(v))

class Table:
    "Rows of marks with their intervals, as Markdown"
    def __init__(self, rows): self.rows = rows
    def _repr_markdown_(self): return as_table(["", *METRICS.values()], [[n, *(cell(m[k]) for k in METRICS)] for n, m in self.rows.items()])

Table(table)

# %% [markdown]
# Prompt by prompt, the difference that the prior makes: (mean, low, high).

# %%
price = {v: tuple(round(x, 2) for x in paired_bootstrap(table["no prior"][k], table["prior"][k])) for k, v in METRICS.items()}
price

# %%
at = lambda name, metric: float(table[name][metric].mean())
assert at("prior", "subject_fidelity") > at("base", "subject_fidelity") + .3          # the subject is learned
assert at("prior", "leak") < .5 < at("no prior", "leak") and at("naive", "leak") > .5  # and the class noun is kept

# %% [markdown]
# PRICE
#
# ## The loss tells less than the pictures
#
# These are the two streams of the run with prior. The subject's loss falls. The prior's begins at the base's level and hardly
# moves; holding it there is the prior's whole purpose. A run without prior has a curve like the upper one and no second curve, and
# neither says anything about leak: only pictures do.

# %%
run.log

# %% [markdown]
# ## Two subjects in one LoRA
#
# One training for a jack-o'-lantern and a teddy bear, each with half of every batch. The judge looks at six pictures drawn with each
# word, and counts how often a word draws the *other* subject, since two subjects in one LoRA can blend.

# %%
two = [Concept(folder, "a sks face"), Concept(data_path("subjects", "teddy_bear"), "a ohwx toy")]
duo = train_dreambooth(base, two, recipe=recipe.replace(batch_size=8, steps=50))
test_eq(json.loads(duo.metadata["triggers"]), ["sks face", "ohwx toy"])

# %%
asked = [f"a {c.trigger} on a {color} background" for c in two for color in ("blue", "green", "yellow")]
with wearing(base, duo): drawn = base.generate([p for p in asked for _ in range(2)], seeds=[7, 8] * 6, **drawing)
show(grid(drawn, rows=2, row_titles=[c.trigger for c in two]))

# %%
seen = {c.trigger: recognise(judge, drawn[6 * i:6 * i + 6])[0] for i, c in enumerate(two)}
counts = {t: {n: names.count(n) for n in ("jack-o-lantern", "teddy bear")} for t, names in seen.items()}
assert counts["sks face"]["jack-o-lantern"] >= 4 and counts["ohwx toy"]["teddy bear"] >= 4
assert counts["sks face"]["teddy bear"] + counts["ohwx toy"]["jack-o-lantern"] <= 1
counts

# %% [markdown]
# ## The file
#
# The LoRA knows where it belongs. Its metadata holds the base, the triggers and the recipe, and a hash of the content, which shows
# whether two files hold the same LoRA.

# %%
test_eq(loras["prior"].metadata["trigger"], "sks face")
{k: v for k, v in loras["prior"].metadata.items() if k != "recipe"}

# %%
with tempfile.TemporaryDirectory() as d:
    loras["prior"].save(f"{d}/lantern.safetensors"); back = Lora.load(f"{d}/lantern.safetensors")
    duo.save(f"{d}/duo.safetensors"); both = Lora.load(f"{d}/duo.safetensors")
    with safe_open(f"{d}/lantern.safetensors", "pt") as f: noted = str(f.metadata())
known = ("base", "trigger", "triggers", "recipe")
test_eq([back.metadata[k] for k in known], [loras["prior"].metadata[k] for k in known])
assert back.content_hash() in noted and both.content_hash() not in noted
json.loads(both.metadata["triggers"]), json.loads(back.metadata["recipe"])["learning_rate"]

# %% [markdown]
# ## What we built
#
# - `class_pictures`, `subject_stream`, `prior_stream`: pictures and prompts become the two halves of DreamBooth's loss, with class
#   pictures or with the base's own prediction.
# - `train_dreambooth` (and `DreamBooth`, to look inside): one call from a folder to a `Lora`, for every family.
# - `Concept`, `load_concepts`: several subjects in one LoRA, each with its word, its class and its share.
# - A measurement of what naive fine-tuning destroys, what the prior keeps, and what it costs.
#
# Next: [textual inversion](40_textual_inversion.ipynb) learns only the word. On the command line, all of this is `lora_dreambooth`
# ([cli](56_cli.ipynb)).
#
# ## Exercises
#
# 1. Train with `prior="prediction"`. It needs no class pictures: compare time, leak and diversity.
# 2. Give `class_prompt` a single prompt, "a face". What happens to the yellow of the faces?
# 3. Train "a sks animal" on the lantern's pictures. What does the class noun contribute?
