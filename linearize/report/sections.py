"""The page's sections in their order; each says "not run" where the record has nothing for it."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import yaml

from ..evaluate import TEACHER
from ..evaluate.speed import Point
from ..words import bytes_text
from . import plots, words
from .blocks import Block, Code, Figure, Figures, Points, Section, Words, missing
from .checks import ablations, gates, lm_eval, written_on
from .costs import milliseconds
from .heatmaps import recall_section
from .names import colours, merged, of
from .plots import Line
from .record import Run
from .savings import costs
from .tables import Table, comparison, fidelity
from .training import layer_errors, loss_curves

DRIFT: dict[str, Any] = dict(
    x="position, tokens (end of its bucket)", y="KL, nats a token", lengths=True, zero=True
)
"""How KL by position is drawn."""


def sections(runs: Sequence[Run]) -> list[Section]:
    """All of them, in order."""
    series = colours(runs)
    return [
        _summary(runs),
        loss_curves(runs, series),
        layer_errors(runs, series),
        _fidelity(runs, series),
        recall_section(runs, series),
        costs(runs, series),
        ablations(runs, series),
        gates(runs),
        written_on(runs),
        lm_eval(runs),
        _provenance(runs),
    ]


def _summary(runs: Sequence[Run]) -> Section:
    if len(runs) == 1:
        return Section("summary", "Summary", [Points(words.summary(runs[0]))])
    blocks: list[Block] = [_overview(runs)]
    texts = {json.dumps(run.results.windows, sort_keys=True) for run in runs}
    if len(texts) > 1:
        blocks.append(
            Words("The runs were measured on different text, so their numbers are not paired.", "note")
        )
    for run in runs:
        blocks += [Words(run.name, "heading"), Points(words.summary(run))]
    return Section("summary", "Summary", blocks)


def _overview(runs: Sequence[Run]) -> Table:
    """One row per student: the numbers that are compared first."""
    rows, timed_at = [], _timed_at(runs)
    for run in runs:
        for name in run.students:
            length = max(run.results.likelihood, default=0)
            measured = run.results.likelihood.get(length, {}).get(name)
            sizes, at = run.results.memory, words.LENGTHS[1]
            cells = [cell for cell in run.results.recall if cell.model == name]
            longest = max((cell.length for cell in cells), default=0)
            found = ", ".join(
                f"{cell.task} {100 * cell.share:.0f} %" for cell in cells if cell.length == longest
            )
            share = ""
            if name in sizes and TEACHER in sizes and sizes[TEACHER].bytes_at(at):
                share = f"{bytes_text(sizes[name].bytes_at(at))} ({_percent(sizes, name, at)})"
            kl = "not run"
            if measured is not None:
                kl = f"{measured.kl:.3f}{words.between(measured.intervals['kl'], '.3f')} at {length:,}"
            rows.append(
                [
                    run.label(name),
                    _method(run, name),
                    kl,
                    f"{found} at {longest:,}" if found else "not run",
                    share,
                    *([_decode(run, name, timed_at)] if timed_at else []),
                ]
            )
    header = ["student", "method", "KL, nats", "recall at the longest length", f"memory at {at:,} tokens"]
    header += [f"a step at {timed_at:,} tokens"] if timed_at else []
    return Table("Students", "Intervals and counts are in the sections below.", header, rows)


def _steps(run: Run, name: str) -> dict[int, Point]:
    """Length -> what a decode step of one row took; empty where none was timed."""
    points = run.speed.points if run.speed is not None else []
    return {p.length: p for p in points if (p.part, p.batch, p.model) == ("decode", 1, name) and p.ms}


def _timed_at(runs: Sequence[Run]) -> int:
    """The longest text at which every timed student has a decode step; 0 where there is none."""
    timed = [set(_steps(run, run.students[0])) for run in runs if run.speed is not None and run.students]
    return max(set.intersection(*timed), default=0) if timed else 0


def _decode(run: Run, name: str, length: int) -> str:
    """A step beside the teacher's on the same machine."""
    ours, theirs = (_steps(run, model).get(length) for model in (name, TEACHER))
    if ours is None or ours.ms is None:
        return "not run"
    beside = "" if theirs is None or theirs.ms is None else f" (teacher {milliseconds(theirs.ms)})"
    return f"{milliseconds(ours.ms)} ms{beside}"


