"""Softmax over the local span and a kept set: ``selection.kept_chunked`` on a GPU, forward (the backward pass is in
``triton_selected_kept_backward.py``).

    y_t = softmax over { j <= t : c(j) >= c(t) - 1 } and the kept set of c(t) of  scale q_t . k_j, times v

One program takes the C queries of a chunk for some heads of a group: they share the kept set, so that its rows of k and
v, gathered by index, are read once for all of them. The kept tokens and then the local span are one list of keys; every
query meets itself last, which washes out what an empty slot left in a running maximum.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import Launch, cdiv, launch, power_of_two, widths_of
from .triton_selected import Sets, running_sets
from .triton_together import compiled_together

LOG2E = 1.4426950408889634
MASKED = tl.constexpr(-1e30)
TAIL = 16


@triton.jit
def rows_at(x, index, stride, there, D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``index`` [n] of x [T, D]: [n, BLOCK], zeros where ``there`` is false."""
    column = tl.arange(0, BLOCK)
    mask = there[:, None] if D == BLOCK else there[:, None] & (column < D)[None, :]
    return tl.load(x + index.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def position_of(index, j, filled, older, stop):
    """Positions of the j-th keys of a chunk: its ``filled`` kept ones, then its local span from ``older`` on; -1 for
    none. What is kept is older than every query of the chunk, so that one comparison serves as the causal mask."""
    kept = tl.load(index + j, mask=j < filled, other=-1)
    return tl.where(j < filled, kept, tl.where(j < stop, older + j - filled, -1))


@triton.jit
def attend(
    q, k, v, at, t, m, total, y, k_t, v_t, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The keys at positions ``at`` in an online softmax of queries at ``t``; scores are in powers of two."""
    keys, values = rows_at(k, at, k_t, at >= 0, K, BK), rows_at(v, at, v_t, at >= 0, V, BV)
    s = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
    s = tl.where((at >= 0)[None, :] & (at[None, :] <= t[:, None]), s, MASKED)
    new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - new[:, None])
    shrink = tl.exp2(m - new)
    total = total * shrink + tl.sum(p, 1)
    y = tl.dot(p.to(v.dtype.element_ty), values, y * shrink[:, None], input_precision="ieee")
    return new, total, y


@triton.jit(do_not_specialize=["time", "n", "odd"])
def kept_forward_kernel(
    q, k, v, index, y, lse, time, n, odd, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, TAIL: tl.constexpr, heads: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    """y [B, T, H, V] and lse [B, H, T] (of scores in powers of two); grid (G x head blocks, N, B)."""
    parts: tl.constexpr = (R + heads - 1) // heads
    g, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    c, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    r = tl.arange(0, heads * C)
    inner, t = part * heads + r // C, c * C + r % C
    head, live = g * R + inner, (inner < R) & (t < time)
    k += b * k_b + g * k_h
    v += b * v_b + g * v_h
    column = tl.arange(0, BK)
    row = q + b * q_b + (t.to(tl.int64) * q_t + head * q_h)[:, None]
    mask = live[:, None] if K == BK else live[:, None] & (column < K)[None, :]
    queries = tl.load(row + column[None, :], mask=mask, other=0.0)
    index += ((b * G + g) * tl.num_programs(1) + c) * n

    m = tl.full([heads * C], MASKED, tl.float32)
    total = tl.zeros([heads * C], tl.float32)
    acc = tl.zeros([heads * C, BV], tl.float32)
    filled = tl.minimum(n, tl.maximum(c - 1, 0) * C)
    older = tl.maximum(c - 1, 0) * C
    stop = filled + tl.minimum((c + 1) * C, time) - older
    first = tl.minimum(filled, odd)
    if TAIL > 0:
        odd_ones = position_of(index, tl.arange(0, TAIL), first, older, 0)
        m, total, acc = attend(queries, k, v, odd_ones, t, m, total, acc, k_t, v_t, scale, K, V, BK, BV)
    for start in range(first, stop, keys):
        at = position_of(index, start + tl.arange(0, keys), filled, older, stop)
        m, total, acc = attend(queries, k, v, at, t, m, total, acc, k_t, v_t, scale, K, V, BK, BV)

    H: tl.constexpr = G * R
    column = tl.arange(0, BV)
    mask = live[:, None] if V == BV else live[:, None] & (column < V)[None, :]
    place = (b * time + t) * H + head
    tl.store(
        y + place[:, None] * V + column[None, :], (acc / total[:, None]).to(y.dtype.element_ty), mask=mask
    )
    tl.store(lse + (b * H + head) * time + t, m + tl.log2(total), mask=live)


def shape_of(q: Tensor, k: Tensor, v: Tensor, **more: int) -> dict[str, Any]:
    """The compile-time constants of a call: its widths, and others."""
    groups, key, value = k.shape[2], k.shape[3], v.shape[3]
    return dict(
        G=groups,
        R=q.shape[2] // groups,
        K=key,
        V=value,
        BK=power_of_two(key, 16),
        BV=power_of_two(value, 16),
        **more,
    )


def strides_of(**tensors: Tensor) -> dict[str, Any]:
    """Batch, time and head strides of tensors [B, T, H, D], by the names that kernels give them."""
    return {f"{name}_{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate("bth")}


def fitted(setting: Launch, q: Tensor, per_group: int) -> dict[str, Any]:
    """Launch options with no more heads than a group has; fp32 takes twice the room, and gets half the tile."""
    options = setting.options
    if "heads" in options:
        heads = 1 if q.dtype == torch.float32 else options["heads"]
        options["heads"] = min(heads, power_of_two(per_group))
    if q.dtype == torch.float32:
        options["num_stages"] = 1
    return options


def odd_slots(n: int, keys: int) -> tuple[int, int]:
    """(how many of n slots are met on their own, width of the narrow block for them); N + 1 kept tokens and a local
    span of two chunks would else take a whole block for one token."""
    odd = n % keys
    return (odd, TAIL) if 0 < odd <= TAIL < keys else (0, 0)


def in_rows(x: Tensor) -> Tensor:
    """The same values with the last axis contiguous, and each row aligned to 16 bytes where it can be."""
    return x if x.stride(-1) == 1 else x.contiguous()


def kept_forward(
    q: Tensor, k: Tensor, v: Tensor, sets: Sets, *, scale: float, chunk: int, setting: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """y [B, T, H, V] in v's dtype, and lse [B, H, T]."""
    batch, time, heads = q.shape[:3]
    q, k, v = (in_rows(x) for x in (q, k, v))
    shape = shape_of(q, k, v, C=chunk)
    options = fitted(setting or launch("selected_kept_forward", q.device, **widths_of(q, v)), q, shape["R"])
    y = torch.empty(batch, time, heads, shape["V"], dtype=v.dtype, device=v.device)
    lse = torch.empty(batch, heads, time, dtype=torch.float32, device=q.device)
    n = sets.index.shape[3]
    odd, shape["TAIL"] = odd_slots(n, options["keys"])
    grid = (shape["G"] * cdiv(shape["R"], options["heads"]), cdiv(time, chunk), batch)
    kept_forward_kernel[grid](
        q, k, v, sets.index, y, lse, time, n, odd, scale * LOG2E,
        **strides_of(q=q, k=k, v=v), **shape, **options,
    )  # fmt: skip
    return y, lse


@compiled_together
def kept_attention(
    q: Tensor, k: Tensor, v: Tensor, score: Tensor, *, scale: float, chunk: int, size: int
) -> Tensor:
    """``selection.kept_chunked`` from nothing; gradients to q, k and v."""
    if not torch.is_grad_enabled():
        sets = running_sets(score, chunk=chunk, size=size)
        return kept_forward(q, k, v, sets, scale=scale, chunk=chunk)[0]
    from .triton_selected_kept_backward import KeptAttention

    return KeptAttention.apply(q, k, v, score.detach(), scale, chunk, size)
