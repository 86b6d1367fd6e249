"""One layer of transformers' cache that holds a mixer's state; the same class serves every method."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .backend import interpreted, refusal
from .errors import LinearizeError

CACHE = next(
    f.name for f in dataclasses.fields(CausalLMOutputWithPast) if f.name in ("cache", "past_key_values")
)
"""What a cache is called in the arguments and outputs of models: ``past_key_values``, and ``cache`` since
transformers 5.24."""
ROLLBACK = 128
"""Newest tokens that stay droppable while a cache records its past (assisted decoding)."""


class StateLayer(CacheLayerMixin):
    """A cache layer that grows only where its mixer says so: it stores what ``Mixer.forward`` returned.

    ``template`` is the layer it replaces. The masks of *other* layers are sized by asking the first layer of their
    kind, which may be this one, so sizes are answered as the template would.
    """

    is_croppable = True
    is_compileable = False
    supports_early_init = False
    is_linearize_state = True

    def __init__(self, template: Any):
        super().__init__()
        self.template = template
        self.is_sliding = getattr(template, "is_sliding", False)
        self.state: Any = None
        self.record_past = False
        self._seen = 0
        self._recent: Tensor | None = None  # [B, n] validity of the newest columns, while recording
        self._owned = False  # whether the state's tensors are this layer's alone, to be written in place
        self.clock: Tensor | None = None  # columns so far on the device, of a layer that counts them there

    @property
    def pending(self) -> int:
        """Newest tokens the mixer must keep out of its folded state."""
        return ROLLBACK if self.record_past else 0

    @property
    def in_place(self) -> bool:
        """Whether decode steps write into the state's tensors, which then stay where they are.

        So it is on a GPU after the first tokens: in a static cache always, in others where kernels run, because plain
        torch is faster when it may return a new state.
        """
        if self.record_past or self.state is None or not (self.state.seen.is_cuda or interpreted()):
            return False
        static = isinstance(getattr(self.template, "cumulative_length", None), Tensor)
        return static or refusal(*(t for t in self.state if t.is_floating_point())) is None

    def own(self, with_room: Callable[[Any], Any]) -> None:
        """Have a state made by ``with_room`` in tensors of this layer alone; nothing to do once it does."""
        frozen = self.state.seen.is_inference() and not torch.is_inference_mode_enabled()
        if frozen or not self._owned:  # tensors of inference mode can be written nowhere else
            state = with_room(self.state)
            self.state = type(state)(*(t.clone(memory_format=torch.contiguous_format) for t in state))
            self._owned = True

    def __copy__(self) -> "StateLayer":
        """A layer with the same state, which from now on belongs to neither: each takes its own before it writes."""
        self._owned = False
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def advance(self) -> None:
        """Count the column of a step that ran without this code, as the replay of a graph does."""
        self._seen += 1

    def store(self, state: Any, time: int, valid: Tensor | None, in_place: bool = False) -> None:
        """Keep the state after ``time`` more columns, of which ``valid`` [B, T] (None: all) were real tokens.

        ``in_place`` keeps the tensors and takes over what they hold.
        """
        if in_place:
            for held, new in zip(self.state, state, strict=True):
                if new is not held:
                    held.copy_(new)
        else:
            self.state, self._owned = state, False
        self._seen += time
        self.is_initialized = True
        if self.record_past:
            new = torch.ones(len(state.seen), time, dtype=torch.bool, device=state.seen.device)
            new = new if valid is None else valid.to(new.device)
            old = self._recent if self._recent is not None else new[:, :0]
            self._recent = torch.cat([old, new], 1)[:, -ROLLBACK:]
        else:
            self._recent = None  # what was recorded before is no longer the newest

    @property
    def state_bytes(self) -> int:
        """Bytes of the state's tensors; constant after the first token where the mixer's ``growth`` is 0."""
        return 0 if self.state is None else sum(t.numel() * t.element_size() for t in self.state)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate: the mixer makes its state."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Pass the new keys and values on; the attention function stores the state."""
        return key_states, value_states

    def get_seq_length(self) -> Any:
        counter = getattr(self.template, "cumulative_length", None)
        if isinstance(counter, Tensor) and not self.is_sliding:  # static caches count on the device
            return torch.full_like(counter, self._seen) if self.clock is None else self.clock
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        length = getattr(
            self.template, "max_cache_len", None
        )  # of a static layer: its window, where it has one
        if not self.is_sliding:
            return (self._seen + query_length if length is None else length), 0
        window = self.template.sliding_window if length is None else length
        offset = max(self._seen - window + 1, 0)
        if self._seen >= window:
            return window - 1 + query_length, offset
        return max(self._seen + query_length, length or 0), offset

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        """From now on keep the newest ``ROLLBACK`` tokens droppable."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens. ``abs(tokens_to_remove)`` columns leave; needs recording to have been active."""
        count = abs(
            int(tokens_to_remove)
        )  # assisted decoding passes a 0-d tensor, which must not alias the counter
        if count == 0:
            return
        if count > self._seen:
            raise LinearizeError(f"cache.crop: cannot drop {count} of {self._seen} tokens; drop fewer")
        recent = self._recent
        if recent is None or recent.shape[1] < count:
            raise LinearizeError(
                f"cache.crop: {count} tokens cannot be taken back from a folded state; call "
                f"activate_past_recording() before the forward and drop at most {ROLLBACK}"
            )
        dropped = recent[:, recent.shape[1] - count :].sum(1)
        self._recent = recent[:, : recent.shape[1] - count]
        self._seen -= count
        self.state = self.state._replace(seen=self.state.seen - dropped)

    def _map(self, function: Any) -> None:
        if self.state is not None:
            self.state = type(self.state)(*(function(t) for t in self.state))
        if self._recent is not None:
            self._recent = function(self._recent)

    def reset(self) -> None:
        self.state, self._recent, self._seen, self.is_initialized = None, None, 0, False
        self._owned = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices.to(t.device)])

    def forget(self) -> None:
        """Drop what the mixer remembers, and keep count of the columns: the next forward starts from nothing."""
        self.state, self._recent, self._owned = None, None, False

    def offload(self) -> None:
        """Nothing: a state is small, and ``Cache.update`` offloads a layer before its mixer has run."""

    def prefetch(self) -> None:
        """Nothing: the state never left."""


