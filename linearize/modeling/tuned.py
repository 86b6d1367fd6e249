"""Measured launch settings: rows of this project and of the user, and which of them is taken.

A row is measured on one class of device at one set of widths, by an explicit run (``linearize tune``); a launch never
tunes. It is taken where no more is asked of it than was measured, and only if the card has the shared memory. The
user's rows, in a JSON file, come before ours (``TUNED``), and both before the defaults of ``launches.py``.
"""

import contextlib
import functools
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .errors import LinearizeError
from .launches import TABLE, Launch, shared_memory

FORMAT = 1
"""Version of the user's file; others are refused."""


class Row(NamedTuple):
    """A measured setting, and what it was measured at."""

    kernel: str
    launch: Launch
    device: str
    """Class of the device, as :func:`device_class` names it."""
    K: int | None = None
    V: int | None = None
    F: int | None = None
    dtype: str | None = None
    """The inputs', such as bfloat16."""
    milliseconds: float | None = None
    default_milliseconds: float | None = None
    versions: str = ""
    date: str = ""

    def serves(self, ask: "Ask") -> bool:
        """Whether the setting is safe for what is asked: nothing is wider than it was measured at."""
        wide = all(
            mine == asked or (mine is not None and asked is not None and mine >= asked)
            for mine, asked in zip((self.K, self.V, self.F), ask[2:5], strict=True)
        )
        return wide and (self.dtype == ask.dtype or bytes_of(self.dtype) >= bytes_of(ask.dtype))

    def excess(self, ask: "Ask") -> int:
        """How far from what is asked it was measured; 0 is exact."""
        pairs = zip((self.K, self.V, self.F), ask[2:5], strict=True)
        return sum((mine or 0) - (asked or 0) for mine, asked in pairs) + 1000 * (self.dtype != ask.dtype)


class Ask(NamedTuple):
    """What a launch asks for."""

    kernel: str
    device: str
    K: int | None
    V: int | None
    F: int | None
    dtype: str | None


def _h100(
    kernel: str,
    setting: Launch,
    widths: tuple[int | None, int | None, int | None],
    dtype: str,
    milliseconds: float,
    before: float,
) -> Row:
    versions, date = "torch 2.11.0+cu130, triton 3.6.0", "2026-11-26"
    return Row(kernel, setting, "h100", *widths, dtype, milliseconds, before, versions, date)


# Measured rows of this project, of `linearize tune`: what was faster on an H100 than the defaults.
TUNED: list[Row] = [
    _h100(
        "liger_step",
        Launch({"SPLITS": 2, "BV": 64, "BN": 64, "DEPTH": 2}, 2, 1),
        (128, 128, None),
        "bfloat16",
        0.02731,
        0.02873,
    ),
    _h100(
        "liger_step_few",
        Launch({"SPLITS": 4, "BV": 32, "BN": 64, "DEPTH": 2}, 4, 1),
        (128, 128, None),
        "bfloat16",
        0.00962,
        0.00985,
    ),
    _h100(
        "gated_liger_scan",
        Launch({"BV": 2, "STAGES": 6}, 4, 1),
        (128, None, None),
        "float32",
        1.40485,
        1.43678,
    ),
    _h100(
        "selected_local_dkv",
        Launch({"tokens": 64, "queries": 32}, 4, 3),
        (128, 128, None),
        "bfloat16",
        16.45674,
        17.09427,
    ),
    _h100(
        "selected_kept_forward",
        Launch({"heads": 1, "keys": 64}, 4, 2),
        (128, 128, None),
        "bfloat16",
        2.61245,
        2.67482,
    ),
    _h100(
        "selected_kept_dq",
        Launch({"heads": 2, "keys": 64}, 8, 2),
        (128, 128, None),
        "bfloat16",
        5.70246,
        5.94349,
    ),
]

# Card -> others of its architecture whose rows serve it before the defaults do. Most defaults were measured on an H200,
# which therefore takes no other card's rows.
KIN = {"h100": ("h200",)}

# Kernel -> setting inside `using`. Not a context variable: autograd runs a backward in a thread of its own.
_forced: dict[str, Launch] = {}
_heard: list[Ask] | None = None
# What was asked for, with the memory there was -> the row that served: a launch is asked for at every call of a layer.
_served: dict[tuple[Ask, int], Row | None] = {}


def chosen(
    kernel: str, device: torch.device, K: int | None, V: int | None, F: int | None, dtype: torch.dtype | None
) -> Launch | None:
    """The setting of a launch; None where the default is to be taken."""
    if _heard is None and not _forced and not TUNED and not _user_rows():
        return None
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    ask = Ask(kernel, device_class(device), K, V, F, name)
    if _heard is not None:
        _heard.append(ask)
    if kernel in _forced:
        return _forced[kernel]
    if device.type != "cuda":
        return None
    key = ask, shared_memory(device)
    if key not in _served:
        _served[key] = nearest(*key)
    row = _served[key]
    return None if row is None else row.launch


