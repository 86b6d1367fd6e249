"""The kernels of a training step, compiled side by side before the first one.

Triton compiles a kernel when it is launched, so that a first step waits for a dozen kernels one after the other. An
operation that is ``compiled_together`` is rehearsed before its first call of a kind that asks for gradients: forward
and backward run on fake tensors, which have shapes and no values, and launches are written down instead of made. All
that was written down is then compiled by threads, one a core (most of a compilation holds no lock of Python's), or
loaded where Triton's cache on disk has it; the call itself compiles nothing. Nothing is computed in a rehearsal, no
memory of the GPU is taken, and results are the same with and without it. Where it breaks off, the kernels that it did
not reach are compiled when they are launched, as ever.
"""

import contextlib
import contextvars
import dataclasses
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.jit import JITFunction, MockTensor
from triton.tools.tensor_descriptor import TensorDescriptor

logger = logging.getLogger(__name__)
_one_at_a_time = threading.Lock()
Operation = TypeVar("Operation", bound=Callable[..., Any])


class Written(NamedTuple):
    """One launch: a kernel and what it was given, tensors as ``MockTensor`` of their dtypes, descriptors with them."""

    kernel: Any
    given: tuple[Any, ...]
    named: dict[str, Any]


def compiled_together(operation: Operation) -> Operation:
    """A decorator; see the module's words."""
    known: set[Any] = set()

    @functools.wraps(operation)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            leaves = tree_leaves((args, kwargs))
            if _trains_on_a_gpu(leaves) and (kind := tuple(map(_kind, leaves))) not in known:
                known.add(kind)
                _prepare(operation, args, kwargs)
        return operation(*args, **kwargs)

    return call  # pyright: ignore[reportReturnType]


def _trains_on_a_gpu(leaves: list[Any]) -> bool:
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    return (
        tensors[0].is_cuda
        and not any(isinstance(x, FakeTensor) for x in tensors)
        and any(x.requires_grad for x in (*tensors, *_parameters(leaves)))
    )


def _parameters(leaves: list[Any]) -> Iterator[Tensor]:
    for x in leaves:
        if isinstance(x, nn.Module):
            yield from x.parameters()


def _kind(x: Any) -> Any:
    """What a kernel is compiled for, as far as it depends on an argument."""
    if isinstance(x, Tensor):
        return x.dtype, x.shape[2:], x.requires_grad
    if isinstance(x, nn.Module):
        return type(x), *map(_kind, x.parameters())
    return x


def _prepare(operation: Callable, args: Any, kwargs: Any) -> None:
    try:
        launches = rehearse(operation, args, kwargs)
        # In a context of its own: a mode that could not be left would otherwise stay.
        contextvars.copy_context().run(_compile, launches)
    except Exception as error:
        logger.info("%s: kernels are compiled one after the other: %r", operation.__name__, error)


def _compile(launches: list[Written]) -> None:
    with (
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        for kernel, given, named in launches:
            kernel.warmup(*given, grid=(1,), **named)
    for kernel in {id(kernel): kernel for kernel, *_ in launches}.values():
        for cache, *_ in kernel.device_caches.values():
            for key in [key for key, made in cache.items() if _failed(made)]:
                del cache[key]  # its launch compiles it again, and tells what is wrong


def _failed(made: Any) -> bool:
    waited = isinstance(made, triton.FutureKernel) and made.kernel is None and made.future.done()
    return waited and made.future.exception() is not None


def rehearse(operation: Callable, args: Any, kwargs: Any) -> list[Written]:
    """What forward and backward of a call launch, as far as they can be followed without values."""

    def apart(x: Any) -> Any:
        return x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    args, kwargs = tree_map(apart, (args, kwargs))
    leaves = tree_leaves((args, kwargs))
    inputs = [*(x for x in leaves if isinstance(x, Tensor)), *_parameters(leaves)]
    own = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda x: x)  # not those of checkpointing
    with _one_at_a_time, _writing() as launches, FakeTensorMode(allow_non_fake_inputs=True), own:
        try:
            found = tree_leaves(operation(*args, **kwargs))
            outputs = [x for x in found if isinstance(x, Tensor) and x.requires_grad]
            torch.autograd.grad(
                outputs,
                [x for x in inputs if x.requires_grad],
                [torch.empty_like(x) for x in outputs],
                allow_unused=True,
            )
        except Exception as error:
            logger.info("%s: rehearsed as far as %d launches: %r", operation.__name__, len(launches), error)
    return launches


@contextlib.contextmanager
def _writing() -> Iterator[list[Written]]:
    """Launches that are given fake tensors are written down; others, of other threads, are made."""
    launches: list[Written] = []
    run = JITFunction.run

    def write(self: Any, *given: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        if not any(isinstance(_base(x), FakeTensor) for x in (*given, *named.values())):
            return run(self, *given, grid=grid, warmup=warmup, **named)
        launches.append(Written(self, tuple(map(_mocked, given)), {n: _mocked(x) for n, x in named.items()}))

    JITFunction.run = write
    try:
        yield launches
    finally:
        JITFunction.run = run


def _base(x: Any) -> Any:
    return x.base if isinstance(x, TensorDescriptor) else x


def _mocked(x: Any) -> Any:
    if isinstance(x, TensorDescriptor):
        return dataclasses.replace(x, base=_mocked(x.base))
    return MockTensor(x.dtype) if isinstance(x, Tensor) else x
