"""The recall section: shares by length with intervals, heat maps by length and depth, every cell in a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluate import TEACHER
from . import plots
from .blocks import Block, Figure, Figures, Section, Words, missing
from .plots import Line
from .record import Run
from .tables import GATE, Table, recall

HEAT_NOTE = (
    "Heat maps: percent of each cell; the difference is student minus teacher in points. Grey: the lower end of the "
    f"teacher's interval is below {100 * GATE:.0f} %, so the cell says nothing of students. A dot: not run."
)


def recall_section(runs: Sequence[Run], series: Mapping[str, int | None]) -> Section:
    """Plain tasks by length, then the suite by length and depth, of every run."""
    blocks: list[Block] = []
    if any(run.results.recall for run in runs):
        blocks.append(Figures(_by_length(runs, series)))
    if any(run.results.recall or run.section("suite") for run in runs):
        blocks.append(Words(HEAT_NOTE, "note"))
    for index, run in enumerate(runs):
        head = "" if len(runs) == 1 else f"{run.name}: "
        if run.results.recall:
            blocks += _heats(run, f"recall{index}", _plain(run), head, by_depth=False)
            table = recall(run.results)
            blocks.append(Table(f"{head}{table.title}", table.note, table.header, table.rows))
        if suite := run.section("suite"):
            blocks += _heats(run, f"suite{index}", suite["cells"], head, by_depth=True)
            blocks += [Words(note, "note") for note in suite.get("notes") or ()]
            blocks.append(_suite_table(run, suite, head))
            if suite.get("not_run"):
                blocks.append(_left_out(suite, head))
    title = "Recall"
    if not blocks:
        return Section("recall", title, [missing("recall tasks", "linearize eval")])
    if not any(run.section("suite") for run in runs):
        blocks.append(missing("the recall suite by depth"))
    return Section("recall", title, blocks)


def _by_length(runs: Sequence[Run], series: Mapping[str, int | None]) -> list[Figure]:
    figures = []
    for index, task in enumerate(dict.fromkeys(cell.task for run in runs for cell in run.results.recall)):
        alt = f"{task}: percent of prompts answered, by length"
        svg = plots.lines(f"length{index}", answered(runs, series, task), alt=alt, **by_length(task))
        figures.append(
            Figure(svg, f"{task}: prompts with every answer token right, with 95 % Wilson intervals.")
        )
    return figures


def answered(runs: Sequence[Run], series: Mapping[str, int | None], task: str) -> list[Line]:
    """Percent of one task's prompts answered, by length, of every model."""
    lines: dict[str, Line] = {}
    for run in runs:
        for model in run.results.models:
            cells = sorted(
                (c for c in run.results.recall if (c.task, c.model) == (task, model)), key=lambda c: c.length
            )
            name = TEACHER if model == TEACHER and TEACHER in series else run.label(model)
            if cells and name not in lines:
                x, y = [c.length for c in cells], [100 * c.share for c in cells]
                low, high = [100 * c.low for c in cells], [100 * c.high for c in cells]
                lines[name] = Line(name, x, y, low, high, series=series.get(name))
    return list(lines.values())


def by_length(task: str) -> dict[str, Any]:
    """How those lines are drawn."""
    y = f"{plots.short(task)}, % answered"
    return dict(x="tokens of prompt and answer", y=y, lengths=True, zero=True, band=False)


def _plain(run: Run) -> list[dict[str, Any]]:
    """The plain tasks as cells of the suite's form; a cell is gated for all by its teacher."""
    gated = {(c.task, c.length) for c in run.results.recall if c.model == TEACHER and c.low < GATE}
    return [
        {
            "task": cell.task,
            "length": cell.length,
            "depth": None,
            "model": cell.model,
            "score": cell.share,
            "gated": (cell.task, cell.length) in gated,
        }
        for cell in run.results.recall
    ]


