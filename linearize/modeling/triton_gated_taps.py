"""From the gradient of a = q^ W to those of q, its taps and W, and the same for k (``triton_gated_convolved.py``).

    dq^_t = da_t W^T    dq_t = sum_i taps_i dq^_{t+i}    dtaps_i = sum_t dq^_t q_{t-i}    dW = sum_t q^_t da_t^T

Both products are matrix products in the dtype of da; q^ and dq^ are read and written once. As plain torch in fp32 every
tap would read and write all tokens of all heads several times.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import cdiv
from .triton_common import load_rows, store_rows
from .triton_gated import steps_of
from .triton_gated_mapped import block_of, convolved_rows, taps_of
from .triton_gated_maps import channels

LAUNCH = {"BT": 32, "num_warps": 4}
CHANNELS = 64
TOGETHER = 16  # tiles of a program: taps' gradients are added up over them, and over a tile's tokens once


@triton.jit(do_not_specialize=["time"])
def taps_forward_kernel(
    x, taps, made, x_b, x_t, x_h, time,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, TAPS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """made [B, T, H, K]: a tile of some channels of one head's q^."""
    W: tl.constexpr = min(K, BK)
    h, n, b = tl.program_id(0) // (K // W), tl.program_id(1), tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) % (K // W) * W
    x += b * x_b + h // R * x_h + c
    rows = convolved_rows(x, taps + h * K * TAPS + c, n * BT, x_t, time, K, W, BK, TAPS, BT)
    store_rows(made + (b * time * H + h) * K + c, rows, n * BT, H * K, time, W, BK, BT)


@triton.jit(do_not_specialize=["time"])
def taps_backward_kernel(
    x, taps, d, dx, dtaps, x_b, x_t, x_h, d_b, d_t, d_h, time,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, TAPS: tl.constexpr, BT: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """dx [B, T, H, K] of some channels of one head, and the part of its taps' gradient, dtaps [B, N, H, TAPS, K], of
    ``TILES`` tiles."""
    W: tl.constexpr = min(K, BK)
    h, n, b = tl.program_id(0) // (K // W), tl.program_id(1), tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) % (K // W) * W
    first, channel = n * (TILES * BT), tl.arange(0, BK)
    x += b * x_b + h // R * x_h + c
    d += b * d_b + h.to(tl.int64) * d_h + c
    taps += h * K * TAPS + c
    dx += (b * time * H + h) * K + c
    dtaps += ((b * tl.num_programs(1) + n) * H + h) * (TAPS * K) + c
    shares = ()
    for _ in tl.static_range(TAPS):
        shares += (tl.zeros([BT, BK], tl.float32),)
    for t in range(first, tl.minimum(first + TILES * BT, time), BT):
        here = load_rows(d, t, d_t, time, W, BK, BT).to(tl.float32)
        found = tl.zeros([BT, BK], tl.float32)
        added = ()
        for i in tl.static_range(TAPS):
            later = load_rows(d, t + i, d_t, time, W, BK, BT).to(tl.float32)
            found += channels(taps + i * K, W, BK)[None, :] * later
            added += (shares[i] + here * load_rows(x, t - i, x_t, time, W, BK, BT).to(tl.float32),)
        shares = added
        store_rows(dx, found, t, H * K, time, W, BK, BT)
    for i in tl.static_range(TAPS):
        tl.store(dtaps + i * K + channel, tl.sum(shares[i], 0), mask=channel < W)


def before_a(x: Tensor, taps: Tensor, weight: Tensor, da: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x [B, T, G, K], of its taps [H, c, K] (empty: no convolution), which come as [H, K, c], and of its
    map [H, K, f] from da [B, T, H, f]; the last two fp32."""
    (batch, time, groups, width), heads = x.shape, len(weight)
    kind, count, block = da.dtype, taps_of(taps), block_of(width, CHANNELS)
    constants = {"H": heads, "R": heads // groups, "K": width, "BK": block, "TAPS": count, **LAUNCH}
    tiles = cdiv(time, LAUNCH["BT"])
    blocks, parts = heads * max(1, width // block), cdiv(tiles, TOGETHER)
    by_head = da.flatten(0, 1).transpose(0, 1)  # [H, B T, f]
    with torch.autocast(x.device.type, enabled=False):
        d = torch.bmm(by_head, weight.to(kind).transpose(1, 2))
        made = x.new_empty(batch, time, heads, width, dtype=kind)
        taps_forward_kernel[(blocks, tiles, batch)](x, taps, made, *steps_of(x), time, **constants)
        on_map = torch.bmm(made.flatten(0, 1).permute(1, 2, 0), by_head).float()
        d = d.unflatten(1, (batch, time)).permute(1, 2, 0, 3)  # [B, T, H, K]
        on_taps = None
        if count:
            dx, shares = made, x.new_empty(batch, parts, heads, count, width, dtype=torch.float32)
            taps_backward_kernel[(blocks, parts, batch)](
                x, taps, d, dx, shares, *steps_of(x), *steps_of(d), time, TILES=TOGETHER, **constants
            )
            d, on_taps = dx, shares.sum((0, 1)).transpose(1, 2)
    if heads > groups:
        d = d.unflatten(2, (groups, -1)).sum(3, dtype=torch.float32)
    return d.to(x.dtype), on_taps, on_map
