"""LAWCAT: a short convolution on q and k, then normalised linear attention whose memory decays by a learned gate.

Liu et al., LAWCAT: Efficient Distillation from Quadratic to Linear Attention with Convolution across Tokens for Long
Context Modeling, arXiv 2509.18467. With q, k before the rotary embedding and h the layer's input, everything per query
head (k, v and the gate are shared by a group, convolution and map are not),

    q^_t = sum_{i<4} w_i q_{t-i},  k^_t likewise               depthwise, own taps for q and k
    phi(x) = [softmax(xW); softmax(-xW)]                       Hedgehog's map, one W for q and k
    log a_t = logsigmoid(W2 W1 h_t + b) / 16                   rank 16, one gate for each channel of phi
    S_t = diag(a_t) S_{t-1} + phi(k^_t) v_t^T,  z_t = a_t z_{t-1} + phi(k^_t)
    y_t = S_t^T phi(q^_t) / (z_t . phi(q^_t) + 1e-10)

so the denominator decays with the numerator, and an output is a weighted mean of values at any length. With a window,
g = sigmoid(window_logit) and c_t the largest score in it,

    y_t = (g sum_window exp(s_tj - c_t) v_j + num) / (g sum_window exp(s_tj - c_t) + den)

Half of an average weight is gone after 16 tokens at the start; ``gate_bias`` of 3 or 6 makes that 228 or 4,500. The
paper's long-context results come from training on the task's own form; plain text is not expected to reach them.

Departures. Padding enters neither sum; the model's q and k norms come before the convolution; a gate's width follows
from the heads and not from the hidden size. ``window_exclude`` (the release counts window tokens twice), ``kv_shared``
and ``gate_bias`` are ours, and so is the form of the norm that replaces ``normalize``. Equation numbers are not cited:
what is here was read from the authors' code.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, linear, logsigmoid, pad, rms_norm

from .feature_maps import FEATURE_MAPS, width_of
from .lawcat_config import LawcatConfig, LawcatState
from .mixer import Geometry, Method, Mixer, MixerInput
from .ops import (
    convolved_attention,
    gated_attention,
    gated_decode,
    joined_attention,
    joined_decode,
    lawcat_step,
)
from .ring import at_columns, attend_through, new_columns, resize, unroll, write
from .tiles import accumulator

NORM_EPS = 1e-6
"""Under the root of the norm that stands in for the denominator without ``normalize``, as in Llama's."""


