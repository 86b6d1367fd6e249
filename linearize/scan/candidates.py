"""What a layer may get: candidates, their names, and the bytes that they keep."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..convert import state_bytes
from ..methods import build_method
from ..modeling.errors import RecipeError
from ..modeling.mixer import Geometry, MethodConfig
from ..modeling.registry import METHODS
from ..modeling.salient import SalientConfig
from ..modeling.window import SoftmaxConfig, WindowConfig
from ..probe import Probed
from ..recipe import Recipe

SOFTMAX = "softmax"


@dataclass(frozen=True)
class Candidate:
    """One thing that a layer may become."""

    name: str
    """Unique in a scan: ``salient 64+256`` (chunk + budget; ``64+256/32`` by kv head), ``window 64``, ``softmax``."""
    method: MethodConfig

    @property
    def trains(self) -> bool:
        """Whether transfer changes what it computes; Salient is measured by a stand-in instead."""
        return self.method.name not in (SOFTMAX, "window", "salient")

    def cost(self, layer: Probed, dtype: torch.dtype, length: int) -> int:
        """Bytes that one sequence of ``length`` tokens keeps in this layer, at most; exact."""
        return layer_bytes(self.method, layer, dtype, length)


def candidates(recipe: Recipe) -> list[Candidate]:
    """Everything that the recipe's ``scan`` and ``method`` ask for, the teacher's own softmax last.

    Raises :class:`RecipeError` where there is nothing to try, or a method is unknown.
    """
    scan, base = recipe.scan, recipe.method
    found: list[MethodConfig] = []
    if recipe.plan is not None and recipe.plan.softmax_layers is not None:
        # With nothing but layers to count, the largest budget would always win: the method is what it is.
        found = [base] if base.name != SOFTMAX else []
        scan = scan.model_copy(update={"windows": [], "methods": []})
    elif isinstance(base, SalientConfig):
        for chunk in scan.chunks or [base.chunk]:
            # A budget that holds all that lies behind the local span is softmax by another name.
            budgets = [n for n in dict.fromkeys(scan.budgets) if n + 1 + chunk < scan.seq_len]
            found += [replace(base, chunk=chunk, budget=budget) for budget in budgets]
    elif base.name not in (SOFTMAX, "window"):
        found.append(base)
    found += [WindowConfig(window=width, sinks=1) for width in scan.windows if width < scan.seq_len]
    found += [build_method(name, place="scan.methods") for name in scan.methods]
    made = {name_of(method): Candidate(name_of(method), method) for method in found}
    made.pop(SOFTMAX, None)
    if not made:
        raise RecipeError(
            "scan: nothing to try; give scan.budgets (for method=salient), scan.windows or scan.methods"
        )
    return [*made.values(), Candidate(SOFTMAX, SoftmaxConfig())]


def name_of(method: MethodConfig) -> str:
    """A candidate's name."""
    if isinstance(method, SalientConfig):
        budgets = (method.budget,) if isinstance(method.budget, int) else method.budget
        return f"salient {method.chunk}+{'/'.join(map(str, budgets))}"
    if isinstance(method, WindowConfig):
        return f"window {method.window}"
    return method.name


def layer_bytes(method: MethodConfig, layer: Probed, dtype: torch.dtype, length: int) -> int:
    """Bytes of one sequence of ``length`` tokens in a layer with this method: its state, or its keys and values."""
    shape: Geometry = layer.geometry
    made = METHODS[method.name].mixer
    if made is None:
        kept = length if layer.sliding_window is None else min(length, layer.sliding_window)
        return kept * shape.kv_heads * (shape.key_dim + shape.value_dim) * dtype.itemsize
    mixer = made(method, shape)
    return state_bytes(mixer, dtype) + math.ceil(length * mixer.growth(dtype.itemsize))


def fields_of(method: MethodConfig) -> dict[str, Any]:
    """The configuration as plain data."""
    return {"name": method.name, **asdict(method)}


def method_of(fields: Mapping[str, Any]) -> MethodConfig:
    """The inverse of :func:`fields_of`."""
    return build_method(dict(fields))
