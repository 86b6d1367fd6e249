"""The page's sections in their order; each says "not run" where the record has nothing for it."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..evaluate import TEACHER
from ..evaluate.speed import SpeedResults
from . import plots, words
from .blocks import Block, Code, Figure, Figures, Points, Section, Words, missing
from .costs import milliseconds, speed_tables
from .plots import Dot, Line
from .heatmaps import recall_section
from .record import Run, Stage
from .tables import Table, bytes_text, comparison, fidelity, memory

LAST = 0.1
"""Share of a stage's steps that a final error is the mean of."""
FEW_LAYERS = 6
MEMORY_GRID = [512 << power for power in range(9)]
MIB = 2**20


def sections(runs: Sequence[Run]) -> list[Section]:
    """All of them, in order."""
    series = colours(runs)
    return [
        _summary(runs),
        _loss_curves(runs, series),
        _layer_errors(runs, series),
        _fidelity(runs, series),
        recall_section(runs, series),
        _costs(runs, series),
        _ablations(runs, series),
        _gates(runs),
        _lm_eval(runs),
        _provenance(runs),
    ]


def colours(runs: Sequence[Run]) -> dict[str, int | None]:
    """Label -> its series, the same in every plot; teachers are drawn in ink."""
    labels = dict.fromkeys(run.label(name) for run in runs for name in run.students)
    teachers = {teacher_label(run, runs): None for run in runs}
    return {label: index for index, label in enumerate(labels)} | teachers


def teacher_label(run: Run, runs: Sequence[Run]) -> str:
    """One name for all runs where they have one teacher."""
    names = {json.dumps(other.recipe.get("teacher"), sort_keys=True) for other in runs}
    return TEACHER if len(names) == 1 else f"{run.name}: {TEACHER}"


def label(run: Run, runs: Sequence[Run], model: str) -> str:
    """A model's name on this page."""
    return teacher_label(run, runs) if model == TEACHER else run.label(model)


def _summary(runs: Sequence[Run]) -> Section:
    if len(runs) == 1:
        return Section("summary", "Summary", [Points(words.summary(runs[0]))])
    blocks: list[Block] = [_overview(runs)]
    texts = {json.dumps(run.results.windows, sort_keys=True) for run in runs}
    if len(texts) > 1:
        blocks.append(Words("The runs were measured on different text, so their numbers are not paired.", "note"))
    for run in runs:
        blocks += [Words(run.name, "heading"), Points(words.summary(run))]
    return Section("summary", "Summary", blocks)


def _overview(runs: Sequence[Run]) -> Table:
    """One row per student: the numbers that are compared first."""
    rows = []
    for run in runs:
        for name in run.students:
            length = max(run.results.likelihood, default=0)
            measured = run.results.likelihood.get(length, {}).get(name)
            sizes, at = run.results.memory, words.LENGTHS[1]
            cells = [cell for cell in run.results.recall if cell.model == name]
            longest = max((cell.length for cell in cells), default=0)
            found = ", ".join(f"{cell.task} {100 * cell.share:.0f} %" for cell in cells if cell.length == longest)
            share = ""
            if name in sizes and TEACHER in sizes and sizes[TEACHER].bytes_at(at):
                share = f"{bytes_text(sizes[name].bytes_at(at))} ({_percent(sizes, name, at)})"
            kl = "not run"
            if measured is not None:
                kl = f"{measured.kl:.3f}{words._between(*measured.intervals['kl'], '.3f')} at {length:,}"
            rows.append([run.label(name), words.methods(run), kl, f"{found} at {longest:,}" if found else "not run", share])
    header = ["student", "method", "KL, nats", "recall at the longest length", f"memory at {at:,} tokens"]
    return Table("Students", "Intervals and counts are in the sections below.", header, rows)


def _percent(sizes: Any, name: str, at: int) -> str:
    return f"{100 * sizes[name].bytes_at(at) / sizes[TEACHER].bytes_at(at):.0f} %"


# Training


