"""Walk a model: read its geometry, give its layers mixers, report what changed, and undo it.

No architecture is known by name. A probe run on the meta device sees what every layer hands to transformers' attention
interface; a family that breaks a rule is refused with the reason.
"""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .methods import spread
from .modeling.attention import SOURCE, rotate
from .modeling.errors import ConversionError
from .modeling.mixer import Geometry, MethodConfig, MixerInput
from .modeling.model import FORMAT, convert_, layer_spec, unconvert_
from .modeling.registry import METHODS
from .modeling.window import SoftmaxConfig

log = logging.getLogger(__name__)
PROBE = f"linearize_probe_{SOURCE}"
PROBE_TOKENS = 5
REFUSED_KEYWORDS = {"position_bias": "a position bias on scores", "s_aux": "learned attention sinks"}

Recorder = Callable[..., Tensor]
_recorder: ContextVar[Recorder] = ContextVar("linearize_probe")


@dataclass(frozen=True)
class Probed:
    """What one attention layer hands to the attention interface."""

    module: str
    geometry: Geometry
    sliding_window: int | None
    source: int
    """The layer that its keys and values come from: itself, or an earlier one that it shares them with."""


@dataclass(frozen=True)
class LayerReport:
    """One layer of a converted model; bytes are for one row of the batch."""

    index: int
    method: str
    geometry: Geometry
    parameters: int
    state_bytes: int
    """Of the mixer's state, constant; 0 where softmax is kept."""
    kv_bytes_per_token: int
    """What softmax attention would store (or stores) for each token."""
    kv_tokens: int | None
    """Most tokens a kept softmax layer stores: its own sliding window, or None without a bound; 0 if converted."""

    def cache_bytes(self, length: int) -> int:
        """Bytes of this layer's memory after ``length`` tokens."""
        kept = length if self.kv_tokens is None else min(length, self.kv_tokens)
        return self.state_bytes + kept * self.kv_bytes_per_token

    def teacher_bytes(self, length: int) -> int:
        """Bytes of this layer's cache in the teacher after ``length`` tokens."""
        return length * self.kv_bytes_per_token


def _probe_attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
    return _recorder.get()(module, q, k, v, **kwargs), None


AttentionInterface.register(PROBE, _probe_attention)
AttentionMaskInterface.register(PROBE, lambda **request: None)


def _run_probe(model: Any, recorder: Recorder) -> None:
    """One short forward in which every attention call goes to ``recorder(module, q, k, v, **kw) -> y [B, T, H, V]``."""
    before = model.config._attn_implementation
    token = _recorder.set(recorder)
    try:
        model.set_attn_implementation(PROBE)
        ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=next(model.parameters()).device)
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        _recorder.reset(token)
        model.config._attn_implementation_internal = before


def probe(model: PreTrainedModel) -> dict[int, Probed]:
    """Layer index -> what its attention is, from a run of the same configuration on the meta device.

    Raises :class:`ConversionError` for a model whose attention cannot be replaced, naming the family and the reason.
    """
    _require_model(model)
    family = model.config.model_type
    if model.config.is_encoder_decoder:
        raise ConversionError(
            f"{family}: an encoder-decoder model cannot be converted; give a decoder-only causal LM"
        )
    if not model.can_generate():
        raise ConversionError(
            f"{family}: {type(model).__name__} is not a causal LM; load it with its causal-LM head"
        )
    found: dict[int, Probed] = {}
    for subject in (_twin, _itself):
        found.clear()
        target = subject(model)
        try:
            with _quiet():
                _run_probe(target, _writer(target, found))
            break
        except ConversionError:
            raise
        except Exception as error:  # some blocks cannot run on the meta device; the model itself can
            log.debug("%s: probe of %s failed: %s", family, subject.__name__, error)
            if subject is _itself:
                line = f"{family}: the probe run failed ({type(error).__name__}: {_line(error)})"
                raise ConversionError(line) from error
    if not found:
        raise ConversionError(
            f"{family}: its attention does not go through transformers' attention interface, so it cannot be replaced; "
            "families that can be converted: linearize list families"
        )
    return dict(sorted(found.items()))


