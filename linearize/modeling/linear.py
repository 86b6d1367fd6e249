"""Linear attention alone: a learned feature map in place of the exponential, every key in one sum; a control.

Katharopoulos et al., Transformers are RNNs, arXiv 2006.16236. With q and k as the model rotates them,

    y_i = sum_{j <= i} (phi_q(q_i).phi_k(k_j)) v_j / [the same with v_j = 1]
        = phi_q(q_i)^T S_i / phi_q(q_i)^T z_i,    S_i = sum_{j <= i} phi_k(k_j) v_j^T,    z_i = sum_{j <= i} phi_k(k_j)

What a window adds is what LoLCATs, which share maps and sums with it (``window: null`` there is this function), beat it
by. Departures: the default map is Hedgehog's, learned for each head (arXiv 2402.04347), where the paper's is
``elu``; 1e-12 is added to the denominator.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from .errors import ConversionError
from .feature_maps import FEATURE_MAPS, FeatureMap, check_map, width_of
from .mixer import Fit, Geometry, Method, MethodConfig, Mixer, MixerInput
from .ops import fold, joint_decode, joint_step, mapped_attention, mapped_error
from .ring import counted, final, resize, span, take, unroll, write

FOLD_EVERY = 16
"""Tokens outside the window that steps in place collect before they sum them: meanwhile the sums, most of what a step
reads, are not written. 16 is the narrowest operand of a matrix instruction, and each costs its map at every step."""


@dataclass(frozen=True)
class LinearConfig(MethodConfig):
    """Fields of a linear attention layer."""

    name: ClassVar[str] = "linear"
    recommended: ClassVar[dict[str, Any]] = {"transfer.learning_rate": 1e-2, "finetune.learning_rate": 1e-4}

    feature_map: str = "hedgehog"
    """One of ``feature_maps.py``: hedgehog, hedgehog_half, t2r, elu, exp, np_map or np_map_plain."""
    feature_dim: int | None = None
    """F, the width of phi, both halves of a two-sided map together; None is the key dim."""
    feature_init: Literal["identity", "kaiming"] = "identity"
    """``identity`` or ``kaiming``."""
    tie_qk_map: bool = False
    """One map for queries and keys."""
    kv_tied_map: bool = False
    """One key map per key/value head instead of per query head: an R times smaller state, and another model."""

    def check(self, geometry: Geometry | None = None) -> None:
        check_map(self.feature_map, self.feature_dim, self.feature_init, geometry and geometry.key_dim)
        grouped = geometry is not None and geometry.heads != geometry.kv_heads
        if self.tie_qk_map and self.kv_tied_map and grouped:
            raise ConversionError(
                "method.tie_qk_map: a map shared by queries and keys cannot also be shared by the heads of a group; "
                "drop one of tie_qk_map, kv_tied_map"
            )


class LinearState(NamedTuple):
    """Bounded memory of a row: a sum over its tokens; k, v hold droppable ones while a cache records its past."""

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


class LinearMixer(Mixer):
    """Maps and sums, with a ring of the tokens that are not summed yet.

    Parameters: ``map_q``, ``map_k`` (absent when tied to ``map_q``). A subclass with a ``window`` holds it in the ring
    too; its state has the fields of :class:`LinearState` among others.
    """

    window: int | None = None
    window_kind: Literal["sliding", "terraced"] = "sliding"

    def __init__(self, config: LinearConfig, geometry: Geometry):
        super().__init__(config, geometry)
        make, width = FEATURE_MAPS[config.feature_map], width_of(config.feature_dim, geometry.key_dim)
        self.feature_dim = width
        self.state_heads = geometry.kv_heads if config.kv_tied_map else geometry.heads
        self.map_q = make(geometry.heads, geometry.key_dim, width, config.feature_init)
        if not config.tie_qk_map:
            self.map_k = make(self.state_heads, geometry.key_dim, width, config.feature_init)

    def reset_parameters(self) -> None:
        self.map_q.reset_parameters()
        if not self.config.tie_qk_map:
            self.map_k.reset_parameters()

    def why_not_without(self, branch: str) -> str | None:
        return "linear attention is all there is"

    def forward(self, x: MixerInput, state: Any = None) -> tuple[Tensor | Fit, Any]:
        if x.teacher is not None and self._is_plain:
            maps = (self.map_q, self._key_map)
            terms: dict[str, Any] = dict(teacher=x.teacher, lengths=x.lengths, **self._terms(x))
            return mapped_error(x.q, x.k, x.v, *maps, *self._factors(x), **terms), None
        if state is None and not x.use_cache:
            return self._many(x, x.q, x.k, x.v)
        if x.in_place:
            y = self._step_in_place(x, state)
            if y is not None:
                return y, state
        started = self._start(x) if state is None else self._grow(state, x.pending)
        fresh = state is None
        total, limit = counted(
            started, x, fresh, lambda seen: final(seen, self.window, self.window_kind, x.pending)
        )
        if state is None:
            y, older = self._many(x, x.q, x.k, x.v, started, limit, empty=True)
        elif x.q.shape[1] == 1 and x.lengths is None:
            y, older = self._step(x, started, limit)
        else:
            y, older = self._chunk(x, started, limit)
        whole = fresh and x.lengths is None
        pairs = ((started.k, x.k), (started.v, x.v))
        k, v = (write(old, new, started.seen, total, whole) for old, new in pairs)
        return y, older._replace(k=k, v=v, seen=total, folded=limit)

    def _many(
        self,
        x: MixerInput,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: Any = None,
        limit: Tensor | None = None,
        empty: bool = False,
    ) -> tuple[Tensor, Any]:
        """y of columns from position ``state.folded`` on, and the state with those before ``limit`` summed; ``empty``
        says that nothing was."""
        y, sums = mapped_attention(
            q,
            k,
            v,
            self.map_q,
            self._key_map,
            *self._factors(x),
            state=None if state is None or empty else (state.kv, state.z),
            stop=None if limit is None or state is None else limit - state.folded,
            pending=x.pending,
            **self._terms(x),
        )
        return y, state if sums is None or state is None else state._replace(kv=sums[0], z=sums[1])

    def _chunk(self, x: MixerInput, state: Any, limit: Tensor) -> tuple[Tensor, Any]:
        """Several tokens: columns ``folded, ...`` stand on the window's grid, as the parallel form needs."""
        k, v = self._columns(x, state)
        no_query = x.q.new_zeros(len(x.q), state.k.shape[1], *x.q.shape[2:])
        y, older = self._many(x, unroll(no_query, x.q, state.seen, state.folded), k, v, state, limit)
        column = (state.seen - state.folded)[:, None] + torch.arange(x.q.shape[1], device=k.device)
        return take(y, column), older

    def _step(self, x: MixerInput, state: Any, limit: Tensor) -> tuple[Tensor, Any]:
        """One token a row: sum what leaves the window, then meet the slots that are left and the state."""
        k, v = self._columns(x, state)
        leaving = self._leaving if x.in_place else int((limit - state.folded).max())
        if leaving:
            state = self._fold(state, self._map_k(k[:, :leaving]), v[:, :leaving], limit)
        outside = k.shape[1] - 1 > span(self.window, self.window_kind)
        y = joint_decode(
            x.q,
            k,
            v,
            self.map_q(x.q),
            self._map_k(k) if outside else None,
            *self._factors(x),
            **self._positions(k, state, limit),
            state=(state.kv, state.z),
            **self._terms(x),
        )
        return y, state

    def _step_in_place(self, x: MixerInput, state: Any) -> Tensor | None:
        """y by one kernel that also writes the state; None where no kernel takes it."""
        config, map_k = self.config, self.map_q if self.config.tie_qk_map else self.map_k
        extra = {"np_map": "reflect", "t2r": "bias"}.get(config.feature_map)
        return joint_step(
            x.q,
            x.k,
            x.v,
            state.k,
            state.v,
            state.seen,
            state.folded,
            scale=x.scale,
            window=self.window,
            window_kind=self.window_kind,
            softcap=x.softcap,
            sums=(state.kv, state.z),
            maps=(self.map_q.weight, map_k.weight),
            extras=None if extra is None else (getattr(self.map_q, extra), getattr(map_k, extra)),
            feature_map=config.feature_map,
            fold_every=FOLD_EVERY,
            **self._logit(),
        )

    def _logit(self) -> dict[str, Any]:
        """What :meth:`_factors` are made of, for the kernel that makes them itself."""
        return {}

    @property
    def _leaving(self) -> int:
        """Most tokens that one step in place sums."""
        return self.window if self.window is not None and self.window_kind == "terraced" else FOLD_EVERY

    def with_room(self, state: Any) -> Any:
        return self._grow(state, FOLD_EVERY)

    def _columns(self, x: MixerInput, state: Any) -> list[Tensor]:
        """k and v from position ``state.folded`` on."""
        pairs = ((state.k, x.k), (state.v, x.v))
        return [unroll(old, new, state.seen, state.folded) for old, new in pairs]

    def _positions(self, k: Tensor, state: Any, limit: Tensor) -> dict[str, Tensor]:
        """Positions of the columns that are still slots, and of the one query."""
        position = state.folded[:, None] + torch.arange(k.shape[1], device=k.device)
        # Columns after the new token repeat it wherever the ring is not full.
        empty = (position < limit[:, None]) | (position > state.seen[:, None])
        return dict(key_positions=position.masked_fill(empty, -1), query_positions=state.seen[:, None])

    def _fold(self, state: Any, phi_k: Tensor, v: Tensor, limit: Tensor) -> Any:
        """The state with columns ``folded .. limit - 1`` summed; column 0 of phi_k and v is position ``folded``."""
        keep = torch.arange(v.shape[1], device=v.device) < (limit - state.folded)[:, None]
        kv, z = fold(state.kv, state.z, phi_k, v, keep)
        return state._replace(kv=kv, z=z)

    @property
    def _is_plain(self) -> bool:
        """Whether y is nothing but ``mapped_attention``."""
        return True

    @property
    def _key_map(self) -> FeatureMap:
        return self.map_q if self.config.tie_qk_map else self.map_k

    def _map_k(self, k: Tensor) -> Tensor:
        return self._key_map(k)

    def _factors(self, x: MixerInput) -> tuple[Tensor, Tensor | None]:
        """Weights [H] of window and sums; without a window neither applies."""
        return self.map_q.weight.new_ones(self.geometry.heads), None

    def _terms(self, x: MixerInput) -> dict[str, Any]:
        return dict(scale=x.scale, window=self.window, window_kind=self.window_kind, softcap=x.softcap)

    def _start(self, x: MixerInput) -> Any:
        shape, rows = self.geometry, len(x.k)
        size = span(self.window, self.window_kind) + x.pending
        exact = torch.promote_types(x.v.dtype, torch.float32)
        zero = torch.zeros(rows, dtype=torch.long, device=x.k.device)
        return LinearState(
            x.k.new_zeros(rows, size, shape.kv_heads, shape.key_dim),
            x.v.new_zeros(rows, size, shape.kv_heads, shape.value_dim),
            x.v.new_zeros(rows, self.state_heads, self.feature_dim, shape.value_dim, dtype=exact),
            x.v.new_zeros(rows, self.state_heads, self.feature_dim, dtype=exact),
            zero,
            zero,
        )

    def _grow(self, state: Any, pending: int) -> Any:
        size = span(self.window, self.window_kind) + pending
        return state._replace(k=resize(state.k, state.seen, size), v=resize(state.v, state.seen, size))


LINEAR = Method("linear", LinearConfig, LinearMixer, "learned linear attention and no window; a control")
