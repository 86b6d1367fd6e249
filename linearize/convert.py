"""Give a model's layers mixers, report what changed, and undo it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .methods import spread
from .modeling.errors import ConversionError
from .modeling.mixer import Geometry, MethodConfig, MixerInput
from .modeling.model import FORMAT, convert_, layer_spec, unconvert_
from .modeling.registry import METHODS
from .modeling.window import SoftmaxConfig
from .probe import Probed, check_deferral, probe, require_model


@dataclass(frozen=True)
class LayerReport:
    """One layer of a converted model; bytes are for one row of the batch."""

    index: int
    method: str
    geometry: Geometry
    parameters: int
    state_bytes: int
    """Of the mixer's state, before it grows; 0 where softmax is kept."""
    growth: float
    """What each further token adds to the mixer's state, on average; 0 where the state is constant."""
    kv_bytes_per_token: int
    """What softmax attention would store (or stores) for each token."""
    kv_tokens: int | None
    """Most tokens a kept softmax layer stores: its own sliding window, or None without a bound; 0 if converted."""

    def cache_bytes(self, length: int) -> int:
        """Bytes of this layer's memory after ``length`` tokens, at most."""
        kept = length if self.kv_tokens is None else min(length, self.kv_tokens)
        return self.state_bytes + math.ceil(length * self.growth) + kept * self.kv_bytes_per_token

    def teacher_bytes(self, length: int) -> int:
        """Bytes of this layer's cache in the teacher after ``length`` tokens."""
        return length * self.kv_bytes_per_token


def convert(
    model: PreTrainedModel,
    methods: MethodConfig | Mapping[int, MethodConfig],
    layers: str | Sequence[int] | Mapping[str, MethodConfig] = "all",
    *,
    convert_sliding: bool = False,
) -> PreTrainedModel:
    """The model with mixers in the chosen layers, changed in place; its own weights are untouched.

    ``methods`` is one configuration for ``layers`` (``"all"`` or indices), or a mapping from layer index to its own.
    ``layers`` may also be a recipe's map, ``{"0-3": ..., "rest": ...}``; its configurations count, and not ``methods``.
    Layers that have a sliding window of their own are left alone by ``"all"`` unless ``convert_sliding``: they are
    bounded already. New parameters are fp32 and trainable; those of the model keep their ``requires_grad``.

    Raises :class:`ConversionError`: a family that cannot be converted, an index that does not exist, a configuration
    impossible at a layer's geometry.
    """
    require_model(model)
    if getattr(model.config, "linearize", None):
        raise ConversionError(f"{type(model).__name__}: is converted already; use unconvert first")
    found = probe(model)
    chosen = _choose(found, methods, layers, convert_sliding)
    _check_memory(model, {i: found[i] for i, c in chosen.items() if METHODS[c.name].mixer}, found)
    spec: dict[str, Any] = {
        "format": FORMAT,
        "version": _version(),
        "family": model.config.model_type,
        "layers": {},
    }
    for index, layer in found.items():
        config = chosen.get(index, SoftmaxConfig())
        try:
            config.check(layer.geometry)
        except ConversionError as error:
            raise ConversionError(f"layer {index}: {error}") from error
        spec["layers"][str(index)] = layer_spec(layer.module, layer.sliding_window, layer.geometry, config)
    unrotated = [
        i
        for i, c in chosen.items()
        if c.wants_unrotated or getattr(METHODS[c.name].mixer, "wants_unrotated", False)
    ]
    if unrotated:
        check_deferral(model, {i: found[i] for i in unrotated})
    return convert_(model, spec, METHODS)


def _choose(
    found: Mapping[int, Probed],
    methods: MethodConfig | Mapping[int, MethodConfig],
    layers: str | Sequence[int] | Mapping[str, MethodConfig],
    convert_sliding: bool,
) -> dict[int, MethodConfig]:
    every = [i for i, layer in found.items() if convert_sliding or layer.sliding_window is None]
    if isinstance(layers, Mapping):
        chosen = spread(layers, every)
    elif isinstance(methods, Mapping):
        chosen = dict(methods)
    elif layers == "all":
        chosen = dict.fromkeys(every, methods)
        if not chosen:
            raise ConversionError(
                "layers: every layer has a sliding window of its own, so memory is bounded already; "
                "set convert_sliding=true to convert them all the same"
            )
    elif isinstance(layers, str):
        raise ConversionError(f"layers: {layers!r} is unknown; give 'all' or a list of indices")
    else:
        chosen = dict.fromkeys(layers, methods)
    for index in chosen:
        if index not in found:
            raise ConversionError(
                f"layers: {index} is not an attention layer; choose from {_ranges(list(found))}"
            )
    return dict(sorted(chosen.items()))


