"""The tables of a run: fidelity, recall, the student against its control, memory; with intervals and counts.

`tables` gives them as text cells, which the command line prints with rich; `markdown` is the same for files.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .evaluate import TEACHER, Cell, Results
from .evaluate.likelihood import difference
from .evaluate.statistics import Interval, mcnemar
from .words import bytes_text

MEMORY_LENS = (1024, 8192, 32768)
GATE = 0.8  # the least lower bound of the teacher's own recall at which a cell can tell students apart


@dataclass(frozen=True)
class Table:
    """A title, one line on how it was measured, the names of the columns, and the cells row by row."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]


def tables(
    results: Results, *, memory_lens: Sequence[int] = MEMORY_LENS, buckets: bool = False
) -> list[Table]:
    """All tables of the results; with `buckets`, fidelity by position too. Nothing measured, no table."""
    made = [fidelity(results), *(positions(results) if buckets else ()), recall(results)]
    made += [comparison(results), length_gate(results), memory(results, memory_lens)]
    return [table for table in made if table.rows]


def markdown(results: Results, *, memory_lens: Sequence[int] = MEMORY_LENS, buckets: bool = True) -> str:
    """The tables as Markdown."""
    return "\n".join(
        as_markdown(table) for table in tables(results, memory_lens=memory_lens, buckets=buckets)
    )


def as_markdown(table: Table, level: int = 2) -> str:
    """One table as Markdown, under a heading."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    body = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"{'#' * level} {table.title}\n\n{table.note}\n\n{body}\n"


def fidelity(results: Results) -> Table:
    """One row per length and model: perplexity, its difference from the teacher's, KL, top-1 agreement."""
    rows = []
    for length, by_model in results.likelihood.items():
        for name, measured in by_model.items():
            inner = measured.intervals
            own = name == TEACHER
            rows.append(
                [
                    f"{length:,}",
                    name,
                    f"{measured.ppl:.2f} {_between(inner['ppl'], '.2f')}",
                    "" if own else _between(inner["ppl_difference"], "+.2f"),
                    "0" if own else f"{measured.kl:.3f} {_between(inner['kl'], '.3f')}",
                    "1" if own else f"{measured.top1:.3f} {_between(inner['top1'], '.3f')}",
                    f"{measured.sequences} x {length:,}",
                ]
            )
    note = (
        f"Text: {results.source}. KL(teacher || model) in nats per token; "
        "top-1: share of positions with the teacher's arg-max; [95 % bootstrap over windows, paired]."
    )
    header = ["length", "model", "perplexity", "minus teacher's", "KL", "top-1", "tokens"]
    return Table("Fidelity", note, header, rows)


def positions(results: Results) -> Iterable[Table]:
    """Per length, one row per position bucket: perplexity of every model, KL and top-1 of every student."""
    for length, by_model in results.likelihood.items():
        students = [name for name in by_model if name != TEACHER]
        header = [
            "position",
            *(f"perplexity, {name}" for name in by_model),
            *(f"KL, {name}" for name in students),
            *(f"top-1, {name}" for name in students),
            "tokens",
        ]
        rows = []
        for index, bucket in enumerate(by_model[TEACHER].buckets):
            at = {name: measured.buckets[index] for name, measured in by_model.items()}
            rows.append(
                [
                    f"{bucket.start:,} to {bucket.end - 1:,}",
                    *(f"{at[name].ppl:.2f}" for name in by_model),
                    *(f"{at[name].kl:.3f}" for name in students),
                    *(f"{at[name].top1:.3f}" for name in students),
                    f"{bucket.tokens:,}",
                ]
            )
        yield Table(f"Fidelity by position, length {length:,}", f"Text: {results.source}.", header, rows)


def recall(results: Results) -> Table:
    """One row per task and length, one column per model."""
    cells: dict[tuple[str, int], dict[str, str]] = {}
    counts: dict[tuple[str, int], int] = {}
    for cell in results.recall:
        key = (cell.task, cell.length)
        between = _between((100 * cell.low, 100 * cell.high), ".0f")
        cells.setdefault(key, {})[cell.model] = f"{100 * cell.share:.0f} % {between}"
        counts[key] = cell.samples
    rows = [
        [
            task,
            f"{length:,}",
            *(by_model.get(name, "not run") for name in results.models),
            str(counts[task, length]),
        ]
        for (task, length), by_model in cells.items()
    ]
    note = (
        f"Prompts with every answer token right [95 % Wilson]; the same for all models (seed {results.seed})."
    )
    return Table("Recall", note, ["task", "length", *results.models, "prompts"], rows)


