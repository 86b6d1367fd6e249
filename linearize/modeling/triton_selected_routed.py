"""STILL's attention, ``routing.routed_chunked`` after the feature maps, forward.

    y = ( sum_E exp(e - m) v + g * (phi_q S) ) / ( sum_E exp(e - m) + phi_q z + eps ),   S, z: sums of linear tokens

Selection says of every token with which chunk it turns linear (``triton_selected``): most with the second chunk after
their own, in which they are one dense block under a mask, and those that were kept until then with a later one, a few
to a chunk, in a list. Three kernels:

1. parts     S and z of the tokens that turn linear with EVERY chunks, features in registers
2. scan      their prefix sums, in fp32: what the first chunk of each such span reads
3. linear    g phi_q S and phi_q z of a chunk's queries: the state's part, and the tokens that turned since
4. outputs   softmax over the kept and the local keys, and the quotient

The last two are apart because their registers do not fit together; what passes between them is in v's dtype. States are
bf16 for 16-bit inputs, fp16's included, whose range a long sum would leave.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import Launch, launch
from .triton_common import hedgehog_columns
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
def project_rows(x, w, NORM: tl.constexpr):
    """a [tokens, f] of x [tokens, K] by w [K, f]; NORM: as long as x is."""
    a = tl.dot(x, w, input_precision="ieee")
    if NORM:
        x = x.to(tl.float32)
        length = tl.maximum(tl.sqrt(tl.sum(a * a, 1)), 1e-12)
        a *= (tl.sqrt(tl.sum(x * x, 1)) / length)[:, None]
    return a


@triton.jit
def softmax_rows(a):
    weights = tl.exp2((a - tl.max(a, 1)[:, None]) * 1.4426950408889634)
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def project_columns(x, w, NORM: tl.constexpr):
    """a^T [f, tokens], formed transposed."""
    a = tl.dot(tl.trans(w), tl.trans(x), input_precision="ieee")
    if NORM:
        x = x.to(tl.float32)
        length = tl.maximum(tl.sqrt(tl.sum(a * a, 0)), 1e-12)
        a *= (tl.sqrt(tl.sum(x * x, 1)) / length)[None, :]
    return a


@triton.jit
def softmax_columns(a):
    weights = tl.exp2((a - tl.max(a, 0)[None, :]) * 1.4426950408889634)
    return weights / tl.sum(weights, 0)[None, :]


@triton.jit
def load_map(w, K: tl.constexpr, BK: tl.constexpr, F: tl.constexpr):
    """[BK, f] of a matrix [K, f]."""
    d, f = tl.arange(0, BK), tl.arange(0, F)
    if K == BK:
        return tl.load(w + d[:, None] * F + f[None, :])
    return tl.load(w + d[:, None] * F + f[None, :], mask=(d < K)[:, None], other=0.0)


@triton.jit
def turning(leave, e, j, C: tl.constexpr):
    """Positions of the j-th tokens of chunk e - 2 that turn linear with chunk e, as they leave the local span; -1 for
    none."""
    t = (e - 2) * C + j
    since = tl.load(leave + t, mask=t >= 0, other=2147483647)
    return tl.where(since <= e, t, -1)


@triton.jit
def add_to_state(
    k, v, w, at, k_t, v_t, plus, minus, z_plus, z_minus,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """S and z, both halves, with the tokens at positions ``at``."""
    there = at >= 0
    values = rows_at(v, at, v_t, there, V, BV)
    one, other = hedgehog_columns(project_columns(rows_at(k, at, k_t, there, K, BK), w, NORM))
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
    NORM: tl.constexpr, EVERY: tl.constexpr, FEW: tl.constexpr, block: tl.constexpr,
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
    blocks: tl.constexpr = C // block
    for step in range(0, tl.maximum(stop - first, 0) * blocks):
        at = turning(leave, first + step // blocks, step % blocks * block + tl.arange(0, block), C)
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
    phi, k, v, w, at, sign, k_t, v_t, y, total,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Numerator and denominator with one half of the features of the linear tokens at positions ``at``."""
    there = at >= 0
    features = softmax_columns(sign * project_columns(rows_at(k, at, k_t, there, K, BK), w, NORM))
    a = tl.dot(phi, features.to(phi.dtype), input_precision="ieee")
    a = tl.where(there[None, :], a, 0.0)
    values = rows_at(v, at, v_t, there, V, BV)
    return tl.dot(a.to(values.dtype), values, y, input_precision="ieee"), total + tl.sum(a, 1)


