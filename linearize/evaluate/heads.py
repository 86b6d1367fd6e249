"""Logits by blocks of columns: the scores of every token without the whole of them ever existing.

A model is taken apart into its final hidden states and its head, where the two together are shown to be the model;
elsewhere its own logits are computed whole and read block by block. One loop serves both.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling.errors import EvaluationError

logger = logging.getLogger(__name__)

# Columns whose logits exist at one time, for one piece of tokens.
COLUMN_CHUNK = 8192
TOP = 5
# Relative to the largest logit. The same products summed in another order stay far below; a cap or scale does not.
SAME = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
PROBE_TOKENS = 32


@dataclass(frozen=True)
class Parts:
    """`features(ids [B, T]) -> [B, T, M]` and `block(features [n, M], low, high) -> [n, high - low]` logits.

    `width` is M; where the head stays whole, the features are the logits and M is the number of columns.
    """

    features: Callable[[Tensor], Tensor]
    block: Callable[[Tensor, int, int], Tensor]
    width: int
    chunked: bool


@dataclass(frozen=True)
class Readings:
    """Per token [n], on the CPU, fp64 and bool: how one model predicts it, beside the teacher."""

    nll: Tensor
    kl: Tensor
    """KL(teacher || model) in nats."""
    top1: Tensor
    """The model's arg-max is the teacher's."""
    top5: Tensor
    """The teacher's arg-max is among the model's five best; ties count as among them."""


@torch.no_grad()
def take_apart(model: nn.Module, ids: Tensor, vocab_size: int, name: str) -> Parts:
    """Hidden states and head of `model`, if on `ids` [B, T] they give its own logits; otherwise its logits whole.

    Soft-cap and logit scale are those of the configuration; whatever else a family does to its logits is found out by
    comparing. `vocab_size` real columns enter; the head may have more, never fewer.
    """
    ids = ids[:1, :PROBE_TOKENS].to(next(model.parameters()).device)
    own = _whole(model, ids)
    if own.shape[-1] < vocab_size:
        raise EvaluationError(
            f"{name}: its head has {own.shape[-1]} columns, the tokenizer {vocab_size} tokens; "
            "evaluate a student with the tokenizer of its teacher"
        )
    split = _split(model)
    if split is not None and _same(split, ids, own[..., :vocab_size]):
        return split
    logger.info("%s: its logits are more than a linear head's, and are computed whole", name)
    return Parts(
        lambda ids: _whole(model, ids)[..., :vocab_size],
        lambda features, low, high: features[:, low:high],
        own.shape[-1],
        False,
    )


def read_tokens(
    parts: Sequence[Parts],
    features: Sequence[Tensor],
    targets: Tensor,
    vocab_size: int,
    column_chunk: int = COLUMN_CHUNK,
) -> list[Readings]:
    """Readings of each model, the teacher first, on n tokens: `features` [n, M] each, `targets` [n] of token ids.

    One pass over the columns keeps, per token, the maximum and the sum of exponentials of each model, the sum of
    exp(t)(t - s), both arg-maxima and the model's five largest; then KL = E_t[t - s] - lse_t + lse_s. Blocks are in
    fp32 (fp64 for fp64 models), what is kept in fp64.
    """
    running = [_Running(x.shape[0], x.device) for x in features]
    for low in range(0, vocab_size, column_chunk):
        high = min(low + column_chunk, vocab_size)
        truth = _exact(parts[0].block(features[0], low, high))
        best, where = _largest(truth)
        for index, kept in enumerate(running):
            own = truth if index == 0 else _exact(parts[index].block(features[index], low, high))
            at = own.device
            kept.add(own, truth.to(at), best.to(at), where.to(at), targets.to(at), low)
    teacher = running[0]
    return [kept.readings(teacher) for kept in running]


class _Running:
    """What one model's columns have amounted to so far; all [n] in fp64 but `five` [n, 5] and the indices."""

    def __init__(self, count: int, device: torch.device):
        def filled(value: float) -> Tensor:
            return torch.full((count,), value, dtype=torch.double, device=device)

        self.peak, self.total = filled(-torch.inf), filled(0)
        self.their_peak, self.their_total, self.cross = filled(-torch.inf), filled(0), filled(0)
        self.at_target, self.at_their_best = filled(torch.nan), filled(torch.nan)
        self.best, self.their_best = (torch.full_like(self.peak, -1, dtype=torch.long) for _ in range(2))
        self.own_largest = filled(-torch.inf)
        self.five = torch.full((count, TOP), -torch.inf, dtype=torch.double, device=device)

    def add(self, own: Tensor, truth: Tensor, best: Tensor, where: Tensor, targets: Tensor, low: int) -> None:
        """Columns from `low` on: `own` and the teacher's `truth` [n, c], its largest of them and their places."""
        largest, place = _largest(own)
        self.peak, fade = _raised(self.peak, largest)
        self.total = self.total * fade + _exp_below(own, self.peak).sum(-1, dtype=torch.double)

        leads = best.double() > self.their_peak  # the first of equals stays
        self.their_peak, fade = _raised(self.their_peak, best)
        weight = _exp_below(truth, self.their_peak)
        self.their_total = self.their_total * fade + weight.sum(-1, dtype=torch.double)
        # exp(-inf) * (-inf - s) is the limit 0, not NaN: a teacher may rule a token out
        terms = (weight * (truth - own)).masked_fill_(weight == 0, 0)
        self.cross = self.cross * fade + terms.sum(-1, dtype=torch.double)

        inside = (targets >= low) & (targets < low + own.shape[1])
        column = (targets - low).clamp(0, own.shape[1] - 1)
        self.at_target = torch.where(inside, _at(own, column), self.at_target)
        self.at_their_best = torch.where(leads, _at(own, where), self.at_their_best)
        self.their_best = torch.where(leads, where + low, self.their_best)
        self.best = torch.where(largest.double() > self.own_largest, place + low, self.best)
        self.own_largest = torch.maximum(self.own_largest, largest.double())
        few = own.topk(min(TOP, own.shape[1]), dim=-1).values
        self.five = torch.cat([self.five, few.double()], dim=-1).topk(TOP, dim=-1).values

    def readings(self, teacher: "_Running") -> Readings:
        mass = self.peak + self.total.log()
        kl = self.cross / self.their_total - (self.their_peak + self.their_total.log()) + mass
        same = (
            self.best == self.their_best
            if self is not teacher
            else torch.ones_like(self.best, dtype=torch.bool)
        )
        return Readings(
            (mass - self.at_target).cpu(),
            kl.cpu(),
            same.cpu(),
            (self.at_their_best >= self.five[:, -1]).cpu(),
        )


