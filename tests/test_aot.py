"""Every kernel at its chosen settings, compiled for sm_90 without a GPU: no spilled register, matrix instructions where
they are due, no more shared memory than smaller cards are told, and no product fed with another's transposed result."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from linearize.modeling.launches import MOST_SHARED

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("aot_*.py"))
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
TRITON = version("triton") if importlib.util.find_spec("triton") else "none"


@functools.cache
def compiled(path: Path) -> list[dict]:
    """What the compiler made of a file's cases, in a process without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "aot.py"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def most_shared(name: str) -> int:
    """What smaller cards are told that a kernel takes."""
    family = max((family for family in MOST_SHARED if name.startswith(family)), key=len, default=None)
    return min(MOST_SHARED.values()) if family is None else MOST_SHARED[family]


def faults(case: dict) -> list[str]:
    """What is wrong with one compiled case."""
    found = []
    if case["spills"] > case["allowed"]:
        found.append(f"{case['spills']} bytes of registers are spilled")
    if case["matrix"] and not case["matrix_instructions"]:
        found.append("no matrix instruction")
    if case["shared"] > most_shared(case["name"]):
        found.append(f"{case['shared']} bytes of shared memory")
    if case["transposed_results"]:
        found.append(f"{case['transposed_results']} products read a transposed product")
    return found


# One test a file: with several workers, each file is compiled by one of them.
@pytest.mark.parametrize("path", FILES, ids=[f"{path.stem}-triton-{TRITON}" for path in FILES])
def test_kernels_compile_for_hopper(path):
    cases = compiled(path)
    assert cases, "the file has no case"
    for case in cases:
        print(json.dumps(case))
    assert {case["name"]: found for case in cases if (found := faults(case))} == {}


KERNELS = """
import triton
import triton.language as tl
from aot import Case

@triton.jit
def load(x, N: tl.constexpr):
    i = tl.arange(0, N)
    return tl.load(x + i[:, None] * N + i[None, :])

@triton.jit
def store(y, value, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i[:, None] * N + i[None, :], value)

@triton.jit
def plain(x, y, n, N: tl.constexpr):
    a = load(x, N)
    s = tl.dot(a, tl.trans(a))
    store(y, tl.dot(s.to(a.dtype), a), N)

@triton.jit
def direct(x, y, n, N: tl.constexpr):
    a = load(x, N)
    s = tl.dot(a, a)
    store(y, tl.dot(tl.trans(s).to(a.dtype), a), N)

@triton.jit
def weighted(x, y, n, N: tl.constexpr):
    a = load(x, N)
    s = tl.exp(tl.dot(a, a) * 0.5)
    store(y, tl.dot(a, (tl.trans(s) + 1).to(a.dtype)), N)

@triton.jit
def after_a_loop(x, y, n, N: tl.constexpr):
    a = load(x, N)
    s, m = tl.zeros([N, N], tl.float32), tl.zeros([N], tl.float32)
    for t in range(n):
        s += tl.dot(a, load(x + t, N))
        m += tl.sum(s, 0)
    store(y, tl.dot(tl.trans(s).to(a.dtype), a) + m[None, :], N)

@triton.jit
def in_a_loop(x, y, n, N: tl.constexpr):
    a = load(x, N)
    s, z = tl.zeros([N, N], tl.float32), tl.zeros([N, N], tl.float32)
    for t in range(n):
        z += tl.dot(tl.trans(s).to(a.dtype), a)
        s = tl.dot(a, load(x + t, N))
    store(y, z, N)

@triton.jit
def loop_of_loads(x, y, n, N: tl.constexpr):
    a = load(x, N)
    s, z = a, tl.zeros([N, N], tl.float32)
    for t in range(n):
        z += tl.dot(tl.trans(s), a)
        s = load(x + t, N)
    store(y, z, N)

@triton.jit
def after_a_branch(x, y, n, N: tl.constexpr):
    a = load(x, N)
    s = tl.zeros([N, N], tl.float32)
    if n > 3:
        s = tl.dot(a, a)
    store(y, tl.dot(tl.trans(s).to(a.dtype), a), N)

def cases():
    for kernel in (plain, loop_of_loads, direct, weighted, after_a_loop, in_a_loop, after_a_branch):
        yield Case(kernel.__name__, kernel, {"x": "*bf16", "y": "*fp32", "n": "i32"}, {"N": 64}, 4, 2)
"""


def test_a_transposed_product_in_another_is_found(tmp_path):
    (tmp_path / "aot_wrong.py").write_text(KERNELS)
    found = {case["name"]: case["transposed_results"] for case in compiled(tmp_path / "aot_wrong.py")}
    right = {"plain": 0, "loop_of_loads": 0}
    wrong = dict.fromkeys(("direct", "weighted", "after_a_loop", "in_a_loop", "after_a_branch"), 1)
    assert found == right | wrong


def test_every_fault_is_told():
    good = {
        "name": "joint_step 128",
        "spills": 0,
        "allowed": 0,
        "matrix": True,
        "matrix_instructions": 8,
        "shared": MOST_SHARED["joint_step"],
        "transposed_results": 0,
    }
    assert faults(good) == []
    for change in (
        {"spills": 8},
        {"matrix_instructions": 0},
        {"shared": MOST_SHARED["joint_step"] + 1},
        {"transposed_results": 1},
    ):
        assert len(faults(good | change)) == 1
    assert faults(good | {"matrix": False, "matrix_instructions": 0}) == []
