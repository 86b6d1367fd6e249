"""STILL's attention, ``routing.routed_chunked`` after the feature maps, forward.

    y = ( sum_E exp(e - m) v + g * (phi_q S) ) / ( sum_E exp(e - m) + phi_q z + eps ),   S, z: sums of linear tokens

Selection says of every token with which chunk it turns linear (``triton_selected``): most with the second chunk after
their own, and those that were kept until then with a later one; there are no more of these than the chunk has tokens
that are kept now, so that they take their places in its tile. Four kernels:

1. states    a program walks a run of chunks and leaves S and z of each, counted from the run's beginning
2. bases     the sums of all runs before each, in fp32
3. linear    g phi_q S and phi_q z of a chunk's queries, from both
4. outputs   softmax over the kept and the local keys, and the quotient

The last two are apart because their registers do not fit together; what passes between them is in v's dtype. States are
bf16 for 16-bit inputs, fp16's included, whose range a long sum would leave. A state for every chunk is much (32 KiB a
token and layer at Llama-3-8B's widths): a long sequence goes piece by piece.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import Launch, launch
from .triton_selected import Sets
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
from .triton_together import compiled_together

PROGRAMS = 512
"""About as many programs walk runs of chunks: some for each multiprocessor of a large GPU."""
PIECE_BYTES = 1 << 30
"""Most bytes of states at a time."""


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
def turning(leave, left, e, C: tl.constexpr, P: tl.constexpr, FEW: tl.constexpr):
    """Positions [C] of the tokens that turn linear with chunk e, -1 for none: those of chunk e - 2, where one is kept
    instead another that was kept until now, and P of these at most are listed in ``left``."""
    t = (e - 2) * C + tl.arange(0, C)
    since = tl.load(leave + t, mask=t >= 0, other=0)
    stays = (since > e).to(tl.int32)
    if P > 0:
        j = tl.arange(0, FEW)
        late = tl.load(left + e * P + j, mask=j < P, other=-1)
        listed = (late >= 0).to(tl.int32)
        place, order = tl.cumsum(stays, 0) - stays, tl.cumsum(listed, 0) - listed
        taken = (order[None, :] == place[:, None]) & (late >= 0)[None, :]
        other = tl.sum(tl.where(taken, late[None, :] + 1, 0), 1) - 1
        t = tl.where(stays > 0, other, t)
    return tl.maximum(t, -1)


@triton.jit(do_not_specialize=["time", "count", "start", "chunks", "run"])
def states_kernel(
    k, v, w, leave, left, last, states, sums, totals, total_sums, time, count, start, chunks, run,
    k_b, k_t, k_h, v_b, v_t, v_h,
    HS: tl.constexpr, GS: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, F: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    FEW: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """states [B, Hs, N, 2, f, V] and sums [B, Hs, N, 2, f] of ``chunks`` chunks from ``start`` on, each from the
    beginning of its run, and whole runs in totals [B, Hs, runs, 2, f, V] and total_sums fp32; grid (2 Hs, runs, B), a
    program for each half of the features. Nothing turns linear after chunk ``last`` [B] of a row."""
    half, h = tl.program_id(0) % 2, tl.program_id(0) // 2
    r, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    runs, routes = tl.num_programs(1), b * GS + h // (HS // GS)
    leave += routes * time
    left += routes * count * P
    k += b * k_b + h // (HS // G) * k_h
    v += b * v_b + h // (HS // G) * v_h
    last = tl.load(last + b).to(tl.int32)
    f, e = tl.arange(0, F), tl.arange(0, BV)
    w = load_map(w + h * K * F, K, BK, F)
    state = tl.zeros([F, BV], tl.float32)
    z = tl.zeros([F], tl.float32)
    inside = f[:, None] * V + e[None, :]
    for c in range(r * run, tl.minimum((r + 1) * run, chunks)):
        at = turning(leave, left, start + c, C, P, FEW)
        at = tl.where(start + c <= last, at, -1)
        there = at >= 0
        values = rows_at(v, at, v_t, there, V, BV)
        a = project_columns(rows_at(k, at, k_t, there, K, BK), w, NORM)
        phi = tl.where(there[None, :], softmax_columns(tl.where(half == 0, a, -a)), 0.0)
        state = tl.dot(phi.to(values.dtype), values, state, input_precision="ieee")
        z += tl.sum(phi, 1)
        place = (((b * HS + h) * chunks + c) * 2 + half) * F
        tl.store(states + place * V + inside, state.to(states.dtype.element_ty), mask=(e < V)[None, :])
        tl.store(sums + place + f, z)
    place = (((b * HS + h) * runs + r) * 2 + half) * F
    tl.store(totals + place * V + inside, state, mask=(e < V)[None, :])
    tl.store(total_sums + place + f, z)


@triton.jit(do_not_specialize=["runs", "size"])
def bases_kernel(x, base, carry, runs, size, REVERSE: tl.constexpr, block: tl.constexpr):
    """base [heads, runs, size] = carry [heads, size] and the sums x of all runs before (REVERSE: after) each; carry
    then has them all; grid (tiles, heads)."""
    i = tl.program_id(0) * block + tl.arange(0, block)
    head = tl.program_id(1).to(tl.int64)
    total = tl.load(carry + head * size + i, mask=i < size, other=0.0)
    for step in range(0, runs):
        r = runs - 1 - step if REVERSE else step
        at = (head * runs + r) * size + i
        tl.store(base + at, total.to(base.dtype.element_ty), mask=i < size)
        total += tl.load(x + at, mask=i < size, other=0.0)
    tl.store(carry + head * size + i, total, mask=i < size)


@triton.jit(do_not_specialize=["time", "start", "chunks", "run", "runs"])
def linear_kernel(
    q, w, gate, states, sums, bases, base_sums, y, mass, time, start, chunks, run, runs, q_b, q_t, q_h,
    HS: tl.constexpr, G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, F: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """y [B, T, H, V] the gated linear numerator, mass [B, H, T] its denominator, of ``chunks`` chunks from ``start``
    on; grid (H, chunks, B). GATE: width of the gate, 0 for none."""
    H: tl.constexpr = G * R
    h, c, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = (start + c) * C + tl.arange(0, C)
    queries = rows_at(q + b * q_b + h * q_h, t, q_t, t < time, K, BK)
    w = load_map(w + h * K * F, K, BK, F)
    f, e = tl.arange(0, F), tl.arange(0, BV)
    head = b * HS + h // (H // HS)
    own, before = (head * chunks + c) * 2 * F, (head * runs + c // run) * 2 * F
    acc = tl.zeros([C, BV], tl.float32)
    total = tl.zeros([C], tl.float32)
    # Half by half in a loop that makes the features anew: both halves, or two states, do not fit in registers.
    for half in range(2):
        phi = softmax_rows((1.0 - 2.0 * half) * project_rows(queries, w, NORM))
        z = tl.load(sums + own + half * F + f) + tl.load(base_sums + before + half * F + f)
        total += tl.sum(phi * z[None, :], 1)
        narrow = phi.to(states.dtype.element_ty)
        for part in range(2):
            place = tl.where(part == 0, own, before) + half * F
            state = (states if part == 0 else bases) + place * V + f[:, None] * V + e[None, :]
            acc = tl.dot(
                narrow, tl.load(state, mask=(e < V)[None, :], other=0.0), acc, input_precision="ieee"
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
    kv: Tensor
    """[B, Hs, 2 f, V] fp32, the sum of phi_k v^T over all that has turned linear with the last chunk of each row."""
    z: Tensor
    """[B, Hs, 2 f] fp32, the sum of their phi_k."""


class Piece(NamedTuple):
    """The linear states of some chunks: of each from its run's beginning, and of all before each run."""

    start: int
    chunks: int
    run: int
    states: Tensor
    sums: Tensor
    bases: Tensor
    base_sums: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.states, self.sums, self.bases, self.base_sums


