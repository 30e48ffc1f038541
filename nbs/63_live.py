# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
# ---

# %%
#| default_exp live.__init__

# %% [markdown]
# # Live
#
# > The embedded model in a browser: graphs that draw and learn, one copy of the weights, and a page that needs no server.
#
# A reader should be able to move a LoRA's slider without installing anything. So this chapter turns a base into files that a
# page can load: its weights in half precision, and graphs in ONNX's format that compute with them. A LoRA is an *input* of these
# graphs, so that a slider costs no recompilation. Even a whole training step, gradients and Adam included, becomes one graph.
# You need [Injection](09_injection.ipynb) and [Training](48_training.ipynb); `pip install onnx onnxscript onnxruntime` adds what
# the export needs.

# %% [markdown]
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lora-nb/lora_nb/blob/main/nbs/63_live.ipynb)

# %%
#| export
import contextlib, functools, gzip, hashlib, http.server, json, logging, shutil, subprocess, sys, tarfile, tempfile, threading, types, warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
import numpy as np, torch
import torch.nn.functional as F

# %%
#| export
from lora_nb.core import LoraError, atomic_path, data_path, human, progress
from lora_nb.bases import Base
from lora_nb.loading import load_base
from lora_nb.pictures import find_pictures
from lora_nb.similarity import Dino
from lora_nb.injection import find_targets
from lora_nb.lora import Lora
if TYPE_CHECKING: import onnx

# %%
#| hide
import os
os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
from fastcore.test import test_eq, test_close, test_fail
from lora_nb.families import as_base
from lora_nb.random_pipes import random_pipe
torch.set_num_threads(1)


# %% [markdown]
# ## One copy of the weights
#
# Drawing and training use the same frozen weights, and so do all graphs. `pack_weights` puts them into one array, one after
# another, in the half precision in which they ship: first what drawing needs, then what only learning needs, so that a page can fetch
# the second part later. The page widens the numbers to single precision once; every graph then reads from that one array.

# %%
#| exports
def pack_weights(
    base: Base,
    **more: torch.nn.Module,  # other networks that belong to the page, by name
) -> tuple[torch.Tensor, dict[str, dict]]:  # all numbers in fp16; name -> dict(offset in numbers, shape)
    "The weights of a base's networks in one array, and where each of them is."
    networks = {**base.parts(), **more}
    named = {f"{c}.{n}": p for c, net in networks.items() for n, p in net.state_dict().items() if p.is_floating_point()}
    parts, entries, at = [], {}, 0
    for name, p in sorted(named.items(), key=lambda e: _only_learning(e[0])):       # stable: else as they come
        entries[name] = dict(offset=at, shape=list(p.shape))
        parts.append(p.detach().cpu().to(torch.float16).flatten()); at += p.numel()
    return torch.cat(parts), entries

def _only_learning(name): return name.startswith(("vae.encoder.", "vae.quant_conv.", "describer."))

def learning_offset(entries: dict[str, dict]) -> int:  # as `pack_weights` gives them
    "Where the numbers begin that drawing does not need."
    at = [e["offset"] for n, e in entries.items() if _only_learning(n)]
    return min(at) if at else max(e["offset"] + int(np.prod(e["shape"])) for e in entries.values())


# %%
base = as_base(random_pipe("sd"), "random")
for network in base.parts().values(): network.half().float()      # the page computes with what fits half precision
numbers, entries = pack_weights(base)
human(2 * len(numbers)), len(entries)

# %%
e = entries["unet.conv_in.weight"]
there = numbers[e["offset"]:][:base.denoiser.conv_in.weight.numel()].view(e["shape"]).float()
test_eq(there, base.denoiser.conv_in.weight)
first = learning_offset(entries)
assert all(n.startswith("vae.") for n, e in entries.items() if e["offset"] >= first) and entries["vae.decoder.conv_in.weight"]["offset"] < first


# %% [markdown]
# Random-looking numbers hardly compress, but half of each is not random: the byte with the sign and the exponent takes few values.
# `squeeze` writes all low bytes first, then all high bytes, so that gzip finds the second half. Every browser can undo gzip.

# %%
#| exports
def squeeze(numbers: torch.Tensor) -> bytes:  # in fp16
    "Numbers as gzip of two planes: all low bytes, then all high bytes."
    return gzip.compress(numbers.numpy().view(np.uint8).reshape(-1, 2).T.tobytes(), 9, mtime=0)

def unsqueeze(data: bytes) -> torch.Tensor:
    "The numbers that `squeeze` wrote."
    planes = np.frombuffer(gzip.decompress(data), np.uint8).reshape(2, -1)
    return torch.from_numpy(np.ascontiguousarray(planes.T).view(np.float16).ravel())


# %%
squeezed = squeeze(numbers)
test_eq(unsqueeze(squeezed), numbers)
human(2 * len(numbers)), human(len(gzip.compress(numbers.numpy().tobytes()))), human(len(squeezed))


# %% [markdown]
# ## A LoRA as an input
#
# A graph whose weights contain the LoRA would have to be made anew for every position of a slider, which takes a third of a
# second. Instead, each layer that a LoRA may adapt gets two more inputs, `down` and `up` of any rank, with the strength folded
# into `up`. Several LoRAs are put side by side, as in [Lora](04_lora.ipynb): their sum is exact.

# %%
#| exports
class Branched(torch.nn.Module):
    "A network some of whose layers take a pair of factors as an input."
    def __init__(self,
        network: torch.nn.Module,
        paths: Sequence[str],      # of the layers that take factors
        call,                      # call(network, *inputs) -> output
    ):
        super().__init__()
        self.network, self.call, self.layers = network, call, [network.get_submodule(p) for p in paths]

    def forward(self, *inputs):
        "The output for inputs, of which the last is a list of (down, up), one for each path."
        *inputs, pairs = inputs
        for layer, pair in zip(self.layers, pairs): layer.forward = functools.partial(_with_branch, layer, *pair)
        try: return self.call(self.network, *inputs)
        finally:
            for layer in self.layers: del layer.forward

