"""``certificate.json`` beside the weights: what a student is, what it is made from, what was measured, what was not.

    identity    sha256 of the teacher's and the student's files, the conversion of every layer, the data, the code
    training    tokens of each stage, seeds, parameters trained and frozen, device, seconds
    measured    the results, with intervals and counts; ``quoted`` is for figures of others, and empty
    not_run     what was not done
    reasons     everything that stands against ``status: complete``

It fails closed: one check not run, a control absent, a count under :data:`LEAST`, a number that is not finite, a hash
that could not be made, and the status is ``incomplete``; with an integrity gate that failed it is ``failed``, and stays
so until the gates are run again. No hash depends on the certificate, but its ``seal``, which is that of all the rest.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from . import __version__
from .checkpoint import CONFIG
from .evaluate import Gates, Results
from .files import sha256_of, sha256_of_files, write_json
from .modeling.errors import CheckpointError, LinearizeError
from .provenance import origin
from .recipe import Recipe, Teacher
from .teacher import teacher_path

CERTIFICATE = "certificate.json"
FORMAT = 1
LEAST = 50
"""Fewest samples of a figure that may be reported."""
SECTIONS = ("likelihood", "recall", "memory", "gates", "ablations", "suite", "lm_eval", "speed")
CONTROLS = ("window control", "matched_window control", "softmax control")
FAILED = "failed: "
"""Begins the reasons of integrity gates that failed."""
COUNTS = ("samples", "sequences", "windows")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*", "*.model",
)  # fmt: skip
Data = Callable[[Mapping[str, Any], bool], tuple[Mapping[str, str | None], str]]
"""(certificate, whether it and the teacher are as they were) -> hashes that could be made, and why not all of them."""


@dataclass(frozen=True)
class Verified:
    """What a second look found: names of hashes, and for those that could not be made again, why."""

    matched: list[str]
    mismatched: list[str]
    not_checked: dict[str, str]


def certify(
    folder: str | Path,
    results: Results,
    recipe: Recipe,
    *,
    data: Mapping[str, str | None] | None = None,
    device: str | None = None,
    planned: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a checkpoint's certificate, whole or not at all; returns what it says.

    ``data`` are hashes of what the student was trained and measured on (:func:`data_hashes`), ``planned`` the budget,
    the plan and the scan that chose its layers. What an earlier certificate of the same weights has, and these results
    have not, is kept.
    """
    folder = Path(folder)
    found = identity(folder, recipe.teacher) | dict(data or {})
    measured = results.to_dict()
    trouble = list(_not_finite(asdict(results)))
    before = _earlier(folder, found)
    earlier = before.get("measured") or {}
    for section in SECTIONS:
        if not measured.get(section) and earlier.get(section):
            measured[section] = earlier[section]
    if not _any_ran(measured.get("gates")) and _any_ran(earlier.get("gates")):
        measured["gates"] = earlier["gates"]  # leaving a failed gate out does not mend it
    not_run = [section for section in SECTIONS if not measured.get(section)]
    not_run += _entries_not_run(measured)
    trained = training(folder, recipe)
    controls = {name: "measured" if name in results.models else "not run" for name in CONTROLS}
    reasons = [
        *(f"not run: {what}" for what in not_run),
        *(f"failed: {gate}" for gate in _failed_gates(measured)),
        *(f"control absent: {name}" for name, state in controls.items() if state != "measured"),
        *_too_few(measured),
        *(f"not finite: {place}" for place in trouble),
        *(f"not hashed: {name}" for name in _expected(found) if found.get(name) is None),
        *(f"not known: tokens of {stage}" for stage, n in trained["tokens"].items() if n is None),
    ]
    tree: dict[str, Any] = {
        "format": FORMAT,
        "status": _status(reasons),
        "reasons": reasons,
        "origin": origin(),
        "teacher": {"name": recipe.teacher.name, "revision": recipe.teacher.revision},
        "identity": found,
        "plan": _plan(folder),
        "planned": dict(planned) if planned is not None else before.get("planned"),
        "training": trained | {"device": device},
        "measured": measured,
        "quoted": {},
        "controls": controls,
        "not_run": not_run,
        "evaluation": recipe.to_dict(),
    }
    return _sealed(folder, tree)


def certify_gates(folder: str | Path, gates: Gates, recipe: Recipe) -> dict[str, Any] | None:
    """Put newly run integrity gates into a checkpoint's certificate; all else that was measured stays.

    None where there is no certificate of these weights.
    """
    folder = Path(folder)
    found = identity(folder, recipe.teacher)
    tree = _earlier(folder, found)
    if not tree:
        return None
    tree["measured"]["gates"] = gates.to_dict()
    tree["identity"] |= found
    tree["origin"] = origin()
    others = [what for what in tree["not_run"] if what != "gates" and not what.startswith("gates.gates: ")]
    entries = _entries_not_run({"gates": tree["measured"]["gates"]})
    about = {f"not run: {what}" for what in tree["not_run"]}
    tree["not_run"] = others + entries
    tree["reasons"] = [
        *(f"not run: {what}" for what in tree["not_run"]),
        *(f"failed: {gate}" for gate in _failed_gates(tree["measured"])),
        *(r for r in tree["reasons"] if r not in about and not r.startswith(FAILED)),
    ]
    tree["status"] = _status(tree["reasons"])
    del tree["seal"]
    return _sealed(folder, tree)


