"""Sums over the tokens before (or after) every tile of a row: what the joint kernels read in place of old keys.

    joint_states    S_n, z_n = sums of phi_k v^T and of phi_k over the tiles before tile n, one program a run of tiles
    joint_scan      what came before each run, where rows are cut into several

Sums are carried in fp32; S_n is stored in the dtype of k, z_n in fp32. One key map a query head; k and v are read per
key/value head. The same kernels make the reverse sums of the backward pass, over queries, from phi_q / den, dy and
e = dy . y (``triton_joint_backward.py``).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from .launches import Launch, cdiv, launch, power_of_two, widths_of
from .triton_common import softmax_of
from .triton_tiles import block, matrices, matrix, tile, tiles, whole

BT = 64  # tokens of a tile: one warp group's rows of a matrix instruction
PROGRAMS = 528  # enough to fill a large GPU twice over (132 multiprocessors, two programs each)


@triton.jit(do_not_specialize=["T", "stored", "run"])
def joint_states(
    x, w, val, inverse, e, S, Z, total_S, total_Z, stop, T, stored, run,
    V: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
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
    row = (tl.cast(b, tl.int64) * heads + h) * T
    out = (b * heads + h) * stored
    wT = matrix(w, h, BD, FP).T
    sign = 1.0 - 2.0 * half
    f, channel, token = tl.arange(0, FP), tl.arange(0, BV), tl.arange(0, BT)
    end = T
    if HAS_STOP:
        end = tl.load(stop + b).to(tl.int32)
    acc, z = tl.zeros([FP, BV], tl.float32), tl.zeros([FP], tl.float32)
    first = part * run
    last = tl.minimum(first + run, (T + BT - 1) // BT)
    if REVERSE:
        weight = weights_of(e + row, last - 1, T, BT)
    for i in range(first, last):
        n = i
        if REVERSE:
            n = first + last - 1 - i
        elif n % EVERY == 0:
            keep_sums(S, Z, acc, z, 2 * (out + n // EVERY) + half, F, FP, BV)
        xT = tile(x, b, n * BT, h // GROUP, BT, BD).T
        values = tile(val, b, n * BT, h // GROUP, BT, BV)
        live = n * BT + token < end
        if HAS_STOP:  # what comes after it may be anything
            values = tl.where(live[:, None], values, 0.0)
        phi = softmax_of(sign * tl.dot(wT, xT, input_precision=PRECISION), 0, F)
        if REVERSE:
            phi *= tl.load(inverse + row + n * BT + token, mask=live, other=0.0)[None, :]
            z += tl.sum(phi * weight[None, :], 1)
            weight = weights_of(e + row, n - 1, T, BT)  # of the next tile, long before it is read
        else:
            phi = tl.where(live[None, :], phi, 0.0)
            z += tl.sum(phi, 1)
        acc = tl.dot(phi.to(values.dtype), values, acc, input_precision=PRECISION)
        if REVERSE and n % EVERY == 0:
            keep_sums(S, Z, acc, z, 2 * (out + n // EVERY) + half, F, FP, BV)
    if TOTALS:
        at = (tl.cast(b, tl.int64) * heads + h) * runs + part
        place = half * F * V + f[:, None] * V + channel[None, :]
        tl.store(total_S + at * 2 * F * V + place, acc, mask=(f < F)[:, None] & (channel < V)[None, :])
        tl.store(total_Z + at * 2 * F + half * F + f, z, mask=f < F)


@triton.jit
def weights_of(e, n, T, BT: tl.constexpr):
    token = n * BT + tl.arange(0, BT)
    return tl.load(e + token, mask=(token >= 0) & (token < T), other=0.0)


@triton.jit
def keep_sums(S, Z, acc, z, at, F: tl.constexpr, FP: tl.constexpr, BV: tl.constexpr):
    """Store one half's sums, acc [FP, BV] and z [FP], as number ``at``."""
    f = tl.arange(0, FP)
    S.store([at, 0, 0], acc.to(S.dtype).reshape(1, FP, BV))
    tl.store(Z + tl.cast(at, tl.int64) * F + f, z, mask=f < F)


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
def half_from_z(phi, half, Z, at, base_Z, base, HAS_BASE: tl.constexpr, F: tl.constexpr, FP: tl.constexpr):
    """phi z [tokens] of one half of the features [tokens, F]."""
    f = tl.arange(0, FP)
    z = tl.load(Z + (2 * at + half) * F + f, mask=f < F, other=0.0)
    if HAS_BASE:
        z += tl.load(base_Z + (2 * base + half) * F + f, mask=f < F, other=0.0)
    return tl.sum(phi * z[None, :], 1)


