"""Free continuation in tables and words."""

import math
from collections.abc import Iterator

from ..evaluate import TEACHER, Results
from ..evaluate.continuation import Continuations, Continued
from .table import Table, bracketed

TITLE = "Free continuation"


def continuation(results: Results) -> Table:
    """One row per model, and one of the held-out text itself."""
    return table(results.continuation)


def table(found: Continuations | None) -> Table:
    """The same, without the rest of the results."""
    header = ["written by", "teacher's perplexity", "minus its own text's", "repeated 4-grams"]
    header += ["points above its own text's", "leaves its text after", "tokens", "prompts"]
    if found is None:
        return Table(TITLE, "", header, [])
    note = (
        f"Greedy, up to {found.tokens:,} tokens after {found.prompt_tokens:,} of held-out text, the same for all "
        "[95 % bootstrap over prompts, paired]. Its own text: the teacher's. A text leaves it after so many tokens: "
        f"quartiles, lower / median / upper [median], where {found.tokens:,} is never. What repeats itself is easy to "
        "foresee: read perplexity beside repetition."
    )
    return Table(TITLE, note, header, [_cells(row) for row in (*found.rows, found.text)])


def _cells(row: Continued) -> list[str]:
    apart = row.intervals.get("ppl_difference"), row.intervals.get("repeated_difference")
    left = ""
    if row.divergence is not None:
        low, middle, high = row.divergence
        left = f"{low:.0f} / {middle:.0f} / {high:.0f} {bracketed(row.intervals['divergence'], '.0f')}"
        left += f", {row.same} never" if row.same else ""
    return [
        row.model,
        f"{row.ppl:.2f} {bracketed(row.intervals['ppl'], '.2f')}",
        "" if apart[0] is None else bracketed(apart[0], "+.2f"),
        f"{100 * row.repeated:.1f} % {bracketed(_percent(row.intervals['repeated']), '.1f')}",
        "" if apart[1] is None else bracketed(_percent(apart[1]), "+.1f"),
        left,
        f"{row.tokens:,.0f}",
        str(row.samples),
    ]


def sentences(found: Continuations | None, student: str | None) -> Iterator[str]:
    """Where the student leaves the teacher's text, and what its own is like."""
    rows = {row.model: row for row in found.rows} if found is not None else {}
    if found is None or TEACHER not in rows or student not in rows or rows[student].divergence is None:
        return
    ours, theirs = rows[student], rows[TEACHER]
    _, middle, _ = ours.divergence or (math.nan,) * 3
    parted = (
        f"it leaves the teacher's greedy text after {middle:.0f} of {found.tokens:,} tokens "
        f"(median {bracketed(ours.intervals['divergence'], '.0f')})"
    )
    if middle >= found.tokens:
        parted = f"it writes the teacher's greedy text to the end of {found.tokens:,} tokens in {ours.same}"
    yield (
        f"Writing on freely after {ours.samples} prompts, {parted}. The teacher's perplexity on what it wrote is "
        f"{ours.ppl:.2f} {bracketed(ours.intervals['ppl'], '.2f')}, {theirs.ppl:.2f} on its own; "
        f"{100 * ours.repeated:.0f} % of its 4-grams repeat, {100 * theirs.repeated:.0f} % of the teacher's and "
        f"{100 * found.text.repeated:.0f} % of the held-out text's."
    )


def _percent(interval: tuple[float, float]) -> tuple[float, float]:
    return 100 * interval[0], 100 * interval[1]
