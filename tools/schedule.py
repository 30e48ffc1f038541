"""The measurements behind the lesson of nbs/51_scheduling.ipynb: which steps and which blocks carry a subject.

    python tools/schedule.py heat      one LoRA on, or off, in one window of steps x one group of blocks
    python tools/schedule.py grid      subject x style under complementary schedules
    python tools/schedule.py rank      T-LoRA's mask against none, trained and drawn
    python tools/schedule.py speed     processor time of steps and of live changes, ours and peft's

Each writes its part of nbs/results/schedule.json (and schedule.jpg); --loras FOLDER holds the trained LoRAs.
"""
import json, os, sys, time
from pathlib import Path

os.environ.setdefault("LORA_NB_QUIET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np
import torch
from lora_nb.loading import load_base
from lora_nb.core import atomic_path, data_path
from lora_nb.dreambooth import DreamBooth
from lora_nb.zoo.subjects import exam
from lora_nb.zoo.judge import features, load_judge, obeys, read_background, recognise
from lora_nb.similarity import overfitting, similarity, thumbnails, to_batch
from lora_nb.lora import Factors, Lora
from lora_nb.worn import places
from lora_nb.schedule import LoraComposite, LoraSchedule, lora_switch, ramp, trained_schedule
from lora_nb.scheduling import scheduled
from lora_nb.show import grid, save_jpeg
from lora_nb.recipe import recipe_for
from lora_nb.zoo.world import CLASS_OF, find_material, stylize

KEPT = Path(__file__).resolve().parent.parent / "nbs/results"
SUBJECT, STYLE, LEARNER = "jack-o-lantern", "neon", "teapot"
DRAW = dict(steps=15, guidance_scale=4.)
WINDOWS = [(i / 4, (i + 1) / 4) for i in range(4)]
GROUPS = {"down, fine": "IN01-02", "down, coarse": "IN03", "middle": "MID", "up, coarse": "OUT00-01",
          "up, fine": "OUT02-03"}
TE = {"text_encoder": 1.}                                    # text encoders wear the LoRA in every cell
REST = {"IN00": 0, "time_embedding": 0}
COARSE = {"IN01-02": 0, "OUT02-03": 0}
FINE = {"IN03": 0, "MID": 0, "OUT00-01": 0}


def asked(trigger, name=SUBJECT, n=12):
    "The exam's questions about a subject"
    folder, *_ = find_material(name)
    return exam(trigger, name, CLASS_OF[name], n, read_background(folder), groups=("subject",))["subject"][:n]


def sure(judge, images, name):
    "The judge's certainty that a picture shows `name`"
    return recognise(judge, images)[1][:, judge.names.index(name)].numpy()


def in_style(judge, images, name):
    "The judge's certainty that a picture is in a style"
    with torch.no_grad(): return judge(to_batch(images, 64))[1].softmax(1)[:, judge.styles.index(name)].numpy()


def distance(a, b):
    "Root mean square difference of pictures, in pixel values of -1..1"
    return float((to_batch(a, 64) - to_batch(b, 64)).square().flatten(1).mean(1).sqrt().mean())


def keep(part, what):
    "Write one part of the results"
    path = KEPT / "schedule.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    found[part] = dict(command=f"python tools/schedule.py {part}", draw=DRAW, **what)
    with atomic_path(path) as tmp: Path(tmp).write_text(json.dumps(found, indent=1) + "\n")


def cell(window, pattern, on):
    "On in one cell only, or off in one cell only"
    a, b = window
    inside = LoraSchedule(start=a, stop=b, blocks={p: 0 for g, p in GROUPS.items() if p != pattern} | REST,
                          components=TE)
    if on: return [inside]
    before = LoraSchedule(stop=a, components=TE) if a else None
    hole = LoraSchedule(start=a, stop=b, blocks={pattern: 0}, components=TE)
    after = LoraSchedule(start=b, stop=1., components=TE) if b < 1 else None
    return [s for s in (before, hole, after) if s]


def heat(base, loras):
    "Certainty and distance, cell by cell"
    judge, lora = load_judge(), loras[SUBJECT]
    qs = asked(lora.metadata["trigger"], n=8)
    parts = [lora.scaled(1) if i == 0 else Lora(lora.only("unet").layers) for i in range(3)]
    def draw(schedules):
        # several schedules of one LoRA: the same factors under several names, each with its own window
        with scheduled(base, dict(zip(parts, schedules))):
            return base.generate([q.prompt for q in qs], seeds=[q.seed for q in qs], **DRAW)
    full, none = draw([LoraSchedule()]), draw([LoraSchedule({0: 0, 1: 0}, components=TE)])
    rows, whole = [], distance(full, none)
    for kind in ("on", "off"):
        for g, p in GROUPS.items():
            for w in WINDOWS:
                images = draw(cell(w, p, kind == "on"))
                rows.append(dict(kind=kind, blocks=g, window=w, sure=float(sure(judge, images, SUBJECT).mean()),
                                 moved=distance(images, none) / whole, missing=distance(images, full) / whole))
                print(rows[-1], flush=True)
    for kind, schedules in (("steps", [[LoraSchedule(start=a, stop=b, components=TE)] for a, b in WINDOWS]),
                            ("blocks", [[LoraSchedule(blocks={q: 0 for q in GROUPS.values() if q != p} | REST,
                                                      components=TE)] for p in GROUPS.values()])):
        for label, s in zip(WINDOWS if kind == "steps" else GROUPS, schedules):
            images = draw(s)
            rows.append(dict(kind=kind, label=label, sure=float(sure(judge, images, SUBJECT).mean()),
                             moved=distance(images, none) / whole))
    keep("heat", dict(subject=SUBJECT, windows=WINDOWS, groups=GROUPS, pictures=len(qs), rows=rows, full=dict(
        sure=float(sure(judge, full, SUBJECT).mean())), none=dict(sure=float(sure(judge, none, SUBJECT).mean())),
        distance=whole))


def plans(subject, style):
    "Name -> what to give to `scheduled`"
    s = lambda **kw: LoraSchedule(components=TE, **kw)
    return {"both, always": {subject: s(), style: s()},
            "subject first, then style": {subject: s(stop=.5), style: s(start=.5)},
            "style first, then subject": {subject: s(start=.5), style: s(stop=.5)},
            "subject coarse, style fine": {subject: s(blocks=COARSE), style: s(blocks=FINE)},
            "subject fine, style coarse": {subject: s(blocks=FINE), style: s(blocks=COARSE)},
            "Switch": lora_switch([subject, style], components=TE),
            "Composite": LoraComposite({subject: s(), style: s()})}


def picture(base, loras):
    "Subject x style under each plan"
    judge, subject, style = load_judge(), loras[SUBJECT], loras[STYLE]
    qs = asked(subject.metadata["trigger"], n=16)
    word = next(iter(style.embeddings), style.metadata.get("trigger"))
    like = stylize(to_batch(data_path("subjects", SUBJECT), 64), STYLE)      # the subject as the style would draw it
    like, own = features(judge, like), features(judge, data_path("subjects", SUBJECT))
    prompts = [f"{q.prompt}, in {word} style" for q in qs]
    rows, shown = [], []
    for name, plan in plans(subject, style).items():
        t = time.perf_counter()
        with scheduled(base, plan): images = base.generate(prompts, seeds=[q.seed for q in qs], **DRAW)
        b, seen = in_style(judge, images, STYLE), features(judge, images)
        a = np.maximum(similarity(seen, own), similarity(seen, like))
        rows.append(dict(plan=name, subject=float(a.mean()), certainty=float(sure(judge, images, SUBJECT).mean()),
                         style=float(b.mean()), seconds=time.perf_counter() - t))
        print(rows[-1], flush=True)
        shown.append(images[:5])
    keep("grid", dict(subject=SUBJECT, style=STYLE, pictures=len(qs), prompts=prompts[:5], rows=rows))
    sheet = grid([im for row in shown for im in row], cols=5, row_titles=[r["plan"] for r in rows],
                 col_titles=[q.prompt.split(" on ")[-1].removeprefix("a ").removesuffix(" background") for q in qs[:5]])
    save_jpeg(sheet.resize((sheet.width * 6 // 10, sheet.height * 6 // 10)), KEPT / "schedule.jpg", quality=72)


def rank(base, loras, steps=80, seeds=(0, 1)):
    "T-LoRA's mask, in training and drawing, against none"
    judge, name, rows = load_judge(), LEARNER, []
    folder = data_path("subjects", name)
    qs, own = asked(f"sks {CLASS_OF[name]}", name, 16), thumbnails(sorted(folder.glob("*.jpg")))
    for seed in seeds:
        for low in (0, 2):
            r = recipe_for(base, seed=seed, steps=steps, batch_size=4, prior_batch=0, prior_weight=0., rank=8,
                           rank_min=low, learning_rate=2e-3, lr_schedule="cosine")
            torch.manual_seed(seed)
            t = time.process_time()
            lora = DreamBooth(base, folder, "{caption}", recipe=r, trigger=f"sks {CLASS_OF[name]}").fit()
            t = time.process_time() - t
            for drawn, schedule in (("masked", trained_schedule(lora)), ("plain", LoraSchedule()))[0 if low else 1:]:
                with scheduled(base, {lora: schedule}):
                    images = base.generate([q.prompt for q in qs], seeds=[q.seed for q in qs], **DRAW)
                copies = overfitting(thumbnails(images), own)
                rows.append(dict(seed=seed, rank_min=low, drawn=drawn, seconds=t,
                                 subject=float(sure(judge, images, name).mean()),
                                 prompt=float(obeys(images, qs).mean()), overfitting=float(copies.mean())))
                print(rows[-1], flush=True)
    keep("rank", dict(subject=name, pictures=len(qs), steps=steps, rank=8, rows=rows))


def cpu(f, n=3):
    "Median seconds of processor time of f()"
    times = []
    for _ in range(n):
        t = time.process_time(); f(); times.append(time.process_time() - t)
    return sorted(times)[n // 2]


def sdxl_unet(width=32):
    "A UNet of SDXL's modules, a tenth as wide"
    from diffusers import UNet2DConditionModel
    cross = "CrossAttn"
    return UNet2DConditionModel(sample_size=32, block_out_channels=(width, 2 * width, 4 * width), norm_num_groups=8,
        down_block_types=("DownBlock2D", cross + "DownBlock2D", cross + "DownBlock2D"), cross_attention_dim=64,
        up_block_types=(cross + "UpBlock2D", cross + "UpBlock2D", "UpBlock2D"), layers_per_block=2,
        transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True).eval()


def tiny_speed(base, lora):
    "30 steps of tiny-sd: first run and later runs, as a share of the bare pipeline's"
    go = lambda: base.generate("a sks face", steps=30, guidance_scale=4.)
    go(); bare, out = cpu(go), {}
    for name, s in {"constant": 1., "0.2 to 0.8": "0.2-0.8", "ramp": ramp(0, 1)}.items():
        for mode, budget in (("merge", 2 << 30), ("merge, no cache", 0), ("inject", 0)):
            if name != "ramp" and budget == 0 and mode != "inject": continue
            with scheduled(base, {lora: s}, budget, mode.split(",")[0]):
                first = cpu(go, 1)
                out[f"{name}, {mode}"] = dict(first=first / bare, later=cpu(go) / bare)
            print(name, mode, out[f"{name}, {mode}"], flush=True)
    return dict(bare=bare, runs=out)


def speed(base, loras):
    "Processor time, ours and peft's"
    from peft import LoraConfig
    tiny = tiny_speed(base, loras[SUBJECT])
    unet = sdxl_unet().requires_grad_(False)
    there = {n: p.module.weight for n, p in places(unet).items() if ".attentions." in n}
    lora = Lora({f"unet.{n}": Factors(torch.randn(len(w), 8) * .01, torch.randn(8, w.shape[1]) * .01)
                 for n, w in there.items()})
    x, e, n, out = torch.randn(2, 4, 32, 32), torch.randn(2, 77, 64), [0], {}
    step = torch.no_grad()(lambda: unet(x, 500, e))
    count = lambda: n.__setitem__(0, n[0] + 1) or .5 + .001 * n[0]
    blocks = lambda w: f"{w}@IN=.3,MID={w},OUT00=.2,OUT03=.8"
    theirs = lambda w: {"down": {"block_1": [.1, .2], "block_2": w}, "mid": .3, "up": {"block_0": [.1, .2, .3]}}
    step(); out["bare step"] = cpu(step)
    for mode in ("merge", "inject"):
        with scheduled(unet, {lora: 1.}, budget=0, mode=mode) as h:
            step(); out[f"step, {mode}"] = cpu(step)
            look = lambda: h._before(unet, (x, 500), {})
            out[f"hook alone, {mode}"] = cpu(lambda: [look() for _ in range(100)]) / 100
            change = lambda s: (h.set(lora, s), look())
            out[f"change, {mode}"] = cpu(lambda: change(count()))
            out[f"change with blocks, {mode}"] = cpu(lambda: change(blocks(count())))
    with scheduled(unet, {lora: 1.}) as h:
        flip = lambda: (n.__setitem__(0, n[0] + 1), h.set(lora, 1. + n[0] % 2), h._before(unet, (x, 500), {}))
        flip(); flip(); out["exchange of cached weights"] = cpu(flip)
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=list(there)), adapter_name="a")
    step(); out["step, peft"] = cpu(step)
    out["change, peft"] = cpu(lambda: unet.set_adapters(["a"], [count()]))
    out["change with blocks, peft"] = cpu(lambda: unet.set_adapters(["a"], [theirs(count())]))
    for k, v in out.items(): print(f"{k}: {v * 1e3:.2f} ms", flush=True)
    keep("speed", dict(modules=len(there), tiny=tiny, seconds=out))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    words = sys.argv[1:]
    folder = Path(words.pop(words.index("--loras") + 1)) if "--loras" in words else data_path("loras")
    words = [w for w in words if w != "--loras"] or ["heat", "grid", "rank", "speed"]
    base = load_base("tiny-sd")
    loras = {p.stem: Lora.load(p) for p in sorted(folder.glob("*.safetensors")) if p.stem in (SUBJECT, STYLE)}
    for w in words: dict(heat=heat, grid=picture, rank=rank, speed=speed)[w](base, loras)
