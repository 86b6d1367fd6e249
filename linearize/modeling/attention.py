"""How a mixer takes the place of softmax attention inside a model's own attention module.

The module keeps its weights and its forward; only its class changes, to a subclass that hands the layer's input, the
cache and the rotary embedding to the attention function. That function, registered under one name in transformers'
attention interface, is a trampoline into the module. What a forward does is decided once, when its mask is made: the
mask object carries the mode to every layer, so that recomputation in a backward pass takes the same branch.
"""

import contextlib
import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .backend import reference_only
from .cache import cache_in, cache_layer, keys_layer
from .errors import ConversionError, LinearizeError
from .mixer import Fit, Mixer, MixerInput, Rows, rows_of

MODES = ("softmax", "transfer", "linear")
Record = Callable[[int, Tensor | Fit, Tensor, Tensor | None], None]


class Mode(NamedTuple):
    """What converted layers compute, and who is told about it in ``transfer``."""

    name: str
    record: Record | None = None
    step: bool = False
    """Whether a forward gives every row one real token, whatever its mask says: a decode step of fixed shapes."""
    without: Mapping[int, str] = {}
    """Layer index -> the branch that its mixer leaves out."""


LINEAR = Mode("linear")


class CurrentMode:
    """The mode in force: a context variable, and beside it the plain field that compiled code can trace and guard."""

    def __init__(self, name: str):
        self.variable = ContextVar(name, default=LINEAR)
        self.traced = LINEAR

    def get(self) -> Mode:
        return self.traced if torch.compiler.is_compiling() else self.variable.get()

    @contextlib.contextmanager
    def hold(self, mode: Mode) -> Iterator[None]:
        token, before = self.variable.set(mode), self.traced
        self.traced = mode
        try:
            yield
        finally:
            self.variable.reset(token)
            self.traced = before


def _source_hash() -> str:
    """Ten hex digits of this file's siblings that every checkpoint carries; two copies of the code in one process share
    registrations exactly when they are the same code."""
    digest = hashlib.sha256()
    for name in ("attention", "cache", "errors", "mixer", "model", "ring"):
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()[:10]


SOURCE = _source_hash()
NAME = f"linearize_{SOURCE}"
"""The attention implementation's name in ``config._attn_implementation`` while a model is converted."""


@contextlib.contextmanager
def attention_mode(name: str, record: Record | None = None) -> Iterator[None]:
    """Run forwards of converted models inside the block as ``softmax``, ``transfer`` or ``linear`` (the default).

    ``softmax``: the teacher, bit for bit, its cache included. ``transfer``: every converted layer passes its softmax
    output on and calls ``record(layer, student, teacher, valid)`` under enabled gradients with both outputs
    [B, T, H, V] and valid [B, T] (bool, None without a mask); only the mixer is inside the graph. A mixer with a loss
    of its own gives that as ``student``, a :class:`Fit`.
    """
    if name not in MODES:
        raise LinearizeError(f"attention_mode: {name!r} is unknown; choose from {', '.join(MODES)}")
    if (name == "transfer") != (record is not None):
        raise LinearizeError("attention_mode: give record= with 'transfer', and only then")
    with MODE.hold(Mode(name, record)):
        yield


@contextlib.contextmanager
def ablation(without: Mapping[int, str]) -> Iterator[None]:
    """Run forwards inside the block with a branch left out in some layers: layer index -> ``linear`` or ``window``.

    Such layers run references. Raises :class:`LinearizeError` in the forward where a layer's method cannot do without.
    """
    with MODE.hold(LINEAR._replace(without=dict(without))):
        yield


class LinearMask:
    """Travels as ``attention_mask`` down to the attention function: padding in O(T), and the stock mask on demand.

    Layers may lie on several devices: each asks for what it needs on its own.
    """

    def __init__(self, mode: Mode, base: str, request: dict[str, Any]):
        self.attention_mode, self.base_name, self.request = mode, base, request
        self._base: dict[torch.device, Any] = {}
        self._rows: dict[tuple[torch.device, bool], Rows | None] = {}
        mask, length = request["attention_mask"], request["q_length"]
        self.valid: Tensor | None = None if mask is None or mode.step else mask[:, -length:]

    def base(self, device: torch.device) -> Any:
        """The mask of the base attention implementation, for layers that compute softmax; made once a forward."""
        if device not in self._base:
            home = self.request["device"]
            if device == home:
                made = ALL_MASK_ATTENTION_FUNCTIONS[self.base_name](**self.request)
            else:
                made = self.base(home)
                made = None if made is None else made.to(device)
            self._base[device] = made
        return self._base[device]

    def padding(self, device: torch.device) -> Tensor | None:
        """[B, T] bool, True for a real token; None without a mask."""
        return None if self.valid is None else self.valid.to(device)

    def rows(self, device: torch.device, packing: tuple[Any, ...] | None) -> Rows | None:
        """The layout that takes this batch's padding away, or its packing (the arguments of :func:`documents_of`).

        Made once a forward: it reads values, for which a GPU must be waited for.
        """
        key = (device, packing is not None)
        if key not in self._rows:
            documents = None if packing is None else documents_of(*packing)
            self._rows[key] = rows_of(self.padding(device), documents)
        return self._rows[key]


