"""STILL's attention, ``routing.routed_chunked`` after the feature maps, forward.

    y = ( sum_E exp(e - m) v + g * (phi_q S) ) / ( sum_E exp(e - m) + phi_q z + eps ),   S, z: sums of linear tokens

Selection says of every token with which chunk it turns linear (``triton_selected``): most with the second chunk after
their own, and those that were kept until then with a later one; there are no more of these than the chunk has tokens
that are kept now, so that they take their places in its tile. Two steps:

1. sums      S and z of every chunk (``triton_selected_states``)
2. outputs   softmax over the kept and the local keys, phi_q S and phi_q z, the gate and the quotient
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
    attend,
    fitted,
    in_rows,
    odd_slots,
    position_of,
    rows_at,
    shape_of,
    strides_of,
)
from .triton_selected_states import load_map, pieces, softmax_rows, turns_of
from .triton_together import compiled_together


@triton.jit
def store_tile(x, value, c, time, stride, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr):
    """Rows of chunk c of x [T, V] become value [C, BV]."""
    t, e = c * C + tl.arange(0, C), tl.arange(0, BV)
    place = t.to(tl.int64)[:, None] * stride + e[None, :]
    tl.store(x + place, value.to(x.dtype.element_ty), mask=(t < time)[:, None] & (e < V)[None, :])


@triton.jit(do_not_specialize=["time", "n", "odd", "count", "start", "chunks", "run", "runs"])
def outputs_kernel(
    q, k, v, index, gate, w, states, bases, sums, linear, y, top, den,
    time, n, odd, count, start, chunks, run, runs, scale, eps,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    GS: tl.constexpr, HS: tl.constexpr, G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, F: tl.constexpr, C: tl.constexpr, P: tl.constexpr, TAIL: tl.constexpr,
    GATE: tl.constexpr, NORM: tl.constexpr, SAVE: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    """y [B, T, H, V] of ``chunks`` chunks from ``start`` on; SAVE: also the row maximum (in powers of two), the
    denominator [B, H, T] and, where there is a gate, the linear numerator [B, T, H, V] without it. GATE: the gate's
    width, 0 for none. Grid (H, chunks, B)."""
    H: tl.constexpr = G * R
    h, piece, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    c, select = start + piece, h // (H // GS)
    t = c * C + tl.arange(0, C)
    live = t < time
    queries = rows_at(q + b * q_b + h * q_h, t, q_t, live, K, BK)
    k += b * k_b + h // R * k_h
    v += b * v_b + h // R * v_h
    index += ((b * GS + select) * count + c) * n
    f, e = tl.arange(0, F), tl.arange(0, BV)

    # The linear part first, which then waits in ``linear`` (y itself where nothing is saved): registers do not hold it
    # beside the exact one.
    mass = tl.full([C], eps, tl.float32)
    if c >= 2:
        x = queries.to(tl.float32)
        length = tl.sqrt(tl.sum(x * x, 1))
        weight = load_map(w + h * K * F, K, BK, F)
        head = b * HS + h // (H // HS)
        own, before = (head * chunks + piece) * 2 * F, (head * runs + piece // run) * 2 * F
        acc = tl.zeros([C, BV], tl.float32)
        # Half by half in a loop that makes the features anew: nor do both halves, or two states, fit.
        for half in range(2):
            a = (1.0 - 2.0 * half) * tl.dot(queries, weight, input_precision="ieee")
            phi = softmax_rows(a, length, NORM)
            mass += tl.sum(phi * tl.load(sums + own + half * F + f)[None, :], 1)
            narrow = phi.to(states.dtype.element_ty)
            # Nothing is before the first run.
            for part in range(tl.where(c < run, 1, 2)):
                state = (states if part == 0 else bases) + tl.where(part == 0, own, before) * V + half * F
                state += e[:, None] * (2 * F) + f[None, :]
                state = tl.load(state, mask=None if V == BV else (e < V)[:, None])
                acc = tl.dot(narrow, tl.trans(state), acc, input_precision="ieee")
        store_tile(linear + (b * time * H + h) * V, acc, start + piece, time, H * V, V, C, BV)
    elif SAVE and GATE > 0:
        store_tile(linear + (b * time * H + h) * V, tl.zeros([C, BV], tl.float32), c, time, H * V, V, C, BV)

    m = tl.full([C], MASKED, tl.float32)
    total = tl.zeros([C], tl.float32)
    acc = tl.zeros([C, BV], tl.float32)
    filled = tl.minimum(n, tl.maximum(c - 1, 0) * P)
    older = tl.maximum(c - 1, 0) * C
    stop = filled + tl.minimum((c + 1) * C, time) - older
    first = tl.minimum(filled, odd)
    if TAIL > 0:
        odd_ones = position_of(index, tl.arange(0, TAIL), first, older, 0)
        m, total, acc = attend(queries, k, v, odd_ones, t, m, total, acc, k_t, v_t, scale, K, V, BK, BV)
    for begin in range(first, stop, keys):
        at = position_of(index, begin + tl.arange(0, keys), filled, older, stop)
        m, total, acc = attend(queries, k, v, at, t, m, total, acc, k_t, v_t, scale, K, V, BK, BV)

    wide = live[:, None] if V == BV else live[:, None] & (e < V)[None, :]
    row = (b * time + t) * H + h
    total += mass
    if c >= 2:
        tl.debug_barrier()  # another thread may have written it
        more = tl.load(linear + row[:, None] * V + e[None, :], mask=wide, other=0.0).to(tl.float32)
        if GATE > 0:
            at_gate = gate + row[:, None] * GATE + (e[None, :] if GATE > 1 else 0)
            more *= tl.load(at_gate, mask=wide, other=0.0).to(tl.float32)
        acc += more
    tl.store(y + row[:, None] * V + e[None, :], (acc / total[:, None]).to(y.dtype.element_ty), mask=wide)
    if SAVE:
        place = (b * H + h) * time + t
        tl.store(top + place, m, mask=live)
        tl.store(den + place, total, mask=live)


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
    linear = None
    if (save and gate is not None) or y.dtype == torch.float16:
        linear = torch.empty_like(y, dtype=torch.float32 if y.dtype == torch.float16 else y.dtype)
    top, den = (torch.empty(batch, heads, time if save else 0, **exact) for _ in range(2))
    kv = torch.empty(batch, len(w_k), shape["V"], 2 * features, **exact)
    z = torch.empty(batch, len(w_k), 2 * features, **exact)
    constants = shape | fitted(setting, q, 1)
    constants |= dict(HS=len(w_k), F=features, NORM=norm, SAVE=save)
    odd, constants["TAIL"] = odd_slots(n, constants["keys"])
    constants["GATE"] = 0 if gate is None else gate.shape[3]
    for piece in pieces(
        k, w_k, v, (kv, z), count=count, chunk=chunk, norm=norm, turns=turns_of(sets, chunk, lengths),
        setting=(settings or {}).get("selected_states"),
    ):  # fmt: skip
        outputs_kernel[(heads, piece.chunks, batch)](
            q, k, v, sets.index, q if gate is None else gate, w_q, *piece.tensors,
            y if linear is None else linear, y, top, den,
            time, n, odd, count, piece.start, piece.chunks, piece.run, piece.bases.shape[2], scale * LOG2E, eps,
            **strides, **constants,
        )  # fmt: skip
    return Routed(y, linear if save and gate is not None else None, top, den, kv.mT, z)


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