def _method(run: Run, name: str) -> str:
    """Of a student; a control is named by its own."""
    return name.removesuffix(" control") if name.endswith(" control") else words.methods(run)


def _percent(sizes: Any, name: str, at: int) -> str:
    return f"{100 * sizes[name].bytes_at(at) / sizes[TEACHER].bytes_at(at):.0f} %"


def _fidelity(runs: Sequence[Run], series: dict[str, int | None]) -> Section:
    title, figures = "KL by position", []
    for length in sorted({n for run in runs for n in run.results.likelihood}):
        lines, rows = [], []
        for run in runs:
            for name, measured in run.results.likelihood.get(length, {}).items():
                if name != TEACHER and measured.buckets:
                    lines.append(drift(run, name, length, series))
                    rows += [
                        [
                            run.label(name),
                            f"{b.start:,} to {b.end - 1:,}",
                            f"{b.kl:.4f}",
                            f"{b.top1:.3f}",
                            f"{b.tokens:,}",
                        ]
                        for b in measured.buckets
                    ]
        if lines:
            alt = f"KL to the teacher by position in texts of {length:,} tokens"
            svg = plots.lines(f"kl{length}", lines, alt=alt, **DRIFT)
            table = Table("", "", ["model", "position", "KL", "top-1", "tokens"], rows)
            figures.append(Figure(svg, f"Texts of {length:,} tokens.", table))
    if not figures:
        return Section("fidelity", title, [missing("likelihood on held-out text", "linearize eval")])
    blocks: list[Block] = [Figures(figures), merged(runs, fidelity, 1)]
    for run in runs:
        if (table := comparison(run.results)).rows:
            blocks.append(replace(table, title=of(run, runs, table.title)))
    return Section("fidelity", title, blocks)


def drift(run: Run, name: str, length: int, series: dict[str, int | None]) -> Line:
    """KL over the ends of the buckets, with intervals where the record has them."""
    found = run.record["results"]["likelihood"][str(length)][name]["buckets"]
    known = [between for bucket in found if (between := (bucket.get("intervals") or {}).get("kl"))]
    low, high = ([ends[i] for ends in known] if len(known) == len(found) else None for i in (0, 1))
    measured = run.results.likelihood[length][name].buckets
    shown, ends = run.label(name), [bucket.end for bucket in measured]
    return Line(shown, ends, [bucket.kl for bucket in measured], low, high, series=series.get(shown))


def _provenance(runs: Sequence[Run]) -> Section:
    blocks: list[Block] = []
    for run in runs:
        origin = run.record.get("origin") or {}
        machine = origin.get("machine") or {}
        rows = [["measured", str(origin.get("date") or "unknown")]]
        rows += [[key, str(value)] for key, value in machine.items() if value is not None]
        rows += [[f"version of {name}", str(value)] for name, value in (origin.get("versions") or {}).items()]
        rows += [["seed", str(run.results.seed)], ["text", run.results.source]]
        rows += [[f"sha256 of {n} tokens of windows", digest] for n, digest in run.results.windows.items()]
        rows += [[f"sha256 of {name}", digest] for name, digest in run.hashes.items()]
        spent = run.record.get("timings") or {}
        rows += [[f"seconds of {phase}", f"{seconds:,.1f}"] for phase, seconds in spent.items()]
        blocks.append(Table(of(run, runs, "Where the numbers come from"), "", ["what", "value"], rows))
        if run.recipe:
            recipe = yaml.safe_dump(dict(run.recipe), sort_keys=False, allow_unicode=True, width=100)
            blocks.append(Code(of(run, runs, "Recipe, every default included"), recipe))
        if run.record.get("continuation"):
            text = f"{run.record.get('prompt') or ''}\n\n=> {run.record['continuation']}"
            blocks.append(Code(of(run, runs, "A prompt, and how the student goes on"), text))
    return Section("provenance", "Provenance", blocks)
