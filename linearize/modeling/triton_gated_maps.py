"""Device functions of LAWCAT's kernels: the convolution and Hedgehog's map of a tile, gates from logits, strong gates.

phi has two halves of f channels, softmax(a) and softmax(-a). A tile is formed by rows (tokens first) or by columns,
whichever its product wants: the result of a product is not transposed. Gates too strong to be split at a tile's start
(``triton_gated.py``) are not sorted into runs here; their tokens meet one after the other.
"""

import triton
import triton.language as tl

from .triton_common import load_columns, load_matrix, load_rows, load_transposed
from .triton_gated import LOG2E, log_gate


@triton.jit
def convolved_rows(
    x, taps, start, stride, stop, K: tl.constexpr, KP: tl.constexpr, TAPS: tl.constexpr, BT: tl.constexpr
):
    """[BT, KP] fp32: sum of TAPS inputs, the current token's tap first; the inputs themselves where TAPS is 0."""
    if TAPS == 0:
        return load_rows(x, start, stride, stop, K, KP, BT).to(tl.float32)
    channel = tl.arange(0, KP)
    found = tl.zeros([BT, KP], tl.float32)
    for i in range(0, TAPS):
        tap = tl.load(taps + channel * TAPS + i, mask=channel < K, other=0.0).to(tl.float32)
        found += tap[None, :] * load_rows(x, start - i, stride, stop, K, KP, BT).to(tl.float32)
    return found


@triton.jit
def convolved_columns(
    x, taps, start, stride, stop, K: tl.constexpr, KP: tl.constexpr, TAPS: tl.constexpr, BT: tl.constexpr
):
    """``convolved_rows`` [KP, BT]."""
    if TAPS == 0:
        return load_columns(x, start, stride, stop, K, KP, BT).to(tl.float32)
    channel = tl.arange(0, KP)
    found = tl.zeros([KP, BT], tl.float32)
    for i in range(0, TAPS):
        tap = tl.load(taps + channel * TAPS + i, mask=channel < K, other=0.0).to(tl.float32)
        found += tap[:, None] * load_columns(x, start - i, stride, stop, K, KP, BT).to(tl.float32)
    return found


@triton.jit
def softmax_over(a, AXIS: tl.constexpr):
    a = tl.exp2((a - tl.expand_dims(tl.max(a, AXIS), AXIS)) * LOG2E)
    return a / tl.expand_dims(tl.sum(a, AXIS), AXIS)


@triton.jit
def halves(a, live, f: tl.constexpr, FP: tl.constexpr, AXIS: tl.constexpr):
    """(softmax(a), softmax(-a)) over ``AXIS``, zero where not ``live``."""
    if f < FP:
        there = tl.expand_dims(tl.arange(0, FP) < f, 1 - AXIS)
        plus = softmax_over(tl.where(there, a, float("-inf")), AXIS)
        minus = softmax_over(tl.where(there, -a, float("-inf")), AXIS)
    else:
        plus, minus = softmax_over(a, AXIS), softmax_over(-a, AXIS)
    return tl.where(live, plus, 0.0), tl.where(live, minus, 0.0)