def _with_branch(layer, down, up, x):
    "A linear or convolution plus its branch."
    if isinstance(layer, torch.nn.Linear): return F.linear(x, layer.weight, layer.bias) + F.linear(F.linear(x, down), up)
    size = dict(stride=layer.stride, padding=layer.padding, dilation=layer.dilation)
    return F.conv2d(x, layer.weight, layer.bias, **size) + F.conv2d(F.conv2d(x, down, **size), up)


# %% [markdown]
# The shapes of a layer's factors of rank 1 tell the page how large they are. Layers that no LoRA of the page adapts are given
# zeros.

# %%
#| exports
def factor_shapes(
    network: torch.nn.Module,
    paths: Sequence[str],
    component: str,
) -> dict[str, dict[str, list[int]]]:  # name -> dict(down, up)
    "Shapes of factors of rank 1."
    weights = {f"{component}.{p}": network.get_submodule(p).weight.shape for p in paths}
    return {n: dict(down=[1, *s[1:]], up=[s[0], 1, *[1] * (len(s) - 2)]) for n, s in weights.items()}

def factors_for(
    shapes: dict[str, dict[str, list[int]]],  # as `factor_shapes` gives them
    lora: Lora | None = None,                 # None: random factors
    rank: int = 2,                            # of random factors
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    "(down, up) for each layer; zeros of rank 1 where the LoRA has none."
    def one(name, s):
        if lora is None: return torch.randn(rank, *s["down"][1:]) * .1, torch.randn(s["up"][0], rank, *s["up"][2:]) * .1
        if name not in lora.layers: return torch.zeros(s["down"]), torch.zeros(s["up"])
        f = lora.layers[name]
        return f.down.float(), f.up.float() * f.scaling
    return [one(name, s) for name, s in shapes.items()]


# %%
paths = list(find_targets(base.denoiser, "extended", "unet"))
shapes = factor_shapes(base.denoiser, paths, "unet")
len(paths), next(iter(shapes.items()))


# %% [markdown]
# Zero factors change nothing:

# %%
def answer(network, latents, timesteps, states): return network(latents, timesteps, states, return_dict=False)[0]
z, t, states = torch.randn(2, 4, 8, 8), torch.tensor([500, 20]), torch.randn(2, 77, 32)
none = factors_for(shapes, Lora({}))
with torch.no_grad(): test_close(Branched(base.denoiser, paths, answer)(z, t, states, none), answer(base.denoiser, z, t, states), 1e-6)


# %% [markdown]
# ## Graphs
#
# `torch.onnx.export` writes a network as a graph of operators. Two things are then changed. The batch and the rank stay open, and
# each stored weight is replaced by a reference to its place in the shared array. Weights are recognised by content (in half
# precision, as the page has them), since the names in a graph are not always those of the network.

# %%
#| exports
def to_onnx(
    module: torch.nn.Module,
    inputs: tuple,               # an example
    names: Sequence[str],        # of the inputs, flattened
    outputs: Sequence[str],      # names
    dynamic: Any = None,         # as `torch.onnx.export` takes it
) -> "onnx.ModelProto":
    "A module as an ONNX graph, not optimised, so that weights keep their values."
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.onnx.export(module, inputs, dynamo=True, opset_version=18, optimize=False, verbose=False, dynamic_shapes=dynamic,
                                 input_names=list(names), output_names=list(outputs)).model_proto


# %%
#| exports
WEIGHTS = "weights"      # what every graph calls the shared array

def share_weights(
    model: "onnx.ModelProto",   # changed in place
    numbers: torch.Tensor,      # the shared array
    entries: dict[str, dict],   # where each weight is
    least: int = 256,           # numbers; smaller constants stay in the graph
) -> int:                       # bytes of constants that stay in the graph
    "Let the weights of a graph refer to the shared array, and drop what only a debugger would read."
    from onnx import TensorProto, numpy_helper
    flat, stay = numbers.numpy(), 0
    count = lambda e: int(np.prod(e["shape"]))
    where = {_digest(flat[e["offset"]:e["offset"] + count(e)]): e["offset"] for e in reversed(entries.values())}
    for t in model.graph.initializer:
        a = numpy_helper.to_array(t)
        at = where.get(_digest(a)) if a.dtype == np.float32 and a.size >= least else None
        if at is None: stay += a.nbytes; continue
        name, dims = t.name, list(t.dims)
        t.Clear()
        t.name, t.data_type, t.data_location = name, TensorProto.FLOAT, TensorProto.EXTERNAL
        t.dims.extend(dims)
        for k, v in dict(location=WEIGHTS, offset=4 * at, length=a.nbytes).items(): t.external_data.add(key=k, value=str(v))
    for thing in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        thing.ClearField("metadata_props"); thing.ClearField("doc_string")
    model.ClearField("metadata_props")
    return stay

def _digest(a):
    with np.errstate(over="ignore"): return hashlib.sha1(np.ascontiguousarray(a, np.float16).tobytes()).hexdigest()


# %%
#| exports
def _open_sizes(inputs, pairs=0):
    "Dynamic shapes: the first dimension of the inputs, and the rank of the factors."
    batch, rank = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("rank", min=1, max=256)
    sizes = tuple({0: batch} for _ in range(inputs))
    return dict(inputs=(*sizes, [({0: rank}, {1: rank})] * pairs)) if pairs else sizes

def denoiser_graph(base: Base, shapes: dict) -> "onnx.ModelProto":
    "(latents, timesteps, states, factors) -> the denoiser's answer."
    c, h = base.denoiser.config.in_channels, base.denoiser.config.sample_size
    prefix, width = f"{base.denoiser_name}.", base.denoiser.config.cross_attention_dim
    inputs = torch.randn(2, c, h, h), torch.tensor([500, 500]), torch.randn(2, 77, width), factors_for(shapes)
    net = Branched(base.denoiser, [n.removeprefix(prefix) for n in shapes], _answer)
    return to_onnx(net, inputs, ["latents", "timesteps", "states", *_factor_names(shapes)], ["answer"], _open_sizes(3, pairs=len(shapes)))

def _answer(network, latents, timesteps, states): return network(latents, timesteps, states, return_dict=False)[0]

def _factor_names(shapes): return [f"{n}.{x}" for n in shapes for x in ("down", "up")]


# %% [markdown]
# The text encoder begins with a table of token vectors. A LoRA may bring vectors of its own, so the page looks them up, and the
# graph starts behind the table.

# %%
#| exports
def text_graph(base: Base, shapes: dict) -> "onnx.ModelProto":
    "(token vectors, factors) -> the text encoder's last hidden states."
    net, width = base.pipe.text_encoder, base.pipe.text_encoder.config.hidden_size
    module = Branched(net, [n.removeprefix("text_encoder.") for n in shapes], _encode)
    return to_onnx(module, (torch.randn(2, 77, width), factors_for(shapes)), ["embeds", *_factor_names(shapes)], ["states"],
                   _open_sizes(1, pairs=len(shapes)))

def _encode(network, embeds):
    "Hidden states of token vectors: the table is bypassed."
    table = network.get_input_embeddings()
    table.forward = lambda ids: embeds
    try: return network(torch.zeros(embeds.shape[:2], dtype=torch.long), return_dict=False)[0]
    finally: del table.forward


# %%
#| exports
class Autoencoder(torch.nn.Module):
    "One direction of a VAE, as a module that can be exported."
    def __init__(self, vae: torch.nn.Module, encode: bool): super().__init__(); self.vae, self.encode = vae, encode
    def forward(self, x):
        "Latents of pictures (their mean), or pictures of latents; neither scaled nor shifted."
        return self.vae.encode(x).latent_dist.mean if self.encode else self.vae.decode(x, return_dict=False)[0]

def decoder_graph(base: Base) -> "onnx.ModelProto":
    "latents -> pixels in -1..1"
    z = torch.randn(2, base.vae.config.latent_channels, *[base.denoiser.config.sample_size] * 2)
    return to_onnx(Autoencoder(base.vae, False), (z,), ["latents"], ["pixels"], _open_sizes(1))

def encoder_graph(base: Base) -> "onnx.ModelProto":
    "pixels in -1..1 -> latents"
    return to_onnx(Autoencoder(base.vae, True), (torch.rand(2, 3, *[base.resolution] * 2) * 2 - 1,), ["pixels"], ["latents"], _open_sizes(1))


# %% [markdown]
# onnxruntime runs the graphs natively, too. We compare each with torch, before any browser is involved.

# %% [markdown]
# The page also measures what it has learned, with the encoder of [similarity](32_similarity.ipynb): a picture becomes a vector of length
# one.

# %%
#| exports
class Describes(torch.nn.Module):
    "The picture encoder with all that happens before and after it, as a module that can be exported."
    def __init__(self, encoder: Dino): super().__init__(); self.model, self.encoder = encoder.model, encoder
    def forward(self, x):
        "Vectors of pictures in -1..1."
        e = self.encoder
        return F.normalize(e.encode(((x + 1) / 2 - e.mean) / e.std), dim=-1)

def describer_graph(describer: Describes) -> "onnx.ModelProto":
    "pixels in -1..1 -> a vector of length one"
    return to_onnx(describer, (torch.rand(2, 3, *[describer.encoder.size] * 2) * 2 - 1,), ["pixels"], ["description"], _open_sizes(1))


# %%
#| exports
def run_graph(
    model: "onnx.ModelProto | Path",  # or its file, in gzip
    numbers: torch.Tensor,            # the shared array
    **inputs: torch.Tensor,
) -> list[np.ndarray]:
    "Outputs of a graph, by onnxruntime on the CPU."
    import onnxruntime as ort
    with tempfile.TemporaryDirectory() as d:
        numbers.float().numpy().tofile(f"{d}/{WEIGHTS}")
        Path(d, "graph.onnx").write_bytes(gzip.decompress(model.read_bytes()) if isinstance(model, Path) else model.SerializeToString())
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        session = ort.InferenceSession(f"{d}/graph.onnx", options, providers=["CPUExecutionProvider"])
        return session.run(None, {k: v.detach().numpy() for k, v in inputs.items()})


# %%
graph = denoiser_graph(base, shapes)
stay = share_weights(graph, numbers, entries)
f"{len(graph.graph.node):,} operators, {human(len(graph.SerializeToString()))}, of which {human(stay)} are constants"

# %%
pairs = factors_for(shapes, rank=3)
with torch.no_grad(): expected = Branched(base.denoiser, paths, answer)(z, t, states, pairs)
named = dict(zip([f"{n}.{x}" for n in shapes for x in ("down", "up")], [x for pair in pairs for x in pair]))
found, = run_graph(graph, numbers, latents=z, timesteps=t, states=states, **named)
test_close(found, expected.numpy(), 1e-5)
abs(found - expected.numpy()).max()


# %% [markdown]
# ## A training step as one graph
#
# A browser has no autograd. But a training step is a function like any other: factors, Adam's two moments and a batch go in, new
# factors and moments come out. `make_fx` runs it once and writes down every operation, those of the backward pass included. All
# factors are one long vector $\theta$; `factor_layout` says which stretch belongs to which layer.

# %%
#| exports
def factor_layout(
    network: torch.nn.Module,
    paths: Sequence[str],   # of linear layers
    rank: int,
) -> list[dict]:            # dict(path, down, up, end, inner, outer): `down` is theta[down:up], `up` is theta[up:end]
    "Where each layer's factors are in the vector of all."
    rows, at = [], 0
    for p in paths:
        outer, inner = network.get_submodule(p).weight.shape
        rows.append(dict(path=p, down=at, up=at + rank * inner, end=at + rank * (inner + outer), inner=inner, outer=outer))
        at = rows[-1]["end"]
    return rows


# %% [markdown]
# The loss is what [Training](48_training.ipynb) uses, with a weight for each sample, so that pictures of the class can count less.
# The gradient is clipped to norm 1.

# %%
#| exports
STEP_INPUTS = ["theta", "m", "v", "k", "lr", "latents", "noise", "timesteps", "states", "signal", "sigma", "weight"]

def training_step(
    base: Base,
    layout: list[dict],   # as `factor_layout` gives it
    rank: int,
):                        # f(theta, m, v, k, lr, latents, noise, timesteps, states, signal, sigma, weight) -> theta, m, v, loss
    "One step of Adam on the factors; `k` counts steps from 1, `signal` and `sigma` are what `base.mix` gives."
    epsilon, net = base.prediction == "epsilon", base.denoiser
    def step(theta, m, v, k, lr, latents, noise, timesteps, states, signal, sigma, weight):
        parts = [theta[i:j].detach().requires_grad_(True) for r in layout for i, j in ((r["down"], r["up"]), (r["up"], r["end"]))]
        pairs = [(a.view(rank, r["inner"]), b.view(r["outer"], rank)) for r, a, b in zip(layout, parts[::2], parts[1::2])]
        a, b = signal.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
        out = Branched(net, [r["path"] for r in layout], _answer)(a * latents + b * noise, timesteps, states, pairs)
        target = noise if epsilon else a * noise - b * latents
        loss = ((out - target).square().mean((1, 2, 3)) * weight).sum()
        g = torch.cat(torch.autograd.grad(loss, parts))      # of each stretch: the gradient of a slice would be as long as theta
        return *_adam(theta.detach(), g, m, v, k, lr), loss.detach()
    return step

def _adam(theta, g, m, v, k, lr):
    "Clip the gradient to norm 1, and take Adam's step."
    g = g * torch.clamp(1 / (g.square().sum().sqrt() + 1e-6), max=1.)
    m, v = .9 * m + .1 * g, .999 * v + .001 * g * g
    first, second = m / (1 - torch.pow(torch.full_like(k, .9), k)), v / (1 - torch.pow(torch.full_like(k, .999), k))
    return theta - lr * first / (second.sqrt() + 1e-8), m, v


# %% [markdown]
# Some operators of the backward pass have no counterpart in ONNX. torch knows how to write them with simpler ones; for a frozen
# convolution we say so ourselves, since only the gradient of its input is needed: a transposed convolution. Attention runs as
# plain products, and enlarging by two as a broadcast.

# %%
#| exports
def _conv_backward(grad, x, w, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, mask):
    "The gradient of a frozen convolution's input."
    if transposed or mask[1] or mask[2]: raise LoraError("only frozen, ordinary convolutions can be part of a training graph")
    size = lambda d: (grad.shape[2 + d] - 1) * stride[d] - 2 * padding[d] + dilation[d] * (w.shape[2 + d] - 1) + 1
    more = [x.shape[2 + d] - size(d) for d in range(2)]
    return torch.ops.aten.convolution(grad, w, None, stride, padding, dilation, True, more, groups), None, None

def _decompositions():
    "Operator -> how to write it with simpler ones."
    from torch._decomp import get_decompositions
    a = torch.ops.aten
    known = [a.native_group_norm, a.native_group_norm_backward, a.native_layer_norm, a.native_layer_norm_backward, a.silu, a.silu_backward,
             a.gelu_backward, a._softmax_backward_data, a.select_backward, a.slice_backward, a.embedding_dense_backward, a.addmm,
             a.baddbmm, a.t, a.detach]
    return {**get_decompositions(known), a.convolution_backward.default: _conv_backward}


# %%
#| exports
def _enlarge(self, x, *args, **kwargs):
    "Nearest-neighbour enlarging by two, as a broadcast."
    b, c, h, w = x.shape
    x = x[:, :, :, None, :, None].expand(b, c, h, 2, w, 2).reshape(b, c, 2 * h, 2 * w)
    return self.conv(x) if self.use_conv else x

@contextlib.contextmanager
def traceable(
    network: torch.nn.Module,  # a UNet of diffusers
) -> Iterator[None]:
    "A context in which attention and upsampling are written with operators that a graph can hold."
    from diffusers.models.attention_processor import AttnProcessor
    from diffusers.models.upsampling import Upsample2D
    kept, layers = network.attn_processors, [m for m in network.modules() if isinstance(m, Upsample2D)]
    network.set_attn_processor(AttnProcessor())
    for m in layers: m.forward = types.MethodType(_enlarge, m)
    try: yield
    finally:
        network.set_attn_processor(kept)
        for m in layers: del m.forward


# %%
#| exports
def training_graph(
    base: Base,
    layout: list[dict],
    rank: int,
    batch: int,           # samples in a step; fixed, unlike in the other graphs
) -> "onnx.ModelProto":
    "The training step of `batch` samples as a graph with `STEP_INPUTS`."
    from torch.fx.experimental.proxy_tensor import make_fx
    inputs = example_step(base, layout, rank, batch)
    with traceable(base.denoiser):
        fx = make_fx(training_step(base, layout, rank), decomposition_table=_decompositions(), tracing_mode="real")(*inputs)
    fx.graph.eliminate_dead_code(); fx.recompile()
    return to_onnx(Written(fx), inputs, STEP_INPUTS, ["theta2", "m2", "v2", "loss"])

class Written(torch.nn.Module):
    "A traced function as a module with named inputs."
    def __init__(self, fx): super().__init__(); self.fx = fx
    def forward(self, theta, m, v, k, lr, latents, noise, timesteps, states, signal, sigma, weight):
        return tuple(self.fx(theta, m, v, k, lr, latents, noise, timesteps, states, signal, sigma, weight))

def example_step(base: Base, layout: list[dict], rank: int, batch: int, seed: int = 0) -> tuple:
    "Random inputs of a training step; `down` is random and `up` is zero, as at the start."
    g = torch.Generator().manual_seed(seed)
    n, c = layout[-1]["end"], base.denoiser.config
    theta = torch.zeros(n)
    for r in layout: theta[r["down"]:r["up"]] = torch.randn(r["up"] - r["down"], generator=g) / rank
    t = torch.randint(0, base.max_timestep, (batch,), generator=g)
    z, noise = torch.randn(2, batch, c.in_channels, c.sample_size, c.sample_size, generator=g)
    a, b = (x.flatten() for x in base.mix(t))
    return (theta, torch.zeros(n), torch.zeros(n), torch.tensor([1.]), torch.tensor([2e-3]), z, noise, t,
            torch.randn(batch, 77, c.cross_attention_dim, generator=g), a, b, torch.full((batch,), 1 / batch))


# %% [markdown]
# Ten steps of the graph against ten of torch, each continuing from its own result:

# %%
attention = list(find_targets(base.denoiser, "attention", "unet"))
layout = factor_layout(base.denoiser, attention, rank=2)
inputs = example_step(base, layout, 2, batch=2)
graph = training_graph(base, layout, 2, batch=2); share_weights(graph, numbers, entries)
f"{len(attention)} layers, {layout[-1]['end']:,} numbers, {len(graph.graph.node):,} operators"

# %%
step, ours, theirs, losses = training_step(base, layout, 2), list(inputs), list(inputs), []
for k in range(1, 11):
    ours[3] = theirs[3] = torch.tensor([float(k)])
    *state, loss = run_graph(graph, numbers, **dict(zip(STEP_INPUTS, ours)))
    ours[:3] = map(torch.from_numpy, state)
    *theirs[:3], reference = step(*theirs)
    losses.append((float(loss), float(reference)))
assert max(abs(a - b) for a, b in losses) < 1e-5 and losses[-1] < losses[0]
test_close(ours[0], theirs[0], 1e-4)
losses[0], losses[-1]

# %% [markdown]
# ## The page's files
#
# `export_live` writes a folder that a static server can offer: the shared weights, the graphs, the LoRAs as they are, and a manifest
# that says what is where. The sampler's timesteps and noise levels come from diffusers' own scheduler, for every number of steps
# that the page offers.

# %%
#| exports
MOST_STEPS = 50

def manifest(
    base: Base,
    entries: dict[str, dict],            # as `pack_weights` gives them
    graphs: dict[str, dict],             # "denoiser", "text_encoder" -> factor shapes
) -> dict[str, Any]:
    "What the page must know about a base, as JSON."
    from diffusers import DDIMScheduler
    config, vae, text = base.pipe.scheduler.config, base.vae, base.pipe.text_encoder
    sampler = DDIMScheduler.from_config(config)
    def times(n): sampler.set_timesteps(n); return sampler.timesteps.tolist()
    table = text.get_input_embeddings().weight
    return dict(
        version=1, base=base.name, entries=entries,
        table=next(f"text_encoder.{n}" for n, p in text.named_parameters() if p is table),
        text=dict(width=text.config.hidden_size, length=base.pipe.tokenizer.model_max_length),
        tokenizer=json.loads(base.pipe.tokenizer.backend_tokenizer.to_str()),
        graphs={k: dict(paths=list(s), shapes=s) for k, s in graphs.items()},
        latents=dict(shape=[vae.config.latent_channels, *[base.denoiser.config.sample_size] * 2], size=base.resolution,
                     scale=vae.config.scaling_factor, shift=getattr(vae.config, "shift_factor", None) or 0),
        schedule=dict(alphas=sampler.alphas_cumprod.tolist(), last=float(sampler.final_alpha_cumprod), prediction=base.prediction,
                      trained=base.max_timestep, timesteps=[times(n) for n in range(1, MOST_STEPS + 1)]),
        sampling=base.sampling)


# %%
small = manifest(base, entries, dict(denoiser=shapes))
test_eq(small["schedule"]["timesteps"][24], (base.pipe.scheduler.set_timesteps(25), base.pipe.scheduler.timesteps.tolist())[1])
human(len(json.dumps(small)))

# %%
#| exports
PAGE = Path(__file__).parent / "page" if "__file__" in globals() else Path(__import__("lora_nb").__file__).parent / "live/page"
RUNTIME = "onnxruntime-web@1.30.0"                       # from npm, so that the page loads nothing from elsewhere
PROCESSOR_FILES = "ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"
GRAPHICS_FILES = "ort.jspi.min.mjs", "ort-wasm-simd-threaded.jspi.mjs", "ort-wasm-simd-threaded.jspi.wasm"    # knows WebGPU, too

def fetch_runtime(
    out: str | Path,   # folder
) -> Path:
    "Both builds of the runtime by npm, their .wasm in gzip; files that are there are kept."
    out = Path(out)
    if all((out / _shipped(f)).exists() for f in (*PROCESSOR_FILES, *GRAPHICS_FILES)): return out
    if not shutil.which("npm"): raise LoraError(f"The page's runtime, {RUNTIME}, comes from npm, which is not installed here.")
    with tempfile.TemporaryDirectory() as d:
        got = subprocess.run(["npm", "pack", "--silent", RUNTIME], cwd=d, capture_output=True, text=True)
        if got.returncode: raise LoraError(f"npm could not fetch {RUNTIME}: {got.stderr.strip()[-300:]}")
        with tarfile.open(next(Path(d).glob("*.tgz"))) as t: t.extractall(d, filter="data")
        out.mkdir(parents=True, exist_ok=True)
        for f in (*PROCESSOR_FILES, *GRAPHICS_FILES):
            data = Path(d, "package/dist", f).read_bytes()
            (out / _shipped(f)).write_bytes(gzip.compress(data, 9, mtime=0) if f.endswith(".wasm") else data)
    return out

def _shipped(name): return f"{name}.gzip" if name.endswith((".wasm", ".onnx")) else name      # a server that knows .gz could unpack it


# %%
#| exports
def export_live(
    base: Base,                          # of Stable Diffusion 1.x's family, on the CPU
    out: str | Path,                     # folder; made anew
    loras: dict[str, str | Path] | None = None,   # name -> .safetensors file in PEFT's names
    examples: dict[str, tuple[str | Path, str]] | None = None,   # name -> folder of pictures to learn from, class noun
    training: tuple[int, ...] = (4, 6),  # batch sizes of training graphs; () for a page that only draws
    rank: int = 8,                       # of a LoRA that the page trains
    runtime: str | Path | None = None,   # folder with onnxruntime-web; None: fetched by npm
) -> Path:
    "Write the page and its files; nothing is left half-written."
    if base.family != "sd" or base.inpainting:
        raise LoraError(f"The page draws with bases like Stable Diffusion 1.x; {base.name} is {base.family}.")
    if Path(out).is_dir() and any(Path(out).iterdir()) and not (Path(out) / "model/manifest.json").exists():
        raise LoraError(f"{out} holds something else than a page: nothing was written. Choose another folder, or empty that one.")
    with atomic_path(out) as tmp:
        tmp = Path(tmp)
        shutil.copytree(PAGE, tmp)
        if runtime is None: fetch_runtime(tmp / "ort")
        else: shutil.copytree(runtime, tmp / "ort")
        sizes = _write_model(base, tmp / "model", training, rank)
        (tmp / "loras").mkdir()
        for name, path in (loras or {}).items(): shutil.copy(path, tmp / "loras" / f"{name}.safetensors")
        cards = [_card(base, n, tmp / "loras" / f"{n}.safetensors") for n in loras or {}]
        taught = {n: _example(Path(folder), noun, tmp / "examples" / n) for n, (folder, noun) in (examples or {}).items()}
        runtimes = dict(processor=PROCESSOR_FILES, graphics=GRAPHICS_FILES)
        size = lambda f: p.stat().st_size if (p := tmp / "ort" / _shipped(f)).exists() else 0
        sizes["runtime"] = {k: sum(map(size, files)) for k, files in runtimes.items()}
        (tmp / "page.json").write_text(json.dumps(dict(loras=cards, examples=taught, bytes=sizes)))
    return Path(out)

def _card(base, name, path):
    "What the page shows about a LoRA before it is loaded."
    lora = Lora.load(path)
    odd = [n for n in lora.layers if n.partition(".")[0] not in (base.denoiser_name, "text_encoder")]
    if odd: raise LoraError(f"{name}: the page's base, {base.name}, has no layers such as {odd[0]}. Leave this LoRA out.")
    keep = {k: lora.metadata[k] for k in ("trigger", "kind", "concept") if k in lora.metadata}
    turbo = json.loads(lora.metadata["turbo"]) if "turbo" in lora.metadata else None
    return dict(name=name, bytes=path.stat().st_size, turbo=turbo, **keep)

def _example(folder, noun, out, most=5):
    "Copy some pictures of a subject; their captions, in which {trigger} stands for the word to learn."
    out.mkdir(parents=True)
    pictures = find_pictures(folder)[:most]
    for p in pictures: shutil.copy(p, out / p.name)
    said = {p.name: c.read_text(encoding="utf-8").strip() if (c := p.with_suffix(".txt")).exists() else None for p in pictures}
    return dict(noun=noun, pictures=list(said.items()))


# %%
#| exports
LEARNS = "feed-forward"      # what the page trains: attention and feed-forward, all of them linear

def _write_model(base, out, training, rank):
    "Weights, graphs and manifest; bytes that drawing and learning fetch."
    out.mkdir()
    encoder = Dino()
    extra = dict(describer=Describes(encoder)) if encoder.size == base.resolution else {}
    numbers, entries = pack_weights(base, **extra)
    nets = dict(denoiser=(base.denoiser, base.denoiser_name, "extended"), text_encoder=(base.pipe.text_encoder, "text_encoder", "attention"))
    shapes = {k: factor_shapes(net, list(find_targets(net, targets, c)), c) for k, (net, c, targets) in nets.items()}
    layout = factor_layout(base.denoiser, list(find_targets(base.denoiser, LEARNS, base.denoiser_name)), rank)
    draw = dict(denoiser=lambda: denoiser_graph(base, shapes["denoiser"]), text_encoder=lambda: text_graph(base, shapes["text_encoder"]),
                decoder=lambda: decoder_graph(base))
    learn = dict(encoder=lambda: encoder_graph(base), **{k: functools.partial(describer_graph, d) for k, d in extra.items()},
                 **{f"train{n}": functools.partial(training_graph, base, layout, rank, n) for n in training}) if training else {}
    first = learning_offset(entries)
    parts = dict(draw=numbers[:first], learn=numbers[first:]) if training else dict(draw=numbers[:first])
    for part, x in parts.items(): (out / f"{part}.gzip").write_bytes(squeeze(x))
    _write_graphs({**draw, **learn}, out, numbers, entries)
    files = {k: {f: (out / f).stat().st_size for f in (f"{k}.gzip", *(f"{n}.onnx.gzip" for n in jobs))}
             for k, jobs in dict(draw=draw, learn=learn).items() if k in parts}
    what = manifest(base, entries, shapes) | dict(weights=dict(total=len(numbers), draw=0, learn=first), files=files,
        describer=bool(extra and training), training=dict(rank=rank, batches=list(training), layout=layout, component=base.denoiser_name))
    (out / "manifest.json").write_text(json.dumps(what))
    sizes = {k: sum(f.values()) for k, f in files.items()}
    return {**sizes, "draw": sizes["draw"] + (out / "manifest.json").stat().st_size}

def _write_graphs(jobs, out, numbers, entries):
    "Export each graph, let it share the weights, and compress it."
    bar = progress(jobs.items(), desc="graphs")
    for name, make in bar:
        bar.set_postfix_str(name)
        share_weights(model := make(), numbers, entries)
        (out / f"{name}.onnx.gzip").write_bytes(gzip.compress(model.SerializeToString(), 9, mtime=0))


# %% [markdown]
# The whole folder for the random base; the embedded one takes a few minutes (`make live`). The runtime, which npm would fetch, is
# left out here. `draw.gzip` and three graphs are fetched when a reader presses *Load*, the others when the second tab is opened.

# %%
box = tempfile.TemporaryDirectory()
nothing = Path(box.name, "runtime"); nothing.mkdir()
out = export_live(base, Path(box.name, "page"), training=(2,), rank=2, runtime=nothing)
files = {str(p.relative_to(out)): p.stat().st_size for p in sorted(out.rglob("*")) if p.is_file()}
{k: human(v) for k, v in files.items() if k.startswith("model")}

# %% [markdown]
# The text encoder, both directions of the VAE and the encoder that measures, read from these files and compared with torch:

# %%
text_shapes = factor_shapes(base.pipe.text_encoder, list(find_targets(base.pipe.text_encoder, "attention", "text_encoder")), "text_encoder")
ids = base.pipe.tokenizer("a cat", padding="max_length", return_tensors="pt").input_ids
numbers = torch.cat([unsqueeze((out / f"model/{part}.gzip").read_bytes()) for part in ("draw", "learn")])
none = dict(zip(_factor_names(text_shapes), [x for pair in factors_for(text_shapes, Lora({})) for x in pair]))
found, = run_graph(out / "model/text_encoder.onnx.gzip", numbers, embeds=base.pipe.text_encoder.get_input_embeddings()(ids), **none)
test_close(found, base.encode_prompts(["a cat"])["prompt_embeds"].detach().numpy(), 1e-5)

# %%
pixels = torch.rand(1, 3, 64, 64) * 2 - 1
decoded, = run_graph(out / "model/decoder.onnx.gzip", numbers, latents=z)
encoded, = run_graph(out / "model/encoder.onnx.gzip", numbers, pixels=pixels)
test_close(decoded, Autoencoder(base.vae, False)(z).detach().numpy(), 1e-4)
test_close(encoded, Autoencoder(base.vae, True)(pixels).detach().numpy(), 1e-4)
described, = run_graph(out / "model/describer.onnx.gzip", numbers, pixels=pixels)
test_close(described, Dino().images(pixels).numpy(), 1e-3)      # the page's weights have half precision

# %%
test_fail(lambda: export_live(as_base(random_pipe("sd3")), "page"), contains="is sd3")
test_fail(lambda: export_live(base, box.name, runtime=nothing), contains="something else than a page")
assert {"model/draw.gzip", "model/learn.gzip", "model/manifest.json", "index.html", "engine.js", "page.json"} <= set(files)
box.cleanup()


# %% [markdown]
# ## Serving it
#
# A browser refuses to start a worker from a file, so the page needs a server, if only Python's own. Two headers allow it to use
# threads.

# %%
#| exports
class _Files(http.server.SimpleHTTPRequestHandler):
    "Files with the headers that let a page use threads, and with JavaScript's type on every machine."
    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".js": "text/javascript", ".mjs": "text/javascript",
                      ".wasm": "application/wasm"}
    def end_headers(self):
        self.send_header("Cross-Origin-Opener-Policy", "same-origin"); self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()
    def log_message(self, *args): pass

