"""The controls: sliding-window softmax, and softmax left as it is.

``window`` forgets everything older than its window but the first ``sinks`` tokens (attention sinks: Xiao et al., arXiv
2309.17453; positions are the true ones here, not re-numbered). What a linear branch adds is what it beats this by.
``softmax`` is the identity: its layers are not converted.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from .errors import ConversionError
from .mixer import Geometry, Method, MethodConfig, Mixer, MixerInput, check_window
from .ops import window_attention, window_decode, window_step
from .ring import counted, final, resize, span, take, unroll, write

PIECE = 128
"""Tokens of a chunk that meet the slots at once; bounds the score matrix of a long chunk."""


@dataclass(frozen=True)
class WindowConfig(MethodConfig):
    """Fields of a sliding-window layer."""

    name: ClassVar[str] = "window"
    recommended: ClassVar[dict[str, Any]] = {"transfer.tokens": 0}

    window: int = 64
    """W, visible tokens, the query's own included."""
    window_kind: Literal["sliding", "terraced"] = "sliding"
    """``sliding`` or ``terraced``, as in LoLCATs."""
    sinks: int = 0
    """First tokens that stay visible for ever."""

    def check(self, geometry: Geometry | None = None) -> None:
        check_window(self.window, self.window_kind, "method")
        if self.sinks < 0:
            raise ConversionError(f"method.sinks: {self.sinks} is impossible; give 0 or more")


class WindowState(NamedTuple):
    """The newest tokens and the first ones."""

    k: Tensor
    """[B, n, G, K]."""
    v: Tensor
    """[B, n, G, V]."""
    sink_k: Tensor
    """[B, sinks, G, K]."""
    sink_v: Tensor
    """[B, sinks, G, V]."""
    seen: Tensor
    """[B] tokens seen."""
    folded: Tensor
    """[B] oldest tokens that are no longer in k, v."""


class WindowMixer(Mixer):
    """One sliding-window layer; it has no parameters."""

    def why_not_without(self, branch: str) -> str | None:
        return "window has no linear branch" if branch == "linear" else "the window is all there is"

    def forward(self, x: MixerInput, state: WindowState | None = None) -> tuple[Tensor, WindowState | None]:
        config = self.config
        y = self._step_in_place(x, state) if x.in_place else None
        if y is not None:
            return y, state
        fresh = state is None
        if state is None:
            terms = dict(window=config.window, window_kind=config.window_kind, sinks=config.sinks)
            y = window_attention(x.q, x.k, x.v, scale=x.scale, softcap=x.softcap, **terms)
            if not x.use_cache:
                return y, None
            state = self._start(x)
        size = span(config.window, config.window_kind) + x.pending
        state = state._replace(k=resize(state.k, state.seen, size), v=resize(state.v, state.seen, size))
        total, limit = counted(
            state, x, fresh, lambda seen: final(seen, config.window, config.window_kind, x.pending)
        )
        sinks = (
            self._first(state.sink_k, x.k, state.seen, total),
            self._first(state.sink_v, x.v, state.seen, total),
        )
        if y is None:
            y = self._continue(x, state, sinks, total)
        whole = fresh and x.lengths is None
        k, v = (write(old, new, state.seen, total, whole) for old, new in ((state.k, x.k), (state.v, x.v)))
        return y, WindowState(k, v, *sinks, total, limit)

    def _step_in_place(self, x: MixerInput, state: Any) -> Tensor | None:
        """y by one kernel that also writes the state; None where no kernel takes it."""
        config = self.config
        return window_step(
            x.q,
            x.k,
            x.v,
            state.k,
            state.v,
            state.seen,
            state.folded,
            scale=x.scale,
            window=config.window,
            window_kind=config.window_kind,
            softcap=x.softcap,
            sinks=(state.sink_k, state.sink_v) if config.sinks else None,
        )

    def _continue(
        self, x: MixerInput, state: WindowState, sinks: tuple[Tensor, Tensor], total: Tensor
    ) -> Tensor:
        """A chunk or a step: every piece of the queries meets the sinks and the slots that its window can reach."""
        config, size = self.config, state.k.shape[1]
        # Column c is position seen - size + c in every row, so the window of query i begins at column i or later.
        start = state.seen - size
        k, v = (unroll(old, new, state.seen, start) for old, new in ((state.k, x.k), (state.v, x.v)))
        position = start[:, None] + torch.arange(k.shape[1], device=k.device)
        position = position.masked_fill(position < state.folded[:, None].clamp_min(config.sinks), -1)
        first = torch.arange(config.sinks, device=k.device).expand(len(k), -1)
        first = first.masked_fill(first >= total[:, None], -1)
        outputs = []
        for begin in range(0, x.q.shape[1], PIECE):
            end = min(begin + PIECE, x.q.shape[1])
            near = slice(begin, size + end)
            outputs.append(
                window_decode(
                    x.q[:, begin:end],
                    torch.cat([sinks[0], k[:, near]], 1),
                    torch.cat([sinks[1], v[:, near]], 1),
                    key_positions=torch.cat([first, position[:, near]], 1),
                    query_positions=state.seen[:, None] + torch.arange(begin, end, device=k.device),
                    scale=x.scale,
                    softcap=x.softcap,
                    window=config.window,
                    window_kind=config.window_kind,
                    sinks=config.sinks,
                )
            )
        return torch.cat(outputs, 1)

    def _first(self, sink: Tensor, new: Tensor, seen: Tensor, total: Tensor) -> Tensor:
        """The first tokens of the row, filled as they come."""
        if not self.config.sinks:
            return sink
        index = torch.arange(self.config.sinks, device=new.device) - seen[:, None]
        fresh = (index >= 0) & (index < (total - seen)[:, None])
        return torch.where(fresh[..., None, None], take(new, index.clamp(0, new.shape[1] - 1)), sink)

    def _start(self, x: MixerInput) -> WindowState:
        size = span(self.config.window, self.config.window_kind) + x.pending
        zero = torch.zeros(len(x.k), dtype=torch.long, device=x.k.device)
        k, v = (t.new_zeros(len(t), size, *t.shape[2:]) for t in (x.k, x.v))
        sink_k, sink_v = (t.new_zeros(len(t), self.config.sinks, *t.shape[2:]) for t in (x.k, x.v))
        return WindowState(k, v, sink_k, sink_v, zero, zero)


@dataclass(frozen=True)
class SoftmaxConfig(MethodConfig):
    """The teacher's own attention; a layer with this method is left as it is."""

    name: ClassVar[str] = "softmax"
    recommended: ClassVar[dict[str, Any]] = {"transfer.tokens": 0, "finetune.tokens": 0}


WINDOW = Method("window", WindowConfig, WindowMixer, "softmax on a sliding window only; a control")
SOFTMAX = Method("softmax", SoftmaxConfig, None, "the teacher's own attention, left as it is")
