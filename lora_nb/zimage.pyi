# Written by tools/stubs.py from the exported modules (make export): do not edit.
from typing import Any, Iterator
from collections.abc import Iterable
from typing import Any
import torch
from .bases import SAMPLING, Cond
from .core import patch_to
from .flux import FluxBase

__all__ = ['ZIMAGE_HUB', 'ZImageBase']
ZIMAGE_HUB: dict[Any, Any]
class ZImageBase(FluxBase):
    family: tuple[Any, ...]
    pipeline: tuple[Any, ...]
    network: tuple[Any, ...]
    tokenizer_of_text: tuple[Any, ...]
    @property
    def preset(self) -> str: ...
    @classmethod
    def owns(cls, parts: dict[str, Any]) -> bool: ...
    @classmethod
    def owns_file(cls, keys: set[str]) -> bool: ...
    def encode_prompts(self, prompts: Iterable[str]) -> Cond: ...
    def predict(self, noisy: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor: ...
    def negative_arguments(self, negative: str, n: int, options: dict[str, Any]) -> dict[str, list[str]]: ...
    @classmethod
    def ask_blank(cls, net: torch.nn.Module, noise, batch: int, size: tuple[int, int]) -> torch.Tensor: ...
