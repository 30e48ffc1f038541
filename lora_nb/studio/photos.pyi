# Written by tools/stubs.py from the exported modules (make export): do not edit.
from typing import Any, Iterator
import html, io
from base64 import b64encode
from dataclasses import dataclass, replace
from pathlib import Path
from PIL import Image
from ..core import DataError, atomic_path, is_there, patch_to
from ..captions import own_captions
from ..pictures import find_pictures, open_picture
from .panel import boxed, labelled

__all__ = ['PHOTO_CROPS', 'Photo', 'photos_of', 'photo_square', 'prepared', 'PhotoRows', 'thumb_html']
PHOTO_CROPS: dict[Any, Any]
@dataclass(frozen=True)
class Photo:
    path: Path
    caption: str = ...
    crop: str = ...
    use: bool = ...

def photos_of(folder: Path) -> list[Photo]: ...
def photo_square(image: Image.Image, crop: str='middle') -> Image.Image: ...
def prepared(photos: list[Photo], folder: Path) -> Path: ...
class PhotoRows:
    most: int
    found: list[Any]
    rows: list[Any]
    panel: Any
    def __init__(self, most: int=60) -> None: ...
    def show(self, photos: list[Photo]): ...
    @property
    def photos(self) -> list[Photo]: ...
    @property
    def changed(self) -> bool: ...

def thumb_html(p: Photo) -> str: ...
