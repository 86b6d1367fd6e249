"""A pool: all tokens of one source in a row, with the borders of its documents. Made once, kept on disk."""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ..files import locked, sync
from ..modeling.errors import DataError

logger = logging.getLogger(__name__)

FORMAT = 2  # of the cache's files, and of how documents become tokens; a new number makes every pool anew
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Pool:
    """`tokens` [N] of D documents; document d is `tokens[starts[d]:starts[d + 1]]`, its end token included."""

    tokens: np.ndarray  # [N] uint16 or uint32
    starts: np.ndarray  # [D + 1] int64, from 0 to N
    learnt: np.ndarray | None = (
        None  # [N] bool: False where a token is given, not learnt; None: all are learnt
    )

    @classmethod
    def join(
        cls, documents: Iterable[Sequence[int] | np.ndarray], masks: Sequence[list[bool]] | None = None
    ) -> "Pool":
        """A pool of token lists; empty ones are left out. `masks` has one list per document, of equal length."""
        kept = [np.asarray(ids, dtype=np.uint32) for ids in documents]
        starts = np.cumsum([0, *(len(ids) for ids in kept if len(ids))], dtype=np.int64)
        tokens = np.concatenate(kept) if kept else np.zeros(0, dtype=np.uint32)
        small = len(tokens) == 0 or int(tokens.max()) < 2**16
        learnt = (
            None
            if masks is None
            else np.array([is_learnt for mask in masks for is_learnt in mask], dtype=bool)
        )
        return cls(tokens.astype(np.uint16 if small else np.uint32), starts, learnt)

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, start: int, end: int) -> "Pool":
        """Tokens `start` to `end`; a document cut there stays a document, shorter."""
        inner = self.starts[(self.starts > start) & (self.starts < end)]
        starts = np.concatenate([[start], inner, [end]]) - start if end > start else np.zeros(1)
        learnt = None if self.learnt is None else self.learnt[start:end]
        return Pool(self.tokens[start:end], starts.astype(np.int64), learnt)

    def split(self, at_least: int) -> tuple["Pool", "Pool"]:
        """The part to train on and the tail that is held out: a tenth, or `at_least` tokens if half is that much.

        The cut falls between two documents, unless the tail would grow to more than twice its share by that.
        """
        n = len(self)
        tail = max(round(n * HELD_OUT_SHARE), min(at_least, n // 2))
        border = int(self.starts[np.searchsorted(self.starts, n - tail, side="right") - 1])
        cut = border if border > 0 and n - border <= 2 * tail else n - tail
        return self.part(0, cut), self.part(cut, n)

    def digest(self) -> str:
        """sha256 of the tokens, borders and mask."""
        state = hashlib.sha256()
        for array in (self.tokens.astype(np.uint32), self.starts, self.learnt):
            state.update(b"|" if array is None else array.tobytes())
        return state.hexdigest()


def cached(folder: Path | None, name: str, key: Any, make: Callable[[Path | None], Pool]) -> Pool:
    """What `make` gives, read from `folder` if the same `key` (plain data) was made there before.

    `make` is given the name of a file where it may keep a part, should it be stopped.
    """
    if folder is None:
        return make(None)
    digest = sha256(json.dumps([FORMAT, key], sort_keys=True))
    path = folder / f"{name}-{digest[:16]}.safetensors"
    if path.is_file():
        try:
            return Pool(**load_file(path))
        except (SafetensorError, TypeError, OSError) as error:
            logger.warning("%s: the cached tokens cannot be read (%s) and are made anew", path, error)
    part = path.with_suffix(".part")
    pool = make(part)
    arrays = {"tokens": pool.tokens, "starts": pool.starts}
    if pool.learnt is not None:
        arrays["learnt"] = pool.learnt
    write_arrays(path, arrays)
    part.unlink(missing_ok=True)
    return pool


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A safetensors file, whole or not at all; what killed writers have left beside it goes."""
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(".pool-*.tmp"):
        with contextlib.suppress(OSError), locked(old) as abandoned:
            if abandoned:
                old.unlink()
    handle, name = tempfile.mkstemp(dir=folder, prefix=".pool-", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        with locked(temporary):
            save_file({field: np.ascontiguousarray(array) for field, array in arrays.items()}, temporary)
            sync(temporary)
            os.replace(temporary, path)
    except SafetensorError as error:  # how safetensors tells a full disk
        raise DataError(
            f"{path}: cannot be written ({error}); free some space or choose another folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def sha256(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of everything that decides how text becomes tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return sha256(f"{rules}|{tokenizer.eos_token_id}|{getattr(tokenizer, 'chat_template', None)}")


def model_digest(model: torch.nn.Module) -> str:
    """sha256 of a thousand evenly spaced values of every parameter: quick for any size, changed by any training."""
    state = hashlib.sha256()
    for name, value in model.state_dict().items():
        flat = value.detach().flatten()
        some = flat[:: max(1, len(flat) // 1000)].float().cpu().numpy()
        state.update(f"{name}{tuple(value.shape)}{value.dtype}".encode() + some.tobytes())
    return state.hexdigest()
