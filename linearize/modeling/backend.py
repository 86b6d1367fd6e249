"""Which version of an operation runs, the plain torch reference or a Triton kernel, and why.

Kernels run on NVIDIA GPUs from compute capability 8.0 on, where Triton is installed; everywhere else, and for values
that a kernel does not take, the reference runs. ``ops`` asks :func:`use_kernel` at every call, which remembers the
answer (:func:`ran`) and says it once where a GPU runs the reference.
"""

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST = (8, 0)  # compute capability: bf16 matrix instructions and asynchronous copies

_reference = ContextVar("linearize_reference_only", default=False)
_ran: dict[str, str] = {}
_said: set[tuple[str, str]] = set()


def refusal(*tensors: Tensor) -> str | None:
    """Why no kernel runs on such tensors, in words; None where one can."""
    if torch.compiler.is_compiling():
        return "the forward is compiled"
    if _reference.get():
        return "the reference was asked for"
    device = tensors[0].device
    if device.type != "cuda" and not interpreted():
        return f"the tensors are on {device.type}"
    if (reason := _unable(device)) is not None:
        return reason
    for t in tensors:
        if t.dtype not in DTYPES:
            return f"{str(t.dtype).removeprefix('torch.')} is not computed by kernels"
    return None


@functools.cache
def _unable(device: torch.device) -> str | None:
    """Why a device, or what is installed, has no kernels."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.version.hip is not None:
        return "ROCm is not supported"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST:
        major, minor = torch.cuda.get_device_capability(device)
        return f"the GPU's compute capability is {major}.{minor}, below {OLDEST[0]}.{OLDEST[1]}"
    return None


def breaks_compiler(q: Tensor, v: Tensor) -> str | None:
    """Why the kernel of a transfer's error is not tried: Triton 3.6 and 3.7 fail to compile it for compute capability
    10 and heads of up to 64 channels, and no such GPU was at hand to mend it on."""
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device)[0] != 10:
        return None
    if max(q.shape[-1], v.shape[-1]) > 64:
        return None
    return "Triton does not compile it for this GPU and heads of up to 64 channels"


def interpreted() -> bool:
    """Whether kernels run through Triton's interpreter, on a CPU and slowly: ``TRITON_INTERPRET=1``, and asked for."""
    return os.environ.get("LINEARIZE_INTERPRET") == "1" and os.environ.get("TRITON_INTERPRET") == "1"


def use_kernel(operation: str, *reasons: str | None) -> bool:
    """Whether the kernel of an operation runs: no reason stands against it. The first that does is remembered."""
    against = None
    for reason in reasons:
        if reason is not None:
            against = reason
            break
    if torch.compiler.is_compiling():  # which can neither remember nor warn
        return against is None
    _ran[operation] = "triton" if against is None else f"reference: {against}"
    if against is not None:
        _say(operation, against)
    return against is None


def _say(operation: str, reason: str) -> None:
    if (operation, reason) in _said or _reference.get() or not torch.cuda.is_available():
        return
    _said.add((operation, reason))
    warnings.warn(f"{operation}: the slower reference runs, because {reason}", RuntimeWarning, stacklevel=4)


def ran() -> dict[str, str]:
    """Operation -> ``triton``, or ``reference: `` and the reason, as of its last call."""
    return dict(_ran)


@contextlib.contextmanager
def asked() -> Iterator[dict[str, str]]:
    """What :func:`ran` says of the calls inside the block alone."""
    before = dict(_ran)
    _ran.clear()
    inside: dict[str, str] = {}
    try:
        yield inside
    finally:
        inside.update(_ran)
        _ran.update(before | inside)


@contextlib.contextmanager
def reference_only() -> Iterator[None]:
    """Run references inside the block, for comparisons."""
    token = _reference.set(True)
    try:
        yield
    finally:
        _reference.reset(token)
