"""What a model keeps of a text that it has read, as one file: read a document once, ask about it many times.

    state = linearize.state.read(model, tokenizer, document)
    linearize.state.save(state, "document.state")
    state = linearize.state.load("document.state", model)       # in any process, on any device
    linearize.generate(model, tokenizer, "In short:", state=state)

A converted layer costs its state, however long the text was; a layer that keeps softmax costs its KV cache, counted
apart. The file is safetensors: one tensor per field of every layer's state, and the token ids (four bytes each), so
that whatever looks at the whole sequence (a repetition penalty, say) sees it. Its header names the checkpoint by a
hash of configuration and weights, because a state means nothing to other weights.
"""

import contextlib
import copy
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache

from .files import sha256_of_tensor
from .modeling.cache import CACHE
from .modeling.errors import CheckpointError, EvaluationError
from .progress import Progress, Watch
from .provenance import origin

FORMAT = 1
HEADER = "linearize_state"
CHUNK = 8192  # tokens of one forward: what bounds the memory of reading
VOLATILE = ("transformers_version", "_name_or_path", "auto_map", "architectures", "dtype", "use_cache")
"""Keys of a configuration that say how it was saved or loaded, not what the model computes."""


@dataclass(frozen=True)
class Info:
    """What a state file is of, and what it costs."""

    tokens: int
    """Tokens read."""
    state_bytes: int
    """Of the converted layers."""
    kv_bytes: int
    """Keys and values of the layers that keep softmax, which grow with the text."""
    token_bytes: int
    """The ids of the tokens."""
    teacher_bytes: int
    """What the KV cache of the same text takes where no layer is converted."""
    checkpoint: str
    """Hash of configuration and weights."""
    versions: dict[str, str]
    date: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PromptState:
    """A text as its reader keeps it. It may be continued any number of times, from several threads."""

    tokens: Tensor
    """[T] ids of what was read."""
    checkpoint: str
    layers: list[Any]
    """One cache layer per layer of the model."""
    teacher_bytes: int
    """As in :class:`Info`; 0 where the model is no student, whose KV cache is what it keeps."""

    def cache(self) -> DynamicCache:
        """A cache that has read the text, to be given to the model; the state itself stays as it is."""
        made = DynamicCache()
        made.layers = [copy.copy(layer) for layer in self.layers]
        return made

    def before(self, ids: Tensor, copies: int = 1) -> tuple[Tensor, DynamicCache]:
        """The whole sequence [B, T + n] for ``model.generate()``, where ids [B, n] follow the text, and its cache.

        ``copies`` rows of each sequence are generated at once, as beams are.
        """
        cache = self.cache()
        if len(ids) * copies > 1:
            cache.batch_repeat_interleave(len(ids) * copies)
        return torch.cat([self.tokens.to(ids.device).expand(len(ids), -1), ids], 1), cache

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the file holds, by name."""
        found = {"tokens": self.tokens.to(torch.int32)}
        for index, layer in enumerate(self.layers):
            found |= {f"layers.{index}.{field}": tensor for field, tensor in _fields(layer).items()}
        return found

    def info(self) -> Info:
        """Its sizes and its origin."""
        made, sizes = origin(), [0, 0]
        for layer in self.layers:
            sizes[not _is_state(layer)] += sum(t.numel() * t.element_size() for t in _fields(layer).values())
        return Info(
            tokens=len(self.tokens),
            state_bytes=sizes[0],
            kv_bytes=sizes[1],
            token_bytes=4 * len(self.tokens),
            teacher_bytes=self.teacher_bytes or sizes[1],
            checkpoint=self.checkpoint,
            versions=made["versions"],
            date=made["date"],
        )


@torch.no_grad()
def read(model: Any, tokenizer: Any, text: str, *, progress: Watch | None = None) -> PromptState:
    """Have ``model`` read ``text``. Raises :class:`EvaluationError` where there is nothing to read."""
    if tokenizer is None:
        raise EvaluationError("tokenizer: the model's folder has none; save its teacher's tokenizer there")
    device = next(model.parameters()).device
    ids = tokenizer(text, return_tensors="pt").input_ids.long().to(device)
    if ids.shape[1] == 0:
        raise EvaluationError("text: it has no tokens, so there is nothing to read; give at least one word")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    was_training = model.training
    model.eval()
    cache, done = DynamicCache(config=model.config), 0
    try:
        for part in ids.split(CHUNK, dim=1):
            model.base_model(part, use_cache=True, **{CACHE: cache})
            done += part.shape[1]
            if progress is not None:
                progress(Progress("read", done, ids.shape[1]))
    except IndexError as error:
        if limit is None or ids.shape[1] <= limit:
            raise
        raise EvaluationError(
            f"text: its {ids.shape[1]} tokens pass the model's table of {limit} positions; shorten it"
        ) from error
    finally:
        model.train(was_training)
    return PromptState(ids[0].cpu(), fingerprint(model), cache.layers, _teacher_bytes(model, ids.shape[1]))


def save(state: PromptState, path: str | Path) -> Info:
    """Write the file, whole or not at all; returns what it costs."""
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.tensors().items()}
    info = state.info()
    header = {"format": FORMAT, **info.to_dict(), "digest": _digest(tensors, info.checkpoint)}
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, beside, metadata={HEADER: json.dumps(header)})
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{path}: could not be written ({reason}); choose another place") from error
    finally:
        with contextlib.suppress(OSError):  # already renamed, or never there
            beside.unlink()
    return info


def load(path: str | Path, model: Any) -> PromptState:
    """The state of a file, on the model's device.

    Raises :class:`CheckpointError` for a file that is damaged or no state, and for a state of other weights.
    """
    header, tensors = _open(Path(path))
    _check_whole(path, header, tensors)
    mine = fingerprint(model)
    if header["checkpoint"] != mine:
        raise CheckpointError(
            f"{path}: is a state of another checkpoint ({header['checkpoint'][:12]}, this one is {mine[:12]}), or of "
            "this one in another dtype or with other fields; save it again with this one"
        )
    device = next(model.parameters()).device
    layers = _empty_layers(model)
    read_tokens = len(tensors["tokens"])
    left = set(tensors) - {"tokens"}
    for index, layer in enumerate(layers):
        fields = _fields(layer)
        names = {field: f"layers.{index}.{field}" for field in fields}
        for field, like in fields.items():
            saved = tensors.get(names[field])
            if saved is None or saved.dtype != like.dtype or saved.ndim != like.ndim or len(saved) != 1:
                raise CheckpointError(
                    f"{path}: layer {index} does not hold {field!r} as this version keeps it; save the state again"
                )
        _fill(layer, {field: tensors[name].to(device) for field, name in names.items()}, read_tokens)
        left -= set(names.values())
    if left:
        raise CheckpointError(
            f"{path}: holds {min(left)!r}, which this version does not keep; save the state again"
        )
    return PromptState(tensors["tokens"].long(), mine, layers, header["teacher_bytes"])


def info(path: str | Path) -> Info:
    """What a file says of itself, after a look at whether it is whole; no model is needed."""
    header, tensors = _open(Path(path))
    _check_whole(path, header, tensors)
    return Info(**{name: header[name] for name in Info.__dataclass_fields__})


def fingerprint(model: Any) -> str:
    """Hash of a model's configuration and weights, as they are in memory; the same on every device."""
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in VOLATILE}
    if isinstance(config.get("linearize"), Mapping):
        config["linearize"] = {k: v for k, v in config["linearize"].items() if k != "version"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    weights = sorted(model.state_dict().items())
    with ThreadPoolExecutor() as pool:  # hashing large tensors leaves Python's lock
        for (name, _), own in zip(weights, pool.map(lambda w: sha256_of_tensor(w[1]), weights), strict=True):
            digest.update(f"{name}\0{own}\n".encode())
    return digest.hexdigest()


def _digest(tensors: Mapping[str, Tensor], checkpoint: str) -> str:
    lines = [checkpoint, *(f"{name} {sha256_of_tensor(tensor)}" for name, tensor in sorted(tensors.items()))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; make one with `linearize state save`")
    try:
        with safe_open(path, "pt") as file:
            words = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()} if words else {}  # noqa: SIM118
        header = json.loads(words) if words else None
    except (SafetensorError, OSError, ValueError) as error:
        line = str(error).partition("\n")[0][:120]
        raise CheckpointError(f"{path}: is damaged or no state file ({line}); save the state again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: is no saved state; give a file of `linearize state save`")
    if not isinstance(header.get("format"), int) or header["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: format {header.get('format')} is newer than {FORMAT}, the newest this version reads; "
            "upgrade linearize"
        )
    return header, tensors


def _check_whole(path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    known = {*Info.__dataclass_fields__, "digest"} <= header.keys() and "tokens" in tensors
    if not known or _digest(tensors, str(header["checkpoint"])) != header["digest"]:
        raise CheckpointError(
            f"{path}: is damaged (its contents are not what was written); save the state again"
        )


@torch.no_grad()
def _empty_layers(model: Any) -> list[Any]:
    """Cache layers of the model's own classes, to be filled: what it keeps of one token shows their kind."""
    cache = DynamicCache(config=model.config)
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    was_training = model.training
    model.eval()
    try:
        model.base_model(token, use_cache=True, **{CACHE: cache})
    finally:
        model.train(was_training)
    return cache.layers


def _is_state(layer: Any) -> bool:
    return getattr(layer, "is_linearize_state", False)


def _fields(layer: Any) -> dict[str, Tensor]:
    return dict(layer.state._asdict()) if _is_state(layer) else {"keys": layer.keys, "values": layer.values}


def _fill(layer: Any, fields: Mapping[str, Tensor], seen: int) -> None:
    if _is_state(layer):
        layer.state = type(layer.state)(**fields)
        layer._seen = seen
        return
    layer.keys, layer.values = fields["keys"], fields["values"]
    if hasattr(layer, "cumulative_length"):  # a sliding window holds fewer tokens than it has seen
        layer.cumulative_length = seen


def _teacher_bytes(model: Any, tokens: int) -> int:
    """Of a KV cache with every token in every layer, sliding windows cut; 0 where the model is no student."""
    spec = getattr(model.config, "linearize", None)
    size, total = next(model.parameters()).element_size(), 0
    for layer in spec["layers"].values() if spec else ():
        g = layer["geometry"]
        held = min(tokens, layer["sliding_window"] or tokens)
        total += held * g["kv_heads"] * (g["key_dim"] + g["value_dim"]) * size
    return total