def pieces(
    k: Tensor, v: Tensor, w_k: Tensor, sets: Sets, last: Tensor, carry: tuple[Tensor, Tensor],
    *, norm: bool, shape: dict[str, Any], options: dict[str, Any],
) -> Iterator[Piece]:  # fmt: skip
    """Piece after piece of a sequence; ``carry`` (S, z) goes along and ends as the state behind the last chunk."""
    (batch, time), device, heads = k.shape[:2], k.device, len(w_k)
    count, picks, features = sets.index.shape[2], shape["P"], w_k.shape[2]
    kind = torch.float32 if k.dtype == torch.float32 else torch.bfloat16
    size = 2 * features * shape["V"]
    run = max(1, -(-count * batch * heads // PROGRAMS))
    most = max(1, PIECE_BYTES // (batch * heads * size * kind.itemsize * run)) * run
    constants = {name: shape[name] for name in ("GS", "G", "K", "V", "BK", "BV", "C", "P")} | options
    constants |= dict(HS=heads, F=features, NORM=norm, FEW=max(2, triton.next_power_of_2(picks)))
    scanning: dict[str, Any] = dict(REVERSE=False, block=1024)
    for start in range(0, count, most):
        chunks = min(most, count - start)
        runs = -(-chunks // run)
        exact: dict[str, Any] = dict(dtype=torch.float32, device=device)
        states = torch.empty(batch, heads, chunks, size, dtype=kind, device=device)
        sums = torch.empty(batch, heads, chunks, 2 * features, **exact)
        totals = torch.empty(batch, heads, runs, size, **exact)
        total_sums = torch.empty(batch, heads, runs, 2 * features, **exact)
        states_kernel[(2 * heads, runs, batch)](
            k, v, w_k, sets.leave, sets.left, last, states, sums, totals, total_sums,
            time, count, start, chunks, run, **strides_of(k=k, v=v), **constants,
        )  # fmt: skip
        bases, base_sums = torch.empty_like(totals, dtype=kind), torch.empty_like(total_sums)
        for x, base, along in ((totals, bases, carry[0]), (total_sums, base_sums, carry[1])):
            grid = (triton.cdiv(x.shape[3], 1024), batch * heads)
            bases_kernel[grid](x, base, along, runs, x.shape[3], **scanning)
        yield Piece(start, chunks, run, states, sums, bases, base_sums)


def routed_forward(
    q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, sets: Sets, gate: Tensor | None = None,
    *, scale: float, chunk: int, norm: bool, eps: float, lengths: Tensor | None = None,
    settings: dict[str, Launch] | None = None,
) -> Routed:  # fmt: skip
    """w_q [H, K, f], w_k [Hs, K, f] contiguous and in the dtype of q; gate [B, T, H, V or 1]; ``norm``: STILL's map,
    where it is false Hedgehog's. Queries past ``lengths`` [B] may see too little."""
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
    device, strides, features = q.device, strides_of(q=q, k=k, v=v), w_q.shape[2]

    def options(kernel: str, shared: int = 1) -> dict[str, Any]:
        return fitted((settings or {}).get(kernel) or launch(kernel, device), q, shared)

    y = torch.empty(batch, time, heads, shape["V"], dtype=v.dtype, device=device)
    linear = torch.empty_like(y)
    mass, top, den = (torch.empty(batch, heads, time, dtype=torch.float32, device=device) for _ in range(3))
    kv = torch.zeros(batch, len(w_k), 2 * features, shape["V"], dtype=torch.float32, device=device)
    z = torch.zeros(batch, len(w_k), 2 * features, dtype=torch.float32, device=device)
    last = torch.full((batch,), count, device=device) if lengths is None else (lengths - 1) // chunk
    constants = {name: shape[name] for name in ("G", "R", "K", "V", "BK", "BV", "C")} | options(
        "selected_linear"
    )
    constants |= dict(HS=len(w_k), F=features, NORM=norm, GATE=0 if gate is None else gate.shape[3])
    for piece in pieces(
        k, v, w_k, sets, last, (kv, z), norm=norm, shape=shape, options=options("selected_states")
    ):
        linear_kernel[(heads, piece.chunks, batch)](
            q, w_q, q if gate is None else gate, *piece.tensors, linear, mass,
            time, piece.start, piece.chunks, piece.run, piece.bases.shape[2], **strides_of(q=q), **constants,
        )  # fmt: skip
    chosen = options("selected_outputs", heads // select)
    odd, chosen["TAIL"] = odd_slots(n, chosen["keys"])
    grid = (select * triton.cdiv(heads // select, chosen["heads"]), count, batch)
    outputs_kernel[grid](
        q, k, v, sets.index, linear, mass, y, top, den, time, n, odd, count, scale * LOG2E, eps,
        **strides, **shape, **chosen,
    )  # fmt: skip
    return Routed(y, top, den, kv, z)


@compiled_together
def routed_prefill(
    q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, score: Tensor, gate: Tensor | None = None,
    *, scale: float, chunk: int, picks: int, size: int, norm: bool, eps: float, lengths: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """``routing.routed_chunked`` from nothing, of features that the matrices w make; and S, z behind the last tokens,
    without gradient."""
    from .triton_selected_routed_backward import RoutedAttention

    w_q, w_k = (w.to(q.dtype).contiguous() for w in (w_q, w_k))
    y, kv, z = RoutedAttention.apply(
        q, k, v, w_q, w_k, score.detach(), gate, scale, chunk, picks, size, norm, eps, lengths
    )
    return y, (kv, z)
