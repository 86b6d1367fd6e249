"""``mapped.py`` by kernels: the same functions and gradients."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .feature_maps import FeatureMap
from .mapped import as_fit
from .mixer import Fit
from .tiles import State
from .triton_joint import Forward, joint_forward
from .triton_joint_backward import Gradients, joint_backward
from .triton_joint_sums import Sums, last_contiguous
from .triton_together import compiled_together


@compiled_together
def mapped_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    map_q: FeatureMap,
    map_k: FeatureMap,
    window_factor: Tensor,
    linear_factor: Tensor | None = None,
    *,
    scale: float,
    window: int | None,
    window_kind: str = "sliding",
    softcap: float | None = None,
    state: State | None = None,
    stop: Tensor | None = None,
) -> tuple[Tensor, State | None]:
    """``mapped_composed``."""
    terms = dict(scale=scale, window=window, terraced=window_kind == "terraced")
    if stop is not None or state is not None or not torch.is_grad_enabled():
        parts = _parts(q, k, v, map_q.weight, map_k.weight, window_factor, linear_factor)
        with torch.no_grad():
            done = joint_forward(*parts, **terms, state=state, stop=stop, final=stop is not None)
        return done.y, done.sums.final
    y = Joint.apply(q, k, v, map_q.weight, map_k.weight, window_factor, linear_factor, terms)
    return y, None  # type: ignore[return-value]


@compiled_together
def mapped_error_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    map_q: FeatureMap,
    map_k: FeatureMap,
    window_factor: Tensor,
    linear_factor: Tensor | None = None,
    *,
    teacher: Tensor,
    lengths: Tensor | None = None,
    scale: float,
    window: int | None,
    window_kind: str = "sliding",
    softcap: float | None = None,
) -> Fit:
    """``mapped_error_composed``; only maps and factors have gradients."""
    terms = dict(scale=scale, window=window, terraced=window_kind == "terraced", lengths=lengths)
    parts = (q, k, v, map_q.weight, map_k.weight, window_factor, linear_factor)
    error, power = Transfer.apply(*parts, teacher, terms)  # type: ignore[misc]
    return as_fit(error, power, teacher, lengths)


def _parts(q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, g: Tensor, b: Tensor | None) -> Any:
    """The tensors as the kernels read them."""
    q, k, v = (last_contiguous(x) for x in (q, k, v))
    maps = (w.detach().to(q.dtype).contiguous() for w in (w_q, w_k))
    return (
        q,
        k,
        v,
        *maps,
        g.detach().float().contiguous(),
        None if b is None else b.detach().float().contiguous(),
    )


class Joint(torch.autograd.Function):
    """y [B, T, H, V] with every gradient."""

    @staticmethod
    def forward(ctx: Any, q, k, v, w_q, w_k, g, b, terms) -> Tensor:
        parts = _parts(q, k, v, w_q, w_k, g, b)
        done = joint_forward(*parts, **terms, save=any(ctx.needs_input_grad))
        ctx.terms = terms
        _save(ctx, parts, done)
        return done.y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        parts, done = _saved(ctx)
        need = ctx.needs_input_grad
        maps, inputs = any(need[3:5]), any(need[:3])
        found = joint_backward(gradients[0], *parts, done, **ctx.terms, maps=maps, inputs=inputs)
        return (found.q, found.k, found.v, *_on_parameters(found, parts, need), None)


class Transfer(torch.autograd.Function):
    """(sum of (y - teacher)^2, sum of teacher^2) over real tokens, with the gradients of maps and factors."""

    @staticmethod
    def forward(ctx: Any, q, k, v, w_q, w_k, g, b, teacher, terms) -> tuple[Tensor, Tensor]:
        parts = _parts(q, k, v, w_q, w_k, g, b)
        done = joint_forward(*parts, **terms, save=True, teacher=last_contiguous(teacher))
        assert done.loss is not None
        ctx.terms = {name: value for name, value in terms.items() if name != "lengths"}
        _save(ctx, parts, done)
        error, power = done.loss
        ctx.mark_non_differentiable(power)
        return error, power

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        parts, done = _saved(ctx)
        found = joint_backward(done.y, *parts, done, **ctx.terms, maps=True, inputs=False)
        twice = 2 * gradients[0]
        on = _on_parameters(found, parts, ctx.needs_input_grad)
        return (None, None, None, *(x if x is None else x * twice for x in on), None, None)


def _save(ctx: Any, parts: Any, done: Forward) -> None:
    """Every tensor goes through ``save_for_backward``, where checkpointing and offloading look for them."""
    sums = done.sums
    ctx.tiles = sums.run, sums.every
    ctx.save_for_backward(*parts, done.y, done.inverse, done.level, done.best, done.e, *sums[:4])


def _saved(ctx: Any) -> tuple[Any, Forward]:
    *parts, y, inverse, level, best, e, S, Z, base_S, base_Z = ctx.saved_tensors
    return parts, Forward(y, inverse, level, best, e, None, Sums(S, Z, base_S, base_Z, *ctx.tiles))


def _on_parameters(found: Gradients, parts: Any, need: Any) -> list[Tensor | None]:
    """Gradients of both maps and both factors."""
    g, b = parts[5], parts[6]
    share = found.c.sum((0, 2)) if need[5] or need[6] else None
    return [
        found.w_q if need[3] else None,
        found.w_k if need[4] else None,
        share / g if need[5] and share is not None else None,
        -share / b if need[6] and b is not None and share is not None else None,
    ]
