"""Salient: a bounded exact memory of the tokens that a learned score, distilled from the teacher, ranks highest.

This project's combination of known ideas. Learned eviction of KV caches is Locret's (arXiv 2410.01805: small heads on
q, k, v predict a token's largest future attention) and TRIM-KV's (arXiv 2512.03324: retention gates trained end to end
by distillation); local spans of chunks with delayed selection are STILL's (arXiv 2602.02180). With h_j the layer's
input, c(t) = floor(t / C) and a the teacher's attention,

    rho_j = W_2 gelu(W_1 h_j)                                                      in R^G, fp32
    y_t   = softmax over { j <= t : c(j) >= c(t) - 1 }, the first token, and the N best by rho of the others

Stage 1 fits rho to log(max a_tj + floor), the maximum over the heads of the group and the queries with
c(t) >= c(j) + 2; positions that no such query has seen are left out. Nothing else is learned there: selection is
discrete, and what is kept is attended exactly. No gradient reaches the score in stage 2. ``objective`` has other losses
for the same score, Locret's and TRIM-KV's among them (``objectives.py``).

Memory: N + 1 kept tokens and 2 C local ones for every key/value head, whatever the length; C and N are fixed at
conversion. Budgets differ by layer through the recipe's ``layers`` map, ``{7: {budget: 1024}, rest: {budget: 32}}``,
and by kv head through a list, ``{7: {budget: [1536, 64]}}``: where the budget sits matters more than its size.

Departures from our own specification: the first token has a slot of its own beside the N. The optional linear remainder
is not offered, because its mass grows with the length (KL .906 against .123 at four times the training length).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, gelu

from .errors import ConversionError
from .head_budgets import HeadBudgets
from .mixer import Fit, Geometry, Method, MethodConfig, Mixer, MixerInput
from .objectives import OBJECTIVES
from .ops import Kept, first_kept, kept_attention, kept_decode, merge_kept, salient_step
from .ring import at_columns, counted, final, new_columns, resize, span, step_positions, take, unroll, write
from .selection import rounded


@dataclass(frozen=True)
class SalientConfig(MethodConfig):
    """Fields of a Salient layer; layers differ through the recipe's ``layers``."""

    name: ClassVar[str] = "salient"
    recommended: ClassVar[dict[str, Any]] = {
        "transfer.learning_rate": 3e-3,
        "finetune.learning_rate": 5e-4,
        "finetune.next_token": 0.0,
        "finetune.kl": 1.0,
    }

    budget: int | tuple[int, ...] = 256
    """N, exact tokens of the older past kept per kv head, beside the first token; a list has one for every kv head."""
    chunk: int = 64
    """C; every query sees its own chunk and the whole one before it."""
    score_dim: int = 96
    """Width of the score's hidden layer."""
    score_context: int | None = None
    """The score also sees the mean of this many newest inputs, the token's own included (16 works); None is off."""
    objective: Literal["log_attention", "ranking", "locret", "retention"] = "log_attention"
    """What the score learns in stage 1; ``objectives.py`` tells them apart. Only locret's reads q, k and v."""
    target_floor: float = 1e-4
    """Added to the attention before the logarithm, so that what is never attended has a finite target. Of log_attention
    and ranking."""
    capacity_weight: float = 0.1
    """Of what retention's gates hold beyond the budget, beside the relative error of the layer's output."""

    @property
    def wants_unrotated(self) -> bool:
        return OBJECTIVES[self.objective].reads_projections

    def __post_init__(self) -> None:
        if isinstance(self.budget, list):
            object.__setattr__(self, "budget", tuple(self.budget))

    def check(self, geometry: Geometry | None = None) -> None:
        if isinstance(self.budget, tuple):
            self._check_heads(self.budget, geometry)
        least = {"chunk": 1, "score_dim": 1, "score_context": 2}
        least |= {} if isinstance(self.budget, tuple) else {"budget": 0}
        for field, bound in least.items():
            value = getattr(self, field)
            if value is not None and value < bound:
                off = ", or null for none" if field == "score_context" else ""
                raise ConversionError(f"method.{field}: {value} is impossible; give {bound} or more{off}")
        if self.objective not in OBJECTIVES:
            raise ConversionError(
                f"method.objective: {self.objective!r} is unknown; choose from {', '.join(OBJECTIVES)}"
            )
        if not self.capacity_weight >= 0:
            raise ConversionError(
                f"method.capacity_weight: {self.capacity_weight} is impossible; give 0 or more"
            )
        if not self.target_floor > 0:
            raise ConversionError(
                f"method.target_floor: {self.target_floor} is impossible; give a number above 0, such as 1e-4"
            )

    @staticmethod
    def _check_heads(budgets: tuple[int, ...], geometry: Geometry | None) -> None:
        if any(isinstance(n, bool) or n < 0 for n in budgets) or not budgets:
            raise ConversionError(
                f"method.budget: {list(budgets)} is impossible; give 0 or more for every kv head"
            )
        if geometry is not None and len(budgets) != geometry.kv_heads:
            raise ConversionError(
                f"method.budget: {list(budgets)} has {len(budgets)} entries, and the layer has {geometry.kv_heads} "
                "kv heads; give one for each, or one number for all"
            )


