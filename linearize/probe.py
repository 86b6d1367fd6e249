"""What a model's attention layers are, found by running them: their geometry, and whether a mixer can take their place.

No architecture is known by name. A run on the meta device sees what every layer hands to transformers' attention
interface; a family that breaks a rule is refused with the reason.
"""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from .modeling.attention import SOURCE, rotate
from .modeling.errors import ConversionError
from .modeling.mixer import Geometry

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
    require_model(model)
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


def require_model(model: Any) -> None:
    """Refuse wrappers around a model: what they hold has to be given itself."""
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
