"""Liger: the key projection gates a recurrence over all tokens, averaged with softmax on a short window.

Lan et al., Liger: Linearizing Large Language Models to Gated Recurrent Structures, arXiv 2503.01496. (Not Liger-Kernel,
which is a library of training kernels.) With q, k before the rotary embedding, everything per key/value head,

    log a_t = logsigmoid(k_t + b) / N                                        N = 16, b = 0
    gla     S_t = diag(a_t) S_{t-1} + softmax(k_t) v_t^T,  o_t = S_t^T softmax(q_t)                arXiv 2312.06635
    hgrn2   S_t = diag(a_t) S_{t-1} + (1 - a_t) v_t^T,     o_t = S_t^T softmax(q_t)      N = 1     arXiv 2404.07904
    gsa     C_t = C_{t-1} diag(a_t) + k_t (1 - a_t)^T,  p_t = softmax(C_t^T q_t)                   arXiv 2409.07146
            D_t = diag(a_t) D_{t-1} + (1 - a_t) v_t^T,  o_t = D_t^T p_t
    y_t = mix_window window_t + mix_recurrent o_t                            0.5 and 0.5

where window_t is the model's own softmax on the last W keys, rotated, the query's own included. No parameter is new:
the gates come from weights that the model has.

Departures. The window is part of the decoding state (the public code drops it there, so that generation differs from
the full forward); states are per key/value head; padding enters nothing; the model's q and k norms stay; nothing is
cast to bf16. Where paper and code differ (pooling, gamma, features) this is the code, except W: 64 keys, not 65, which
``window: 65`` gives. Fields after ``feature_map`` are ours or ablations, off by default; what they make learnable
learns in a transfer stage or with ``finetune.train_mixer``.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from .liger_config import LigerConfig, LigerState
from .mixer import Geometry, Method, Mixer, MixerInput
from .ops import (
    Averaged,
    averaged_attention,
    gated_attention,
    gated_decode,
    liger_step,
    window_attention,
    window_decode,
)
from .ring import at_columns, attend_through, counted, final, new_columns, resize, unroll, write
from .tiles import accumulator

NORMALIZER_EPS = 1e-10
"""Added to the normaliser of ``normalize``."""


class LigerMixer(Mixer):
    """One layer. Without options it has no parameters; else ``log_mix``, ``gate_bias``, ``log_temperature``."""

    wants_unrotated = True

    def __init__(self, config: LigerConfig, geometry: Geometry):
        super().__init__(config, geometry)
        self.width = config.gate_width(geometry)
        if config.train_mix is not None:
            heads = geometry.heads if config.train_mix == "head" else 1
            self.log_mix = nn.Parameter(torch.empty(2, heads))
        if config.train_gate_bias:
            self.gate_bias = nn.Parameter(torch.empty(geometry.kv_heads, self.width))
        if config.train_key_temperature:
            self.log_temperature = nn.Parameter(torch.empty(geometry.kv_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        config = self.config
        if config.train_mix is not None:
            for row, weight in zip(self.log_mix, (config.mix_window, config.mix_recurrent), strict=True):
                row.fill_(math.log(weight))
        if config.train_gate_bias:
            self.gate_bias.fill_(config.gate_bias)
        if config.train_key_temperature:
            self.log_temperature.fill_(math.log(config.key_temperature))

    def forward(self, x: MixerInput, state: LigerState | None = None) -> tuple[Tensor, LigerState | None]:
        if x.in_place and state is not None:
            y = self._step_in_place(x, state)
            if y is not None:
                return y, state
        fresh = state is None
        state = self._start(x) if state is None else self._grow(state, x.pending)
        total, limit = counted(state, x, fresh, lambda seen: final(seen, None, "sliding", x.pending))
        branches, new = [], {"k": x.k, "v": x.v}
        whole = fresh and x.softcap is None and x.without is None and self._plain
        if self.config.has_recurrence and (x.pending or not whole):
            log_decay = self._log_decay(x)
            key = self._key(x, log_decay)
            new |= {"key": key, "log_decay": log_decay}
        if whole:
            assert x.q_plain is not None and x.k_plain is not None
            stop = limit if x.use_cache else None
            y, kv = averaged_attention(x.q, x.k, x.v, x.q_plain, x.k_plain, self._terms(x), stop=stop)
            state = state if kv is None else state._replace(kv=kv)
        else:
            if self.config.has_window:
                branches.append(self._window(x, None if fresh else state))
            if self.config.has_recurrence:
                o, state = self._recur(x, new["key"], new["log_decay"], state, limit, fresh)
                branches.append(o)
            y = self._mix(branches, x.without).to(x.v.dtype)
        if not x.use_cache:
            return y, None
        whole = fresh and x.lengths is None
        rings = {name: write(getattr(state, name), t, state.seen, total, whole) for name, t in new.items()}
        return y, state._replace(**rings, seen=total, folded=limit)

    def _step_in_place(self, x: MixerInput, state: LigerState) -> Tensor | None:
        """y by one kernel that also writes the state; None where no kernel takes it."""
        config = self.config
        assert x.q_plain is not None and x.k_plain is not None
        against = "gsa has two recurrences" if config.variant == "gsa" else None
        if config.gate_source != "k":
            against = f"its gate comes from {config.gate_source}"
        return liger_step(
            x.q,
            x.k,
            x.v,
            state.k,
            state.v,
            state.kv,
            state.seen,
            state.folded,
            against=against,
            read=(x.q, x.k) if config.rope_on_recurrent else (x.q_plain, x.k_plain),
            gate=x.k_plain,
            scale=x.scale,
            window=config.window if config.has_window else None,
            softcap=x.softcap,
            recurrence=config.has_recurrence,
            hgrn=config.variant == "hgrn2",
            raw=self._reads_raw,
            normalize_eps=NORMALIZER_EPS if config.normalize else None,
            gate_bias=self.gate_bias if config.train_gate_bias else config.gate_bias,
            log_temperature=self.log_temperature if config.train_key_temperature else None,
            temperature=config.key_temperature,
            log_mix=self.log_mix if config.train_mix is not None else None,
            mix=(config.mix_window, config.mix_recurrent),
            steps=self._gate_steps,
            floor=config.hgrn2_lower_bound,
        )

    @property
    def _gate_steps(self) -> float:
        return self.config.gate_normalizer or (1.0 if self.config.variant == "hgrn2" else 16.0)

    def why_not_without(self, branch: str) -> str | None:
        both = self.config.has_window and self.config.has_recurrence
        return None if both else "it has one branch alone"

    def _mix(self, branches: list[Tensor], without: str | None) -> Tensor:
        config = self.config
        if config.train_mix is not None:
            weights = list(self.log_mix.exp()[..., None])  # [H, 1] or [1, 1]
        else:
            weights = [
                weight
                for weight, there in (
                    (config.mix_window, config.has_window),
                    (config.mix_recurrent, config.has_recurrence),
                )
                if there
            ]
        if without is not None:  # the other branch takes the whole weight
            first, second = weights
            total, off = first + second, 0 * first
            weights = [total, off] if without == "linear" else [off, total]
        exact = accumulator(*branches)
        parts = [weight * y.to(exact) for weight, y in zip(weights, branches, strict=True)]
        return parts[0] + parts[1] if len(parts) == 2 else parts[0]

    # Both at once.

    @property
    def _plain(self) -> bool:
        """Whether the layer is what ``averaged_attention`` computes: nothing learnable, gates from keys."""
        config = self.config
        learnable = config.train_mix or config.train_gate_bias or config.train_key_temperature
        usual = config.variant != "gsa" and config.gate_source == "k" and config.feature_map == "softmax"
        extra = config.hgrn2_lower_bound or config.rope_on_recurrent or config.normalize
        return usual and config.has_recurrence and not learnable and not extra

    def _terms(self, x: MixerInput) -> Averaged:
        config = self.config
        return Averaged(
            x.scale,
            config.window if config.has_window else 0,
            config.variant == "hgrn2",
            self._gate_steps,
            config.gate_bias,
            config.key_temperature,
            config.mix_window,
            config.mix_recurrent,
        )

    # The window.

    def _window(self, x: MixerInput, state: LigerState | None) -> Tensor:
        terms: dict[str, Any] = {"scale": x.scale, "window": self.config.window, "softcap": x.softcap}
        if state is None:
            return window_attention(x.q, x.k, x.v, **terms)
        return attend_through(
            (state.k, state.v),
            x.q,
            x.k,
            x.v,
            seen=state.seen,
            first=(state.folded - self.config.window).clamp_min(0),
            attend=lambda *args: window_attention(*args, **terms),
            decode=lambda *args, **places: window_decode(*args, **places, **terms),
        )

    # The recurrence.

    def _recur(
        self, x: MixerInput, key: Tensor, log_decay: Tensor, state: LigerState, limit: Tensor, fresh: bool
    ) -> tuple[Tensor, LigerState]:
        """o [B, T, H, V], and the state with every token before ``limit`` in kv and slots."""
        query, v, held = self._query(x), x.v, state.key.shape[1]
        if held:
            seen, first = state.seen, state.folded
            query = at_columns(query, held, seen, first)
            key, log_decay = (
                unroll(state.key, key, seen, first),
                unroll(state.log_decay, log_decay, seen, first),
            )
            v = unroll(state.v, v, seen, first)[:, : key.shape[1]]
        gated = gated_decode if key.shape[1] == 1 else gated_attention
        terms: dict[str, Any] = {"stop": limit - state.folded if held or x.lengths is not None else None}
        kv, slots = (None, None) if fresh else (state.kv, state.slots)
        if self.config.variant == "gsa":
            share = -torch.expm1(log_decay)
            scores, slots = gated(query, key, share, log_decay, side="value", state=slots, **terms)
            o, kv = gated(scores.softmax(dim=-1), share, v, log_decay, state=kv, **terms)
            state = state._replace(slots=slots)
        else:
            eps = NORMALIZER_EPS if self.config.normalize else None
            o, kv = gated(query, key, v, log_decay, eps=eps, state=kv, **terms)
        return new_columns(o, x.q.shape[1], state.seen, state.folded), state._replace(kv=kv)

    def _log_decay(self, x: MixerInput) -> Tensor:
        """log a [B, T, G, M], at most 0."""
        config = self.config
        assert x.q_plain is not None and x.k_plain is not None
        source = {"q": x.q_plain, "k": x.k_plain, "v": x.v}[config.gate_source]
        source = source.to(accumulator(source))
        if config.gate_source == "q":
            source = source.unflatten(2, (self.geometry.kv_heads, -1)).mean(3)
        if source.shape[-1] != self.width:
            source = source.unflatten(-1, (self.width, -1)).mean(-1)
        bias = self.gate_bias if config.train_gate_bias else config.gate_bias
        log_decay = logsigmoid(source + bias) / self._gate_steps
        if config.hgrn2_lower_bound:
            floor = torch.full_like(log_decay, math.log(config.hgrn2_lower_bound))
            log_decay = torch.logaddexp(floor, log_decay + math.log1p(-config.hgrn2_lower_bound))
        return log_decay

    def _query(self, x: MixerInput) -> Tensor:
        """[B, T, H, K] as the recurrence reads it."""
        q = x.q if self.config.rope_on_recurrent else x.q_plain
        assert q is not None
        q = q.to(accumulator(q))
        return q if self._reads_raw else q.softmax(dim=-1)

    def _key(self, x: MixerInput, log_decay: Tensor) -> Tensor:
        """[B, T, G, K] as the recurrence reads it."""
        config = self.config
        if config.variant == "hgrn2":
            return -torch.expm1(log_decay)
        k = x.k if config.rope_on_recurrent else x.k_plain
        assert k is not None
        k = k.to(accumulator(k))
        if self._reads_raw:
            return k
        if config.train_key_temperature:
            return (k * torch.exp(-self.log_temperature)[:, None]).softmax(dim=-1)
        return (k / config.key_temperature).softmax(dim=-1)

    @property
    def _reads_raw(self) -> bool:
        return self.config.variant == "gsa" or self.config.feature_map == "identity"

    # The state.

    def _sizes(self, pending: int) -> tuple[int, int, int]:
        """Tokens in the rings of k, of v, and of the recurrence."""
        config = self.config
        window = config.window + pending if config.has_window else 0
        recurrence = pending if config.has_recurrence else 0
        return window, max(window, recurrence), recurrence

    def _start(self, x: MixerInput) -> LigerState:
        shape, rows, width = self.geometry, len(x.k), self.width
        k, v, recurrence = self._sizes(x.pending)
        exact: dict[str, Any] = {"dtype": accumulator(x.v), "device": x.v.device}
        groups = shape.kv_heads if self.config.has_recurrence else 0
        slots = groups if self.config.variant == "gsa" else 0
        zero = torch.zeros(rows, dtype=torch.long, device=x.k.device)
        return LigerState(
            x.k.new_zeros(rows, k, shape.kv_heads, shape.key_dim),
            x.v.new_zeros(rows, v, shape.kv_heads, shape.value_dim),
            torch.zeros(rows, recurrence, groups, shape.key_dim, **exact),
            torch.zeros(rows, recurrence, groups, width, **exact),
            torch.zeros(rows, groups, width, shape.value_dim + self.config.normalize, **exact),
            torch.zeros(rows, slots, shape.key_dim, width, **exact),
            zero,
            zero,
        )

    def _grow(self, state: LigerState, pending: int) -> LigerState:
        k, v, recurrence = self._sizes(pending)
        rings = {"k": k, "v": v, "key": recurrence, "log_decay": recurrence}
        larger = {name: resize(getattr(state, name), state.seen, size) for name, size in rings.items()}
        return state._replace(**larger)


LIGER = Method(
    "liger",
    LigerConfig,
    LigerMixer,
    "a recurrence gated by the model's own keys, averaged with a softmax window",
)
