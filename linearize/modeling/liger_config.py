"""Fields of a Liger layer, and the memory of a row; ``liger.py`` has the layer."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from .errors import ConversionError
from .mixer import Geometry, MethodConfig, check_window


@dataclass(frozen=True)
class LigerConfig(MethodConfig):
    """Fields of a Liger layer; defaults are the paper's Liger-GLA."""

    name: ClassVar[str] = "liger"
    recommended: ClassVar[dict[str, Any]] = {"transfer.tokens": 0, "finetune.learning_rate": 1e-3}

    variant: Literal["gla", "hgrn2", "gsa"] = "gla"
    """The recurrence: gla, hgrn2 or gsa."""
    window: int | None = 64
    """W, keys with exact softmax, the query's own included; None is no window branch."""
    mix_window: float = 0.5
    """Weight of the window branch; 0 leaves it out of compute and state."""
    mix_recurrent: float = 0.5
    """Weight of the recurrence; 0 leaves it out."""
    gate_normalizer: float | None = None
    """N, the divisor of the log gate; None is 16, and 1 for hgrn2 (the authors' code)."""
    gsa_slots: int | None = None
    """M, memory slots of gsa, a divisor of the key dim; None is the key dim."""
    feature_map: Literal["softmax", "identity"] = "softmax"
    """What gla reads from q and k; ``identity`` is a table's variant."""
    hgrn2_lower_bound: float = 0.0
    """gamma, the floor of hgrn2's gate: gamma + (1 - gamma) a."""
    gate_source: Literal["q", "k", "v"] = "k"
    """The projection that makes the gate; q is averaged over the heads of a group."""
    gate_bias: float = 0.0
    """b; with N = 16, b = 3 moves the half-life of an average token from 16 to 228 tokens."""
    train_gate_bias: bool = False
    """Learn b, one for each channel of each key/value head."""
    train_mix: Literal["layer", "head"] | None = None
    """Learn the mix weights, as logarithms: one pair a layer, or a pair for each query head."""
    key_temperature: float = 1.0
    """Divides k before gla's softmax; below 1 a key fills fewer channels, and old tokens blur less."""
    train_key_temperature: bool = False
    """Learn it, as a logarithm, for each key/value head."""
    rope_on_recurrent: bool = False
    """Rotated q and k in the recurrence too (not in the gate)."""
    normalize: bool = False
    """Divide o_t by the sum of its weights (gla, hgrn2)."""

    def check(self, geometry: Geometry | None = None) -> None:
        check_window(self.window, "sliding", "method")
        if min(self.mix_window, self.mix_recurrent) < 0 or not (self.has_window or self.has_recurrence):
            raise ConversionError(
                f"method.mix_window, mix_recurrent: {self.mix_window}, {self.mix_recurrent} with window={self.window} "
                "leave nothing; give weights of 0 or more, and one branch that is there"
            )
        if self.train_mix is not None and not (self.has_window and self.has_recurrence):
            raise ConversionError("method.train_mix: needs both branches; give both mix weights above 0")
        if self.gate_normalizer is not None and self.gate_normalizer <= 0:
            raise ConversionError(f"method.gate_normalizer: {self.gate_normalizer}; give a number above 0")
        if not 0 <= self.hgrn2_lower_bound < 1:
            raise ConversionError(
                f"method.hgrn2_lower_bound: {self.hgrn2_lower_bound}; give 0 or more, below 1"
            )
        if self.key_temperature <= 0:
            raise ConversionError(f"method.key_temperature: {self.key_temperature}; give a number above 0")
        self._check_variant()
        if geometry is not None:
            self._check_geometry(geometry)

    def _check_variant(self) -> None:
        for name, variants in (
            ("gsa_slots", ("gsa",)),
            ("feature_map", ("gla",)),
            ("hgrn2_lower_bound", ("hgrn2",)),
            ("key_temperature", ("gla",)),
            ("train_key_temperature", ("gla",)),
            ("normalize", ("gla", "hgrn2")),
        ):
            if self.variant not in variants and getattr(self, name) != getattr(LigerConfig, name):
                raise ConversionError(
                    f"method.{name}: has no meaning for variant {self.variant!r}; only for {', '.join(variants)}"
                )
        if self.feature_map == "identity" and (self.normalize or self.train_key_temperature):
            raise ConversionError(
                "method.feature_map: 'identity' has no positive features to normalise or to sharpen; use softmax"
            )

    def _check_geometry(self, geometry: Geometry) -> None:
        slots = self.gate_width(geometry)
        if slots < 1 or geometry.key_dim % slots:
            raise ConversionError(
                f"method.gsa_slots: {slots} does not divide the key dim {geometry.key_dim}; "
                "a slot would mix two heads"
            )
        if self.gate_source == "v" and geometry.value_dim % slots:
            raise ConversionError(
                f"method.gate_source: values of {geometry.value_dim} channels cannot gate {slots}; use k"
            )

    @property
    def has_window(self) -> bool:
        return self.window is not None and self.mix_window > 0

    @property
    def has_recurrence(self) -> bool:
        return self.mix_recurrent > 0

    def gate_width(self, geometry: Geometry) -> int:
        """Channels of the gate: the key dim, or the slots of gsa."""
        return (self.gsa_slots if self.variant == "gsa" else None) or geometry.key_dim


class LigerState(NamedTuple):
    """Bounded memory of a row. ``key`` and ``log_decay`` hold only tokens that may still be taken back."""

    k: Tensor
    """[B, W + p, G, K] newest rotated keys, model dtype; p tokens may be taken back. Empty without a window."""
    v: Tensor
    """[B, W + p, G, V], likewise; [B, p, G, V] without a window."""
    key: Tensor
    """[B, p, G, K] fp32, keys as the recurrence reads them."""
    log_decay: Tensor
    """[B, p, G, M] fp32, M the gate's width."""
    kv: Tensor
    """[B, G, K, V] fp32, S; gsa: D [B, G, M, V]; one column more with ``normalize``."""
    slots: Tensor
    """[B, G, K, M] fp32, C of gsa; empty for the others."""
    seen: Tensor
    """[B] tokens seen."""
    folded: Tensor
    """[B] tokens inside kv and slots; they are the oldest."""
