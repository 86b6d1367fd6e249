"""The forward kernels of LoLCATs and of linear attention: y of whole rows in O(T), and the sums that decoding needs.

The function is ``mapped_reference`` of ``mapped.py``: a softmax window and Hedgehog-mapped linear attention under one
normaliser (arXiv 2410.10254, eq. 7), the row's window maximum being part of it. With tiles of BT tokens,

    joint_states    S_n, z_n = sums of phi_k v^T and of phi_k over the tiles before tile n, one program a run of tiles
    joint_scan      what came before each run, where rows are cut into several
    joint_outputs   y of a tile: its window, then S of the tiles that are linear for all of it, then what lies between

Features, scores and weights live in registers only. Sums are carried in fp32; S_n is stored in the dtype of k, z_n in
fp32. One key map a query head; k and v are read per key/value head. ``joint_states`` also makes the reverse sums
of the backward pass, over queries, from phi_q, u = dy / den and e = (dy . y) / den.

No clamp of features at 1e-12: below 1e-9 of their sum they add nothing that fp32 could show.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import Launch, launch
from .triton_common import (
    LOG2E,
    first_in_window,
    hedgehog_rows,
    in_window,
    load_columns,
    load_matrix,
    load_rows,
    load_transposed,
    softmax_of,
    store_rows,
)

BT = 64  # tokens of a tile: one warp group's rows of a matrix instruction
PROGRAMS = 528  # enough to fill a large GPU twice over (132 multiprocessors, two programs each)


@triton.jit(do_not_specialize=["T", "stored", "run"])
def joint_states(
    x, w, val, den, e, S, Z, total_S, total_Z, stop,
    xb, xt, xh, vb, vt, vh, T, stored, run,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr, EVERY: tl.constexpr, REVERSE: tl.constexpr, HAS_STOP: tl.constexpr,
    TOTALS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S [B, H, stored, 2F, V] and Z [B, H, stored, 2F] before every EVERY-th tile of a run of ``run`` tiles; after it
    and to the run's end with REVERSE, where x is q, val dy. Totals of the run: [B, H, runs, 2F, V] fp32.

    A program makes one half of the features: both halves' sums would not fit into registers.
    """
    half, part, b = tl.program_id(0) % 2, tl.program_id(1), tl.program_id(2)
    h, heads, runs = tl.program_id(0) // 2, tl.num_programs(0) // 2, tl.num_programs(1)
    x += tl.cast(b, tl.int64) * xb + tl.cast(h // GROUP, tl.int64) * xh
    val += tl.cast(b, tl.int64) * vb + tl.cast(h // GROUP, tl.int64) * vh
    row = (tl.cast(b, tl.int64) * heads + h) * T
    out = (tl.cast(b, tl.int64) * heads + h) * stored
    w = load_transposed(w + h * D * F, D, F, BD, FP)
    sign = 1.0 - 2.0 * half
    f, channel, token = tl.arange(0, FP), tl.arange(0, BV), tl.arange(0, BT)
    end = T
    if HAS_STOP:
        end = tl.load(stop + b).to(tl.int32)
    acc, z = tl.zeros([FP, BV], tl.float32), tl.zeros([FP], tl.float32)
    place = half * F * V + f[:, None] * V + channel[None, :]
    inside = (f < F)[:, None] & (channel < V)[None, :]
    first = part * run
    last = tl.minimum(first + run, (T + BT - 1) // BT)
    for i in range(first, last):
        n = i
        if REVERSE:
            n = first + last - 1 - i
        elif n % EVERY == 0:
            at = out + n // EVERY
            tl.store(S + at * 2 * F * V + place, acc.to(S.dtype.element_ty), mask=inside)
            tl.store(Z + at * 2 * F + half * F + f, z, mask=f < F)
        xT = load_columns(x, n * BT, xt, end, D, BD, BT)
        values = load_rows(val, n * BT, vt, end, V, BV, BT)
        live = n * BT + token < end
        phi = softmax_of(sign * tl.dot(w, xT, input_precision=PRECISION), 0, F)
        if REVERSE:
            weight = tl.load(e + row + n * BT + token, mask=live, other=0.0)
            z += tl.sum(phi * weight[None, :], 1)
            phi *= (1.0 / tl.load(den + row + n * BT + token, mask=live, other=1.0))[None, :]
        else:
            phi = tl.where(live[None, :], phi, 0.0)
            z += tl.sum(phi, 1)
        acc = tl.dot(phi.to(values.dtype), values, acc, input_precision=PRECISION)
        if REVERSE and n % EVERY == 0:
            at = out + n // EVERY
            tl.store(S + at * 2 * F * V + place, acc.to(S.dtype.element_ty), mask=inside)
            tl.store(Z + at * 2 * F + half * F + f, z, mask=f < F)
    if TOTALS:
        at = (tl.cast(b, tl.int64) * heads + h) * runs + part
        tl.store(total_S + at * 2 * F * V + place, acc, mask=inside)
        tl.store(total_Z + at * 2 * F + half * F + f, z, mask=f < F)


@triton.jit(do_not_specialize=["runs"])
def joint_scan(
    total, base, start, final, runs, N: tl.constexpr, BN: tl.constexpr,
    HAS_START: tl.constexpr, HAS_FINAL: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """base [rows, runs, N]: ``start`` and the totals of the runs before each one (after it with REVERSE)."""
    row, i = tl.cast(tl.program_id(0), tl.int64), tl.program_id(1) * BN + tl.arange(0, BN)
    mask = i < N
    carried = tl.zeros([BN], tl.float32)
    if HAS_START:
        carried += tl.load(start + row * N + i, mask=mask, other=0.0)
    for s in range(runs):
        at = (row * runs + (runs - 1 - s if REVERSE else s)) * N + i
        tl.store(base + at, carried.to(base.dtype.element_ty), mask=mask)
        carried += tl.load(total + at, mask=mask, other=0.0)
    if HAS_FINAL:
        tl.store(final + row * N + i, carried, mask=mask)


@triton.jit
def add_sums(
    acc, plus, minus, S, at,
    F: tl.constexpr, FP: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [tokens, BV] with the sums number ``at`` read by features [tokens, F]."""
    acc = tl.dot(plus, load_matrix(S + at * 2 * F * V, F, V, FP, BV), acc, input_precision=PRECISION)
    rest = load_matrix(S + at * 2 * F * V + F * V, F, V, FP, BV)
    return tl.dot(minus, rest, acc, input_precision=PRECISION)


@triton.jit
def from_z(plus, minus, Z, at, base_Z, base, HAS_BASE: tl.constexpr, F: tl.constexpr, FP: tl.constexpr):
    """phi z [tokens] of features [tokens, F]."""
    f = tl.arange(0, FP)
    z_plus = tl.load(Z + at * 2 * F + f, mask=f < F, other=0.0)
    z_minus = tl.load(Z + at * 2 * F + F + f, mask=f < F, other=0.0)
    if HAS_BASE:
        z_plus += tl.load(base_Z + base * 2 * F + f, mask=f < F, other=0.0)
        z_minus += tl.load(base_Z + base * 2 * F + F + f, mask=f < F, other=0.0)
    return tl.sum(plus * z_plus[None, :], 1) + tl.sum(minus * z_minus[None, :], 1)


@triton.jit(do_not_specialize=["T", "stored", "run", "runs"])
def joint_outputs(
    q, k, v, w_q, w_k, g, beta, S, Z, base_S, base_Z, teacher, lengths, y, den, peak, e, loss,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, tb, tt, th, T, stored, run, runs, scale,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr, EVERY: tl.constexpr, W: tl.constexpr, TERRACED: tl.constexpr, HAS_BASE: tl.constexpr,
    HAS_BETA: tl.constexpr, SAVE: tl.constexpr, TRANSFER: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [B, T, H, V] of one tile of one head; SAVE: also den and peak [B, H, T], the row's window maximum in log2.

    TRANSFER: y is y - teacher instead, zero past a row's length, with e = (y - teacher) . y / den [B, H, T] and
    loss [2, programs], the sums of squares of y - teacher and of teacher.
    """
    h, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(0)
    b64, group = tl.cast(b, tl.int64), tl.cast(h // GROUP, tl.int64)
    q += b64 * qb + tl.cast(h, tl.int64) * qh
    k += b64 * kb + group * kh
    v += b64 * vb + group * vh
    token, near = tl.arange(0, BT), tl.arange(0, BK)
    i0 = n * BT
    query = i0 + token
    rows = load_rows(q, i0, qt, T, D, BD, BT)
    w = load_matrix(w_q + h * D * F, D, F, BD, FP)
    edge = tl.minimum(first_in_window(i0, W, TERRACED), i0) // BT // EVERY  # the sums of whole linear tiles
    at = (b64 * heads + h) * stored + edge
    base = (b64 * heads + h) * runs + edge * EVERY // run
    acc, mass = tl.zeros([BT, BV], tl.float32), tl.zeros([BT], tl.float32)
    top = tl.full([BT], float("-inf"), tl.float32)
    if W > 0:  # first: its maximum rescales what was summed before, and the linear terms must not be
        top = tl.full([BT], -1e30, tl.float32)
        for j0 in range(first_in_window(i0, W, TERRACED) // BK * BK, tl.minimum(i0 + BT, T), BK):
            kT = load_columns(k, j0, kt, T, D, BD, BK)
            values = load_rows(v, j0, vt, T, V, BV, BK)
            seen = in_window(query[:, None], (j0 + near)[None, :], W, TERRACED)
            scores = tl.where(seen, tl.dot(rows, kT, input_precision=PRECISION) * (scale * LOG2E), -1e30)
            higher = tl.maximum(top, tl.max(scores, 1))
            p = tl.where(seen, tl.exp2(scores - higher[:, None]), 0.0)
            shrink = tl.exp2(top - higher)
            mass = mass * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None] + tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
            top = higher
        factor = tl.load(g + h)
        acc, mass = acc * factor, mass * factor
    plus, minus = hedgehog_rows(tl.dot(rows, w, input_precision=PRECISION), F)
    if HAS_BETA:
        plus, minus = plus * tl.load(beta + h), minus * tl.load(beta + h)
    mass += from_z(plus, minus, Z, at, base_Z, base, HAS_BASE, F, FP)
    plus, minus = plus.to(rows.dtype), minus.to(rows.dtype)
    acc = add_sums(acc, plus, minus, S, at, F, FP, V, BV, PRECISION)
    if HAS_BASE:
        acc = add_sums(acc, plus, minus, base_S, base, F, FP, V, BV, PRECISION)
    # What lies between those tiles and the windows of the last rows.
    newest = first_in_window(tl.minimum(i0 + BT, T) - 1, W, TERRACED)
    wT = load_transposed(w_k + h * D * F, D, F, BD, FP)
    for j0 in range(edge * EVERY * BT, newest, BK):
        kT = load_columns(k, j0, kt, T, D, BD, BK)
        values = load_rows(v, j0, vt, T, V, BV, BK)
        logits = tl.dot(wT, kT, input_precision=PRECISION)
        a = tl.dot(plus, softmax_of(logits, 0, F).to(rows.dtype), input_precision=PRECISION)
        a = tl.dot(minus, softmax_of(-logits, 0, F).to(rows.dtype), a, input_precision=PRECISION)
        key = (j0 + near)[None, :]
        a = tl.where((key <= query[:, None]) & (key < first_in_window(query, W, TERRACED)[:, None]), a, 0.0)
        mass += tl.sum(a, 1)
        acc += tl.dot(a.to(values.dtype), values, input_precision=PRECISION)
    if W == 0:
        mass += 1e-12
    result = acc / mass[:, None]
    line = (b64 * heads + h) * T
    if SAVE:
        tl.store(den + line + query, mass, mask=query < T)
        tl.store(peak + line + query, top, mask=query < T)
    if TRANSFER:
        target = load_rows(teacher + b64 * tb + tl.cast(h, tl.int64) * th, i0, tt, T, V, BV, BT).to(
            tl.float32
        )
        real = query < T
        if HAS_LENGTHS:
            real = query < tl.load(lengths + b)
        target = tl.where(real[:, None], target, 0.0)
        gap = tl.where(real[:, None], result - target, 0.0)
        tl.store(e + line + query, tl.sum(gap * result, 1) / mass, mask=query < T)
        program = (b64 * tl.num_programs(1) + n) * heads + h
        programs = tl.cast(tl.num_programs(2), tl.int64) * tl.num_programs(1) * heads
        tl.store(loss + program, tl.sum(tl.sum(gap * gap, 1), 0))
        tl.store(loss + programs + program, tl.sum(tl.sum(target * target, 1), 0))
        result = gap
    store_rows(y + (b64 * T * heads + h) * V, result, i0, heads * V, T, V, BV, BT)


class Sums(NamedTuple):
    """Stored sums of a pass: within each run of tiles, and of everything before (or after) each run."""

    S: Tensor
    """[B, H, stored, F, V], F both halves."""
    Z: Tensor
    """[B, H, stored, F] fp32."""
    base_S: Tensor | None
    """[B, H, runs, F, V]; None where each row is one run."""
    base_Z: Tensor | None
    run: int
    """Tiles of a run."""
    every: int
    """Tiles between two stored sums."""
    final: tuple[Tensor, Tensor] | None = None
    """(S, z) fp32 of everything."""


class Forward(NamedTuple):
    y: Tensor
    """[B, T, H, V]; with a teacher y - teacher."""
    den: Tensor | None
    peak: Tensor | None
    """[B, H, T] fp32."""
    e: Tensor | None
    loss: Tensor | None
    """[2]: the sums of (y - teacher)^2 and of teacher^2."""
    sums: Sums


def precision_of(x: Tensor) -> str:
    """How fp32 products are formed: exactly where Triton is interpreted, by three TF32 products on a GPU."""
    return "tf32x3" if x.is_cuda and x.dtype == torch.float32 else "ieee"


def widths(x: Tensor, v: Tensor, w: Tensor) -> dict[str, Any]:
    """Compile-time widths of q or k [.., K], v [.., V] and a map [H, K, f]."""
    key, value = x.shape[-1], v.shape[-1]
    return {
        "D": key,
        "V": value,
        "F": w.shape[-1],
        "FP": features_padded(x, w),
        "BD": max(16, triton.next_power_of_2(key)),
        "BV": max(16, triton.next_power_of_2(value)),
        "PRECISION": precision_of(x),
    }


def features_padded(x: Tensor, w: Tensor) -> int:
    """Channels of half a map as programs hold them. Beside heads of 128 no fewer than a matrix instruction's 64 rows:
    Triton 3.6 was seen to compile fewer wrongly there."""
    return 64 if x.shape[-1] > 64 else max(16, triton.next_power_of_2(w.shape[-1]))


def last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(x: Tensor) -> tuple[int, int, int]:
    """Steps of batch, time and head of x [B, T, heads, D]."""
    return x.stride(0), x.stride(1), x.stride(2)


def joint_sums(
    x: Tensor,
    w: Tensor,
    val: Tensor,
    *,
    reverse: tuple[Tensor, Tensor] | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    stop: Tensor | None = None,
    final: bool = False,
    setting: Launch | None = None,
) -> Sums:
    """Sums of phi(x) val^T and of phi(x) before every tile; with ``reverse`` (den, e), after it, of queries.

    x [B, T, G or H, K], w [H, K, f], val [B, T, G or H, V]; state (S [B, H, F, V], z [B, H, F]) comes before index 0;
    ``stop`` [B]: tokens from there on count for nothing.
    """
    setting = setting or launch("joint_states", x.device)
    batch, time, shape = x.shape[0], x.shape[1], widths(x, val, w)
    heads, half, dim = len(w), w.shape[-1], val.shape[-1]
    every = setting.blocks["EVERY"]
    tiles = triton.cdiv(time, BT)
    runs = max(1, min(triton.cdiv(PROGRAMS, 2 * batch * heads), triton.cdiv(tiles, 8)))
    run = triton.cdiv(triton.cdiv(tiles, runs), every) * every
    runs, stored = triton.cdiv(tiles, run), triton.cdiv(tiles, every)
    exact: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    S = torch.empty(batch, heads, stored, 2 * half, dim, dtype=x.dtype, device=x.device)
    Z = torch.empty(batch, heads, stored, 2 * half, **exact)
    totals = runs > 1 or final
    total_S = torch.empty(batch, heads, runs, 2 * half, dim, **exact) if totals else S
    total_Z = torch.empty(batch, heads, runs, 2 * half, **exact) if totals else Z
    den, e = reverse or (Z, Z)
    joint_states[(2 * heads, runs, batch)](
        x, w, val, den, e, S, Z, total_S, total_Z, Z if stop is None else stop,
        *strides(x), *strides(val), time, stored, run,
        **shape, BT=BT, GROUP=heads // x.shape[2], EVERY=every, REVERSE=reverse is not None,
        HAS_STOP=stop is not None, TOTALS=totals, num_warps=setting.warps, num_stages=setting.stages,
    )  # fmt: skip
    if runs == 1 and state is None:
        done = (total_S[:, :, 0], total_Z[:, :, 0]) if final else None
        return Sums(S, Z, None, None, run, every, done)
    if not totals:  # one run after a state: nothing is summed before it but the state
        return Sums(
            S, Z, state[0].to(x.dtype)[:, :, None].contiguous(), state[1].float()[:, :, None], run, every
        )
    parts = []
    for total, dtype, begin in (
        (total_S, x.dtype, None if state is None else state[0]),
        (total_Z, torch.float32, None if state is None else state[1]),
    ):
        base = torch.empty(total.shape, dtype=dtype, device=x.device)
        end = torch.empty(total[:, :, 0].shape, **exact)
        begin = None if begin is None else begin.float().contiguous()
        count = total[0, 0, 0].numel()
        size = min(512, triton.next_power_of_2(count))
        joint_scan[(batch * heads, triton.cdiv(count, size))](
            total, base, end if begin is None else begin, end, runs, N=count, BN=size,
            HAS_START=begin is not None, HAS_FINAL=final, REVERSE=reverse is not None, num_warps=4,
        )  # fmt: skip
        parts.append((base, end))
    done = (parts[0][1], parts[1][1]) if final else None
    return Sums(S, Z, parts[0][0], parts[1][0], run, every, done)


def joint_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    g: Tensor,
    beta: Tensor | None,
    *,
    scale: float,
    window: int | None,
    terraced: bool,
    state: tuple[Tensor, Tensor] | None = None,
    stop: Tensor | None = None,
    final: bool = False,
    save: bool = False,
    teacher: Tensor | None = None,
    lengths: Tensor | None = None,
    settings: dict[str, Launch] | None = None,
) -> Forward:
    """The forward pass; q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], maps [H, K, f] in the dtype of q, g and beta
    [H] fp32, teacher [B, T, H, V], lengths and stop [B]."""
    settings = settings or {}
    setting = settings.get("joint_outputs") or launch("joint_outputs", q.device)
    sums = joint_sums(k, w_k, v, state=state, stop=stop, final=final, setting=settings.get("joint_states"))
    batch, time, heads = q.shape[:3]
    tiles, transfer = triton.cdiv(time, BT), teacher is not None
    exact: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    y = torch.empty(batch, time, heads, v.shape[-1], dtype=v.dtype, device=q.device)
    den = torch.empty(batch, heads, time, **exact) if save else None
    peak = torch.empty(batch, heads, time, **exact) if save else None
    e = torch.empty(batch, heads, time, **exact) if transfer else None
    loss = torch.empty(2, batch * tiles * heads, **exact) if transfer else None
    # An argument that a variant does not read still has to be a tensor: `g` stands in.
    joint_outputs[(heads, tiles, batch)](
        q, k, v, w_q, w_k, g, g if beta is None else beta, sums.S, sums.Z,
        g if sums.base_S is None else sums.base_S, g if sums.base_Z is None else sums.base_Z,
        g if teacher is None else teacher, g if lengths is None else lengths, y,
        g if den is None else den, g if peak is None else peak, g if e is None else e, g if loss is None else loss,
        *strides(q), *strides(k), *strides(v), *((0, 0, 0) if teacher is None else strides(teacher)),
        time, sums.S.shape[2], sums.run, 1 if sums.base_S is None else sums.base_S.shape[2], scale,
        **widths(q, v, w_q), BT=BT, GROUP=heads // k.shape[2], EVERY=sums.every, W=window or 0, TERRACED=terraced,
        HAS_BASE=sums.base_S is not None, HAS_BETA=beta is not None and bool(window), SAVE=save, TRANSFER=transfer,
        HAS_LENGTHS=lengths is not None, **setting.options,
    )  # fmt: skip
    return Forward(y, den, peak, e, None if loss is None else loss.sum(1), sums)
