"""What kernels of gated linear attention share: gates and features in registers, pairs inside a step, the scan.

Letters as in ``gated.py``. A sequence is cut into segments of CS tokens. One kernel sums every segment from nothing, a
scan (here) turns the sums into the state before each segment, and other kernels walk through a segment in steps of BC
tokens with the state in registers. The R query heads of a key/value head are walked together, as BC * R rows: gates,
features of keys and the state are made once for all of them, and a product has rows enough at 16 tokens.

Inside a step, with L the running sum of the log decays from its start, exp(L_i - L_j) is split at the start:

    score_ij = sum_f (phi_q_i exp(L_i))_f (phi_k_j exp(-L_j))_f        one product; the first factor reads the state too

which is exact as long as exp(-L_j) stays far from overflow, that is for every gate that a step's tokens survive. A step
with a channel that forgets more than exp(-REACH) takes the other branch: pairs are sorted by the largest power of two
whose border lies between them, log2(BC) products split at that border, no exponent positive. The same holds for
gradients. Exponents reach too far for fp16, so what carries a gate is bf16 where the inputs are fp16.
"""

import triton
import triton.language as tl

REACH = tl.constexpr(60.0)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def log_gate(x, bias, inverse):
    """logsigmoid(x + bias) * inverse."""
    x = x + bias
    return (tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))) * inverse


