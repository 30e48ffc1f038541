"""Every method on every concept: the runs behind the table of nbs/results.ipynb.

    python tools/results.py search     each method's settings, on two subjects that are not in the table
    python tools/results.py table      each method x concept x seed with the settings found, equal optimiser steps
    python tools/results.py clock      the same for seed 0 with equal time in place of equal steps
    python tools/results.py score      marks the drawn pictures and writes nbs/results/*.json

A run that is done is not repeated, and several processes may work side by side: each takes what nobody has begun.
Pictures lie in out/results, what the notebook draws from lies in nbs/results.
"""
import contextlib, json, os, sys, time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("LORA_NB_QUIET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np
import torch
from lora_nb.loading import load_base
from lora_nb.core import atomic_path
from lora_nb.dreambooth import DreamBooth, class_pictures, prior_stream, subject_stream
from lora_nb.evaluation import Question, wearing
from lora_nb.zoo.subjects import exam
from lora_nb.zoo.judge import read_background
from lora_nb.pti import train_pti
from lora_nb.textual_inversion import train_textual_inversion
from lora_nb.recipe import recipe_for
from lora_nb.training import Trainer
from lora_nb.zoo.world import CLASS_OF, COLORS, OBJECTS, PATTERNS, an, find_material

ROOT = Path(__file__).resolve().parent.parent
OUT, KEPT = ROOT / "out/results", ROOT / "nbs/results"
STEPS, BATCH, PRIOR, DRAW = 60, 4, 2, dict(steps=10, guidance_scale=4.)
COUNTS = {"subject": 8, "class": 5, "others": 5, "noun": 2}           # pictures of each group of the exam
SUBJECTS = ("octopus", "unicorn", "robot", "locomotive", "japanese castle")
STYLES = ("neon", "line sketch")
SEARCH = ("jack-o-lantern", "teapot")
SEEDS = (0, 1, 2)


# ------------------------------------------------------------------------------------------ concepts
@dataclass(frozen=True)
class Concept:
    "A subject or style to teach"
    name: str
    style = property(lambda self: self.name in (*STYLES, "pixel art"))
    noun = property(lambda self: "style" if self.style else CLASS_OF[self.name])
    folder = property(lambda self: find_material(self.name)[0])

    def trigger(self, word, noun=False):
        "How prompts name it"
        return f"{word} {self.noun}" if noun and not self.style else word

    def class_prompts(self):
        "Eight prompts of its class, on eight backgrounds"
        grounds = [c if p == "plain" else f"{p} {c}" for c, p in zip(COLORS, [*PATTERNS, *PATTERNS])][:8]
        things = list(OBJECTS)[7::29][:8] if self.style else [self.noun] * 8
        return [an(f"a {t} on a {g} background") for t, g in zip(things, grounds)]

    def paper(self, trigger, seed=1):
        "The questions of its exam"
        if self.style: return style_exam(trigger, seed)
        full = exam(trigger, self.name, self.noun, max(COUNTS.values()), read_background(self.folder), seed=seed)
        return {g: qs[:COUNTS[g]] for g, qs in full.items()}


def style_exam(trigger, seed):
    "Known objects in the style, and the same objects without its name"
    from lora_nb.zoo.subjects import questions
    asked = questions(list(OBJECTS), COUNTS["subject"] + COUNTS["others"], (), seed)
    ours = [Question(f"{q.prompt}, in {trigger} style", q.obj, q.color, q.pattern, q.seed)
            for q in asked[:COUNTS["subject"]]]
    return dict(subject=ours, others=asked[COUNTS["subject"]:])


# ------------------------------------------------------------------------------------------ methods
# A method is f(base, concept, seed, steps, settings) -> context manager that yields (worn base, trigger, facts)
def recipe(base, concept, seed, steps, **settings):
    "The recipe that all methods share"
    return recipe_for(base, seed=seed, steps=steps, batch_size=BATCH, prior_batch=PRIOR, lr_schedule="cosine",
                      **settings)


def class_folder(base, concept):
    "Class pictures, drawn once a concept"
    folder = OUT / "class" / concept.name.replace(" ", "_")
    class_pictures(base, concept.class_prompts(), 8, folder, **DRAW)
    return folder


def prior_kw(base, concept, prior):
    "How a run is told of its class"
    if not prior: return dict(class_prompt=None)
    return dict(class_prompt=concept.class_prompts(), class_data=class_folder(base, concept), num_class_images=8)


@contextlib.contextmanager
def as_lora(base, lora, trigger, seconds):
    "A trained `Lora` on, with what it weighs"
    path = OUT / f"size-{os.getpid()}.safetensors"
    lora.save(path)
    facts = dict(parameters=lora.num_parameters, bytes=path.stat().st_size, seconds=seconds)
    path.unlink()
    with wearing(base, lora): yield trigger, facts


@contextlib.contextmanager
def bare(base, concept, seed, steps, settings):
    yield concept.trigger("sks", True), dict(parameters=0, bytes=0, seconds=0.)


def dreambooth_lora(prior, text):
    @contextlib.contextmanager
    def method(base, concept, seed, steps, settings):
        trigger = concept.trigger("sks", True)
        r = recipe(base, concept, seed, steps, train_text_encoder=text, **settings)
        run = DreamBooth(base, concept.folder, "{caption}", recipe=r, trigger=trigger, **prior_kw(base, concept, prior))
        t = time.process_time(); lora = run.fit()
        with as_lora(base, lora, trigger, time.process_time() - t) as x: yield x
    return method


def full(prior):
    @contextlib.contextmanager
    def method(base, concept, seed, steps, settings):
        trigger, r = concept.trigger("sks", True), recipe(base, concept, seed, steps, **settings)
        net, kept = base.denoiser, {k: v.clone() for k, v in base.denoiser.state_dict().items()}
        streams = [subject_stream(base, concept.folder, "{caption}", r, trigger)]
        if prior:
            streams.append(prior_stream(base, "images", class_folder(base, concept), concept.class_prompts(), r, 8))
        net.requires_grad_(True)
        trainer = Trainer(base, {"unet": list(net.parameters())}, streams, r)
        t = time.process_time(); trainer.fit(); seconds = time.process_time() - t
        net.requires_grad_(False)
        n = sum(p.numel() for p in net.parameters())
        try: yield trigger, dict(parameters=n, bytes=2 * n, seconds=seconds)
        finally: net.load_state_dict(kept)
    return method


def inversion(vectors):
    @contextlib.contextmanager
    def method(base, concept, seed, steps, settings):
        t = time.process_time()
        lora = train_textual_inversion(base, concept.folder, "<s>", concept.noun, steps=steps, seed=seed,
                                       vectors=vectors, batch_size=BATCH, lr_schedule="cosine", **settings)
        with as_lora(base, lora, "<s>", time.process_time() - t) as x: yield x
    return method


def pivotal(mode):
    @contextlib.contextmanager
    def method(base, concept, seed, steps, settings):
        s = dict(settings)
        share, noun = s.pop("ti_share", None), s.pop("noun", False)
        if share: s["ti_steps"] = round(steps * share); steps = steps - s["ti_steps"]
        said = dict(class_noun=concept.noun) if noun and not concept.style else {}
        kw = prior_kw(base, concept, True)
        t = time.process_time()
        lora = train_pti(base, concept.folder, "<s>", concept.noun, mode=mode, steps=steps, seed=seed, batch_size=BATCH,
                         prior_batch=PRIOR, lr_schedule="cosine", **kw, **said, **s)
        with as_lora(base, lora, concept.trigger("<s>", noun), time.process_time() - t) as x: yield x
    return method


METHODS = {
    "base": bare, "naive full fine-tuning": full(False), "DreamBooth, full": full(True),
    "DreamBooth LoRA, no prior": dreambooth_lora(False, False),
    "DreamBooth LoRA": dreambooth_lora(True, False),
    "DreamBooth LoRA + text encoder, no prior": dreambooth_lora(False, True),
    "DreamBooth LoRA + text encoder": dreambooth_lora(True, True),
    "TI, 1 vector": inversion(1), "TI, 4 vectors": inversion(4),
    "PTI, two-phase": pivotal("two-phase"), "PTI, joint": pivotal("joint"),
}
FULL = [dict(learning_rate=r) for r in (5e-5, 1e-4, 2e-4)]
LORA = [dict(learning_rate=r) for r in (1e-3, 2e-3, 4e-3)]
TEXT = [dict(learning_rate=a, text_learning_rate=b) for a, b in ((2e-3, 1e-4), (2e-3, 5e-4), (4e-3, 5e-4))]
WORD = [dict(words_learning_rate=r) for r in (1e-2, 3e-2, 1e-1)]
TWO = [dict(ti_share=t, words_learning_rate=w, learning_rate=r, tuning_words_learning_rate=w / 10)
       for t, w, r in ((.25, 2e-2, 2e-3), (.25, 2e-2, 4e-3), (.4, 2e-2, 4e-3))]
JOINT = [dict(words_turn=k, words_learning_rate=w, learning_rate=r)
         for k, w, r in ((2, 2e-2, 4e-3), (4, 2e-2, 2e-3), (4, 2e-2, 4e-3))]
GRIDS = {"base": [{}], **{m: FULL for m in METHODS if "full" in m}, **{m: LORA for m in METHODS if "LoRA" in m},
         **{m: TEXT for m in METHODS if "text" in m}, **{m: WORD for m in METHODS if m.startswith("TI")},
         "PTI, two-phase": TWO, "PTI, joint": JOINT}


# ------------------------------------------------------------------------------------------ runs
def run(base, stage, method, concept, seed, steps, settings, groups=None):
    "One run: train, draw the exam, keep both. Skipped where another process has begun or finished it."
    name = "--".join(str(x) for x in (method, concept.name, seed, json.dumps(settings, sort_keys=True)))
    key = "".join(c if c.isalnum() or c in ".-" else "_" for c in name)
    path = OUT / stage / f"{key}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists(): return
    claim = path.with_suffix(".claim")
    if claim.exists() and time.time() - claim.stat().st_mtime > 900: claim.unlink(missing_ok=True)
    try: claim.touch(exist_ok=False)
    except FileExistsError: return
    try:
        began = time.time()
        with METHODS[method](base, concept, seed, steps, settings) as (trigger, facts):
            paper = concept.paper(trigger)
            if groups: paper = {g: qs[:groups[g]] for g, qs in paper.items() if g in groups}
            drawn = {g: np.stack([np.asarray(im) for im in draw(base, qs)]) for g, qs in paper.items()}
        about = dict(method=method, concept=concept.name, seed=seed, steps=steps, settings=settings, trigger=trigger,
                     **facts, paper={g: [vars(q) for q in qs] for g, qs in paper.items()})
        with atomic_path(path) as tmp:
            with open(tmp, "wb") as f: np.savez_compressed(f, about=json.dumps(about), **drawn)
        print(f"{time.time() - began:6.1f} s  {stage}: {name}", flush=True)
    finally: claim.unlink(missing_ok=True)


def draw(base, questions):
    "The pictures of some questions"
    return base.generate([q.prompt for q in questions], seeds=[q.seed for q in questions], **DRAW)


def load(path):
    "(facts, paper, pictures) of a run"
    from PIL import Image
    z = np.load(path)
    about = json.loads(str(z["about"]))
    paper = {g: [Question(q["prompt"], q["obj"], q["color"], q["pattern"], q["seed"]) for q in qs]
             for g, qs in about.pop("paper").items()}
    return about, paper, {g: [Image.fromarray(a) for a in z[g]] for g in paper}


def search(base):
    "The grid of each method on the search's concepts"
    small = {"subject": 8, "class": 4, "others": 4}
    for k in range(3):
        for method, grid in reversed(GRIDS.items()):
            if k < len(grid):
                for name in SEARCH: run(base, "search", method, Concept(name), 0, STEPS, grid[k], small)


def settle(base=None):
    "The best of each grid, by the judge's certainty that subject and background are both right"
    from lora_nb.zoo.judge import load_judge, obeys, recognise
    judge, found = load_judge(), {}
    for path in sorted((OUT / "search").glob("*.npz")):
        about, paper, drawn = load(path)
        sure = recognise(judge, drawn["subject"])[1][:, judge.names.index(about["concept"])].numpy()
        kept = np.mean([n == q.obj for n, q in zip(recognise(judge, drawn["class"])[0], paper["class"])])
        score = float((sure * obeys(drawn["subject"], paper["subject"])).mean())
        key = json.dumps(about["settings"], sort_keys=True)
        found.setdefault(about["method"], {}).setdefault(key, []).append((score, float(kept)))
    means = {m: {k: [round(float(x), 4) for x in np.mean(v, 0)] for k, v in grid.items()} for m, grid in found.items()}
    rows = {m: [dict(settings=json.loads(k), score=v[0], class_retention=v[1], runs=len(found[m][k]))
                for k, v in grid.items()] for m, grid in means.items()}
    best = {m: max(rs, key=lambda r: (round(r["score"], 2), r["class_retention"])) for m, rs in rows.items()}
    write("search.json", dict(command="python tools/results.py search settle", steps=STEPS, concepts=SEARCH, tried=rows,
                              chosen=best))
    for m, r in best.items(): print(m, r)


def write(name, what):
    "A JSON file of nbs/results"
    with atomic_path(KEPT / name) as tmp: Path(tmp).write_text(json.dumps(what, indent=1) + "\n")


def chosen():
    "method -> settings that the search found"
    return {m: r["settings"] for m, r in json.loads((KEPT / "search.json").read_text())["chosen"].items()}


def table(base):
    "Equal optimiser steps"
    for seed in SEEDS:
        for name in (*SUBJECTS, *STYLES):
            for method, settings in chosen().items():
                if method != "base" or seed == 0: run(base, "table", method, Concept(name), seed, STEPS, settings)


def clock(base):
    "Equal time: as many steps as fit into the seconds of a DreamBooth LoRA with prior, on the subjects, seed 0"
    rows = json.loads((KEPT / "table.json").read_text())["rows"]
    cost = {m: np.mean([r["seconds"] / r["steps"] for r in rows if r["method"] == m]) for m in METHODS if m != "base"}
    budget = cost["DreamBooth LoRA"] * STEPS
    for name in SUBJECTS:
        for method, settings in chosen().items():
            if method in ("base", "DreamBooth LoRA", "DreamBooth, full"): continue     # the yardstick is in the table
            run(base, "clock", method, Concept(name), 0, round(budget / cost[method]), settings)


def score(base):
    "Marks of all pictures"
    from lora_nb.similarity import Clip, Dino
    from lora_nb.zoo.judge import load_judge
    eyes = dict(judge=load_judge(), clip=Clip(), dino=Dino())
    own = {n: load(p) for n in (*SUBJECTS, *STYLES)
           if (p := OUT / "table" / f"base--{n.replace(' ', '_')}--0--__.npz").exists()}
    for stage in ("table", "clock"):
        paths = sorted((OUT / stage).glob("*.npz"))
        if not paths: continue
        rows = [marked(*load(p), own, eyes) for p in paths]
        write(f"{stage}.json", dict(command=f"python tools/results.py {stage} score", steps=STEPS, batch_size=BATCH,
                                    prior_batch=PRIOR, draw=DRAW, pictures=COUNTS, rows=rows))
        print(stage, len(rows), "runs")
    for name in ("unicorn", "neon"): sheet(name)


def sheet(name, n=6):
    "What every method draws of one concept: a row for each, a column for each prompt"
    from lora_nb.show import grid, save_jpeg
    ours = {}
    for path in sorted((OUT / "table").glob(f"*--{name.replace(' ', '_')}--0--*.npz")):
        about, paper, drawn = load(path)
        ours[about["method"]] = drawn["subject"][:n]
        prompts = [q.prompt.replace(about["trigger"], "...") for q in paper["subject"][:n]]
    rows = [m for m in METHODS if m in ours]
    drawn = grid([im for m in rows for im in ours[m]], cols=n, row_titles=rows, col_titles=prompts)
    save_jpeg(drawn.resize((drawn.width * 6 // 10, drawn.height * 6 // 10)), KEPT / f"{name}.jpg")



def marked(about, paper, drawn, own, eyes):
    "One row of the table: what was run, and the means of its marks"
    from lora_nb.similarity import diversity, drift
    from lora_nb.zoo.judge import features, shows, styles_seen
    from lora_nb.evaluation import score_pictures
    concept, judge = Concept(about["concept"]), eyes["judge"]
    pictures = sorted(concept.folder.glob("*.jpg"))
    kind, name = ("style", concept.name) if concept.style else ("subject", None)
    for q in paper["subject"]: q.style = name
    marks = score_pictures(drawn["subject"], paper["subject"], references=pictures, training=pictures, kind=kind,
                           **eyes)
    out = {k: float(np.mean(v)) for k, v in marks.items()}
    for g, metric in (("class", "class_retention"), ("others", "retention")):
        if g in paper: out[metric] = float(shows(judge, drawn[g], [q.obj for q in paper[g]]).mean())
    still = "others" if concept.style else "class"
    out["drift"] = float(np.mean(drift(features(judge, own[concept.name][2][still]), features(judge, drawn[still]))))
    if concept.style: out["leak"] = float(np.mean([s == name for s in styles_seen(judge, drawn["others"])]))
    else:
        out["leak"] = float(shows(judge, drawn["noun"], concept.name).mean())
        out["diversity"] = diversity(features(judge, drawn["subject"]))
    return dict(**{k: v for k, v in about.items() if k != "settings"}, **{k: round(v, 4) for k, v in out.items()})


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    stages = dict(search=search, settle=settle, table=table, clock=clock, score=score)
    base = load_base("tiny-sd")
    for stage in sys.argv[1:] or ("search", "settle", "table", "score", "clock", "score"): stages[stage](base)
