"""What the stages recorded: losses as they fell, and what is left of them in every layer."""

from collections.abc import Sequence

from . import plots
from .blocks import Figure, Figures, Section, missing
from .plots import Line
from .record import Run, Stage
from .tables import Table

LAST = 0.1
"""Share of a stage's steps that a final error is the mean of."""
FEW_LAYERS = 6


def loss_curves(runs: Sequence[Run], series: dict[str, int | None]) -> Section:
    figures = []
    for run in runs:
        for stage in run.stages:
            if stage.name == "transfer" and stage.layers:
                figures.append(_layer_curves(run, stage, f"curve{len(figures)}"))
    for key, y in (
        ("kl", "KL to the teacher, nats a token"),
        ("next_token", "next-token loss, nats a token"),
    ):
        lines = []
        for run in runs:
            for stage in run.stages:
                found = [(line["tokens"], line[key]) for line in stage.lines if line.get(key)]
                if stage.name == "finetune" and len(found) > 1:
                    name = run.label(stage.model)
                    x, smooth = plots.thinned(*map(list, zip(*found, strict=True)), most=60)
                    lines.append(
                        Line(name, [n / 1000 for n in x], smooth, series=series.get(name), thin=True)
                    )
        if lines:
            alt = f"{y} during finetune of {', '.join(line.name for line in lines)}"
            svg = plots.lines(f"loss-{key}", lines, x="thousand tokens of finetune", y=y, alt=alt, log=True)
            rows = [[line.name, f"{line.y[0]:.4f}", f"{line.y[-1]:.4f}"] for line in lines]
            table = Table("", "", ["student", "first", "last"], rows)
            figures.append(
                Figure(svg, f"Finetune: {y}. Each point is the mean of neighbouring steps.", table)
            )
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
        key,
        lines,
        x="thousand tokens of transfer",
        y=y,
        alt=f"{y} of every layer of {owner} during transfer",
        log=True,
    )
    rows = [
        [f"layer {layer}", f"{line.y[0]:.4f}", f"{line.y[-1]:.4f}"]
        for layer, line in zip(stage.layers, lines, strict=True)
    ]
    table = Table("", "", ["layer", "first", "last"], rows)
    return Figure(
        svg, f"Transfer of {owner}: {y}, by layer. Each point is the mean of neighbouring steps.", table
    )


def layer_errors(runs: Sequence[Run], series: dict[str, int | None]) -> Section:
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
        "Squared error of a layer's output beside softmax attention's, over the square of that; on training tokens, "
        f"the mean of the last {100 * LAST:.0f} % of the steps. Layers see the teacher's own inputs, so errors do not "
        "add up."
    )
    return Section("layers", title, [Figures([Figure(svg, caption, table)])])
