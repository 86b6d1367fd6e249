"""Learned per-head feature maps: phi(x) [B, T, H, F] of queries or keys, never negative, in fp32 or higher.

A map reads a_h = x_h W_h, W [H, K, f], and F is the full width of phi: maps of two halves have f = F / 2.

    hedgehog        [softmax(a); softmax(-a)], at least 1e-12        arXiv 2402.04347, eq. 6
    hedgehog_half   softmax(a), at least 1e-12
    t2r             relu(a + bias), a bias vector for each head      arXiv 2103.13076
    elu             1 + elu(a)                                       arXiv 2006.16236
    exp             [exp(a - max a); exp(min a - a)]                 the authors' code of arXiv 2410.10254
    np_map          hedgehog of |x| a / |a|, x reflected first       arXiv 2602.02180
    np_map_plain    the same without the reflection
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import elu

from .errors import ConversionError
from .tiles import accumulator, full_precision

FeatureInit = Literal["identity", "kaiming"]

MIN_FEATURE = 1e-12  # keeps phi_q . phi_k > 0


class FeatureMap(nn.Module):
    """phi(x) [B, T, heads, F] of x [B, T, heads, K], or of x [B, T, G, K], each serving heads/G maps."""

    halves: ClassVar[int] = 1

    def __init__(self, heads: int, key_dim: int, feature_dim: int, init: FeatureInit = "identity") -> None:
        super().__init__()
        self.check(key_dim, feature_dim, init)
        self.heads = heads
        self.feature_dim = feature_dim
        self.init = init
        self.weight = nn.Parameter(torch.empty(heads, key_dim, feature_dim // self.halves))
        self.reset_parameters()

    @classmethod
    def check(cls, key_dim: int, feature_dim: int, init: str = "identity") -> None:
        """Raise ConversionError where the map cannot have this width or start."""
        if init not in ("identity", "kaiming"):
            raise ConversionError(f"method.feature_init: {init!r} is unknown; choose from identity, kaiming")
        if feature_dim < cls.halves or feature_dim % cls.halves:
            remedy = max(cls.halves, feature_dim - feature_dim % cls.halves)
            width = "a positive width" if cls.halves == 1 else "an even width, for its two halves"
            raise ConversionError(
                f"method.feature_dim: {feature_dim}; this feature map needs {width}; try {remedy}"
            )
        if init == "identity" and feature_dim > cls.halves * key_dim:
            raise ConversionError(
                f"method.feature_dim: {feature_dim} is wider than an identity start on {key_dim} channels can fill; "
                f"use at most {cls.halves * key_dim}, or method.feature_init=kaiming"
            )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Each head starts as the identity on its first f channels, or Kaiming-uniform over its K inputs."""
        if self.init == "identity":
            self.weight.copy_(
                torch.eye(*self.weight.shape[1:], dtype=self.weight.dtype, device=self.weight.device)
            )
        else:
            bound = (6 / self.weight.shape[1]) ** 0.5
            self.weight.uniform_(-bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return _map_features(x, self)

    def project(self, x: Tensor) -> Tensor:
        """a [B, T, heads, f]; map h reads head h // (heads/G) of x, unrepeated."""
        dtype = accumulator(x)
        groups = x.shape[2]
        weight = self.matrix(dtype).unflatten(0, (groups, -1)).transpose(1, 2).flatten(2, 3)  # [G, K, R*f]
        return torch.einsum("btgk,gkf->btgf", x.to(dtype), weight).reshape(
            *x.shape[:2], self.heads, weight.shape[-1] * groups // self.heads
        )

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W [heads, K, f]."""
        return self.weight.to(dtype)

    def features(self, a: Tensor) -> Tensor:
        """phi [B, T, heads, F] from a [B, T, heads, f]."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        key_dim = self.weight.shape[1]
        return f"heads={self.heads}, key_dim={key_dim}, feature_dim={self.feature_dim}, init={self.init}"


@full_precision
def _map_features(x: Tensor, feature_map: FeatureMap) -> Tensor:
    return feature_map.features(feature_map.project(x))


class Hedgehog(FeatureMap):
    """[softmax(a); softmax(-a)], each half summing to one."""

    halves = 2

    def features(self, a: Tensor) -> Tensor:
        return torch.cat((a.softmax(dim=-1), (-a).softmax(dim=-1)), dim=-1).clamp(min=MIN_FEATURE)


class NormPreservedPlain(Hedgehog):
    """[softmax(b); softmax(-b)] of b = |x| a / |a|: W turns a token, and its norm alone sets how sharp phi is."""

    def project(self, x: Tensor) -> Tensor:
        a = super().project(x)
        norm = torch.linalg.vector_norm(x.to(a.dtype), dim=-1, keepdim=True)
        norm = norm.repeat_interleave(self.heads // x.shape[2], dim=2)
        return a * (norm / torch.linalg.vector_norm(a, dim=-1, keepdim=True).clamp_min(MIN_FEATURE))


class NormPreserved(NormPreservedPlain):
    """The same of x - 2 u (u . x) / |u|^2, a learned reflection u [heads, K], which a free W could also learn."""

    def __init__(self, heads: int, key_dim: int, feature_dim: int, init: FeatureInit = "identity") -> None:
        super().__init__(heads, key_dim, feature_dim, init)
        self.reflect = nn.Parameter(torch.randn(heads, key_dim))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "reflect"):  # the base class starts the weight first
            self.reflect.normal_()

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """(1 - 2 u u^T / |u|^2) W, so that reflecting costs nothing for each token."""
        weight, u = super().matrix(dtype), self.reflect.to(dtype)
        u = u / torch.linalg.vector_norm(u, dim=-1, keepdim=True).clamp_min(MIN_FEATURE)
        return weight - 2 * u[:, :, None] * (u[:, None, :] @ weight)


class HedgehogHalf(FeatureMap):
    """softmax(a) alone."""

    def features(self, a: Tensor) -> Tensor:
        return a.softmax(dim=-1).clamp(min=MIN_FEATURE)


class T2R(FeatureMap):
    """relu(a + bias), the bias a vector for each head (the authors' code of LoLCATs has one scalar)."""

    def __init__(self, heads: int, key_dim: int, feature_dim: int, init: FeatureInit = "identity") -> None:
        super().__init__(heads, key_dim, feature_dim, init)
        self.bias = nn.Parameter(torch.zeros(heads, feature_dim))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "bias"):  # the base class starts the weight first
            self.bias.zero_()

    def features(self, a: Tensor) -> Tensor:
        return torch.relu(a + self.bias.to(a.dtype))


