"""Every launch setting that is offered computes what the default computes, to rounding; and tuning on the GPU at hand.

Several workers share the compilation: `python -m pytest tests/gpu/test_candidates.py -n 8 -q`.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from linearize.modeling.launches import CANDIDATES
from linearize.modeling.registry import METHODS
from linearize.modeling.tuned import listening, read_rows, using
from linearize.tune import Sizes, runs, tune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
SIZES = Sizes(heads=8, kv_heads=2, head_dim=128, tokens=1000, batch=3)
CONVERTING = [name for name, method in METHODS.items() if method.mixer is not None]


def outputs(method: str, kind: int, device: torch.device, sizes: Sizes = SIZES) -> list[torch.Tensor]:
    """What one way to use a layer returns, from the same random numbers at every call."""
    torch.manual_seed(0)
    for number, run in enumerate(runs(method, sizes, device)):
        if number == kind:
            return [t.detach().float() for t in tensors(run.call())]
    raise IndexError(kind)


def tensors(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        if result.is_floating_point():
            yield result
    elif isinstance(result, tuple | list):
        for part in result:
            yield from tensors(part)


def differing(method: str, kind: int, device: torch.device, sizes: Sizes = SIZES) -> dict[str, float]:
    """Candidates under which something differs by more than roundings, and by how much of its norm."""
    with listening() as asks:
        expected = outputs(method, kind, device, sizes)
    found = {}
    for kernel in dict.fromkeys(ask.kernel for ask in asks):
        for number, candidate in enumerate(CANDIDATES.get(kernel, ())):
            with using(kernel, candidate):
                for one, other in zip(outputs(method, kind, device, sizes), expected, strict=True):
                    # Sums of bf16 products in another order; an error of a kernel is of another size.
                    share = ((one - other).norm() / other.norm().clamp_min(1e-20)).item()
                    if not share <= 1e-2:
                        found[f"{kernel} {number}: {candidate.options}"] = share
    return found


@pytest.mark.parametrize("kind", range(4), ids=["decode", "prefill", "training", "transfer"])
@pytest.mark.parametrize("method", CONVERTING)
def test_every_candidate_computes_the_same(method, kind):
    assert differing(method, kind, torch.device("cuda", 0)) == {}


def test_a_kernel_is_tuned_and_its_row_is_launched(tmp_path, monkeypatch):
    monkeypatch.setenv("LINEARIZE_LAUNCHES", str(tmp_path / "launches.json"))
    with listening() as asks:
        outputs("lolcats", 1, torch.device("cuda", 0))
    kernels = [
        kernel for kernel in dict.fromkeys(ask.kernel for ask in asks) if len(CANDIDATES.get(kernel, ())) > 1
    ]
    if not kernels:
        pytest.skip("no kernel of this run has candidates")
    found = tune(kernels[:1], methods=["lolcats"], sizes=SIZES)
    assert {tuned.row.kernel for tuned in found} == set(kernels[:1])
    assert read_rows(tmp_path / "launches.json") == [tuned.row for tuned in found]
    for tuned in found:
        assert all(0 < spent < 1000 for spent in tuned.milliseconds.values())
        assert tuned.row.milliseconds <= tuned.row.default_milliseconds
