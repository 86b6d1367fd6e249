"""What the kernels of LAWCAT's layer read, made once: inputs of the feature maps' softmax, and running sums of gates.

    maps     a = q^ W of a tile of some heads, q^ the convolution of q; the same of k   grid (heads, tile, row)
    gates    sums of log decays since the start of every tile                           grid (kv head, tile, row)

Every kernel behind reads them, some several times, and in both directions: a has a fourth of the bytes of a head's
features in fp32, and gates belong to a key/value head, so that they are not made for each of its query heads. a is kept
in fp16 where the inputs have 16 bits: 3 bits more than bf16, in which its factors were rounded. It is made again for
the backward pass.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import Launch, cdiv
from .triton_common import load_matrix, load_rows, store_rows
from .triton_gated import LOG2E, REACH, blocks, gated_dtype, log_gate, padded, precision, since_rows, steps_of
from .triton_gated_maps import channels

LARGEST = tl.constexpr(6e4)  # of fp16, nearly


@triton.jit
def convolved_rows(
    x, taps, start, stride, stop, K: tl.constexpr, W: tl.constexpr, BK: tl.constexpr, TAPS: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """[BT, BK] fp32, W of K channels: sum of TAPS inputs, the current token's tap first; the inputs themselves where
    TAPS is 0."""
    if TAPS == 0:
        return load_rows(x, start, stride, stop, W, BK, BT).to(tl.float32)
    found = tl.zeros([BT, BK], tl.float32)
    for i in tl.static_range(TAPS):
        tap = channels(taps + i * K, W, BK)
        found += tap[None, :] * load_rows(x, start - i, stride, stop, W, BK, BT).to(tl.float32)
    return found


@triton.jit
def log_sum(x):
    """log2 of the sum over channels of 2 ** x [BT, FP]."""
    most = tl.max(x, 1)
    return most + tl.log2(tl.sum(tl.exp2(x - most[:, None]), 1))


@triton.jit
def log_sum_negated(x):
    """``log_sum`` of -x, which is not made."""
    least = tl.min(x, 1)
    return tl.log2(tl.sum(tl.exp2(least[:, None] - x), 1)) - least


@triton.jit
def store_map(made, a, norms, row, t, time, f: tl.constexpr, FP: tl.constexpr, BT: tl.constexpr):
    """A tile of one head, and what its softmax is divided by."""
    made *= LOG2E
    if a.dtype.element_ty == tl.float16:
        made = tl.clamp(made, -LARGEST, LARGEST, tl.PropagateNan.ALL)
    made = made.to(a.dtype.element_ty)
    store_rows(a + row * time * f, made, t, f, time, f, FP, BT)
    token, made = t + tl.arange(0, BT), made.to(tl.float32)
    plus, minus = made, made
    if f < FP:
        there = (tl.arange(0, FP) < f)[None, :]
        plus, minus = tl.where(there, made, float("-inf")), tl.where(there, made, float("inf"))
    norms += row * 2 * time
    tl.store(norms + token, log_sum(plus), mask=token < time)
    tl.store(norms + time + token, log_sum_negated(minus), mask=token < time)


@triton.jit(do_not_specialize=["time"])
def maps_kernel(
    x, taps, map, a, norms, x_b, x_t, x_h, time,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, f: tl.constexpr, FP: tl.constexpr,
    TAPS: tl.constexpr, HEADS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """HEADS of one input, which is read once for them."""
    W: tl.constexpr = min(K, BK)
    h, n, b = tl.program_id(0) * HEADS, tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, row = n * BT, b * H + h
    x += b * x_b + h // R * x_h
    taps += h * K * TAPS
    map += h * K * f
    made = ()
    for _ in tl.static_range(HEADS):
        made += (tl.zeros([BT, FP], tl.float32),)
    for c in tl.range(0, K, BK):  # all channels at once would take all registers
        inputs = ()
        for _ in tl.static_range(HEADS):
            inputs += (tl.zeros([BT, BK], tl.float32),)
        for i in tl.static_range(max(TAPS, 1)):
            rows = load_rows(x + c, t - i, x_t, time, W, BK, BT).to(tl.float32)
            added = ()
            for j in tl.static_range(HEADS):
                if TAPS == 0:
                    added += (rows,)
                else:
                    added += (inputs[j] + channels(taps + (j * TAPS + i) * K + c, W, BK)[None, :] * rows,)
            inputs = added
        added = ()
        for j in tl.static_range(HEADS):
            weight = load_matrix(map + j * K * f + c * f, W, f, BK, FP)
            added += (tl.dot(inputs[j].to(weight.dtype), weight, made[j], input_precision=PRECISION),)
        made = added
    for j in tl.static_range(HEADS):
        store_map(made[j], a, norms, row + j, t, time, f, FP, BT)


@triton.jit(do_not_specialize=["time"])
def gates_kernel(
    logits, running, strong, g_b, g_t, g_h, time, inverse,
    f: tl.constexpr, FP: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One half of the features."""
    F: tl.constexpr = 2 * f
    half, g = tl.program_id(0) % 2, tl.program_id(0) // 2
    n, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, row = n * C, b * (tl.num_programs(0) // 2) + g
    x = load_rows(logits + b * g_b + g * g_h + half * f, t, g_t, time, f, FP, C).to(tl.float32)
    live = (t + tl.arange(0, C) < time)[:, None] & (tl.arange(0, FP) < f)[None, :]
    log_decay = tl.where(live, log_gate(x, 0.0, inverse), 0.0)
    store_rows(running + row * time * F + half * f, since_rows(log_decay, C, DTYPE), t, F, time, f, FP, C)
    above = tl.min(tl.sum(log_decay, 0), 0) < -REACH
    tl.store(strong + (row * tl.num_programs(1) + n) * 2 + half, above.to(tl.int8))


class Layer(NamedTuple):
    """Inputs of a layer. Maps are W [H, K, f] and taps [H, c, K]; an empty tensor is no convolution."""

    q: Tensor
    k: Tensor
    v: Tensor
    logits: Tensor
    """[B, T, G, F] of the gate."""
    taps_q: Tensor
    taps_k: Tensor
    map_q: Tensor
    map_k: Tensor


class Mapped(NamedTuple):
    """What is made of them, and the values."""

    a_q: Tensor
    """[B, H, T, f], times log2 e."""
    norms_q: Tensor
    """[B, H, 2, T] fp32."""
    a_k: Tensor
    norms_k: Tensor
    running: Tensor
    """[B, G, T, F] fp32, log decays since a tile's start."""
    strong: Tensor
    """[B, G, tiles, 2] int8, whether a gate of the tile is strong in a half of the features."""
    v: Tensor

    @property
    def sizes(self) -> dict[str, int]:
        """Constants of a launch."""
        (heads, f), value_dim = self.a_q.shape[1::2], self.v.shape[3]
        return {
            "H": heads, "R": heads // self.v.shape[2], "V": value_dim, "VP": padded(value_dim),
            "f": f, "FP": half_width(f, self.v.dtype), "C": blocks("gated_lawcat_states", self.v)[0]["C"],
            "PRECISION": precision(self.v.dtype), "DTYPE": gated_dtype(self.v.dtype)[0],
        }  # fmt: skip

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, tokens and query heads."""
        batch, heads, time, _ = self.a_q.shape
        return batch, time, heads

    @property
    def tiles(self) -> int:
        return self.strong.shape[2]


def mapped(layer: Layer, steps: float) -> Mapped:
    of_q = half_logits(layer.q, layer.taps_q, layer.map_q)
    of_k = half_logits(layer.k, layer.taps_k, layer.map_k)
    return Mapped(*of_q, *of_k, *gates(layer.logits, layer.v, steps), layer.v)


def half_logits(
    x: Tensor, taps: Tensor, weight: Tensor, chosen: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """(a log2 e [B, H, T, f], norms [B, H, 2, T] fp32) of q or k."""
    (batch, time, groups, width), (heads, _, f) = x.shape, weight.shape
    dtype = torch.float32 if x.dtype == torch.float32 else torch.float16
    a = torch.empty(batch, heads, time, f, dtype=dtype, device=x.device)
    norms = torch.empty(batch, heads, 2, time, dtype=torch.float32, device=x.device)
    at_once, sizes, options = maps_launch(x, heads, chosen)
    maps_kernel[(heads // at_once, cdiv(time, sizes["BT"]), batch)](
        x, taps, weight, a, norms, *steps_of(x), time,
        H=heads, R=heads // groups, K=width, f=f, FP=half_width(f, x.dtype), TAPS=taps_of(taps), HEADS=at_once,
        PRECISION=precision(x.dtype), **sizes, **options,
    )  # fmt: skip
    return a, norms


def maps_launch(
    x: Tensor, heads: int, chosen: Launch | None = None
) -> tuple[int, dict[str, int], dict[str, int]]:
    """(heads of a program, its block sizes, its options). Two heads share an input where its channels are several
    blocks of 16 bits: otherwise loads cannot run ahead, and registers do not hold them."""
    groups, width = x.shape[2:]
    if heads // groups % 2 == 0 and x.dtype != torch.float32:
        sizes, options = blocks("gated_lawcat_maps_shared", x, chosen)
        if width > sizes["BK"] and width % sizes["BK"] == 0:
            return 2, sizes, options
        chosen = None
    sizes, options = blocks("gated_lawcat_maps", x, chosen)
    return 1, sizes | {"BK": block_of(width, sizes["BK"])}, options


def gates(logits: Tensor, v: Tensor, steps: float, chosen: Launch | None = None) -> tuple[Tensor, Tensor]:
    """(running sums [B, G, T, F] fp32, whether a half of a tile is strong [B, G, tiles, 2])."""
    batch, time, groups, width = logits.shape
    size = blocks("gated_lawcat_states", v)[0]["C"]
    tiles = cdiv(time, size)
    running = torch.empty(batch, groups, time, width, dtype=torch.float32, device=v.device)
    strong = torch.empty(batch, groups, tiles, 2, dtype=torch.int8, device=v.device)
    _, options = blocks("gated_lawcat_gates", v, chosen)
    gates_kernel[(2 * groups, tiles, batch)](
        logits, running, strong, *steps_of(logits), time, 1.0 / steps,
        f=width // 2, FP=padded(width // 2), C=size, DTYPE=gated_dtype(v.dtype)[0], **options,
    )  # fmt: skip
    return running, strong


def block_of(width: int, size: int) -> int:
    """Channels that a program has at once: ``size`` where they divide into such blocks, else all."""
    return padded(width) if width % size else size


def half_width(f: int, dtype: torch.dtype) -> int:
    """The block of a half of the features. In 16 bits it is 64 or more: Triton 3.6 compiles the gradients of 32 wrongly
    for Hopper, by an eighth of q's and any number for k's."""
    return padded(f) if dtype == torch.float32 else max(64, padded(f))


def taps_of(taps: Tensor) -> int:
    return taps.shape[1] if taps.numel() else 0


def layer_of(
    q: Tensor, k: Tensor, v: Tensor, logits: Tensor, taps_q: Tensor | None, taps_k: Tensor | None, map_q: Tensor,
    map_k: Tensor,
) -> Layer:  # fmt: skip
    """Of taps [H, K, c]. Maps in the dtype of products; channels beside each other."""
    inputs = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v, logits))
    taps = (map_q.new_empty(0) if x is None else x.transpose(1, 2).contiguous() for x in (taps_q, taps_k))
    return Layer(*inputs, *taps, *(x.to(v.dtype).contiguous() for x in (map_q, map_k)))