class Elu(FeatureMap):
    """1 + elu(a)."""

    def features(self, a: Tensor) -> Tensor:
        return 1 + elu(a)


class Exp(FeatureMap):
    """[exp(a - max a); exp(min a - a)], each half with a largest entry of one."""

    halves = 2

    def features(self, a: Tensor) -> Tensor:
        low, high = a.amin(dim=-1, keepdim=True), a.amax(dim=-1, keepdim=True)
        return torch.cat((torch.exp(a - high), torch.exp(low - a)), dim=-1)


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "hedgehog": Hedgehog,
    "hedgehog_half": HedgehogHalf,
    "t2r": T2R,
    "elu": Elu,
    "exp": Exp,
    "np_map": NormPreserved,
    "np_map_plain": NormPreservedPlain,
}


def check_map(name: str, feature_dim: int | None, init: str, key_dim: int | None = None) -> None:
    """Raise ConversionError for a map that does not exist or, on keys of this width, cannot have these fields."""
    if name not in FEATURE_MAPS:
        raise ConversionError(
            f"method.feature_map: {name!r} is unknown; choose from {', '.join(FEATURE_MAPS)}"
        )
    if key_dim is not None:
        FEATURE_MAPS[name].check(key_dim, width_of(feature_dim, key_dim), init)


def width_of(feature_dim: int | None, key_dim: int) -> int:
    """F: the field as it was written, or the key dim."""
    return key_dim if feature_dim is None else feature_dim
