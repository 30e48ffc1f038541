"""The turbo LoRAs and the numbers behind the lesson of nbs/68_turbo.ipynb.

    python tools/turbo.py train BASE...    distil a few-step LoRA of each base into out/turbo/turbo-BASE.safetensors
    python tools/turbo.py table BASE...    quality over steps, with it and without: nbs/results/turbo.json, turbo-BASE.jpg

BASE is tiny-sd or tiny-sd3; both where none is named. `table` takes the LoRAs of out/turbo, else those that ship.
"""
import json, os, sys, time
from pathlib import Path

os.environ.setdefault("LORA_NB_QUIET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from lora_nb.loading import load_base
from lora_nb.core import atomic_path, data_path
from lora_nb.similarity import Dino
from lora_nb.zoo.judge import load_judge
from lora_nb.lora import Lora
from lora_nb.show import grid, save_jpeg
from lora_nb.zoo.scenes import world_prompts
from lora_nb.turbo import TurboRun, even_sigmas, turbocharged
from lora_nb.zoo import scenes as sc, world as w
from lora_nb.zoo.adherence import score_scene_pairs, score_signs
from lora_nb.zoo.quality import plan, score

ROOT = Path(__file__).resolve().parent.parent
OUT, KEPT = ROOT / "out/turbo", ROOT / "nbs/results"
STEPS = {"tiny-sd": (1, 2, 4, 8, 25), "tiny-sd3": (1, 2, 4, 8, 28)}
GUIDANCE, PICTURES = 4., 48


def file_of(name):
    "The turbo LoRA of a base"
    own = OUT / f"turbo-{name}.safetensors"
    return own if own.exists() else data_path("loras", own.name)


def train(name):
    "Distil, and keep the course of the training beside the LoRA"
    base, t0 = load_base(name), time.time()
    say = lambda t: print(name, t.done, t.log, flush=True) if t.done % 20 == 0 else None
    run = TurboRun(base, world_prompts(base, 160), validate_every=40, validation_samples=12, callback=say)
    paths = time.time() - t0
    lora = run.fit().to(dtype=torch.float16)
    lora.save(OUT / f"turbo-{name}.safetensors")
    facts = dict(plan=vars(run.plan), recipe=run.recipe.to_dict(), paths_seconds=round(paths, 1),
                 seconds=round(run.log.seconds, 1), threads=torch.get_num_threads(), losses=run.log.losses,
                 validation=run.log.val["turbo"], bytes=(OUT / f"turbo-{name}.safetensors").stat().st_size)
    with atomic_path(OUT / f"turbo-{name}.json") as tmp: Path(tmp).write_text(json.dumps(facts) + "\n")


VARIANTS = ("guided", "turbo", "plain")            # as the base is usually drawn with, with the LoRA, without guidance


def cell(base, lora, variant, n, prompts, seeds):
    "(pictures, seconds a picture)"
    t = time.time()
    if variant == "turbo":
        with turbocharged(base, lora, n) as how: images = base.generate(prompts, seeds=seeds, **how)
    else:
        even = dict(sigmas=even_sigmas(n)) if base.family == "sd3" else {}      # the turbo's levels, for all alike
        scale = GUIDANCE if variant == "guided" else 1.
        images = base.generate(prompts, seeds=seeds, steps=n, guidance_scale=scale, **even)
    return images, (time.time() - t) / len(prompts)


def asked(base):
    "(kind, label, prompt) of the pictures of every cell: objects, for a flow base signs and pairs as well, by turns"
    if base.family != "sd3": return [("object", r[:3], r[3]) for r in plan(1)[::4][:PICTURES]]
    names, grounds = list(w.OBJECTS), (list(w.COLORS), w.PATTERNS)
    label = lambda r: (names[r[1]], grounds[0][r[2]], grounds[1][r[3]]) if r[0] == 0 else r
    return [(sc.KINDS[r[0]], label(r), text) for r, text in sc.plan_scenes(PICTURES)]


def marked(images, paper, judge):
    "Shares of pictures: all of the prompt right, for each kind; of objects each part, of signs the letters"
    of = lambda kind: [i for i, (k, _, _) in enumerate(paper) if k == kind]
    pick = lambda kind: ([images[i] for i in of(kind)], [paper[i][1] for i in of(kind)])
    mean = lambda xs: round(sum(map(float, xs)) / len(xs), 4)
    objects = score(*pick("object"), judge)
    out = {k: mean(v) for k, v in objects.items()}
    ok = [all(v) for v in zip(*objects.values())]
    out["objects"] = mean(ok)
    if of("sign"):
        signs, pairs = score_signs(*pick("sign")), score_scene_pairs(*pick("pair"), judge)
        words = [all(v) for v in zip(signs["word"], signs["color"], signs["pattern"])]
        out |= dict(letters=mean(signs["letters"]), signs=mean(words), pairs=mean(pairs["all"]))
        ok = ok + words + pairs["all"]
    return out | dict(right=mean(ok))


def table(name):
    "Judge every cell, and compare it with what the base itself draws in many guided steps"
    base, lora, judge, dino = load_base(name), Lora.load(file_of(name)), load_judge(), Dino()
    paper = asked(base)
    prompts, seeds, drawn, own = [p[2] for p in paper], list(range(len(paper))), {}, None
    facts = OUT / f"turbo-{name}.json"
    about = dict(pictures=len(paper), guidance_scale=GUIDANCE, threads=torch.get_num_threads(), rows=[],
                 training=json.loads(facts.read_text()) if facts.exists() else {})
    for n in sorted(STEPS[name], key=lambda n: (n != max(STEPS[name]), n != 4, n)):
        for variant in VARIANTS:
            images, seconds = cell(base, lora, variant, n, prompts, seeds)
            seen = dino.images(images)
            own = seen if own is None else own            # the first cell: most steps, guided
            about["rows"].append(dict(variant=variant, steps=n, **marked(images, paper, judge),
                                      likeness=round(float((seen * own).sum(1).mean()), 4),
                                      seconds_a_picture=round(seconds, 4)))
            drawn[variant, n] = images[:10]
            keep(name, about)
            print(name, about["rows"][-1], flush=True)
    images, _ = cell(base, lora, "guided", max(STEPS[name]), prompts, [s + 1000 for s in seeds])
    about["likeness_of_another_seed"] = round(float((dino.images(images) * own).sum(1).mean()), 4)
    keep(name, about)
    sheet(name, drawn)


def keep(name, about):
    "One base's part of the numbers"
    path = KEPT / "turbo.json"
    kept = json.loads(path.read_text()) if path.exists() else dict(command="python tools/turbo.py train table")
    with atomic_path(path) as tmp: Path(tmp).write_text(json.dumps({**kept, name: about}, indent=1) + "\n")


def sheet(name, drawn):
    "A row for each number of steps: without the LoRA on the left, with it on the right"
    steps = STEPS[name]
    rows = [drawn["guided", n][:5] + drawn["turbo", n][:5] for n in steps]
    save_jpeg(grid(rows, row_titles=[str(n) for n in steps], size=80), KEPT / f"turbo-{name}.jpg")


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    stages = dict(train=train, table=table)
    names = [a for a in sys.argv[1:] if a in STEPS] or list(STEPS)
    for stage in [a for a in sys.argv[1:] if a in stages] or stages:
        for name in names: stages[stage](name)
