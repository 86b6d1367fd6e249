"""Fields of a STILL layer, and the memory of a row; ``still.py`` has the layer."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from .errors import ConversionError
from .feature_maps import check_map
from .mixer import Geometry, MethodConfig
from .ops import Kept


@dataclass(frozen=True)
class StillConfig(MethodConfig):
    """Fields of a STILL layer; defaults are the release's, but for the bounded ``budget``."""

    name: ClassVar[str] = "still"
    recommended: ClassVar[dict[str, Any]] = {
        "transfer.learning_rate": 1e-2,
        "transfer.loss": "mse",
        "finetune.learning_rate": 1e-4,
    }

    chunk: int = 64
    """C; every query sees its own chunk and the whole one before it. The score's window is as long."""
    salient_per_chunk: int = 4
    """p, tokens of every chunk that are picked."""
    budget: int | None = 256
    """Most picked tokens that stay exact, for each head; None keeps all (the release): memory grows by p a chunk."""
    score: Literal["self_saliency", "recency", "random"] = "self_saliency"
    """What tokens are picked by; ``recency`` and ``random`` (fixed by position) are controls."""
    keep_first: bool = True
    """Whether the first token is picked before all others and leaves last."""
    feature_map: str = "np_map"
    """np_map, np_map_plain (without the reflection) or a map of LoLCATs."""
    feature_dim: int | None = None
    """F, the width of phi, both halves of a two-sided map together; None is twice the key dim."""
    feature_init: Literal["identity", "kaiming"] = "identity"
    """``identity`` or ``kaiming`` (the release's; only the direction of W x matters to np_map)."""
    gate: Literal["per_channel", "per_head", "none"] = "per_channel"
    """Outputs of W_g: V for every head, one for every head, or no gate."""
    gate_bias: float = 0.0
    """Added before the sigmoid: 0 starts the gate near 0.5, 3 near 0.95."""
    share_selection: bool = False
    """One kept set for each key/value head: R times less memory, and another model."""
    kv_tied_map: bool = False
    """One key map, and so one linear state, for each key/value head; needs ``share_selection``."""
    eps_den: float = 1e-6
    """Added to the denominator."""

    def check(self, geometry: Geometry | None = None) -> None:
        least = {"chunk": 1, "salient_per_chunk": 0, "budget": 0, "eps_den": 0}
        for field, bound in least.items():
            value = getattr(self, field)
            if value is not None and value < bound:
                every = ", or null to keep every picked token" if field == "budget" else ""
                raise ConversionError(f"method.{field}: {value} is impossible; give {bound} or more{every}")
        if self.salient_per_chunk > self.chunk:
            raise ConversionError(
                f"method.salient_per_chunk: {self.salient_per_chunk} is more than a chunk has; "
                f"give at most method.chunk={self.chunk}"
            )
        choices = {
            "score": ("self_saliency", "recency", "random"),
            "gate": ("per_channel", "per_head", "none"),
        }
        for field, names in choices.items():
            if getattr(self, field) not in names:
                raise ConversionError(
                    f"method.{field}: {getattr(self, field)!r} is unknown; choose from {', '.join(names)}"
                )
        if self.kv_tied_map and not self.share_selection:
            raise ConversionError(
                "method.kv_tied_map: a state for each key/value head needs a kept set for each; "
                "add method.share_selection=true"
            )
        width = None if geometry is None else feature_width(self, geometry)
        check_map(self.feature_map, width, self.feature_init, geometry and geometry.key_dim)


def feature_width(config: StillConfig, geometry: Geometry) -> int:
    """F of a layer of this geometry."""
    return 2 * geometry.key_dim if config.feature_dim is None else config.feature_dim


class StillState(NamedTuple):
    """Memory of a row: rings of the newest tokens (2 C, and the droppable ones while a cache records its past), the
    tokens that stay exact, best first, and the sums of all others. Gs = H, or G with ``share_selection``.

    N is ``budget``; without one it grows by ``salient_per_chunk`` for each ``chunk`` tokens.
    """

    k: Tensor
    """[B, n, G, K], model dtype."""
    v: Tensor
    """[B, n, G, V], model dtype."""
    score: Tensor
    """[B, n, Gs] fp32."""
    kept_k: Tensor
    """[B, N, Gs, K], model dtype."""
    kept_v: Tensor
    """[B, N, Gs, V], model dtype."""
    kept_score: Tensor
    """[B, N, Gs] fp32, -inf in an empty slot."""
    kv: Tensor
    """[B, Hs, F, V] fp32, the sum of phi_k v^T; Hs = H, or G with ``kv_tied_map``."""
    z: Tensor
    """[B, Hs, F] fp32, the sum of phi_k."""
    seen: Tensor
    """[B] tokens seen."""
    folded: Tensor
    """[B] oldest tokens that are kept or inside the sums; the rings hold the others."""

    @property
    def rings(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.k, self.v, self.score

    @property
    def kept(self) -> Kept:
        return Kept(self.kept_k, self.kept_v, self.kept_score)
