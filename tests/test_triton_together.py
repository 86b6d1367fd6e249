"""Kernels of a training step are found without running it, and compiled at once. In a process of its own, without
Triton's interpreter and for a Hopper GPU that need not be there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = """
import json
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from linearize.modeling import triton_together as together
from linearize.modeling.feature_maps import FEATURE_MAPS
from linearize.modeling.triton_gated_convolved import convolved_kernel
from linearize.modeling.triton_mapped import mapped_error_kernel
from linearize.modeling.triton_selected_kept import kept_attention


class Hopper:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)


driver.set_active(Hopper())

@triton.jit
def double(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)

@triton.jit
def halve(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n) / 2, mask=at < n)

def launched(kernel, x):
    y = torch.empty_like(x)
    kernel[(triton.cdiv(x.numel(), 64),)](x, y, x.numel(), BLOCK=64)
    return y

class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, asks):
        ctx.save_for_backward(x)
        y = launched(double, x)
        if asks and float(y.sum()) > 0:
            return launched(halve, y)
        return y

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return launched(halve, dy), None

def names(launches):
    return [written.kernel.__name__ for written in launches]

compiled = []
triton.knobs.compilation.listener = lambda src, **_: compiled.append(src.name)
x = torch.ones(100, requires_grad=True)
saved = []
with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(1) or x, lambda x: x):
    found = together.rehearse(Doubled.apply, (x, False), {})
together._prepare(Doubled.apply, (x, False), {})
first = sorted(compiled)
for written in found:
    written.kernel.warmup(*written.given, grid=(1,), **written.named)
told = dict(tiny=names(found), first=first, later=len(compiled) - len(first), saved=len(saved), grad=x.grad is None)
told["breaks off"] = names(together.rehearse(Doubled.apply, (x, True), {}))

q, k, v = (torch.zeros(1, 130, n, 64, requires_grad=True) for n in (4, 2, 2))
terms = dict(scale=1.0, chunk=64, size=9)
told["kept"] = names(together.rehearse(kept_attention, (q, k, v, torch.zeros(1, 130, 2)), terms))
maps = [FEATURE_MAPS["hedgehog"](4, 64, 64).requires_grad_() for _ in range(2)]
frozen = [x.detach() for x in (q, k, v)]
terms = dict(scale=1.0, window=64, teacher=torch.zeros_like(q))
given = (*frozen, *maps, torch.ones(4, requires_grad=True))
told["error"] = names(together.rehearse(mapped_error_kernel, given, terms))
given = (torch.zeros(1, 130, 2, 64), None, torch.ones(4, 64, 4), *(torch.zeros(4, 64, 32) for _ in range(2)))
told["convolved"] = names(together.rehearse(convolved_kernel, (q, k, v, *given), dict(steps=16.0, eps=1e-6)))
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    (folder / "script.py").write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1]), "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, str(folder / "script.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_forward_and_backward_are_compiled_and_nothing_is_left_for_later(told):
    assert told["tiny"] == ["double", "halve"] == told["first"] and told["later"] == 0


def test_a_rehearsal_leaves_nothing_behind(told):
    assert told["saved"] == 0 and told["grad"]


def test_a_rehearsal_ends_where_a_value_is_asked_for(told):
    assert told["breaks off"] == ["double"]


def test_training_of_every_kind_is_found_to_its_last_kernel(told):
    assert told["kept"][-1] == "local_dkv_kernel" and "kept_forward_kernel" in told["kept"]
    assert told["error"][:2] == ["joint_states", "joint_outputs_near"] and told["error"][-1] == "joint_maps"
    assert {"outputs_kernel", "queries_kernel", "keys_kernel", "values_kernel"} <= set(told["convolved"])
