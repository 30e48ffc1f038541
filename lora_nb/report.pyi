# Written by tools/stubs.py from the exported modules (make export): do not edit.
from typing import Any, Iterator
from collections.abc import Iterator
from dataclasses import dataclass
import torch
from .core import DataError, Markup, code, escaped, patch_to, printable, table
from .lora import Factors, Lora
from .names import block_of, canonical_name, kind_of
from .products import Change
from .stored import root_module, stack_of, stored_weight
from .worn import Wearer, foreign_adapters, places, resolve_components, worn_state

__all__ = ['Report', 'make_report']
@dataclass
class Report:
    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    misshaped: list[str]
    norms: dict[str, tuple[float, float]]
    advice: list[str]
    @property
    def ok(self) -> bool: ...
    def __repr__(self): ...
    def _repr_markdown_(self): ...

def make_report(lora: Lora, pipe: 'Wearer') -> Report: ...
