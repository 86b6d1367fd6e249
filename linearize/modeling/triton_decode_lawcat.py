"""LAWCAT's step: y [B, 1, H, V] of one new token a row, the state advanced in place in one launch.

    S <- diag(a) S + phi(k^) v^T,   z likewise,   y = S^T phi(q^) / (z . phi(q^) + eps)      (lawcat.py)

or joined to a window under one denominator. Sums fade, and so are read and written at every step; they belong to a
query head. Rings, counters and who may write them are as in ``triton_decode.py``. The slot that a convolution gives up
is read by all heads of a group, so that a tail needs one slot more than the convolution reads. Gates come as
logarithms, from products that are the caller's.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launches import Launch, launch
from .triton_decode_tools import (
    FEW,
    MAPS,
    arrive,
    begin,
    features,
    held_columns,
    held_rows,
    meet,
    padded,
    rows_of,
    scores,
)
from .triton_gated import log_gate


@triton.jit
def convolved(
    ring, new, taps, t, ok, D: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, TAPS: tl.constexpr
) -> Any:
    """Channels ``ok`` of sum_i taps_i x_{t-i}: the newest from ``new``, the others from their slots; no taps: x_t."""
    x = tl.load(new + ok, mask=ok < D, other=0.0).to(tl.float32)
    if TAPS > 0:
        x *= tl.load(taps + ok * TAPS, mask=ok < D, other=0.0).to(tl.float32)
        for i in tl.static_range(TAPS - 1):  # pyright: ignore[reportGeneralTypeIssues]
            past = t - i - 1
            there = (ok < D) & (past >= 0)
            old = tl.load(ring + (past + N) % N * (HEADS * D) + ok, mask=there, other=0.0).to(tl.float32)
            x += old * tl.load(taps + ok * TAPS + i + 1, mask=ok < D, other=0.0).to(tl.float32)
    return x


@triton.jit
def convolved_features(
    ring,
    new,
    taps,
    weight,
    extra,
    t,
    D: tl.constexpr,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    TAPS: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    BK: tl.constexpr,
    MAP: tl.constexpr,
) -> Any:
    """phi of one convolved query or key; weight [D, F] and extra as in ``triton_decode.query_features``."""
    of = tl.arange(0, FP)
    square, along, length = 0.0, 0.0, 0.0
    if MAP >= 5:
        for c in range(0, D, BK):
            ok = c + tl.arange(0, BK)
            x = convolved(ring, new, taps, t, ok, D, N, HEADS, TAPS)
            square += tl.sum(x * x)
            if MAP == 5:
                u = tl.load(extra + ok, mask=ok < D, other=0.0).to(tl.float32)
                along += tl.sum(u * x)
                length += tl.sum(u * u)
    parts = tl.zeros([BK, FP], tl.float32)
    for c in range(0, D, BK):
        ok = c + tl.arange(0, BK)
        x = convolved(ring, new, taps, t, ok, D, N, HEADS, TAPS)
        if MAP == 5:
            u = tl.load(extra + ok, mask=ok < D, other=0.0).to(tl.float32)
            x -= u * (2 * along / tl.maximum(length, 1e-24))
        w = tl.load(
            weight + ok[:, None] * F + of[None, :],
            mask=(ok < D)[:, None] & (of < F)[None, :],
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
def faded(logits, at, inverse, least, F: tl.constexpr):
    """What is left of channels ``at`` after a step: exp(max(logsigmoid(logit) / N, least))."""
    logit = tl.load(logits + at, mask=at < F, other=0.0).to(tl.float32)
    return tl.exp(tl.maximum(log_gate(logit, 0.0, inverse), least))


@triton.jit
def lawcat_step_kernel(
    q,
    k,
    v,
    plain_q,
    plain_k,
    logits,
    tail_q,
    tail_k,
    ring_k,
    ring_v,
    kv,
    seen,
    folded,
    taps_q,
    taps_k,
    map_q,
    map_k,
    extra_q,
    extra_k,
    logit,
    y,
    scale,
    cap,
    eps,
    inverse,
    least,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    plain_q_row,
    plain_q_head,
    plain_k_row,
    plain_k_head,
    logits_row,
    logits_head,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    F: tl.constexpr,  # of one half
    KP: tl.constexpr,
    VP: tl.constexpr,
    FP: tl.constexpr,
    NQ: tl.constexpr,
    NK: tl.constexpr,
    N: tl.constexpr,
    NV: tl.constexpr,
    TAPS_Q: tl.constexpr,
    TAPS_K: tl.constexpr,
    WINDOW: tl.constexpr,
    HALVES: tl.constexpr,
    MAP: tl.constexpr,
    CAP: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
):
    R: tl.constexpr = H // G
    b = tl.program_id(1)
    row = b.to(tl.int64)
    h = tl.program_id(0)
    g = h // R
    t = (tl.load(seen + b) & 0x7FFFFFFF).to(tl.int32)
    od, of, rows = tl.arange(0, KP), tl.arange(0, FP), tl.arange(0, 16)
    k += row * k_row + g * k_head
    v += row * v_row + g * v_head
    plain_q += row * plain_q_row + h * plain_q_head
    plain_k += row * plain_k_row + g * plain_k_head
    tail_q += (row * NQ * H + h) * K
    tail_k += (row * NK * G + g) * K
    wide: tl.constexpr = F if MAP == 2 else K
    q_up, q_down = convolved_features(  # pyright: ignore[reportGeneralTypeIssues]
        tail_q, plain_q, taps_q + h * K * TAPS_Q, map_q + h * K * F, extra_q + h * wide, t,
        K, NQ, H, TAPS_Q, F, FP, BK, MAP,
    )  # fmt: skip
    k_up, k_down = convolved_features(
        tail_k, plain_k, taps_k + h * K * TAPS_K, map_k + h * K * F, extra_k + h * wide, t,
        K, NK, G, TAPS_K, F, FP, BK, MAP,
    )  # fmt: skip
    if TAPS_Q > 0:
        tl.store(tail_q + (t % NQ) * (H * K) + od, tl.load(plain_q + od, mask=od < K), mask=od < K)
    leads = h % R == 0
    if TAPS_K > 0:
        tl.store(tail_k + (t % NK) * (G * K) + od, tl.load(plain_k + od, mask=od < K), mask=(od < K) & leads)
    if WINDOW > 0:
        ring_k += (row * N * G + g) * K
        ring_v += (row * NV * G + g) * V
        tl.store(ring_k + (t % N) * (G * K) + od, tl.load(k + od, mask=od < K), mask=(od < K) & leads)

    logits += row * logits_row + g * logits_head
    kv += (row * H + h) * (HALVES * F * (V + 1))
    decay_up = faded(logits, of, inverse, least, F)
    decay_down = decay_up
    if HALVES == 2:
        decay_down = faded(logits + F, of, inverse, least, F)
    den = eps
    for half in tl.static_range(HALVES):
        decay = decay_up if half == 0 else decay_down
        column = kv + (half * F + of) * (V + 1) + V
        norm = tl.load(column, mask=of < F, other=0.0) * decay + (k_up if half == 0 else k_down)
        tl.store(column, norm, mask=of < F)
        den += tl.sum(norm * (q_up if half == 0 else q_down))
    for c in range(0, V, BV):
        ov = c + tl.arange(0, BV)
        value = tl.load(v + ov, mask=ov < V, other=0.0)
        num = tl.zeros([BV], tl.float32)
        for half in tl.static_range(HALVES):
            decay = decay_up if half == 0 else decay_down
            cells = kv + (half * F + of)[:, None] * (V + 1) + ov[None, :]
            inside = (of < F)[:, None] & (ov < V)[None, :]
            held = tl.load(cells, mask=inside, other=0.0) * decay[:, None]
            held += (k_up if half == 0 else k_down)[:, None] * value.to(tl.float32)[None, :]
            tl.store(cells, held, mask=inside)
            num += tl.sum(held * (q_up if half == 0 else q_down)[:, None], 0)
        over = den
        if WINDOW > 0:
            tl.store(ring_v + (t % NV) * (G * V) + ov, value, mask=(ov < V) & leads)
            heads = tl.load(
                q + row * q_row + h * q_head + rows[:, None] * 0 + od[None, :],
                mask=(rows < 1)[:, None] & (od < K)[None, :],
                other=0.0,
            )
            high, total, acc = begin(heads, k, v, scale, cap, c, K, V, KP, BV, CAP)
            for j in range(tl.maximum(t + 1 - WINDOW, 0), t, BN):
                pos = j + tl.arange(0, BN)
                keys = held_columns(ring_k, pos, t, 0, K, KP, N, G)
                values = held_rows(ring_v, pos, t, c, V, BV, NV, G)
                high, total, acc = meet(
                    scores(heads, keys, scale, cap, CAP), values, pos < t, high, total, acc
                )
            factor = tl.sigmoid(tl.load(logit + h).to(tl.float32))
            num += factor * tl.sum(tl.where((rows == 0)[:, None], acc, 0.0), 0)
            over += factor * tl.sum(tl.where(rows == 0, total, 0.0))
        tl.store(y + (row * H + h) * V + ov, (num / over).to(y.dtype.element_ty), mask=ov < V)
    arrive(seen + b, folded + b, t + 1, t + 1, H)


def lawcat_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tail_q: Tensor,
    tail_k: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    kv: Tensor,
    seen: Tensor,
    folded: Tensor,
    *,
    read: tuple[Tensor, Tensor],
    logits: Tensor,
    steps: float,
    least: float | None = None,
    taps: tuple[Tensor | None, Tensor | None],
    maps: tuple[Tensor, Tensor],
    extras: tuple[Tensor, Tensor] | None = None,
    feature_map: str = "hedgehog",
    scale: float,
    window: int | None = None,
    window_logit: Tensor | None = None,
    softcap: float | None = None,
    eps: float = 1e-10,
    settings: Launch | None = None,
) -> Tensor:
    """y [B, 1, H, V]; tails [B, c, heads, K], rings [B, W, G, D], kv [B, H, F, V + 1] and the counters are written.

    read: q, k before the convolutions; logits [B, 1, G, F] of the gate, whose log decay is logsigmoid / ``steps`` and
    ``least`` or more; taps [H, K, c] of q and k, None where they are not
    convolved; maps, extras as in ``triton_decode.joint_step``. eps is not added to a window's denominator.
    """
    (batch, _, heads, key_dim), (groups, value_dim) = q.shape, v.shape[2:]
    y = v.new_empty(batch, 1, heads, value_dim)
    inputs = [rows_of(x) for x in (q, k, v, *read, logits)]
    halves = 2 if MAPS[feature_map] in (0, 4, 5, 6) else 1
    width = kv.shape[2] // halves
    name = "lawcat_step_few" if batch * heads < FEW else "lawcat_step"
    widths: dict[str, Any] = dict(K=key_dim, V=value_dim, F=width, dtype=q.dtype)
    settings = settings or launch(name, q.device, **widths)
    blocks = dict(settings.blocks)
    blocks |= {"BK": min(blocks["BK"], padded(key_dim)), "BV": min(blocks["BV"], padded(value_dim))}
    extra_q, extra_k = extras or (y, y)
    constants: dict[str, Any] = dict(
        H=heads,
        G=groups,
        K=key_dim,
        V=value_dim,
        F=width,
        KP=padded(key_dim),
        VP=padded(value_dim),
        FP=padded(width),
        NQ=max(1, tail_q.shape[1]),
        NK=max(1, tail_k.shape[1]),
        N=max(1, ring_k.shape[1]),
        NV=max(1, ring_v.shape[1]),
        TAPS_Q=0 if taps[0] is None else taps[0].shape[-1],
        TAPS_K=0 if taps[1] is None else taps[1].shape[-1],
        WINDOW=window or 0,
        HALVES=halves,
        MAP=MAPS[feature_map],
        CAP=softcap is not None,
    )
    arguments: list[Any] = [
        *inputs,
        tail_q,
        tail_k,
        ring_k,
        ring_v,
        kv,
        seen,
        folded,
        y if taps[0] is None else taps[0],
        y if taps[1] is None else taps[1],
        *maps,
        extra_q,
        extra_k,
        y if window_logit is None else window_logit,
        y,
        scale,
        softcap or 0.0,
        0.0 if window else eps,
        1.0 / steps,
        -1e38 if least is None else least,
        *(stride for x in inputs for stride in x.stride()[:2]),
    ]
    lawcat_step_kernel[(heads, batch)](*arguments, **constants, **settings._replace(blocks=blocks).options)
    return y
