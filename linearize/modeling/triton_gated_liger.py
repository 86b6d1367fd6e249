"""Liger's layer as kernels: softmax on a short window and the gated recurrence, averaged, in one write of y.

``liger.py`` has the equations, ``gated.py`` the reference, ``triton_gated.py`` the road. Gates and features are made
from the projections in registers, and a state belongs to a key/value head:

    states      sums and log decays of segments, then states before tiles       grid (segment, kv head, row)
    outputs     a tile of C queries of a few heads of a group                   grid (tile, kv head and share, row)

Departures: sums and states of segments are fp32, but products read states, like every operand, in the inputs' dtype.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .averaged import Averaged
from .launches import Launch
from .triton_common import load_columns, load_matrix, load_rows, store_rows
from .triton_gated import (
    LOG2E,
    REACH,
    RUN,
    blocks,
    earlier,
    gated_dtype,
    log_gate,
    padded,
    precision,
    run_scores,
    scan,
    softmax_columns,
    softmax_rows,
    steps_of,
    store_matrix,
    until_columns,
)


@triton.jit
def key_gates(
    x, start, stride, stop, bias, inverse, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """Log decays [BT, KP] fp32 of raw keys; zeros where there is no token."""
    raw = load_rows(x, start, stride, stop, K, KP, BT).to(tl.float32)
    live = (start + tl.arange(0, BT) < stop)[:, None]
    if K < KP:
        live = live & (tl.arange(0, KP) < K)[None, :]
    return tl.where(live, log_gate(raw, bias, inverse), 0.0)


@triton.jit
def key_features(
    x, start, stride, stop, bias, inverse, sharpness,
    K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr, HGRN2: tl.constexpr,
):  # fmt: skip
    """Features [BT, KP] fp32 of raw keys; zeros where there is no token."""
    if HGRN2:
        return 1.0 - tl.exp(key_gates(x, start, stride, stop, bias, inverse, K, KP, BT))
    raw = load_rows(x, start, stride, stop, K, KP, BT).to(tl.float32)
    live = (start + tl.arange(0, BT) < stop)[:, None]
    return tl.where(live, softmax_rows(raw * sharpness, K, KP), 0.0)


@triton.jit
def key_gates_by_columns(
    x, start, stride, stop, bias, inverse, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """``key_gates`` [KP, BT]."""
    raw = load_columns(x, start, stride, stop, K, KP, BT).to(tl.float32)
    live = (start + tl.arange(0, BT) < stop)[None, :]
    if K < KP:
        live = live & (tl.arange(0, KP) < K)[:, None]
    return tl.where(live, log_gate(raw, bias, inverse), 0.0)


@triton.jit
def key_features_by_columns(
    x, start, stride, stop, bias, inverse, sharpness,
    K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr, HGRN2: tl.constexpr,
):  # fmt: skip
    """``key_features`` [KP, BT]."""
    if HGRN2:
        return 1.0 - tl.exp(key_gates_by_columns(x, start, stride, stop, bias, inverse, K, KP, BT))
    raw = load_columns(x, start, stride, stop, K, KP, BT).to(tl.float32)
    live = (start + tl.arange(0, BT) < stop)[None, :]
    return tl.where(live, softmax_columns(raw * sharpness, K, KP), 0.0)


@triton.jit
def query_features_by_columns(x, start, stride, stop, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr):
    """``query_features`` [KP, BT]."""
    return softmax_columns(load_columns(x, start, stride, stop, K, KP, BT).to(tl.float32), K, KP)


@triton.jit
def query_features(x, start, stride, stop, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr):
    """softmax of raw queries [BT, KP] fp32; where there is no token, something finite."""
    return softmax_rows(load_rows(x, start, stride, stop, K, KP, BT).to(tl.float32), K, KP)


@triton.jit(do_not_specialize=["time", "segments"])
def states_kernel(
    k_plain, v, sums, totals, states, fine, strong, last, stop,
    k_b, k_t, k_h, v_b, v_t, v_h,
    time, segments, bias, inverse, sharpness,
    G: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, HGRN2: tl.constexpr,
    C: tl.constexpr, CS: tl.constexpr, MODE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A walk through one segment by halves of tiles. MODE "sums": from nothing, writes ``sums`` and ``totals``.
    "fine": from ``states``, writes the state before every tile and whether a gate in it is strong.
    "last": from ``states`` to token ``stop`` [B] of the row, writes ``last``."""
    BT: tl.constexpr = C // 2
    n, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    k_plain += b * k_b + g * k_h
    v += b * v_b + g * v_h
    row = b * G + g
    ends = time
    if MODE == "last":
        ends = tl.load(stop + b).to(tl.int32)
        n = ends // CS
    if MODE == "sums":
        state = tl.zeros([KP, VP], tl.float32)
    else:
        state = load_matrix(states + (row * (segments + 1) + n) * K * V, K, V, KP, VP)
    total = tl.zeros([KP], tl.float32)
    of_tile = tl.zeros([KP], tl.float32)
    first = n * CS
    for t in range(first, tl.minimum(first + CS, ends), BT):
        if MODE == "fine":  # noqa: SIM102
            if t % C == 0:
                store_matrix(fine + (row * tl.cdiv(time, C) + t // C) * K * V, state, K, V, KP, VP)
                of_tile = tl.zeros([KP], tl.float32)
        log_decay = key_gates_by_columns(k_plain, t, k_t, ends, bias, inverse, K, KP, BT)
        whole = tl.sum(log_decay, 1)
        total += whole
        if MODE == "fine":
            of_tile += whole
            above = tl.min(of_tile, 0) < -REACH
            tl.store(strong + row * tl.cdiv(time, C) + t // C, above.to(tl.int8))
        late = tl.exp(until_columns(log_decay, BT, DTYPE))
        late *= key_features_by_columns(k_plain, t, k_t, ends, bias, inverse, sharpness, K, KP, BT, HGRN2)
        values = load_rows(v, t, v_t, ends, V, VP, BT).to(DTYPE)
        state = state * tl.exp(whole)[:, None]
        state = tl.dot(late.to(DTYPE), values, state, input_precision=PRECISION)
    if MODE == "sums":
        store_matrix(sums + (row * segments + n) * K * V, state, K, V, KP, VP)
        tl.store(totals + (row * segments + n) * K + tl.arange(0, KP), total, mask=tl.arange(0, KP) < K)
    if MODE == "last":
        store_matrix(last + row * K * V, state, K, V, KP, VP)


@triton.jit
def window_rows(
    q, k, v, t, q_t, k_t, v_t, time, scale, factor,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, W: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """factor * softmax of the window [BT, VP] fp32, by blocks of keys that end with the last query; zeros for W = 0."""
    BLOCKS: tl.constexpr = (W - 1 + BT + BK - 1) // BK
    rows = tl.zeros([BT, VP], tl.float32)
    if W > 0:
        turned = load_rows(q, t, q_t, time, K, KP, BT)
        highest = tl.full([BT], -1e30, tl.float32)
        weight = tl.zeros([BT], tl.float32)
        for i in range(0, BLOCKS):
            near = t + BT - (BLOCKS - i) * BK
            keys = load_columns(k, near, k_t, time, K, KP, BK)
            scores = tl.dot(turned, keys, input_precision=PRECISION) * (scale * LOG2E)
            there = near + tl.arange(0, BK)
            gap = (t + tl.arange(0, BT))[:, None] - there[None, :]
            scores = tl.where((gap >= 0) & (gap < W) & (there >= 0)[None, :], scores, -1e30)
            higher = tl.maximum(highest, tl.max(scores, 1))
            grown = tl.where(scores > -1e29, tl.exp2(scores - higher[:, None]), 0.0)
            shrink = tl.exp2(highest - higher)
            weight = weight * shrink + tl.sum(grown, 1)
            values = load_rows(v, near, v_t, time, V, VP, BK)
            rows = tl.dot(grown.to(values.dtype), values, rows * shrink[:, None], input_precision=PRECISION)
            highest = higher
        rows = rows * (factor / tl.where(weight > 0, weight, 1.0))[:, None]
    return rows


@triton.jit(do_not_specialize=["time"])
def outputs_kernel(
    q, k, v, q_plain, k_plain, fine, strong, y,
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
    q += b * q_b
    q_plain += b * qp_b
    y += b * time * (G * R * V)
    t = n * C
    # What the heads share.
    reach = tl.exp(tl.cumsum(key_gates(k_plain, t, kp_t, time, bias, inverse, K, KP, C), 0))
    early = key_features(k_plain, t, kp_t, time, bias, inverse, sharpness, K, KP, C, HGRN2)
    early = tl.trans((early / reach).to(DTYPE))
    state = load_matrix(fine + tile * K * V, K, V, KP, VP)
    # What is made from reach and early in front of the loop would stay in registers.
    for r in tl.range(0, HEADS, disable_licm=True):
        h = head + r
        reading = query_features(q_plain + h * qp_h, t, qp_t, time, K, KP, C) * mix_recurrent
        reading = (reading * reach).to(DTYPE)
        rows = window_rows(
            q + h * q_h, k, v, t, q_t, k_t, v_t, time, scale, mix_window, K, KP, V, VP, W, C, BK, PRECISION
        )
        rows = tl.dot(reading, state, rows, input_precision=PRECISION)
        scores = tl.dot(reading, early, input_precision=PRECISION)
        scores = tl.where(earlier(C, False), scores, 0.0)
        values = load_rows(v, t, v_t, time, V, VP, C).to(DTYPE)
        rows = tl.dot(scores.to(DTYPE), values, rows, input_precision=PRECISION)
        store_rows(y + h * V, rows, t, G * R * V, time, V, VP, C)


@triton.jit(do_not_specialize=["time"])
def strong_outputs_kernel(
    q, k, v, q_plain, k_plain, fine, strong, y,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, qp_b, qp_t, qp_h, kp_b, kp_t, kp_h,
    time, scale, bias, inverse, sharpness, mix_window, mix_recurrent,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    W: tl.constexpr, HGRN2: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """The strong tiles, run after run."""
    n, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    g = h // R
    tile = (b * G + g) * tl.cdiv(time, C) + n
    if tl.load(strong + tile) == 0:
        return
    k += b * k_b + g * k_h
    v += b * v_b + g * v_h
    k_plain += b * kp_b + g * kp_h
    q += b * q_b + h * q_h
    q_plain += b * qp_b + h * qp_h
    state = load_matrix(fine + tile * K * V, K, V, KP, VP).to(tl.float32)
    for i in range(0, C // RUN):
        t = n * C + i * RUN
        log_decay = key_gates(k_plain, t, kp_t, time, bias, inverse, K, KP, RUN)
        phi_k = key_features(k_plain, t, kp_t, time, bias, inverse, sharpness, K, KP, RUN, HGRN2)
        phi_q = query_features(q_plain, t, qp_t, time, K, KP, RUN) * mix_recurrent
        reading = (phi_q * tl.exp(tl.cumsum(log_decay, 0))).to(DTYPE)
        rows = tl.dot(reading, state.to(DTYPE), input_precision=PRECISION)
        values = load_rows(v, t, v_t, time, V, VP, RUN).to(DTYPE)
        late = (phi_k * tl.exp(tl.cumsum(log_decay, 0, reverse=True) - log_decay)).to(DTYPE)
        state = state * tl.exp(tl.sum(log_decay, 0))[:, None]
        state = tl.dot(tl.trans(late), values, state, input_precision=PRECISION)
        scores = run_scores(phi_q, phi_k, log_decay, KP, DTYPE, PRECISION, False)
        rows = tl.dot(scores.to(DTYPE), values, rows, input_precision=PRECISION)
        rows += window_rows(
            q, k, v, t, q_t, k_t, v_t, time, scale, mix_window, K, KP, V, VP, W, RUN, BK, PRECISION
        )
        store_rows(y + b * time * (G * R * V) + h * V, rows, t, G * R * V, time, V, VP, RUN)


class Shape(NamedTuple):
    """Sizes of a call."""

    batch: int
    time: int
    heads: int
    groups: int
    key_dim: int
    value_dim: int
    tile: int
    segment: int
    """A multiple of ``tile``."""

    @property
    def segments(self) -> int:
        return triton.cdiv(self.time, self.segment)

    @property
    def tiles(self) -> int:
        return triton.cdiv(self.time, self.tile)

    @property
    def per_group(self) -> int:
        return self.heads // self.groups

    def constants(self, x: Tensor) -> dict[str, Any]:
        """What every kernel of a tile is compiled for, on values like x."""
        return {
            "G": self.groups,
            "R": self.per_group,
            "C": self.tile,
            **self.widths,
            "DTYPE": gated_dtype(x.dtype)[0],
            "PRECISION": precision(x.dtype),
        }

    @property
    def widths(self) -> dict[str, int]:
        return {
            "K": self.key_dim,
            "KP": padded(self.key_dim),
            "V": self.value_dim,
            "VP": padded(self.value_dim),
        }


def shape_of(q: Tensor, k: Tensor, v: Tensor, chosen: Launch | None = None) -> Shape:
    """``chosen`` is a setting of the states' kernel, which decides on tiles and segments."""
    sizes, _ = blocks("gated_liger_states", v, chosen)
    return Shape(*q.shape[:3], k.shape[2], q.shape[3], v.shape[3], sizes["C"], sizes["CS"])


def gate_of(terms: Averaged) -> tuple[float, float, float]:
    """bias, 1 / N, 1 / temperature."""
    return terms.bias, 1.0 / terms.steps, 1.0 / terms.temperature


def segment_sums(
    k_plain: Tensor, v: Tensor, terms: Averaged, shape: Shape, chosen: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """(sums [B, G, N, K, V], log decays [B, G, N, K]) fp32 of every segment."""
    totals = torch.empty(
        shape.batch, shape.groups, shape.segments, shape.key_dim, dtype=torch.float32, device=v.device
    )
    sums = totals.new_empty(*totals.shape, shape.value_dim)
    _walk("sums", k_plain, v, terms, shape, chosen, sums=sums, totals=totals)
    return sums, totals


def tile_states(
    k_plain: Tensor, v: Tensor, states: Tensor, terms: Averaged, shape: Shape, chosen: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """States [B, G, tiles, K, V] before every tile, from those before segments, and which tiles are strong."""
    lead = (shape.batch, shape.groups, shape.tiles)
    fine = torch.empty(*lead, shape.key_dim, shape.value_dim, dtype=gated_dtype(v.dtype)[1], device=v.device)
    strong = torch.empty(lead, dtype=torch.int8, device=v.device)
    _walk("fine", k_plain, v, terms, shape, chosen, states=states, fine=fine, strong=strong)
    return fine, strong


def last_state(
    k_plain: Tensor, v: Tensor, states: Tensor, stop: Tensor, terms: Averaged, shape: Shape
) -> Tensor:
    """The state [B, G, K, V] fp32 after ``stop`` [B] tokens of each row."""
    last = states.new_empty(shape.batch, shape.groups, shape.key_dim, shape.value_dim)
    _walk("last", k_plain, v, terms, shape, None, states=states, last=last, stop=stop)
    return last


def _walk(
    mode: str,
    k_plain: Tensor,
    v: Tensor,
    terms: Averaged,
    shape: Shape,
    chosen: Launch | None,
    **buffers: Tensor,
) -> None:
    _, options = blocks("gated_liger_states", v, chosen)
    used = [buffers.get(name, v) for name in ("sums", "totals", "states", "fine", "strong", "last", "stop")]
    states_kernel[(1 if mode == "last" else shape.segments, shape.groups, shape.batch)](
        k_plain, v, *used, *steps_of(k_plain), *steps_of(v), shape.time, shape.segments, *gate_of(terms),
        G=shape.groups, **shape.widths, HGRN2=terms.hgrn2, C=shape.tile, CS=shape.segment, MODE=mode,
        DTYPE=gated_dtype(v.dtype)[0], PRECISION=precision(v.dtype), **options,
    )  # fmt: skip


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_plain: Tensor,
    k_plain: Tensor,
    terms: Averaged,
    stop: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(y, the state after ``stop`` tokens of each row, states before segments, log decays of segments)."""
    shape = shape_of(q, k, v)
    sums, totals = segment_sums(k_plain, v, terms, shape)
    states = scan(sums, totals)
    fine, strong = tile_states(k_plain, v, states, terms, shape)
    last = None if stop is None else last_state(k_plain, v, states, stop, terms, shape)
    return outputs(q, k, v, q_plain, k_plain, fine, strong, terms, shape), last, states, totals


def outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_plain: Tensor,
    k_plain: Tensor,
    fine: Tensor,
    strong: Tensor,
    terms: Averaged,
    shape: Shape,
    chosen: Launch | None = None,
) -> Tensor:
    """y [B, T, H, V] from the states before tiles."""
    y = torch.empty(*q.shape[:3], shape.value_dim, dtype=v.dtype, device=v.device)
    tensors = (q, k, v, q_plain, k_plain, fine, strong, y)
    numbers = (
        *steps_of(q), *steps_of(k), *steps_of(v), *steps_of(q_plain), *steps_of(k_plain),
        shape.time, terms.scale, *gate_of(terms), terms.mix_window, terms.mix_recurrent,
    )  # fmt: skip
    constants = {**shape.constants(v), "W": terms.window, "HGRN2": terms.hgrn2}
    sizes, options = blocks("gated_liger_outputs", v, chosen)
    sizes["HEADS"] = shared_heads(shape.per_group, sizes["HEADS"])
    grid = (shape.tiles, shape.heads // sizes["HEADS"], shape.batch)
    outputs_kernel[grid](*tensors, *numbers, **constants, **sizes, **options)
    sizes, options = blocks("gated_liger_outputs_strong", v)
    grid = (shape.tiles, shape.heads, shape.batch)
    strong_outputs_kernel[grid](*tensors, *numbers, **constants, **sizes, **options)
    return y


def shared_heads(per_group: int, wanted: int) -> int:
    """How many heads of a group one program takes: at most ``wanted``, and a divisor."""
    return max(n for n in range(1, min(wanted, per_group) + 1) if per_group % n == 0)
