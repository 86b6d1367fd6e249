"""Liger's recurrence as kernels: gates and features, and the state before every tile.

Gates and features are made from the projections in registers; running sums of log gates, which every later kernel
reads, go through memory. A state belongs to a key/value head and lies as [V, K], so that a token is a row everywhere:
features are normalised inside a row, and no product is turned.

    sums        log decays since a tile's start, and what a tile adds to the state     grid (tile, kv head, row)
    scan        the state before every tile, in the inputs' dtype                      grid (row and kv head, values)
    last        the state after ``stop`` tokens of a row

The scan runs in fp32, and so do sums; products read states, like every operand, in 16 bits where the inputs are.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .averaged import Averaged
from .launches import Launch, cdiv
from .triton_common import load_matrix, load_rows, store_rows
from .triton_gated import (
    LOG2E,
    REACH,
    blocks,
    gated_dtype,
    log_gate,
    padded,
    precision,
    since_rows,
    softmax_rows,
    steps_of,
    store_matrix,
    until_rows,
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
def query_features(x, start, stride, stop, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr):
    """softmax of raw queries [BT, KP] fp32; where there is no token, something finite."""
    return softmax_rows(load_rows(x, start, stride, stop, K, KP, BT).to(tl.float32), K, KP)


@triton.jit
def decays_of_tile(
    k_plain, decays, t, k_t, time, bias, inverse, G: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    C: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """(log gates [C, KP] of a tile, their running sums as powers of two), the latter also to ``decays`` [T, G, K]."""
    log_decay = key_gates(k_plain, t, k_t, time, bias, inverse, K, KP, C)
    since = since_rows(log_decay, C, DTYPE) * LOG2E
    store_rows(decays, since, t, G * K, time, K, KP, C)
    return log_decay, since


@triton.jit
def sum_of_tile(
    log_decay, k_plain, v, state, t, k_t, v_t, stop, bias, inverse, sharpness,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, HGRN2: tl.constexpr, C: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``state`` [VP, KP] and what the tokens of a tile add to it by the tile's end."""
    late = key_features(k_plain, t, k_t, stop, bias, inverse, sharpness, K, KP, C, HGRN2)
    late *= tl.exp2(until_rows(log_decay, C, DTYPE) * LOG2E)
    values = load_rows(v, t, v_t, stop, V, VP, C).to(DTYPE)
    return tl.dot(tl.trans(values), late.to(DTYPE), state, input_precision=PRECISION)


