"""Every layer computes with kernels what it computes without, and under every launch setting that is offered what it
computes under the default; and tuning on the GPU at hand.

Nearly all the time is compilation of the candidates, which is cut into parts for several workers; layers beside their
references come first, so that the default settings are compiled when the candidates are compared with them.
"""

from dataclasses import replace

import pytest
import torch
from layers import CONVERTING, KINDS, gaps, outputs

from linearize.modeling.backend import ran, reference_only
from linearize.modeling.launches import CANDIDATES
from linearize.modeling.tuned import listening, read_rows, using
from linearize.tune import Sizes, tune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
SIZES = Sizes(heads=8, kv_heads=2, head_dim=128, tokens=1000, batch=3)
# Of the norm, between two computations in bf16: twice what the table allows each, and a third more for the gradients of
# STILL's maps (.031). Compiled wrongly, kernels have been off by .12 and more.
ROUNDING = 4e-2
PARTS = 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", CONVERTING)
def test_a_layer_with_kernels_equals_its_reference(method, kind, dtype):
    device, sizes = torch.device("cuda", 0), replace(SIZES, dtype=dtype)
    found = outputs(method, kind, device, sizes)
    with reference_only():
        expected = outputs(method, kind, device, sizes)
    if kind == "decode":  # states in place sum later what the reference has summed
        found, expected = found[:1], expected[:1]
    assert max(gaps(found, expected)) <= (ROUNDING if dtype == torch.bfloat16 else 1e-3), ran()


def differing(method: str, kind: str, part: int, device: torch.device) -> dict[str, float]:
    """Candidates under which something differs by more than roundings, and by how much of its norm; of every
    ``PARTS``-th candidate, the default, which was the expectation, left out."""
    with listening() as asks:
        expected = outputs(method, kind, device, SIZES)
    found = {}
    kernels = dict.fromkeys(ask.kernel for ask in asks)
    every = [(k, n) for k in kernels for n in range(1, len(CANDIDATES.get(k, ())))]
    for kernel, number in every[part::PARTS]:
        candidate = CANDIDATES[kernel][number]
        with using(kernel, candidate):
            shares = gaps(outputs(method, kind, device, SIZES), expected)
            if not max(shares) <= ROUNDING:
                found[f"{kernel} {number}: {candidate.options}"] = max(shares)
    return found


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", CONVERTING)
def test_every_candidate_computes_the_same(method, kind, part):
    assert differing(method, kind, part, torch.device("cuda", 0)) == {}


def test_a_kernel_is_tuned_and_its_row_is_launched(tmp_path, monkeypatch):
    monkeypatch.setenv("LINEARIZE_LAUNCHES", str(tmp_path / "launches.json"))
    with listening() as asks:
        outputs("lolcats", "prefill", torch.device("cuda", 0), SIZES)
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
