"""Gradients of Liger's layer: dq and dk of the window (rotated), dq and dk of the recurrence (not rotated), and dv.

With u = dy times the recurrence's share and S_t the state, everything per key/value head and summed over its queries,

    dphi_q_t = S_t u_t                              R_t = diag(a_{t+1}) R_{t+1} + phi_q_t u_t^T
    dphi_k_t = R_t v_t                              dv_t = R_t^T phi_k_t
    dlog a_t = sum_{s >= t} (phi_q_s dphi_q_s - phi_k_s dphi_k_s)

A sum over all later tokens is never formed: behind a tile it is the sum over values of S times R there, channel by
channel, which both walks have. From dlog a, dk = dlog a sigmoid(-k) / N joins the features' own gradient; for hgrn2,
whose key is 1 - a, dlog a also loses a dphi_k. Kept from the forward pass are the states before tiles.

    back_sums    what a tile adds to R, and log decays once more      a tile of a group
    queries      dq, and phi_q dphi_q summed over heads, fp32         a tile of a group
    keys         dphi_k, fp32, and dv                                 a tile of a group
    gates        dk from dphi_k and dlog a                            a tile of a group

Strong tiles are ``triton_gated_liger_strong.py``'s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .averaged import Averaged
from .launches import Launch
from .triton_common import load_matrix, load_rows, store_rows
from .triton_gated import blocks, earlier, steps_of, store_matrix, until_rows
from .triton_gated_liger import forward
from .triton_gated_liger_states import (
    Shape,
    decays_of_tile,
    gate_of,
    key_features,
    query_features,
    scanned,
    shape_of,
)
from .triton_gated_liger_strong import key_gradient, strong_keys, strong_queries, strong_values
from .triton_gated_window import window_keys, window_queries
from .triton_together import compiled_together


@triton.jit(do_not_specialize=["time"])
def back_sums_kernel(
    q_plain, k_plain, dy, decays, sums,
    q_b, q_t, q_h, k_b, k_t, k_h,
    time, bias, inverse,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``sums_kernel`` of R."""
    n, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = n * C
    q_plain += b * q_b + g * R * q_h
    dy += b * time * (G * R * V) + g * R * V
    decays += b * time * (G * K) + g * K
    k_plain += b * k_b + g * k_h
    _, since = decays_of_tile(k_plain, decays, t, k_t, time, bias, inverse, G, K, KP, C, DTYPE)
    reach = tl.exp2(since)
    state = tl.zeros([VP, KP], tl.float32)
    for r in tl.range(0, R, num_stages=STAGES):
        reading = (query_features(q_plain + r * q_h, t, q_t, time, K, KP, C) * reach).to(DTYPE)
        wanted = load_rows(dy + r * V, t, G * R * V, time, V, VP, C).to(DTYPE)
        state = tl.dot(tl.trans(wanted), reading, state, input_precision=PRECISION)
    tile = (b * G + g) * tl.cdiv(time, C) + n
    store_matrix(sums + tile * (V * K), state, V, K, VP, KP)


