"""Gradients of STILL's attention, ``triton_selected_routed``, with no float atomics.

With u = dy / den and e = dy . y / den, the exact weights are those of a softmax whose logsumexp is m + log den, so that
``triton_selected_kept_backward`` has their part; the row maximum m takes what it must. For the linear ones, with b the
mapped vectors before the softmax of both halves, and R, r sums over the queries of all chunks from the one on with
which a token turned linear:

    dphi_q = S (g u) - e z      dphi_k = R v - r,  R = sum phi_q (g u)^T,  r = sum e phi_q      dv += R^T phi_k
    db = phi+ (dphi+ - phi+ . dphi+) - phi- (dphi- - phi- . dphi-)                              dg = u * (phi_q S)

R and r are made as S and z are, run by run, from the end. What lies before b, a product with a matrix and a norm, is
left to autograd.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launches import launch
from .triton_selected import Sets, running_sets
from .triton_selected_kept import fitted, in_rows, rows_at, shape_of, strides_of
from .triton_selected_kept_backward import kept_backward
from .triton_selected_routed import (
    PIECE_BYTES,
    PROGRAMS,
    Piece,
    bases_kernel,
    linear_kernel,
    load_map,
    pieces,
    project_columns,
    project_rows,
    routed_forward,
    softmax_columns,
    softmax_rows,
    turning,
)


@triton.jit(do_not_specialize=["time", "start", "chunks", "run"])
def reverse_kernel(
    q, w, values, e, states, sums, totals, total_sums, time, start, chunks, run, q_b, q_t, q_h,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, F: tl.constexpr,
    C: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """R in states [B, H, N, 2, f, V] and r in sums, each from the chunk to the end of its run, and whole runs; values
    [B, T, H, V] = g u, e [B, H, T]; grid (2 H, runs, B)."""
    half, h = tl.program_id(0) % 2, tl.program_id(0) // 2
    r, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    runs = tl.num_programs(1)
    f, column = tl.arange(0, F), tl.arange(0, BV)
    w = load_map(w + h * K * F, K, BK, F)
    state = tl.zeros([F, BV], tl.float32)
    z = tl.zeros([F], tl.float32)
    inside = f[:, None] * V + column[None, :]
    stop = tl.minimum((r + 1) * run, chunks)
    for step in range(0, stop - r * run):
        c = stop - 1 - step
        t = (start + c) * C + tl.arange(0, C)
        live = t < time
        a = project_columns(rows_at(q + b * q_b + h * q_h, t, q_t, live, K, BK), w, NORM)
        phi = tl.where(live[None, :], softmax_columns(tl.where(half == 0, a, -a)), 0.0)
        rows = rows_at(values + (b * time * H + h) * V, t, H * V, live, V, BV)
        state = tl.dot(phi.to(rows.dtype), rows, state, input_precision="ieee")
        z += tl.sum(phi * tl.load(e + (b * H + h) * time + t, mask=live, other=0.0)[None, :], 1)
        place = (((b * H + h) * chunks + c) * 2 + half) * F
        tl.store(states + place * V + inside, state.to(states.dtype.element_ty), mask=(column < V)[None, :])
        tl.store(sums + place + f, z)
    place = (((b * H + h) * runs + r) * 2 + half) * F
    tl.store(totals + place * V + inside, state, mask=(column < V)[None, :])
    tl.store(total_sums + place + f, z)


@triton.jit
def tile_of(
    leave, left, c, time, count, routes, C: tl.constexpr, P: tl.constexpr, FEW: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Positions of chunk c's tile, -1 for none: its queries, or the KEYS that turn linear with it."""
    if KEYS:
        return turning(leave + routes * time, left + routes * count * P, c, C, P, FEW)
    t = c * C + tl.arange(0, C)
    return tl.where(t < time, t, -1)


