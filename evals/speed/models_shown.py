"""Tables and plots of ``models.py``'s rows."""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import measure
from measure import MIB, in_k, markdown, short


def crossover(teacher: Mapping[int, float], student: Mapping[int, float]) -> str:
    """The length from which on the student takes less time, between the measured ones by a line in logarithms."""
    lengths = sorted(teacher.keys() & student.keys())
    if not lengths:
        return ""
    gap = {length: math.log(student[length] / teacher[length]) for length in lengths}
    if gap[lengths[0]] <= 0:
        always = all(g <= 0 for g in gap.values())
        return f"below {in_k(lengths[0])}" + ("" if always else ", not throughout")
    for left, right in itertools.pairwise(lengths):
        if gap[right] <= 0:
            share = gap[left] / (gap[left] - gap[right])
            return f"{math.exp(math.log(left) + share * math.log(right / left)):,.0f}"
    return f"above {in_k(lengths[-1])}"


def table(rows: list[dict[str, Any]]) -> str:
    parts = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        mine = [row for row in rows if row["shape"] == shape]
        for make in (_prefill_table, _decode_table, _train_table):
            if text := make(mine):
                head = f"{shape}, {mine[0]['layers']} layers, {mine[0]['device']}: "
                parts.append(head + text)
    return "\n\n".join(parts)


def _prefill_table(rows: list[dict[str, Any]]) -> str:
    rows = [row for row in rows if row["part"] == "prefill"]
    lengths = sorted({row["T"] for row in rows})
    times = _times(rows)
    cells = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = {row["T"]: row for row in rows if row["model"] == model}
        shown = []
        for length in lengths:
            row = own.get(length, {"not_run": ""})
            ratio = times.get("teacher", {}).get(length, 0) / row["ms"] if "ms" in row else 0
            beside = f" (x{ratio:.2g})" if ratio and model != "teacher" else ""
            shown.append(row.get("not_run") or f"{short(row['ms'])}{beside}")
        last = own[max(own)]
        cells.append(
            (
                model,
                *shown,
                "" if model == "teacher" else crossover(times.get("teacher", {}), times.get(model, {})),
                last.get("peak_mib", ""),
                short(last["kept_bytes"] / MIB) if last.get("kept_bytes") else "",
            )
        )
    head = ("model", *(f"T={in_k(n)}" for n in lengths), "faster from T =", "peak MiB", "kept MiB")
    return "prefill of one row, ms\n\n" + markdown(head, cells) if cells else ""


def _times(rows: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Model -> length -> milliseconds."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if "ms" in row:
            found.setdefault(row["model"], {})[row["T"]] = row["ms"]
    return found


def _decode_table(rows: list[dict[str, Any]]) -> str:
    rows = [row for row in rows if row["part"] == "decode"]
    batches = sorted({row["B"] for row in rows})
    steps = [row for row in rows if row.get("how") != "generate, static"]
    lengths = sorted({row["T"] for row in steps if row["model"] == "teacher"})
    cells = []
    for length in lengths:
        own = {row["B"]: row for row in steps if row["model"] == "teacher" and row["T"] == length}
        cells.append((f"teacher, T={in_k(length)}", *(_step_cell(own.get(b)) for b in batches)))
    for model in dict.fromkeys(row["model"] for row in rows if row["model"] != "teacher"):
        own = {row["B"]: row for row in steps if row["model"] == model}
        cells.append((f"{model}, any T", *(_step_cell(own.get(b)) for b in batches)))
        met = []
        for batch in batches:
            teacher = {
                r["T"]: r["ms"] for r in steps if r["model"] == "teacher" and r["B"] == batch and "ms" in r
            }
            ours = own.get(batch, {}).get("ms")
            met.append(crossover(teacher, dict.fromkeys(teacher, ours)) if ours and teacher else "")
        if lengths:
            cells.append((f"{model} is faster from T =", *met))
        for row in rows:
            if row["model"] == model and row.get("how") == "generate, static":
                cells.append(
                    (f"{model}, generate", *(_step_cell(row if row["B"] == b else None) for b in batches))
                )
    head = ("model", *(f"B={b}: ms, tokens/s, kept MiB" for b in batches))
    return "decode, a step\n\n" + markdown(head, cells) if cells else ""


def _step_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "ms" not in row:
        return row["not_run"]
    kept = f", {short(row['kept_bytes'] / MIB)}" if row.get("kept_bytes") else ""
    eager = " eager" if row.get("how") == "eager" else ""
    return f"{short(row['ms'])}{eager}, {short(row['tokens_per_second'])}{kept}"


def _train_table(rows: list[dict[str, Any]]) -> str:
    rows = [row for row in rows if row["part"] == "train"]
    cells = []
    for row in rows:
        told = (row.get("not_run", ""), "", "")
        if "ms" in row:
            share = f"{100 * row['of_forward']:.0f} %" if "of_forward" in row else ""
            told = (short(row["tokens_per_second"]), share, row.get("peak_mib", ""))
        cells.append((row["model"], row["stage"], f"{row['B']} x {in_k(row['T'])}", *told))
    head = ("model", "stage", "batch", "tokens/s", "of the teacher's forward", "peak MiB")
    return "training\n\n" + markdown(head, cells) if cells else ""


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Prefill over length, and decode steps over length at every batch size; a row of panels a shape."""
    if (plt := measure.pyplot()) is None:
        return
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, panels = plt.subplots(len(shapes), 2, figsize=(13, 5 * len(shapes)), squeeze=False)
    for (left, right), shape in zip(panels, shapes, strict=True):
        mine = [row for row in rows if row["shape"] == shape and "ms" in row]
        read = [row for row in mine if row["part"] == "prefill"]
        for model, times in _times(read).items():
            left.plot(
                list(times),
                [times[t] for t in times],
                "--" if model == "teacher" else "-",
                marker="o",
                label=model,
            )
        left.set(title=f"{shape}: prefill of one row", xlabel="T", ylabel="ms")
        steps = [row for row in mine if row["part"] == "decode" and row.get("how") != "generate, static"]
        lengths = sorted({row["T"] for row in steps if row["model"] == "teacher"})
        for model, batch in dict.fromkeys((row["model"], row["B"]) for row in steps):
            own = {row["T"]: row["ms"] for row in steps if (row["model"], row["B"]) == (model, batch)}
            if model != "teacher" and lengths:  # the same at every length
                own = dict.fromkeys(lengths, next(iter(own.values())))
            style = "--" if model == "teacher" else "-"
            right.plot(
                list(own), list(own.values()), style, marker="o", markersize=3, label=f"{model}, B={batch}"
            )
        right.set(title=f"{shape}: a decode step", xlabel="T", ylabel="ms")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.grid(alpha=0.3)
            if axes.has_data():
                axes.legend(fontsize=6)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    print(path)
