"""What a student costs and saves: prefill and decode beside the teacher, over lengths and batch sizes.

One harness for both: same process, device, type and token ids. Every point has warm-ups that do not count, then timed
runs with the device synchronised around each; a point is their median and quartiles. What would not fit is left out
and says so, and so does what ran out of memory: both are points, and losing points stay.

prefill  a text of `length` tokens for every row of the batch: cache and the logits of the last token, from nothing
decode   one more token for every row; the timed steps are those that fill `length`, so that no position is beyond it

Ids are random, since no product of matrices depends on them. Both models decode step by step with a growing cache and
without a graph: what a step launches is in its time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..progress import Progress, Watch
from .energy import NoReading, per_token
from .likelihood import TEACHER
from .points import OUT_OF_MEMORY, PARTS, RUNS, WARMUPS, Point, SpeedResults, crossovers, up_to
from .speed_plan import BATCHES, LONGEST, SHORTEST, Planned, context_of, grid, plan
from .statistics import quartiles
from .timing import (
    best_softmax,
    decode,
    device_of,
    in_eval_mode,
    kept_bytes,
    prefill,
    random_ids,
    start_counting,
    tidy,
)

__all__ = [
    "BATCHES",
    "LONGEST",
    "OUT_OF_MEMORY",
    "PARTS",
    "RUNS",
    "SHORTEST",
    "WARMUPS",
    "Planned",
    "Point",
    "SpeedResults",
    "best_softmax",
    "context_of",
    "crossovers",
    "grid",
    "kept_bytes",
    "measure",
    "plan",
    "timed",
]


@torch.no_grad()
def measure(
    models: Mapping[str, nn.Module],
    planned: Sequence[Planned],
    *,
    runs: int = RUNS,
    seed: int = 0,
    energy: bool = False,
    progress: Watch | None = None,
) -> SpeedResults:
    """Time the plan's points in their order, with joules of a token if `energy`.

    The first student is the one that crossovers are of.
    """
    teacher = models[TEACHER]
    total = sum(point.seconds for point in planned if point.not_run is None)
    done, points = 0.0, []
    with in_eval_mode(models.values()), best_softmax(device_of(teacher)):
        for at in planned:
            point = Point(at.part, at.model, at.length, at.batch, not_run=at.not_run)
            if at.not_run is None:
                point = timed(models[at.model], point, runs, seed, energy)
                done += at.seconds
            points.append(point)
            if progress is not None and total:
                progress(Progress("bench", round(1000 * done), round(1000 * total), "ms planned"))
    student = next((name for name in models if name != TEACHER), TEACHER)
    found = {batch: crossovers(points, batch, student) for batch in sorted({x.batch for x in points})}
    device = device_of(teacher)
    few = sorted({x.runs for x in points if x.not_run is None and x.runs < runs})
    notes = [f"slow points have {', '.join(map(str, few))} timed runs instead of {runs}, and one warm-up"]
    return SpeedResults(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        points=points,
        crossover=found[min(found)],
        up_to=up_to(points, student),
        crossovers=found,
        dtype=str(teacher.dtype).removeprefix("torch."),
        attention=_attention(teacher, device),
        threads=None if device.type == "cuda" else torch.get_num_threads(),
        notes=notes if few else [],
    )


@torch.no_grad()
def timed(model: Any, point: Point, runs: int, seed: int, energy: bool = False) -> Point:
    """A point with its times, or why there are none."""
    device, joules, no_energy = device_of(model), None, None
    ids = random_ids(model, point.batch, point.length, seed)
    weights = sum(p.numel() * p.element_size() for p in {*model.parameters(), *model.buffers()})
    before = start_counting(device)
    try:
        made = prefill(model, ids, runs) if point.part == "prefill" else decode(model, ids, runs)
        most = None if before is None else torch.cuda.max_memory_allocated(device) - before + weights
        if energy:
            joules, no_energy = _energy(point.part, model, ids)
    except torch.OutOfMemoryError:
        return replace(point, not_run=OUT_OF_MEMORY)
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        return replace(point, not_run=OUT_OF_MEMORY)
    except IndexError:
        return replace(point, not_run=f"beyond its table of {context_of(model)} positions")
    finally:
        del ids
        tidy(device)
    spent, kept = made
    low, middle, high = quartiles(spent)
    tokens = point.batch * (point.length if point.part == "prefill" else 1)
    return replace(
        point,
        ms=1000 * middle,
        low=1000 * low,
        high=1000 * high,
        runs=len(spent),
        tokens_per_second=tokens / middle,
        peak_bytes=most,
        state_bytes=kept,
        joules_per_token=joules,
        energy_not_run=no_energy,
    )


def _energy(part: str, model: Any, ids: torch.Tensor) -> tuple[float | None, str | None]:
    """Joules of a token, or why there are none."""
    try:
        return per_token(part, model, ids), None
    except NoReading as error:
        return None, str(error)


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"CPU, {names[0]}" if names else "CPU"


def _attention(teacher: Any, device: torch.device) -> str:
    name = teacher.config._attn_implementation
    order = ": cuDNN, flash, memory-efficient, plain, the first that can" if device.type == "cuda" else ""
    return f"{name}{order}" if name == "sdpa" else str(name)
