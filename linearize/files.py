"""Files written whole or not at all, and their hashes."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """The file whole or not at all, whenever the process ends; a link in its place is replaced, not followed."""
    beside = path.with_name(f"{path.name}.tmp")
    beside.unlink(missing_ok=True)  # of a writer that was killed
    try:
        with beside.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, tree: Any) -> None:
    """``tree`` as indented JSON, the file whole or not at all; raises ValueError for numbers JSON has no word for."""
    write_text(path, json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def sync(path: Path) -> None:
    """fsync of a file or folder: a rename is only as durable as what it renames."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Holds a lock that ends with its process, however that ends; gives whether it was to be had."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except OSError:  # a writer has it, or the file system knows no locks
        held = False
    try:
        yield held
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_tensor(tensor: Any) -> str:
    """Of a tensor's dtype, shape and values, wherever it lives."""
    import torch  # not at module level: recipes are read and written without it

    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    digest.update(flat.numpy())
    return digest.hexdigest()


def sha256_of_files(paths: Iterable[Path], root: Path) -> str:
    """Of several files, their names below ``root`` included, whatever order they come in."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(root).as_posix()}\0{sha256_of(path)}\n".encode())
    return digest.hexdigest()
