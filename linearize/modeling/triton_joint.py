"""The forward kernels of LoLCATs and of linear attention: y of whole rows in O(T), and the sums that decoding needs.

The function is ``mapped_composed`` of ``mapped.py``: a softmax window and Hedgehog-mapped linear attention under one
normaliser (arXiv 2410.10254, eq. 7), the row's window maximum being part of it. With tiles of BT tokens,

    joint_sums      S, z of the tiles before every tile (``triton_joint_sums.py``)
    joint_outputs   y of a tile: its window, then S of the tiles that are linear for all of it, then what lies between

Features, scores and weights live in registers only; k and v are read per key/value head.

No clamp of features at 1e-12: below 1e-9 of their sum they add nothing that fp32 could show.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import Launch, launch, widths_of
from .triton_common import (
    LOG2E,
    first_in_window,
    hedgehog_rows,
    in_window,
    load_columns,
    load_matrix,
    load_rows,
    load_transposed,
    softmax_of,
    store_rows,
)
from .triton_joint_sums import BT, Sums, add_sums, from_z, joint_sums, strides, widths


@triton.jit(do_not_specialize=["T", "stored", "run", "runs"])
def joint_outputs(
    q, k, v, w_q, w_k, g, beta, S, Z, base_S, base_Z, teacher, lengths, y, den, peak, e, loss,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, tb, tt, th, T, stored, run, runs, scale,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr, EVERY: tl.constexpr, W: tl.constexpr, TERRACED: tl.constexpr, HAS_BASE: tl.constexpr,
    HAS_BETA: tl.constexpr, SAVE: tl.constexpr, TRANSFER: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [B, T, H, V] of one tile of one head; SAVE: also den and peak [B, H, T], the row's window maximum in log2.

    TRANSFER: y is y - teacher instead, zero past a row's length, with e = (y - teacher) . y / den [B, H, T] and
    loss [2, programs], the sums of squares of y - teacher and of teacher.
    """
    h, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(0)
    b64, group = tl.cast(b, tl.int64), tl.cast(h // GROUP, tl.int64)
    q += b64 * qb + tl.cast(h, tl.int64) * qh
    k += b64 * kb + group * kh
    v += b64 * vb + group * vh
    token, near = tl.arange(0, BT), tl.arange(0, BK)
    i0 = n * BT
    query = i0 + token
    rows = load_rows(q, i0, qt, T, D, BD, BT)
    w = load_matrix(w_q + h * D * F, D, F, BD, FP)
    edge = tl.minimum(first_in_window(i0, W, TERRACED), i0) // BT // EVERY  # the sums of whole linear tiles
    at = (b64 * heads + h) * stored + edge
    base = (b64 * heads + h) * runs + edge * EVERY // run
    acc, mass = tl.zeros([BT, BV], tl.float32), tl.zeros([BT], tl.float32)
    top = tl.full([BT], float("-inf"), tl.float32)
    if W > 0:  # first: its maximum rescales what was summed before, and the linear terms must not be
        top = tl.full([BT], -1e30, tl.float32)
        for j0 in range(first_in_window(i0, W, TERRACED) // BK * BK, tl.minimum(i0 + BT, T), BK):
            kT = load_columns(k, j0, kt, T, D, BD, BK)
            values = load_rows(v, j0, vt, T, V, BV, BK)
            seen = in_window(query[:, None], (j0 + near)[None, :], W, TERRACED)
            scores = tl.where(seen, tl.dot(rows, kT, input_precision=PRECISION) * (scale * LOG2E), -1e30)
            higher = tl.maximum(top, tl.max(scores, 1))
            p = tl.where(seen, tl.exp2(scores - higher[:, None]), 0.0)
            shrink = tl.exp2(top - higher)
            mass = mass * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None] + tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
            top = higher
        factor = tl.load(g + h)
        acc, mass = acc * factor, mass * factor
    plus, minus = hedgehog_rows(tl.dot(rows, w, input_precision=PRECISION), F)
    if HAS_BETA:
        plus, minus = plus * tl.load(beta + h), minus * tl.load(beta + h)
    mass += from_z(plus, minus, Z, at, base_Z, base, HAS_BASE, F, FP)
    plus, minus = plus.to(rows.dtype), minus.to(rows.dtype)
    acc = add_sums(acc, plus, minus, S, at, F, FP, V, BV, PRECISION)
    if HAS_BASE:
        acc = add_sums(acc, plus, minus, base_S, base, F, FP, V, BV, PRECISION)
    # What lies between those tiles and the windows of the last rows.
    newest = first_in_window(tl.minimum(i0 + BT, T) - 1, W, TERRACED)
    wT = load_transposed(w_k + h * D * F, D, F, BD, FP)
    for j0 in range(edge * EVERY * BT, newest, BK):
        kT = load_columns(k, j0, kt, T, D, BD, BK)
        values = load_rows(v, j0, vt, T, V, BV, BK)
        logits = tl.dot(wT, kT, input_precision=PRECISION)
        a = tl.dot(plus, softmax_of(logits, 0, F).to(rows.dtype), input_precision=PRECISION)
        a = tl.dot(minus, softmax_of(-logits, 0, F).to(rows.dtype), a, input_precision=PRECISION)
        key = (j0 + near)[None, :]
        a = tl.where((key <= query[:, None]) & (key < first_in_window(query, W, TERRACED)[:, None]), a, 0.0)
        mass += tl.sum(a, 1)
        acc += tl.dot(a.to(values.dtype), values, input_precision=PRECISION)
    if W == 0:
        mass += 1e-12
    result = acc / mass[:, None]
    line = (b64 * heads + h) * T
    if SAVE:
        tl.store(den + line + query, mass, mask=query < T)
        tl.store(peak + line + query, top, mask=query < T)
    if TRANSFER:
        target = load_rows(teacher + b64 * tb + tl.cast(h, tl.int64) * th, i0, tt, T, V, BV, BT).to(
            tl.float32
        )
        real = query < T
        if HAS_LENGTHS:
            real = query < tl.load(lengths + b)
        target = tl.where(real[:, None], target, 0.0)
        gap = tl.where(real[:, None], result - target, 0.0)
        tl.store(e + line + query, tl.sum(gap * result, 1) / mass, mask=query < T)
        program = (b64 * tl.num_programs(1) + n) * heads + h
        programs = tl.cast(tl.num_programs(2), tl.int64) * tl.num_programs(1) * heads
        tl.store(loss + program, tl.sum(tl.sum(gap * gap, 1), 0))
        tl.store(loss + programs + program, tl.sum(tl.sum(target * target, 1), 0))
        result = gap
    store_rows(y + (b64 * T * heads + h) * V, result, i0, heads * V, T, V, BV, BT)


class Forward(NamedTuple):
    y: Tensor
    """[B, T, H, V]; with a teacher y - teacher."""
    den: Tensor | None
    peak: Tensor | None
    """[B, H, T] fp32."""
    e: Tensor | None
    loss: Tensor | None
    """[2]: the sums of (y - teacher)^2 and of teacher^2."""
    sums: Sums


def joint_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    g: Tensor,
    beta: Tensor | None,
    *,
    scale: float,
    window: int | None,
    terraced: bool,
    state: tuple[Tensor, Tensor] | None = None,
    stop: Tensor | None = None,
    final: bool = False,
    save: bool = False,
    teacher: Tensor | None = None,
    lengths: Tensor | None = None,
    settings: dict[str, Launch] | None = None,
) -> Forward:
    """The forward pass; q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], maps [H, K, f] in the dtype of q, g and beta
    [H] fp32, teacher [B, T, H, V], lengths and stop [B]."""
    settings = settings or {}
    setting = settings.get("joint_outputs") or launch("joint_outputs", q.device, **widths_of(q, v, w_q))
    sums = joint_sums(k, w_k, v, state=state, stop=stop, final=final, setting=settings.get("joint_states"))
    batch, time, heads = q.shape[:3]
    tiles, transfer = triton.cdiv(time, BT), teacher is not None
    exact: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    y = torch.empty(batch, time, heads, v.shape[-1], dtype=v.dtype, device=q.device)
    den = torch.empty(batch, heads, time, **exact) if save else None
    peak = torch.empty(batch, heads, time, **exact) if save else None
    e = torch.empty(batch, heads, time, **exact) if transfer else None
    loss = torch.empty(2, batch * tiles * heads, **exact) if transfer else None
    # An argument that a variant does not read still has to be a tensor: `g` stands in.
    joint_outputs[(heads, tiles, batch)](
        q, k, v, w_q, w_k, g, g if beta is None else beta, sums.S, sums.Z,
        g if sums.base_S is None else sums.base_S, g if sums.base_Z is None else sums.base_Z,
        g if teacher is None else teacher, g if lengths is None else lengths, y,
        g if den is None else den, g if peak is None else peak, g if e is None else e, g if loss is None else loss,
        *strides(q), *strides(k), *strides(v), *((0, 0, 0) if teacher is None else strides(teacher)),
        time, sums.S.shape[2], sums.run, 1 if sums.base_S is None else sums.base_S.shape[2], scale,
        **widths(q, v, w_q), BT=BT, GROUP=heads // k.shape[2], EVERY=sums.every, W=window or 0, TERRACED=terraced,
        HAS_BASE=sums.base_S is not None, HAS_BETA=beta is not None and bool(window), SAVE=save, TRANSFER=transfer,
        HAS_LENGTHS=lengths is not None, **setting.options,
    )  # fmt: skip
    return Forward(y, den, peak, e, None if loss is None else loss.sum(1), sums)
