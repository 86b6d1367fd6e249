"""What decode kernels share: maps of one query or a few keys, slots of rings, an online softmax, the end of a step."""

import triton
import triton.language as tl
from torch import Tensor

MAPS = {"hedgehog": 0, "hedgehog_half": 1, "t2r": 2, "elu": 3, "exp": 4, "np_map": 5, "np_map_plain": 6}
FEW = 256
"""Programs of one query head each below which a launch leaves a GPU's processors idle, and is set for latency."""

COUNT = tl.constexpr(40)  # bit of ``seen`` from which programs that are done are counted
LOW = tl.constexpr(-1e30)  # below every score, and finite


@triton.jit
def features(a, there, norm, bias, MAP: tl.constexpr):
    """phi of projected rows a [f] or [f, n], fp32: its two halves, the second one zero where a map has one."""
    if MAP >= 5:
        a = a * (norm / tl.maximum(tl.sqrt(tl.sum(tl.where(there, a * a, 0.0), 0, keep_dims=True)), 1e-12))
    zero = tl.zeros_like(a)
    if MAP == 2:
        return tl.where(there, tl.maximum(a + bias, 0.0), 0.0), zero
    if MAP == 3:
        return tl.where(there, tl.where(a > 0, 1.0 + a, tl.exp(tl.minimum(a, 0.0))), 0.0), zero
    high = tl.max(tl.where(there, a, -float("inf")), 0, keep_dims=True)
    up = tl.where(there, tl.exp(a - high), 0.0)
    if MAP == 1:
        return up / tl.sum(up, 0, keep_dims=True), zero
    low = tl.min(tl.where(there, a, float("inf")), 0, keep_dims=True)
    down = tl.where(there, tl.exp(low - a), 0.0)
    if MAP == 4:
        return up, down
    return up / tl.sum(up, 0, keep_dims=True), down / tl.sum(down, 0, keep_dims=True)


@triton.jit
def query_features(
    q,
    weight,
    extra,
    K: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    BK: tl.constexpr,
    DEPTH: tl.constexpr,
    MAP: tl.constexpr,
):
    """phi of one query: q [K], weight [K, F] and extra (the reflection [K], or the bias [F]) by pointer."""
    of = tl.arange(0, FP)
    along = 0.0
    square = 0.0
    length = 0.0
    if MAP >= 5:
        for c in range(0, K, BK):
            ok = c + tl.arange(0, BK)
            x = tl.load(q + ok, mask=ok < K, other=0.0).to(tl.float32)
            square += tl.sum(x * x)
            if MAP == 5:
                u = tl.load(extra + ok, mask=ok < K, other=0.0).to(tl.float32)
                along += tl.sum(u * x)
                length += tl.sum(u * u)
    parts = tl.zeros([BK, FP], tl.float32)
    for c in tl.range(0, K, BK, num_stages=DEPTH):
        ok = c + tl.arange(0, BK)
        x = tl.load(q + ok, mask=ok < K, other=0.0).to(tl.float32)
        if MAP == 5:
            u = tl.load(extra + ok, mask=ok < K, other=0.0).to(tl.float32)
            x -= u * (2 * along / tl.maximum(length, 1e-24))
        w = tl.load(
            weight + ok[:, None] * F + of[None, :],
            mask=(ok < K)[:, None] & (of < F)[None, :],
            other=0.0,
            eviction_policy="evict_last",
        )
        parts += w.to(tl.float32) * x[:, None]
    a = tl.sum(parts, 0)
    bias = 0.0
    if MAP == 2:
        bias = tl.load(extra + of, mask=of < F, other=0.0).to(tl.float32)
    return features(a, of < F, tl.sqrt(square), bias, MAP)


