"""Others' attention at the same shapes, and our own plain references: what the kernels are measured beside."""

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import torch
from case import Case
from measure import NotRun
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from linearize.modeling.feature_maps import Hedgehog
from linearize.modeling.reference import joint_chunked, joint_quadratic

H, G, K = 32, 8, 128
WINDOW = 64
BEYOND_L2 = 160 * 2**20


def inputs(batch: int, length: int, kv_heads: int = G, grad: bool = False) -> list[Tensor]:
    """q, k, v [B, T, heads, K]."""
    torch.manual_seed(0)
    made = [
        torch.randn(batch, length, n, K, device="cuda", dtype=torch.bfloat16) for n in (H, kv_heads, kv_heads)
    ]
    return [t.requires_grad_(grad) for t in made]


def step_of(function: Callable[..., Tensor], leaves: list[Tensor], backward: bool) -> Callable[[], Any]:
    """The call to time: forward alone, or every gradient of the leaves too."""
    if not backward:

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*leaves)

        return forward
    dy = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, dy)


def softmax(backend: SDPBackend, backward: bool) -> Callable[[int, int], Callable[[], Any]]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return lambda batch, length: step_of(attention, inputs(batch, length, grad=backward), backward)


def cached(backend: SDPBackend) -> Callable[[int, int], Callable[[], Any]]:
    """One new token against a KV cache of ``length``. Several caches take turns where one would stay in the L2 cache,
    as between the layers of a model it would not."""

    def make(batch: int, length: int) -> Callable[[], Any]:
        torch.manual_seed(0)
        shapes = [(batch, H, 1, K), (batch, G, length, K), (batch, G, length, K)]
        copies = max(1, min(20, BEYOND_L2 // (4 * batch * length * G * K)))
        caches = itertools.cycle(
            [[torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes] for _ in range(copies)]
        )

        def step() -> Tensor:
            with torch.no_grad(), sdpa_kernel(backend):
                return scaled_dot_product_attention(*next(caches), enable_gqa=True)

        return step

    return make


def reference(form: Callable[..., Tensor], backward: bool) -> Callable[[int, int], Callable[[], Any]]:
    """LoLCATs' layer in plain torch, its map included; gradients to q, k, v and both maps. The quadratic form goes
    through its batch row by row: all rows together would not fit."""

    def make(batch: int, length: int) -> Callable[[], Any]:
        map_q, map_k = (Hedgehog(H, K, K).to("cuda") for _ in range(2))
        factor = torch.full((H,), 0.1, device="cuda")

        def layer(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
            terms = {"scale": K**-0.5, "window": WINDOW}
            return form(q, k, v, map_q(q), map_k(k), factor, **terms)

        maps, rows = [map_q.weight, map_k.weight], [batch]
        if form is joint_quadratic:
            rows = [1] * batch
        steps = [step_of(layer, [*inputs(n, length, grad=backward), *maps], backward) for n in rows]

        def call() -> None:
            for step in steps:
                step()

        return call

    return make


def flex(backward: bool) -> Callable[[int, int], Callable[[], Any]]:
    """Softmax on the window alone: half of the layer, as its cheapest form in torch."""

    def make(batch: int, length: int) -> Callable[[], Any]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        mask = create_block_mask(
            lambda b, h, i, j: (i >= j) & (i - j < WINDOW), None, None, length, length, device="cuda"
        )

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return compiled(q, k, v, block_mask=mask, enable_gqa=True)

        return step_of(attention, inputs(batch, length, grad=backward), backward)

    return make


def fla(name: str, backward: bool) -> Callable[[int, int], Callable[[], Any]]:
    """An operation of flash-linear-attention, which has no grouped heads: k, v come at 32. No window, no joint
    normaliser; features or gates are cheap ones of torch and count."""

    def make(batch: int, length: int) -> Callable[[], Any]:
        if importlib.util.find_spec("fla") is None:
            raise NotRun("fla is not installed")
        from fla.ops.gla import chunk_gla
        from fla.ops.linear_attn import chunk_linear_attn

        def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return chunk_linear_attn(q.softmax(-1), k.softmax(-1), v, normalize=True)[0]

        def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            gate = torch.nn.functional.logsigmoid(k.float()) / 16
            return chunk_gla(q.softmax(-1), k.softmax(-1), v, g=gate)[0]

        operation = {"chunk_linear_attn": linear, "chunk_gla": gated}[name]
        return step_of(operation, inputs(batch, length, kv_heads=H, grad=backward), backward)

    return make


def _both(name: str, of: Callable[[bool], Callable[[int, int], Any]], **fields: Any) -> list[Case]:
    words = {False: "forward", True: "forward+backward"}
    return [Case("peers", f"{name}, {words[b]}", of(b), peer=True, **fields) for b in (False, True)]


CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION

CASES = [
    *_both("softmax, cuDNN", lambda backward: softmax(CUDNN, backward)),
    *_both("softmax, flash", lambda backward: softmax(FLASH, backward)),
    *_both("LoLCATs in torch, chunked", lambda b: reference(joint_chunked, b), lengths=(2048, 8192)),
    *_both("LoLCATs in torch, quadratic", lambda b: reference(joint_quadratic, b), lengths=(2048,)),
    *_both("fla chunk_linear_attn, no window", lambda b: fla("chunk_linear_attn", b), lengths=(2048, 32768)),
    *_both("fla chunk_gla, no window", lambda b: fla("chunk_gla", b), lengths=(2048, 32768)),
    *_both("flex_attention, window 64 alone", flex, lengths=(8192, 32768)),
    *(
        Case("decode", f"softmax, {name}, KV cache, B={batch}", cached(backend), batch=batch, peer=True)
        for batch in (1, 32)
        for name, backend in (("cuDNN", CUDNN), ("flash", FLASH))
    ),
]