def _require_model(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ConversionError(
            f"{type(model).__name__}: is a wrapper, not a transformers model; give the model inside it, "
            "after merging an adapter"
        )


def _writer(model: Any, found: dict[int, Probed]) -> Recorder:
    """A recorder that writes what it sees into ``found``."""
    paths = {id(module): name for name, module in model.named_modules()}
    family, hidden = model.config.model_type, model.config.get_text_config().hidden_size
    keys: list[tuple[int, Tensor]] = []

    def record(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        index = getattr(module, "layer_idx", None)
        if index is None:
            raise ConversionError(f"{family}: an attention layer has no layer_idx, so its cache has no place")
        if index in found:
            raise ConversionError(
                f"{family}: layer {index} calls attention more than once, which is not supported"
            )
        if module.config is not model.config:
            raise ConversionError(
                f"{family}: its text layers have a configuration of their own; load the text model alone, "
                "by its own causal-LM class, and convert that"
            )
        if kwargs.get("is_causal", getattr(module, "is_causal", True)) is False:
            raise ConversionError(f"{family}: layer {index} attends in both directions; give a causal LM")
        for name, meaning in REFUSED_KEYWORDS.items():
            if kwargs.get(name) is not None:
                raise ConversionError(
                    f"{family}: layer {index} uses {meaning} ({name}), which no method honours"
                )
        geometry = Geometry(q.shape[1], k.shape[1], q.shape[-1], v.shape[-1], hidden)
        source = next((earlier for earlier, key in keys if key is k), index)
        keys.append((index, k))
        found[index] = Probed(paths[id(module)], geometry, kwargs.get("sliding_window"), source)
        return _silence(q, v)

    return record


def _twin(model: Any) -> Any:
    """The same configuration without weights, on the meta device."""
    config = copy.deepcopy(model.config)
    config._attn_implementation_internal = "eager"
    with torch.device("meta"):
        return type(model)(config).to(torch.bfloat16).eval()


def _itself(model: Any) -> Any:
    return model


def _silence(q: Tensor, v: Tensor) -> Tensor:
    """A zero attention output [B, T, H, V] for q [B, H, T, K], v [B, G, T, V]."""
    return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A family that cannot change its attention implementation warns, which the caller says better."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:160]


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
    _require_model(model)
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
    unrotated = [i for i, c in chosen.items() if getattr(METHODS[c.name].mixer, "wants_unrotated", False)]
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
    _require_model(model)
    if not getattr(model.config, "linearize", None):
        raise ConversionError(f"{type(model).__name__}: is not a converted model")
    return unconvert_(model)


def check_deferral(model: PreTrainedModel, layers: Mapping[int, Probed]) -> None:
    """Check that q and k can be had before the rotary embedding: bit-equal when it is applied afterwards.

    Each attention runs on random inputs with randomised norms (fresh norms of one hide a norm after the rotation), with
    and without deferral. Raises :class:`ConversionError` naming the layer and the family.
    """
    seen: dict[str, Any] = {}
    handles = []
    for layer in layers.values():

        def keep(_module: nn.Module, args: tuple, kwargs: dict, name: str = layer.module) -> None:
            seen[name] = (args, kwargs)

        handles.append(model.get_submodule(layer.module).register_forward_pre_hook(keep, with_kwargs=True))
    try:
        _run_probe(model, lambda module, q, k, v, **kwargs: _silence(q, v))
    finally:
        for handle in handles:
            handle.remove()
    for index, layer in layers.items():
        args, kwargs = seen[layer.module]
        rope = kwargs.get("position_embeddings")
        if rope is not None and not _deferral_is_exact(model.get_submodule(layer.module), args, kwargs, rope):
            raise ConversionError(
                f"{model.config.model_type}: layer {index} does not apply its rotary embedding last, so q and k "
                "cannot be taken before it; choose a method that does not need them"
            )


@torch.no_grad()
def _deferral_is_exact(attention: nn.Module, args: tuple, kwargs: dict, rope: Any) -> bool:
    twin = copy.deepcopy(attention)
    generator = torch.Generator().manual_seed(0)
    for parameter in twin.parameters():
        if parameter.ndim == 1:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    # Random inputs too: a padding token's embedding is zero, and zero stays zero under any rotation.
    hidden = args[0] if args else kwargs["hidden_states"]
    hidden = torch.randn(hidden.shape, generator=generator).to(hidden)
    args, kwargs = ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})
    twin.config = copy.copy(attention.config)  # type: ignore[assignment]
    twin.config._attn_implementation_internal = PROBE  # type: ignore[union-attr]
    caught: list[tuple[Tensor, Tensor]] = []

    def catch(_module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **_kwargs: Any) -> Tensor:
        caught.append((q, k))
        return _silence(q, v)

    try:
        token = _recorder.set(catch)
        twin(*args, **kwargs)
        identity = (torch.ones_like(rope[0]), torch.zeros_like(rope[1]))
        twin(*args, **(kwargs | {"position_embeddings": identity}))
        late = rotate(twin, *caught[1], rope)
    except Exception as error:
        log.debug("rope deferral failed: %s", error)
        return False
    finally:
        _recorder.reset(token)
    return all(torch.equal(a, b) for a, b in zip(caught[0], late, strict=True))


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
                kv_bytes_per_token=geometry.kv_heads
                * (geometry.key_dim + geometry.value_dim)
                * dtype.itemsize,
                kv_tokens=layer["sliding_window"] if mixer is None else 0,
            )
        )
    return reports


@torch.no_grad()
def state_bytes(mixer: Any, dtype: torch.dtype) -> int:
    """Bytes of one row's state, by making one."""
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
    return sum(t.numel() * t.element_size() for t in mixer(x)[1])
