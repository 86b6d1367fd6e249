"""STILL: salient tokens stay in softmax attention, the others go to a linear state whose features keep their norm.

arXiv 2602.02180; its body was not at hand, so that formulas follow the released code where the abstract is silent.
Every layer attends exactly to the local span (own chunk and the whole one before it) and, for every query head, to the
p tokens of each older chunk that kept the largest share of their own window's attention; all other older tokens are
linear, under one denominator, with a gate on the linear numerator (``routing.py`` has the equations):

    phi(x) = [softmax(b); softmax(-b)],  b = |x| W r(x) / |W r(x)|,  r a learned reflection        (``np_map``)
    rho_t  = e_tt - logsumexp over the last C tokens of e_tj                                       in each head, fp32
    g_t    = sigmoid(W_g h_t + gate_bias) in (0, 1)^V

``budget`` is ours: the release never evicts, so that its decode is O(p T / C). With a budget the best of all picked
tokens stay, and who leaves is added to the linear state, which is exact, because sums are additive. ``share_selection``
(one set for each key/value head, by the mean share of its query heads) and ``kv_tied_map`` (then one state each, too)
are ours.

Departures: chunk 0 sees no keys but its own (in the release a chunk of zero keys); the first token is kept on purpose,
where the release ranks its NaN first; prefill and decode rank by the same number; padding is masked; one path, with a
cache or without. Scores are rounded before they are ranked, so that equal tokens tie at any split.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .feature_maps import FEATURE_MAPS
from .mixer import Geometry, Method, Mixer, MixerInput
from .ops import (
    Behind,
    Kept,
    Past,
    fold,
    ranks_of,
    route,
    routed_attention,
    routed_decode,
    routed_prefill,
    saliency_ranks,
    self_saliency,
    self_saliency_of,
    still_step,
)
from .ring import at_columns, counted, final, new_columns, resize, span, step_positions, unroll, write
from .still_config import StillConfig, StillState, feature_width
from .tiles import per_head


class Older(NamedTuple):
    """What a query of a state meets beside its local span."""

    kept: Kept
    kv: Tensor
    z: Tensor


class StillMixer(Mixer):
    """One layer. Parameters: ``map_q``, ``map_k``, and ``output_gate`` M to H V (or H), absent without a gate."""

    def __init__(self, config: StillConfig, geometry: Geometry):
        super().__init__(config, geometry)
        make, width = FEATURE_MAPS[config.feature_map], feature_width(config, geometry)
        self.select_heads = geometry.kv_heads if config.share_selection else geometry.heads
        self.state_heads = geometry.kv_heads if config.kv_tied_map else geometry.heads
        self.map_q = make(geometry.heads, geometry.key_dim, width, config.feature_init)
        self.map_k = make(self.state_heads, geometry.key_dim, width, config.feature_init)
        self.output_gate = None
        if config.gate != "none":
            width = geometry.value_dim if config.gate == "per_channel" else 1
            self.output_gate = nn.Linear(geometry.hidden, geometry.heads * width, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.map_q.reset_parameters()
        step = self.geometry.heads // self.state_heads
        for ours, theirs in zip(self.map_k.parameters(), self.map_q.parameters(), strict=True):
            ours.copy_(theirs[::step])
        if self.output_gate is not None:
            nn.init.normal_(self.output_gate.weight, std=0.02)

    def forward(self, x: MixerInput, state: StillState | None = None) -> tuple[Tensor, StillState | None]:
        if state is None and not x.use_cache:
            return self._prefill(x, self._score(x))[0], None
        if x.in_place and state is not None:
            y = self._step_in_place(x, state)
            if y is not None:
                return y, state
        started = self._start(x) if state is None else self._grow(state, x.pending)
        fresh, whole = state is None, state is None and x.lengths is None
        total, limit = counted(
            started, x, fresh, lambda seen: final(seen, self.config.chunk, "terraced", x.pending)
        )
        if state is None:
            new = (x.k, x.v, self._score(x))
            most = final(x.q.shape[1], self.config.chunk, "terraced", x.pending) if whole else None
            y, behind = self._prefill(x, new[2], None if x.pending else self._slots(limit, most))
            if x.pending or behind is None:
                older = self._hand_over(started, new, limit, most)
            elif behind.kept is None:
                older = self._hand_over(started, new, limit, most, (behind.kv, behind.z))
            else:
                older = Older(behind.kept, behind.kv, behind.z)
        else:
            k, v = (
                unroll(*pair, started.seen, started.folded) for pair in ((started.k, x.k), (started.v, x.v))
            )
            step = x.q.shape[1] == 1 and x.lengths is None
            score = (self._score_step if step else self._score_chunk)(x, started, k)
            new = (x.k, x.v, score)
            columns = (k, v, unroll(started.score, score, started.seen, started.folded))
            # A step in place does not wait for the device to say how many leave: a chunk at most.
            older = self._hand_over(started, columns, limit, self.config.chunk if x.in_place else None)
            y = self._step(x, started, columns, older) if step else self._chunk(x, started, columns)
        k, v, score = (
            write(old, token, started.seen, total, whole)
            for old, token in zip(started.rings, new, strict=True)
        )
        return y, StillState(k, v, score, *older.kept, older.kv, older.z, total, limit)

    def _slots(self, limit: Tensor, most: int | None) -> int:
        """N of a state whose tokens before ``limit``, ``most`` in any row, have left the local span."""
        config = self.config
        if config.budget is not None:
            return config.budget
        return (int(limit.max()) if most is None else most) // config.chunk * config.salient_per_chunk

    def _step_in_place(self, x: MixerInput, state: StillState) -> Tensor | None:
        """y by one kernel that also writes the state, after the gate's projection; None where no kernel takes it."""
        config, against = self.config, None
        if config.share_selection:
            against = "the heads of a group select together"
        elif not (config.budget and config.salient_per_chunk):
            against = "nothing is kept"
        extra = {"np_map": "reflect", "t2r": "bias"}.get(config.feature_map)
        extras = None if extra is None else (getattr(self.map_q, extra), getattr(self.map_k, extra))
        return still_step(
            x.q,
            x.k,
            x.v,
            *state,
            against=against,
            score=None if config.score == "self_saliency" else self._ranks(x, None, state.seen),
            gate=self._gate(x),
            maps=(self.map_q.weight, self.map_k.weight),
            extras=extras,
            feature_map=config.feature_map,
            scale=x.scale,
            chunk=config.chunk,
            picks=config.salient_per_chunk,
            keep_first=config.keep_first,
            eps=config.eps_den,
            softcap=x.softcap,
        )

    def with_room(self, state: StillState) -> StillState:
        """A slot more: the token that the newest one would replace may be leaving, and other heads read it."""
        return self._grow(state, 1)

    def _chunk(self, x: MixerInput, state: StillState, columns: Sequence[Tensor]) -> Tensor:
        """Several tokens: columns ``folded, ...`` stand on the chunk grid, as the parallel form needs."""
        k, v, score = columns
        held, place = state.k.shape[1], (state.seen, state.folded)
        gate = self._gate(x)
        past = Past(state.kept, self.map_k(state.kept_k), state.kv, state.z)
        y = self._attend(
            x,
            at_columns(x.q, held, *place),
            k,
            v,
            score,
            None if gate is None else at_columns(gate, held, *place),
            past,
        )
        return new_columns(y, x.q.shape[1], *place)

    def _step(self, x: MixerInput, state: StillState, columns: Sequence[Tensor], older: Older) -> Tensor:
        """One token a row: it meets the kept tokens, the rings and the sums."""
        k, v, _ = columns
        if x.pending:  # what may still be taken back is routed for this query alone
            older = self._hand_over(state, columns, final(state.seen + 1, self.config.chunk, "terraced"))
        return routed_decode(
            x.q,
            k,
            v,
            self._map_q(x, x.q),
            *older,
            self._gate(x),
            **step_positions(k, state.seen, state.folded),
            scale=x.scale,
            chunk=self.config.chunk,
            eps=self.config.eps_den,
            softcap=x.softcap,
        )

    def _prefill(
        self, x: MixerInput, score: Tensor, slots: int | None = None
    ) -> tuple[Tensor, Behind | None]:
        """y of whole rows, and what is behind each, where it falls off on the way: its kept tokens in ``slots``, and
        the sums of what is linear."""
        config = self.config
        if x.without is not None:
            return self._attend(x, x.q, x.k, x.v, score, self._gate(x)), None
        return routed_prefill(
            x.q,
            x.k,
            x.v,
            self.map_q,
            self.map_k,
            score,
            self._gate(x),
            scale=x.scale,
            chunk=config.chunk,
            picks=config.salient_per_chunk,
            size=config.budget,
            eps=config.eps_den,
            softcap=x.softcap,
            lengths=x.lengths,
            slots=slots,
        )

    def _attend(
        self,
        x: MixerInput,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        score: Tensor,
        gate: Tensor | None,
        past: Past | None = None,
    ) -> Tensor:
        config = self.config
        return routed_attention(
            q,
            k,
            v,
            self._map_q(x, q),
            self.map_k(k),
            score,
            gate,
            scale=x.scale,
            chunk=config.chunk,
            picks=config.salient_per_chunk,
            size=config.budget,
            eps=config.eps_den,
            softcap=x.softcap,
            past=past,
        )

    def _hand_over(
        self,
        state: StillState,
        columns: Sequence[Tensor],
        limit: Tensor,
        most: int | None = None,
        sums: tuple[Tensor, Tensor] | None = None,
    ) -> Older:
        """What has left the local span once columns ``folded .. limit - 1`` have; column 0 is position ``folded``.
        There are no more than ``most`` such columns, where that is known without waiting for the device. ``sums``: the
        linear ones, where they are known."""
        config, leaving = self.config, limit - state.folded
        count = int(leaving.max()) if most is None else most
        if count <= 0:
            return Older(state.kept, state.kv, state.z)
        k, v, score = (column[:, :count] for column in columns)
        kept, left, loose = route(
            state.kept,
            k,
            v,
            score,
            leaving,
            chunk=config.chunk,
            picks=config.salient_per_chunk,
            size=self._slots(limit, None),
        )
        if sums is not None:
            return Older(kept, *(x.contiguous() for x in sums))
        sums = fold(state.kv, state.z, self.map_k(k), per_head(v, self.select_heads), loose)
        return Older(kept, *fold(*sums, self.map_k(left.k), left.v, left.score > -torch.inf))

    # What tokens are picked by: [B, T, Gs] for the new tokens of a call.

    def _score(self, x: MixerInput) -> Tensor:
        config = self.config
        if config.score == "self_saliency":
            return saliency_ranks(
                x.q,
                x.k,
                scale=x.scale,
                window=config.chunk,
                groups=self.select_heads,
                keep_first=config.keep_first,
                softcap=x.softcap,
            )
        return self._ranks(x, None, torch.zeros(len(x.k), dtype=torch.long, device=x.k.device))

    def _score_chunk(self, x: MixerInput, state: StillState, k: Tensor) -> Tensor:
        rho = None
        if self.config.score == "self_saliency":
            place = (state.seen, state.folded)
            q = at_columns(x.q, state.k.shape[1], *place)
            rho = self_saliency(q, k, scale=x.scale, window=self.config.chunk, softcap=x.softcap)
            rho = new_columns(rho, x.q.shape[1], *place)
        return self._ranks(x, rho, state.seen)

    def _score_step(self, x: MixerInput, state: StillState, k: Tensor) -> Tensor:
        rho = None
        if self.config.score == "self_saliency":
            rho = self_saliency_of(
                x.q,
                k,
                **step_positions(k, state.seen, state.folded),
                scale=x.scale,
                window=self.config.chunk,
                softcap=x.softcap,
            )
        return self._ranks(x, rho, state.seen)

    def _ranks(self, x: MixerInput, rho: Tensor | None, seen: Tensor) -> Tensor:
        """What the heads that select rank by, from rho [B, T, H] or, without it, from the positions alone."""
        position = seen[:, None] + torch.arange(x.q.shape[1], device=x.q.device)
        dtype = torch.promote_types(x.v.dtype, torch.float32)
        if rho is None:
            ranks = position if self.config.score == "recency" else shuffled(position)
            score = ranks.to(dtype)[..., None].expand(-1, -1, self.select_heads)
        else:
            score = ranks_of(rho, self.select_heads)
        return score.masked_fill((position == 0)[..., None], torch.inf) if self.config.keep_first else score

    def _map_q(self, x: MixerInput, q: Tensor) -> Tensor:
        """Features of queries [B, T, H, F]; 0 where the linear branch is left out, and so its sums."""
        phi = self.map_q(q)
        return torch.zeros_like(phi) if x.without == "linear" else phi

    def why_not_without(self, branch: str) -> str | None:
        if branch == "linear":
            return None
        return "its local span and its picked tokens are one softmax, of which the span is no branch"

    def _gate(self, x: MixerInput) -> Tensor | None:
        """g [B, T, H, V or 1]; of several tokens in half precision where the model is, as in training: the
        projection is as wide as those of q and k, and fp32 products take ten times as long.

        Of one token the weights are read as they are: copying them to another dtype would take longer.
        """
        if self.output_gate is None:
            return None
        hidden, dtype = x.hidden, self.output_gate.weight.dtype
        if hidden.shape[1] > 1 and hidden.dtype in (torch.float16, torch.bfloat16):
            with torch.autocast(hidden.device.type, hidden.dtype):
                logits = self.output_gate(hidden)
        else:
            logits = self.output_gate(hidden.to(dtype))
        logits = logits + self.config.gate_bias
        return logits.sigmoid().unflatten(-1, (self.geometry.heads, -1))

    def why_not_in_place(self) -> str | None:
        return "STILL without a budget grows with the text" if self.config.budget is None else None

    def growth(self, itemsize: int) -> float:
        config, shape = self.config, self.geometry
        if config.budget is not None:
            return 0.0
        token = (shape.key_dim + shape.value_dim) * itemsize + max(itemsize, 4)
        return config.salient_per_chunk / config.chunk * self.select_heads * token

    def _start(self, x: MixerInput) -> StillState:
        rows, config, shape = len(x.k), self.config, self.geometry
        ring, slots = span(config.chunk, "terraced") + x.pending, config.budget or 0
        exact = torch.promote_types(x.v.dtype, torch.float32)
        zero = torch.zeros(rows, dtype=torch.long, device=x.k.device)
        score = x.v.new_zeros(rows, ring, self.select_heads, dtype=exact)
        return StillState(
            x.k.new_zeros(rows, ring, *x.k.shape[2:]),
            x.v.new_zeros(rows, ring, *x.v.shape[2:]),
            score,
            x.k.new_zeros(rows, slots, self.select_heads, shape.key_dim),
            x.v.new_zeros(rows, slots, self.select_heads, shape.value_dim),
            score.new_full((rows, slots, self.select_heads), -torch.inf),
            x.v.new_zeros(rows, self.state_heads, self.map_q.feature_dim, shape.value_dim, dtype=exact),
            x.v.new_zeros(rows, self.state_heads, self.map_q.feature_dim, dtype=exact),
            zero,
            zero,
        )

    def _grow(self, state: StillState, pending: int) -> StillState:
        size = span(self.config.chunk, "terraced") + pending
        k, v, score = (resize(ring, state.seen, size) for ring in state.rings)
        return state._replace(k=k, v=v, score=score)


def shuffled(position: Tensor) -> Tensor:
    """A fixed number below 2^24 for every position, without order: the mixing steps of a 32-bit hash."""
    x = position
    for shift, factor in ((16, 0x45D9F3B), (16, 0x45D9F3B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return (x ^ (x >> 16)) & 0xFFFFFF


STILL = Method(
    "still",
    StillConfig,
    StillMixer,
    "exact softmax on the local span and picked older tokens, norm-preserved linear attention on the others",
)
