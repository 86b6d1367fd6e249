"""Linear attention whose memory decays by a gate: quadratic (the meaning), chunked (O(T)), recurrent.

Legend: B batch, T time, H query heads, Hs state heads, F feature dim, V value dim, C tile. A decay a_t in (0, 1], given
as its logarithm, forgets the old state and not the new token; it stands on the features or on the values:

    side="key"      S_t = diag(a_t) S_{t-1} + k_t v_t^T      y_t = S_t^T q_t      a_t [F]    arXiv 2312.06635
    side="value"    S_t = S_{t-1} diag(a_t) + k_t v_t^T      y_t = S_t^T q_t      a_t [V]    arXiv 2409.07146

so y_t is the sum over j <= t of (q_t . k_j) v_j, each channel of its side weighted by exp(L_t - L_j), L the running sum
of the log decays. With ``eps`` (side "key") the sum is divided by the same sum with v_j = 1, plus eps.

Layouts: q [B, T, H, F]; k [B, T, Hs, F], query head h reads state head h // (H / Hs); v [B, T, G, V] and log_decay
[B, T, G', F or V] with G and G' dividing Hs, each serving its share of the state heads. A state is S [B, Hs, F, V], or
[B, Hs, F, V + 1] with ``eps``: its last column is the normaliser's. Every function returns y in the dtype of v and the
state after all tokens, or after the first ``stop`` [B] tokens of each row, which is how padding and tokens that may be
taken back stay out of it. Everything is computed in fp32 or more, whatever autocast says.

The ``joined`` functions put such sums and a softmax window under one normaliser; ``averaged_composed`` is a weighted
mean of both, with gates and features made from the keys themselves (Liger).

No exponent is ever positive: exp(-L_j) alone overflows after a few strong gates, so a factor exp(L_t - L_j) is split at
a token m between the two, exp(L_t - L_m) exp(L_m - L_j), and both parts are at most one.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from .tiles import (
    accumulator,
    full_precision,
    in_window,
    join,
    near_of,
    near_positions,
    per_head,
    probabilities_of,
    slot_masks,
    slots_of,
    tile_length,
    tiles_of,
    untile,
    window_mask,
    with_ones,
)

Side = Literal["key", "value"]

TILE = 64  # tokens between two states
LEAF = 4  # tokens that meet pair by pair and channel by channel


def _prepare(
    k: Tensor, v: Tensor, log_decay: Tensor, side: Side, eps: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """k, v and log_decay per state head in ``dtype``, v with a column of ones where the sum is normalised."""
    if side not in ("key", "value") or (eps is not None and side != "key"):
        raise ValueError(f"side={side!r}: choose key or value, and key with a normaliser")
    heads = k.shape[2]
    k, v, log_decay = (per_head(x.to(dtype), heads) for x in (k, v, log_decay))
    return k, v if eps is None else with_ones(v), log_decay


def _divide(y: Tensor, eps: float | None) -> Tensor:
    """The last column taken away from the others, and divided by."""
    if eps is None:
        return y
    num, den = y.split((y.shape[-1] - 1, 1), dim=-1)
    return num / (den + eps)


def _start(k: Tensor, v: Tensor, state: Tensor | None) -> Tensor:
    if state is not None:
        return state.to(k.dtype)
    return k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3])


def _fold(k: Tensor, v: Tensor, log_decay: Tensor, side: Side, state: Tensor, stop: Tensor | None) -> Tensor:
    """The state after the first ``stop`` tokens of each row; what follows them may hold anything."""
    if stop is not None:
        late = (torch.arange(k.shape[1], device=k.device) >= stop[:, None])[:, :, None, None]
        k, v, log_decay = (x.masked_fill(late, 0.0) for x in (k, v, log_decay))
    # Summed from the end: what matters are the short sums of the newest tokens, and those are exact.
    since = log_decay.flip(1).cumsum(1).flip(1)
    after = torch.exp(pad(since[:, 1:], (0, 0, 0, 0, 0, 1)))
    kept = torch.exp(since[:, 0])
    if side == "key":
        return kept[..., None] * state + torch.einsum("bthf,bthv->bhfv", k * after, v)
    return kept[..., None, :] * state + torch.einsum("bthf,bthv->bhfv", k, v * after)


@full_precision
def gated_quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    side: Side = "key",
    eps: float | None = None,
    state: Tensor | None = None,
    stop: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y [B, T, H, V], state): the sum written out over all pairs and channels, [B, T, T, H, F] in memory."""
    out_dtype, dtype, length = v.dtype, accumulator(q, k, v, log_decay), q.shape[1]
    k, v, log_decay = _prepare(k, v, log_decay, side, eps, dtype)
    start = _start(k, v, state)
    final = _fold(k, v, log_decay, side, start, stop)
    q, heads = q.to(dtype), q.shape[2]
    k, v, decay = (per_head(x, heads) for x in (k, v, log_decay))
    start = per_head(start[:, None], heads)[:, 0]
    total = decay.cumsum(1)
    future = ~torch.ones(length, length, dtype=torch.bool, device=q.device).tril()[:, :, None, None]
    pairs = torch.exp((total[:, :, None] - total[:, None]).masked_fill(future, -torch.inf))
    if side == "key":
        y = torch.einsum("bihf,bjhf,bijhf,bjhv->bihv", q, k, pairs, v)
        y = y + torch.einsum("bihf,bhfv->bihv", q * torch.exp(total), start)
    else:
        y = torch.einsum("bihf,bjhf,bijhv,bjhv->bihv", q, k, pairs, v)
        y = y + torch.exp(total) * torch.einsum("bihf,bhfv->bihv", q, start)
    return _divide(y, eps).to(out_dtype), final


