"""Verbs that measure: eval."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..terminal import print_json, print_results, watching
from .app import AsJson, Checkpoint, Overrides, app, must_be_student


@app.command("eval")
def eval_(
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            metavar="TASK[,TASK]", help="Tasks of lm-eval too; zero-shot and mmlu are the usual sets."
        ),
    ] = None,
    lm_eval_tasks: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder of lm-eval task files of your own.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a saved student beside its teacher.

    By the recipe that was saved with it, changed by overrides, method.sparse_cache=256 among them.
    """
    from ..run import evaluate_checkpoint

    must_be_student(checkpoint)
    overrides = list(overrides or [])
    if lm_eval is not None:
        overrides.append(f"evaluate.lm_eval.tasks={json.dumps(lm_eval.split(','))}")
    if lm_eval_tasks is not None:
        overrides.append(f"evaluate.lm_eval.folder={json.dumps(str(lm_eval_tasks))}")
    with watching() as watch:
        results = evaluate_checkpoint(checkpoint, overrides, progress=watch)
    if as_json:
        print_json(json.dumps(results.to_dict()))
    else:
        print_results(results)