def _sealed(folder: Path, tree: dict[str, Any]) -> dict[str, Any]:
    tree["seal"] = _hash_of(tree)
    write_json(folder / CERTIFICATE, tree)
    return tree


def read(folder: str | Path) -> dict[str, Any]:
    """The certificate of a checkpoint. Raises :class:`CheckpointError` where there is none that can be read."""
    path = Path(folder) / CERTIFICATE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: has no {CERTIFICATE}; `linearize eval {folder}` measures the student and writes one"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); measure the student again") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("identity"), dict):
        raise CheckpointError(f"{path}: is no certificate; measure the student again")
    if not isinstance(tree.get("format"), int) or tree["format"] > FORMAT:
        raise CheckpointError(f"{path}: format {tree.get('format')!r} is unknown; upgrade linearize")
    return tree


def verify(folder: str | Path, *, data: Data | None = None) -> Verified:
    """Every hash of a checkpoint's certificate made again and compared.

    ``data`` gives those of the data where it is at hand.
    """
    folder = Path(folder)
    tree = read(folder)
    recorded: dict[str, Any] = tree["identity"]
    teacher = tree.get("teacher") or {}
    now = identity(folder, Teacher(name=str(teacher.get("name")), revision=teacher.get("revision")))
    absent: dict[str, str] = {}
    if any(now[name] is None for name in now if name.startswith("teacher.")):
        absent |= {n: "the teacher is not at hand" for n in recorded if n.startswith("teacher.")}
    made = (tree.get("origin") or {}).get("versions", {}).get("linearize")
    if made != __version__:
        absent["package"] = f"it was made by linearize {made}, this is {__version__}"
    sealed = tree.get("seal") == _hash_of({key: value for key, value in tree.items() if key != "seal"})
    same = all(
        recorded.get(name) == now[name] for name in now if name.startswith(("teacher.", "student.recipe"))
    )
    again, reason = data(tree, sealed and same) if data is not None else ({}, "")
    now |= again
    reason = reason or "the data is not at hand"
    absent |= {n: reason for n in recorded if n.startswith("data.") and n not in now}
    absent |= {
        n: "it could not be made when the certificate was written" for n, h in recorded.items() if h is None
    }
    matched, mismatched = (["seal"], []) if sealed else ([], ["seal"])
    for name in {**recorded, **now}:
        if name not in absent:
            (matched if name in recorded and recorded[name] == now.get(name) else mismatched).append(name)
    return Verified(matched, mismatched, {name: absent[name] for name in absent if name in recorded})


# What a checkpoint is.


def identity(folder: Path, teacher: Teacher) -> dict[str, str | None]:
    """Name -> sha256 of everything that a student is and comes from; None for what is not at hand."""
    own = {
        "student.weights": _files(folder, WEIGHTS),
        "student.tokenizer": _files(folder, TOKENIZER),
        "student.config": _files(folder, ("config.json", "generation_config.json")),
        "student.code": _files(folder, ("*.py",)),
        "student.recipe": _files(folder, ("recipe.yaml",)),
    }
    for index, layer in _layers(folder).items():
        own[f"plan.layer {index}"] = _hash_of(layer)
    home = teacher_folder(teacher)
    parts = {"weights": WEIGHTS, "tokenizer": TOKENIZER, "config": ("config.json",)}
    theirs = {f"teacher.{name}": home and _files(home, patterns) for name, patterns in parts.items()}
    package = Path(__file__).parent
    return own | theirs | {"package": sha256_of_files(package.rglob("*.py"), package)}


def teacher_folder(teacher: Teacher) -> Path | None:
    """Where a teacher's files are on this machine: its folder, or the Hub's cache; None where they are not."""
    try:
        source = teacher_path(teacher.name)
    except LinearizeError:
        return None
    if isinstance(source, Path):
        return source
    found = try_to_load_from_cache(source, CONFIG, revision=teacher.revision)
    return Path(found).parent if isinstance(found, str) else None


def data_hashes(
    fingerprint: str | None, windows: Mapping[int, str], cache: Path | None = None
) -> dict[str, str | None]:
    """Hashes of the training data, of the held-out windows measured on, and of the token files in ``cache``."""
    found: dict[str, str | None] = {"data.fingerprint": fingerprint}
    found |= {f"data.held-out windows of {length}": digest for length, digest in windows.items()}
    return found | file_hashes(cache)


def file_hashes(cache: Path | None) -> dict[str, str]:
    """Hash of the tokens that were sampled or read once, where they were kept."""
    found = None if cache is None else _files(cache, ("*.safetensors",))
    return {} if found is None else {"data.files": found}


