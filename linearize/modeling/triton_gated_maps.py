"""Device functions of LAWCAT's kernels: features and gates from what ``triton_gated_mapped.py`` has made, strong gates.

phi has two halves of f channels, softmax(a) and softmax(-a). Of a tile are read a log2 e, the base 2 logarithms of what
both halves are divided by, and the running sums of log decays, so that a feature times any decay is one power of two.
Gates too strong to be split at a tile's start (``triton_gated.py``) are not sorted into runs here; their tokens meet
one after the other.
"""

import triton
import triton.language as tl

from .triton_common import load_rows


@triton.jit
def log_features(
    a, norms, half, start, time, stop, f: tl.constexpr, W: tl.constexpr, FP: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """Base 2 logarithms [BT, FP] of one half (0 or 1) of a head's features; minus infinity where there is no token."""
    token, sign = start + tl.arange(0, BT), 1.0 - 2.0 * half
    norm = tl.load(norms + half * time + token, mask=token < stop, other=float("inf"))
    found = sign * load_rows(a, start, f, stop, W, FP, BT).to(tl.float32) - norm[:, None]
    if W < FP:
        found = tl.where((tl.arange(0, FP) < W)[None, :], found, float("-inf"))
    return found


@triton.jit
def strong_tile(strong, tile):
    """Whether a gate of either half is."""
    return tl.max(tl.load(strong + tile * 2 + tl.arange(0, 2)), 0) > 0


@triton.jit
def running_gates(
    running, start, stop, f: tl.constexpr, FP: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """Log decays [BT, FP] of one half since the tile's start; zero where there is no token."""
    return load_rows(running, start, 2 * f, stop, f, FP, BT)


@triton.jit
def whole_tile(running, start, stop, f: tl.constexpr, FP: tl.constexpr, BT: tl.constexpr):
    """Log decays [FP] of a tile up to ``stop``."""
    last = tl.minimum(start + BT, stop) - 1
    return channels(running + tl.cast(last, tl.int64) * (2 * f), f, FP)


@triton.jit
def channels(x, f: tl.constexpr, FP: tl.constexpr):
    channel = tl.arange(0, FP)
    return tl.load(x + channel, mask=channel < f, other=0.0).to(tl.float32)


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
