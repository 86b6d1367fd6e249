"""y [B, 1, H, V] of one new token a row and the state advanced in place, in one launch: window, sums, joint divide.

The function is ``reference.joint_recurrent`` after ``reference.fold`` (arXiv 2410.10254, eq. 7), or without sums
``window_recurrent``. With t the new token's position, [first, t] its window and ``folded`` what the sums hold,

    y = [g sum_{first <= j <= t} exp(s_j - c) v_j + b (sum_{folded <= j < first} (phi_q . phi_k_j) v_j + S^T phi_q)]
      / [the same with v_j = 1]

Tokens in [folded, first) have left the window and lie in the ring still. They are scored one by one until there are
``FOLD`` of them; then the same launch adds them to S and z. So S, most of what a step reads, is written at one step in
FOLD, and sums are the reference's up to rounding.

A program has HEADS query heads of one key/value head and reads k and v for all of them at once. What several programs
share: (1) the slot of the new token, written by one of them and read by none, since all have the token from the inputs;
(2) the counters, which the last program of a row advances: every program counts itself in the upper bits of ``seen``
after its last read, and whoever finds that all others have done so writes both. A sum is read and written by one
program alone, which is why the columns of V are not split. Numerators and denominators are fp32; operands of products
have the inputs' dtype.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launches import Launch, launch
from .triton_decode_tools import (
    FEW,
    LOW,
    MAPS,
    arrive,
    begin,
    fold_in,
    held_columns,
    held_rows,
    key_features,
    meet,
    meet_sums,
    padded,
    query_features,
    rows_of,
    scores,
    slots,
)

KINDS = {None: 0, "sliding": 1, "terraced": 2}


@triton.jit
def joint_step_kernel(
    q,
    k,
    v,
    ring_k,
    ring_v,
    sink_k,
    sink_v,
    kv,
    z,
    seen,
    folded,
    map_q,
    map_k,
    extra_q,
    extra_k,
    logit,
    y,
    scale,
    cap,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    F: tl.constexpr,  # of one half
    KP: tl.constexpr,
    VP: tl.constexpr,
    FP: tl.constexpr,
    N: tl.constexpr,
    WINDOW: tl.constexpr,
    KIND: tl.constexpr,
    SINKS: tl.constexpr,
    LINEAR: tl.constexpr,
    HALVES: tl.constexpr,
    MAP: tl.constexpr,
    TIED: tl.constexpr,
    AFFINE: tl.constexpr,
    CAP: tl.constexpr,
    FOLD: tl.constexpr,
    HEADS: tl.constexpr,
    BN: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BF: tl.constexpr,
    DEPTH: tl.constexpr,
):
    b = tl.program_id(1)
    row = b.to(tl.int64)
    h0 = tl.program_id(0) * HEADS
    g = h0 // (H // G)
    t = (tl.load(seen + b) & 0x7FFFFFFF).to(tl.int32)
    done = tl.load(folded + b).to(tl.int32)
    if KIND == 0:
        first = t + 1
    elif KIND == 1:
        first = tl.maximum(t + 1 - WINDOW, 0)
    else:
        first = tl.maximum((t // WINDOW - 1) * WINDOW, 0)
    first = tl.maximum(first, done)

    od, ov, rows = tl.arange(0, KP), tl.arange(0, VP), tl.arange(0, 16)
    k += row * k_row + g * k_head
    v += row * v_row + g * v_head
    ring_k += (row * N * G + g) * K
    ring_v += (row * N * G + g) * V
    if h0 % (H // G) == 0:
        new_k = tl.load(k + od, mask=od < K, other=0.0)
        new_v = tl.load(v + ov, mask=ov < V, other=0.0)
        tl.store(ring_k + (t % N) * (G * K) + od, new_k, mask=od < K)
        tl.store(ring_v + (t % N) * (G * V) + ov, new_v, mask=ov < V)
        if SINKS > 0:  # noqa: SIM102 (a branch of the compiler)
            if t < SINKS:
                tl.store(sink_k + ((row * SINKS + t) * G + g) * K + od, new_k, mask=od < K)
                tl.store(sink_v + ((row * SINKS + t) * G + g) * V + ov, new_v, mask=ov < V)

    fold = first - done >= FOLD
    linear = tl.zeros([16, VP], tl.float32)
    weight = tl.zeros([16], tl.float32)
    if LINEAR:
        for r in tl.static_range(HEADS):
            h = h0 + r
            hs = g if TIED else h
            sums = kv + (row * (G if TIED else H) + hs) * (HALVES * F * V)
            norms = z + (row * (G if TIED else H) + hs) * (HALVES * F)
            up, down = query_features(
                q + row * q_row + h * q_head,
                map_q + h * K * F,
                extra_q + h * (F if MAP == 2 else K),
                K, F, FP, BK, DEPTH, MAP,
            )  # fmt: skip
            part, share = meet_sums(sums, norms, up, down, F, V, FP, VP, HALVES, BF, DEPTH)
            w_k = map_k + hs * K * F
            e_k = extra_k + hs * (F if MAP == 2 else K)
            for j in range(done, first, BO):
                pos = j + tl.arange(0, BO)
                k_up, k_down = key_features(ring_k, k, t, pos, first, w_k, e_k, K, F, FP, BK, N, G, MAP)
                values = slots(ring_v, v, t, pos, first, 0, V, VP, N, G)
                a = tl.sum(k_up * up[:, None], 0)
                if HALVES == 2:
                    a += tl.sum(k_down * down[:, None], 0)
                a = tl.where(pos < first, a, 0.0)
                part += tl.sum(a[:, None] * values.to(tl.float32), 0)
                share += tl.sum(a)
            linear = tl.where((rows == r)[:, None], part[None, :], linear)
            weight = tl.where(rows == r, share, weight)
            if (not TIED) or r == HEADS - 1:  # noqa: SIM102 (the last head to read them; for the compiler)
                if fold:
                    for j in range(done, first, BO):
                        pos = j + tl.arange(0, BO)
                        k_up, k_down = key_features(
                            ring_k, k, t, pos, first, w_k, e_k, K, F, FP, BK, N, G, MAP
                        )  # fmt: skip
                        leaves = (pos < first)[None, :]
                        k_up, k_down = tl.where(leaves, k_up, 0.0), tl.where(leaves, k_down, 0.0)
                        fold_in(
                            sums, norms, k_up, k_down, ring_v, v, t, pos, first, F, V, FP, VP, N, G, HALVES, BV
                        )  # fmt: skip

    m = tl.full([16], LOW, tl.float32)
    mass = tl.zeros([16], tl.float32)
    acc = tl.zeros([16, VP], tl.float32)
    if KIND != 0:
        heads = tl.load(
            q + row * q_row + (h0 + rows)[:, None] * q_head + od[None, :],
            mask=(rows < HEADS)[:, None] & (od < K)[None, :],
            other=0.0,
        )
        m, mass, acc = begin(heads, k, v, scale, cap, 0, K, V, KP, VP, CAP)
        for j in tl.range(first, t, BN, num_stages=DEPTH):
            pos = j + tl.arange(0, BN)
            keys = held_columns(ring_k, pos, t, 0, K, KP, N, G)
            values = held_rows(ring_v, pos, t, 0, V, VP, N, G)
            m, mass, acc = meet(scores(heads, keys, scale, cap, CAP), values, pos < t, m, mass, acc)
        if SINKS > 0:
            sink_k += (row * SINKS * G + g) * K
            sink_v += (row * SINKS * G + g) * V
            stop = tl.minimum(first, SINKS)
            for j in range(0, stop, BN):
                pos = j + tl.arange(0, BN)
                keys = held_columns(sink_k, pos, stop, 0, K, KP, SINKS, G)
                values = held_rows(sink_v, pos, stop, 0, V, VP, SINKS, G)
                m, mass, acc = meet(scores(heads, keys, scale, cap, CAP), values, pos < stop, m, mass, acc)
    if LINEAR:
        if KIND == 0:
            mass = 1e-12
        else:
            factor = tl.sigmoid(tl.load(logit + h0 + rows, mask=rows < HEADS, other=0.0).to(tl.float32))
            acc *= factor[:, None]
            mass *= factor
            if AFFINE:
                linear *= (1.0 - factor)[:, None]
                weight *= 1.0 - factor
        acc += linear
        mass += weight
    tl.store(
        y + (row * H + h0 + rows)[:, None] * V + ov[None, :],
        (acc / mass[:, None]).to(y.dtype.element_ty),
        mask=(rows < HEADS)[:, None] & (ov < V)[None, :],
    )
    if LINEAR:
        first = tl.where(fold, first, done)
    arrive(seen + b, folded + b, t + 1, first, H // HEADS)


def joint_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    seen: Tensor,
    folded: Tensor,
    *,
    scale: float,
    window: int | None,
    window_kind: str = "sliding",
    softcap: float | None = None,
    sinks: tuple[Tensor, Tensor] | None = None,
    sums: tuple[Tensor, Tensor] | None = None,
    maps: tuple[Tensor, Tensor] | None = None,
    extras: tuple[Tensor, Tensor] | None = None,
    feature_map: str = "hedgehog",
    window_logit: Tensor | None = None,
    affine: bool = False,
    fold_every: int = 16,
    settings: Launch | None = None,
) -> Tensor:
    """y [B, 1, H, V] of q [B, 1, H, K], k [B, 1, G, K], v [B, 1, G, V]; rings, sums and counters are written.

    The rings [B, n, G, D] have room for the window and ``fold_every`` tokens. sums: (S [B, Hs, F, V], z [B, Hs, F]),
    fp32; maps: weights of the feature maps of q and k; extras: their reflections or biases. Without sums it is softmax
    over the window and the sinks [B, s, G, D].
    """
    (batch, _, heads, key_dim), (groups, value_dim) = q.shape, v.shape[2:]
    y = v.new_empty(batch, 1, heads, value_dim)
    queries, keys, values = rows_of(q), rows_of(k), rows_of(v)
    halves = 2 if MAPS[feature_map] in (0, 4, 5, 6) else 1
    width = 1 if sums is None else sums[1].shape[-1] // halves
    tied = sums is not None and sums[1].shape[1] != heads
    kind = KINDS[window_kind if window else None]
    wide = max(key_dim, value_dim, 2 * width) > 128
    name = "joint_step_few" if batch * heads < FEW else "joint_step_wide" if wide else "joint_step"
    widths: dict[str, Any] = dict(K=key_dim, V=value_dim, F=None if sums is None else width, dtype=q.dtype)
    settings = settings or launch(name, q.device, **widths)
    blocks = dict(settings.blocks)
    blocks |= {"BK": min(blocks["BK"], padded(key_dim)), "BV": min(blocks["BV"], padded(value_dim))}
    blocks["BF"] = min(blocks["BF"], max(padded(width), 16))
    blocks["HEADS"] = heads // groups if tied else largest(blocks["HEADS"], heads // groups)
    nothing = y  # never read: what it stands for is not compiled
    sink_k, sink_v = sinks or (nothing, nothing)
    kv, z = sums or (nothing, nothing)
    map_q, map_k = maps or (nothing, nothing)
    extra_q, extra_k = extras or (nothing, nothing)
    constants: dict[str, Any] = dict(
        H=heads,
        G=groups,
        K=key_dim,
        V=value_dim,
        F=width,
        KP=padded(key_dim),
        VP=padded(value_dim),
        FP=max(padded(width), 16),
        N=ring_k.shape[1],
        WINDOW=window or 0,
        KIND=kind,
        SINKS=0 if sinks is None else sinks[0].shape[1],
        LINEAR=sums is not None,
        HALVES=halves,
        MAP=MAPS[feature_map],
        TIED=tied,
        AFFINE=affine,
        CAP=softcap is not None,
        FOLD=1 if kind == 2 else fold_every,
    )
    arguments: list[Any] = [
        queries,
        keys,
        values,
        ring_k,
        ring_v,
        sink_k,
        sink_v,
        kv,
        z,
        seen,
        folded,
        map_q,
        map_k,
        extra_q,
        extra_k,
        nothing if window_logit is None else window_logit,
        y,
        scale,
        softcap or 0.0,
        *(stride for x in (queries, keys, values) for stride in x.stride()[:2]),
    ]
    joint_step_kernel[(heads // blocks["HEADS"], batch)](
        *arguments, **constants, **settings._replace(blocks=blocks).options
    )
    return y


def largest(wanted: int, heads: int) -> int:
    """The largest number of heads up to ``wanted`` (and 16) that divides a group's."""
    return max(n for n in range(1, min(wanted, heads, 16) + 1) if heads % n == 0)
