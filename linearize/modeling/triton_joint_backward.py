"""The backward kernels of ``triton_joint.py``: every gradient in O(T), without atomics, the same in every run.

With den_i the normaliser, u_i = dy_i / den_i, e_i = (dy_i . y_i) / den_i, the cotangent of any weight is

    G_ij = u_i . v_j - e_i                                  dphi_q_i = b sum_linear G_ij phi_k_j = b (S u_i - e_i z)
    c_i  = sum_window p_ij G_ij = - phi_q_i . dphi_q_i      dphi_k_j = b sum_linear G_ij phi_q_i = b (R v_j - r)
    ds_ij = p_ij G_ij - c_i [j = j*_i]                      dv_j = sum_window p_ij u_i + b R^T phi_k_j

S, z sum over older keys (the forward's), R, r over later queries (``joint_sums`` in reverse); j*_i is the key that
attains the row's window maximum, the first of equals. The second form of c_i, and so the gradients of the factors,
needs nothing of the window: a transfer, where q, k and v are frozen, never forms a score.

    joint_delta     u and e, unless the forward has left them
    joint_queries   a tile of queries: the logits' gradient dx_q of its map, c, j*; with INPUTS dq
    joint_keys, joint_values, joint_inputs      dx_k, dv and dk (``triton_joint_keys.py``)
    joint_maps      dW_h = sum_t x_t dx_t^T, in parts that torch adds
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
    hedgehog_gradient,
    hedgehog_rows,
    in_window,
    load_rows,
    store_rows,
)
from .triton_joint import Forward
from .triton_joint_keys import joint_inputs, joint_keys, joint_values
from .triton_joint_sums import (
    BT,
    joint_sums,
    last_contiguous,
    minus_z,
    of_type,
    precision_of,
    read_by,
    strides,
    sums_gradient,
    widths,
)
from .triton_tiles import block, matrices, matrix, tile, tiles


@triton.jit(do_not_specialize=["T"])
def joint_delta(dy, y, den, u, e, gb, gt, gh, T, V: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr):
    """u [B, T, H, V] and e [B, H, T] of dy and y [B, T, H, V]; u and y contiguous."""
    h, n = tl.program_id(0), tl.program_id(1)
    heads, b64 = tl.num_programs(0), tl.cast(tl.program_id(2), tl.int64)
    at = (b64 * T * heads + h) * V
    one = load_rows(dy + b64 * gb + tl.cast(h, tl.int64) * gh, n * BT, gt, T, V, BV, BT).to(tl.float32)
    other = load_rows(y + at, n * BT, heads * V, T, V, BV, BT).to(tl.float32)
    query = n * BT + tl.arange(0, BT)
    line = (b64 * heads + h) * T + query
    one *= (1.0 / tl.load(den + line, mask=query < T, other=1.0))[:, None]
    store_rows(u + at, one, n * BT, heads * V, T, V, BV, BT)
    tl.store(e + line, tl.sum(one * other, 1), mask=query < T)


@triton.jit(do_not_specialize=["T", "stored", "run", "runs"])
def joint_queries(
    q, k, v, u, w_q, w_k, g, beta, S, Z, base_S, base_Z, peak, e, dx, dq, c, best, near_k,
    kb, kt, kh, T, stored, run, runs, scale,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr, EVERY: tl.constexpr, MIXED: tl.constexpr, W: tl.constexpr, TERRACED: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_BETA: tl.constexpr, MAPS: tl.constexpr, INPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """c [B, H, T]; where MAPS dx [B, T, H, F]; where INPUTS dq [B, T, H, K] and
    best [B, H, T]."""
    h, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(0)
    b64, group = tl.cast(b, tl.int64), h // GROUP
    token = tl.arange(0, BT)
    i0 = n * BT
    query = i0 + token
    line = (b64 * heads + h) * T + query
    weight = tl.load(e + line, mask=query < T, other=0.0)
    upon = tile(u, b, i0, h, BT, BV)
    rows = tile(q, b, i0, h, BT, BD)

    d_plus, d_minus = tl.zeros([BT, FP], tl.float32), tl.zeros([BT, FP], tl.float32)
    edge = tl.minimum(first_in_window(i0, W, TERRACED), i0) // BT // EVERY
    at, base = (b * heads + h) * stored + edge, (b * heads + h) * runs + edge * EVERY // run
    d_plus, d_minus = sums_gradient(d_plus, d_minus, upon, S, at, FP, BV, PRECISION)
    if HAS_BASE:
        d_plus, d_minus = sums_gradient(d_plus, d_minus, upon, base_S, base, FP, BV, PRECISION)
    d_plus, d_minus = minus_z(d_plus, d_minus, weight, Z, at, F, FP)
    if HAS_BASE:
        d_plus, d_minus = minus_z(d_plus, d_minus, weight, base_Z, base, F, FP)
    if MIXED:
        newest = first_in_window(tl.minimum(i0 + BT, T) - 1, W, TERRACED)
        for j0 in range(edge * EVERY * BT, newest, BT):
            vT = tile(v, b, j0, group, BT, BV).T
            cotangent = tl.dot(upon, vT, input_precision=PRECISION) - weight[:, None]
            key = (j0 + token)[None, :]
            linear = (key <= query[:, None]) & (key < first_in_window(query, W, TERRACED)[:, None])
            cotangent = tl.where(linear, cotangent, 0.0).to(upon.dtype)
            keys = tile(k, b, j0, group, BT, BD)
            key_plus, key_minus = hedgehog_rows(
                tl.dot(keys, matrix(w_k, h, BD, FP), input_precision=PRECISION), F
            )
            d_plus = tl.dot(cotangent, key_plus.to(upon.dtype), d_plus, input_precision=PRECISION)
            d_minus = tl.dot(cotangent, key_minus.to(upon.dtype), d_minus, input_precision=PRECISION)
    if HAS_BETA:
        d_plus, d_minus = d_plus * tl.load(beta + h), d_minus * tl.load(beta + h)
    plus, minus = hedgehog_rows(tl.dot(rows, matrix(w_q, h, BD, FP), input_precision=PRECISION), F)
    share = -tl.sum(plus * d_plus + minus * d_minus, 1)
    tl.store(c + line, share, mask=query < T)
    gradient = hedgehog_gradient(plus, minus, d_plus, d_minus).to(upon.dtype)
    if MAPS:
        store_rows(dx + (b64 * T * heads + h) * F, gradient, i0, heads * F, T, F, FP, BT)
    if INPUTS:
        acc = tl.zeros([BT, BD], tl.float32)
        if W > 0:
            found = tl.full([BT], float("-inf"), tl.float32)
            where = tl.zeros([BT], tl.int32)
            top = tl.load(peak + line, mask=query < T, other=0.0) - tl.log2(tl.load(g + h))
            for j0 in range(first_in_window(i0, W, TERRACED) // BT * BT, tl.minimum(i0 + BT, T), BT):
                keys = tile(k, b, j0, group, BT, BD)
                seen = in_window(query[:, None], (j0 + token)[None, :], W, TERRACED)
                scores = tl.dot(rows, keys.T, input_precision=PRECISION) * (scale * LOG2E)
                scores = tl.where(seen, scores, -1e30)
                largest, place = tl.max(scores, 1, return_indices=True)
                where = tl.where(largest > found, j0 + place, where)
                found = tl.maximum(found, largest)
                p = tl.where(seen, tl.exp2(scores - top[:, None]), 0.0)
                vT = tile(v, b, j0, group, BT, BV).T
                cotangent = tl.dot(upon, vT, input_precision=PRECISION) - weight[:, None]
                ds = p * cotangent
                acc = tl.dot(ds.to(upon.dtype), keys, acc, input_precision=PRECISION)
            tl.store(best + line, where, mask=query < T)
            column = tl.arange(0, BD)
            place = near_k + b64 * kb + group * kh + tl.cast(where, tl.int64)[:, None] * kt + column[None, :]
            peaks = tl.load(place, mask=(query < T)[:, None] & (column < D)[None, :], other=0.0)
            acc = (acc - share[:, None] * peaks.to(tl.float32)) * scale
        acc = tl.dot(gradient, matrix(w_q, h, BD, FP).T, acc, input_precision=PRECISION)
        store_rows(dq + (b64 * T * heads + h) * D, acc, i0, heads * D, T, D, BD, BT)


@triton.jit(do_not_specialize=["T", "run"])
def joint_maps(
    x, dx, part, T, run,
    D: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """part [B, parts, H, K, F] fp32: sums of x dx^T over ``run`` tiles."""
    h, p = tl.program_id(0), tl.program_id(1)
    heads, parts, b = tl.num_programs(0), tl.num_programs(1), tl.program_id(2)
    acc = tl.zeros([BD, FP], tl.float32)
    for n in range(p * run, tl.minimum((p + 1) * run, (T + BT - 1) // BT)):
        columns = tile(x, b, n * BT, h // GROUP, BT, BD).T
        acc = tl.dot(columns, tile(dx, b, n * BT, h, BT, FP), acc, input_precision=PRECISION)
    row, column = tl.arange(0, BD), tl.arange(0, FP)
    at = part + ((tl.cast(b, tl.int64) * parts + p) * heads + h) * D * F
    tl.store(at + row[:, None] * F + column[None, :], acc, mask=(row < D)[:, None] & (column < F)[None, :])


class Gradients(NamedTuple):
    """None where it was not asked for."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    w_q: Tensor | None
    """[H, K, f] fp32."""
    w_k: Tensor | None
    c: Tensor
    """[B, H, T]; its sum over B and T is g dL/dg and - beta dL/dbeta."""


