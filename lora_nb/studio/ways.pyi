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
from .samplers import ENLARGE, samplers
from .settings import Settings
from lora_nb.bases import Base

__all__ = ['AxisFields', 'Ways', 'input_file', 'Redraw']
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
    enlarge: Any
    across: Any
    down: Any
    grid: Any
    panel: Any
    def __init__(self, base: 'Base', changed: Callable[[], object]) -> None: ...
    def suit(self, base: 'Base'): ...
    def offer(self, names: Iterable[str]): ...
    @property
    def axes(self) -> tuple[Axis, ...]: ...
    def show(self, s: Settings): ...

def input_file(folder: Path, image: Image.Image) -> Path: ...
class Redraw:
    folder: Path
    say: Callable
    changed: Callable[[], object]
    image: str
    mask: str
    strength: Any
    drop: Any
    paint: Any
    masks: Any
    off: Any
    note: Any
    more: Any
    panel: Any
    def __init__(self, folder: Path, say: Callable, changed: Callable[[], object]) -> None: ...
    def use(self, image: Image.Image | str | Path | None, mask: Image.Image | str | Path | None=None): ...
    def _shown(self, fresh=False): ...
    def check(self, s: Settings): ...
    def show(self, s: Settings): ...
    def _try(self, f): ...
    def take_picture(self, message: dict): ...
    def take_paint(self, message: dict): ...
    def take_mask(self, message: dict): ...