def _heats(
    run: Run, key: str, cells: Sequence[Mapping[str, Any]], head: str, *, by_depth: bool
) -> list[Block]:
    """Teacher, students and their differences side by side: one row of maps a task by depth, or one for all tasks."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        deep = by_depth and any(c.get("depth") is not None for c in cells if c["task"] == cell["task"])
        groups.setdefault(str(cell.get("label") or cell["task"]) if deep else "", []).append(cell)
    blocks: list[Block] = []
    for index, (group, members) in enumerate(groups.items()):
        lengths = sorted({cell["length"] for cell in members})
        at = {(cell["model"], _row(run, cell, group), cell["length"]): cell for cell in members}
        rows = _order([_row(run, cell, group) for cell in members], group)
        grey = [[any(_gated(at.get((m, r, n))) for m in run.results.models) for n in lengths] for r in rows]
        shares = {m: [[_score(at.get((m, r, n))) for n in lengths] for r in rows] for m in run.results.models}
        panels = [(name, shares[name], False) for name in run.results.models]
        panels += [
            (f"{name} minus teacher", _minus(shares[name], shares[TEACHER]), True) for name in run.students
        ]
        title = group or ("tasks without depths" if by_depth else "every task")
        figures = [
            Figure(
                plots.heat(
                    f"{key}-{index}-{place}", values, rows=[plots.short(row, 16) for row in rows],
                    columns=[plots.tokens(n) for n in lengths], title=name, x="tokens", y="depth" if group else "",
                    alt=f"{title}, {name}: percent by length and {'depth' if group else 'task'}", grey=grey,
                    signed=signed,
                ),
                name,
            )
            for place, (name, values, signed) in enumerate(panels)
            if any(value is not None for row in values for value in row)
        ]  # fmt: skip
        if figures:
            blocks += [Words(f"{head}{title}", "heading"), Figures(figures, small=True)]
    return blocks


def _row(run: Run, cell: Mapping[str, Any], group: str) -> str:
    return (run.depth(cell) or "all") if group else str(cell.get("label") or cell["task"])


def _order(rows: Sequence[str], group: str) -> list[str]:
    unique = list(dict.fromkeys(rows))
    return (
        sorted(unique, key=lambda row: float(row.removesuffix(" %")) if row != "all" else 1e9)
        if group
        else unique
    )


def _gated(cell: Mapping[str, Any] | None) -> bool:
    return bool(cell and cell.get("gated"))


def _score(cell: Mapping[str, Any] | None) -> float | None:
    return None if cell is None or cell.get("score") is None else 100 * cell["score"]


def _minus(
    ours: Sequence[Sequence[float | None]], theirs: Sequence[Sequence[float | None]]
) -> list[list[float | None]]:
    return [
        [None if a is None or b is None else a - b for a, b in zip(x, y, strict=True)]
        for x, y in zip(ours, theirs, strict=True)
    ]


def _suite_table(run: Run, suite: Mapping[str, Any], head: str) -> Table:
    rows = []
    for cell in suite["cells"]:
        between = f"{100 * cell['score']:.0f} % [{100 * cell['low']:.0f}, {100 * cell['high']:.0f}]"
        rows.append(
            [
                str(cell.get("label") or cell["task"]),
                f"{cell['length']:,}",
                run.depth(cell) or "all",
                cell["model"],
                between + (" (teacher below gate)" if cell.get("gated") else ""),
                _share(cell, "strict"),
                _with_each(_share(cell, "likelihood"), _share(cell, "parts")),
                _with_each(_points(cell, "gap"), _points(cell, "parts_gap")),
                str(cell["samples"]),
                f"{cell['tokens']:,.0f}" if cell.get("tokens") is not None else "",
            ]
        )
    hay = suite.get("haystack") or {}
    note = f"Seed {suite.get('seed')}; haystack {hay.get('name') or 'not named'}"
    note += f", sha256 {hay['sha256']}." if hay.get("sha256") else "."
    note += " Strict: the first string of the answer's type is the answer. Gap: likelihood minus generation, points. "
    note += "Of several answers: all of them right, then each."
    header = ["task", "length", "depth", "model", "score", "strict", "likelihood", "gap", "prompts", "tokens"]
    return Table(f"{head}Recall suite", note, header, rows)


def _left_out(suite: Mapping[str, Any], head: str) -> Table:
    """What was asked for and could not be made or read, with the reason."""
    rows = [
        [str(entry.get("label") or entry["task"]), f"{entry['length']:,}", str(entry["reason"])]
        for entry in suite["not_run"]
    ]
    return Table(f"{head}Recall suite, not run", "Nothing is said of these.", ["task", "length", "why"], rows)


def _with_each(whole: str, each: str) -> str:
    return f"{whole}, each {each}" if each else whole


def _points(cell: Mapping[str, Any], key: str) -> str:
    return "" if cell.get(key) is None else f"{cell[key]:+.0f}"


def _share(cell: Mapping[str, Any], key: str) -> str:
    """A share as percent; counts of prompts are told apart from shares by being whole."""
    value = cell.get(key)
    if value is None:
        return ""
    return f"{100 * value / cell['samples']:.0f} %" if isinstance(value, int) else f"{100 * value:.0f} %"
