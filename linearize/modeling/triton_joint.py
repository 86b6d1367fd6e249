"""The forward kernels of LoLCATs and of linear attention: y of whole rows in O(T), and the sums that decoding needs.

The function is ``mapped_composed`` of ``mapped.py``: a softmax window and Hedgehog-mapped linear attention under one
normaliser (arXiv 2410.10254, eq. 7), the row's window maximum being part of it. With tiles of BT tokens,

    joint_sums           S, z of the tiles before every tile (``triton_joint_sums.py``)
    joint_outputs        y of a tile: its window, S of the tiles that are linear for all of it, then what lies between
    joint_outputs_near   the same where the window is as long as a tile, without loops

Features, scores and weights live in registers only; k and v are read per key/value head.

No clamp of features at 1e-12: below 1e-9 of their sum they add nothing that fp32 could show.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import cdiv, launch, widths_of
from .triton_common import (
    LOG2E,
    first_in_window,
    hedgehog_rows,
    in_window,
    softmax_of,
    store_rows,
)
from .triton_joint_sums import BT, Sums, add_half, half_from_z, joint_sums, of_type, read_by, widths
from .triton_tiles import matrices, matrix, tile, tiles


@triton.jit(do_not_specialize=["T", "stored", "run", "runs"])
def joint_outputs(
    q, k, v, w_q, w_k, g, beta, S, Z, base_S, base_Z, teacher, lengths, y, inverse, level, best, e, loss,
    T, stored, run, runs, scale,
    V: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    GROUP: tl.constexpr, EVERY: tl.constexpr, MIXED: tl.constexpr, W: tl.constexpr, TERRACED: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_BETA: tl.constexpr, SAVE: tl.constexpr, TRANSFER: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [B, T, H, V] of one tile of one head; ``finish`` has what SAVE and TRANSFER write."""
    h, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, group = tl.num_programs(0), h // GROUP
    token = tl.arange(0, BT)
    i0 = n * BT
    query = i0 + token
    rows = tile(q, b, i0, h, BT, BD)
    edge = tl.minimum(first_in_window(i0, W, TERRACED), i0) // BT // EVERY  # the sums of whole linear tiles
    at = (b * heads + h) * stored + edge
    base = (b * heads + h) * runs + edge * EVERY // run
    acc, mass = tl.zeros([BT, BV], tl.float32), tl.zeros([BT], tl.float32)
    top = tl.full([BT], float("-inf"), tl.float32)
    if W > 0:  # first: its maximum rescales what was summed before, and the linear terms must not be
        top = tl.full([BT], -1e30, tl.float32)
        where = tl.full([BT], -1, tl.int32)
        for j0 in range(first_in_window(i0, W, TERRACED) // BT * BT, tl.minimum(i0 + BT, T), BT):
            kT = tile(k, b, j0, group, BT, BD).T
            seen = in_window(query[:, None], (j0 + token)[None, :], W, TERRACED)
            scores = tl.where(seen, tl.dot(rows, kT, input_precision=PRECISION) * (scale * LOG2E), -1e30)
            if SAVE and not TRANSFER:
                largest, place = tl.max(scores, 1, return_indices=True)
                where = tl.where(largest > top, j0 + place, where)
            else:
                largest = tl.max(scores, 1)
            higher = tl.maximum(top, largest)
            p = tl.where(seen, tl.exp2(scores - higher[:, None]), 0.0)
            shrink = tl.exp2(top - higher)
            mass = mass * shrink + tl.sum(p, 1)
            values = tile(v, b, j0, group, BT, BV)
            acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
            top = higher
        if SAVE and not TRANSFER:
            store_best(best, where, b, h, query, T)
        factor = tl.load(g + h)
        acc, mass = acc * factor, mass * factor
    plus, minus = hedgehog_rows(tl.dot(rows, matrix(w_q, h, BD, FP), input_precision=PRECISION), F)
    if HAS_BETA:
        plus, minus = plus * tl.load(beta + h), minus * tl.load(beta + h)
    mass += half_from_z(plus, 0, Z, at, base_Z, base, HAS_BASE, F, FP)
    mass += half_from_z(minus, 1, Z, at, base_Z, base, HAS_BASE, F, FP)
    plus, minus = plus.to(rows.dtype), minus.to(rows.dtype)
    acc = add_half(acc, plus, 0, S, at, base_S, base, HAS_BASE, FP, BV, PRECISION)
    acc = add_half(acc, minus, 1, S, at, base_S, base, HAS_BASE, FP, BV, PRECISION)
    if MIXED:
        # What lies between those tiles and the windows of the last rows.
        newest = first_in_window(tl.minimum(i0 + BT, T) - 1, W, TERRACED)
        for j0 in range(edge * EVERY * BT, newest, BT):
            kT = tile(k, b, j0, group, BT, BD).T
            logits = tl.dot(matrix(w_k, h, BD, FP).T, kT, input_precision=PRECISION)
            a = tl.dot(plus, softmax_of(logits, 0, F).to(rows.dtype), input_precision=PRECISION)
            a = tl.dot(minus, softmax_of(-logits, 0, F).to(rows.dtype), a, input_precision=PRECISION)
            key = (j0 + token)[None, :]
            a = tl.where(
                (key <= query[:, None]) & (key < first_in_window(query, W, TERRACED)[:, None]), a, 0.0
            )
            mass += tl.sum(a, 1)
            acc = tl.dot(a.to(rows.dtype), tile(v, b, j0, group, BT, BV), acc, input_precision=PRECISION)
    if W == 0:
        mass += 1e-12
    finish(
        acc / mass[:, None], mass, top, g, teacher, lengths, y, inverse, level, e, loss, b, n, h, i0, T,
        V, BV, BT, SAVE, TRANSFER, HAS_LENGTHS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "stored", "run", "runs"])