@triton.jit(do_not_specialize=["time", "count", "spans"])
def linear_kernel(
    q, k, v, w_q, w_k, gate, leave, left, states, sums, y, mass, time, count, spans,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    HS: tl.constexpr, GS: tl.constexpr, G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, F: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    GATE: tl.constexpr, NORM: tl.constexpr, EVERY: tl.constexpr, FEW: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """y [B, T, H, V] the gated linear numerator, mass [B, H, T] its denominator; grid (H, N, B). GATE: width of the
    gate, 0 for none."""
    H: tl.constexpr = G * R
    h, c, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = c * C + tl.arange(0, C)
    routes, hs = b * GS + h // (H // GS), h // (H // HS)
    k += b * k_b + h // R * k_h
    v += b * v_b + h // R * v_h
    queries = rows_at(q + b * q_b + h * q_h, t, q_t, t < time, K, BK)
    leave += routes * time
    left += routes * count * P
    w = load_map(w_q + h * K * F, K, BK, F)
    w_keys = load_map(w_k + hs * K * F, K, BK, F)
    f, e = tl.arange(0, F), tl.arange(0, BV)
    span = c // EVERY
    begin = span * EVERY + 1
    at = (b * HS + hs) * spans + span
    acc = tl.zeros([C, BV], tl.float32)
    total = tl.zeros([C], tl.float32)
    # Half by half in a loop that makes the features anew: both halves, or both states, do not fit in registers.
    for half in range(2):
        sign = 1.0 - 2.0 * half
        phi = softmax_rows(sign * project_rows(queries, w, NORM))
        total += tl.sum(phi * tl.load(sums + (at * 2 + half) * F + f)[None, :], 1)
        place = states + (at * 2 + half) * F * V + f[:, None] * V + e[None, :]
        state = tl.load(place) if V == BV else tl.load(place, mask=(e < V)[None, :], other=0.0)
        acc = tl.dot(phi.to(state.dtype), state, acc, input_precision="ieee")
    if EVERY > 1 and begin <= c:
        blocks: tl.constexpr = C // block
        for half in range(2):
            sign = 1.0 - 2.0 * half
            narrow = softmax_rows(sign * project_rows(queries, w, NORM)).to(queries.dtype)
            for step in range(0, (c + 1 - begin) * blocks):
                j = step % blocks * block + tl.arange(0, block)
                dense = turning(leave, begin + step // blocks, j, C)
                acc, total = add_linear(
                    narrow, k, v, w_keys, dense, sign, k_t, v_t, acc, total, K, V, BK, BV, NORM
                )
            if P > 0:
                few = tl.arange(0, FEW)
                late = tl.load(left + begin * P + few, mask=few < (c + 1 - begin) * P, other=-1)
                acc, total = add_linear(
                    narrow, k, v, w_keys, late, sign, k_t, v_t, acc, total, K, V, BK, BV, NORM
                )
    row = (b * time + t) * H + h
    wide = (t < time)[:, None] & (e < V)[None, :]
    if GATE > 0:
        at_gate = gate + row[:, None] * GATE + (e[None, :] if GATE > 1 else 0)
        acc *= tl.load(at_gate, mask=wide, other=0.0).to(tl.float32)
    tl.store(y + row[:, None] * V + e[None, :], acc.to(y.dtype.element_ty), mask=wide)
    tl.store(mass + (b * H + h) * time + t, total, mask=t < time)


@triton.jit(do_not_specialize=["time", "n", "odd", "count"])
def outputs_kernel(
    q, k, v, index, linear, mass, y, top, den, time, n, odd, count, scale, eps,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    GS: tl.constexpr, G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, P: tl.constexpr, TAIL: tl.constexpr,
    heads: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    """y [B, T, H, V], the row maximum (in powers of two) and the denominator [B, H, T]; grid (Gs x head blocks, N, B),
    as heads that select together share a program."""
    H: tl.constexpr = G * R
    PER: tl.constexpr = H // GS
    parts: tl.constexpr = (PER + heads - 1) // heads
    select, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    c, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    r = tl.arange(0, heads * C)
    inner, t = part * heads + r // C, c * C + r % C
    head, live = select * PER + inner, (inner < PER) & (t < time)
    k += b * k_b + select * PER // R * k_h
    v += b * v_b + select * PER // R * v_h
    d, e = tl.arange(0, BK), tl.arange(0, BV)
    base = q + b * q_b + (t.to(tl.int64) * q_t + head * q_h)[:, None]
    mask = live[:, None] if K == BK else live[:, None] & (d < K)[None, :]
    queries = tl.load(base + d[None, :], mask=mask, other=0.0)
    index += ((b * GS + select) * count + c) * n

    m = tl.full([heads * C], MASKED, tl.float32)
    total = tl.zeros([heads * C], tl.float32)
    acc = tl.zeros([heads * C, BV], tl.float32)
    filled = tl.minimum(n, tl.maximum(c - 1, 0) * P)
    older = tl.maximum(c - 1, 0) * C
    stop = filled + tl.minimum((c + 1) * C, time) - older
    first = tl.minimum(filled, odd)
    if TAIL > 0:
        odd_ones = position_of(index, tl.arange(0, TAIL), first, older, 0)
        m, total, acc = attend(queries, k, v, odd_ones, t, m, total, acc, k_t, v_t, scale, K, V, BK, BV)
    for start in range(first, stop, keys):
        at = position_of(index, start + tl.arange(0, keys), filled, older, stop)
        m, total, acc = attend(queries, k, v, at, t, m, total, acc, k_t, v_t, scale, K, V, BK, BV)

    mask = live[:, None] if V == BV else live[:, None] & (e < V)[None, :]
    row = ((b * time + t) * H + head)[:, None] * V + e[None, :]
    place = (b * H + head) * time + t
    total += eps
    if c >= 2:
        total += tl.load(mass + place, mask=live, other=0.0)
        acc += tl.load(linear + row, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row, (acc / total[:, None]).to(y.dtype.element_ty), mask=mask)
    tl.store(top + place, m, mask=live)
    tl.store(den + place, total, mask=live)


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
    shape = shape_of(q, k, v, GS=select, C=chunk, P=picks)
    mapped = {**shape, **dict[str, Any](HS=len(w_k), F=w_q.shape[2], NORM=norm)}
    device, strides = q.device, strides_of(q=q, k=k, v=v)

    def options(kernel: str, shared: int = 1) -> dict[str, Any]:
        made = fitted((settings or {}).get(kernel) or launch(kernel, device), q, shared)
        if "block" in made:
            made["block"] = min(made["block"], chunk)
        return made

    # What each span of chunks begins with.
    chosen = options("selected_linear")
    every = chosen["EVERY"]
    spans = -(-count // every)
    few: dict[str, Any] = dict(FEW=max(16, triton.next_power_of_2((every - 1) * picks)))
    kind = torch.float32 if q.dtype == torch.float32 else torch.bfloat16
    states = torch.empty(batch, len(w_k), spans, 2 * mapped["F"], shape["V"], dtype=kind, device=device)
    sums = torch.empty(batch, len(w_k), spans, 2 * mapped["F"], dtype=torch.float32, device=device)
    making = {name: x for name, x in mapped.items() if name != "R"} | few | options("selected_parts")
    making["EVERY"] = every
    parts_kernel[(len(w_k), spans, batch)](
        k, v, w_k, sets.leave, sets.left, states, sums, time, count, **strides_of(k=k, v=v), **making
    )
    scanning: dict[str, Any] = dict(REVERSE=False, block=1024)
    for x in (states, sums):
        size = x[0, 0, 0].numel()
        scan_kernel[(triton.cdiv(size, 1024), batch * len(w_k))](x, spans, size, **scanning)

    y = torch.empty(batch, time, heads, shape["V"], dtype=v.dtype, device=device)
    linear = torch.empty_like(y)
    mass, top, den = (torch.empty(batch, heads, time, dtype=torch.float32, device=device) for _ in range(3))
    chosen |= few | dict(GATE=0 if gate is None else gate.shape[3])
    linear_kernel[(heads, count, batch)](
        q, k, v, w_q, w_k, q if gate is None else gate, sets.leave, sets.left, states, sums, linear, mass,
        time, count, spans, **strides, **mapped, **chosen,
    )  # fmt: skip
    chosen = options("selected_outputs", heads // select)
    odd, chosen["TAIL"] = odd_slots(n, chosen["keys"])
    grid = (select * triton.cdiv(heads // select, chosen["heads"]), count, batch)
    outputs_kernel[grid](
        q, k, v, sets.index, linear, mass, y, top, den, time, n, odd, count, scale * LOG2E, eps,
        **strides, **shape, **chosen,
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
