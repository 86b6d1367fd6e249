"""The one table of tolerances, by what is compared and in which dtype; no environment relaxes it.

kernel   one operation against its reference, or against another split of itself
layer    one attention layer, outputs or weights
logits   a whole model: relative to the largest fp32 logit
golden   committed fp32 arrays of the authors' code
"""

import torch
from torch import Tensor

TOLERANCES: dict[str, dict[torch.dtype, float]] = {
    "kernel": {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1.5e-2},
    "layer": {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1.5e-2},
    "logits": {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2},
    "golden": {torch.float64: 1e-5, torch.float32: 1e-5},
}


def assert_near(actual: Tensor, expected: Tensor, kind: str, dtype: torch.dtype | None = None) -> None:
    """Largest difference within the table's: absolute for golden, else relative where it exceeds one."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    if not expected.numel():
        return
    size = 1.0 if kind == "golden" else max(1.0, expected.abs().max().item())
    bound = TOLERANCES[kind][dtype or actual.dtype] * size
    difference = (actual.double() - expected.double()).abs().max().item()
    assert difference <= bound, f"differs by {difference:.3g}, {kind} allows {bound:.3g}"
