"""LAWCAT's layer without a window as kernels: states of Hedgehog's features with gates, and the division, in registers.

``lawcat.py`` has the equations, ``convolved.py`` the reference, ``triton_gated.py`` the road, and
``triton_gated_mapped.py`` makes what is read here. States belong to a query head, gates to a key/value head.

    states      the state before every tile                 grid (head and half of the features, segment, row)
    outputs     a tile of C queries of some heads           grid (heads, tile, row)

Half of the features are one program's, because their state is what the registers of four warps hold. A row is one
segment where rows and heads fill a GPU, and is walked through once; where they do not, it is cut into several, whose
sums are made first.

A normaliser is carried beside the state: z [F], the same sums with v = 1, as a product with ones: sums over tokens
would be exchanged between warps. Tiles with a strong gate meet pair by pair.

Departures: features are not raised to 1e-12; products read features and states in the inputs' dtype.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import Launch, cdiv
from .triton_common import load_matrix, load_rows, store_rows
from .triton_gated import LOG2E, blocks, earlier, gated_dtype, scan, steps_of, store_matrix
from .triton_gated_mapped import Layer, Mapped, mapped
from .triton_gated_maps import (
    channels,
    log_features,
    pairwise_scores,
    running_gates,
    strong_tile,
    whole_tile,
)

PROGRAMS = 256  # of the states, about as many as a large GPU holds at once


@triton.jit(do_not_specialize=["time", "segments", "per"])
def states_kernel(
    a, norms, running, v, sums, sums_z, totals, states, states_z, fine, fine_z, last, last_z, stop,
    v_b, v_t, v_h, time, segments, per,
    H: tl.constexpr, R: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, f: tl.constexpr, FP: tl.constexpr,
    C: tl.constexpr, MODE: tl.constexpr, STARTS: tl.constexpr, STOPS: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A walk through one segment of ``per`` tokens by tiles, with one half of the features. MODE "sums": from nothing,
    writes ``sums`` and ``totals``. "fine": from ``states`` if it ``STARTS`` from one, writes the state before every
    tile, and into ``last`` the one before the tile of ``stop`` [B] if it ``STOPS``. "last": goes on from there to
    ``stop``."""
    F: tl.constexpr = 2 * f
    half, h = tl.program_id(0) % 2, tl.program_id(0) // 2
    n, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    g = h // R
    row, gate_row = b * H + h, b * (H // R) + g
    channel, column = half * f + tl.arange(0, FP), tl.arange(0, 16)
    there = (tl.arange(0, FP) < f)[:, None] & (column == 0)[None, :]
    tiles = tl.cdiv(time, C)
    a += row * time * f
    norms += row * 2 * time
    running += gate_row * time * F + half * f
    v += b * v_b + g * v_h
    first = n * per
    ends = tl.minimum(first + per, time)
    if MODE == "last" or STOPS:
        until = tl.load(stop + b).to(tl.int32)
        last += (row * F + half * f) * V
        last_z += row * F
    state = tl.zeros([FP, VP], tl.float32)
    z = tl.zeros([FP, 16], tl.float32)  # the same in every column
    if MODE == "fine" and STARTS:
        at = row * (segments + 1) + n
        state = load_matrix(states + (at * F + half * f) * V, f, V, FP, VP)
        z += channels(states_z + at * F + half * f, f, FP)[:, None]
    if MODE == "last":
        first = until // C * C
        ends = until
        state = load_matrix(last, f, V, FP, VP)
        z += channels(last_z + half * f, f, FP)[:, None]
    total, ones = tl.zeros([FP], tl.float32), tl.full([C, 16], 1.0, DTYPE)
    for t in range(first, ends, C):
        if MODE == "fine":
            at = row * tiles + t // C
            store_matrix(fine + (at * F + half * f) * V, state, f, V, FP, VP)
            tl.store(fine_z + at * F + channel[:, None] + column[None, :], z, mask=there)
            if STOPS:  # noqa: SIM102
                if until // C == t // C:
                    store_matrix(last, state, f, V, FP, VP)
                    tl.store(last_z + channel[:, None] + column[None, :], z, mask=there)
        whole = whole_tile(running, t, ends, f, FP, C)
        total += whole
        kept = tl.exp2(whole * LOG2E)
        late = (whole[None, :] - running_gates(running, t, ends, f, FP, C)) * LOG2E
        late = tl.exp2(log_features(a, norms, half, t, time, ends, f, f, FP, C) + late)
        late = tl.trans(late.to(DTYPE))
        values = load_rows(v, t, v_t, ends, V, VP, C).to(DTYPE)
        z = tl.dot(late, ones, z * kept[:, None], input_precision=PRECISION)
        state = tl.dot(late, values, state * kept[:, None], input_precision=PRECISION)
    if MODE == "sums":
        at = row * segments + n
        store_matrix(sums + (at * F + half * f) * V, state, f, V, FP, VP)
        tl.store(sums_z + at * F + channel[:, None] + column[None, :], z, mask=there)
        if h % R == 0:
            tl.store(totals + (gate_row * segments + n) * F + channel, total, mask=tl.arange(0, FP) < f)
    if MODE == "last" or STOPS:  # noqa: SIM102
        if MODE == "last" or ((ends == time) & (until // C == tiles)):
            store_matrix(last, state, f, V, FP, VP)
            tl.store(last_z + channel[:, None] + column[None, :], z, mask=there)


@triton.jit(do_not_specialize=["time"])
def outputs_kernel(
    a_q, norms_q, a_k, norms_k, running, strong, v, fine, fine_z, y, den, v_b, v_t, v_h, time, eps,
    H: tl.constexpr, R: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, f: tl.constexpr, FP: tl.constexpr,
    C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, STRONG: tl.constexpr, SAVE: tl.constexpr,
    HEADS: tl.constexpr, FB: tl.constexpr,
):  # fmt: skip
    n, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    F: tl.constexpr = 2 * f
    W: tl.constexpr = min(f, FB)
    PARTS: tl.constexpr = f // W
    first, tiles, t = tl.program_id(0) * HEADS, tl.num_programs(1), n * C
    g = first // R
    gate_row = b * (H // R) + g
    if strong_tile(strong, gate_row * tiles + n) != STRONG:
        return
    running += gate_row * time * F
    v += b * v_b + g * v_h
    for h in range(first, first + HEADS):
        row = b * H + h
        along = row * time
        of_q, norms_of_q = a_q + along * f, norms_q + along * 2
        of_k, norms_of_k = a_k + along * f, norms_k + along * 2
        tile = row * tiles + n
        scores, rows = tl.zeros([C, C], tl.float32), tl.zeros([C, VP], tl.float32)
        weight = tl.zeros([C], tl.float32) + eps
        for part in tl.range(2 * PARTS):
            half, of = part // PARTS, part % PARTS * W
            gates = load_rows(running + part * W, t, F, time, W, FB, C)
            phi_q = log_features(of_q + of, norms_of_q, half, t, time, time, f, W, FB, C)
            phi_k = log_features(of_k + of, norms_of_k, half, t, time, time, f, W, FB, C)
            reading = tl.exp2(phi_q + gates * LOG2E)
            weight += tl.sum(reading * channels(fine_z + tile * F + part * W, W, FB)[None, :], 1)
            reading = reading.to(DTYPE)
            if not STRONG:
                early = tl.trans(tl.exp2(phi_k - gates * LOG2E).to(DTYPE))
            # Before the scores, whose product it would wait for.
            state = load_matrix(fine + (tile * F + part * W) * V, W, V, FB, VP)
            if STRONG:
                scores = pairwise_scores(scores, tl.exp2(phi_q), tl.exp2(phi_k), gates, C, False)
            else:
                scores = tl.dot(reading, early, scores, input_precision=PRECISION)
            rows = tl.dot(reading, state, rows, input_precision=PRECISION)
        if not STRONG:
            scores = tl.where(earlier(C, False), scores, 0.0)
        weight += tl.sum(scores, 1)
        values = load_rows(v, t, v_t, time, V, VP, C).to(DTYPE)
        rows = tl.dot(scores.to(DTYPE), values, rows, input_precision=PRECISION)
        store_rows(y + b * time * (H * V) + h * V, rows / weight[:, None], t, H * V, time, V, VP, C)
        if SAVE:
            token = t + tl.arange(0, C)
            tl.store(den + b * time * H + h + token.to(tl.int64) * H, weight, mask=token < time)


class States(NamedTuple):
    """What a forward pass leaves behind."""

    y: Tensor
    den: Tensor | None
    """[B, T, H] fp32."""
    states: Tensor
    """[B, H, N + 1, F, V] fp32 before segments, and z beside it; empty where there is one segment."""
    states_z: Tensor
    totals: Tensor
    """[B, G, N, F] fp32, log decays of segments; empty likewise."""


def forward(
    layer: Layer, *, steps: float, eps: float, stop: Tensor | None = None, save: bool = False
) -> tuple[States, Tensor | None]:
    """What comes out, and the state [B, H, F, V + 1] fp32 after ``stop`` [B] tokens of each row."""
    made = mapped(layer, steps)
    states, totals = before_segments(made)
    fine, fine_z, last = tile_states(made, states, stop)
    return States(*outputs(made, fine, fine_z, eps=eps, save=save), *states, totals), last


def segments_of(made: Mapped) -> tuple[int, int]:
    """(segments of a row, tokens of one)."""
    batch, time, heads = made.shape
    sizes, _ = blocks("gated_lawcat_states", made.v)
    count = max(1, PROGRAMS // (2 * batch * heads))
    size = max(sizes["CS"], cdiv(made.tiles, count) * sizes["C"])
    return cdiv(time, size), size


def before_segments(made: Mapped, chosen: Launch | None = None) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """((S, z) before segments, log decays of segments), all empty where there is one."""
    (batch, _, heads), (groups, width) = made.shape, made.running.shape[1::2]
    count, _ = segments_of(made)
    if count == 1:
        nothing = made.running.new_empty(0)
        return (nothing, nothing), nothing
    totals = made.running.new_empty(batch, groups, count, width)
    sums = totals.new_empty(batch, heads, count, width, made.v.shape[3])
    sums_z = totals.new_empty(batch, heads, count, width, 1)
    walk("sums", made, chosen, sums=sums, sums_z=sums_z, totals=totals)
    return (scan(sums, totals), scan(sums_z, totals)), totals


def tile_states(
    made: Mapped, states: tuple[Tensor, Tensor], stop: Tensor | None = None, chosen: Launch | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(states [B, H, tiles, F, V] before tiles, z [B, H, tiles, F] fp32, the state after ``stop`` tokens)."""
    (batch, _, heads), width, value_dim = made.shape, made.running.shape[3], made.v.shape[3]
    dtype = gated_dtype(made.v.dtype)[1]
    fine = torch.empty(batch, heads, made.tiles, width, value_dim, dtype=dtype, device=made.v.device)
    fine_z = made.running.new_empty(batch, heads, made.tiles, width)
    buffers = {"states": states[0], "states_z": states[1], "fine": fine, "fine_z": fine_z}
    if stop is None:
        walk("fine", made, chosen, **buffers)
        return fine, fine_z, None
    last, last_z = fine_z.new_empty(batch, heads, width, value_dim), fine_z.new_empty(batch, heads, width, 1)
    for mode in ("fine", "last"):
        walk(mode, made, chosen, **buffers, last=last, last_z=last_z, stop=stop)
    return fine, fine_z, torch.cat((last, last_z), dim=-1)


def walk(mode: str, made: Mapped, chosen: Launch | None = None, **buffers: Tensor) -> None:
    stops = mode == "fine" and "stop" in buffers
    _, options = blocks("gated_lawcat_states" + "_stop" * stops, made.v, None if stops else chosen)
    names = ("sums", "sums_z", "totals", "states", "states_z", "fine", "fine_z", "last", "last_z", "stop")
    batch, time, heads = made.shape
    count, size = segments_of(made)
    states_kernel[(2 * heads, 1 if mode == "last" else count, batch)](
        made.a_k, made.norms_k, made.running, made.v, *(buffers.get(name, made.v) for name in names),
        *steps_of(made.v), time, count, size,
        **made.sizes, MODE=mode, STARTS=mode == "fine" and count > 1, STOPS=stops,
        **options,
    )  # fmt: skip


def outputs(
    made: Mapped,
    fine: Tensor,
    fine_z: Tensor,
    *,
    eps: float,
    save: bool = False,
    chosen: Launch | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y [B, T, H, V], the denominators [B, T, H] fp32 if they are to be saved)."""
    batch, time, heads = made.shape
    y = torch.empty(batch, time, heads, made.v.shape[3], dtype=made.v.dtype, device=made.v.device)
    den = fine_z.new_empty(batch, time, heads) if save else None
    for is_strong in (False, True):
        name = "gated_lawcat_outputs" + "_strong" * is_strong
        sizes, options = blocks(name, y, None if is_strong else chosen)
        sizes["FB"] = made.sizes["FP"] if made.sizes["f"] % sizes["FB"] else sizes["FB"]
        # Strong tiles are few, and programs that end at once too many.
        at_once = made.sizes["R"] if is_strong else math.gcd(made.sizes["R"], sizes.pop("HEADS"))
        outputs_kernel[(heads // at_once, made.tiles, batch)](
            *made, fine, fine_z, y, fine_z if den is None else den, *steps_of(made.v), time, eps,
            **made.sizes, STRONG=is_strong, SAVE=save, HEADS=at_once, **sizes, **options,
        )  # fmt: skip
    return y, den
