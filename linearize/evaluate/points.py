"""What was timed: points of one part, model, length and batch; and from which length a student stays ahead."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .likelihood import TEACHER

PARTS = ("prefill", "decode")
RUNS, WARMUPS = 10, 3
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Point:
    """One part, model, length and batch: milliseconds of a call as median and quartiles, or why there are none."""

    part: str
    model: str
    length: int
    batch: int
    ms: float | None = None
    low: float | None = None
    high: float | None = None
    runs: int = 0
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    """Most memory of the device that was taken at once, this model's weights included; None where torch does not
    count it."""
    state_bytes: int | None = None
    """What the whole batch keeps for its next token: states, and KV caches of layers that have them."""
    not_run: str | None = None

    @property
    def out_of_memory(self) -> bool:
        """Whether it did not fit, which is a result and not a gap."""
        return bool(self.not_run and self.not_run.startswith(OUT_OF_MEMORY))


@dataclass(frozen=True)
class SpeedResults:
    """All points, and the length from which the student stays ahead."""

    device: str
    points: list[Point]
    crossover: dict[str, int | None]
    """`prefill`, `decode` and `memory` at the smallest batch; None is none up to `up_to`."""
    up_to: int
    """The longest length at which both models could be compared; 0 where there is none."""
    crossovers: dict[int, dict[str, int | None]] = field(default_factory=dict)
    """The same for every batch."""
    dtype: str = ""
    attention: str = ""
    """How softmax was computed."""
    threads: int | None = None
    """Of the CPU; None on a GPU."""
    warmups: int = WARMUPS
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; `from_dict` reads it back."""
        tree = asdict(self)
        return tree | {"crossovers": {str(batch): found for batch, found in self.crossovers.items()}}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "SpeedResults":
        points = [Point(**point) for point in tree["points"]]
        crossovers = {int(batch): dict(found) for batch, found in tree.get("crossovers", {}).items()}
        return cls(**{**tree, "points": points, "crossovers": crossovers})


def crossovers(points: Iterable[Point], batch: int, student: str) -> dict[str, int | None]:
    """Per measure the smallest length from which the student's upper quartile stays below the teacher's lower one.

    Running out of memory is worse than any number, and lengths at which either model was not run for another reason
    are passed over. Memory compares what is kept for the next token.
    """
    points = [point for point in points if point.batch == batch]
    measures = {"prefill": ("prefill", "time"), "decode": ("decode", "time"), "memory": ("prefill", "bytes")}
    return {
        name: _crossover([x for x in points if x.part == part], student, what == "bytes")
        for name, (part, what) in measures.items()
    }


def _crossover(points: Sequence[Point], student: str, by_bytes: bool) -> int | None:
    found = None
    for length, (theirs, ours) in sorted(_pairs(points, student).items(), reverse=True):
        if not _beats(ours, theirs, by_bytes):
            break
        found = length
    return found


def _pairs(points: Iterable[Point], student: str) -> dict[int, tuple[Point, Point]]:
    """Length -> teacher's and student's point, where both ran or ran out of memory."""
    at: dict[int, dict[str, Point]] = {}
    for point in points:
        if point.not_run is None or point.out_of_memory:
            at.setdefault(point.length, {})[point.model] = point
    return {n: (by[TEACHER], by[student]) for n, by in at.items() if TEACHER in by and student in by}


def _beats(ours: Point, theirs: Point, by_bytes: bool) -> bool:
    if ours.out_of_memory or theirs.out_of_memory:
        return theirs.out_of_memory and not ours.out_of_memory
    if by_bytes:
        return (ours.state_bytes or 0) < (theirs.state_bytes or 0)
    return (ours.high or math.inf) < (theirs.low or 0.0)


def up_to(points: Sequence[Point], student: str) -> int:
    lengths = [n for part in PARTS for n in _pairs([x for x in points if x.part == part], student)]
    return max(lengths, default=0)
