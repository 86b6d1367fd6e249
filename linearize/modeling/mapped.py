"""The joint layer from q, k, v and the feature maps themselves: what ``ops`` replaces by kernels that never store phi.

    y, state = window softmax and phi_q(q) . phi_k(k) under one normaliser, as ``reference.py`` defines them

Letters and layouts are that module's. ``stop`` [B] asks for the state after the first ``stop`` tokens of each row,
added to ``state``; no key that is linear for some real query may lie behind it. ``teacher`` [B, T, H, V] asks for the
error against it instead of y, over the real tokens, of which a row has ``lengths`` [B].
"""

from typing import Any

import torch
from torch import Tensor

from .feature_maps import FeatureMap, Hedgehog
from .mixer import Fit
from .reference import fold, joint_chunked
from .tiles import State, WindowKind

WIDEST = 64  # channels of half a map that kernels hold in registers


def mapped_composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    map_q: FeatureMap,
    map_k: FeatureMap,
    window_factor: Tensor,
    linear_factor: Tensor | None = None,
    *,
    scale: float,
    window: int | None,
    window_kind: WindowKind = "sliding",
    softcap: float | None = None,
    state: State | None = None,
    stop: Tensor | None = None,
) -> tuple[Tensor, State | None]:
    """(y [B, T, H, V], the state after ``stop`` tokens or None): ``joint_chunked`` of mapped q and k."""
    phi_k = map_k(k)
    terms: dict[str, Any] = dict(scale=scale, window=window, window_kind=window_kind, softcap=softcap)
    y = joint_chunked(q, k, v, map_q(q), phi_k, window_factor, linear_factor, state=state, **terms)
    if stop is None:
        return y, None
    if state is None:
        shape, exact = (len(v), phi_k.shape[2], phi_k.shape[3]), torch.promote_types(v.dtype, torch.float32)
        state = (v.new_zeros(*shape, v.shape[-1], dtype=exact), v.new_zeros(*shape, dtype=exact))
    return y, fold(*state, phi_k, v, torch.arange(v.shape[1], device=v.device) < stop[:, None])


def mapped_error_composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    map_q: FeatureMap,
    map_k: FeatureMap,
    window_factor: Tensor,
    linear_factor: Tensor | None = None,
    *,
    teacher: Tensor,
    lengths: Tensor | None = None,
    **terms: Any,
) -> Fit:
    """The mean squared error of ``mapped_composed`` against ``teacher``, and the teacher's mean square."""
    y, _ = mapped_composed(q, k, v, map_q, map_k, window_factor, linear_factor, **terms)
    exact = torch.promote_types(y.dtype, torch.float32)
    y, teacher = y.to(exact), teacher.to(exact)
    if lengths is not None:
        padding = (torch.arange(y.shape[1], device=y.device) >= lengths[:, None])[:, :, None, None]
        y, teacher = y.masked_fill(padding, 0.0), teacher.masked_fill(padding, 0.0)
    return as_fit((y - teacher).square().sum(), teacher.square().sum(), teacher, lengths)


def as_fit(error: Tensor, power: Tensor, teacher: Tensor, lengths: Tensor | None) -> Fit:
    """Means over real tokens from the sums over ``teacher``'s elements."""
    count = teacher.numel() if lengths is None else lengths.sum() * teacher[0, 0].numel()
    return Fit(error / count, (power / count).clamp_min(torch.finfo(power.dtype).tiny))


def mapped_refusal(
    k: Tensor,
    v: Tensor,
    map_q: FeatureMap,
    map_k: FeatureMap,
    softcap: float | None,
    state: State | None,
) -> str | None:
    """Why the kernels do not take such a call, in words; None where they do."""
    if type(map_q) is not Hedgehog or type(map_k) is not Hedgehog:
        return "only the hedgehog map is fused"
    if map_k.heads != map_q.heads:
        return "kv_tied_map is not fused"
    if map_q.weight.shape[-1] > WIDEST or max(k.shape[-1], v.shape[-1]) > 128:
        return f"widths of {k.shape[-1]}, {v.shape[-1]} and {map_q.feature_dim} are not fused"
    if softcap is not None:
        return "a soft-cap on scores is not fused"
    if state is not None and torch.is_grad_enabled() and any(t.requires_grad for t in (k, v, map_k.weight)):
        return "gradients do not pass through a given state"
    return None