def _raised(peak: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """The running maximum, and the factor by which sums under the old one shrink."""
    raised = torch.maximum(peak, largest.double())
    return raised, (peak - raised).exp().masked_fill(peak == -torch.inf, 0)


def _exp_below(logits: Tensor, peak: Tensor) -> Tensor:
    """exp(logits - peak); where nothing finite has been seen yet, zeros."""
    return (logits - peak.masked_fill(peak == -torch.inf, 0).to(logits.dtype)[:, None]).exp()


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Largest of each row [n] and the place of the first of them [n]."""
    place = logits.argmax(-1)
    return _at(logits, place), place


def _at(logits: Tensor, column: Tensor) -> Tensor:
    return logits.gather(1, column[:, None])[:, 0].double()


def _exact(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _whole(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids.to(next(model.parameters()).device), use_cache=False).logits


def _split(model: Any) -> Parts | None:
    """Trunk and head as the configuration tells them; None where there is no linear head or no trunk of its own."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    trunk = getattr(model, "base_model", model)
    if type(head) is not nn.Linear or trunk is model:  # a quantised or adapted head has no columns to take
        return None
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    # Granite divides by the one, Cohere multiplies by the other.
    scale = (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)

    def features(ids: Tensor) -> Tensor:
        return trunk(input_ids=ids.to(next(model.parameters()).device), use_cache=False).last_hidden_state

    def block(hidden: Tensor, low: int, high: int) -> Tensor:
        bias = None if head.bias is None else head.bias[low:high]
        logits = nn.functional.linear(hidden.to(head.weight.device), head.weight[low:high], bias)
        if scale != 1:
            logits = logits * scale
        return torch.tanh(logits / cap) * cap if cap else logits

    return Parts(features, block, head.in_features, True)


def _same(split: Parts, ids: Tensor, own: Tensor) -> bool:
    """Whether hidden states and head give the model's logits [1, T, vocab], read block by block."""
    try:
        hidden = split.features(ids)
    except (AttributeError, TypeError):  # a trunk with arguments or an output of its own
        return False
    if hidden.shape[-1] != split.width:
        return False
    vocab = own.shape[-1]
    ours = torch.cat(
        [
            split.block(hidden[0], low, min(low + COLUMN_CHUNK, vocab))
            for low in range(0, vocab, COLUMN_CHUNK)
        ],
        dim=-1,
    )
    own = own[0].to(ours.device)
    if ours.dtype != own.dtype or not bool(torch.isfinite(own).all()):
        return False
    room = SAME[own.dtype] * own.abs().max()
    return bool(((ours - own).abs() <= room).all())
