"""The key side of the joint layer's gradients; ``triton_joint_backward.py`` has the equations and the launches.

joint_keys      a tile of keys of one query head: the logits' gradient dx_k of its map
joint_values    a tile of keys, all query heads of its group in turn: dv
joint_inputs    likewise dk, from dx_k and the window
"""

import triton
import triton.language as tl

from .triton_common import (
    LOG2E,
    first_outside,
    hedgehog_gradient,
    hedgehog_rows,
    in_window,
    softmax_of,
    store_rows,
)
from .triton_joint_sums import add_sums, minus_z, sums_gradient
from .triton_tiles import matrix, tile


@triton.jit(do_not_specialize=["T", "stored", "run", "runs"])
def joint_keys(
    q, k, v, u, w_q, w_k, beta, R, Z, base_R, base_Z, e, dx,
    T, stored, run, runs,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr, EVERY: tl.constexpr, MIXED: tl.constexpr, W: tl.constexpr, TERRACED: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_BETA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx [B, T, H, F] of one tile of keys of one query head."""
    h, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, b64, group = tl.num_programs(0), tl.cast(b, tl.int64), h // GROUP
    token = tl.arange(0, BT)
    j0 = n * BT
    key = j0 + token
    values = tile(v, b, j0, group, BT, BV)
    line = (b64 * heads + h) * T
    d_plus, d_minus = tl.zeros([BT, FP], tl.float32), tl.zeros([BT, FP], tl.float32)
    edge = first_stored(j0, T, BT, EVERY, W, TERRACED)
    if edge < stored:
        ones = tl.full([BT], 1.0, tl.float32)
        at = (b * heads + h) * stored + edge
        d_plus, d_minus = sums_gradient(d_plus, d_minus, values, R, at, FP, BV, PRECISION)
        d_plus, d_minus = minus_z(d_plus, d_minus, ones, Z, at, F, FP)
        if HAS_BASE:
            at = (b * heads + h) * runs + edge * EVERY // run
            d_plus, d_minus = sums_gradient(d_plus, d_minus, values, base_R, at, FP, BV, PRECISION)
            d_plus, d_minus = minus_z(d_plus, d_minus, ones, base_Z, at, F, FP)
    if MIXED:
        # Queries that some keys of the tile have left, and not all.
        for i0 in range(first_outside(j0, W, TERRACED) // BT * BT, tl.minimum(edge * EVERY * BT, T), BT):
            query = i0 + token
            weight = tl.load(e + line + query, mask=query < T, other=0.0)
            cotangent = (
                tl.dot(values, tile(u, b, i0, h, BT, BV).T, input_precision=PRECISION) - weight[None, :]
            )
            cotangent = tl.where(is_linear(query[None, :], key[:, None], T, W, TERRACED), cotangent, 0.0).to(
                values.dtype
            )
            rows = tile(q, b, i0, h, BT, BD)
            query_plus, query_minus = hedgehog_rows(
                tl.dot(rows, matrix(w_q, h, BD, FP), input_precision=PRECISION), F
            )
            d_plus = tl.dot(cotangent, query_plus.to(values.dtype), d_plus, input_precision=PRECISION)
            d_minus = tl.dot(cotangent, query_minus.to(values.dtype), d_minus, input_precision=PRECISION)
    if HAS_BETA:
        d_plus, d_minus = d_plus * tl.load(beta + h), d_minus * tl.load(beta + h)
    keys = tile(k, b, j0, group, BT, BD)
    plus, minus = hedgehog_rows(tl.dot(keys, matrix(w_k, h, BD, FP), input_precision=PRECISION), F)
    gradient = hedgehog_gradient(plus, minus, d_plus, d_minus)
    store_rows(dx + (b64 * T * heads + h) * F, gradient, j0, heads * F, T, F, FP, BT)


@triton.jit
def first_stored(j0, T, BT: tl.constexpr, EVERY: tl.constexpr, W: tl.constexpr, TERRACED: tl.constexpr):
    """The number of the first stored sums over queries that every key of the tile at j0 has left the window of."""
    ahead = first_outside(tl.minimum(j0 + BT, T) - 1, W, TERRACED)
    tile = (ahead + BT - 1) // BT
    return (tile + EVERY - 1) // EVERY


@triton.jit
def is_linear(query, key, T, W: tl.constexpr, TERRACED: tl.constexpr):
    return (query >= first_outside(key, W, TERRACED)) & (key <= query) & (query < T)


@triton.jit(do_not_specialize=["T", "stored", "run", "runs"])
def joint_values(
    q, k, u, w_q, w_k, g, beta, R, base_R, peak, dv,
    T, stored, run, runs, scale,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr, EVERY: tl.constexpr, MIXED: tl.constexpr, W: tl.constexpr, TERRACED: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_BETA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv [B, T, G, V] of one tile of keys, summed over the query heads of its group."""
    group, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    groups = tl.num_programs(0)
    heads, b64 = groups * GROUP, tl.cast(b, tl.int64)
    token = tl.arange(0, BT)
    j0 = n * BT
    key = j0 + token
    acc = tl.zeros([BT, BV], tl.float32)
    edge = first_stored(j0, T, BT, EVERY, W, TERRACED)
    for r in range(GROUP):
        h = group * GROUP + r
        line = (b64 * heads + h) * T
        keys = tile(k, b, j0, group, BT, BD)
        plus, minus = hedgehog_rows(tl.dot(keys, matrix(w_k, h, BD, FP), input_precision=PRECISION), F)
        if HAS_BETA:
            plus, minus = plus * tl.load(beta + h), minus * tl.load(beta + h)
        plus, minus = plus.to(keys.dtype), minus.to(keys.dtype)
        if edge < stored:
            at = (b * heads + h) * stored + edge
            acc = add_sums(acc, plus, minus, R, at, FP, BV, PRECISION)
            if HAS_BASE:
                at = (b * heads + h) * runs + edge * EVERY // run
                acc = add_sums(acc, plus, minus, base_R, at, FP, BV, PRECISION)
        if MIXED:
            wT = matrix(w_q, h, BD, FP).T
            for i0 in range(first_outside(j0, W, TERRACED) // BT * BT, tl.minimum(edge * EVERY * BT, T), BT):
                query = i0 + token
                columns = tile(q, b, i0, h, BT, BD).T
                logits = tl.dot(wT, columns, input_precision=PRECISION)
                a = tl.dot(plus, softmax_of(logits, 0, F).to(keys.dtype), input_precision=PRECISION)
                a = tl.dot(minus, softmax_of(-logits, 0, F).to(keys.dtype), a, input_precision=PRECISION)
                linear = is_linear(query[None, :], key[:, None], T, W, TERRACED)
                a = tl.where(linear, a, 0.0)
                rows = tile(u, b, i0, h, BT, BV)
                acc = tl.dot(a.to(rows.dtype), rows, acc, input_precision=PRECISION)
        if W > 0:
            shift = tl.log2(tl.load(g + h))  # the window's factor, as part of its maximum
            for i0 in range(j0, tl.minimum(first_outside(tl.minimum(j0 + BT, T) - 1, W, TERRACED), T), BT):
                query = i0 + token
                real = query < T
                top = tl.load(peak + line + query, mask=real, other=0.0) - shift
                seen = in_window(query[None, :], key[:, None], W, TERRACED) & real[None, :]
                columns = tile(q, b, i0, h, BT, BD).T
                scores = tl.dot(keys, columns, input_precision=PRECISION) * (scale * LOG2E)
                p = tl.where(seen, tl.exp2(scores - top[None, :]), 0.0)
                rows = tile(u, b, i0, h, BT, BV)
                acc = tl.dot(p.to(rows.dtype), rows, acc, input_precision=PRECISION)
    store_rows(dv + (b64 * T * groups + group) * V, acc, j0, groups * V, T, V, BV, BT)


@triton.jit(do_not_specialize=["T"])
def joint_inputs(
    q, k, v, u, w_k, g, peak, e, c, best, dx, dk,
    T, scale,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr, W: tl.constexpr, TERRACED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk [B, T, G, K] of one tile of keys, summed over the query heads of its group, from dx and the window."""
    group, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    groups = tl.num_programs(0)
    heads, b64 = groups * GROUP, tl.cast(b, tl.int64)
    token = tl.arange(0, BT)
    j0 = n * BT
    key = j0 + token
    acc = tl.zeros([BT, BD], tl.float32)
    for r in range(GROUP):
        h = group * GROUP + r
        line = (b64 * heads + h) * T
        acc = tl.dot(tile(dx, b, j0, h, BT, FP), matrix(w_k, h, BD, FP).T, acc, input_precision=PRECISION)
        if W > 0:
            shift = tl.log2(tl.load(g + h))  # the window's factor, as part of its maximum
            for i0 in range(j0, tl.minimum(first_outside(tl.minimum(j0 + BT, T) - 1, W, TERRACED), T), BT):
                query = i0 + token
                real = query < T
                top = tl.load(peak + line + query, mask=real, other=0.0) - shift
                seen = in_window(query[None, :], key[:, None], W, TERRACED) & real[None, :]
                rows = tile(q, b, i0, h, BT, BD)
                scores = tl.dot(tile(k, b, j0, group, BT, BD), rows.T, input_precision=PRECISION) * (
                    scale * LOG2E
                )
                p = tl.where(seen, tl.exp2(scores - top[None, :]), 0.0)
                columns = tile(u, b, i0, h, BT, BV).T
                values = tile(v, b, j0, group, BT, BV)
                weight = tl.load(e + line + query, mask=real, other=0.0)
                ds = p * (tl.dot(values, columns, input_precision=PRECISION) - weight[None, :])
                share = tl.load(c + line + query, mask=real, other=0.0)
                where = tl.load(best + line + query, mask=real, other=-1)
                ds -= tl.where(where[None, :] == key[:, None], share[None, :], 0.0)
                acc = tl.dot((ds * scale).to(rows.dtype), rows, acc, input_precision=PRECISION)
    store_rows(dk + (b64 * T * groups + group) * D, acc, j0, groups * D, T, D, BD, BT)
