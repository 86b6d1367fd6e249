"""The only door to compute: a mixer calls an operation here and never asks which version runs.

Each operation has a plain torch reference of the same signature, in ``reference.py``, ``mapped.py``, ``gated.py``,
``selection.py``, ``routing.py`` or ``lola.py``, in two forms: many queries (chunked) and few (recurrent). Some have
Triton kernels beside it, ``triton_*.py``: every call asks ``backend.py`` whether they can run, and ``ran()`` says what
did and why. Their modules are imported where they are called, since Triton is optional.

A step in place is one launch where a kernel takes it (``steps.py``): its functions return None where none does, and the
mixer's own step, which is the reference, runs instead.
"""

from typing import Any

import torch
from torch import Tensor

from .averaged import Averaged, averaged_composed
from .backend import breaks_compiler, ran, reference_only, refusal, use_kernel
from .convolved import convolved_composed
from .feature_maps import FeatureMap, Hedgehog, NormPreserved, NormPreservedPlain
from .gated import (
    gated_chunked,
    gated_recurrent,
    joined_chunked,
    joined_recurrent,
)
from .launches import no_room
from .lola import Sparse, hand_over_all, sparse_chunked, sparse_recurrent
from .mapped import mapped_composed, mapped_error_composed, mapped_refusal
from .mixer import Fit
from .reference import fold, joint_recurrent, window_chunked, window_recurrent
from .routing import Behind, Past, ranks_of, route, routed_chunked, routed_recurrent, self_saliency_of
from .routing import self_saliency as self_saliency_chunked
from .selection import Kept, first_kept, kept_chunked, kept_recurrent, merge_kept
from .selection import future_attention as future_attention_chunked
from .steps import joint_step, lawcat_step, liger_step, salient_step, still_step, window_step
from .tiles import State

__all__ = [
    "Averaged",
    "Behind",
    "Kept",
    "Past",
    "Sparse",
    "averaged_attention",
    "convolved_attention",
    "first_kept",
    "fold",
    "future_attention",
    "gated_attention",
    "gated_decode",
    "joined_attention",
    "joined_decode",
    "joint_decode",
    "joint_step",
    "kept_attention",
    "kept_decode",
    "lawcat_step",
    "liger_step",
    "mapped_attention",
    "mapped_error",
    "merge_kept",
    "ran",
    "ranks_of",
    "reference_only",
    "route",
    "routed_attention",
    "routed_decode",
    "routed_prefill",
    "saliency_ranks",
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


def mapped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    map_q: FeatureMap,
    map_k: FeatureMap,
    *factors: Any,
    softcap: float | None = None,
    state: State | None = None,
    pending: int = 0,
    **terms: Any,
) -> tuple[Tensor, State | None]:
    """``mapped_composed``; with ``pending`` tokens held back, linear keys lie behind ``stop``."""
    reasons = (
        refusal(q, k, v),
        no_room("mapped_attention", q),
        "tokens that may be taken back are not fused" if pending else None,
        _through_state(terms.get("stop"), q, k, v, map_q.weight, map_k.weight),
        mapped_refusal(k, v, map_q, map_k, softcap, state),
    )
    if use_kernel("mapped_attention", *reasons):
        from .triton_mapped import mapped_kernel

        return mapped_kernel(q, k, v, map_q, map_k, *factors, state=state, **terms)
    return mapped_composed(q, k, v, map_q, map_k, *factors, softcap=softcap, state=state, **terms)


def mapped_error(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    map_q: FeatureMap,
    map_k: FeatureMap,
    *factors: Any,
    softcap: float | None = None,
    **terms: Any,
) -> Fit:
    """``mapped_error_composed``: what a transfer minimises."""
    frozen = None if not any(x.requires_grad for x in (q, k, v)) else "q, k or v ask for gradients"
    refused = mapped_refusal(k, v, map_q, map_k, softcap, None)
    broken = refusal(q, k, v) or no_room("mapped_error", q) or breaks_compiler(q, v)
    if use_kernel("mapped_error", broken, frozen, refused):
        from .triton_mapped import mapped_error_kernel

        return mapped_error_kernel(q, k, v, map_q, map_k, *factors, **terms)
    return mapped_error_composed(q, k, v, map_q, map_k, *factors, softcap=softcap, **terms)


def _unlike(*tensors: Tensor) -> str | None:
    if len({x.dtype for x in tensors}) == 1:
        return None
    kinds = {str(x.dtype).removeprefix("torch.") for x in tensors}
    return f"q, k and v are of several types, {' and '.join(sorted(kinds))}"


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
        no_room("kept_attention", q),
        _unlike(q, k, v),
        "a soft-cap is set" if softcap is not None else None,
        "a chunk continues a state" if kept is not None else None,
        _no_tile(chunk, k.shape[-1], v.shape[-1]),
    ):
        from .triton_selected_kept import kept_attention as kernel

        return kernel(q, k, v, score, scale=scale, chunk=chunk, size=size)
    return kept_chunked(q, k, v, score, scale=scale, chunk=chunk, size=size, softcap=softcap, kept=kept)


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
        no_room("future_attention", q),
        _unlike(q, k),
        "a soft-cap is set" if softcap is not None else None,
        _no_tile(64, k.shape[-1]),
    ):
        from .triton_selected_future import future_attention as kernel

        return kernel(q, k, scale=scale, chunk=chunk, lengths=lengths)
    return future_attention_chunked(q, k, scale=scale, chunk=chunk, softcap=softcap, lengths=lengths)


