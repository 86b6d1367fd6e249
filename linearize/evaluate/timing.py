"""One call timed: warm-ups, then runs with the device synchronised around each; and what is kept for the next token."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ..modeling.cache import CACHE
from .points import WARMUPS

FEWEST = 3
"""Timed runs of a point however slow; one warm-up precedes them."""
POINT_SECONDS = 6.0
"""A point whose runs would take longer has fewer of them."""


@contextlib.contextmanager
def best_softmax(device: torch.device) -> Iterator[None]:
    """SDPA's fastest kernel first, where there is a choice: cuDNN, flash, memory-efficient, plain."""
    if device.type != "cuda":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    with sdpa_kernel([*order, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True):
        yield


def kept_bytes(cache: Any) -> int:
    """Bytes of a cache as it is: states, or keys and values."""
    total = 0
    for layer in cache.layers:
        state = getattr(layer, "state", None)
        held = (getattr(layer, "keys", None), getattr(layer, "values", None)) if state is None else state
        total += sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)
    return total


def prefill(model: Any, ids: torch.Tensor, runs: int) -> tuple[list[float], int]:
    kept = []

    def read() -> None:
        kept[:] = [kept_bytes(read_prompt(model, ids)[CACHE])]

    spent = _times(read, ids.device, runs)
    return spent, kept[0]


def decode(model: Any, ids: torch.Tensor, runs: int) -> tuple[list[float], int]:
    """The last tokens one by one, after a prefill of those before them, which is not timed.

    On a GPU they are read once before: cuDNN plans attention to every new length for tens of milliseconds.
    """
    steps = min(WARMUPS + runs, ids.shape[1] - 1)

    def reader() -> tuple[Any, Callable[[], None]]:
        cache = read_prompt(model, ids[:, :-steps])[CACHE]
        at = iter(range(ids.shape[1] - steps, ids.shape[1]))

        def step() -> None:
            index = next(at)
            model(input_ids=ids[:, index : index + 1], use_cache=True, **{CACHE: cache})

        return cache, step

    if ids.is_cuda:
        _, step = reader()
        for _ in range(steps):
            step()
    cache, step = reader()
    spent = _times(step, ids.device, steps - WARMUPS)
    return spent, kept_bytes(cache)


def random_ids(model: Any, batch: int, length: int, seed: int) -> torch.Tensor:
    """[batch, length] on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    rows = model.get_input_embeddings().weight.shape[0]
    return torch.randint(3, rows, (batch, length), generator=generator).to(device_of(model))


def read_prompt(model: Any, ids: torch.Tensor) -> Any:
    # Without this every row would have [T, vocabulary] logits, which no reader of a prompt wants.
    return model(input_ids=ids, use_cache=True, logits_to_keep=1)


def _times(call: Callable[[], None], device: torch.device, runs: int) -> list[float]:
    """Seconds of `runs` calls after the warm-ups; fewer, after one warm-up, where calls are slow."""
    first = clock(call, device)
    if first * (WARMUPS - 1 + runs) > POINT_SECONDS:
        first = clock(call, device)  # the second says what a warm call takes
        if first * runs > POINT_SECONDS:
            more = max(FEWEST, min(runs, int(POINT_SECONDS / first))) - 1
            return [first, *(clock(call, device) for _ in range(more))]
    else:
        clock(call, device)
    clock(call, device)
    return [clock(call, device) for _ in range(runs)]


def clock(call: Callable[[], None], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_counting(device: torch.device) -> int | None:
    tidy(device)
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def tidy(device: torch.device) -> None:
    """What the last point took is free for the next one."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def device_of(model: Any) -> torch.device:
    return next(model.parameters()).device


@contextlib.contextmanager
def in_eval_mode(models: Iterable[Any]) -> Iterator[None]:
    """Dropout off while models are measured, and as it was afterwards."""
    training = [model for model in models if model.training]
    for model in training:
        model.eval()
    try:
        yield
    finally:
        for model in training:
            model.train()
