"""A causal LM whose attention layers run mixers: class swap, configuration, cache, initial values, saving.

``config.linearize`` says everything that a converted model needs to be built again:

    {"format": 1, "version": "0.1.0", "family": "llama",
     "layers": {"0": {"module": "model.layers.0.self_attn", "sliding_window": null, "geometry": {"heads": 4, ...},
                      "method": {"name": "lolcats", ...}}, ...}}

Every attention layer is listed; those whose method is ``softmax`` are the model's own.

This file and its siblings are copied beside the weights, so that plain transformers can load them.
"""

import functools
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from .attention import MODE, NAME, attach, base_attention, detach
from .cache import CACHE, cache_layer
from .errors import CheckpointError
from .graph import StepGraph, why_no_graph
from .mixer import Geometry, Method, MethodConfig, Mixer

FORMAT = 1
"""Version of ``config.linearize`` and of the tensors' names; newer ones are refused."""
PREFIX = "linearize_"
"""Our ``model_type`` is this and the family's: under the family's own, transformers would load plain softmax."""
STUB = "modeling_linearize"


class LinearConfig:
    """Mixed into a model's own configuration class."""

    is_linearize: ClassVar[bool] = True
    """By which classes of any copy of this code are known."""

    def _remove_keys_not_serialized(self, output: dict[str, Any]) -> None:
        super()._remove_keys_not_serialized(output)  # type: ignore[misc]
        output.pop("_linearize_base", None)


class LinearModel(PreTrainedModel if TYPE_CHECKING else object):
    """Mixed into a causal-LM class, before it in the bases."""

    is_linearize: ClassVar[bool] = True
    methods: ClassVar[Mapping[str, Method]] = {}

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        base = native_class(cls)
        cls._keep_in_fp32_modules_strict = {*(base._keep_in_fp32_modules_strict or ()), "mixer"}
        # Families that store other tensor names than they compute with (experts, for one) are mapped by class name.
        mapping = get_checkpoint_conversion_mapping(base.__name__)
        mapping = mapping or get_checkpoint_conversion_mapping(base.config_class.model_type)
        if mapping is not None:
            register_checkpoint_conversion_mapping(cls.__name__, mapping, overwrite=True)

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        attach_mixers(self, check_format(getattr(config, "linearize", None)), self.methods)
        take_over(self)

    def mixers(self) -> dict[int, Mixer]:
        """Layer index -> mixer, in order; layers that keep softmax are absent."""
        return {index: cast(Mixer, attention.mixer) for index, attention in self.converted().items()}

    def converted(self) -> dict[int, nn.Module]:
        """Layer index -> attention module that runs a mixer."""
        layers = converted_layers(self.config.linearize)
        return {int(i): self.get_submodule(layer["module"]) for i, layer in layers.items()}

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Choose the implementation of layers (and modes) that compute softmax; converted layers stay converted."""
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        take_over(self)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ):
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get(CACHE)
        if cache is not None and MODE.get().name == "linear":
            for index in self.mixers():
                layer = cache_layer(cache, index)
                if generation_config.is_assistant:
                    layer.activate_past_recording()
        return result

    def _valid_auto_compile_criteria(self, model_kwargs: dict, generation_config: Any) -> bool:
        """Whether ``generate`` steps by :meth:`get_compiled_call`: with a static cache on one GPU."""
        if not self._steps_by_graph():
            return super()._valid_auto_compile_criteria(model_kwargs, generation_config)
        if generation_config.disable_compile:
            return False
        reason = why_no_graph(self, model_kwargs.get(CACHE))
        asked = generation_config.cache_implementation == "static" and self.device.type == "cuda"
        if reason is not None and asked:
            warnings.warn(f"decoding without a CUDA graph, because {reason}", RuntimeWarning, stacklevel=2)
        return reason is None

    def get_compiled_call(self, compile_config: Any) -> Any:
        """Steps from a CUDA graph in place of compiled ones, where layers run mixers."""
        return StepGraph(self) if self._steps_by_graph() else super().get_compiled_call(compile_config)

    def _steps_by_graph(self) -> bool:
        mode = MODE.get()
        return mode.name == "linear" and not mode.without and bool(self.mixers())

    @staticmethod
    def create_masks_for_generate(*args: Any, attention_mask: Any = None, **request: Any) -> Any:
        """The [B, T] mask as it is; with a static cache, ``generate`` would make ours ahead of the forward."""
        return attention_mask

    def _initialize_missing_keys(self, *args: Any, **kwargs: Any) -> None:
        # Loading a base checkpoint straight into this class would leave uninitialised memory in the mixers.
        for mixer in self.mixers().values():
            if not all(getattr(p, "_is_hf_initialized", False) for p in mixer.parameters()):
                mixer.reset_parameters()
                for parameter in mixer.parameters():
                    parameter._is_hf_initialized = True
        super()._initialize_missing_keys(*args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers', plus the code that loads the folder without this package."""
        folder = Path(save_directory)
        if kwargs.get("is_main_process", True):
            folder.mkdir(parents=True, exist_ok=True)
            self.config.auto_map = write_code(type(self), self.config, folder)
        super().save_pretrained(save_directory, *args, **kwargs)


