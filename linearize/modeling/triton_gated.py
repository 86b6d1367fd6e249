"""What kernels of gated linear attention share: gates, pairs of a tile at any gate, the scan over segments.

Letters as in ``gated.py``. A sequence is cut into segments of CS tokens and those into tiles of C. Segments are summed
from nothing, a scan (here) turns the sums into the state before each, and a walk through every segment at once writes
the state before each tile, in 16 bits where the inputs are. (Liger's tiles are their own segments: its states are
smaller, and a sum and a scan of every tile cost less than a second walk.) Then all tiles stand alone: a query reads the
state before its tile and the keys of its tile. Gradients take the same road backwards.

With L the running sum of the log decays inside a tile, exp(L_i - L_j) is split at the tile's start:

    score_ij = sum_f (phi_q_i exp(L_i))_f (phi_k_j exp(-L_j))_f

is one product, whose first factor also reads the state, and whose rounding is that of any product, as long as
exp(-L_j) stays inside the range of fp32 and bf16: where no channel forgets more than exp(-REACH) in a tile. Tiles with
a stronger gate are left to other kernels, which walk through them by runs of 16 tokens with the state in registers.
There no exponent is positive: pairs of a run are sorted by the largest power of two that has a multiple between them,
one product for each, split there. (As a branch of the first kernels this would take registers from every tile.) What
carries a gate is bf16 also where the inputs are fp16, whose exponents are too short.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import Launch, cdiv, launch, power_of_two

REACH = tl.constexpr(80.0)
RUN = tl.constexpr(16)
LEVELS = tl.constexpr(4)  # 2 ** LEVELS is RUN
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def log_gate(x, bias, inverse):
    """logsigmoid(x + bias) * inverse; log(1 + u) of u <= 1 by Abramowitz and Stegun 4.1.44, within 3e-8."""
    x = x + bias
    u = tl.exp2(tl.abs(x) * -LOG2E)
    log = 0.0360884937 - 0.0064535442 * u
    log = 0.1676540711 + u * (-0.0953293897 + u * log)
    log = 0.3317990258 + u * (-0.2407338084 + u * log)
    log = u * (0.9999964239 + u * (-0.4998741238 + u * log))
    return (tl.minimum(x, 0.0) - log) * inverse


@triton.jit
def split_sum(reads, x, ROWS: tl.constexpr):
    """``reads`` (zeros and ones) times x, or x times ``reads``, as two products of 16 bits: x to within 2 ** -17."""
    high = x.to(tl.bfloat16)
    low = (x - high.to(tl.float32)).to(tl.bfloat16)
    reads = reads.to(tl.bfloat16)
    if ROWS:
        return tl.dot(reads, low, tl.dot(reads, high))
    else:
        return tl.dot(low, reads, tl.dot(high, reads))


# Running sums over a tile's tokens are products with a triangle: a scan in registers takes several times as long. fp32
# inputs, which are promised more digits, are scanned.
@triton.jit
def since_rows(x, C: tl.constexpr, DTYPE: tl.constexpr):
    """[C, F] sums over the tokens of a tile up to each, itself included."""
    if tl.float32 == DTYPE:
        return tl.cumsum(x, 0)
    else:
        token = tl.arange(0, C)
        return split_sum(token[:, None] >= token[None, :], x, True)


@triton.jit
def until_rows(x, C: tl.constexpr, DTYPE: tl.constexpr):
    """[C, F] sums over the tokens of a tile behind each."""
    if tl.float32 == DTYPE:
        return tl.cumsum(x, 0, reverse=True) - x
    else:
        token = tl.arange(0, C)
        return split_sum(token[:, None] < token[None, :], x, True)


@triton.jit
def since_columns(x, C: tl.constexpr, DTYPE: tl.constexpr):
    """``since_rows`` of [F, C]."""
    if tl.float32 == DTYPE:
        return tl.cumsum(x, 1)
    else:
        token = tl.arange(0, C)
        return split_sum(token[:, None] <= token[None, :], x, False)


@triton.jit
def until_columns(x, C: tl.constexpr, DTYPE: tl.constexpr):
    """``until_rows`` of [F, C]."""
    if tl.float32 == DTYPE:
        return tl.cumsum(x, 1, reverse=True) - x
    else:
        token = tl.arange(0, C)
        return split_sum(token[:, None] > token[None, :], x, False)


@triton.jit
def softmax_rows(x, D: tl.constexpr, BLOCK: tl.constexpr):
    """softmax of x [n, BLOCK] over its first D channels."""
    if D < BLOCK:
        x = tl.where((tl.arange(0, BLOCK) < D)[None, :], x, float("-inf"))
    x = tl.exp2((x - tl.max(x, 1)[:, None]) * LOG2E)
    return x / tl.sum(x, 1)[:, None]


@triton.jit
def softmax_columns(x, D: tl.constexpr, BLOCK: tl.constexpr):
    """``softmax_rows`` of [BLOCK, n]."""
    if D < BLOCK:
        x = tl.where((tl.arange(0, BLOCK) < D)[:, None], x, float("-inf"))
    x = tl.exp2((x - tl.max(x, 0)[None, :]) * LOG2E)
    return x / tl.sum(x, 0)[None, :]


@triton.jit
def store_matrix(
    x, value, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write [BLOCK_ROWS, BLOCK] to a contiguous matrix [ROWS, D]."""
    row, column = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK)
    at = x + row[:, None] * D + column[None, :]
    if ROWS == BLOCK_ROWS and D == BLOCK:
        tl.store(at, value.to(x.dtype.element_ty))
    else:
        tl.store(at, value.to(x.dtype.element_ty), mask=(row < ROWS)[:, None] & (column < D)[None, :])


