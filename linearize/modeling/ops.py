"""The only door to compute: a mixer calls an operation here and never asks which version runs.

Each operation has a plain torch reference of the same signature, in ``reference.py``, ``gated.py``, ``selection.py``,
``routing.py`` or ``lola.py``. There is no other version yet; the choice is only between their forms: many queries
(chunked) and few (recurrent).
"""

import torch
from torch import Tensor

from .backend import refusal, use_kernel
from .gated import (
    Averaged,
    averaged_chunked,
    gated_chunked,
    gated_recurrent,
    joined_chunked,
    joined_recurrent,
)
from .lola import Sparse, hand_over_all, sparse_chunked, sparse_recurrent
from .reference import fold, joint_chunked, joint_recurrent, window_chunked, window_recurrent
from .routing import Past, route, routed_chunked, routed_recurrent, self_saliency, self_saliency_of
from .selection import Kept, future_attention, kept_chunked, kept_recurrent, merge_kept

__all__ = [
    "Averaged",
    "Kept",
    "Past",
    "Sparse",
    "averaged_attention",
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
    """``gated.averaged_chunked``: a softmax window and a recurrence gated by the keys, averaged."""
    inputs = (q, k, v, q_plain, k_plain)
    if not use_kernel(
        "averaged_attention", refusal(*inputs), _uneven(*inputs), _through_state(stop, *inputs)
    ):
        return averaged_chunked(*inputs, terms, stop=stop)
    from .triton_gated_liger_backward import averaged_kernel

    return averaged_kernel(*inputs, terms, stop=stop)


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