def _make_mask(**request: Any) -> LinearMask:
    for name in ("q_offset", "kv_offset"):  # live counters of static caches would change under a lazy mask
        if isinstance(request.get(name), Tensor):
            request[name] = request[name].clone()
            # A static cache has unfilled places. transformers 5.24 drops a mask of ones, and then hides those places
            # only in caches that it would compile, which states are not.
            request["allow_is_causal_skip"] = request["allow_is_causal_skip"] and request["q_length"] > 1
    return LinearMask(MODE.get(), base_attention(request["config"]), request)


def base_attention(config: Any) -> str:
    """The attention implementation that the model would use were it not converted."""
    return getattr(config, "_linearize_base", None) or "sdpa"


def documents_of(
    position_ids: Tensor | None, cu_seq_lens: Tensor | None, batch: int, time: int
) -> Tensor | None:
    """[B, T] document numbers of a packed batch, from cumulative lengths or restarting positions; else None."""
    if cu_seq_lens is not None:
        marks = torch.zeros(batch * time + 1, dtype=torch.long, device=cu_seq_lens.device)
        marks[cu_seq_lens.long()] = 1
        return marks[:-1].cumsum(0).view(batch, time)
    if position_ids is None or position_ids.ndim != 2 or time == 1:
        return None
    breaks = position_ids.diff(dim=-1) != 1
    if torch.compiler.is_compiling():  # which cannot branch on values, but can check them
        line = "position_ids: a compiled forward needs cu_seq_lens_q of packed documents"
        torch._assert_async(~breaks.any(), line)  # type: ignore[attr-defined]
        return None
    if not bool(breaks.any()):
        return None
    documents = torch.zeros_like(position_ids)
    documents[:, 1:] = breaks.cumsum(-1)
    return documents.expand(batch, time)


class Context(NamedTuple):
    """What a layer knows and the attention function is not given."""

    hidden: Tensor
    cache: Any
    rope: tuple[Tensor, Tensor] | None
    deferred: bool


class LinearAttention(nn.Module):
    """Mixed into a model's own attention class; ``self.mixer`` holds everything new."""

    argument_names: tuple[str, ...] = ()
    linearize_source = SOURCE
    layer_idx: int
    mixer: Mixer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = dict(zip(self.argument_names, args, strict=False)) | kwargs
        mask, rope = call.get("attention_mask"), call.get("position_embeddings")
        cache = cache_in(call)
        linear = _mode_of(mask).name == "linear"
        if cache is not None:
            (cache_layer if linear else keys_layer)(cache, self.layer_idx)
        deferred = self.mixer.wants_unrotated and rope is not None and _mode_of(mask).name != "softmax"
        if deferred and rope is not None:
            kwargs["position_embeddings"] = (torch.ones_like(rope[0]), torch.zeros_like(rope[1]))
        context = Context(call["hidden_states"], cache, rope, deferred)
        return super().forward(*args, linear_context=context, **kwargs)  # type: ignore[misc]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, linear_context: Context, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The attention function: q [B, H, T, K], k [B, G, T, K], v [B, G, T, V] -> y [B, T, H, V] and no weights."""
        mode = _mode_of(mask)
        if mode.name == "softmax":
            return attend_base(self, q, k, v, mask, **kwargs)
        plain = (q, k)
        if linear_context.deferred:
            q, k = rotate(self, q, k, linear_context.rope)
        if mode.name == "linear":
            without = mode.without.get(self.layer_idx)
            if without and (reason := self.mixer.why_not_without(without)):
                raise LinearizeError(f"ablation: layer {self.layer_idx}: {reason}; leave the layer out")
            with reference_only() if without else contextlib.nullcontext():  # kernels know no ablations
                y = self._mix(q, k, v, plain, mask, linear_context, kwargs, without=without)
            assert isinstance(y, Tensor)
            return y, None
        teacher, weights = attend_base(self, q, k, v, mask, **kwargs)
        frozen = (q.detach(), k.detach(), v.detach())
        with torch.enable_grad():
            student = self._mix(
                *frozen, tuple(t.detach() for t in plain), mask, linear_context, kwargs, teacher.detach()
            )
            assert mode.record is not None
            valid = mask.padding(q.device) if hasattr(mask, "attention_mode") else None
            mode.record(self.layer_idx, student, teacher.detach(), valid)
        return teacher, weights

    def _mix(self, q, k, v, plain, mask, context, kwargs, teacher=None, without=None) -> Tensor | Fit:
        if isinstance(mask, Tensor):
            raise LinearizeError(
                f"attention_mask: shape {tuple(mask.shape)} is not supported by converted layers; "
                "give a [batch, time] mask of real tokens"
            )
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        batch, time = q.shape[:2]
        hidden = context.hidden if teacher is None else context.hidden.detach()
        cache = context.cache if teacher is None else None
        valid = None if mask is None else mask.padding(q.device)
        packing, lens = None, kwargs.get("cu_seq_lens_q")
        if valid is None and context.cache is None:
            packing = (kwargs.get("position_ids"), lens, batch, time)
        elif valid is None and lens is not None and len(lens) > 2:
            raise LinearizeError(
                f"cu_seq_lens_q: {len(lens) - 1} packed documents cannot share a cache; pass use_cache=False"
            )
        if mask is None:
            rows = None if packing is None else rows_of(None, documents_of(*packing))
        else:
            rows = mask.rows(q.device, packing)
        parts = dict(hidden=hidden, q=q, k=k, v=v)
        if teacher is not None:
            parts["teacher"] = teacher
        if self.mixer.wants_unrotated:
            parts |= dict(q_plain=plain[0].transpose(1, 2), k_plain=plain[1].transpose(1, 2))
        if rows is not None:
            parts = {name: rows.gather(part) for name, part in parts.items()}
        layer = None if cache is None else cache_layer(cache, self.layer_idx)
        in_place = layer is not None and time == 1 and rows is None and not without and self._in_place(layer)
        x = MixerInput(
            **parts,
            scale=kwargs["scaling"] if kwargs.get("scaling") is not None else q.shape[-1] ** -0.5,
            softcap=kwargs.get("softcap"),
            lengths=None if rows is None else rows.lengths,
            use_cache=layer is not None,
            pending=0 if layer is None else layer.pending,
            in_place=in_place,
            transfer=teacher is not None,
            without=without,
        )
        with torch.autocast(q.device.type, enabled=False):
            y, state = self.mixer(x, None if layer is None else layer.state)
        if layer is not None:
            layer.store(state, time, valid, in_place)
        return rows.scatter(y) if rows is not None and isinstance(y, Tensor) else y

    def _in_place(self, layer: Any) -> bool:
        """Whether the next step of one token a row writes into the layer's state, which is made ready for it."""
        if torch.is_grad_enabled() or not layer.in_place or self.mixer.why_not_in_place() is not None:
            return False
        layer.own(self.mixer.with_room)
        return True


