"""Every way of composing two LoRAs, measured: the runs behind nbs/results_composition.ipynb.

    python tools/compose.py            search, table and score, in this order
    python tools/compose.py search     each method's settings, on prompts and seeds that are not in the table
    python tools/compose.py table      each method with the settings found, on the table's prompts and seeds
    python tools/compose.py score      nbs/results/composition.json and composition.jpg from what was drawn

A run that is done is not repeated: pictures lie in out/compose, and a new LoRA file makes all of its runs anew.
"""
import contextlib, json, os, sys, time
from pathlib import Path

os.environ.setdefault("LORA_NB_QUIET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np
import torch
from PIL import Image
from lora_nb.loading import load_base
from lora_nb.composition import compose
from lora_nb.core import atomic_path
from lora_nb.zoo.judge import load_judge, recognise
from lora_nb.zoo.subjects import questions
from lora_nb.similarity import to_batch
from lora_nb.evaluation import wearing
from lora_nb.mixing import (Mixture, composite, grams_of, keep_loss, klora, learn_weights, samples, switch, zip_columns)
from lora_nb.show import grid, save_jpeg
from lora_nb.zoo.loras import bundled_lora
from lora_nb.zoo.world import an

ROOT = Path(__file__).resolve().parent.parent
OUT, KEPT = ROOT / "out/compose", ROOT / "nbs/results"
DRAW, COUNT, FEW = dict(steps=10, guidance_scale=4.), 24, 8        # pictures of each kind in the table, in the search
PAIRS = {"pumpkin + neon": ("jack-o-lantern", "neon"), "pumpkin + teapot": ("jack-o-lantern", "teapot")}
STYLES = ("neon", "line sketch")
OWN = ("purple", "yellow", "gray", "orange", "dotted blue", "striped green")       # backgrounds of the samples
THINGS = ("cat", "house", "car", "tulip", "guitar", "owl")


# ------------------------------------------------------------------------------------------ what is asked
class Pair:
    "Two LoRAs, the prompts that each answers to alone, and what is asked of their composition"
    def __init__(self, name):
        self.name, self.parts = name, PAIRS[name]
        self.loras = [bundled_lora(p) for p in self.parts]
        self.triggers = [l.metadata["trigger"] for l in self.loras]
        self.style = self.parts[1] in STYLES
        self.hash = "-".join(l.content_hash()[:8] for l in self.loras)

    def asked(self, n, seed):
        "Questions of the joint prompt, or of each subject's own prompt"
        ask = lambda i, seed: questions([(self.triggers[i], self.parts[i])], n if self.style else n // 2, (), seed)
        if not self.style: return {"first": ask(0, seed), "second": ask(1, seed + 1)}
        joint = ask(0, seed)
        for q in joint: q.prompt = f"{q.prompt}, in {self.triggers[1]} style"
        return {"joint": joint}

    def sample(self, base):
        "Pictures that each LoRA draws alone, for the methods that learn; made once"
        if not hasattr(self, "data"):
            own = [[an(f"a {t} on a {c} background") for c in OWN] for t in self.triggers]
            if self.style: own[1] = [an(f"a {o} on a {c} background, in {self.triggers[1]} style")
                                     for o, c in zip(THINGS, OWN)]
            self.data = samples(base, self.loras, own, seed=9000, steps=10)
        return self.data


# ------------------------------------------------------------------------------------------ methods
# A method is f(base, pair, **settings) -> context manager inside which the base wears the composition
def static(name, **fixed):
    "A method of `compose`"
    def make(base, pair, **settings):
        return wearing(base, compose(pair.loras, method=name, **{**fixed, **settings}))
    return make


def fusion(base, pair, **settings):
    if not hasattr(pair, "grams"): pair.grams = grams_of(base, pair.loras, pair.sample(base))
    return wearing(base, compose(pair.loras, method="fusion", grams=pair.grams, **settings))


def learned(base, pair, against="lora", bins=1, **settings):
    w = learn_weights(base, pair.loras, keep_loss(base, pair.sample(base), against), bins=bins, **settings)
    return Mixture(base, pair.loras, w)


def zipped(base, pair, **settings):
    columns = zip_columns(base, pair.loras, keep_loss(base, pair.sample(base)), **settings)
    return wearing(base, compose(pair.loras, method="zip", columns=columns))


def alone(i): return lambda base, pair: wearing(base, pair.loras[i])
def switched(base, pair, every): return Mixture(base, pair.loras, switch(2, every))
def chosen_by_k(base, pair, **settings): return Mixture(base, pair.loras, klora(pair.loras, **settings))


@contextlib.contextmanager
def averaged(base, pair, shares):
    with Mixture(base, pair.loras) as m, composite(m, shares): yield base


INF = float("inf")
METHODS = {
    "first alone": (alone(0), [{}]), "second alone": (alone(1), [{}]),
    "sum": (static("cat"), [{}]),
    "sum, weights searched": (static("cat"), [dict(weights=w) for w in ((1., .7), (.7, 1.), (1.2, 1.), (1., 1.3))]),
    "sum, rank 8": (static("svd", rank=8), [{}]),
    "NP-LoRA": (static("np"), [dict(mu=m, protect=p) for m, p in ((.5, -1), (INF, -1), (2., 0), (INF, 0))]),
    "TIES": (static("ties"), [dict(density=d, scale=s) for d, s in ((.5, 1.), (.2, 1.5))]),
    "DARE": (static("dare"), [dict(p=p) for p in (.3, .7)]),
    "gradient fusion": (fusion, [dict(ridge=.001)]),
    "learned weights": (learned, [dict(steps=40), dict(steps=40, bins=3)]),
    "ZipLoRA": (zipped, [dict(steps=40)]),
    "LoRA Switch": (switched, [dict(every=1), dict(every=2)]),
    "LoRA Composite": (averaged, [dict(shares=s) for s in ((1, 1), (1, 2), (2, 1))]),
    "K-LoRA": (chosen_by_k, [dict(alpha=a, beta=b) for a, b in ((1.5, .5), (1., .3))]),
}


# ------------------------------------------------------------------------------------------ runs
def run(base, stage, method, pair, settings, n, seed):
    "Draw one method's pictures, unless that is done; (facts, questions, pictures)"
    key = "".join(c if c.isalnum() else "_" for c in f"{pair.name} {method} {json.dumps(settings)} {pair.hash}")
    path, paper = OUT / stage / f"{key}.npz", pair.asked(n, seed)
    if not path.exists():
        began = time.process_time()
        with METHODS[method][0](base, pair, **settings):
            ready = time.process_time()
            draw = lambda qs: base.generate([q.prompt for q in qs], seeds=[q.seed for q in qs], **DRAW)
            drawn = {g: draw(qs) for g, qs in paper.items()}
        facts = dict(method=method, pair=pair.name, settings=settings, seconds_to_make=round(ready - began, 1),
                     seconds_a_picture=round((time.process_time() - ready) / sum(map(len, paper.values())), 3))
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as tmp, open(tmp, "wb") as f:
            stacks = {g: np.stack([np.asarray(im) for im in ims]) for g, ims in drawn.items()}
            np.savez_compressed(f, about=json.dumps(facts), **stacks)
        print(f"{time.process_time() - began:5.1f} s  {stage}: {pair.name}, {method} {settings}", flush=True)
    held = np.load(path)
    return json.loads(str(held["about"])), paper, {g: [Image.fromarray(a) for a in held[g]] for g in paper}


def marks(judge, pair, drawn):
    "Per picture: is each concept there (0 or 1), and how sure is the judge"
    name = lambda i: judge.names.index(pair.parts[i])
    if pair.style:
        ims = drawn["joint"]
        seen, p = recognise(judge, ims)
        with torch.no_grad(): s = judge(to_batch(ims, 64))[1].softmax(1)
        k = judge.styles.index(pair.parts[1])
        one, two = np.array([x == pair.parts[0] for x in seen], float), (s.argmax(1) == k).float().numpy()
        return dict(first=one, second=two, both=one * two, sure=(p[:, name(0)] * s[:, k]).numpy())
    seen, sure = {}, []
    for i, g in enumerate(("first", "second")):
        seen[g], p = recognise(judge, drawn[g])
        sure.append(p[:, name(i)].numpy())
    right = {g: np.array([x == pair.parts[i] for x in seen[g]], float) for i, g in enumerate(seen)}
    swapped = np.concatenate([[x == pair.parts[1 - i] for x in seen[g]] for i, g in enumerate(seen)]).astype(float)
    return dict(**right, both=right["first"] * right["second"], mixed_up=swapped, sure=np.sqrt(sure[0] * sure[1]))


def best_settings(pair):
    "method -> settings that the search found for this pair"
    rows = json.loads((OUT / "search.json").read_text())
    own = [r for r in rows if r["pair"] == pair.name]
    return {m: max((r for r in own if r["method"] == m), key=lambda r: r["score"] or 0)["settings"] for m in METHODS}


def search(base, pairs):
    "Each setting on a few prompts of its own, scored by the judge's certainty that both are there"
    judge, rows = load_judge(), []
    for pair in pairs:
        for m, (_, tried) in METHODS.items():
            for s in tried:
                score = None if len(tried) == 1 else round(float(
                    marks(judge, pair, run(base, "search", m, pair, s, FEW, 71)[2])["sure"].mean()), 4)
                rows.append(dict(pair=pair.name, method=m, settings=s, score=score))
    with atomic_path(OUT / "search.json") as tmp: Path(tmp).write_text(json.dumps(rows))


def table(base, pairs):
    "Each method as the search found it"
    for pair in pairs:
        for m, s in best_settings(pair).items(): run(base, "table", m, pair, s, COUNT, 31)


def score(base, pairs):
    "Marks and pictures for the notebook"
    judge, rows, sheet = load_judge(), [], {m: [] for m in METHODS}
    for pair in pairs:
        for m, s in best_settings(pair).items():
            facts, paper, drawn = run(base, "table", m, pair, s, COUNT, 31)
            got = marks(judge, pair, drawn)
            rows.append(dict(**facts, marks={k: [round(float(x), 3) for x in v] for k, v in got.items()}))
            sheet[m] += drawn["joint"][:4] if pair.style else [drawn[g][0] for g in drawn]
    tried = json.loads((OUT / "search.json").read_text())
    about = dict(command="python tools/compose.py", draw=DRAW, pictures=COUNT, search_pictures=FEW, pairs=PAIRS,
                 loras={p.name: p.hash for p in pairs}, tried=tried, rows=rows)
    with atomic_path(KEPT / "composition.json") as tmp: Path(tmp).write_text(json.dumps(about) + "\n")
    titles = [t for p in pairs for t in ([p.name] * 4 if p.style else list(p.parts))]
    drawn = grid([im for m in METHODS for im in sheet[m]], cols=len(titles), row_titles=list(METHODS),
                 col_titles=titles, size=64)
    drawn = drawn.resize((drawn.width * 13 // 20, drawn.height * 13 // 20))
    for quality in range(80, 30, -5):                  # the notebook keeps pictures of 60 KB and less
        save_jpeg(drawn, KEPT / "composition.jpg", quality=quality)
        if (KEPT / "composition.jpg").stat().st_size <= 60_000: break
    print(len(rows), "rows", (KEPT / "composition.jpg").stat().st_size // 1024, "KB")


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    base, pairs = load_base("tiny-sd", device="cpu"), [Pair(n) for n in PAIRS]
    stages = dict(search=search, table=table, score=score)
    for stage in sys.argv[1:] or stages: stages[stage](base, pairs)
