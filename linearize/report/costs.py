"""The tables of `linearize bench`: what a student costs beside its teacher, and from where it saves."""

from collections.abc import Sequence

from ..evaluate.likelihood import TEACHER
from ..evaluate.speed import Planned, Point, SpeedResults
from ..words import bytes_text
from .tables import Table

PART_NAMES = {"prefill": "Prefill", "decode": "Decode"}
NOTHING = "not run"


def speed_tables(results: SpeedResults) -> list[Table]:
    """One table a part, with every point of the grid, and one of the crossovers."""
    return [*(_part(results, part) for part in PART_NAMES if _of(results, part)), crossover_table(results)]


def crossover_table(results: SpeedResults) -> Table:
    """One row per batch: the length from which the student stays below the teacher."""
    rows = [
        [
            str(batch),
            *(crossover_text(found.get(name), results.up_to) for name in ("prefill", "decode", "memory")),
        ]
        for batch, found in (results.crossovers or {1: results.crossover}).items()
    ]
    note = (
        "The shortest length of the grid from which the student's upper quartile stays below the teacher's lower "
        "one; memory compares the bytes that are kept for the next token."
    )
    return Table("Crossover", note, ["batch", "prefill", "decode", "memory"], rows)


def crossover_text(length: int | None, up_to: int) -> str:
    """The length in words."""
    if length is not None:
        return f"{length:,} tokens"
    return f"none up to {up_to:,}" if up_to else NOTHING


def estimate(planned: Sequence[Planned]) -> str:
    """One line before the run: points, time and memory."""
    going = [point for point in planned if point.not_run is None]
    if not going:
        return f"0 of {len(planned)} points will be timed"
    seconds = sum(point.seconds for point in going)
    most = max(point.bytes for point in going)
    left = f"; {len(planned) - len(going)} will not run and say why" if len(going) < len(planned) else ""
    needs = f"about {duration(seconds)}, and at most about {bytes_text(most)} beyond the weights"
    return f"{len(going)} points: {needs}{left}"


def duration(seconds: float) -> str:
    """70 -> "1.2 min"."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def milliseconds(value: float) -> str:
    """Three figures that can be told apart: 0.123, 1.23, 12.3, 123, 1,234."""
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}"


def _of(results: SpeedResults, part: str) -> list[Point]:
    return [point for point in results.points if point.part == part]


def _part(results: SpeedResults, part: str) -> Table:
    """One row per length, batch and model."""
    points = _of(results, part)
    base = {(p.length, p.batch): p for p in points if p.model == TEACHER}
    rows = []
    for point in points:
        where = [f"{point.length:,}", str(point.batch), point.model]
        if point.ms is None:
            rows.append([*where, point.not_run or NOTHING, "", "", "", "", "0"])
            continue
        between = (
            f"{milliseconds(point.ms)} [{milliseconds(point.low or 0)}, {milliseconds(point.high or 0)}]"
        )
        other = base.get((point.length, point.batch))
        times = ""
        if other is not None and other.ms and point.model != TEACHER:
            times = f"{other.ms / point.ms:.2f} x"
        rows.append(
            [
                *where,
                between,
                f"{point.tokens_per_second:,.0f}",
                times,
                bytes_text(point.state_bytes or 0),
                "not counted" if point.peak_bytes is None else bytes_text(point.peak_bytes),
                str(point.runs),
            ]
        )
    what = (
        "of a whole prompt"
        if part == "prefill"
        else "of one step of all rows, the last ones up to the length"
    )
    threads = f", {results.threads} thread{'s' if results.threads > 1 else ''}" if results.threads else ""
    note = (
        f"{results.device}{threads}, {results.dtype}; softmax by {results.attention}. Milliseconds {what}, median "
        f"[quartiles] after {results.warmups} warm-ups. Kept: states and KV caches of all rows."
    )
    note += "".join(f" {line[:1].upper()}{line[1:]}." for line in results.notes)
    header = ["length", "batch", "model", "ms", "tokens/s", "speed-up", "kept", "peak", "runs"]
    return Table(PART_NAMES[part], note, header, rows)
