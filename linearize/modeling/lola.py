"""A bounded exact memory behind LoLCATs' window for what the sums recall worst: definition, chunked, recurrent.

McDermott, Heath and Parhi, LoLA: Low-Rank Linear Attention with Sparse Caching, arXiv 2505.23666. Letters as in
``reference.py``; t stands in block floor(t / W). When a query first enters block n, block n - 2 leaves the window as a
whole. Its pairs and the N cached ones are candidates, ranked by what the sums S, z as they are recall for their keys:

    e_j = || S^T phi_k(k_j) / (z . phi_k(k_j)) - v_j ||^2        inf where the denominator is 0 (nothing was summed yet)

The N largest stay exact, ties going to the lower position; the others are added to S and z and never return. A query
then weighs cached pairs as it weighs its window, g exp(s_ij - c_i), with c_i the maximum over both.

S moves with every hand-over, so all candidates are scored anew each time, and the outcome depends on the order: a long
text is walked block by block. Blocks stand on the terraced grid, so that hand-overs are a function of position alone
and any split of a text gives the same memory. Every head with sums of its own has a cache of its own.

Departures. The paper hands over token by token or by chunks of the call; here it is always by blocks of W. Errors are
ranked in steps (GRID), those under FLOOR of the value's square counting as none: candidates that differ by no more than
rounding are ties. No gradient passes through the choice; what is kept and what is summed have theirs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import fold
from .tiles import (
    accumulator,
    feature_tiles,
    from_state,
    full_precision,
    join,
    join_state,
    per_head,
    probabilities_of,
    scores_of,
    slot_masks,
    slots_of,
    tiles_of,
    untile,
    with_ones,
)

Features = Callable[[Tensor], Tensor]
"""phi_k [B, n, Hs, F] of keys [B, n, Hs, K] or [B, n, G, K]."""

GRID = 2.0**-12
"""Steps of log2 of the error in which pairs are ranked."""
FLOOR = 2.0**-20
"""What counts as perfect recall, a share of the value's square."""


class Sparse(NamedTuple):
    """What has left the window: N exact pairs for every head with a state, and the sums of the others."""

    k: Tensor
    """[B, N, Hs, K]; empty slots first, then by position."""
    v: Tensor
    """[B, N, Hs, V], likewise."""
    kv: Tensor
    """[B, Hs, F, V], at least fp32."""
    z: Tensor
    """[B, Hs, F]."""
    count: Tensor
    """[B] tokens that have left; all of them are cached while there is room."""

    def filled(self) -> Tensor:
        """[B, N] whether a slot holds a pair."""
        size = self.k.shape[1]
        return torch.arange(size, device=self.k.device) >= size - self.count[:, None]


@torch.no_grad()
@full_precision
def recall_rank(kv: Tensor, z: Tensor, phi_k: Tensor, v: Tensor) -> Tensor:
    """[B, n, Hs] what pairs are ranked by: the self-recall error of phi_k [B, n, Hs, F], v [B, n, Hs, V], in steps."""
    dtype = accumulator(kv, z)
    phi_k, v = phi_k.to(dtype), v.to(dtype)
    weight = torch.einsum("bnhf,bhf->bnh", phi_k, z)
    recalled = torch.einsum("bnhf,bhfv->bnhv", phi_k, kv) / weight[..., None]
    error = (recalled - v).square().sum(-1).masked_fill(weight == 0, torch.inf)
    floor = (FLOOR * v.square().sum(-1)).clamp_min(torch.finfo(dtype).tiny)
    return ((error + floor).log2() / GRID).round()


# The meaning: token by token, one head after the other.


