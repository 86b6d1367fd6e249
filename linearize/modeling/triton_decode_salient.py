"""y [B, 1, H, V] of one new token a row against a kept set and the local span, the set updated in place in one launch.

The function is ``selection.kept_recurrent`` after ``selection.merge_kept`` (salient.py), or that of STILL, which
``triton_decode_still.py`` makes of what is here. At the first token of a chunk the chunk before the last one leaves
the local span and is ranked among the kept tokens. Slots are sorted, best first, ties to the lower position, so that
places are counts: a kept token moves down by the number of better new ones, a new one stands after the kept ones that
are as good and the new ones that are better, or as good and older. Rows only move down. They are moved from the last
tile of slots to the first, each tile read before it is written, and the new ones fill what is left.

A program has a key/value head with all its query heads, of GR in the layer, of which a launch may have only some (those
of one budget): nobody else reads its tokens, and its new one is written last,
into the slot of one that may be leaving. Counters are as in ``triton_decode.py``.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launches import Launch, launch
from .triton_decode_tools import FEW, arrive, begin, held_columns, held_rows, meet, padded, rows_of, scores

GRID = tl.constexpr(2.0**-12)  # as selection.GRID
HALVES = tl.constexpr(1.5 * 2.0**23)  # added, it leaves an fp32 number below 2^22 no place for a fraction


@triton.jit
def on_grid(score):
    """``selection.rounded``, halves to even."""
    steps = score / GRID
    near = (steps + HALVES) - HALVES
    return tl.where(tl.abs(steps) < 4194304.0, near, tl.floor(steps + 0.5)) * GRID


@triton.jit
def ahead_of(score, there):
    """[n] how many of the tokens ``there`` come before each: better, or as good and older."""
    order = tl.arange(0, score.shape[0])
    better = (score[None, :] > score[:, None]) | (
        (score[None, :] == score[:, None]) & (order[None, :] < order[:, None])
    )
    return tl.sum((better & there[None, :]).to(tl.int32), 1)


@triton.jit
def places(kept_score, score, new, G: tl.constexpr, SLOTS: tl.constexpr, BS: tl.constexpr):
    """[n] the slots that the ``new`` tokens of these scores take among the kept ones; from SLOTS on they take none."""
    place = ahead_of(score, new)
    for c in range(0, SLOTS, BS):
        at = c + tl.arange(0, BS)
        held = tl.load(kept_score + at * G, mask=at < SLOTS, other=-float("inf"))
        ahead = (held[None, :] >= score[:, None]) & (at < SLOTS)[None, :]
        place += tl.sum(ahead.to(tl.int32), 1)
    return place


@triton.jit
def rows_at(x, at, there, D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr):
    """Rows ``at`` [n] of x [., G, D] where they are ``there``: [n, DP]."""
    od = tl.arange(0, DP)
    return tl.load(
        x + at[:, None] * (G * D) + od[None, :], mask=there[:, None] & (od < D)[None, :], other=0.0
    )


@triton.jit
def put_rows(x, at, there, rows, D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr):
    od = tl.arange(0, DP)
    tl.store(x + at[:, None] * (G * D) + od[None, :], rows, mask=there[:, None] & (od < D)[None, :])


@triton.jit
def take_in(
    kept_k,
    kept_v,
    kept_score,
    ring_k,
    ring_v,
    slot,
    score,
    new,
    place,
    G: tl.constexpr,
    GR: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    SLOTS: tl.constexpr,
    BS: tl.constexpr,
):
    """Move the kept tokens to their new slots, and the ``new`` ones of the rings' slots to theirs, ``place``."""
    tiles: tl.constexpr = (SLOTS + BS - 1) // BS
    for i in range(0, tiles):
        at = (tiles - 1 - i) * BS + tl.arange(0, BS)
        there = at < SLOTS
        held = tl.load(kept_score + at * G, mask=there, other=-float("inf"))
        to = at + tl.sum(((score[None, :] > held[:, None]) & new[None, :]).to(tl.int32), 1)
        keys = rows_at(kept_k, at, there, K, KP, G)
        values = rows_at(kept_v, at, there, V, VP, G)
        moves = there & (to < SLOTS)
        tl.debug_barrier()
        tl.store(kept_score + to * G, held, mask=moves)
        put_rows(kept_k, to, moves, keys, K, KP, G)
        put_rows(kept_v, to, moves, values, V, VP, G)
        tl.debug_barrier()
    enters = new & (place < SLOTS)
    tl.store(kept_score + place * G, score, mask=enters)
    put_rows(kept_k, place, enters, rows_at(ring_k, slot, enters, K, KP, GR), K, KP, G)
    put_rows(kept_v, place, enters, rows_at(ring_v, slot, enters, V, VP, GR), V, VP, G)
    tl.debug_barrier()


