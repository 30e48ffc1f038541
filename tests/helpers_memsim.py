"""Peak memory of a real `Trainer.step` at any shapes, without weights and without a GPU: fake CPU tensors under PyTorch's MemTracker.

    python tests/helpers_memsim.py sdxl [--checkpointing] [--prior 1] [--size 1024]      a published base at its true size: minutes

CUDA's autocast is played by a function mode. It shares no code with `estimate_memory`, which is compared with it.
"""
import argparse, contextlib, copy, json, time
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import lora_nb.layers as layers
from lora_nb.bases import Cond
from lora_nb.dataset import Examples
from lora_nb.families import as_base
from lora_nb.injection import inject_lora
from lora_nb.memory import SHAPES
from lora_nb.random_pipes import random_pipe
from lora_nb.recipe import Recipe
from lora_nb.samples import Batch, Stream
from lora_nb.training import Trainer

LOW = {F.linear, F.conv2d, torch.conv2d, torch.matmul, torch.mm, torch.addmm, torch.bmm, torch.baddbmm, torch.Tensor.matmul,
       torch.Tensor.__matmul__, F.scaled_dot_product_attention, torch.einsum, torch._C._nn.linear}
HIGH = {F.layer_norm, F.group_norm, torch.group_norm, torch.layer_norm, F.softmax, torch.softmax, torch.Tensor.softmax, torch.pow,
        torch.Tensor.pow, torch.Tensor.__pow__, torch.rsqrt, torch.sum, torch.Tensor.sum, torch.exp, torch.norm, F.mse_loss, torch.cumsum}
FAMILY = {"UNet2DConditionModel": "sd", "SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux",
          "Flux2Transformer2DModel": "flux2", "ZImageTransformer2DModel": "zimage"}


class CudaAutocast(TorchFunctionMode):
    "CUDA autocast's casts, on any device; casts of fp32 leaf parameters are kept, as there"
    def __init__(self, low): super().__init__(); self.low, self.cache = low, {}
    def __torch_function__(self, func, types, args=(), kwargs=None):
        to = self.low if func in LOW else torch.float32 if func in HIGH else None
        if to is None: return func(*args, **(kwargs or {}))
        return func(*tree_map(self.cast(to), args), **tree_map(self.cast(to), kwargs or {}))
    def cast(self, to):
        def one(t):
            if not isinstance(t, torch.Tensor) or not t.is_floating_point() or t.dtype == to: return t
            if to != self.low or t.dtype != torch.float32 or not (t.requires_grad and t.is_leaf): return t.to(to)
            return self.cache.setdefault(id(t), (t, t.to(to)))[1]
        return one


class Tracker(MemTracker):
    "MemTracker wants gradient hooks on frozen parameters too, which PyTorch refuses: pretend that they are there"
    class Nothing:
        def remove(self): pass
    def _track_module_params_and_buffers(self, module, install_grad_hooks=True):
        for q in module.parameters():
            if not q.requires_grad: self._param_to_grad_hook_handles.setdefault(q, (self.Nothing(), self.Nothing()))
        return super()._track_module_params_and_buffers(module, install_grad_hooks)
    def _update_peak_stats(self, peak_state):
        "The peak of the whole only: its own looks at every module after every operation"
        for dev, now in self._curr_mem_snap.items():
            if self._peak_mem.get(dev, 0) < now["Total"]: self._peak_mem[dev], self._peak_mem_snap[dev] = now["Total"], dict(now)


@contextlib.contextmanager
def no_init():
    "A context in which fresh weights are not drawn"
    import torch.nn.init as I
    with contextlib.ExitStack() as stack:
        for k in dir(I):
            if k.endswith("_") and not k.startswith("_") and callable(getattr(I, k)):
                stack.enter_context(mock.patch.object(I, k, lambda t, *a, **kw: t))
        yield


def network(kind, config, dtype):
    "A frozen denoiser on fake tensors, made in half precision; fixed tables, too, as `load_base` has them"
    import diffusers
    with no_init():
        torch.set_default_dtype(dtype)
        try: net = getattr(diffusers, kind).from_config(config).requires_grad_(False).eval()
        finally: torch.set_default_dtype(torch.float32)
    for m in net.modules(): m._buffers.update({n: b.to(dtype) for n, b in m._buffers.items() if b is not None and b.is_floating_point()})
    return net


