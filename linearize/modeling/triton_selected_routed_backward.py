"""Gradients of STILL's attention, ``triton_selected_routed``, with no float atomics.

With u = dy / den and e = dy . y / den, the exact weights are those of a softmax whose logsumexp is m + log den, so that
``triton_selected_kept_backward`` has their part; the row maximum m takes what it must. For the linear ones, with b the
mapped vectors before the softmax of both halves, and R, r sums over the queries of all chunks from the one on with
which a token turned linear:

    dphi_q = S (g u) - e z      dphi_k = R v - r,  R = sum phi_q (g u)^T,  r = sum e phi_q      dv += R^T phi_k
    db = phi+ (dphi+ - phi+ . dphi+) - phi- (dphi- - phi- . dphi-)                              dg = u * (phi_q S)

R and r are made as S and z are, from the end. phi_q S without its gate is kept from the forward pass. b is x W, made as
long as x is; the gradient goes through that length in the kernels, and through W by matrix products.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launches import cdiv, launch, power_of_two, widths_of
from .triton_selected import Sets, running_sets
from .triton_selected_kept import fitted, in_rows, rows_at, shape_of
from .triton_selected_kept_backward import kept_backward
from .triton_selected_routed import routed_forward
from .triton_selected_states import Piece, load_map, pieces, softmax_rows, turns_of


@triton.jit(do_not_specialize=["time"])
def scaled_kernel(
    dy, gate, linear, den, values, dgate, time,
    H: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """values [B, T, H, V] = g u with u = dy / den, and the gate's gradient u * linear; grid (row tiles, B)."""
    r, b = tl.program_id(0) * rows + tl.arange(0, rows), tl.program_id(1).to(tl.int64)
    e = tl.arange(0, BV)
    live = r < time * H
    u = 1.0 / tl.load(den + (b * H + r % H) * time + r // H, mask=live, other=1.0)
    row = b * time * H + r
    place, wide = row[:, None] * V + e[None, :], live[:, None] & (e < V)[None, :]
    u = u[:, None] * tl.load(dy + place, mask=wide, other=0.0).to(tl.float32)
    if GATE > 0:
        more = u * tl.load(linear + place, mask=wide, other=0.0).to(tl.float32)
        if GATE == 1:
            tl.store(dgate + row, tl.sum(more, 1).to(dgate.dtype.element_ty), mask=live)
        else:
            tl.store(dgate + place, more.to(dgate.dtype.element_ty), mask=wide)
        at_gate = row[:, None] * GATE + (e[None, :] if GATE > 1 else 0)
        u *= tl.load(gate + at_gate, mask=wide, other=0.0).to(tl.float32)
    tl.store(values + place, u.to(values.dtype.element_ty), mask=wide)


@triton.jit(do_not_specialize=["time"])
def lengthen_kernel(
    dx, x, along, time, x_b, x_t, x_h,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """dx [B, T, G, K], contiguous, gets x times along [B, H, T], summed over a group's heads; grid (row tiles, B)."""
    r, b = tl.program_id(0) * rows + tl.arange(0, rows), tl.program_id(1).to(tl.int64)
    d, t, g = tl.arange(0, BK), r // G, r % G
    share = tl.zeros([rows], tl.float32)
    for i in range(H // G):
        share += tl.load(along + (b * H + g * (H // G) + i) * time + t, mask=t < time, other=0.0)
    wide = (t < time)[:, None] if K == BK else (t < time)[:, None] & (d < K)[None, :]
    more = tl.load(x + b * x_b + (t.to(tl.int64) * x_t + g * x_h)[:, None] + d[None, :], mask=wide, other=0.0)
    at = dx + (b * time * G + r)[:, None] * K + d[None, :]
    total = tl.load(at, mask=wide, other=0.0).to(tl.float32) + more.to(tl.float32) * share[:, None]
    tl.store(at, total.to(dx.dtype.element_ty), mask=wide)


@triton.jit
def tile_of(turns, c, time, count, routes, C: tl.constexpr, KEYS: tl.constexpr):
    """Positions of chunk c's tile, -1 for none: its queries, or the KEYS that turn linear with it."""
    if KEYS:
        return tl.load(turns + (routes * count + c) * C + tl.arange(0, C))
    t = c * C + tl.arange(0, C)
    return tl.where(t < time, t, -1)


@triton.jit(do_not_specialize=["time", "count", "start", "chunks", "run", "runs"])
def features_kernel(
    x, w, values, e, turns, states, bases, sums, da, along, time, count, start, chunks, run, runs,
    x_b, x_t, x_h, v_b, v_t, v_h,
    H: tl.constexpr, HX: tl.constexpr, HV: tl.constexpr, HM: tl.constexpr, HS: tl.constexpr, GS: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, F: tl.constexpr, C: tl.constexpr,
    NORM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """da [B, T, H, f], the gradient of x w: of queries from S and z (values g u, weight e), or of KEYS from R and r
    (values v, weight 1); with NORM x has another, ``along`` [B, H, T] times itself. HX, HV, HM, HS: heads of x, values,
    maps and states; grid (H, chunks, B)."""
    h, c, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    routes = b * GS + h // (H // GS)
    at = tile_of(turns, start + c, time, count, routes, C, KEYS)
    there = at >= 0
    rows = rows_at(x + b * x_b + h // (H // HX) * x_h, at, x_t, there, K, BK)
    vectors = rows_at(values + b * v_b + h // (H // HV) * v_h, at, v_t, there, V, BV)
    weight = there.to(tl.float32)
    if not KEYS:
        weight = tl.load(e + (b * H + h) * time + at, mask=there, other=0.0)
    w = load_map(w + h // (H // HM) * K * F, K, BK, F)
    f, column = tl.arange(0, F), tl.arange(0, BV)
    head = b * HS + h // (H // HS)
    own, before = (head * chunks + c) * 2 * F, (head * runs + c // run) * 2 * F
    acc = tl.zeros([C, F], tl.float32)
    x = rows.to(tl.float32)
    length = tl.sqrt(tl.sum(x * x, 1))
    # Nothing is before the first run, or after the last.
    alone = start + c >= (count - 1) // run * run if KEYS else start + c < run
    for half in range(2):
        z = tl.load(sums + own + half * F + f)
        got = -weight[:, None] * z[None, :]
        for part in range(tl.where(alone, 1, 2)):
            state = (states if part == 0 else bases) + tl.where(part == 0, own, before) * V + half * F
            state += column[:, None] * (2 * F) + f[None, :]
            state = tl.load(state, mask=None if V == BV else (column < V)[:, None])
            got = tl.dot(vectors.to(state.dtype), state, got, input_precision="ieee")
        sign = 1.0 - 2.0 * half
        phi = softmax_rows(sign * tl.dot(rows, w, input_precision="ieee"), length, F, NORM)
        acc += sign * phi * (got - tl.sum(got * phi, 1)[:, None])
    if NORM:  # a was made as long as x is: its own length has no part in this, that of x has
        a = tl.dot(rows, w, input_precision="ieee")
        size = tl.sqrt(tl.sum(a * a, 1))
        inverse = 1.0 / tl.maximum(size, 1e-12)
        inner = tl.where(size < 1e-12, 0.0, tl.sum(acc * a, 1) * inverse)
        acc = (acc - a * (inner * inverse)[:, None]) * (length * inverse)[:, None]
        tl.store(along + (b * H + h) * time + at, inner / tl.maximum(length, 1e-30), mask=there)
    place = ((b * time + at) * H + h)[:, None] * F + f[None, :]
    tl.store(da + place, acc.to(da.dtype.element_ty), mask=there[:, None])


@triton.jit(do_not_specialize=["time", "count", "start", "chunks", "run", "runs"])
def values_kernel(
    k, w, turns, states, bases, dv, time, count, start, chunks, run, runs, k_b, k_t, k_h,
    H: tl.constexpr, G: tl.constexpr, HM: tl.constexpr, GS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, F: tl.constexpr, C: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """dv [B, T, H, V] = R^T phi_k of the tokens that turn linear; grid (H, chunks, B)."""
    h, c, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    routes = b * GS + h // (H // GS)
    at = tile_of(turns, start + c, time, count, routes, C, True)
    there = at >= 0
    rows = rows_at(k + b * k_b + h // (H // G) * k_h, at, k_t, there, K, BK)
    w = load_map(w + h // (H // HM) * K * F, K, BK, F)
    f, column = tl.arange(0, F), tl.arange(0, BV)
    own, before = ((b * H + h) * chunks + c) * 2 * F, ((b * H + h) * runs + c // run) * 2 * F
    acc = tl.zeros([C, BV], tl.float32)
    x = rows.to(tl.float32)
    length = tl.sqrt(tl.sum(x * x, 1))
    for half in range(2):
        a = (1.0 - 2.0 * half) * tl.dot(rows, w, input_precision="ieee")
        phi = softmax_rows(a, length, F, NORM).to(states.dtype.element_ty)
        for part in range(tl.where(start + c >= (count - 1) // run * run, 1, 2)):
            state = (states if part == 0 else bases) + tl.where(part == 0, own, before) * V + half * F
            state += column[:, None] * (2 * F) + f[None, :]
            state = tl.load(state, mask=None if V == BV else (column < V)[:, None])
            acc = tl.dot(phi, tl.trans(state), acc, input_precision="ieee")
    place = ((b * time + at) * H + h)[:, None] * V + column[None, :]
    tl.store(dv + place, acc.to(dv.dtype.element_ty), mask=there[:, None] & (column < V)[None, :])


def add_through_map(dx: Tensor, x: Tensor, w: Tensor, da: Tensor, along: Tensor | None) -> Tensor:
    """The gradient of w [heads, K, f] from that of a = x w, da [B, T, heads, f] in the dtype of x [B, T, G, K]; dx gets
    that of x in place: what goes through a, and ``along`` [B, heads, T] times x.

    Products are in the dtype of x, so that half precision has matrix instructions.
    """
    heads, (batch, time, groups, width) = len(w), x.shape

    def by_group(x: Tensor) -> Tensor:
        return x.flatten(0, 1).unflatten(1, (groups, -1)).flatten(2).transpose(0, 1)  # [G, B T, ..]

    matrix = w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)  # [G, K, heads / G f]
    if along is not None:
        lengthen_kernel[(cdiv(time * groups, 32), batch)](
            dx, x, along, time, *x.stride()[:3],
            H=along.shape[1], G=groups, K=width, BK=power_of_two(width, 16), rows=32,
        )  # fmt: skip
    with torch.autocast(x.device.type, enabled=False):
        by_group(dx).baddbmm_(by_group(da), matrix.transpose(1, 2))
        dw = torch.bmm(by_group(x).transpose(1, 2), by_group(da))
    return dw.unflatten(2, (heads // groups, -1)).transpose(1, 2).flatten(0, 1)


def routed_backward(
    q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, score: Tensor, gate: Tensor | None,
    sets: Sets, y: Tensor, linear: Tensor | None, top: Tensor, den: Tensor, dy: Tensor,
    *, scale: float, chunk: int, norm: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of q, k, v, w_q, w_k and the gate, in their dtypes."""
    (batch, time, heads), groups, dy = q.shape[:3], k.shape[2], dy.contiguous()
    q, k, v = (in_rows(x) for x in (q, k, v))
    select, count = sets.index.shape[1:3]
    dq, dk, dv, delta = kept_backward(
        q, k, v, score, sets, y, top + den.log2(), dy, scale=scale, chunk=chunk, maximum=True
    )
    e = delta / den
    shape = shape_of(q, k, v, GS=select, C=chunk)
    values = torch.empty_like(dy, dtype=q.dtype)
    gate = None if gate is None else gate.contiguous()
    dgate = None if gate is None else torch.empty_like(gate)
    scaled_kernel[(cdiv(time * heads, 64), batch)](
        dy, dy if gate is None else gate, dy if linear is None else linear, den,
        values, dy if dgate is None else dgate, time,
        H=heads, V=shape["V"], BV=shape["BV"], GATE=0 if gate is None else gate.shape[3], rows=64,
    )  # fmt: skip
    device, features = q.device, w_q.shape[2]
    constants: dict[str, Any] = {name: shape[name] for name in ("K", "V", "BK", "BV", "C", "GS")}
    constants |= dict(H=heads, HM=len(w_k), F=features, NORM=norm)
    exact: dict[str, Any] = dict(dtype=torch.float32, device=device)
    turns = turns_of(sets, chunk)
    terms: dict[str, Any] = dict(count=count, chunk=chunk, norm=norm)

    def options(kernel: str) -> dict[str, Any]:
        return fitted(launch(kernel, device, **widths_of(q, v, w_q)), q, 1)

    def room(maps: int) -> tuple[Tensor, Tensor]:
        state = torch.empty(batch, maps, shape["V"], 2 * features, **exact)
        return state, torch.empty(batch, maps, 2 * features, **exact)

    def where(piece: Piece) -> tuple[int, ...]:
        return time, count, piece.start, piece.chunks, piece.run, piece.bases.shape[2]

    # Queries, from S and z.
    da_q = torch.empty(batch, time, heads, features, dtype=q.dtype, device=device)
    along_q = torch.empty(batch, heads, time, **exact)
    of_queries = constants | dict(HX=heads, HV=heads, HM=heads, HS=len(w_k), KEYS=False)
    for piece in pieces(k, w_k, v, room(len(w_k)), turns=turns, **terms):
        features_kernel[(heads, piece.chunks, batch)](
            q, w_q, values, e, turns, *piece.tensors, da_q, along_q, *where(piece),
            *q.stride()[:3], *values.stride()[:3], **of_queries, **options("selected_features"),
        )  # fmt: skip

    # Keys, from R and r; what never turns linear has no part.
    along_k = torch.zeros(batch, heads, time, **exact)
    da_k = torch.zeros(batch, time, heads, features, dtype=k.dtype, device=device)
    linear_dv = torch.zeros(batch, time, heads, shape["V"], dtype=v.dtype, device=device)
    of_keys = constants | dict(HX=groups, HV=groups, HS=heads, KEYS=True)
    for piece in pieces(q, w_q, values, room(heads), weights=e, **terms):
        features_kernel[(heads, piece.chunks, batch)](
            k, w_k, v, e, turns, *piece.tensors, da_k, along_k, *where(piece),
            *k.stride()[:3], *v.stride()[:3], **of_keys, **options("selected_features"),
        )  # fmt: skip
        values_kernel[(heads, piece.chunks, batch)](
            k, w_k, turns, piece.states, piece.bases, linear_dv, *where(piece),
            *k.stride()[:3], **constants, **dict[str, Any](G=groups), **options("selected_values"),
        )  # fmt: skip
    if len(w_k) < heads:
        da_k = da_k.unflatten(2, (len(w_k), -1)).sum(3, dtype=torch.float32).to(k.dtype)
    dw_q = add_through_map(dq, q, w_q, da_q, along_q if norm else None)
    dw_k = add_through_map(dk, k, w_k, da_k, along_k if norm else None)
    dv = dv + linear_dv.unflatten(2, (groups, -1)).sum(3, dtype=torch.float32)
    return dq, dk, dv.to(v.dtype), dw_q, dw_k, dgate


class RoutedAttention(torch.autograd.Function):
    """y of ``routed_forward``, S and z. Saved: the inputs, y, two numbers a row, and the kept sets."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, score: Tensor, gate: Tensor | None,
        scale: float, chunk: int, picks: int, size: int, norm: bool, eps: float, lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        sets = running_sets(score, chunk=chunk, size=size, picks=picks)
        done = routed_forward(
            q, k, v, w_q, w_k, sets, gate,
            scale=scale, chunk=chunk, norm=norm, eps=eps, lengths=lengths, save=True,
        )  # fmt: skip
        ctx.mark_non_differentiable(done.kv, done.z)
        ctx.save_for_backward(
            q,
            k,
            v,
            w_q,
            w_k,
            score,
            gate,
            done.y,
            done.linear,
            done.top,
            done.den,
            sets.index,
            sets.leave,
            sets.lists,
            sets.left,
        )
        ctx.segment, ctx.terms = sets.segment, dict(scale=scale, chunk=chunk, norm=norm)
        return done.y, done.kv, done.z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, w_q, w_k, score, gate, y, linear, top, den, index, leave, lists, left = ctx.saved_tensors
        sets = Sets(index, leave, lists, ctx.segment, left)
        *found, dgate = routed_backward(
            q, k, v, w_q, w_k, score, gate, sets, y, linear, top, den, gradients[0], **ctx.terms
        )
        return *found, None, dgate, *[None] * 7
