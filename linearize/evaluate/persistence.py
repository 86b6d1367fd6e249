"""The gates on where a student comes from and goes: its folder in a clean process, and the plain model inside it."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..checkpoint import CONFIG
from ..convert import unconvert
from ..modeling.attention import attention_mode
from ..modeling.model import write_code
from .gate import FAILED, NOT_RUN, PASSED, Gate, lacks_memory
from .one_function import room
from .subject import Subject

_CHILD = """
import sys, torch
from safetensors.torch import load_file, save_file
folder, given, made, device, dtype, threads, plain = sys.argv[1:]
torch.set_num_threads(int(threads))
if plain == "plain":
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=getattr(torch, dtype))
else:
    from linearize.checkpoint import load
    model, _ = load(folder, dtype=getattr(torch, dtype))
ids = load_file(given)["ids"].to(device)
with torch.no_grad():
    logits = model.to(device).eval()(input_ids=ids, use_cache=False).logits
save_file({"logits": logits.cpu().contiguous()}, made)
"""


def reload(subject: Subject, folder: str | Path | None) -> Gate:
    """The saved folder in a process of its own; by plain transformers where its code is ours, which may be run."""
    name = "reload"
    if folder is None:
        return Gate(name, NOT_RUN, note="the student is not saved in a folder as it is")
    folder = Path(folder).resolve()
    own = code_is_ours(subject.model, folder)
    ids = subject.ids(2, room(subject, subject.windows[-1] + 1))
    with tempfile.TemporaryDirectory() as temporary:
        given, made = Path(temporary, "ids.safetensors"), Path(temporary, "logits.safetensors")
        save_file({"ids": ids.cpu().contiguous()}, given)
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        kind = str(subject.dtype).removeprefix("torch.")
        words = [str(folder), str(given), str(made), str(subject.device), kind, str(torch.get_num_threads())]
        ended = subprocess.run(
            [sys.executable, "-c", _CHILD, *words, "plain" if own else "package"],
            cwd=temporary,
            env=os.environ | {"HF_MODULES_CACHE": temporary, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        if ended.returncode or not made.is_file():
            last = (ended.stderr.strip().splitlines() or ["no message"])[-1][:200]
            if lacks_memory(last):
                return Gate(name, NOT_RUN, note=f"out of memory in a clean process ({last})")
            if ended.returncode == -signal.SIGKILL:
                return Gate(
                    name, NOT_RUN, note="its process was killed, as systems do that run out of memory"
                )
            return Gate(name, FAILED, note=f"the folder does not load in a clean process ({last})")
        logits = load_file(made)["logits"]
    here = subject.model(input_ids=ids, use_cache=False).logits.cpu()
    how = "plain transformers" if own else "this package, because the folder's code is not its own"
    if torch.equal(logits, here):
        return Gate(
            name, PASSED, f"length {ids.shape[1]}", 0.0, 0.0, f"bit-equal in a clean process, by {how}"
        )
    difference = (
        (logits.double() - here.double()).abs().max().item() if logits.shape == here.shape else math.inf
    )
    return Gate(name, FAILED, f"length {ids.shape[1]}", difference, 0.0, f"loaded by {how}")


def code_is_ours(model: Any, folder: Path) -> bool:
    """Whether the folder holds exactly the code that this package writes, and so may be run unasked.

    Every file by its place, links to other folders none, and ``auto_map`` names nothing else: it may name another
    repository (``owner/name--module.Class``).
    """
    with tempfile.TemporaryDirectory() as temporary:
        fresh = Path(temporary)
        classes = write_code(type(model), model.config, fresh)
        written = _code(fresh)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        linked = any(path.is_symlink() and path.is_dir() for path in folder.rglob("*"))
        return not linked and config.get("auto_map") == classes and _code(folder) == written
    except (OSError, ValueError, AttributeError):
        return False


def _code(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.py")}


def start(subject: Subject, teacher: Any) -> Gate:
    """Softmax mode against the plain model of the same weights; the teacher too, where it has the same."""
    ids = subject.ids(2, room(subject, 2 * subject.windows[-1] + 1))
    with subject.watched() as layers, attention_mode("softmax"):
        logits = subject.model(input_ids=ids, use_cache=False).logits
    # Classes and configuration are copied, tensors are shared.
    tensors = [*subject.model.parameters(), *subject.model.buffers()]
    plain = unconvert(copy.deepcopy(subject.model, {id(t): t for t in tensors}))
    twin = Subject.__new__(Subject)
    twin.model, twin.spec = plain, subject.spec
    with twin.watched() as own:
        expected = plain(input_ids=ids, use_cache=False).logits
    note = "bit-equal to the same weights unconverted"
    if torch.equal(logits, expected):
        if teacher is None:
            return Gate("start", PASSED, f"length {ids.shape[1]}", 0.0, 0.0, note)
        if not _same_weights(plain, teacher):
            note += "; fine-tuning changed the teacher's"
            return Gate("start", PASSED, f"length {ids.shape[1]}", 0.0, 0.0, note)
        home = teacher.get_input_embeddings().weight.device
        expected = teacher(input_ids=ids.to(home), use_cache=False).logits.to(logits.device)
        note = "bit-equal to the teacher"
        if torch.equal(logits, expected):
            return Gate("start", PASSED, f"length {ids.shape[1]}", 0.0, 0.0, note)
    difference = (logits.double() - expected.double()).abs().max().item()
    odd = [i for i in own if not all(map(torch.equal, layers[i], own[i]))]
    where = f"layer {odd[0]}, length {ids.shape[1]}" if odd else f"length {ids.shape[1]}"
    return Gate("start", FAILED, where, difference, 0.0, "softmax mode is not the plain model")


def _same_weights(plain: nn.Module, teacher: nn.Module) -> bool:
    mine, theirs = plain.state_dict(), teacher.state_dict()
    return mine.keys() == theirs.keys() and all(
        x.dtype == theirs[name].dtype and torch.equal(x, theirs[name].to(x.device))
        for name, x in mine.items()
    )
