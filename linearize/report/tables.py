"""The tables of a run: fidelity, recall, the student against its control, memory; with intervals and counts.

`tables` gives them as text cells, which the command line prints with rich; `markdown` is the same for files.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ..evaluate import TEACHER, Cell, Results, SuiteCell
from ..evaluate.likelihood import difference
from ..evaluate.recall import GATE
from ..evaluate.statistics import mcnemar, wilson
from ..tasks.suite import SUITE
from ..words import bytes_text
from .continuation import continuation
from .table import Table, bracketed

MEMORY_LENS = (1024, 8192, 32768)


def tables(
    results: Results, *, memory_lens: Sequence[int] = MEMORY_LENS, buckets: bool = False
) -> list[Table]:
    """All tables of the results; with `buckets`, fidelity by position too. Nothing measured, no table."""
    made = [fidelity(results), *(positions(results) if buckets else ()), by_source(results), recall(results)]
    made += [
        suite(results),
        suite_not_run(results),
        continuation(results),
        lm_eval(results),
        comparison(results),
        ablations(results),
    ]
    made += [length_gate(results), memory(results, memory_lens), gates(results)]
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
                    f"{measured.ppl:.2f} {bracketed(inner['ppl'], '.2f')}",
                    "" if own else bracketed(inner["ppl_difference"], "+.2f"),
                    "0" if own else f"{measured.kl:.3f} {bracketed(inner['kl'], '.3f')}",
                    "1" if own else f"{measured.top1:.3f} {bracketed(inner['top1'], '.3f')}",
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
                told = [f"{text.ppl:.2f} {bracketed(text.intervals['ppl'], '.2f')}", "0", "1"]
                if name != TEACHER:
                    told[1] = f"{text.kl:.3f} {bracketed(text.intervals['kl'], '.3f')}"
                    told[2] = f"{text.top1:.3f} {bracketed(text.intervals['top1'], '.3f')}"
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
        between = bracketed((100 * cell.low, 100 * cell.high), ".0f")
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
    told = f"{100 * cell.score:.0f} % {bracketed((100 * cell.low, 100 * cell.high), '.0f')}"
    if SUITE[cell.task].several:
        low, high = wilson(cell.correct, cell.samples)
        told += (
            f", whole {100 * cell.correct / cell.samples:.0f} % {bracketed((100 * low, 100 * high), '.0f')}"
        )
    return told + (f", strict {100 * cell.strict:.0f} %" if abs(cell.strict - cell.score) > 1e-9 else "")


def _apart(cell: SuiteCell) -> str:
    if cell.difference is None or cell.difference_interval is None:
        return ""
    low, high = cell.difference_interval
    return f"{100 * cell.difference:+.0f} {bracketed((100 * low, 100 * high), '+.0f')}"


def _likely(cell: SuiteCell) -> str:
    if cell.likelihood is None or cell.gap is None:
        return ""
    told = f"{100 * cell.likelihood:.0f} % ({cell.gap:+.0f})"
    if cell.parts is None or cell.parts_gap is None:
        return told
    return f"{told}, each {100 * cell.parts:.0f} % ({cell.parts_gap:+.0f})"


def comparison(results: Results) -> Table:
    """The first student against every other, on the same windows and prompts: what its linear branch is worth."""
    first, *others = [name for name in results.models if name != TEACHER] or [""]
    rows = []
    for other in others:
        for length, by_model in results.likelihood.items():
            value, interval = difference(by_model[first], by_model[other], seed=results.seed)
            told = f"{value:+.3f} {bracketed(interval, '+.3f')}"
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
            told = f"{row.difference:+.3f} {bracketed(row.interval or (math.nan, math.nan), '+.3f')}"
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


def ablations(results: Results) -> Table:
    """One row per branch that was switched off, state that was zeroed, stage and control; the verdict in words."""
    found = results.ablations
    rows = []
    for row in found.rows if found else ():
        if row.kl is None or row.kl_interval is None or row.difference_interval is None:
            rows.append([row.name, f"{row.length:,}", f"not run: {row.not_run}", "", "", ""])
            continue
        rows.append(
            [
                row.name,
                f"{row.length:,}",
                f"{row.kl:.3f} {bracketed(row.kl_interval, '.3f')}",
                f"{row.kl_difference:+.3f} {bracketed(row.difference_interval, '+.3f')}",
                f"{row.ppl:.2f}",
                str(row.windows),
            ]
        )
    note = (
        f"{found.verdict[:1].upper() + found.verdict[1:] if found else ''}. KL to the teacher, and minus that of the "
        "student as it is [95 % paired bootstrap]; with a zeroed state, of the half that follows it."
    )
    header = ["what", "length", "KL", "minus the student's", "perplexity", "windows"]
    return Table("What the student uses", note, header, rows)


def gates(results: Results) -> Table:
    """One row per integrity gate."""
    found = results.gates
    rows = [[gate.name, gate.status, gate.measured, gate.note] for gate in (found.gates if found else ())]
    note = f"Is the student one function, however it is run: {found.status if found else ''}."
    return Table("Integrity gates", note, ["gate", "status", "largest difference", "what"], rows)


def _thousands(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else f"{length:,}"
