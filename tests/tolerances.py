"""The one table of tolerances, by what is compared and in which dtype; no environment relaxes it.

kernel   one operation against its reference, or against another split of itself
layer    one attention layer, outputs or weights
logits   a whole model: relative to the largest fp32 logit; bf16: relative norm of the median token, because a choice
         that is a near tie (which tokens to keep) may fall otherwise after rounding
golden   committed fp32 arrays of the authors' code, absolute
liger    committed fp64 arrays of Liger-GLA, absolute
norm     the norm of a difference over the norm of what is expected
"""

import torch
from torch import Tensor

TOLERANCES: dict[str, dict[torch.dtype, float]] = {
    "kernel": {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1.5e-2},
    "layer": {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1.5e-2},
    "logits": {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2},
    "golden": {torch.float64: 1e-5, torch.float32: 1e-5},
    "liger": {torch.float64: 1e-10, torch.float32: 2e-5},
    "norm": {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1.5e-2},
}


def assert_near(actual: Tensor, expected: Tensor, kind: str, dtype: torch.dtype | None = None) -> None:
    """Largest difference within the table's: absolute for golden arrays, else relative where it exceeds one."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    if not expected.numel():
        return
    difference, expected = actual.double() - expected.double(), expected.double()
    if kind == "norm":
        size, difference = expected.norm().item(), difference.norm().item()
    else:
        size = 1.0 if kind in ("golden", "liger") else max(1.0, expected.abs().max().item())
        difference = difference.abs().max().item()
    bound = TOLERANCES[kind][dtype or actual.dtype] * size
    assert difference <= bound, f"differs by {difference:.3g}, {kind} allows {bound:.3g}"
