"""What this machine has for linearize: libraries that go together, a GPU, what each method runs on, caches."""

import importlib.metadata
import os
import platform
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from . import __version__
from .modeling.backend import OLDEST, asked
from .modeling.mixer import Geometry, MixerInput
from .modeling.registry import METHODS
from .modeling.tuned import user_file

LIBRARIES = (
    *("torch", "triton", "transformers", "tokenizers", "safetensors", "accelerate", "peft", "datasets"),
    *("huggingface_hub", "pydantic", "typer", "lm-eval", "matplotlib", "tensorboard", "wandb", "trackio"),
)
NEEDED = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "peft",
    "datasets",
    "huggingface_hub",
)
KNOWN_BAD = (
    ("torch", "<2.9", "older than linearize is tested with"),
    ("transformers", "<5.17", "its attention interface and caches are others; pip install -U transformers"),
    ("triton", "<3.6", "compiles products of transposed products wrongly on Hopper; pip install -U triton"),
    ("accelerate", "<1.10", "older than linearize is tested with"),
    ("peft", "<0.18", "knows none of transformers' newer modules; pip install -U peft"),
)
"""Library, versions, and why not. What torch itself asks of Triton is read from torch's own metadata."""
SHAPE = Geometry(heads=4, kv_heads=2, key_dim=64, value_dim=64, hidden=256)
TOKENS = 64


@dataclass(frozen=True)
class Diagnosis:
    """``problems`` are words that say what to do, none where all is well; ``methods`` say what each method ran on."""

    versions: dict[str, str]
    gpu: str | None
    compiler: str | None
    methods: dict[str, str]
    folders: dict[str, str]
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Looks at everything once. Each method takes a few tokens through one small layer on the device that runs use."""
    versions = {"linearize": __version__, "python": platform.python_version(), **_installed()}
    gpu = _gpu()
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    problems = mismatches(versions)
    if gpu is not None:
        if "triton" not in versions:
            problems.append(
                "triton: missing, so that a GPU runs the slow reference; pip install 'linearize[gpu]'"
            )
        elif compiler is None:
            problems.append("no C compiler, which Triton needs for its launchers; apt-get install gcc")
        if torch.version.hip is None and torch.cuda.get_device_capability() < OLDEST:
            problems.append(f"GPU: {gpu} is older than compute capability 8.0; kernels do not run on it")
    elif os.path.exists("/dev/nvidiactl"):
        problems.append("GPU: there is one, and torch does not see it; install a CUDA build of torch")
    methods = {name: _runs_on(name) for name in METHODS}
    folders, full = _folders()
    return Diagnosis(versions, gpu, compiler, methods, folders, problems + full)


def mismatches(versions: dict[str, str]) -> list[str]:
    """What is missing or known not to work among these versions (library -> version), in words."""
    found = [f"{name}: missing; pip install {name}" for name in NEEDED if name not in versions]
    for name, bad, why in KNOWN_BAD:
        if (
            name in versions
            and Version(versions[name]).release
            and SpecifierSet(bad, prereleases=True).contains(Version(versions[name]).public)
        ):
            found.append(f"{name} {versions[name]}: {why}")
    for requirement in map(Requirement, importlib.metadata.requires("torch") or ()):
        wanted, name = requirement.specifier, requirement.name
        applies = requirement.marker is None or requirement.marker.evaluate()
        if (
            name == "triton"
            and name in versions
            and applies
            and not wanted.contains(versions[name], prereleases=True)
        ):
            found.append(
                f"triton {versions[name]}: torch {versions['torch']} wants triton{wanted}; install that one"
            )
    return found


def _installed() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _gpu() -> str | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    major, minor = torch.cuda.get_device_capability()
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability {major}.{minor}"


@torch.no_grad()
def _runs_on(name: str) -> str:
    """``triton`` or ``plain torch``, of each operation that a prefill of the method asked for, as ``ops`` says it."""
    method = METHODS[name]
    if method.mixer is None:
        return "transformers' own attention"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mixer: Any = method.mixer(method.config(), SHAPE).float().to(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(1, TOKENS, *sizes, dtype=dtype, device=device)

    q, k, v = (
        random(SHAPE.heads, SHAPE.key_dim),
        random(SHAPE.kv_heads, SHAPE.key_dim),
        random(SHAPE.kv_heads, 64),
    )
    with asked() as ran, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the reference runs is what is being found out
        mixer(MixerInput(random(SHAPE.hidden), q, k, v, scale=0.125, q_plain=q, k_plain=k))
    if not ran:  # a method of plain torch, which asks for no kernel
        return f"plain torch on {device.type}"
    reasons = {how.partition(": ")[2] for how in ran.values() if how != "triton"}
    if not reasons:
        return f"Triton kernels ({', '.join(sorted(ran))})"
    return f"plain torch: {'; '.join(sorted(reasons))}"


def _folders() -> tuple[dict[str, str], list[str]]:
    from huggingface_hub.constants import HF_HUB_CACHE

    places = {
        "models and data sets": Path(HF_HUB_CACHE),
        "compiled kernels": Path(os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache").expanduser(),
        "tuned kernels": user_file().parent,
        "runs": Path("runs").resolve(),
    }
    told, problems = {}, []
    for what, place in places.items():
        there = next(path for path in (place, *place.parents) if path.exists())
        free = shutil.disk_usage(there).free
        told[what] = f"{place} ({free / 2**30:.0f} GiB free)"
        if not os.access(there, os.W_OK):
            problems.append(f"{place}: cannot be written, and {what} belong there")
        elif free < 2**30:
            problems.append(f"{place}: less than 1 GiB is free, and {what} belong there")
    return told, problems
