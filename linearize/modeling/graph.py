"""One decode step of a whole model as a CUDA graph, for ``generate`` with a static cache.

A step is hundreds of small launches, and a GPU waits for the host between them; a graph replays all of them at once.
That needs a step that does the same whatever the values are: states that are written where they lie (``StateLayer``),
positions that are read on the device, inputs that are copied to fixed places. The first step of a text runs as always,
and so compiles kernels and gives states their places; the second is recorded, which computes nothing, and replayed,
as are all others. Prompts and whatever a graph cannot hold run as always.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .attention import MODE, Mode
from .cache import CACHE

STEP = Mode("linear", None, True)


def why_no_graph(model: Any, cache: Any) -> str | None:
    """Why no step of this model and cache can be a graph, in words, as far as is known before the first one."""
    reason = _why_not_there(model)
    if reason is not None:
        return reason
    layers = getattr(cache, "layers", ())
    if not layers or not all(hasattr(getattr(x, "template", x), "max_cache_len") for x in layers):
        return "the cache is not static"
    for index, mixer in model.mixers().items():
        reason = mixer.why_not_in_place()
        if reason is not None:
            return f"layer {index}: {reason}"
    converted = model.mixers()
    for index, layer in enumerate(layers):
        if index not in converted and layer.is_sliding:
            return f"layer {index} keeps softmax on a window of its own, whose cache is counted on the host"
    return None


def _why_not_there(model: Any) -> str | None:
    if model.device.type != "cuda":
        return f"the model is on {model.device.type}"
    several = len({parameter.device for parameter in model.parameters()}) > 1
    return "the model is on several devices" if several else None


class StepGraph:
    """Called as the model is: steps of one token are replayed from a graph, everything else runs as always."""

    def __init__(self, model: Any):
        self.model = model
        self.refused: str | None = None
        self._ready: Any = None  # the step that ran last as always: the next one like it is recorded
        self._recorded: Any = None
        self._places: dict[str, Tensor] = {}
        self._kept: Any = (
            None  # all that the graph reads from and nothing else keeps: it knows addresses alone
        )
        self._run: Callable[[], Any] | None = None
        self._states: list[Any] = []  # kept alive: steps are told apart by the identity of what they write

    def __call__(self, **inputs: Any) -> Any:
        if self.refused is not None or not _is_step(inputs):
            return self.model(**inputs)
        step = self._step_of(inputs)
        if self._run is None or step != self._recorded:
            self._run = self._kept = None
            if step != self._ready:
                outputs = self.model(**inputs)
                self._ready = self._step_of(inputs)
                return outputs
            if not self._record(inputs, step):
                return self.model(**inputs)
            assert self._run is not None
            return self._run()
        for name, place in self._places.items():
            place.copy_(inputs[name], non_blocking=True)
        for layer in _states(inputs[CACHE]):
            layer.advance()
        return self._run()

    def _step_of(self, inputs: dict[str, Any]) -> Any:
        """What a recorded step must have in common with another one to stand for it."""
        fixed = {}
        for name, value in inputs.items():
            if name == "attention_mask":  # grows, and says nothing that the first step did not know
                continue
            if isinstance(value, Tensor):
                value = (value.shape, value.dtype, value.device)
            fixed[name] = id(value) if name == CACHE else value
        layers = inputs[CACHE].layers
        states = [
            layer.state if hasattr(layer, "state") else getattr(layer, "keys", None) for layer in layers
        ]
        if [id(x) for x in states] != [id(x) for x in self._states]:
            self._states = states
            self._ready = None
        return tuple(sorted(fixed.items(), key=lambda item: item[0])), tuple(map(id, states))

    def _record(self, inputs: dict[str, Any], step: Any) -> bool:
        """Record the step; False, said once, where something in it cannot be."""
        cache, mask = inputs[CACHE], inputs.get("attention_mask")
        layers = _states(cache)
        if not all(layer.in_place for layer in layers):
            return self._refuse("a state is not written in place")
        if mask is not None and not bool(mask[:, -1].all()):
            return self._refuse("a row has no new token")
        self._places = {
            n: x.clone() for n, x in inputs.items() if isinstance(x, Tensor) and n != "attention_mask"
        }
        fixed = inputs | self._places | {"attention_mask": _whole_mask(cache, mask)}
        clock = _clock(cache, self._places["input_ids"])
        self._kept = fixed, clock
        counts = [layer._seen for layer in layers]
        try:
            for layer in layers:
                layer.clock = clock
            with MODE.hold(STEP):
                self._run = record(lambda: self.model(**fixed))
        except RuntimeError as error:
            self._run = self._kept = None
            for layer, count in zip(layers, counts, strict=True):
                layer._seen = count
            return self._refuse(str(error).strip().split("\n")[0])
        finally:
            for layer in layers:
                layer.clock = None
        self._recorded = step
        return True

    def _refuse(self, reason: str) -> bool:
        self.refused = reason
        warnings.warn(f"decoding without a CUDA graph, because {reason}", RuntimeWarning, stacklevel=4)
        return False


def record(function: Callable[[], Any]) -> Callable[[], Any]:
    """Record what ``function`` launches, which runs nothing; the result runs it and returns the same outputs.

    Tensors made before are known by their addresses: the caller keeps them alive as long as the result.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = function()

    def run() -> Any:
        graph.replay()
        return outputs

    return run


def _is_step(inputs: dict[str, Any]) -> bool:
    ids, cache = inputs.get("input_ids"), inputs.get(CACHE)
    wants_more = any(inputs.get(name) for name in ("output_attentions", "output_hidden_states", "labels"))
    mask = inputs.get("attention_mask")
    return (
        ids is not None
        and ids.shape[1] == 1
        and cache is not None
        and inputs.get("inputs_embeds") is None
        and isinstance(inputs.get("position_ids"), Tensor)  # else they are counted on the host
        and (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2))
        and not wants_more
        and not torch.is_grad_enabled()
    )


def _states(cache: Any) -> list[Any]:
    return [layer for layer in cache.layers if getattr(layer, "is_linearize_state", False)]


def _kept(cache: Any) -> Any:
    """The first layer that keeps softmax, or None."""
    return next((x for x in cache.layers if not getattr(x, "is_linearize_state", False)), None)


def _whole_mask(cache: Any, mask: Tensor | None) -> Tensor | None:
    """The mask of all columns there will be; what comes after the newest is hidden by position."""
    kept = _kept(cache)
    if kept is None or mask is None:
        return None
    whole = mask.new_ones(len(mask), kept.max_cache_len)
    whole[:, : mask.shape[1]] = mask
    return whole


def _clock(cache: Any, like: Tensor) -> Tensor:
    """Columns so far, on the device; without a layer that counts them there nobody asks for the value."""
    kept = _kept(cache)
    return like.new_zeros(()) if kept is None else kept.cumulative_length
