"""Load LoRA files with plain diffusers, of any version, and compare each layer's difference with the right one.

`python helpers_plain.py jobs.json` runs where lora_nb is not installed; it prints JSON: file -> layers that are wrong."""
import inspect, json, sys

import torch


def plain_config(model):
    "Class and configuration of a model, as JSON can hold them"
    c = model.config.to_diff_dict() if hasattr(model.config, "to_diff_dict") else dict(model.config)
    odd = ("torch_dtype", "dtype", "transformers_version", "_name_or_path", "architectures", "_use_default_values")
    return type(model).__name__, json.loads(json.dumps({k: v for k, v in c.items() if k not in odd}, default=str))


def plain_model(kind, config):
    import diffusers, transformers
    if hasattr(diffusers, kind): return getattr(diffusers, kind).from_config(config)
    return getattr(transformers, kind)(transformers.CLIPTextConfig(**config))


def plain_pipe(kind, models):
    "A pipeline of these models: component -> (class, configuration)"
    import diffusers
    parts = {c: plain_model(*m) for c, m in models.items()}
    cls = getattr(diffusers, kind)
    names = [n for n in inspect.signature(cls.__init__).parameters if n != "self"]
    given = {n: parts.get(n) for n in names if n not in ("requires_safety_checker", "force_zeros_for_empty_prompt", "add_watermarker",
                                                         "image_encoder")}
    flow = "3" in kind
    given["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler() if flow else diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    return cls(**given, **({"requires_safety_checker": False} if "requires_safety_checker" in names else {})), parts


def wrong_layers(job):
    "Layer -> what is wrong with it, after `load_lora_weights` by path (or of the tensors alone, without metadata)"
    from safetensors.torch import load_file
    pipe, parts = plain_pipe(job["pipe"], job["models"])
    folder, _, name = job["file"].rpartition("/")
    if job.get("bare"): pipe.load_lora_weights(load_file(job["file"]))
    else: pipe.load_lora_weights(folder, weight_name=name)
    got = {f"{c}.{n.removeprefix('text_model.')}": m.get_delta_weight(next(iter(m.lora_A))).detach()
           for c, model in parts.items() for n, m in model.named_modules() if getattr(m, "lora_A", None)}
    want, wrong = load_file(job["want"]), {}
    for n, w in want.items():
        if n not in got: wrong[n] = "not loaded"
        elif not torch.allclose(got[n], w, atol=1e-5, rtol=1e-4): wrong[n] = f"{((got[n] * w).sum() / w.square().sum()).item():.3f}x"
    return {**wrong, **{n: "not of the LoRA" for n in set(got) - set(want)}}


if __name__ == "__main__":
    import diffusers, transformers
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    found = {}
    for job in json.load(open(sys.argv[1])):
        try: found[job["name"]] = wrong_layers(job)
        except Exception as e: found[job["name"]] = {"": f"{type(e).__name__}: {e}"[:300]}
    print(json.dumps(dict(version=diffusers.__version__, wrong=found)))
