"""Verbs that measure: eval."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import typer

from ..terminal import print_json, print_results, print_rows, watching
from .app import AsJson, Checkpoint, Overrides, app, fail, must_be_student


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
    gates: Annotated[
        bool, typer.Option("--gates", help="Only the integrity gates: is it one function, however it is run?")
    ] = False,
    ablations: Annotated[
        bool,
        typer.Option(
            "--ablations", help="Branches switched off, states zeroed; evaluate.ablations.enabled=true."
        ),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Only make the hashes of certificate.json again, and compare.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a saved student beside its teacher.

    By the recipe that was saved with it, changed by overrides, method.sparse_cache=256 among them. What was measured
    goes into the student's certificate.json.
    """
    must_be_student(checkpoint)
    words = list(overrides or [])
    if sum((gates, ablations, verify)) > 1:
        fail("--gates, --ablations, --verify: give one of them")
    if verify:
        if words:
            fail(f"{words[0]}: nothing is measured with --verify; leave it out")
        _verify(checkpoint, as_json)
        return
    if gates:
        _gates(checkpoint, words, as_json)
        return
    if ablations:
        words.append("evaluate.ablations.enabled=true")

    from ..run import evaluate_checkpoint

    if suite:
        words.insert(0, f"evaluate.suite.preset={suite.value}")
    with watching() as watch:
        results = evaluate_checkpoint(checkpoint, words, progress=watch, suite_folder=suite_folder)
    if as_json:
        print_json(json.dumps(results.to_dict()))
    else:
        print_results(results)


def _gates(checkpoint: Checkpoint, words: list[str], as_json: bool) -> None:
    from ..proof import gates_of_checkpoint

    with watching() as watch:
        found = gates_of_checkpoint(checkpoint, words, progress=watch)
    if as_json:
        print_json(json.dumps(found.to_dict()))
    else:
        print_rows((gate.status, gate.name, gate.measured, gate.note) for gate in found.gates)
        typer.echo(f"Integrity: {found.status}")
    if failures := found.failures():
        fail(f"{checkpoint}: {'; '.join(failures)}")


def _verify(checkpoint: Checkpoint, as_json: bool) -> None:
    from ..proof import verify_checkpoint

    found = verify_checkpoint(checkpoint)
    if as_json:
        record = {"matched": found.matched, "mismatched": found.mismatched, "not_checked": found.not_checked}
        print_json(json.dumps(record))
    else:
        rows = [(name, "matches", "") for name in found.matched]
        rows += [(name, "does not match", "") for name in found.mismatched]
        rows += [(name, "not checked", reason) for name, reason in found.not_checked.items()]
        print_rows(rows)
    if found.mismatched:
        fail(f"{checkpoint}: {', '.join(found.mismatched)}: not what certificate.json says; measure it again")