def joint_outputs_near(
    q, k, v, both_k, both_v, w_q, w_k, g, beta, S, Z, base_S, base_Z, teacher, lengths,
    y, inverse, level, best, e, loss, T, stored, run, runs, scale,
    V: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    GROUP: tl.constexpr, TERRACED: tl.constexpr, HAS_BASE: tl.constexpr,
    HAS_BETA: tl.constexpr, SAVE: tl.constexpr, TRANSFER: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``joint_outputs`` for a window as long as a tile, with the sums of every tile.

    The tile and the one before are all that is not in the sums: nothing is a loop, nothing is rescaled, and few
    registers are held at once.
    """
    h, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, group = tl.num_programs(0), h // GROUP
    i0 = n * BT
    query = i0 + tl.arange(0, BT)
    rows = tile(q, b, i0, h, BT, BD)
    edge = tl.maximum(n - 1, 0)
    at = (b * heads + h) * stored + edge
    base = (b * heads + h) * runs + edge // run
    factor, sharp = tl.load(g + h), scale * LOG2E
    if TERRACED:
        key = i0 - BT + tl.arange(0, 2 * BT)
        scores = (
            tl.dot(rows, tile(both_k, b, i0 - BT, group, 2 * BT, BD).T, input_precision=PRECISION) * sharp
        )
        scores = tl.where((key[None, :] <= query[:, None]) & (key >= 0)[None, :], scores, -1e30)
        top = tl.max(scores, 1)
        if SAVE and not TRANSFER:
            where = tl.min(tl.where(scores == top[:, None], key[None, :], T), 1)
            store_best(best, where, b, h, query, T)
        p = tl.exp2(scores - top[:, None])
        mass = tl.sum(p, 1) * factor
        p = (p * factor).to(rows.dtype)
        acc = tl.dot(p, tile(both_v, b, i0 - BT, group, 2 * BT, BV), input_precision=PRECISION)
    logits = tl.dot(rows, matrix(w_q, h, BD, FP), input_precision=PRECISION)
    share = 1.0
    if HAS_BETA:
        share = tl.load(beta + h)
    if TERRACED:
        for half in tl.static_range(2):
            phi = softmax_of(logits if half == 0 else -logits, 1, F) * share
            mass += half_from_z(phi, half, Z, at, base_Z, base, HAS_BASE, F, FP)
            acc = add_half(acc, phi.to(rows.dtype), half, S, at, base_S, base, HAS_BASE, FP, BV, PRECISION)
    else:
        # The weights of keys that some rows' windows hold and others' do not, before anything is summed; the features
        # are made a second time when they are read again, as both together would not fit into registers.
        plus, minus = hedgehog_rows(logits, F)
        plus, minus = plus * share, minus * share
        linear = half_from_z(plus, 0, Z, at, base_Z, base, HAS_BASE, F, FP)
        linear += half_from_z(minus, 1, Z, at, base_Z, base, HAS_BASE, F, FP)
        plus, minus = plus.to(rows.dtype), minus.to(rows.dtype)
        kT = tile(k, b, i0 - BT, group, BT, BD).T
        logits = tl.dot(matrix(w_k, h, BD, FP).T, kT, input_precision=PRECISION)
        a = tl.dot(plus, softmax_of(logits, 0, F).to(rows.dtype), input_precision=PRECISION)
        a = tl.dot(minus, softmax_of(-logits, 0, F).to(rows.dtype), a, input_precision=PRECISION)
        key = i0 + tl.arange(0, BT)
        later = key[None, :] > query[:, None]  # of the keys one tile back: those in the window
        a = tl.where(later | (n == 0), 0.0, a)
        linear += tl.sum(a, 1)
        old = tl.dot(rows, tile(k, b, i0 - BT, group, BT, BD).T, input_precision=PRECISION) * sharp
        new = tl.dot(rows, tile(k, b, i0, group, BT, BD).T, input_precision=PRECISION) * sharp
        old, new = tl.where(later & (n > 0), old, -1e30), tl.where(later, -1e30, new)
        top = tl.maximum(tl.max(old, 1), tl.max(new, 1))
        if SAVE and not TRANSFER:
            where = tl.min(tl.where(new == top[:, None], key[None, :], T), 1)
            where = tl.minimum(where, tl.min(tl.where(old == top[:, None], key[None, :] - BT, T), 1))
            store_best(best, where, b, h, query, T)
        old, new = tl.exp2(old - top[:, None]), tl.exp2(new - top[:, None])
        mass = (tl.sum(old, 1) + tl.sum(new, 1)) * factor + linear
        old, new = (old * factor + a).to(rows.dtype), (new * factor).to(rows.dtype)
        acc = tl.dot(old, tile(v, b, i0 - BT, group, BT, BV), input_precision=PRECISION)
        acc = tl.dot(new, tile(v, b, i0, group, BT, BV), acc, input_precision=PRECISION)
        again = tl.dot(rows, matrix(w_q, h, BD, FP), input_precision=PRECISION)
        for half in tl.static_range(2):
            phi = (softmax_of(again if half == 0 else -again, 1, F) * share).to(rows.dtype)
            acc = add_half(acc, phi, half, S, at, base_S, base, HAS_BASE, FP, BV, PRECISION)
    finish(
        acc / mass[:, None], mass, top, g, teacher, lengths, y, inverse, level, e, loss, b, n, h, i0, T,
        V, BV, BT, SAVE, TRANSFER, HAS_LENGTHS,
    )  # fmt: skip


@triton.jit
def store_best(best, where, b, h, query, T):
    """best [B, H, T]: the key that attains a row's window maximum, the first of equals."""
    tl.store(best + (tl.cast(b, tl.int64) * tl.num_programs(0) + h) * T + query, where, mask=query < T)


@triton.jit
def finish(
    result, mass, top, g, teacher, lengths, y, inverse, level, e, loss, b, n, h, i0, T,
    V: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, SAVE: tl.constexpr, TRANSFER: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """Store y [B, T, H, V]; SAVE: also inverse and level [B, H, T], with which a key of the window has the share
    exp2(score in log2 - level) of y, and one of the sums a * inverse.

    TRANSFER: y is y - teacher instead, zero past a row's length, with e = (y - teacher) . y [B, H, T] and
    loss [2, programs], the sums of squares of y - teacher and of teacher.
    """
    heads, b64 = tl.num_programs(0), tl.cast(b, tl.int64)
    query = i0 + tl.arange(0, BT)
    line = (b64 * heads + h) * T
    if SAVE:
        tl.store(inverse + line + query, 1.0 / mass, mask=query < T)
        tl.store(level + line + query, top + tl.log2(mass / tl.load(g + h)), mask=query < T)
    if TRANSFER:
        target = tile(teacher, b, i0, h, BT, BV).to(tl.float32)
        real = query < T
        if HAS_LENGTHS:
            real = query < tl.load(lengths + b)
        target = tl.where(real[:, None], target, 0.0)
        gap = tl.where(real[:, None], result - target, 0.0)
        tl.store(e + line + query, tl.sum(gap * result, 1), mask=query < T)
        program = (b64 * tl.num_programs(1) + n) * heads + h
        programs = tl.cast(tl.num_programs(2), tl.int64) * tl.num_programs(1) * heads
        tl.store(loss + program, tl.sum(tl.sum(gap * gap, 1), 0))
        tl.store(loss + programs + program, tl.sum(tl.sum(target * target, 1), 0))
        result = gap
    store_rows(y + (b64 * T * heads + h) * V, result, i0, heads * V, T, V, BV, BT)


class Forward(NamedTuple):
    y: Tensor
    """[B, T, H, V]; with a teacher y - teacher."""
    inverse: Tensor | None
    """[B, H, T] fp32, one over the normaliser."""
    level: Tensor | None
    """[B, H, T] fp32; exp2(score in log2 - level) is the share of y that a key of the window has."""
    best: Tensor | None
    """[B, H, T] int32, the key that attains the window's maximum, the first of equals; None with a teacher."""
    e: Tensor | None
    """[B, H, T] fp32, with a teacher (y - teacher) . y."""
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
) -> Forward:
    """The forward pass; q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], maps [H, K, f] in the dtype of q, g and beta
    [H] fp32, teacher [B, T, H, V], lengths and stop [B]."""
    sums = joint_sums(k, w_k, v, state=state, stop=stop, final=final)
    near = window == BT and sums.every == 1
    name = "joint_outputs" + ("_near" if near else "") + ("_terraced" if near and terraced else "")
    setting = launch(name, q.device, **widths_of(q, v, w_q))
    batch, time, heads = q.shape[:3]
    count, transfer = cdiv(time, BT), teacher is not None
    exact: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    y = torch.empty(batch, time, heads, v.shape[-1], dtype=v.dtype, device=q.device)
    inverse = torch.empty(batch, heads, time, **exact) if save else None
    level = torch.empty(batch, heads, time, **exact) if save else None
    argued = save and not transfer
    best = torch.empty(batch, heads, time, dtype=torch.int32, device=q.device) if argued else None
    e = torch.empty(batch, heads, time, **exact) if transfer else None
    loss = torch.empty(2, batch * count * heads, **exact) if transfer else None
    shape = widths(q, v, w_q)
    read = read_by(sums, shape, window, terraced)
    of_q = tiles(q, BT)
    keys = [tiles(x, BT) for x in (k, v)]
    if near:  # two tiles at once, which only terraced windows ask for
        keys += [tiles(x, 2 * BT) for x in (k, v)] if terraced else keys
    # An argument that a variant does not read still has to be a tensor: `g` stands in.
    arguments = (
        of_q, *keys, *(matrices(w, shape["BD"], shape["FP"]) for w in (w_q, w_k)),
        g, g if beta is None else beta, *read.tensors,
        of_q if teacher is None else tiles(teacher, BT), g if lengths is None else lengths, y,
        *(g if x is None else x for x in (inverse, level, best, e, loss)),
        time, *read.places, scale,
    )  # fmt: skip
    constants: dict[str, Any] = {name: value for name, value in shape.items() if name != "D"}
    constants |= dict(
        BT=BT, GROUP=heads // k.shape[2], TERRACED=terraced,
        HAS_BETA=beta is not None and bool(window), SAVE=save, TRANSFER=transfer, HAS_LENGTHS=lengths is not None,
    )  # fmt: skip
    grid = heads, count, batch
    if near:
        joint_outputs_near[grid](
            *arguments, **constants, HAS_BASE=read.options["HAS_BASE"], **of_type(setting, q)
        )
    else:
        joint_outputs[grid](*arguments, **constants, **read.options, W=window or 0, **of_type(setting, q))
    return Forward(y, inverse, level, best, e, None if loss is None else loss.sum(1), sums)
