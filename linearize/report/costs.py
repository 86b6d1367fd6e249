"""The tables of `linearize bench`: what a student costs beside its teacher, and from where it saves."""

from collections.abc import Sequence

from ..evaluate.likelihood import TEACHER
from ..evaluate.points import Largest
from ..evaluate.speed import Planned, Point, SpeedResults
from ..words import bytes_text
from .tables import Table

PART_NAMES = {"prefill": "Prefill", "decode": "Decode"}
NOTHING = "not run"


def speed_tables(results: SpeedResults) -> list[Table]:
    """One table a part, with every point of the grid, and one of the crossovers."""
    parts = [_part(results, part) for part in PART_NAMES if _of(results, part)]
    return [*parts, crossover_table(results), *([matched_memory(results)] if results.matched_memory else [])]


def matched_memory(results: SpeedResults) -> Table:
    """One row per model at its own largest batch: not to be read beside tables at one batch."""
    full = results.matched_memory
    header = ["model", "largest batch", "does not run", *PART_NAMES.values(), "decode, of teacher's", "kept"]
    if full is None:
        return Table("Matched memory", "", header, [])
    base = next((entry.rate("decode") for entry in full.models if entry.model == TEACHER), None)
    rows = []
    for entry in full.models:
        rates = [_rate(entry, part) for part in PART_NAMES]
        own = entry.rate("decode")
        times = f"{own / base:.2f} x" if own and base and entry.model != TEACHER else ""
        held = max((point.state_bytes or 0 for point in entry.points), default=0)
        refused = "none tried" if entry.refused is None else f"{entry.refused[0]:,}: {entry.refused[1]}"
        rows.append([entry.model, f"{entry.batch:,}", refused, *rates, times, bytes_text(held)])
    free = "" if full.free_bytes is None else f" {bytes_text(full.free_bytes)} of memory beside both models;"
    note = (
        f"Another protocol than matched batch: each model at its own largest batch of {full.length:,} tokens;{free} "
        "tokens a second of all rows, median [quartiles]. A ratio here is of full cards, not of steps."
    )
    return Table("Matched memory", note, header, rows)


def _rate(entry: Largest, part: str) -> str:
    point = next((point for point in entry.points if point.part == part), None)
    if point is None or not point.ms or not point.tokens_per_second:
        return (point.not_run if point else None) or NOTHING
    ends = [point.tokens_per_second * point.ms / (ms or point.ms) for ms in (point.high, point.low)]
    return f"{point.tokens_per_second:,.0f} [{ends[0]:,.0f}, {ends[1]:,.0f}]"


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


def _energy(point: Point) -> str:
    if point.joules_per_token is None:
        return f"{NOTHING}: {point.energy_not_run}"
    return f"{point.joules_per_token:.3g}"


def _of(results: SpeedResults, part: str) -> list[Point]:
    return [point for point in results.points if point.part == part]


def _part(results: SpeedResults, part: str) -> Table:
    """One row per length, batch and model."""
    points = _of(results, part)
    base = {(p.length, p.batch): p for p in points if p.model == TEACHER}
    energy = any(point.joules_per_token or point.energy_not_run for point in points)
    rows = []
    for point in points:
        where = [f"{point.length:,}", str(point.batch), point.model]
        if point.ms is None:
            rows.append([*where, point.not_run or NOTHING, "", "", "", "", *([""] if energy else []), "0"])
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
                *([_energy(point)] if energy else []),
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
    header = ["length", "batch", "model", "ms", "tokens/s", "speed-up", "kept", "peak"]
    header += [*(["J/token"] if energy else []), "runs"]
    return Table(PART_NAMES[part], note, header, rows)