@full_precision
def gated_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    side: Side = "key",
    eps: float | None = None,
    state: Tensor | None = None,
    stop: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y [B, T, H, V], state): one token after the other, for a few tokens."""
    out_dtype, dtype = v.dtype, accumulator(q, k, v, log_decay)
    k, v, log_decay = _prepare(k, v, log_decay, side, eps, dtype)
    q = q.to(dtype).unflatten(2, (k.shape[2], -1))  # [B, T, Hs, R, F]
    now = final = _start(k, v, state)
    outputs = []
    for t in range(q.shape[1]):
        decay = torch.exp(log_decay[:, t])
        decay = decay[..., None] if side == "key" else decay[..., None, :]
        now = decay * now + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(q[:, t] @ now)
        final = now if stop is None else torch.where((t < stop)[:, None, None, None], now, final)
    y = torch.stack(outputs, dim=1).flatten(2, 3)
    return _divide(y, eps).to(out_dtype), final


# Tiles: [B, Hs, N, C, D] for keys, values and decays, [B, Hs, N, C, R, F] for queries: the R heads of a group stand
# beside each other at every token, so that any run of tokens is one matrix of rows.


def _scan_tile(length: int) -> int:
    """C, a power of two from LEAF to TILE, no longer than needed."""
    return min(TILE, max(LEAF, 1 << (length - 1).bit_length()))


def _tiles(x: Tensor, tile: int) -> Tensor:
    """x [B, T, heads, ...] as [B, heads, N, C, ...], zeros after the end: they add nothing and forget nothing."""
    x = x.transpose(1, 2)
    x = pad(x, (0, 0) * (x.ndim - 3) + (0, -x.shape[2] % tile))
    return x.unflatten(2, (-1, tile)).contiguous()


def _leaves(q: Tensor, k: Tensor, v: Tensor, total: Tensor, side: Side) -> Tensor:
    """y [..., n, c, R, V] from pairs inside runs of c tokens; q [..., n, c, R, F], the others [..., n, c, D]."""
    length = k.shape[-2]
    future = ~torch.ones(length, length, dtype=torch.bool, device=k.device).tril()[:, :, None]
    gaps = total[..., :, None, :] - total[..., None, :, :]
    pairs = torch.exp(gaps.masked_fill(future, -torch.inf))  # [..., n, c, c, D]
    if side == "key":
        scores = q @ (k[..., None, :, :] * pairs).transpose(-1, -2)  # [..., n, c, R, c]
        return (scores.flatten(-3, -2) @ v).unflatten(-2, q.shape[-3:-1])
    scores = (q.flatten(-3, -2) @ k.transpose(-1, -2)).unflatten(-2, q.shape[-3:-1])
    return scores @ (v[..., None, :, :] * pairs)


def _halves(q: Tensor, k: Tensor, v: Tensor, total: Tensor, side: Side) -> Tensor:
    """What the second half of each run of 2 s tokens reads from its first half, [..., n, s, R, V]."""
    half = k.shape[-2] // 2
    middle = total[..., half - 1 : half, :]
    since = torch.exp(total[..., half:, :] - middle)  # from the middle to the query
    until = torch.exp(middle - total[..., :half, :])  # from the key to the middle
    q, k, v = q[..., half:, :, :], k[..., :half, :], v[..., :half, :]
    rows = q.shape[-3:-1]
    if side == "key":
        scores = (q * since[..., None, :]).flatten(-3, -2) @ (k * until).transpose(-1, -2)
        return (scores @ v).unflatten(-2, rows)
    y = (q.flatten(-3, -2) @ k.transpose(-1, -2)) @ (v * until)
    return since[..., None, :] * y.unflatten(-2, rows)


def _inside(q: Tensor, k: Tensor, v: Tensor, total: Tensor, side: Side) -> Tensor:
    """y [B, Hs, N, C, R, V] from keys of the same tile: leaves, then halves of runs twice as long each time."""
    tile, run = k.shape[3], LEAF

    def runs(x: Tensor) -> Tensor:
        return x.unflatten(3, (-1, run))

    y = _leaves(runs(q), runs(k), runs(v), runs(total), side).flatten(3, 4)
    while run < tile:
        run *= 2
        more = _halves(runs(q), runs(k), runs(v), runs(total), side)
        first, second = runs(y).chunk(2, dim=4)
        y = torch.cat((first, second + more), dim=4).flatten(3, 4)
    return y


def _states(k: Tensor, v: Tensor, total: Tensor, side: Side, start: Tensor) -> tuple[Tensor, Tensor]:
    """The state before every tile [B, Hs, N, F, V], and the one after the last."""
    end = total[..., -1:, :]
    after = torch.exp(end - total)
    k, v = (k * after, v) if side == "key" else (k, v * after)
    sums = k.transpose(-1, -2) @ v
    decay = torch.exp(end).transpose(-1, -2) if side == "key" else torch.exp(end)
    before = []
    for n in range(k.shape[2]):
        before.append(start)
        start = decay[:, :, n] * start + sums[:, :, n]
    return torch.stack(before, dim=2), start


@full_precision
def gated_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    side: Side = "key",
    eps: float | None = None,
    state: Tensor | None = None,
    stop: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y [B, T, H, V], state): ``gated_quadratic`` in time and memory linear in T, forward and backward.

    A tile of C queries meets the keys of its own tile and the state before it. Inside, only runs of LEAF tokens meet
    pair by pair; the second half of a longer run meets its first half as two matrices, the decay split at the middle.
    """
    out_dtype, dtype, length = v.dtype, accumulator(q, k, v, log_decay), q.shape[1]
    k, v, log_decay = _prepare(k, v, log_decay, side, eps, dtype)
    start, tile = _start(k, v, state), _scan_tile(length)
    final = None if stop is None else _fold(k, v, log_decay, side, start, stop)
    q = _tiles(q.to(dtype).unflatten(2, (k.shape[2], -1)), tile)
    k, v = _tiles(k, tile), _tiles(v, tile)
    total = _tiles(log_decay, tile).cumsum(dim=3)
    y = _inside(q, k, v, total, side)
    before, end = _states(k, v, total, side, start)
    if state is not None or k.shape[2] > 1:
        reach = torch.exp(total)[..., None, :]
        rows = (q * reach if side == "key" else q).flatten(3, 4)
        more = (rows @ before).unflatten(3, q.shape[3:5])
        y = y + (more if side == "key" else reach * more)
    y = _divide(y, eps).flatten(2, 3)[:, :, :length]  # [B, Hs, T, R, V]
    return y.transpose(1, 2).flatten(2, 3).to(out_dtype), end if final is None else final


