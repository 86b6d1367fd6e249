"""The sections on ablations, integrity gates, free continuation and lm-eval tasks."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..evaluate.continuation import TEXT
from . import plots, words
from .blocks import Block, Figure, Figures, Section, Words, missing
from .continuation import TITLE, table
from .names import label, of
from .plots import Dot
from .record import Run
from .tables import Table


def ablations(runs: Sequence[Run], series: dict[str, int | None]) -> Section:
    title, blocks = "Ablations", []
    for run in runs:
        found = run.section("ablations")
        if not found:
            if len(runs) > 1:
                blocks.append(missing(f"ablations of {run.name}"))
            continue
        shown = [row for row in found["rows"] if row.get("kl") is not None]
        if not words.is_window(run):
            verdict = words.linear_branch(words.with_control(run)) or found.get("verdict") or "no verdict"
            verdict = f"{verdict[:1].upper()}{verdict[1:].removesuffix('.')}."
            blocks.append(Words(of(run, runs, verdict)))
        for length in sorted({row["length"] for row in shown}):
            dots = [
                Dot(
                    row["name"],
                    row["kl"],
                    *(row.get("kl_interval") or (None, None)),
                    series=series.get(run.label("student")),
                )
                for row in shown
                if row["length"] == length
            ]
            whole = run.results.likelihood.get(length, {}).get(run.students[0] if run.students else "")
            x, alt = "KL to the teacher, nats a token", f"KL of every ablation at {length:,} tokens"
            key = f"ablation{len(blocks)}-{length}"
            svg = plots.dots(key, dots, x=x, alt=alt, line=whole.kl if whole else None)
            caption = f"At {length:,} tokens, with 95 % intervals." + (
                " Dotted: the intact student." if whole else ""
            )
            blocks.append(Figures([Figure(svg, caption)]))
        rows = [
            [
                row["name"],
                f"{row.get('length') or 0:,}",
                *(
                    [f"not run: {row.get('not_run') or 'no reason given'}", "", ""]
                    if row.get("kl") is None
                    else _ablation(row)
                ),
                str(row.get("windows") or 0),
            ]
            for row in found["rows"]
        ]
        note = (
            "Parts switched off without retraining, earlier stages of the training, and controls; the difference is to "
            "the student as it is, paired by window."
        )
        header = ["what", "length", "KL", "minus intact", "perplexity", "windows"]
        blocks.append(Table(of(run, runs, "What each part is worth"), note, header, rows))
    return Section("ablations", title, blocks or [missing("ablations")])


def _ablation(row: dict[str, Any]) -> list[str]:
    shift = row.get("kl_difference")
    return [
        f"{row['kl']:.4f}{words.between(row.get('kl_interval'), '.4f')}",
        "" if shift is None else f"{shift:+.4f}{words.between(row.get('difference_interval'), '+.4f')}",
        "" if row.get("ppl") is None else f"{row['ppl']:.2f}",
    ]


def gates(runs: Sequence[Run]) -> Section:
    blocks: list[Block] = []
    for run in runs:
        found = run.section("gates")
        if not found:
            if len(runs) > 1:
                blocks.append(missing(f"gates of {run.name}"))
            continue
        marks = {"passed": "✓ passed", "failed": "✗ failed", "not run": "– not run"}
        rows = [
            [
                gate["name"],
                marks.get(gate["status"], str(gate["status"])),
                gate.get("where") or "",
                _figure(gate.get("difference")),
                _figure(gate.get("bound")),
                gate.get("note") or "",
            ]
            for gate in found["gates"]
        ]
        header = ["gate", "status", "largest difference at", "difference", "bound", "note"]
        note = f"All together: {found['status']}. One that was not run makes the whole incomplete."
        blocks.append(Table(of(run, runs, "Integrity gates"), note, header, rows))
    return Section("gates", "Gates", blocks or [missing("integrity gates", "linearize eval --gates")])


def written_on(runs: Sequence[Run]) -> Section:
    blocks: list[Block] = []
    for run in runs:
        if run.continuation is None:
            if len(runs) > 1:
                blocks.append(missing(f"free continuation of {run.name}"))
            continue
        made = table(run.continuation)
        named = [[row[0] if row[0] == TEXT else label(run, runs, row[0]), *row[1:]] for row in made.rows]
        blocks.append(replace(made, title=of(run, runs, made.title), rows=named))
    command = "evaluate.continuation.prompts=100"
    return Section("continuation", TITLE, blocks or [missing("free continuation", command)])


def lm_eval(runs: Sequence[Run]) -> Section:
    blocks: list[Block] = []
    for run in runs:
        found = run.section("lm_eval")
        if not found:
            if len(runs) > 1:
                blocks.append(missing(f"lm-eval tasks of {run.name}"))
            continue
        rows = []
        for task in found["tasks"]:
            start = [task["task"], task.get("metric") or "", label(run, runs, task["model"])]
            if task.get("not_run") or task.get("value") is None:
                rows.append([*start, f"not run: {task.get('not_run') or 'no reason given'}", "", "", "", "0"])
                continue
            value = f"{100 * task['value']:.1f} %"
            if task.get("low") is not None:
                value += words.between((100 * task["low"], 100 * task["high"]), ".1f")
            shares = [
                "" if task.get(k) is None else f"{100 * task[k]:.0f} %"
                for k in ("chance", "raw", "corrected")
            ]
            rows.append([*start, value, *shares, str(task.get("samples") or 0)])
        header = ["task", "metric", "model", "value", "chance", "of the teacher", "above chance", "samples"]
        note = f"lm-eval {found.get('version') or 'of an unknown version'}; the same prompts for all; [95 %]."
        blocks.append(Table(of(run, runs, "lm-eval tasks"), note, header, rows))
    return Section("lm-eval", "lm-eval", blocks or [missing("lm-eval tasks")])


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