def _mode_of(mask: Any) -> Mode:
    """The mode captured when the forward's mask was made; a caller's own 4-D mask captured none."""
    return mask.attention_mode if hasattr(mask, "attention_mode") else MODE.get()


def attend_base(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
    """The model's own softmax attention, with the arguments it would have had without conversion."""
    name = base_attention(module.config)
    home = sys.modules[own_class(module).__module__]
    function: Callable = home.eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    kwargs.pop("linear_context", None)
    mask = mask.base(q.device) if hasattr(mask, "attention_mode") else mask
    return function(module, q, k, v, mask, **kwargs)


def rotate(module: nn.Module, q: Tensor, k: Tensor, rope: Any) -> tuple[Tensor, Tensor]:
    """Rotary embedding by the model's own function, for q and k that were taken before it."""
    source = sys.modules[own_class(module).__module__]
    if not getattr(module, "use_rope", True):
        return q, k
    return source.apply_rotary_pos_emb(q, k, *rope)


def own_class(module: nn.Module) -> type:
    """The model's own attention class, below ours."""
    return next(c for c in type(module).__mro__ if c.__dict__.get("linearize_source") is None)


@functools.cache
def linear_class(base: type) -> type:
    """The subclass of an attention class that runs a mixer; one for each base, so that pickle and deepcopy work."""
    name = f"Linear{base.__name__}_{SOURCE}"
    home = sys.modules[base.__module__]
    if not hasattr(home, name):
        names = tuple(inspect.signature(base.forward).parameters)[1:]
        fields = {"__module__": base.__module__, "argument_names": names, "linearize_source": SOURCE}
        setattr(home, name, type(name, (LinearAttention, base), fields))
    return getattr(home, name)


def _trampoline(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
    attend = getattr(module, "attend", None)
    return (attend or functools.partial(attend_base, module))(q, k, v, mask, **kwargs)


def _register() -> CurrentMode:
    """Register the two functions once for every version of the code, and share the mode among equal copies."""
    known = AttentionMaskInterface._global_mapping.get(NAME)
    if known is not None:
        return known.mode  # type: ignore[attr-defined]
    mode = CurrentMode(NAME)
    AttentionInterface.register(NAME, _trampoline)
    make_mask = functools.partial(_make_mask)
    make_mask.mode = mode  # type: ignore[attr-defined]
    AttentionMaskInterface.register(NAME, make_mask)
    return mode


MODE = _register()


def attach(attention: nn.Module, mixer: nn.Module) -> None:
    """Give an attention module its mixer: the class is swapped, weights, name and hooks stay."""
    if hasattr(attention, "mixer"):
        raise ConversionError(f"{type(attention).__name__}: already has a submodule named 'mixer'")
    attention.mixer = mixer
    _become(attention, linear_class(type(attention)))


def detach(attention: nn.Module) -> None:
    """Undo :func:`attach`."""
    del attention.mixer
    _become(attention, own_class(attention))


def _become(module: nn.Module, cls: type) -> None:
    module.__class__ = cls
    if "_old_forward" in vars(module):  # accelerate's hooks keep the forward that they wrap
        module._old_forward = types.MethodType(cls.forward, module)  # type: ignore[attr-defined]
