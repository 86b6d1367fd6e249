"""What Salient's score learns in stage 1, by the name in ``method.objective``. All rank tokens the same way afterwards.

Letters as in ``salient.py``: rho [B, T, G] the score, c(t) = floor(t / C), s and a the teacher's scaled logits and its
softmax. A position is asked when a query with c(t) >= c(j) + 2 exists; the others have nothing to learn from.

    log_attention   rho ~ log(max a_tj + floor), squared error: Salient's specification
    ranking         the same targets y, in pairs: log(1 + exp(-(rho_i - rho_j) sign(y_i - y_j))) |y_i - y_j|
    locret          rho ~ max s_tj, smooth L1, from q, k and v: Locret, arXiv 2410.01805
    retention       gates beta = sigmoid(rho + b) whose decay the output is distilled through, and a bound on how much
                    they retain: TRIM-KV, arXiv 2512.03324

The maxima run over the heads of a group and the queries that ask.

Departures. Locret: no term that smooths rho along the text; the maximum leaves out queries in whose local span the
token still is. One network reads q, k and v of all heads side by side, each head's group among them; q and k are read
before the rotary embedding, so that rho does not depend on where a token stands and goes on past the training length.
TRIM-KV: rho decides once, when the token is written, because a kept set that is a
running top-N has no other; they compare beta^(t-j), whose order changes with t. Tokens in the local span and the first
one, which are never dropped, neither decay nor count. b is not a large constant, but the log of the tokens that a state
holds: a gate begins with the lifetime of the memory it will rank for. Each layer is distilled by its own output, not
the model by its logits.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, mse_loss, relu, smooth_l1_loss, softplus
from torch.utils.checkpoint import checkpoint

from .mixer import Fit, MixerInput
from .ops import future_attention
from .ring import final
from .selection import future_logit
from .tiles import accumulator, scores_of

SHIFTS = 16
"""Partners that a position is compared with in ``ranking``."""

QUERIES = 256
"""Queries whose weights on all earlier tokens exist at a time in ``retention``."""


class Objective(NamedTuple):
    """One row of the table."""

    fit: Callable[[MixerInput, Tensor, Any], Fit]
    """(x, rho [B, T, G] with its graph, the layer's ``SalientConfig``) to the layer's loss."""
    reads_projections: bool = False
    """Whether rho is made of q, k and v instead of the layer's input."""


def log_attention(x: MixerInput, rho: Tensor, config: Any) -> Fit:
    """Squared error against the attention that the teacher pays later, and the targets' variance."""
    return _regression(rho, log_target(x, config), asked(x, config.chunk), mse_loss)


def locret(x: MixerInput, rho: Tensor, config: Any) -> Fit:
    """Smooth L1 against the largest logit that the teacher gives later, and that of the targets' mean."""
    target = future_logit(x.q, x.k, scale=x.scale, chunk=config.chunk, softcap=x.softcap, lengths=x.lengths)
    return _regression(rho, target, asked(x, config.chunk), smooth_l1_loss)


def ranking(x: MixerInput, rho: Tensor, config: Any) -> Fit:
    """Logistic loss of pairs, a few fixed distances apart, by how far their targets are; an even score has 1."""
    target, there = log_target(x, config), asked(x, config.chunk)
    error, weight = rho.sum() * 0.0, target.new_zeros(())
    for shift in shifts(target.shape[1]):
        gap = target - target.roll(shift, 1)
        sure = gap.abs() * (there & there.roll(shift, 1))
        error = error + (softplus(-(rho - rho.roll(shift, 1)) * gap.sign()) * sure).sum()
        weight = weight + sure.sum()
    tiny = torch.finfo(weight.dtype).tiny
    count = (there.sum() * target.shape[-1] * SHIFTS).clamp_min(1)
    return Fit(error / count, (math.log(2) * weight / count).clamp_min(tiny))


def retention(x: MixerInput, rho: Tensor, config: Any) -> Fit:
    """The output's squared error under decay, with ``capacity_weight`` times what is retained beyond the budget, both
    over the power of the teacher's output."""
    if x.teacher is None:
        raise ValueError("retention: the layer's softmax output is not given")
    budget = torch.as_tensor(config.budget, device=rho.device, dtype=rho.dtype)  # one, or [G]
    rate = logsigmoid(rho + (budget + 2 * config.chunk).log())
    time, heads, dtype = x.q.shape[1], x.q.shape[2], accumulator(x.q, x.k, x.v)
    real = torch.ones(len(rho), time, dtype=torch.bool, device=rho.device)
    if x.lengths is not None:
        real = torch.arange(time, device=rho.device) < x.lengths[:, None]
    wanted = x.teacher.to(dtype).masked_fill(~real[..., None, None], 0.0)
    count = (real.sum() * heads * wanted.shape[-1]).clamp_min(1)
    power = (wanted.square().sum() / count).clamp_min(torch.finfo(dtype).tiny)
    error, excess = rho.sum() * 0.0, rho.sum() * 0.0
    for start in range(0, time, QUERIES):
        part = slice(start, start + QUERIES)
        y, held = checkpoint(
            decayed, x.q[:, part], x.k, x.v, rate, start, x.scale, config.chunk, x.softcap,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
        y = y.masked_fill(~real[:, part, None, None], 0.0)
        error = error + (y - wanted[:, part]).square().sum()
        excess = excess + (over(held, budget) * real[:, part, None]).sum()
    capacity = excess / (real.sum() * held.shape[-1]).clamp_min(1)
    return Fit(error / count + config.capacity_weight * capacity * power, power)


OBJECTIVES = {
    "log_attention": Objective(log_attention),
    "ranking": Objective(ranking),
    "locret": Objective(locret, reads_projections=True),
    "retention": Objective(retention),
}


def asked(x: MixerInput, chunk: int) -> Tensor:
    """[B, T, 1] bool, the positions that some query looks back at from beyond its local span."""
    time = x.q.shape[1]
    position = torch.arange(time, device=x.q.device).expand(len(x.q), -1)
    lengths = torch.full_like(position[:, 0], time) if x.lengths is None else x.lengths
    return (position < final(lengths, chunk, "terraced")[:, None])[..., None]


def log_target(x: MixerInput, config: Any) -> Tensor:
    """[B, T, G] log of the largest attention paid later; of the floor alone where none is."""
    paid = future_attention(x.q, x.k, scale=x.scale, chunk=config.chunk, softcap=x.softcap, lengths=x.lengths)
    return (paid + config.target_floor).log()


def shifts(time: int) -> list[int]:
    """How far apart the pairs of a text of ``time`` tokens stand: always the same."""
    drawn = torch.randint(1, max(2, time), (SHIFTS,), generator=torch.Generator().manual_seed(time))
    return drawn.tolist()


def over(held: Tensor, budget: Tensor) -> Tensor:
    """How much more is held [..., G] than ``budget`` tokens, one or [G], as a share of them."""
    return relu(held - budget) / budget.clamp_min(1)


def decayed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    start: int,
    scale: float,
    chunk: int,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """y [B, n, H, V] of the queries ``start ..`` when the logit of every token that has left their local span has (t -
    j) log beta_j added, and held [B, n, G], the sum of beta_j^(t - j) over these tokens.

    q [B, n, H, K]; k [B, T, G, K]; v [B, T, G, V]; rate [B, T, G], log beta. The first token does not decay.
    """
    dtype, stop, groups = accumulator(q, k, v), start + q.shape[1], k.shape[2]
    key = torch.arange(stop, device=q.device)
    query = key[start:, None]
    old = (key < chunk * (query.div(chunk, rounding_mode="floor") - 1)) & (key > 0)  # [n, stop]
    decay = (query - key) * old * rate[:, :stop].to(dtype).transpose(1, 2)[:, :, None]  # [B, G, n, stop]
    scores = scores_of(q.to(dtype), k[:, :stop].to(dtype), scale, softcap).unflatten(1, (groups, -1))
    scores = (scores + decay[:, :, None]).masked_fill(key > query, -torch.inf)
    y = torch.einsum("bgrij,bjgv->bigrv", scores.softmax(-1), v[:, :stop].to(dtype))
    return y.flatten(2, 3), (decay.exp() * old).sum(-1).transpose(1, 2)


def _regression(rho: Tensor, target: Tensor, there: Tensor, loss: Callable[..., Tensor]) -> Fit:
    """The mean of ``loss`` over the positions that are asked, and that of the best guess without looking."""
    there = there.to(target.dtype)
    count = (there.sum() * target.shape[-1]).clamp_min(1)
    mean = (target * there).sum() / count
    error = (loss(rho, target, reduction="none") * there).sum() / count
    power = (loss(mean.expand_as(target), target, reduction="none") * there).sum() / count
    return Fit(error, power.clamp_min(torch.finfo(power.dtype).tiny))
