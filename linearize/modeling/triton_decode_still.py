"""STILL's step: y [B, 1, H, V] of one new token a row, its kept set and sums advanced in place in one launch.

The function is ``routing.routed_recurrent`` after ``routing.route``. Of the chunk that leaves the local span the picks
are ranked among the kept tokens, as in ``triton_decode_salient.py``; what was not picked, or drops out, is added to the
sums, before the query meets either. A program has one query head: its kept tokens, its sums and the
score of its new token, rho = e_tt - logsumexp of the last C scores, rounded as the reference rounds it. The ring is
read by all heads of a group and has a slot more, so that the new token's is not one of a token that is leaving.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launches import Launch, launch
from .selection import GRID
from .triton_common import to_grid
from .triton_decode_salient import ahead_of, meet_kept, places, take_in
from .triton_decode_tools import (
    FEW,
    LOW,
    MAPS,
    arrive,
    begin,
    fold_in,
    held_columns,
    held_rows,
    key_features,
    meet,
    meet_sums,
    padded,
    query_features,
    rows_of,
    scores,
)

STEPS = tl.constexpr(round(1 / GRID))
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal fp32


@triton.jit
def still_step_kernel(
    q,
    k,
    v,
    score,
    gate,
    ring_k,
    ring_v,
    ring_score,
    kept_k,
    kept_v,
    kept_score,
    kv,
    z,
    seen,
    folded,
    map_q,
    map_k,
    extra_q,
    extra_k,
    y,
    scale,
    cap,
    eps,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    F: tl.constexpr,  # of one half
    KP: tl.constexpr,
    VP: tl.constexpr,
    FP: tl.constexpr,
    N: tl.constexpr,
    NS: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    CP: tl.constexpr,
    PICKS: tl.constexpr,
    PP: tl.constexpr,
    GIVEN: tl.constexpr,
    FIRST: tl.constexpr,
    GATE: tl.constexpr,
    HALVES: tl.constexpr,
    MAP: tl.constexpr,
    CAP: tl.constexpr,
    SP: tl.constexpr,
    BN: tl.constexpr,
    BS: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BF: tl.constexpr,
    DEPTH: tl.constexpr,
):
    b = tl.program_id(1)
    row = b.to(tl.int64)
    h = tl.program_id(0)
    g = h // (H // G)
    t = (tl.load(seen + b) & 0x7FFFFFFF).to(tl.int32)
    done = tl.load(folded + b).to(tl.int32)
    first = tl.maximum(tl.maximum((t // CHUNK - 1) * CHUNK, 0), done)
    od, ov, rows = tl.arange(0, KP), tl.arange(0, VP), tl.arange(0, 16)
    q += row * q_row + h * q_head
    k += row * k_row + g * k_head
    v += row * v_row + g * v_head
    ring_k += (row * N * G + g) * K
    ring_v += (row * N * G + g) * V
    ring_score += row * NS * H + h
    kept_k += (row * SLOTS * H + h) * K
    kept_v += (row * SLOTS * H + h) * V
    kept_score += row * SLOTS * H + h
    kv += (row * H + h) * (HALVES * F * V)
    z += (row * H + h) * (HALVES * F)
    map_k += h * K * F
    extra_k += h * (F if MAP == 2 else K)
    if first > done:
        pos = done + tl.arange(0, CP)
        leaves = pos < first
        rank = tl.load(ring_score + (pos % NS) * H, mask=leaves, other=-float("inf"))
        picked = leaves & (ahead_of(rank, leaves) < PICKS) & (rank > -float("inf"))
        place = places(kept_score, rank, picked, H, SLOTS, BS)
        # The last slots hold whoever drops out: no more than there are picks.
        last: tl.constexpr = SLOTS - PP if SLOTS > PP else 0
        at = last + tl.arange(0, PP)
        held = tl.load(kept_score + at * H, mask=at < SLOTS, other=-float("inf"))
        better = tl.sum(((rank[None, :] > held[:, None]) & picked[None, :]).to(tl.int32), 1)
        drops = (at < SLOTS) & (held > -float("inf")) & (at + better >= SLOTS)
        turns = leaves & ~(picked & (place < SLOTS))
        leaving = turns.to(tl.int32)
        for j in range(0, CP, BO):
            some = j + tl.arange(0, BO)
            up, down = key_features(ring_k, k, t, done + some, first, map_k, extra_k, K, F, FP, BK, N, G, MAP)
            there = (tl.gather(leaving, some, 0) > 0)[None, :]
            up, down = tl.where(there, up, 0.0), tl.where(there, down, 0.0)
            fold_in(kv, z, up, down, ring_v, v, t, done + some, first, F, V, FP, VP, N, G, HALVES, BV)
        up, down = key_features(kept_k, k, SLOTS, at, SLOTS, map_k, extra_k, K, F, FP, BK, SLOTS, H, MAP)
        up, down = tl.where(drops[None, :], up, 0.0), tl.where(drops[None, :], down, 0.0)
        fold_in(kv, z, up, down, kept_v, v, SLOTS, at, SLOTS, F, V, FP, VP, SLOTS, H, HALVES, BV)
        tl.debug_barrier()
        take_in(
            kept_k, kept_v, kept_score, ring_k, ring_v, pos % N, rank, picked, place,
            H, G, K, V, KP, VP, SLOTS, BS,
        )  # fmt: skip

    heads = tl.load(
        q + rows[:, None] * 0 + od[None, :], mask=(rows < 1)[:, None] & (od < K)[None, :], other=0.0
    )
    high, total, acc = begin(heads, k, v, scale, cap, 0, K, V, KP, VP, CAP)
    own, above, near = high, high, total  # of the new token's score: its own, and the softmax over a chunk
    for j in tl.range(first, t, BN, num_stages=DEPTH):
        pos = j + tl.arange(0, BN)
        keys = held_columns(ring_k, pos, t, 0, K, KP, N, G)
        values = held_rows(ring_v, pos, t, 0, V, VP, N, G)
        s = scores(heads, keys, scale, cap, CAP)
        high, total, acc = meet(s, values, pos < t, high, total, acc)
        if not GIVEN:
            s = tl.where(((pos < t) & (pos > t - CHUNK))[None, :], s, LOW)
            higher = tl.maximum(above, tl.max(s, 1))
            near = near * tl.exp(above - higher) + tl.sum(tl.exp(s - higher[:, None]), 1)
            above = higher
    if GIVEN:
        rho = tl.load(score + row * H + h).to(tl.float32)
    else:  # the logarithm of what the new token's query pays to itself
        share = tl.log(tl.maximum(tl.exp(own - above) / near, TINY))
        rho = to_grid(tl.sum(tl.where(rows == 0, share, 0.0)), STEPS)
        if FIRST:
            rho = tl.where(t == 0, float("inf"), rho)
    tl.store(ring_score + (t % NS) * H, rho)
    high, total, acc = meet_kept(
        heads, kept_k, kept_v, kept_score, high, total, acc, scale, cap,
        H, K, V, KP, VP, SLOTS, SP, CAP, BN, DEPTH,
    )  # fmt: skip
    num = tl.sum(tl.where((rows == 0)[:, None], acc, 0.0), 0)
    den = tl.sum(tl.where(rows == 0, total, 0.0)) + eps

    up, down = query_features(
        q, map_q + h * K * F, extra_q + h * (F if MAP == 2 else K), K, F, FP, BK, DEPTH, MAP
    )  # fmt: skip
    linear, weight = meet_sums(kv, z, up, down, F, V, FP, VP, HALVES, BF, DEPTH)
    den += weight
    if GATE == 1:
        linear *= tl.load(gate + row * H + h).to(tl.float32)
    if GATE == 2:
        linear *= tl.load(gate + (row * H + h) * V + ov, mask=ov < V, other=0.0).to(tl.float32)
    tl.store(y + (row * H + h) * V + ov, ((num + linear) / den).to(y.dtype.element_ty), mask=ov < V)
    if h % (H // G) == 0:
        tl.store(ring_k + (t % N) * (G * K) + od, tl.load(k + od, mask=od < K), mask=od < K)
        tl.store(ring_v + (t % N) * (G * V) + ov, tl.load(v + ov, mask=ov < V), mask=ov < V)
    arrive(seen + b, folded + b, t + 1, first, H)


def still_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_score: Tensor,
    kept_k: Tensor,
    kept_v: Tensor,
    kept_score: Tensor,
    kv: Tensor,
    z: Tensor,
    seen: Tensor,
    folded: Tensor,
    *,
    score: Tensor | None,
    gate: Tensor | None,
    maps: tuple[Tensor, Tensor],
    extras: tuple[Tensor, Tensor] | None,
    feature_map: str,
    scale: float,
    chunk: int,
    picks: int,
    keep_first: bool,
    eps: float,
    softcap: float | None = None,
    settings: Launch | None = None,
) -> Tensor:
    """y [B, 1, H, V]; rings [B, 2 C + 1, G or H, .], kept tokens [B, N, H, .], sums and counters are written.

    score [B, 1, H] where the new token's does not depend on the text; gate [B, 1, H, V or 1]; maps and extras as in
    ``triton_decode.joint_step``.
    """
    (batch, _, heads, key_dim), (groups, value_dim) = q.shape, v.shape[2:]
    y = v.new_empty(batch, 1, heads, value_dim)
    inputs = [rows_of(x) for x in (q, k, v)]
    halves = 2 if MAPS[feature_map] in (0, 4, 5, 6) else 1
    width = z.shape[-1] // halves
    name = "still_step_few" if batch * heads < FEW else "still_step"
    widths: dict[str, Any] = dict(K=key_dim, V=value_dim, F=width, dtype=q.dtype)
    settings = settings or launch(name, q.device, **widths)
    blocks = dict(settings.blocks)
    blocks |= {"BK": min(blocks["BK"], padded(key_dim)), "BV": min(blocks["BV"], padded(value_dim))}
    blocks |= {"BF": min(blocks["BF"], padded(width)), "BO": min(blocks["BO"], padded(chunk))}
    extra_q, extra_k = extras or (y, y)
    constants: dict[str, Any] = dict(
        H=heads,
        G=groups,
        K=key_dim,
        V=value_dim,
        F=width,
        KP=padded(key_dim),
        VP=padded(value_dim),
        FP=padded(width),
        N=ring_k.shape[1],
        NS=ring_score.shape[1],
        SLOTS=kept_k.shape[1],
        SP=padded(kept_k.shape[1]),
        CHUNK=chunk,
        CP=padded(chunk),
        PICKS=picks,
        PP=padded(picks),
        GIVEN=score is not None,
        FIRST=keep_first,
        GATE=0 if gate is None else 1 if gate.shape[-1] == 1 else 2,
        HALVES=halves,
        MAP=MAPS[feature_map],
        CAP=softcap is not None,
    )
    arguments: list[Any] = [
        *inputs,
        y if score is None else score.contiguous(),
        y if gate is None else gate.contiguous(),
        ring_k,
        ring_v,
        ring_score,
        kept_k,
        kept_v,
        kept_score,
        kv,
        z,
        seen,
        folded,
        *maps,
        extra_q,
        extra_k,
        y,
        scale,
        softcap or 0.0,
        eps,
        *(stride for x in inputs for stride in x.stride()[:2]),
    ]
    still_step_kernel[(heads, batch)](*arguments, **constants, **settings._replace(blocks=blocks).options)
    return y
