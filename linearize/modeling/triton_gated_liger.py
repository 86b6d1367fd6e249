"""Liger's layer as kernels: softmax on a short window and the gated recurrence, averaged, in one write of y.

``liger.py`` has the equations, ``gated.py`` the reference, ``triton_gated.py`` the road, and
``triton_gated_liger_states.py`` the state before every tile. Then

    outputs     a tile of C queries of a few heads of a group, whose rows are stacked    grid (tile, heads, row)

reads keys, values and the state once for its heads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .averaged import Averaged
from .launches import Launch
from .triton_common import load_columns, load_matrix, load_rows, load_transposed, store_rows
from .triton_gated import LOG2E, RUN, blocks, run_scores, softmax_rows, steps_of
from .triton_gated_liger_states import (
    Shape,
    gate_of,
    key_features,
    key_gates,
    last_state,
    query_features,
    scanned,
    shape_of,
    tile_sums,
)


@triton.jit
def load_heads(
    x, start, stride, apart, stop, D: tl.constexpr, BLOCK: tl.constexpr, BT: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    """[HEADS * BT, BLOCK]: ``load_rows`` of HEADS heads, ``apart`` in memory, one below the other."""
    row, column = tl.arange(0, HEADS * BT), tl.arange(0, BLOCK)
    live = (start + row % BT >= 0) & (start + row % BT < stop)
    mask = live[:, None] if D == BLOCK else live[:, None] & (column < D)[None, :]
    at = (row // BT) * apart + (row % BT) * stride
    return tl.load(
        x + tl.cast(start, tl.int64) * stride + at[:, None] + column[None, :], mask=mask, other=0.0
    )


@triton.jit
def window_rows(
    turned, keys, values, k, v, t, k_t, v_t, time, scale, factor,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, W: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """factor * softmax of the window [HEADS * BT, VP] fp32: the queries' own BT keys and values, then earlier ones."""
    token = tl.arange(0, HEADS * BT) % BT
    scores = tl.dot(turned, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
    back = token[:, None] - tl.arange(0, BT)[None, :]
    scores = tl.where((back >= 0) & (back < W), scores, -1e30)
    highest = tl.max(scores, 1)
    grown = tl.exp2(scores - highest[:, None])
    weight = tl.sum(grown, 1)
    rows = tl.dot(grown.to(values.dtype), values, input_precision=PRECISION)
    for i in range(0, (W - 1 + BK - 1) // BK):
        near = t - (i + 1) * BK
        earlier_keys = load_columns(k, near, k_t, time, K, KP, BK)
        earlier_values = load_rows(v, near, v_t, time, V, VP, BK)
        found = tl.dot(turned, earlier_keys, input_precision=PRECISION) * (scale * LOG2E)
        there = near + tl.arange(0, BK)
        gap = (t + token)[:, None] - there[None, :]
        found = tl.where((gap < W) & (there >= 0)[None, :], found, -1e30)
        higher = tl.maximum(highest, tl.max(found, 1))
        found = tl.exp2(found - higher[:, None])
        shrink = tl.exp2(highest - higher)
        weight = weight * shrink + tl.sum(found, 1)
        found = found.to(values.dtype)
        rows = tl.dot(found, earlier_values, rows * shrink[:, None], input_precision=PRECISION)
        highest = higher
    return rows * (factor / weight)[:, None]


@triton.jit(do_not_specialize=["time"])
def outputs_kernel(
    q, k, v, q_plain, k_plain, decays, fine, strong, y,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, qp_b, qp_t, qp_h, kp_b, kp_t, kp_h,
    time, scale, bias, inverse, sharpness, mix_window, mix_recurrent,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    W: tl.constexpr, HGRN2: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """All tiles but the strong ones."""
    n, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    head = tl.program_id(1) * HEADS
    g = head // R
    tile = (b * G + g) * tl.cdiv(time, C) + n
    if tl.load(strong + tile) > 0:
        return
    k += b * k_b + g * k_h
    v += b * v_b + g * v_h
    k_plain += b * kp_b + g * kp_h
    decays += b * time * (G * K) + g * K
    t = n * C
    # Operands first: their loads wait together.
    turned = load_heads(q + b * q_b + head * q_h, t, q_t, q_h, time, K, KP, C, HEADS)
    keys = load_rows(k, t, k_t, time, K, KP, C)
    values = load_rows(v, t, v_t, time, V, VP, C)
    state = load_matrix(fine + tile * (V * K), V, K, VP, KP)
    reading = load_heads(q_plain + b * qp_b + head * qp_h, t, qp_t, qp_h, time, K, KP, C, HEADS)
    reading = softmax_rows(reading.to(tl.float32), K, KP) * mix_recurrent
    reading = (reading * tl.exp2(load_heads(decays, t, G * K, 0, time, K, KP, C, HEADS))).to(DTYPE)
    early = key_features(k_plain, t, kp_t, time, bias, inverse, sharpness, K, KP, C, HGRN2)
    early = (early * tl.exp2(-load_rows(decays, t, G * K, time, K, KP, C))).to(DTYPE)
    token = tl.arange(0, HEADS * C) % C
    scores = tl.dot(reading, tl.trans(early), input_precision=PRECISION)
    scores = tl.where(token[:, None] >= tl.arange(0, C)[None, :], scores, 0.0).to(DTYPE)
    if W > 0:
        rows = window_rows(
            turned, keys, values, k, v, t, k_t, v_t, time, scale, mix_window,
            K, KP, V, VP, W, C, BK, HEADS, PRECISION,
        )  # fmt: skip
    else:
        rows = tl.zeros([HEADS * C, VP], tl.float32)
    rows = tl.dot(scores, values.to(DTYPE), rows, input_precision=PRECISION)
    rows = tl.dot(reading, tl.trans(state), rows, input_precision=PRECISION)
    column = tl.arange(0, VP)
    at = y + (b * time + t) * (G * R * V) + head * V + column[None, :]
    at += (tl.arange(0, HEADS * C) // C * V + token * (G * R * V))[:, None]
    live = (t + token < time)[:, None]
    if V < VP:
        live = live & (column < V)[None, :]
    tl.store(at, rows.to(y.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["time"])
def strong_outputs_kernel(
    q, k, v, q_plain, k_plain, fine, strong, y,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, qp_b, qp_t, qp_h, kp_b, kp_t, kp_h,
    time, scale, bias, inverse, sharpness, mix_window, mix_recurrent,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    W: tl.constexpr, HGRN2: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """The strong tiles of a group, run after run."""
    n, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tile = (b * G + g) * tl.cdiv(time, C) + n
    if tl.load(strong + tile) == 0:
        return
    k += b * k_b + g * k_h
    v += b * v_b + g * v_h
    k_plain += b * kp_b + g * kp_h
    q += b * q_b + g * R * q_h
    q_plain += b * qp_b + g * R * qp_h
    y += b * time * (G * R * V) + g * R * V
    state = load_transposed(fine + tile * (V * K), V, K, VP, KP).to(tl.float32)
    for i in range(0, C // RUN):
        t = n * C + i * RUN
        log_decay = key_gates(k_plain, t, kp_t, time, bias, inverse, K, KP, RUN)
        phi_k = key_features(k_plain, t, kp_t, time, bias, inverse, sharpness, K, KP, RUN, HGRN2)
        keys = load_rows(k, t, k_t, time, K, KP, RUN)
        near = load_rows(v, t, v_t, time, V, VP, RUN)
        values = near.to(DTYPE)
        for r in range(0, R):
            phi_q = query_features(q_plain + r * qp_h, t, qp_t, time, K, KP, RUN) * mix_recurrent
            reading = (phi_q * tl.exp(tl.cumsum(log_decay, 0))).to(DTYPE)
            rows = tl.dot(reading, state.to(DTYPE), input_precision=PRECISION)
            scores = run_scores(phi_q, phi_k, log_decay, KP, DTYPE, PRECISION, False)
            rows = tl.dot(scores.to(DTYPE), values, rows, input_precision=PRECISION)
            if W > 0:
                turned = load_rows(q + r * q_h, t, q_t, time, K, KP, RUN)
                rows += window_rows(
                    turned, keys, near, k, v, t, k_t, v_t, time, scale, mix_window,
                    K, KP, V, VP, W, RUN, BK, 1, PRECISION,
                )  # fmt: skip
            store_rows(y + r * V, rows, t, G * R * V, time, V, VP, RUN)
        late = (phi_k * tl.exp(tl.cumsum(log_decay, 0, reverse=True) - log_decay)).to(DTYPE)
        state = state * tl.exp(tl.sum(log_decay, 0))[:, None]
        state = tl.dot(tl.trans(late), values, state, input_precision=PRECISION)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_plain: Tensor,
    k_plain: Tensor,
    terms: Averaged,
    stop: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(y, the state after ``stop`` tokens of each row, states before tiles, which tiles are strong)."""
    shape = shape_of(q, k, v)
    sums, decays, strong = tile_sums(k_plain, v, terms, shape)
    fine, reached = scanned(sums, decays, shape, v.dtype, stop=stop)
    del sums
    last = None
    if stop is not None and reached is not None:
        last = last_state(k_plain, v, reached, stop, terms, shape)
    return outputs(q, k, v, q_plain, k_plain, decays, fine, strong, terms, shape), last, fine, strong


def outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_plain: Tensor,
    k_plain: Tensor,
    decays: Tensor,
    fine: Tensor,
    strong: Tensor,
    terms: Averaged,
    shape: Shape,
    chosen: Launch | None = None,
) -> Tensor:
    """y [B, T, H, V] from the states before tiles."""
    y = torch.empty(*q.shape[:3], shape.value_dim, dtype=v.dtype, device=v.device)
    numbers = (
        *steps_of(q), *steps_of(k), *steps_of(v), *steps_of(q_plain), *steps_of(k_plain),
        shape.time, terms.scale, *gate_of(terms), terms.mix_window, terms.mix_recurrent,
    )  # fmt: skip
    constants = {**shape.constants(v), "R": shape.per_group, "W": terms.window, "HGRN2": terms.hgrn2}
    sizes, options = blocks("gated_liger_outputs", v, chosen)
    while shape.per_group % sizes["HEADS"]:
        sizes["HEADS"] //= 2
    outputs_kernel[(shape.tiles, shape.heads // sizes["HEADS"], shape.batch)](
        q, k, v, q_plain, k_plain, decays, fine, strong, y, *numbers, **constants, **sizes, **options
    )
    sizes, options = blocks("gated_liger_outputs_strong", v)
    strong_outputs_kernel[(shape.tiles, shape.groups, shape.batch)](
        q, k, v, q_plain, k_plain, fine, strong, y, *numbers, **constants, **sizes, **options
    )
    return y
