"""Verbs that measure: eval."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..terminal import print_json, print_results, watching
from .app import AsJson, Checkpoint, Overrides, app, must_be_student


class Preset(StrEnum):
    """How many prompts of each task and length."""

    smoke = "smoke"
    standard = "standard"
    publication = "publication"


SuitePreset = Annotated[
    Preset | None, typer.Option(help="Run the recall suite, with 50, 100 or 500 prompts a task and length.")
]
SuiteFolder = Annotated[
    Path | None, typer.Option(help="Keep the suite's prompts and answers here, and go on from what is there.")
]


@app.command("eval")
def eval_(
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    suite: SuitePreset = None,
    suite_folder: SuiteFolder = None,
    as_json: AsJson = False,
) -> None:
    """Measure a saved student beside its teacher.

    By the recipe that was saved with it, changed by overrides, method.sparse_cache=256 among them.
    """
    from ..run import evaluate_checkpoint

    must_be_student(checkpoint)
    words = [f"evaluate.suite.preset={suite.value}"] if suite else []
    with watching() as watch:
        results = evaluate_checkpoint(
            checkpoint, [*words, *(overrides or [])], progress=watch, suite_folder=suite_folder
        )
    if as_json:
        print_json(json.dumps(results.to_dict()))
    else:
        print_results(results)