@triton.jit
def split_at(log_decay, SIZE: tl.constexpr, F: tl.constexpr):
    """(for queries, for keys) [RUN, F]: decay between each token and the middle of its 2 * SIZE tokens, up to itself
    behind the middle, from behind itself before it; zero in the half that does not read, or is not read."""
    parts = tl.reshape(log_decay, (RUN // (2 * SIZE), 2, SIZE, F))
    since = tl.cumsum(parts, 2)
    until = tl.cumsum(parts, 2, reverse=True) - parts
    second = (tl.arange(0, 2) == 1)[None, :, None, None]
    gap = tl.reshape(tl.exp(tl.where(second, since, until)), (RUN, F))
    reads = ((tl.arange(0, RUN) // SIZE) % 2 == 1)[:, None]
    return tl.where(reads, gap, 0.0), tl.where(reads, 0.0, gap)


@triton.jit
def together(SIZE: tl.constexpr):
    """[RUN, RUN] whether two tokens of a run are in the same SIZE tokens."""
    part = tl.arange(0, RUN) // SIZE
    return part[:, None] == part[None, :]


@triton.jit
def earlier(C: tl.constexpr, TURNED: tl.constexpr):
    """[C, C] whether the key is not later than the query; ``TURNED``: a row is a key."""
    token = tl.arange(0, C)
    if TURNED:
        return token[:, None] <= token[None, :]
    return token[:, None] >= token[None, :]


@triton.jit
def run_scores(
    phi_q,
    phi_k,
    log_decay,
    F: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    TURNED: tl.constexpr,
):
    """Scores [RUN, RUN] of a run at any gate, zeros where the key is later; ``TURNED``: a row is a key."""
    scores = tl.where(together(1), tl.sum(phi_q * phi_k, 1)[:, None], 0.0)
    for level in tl.static_range(LEVELS):
        for_q, for_k = split_at(log_decay, 1 << level, F)
        far_q, far_k = (phi_q * for_q).to(DTYPE), (phi_k * for_k).to(DTYPE)
        if TURNED:
            found = tl.dot(far_k, tl.trans(far_q), input_precision=PRECISION)
        else:
            found = tl.dot(far_q, tl.trans(far_k), input_precision=PRECISION)
        scores += tl.where(together(2 << level), found, 0.0)
    return scores


@triton.jit
def run_gradient(
    weights,
    phi,
    log_decay,
    F: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    OF_KEYS: tl.constexpr,
):
    """Gradient [RUN, F] of the queries' features from the scores' and the keys' features; ``OF_KEYS``: of the keys',
    from the scores' turned and the queries'."""
    found = tl.sum(tl.where(together(1), weights, 0.0), 1)[:, None] * phi
    for level in tl.static_range(LEVELS):
        for_q, for_k = split_at(log_decay, 1 << level, F)
        near = tl.where(together(2 << level), weights, 0.0).to(DTYPE)
        if OF_KEYS:
            found += for_k * tl.dot(near, (phi * for_q).to(DTYPE), input_precision=PRECISION)
        else:
            found += for_q * tl.dot(near, (phi * for_k).to(DTYPE), input_precision=PRECISION)
    return found


@triton.jit(do_not_specialize=["segments"])
def scan_kernel(
    sums, totals, states, start, segments,
    SIZE: tl.constexpr, V: tl.constexpr, F: tl.constexpr, HAS_START: tl.constexpr, REVERSED: tl.constexpr,
    SHARE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """States [rows, N + 1, F, V] before every segment and after the last, fp32, from the segments' sums [rows, N, F, V]
    and log decays [rows / SHARE, N, F]; ``REVERSED``: those behind every segment and, last, the one before the first.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BN + tl.arange(0, BN)
    live = at < SIZE
    sums += row * segments * SIZE + at
    states += row * (segments + 1) * SIZE + at
    totals += row // SHARE * segments * F + at // V
    if HAS_START:
        running = tl.load(start + row * SIZE + at, mask=live, other=0.0).to(tl.float32)
    else:
        running = tl.zeros([BN], tl.float32)
    for i in range(0, segments):
        n = tl.cast(segments - 1 - i if REVERSED else i, tl.int64)
        tl.store(states + n * SIZE, running, mask=live)
        decay = tl.exp(tl.load(totals + n * F, mask=live, other=0.0))
        running = running * decay + tl.load(sums + n * SIZE, mask=live, other=0.0)
    tl.store(states + tl.cast(segments, tl.int64) * SIZE, running, mask=live)


def scan(
    sums: Tensor,
    totals: Tensor,
    *,
    start: Tensor | None = None,
    reverse: bool = False,
    chosen: Launch | None = None,
) -> Tensor:
    """states [B, heads, N + 1, F, V] fp32 from sums [B, heads, N, F, V] and log decays [B, G, N, F]."""
    batch, heads, segments, features, values = sums.shape
    states = sums.new_empty(batch, heads, segments + 1, features, values)
    sizes, options = blocks("gated_scan", sums, chosen)
    size = features * values
    block = min(sizes["BN"], power_of_two(size))
    scan_kernel[(batch * heads, cdiv(size, block))](
        sums, totals, states, sums if start is None else start, segments,
        SIZE=size, V=values, F=features, HAS_START=start is not None, REVERSED=reverse,
        SHARE=heads // totals.shape[1], BN=block, **options,
    )  # fmt: skip
    return states


def blocks(name: str, x: Tensor, chosen: Launch | None = None) -> tuple[dict[str, int], dict[str, int]]:
    """(block sizes; warps, stages and most registers) of a kernel."""
    row = chosen or launch(name, x.device, K=x.shape[-1], dtype=x.dtype)
    sizes, options = dict(row.blocks), {"num_warps": row.warps, "num_stages": row.stages}
    most = sizes.pop("maxnreg", None)
    if most is not None and x.dtype != torch.float32:  # which has no room for another program anyway
        options["maxnreg"] = most
    return sizes, options


def gated_dtype(dtype: torch.dtype) -> tuple[tl.dtype, torch.dtype]:
    """Of operands that carry a gate, and of the states before tiles."""
    return (tl.float32, torch.float32) if dtype == torch.float32 else (tl.bfloat16, torch.bfloat16)


def precision(dtype: torch.dtype) -> str:
    """How fp32 operands are multiplied: as three tf32 products, which matrix instructions do and plain fp32 is not."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


def padded(width: int) -> int:
    """The block that holds ``width`` channels."""
    return power_of_two(width, 16)


def steps_of(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, time and heads."""
    return x.stride(0), x.stride(1), x.stride(2)