@triton.jit
def add_half(
    acc, phi, half, S, at, base_S, base, HAS_BASE: tl.constexpr, FP: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [tokens, BV] with the sums read by one half of the features [tokens, F]."""
    acc = tl.dot(phi, matrix(S, 2 * at + half, FP, BV), acc, input_precision=PRECISION)
    if HAS_BASE:
        acc = tl.dot(phi, matrix(base_S, 2 * base + half, FP, BV), acc, input_precision=PRECISION)
    return acc


@triton.jit
def half_gradient(
    x, weight, half, S, Z, at, base_S, base_Z, base,
    HAS_BASE: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x S^T - weight z, the gradient of one half of the features [tokens, F]; x [tokens, BV], weight [tokens]."""
    f = tl.arange(0, FP)
    at, base = 2 * at + half, 2 * base + half
    z = tl.load(Z + tl.cast(at, tl.int64) * F + f, mask=f < F, other=0.0)
    if HAS_BASE:
        z += tl.load(base_Z + tl.cast(base, tl.int64) * F + f, mask=f < F, other=0.0)
    # What is subtracted comes first: z is not held while the products are made.
    d = tl.dot(x, matrix(S, at, FP, BV).T, -weight[:, None] * z[None, :], input_precision=PRECISION)
    if HAS_BASE:
        d = tl.dot(x, matrix(base_S, base, FP, BV).T, d, input_precision=PRECISION)
    return d


class Sums(NamedTuple):
    """Stored sums of a pass: within each run of tiles, and of everything before (or after) each run."""

    S: Tensor
    """[B, H, stored, 2, F, V], both halves of the features, V up to whole 16 bytes."""
    Z: Tensor
    """[B, H, stored, 2 F] fp32."""
    base_S: Tensor | None
    """[B, H, runs, 2, F, V]; None where each row is one run."""
    base_Z: Tensor | None
    run: int
    """Tiles of a run."""
    every: int
    """Tiles between two stored sums."""
    final: tuple[Tensor, Tensor] | None = None
    """(S, z) fp32 of everything."""


class Read(NamedTuple):
    """Sums as kernels are given them."""

    tensors: tuple[Any, ...]
    """S, Z, base_S, base_Z."""
    places: tuple[int, int, int]
    """stored, run, runs."""
    options: dict[str, Any]

    @property
    def suffix(self) -> str:
        """Of the launch settings: of kernels that are smaller where no tile is mixed."""
        return "" if self.options["MIXED"] else "_terraced"


def read_by(sums: Sums, shape: dict[str, Any], window: int | None, terraced: bool) -> Read:
    """``shape`` are the compile-time widths of the kernel. MIXED: a tile may lie in the windows of some rows of another
    and not of all, or between them and the sums."""
    S, has_base = matrices(sums.S, shape["FP"], shape["BV"]), sums.base_S is not None
    base_S = S if sums.base_S is None else matrices(sums.base_S, shape["FP"], shape["BV"])
    places = sums.S.shape[2], sums.run, 1 if sums.base_S is None else sums.base_S.shape[2]
    tensors = S, sums.Z, base_S, sums.Z if sums.base_Z is None else sums.base_Z
    mixed = not (terraced and window and window % BT == 0 and sums.every == 1)
    return Read(tensors, places, {"EVERY": sums.every, "HAS_BASE": has_base, "MIXED": mixed})


def of_type(setting: Launch, x: Tensor) -> dict[str, Any]:
    """The options of a launch; registers are capped for 16-bit inputs alone."""
    options = setting.options
    if x.dtype == torch.float32:
        options.pop("maxnreg", None)
    return options


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
        "FP": block(w.shape[-1]),
        "BD": block(key),
        "BV": block(value),
        "PRECISION": precision_of(x),
    }


