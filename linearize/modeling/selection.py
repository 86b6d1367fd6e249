"""Exact attention over a bounded set, chosen by a score that each token has once and for all: quadratic (the meaning),
chunked (O(T)), recurrent (decode).

Letters: B batch, T time, H query heads, G heads that select (the kv heads, or as many as k and v come with), K key dim,
V value dim, C chunk, c(t) = floor(t / C), n kept tokens. A query t attends, by softmax with the model's scale, to

    local   { j <= t : c(j) >= c(t) - 1 }     its own chunk up to itself and the whole chunk before it
    kept    the n best of { j : c(j) <= c(t) - 2 } by score; ties go to the lower position

and to nothing else. As scores never change, the kept set of a longer past is the best n of an earlier kept set and the
tokens that came since: ``merge_kept`` adds a chunk to it, and whoever drops out never returns. Chunks are handed over
whole, so prefill and decode keep the same tokens.

Layouts: q [B, T, H, K]; k [B, T, G, K]; v [B, T, G, V]; score [B, T, G], -inf for a token that may not be kept and
inf for one that always is. Index 0 stands on the chunk grid, and padding, whatever its score, right of all real tokens.
Attention is computed in fp32, or fp64 where the inputs are; no gradient passes through the selection.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .tiles import (
    accumulator,
    full_precision,
    in_window,
    near_of,
    near_positions,
    per_head,
    probabilities_of,
    scores_of,
    slots_of,
    tiles_of,
    untile,
)

TILES_AT_ONCE = 16
"""Query tiles whose kept keys are laid out side by side; bounds what a long prefill holds beside its output."""


GRID = 2.0**-12
"""Step to which scores are rounded before they are ranked, so that ties go to the lower position at any split."""


def rounded(score: Tensor) -> Tensor:
    """Equal tokens have equal scores but for the rounding of products, which depends on how a text is split."""
    return (score / GRID).round() * GRID


class Kept(NamedTuple):
    """The kept tokens of every head that selects, best first."""

    k: Tensor
    """[B, n, G, K]."""
    v: Tensor
    """[B, n, G, V]."""
    score: Tensor
    """[B, n, G], -inf in an empty slot (whose k and v must be finite)."""


# The meaning: dense masks.


def kept_mask(score: Tensor, *, chunk: int, size: int) -> tuple[Tensor, Tensor]:
    """(kept, local): masks [B, G, T, T] and [T, T], row = query, from the definition alone: a token is kept when fewer
    than ``size`` of the tokens past the query's local span come before it by score, then position."""
    time = score.shape[1]
    position = torch.arange(time, device=score.device)
    older = position < (chunk * (position // chunk - 1))[:, None]
    one, other = score.transpose(1, 2)[..., :, None], score.transpose(1, 2)[..., None, :]
    before = (one > other) | ((one == other) & (position[:, None] < position))  # [B, G, T, T]
    rank = torch.einsum("ti,bgij->bgtj", older.double(), before.double())
    kept = older & (rank < size) & (other > -torch.inf)
    return kept, (position <= position[:, None]) & ~older


@full_precision
def kept_quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    *,
    scale: float,
    chunk: int,
    size: int,
    softcap: float | None = None,
) -> Tensor:
    """y [B, T, H, V] by the module's definition, with T x T masks."""
    heads, dtype, out_dtype = q.shape[2], accumulator(q, k, v), v.dtype
    q, k, v = (x.to(dtype) for x in (q, k, v))
    kept, local = kept_mask(score, chunk=chunk, size=size)
    visible = (kept | local).repeat_interleave(heads // k.shape[2], dim=1)
    scores = scores_of(q, k, scale, softcap).masked_fill(~visible, -torch.inf)
    y = torch.einsum("bhij,bjhv->bihv", torch.softmax(scores, dim=-1), per_head(v, heads))
    return y.to(out_dtype)


@torch.no_grad()
def future_attention(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    chunk: int,
    softcap: float | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """[B, T, G] the largest softmax attention that a token gets, over the heads of its group and all queries t with
    c(t) >= c(j) + 2; zero where there is no such query among the first ``lengths`` [B] tokens.

    A running maximum over chunks of queries: C x T probabilities a head at a time, never T x T.
    """
    time, groups, dtype = q.shape[1], k.shape[2], accumulator(q, k)
    found = k.new_zeros(len(k), groups, time, dtype=dtype)
    position = torch.arange(time, device=q.device)
    for start in range(2 * chunk, time, chunk):
        stop, old = min(start + chunk, time), start - chunk
        queries = tiles_of(q[:, start:stop], stop - start, groups, dtype)  # [B, G, 1, R, C, K]
        causal = (position[:stop] <= position[start:stop, None])[None, None, None]
        weights = probabilities_of(queries, slots_of(k[:, :stop], dtype), causal, scale, softcap)[..., :old]
        if lengths is not None:
            real = (position[start:stop] < lengths[:, None]).repeat(1, queries.shape[3])  # [B, R*C]
            weights = weights * real[:, None, None, :, None]
        found[..., :old] = found[..., :old].maximum(weights.amax(dim=(2, 3)))
    return found.transpose(1, 2)


@torch.no_grad()
def future_logit(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    chunk: int,
    softcap: float | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """[B, T, G] the largest scaled logit that a token gets, by heads and queries as in ``future_attention``; zero where
    no query asks."""
    time, groups, dtype = q.shape[1], k.shape[2], accumulator(q, k)
    found = k.new_full((len(k), groups, time), -torch.inf, dtype=dtype)
    position = torch.arange(time, device=q.device)
    for start in range(2 * chunk, time, chunk):
        stop, old = min(start + chunk, time), start - chunk
        scores = scores_of(q[:, start:stop].to(dtype), k[:, :old].to(dtype), scale, softcap)  # [B, H, C, old]
        if lengths is not None:
            pads = position[start:stop] >= lengths[:, None]
            scores = scores.masked_fill(pads[:, None, :, None], -torch.inf)
        found[..., :old] = found[..., :old].maximum(scores.unflatten(1, (groups, -1)).amax(dim=(2, 3)))
    return found.masked_fill(found == -torch.inf, 0.0).transpose(1, 2)


# The kept set as it grows.


@torch.no_grad()
def best_of(score: Tensor, size: int) -> Tensor:
    """Indices [..., size] of the best scores on the last axis, best first, equal ones in their order."""
    return score.argsort(dim=-1, descending=True, stable=True)[..., :size]


def merge_kept(kept: Kept, k: Tensor, v: Tensor, score: Tensor) -> Kept:
    """The best of the kept tokens and of later ones k, v, score [B, m, G, ...], in as many slots as before."""
    return ranked(kept, k, v, score, kept.score.shape[1], others=False)[0]


def first_kept(kept: Kept, k: Tensor, v: Tensor, score: Tensor) -> Kept:
    """``merge_kept`` where all slots are empty and no token is barred."""
    index = best_of(score.transpose(1, 2), kept.score.shape[1]).transpose(1, 2)[..., None]
    best = [x.gather(1, index.expand(-1, -1, -1, x.shape[-1])) for x in (k, v, score[..., None])]
    best[2] = best[2].squeeze(-1)
    filled = index.shape[1]
    return Kept(
        *(torch.cat((new.to(old.dtype), old[:, filled:]), 1) for new, old in zip(best, kept, strict=True))
    )


def ranked(
    kept: Kept, k: Tensor, v: Tensor, score: Tensor, size: int, *, others: bool = True
) -> tuple[Kept, Kept]:
    """The kept tokens and later ones k, v, score [B, m, G, ...] in the order of their scores: the ``size`` best of
    them, and the others, of which there are no more than m (none where they are not asked for: m may be long)."""
    together = torch.cat((kept.score, score), dim=1)
    index = best_of(together.transpose(1, 2), together.shape[1]).transpose(1, 2)  # [B, n + m, G]
    index = index[:, : size + (score.shape[1] if others else 0)]

    def chosen(old: Tensor, new: Tensor) -> Tensor:
        pool = torch.cat((old, new.to(old.dtype)), dim=1)
        return pool.gather(1, index[..., None].expand(-1, -1, -1, pool.shape[-1]))

    order = Kept(chosen(kept.k, k), chosen(kept.v, v), together.gather(1, index))
    return Kept(*(x[:, :size] for x in order)), Kept(*(x[:, size:] for x in order))


class Running(NamedTuple):
    """The kept set of every chunk, as indices into a pool of tokens, and who left it on the way there."""

    index: Tensor
    """[B, G, N, n], best first; what an empty slot points to is not kept."""
    score: Tensor
    """[B, G, N, n], -inf in an empty slot."""
    left: Tensor
    """[B, G, N, m], who drops out with this chunk: kept until then, or a candidate that is not taken in."""
    left_score: Tensor
    """[B, G, N, m], -inf in an empty slot."""


@torch.no_grad()
def running_best(score: Tensor, first: int, *, count: int, chunk: int, size: int) -> Running:
    """For each of ``count`` chunks the set that its queries read, and the tokens that the set loses there.

    score [B, G, first + (at least) (count - 2) chunk]: the slots that are kept already, best first, then ``chunk``
    candidates for every chunk. The set of chunk c holds slots and candidates of chunks up to c - 2; n is ``size``, or
    less where the pool is smaller.
    """
    width = min(size, first + max(0, count - 2) * chunk)
    index = torch.zeros(*score.shape[:2], count, width, dtype=torch.long, device=score.device)
    found = score.new_full(index.shape, -torch.inf)
    left = index.new_zeros(*score.shape[:2], count, chunk if count > 2 else 0)
    left_score = score.new_full(left.shape, -torch.inf)
    best = torch.arange(first, device=score.device).expand(*score.shape[:2], -1)[..., :width]
    for tile in range(count):
        if tile >= 2:
            start = first + (tile - 2) * chunk
            new = torch.arange(start, start + chunk, device=score.device).expand(*score.shape[:2], -1)
            best = torch.cat((best, new), dim=-1)
            best = best.gather(-1, best_of(score.gather(-1, best), best.shape[-1]))
            gone = best[..., width:]
            left[:, :, tile, : gone.shape[-1]] = gone
            left_score[:, :, tile, : gone.shape[-1]] = score.gather(-1, gone)
            best = best[..., :width]
        index[:, :, tile, : best.shape[-1]] = best
        found[:, :, tile, : best.shape[-1]] = score.gather(-1, best)
    return Running(index, found, left, left_score)


class Gather(torch.autograd.Function):
    """Rows ``index`` [B, G, N, n] of ``pool`` [B, G, P, D]: [B, G, N, n, D].

    A token stands in many sets, so that one scatter of the gradient would add in no fixed order on a GPU. Inside a set
    it stands once: set by set, the sum is the same in every run. (Empty slots repeat an index and have zero gradient.)
    """

    @staticmethod
    def forward(ctx: Any, pool: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = pool.shape
        flat = index.flatten(2)[..., None].expand(-1, -1, -1, pool.shape[-1])
        return pool.gather(2, flat).unflatten(2, index.shape[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (index,), (gradient,) = ctx.saved_tensors, gradients
        total = gradient.new_zeros(ctx.shape)
        for tile in range(index.shape[2]):
            total.scatter_add_(
                2, index[:, :, tile, :, None].expand_as(gradient[:, :, tile]), gradient[:, :, tile]
            )
        return total, None


# Many queries, and few.


@full_precision
def kept_chunked(
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
    """y [B, T, H, V]: ``kept_quadratic`` in time and memory linear in T; ``kept`` holds the best of what came before
    index 0, all of it past the local span of every query that matters."""
    length, groups, dtype, out_dtype = q.shape[1], k.shape[2], accumulator(q, k, v), v.dtype
    first = 0 if kept is None else kept.score.shape[1]
    pool_k, pool_v, pool_score = (
        (k, v, score)
        if kept is None
        else (
            torch.cat((old, new.to(old.dtype)), dim=1) for old, new in zip(kept, (k, v, score), strict=True)
        )
    )
    sets = running_best(
        pool_score.detach().transpose(1, 2), first, count=-(-length // chunk), chunk=chunk, size=size
    )
    pool_k, pool_v = (x.to(dtype).transpose(1, 2) for x in (pool_k, pool_v))  # [B, G, P, D]

    tile = chunk if length > chunk else length
    q, k, v = (tiles_of(x, tile, groups, dtype) for x in (q, k, v))
    near_k, near_v = near_of(k[:, :, :, 0]), near_of(v[:, :, :, 0])
    query, key = near_positions(q.shape[2], tile, q.device)
    local = ((key >= 0) & (key <= query))[None, None]  # two tiles are all of the local span
    outputs = []
    for start in range(0, q.shape[2], TILES_AT_ONCE):
        part = slice(start, start + TILES_AT_ONCE)
        far = sets.index[:, :, part]
        keys = torch.cat((Gather.apply(pool_k, far), near_k[:, :, part]), dim=3)
        values = torch.cat((Gather.apply(pool_v, far), near_v[:, :, part]), dim=3)
        there = (sets.score[:, :, part, None] > -torch.inf).expand(-1, -1, -1, tile, -1)
        visible = torch.cat((there, local[:, :, part].expand(*there.shape[:4], -1)), dim=-1)
        y = probabilities_of(q[:, :, part], keys, visible, scale, softcap) @ values
        outputs.append(y.unflatten(3, q.shape[3:5]))
    return untile(torch.cat(outputs, dim=2), length, out_dtype)


def exact_slots(kept: Kept, key_positions: Tensor, query_positions: Tensor, chunk: int) -> Tensor:
    """[B, G, 1, Tq, n + m] which kept tokens and which slots of a few queries are attended, by positions as in
    ``kept_recurrent``."""
    key, query = key_positions[:, None, None, None], query_positions[:, None, None, :, None]
    local = (key >= 0) & (key <= query) & in_window(query, key, chunk, "terraced")  # [B, 1, 1, Tq, m]
    there = (kept.score > -torch.inf).transpose(1, 2)[:, :, None, None]  # [B, G, 1, 1, n]
    shape = (-1, there.shape[1], -1, query.shape[3], -1)
    return torch.cat((there.expand(*shape), local.expand(*shape)), dim=-1)


@full_precision
def kept_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Kept,
    *,
    key_positions: Tensor,
    query_positions: Tensor,
    scale: float,
    chunk: int,
    softcap: float | None = None,
) -> Tensor:
    """y [B, Tq, H, V] of queries of one chunk against their kept set and n slots in any order.

    query_positions [B, Tq]; k [B, n, G, K], v [B, n, G, V]; key_positions [B, n], negative for an empty slot (whose
    contents must be finite). Slots past the local span are not attended: ``kept`` has the best of them.
    """
    length, dtype = q.shape[1], accumulator(q, k, v)
    queries = tiles_of(q, length, k.shape[2], dtype)
    visible = exact_slots(kept, key_positions, query_positions, chunk)
    keys, values = (slots_of(torch.cat(pair, dim=1), dtype) for pair in ((kept.k, k), (kept.v, v)))
    y = probabilities_of(queries, keys, visible, scale, softcap) @ values
    return untile(y.unflatten(3, queries.shape[3:5]), length, v.dtype)
