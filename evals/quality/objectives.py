"""Salient's score objectives at equal tokens and bytes, without LoRA and with it; one command, which goes on where it
stopped.

    python evals/quality/objectives.py --teacher DIR --data DIR --out evals/quality/objectives.jsonl --jobs 4 \\
        > evals/quality/objectives.md

The folders are those of run.py. Each student of objectives.yaml is measured after transfer alone; the same transfer is
then fine-tuned and measured again. A line is appended after each measurement; the same command later makes what is
missing. Words `key=value` change every student.
"""

import argparse
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import plan
import run as quality
import torch

from linearize.evaluate import Results
from linearize.evaluate.likelihood import TEACHER

HERE = Path(__file__).parent
STAGES = {"without LoRA": ["finetune.tokens=0"], "with LoRA": []}
"""What is measured of each student, in this order, and how its recipe differs."""


def main(words: list[str] | None = None) -> None:
    options = arguments(words)
    asked = options.student or list(quality.students(options.students))
    for name in asked:
        quality.recipe_of(name, options)  # a word that is wrong is told before anything runs
    if options.jobs == 1:
        for name in asked:
            make(name, options)
    else:
        fresh = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.jobs, mp_context=fresh, max_tasks_per_child=1) as pool:
            for running in [pool.submit(make, name, options) for name in asked]:
                running.result()
    print(markdown(plan.read(options.out)))


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, required=True, help="folder of the teacher")
    parser.add_argument(
        "--data", type=Path, required=True, help=f"folder with {quality.TRAIN} and {quality.EVAL}"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended")
    parser.add_argument("--student", action="append", help="may be repeated; default: every one")
    parser.add_argument("--students", type=Path, default=HERE / "objectives.yaml")
    parser.add_argument(
        "--jobs", type=int, default=1, help="students at a time, each in a process of its own"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/objectives"), help="where the runs are kept")
    parser.add_argument("--commit", help="commit of the code, where there is no git")
    parser.add_argument("--tf32", action="store_true", help="let matrix products of fp32 use TF32")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    return parser.parse_intermixed_args(words)


def make(name: str, options: argparse.Namespace) -> None:
    """Measure one student at both stages, and append the lines that are missing."""
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    done = {(line["student"], line["stage"]) for line in plan.read(options.out)}
    before: Path | None = None
    for stage, changes in STAGES.items():
        fields = {"work": options.work / stage.replace(" ", "-"), "overrides": [*options.overrides, *changes]}
        at = argparse.Namespace(**{**vars(options), **fields})
        if (name, stage) not in done:
            take_transfer(name, at, before)
            plan.append(options.out, {"stage": stage, **quality.measure(name, at)})
        before = at.work / name


def take_transfer(name: str, options: argparse.Namespace, before: Path | None) -> None:
    """A run that has not begun starts with the transfer of an earlier stage, and its data."""
    folder = options.work / name
    if before is None or folder.exists() or not (before / "transfer" / "done.json").exists():
        return
    half = folder.with_name(f"{name}.half")
    shutil.rmtree(half, ignore_errors=True)
    for part in ("transfer", "data"):
        shutil.copytree(before / part, half / part)
    (half / "recipe.yaml").write_text(
        quality.recipe_of(name, options, quality.folders(name, options)).to_yaml()
    )
    half.rename(folder)


def markdown(lines: list[dict[str, Any]]) -> str:
    """One table: the newest line of every student and stage, and the teacher."""
    newest = {(line["student"], line["stage"]): line for line in lines}
    if not newest:
        return ""
    found = {key: Results.from_dict(line["results"]) for key, line in newest.items()}
    some = next(iter(found.values()))
    lengths = sorted(some.likelihood)
    cells = list(dict.fromkeys((cell.task, cell.length) for cell in some.recall))
    rows = [row("teacher", "", TEACHER, some, lengths, cells)]
    order = sorted(found, key=lambda key: (key[0], list(STAGES).index(key[1])))
    rows += [row(*key, "student", found[key], lengths, cells) for key in order]
    head = ["objective", "stage", f"memory at {quality.table.LENGTH:,}", *(f"KL {n:,}" for n in lengths)]
    return plan.table([*head, *(f"{task} {n:,}" for task, n in cells)], rows)


def row(
    name: str, stage: str, model: str, results: Results, lengths: list[int], cells: list[tuple[str, int]]
) -> list[str]:
    held, whole = (results.memory[m].bytes_at(quality.table.LENGTH) for m in (model, TEACHER))
    told = [name, stage, f"{100 * held / whole:.2f} %"]
    for n in lengths:
        fidelity = results.likelihood[n][model]
        low, high = fidelity.intervals["kl"]
        told.append(f"{fidelity.kl:.4f} [{low:.4f}, {high:.4f}]" if model != TEACHER else "0")
    for cell in (results.cell(model, *where) for where in cells):
        told.append(f"{100 * cell.share:.0f} % [{100 * cell.low:.0f}, {100 * cell.high:.0f}]")
    return told


if __name__ == "__main__":
    main()