def nearest(ask: Ask, room: int) -> Row | None:
    """The measured row that serves: of this class of device before its kin, the user's before ours, the nearest widths
    before others, the newest before older ones; None without one."""
    devices = (ask.device, *KIN.get(ask.device, ()))
    for device, rows in itertools.product(devices, (_user_rows(), TUNED)):
        fit = [
            row
            for row in reversed(rows)
            if row.kernel == ask.kernel
            and row.device == device
            and row.launch.blocks.keys()
            == TABLE[ask.kernel][0].blocks.keys()  # else it is of another version
            and row.launch.shared <= room
            and row.serves(ask)
        ]
        if fit:
            return min(fit, key=lambda row: row.excess(ask))
    return None


@contextlib.contextmanager
def using(kernel: str, setting: Launch) -> Iterator[None]:
    """Inside, every launch of ``kernel`` takes this setting."""
    before = _forced.get(kernel)
    _forced[kernel] = setting
    try:
        yield
    finally:
        if before is None:
            del _forced[kernel]
        else:
            _forced[kernel] = before


@contextlib.contextmanager
def listening() -> Iterator[list[Ask]]:
    """What launches inside ask for, in a list that grows."""
    global _heard
    before, _heard = _heard, []
    try:
        yield _heard
    finally:
        _heard = before


@functools.cache
def device_class(device: torch.device) -> str:
    """``h100``, ``rtx-4090``: the card's name without its maker, memory and plug; ``cpu`` where there is none."""
    return class_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


@functools.cache
def class_of(name: str) -> str:
    """:func:`device_class` of a name such as ``NVIDIA H100 80GB HBM3``."""
    noise = r"nvidia|geforce|tesla|quadro|hbm\w*|sxm\d*|pcie|nvl|gpu|graphics|device|generation|\d+gb"
    words = [word for word in re.split(r"[\s-]+", name.lower()) if not re.fullmatch(noise, word)]
    return "-".join(words) or name.lower()


def bytes_of(dtype: str | None) -> int:
    """Bytes of a type by its name; 2 where it was not given."""
    return 2 if dtype is None else getattr(torch, dtype).itemsize


# The user's rows


def user_file() -> Path:
    """``$LINEARIZE_LAUNCHES``, or ``linearize/launches.json`` in the cache folder."""
    if given := os.environ.get("LINEARIZE_LAUNCHES"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "linearize" / "launches.json"


@functools.cache
def _user_rows() -> list[Row]:
    return read_rows(user_file())


def forget_rows() -> None:
    """Read the file again, and choose anew, at the next launch."""
    _user_rows.cache_clear()
    _served.clear()


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, none where there is no file; raises :class:`LinearizeError` where it is not ours."""
    remedy = "mend or delete the file; `linearize tune` writes it anew"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LinearizeError(f"{path}: not a readable JSON file ({error}); {remedy}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("rows"), list):
        raise LinearizeError(f"{path}: no list of rows; {remedy}")
    if tree.get("format") != FORMAT:
        raise LinearizeError(f"{path}: format {tree.get('format')!r} is not {FORMAT}; {remedy}")
    rows = []
    for number, given in enumerate(tree["rows"]):
        try:
            rows.append(_row(given))
        except (KeyError, TypeError, ValueError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise LinearizeError(f"{path}: row {number}: {what}; {remedy}") from None
    return rows


def _row(given: Any) -> Row:
    """A row from its JSON; raises what :func:`read_rows` reports."""
    if not isinstance(given, dict):
        raise TypeError(f"{given!r} is no row")
    found = dict(given)
    blocks = found.pop("blocks")
    if not isinstance(blocks, dict):
        raise TypeError(f"blocks: {blocks!r} is no mapping")
    numbers = {
        **blocks,
        **{key: found.pop(key) for key in ("warps", "stages")},
        "shared": found.pop("shared", 0),
    }
    numbers |= {key: found[key] for key in ("K", "V", "F") if found.get(key) is not None}
    for key, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{key}: {value!r} is impossible")
    if numbers["warps"] not in (1, 2, 4, 8, 16, 32):
        raise ValueError(f"warps: {numbers['warps']!r} is impossible; give a power of two up to 32")
    dtype = found.get("dtype")
    if dtype is not None and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        raise ValueError(f"dtype: {dtype!r} is unknown")
    for key in ("kernel", "device"):
        if not isinstance(found[key], str):
            raise TypeError(f"{key}: {found[key]!r} is no name")
    known = {key: value for key, value in found.items() if key in Row._fields and key != "launch"}
    return Row(launch=Launch(blocks, numbers["warps"], numbers["stages"], numbers["shared"]), **known)


def json_of(row: Row) -> dict[str, Any]:
    """A row as the file holds it."""
    tree: Mapping[str, Any] = row._asdict()
    return {"kernel": row.kernel, **row.launch._asdict()} | {k: v for k, v in tree.items() if k != "launch"}


def write_rows(path: Path, rows: list[Row]) -> list[Row]:
    """Add rows to a file, in place of those measured at the same; whole or not at all. Returns all it holds."""
    new = {row[:1] + row[2:7]: row for row in rows}
    kept = [row for row in read_rows(path) if row[:1] + row[2:7] not in new]
    whole = [*kept, *new.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            json.dump({"format": FORMAT, "rows": [json_of(row) for row in whole]}, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    forget_rows()
    return whole
