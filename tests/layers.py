"""Every method's layer in every way it is used, from the same random numbers at every call."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from linearize.modeling.registry import METHODS
from linearize.tune import Run, Sizes, runs

CONVERTING = [name for name, method in METHODS.items() if method.mixer is not None]
KINDS = ("decode", "prefill", "training", "transfer")


def outputs(method: str, kind: str, device: torch.device, sizes: Sizes) -> list[Tensor]:
    """What a layer returns: its output and its state, or its gradients."""
    torch.manual_seed(0)
    with contextlib.ExitStack() as stack:
        if kind != "decode":  # which needs a prefill to step from, made whether or not it is run
            stack.enter_context(
                mock.patch("linearize.tune._decode", return_value=Run("left out", lambda: None))
            )
        run = next(run for run in runs(method, sizes, device) if run.name.startswith(f"{method}: {kind}"))
    return [tensor.detach().double() for tensor in _tensors(run.call())]


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        if result.is_floating_point():
            yield result
    elif isinstance(result, tuple | list):
        for part in result:
            yield from _tensors(part)


def gaps(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """The norm of each difference over that of what is expected; equal infinities do not differ."""
    assert [x.shape for x in found] == [x.shape for x in expected]
    shares = []
    for one, other in zip(found, expected, strict=True):
        difference = torch.where(one == other, 0.0, one - other)
        size = torch.where(other.isfinite(), other, 0.0).norm()
        shares.append((difference.norm() / size.clamp_min(1e-20)).item())
    return shares
