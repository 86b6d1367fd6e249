"""Gradients of :func:`triton_selected_kept.kept_forward`, with no float atomics: every sum has a fixed order.

    p_ij = exp(s_ij - lse_i),  dv_j = sum_i p_ij dy_i,  ds_ij = p_ij (dy_i . v_j - dy_i . y_i)
    dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i

dq walks a query's keys as the forward pass does. For dk and dv, a kept token is seen by the chunks from its entry until
it leaves, a range without gaps. Chunks are cut in spans; what a span's queries may see is the list that is carried into
it and the tokens that enter within, which :func:`entrants_kernel` lists. A program takes a tile of either and walks the
span, in registers. A token's gradient is then its local part, its own span's, and one part of each later span that
carries it, added up where the local part is made. Scratch: for each span n rows of k and v, and one row for each token
that enters, all fp32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launches import Launch, cdiv, launch, widths_of
from .triton_selected import Sets, greater_in, key_position, order_key, running_sets
from .triton_selected_kept import (
    LOG2E,
    MASKED,
    fitted,
    in_rows,
    kept_forward,
    odd_slots,
    position_of,
    rows_at,
    shape_of,
    strides_of,
)

SPANS = 32
"""About as many spans as a sequence is cut into: programs for the GPU against scratch."""


@triton.jit
def add_dq(
    q, dy, k, v, at, t, lse, delta, dq, best, star, total, k_t, v_t, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, MAX: tl.constexpr,
):  # fmt: skip
    """dq with the part of the keys at positions ``at``; MAX: the largest score until now, where, and the sum of ds."""
    keys, values = rows_at(k, at, k_t, at >= 0, K, BK), rows_at(v, at, v_t, at >= 0, V, BV)
    s = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
    visible = (at >= 0)[None, :] & (at[None, :] <= t[:, None])
    p = tl.where(visible, tl.exp2(s - lse[:, None]), 0.0)
    ds = p * (tl.dot(dy, tl.trans(values), input_precision="ieee") - delta[:, None])
    if MAX:
        s = tl.where(visible, s, MASKED)
        new = tl.max(s, 1)
        where = tl.min(tl.where(s == new[:, None], at[None, :], 2147483647), 1)
        star = tl.where(new > best, where, star)
        best = tl.maximum(best, new)
        total += tl.sum(ds, 1)
    return tl.dot(ds.to(k.dtype.element_ty), keys, dq, input_precision="ieee"), best, star, total


@triton.jit
def scored_columns(q, k, v, dy, at, visible, lse, delta, stars, sums, place, live, scale, MAX: tl.constexpr):
    """(p^T, ds^T) [keys, queries] of one block, formed so and not transposed; the keys' positions are ``at``."""
    s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
    p = tl.where(visible, tl.exp2(s - lse[None, :]), 0.0)
    dp = tl.dot(v, tl.trans(dy), input_precision="ieee")
    ds = p * (dp - delta[None, :])
    if MAX:
        star = tl.load(stars + place, mask=live, other=-1)
        total = tl.load(sums + place, mask=live, other=0.0)
        ds -= tl.where(visible & (at[:, None] == star[None, :]), total[None, :], 0.0)
    return p, ds


