"""The only door to compute: a mixer calls an operation here and never asks which version runs.

Each operation has a plain torch reference of the same signature, in ``reference.py``, ``mapped.py``, ``gated.py``,
``selection.py``, ``routing.py`` or ``lola.py``, in two forms: many queries (chunked) and few (recurrent). Some have
Triton kernels beside it, ``triton_*.py``: every call asks ``backend.py`` whether they can run, and ``ran()`` says what
did and why. Their modules are imported where they are called, since Triton is optional.
"""

from typing import Any

from torch import Tensor

from .backend import ran, reference_only, refusal, use_kernel
from .feature_maps import FeatureMap
from .gated import gated_chunked, gated_recurrent, joined_chunked, joined_recurrent
from .lola import Sparse, hand_over_all, sparse_chunked, sparse_recurrent
from .mapped import mapped_chunked, mapped_error_chunked, mapped_refusal
from .mixer import Fit
from .reference import fold, joint_chunked, joint_recurrent, window_chunked, window_recurrent
from .routing import Past, route, routed_chunked, routed_recurrent, self_saliency, self_saliency_of
from .selection import Kept, future_attention, kept_chunked, kept_recurrent, merge_kept
from .tiles import State

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
    "kept_attention",
    "kept_decode",
    "mapped_attention",
    "mapped_error",
    "merge_kept",
    "ran",
    "reference_only",
    "route",
    "routed_attention",
    "routed_decode",
    "self_saliency",
    "self_saliency_of",
    "sparse_attention",
    "sparse_decode",
    "sparse_hand_over",
    "window_attention",
    "window_decode",
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


def mapped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    map_q: FeatureMap,
    map_k: FeatureMap,
    *factors: Tensor | None,
    softcap: float | None = None,
    state: State | None = None,
    pending: int = 0,
    **terms: Any,
) -> tuple[Tensor, State | None]:
    """``mapped_chunked``; with ``pending`` tokens held back, linear keys lie behind ``stop``."""
    held = "tokens that may be taken back are not fused" if pending else None
    if use_kernel(
        "mapped_attention", refusal(q, k, v), held, mapped_refusal(k, v, map_q, map_k, softcap, state)
    ):
        from .triton_mapped import mapped_kernel

        return mapped_kernel(q, k, v, map_q, map_k, *factors, state=state, **terms)
    return mapped_chunked(q, k, v, map_q, map_k, *factors, softcap=softcap, state=state, **terms)


def mapped_error(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    map_q: FeatureMap,
    map_k: FeatureMap,
    *factors: Tensor | None,
    softcap: float | None = None,
    **terms: Any,
) -> Fit:
    """``mapped_error_chunked``: what a transfer minimises."""
    if use_kernel("mapped_error", refusal(q, k, v), mapped_refusal(k, v, map_q, map_k, softcap, None)):
        from .triton_mapped import mapped_error_kernel

        return mapped_error_kernel(q, k, v, map_q, map_k, *factors, **terms)
    return mapped_error_chunked(q, k, v, map_q, map_k, *factors, softcap=softcap, **terms)
