# Written by tools/stubs.py from the exported modules (make export): do not edit.
from typing import Any, Iterator
import bisect, re, warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
import torch
from .core import LoraError, patch_to
from .families import spelled
from diffusers import DiffusionPipeline
from lora_nb.bases import Base

__all__ = ['PromptLora', 'Prompt', 'parse_prompt', 'token_weights', 'weighing', 'cut_off']
class PromptLora(NamedTuple):
    name: str
    schedule: str = ...

@dataclass(frozen=True)
class Prompt:
    pieces: tuple[tuple[str, float], ...]
    loras: tuple[PromptLora, ...] = ...
    @property
    def text(self) -> str: ...
    @property
    def weighted(self) -> bool: ...
    def __str__(self): ...

def parse_prompt(text: 'str | Prompt') -> Prompt: ...
def token_weights(tokenizer: Any, prompt: Prompt, length: int) -> list[float]: ...
class _Weigher:
    tokenizer: Any
    prompts: Any
    used: set[str]
    rows: dict[int, list[tuple[list[int], list[float], str]]]
    busy: bool
    def __init__(self, tokenizer, prompts) -> None: ...
    def ids(self, text: str, length: int) -> list[int]: ...
    def row_weights(self, ids: torch.Tensor) -> list[list[float] | None]: ...
    def __call__(self, encoder, args, kwargs, out): ...

@contextmanager
def weighing(pipe: 'DiffusionPipeline | Base', prompts: 'str | Prompt | Sequence[str | Prompt]') -> Iterator[Any]: ...
def cut_off(pipe: 'DiffusionPipeline | Base', prompt: str | Prompt) -> dict[str, str]: ...