# A window beside the sums, under one normaliser (arXiv 2509.18467): with s_ij = scale q_i . k_j and c_i its maximum
# over the window, y_i = (g sum exp(s_ij - c_i) v_j + num_i) / (g sum exp(s_ij - c_i) + den_i). The maximum is part of
# the function, as in reference.py. sums [B, T, H, V + 1] holds num and den; factor is g [H].


@full_precision
def joined_quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sums: Tensor,
    factor: Tensor,
    *,
    scale: float,
    window: int,
    softcap: float | None = None,
) -> Tensor:
    """y [B, T, H, V] of a sliding window joined with given sums, by dense masks."""
    dtype, heads = accumulator(q, k, v, sums), q.shape[2]
    scores = scale * torch.einsum("bihk,bjhk->bihj", q.to(dtype), per_head(k.to(dtype), heads))
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    inside, _ = window_mask(q.shape[1], window, "sliding", q.device)
    scores = scores.masked_fill(~inside[:, None], -torch.inf)
    weights = factor.to(dtype)[:, None] * torch.exp(scores - scores.amax(-1, keepdim=True))
    total = torch.einsum("bihj,bjhv->bihv", weights, per_head(with_ones(v.to(dtype)), heads)) + sums
    return (total[..., :-1] / total[..., -1:]).to(v.dtype)


