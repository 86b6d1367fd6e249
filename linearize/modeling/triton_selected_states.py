"""Sums over the tokens that are linear in STILL's attention, of every chunk; ``triton_selected_routed`` reads them, and
with sums over queries, from the end, ``triton_selected_routed_backward``.

    S_c = sum of phi_k v^T,  z_c = sum of phi_k       over what turned linear with chunk c or before
    R_c = sum of phi_q (g u)^T,  r_c = sum of e phi_q  over the queries of chunk c or after

A program walks a run of chunks for one half of the features, and leaves S^T of each chunk, counted from the run's
beginning; the sums of all other runs before are made from whole runs, and z from those of single chunks
(``scans_kernel``). S^T = v^T phi is formed transposed, so that phi has a token in each row: its softmax then stays
inside a warp. States are bf16 for 16-bit inputs, fp16's included, whose range a long sum would leave. A state for
every chunk is much (32 KiB a token and layer at Llama-3-8B's widths): a long sequence goes piece by piece.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launches import Launch, cdiv, launch, power_of_two, widths_of
from .triton_selected import Sets
from .triton_selected_kept import fitted, rows_at
from .triton_tiles import block, described, matrices, matrix

PROGRAMS = 512
"""About as many programs walk runs of chunks: some for each multiprocessor of a large GPU."""
PIECE_BYTES = 1 << 30
"""Most bytes of states at a time."""


@triton.jit
def load_map(w, K: tl.constexpr, BK: tl.constexpr, F: tl.constexpr):
    """[BK, f] of a matrix [K, f]."""
    d, f = tl.arange(0, BK), tl.arange(0, F)
    if K == BK:
        return tl.load(w + d[:, None] * F + f[None, :])
    return tl.load(w + d[:, None] * F + f[None, :], mask=(d < K)[:, None], other=0.0)


@triton.jit
def sharpness(a, length, NORM: tl.constexpr):
    """What makes of rows a [tokens, f] exponents of 2: with NORM they are as long as ``length`` [tokens] says."""
    sharp = tl.full([a.shape[0]], 1.4426950408889634, tl.float32)
    if NORM:
        sharp *= length / tl.maximum(tl.sqrt(tl.sum(a * a, 1)), 1e-12)
    return sharp


@triton.jit
def weights_of(a, length, F: tl.constexpr, NORM: tl.constexpr):
    """softmax of rows a [tokens, f] or, with NORM, of a made as long as ``length`` [tokens] says, as weights and what
    to multiply each row with. Columns from F on hold zeros, before and after."""
    f, sharp = tl.arange(0, a.shape[1])[None, :], sharpness(a, length, NORM)
    top = tl.max(a if a.shape[1] == F else tl.where(f < F, a, float("-inf")), 1)
    weights = tl.exp2((a - top[:, None]) * sharp[:, None])
    if a.shape[1] > F:
        weights = tl.where(f < F, weights, 0.0)
    return weights, 1.0 / tl.sum(weights, 1)


@triton.jit
def softmax_rows(a, length, F: tl.constexpr, NORM: tl.constexpr):
    weights, inverse = weights_of(a, length, F, NORM)
    return weights * inverse[:, None]


@triton.jit
def turning(leave, left, e, C: tl.constexpr, P: tl.constexpr, FEW: tl.constexpr):
    """Positions [C] of the tokens that turn linear with chunk e, -1 for none: those of chunk e - 2, where one is kept
    instead another that was kept until now, and P of these at most are listed in ``left``."""
    t = (e - 2) * C + tl.arange(0, C)
    since = tl.load(leave + t, mask=t >= 0, other=0)
    stays = (since > e).to(tl.int32)
    if P > 0:
        j = tl.arange(0, FEW)
        late = tl.load(left + e * P + j, mask=j < P, other=-1)
        listed = (late >= 0).to(tl.int32)
        place, order = tl.cumsum(stays, 0) - stays, tl.cumsum(listed, 0) - listed
        taken = (order[None, :] == place[:, None]) & (late >= 0)[None, :]
        other = tl.sum(tl.where(taken, late[None, :] + 1, 0), 1) - 1
        t = tl.where(stays > 0, other, t)
    return tl.maximum(t, -1)


@triton.jit(do_not_specialize=["time", "count"])
def turns_kernel(
    leave, left, sizes, turns, time, count,
    GS: tl.constexpr, C: tl.constexpr, P: tl.constexpr, FEW: tl.constexpr, SIZES: tl.constexpr,
):  # fmt: skip
    """turns [B, Gs, N, C], positions that turn linear with each chunk, -1 for none and, with SIZES, after the last
    chunk of a row of ``sizes`` [B] tokens; grid (N, B Gs)."""
    c, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = turning(leave + row * time, left + row * count * P, c, C, P, FEW)
    if SIZES:
        at = tl.where(c <= (tl.load(sizes + row // GS) - 1) // C, at, -1)
    tl.store(turns + (row * count + c) * C + tl.arange(0, C), at)


@triton.jit(do_not_specialize=["time"])
def lengths_kernel(
    x, lengths, time, x_b, x_t, x_h, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, rows: tl.constexpr
):
    """|x| [B, H, T] of x [B, T, H, K]; grid (row tiles, B)."""
    r, b = tl.program_id(0) * rows + tl.arange(0, rows), tl.program_id(1).to(tl.int64)
    d, t, h = tl.arange(0, BK), r // H, r % H
    wide = (t < time)[:, None] if K == BK else (t < time)[:, None] & (d < K)[None, :]
    at = x + b * x_b + (t.to(tl.int64) * x_t + h * x_h)[:, None] + d[None, :]
    values = tl.load(at, mask=wide, other=0.0).to(tl.float32)
    tl.store(lengths + (b * H + h) * time + t, tl.sqrt(tl.sum(values * values, 1)), mask=t < time)


@triton.jit(do_not_specialize=["time", "count", "start", "chunks", "run"])
def states_kernel(
    x, w, values, turns, lengths, weights, states, sums, totals, time, count, start, chunks, run,
    x_b, x_t, x_h, v_b, v_t, v_h,
    H: tl.constexpr, HX: tl.constexpr, HV: tl.constexpr, HT: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, C: tl.constexpr, NORM: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """states [B, H, N, V, 2 f] of ``chunks`` chunks from ``start`` on, each from its run's beginning (REVERSE: to its
    run's end), whole runs in totals [B, H, runs, V, 2 f] fp32, and sums [B, H, N, 2 f] of the chunks alone. Tokens
    are those of turns [B, Ht, N, C], or with REVERSE all, with ``weights`` [B, H, T] in sums; lengths [B, Hx, T]. HX,
    HV, HT: heads of x, values and turns. Grid (2 H, runs, B), a program for each half of the features."""
    half, h = tl.program_id(0) % 2, tl.program_id(0) // 2
    r, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    runs = tl.num_programs(1)
    turns += ((b * HT + h // (H // HT)) * count + start) * C
    x += b * x_b + h // (H // HX) * x_h
    values += b * v_b + h // (H // HV) * v_h
    lengths += (b * HX + h // (H // HX)) * time
    weights += (b * H + h) * time
    f, e, i = tl.arange(0, FP), tl.arange(0, BV), tl.arange(0, C)
    of_w, sign = matrix(w, h, BK, FP), 1.0 - 2.0 * half
    state = tl.zeros([BV, FP], tl.float32)
    inside = e[:, None] * (2 * F) + f[None, :]
    mask = None if V == BV and F == FP else (e < V)[:, None] & (f < F)[None, :]
    states += half * F
    sums += half * F
    totals += half * F
    first, stop = r * run, tl.minimum((r + 1) * run, chunks)
    for step in range(first, stop):
        c = first + stop - 1 - step if REVERSE else step
        if REVERSE:
            at = (start + c) * C + i
            at = tl.where(at < time, at, -1)
        else:
            at = tl.load(turns + c * C + i)
        there = at >= 0
        vectors = rows_at(values, at, v_t, there, V, BV)
        a = sign * tl.dot(rows_at(x, at, x_t, there, K, BK), of_w, input_precision="ieee")
        length = tl.load(lengths + at, mask=there, other=0.0) if NORM else 1.0
        phi, inverse = weights_of(a, length, F, NORM)
        phi *= tl.where(there, inverse, 0.0)[:, None]
        state = tl.dot(tl.trans(vectors), phi.to(vectors.dtype), state, input_precision="ieee")
        if REVERSE:
            phi *= tl.load(weights + at, mask=there, other=0.0)[:, None]
        z = tl.sum(phi, 0)
        place = ((b * H + h) * chunks + c) * 2 * F
        tl.store(states + place * V + inside, state.to(states.dtype.element_ty), mask=mask)
        tl.store(sums + place + f, z, mask=f < F)
    place = ((b * H + h) * runs + r) * 2 * F
    tl.store(totals + place * V + inside, state, mask=mask)


@triton.jit
def half_of(states, at, half, FP: tl.constexpr, BV: tl.constexpr):
    """[BV, FP], one half of S^T number ``at``, of a descriptor of :func:`halves`."""
    return states.load([at, 0, half, 0]).reshape(BV, FP)


@triton.jit
def add_runs(x, base, carry, runs, begun, tile, head, size: tl.constexpr, REVERSE: tl.constexpr):
    """base [heads, runs, size] = carry [heads, size], if it has ``begun``, and the sums x of all runs before (REVERSE:
    after) each; carry then has them all."""
    i = tile * 1024 + tl.arange(0, 1024)
    total = tl.load(carry + head * size + i, mask=(i < size) & (begun > 0), other=0.0)
    for step in range(0, runs):
        r = runs - 1 - step if REVERSE else step
        at = (head * runs + r) * size + i
        tl.store(base + at, total.to(base.dtype.element_ty), mask=i < size)
        total += tl.load(x + at, mask=i < size, other=0.0)
    tl.store(carry + head * size + i, total, mask=i < size)


@triton.jit
def add_chunks(x, carry, count, begun, tile, head, size: tl.constexpr, REVERSE: tl.constexpr):
    """x [heads, count, size] becomes its running sums after carry [heads, size] (REVERSE: from the end), which then has
    all."""
    i, j = tile * 16 + tl.arange(0, 16), tl.arange(0, 64)
    total = tl.load(carry + head * size + i, mask=(i < size) & (begun > 0), other=0.0)
    for begin in range(0, count, 64):
        step = begin + j
        r = count - 1 - step if REVERSE else step
        at = x + (head * count + r)[:, None] * size + i[None, :]
        mask = (step < count)[:, None] & (i < size)[None, :]
        part = tl.load(at, mask=mask, other=0.0)
        tl.store(at, tl.cumsum(part, 0) + total[None, :], mask=mask)
        total += tl.sum(part, 0)
    tl.store(carry + head * size + i, total, mask=i < size)


@triton.jit(do_not_specialize=["runs", "count", "begun"])
def scans_kernel(
    totals, bases, state, sums, z, runs, count, begun, F2: tl.constexpr, V: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """Running sums of whole runs and of single chunks; grid (tiles of F2 and, unless one run is all, F2 V; heads)."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    few: tl.constexpr = (F2 + 15) // 16
    if tile < few:
        add_chunks(sums, z, count, begun, tile, head, F2, REVERSE)
    else:
        add_runs(totals, bases, state, runs, begun, tile - few, head, F2 * V, REVERSE)


