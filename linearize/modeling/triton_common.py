"""Device functions that several kernels share: tiles in and out of memory, windows, and the Hedgehog map.

A tile is BT tokens of one head. Pointers step by 64-bit offsets to a tile's first token and by 32-bit ones inside it.
Widths that are no power of two are padded with zeros up to BLOCK.

No kernel here or elsewhere transposes the result of a product and multiplies it again: Triton 3.4 to 3.7.0 compiles
that wrongly on Hopper. Where a transposed product is needed it is formed directly, ``S^T = K Q^T``; hence features by
rows and by columns.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(x, start, stride, stop, D: tl.constexpr, BLOCK: tl.constexpr, BT: tl.constexpr):
    """[BT, BLOCK] tokens ``start ..`` of x [T, D]; zeros before 0, from ``stop`` on, and past D."""
    row, column = tl.arange(0, BT), tl.arange(0, BLOCK)
    live = (start + row >= 0) & (start + row < stop)
    mask = live[:, None] if D == BLOCK else live[:, None] & (column < D)[None, :]
    base = x + tl.cast(start, tl.int64) * stride
    return tl.load(base + row[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def load_columns(x, start, stride, stop, D: tl.constexpr, BLOCK: tl.constexpr, BT: tl.constexpr):
    """[BLOCK, BT]: ``load_rows`` transposed on the way in."""
    row, column = tl.arange(0, BT), tl.arange(0, BLOCK)
    live = (start + row >= 0) & (start + row < stop)
    mask = live[None, :] if D == BLOCK else live[None, :] & (column < D)[:, None]
    base = x + tl.cast(start, tl.int64) * stride
    return tl.load(base + row[None, :] * stride + column[:, None], mask=mask, other=0.0)


@triton.jit
def store_rows(x, value, start, stride, stop, D: tl.constexpr, BLOCK: tl.constexpr, BT: tl.constexpr):
    """Write [BT, BLOCK] to tokens ``start ..`` of x [T, D]."""
    row, column = tl.arange(0, BT), tl.arange(0, BLOCK)
    live = start + row < stop
    mask = live[:, None] if D == BLOCK else live[:, None] & (column < D)[None, :]
    base = x + tl.cast(start, tl.int64) * stride
    tl.store(base + row[:, None] * stride + column[None, :], value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_matrix(x, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK_ROWS, BLOCK] of a contiguous matrix [ROWS, D], padded with zeros."""
    row, column = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK)
    at = x + row[:, None] * D + column[None, :]
    if ROWS == BLOCK_ROWS and D == BLOCK:
        return tl.load(at)
    return tl.load(at, mask=(row < ROWS)[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def load_transposed(x, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK, BLOCK_ROWS]: ``load_matrix`` transposed on the way in."""
    row, column = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK)
    at = x + row[None, :] * D + column[:, None]
    if ROWS == BLOCK_ROWS and D == BLOCK:
        return tl.load(at)
    return tl.load(at, mask=(row < ROWS)[None, :] & (column < D)[:, None], other=0.0)


@triton.jit
def hedgehog_rows(a, F: tl.constexpr):
    """(softmax(a), softmax(-a)) over the first F channels of a [tokens, FP], fp32, zeros in the others."""
    return softmax_of(a, 1, F), softmax_of(-a, 1, F)


@triton.jit
def softmax_of(a, AXIS: tl.constexpr, F: tl.constexpr):
    """softmax over the first F channels of a, on an axis that may be longer; one half of the map."""
    channel = tl.expand_dims(tl.arange(0, a.shape[AXIS]), 1 - AXIS)
    a *= LOG2E
    if a.shape[AXIS] > F:
        a = tl.where(channel < F, a, float("-inf"))
    p = tl.exp2(a - tl.expand_dims(tl.max(a, AXIS), AXIS))
    return p * tl.expand_dims(1.0 / tl.sum(p, AXIS), AXIS)


@triton.jit
def hedgehog_backward(a, d_plus, d_minus, F: tl.constexpr):
    """The gradient of a [tokens, FP] from those of both halves of its features, and what these make with the features
    [tokens]. One half after the other: four tiles at once are many registers."""
    plus = softmax_of(a, 1, F)
    on_plus = tl.sum(plus * d_plus, 1)
    gradient = plus * (d_plus - on_plus[:, None])
    minus = softmax_of(-a, 1, F)
    on_minus = tl.sum(minus * d_minus, 1)
    return gradient - minus * (d_minus - on_minus[:, None]), on_plus + on_minus


@triton.jit
def in_window(query, key, W: tl.constexpr, TERRACED: tl.constexpr):
    """Whether each key lies in each query's window, itself included and later ones not; W = 0 is no window."""
    if W == 0:
        return (key <= query) & (key < 0)
    if TERRACED:
        return (key <= query) & (query // W - key // W <= 1)
    return (key <= query) & (query - key < W)


@triton.jit
def seen_in_tiles(query, key, W: tl.constexpr, TERRACED: tl.constexpr, BT: tl.constexpr):
    """``in_window`` of tiles of BT that have some tokens in each other's windows."""
    if TERRACED and W % BT == 0:
        return key <= query
    return in_window(query, key, W, TERRACED)


@triton.jit
def first_in_window(query, W: tl.constexpr, TERRACED: tl.constexpr):
    """Position of the oldest key of a query's window; for no window, the one after the query."""
    if W == 0:
        return query + 1
    if TERRACED:
        return tl.maximum(query // W - 1, 0) * W
    return tl.maximum(query - W + 1, 0)


@triton.jit
def first_outside(key, W: tl.constexpr, TERRACED: tl.constexpr):
    """Position of the first query that a key has left the window of."""
    if W == 0:
        return key
    if TERRACED:
        return (key // W + 2) * W
    return key + W


@triton.jit
def to_grid(x, STEPS: tl.constexpr):
    """fp32 x, of a size up to 2**22 / STEPS, to the nearest multiple of 1 / STEPS, ties to even as torch has them."""
    return ((x * STEPS + 12582912.0) - 12582912.0) / STEPS  # a sum of that size cannot hold a fraction
