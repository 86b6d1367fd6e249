"""Several methods on one teacher, with the same data, tokens and seeds: a run each, and one report.

<output>/
  <method>/             a run, as of `linearize run`; what is done stays, so that the same command goes on
  results.json table.md every student beside the others
  report.html report.md the same as a page, where matplotlib is installed
"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import certificate, interrupt, report
from .evaluate import Results
from .evaluate.ablations import verdict
from .evaluate.bench import FILE, bench
from .evaluate.beside import beside
from .evaluate.speed import Planned, SpeedResults
from .files import sha256_of, write_json, write_text
from .modeling.errors import EvaluationError, LinearizeError, RecipeError
from .modeling.registry import METHODS
from .progress import Progress, Watch
from .provenance import origin
from .recipe import Recipe
from .run import RunResult, run

logger = logging.getLogger(__name__)

CONTROL = "window"
NOT_TIMED = "not-timed.json"
"""In a run: why bench refused its student, so that the same command does not load both models again to hear it."""
BENCH_SECONDS = 60.0
"""For timing one student beside the teacher; `linearize bench` takes as long as its grid needs."""


@dataclass(frozen=True)
class Comparison:
    """Where it is, every student beside the others, the runs by method, and the page (None without matplotlib)."""

    folder: Path
    results: Results
    runs: dict[str, RunResult]
    page: Path | None


def recipes_of(recipe: Recipe, methods: Sequence[str]) -> dict[str, Recipe]:
    """A recipe for each method. Raises RecipeError for a method that is unknown, converts nothing or is named twice."""
    possible = [name for name, method in METHODS.items() if method.mixer is not None]
    for place, names in (("--methods", methods), ("compare", list(recipe.compare))):
        for name in names:
            if name not in possible:
                raise RecipeError(
                    f"{place}: {name!r} is no method to convert to; choose from {', '.join(possible)}"
                )
    if len(set(methods)) < max(2, len(methods)):
        raise RecipeError(
            f"--methods: {','.join(methods) or 'nothing'} is no comparison; name two or more, each once"
        )
    folder = folder_of(recipe)
    made = {name: recipe.for_method(name).override([f"output={folder / name}"]) for name in methods}
    first = made[methods[0]]
    for name, other in made.items():
        for key in ("teacher", "data", "evaluate", "seed"):
            if getattr(other, key) != getattr(first, key):
                raise RecipeError(
                    f"compare.{name}.{key}: is what all methods share; say it outside of compare"
                )
    return made


def folder_of(recipe: Recipe) -> Path:
    """``output``, or ``runs/<teacher>-compare``."""
    if recipe.output is not None:
        return Path(recipe.output).expanduser()
    return Path("runs") / f"{Path(recipe.teacher.name).name.lower()}-compare"


@interrupt.catching()
def compare(
    recipe: Recipe,
    methods: Sequence[str],
    *,
    timed: bool = True,
    bench_seconds: float = BENCH_SECONDS,
    progress: Watch | None = None,
) -> Comparison:
    """Run the recipe with every method, or what is missing of it, and write one report.

    ``timed`` times one row of each student beside the teacher (:func:`linearize.evaluate.bench.bench`); what is
    predicted to end after ``bench_seconds`` is left out and says so, the longest texts first. A student that could not
    be timed is not tried again with the same seconds and certificate. A run whose integrity gates fail ends the
    comparison there; with ``evaluate.gates: false`` it goes on.
    """
    recipes = recipes_of(recipe, methods)
    folder = folder_of(recipe)
    runs: dict[str, RunResult] = {}
    for name, own in recipes.items():
        watch = _under(name, progress)
        if runs:
            _share_data(next(iter(runs.values())).folder, folder / name, own)
        try:
            runs[name] = run(own, progress=watch)
        except (LinearizeError, OSError):
            with contextlib.suppress(OSError):
                folder.rmdir()  # where the first run could not begin, and so left nothing in it
            raise
        if timed and not (runs[name].folder / FILE).exists():
            _time(runs[name], name, bench_seconds, watch)
    return _finish(folder, recipes, runs)


def _share_data(first: Path, folder: Path, recipe: Recipe) -> None:
    """A run that has not begun starts with the data of the first, which is the same."""
    if folder.exists() or not (first / "data").is_dir():
        return
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    shutil.copytree(first / "data", partial / "data", copy_function=_linked)
    partial.rename(folder)


def _linked(source: str, target: str) -> None:
    """A hard link, since data are never changed in place; a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _time(made: RunResult, name: str, seconds: float, progress: Watch | None) -> None:
    def told(planned: list[Planned]) -> None:
        logger.info("%s: bench, %s", name, report.estimate(planned))

    file, certified = made.folder / NOT_TIMED, made.checkpoint / certificate.CERTIFICATE
    terms = {"seconds": seconds, "certificate": sha256_of(certified) if certified.is_file() else None}
    if (reason := _refused_before(file, terms)) is not None:
        logger.warning("%s: not timed (%s), as before; remove %s to try again", made.folder, reason, file)
        return
    try:
        found = bench(made.checkpoint, batches=[1], seconds=seconds, told=told, progress=progress)
    except LinearizeError as error:
        logger.warning("%s: not timed (%s)", made.folder, error)
        write_json(file, {"reason": str(error), **terms})
        return
    file.unlink(missing_ok=True)
    certificate.certify_speed(
        made.checkpoint, found.results, Recipe.from_file(made.folder / "recipe.yaml").teacher
    )