@triton.jit(do_not_specialize=["time"])
def sums_kernel(
    k_plain, v, decays, sums, strong,
    k_b, k_t, k_h, v_b, v_t, v_h,
    time, bias, inverse, sharpness,
    G: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, HGRN2: tl.constexpr,
    C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile, from nothing; ``strong``: whether a gate in it is."""
    n, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    k_plain += b * k_b + g * k_h
    v += b * v_b + g * v_h
    decays += b * time * (G * K) + g * K
    tile = (b * G + g) * tl.cdiv(time, C) + n
    log_decay, _ = decays_of_tile(k_plain, decays, n * C, k_t, time, bias, inverse, G, K, KP, C, DTYPE)
    tl.store(strong + tile, (tl.min(tl.sum(log_decay, 0), 0) < -REACH).to(tl.int8))
    state = sum_of_tile(
        log_decay, k_plain, v, tl.zeros([VP, KP], tl.float32), n * C, k_t, v_t, time, bias, inverse, sharpness,
        K, KP, V, VP, HGRN2, C, DTYPE, PRECISION,
    )  # fmt: skip
    store_matrix(sums + tile * (V * K), state, V, K, VP, KP)


@triton.jit(do_not_specialize=["time"])
def scan_kernel(
    sums, decays, states, stop, reached, time,
    G: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, C: tl.constexpr, REVERSED: tl.constexpr,
    HAS_STOP: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """States [rows, tiles, V, K] before every tile, ``REVERSED`` behind it, from the tiles' sums. ``reached``
    [rows, V, K] fp32 is the state before the tile that ``stop`` tokens end in."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(time, C)
    value, channel = tl.program_id(1) * BV + tl.arange(0, BV), tl.arange(0, KP)
    at = value[:, None] * K + channel[None, :]
    live = (value < V)[:, None] & (channel < K)[None, :]
    sums += row * tiles * (V * K)
    states += row * tiles * (V * K)
    decays += row // G * time * (G * K) + row % G * K
    if HAS_STOP:
        ends = tl.load(stop + row // G).to(tl.int32) // C
    running = tl.zeros([BV, KP], tl.float32)
    for i in tl.range(0, tiles, num_stages=STAGES):
        n = tiles - 1 - i if REVERSED else i
        tl.store(states + tl.cast(n, tl.int64) * (V * K) + at, running.to(states.dtype.element_ty), mask=live)
        if HAS_STOP:
            tl.store(reached + row * (V * K) + at, running, mask=live & (n == ends))
        token = tl.minimum(n * C + C, time).to(tl.int64) - 1
        decay = tl.exp2(tl.load(decays + token * (G * K) + channel, mask=channel < K, other=0.0))
        running = running * decay[None, :] + tl.load(
            sums + tl.cast(n, tl.int64) * (V * K) + at, mask=live, other=0.0
        )
    if HAS_STOP:
        tl.store(reached + row * (V * K) + at, running, mask=live & (tiles == ends))


@triton.jit
def last_kernel(
    k_plain, v, reached, last, stop,
    k_b, k_t, k_h, v_b, v_t, v_h,
    bias, inverse, sharpness,
    G: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, HGRN2: tl.constexpr,
    C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The part of a tile that ``stop`` tokens reach into; ``last`` is [K, V], as decoding keeps it."""
    g, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    k_plain += b * k_b + g * k_h
    v += b * v_b + g * v_h
    ends = tl.load(stop + b).to(tl.int32)
    t = ends // C * C
    log_decay = key_gates(k_plain, t, k_t, ends, bias, inverse, K, KP, C)
    state = load_matrix(reached + (b * G + g) * (V * K), V, K, VP, KP)
    state = sum_of_tile(
        log_decay, k_plain, v, state * tl.exp(tl.sum(log_decay, 0))[None, :], t, k_t, v_t, ends, bias, inverse,
        sharpness, K, KP, V, VP, HGRN2, C, DTYPE, PRECISION,
    )  # fmt: skip
    value, channel = tl.arange(0, VP), tl.arange(0, KP)
    live = (value < V)[:, None] & (channel < K)[None, :]
    tl.store(last + (b * G + g) * (K * V) + channel[None, :] * V + value[:, None], state, mask=live)


class Shape(NamedTuple):
    """Sizes of a call."""

    batch: int
    time: int
    heads: int
    groups: int
    key_dim: int
    value_dim: int
    tile: int

    @property
    def tiles(self) -> int:
        return cdiv(self.time, self.tile)

    @property
    def per_group(self) -> int:
        return self.heads // self.groups

    def constants(self, x: Tensor) -> dict[str, Any]:
        """What every kernel of a tile is compiled for, on values like x."""
        return {
            "G": self.groups,
            "K": self.key_dim,
            "KP": padded(self.key_dim),
            "V": self.value_dim,
            "VP": padded(self.value_dim),
            "C": self.tile,
            "DTYPE": gated_dtype(x.dtype)[0],
            "PRECISION": precision(x.dtype),
        }


def shape_of(q: Tensor, k: Tensor, v: Tensor, chosen: Launch | None = None) -> Shape:
    """``chosen`` is a setting of the sums' kernel, which decides on tiles."""
    sizes, _ = blocks("gated_liger_sums", v, chosen)
    return Shape(*q.shape[:3], k.shape[2], q.shape[3], v.shape[3], sizes["C"])


def gate_of(terms: Averaged) -> tuple[float, float, float]:
    """bias, 1 / N, 1 / temperature."""
    return terms.bias, 1.0 / terms.steps, 1.0 / terms.temperature


def tile_sums(
    k_plain: Tensor, v: Tensor, terms: Averaged, shape: Shape, chosen: Launch | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(sums [B, G, tiles, V, K], log decays since a tile's start [B, T, G, K] as powers of two, both fp32, and which
    tiles [B, G, tiles] are strong)."""
    decays = torch.empty(k_plain.shape, dtype=torch.float32, device=v.device)
    strong = torch.empty(shape.batch, shape.groups, shape.tiles, dtype=torch.int8, device=v.device)
    sums = decays.new_empty(*strong.shape, shape.value_dim, shape.key_dim)
    _, options = blocks("gated_liger_sums", v, chosen)
    sums_kernel[(shape.tiles, shape.groups, shape.batch)](
        k_plain, v, decays, sums, strong, *steps_of(k_plain), *steps_of(v), shape.time, *gate_of(terms),
        HGRN2=terms.hgrn2, **shape.constants(v), **options,
    )  # fmt: skip
    return sums, decays, strong


def scanned(
    sums: Tensor, decays: Tensor, shape: Shape, dtype: torch.dtype, *, stop: Tensor | None = None,
    reverse: bool = False, chosen: Launch | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(states [B, G, tiles, V, K] before tiles, or behind them, for inputs of ``dtype``; the state [B, G, V, K] fp32
    before the tile that ``stop`` tokens end in)."""
    states = torch.empty(sums.shape, dtype=gated_dtype(dtype)[1], device=sums.device)
    reached = None if stop is None else sums.new_empty(*sums.shape[:2], *sums.shape[3:])
    sizes, options = blocks("gated_liger_scan", sums, chosen)
    scan_kernel[(shape.batch * shape.groups, cdiv(shape.value_dim, sizes["BV"]))](
        sums, decays, states, states if stop is None else stop, sums if reached is None else reached, shape.time,
        G=shape.groups, K=shape.key_dim, KP=padded(shape.key_dim), V=shape.value_dim, C=shape.tile,
        REVERSED=reverse, HAS_STOP=stop is not None, **sizes, **options,
    )  # fmt: skip
    return states, reached


def last_state(
    k_plain: Tensor, v: Tensor, reached: Tensor, stop: Tensor, terms: Averaged, shape: Shape
) -> Tensor:
    """The state [B, G, K, V] fp32 after ``stop`` [B] tokens of each row, from that before the tile they end in."""
    last = reached.new_empty(shape.batch, shape.groups, shape.key_dim, shape.value_dim)
    _, options = blocks("gated_liger_sums", v)
    last_kernel[(shape.groups, shape.batch)](
        k_plain, v, reached, last, stop, *steps_of(k_plain), *steps_of(v), *gate_of(terms), HGRN2=terms.hgrn2,
        **shape.constants(v), **options,
    )  # fmt: skip
    return last
