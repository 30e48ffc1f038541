# Written by tools/stubs.py from the exported modules (make export): do not edit.
from typing import Any, Iterator
import hashlib, html
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING
from PIL import Image
from ..core import DataError, LoraError, atomic_path, patch_to
from .bridge import Bridge, canvas_html, drop_html, painted, received
from .easel import picture_of
from .grid import AXES, Axis, read_axis
from .panel import boxed, button, labelled
from .canvas import FILLS, outpainted
from .samplers import ENLARGE, clip_layers, samplers
from .styles import Style, read_styles, save_style, styled
from .settings import Settings
from lora_nb.bases import Base

__all__ = ['MODES', 'AxisFields', 'Ways', 'StyleFields', 'input_file', 'Redraw']
class AxisFields:
    what: Any
    values: Any
    of: Any
    panel: Any
    def __init__(self, label: str, what: str='') -> None: ...
    def hint(self): ...
    @property
    def axis(self) -> Axis | None: ...
    def show(self, axis: Axis | None): ...

class Ways:
    sampler: Any
    count: Any
    clip: Any
    subseed: Any
    subshare: Any
    enlarge: Any
    by: Any
    again: Any
    more: Any
    across: Any
    down: Any
    grid: Any
    panel: Any
    hires: Any
    def __init__(self, base: 'Base', changed: Callable[[], object]) -> None: ...
    def suit(self, base: 'Base'): ...
    def _folded(self): ...
    def offer(self, names: Iterable[str]): ...
    @property
    def axes(self) -> tuple[Axis, ...]: ...
    @property
    def told(self) -> dict[str, object]: ...
    def show(self, s: Settings): ...

class StyleFields:
    file: Path
    prompt: Callable[[], tuple[str, str]]
    say: Callable
    style: Any
    name: Any
    keep: Any
    panel: Any
    known: dict[str, Style]
    def __init__(self, file: Path, prompt: Callable[[], tuple[str, str]], say: Callable, changed: Callable[[], object]) -> None: ...
    def refresh(self): ...
    def applied(self, prompt: str, negative: str) -> tuple[str, str]: ...
    def save(self): ...

def input_file(folder: Path, image: Image.Image) -> Path: ...
MODES: dict[Any, Any]
class Redraw:
    folder: Path
    say: Callable
    changed: Callable[[], object]
    image: str
    mask: str
    mode: Any
    strength: Any
    add: Any
    sides: list[Any]
    fill: Any
    batch: Any
    extend: Any
    each: Any
    drop: Any
    paint: Any
    masks: Any
    off: Any
    note: Any
    step: int
    grown: Any
    canvas: Any
    folders: Any
    masked: Any
    more: Any
    body: Any
    panel: Any
    def __init__(self, folder: Path, say: Callable, changed: Callable[[], object]) -> None: ...
    def use(self, image: Image.Image | str | Path | None, mask: Image.Image | str | Path | None=None): ...
    def _fitting(self): ...
    def _to(self, mode): ...
    def _switched(self): ...
    @property
    def told(self) -> dict[str, object]: ...
    def grow(self): ...
    def _shown(self, fresh=False): ...
    def check(self, s: Settings): ...
    def show(self, s: Settings): ...
    def _try(self, f): ...
    def take_picture(self, message: dict): ...
    def take_paint(self, message: dict): ...
    def take_mask(self, message: dict): ...
