"""A run's folder: whose it is, what may go on in it, and how long its phases took."""

import contextlib
import copy
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from . import interrupt
from .data import Corpus
from .files import write_text
from .modeling.errors import LinearizeError, RecipeError
from .recipe import Recipe


def folder_of(recipe: Recipe) -> Path:
    """The run's folder: ``output``, or ``runs/<teacher>-<method>``."""
    if recipe.output is not None:
        return Path(recipe.output).expanduser()
    return Path("runs") / f"{Path(recipe.teacher.name).name.lower()}-{recipe.method_name}"


def refuse_other_run(folder: Path, recipe: Recipe) -> None:
    """A folder that is no run, or one of another recipe, is not gone on with; raises RecipeError."""
    left = {"recipe.yaml.tmp"}  # by a run that was killed before it had written a thing
    if not folder.exists() or (folder.is_dir() and {path.name for path in folder.iterdir()} <= left):
        return
    written = folder / "recipe.yaml"
    if not written.exists():
        raise RecipeError(f"output: {folder} exists and is not a run; choose another folder with output=...")
    if link := next((path for path in sorted(folder.rglob("*")) if path.is_symlink()), None):
        raise RecipeError(
            f"output: {link} is a link, and a run writes only below its own folder; remove the link, or choose another "
            "folder with output=..."
        )
    changed = Recipe.from_file(written).differences(recipe)
    if not (folder / "results.json").exists() or not recipe.evaluate.gates:
        # What was trained is the same; and a finished run with gates has all that is asked for without.
        changed = [key for key in changed if key != "evaluate.gates"]
    if changed:
        keys = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        raise RecipeError(
            f"output: {folder} holds a run of another recipe ({keys} differ); "
            "choose another folder with output=..., or remove this one"
        )


def refuse_other_data(folder: Path, corpus: Corpus, recipe: Recipe) -> None:
    """A student that was trained on other files than there are now may know what is held out now."""
    done = folder / "finetune" / "done.json"
    files = any(source.kind not in ("self", "recall") for source in recipe.data.sources)
    if recipe.data.held_out is not None or not files or not done.exists():
        return
    if json.loads(done.read_text(encoding="utf-8"))["settings"]["corpus"] != corpus.fingerprint:
        raise RecipeError(
            f"data.sources: {folder / 'student'} was trained on other data than they hold now; "
            "put the files back, or measure on other text: linearize eval STUDENT data.held_out=..."
        )


@contextlib.contextmanager
def claimed(folder: Path, recipe: Recipe) -> Iterator[None]:
    """The folder with its recipe; gone again when the data cannot be had and nothing had been done before."""
    fresh = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "recipe.yaml", recipe.to_yaml())
        yield
    except (LinearizeError, OSError):
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        raise


class Clock:
    """Adds up the seconds of each phase, over every call of a resumed run."""

    def __init__(self, folder: Path):
        self.folder, self.path, self.prefix = folder, folder / "timings.json", ""
        self.seconds: dict[str, float] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def under(self, name: str) -> "Clock":
        """The same clock, for phases whose names begin with ``name``."""
        other = copy.copy(self)
        other.prefix = f"{name} "
        return other

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started, phase = time.perf_counter(), self.prefix + phase
        interrupt.stop_if_asked(f"{phase}: not begun; all before it is saved in {self.folder}")
        try:
            yield
        finally:
            self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.perf_counter() - started, 3)
            if (self.folder / "recipe.yaml").exists():
                write_text(self.path, json.dumps(self.seconds, indent=1) + "\n")