@triton.jit
def meet_sums(
    kv,
    z,
    up,
    down,
    F: tl.constexpr,
    V: tl.constexpr,
    FP: tl.constexpr,
    VP: tl.constexpr,
    HALVES: tl.constexpr,
    BF: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """phi^T S [VP] and phi^T z of sums by pointer: BF rows of S at once, and as many tiles on their way as DEPTH."""
    of, ov = tl.arange(0, FP), tl.arange(0, VP)
    weight = tl.sum(up * tl.load(z + of, mask=of < F, other=0.0))
    if HALVES == 2:
        weight += tl.sum(down * tl.load(z + F + of, mask=of < F, other=0.0))
    acc = tl.zeros([BF, VP], tl.float32)
    for f in tl.range(0, F, BF, num_stages=DEPTH):
        at = f + tl.arange(0, BF)
        cells = kv + at[:, None] * V + ov[None, :]
        real = (at < F)[:, None] & (ov < V)[None, :]
        phi = up if BF == FP else tl.gather(up, at, 0)
        acc += tl.load(cells, mask=real, other=0.0) * phi[:, None]
        if HALVES == 2:
            phi = down if BF == FP else tl.gather(down, at, 0)
            acc += tl.load(cells + F * V, mask=real, other=0.0) * phi[:, None]
    return tl.sum(acc, 0), weight


@triton.jit
def fold_in(
    kv,
    z,
    up,
    down,
    ring,
    new,
    t,
    pos,
    stop,
    F: tl.constexpr,
    V: tl.constexpr,
    FP: tl.constexpr,
    VP: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    HALVES: tl.constexpr,
    BV: tl.constexpr,
):
    """Add tokens of features phi^T [FP, n] to sums by pointer; their values as :func:`slots` finds them."""
    of = tl.arange(0, FP)
    real = of < F
    tl.debug_barrier()  # what other threads still read
    for half in tl.static_range(HALVES):
        phi = up if half == 0 else down
        norm = z + half * F + of
        tl.store(norm, tl.load(norm, mask=real, other=0.0) + tl.sum(phi, 1), mask=real)
        for c in range(0, VP, BV):
            oc = c + tl.arange(0, BV)
            cells = kv + half * F * V + of[:, None] * V + oc[None, :]
            inside = real[:, None] & (oc < V)[None, :]
            values = slots(ring, new, t, pos, stop, c, V, BV, N, G)
            held = tl.load(cells, mask=inside, other=0.0)
            tl.store(cells, tl.dot(phi.to(values.dtype), values, held, input_precision="ieee"), mask=inside)


@triton.jit
def columns(ring, new, t, pos, stop, c, D: tl.constexpr, BD: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    """Channels c, ... of tokens at positions ``pos`` before ``stop``, as columns [BD, n]: the newest from ``new``, the
    others from their slots."""
    od = c + tl.arange(0, BD)
    there = (od < D)[:, None] & (pos < stop)[None, :]
    x = tl.load(ring + (pos % N)[None, :] * (G * D) + od[:, None], mask=there & (pos < t)[None, :], other=0.0)
    newest = tl.load(new + od, mask=od < D, other=0.0)
    return tl.where((pos == t)[None, :], newest[:, None], x)


@triton.jit
def slots(ring, new, t, pos, stop, c, D: tl.constexpr, BD: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    """The same as rows [n, BD]."""
    od = c + tl.arange(0, BD)
    there = (od < D)[None, :] & (pos < stop)[:, None]
    x = tl.load(ring + (pos % N)[:, None] * (G * D) + od[None, :], mask=there & (pos < t)[:, None], other=0.0)
    newest = tl.load(new + od, mask=od < D, other=0.0)
    return tl.where((pos == t)[:, None], newest[None, :], x)


@triton.jit
def key_features(
    ring,
    new,
    t,
    pos,
    stop,
    weight,
    extra,
    K: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    BK: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    MAP: tl.constexpr,
):
    """phi^T [FP, n] of the keys at ``pos``, formed as W^T K^T; weight and extra as for a query."""
    of = tl.arange(0, FP)
    norm = 0.0
    share = tl.zeros_like(pos).to(tl.float32)
    if MAP >= 5:
        square = tl.zeros_like(pos).to(tl.float32)
        along = tl.zeros_like(pos).to(tl.float32)
        length = 0.0
        for c in range(0, K, BK):
            x = columns(ring, new, t, pos, stop, c, K, BK, N, G).to(tl.float32)
            square += tl.sum(x * x, 0)
            if MAP == 5:
                ok = c + tl.arange(0, BK)
                u = tl.load(extra + ok, mask=ok < K, other=0.0).to(tl.float32)
                along += tl.sum(u[:, None] * x, 0)
                length += tl.sum(u * u)
        norm = tl.sqrt(square)[None, :]
        if MAP == 5:
            share = along * (2 / tl.maximum(length, 1e-24))
    a = tl.zeros([FP, pos.shape[0]], tl.float32)
    for c in range(0, K, BK):
        ok = c + tl.arange(0, BK)
        w = tl.load(
            weight + ok[None, :] * F + of[:, None],
            mask=(ok < K)[None, :] & (of < F)[:, None],
            other=0.0,
            eviction_policy="evict_last",
        )
        x = columns(ring, new, t, pos, stop, c, K, BK, N, G)
        if MAP == 5:
            u = tl.load(extra + ok, mask=ok < K, other=0.0).to(tl.float32)
            x = (x.to(tl.float32) - u[:, None] * share[None, :]).to(x.dtype)
        a = tl.dot(w.to(x.dtype), x, a, input_precision="ieee")
    bias = 0.0
    if MAP == 2:
        bias = tl.load(extra + of, mask=of < F, other=0.0).to(tl.float32)[:, None]
    return features(a, (of < F)[:, None], norm, bias, MAP)


@triton.jit
def begin(
    heads,
    k,
    v,
    scale,
    cap,
    c,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    BV: tl.constexpr,
    CAP: tl.constexpr,
):
    """The running maximum, sum and numerator of rows q [16, K] after the newest token, of whose value there are
    channels c, ...: it is read from the inputs, so that tiles of a ring go straight to shared memory."""
    od, ov = tl.arange(0, KP), c + tl.arange(0, BV)
    key = tl.load(k + od, mask=od < K, other=0.0).to(tl.float32)
    value = tl.load(v + ov, mask=ov < V, other=0.0).to(tl.float32)
    m = tl.sum(heads.to(tl.float32) * key[None, :], 1) * scale
    if CAP:
        m = cap * (2 * tl.sigmoid(2 * m / cap) - 1)
    return m, tl.full([16], 1.0, tl.float32), tl.zeros([16, BV], tl.float32) + value[None, :]


@triton.jit
def held_columns(ring, pos, stop, c, D: tl.constexpr, BD: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    """Channels c, ... of tokens at positions ``pos`` before ``stop``, as columns [BD, n], from their slots."""
    od = c + tl.arange(0, BD)
    there = (od < D)[:, None] & (pos < stop)[None, :]
    return tl.load(ring + (pos % N)[None, :] * (G * D) + od[:, None], mask=there, other=0.0)


@triton.jit
def held_rows(ring, pos, stop, c, D: tl.constexpr, BD: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    """The same as rows [n, BD]."""
    od = c + tl.arange(0, BD)
    there = (od < D)[None, :] & (pos < stop)[:, None]
    return tl.load(ring + (pos % N)[:, None] * (G * D) + od[None, :], mask=there, other=0.0)


@triton.jit
def scores(heads, keys, scale, cap, CAP: tl.constexpr):
    """q k scale of rows q [16, K] and keys [K, n], capped where a model does so."""
    s = tl.dot(heads, keys, input_precision="ieee") * scale
    if CAP:
        s = cap * (2 * tl.sigmoid(2 * s / cap) - 1)
    return s


@triton.jit
def meet(s, v, visible, m, mass, acc):
    """Online softmax: the running maximum, sum and numerator of 16 rows after scores s [16, n] and values [n, V]."""
    s = tl.where(visible[None, :], s, LOW)
    high = tl.maximum(m, tl.max(s, 1))
    p = tl.where(visible[None, :], tl.exp(s - high[:, None]), 0.0)
    keep = tl.exp(m - high)
    acc = acc * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return high, mass * keep + tl.sum(p, 1), acc


@triton.jit
def arrive(seen, folded, total, fold, programs):
    """After a program's last read of a row: the last one to get here advances the row's counters.

    Others read ``seen`` below bit COUNT only, and nobody is left to read ``folded``.
    """
    tl.debug_barrier()
    before = tl.atomic_add(seen, tl.full([], 1, tl.int64) << COUNT, sem="acq_rel") >> COUNT
    if before == programs - 1:
        tl.store(folded, fold.to(tl.int64))
        tl.store(seen, total.to(tl.int64))


def rows_of(x: Tensor) -> Tensor:
    """x [B, 1, heads, D] as [B, heads, D], the last axis dense."""
    x = x[:, 0]
    return x if x.stride(-1) == 1 else x.contiguous()


def padded(width: int) -> int:
    """The power of two, at least 16, that a tile of this width takes."""
    return max(16, 1 << (width - 1).bit_length())
