"""Kept and routed attention: Salient and STILL with their selection, and the attention that a token gets later."""

from collections.abc import Callable
from typing import Any

import torch
from case import Case
from torch import Tensor

from linearize.modeling import backend
from linearize.modeling.feature_maps import NormPreserved
from linearize.modeling.launches import Launch
from linearize.modeling.mixer import Geometry, MixerInput
from linearize.modeling.ops import future_attention, kept_attention, routed_prefill, self_saliency
from linearize.modeling.selection import rounded
from linearize.modeling.still import StillConfig, StillMixer

H, G, K, CHUNK = 32, 8, 128, 64
SCALE = K**-0.5


def inputs(batch: int, length: int, heads: int = H, groups: int = G) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(batch, length, n, K, device="cuda", dtype=torch.bfloat16) for n in (heads, groups, groups)
    )
    return q, k, v


def scores(batch: int, length: int, groups: int = G) -> Tensor:
    score = rounded(torch.randn(batch, length, groups, device="cuda"))
    score[:, 0] = torch.inf
    return score


def salient(budget: int, backward: bool = False) -> Callable[[int, int], Callable[[], Any]]:
    def make(batch: int, length: int) -> Callable[[], Any]:
        q, k, v = (x.requires_grad_(backward) for x in inputs(batch, length))
        score = scores(batch, length)

        def forward() -> Tensor:
            return kept_attention(q, k, v, score, scale=SCALE, chunk=CHUNK, size=budget + 1)

        if not backward:
            return forward
        dy = torch.randn_like(q)
        return lambda: torch.autograd.grad(forward(), (q, k, v), dy)

    return make


def still(budget: int) -> Callable[[int, int], Callable[[], Any]]:
    """The whole mixer but for its gate's projection: score, selection, maps and attention."""

    def make(batch: int, length: int) -> Callable[[], Any]:
        q, k, v = inputs(batch, length)
        mixer = StillMixer(StillConfig(budget=budget), Geometry(H, G, K, K, 8)).cuda()
        gate = torch.rand(batch, length, H, K, device="cuda", dtype=torch.bfloat16)
        mixer._gate = lambda x: gate
        x = MixerInput(torch.zeros(batch, length, 8, device="cuda"), q, k, v, SCALE)

        def forward() -> Tensor:
            with torch.no_grad():
                return mixer(x)[0]

        return forward

    return make


def still_training(batch: int, length: int) -> Callable[[], Any]:
    """Every gradient of the attention alone: q, k, v, maps and gate."""
    q, k, v = (x.requires_grad_() for x in inputs(batch, length))
    maps = [NormPreserved(H, K, 2 * K).cuda() for _ in range(2)]
    gate = torch.rand_like(q).requires_grad_()
    score, dy = scores(batch, length, H), torch.randn_like(q)
    leaves = [q, k, v, gate, *(x for m in maps for x in m.parameters())]

    def both() -> Any:
        y, _ = routed_prefill(q, k, v, *maps, score, gate, scale=SCALE, chunk=CHUNK, picks=4, size=256)
        return torch.autograd.grad(y, leaves, dy)

    return both


def future(batch: int, length: int) -> Callable[[], Any]:
    q, k, _ = inputs(batch, length)
    return lambda: future_attention(q, k, scale=SCALE, chunk=CHUNK)


def saliency(batch: int, length: int) -> Callable[[], Any]:
    q, k, _ = inputs(batch, length)
    return lambda: self_saliency(q, k, scale=SCALE, window=CHUNK)


def close(one: Tensor, other: Tensor, relative: bool = False) -> None:
    difference = (one.double() - other.double()).norm() if relative else (one.double() - other).abs().max()
    bound = 1.5e-2 * (other.double().norm() if relative else max(1.0, other.abs().max()))
    if not difference <= bound:
        raise AssertionError(f"differs by {difference:.3g}, {bound:.3g} is allowed")


def check_salient() -> None:
    tensors, score = [x.requires_grad_() for x in inputs(1, 1000, 8, 2)], scores(1, 1000, 2)
    dy = torch.randn_like(tensors[0])
    y = kept_attention(*tensors, score, scale=SCALE, chunk=CHUNK, size=129)
    found = torch.autograd.grad(y, tensors, dy)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    with backend.reference_only():
        expected = kept_attention(*exact, score.double(), scale=SCALE, chunk=CHUNK, size=129)
    close(y, expected)
    for one, other in zip(found, torch.autograd.grad(expected, exact, dy.double()), strict=True):
        close(one, other, relative=True)


def check_still() -> None:
    maps = [NormPreserved(8, K, 2 * K, "kaiming").cuda() for _ in range(2)]
    given, score = inputs(1, 1000, 8, 2), scores(1, 1000, 8)
    gate = torch.rand(1, 1000, 8, K, device="cuda")
    with torch.no_grad():
        y = routed_prefill(*given, *maps, score, gate, scale=SCALE, chunk=CHUNK, picks=4, size=16)[0]
        with backend.reference_only():
            exact = [x.double() for x in given], [x.double() for x in maps], [score.double(), gate.double()]
            expected = routed_prefill(
                *(x for part in exact for x in part), scale=SCALE, chunk=CHUNK, picks=4, size=16
            )[0]
    close(y, expected)


