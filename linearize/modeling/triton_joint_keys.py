"""The key side of the joint layer's gradients; ``triton_joint_backward.py`` has the equations and the launches.

joint_keys      a tile of keys of one query head: the logits' gradient dx_k of its map
joint_inputs    a tile of keys, all query heads of its group in turn: dv, and dk from dx_k and the window
"""

import triton
import triton.language as tl

from .triton_common import (
    LOG2E,
    first_outside,
    hedgehog_backward,
    hedgehog_rows,
    seen_in_tiles,
    softmax_of,
    store_rows,
)
from .triton_joint_sums import add_half, half_gradient
from .triton_tiles import matrix, tile


@triton.jit(do_not_specialize=["T", "stored", "run", "runs"])
def joint_keys(
    q, k, v, dy, w_q, w_k, beta, R, Z, base_R, base_Z, inverse, e, dx,
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
        at, base = (b * heads + h) * stored + edge, (b * heads + h) * runs + edge * EVERY // run
        d_plus = half_gradient(
            values, ones, 0, R, Z, at, base_R, base_Z, base, HAS_BASE, F, FP, BV, PRECISION
        )
        d_minus = half_gradient(
            values, ones, 1, R, Z, at, base_R, base_Z, base, HAS_BASE, F, FP, BV, PRECISION
        )
    if MIXED:
        # Queries that some keys of the tile have left, and not all.
        for i0 in range(first_outside(j0, W, TERRACED) // BT * BT, tl.minimum(edge * EVERY * BT, T), BT):
            query = i0 + token
            weight = tl.load(e + line + query, mask=query < T, other=0.0)
            shrink = tl.load(inverse + line + query, mask=query < T, other=0.0)
            columns = tile(dy, b, i0, h, BT, BV).T
            cotangent = tl.dot(values, columns, input_precision=PRECISION) - weight[None, :]
            cotangent *= shrink[None, :]
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
    logits = tl.dot(keys, matrix(w_k, h, BD, FP), input_precision=PRECISION)
    gradient, _ = hedgehog_backward(logits, d_plus, d_minus, F)
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
def joint_inputs(
    q, k, v, dy, w_q, w_k, beta, R, base_R, inverse, level, e, c, best, dx, dk, dv,
    T, stored, run, runs, scale,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr, EVERY: tl.constexpr, MIXED: tl.constexpr, W: tl.constexpr, TERRACED: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_BETA: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dk [B, T, G, K] and dv [B, T, G, V] of one tile of keys, summed over the query heads of its group."""
    group, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    groups = tl.num_programs(0)
    heads, b64 = groups * GROUP, tl.cast(b, tl.int64)
    token = tl.arange(0, BT)
    j0 = n * BT
    key = j0 + token
    keys = tile(k, b, j0, group, BT, BD)
    on_v = tl.zeros([BT, BV], tl.float32)
    edge = first_stored(j0, T, BT, EVERY, W, TERRACED)
    for r in range(GROUP):
        h = group * GROUP + r
        line = (b64 * heads + h) * T
        plus, minus = hedgehog_rows(tl.dot(keys, matrix(w_k, h, BD, FP), input_precision=PRECISION), F)
        if HAS_BETA:
            plus, minus = plus * tl.load(beta + h), minus * tl.load(beta + h)
        plus, minus = plus.to(keys.dtype), minus.to(keys.dtype)
        if edge < stored:
            at, base = (b * heads + h) * stored + edge, (b * heads + h) * runs + edge * EVERY // run
            on_v = add_half(on_v, plus, 0, R, at, base_R, base, HAS_BASE, FP, BV, PRECISION)
            on_v = add_half(on_v, minus, 1, R, at, base_R, base, HAS_BASE, FP, BV, PRECISION)
        if MIXED:
            wT = matrix(w_q, h, BD, FP).T
            for i0 in range(first_outside(j0, W, TERRACED) // BT * BT, tl.minimum(edge * EVERY * BT, T), BT):
                query = i0 + token
                columns = tile(q, b, i0, h, BT, BD).T
                logits = tl.dot(wT, columns, input_precision=PRECISION)
                a = tl.dot(plus, softmax_of(logits, 0, F).to(keys.dtype), input_precision=PRECISION)
                a = tl.dot(minus, softmax_of(-logits, 0, F).to(keys.dtype), a, input_precision=PRECISION)
                linear = is_linear(query[None, :], key[:, None], T, W, TERRACED)
                shrink = tl.load(inverse + line + query, mask=query < T, other=0.0)
                a = tl.where(linear, a * shrink[None, :], 0.0)
                rows = tile(dy, b, i0, h, BT, BV)
                on_v = tl.dot(a.to(rows.dtype), rows, on_v, input_precision=PRECISION)
    on_k = tl.zeros([BT, BD], tl.float32)
    for r in range(GROUP):
        h = group * GROUP + r
        on_k = tl.dot(tile(dx, b, j0, h, BT, FP), matrix(w_k, h, BD, FP).T, on_k, input_precision=PRECISION)
    if W > 0:
        values = tile(v, b, j0, group, BT, BV)
        newest = tl.minimum(first_outside(tl.minimum(j0 + BT, T) - 1, W, TERRACED), T)
        count = (newest - j0 + BT - 1) // BT
        # All heads in one loop, so that tiles of the next are on their way too.
        for i in tl.range(0, GROUP * count, num_stages=STAGES):
            h, i0 = group * GROUP + i // count, j0 + i % count * BT
            query = i0 + token
            line = (b64 * heads + h) * T + query
            rows, upon = tile(q, b, i0, h, BT, BD), tile(dy, b, i0, h, BT, BV)
            weight = tl.load(e + line, mask=query < T, other=0.0)
            ds = tl.zeros([BT, BT], tl.float32) - weight[None, :]
            ds = tl.dot(values, upon.T, ds, input_precision=PRECISION)
            top = tl.load(level + line, mask=query < T, other=float("inf"))
            scores = tl.dot(keys, rows.T, input_precision=PRECISION) * (scale * LOG2E) - top[None, :]
            seen = seen_in_tiles(query[None, :], key[:, None], W, TERRACED, BT)
            p = tl.where(seen, tl.exp2(scores), 0.0)
            on_v = tl.dot(p.to(upon.dtype), upon, on_v, input_precision=PRECISION)
            where = tl.load(best + line, mask=query < T, other=-1)
            share = tl.load(c + line, mask=query < T, other=0.0)
            ds = ds * p - tl.where(where[None, :] == key[:, None], share[None, :], 0.0)
            on_k = tl.dot((ds * scale).to(rows.dtype), rows, on_k, input_precision=PRECISION)
    store_rows(dk + (b64 * T * groups + group) * D, on_k, j0, groups * D, T, D, BD, BT)
    store_rows(dv + (b64 * T * groups + group) * V, on_v, j0, groups * V, T, V, BV, BT)
