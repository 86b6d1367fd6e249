"""LoLCATs and linear attention: window and linear remainder under one normaliser, with the map inside."""

from collections.abc import Callable
from typing import Any

import torch
from case import Case
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from linearize.modeling import backend
from linearize.modeling.feature_maps import Hedgehog
from linearize.modeling.launches import Launch
from linearize.modeling.ops import mapped_attention, mapped_error
from linearize.modeling.tuned import using

H, G, K, F = 32, 8, 128, 128
SCALE = K**-0.5


def inputs(batch: int, length: int, heads: int = H, groups: int = G) -> tuple[list[Tensor], list[Any]]:
    """q, k, v, and both maps with the window's factor."""
    torch.manual_seed(0)
    tensors = [
        torch.randn(batch, length, n, K, device="cuda", dtype=torch.bfloat16) for n in (heads, groups, groups)
    ]
    maps = [Hedgehog(heads, K, F, "kaiming").cuda() for _ in range(2)]
    return tensors, [*maps, torch.rand(heads, device="cuda", requires_grad=True)]


def terms(window: int | None, kind: str) -> dict[str, Any]:
    return dict(scale=SCALE, window=window, window_kind=kind)


def forward(window: int | None = 64, kind: str = "sliding") -> Callable[[int, int], Callable[[], Any]]:
    def make(batch: int, length: int) -> Callable[[], Any]:
        tensors, parts = inputs(batch, length)

        @torch.no_grad()
        def run() -> Tensor:
            return mapped_attention(*tensors, *parts, **terms(window, kind))[0]

        return run

    return make


def full(maps: bool, kind: str = "sliding") -> Callable[[int, int], Callable[[], Any]]:
    """Forward and backward to q, k, v; with ``maps`` to the maps and the factor too."""

    def make(batch: int, length: int) -> Callable[[], Any]:
        tensors, parts = inputs(batch, length)
        tensors = [x.requires_grad_() for x in tensors]
        dy = torch.randn_like(tensors[0])
        if not maps:
            parts = [parts[0].requires_grad_(False), parts[1].requires_grad_(False), parts[2].detach()]
        wanted = [*tensors, parts[0].weight, parts[1].weight, parts[2]] if maps else tensors

        def run() -> Any:
            y, _ = mapped_attention(*tensors, *parts, **terms(64, kind))
            return torch.autograd.grad(y, wanted, dy)

        return run

    return make


def transfer(kind: str = "sliding", teacher: bool = True) -> Callable[[int, int], Callable[[], Any]]:
    """The teacher's softmax, the student's error, and the gradients of the maps and of the factor."""

    def make(batch: int, length: int) -> Callable[[], Any]:
        (q, k, v), parts = inputs(batch, length)
        given = torch.randn_like(q)

        def run() -> Any:
            target = given
            if teacher:
                heads = (x.transpose(1, 2) for x in (q, k, v))
                target = scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)
            error, power = mapped_error(q, k, v, *parts, teacher=target, **terms(64, kind))
            return torch.autograd.grad(error / power, [parts[0].weight, parts[1].weight, parts[2]])

        return run

    return make


def close(one: Tensor, other: Tensor) -> None:
    gap, size = (one.double() - other.double()).norm(), other.double().norm()
    if not gap <= 1.5e-2 * size:
        raise AssertionError(f"differs by {gap / size:.3g} of its norm, 0.015 is allowed")


def check(window: int | None = 64, kind: str = "sliding") -> Callable[[], None]:
    def run() -> None:
        tensors, parts = inputs(1, 700, 8, 2)
        tensors = [x.requires_grad_() for x in tensors]
        dy = torch.randn_like(tensors[0])
        exact = [x.detach().double().requires_grad_() for x in tensors]
        wanted = [parts[0].weight, parts[1].weight, *([parts[2]] if window else [])]
        y, _ = mapped_attention(*tensors, *parts, **terms(window, kind))
        found = torch.autograd.grad(y, [*tensors, *wanted], dy)
        with backend.reference_only():
            expected, _ = mapped_attention(*exact, *parts, **terms(window, kind))
            wished = torch.autograd.grad(expected, [*exact, *wanted], dy.double())
        for one, other in zip((y, *found), (expected, *wished), strict=True):
            close(one, other)
        if not backend.ran()["mapped_attention"].startswith("reference"):
            raise AssertionError("the reference did not run where it was asked for")

    return run


CASES = [
    Case("joint", "joint hybrid forward, sliding 64", forward(), check(), 0.85),
    Case(
        "joint", "joint hybrid forward, terraced 64", forward(kind="terraced"), check(kind="terraced"), 0.85
    ),
    Case("joint", "joint hybrid forward, sliding 512", forward(512), check(512)),
    Case("joint", "linear attention forward", forward(None), check(None)),
    Case("joint", "joint forward+backward, all gradients, sliding 64", full(True), check(), 3.8),
    Case("joint", "joint forward+backward, frozen maps, sliding 64", full(False), check(), 3.8),
    Case("joint", "joint forward+backward, all gradients, terraced 64", full(True, "terraced"), check(), 3.8),
    Case("joint", "transfer step, sliding 64", transfer(), check(), 4.0, lengths=(2048,)),
    Case("joint", "transfer step, terraced 64", transfer("terraced"), check(), 4.0, lengths=(2048,)),
    Case("joint", "transfer without the teacher, sliding 64", transfer(teacher=False), check()),
]


# A case, where one of its kernels has another setting.


def sweep(kernel: str, case: Callable[[int, int], Callable[[], Any]]) -> Callable[..., Callable[[], Any]]:
    def make(setting: Launch, batch: int, length: int) -> Callable[[], Any]:
        call = case(batch, length)

        def run() -> Any:
            with using(kernel, setting):
                return call()

        return run

    return make


SWEEPS = {
    kernel: sweep(kernel, case)
    for case, kernels in (
        (forward(), ("joint_states", "joint_outputs_near")),
        (forward(512), ("joint_outputs",)),
        (forward(kind="terraced"), ("joint_outputs_near_terraced",)),
        (transfer(teacher=False), ("joint_queries_transfer", "joint_keys", "joint_maps")),
        (transfer("terraced", teacher=False), ("joint_queries_transfer_terraced", "joint_keys_terraced")),
        (full(True), ("joint_queries_full", "joint_inputs")),
        (full(True, "terraced"), ("joint_queries_full_terraced", "joint_inputs_terraced")),
    )
    for kernel in kernels
}