@triton.jit(do_not_specialize=["time", "n", "odd"])
def kept_dq_kernel(
    q, k, v, index, y, dy, lse, delta, dq, stars, sums, time, n, odd, scale, back,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr, SHARE: tl.constexpr, MAX: tl.constexpr, TAIL: tl.constexpr,
    heads: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    """dq [B, T, H, K], delta = dy . y [B, H, T] and, with MAX, where a row's largest score is and the sum of its ds;
    grid (G x head blocks, N, B)."""
    parts: tl.constexpr = (R + heads - 1) // heads
    H: tl.constexpr = G * R
    g, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    c, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    r = tl.arange(0, heads * C)
    inner, t = part * heads + r // C, c * C + r % C
    head, live = g * R + inner, (inner < R) & (t < time)
    k += b * k_b + g // SHARE * k_h
    v += b * v_b + g // SHARE * v_h
    row = (b * time + t) * H + head
    d, e = tl.arange(0, BK), tl.arange(0, BV)
    wide, tall = live[:, None] & (d < K)[None, :], live[:, None] & (e < V)[None, :]
    base = q + b * q_b + (t.to(tl.int64) * q_t + head * q_h)[:, None]
    queries = tl.load(base + d[None, :], mask=wide, other=0.0)
    out = tl.load(y + row[:, None] * V + e[None, :], mask=tall, other=0.0)
    grad = tl.load(dy + row[:, None] * V + e[None, :], mask=tall, other=0.0)
    place = (b * H + head) * time + t
    norm = tl.load(lse + place, mask=live, other=0.0)
    dot = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta + place, dot, mask=live)
    index += ((b * G + g) * tl.num_programs(1) + c) * n

    acc = tl.zeros([heads * C, BK], tl.float32)
    filled = tl.minimum(n, tl.maximum(c - 1, 0) * P)
    older = tl.maximum(c - 1, 0) * C
    stop = filled + tl.minimum((c + 1) * C, time) - older
    first = tl.minimum(filled, odd)
    t = tl.where(live, t, -1)
    best = tl.full([heads * C], MASKED, tl.float32)
    star = tl.zeros([heads * C], tl.int32)
    total = tl.zeros([heads * C], tl.float32)
    if TAIL > 0:
        odd_ones = position_of(index, tl.arange(0, TAIL), first, older, 0)
        acc, best, star, total = add_dq(
            queries,
            grad,
            k,
            v,
            odd_ones,
            t,
            norm,
            dot,
            acc,
            best,
            star,
            total,
            k_t,
            v_t,
            scale,
            K,
            V,
            BK,
            BV,
            MAX,
        )
    for start in range(first, stop, keys):
        at = position_of(index, start + tl.arange(0, keys), filled, older, stop)
        acc, best, star, total = add_dq(
            queries, grad, k, v, at, t, norm, dot, acc, best, star, total, k_t, v_t, scale, K, V, BK, BV, MAX
        )
    if MAX:  # the row maximum is part of the function: all weights shrink where it grows
        acc -= total[:, None] * rows_at(k, star, k_t, live, K, BK).to(tl.float32)
        tl.store(stars + place, star, mask=live)
        tl.store(sums + place, total, mask=live)
    tl.store(dq + row[:, None] * K + d[None, :], (acc * back).to(dq.dtype.element_ty), mask=wide)


