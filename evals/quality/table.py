"""Results of run.py beside the marks: a Markdown table, what falls short of a mark, every student's report, and a plot.

    python evals/quality/table.py evals/quality/results.jsonl --plot evals/quality/kl.svg > evals/quality/table.md

The plot needs matplotlib.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from linearize.evaluate import Results
from linearize.evaluate.likelihood import TEACHER
from linearize.evaluate.statistics import wilson
from linearize.report import markdown as report

HERE = Path(__file__).parent
LENGTH = 4096
"""Tokens at which memory is compared."""
TOLERANCE = 0.01
"""How much worse than its mark a perplexity or KL may be before it is named."""


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="JSON lines of run.py")
    parser.add_argument("--marks", type=Path, default=HERE / "marks.json")
    parser.add_argument("--plot", type=Path, help="KL against memory, as SVG")
    options = parser.parse_args(words)
    lines = newest(options.results)
    print(markdown(lines, json.loads(options.marks.read_text())))
    if options.plot:
        plot(lines, options.plot)


def newest(file: Path, names: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """The last line of every student in a file, in the order of ``names`` or of the file."""
    found = {line["student"]: line for line in map(json.loads, file.read_text().splitlines())}
    return [found[name] for name in (found if names is None else names)]


def markdown(lines: list[dict[str, Any]], marks: dict[str, Any]) -> str:
    parts = [beside_marks(lines, marks), short_of_marks(lines, marks)]
    parts += [f"## {line['student']}\n\n{report(Results.from_dict(line['results']))}" for line in lines]
    return "\n\n".join(parts)


def beside_marks(lines: list[dict[str, Any]], marks: dict[str, Any]) -> str:
    """A Markdown table: what was measured, each row followed by its mark."""
    measured = {TEACHER: figures(lines[0], TEACHER)} if lines else {}
    measured |= {line["student"]: figures(line, student_of(line)) for line in lines}
    lengths = sorted({length for row in measured.values() for length in row["ppl"]}, key=int)
    asked: dict[str, list[str]] = {}
    for row in measured.values():
        for task, cells in row["recall"].items():
            asked[task] = sorted({*asked.get(task, []), *cells}, key=int)
    header = [
        "student",
        f"memory at {LENGTH:,}",
        *(f"{x} {int(n):,}" for n in lengths for x in ("PPL", "KL", "top-1")),
    ]
    header += [f"{task} {' / '.join(f'{int(n):,}' for n in cells)}, %" for task, cells in asked.items()]
    rows = [header, ["---"] * len(header)]
    for name, row in measured.items():
        for label, source in ((name, row), (f"{name}, mark", marks["rows"].get(name))):
            if source is None:
                continue
            cells = [label, f"{100 * source['memory']:.1f} %" if "memory" in source else "-"]
            cells += [
                form.format(source[key][n]) if n in source[key] else "-"
                for n in lengths
                for key, form in (("ppl", "{:.2f}"), ("kl", "{:.4f}"), ("top1", "{:.3f}"))
            ]
            for task, columns in asked.items():
                shares = source["recall"].get(task, {})
                cells.append(" / ".join(f"{100 * shares[n]:.0f}" if n in shares else "-" for n in columns))
            rows.append(cells)
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"{table}\n\nMemory: share of the teacher's KV cache. Marks: {marks['source']}."


def short_of_marks(lines: list[dict[str, Any]], marks: dict[str, Any]) -> str:
    """Every figure that is worse than its mark: by more than a hundredth, or with the mark above its interval."""
    found = []
    for line in lines:
        mark, row = marks["rows"].get(line["student"]), figures(line, student_of(line))
        if mark is None:
            continue
        for key, name in (("ppl", "perplexity"), ("kl", "KL")):
            for n, value in mark[key].items():
                if (
                    n in row[key]
                    and row[key][n] > value * (1 + TOLERANCE)
                    and n not in marks["other_windows"]
                ):
                    found.append(
                        f"{line['student']}: {name} at {int(n):,} is {row[key][n]:.4g}, "
                        f"{100 * (row[key][n] / value - 1):.1f} % above {value:.4g}"
                    )
        for cell in line["results"]["recall"]:
            value = mark["recall"].get(cell["task"], {}).get(str(cell["length"]))
            if cell["model"] != TEACHER and value is not None and value > cell["high"]:
                ours = share(cell["correct"] / cell["samples"], cell["low"], cell["high"])
                theirs = share(value, *wilson(round(value * marks["prompts"]), marks["prompts"]))
                found.append(
                    f"{line['student']}: {cell['task']} at {cell['length']:,} is {ours}, the mark {theirs}"
                )
    told = "\n".join(f"- {item}" for item in found) or "Nothing."
    return f"Worse than its mark by more than {100 * TOLERANCE:.0f} %, or with the mark above its interval:\n\n{told}"


def share(value: float, low: float, high: float) -> str:
    return f"{100 * value:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def figures(line: dict[str, Any], model: str) -> dict[str, Any]:
    """The figures of one model in the layout of marks.json, and its memory as a share of the teacher's."""
    results = line["results"]
    by_length = {length: by_model[model] for length, by_model in results["likelihood"].items()}
    recall: dict[str, dict[str, float]] = {}
    for cell in results["recall"]:
        if cell["model"] == model:
            recall.setdefault(cell["task"], {})[str(cell["length"])] = cell["correct"] / cell["samples"]
    held = Results.from_dict(results).memory
    return {
        **{key: {n: row[key] for n, row in by_length.items()} for key in ("ppl", "kl", "top1")},
        "recall": recall,
        "memory": held[model].bytes_at(LENGTH) / held[TEACHER].bytes_at(LENGTH),
    }


def student_of(line: dict[str, Any]) -> str:
    return next(name for name in line["results"]["models"] if name != TEACHER)


def plot(lines: list[dict[str, Any]], file: Path) -> None:
    """KL at the training length and beyond, against memory."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "linearize"  # the same file for the same figures
    import matplotlib.pyplot as plt

    rows = {line["student"]: figures(line, student_of(line)) for line in lines}
    lengths = sorted({int(n) for row in rows.values() for n in row["kl"]})
    figure, axes = plt.subplots(1, len(lengths), figsize=(3.4 * len(lengths) + 2.4, 3.8), sharey=True)
    for axis, length in zip(axes, lengths, strict=True):
        for i, (name, row) in enumerate(rows.items()):
            looks = {"color": plt.get_cmap("tab10")(i % 10), "marker": "osD^v"[i // 5 % 5], "linestyle": ""}
            axis.plot(100 * row["memory"], row["kl"][str(length)], label=name, alpha=0.85, **looks)
        axis.set(xscale="log", yscale="log", title=f"KL at {length:,} tokens")
        axis.set_xlabel(f"memory at {LENGTH:,} tokens, % of KV cache")
        axis.set_xticks(ticks := [1, 2, 5, 10, 20, 40], [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("nats a token, to the teacher")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="center right", fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1 - 2.0 / figure.get_figwidth(), 1))
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
