"""The length gate: at 1, 2, 4 and 8 times its training length no student may be worse than the window-only control.

A linear branch, or anything else that was trained at one length, can do harm beyond it: LoLCATs and STILL fall behind a
plain window at twice theirs. The comparison is paired by window: the difference of the KL to the teacher, student minus
control, and its bootstrap interval. A length fails when the whole interval lies above zero, and passes when it does
not; beyond the teacher's own context there is no reference, and where a length or the control was not measured, none.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .likelihood import TEACHER, difference
from .statistics import Interval

if TYPE_CHECKING:
    from . import Results

FACTORS = (1, 2, 4, 8)
CONTROL = "window control"


@dataclass(frozen=True)
class LengthRow:
    """One length of one student; `difference` is its KL minus the control's, in nats a token."""

    model: str
    length: int
    factor: int
    status: str
    """passed, failed, or not run."""
    kl: float | None = None
    control_kl: float | None = None
    difference: float | None = None
    interval: Interval | None = None
    windows: int = 0
    note: str = ""

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "LengthRow":
        interval = tree["interval"]
        if interval is not None:
            interval = tuple(math.nan if x is None else x for x in interval)
        return cls(**{**tree, "interval": interval})


def gate_lengths(training_length: int, context: int | None) -> list[int]:
    """The lengths at which the gate measures: multiples of the training length within the teacher's context."""
    return [f * training_length for f in FACTORS if context is None or f * training_length <= context]


def length_gate(
    results: "Results", training_length: int, context: int | None = None, *, control: str = CONTROL
) -> list[LengthRow]:
    """A row for every student but the controls and every factor, whether it could be measured or not.

    The control's window control is itself; a student passes with equal KL.
    """
    rows = []
    students = [name for name in results.models if name != TEACHER and not name.endswith(" control")]
    for name in students:
        for factor in FACTORS:
            rows.append(_row(results, name, factor, training_length, context, control))
    return rows


def gated(results: "Results", training_length: int, context: int | None) -> "Results":
    """The results with the gate's rows."""
    return replace(results, length_gate=length_gate(results, training_length, context))


def context_of(teacher: Any) -> int | None:
    """The teacher's own context, None where its configuration says none."""
    return getattr(teacher.config.get_text_config(), "max_position_embeddings", None)


def _row(
    results: "Results", name: str, factor: int, training_length: int, context: int | None, control: str
) -> LengthRow:
    length = factor * training_length
    if context is not None and length > context:
        return LengthRow(name, length, factor, "not run", note=f"beyond the teacher's context of {context:,}")
    measured = results.likelihood.get(length, {})
    if name not in measured:
        return LengthRow(name, length, factor, "not run", note="this length was not measured")
    if control not in measured:
        return LengthRow(name, length, factor, "not run", note="no window control was trained")
    student, other = measured[name], measured[control]
    value, interval = difference(student, other, seed=results.seed)
    if math.isnan(interval[0]):
        return LengthRow(
            name, length, factor, "not run", student.kl, other.kl, value, None, student.sequences,
            "one window has no interval",
        )  # fmt: skip
    status = "failed" if interval[0] > 0 else "passed"
    return LengthRow(name, length, factor, status, student.kl, other.kl, value, interval, student.sequences)
