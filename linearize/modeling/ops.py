"""The only door to compute: a mixer calls an operation here and never asks which version runs.

Each operation has a plain torch reference of the same signature, in ``reference.py``, ``gated.py``, ``selection.py``,
``routing.py`` or ``lola.py``, in the forms of many queries (chunked) and few (recurrent). Some have a Triton kernel
besides, which ``backend`` chooses where it can run.
"""

import torch
from torch import Tensor

from . import routing, selection
from .backend import refusal, use_kernel
from .feature_maps import FeatureMap, Hedgehog, NormPreserved, NormPreservedPlain
from .gated import gated_chunked, gated_recurrent, joined_chunked, joined_recurrent
from .lola import Sparse, hand_over_all, sparse_chunked, sparse_recurrent
from .reference import fold, joint_chunked, joint_recurrent, window_chunked, window_recurrent
from .routing import Past, route, routed_chunked, routed_recurrent, self_saliency_of
from .selection import Kept, kept_recurrent, merge_kept

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
    "merge_kept",
    "route",
    "routed_attention",
    "routed_decode",
    "routed_prefill",
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


def _unlike(*tensors: Tensor) -> str | None:
    kinds = {str(x.dtype).removeprefix("torch.") for x in tensors}
    return None if len(kinds) == 1 else f"q, k and v are of several types, {' and '.join(sorted(kinds))}"


def _no_tile(chunk: int, *widths: int) -> str | None:
    """Why kernels whose tile of queries is a chunk do not take this one, or these head widths."""
    if chunk not in (16, 32, 64, 128):
        return f"a chunk of {chunk} is not 16, 32, 64 or 128"
    return f"heads of {max(widths)} channels are wider than 256" if max(widths) > 256 else None


def kept_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    *,
    scale: float,
    chunk: int,
    size: int,
    softcap: float | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """``selection.kept_chunked``."""
    if use_kernel(
        "kept_attention",
        refusal(q, k, v, score),
        _unlike(q, k, v),
        "a soft-cap is set" if softcap is not None else None,
        "a chunk continues a state" if kept is not None else None,
        _no_tile(chunk, k.shape[-1], v.shape[-1]),
    ):
        from .triton_selected_kept import kept_attention as kernel

        return kernel(q, k, v, score, scale=scale, chunk=chunk, size=size)
    return selection.kept_chunked(
        q, k, v, score, scale=scale, chunk=chunk, size=size, softcap=softcap, kept=kept
    )


def future_attention(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    chunk: int,
    softcap: float | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """``selection.future_attention``."""
    if use_kernel(
        "future_attention",
        refusal(q, k),
        _unlike(q, k),
        "a soft-cap is set" if softcap is not None else None,
        _no_tile(64, k.shape[-1]),
    ):
        from .triton_selected_future import future_attention as kernel

        return kernel(q, k, scale=scale, chunk=chunk, lengths=lengths)
    return selection.future_attention(q, k, scale=scale, chunk=chunk, softcap=softcap, lengths=lengths)


def self_saliency(q: Tensor, k: Tensor, *, scale: float, window: int, softcap: float | None = None) -> Tensor:
    """``routing.self_saliency``."""
    if use_kernel(
        "self_saliency",
        refusal(q, k),
        _unlike(q, k),
        "a soft-cap is set" if softcap is not None else None,
        _no_tile(window, k.shape[-1]),
    ):
        from .triton_selected_future import self_saliency as kernel

        return kernel(q, k, scale=scale, window=window)
    return routing.self_saliency(q, k, scale=scale, window=window, softcap=softcap)


MOST_UNBOUNDED = 1024
"""Most kept tokens for which a kernel lists the set of every chunk where no budget bounds it."""


def routed_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    map_q: FeatureMap,
    map_k: FeatureMap,
    score: Tensor,
    gate: Tensor | None = None,
    *,
    scale: float,
    chunk: int,
    picks: int,
    size: int | None,
    eps: float = 1e-6,
    softcap: float | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """``routing.routed_chunked`` with the features of both maps, and, from a kernel, the sums (S, z) of all that has
    turned linear by the last of the ``lengths`` [B] tokens of each row."""
    kept = max(0, -(-q.shape[1] // chunk) - 2) * picks
    widths = map_q.feature_dim // map_q.halves, map_k.feature_dim // map_k.halves
    reasons = (
        refusal(q, k, v, score),
        _unlike(q, k, v),
        "a soft-cap is set" if softcap is not None else None,
        _no_tile(chunk, k.shape[-1], v.shape[-1]),
        None
        if type(map_q) in (Hedgehog, NormPreserved, NormPreservedPlain)
        else f"{type(map_q).__name__} features have no kernel",
        None
        if widths[0] == widths[1] in (16, 32, 64, 128)
        else f"maps of {widths[0]} columns are not 16, 32, 64 or 128 wide",
        f"no budget bounds the kept set, and {kept} tokens are too many"
        if size is None and kept > MOST_UNBOUNDED
        else None,
    )
    if use_kernel("routed_prefill", *reasons):
        from .triton_selected_routed import routed_prefill as kernel

        return kernel(
            q, k, v, map_q.matrix(torch.float32), map_k.matrix(torch.float32), score, gate,
            scale=scale, chunk=chunk, picks=picks, size=kept if size is None else size,
            norm=isinstance(map_q, NormPreservedPlain), eps=eps, lengths=lengths,
        )  # fmt: skip
    y = routed_attention(
        q, k, v, map_q(q), map_k(k), score, gate,
        scale=scale, chunk=chunk, picks=picks, size=size, eps=eps, softcap=softcap,
    )  # fmt: skip
    return y, None
