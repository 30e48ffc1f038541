# Written by tools/stubs.py from the exported modules (make export): do not edit.
from typing import Any, Iterator
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
import torch
from .bases import Base
from .core import patch_to
from diffusers import DiffusionPipeline

__all__ = ['FlowBase', 'shift_at_size']
class FlowBase(Base):
    denoiser_name: tuple[Any, ...]
    flow: tuple[Any, ...]
    prediction: tuple[Any, ...]
    inpainting: tuple[Any, ...]
    overwrites: tuple[Any, ...]
    shift: Any
    def __init__(self, pipe: 'DiffusionPipeline', name: str='') -> None: ...
    def sigma(self, t: torch.Tensor) -> torch.Tensor: ...
    def mix(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
    def timesteps_at(self, q: torch.Tensor, t_range: tuple[float, float]=...) -> torch.Tensor: ...
    def target(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor: ...
    def clean_and_noise(self, noisy: torch.Tensor, t: torch.Tensor, answer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
    def min_snr(self, t: torch.Tensor, gamma: float, soft: bool=False) -> torch.Tensor: ...
    @contextmanager
    def shifted(self, shift: float | None) -> Iterator[None]: ...

def shift_at_size(tokens: int, scheduler: 'object') -> float: ...
