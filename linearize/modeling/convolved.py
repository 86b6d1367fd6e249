"""LAWCAT's sum from raw inputs: a short convolution of q and k, Hedgehog's map, gates from logits (``lawcat.py``).

    q^_t = sum_i taps_i q_{t-i}    phi = [softmax(q^ W); softmax(-q^ W)]    log a_t = logsigmoid(logits_t) / N

Everything is per query head: taps [H, K, c], the current token's first, maps W [H, K, f], and the state; q
[B, T, H, K], k [B, T, G, K], v [B, T, G, V] and logits [B, T, G, 2 f].
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from .gated import gated_chunked
from .tiles import accumulator, full_precision, per_head

MIN_FEATURE = 1e-12


def convolved(x: Tensor, taps: Tensor | None) -> Tensor:
    """[B, T, H, K] in fp32 or more of x [B, T, H or G, K], zeros before the first token; x itself without taps."""
    x = x.to(accumulator(x))
    if taps is None:
        return x
    x, length = per_head(x, len(taps)), x.shape[1]
    taps = taps.to(x.dtype)
    parts = (taps[..., i] * pad(x, (0, 0, 0, 0, i, 0))[:, :length] for i in range(taps.shape[2]))
    return sum(parts, start=torch.zeros((), dtype=x.dtype, device=x.device))


def mapped(x: Tensor, weight: Tensor) -> Tensor:
    """a [B, T, H, f]."""
    return torch.einsum("bthk,hkf->bthf", per_head(x, len(weight)), weight.to(x.dtype))


def both_halves(a: Tensor) -> Tensor:
    return torch.cat((a.softmax(dim=-1), (-a).softmax(dim=-1)), dim=-1).clamp(min=MIN_FEATURE)


@full_precision
def convolved_composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logits: Tensor,
    taps_q: Tensor | None,
    taps_k: Tensor | None,
    map_q: Tensor,
    map_k: Tensor,
    *,
    steps: float,
    eps: float,
    stop: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y [B, T, H, V], the state [B, H, F, V + 1] after ``stop`` [B] tokens of each row, or None without ``stop``)."""
    phi_q = both_halves(mapped(convolved(q, taps_q), map_q))
    phi_k = both_halves(mapped(convolved(k, taps_k), map_k))
    decay = logsigmoid(logits.to(accumulator(logits))) / steps
    y, state = gated_chunked(phi_q, phi_k, v.to(accumulator(v)), decay, eps=eps, stop=stop)
    return y.to(v.dtype), None if stop is None else state
