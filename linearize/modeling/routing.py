"""Few tokens of the older past stay exact, picked in every chunk by a score; all others go into one linear state.

Letters: B batch, T time, H query heads, G kv heads, Gs heads that select (H, or G where a group selects together), K
key dim, V value dim, F feature dim, C chunk, c(t) = floor(t / C), p picks. The past of a query t is the tokens of
chunks up to c(t) - 2; all that is nearer, up to t, is local. Each chunk parts the past anew (arXiv 2602.02180):

    picked    the p best of every chunk by score, ties to the lower position
    kept(t)   the n best of the picked tokens of the past (all of them where n is None), ties likewise
    linear(t) the past but for kept(t)

    E(t) = local(t) + kept(t);   e_j = scale q_t.k_j;   m = max_E e_j
    y_t  = [ sum_E exp(e_j - m) v_j + g_t * sum_linear (phi_q_t . phi_k_j) v_j ]
         / [ sum_E exp(e_j - m)     +       sum_linear (phi_q_t . phi_k_j) + eps ]

m is part of the function, as in ``reference.py``; g_t gates the linear numerator alone. A token that leaves the kept
set never returns, and is then added to the linear sums like one that was never picked; sums only grow.

Layouts: q [B, T, H, K]; k [B, T, G, K]; v [B, T, G, V]; phi_q [B, T, H, F]; phi_k [B, T, Hs, F], Hs = H, or G where Gs
is G too; score [B, T, Gs], -inf for a token that may not be picked; gate [B, T, H, V or 1], or None for 1. Index 0
stands on the chunk grid, and padding, whatever its score, right of all real tokens. Everything is computed in fp32, or
fp64 where the inputs are; no gradient passes through the selection.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .selection import (
    TILES_AT_ONCE,
    Gather,
    Kept,
    Running,
    best_of,
    exact_slots,
    kept_mask,
    ranked,
    rounded,
    running_best,
)
from .tiles import (
    accumulator,
    feature_tiles,
    from_state,
    full_precision,
    grouped,
    in_window,
    join_state,
    near_of,
    near_positions,
    per_head,
    probabilities_of,
    scores_of,
    slot_masks,
    slots_of,
    tiles_of,
    untile,
    with_ones,
)


class Past(NamedTuple):
    """Everything before index 0 that no query finds in its local span."""

    kept: Kept
    """Heads Gs."""
    phi: Tensor
    """[B, n, Hs, F] features of the kept keys, for when they leave."""
    kv: Tensor
    """[B, Hs, F, V], the sum of phi_k v^T over the others."""
    z: Tensor
    """[B, Hs, F], the sum of their phi_k."""


class Behind(NamedTuple):
    """What is behind the last tokens of whole rows."""

    kept: Kept | None
    """Heads Gs; None where it was not asked for, or is not known."""
    kv: Tensor
    """[B, Hs, F, V] fp32, the sum of phi_k v^T over all that has turned linear; not always contiguous."""
    z: Tensor
    """[B, Hs, F] fp32, the sum of their phi_k."""


# The score: how much of its own window's attention a token keeps for itself.


@torch.no_grad()
@full_precision
def self_saliency(q: Tensor, k: Tensor, *, scale: float, window: int, softcap: float | None = None) -> Tensor:
    """rho [B, T, H] = e_tt - logsumexp of e_tj over the last ``window`` tokens j <= t, so at most 0.

    With s = exp(rho), the weight that t pays to itself there, rho ranks as (1 - s) log(1 - s) + s log((s + eps) / eps)
    does, the divergence of arXiv 2602.02180, which grows with s.
    """
    length, groups, dtype = q.shape[1], k.shape[2], accumulator(q, k)
    tile = min(window, length)
    queries, keys = tiles_of(q, tile, groups, dtype), tiles_of(k, tile, groups, dtype)
    near = near_of(keys[:, :, :, 0])
    query, key = near_positions(queries.shape[2], tile, q.device)
    visible = (key >= 0) & (key <= query) & in_window(query, key, window, "sliding")
    share = probabilities_of(queries, near, visible[None, None], scale, softcap)
    own = share.unflatten(3, queries.shape[3:5]).diagonal(near.shape[3] - tile, -2, -1)  # [B, G, N, R, C]
    return untile(_log_share(own)[..., None], length, dtype).squeeze(-1)


@torch.no_grad()
@full_precision
def self_saliency_of(
    q: Tensor,
    k: Tensor,
    *,
    key_positions: Tensor,
    query_positions: Tensor,
    scale: float,
    window: int,
    softcap: float | None = None,
) -> Tensor:
    """rho [B, Tq, H] of a few tokens whose own keys are among n slots in any order, k [B, n, G, K].

    query_positions [B, Tq]; key_positions [B, n], negative for an empty slot (whose contents must be finite).
    """
    length, dtype = q.shape[1], accumulator(q, k)
    queries = tiles_of(q, length, k.shape[2], dtype)
    visible, _ = slot_masks(key_positions, query_positions, window, "sliding")
    share = probabilities_of(queries, slots_of(k, dtype), visible, scale, softcap).unflatten(
        3, queries.shape[3:5]
    )
    own = key_positions[:, None, :] == query_positions[:, :, None]
    share = (share * own[:, None, None, None]).sum(-1, keepdim=True)
    return untile(_log_share(share), length, dtype).squeeze(-1)


def ranks_of(rho: Tensor, groups: int) -> Tensor:
    """What heads select by [B, T, groups], from rho [B, T, H]: the mean share of those that select together."""
    rho = rho.unflatten(2, (groups, -1))
    return rounded(rho.logsumexp(-1) - math.log(rho.shape[-1]))


def _log_share(share: Tensor) -> Tensor:
    """A share that is too small for its type is still one: -inf would bar the token from being picked."""
    return share.clamp_min(torch.finfo(share.dtype).tiny).log()


# The meaning: dense masks.


@torch.no_grad()
def picks_of(score: Tensor, *, chunk: int, picks: int) -> Tensor:
    """[B, Gs, N, p] indices of the best of every complete chunk of score [B, Gs, T], in the order of positions."""
    count = score.shape[2] // chunk
    chunks = score[..., : count * chunk].unflatten(2, (count, chunk))
    start = chunk * torch.arange(count, device=score.device)[:, None]
    return best_of(chunks, picks).sort(dim=-1).values + start


def picked_mask(score: Tensor, *, chunk: int, picks: int) -> Tensor:
    """[B, Gs, T] whether a token of score [B, Gs, T] is picked."""
    index = picks_of(score, chunk=chunk, picks=picks).flatten(2)
    mask = torch.zeros_like(score, dtype=torch.bool).scatter(2, index, True)
    return mask & (score > -torch.inf)


def routing_masks(
    score: Tensor, *, chunk: int, picks: int, size: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(local, kept, linear): masks [T, T], [B, Gs, T, T] and [B, Gs, T, T], row = query, that part the causal keys."""
    picked = picked_mask(score.transpose(1, 2), chunk=chunk, picks=picks).transpose(1, 2)
    size = score.shape[1] if size is None else size
    kept, local = kept_mask(score.masked_fill(~picked, -torch.inf), chunk=chunk, size=size)
    causal = torch.ones_like(local).tril()
    return local, kept, causal & ~local & ~kept


