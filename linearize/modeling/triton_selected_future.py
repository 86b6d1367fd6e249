"""What a token is worth to those after it, and to itself: two scores of attention weights, in memory linear in T.

    future_attention   max over the heads of a group and the queries t with c(t) >= c(j) + 2 of softmax(s_t)_j
    self_saliency      s_tt - logsumexp of s_tj over the last C tokens j <= t

The first takes two passes over the causal half of T x T: by rows for the logsumexp, then by columns for the largest
s_tj - lse_t. Both are as in ``selection.py`` and ``routing.py``, which define them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import Launch, cdiv, launch, widths_of
from .selection import GRID
from .triton_common import to_grid
from .triton_selected_kept import LOG2E, MASKED, fitted, in_rows, rows_at, shape_of, strides_of

LEAST = -87.33654475055310  # log of the smallest normal fp32 number: a share is never taken as nothing


@triton.jit(do_not_specialize=["time"])
def row_sums_kernel(
    q, k, lse, time, scale, q_b, q_t, q_h, k_b, k_t, k_h,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    queries: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    """lse [B, H, T] of all causal scores, in powers of two; grid (H, query tiles, B)."""
    head, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest rows first
    t = tile * queries + tl.arange(0, queries)
    rows = rows_at(q + b * q_b + head * q_h, t, q_t, t < time, K, BK)
    k += b * k_b + head // R * k_h
    m = tl.full([queries], MASKED, tl.float32)
    total = tl.zeros([queries], tl.float32)
    for start in range(0, tl.minimum((tile + 1) * queries, time), keys):
        j = start + tl.arange(0, keys)
        keyed = rows_at(k, j, k_t, j < time, K, BK)
        s = tl.dot(rows, tl.trans(keyed), input_precision="ieee") * scale
        s = tl.where(j[None, :] <= t[:, None], s, MASKED)
        new = tl.maximum(m, tl.max(s, 1))
        total = total * tl.exp2(m - new) + tl.sum(tl.exp2(s - new[:, None]), 1)
        m = new
    tl.store(lse + (b * (G * R) + head) * time + t, m + tl.log2(total), mask=t < time)


@triton.jit(do_not_specialize=["time"])
def column_max_kernel(
    q, k, lse, lengths, found, time, scale, q_b, q_t, q_h, k_b, k_t, k_h,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    queries: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    """found [B, T, G]; grid (G, key tiles, B)."""
    g, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    j = tl.program_id(1) * keys + tl.arange(0, keys)
    keyed = rows_at(k + b * k_b + g * k_h, j, k_t, j < time, K, BK)
    after = (j // C + 2) * C  # the first query that counts
    stop = tl.minimum(tl.load(lengths + b), time).to(tl.int32)
    first = (tl.program_id(1) * keys // C + 2) * C
    best = tl.full([keys], MASKED, tl.float32)
    for step in range(0, tl.cdiv(tl.maximum(stop - first, 0), queries) * R):
        t = first + step // R * queries + tl.arange(0, queries)
        head = g * R + step % R
        rows = rows_at(q + b * q_b + head * q_h, t, q_t, t < stop, K, BK)
        norm = tl.load(lse + (b * (G * R) + head) * time + t, mask=t < stop, other=0.0)
        s = tl.dot(keyed, tl.trans(rows), input_precision="ieee") * scale - norm[None, :]
        s = tl.where((t[None, :] >= after[:, None]) & (t < stop)[None, :], s, MASKED)
        best = tl.maximum(best, tl.max(s, 1))
    tl.store(found + (b * time + j) * G + g, tl.exp2(best), mask=j < time)


@triton.jit(do_not_specialize=["time"])
def saliency_kernel(
    q, k, rho, time, scale, least, q_b, q_t, q_h, k_b, k_t, k_h,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, GRID: tl.constexpr,
    FIRST: tl.constexpr, heads: tl.constexpr,
):  # fmt: skip
    """rho [B, T, H] fp32 for windows of C tokens, with GRID > 0 rounded to multiples of 1 / GRID, and with FIRST inf
    for the first token; grid (G x head blocks, chunks, B)."""
    parts: tl.constexpr = (R + heads - 1) // heads
    H: tl.constexpr = G * R
    g, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    c, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    r = tl.arange(0, heads * C)
    inner, t = part * heads + r // C, c * C + r % C
    head, live = g * R + inner, (inner < R) & (t < time)
    d = tl.arange(0, BK)
    base = q + b * q_b + (t.to(tl.int64) * q_t + head * q_h)[:, None]
    rows = tl.load(base + d[None, :], mask=live[:, None] & (d < K)[None, :], other=0.0)
    k += b * k_b + g * k_h
    j = c * C + tl.arange(0, C)
    s = tl.dot(rows, tl.trans(rows_at(k, j, k_t, j < time, K, BK)), input_precision="ieee") * scale
    own = tl.sum(tl.where(j[None, :] == t[:, None], s, 0.0), 1)
    s = tl.where(j[None, :] <= t[:, None], s, MASKED)
    j -= C
    before = tl.dot(rows, tl.trans(rows_at(k, j, k_t, j >= 0, K, BK)), input_precision="ieee") * scale
    before = tl.where((j >= 0)[None, :] & (j[None, :] > t[:, None] - C), before, MASKED)
    m = tl.maximum(tl.max(s, 1), tl.max(before, 1))
    total = tl.sum(tl.exp2(s - m[:, None]), 1) + tl.sum(tl.exp2(before - m[:, None]), 1)
    share = (own - m - tl.log2(total)) * 0.6931471805599453
    share = tl.maximum(share, least)
    if GRID > 0:
        share = to_grid(share, GRID)
    if FIRST:
        share = tl.where(t == 0, float("inf"), share)
    tl.store(rho + (b * time + t) * H + head, share, mask=live)


def _widths(q: Tensor, k: Tensor) -> dict[str, Any]:
    shape = shape_of(q, k, k)
    return {name: shape[name] for name in ("G", "R", "K", "BK")}


@torch.no_grad()
def future_attention(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    chunk: int,
    lengths: Tensor | None = None,
    settings: dict[str, Launch] | None = None,
) -> Tensor:
    """``selection.future_attention``: [B, T, G] fp32."""
    batch, time, heads = q.shape[:3]
    q, k = in_rows(q), in_rows(k)
    shape, strides = _widths(q, k), strides_of(q=q, k=k)
    lse = torch.empty(batch, heads, time, dtype=torch.float32, device=q.device)
    found = torch.empty(batch, time, shape["G"], dtype=torch.float32, device=q.device)
    if lengths is None:
        lengths = torch.full((batch,), time, dtype=torch.long, device=q.device)

    def options(kernel: str) -> dict[str, Any]:
        return fitted((settings or {}).get(kernel) or launch(kernel, q.device, **widths_of(q)), q, shape["R"])

    chosen = options("selected_row_sums")
    row_sums_kernel[(heads, cdiv(time, chosen["queries"]), batch)](
        q, k, lse, time, scale * LOG2E, **strides, **shape, **chosen
    )
    chosen, shape["C"] = options("selected_column_max"), chunk
    column_max_kernel[(shape["G"], cdiv(time, chosen["keys"]), batch)](
        q, k, lse, lengths, found, time, scale * LOG2E, **strides, **shape, **chosen
    )
    return found


@torch.no_grad()
def self_saliency(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    window: int,
    rank: bool = False,
    keep_first: bool = False,
    setting: Launch | None = None,
) -> Tensor:
    """``routing.self_saliency``: rho [B, T, H] fp32; with ``rank``, ``routing.ranks_of`` it, where every head selects,
    and inf for the first token with ``keep_first``."""
    batch, time, heads = q.shape[:3]
    q, k = in_rows(q), in_rows(k)
    shape = _widths(q, k)
    options = fitted(setting or launch("selected_saliency", q.device, **widths_of(q)), q, shape["R"])
    options |= dict(C=window, GRID=round(1 / GRID) if rank else 0, FIRST=keep_first)
    rho = torch.empty(batch, time, heads, dtype=torch.float32, device=q.device)
    grid = (shape["G"] * cdiv(shape["R"], options["heads"]), cdiv(time, window), batch)
    saliency_kernel[grid](q, k, rho, time, scale * LOG2E, LEAST, **strides_of(q=q, k=k), **shape, **options)
    return rho