def _loss_curves(runs: Sequence[Run], series: dict[str, int | None]) -> Section:
    figures = []
    for run in runs:
        for stage in run.stages:
            if stage.name == "transfer" and stage.layers:
                figures.append(_layer_curves(run, stage, f"curve{len(figures)}"))
    for key, y in (("kl", "KL to the teacher, nats a token"), ("next_token", "next-token loss, nats a token")):
        lines = []
        for run in runs:
            for stage in run.stages:
                found = [(line["tokens"], line[key]) for line in stage.lines if line.get(key)]
                if stage.name == "finetune" and len(found) > 1:
                    name = run.label(stage.model)
                    x, smooth = plots.thinned(*map(list, zip(*found, strict=True)), most=60)
                    lines.append(Line(name, [n / 1000 for n in x], smooth, series=series.get(name), thin=True))
        if lines:
            alt = f"{y} during finetune of {', '.join(line.name for line in lines)}"
            svg = plots.lines(f"loss-{key}", lines, x="thousand tokens of finetune", y=y, alt=alt, log=True)
            rows = [[line.name, f"{line.y[0]:.4f}", f"{line.y[-1]:.4f}"] for line in lines]
            table = Table("", "", ["student", "first", "last"], rows)
            figures.append(Figure(svg, f"Finetune: {y}. Each point is the mean of neighbouring steps.", table))
    if not figures:
        return Section("loss", "Loss curves by layer", [missing("the run folder has no training metrics")])
    return Section("loss", "Loss curves by layer", [Figures(figures)])


