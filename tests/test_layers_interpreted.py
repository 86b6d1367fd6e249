"""Every method's layer with its kernels, run by Triton's interpreter, equals the same layer in plain torch: what ops.py
chooses, the mixers' use of it and the kernels together."""

import importlib.util

import pytest
import torch
from layers import CONVERTING, KINDS, gaps, outputs

from linearize.modeling import backend
from linearize.tune import Sizes

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU kernels are not interpreted"),
]
SIZES = Sizes(heads=4, kv_heads=2, head_dim=16, tokens=150, batch=2, dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", CONVERTING)
def test_a_layer_with_kernels_equals_its_reference(method, kind, monkeypatch):
    monkeypatch.setenv("LINEARIZE_INTERPRET", "1")
    monkeypatch.setattr(backend, "_ran", {})
    found = outputs(method, kind, torch.device("cpu"), SIZES)
    print(backend.ran())
    with backend.reference_only():
        expected = outputs(method, kind, torch.device("cpu"), SIZES)
    if kind == "decode":  # states in place sum later what the reference has summed
        found, expected = found[:1], expected[:1]
    differences = gaps(found, expected)
    if (method, kind) == ("lolcats", "transfer"):
        # The window factor learns from a sum whose terms nearly cancel.
        assert found[0].shape == (found[0].numel(),) and differences.pop(0) < 1e-4
    assert max(differences) < 1e-5
