"""Verbs that measure: eval, bench; and the report of what was measured."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..terminal import print_json, print_results, print_rows, print_tables, watching
from .app import AsJson, Checkpoint, Overrides, Student, app, fail, must_be_student


class Preset(StrEnum):
    """How many prompts of each task and length."""

    smoke = "smoke"
    standard = "standard"
    publication = "publication"


SuitePreset = Annotated[
    Preset | None, typer.Option(help="Run the recall suite, with 50, 100 or 500 prompts a task and length.")
]
SuiteFolder = Annotated[
    Path | None,
    typer.Option(help="Keep the suite's answers and free continuations here, and go on from what is there."),
]


@app.command("eval")
def eval_(
    checkpoint: Student,
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

    By the recipe that was saved with it, changed by overrides, method.sparse_cache=256 among them. What was measured
    goes into the student's certificate.json.
    """
    from ..checkpoint import fetch

    must_be_student(
        fetch(checkpoint)
    )  # below, too, it goes by its name: a fetched recipe is trusted with less
    words = list(overrides or [])
    if sum((gates, ablations, verify)) > 1:
        fail("--gates, --ablations, --verify: give one of them")
    beside = {"--suite": suite, "--suite-folder": suite_folder, "--lm-eval": lm_eval}
    beside |= {"--lm-eval-tasks": lm_eval_tasks}
    if gates or verify:
        alone = "--gates" if gates else "--verify"
        for option in (option for option, given in beside.items() if given is not None):
            fail(f"{alone}, {option}: nothing else is done with {alone}; give one of them")
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
    if lm_eval is not None:
        words.append(f"evaluate.lm_eval.tasks={json.dumps(lm_eval.split(','))}")
    if lm_eval_tasks is not None:
        words.append(f"evaluate.lm_eval.folder={json.dumps(str(lm_eval_tasks))}")
    with watching() as watch:
        results = evaluate_checkpoint(checkpoint, words, progress=watch, suite_folder=suite_folder)
    if as_json:
        print_json(json.dumps(results.to_dict()))
    else:
        print_results(results)


@app.command("bench")
def bench_(
    checkpoint: Checkpoint,
    teacher: Annotated[
        str | None,
        typer.Option(help="The model to compare with; the student's recipe names it if not given."),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="N,N", help="Tokens; from 512 in doublings to the teacher's context if not given."
        ),
    ] = None,
    batch: Annotated[str | None, typer.Option(metavar="N,N", help="Rows; 1 on a CPU, 1,8 on a GPU.")] = None,
    parts: Annotated[str, typer.Option(metavar="A,B", help="Of prefill and decode.")] = "prefill,decode",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of both models' weights: auto, float32, bfloat16 or float16.")
    ] = "auto",
    energy: Annotated[
        bool, typer.Option("--energy", help="Joules of a token too, of a GPU that tells its power.")
    ] = False,
    largest_batch: Annotated[
        int | None,
        typer.Option(metavar="N", help="Both models at their own largest batch of N tokens too; a GPU's."),
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Points predicted to end later are not run.")] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Try what is predicted not to fit, and students whose gates failed."),
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="A JSON file; speed.json in the student's run if not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time a saved student beside its teacher.

    Prefill and decode over lengths and batch sizes, what both keep in memory, and the length from which the student
    stays ahead. What it will take is said first.
    """
    from ..certificate import certify_speed
    from ..evaluate.bench import bench
    from ..recipe import Recipe
    from ..report import estimate, speed_tables

    must_be_student(checkpoint)
    with watching() as watch:
        made = bench(
            checkpoint,
            teacher=teacher,
            lengths=_numbers("--lengths", lengths),
            batches=_numbers("--batch", batch),
            parts=[part.strip() for part in parts.split(",")],
            device=device,
            dtype=dtype,
            output=output,
            force=force,
            seconds=seconds,
            energy=energy,
            largest_batch=largest_batch,
            told=lambda planned: typer.echo(estimate(planned), err=True),
            progress=watch,
        )
    if teacher is None:  # beside another one it is no figure of this student's conversion
        certify_speed(checkpoint, made.results, Recipe.from_file(checkpoint / "recipe.yaml").teacher)
    if as_json:
        print_json(json.dumps(made.record))
        return
    print_tables(speed_tables(made.results))
    if made.file is not None:
        typer.echo(f"Numbers: {made.file}")


@app.command("report")
def report_(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="An HTML file; report.html in the run's folder if not given, or here for several runs."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one page about a run, or about several side by side.

    A self-contained HTML file, which loads nothing and runs nothing, and the same in Markdown.
    """
    from ..report import write_report

    page, twin = write_report(runs, output)
    if as_json:
        print_json(json.dumps({"html": str(page), "markdown": str(twin)}))
    else:
        typer.echo(f"Report: {page}, {twin}")


def _numbers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(word.strip().replace("_", "")) for word in text.split(",")]
    except ValueError:
        fail(f"{option}: {text!r} is not a list of whole numbers, such as 1024,4096")


def _gates(checkpoint: str, words: list[str], as_json: bool) -> None:
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


def _verify(checkpoint: str, as_json: bool) -> None:
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
