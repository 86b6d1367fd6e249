"""Liger's layer in three kernels: softmax on a short window and the gated recurrence, averaged, in one write of y.

``liger.py`` has the equations, ``gated.py`` the reference, ``triton_gated.py`` how a sequence is walked. Gates and
features are made from the projections in registers, and a state belongs to a key/value head:

    states      the sum of every segment from nothing, and its whole log decay       grid (segment, kv head, row)
    scan        the state before every segment, in the inputs' dtype                 ``triton_gated.scan_kernel``
    outputs     a segment in steps of BC tokens: window, state, pairs of the step    grid (segment, kv head, row)

Departures: the state in registers is fp32, but products read it, like every operand, rounded to the inputs' dtype.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import Launch, launch
from .triton_common import load_columns, load_rows
from .triton_gated import (
    LOG2E,
    REACH,
    load_group,
    log_gate,
    scan_kernel,
    softmax_group,
    store_group,
    strong_scores,
)


@triton.jit
def key_side(
    x, start, stride, stop, bias, inverse, sharpness,
    K: tl.constexpr, KP: tl.constexpr, BC: tl.constexpr, HGRN2: tl.constexpr,
):  # fmt: skip
    """(features, log decay) [BC, KP] fp32 of raw keys; zeros where there is no token."""
    raw = load_rows(x, start, stride, stop, K, KP, BC).to(tl.float32)
    there = (tl.arange(0, KP) < K)[None, :]
    live = (start + tl.arange(0, BC) < stop)[:, None] & there
    log_decay = tl.where(live, log_gate(raw, bias, inverse), 0.0)
    if HGRN2:
        return 1.0 - tl.exp(log_decay), log_decay
    sharp = tl.where(there, raw * sharpness, float("-inf"))
    grown = tl.exp2((sharp - tl.max(sharp, 1)[:, None]) * LOG2E)
    return tl.where(live, grown / tl.sum(grown, 1)[:, None], 0.0), log_decay


@triton.jit(do_not_specialize=["time", "segments"])
def states_kernel(
    k_plain, v, sums, totals, last, stop,
    k_b, k_t, k_h, v_b, v_t, v_h,
    time, segments, bias, inverse, sharpness,
    G: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, HGRN2: tl.constexpr,
    CS: tl.constexpr, FINAL: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """``FINAL``: the rest of the segment that holds token ``stop`` joins the state ``last``, in place."""
    n, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    k_plain += b * k_b + g * k_h
    v += b * v_b + g * v_h
    channel, value = tl.arange(0, KP), tl.arange(0, VP)
    square = channel[:, None] * V + value[None, :]
    inside = (channel < K)[:, None] & (value < V)[None, :]
    ends = time
    if FINAL:
        ends = tl.load(stop + b).to(tl.int32)
        n = ends // CS
        last += (b * G + g) * K * V + square
        state = tl.load(last, mask=inside, other=0.0)
    else:
        state = tl.zeros([KP, VP], tl.float32)
    total = tl.zeros([KP], tl.float32)
    first = n * CS
    for t in range(first, tl.minimum(first + CS, ends), BT):
        phi, log_decay = key_side(k_plain, t, k_t, ends, bias, inverse, sharpness, K, KP, BT, HGRN2)
        since = tl.cumsum(log_decay, 0, reverse=True) - log_decay
        whole = tl.sum(log_decay, 0)
        total += whole
        values = load_rows(v, t, v_t, ends, V, VP, BT).to(DTYPE)
        state = state * tl.exp(whole)[:, None]
        state = tl.dot(tl.trans((phi * tl.exp(since)).to(DTYPE)), values, state, input_precision=PRECISION)
    if FINAL:
        tl.store(last, state, mask=inside)
    else:
        row = (b * G + g) * segments + n
        tl.store(sums + row * K * V + square, state, mask=inside)
        tl.store(totals + row * K + channel, total, mask=channel < K)


@triton.jit(do_not_specialize=["time", "segments"])
def outputs_kernel(
    q, k, v, q_plain, k_plain, states, y,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, qp_b, qp_t, qp_h, kp_b, kp_t, kp_h,
    time, segments, scale, bias, inverse, sharpness, mix_window, mix_recurrent,
    G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr,
    VP: tl.constexpr, W: tl.constexpr, HGRN2: tl.constexpr, CS: tl.constexpr, BC: tl.constexpr,
    LEVELS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q += b * q_b + g * R * q_h
    k += b * k_b + g * k_h
    v += b * v_b + g * v_h
    q_plain += b * qp_b + g * R * qp_h
    k_plain += b * kp_b + g * kp_h
    y += (b * time * G + g) * R * V
    channel, value = tl.arange(0, KP), tl.arange(0, VP)
    square = channel[:, None] * V + value[None, :]
    inside = (channel < K)[:, None] & (value < V)[None, :]
    states += ((b * G + g) * segments + n) * K * V + square
    state = tl.load(states, mask=inside, other=0.0).to(tl.float32)
    query, key = tl.arange(0, BC * RP) // RP, tl.arange(0, BC)
    first = n * CS
    for t in range(first, tl.minimum(first + CS, time), BC):
        # The window, by running maxima over blocks of keys that end with the step's last token.
        rows = tl.zeros([BC * RP, VP], tl.float32)
        if W > 0:
            turned = load_group(q, t, q_t, q_h, time, R, K, RP, KP, BC)
            highest = tl.full([BC * RP], -1e30, tl.float32)
            weight = tl.zeros([BC * RP], tl.float32)
            for i in range(0, (W - 1 + BC + BK - 1) // BK):
                near = t + BC - ((W - 1 + BC + BK - 1) // BK - i) * BK
                keys = load_columns(k, near, k_t, time, K, KP, BK)
                values = load_rows(v, near, v_t, time, V, VP, BK)
                scores = tl.dot(turned, keys, input_precision=PRECISION) * (scale * LOG2E)
                there = near + tl.arange(0, BK)
                gap = (t + query)[:, None] - there[None, :]
                seen = (gap >= 0) & (gap < W) & (there >= 0)[None, :]
                scores = tl.where(seen, scores, -1e30)
                higher = tl.maximum(highest, tl.max(scores, 1))
                grown = tl.where(seen, tl.exp2(scores - higher[:, None]), 0.0)
                shrink = tl.exp2(highest - higher)
                weight = weight * shrink + tl.sum(grown, 1)
                rows = tl.dot(grown.to(values.dtype), values, rows * shrink[:, None], input_precision=PRECISION)
                highest = higher
            rows = rows * (mix_window / tl.where(weight > 0, weight, 1.0))[:, None]
        # The recurrence joins the same sum.
        phi_k, log_decay = key_side(k_plain, t, kp_t, time, bias, inverse, sharpness, K, KP, BC, HGRN2)
        phi_q = softmax_group(q_plain, t, qp_t, qp_h, time, R, K, RP, KP, BC) * mix_recurrent
        values = load_rows(v, t, v_t, time, V, VP, BC).to(DTYPE)
        running = tl.cumsum(log_decay, 0)
        whole = tl.sum(log_decay, 0)
        reach = tl.reshape(phi_q * tl.exp(running)[:, None, :], (BC * RP, KP)).to(DTYPE)
        rows = tl.dot(reach, state.to(DTYPE), rows, input_precision=PRECISION)
        if tl.min(whole, 0) > -REACH:
            early = (phi_k * tl.exp(-running)).to(DTYPE)
            scores = tl.dot(reach, tl.trans(early), input_precision=PRECISION)
            scores = tl.where(query[:, None] >= key[None, :], scores, 0.0)
        else:
            scores = strong_scores(phi_q, phi_k, log_decay, BC, RP, KP, LEVELS, DTYPE, PRECISION)
        rows = tl.dot(scores.to(DTYPE), values, rows, input_precision=PRECISION)
        store_group(y, rows, t, G * R * V, V, time, R, V, RP, VP, BC)
        since = tl.cumsum(log_decay, 0, reverse=True) - log_decay
        late = (phi_k * tl.exp(since)).to(DTYPE)
        state = tl.dot(tl.trans(late), values, state * tl.exp(whole)[:, None], input_precision=PRECISION)


class Terms(NamedTuple):
    """What of a Liger layer is fixed: the numbers of its configuration."""

    scale: float
    window: int
    """W, 0 for none."""
    hgrn2: bool
    steps: float
    """N, the divisor of the log gate."""
    bias: float
    temperature: float
    mix_window: float
    mix_recurrent: float

    @property
    def gate(self) -> tuple[float, float, float]:
        return self.bias, 1.0 / self.steps, 1.0 / self.temperature


class Shape(NamedTuple):
    """Sizes of a call, and the blocks that hold them."""

    batch: int
    time: int
    heads: int
    groups: int
    key_dim: int
    value_dim: int
    segment: int

    @property
    def segments(self) -> int:
        return triton.cdiv(self.time, self.segment)

    @property
    def per_group(self) -> int:
        return self.heads // self.groups

    def widths(self) -> dict[str, int]:
        keys, values = (max(16, triton.next_power_of_2(x)) for x in (self.key_dim, self.value_dim))
        return {"K": self.key_dim, "KP": keys, "V": self.value_dim, "VP": values}

    def group(self, rows: int) -> dict[str, int]:
        """Constants of a walk by steps of about ``rows`` rows, the heads of a group beside each other."""
        padded = triton.next_power_of_2(self.per_group)
        step = min(self.segment, max(16, rows // padded))
        return {"R": self.per_group, "RP": padded, "BC": step, "LEVELS": step.bit_length() - 1}


def shape_of(q: Tensor, k: Tensor, v: Tensor) -> Shape:
    segment = launch("gated_liger_states", v.device).blocks["CS"]
    return Shape(*q.shape[:3], k.shape[2], q.shape[3], v.shape[3], segment)


def gated_dtype(dtype: torch.dtype) -> tuple[tl.dtype, torch.dtype]:
    """Of operands that carry a gate, and of boundary states: exponents of a gate need the range of bf16."""
    return (tl.float32, torch.float32) if dtype == torch.float32 else (tl.bfloat16, torch.bfloat16)


def steps_of(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def blocks(name: str, x: Tensor, chosen: Launch | None) -> tuple[dict[str, int], dict[str, int]]:
    """(block sizes, warps and stages) of a kernel."""
    row = chosen or launch(name, x.device)
    return dict(row.blocks), {"num_warps": row.warps, "num_stages": row.stages}


def scan(
    sums: Tensor,
    totals: Tensor,
    dtype: torch.dtype,
    *,
    stop: Tensor | None = None,
    start: Tensor | None = None,
    segment: int = 1,
    reverse: bool = False,
    chosen: Launch | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(states [B, heads, N, F, V] before every segment, the one before the segment of token ``stop`` [B])."""
    batch, heads, segments, features, values = sums.shape
    states = torch.empty(sums.shape, dtype=dtype, device=sums.device)
    last = sums.new_empty(batch, heads, features, values) if stop is not None else None
    sizes, options = blocks("gated_scan", sums, chosen)
    size = features * values
    block = min(sizes["BN"], triton.next_power_of_2(size))
    scan_kernel[(batch * heads, triton.cdiv(size, block))](
        sums, totals, states, sums if start is None else start, sums if last is None else last,
        sums if stop is None else stop, segments,
        SIZE=size, V=values, F=features, CS=segment, HAS_START=start is not None, HAS_LAST=stop is not None,
        REVERSED=reverse, HEADS=heads, SHARE=heads // totals.shape[1], BN=block, **options,
    )  # fmt: skip
    return states, last