def _check_memory(model: Any, chosen: Mapping[int, Probed], found: Mapping[int, Probed]) -> None:
    """Refuse layers whose place in the cache is not theirs alone, and layers whose weights are elsewhere."""
    family, cache = model.config.model_type, DynamicCache(config=model.config)
    shared = {layer.source for index, layer in found.items() if layer.source != index}
    for index, layer in chosen.items():
        if layer.source in shared:
            raise ConversionError(
                f"{family}: layer {index} shares its keys and values with another layer; leave it out of layers"
            )
        if index < len(cache.layers) and hasattr(cache.layers[index], "update_conv_state"):
            raise ConversionError(
                f"{family}: layer {index} keeps a linear state of its own beside attention; leave it out of layers"
            )
        attention = model.get_submodule(layer.module)
        hooked = any(hasattr(module, "_hf_hook") for module in attention.modules())
        if hooked and next(attention.parameters()).is_meta:
            raise ConversionError(
                f"{family}: the weights of layer {index} are offloaded; load the model without offloading to convert it"
            )


def _ranges(indices: list[int]) -> str:
    if indices == list(range(len(indices))):
        return f"0 to {indices[-1]}"
    return ", ".join(map(str, indices))


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("linearize")
    except PackageNotFoundError:
        return "unknown"


def unconvert(model: Any) -> PreTrainedModel:
    """The plain model back, in place: classes, names and weights are those it was loaded with."""
    require_model(model)
    if not getattr(model.config, "linearize", None):
        raise ConversionError(f"{type(model).__name__}: is not a converted model")
    return unconvert_(model)


def projections(model: Any) -> dict[int, list[str]]:
    """Layer index -> full paths of the linear projections of its attention (fused ones too), mixers excluded."""
    spec = getattr(model.config, "linearize", None)
    if spec is None:
        paths = {index: layer.module for index, layer in probe(model).items()}
    else:
        paths = {int(index): layer["module"] for index, layer in spec["layers"].items()}
    result = {}
    for index, path in paths.items():
        attention = model.get_submodule(path)
        result[index] = [
            f"{path}.{name}"
            for name, module in attention.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and not name.startswith("mixer.")
        ]
    return result


def describe(model: Any) -> list[LayerReport]:
    """One report for every attention layer of a converted model."""
    mixers = model.mixers()
    dtype = next(model.parameters()).dtype
    reports = []
    for index, layer in model.config.linearize["layers"].items():
        geometry = Geometry(**layer["geometry"])
        mixer = mixers.get(int(index))
        reports.append(
            LayerReport(
                index=int(index),
                method=layer["method"]["name"],
                geometry=geometry,
                parameters=0 if mixer is None else sum(p.numel() for p in mixer.parameters()),
                state_bytes=0 if mixer is None else state_bytes(mixer, dtype),
                growth=0.0 if mixer is None else mixer.growth(dtype.itemsize),
                kv_bytes_per_token=geometry.kv_heads
                * (geometry.key_dim + geometry.value_dim)
                * dtype.itemsize,
                kv_tokens=layer["sliding_window"] if mixer is None else 0,
            )
        )
    return reports


def forecast(
    model: PreTrainedModel, methods: Any, layers: Any = "all", *, convert_sliding: bool = False
) -> list[LayerReport]:
    """What :func:`describe` would say after :func:`convert` with these words; a model without weights is enough.

    Raises :class:`ConversionError` as ``convert`` does, except for what only a run of the model's own layers shows.
    """
    found = probe(model)
    chosen = _choose(found, methods, layers, convert_sliding)
    dtype, made, reports = next(model.parameters()).dtype, {}, []
    for index, layer in found.items():
        config, shape = chosen.get(index, SoftmaxConfig()), layer.geometry
        config.check(shape)
        method = METHODS[config.name]
        if (config, shape) not in made:  # on the CPU: a mixer is small, and has to take a step
            mixer = None if method.mixer is None else method.mixer(config, shape).float()
            parameters = 0 if mixer is None else sum(p.numel() for p in mixer.parameters())
            size = 0 if mixer is None else state_bytes(mixer, dtype)
            made[config, shape] = parameters, size, 0.0 if mixer is None else mixer.growth(dtype.itemsize)
        parameters, size, growth = made[config, shape]
        reports.append(
            LayerReport(
                index=index,
                method=config.name,
                geometry=shape,
                parameters=parameters,
                state_bytes=size,
                growth=growth,
                kv_bytes_per_token=shape.kv_heads * (shape.key_dim + shape.value_dim) * dtype.itemsize,
                kv_tokens=layer.sliding_window if method.mixer is None else 0,
            )
        )
    return reports


@torch.no_grad()
def state_bytes(mixer: Any, dtype: torch.dtype, room: bool = False) -> int:
    """Bytes of one row's state after its first token, by making one; with ``room`` as steps in place hold it."""
    shape: Geometry = mixer.geometry
    device = next(mixer.parameters(), torch.empty(0)).device
    heads = {
        "q": (shape.heads, shape.key_dim),
        "k": (shape.kv_heads, shape.key_dim),
        "v": (shape.kv_heads, shape.value_dim),
    }
    q, k, v = (torch.zeros(1, 1, *size, dtype=dtype, device=device) for size in heads.values())
    hidden = torch.zeros(1, 1, shape.hidden, dtype=dtype, device=device)
    x = MixerInput(hidden, q, k, v, scale=1.0, q_plain=q, k_plain=k, use_cache=True)
    state = mixer(x)[1]
    return sum(t.numel() * t.element_size() for t in (mixer.with_room(state) if room else state))
