"""The gate on what fine-tuning left: the student's weights are the teacher's with the run's adapters added.

(W + s B A) x = W x + s B (A x): with these weights the student is the model that was trained, adapters apart. Weights
are compared, not outputs, so that nothing is hidden by rounding in the layers behind.
"""

import copy
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..convert import unconvert
from ..files import sha256_of
from ..modeling.errors import RecipeError
from ..recipe import Recipe
from .gate import FAILED, NOT_RUN, PASSED, Gate
from .subject import Subject

NAME = "merged adapters"
MISSING = 0.1
"""Most of the adapters' change that may be missing or too much, by norm: a sum in another order rounds otherwise."""


def merged(subject: Subject, teacher: Any, folder: str | Path | None) -> list[Gate]:
    """No gate where the run of the student in ``folder`` does not hold adapters.

    Adapters inside a mixer are left out: what they were added to is not kept.
    """
    stage = None if folder is None else Path(folder).resolve().parent / "finetune"
    if folder is None or stage is None or not (stage / "weights.safetensors").is_file():
        return []
    try:
        done = json.loads((stage / "done.json").read_text(encoding="utf-8"))
        lora = Recipe.from_file(Path(folder) / "recipe.yaml").finetune.lora
        if sha256_of(stage / "weights.safetensors") != done["weights"]:
            return [
                Gate(NAME, NOT_RUN, note="the weights in the run's finetune folder are not what it wrote")
            ]
        trained, targets = load_file(stage / "weights.safetensors"), done["settings"]["lora_targets"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, RecipeError) as error:
        line = " ".join(str(error).split())[:120]
        return [Gate(NAME, NOT_RUN, note=f"the run's finetune folder cannot be read ({line})")]
    if teacher is None:
        return [Gate(NAME, NOT_RUN, note="the teacher is not at hand")]
    changes = {
        target: lora.alpha / lora.rank * (trained[f"{target}.lora_B.default.weight"].float()
        @ trained[f"{target}.lora_A.default.weight"].float())
        for target in targets
        if ".mixer." not in target
    }  # fmt: skip
    return [_compared(subject, teacher, changes)]


def _compared(subject: Subject, teacher: Any, changes: dict[str, Tensor]) -> Gate:
    # Classes and configuration are copied, tensors are shared.
    tensors = [*subject.model.parameters(), *subject.model.buffers()]
    plain = unconvert(copy.deepcopy(subject.model, {id(t): t for t in tensors}))
    base = dict(teacher.named_parameters())
    worst, where = 0.0, ""
    for name, weight in plain.named_parameters():
        if name not in base or base[name].shape != weight.shape:
            return Gate(NAME, NOT_RUN, note=f"the teacher has no weight {name} of this shape")
        module, change = name.rpartition(".")[0], None
        if name.endswith(".weight"):
            change = changes.get(module)
        if change is not None and isinstance(plain.get_submodule(module), Conv1D):
            change = change.T
        missing = _missing(weight, base[name].to(weight.device), change)
        if missing > worst:
            worst, where = missing, name
    note = f"{len(changes)} projections are the teacher's with the adapters added, all else is the teacher's"
    if worst > MISSING:
        return Gate(NAME, FAILED, where, worst, MISSING, "not the teacher's weights with the adapters added")
    return Gate(NAME, PASSED, where, worst, MISSING, note)


def _missing(weight: Tensor, base: Tensor, change: Tensor | None) -> float:
    """How far a weight is from what it should be, as a share of the change by the adapters."""
    expected = base.float() if change is None else base.float() + change.to(base.device)
    off = (weight.float() - expected.to(weight.dtype).float()).norm().item()
    size = 0.0 if change is None else change.norm().item()
    return off / size if size else float("inf") if off else 0.0
