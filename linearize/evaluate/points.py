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
    joules_per_token: float | None = None
    """Of one token of one row, where energy was asked for."""
    energy_not_run: str | None = None
    """Why there is none, where it was."""

    @property
    def out_of_memory(self) -> bool:
        """Whether it did not fit, which is a result and not a gap."""
        return bool(self.not_run and self.not_run.startswith(OUT_OF_MEMORY))


@dataclass(frozen=True)
class Largest:
    """One model: its largest batch, 0 where not even one row fits, and every batch that was tried."""

    model: str
    batch: int
    tried: list[tuple[int, str | None]]
    """Batch, and why it does not run; None where it does."""
    points: list[Point]
    """Both parts at that batch."""

    @property
    def refused(self) -> tuple[int, str] | None:
        """The smallest batch that does not run, and why; None where the search ended before."""
        return min(((batch, why) for batch, why in self.tried if why), default=None)

    def rate(self, part: str) -> float | None:
        """Tokens a second."""
        return next((point.tokens_per_second for point in self.points if point.part == part), None)


@dataclass(frozen=True)
class MatchedMemory:
    """Every model at its own largest batch, at one length."""

    length: int
    free_bytes: int | None
    """Of the card beside both models' weights; None where torch does not say."""
    models: list[Largest]

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "MatchedMemory":
        models = [
            Largest(
                entry["model"],
                entry["batch"],
                [(batch, why) for batch, why in entry["tried"]],
                [Point(**point) for point in entry["points"]],
            )
            for entry in tree["models"]
        ]
        return cls(tree["length"], tree["free_bytes"], models)


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
    matched_memory: MatchedMemory | None = None
    """Each model at its own largest batch, where that was asked for: another protocol than all the rest."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; `from_dict` reads it back."""
        tree = asdict(self)
        return tree | {"crossovers": {str(batch): found for batch, found in self.crossovers.items()}}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "SpeedResults":
        points = [Point(**point) for point in tree["points"]]
        crossovers = {int(batch): dict(found) for batch, found in tree.get("crossovers", {}).items()}
        full = MatchedMemory.from_dict(tree["matched_memory"]) if tree.get("matched_memory") else None
        return cls(**{**tree, "points": points, "crossovers": crossovers, "matched_memory": full})


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
