"""The points to come: which lengths, what each should take in memory and time, and why one is not run."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from ..modeling.cache import CACHE
from ..modeling.errors import EvaluationError
from ..probe import probe
from .likelihood import TEACHER
from .memory import Memory, memory
from .points import OUT_OF_MEMORY, PARTS, RUNS, WARMUPS
from .timing import FEWEST, POINT_SECONDS, clock, device_of, in_eval_mode, read_prompt

ROOM = 0.9
"""Share of the free memory that a point may be predicted to take."""
SHORTEST = WARMUPS + RUNS + 1
LONGEST = {"cuda": 131_072, "cpu": 4_096}
BATCHES = {"cuda": (1, 8), "cpu": (1,)}


@dataclass(frozen=True)
class Planned:
    """A point to come: bytes that it takes at once beyond all weights, seconds with its warm-ups, and why not."""

    part: str
    model: str
    length: int
    batch: int
    bytes: int
    seconds: float
    not_run: str | None = None


def grid(teacher: nn.Module, device: str) -> list[int]:
    """512, 1024, ... doubling to the teacher's context, as far as the device does that in reasonable time."""
    longest = min(context_of(teacher) or math.inf, LONGEST.get(device, LONGEST["cpu"]))
    lengths = [512 << power for power in range(20) if 512 << power <= longest]
    return lengths or [int(longest)]


def context_of(model: Any) -> int | None:
    """Positions that the model was made for; None where its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def plan(
    models: Mapping[str, nn.Module],
    lengths: Sequence[int],
    batches: Sequence[int],
    *,
    parts: Sequence[str] = PARTS,
    force: bool = False,
    seconds: float | None = None,
    free: int | None = None,
    extra: float = 0.0,
) -> list[Planned]:
    """Every point with what it should take, from the models' geometry and one short timing of each.

    `free` are the bytes to be had (None: asked of the device). A point predicted not to fit is not run unless `force`,
    and neither is one that would end after `seconds`. `extra` seconds are added to each. Raises EvaluationError for an
    impossible grid.
    """
    _check(models, lengths, batches, parts)
    sizes = memory(models[TEACHER], {name: model for name, model in models.items() if name != TEACHER})
    free = _free(device_of(models[TEACHER])) if free is None else free
    shortest, narrowest = min(lengths), min(batches)
    paces = {}
    for name, model in models.items():
        limit = context_of(model)
        sample = min(shortest, limit) if limit and name == TEACHER else shortest
        paces[name] = _pace(model, sample, narrowest)
    planned, total = [], 0.0
    for length, batch, part, (name, model) in _points(lengths, batches, parts, models):
        needed = sizes[name].bytes_at(length) * batch + _working_bytes(model, length, batch)
        spent = _seconds(paces[name], sizes[name], part, length, batch) + extra
        reason = _why_not(name, model, length)
        if reason is None and needed > ROOM * free and not force:
            reason = f"{OUT_OF_MEMORY} predicted: {_gib(needed)} of {_gib(free)} that are free"
        if reason is None and seconds is not None and total + spent > seconds:
            reason = f"predicted to end after the {seconds:.0f} s given"
        total += 0.0 if reason else spent
        planned.append(Planned(part, name, length, batch, needed, spent, reason))
    return planned


def _points(
    lengths: Sequence[int], batches: Sequence[int], parts: Sequence[str], models: Mapping[str, nn.Module]
) -> Iterator[tuple[int, int, str, tuple[str, nn.Module]]]:
    """Short before long, and both models of a point one after the other."""
    for length in sorted(set(lengths)):
        for batch in sorted(set(batches)):
            for part in parts:
                for pair in models.items():
                    yield length, batch, part, pair


def _check(
    models: Mapping[str, nn.Module], lengths: Sequence[int], batches: Sequence[int], parts: Sequence[str]
) -> None:
    if TEACHER not in models:
        raise EvaluationError(f"bench: no model is called {TEACHER!r}, beside which students are timed")
    if not lengths or min(lengths) < SHORTEST:
        raise EvaluationError(
            f"lengths: {min(lengths, default='none')} is too short; warm-ups and runs of a decode take the last "
            f"{SHORTEST - 1} tokens, so give at least {SHORTEST}"
        )
    if not batches or min(batches) < 1:
        raise EvaluationError(f"batch: {min(batches, default='none')} is impossible; give at least 1")
    if unknown := set(parts) - set(PARTS):
        raise EvaluationError(f"parts: {unknown.pop()!r} is unknown; choose from {', '.join(PARTS)}")
    types = {name: (str(model.dtype), device_of(model).type) for name, model in models.items()}
    if len(set(types.values())) > 1:
        told = ", ".join(f"{name} is {dtype} on {device}" for name, (dtype, device) in types.items())
        raise EvaluationError(f"bench: {told}; models are compared in one type on one device")


def _why_not(name: str, model: Any, length: int) -> str | None:
    limit = context_of(model)
    return f"beyond its context of {limit:,}" if name == TEACHER and limit and length > limit else None


@torch.no_grad()
def _pace(model: Any, length: int, batch: int) -> tuple[float, float, int, int]:
    """Seconds of a short prefill and of a decode step, warm, and the length and batch that they are of."""
    device = device_of(model)
    ids = torch.full((batch, length), 3, device=device)
    last: list[Any] = []

    def read() -> None:
        last[:] = [read_prompt(model, ids)]

    def step() -> None:
        model(input_ids=ids[:, :1], use_cache=True, **{CACHE: last[0][CACHE]})

    try:
        with in_eval_mode([model]):
            read_seconds = [clock(read, device) for _ in range(2)][1]
            last[:] = [read_prompt(model, ids[:, :-2])]
            step_seconds = [clock(step, device) for _ in range(2)][1]
    except torch.OutOfMemoryError:
        raise EvaluationError(
            f"bench: not even {batch} x {length} tokens fit in memory beside the weights; "
            "give shorter lengths or a smaller batch"
        ) from None
    return read_seconds, step_seconds, length, batch


def _seconds(pace: tuple[float, float, int, int], size: Memory, part: str, length: int, batch: int) -> float:
    """Of a whole point. Prefill grows with the tokens, and where a cache grows with their square at the far end;
    a step grows with what it reads."""
    read, step, short, narrow = pace
    bend = (length / short) ** 0.5 if size.per_token else 1.0
    read *= length / short * batch / narrow * bend
    step *= max(1.0, (batch / narrow) ** 0.5 * (size.bytes_at(length) / max(1, size.bytes_at(short))) ** 0.5)
    calls = WARMUPS + RUNS
    if read * calls > POINT_SECONDS:
        calls = max(FEWEST, int(POINT_SECONDS / read)) + 1
    return read * calls if part == "prefill" else read + step * (WARMUPS + RUNS)


def _working_bytes(model: Any, length: int, batch: int) -> int:
    """Activations of one layer at a time, which is what a forward without gradients holds at its widest."""
    config = model.config.get_text_config()
    hidden = getattr(config, "hidden_size", 0)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    heads = max((g.heads * (g.key_dim + g.value_dim) for g in _geometries(model)), default=0)
    return batch * length * (4 * hidden + 3 * inner + 2 * heads) * next(model.parameters()).element_size()


def _geometries(model: Any) -> list[Any]:
    spec = getattr(model.config, "linearize", None)
    if spec:
        from ..modeling.mixer import Geometry

        return [Geometry(**layer["geometry"]) for layer in spec["layers"].values()]
    return [layer.geometry for layer in probe(model).values()]


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