def told(kind, config, dtype):
    "What text encoders would say of one prompt"
    m, c = lambda *s: torch.randn(*s, dtype=dtype), config
    if kind == "SD3Transformer2DModel": return Cond(prompt_embeds=m(1, 333, c.joint_attention_dim), pooled=m(1, c.pooled_projection_dim))
    if kind == "FluxTransformer2DModel": return Cond(prompt_embeds=m(1, 512, c.joint_attention_dim), pooled=m(1, c.pooled_projection_dim))
    if kind == "Flux2Transformer2DModel": return Cond(prompt_embeds=m(1, 512, c.joint_attention_dim))
    if kind == "ZImageTransformer2DModel": return Cond(prompt_embeds=m(1, 512, c.cap_feat_dim), mask=torch.ones(1, 512))
    if c.addition_embed_type != "text_time": return Cond(prompt_embeds=m(1, 77, c.cross_attention_dim))
    return Cond(prompt_embeds=m(1, 77, c.cross_attention_dim), time_ids=torch.zeros(1, 6),
                pooled=m(1, c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim))


def whole_prompts(base):
    "Z-Image's `predict`, without asking a mask which tokens there are: fake tensors cannot tell"
    def predict(noisy, t, cond):
        frames = list(noisy.to(base.dtype).unsqueeze(2).unbind())
        answer = base.denoiser(frames, 1 - t / base.max_timestep, list(cond["prompt_embeds"].to(base.dtype).unbind()), return_dict=False)[0]
        return -torch.stack([a.float() for a in answer]).squeeze(2)
    return predict


def simulated(kind, config, size, batch=1, prior=0, rank=16, checkpointing=False, dtype=torch.bfloat16, factor=8):
    "Bytes at the peak of the second step: weights of the denoiser, LoRA, gradients, AdamW's state and activations"
    family = FAMILY[kind]; sdxl = config.get("addition_embed_type") == "text_time"
    pipe = random_pipe("sdxl" if sdxl else family)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode: net = network(kind, config, dtype)
    pipe.register_modules(**{"unet" if family == "sd" else "transformer": net})
    base, side = as_base(pipe, "simulated"), size // (2 * factor if family == "flux2" else factor)
    channels = net.config.in_channels // (4 if family == "flux" else 1)
    with mode: worn = inject_lora(net, "attention", rank=rank)
    of = lambda name, n: Stream(name, Examples(torch.zeros(4, 1, channels, 8, 8), ["a"] * 4), n)
    streams = [of("subject", batch)] + ([of("prior", prior)] if prior else [])
    recipe = Recipe(steps=10, rank=rank, guard=False, gradient_checkpointing=checkpointing, snr_gamma=5. if family == "sd" else None)
    trainer = Trainer(base, worn, streams, recipe)
    with mode:
        m = lambda n: torch.randn(n, channels, side, side)
        trainer.texts.seen["a"] = told(kind, net.config, dtype)
        more = lambda n: dict(time_ids=torch.zeros(n, 6)) if sdxl else {}
        fixed = {s.name: [Batch(s, m(s.batch), ["a"] * s.batch, torch.rand(s.batch), m(s.batch), more(s.batch))] for s in streams}
    trainer.draw = lambda s, micro: fixed[s.name]
    trainer._flush = trainer.pending.clear
    base.timesteps_at = lambda q, r=(0., 1.): torch.full((len(q),), 500, dtype=torch.long if family == "sd" else torch.float32)
    if family == "zimage": base.predict = whole_prompts(base)
    trainer.accel.autocast = lambda *a, **kw: CudaAutocast(dtype)
    again, both = net.enable_gradient_checkpointing, lambda: (contextlib.nullcontext(), CudaAutocast(dtype))
    net.enable_gradient_checkpointing = lambda *a: again(lambda f, *args: checkpoint(f, *args, use_reentrant=False, context_fn=both))
    tracker = Tracker(); tracker.track_external(net, trainer.opt.optimizer)
    with mock.patch.object(layers, "autocasts", lambda x: True), mode, trainer.session(), tracker:
        for _ in range(2): trainer.step(); found = tracker.get_tracker_snapshot("peak"); tracker.reset_mod_stats()
    return found[torch.device("cpu")]["Total"]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("base", choices=list(SHAPES)); p.add_argument("--size", type=int, default=None); p.add_argument("--batch", type=int, default=1)
    p.add_argument("--prior", type=int, default=0); p.add_argument("--checkpointing", action="store_true")
    a = p.parse_args(argv); start = time.time()
    kind, config = SHAPES[a.base]["unet" if "unet" in SHAPES[a.base] else "transformer"]
    size = a.size or (512 if a.base == "sd1.5" else 1024)
    found = simulated(kind, copy.deepcopy(config), size, a.batch, a.prior, checkpointing=a.checkpointing)
    print(json.dumps({**vars(a), "gib": round(found / 2**30, 3), "seconds": round(time.time() - start)}))


if __name__ == "__main__": main()
