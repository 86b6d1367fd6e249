"""STILL's attention, ``routing.routed_chunked`` after the feature maps, forward.

    y = ( sum_E exp(e - m) v + g * (phi_q S) ) / ( sum_E exp(e - m) + phi_q z + eps ),   S, z: sums of linear tokens

Selection says of every token with which chunk it turns linear (``triton_selected``): most with the second chunk after
their own, and those that were kept until then with a later one; there are no more of these than the chunk has tokens
that are kept now, so that they take their places in its tile. Two steps:

1. sums      S and z of every chunk (``triton_selected_states``)
2. outputs   phi_q S, its gate and phi_q z, softmax over the local and the kept keys, and the quotient

Local keys and sums come by descriptors, a tile ahead of their use; kept keys are gathered by index.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import Launch, cdiv, launch, widths_of
from .routing import Behind
from .selection import Kept
from .triton_selected import Sets, running_sets
from .triton_selected_kept import (
    LOG2E,
    MASKED,
    fitted,
    in_rows,
    odd_slots,
    rows_at,
    shape_of,
    strides_of,
)
from .triton_selected_states import half_of, halves, pieces, sharpness, turns_of
from .triton_tiles import block, matrices, matrix, tile, tiles
from .triton_together import compiled_together


@triton.jit
def extremes(a, F: tl.constexpr):
    """The greatest and the least of the first F columns of each row."""
    if a.shape[1] == F:
        return tl.max(a, 1), tl.min(a, 1)
    real = tl.arange(0, a.shape[1])[None, :] < F
    return tl.max(tl.where(real, a, float("-inf")), 1), tl.min(tl.where(real, a, float("inf")), 1)


@triton.jit
def meet(q, keys, values, seen, m, total, y, scale):
    """Keys and values [n, .] in an online softmax of queries that meet those that are ``seen``; the maximum m is in
    powers of two, as is ``scale``, above zero. A query must have met a key before it meets keys of which it sees
    none."""
    s = tl.where(seen, tl.dot(q, tl.trans(keys), input_precision="ieee"), MASKED)
    new = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new[:, None])
    shrink = tl.exp2(m - new)
    total = total * shrink + tl.sum(p, 1)
    y = tl.dot(p.to(values.dtype), values, y * shrink[:, None], input_precision="ieee")
    return new, total, y


@triton.jit
def gathered(x, index, stride, D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``index`` [n] of x [T, D]: [n, BLOCK]."""
    column = tl.arange(0, BLOCK)
    at = x + index.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(at) if D == BLOCK else tl.load(at, mask=(column < D)[None, :], other=0.0)


