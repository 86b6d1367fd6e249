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
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .errors import ConversionError
from .feature_maps import FEATURE_MAPS
from .mixer import Geometry, Method, MethodConfig, Mixer, MixerInput, check_window
from .ops import fold, joint_attention, joint_decode
from .ring import final, resize, span, take, unroll, write


@dataclass(frozen=True)
class LolcatsConfig(MethodConfig):
    """Fields of a LoLCATs layer; defaults are the paper's main setting."""

    name: ClassVar[str] = "lolcats"
    recommended: ClassVar[dict[str, Any]] = {"transfer.learning_rate": 1e-2, "finetune.learning_rate": 1e-4}

    window: int | None = 64
    """W, tokens with exact softmax, the query's own included; None is pure linear attention."""
    window_kind: Literal["sliding", "terraced"] = "terraced"
    """``sliding`` (the last W tokens) or ``terraced`` (the query's block of W and the whole block before it)."""
    feature_map: str = "hedgehog"
    """hedgehog, hedgehog_half, t2r, elu or exp."""
    feature_dim: int | None = None
    """F, the width of phi, both halves of a two-sided map together; None is the key dim."""
    feature_init: Literal["identity", "kaiming"] = "identity"
    """``identity`` or ``kaiming``."""
    tie_qk_map: bool = False
    """One map for queries and keys."""
    kv_tied_map: bool = False
    """One key map per key/value head instead of per query head: an R times smaller state, and another model."""
    window_logit_init: float = -2.1972245773362196
    """Logit of the window factor g at the start; ln(1/9), so g = 0.1 (arXiv 2410.10254, appendix)."""
    train_window_logit: bool = True
    """Whether g is learned."""
    affine_factors: bool = False
    """Weight the linear term by 1 - g instead of 1."""

    def check(self, geometry: Geometry | None = None) -> None:
        check_window(self.window, self.window_kind, "method")
        if self.feature_map not in FEATURE_MAPS:
            raise ConversionError(
                f"method.feature_map: {self.feature_map!r} is unknown; choose from {', '.join(FEATURE_MAPS)}"
            )
        if (
            self.tie_qk_map
            and self.kv_tied_map
            and geometry is not None
            and geometry.heads != geometry.kv_heads
        ):
            raise ConversionError(
                "method.tie_qk_map: a map shared by queries and keys cannot also be shared by the heads of a group; "
                "drop one of tie_qk_map, kv_tied_map"
            )
        if geometry is not None:
            width = feature_width(self, geometry)
            FEATURE_MAPS[self.feature_map].check(geometry.key_dim, width, self.feature_init)


def feature_width(config: LolcatsConfig, geometry: Geometry) -> int:
    """F of a layer of this geometry."""
    return geometry.key_dim if config.feature_dim is None else config.feature_dim


class LolcatsState(NamedTuple):
    """Bounded memory of a row; nothing grows with the tokens seen.

    k, v hold the newest n tokens (n = W sliding, 2 W terraced, and the droppable ones while a cache records its past);
    kv and z sum everything older.
    """

    k: Tensor
    """[B, n, G, K], model dtype."""
    v: Tensor
    """[B, n, G, V], model dtype."""
    kv: Tensor
    """[B, Hs, F, V] fp32, the sum of phi_k v^T; Hs = H, or G with ``kv_tied_map``."""
    z: Tensor
    """[B, Hs, F] fp32, the sum of phi_k."""
    seen: Tensor
    """[B] tokens seen."""
    folded: Tensor
    """[B] tokens inside kv and z; they are the oldest."""