def last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def joint_sums(
    x: Tensor,
    w: Tensor,
    val: Tensor,
    *,
    reverse: tuple[Tensor, Tensor] | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    stop: Tensor | None = None,
    final: bool = False,
) -> Sums:
    """Sums of phi(x) val^T and of phi(x) before every tile; with ``reverse``, 1 / den and e [B, H, T], those of
    phi(x) / den val^T and of e phi(x) / den after it.

    x [B, T, G or H, K], w [H, K, f], val [B, T, G or H, V]; state (S [B, H, F, V], z [B, H, F]) comes before index 0;
    ``stop`` [B]: tokens from there on count for nothing.
    """
    setting = launch("joint_states", x.device, **widths_of(x, val, w))
    batch, time, shape = x.shape[0], x.shape[1], widths(x, val, w)
    heads, half = len(w), w.shape[-1]
    every = setting.blocks["EVERY"]
    tiles_a_row = cdiv(time, BT)
    runs = max(1, min(cdiv(PROGRAMS, 2 * batch * heads), cdiv(tiles_a_row, 8)))
    run = cdiv(cdiv(tiles_a_row, runs), every) * every
    runs, stored = cdiv(tiles_a_row, run), cdiv(tiles_a_row, every)
    exact: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    dim = whole(val.shape[-1], x.dtype)
    S = torch.empty(batch, heads, stored, 2, half, dim, dtype=x.dtype, device=x.device)
    Z = torch.empty(batch, heads, stored, 2 * half, **exact)
    totals = runs > 1 or final
    total_S = torch.empty(batch, heads, runs, 2, half, dim, **exact) if totals else S
    total_Z = torch.empty(batch, heads, runs, 2 * half, **exact) if totals else Z
    without_keys = {name: value for name, value in shape.items() if name != "D"}
    joint_states[(2 * heads, runs, batch)](
        tiles(x, BT), matrices(w, shape["BD"], shape["FP"]), tiles(val, BT),
        *((Z, Z) if reverse is None else reverse),
        matrices(S, shape["FP"], shape["BV"]), Z, total_S, total_Z, Z if stop is None else stop,
        time, stored, run,
        **(without_keys | {"V": dim}), BT=BT, GROUP=heads // x.shape[2], REVERSE=reverse is not None,
        HAS_STOP=stop is not None, TOTALS=totals, **of_type(setting, x),
    )  # fmt: skip
    if runs == 1 and state is None:
        done = _as_state(total_S[:, :, 0], total_Z[:, :, 0], val) if final else None
        return Sums(S, Z, None, None, run, every, done)
    before = None if state is None else (_as_sums(state[0].float(), half, dim), state[1].float())
    if not totals:  # one run after a state: nothing is summed before it but the state
        assert before is not None
        return Sums(S, Z, before[0].to(x.dtype)[:, :, None], before[1][:, :, None].contiguous(), run, every)
    parts = []
    for i, (total, dtype) in enumerate(((total_S, x.dtype), (total_Z, torch.float32))):
        base = torch.empty(total.shape, dtype=dtype, device=x.device)
        end = torch.empty(total[:, :, 0].shape, **exact)
        count = total[0, 0, 0].numel()
        size = min(512, power_of_two(count))
        joint_scan[(batch * heads, cdiv(count, size))](
            total, base, end if before is None else before[i].contiguous(), end, runs, N=count, BN=size,
            HAS_START=before is not None, HAS_FINAL=final, REVERSE=reverse is not None, num_warps=4,
        )  # fmt: skip
        parts.append((base, end))
    done = _as_state(parts[0][1], parts[1][1], val) if final else None
    return Sums(S, Z, parts[0][0], parts[1][0], run, every, done)


def _as_state(S: Tensor, z: Tensor, val: Tensor) -> tuple[Tensor, Tensor]:
    """(S [B, H, 2 F, V], z [B, H, 2 F]) of sums [B, H, 2, F, .]."""
    return S.flatten(2, 3)[..., : val.shape[-1]], z


def _as_sums(S: Tensor, half: int, dim: int) -> Tensor:
    """[B, H, 2, F, dim] of a state's S [B, H, 2 F, V]."""
    return functional.pad(S, (0, dim - S.shape[-1])).unflatten(2, (2, half)).contiguous()
