"""Which version of an operation runs, and what is said about it."""

import importlib.util
import warnings

import pytest
import torch

from linearize.modeling import backend
from linearize.modeling.backend import breaks_compiler, ran, reference_only, refusal, use_kernel


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No interpreter, nothing remembered."""
    monkeypatch.delenv("LINEARIZE_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "_ran", {})
    monkeypatch.setattr(backend, "_said", set())
    backend._unable.cache_clear()
    yield
    backend._unable.cache_clear()


class OnGpu:
    """What is asked of a tensor, of one on a GPU that this machine need not have."""

    def __init__(self, dtype=torch.bfloat16, kind="cuda"):
        self.device, self.dtype = torch.device(kind), dtype


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with Triton; returns how to change its capability."""

    def of(*capability):
        backend._unable.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    of(9, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    found = importlib.util.find_spec("json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: found)
    return of


def test_on_a_cpu_the_reference_runs_and_says_why():
    assert refusal(torch.zeros(2)) == "the tensors are on cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # on a CPU nobody expects a kernel, so nothing is said
        assert not use_kernel("joint", refusal(torch.zeros(2)))
    assert ran() == {"joint": "reference: the tensors are on cpu"}


def test_on_a_gpu_the_kernel_runs(gpu):
    assert refusal(OnGpu(), OnGpu(torch.float32)) is None
    assert use_kernel("joint", refusal(OnGpu()), None)
    assert ran() == {"joint": "triton"}


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_every_capability_from_8_on_is_taken(gpu, capability):
    gpu(*capability)
    assert refusal(OnGpu()) is None


def test_an_older_gpu_is_refused(gpu):
    gpu(7, 5)
    assert refusal(OnGpu()) == "the GPU's compute capability is 7.5, below 8.0"


@pytest.mark.parametrize(
    ("capability", "width", "tried"), [((10, 0), 64, False), ((10, 0), 128, True), ((9, 0), 64, True)]
)
def test_what_triton_does_not_compile_for_a_gpu_is_not_tried_there(gpu, capability, width, tried):
    gpu(*capability)
    x = OnGpu()
    x.shape = (1, 100, 4, width)
    assert (breaks_compiler(x, x) is None) == tried


def test_without_triton_the_reference_runs(gpu, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    assert refusal(OnGpu()) == "Triton is not installed"


def test_rocm_is_refused(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert refusal(OnGpu()) == "ROCm is not supported"


@pytest.mark.parametrize("kind", ["mps", "xpu", "meta"])
def test_other_devices_are_refused(gpu, kind):
    assert refusal(OnGpu(kind=kind)) == f"the tensors are on {kind}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.float8_e4m3fn])
def test_types_that_no_kernel_computes_are_refused(gpu, dtype):
    name = str(dtype).removeprefix("torch.")
    assert refusal(OnGpu(), OnGpu(dtype)) == f"{name} is not computed by kernels"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types_that_kernels_compute_are_taken(gpu, dtype):
    assert refusal(OnGpu(dtype)) is None


def test_the_first_reason_is_the_one_remembered(gpu):
    with pytest.warns(RuntimeWarning, match="joint: the slower reference runs, because there is a softcap"):
        assert not use_kernel("joint", refusal(OnGpu()), None, "there is a softcap", "F is odd")
    assert ran()["joint"] == "reference: there is a softcap"


def test_a_reason_is_said_once_for_each_operation(gpu):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for operation in ("joint", "joint", "gated", "joint"):
            use_kernel(operation, "there is a softcap")
        use_kernel("joint", "F is odd")
    assert [str(warning.message) for warning in said] == [
        "joint: the slower reference runs, because there is a softcap",
        "gated: the slower reference runs, because there is a softcap",
        "joint: the slower reference runs, because F is odd",
    ]


def test_what_ran_last_counts(gpu):
    with pytest.warns(RuntimeWarning):
        use_kernel("joint", "there is a softcap")
    use_kernel("joint", None)
    assert ran() == {"joint": "triton"}
    ran()["joint"] = "changed"  # a copy
    assert ran() == {"joint": "triton"}


def test_the_reference_can_be_asked_for_and_is_then_not_complained_about(gpu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with reference_only():
            assert refusal(OnGpu()) == "the reference was asked for"
            assert not use_kernel("joint", refusal(OnGpu()))
            with reference_only():
                pass
            assert refusal(OnGpu()) == "the reference was asked for"  # the outer block still holds
    assert refusal(OnGpu()) is None
    with pytest.raises(KeyError), reference_only():
        raise KeyError
    assert refusal(OnGpu()) is None


@pytest.mark.parametrize(
    ("ours", "triton", "expected"), [("1", "1", True), ("1", "0", False), ("0", "1", False)]
)
def test_the_interpreter_has_to_be_asked_for_twice(monkeypatch, ours, triton, expected):
    """Triton's switch alone is what tests of kernels set; models on a CPU keep the fast reference beside it."""
    monkeypatch.setenv("LINEARIZE_INTERPRET", ours)
    monkeypatch.setenv("TRITON_INTERPRET", triton)
    assert backend.interpreted() is expected
    assert (refusal(torch.zeros(2)) is None) is (expected and importlib.util.find_spec("triton") is not None)


def test_torch_alone_imports_the_operations():
    """Triton is optional: nothing that a model imports needs it."""
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import linearize.modeling.ops, linearize.modeling.registry, linearize.modeling.launches\n"
        "print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr
