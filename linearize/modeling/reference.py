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

import functools
from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

WindowKind = Literal["sliding", "terraced"]
State = tuple[Tensor, Tensor]
P = ParamSpec("P")
Y = TypeVar("Y")

MIN_TILE = 64  # shorter tiles store more states than they save in products
PURE_LINEAR_EPS = 1e-12  # without a window nothing bounds the denominator from below


def full_precision(function: Callable[P, Y]) -> Callable[P, Y]:
    """The function with autocast off: it would round sums that must stay fp32 to bf16."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Y:
        first = next(arg for arg in args if isinstance(arg, Tensor))
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped


def accumulator(*tensors: Tensor) -> torch.dtype:
    """fp32, or fp64 where an input is."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def in_window(query: Tensor, key: Tensor, window: int, kind: WindowKind) -> Tensor:
    """Whether each key lies in each query's window, by positions (broadcast); later keys are not excluded."""
    if kind == "sliding":
        return key > query - window
    if kind == "terraced":
        return query.div(window, rounding_mode="floor") - key.div(window, rounding_mode="floor") <= 1
    raise ValueError(f"window_kind={kind!r}: choose sliding or terraced")


def window_mask(
    length: int, window: int | None, kind: WindowKind, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """(window, linear): two boolean masks [T, T], row = query, that part the causal keys."""
    position = torch.arange(length, device=device)
    causal = position <= position[:, None]
    if not window:
        return torch.zeros_like(causal), causal
    inside = in_window(position[:, None], position, window, kind)
    return causal & inside, causal & ~inside


# The meaning: dense masks, one line for each symbol.


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """s [B, H, T, n] from q [B, T, H, K] and k [B, n, G, K], the teacher's soft-cap included."""
    scores = scale * torch.einsum("bihk,bjhk->bhij", q, _per_head(k, q.shape[2]))
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _per_head(x: Tensor, heads: int) -> Tensor:
    """x [B, T, G, D] as [B, T, H, D], kv heads repeated."""
    return x.repeat_interleave(heads // x.shape[2], dim=2)


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
    v = _per_head(v, heads)
    in_softmax, in_linear = window_mask(q.shape[1], window, window_kind, q.device)
    b = 1.0 if not window or linear_factor is None else linear_factor.to(dtype)[:, None, None]
    weights = b * torch.einsum("bihf,bjhf->bhij", phi_q, _per_head(phi_k, heads)).masked_fill(~in_linear, 0.0)
    if window:
        scores = _scores(q, k, scale, softcap).masked_fill(~in_softmax, -torch.inf)
        row_max = scores.max(dim=-1, keepdim=True).values
        weights = weights + window_factor.to(dtype)[:, None, None] * torch.exp(scores - row_max)
    num = torch.einsum("bhij,bjhv->bhiv", weights, v)
    den = weights.sum(dim=-1, keepdim=True)
    if state is not None:
        kv, z = (_per_head(x.to(dtype)[:, None], heads)[:, 0] for x in state)
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
    scores = _scores(q, k, scale, softcap).masked_fill(~visible, -torch.inf)
    y = torch.einsum("bhij,bjhv->bihv", torch.softmax(scores, dim=-1), _per_head(v, q.shape[2]))
    return y.to(out_dtype)


# Tiles: a query tile meets its own and the previous tile of keys, and a state of everything older.
# Tiles are [B, G, N, r, C, D]: the r heads of a group stand together, so that one product serves them all
# and k and v need no repeating.


def _tile_length(length: int, window: int | None, kind: WindowKind) -> int:
    """C, such that no window reaches further back than the previous tile; one tile where all fits."""
    if not window:
        tile = MIN_TILE
    elif kind == "sliding":
        tile = max(window, MIN_TILE)
    else:  # blocks and tiles share their borders
        tile = -(-MIN_TILE // window) * window
    return min(tile, length)


def _tiles(x: Tensor, tile: int, groups: int, dtype: torch.dtype) -> Tensor:
    """x [B, T, heads, D] as [B, G, N, r, C, D] with r = heads / G, zeros after the end."""
    batch, length, heads, dim = x.shape
    x = pad(x, (0, 0, 0, 0, 0, -length % tile)) if length % tile else x
    x = x.reshape(batch, -1, tile, groups, heads // groups, dim).permute(0, 3, 1, 4, 2, 5)
    return x.to(dtype, memory_format=torch.contiguous_format).contiguous()


def _feature_tiles(phi_q: Tensor, tile: int, groups: int, shared: int, dtype: torch.dtype) -> Tensor:
    """phi_q [B, T, H, F] as [B, G, N, r, R/r*C, F]: the rows that meet one key map stand together."""
    return _tiles(phi_q, tile, groups, dtype).unflatten(3, (shared, -1)).flatten(4, 5)


def _untile(y: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """y [B, G, N, R, C, V] as [B, T, H, V]."""
    batch, groups, count, per_group, tile, dim = y.shape
    y = y.to(dtype).permute(0, 2, 4, 1, 3, 5).reshape(batch, count * tile, groups * per_group, dim)
    return y[:, :length]


def _near(x: Tensor, stop: int | None = None) -> Tensor:
    """The previous tile (zeros before the first), then the own one, up to row ``stop``: [B, G, N, 2C, D]."""
    count, tile = x.shape[2], x.shape[3]
    if count == 1:
        return x[..., :stop, :]
    previous = pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0))
    if stop is not None and stop <= tile:
        return previous[..., :stop, :]
    return torch.cat((previous, x[..., : None if stop is None else stop - tile, :]), dim=3)


def _near_positions(count: int, tile: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of queries [N, C, 1] and of their near keys [N, 1, 2C]; before index 0 they are negative."""
    start = tile * torch.arange(count, device=device)[:, None]
    query = start + torch.arange(tile, device=device)
    key = query if count == 1 else start + torch.arange(-tile, tile, device=device)
    return query[:, :, None], key[:, None, :]


def _probabilities(q: Tensor, k: Tensor, visible: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Softmax [B, G, N, R*C, n] over the visible near keys.

    q [B, G, N, R, C, K], k [B, G, N, n, K], visible [B|1, 1, N, C, n].
    """
    rows = (q * scale).flatten(3, 4)
    scores = rows @ k.transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = (~visible).repeat(1, 1, 1, q.shape[3], 1)
    # The lowest finite score, not -inf: a row that sees nothing (an empty batch row) stays finite.
    return torch.softmax(scores.masked_fill_(hidden, torch.finfo(scores.dtype).min), dim=-1)


def _with_ones(v: Tensor) -> Tensor:
    """v with a last column of ones, so that a weighted sum carries its denominator."""
    return pad(v, (0, 1), value=1.0)


def _linear_part(phi_q: Tensor, phi_k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Numerator and denominator [B, G, N, R*C, V+1] of the kept near keys.

    phi_q [B, G, N, r, R/r*C, F], phi_k [B, G, N, n, r*F], v [B, G, N, n, V+1]; keep broadcasts to
    [B, 1, N, 1, R/r, C, n].
    """
    shared = phi_q.shape[3]
    keys = phi_k.unflatten(-1, (shared, -1)).permute(0, 1, 2, 4, 5, 3)  # [B, G, N, r, F, n]
    weights = (phi_q @ keys).unflatten(4, (-1, keep.shape[-2]))
    return weights.masked_fill(~keep, 0.0).flatten(3, 5) @ v


def _from_state(phi_q: Tensor, state: Tensor) -> Tensor:
    """Sums [B, G, N, R*C, V+1] of phi_q [B, G, N, r, R/r*C, F] against states [B, G, N, r, F, V+1]."""
    return (phi_q @ state).flatten(3, 4)


def _join_state(state: State, groups: int, dtype: torch.dtype) -> Tensor:
    """(S, z) as one tensor [B, G, 1, r, F, V+1]."""
    kv, z = state
    joined = torch.cat((kv.to(dtype), z.to(dtype)[..., None]), dim=-1)
    return joined.unflatten(1, (groups, -1))[:, :, None]


def _join(
    probabilities: Tensor | None,
    v: Tensor,
    linear: Tensor | None,
    q: Tensor,
    window_factor: Tensor,
    linear_factor: Tensor | None,
) -> Tensor:
    """y [B, G, N, R, C, V] from the window's probabilities and the linear sums, over one denominator.

    The largest probability of a row is exp(c - LSE): numerator and denominator times it are g P v + b pmax
    linear, the formula of the module with nothing that can overflow and gradient through c as part of the
    softmax's own.
    """
    if probabilities is None:
        assert linear is not None
        num, den = linear.split((linear.shape[-1] - 1, 1), dim=-1)
        return (num / (den + PURE_LINEAR_EPS)).unflatten(3, q.shape[3:5])
    joint = (probabilities @ v).unflatten(3, q.shape[3:5])  # [B, G, N, R, C, V+1]
    if linear is None:
        return joint[..., :-1]
    shape = (q.shape[1], 1, q.shape[3], 1, 1)  # [G, 1, R, 1, 1]
    share = probabilities.max(dim=-1, keepdim=True).values.unflatten(3, q.shape[3:5])
    if linear_factor is not None:
        share = share * linear_factor.to(joint.dtype).view(shape)
    joint = window_factor.to(joint.dtype).view(shape) * joint + share * linear.unflatten(3, q.shape[3:5])
    num, den = joint.split((joint.shape[-1] - 1, 1), dim=-1)  # the gradient of slices would fill zeros
    return num / den


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
    tile = _tile_length(length, window, window_kind)
    q, k, values = (_tiles(x, tile, groups, dtype) for x in (q, k, v))
    count = q.shape[2]
    k, values = k[:, :, :, 0], _with_ones(values[:, :, :, 0])  # [B, G, N, C, K], [B, G, N, C, V+1]
    phi_q = _feature_tiles(phi_q, tile, groups, shared, dtype)
    phi_k = phi_k.reshape(*phi_k.shape[:2], groups, -1)  # the features of a group side by side
    phi_k = _tiles(phi_k, tile, groups, dtype)[:, :, :, 0]  # [B, G, N, C, r*F]

    query, key = _near_positions(count, tile, q.device)
    near_values = _near(values)
    probabilities = None
    if window:
        visible = in_window(query, key, window, window_kind) & (key <= query) & (key >= 0)
        probabilities = _probabilities(q, _near(k), visible[None, None], scale, softcap)

    linear = None
    stop = _near_linear(key.shape[-1], window, window_kind)
    if stop:
        keep = key[-1:, :, :stop] <= query[-1:]  # every tile alike: what stands before the first tile is zero
        if window:
            keep = keep & ~in_window(query[-1:], key[-1:, :, :stop], window, window_kind)
        linear = _linear_part(phi_q, _near(phi_k, stop), near_values[..., :stop, :], keep[:, None, None])
    older = _older_states(phi_k, values, shared, state)
    if older is not None:
        sums = _from_state(phi_q, older)
        linear = sums if linear is None else linear + sums
    y = _join(probabilities, near_values, linear, q, window_factor, linear_factor)
    return _untile(y, length, v.dtype)


def _near_linear(near: int, window: int | None, kind: WindowKind) -> int:
    """How many of the near keys, from the oldest, are linear for some query of the tile."""
    if not window:
        return near
    return max(0, near - window if kind == "sliding" else ((near - 1) // window - 1) * window)


def _older_states(phi_k: Tensor, values: Tensor, shared: int, state: State | None) -> Tensor | None:
    """For each tile the sums [B, G, N, r, F, V+1] over all tiles before its previous one, and ``state``."""
    count = phi_k.shape[2]
    start = None if state is None else _join_state(state, phi_k.shape[1], values.dtype)
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
    tile = _tile_length(length, window, window_kind)
    query, key = _near_positions(-(-length // tile), tile, q.device)
    inside = in_window(query, key, window, window_kind)
    visible = inside & (key <= query) & (key >= 0)  # [N, C, 2C]
    first_k, first_v = (x[:, :sinks, :, None].permute(0, 2, 3, 1, 4).to(dtype) for x in (k, v))
    q, k, v = (_tiles(x, tile, groups, dtype) for x in (q, k, v))
    k, v = _near(k[:, :, :, 0]), _near(v[:, :, :, 0])
    if sinks:
        first = torch.arange(first_k.shape[3], device=q.device)
        seen = (first <= query) & ~in_window(query, first, window, window_kind)
        visible = torch.cat((seen, visible), dim=-1)
        k, v = (
            torch.cat((x.expand(-1, -1, near.shape[2], -1, -1), near), dim=3)
            for x, near in ((first_k, k), (first_v, v))
        )
    y = _probabilities(q, k, visible[None, None], scale, softcap) @ v
    return _untile(y.unflatten(3, q.shape[3:5]), length, out_dtype)


# Decode: a few queries against slots in any order, one tile of their own.


def _slots(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [B, n, G, D] as near keys of a single tile, [B, G, 1, n, D]."""
    return x.to(dtype).transpose(1, 2)[:, :, None]


def _slot_masks(
    key_positions: Tensor, query_positions: Tensor, window: int | None, kind: WindowKind, sinks: int = 0
) -> tuple[Tensor, Tensor]:
    """(window, linear) masks [B, 1, 1, Tq, n] by positions; negative key positions are empty slots."""
    key, query = key_positions[:, None, None, None], query_positions[:, None, None, :, None]
    seen = (key >= 0) & (key <= query)
    if not window:
        return torch.zeros_like(seen), seen
    inside = in_window(query, key, window, kind) | (key < sinks)
    return seen & inside, seen & ~inside


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
    queries = _tiles(q, length, groups, dtype)
    keys, values = _slots(k, dtype), _with_ones(_slots(v, dtype))
    visible, rest = _slot_masks(key_positions, query_positions, window, window_kind)
    probabilities = _probabilities(queries, keys, visible, scale, softcap) if window else None

    linear = None
    if phi_k is not None:
        phi = _feature_tiles(phi_q, length, groups, phi_k.shape[2] // groups, dtype)
        features = _slots(phi_k.reshape(*phi_k.shape[:2], groups, -1), dtype)
        linear = _linear_part(phi, features, values, rest[:, :, :, None, None])
    if state is not None:
        phi = _feature_tiles(phi_q, length, groups, state[1].shape[1] // groups, dtype)
        sums = _from_state(phi, _join_state(state, groups, dtype))
        linear = sums if linear is None else linear + sums
    if probabilities is None and linear is None:
        raise ValueError("without a window, phi_k or a state is needed")
    return _untile(
        _join(probabilities, values, linear, queries, window_factor, linear_factor), length, v.dtype
    )


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
    queries = _tiles(q, length, k.shape[2], dtype)
    visible, _ = _slot_masks(key_positions, query_positions, window, window_kind, sinks)
    y = _probabilities(queries, _slots(k, dtype), visible, scale, softcap) @ _slots(v, dtype)
    return _untile(y.unflatten(3, queries.shape[3:5]), length, v.dtype)


@full_precision
def fold(kv: Tensor, z: Tensor, phi_k: Tensor, v: Tensor, keep: Tensor) -> State:
    """The state (S [B, Hs, F, V], z [B, Hs, F]) with the kept keys added, in its precision (fp32 or more).

    phi_k [B, n, Hs, F] (Hs = H or G), v [B, n, G, V], keep [B, n] bool; what is not kept may hold anything.
    """
    dtype, groups = accumulator(kv, z), v.shape[2]
    mask = keep[:, :, None, None]
    values = _with_ones(_slots(v.masked_fill(~mask, 0.0), dtype))[:, :, 0]  # [B, G, n, V+1]
    features = phi_k.masked_fill(~mask, 0.0).reshape(*phi_k.shape[:2], groups, -1)
    sums = (_slots(features, dtype)[:, :, 0].transpose(-1, -2) @ values).reshape(
        *kv.shape[:-1], -1
    )  # [B, Hs, F, V+1]
    return kv.to(dtype) + sums[..., :-1], z.to(dtype) + sums[..., -1]
