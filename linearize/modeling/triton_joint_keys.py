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
    load_columns,
    load_matrix,
    load_rows,
    load_transposed,
    softmax_of,
    store_rows,
)
from .triton_joint_sums import add_sums, sums_gradient


@triton.jit(do_not_specialize=["T", "stored", "run", "runs"])
def joint_keys(
    q, k, v, dy, w_q, w_k, beta, R, Z, base_R, base_Z, den, e, dx,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, gb, gt, gh, T, stored, run, runs,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr, EVERY: tl.constexpr, W: tl.constexpr, TERRACED: tl.constexpr, HAS_BASE: tl.constexpr,
    HAS_BETA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx [B, T, H, F] of one tile of keys of one query head."""
    h, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, b64, group = tl.num_programs(0), tl.cast(b, tl.int64), tl.cast(h // GROUP, tl.int64)
    token = tl.arange(0, BT)
    j0 = n * BT
    key = j0 + token
    values = load_rows(v + b64 * vb + group * vh, j0, vt, T, V, BV, BT)
    q += b64 * qb + tl.cast(h, tl.int64) * qh
    dy += b64 * gb + tl.cast(h, tl.int64) * gh
    line = (b64 * heads + h) * T
    d_plus, d_minus = tl.zeros([BT, FP], tl.float32), tl.zeros([BT, FP], tl.float32)
    edge = first_stored(j0, T, BT, EVERY, W, TERRACED)
    if edge < stored:
        ones = tl.full([BT], 1.0, tl.float32)
        at = (b64 * heads + h) * stored + edge
        d_plus, d_minus = sums_gradient(d_plus, d_minus, values, ones, R, at, Z, F, FP, V, BV, PRECISION)
        if HAS_BASE:
            at = (b64 * heads + h) * runs + edge * EVERY // run
            d_plus, d_minus = sums_gradient(
                d_plus, d_minus, values, ones, base_R, at, base_Z, F, FP, V, BV, PRECISION
            )
    # Queries that some keys of the tile have left, and not all.
    for i0 in range(first_outside(j0, W, TERRACED) // BT * BT, tl.minimum(edge * EVERY * BT, T), BT):
        query = i0 + token
        weight = tl.load(e + line + query, mask=query < T, other=0.0)
        inverse = 1.0 / tl.load(den + line + query, mask=query < T, other=1.0)
        uT = load_columns(dy, i0, gt, T, V, BV, BT)
        uT = (uT.to(tl.float32) * inverse[None, :]).to(uT.dtype)
        cotangent = tl.dot(values, uT, input_precision=PRECISION) - weight[None, :]
        cotangent = tl.where(is_linear(query[None, :], key[:, None], T, W, TERRACED), cotangent, 0.0).to(
            uT.dtype
        )
        rows = load_rows(q, i0, qt, T, D, BD, BT)
        w = load_matrix(w_q + h * D * F, D, F, BD, FP)
        query_plus, query_minus = hedgehog_rows(tl.dot(rows, w, input_precision=PRECISION), F)
        d_plus = tl.dot(cotangent, query_plus.to(uT.dtype), d_plus, input_precision=PRECISION)
        d_minus = tl.dot(cotangent, query_minus.to(uT.dtype), d_minus, input_precision=PRECISION)
    if HAS_BETA:
        d_plus, d_minus = d_plus * tl.load(beta + h), d_minus * tl.load(beta + h)
    keys = load_rows(k + b64 * kb + group * kh, j0, kt, T, D, BD, BT)
    w = load_matrix(w_k + h * D * F, D, F, BD, FP)
    plus, minus = hedgehog_rows(tl.dot(keys, w, input_precision=PRECISION), F)
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
    q, k, dy, w_q, w_k, g, beta, R, base_R, den, peak, dv,
    qb, qt, qh, kb, kt, kh, gb, gt, gh, T, stored, run, runs, scale,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr, EVERY: tl.constexpr, W: tl.constexpr, TERRACED: tl.constexpr, HAS_BASE: tl.constexpr,
    HAS_BETA: tl.constexpr, BI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv [B, T, G, V] of one tile of keys, summed over the query heads of its group."""
    group, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    groups = tl.num_programs(0)
    heads, b64, group64 = groups * GROUP, tl.cast(b, tl.int64), tl.cast(group, tl.int64)
    token = tl.arange(0, BI)
    j0 = n * BT
    key = j0 + tl.arange(0, BT)
    k += b64 * kb + group64 * kh
    acc = tl.zeros([BT, BV], tl.float32)
    edge = first_stored(j0, T, BT, EVERY, W, TERRACED)
    for r in range(GROUP):
        h = group * GROUP + r
        queries = q + b64 * qb + tl.cast(h, tl.int64) * qh
        gradients = dy + b64 * gb + tl.cast(h, tl.int64) * gh
        line = (b64 * heads + h) * T
        keys = load_rows(k, j0, kt, T, D, BD, BT)
        w = load_matrix(w_k + h * D * F, D, F, BD, FP)
        plus, minus = hedgehog_rows(tl.dot(keys, w, input_precision=PRECISION), F)
        if HAS_BETA:
            plus, minus = plus * tl.load(beta + h), minus * tl.load(beta + h)
        plus, minus = plus.to(keys.dtype), minus.to(keys.dtype)
        if edge < stored:
            at = (b64 * heads + h) * stored + edge
            acc = add_sums(acc, plus, minus, R, at, F, FP, V, BV, PRECISION)
            if HAS_BASE:
                at = (b64 * heads + h) * runs + edge * EVERY // run
                acc = add_sums(acc, plus, minus, base_R, at, F, FP, V, BV, PRECISION)
        wT = load_transposed(w_q + h * D * F, D, F, BD, FP)
        for i0 in range(first_outside(j0, W, TERRACED) // BT * BT, tl.minimum(edge * EVERY * BT, T), BI):
            query = i0 + token
            inverse = 1.0 / tl.load(den + line + query, mask=query < T, other=1.0)
            columns = load_columns(queries, i0, qt, T, D, BD, BI)
            logits = tl.dot(wT, columns, input_precision=PRECISION)
            a = tl.dot(plus, softmax_of(logits, 0, F).to(keys.dtype), input_precision=PRECISION)
            a = tl.dot(minus, softmax_of(-logits, 0, F).to(keys.dtype), a, input_precision=PRECISION)
            linear = is_linear(query[None, :], key[:, None], T, W, TERRACED)
            a = tl.where(linear, a * inverse[None, :], 0.0)
            rows = load_rows(gradients, i0, gt, T, V, BV, BI)
            acc = tl.dot(a.to(rows.dtype), rows, acc, input_precision=PRECISION)
        if W > 0:
            factor = tl.load(g + h)
            for i0 in range(j0, tl.minimum(first_outside(tl.minimum(j0 + BT, T) - 1, W, TERRACED), T), BI):
                query = i0 + token
                real = query < T
                inverse = factor / tl.load(den + line + query, mask=real, other=1.0)
                top = tl.load(peak + line + query, mask=real, other=0.0)
                seen = in_window(query[None, :], key[:, None], W, TERRACED) & real[None, :]
                columns = load_columns(queries, i0, qt, T, D, BD, BI)
                scores = tl.dot(keys, columns, input_precision=PRECISION) * (scale * LOG2E)
                p = tl.where(seen, inverse[None, :] * tl.exp2(scores - top[None, :]), 0.0)
                rows = load_rows(gradients, i0, gt, T, V, BV, BI)
                acc = tl.dot(p.to(rows.dtype), rows, acc, input_precision=PRECISION)
    store_rows(dv + (b64 * T * groups + group) * V, acc, j0, groups * V, T, V, BV, BT)


@triton.jit(do_not_specialize=["T"])
def joint_inputs(
    q, k, v, dy, w_k, g, den, peak, e, c, best, dx, dk,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, gb, gt, gh, T, scale,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr, W: tl.constexpr, TERRACED: tl.constexpr, BI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk [B, T, G, K] of one tile of keys, summed over the query heads of its group, from dx and the window."""
    group, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    groups = tl.num_programs(0)
    heads, b64, group64 = groups * GROUP, tl.cast(b, tl.int64), tl.cast(group, tl.int64)
    token = tl.arange(0, BI)
    j0 = n * BT
    key = j0 + tl.arange(0, BT)
    k += b64 * kb + group64 * kh
    v += b64 * vb + group64 * vh
    acc = tl.zeros([BT, BD], tl.float32)
    for r in range(GROUP):
        h = group * GROUP + r
        queries = q + b64 * qb + tl.cast(h, tl.int64) * qh
        gradients = dy + b64 * gb + tl.cast(h, tl.int64) * gh
        line = (b64 * heads + h) * T
        gradient = load_rows(dx + (b64 * T * heads + h) * F, j0, heads * F, T, F, FP, BT)
        wT = load_transposed(w_k + h * D * F, D, F, BD, FP)
        acc = tl.dot(gradient, wT, acc, input_precision=PRECISION)
        if W > 0:
            factor = tl.load(g + h)
            for i0 in range(j0, tl.minimum(first_outside(tl.minimum(j0 + BT, T) - 1, W, TERRACED), T), BI):
                query = i0 + token
                real = query < T
                top = tl.load(peak + line + query, mask=real, other=0.0)
                seen = in_window(query[None, :], key[:, None], W, TERRACED) & real[None, :]
                keys = load_rows(k, j0, kt, T, D, BD, BT)
                columns = load_columns(queries, i0, qt, T, D, BD, BI)
                scores = tl.dot(keys, columns, input_precision=PRECISION) * (scale * LOG2E)
                p = tl.where(seen, factor * tl.exp2(scores - top[None, :]), 0.0)
                values = load_rows(v, j0, vt, T, V, BV, BT)
                columns = load_columns(gradients, i0, gt, T, V, BV, BI)
                inverse = 1.0 / tl.load(den + line + query, mask=real, other=1.0)
                weight = tl.load(e + line + query, mask=real, other=0.0)
                ds = p * (
                    tl.dot(values, columns, input_precision=PRECISION) * inverse[None, :] - weight[None, :]
                )
                share = tl.load(c + line + query, mask=real, other=0.0)
                where = tl.load(best + line + query, mask=real, other=-1)
                ds -= tl.where(where[None, :] == key[:, None], share[None, :], 0.0)
                rows = load_rows(queries, i0, qt, T, D, BD, BI)
                acc = tl.dot((ds * scale).to(rows.dtype), rows, acc, input_precision=PRECISION)
    store_rows(dk + (b64 * T * groups + group) * D, acc, j0, groups * D, T, D, BD, BT)
