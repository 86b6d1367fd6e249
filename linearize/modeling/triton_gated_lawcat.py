"""LAWCAT's layer without a window as kernels: convolution, Hedgehog map, gates and the divided sum in registers.

``lawcat.py`` has the equations, ``convolved.py`` the reference, ``triton_gated.py`` the road. Taps, maps and states
belong to a query head, gates to a key/value head. Everything stands in two halves of f channels, softmax(a) and
softmax(-a), and a tile is formed in the direction that its product wants, by rows (tokens first) or by columns, never
transposed later.

    states      sums and log decays of segments, then states before tiles     grid (segment, head, row)
    outputs     a tile of C queries of one head                               grid (tile, head, row)

A normaliser is carried beside the state: z [F], the same sums with v = 1. Tiles with a strong gate meet pair by pair.

Departures: features are not raised to 1e-12; products read features and states in the inputs' dtype.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import Launch
from .triton_common import load_matrix, load_rows, store_rows
from .triton_gated import (
    REACH,
    blocks,
    gated_dtype,
    padded,
    precision,
    scan,
    since_columns,
    since_rows,
    steps_of,
    until_columns,
)
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
    pairwise_scores,
    store_both,
)


@triton.jit(do_not_specialize=["time", "segments"])
def states_kernel(
    k, v, logits, taps, map, sums, sums_z, totals, states, states_z, fine, fine_z, strong, last, last_z, stop,
    k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    time, segments, inverse,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr,
    VP: tl.constexpr, f: tl.constexpr, FP: tl.constexpr, TAPS: tl.constexpr, C: tl.constexpr, CS: tl.constexpr,
    MODE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``triton_gated_liger.states_kernel`` for a query head and its map."""
    BT: tl.constexpr = C // 2
    F: tl.constexpr = 2 * f
    n, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    g = h // R
    k += b * k_b + g * k_h
    v += b * v_b + g * v_h
    logits += b * g_b + g * g_h
    taps += h * K * TAPS
    map += h * K * f
    row, gate_row = b * H + h, b * (H // R) + g
    at, there = both(f, FP)
    ends = time
    if MODE == "last":
        ends = tl.load(stop + b).to(tl.int32)
        n = ends // CS
    if MODE == "sums":
        state = tl.zeros([2 * FP, VP], tl.float32)
        z = tl.zeros([2 * FP], tl.float32)
    else:
        state = load_both(states + (row * (segments + 1) + n) * F * V, f, FP, V, VP)
        z = tl.load(states_z + (row * (segments + 1) + n) * F + at, mask=there, other=0.0)
    total = tl.zeros([2 * FP], tl.float32)
    of_tile = tl.zeros([2 * FP], tl.float32)
    first = n * CS
    for t in range(first, tl.minimum(first + CS, ends), BT):
        if MODE == "fine":  # noqa: SIM102
            if t % C == 0:
                tile = row * tl.cdiv(time, C) + t // C
                store_both(fine + tile * F * V, state, f, FP, V, VP)
                tl.store(fine_z + tile * F + at, z, mask=there)
                of_tile = tl.zeros([2 * FP], tl.float32)
        late = all_features_by_columns(k, taps, map, t, k_t, ends, K, KP, f, FP, TAPS, BT, PRECISION)
        log_decay = all_gates_by_columns(logits, t, g_t, ends, inverse, f, FP, BT)
        whole = tl.sum(log_decay, 1)
        total += whole
        of_tile += whole
        late *= tl.exp(until_columns(log_decay, BT, DTYPE))
        values = load_rows(v, t, v_t, ends, V, VP, BT).to(DTYPE)
        z = z * tl.exp(whole) + tl.sum(late, 1)
        state = tl.dot(late.to(DTYPE), values, state * tl.exp(whole)[:, None], input_precision=PRECISION)
        if MODE == "fine":  # noqa: SIM102
            if h % R == 0:
                above = tl.min(of_tile, 0) < -REACH
                tl.store(strong + gate_row * tl.cdiv(time, C) + t // C, above.to(tl.int8))
    if MODE == "sums":
        store_both(sums + (row * segments + n) * F * V, state, f, FP, V, VP)
        tl.store(sums_z + (row * segments + n) * F + at, z, mask=there)
        if h % R == 0:
            tl.store(totals + (gate_row * segments + n) * F + at, total, mask=there)
    if MODE == "last":
        store_both(last + row * F * V, state, f, FP, V, VP)
        tl.store(last_z + row * F + at, z, mask=there)


@triton.jit(do_not_specialize=["time"])
def outputs_kernel(
    q, k, v, logits, taps_q, taps_k, map_q, map_k, fine, fine_z, strong, y, den,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    time, inverse, eps,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    f: tl.constexpr, FP: tl.constexpr, TAPS_Q: tl.constexpr, TAPS_K: tl.constexpr, C: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STRONG: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    n, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    g = h // R
    F: tl.constexpr = 2 * f
    tiles = tl.cdiv(time, C)
    if (tl.load(strong + (b * (H // R) + g) * tiles + n) > 0) != STRONG:
        return
    t = n * C
    k += b * k_b + g * k_h
    logits += b * g_b + g * g_h
    taps_k += h * K * TAPS_K
    map_k += h * K * f
    q += b * q_b + h * q_h
    taps_q += h * K * TAPS_Q
    map_q += h * K * f
    token = tl.arange(0, C)
    if not STRONG:
        early_plus, early_minus = features_by_columns(
            k, taps_k, map_k, t, k_t, time, K, KP, f, FP, TAPS_K, C, PRECISION
        )
        reach = tl.exp(since_columns(gates_by_columns(logits, t, g_t, time, inverse, f, FP, C), C, DTYPE))
        early_plus = (early_plus / reach).to(DTYPE)
        reach = tl.exp(since_columns(gates_by_columns(logits + f, t, g_t, time, inverse, f, FP, C), C, DTYPE))
        early_minus = (early_minus / reach).to(DTYPE)
    plus, minus = features_by_rows(q, taps_q, map_q, t, q_t, time, K, KP, f, FP, TAPS_Q, C, PRECISION)
    tile = (b * H + h) * tiles + n
    running = since_rows(gates_by_rows(logits, t, g_t, time, inverse, f, FP, C), C, DTYPE)
    if STRONG:
        key_plus, key_minus = features_by_rows(
            k, taps_k, map_k, t, k_t, time, K, KP, f, FP, TAPS_K, C, PRECISION
        )
        scores = pairwise_scores(tl.zeros([C, C], tl.float32), plus, key_plus, running, C, False)
    plus = plus * tl.exp(running)
    weight = tl.sum(plus * channels(fine_z + tile * F, f, FP)[None, :], 1)
    plus = plus.to(DTYPE)
    running = since_rows(gates_by_rows(logits + f, t, g_t, time, inverse, f, FP, C), C, DTYPE)
    if STRONG:
        scores = pairwise_scores(scores, minus, key_minus, running, C, False)
    minus = minus * tl.exp(running)
    weight += tl.sum(minus * channels(fine_z + tile * F + f, f, FP)[None, :], 1)
    minus = minus.to(DTYPE)
    if not STRONG:
        scores = tl.dot(plus, early_plus, input_precision=PRECISION)
        scores = tl.dot(minus, early_minus, scores, input_precision=PRECISION)
        scores = tl.where(token[:, None] >= token[None, :], scores, 0.0)
    weight += tl.sum(scores, 1) + eps
    rows = tl.dot(plus, load_matrix(fine + tile * F * V, f, V, FP, VP), input_precision=PRECISION)
    rows = tl.dot(
        minus, load_matrix(fine + tile * F * V + f * V, f, V, FP, VP), rows, input_precision=PRECISION
    )
    values = load_rows(v + b * v_b + g * v_h, t, v_t, time, V, VP, C).to(DTYPE)
    rows = tl.dot(scores.to(DTYPE), values, rows, input_precision=PRECISION) / weight[:, None]
    store_rows(y + b * time * (H * V) + h * V, rows, t, H * V, time, V, VP, C)
    if SAVE:
        at = den + b * time * H + h + (t + token).to(tl.int64) * H
        tl.store(at, weight, mask=t + token < time)


class Layer(NamedTuple):
    """Inputs of a layer. Maps are W [H, K, f] and taps [H, K, c]; an empty tensor is no convolution."""

    q: Tensor
    k: Tensor
    v: Tensor
    logits: Tensor
    """[B, T, G, F] of the gate."""
    taps_q: Tensor
    taps_k: Tensor
    map_q: Tensor
    map_k: Tensor

    @property
    def sizes(self) -> dict[str, int]:
        """Constants of a launch."""
        key_dim, value_dim, f = self.q.shape[3], self.v.shape[3], self.map_k.shape[2]
        return {
            "H": self.q.shape[2], "R": self.q.shape[2] // self.k.shape[2],
            "K": key_dim, "KP": padded(key_dim), "V": value_dim, "VP": padded(value_dim),
            "f": f, "FP": half_width(f, self.v.dtype), "C": blocks("gated_lawcat_states", self.v)[0]["C"],
            "PRECISION": precision(self.v.dtype), "DTYPE": gated_dtype(self.v.dtype)[0],
        }  # fmt: skip


class States(NamedTuple):
    """What a forward pass leaves behind."""

    y: Tensor
    den: Tensor | None
    """[B, T, H] fp32."""
    states: Tensor
    """[B, H, N + 1, F, V] fp32 before segments, and z beside it."""
    states_z: Tensor
    totals: Tensor


def forward(
    layer: Layer, *, steps: float, eps: float, stop: Tensor | None = None, save: bool = False
) -> tuple[States, Tensor | None]:
    """What comes out, and the state [B, H, F, V + 1] fp32 after ``stop`` [B] tokens of each row."""
    states, totals, fine, fine_z, strong = before_tiles(layer, steps)
    made = outputs(layer, fine, fine_z, strong, steps=steps, eps=eps, save=save)
    last = None
    if stop is not None:
        kv, z = (torch.empty_like(x[:, :, 0]) for x in states)
        walk("last", layer, steps, states=states[0], states_z=states[1], last=kv, last_z=z, stop=stop)
        last = torch.cat((kv, z), dim=-1)
    return States(*made, *states, totals), last


def before_tiles(
    layer: Layer, steps: float, chosen: Launch | None = None
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor, Tensor]:
    """((S, z) before segments, log decays of segments [B, G, N, F], and what ``tile_states`` returns)."""
    sizes, _ = blocks("gated_lawcat_states", layer.v, chosen)
    (batch, time, heads), groups = layer.q.shape[:3], layer.k.shape[2]
    width, segments = layer.logits.shape[3], triton.cdiv(time, sizes["CS"])
    totals = torch.empty(batch, groups, segments, width, dtype=torch.float32, device=layer.v.device)
    sums = totals.new_empty(batch, heads, segments, width, layer.v.shape[3])
    sums_z = totals.new_empty(batch, heads, segments, width, 1)
    walk("sums", layer, steps, chosen, sums=sums, sums_z=sums_z, totals=totals)
    states, states_z = scan(sums, totals), scan(sums_z, totals)
    return (states, states_z), totals, *tile_states(layer, states, states_z, steps, chosen)


def tile_states(
    layer: Layer, states: Tensor, states_z: Tensor, steps: float, chosen: Launch | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(states [B, H, tiles, F, V] before tiles, z [B, H, tiles, F] fp32, whether a gate is strong [B, G, tiles])."""
    (batch, time, heads), groups = layer.q.shape[:3], layer.k.shape[2]
    tiles, width = triton.cdiv(time, layer.sizes["C"]), layer.logits.shape[3]
    dtype = gated_dtype(layer.v.dtype)[1]
    fine = torch.empty(batch, heads, tiles, width, layer.v.shape[3], dtype=dtype, device=layer.v.device)
    fine_z = states.new_empty(batch, heads, tiles, width)
    strong = torch.empty(batch, groups, tiles, dtype=torch.int8, device=layer.v.device)
    walk(
        "fine",
        layer,
        steps,
        chosen,
        states=states,
        states_z=states_z,
        fine=fine,
        fine_z=fine_z,
        strong=strong,
    )
    return fine, fine_z, strong


def walk(mode: str, layer: Layer, steps: float, chosen: Launch | None = None, **buffers: Tensor) -> None:
    sizes, options = blocks("gated_lawcat_states", layer.v, chosen)
    names = (
        "sums", "sums_z", "totals", "states", "states_z", "fine", "fine_z", "strong", "last", "last_z", "stop"
    )  # fmt: skip
    batch, time, heads = layer.q.shape[:3]
    segments = triton.cdiv(time, sizes["CS"])
    states_kernel[(1 if mode == "last" else segments, heads, batch)](
        layer.k, layer.v, layer.logits, layer.taps_k, layer.map_k, *(buffers.get(name, layer.v) for name in names),
        *steps_of(layer.k), *steps_of(layer.v), *steps_of(layer.logits), time, segments, 1.0 / steps,
        **layer.sizes, TAPS=taps_of(layer.taps_k), CS=sizes["CS"], MODE=mode, **options,
    )  # fmt: skip


def outputs(
    layer: Layer, fine: Tensor, fine_z: Tensor, strong: Tensor, *, steps: float, eps: float, save: bool = False,
    chosen: Launch | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(y [B, T, H, V], the denominators [B, T, H] fp32 if they are to be saved)."""
    batch, time, heads = layer.q.shape[:3]
    y = torch.empty(batch, time, heads, layer.v.shape[3], dtype=layer.v.dtype, device=layer.v.device)
    den = fine_z.new_empty(batch, time, heads) if save else None
    for is_strong in (False, True):
        _, options = blocks("gated_lawcat_outputs" + "_strong" * is_strong, y, None if is_strong else chosen)
        outputs_kernel[(fine.shape[2], heads, batch)](
            *layer, fine, fine_z, strong, y, fine_z if den is None else den,
            *steps_of(layer.q), *steps_of(layer.k), *steps_of(layer.v), *steps_of(layer.logits),
            time, 1.0 / steps, eps, **layer.sizes, TAPS_Q=taps_of(layer.taps_q), TAPS_K=taps_of(layer.taps_k),
            STRONG=is_strong, SAVE=save, **options,
        )  # fmt: skip
    return y, den


def half_width(f: int, dtype: torch.dtype) -> int:
    """The block of a half of the features. In 16 bits it is 64 or more: Triton 3.6 compiles the gradients of 32 wrongly
    for Hopper, by an eighth of q's and any number for k's."""
    return padded(f) if dtype == torch.float32 else max(64, padded(f))


def taps_of(taps: Tensor) -> int:
    return taps.shape[2] if taps.numel() else 0


def layer_of(
    q: Tensor, k: Tensor, v: Tensor, logits: Tensor, taps_q: Tensor | None, taps_k: Tensor | None, map_q: Tensor,
    map_k: Tensor,
) -> Layer:  # fmt: skip
    """Maps in the dtype of products; channels beside each other."""
    inputs = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v, logits))
    taps = (map_q.new_empty(0) if x is None else x.contiguous() for x in (taps_q, taps_k))
    return Layer(*inputs, *taps, *(x.to(v.dtype).contiguous() for x in (map_q, map_k)))
