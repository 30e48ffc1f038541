"""A LoRA training step of SD3.5 Large and Medium on this machine's GPU, beside diffusers + peft, and whole pipelines (`make bench-gpu`).

    python tools/bench_gpu.py            the true shapes, random weights in bf16; writes nbs/benchmarks/03_gpu.json, .md
    python tools/bench_gpu.py --tiny     the same program on small shapes, on any device: its test
    python tools/bench_gpu.py --models medium --batches 1 4 --rounds 3
    python tools/bench_gpu.py --check    at most ten minutes (`make gpu-check`): few steps of one picture; rows that do not fit are named

Both sides train the same transformer in the same process, in turns. No weights are loaded: time and memory do not
depend on their values.
"""
import argparse, gc, json, os, platform, sys, time
from pathlib import Path
from statistics import median

os.environ.setdefault("LORA_NB_QUIET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from lora_nb.core import atomic_path

KEPT = Path(__file__).resolve().parent.parent / "nbs/benchmarks"
SHARED = dict(patch_size=2, in_channels=16, out_channels=16, attention_head_dim=64, joint_attention_dim=4096,
              pooled_projection_dim=2048, qk_norm="rms_norm", sample_size=128)
SHAPES = {                                                        # FACTS of the published configurations
    "large": dict(SHARED, num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192),
    "medium": dict(SHARED, num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
                   dual_attention_layers=tuple(range(13)))}
EXPECTED = {"large": (8_056_627_520, 23_580_672), "medium": (2_243_171_520, 11_943_936)}  # parameters: all, LoRA r 16
TINY = dict(num_layers=3, num_attention_heads=2, attention_head_dim=16, caption_projection_dim=32, sample_size=16,
            joint_attention_dim=64, pooled_projection_dim=64, pos_embed_max_size=24)
TEXT = 77 + 256                                                   # tokens of the CLIPs and of T5
RANK = 16
PIPELINES = ("sd1.5", "sdxl", "sd3.5-medium", "sd3.5-large", "flux.1-dev", "z-image")    # those of true_size.py


def shape_of(name, tiny):
    "Configuration of the transformer"
    small = dict(TINY, dual_attention_layers=(0,)) if SHAPES[name].get("dual_attention_layers") else TINY
    return {**SHAPES[name], **small} if tiny else SHAPES[name]


def transformer(config, device, dtype):
    "A transformer with random weights"
    from diffusers import SD3Transformer2DModel
    was = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device): net = SD3Transformer2DModel(**config)
    finally: torch.set_default_dtype(was)
    return net.requires_grad_(False).eval()


def check_shapes(name):
    "The parameters of the true shape, and of its LoRA, counted without weights"
    from lora_nb.injection import inject_lora
    net = transformer(SHAPES[name], "meta", torch.float32)
    counted = sum(p.numel() for p in net.parameters()), inject_lora(net, "attention", rank=RANK).num_parameters
    assert counted == EXPECTED[name], f"{name}: {counted} parameters, expected {EXPECTED[name]}"
    return counted


def matmul_rate(device, dtype, n):
    "Operations a second of an n x n matrix product, as this device really does them"
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(12):
        start = now(device); a @ b; times.append(now(device) - start)
    return 2 * n**3 / median(times[2:])


class Budget:
    "Seconds that a run may take: a row that is expected to need more than what is left is left out, and says so"
    def __init__(self, seconds=None, clock=time.perf_counter): self.seconds, self.clock, self.start = seconds, clock, clock()
    @property
    def left(self): return float("inf") if self.seconds is None else self.seconds - (self.clock() - self.start)
    def refuses(self, expected):
        "Why a row of these seconds is left out; empty where there is time"
        return "" if expected <= self.left else f"left out: about {expected:.0f} s, and {max(0, self.left):.0f} s are left"


EFFICIENCY = .25           # share of the matrix rate that a careful guess expects of a step; cards reach more
SETUP = 8                  # seconds around a row: adapters, warm caches, freeing memory
KINDS = {"load": 45, "encode a picture": 10, "encode a caption": 5, "draw, 20 steps": 40, "step, checkpointing": 30, "step": 25,
         "step, compiled": 150, "draw, 20 steps, offload": 90, "step, nf4, checkpointing": 90, "step, fp8, checkpointing": 60}    # of SDXL
