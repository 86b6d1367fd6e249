"""Students of a teacher under the protocol of the marks: one JSON line each, and a table beside the marks.

    python evals/quality/run.py --teacher DIR --data DIR --out evals/quality/results.jsonl --jobs 4

The data folder holds books-train.txt.xz and books-eval.txt.xz. The students of students.yaml are made through
`linearize.run`, all of them or those named by `--student`; words `key=value` change every one. Fidelity is measured on
the first windows of T + 1 tokens of the evaluation text, tokenised whole. A line is appended as soon as its student is
measured.
"""

import argparse
import hashlib
import json
import lzma
import multiprocessing
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import table
import torch

from linearize.evaluate import Results, digest_of_windows
from linearize.modeling.errors import LinearizeError
from linearize.overrides import merged, read_yaml
from linearize.progress import Progress
from linearize.recipe import Recipe
from linearize.run import run
from linearize.teacher import load_teacher

HERE = Path(__file__).parent
TRAIN, EVAL = "books-train.txt.xz", "books-eval.txt.xz"


def main(words: list[str] | None = None) -> None:
    options = arguments(words)
    asked = options.student or list(students(options.students))
    for name in asked:
        recipe_of(name, options)  # a word that is wrong is told before anything runs
    if options.jobs == 1:
        for name in asked:
            append(name, options)
    else:
        fresh = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.jobs, mp_context=fresh, max_tasks_per_child=1) as pool:
            for running in [pool.submit(append, name, options) for name in asked]:
                running.result()
    print(table.markdown(table.newest(options.out, asked), json.loads(options.marks.read_text())))


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, required=True, help="folder of the teacher")
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {TRAIN} and {EVAL}")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended")
    parser.add_argument("--student", action="append", help="may be repeated; default: every one")
    parser.add_argument("--students", type=Path, default=HERE / "students.yaml")
    parser.add_argument(
        "--jobs", type=int, default=1, help="students at a time, each in a process of its own"
    )
    parser.add_argument("--marks", type=Path, default=HERE / "marks.json")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="where the runs are kept")
    parser.add_argument("--commit", help="commit of the code, where there is no git")
    parser.add_argument("--tf32", action="store_true", help="let matrix products of fp32 use TF32")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    return parser.parse_intermixed_args(words)


def students(file: Path) -> dict[str, dict[str, Any]]:
    """Name -> recipe, the shared protocol with what each student says differently."""
    tree = read_yaml(file)
    return {name: merged(tree["protocol"], changes) for name, changes in tree["students"].items()}


def recipe_of(name: str, options: argparse.Namespace, folders: Iterable[str] = ()) -> Recipe:
    found = students(options.students)
    if name not in found:
        raise LinearizeError(f"--student {name}: not in {options.students}; choose from {', '.join(found)}")
    return Recipe.from_dict(found[name], place=f"{options.students}: {name}").override(
        [*options.overrides, *folders]
    )


def folders(name: str, options: argparse.Namespace) -> list[str]:
    """The words that say where things lie on this machine."""
    return [
        f"teacher.name={options.teacher}",
        f"data.sources.0.path={options.data / TRAIN}",
        f"data.held_out.0.path={options.data / EVAL}",
        f"output={options.work / name}",
    ]


def append(name: str, options: argparse.Namespace) -> None:
    """Make one student and append its line."""
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    line = measure(name, options)
    with options.out.open("a") as out:
        out.write(json.dumps(line) + "\n")


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Make one student; its line."""
    recipe = recipe_of(name, options, folders(name, options))
    started = time.perf_counter()
    done = run(recipe, progress=Reporter(name))
    seconds = time.perf_counter() - started
    check_windows(done.results, recipe, options.data / EVAL)
    text = recipe_of(name, options).to_yaml()  # without the folders of one machine
    return {
        "student": name,
        "method": recipe.method.name,
        "recipe": text,
        "recipe_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "teacher": options.teacher.name,
        "sha256": sha256_of([*options.teacher.iterdir(), options.data / TRAIN, options.data / EVAL]),
        "tokens": {"transfer": recipe.transfer.tokens, "finetune": recipe.finetune.tokens},
        "seconds": {
            "all": round(seconds, 1),
            **{key: round(value, 1) for key, value in done.timings.items()},
        },
        "commit": options.commit or commit(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or "cpu",
        "tf32": options.tf32,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "tokenizers")},
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "results": done.results.to_dict(),
    }


def check_windows(results: Results, recipe: Recipe, text: Path) -> None:
    """Refuse results whose windows are not the first ones of the text, tokenised whole."""
    _, tokenizer = load_teacher(recipe.teacher)
    ids = torch.tensor(tokenizer(lzma.decompress(text.read_bytes()).decode(), verbose=False).input_ids)
    for length, digest in results.windows.items():
        count = min(recipe.evaluate.sequences, len(ids) // (length + 1))
        windows = ids[: count * (length + 1)].view(count, length + 1)
        if digest_of_windows(windows) != digest:
            raise LinearizeError(
                f"{text}: windows of {length} are not the text's first {count}, tokenised whole"
            )


def sha256_of(files: Iterable[Path]) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files) if file.is_file()
    }


def commit() -> str:
    """The commit of the code, with a plus sign when the tree differs from it."""
    git = ["git", "-C", str(HERE)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed.stdout.strip() else "")


class Reporter:
    """Progress on stderr, a line every few seconds and at the end of each phase."""

    def __init__(self, name: str, every: float = 10.0):
        self.name, self.every, self.last, self.start = name, every, 0.0, time.perf_counter()

    def __call__(self, at: Progress) -> None:
        now = time.perf_counter()
        if now - self.last < self.every and at.done < at.total:
            return
        self.last = now
        readings = " ".join(
            f"{key} {value:.4g}" for key, value in at.metrics.items() if isinstance(value, float)
        )
        print(
            f"{now - self.start:6.1f} s {self.name} {at.phase} {at.done:,}/{at.total:,} {at.unit} {readings}",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    main()