def halves(states: Tensor, width: int, BV: int, FP: int) -> TensorDescriptor:
    """S^T [.., V 2 f] as single halves [V, f], padded."""
    features = states.shape[-1] // width // 2
    return described(states.flatten(0, -2).unflatten(1, (width, 2, features)), (1, BV, 1, FP))


class Piece(NamedTuple):
    """Sums of some chunks: S^T of each from its run's beginning and of all before each run, z from the beginning."""

    start: int
    chunks: int
    run: int
    states: Tensor
    bases: Tensor
    sums: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.states, self.bases, self.sums


def turns_of(sets: Sets, chunk: int, sizes: Tensor | None = None) -> Tensor:
    """[B, Gs, N, C] positions of the tokens that turn linear with each chunk, -1 for none and after the last chunk of
    rows of ``sizes`` [B] tokens."""
    assert sets.left is not None
    batch, select, count, picks = sets.left.shape
    turns = torch.empty(batch, select, count, chunk, dtype=torch.int32, device=sets.left.device)
    turns_kernel[(count, batch * select)](
        sets.leave, sets.left, turns if sizes is None else sizes, turns, sets.leave.shape[2], count,
        GS=select, C=chunk, P=picks, FEW=power_of_two(picks, 2), SIZES=sizes is not None,
    )  # fmt: skip
    return turns


