# Written by tools/stubs.py from the exported modules (make export): do not edit.
from typing import Any, Iterator
import base64, html, io, json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from PIL import Image, ImageDraw
from ..core import LoraError, atomic_path, patch_to
from ..containers import note_metadata, others, read_header, read_note
from ..lora import triggers_of, Lora
from .bridge import DROP_KINDS
from .easel import bundled_files
from .history import picture_button
from .panel import boxed, button, labelled, note_html

__all__ = ['LoraCard', 'preview_of', 'card_of', 'keep_preview', 'cards_in', 'LoraShelf']
@dataclass(frozen=True)
class LoraCard:
    name: str
    source: str
    trigger: str = ...
    base: str = ...
    picture: Path | None = ...
    inside: str = ...
    def image(self, side: int=152) -> Image.Image: ...

def preview_of(file: Path) -> Path | None: ...
def card_of(file: Path, source: str='') -> LoraCard: ...
def keep_preview(file: str | Path, image: Image.Image) -> Path: ...
def cards_in(base: str, folders: Iterable[str | Path]=..., most: int=200) -> list[LoraCard]: ...
class LoraShelf:
    folders: Callable[[], list[Path]]
    choose: Callable[[str], object]
    base: str
    found: list[Any]
    words: Any
    folder: Any
    cards: Any
    note: Any
    panel: Any
    def __init__(self, folders: Callable[[], list[Path]], choose: Callable[[str], object]) -> None: ...
    def refresh(self, base: str=''): ...
    def show(self): ...
    def _card(self, c): ...
