# Written by tools/stubs.py from the exported modules (make export): do not edit.
from typing import Any, Iterator
import contextlib, itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from ..core import DataError, LoraError, closest, is_there, patch_to
from ..composition import compose
from ..lora import Lora
from ..pictures import open_picture
from ..prompts import Prompt, parse_prompt, weighing
from ..schedule import LoraComposite, LoraSchedule
from ..scheduling import WeightCache, scheduled
from ..show import grid, to_image
from .grid import grid_sheet
from .samplers import clip_skipping, enlarged, sampler
from .noise import variation
from .settings import Settings, Wear
from ..turbo import turbo_scheduler, turbo_settings
from .. import mixing
from ..zoo.world import material
import torch
from PIL import Image
from lora_nb.bases import Base
from lora_nb.scheduling import Scheduled

__all__ = ['LIVE', 'MIXES', 'Easel', 'weights_id', 'sampler_of', 'Glimpse', 'picture_of', 'bundled_files', 'bundled_loras', 'find_lora']
class Easel:
    base: 'Base'
    budget: int
    loras: dict[str, Lora]
    caches: OrderedDict[tuple, WeightCache]
    mixes: OrderedDict[tuple, Lora]
    drawn: OrderedDict[tuple, Image.Image]
    def __init__(self, base: 'Base', budget: int=...) -> None: ...
    def lora(self, wear: Wear) -> Lora: ...
    def plan(self, s: Settings) -> 'dict[Lora, LoraSchedule] | LoraComposite': ...
    def _mixed(self, s): ...
    def _cache(self, plan): ...
    def wearing(self, plan: 'dict[Lora, LoraSchedule] | LoraComposite') -> 'Iterator[Scheduled | None]': ...
    def draw(self, s: Settings, on_step: Callable | None=None) -> 'Image.Image': ...
    def _made(self, s, step, how): ...
    def render(self, s: Settings, on_step: Callable | None=None, on_picture: Callable | None=None) -> 'Image.Image': ...

LIVE: tuple[Any, ...]
MIXES: dict[Any, Any]
def weights_id(model: 'torch.nn.Module') -> int: ...
def sampler_of(base: 'Base', loras: Iterable[Lora], steps: int, name: str='') -> Iterator[dict]: ...
class Glimpse:
    base: 'Base'
    last: tuple | None
    def __init__(self, base: 'Base') -> None: ...
    def __call__(self, i: int, latents: 'torch.Tensor') -> 'Callable[[], Image.Image]': ...
    def _clean(self, z, at, z_next, at_next): ...

def picture_of(file: str | Path) -> 'Image.Image': ...
def bundled_files(base: str) -> dict[str, Path]: ...
def bundled_loras(base: str) -> list[str]: ...
def find_lora(source: Lora | str | Path, base: 'Base') -> tuple[Lora, str]: ...
