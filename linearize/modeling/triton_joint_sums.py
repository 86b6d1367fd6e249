"""Sums over the tokens before (or after) every tile of a row: what the joint kernels read in place of old keys.

    joint_states    S_n, z_n = sums of phi_k v^T and of phi_k over the tiles before tile n, one program a run of tiles
    joint_scan      what came before each run, where rows are cut into several

Sums are carried in fp32; S_n is stored in the dtype of k, z_n in fp32. One key map a query head; k and v are read per
key/value head. The same kernels make the reverse sums of the backward pass, over queries, from phi_q, u = dy / den and
e = (dy . y) / den (``triton_joint_backward.py``).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import Launch, launch, widths_of
from .triton_common import load_columns, load_matrix, load_rows, load_transposed, softmax_of

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


@triton.jit
def sums_gradient(
    d_plus, d_minus, x, weight, S, at, z,
    F: tl.constexpr, FP: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The features' gradients [tokens, F] with x S^T - weight z of the sums number ``at``; x [tokens, BV]."""
    f = tl.arange(0, FP)
    plus = load_transposed(S + at * 2 * F * V, F, V, FP, BV)
    d_plus = tl.dot(x, plus, d_plus, input_precision=PRECISION)
    minus = load_transposed(S + at * 2 * F * V + F * V, F, V, FP, BV)
    d_minus = tl.dot(x, minus, d_minus, input_precision=PRECISION)
    d_plus -= weight[:, None] * tl.load(z + at * 2 * F + f, mask=f < F, other=0.0)[None, :]
    return d_plus, d_minus - weight[:, None] * tl.load(z + at * 2 * F + F + f, mask=f < F, other=0.0)[None, :]


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
    setting = setting or launch("joint_states", x.device, **widths_of(x, val, w))
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
