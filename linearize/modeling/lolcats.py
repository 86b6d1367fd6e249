"""LoLCATs: exact softmax on a short window and learned linear attention on everything older, under one normaliser.

Zhang et al., LoLCATs: On Low-Rank Linearizing of Large Language Models, arXiv 2410.10254; the feature map is
Hedgehog's, Zhang et al., arXiv 2402.04347. With s_ij = scale q_i.k_j, S(i) the window of query i, P(i) the older keys,
g = sigmoid(window_logit) and b = 1 (or 1 - g with ``affine_factors``),

    c_i = max_{j in S(i)} s_ij
    y_i = [g sum_S exp(s_ij - c_i) v_j + b sum_P (phi_q(q_i).phi_k(k_j)) v_j] / [the same with v_j = 1]

which is Eq. 7 of the paper with the windows of the authors' training code. The maximum c_i is part of the function: the
linear term is not rescaled by it.

Departures. Terraced blocks start at the first real token (the public code aligns them to the end, so that an output
depends on how long its sequence is); decoding uses the window of training; states are fp32; padding is masked; the
window is stored per key/value head. ``kv_tied_map`` (one key map, and so one state, per key/value head) is ours.

``sparse_cache`` is LoLA's (McDermott, Heath and Parhi, arXiv 2505.23666), for inference on students trained without it:
of the pairs that leave the window, the N that the sums recall worst move from P(i) to S(i). ``lola.py`` has the rule,
and how it departs from the paper.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .errors import ConversionError
from .linear import LinearConfig, LinearMixer
from .mixer import Fit, Geometry, Method, MixerInput, check_window
from .ops import Sparse, sparse_attention, sparse_decode, sparse_hand_over
from .ring import final, span


@dataclass(frozen=True)
class LolcatsConfig(LinearConfig):
    """Fields of a LoLCATs layer; defaults are the paper's main setting."""

    name: ClassVar[str] = "lolcats"
    adjustable: ClassVar[frozenset[str]] = frozenset({"sparse_cache"})

    window: int | None = 64
    """W, tokens with exact softmax, the query's own included; None is pure linear attention."""
    window_kind: Literal["sliding", "terraced"] = "terraced"
    """``sliding`` (the last W tokens) or ``terraced`` (the query's block of W and the whole block before it)."""
    window_logit_init: float = -2.1972245773362196
    """Logit of the window factor g at the start; ln(1/9), so g = 0.1 (arXiv 2410.10254, appendix)."""
    train_window_logit: bool = True
    """Whether g is learned."""
    affine_factors: bool = False
    """Weight the linear term by 1 - g instead of 1."""
    sparse_cache: int | None = None
    """N, exact pairs kept per head behind the window (arXiv 2505.23666); None is off. It needs no training."""

    def check(self, geometry: Geometry | None = None) -> None:
        check_window(self.window, self.window_kind, "method")
        if self.sparse_cache is not None and self.sparse_cache < 0:
            raise ConversionError(
                f"method.sparse_cache: {self.sparse_cache} is impossible; give 0 or more, or null for no cache"
            )
        if self.sparse_cache and (self.window is None or self.window_kind != "terraced"):
            raise ConversionError(
                f"method.sparse_cache: {self.sparse_cache} pairs are chosen when a whole block leaves the window; "
                "give method.window a length and set method.window_kind=terraced, or leave it out"
            )
        super().check(geometry)


class LolcatsState(NamedTuple):
    """Bounded memory of a row; nothing grows with the tokens seen.

    k, v hold the newest n tokens (n = W sliding, 2 W terraced, and the droppable ones while a cache records its past);
    the others are in kv and z, but for the pairs in the sparse cache.
    """

    k: Tensor
    """[B, n, G, K], model dtype."""
    v: Tensor
    """[B, n, G, V], model dtype."""
    kv: Tensor
    """[B, Hs, F, V] fp32, the sum of phi_k v^T; Hs = H, or G with ``kv_tied_map``."""
    z: Tensor
    """[B, Hs, F] fp32, the sum of phi_k."""
    kept_k: Tensor
    """[B, N, Hs, K], model dtype; empty slots first, then by position. N is 0 without ``sparse_cache``."""
    kept_v: Tensor
    """[B, N, Hs, V], likewise."""
    seen: Tensor
    """[B] tokens seen."""
    folded: Tensor
    """[B] tokens that have left the window; they are the oldest."""


