"""The tables of a run: fidelity, recall, the student against its control, memory; with intervals and counts.

`tables` gives them as text cells, which the command line prints with rich; `markdown` is the same for files.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .evaluate import TEACHER, Cell, Results
from .evaluate.likelihood import difference
from .evaluate.statistics import Interval, mcnemar

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
    made = [fidelity(results), *(positions(results) if buckets else ()), by_source(results), recall(results)]
    made += [lm_eval(results), comparison(results), memory(results, memory_lens)]
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
    units = {x.unit for by_model in results.likelihood.values() for x in by_model.values()}
    unit = " or ".join(sorted(units)) or "windows"
    seen = "".join(
        f" {100 * text.share:.2g} % of the runs of {text.n} tokens in {name} stand in the training text too."
        for name, text in results.overlap.items()
    )
    note = (
        f"Text: {results.source}. KL(teacher || model) in nats per token; "
        f"top-1: share of positions with the teacher's arg-max; [95 % bootstrap over {unit}, paired].{seen}"
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
        parts = {name: [*measured.buckets, *measured.derived] for name, measured in by_model.items()}
        for index, bucket in enumerate(parts[TEACHER]):
            at = {name: buckets[index] for name, buckets in parts.items()}
            told = f", {bucket.label}" if bucket.label else ""
            rows.append(
                [
                    f"{bucket.start:,} to {bucket.end - 1:,}{told}",
                    *(f"{at[name].ppl:.2f}" for name in by_model),
                    *(f"{at[name].kl:.3f}" for name in students),
                    *(f"{at[name].top1:.3f}" for name in students),
                    f"{bucket.tokens:,}",
                ]
            )
        yield Table(f"Fidelity by position, length {length:,}", f"Text: {results.source}.", header, rows)


def by_source(results: Results) -> Table:
    """One row per length, held-out text and model, where there is more than one text."""
    rows = []
    for length, by_model in results.likelihood.items():
        for name, measured in by_model.items():
            for text in measured.sources if len(measured.sources) > 1 else ():
                told = [f"{text.ppl:.2f} {_between(text.intervals['ppl'], '.2f')}", "0", "1"]
                if name != TEACHER:
                    told[1] = f"{text.kl:.3f} {_between(text.intervals['kl'], '.3f')}"
                    told[2] = f"{text.top1:.3f} {_between(text.intervals['top1'], '.3f')}"
                rows.append([f"{length:,}", text.name, name, *told, f"{text.sequences} x {length:,}"])
    header = ["length", "text", "model", "perplexity", "KL", "top-1", "tokens"]
    return Table("Fidelity by text", "Each held-out text by itself [95 % bootstrap].", header, rows)


def lm_eval(results: Results) -> Table:
    """One row per task, metric and model of lm-eval; a group of tasks as one."""
    header = [
        "task",
        "metric",
        "examples",
        "model",
        "score",
        "of teacher's",
        "above chance",
        "minus teacher's",
    ]
    if results.lm_eval is None:
        return Table("lm-eval", "", [*header, "samples"], [])
    rows = []
    for x in results.lm_eval.tasks:
        if x.group is not None:
            continue
        shots = "" if x.num_fewshot is None else str(x.num_fewshot)
        if x.value is None:
            rows.append([x.task, x.metric, shots, x.model, f"not run: {x.not_run}", "", "", "", "0"])
            continue
        told = f"{x.value:.3f}" + ("" if x.low is None or x.high is None else f" [{x.low:.3f}, {x.high:.3f}]")
        kept = [f"{100 * share:.0f} %" if share is not None else "" for share in (x.raw, x.corrected)]
        beside = ""
        if x.difference is not None:
            between = ""
            if x.difference_low is not None and x.difference_high is not None:
                between = f" [{100 * x.difference_low:+.1f}, {100 * x.difference_high:+.1f}]"
            beside = (
                f"{100 * x.difference:+.1f}{between} points, {x.wins} won, {x.losses} lost, p = {x.p:.2g}"
            )
        rows.append([x.task, x.metric, shots, x.model, told, *kept, beside, str(x.samples)])
    note = (
        f"lm-eval {results.lm_eval.version}, the same prompts for all, without a chat template [95 %]. Above chance: "
        "(student - chance) / (teacher - chance), empty where the teacher's interval reaches down to chance. "
        "p: exact McNemar, adjusted by Holm over a model's rows."
    )
    return Table("lm-eval", note, [*header, "samples"], rows)


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
