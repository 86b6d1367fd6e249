"""The contract of a method: its configuration, what its mixer is given, what it returns.

Shape legend, used in the whole package:

    B batch   T time   H query heads   G key/value heads (H = R * G, query head h reads kv head h // R)
    K key dim per head   V value dim per head   F feature dim   W window   M hidden width
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .errors import ConversionError


@dataclass(frozen=True)
class Geometry:
    """Widths of one attention layer, read from a probe run and stored in the checkpoint."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    hidden: int


@dataclass(frozen=True)
class MethodConfig:
    """Base of every method's configuration: a frozen dataclass of plain scalars."""

    name: ClassVar[str]
    recommended: ClassVar[Mapping[str, Any]] = {}
    """Recipe keys (dotted) and the values this method trains best with; a user's own values win."""
    adjustable: ClassVar[frozenset[str]] = frozenset()
    """Fields that no weight depends on, so that they may be set anew on a trained student."""

    @property
    def wants_unrotated(self) -> bool:
        """Whether these fields make a mixer read ``q_plain`` and ``k_plain``, where its class does not by itself."""
        return False

    def check(self, geometry: Geometry | None = None) -> None:
        """Raise :class:`ConversionError` for values that no layer (or no layer of this geometry) can have."""


class MixerInput(NamedTuple):
    """What a mixer reads. Every row starts at its first real token; padding, if any, is on the right."""

    hidden: Tensor
    """[B, T, M], the layer's normed input."""
    q: Tensor
    """[B, T, H, K], after the model's own q norm and rotary embedding."""
    k: Tensor
    """[B, T, G, K], likewise."""
    v: Tensor
    """[B, T, G, V]."""
    scale: float
    """Factor on q.k, the model's own."""
    softcap: float | None = None
    """The model's cap on scores, ``softcap * tanh(score / softcap)``."""
    q_plain: Tensor | None = None
    """[B, T, H, K] before the rotary embedding, for mixers with ``wants_unrotated``."""
    k_plain: Tensor | None = None
    """[B, T, G, K] likewise."""
    lengths: Tensor | None = None
    """[B] number of real tokens of each row; None when all T are real."""
    use_cache: bool = False
    """Whether the caller keeps the returned state; without it a mixer may return None for the state."""
    pending: int = 0
    """Newest tokens that a state must be able to forget again by lowering its ``seen`` counter."""
    in_place: bool = False
    """Whether the state may be overwritten: a decode step of one real token a row, whose state keeps its tensors and
    their sizes and which never waits for the device. Where a mixer returns other tensors, the caller copies them."""
    transfer: bool = False
    """Stage 1, on the teacher's own inputs: a mixer with a loss of its own returns a :class:`Fit` in place of y."""
    teacher: Tensor | None = None
    """[B, T, H, V], in stage 1 the output of the layer's softmax: a mixer may form its error against it, a
    :class:`Fit`, where that is faster than handing y out."""
    without: str | None = None
    """The branch that an ablation leaves out, ``linear`` or ``window``: what stays is normalised as the whole was, and
    a token for which nothing stays gets 0. Only where ``Mixer.why_not_without`` says nothing against it."""


class Fit(NamedTuple):
    """A mixer's own transfer loss: another than matching its layer's output, or that one already formed."""

    error: Tensor
    """Scalar, a mean over the real tokens."""
    power: Tensor
    """Scalar without gradient, what ``error`` is divided by to compare layers."""


