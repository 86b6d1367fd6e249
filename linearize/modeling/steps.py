"""Decode steps by kernels: one launch a layer and token, states written in place.

Each returns None where its kernel does not apply; the layer then takes its step by the reference.
"""

from typing import Any

from torch import Tensor

from .backend import refusal, use_kernel
from .launches import no_room


def joint_step(q: Tensor, k: Tensor, v: Tensor, *state: Tensor, **terms: Any) -> Tensor | None:
    """y [B, 1, H, V] of a window joined with sums; ``triton_decode.joint_step`` says what it takes and writes."""
    tied = terms["sums"][1].shape[1] != q.shape[2]
    if not use_kernel(
        "joint_step", refusal(q, k, v), no_room("joint_step", q), _few_heads(q, k) if tied else None
    ):
        return None
    from .triton_decode import joint_step as step

    return step(q, k, v, *state, **terms)


def liger_step(
    q: Tensor, k: Tensor, v: Tensor, *state: Tensor, against: str | None, **terms: Any
) -> Tensor | None:
    """y [B, 1, H, V] of a fading recurrence beside a window; ``against``: why the kernel cannot, if it cannot."""
    if not use_kernel("liger_step", refusal(q, k, v), no_room("liger_step", q), against, _few_heads(q, k)):
        return None
    from .triton_decode_liger import liger_step as step

    return step(q, k, v, *state, **terms)


def lawcat_step(
    q: Tensor, k: Tensor, v: Tensor, *state: Tensor, against: str | None, **terms: Any
) -> Tensor | None:
    """y [B, 1, H, V] of normalised fading sums after a convolution; ``against`` as in :func:`liger_step`."""
    if not use_kernel("lawcat_step", refusal(q, k, v), no_room("lawcat_step", q), against):
        return None
    from .triton_decode_lawcat import lawcat_step as step

    return step(q, k, v, *state, **terms)


def salient_step(q: Tensor, k: Tensor, v: Tensor, *state: Tensor, **terms: Any) -> Tensor | None:
    """y [B, 1, H, V] against a kept set and the local span, which hands its oldest chunk over when it is due."""
    if not use_kernel("salient_step", refusal(q, k, v), no_room("salient_step", q), _few_heads(q, k)):
        return None
    from .triton_decode_salient import salient_step as step

    return step(q, k, v, *state, **terms)


def still_step(
    q: Tensor, k: Tensor, v: Tensor, *state: Tensor, against: str | None, **terms: Any
) -> Tensor | None:
    """y [B, 1, H, V] against picked tokens, the local span and the sums of all others; ``against`` as in
    :func:`liger_step`."""
    if not use_kernel("still_step", refusal(q, k, v), no_room("still_step", q), against):
        return None
    from .triton_decode_still import still_step as step

    return step(q, k, v, *state, **terms)


def _few_heads(q: Tensor, k: Tensor) -> str | None:
    """A tile of 16 rows holds the query heads of a group."""
    return "more than 16 query heads share a key/value head" if q.shape[2] > 16 * k.shape[2] else None


def window_step(q: Tensor, k: Tensor, v: Tensor, *state: Tensor, **terms: Any) -> Tensor | None:
    """y [B, 1, H, V] of a window and its sinks; the same kernel without sums."""
    if not use_kernel("window_step", refusal(q, k, v), no_room("window_step", q)):
        return None
    from .triton_decode import joint_step as step

    return step(q, k, v, *state, **terms)
