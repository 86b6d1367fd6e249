"""Tiles of tensors by descriptors: a GPU's copy engine moves them from memory to shared memory (TMA), past registers.

Registers are what bounds the programs of attention kernels, and a tile on its way through them takes as many as a
running sum. A descriptor knows a tensor's bounds: what lies outside is read as zero and never written. GPUs before
Hopper have no such engine; Triton compiles the same kernels to ordinary loads there.

The engine wants strides of whole 16 bytes, and none of zero: a tensor without them is copied to one that has them.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launches import cdiv, power_of_two

BYTES = 16


@triton.jit
def tile(x, b, start, head, BT: tl.constexpr, BLOCK: tl.constexpr):
    """[BT, BLOCK] tokens ``start ..`` of one head of x, a descriptor of :func:`tiles`."""
    return x.load([b, head, start, 0]).reshape(BT, BLOCK)


@triton.jit
def matrix(x, at, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK_ROWS, BLOCK] of matrix ``at`` of x, a descriptor of :func:`matrices`."""
    return x.load([at, 0, 0]).reshape(BLOCK_ROWS, BLOCK)


def tiles(x: Tensor, tokens: int, width: int | None = None) -> TensorDescriptor:
    """x [B, T, heads, D] as tiles of so many tokens of a head, D padded to ``width``, by default its ``block``.

    The axes of a tile come last: Triton then reads the first operand of a product from shared memory too, instead of
    holding it in registers.
    """
    return described(x.transpose(1, 2), (1, 1, tokens, width or block(x.shape[3])))


def matrices(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """x [..., n, D] as single matrices, padded to [rows, columns]."""
    return described(x.flatten(0, -3), (1, rows, columns))


def block(size: int) -> int:
    """The width of a tile: a power of two, and no less than 64. Products over 32 channels of a tile that came by a
    descriptor were compiled wrongly by Triton 3.6, sums 4 to 10 % off."""
    return power_of_two(size, 64)


def described(x: Tensor, shape: Sequence[int]) -> TensorDescriptor:
    x = aligned(x)
    return TensorDescriptor(x, list(x.shape), _strides(x), list(shape))


def aligned(x: Tensor) -> Tensor:
    """x, or a copy of it that the copy engine can read."""
    step = BYTES // x.element_size()
    fits = all(stride and stride % step == 0 for stride in _strides(x)[:-1]) and x.stride(-1) == 1
    if fits and (isinstance(x, FakeTensor) or x.data_ptr() % BYTES == 0):
        return x
    room = x.new_empty(*x.shape[:-1], whole(x.shape[-1], x.dtype))
    return room[..., : x.shape[-1]].copy_(x)


def whole(width: int, dtype: torch.dtype) -> int:
    """``width`` or the next one of whole 16 bytes."""
    step = BYTES // dtype.itemsize
    return cdiv(width, step) * step


def _strides(x: Tensor) -> list[int]:
    """Strides, of axes of length 1 ones that nothing is wrong with."""
    return [
        stride if length > 1 or axis == x.ndim - 1 else BYTES
        for axis, (stride, length) in enumerate(zip(x.stride(), x.shape, strict=True))
    ]