SIZE = {"sd1.5": .4, "sdxl": 1., "sd3.5-medium": 1.3, "sd3.5-large": 3., "flux.1-dev": 4., "z-image": 2.5}       # times that of SDXL


def expected_steps(args, batch, checkpointing, work, rate):
    "Seconds that a row of both sides should take at most"
    steps = args.rounds * len(SIDES) * (args.steps + 2)
    return SETUP * args.rounds + steps * batch * work * (4 / 3 if checkpointing else 1) / (rate * EFFICIENCY)


def now(device):
    "Seconds, when the device has done what it was given"
    if device.type == "cuda": torch.cuda.synchronize()
    return time.perf_counter()


# ------------------------------------------------------------------------------------------ the two sides
def our_step(net, config, batch, checkpointing, device):
    "(one step of lora_nb's `Trainer`, how to undo it)"
    from lora_nb.bases import Cond
    from lora_nb.families import as_base
    from lora_nb.random_pipes import random_pipe
    from lora_nb.dataset import Examples
    from lora_nb.injection import inject_lora
    from lora_nb.recipe import Recipe
    from lora_nb.training import Stream, Trainer
    pipe = random_pipe("sd3")                                     # its transformer is exchanged, the rest is not asked
    pipe.register_modules(transformer=net)
    base = as_base(pipe, "random")
    worn = inject_lora(net, "attention", rank=RANK)
    examples = Examples(torch.randn(4, 1, 16, config["sample_size"], config["sample_size"]), ["a sks toy"] * 4)
    recipe = Recipe(steps=1000, rank=RANK, guard=False, gradient_checkpointing=checkpointing)
    trainer = Trainer(base, worn, [Stream("subject", examples, batch)], recipe)
    trainer.texts.seen["a sks toy"] = Cond(
        prompt_embeds=torch.randn(1, TEXT, config["joint_attention_dim"], device=device, dtype=net.dtype),
        pooled=torch.randn(1, config["pooled_projection_dim"], device=device, dtype=net.dtype))
    session = trainer.session(); session.__enter__()
    return trainer.step, lambda: (session.__exit__(None, None, None), worn.remove())


def peer_step(net, config, batch, checkpointing, device):
    "(one step as diffusers and peft are used for SD3, how to undo it)"
    from diffusers.training_utils import cast_training_params
    from lora_nb.injection import find_targets
    from peft import LoraConfig
    names = [n.removeprefix("transformer.") for n in find_targets(net, "attention")]          # the same layers
    net.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=names), "peer")
    cast_training_params(net, dtype=torch.float32)
    if checkpointing: net.enable_gradient_checkpointing()
    params = [p for p in net.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=1e-4, fused=device.type in ("cuda", "cpu"))
    size = config["sample_size"]
    latents = torch.randn(batch, 16, size, size, device=device)
    text = torch.randn(batch, TEXT, config["joint_attention_dim"], device=device, dtype=net.dtype)
    pooled = torch.randn(batch, config["pooled_projection_dim"], device=device, dtype=net.dtype)
    half = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    def step():
        noise, sigma = torch.randn_like(latents), torch.sigmoid(torch.randn(batch, device=device)).view(-1, 1, 1, 1)
        noisy = ((1 - sigma) * latents + sigma * noise).to(net.dtype)
        with half: v = net(noisy, timestep=sigma.flatten() * 1000, encoder_hidden_states=text,
                           pooled_projections=pooled).sample
        loss = (v.float() - (noise - latents)).square().mean()
        loss.backward(); torch.nn.utils.clip_grad_norm_(params, 1.)
        opt.step(); opt.zero_grad()
        return loss.detach()                                      # reading it would make the peer wait at each step; we do not
    def undo():
        if checkpointing: net.disable_gradient_checkpointing()
        net.delete_adapters("peer")
        for n, m in list(net.named_modules()):                    # peft leaves its wrappers: put the layers back
            if hasattr(m, "base_layer"): net.set_submodule(n, m.base_layer)
        net._hf_peft_config_loaded = False
        if hasattr(net, "peft_config"): del net.peft_config
    return step, undo


SIDES = {"lora_nb": our_step, "diffusers + peft": peer_step}


