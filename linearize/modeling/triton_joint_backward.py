"""The backward kernels of ``triton_joint.py``: every gradient in O(T), without atomics, the same in every run.

With den_i the normaliser, e_i = dy_i . y_i, p_ij the window's weights, the cotangent of any weight is

    G_ij = (dy_i . v_j - e_i) / den_i                  dphi_q_i = b sum_linear G_ij phi_k_j = b (S dy_i - e_i z) / den_i
    c_i  = sum_window p_ij G_ij = - phi_q_i . dphi_q_i dphi_k_j = b sum_linear G_ij phi_q_i = b (R v_j - r)
    ds_ij = p_ij G_ij - c_i [j = j*_i]                 dv_j = sum_window p_ij dy_i / den_i + b R^T phi_k_j

S, z sum over older keys (the forward's), R, r over later queries (``joint_sums`` in reverse); j*_i, from the forward,
is the key that attains the row's window maximum, the first of equals. The second form of c_i, and so the gradients of
the factors, needs nothing of the window: a transfer, where q, k and v are frozen, never forms a score. No tile of dy is
divided by den_i: it is in the window's exponents (``level``), in the features of R and in rows of dphi_q.

    joint_queries   a tile of queries: e unless the forward has left it, the logits' gradient dx_q of its map, c;
                    with INPUTS dq
    joint_keys, joint_inputs    dx_k, then dk and dv (``triton_joint_keys.py``)
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
    hedgehog_backward,
    hedgehog_rows,
    seen_in_tiles,
    store_rows,
)
from .triton_joint import Forward
from .triton_joint_keys import joint_inputs, joint_keys
from .triton_joint_sums import (
    BT,
    half_gradient,
    joint_sums,
    of_type,
    precision_of,
    read_by,
    widths,
)
from .triton_tiles import aligned, block, matrices, matrix, tile, tiles


@triton.jit(do_not_specialize=["T", "stored", "run", "runs"])
def joint_queries(
    q, k, v, dy, y, w_q, w_k, beta, S, Z, base_S, base_Z, inverse, level, best, e, dx, dq, c,
    T, stored, run, runs, scale,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr, EVERY: tl.constexpr, MIXED: tl.constexpr, W: tl.constexpr, TERRACED: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_BETA: tl.constexpr, HAS_E: tl.constexpr, MAPS: tl.constexpr, INPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """c [B, H, T]; unless HAS_E, e [B, H, T]; where MAPS dx [B, T, H, F]; where INPUTS dq [B, T, H, K]."""
    h, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(0)
    b64, group = tl.cast(b, tl.int64), h // GROUP
    token = tl.arange(0, BT)
    i0 = n * BT
    query = i0 + token
    line = (b64 * heads + h) * T + query
    if HAS_E:
        weight = tl.load(e + line, mask=query < T, other=0.0)
        upon = tile(dy, b, i0, h, BT, BV)
    else:
        upon = tile(dy, b, i0, h, BT, BV)
        weight = tl.sum(upon.to(tl.float32) * tile(y, b, i0, h, BT, BV).to(tl.float32), 1)
        tl.store(e + line, weight, mask=query < T)
    rows = tile(q, b, i0, h, BT, BD)

    edge = tl.minimum(first_in_window(i0, W, TERRACED), i0) // BT // EVERY
    at, base = (b * heads + h) * stored + edge, (b * heads + h) * runs + edge * EVERY // run
    d_plus = half_gradient(upon, weight, 0, S, Z, at, base_S, base_Z, base, HAS_BASE, F, FP, BV, PRECISION)
    d_minus = half_gradient(upon, weight, 1, S, Z, at, base_S, base_Z, base, HAS_BASE, F, FP, BV, PRECISION)
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
    shrink = tl.load(inverse + line, mask=query < T, other=0.0)
    if HAS_BETA:
        shrink *= tl.load(beta + h)
    d_plus, d_minus = d_plus * shrink[:, None], d_minus * shrink[:, None]
    weights = matrix(w_q, h, BD, FP)
    logits = tl.dot(rows, weights, input_precision=PRECISION)
    gradient, whole = hedgehog_backward(logits, d_plus, d_minus, F)
    gradient, share = gradient.to(upon.dtype), -whole
    tl.store(c + line, share, mask=query < T)
    if MAPS:
        store_rows(dx + (b64 * T * heads + h) * F, gradient, i0, heads * F, T, F, FP, BT)
    if INPUTS:
        acc = tl.dot(gradient, weights.T, input_precision=PRECISION)
        if W > 0:
            top = tl.load(level + line, mask=query < T, other=0.0)
            where = tl.load(best + line, mask=query < T, other=-1)
            for j0 in range(first_in_window(i0, W, TERRACED) // BT * BT, tl.minimum(i0 + BT, T), BT):
                key = (j0 + token)[None, :]
                values = tile(v, b, j0, group, BT, BV)
                ds = tl.zeros([BT, BT], tl.float32) - weight[:, None]
                ds = tl.dot(upon, values.T, ds, input_precision=PRECISION)
                keys = tile(k, b, j0, group, BT, BD)
                scores = tl.dot(rows, keys.T, input_precision=PRECISION) * (scale * LOG2E)
                seen = seen_in_tiles(query[:, None], key, W, TERRACED, BT)
                p = tl.where(seen, tl.exp2(scores - top[:, None]), 0.0)
                ds = ds * p - tl.where(key == where[:, None], share[:, None], 0.0)
                acc = tl.dot((ds * scale).to(upon.dtype), keys, acc, input_precision=PRECISION)
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

    With a teacher ``dy`` is what the forward left, y - teacher, and ``done.e`` is set: the gradients are those of half
    the sum of squares of y - teacher.
    """
    batch, time, heads = q.shape[:3]
    groups, half, tiles_a_row = k.shape[2], w_q.shape[-1], cdiv(q.shape[1], BT)
    assert done.inverse is not None and done.level is not None
    dy = aligned(dy)
    exact: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    shape = widths(q, v, w_q)
    e = torch.empty(batch, heads, time, **exact) if done.e is None else done.e
    c = torch.empty(batch, heads, time, **exact)
    best = c if done.best is None else done.best
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
    near = [tiles(x, BT) for x in (q, k, v, dy)]
    maps_of = [matrices(w, shape["BD"], shape["FP"]) for w in (w_q, w_k)]
    name = f"joint_queries_{'full' if inputs else 'transfer'}" + now.suffix
    setting = launch(name, q.device, **wide)
    joint_queries[(heads, tiles_a_row, batch)](
        *near, near[3] if done.e is not None else tiles(done.y, BT), *maps_of, b, *now.tensors,
        done.inverse, done.level, best, e, dx_q, dq, c, time, *now.places, scale,
        **shape, **now.options, HAS_E=done.e is not None, MAPS=maps, INPUTS=inputs, **of_type(setting, q),
    )  # fmt: skip
    later = joint_sums(q, w_q, dy, reverse=(done.inverse, e))
    then = read_by(later, shape, window, terraced)
    setting = launch("joint_keys" + then.suffix, q.device, **wide)
    joint_keys[(heads, tiles_a_row, batch)](
        *near, *maps_of, b, *then.tensors, done.inverse, e, dx_k, time, *then.places,
        **shape, **then.options, **of_type(setting, q),
    )  # fmt: skip
    on_inputs: tuple[Tensor | None, ...] = (None, None, None)
    if inputs:
        dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
        setting = launch("joint_inputs" + then.suffix, q.device, **wide)
        joint_inputs[(groups, tiles_a_row, batch)](
            *near, *maps_of, b, then.tensors[0], then.tensors[2], done.inverse, done.level, e, c, best,
            tiles(dx_k, BT, shape["FP"]), dk, dv,
            time, *then.places, scale, **shape, **then.options, **of_type(setting, q),
        )  # fmt: skip
        on_inputs = (dq, dk, dv)
    on_maps = (map_gradient(q, dx_q), map_gradient(k, dx_k)) if maps else (None, None)
    return Gradients(*on_inputs, *on_maps, c)