@triton.jit
def load_group(
    x, start, stride_t, stride_h, stop,
    R: tl.constexpr, D: tl.constexpr, RP: tl.constexpr, DP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """[BC * RP, DP], the heads of a group beside each other at every token; zeros where there is nothing."""
    row, column = tl.arange(0, BC * RP), tl.arange(0, DP)
    token, head = row // RP, row % RP
    mask = ((start + token < stop) & (start + token >= 0) & (head < R))[:, None] & (column < D)[None, :]
    base = x + tl.cast(start, tl.int64) * stride_t
    return tl.load(base + (token * stride_t + head * stride_h)[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_group(
    x, value, start, stride_t, stride_h, stop,
    R: tl.constexpr, D: tl.constexpr, RP: tl.constexpr, DP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row, column = tl.arange(0, BC * RP), tl.arange(0, DP)
    token, head = row // RP, row % RP
    mask = ((start + token < stop) & (head < R))[:, None] & (column < D)[None, :]
    at = x + tl.cast(start, tl.int64) * stride_t + (token * stride_t + head * stride_h)[:, None] + column[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def softmax_group(
    x, start, stride_t, stride_h, stop,
    R: tl.constexpr, D: tl.constexpr, RP: tl.constexpr, DP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """softmax over channels [BC, RP, DP] fp32; rows where there is no token or head hold something finite."""
    token, head, column = tl.arange(0, BC), tl.arange(0, RP), tl.arange(0, DP)
    mask = (start + token < stop)[:, None, None] & (head < R)[None, :, None] & (column < D)[None, None, :]
    at = token[:, None, None] * stride_t + head[None, :, None] * stride_h + column[None, None, :]
    raw = tl.load(x + tl.cast(start, tl.int64) * stride_t + at, mask=mask, other=0.0).to(tl.float32)
    raw = tl.where((column < D)[None, None, :], raw, float("-inf"))
    raw = tl.exp2((raw - tl.max(raw, 2)[:, :, None]) * LOG2E)
    return raw / tl.sum(raw, 2)[:, :, None]


@triton.jit
def rows_of(x, BC: tl.constexpr, RP: tl.constexpr, F: tl.constexpr):
    """[BC * RP, F] of x [BC, F], each row for every head."""
    return tl.reshape(tl.broadcast_to(x[:, None, :], (BC, RP, F)), (BC * RP, F))


@triton.jit
def border_gaps(log_decay, SIZE: tl.constexpr, BC: tl.constexpr, F: tl.constexpr):
    """[BC, F] log decay between each token and the middle of its run of 2 * SIZE tokens: up to itself after the middle,
    from behind itself before it."""
    runs = tl.reshape(log_decay, (BC // (2 * SIZE), 2, SIZE, F))
    since = tl.cumsum(runs, 2)
    until = tl.cumsum(runs, 2, reverse=True) - runs
    second = tl.arange(0, 2)[None, :, None, None] == 1
    return tl.reshape(tl.where(second, since, until), (BC, F))


@triton.jit
def split_at(log_decay, SIZE: tl.constexpr, BC: tl.constexpr, F: tl.constexpr):
    """(for queries, for keys) [BC, F]: the decays of ``border_gaps``, zero in the half that does not read or write."""
    gap = tl.exp(border_gaps(log_decay, SIZE, BC, F))
    second = ((tl.arange(0, BC) // SIZE) % 2 == 1)[:, None]
    return tl.where(second, gap, 0.0), tl.where(second, 0.0, gap)


@triton.jit
def strong_scores(
    phi_q, phi_k, log_decay,
    BC: tl.constexpr, RP: tl.constexpr, F: tl.constexpr, LEVELS: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [BC * RP, BC] at any gate, zeros where the key is later; phi_q [BC, RP, F], phi_k [BC, F]."""
    query, key = tl.arange(0, BC * RP) // RP, tl.arange(0, BC)
    plain_q = tl.reshape(phi_q, (BC * RP, F)).to(DTYPE)
    found = tl.dot(plain_q, tl.trans(phi_k.to(DTYPE)), input_precision=PRECISION)
    scores = tl.where(query[:, None] == key[None, :], found, 0.0)
    for level in tl.static_range(LEVELS):
        for_q, for_k = split_at(log_decay, 1 << level, BC, F)
        far_q = tl.reshape(phi_q * for_q[:, None, :], (BC * RP, F)).to(DTYPE)
        found = tl.dot(far_q, tl.trans((phi_k * for_k).to(DTYPE)), input_precision=PRECISION)
        scores += tl.where((query >> (level + 1))[:, None] == (key >> (level + 1))[None, :], found, 0.0)
    return scores


@triton.jit(do_not_specialize=["segments"])
def scan_kernel(
    sums, totals, states, start, last, stop, segments,
    SIZE: tl.constexpr, V: tl.constexpr, F: tl.constexpr, CS: tl.constexpr, HAS_START: tl.constexpr,
    HAS_LAST: tl.constexpr, REVERSED: tl.constexpr, HEADS: tl.constexpr, SHARE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """States before every segment (``REVERSED``: after it) from the segments' own sums [heads, N, F, V] fp32.

    Heads are rows of batch and head together; SHARE of them share a row of totals [heads / SHARE, N, F], the log decay
    of a whole segment. ``last`` [heads, F, V] fp32 is the state before the segment that holds token ``stop`` [B].
    """
    head = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BN + tl.arange(0, BN)
    live = at < SIZE
    sums += head * segments * SIZE + at
    states += head * segments * SIZE + at
    totals += head // SHARE * segments * F + at // V
    if HAS_START:
        running = tl.load(start + head * SIZE + at, mask=live, other=0.0).to(tl.float32)
    else:
        running = tl.zeros([BN], tl.float32)
    ends = segments
    if HAS_LAST:
        ends = (tl.load(stop + head // HEADS) // CS).to(tl.int32)
    for i in range(0, segments):
        n = tl.cast(segments - 1 - i if REVERSED else i, tl.int64)
        tl.store(states + n * SIZE, running.to(states.dtype.element_ty), mask=live)
        if HAS_LAST:
            tl.store(last + head * SIZE + at, running, mask=live & (n == ends))
        decay = tl.exp(tl.load(totals + n * F, mask=live, other=0.0))
        running = running * decay + tl.load(sums + n * SIZE, mask=live, other=0.0)
    if HAS_LAST:
        tl.store(last + head * SIZE + at, running, mask=live & (ends >= segments))
