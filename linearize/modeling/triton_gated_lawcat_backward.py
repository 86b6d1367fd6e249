"""Gradients of LAWCAT's layer without a window.

With u = dy / den and e = dy . y / den, everything per query head (compare ``triton_gated_liger_backward.py``),

    dphi_q_t = S_t u_t - e_t z_t          R_t = diag(a_{t+1}) R_{t+1} + phi_q_t u_t^T     r_t likewise, e_t for u_t
    dphi_k_t = R_t v_t - r_t              dv_t = R_t^T phi_k_t
    dlog a_t = sum_{s >= t} (phi_q_s dphi_q_s - phi_k_s dphi_k_s), what lies behind a tile being S R - z r there

Kernels end at a = q^ W: the gradients of maps, taps, q and k follow from that of a by plain products, and what heads
share is summed over them last, both in torch.

    back_states    R and r behind segments and tiles      ``states`` in reverse
    queries        da of q, and phi_q dphi_q              a tile of one head
    keys           da of k, and dlog a                    a tile of one head
    values         dv of a head                           a tile of one head
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .convolved import convolved, mapped
from .launches import Launch
from .triton_common import load_matrix, load_rows, store_rows
from .triton_gated import blocks, earlier, scan, steps_of
from .triton_gated_lawcat import Layer, States, forward, layer_of, taps_of, tile_states
from .triton_gated_maps import (
    all_features_by_columns,
    all_gates_by_columns,
    both,
    channels,
    features_by_columns,
    features_by_rows,
    gates_by_columns,
    gates_by_rows,
    load_both,
    pairwise_gradient,
    pairwise_scores,
    store_both,
)


@triton.jit
def load_wanted(
    dy,
    den,
    e,
    t,
    time,
    H: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    DTYPE: tl.constexpr,
    BT: tl.constexpr,
):
    """(u [BT, VP], e [BT]) of one head; zeros where there is no token."""
    token = t + tl.arange(0, BT)
    at = token.to(tl.int64) * H
    weight = tl.load(den + at, mask=token < time, other=1.0)
    u = load_rows(dy, t, H * V, time, V, VP, BT).to(tl.float32) / weight[:, None]
    return u.to(DTYPE), tl.load(e + at, mask=token < time, other=0.0)


@triton.jit(do_not_specialize=["time", "segments"])
def back_states_kernel(
    q, logits, taps, map, dy, den, e, sums, sums_z, states, states_z, fine, fine_z,
    q_b, q_t, q_h, g_b, g_t, g_h,
    time, segments, inverse,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    f: tl.constexpr, FP: tl.constexpr, TAPS_Q: tl.constexpr, C: tl.constexpr, CS: tl.constexpr, MODE: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``states_kernel`` from a segment's end: MODE "sums" or "fine", what is behind every tile."""
    BT: tl.constexpr = C // 2
    F: tl.constexpr = 2 * f
    n, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q += b * q_b + h * q_h
    logits += b * g_b + h // R * g_h
    taps += h * K * TAPS_Q
    map += h * K * f
    dy += b * time * (H * V) + h * V
    den += b * time * H + h
    e += b * time * H + h
    row = b * H + h
    at, there = both(f, FP)
    if MODE == "sums":
        state = tl.zeros([2 * FP, VP], tl.float32)
        z = tl.zeros([2 * FP], tl.float32)
    else:
        state = load_both(states + (row * (segments + 1) + n) * F * V, f, FP, V, VP)
        z = tl.load(states_z + (row * (segments + 1) + n) * F + at, mask=there, other=0.0)
    first = n * CS
    count = tl.cdiv(tl.minimum(CS, time - first), BT)
    for i in range(0, count):
        t = first + (count - 1 - i) * BT
        if MODE == "fine":  # noqa: SIM102
            if ((t + BT) % C == 0) | (i == 0):
                tile = row * tl.cdiv(time, C) + t // C
                store_both(fine + tile * F * V, state, f, FP, V, VP)
                tl.store(fine_z + tile * F + at, z, mask=there)
        reading = all_features_by_columns(q, taps, map, t, q_t, time, K, KP, f, FP, TAPS_Q, BT, PRECISION)
        log_decay = all_gates_by_columns(logits, t, g_t, time, inverse, f, FP, BT)
        reading *= tl.exp(tl.cumsum(log_decay, 1))
        kept = tl.exp(tl.sum(log_decay, 1))
        u, share = load_wanted(dy, den, e, t, time, H, V, VP, DTYPE, BT)
        z = z * kept + tl.sum(reading * share[None, :], 1)
        state = tl.dot(reading.to(DTYPE), u, state * kept[:, None], input_precision=PRECISION)
    if MODE == "sums":
        store_both(sums + (row * segments + n) * F * V, state, f, FP, V, VP)
        tl.store(sums_z + (row * segments + n) * F + at, z, mask=there)


