# Written by tools/stubs.py from the exported modules (make export): do not edit.
from typing import Any, Iterator
import io, re, time
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from PIL import Image
from ..core import atomic_path, free_name, is_there, patch_to
from .code import png_bytes
from .panel import boxed, button, labelled
from .settings import Settings
import ipywidgets as widgets

__all__ = ['keep_picture', 'days_of', 'pictures_on', 'picture_button', 'History']
def keep_picture(folder: Path, image: Image.Image, s: Settings) -> Path: ...
def days_of(folder: Path) -> list[str]: ...
def pictures_on(folder: Path, day: str) -> list[Path]: ...
def picture_button(image: Image.Image, title: str, action: Callable[[], object]) -> 'widgets.Box': ...
class History:
    folder: Path
    recall: Callable[[Path], object]
    most: int
    day: Any
    thumbs: Any
    note: Any
    panel: Any
    def __init__(self, folder: Path, recall: Callable[[Path], object], most: int=60) -> None: ...
    def refresh(self): ...
    def show(self): ...