# ------------------------------------------------------------------------------------------ measuring
def measure(make, net, config, batch, checkpointing, device, steps):
    "Seconds of each step and the peak of memory; or None where it does not fit"
    if device.type == "cuda": torch.cuda.reset_peak_memory_stats()
    undo, fits = (lambda: None), True
    try:
        step, undo = make(net, config, batch, checkpointing, device)
        times = []
        for _ in range(steps + 2):
            start = now(device); step(); times.append(now(device) - start)
    except torch.OutOfMemoryError: fits = False
    finally: undo()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    for p in net.parameters(): p.grad = None
    step = None; gc.collect()
    if device.type == "cuda": torch.cuda.empty_cache()
    return (times[2:], peak) if fits else None


def operations(config):
    "Operations of one picture's step, forward and backward, without recomputation: counted on a model without weights"
    from torch.utils.flop_counter import FlopCounterMode
    from lora_nb.injection import inject_lora
    net = transformer(config, "meta", torch.float32)
    inject_lora(net, "attention", rank=RANK)
    meta = lambda *shape: torch.empty(shape, device="meta")
    size = config["sample_size"]
    with FlopCounterMode(display=False) as count:
        text, pooled = meta(1, TEXT, config["joint_attention_dim"]), meta(1, config["pooled_projection_dim"])
        net(meta(1, 16, size, size), timestep=meta(1), encoder_hidden_states=text,
            pooled_projections=pooled).sample.sum().backward()
    return count.get_total_flops()