def native_class(cls: type) -> Any:
    """The class of a model or configuration below ours."""
    return next(c for c in cls.__mro__ if not hasattr(c, "is_linearize"))


def check_format(spec: Any) -> Mapping[str, Any]:
    """The description of a conversion; refused where this version cannot build it."""
    if not isinstance(spec, Mapping) or not isinstance(spec.get("format"), int) or "layers" not in spec:
        raise CheckpointError("config.json: linearize: no conversion is described; save the student again")
    if spec["format"] > FORMAT:
        raise CheckpointError(
            f"config.json: linearize.format: {spec['format']} is newer than {FORMAT}, the newest this version reads; "
            "upgrade linearize"
        )
    return spec


def layer_spec(
    module: str, sliding_window: int | None, geometry: Geometry, config: MethodConfig
) -> dict[str, Any]:
    """One entry of ``config.linearize["layers"]``."""
    method = {"name": config.name, **asdict(config)}
    return {
        "module": module,
        "sliding_window": sliding_window,
        "geometry": asdict(geometry),
        "method": method,
    }


def converted_layers(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of the layers that have a mixer."""
    return {i: layer for i, layer in spec["layers"].items() if layer["method"]["name"] != "softmax"}


def attach_mixers(model: nn.Module, spec: Mapping[str, Any], methods: Mapping[str, Method]) -> None:
    """Build every layer's mixer from its description and put it into its attention module."""
    for index, layer in converted_layers(spec).items():
        fields = dict(layer["method"])
        name = fields.pop("name")
        if name not in methods:
            raise CheckpointError(
                f"config.json: linearize.layers.{index}.method.name: {name!r} is unknown; "
                f"choose from {', '.join(methods)}"
            )
        method = methods[name]
        assert method.mixer is not None
        try:
            config, geometry = method.config(**fields), Geometry(**layer["geometry"])
        except TypeError as error:
            raise CheckpointError(
                f"config.json: linearize.layers.{index}: {error}; upgrade linearize"
            ) from error
        attention = model.get_submodule(layer["module"])
        place = next(attention.parameters()).device
        with torch.device(place):
            attach(attention, method.mixer(config, geometry).float())


def take_over(model: Any) -> None:
    """Make ours the attention implementation, remembering the model's own for softmax."""
    config = model.config
    if config._attn_implementation != NAME:
        config._linearize_base = config._attn_implementation
        config._attn_implementation_internal = NAME


def convert_(model: Any, spec: Mapping[str, Any], methods: Mapping[str, Method]) -> Any:
    """Turn a plain model into a converted one, in place."""
    check_format(spec)
    attach_mixers(model, spec, methods)
    model.config.__class__ = linear_config_class(type(model.config))
    model.config.linearize = dict(spec)
    model.__class__ = linear_model_class(type(model), tuple(methods.items()))
    model._keep_in_fp32_modules_strict = set(type(model)._keep_in_fp32_modules_strict)
    take_over(model)
    return model


def unconvert_(model: Any) -> Any:
    """Turn a converted model back into the plain one, in place; its own weights were never touched."""
    for attention in model.converted().values():
        detach(attention)
    config = model.config
    base = base_attention(config)
    del config.linearize
    config.__dict__.pop("_linearize_base", None)
    config.__dict__.pop("auto_map", None)
    config.__class__ = native_class(type(config))
    model.__class__ = native_class(type(model))
    model._keep_in_fp32_modules_strict = set(model._keep_in_fp32_modules_strict) - {"mixer"}
    config._attn_implementation_internal = base
    return model


@functools.cache
def linear_config_class(base: type) -> type:
    """The configuration class of a converted family."""
    fields = {"__module__": base.__module__, "model_type": PREFIX + base.model_type}
    return _publish(type(f"Linear{base.__name__}", (LinearConfig, base), fields))


@functools.cache
def linear_model_class(base: type, methods: tuple[tuple[str, Method], ...]) -> type:
    """The causal-LM class of a converted family. It keeps the family's module, so that native weight maps apply."""
    fields = {
        "__module__": base.__module__,
        "config_class": linear_config_class(base.config_class),
        "methods": dict(methods),
    }
    return _publish(type(f"Linear{base.__name__}", (LinearModel, base), fields))


def _publish(cls: type) -> type:
    """Make a class importable under its module's name, for pickle; another copy's class of that name is left alone."""
    home = sys.modules[cls.__module__]
    if not hasattr(home, cls.__name__):
        setattr(home, cls.__name__, cls)
    return cls


def offer(name: str) -> None:
    """Let ``transformers.<name>`` be the automatic class, which loads any checkpoint with the code of its own folder.

    `transformers serve` looks an architecture up among transformers' own classes alone. That module may exist twice
    (its processing_utils imports it again), and whoever was first keeps the other one.
    """
    held = (
        vars(module).get("transformers") for module in [*sys.modules.values()] if hasattr(module, "__dict__")
    )
    every = {
        id(m): m for m in [*held, sys.modules["transformers"]] if getattr(m, "__name__", "") == "transformers"
    }
    for module in every.values():
        if name not in vars(module):
            setattr(module, name, AutoModelForCausalLM)


def _home(method: Method) -> str:
    """The module that defines a method's row, which may be the mixer's or the fields'."""
    homes = [part.__module__ for part in (method.mixer, method.config) if part is not None]
    home = next((name for name in homes if hasattr(sys.modules[name], method.name.upper())), homes[0])
    return home.rpartition(".")[2]


def write_code(cls: type, config: Any, folder: Path) -> dict[str, str]:
    """Write the stub and the files it reaches into ``folder``; returns the ``auto_map`` entries."""
    base = native_class(cls)
    base_config = base.config_class
    names = sorted({layer["method"]["name"] for layer in converted_layers(config.linearize).values()})
    source = Path(__file__).parent
    methods = [cls.methods[name] for name in names]
    origin = {method.name: _home(method) for method in methods}
    entries = ", ".join(f'"{name}": {name.upper()}' for name in names)
    lines = [
        '"""Loads this checkpoint in plain transformers; generated by linearize, beside its inference code."""',
        "",
        f"from {base_config.__module__} import {base_config.__name__}",
        f"from {base.__module__} import {base.__name__}",
        "",
        "from .model import LinearConfig, LinearModel, offer",
        *(f"from .{origin[name]} import {name.upper()}" for name in names),
        "",
        "",
        f"class Linear{base_config.__name__}(LinearConfig, {base_config.__name__}):",
        f'    model_type = "{PREFIX}{base_config.model_type}"',
        "",
        "",
        f"class Linear{base.__name__}(LinearModel, {base.__name__}):",
        f"    config_class = Linear{base_config.__name__}",
        f"    methods = {{{entries}}}",
        "",
        "",
        f'offer("Linear{base.__name__}")',
        "",
    ]
    text = "\n".join(lines)
    (folder / f"{STUB}.py").write_text(text)
    waiting, done = [text], set()
    while waiting:
        for name in re.findall(r"^\s*from \.(\w+) import", waiting.pop(), re.MULTILINE):
            if name not in done:
                done.add(name)
                code = (source / f"{name}.py").read_text()
                (folder / f"{name}.py").write_text(code)
                waiting.append(code)
    return {
        "AutoConfig": f"{STUB}.Linear{base_config.__name__}",
        "AutoModelForCausalLM": f"{STUB}.Linear{base.__name__}",
    }
