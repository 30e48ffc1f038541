# Written by tools/stubs.py from the exported modules (make export): do not edit.
from typing import Any, Iterator
import html, io, re
from base64 import b64encode
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from ..core import DataError, LoraError, atomic_path, free_name, patch_to
from .bridge import Bridge, drop_html, received
from .code import png_bytes, read_settings
from .easel import picture_of
from .panel import boxed, button, labelled, note_html
from .samplers import enlarged
from .settings import Settings
from lora_nb.studio import Studio

__all__ = ['Told', 'read_parameters', 'png_info', 'page_jpeg', 'PngPage', 'enlarge_file', 'Extras']
@dataclass
class Told:
    prompt: str = ...
    negative_prompt: str = ...
    fields: dict[str, object] = ...
    rest: dict[str, str] = ...

def read_parameters(text: str) -> Told: ...
def png_info(file: str | Path, into: Settings | None=None) -> tuple[Settings | None, str, dict[str, str]]: ...
def page_jpeg(image: Image.Image, most: int=420) -> str: ...
class _Tab:
    def say(self, text: object, error: bool=False): ...

class PngPage(_Tab):
    studio: 'Studio'
    file: Any
    found: Any
    drop: Any
    seen: Any
    text: Any
    words: Any
    draw: Any
    over: Any
    panel: Any
    def __init__(self, studio: 'Studio') -> None: ...
    def take(self, message: dict): ...
    def look(self, file: str | Path): ...
    def send(self): ...
    def send_over(self): ...

def enlarge_file(file: Path, out: Path, by: float=2.0) -> Path: ...
class Extras(_Tab):
    studio: 'Studio'
    files: list[Any]
    drop: Any
    by: Any
    words: Any
    seen: Any
    go: Any
    mine: Any
    panel: Any
    def __init__(self, studio: 'Studio') -> None: ...
    def take(self, message: dict): ...
    def send(self): ...
    def chosen(self, files: list[Path]): ...
    def enlarge(self): ...
