"""The tables of a run: fidelity, recall, the student against its control, memory; with intervals and counts.

`tables` gives them as text cells, which the command line prints with rich; `markdown` is the same for files.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .evaluate import TEACHER, Cell, Results, SuiteCell
from .evaluate.likelihood import difference
from .evaluate.statistics import Interval, mcnemar, wilson
from .tasks.suite import SUITE

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
    made += [suite(results), suite_not_run(results)]
    return [table for table in [*made, comparison(results), memory(results, memory_lens)] if table.rows]


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


def suite(results: Results) -> Table:
    """One row per task and length of the recall suite: every model's score, and likelihood against generation."""
    found = results.suite
    lines = found.lines() if found else []
    students = [name for name in results.models if name != TEACHER]
    header = ["task", "length", *results.models, *(f"{name} minus {TEACHER}" for name in students)]
    header += [*(f"likelihood, {name}" for name in results.models), "prompts", "remarks"]
    rows = []
    for task, length in dict.fromkeys((cell.task, cell.length) for cell in lines):
        at = {cell.model: cell for cell in lines if (cell.task, cell.length) == (task, length)}
        base = at[TEACHER]
        failed = "teacher not above chance" if SUITE[task].chance else "teacher below gate"
        remarks = [failed] if base.gated else []
        remarks += [] if base.reportable else ["not reportable"]
        if found:
            same = [cell for cell in found.baselines if (cell.task, cell.length) == (task, length)]
            remarks += [f"{cell.model} {100 * cell.score:.0f} %" for cell in same]
        rows.append(
            [
                base.label,
                f"{length:,}" if length else "facts alone" if task.startswith("qa") else "no filler",
                *(_score(at[name]) if name in at else "not run" for name in results.models),
                *(_apart(at[name]) if name in at else "" for name in students),
                *(_likely(at[name]) if name in at else "" for name in results.models),
                str(base.samples),
                "; ".join(remarks),
            ]
        )
    note = " ".join(
        [
            "Generated answers, mean score [95 %: Wilson, or bootstrap where an answer is right in part]; "
            "whole: all of the answer found [Wilson]; strict: the first answer given is right; "
            "likelihood: points by which it exceeds generation in brackets; "
            f"gate: the teacher's lower bound is at least {100 * GATE:.0f} %, or above chance.",
            *(found.notes if found else []),
        ]
    )
    return Table("Recall suite", note, header, rows)


def suite_not_run(results: Results) -> Table:
    """Tasks of the suite that were asked for and not measured, with the reason."""
    missing = results.suite.not_run if results.suite else []
    rows = [[entry.label, f"{entry.length:,}", f"not run: {entry.reason}"] for entry in missing]
    return Table("Recall suite, not run", "Nothing is said of these.", ["task", "length", "why"], rows)


def _score(cell: SuiteCell) -> str:
    told = f"{100 * cell.score:.0f} % {_between((100 * cell.low, 100 * cell.high), '.0f')}"
    if SUITE[cell.task].several:
        low, high = wilson(cell.correct, cell.samples)
        told += (
            f", whole {100 * cell.correct / cell.samples:.0f} % {_between((100 * low, 100 * high), '.0f')}"
        )
    return told + (f", strict {100 * cell.strict:.0f} %" if abs(cell.strict - cell.score) > 1e-9 else "")


def _apart(cell: SuiteCell) -> str:
    if cell.difference is None or cell.difference_interval is None:
        return ""
    low, high = cell.difference_interval
    return f"{100 * cell.difference:+.0f} {_between((100 * low, 100 * high), '+.0f')}"


def _likely(cell: SuiteCell) -> str:
    if cell.likelihood is None or cell.gap is None:
        return ""
    return f"{100 * cell.likelihood:.0f} % ({cell.gap:+.0f})"


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


def bytes_text(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"


def _thousands(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else f"{length:,}"


def _between(interval: Interval, form: str) -> str:
    low, high = interval
    if math.isnan(low):
        return "[not known]"
    return f"[{low:{form}}, {high:{form}}]"
