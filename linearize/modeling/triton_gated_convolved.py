"""Gradients of LAWCAT's layer, its kernels launched one after the other, and the operation with both directions.

The kernels end at a = q^ W (``triton_gated_lawcat_backward.py``): the gradients of maps, taps, q and k follow from that
of a (``triton_gated_taps.py``), and what heads share is summed over them last, in torch.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from .launches import Launch
from .triton_gated import blocks, gated_dtype, scan, steps_of
from .triton_gated_lawcat import Layer, States, forward, layer_of, taps_of, tile_states
from .triton_gated_lawcat_backward import back_states_kernel, keys_kernel, queries_kernel, values_kernel
from .triton_gated_taps import before_a
from .triton_together import compiled_together


def backward(
    layer: Layer, made: States, dy: Tensor, *, steps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a of q and of k [B, T, H, f], of v, and of the gate's logits."""
    dy = dy.contiguous()
    assert made.den is not None
    e = (dy.float() * made.y).sum(dim=-1) / made.den
    before, before_z, strong = tile_states(layer, made.states, made.states_z, steps)
    behind, behind_z = back_tile_states(layer, dy, made.den, e, made.totals, steps)
    shared = (dy, made.den, e)
    da_q, change = queries(layer, *shared, before, before_z, strong, steps)
    da_k, of_gate = keys(layer, *shared, behind, behind_z, before, before_z, strong, change, steps)
    dv = values(layer, dy, made.den, behind, strong, steps)
    of_gate = of_gate.unflatten(2, (layer.k.shape[2], -1)).sum(dim=3, dtype=torch.float32)
    return da_q, da_k, dv, of_gate * torch.sigmoid(-layer.logits.float()) / steps


def back_tile_states(
    layer: Layer,
    dy: Tensor,
    den: Tensor,
    e: Tensor,
    totals: Tensor,
    steps: float,
    chosen: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """(R [B, H, tiles, F, V], r [B, H, tiles, F] fp32) behind every tile."""
    batch, time, heads = layer.q.shape[:3]
    segments, width, value_dim = totals.shape[2], totals.shape[3], layer.v.shape[3]
    tiles, sizes = triton.cdiv(time, layer.sizes["C"]), layer.sizes
    sums = totals.new_empty(batch, heads, segments, width, value_dim)
    sums_z = totals.new_empty(batch, heads, segments, width, 1)
    stored = gated_dtype(layer.v.dtype)[1]
    fine = torch.empty(batch, heads, tiles, width, value_dim, dtype=stored, device=dy.device)
    fine_z = totals.new_empty(batch, heads, tiles, width)
    states = (sums, sums_z)
    _, options = blocks("gated_lawcat_back_states", dy, chosen)
    for mode in ("sums", "fine"):
        back_states_kernel[(segments, heads, batch)](
            layer.q, layer.logits, layer.taps_q, layer.map_q, dy, den, e, sums, sums_z, *states, fine, fine_z,
            *steps_of(layer.q), *steps_of(layer.logits), time, segments, 1.0 / steps,
            **sizes, TAPS_Q=taps_of(layer.taps_q), CS=blocks("gated_lawcat_states", dy)[0]["CS"], MODE=mode,
            **options,
        )  # fmt: skip
        if mode == "sums":
            states = (scan(sums, totals, reverse=True), scan(sums_z, totals, reverse=True))
    return fine, fine_z


def _launch(
    name: str, kernel: Any, layer: Layer, tensors: tuple[Tensor, ...], outputs: tuple[Tensor, ...], strong: Tensor,
    steps: float, chosen: Launch | None,
) -> None:  # fmt: skip
    """Both kernels of a tile and head."""
    batch, time, heads = layer.q.shape[:3]
    strides = (x for x in (layer.q, layer.k, layer.v, layer.logits) for x in steps_of(x))
    numbers = (*strides, time, 1.0 / steps)
    constants = {**layer.sizes, "TAPS_Q": taps_of(layer.taps_q), "TAPS_K": taps_of(layer.taps_k)}
    for is_strong in (False, True):
        _, options = blocks(name + "_strong" * is_strong, layer.v, None if is_strong else chosen)
        kernel[(strong.shape[2], heads, batch)](
            *layer, *tensors, strong, *outputs, *numbers, **constants, STRONG=is_strong, **options
        )


def queries(
    layer: Layer, dy: Tensor, den: Tensor, e: Tensor, before: Tensor, before_z: Tensor, strong: Tensor, steps: float,
    chosen: Launch | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(gradient of a of q, phi_q dphi_q [B, T, H, F])."""
    shape = layer.q.shape[:3]
    da = torch.empty(*shape, layer.map_q.shape[2], dtype=before.dtype, device=dy.device)
    change = torch.empty(*shape, layer.logits.shape[3], dtype=before.dtype, device=dy.device)
    tensors = (dy, den, e, before, before_z)
    _launch("gated_lawcat_queries", queries_kernel, layer, tensors, (da, change), strong, steps, chosen)
    return da, change


def keys(
    layer: Layer, dy: Tensor, den: Tensor, e: Tensor, behind: Tensor, behind_z: Tensor, before: Tensor,
    before_z: Tensor, strong: Tensor, change: Tensor, steps: float, chosen: Launch | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(gradient of a of k, dlog a [B, T, H, F] of every head)."""
    da = torch.empty(*layer.q.shape[:3], layer.map_k.shape[2], dtype=behind.dtype, device=dy.device)
    of_gate = torch.empty_like(change)
    tensors = (dy, den, e, behind, behind_z, before, before_z)
    outputs = (change, da, of_gate)
    _launch("gated_lawcat_keys", keys_kernel, layer, tensors, outputs, strong, steps, chosen)
    return da, of_gate


def values(
    layer: Layer,
    dy: Tensor,
    den: Tensor,
    behind: Tensor,
    strong: Tensor,
    steps: float,
    chosen: Launch | None = None,
) -> Tensor:
    batch, time, heads = layer.q.shape[:3]
    dv = torch.empty(batch, time, heads, layer.v.shape[3], dtype=behind.dtype, device=dy.device)
    for is_strong in (False, True):
        _, options = blocks("gated_lawcat_values" + "_strong" * is_strong, dy, None if is_strong else chosen)
        values_kernel[(strong.shape[2], heads, batch)](
            layer.q, layer.k, *layer[3:], dy, den, behind, strong, dv,
            *steps_of(layer.q), *steps_of(layer.k), *steps_of(layer.logits), time, 1.0 / steps,
            **layer.sizes, TAPS_Q=taps_of(layer.taps_q), TAPS_K=taps_of(layer.taps_k), STRONG=is_strong, **options,
        )  # fmt: skip
    per_head = dv.unflatten(2, (layer.k.shape[2], -1))
    return per_head.sum(dim=3, dtype=torch.float32).to(layer.v.dtype)


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
