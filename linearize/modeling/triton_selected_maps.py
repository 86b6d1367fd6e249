"""The matrices of STILL's two feature maps in one launch, for calls without gradients: ``FeatureMap.matrix`` in the
dtype of the queries. Parameters are read at every call, as they may have changed in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .feature_maps import MIN_FEATURE, FeatureMap, NormPreserved
from .launches import cdiv, power_of_two


@triton.jit
def reflect(
    weight, u, made, tile, least, K: tl.constexpr, BK: tl.constexpr, F: tl.constexpr, BF: tl.constexpr
):
    """made [K, f] = (1 - 2 u u^T / |u|^2) W of one head, for some of the columns."""
    d, f = tl.arange(0, BK), tile * BF + tl.arange(0, BF)
    inside = (d < K)[:, None] & (f < F)[None, :]
    at = d[:, None] * F + f[None, :]
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u + d, mask=d < K, other=0.0).to(tl.float32)
    u /= tl.maximum(tl.sqrt(tl.sum(u * u, 0)), least)
    w -= 2.0 * u[:, None] * tl.sum(u[:, None] * w, 0)[None, :]
    tl.store(made + at, w.to(made.dtype.element_ty), mask=inside)


@triton.jit
def reflect_kernel(
    w_q, u_q, made_q, w_k, u_k, made_k, least,
    HQ: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Heads of the first map, then of the second; grid (column tiles, heads of both)."""
    tile, h = tl.program_id(0), tl.program_id(1)
    if h < HQ:
        reflect(w_q + h * K * F, u_q + h * K, made_q + h * K * F, tile, least, K, BK, F, BF)
    else:
        h -= HQ
        reflect(w_k + h * K * F, u_k + h * K, made_k + h * K * F, tile, least, K, BK, F, BF)


def matrices(map_q: FeatureMap, map_k: FeatureMap, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """W of both maps [heads, K, f], contiguous, in ``dtype``, computed in fp32."""
    maps = (map_q, map_k)
    if torch.is_grad_enabled() or type(map_q) is not NormPreserved or type(map_k) is not NormPreserved:
        w_q, w_k = (m.matrix(torch.float32).to(dtype).contiguous() for m in maps)
        return w_q, w_k
    made = [torch.empty(m.weight.shape, dtype=dtype, device=m.weight.device) for m in maps]
    heads, width, features = map_q.weight.shape
    pairs = [x.contiguous() for m in maps for x in (m.weight, m.reflect)]
    reflect_kernel[(cdiv(features, 32), heads + len(map_k.weight))](
        *pairs[:2], made[0], *pairs[2:], made[1], MIN_FEATURE,
        HQ=heads, K=width, BK=power_of_two(width), F=features, BF=32,
    )  # fmt: skip
    return made[0], made[1]