def segment_sums(
    k_plain: Tensor, v: Tensor, terms: Terms, shape: Shape, chosen: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """(sums [B, G, N, K, V], log decays [B, G, N, K]) fp32 of every segment."""
    lead = (shape.batch, shape.groups, shape.segments, shape.key_dim)
    sums = torch.empty(*lead, shape.value_dim, dtype=torch.float32, device=v.device)
    totals = torch.empty(lead, dtype=torch.float32, device=v.device)
    _states(k_plain, v, sums, totals, None, None, terms, shape, chosen)
    return sums, totals


def _states(
    k_plain: Tensor,
    v: Tensor,
    sums: Tensor,
    totals: Tensor,
    last: Tensor | None,
    stop: Tensor | None,
    terms: Terms,
    shape: Shape,
    chosen: Launch | None,
) -> None:
    sizes, options = blocks("gated_liger_states", v, chosen)
    tile = min(sizes["BT"], shape.segment)
    grid = (1 if stop is not None else shape.segments, shape.groups, shape.batch)
    states_kernel[grid](
        k_plain, v, sums, totals, sums if last is None else last, sums if stop is None else stop,
        *steps_of(k_plain), *steps_of(v), shape.time, shape.segments, *terms.gate,
        G=shape.groups, **shape.widths(), HGRN2=terms.hgrn2, CS=shape.segment, FINAL=stop is not None,
        DTYPE=gated_dtype(v.dtype)[0], PRECISION="ieee", BT=tile, **options,
    )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, q_plain: Tensor, k_plain: Tensor, terms: Terms, stop: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(y, the state after ``stop`` tokens of each row, states before segments, log decays of segments)."""
    shape = shape_of(q, k, v)
    sums, totals = segment_sums(k_plain, v, terms, shape)
    states, last = scan(sums, totals, gated_dtype(v.dtype)[1], stop=stop, segment=shape.segment)
    if last is not None:
        _states(k_plain, v, sums, totals, last, stop, terms, shape, None)
    return outputs(q, k, v, q_plain, k_plain, states, terms, shape), last, states, totals


def outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_plain: Tensor,
    k_plain: Tensor,
    states: Tensor,
    terms: Terms,
    shape: Shape,
    chosen: Launch | None = None,
) -> Tensor:
    """y [B, T, H, V] from the states before segments."""
    y = torch.empty(*q.shape[:3], shape.value_dim, dtype=v.dtype, device=v.device)
    sizes, options = blocks("gated_liger_outputs", v, chosen)
    outputs_kernel[(shape.segments, shape.groups, shape.batch)](
        q, k, v, q_plain, k_plain, states, y,
        *steps_of(q), *steps_of(k), *steps_of(v), *steps_of(q_plain), *steps_of(k_plain),
        shape.time, shape.segments, terms.scale, *terms.gate, terms.mix_window, terms.mix_recurrent,
        G=shape.groups, **shape.widths(), **shape.group(sizes["ROWS"]), W=terms.window, HGRN2=terms.hgrn2,
        CS=shape.segment, DTYPE=gated_dtype(v.dtype)[0], PRECISION="ieee", BK=sizes["BK"], **options,
    )  # fmt: skip
    return y
