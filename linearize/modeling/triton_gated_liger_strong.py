"""Gradients of Liger's layer in strong tiles, by runs of 16 tokens with the state in registers.

``triton_gated_liger_backward.py`` has the equations. Runs come in order for queries, and last to first for keys and
values, so that what later runs add to dlog a is at hand.
"""

import triton
import triton.language as tl
from torch import Tensor

from .averaged import Averaged
from .triton_common import load_matrix, load_rows, load_transposed, store_rows
from .triton_gated import LOG2E, RUN, blocks, earlier, run_gradient, run_scores, steps_of
from .triton_gated_liger_states import Shape, gate_of, key_features, key_gates, query_features


@triton.jit
def key_gradient(raw, phi_k, of_features, of_gate, bias, inverse, sharpness, HGRN2: tl.constexpr):
    """dk [n, KP] of raw keys from dphi_k and dlog a."""
    if HGRN2:
        of_gate -= (1.0 - phi_k) * of_features
        found = tl.zeros_like(of_features)
    else:
        along = tl.sum(phi_k * of_features, 1)
        found = phi_k * (of_features - along[:, None]) * sharpness
    return found + of_gate * inverse / (1.0 + tl.exp2(tl.minimum((raw + bias) * LOG2E, 126.0)))


@triton.jit(do_not_specialize=["time"])
def strong_queries_kernel(
    q_plain, k_plain, v, dy, before, strong, dq, change,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    time, bias, inverse, sharpness, factor,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    HGRN2: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    H: tl.constexpr = G * R
    tile = (b * G + g) * tl.cdiv(time, C) + n
    if tl.load(strong + tile) == 0:
        return
    q_plain += b * q_b + g * R * q_h
    dy += b * time * (H * V) + g * R * V
    dq += b * time * (H * K) + g * R * K
    k_plain += b * k_b + g * k_h
    v += b * v_b + g * v_h
    state = load_matrix(before + tile * (V * K), V, K, VP, KP).to(tl.float32)
    for i in range(0, C // RUN):
        t = n * C + i * RUN
        log_decay = key_gates(k_plain, t, k_t, time, bias, inverse, K, KP, RUN)
        phi_k = key_features(k_plain, t, k_t, time, bias, inverse, sharpness, K, KP, RUN, HGRN2)
        values = load_rows(v, t, v_t, time, V, VP, RUN).to(DTYPE)
        total = tl.zeros([RUN, KP], tl.float32)
        for r in range(0, R):
            wanted = load_rows(dy + r * V, t, H * V, time, V, VP, RUN).to(DTYPE)
            pairs = tl.dot(wanted, tl.trans(values), input_precision=PRECISION)
            pairs = tl.where(earlier(RUN, False), pairs, 0.0)
            found = tl.dot(wanted, state.to(DTYPE), input_precision=PRECISION) * tl.exp(
                tl.cumsum(log_decay, 0)
            )
            found += run_gradient(pairs, phi_k, log_decay, KP, DTYPE, PRECISION, False)
            phi_q = query_features(q_plain + r * q_h, t, q_t, time, K, KP, RUN)
            found *= phi_q
            total += found
            found = (found - phi_q * tl.sum(found, 1)[:, None]) * factor
            store_rows(dq + r * K, found, t, H * K, time, K, KP, RUN)
        store_rows(change + b * time * (G * K) + g * K, total, t, G * K, time, K, KP, RUN)
        late = (phi_k * tl.exp(tl.cumsum(log_decay, 0, reverse=True) - log_decay)).to(DTYPE)
        state = state * tl.exp(tl.sum(log_decay, 0))[None, :]
        state = tl.dot(tl.trans(values), late, state, input_precision=PRECISION)


@triton.jit(do_not_specialize=["time"])
def strong_keys_kernel(
    q_plain, k_plain, v, dy, before, behind, strong, change, dk,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    time, bias, inverse, sharpness, factor,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    HGRN2: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tiles = tl.cdiv(time, C)
    tile = (b * G + g) * tiles + n
    if tl.load(strong + tile) == 0:
        return
    q_plain += b * q_b + g * R * q_h
    dy += b * time * (G * R * V) + g * R * V
    k_plain += b * k_b + g * k_h
    v += b * v_b + g * v_h
    change += b * time * (G * K) + g * K
    state = load_matrix(behind + tile * (V * K), V, K, VP, KP).to(tl.float32)
    later = tl.zeros([KP], tl.float32)
    if n + 1 < tiles:
        later += tl.sum(state * load_matrix(before + (tile + 1) * (V * K), V, K, VP, KP).to(tl.float32), 0)
    for i in range(0, C // RUN):
        t = n * C + C - RUN - i * RUN
        log_decay = key_gates(k_plain, t, k_t, time, bias, inverse, K, KP, RUN)
        reach = tl.exp(tl.cumsum(log_decay, 0))
        values = load_rows(v, t, v_t, time, V, VP, RUN).to(DTYPE)
        found = tl.exp(tl.cumsum(log_decay, 0, reverse=True) - log_decay)
        found *= tl.dot(values, state.to(DTYPE), input_precision=PRECISION)
        state = state * tl.exp(tl.sum(log_decay, 0))[None, :]
        for r in range(0, R):
            phi_q = query_features(q_plain + r * q_h, t, q_t, time, K, KP, RUN)
            wanted = load_rows(dy + r * V, t, G * R * V, time, V, VP, RUN).to(DTYPE)
            pairs = tl.dot(values, tl.trans(wanted), input_precision=PRECISION)
            pairs = tl.where(earlier(RUN, True), pairs, 0.0)
            found += run_gradient(pairs, phi_q, log_decay, KP, DTYPE, PRECISION, True)
            state = tl.dot(tl.trans(wanted), (phi_q * reach).to(DTYPE), state, input_precision=PRECISION)
        phi_k = key_features(k_plain, t, k_t, time, bias, inverse, sharpness, K, KP, RUN, HGRN2)
        of_gate = load_rows(change, t, G * K, time, K, KP, RUN) - phi_k * found
        of_run = tl.sum(of_gate, 0)
        of_gate = tl.cumsum(of_gate, 0, reverse=True) + later[None, :]
        later += of_run
        raw = load_rows(k_plain, t, k_t, time, K, KP, RUN).to(tl.float32)
        found = key_gradient(raw, phi_k, found, of_gate, bias, inverse, sharpness, HGRN2) * factor
        store_rows(dk + b * time * (G * K) + g * K, found, t, G * K, time, K, KP, RUN)


@triton.jit(do_not_specialize=["time"])
def strong_values_kernel(
    q_plain, k_plain, dy, behind, strong, dv,
    q_b, q_t, q_h, k_b, k_t, k_h,
    time, bias, inverse, sharpness, factor,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    HGRN2: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """``ADD`` to the gradient that is in dv, the window's."""
    n, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tile = (b * G + g) * tl.cdiv(time, C) + n
    if tl.load(strong + tile) == 0:
        return
    q_plain += b * q_b + g * R * q_h
    dy += b * time * (G * R * V) + g * R * V
    dv += b * time * (G * V) + g * V
    k_plain += b * k_b + g * k_h
    state = load_transposed(behind + tile * (V * K), V, K, VP, KP).to(tl.float32)
    for i in range(0, C // RUN):
        t = n * C + C - RUN - i * RUN
        log_decay = key_gates(k_plain, t, k_t, time, bias, inverse, K, KP, RUN)
        phi_k = key_features(k_plain, t, k_t, time, bias, inverse, sharpness, K, KP, RUN, HGRN2)
        reach = tl.exp(tl.cumsum(log_decay, 0))
        late = (phi_k * tl.exp(tl.cumsum(log_decay, 0, reverse=True) - log_decay)).to(DTYPE)
        found = tl.dot(late, state.to(DTYPE), input_precision=PRECISION)
        state = state * tl.exp(tl.sum(log_decay, 0))[:, None]
        for r in range(0, R):
            wanted = load_rows(dy + r * V, t, G * R * V, time, V, VP, RUN).to(DTYPE)
            phi_q = query_features(q_plain + r * q_h, t, q_t, time, K, KP, RUN)
            scores = run_scores(phi_q, phi_k, log_decay, KP, DTYPE, PRECISION, True)
            state = tl.dot(tl.trans((phi_q * reach).to(DTYPE)), wanted, state, input_precision=PRECISION)
            found = tl.dot(scores.to(DTYPE), wanted, found, input_precision=PRECISION)
        found = found * factor
        if ADD:
            found += load_rows(dv, t, G * V, time, V, VP, RUN).to(tl.float32)
        store_rows(dv, found, t, G * V, time, V, VP, RUN)


def strong_queries(
    q_plain: Tensor, k_plain: Tensor, v: Tensor, dy: Tensor, before: Tensor, strong: Tensor, dq: Tensor,
    change: Tensor, terms: Averaged, shape: Shape,
) -> None:  # fmt: skip
    """What ``queries`` leaves out of dq and ``change``."""
    _, options = blocks("gated_liger_queries_strong", v)
    strong_queries_kernel[(shape.tiles, shape.groups, shape.batch)](
        q_plain, k_plain, v, dy, before, strong, dq, change, *steps_of(q_plain), *steps_of(k_plain), *steps_of(v),
        shape.time, *gate_of(terms), terms.mix_recurrent, R=shape.per_group, HGRN2=terms.hgrn2,
        **shape.constants(v), **options,
    )  # fmt: skip


def strong_keys(
    q_plain: Tensor, k_plain: Tensor, v: Tensor, dy: Tensor, before: Tensor, behind: Tensor, strong: Tensor,
    change: Tensor, dk: Tensor, terms: Averaged, shape: Shape,
) -> None:  # fmt: skip
    """What ``keys`` leaves out of dk."""
    _, options = blocks("gated_liger_keys_strong", v)
    strong_keys_kernel[(shape.tiles, shape.groups, shape.batch)](
        q_plain, k_plain, v, dy, before, behind, strong, change, dk,
        *steps_of(q_plain), *steps_of(k_plain), *steps_of(v),
        shape.time, *gate_of(terms), terms.mix_recurrent, R=shape.per_group, HGRN2=terms.hgrn2,
        **shape.constants(v), **options,
    )  # fmt: skip


def strong_values(
    q_plain: Tensor, k_plain: Tensor, dy: Tensor, behind: Tensor, strong: Tensor, dv: Tensor, terms: Averaged,
    shape: Shape,
) -> None:  # fmt: skip
    """What ``keys`` leaves out of dv."""
    _, options = blocks("gated_liger_values_strong", dy)
    strong_values_kernel[(shape.tiles, shape.groups, shape.batch)](
        q_plain, k_plain, dy, behind, strong, dv, *steps_of(q_plain), *steps_of(k_plain),
        shape.time, *gate_of(terms), terms.mix_recurrent, R=shape.per_group, HGRN2=terms.hgrn2,
        **shape.constants(dy), ADD=terms.window > 0, **options,
    )  # fmt: skip
