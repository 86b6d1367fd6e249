"""Verbs that measure: eval."""

import json

from ..terminal import print_json, print_results, watching
from .app import AsJson, Overrides, Student, app, must_be_student


@app.command("eval")
def eval_(checkpoint: Student, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Measure a saved student beside its teacher.

    By the recipe that was saved with it, changed by overrides, method.sparse_cache=256 among them.
    """
    from ..checkpoint import fetch
    from ..run import evaluate_checkpoint

    must_be_student(fetch(checkpoint))
    with watching() as watch:
        results = evaluate_checkpoint(checkpoint, overrides or [], progress=watch)
    if as_json:
        print_json(json.dumps(results.to_dict()))
    else:
        print_results(results)