def serve_live(
    folder: str | Path,          # as `export_live` wrote it
    port: int = 0,               # 0: a free one
) -> http.server.ThreadingHTTPServer:  # its address is `server.server_address`; `server.shutdown()` ends it
    "Serve the page on this machine only, in a thread."
    if not (Path(folder) / "index.html").exists(): raise LoraError(f"{folder} holds no page: expected a folder that `export_live` wrote.")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), functools.partial(_Files, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


# %%
import urllib.request
with tempfile.TemporaryDirectory() as d:
    Path(d, "index.html").write_text("hello"); Path(d, "a.mjs").write_text("")
    server = serve_live(d)
    answer = urllib.request.urlopen(f"http://127.0.0.1:{server.server_address[1]}/a.mjs")
    test_eq((answer.headers["Content-Type"], answer.headers["Cross-Origin-Opener-Policy"]), ("text/javascript", "same-origin"))
    server.shutdown()
test_fail(lambda: serve_live("/no/such/folder"), contains="holds no page")


# %% [markdown]
# `show_live` puts the page into a notebook. On Colab the notebook's machine is not yours, so Colab's own proxy hands the page on.

# %%
#| exports
def show_live(
    folder: str | Path,   # as `export_live` wrote it
    height: int = 900,    # pixels
):                        # something that a notebook displays
    "The page in a notebook, served from its files."
    port = serve_live(folder).server_address[1]
    if "google.colab" in sys.modules: return sys.modules["google.colab"].output.serve_kernel_port_as_iframe(port, height=str(height))
    from IPython.display import IFrame
    return IFrame(f"http://127.0.0.1:{port}/index.html", "100%", height)


# %%
with tempfile.TemporaryDirectory() as d:
    Path(d, "index.html").write_text("hello")
    assert show_live(d, 400).src.startswith("http://127.0.0.1:")


# %% [markdown]
# ## The command
#
# `lora_live export` writes the page for an embedded base with the bundled LoRAs, `lora_live serve` offers it to a browser on this
# machine.

# %%
#| exports
def live_parser():
    "The arguments of `lora_live`."
    import argparse
    p = argparse.ArgumentParser("lora_live", description="The page that draws in a browser.")
    sub = p.add_subparsers(dest="command", required=True, metavar="export|serve")
    e = sub.add_parser("export", help="write the page's files", description="Write the page's files.")
    e.add_argument("--pretrained_model_name_or_path", default="tiny-sd", metavar="BASE", help="a base of Stable Diffusion 1.x's family")
    e.add_argument("--lora", action="append", default=[], metavar="FILE", help="a LoRA in PEFT's names; default: the bundled ones")
    e.add_argument("--no_training", action="store_true", help="leave out the graphs that learn")
    e.add_argument("--output_dir", default="out/live", help="folder (default: %(default)s)")
    s = sub.add_parser("serve", help="serve it on this machine", description="Serve the page on this machine.")
    s.add_argument("--folder", default="out/live", help="default: %(default)s"); s.add_argument("--port", type=int, default=8000)
    return p


# %%
#| exports
def lora_live(argv=None):
    "Export or serve the page that draws in a browser."
    a = live_parser().parse_args(argv)
    try:
        if a.command == "serve": return _serve_forever(a.folder, a.port)
        base = load_base(a.pretrained_model_name_or_path, device="cpu", dtype=torch.float32)
        own = {p.stem: p for p in map(Path, a.lora)}
        if not own: own = {p.stem: p for p in sorted(data_path("loras").glob("*.safetensors")) if Lora.load(p).metadata.get("base") == base.name}
        from lora_nb.zoo.world import find_material, material
        subjects = {n: (p, find_material(n)[2]) for n, p in material("subjects").items()}
        out = export_live(base, a.output_dir, own, subjects, training=() if a.no_training else (4, 6))
    except LoraError as e: raise SystemExit(f"lora_live: {e}") from None
    total = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    print(f"{out}: {human(total)}. Look at it: lora_live serve --folder {out}")

def _serve_forever(folder, port):
    "Serve until Ctrl-C."
    server = serve_live(folder, port)
    print(f"http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt): threading.Event().wait()
    server.shutdown()


# %%
test_eq(live_parser().parse_args(["export"]).output_dir, "out/live")
test_fail(lambda: lora_live(["serve", "--folder", "/no/such"]), exc=SystemExit)

# %% [markdown]
# On tiny-sd, onnxruntime gives what torch gives within 5e-6 in every graph. In Chromium, with one thread of WebAssembly, its pictures
# differ from Python's by at most 1 of 255 in any channel: the base, the four bundled LoRAs at strength 0.8 with their words, and the
# turbo LoRA, each from the same prompt and seed (measured once, 25 and 4 steps). `tests/test_live.py` repeats the comparison on a random
# base, with ten steps of training. A file that the page trained draws the same picture in the page, in lora_nb and in plain diffusers.
#
# **Teach it your own**, the page's second tab, was measured by `tools/live.py`: it presses the page's buttons in Chromium for five subjects
# that the base has never seen, 100 steps of four pictures and two of the class, and the judge looks at eight unseen prompts of each
# (`nbs/results/live.json`). It found the subject in 8 of 8 for the teapot, the robot, the teddy bear and the octopus, and in 5 of 8 for the
# jack-o'-lantern; every background was as asked, and the class kept 0.62 to 0.88 of its other things. Two things decided: captions
# that name the background in different wordings (with the background left out of some captions, the robot fell from 8 of 8 to 0), and that
# feed-forward layers learn, too. On two cores that also did other work, training took 32 to 61 s. **Not run:** WebGPU, Firefox, Safari, an idle
# machine of one core.
#
# ## What we built
#
# - `pack_weights` and `share_weights`: one copy of the weights for every graph.
# - `denoiser_graph`, `text_graph`, `decoder_graph`, `encoder_graph`: graphs in which a LoRA is an input, and `training_graph`, in which a
#   whole training step is one.
# - `describer_graph`: the encoder that measures what was learned, in the page.
# - `export_live`, `serve_live`, `show_live` and the command `lora_live`: the page, from a base and its LoRAs.
#
# Next: [the flags of the commands](64_cli_flags.ipynb).
#
# ## Exercises
#
# 1. How much slower is a graph with branches of rank 8 than one without? Measure it with `run_graph`, and estimate it from the
#    shapes first.
# 2. Add DoRA's magnitude to `_with_branch`. Which weights would then have to be inputs?
