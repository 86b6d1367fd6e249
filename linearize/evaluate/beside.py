"""Results of several runs on one teacher as one: every student beside the others, under its run's name."""

from collections.abc import Mapping
from dataclasses import replace

from ..modeling.errors import EvaluationError
from . import Results
from .continuation import Continuations
from .likelihood import TEACHER
from .suite import SuiteResults

STUDENT = "student"


def beside(parts: Mapping[str, Results]) -> Results:
    """The student of every run and one teacher, on the same text and prompts; integrity, ablations and speed stay with
    the runs. Raises EvaluationError where two runs did not measure the same.
    """
    first = next(iter(parts.values()))
    for name, part in parts.items():
        for key in ("source", "seed", "windows"):
            if getattr(part, key) != getattr(first, key):
                raise EvaluationError(
                    f"{name}: was measured with another {key} than {next(iter(parts))}; "
                    "give all runs the same data, lengths and seed"
                )
        asked = {(cell.task, cell.length): cell.digest for cell in part.recall}
        if asked != {(cell.task, cell.length): cell.digest for cell in first.recall}:
            raise EvaluationError(f"{name}: was asked other recall prompts than {next(iter(parts))}")
    return Results(
        source=first.source,
        models=[TEACHER, *parts],
        seed=first.seed,
        likelihood={
            length: {
                TEACHER: by_model[TEACHER],
                **{name: part.likelihood[length][STUDENT] for name, part in parts.items()},
            }
            for length, by_model in first.likelihood.items()
        },
        recall=[
            *(cell for cell in first.recall if cell.model == TEACHER),
            *(
                replace(cell, model=name)
                for name, part in parts.items()
                for cell in part.recall
                if cell.model == STUDENT
            ),
        ],
        memory={
            TEACHER: first.memory[TEACHER],
            **{name: part.memory[STUDENT] for name, part in parts.items()},
        },
        windows=first.windows,
        suite=_suites(parts),
        continuation=_continuations(parts),
        overlap=first.overlap,
    )


def _suites(parts: Mapping[str, Results]) -> SuiteResults | None:
    """The cells of every suite; None where a run has none."""
    suites = {name: part.suite for name, part in parts.items() if part.suite is not None}
    if len(suites) < len(parts):
        return None
    first = next(iter(suites.values()))
    students = [
        replace(cell, model=name)
        for name, suite in suites.items()
        for cell in suite.cells
        if cell.model == STUDENT
    ]
    return replace(first, cells=[*(cell for cell in first.cells if cell.model == TEACHER), *students])


def _continuations(parts: Mapping[str, Results]) -> Continuations | None:
    """What every student wrote on; None where a run has nothing, or other prompts or more room than the first."""
    found = {name: part.continuation for name, part in parts.items() if part.continuation is not None}
    first = next(iter(found.values()), None)
    if first is None or len(found) < len(parts):
        return None
    if len({(made.digest, made.tokens) for made in found.values()}) > 1:
        return None
    rows = [replace(made.row(STUDENT), model=name) for name, made in found.items()]
    return replace(first, rows=[first.row(TEACHER), *rows])
