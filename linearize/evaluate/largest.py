"""Matched memory: teacher and student each at the largest batch that the GPU holds. A protocol of its own.

Its ratios are larger than those at one batch, and of another kind: they say what a full card makes, not what a step
costs. So they stand in their own table and sentence, never beside the others. Both models' weights are on the card all
the while; what is shared out is the memory beside them, the same for both.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..modeling.cache import CACHE
from ..progress import Progress, Watch
from .points import OUT_OF_MEMORY, PARTS, RUNS, Largest, MatchedMemory, Point
from .timing import best_softmax, device_of, in_eval_mode, random_ids, read_prompt, tidy

MOST = 2**16


def measure(
    models: Mapping[str, nn.Module],
    length: int,
    timed: Callable[[Any, Point, int, int], Point],
    *,
    runs: int = RUNS,
    seed: int = 0,
    progress: Watch | None = None,
) -> MatchedMemory:
    """Search and time every model at `length` tokens; ``timed`` times a point (:func:`speed.timed`)."""
    device, found = device_of(next(iter(models.values()))), []
    tidy(device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    with in_eval_mode(models.values()), best_softmax(device):
        for at, (name, model) in enumerate(models.items()):
            tried: list[tuple[int, str | None]] = []

            def fits(batch: int, model: Any = model, tried: Any = tried) -> bool:
                tried.append((batch, attempt(model, batch, length, seed)))
                return tried[-1][1] is None

            batch = largest(fits)
            points = [Point(part, name, length, batch) for part in PARTS] if batch else []
            found.append(Largest(name, batch, tried, [timed(model, point, runs, seed) for point in points]))
            if progress is not None:
                progress(Progress("largest batch", at + 1, len(models), "models"))
    return MatchedMemory(length, free, found)


def largest(fits: Callable[[int], bool], most: int = MOST) -> int:
    """The largest batch up to `most` (a power of two) that fits: doubled until one does not, then between by halves."""
    good, bad = 0, 1
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    while bad <= most and bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


@torch.no_grad()
def attempt(model: Any, batch: int, length: int, seed: int) -> str | None:
    """Why a prompt and one more step, `length` tokens together, do not run in this batch; None where they do."""
    device = device_of(model)
    tidy(device)
    try:
        ids = random_ids(model, batch, length, seed)
        cache = read_prompt(model, ids[:, :-1])[CACHE]
        model(input_ids=ids[:, -1:], use_cache=True, **{CACHE: cache})
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY
    except RuntimeError as error:  # a kernel that is not made for so many rows is a limit too
        told = str(error).strip().partition("\n")[0][:120]
        return OUT_OF_MEMORY if "allocate" in told else told or type(error).__name__
    return None
