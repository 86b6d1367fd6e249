"""A student without the weights of its teacher: the adapters of stage 2 and the mixers, a few megabytes.

    adapter_config.json         peft's, for the Hub; its target is no module of any model, so that peft refuses to
                                put the adapters on a model whose attention was never converted
    adapter_model.safetensors   the low-rank matrices, under peft's names
    mixers.safetensors          the trained mixers of the student
    linearize_adapter.json      how the teacher is converted, and where the adapters belong

:func:`load_adapter` loads the teacher, converts it, and merges: the student again.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from . import checkpoint
from .files import sha256_of_tensor
from .modeling.errors import CheckpointError, HubError
from .modeling.model import check_format, convert_
from .modeling.registry import METHODS
from .recipe import Recipe, Teacher
from .teacher import load_teacher

ADAPTER_CONFIG = "linearize_adapter.json"
LORA, MIXERS = "adapter_model.safetensors", "mixers.safetensors"
MARKER = "none-load-with-linearize.load-which-converts-the-attention-first"
"""Stands as ``target_modules`` in peft's file; its error quotes it."""
PEFT = "base_model.model."


def write_adapter(student: Path, folder: Path) -> None:
    """Write the four files for a student's folder whose run kept its adapters; raises :class:`HubError` where not."""
    from peft import LoraConfig  # imported where it is needed: it takes seconds

    stage, recipe = student.parent / "finetune", Recipe.from_file(student / "recipe.yaml")
    try:
        trained = load_file(stage / "weights.safetensors")
        targets = json.loads((stage / "done.json").read_text(encoding="utf-8"))["settings"]["lora_targets"]
    except (OSError, ValueError, KeyError, SafetensorError):
        raise HubError(
            f"{stage}: holds no finished adapters; push the whole student, or give the folder of a run that has them"
        ) from None
    teacher = recipe.teacher.name
    if teacher.startswith((".", "/", "~")):
        raise HubError(
            f"{teacher}: a folder of this machine, which nobody can put adapters on; push the whole student"
        )
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(student.glob("*.safetensors")):
        weights |= load_file(path)
    lora = recipe.finetune.lora
    # Adapters inside a mixer are merged into it already.
    adapters = {
        n.replace(".default.", "."): t for n, t in trained.items() if ".lora_" in n and ".mixer." not in n
    }
    places = [target for target in targets if ".mixer." not in target]
    config = json.loads((student / checkpoint.CONFIG).read_text(encoding="utf-8"))
    save_file({f"{PEFT}{n}": t for n, t in adapters.items()}, folder / LORA)
    save_file({n: t for n, t in weights.items() if ".mixer." in n}, folder / MIXERS)
    LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        target_modules=MARKER,
        base_model_name_or_path=teacher,
        revision=recipe.teacher.revision,
        inference_mode=True,
    ).save_pretrained(str(folder))
    record = {
        "format": 1,
        "teacher": {"name": teacher, "revision": recipe.teacher.revision, "dtype": config["dtype"]},
        "base": _digest({n: t for n, t in weights.items() if _untouched(n, places)}),
        "targets": places,
        "linearize": config["linearize"],
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(
        (student / "recipe.yaml").read_text(encoding="utf-8"), encoding="utf-8"
    )


@torch.no_grad()
def load_adapter(folder: Path, device: str = "cpu") -> tuple[Any, Any]:
    """The student, from its teacher and such a folder: bit-equal to the one whose adapters were written.

    Raises :class:`CheckpointError` for a damaged folder, and where the teacher is not the one of the adapters.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    try:
        record = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        lora, mixers = load_file(folder / LORA), load_file(folder / MIXERS)
        teacher, targets, base = Teacher(**record["teacher"]), record["targets"], record["base"]
        rank = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        size = {"r": rank["r"], "lora_alpha": rank["lora_alpha"]}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        line = str(error).partition("\n")[0][:120]
        raise CheckpointError(f"{folder}: adapters cannot be read ({line}); download them again") from None
    if asked := [key for key in ("trust_remote_code", "allow_pickle") if getattr(teacher, key)]:
        raise CheckpointError(
            f"{folder}: {ADAPTER_CONFIG}: teacher.{asked[0]}: nothing that is downloaded may ask for that; remove it"
        )
    loaded, tokenizer = load_teacher(teacher)
    model: Any = loaded
    convert_(model, check_format(record.get("linearize")), METHODS)
    state = model.state_dict()
    if _digest({n: t for n, t in state.items() if _untouched(n, targets)}) != base:
        raise CheckpointError(
            f"{folder}: the adapters belong to other weights than {teacher.name} has now; "
            "name their revision in linearize_adapter.json, or take the whole student"
        )
    mine = {name: tensor for name, tensor in state.items() if ".mixer." in name}
    if {n: t.shape for n, t in mine.items()} != {n: t.shape for n, t in mixers.items()}:
        raise CheckpointError(
            f"{folder}: the mixers are not those that its configuration describes; download it again"
        )
    for name, tensor in mine.items():
        tensor.copy_(mixers[name])
    if targets:
        transposed = all(isinstance(model.get_submodule(target), Conv1D) for target in targets)
        wrapped = get_peft_model(model, LoraConfig(target_modules=targets, fan_in_fan_out=transposed, **size))
        missing = set_peft_model_state_dict(wrapped, lora)
        if missing.unexpected_keys or any("lora_" in key for key in missing.missing_keys):
            raise CheckpointError(f"{folder}: the adapters do not fit their targets; download them again")
        merge_adapters(model)
        wrapped.unload()
    return model.to(device).eval(), tokenizer


@torch.no_grad()
def merge_adapters(model: torch.nn.Module) -> None:
    """Add the adapters to the weights, in fp32, and round once to the weights' own type."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            base: Any = module.get_base_layer()
            dtype = base.weight.dtype
            base.weight.data = base.weight.data.to(torch.promote_types(dtype, torch.float32))
            module.merge(safe_merge=False)
            base.weight.data = base.weight.data.to(dtype)


def _untouched(name: str, targets: list[str]) -> bool:
    """Whether a weight is the teacher's own still."""
    return ".mixer." not in name and name.rpartition(".")[0] not in targets


def _digest(weights: dict[str, torch.Tensor]) -> str:
    """Of the values; a tied weight may be stored under one name or two, so each value counts once."""
    return hashlib.sha256(
        "".join(sorted({sha256_of_tensor(t) for t in weights.values()})).encode()
    ).hexdigest()