def _layer_curves(run: Run, stage: Stage, key: str) -> Figure:
    lines, many = [], len(stage.layers) > FEW_LAYERS
    seen = [line for line in stage.lines if line.get("relative_error")]
    named = {0, len(stage.layers) // 2, len(stage.layers) - 1}
    for place, layer in enumerate(stage.layers):
        x, y = plots.thinned(
            [line["tokens"] / 1000 for line in seen], [line["relative_error"][place] for line in seen], 60
        )
        name = f"layer {layer}" if not many or place in named else ""
        shade = place / (len(stage.layers) - 1) if many else None
        lines.append(Line(name, x, y, series=place, thin=True, shade=shade))
    owner = run.label(stage.model)
    y = "relative error of the attention output"
    svg = plots.lines(
        key, lines, x="thousand tokens of transfer", y=y, alt=f"{y} of every layer of {owner} during transfer", log=True
    )
    rows = [
        [f"layer {layer}", f"{line.y[0]:.4f}", f"{line.y[-1]:.4f}"]
        for layer, line in zip(stage.layers, lines, strict=True)
    ]
    table = Table("", "", ["layer", "first", "last"], rows)
    return Figure(svg, f"Transfer of {owner}: {y}, by layer. Each point is the mean of neighbouring steps.", table)


def _layer_errors(runs: Sequence[Run], series: dict[str, int | None]) -> Section:
    lines = []
    for run in runs:
        for stage in run.stages:
            seen = [line["relative_error"] for line in stage.lines if line.get("relative_error")]
            if stage.name == "transfer" and seen:
                last = seen[-max(1, int(LAST * len(seen))) :]
                means = [sum(column) / len(last) for column in zip(*last, strict=True)]
                name = run.label(stage.model)
                lines.append(Line(name, stage.layers, means, series=series.get(name)))
    title = "Relative error by layer"
    if not lines:
        return Section("layers", title, [missing("no stage has recorded the error of its layers")])
    y = "relative error at the end of transfer"
    alt = f"{y}, by layer, of {', '.join(line.name for line in lines)}"
    svg = plots.lines("layers", lines, x="layer", y=y, alt=alt, zero=True, whole=True)
    rows = [
        [line.name, str(layer), f"{value:.4f}"]
        for line in lines
        for layer, value in zip(line.x, line.y, strict=True)
    ]
    table = Table("", "", ["student", "layer", "relative error"], rows)
    caption = (
        "Squared error of a layer's output beside softmax attention's, over the square of that; on training tokens, the "
        f"mean of the last {100 * LAST:.0f} % of the steps. Layers see the teacher's own inputs, so errors do not add up."
    )
    return Section("layers", title, [Figures([Figure(svg, caption, table)])])


# Fidelity


def _fidelity(runs: Sequence[Run], series: dict[str, int | None]) -> Section:
    title, figures = "KL by position", []
    for length in sorted({n for run in runs for n in run.results.likelihood}):
        lines, rows = [], []
        for run in runs:
            for name, measured in run.results.likelihood.get(length, {}).items():
                if name != TEACHER and measured.buckets:
                    lines.append(_positions(run, name, length, series))
                    rows += [
                        [run.label(name), f"{b.start:,} to {b.end - 1:,}", f"{b.kl:.4f}", f"{b.top1:.3f}", f"{b.tokens:,}"]
                        for b in measured.buckets
                    ]
        if lines:
            alt = f"KL to the teacher by position in texts of {length:,} tokens"
            svg = plots.lines(
                f"kl{length}", lines, x="position, tokens (end of its bucket)", y="KL, nats a token", alt=alt,
                lengths=True, zero=True,
            )  # fmt: skip
            table = Table("", "", ["model", "position", "KL", "top-1", "tokens"], rows)
            figures.append(Figure(svg, f"Texts of {length:,} tokens.", table))
    if not figures:
        return Section("fidelity", title, [missing("likelihood on held-out text", "linearize eval")])
    blocks: list[Block] = [Figures(figures), _merged(runs, fidelity, 1)]
    for run in runs:
        if (table := comparison(run.results)).rows:
            blocks.append(replace(table, title=_of(run, runs, table.title)))
    return Section("fidelity", title, blocks)


def _positions(run: Run, name: str, length: int, series: dict[str, int | None]) -> Line:
    """KL over the ends of the buckets, with intervals where the record has them."""
    found = run.record["results"]["likelihood"][str(length)][name]["buckets"]
    between = [(bucket.get("intervals") or {}).get("kl") for bucket in found]
    low, high = ([b[i] for b in between] for i in (0, 1)) if all(between) else (None, None)
    shown, ends = run.label(name), [bucket["end"] for bucket in found]
    return Line(shown, ends, [bucket["kl"] for bucket in found], low, high, series=series.get(shown))


def _merged(runs: Sequence[Run], make: Any, column: int) -> Table:
    """The rows of one table of every run, with the page's names; a teacher that runs share once."""
    made = [(run, make(run.results)) for run in runs]
    rows: list[list[str]] = []
    for run, table in made:
        for row in table.rows:
            row = [*row[:column], label(run, runs, row[column]), *row[column + 1 :]]
            if row not in rows:
                rows.append(row)
    return replace(made[0][1], rows=rows)


def _of(run: Run, runs: Sequence[Run], title: str) -> str:
    return title if len(runs) == 1 else f"{run.name}: {title}"


# Costs


def _costs(runs: Sequence[Run], series: dict[str, int | None]) -> Section:
    timed = [run for run in runs if run.speed is not None]
    figures = [figure for part in ("prefill", "decode") for figure in _speed_figures(timed, runs, series, part)]
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
        blocks += [replace(table, title=_of(run, runs, table.title)) for table in speed_tables(run.speed)]
    if any(run.results.memory for run in runs):
        blocks.append(_merged([run for run in runs if run.results.memory], memory, 0))
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
                    p for p in run.speed.points if (p.part, p.batch, p.model) == (part, batch, name) and p.ms is not None
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


def _memory_figure(runs: Sequence[Run], series: dict[str, int | None]) -> Figure | None:
    lines: dict[str, Line] = {}
    for run in runs:
        for name, size in run.results.memory.items():
            shown = label(run, runs, name)
            sizes = [size.bytes_at(length) / MIB for length in MEMORY_GRID]
            if shown not in lines and min(sizes) > 0:
                lines[shown] = Line(shown, MEMORY_GRID, sizes, series=series.get(shown))
    if not lines:
        return None
    marks = {
        run.speed.crossover["memory"] for run in runs if run.speed and run.speed.crossover.get("memory") is not None
    }
    y = "MiB kept for one sequence"
    svg = plots.lines(
        "memory", list(lines.values()), x="tokens", y=y, alt=f"{y}, by length", lengths=True, log=True,
        marks=[(at, f"crossover {at:,}") for at in sorted(filter(None, marks)) if at in MEMORY_GRID],
    )  # fmt: skip
    rows = [
        [line.name, *(bytes_text(value * MIB) for value in line.y)] for line in lines.values()
    ]
    table = Table("", "", ["model", *map(plots.tokens, MEMORY_GRID)], rows)
    return Figure(svg, "Memory: states and KV caches of one sequence, from the models' geometry.", table)


# Ablations, gates, lm-eval


def _ablations(runs: Sequence[Run], series: dict[str, int | None]) -> Section:
    title, blocks = "Ablations", []
    for run in runs:
        found = run.section("ablations")
        if not found:
            if len(runs) > 1:
                blocks.append(missing(f"ablations of {run.name}"))
            continue
        shown = [row for row in found["rows"] if row.get("kl") is not None]
        blocks.append(Words(_of(run, runs, found.get("verdict") or "No verdict.")))
        for length in sorted({row["length"] for row in shown}):
            dots = [
                Dot(row["name"], row["kl"], *(row.get("kl_interval") or (None, None)), series=series.get(run.label("student")))
                for row in shown
                if row["length"] == length
            ]
            key = f"ablation{len(blocks)}-{length}"
            svg = plots.dots(key, dots, x="KL to the teacher, nats a token", alt=f"KL of every ablation at {length:,} tokens")
            blocks.append(Figures([Figure(svg, f"At {length:,} tokens, with 95 % intervals.")]))
        rows = [
            [
                row["name"],
                f"{row.get('length') or 0:,}",
                *([f"not run: {row.get('not_run') or 'no reason given'}", "", ""] if row.get("kl") is None else _ablation(row)),
                str(row.get("windows") or 0),
            ]
            for row in found["rows"]
        ]
        note = "Parts switched off without retraining; the difference is to the intact student, paired by window."
        header = ["what", "length", "KL", "minus intact", "perplexity", "windows"]
        blocks.append(Table(_of(run, runs, "What each part is worth"), note, header, rows))
    return Section("ablations", title, blocks or [missing("ablations", "linearize eval --ablations")])


def _ablation(row: dict[str, Any]) -> list[str]:
    shift = row.get("kl_difference")
    return [
        f"{row['kl']:.4f}{words._between(*(row.get('kl_interval') or (None, None)), '.4f')}",
        "" if shift is None else f"{shift:+.4f}{words._between(*(row.get('difference_interval') or (None, None)), '+.4f')}",
        "" if row.get("ppl") is None else f"{row['ppl']:.2f}",
    ]


def _gates(runs: Sequence[Run]) -> Section:
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
        blocks.append(Table(_of(run, runs, "Integrity gates"), note, header, rows))
    return Section("gates", "Gates", blocks or [missing("integrity gates", "linearize eval --gates")])


def _lm_eval(runs: Sequence[Run]) -> Section:
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
                value += words._between(100 * task["low"], 100 * task["high"], ".1f")
            shares = ["" if task.get(k) is None else f"{100 * task[k]:.0f} %" for k in ("chance", "raw", "corrected")]
            rows.append([*start, value, *shares, str(task.get("samples") or 0)])
        header = ["task", "metric", "model", "value", "chance", "of the teacher", "above chance", "samples"]
        note = f"lm-eval {found.get('version') or 'of an unknown version'}; the same prompts for all; [95 %]."
        blocks.append(Table(_of(run, runs, "lm-eval tasks"), note, header, rows))
    return Section("lm-eval", "lm-eval", blocks or [missing("lm-eval tasks", "linearize eval --tasks")])


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


# Provenance


def _provenance(runs: Sequence[Run]) -> Section:
    import yaml

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
        blocks.append(Table(_of(run, runs, "Where the numbers come from"), "", ["what", "value"], rows))
        if run.recipe:
            recipe = yaml.safe_dump(dict(run.recipe), sort_keys=False, allow_unicode=True, width=100)
            blocks.append(Code(_of(run, runs, "Recipe, every default included"), recipe))
        if run.record.get("continuation"):
            text = f"{run.record.get('prompt') or ''}\n\n=> {run.record['continuation']}"
            blocks.append(Code(_of(run, runs, "A prompt, and how the student goes on"), text))
    return Section("provenance", "Provenance", blocks)