class Mixer(nn.Module):
    """The replacement of softmax attention in one layer; subclasses define ``__init__`` and ``forward``.

    ``forward(x, state=None) -> (y [B, T, H, V], state)``: T == 1 with a state is a decode step, T > 1 from None a
    prefill, T > 1 from a state a chunk. All three are the same function of the tokens seen. The state is a NamedTuple
    of tensors with the batch on the first axis and a field ``seen`` [B] (real tokens so far); its size does not depend
    on T, unless ``growth`` says so. Where ``x.transfer`` is set, y may be a :class:`Fit` instead. ``forward`` is the
    only entry point: sharded training, offloading and adapters hook nothing else.
    """

    wants_unrotated: bool = False
    """Whether the mixer reads ``q_plain`` and ``k_plain``; layers that cannot provide them are refused."""

    def __init__(self, config: Any, geometry: Geometry):
        super().__init__()
        config.check(geometry)
        self.config = config
        self.geometry = geometry

    def reset_parameters(self) -> None:
        """Set every parameter to its initial value, in place."""

    def growth(self, itemsize: int) -> float:
        """Bytes that each further token adds to a row's state, on average; 0 where the state is bounded. ``itemsize``
        is that of the model's dtype."""
        return 0.0

    def why_not_in_place(self) -> str | None:
        """Why no step of this mixer can be one of ``MixerInput.in_place``, in words; None where all can."""
        return None

    def why_not_without(self, branch: str) -> str | None:
        """Why an ablation cannot leave out the ``linear`` branch or the ``window``, in words; None where it can."""
        return f"{self.config.name} has no {branch} branch that can be switched off"

    def with_room(self, state: Any) -> Any:
        """The state as steps in place want it: the same tokens, with the room to put off what is costly."""
        return state

    def forward(self, x: MixerInput, state: Any = None) -> tuple[Tensor | Fit, Any]:
        raise NotImplementedError


class Method(NamedTuple):
    """One row of the registry."""

    name: str
    config: type[MethodConfig]
    mixer: "type[Mixer] | None"
    summary: str
    """One line for tables; ``mixer`` is None for a method that leaves its layers as they are."""


class Rows(NamedTuple):
    """Takes padding and packing away: real tokens of a padded [B, T] batch (or the documents of a packed one) as rows
    that start at index 0."""

    index: Tensor
    """[R, L] flat index into B * T of each row's tokens; padding repeats the last one."""
    lengths: Tensor
    """[R] real tokens of each row."""
    inverse: Tensor
    """[B, T] flat index into R * L, or R * L for padding."""

    def gather(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [R, L, ...]."""
        return x.flatten(0, 1)[self.index]

    def scatter(self, y: Tensor) -> Tensor:
        """[R, L, ...] -> [B, T, ...], zeros at padding."""
        flat = y.flatten(0, 1)
        return torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])[self.inverse]


def rows_of(valid: Tensor | None, documents: Tensor | None = None) -> Rows | None:
    """The layout of a batch, or None when it is already one full row per sequence.

    valid [B, T] bool (True: a real token); documents [B, T] int, changing where a packed document begins. Padding keeps
    one row a sequence, in order, even when it is empty; a packed batch has one row a document.
    """
    if valid is None and documents is None:
        return None
    shape = valid if valid is not None else documents
    assert shape is not None
    batch, time = shape.shape
    device = shape.device
    if valid is None:
        valid = torch.ones(batch, time, dtype=torch.bool, device=device)
    sequence = torch.arange(batch, device=device)[:, None].expand(batch, time)
    if documents is None:
        if bool(valid.all()):
            return None
        row = sequence
        count = batch
    else:
        starts = torch.ones(batch, time, dtype=torch.bool, device=device)
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        row = starts.flatten().cumsum(0).sub(1).view(batch, time)
        count = int(row[-1, -1]) + 1
        if count == batch and bool(valid.all()):
            return None
    lengths = torch.zeros(count, dtype=torch.long, device=device).index_add_(
        0, row[valid], valid[valid].long()
    )
    longest = max(int(lengths.max()), 1)
    first = lengths.cumsum(0) - lengths
    source = (
        valid.flatten().nonzero().squeeze(1)
    )  # flat positions of real tokens; rows are contiguous in this order
    column = torch.arange(longest, device=device).minimum((lengths - 1).clamp_min(0)[:, None])
    index = (first[:, None] + column).clamp_max(max(len(source) - 1, 0))
    index = source[index] if len(source) else index.new_zeros(index.shape)
    inverse = torch.full((batch * time,), count * longest, device=device)
    rank = torch.arange(len(source), device=device) - first[row[valid]]
    inverse[source] = row[valid] * longest + rank
    return Rows(index, lengths, inverse.view(batch, time))


def check_window(window: int | None, kind: str, place: str) -> None:
    """Raise :class:`ConversionError` for an impossible window or kind."""
    if window is not None and window < 1:
        raise ConversionError(
            f"{place}.window: {window} is impossible; give at least 1, or null for no window"
        )
    if kind not in ("sliding", "terraced"):
        raise ConversionError(f"{place}.window_kind: {kind!r} is unknown; choose from sliding, terraced")
