"""Where numbers come from: date, machine, versions."""

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import __version__

LIBRARIES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "lm-eval",
)


def origin() -> dict[str, Any]:
    """Date, machine and versions, as every file of results has them."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.platform(), "cpus": os.cpu_count(), "gpu": gpu},
        "versions": {"linearize": __version__, "python": platform.python_version(), **_libraries()},
    }


def _libraries() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