class LolcatsMixer(LinearMixer):
    """One layer. Parameters: ``map_q``, ``map_k`` (absent when tied to ``map_q``), ``window_logit`` [H]."""

    def __init__(self, config: LolcatsConfig, geometry: Geometry):
        super().__init__(config, geometry)
        self.window, self.window_kind = config.window, config.window_kind
        self.window_logit = nn.Parameter(
            torch.full((geometry.heads,), config.window_logit_init),
            requires_grad=config.train_window_logit and config.window is not None,
        )

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.window_logit, self.config.window_logit_init)

    def _factors(self, x: MixerInput) -> tuple[Tensor, Tensor | None]:
        g = self.window_logit.sigmoid()
        if x.without is not None:
            off, whole = torch.zeros_like(g), torch.ones_like(g)
            return (whole, off) if x.without == "linear" else (off, whole)
        return g, 1 - g if self.config.affine_factors else None

    def forward(self, x: MixerInput, state: Any = None) -> tuple[Tensor | Fit, Any]:
        y, after = super().forward(x, state)
        if x.without != "window":
            return y, after
        assert isinstance(y, Tensor)
        seen = x.q.new_zeros(len(y), dtype=torch.long) if state is None else state.seen
        position = seen[:, None] + torch.arange(y.shape[1], device=y.device)
        # These tokens have nothing older than their window, and so neither numerator nor denominator.
        return y.masked_fill((position < span(self.window, self.window_kind))[..., None, None], 0.0), after

    def why_not_without(self, branch: str) -> str | None:
        if self.config.window is None:
            return "without a window, linear attention is all there is"
        if branch == "window" and self.config.sparse_cache:
            return "its sparse cache is weighed with the window, and may hold all that is older"
        return None

    def _logit(self) -> dict[str, Any]:
        return {"window_logit": self.window_logit, "affine": self.config.affine_factors}

    def _start(self, x: MixerInput) -> LolcatsState:
        k, v, kv, z, *counters = super()._start(x)
        shape = (len(x.k), self.config.sparse_cache or 0, self.state_heads)
        kept_k, kept_v = (t.new_zeros(*shape, t.shape[-1]) for t in (x.k, x.v))
        return LolcatsState(k, v, kv, z, kept_k, kept_v, *counters)

    @property
    def _is_plain(self) -> bool:
        return not self.config.sparse_cache

    def why_not_in_place(self) -> str | None:
        return "a sparse cache is ranked by the host" if self.config.sparse_cache else None

    # With a sparse cache: the same columns, and another road for what leaves the window.

    def _many(
        self,
        x: MixerInput,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: LolcatsState | None = None,
        limit: Tensor | None = None,
        empty: bool = False,
    ) -> tuple[Tensor, LolcatsState | None]:
        if not self.config.sparse_cache:
            return super()._many(x, q, k, v, state, limit, empty)
        older = self._start(x) if state is None else state
        leaving = None if limit is None else limit - older.folded
        y, memory = sparse_attention(
            q,
            k,
            v,
            self.map_q(q),
            self._map_k,
            *self._factors(x),
            memory=_memory(older),
            leaving=leaving,
            scale=x.scale,
            window=self.config.window,
            softcap=x.softcap,
        )
        return y, None if state is None else _remember(state, memory)

    def _step(self, x: MixerInput, state: LolcatsState, limit: Tensor) -> tuple[Tensor, LolcatsState]:
        if not self.config.sparse_cache:
            return super()._step(x, state, limit)
        k, v = self._columns(x, state)

        def handed_over(upto: Tensor) -> Sparse:
            return sparse_hand_over(
                k,
                v,
                self._map_k,
                memory=_memory(state),
                leaving=upto - state.folded,
                window=self.config.window,
            )

        memory = met = handed_over(limit)
        if x.pending:  # what may still be taken back is ranked for this query alone
            met = handed_over(final(state.seen + 1, self.config.window, "terraced"))
        y = sparse_decode(
            x.q,
            k,
            v,
            self.map_q(x.q),
            *self._factors(x),
            memory=met,
            **self._positions(k, state, limit),
            scale=x.scale,
            window=self.config.window,
            softcap=x.softcap,
        )
        return y, _remember(state, memory)


def _memory(state: LolcatsState) -> Sparse:
    return Sparse(state.kept_k, state.kept_v, state.kv, state.z, state.folded)


def _remember(state: LolcatsState, memory: Sparse) -> LolcatsState:
    return state._replace(kept_k=memory.k, kept_v=memory.v, kv=memory.kv, z=memory.z)


LOLCATS = Method(
    "lolcats", LolcatsConfig, LolcatsMixer, "exact softmax on a window, learned linear attention before it"
)
