"""Liger's step: y [B, 1, H, V] of one new token a row, the state advanced in place in one launch.

    S <- diag(a) S + k~ v^T,    y = m_w window + m_r S^T q~                              (liger.py)

A fading sum has to be written at every step: everything is read and written once. A state belongs to a key/value head,
whose query heads share a program; its columns are split between SPLITS programs where nothing normalises them. Rings,
counters and who may write them are as in ``triton_decode.py``.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launches import Launch, launch
from .triton_decode_tools import FEW, arrive, begin, held_columns, held_rows, meet, padded, rows_of, scores


@triton.jit
def logsigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def liger_step_kernel(
    q,
    k,
    v,
    read_q,
    read_k,
    gate,
    ring_k,
    ring_v,
    kv,
    seen,
    folded,
    bias,
    temperature,
    mix,
    y,
    scale,
    cap,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    read_q_row,
    read_q_head,
    read_k_row,
    read_k_head,
    gate_row,
    gate_head,
    bias_all,
    temperature_all,
    steps,
    floor,
    mix_window,
    mix_recurrent,
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    N: tl.constexpr,
    WINDOW: tl.constexpr,
    RECURRENCE: tl.constexpr,
    HGRN: tl.constexpr,
    RAW: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    MIX: tl.constexpr,  # 0: constants, 1: learnt for the layer, 2: for each head
    CAP: tl.constexpr,
    SPLITS: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
    DEPTH: tl.constexpr,
):
    R: tl.constexpr = H // G
    b = tl.program_id(1)
    row = b.to(tl.int64)
    g = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    t = (tl.load(seen + b) & 0x7FFFFFFF).to(tl.int32)
    od, rows = tl.arange(0, KP), tl.arange(0, 16)
    k += row * k_row + g * k_head
    v += row * v_row + g * v_head
    read_q += row * read_q_row + g * R * read_q_head
    first = tl.maximum(t + 1 - WINDOW, 0)
    total = tl.zeros([16], tl.float32)
    if WINDOW > 0:
        ring_k += (row * N * G + g) * K
        ring_v += (row * N * G + g) * V
        if split == 0:
            tl.store(ring_k + (t % N) * (G * K) + od, tl.load(k + od, mask=od < K), mask=od < K)

    decay = tl.zeros([KP], tl.float32)
    key = tl.zeros([KP], tl.float32)
    if RECURRENCE:
        x = tl.load(gate + row * gate_row + g * gate_head + od, mask=od < K, other=0.0).to(tl.float32)
        if BIAS:
            x += tl.load(bias + g * K + od, mask=od < K, other=0.0).to(tl.float32)
        else:
            x += bias_all
        decay = tl.exp(logsigmoid(x) / steps)
        if HGRN:
            decay = floor + (1.0 - floor) * decay
            key = 1.0 - decay
        else:
            key = tl.load(read_k + row * read_k_row + g * read_k_head + od, mask=od < K, other=0.0).to(
                tl.float32
            )
            if not RAW:
                warm = temperature_all
                if TEMPERATURE:
                    warm = tl.exp(tl.load(temperature + g).to(tl.float32))
                key = tl.where(od < K, key / warm, -float("inf"))
                key = tl.exp(key - tl.max(key, 0))
                key = key / tl.sum(key, 0)
        key = tl.where(od < K, key, 0.0)
        kv += (row * G + g) * (K * (V + NORM))

    per: tl.constexpr = (V + SPLITS - 1) // SPLITS
    for c in range(split * per, (split + 1) * per, BV):
        ov = c + tl.arange(0, BV)
        mine = (ov < V) & (ov < (split + 1) * per)
        value = tl.load(v + ov, mask=mine, other=0.0)
        acc = tl.zeros([16, BV], tl.float32)
        if WINDOW > 0:
            tl.store(ring_v + (t % N) * (G * V) + ov, value, mask=mine)
            heads = tl.load(
                q + row * q_row + (g * R + rows)[:, None] * q_head + od[None, :],
                mask=(rows < R)[:, None] & (od < K)[None, :],
                other=0.0,
            )
            high, total, acc = begin(heads, k, v, scale, cap, c, K, V, KP, BV, CAP)
            for j in tl.range(first, t, BN, num_stages=DEPTH):
                pos = j + tl.arange(0, BN)
                keys = held_columns(ring_k, pos, t, 0, K, KP, N, G)
                values = held_rows(ring_v, pos, t, c, V, BV, N, G)
                high, total, acc = meet(
                    scores(heads, keys, scale, cap, CAP), values, pos < t, high, total, acc
                )
        held = tl.zeros([KP, BV], tl.float32)
        norm = tl.zeros([KP], tl.float32)
        if RECURRENCE:
            cells = kv + od[:, None] * (V + NORM) + ov[None, :]
            inside = (od < K)[:, None] & mine[None, :]
            held = tl.load(cells, mask=inside, other=0.0)
            held = held * decay[:, None] + key[:, None] * value.to(tl.float32)[None, :]
            tl.store(cells, held, mask=inside)
            if NORM:  # one program has all columns, so that nobody else writes this one
                norm = tl.load(kv + od * (V + 1) + V, mask=od < K, other=0.0)
                if c == split * per:
                    norm = norm * decay + key
                    tl.debug_barrier()
                    tl.store(kv + od * (V + 1) + V, norm, mask=od < K)
                tl.debug_barrier()
        for r in tl.static_range(R):
            h = g * R + r
            out = tl.zeros([BV], tl.float32)
            if WINDOW > 0:
                weight = mix_window
                if MIX > 0:
                    weight = tl.exp(tl.load(mix + (h if MIX == 2 else 0)).to(tl.float32))
                sums = tl.sum(tl.where((rows == r)[:, None], acc, 0.0), 0)
                out += sums * (weight / tl.sum(tl.where(rows == r, total, 0.0)))
            if RECURRENCE:
                weight = mix_recurrent
                if MIX > 0:
                    weight = tl.exp(tl.load(mix + (H + h if MIX == 2 else 1)).to(tl.float32))
                query = tl.load(read_q + r * read_q_head + od, mask=od < K, other=0.0).to(tl.float32)
                if not RAW:
                    query = tl.where(od < K, query, -float("inf"))
                    query = tl.exp(query - tl.max(query, 0))
                    query = query / tl.sum(query, 0)
                if NORM:
                    weight = weight / (tl.sum(query * norm) + eps)
                out += tl.sum(held * query[:, None], 0) * weight
            tl.store(y + (row * H + h) * V + ov, out.to(y.dtype.element_ty), mask=mine)
    arrive(seen + b, folded + b, t + 1, t + 1, G * SPLITS)


def liger_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    kv: Tensor,
    seen: Tensor,
    folded: Tensor,
    *,
    read: tuple[Tensor, Tensor],
    gate: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    recurrence: bool = True,
    hgrn: bool = False,
    raw: bool = False,
    normalize_eps: float | None = None,
    gate_bias: float | Tensor = 0.0,
    log_temperature: Tensor | None = None,
    temperature: float = 1.0,
    log_mix: Tensor | None = None,
    mix: tuple[float, float] = (0.5, 0.5),
    steps: float = 16.0,
    floor: float = 0.0,
    settings: Launch | None = None,
) -> Tensor:
    """y [B, 1, H, V]; rings [B, W, G, D], kv [B, G, K, V] (one column more where it is normalised) and the counters are
    written. read: q [B, 1, H, K] and k as the recurrence reads them, before any softmax; gate [B, 1, G, K]."""
    (batch, _, heads, key_dim), (groups, value_dim) = q.shape, v.shape[2:]
    y = v.new_empty(batch, 1, heads, value_dim)
    inputs = [rows_of(x) for x in (q, k, v, *read, gate)]
    name = "liger_step_few" if batch * groups < FEW else "liger_step"
    settings = settings or launch(name, q.device, K=key_dim, V=value_dim, dtype=q.dtype)
    blocks = dict(settings.blocks)
    norm = normalize_eps is not None
    blocks["SPLITS"] = 1 if norm else min(blocks["SPLITS"], max(1, value_dim // 16))
    blocks["BV"] = min(blocks["BV"], padded(-(-value_dim // blocks["SPLITS"])))
    learnt = isinstance(gate_bias, Tensor)
    constants: dict[str, Any] = dict(
        H=heads,
        G=groups,
        K=key_dim,
        V=value_dim,
        KP=padded(key_dim),
        N=max(1, ring_k.shape[1]),
        WINDOW=window or 0,
        RECURRENCE=recurrence,
        HGRN=hgrn,
        RAW=raw,
        NORM=int(norm),
        BIAS=learnt,
        TEMPERATURE=log_temperature is not None,
        MIX=0 if log_mix is None else 1 if log_mix.shape[1] == 1 else 2,
        CAP=softcap is not None,
    )
    arguments: list[Any] = [
        *inputs,
        ring_k,
        ring_v,
        kv,
        seen,
        folded,
        gate_bias if learnt else y,
        y if log_temperature is None else log_temperature,
        y if log_mix is None else log_mix,
        y,
        scale,
        softcap or 0.0,
        *(stride for x in inputs for stride in x.stride()[:2]),
        0.0 if learnt else float(gate_bias),
        float(temperature),
        float(steps),
        float(floor),
        float(mix[0]),
        float(mix[1]),
        normalize_eps or 0.0,
    ]
    liger_step_kernel[(groups * blocks["SPLITS"], batch)](
        *arguments, **constants, **settings._replace(blocks=blocks).options
    )
    return y
