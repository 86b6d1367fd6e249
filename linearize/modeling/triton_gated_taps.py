"""From the gradient of a = q^ W to those of q, its taps and W, and the same for k (``triton_gated_convolved.py``).

    dq^_t = da_t W^T    dq_t = sum_i taps_i dq^_{t+i}    dtaps_i = sum_t dq^_t q_{t-i}    dW = sum_t q^_t da_t^T

Both products are matrix products in the dtype of da; q^ and dq^ are read and written once. As plain torch in fp32 every
tap would read and write all tokens of all heads several times.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import load_rows, store_rows
from .triton_gated import padded, steps_of
from .triton_gated_maps import convolved_rows

LAUNCH = {"BT": 64, "num_warps": 8}


@triton.jit(do_not_specialize=["time"])
def taps_forward_kernel(
    x, taps, made, x_b, x_t, x_h, time,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, TAPS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """made [B, T, H, K]: a tile of one head's q^."""
    n, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = convolved_rows(x + b * x_b + h // R * x_h, taps + h * K * TAPS, n * BT, x_t, time, K, KP, TAPS, BT)
    store_rows(made + (b * time * H + h) * K, rows, n * BT, H * K, time, K, KP, BT)


@triton.jit(do_not_specialize=["time"])
def taps_backward_kernel(
    x, taps, d, dx, dtaps, x_b, x_t, x_h, d_b, d_t, d_h, time,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, TAPS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """dx [B, T, H, K] of one head, and a tile's part of its taps' gradient, dtaps [B, tiles, H, TAPS, K]."""
    n, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, channel = n * BT, tl.arange(0, KP)
    x += b * x_b + h // R * x_h
    d += b * d_b + h.to(tl.int64) * d_h
    dtaps += ((b * tl.cdiv(time, BT) + n) * H + h) * (TAPS * K)
    here = load_rows(d, t, d_t, time, K, KP, BT).to(tl.float32)
    found = tl.zeros([BT, KP], tl.float32)
    for i in range(0, TAPS):
        tap = tl.load(taps + h * K * TAPS + channel * TAPS + i, mask=channel < K, other=0.0).to(tl.float32)
        found += tap[None, :] * load_rows(d, t + i, d_t, time, K, KP, BT).to(tl.float32)
        share = tl.sum(here * load_rows(x, t - i, x_t, time, K, KP, BT).to(tl.float32), 0)
        tl.store(dtaps + i * K + channel, share, mask=channel < K)
    store_rows(dx + (b * time * H + h) * K, found, t, H * K, time, K, KP, BT)


def before_a(x: Tensor, taps: Tensor, weight: Tensor, da: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x [B, T, G, K], of its taps [H, K, c] (empty: no convolution) and of its map [H, K, f] from da
    [B, T, H, f]; the last two fp32."""
    (batch, time, groups, width), heads = x.shape, len(weight)
    kind, count = da.dtype, taps.shape[2] if taps.numel() else 0
    constants = {"H": heads, "R": heads // groups, "K": width, "KP": padded(width), "TAPS": count, **LAUNCH}
    grid = (triton.cdiv(time, LAUNCH["BT"]), heads, batch)
    by_head = da.flatten(0, 1).transpose(0, 1)  # [H, B T, f]
    with torch.autocast(x.device.type, enabled=False):
        d = torch.bmm(by_head, weight.to(kind).transpose(1, 2))
        made = x.new_empty(batch, time, heads, width, dtype=kind)
        taps_forward_kernel[grid](x, taps, made, *steps_of(x), time, **constants)
        on_map = torch.bmm(made.flatten(0, 1).permute(1, 2, 0), by_head).float()
        d = d.unflatten(1, (batch, time)).permute(1, 2, 0, 3)  # [B, T, H, K]
        on_taps = None
        if count:
            dx, parts = made, x.new_empty(batch, grid[0], heads, count, width, dtype=torch.float32)
            taps_backward_kernel[grid](x, taps, d, dx, parts, *steps_of(x), *steps_of(d), time, **constants)
            d, on_taps = dx, parts.sum((0, 1)).transpose(1, 2)
    if heads > groups:
        d = d.unflatten(2, (groups, -1)).sum(3, dtype=torch.float32)
    return d.to(x.dtype), on_taps, on_map
