"""Mixers of the scan alone: Salient with a score that nobody had to train, one kv head alone, where attention looks.

An untrained score ranks by chance, so that its student says nothing of a trained one. The stand-in ranks by what the
score is taught in stage 1, the log of the largest attention that a token will get after it left the local span
(`salient.py`), read from the teacher on the very text that is measured. That alone would flatter small budgets: it
knows which token the question at the end will ask for. A regression that explains the share f of its target's variance
is right up to noise, so noise of the matching size is added:

    rank by  y_j + sqrt((1 - f) / f) std(y) e_j,     e_j standard normal, drawn once for each token and kv head

whose squared correlation with y is f. f = 1 is the oracle, an upper bound on what any fixed score can keep.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..modeling.head_budgets import HeadBudgets
from ..modeling.mixer import Geometry, Mixer, MixerInput
from ..modeling.ops import future_attention, kept_attention, window_attention
from ..modeling.salient import SalientConfig


@dataclass
class Memo:
    """What all candidates of a layer have in common on one batch, computed when first asked for."""

    seed: int
    values: dict[Any, Tensor] = field(default_factory=dict)
    lengths: Tensor | None = None
    """[B] tokens of each row that are no padding; None where all are none."""

    def forget(self, seed: int, lengths: Tensor | None = None) -> None:
        self.seed, self.values, self.lengths = seed, {}, lengths

    def softmax(self, x: MixerInput) -> Tensor:
        """y [B, T, H, V] of the layer's own attention."""
        if "softmax" not in self.values:
            self.values["softmax"] = softmax_output(x)
        return self.values["softmax"]

    def target(self, x: MixerInput, chunk: int, floor: float) -> Tensor:
        """[B, T, G] what stage 1 of Salient teaches; the floor where no later query asks."""
        key = ("target", chunk, floor)
        if key not in self.values:
            lengths = None if self.lengths is None else self.lengths.to(x.q.device)
            paid = future_attention(x.q, x.k, scale=x.scale, chunk=chunk, softcap=x.softcap, lengths=lengths)
            self.values[key] = (paid + floor).log()
        return self.values[key]

    def spread(self, target: Tensor, chunk: int) -> Tensor:
        """[B, 1, G] standard deviation of the target over positions that a later query asks for."""
        time = torch.tensor(target.shape[1]).expand(len(target)) if self.lengths is None else self.lengths
        count = ((time.to(target.device) // chunk - 1) * chunk).clamp_min(1)[:, None, None]
        asked = torch.arange(target.shape[1], device=target.device)[:, None] < count
        mean = (target * asked).sum(1, keepdim=True) / count
        squares = ((target - mean).square() * asked).sum(1, keepdim=True)
        return (squares / (count - 1).clamp_min(1)).sqrt()

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal, the same for every budget: a larger one keeps a superset."""
        if "noise" not in self.values:
            generator = torch.Generator().manual_seed(self.seed)
            self.values["noise"] = torch.randn(like.shape, generator=generator).to(like)
        return self.values["noise"]


class OracleMixer(Mixer):
    """Salient's attention with the stand-in for its score; it reads the future, and serves to measure only.

    With ``head`` in the query heads of that kv head alone; the others keep softmax.
    """

    def __init__(
        self, config: SalientConfig, geometry: Geometry, memo: Memo, fit: float, head: int | None = None
    ):
        super().__init__(config, geometry)
        self.memo, self.fit, self.head = memo, fit, head
        self.budgets = HeadBudgets(config.budget, geometry.kv_heads)

    def forward(self, x: MixerInput, state: Any = None) -> tuple[Tensor, None]:
        config = self.config
        target = self.memo.target(x, config.chunk, config.target_floor)
        spread = self.memo.spread(target, config.chunk)
        score = target + ((1 - self.fit) / self.fit) ** 0.5 * spread * self.memo.noise(target)
        score[:, 0] = torch.inf
        terms = dict(scale=x.scale, chunk=config.chunk, softcap=x.softcap)

        def attend(slots: int, _kept: None, *parts: Tensor) -> Tensor:
            return kept_attention(*parts, size=slots, **terms)

        whole = (x.q, x.k, x.v, score)
        if self.head is None:
            return self.budgets.attend(attend, None, *whole), None
        run = next(run for run in self.budgets.runs if run.first <= self.head < run.stop)
        one = run._replace(first=self.head, stop=self.head + 1)
        own = attend(run.slots, None, *(one.part(t, self.geometry.kv_heads) for t in whole))
        y = self.memo.softmax(x).clone()
        one.part(y, self.geometry.kv_heads).copy_(own)
        return y, None


class OneHead(Mixer):
    """A mixer in the query heads of one kv head; the others keep softmax."""

    def __init__(self, inner: Mixer, head: int, memo: Memo):
        super().__init__(inner.config, inner.geometry)
        self.inner, self.head, self.memo = inner, head, memo
        self.wants = inner.wants_unrotated

    @property
    def wants_unrotated(self) -> bool:  # type: ignore[override]
        return self.wants

    def forward(self, x: MixerInput, state: Any = None) -> tuple[Tensor, None]:
        per_group = self.geometry.heads // self.geometry.kv_heads
        mine = slice(self.head * per_group, (self.head + 1) * per_group)
        y, own = self.memo.softmax(x).clone(), self.inner(x)[0]
        y[:, :, mine] = own[:, :, mine]
        return y, None


def softmax_output(x: MixerInput) -> Tensor:
    """y [B, T, H, V] of causal softmax attention with the model's scale and soft-cap."""
    if x.softcap is not None:
        return window_attention(
            x.q,
            x.k,
            x.v,
            scale=x.scale,
            window=x.q.shape[1],
            window_kind="sliding",
            softcap=x.softcap,
            sinks=0,
        )
    q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
    y = scaled_dot_product_attention(q, k, v, is_causal=True, scale=x.scale, enable_gqa=True)
    return y.transpose(1, 2)


def far_mass(x: MixerInput, chunk: int, places: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """How far a layer looks: [H] mean share of attention on tokens past the local span, the first one left out; and
    [H] mean attention at ``places`` [n, 3], rows of (batch row, query, key), where these are given.

    A chunk of queries at a time: C x T probabilities a head. Queries without a past count as looking at none of it.
    """
    batch, time, heads = x.q.shape[:3]
    q, k = (
        x.q.float().transpose(1, 2),
        x.k.float().transpose(1, 2).repeat_interleave(heads // x.k.shape[2], 1),
    )
    position = torch.arange(time, device=x.q.device)
    total, copied = q.new_zeros(heads), None if places is None else q.new_zeros(heads)
    for start in range(0, time, chunk):
        stop = min(start + chunk, time)
        scores = q[:, :, start:stop] @ k[:, :, :stop].transpose(2, 3) * x.scale
        if x.softcap is not None:
            scores = x.softcap * torch.tanh(scores / x.softcap)
        causal = position[:stop] <= position[start:stop, None]
        weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        total += weights[..., 1 : max(1, start - chunk)].sum((0, 2, 3))
        if places is not None and copied is not None:
            here = places[(places[:, 1] >= start) & (places[:, 1] < stop)]
            copied += weights[here[:, 0], :, here[:, 1] - start, here[:, 2]].sum(0)
    return total / (batch * time), None if copied is None or places is None else copied / max(1, len(places))


class Profile(Mixer):
    """Softmax, that notes where it looks: see :func:`far_mass`."""

    def __init__(self, config: Any, geometry: Geometry, chunk: int):
        super().__init__(config, geometry)
        self.chunk = chunk
        self.places: Tensor | None = None
        self.far: list[Tensor] = []
        self.copied: list[tuple[int, Tensor]] = []

    def forward(self, x: MixerInput, state: Any = None) -> tuple[Tensor, None]:
        far, copied = far_mass(x, self.chunk, self.places)
        if copied is None or self.places is None:
            self.far.append(far)
        else:
            self.copied.append((len(self.places), copied))
        return softmax_output(x), None
