"""Each family at its true size with random weights: load, train, save, and read the file with plain diffusers (`make true-size`).

    python tools/true_size.py                       every base that fits this machine's memory: hours on a CPU
    python tools/true_size.py --bases sd1.5 sdxl --resolution 512
    python tools/true_size.py --tiny                the same program on the tiny random pipelines: its test

Weights are random, so a picture means nothing; shapes, names, memory and files are those of the real bases. Tokenizers are the
tiny ones of `random_pipe`: their ids lie inside the real vocabularies, which are not part of this project.
"""
import argparse, gc, os, resource, sys, tempfile, time
from functools import partial
from pathlib import Path

os.environ.setdefault("LORA_NB_QUIET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from lora_nb.core import quiet
from lora_nb.memory import SHAPES

TINY = {"sd1.5": "sd", "sdxl": "sdxl", "sd3.5-medium": "sd3", "sd3.5-large": "sd3", "flux.1-dev": "flux", "z-image": "zimage"}


def filled(kind, config, dtype):
    "A network of this class with small random weights, made in `dtype`"
    import diffusers, transformers
    was = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with quiet():
            if hasattr(diffusers, kind): net = getattr(diffusers, kind).from_config(config)
            else: net = (cls := getattr(transformers, kind))(cls.config_class(**config))
    finally: torch.set_default_dtype(was)
    return net.to(dtype).eval().requires_grad_(False)


def pipeline(name, dtype, tiny):
    "A pipeline of a base's true shapes (or of tiny ones) with random weights"
    from lora_nb.random_pipes import random_pipe
    pipe = random_pipe(TINY[name])
    if tiny: return pipe
    for part, (kind, config) in SHAPES[name].items(): pipe.register_modules(**{part: filled(kind, config, dtype)})
    pipe.vae_scale_factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    return pipe


def parameters(name):
    "How many numbers a base has"
    from lora_nb.memory import shapes_of
    return sum(p.numel() for net in shapes_of(name).values() for p in net.parameters())


def check(name, args):
    "A row: what was done, and how long it took"
    from PIL import Image
    from lora_nb.dreambooth import train_dreambooth
    from lora_nb.lora import Lora
    from lora_nb.loading import load_base
    dtype, row = (torch.float32 if args.tiny else torch.bfloat16), dict(base=name)
    def timed(what, f):
        start = time.perf_counter(); found = f(); row[what] = time.perf_counter() - start
        return found
    with tempfile.TemporaryDirectory(dir=args.scratch) as d:
        pipe = timed("make", lambda: pipeline(name, dtype, args.tiny))
        with quiet(): timed("save", partial(pipe.save_pretrained, f"{d}/base"))
        del pipe; gc.collect()
        base = timed("load", lambda: load_base(f"{d}/base", dtype=dtype))
        size = args.resolution or base.resolution
        pictures = [Image.new("RGB", (size, size), c) for c in ("red", "blue")]
        lora = timed("train", lambda: train_dreambooth(base, pictures, "a sks toy", steps=args.steps, batch_size=1, rank=4,
                     resolution=size, gradient_checkpointing=True, output_dir=f"{d}/run"))
        assert all(f.up.isfinite().all() and f.down.isfinite().all() for f in lora.layers.values()), f"{name}: not finite"
        assert any(f.up.any() for f in lora.layers.values()), f"{name}: nothing was learned"
        lora.save(f"{d}/pytorch_lora_weights.safetensors")
        assert {*Lora.load(f"{d}/pytorch_lora_weights.safetensors").layers} == {*lora.layers}
        row["layers"] = timed("interchange", lambda: worn_by_diffusers(base.pipe, f"{d}/pytorch_lora_weights.safetensors", lora))
        row["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return row


def worn_by_diffusers(pipe, path, lora):
    "How many layers plain diffusers puts a file's factors on; all of them, or an AssertionError"
    with quiet(): pipe.load_lora_weights(str(Path(path).parent), weight_name=Path(path).name)
    placed = [m for part in pipe.components.values() if isinstance(part, torch.nn.Module)
              for n, m in part.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)]
    assert len(placed) == len(lora.layers), f"diffusers placed {len(placed)} of {len(lora.layers)} layers"
    pipe.unload_lora_weights()
    return len(placed)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--tiny", action="store_true", help="the tiny random pipelines: a test of this program")
    p.add_argument("--bases", nargs="+", choices=list(TINY), default=list(TINY))
    p.add_argument("--resolution", type=int, default=None, help="pixels; default the base's own")
    p.add_argument("--steps", type=int, default=1, help="training steps")
    p.add_argument("--scratch", default=None, help="a folder with room for the largest base on the disk; default the system's")
    args = p.parse_args(argv)
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    failed = 0
    for name in args.bases:
        need = 0 if args.tiny else 2 * parameters(name) * 1.5
        if need > room: print(f"{name}: not run, needs about {need / 1e9:.0f} GB of memory, here are {room / 1e9:.0f}"); continue
        try: print({k: round(v, 2) if isinstance(v, float) else v for k, v in check(name, args).items()}, flush=True)
        except Exception as e: failed += 1; print(f"{name}: FAILED {type(e).__name__}: {e}", flush=True)
    return int(failed > 0)


if __name__ == "__main__": sys.exit(main())
