"""The section on speed and memory: curves with the crossover, and every point in tables."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..evaluate.speed import SpeedResults
from ..words import bytes_text
from . import plots
from .blocks import Block, Figure, Figures, Section, Words, missing
from .costs import milliseconds, speed_tables
from .names import label, merged, of
from .plots import Line
from .record import Run
from .tables import Table, memory

MEMORY_GRID = [512 << power for power in range(9)]
MIB = 2**20
KEPT: dict[str, Any] = dict(x="tokens", y="MiB kept for one sequence", lengths=True, log=True)
"""How memory over length is drawn."""


def costs(runs: Sequence[Run], series: dict[str, int | None]) -> Section:
    timed = [run for run in runs if run.speed is not None]
    figures = [
        figure for part in ("prefill", "decode") for figure in _speed_figures(timed, runs, series, part)
    ]
    blocks: list[Block] = []
    if memory_figure := _memory_figure(runs, series):
        figures.append(memory_figure)
    if not timed:
        blocks.append(missing("speed", "linearize bench STUDENT"))
    if len({(run.speed.device, run.speed.dtype) for run in timed if run.speed}) > 1:
        blocks.append(Words("The runs were timed on different machines: compare within one only.", "note"))
    if figures:
        blocks.append(Figures(figures))
    for run in timed:
        assert run.speed is not None
        blocks += [replace(table, title=of(run, runs, table.title)) for table in speed_tables(run.speed)]
    if any(run.results.memory for run in runs):
        blocks.append(merged([run for run in runs if run.results.memory], memory, 0))
    else:
        blocks.append(missing("memory"))
    return Section("costs", "Speed and memory", blocks)


def _speed_figures(
    timed: Sequence[Run], runs: Sequence[Run], series: dict[str, int | None], part: str
) -> list[Figure]:
    made = []
    for batch in sorted({point.batch for run in timed for point in _points(run.speed) if point.part == part}):
        lines: dict[str, Line] = {}
        marks = []
        for run in timed:
            assert run.speed is not None
            for name in dict.fromkeys(point.model for point in run.speed.points):
                points = [
                    p
                    for p in run.speed.points
                    if (p.part, p.batch, p.model) == (part, batch, name) and p.ms is not None
                ]
                shown = label(run, runs, name)
                if points and shown not in lines:
                    x, y, low, high = zip(*((p.length, p.ms, p.low, p.high) for p in points), strict=True)
                    lines[shown] = Line(shown, x, y, low, high, series=series.get(shown))
            at = (run.speed.crossovers.get(batch) or run.speed.crossover).get(part)
            if at is not None:
                marks.append((at, f"crossover {at:,}" if len(timed) == 1 else plots.tokens(at)))
        if not lines:
            continue
        what = "a prompt" if part == "prefill" else "a step"
        y = f"milliseconds for {what}, {batch} row{'s' if batch > 1 else ''}"
        svg = plots.lines(
            f"{part}{batch}", list(lines.values()), x="tokens", y=y, alt=f"{part}: {y}, by length", lengths=True,
            log=True, marks=list(dict.fromkeys(marks)),
        )  # fmt: skip
        rows = [
            [line.name, f"{x:,}", f"{milliseconds(v)} [{milliseconds(low)}, {milliseconds(high)}]"]
            for line in lines.values()
            for x, v, low, high in zip(line.x, line.y, line.low or (), line.high or (), strict=True)
        ]
        caption = f"{part.capitalize()}: median with quartiles."
        if not marks:
            up_to = max(run.speed.up_to for run in timed if run.speed)
            caption += f" No crossover up to {up_to:,} tokens." if up_to else ""
        made.append(Figure(svg, caption, Table("", "", ["model", "tokens", "ms [quartiles]"], rows)))
    return made


def _points(speed: SpeedResults | None) -> list[Any]:
    return [] if speed is None else speed.points


def kept(runs: Sequence[Run], series: dict[str, int | None]) -> list[Line]:
    """MiB of states and KV caches of one sequence, by length, of every model."""
    lines: dict[str, Line] = {}
    for run in runs:
        for name, size in run.results.memory.items():
            shown = label(run, runs, name)
            sizes = [size.bytes_at(length) / MIB for length in MEMORY_GRID]
            if shown not in lines and min(sizes) > 0:
                lines[shown] = Line(shown, MEMORY_GRID, sizes, series=series.get(shown))
    return list(lines.values())


def _memory_figure(runs: Sequence[Run], series: dict[str, int | None]) -> Figure | None:
    lines = kept(runs, series)
    if not lines:
        return None
    marks = {
        run.speed.crossover["memory"]
        for run in runs
        if run.speed and run.speed.crossover.get("memory") is not None
    }
    svg = plots.lines(
        "memory", lines, alt=f"{KEPT['y']}, by length", **KEPT,
        marks=[(at, f"crossover {at:,}") for at in sorted(filter(None, marks)) if at in MEMORY_GRID],
    )  # fmt: skip
    rows = [[line.name, *(bytes_text(value * MIB) for value in line.y)] for line in lines]
    table = Table("", "", ["model", *map(plots.tokens, MEMORY_GRID)], rows)
    return Figure(svg, "Memory: states and KV caches of one sequence, from the models' geometry.", table)
