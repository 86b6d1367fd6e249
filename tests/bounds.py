"""Triton's interpreter with every access checked: kernels read and write inside the tensors that exist.

A GPU may let a stray read pass, or end the process at some later call; here it is an error where it happens.
"""

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def checked_accesses() -> Iterator[None]:
    """Inside, an interpreted kernel's load or store outside every live CPU tensor is an AssertionError."""
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def checked_load(self: Any, ptrs: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        _check(ptrs, mask, "load")
        return load(self, ptrs, mask, *args, **kwargs)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        _check(ptrs, mask, "store")
        return store(self, ptrs, value, mask, *args, **kwargs)

    InterpreterBuilder.create_masked_load = checked_load
    InterpreterBuilder.create_masked_store = checked_store
    try:
        yield
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store


def _check(ptrs: Any, mask: Any, what: str) -> None:
    at = np.asarray(ptrs.data).ravel()[np.broadcast_to(np.asarray(mask.data), np.shape(ptrs.data)).ravel()]
    if not at.size:
        return
    low, high = int(at.min()), int(at.max())
    for _ in range(2):
        if any(start <= low and high < end for start, end in _spans):
            return
        _refresh()
    raise AssertionError(f"a {what} of {at.size} elements from {low:#x} to {high:#x} lies in no tensor")


_spans: list[tuple[int, int]] = []


def _refresh() -> None:
    storages = (x.untyped_storage() for x in gc.get_objects() if _is_tensor(x) and x.device.type == "cpu")
    _spans[:] = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages})


def _is_tensor(x: Any) -> bool:
    """Of the plain kinds: a compiler's stand-ins have no memory, and ``isinstance`` asks lazy modules for a class."""
    return type(x) in (torch.Tensor, torch.nn.Parameter)