def _refused_before(file: Path, terms: Mapping[str, Any]) -> str | None:
    """Why bench refused on the same terms; None where it did not, or that cannot be read."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return str(record["reason"]) if terms == {key: record[key] for key in terms} else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _finish(folder: Path, recipes: Mapping[str, Recipe], runs: dict[str, RunResult]) -> Comparison:
    results = beside({name: made.results for name, made in runs.items()})
    record: dict[str, Any] = {
        "origin": origin(),
        "recipes": {name: recipe.to_dict() for name, recipe in recipes.items()},
        "timings": {name: made.timings for name, made in runs.items()},
        "results": results.to_dict(),
    }
    if CONTROL in runs:
        record["evidence"] = {
            name: _evidence(name, recipes[name], results) for name in runs if name != CONTROL
        }
    speeds = {name: found for name, made in runs.items() if (found := _speed(made.folder)) is not None}
    if speeds:
        record["speed"] = {name: found.to_dict() for name, found in speeds.items()}
    told = [f"- {name}: {words}" for name, words in record.get("evidence", {}).items()]
    parts = [*told, "", report.markdown(results, buckets=False)]
    for name, found in speeds.items():
        tables = (replace(table, title=f"{name}: {table.title}") for table in report.speed_tables(found))
        parts += map(report.as_markdown, tables)
    write_text(folder / "table.md", "\n".join(parts))
    write_json(folder / "results.json", record)
    page = None
    if report.available():
        page, _ = report.write_report([made.folder for made in runs.values()], folder / "report.html")
    return Comparison(folder, results, runs, page)


def _speed(folder: Path) -> SpeedResults | None:
    """What was timed of a run's student; None where nothing was."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        return SpeedResults.from_dict(json.loads(file.read_text(encoding="utf-8"))["speed"])
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{file}: cannot be read ({error}); remove it, and it is timed again") from None


def _evidence(name: str, recipe: Recipe, results: Results) -> str:
    """Whether recall shows more than the window control's, in words."""
    window = getattr(recipe.method, "window", None) or 2 * getattr(recipe.method, "chunk", 0)
    told = verdict(results.recall, window, student=name, control=CONTROL, seed=results.seed)
    return (
        told if name != "salient" else told.replace("the linear branch", "the exact memory behind the window")
    )


def _under(name: str, progress: Watch | None) -> Callable[[Progress], None] | None:
    def watch(at: Progress) -> None:
        assert progress is not None
        progress(replace(at, phase=f"{name} {at.phase}"))

    return watch if progress is not None else None
