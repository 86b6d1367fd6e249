"""``certificate.json`` beside the weights: what a student is, what it is made from, what was measured, what was not.

    identity    sha256 of the teacher's and the student's files, the conversion of every layer, the data, the code
    training    tokens of each stage, seeds, parameters trained and frozen, device, seconds
    measured    the results, with intervals and counts; ``quoted`` is for figures of others, and empty
    not_run     what was not done
    reasons     everything that stands against ``status: complete`` (:mod:`linearize.doubts`)

It fails closed: one check not run, a control absent, a count under :data:`linearize.doubts.LEAST`, a number that is
not finite, a hash that could not be made or has changed since, and the status is ``incomplete``; with an integrity gate
that failed it is ``failed``, and stays so until a gate of that name passes. No hash depends on the certificate, but its
``seal``, which is that of all the rest.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from . import __version__
from .doubts import CHANGED, NOT_FINITE, gates_after, not_finite, not_run_of, reasons_of, status_of
from .evaluate import Gates, Results, SpeedResults
from .files import write_json
from .identity import WINDOWS, hash_of, identity, layer_plan, training
from .modeling.errors import CheckpointError
from .provenance import origin
from .recipe import Recipe, Teacher

logger = logging.getLogger(__name__)

CERTIFICATE = "certificate.json"
FORMAT = 1
OF_TEXT = ("likelihood", "recall", "ablations", "suite", "continuation")
"""Sections that rest on the text measured on."""
OF_TEACHER = (*OF_TEXT, "memory", "lm_eval", "speed")
"""Sections that stand beside a teacher; integrity gates are of the student alone."""
CONTROLS = ("window control", "matched_window control", "softmax control")
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

    ``data`` are hashes of what the student was trained and measured on (``identity.data_hashes``), ``planned`` the
    budget, the plan and the scan that chose its layers. What an earlier certificate of the same weights has, and these
    results have not, is kept, where it is beside the same teacher and of the same text.
    """
    folder = Path(folder)
    found = identity(folder, recipe.teacher) | dict(data or {})
    measured = results.to_dict()
    trouble = not_finite(asdict(results))
    before = _earlier(folder, found)
    earlier = before.get("measured") or {}
    kept = [
        name for name in _still_true(before, found, recipe) if not measured.get(name) and earlier.get(name)
    ]
    measured |= {section: earlier[section] for section in kept}
    measured["gates"] = gates_after(earlier.get("gates"), measured.get("gates"))
    stay = [*kept, *(["gates"] if measured["gates"] and measured["gates"] is earlier.get("gates") else [])]
    trouble += [r for r in before.get("reasons", []) if _section_of(r) in stay and r not in trouble]
    if {"likelihood", "ablations"} & set(kept):  # the text that they are of
        found = {n: h for n, h in before["identity"].items() if n.startswith(WINDOWS)} | found
    trained = training(folder, recipe)
    controls = {name: "measured" if name in results.models else "not run" for name in CONTROLS}
    reasons = [
        *reasons_of(measured),
        *(f"control absent: {name}" for name, state in controls.items() if state != "measured"),
        *trouble,
        *(f"not hashed: {name}" for name in _expected(found) if found.get(name) is None),
        *(f"not known: tokens of {stage}" for stage, n in trained["tokens"].items() if n is None),
    ]
    tree: dict[str, Any] = {
        "format": FORMAT,
        "status": status_of(reasons),
        "reasons": reasons,
        "origin": origin(),
        "teacher": {"name": recipe.teacher.name, "revision": recipe.teacher.revision},
        "identity": found,
        "plan": layer_plan(folder),
        "planned": dict(planned) if planned is not None else before.get("planned"),
        "training": trained | {"device": device},
        "measured": measured,
        "quoted": {},
        "controls": controls,
        "not_run": not_run_of(measured),
        "evaluation": recipe.to_dict(),
    }
    return _sealed(folder, tree)


def certify_gates(folder: str | Path, gates: Gates, recipe: Recipe) -> dict[str, Any] | None:
    """Put newly run integrity gates into a checkpoint's certificate; all else that was measured stays.

    So does what failed before, until it passes. None where there is no certificate of these weights.
    """
    return _renewed(Path(folder), "gates", gates, recipe.teacher)


def certify_speed(folder: str | Path, speed: SpeedResults, teacher: Teacher) -> dict[str, Any] | None:
    """Put what was timed beside its ``teacher`` into a checkpoint's certificate; all else that was measured stays.

    None, and a warning, where there is no certificate of these weights, or it cannot be written.
    """
    folder = Path(folder)
    try:
        made = _renewed(folder, "speed", speed, teacher)
    except OSError as error:
        logger.warning("%s: its certificate cannot be written (%s)", folder, error.strerror or error)
        return None
    if made is None:
        logger.warning("%s: no certificate of its weights, which the speed could go into", folder)
    return made


def _renewed(
    folder: Path, section: str, made: Gates | SpeedResults, teacher: Teacher
) -> dict[str, Any] | None:
    """The certificate with one section measured anew.

    The others rest on the hashes that it has: what is another now keeps its old hash, and says so.
    """
    found = identity(folder, teacher)
    tree = _earlier(folder, found)
    if not tree:
        return None
    measured = tree["measured"]
    trouble = not_finite(asdict(made), section)
    value = _plain(made.to_dict())
    measured[section] = gates_after(measured.get("gates"), value) if section == "gates" else value
    now = {name: digest for name, digest in found.items() if digest is not None}
    moved = [n for n in now if n != "package" and tree["identity"].get(n) not in (None, now[n])]
    tree["identity"] |= {name: digest for name, digest in now.items() if name not in moved}
    tree["origin"] = origin()
    others = [r for r in tree["reasons"] if not r.startswith(("not run: ", "failed: ", "too few: ", CHANGED))]
    tree["not_run"] = not_run_of(measured)
    tree["reasons"] = [
        *reasons_of(measured),
        *(reason for reason in others if _section_of(reason) != section),
        *trouble,
        *(f"{CHANGED}{name}" for name in moved),
    ]
    tree["status"] = status_of(tree["reasons"])
    del tree["seal"]
    return _sealed(folder, tree)