class LawcatMixer(Mixer):
    """One layer. Parameters, some of: ``taps_{q,k,v}``, ``map_{q,k}``, ``gate_{down,up}``, ``window_logit``, ``norm``.

    Taps are [heads, K or V, c], the current token's first. What q and k share is the one of k.
    """

    wants_unrotated = True

    def __init__(self, config: LawcatConfig, geometry: Geometry):
        super().__init__(config, geometry)
        shape, taps = geometry, config.conv_size or 0
        self.feature_dim = width_of(config.feature_dim, shape.key_dim)
        self.state_heads = shape.kv_heads if config.kv_shared else shape.heads
        if "q" in self._convolved and not config.conv_tied:
            self.taps_q = nn.Parameter(torch.empty(shape.heads, shape.key_dim, taps))
        if "k" in self._convolved:
            self.taps_k = nn.Parameter(torch.empty(self.state_heads, shape.key_dim, taps))
        if "v" in self._convolved:
            self.taps_v = nn.Parameter(torch.empty(self.state_heads, shape.value_dim, taps))
        make = FEATURE_MAPS[config.feature_map]
        if not config.tie_qk_map:
            self.map_q = make(shape.heads, shape.key_dim, self.feature_dim, config.feature_init)
        self.map_k = make(self.state_heads, shape.key_dim, self.feature_dim, config.feature_init)
        width = shape.kv_heads * self.feature_dim
        inner = config.gate_rank or shape.hidden
        self.gate_down = nn.Linear(shape.hidden, inner, bias=False) if config.gate_rank else None
        self.gate_up = nn.Linear(inner, width)
        if config.window is not None:
            self.window_logit = nn.Parameter(torch.empty(shape.heads))
        if not config.normalize:
            self.norm = nn.Parameter(torch.empty(shape.heads, shape.value_dim))
        self.reset_parameters()

    @property
    def _convolved(self) -> str:
        return "" if self.config.conv_size is None else self.config.conv_on

    @torch.no_grad()
    def reset_parameters(self) -> None:
        config = self.config
        for name in ("taps_q", "taps_k", "taps_v"):
            taps = getattr(self, name, None)
            if taps is None:
                continue
            if config.conv_init == "delta":
                taps.fill_(config.conv_older)
                taps[..., 0] = 1.0
            elif config.conv_init == "normal":
                taps.normal_(0, 0.02)
            else:  # Xavier, of a depthwise filter: c inputs and c outputs
                taps.uniform_(-((3 / config.conv_size) ** 0.5), (3 / config.conv_size) ** 0.5)
        for name in ("map_q", "map_k"):
            if hasattr(self, name):
                getattr(self, name).reset_parameters()
        if self.gate_down is not None:
            self.gate_down.weight.normal_(0, config.gate_init_std)
        self.gate_up.weight.normal_(0, config.gate_init_std)
        self.gate_up.bias.fill_(config.gate_bias)
        if config.window is not None:
            self.window_logit.fill_(config.window_logit_init)
        if not config.normalize:
            self.norm.fill_(1.0)

    def forward(self, x: MixerInput, state: LawcatState | None = None) -> tuple[Tensor, LawcatState | None]:
        if x.in_place and state is not None:
            y = self._step_in_place(x, state)
            if y is not None:
                return y, state
        config, fresh = self.config, state is None
        q, k = (x.q, x.k) if config.rope else (x.q_plain, x.k_plain)
        assert q is not None and k is not None
        state = self._start(x) if state is None else self._grow(state, x.pending)
        total = state.seen + (x.q.shape[1] if x.lengths is None else x.lengths)
        limit = (total - x.pending).clamp_min(0).maximum(state.folded)
        log_decay = None if fresh and self._plain and not state.log_decay.shape[1] else self._log_decay(x)
        if fresh and self._plain:
            y, kv = self._whole(x, q, k, limit if x.use_cache else None)
        else:
            assert log_decay is not None
            y, kv = self._sums(x, q, k, log_decay, state, limit, fresh)
        if config.window is not None:
            y = self._join(x, y, None if fresh else state)
        if not config.normalize:
            y = rms_norm(y, y.shape[-1:], eps=NORM_EPS) * self.norm.to(y.dtype)
        y = y.to(x.v.dtype)
        if not x.use_cache:
            return y, None
        new = {"tail_q": q, "tail_k": k, "k": x.k, "v": x.v}
        if log_decay is not None:
            new["log_decay"] = log_decay
        rings = {name: write(getattr(state, name), t, state.seen, total) for name, t in new.items()}
        return y, state._replace(**rings, kv=kv, seen=total, folded=limit)

    def _step_in_place(self, x: MixerInput, state: LawcatState) -> Tensor | None:
        """y by one kernel that also writes the state, after the gate's projections; None where no kernel takes it."""
        config, convolved = self.config, self._convolved
        read = (x.q, x.k) if config.rope else (x.q_plain, x.k_plain)
        assert read[0] is not None and read[1] is not None
        against = None
        for unusual, words in (
            (config.kv_shared, "heads share a state"),
            (not config.normalize, "its output is normed and not divided"),
            (config.window_exclude, "the window's tokens enter the sums later"),
            ("v" in convolved, "values are convolved"),
        ):
            against = words if unusual and against is None else against
        map_q = self.map_k if config.tie_qk_map else self.map_q
        extra = {"np_map": "reflect", "t2r": "bias"}.get(config.feature_map)
        name = "taps_k" if config.conv_tied else "taps_q"
        return lawcat_step(
            x.q,
            x.k,
            x.v,
            state.tail_q,
            state.tail_k,
            state.k,
            state.v,
            state.kv,
            state.seen,
            state.folded,
            against=against,
            read=read,
            logits=self._logits(x),
            steps=config.gate_normalizer,
            least=config.clamp_log_decay,
            taps=(
                getattr(self, name) if "q" in convolved else None,
                self.taps_k if "k" in convolved else None,
            ),
            maps=(map_q.weight, self.map_k.weight),
            extras=None if extra is None else (getattr(map_q, extra), getattr(self.map_k, extra)),
            feature_map=config.feature_map,
            scale=x.scale,
            window=config.window,
            window_logit=None if config.window is None else self.window_logit,
            softcap=x.softcap,
            eps=config.eps,
        )

    def with_room(self, state: LawcatState) -> LawcatState:
        """A slot more in the tails: the oldest input is read by others when a program writes the newest."""
        tails = {name: getattr(state, name) for name in ("tail_q", "tail_k") if getattr(state, name).shape[1]}
        return state._replace(**{n: resize(t, state.seen, t.shape[1] + 1) for n, t in tails.items()})

    def why_not_without(self, branch: str) -> str | None:
        if self.config.window is None:
            return "without a window, linear attention is all there is"
        if branch == "window" and self.config.window_exclude:
            return "its first tokens are in the window alone"
        return None

    # The sums.

    @property
    def _plain(self) -> bool:
        """Whether the layer is what ``convolved_attention`` computes."""
        config = self.config
        unusual = config.window is not None or config.kv_shared or config.clamp_log_decay is not None
        usual = config.normalize and config.feature_map == "hedgehog" and "v" not in self._convolved
        return usual and not unusual

    def _whole(
        self, x: MixerInput, q: Tensor, k: Tensor, stop: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        config = self.config
        tied = "taps_k" if config.conv_tied else "taps_q"
        return convolved_attention(
            q,
            k,
            x.v,
            self._logits(x),
            getattr(self, tied) if "q" in self._convolved else None,
            self.taps_k if "k" in self._convolved else None,
            (self.map_k if config.tie_qk_map else self.map_q).weight,
            self.map_k.weight,
            steps=config.gate_normalizer,
            eps=config.eps,
            stop=stop,
        )

    def _sums(
        self,
        x: MixerInput,
        q: Tensor,
        k: Tensor,
        log_decay: Tensor,
        state: LawcatState,
        limit: Tensor,
        fresh: bool,
    ) -> tuple[Tensor, Tensor]:
        """y [B, T, H, V], or with a window its sums [B, T, H, V + 1]; and kv up to ``limit``.

        The scan goes over the positions from ``folded`` on; at position t the key at t - E enters it.
        """
        time, held, excluded = q.shape[1], self._held(state), self._excluded
        count = held + time

        def columns(ring: Tensor, new: Tensor, behind: int, first: Tensor, count: int) -> Tensor:
            """[B, count, ...] from position ``first - behind`` on, zeros before index 0."""
            if fresh:
                return pad(new, (0, 0, 0, 0, behind, count - behind - time)) if count > time else new
            first = first - behind
            found = unroll(ring, new, state.seen, first)[:, :count]
            before = first[:, None] + torch.arange(count, device=new.device) < 0
            return found.masked_fill(before[:, :, None, None], 0.0) if behind else found

        def entering(ring: Tensor, new: Tensor, name: str) -> Tensor:
            """[B, count, ...] keys or values, convolved, as they enter the sums: E positions late."""
            tail = self._tail(name)
            behind = tail + excluded
            found = columns(ring, new, behind, state.folded, behind + count)
            return self._convolve(found[:, : tail + count], name)

        tail = self._tail("q")
        q = self._convolve(columns(state.tail_q, q, tail, state.seen, tail + time), "q")
        phi_q = at_columns(self._map_q(q), held, state.seen, state.folded) if held else self._map_q(q)
        phi_k = self.map_k(entering(state.tail_k, k, "k"))
        v = entering(state.v, x.v, "v")
        decay = columns(state.log_decay, log_decay, excluded, state.folded, excluded + count)
        if excluded:
            position = state.folded[:, None] - excluded + torch.arange(count, device=k.device)
            phi_k = phi_k.masked_fill((position < 0)[:, :, None, None], 0.0)
            phi_k = phi_k * torch.exp(self._per_state_head(_windowed_sum(decay[:, 1:], excluded)))
            decay = decay[:, excluded:]
        v = v.to(accumulator(v))
        if self.config.window is not None:
            v = pad(v, (0, 1), value=1.0)
        y, kv = (gated_decode if count == 1 else gated_attention)(
            phi_q,
            phi_k,
            v,
            decay,
            eps=self.config.eps if self.config.normalize and self.config.window is None else None,
            state=None if fresh else state.kv,
            stop=limit - state.folded if held or x.lengths is not None else None,
        )
        return new_columns(y, time, state.seen, state.folded), kv

    def _join(self, x: MixerInput, sums: Tensor, state: LawcatState | None) -> Tensor:
        terms: dict[str, Any] = {"scale": x.scale, "window": self.config.window, "softcap": x.softcap}
        factor = self.window_logit.sigmoid()
        if x.without == "linear":
            sums = torch.zeros_like(sums)
        elif x.without == "window":
            factor = torch.zeros_like(factor)
        if state is None:
            return joined_attention(x.q, x.k, x.v, sums, factor, **terms)
        return attend_through(
            (state.k, state.v),
            x.q,
            x.k,
            x.v,
            sums,
            seen=state.seen,
            first=(state.folded - self.config.window).clamp_min(0),
            attend=lambda *args: joined_attention(*args, factor=factor, **terms),
            decode=lambda *args, **places: joined_decode(*args, factor=factor, **places, **terms),
        )

    def _convolve(self, x: Tensor, name: str) -> Tensor:
        """[B, n - c + 1, heads, D] from inputs x [B, n, H or G, D]; x itself where it is not convolved."""
        if name not in self._convolved:
            return x
        taps = getattr(self, "taps_k" if self.config.conv_tied and name == "q" else f"taps_{name}")
        dtype = accumulator(x)
        taps = taps.to(dtype).unflatten(0, (x.shape[2], -1))  # [G, heads / G, K, c]
        older = self._tail(name)
        x, length = x.to(dtype)[:, :, :, None], x.shape[1] - older
        parts = (taps[..., i] * x[:, older - i :][:, :length] for i in range(older + 1))
        return sum(parts, start=torch.zeros((), dtype=dtype, device=x.device)).flatten(2, 3)

    def _map_q(self, q: Tensor) -> Tensor:
        if not self.config.tie_qk_map:
            return self.map_q(q)
        if self.state_heads == q.shape[2]:
            return self.map_k(q)
        rows = q.unflatten(2, (self.state_heads, -1)).transpose(2, 3)  # [B, T, R, G, K]
        return self.map_k(rows.flatten(1, 2)).unflatten(1, rows.shape[1:3]).transpose(2, 3).flatten(2, 3)

    def _logits(self, x: MixerInput) -> Tensor:
        """Of the gate, [B, T, G, F]."""
        logits, dtype = x.hidden, accumulator(x.hidden)
        if self.gate_down is not None:
            logits = linear(logits.to(dtype), self.gate_down.weight.to(dtype))
        logits = linear(logits.to(dtype), self.gate_up.weight.to(dtype), self.gate_up.bias.to(dtype))
        return logits.unflatten(-1, (self.geometry.kv_heads, -1))

    def _log_decay(self, x: MixerInput) -> Tensor:
        """log a [B, T, G, F], at most 0."""
        bound = self.config.clamp_log_decay
        log_decay = logsigmoid(self._logits(x)) / self.config.gate_normalizer
        return log_decay if bound is None else log_decay.clamp_min(bound)

    def _per_state_head(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.state_heads // x.shape[2], dim=2)

    # The state.

    def _tail(self, name: str) -> int:
        """Older inputs that the convolution of q, k or v reads."""
        return self.config.conv_size - 1 if name in self._convolved else 0

    @property
    def _excluded(self) -> int:
        return self.config.window if self.config.window_exclude else 0

    def _sizes(self, pending: int) -> dict[str, int]:
        """Tokens in each ring."""
        window = self.config.window or 0
        return {
            "tail_q": self._tail("q") + pending if "q" in self._convolved else 0,
            "tail_k": self._tail("k") + self._excluded + pending,
            "k": window + pending if window else 0,
            "v": max(window, self._tail("v") + self._excluded) + pending,
            "log_decay": self._excluded + pending,
        }

    def _held(self, state: LawcatState) -> int:
        """Tokens that the rings may hold and kv does not."""
        return state.log_decay.shape[1] - self._excluded

    def _start(self, x: MixerInput) -> LawcatState:
        shape, rows, sizes = self.geometry, len(x.k), self._sizes(x.pending)
        exact: dict[str, Any] = {"dtype": accumulator(x.v), "device": x.v.device}
        zero = torch.zeros(rows, dtype=torch.long, device=x.k.device)
        width = shape.value_dim + self.config.normalize
        return LawcatState(
            x.q.new_zeros(rows, sizes["tail_q"], shape.heads, shape.key_dim),
            x.k.new_zeros(rows, sizes["tail_k"], shape.kv_heads, shape.key_dim),
            x.k.new_zeros(rows, sizes["k"], shape.kv_heads, shape.key_dim),
            x.v.new_zeros(rows, sizes["v"], shape.kv_heads, shape.value_dim),
            torch.zeros(rows, sizes["log_decay"], shape.kv_heads, self.feature_dim, **exact),
            torch.zeros(rows, self.state_heads, self.feature_dim, width, **exact),
            zero,
            zero,
        )

    def _grow(self, state: LawcatState, pending: int) -> LawcatState:
        sizes = self._sizes(pending).items()
        return state._replace(**{name: resize(getattr(state, name), state.seen, n) for name, n in sizes})


def _windowed_sum(x: Tensor, size: int) -> Tensor:
    """[B, n - size + 1, heads, D], sums over ``size`` neighbours in x [B, n, heads, D]; no long sum is ever formed."""
    flat = x.flatten(2).transpose(1, 2)
    return (size * avg_pool1d(flat, size, stride=1)).transpose(1, 2).unflatten(2, x.shape[2:])


LAWCAT = Method(
    "lawcat",
    LawcatConfig,
    LawcatMixer,
    "normalised linear attention with learned gates, after a short convolution",
)