@triton.jit(do_not_specialize=["time", "count", "start", "chunks", "run", "runs"])
def features_kernel(
    x, w, values, e, leave, left, states, sums, bases, base_sums, db, time, count, start, chunks, run, runs,
    x_b, x_t, x_h, v_b, v_t, v_h,
    H: tl.constexpr, HX: tl.constexpr, HV: tl.constexpr, HM: tl.constexpr, HS: tl.constexpr, GS: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, F: tl.constexpr, C: tl.constexpr,
    P: tl.constexpr, FEW: tl.constexpr, NORM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """db [B, T, H, f]: of queries from S and z (values g u, weight e), or of KEYS from R and r (values v, weight 1);
    HX, HV, HM, HS: heads of x, values, maps and states; grid (H, chunks, B)."""
    h, c, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    routes = b * GS + h // (H // GS)
    at = tile_of(leave, left, start + c, time, count, routes, C, P, FEW, KEYS)
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
    for half in range(2):
        z = tl.load(sums + own + half * F + f) + tl.load(base_sums + before + half * F + f)
        got = -weight[:, None] * z[None, :]
        for part in range(2):
            place = tl.where(part == 0, own, before) + half * F
            state = (states if part == 0 else bases) + place * V + f[:, None] * V + column[None, :]
            state = tl.load(state, mask=(column < V)[None, :], other=0.0)
            got = tl.dot(vectors.to(state.dtype), tl.trans(state), got, input_precision="ieee")
        sign = 1.0 - 2.0 * half
        phi = softmax_rows(sign * project_rows(rows, w, NORM))
        acc += sign * phi * (got - tl.sum(got * phi, 1)[:, None])
    place = ((b * time + at) * H + h)[:, None] * F + f[None, :]
    tl.store(db + place, acc.to(db.dtype.element_ty), mask=there[:, None])


@triton.jit(do_not_specialize=["time", "count", "start", "chunks", "run", "runs"])
def values_kernel(
    k, w, leave, left, states, bases, dv, time, count, start, chunks, run, runs, k_b, k_t, k_h,
    H: tl.constexpr, G: tl.constexpr, HM: tl.constexpr, GS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, F: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    FEW: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """dv [B, T, H, V] = R^T phi_k of the tokens that turn linear; grid (H, chunks, B)."""
    h, c, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    routes = b * GS + h // (H // GS)
    at = tile_of(leave, left, start + c, time, count, routes, C, P, FEW, True)
    there = at >= 0
    rows = rows_at(k + b * k_b + h // (H // G) * k_h, at, k_t, there, K, BK)
    w = load_map(w + h // (H // HM) * K * F, K, BK, F)
    f, column = tl.arange(0, F), tl.arange(0, BV)
    own, before = ((b * H + h) * chunks + c) * 2 * F, ((b * H + h) * runs + c // run) * 2 * F
    acc = tl.zeros([C, BV], tl.float32)
    for half in range(2):
        phi = softmax_rows((1.0 - 2.0 * half) * project_rows(rows, w, NORM)).to(states.dtype.element_ty)
        for part in range(2):
            place = tl.where(part == 0, own, before) + half * F
            state = (states if part == 0 else bases) + place * V + f[:, None] * V + column[None, :]
            acc = tl.dot(
                phi, tl.load(state, mask=(column < V)[None, :], other=0.0), acc, input_precision="ieee"
            )
    place = ((b * time + at) * H + h)[:, None] * V + column[None, :]
    tl.store(dv + place, acc.to(dv.dtype.element_ty), mask=there[:, None] & (column < V)[None, :])


def reverse_pieces(
    q: Tensor, w_q: Tensor, values: Tensor, e: Tensor, count: int, *, norm: bool, shape: dict[str, Any]
) -> Iterator[Piece]:
    """R and r piece after piece, from the end of a sequence."""
    (batch, time, heads), device, features = q.shape[:3], q.device, w_q.shape[2]
    kind = torch.float32 if q.dtype == torch.float32 else torch.bfloat16
    size = 2 * features * shape["V"]
    run = max(1, -(-count * batch * heads // PROGRAMS))
    most = max(1, PIECE_BYTES // (batch * heads * size * kind.itemsize * run)) * run
    exact: dict[str, Any] = dict(dtype=torch.float32, device=device)
    carry = torch.zeros(batch, heads, size, **exact), torch.zeros(batch, heads, 2 * features, **exact)
    constants: dict[str, Any] = {
        **{name: shape[name] for name in ("K", "V", "BK", "BV", "C")},
        **dict(H=heads, F=features, NORM=norm),
        **fitted(launch("selected_reverse", device), q, 1),
    }
    scanning: dict[str, Any] = dict(REVERSE=True, block=1024)
    for start in reversed(range(0, count, most)):
        chunks = min(most, count - start)
        runs = -(-chunks // run)
        states = torch.empty(batch, heads, chunks, size, dtype=kind, device=device)
        sums = torch.empty(batch, heads, chunks, 2 * features, **exact)
        totals = torch.empty(batch, heads, runs, size, **exact)
        total_sums = torch.empty(batch, heads, runs, 2 * features, **exact)
        reverse_kernel[(2 * heads, runs, batch)](
            q, w_q, values, e, states, sums, totals, total_sums, time, start, chunks, run,
            **strides_of(q=q), **constants,
        )  # fmt: skip
        bases, base_sums = torch.empty_like(totals, dtype=kind), torch.empty_like(total_sums)
        for x, base, along in ((totals, bases, carry[0]), (total_sums, base_sums, carry[1])):
            grid = (triton.cdiv(x.shape[3], 1024), batch * heads)
            bases_kernel[grid](x, base, along, runs, x.shape[3], **scanning)
        yield Piece(start, chunks, run, states, sums, bases, base_sums)


def through_map(x: Tensor, w: Tensor, db: Tensor, norm: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x [B, T, G, K] and w [heads, K, f] from those of b = x w [B, T, heads, f], in the dtype of x; with
    ``norm``, db is that of b |x| / |b|.

    Products are in the dtype of x, so that half precision has matrix instructions and fp32 copies of all tokens of all
    heads are none; what the norms need is fp32.
    """
    heads, groups, (batch, time) = len(w), x.shape[2], x.shape[:2]
    rows = x.flatten(0, 1).transpose(0, 1)  # [G, B T, K]
    matrix = w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)  # [G, K, heads / G f]
    d = db.to(x.dtype).flatten(0, 1).unflatten(1, (groups, -1)).flatten(2).transpose(0, 1)
    along = None
    with torch.autocast(x.device.type, enabled=False):
        if norm:
            b = torch.bmm(rows, matrix).unflatten(2, (-1, w.shape[2])).float()
            exact = d.unflatten(2, (-1, w.shape[2]))
            length = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)[:, :, None]
            size = torch.linalg.vector_norm(b, dim=-1)
            bounded = size.clamp_min(1e-12)
            inner = (exact * b).sum(dim=-1) / bounded
            share = torch.where(size < 1e-12, 0.0, inner / bounded)
            d = (exact - b * share[..., None]) * (length / bounded)[..., None]
            d = d.to(x.dtype).flatten(2)
            along = rows * (inner.sum(dim=2, keepdim=True) / length.clamp_min(1e-30)).to(x.dtype)
        dx = torch.bmm(d, matrix.transpose(1, 2))
        dw = torch.bmm(rows.transpose(1, 2), d)
    if along is not None:
        dx = dx + along
    dw = dw.unflatten(2, (heads // groups, -1)).transpose(1, 2).flatten(0, 1)
    return dx.transpose(0, 1).unflatten(0, (batch, time)), dw


def routed_backward(
    q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, score: Tensor, gate: Tensor | None,
    sets: Sets, y: Tensor, top: Tensor, den: Tensor, dy: Tensor,
    *, scale: float, chunk: int, norm: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of q, k, v, w_q, w_k and the gate, in their dtypes."""
    (batch, time, heads), groups, dy = q.shape[:3], k.shape[2], dy.contiguous()
    q, k, v = (in_rows(x) for x in (q, k, v))
    assert sets.left is not None
    select, count, picks = sets.index.shape[1], sets.index.shape[2], sets.left.shape[3]
    dq, dk, dv, delta = kept_backward(
        q, k, v, score, sets, y, top + den.log2(), dy, scale=scale, chunk=chunk, maximum=True
    )
    u = dy.float() / den.transpose(1, 2)[..., None]
    e = delta / den
    values = (u if gate is None else u * gate).to(q.dtype)
    shape = shape_of(q, k, v, GS=select, C=chunk, P=picks)
    device, features = q.device, w_q.shape[2]
    mapped: dict[str, Any] = {name: shape[name] for name in ("K", "V", "BK", "BV", "C", "GS", "P")}
    mapped |= dict(H=heads, F=features, NORM=norm, FEW=max(2, triton.next_power_of_2(picks)))

    def options(kernel: str) -> dict[str, Any]:
        return fitted(launch(kernel, device), q, 1)

    # Queries, from S and z.
    db_q = torch.empty(batch, time, heads, features, dtype=q.dtype, device=device)
    gated = None if gate is None else torch.empty_like(dy)
    exact: dict[str, Any] = dict(dtype=torch.float32, device=device)
    carry = (
        torch.zeros(batch, len(w_k), 2 * features, shape["V"], **exact),
        torch.zeros(batch, len(w_k), 2 * features, **exact),
    )
    last = torch.full((batch,), count, device=device)
    linear = {name: shape[name] for name in ("G", "R", "K", "V", "BK", "BV", "C")} | options(
        "selected_linear"
    )
    linear |= dict(HS=len(w_k), F=features, NORM=norm, GATE=shape["V"])
    of_queries = dict(HX=heads, HV=heads, HM=heads, HS=len(w_k), KEYS=False)
    value_strides = strides_of(v=values)
    for piece in pieces(
        k, v, w_k, sets, last, carry, norm=norm, shape=shape, options=options("selected_states")
    ):
        where = (time, count, piece.start, piece.chunks, piece.run, piece.bases.shape[2])
        x_strides = {f"x_{axis}": q.stride(i) for i, axis in enumerate("bth")}
        features_kernel[(heads, piece.chunks, batch)](
            q, w_q, values, e, sets.leave, sets.left, *piece.tensors, db_q, *where,
            **x_strides, **value_strides, **mapped, **of_queries, **options("selected_features"),
        )  # fmt: skip
        if gated is not None:
            linear_kernel[(heads, piece.chunks, batch)](
                q, w_q, u, *piece.tensors, gated, torch.empty_like(den),
                time, *where[2:], **strides_of(q=q), **linear,
            )  # fmt: skip

    # Keys, from R and r; what never turns linear has no part.
    db_k = torch.zeros(batch, time, heads, features, dtype=k.dtype, device=device)
    linear_dv = torch.zeros(batch, time, heads, shape["V"], dtype=v.dtype, device=device)
    of_keys = dict(HX=groups, HV=groups, HM=len(w_k), HS=heads, KEYS=True)
    for piece in reverse_pieces(q, w_q, values, e, count, norm=norm, shape=shape):
        where = (time, count, piece.start, piece.chunks, piece.run, piece.bases.shape[2])
        x_strides = {f"x_{axis}": k.stride(i) for i, axis in enumerate("bth")}
        features_kernel[(heads, piece.chunks, batch)](
            k, w_k, v, e, sets.leave, sets.left, *piece.tensors, db_k, *where,
            **x_strides, **strides_of(v=v), **mapped, **of_keys, **options("selected_features"),
        )  # fmt: skip
        values_kernel[(heads, piece.chunks, batch)](
            k, w_k, sets.leave, sets.left, piece.states, piece.bases, linear_dv, *where,
            **strides_of(k=k), **mapped, **dict[str, Any](G=groups, HM=len(w_k)), **options("selected_values"),
        )  # fmt: skip
    if len(w_k) < heads:
        db_k = db_k.unflatten(2, (len(w_k), -1)).sum(3, dtype=torch.float32)
    (more_q, dw_q), (more_k, dw_k) = through_map(q, w_q, db_q, norm), through_map(k, w_k, db_k, norm)
    dv = dv + linear_dv.unflatten(2, (groups, -1)).sum(3, dtype=torch.float32)
    dgate = None
    if gate is not None and gated is not None:
        dgate = (gated if gate.shape[3] > 1 else gated.sum(3, keepdim=True, dtype=torch.float32)).to(
            gate.dtype
        )
    done = [(dq + more_q, q), (dk + more_k, k), (dv, v), (dw_q, w_q), (dw_k, w_k)]
    return *(x.to(like.dtype) for x, like in done), dgate


class RoutedAttention(torch.autograd.Function):
    """y of ``routed_forward``, S and z. Saved: the inputs, y, two numbers a row, and the kept sets."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, score: Tensor, gate: Tensor | None,
        scale: float, chunk: int, picks: int, size: int, norm: bool, eps: float, lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        sets = running_sets(score, chunk=chunk, size=size, picks=picks)
        done = routed_forward(
            q, k, v, w_q, w_k, sets, gate, scale=scale, chunk=chunk, norm=norm, eps=eps, lengths=lengths
        )
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
        q, k, v, w_q, w_k, score, gate, y, top, den, index, leave, lists, left = ctx.saved_tensors
        sets = Sets(index, leave, lists, ctx.segment, left)
        *found, dgate = routed_backward(
            q, k, v, w_q, w_k, score, gate, sets, y, top, den, gradients[0], **ctx.terms
        )
        return *found, None, dgate, *[None] * 7
