"""What the kernel benchmark measures: one row a case and length."""

from collections.abc import Callable
from typing import Any, NamedTuple

TOKENS = 32768
"""Tokens of a call, over all rows of a batch; a length above it has one row."""


class Case(NamedTuple):
    """One thing to time. Shapes are Llama-3-8B's attention (H = 32, G = 8, K = V = 128, F = 128), bf16, one layer."""

    group: str
    name: str
    make: Callable[[int, int], Callable[[], Any]]
    """``make(batch, length)`` builds inputs on the GPU and returns the call to time."""
    check: Callable[[], None] | None = None
    """Raises where the kernel differs from its reference at a small size; a red check leaves the case unmeasured."""
    target_ms: float | None = None
    """What it should take at 32K tokens."""
    lengths: tuple[int, ...] = (2048, 8192, 32768, 131072)
    peer: bool = False
    """Somebody else's attention, or a composition of it."""
    batch: int | None = None
    """Rows of a decode step; None fills TOKENS."""
