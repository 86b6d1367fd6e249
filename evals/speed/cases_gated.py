"""Liger and LAWCAT: gated recurrences whose gates and features are made in the kernel."""

from collections.abc import Callable
from typing import Any

import torch
from case import Case
from measure import NotRun
from torch import Tensor

from linearize.modeling import backend
from linearize.modeling.averaged import Averaged
from linearize.modeling.launches import Launch
from linearize.modeling.ops import averaged_attention, convolved_attention

H, G, K, F = 32, 8, 128, 128
GLA = Averaged(K**-0.5, 64, False, 16.0)
HGRN2 = Averaged(K**-0.5, 64, True, 1.0)
LAWCAT: dict[str, Any] = dict(steps=16.0, eps=1e-10)


def liger_inputs(batch: int, length: int, heads: int = H, groups: int = G) -> list[Tensor]:
    """q, k, v, and q, k before rotation."""
    torch.manual_seed(0)
    counts = (heads, groups, groups, heads, groups)
    return [torch.randn(batch, length, n, K, device="cuda", dtype=torch.bfloat16) for n in counts]


def lawcat_inputs(batch: int, length: int, heads: int = H, groups: int = G) -> list[Tensor]:
    """q, k, v, the gate's logits, taps and maps."""
    torch.manual_seed(0)
    tensors = [
        torch.randn(batch, length, n, K, device="cuda", dtype=torch.bfloat16) for n in (heads, groups, groups)
    ]
    logits = torch.randn(batch, length, groups, F, device="cuda")
    taps = [torch.randn(heads, K, 4, device="cuda") / 2 for _ in range(2)]
    weight = torch.randn(heads, K, F // 2, device="cuda") * K**-0.5
    return [*tensors, logits, *taps, weight, weight]


def liger(terms: Averaged) -> Callable[[int, int], Callable[[], Any]]:
    def make(batch: int, length: int) -> Callable[[], Any]:
        inputs = liger_inputs(batch, length)
        return lambda: averaged_attention(*inputs, terms)[0]

    return make


def liger_training(terms: Averaged) -> Callable[[int, int], Callable[[], Any]]:
    def make(batch: int, length: int) -> Callable[[], Any]:
        inputs = [x.requires_grad_() for x in liger_inputs(batch, length)]
        dy = torch.randn_like(inputs[0])
        return lambda: torch.autograd.grad(averaged_attention(*inputs, terms)[0], inputs, dy)

    return make


def lawcat(batch: int, length: int) -> Callable[[], Any]:
    inputs = lawcat_inputs(batch, length)

    @torch.no_grad()
    def run() -> Tensor:
        return convolved_attention(*inputs, **LAWCAT)[0]

    return run


def lawcat_training(batch: int, length: int) -> Callable[[], Any]:
    inputs = [x.requires_grad_() for x in lawcat_inputs(batch, length)[:7]]
    dy = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(convolved_attention(*inputs, inputs[6], **LAWCAT)[0], inputs, dy)


def close(one: Tensor, other: Tensor) -> None:
    gap, size = (one.double() - other.double()).norm(), other.double().norm()
    if not gap <= 1.5e-2 * size:
        raise AssertionError(f"differs by {gap / size:.3g} of its norm, 0.015 is allowed")


def check_liger(terms: Averaged) -> Callable[[], None]:
    def run() -> None:
        inputs = [x.requires_grad_() for x in liger_inputs(1, 700, 8, 2)]
        dy = torch.randn_like(inputs[0])
        exact = [x.detach().double().requires_grad_() for x in inputs]
        y, _ = averaged_attention(*inputs, terms)
        if backend.ran()["averaged_attention"] != "triton":
            # HGRN2 in half precision has none; GLA has.
            kind = NotRun if terms is HGRN2 else AssertionError
            raise kind(f"no kernel ran; {backend.ran()['averaged_attention']}")
        found = torch.autograd.grad(y, inputs, dy)
        with backend.reference_only():
            expected, _ = averaged_attention(*exact, terms)
            wished = torch.autograd.grad(expected, exact, dy.double())
        for one, other in zip((y, *found), (expected, *wished), strict=True):
            close(one, other)

    return run


def check_lawcat() -> None:
    inputs = [x.requires_grad_() for x in lawcat_inputs(1, 700, 8, 2)[:7]]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    dy = torch.randn_like(inputs[0])
    y, _ = convolved_attention(*inputs, inputs[6], **LAWCAT)
    found = torch.autograd.grad(y, inputs, dy)
    with backend.reference_only():
        expected, _ = convolved_attention(*exact, exact[6], **LAWCAT)
        wished = torch.autograd.grad(expected, exact, dy.double())
    for one, other in zip((y, *found), (expected, *wished), strict=True):
        close(one, other)


CASES = [
    Case("gated", "Liger-GLA forward, window 64", liger(GLA), check_liger(GLA), 1.2),
    Case("gated", "Liger-GLA forward+backward, window 64", liger_training(GLA), check_liger(GLA), 5.0),
    Case("gated", "Liger-HGRN2 forward, window 64", liger(HGRN2), check_liger(HGRN2)),
    Case("gated", "Liger-HGRN2 forward+backward, window 64", liger_training(HGRN2), check_liger(HGRN2)),
    Case("gated", "LAWCAT forward", lawcat, check_lawcat, 1.4),
    Case("gated", "LAWCAT forward+backward", lawcat_training, check_lawcat),
]


# Each kernel alone, with one launch setting.


def _liger_parts(batch: int, length: int, setting: Launch | None = None) -> dict[str, Any]:
    """What the kernels of a Liger layer hand to each other."""
    from linearize.modeling import triton_gated_liger_backward as back
    from linearize.modeling import triton_gated_liger_states as states

    q, k, v, q_plain, k_plain = liger_inputs(batch, length)
    shape = states.shape_of(q, k, v, setting)
    sums, decays, strong = states.tile_sums(k_plain, v, GLA, shape)
    fine, _ = states.scanned(sums, decays, shape, v.dtype)
    dy = torch.randn_like(q)
    behind, _ = back.back_tile_states(q_plain, k_plain, dy, GLA, shape)
    return locals()


def sweep_liger(kernel: str) -> Callable[[Launch, int, int], Callable[[], Any]]:
    def make(setting: Launch, batch: int, length: int) -> Callable[[], Any]:
        from linearize.modeling import triton_gated_liger as made
        from linearize.modeling import triton_gated_liger_backward as back
        from linearize.modeling import triton_gated_liger_states as states
        from linearize.modeling.triton_gated_window import window_keys, window_queries

        p = _liger_parts(batch, length, setting if kernel == "sums" else None)
        q, k, v, q_plain, k_plain, dy = (p[name] for name in ("q", "k", "v", "q_plain", "k_plain", "dy"))
        shape, strong, decays = p["shape"], p["strong"], p["decays"]
        inputs = (q_plain, k_plain, v, dy, decays)
        if kernel == "scan":
            return lambda: states.scanned(p["sums"], decays, shape, v.dtype, chosen=setting)
        if kernel == "sums":
            return lambda: states.tile_sums(k_plain, v, GLA, shape, setting)
        if kernel == "outputs":
            return lambda: made.outputs(
                q, k, v, q_plain, k_plain, decays, p["fine"], strong, GLA, shape, chosen=setting
            )
        if kernel == "back_sums":
            return lambda: back.back_tile_states(q_plain, k_plain, dy, GLA, shape, setting)
        if kernel == "queries":
            return lambda: back.queries(*inputs, p["fine"], strong, GLA, shape, setting)
        dv = torch.zeros_like(v)
        if kernel == "keys":
            return lambda: back.keys(*inputs, p["behind"], strong, dv, GLA, shape, setting)
        window: dict[str, Any] = dict(scale=GLA.scale, window=GLA.window, factor=GLA.mix_window)
        if kernel == "window_queries":
            return lambda: window_queries(q, k, v, dy, **window, chosen=setting)
        if kernel == "window_keys":
            _, lse, delta = window_queries(q, k, v, dy, **window)
            return lambda: window_keys(q, k, v, dy, lse, delta, **window, chosen=setting)
        _, change = back.queries(*inputs, p["fine"], strong, GLA, shape)
        dphi = back.keys(*inputs, p["behind"], strong, dv, GLA, shape)
        return lambda: back.gates(k_plain, dphi, change, p["fine"], p["behind"], strong, GLA, shape, setting)

    assert kernel in [*LIGER, "window_queries", "window_keys"]
    return make


LIGER = ("sums", "scan", "outputs", "back_sums", "queries", "keys", "gates")


def sweep_lawcat(kernel: str) -> Callable[[Launch, int, int], Callable[[], Any]]:
    @torch.no_grad()
    def make(setting: Launch, batch: int, length: int) -> Callable[[], Any]:
        from linearize.modeling import triton_gated_convolved as back
        from linearize.modeling import triton_gated_lawcat as made
        from linearize.modeling import triton_gated_mapped as inputs

        layer, steps = inputs.layer_of(*lawcat_inputs(batch, length)), LAWCAT["steps"]
        if kernel == "maps":
            return lambda: inputs.half_logits(layer.q, layer.taps_q, layer.map_q, setting)
        if kernel == "maps_shared":
            return lambda: inputs.half_logits(layer.k, layer.taps_k, layer.map_k, setting)
        if kernel == "gates":
            return lambda: inputs.gates(layer.logits, layer.v, steps, setting)
        mapped = inputs.mapped(layer, steps)
        if kernel == "states":  # both walks

            def states_of() -> Any:
                states, _ = made.before_segments(mapped, setting)
                return made.tile_states(mapped, states, chosen=setting)

            return states_of
        done, _ = made.forward(layer, **LAWCAT, save=True)
        assert done.den is not None
        before = made.tile_states(mapped, (done.states, done.states_z))[:2]
        if kernel == "outputs":
            return lambda: made.outputs(mapped, *before, eps=LAWCAT["eps"], chosen=setting)
        dy = torch.randn_like(done.y)
        e = back.shares(dy, done.y, done.den)
        given = (dy, done.den, e)
        if kernel == "back_states":
            return lambda: back.back_tile_states(mapped, *given, done.totals, setting)
        if kernel == "queries":
            return lambda: back.queries(mapped, *given, *before, setting)
        behind = back.back_tile_states(mapped, *given, done.totals)
        if kernel == "values":
            return lambda: back.values(mapped, dy, done.den, behind[0], setting)
        _, change = back.queries(mapped, *given, *before)
        return lambda: back.keys(mapped, *given, *behind, *before, change, setting)

    return make


def sweep_scan(setting: Launch, batch: int, length: int) -> Callable[[], Any]:
    from linearize.modeling.triton_gated import scan

    totals = -torch.rand(batch, G, length // 256, F, device="cuda")
    sums = torch.randn(*totals.shape, K, device="cuda")
    return lambda: scan(sums, totals, chosen=setting)


SWEEPS = {
    "gated_scan": sweep_scan,
    **{f"gated_liger_{kernel}": sweep_liger(kernel) for kernel in LIGER},
    "gated_window_queries": sweep_liger("window_queries"),
    "gated_window_keys": sweep_liger("window_keys"),
    **{
        f"gated_lawcat_{kernel}": sweep_lawcat(kernel)
        for kernel in (
            "maps",
            "maps_shared",
            "gates",
            "states",
            "outputs",
            "back_states",
            "queries",
            "keys",
            "values",
        )
    },
}