@triton.jit
def meet_kept(
    q, k, v, index, j, stop, m, total, y, k_t, v_t, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """``meet`` of the kept keys number j [n], as far as there are ``stop``: all are older than every query."""
    at = tl.load(index + j, mask=j < stop, other=-1)
    row = tl.maximum(at, 0)  # an empty slot reads a token that is not seen
    keys, values = gathered(k, row, k_t, K, BK), gathered(v, row, v_t, V, BV)
    return meet(q, keys, values, (at >= 0)[None, :], m, total, y, scale)


@triton.jit(do_not_specialize=["time", "n", "odd", "count", "start", "chunks", "run", "runs"])
def outputs_kernel(
    q, near_k, near_v, k, v, index, gate, w, states, bases, sums, linear, room, y, top, den,
    time, n, odd, count, start, chunks, run, runs, scale, eps,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    GS: tl.constexpr, HS: tl.constexpr, G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, C: tl.constexpr, NEAR: tl.constexpr,
    P: tl.constexpr, TAIL: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, SAVE: tl.constexpr,
    keys: tl.constexpr,
):  # fmt: skip
    """y [B, T, H, V] of ``chunks`` chunks from ``start`` on; SAVE: also the row maximum (in powers of two), the
    denominator [B, H, T] and, where there is a gate, the linear numerator [B, T, H, V] without it. GATE: the gate's
    width, 0 for none. ``room`` [B, T, H, V] is where the linear part waits. Grid (H, chunks, B)."""
    H: tl.constexpr = G * R
    h, piece, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    c, select = start + piece, h // (H // GS)
    t = c * C + tl.arange(0, C)
    live = t < time
    queries = rows_at(q + b * q_b + h * q_h, t, q_t, live, K, BK)
    k += b * k_b + h // R * k_h
    v += b * v_b + h // R * v_h
    index += ((b * GS + select) * count + c) * n
    f, e = tl.arange(0, FP), tl.arange(0, BV)
    wide = live[:, None] if V == BV else live[:, None] & (e < V)[None, :]
    row = (b * time + t) * H + h
    place = row[:, None] * V + e[None, :]

    # The linear part first, which then waits in memory: registers do not hold it beside the exact one.
    mass = tl.full([C], eps, tl.float32)
    acc = tl.zeros([C, BV], tl.float32)
    if c >= 2:
        x = queries.to(tl.float32)
        length = tl.sqrt(tl.sum(x * x, 1))
        a = tl.dot(queries, matrix(w, h, BK, FP), input_precision="ieee")
        head = tl.program_id(2) * HS + h // (H // HS)
        own, before = head * chunks + piece, head * runs + piece // run
        sharp = sharpness(a, length, NORM)
        highest, lowest = extremes(a, F)
        for half in tl.range(2, num_stages=2):  # one half's sums come while the other's are read
            slope = tl.where(half == 0, sharp, -sharp)
            phi = tl.exp2(a * slope[:, None] - (tl.where(half == 0, highest, lowest) * slope)[:, None])
            if FP > F:
                phi = tl.where(f[None, :] < F, phi, 0.0)
            phi *= (1.0 / tl.sum(phi, 1))[:, None]
            z = tl.load(sums + own.to(tl.int64) * 2 * F + half * F + f, mask=f < F, other=0.0)
            mass += tl.sum(phi * z[None, :], 1)
            narrow = phi.to(states.dtype)
            acc = tl.dot(narrow, half_of(states, own, half, FP, BV).T, acc, input_precision="ieee")
            if c >= run:  # nothing is before the first run
                acc = tl.dot(narrow, half_of(bases, before, half, FP, BV).T, acc, input_precision="ieee")
    if GATE > 0:
        if SAVE:
            tl.store(linear + place, acc.to(linear.dtype.element_ty), mask=wide)
        at_gate = gate + row[:, None] * GATE + (e[None, :] if GATE > 1 else 0)
        acc *= tl.load(at_gate, mask=wide, other=0.0).to(tl.float32)
    tl.store(room + place, acc.to(room.dtype.element_ty), mask=wide)

    m = tl.full([C], MASKED, tl.float32)
    total = tl.zeros([C], tl.float32)
    acc = tl.zeros([C, BV], tl.float32)
    # The chunk itself, where every query meets one key at least, then the one before it.
    for i in tl.range(tl.where(c > 0, 2, 1), num_stages=2):
        begin, last = (c - i) * C, tl.where(i == 0, t, c * C - 1)
        seen = (begin + tl.arange(0, NEAR))[None, :] <= last[:, None]
        own_keys = tile(near_k, tl.program_id(2), begin, h // R, NEAR, BK)
        own_values = tile(near_v, tl.program_id(2), begin, h // R, NEAR, BV)
        m, total, acc = meet(queries, own_keys, own_values, seen, m, total, acc, scale)

    filled = tl.minimum(n, tl.maximum(c - 1, 0) * P)
    first = tl.minimum(filled, odd)
    if TAIL > 0:
        m, total, acc = meet_kept(
            queries, k, v, index, tl.arange(0, TAIL), first, m, total, acc, k_t, v_t, scale, K, V, BK, BV
        )
    for begin in range(first, filled, keys):
        j = begin + tl.arange(0, keys)
        m, total, acc = meet_kept(
            queries, k, v, index, j, filled, m, total, acc, k_t, v_t, scale, K, V, BK, BV
        )

    total += mass
    tl.debug_barrier()  # another thread may have written what is read here
    acc += tl.load(room + place, mask=wide, other=0.0).to(tl.float32)
    tl.store(y + place, (acc * (1.0 / total)[:, None]).to(y.dtype.element_ty), mask=wide)
    if SAVE:
        line = (b * H + h) * time + t
        tl.store(top + line, m, mask=live)
        tl.store(den + line, total, mask=live)


class Routed(NamedTuple):
    """The forward pass, and what a backward pass reads of it."""

    y: Tensor
    linear: Tensor | None
    """[B, T, H, V] the linear numerator without its gate; None without a gate, or where nothing is saved."""
    top: Tensor
    """[B, H, T] the row maximum over the exact keys, of scores in powers of two."""
    den: Tensor
    """[B, H, T] the denominator."""
    kv: Tensor
    """[B, Hs, 2 f, V] fp32, the sum of phi_k v^T over all that has turned linear with the last chunk of each row."""
    z: Tensor
    """[B, Hs, 2 f] fp32, the sum of their phi_k."""


def routed_forward(
    q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, sets: Sets, gate: Tensor | None = None,
    *, scale: float, chunk: int, norm: bool, eps: float, lengths: Tensor | None = None,
    save: bool = False, settings: dict[str, Launch] | None = None,
) -> Routed:  # fmt: skip
    """w_q [H, K, f], w_k [Hs, K, f] contiguous and in the dtype of q; gate [B, T, H, V or 1]; ``norm``: STILL's map,
    where it is false Hedgehog's. Queries past ``lengths`` [B] may see too little. ``top`` and ``den`` hold something
    where they are to be saved."""
    batch, time, heads = q.shape[:3]
    q, k, v = (in_rows(x) for x in (q, k, v))
    gate = None if gate is None else gate.contiguous()
    assert sets.left is not None
    select, count, n, picks = (
        sets.index.shape[1],
        sets.index.shape[2],
        sets.index.shape[3],
        sets.left.shape[3],
    )
    shape = shape_of(q, k, v, GS=select, C=chunk, P=picks)
    device, strides, features = q.device, strides_of(q=q, k=k, v=v), w_q.shape[2]

    setting = (settings or {}).get("selected_outputs") or launch(
        "selected_outputs", device, **widths_of(q, v, w_q)
    )
    exact: dict[str, Any] = dict(dtype=torch.float32, device=device)
    y = torch.empty(batch, time, heads, shape["V"], dtype=v.dtype, device=device)
    # The linear part waits in y until the exact keys are met; as a sum of the whole past it may not fit into fp16.
    sums = torch.float32 if y.dtype == torch.float16 else y.dtype
    room = y if y.dtype == sums else torch.empty_like(y, dtype=sums)
    linear = torch.empty_like(y, dtype=sums) if save and gate is not None else None
    top, den = (torch.empty(batch, heads, time if save else 0, **exact) for _ in range(2))
    kv = torch.empty(batch, len(w_k), shape["V"], 2 * features, **exact)
    z = torch.empty(batch, len(w_k), 2 * features, **exact)
    constants = shape | fitted(setting, q, 1)
    constants |= dict(HS=len(w_k), F=features, NORM=norm, SAVE=save)
    constants |= dict(BK=block(q.shape[3]), BV=block(v.shape[3]), FP=block(features), NEAR=max(chunk, 64))
    near = [tiles(x, constants["NEAR"]) for x in (k, v)]
    of_w = matrices(w_q, constants["BK"], constants["FP"])
    odd, constants["TAIL"] = odd_slots(n, constants["keys"])
    constants["GATE"] = 0 if gate is None else gate.shape[3]
    for piece in pieces(
        k, w_k, v, (kv, z), count=count, chunk=chunk, norm=norm, turns=turns_of(sets, chunk, lengths),
        setting=(settings or {}).get("selected_states"),
    ):  # fmt: skip
        outputs_kernel[(heads, piece.chunks, batch)](
            q, *near, k, v, sets.index, q if gate is None else gate, of_w,
            *(halves(x, shape["V"], constants["BV"], constants["FP"]) for x in piece.tensors[:2]), piece.sums,
            y if linear is None else linear, room, y, top, den,
            time, n, odd, count, piece.start, piece.chunks, piece.run, piece.bases.shape[2], scale * LOG2E, eps,
            **strides, **constants,
        )  # fmt: skip
    return Routed(y, linear, top, den, kv.mT, z)


@triton.jit(do_not_specialize=["time", "count", "n", "slots"])
def ending_kernel(
    k, v, score, index, sizes, kept_k, kept_v, kept_score, time, count, n, slots,
    k_b, k_t, k_h, v_b, v_t, v_h, s_b, s_t, s_h,
    GS: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, SIZES: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """kept_k [B, slots, Gs, K], kept_v and kept_score of each row's last chunk; zeros and -inf in an empty slot. Grid
    (row tiles, Gs, B)."""
    i, h, b = tl.program_id(0) * rows + tl.arange(0, rows), tl.program_id(1), tl.program_id(2).to(tl.int64)
    c = count - 1
    if SIZES:
        c = tl.maximum((tl.load(sizes + b).to(tl.int32) - 1) // C, 0)
    at = tl.load(index + ((b * GS + h) * count + c) * n + i, mask=i < n, other=-1)
    there, place = at >= 0, (b * slots + i) * GS + h
    d, e = tl.arange(0, BK), tl.arange(0, BV)
    keys = rows_at(k + b * k_b + h // (GS // G) * k_h, at, k_t, there, K, BK)
    tl.store(kept_k + place[:, None] * K + d[None, :], keys, mask=(i < slots)[:, None] & (d < K)[None, :])
    values = rows_at(v + b * v_b + h // (GS // G) * v_h, at, v_t, there, V, BV)
    tl.store(kept_v + place[:, None] * V + e[None, :], values, mask=(i < slots)[:, None] & (e < V)[None, :])
    ranks = tl.load(score + b * s_b + at.to(tl.int64) * s_t + h * s_h, mask=there, other=float("-inf"))
    tl.store(kept_score + place, ranks, mask=i < slots)


def kept_at_the_end(
    k: Tensor, v: Tensor, score: Tensor, sets: Sets, slots: int, chunk: int, sizes: Tensor | None
) -> Kept:
    """The kept tokens behind whole rows, or behind the first ``sizes`` [B] of each, in so many slots."""
    k, v = in_rows(k), in_rows(v)
    batch, select, count, n = sets.index.shape
    kept = Kept(
        torch.empty(batch, slots, select, k.shape[3], dtype=k.dtype, device=k.device),
        torch.empty(batch, slots, select, v.shape[3], dtype=v.dtype, device=k.device),
        torch.empty(batch, slots, select, dtype=score.dtype, device=k.device),
    )
    shape = shape_of(k, k, v, GS=select, C=chunk, SIZES=sizes is not None, rows=32)
    del shape["R"]
    ending_kernel[(cdiv(slots, 32), select, batch)](
        k, v, score, sets.index, sets.index if sizes is None else sizes, *kept,
        k.shape[1], count, n, slots, **strides_of(k=k, v=v, s=score[..., None]), **shape,
    )  # fmt: skip
    return kept


@compiled_together
def routed_prefill(
    q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, score: Tensor, gate: Tensor | None = None,
    *, scale: float, chunk: int, picks: int, size: int, norm: bool, eps: float, lengths: Tensor | None = None,
    slots: int | None = None,
) -> tuple[Tensor, Behind]:  # fmt: skip
    """``routing.routed_chunked`` from nothing, of features that the matrices w make, in the dtype of q; and what is
    behind the last tokens, without gradient."""
    given = (q, k, v, w_q, w_k, gate)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        from .triton_selected_routed_backward import RoutedAttention

        y, kv, z = RoutedAttention.apply(
            q, k, v, w_q, w_k, score.detach(), gate, scale, chunk, picks, size, norm, eps, lengths
        )
        return y, Behind(None, kv, z)
    sets = running_sets(score, chunk=chunk, size=size, picks=picks)
    done = routed_forward(
        q, k, v, w_q, w_k, sets, gate, scale=scale, chunk=chunk, norm=norm, eps=eps, lengths=lengths
    )
    kept = None if slots is None else kept_at_the_end(k, v, score, sets, slots, chunk, lengths)
    return done.y, Behind(kept, done.kv, done.z)