def lengths_of(x: Tensor) -> Tensor:
    """|x| [B, H, T] in fp32 of x [B, T, H, K]."""
    batch, time, heads, width = x.shape
    lengths = torch.empty(batch, heads, time, dtype=torch.float32, device=x.device)
    shape: dict[str, Any] = dict(H=heads, K=width, BK=power_of_two(width, 16), rows=32)
    lengths_kernel[(cdiv(time * heads, 32), batch)](x, lengths, time, *x.stride()[:3], **shape)
    return lengths


def pieces(
    x: Tensor, w: Tensor, values: Tensor, carry: tuple[Tensor, Tensor],
    *, count: int, chunk: int, norm: bool,
    turns: Tensor | None = None, weights: Tensor | None = None, setting: Launch | None = None,
) -> Iterator[Piece]:  # fmt: skip
    """Piece after piece of sums over x [B, T, Hx, K] and values [B, T, Hv, V] for maps w [H, K, f]; ``carry`` (S^T
    [B, H, V, 2 f], z [B, H, 2 f]; what they hold before counts for nothing) goes along and ends as the state behind the
    last chunk.

    Either of the tokens that turn linear with each chunk, ``turns``; or of all with their ``weights``, from the end."""
    (batch, time), device, heads, features, width = x.shape[:2], x.device, len(w), w.shape[2], values.shape[3]
    kind = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
    size = 2 * features * width
    run = max(1, -(-count * batch * heads // PROGRAMS))
    most = max(1, PIECE_BYTES // (batch * heads * size * kind.itemsize * run)) * run
    exact: dict[str, Any] = dict(dtype=torch.float32, device=device)
    lengths = lengths_of(x) if norm else carry[1]
    reverse = turns is None
    kernel = "selected_reverse" if reverse else "selected_states"
    options = fitted(setting or launch(kernel, device, **widths_of(x, values, w)), x, 1)
    if x.dtype == torch.float32:  # no matrix instructions: a program of few warps has far too few registers
        options["num_warps"] = 8
    constants: dict[str, Any] = dict(
        H=heads, HX=x.shape[2], HV=values.shape[2], HT=1 if turns is None else turns.shape[1],
        K=x.shape[3], V=width, F=features, C=chunk, NORM=norm, REVERSE=reverse,
        BK=block(x.shape[3]), BV=block(width), FP=block(features), **options,
    )  # fmt: skip
    of_w = matrices(w, constants["BK"], constants["FP"])
    few, many = cdiv(2 * features, 16), cdiv(size, 1024)
    starts = range(0, count, most)
    for number, start in enumerate(reversed(starts) if reverse else starts):
        chunks = min(most, count - start)
        runs = -(-chunks // run)
        states = torch.empty(batch, heads, chunks, size, dtype=kind, device=device)
        sums = torch.empty(batch, heads, chunks, 2 * features, **exact)
        # One run that is all has nothing before it, and ends as the state.
        alone = runs == 1 and chunks == count
        totals = carry[0] if alone else torch.empty(batch, heads, runs, size, **exact)
        states_kernel[(2 * heads, runs, batch)](
            x, of_w, values, carry[1] if turns is None else turns, lengths,
            carry[1] if weights is None else weights, states, sums, totals, time, count, start, chunks, run,
            *x.stride()[:3], *values.stride()[:3], **constants,
        )  # fmt: skip
        bases = states if alone else torch.empty_like(totals, dtype=kind)
        scans_kernel[(few + (0 if alone else many), batch * heads)](
            totals, bases, carry[0], sums, carry[1], runs, chunks, number,
            F2=2 * features, V=width, REVERSE=reverse,
        )  # fmt: skip
        yield Piece(start, chunks, run, states, bases, sums)
