"""What a model's folder may not do to whoever opens it: name code to fetch, or ask for memory in vain.

``teacher`` and ``checkpoint`` ask here before transformers reads the folder; each gives the words to its own error.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

ADAPTER = "adapter_config.json"
"""transformers would load what it names, from wherever that is."""
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
MOST_LEVELS = 20
SLACK = 2**20
"""Numbers that a model may have without weights in its files: tables, tied or empty tensors."""


def refusal(fields: Any, folder: Path | None) -> str | None:
    """Why a ``config.json`` is not even looked into, in words; None where it may be.

    ``folder`` is where the weights are, if they are on this machine.
    """
    if not isinstance(fields, Mapping):
        return "config.json does not hold keys and values"
    if folder is not None and (folder / ADAPTER).exists():
        return f"holds {ADAPTER}, so it is an adapter, whose base may be anywhere; merge it first"
    if not isinstance(fields.get("model_type", ""), str):
        return "config.json: model_type is not text"
    layers = None if folder is None else _count(folder)
    for key, value, level in _entries(fields):
        if level > MOST_LEVELS:
            return f"config.json has more than {MOST_LEVELS} levels"
        if (
            isinstance(value, str)
            and "/" in value
            and key.strip("_").removesuffix("_internal") in IMPLEMENTATIONS
        ):
            return (
                f"config.json: {key}: {value!r} names code of the Hub, which is not fetched; remove the key"
            )
        # Not `max_window_layers` and its like, which bound a choice and build nothing.
        sized = "layers" in key and not key.startswith("max_")
        if isinstance(value, int) and layers and sized and value > layers:
            return f"config.json: {key}: {value} is more than the {layers} tensors of the weights"
    return None


def excess(build: Callable[[], Any], folder: Path) -> str | None:
    """Why the model is not built in memory, in words: it would be larger than what its files fill.

    ``build`` makes it; here it is made of shapes alone.
    """
    with torch.device("meta"):
        model = build()
    wanted, held = sum(p.numel() for p in model.state_dict().values()), _numbers(folder)
    if wanted > 2 * held + SLACK:
        return f"config.json describes {wanted:,} weights, and the files hold {held:,}"
    return None


def _entries(tree: Any, key: str = "", level: int = 0) -> Iterator[tuple[str, Any, int]]:
    yield key, tree, level
    if level > MOST_LEVELS:
        return
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _entries(value, str(name), level + 1)
    elif isinstance(tree, list):
        for value in tree:
            yield from _entries(value, key, level + 1)


def _shapes(folder: Path) -> Iterator[list[int]]:
    """Of every tensor in the folder's safetensors files; those that cannot be read are left to who loads them."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                yield from [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        except (SafetensorError, OSError):
            continue


def _count(folder: Path) -> int:
    return sum(1 for _ in _shapes(folder))


def _numbers(folder: Path) -> int:
    return sum(math.prod(shape) for shape in _shapes(folder))
