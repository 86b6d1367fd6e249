"""Walk a model: read its geometry, give its layers mixers, report what changed, and undo it.

No architecture is known by name. A probe run on the meta device sees what every layer hands to transformers' attention
interface; a family that breaks a rule is refused with the reason.
"""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .modeling.attention import SOURCE, own_class, rotate
from .modeling.errors import ConversionError
from .modeling.mixer import Geometry, MethodConfig, MixerInput
from .modeling.model import FORMAT, convert_, layer_spec, unconvert_
from .modeling.registry import METHODS

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
    keywords: tuple[str, ...]


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


def _run_probe(model: Any, recorder: Recorder, device: str) -> None:
    """One short forward in which every attention call goes to ``recorder(module, q, k, v, **kw) -> y [B, T, H, V]``."""
    before = model.config._attn_implementation
    token = _recorder.set(recorder)
    try:
        model.set_attn_implementation(PROBE)
        ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=device)
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        _recorder.reset(token)
        model.config._attn_implementation_internal = before


def probe(model: PreTrainedModel) -> dict[int, Probed]:
    """Layer index -> what its attention is, from a run of the same configuration on the meta device.

    Raises :class:`ConversionError` for a model whose attention cannot be replaced, naming the family and the reason.
    """
    family = model.config.model_type
    if model.config.is_encoder_decoder:
        raise ConversionError(
            f"{family}: an encoder-decoder model cannot be converted; give a decoder-only causal LM"
        )
    if not model.can_generate():
        raise ConversionError(
            f"{family}: {type(model).__name__} is not a causal LM; load it with its causal-LM head"
        )
    config = copy.deepcopy(model.config)
    config._attn_implementation_internal = "eager"
    with torch.device("meta"):
        twin = type(model)(config).to(torch.bfloat16).eval()
    paths = {id(module): name for name, module in twin.named_modules()}
    found: dict[int, Probed] = {}

    def record(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        index = getattr(module, "layer_idx", None)
        if index is None or index in found:
            raise ConversionError(
                f"{family}: layer {index} calls attention more than once; this family is not supported"
            )
        hidden = config.get_text_config().hidden_size
        geometry = Geometry(q.shape[1], k.shape[1], q.shape[-1], v.shape[-1], hidden)
        found[index] = Probed(
            paths[id(module)], geometry, kwargs.get("sliding_window"), tuple(sorted(kwargs))
        )
        for name, meaning in REFUSED_KEYWORDS.items():
            if kwargs.get(name) is not None:
                raise ConversionError(
                    f"{family}: layer {index} uses {meaning} ({name}), which no method here honours"
                )
        return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])

    # A family that cannot change its attention implementation warns and ignores the request; nothing is recorded then.
    previous = logging.getLogger("transformers.modeling_utils").level
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
    try:
        _run_probe(twin, record, "meta")
    except ConversionError:
        raise
    except Exception as error:
        if found or twin.config._attn_implementation == PROBE:
            raise ConversionError(
                f"{family}: the probe run failed ({type(error).__name__}: {_line(error)})"
            ) from error
    finally:
        logging.getLogger("transformers.modeling_utils").setLevel(previous)
    if not found:
        raise ConversionError(
            f"{family}: its attention does not go through transformers' attention interface, so it cannot be replaced; "
            "families that can be converted: linearize list families"
        )
    return dict(sorted(found.items()))


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:160]


def convert(
    model: PreTrainedModel,
    methods: MethodConfig | Mapping[int, MethodConfig],
    layers: str | Sequence[int] = "all",
    *,
    convert_sliding: bool = False,
) -> PreTrainedModel:
    """The model with mixers in the chosen layers, changed in place; its own weights are untouched.

    ``methods`` is one configuration for ``layers`` (``"all"`` or indices), or a mapping from layer index to its own.
    Layers that have a sliding window of their own are left alone by ``"all"`` unless ``convert_sliding``: they are
    bounded already. New parameters are fp32 and trainable; those of the model keep their ``requires_grad``.

    Raises :class:`ConversionError`: a family that cannot be converted, an index that does not exist, a configuration
    impossible at a layer's geometry.
    """
    if getattr(model.config, "linearize", None):
        raise ConversionError(f"{type(model).__name__}: is converted already; use unconvert first")
    found = probe(model)
    chosen = _choose(found, methods, layers, convert_sliding)
    spec: dict[str, Any] = {
        "format": FORMAT,
        "version": _version(),
        "family": model.config.model_type,
        "layers": {},
    }
    for index, config in chosen.items():
        mixer = METHODS[config.name].mixer
        if mixer is None:
            continue
        try:
            config.check(found[index].geometry)
        except ConversionError as error:
            raise ConversionError(f"layer {index}: {error}") from error
        spec["layers"][str(index)] = layer_spec(found[index].module, config, found[index].geometry)
    unrotated = [i for i, c in chosen.items() if getattr(METHODS[c.name].mixer, "wants_unrotated", False)]
    if unrotated:
        check_deferral(model, {i: found[i] for i in unrotated})
    return convert_(model, spec, METHODS)


