"""Names and colours that are the same all over a page."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..evaluate import TEACHER
from .record import Run
from .tables import Table


def colours(runs: Sequence[Run]) -> dict[str, int | None]:
    """Label -> its series, the same in every plot; teachers are drawn in ink."""
    labels = dict.fromkeys(run.label(name) for run in runs for name in run.students)
    teachers = {teacher_label(run, runs): None for run in runs}
    return {label: index for index, label in enumerate(labels)} | teachers


def teacher_label(run: Run, runs: Sequence[Run]) -> str:
    """One name for all runs where they have one teacher."""
    names = {json.dumps(other.recipe.get("teacher"), sort_keys=True) for other in runs}
    return TEACHER if len(names) == 1 else f"{run.name}: {TEACHER}"


def label(run: Run, runs: Sequence[Run], model: str) -> str:
    """A model's name on this page."""
    return teacher_label(run, runs) if model == TEACHER else run.label(model)


def merged(runs: Sequence[Run], make: Any, column: int) -> Table:
    """The rows of one table of every run, with the page's names; a teacher that runs share once."""
    made = [(run, make(run.results)) for run in runs]
    rows: list[list[str]] = []
    for run, table in made:
        for row in table.rows:
            row = [*row[:column], label(run, runs, row[column]), *row[column + 1 :]]
            if row not in rows:
                rows.append(row)
    return replace(made[0][1], rows=rows)


def of(run: Run, runs: Sequence[Run], title: str) -> str:
    return title if len(runs) == 1 else f"{run.name}: {title}"
