"""Gradients of LAWCAT's layer, its kernels launched one after the other, and the operation with both directions.

The kernels end at a = q^ W (``triton_gated_lawcat_backward.py``): the gradients of maps, taps, q and k follow from that
of a (``triton_gated_taps.py``), and what heads share is summed over them last, in torch.
"""

from typing import Any

import torch
from torch import Tensor

from .launches import Launch, cdiv
from .triton_gated import blocks, gated_dtype, padded, scan, steps_of
from .triton_gated_lawcat import States, forward, segments_of, tile_states
from .triton_gated_lawcat_backward import (
    back_states_kernel,
    keys_kernel,
    queries_kernel,
    shares_kernel,
    values_kernel,
)
from .triton_gated_mapped import Layer, Mapped, layer_of, mapped
from .triton_gated_taps import before_a
from .triton_together import compiled_together

SHARES = 64  # tokens and heads of a program


def backward(
    layer: Layer, done: States, dy: Tensor, *, steps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a of q and of k [B, T, H, f], of v, and of the gate's logits."""
    dy = dy.contiguous()
    assert done.den is not None
    made = mapped(layer, steps)
    shared = (dy, done.den, shares(dy, done.y, done.den))
    before, before_z, _ = tile_states(made, (done.states, done.states_z))
    behind, behind_z = back_tile_states(made, *shared, done.totals)
    da_q, change = queries(made, *shared, before, before_z)
    da_k, of_gate = keys(made, *shared, behind, behind_z, before, before_z, change)
    dv = values(made, dy, done.den, behind)
    of_gate = of_gate.unflatten(2, (layer.k.shape[2], -1)).sum(dim=3, dtype=torch.float32)
    return da_q, da_k, dv, of_gate * torch.sigmoid(-layer.logits.float()) / steps


def shares(dy: Tensor, y: Tensor, den: Tensor) -> Tensor:
    """e [B, T, H] fp32 = dy . y / den."""
    e, size = torch.empty_like(den), padded(y.shape[3])
    shares_kernel[(cdiv(den.numel(), SHARES),)](dy, y, den, e, den.numel(), V=y.shape[3], VP=size, BT=SHARES)
    return e


def back_tile_states(
    made: Mapped, dy: Tensor, den: Tensor, e: Tensor, totals: Tensor, chosen: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """(R [B, H, tiles, F, V], r [B, H, tiles, F] fp32) behind every tile."""
    (batch, time, heads), width, value_dim = made.shape, made.running.shape[3], made.v.shape[3]
    (count, size), exact = segments_of(made), made.running
    fine = dy.new_empty(batch, heads, made.tiles, width, value_dim, dtype=gated_dtype(made.v.dtype)[1])
    fine_z = exact.new_empty(batch, heads, made.tiles, width)
    sums = exact.new_empty(batch, heads, count, width, value_dim) if count > 1 else exact
    sums_z = exact.new_empty(batch, heads, count, width, 1) if count > 1 else exact
    states = (sums, sums_z)
    _, options = blocks("gated_lawcat_back_states", dy, chosen)
    for mode in ("sums", "fine") if count > 1 else ("fine",):
        back_states_kernel[(2 * heads, count, batch)](
            made.a_q, made.norms_q, made.running, dy, den, e, sums, sums_z, *states, fine, fine_z, time, count, size,
            **made.sizes, MODE=mode, STARTS=count > 1, **options,
        )  # fmt: skip
        if mode == "sums":
            states = (scan(sums, totals, reverse=True), scan(sums_z, totals, reverse=True))
    return fine, fine_z


def _launch(name: str, kernel: Any, made: Mapped, tensors: tuple[Tensor, ...], chosen: Launch | None) -> None:
    """Both kernels of a tile and head."""
    batch, time, heads = made.shape
    for is_strong in (False, True):
        _, options = blocks(name + "_strong" * is_strong, made.v, None if is_strong else chosen)
        kernel[(heads, made.tiles, batch)](
            *made, *tensors, *steps_of(made.v), time, **made.sizes, STRONG=is_strong, **options
        )


def queries(
    made: Mapped, dy: Tensor, den: Tensor, e: Tensor, before: Tensor, before_z: Tensor, chosen: Launch | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(gradient of a of q, phi_q dphi_q [B, T, H, F])."""
    shape = made.shape
    da = torch.empty(*shape, made.a_q.shape[3], dtype=before.dtype, device=dy.device)
    change = torch.empty(*shape, made.running.shape[3], dtype=before.dtype, device=dy.device)
    tensors = (dy, den, e, before, before_z, da, change)
    _launch("gated_lawcat_queries", queries_kernel, made, tensors, chosen)
    return da, change


def keys(
    made: Mapped, dy: Tensor, den: Tensor, e: Tensor, behind: Tensor, behind_z: Tensor, before: Tensor,
    before_z: Tensor, change: Tensor, chosen: Launch | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(gradient of a of k, dlog a [B, T, H, F] of every head)."""
    da = torch.empty(*made.shape, made.a_k.shape[3], dtype=behind.dtype, device=dy.device)
    of_gate = torch.empty_like(change)
    tensors = (dy, den, e, behind, behind_z, before, before_z, change, da, of_gate)
    _launch("gated_lawcat_keys", keys_kernel, made, tensors, chosen)
    return da, of_gate


def values(made: Mapped, dy: Tensor, den: Tensor, behind: Tensor, chosen: Launch | None = None) -> Tensor:
    batch, time, heads = made.shape
    dv = torch.empty(batch, time, heads, made.v.shape[3], dtype=behind.dtype, device=dy.device)
    for is_strong in (False, True):
        _, options = blocks("gated_lawcat_values" + "_strong" * is_strong, dy, None if is_strong else chosen)
        values_kernel[(heads, made.tiles, batch)](
            *made[:-1], dy, den, behind, dv, time, **made.sizes, STRONG=is_strong, **options
        )
    per_head = dv.unflatten(2, (made.v.shape[2], -1))
    return per_head.sum(dim=3, dtype=torch.float32).to(made.v.dtype)


class _Convolved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, logits, taps_q, taps_k, map_q, map_k, steps, eps, stop):
        layer = layer_of(q, k, v, logits, taps_q, taps_k, map_q, map_k)
        made, last = forward(layer, steps=steps, eps=eps, stop=stop, save=any(ctx.needs_input_grad))
        ctx.save_for_backward(q, k, v, logits, taps_q, taps_k, map_q, map_k, *made)
        ctx.steps = steps
        if last is not None:
            ctx.mark_non_differentiable(last)
        return made.y, last

    @staticmethod
    def backward(ctx, dy, _):
        q, k, v, logits, taps_q, taps_k, map_q, map_k, *made = ctx.saved_tensors
        layer = layer_of(q, k, v, logits, taps_q, taps_k, map_q, map_k)
        da_q, da_k, dv, dlogits = backward(layer, States(*made), dy, steps=ctx.steps)
        dq, dtaps_q, dmap_q = before_a(layer.q, layer.taps_q, map_q, da_q)
        dk, dtaps_k, dmap_k = before_a(layer.k, layer.taps_k, map_k, da_k)
        found = (dq, dk, dv, dlogits, dtaps_q, dtaps_k, dmap_q, dmap_k)
        like = (q, k, v, logits, taps_q, taps_k, map_q, map_k)
        return (
            *(x if x is None else x.to(y.dtype) for x, y in zip(found, like, strict=True)),
            None,
            None,
            None,
        )


@compiled_together
def convolved_kernel(
    q: Tensor, k: Tensor, v: Tensor, logits: Tensor, taps_q: Tensor | None, taps_k: Tensor | None, map_q: Tensor,
    map_k: Tensor, *, steps: float, eps: float, stop: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``convolved.convolved_composed``; no gradient flows through the state."""
    inputs = (q, k, v, logits, taps_q, taps_k, map_q, map_k)
    return _Convolved.apply(*inputs, steps, eps, stop)  # pyright: ignore[reportReturnType]