def check_scores() -> None:
    q, k, _ = inputs(1, 700, 4, 2)
    found = future_attention(q, k, scale=SCALE, chunk=CHUNK), self_saliency(q, k, scale=SCALE, window=CHUNK)
    q, k = q.double(), k.double()
    with backend.reference_only():
        close(found[0], future_attention(q, k, scale=SCALE, chunk=CHUNK))
        close(found[1], self_saliency(q, k, scale=SCALE, window=CHUNK))


CASES = [
    Case("selected", "Salient forward, N = 256", salient(256), check_salient, 1.5),
    Case("selected", "Salient forward, N = 1024", salient(1024), check_salient),
    Case("selected", "Salient forward+backward, N = 256", salient(256, True), check_salient),
    Case("selected", "STILL forward, N = 256", still(256), check_still, 1.8),
    Case("selected", "STILL forward, N = 1024", still(1024), check_still, 3.0),
    Case(
        "selected",
        "STILL forward+backward, N = 256",
        still_training,
        check_still,
        lengths=(2048, 8192, 32768),
    ),
    Case("selected", "future attention", future, check_scores, lengths=(2048, 8192, 32768)),
    Case("selected", "self-saliency", saliency, check_scores),
]


# Each kernel alone, with one launch setting.


def _sets(batch: int, length: int) -> Any:
    from linearize.modeling.triton_selected import running_sets

    return running_sets(scores(batch, length), chunk=CHUNK, size=257)


def sweep_forward(setting: Launch, batch: int, length: int) -> Callable[[], Any]:
    from linearize.modeling.triton_selected_kept import kept_forward

    q, k, v = inputs(batch, length)
    sets = _sets(batch, length)
    return lambda: kept_forward(q, k, v, sets, scale=SCALE, chunk=CHUNK, setting=setting)


def sweep_backward(kernel: str) -> Callable[[Launch, int, int], Callable[[], Any]]:
    """The whole backward pass, where one of its kernels has another setting."""

    def make(setting: Launch, batch: int, length: int) -> Callable[[], Any]:
        from linearize.modeling.triton_selected_kept import kept_forward
        from linearize.modeling.triton_selected_kept_backward import kept_backward

        q, k, v = inputs(batch, length)
        sets, score, dy = _sets(batch, length), scores(batch, length), torch.randn_like(q)
        y, lse = kept_forward(q, k, v, sets, scale=SCALE, chunk=CHUNK)
        return lambda: kept_backward(
            q, k, v, score, sets, y, lse, dy, scale=SCALE, chunk=CHUNK, settings={kernel: setting}
        )

    return make


def sweep_sets(kernel: str) -> Callable[[Launch, int, int], Callable[[], Any]]:
    def make(setting: Launch, batch: int, length: int) -> Callable[[], Any]:
        from linearize.modeling.triton_selected import running_sets

        score = scores(batch, length)
        return lambda: running_sets(score, chunk=CHUNK, size=257, settings={kernel: setting})

    return make


def sweep_future(kernel: str) -> Callable[[Launch, int, int], Callable[[], Any]]:
    def make(setting: Launch, batch: int, length: int) -> Callable[[], Any]:
        from linearize.modeling import triton_selected_future as kernels

        q, k, _ = inputs(batch, length)
        return lambda: kernels.future_attention(q, k, scale=SCALE, chunk=CHUNK, settings={kernel: setting})

    return make


def sweep_saliency(setting: Launch, batch: int, length: int) -> Callable[[], Any]:
    from linearize.modeling import triton_selected_future as kernels

    q, k, _ = inputs(batch, length)
    return lambda: kernels.self_saliency(q, k, scale=SCALE, window=CHUNK, setting=setting)


def sweep_routed(kernel: str) -> Callable[[Launch, int, int], Callable[[], Any]]:
    """The whole forward pass, where one of its kernels has another setting."""

    def make(setting: Launch, batch: int, length: int) -> Callable[[], Any]:
        from linearize.modeling.triton_selected import running_sets
        from linearize.modeling.triton_selected_routed import routed_forward

        q, k, v = inputs(batch, length)
        w = torch.randn(H, K, K, device="cuda", dtype=torch.bfloat16) / K**0.5
        sets = running_sets(scores(batch, length, H), chunk=CHUNK, size=256, picks=4)
        gate = torch.rand_like(q)
        return lambda: routed_forward(
            q, k, v, w, w, sets, gate,
            scale=SCALE, chunk=CHUNK, norm=True, eps=1e-6, settings={kernel: setting},
        )  # fmt: skip

    return make


def sweep_routed_backward(kernel: str) -> Callable[[Launch, int, int], Callable[[], Any]]:
    def make(setting: Launch, batch: int, length: int) -> Callable[[], Any]:
        from linearize.modeling import launches

        rows, call = launches.TABLE, still_training(batch, length)

        def both() -> Any:
            kept = rows[kernel]
            rows[kernel] = [setting]
            try:
                return call()
            finally:
                rows[kernel] = kept

        return both

    return make


SWEEPS = {
    "selected_ranks": sweep_sets("selected_ranks"),
    "selected_replay": sweep_sets("selected_replay"),
    "selected_kept_forward": sweep_forward,
    **{
        name: sweep_backward(name) for name in ("selected_kept_dq", "selected_kept_dkv", "selected_local_dkv")
    },
    **{name: sweep_future(name) for name in ("selected_row_sums", "selected_column_max")},
    "selected_saliency": sweep_saliency,
    **{
        name: sweep_routed_backward(name)
        for name in ("selected_routed_dq", "selected_reverse", "selected_features", "selected_values")
    },
    **{name: sweep_routed(name) for name in ("selected_states", "selected_outputs")},
}
