"""The only door to compute: a mixer calls an operation here and never asks which version runs.

Each operation has a plain torch reference of the same signature, in ``reference.py``, ``gated.py``, ``selection.py``,
``routing.py`` or ``lola.py``. There is no other version yet; the choice is only between their forms: many queries
(chunked) and few (recurrent).

A step in place is one launch where a kernel takes it: its functions (``..._step``) return None where none does, and the
mixer's own step, which is the reference, runs instead.
"""

from typing import Any

from torch import Tensor

from .backend import refusal, use_kernel
from .gated import gated_chunked, gated_recurrent, joined_chunked, joined_recurrent
from .lola import Sparse, hand_over_all, sparse_chunked, sparse_recurrent
from .reference import fold, joint_chunked, joint_recurrent, window_chunked, window_recurrent
from .routing import Past, route, routed_chunked, routed_recurrent, self_saliency, self_saliency_of
from .selection import Kept, future_attention, kept_chunked, kept_recurrent, merge_kept

__all__ = [
    "Kept",
    "Past",
    "Sparse",
    "fold",
    "future_attention",
    "gated_attention",
    "gated_decode",
    "joined_attention",
    "joined_decode",
    "joint_attention",
    "joint_decode",
    "joint_step",
    "kept_attention",
    "kept_decode",
    "lawcat_step",
    "liger_step",
    "merge_kept",
    "route",
    "routed_attention",
    "routed_decode",
    "salient_step",
    "self_saliency",
    "self_saliency_of",
    "sparse_attention",
    "sparse_decode",
    "sparse_hand_over",
    "still_step",
    "window_attention",
    "window_decode",
    "window_step",
]

joint_attention = joint_chunked
joint_decode = joint_recurrent
window_attention = window_chunked
window_decode = window_recurrent
kept_attention = kept_chunked
kept_decode = kept_recurrent
gated_attention = gated_chunked
gated_decode = gated_recurrent
joined_attention = joined_chunked
joined_decode = joined_recurrent
routed_attention = routed_chunked
routed_decode = routed_recurrent
sparse_attention = sparse_chunked
sparse_decode = sparse_recurrent
sparse_hand_over = hand_over_all


def joint_step(q: Tensor, k: Tensor, v: Tensor, *state: Tensor, **terms: Any) -> Tensor | None:
    """y [B, 1, H, V] of a window joined with sums; ``triton_decode.joint_step`` says what it takes and writes."""
    tied = terms["sums"][1].shape[1] != q.shape[2]
    if not use_kernel("joint_step", refusal(q, k, v), _few_heads(q, k) if tied else None):
        return None
    from .triton_decode import joint_step as step

    return step(q, k, v, *state, **terms)


def liger_step(
    q: Tensor, k: Tensor, v: Tensor, *state: Tensor, against: str | None, **terms: Any
) -> Tensor | None:
    """y [B, 1, H, V] of a fading recurrence beside a window; ``against``: why the kernel cannot, if it cannot."""
    if not use_kernel("liger_step", refusal(q, k, v), against, _few_heads(q, k)):
        return None
    from .triton_decode_liger import liger_step as step

    return step(q, k, v, *state, **terms)


def lawcat_step(
    q: Tensor, k: Tensor, v: Tensor, *state: Tensor, against: str | None, **terms: Any
) -> Tensor | None:
    """y [B, 1, H, V] of normalised fading sums after a convolution; ``against`` as in :func:`liger_step`."""
    if not use_kernel("lawcat_step", refusal(q, k, v), against):
        return None
    from .triton_decode_lawcat import lawcat_step as step

    return step(q, k, v, *state, **terms)


def salient_step(q: Tensor, k: Tensor, v: Tensor, *state: Tensor, **terms: Any) -> Tensor | None:
    """y [B, 1, H, V] against a kept set and the local span, which hands its oldest chunk over when it is due."""
    if not use_kernel("salient_step", refusal(q, k, v), _few_heads(q, k)):
        return None
    from .triton_decode_salient import salient_step as step

    return step(q, k, v, *state, **terms)


def still_step(
    q: Tensor, k: Tensor, v: Tensor, *state: Tensor, against: str | None, **terms: Any
) -> Tensor | None:
    """y [B, 1, H, V] against picked tokens, the local span and the sums of all others; ``against`` as in
    :func:`liger_step`."""
    if not use_kernel("still_step", refusal(q, k, v), against):
        return None
    from .triton_decode_still import still_step as step

    return step(q, k, v, *state, **terms)


def _few_heads(q: Tensor, k: Tensor) -> str | None:
    """A tile of 16 rows holds the query heads of a group."""
    return "more than 16 query heads share a key/value head" if q.shape[2] > 16 * k.shape[2] else None


def window_step(q: Tensor, k: Tensor, v: Tensor, *state: Tensor, **terms: Any) -> Tensor | None:
    """y [B, 1, H, V] of a window and its sinks; the same kernel without sums."""
    if not use_kernel("window_step", refusal(q, k, v)):
        return None
    from .triton_decode import joint_step as step

    return step(q, k, v, *state, **terms)
