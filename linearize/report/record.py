"""What a report is made of: the folders of runs, read as they are, with words for what is not in them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..evaluate import TEACHER, Continuations, Results
from ..evaluate.speed import SpeedResults
from ..files import sha256_of
from ..modeling.errors import EvaluationError
from ..tracking import read

CORE = ("source", "models", "seed", "likelihood", "recall", "memory", "windows")
STAGES = ("transfer", "finetune")
HASHED = ("results.json", "recipe.yaml", "student/config.json", "student/certificate.json")


@dataclass(frozen=True)
class Stage:
    """The lines of one stage's metrics, and the layers that `relative_error` is of, in order."""

    name: str
    model: str
    lines: list[dict[str, Any]]
    layers: list[int]


@dataclass(frozen=True)
class Run:
    """One run: its name on the page, `results.json` as it is, its training, and hashes of its files."""

    name: str
    folder: Path
    record: Mapping[str, Any]
    results: Results
    stages: list[Stage] = field(default_factory=list)
    speed: SpeedResults | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    seen_alone: bool = True
    """Whether no other run is on the page."""
    control: Results | None = None
    """Of the run on the same page whose student is a window alone: everyone's control, where text and prompts agree."""

    def label(self, model: str) -> str:
        """A model's name on the page: with its run's, where there are several."""
        if self.seen_alone or not self.name:
            return model
        return self.name if model == "student" else f"{self.name}: {model}"

    def section(self, name: str) -> Any:
        """An optional part of the results, None where it was not run."""
        return self.record["results"].get(name) or None

    @property
    def continuation(self) -> Continuations | None:
        """What the models wrote on freely, None where it was not run."""
        found = self.section("continuation")
        return Continuations.from_dict(found) if found else None

    @property
    def recipe(self) -> Mapping[str, Any]:
        return self.record.get("recipe") or {}

    @property
    def students(self) -> list[str]:
        return [name for name in self.results.models if name != TEACHER]

    @property
    def converted(self) -> list[int]:
        """Layers of the first student that run a mixer."""
        layers = self.results.memory[self.students[0]].layers if self.students else []
        return [index for index, layer in enumerate(layers) if layer.tokens == 0]

    def depth(self, cell: Mapping[str, Any]) -> str:
        """Of a cell of the recall suite, in percent; empty where it has none. Some records count to 1, some to 100."""
        if cell.get("depth") is None:
            return ""
        depths = [x["depth"] for x in self.section("suite")["cells"] if x.get("depth") is not None]
        return f"{cell['depth'] * (100 if max(depths) <= 1 else 1):.0f} %"


def open_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Every run read; raises EvaluationError for a folder that holds none, or a damaged one."""
    if not folders:
        raise EvaluationError("report: no run is named; give the folder of a finished run")
    paths = [Path(folder) for folder in folders]
    names = _names(paths)
    runs = [_open(path, name, alone=len(paths) == 1) for path, name in zip(paths, names, strict=True)]
    windows = [run for run in runs if (run.recipe.get("method") or {}).get("name") == "window"]
    if not windows:
        return runs
    lent = windows[0]
    return [
        replace(run, control=lent.results) if run is not lent and _measured(run) == _measured(lent) else run
        for run in runs
    ]


def _measured(run: Run) -> tuple[Any, ...]:
    """What a run was measured on."""
    asked = {(cell.task, cell.length): cell.digest for cell in run.results.recall}
    return run.results.source, run.results.windows, asked


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' own names, with their parents' where two are the same."""
    resolved = [path.resolve() for path in paths]
    names = [path.name for path in resolved]
    return [
        name if names.count(name) == 1 else f"{path.parent.name}/{name}"
        for path, name in zip(resolved, names, strict=True)
    ]


def _open(folder: Path, name: str, alone: bool) -> Run:
    file = folder / "results.json"
    if not file.is_file():
        raise EvaluationError(f"{folder}: has no results.json; give the folder of a finished run")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        results = Results.from_dict({key: record["results"][key] for key in CORE})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"{file}: cannot be read ({type(error).__name__}: {error}); it is no results file of this version"
        ) from None
    hashes = {key: sha256_of(folder / key) for key in HASHED if (folder / key).is_file()}
    stages = list(_stages(folder, results))
    return Run(name, folder, record, results, stages, _speed(folder, record), hashes, alone)


def _speed(folder: Path, record: Mapping[str, Any]) -> SpeedResults | None:
    """Of `bench`, which leaves a file beside the results."""
    tree, file = record["results"].get("speed"), folder / "speed.json"
    try:
        if tree is None and file.is_file():
            tree = json.loads(file.read_text(encoding="utf-8"))["speed"]
        return SpeedResults.from_dict(tree) if tree else None
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{file}: cannot be read ({type(error).__name__}: {error}); run `linearize bench` again"
        ) from None


def _stages(folder: Path, results: Results) -> Iterator[Stage]:
    homes = {"student": folder} | {
        f"{path.name} control": path for path in sorted((folder / "control").glob("*")) if path.is_dir()
    }
    for model, home in homes.items():
        if model not in results.models and model != "student":
            continue
        for stage in STAGES:
            lines = [line for line in read(home / stage / "metrics.jsonl") if isinstance(line, dict)]
            if lines:
                yield Stage(stage, model, lines, _layers(home / stage, lines))


def _layers(folder: Path, lines: Sequence[Mapping[str, Any]]) -> list[int]:
    """The converted layers by the stage's own record; 0, 1, ... where it has none."""
    count = len(lines[0].get("relative_error") or [])
    try:
        settings = json.loads((folder / "done.json").read_text(encoding="utf-8"))["settings"]
        found = [int(i) for i, layer in settings["layers"].items() if layer["method"]["name"] != "softmax"]
    except (OSError, ValueError, KeyError, TypeError):
        found = []
    return found if len(found) == count else list(range(count))