def _still_true(
    before: Mapping[str, Any], found: Mapping[str, str | None], recipe: Recipe
) -> tuple[str, ...]:
    """Sections of an earlier certificate that may stand beside new ones."""
    if not before:
        return ()
    was = before["identity"]
    files = [name for name in {**was, **found} if name.startswith(("teacher.", "student.", "plan."))]
    named = {"name": recipe.teacher.name, "revision": recipe.teacher.revision}
    known = None not in (found.get(name) for name in files if name.startswith("teacher."))
    if any(was.get(name) != found.get(name) for name in files) or not (known or before["teacher"] == named):
        return ()
    now, then = recipe.to_dict(), before["evaluation"]
    evaluated = then.get("evaluate")
    as_many = isinstance(evaluated, Mapping) and evaluated.get("sequences") == now["evaluate"]["sequences"]
    windows = [name for name in was if name.startswith(WINDOWS) and name in found and as_many]
    same = all(was[name] == found[name] for name in windows) and then.get("data") == now["data"]
    same = same and was.get("data.fingerprint") == found.get("data.fingerprint")
    return OF_TEACHER if same else tuple(name for name in OF_TEACHER if name not in OF_TEXT)


def _section_of(reason: str) -> str | None:
    """The section in which a number is not finite, of a reason that says so."""
    place = reason.removeprefix(NOT_FINITE)
    return place.replace("[", ".").partition(".")[0] if place != reason else None


def _plain(value: Any) -> Any:
    """As JSON has it: null for the numbers that it has no word for."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sealed(folder: Path, tree: dict[str, Any]) -> dict[str, Any]:
    tree["seal"] = hash_of(tree)
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
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); measure the student again") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("identity"), dict):
        raise CheckpointError(f"{path}: is no certificate; measure the student again")
    if not isinstance(tree.get("format"), int) or tree["format"] > FORMAT:
        raise CheckpointError(f"{path}: format {tree.get('format')!r} is unknown; upgrade linearize")
    if odd := _malformed(tree):
        raise CheckpointError(f"{path}: {odd} is not as linearize writes it; measure the student again")
    return tree


def _malformed(tree: Mapping[str, Any]) -> str | None:
    """The first key whose value is of another kind than it must be."""
    kinds = dict.fromkeys(("teacher", "origin", "measured", "evaluation", "training"), dict)
    kinds |= {"reasons": list, "not_run": list, "status": str, "seal": str}
    for key, kind in kinds.items():
        if not isinstance(tree.get(key), kind):
            return key
    if not all(isinstance(reason, str) for key in ("reasons", "not_run") for reason in tree[key]):
        return "reasons"
    if not all(digest is None or isinstance(digest, str) for digest in tree["identity"].values()):
        return "identity"
    versions, gates = tree["origin"].get("versions"), tree["measured"].get("gates")
    if not isinstance(versions, dict):
        return "origin.versions"
    try:
        _teacher_of(tree)
    except (KeyError, TypeError, ValidationError):
        return "teacher"
    try:
        found = Gates.from_dict(gates).gates if gates else []
    except (KeyError, TypeError):
        return "measured.gates"
    whole = all(isinstance(gate.name, str) and isinstance(gate.status, str) for gate in found)
    return None if whole else "measured.gates"


def _teacher_of(tree: Mapping[str, Any]) -> Teacher:
    return Teacher(name=tree["teacher"]["name"], revision=tree["teacher"]["revision"])


def failed_gates(folder: str | Path) -> Gates | None:
    """The integrity gates of a checkpoint whose certificate says that one failed; None where it says no such thing.

    Raises :class:`CheckpointError` for a certificate that cannot be read.
    """
    if not (Path(folder) / CERTIFICATE).exists():
        return None
    tree = read(folder)
    gates = tree["measured"].get("gates")
    return Gates.from_dict(gates) if tree["status"] == "failed" and gates else None


def verify(folder: str | Path, *, data: Data | None = None) -> Verified:
    """Every hash of a checkpoint's certificate made again and compared.

    ``data`` gives those of the data where it is at hand.
    """
    folder = Path(folder)
    tree = read(folder)
    recorded: dict[str, Any] = tree["identity"]
    now = identity(folder, _teacher_of(tree))
    absent: dict[str, str] = {}
    if any(now[name] is None for name in now if name.startswith("teacher.")):
        absent |= {n: "the teacher is not at hand" for n in recorded if n.startswith("teacher.")}
    made = tree["origin"]["versions"].get("linearize")
    if made != __version__:
        absent["package"] = f"it was made by linearize {made}, this is {__version__}"
    sealed = tree.get("seal") == hash_of({key: value for key, value in tree.items() if key != "seal"})
    same = all(
        recorded.get(name) == now[name] for name in now if name.startswith(("teacher.", "student.recipe"))
    )
    again, reason = data(tree, sealed and same) if data is not None else ({}, "")
    now |= again
    reason = reason or (
        "the data is not at hand" if data is None else "it is of an earlier measurement, with other terms"
    )
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
