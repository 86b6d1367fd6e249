"""Different budgets of kept tokens for the kv heads of one layer.

Neighbouring kv heads of one budget form a run. A run is attended, handed over and stepped by itself with the operations
of a whole layer, on its slice of the heads; its query heads follow it. Kept tokens of all runs lie in one tensor, run
after run, so that a state has the same fields whatever its budgets are and holds no more than they say:

    one run      [B, N + 1, G, ...]                             as without budgets by head
    several      [B, sum over kv heads of N + 1, 1, ...]        a run of g heads has g (N + 1) rows, [N + 1, g] of them
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .selection import Kept


class Run(NamedTuple):
    """kv heads ``first .. stop - 1``, each with ``slots`` kept tokens, from row ``place`` of the packed ones on."""

    first: int
    stop: int
    slots: int
    place: int

    def part(self, x: Tensor, kv_heads: int) -> Tensor:
        """The heads [B, T, h, ...] of x [B, T, H or G, ...] that belong here; a view."""
        per_group = x.shape[2] // kv_heads
        return x[:, :, self.first * per_group : self.stop * per_group]

    def kept(self, kept: Kept) -> Kept:
        """This run's [B, slots, g, ...] of the packed tokens; views."""
        rows = slice(self.place, self.place + (self.stop - self.first) * self.slots)
        return Kept(*(x[:, rows, 0].unflatten(1, (self.slots, -1)) for x in kept))


class HeadBudgets:
    """The runs of a layer, and what is computed run by run."""

    def __init__(self, budget: int | tuple[int, ...], kv_heads: int, beside: int = 1):
        """``budget``: N, or one for every kv head; ``beside`` further slots each, such as one for the first token."""
        self.kv_heads = kv_heads
        budgets = (budget,) * kv_heads if isinstance(budget, int) else budget
        self.runs: list[Run] = []
        first = place = 0
        for head, mine in enumerate(budgets):
            if head + 1 == kv_heads or budgets[head + 1] != mine:
                self.runs.append(Run(first, head + 1, mine + beside, place))
                place += (head + 1 - first) * (mine + beside)
                first = head + 1
        one = len(self.runs) == 1
        self.shape = (self.runs[0].slots, kv_heads) if one else (place, 1)
        """Of the kept tokens, between the batch and the channels."""

    def each(self, kept: Kept | None, *tensors: Tensor) -> Iterator[tuple[int, Any, list[Tensor]]]:
        """(slots, kept tokens, parts of ``tensors`` [B, T, H or G, ...]) of every run; all views."""
        if len(self.runs) == 1:
            yield self.runs[0].slots, kept, list(tensors)
            return
        for run in self.runs:
            parts = [run.part(x, self.kv_heads) for x in tensors]
            yield run.slots, None if kept is None else run.kept(kept), parts

    def attend(self, function: Callable[..., Tensor], kept: Kept | None, *tensors: Tensor) -> Tensor:
        """y [B, T, H, V] of ``function(slots, kept, *parts)``, every run's in its place."""
        found = [function(slots, held, *parts) for slots, held, parts in self.each(kept, *tensors)]
        return found[0] if len(found) == 1 else torch.cat(found, dim=2)

    def merge(self, function: Callable[..., Kept], kept: Kept, *tensors: Tensor) -> Kept:
        """The kept tokens after ``function(kept, *parts)`` of every run, packed as before."""
        found = [function(held, *parts) for _, held, parts in self.each(kept, *tensors)]
        if len(found) == 1:
            return found[0]
        packed = ([x.flatten(1, 2) for x in parts] for parts in zip(*found, strict=True))
        return Kept(*(torch.cat(parts, dim=1)[:, :, None] for parts in packed))