@full_precision
def joined_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sums: Tensor,
    factor: Tensor,
    *,
    scale: float,
    window: int,
    softcap: float | None = None,
) -> Tensor:
    """y [B, T, H, V]: ``joined_quadratic`` in time and memory linear in T."""
    length, groups, dtype, out_dtype = q.shape[1], k.shape[2], accumulator(q, k, v, sums), v.dtype
    tile = tile_length(length, window, "sliding")
    q, k, v, sums = (tiles_of(x, tile, groups, dtype) for x in (q, k, v, sums))
    k, v = near_of(k[:, :, :, 0]), near_of(with_ones(v[:, :, :, 0]))
    query, key = near_positions(q.shape[2], tile, q.device)
    visible = in_window(query, key, window, "sliding") & (key <= query) & (key >= 0)
    probabilities = probabilities_of(q, k, visible[None, None], scale, softcap)
    return untile(join(probabilities, v, sums.flatten(3, 4), q, factor, None), length, out_dtype)


@full_precision
def joined_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sums: Tensor,
    factor: Tensor,
    *,
    key_positions: Tensor,
    query_positions: Tensor,
    scale: float,
    window: int,
    softcap: float | None = None,
) -> Tensor:
    """y [B, Tq, H, V] of a few queries against slots in any order, as ``window_recurrent``."""
    length, groups, dtype = q.shape[1], k.shape[2], accumulator(q, k, v, sums)
    queries, sums = (tiles_of(x, length, groups, dtype) for x in (q, sums))
    visible, _ = slot_masks(key_positions, query_positions, window, "sliding")
    probabilities = probabilities_of(queries, slots_of(k, dtype), visible, scale, softcap)
    values = with_ones(slots_of(v, dtype))
    return untile(join(probabilities, values, sums.flatten(3, 4), queries, factor, None), length, v.dtype)
