"""What training tells while it runs: ``metrics.jsonl``, and trackers with pictures where the recipe names some.

`metrics.jsonl`: one JSON object a training step, readable while the run goes on, and cut back on resume.

Keys of a line: `step` (1 is the first), `tokens` (seen so far), `loss`, `lr`, `grad_norm` (before clipping),
`tokens_per_second` (of this process group), `seconds` (training time so far), and what the stage adds
(`relative_error`, one number a layer).
"""

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from .modeling.errors import RecipeError, TrainingError
from .overrides import flatten
from .progress import Progress, Watch

PROJECT = "linearize"


class MetricsWriter:
    """Appends lines to `path`, after dropping those beyond `step`: steps that a killed run had not saved."""

    def __init__(self, path: Path, *, step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read(path) if line["step"] <= step]
        beside = path.with_name(path.name + ".tmp")
        beside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(beside, path)
        self._file = path.open("a", buffering=1)  # by line: `tail -f` shows every step

    def write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a metrics file; a torn last line (the process died while writing) is left out."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is missing, before anything is done; looks for packages and imports none."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise RecipeError(f"tracking: {name} is not installed; pip install {name}")


@contextmanager
def tracked(
    names: Sequence[str], folder: Path, recipe: Mapping[str, Any], progress: Watch | None
) -> Iterator[Watch | None]:
    """``progress`` that also tells the trackers every reading of every training step, as ``transfer/loss`` and so on.

    They are accelerate's; TensorBoard's files go to ``folder/tracking``. They start with the first reading.
    """
    if not names:
        yield progress
        return
    trackers: dict[str, Any] = {}

    def watch(at: Progress) -> None:
        if progress is not None:
            progress(at)
        if not at.metrics:
            return
        if not trackers:
            with redirect_stdout(sys.stderr):  # which they would talk on
                trackers.update({name: _start(name, folder, recipe) for name in names})
        values = {f"{at.phase}/{key}": value for key, value in at.metrics.items()}
        for name, tracker in trackers.items():
            # The others count by themselves, and refuse to go back: the second stage begins at 0 again.
            step = {"step": at.done} if name == "tensorboard" else {}
            tracker.log(values | {f"{at.phase}/tokens": at.done}, **step)

    try:
        yield watch
    finally:
        with redirect_stdout(sys.stderr):
            for name, tracker in trackers.items():
                _finish(name, tracker)


def _finish(name: str, tracker: Any) -> None:
    if (
        name == "trackio"
    ):  # accelerate's leaves the run open to it, and then it says goodbye when the process ends
        importlib.import_module("trackio").finish()
    else:
        tracker.finish()


def _start(name: str, folder: Path, recipe: Mapping[str, Any]) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    where = folder.resolve()
    again = hashlib.sha256(str(where).encode()).hexdigest()[:16]  # a resumed run goes on in the same curve
    how: dict[str, dict[str, Any]] = {
        "tensorboard": {"run_name": "tracking", "logging_dir": str(where)},
        "wandb": {"run_name": PROJECT, "name": where.name, "dir": str(where), "id": again, "resume": "allow"},
        "trackio": {"run_name": PROJECT, "name": where.name, "resume": "allow"},
    }
    PartialState()  # asked for by two of them; training has made it already
    try:
        tracker = LOGGER_TYPE_TO_CLASS[name](**how[name])
        tracker.start()
        if name != "tensorboard":  # which would write them as a run of their own
            tracker.store_init_configuration(flatten(recipe))
    except Exception as error:  # not logged in, no network, no place to write
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise TrainingError(
            f"tracking: {name} cannot start ({line}); mend it, or take it out with tracking=none"
        ) from None
    return tracker
