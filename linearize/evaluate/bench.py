"""`linearize bench`: a saved student and its teacher loaded alike, planned, timed, and the file that is left."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint
from ..files import sha256_of, write_json
from ..modeling.errors import EvaluationError, RecipeError
from ..progress import Watch
from ..provenance import origin
from ..recipe import Recipe, Teacher
from ..teacher import load_teacher
from . import largest, speed
from .energy import LEAD, SPAN
from .likelihood import TEACHER
from .speed import Planned, SpeedResults
from .vocabulary import refuse_other_vocabulary

FILE = "speed.json"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Benched:
    """What was measured, and the file that says so; None where there was no place for one."""

    results: SpeedResults
    file: Path | None
    record: dict[str, Any]


def bench(
    student: str | Path,
    *,
    teacher: str | None = None,
    lengths: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
    parts: Sequence[str] = speed.PARTS,
    device: str = "auto",
    dtype: str = "auto",
    output: str | Path | None = None,
    force: bool = False,
    seconds: float | None = None,
    energy: bool = False,
    largest_batch: int | None = None,
    seed: int = 0,
    told: Callable[[list[Planned]], None] | None = None,
    progress: Watch | None = None,
) -> Benched:
    """Time a saved student beside its teacher, which is the recipe's unless one is named.

    `told` hears the plan before the first timed call. The record goes to `output`, or beside `results.json` of the run
    that the student is of. `energy` asks for joules of a token too, `largest_batch` for matched memory at so many
    tokens (:mod:`.largest`). Raises EvaluationError where integrity gates of that run failed, unless `force`, and for
    `largest_batch` without a GPU.
    """
    student = Path(student)
    run = student.parent if (student.parent / "results.json").is_file() else None
    file = Path(output) if output is not None else run / FILE if run else None
    _refuse_failed_gates(student, run, force)
    place = _device(device)
    if largest_batch is not None and place == "cpu":
        raise EvaluationError(
            "largest-batch: needs a GPU; where a CPU's memory ends, the system ends programs"
        )
    if dtype not in DTYPES:
        raise EvaluationError(f"dtype: {dtype!r} is unknown; choose from {', '.join(DTYPES)}")
    spec = _teacher(student, teacher).model_copy(update={"dtype": dtype})
    base, tokenizer = load_teacher(spec, place)
    model, own_tokenizer = checkpoint.load(student, dtype=base.dtype, device=place)
    if own_tokenizer is not None:
        refuse_other_vocabulary(own_tokenizer, tokenizer, str(student))
    _refuse_few_rows(student, model, len(tokenizer))
    models = {TEACHER: base, "student": model.eval().requires_grad_(False)}
    lengths = list(lengths or speed.grid(base, place))
    batches = list(batches or speed.BATCHES.get(place, (1,)))
    _refuse_length(largest_batch, base)
    extra = LEAD + SPAN if energy and place == "cuda" else 0.0
    planned = speed.plan(models, lengths, batches, parts=parts, force=force, seconds=seconds, extra=extra)
    if told is not None:
        told(planned)
    if all(point.not_run for point in planned):
        raise EvaluationError(
            f"bench: nothing can be timed ({planned[0].not_run}); give other lengths or batches"
        )
    results = speed.measure(models, planned, seed=seed, energy=energy, progress=progress)
    if largest_batch is not None:
        full = largest.measure(models, largest_batch, speed.timed, seed=seed, progress=progress)
        results = replace(results, matched_memory=full)
    record = {
        "origin": origin() | {"cuda": torch.version.cuda},
        "student": student.name if run is None else f"{run.name}/{student.name}",
        "teacher": spec.name,
        "seed": seed,
        "sha256": {
            name: sha256_of(student / name) for name in ("config.json", "recipe.yaml") if _is(student / name)
        },
        "speed": results.to_dict(),
    }
    if file is not None:
        write_json(file, record)
    return Benched(results, file, record)


def _is(path: Path) -> bool:
    return path.is_file()


def _refuse_failed_gates(student: Path, run: Path | None, force: bool) -> None:
    """Speed of a student that is not one function means nothing. Its certificate speaks last: gates may run again."""
    if force:
        return
    places = [(student / "certificate.json", "measured")]
    places += [(run / "results.json", "results")] if run is not None else []
    for file, section in places:
        if not file.is_file():
            continue
        try:
            gates = json.loads(file.read_text(encoding="utf-8"))[section].get("gates")
            status = gates and gates["status"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise EvaluationError(f"{file}: cannot be read; make it again or give --force") from None
        if status == "failed":
            raise EvaluationError(
                f"{file}: integrity gates failed, so what is timed is not one model; "
                "see `linearize eval --gates`, or give --force"
            )
        if status:
            return


def _device(device: str) -> str:
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("auto", "cpu", "cuda"):
        raise EvaluationError(f"device: {device!r} is unknown; choose from auto, cpu, cuda")
    if device == "cuda" and found == "cpu":
        raise EvaluationError("device: 'cuda', but torch finds no GPU here; use cpu or a CUDA build of torch")
    return found if device == "auto" else device


def _refuse_length(length: int | None, teacher: Any) -> None:
    limit = speed.context_of(teacher)
    if length is not None and not speed.SHORTEST <= length <= (limit or length):
        told = f" and at most the teacher's context of {limit}" if limit else ""
        raise EvaluationError(f"largest-batch: {length} is impossible; give at least {speed.SHORTEST}{told}")


def _teacher(student: Path, name: str | None) -> Teacher:
    recipe = student / "recipe.yaml"
    if name is not None:
        return Teacher(name=name)
    if not recipe.is_file():
        raise RecipeError(f"{student}: has no recipe.yaml, which names its teacher; give --teacher")
    return Recipe.from_file(recipe).teacher


def _refuse_few_rows(student: Path, model: Any, tokens: int) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < tokens:
        raise EvaluationError(
            f"{student}: has {rows} embeddings and the teacher {tokens} tokens; give the teacher that it was made from"
        )
