# Written by tools/stubs.py from the exported modules (make export): do not edit.
from typing import Any, Iterator
import base64, html, io, json, os
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from PIL import Image
from ..core import DataError, LoraError, atomic_path, file_name, free_name, human, patch_to
from .panel import boxed

__all__ = ['NOTEBOOK_BYTES', 'PAGE_BYTES', 'DROP_KINDS', 'page_script', 'Bridge', 'drop_html', 'received', 'canvas_html', 'painted']
def page_script() -> str: ...
class Bridge:
    got: Callable[[dict], object]
    quiet: bool
    face: Any
    wire: Any
    panel: Any
    def __init__(self, got: Callable[[dict], object]) -> None: ...
    def receive(self, text: str): ...

NOTEBOOK_BYTES: Any
PAGE_BYTES: Any
DROP_KINDS: dict[Any, Any]
def drop_html(text: str, kinds: tuple[str, ...]=..., many: bool=True) -> str: ...
def received(message: dict, folder: Path) -> list[Path]: ...
def canvas_html(image: Image.Image, alt: str='the picture to draw over') -> str: ...
def painted(url: str, size: tuple[int, int]) -> Image.Image | None: ...
