"""Gradients of LAWCAT's layer without a window.

With u = dy / den and e = dy . y / den, everything per query head (compare ``triton_gated_liger_backward.py``),

    dphi_q_t = S_t u_t - e_t z_t          R_t = diag(a_{t+1}) R_{t+1} + phi_q_t u_t^T     r_t likewise, e_t for u_t
    dphi_k_t = R_t v_t - r_t              dv_t = R_t^T phi_k_t
    dlog a_t = sum_{s >= t} (phi_q_s dphi_q_s - phi_k_s dphi_k_s), what lies behind a tile being S R - z r there

Kernels end at a = q^ W and hand over what each head has; ``triton_gated_convolved.py`` does the rest.

    back_states    R and r behind segments and tiles      ``states`` in reverse
    shares         e                                      some tokens and heads
    queries        da of q, and phi_q dphi_q              a tile of one head
    keys           da of k, and dlog a                    a tile of one head
    values         dv of a head                           a tile of one head
"""

import triton
import triton.language as tl

from .triton_common import load_matrix, load_rows, store_rows
from .triton_gated import LOG2E, earlier, store_matrix, until_rows
from .triton_gated_maps import (
    channels,
    log_features,
    pairwise_gradient,
    pairwise_scores,
    running_gates,
    strong_tile,
    whole_tile,
)


