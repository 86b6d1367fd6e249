"""STILL's attention, ``routing.routed_chunked`` after the feature maps, forward.

    y = ( sum_E exp(e - m) v + g * (phi_q S) ) / ( sum_E exp(e - m) + phi_q z + eps ),   S, z sums over the linear tokens

Selection says of every token with which chunk it turns linear (``triton_selected``): most with the second chunk after
their own, in which they are one dense block under a mask, and those that were kept until then with a later one, a few
to a chunk, in a list. Three kernels:

1. parts     S and z of the tokens that turn linear with EVERY chunks, features in registers
2. scan      their prefix sums, in fp32: what the first chunk of each such span reads
3. outputs   a program takes a chunk's queries of one head: softmax over the kept and the local keys, then, in the same
             accumulator, the state and the tokens that turned linear inside the span

One accumulator serves both: it is divided by the gate before the linear part joins and multiplied after. States are
bf16 for 16-bit inputs, fp16's included, whose range a long sum would leave.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import Launch, launch
from .triton_common import hedgehog_columns, hedgehog_rows
from .triton_selected import Sets, running_sets
from .triton_selected_kept import (
    LOG2E,
    MASKED,
    attend,
    fitted,
    in_rows,
    odd_slots,
    position_of,
    rows_at,
    shape_of,
    strides_of,
)


@triton.jit
def map_rows(x, w, NORM: tl.constexpr):
    """Both halves of phi [tokens, f] of x [tokens, K] by w [K, f]; NORM: of a vector as long as x."""
    a = tl.dot(x, w, input_precision="ieee")
    if NORM:
        x = x.to(tl.float32)
        length = tl.maximum(tl.sqrt(tl.sum(a * a, 1)), 1e-12)
        a *= (tl.sqrt(tl.sum(x * x, 1)) / length)[:, None]
    return hedgehog_rows(a)


@triton.jit
def map_columns(x, w, NORM: tl.constexpr):
    """Both halves of phi^T [f, tokens] of x [tokens, K] by w [K, f], whose product is formed transposed."""
    a = tl.dot(tl.trans(w), tl.trans(x), input_precision="ieee")
    if NORM:
        x = x.to(tl.float32)
        length = tl.maximum(tl.sqrt(tl.sum(a * a, 0)), 1e-12)
        a *= (tl.sqrt(tl.sum(x * x, 1)) / length)[None, :]
    return hedgehog_columns(a)


@triton.jit
def load_map(w, K: tl.constexpr, BK: tl.constexpr, F: tl.constexpr):
    """[BK, f] of a matrix [K, f]."""
    d, f = tl.arange(0, BK), tl.arange(0, F)
    return tl.load(w + d[:, None] * F + f[None, :], mask=(d < K)[:, None], other=0.0)


@triton.jit
def turning(leave, left, e, j, C: tl.constexpr, P: tl.constexpr, DENSE: tl.constexpr):
    """Positions of the j-th tokens that turn linear with chunks from e on, -1 for none: DENSE, tokens of chunk e - 2
    as they leave the local span (j below C); else those that were kept until then (P a chunk)."""
    if DENSE:
        t = (e - 2) * C + j
        since = tl.load(leave + t, mask=(j < C) & (e >= 2), other=0)
        return tl.where((j < C) & (e >= 2) & (since <= e), t, -1)
    return tl.load(left + e * P + j)


@triton.jit
def add_to_state(
    k, v, w, at, k_t, v_t, plus, minus, z_plus, z_minus,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """S and z, both halves, with the tokens at positions ``at``."""
    there = at >= 0
    values = rows_at(v, at, v_t, there, V, BV)
    one, other = map_columns(rows_at(k, at, k_t, there, K, BK), w, NORM)
    one, other = tl.where(there[None, :], one, 0.0), tl.where(there[None, :], other, 0.0)
    plus = tl.dot(one.to(values.dtype), values, plus, input_precision="ieee")
    minus = tl.dot(other.to(values.dtype), values, minus, input_precision="ieee")
    return plus, minus, z_plus + tl.sum(one, 1), z_minus + tl.sum(other, 1)


@triton.jit(do_not_specialize=["time", "count"])
def parts_kernel(
    k, v, w, leave, left, states, sums, time, count,
    k_b, k_t, k_h, v_b, v_t, v_h,
    HS: tl.constexpr, GS: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, F: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    NORM: tl.constexpr, EVERY: tl.constexpr, BLOCK: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """states [B, Hs, N, 2 f, V] and sums [B, Hs, N, 2 f] of each span of EVERY chunks; grid (Hs, N, B)."""
    h, s, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    spans, routes = tl.num_programs(1), b * GS + h // (HS // GS)
    leave += routes * time
    left += routes * count * P
    k += b * k_b + h // (HS // G) * k_h
    v += b * v_b + h // (HS // G) * v_h
    w = load_map(w + h * K * F, K, BK, F)
    plus = tl.zeros([F, BV], tl.float32)
    minus = tl.zeros([F, BV], tl.float32)
    z_plus = tl.zeros([F], tl.float32)
    z_minus = tl.zeros([F], tl.float32)
    first, stop = s * EVERY + 1, tl.minimum((s + 1) * EVERY + 1, count)
    blocks: tl.constexpr = C // BLOCK
    for step in range(0, tl.maximum(stop - first, 0) * blocks):
        at = turning(
            leave, left, first + step // blocks, step % blocks * BLOCK + tl.arange(0, BLOCK), C, P, True
        )
        plus, minus, z_plus, z_minus = add_to_state(
            k, v, w, at, k_t, v_t, plus, minus, z_plus, z_minus, K, V, BK, BV, NORM
        )
    j = tl.arange(0, FEW)
    for start in range(0, tl.maximum(stop - first, 0) * P, FEW):
        inside = start + j < (stop - first) * P
        late = tl.load(left + first * P + start + j, mask=inside, other=-1)
        plus, minus, z_plus, z_minus = add_to_state(
            k, v, w, late, k_t, v_t, plus, minus, z_plus, z_minus, K, V, BK, BV, NORM
        )
    f, e = tl.arange(0, F), tl.arange(0, BV)
    at = (b * HS + h) * spans + s
    place = at * 2 * F * V + f[:, None] * V + e[None, :]
    tl.store(states + place, plus.to(states.dtype.element_ty), mask=(e < V)[None, :])
    tl.store(states + place + F * V, minus.to(states.dtype.element_ty), mask=(e < V)[None, :])
    tl.store(sums + at * 2 * F + f, z_plus)
    tl.store(sums + at * 2 * F + F + f, z_minus)


@triton.jit(do_not_specialize=["spans", "size"])
def scan_kernel(x, spans, size, REVERSE: tl.constexpr, block: tl.constexpr):
    """x [heads, spans, size] in place: the sum of all spans before each (REVERSE: after it); grid (tiles, heads)."""
    i = tl.program_id(0) * block + tl.arange(0, block)
    x += tl.program_id(1).to(tl.int64) * spans * size
    total = tl.zeros([block], tl.float32)
    for step in range(0, spans):
        s = spans - 1 - step if REVERSE else step
        at = x + tl.cast(s, tl.int64) * size + i
        new = tl.load(at, mask=i < size, other=0.0).to(tl.float32)
        tl.store(at, total.to(x.dtype.element_ty), mask=i < size)
        total += new


@triton.jit
def add_linear(
    one, other, k, v, w, at, k_t, v_t, y, total,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Numerator and denominator with the linear tokens at positions ``at``; one, other: the halves of phi_q."""
    there = at >= 0
    plus, minus = map_columns(rows_at(k, at, k_t, there, K, BK), w, NORM)
    a = tl.dot(one, plus.to(one.dtype), input_precision="ieee")
    a = tl.where(there[None, :], tl.dot(other, minus.to(one.dtype), a, input_precision="ieee"), 0.0)
    values = rows_at(v, at, v_t, there, V, BV)
    return tl.dot(a.to(values.dtype), values, y, input_precision="ieee"), total + tl.sum(a, 1)