def trained_on(folder: Path) -> str | None:
    """The fingerprint of the data that a checkpoint's run was trained on, where it says so."""
    for stage in ("finetune", "transfer"):
        settings = _done(folder.parent / stage).get("settings") or {}
        if isinstance(found := settings.get("corpus"), str):
            return found
    return None


def _done(stage: Path) -> dict[str, Any]:
    """What a finished stage of training left; empty where there is none."""
    try:
        return json.loads((stage / "done.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def training(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Tokens, seconds and trained parameters of each stage, from the run that the checkpoint lies in."""
    tokens: dict[str, int | None] = {}
    seconds: dict[str, float | None] = {}
    trained: dict[str, int | None] = {}
    for stage in ("transfer", "finetune"):
        at = folder.parent / stage
        record = _done(at)
        tokens[stage], seconds[stage] = record.get("tokens"), record.get("seconds")
        trained[stage] = 0 if record.get("skipped") else _elements([at / "weights.safetensors"])
    total = _elements(sorted(folder.glob("*.safetensors")))
    mixers = trained["transfer"]
    return {
        "tokens": tokens,
        "seconds": seconds,
        "seed": recipe.seed,
        "parameters": {
            "student": total,
            "trained": trained,
            "frozen": None if total is None or mixers is None else total - mixers,
        },
    }


def _elements(paths: Iterable[Path]) -> int | None:
    """Numbers in safetensors files, read from their headers; None where one is not there."""
    total, found = 0, False
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
        found = True
    return total if found else None


def _layers(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return dict(config["linearize"]["layers"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _plan(folder: Path) -> dict[str, Any]:
    return {
        index: {
            "method": layer["method"],
            "sliding_window": layer.get("sliding_window"),
            "geometry": layer["geometry"],
        }
        for index, layer in _layers(folder).items()
    }


def _files(folder: Path, patterns: Iterable[str]) -> str | None:
    """sha256 of the files of these names, None where there is none."""
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    if len(paths) == 1:
        return sha256_of(paths[0])
    return sha256_of_files(paths, folder) if paths else None


def _hash_of(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


# What stands against it.


def _status(reasons: Iterable[str]) -> str:
    reasons = list(reasons)
    if any(reason.startswith(FAILED) for reason in reasons):
        return "failed"
    return "incomplete" if reasons else "complete"


def _any_ran(gates: Mapping[str, Any] | None) -> bool:
    return any(gate["status"] != "not run" for gate in (gates or {}).get("gates", []))


def _expected(found: Mapping[str, str | None]) -> list[str]:
    return list(dict.fromkeys([*found, "data.fingerprint"]))


def _earlier(folder: Path, found: Mapping[str, str | None]) -> dict[str, Any]:
    """An earlier certificate of the same weights."""
    try:
        tree = read(folder)
    except CheckpointError:
        return {}
    same = all(tree["identity"].get(n) == found[n] for n in ("student.weights", "student.config"))
    return tree if same else {}


def _walk(tree: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every mapping and every plain value below, with its dotted place."""
    if isinstance(tree, Mapping):
        yield place, tree
        for key, value in tree.items():
            yield from _walk(value, f"{place}.{key}" if place else str(key))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from _walk(value, f"{place}[{index}]")
    else:
        yield place, tree


def _not_finite(tree: Any) -> Iterator[str]:
    return (place for place, value in _walk(tree) if isinstance(value, float) and not math.isfinite(value))


def _entries_not_run(measured: Mapping[str, Any]) -> list[str]:
    """Entries inside the sections that say that they were not run, and why."""
    found = []
    for place, entry in _walk(measured):
        if not isinstance(entry, Mapping):
            continue
        reason = entry.get("not_run")
        if reason is None and entry.get("status") == "not run":
            reason = entry.get("note") or "no reason is given"
        if reason:
            name = entry.get("name") or entry.get("task") or entry.get("part") or place
            found.append(f"{place.partition('[')[0]}: {name} ({reason})")
    return list(dict.fromkeys(found))


def _failed_gates(measured: Mapping[str, Any]) -> list[str]:
    gates = (measured.get("gates") or {}).get("gates", [])
    return [f"{g['name']}, {g['where'] or g['note']}" for g in gates if g["status"] == "failed"]


def _too_few(measured: Mapping[str, Any]) -> list[str]:
    """One line for each section and count under :data:`LEAST`."""
    found: dict[tuple[str, int], int] = {}
    for place, entry in _walk(measured):
        if not isinstance(entry, Mapping) or entry.get("not_run"):
            continue
        for key in COUNTS:
            count = entry.get(key)
            if isinstance(count, int) and count < LEAST:
                section = place.replace("[", ".").partition(".")[0]
                found[section, count] = found.get((section, count), 0) + 1
    return [
        f"too few: {n} figures of {section} rest on {count} samples" for (section, count), n in found.items()
    ]