def map_gradient(x: Tensor, dx: Tensor) -> Tensor:
    """[H, K, f] fp32, the sum of x dx^T over tokens; x [B, T, G or H, K], dx [B, T, H, f]."""
    setting = launch("joint_maps", x.device, **widths_of(x, x, dx))
    batch, time, heads, half = dx.shape
    count = cdiv(time, BT)
    run = max(1, min(count, cdiv(batch * heads * count, 1056)))
    parts = cdiv(count, run)
    part = torch.empty(batch, parts, heads, x.shape[-1], half, dtype=torch.float32, device=x.device)
    joint_maps[(heads, parts, batch)](
        tiles(x, BT), tiles(dx, BT), part, time, run, D=x.shape[-1], F=half, FP=block(half), BD=block(x.shape[-1]),
        BT=BT, GROUP=heads // x.shape[2],
        PRECISION=precision_of(x), num_warps=setting.warps, num_stages=setting.stages,
    )  # fmt: skip
    return part.sum((0, 1))


def joint_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    g: Tensor,
    beta: Tensor | None,
    done: Forward,
    *,
    scale: float,
    window: int | None,
    terraced: bool,
    maps: bool,
    inputs: bool,
) -> Gradients:
    """Gradients after ``joint_forward(..., save=True)``, of the maps, of q, k and v, or of both.

    With a teacher ``dy`` is what the forward left, (y - teacher) / den, and ``done.e`` is set: the gradients are those
    of half the sum of squares of y - teacher.
    """
    batch, time, heads = q.shape[:3]
    groups, half, tiles_a_row = k.shape[2], w_q.shape[-1], cdiv(q.shape[1], BT)
    assert done.den is not None and done.peak is not None
    dy = last_contiguous(dy)
    exact: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    shape = widths(q, v, w_q)
    u, e = dy, done.e
    if e is None:
        u, e = (
            torch.empty(dy.shape, dtype=dy.dtype, device=q.device),
            torch.empty(batch, heads, time, **exact),
        )
        joint_delta[(heads, tiles_a_row, batch)](
            dy, done.y, done.den, u, e, *strides(dy), time, V=shape["V"], BV=shape["BV"], BT=BT, num_warps=4
        )
    c = torch.empty(batch, heads, time, **exact)
    best = torch.empty(batch, heads, time, dtype=torch.int32, device=q.device) if inputs and window else c
    dx_q = torch.empty(batch, time, heads, half, dtype=q.dtype, device=q.device) if maps else c
    dx_k = torch.empty(batch, time, heads, half, dtype=q.dtype, device=q.device)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if inputs else c
    shape |= {
        "BT": BT, "GROUP": heads // groups, "W": window or 0, "TERRACED": terraced,
        "HAS_BETA": beta is not None and bool(window),
    }  # fmt: skip
    wide = widths_of(q, v, w_q)
    b, sums = g if beta is None else beta, done.sums
    now = read_by(sums, shape, window, terraced)
    near = [tiles(x, BT) for x in (q, k, v, u)]
    maps_of = [matrices(w, shape["BD"], shape["FP"]) for w in (w_q, w_k)]
    name = f"joint_queries_{'full' if inputs else 'transfer'}" + now.suffix
    setting = launch(name, q.device, **wide)
    joint_queries[(heads, tiles_a_row, batch)](
        *near, *maps_of, g, b, *now.tensors, done.peak, e,
        dx_q, dq, c, best, k, *strides(k), time, *now.places, scale,
        **shape, **now.options, MAPS=maps, INPUTS=inputs, **of_type(setting, q),
    )  # fmt: skip
    later = joint_sums(q, w_q, u, reverse=e)
    then = read_by(later, shape, window, terraced)
    setting = launch("joint_keys" + then.suffix, q.device, **wide)
    joint_keys[(heads, tiles_a_row, batch)](
        *near, *maps_of, b, *then.tensors, e, dx_k, time, *then.places,
        **shape, **then.options, **of_type(setting, q),
    )  # fmt: skip
    on_inputs: tuple[Tensor | None, ...] = (None, None, None)
    if inputs:
        dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
        setting = launch("joint_values" + then.suffix, q.device, **wide)
        joint_values[(groups, tiles_a_row, batch)](
            near[0], near[1], near[3], *maps_of, g, b, then.tensors[0], then.tensors[2], done.peak, dv,
            time, *then.places, scale, **shape, **then.options, **of_type(setting, q),
        )  # fmt: skip
        setting = launch("joint_inputs", q.device, **wide)
        del shape["HAS_BETA"]
        joint_inputs[(groups, tiles_a_row, batch)](
            *near, maps_of[1], g, done.peak, e, c, best, tiles(dx_k, BT, shape["FP"]), dk,
            time, scale, **shape, **of_type(setting, q),
        )  # fmt: skip
        on_inputs = (dq, dk, dv)
    on_maps = (map_gradient(q, dx_q), map_gradient(k, dx_k)) if maps else (None, None)
    return Gradients(*on_inputs, *on_maps, c)
