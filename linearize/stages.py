"""A student as it was before it was finished: converted but untrained, and after the transfer alone.

Beside the finished one they say what each stage of training bought. Both are made again, from the teacher, the seed and
the mixers' weights that the transfer left in the run's folder.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .convert import convert
from .evaluate.ablations import Stage
from .files import sha256_of
from .methods import adjust
from .modeling.errors import LinearizeError
from .modeling.mixer import MethodConfig
from .recipe import Recipe
from .teacher import load_teacher
from .train.resume import restore_weights
from .train.transfer import TransferStage

UNTRAINED, TRANSFERRED = "converted, untrained", "after the transfer alone"


def converted(model: Any, recipe: Recipe, control: MethodConfig | None = None) -> Any:
    """The model with untrained mixers, their initial values by the seed; ``control`` stands in for every method."""
    layers = recipe.layers
    if control and isinstance(layers, dict):
        layers = {key: method if method.name == "softmax" else control for key, method in layers.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return convert(model, control or recipe.method, layers, convert_sliding=recipe.convert_sliding)


def stages_of(
    student: Path, recipe: Recipe, device: str, fields: Mapping[str, Any] | None = None
) -> Iterator[Stage]:
    """Both earlier states of the student in folder ``student``, each to be used before the next is asked for.

    ``fields`` are set anew as they were in the student (:func:`linearize.adjust`). One that cannot be had says why.
    """
    model, _ = load_teacher(recipe.teacher, device)
    model = adjust(converted(model, recipe), **(fields or {})).eval()
    yield Stage(UNTRAINED, model)
    home = student.resolve().parent / "transfer"
    learnt = dict(TransferStage(model, recipe.transfer).named_parameters())
    reason = _not_at_hand(home)
    if reason is None:
        try:
            restore_weights(home / "weights.safetensors", learnt)
        except LinearizeError as error:
            reason = str(error)
    yield Stage(TRANSFERRED, model if reason is None else None, reason, structural=not learnt)


def _not_at_hand(home: Path) -> str | None:
    """Why a run's folder ``home`` of the transfer does not give its weights; None where it does."""
    try:
        done = json.loads((home / "done.json").read_text(encoding="utf-8"))
        if done["skipped"]:
            return f"there was no transfer: {done['skipped']}"
        if sha256_of(home / "weights.safetensors") != done["weights"]:
            return "the weights in the run's transfer folder are not what the stage wrote"
    except FileNotFoundError:
        return "the run's transfer folder is not beside the student"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"the run's transfer folder cannot be read ({error})"
    return None
