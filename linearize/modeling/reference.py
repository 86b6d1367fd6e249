"""Softmax window and linear remainder under one normaliser: quadratic (meaning), chunked (O(T)), recurrent.

Legend: B batch, T time, H query heads, G kv heads, R = H/G, K key dim, V value dim, F feature dim, W window,
C tile, N tiles. Query head h reads kv head h // R. For query i, S(i) are its window keys, P(i) the other keys
j <= i, and with s_ij = scale q_i.k_j:

    c_i = max_{S(i)} s_ij
    num = g sum_{S(i)} exp(s_ij - c_i) v_j + b sum_{P(i)} (phi_q_i . phi_k_j) v_j
    den = g sum_{S(i)} exp(s_ij - c_i)     + b sum_{P(i)} (phi_q_i . phi_k_j)
    y_i = num / den

(arXiv 2410.10254, eq. 7, with the maximum of the authors' code.) c_i is part of the function, not a
stabiliser: the linear term is not rescaled by it, and gradient flows through it (on ties, to the key that
``torch.max`` names). Windows hold the query itself:

    sliding    j > i - W                          W keys
    terraced   floor(i/W) - floor(j/W) <= 1       the query's own block of W and the whole block before it

Layouts: q [B, T, H, K]; k [B, T, G, K]; v [B, T, G, V]; phi_q [B, T, H, F]; phi_k [B, T, H, F], or [B, T,
G, F] where the group shares its map; factors g, b [H]. A state is (S [B, Hs, F, V], z [B, Hs, F]) with Hs
the heads of phi_k: the sums of phi_k v^T and of phi_k over keys before index 0. Index 0 stands on the
window grid, and those earlier keys are linear for every query. Everything is computed in fp32, or fp64
where the inputs are, whatever autocast says; y comes back in the dtype of v.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .tiles import (
    PURE_LINEAR_EPS,
    State,
    WindowKind,
    accumulator,
    feature_tiles,
    from_state,
    full_precision,
    grouped,
    in_window,
    join,
    join_state,
    linear_part,
    near_of,
    near_positions,
    per_head,
    probabilities_of,
    scores_of,
    slot_masks,
    slots_of,
    tile_length,
    tiles_of,
    untile,
    window_mask,
    with_ones,
)

# The meaning: dense masks, one line for each symbol.


@full_precision
def joint_quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    window_factor: Tensor,
    linear_factor: Tensor | None = None,
    *,
    scale: float,
    window: int | None,
    window_kind: WindowKind = "sliding",
    softcap: float | None = None,
    state: State | None = None,
) -> Tensor:
    """y [B, T, H, V]: the module's formula written out with T x T masks. Layouts: module docstring.

    window_factor is g [H], after the sigmoid; linear_factor is b [H], None for 1. Without a window (None or
    0) the layer is linear attention over all causal keys, num / (den + 1e-12), and neither factor applies.
    """
    heads, dtype, out_dtype = q.shape[2], accumulator(q, k, v, phi_q, phi_k), v.dtype
    q, k, v, phi_q, phi_k = (x.to(dtype) for x in (q, k, v, phi_q, phi_k))
    v = per_head(v, heads)
    in_softmax, in_linear = window_mask(q.shape[1], window, window_kind, q.device)
    b = 1.0 if not window or linear_factor is None else linear_factor.to(dtype)[:, None, None]
    weights = b * torch.einsum("bihf,bjhf->bhij", phi_q, per_head(phi_k, heads)).masked_fill(~in_linear, 0.0)
    if window:
        scores = scores_of(q, k, scale, softcap).masked_fill(~in_softmax, -torch.inf)
        row_max = scores.max(dim=-1, keepdim=True).values
        weights = weights + window_factor.to(dtype)[:, None, None] * torch.exp(scores - row_max)
    num = torch.einsum("bhij,bjhv->bhiv", weights, v)
    den = weights.sum(dim=-1, keepdim=True)
    if state is not None:
        kv, z = (per_head(x.to(dtype)[:, None], heads)[:, 0] for x in state)
        num = num + b * torch.einsum("bihf,bhfv->bhiv", phi_q, kv)
        den = den + b * torch.einsum("bihf,bhf->bhi", phi_q, z)[..., None]
    y = num / (den if window else den + PURE_LINEAR_EPS)
    return y.transpose(1, 2).to(out_dtype)


@full_precision
def window_quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int,
    window_kind: WindowKind = "sliding",
    softcap: float | None = None,
    sinks: int = 0,
) -> Tensor:
    """y [B, T, H, V]: softmax over the window and the first ``sinks`` indices alone, with dense masks."""
    dtype, out_dtype = accumulator(q, k, v), v.dtype
    q, k, v = (x.to(dtype) for x in (q, k, v))
    visible, rest = window_mask(q.shape[1], window, window_kind, q.device)
    visible = visible | (rest & (torch.arange(q.shape[1], device=q.device) < sinks))
    scores = scores_of(q, k, scale, softcap).masked_fill(~visible, -torch.inf)
    y = torch.einsum("bhij,bjhv->bihv", torch.softmax(scores, dim=-1), per_head(v, q.shape[2]))
    return y.to(out_dtype)


@full_precision
def joint_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    window_factor: Tensor,
    linear_factor: Tensor | None = None,
    *,
    scale: float,
    window: int | None,
    window_kind: WindowKind = "sliding",
    softcap: float | None = None,
    state: State | None = None,
) -> Tensor:
    """y [B, T, H, V]: ``joint_quadratic`` in time and memory linear in T, forward and backward.

    A tile of C queries meets the near keys (previous and own tile) pair by pair and all older tiles as one
    sum. Memory beyond the inputs: 2C scores and about F V / C state entries a token and head.
    """
    length, groups, dtype = q.shape[1], k.shape[2], accumulator(q, k, v, phi_q, phi_k)
    shared = phi_k.shape[2] // groups  # feature maps a group: R, or 1 where it shares one
    tile = tile_length(length, window, window_kind)
    q, k, values = (tiles_of(x, tile, groups, dtype) for x in (q, k, v))
    count = q.shape[2]
    k, values = k[:, :, :, 0], with_ones(values[:, :, :, 0])  # [B, G, N, C, K], [B, G, N, C, V+1]
    phi_q = feature_tiles(phi_q, tile, groups, shared, dtype)
    phi_k = tiles_of(grouped(phi_k, groups), tile, groups, dtype)[:, :, :, 0]  # [B, G, N, C, r*F]

    query, key = near_positions(count, tile, q.device)
    near_values = near_of(values)
    probabilities = None
    if window:
        visible = in_window(query, key, window, window_kind) & (key <= query) & (key >= 0)
        probabilities = probabilities_of(q, near_of(k), visible[None, None], scale, softcap)

    linear = None
    stop = _near_linear(key.shape[-1], window, window_kind)
    if stop:
        keep = key[-1:, :, :stop] <= query[-1:]  # every tile alike: what stands before the first tile is zero
        if window:
            keep = keep & ~in_window(query[-1:], key[-1:, :, :stop], window, window_kind)
        linear = linear_part(phi_q, near_of(phi_k, stop), near_values[..., :stop, :], keep[:, None, None])
    older = _older_states(phi_k, values, shared, state)
    if older is not None:
        sums = from_state(phi_q, older)
        linear = sums if linear is None else linear + sums
    y = join(probabilities, near_values, linear, q, window_factor, linear_factor)
    return untile(y, length, v.dtype)


def _near_linear(near: int, window: int | None, kind: WindowKind) -> int:
    """How many of the near keys, from the oldest, are linear for some query of the tile."""
    if not window:
        return near
    return max(0, near - window if kind == "sliding" else ((near - 1) // window - 1) * window)


def _older_states(phi_k: Tensor, values: Tensor, shared: int, state: State | None) -> Tensor | None:
    """For each tile the sums [B, G, N, r, F, V+1] over all tiles before its previous one, and ``state``."""
    count = phi_k.shape[2]
    start = None if state is None else join_state(state, phi_k.shape[1], values.dtype)
    if count <= 2:
        return start
    sums = (phi_k[:, :, :-2].transpose(-1, -2) @ values[:, :, :-2]).unflatten(3, (shared, -1))
    if start is not None:
        sums = torch.cat((start, start.new_zeros(()).expand_as(start), sums), dim=2)
        return sums.cumsum(dim=2)
    return pad(sums.cumsum(dim=2), (0, 0, 0, 0, 0, 0, 2, 0))


@full_precision
def window_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int,
    window_kind: WindowKind = "sliding",
    softcap: float | None = None,
    sinks: int = 0,
) -> Tensor:
    """y [B, T, H, V]: ``window_quadratic`` in time linear in T; sinks are further near keys of every tile."""
    length, groups, dtype, out_dtype = q.shape[1], k.shape[2], accumulator(q, k, v), v.dtype
    tile = tile_length(length, window, window_kind)
    query, key = near_positions(-(-length // tile), tile, q.device)
    inside = in_window(query, key, window, window_kind)
    visible = inside & (key <= query) & (key >= 0)  # [N, C, 2C]
    first_k, first_v = (x[:, :sinks, :, None].permute(0, 2, 3, 1, 4).to(dtype) for x in (k, v))
    q, k, v = (tiles_of(x, tile, groups, dtype) for x in (q, k, v))
    k, v = near_of(k[:, :, :, 0]), near_of(v[:, :, :, 0])
    if sinks:
        first = torch.arange(first_k.shape[3], device=q.device)
        seen = (first <= query) & ~in_window(query, first, window, window_kind)
        visible = torch.cat((seen, visible), dim=-1)
        k, v = (
            torch.cat((x.expand(-1, -1, near.shape[2], -1, -1), near), dim=3)
            for x, near in ((first_k, k), (first_v, v))
        )
    y = probabilities_of(q, k, visible[None, None], scale, softcap) @ v
    return untile(y.unflatten(3, q.shape[3:5]), length, out_dtype)


# Decode: a few queries against slots in any order, one tile of their own.


@full_precision
def joint_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor | None,
    window_factor: Tensor,
    linear_factor: Tensor | None = None,
    *,
    key_positions: Tensor,
    query_positions: Tensor,
    scale: float,
    window: int | None,
    window_kind: WindowKind = "sliding",
    softcap: float | None = None,
    state: State | None = None,
) -> Tensor:
    """y [B, Tq, H, V] of a few queries against n slots in any order, by the same predicate on positions.

    q [B, Tq, H, K], phi_q [B, Tq, H, F], query_positions [B, Tq]; k [B, n, G, K], v [B, n, G, V],
    key_positions [B, n], negative for an empty slot (whose contents must be finite). Slots outside a
    query's window are linear; phi_k [B, n, H|G, F] may be None when no slot can be. ``state`` sums the keys
    that have left the slots.
    """
    length, groups = q.shape[1], k.shape[2]
    dtype = accumulator(q, k, v, phi_q)
    queries = tiles_of(q, length, groups, dtype)
    keys, values = slots_of(k, dtype), with_ones(slots_of(v, dtype))
    visible, rest = slot_masks(key_positions, query_positions, window, window_kind)
    probabilities = probabilities_of(queries, keys, visible, scale, softcap) if window else None

    linear = None
    if phi_k is not None:
        phi = feature_tiles(phi_q, length, groups, phi_k.shape[2] // groups, dtype)
        features = slots_of(grouped(phi_k, groups), dtype)
        linear = linear_part(phi, features, values, rest[:, :, :, None, None])
    if state is not None:
        phi = feature_tiles(phi_q, length, groups, state[1].shape[1] // groups, dtype)
        sums = from_state(phi, join_state(state, groups, dtype))
        linear = sums if linear is None else linear + sums
    if probabilities is None and linear is None:
        raise ValueError("without a window, phi_k or a state is needed")
    return untile(join(probabilities, values, linear, queries, window_factor, linear_factor), length, v.dtype)


@full_precision
def window_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_positions: Tensor,
    query_positions: Tensor,
    scale: float,
    window: int,
    window_kind: WindowKind = "sliding",
    softcap: float | None = None,
    sinks: int = 0,
) -> Tensor:
    """y [B, Tq, H, V] against slots as in ``joint_recurrent``; positions below ``sinks`` stay visible."""
    length, dtype = q.shape[1], accumulator(q, k, v)
    queries = tiles_of(q, length, k.shape[2], dtype)
    visible, _ = slot_masks(key_positions, query_positions, window, window_kind, sinks)
    y = probabilities_of(queries, slots_of(k, dtype), visible, scale, softcap) @ slots_of(v, dtype)
    return untile(y.unflatten(3, queries.shape[3:5]), length, v.dtype)


@full_precision
def fold(kv: Tensor, z: Tensor, phi_k: Tensor, v: Tensor, keep: Tensor) -> State:
    """The state (S [B, Hs, F, V], z [B, Hs, F]) with the kept keys added, in its precision (fp32 or more).

    phi_k [B, n, Hs, F] (Hs = H or G), v [B, n, G, V], keep bool [B, n] or [B, n, G]; the rest may hold anything.
    """
    dtype, groups = accumulator(kv, z), v.shape[2]
    mask = keep if keep.ndim == 3 else keep[..., None].expand(-1, -1, groups)
    values = with_ones(slots_of(v.masked_fill(~mask[..., None], 0.0), dtype))[:, :, 0]  # [B, G, n, V+1]
    mask = per_head(mask[..., None], phi_k.shape[2])
    features = grouped(phi_k.masked_fill(~mask, 0.0), groups)
    sums = (slots_of(features, dtype)[:, :, 0].transpose(-1, -2) @ values).reshape(
        *kv.shape[:-1], -1
    )  # [B, Hs, F, V+1]
    return kv.to(dtype) + sums[..., :-1], z.to(dtype) + sums[..., -1]