def self_saliency(q: Tensor, k: Tensor, *, scale: float, window: int, softcap: float | None = None) -> Tensor:
    """``routing.self_saliency``."""
    if _saliency_kernel(q, k, window, softcap):
        from .triton_selected_future import self_saliency as kernel

        return kernel(q, k, scale=scale, window=window)
    return self_saliency_chunked(q, k, scale=scale, window=window, softcap=softcap)


def saliency_ranks(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    window: int,
    groups: int,
    keep_first: bool,
    softcap: float | None = None,
) -> Tensor:
    """``routing.ranks_of`` the self-saliency of whole rows [B, T, groups]; inf for the first token where it is kept."""
    fused = groups == q.shape[2] and _saliency_kernel(q, k, window, softcap)
    if fused:
        from .triton_selected_future import self_saliency as kernel

        return kernel(q, k, scale=scale, window=window, rank=True, keep_first=keep_first)
    ranks = ranks_of(self_saliency(q, k, scale=scale, window=window, softcap=softcap), groups)
    if keep_first:
        ranks[:, :1] = torch.inf
    return ranks


def _saliency_kernel(q: Tensor, k: Tensor, window: int, softcap: float | None) -> bool:
    return use_kernel(
        "self_saliency",
        refusal(q, k),
        no_room("self_saliency", q),
        _unlike(q, k),
        "a soft-cap is set" if softcap is not None else None,
        _no_tile(window, k.shape[-1]),
    )


def averaged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_plain: Tensor,
    k_plain: Tensor,
    terms: Averaged,
    *,
    stop: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``averaged.averaged_composed``: a softmax window and a recurrence gated by the keys, averaged."""
    inputs = (q, k, v, q_plain, k_plain)
    rough = terms.hgrn2 and q.dtype != torch.float32  # 0.017 of a norm on an H100, where 0.015 is allowed
    reasons = (
        refusal(*inputs),
        no_room("averaged_attention", q),
        _uneven(*inputs),
        _through_state(stop, *inputs),
        "hgrn2 in half precision misses its tolerance" if rough else None,
    )
    if not use_kernel("averaged_attention", *reasons):
        return averaged_composed(*inputs, terms, stop=stop)
    from .triton_gated_liger_backward import averaged_kernel

    return averaged_kernel(*inputs, terms, stop=stop)


def convolved_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logits: Tensor,
    taps_q: Tensor | None,
    taps_k: Tensor | None,
    map_q: Tensor,
    map_k: Tensor,
    *,
    stop: Tensor | None = None,
    **terms: float,
) -> tuple[Tensor, Tensor | None]:
    """``convolved.convolved_composed``: LAWCAT's layer without a window, from raw inputs."""
    parts = (taps_q, taps_k, map_q, map_k)
    through = _through_state(stop, *(x for x in (q, k, v, logits, *parts) if x is not None))
    if not use_kernel(
        "convolved_attention",
        refusal(q, k, v, logits),
        no_room("convolved_attention", q),
        _uneven(q, k, v),
        through,
    ):
        return convolved_composed(q, k, v, logits, *parts, stop=stop, **terms)
    from .triton_gated_convolved import convolved_kernel

    return convolved_kernel(q, k, v, logits, *parts, stop=stop, **terms)


def _uneven(*tensors: Tensor) -> str | None:
    """Why kernels do not take heads of such widths, or such dtypes together."""
    widest = max(x.shape[-1] for x in tensors)
    if widest > 128:
        return f"heads of {widest} channels are wider than 128"
    if len({x.dtype for x in tensors}) > 1:
        return "the inputs have several dtypes"
    return None if all(x.numel() for x in tensors) else "there is nothing to compute"


def _through_state(stop: Tensor | None, *tensors: Tensor) -> str | None:
    needed = stop is not None and torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return "a gradient may flow through the state" if needed else None


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
    slots: int | None = None,
) -> tuple[Tensor, Behind | None]:
    """``routing.routed_chunked`` with the features of both maps, and, from a kernel, what is behind the last of the
    ``lengths`` [B] tokens of each row: the sums of all that is linear and, without gradients, kept tokens in ``slots``
    where so many are asked for."""
    kept = max(0, -(-q.shape[1] // chunk) - 2) * picks
    widths = map_q.feature_dim // map_q.halves, map_k.feature_dim // map_k.halves
    reasons = (
        refusal(q, k, v, score),
        no_room("routed_prefill", q),
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
        from .triton_selected_maps import matrices
        from .triton_selected_routed import routed_prefill as kernel

        return kernel(
            q, k, v, *matrices(map_q, map_k, q.dtype), score, gate,
            scale=scale, chunk=chunk, picks=picks, size=kept if size is None else size,
            norm=isinstance(map_q, NormPreservedPlain), eps=eps, lengths=lengths, slots=slots,
        )  # fmt: skip
    y = routed_attention(
        q, k, v, map_q(q), map_k(k), score, gate,
        scale=scale, chunk=chunk, picks=picks, size=size, eps=eps, softcap=softcap,
    )  # fmt: skip
    return y, None