@triton.jit
def decayed(
    phi, logits, t, g_t, time, inverse, f: tl.constexpr, FP: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr,
    OF_KEYS: tl.constexpr,
):  # fmt: skip
    """One half [C, FP] times its decay from the tile's start, or of keys, over it, for a product."""
    running = tl.cumsum(gates_by_rows(logits, t, g_t, time, inverse, f, FP, C), 0)
    return (phi * tl.exp(-running if OF_KEYS else running)).to(DTYPE)


@triton.jit
def half_of_queries(
    phi_k, pairs, u, share, logits, t, g_t, time, inverse, state, z,
    V: tl.constexpr, VP: tl.constexpr, f: tl.constexpr, FP: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
    STRONG: tl.constexpr,
):  # fmt: skip
    """dphi_q [C, FP] of one half; phi_k and pairs are ready for a product where they are not ``STRONG``."""
    found = tl.dot(u, tl.trans(load_matrix(state, f, V, FP, VP)), input_precision=PRECISION)
    found -= share[:, None] * channels(z, f, FP)[None, :]
    if not STRONG:
        found = tl.dot(pairs, phi_k, found, input_precision=PRECISION)
    running = tl.cumsum(gates_by_rows(logits, t, g_t, time, inverse, f, FP, C), 0)
    found *= tl.exp(running)
    if STRONG:
        found += pairwise_gradient(pairs, phi_k, running, C, FP, False)
    return found