class SalientState(NamedTuple):
    """Bounded memory of a row: rings of the newest tokens (2 C, and the droppable ones while a cache records its past)
    and the kept ones, best first."""

    k: Tensor
    """[B, n, G, K], model dtype."""
    v: Tensor
    """[B, n, G, V], model dtype."""
    score: Tensor
    """[B, n, G] fp32."""
    kept_k: Tensor
    """[B, N + 1, G, K], model dtype; packed where kv heads have different budgets (head_budgets.py)."""
    kept_v: Tensor
    """[B, N + 1, G, V], model dtype."""
    kept_score: Tensor
    """[B, N + 1, G] fp32; inf for the first token, -inf in an empty slot."""
    tail: Tensor
    """[B, m, D] fp32, the newest inputs as the score's mean sees them; empty without ``score_context``."""
    seen: Tensor
    """[B] tokens seen."""
    folded: Tensor
    """[B] oldest tokens that are kept or forgotten for good; the rings hold the others."""

    @property
    def rings(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.k, self.v, self.score

    @property
    def kept(self) -> Kept:
        return Kept(self.kept_k, self.kept_v, self.kept_score)


class SalientMixer(Mixer):
    """One layer. Parameters, all the score's: ``inner`` M to D, ``outer`` D to G; ``context`` M to D for the mean.

    Where the objective reads q, k and v, (H + G) K + G V stands for M.
    """

    def __init__(self, config: SalientConfig, geometry: Geometry):
        super().__init__(config, geometry)
        self.wants_unrotated = config.wants_unrotated
        width = geometry.hidden
        if self.wants_unrotated:
            heads, groups = geometry.heads, geometry.kv_heads
            width = (heads + groups) * geometry.key_dim + groups * geometry.value_dim
        self.inner = nn.Linear(width, config.score_dim)
        self.context = None
        if config.score_context:
            # The mean of projected inputs is the projection of their mean, and has a smaller tail to remember.
            self.context = nn.Linear(width, config.score_dim, bias=False)
        self.outer = nn.Linear(config.score_dim, geometry.kv_heads)
        self.budgets = HeadBudgets(config.budget, geometry.kv_heads)

    def why_not_without(self, branch: str) -> str | None:
        if branch == "linear":
            return "salient has no linear branch"
        return "its local span and its kept tokens are one softmax, of which the span is no branch"

    def reset_parameters(self) -> None:
        for layer in (self.inner, self.context, self.outer):
            if layer is not None:
                layer.reset_parameters()

    def forward(
        self, x: MixerInput, state: SalientState | None = None
    ) -> tuple[Tensor | Fit, SalientState | None]:
        if x.transfer:
            return self._fit(x), None
        if state is None and not x.use_cache:
            position = positions(x, torch.zeros(len(x.k), dtype=torch.long, device=x.k.device))
            with torch.no_grad():
                score = placed(self._rank(self._read(x), self._tail(x), position)[0], position)
            return self._attend(x, x.q, x.k, x.v, score), None
        started = self._start(x) if state is None else self._grow(state, x.pending)
        position = positions(x, started.seen)
        with torch.no_grad():
            rank, inputs = self._rank(self._read(x), started.tail, position)
        if x.in_place:
            tail = started.tail
            if inputs is not None:
                tail = write(tail, inputs, started.seen, started.seen + 1)
            y = self._step_in_place(x, started, rank)
            if y is not None:
                return y, started._replace(tail=tail)
        score = placed(rank, position)
        fresh, whole = state is None, state is None and x.lengths is None
        total, limit = counted(
            started, x, fresh, lambda seen: final(seen, self.config.chunk, "terraced", x.pending)
        )
        new = (x.k, x.v, score)
        if state is None:
            y = self._attend(x, x.q, *new)
            count = final(x.q.shape[1], self.config.chunk, "terraced", x.pending) if whole else None
            kept = self._hand_over(started, new, limit, count, whole)
        else:
            step = x.q.shape[1] == 1 and x.lengths is None
            columns = [
                unroll(old, token, started.seen, started.folded)
                for old, token in zip(started.rings, new, strict=True)
            ]
            # A step in place does not wait for the device to say how many leave: a chunk at most.
            kept = self._hand_over(started, columns, limit, self.config.chunk if x.in_place else None)
            y = self._step(x, started, columns, kept) if step else self._chunk(x, started, columns)
        k, v, score = (
            write(old, token, started.seen, total, whole)
            for old, token in zip(started.rings, new, strict=True)
        )
        tail = started.tail if inputs is None else write(started.tail, inputs, started.seen, total, whole)
        return y, SalientState(k, v, score, *kept, tail, total, limit)

    def _step_in_place(self, x: MixerInput, state: SalientState, rank: Tensor) -> Tensor | None:
        """y by one kernel that also writes the state, after the score's layers; None where no kernel takes it."""
        kept = state.kept
        found = [
            salient_step(
                *parts[:6],
                *held,
                state.seen,
                state.folded,
                score=parts[6],
                scale=x.scale,
                chunk=self.config.chunk,
                softcap=x.softcap,
            )
            for _, held, parts in self.budgets.each(kept, x.q, x.k, x.v, *state.rings, rank)
        ]
        taken = [y for y in found if y is not None]
        if len(taken) < len(found):  # then no kernel takes any, and nothing is written
            return None
        return taken[0] if len(taken) == 1 else torch.cat(taken, dim=2)

    def _chunk(self, x: MixerInput, state: SalientState, columns: Sequence[Tensor]) -> Tensor:
        """Several tokens: columns ``folded, ...`` stand on the chunk grid, as the parallel form needs."""
        k, v, score = columns
        place = (state.seen, state.folded)
        y = self._attend(x, at_columns(x.q, state.k.shape[1], *place), k, v, score, state.kept)
        return new_columns(y, x.q.shape[1], *place)

    def _step(self, x: MixerInput, state: SalientState, columns: Sequence[Tensor], kept: Kept) -> Tensor:
        """One token a row: it meets the kept tokens and the rings."""
        k, v, _ = columns
        terms: dict[str, Any] = step_positions(k, state.seen, state.folded)
        terms |= dict(scale=x.scale, chunk=self.config.chunk, softcap=x.softcap)
        if x.pending:  # what may still be taken back is ranked for this query alone
            kept = self._hand_over(state, columns, final(state.seen + 1, self.config.chunk, "terraced"))
        return self.budgets.attend(
            lambda _slots, held, *parts: kept_decode(*parts, kept=held, **terms), kept, x.q, k, v
        )

    def _attend(
        self, x: MixerInput, q: Tensor, k: Tensor, v: Tensor, score: Tensor, kept: Kept | None = None
    ) -> Tensor:
        terms = dict(scale=x.scale, chunk=self.config.chunk, softcap=x.softcap)
        return self.budgets.attend(
            lambda slots, held, *parts: kept_attention(*parts, size=slots, kept=held, **terms),
            kept,
            q,
            k,
            v,
            score,
        )

    def _hand_over(
        self,
        state: SalientState,
        columns: Sequence[Tensor],
        limit: Tensor,
        most: int | None = None,
        whole: bool = False,
    ) -> Kept:
        """The kept tokens with columns ``folded .. limit - 1`` ranked among them; column 0 is position ``folded``.
        There are no more than ``most`` such columns, where that is known without waiting for the device; ``whole``:
        as many in every row, of a state that keeps nothing yet."""
        kept = state.kept
        leaving = int((limit - state.folded).max()) if most is None else most
        if leaving <= 0:
            return kept
        k, v, score = (column[:, :leaving] for column in columns)
        if whole:
            return self.budgets.merge(first_kept, kept, k, v, score)
        stays = torch.arange(leaving, device=k.device) >= (limit - state.folded)[:, None]
        return self.budgets.merge(merge_kept, kept, k, v, score.masked_fill(stays[..., None], -torch.inf))

    def _rank(self, hidden: Tensor, tail: Tensor, position: Tensor) -> tuple[Tensor, Tensor | None]:
        """rho [B, T, G] of inputs at ``position`` [B, T]; tail: those before them, addressed by position."""
        hidden = hidden.to(self.inner.weight.dtype)
        inner, inputs = self.inner(hidden), None
        if self.context is not None:
            inputs, width = self.context(hidden), self.config.score_context
            before = position[:, :1] - torch.arange(width - 1, 0, -1, device=hidden.device)  # [B, width - 1]
            old = take(tail, before.remainder(tail.shape[1])).masked_fill((before < 0)[..., None], 0.0)
            mean = avg_pool1d(torch.cat((old, inputs), 1).transpose(1, 2), width, stride=1).transpose(1, 2)
            # Early tokens have fewer inputs behind them than the pool divides by.
            inner = inner + mean * (width / (position + 1).clamp_max(width))[..., None]
        return self.outer(gelu(inner)), inputs

    def _read(self, x: MixerInput) -> Tensor:
        """[B, T, n] what the score is made of: the layer's input, or q, k and v of all heads side by side."""
        if not self.wants_unrotated:
            return x.hidden
        assert x.q_plain is not None and x.k_plain is not None
        return torch.cat([part.flatten(2) for part in (x.q_plain, x.k_plain, x.v)], dim=-1)

    def _fit(self, x: MixerInput) -> Fit:
        """The loss that the objective makes of the score."""
        position = torch.arange(x.q.shape[1], device=x.q.device).expand(len(x.q), -1)
        score, _ = self._rank(self._read(x), self._tail(x), position)
        return OBJECTIVES[self.config.objective].fit(x, score, self.config)

    def _start(self, x: MixerInput) -> SalientState:
        rows, config = len(x.k), self.config
        exact = self.inner.weight.dtype
        ring, held = span(config.chunk, "terraced") + x.pending, self.budgets.shape
        zero = torch.zeros(rows, dtype=torch.long, device=x.k.device)
        score = x.hidden.new_zeros(rows, ring, x.k.shape[2], dtype=exact)
        return SalientState(
            x.k.new_zeros(rows, ring, *x.k.shape[2:]),
            x.v.new_zeros(rows, ring, *x.v.shape[2:]),
            score,
            x.k.new_zeros(rows, *held, x.k.shape[-1]),
            x.v.new_zeros(rows, *held, x.v.shape[-1]),
            score.new_full((rows, *held), -torch.inf),
            self._tail(x),
            zero,
            zero,
        )

    def _tail(self, x: MixerInput) -> Tensor:
        width = self.config.score_context
        shape = (width - 1 + x.pending, self.config.score_dim) if width else (0, 0)
        return x.hidden.new_zeros(len(x.hidden), *shape, dtype=self.inner.weight.dtype)

    def _grow(self, state: SalientState, pending: int) -> SalientState:
        size = span(self.config.chunk, "terraced") + pending
        tail = self.config.score_context - 1 + pending if self.config.score_context else 0
        k, v, score = (resize(ring, state.seen, size) for ring in state.rings)
        return state._replace(k=k, v=v, score=score, tail=resize(state.tail, state.seen, tail))


def positions(x: MixerInput, seen: Tensor) -> Tensor:
    """[B, T] of the new tokens."""
    if x.hidden.shape[1] == 1:
        return seen[:, None]
    return seen[:, None] + torch.arange(x.hidden.shape[1], device=x.hidden.device)


def placed(rank: Tensor, position: Tensor) -> Tensor:
    """What tokens are ranked by [B, T, G]: on a grid, and inf for the first of a row."""
    return rounded(rank).masked_fill((position == 0)[..., None], torch.inf)


SALIENT = Method(
    "salient",
    SalientConfig,
    SalientMixer,
    "exact softmax on the local span and the tokens a distilled score keeps",
)
