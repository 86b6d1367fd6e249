"""Energy per token, from the power that the GPU tells (NVML, through torch): repeated work, power read beside it.

A GPU tells the mean of its last tenth of a second to its last second, so the same work goes on for a while before
readings count, and long enough after that. What ends sooner has no figure.
"""

import statistics
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..modeling.cache import CACHE
from .timing import clock, device_of, read_prompt

LEAD, SPAN, EVERY = 1.0, 2.0, 0.05
"""Seconds of work before readings count, of work that they count in, and between two of them."""
FEWEST_READINGS = 5


class NoReading(Exception):
    """Why there is no figure."""


def watts(device: torch.device) -> float:
    """What the GPU draws now. Raises NoReading where it does not tell."""
    if device.type != "cuda":
        raise NoReading("only a GPU tells its power")
    try:
        return torch.cuda.power_draw(device) / 1000
    except ModuleNotFoundError:
        raise NoReading("needs nvidia-ml-py (pip install nvidia-ml-py)") from None
    except Exception as error:  # NVML's own classes, which need not be there
        raise NoReading(f"the GPU does not tell its power ({error or type(error).__name__})") from None


def per_token(
    part: str, model: Any, ids: torch.Tensor, power: Callable[[torch.device], float] = watts
) -> float:
    """Joules of one token of one row. Decode steps are the last ones of the text, at most its half.

    Raises NoReading where the power cannot be read, or the work ends too soon.
    """
    device = device_of(model)
    power(device)  # refuses before any work is done
    work = _prompts(model, ids) if part == "prefill" else _steps(model, ids)
    tokens = ids.numel() if part == "prefill" else ids.shape[0]
    if part == "decode":
        next(work)  # reads the prompt
    _go_on(work, device, LEAD)
    with _Readings(device, power) as read:
        calls, seconds = _go_on(work, device, SPAN)
    if read.failed is not None:
        raise read.failed
    if len(read.found) < FEWEST_READINGS:
        raise NoReading(f"{seconds:.2g} s of work are too short to read a power")
    return statistics.fmean(read.found) * seconds / (calls * tokens)


def _prompts(model: Any, ids: torch.Tensor) -> Iterator[None]:
    while True:
        read_prompt(model, ids)
        yield


def _steps(model: Any, ids: torch.Tensor) -> Iterator[None]:
    start = ids.shape[1] - ids.shape[1] // 2
    cache = read_prompt(model, ids[:, :start])[CACHE]
    yield
    for at in range(start, ids.shape[1]):
        model(input_ids=ids[:, at : at + 1], use_cache=True, **{CACHE: cache})
        yield


def _go_on(work: Iterator[None], device: torch.device, least: float) -> tuple[int, float]:
    """Calls of at least so many seconds, as long as there are any, and their seconds."""
    calls, spent = 0, 0.0
    while spent < least:
        try:
            spent += clock(lambda: next(work), device)
        except StopIteration:
            break
        calls += 1
    return calls, spent


class _Readings:
    """Watts, read by a thread of its own while the block runs."""

    def __init__(self, device: torch.device, power: Callable[[torch.device], float]):
        self.device, self.power = device, power
        self.found: list[float] = []
        self.failed: NoReading | None = None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._read, daemon=True)

    def _read(self) -> None:
        try:
            while not self.over.wait(EVERY):
                self.found.append(self.power(self.device))
        except NoReading as error:
            self.failed = error

    def __enter__(self) -> "_Readings":
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.over.set()
        self.thread.join()
