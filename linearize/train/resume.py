"""What a training stage leaves on disk, and how it comes back bit for bit.

    folder/
      metrics.jsonl            see tracking.py
      checkpoint-00000200/     while the stage runs; the newest whole folder counts
        weights.safetensors    the trained parameters
        optimizer.safetensors  AdamW's moments and step counts, "<key>/<parameter>"
        state.json             step, tokens, seconds, settings, random states of every process
        manifest.json          sha256 of the three
      weights.safetensors      when the stage is finished
      done.json                written last: its presence means finished; the weights' sha256 is in it

Nothing is pickled. A folder is written under a temporary name, flushed to disk and renamed, and loses its name before
it is removed, so that a kill at any instant leaves either the old checkpoint or the new one. What a disk has damaged
since is told by the hashes.
"""

import base64
import json
import logging
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from linearize.files import sha256_of, sync
from linearize.modeling.errors import TrainingError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
Parameters = Mapping[str, torch.nn.Parameter]


def save_checkpoint(
    folder: Path, state: dict[str, Any], parameters: Parameters, optimizer: torch.optim.Optimizer
) -> None:
    """A new `checkpoint-<step>`, then away with the older ones."""
    final = folder / f"checkpoint-{state['step']:08d}"
    beside = folder / (final.name + ".tmp")
    with writing(folder, beside):
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        _save_tensors(beside / "weights.safetensors", parameters)
        moments = {
            f"{k}/{name}": v for name, p in parameters.items() for k, v in optimizer.state.get(p, {}).items()
        }
        _save_tensors(beside / "optimizer.safetensors", moments)
        _write_json(beside / "state.json", state)
        _write_json(beside / MANIFEST, {path.name: sha256_of(path) for path in sorted(beside.iterdir())})
        sync(beside)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(beside, final)
        sync(folder)
    drop_checkpoints(folder, except_for=final)


def load_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its state, or None when there is none to resume from.

    One that was damaged on the disk is passed over with a warning, and is an error where there is no other.
    """
    found = [(checkpoint, damage(checkpoint)) for checkpoint in reversed(_checkpoints(folder))]
    for checkpoint, harm in found:
        if harm is None:
            return checkpoint, read_json(checkpoint / "state.json")
        logger.warning("%s; the checkpoint before it is tried", harm)
    if found:
        raise TrainingError(f"{found[0][1]}; {AGAIN}")
    return None


def damage(checkpoint: Path) -> str | None:
    """What is not as it was written, in words; None where all is."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        hashes = {name: sha256_of(checkpoint / name) for name in manifest}
    except (OSError, ValueError, TypeError) as error:
        return f"{getattr(error, 'filename', None) or checkpoint / MANIFEST}: cannot be read ({error})"
    wrong = [name for name in hashes if hashes[name] != manifest[name]]
    return f"{checkpoint / wrong[0]}: cannot be read (its bytes have changed)" if wrong else None


def restore(checkpoint: Path, parameters: Parameters, optimizer: torch.optim.Optimizer) -> None:
    """Parameters and optimiser exactly as they were when the checkpoint was written."""
    restore_weights(checkpoint / "weights.safetensors", parameters)
    moments = _load_tensors(checkpoint / "optimizer.safetensors")
    state = {i: {} for i in range(len(parameters))}
    index = {name: i for i, name in enumerate(parameters)}
    for key, tensor in moments.items():
        kind, name = key.split("/", 1)
        state[index[name]][kind] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {i: s for i, s in state.items() if s}, "param_groups": groups})


def save_weights(path: Path, parameters: Parameters) -> str:
    """The file whole or not at all; returns its sha256."""
    beside = path.with_name(path.name + ".tmp")
    with writing(path.parent, beside):
        path.parent.mkdir(parents=True, exist_ok=True)
        _save_tensors(beside, parameters)
        digest = sha256_of(beside)
        os.replace(beside, path)
        sync(path.parent)
    return digest


@torch.no_grad()
def restore_weights(path: Path, parameters: Parameters) -> None:
    saved = _load_tensors(path)
    if {n: tuple(t.shape) for n, t in saved.items()} != {n: tuple(p.shape) for n, p in parameters.items()}:
        odd = sorted(set(saved) ^ set(parameters)) or ["a shape"]
        raise TrainingError(f"{path}: holds other parameters than this model trains ({odd[0]}, ...); {AGAIN}")
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])


def write_done(folder: Path, record: dict[str, Any]) -> None:
    beside = folder / "done.json.tmp"
    with writing(folder, beside):
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(beside, record)
        os.replace(beside, folder / "done.json")
        sync(folder)


def drop_checkpoints(folder: Path, *, except_for: Path | None = None) -> None:
    for old in folder.glob("checkpoint-*"):
        if old != except_for:
            going = old if old.suffix == ".tmp" else old.with_name(old.name + ".old.tmp")
            with suppress(OSError):  # a folder that cannot go is in nobody's way
                if going != old:
                    os.rename(old, going)
                shutil.rmtree(going)


def forget(folder: Path) -> None:
    """A stage begins anew: everything of an earlier attempt goes."""
    for name in (
        "done.json",
        "weights.safetensors",
        "metrics.jsonl",
    ):  # done.json first: without it nothing counts
        (folder / name).unlink(missing_ok=True)
    drop_checkpoints(folder)


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: cannot be read ({error}); {AGAIN}") from error


def check_settings(folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on from a run that was started with other settings, naming the keys."""
    old, new = dict(_flat(saved)), dict(_flat(json.loads(json.dumps(now))))
    changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    if changed:
        what = "; ".join(f"{k} was {_short(old.get(k))}, now {_short(new.get(k))}" for k in changed[:6])
        more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
        raise TrainingError(
            f"{folder}: was started with other settings ({what}{more}); put them back, or {AGAIN}"
        )


AGAIN = "delete the folder, or choose another, to start again"


def rng_state(device: torch.device) -> dict[str, Any]:
    """The random states of this process as JSON: python, torch on CPU, torch on `device`."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(words), gauss], "torch": _text(torch.get_rng_state())}
    if device.type == "cuda":
        state["cuda"] = _text(torch.cuda.get_rng_state(device))
    return state


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(_tensor(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_tensor(state["cuda"]), device)


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seeded inside, untouched outside: what follows is the same whether a stage ran or was skipped."""
    outside = rng_state(device)
    random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_rng_state(outside, device)


@contextmanager
def writing(folder: Path, beside: Path | None = None) -> Iterator[None]:
    """A full disk or a read-only folder is told in one line, and the half-written `beside` goes."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True) if beside.is_dir() else beside.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise TrainingError(
            f"{folder}: cannot be written ({reason}); free some space or choose another folder"
        ) from error


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("checkpoint-*") if p.suffix != ".tmp")


def _save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, path)
    sync(path)


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path}: cannot be read ({error}); {AGAIN}") from error


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1))
    sync(path)


def _flat(tree: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{at}.{key}" if at else str(key))
    else:
        yield at, tree


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
