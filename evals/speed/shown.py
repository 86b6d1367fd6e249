"""What the kernel benchmark's rows are shown as: tables, and a plot of times over lengths."""

import math
from pathlib import Path
from typing import Any

import measure
from measure import in_k, markdown, short


def sweep_table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds of every candidate, and the best of each kernel as a row for launches.py."""
    rows = [row for row in rows if "kernel" in row]
    cells, best = [], []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        mine = [row for row in rows if row["kernel"] == kernel]
        shapes = list(dict.fromkeys((row["B"], row["T"]) for row in mine))
        least = {
            s: min((r["ms"] for r in mine if (r["B"], r["T"]) == s and "ms" in r), default=math.nan)
            for s in shapes
        }
        loss: dict[int, float] = {}
        for number in dict.fromkeys(row["number"] for row in mine):
            own = [row for row in mine if row["number"] == number]
            if all("ms" in row for row in own):
                ratios = [row["ms"] / least[row["B"], row["T"]] for row in own]
                loss[number] = math.prod(ratios) ** (1 / len(ratios))
            told = [f"B={r['B']} T={in_k(r['T'])}: {r.get('ms') or r['not_run']}" for r in own]
            launch = own[0]["launch"]
            settings = ", ".join(f"{name} {value}" for name, value in launch["blocks"].items())
            settings = f"{settings}, warps {launch['warps']}, stages {launch['stages']}"
            mark = f"x{loss[number]:.3f}" if number in loss else "-"
            cells.append((kernel, number, settings, "; ".join(told), mark))
        if loss:
            launch = next(row["launch"] for row in mine if row["number"] == min(loss, key=loss.__getitem__))
            values = f"{launch['blocks']}, {launch['warps']}, {launch['stages']}, {launch['shared']}"
            best.append(f'    "{kernel}": [Launch({values})],')
    head = ("kernel", "candidate", "settings", "ms", "against the best")
    return "\n".join([markdown(head, cells), "", "The best of each:", *best])


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds for 32K tokens (microseconds of a decode step), a column a length; how many times as long cuDNN's
    softmax takes; the peak memory of the longest. ``!`` marks what misses its target."""
    timed = [row for row in rows if row.get("kind") == "time" and "name" in row]
    lengths = sorted({row["T"] for row in timed})
    parts = []
    for decode in (False, True):
        mine = [row for row in timed if (row["pass"] == "decode") == decode]
        if not mine:
            continue
        cells = []
        for group, name in dict.fromkeys((row["group"], row["name"]) for row in mine):
            own = {row["T"]: row for row in mine if (row["group"], row["name"]) == (group, name)}
            last = own[max(own)]
            target = next((row["target_ms"] for row in own.values() if "target_ms" in row), None)
            shown = [_cell(own.get(length), decode) for length in lengths]
            at = last.get("softmax_over_this_at", {})
            if len(own) == 1:  # one length stands for all
                shown = [
                    cell or _ratio(at.get(n, at.get(str(n)))) for cell, n in zip(shown, lengths, strict=True)
                ]
            target = "" if target is None else short(target * 1000 if decode else target)
            cells.append((group, name, *shown, target, last.get("peak_mib", "")))
        unit = "microseconds a step and layer" if decode else "ms for 32K tokens and one layer"
        head = ("group", f"{unit}", *map(in_k, lengths), "target", "peak MiB, longest")
        parts.append(markdown(head, cells))
    cold = [row for row in rows if row.get("kind") == "cold start" and row["group"] == "all"]
    if cold:
        head = ("family", "all its cases compiled, beside the other families, s")
        parts.append(markdown(head, [(r["name"], r["seconds"]) for r in cold]))
    return "\n\n".join(parts)


def _cell(row: dict[str, Any] | None, decode: bool) -> str:
    if row is None:
        return ""
    if "not_run" in row:
        return "not run: " + row["not_run"]
    value = row["ms"] * 1000 if decode else row["ms_32k"]
    beside = _ratio(row.get("softmax_over_this"))
    miss = "" if row.get("met", True) else " !"
    return f"{short(value)} {beside}".strip() + miss


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"(x{ratio:.2g})" if ratio < 10 else f"(x{ratio:.0f})"


PANELS = {"forward": "forward", "forward+backward": "forward and backward", "decode": "one decode step"}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel a pass: time over length, in doublings. Others' lines are dashed and black; a decode step of ours, which
    takes the same time at every length, is a level line."""
    if (plt := measure.pyplot()) is None:
        return
    timed = [row for row in rows if row.get("kind") == "time" and "ms" in row]
    kinds = [kind for kind in PANELS if any(row["pass"] == kind for row in timed)]
    figure, panels = plt.subplots(1, len(kinds), figsize=(8 * len(kinds), 8), squeeze=False)
    colours = plt.colormaps["tab20"].colors
    for axes, kind in zip(panels[0], kinds, strict=True):
        mine = [row for row in timed if row["pass"] == kind]
        lengths = sorted({row["T"] for row in mine})
        ours, others = 0, 0
        for name in dict.fromkeys(row["name"] for row in mine):
            own = sorted((row for row in mine if row["name"] == name), key=lambda row: row["T"])
            at = [row["T"] for row in own]
            values = [row["ms"] * 1000 if kind == "decode" else row["ms_32k"] for row in own]
            if own[0]["peer"]:
                marker, others = "os^vDx"[others % 6], others + 1
                axes.plot(at, values, "--", color="black", marker=marker, markersize=5, label=name)
                continue
            if len(own) == 1:
                at, values = [lengths[0], lengths[-1]], values * 2
            width = 2.2 if kind != "decode" or "B=32" in name else 1.2
            axes.plot(at, values, "-", color=colours[ours % 20], linewidth=width, label=name)
            ours += 1
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(lengths, [in_k(length) for length in lengths])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_title(f"{PANELS[kind]}, {mine[0]['device']}")
        axes.set_xlabel("tokens of context" if kind == "decode" else "tokens of a sequence")
        unit = "microseconds, one layer" if kind == "decode" else "milliseconds for 32K tokens, one layer"
        axes.set_ylabel(unit)
        axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    print(path)
