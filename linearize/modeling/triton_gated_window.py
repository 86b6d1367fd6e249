"""Gradients of a softmax window of W keys: dq, then dk and dv, everything else recomputed.

    p_ij = exp(s_ij - lse_i)    ds_ij = p_ij (dy_i . v_j - delta_i)    delta_i = sum_j p_ij dy_i . v_j

``window_queries`` leaves lse and delta behind, 8 bytes a query, for ``window_keys``. All is times ``factor``, the
window's share of the layer's output.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import Launch, cdiv
from .triton_common import load_columns, load_rows, store_rows
from .triton_gated import LOG2E, blocks, padded, precision, steps_of


@triton.jit(do_not_specialize=["time"])
def window_queries_kernel(
    q, k, v, dy, dq, lse, delta,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    time, scale, factor,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    W: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    k += b * k_b + h // R * k_h
    v += b * v_b + h // R * v_h
    t = n * BT
    token = tl.arange(0, BT)
    turned = load_rows(q + b * q_b + h * q_h, t, q_t, time, K, KP, BT)
    wanted = load_rows(dy + b * time * (H * V) + h * V, t, H * V, time, V, VP, BT)
    highest = tl.full([BT], -1e30, tl.float32)
    weight = tl.zeros([BT], tl.float32)
    share = tl.zeros([BT], tl.float32)
    for i in range(0, (W - 1 + BT + BK - 1) // BK):
        near = t + BT - ((W - 1 + BT + BK - 1) // BK - i) * BK
        keys = load_columns(k, near, k_t, time, K, KP, BK)
        scores = tl.dot(turned, keys, input_precision=PRECISION) * (scale * LOG2E)
        gain = tl.dot(wanted, load_columns(v, near, v_t, time, V, VP, BK), input_precision=PRECISION)
        there = near + tl.arange(0, BK)
        gap = (t + token)[:, None] - there[None, :]
        scores = tl.where((gap >= 0) & (gap < W) & (there >= 0)[None, :], scores, -1e30)
        higher = tl.maximum(highest, tl.max(scores, 1))
        grown = tl.where(scores > -1e29, tl.exp2(scores - higher[:, None]), 0.0)
        shrink = tl.exp2(highest - higher)
        weight = weight * shrink + tl.sum(grown, 1)
        share = share * shrink + tl.sum(grown * gain, 1)
        highest = higher
    weight = tl.where(weight > 0, weight, 1.0)
    share = share / weight
    highest += tl.log2(weight)
    found = tl.zeros([BT, KP], tl.float32)
    for i in range(0, (W - 1 + BT + BK - 1) // BK):
        near = t + BT - ((W - 1 + BT + BK - 1) // BK - i) * BK
        keys = load_columns(k, near, k_t, time, K, KP, BK)
        scores = tl.dot(turned, keys, input_precision=PRECISION) * (scale * LOG2E)
        gain = tl.dot(wanted, load_columns(v, near, v_t, time, V, VP, BK), input_precision=PRECISION)
        there = near + tl.arange(0, BK)
        gap = (t + token)[:, None] - there[None, :]
        seen = (gap >= 0) & (gap < W) & (there >= 0)[None, :]
        weights = tl.where(seen, tl.exp2(scores - highest[:, None]), 0.0) * (gain - share[:, None])
        found = tl.dot(weights.to(keys.dtype), tl.trans(keys), found, input_precision=PRECISION)
    store_rows(dq + b * time * (H * K) + h * K, found * (scale * factor), t, H * K, time, K, KP, BT)
    at = b * time * H + h + (t + token).to(tl.int64) * H
    tl.store(lse + at, highest, mask=t + token < time)
    tl.store(delta + at, share, mask=t + token < time)


@triton.jit(do_not_specialize=["time"])
def window_keys_kernel(
    q, k, v, dy, dk, dv, lse, delta,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    time, scale, factor,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    W: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of BK keys against blocks of BT queries of every head of its group."""
    n, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    H: tl.constexpr = G * R
    BLOCKS: tl.constexpr = (BK + W - 1 + BT - 1) // BT
    j = n * BK
    keys = load_rows(k + b * k_b + g * k_h, j, k_t, time, K, KP, BK)
    values = load_rows(v + b * v_b + g * v_h, j, v_t, time, V, VP, BK)
    on_keys = tl.zeros([BK, KP], tl.float32)
    on_values = tl.zeros([BK, VP], tl.float32)
    key = j + tl.arange(0, BK)
    for i in range(0, R * BLOCKS):
        h = g * R + i // BLOCKS
        t = j + i % BLOCKS * BT
        query = t + tl.arange(0, BT)
        turned = load_rows(q + b * q_b + h * q_h, t, q_t, time, K, KP, BT)
        wanted = load_rows(dy + b * time * (H * V) + h * V, t, H * V, time, V, VP, BT)
        at = b * time * H + h + query.to(tl.int64) * H
        total = tl.load(lse + at, mask=query < time, other=0.0)
        share = tl.load(delta + at, mask=query < time, other=0.0)
        scores = tl.dot(keys, tl.trans(turned), input_precision=PRECISION) * (scale * LOG2E)
        gap = query[None, :] - key[:, None]
        seen = (gap >= 0) & (gap < W) & (query < time)[None, :]
        weights = tl.where(seen, tl.exp2(scores - total[None, :]), 0.0)
        on_values = tl.dot(weights.to(wanted.dtype), wanted, on_values, input_precision=PRECISION)
        gain = tl.dot(values, tl.trans(wanted), input_precision=PRECISION)
        weights *= gain - share[None, :]
        on_keys = tl.dot(weights.to(turned.dtype), turned, on_keys, input_precision=PRECISION)
    store_rows(dk + b * time * (G * K) + g * K, on_keys * (scale * factor), j, G * K, time, K, KP, BK)
    store_rows(dv + b * time * (G * V) + g * V, on_values * factor, j, G * V, time, V, VP, BK)