def rows_of(name, args, device, dtype, rate, budget):
    "All rows of one model"
    config = shape_of(name, args.tiny)
    net, work = None, operations(config)
    tokens = (config["sample_size"] // config["patch_size"])**2 + TEXT
    for batch in args.batches:
        for checkpointing in (True, False):
            if why := budget.refuses(expected_steps(args, batch, checkpointing, work, rate)):
                yield dict(model=name, batch=batch, checkpointing=checkpointing, side="both", error=why); continue
            if net is None: net = transformer(config, device, dtype)
            found = {side: [] for side in SIDES}
            for _ in range(args.rounds):                          # in turns, so that both meet the same weather
                for side, make in SIDES.items():
                    if None in found[side]: continue
                    found[side].append(measure(make, net, config, batch, checkpointing, device, args.steps))
            for side, runs in found.items():
                row = dict(model=name, batch=batch, checkpointing=checkpointing, side=side)
                yield {**row, **(numbers(runs, batch, tokens, work, rate) if None not in runs
                                 else dict(error="out of memory")),
                       **({} if args.tiny or side != "lora_nb" else dict(estimate_gb=estimated(name, batch, checkpointing)))}
    del net; gc.collect()


def estimated(name, batch, checkpointing):
    "What `estimate_memory` says of the step, in GB, without the allowance for driver and allocator"
    from lora_nb.memory import estimate_memory
    need = estimate_memory(f"sd3.5-{name}", rank=RANK, batch_size=batch, gradient_checkpointing=checkpointing, allowance=False)
    return need.sums["step"] / 1e9


def numbers(runs, batch, tokens, work, rate):
    "What a row says of its runs"
    seconds = median(t for times, _ in runs for t in times)
    peaks = [p for _, p in runs if p is not None]
    done = batch * work / seconds
    return dict(seconds=seconds, peak_gb=max(peaks) / 1e9 if peaks else None,
                tokens_per_second=batch * tokens / seconds, tflops=done / 1e12, share_of_matmul=done / rate)


# ------------------------------------------------------------------------------------------ a whole pipeline
def whole(name, tiny):
    "The denoiser and all around it, at a base's true size, random weights"
    from true_size import pipeline                                # beside this file
    from lora_nb.families import as_base
    return as_base(pipeline(name, torch.float32 if tiny else torch.bfloat16, tiny), name)


def trainer_step(base, checkpointing):
    "(one step of `Trainer` on one picture's latents, how to undo it)"
    from lora_nb.dataset import ConceptDataset, encode
    from lora_nb.injection import inject_lora
    from lora_nb.recipe import Recipe
    from lora_nb.training import Stream, Trainer
    from PIL import Image
    size = base.resolution
    examples = encode(base, ConceptDataset([Image.new("RGB", (size, size), "red")], "a sks toy", size=size), 1)
    worn = inject_lora(base.denoiser, "attention", rank=RANK)
    recipe = Recipe(steps=1000, rank=RANK, guard=False, gradient_checkpointing=checkpointing)
    session = (trainer := Trainer(base, worn, [Stream("subject", examples, 1)], recipe)).session(); session.__enter__()
    return trainer.step, lambda: (session.__exit__(None, None, None), worn.remove())


def steps_of(base, checkpointing):
    "A piece of work: training steps, set up when it is first called"
    kept = []
    def work():
        if not kept: kept.extend(trainer_step(base, checkpointing))
        return kept[0]()
    return work, lambda: kept and kept[1]()


def works(name, args, device):
    "(what, how to set it up): each kind of work of one pipeline; setting up returns (work, how to undo it)"
    from lora_nb.loading import compile_denoiser
    from lora_nb.quantize import quantize_parts
    held, nothing, kind = {}, lambda: None, "fp8" if args.tiny else "nf4"
    def fresh(place=True):
        held.clear(); gc.collect(); held["base"] = base = whole(name, args.tiny)
        if place: base.pipe.to(device)
        return base
    base = lambda: held.get("base") or fresh()
    size = lambda: base().resolution
    draw = lambda: base().generate("a sks toy", seeds=[0], size=size(), steps=2 if args.tiny else 20)
    def encode_picture():
        pixels = torch.zeros(1, 3, size(), size(), device=device)
        return lambda: base().encode_images(pixels), nothing
    def compiled():
        compile_denoiser(base(), **(dict(backend="eager") if args.tiny else {}))
        return steps_of(base(), False)
    def offloaded(): fresh(False).pipe.enable_model_cpu_offload(device=device); return draw, nothing
    def packed():
        b = fresh(False); quantize_parts(b.pipe, {b.denoiser_name: kind}, b.dtype, {}); b.pipe.to(device)
        return steps_of(b, True)
    yield "encode a picture", encode_picture
    yield "encode a caption", lambda: (lambda: base().encode_prompts(["a sks toy"]), nothing)
    yield "draw, 20 steps", lambda: (draw, nothing)
    yield "step, checkpointing", lambda: steps_of(base(), True)
    yield "step", lambda: steps_of(base(), False)
    yield "step, compiled", compiled
    if device.type == "cuda": yield "draw, 20 steps, offload", offloaded
    yield f"step, {kind}, checkpointing", packed


def expected_work(name, what, loaded, tiny):
    "Seconds that a kind of work should take at most, with loading where it is due"
    load = 0 if loaded and not any(w in what for w in ("offload", "nf4", "fp8")) else KINDS["load"]
    return 0 if tiny else SIZE[name] * (KINDS[what] + load)


def pipeline_rows(name, args, device, budget):
    "Seconds and peak of each kind of work; a kind that fails, or is left out, says so and the others go on"
    loaded = False
    for what, setup in works(name, args, device):
        row, undo = dict(pipeline=name, work=what), lambda: None
        if why := budget.refuses(expected_work(name, what, loaded, args.tiny)): yield {**row, "error": why}; continue
        if device.type == "cuda": torch.cuda.reset_peak_memory_stats()
        try:
            work, undo = setup(); loaded = True
            work()                                                # warms up; compiles
            times = []
            for _ in range(args.steps): start = now(device); work(); times.append(now(device) - start)
            row |= dict(seconds=median(times), peak_gb=torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None)
        except torch.OutOfMemoryError: row |= dict(error="out of memory")
        except Exception as e: row |= dict(error=f"{type(e).__name__}: {str(e)[:120]}")
        finally: undo()
        work = undo = setup = None; gc.collect()                  # the next kind may load the pipeline again
        if device.type == "cuda": torch.cuda.empty_cache()
        yield row


def pipeline_report(rows):
    "The table of whole pipelines in markdown"
    lines = ["| pipeline | work | s | peak, GB |", "|---|---|---|---|"]
    for r in rows:
        peak = "" if r.get("peak_gb") is None else f"{r['peak_gb']:.1f}"
        lines.append(f"| {r['pipeline']} | {r['work']} | {r.get('error') or format(r['seconds'], '.3f')} | {peak} |")
    return "Whole pipelines, one picture at the base's own size, lora_nb only.\n\n" + "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------ the report
def report(rows, about):
    "The tables in markdown, with the device's name"
    rows, around = [r for r in rows if "model" in r], [r for r in rows if "pipeline" in r]
    head = (f"LoRA training step, rank {RANK} on all attention projections, {about['picture']}, {about['dtype']}, "
            f"random weights. **{about['device']}**, matrix product {about['matmul_tflops']:.1f} TFLOP/s (measured). "
            f"torch {about['torch']}, diffusers {about['diffusers']}, peft {about['peft']}. Operations are those of a "
            "step without recomputation.")
    lines = ["| model | batch | checkpointing | by | s / step | pictures / s | peak, GB | estimate, GB | tokens / s | share of the matrix rate |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        told = f"| {r['model']} | {r['batch']} | {'on' if r['checkpointing'] else 'off'} | {r['side']} |"
        if "error" in r: lines.append(f"{told} {r['error']} | | | | | |"); continue
        peak = "" if r["peak_gb"] is None else f"{r['peak_gb']:.1f}"
        guess = f"{r['estimate_gb']:.1f}" if "estimate_gb" in r else ""
        lines.append(f"{told} {r['seconds']:.3f} | {r['batch'] / r['seconds']:.2f} | {peak} | {guess} | {r['tokens_per_second']:,.0f} | "
                     f"{r['share_of_matmul']:.0%} |")
    return "\n".join([head, "", *lines]) + "\n" + ("\n" + pipeline_report(around) if around else "")


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--tiny", action="store_true", help="small shapes in fp32, on any device: a test of this program")
    p.add_argument("--check", action="store_true", help="a short run for any GPU: one picture, one round")
    p.add_argument("--models", nargs="+", choices=list(SHAPES), default=["medium", "large"])
    p.add_argument("--batches", nargs="+", type=int, default=None, help="pictures in a step; default 1 2 4 (tiny: 1 2)")
    p.add_argument("--pipelines", nargs="*", choices=list(PIPELINES), default=None,
                   help="whole pipelines: encoding, drawing, nf4, compiled, offload; default sdxl (tiny: none)")
    p.add_argument("--steps", type=int, default=None, help="measured steps in a round, after two others; default 6")
    p.add_argument("--rounds", type=int, default=2, help="turns of each side")
    p.add_argument("--seconds", type=float, default=None, help="rows that would not fit are left out and named; default 600 with --check")
    p.add_argument("--output", default=None, help="folder of 03_gpu.json and .md; default nbs/benchmarks (tiny: none)")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    if args.check: args.rounds, args.steps, args.seconds = 1, args.steps or 4, args.seconds or 600
    budget = Budget(args.seconds)
    args.batches = args.batches or ([1] if args.check else [1, 2] if args.tiny else [1, 2, 4])
    args.steps = args.steps or (1 if args.tiny else 6)
    if not args.tiny and not torch.cuda.is_available():
        print("no GPU found; nothing measured"); return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if args.tiny else torch.bfloat16
    import diffusers, peft
    counted = {n: check_shapes(n) for n in args.models}
    rate = matmul_rate(device, dtype, 256 if args.tiny else 8192)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    about = dict(device=name, torch=torch.__version__, diffusers=diffusers.__version__, peft=peft.__version__,
                 dtype=str(dtype).split(".")[1], matmul_tflops=rate / 1e12, rank=RANK, tiny=args.tiny,
                 picture="128 px, small shapes" if args.tiny else "1024 px (4096 picture tokens, 333 text tokens)",
                 parameters={n: c[0] for n, c in counted.items()}, lora={n: c[1] for n, c in counted.items()})
    rows, out = [], args.output or (None if args.tiny else KEPT)
    pipelines = ([] if args.tiny else ["sdxl"]) if args.pipelines is None else args.pipelines
    for found in (*(rows_of(m, args, device, dtype, rate, budget) for m in args.models),
                  *(pipeline_rows(p, args, device, budget) for p in pipelines)):
        for row in found:
            rows.append(row); print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            if out: save(out, rows, about)                         # what is measured stays, whatever comes next
    print("\n" + report(rows, about))
    return 0


def save(folder, rows, about):
    "Both files, whole or not at all"
    Path(folder).mkdir(parents=True, exist_ok=True)
    texts = {"03_gpu.json": json.dumps(dict(about=about, rows=rows), indent=1) + "\n", "03_gpu.md": report(rows, about)}
    for name, text in texts.items():
        with atomic_path(Path(folder) / name) as tmp: Path(tmp).write_text(text)


if __name__ == "__main__": sys.exit(main())