@triton.jit(do_not_specialize=["rows"])
def shares_kernel(
    dy, y, den, e, rows, V: tl.constexpr, VP: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """e of ``rows`` tokens and heads; in torch it takes six times as long."""
    start = tl.program_id(0) * BT
    row = start + tl.arange(0, BT)
    gain = load_rows(dy, start, V, rows, V, VP, BT).to(tl.float32)
    gain = tl.sum(gain * load_rows(y, start, V, rows, V, VP, BT).to(tl.float32), 1)
    weight = tl.load(den + row, mask=row < rows, other=1.0)
    tl.store(e + row, gain / weight, mask=row < rows)


@triton.jit
def load_wanted(
    dy, den, e, t, time, H: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, DTYPE: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """(u [BT, VP], e [BT]) of one head; zeros where there is no token."""
    token = t + tl.arange(0, BT)
    at = token.to(tl.int64) * H
    weight = tl.load(den + at, mask=token < time, other=1.0)
    u = load_rows(dy, t, H * V, time, V, VP, BT).to(tl.float32) / weight[:, None]
    return u.to(DTYPE), tl.load(e + at, mask=token < time, other=0.0)


@triton.jit(do_not_specialize=["time", "segments", "per"])
def back_states_kernel(
    a, norms, running, dy, den, e, sums, sums_z, states, states_z, fine, fine_z, time, segments, per,
    H: tl.constexpr, R: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, f: tl.constexpr, FP: tl.constexpr,
    C: tl.constexpr, MODE: tl.constexpr, STARTS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``states_kernel`` from a segment's end: MODE "sums" or "fine", what is behind every tile."""
    F: tl.constexpr = 2 * f
    half, h = tl.program_id(0) % 2, tl.program_id(0) // 2
    n, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = b * H + h
    channel = half * f + tl.arange(0, FP)
    there = tl.arange(0, FP) < f
    a += row * time * f
    norms += row * 2 * time
    running += (b * (H // R) + h // R) * time * F + half * f
    dy += b * time * (H * V) + h * V
    den += b * time * H + h
    e += b * time * H + h
    state = tl.zeros([FP, VP], tl.float32)
    z = tl.zeros([FP], tl.float32)
    if MODE == "fine" and STARTS:
        at = row * (segments + 1) + n
        state = load_matrix(states + (at * F + half * f) * V, f, V, FP, VP)
        z = tl.load(states_z + at * F + channel, mask=there, other=0.0)
    first = n * per
    count = tl.cdiv(tl.minimum(per, time - first), C)
    for i in range(0, count):
        t = first + (count - 1 - i) * C
        if MODE == "fine":
            at = row * tl.cdiv(time, C) + t // C
            store_matrix(fine + (at * F + half * f) * V, state, f, V, FP, VP)
            tl.store(fine_z + at * F + channel, z, mask=there)
        reading = log_features(a, norms, half, t, time, time, f, f, FP, C)
        reading = tl.exp2(reading + running_gates(running, t, time, f, FP, C) * LOG2E)
        kept = tl.exp2(whole_tile(running, t, time, f, FP, C) * LOG2E)
        u, share = load_wanted(dy, den, e, t, time, H, V, VP, DTYPE, C)
        z = z * kept + tl.sum(reading * share[:, None], 0)
        state = tl.dot(tl.trans(reading.to(DTYPE)), u, state * kept[:, None], input_precision=PRECISION)
    if MODE == "sums":
        at = row * segments + n
        store_matrix(sums + (at * F + half * f) * V, state, f, V, FP, VP)
        tl.store(sums_z + at * F + channel, z, mask=there)


@triton.jit
def half_of_queries(
    a_k, norms_k, running, pairs, u, share, half, t, time, state, z,
    V: tl.constexpr, VP: tl.constexpr, f: tl.constexpr, FP: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """dphi_q [C, FP] of one half; pairs are ready for a product where they are not ``STRONG``."""
    found = tl.dot(u, tl.trans(load_matrix(state + half * f * V, f, V, FP, VP)), input_precision=PRECISION)
    found -= share[:, None] * channels(z + half * f, f, FP)[None, :]
    gates = running_gates(running + half * f, t, time, f, FP, C)
    phi_k = log_features(a_k, norms_k, half, t, time, time, f, f, FP, C)
    if STRONG:
        found *= tl.exp2(gates * LOG2E)
        found += pairwise_gradient(pairs, tl.exp2(phi_k), gates, C, FP, False)
    else:
        early = tl.exp2(phi_k - gates * LOG2E).to(DTYPE)
        found = tl.dot(pairs, early, found, input_precision=PRECISION) * tl.exp2(gates * LOG2E)
    return found


@triton.jit(do_not_specialize=["time"])
def queries_kernel(
    a_q, norms_q, a_k, norms_k, running, strong, v, dy, den, e, fine, fine_z, da, change, v_b, v_t, v_h, time,
    H: tl.constexpr, R: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, f: tl.constexpr, FP: tl.constexpr,
    C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    h, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    F: tl.constexpr = 2 * f
    g, tiles = h // R, tl.num_programs(1)
    row, gate_row, t = b * H + h, b * (H // R) + g, n * C
    if strong_tile(strong, gate_row * tiles + n) != STRONG:
        return
    a_q += row * time * f
    a_k += row * time * f
    norms_q += row * 2 * time
    norms_k += row * 2 * time
    running += gate_row * time * F
    fine += (row * tiles + n) * F * V
    fine_z += (row * tiles + n) * F
    u, share = load_wanted(
        dy + b * time * (H * V) + h * V, den + b * time * H + h, e + b * time * H + h, t, time, H, V, VP, DTYPE, C
    )  # fmt: skip
    values = load_rows(v + b * v_b + g * v_h, t, v_t, time, V, VP, C).to(DTYPE)
    pairs = tl.dot(u, tl.trans(values), input_precision=PRECISION) - share[:, None]
    pairs = tl.where(earlier(C, False), pairs, 0.0)
    if not STRONG:
        pairs = pairs.to(DTYPE)
    change += b * time * (H * F) + h * F
    found = tl.zeros([C, FP], tl.float32)
    for half in tl.range(2):
        on_half = half_of_queries(
            a_k, norms_k, running, pairs, u, share, half, t, time, fine, fine_z,
            V, VP, f, FP, C, DTYPE, PRECISION, STRONG,
        )  # fmt: skip
        phi = tl.exp2(log_features(a_q, norms_q, half, t, time, time, f, f, FP, C))
        on_half *= phi
        store_rows(change + half * f, on_half, t, H * F, time, f, FP, C)
        found += (1 - 2 * half) * (on_half - phi * tl.sum(on_half, 1)[:, None])
    store_rows(da + b * time * (H * f) + h * f, found, t, H * f, time, f, FP, C)


@triton.jit
def half_of_keys(
    a_q, norms_q, running, pairs, values, half, t, time, behind, behind_z,
    V: tl.constexpr, VP: tl.constexpr, f: tl.constexpr, FP: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """dphi_k [C, FP] of one half."""
    found = tl.dot(
        values, tl.trans(load_matrix(behind + half * f * V, f, V, FP, VP)), input_precision=PRECISION
    )
    found -= channels(behind_z + half * f, f, FP)[None, :]
    gates = running_gates(running + half * f, t, time, f, FP, C)
    whole = whole_tile(running + half * f, t, time, f, FP, C)
    phi_q = log_features(a_q, norms_q, half, t, time, time, f, f, FP, C)
    if STRONG:
        found *= tl.exp2((whole[None, :] - gates) * LOG2E)
        found += pairwise_gradient(pairs, tl.exp2(phi_q), gates, C, FP, True)
    else:
        found *= tl.exp2(whole * LOG2E)[None, :]
        reading = tl.exp2(phi_q + gates * LOG2E).to(DTYPE)
        found = tl.dot(pairs, reading, found, input_precision=PRECISION) * tl.exp2(-gates * LOG2E)
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
    a_q, norms_q, a_k, norms_k, running, strong, v, dy, den, e, fine, fine_z, before, before_z, change, da, of_gate,
    v_b, v_t, v_h, time,
    H: tl.constexpr, R: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, f: tl.constexpr, FP: tl.constexpr,
    C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """``fine`` is behind tiles, ``before`` before them."""
    h, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    F: tl.constexpr = 2 * f
    g, tiles = h // R, tl.num_programs(1)
    row, gate_row, t = b * H + h, b * (H // R) + g, n * C
    if strong_tile(strong, gate_row * tiles + n) != STRONG:
        return
    a_q += row * time * f
    a_k += row * time * f
    norms_q += row * 2 * time
    norms_k += row * 2 * time
    running += gate_row * time * F
    tile = row * tiles + n
    change += b * time * (H * F) + h * F
    of_gate += b * time * (H * F) + h * F
    fine += tile * F * V
    fine_z += tile * F
    before += (tile + 1) * F * V
    before_z += (tile + 1) * F
    u, share = load_wanted(
        dy + b * time * (H * V) + h * V, den + b * time * H + h, e + b * time * H + h, t, time, H, V, VP, DTYPE, C
    )  # fmt: skip
    values = load_rows(v + b * v_b + g * v_h, t, v_t, time, V, VP, C).to(DTYPE)
    pairs = tl.dot(values, tl.trans(u), input_precision=PRECISION) - share[None, :]
    pairs = tl.where(earlier(C, True), pairs, 0.0)
    if not STRONG:
        pairs = pairs.to(DTYPE)
    last = n + 1 == tiles
    found = tl.zeros([C, FP], tl.float32)
    for half in tl.range(2):
        on_half = half_of_keys(
            a_q, norms_q, running, pairs, values, half, t, time, fine, fine_z,
            V, VP, f, FP, C, DTYPE, PRECISION, STRONG,
        )  # fmt: skip
        phi = tl.exp2(log_features(a_k, norms_k, half, t, time, time, f, f, FP, C))
        on_half *= phi
        found += (1 - 2 * half) * (on_half - phi * tl.sum(on_half, 1)[:, None])
        gate = half_of_gates(
            on_half, change + half * f, t, H * F, time, fine + half * f * V, fine_z + half * f,
            before + half * f * V, before_z + half * f, last, V, VP, f, FP, C, DTYPE,
        )  # fmt: skip
        store_rows(of_gate + half * f, gate, t, H * F, time, f, FP, C)
    store_rows(da + b * time * (H * f) + h * f, found, t, H * f, time, f, FP, C)


@triton.jit(do_not_specialize=["time"])
def values_kernel(
    a_q, norms_q, a_k, norms_k, running, strong, dy, den, fine, dv, time,
    H: tl.constexpr, R: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, f: tl.constexpr, FP: tl.constexpr,
    C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    h, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    F: tl.constexpr = 2 * f
    tiles = tl.num_programs(1)
    row, gate_row, t = b * H + h, b * (H // R) + h // R, n * C
    if strong_tile(strong, gate_row * tiles + n) != STRONG:
        return
    a_q += row * time * f
    a_k += row * time * f
    norms_q += row * 2 * time
    norms_k += row * 2 * time
    running += gate_row * time * F
    fine += (row * tiles + n) * F * V
    found = tl.zeros([C, VP], tl.float32)
    scores = tl.zeros([C, C], tl.float32)
    for half in tl.range(2):
        gates = running_gates(running + half * f, t, time, f, FP, C)
        whole = whole_tile(running + half * f, t, time, f, FP, C)
        phi_q = log_features(a_q, norms_q, half, t, time, time, f, f, FP, C)
        phi_k = log_features(a_k, norms_k, half, t, time, time, f, f, FP, C)
        if STRONG:
            scores = pairwise_scores(scores, tl.exp2(phi_q), tl.exp2(phi_k), gates, C, True)
        else:
            reading = tl.trans(tl.exp2(phi_q + gates * LOG2E).to(DTYPE))
            early = tl.exp2(phi_k - gates * LOG2E).to(DTYPE)
            scores = tl.dot(early, reading, scores, input_precision=PRECISION)
        late = tl.exp2(phi_k + (whole[None, :] - gates) * LOG2E).to(DTYPE)
        found = tl.dot(late, load_matrix(fine + half * f * V, f, V, FP, VP), found, input_precision=PRECISION)
    if not STRONG:
        scores = tl.where(earlier(C, True), scores, 0.0)
    token = t + tl.arange(0, C)
    weight = tl.load(den + b * time * H + h + token.to(tl.int64) * H, mask=token < time, other=1.0)
    u = load_rows(dy + b * time * (H * V) + h * V, t, H * V, time, V, VP, C).to(tl.float32) / weight[:, None]
    found = tl.dot(scores.to(DTYPE), u.to(DTYPE), found, input_precision=PRECISION)
    store_rows(dv + b * time * (H * V) + h * V, found, t, H * V, time, V, VP, C)