def window_queries(
    q: Tensor, k: Tensor, v: Tensor, dy: Tensor, *, scale: float, window: int, factor: float,
    chosen: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, lse [B, T, H] in powers of two, delta [B, T, H]); dy is contiguous."""
    batch, time, heads, key_dim = q.shape
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, time, heads, dtype=torch.float32, device=q.device)
    delta = torch.empty_like(lse)
    sizes, options = blocks("gated_window_queries", q, chosen)
    window_queries_kernel[(cdiv(time, sizes["BT"]), heads, batch)](
        q, k, v, dy, dq, lse, delta, *steps_of(q), *steps_of(k), *steps_of(v), time, scale, factor,
        H=heads, R=heads // k.shape[2], K=key_dim, KP=padded(key_dim), V=v.shape[3], VP=padded(v.shape[3]),
        W=window, PRECISION=precision(q.dtype), **sizes, **options,
    )  # fmt: skip
    return dq, lse, delta


def window_keys(
    q: Tensor, k: Tensor, v: Tensor, dy: Tensor, lse: Tensor, delta: Tensor, *, scale: float, window: int,
    factor: float, chosen: Launch | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dk, dv) of the window."""
    batch, time, heads, key_dim = q.shape
    groups = k.shape[2]
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    sizes, options = blocks("gated_window_keys", q, chosen)
    window_keys_kernel[(cdiv(time, sizes["BK"]), groups, batch)](
        q, k, v, dy, dk, dv, lse, delta, *steps_of(q), *steps_of(k), *steps_of(v), time, scale, factor,
        G=groups, R=heads // groups, K=key_dim, KP=padded(key_dim), V=v.shape[3], VP=padded(v.shape[3]),
        W=window, PRECISION=precision(q.dtype), **sizes, **options,
    )  # fmt: skip
    return dk, dv