@triton.jit
def features_by_rows(
    x, taps, map, start, stride, stop,
    K: tl.constexpr, KP: tl.constexpr, f: tl.constexpr, FP: tl.constexpr, TAPS: tl.constexpr, BT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Both halves [BT, FP] fp32; map is W [K, f] in the dtype of products."""
    weight = load_matrix(map, K, f, KP, FP)
    inputs = convolved_rows(x, taps, start, stride, stop, K, KP, TAPS, BT).to(weight.dtype)
    live = (start + tl.arange(0, BT) < stop)[:, None]
    return halves(tl.dot(inputs, weight, input_precision=PRECISION), live, f, FP, 1)


@triton.jit
def features_by_columns(
    x, taps, map, start, stride, stop,
    K: tl.constexpr, KP: tl.constexpr, f: tl.constexpr, FP: tl.constexpr, TAPS: tl.constexpr, BT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Both halves [FP, BT] fp32."""
    weight = load_transposed(map, K, f, KP, FP)
    inputs = convolved_columns(x, taps, start, stride, stop, K, KP, TAPS, BT).to(weight.dtype)
    live = (start + tl.arange(0, BT) < stop)[None, :]
    return halves(tl.dot(weight, inputs, input_precision=PRECISION), live, f, FP, 0)


@triton.jit
def gates_by_rows(x, start, stride, stop, inverse, f: tl.constexpr, FP: tl.constexpr, BT: tl.constexpr):
    """Log decays [BT, FP] of one half's logits; zero where there is no token."""
    live = (start + tl.arange(0, BT) < stop)[:, None] & (tl.arange(0, FP) < f)[None, :]
    logits = load_rows(x, start, stride, stop, f, FP, BT).to(tl.float32)
    return tl.where(live, log_gate(logits, 0.0, inverse), 0.0)


@triton.jit
def gates_by_columns(x, start, stride, stop, inverse, f: tl.constexpr, FP: tl.constexpr, BT: tl.constexpr):
    live = (start + tl.arange(0, BT) < stop)[None, :] & (tl.arange(0, FP) < f)[:, None]
    logits = load_columns(x, start, stride, stop, f, FP, BT).to(tl.float32)
    return tl.where(live, log_gate(logits, 0.0, inverse), 0.0)


@triton.jit
def channels(x, f: tl.constexpr, FP: tl.constexpr):
    channel = tl.arange(0, FP)
    return tl.load(x + channel, mask=channel < f, other=0.0).to(tl.float32)


@triton.jit
def both(f: tl.constexpr, FP: tl.constexpr):
    """(where channels of both halves are in memory, whether there is one) [2 FP], one half after the other."""
    channel = tl.arange(0, 2 * FP)
    return channel // FP * f + channel % FP, channel % FP < f


@triton.jit
def all_features_by_columns(
    x, taps, map, start, stride, stop,
    K: tl.constexpr, KP: tl.constexpr, f: tl.constexpr, FP: tl.constexpr, TAPS: tl.constexpr, BT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Both halves of ``features_by_columns`` in one product [2 FP, BT], of W and -W."""
    channel, key = tl.arange(0, 2 * FP), tl.arange(0, KP)
    there = (channel % FP < f)[:, None]
    weight = tl.load(
        map + key[None, :] * f + (channel % FP)[:, None], mask=there & (key < K)[None, :], other=0.0
    )
    weight = tl.where((channel < FP)[:, None], weight, -weight)
    inputs = convolved_columns(x, taps, start, stride, stop, K, KP, TAPS, BT).to(weight.dtype)
    a = tl.dot(weight, inputs, input_precision=PRECISION)
    if f < FP:
        a = tl.where(there, a, float("-inf"))
    a = tl.reshape(softmax_over(tl.reshape(a, (2, FP, BT)), 1), (2 * FP, BT))
    return tl.where((start + tl.arange(0, BT) < stop)[None, :], a, 0.0)


@triton.jit
def all_gates_by_columns(
    x, start, stride, stop, inverse, f: tl.constexpr, FP: tl.constexpr, BT: tl.constexpr
):
    """Log decays [2 FP, BT]."""
    at, there = both(f, FP)
    token = tl.arange(0, BT)
    live = there[:, None] & (start + token < stop)[None, :]
    base = x + tl.cast(start, tl.int64) * stride
    logits = tl.load(base + at[:, None] + token[None, :] * stride, mask=live, other=0.0).to(tl.float32)
    return tl.where(live, log_gate(logits, 0.0, inverse), 0.0)


@triton.jit
def load_both(x, f: tl.constexpr, FP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr):
    """[2 FP, VP] of a matrix [F, V]."""
    at, there = both(f, FP)
    value = tl.arange(0, VP)
    mask = there[:, None] & (value < V)[None, :]
    return tl.load(x + at[:, None] * V + value[None, :], mask=mask, other=0.0)


@triton.jit
def store_both(x, value, f: tl.constexpr, FP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr):
    at, there = both(f, FP)
    column = tl.arange(0, VP)
    mask = there[:, None] & (column < V)[None, :]
    tl.store(x + at[:, None] * V + column[None, :], value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def token_of(x, j, C: tl.constexpr):
    """Row j of x [C, F]."""
    return tl.sum(tl.where((tl.arange(0, C) == j)[:, None], x, 0.0), 0)


@triton.jit
def pairwise_scores(scores, phi_q, phi_k, running, C: tl.constexpr, TURNED: tl.constexpr):
    """``scores`` [C, C] and those of one half at any gate, key after key, none where the key is later; ``TURNED``: a
    row is a key."""
    token = tl.arange(0, C)
    for j in range(0, C):
        since = tl.minimum(running - token_of(running, j, C)[None, :], 0.0)
        found = tl.sum(phi_q * token_of(phi_k, j, C)[None, :] * tl.exp(since), 1)
        found = tl.where(token >= j, found, 0.0)
        if TURNED:
            scores += tl.where((token == j)[:, None], found[None, :], 0.0)
        else:
            scores += tl.where((token == j)[None, :], found[:, None], 0.0)
    return scores


@triton.jit
def pairwise_gradient(weights, phi, running, C: tl.constexpr, F: tl.constexpr, OF_KEYS: tl.constexpr):
    """Gradient [C, F] of one half of the queries' features from the scores', zeros where the key is later, and the
    keys' features; ``OF_KEYS``: of the keys', from the scores' turned and the queries'."""
    token = tl.arange(0, C)
    found = tl.zeros([C, F], tl.float32)
    for j in range(0, C):
        since = running - token_of(running, j, C)[None, :]
        since = tl.minimum(-since if OF_KEYS else since, 0.0)
        weight = tl.sum(tl.where((token == j)[None, :], weights, 0.0), 1)
        found += weight[:, None] * token_of(phi, j, C)[None, :] * tl.exp(since)
    return found