@triton.jit(do_not_specialize=["time"])
def queries_kernel(
    q, k, v, logits, taps_q, taps_k, map_q, map_k, dy, den, e, fine, fine_z, strong, da, change,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    time, inverse,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    f: tl.constexpr, FP: tl.constexpr, TAPS_Q: tl.constexpr, TAPS_K: tl.constexpr, C: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    n, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    F: tl.constexpr = 2 * f
    g = h // R
    tiles = tl.cdiv(time, C)
    if (tl.load(strong + (b * (H // R) + g) * tiles + n) > 0) != STRONG:
        return
    t = n * C
    tile = (b * H + h) * tiles + n
    logits += b * g_b + g * g_h
    key_plus, key_minus = features_by_rows(
        k + b * k_b + g * k_h, taps_k + h * K * TAPS_K, map_k + h * K * f, t, k_t, time,
        K, KP, f, FP, TAPS_K, C, PRECISION,
    )  # fmt: skip
    if not STRONG:
        key_plus = decayed(key_plus, logits, t, g_t, time, inverse, f, FP, C, DTYPE, True)
        key_minus = decayed(key_minus, logits + f, t, g_t, time, inverse, f, FP, C, DTYPE, True)
    u, share = load_wanted(
        dy + b * time * (H * V) + h * V,
        den + b * time * H + h,
        e + b * time * H + h,
        t,
        time,
        H,
        V,
        VP,
        DTYPE,
        C,
    )
    values = load_rows(v + b * v_b + g * v_h, t, v_t, time, V, VP, C).to(DTYPE)
    pairs = tl.dot(u, tl.trans(values), input_precision=PRECISION) - share[:, None]
    pairs = tl.where(earlier(C, False), pairs, 0.0)
    if not STRONG:
        pairs = pairs.to(DTYPE)
    on_plus = half_of_queries(
        key_plus, pairs, u, share, logits, t, g_t, time, inverse, fine + tile * F * V, fine_z + tile * F,
        V, VP, f, FP, C, PRECISION, STRONG,
    )  # fmt: skip
    on_minus = half_of_queries(
        key_minus, pairs, u, share, logits + f, t, g_t, time, inverse, fine + tile * F * V + f * V,
        fine_z + tile * F + f, V, VP, f, FP, C, PRECISION, STRONG,
    )  # fmt: skip
    plus, minus = features_by_rows(
        q + b * q_b + h * q_h, taps_q + h * K * TAPS_Q, map_q + h * K * f, t, q_t, time,
        K, KP, f, FP, TAPS_Q, C, PRECISION,
    )  # fmt: skip
    on_plus, on_minus = on_plus * plus, on_minus * minus
    change += b * time * (H * F) + h * F
    store_rows(change, on_plus, t, H * F, time, f, FP, C)
    store_rows(change + f, on_minus, t, H * F, time, f, FP, C)
    found = on_plus - plus * tl.sum(on_plus, 1)[:, None] - on_minus + minus * tl.sum(on_minus, 1)[:, None]
    store_rows(da + b * time * (H * f) + h * f, found, t, H * f, time, f, FP, C)


@triton.jit
def half_of_keys(
    phi_q, pairs, values, logits, t, g_t, time, inverse, behind, behind_z,
    V: tl.constexpr, VP: tl.constexpr, f: tl.constexpr, FP: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
    STRONG: tl.constexpr,
):  # fmt: skip
    """dphi_k [C, FP] of one half."""
    found = tl.dot(values, tl.trans(load_matrix(behind, f, V, FP, VP)), input_precision=PRECISION)
    found -= channels(behind_z, f, FP)[None, :]
    log_decay = gates_by_rows(logits, t, g_t, time, inverse, f, FP, C)
    if STRONG:
        found *= tl.exp(tl.cumsum(log_decay, 0, reverse=True) - log_decay)
        found += pairwise_gradient(pairs, phi_q, tl.cumsum(log_decay, 0), C, FP, True)
    else:
        found *= tl.exp(tl.sum(log_decay, 0))[None, :]
        found = tl.dot(pairs, phi_q, found, input_precision=PRECISION)
        found *= tl.exp(-tl.cumsum(log_decay, 0))
    return found


@triton.jit
def half_of_gates(
    on_keys, change, t, stride, time, behind, behind_z, before, before_z, last,
    V: tl.constexpr, VP: tl.constexpr, f: tl.constexpr, FP: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """dlog a [C, FP] of one half, from phi_k dphi_k and, in ``change``, phi_q dphi_q."""
    later = tl.zeros([FP], tl.float32)
    if not last:
        channel = tl.arange(0, FP)
        later -= channels(before_z, f, FP) * channels(behind_z, f, FP)
        for i in range(0, VP, 16):
            value = i + tl.arange(0, 16)
            at = channel[:, None] * V + value[None, :]
            there = (channel < f)[:, None] & (value < V)[None, :]
            kept = tl.load(before + at, mask=there, other=0.0).to(tl.float32)
            later += tl.sum(kept * tl.load(behind + at, mask=there, other=0.0).to(tl.float32), 1)
    ahead = load_rows(change, t, stride, time, f, FP, C).to(tl.float32) - on_keys
    return tl.cumsum(ahead, 0, reverse=True) + later[None, :]


@triton.jit(do_not_specialize=["time"])
def keys_kernel(
    q, k, v, logits, taps_q, taps_k, map_q, map_k, dy, den, e, fine, fine_z, before, before_z, strong, change, da,
    of_gate,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    time, inverse,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    f: tl.constexpr, FP: tl.constexpr, TAPS_Q: tl.constexpr, TAPS_K: tl.constexpr, C: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """``fine`` is behind tiles, ``before`` before them."""
    n, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    F: tl.constexpr = 2 * f
    g = h // R
    tiles = tl.cdiv(time, C)
    if (tl.load(strong + (b * (H // R) + g) * tiles + n) > 0) != STRONG:
        return
    t = n * C
    tile = (b * H + h) * tiles + n
    logits += b * g_b + g * g_h
    change += b * time * (H * F) + h * F
    of_gate += b * time * (H * F) + h * F
    fine += tile * F * V
    fine_z += tile * F
    before += (tile + 1) * F * V
    before_z += (tile + 1) * F
    plus, minus = features_by_rows(
        q + b * q_b + h * q_h, taps_q + h * K * TAPS_Q, map_q + h * K * f, t, q_t, time,
        K, KP, f, FP, TAPS_Q, C, PRECISION,
    )  # fmt: skip
    if not STRONG:
        plus = decayed(plus, logits, t, g_t, time, inverse, f, FP, C, DTYPE, False)
        minus = decayed(minus, logits + f, t, g_t, time, inverse, f, FP, C, DTYPE, False)
    u, share = load_wanted(
        dy + b * time * (H * V) + h * V,
        den + b * time * H + h,
        e + b * time * H + h,
        t,
        time,
        H,
        V,
        VP,
        DTYPE,
        C,
    )
    values = load_rows(v + b * v_b + g * v_h, t, v_t, time, V, VP, C).to(DTYPE)
    pairs = tl.dot(values, tl.trans(u), input_precision=PRECISION) - share[None, :]
    pairs = tl.where(earlier(C, True), pairs, 0.0)
    if not STRONG:
        pairs = pairs.to(DTYPE)
    on_plus = half_of_keys(
        plus, pairs, values, logits, t, g_t, time, inverse, fine, fine_z, V, VP, f, FP, C, PRECISION, STRONG
    )
    on_minus = half_of_keys(
        minus, pairs, values, logits + f, t, g_t, time, inverse, fine + f * V, fine_z + f,
        V, VP, f, FP, C, PRECISION, STRONG,
    )  # fmt: skip
    key_plus, key_minus = features_by_rows(
        k + b * k_b + g * k_h, taps_k + h * K * TAPS_K, map_k + h * K * f, t, k_t, time,
        K, KP, f, FP, TAPS_K, C, PRECISION,
    )  # fmt: skip
    on_plus, on_minus = on_plus * key_plus, on_minus * key_minus
    found = on_plus - key_plus * tl.sum(on_plus, 1)[:, None]
    found -= on_minus - key_minus * tl.sum(on_minus, 1)[:, None]
    store_rows(da + b * time * (H * f) + h * f, found, t, H * f, time, f, FP, C)
    last = n + 1 == tiles
    gate = half_of_gates(
        on_plus, change, t, H * F, time, fine, fine_z, before, before_z, last, V, VP, f, FP, C
    )
    store_rows(of_gate, gate, t, H * F, time, f, FP, C)
    gate = half_of_gates(
        on_minus, change + f, t, H * F, time, fine + f * V, fine_z + f, before + f * V, before_z + f, last,
        V, VP, f, FP, C,
    )  # fmt: skip
    store_rows(of_gate + f, gate, t, H * F, time, f, FP, C)


@triton.jit(do_not_specialize=["time"])
def values_kernel(
    q, k, logits, taps_q, taps_k, map_q, map_k, dy, den, fine, strong, dv,
    q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h,
    time, inverse,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    f: tl.constexpr, FP: tl.constexpr, TAPS_Q: tl.constexpr, TAPS_K: tl.constexpr, C: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    n, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    F: tl.constexpr = 2 * f
    g = h // R
    tiles = tl.cdiv(time, C)
    if (tl.load(strong + (b * (H // R) + g) * tiles + n) > 0) != STRONG:
        return
    t = n * C
    logits += b * g_b + g * g_h
    q += b * q_b + h * q_h
    taps_q += h * K * TAPS_Q
    map_q += h * K * f
    fine += ((b * H + h) * tiles + n) * F * V
    if not STRONG:
        read_plus, read_minus = features_by_columns(
            q, taps_q, map_q, t, q_t, time, K, KP, f, FP, TAPS_Q, C, PRECISION
        )
        log_decay = gates_by_columns(logits, t, g_t, time, inverse, f, FP, C)
        read_plus = (read_plus * tl.exp(tl.cumsum(log_decay, 1))).to(DTYPE)
        log_decay = gates_by_columns(logits + f, t, g_t, time, inverse, f, FP, C)
        read_minus = (read_minus * tl.exp(tl.cumsum(log_decay, 1))).to(DTYPE)
    plus, minus = features_by_rows(
        k + b * k_b + g * k_h, taps_k + h * K * TAPS_K, map_k + h * K * f, t, k_t, time,
        K, KP, f, FP, TAPS_K, C, PRECISION,
    )  # fmt: skip
    if STRONG:
        read_plus, read_minus = features_by_rows(
            q, taps_q, map_q, t, q_t, time, K, KP, f, FP, TAPS_Q, C, PRECISION
        )
        running = tl.cumsum(gates_by_rows(logits, t, g_t, time, inverse, f, FP, C), 0)
        scores = pairwise_scores(tl.zeros([C, C], tl.float32), read_plus, plus, running, C, True)
        running = tl.cumsum(gates_by_rows(logits + f, t, g_t, time, inverse, f, FP, C), 0)
        scores = pairwise_scores(scores, read_minus, minus, running, C, True)
    else:
        early = decayed(plus, logits, t, g_t, time, inverse, f, FP, C, DTYPE, True)
        scores = tl.dot(early, read_plus, input_precision=PRECISION)
        early = decayed(minus, logits + f, t, g_t, time, inverse, f, FP, C, DTYPE, True)
        scores = tl.dot(early, read_minus, scores, input_precision=PRECISION)
        scores = tl.where(earlier(C, True), scores, 0.0)
    scores = scores.to(DTYPE)
    log_decay = gates_by_rows(logits, t, g_t, time, inverse, f, FP, C)
    late_plus = (plus * tl.exp(tl.cumsum(log_decay, 0, reverse=True) - log_decay)).to(DTYPE)
    log_decay = gates_by_rows(logits + f, t, g_t, time, inverse, f, FP, C)
    late_minus = (minus * tl.exp(tl.cumsum(log_decay, 0, reverse=True) - log_decay)).to(DTYPE)
    token = t + tl.arange(0, C)
    weight = tl.load(den + b * time * H + h + token.to(tl.int64) * H, mask=token < time, other=1.0)
    u = load_rows(dy + b * time * (H * V) + h * V, t, H * V, time, V, VP, C).to(tl.float32) / weight[:, None]
    found = tl.dot(scores, u.to(DTYPE), input_precision=PRECISION)
    found = tl.dot(late_plus, load_matrix(fine, f, V, FP, VP), found, input_precision=PRECISION)
    found = tl.dot(late_minus, load_matrix(fine + f * V, f, V, FP, VP), found, input_precision=PRECISION)
    store_rows(dv + b * time * (H * V) + h * V, found, t, H * V, time, V, VP, C)


def backward(
    layer: Layer, made: States, dy: Tensor, *, steps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a of q and of k [B, T, H, f], of v, and of the gate's logits."""
    dy = dy.contiguous()
    assert made.den is not None
    e = (dy.float() * made.y).sum(dim=-1) / made.den
    before, before_z, strong = tile_states(layer, made.states, made.states_z, steps)
    behind, behind_z = back_tile_states(layer, dy, made.den, e, made.totals, steps)
    shared = (dy, made.den, e)
    da_q, change = queries(layer, *shared, before, before_z, strong, steps)
    da_k, of_gate = keys(layer, *shared, behind, behind_z, before, before_z, strong, change, steps)
    dv = values(layer, dy, made.den, behind, strong, steps)
    of_gate = of_gate.unflatten(2, (layer.k.shape[2], -1)).sum(dim=3, dtype=torch.float32)
    return da_q, da_k, dv, of_gate * torch.sigmoid(-layer.logits.float()) / steps


def back_tile_states(
    layer: Layer,
    dy: Tensor,
    den: Tensor,
    e: Tensor,
    totals: Tensor,
    steps: float,
    chosen: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """(R [B, H, tiles, F, V], r [B, H, tiles, F] fp32) behind every tile."""
    batch, time, heads = layer.q.shape[:3]
    segments, width, value_dim = totals.shape[2], totals.shape[3], layer.v.shape[3]
    tiles, sizes = triton.cdiv(time, layer.sizes["C"]), layer.sizes
    sums = totals.new_empty(batch, heads, segments, width, value_dim)
    sums_z = totals.new_empty(batch, heads, segments, width, 1)
    stored = torch.float32 if layer.v.dtype == torch.float32 else torch.bfloat16
    fine = torch.empty(batch, heads, tiles, width, value_dim, dtype=stored, device=dy.device)
    fine_z = totals.new_empty(batch, heads, tiles, width)
    states = (sums, sums_z)
    _, options = blocks("gated_lawcat_back_states", dy, chosen)
    for mode in ("sums", "fine"):
        back_states_kernel[(segments, heads, batch)](
            layer.q, layer.logits, layer.taps_q, layer.map_q, dy, den, e, sums, sums_z, *states, fine, fine_z,
            *steps_of(layer.q), *steps_of(layer.logits), time, segments, 1.0 / steps,
            **sizes, TAPS_Q=taps_of(layer.taps_q), CS=blocks("gated_lawcat_states", dy)[0]["CS"], MODE=mode,
            **options,
        )  # fmt: skip
        if mode == "sums":
            states = (scan(sums, totals, reverse=True), scan(sums_z, totals, reverse=True))
    return fine, fine_z


def _launch(
    name: str, kernel: Any, layer: Layer, tensors: tuple[Tensor, ...], outputs: tuple[Tensor, ...], strong: Tensor,
    steps: float, chosen: Launch | None,
) -> None:  # fmt: skip
    """Both kernels of a tile and head."""
    batch, time, heads = layer.q.shape[:3]
    strides = (x for x in (layer.q, layer.k, layer.v, layer.logits) for x in steps_of(x))
    numbers = (*strides, time, 1.0 / steps)
    constants = {**layer.sizes, "TAPS_Q": taps_of(layer.taps_q), "TAPS_K": taps_of(layer.taps_k)}
    for is_strong in (False, True):
        _, options = blocks(name + "_strong" * is_strong, layer.v, None if is_strong else chosen)
        kernel[(strong.shape[2], heads, batch)](
            *layer, *tensors, strong, *outputs, *numbers, **constants, STRONG=is_strong, **options
        )


def queries(
    layer: Layer, dy: Tensor, den: Tensor, e: Tensor, before: Tensor, before_z: Tensor, strong: Tensor, steps: float,
    chosen: Launch | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(gradient of a of q, phi_q dphi_q [B, T, H, F])."""
    shape = layer.q.shape[:3]
    da = torch.empty(*shape, layer.map_q.shape[2], dtype=before.dtype, device=dy.device)
    change = torch.empty(*shape, layer.logits.shape[3], dtype=before.dtype, device=dy.device)
    tensors = (dy, den, e, before, before_z)
    _launch("gated_lawcat_queries", queries_kernel, layer, tensors, (da, change), strong, steps, chosen)
    return da, change


def keys(
    layer: Layer, dy: Tensor, den: Tensor, e: Tensor, behind: Tensor, behind_z: Tensor, before: Tensor,
    before_z: Tensor, strong: Tensor, change: Tensor, steps: float, chosen: Launch | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(gradient of a of k, dlog a [B, T, H, F] of every head)."""
    da = torch.empty(*layer.q.shape[:3], layer.map_k.shape[2], dtype=behind.dtype, device=dy.device)
    of_gate = torch.empty_like(change)
    tensors = (dy, den, e, behind, behind_z, before, before_z)
    outputs = (change, da, of_gate)
    _launch("gated_lawcat_keys", keys_kernel, layer, tensors, outputs, strong, steps, chosen)
    return da, of_gate


def values(
    layer: Layer,
    dy: Tensor,
    den: Tensor,
    behind: Tensor,
    strong: Tensor,
    steps: float,
    chosen: Launch | None = None,
) -> Tensor:
    batch, time, heads = layer.q.shape[:3]
    dv = torch.empty(batch, time, heads, layer.v.shape[3], dtype=behind.dtype, device=dy.device)
    for is_strong in (False, True):
        _, options = blocks("gated_lawcat_values" + "_strong" * is_strong, dy, None if is_strong else chosen)
        values_kernel[(strong.shape[2], heads, batch)](
            layer.q, layer.k, *layer[3:], dy, den, behind, strong, dv,
            *steps_of(layer.q), *steps_of(layer.k), *steps_of(layer.logits), time, 1.0 / steps,
            **layer.sizes, TAPS_Q=taps_of(layer.taps_q), TAPS_K=taps_of(layer.taps_k), STRONG=is_strong, **options,
        )  # fmt: skip
    per_head = dv.unflatten(2, (layer.k.shape[2], -1))
    return per_head.sum(dim=3, dtype=torch.float32).to(layer.v.dtype)


class _Convolved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, logits, taps_q, taps_k, map_q, map_k, steps, eps, stop):
        layer = layer_of(q, k, v, logits, taps_q, taps_k, map_q, map_k)
        made, last = forward(layer, steps=steps, eps=eps, stop=stop, save=any(ctx.needs_input_grad))
        ctx.save_for_backward(q, k, v, logits, taps_q, taps_k, map_q, map_k, *made)
        ctx.steps = steps
        if last is not None:
            ctx.mark_non_differentiable(last)
        return made.y, last

    @staticmethod
    def backward(ctx, dy, _):
        q, k, v, logits, taps_q, taps_k, map_q, map_k, *made = ctx.saved_tensors
        layer = layer_of(q, k, v, logits, taps_q, taps_k, map_q, map_k)
        da_q, da_k, dv, dlogits = backward(layer, States(*made), dy, steps=ctx.steps)
        needed = ctx.needs_input_grad
        dq, dtaps_q, dmap_q = _before_a(q, taps_q, map_q, da_q, (needed[0], needed[4], needed[6]))
        dk, dtaps_k, dmap_k = _before_a(k, taps_k, map_k, da_k, (needed[1], needed[5], needed[7]))
        return dq, dk, dv, dlogits.to(logits.dtype), dtaps_q, dtaps_k, dmap_q, dmap_k, None, None, None


def _before_a(
    x: Tensor, taps: Tensor | None, weight: Tensor, da: Tensor, needed: tuple[bool, bool, bool]
) -> list[Tensor | None]:
    """Gradients of x, of its taps and of its map."""
    given = zip((x, taps, weight), needed, strict=True)
    inputs = [None if t is None else t.detach().requires_grad_(learns) for t, learns in given]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    if not wanted:
        return [None, None, None]
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        a = mapped(convolved(inputs[0], inputs[1]), inputs[2])  # pyright: ignore[reportArgumentType]
        found = iter(torch.autograd.grad(a, wanted, da.to(a.dtype)))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def convolved_kernel(
    q: Tensor, k: Tensor, v: Tensor, logits: Tensor, taps_q: Tensor | None, taps_k: Tensor | None, map_q: Tensor,
    map_k: Tensor, *, steps: float, eps: float, stop: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``convolved.convolved_chunked``; no gradient flows through the state."""
    inputs = (q, k, v, logits, taps_q, taps_k, map_q, map_k)
    return _Convolved.apply(*inputs, steps, eps, stop)  # pyright: ignore[reportReturnType]
