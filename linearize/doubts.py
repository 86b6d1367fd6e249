"""What stands against a certificate: what was not run, what failed, what rests on too few samples or is no number."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .evaluate.gate import FAILED as FAILS
from .evaluate.gate import NOT_RUN, PASSED

LEAST = 50
"""Fewest samples of a figure that may be reported."""
SECTIONS = (
    "likelihood",
    "recall",
    "memory",
    "gates",
    "ablations",
    "suite",
    "continuation",
    "lm_eval",
    "speed",
)
FAILED, NOT_FINITE, CHANGED = "failed: ", "not finite: ", "changed since measured: "
"""Begin reasons: integrity gates that failed, numbers that are none, files that are others by now."""
COUNTS = ("samples", "sequences", "windows")


def status_of(reasons: Iterable[str]) -> str:
    """``complete`` without any reason, ``failed`` with a failed gate among them, else ``incomplete``."""
    reasons = list(reasons)
    if any(reason.startswith(FAILED) for reason in reasons):
        return "failed"
    return "incomplete" if reasons else "complete"


def not_run_of(measured: Mapping[str, Any]) -> list[str]:
    """Sections that are not there, then entries inside the others that say that they were not run, and why."""
    return [section for section in SECTIONS if not measured.get(section)] + _entries_not_run(measured)


def reasons_of(measured: Mapping[str, Any]) -> list[str]:
    """All that can be said against what was measured from the figures alone."""
    return [
        *(f"not run: {what}" for what in not_run_of(measured)),
        *(f"{FAILED}{gate}" for gate in _failed_gates(measured)),
        *_too_few(measured),
    ]


def not_finite(tree: Any, place: str = "") -> list[str]:
    """A reason for each number below that is infinite or none; ``place`` is where ``tree`` belongs."""
    return [
        f"{NOT_FINITE}{where}"
        for where, value in _walk(tree, place)
        if isinstance(value, float) and not math.isfinite(value)
    ]


def any_ran(gates: Mapping[str, Any] | None) -> bool:
    """Whether any integrity gate was run."""
    return any(gate["status"] != NOT_RUN for gate in (gates or {}).get("gates", []))


def gates_after(earlier: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The gates that hold after ``now``: leaving a failed gate out, or running out of memory in it, does not mend it.

    An earlier failure stays until every gate of its name has passed, on whatever device; of a check that raised, and
    so failed as a whole, until every gate of the check has.
    """
    if not any_ran(now):
        return earlier if any_ran(earlier) else now
    assert now is not None
    stay = [
        g for g in (earlier or {}).get("gates", []) if g["status"] == FAILS and not _mended(g, now["gates"])
    ]
    again = {gate["name"] for gate in now["gates"] if gate["status"] == FAILS}
    stay = [gate for gate in stay if gate["name"] not in again]
    names = {gate["name"] for gate in stay}
    gates = [gate for gate in now["gates"] if gate["name"] not in names] + stay
    return {**now, "gates": gates, "status": FAILS if stay else now["status"]}


def _mended(failed: Mapping[str, Any], gates: Iterable[Mapping[str, Any]]) -> bool:
    name = failed["name"]
    same = [gate["status"] for gate in gates if name == gate["name"] or name in gate["name"].split(": ")]
    return bool(same) and set(same) == {PASSED}


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


def _entries_not_run(measured: Mapping[str, Any]) -> list[str]:
    """A part that the method does not have (``structural``) is no gap: there is nothing to run."""
    found = []
    for place, entry in _walk(measured):
        if not isinstance(entry, Mapping) or entry.get("structural") is True:
            continue
        reason = entry.get("not_run")
        if isinstance(reason, list):  # the suite's tasks and lengths
            rows = [each if isinstance(each, Mapping) else {} for each in reason]
            found += [f"{place}: {x.get('label')} at {x.get('length')} ({x.get('reason')})" for x in rows]
            continue
        if reason is None and entry.get("status") == NOT_RUN:
            reason = entry.get("note") or "no reason is given"
        if reason:
            name = entry.get("name") or entry.get("task") or entry.get("part") or place
            found.append(f"{place.partition('[')[0]}: {name} ({reason})")
    return list(dict.fromkeys(found))


def _failed_gates(measured: Mapping[str, Any]) -> list[str]:
    gates = (measured.get("gates") or {}).get("gates", [])
    return [f"{g['name']}, {g['where'] or g['note']}" for g in gates if g["status"] == FAILS]


def _too_few(measured: Mapping[str, Any]) -> list[str]:
    """One line for each section and count under :data:`LEAST`.

    A suite's cell at a single depth is a part of the cell over all depths, whose samples count.
    """
    found: dict[tuple[str, int], int] = {}
    for place, entry in _walk(measured):
        if not isinstance(entry, Mapping) or entry.get("not_run") or entry.get("depth") is not None:
            continue
        for key in COUNTS:
            count = entry.get(key)
            if isinstance(count, int) and count < LEAST:
                section = place.replace("[", ".").partition(".")[0]
                found[section, count] = found.get((section, count), 0) + 1
    return [
        f"too few: {n} figures of {section} rest on {count} samples" for (section, count), n in found.items()
    ]
