"""What one sequence keeps for its next token: states, constant in most methods, and KV caches, which grow."""

import math
from dataclasses import dataclass
from typing import Any

from ..convert import describe
from ..probe import probe
from .likelihood import TEACHER


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer and sequence: `state`, which each token lets grow by `growth` on average, and `per_token` for
    each of the last `tokens` (None: all)."""

    state: int
    per_token: int
    tokens: int | None
    growth: float = 0.0

    def bytes_at(self, length: int) -> int:
        kept = length if self.tokens is None else min(length, self.tokens)
        return self.state + math.ceil(length * self.growth) + kept * self.per_token


@dataclass(frozen=True)
class Memory:
    """One model's layers, in order."""

    layers: list[LayerMemory]

    @property
    def state(self) -> int:
        """Bytes of mixer states, the same at any length where none of them grows."""
        return sum(layer.state for layer in self.layers)

    @property
    def per_token(self) -> float:
        """Bytes that every further token adds on average, however long the sequence is."""
        return sum(x.growth + (x.per_token if x.tokens is None else 0) for x in self.layers)

    def bytes_at(self, length: int) -> int:
        return sum(layer.bytes_at(length) for layer in self.layers)


def memory(teacher: Any, students: dict[str, Any]) -> dict[str, Memory]:
    """Memory of every model, the teacher first."""
    return {name: Memory(_layers(model)) for name, model in {TEACHER: teacher, **students}.items()}


def _layers(model: Any) -> list[LayerMemory]:
    if getattr(model.config, "linearize", None):
        return [
            LayerMemory(x.state_bytes, x.kv_bytes_per_token, x.kv_tokens, x.growth) for x in describe(model)
        ]
    width = next(model.parameters()).element_size()
    shapes = [(layer.geometry, layer.sliding_window) for layer in probe(model).values()]
    return [LayerMemory(0, g.kv_heads * (g.key_dim + g.value_dim) * width, window) for g, window in shapes]