def _choose(
    found: Mapping[int, Probed],
    methods: MethodConfig | Mapping[int, MethodConfig],
    layers: str | Sequence[int],
    convert_sliding: bool,
) -> dict[int, MethodConfig]:
    if isinstance(methods, Mapping):
        chosen = dict(methods)
    elif layers == "all":
        chosen = {i: methods for i, layer in found.items() if convert_sliding or layer.sliding_window is None}
        if not chosen:
            raise ConversionError(
                "layers: every layer has a sliding window of its own, so memory is bounded already; "
                "set convert_sliding=true to convert them all the same"
            )
    elif isinstance(layers, str):
        raise ConversionError(f"layers: {layers!r} is unknown; give 'all' or a list of indices")
    else:
        chosen = {index: methods for index in layers}
    for index in chosen:
        if index not in found:
            raise ConversionError(
                f"layers: {index} is not an attention layer; choose from {_ranges(list(found))}"
            )
    return dict(sorted(chosen.items()))


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
        device = next(model.parameters()).device
        _run_probe(
            model,
            lambda m, q, k, v, **kw: q.new_zeros(*q.transpose(1, 2).shape[:3], v.shape[-1]),
            str(device),
        )
    finally:
        for handle in handles:
            handle.remove()
    for index, layer in layers.items():
        args, kwargs = seen[layer.module]
        rope = kwargs.get("position_embeddings")
        if rope is not None and not _deferral_is_exact(model.get_submodule(layer.module), args, kwargs, rope):
            raise ConversionError(
                f"{model.config.model_type}: layer {index} does not apply its rotary embedding last, so q and k cannot be "
                "taken before it; choose a method that does not need them"
            )


@torch.no_grad()
def _deferral_is_exact(attention: nn.Module, args: tuple, kwargs: dict, rope: Any) -> bool:
    twin = copy.deepcopy(attention)
    generator = torch.Generator().manual_seed(0)
    for parameter in twin.parameters():
        if parameter.ndim == 1:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    twin.config = copy.copy(attention.config)
    twin.config._attn_implementation_internal = PROBE
    caught: list[tuple[Tensor, Tensor]] = []

    def catch(_module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **_kwargs: Any) -> Tensor:
        caught.append((q, k))
        return q.new_zeros(*q.transpose(1, 2).shape[:3], v.shape[-1])

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
    """Layer index -> full paths of the linear projections inside its attention (fused ones included), mixers excluded."""
    plain = getattr(model.config, "linearize", None) is None
    paths = {i: p.module for i, p in probe(model).items()} if plain else attention_paths(model)
    result = {}
    for index, path in paths.items():
        attention = model.get_submodule(path)
        result[index] = [
            f"{path}.{name}"
            for name, module in attention.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and not name.startswith("mixer.")
        ]
    return result


def attention_paths(model: Any) -> dict[int, str]:
    """Layer index -> path of its attention module in a converted model, layers that keep softmax included."""
    known = {int(i): layer["module"] for i, layer in model.config.linearize["layers"].items()}
    if not known:
        return {i: p.module for i, p in probe(_plain_twin(model)).items()}
    path = next(iter(known.values()))
    kind = own_class(model.get_submodule(path))
    return {m.layer_idx: name for name, m in model.named_modules() if isinstance(m, kind)}


def _plain_twin(model: Any) -> Any:
    with torch.device("meta"):
        return unconvert_(type(model)(copy.deepcopy(model.config)))


def describe(model: Any) -> list[LayerReport]:
    """One report for every attention layer of a converted model."""
    probed = probe(_plain_twin(model))
    mixers = model.mixers()
    width = next(model.parameters()).element_size()
    reports = []
    for index, layer in probed.items():
        geometry = layer.geometry
        mixer = mixers.get(index)
        reports.append(
            LayerReport(
                index=index,
                method="softmax" if mixer is None else mixer.config.name,
                geometry=geometry,
                parameters=0 if mixer is None else sum(p.numel() for p in mixer.parameters()),
                state_bytes=0 if mixer is None else state_bytes(mixer, next(model.parameters()).dtype),
                kv_bytes_per_token=geometry.kv_heads * (geometry.key_dim + geometry.value_dim) * width,
                kv_tokens=layer.sliding_window if mixer is None else 0,
            )
        )
    return reports


@torch.no_grad()
def state_bytes(mixer: Any, dtype: torch.dtype) -> int:
    """Bytes of one row's state, by making one."""
    shape: Geometry = mixer.geometry
    device = next(mixer.parameters(), torch.empty(0)).device
    make = dict(dtype=dtype, device=device)
    q = torch.zeros(1, 1, shape.heads, shape.key_dim, **make)
    k = torch.zeros(1, 1, shape.kv_heads, shape.key_dim, **make)
    v = torch.zeros(1, 1, shape.kv_heads, shape.value_dim, **make)
    hidden = torch.zeros(1, 1, shape.hidden, **make)
    x = MixerInput(hidden, q, k, v, scale=1.0, q_plain=q, k_plain=k, use_cache=True)
    return sum(t.numel() * t.element_size() for t in mixer(x)[1])
