"""Gradients of LAWCAT's layer without a window.

With u = dy / den and e = dy . y / den, everything per query head (compare ``triton_gated_liger_backward.py``),

    dphi_q_t = S_t u_t - e_t z_t          R_t = diag(a_{t+1}) R_{t+1} + phi_q_t u_t^T     r_t likewise, e_t for u_t
    dphi_k_t = R_t v_t - r_t              dv_t = R_t^T phi_k_t
    dlog a_t = sum_{s >= t} (phi_q_s dphi_q_s - phi_k_s dphi_k_s), what lies behind a tile being S R - z r there

Kernels end at a = q^ W and hand over what each head has; ``triton_gated_convolved.py`` does the rest.

    back_states    R and r behind segments and tiles      ``states`` in reverse
    queries        da of q, and phi_q dphi_q              a tile of one head
    keys           da of k, and dlog a                    a tile of one head
    values         dv of a head                           a tile of one head
"""

import triton
import triton.language as tl

from .triton_common import load_matrix, load_rows, store_rows
from .triton_gated import earlier, since_columns, since_rows, until_rows
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
        reading *= tl.exp(since_columns(log_decay, BT, DTYPE))
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
    running = since_rows(gates_by_rows(logits, t, g_t, time, inverse, f, FP, C), C, DTYPE)
    return (phi * tl.exp(-running if OF_KEYS else running)).to(DTYPE)


@triton.jit
def half_of_queries(
    phi_k, pairs, u, share, logits, t, g_t, time, inverse, state, z,
    V: tl.constexpr, VP: tl.constexpr, f: tl.constexpr, FP: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """dphi_q [C, FP] of one half; phi_k and pairs are ready for a product where they are not ``STRONG``."""
    found = tl.dot(u, tl.trans(load_matrix(state, f, V, FP, VP)), input_precision=PRECISION)
    found -= share[:, None] * channels(z, f, FP)[None, :]
    if not STRONG:
        found = tl.dot(pairs, phi_k, found, input_precision=PRECISION)
    running = since_rows(gates_by_rows(logits, t, g_t, time, inverse, f, FP, C), C, DTYPE)
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
        V, VP, f, FP, C, DTYPE, PRECISION, STRONG,
    )  # fmt: skip
    on_minus = half_of_queries(
        key_minus, pairs, u, share, logits + f, t, g_t, time, inverse, fine + tile * F * V + f * V,
        fine_z + tile * F + f, V, VP, f, FP, C, DTYPE, PRECISION, STRONG,
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
    V: tl.constexpr, VP: tl.constexpr, f: tl.constexpr, FP: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """dphi_k [C, FP] of one half."""
    found = tl.dot(values, tl.trans(load_matrix(behind, f, V, FP, VP)), input_precision=PRECISION)
    found -= channels(behind_z, f, FP)[None, :]
    log_decay = gates_by_rows(logits, t, g_t, time, inverse, f, FP, C)
    if STRONG:
        found *= tl.exp(until_rows(log_decay, C, DTYPE))
        found += pairwise_gradient(pairs, phi_q, since_rows(log_decay, C, DTYPE), C, FP, True)
    else:
        found *= tl.exp(tl.sum(log_decay, 0))[None, :]
        found = tl.dot(pairs, phi_q, found, input_precision=PRECISION)
        found *= tl.exp(-since_rows(log_decay, C, DTYPE))
    return found


@triton.jit
def half_of_gates(
    on_keys, change, t, stride, time, behind, behind_z, before, before_z, last,
    V: tl.constexpr, VP: tl.constexpr, f: tl.constexpr, FP: tl.constexpr, C: tl.constexpr,
    DTYPE: tl.constexpr,
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
    return ahead + until_rows(ahead, C, DTYPE) + later[None, :]


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
        plus,
        pairs,
        values,
        logits,
        t,
        g_t,
        time,
        inverse,
        fine,
        fine_z,
        V,
        VP,
        f,
        FP,
        C,
        DTYPE,
        PRECISION,
        STRONG,
    )
    on_minus = half_of_keys(
        minus, pairs, values, logits + f, t, g_t, time, inverse, fine + f * V, fine_z + f,
        V, VP, f, FP, C, DTYPE, PRECISION, STRONG,
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
        on_plus, change, t, H * F, time, fine, fine_z, before, before_z, last, V, VP, f, FP, C, DTYPE
    )
    store_rows(of_gate, gate, t, H * F, time, f, FP, C)
    gate = half_of_gates(
        on_minus, change + f, t, H * F, time, fine + f * V, fine_z + f, before + f * V, before_z + f, last,
        V, VP, f, FP, C, DTYPE,
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
        read_plus = (read_plus * tl.exp(since_columns(log_decay, C, DTYPE))).to(DTYPE)
        log_decay = gates_by_columns(logits + f, t, g_t, time, inverse, f, FP, C)
        read_minus = (read_minus * tl.exp(since_columns(log_decay, C, DTYPE))).to(DTYPE)
    plus, minus = features_by_rows(
        k + b * k_b + g * k_h, taps_k + h * K * TAPS_K, map_k + h * K * f, t, k_t, time,
        K, KP, f, FP, TAPS_K, C, PRECISION,
    )  # fmt: skip
    if STRONG:
        read_plus, read_minus = features_by_rows(
            q, taps_q, map_q, t, q_t, time, K, KP, f, FP, TAPS_Q, C, PRECISION
        )
        running = since_rows(gates_by_rows(logits, t, g_t, time, inverse, f, FP, C), C, DTYPE)
        scores = pairwise_scores(tl.zeros([C, C], tl.float32), read_plus, plus, running, C, True)
        running = since_rows(gates_by_rows(logits + f, t, g_t, time, inverse, f, FP, C), C, DTYPE)
        scores = pairwise_scores(scores, read_minus, minus, running, C, True)
    else:
        early = decayed(plus, logits, t, g_t, time, inverse, f, FP, C, DTYPE, True)
        scores = tl.dot(early, read_plus, input_precision=PRECISION)
        early = decayed(minus, logits + f, t, g_t, time, inverse, f, FP, C, DTYPE, True)
        scores = tl.dot(early, read_minus, scores, input_precision=PRECISION)
        scores = tl.where(earlier(C, True), scores, 0.0)
    scores = scores.to(DTYPE)
    log_decay = gates_by_rows(logits, t, g_t, time, inverse, f, FP, C)
    late_plus = (plus * tl.exp(until_rows(log_decay, C, DTYPE))).to(DTYPE)
    log_decay = gates_by_rows(logits + f, t, g_t, time, inverse, f, FP, C)
    late_minus = (minus * tl.exp(until_rows(log_decay, C, DTYPE))).to(DTYPE)
    token = t + tl.arange(0, C)
    weight = tl.load(den + b * time * H + h + token.to(tl.int64) * H, mask=token < time, other=1.0)
    u = load_rows(dy + b * time * (H * V) + h * V, t, H * V, time, V, VP, C).to(tl.float32) / weight[:, None]
    found = tl.dot(scores, u.to(DTYPE), input_precision=PRECISION)
    found = tl.dot(late_plus, load_matrix(fine, f, V, FP, VP), found, input_precision=PRECISION)
    found = tl.dot(late_minus, load_matrix(fine + f * V, f, V, FP, VP), found, input_precision=PRECISION)
    store_rows(dv + b * time * (H * V) + h * V, found, t, H * V, time, V, VP, C)