@triton.jit(do_not_specialize=["time"])
def queries_kernel(
    q_plain, k_plain, v, dy, decays, before, strong, dq, change,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    time, bias, inverse, sharpness, factor,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    HGRN2: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All tiles but the strong ones; ``change`` is without ``factor``."""
    n, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    H: tl.constexpr = G * R
    tile = (b * G + g) * tl.cdiv(time, C) + n
    if tl.load(strong + tile) > 0:
        return
    t = n * C
    q_plain += b * q_b + g * R * q_h
    dy += b * time * (H * V) + g * R * V
    dq += b * time * (H * K) + g * R * K
    decays += b * time * (G * K) + g * K
    early = key_features(k_plain + b * k_b + g * k_h, t, k_t, time, bias, inverse, sharpness, K, KP, C, HGRN2)
    early = (early * tl.exp2(-load_rows(decays, t, G * K, time, K, KP, C))).to(DTYPE)
    values = load_rows(v + b * v_b + g * v_h, t, v_t, time, V, VP, C).to(DTYPE)
    state = load_matrix(before + tile * (V * K), V, K, VP, KP)
    total = tl.zeros([C, KP], tl.float32)
    for r in tl.range(0, R, num_stages=STAGES):
        wanted = load_rows(dy + r * V, t, H * V, time, V, VP, C).to(DTYPE)
        pairs = tl.dot(wanted, tl.trans(values), input_precision=PRECISION)
        pairs = tl.where(earlier(C, False), pairs, 0.0)
        # Two products: one that goes on in another is laid out twice over the warps.
        found = tl.dot(pairs.to(DTYPE), early, input_precision=PRECISION)
        found += tl.dot(wanted, state, input_precision=PRECISION)
        phi_q = query_features(q_plain + r * q_h, t, q_t, time, K, KP, C)
        found *= phi_q * tl.exp2(load_rows(decays, t, G * K, time, K, KP, C))
        total += found
        found = (found - phi_q * tl.sum(found, 1)[:, None]) * factor
        store_rows(dq + r * K, found, t, H * K, time, K, KP, C)
    store_rows(change + b * time * (G * K) + g * K, total, t, G * K, time, K, KP, C)


@triton.jit(do_not_specialize=["time"])
def keys_kernel(
    q_plain, k_plain, v, dy, decays, behind, strong, dphi, dv,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    time, bias, inverse, sharpness, factor,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    HGRN2: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, ADD: tl.constexpr,
    BT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All tiles but the strong ones; ``ADD`` to the gradient that is in dv, the window's."""
    n, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tile = (b * G + g) * tl.cdiv(time, C) + n
    if tl.load(strong + tile) > 0:
        return
    t = n * C
    q_plain += b * q_b + g * R * q_h
    dy += b * time * (G * R * V) + g * R * V
    decays += b * time * (G * K) + g * K
    k_plain += b * k_b + g * k_h
    token = tl.minimum(t + C, time).to(tl.int64) - 1
    channel = tl.arange(0, KP)
    whole = tl.exp2(tl.load(decays + token * (G * K) + channel, mask=channel < K, other=0.0))
    phi_k = key_features(k_plain, t, k_t, time, bias, inverse, sharpness, K, KP, C, HGRN2)
    early = (phi_k * tl.exp2(-load_rows(decays, t, G * K, time, K, KP, C))).to(DTYPE)
    values = load_rows(v + b * v_b + g * v_h, t, v_t, time, V, VP, C).to(DTYPE)
    # Behind the tile the state is as far away as for the first token, times what reach has decayed.
    state = (load_matrix(behind + tile * (V * K), V, K, VP, KP).to(tl.float32) * whole[None, :]).to(DTYPE)
    on_keys = tl.dot(values, state, input_precision=PRECISION)
    on_values = tl.dot(early, tl.trans(state), input_precision=PRECISION)
    key = tl.arange(0, C)
    for i in tl.range(0, R * (C // BT), num_stages=STAGES):
        r, first = i // (C // BT), i % (C // BT) * BT
        reading = query_features(q_plain + r * q_h, t + first, q_t, time, K, KP, BT)
        reading = (reading * tl.exp2(load_rows(decays, t + first, G * K, time, K, KP, BT))).to(DTYPE)
        wanted = load_rows(dy + r * V, t + first, G * R * V, time, V, VP, BT).to(DTYPE)
        read = key[:, None] <= (first + tl.arange(0, BT))[None, :]
        scores = tl.dot(early, tl.trans(reading), input_precision=PRECISION)
        scores = tl.where(read, scores, 0.0)
        on_values = tl.dot(scores.to(DTYPE), wanted, on_values, input_precision=PRECISION)
        pairs = tl.dot(values, tl.trans(wanted), input_precision=PRECISION)
        pairs = tl.where(read, pairs, 0.0)
        on_keys = tl.dot(pairs.to(DTYPE), reading, on_keys, input_precision=PRECISION)
    dv += b * time * (G * V) + g * V
    on_values *= factor
    if ADD:
        on_values += load_rows(dv, t, G * V, time, V, VP, C).to(tl.float32)
    store_rows(dv, on_values, t, G * V, time, V, VP, C)
    on_keys *= tl.exp2(-load_rows(decays, t, G * K, time, K, KP, C))
    store_rows(dphi + b * time * (G * K) + g * K, on_keys, t, G * K, time, K, KP, C)


@triton.jit(do_not_specialize=["time"])
def gates_kernel(
    k_plain, dphi, change, before, behind, strong, dk,
    k_b, k_t, k_h,
    time, bias, inverse, sharpness, factor,
    G: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, HGRN2: tl.constexpr,
    C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """All tiles but the strong ones, by blocks of BT tokens, last to first."""
    n, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tiles = tl.cdiv(time, C)
    tile = (b * G + g) * tiles + n
    if tl.load(strong + tile) > 0:
        return
    # What crosses the tile's end.
    later = tl.zeros([KP], tl.float32)
    if n + 1 < tiles:
        channel = tl.arange(0, KP)
        for i in range(0, VP, BV):
            value = i + tl.arange(0, BV)
            at = tile * (V * K) + value[:, None] * K + channel[None, :]
            there = (value < V)[:, None] & (channel < K)[None, :]
            kept = tl.load(before + V * K + at, mask=there, other=0.0).to(tl.float32)
            later += tl.sum(kept * tl.load(behind + at, mask=there, other=0.0).to(tl.float32), 0)
    k_plain += b * k_b + g * k_h
    at = b * time * (G * K) + g * K
    for i in range(0, C // BT):
        t = n * C + C - BT - i * BT
        raw = load_rows(k_plain, t, k_t, time, K, KP, BT).to(tl.float32)
        phi_k = key_features(k_plain, t, k_t, time, bias, inverse, sharpness, K, KP, BT, HGRN2)
        of_features = load_rows(dphi + at, t, G * K, time, K, KP, BT)
        of_gate = load_rows(change + at, t, G * K, time, K, KP, BT) - phi_k * of_features
        of_block = tl.sum(of_gate, 0)
        of_gate += until_rows(of_gate, BT, DTYPE) + later[None, :]
        later += of_block
        found = key_gradient(raw, phi_k, of_features, of_gate, bias, inverse, sharpness, HGRN2) * factor
        store_rows(dk + at, found, t, G * K, time, K, KP, BT)


def backward(
    q: Tensor, k: Tensor, v: Tensor, q_plain: Tensor, k_plain: Tensor, before: Tensor, strong: Tensor, dy: Tensor,
    terms: Averaged, shape: Shape,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k (None without a window), v, q_plain and k_plain."""
    dy = dy.contiguous()
    if terms.window:
        window = {"scale": terms.scale, "window": terms.window, "factor": terms.mix_window}
        dq, lse, delta = window_queries(q, k, v, dy, **window)
        dk, dv = window_keys(q, k, v, dy, lse, delta, **window)
    else:
        dq, dk, dv = None, None, torch.empty(v.shape, dtype=v.dtype, device=v.device)
    behind, decays = back_tile_states(q_plain, k_plain, dy, terms, shape)
    inputs = (q_plain, k_plain, v, dy, decays)
    dq_plain, change = queries(*inputs, before, strong, terms, shape)
    dphi = keys(*inputs, behind, strong, dv, terms, shape)
    dk_plain = gates(k_plain, dphi, change, before, behind, strong, terms, shape)
    strong_keys(q_plain, k_plain, v, dy, before, behind, strong, change, dk_plain, terms, shape)
    return dq, dk, dv, dq_plain, dk_plain


def back_tile_states(
    q_plain: Tensor, k_plain: Tensor, dy: Tensor, terms: Averaged, shape: Shape, chosen: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """(R [B, G, tiles, V, K] behind every tile, log decays as ``tile_sums`` has them)."""
    decays = torch.empty(k_plain.shape, dtype=torch.float32, device=dy.device)
    lead = (shape.batch, shape.groups, shape.tiles)
    sums = torch.empty(*lead, shape.value_dim, shape.key_dim, dtype=torch.float32, device=dy.device)
    sizes, options = blocks("gated_liger_back_sums", dy, chosen)
    back_sums_kernel[(shape.tiles, shape.groups, shape.batch)](
        q_plain, k_plain, dy, decays, sums, *steps_of(q_plain), *steps_of(k_plain), shape.time, *gate_of(terms)[:2],
        R=shape.per_group, **shape.constants(dy), **sizes, **options,
    )  # fmt: skip
    return scanned(sums, decays, shape, dy.dtype, reverse=True)[0], decays


def queries(
    q_plain: Tensor, k_plain: Tensor, v: Tensor, dy: Tensor, decays: Tensor, before: Tensor, strong: Tensor,
    terms: Averaged, shape: Shape, chosen: Launch | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dq of the recurrence, phi_q dphi_q [B, T, G, K] fp32)."""
    dq = torch.empty(q_plain.shape, dtype=q_plain.dtype, device=v.device)
    change = torch.empty_like(decays)
    sizes, options = blocks("gated_liger_queries", v, chosen)
    queries_kernel[(shape.tiles, shape.groups, shape.batch)](
        q_plain, k_plain, v, dy, decays, before, strong, dq, change,
        *steps_of(q_plain), *steps_of(k_plain), *steps_of(v), shape.time, *gate_of(terms), terms.mix_recurrent,
        R=shape.per_group, HGRN2=terms.hgrn2, **shape.constants(v), **sizes, **options,
    )  # fmt: skip
    strong_queries(q_plain, k_plain, v, dy, before, strong, dq, change, terms, shape)
    return dq, change


def keys(
    q_plain: Tensor, k_plain: Tensor, v: Tensor, dy: Tensor, decays: Tensor, behind: Tensor, strong: Tensor,
    dv: Tensor, terms: Averaged, shape: Shape, chosen: Launch | None = None,
) -> Tensor:  # fmt: skip
    """dphi_k [B, T, G, K] fp32 of tiles that are not strong; the recurrence's dv is added to the window's in place."""
    dphi = torch.empty_like(decays)
    sizes, options = blocks("gated_liger_keys", v, chosen)
    keys_kernel[(shape.tiles, shape.groups, shape.batch)](
        q_plain, k_plain, v, dy, decays, behind, strong, dphi, dv,
        *steps_of(q_plain), *steps_of(k_plain), *steps_of(v), shape.time, *gate_of(terms), terms.mix_recurrent,
        R=shape.per_group, HGRN2=terms.hgrn2, **shape.constants(v), ADD=terms.window > 0, **sizes, **options,
    )  # fmt: skip
    strong_values(q_plain, k_plain, dy, behind, strong, dv, terms, shape)
    return dphi


def gates(
    k_plain: Tensor, dphi: Tensor, change: Tensor, before: Tensor, behind: Tensor, strong: Tensor, terms: Averaged,
    shape: Shape, chosen: Launch | None = None,
) -> Tensor:  # fmt: skip
    """dk of the recurrence, of tiles that are not strong."""
    dk = torch.empty(k_plain.shape, dtype=k_plain.dtype, device=dphi.device)
    sizes, options = blocks("gated_liger_gates", k_plain, chosen)
    gates_kernel[(shape.tiles, shape.groups, shape.batch)](
        k_plain, dphi, change, before, behind, strong, dk, *steps_of(k_plain), shape.time, *gate_of(terms),
        terms.mix_recurrent, HGRN2=terms.hgrn2, **shape.constants(k_plain), **sizes, **options,
    )  # fmt: skip
    return dk


class _Averaged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, q_plain, k_plain, terms, stop):
        q, k, v, q_plain, k_plain = (
            x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v, q_plain, k_plain)
        )
        y, last, before, strong = forward(q, k, v, q_plain, k_plain, terms, stop)
        ctx.save_for_backward(q, k, v, q_plain, k_plain, before, strong)
        ctx.terms, ctx.shape = terms, shape_of(q, k, v)
        if last is not None:
            ctx.mark_non_differentiable(last)
        return y, last

    @staticmethod
    def backward(ctx, dy, _):
        q, k, v, q_plain, k_plain, before, strong = ctx.saved_tensors
        found = backward(q, k, v, q_plain, k_plain, before, strong, dy, ctx.terms, ctx.shape)
        return *found, None, None


@compiled_together
def averaged_kernel(
    q: Tensor, k: Tensor, v: Tensor, q_plain: Tensor, k_plain: Tensor, terms: Averaged, *,
    stop: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``averaged.averaged_composed``; no gradient flows through the state."""
    return _Averaged.apply(q, k, v, q_plain, k_plain, terms, stop)  # pyright: ignore[reportReturnType]