def cache_in(call: Mapping[str, Any]) -> Any:
    """The cache among an attention module's arguments, by what it is: families and versions name it differently."""
    return next((value for value in call.values() if isinstance(value, Cache)), None)


def cache_layer(cache: Any, index: int) -> Any:
    """The state layer of ``cache`` at ``index``, put in the place of an empty ordinary one on first use.

    A layer of another copy of this code is recognised by its protocol. Raises :class:`LinearizeError` when the cache
    already holds softmax keys there.
    """
    while len(cache.layers) <= index:  # caches made without a config grow by use
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if getattr(layer, "is_linearize_state", False):
        return layer
    if layer.is_initialized and int(layer.get_seq_length()) > 0:
        raise LinearizeError(
            f"{CACHE}: layer {index} holds softmax keys of {int(layer.get_seq_length())} tokens; "
            "start a new cache after switching the attention mode"
        )
    cache.layers[index] = StateLayer(layer)
    if getattr(layer, "record_past", False):
        cache.layers[index].activate_past_recording()
    return cache.layers[index]


def keys_layer(cache: Any, index: int) -> None:
    """Put the ordinary layer back where ``cache`` has an empty state layer at ``index``, for a softmax forward.

    Raises :class:`LinearizeError` when the cache already holds a state there.
    """
    if index >= len(cache.layers) or not getattr(cache.layers[index], "is_linearize_state", False):
        return
    layer = cache.layers[index]
    if int(layer.get_seq_length()) > 0:
        raise LinearizeError(
            f"{CACHE}: layer {index} holds a state of {int(layer.get_seq_length())} tokens, not softmax keys; "
            "start a new cache after switching the attention mode"
        )
    cache.layers[index] = layer.template
