"""Fields of a LAWCAT layer, and the memory of a row; ``lawcat.py`` has the layer."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from .errors import ConversionError
from .feature_maps import check_map
from .mixer import Geometry, MethodConfig, check_window


@dataclass(frozen=True)
class LawcatConfig(MethodConfig):
    """Fields of a LAWCAT layer; defaults are the main recipe of arXiv 2509.18467."""

    name: ClassVar[str] = "lawcat"
    recommended: ClassVar[dict[str, Any]] = {"transfer.learning_rate": 1e-2, "finetune.learning_rate": 1e-4}

    conv_size: int | None = 4
    """Taps of the convolution, the current token's included; None is no convolution."""
    conv_on: Literal["q", "k", "v", "qk", "qv", "kv", "qkv"] = "qk"
    """What is convolved; values only where they enter the sums, never in the window."""
    conv_init: Literal["delta", "xavier", "normal"] = "delta"
    """``delta``: the current token's tap is 1, the older ones are ``conv_older``."""
    conv_older: float = 0.001
    """Older taps of a ``delta`` start."""
    conv_tied: bool = False
    """One set of taps for q and k."""
    feature_map: str = "hedgehog"
    """One of ``feature_maps.py``: hedgehog, hedgehog_half, t2r, elu, exp, np_map or np_map_plain."""
    feature_dim: int | None = None
    """F, the width of phi and of the gate; None is the key dim."""
    feature_init: Literal["identity", "kaiming"] = "identity"
    """``identity`` or ``kaiming``."""
    tie_qk_map: bool = True
    """One map for q and k."""
    gate_rank: int | None = 16
    """Rank of the gate's projection; None is full."""
    gate_init_std: float = 0.006
    """Standard deviation of the gate's weights at the start."""
    gate_bias: float = 0.0
    """b at the start."""
    gate_normalizer: float = 16.0
    """Divisor of the log gate."""
    clamp_log_decay: float | None = None
    """Lower bound of the log gate, such as -1, against spikes of the loss; None is none."""
    window: int | None = None
    """W, tokens with exact softmax, the query's own included; None is no window."""
    window_exclude: bool = False
    """Leave the window's tokens out of the sums."""
    window_logit_init: float = 0.0
    """Logit of g at the start."""
    rope: bool = False
    """Rotated q and k in the sums, which an ablation found to end at the length of training."""
    kv_shared: bool = False
    """Convolution of k and maps per key/value head: an R times smaller state, and another model."""
    eps: float = 1e-10
    """Added to the denominator where there is no window."""
    normalize: bool = True
    """Without it y_t = RMSNorm(S_t^T phi(q^_t)), with a learnt scale for each channel of each query head."""

    def check(self, geometry: Geometry | None = None) -> None:
        check_window(self.window, "sliding", "method")
        if self.window_exclude and self.window is None:
            raise ConversionError(
                "method.window_exclude: there is no window; set method.window, to 64 for one"
            )
        for name in ("conv_size", "gate_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConversionError(f"method.{name}: {value} is impossible; give at least 1, or null")
        if self.gate_normalizer <= 0:
            raise ConversionError(f"method.gate_normalizer: {self.gate_normalizer}; give a number above 0")
        if self.clamp_log_decay is not None and self.clamp_log_decay >= 0:
            raise ConversionError(f"method.clamp_log_decay: {self.clamp_log_decay}; give a number below 0")
        if self.gate_init_std < 0:
            raise ConversionError(f"method.gate_init_std: {self.gate_init_std}; give 0 or more")
        check_map(self.feature_map, self.feature_dim, self.feature_init, geometry and geometry.key_dim)
        if self.conv_tied and not {"q", "k"} <= set(self.conv_on):
            raise ConversionError("method.conv_tied: ties the taps of q and k; leave conv_on at 'qk'")
        if not self.normalize and self.window is not None:
            raise ConversionError(
                "method.normalize: the window shares the denominator; leave it true, or set window=null"
            )
        grouped = geometry is not None and geometry.heads != geometry.kv_heads
        if self.conv_tied and self.kv_shared and grouped:
            raise ConversionError(
                "method.conv_tied: taps of q are per query head, those of k are not with kv_shared; drop one"
            )


class LawcatState(NamedTuple):
    """Bounded memory of a row: c - 1 inputs of each convolution, W tokens, and the sums.

    p is the number of tokens that may be taken back, E is W with ``window_exclude`` and otherwise 0.
    """

    tail_q: Tensor
    """[B, c - 1 + p, H, K], newest inputs of the convolution, model dtype; empty where q is not convolved."""
    tail_k: Tensor
    """[B, c - 1 + E + p, G, K], likewise for the keys that are not in kv."""
    k: Tensor
    """[B, W + p, G, K] rotated keys of the window, model dtype; empty without one."""
    v: Tensor
    """[B, W + p, G, V], model dtype; with convolved values as many as tail_k if that is more."""
    log_decay: Tensor
    """[B, E + p, G, F] fp32."""
    kv: Tensor
    """[B, Hs, F, V + 1] fp32, S and, if it is to ``normalize``, z beside it; Hs = H, or G with ``kv_shared``."""
    seen: Tensor
    """[B] tokens seen."""
    folded: Tensor
    """[B] tokens after which kv was last decayed; with E it holds those before ``folded - E``."""