@triton.jit(do_not_specialize=["time", "count", "span"])
def entrants_kernel(leave, listed, sizes, time, count, span, C: tl.constexpr, block: tl.constexpr):
    """listed [BG, spans, span C]: positions that enter a kept set in each span, in order; sizes [BG, spans]."""
    s, row = tl.program_id(0), tl.program_id(1)
    leave += row.to(tl.int64) * time
    first = s * span * C
    stop = tl.minimum(first + span * C, (count - 2) * C)
    listed += (row.to(tl.int64) * tl.num_programs(0) + s) * span * C
    size = 0
    for start in range(first, stop, block):
        t = start + tl.arange(0, block)
        gone = tl.load(leave + t, mask=t < stop, other=0)
        enters = (gone > t // C + 2).to(tl.int32)
        place = size + tl.cumsum(enters, 0) - enters
        tl.store(listed + place, t, mask=enters > 0)
        size += tl.sum(enters, 0)
    tl.store(sizes + row * tl.num_programs(0) + s, size)


@triton.jit(do_not_specialize=["time", "n", "count", "span", "segments", "segment"])
def kept_dkv_kernel(
    q, k, v, dy, lse, delta, stars, sums, leave, lists, listed, sizes, carried_k, carried_v, entered_k, entered_v,
    time, n, count, span, segments, segment, scale, back,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, SHARE: tl.constexpr, MAX: tl.constexpr, tokens: tl.constexpr, queries: tl.constexpr,
):  # fmt: skip
    """The gradient of kept tokens from the queries of one span; grid (tiles, spans, B G). Tiles of carried tokens
    write carried_k [BG, spans, n, K], those of entering ones entered_k [BG, T, K]."""
    tile, s, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    spans = tl.num_programs(1)
    b, g = row // G, (row % G).to(tl.int32)
    carried_tiles = tl.cdiv(n, tokens)
    first, stop = s * span + 2, tl.minimum((s + 1) * span + 2, count)
    if tile < carried_tiles:
        i = tile * tokens + tl.arange(0, tokens)
        held = tl.where(s > 0, n, 0)
        # The list before this span is that of the last selection segment before it.
        at = lists + (row * segments + s * (span // segment) - 1) * n
        key = tl.load(at + i, mask=i < held, other=-1)
        there = (i < held) & (key != -(2**63))
        position = tl.where(there, key_position(key), 0)
        to_k, to_v = carried_k + (row * spans + s) * n * K, carried_v + (row * spans + s) * n * V
        to = i
    else:
        i = (tile - carried_tiles) * tokens + tl.arange(0, tokens)
        there = i < tl.load(sizes + row * spans + s)
        position = tl.load(listed + (row * spans + s) * span * C + i, mask=there, other=0)
        to_k, to_v = entered_k + row * time * K, entered_v + row * time * V
        to = position
    if tl.max(there.to(tl.int32), 0) > 0:
        until = tl.load(leave + row * time + position, mask=there, other=0)
        k += b * k_b + g // SHARE * k_h
        v += b * v_b + g // SHARE * v_h
        keyed = rows_at(k, position, k_t, there, K, BK)
        valued = rows_at(v, position, v_t, there, V, BV)
        dk = tl.zeros([tokens, BK], tl.float32)
        dv = tl.zeros([tokens, BV], tl.float32)
        first = tl.maximum(first, tl.min(tl.where(there, position // C + 2, 2147483647), 0))
        stop = tl.minimum(stop, tl.max(until, 0))
        blocks: tl.constexpr = (C + queries - 1) // queries
        for step in range(0, (stop - first) * (R * blocks)):
            c = first + step // (R * blocks)
            rest = step - (c - first) * (R * blocks)
            t = c * C + rest // R * queries + tl.arange(0, queries)
            head, live = g * R + rest - rest // R * R, (t < time) & (t < (c + 1) * C)
            rows = rows_at(q + b * q_b + head * q_h, t, q_t, live, K, BK)
            grad = rows_at(dy + (b * time * (G * R) + head) * V, t, G * R * V, live, V, BV)
            place = (b * (G * R) + head) * time + t
            norm = tl.load(lse + place, mask=live, other=0.0)
            dot = tl.load(delta + place, mask=live, other=0.0)
            visible = ((position < (c - 1) * C) & (c < until))[:, None] & live[None, :]
            p, ds = scored_columns(
                rows, keyed, valued, grad, position, visible, norm, dot, stars, sums, place, live, scale, MAX
            )
            dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
            dk = tl.dot(ds.to(rows.dtype), rows, dk, input_precision="ieee")
        d, e = tl.arange(0, BK), tl.arange(0, BV)
        wide, tall = there[:, None] & (d < K)[None, :], there[:, None] & (e < V)[None, :]
        tl.store(to_k + to[:, None] * K + d[None, :], dk * back, mask=wide)
        tl.store(to_v + to[:, None] * V + e[None, :], dv, mask=tall)


@triton.jit(do_not_specialize=["time", "n", "count", "span", "segments", "segment", "spans"])
def local_dkv_kernel(
    q, k, v, dy, lse, delta, stars, sums, score, leave, lists, carried_k, carried_v, entered_k, entered_v, dk, dv,
    time, n, count, span, segments, segment, spans, scale, back,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, s_b, s_t, s_h,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, SHARE: tl.constexpr, MAX: tl.constexpr, STEPS: tl.constexpr, tokens: tl.constexpr,
    queries: tl.constexpr,
):  # fmt: skip
    """dk [B, T, G, K], dv [B, T, G, V]: the local part, and what the spans found; grid (token tiles, BG)."""
    row = tl.program_id(1).to(tl.int64)
    b, g = row // G, (row % G).to(tl.int32)
    j = tl.program_id(0) * tokens + tl.arange(0, tokens)
    own = tl.program_id(0) * tokens // C
    there = j < time
    k += b * k_b + g // SHARE * k_h
    v += b * v_b + g // SHARE * v_h
    keyed = rows_at(k, j, k_t, there, K, BK)
    valued = rows_at(v, j, v_t, there, V, BV)
    acc_k = tl.zeros([tokens, BK], tl.float32)
    acc_v = tl.zeros([tokens, BV], tl.float32)
    begin = tl.program_id(0) * tokens  # no query before the first of these tokens sees one of them
    blocks = tl.cdiv(tl.minimum((own + 2) * C, time) - begin, queries)
    for step in range(0, blocks * R):
        t = begin + step // R * queries + tl.arange(0, queries)
        head, live = g * R + step - step // R * R, (t < time) & (t < (own + 2) * C)
        rows = rows_at(q + b * q_b + head * q_h, t, q_t, live, K, BK)
        grad = rows_at(dy + (b * time * (G * R) + head) * V, t, G * R * V, live, V, BV)
        place = (b * (G * R) + head) * time + t
        norm = tl.load(lse + place, mask=live, other=0.0)
        dot = tl.load(delta + place, mask=live, other=0.0)
        visible = (j[:, None] <= t[None, :]) & live[None, :]
        p, ds = scored_columns(
            rows, keyed, valued, grad, j, visible, norm, dot, stars, sums, place, live, scale, MAX
        )
        acc_v = tl.dot(p.to(grad.dtype), grad, acc_v, input_precision="ieee")
        acc_k = tl.dot(ds.to(rows.dtype), rows, acc_k, input_precision="ieee")
    acc_k *= back

    d, e = tl.arange(0, BK), tl.arange(0, BV)
    until = tl.load(leave + row * time + j, mask=there, other=0)
    enters = (until > own + 2) & (own + 2 < count) & (n > 0)
    if tl.max(enters.to(tl.int32), 0) > 0:
        wide, tall = enters[:, None] & (d < K)[None, :], enters[:, None] & (e < V)[None, :]
        to = row * time + j
        acc_k += tl.load(entered_k + to[:, None] * K + d[None, :], mask=wide, other=0.0)
        acc_v += tl.load(entered_v + to[:, None] * V + e[None, :], mask=tall, other=0.0)
        at = score + b * s_b + g * s_h + j.to(tl.int64) * s_t
        key = order_key(tl.load(at, mask=there, other=0.0).to(tl.float32), j)
        last = tl.minimum(tl.max(tl.where(enters, until, 0), 0), count)
        for s in range(own // span + 1, tl.minimum(spans, tl.cdiv(last - 1, span))):
            before = lists + (row * segments + s * (span // segment) - 1) * n
            carried = enters & (until > s * span + 1)
            to = (row * spans + s) * n + greater_in(before, key, n, False, STEPS)
            wide, tall = carried[:, None] & (d < K)[None, :], carried[:, None] & (e < V)[None, :]
            acc_k += tl.load(carried_k + to[:, None] * K + d[None, :], mask=wide, other=0.0)
            acc_v += tl.load(carried_v + to[:, None] * V + e[None, :], mask=tall, other=0.0)
    to = (b * time + j) * G + g
    wide, tall = there[:, None] & (d < K)[None, :], there[:, None] & (e < V)[None, :]
    tl.store(dk + to[:, None] * K + d[None, :], acc_k.to(dk.dtype.element_ty), mask=wide)
    tl.store(dv + to[:, None] * V + e[None, :], acc_v.to(dv.dtype.element_ty), mask=tall)


def kept_backward(
    q: Tensor, k: Tensor, v: Tensor, score: Tensor, sets: Sets, y: Tensor, lse: Tensor, dy: Tensor,
    *, scale: float, chunk: int, maximum: bool = False, settings: dict[str, Launch] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv in the dtypes of q, k and v, and dy . y [B, H, T].

    ``maximum``: the function is STILL's, where the weights are exp(s - the row's largest s) and lse stands for that
    maximum and the logarithm of the denominator. Where more heads select than there are kv heads, each has a part of dk
    and dv of its own, and they are added up at last.
    """
    batch, time = q.shape[:2]
    q, k, v, dy = *(in_rows(x) for x in (q, k, v)), dy.contiguous()
    shape, count, device = shape_of(q, k, v, C=chunk), -(-time // chunk), q.device
    groups, select = k.shape[2], sets.index.shape[1]
    shape |= dict(G=select, R=q.shape[2] // select, SHARE=select // groups, MAX=maximum)
    rows, n = batch * select, sets.index.shape[3]
    exact: dict[str, Any] = dict(dtype=torch.float32, device=device)
    strides = strides_of(q=q, k=k, v=v)

    def options(kernel: str) -> dict[str, Any]:
        return fitted(
            (settings or {}).get(kernel) or launch(kernel, device, **widths_of(q, v)), q, shape["R"]
        )

    delta = torch.empty_like(lse)
    stars, sums = (
        torch.empty_like(lse, dtype=kind) if maximum else lse for kind in (torch.int32, torch.float32)
    )
    dq = torch.empty(q.shape, dtype=q.dtype, device=device)
    chosen = options("selected_routed_dq" if maximum else "selected_kept_dq")
    odd, chosen["TAIL"] = odd_slots(n, chosen["keys"])
    chosen["P"] = chunk if sets.left is None else sets.left.shape[3]
    grid = (shape["G"] * cdiv(shape["R"], chosen["heads"]), count, batch)
    kept_dq_kernel[grid](
        q, k, v, sets.index, y, dy, lse, delta, dq, stars, sums, time, n, odd, scale * LOG2E, scale, **strides,
        **shape, **chosen,
    )  # fmt: skip

    routed, segments = max(0, count - 2), sets.lists.shape[2]
    span = sets.segment * max(1, -(-routed // (SPANS * sets.segment)))
    spans = -(-routed // span)
    carried_k, carried_v = (torch.empty(rows, spans, n, shape[x], **exact) for x in "KV")
    entered_k, entered_v = (torch.empty(rows, time if n else 0, shape[x], **exact) for x in "KV")
    if n:
        listed = torch.empty(rows, spans, span * chunk, dtype=torch.int32, device=device)
        sizes = torch.empty(rows, spans, dtype=torch.int32, device=device)
        entrants_kernel[(spans, rows)](
            sets.leave, listed, sizes, time, count, span, **dict[str, Any](C=chunk, block=1024)
        )
        chosen = options("selected_kept_dkv")
        blocks = cdiv(n, chosen["tokens"]) + cdiv(span * chunk, chosen["tokens"])
        kept_dkv_kernel[(blocks, spans, rows)](
            q, k, v, dy, lse, delta, stars, sums, sets.leave, sets.lists, listed, sizes,
            carried_k, carried_v, entered_k, entered_v,
            time, n, count, span, segments, sets.segment, scale * LOG2E, scale, **strides,
            **shape, **chosen,
        )  # fmt: skip
    dk, dv = (
        torch.empty(batch, time, select, shape[x], dtype=like.dtype, device=device)
        for x, like in (("K", k), ("V", v))
    )
    chosen = options("selected_local_dkv")
    chosen |= dict(tokens=min(chosen["tokens"], chunk), STEPS=max(1, n.bit_length()))  # all of one chunk
    local_dkv_kernel[(cdiv(time, chosen["tokens"]), rows)](
        q, k, v, dy, lse, delta, stars, sums, score, sets.leave, sets.lists,
        carried_k, carried_v, entered_k, entered_v, dk, dv,
        time, n, count, span, segments, sets.segment, spans, scale * LOG2E, scale,
        **strides, **strides_of(s=score), **shape, **chosen,
    )  # fmt: skip
    if select > groups:
        dk, dv = (x.unflatten(2, (groups, -1)).sum(3, dtype=torch.float32).to(x.dtype) for x in (dk, dv))
    return dq, dk, dv, delta


class KeptAttention(torch.autograd.Function):
    """y of ``kept_forward``. Saved: q, k, v, score, y, one number a row, and the kept sets (4 n / C bytes a token)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, score: Tensor, scale: float, chunk: int, size: int
    ) -> Tensor:
        sets = running_sets(score, chunk=chunk, size=size)
        y, lse = kept_forward(q, k, v, sets, scale=scale, chunk=chunk)
        ctx.save_for_backward(q, k, v, score, y, lse, sets.index, sets.leave, sets.lists)
        ctx.scale, ctx.chunk, ctx.segment = scale, chunk, sets.segment
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, score, y, lse, index, leave, lists = ctx.saved_tensors
        sets = Sets(index, leave, lists, ctx.segment)
        *found, _ = kept_backward(q, k, v, score, sets, y, lse, *gradients, scale=ctx.scale, chunk=ctx.chunk)
        return *found, None, None, None, None