class LolcatsMixer(Mixer):
    """One layer. Parameters: ``map_q``, ``map_k`` (absent when tied to ``map_q``), ``window_logit`` [H]."""

    def __init__(self, config: LolcatsConfig, geometry: Geometry):
        super().__init__(config, geometry)
        make, width = FEATURE_MAPS[config.feature_map], feature_width(config, geometry)
        self.feature_dim = width
        self.state_heads = geometry.kv_heads if config.kv_tied_map else geometry.heads
        self.map_q = make(geometry.heads, geometry.key_dim, width, config.feature_init)
        if not config.tie_qk_map:
            self.map_k = make(self.state_heads, geometry.key_dim, width, config.feature_init)
        self.window_logit = nn.Parameter(
            torch.empty(geometry.heads), requires_grad=config.train_window_logit and config.window is not None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.map_q.reset_parameters()
        if not self.config.tie_qk_map:
            self.map_k.reset_parameters()
        nn.init.constant_(self.window_logit, self.config.window_logit_init)

    def forward(self, x: MixerInput, state: LolcatsState | None = None) -> tuple[Tensor, LolcatsState | None]:
        if state is None:
            phi_k = self._map_k(x.k)
            y = self._joint(x, x.q, x.k, x.v, phi_k, None)
            if not x.use_cache:
                return y, None
            state = self._start(x)
            total, limit = self._advance(x, state)
            sums = self._fold(state, phi_k, x.v, limit)
        else:
            state = self._grow(state, x.pending)
            total, limit = self._advance(x, state)
            step = x.q.shape[1] == 1 and x.lengths is None
            y, sums = (self._step if step else self._chunk)(x, state, limit)
        k, v = (write(old, new, state.seen, total) for old, new in ((state.k, x.k), (state.v, x.v)))
        return y, LolcatsState(k, v, *sums, total, limit)

    def _advance(self, x: MixerInput, state: LolcatsState) -> tuple[Tensor, Tensor]:
        """Tokens seen, and tokens folded, after this call; both [B]."""
        total = state.seen + (x.q.shape[1] if x.lengths is None else x.lengths)
        limit = final(total, self.config.window, self.config.window_kind, x.pending)
        return total, limit.maximum(state.folded)

    def _step(
        self, x: MixerInput, state: LolcatsState, limit: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One token a row: fold what leaves the window, then meet the slots that are left and the state."""
        k, v = (unroll(old, new, state.seen, state.folded) for old, new in ((state.k, x.k), (state.v, x.v)))
        sums = (state.kv, state.z)
        leaving = int((limit - state.folded).max())
        if leaving:
            sums = self._fold(state, self._map_k(k[:, :leaving]), v[:, :leaving], limit)
        position = state.folded[:, None] + torch.arange(k.shape[1], device=k.device)
        # Columns after the new token repeat it wherever the buffer is not full.
        empty = (position < limit[:, None]) | (position > state.seen[:, None])
        outside = k.shape[1] - 1 > span(self.config.window, self.config.window_kind)
        y = joint_decode(
            x.q,
            k,
            v,
            self.map_q(x.q),
            self._map_k(k) if outside else None,
            *self._factors(),
            key_positions=position.masked_fill(empty, -1),
            query_positions=state.seen[:, None],
            state=sums,
            **self._terms(x),
        )
        return y, sums

    def _chunk(
        self, x: MixerInput, state: LolcatsState, limit: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Several tokens: columns ``folded, ...`` stand on the window's grid, as the parallel form needs."""
        k, v = (unroll(old, new, state.seen, state.folded) for old, new in ((state.k, x.k), (state.v, x.v)))
        phi_k = self._map_k(k)
        no_query = x.q.new_zeros(len(x.q), state.k.shape[1], *x.q.shape[2:])
        q = unroll(no_query, x.q, state.seen, state.folded)
        y = self._joint(x, q, k, v, phi_k, (state.kv, state.z))
        column = (state.seen - state.folded)[:, None] + torch.arange(x.q.shape[1], device=k.device)
        return take(y, column), self._fold(state, phi_k, v, limit)

    def _joint(
        self,
        x: MixerInput,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        phi_k: Tensor,
        state: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        return joint_attention(q, k, v, self.map_q(q), phi_k, *self._factors(), state=state, **self._terms(x))

    def _fold(self, state: LolcatsState, phi_k: Tensor, v: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        """The sums with columns ``folded .. limit - 1`` added; column 0 of phi_k and v is position ``folded``."""
        keep = torch.arange(v.shape[1], device=v.device) < (limit - state.folded)[:, None]
        return fold(state.kv, state.z, phi_k, v, keep)

    def _map_k(self, k: Tensor) -> Tensor:
        return (self.map_q if self.config.tie_qk_map else self.map_k)(k)

    def _factors(self) -> tuple[Tensor, Tensor | None]:
        g = self.window_logit.sigmoid()
        return g, 1 - g if self.config.affine_factors else None

    def _terms(self, x: MixerInput) -> dict[str, Any]:
        return dict(
            scale=x.scale, window=self.config.window, window_kind=self.config.window_kind, softcap=x.softcap
        )

    def _start(self, x: MixerInput) -> LolcatsState:
        shape, rows = self.geometry, len(x.k)
        size = span(self.config.window, self.config.window_kind) + x.pending
        exact = torch.promote_types(x.v.dtype, torch.float32)
        zero = torch.zeros(rows, dtype=torch.long, device=x.k.device)
        return LolcatsState(
            x.k.new_zeros(rows, size, shape.kv_heads, shape.key_dim),
            x.v.new_zeros(rows, size, shape.kv_heads, shape.value_dim),
            x.v.new_zeros(rows, self.state_heads, self.feature_dim, shape.value_dim, dtype=exact),
            x.v.new_zeros(rows, self.state_heads, self.feature_dim, dtype=exact),
            zero,
            zero,
        )

    def _grow(self, state: LolcatsState, pending: int) -> LolcatsState:
        size = span(self.config.window, self.config.window_kind) + pending
        return state._replace(k=resize(state.k, state.seen, size), v=resize(state.v, state.seen, size))


LOLCATS = Method(
    "lolcats", LolcatsConfig, LolcatsMixer, "exact softmax on a window, learned linear attention before it"
)
