"""Gradients of Liger's layer: dq and dk of the window (rotated), dq and dk of the recurrence (not rotated), and dv.

With u = dy times the recurrence's share and S_t the state, everything per key/value head and summed over its queries,

    dphi_q_t = S_t u_t                              R_t = diag(a_{t+1}) R_{t+1} + phi_q_t u_t^T
    dphi_k_t = R_t v_t                              dv_t = R_t^T phi_k_t
    dlog a_t = sum_{s >= t} (phi_q_s dphi_q_s - phi_k_s dphi_k_s)

A sum over all later tokens is never formed: behind a tile it is the sum over values of S times R there, channel by
channel, which both walks have. From dlog a, dk = dlog a sigmoid(-k) / N joins the features' own gradient; for hgrn2,
whose key is 1 - a, dlog a also loses a dphi_k. Kept from the forward pass are the states before segments and their log
decays; states before and behind tiles are made again.

    back_states      R behind segments and tiles      ``states`` in reverse
    queries          dq, and phi_q . dphi_q           a tile of one head
    keys             dphi_k, fp32                     a tile of a group
    values           dv                               a tile of a group
    gates            dk from dphi_k and dlog a        a tile of a group
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .averaged import Averaged
from .launches import Launch
from .triton_common import load_matrix, load_rows, load_transposed, store_rows
from .triton_gated import (
    LOG2E,
    RUN,
    blocks,
    earlier,
    gated_dtype,
    precision,
    run_gradient,
    run_scores,
    scan,
    since_columns,
    since_rows,
    steps_of,
    store_matrix,
    until_rows,
)
from .triton_gated_liger import (
    Shape,
    forward,
    gate_of,
    key_features,
    key_gates,
    key_gates_by_columns,
    query_features,
    query_features_by_columns,
    shape_of,
    tile_states,
)
from .triton_gated_window import window_keys, window_queries
from .triton_together import compiled_together


@triton.jit(do_not_specialize=["time", "segments"])
def back_states_kernel(
    q_plain, k_plain, dy, sums, states, fine,
    q_b, q_t, q_h, k_b, k_t, k_h,
    time, segments, bias, inverse,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    C: tl.constexpr, CS: tl.constexpr, MODE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``states_kernel`` from a segment's end: MODE "sums" or "fine", the state behind every tile."""
    BT: tl.constexpr = C // 2
    n, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = b * G + g
    k_plain += b * k_b + g * k_h
    q_plain += b * q_b + g * R * q_h
    dy += b * time * (G * R * V) + g * R * V
    if MODE == "sums":
        state = tl.zeros([KP, VP], tl.float32)
    else:
        state = load_matrix(states + (row * (segments + 1) + n) * K * V, K, V, KP, VP)
    first = n * CS
    count = tl.cdiv(tl.minimum(CS, time - first), BT)
    for i in range(0, count):
        t = first + (count - 1 - i) * BT
        if MODE == "fine":  # noqa: SIM102
            if ((t + BT) % C == 0) | (i == 0):
                store_matrix(fine + (row * tl.cdiv(time, C) + t // C) * K * V, state, K, V, KP, VP)
        log_decay = key_gates_by_columns(k_plain, t, k_t, time, bias, inverse, K, KP, BT)
        reach = tl.exp(since_columns(log_decay, BT, DTYPE))
        state = state * tl.exp(tl.sum(log_decay, 1))[:, None]
        for r in range(0, R):
            reading = query_features_by_columns(q_plain + r * q_h, t, q_t, time, K, KP, BT) * reach
            wanted = load_rows(dy + r * V, t, G * R * V, time, V, VP, BT).to(DTYPE)
            state = tl.dot(reading.to(DTYPE), wanted, state, input_precision=PRECISION)
    if MODE == "sums":
        store_matrix(sums + (row * segments + n) * K * V, state, K, V, KP, VP)


@triton.jit(do_not_specialize=["time"])
def queries_kernel(
    q_plain, k_plain, v, dy, fine, strong, dq, inner,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    time, bias, inverse, sharpness, factor,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    HGRN2: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """Tiles with mild gates at once, or the ``STRONG`` by runs; the others are left as they are."""
    n, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    H: tl.constexpr = G * R
    BT: tl.constexpr = RUN if STRONG else C
    tile = (b * G + h // R) * tl.cdiv(time, C) + n
    if (tl.load(strong + tile) > 0) != STRONG:
        return
    k_plain += b * k_b + h // R * k_h
    v += b * v_b + h // R * v_h
    dy += b * time * (H * V) + h * V
    if STRONG:
        state = load_transposed(fine + tile * K * V, K, V, KP, VP).to(tl.float32)
    for i in range(0, C // BT):
        t = n * C + i * BT
        log_decay = key_gates(k_plain, t, k_t, time, bias, inverse, K, KP, BT)
        reach = tl.exp(tl.cumsum(log_decay, 0) if STRONG else since_rows(log_decay, BT, DTYPE))
        phi_k = key_features(k_plain, t, k_t, time, bias, inverse, sharpness, K, KP, BT, HGRN2)
        if not STRONG:
            early = (phi_k / reach).to(DTYPE)
        values = load_rows(v, t, v_t, time, V, VP, BT).to(DTYPE)
        wanted = load_rows(dy, t, H * V, time, V, VP, BT).to(DTYPE)
        pairs = tl.dot(wanted, tl.trans(values), input_precision=PRECISION)
        pairs = tl.where(earlier(BT, False), pairs, 0.0)
        if STRONG:
            found = tl.dot(wanted, state.to(DTYPE), input_precision=PRECISION) * reach
            late = (phi_k * tl.exp(tl.cumsum(log_decay, 0, reverse=True) - log_decay)).to(DTYPE)
            state = state * tl.exp(tl.sum(log_decay, 0))[None, :]
            state = tl.dot(tl.trans(values), late, state, input_precision=PRECISION)
            found += run_gradient(pairs, phi_k, log_decay, KP, DTYPE, PRECISION, False)
        else:
            state = load_matrix(fine + tile * K * V, K, V, KP, VP)
            found = tl.dot(wanted, tl.trans(state), input_precision=PRECISION)
            found = tl.dot(pairs.to(DTYPE), early, found, input_precision=PRECISION) * reach
        phi_q = query_features(q_plain + b * q_b + h * q_h, t, q_t, time, K, KP, BT)
        along = tl.sum(phi_q * found, 1)
        found = phi_q * (found - along[:, None]) * factor
        store_rows(dq + b * time * (H * K) + h * K, found, t, H * K, time, K, KP, BT)
        token = t + tl.arange(0, BT)
        tl.store(inner + b * time * H + h + token.to(tl.int64) * H, along * factor, mask=token < time)


@triton.jit(do_not_specialize=["time"])
def keys_kernel(
    q_plain, k_plain, v, dy, fine, strong, dphi,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    time, bias, inverse, factor,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """``fine`` are the states behind tiles; runs of a ``STRONG`` tile come last to first."""
    n, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    BT: tl.constexpr = RUN if STRONG else C
    tile = (b * G + g) * tl.cdiv(time, C) + n
    if (tl.load(strong + tile) > 0) != STRONG:
        return
    q_plain += b * q_b + g * R * q_h
    dy += b * time * (G * R * V) + g * R * V
    k_plain += b * k_b + g * k_h
    v += b * v_b + g * v_h
    if STRONG:
        state = load_transposed(fine + tile * K * V, K, V, KP, VP).to(tl.float32)
    for i in range(0, C // BT):
        t = n * C + C - BT - i * BT
        log_decay = key_gates(k_plain, t, k_t, time, bias, inverse, K, KP, BT)
        reach = tl.exp(tl.cumsum(log_decay, 0) if STRONG else since_rows(log_decay, BT, DTYPE))
        values = load_rows(v, t, v_t, time, V, VP, BT).to(DTYPE)
        if STRONG:
            since = tl.exp(tl.cumsum(log_decay, 0, reverse=True) - log_decay)
            found = since * tl.dot(values, state.to(DTYPE), input_precision=PRECISION)
            state = state * tl.exp(tl.sum(log_decay, 0))[None, :]
        else:
            # Behind the tile the state is as far away as for the first token, times what reach has decayed.
            state = load_matrix(fine + tile * K * V, K, V, KP, VP)
            found = tl.dot(values, tl.trans(state), input_precision=PRECISION)
            found = found * tl.exp(tl.sum(log_decay, 0))[None, :]
        for r in range(0, R):
            phi_q = query_features(q_plain + r * q_h, t, q_t, time, K, KP, BT)
            reading = (phi_q * reach).to(DTYPE)
            wanted = load_rows(dy + r * V, t, G * R * V, time, V, VP, BT).to(DTYPE)
            pairs = tl.dot(values, tl.trans(wanted), input_precision=PRECISION)
            pairs = tl.where(earlier(BT, True), pairs, 0.0)
            if STRONG:
                found += run_gradient(pairs, phi_q, log_decay, KP, DTYPE, PRECISION, True)
                state = tl.dot(tl.trans(wanted), reading, state, input_precision=PRECISION)
            else:
                found = tl.dot(pairs.to(DTYPE), reading, found, input_precision=PRECISION)
        if not STRONG:
            found = found / reach
        store_rows(dphi + b * time * (G * K) + g * K, found * factor, t, G * K, time, K, KP, BT)


@triton.jit(do_not_specialize=["time"])
def values_kernel(
    q_plain, k_plain, dy, fine, strong, dv,
    q_b, q_t, q_h, k_b, k_t, k_h,
    time, bias, inverse, sharpness, factor,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    HGRN2: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, STRONG: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """``keys_kernel`` for values; ``ADD`` to the gradient that is in dv, the window's."""
    n, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    BT: tl.constexpr = RUN if STRONG else C
    tile = (b * G + g) * tl.cdiv(time, C) + n
    if (tl.load(strong + tile) > 0) != STRONG:
        return
    q_plain += b * q_b + g * R * q_h
    dy += b * time * (G * R * V) + g * R * V
    dv += b * time * (G * V) + g * V
    k_plain += b * k_b + g * k_h
    if STRONG:
        state = load_matrix(fine + tile * K * V, K, V, KP, VP).to(tl.float32)
    for i in range(0, C // BT):
        t = n * C + C - BT - i * BT
        log_decay = key_gates(k_plain, t, k_t, time, bias, inverse, K, KP, BT)
        phi_k = key_features(k_plain, t, k_t, time, bias, inverse, sharpness, K, KP, BT, HGRN2)
        if STRONG:
            reach = tl.exp(tl.cumsum(log_decay, 0))
            late = (phi_k * tl.exp(tl.cumsum(log_decay, 0, reverse=True) - log_decay)).to(DTYPE)
            found = tl.dot(late, state.to(DTYPE), input_precision=PRECISION)
            state = state * tl.exp(tl.sum(log_decay, 0))[:, None]
        else:
            early = phi_k * tl.exp(-since_rows(log_decay, BT, DTYPE))
            late = (early * tl.exp(tl.sum(log_decay, 0))[None, :]).to(DTYPE)
            early = early.to(DTYPE)
            log_decay = key_gates_by_columns(k_plain, t, k_t, time, bias, inverse, K, KP, BT)
            reach = tl.exp(since_columns(log_decay, BT, DTYPE))
            state = load_matrix(fine + tile * K * V, K, V, KP, VP)
            found = tl.dot(late, state, input_precision=PRECISION)
        for r in range(0, R):
            wanted = load_rows(dy + r * V, t, G * R * V, time, V, VP, BT).to(DTYPE)
            if STRONG:
                phi_q = query_features(q_plain + r * q_h, t, q_t, time, K, KP, BT)
                reading = (phi_q * reach).to(DTYPE)
                scores = run_scores(phi_q, phi_k, log_decay, KP, DTYPE, PRECISION, True)
                state = tl.dot(tl.trans(reading), wanted, state, input_precision=PRECISION)
            else:
                reading = query_features_by_columns(q_plain + r * q_h, t, q_t, time, K, KP, BT) * reach
                scores = tl.dot(early, reading.to(DTYPE), input_precision=PRECISION)
                scores = tl.where(earlier(C, True), scores, 0.0)
            found = tl.dot(scores.to(DTYPE), wanted, found, input_precision=PRECISION)
        found = found * factor
        if ADD:
            found += load_rows(dv, t, G * V, time, V, VP, BT).to(tl.float32)
        store_rows(dv, found, t, G * V, time, V, VP, BT)


@triton.jit(do_not_specialize=["time"])
def gates_kernel(
    q_plain, k_plain, dq, inner, dphi, before, behind, dk,
    q_b, q_t, q_h, k_b, k_t, k_h,
    time, bias, inverse, sharpness, factor,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    HGRN2: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """dphi_q phi_q comes back from dq = phi_q (dphi_q - phi_q . dphi_q) and the inner product."""
    n, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    H: tl.constexpr = G * R
    tiles = tl.cdiv(time, C)
    tile = (b * G + g) * tiles + n
    t = n * C
    token = t + tl.arange(0, C)
    change = tl.zeros([C, KP], tl.float32)
    for r in range(0, R):
        h = g * R + r
        along = tl.load(inner + b * time * H + h + token.to(tl.int64) * H, mask=token < time, other=0.0)
        phi_q = query_features(q_plain + b * q_b + h * q_h, t, q_t, time, K, KP, C)
        change += phi_q * along[:, None]
        change += load_rows(dq + b * time * (H * K) + h * K, t, H * K, time, K, KP, C).to(tl.float32)
    k_plain += b * k_b + g * k_h
    phi_k = key_features(k_plain, t, k_t, time, bias, inverse, sharpness, K, KP, C, HGRN2)
    of_features = load_rows(dphi + b * time * (G * K) + g * K, t, G * K, time, K, KP, C)
    change -= phi_k * of_features
    # What crosses the tile's end.
    later = tl.zeros([KP], tl.float32)
    if n + 1 < tiles:
        channel = tl.arange(0, KP)
        for i in range(0, VP, 16):
            value = i + tl.arange(0, 16)
            at = channel[:, None] * V + value[None, :]
            there = (channel < K)[:, None] & (value < V)[None, :]
            kept = tl.load(before + (tile + 1) * K * V + at, mask=there, other=0.0).to(tl.float32)
            read = tl.load(behind + tile * K * V + at, mask=there, other=0.0).to(tl.float32)
            later += tl.sum(kept * read, 1)
    of_gate = change + until_rows(change, C, DTYPE) + (later * factor)[None, :]
    raw = load_rows(k_plain, t, k_t, time, K, KP, C).to(tl.float32)
    if HGRN2:
        of_gate -= (1.0 - phi_k) * of_features
        found = tl.zeros([C, KP], tl.float32)
    else:
        along = tl.sum(phi_k * of_features, 1)
        found = phi_k * (of_features - along[:, None]) * sharpness
    found += of_gate * inverse / (1.0 + tl.exp2(tl.minimum((raw + bias) * LOG2E, 126.0)))
    store_rows(dk + b * time * (G * K) + g * K, found, t, G * K, time, K, KP, C)


def backward(
    q: Tensor, k: Tensor, v: Tensor, q_plain: Tensor, k_plain: Tensor, states: Tensor, totals: Tensor, dy: Tensor,
    terms: Averaged, shape: Shape,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k (None without a window), v, q_plain and k_plain."""
    dy = dy.contiguous()
    if terms.window:
        window = {"scale": terms.scale, "window": terms.window, "factor": terms.mix_window}
        dq, lse, delta = window_queries(q, k, v, dy, **window)
        dk, dv = window_keys(q, k, v, dy, lse, delta, **window)
    else:
        dq, dk, dv = None, None, torch.empty(v.shape, dtype=v.dtype, device=v.device)
    before, strong = tile_states(k_plain, v, states, terms, shape)
    behind = back_tile_states(q_plain, k_plain, dy, totals, terms, shape)
    dq_plain, inner = queries(q_plain, k_plain, v, dy, before, strong, terms, shape)
    dphi = keys(q_plain, k_plain, v, dy, behind, strong, terms, shape)
    values(q_plain, k_plain, dy, behind, strong, dv, terms, shape)
    return dq, dk, dv, dq_plain, gates(q_plain, k_plain, dq_plain, inner, dphi, before, behind, terms, shape)


def back_tile_states(
    q_plain: Tensor, k_plain: Tensor, dy: Tensor, totals: Tensor, terms: Averaged, shape: Shape,
    chosen: Launch | None = None,
) -> Tensor:  # fmt: skip
    """R [B, G, tiles, K, V] behind every tile."""
    lead, square = (shape.batch, shape.groups), (shape.key_dim, shape.value_dim)
    sums = totals.new_empty(*lead, shape.segments, *square)
    fine = torch.empty(*lead, shape.tiles, *square, dtype=gated_dtype(dy.dtype)[1], device=dy.device)
    states = sums
    _, options = blocks("gated_liger_back_states", dy, chosen)
    for mode in ("sums", "fine"):
        back_states_kernel[(shape.segments, shape.groups, shape.batch)](
            q_plain, k_plain, dy, sums, states, fine, *steps_of(q_plain), *steps_of(k_plain),
            shape.time, shape.segments, *gate_of(terms)[:2], G=shape.groups, R=shape.per_group, **shape.widths,
            C=shape.tile, CS=shape.segment, MODE=mode, DTYPE=gated_dtype(dy.dtype)[0],
            PRECISION=precision(dy.dtype), **options,
        )  # fmt: skip
        if mode == "sums":
            states = scan(sums, totals, reverse=True)
    return fine


def queries(
    q_plain: Tensor, k_plain: Tensor, v: Tensor, dy: Tensor, before: Tensor, strong: Tensor, terms: Averaged,
    shape: Shape, chosen: Launch | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dq of the recurrence, phi_q . dphi_q [B, T, H] fp32)."""
    dq = torch.empty(q_plain.shape, dtype=q_plain.dtype, device=v.device)
    inner = torch.empty(q_plain.shape[:3], dtype=torch.float32, device=v.device)
    for is_strong in (False, True):
        _, options = blocks("gated_liger_queries" + "_strong" * is_strong, v, None if is_strong else chosen)
        queries_kernel[(shape.tiles, shape.heads, shape.batch)](
            q_plain, k_plain, v, dy, before, strong, dq, inner, *steps_of(q_plain), *steps_of(k_plain), *steps_of(v),
            shape.time, *gate_of(terms), terms.mix_recurrent, G=shape.groups, R=shape.per_group, **shape.widths,
            HGRN2=terms.hgrn2, C=shape.tile, DTYPE=gated_dtype(v.dtype)[0], PRECISION=precision(v.dtype),
            STRONG=is_strong,
            **options,
        )  # fmt: skip
    return dq, inner


def keys(
    q_plain: Tensor, k_plain: Tensor, v: Tensor, dy: Tensor, behind: Tensor, strong: Tensor, terms: Averaged,
    shape: Shape, chosen: Launch | None = None,
) -> Tensor:  # fmt: skip
    """dphi_k [B, T, G, K] fp32."""
    dphi = torch.empty(k_plain.shape, dtype=torch.float32, device=v.device)
    for is_strong in (False, True):
        _, options = blocks("gated_liger_keys" + "_strong" * is_strong, v, None if is_strong else chosen)
        keys_kernel[(shape.tiles, shape.groups, shape.batch)](
            q_plain, k_plain, v, dy, behind, strong, dphi, *steps_of(q_plain), *steps_of(k_plain), *steps_of(v),
            shape.time, *gate_of(terms)[:2], terms.mix_recurrent, G=shape.groups, R=shape.per_group, **shape.widths,
            C=shape.tile, DTYPE=gated_dtype(v.dtype)[0], PRECISION=precision(v.dtype),
            STRONG=is_strong, **options,
        )  # fmt: skip
    return dphi


def values(
    q_plain: Tensor, k_plain: Tensor, dy: Tensor, behind: Tensor, strong: Tensor, dv: Tensor, terms: Averaged,
    shape: Shape, chosen: Launch | None = None,
) -> None:  # fmt: skip
    """The recurrence's dv, added to the window's in place."""
    for is_strong in (False, True):
        _, options = blocks("gated_liger_values" + "_strong" * is_strong, dy, None if is_strong else chosen)
        values_kernel[(shape.tiles, shape.groups, shape.batch)](
            q_plain, k_plain, dy, behind, strong, dv, *steps_of(q_plain), *steps_of(k_plain),
            shape.time, *gate_of(terms), terms.mix_recurrent, G=shape.groups, R=shape.per_group, **shape.widths,
            HGRN2=terms.hgrn2, C=shape.tile, DTYPE=gated_dtype(dy.dtype)[0], PRECISION=precision(dy.dtype),
            STRONG=is_strong,
            ADD=terms.window > 0, **options,
        )  # fmt: skip


def gates(
    q_plain: Tensor, k_plain: Tensor, dq: Tensor, inner: Tensor, dphi: Tensor, before: Tensor, behind: Tensor,
    terms: Averaged, shape: Shape, chosen: Launch | None = None,
) -> Tensor:  # fmt: skip
    """dk of the recurrence."""
    dk = torch.empty(k_plain.shape, dtype=k_plain.dtype, device=dq.device)
    _, options = blocks("gated_liger_gates", dq, chosen)
    gates_kernel[(shape.tiles, shape.groups, shape.batch)](
        q_plain, k_plain, dq, inner, dphi, before, behind, dk, *steps_of(q_plain), *steps_of(k_plain),
        shape.time, *gate_of(terms), terms.mix_recurrent, G=shape.groups, R=shape.per_group, **shape.widths,
        HGRN2=terms.hgrn2, C=shape.tile, DTYPE=gated_dtype(dq.dtype)[0], **options,
    )  # fmt: skip
    return dk


class _Averaged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, q_plain, k_plain, terms, stop):
        q, k, v, q_plain, k_plain = (
            x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v, q_plain, k_plain)
        )
        y, last, states, totals = forward(q, k, v, q_plain, k_plain, terms, stop)
        ctx.save_for_backward(q, k, v, q_plain, k_plain, states, totals)
        ctx.terms, ctx.shape = terms, shape_of(q, k, v)
        if last is not None:
            ctx.mark_non_differentiable(last)
        return y, last

    @staticmethod
    def backward(ctx, dy, _):
        q, k, v, q_plain, k_plain, states, totals = ctx.saved_tensors
        found = backward(q, k, v, q_plain, k_plain, states, totals, dy, ctx.terms, ctx.shape)
        return *found, None, None


@compiled_together
def averaged_kernel(
    q: Tensor, k: Tensor, v: Tensor, q_plain: Tensor, k_plain: Tensor, terms: Averaged, *,
    stop: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``averaged.averaged_composed``; no gradient flows through the state."""
    return _Averaged.apply(q, k, v, q_plain, k_plain, terms, stop)  # pyright: ignore[reportReturnType]
