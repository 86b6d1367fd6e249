"""The first training step of a kind compiles its kernels before it begins, and nothing later."""

import pytest
import torch
from layers import CONVERTING, outputs

from linearize.modeling.backend import asked
from linearize.tune import Sizes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
SIZES = Sizes(heads=6, kv_heads=2, head_dim=64, tokens=300, batch=2)
EVER: list[str] = []  # operations that were prepared, by whichever test met their kind first


@pytest.mark.parametrize("kind", ["training", "transfer"])
@pytest.mark.parametrize("method", CONVERTING)
def test_a_training_step_finds_its_kernels_compiled(method, kind, monkeypatch):
    from triton.runtime.jit import JITFunction

    from linearize.modeling import triton_together as together

    late, inside = [], []
    earlier = len(EVER)
    prepare, compile_one = together._prepare, JITFunction._do_compile

    def watched(operation, args, kwargs):
        inside.append(operation.__name__)
        try:
            prepare(operation, args, kwargs)
        finally:
            EVER.append(inside.pop())

    def counted(self, *args, **kwargs):
        if not inside and len(EVER) > earlier and not self.module.endswith("future"):  # without gradients
            late.append(self.__name__)
        return compile_one(self, *args, **kwargs)

    monkeypatch.setattr(together, "_prepare", watched)
    monkeypatch.setattr(JITFunction, "_do_compile", counted)
    with asked() as ran:
        found = outputs(method, kind, torch.device("cuda", 0), SIZES)
    assert all(x.isfinite().all() for x in found)
    operations = {"mapped_attention", "mapped_error", "kept_attention", "routed_prefill"}
    operations |= {"averaged_attention", "convolved_attention"}
    if not any(ran.get(name) == "triton" for name in operations):
        pytest.skip(f"no operation of {method} has kernels with gradients here")
    assert EVER and late == []
