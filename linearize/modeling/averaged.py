"""A softmax window averaged with a recurrence, gates and features made from raw keys: Liger's layer, composed of plain
operations (arXiv 2503.01496; ``liger.py`` has the equations, ``gated.py`` and ``reference.py`` the parts)."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .gated import gated_chunked
from .reference import window_chunked
from .tiles import accumulator, full_precision


class Averaged(NamedTuple):
    """The numbers of such a layer."""

    scale: float
    window: int
    """W, 0 for none."""
    hgrn2: bool
    """The key is 1 - a, not softmax(k / temperature)."""
    steps: float
    """N of log a = logsigmoid(k + bias) / N."""
    bias: float = 0.0
    temperature: float = 1.0
    mix_window: float = 0.5
    mix_recurrent: float = 0.5


@full_precision
def averaged_composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_plain: Tensor,
    k_plain: Tensor,
    terms: Averaged,
    *,
    stop: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y [B, T, H, V], the state [B, G, K, V] after ``stop`` [B] tokens of each row, or None without ``stop``).

    q, k are rotated, for the window; q_plain, k_plain are not, for the recurrence. Every row starts from nothing.
    """
    dtype = accumulator(q_plain, k_plain, v)
    raw = k_plain.to(dtype)
    log_decay = logsigmoid(raw + terms.bias) / terms.steps
    key = -torch.expm1(log_decay) if terms.hgrn2 else (raw / terms.temperature).softmax(dim=-1)
    o, state = gated_chunked(q_plain.to(dtype).softmax(dim=-1), key, v.to(dtype), log_decay, stop=stop)
    y = terms.mix_recurrent * o
    if terms.window:
        near = window_chunked(q, k, v.to(dtype), scale=terms.scale, window=terms.window)
        y = terms.mix_window * near.to(dtype) + y
    return y.to(v.dtype), None if stop is None else state