@triton.jit
def meet_kept(
    heads,
    kept_k,
    kept_v,
    kept_score,
    high,
    total,
    acc,
    scale,
    cap,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    SLOTS: tl.constexpr,
    SP: tl.constexpr,
    CAP: tl.constexpr,
    BN: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Online softmax over the kept tokens, which stand in the first slots: an empty one has the score -inf."""
    at = tl.arange(0, SP)
    held = tl.load(kept_score + at * G, mask=at < SLOTS, other=-float("inf"))
    count = tl.sum((held > -float("inf")).to(tl.int32))
    for j in tl.range(0, count, BN, num_stages=DEPTH):
        pos = j + tl.arange(0, BN)
        keys = held_columns(kept_k, pos, count, 0, K, KP, SLOTS, G)
        values = held_rows(kept_v, pos, count, 0, V, VP, SLOTS, G)
        high, total, acc = meet(scores(heads, keys, scale, cap, CAP), values, pos < count, high, total, acc)
    return high, total, acc


@triton.jit
def salient_step_kernel(
    q,
    k,
    v,
    score,
    ring_k,
    ring_v,
    ring_score,
    kept_k,
    kept_v,
    kept_score,
    seen,
    folded,
    y,
    scale,
    cap,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    H: tl.constexpr,
    G: tl.constexpr,
    GR: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    N: tl.constexpr,
    SLOTS: tl.constexpr,
    KEPT: tl.constexpr,
    CHUNK: tl.constexpr,
    CP: tl.constexpr,
    CAP: tl.constexpr,
    SP: tl.constexpr,
    BN: tl.constexpr,
    BS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    R: tl.constexpr = H // G
    b = tl.program_id(1)
    row = b.to(tl.int64)
    g = tl.program_id(0)
    t = (tl.load(seen + b) & 0x7FFFFFFF).to(tl.int32)
    done = tl.load(folded + b).to(tl.int32)
    first = tl.maximum(tl.maximum((t // CHUNK - 1) * CHUNK, 0), done)
    od, ov, rows = tl.arange(0, KP), tl.arange(0, VP), tl.arange(0, 16)
    k += row * k_row + g * k_head
    v += row * v_row + g * v_head
    ring_k += (row * N * GR + g) * K
    ring_v += (row * N * GR + g) * V
    ring_score += row * N * GR + g
    kept_k += (row * KEPT + g) * K
    kept_v += (row * KEPT + g) * V
    kept_score += row * KEPT + g
    if first > done:
        pos = done + tl.arange(0, CP)
        new = pos < first
        rank = tl.load(ring_score + (pos % N) * GR, mask=new, other=-float("inf"))
        place = places(kept_score, rank, new, G, SLOTS, BS)
        take_in(
            kept_k, kept_v, kept_score, ring_k, ring_v, pos % N, rank, new, place,
            G, GR, K, V, KP, VP, SLOTS, BS,
        )  # fmt: skip
    heads = tl.load(
        q + row * q_row + (g * R + rows)[:, None] * q_head + od[None, :],
        mask=(rows < R)[:, None] & (od < K)[None, :],
        other=0.0,
    )
    high, total, acc = begin(heads, k, v, scale, cap, 0, K, V, KP, VP, CAP)
    high, total, acc = meet_kept(
        heads, kept_k, kept_v, kept_score, high, total, acc, scale, cap,
        G, K, V, KP, VP, SLOTS, SP, CAP, BN, DEPTH,
    )  # fmt: skip
    for j in tl.range(first, t, BN, num_stages=DEPTH):
        pos = j + tl.arange(0, BN)
        keys = held_columns(ring_k, pos, t, 0, K, KP, N, GR)
        values = held_rows(ring_v, pos, t, 0, V, VP, N, GR)
        high, total, acc = meet(scores(heads, keys, scale, cap, CAP), values, pos < t, high, total, acc)
    out = acc / total[:, None]
    tl.store(
        y + (row * H + g * R + rows)[:, None] * V + ov[None, :],
        out.to(y.dtype.element_ty),
        mask=(rows < R)[:, None] & (ov < V)[None, :],
    )
    tl.debug_barrier()
    tl.store(ring_k + (t % N) * (GR * K) + od, tl.load(k + od, mask=od < K), mask=od < K)
    tl.store(ring_v + (t % N) * (GR * V) + ov, tl.load(v + ov, mask=ov < V), mask=ov < V)
    rank = on_grid(tl.load(score + row * G + g).to(tl.float32))
    tl.store(ring_score + (t % N) * GR, tl.where(t == 0, float("inf"), rank))
    arrive(seen + b, folded + b, t + 1, first, GR)


def salient_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_score: Tensor,
    kept_k: Tensor,
    kept_v: Tensor,
    kept_score: Tensor,
    seen: Tensor,
    folded: Tensor,
    *,
    score: Tensor,
    scale: float,
    chunk: int,
    softcap: float | None = None,
    settings: Launch | None = None,
) -> Tensor:
    """y [B, 1, H, V]; rings [B, 2 C, G, ...], kept tokens [B, N, G, ...] and the counters are written; score [B, 1, G]
    is the new token's, neither rounded nor raised for the first: the kernel does what would be seven small launches.

    The heads may be some of a layer's, with rings and kept tokens sliced from the whole ones: the counters advance when
    every head of the rings has been stepped."""
    (batch, _, heads, key_dim), (groups, value_dim) = q.shape, v.shape[2:]
    y = v.new_empty(batch, 1, heads, value_dim)
    inputs = [rows_of(x) for x in (q, k, v)]
    name = "salient_step_few" if batch * groups < FEW else "salient_step"
    settings = settings or launch(name, q.device, K=key_dim, V=value_dim, dtype=q.dtype)
    constants: dict[str, Any] = dict(
        H=heads,
        G=groups,
        GR=ring_k.stride(1) // key_dim,
        K=key_dim,
        V=value_dim,
        KP=padded(key_dim),
        VP=padded(value_dim),
        N=ring_k.shape[1],
        SLOTS=kept_k.shape[1],
        SP=padded(kept_k.shape[1]),
        KEPT=kept_k.stride(0) // key_dim,
        CHUNK=chunk,
        CP=padded(chunk),
        CAP=softcap is not None,
    )
    arguments: list[Any] = [
        *inputs,
        score.contiguous(),
        ring_k,
        ring_v,
        ring_score,
        kept_k,
        kept_v,
        kept_score,
        seen,
        folded,
        y,
        scale,
        softcap or 0.0,
        *(stride for x in inputs for stride in x.stride()[:2]),
    ]
    salient_step_kernel[(groups, batch)](*arguments, **constants, **settings.options)
    return y