def sparse_by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    features: Features,
    window_factor: Tensor,
    linear_factor: Tensor | None = None,
    *,
    scale: float,
    window: int,
    size: int,
    softcap: float | None = None,
) -> tuple[Tensor, list[list[list[int]]]]:
    """(y [B, T, H, V], the positions cached in the end, by row and head with a state)."""
    scores, heads = scores_of(q, k, scale, softcap), q.shape[2]
    phi_k = features(k)
    shared = heads // phi_k.shape[2]  # query heads that read one state
    v = per_head(v, phi_k.shape[2])
    y, cached = q.new_zeros(*q.shape[:3], v.shape[-1]), []
    for b in range(len(q)):
        cached.append([])
        for s in range(phi_k.shape[2]):
            phi, value = phi_k[b, :, s], v[b, :, s]
            kv, z = phi.new_zeros(phi.shape[-1], value.shape[-1]), phi.new_zeros(phi.shape[-1])
            kept: list[int] = []
            for t in range(q.shape[1]):
                if t % window == 0 and t >= 2 * window:
                    pool = kept + list(range(t - 2 * window, t - window))
                    rank = recall_rank(
                        kv[None, None], z[None, None], phi[None, pool, None], value[None, pool, None]
                    )
                    order = sorted(range(len(pool)), key=lambda i, r=rank[0, :, 0]: (-float(r[i]), pool[i]))
                    kept = sorted(pool[i] for i in order[:size])
                    for j in sorted(set(pool) - set(kept)):
                        kv, z = kv + torch.outer(phi[j], value[j]), z + phi[j]
                exact = kept + list(range(max(0, (t // window - 1) * window), t + 1))
                for h in range(s * shared, (s + 1) * shared):
                    weights = window_factor[h] * torch.exp(
                        scores[b, h, t, exact] - scores[b, h, t, exact].max()
                    )
                    factor = 1.0 if linear_factor is None else linear_factor[h]
                    num = weights @ value[exact] + factor * phi_q[b, t, h] @ kv
                    y[b, t, h] = num / (weights.sum() + factor * phi_q[b, t, h] @ z)
            cached[b].append(kept)
    return y, cached


# The memory as it moves.


@full_precision
def hand_over(k: Tensor, v: Tensor, features: Features, leaves: Tensor, *, memory: Sparse) -> Sparse:
    """The memory after a block k [B, W, G, K], v [B, W, G, V], of which rows ``leaves`` [B] hand theirs over.

    Every block is scored and summed in one call of this shape, so that no split of a text changes a bit of a rank.
    """
    size = memory.k.shape[1]
    k, v = _beside(memory, k, v)
    there = torch.cat((memory.filled(), leaves[:, None].expand(-1, k.shape[1] - size)), dim=1)  # [B, N + W]
    phi_k = features(k)
    with torch.no_grad():
        rank = recall_rank(memory.kv, memory.z, phi_k, v).masked_fill(~there[..., None], -torch.inf)
        best = rank.argsort(dim=1, descending=True, stable=True)[:, :size].sort(dim=1).values  # [B, N, Hs]
        stays = torch.zeros_like(rank, dtype=torch.bool).scatter(1, best, True)
    chosen_k, chosen_v = (x.gather(1, best[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (k, v))
    kv, z = fold(memory.kv, memory.z, phi_k.masked_fill(stays[..., None], 0.0), v, there)
    return Sparse(chosen_k, chosen_v, kv, z, memory.count + leaves * (there.shape[1] - size))


def _beside(memory: Sparse, k: Tensor, v: Tensor) -> list[Tensor]:
    """k [B, n, G, K], v [B, n, G, V] after the cached pairs, one for every head with a state: [B, N + n, Hs, ...]."""
    pairs = ((memory.k, k), (memory.v, v))
    return [torch.cat((old, per_head(new, memory.z.shape[1]).to(old.dtype)), dim=1) for old, new in pairs]


def hand_over_all(
    k: Tensor, v: Tensor, features: Features, *, memory: Sparse, leaving: Tensor, window: int
) -> Sparse:
    """The memory after the first ``leaving`` [B] columns of k [B, n, G, K], v [B, n, G, V], whole blocks."""
    for start in range(0, int(leaving.max()), window):
        block = slice(start, start + window)
        memory = hand_over(k[:, block], v[:, block], features, leaving > start, memory=memory)
    return memory


# Many queries, and few.


def sparse_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    features: Features,
    window_factor: Tensor,
    linear_factor: Tensor | None = None,
    *,
    memory: Sparse,
    leaving: Tensor | None = None,
    scale: float,
    window: int,
    softcap: float | None = None,
) -> tuple[Tensor, Sparse]:
    """(y [B, T, H, V], the memory after the first ``leaving`` [B] columns, or after all that left where it is None).

    Index 0 stands on the grid, and ``memory`` holds what came before it. Blocks of queries one after the other: N + 2 W
    scores a query, whatever T.
    """
    position = torch.arange(q.shape[1], device=q.device).expand(len(q), -1)
    outputs, final, everyone = [], memory, torch.ones(len(q), dtype=torch.bool, device=q.device)
    for start in range(0, q.shape[1], window):
        own, near = slice(start, start + window), slice(max(0, start - window), start + window)
        if start >= 2 * window:
            left = slice(start - 2 * window, start - window)
            memory = hand_over(k[:, left], v[:, left], features, everyone, memory=memory)
            final = memory if leaving is None else _rows(leaving >= left.stop, memory, final)
        outputs.append(
            sparse_recurrent(
                q[:, own],
                k[:, near],
                v[:, near],
                phi_q[:, own],
                window_factor,
                linear_factor,
                memory=memory,
                key_positions=position[:, near],
                query_positions=position[:, own],
                scale=scale,
                window=window,
                softcap=softcap,
            )
        )
    return torch.cat(outputs, dim=1), final


def _rows(which: Tensor, new: Sparse, old: Sparse) -> Sparse:
    """The rows ``which`` [B] of ``new``, the others of ``old``."""
    pairs = zip(new, old, strict=True)
    return Sparse(*(torch.where(which.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs))


@full_precision
def sparse_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    window_factor: Tensor,
    linear_factor: Tensor | None = None,
    *,
    memory: Sparse,
    key_positions: Tensor,
    query_positions: Tensor,
    scale: float,
    window: int,
    softcap: float | None = None,
) -> Tensor:
    """y [B, Tq, H, V] of queries of one block against the memory they meet and n slots in any order.

    query_positions [B, Tq]; k [B, n, G, K], v [B, n, G, V]; key_positions [B, n], negative for an empty slot (whose
    contents must be finite). Slots past the window are not attended: the memory has them.
    """
    length, groups, dtype = q.shape[1], memory.z.shape[1], accumulator(q, k, v, phi_q)
    out_dtype, (k, v) = v.dtype, _beside(memory, k, v)
    queries = tiles_of(q, length, groups, dtype)
    keys, values = slots_of(k, dtype), with_ones(slots_of(v, dtype))
    local, _ = slot_masks(key_positions, query_positions, window, "terraced")  # [B, 1, 1, Tq, n]
    filled = memory.filled()[:, None, None, None].expand(-1, -1, -1, length, -1)
    probabilities = probabilities_of(queries, keys, torch.cat((filled, local), dim=-1), scale, softcap)
    phi = feature_tiles(phi_q, length, groups, 1, dtype)
    linear = from_state(phi, join_state((memory.kv, memory.z), groups, dtype))
    y = join(probabilities, values, linear, queries, window_factor, linear_factor)
    return untile(y, length, out_dtype)
