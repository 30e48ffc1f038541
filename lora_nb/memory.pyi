# Written by tools/stubs.py from the exported modules (make export): do not edit.
from typing import Any, Iterator
import gc, json, weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
import lora_nb.layers as layers
from .core import LoraError, Markup, closest, data_path, escaped, patch_to, quiet
from .core import table as as_table
from .families import FAMILIES, HUB, as_base
from .injection import inject_lora
from .loading import embedded_bases
from .quantize import PACKINGS, packed_layers, packing_parts
from .show import INK, PALETTE, Plot

__all__ = ['SHAPES', 'OPTIMIZERS', 'SIZES', 'USABLE', 'CONTEXT', 'SPLIT', 'meta_part', 'shapes_of', 'LiveBytes', 'Autocast', 'pass_bytes', 'step_bytes', 'usable', 'Memory', 'estimate_memory', 'memory_bars']
SHAPES: dict[Any, Any]
@lru_cache(None)
def meta_part(name: str, component: str) -> torch.nn.Module: ...
def shapes_of(source: Any) -> dict[str, torch.nn.Module]: ...
class LiveBytes(TorchDispatchMode):
    now: int
    peak: int
    known: dict[Any, Any]
    def __init__(self) -> None: ...
    def __torch_dispatch__(self, func, types, args=..., kwargs=None): ...
    def _note(self, storage): ...

class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v): ...
    @staticmethod
    def backward(ctx, g): ...

class Autocast(TorchFunctionMode):
    low: Any
    def __init__(self, low) -> None: ...
    def __torch_function__(self, func, types, args=..., kwargs=None): ...

def pass_bytes(f: Callable[[], torch.Tensor], learn: bool=False, low: torch.dtype | None=None) -> int: ...
def step_bytes(net: torch.nn.Module, batch: int, size: tuple[int, int], factor: int=8, t5_length: int=256, dtype: torch.dtype=..., rank: int=16, targets: Any='attention', checkpointing: bool=False) -> tuple[int, int]: ...
OPTIMIZERS: dict[Any, Any]
SIZES: tuple[Any, ...]
USABLE: float
CONTEXT: Any
SPLIT: Any
def usable(card: float) -> float: ...
@dataclass
class Memory:
    title: str
    phases: dict[str, dict[str, int]]
    peak: Any
    fits: Any
    @property
    def sums(self) -> dict[str, int]: ...
    @property
    def total(self) -> int: ...
    def __repr__(self): ...
    def _repr_markdown_(self): ...

@dataclass
class _Run:
    nets: dict
    main: str
    factor: int
    size: tuple
    dtype: torch.dtype
    t5: Any
    offload: Any
    length: int
    packed: dict = ...
    @property
    def item(self): ...
    @property
    def readers(self): ...
    def weights(self, *working): ...
    def training(self: _Run, batch, rank, targets, optimizer, checkpointing, cached, encode_batch=1, learning=..., ema=False): ...
    def during_steps(self: _Run, cached, learning): ...
    def drawing(self: _Run, asked, batch): ...

def estimate_memory(base: Any, task: Literal['train', 'generate']='train', rank: int=16, targets: Any='attention', batch_size: int=1, resolution: int | tuple[int, int] | None=None, dtype: torch.dtype=..., optimizer: str='adamw', prior_batch: int=0, encode_batch: int=1, learning: Sequence[str]=..., ema: bool=False, gradient_checkpointing: bool=False, t5: bool | Literal['8bit']=True, offload: Literal[False, 'model', 'sequential']=False, cached: bool=True, guidance: bool=True, t5_length: int=256, allowance: bool=True, quantize: str | Mapping[str, str] | None=None) -> Memory: ...
def memory_bars(memories: Mapping[str, Memory], cards: Sequence[float]=...) -> Plot: ...