@full_precision
def routed_quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    score: Tensor,
    gate: Tensor | None = None,
    *,
    scale: float,
    chunk: int,
    picks: int,
    size: int | None,
    eps: float = 1e-6,
    softcap: float | None = None,
) -> Tensor:
    """y [B, T, H, V]: the module's formula written out with T x T masks."""
    heads, dtype, out_dtype = q.shape[2], accumulator(q, k, v, phi_q, phi_k), v.dtype
    q, k, v, phi_q, phi_k = (x.to(dtype) for x in (q, k, v, phi_q, phi_k))
    local, kept, linear = routing_masks(score, chunk=chunk, picks=picks, size=size)
    kept, linear = (x.repeat_interleave(heads // score.shape[2], dim=1) for x in (kept, linear))
    scores = scores_of(q, k, scale, softcap).masked_fill(~(local | kept), -torch.inf)
    exact = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    others = torch.einsum("bihf,bjhf->bhij", phi_q, per_head(phi_k, heads)).masked_fill(~linear, 0.0)
    v = per_head(v, heads)
    remainder = torch.einsum("bhij,bjhv->bihv", others, v)
    if gate is not None:
        remainder = gate.to(dtype) * remainder
    den = (exact.sum(-1) + others.sum(-1) + eps).transpose(1, 2)[..., None]
    return ((torch.einsum("bhij,bjhv->bihv", exact, v) + remainder) / den).to(out_dtype)


# Many queries, and few.


def _join(
    probabilities: Tensor, values: Tensor, linear: Tensor | None, gate: Tensor | None, eps: float
) -> Tensor:
    """y [B, Gs, N, R*C, V] from the softmax over E, values [B, Gs, N, n, V+1] and the linear sums, both with their
    denominators: the module's formula divided by sum_E exp(e - m), whose inverse is the largest probability."""
    joint = probabilities @ values
    share = probabilities.max(dim=-1, keepdim=True).values
    num, den = joint.split((joint.shape[-1] - 1, 1), dim=-1)
    if linear is not None:
        remainder, mass = linear.split((linear.shape[-1] - 1, 1), dim=-1)
        num = num + share * (remainder if gate is None else gate * remainder)
        den = den + share * mass
    return num / (den + share * eps)


def _gate_rows(gate: Tensor | None, tile: int, groups: int, dtype: torch.dtype) -> Tensor | None:
    """gate as [B, Gs, N, R*C, V or 1]."""
    return None if gate is None else tiles_of(gate, tile, groups, dtype).flatten(3, 4)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` [B, Gs, N, n] of x [B, Gs, P, D], each in one place at most: [B, Gs, N, n, D]."""
    flat = index.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, flat).unflatten(2, index.shape[2:])


@torch.no_grad()
def _routes(
    score: Tensor, first: int, *, count: int, chunk: int, picks: int, size: int | None
) -> tuple[Running, Tensor, Tensor]:
    """The kept sets of every chunk, the rows that turn linear with it [B, Gs, N, C + p], and whether they do.

    score [B, Gs, first + T]: slots kept already, best first, then tokens; indices are into the same axis.
    """
    tokens = score[..., first:]
    routed = max(0, count - 2)  # chunks that some query has in its past
    old = torch.arange(first, device=score.device).expand(*score.shape[:2], -1)
    pool = torch.cat(
        (old, first + picks_of(tokens[..., : routed * chunk], chunk=chunk, picks=picks).flatten(2)), -1
    )
    size = pool.shape[-1] if size is None else size
    sets = running_best(score.gather(-1, pool), first, count=count, chunk=picks, size=size)
    index, left = (pool.gather(-1, x.flatten(2)).view_as(x) for x in (sets.index, sets.left))

    start = first + chunk * (torch.arange(count, device=score.device) - 2)[:, None]
    passing = start + torch.arange(chunk, device=score.device)  # [N, C], tokens of the second last chunk
    unpicked = ~picked_mask(tokens[..., : routed * chunk], chunk=chunk, picks=picks).unflatten(
        2, (routed, chunk)
    )
    unpicked = pad(unpicked, (0, 0, count - routed, 0))
    passing = passing.clamp_min(0).expand(*score.shape[:2], -1, -1)
    turning = torch.cat((passing, left), dim=-1)
    turns = torch.cat((unpicked, sets.left_score > -torch.inf), dim=-1)
    return sets._replace(index=index, left=left), turning, turns


@full_precision
def routed_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    score: Tensor,
    gate: Tensor | None = None,
    *,
    scale: float,
    chunk: int,
    picks: int,
    size: int | None,
    eps: float = 1e-6,
    softcap: float | None = None,
    past: Past | None = None,
) -> Tensor:
    """y [B, T, H, V]: ``routed_quadratic`` after ``past``, in time and memory linear in T where ``size`` is set.

    The tokens that turn linear with a chunk are few and known: what its second last chunk did not pick, and who left
    the kept set. So the sums advance by one small product a chunk.
    """
    length, groups, out_dtype = q.shape[1], score.shape[2], v.dtype
    dtype, shared = accumulator(q, k, v, phi_q, phi_k), phi_k.shape[2] // groups
    count, tile = -(-length // chunk), min(chunk, length)
    k, v, phi_k = per_head(k, groups), with_ones(per_head(v, groups)), grouped(phi_k, groups)
    near_k, near_v = (near_of(tiles_of(x, tile, groups, dtype)[:, :, :, 0]) for x in (k, v))
    if past is not None:
        held = (past.kept.k, with_ones(past.kept.v), grouped(past.phi, groups), past.kept.score)
        k, v, phi_k, score = (
            torch.cat((old.to(new.dtype), new), 1)
            for old, new in zip(held, (k, v, phi_k, score), strict=True)
        )
    k, v, phi_k = (x.to(dtype).transpose(1, 2) for x in (k, v, phi_k))  # [B, Gs, P, D], kept slots in front
    score = score.detach().transpose(1, 2)
    first = score.shape[2] - length
    sets, turning, turns = _routes(score, first, count=count, chunk=chunk, picks=picks, size=size)

    q_tiles, gates = tiles_of(q, tile, groups, dtype), _gate_rows(gate, tile, groups, dtype)
    phi_q = feature_tiles(phi_q, tile, groups, shared, dtype)
    query, key = near_positions(count, tile, q.device)
    local = ((key >= 0) & (key <= query))[None, None]  # two tiles are all of the local span
    sums = None if past is None else join_state((past.kv, past.z), groups, dtype)
    outputs = []
    for start in range(0, count, TILES_AT_ONCE):
        part = slice(start, start + TILES_AT_ONCE)
        far, there = sets.index[:, :, part], sets.score[:, :, part, None] > -torch.inf
        visible = torch.cat([x.expand(*far.shape[:3], tile, -1) for x in (there, local[:, :, part])], dim=-1)
        keys = torch.cat((Gather.apply(k, far), near_k[:, :, part]), dim=3)
        values = torch.cat((Gather.apply(v, far), near_v[:, :, part]), dim=3)
        probabilities = probabilities_of(q_tiles[:, :, part], keys, visible, scale, softcap)
        grown = _rows(phi_k, turning[:, :, part]).masked_fill(~turns[:, :, part, :, None], 0.0)
        grown = grown.transpose(-1, -2) @ _rows(v, turning[:, :, part])  # [B, Gs, N, r*F, V+1]
        grown = grown.unflatten(3, (shared, -1)).cumsum(dim=2)
        states = grown if sums is None else sums + grown
        sums = states[:, :, -1:]
        linear = from_state(phi_q[:, :, part], states)
        outputs.append(
            _join(probabilities, values, linear, None if gates is None else gates[:, :, part], eps)
        )
    return untile(torch.cat(outputs, dim=2).unflatten(3, q_tiles.shape[3:5]), length, out_dtype)


@full_precision
def routed_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    kept: Kept,
    kv: Tensor,
    z: Tensor,
    gate: Tensor | None = None,
    *,
    key_positions: Tensor,
    query_positions: Tensor,
    scale: float,
    chunk: int,
    eps: float = 1e-6,
    softcap: float | None = None,
) -> Tensor:
    """y [B, Tq, H, V] of queries of one chunk against their kept set, their linear sums and n slots in any order.

    query_positions [B, Tq]; k [B, n, G, K], v [B, n, G, V]; key_positions [B, n], negative for an empty slot (whose
    contents must be finite). Slots past the local span are not attended: ``kept`` and the sums have them.
    """
    length, groups = q.shape[1], kept.score.shape[2]
    dtype = accumulator(q, k, v, phi_q)
    queries = tiles_of(q, length, groups, dtype)
    visible = exact_slots(kept, key_positions, query_positions, chunk)
    keys = slots_of(torch.cat((kept.k, per_head(k, groups)), dim=1), dtype)
    values = with_ones(slots_of(torch.cat((kept.v, per_head(v, groups)), dim=1), dtype))
    probabilities = probabilities_of(queries, keys, visible, scale, softcap)
    features = feature_tiles(phi_q, length, groups, z.shape[1] // groups, dtype)
    linear = from_state(features, join_state((kv, z), groups, dtype))
    y = _join(probabilities, values, linear, _gate_rows(gate, length, groups, dtype), eps)
    return untile(y.unflatten(3, queries.shape[3:5]), length, v.dtype)


# The hand-over from the local span.


def route(
    kept: Kept, k: Tensor, v: Tensor, score: Tensor, leaving: Tensor, *, chunk: int, picks: int, size: int
) -> tuple[Kept, Kept, Tensor]:
    """What becomes of the oldest columns: (the kept set with their picks, who left it, columns that turn linear).

    k [B, n, G, K], v, score [B, n, Gs] are columns on the chunk grid, of which the first ``leaving`` [B], whole chunks,
    have left the local span. The kept set gets ``size`` slots; the second holds up to n p / C tokens, -inf in its empty
    slots; the mask [B, n, Gs] is True for tokens that were not picked.
    """
    groups = score.shape[2]
    gone = (torch.arange(k.shape[1], device=k.device) < leaving[:, None])[..., None]
    ranks = score.masked_fill(~gone, -torch.inf).transpose(1, 2)
    index = picks_of(ranks, chunk=chunk, picks=picks).flatten(2).transpose(1, 2)  # [B, m, Gs]

    def rows(x: Tensor) -> Tensor:
        return x.gather(1, index[..., None].expand(-1, -1, -1, x.shape[-1]))

    ranks = ranks.transpose(1, 2)
    picked = torch.zeros_like(ranks, dtype=torch.bool).scatter(1, index, True) & (ranks > -torch.inf)
    best, left = ranked(
        kept, rows(per_head(k, groups)), rows(per_head(v, groups)), ranks.gather(1, index), size
    )
    return best, left, gone & ~picked