@triton.jit(do_not_specialize=["time", "n", "odd", "count", "spans"])
def outputs_kernel(
    q, k, v, w_q, w_k, gate, index, leave, left, states, sums, y, top, den, time, n, odd, count, spans, scale,
    eps, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    HS: tl.constexpr, GS: tl.constexpr, G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, F: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    GATE: tl.constexpr, NORM: tl.constexpr, EVERY: tl.constexpr, BLOCK: tl.constexpr, FEW: tl.constexpr,
    TAIL: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    """y [B, T, H, V], the row maximum (in powers of two) and the denominator [B, H, T]; grid (H, N, B). GATE: width of
    the gate, 0 for none."""
    H: tl.constexpr = G * R
    h, c, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = c * C + tl.arange(0, C)
    routes, hs = b * GS + h // (H // GS), h // (H // HS)
    k += b * k_b + h // R * k_h
    v += b * v_b + h // R * v_h
    queries = rows_at(q + b * q_b + h * q_h, t, q_t, t < time, K, BK)
    index += (routes * count + c) * n
    leave += routes * time
    left += routes * count * P

    m = tl.full([C], MASKED, tl.float32)
    total = tl.zeros([C], tl.float32)
    acc = tl.zeros([C, BV], tl.float32)
    filled = tl.minimum(n, tl.maximum(c - 1, 0) * P)
    older = tl.maximum(c - 1, 0) * C
    stop = filled + tl.minimum((c + 1) * C, time) - older
    first = tl.minimum(filled, odd)
    if TAIL > 0:
        odd_ones = position_of(index, tl.arange(0, TAIL), first, older, 0)
        m, total, acc = attend(queries, k, v, odd_ones, t, m, total, acc, k_t, v_t, scale, K, V, BK, BV)
    for start in range(first, stop, keys):
        exact = position_of(index, start + tl.arange(0, keys), filled, older, stop)
        m, total, acc = attend(queries, k, v, exact, t, m, total, acc, k_t, v_t, scale, K, V, BK, BV)

    e = tl.arange(0, BV)
    row = (b * time + t) * H + h
    wide = (t < time)[:, None] & (e < V)[None, :]
    if GATE > 0:
        at_gate = gate + row[:, None] * GATE + (e[None, :] if GATE > 1 else 0)
        # What is tiny stays tiny: below this the linear part is nothing beside an exact one of at least 1.
        acc /= tl.maximum(tl.load(at_gate, mask=wide, other=1.0).to(tl.float32), 1e-20)
    if c >= 2:
        one, other = map_rows(queries, load_map(w_q + h * K * F, K, BK, F), NORM)
        f = tl.arange(0, F)
        span = c // EVERY
        at = (b * HS + hs) * spans + span
        z = sums + at * 2 * F + f
        total += tl.sum(one * tl.load(z)[None, :], 1) + tl.sum(other * tl.load(z + F)[None, :], 1)
        place = states + at * 2 * F * V + f[:, None] * V + e[None, :]
        state = tl.load(place, mask=(e < V)[None, :], other=0.0)
        acc = tl.dot(one.to(state.dtype), state, acc, input_precision="ieee")
        state = tl.load(place + F * V, mask=(e < V)[None, :], other=0.0)
        acc = tl.dot(other.to(state.dtype), state, acc, input_precision="ieee")
        if EVERY > 1:
            one, other = one.to(queries.dtype), other.to(queries.dtype)
            w = load_map(w_k + hs * K * F, K, BK, F)
            begin = span * EVERY + 1
            blocks: tl.constexpr = C // BLOCK
            for step in range(0, (c + 1 - begin) * blocks):
                dense = turning(
                    leave,
                    left,
                    begin + step // blocks,
                    step % blocks * BLOCK + tl.arange(0, BLOCK),
                    C,
                    P,
                    True,
                )
                acc, total = add_linear(one, other, k, v, w, dense, k_t, v_t, acc, total, K, V, BK, BV, NORM)
            if P > 0 and begin <= c:
                j = tl.arange(0, FEW)
                late = tl.load(left + begin * P + j, mask=j < (c + 1 - begin) * P, other=-1)
                acc, total = add_linear(one, other, k, v, w, late, k_t, v_t, acc, total, K, V, BK, BV, NORM)
    total += eps
    acc /= total[:, None]
    if GATE > 0:
        at_gate = gate + row[:, None] * GATE + (e[None, :] if GATE > 1 else 0)
        acc *= tl.maximum(tl.load(at_gate, mask=wide, other=1.0).to(tl.float32), 1e-20)
    tl.store(y + row[:, None] * V + e[None, :], acc.to(y.dtype.element_ty), mask=wide)
    place = (b * H + h) * time + t
    tl.store(top + place, m, mask=t < time)
    tl.store(den + place, total, mask=t < time)


class Routed(NamedTuple):
    """The forward pass, and what a backward pass reads of it."""

    y: Tensor
    top: Tensor
    """[B, H, T] the row maximum over the exact keys, of scores in powers of two."""
    den: Tensor
    """[B, H, T] the denominator."""
    states: Tensor
    """[B, Hs, N, 2 f, V] and sums [B, Hs, N, 2 f]: what was linear when each span of chunks began."""
    sums: Tensor
    sets: Sets


def routed_forward(
    q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, sets: Sets, gate: Tensor | None = None,
    *, scale: float, chunk: int, norm: bool, eps: float, settings: dict[str, Launch] | None = None,
) -> Routed:  # fmt: skip
    """w_q [H, K, f], w_k [Hs, K, f] contiguous and in the dtype of q; gate [B, T, H, V or 1]; ``norm``: STILL's map,
    where it is false Hedgehog's."""
    batch, time, heads = q.shape[:3]
    q, k, v = (in_rows(x) for x in (q, k, v))
    gate = None if gate is None else gate.contiguous()
    assert sets.left is not None
    select, count, n, picks = (
        sets.index.shape[1],
        sets.index.shape[2],
        sets.index.shape[3],
        sets.left.shape[3],
    )
    shape = shape_of(
        q, k, v, HS=len(w_k), GS=select, F=w_q.shape[2], C=chunk, P=picks, NORM=norm, BLOCK=min(chunk, 64)
    )
    device = q.device

    def options(kernel: str) -> dict[str, Any]:
        return fitted((settings or {}).get(kernel) or launch(kernel, device), q, shape["R"])

    chosen = options("selected_outputs")
    every = chosen["EVERY"]
    spans = -(-count // every)
    kind = torch.float32 if q.dtype == torch.float32 else torch.bfloat16
    states = torch.empty(batch, shape["HS"], spans, 2 * shape["F"], shape["V"], dtype=kind, device=device)
    sums = torch.empty(batch, shape["HS"], spans, 2 * shape["F"], dtype=torch.float32, device=device)
    few = max(16, triton.next_power_of_2((every - 1) * picks))
    making = {**{x: y for x, y in shape.items() if x != "R"}, **options("selected_parts"), "FEW": few}
    making["EVERY"] = every
    parts_kernel[(shape["HS"], spans, batch)](
        k, v, w_k, sets.leave, sets.left, states, sums, time, count, **strides_of(k=k, v=v), **making
    )
    scanning: dict[str, Any] = dict(REVERSE=False, block=1024)
    for x in (states, sums):
        size = x[0, 0, 0].numel()
        scan_kernel[(triton.cdiv(size, 1024), batch * shape["HS"])](x, spans, size, **scanning)
    y = torch.empty(batch, time, heads, shape["V"], dtype=v.dtype, device=device)
    top, den = (torch.empty(batch, heads, time, dtype=torch.float32, device=device) for _ in range(2))
    odd, chosen["TAIL"] = odd_slots(n, chosen["keys"])
    chosen |= dict(GATE=0 if gate is None else gate.shape[3], FEW=few)
    outputs_kernel[(heads, count, batch)](
        q, k, v, w_q, w_k, q if gate is None else gate, sets.index, sets.leave, sets.left, states, sums,
        y, top, den, time, n, odd, count, spans, scale * LOG2E, eps,
        **strides_of(q=q, k=k, v=v), **shape, **chosen,
    )  # fmt: skip
    return Routed(y, top, den, states, sums, sets)


def routed_attention(
    q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, score: Tensor, gate: Tensor | None = None,
    *, scale: float, chunk: int, picks: int, size: int, norm: bool, eps: float,
) -> Tensor:  # fmt: skip
    """``routing.routed_chunked`` from nothing, of features that the matrices w make."""
    sets = running_sets(score.detach(), chunk=chunk, size=size, picks=picks)
    w_q, w_k = (w.to(q.dtype).contiguous() for w in (w_q, w_k))
    return routed_forward(q, k, v, w_q, w_k, sets, gate, scale=scale, chunk=chunk, norm=norm, eps=eps).y