def comparison(results: Results) -> Table:
    """The first student against every other, on the same windows and prompts: what its linear branch is worth."""
    first, *others = [name for name in results.models if name != TEACHER] or [""]
    rows = []
    for other in others:
        for length, by_model in results.likelihood.items():
            value, interval = difference(by_model[first], by_model[other], seed=results.seed)
            told = f"{value:+.3f} {_between(interval, '+.3f')}"
            rows.append(["KL", f"{length:,}", other, told, f"{by_model[first].sequences} windows"])
        rows += [_recall_row(results, first, cell) for cell in results.recall if cell.model == other]
    note = (
        "KL: below 0 is better [95 % paired bootstrap]. Recall: prompts that only one of the two answered, "
        f"with the exact McNemar p; where the teacher's lower bound is under {100 * GATE:.0f} %, "
        "a task says nothing of its students."
    )
    header = ["measure", "length", "other", f"{first} minus other", "paired on"]
    return Table(f"{first.capitalize()} against control", note, header, rows)


def _recall_row(results: Results, first: str, other: Cell) -> list[str]:
    ours = results.cell(first, other.task, other.length)
    wins, losses = (
        sum(a > b for a, b in zip(x.hits, y.hits, strict=True)) for x, y in ((ours, other), (other, ours))
    )
    told = f"{100 * (ours.share - other.share):+.0f} points, {wins} won, {losses} lost, p = {mcnemar(wins, losses):.2g}"
    if results.cell(TEACHER, other.task, other.length).low < GATE:
        told += f" (teacher below {100 * GATE:.0f} %)"
    return [other.task, f"{other.length:,}", other.model, told, f"{other.samples} prompts"]


def length_gate(results: Results) -> Table:
    """One row per student and multiple of the training length: whether it is no worse than the window control."""
    rows = []
    for row in results.length_gate or []:
        told = ""
        if row.difference is not None:
            told = f"{row.difference:+.3f} {_between(row.interval or (math.nan, math.nan), '+.3f')}"
        rows.append(
            [
                f"{row.length:,} ({row.factor}x)",
                row.model,
                "" if row.kl is None else f"{row.kl:.3f}",
                "" if row.control_kl is None else f"{row.control_kl:.3f}",
                told,
                row.status + (f": {row.note}" if row.note else ""),
                str(row.windows or ""),
            ]
        )
    note = (
        "No student may be worse than a window alone, at its training length or beyond: failed where the whole "
        "interval of the difference lies above 0 [95 % paired bootstrap]."
    )
    header = ["length", "model", "KL", "KL, window control", "difference", "verdict", "windows"]
    return Table("Length gate", note, header, rows)


def plan_table(made: Any, scanned: Sequence[str]) -> Table:
    """What every layer got, expected and measured; ``made`` is a plan's result, ``scanned`` the scan in words."""
    measured = made.chosen.measured
    rows = [[f"layer {layer}", name] for layer, name in made.chosen.layers.items()]
    note = " ".join([*scanned, *made.words])
    return Table("Plan" if measured is None else "Plan, by measurement", note, ["layer", "gets"], rows)


def memory(results: Results, lengths: Sequence[int] = MEMORY_LENS) -> Table:
    """One row per model: bytes that one sequence of each length keeps for the next token."""
    base = results.memory.get(TEACHER)
    rows = []
    for name, used in results.memory.items():
        cells = []
        for length in lengths:
            share = ""
            if base is not None and name != TEACHER:
                share = f" ({100 * used.bytes_at(length) / base.bytes_at(length):.0f} %)"
            cells.append(bytes_text(used.bytes_at(length)) + share)
        rows.append([name, bytes_text(used.state), bytes_text(used.per_token), *cells])
    header = [
        "model",
        "constant state",
        "added per token",
        *(f"at {_thousands(length)}" for length in lengths),
    ]
    note = "Bytes per sequence: states of converted layers plus the KV cache of layers that keep softmax."
    return Table("Memory", note, header, rows)


def _thousands(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else f"{length:,}"


def _between(interval: Interval, form: str) -> str:
    low, high = interval
    if math.isnan(low):
        return "[not known]"
    return f"[{low:{form}}, {high:{form}}]"
