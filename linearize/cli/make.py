"""Verbs that make a student: run, show, convert, unconvert."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..terminal import print_json, print_results, print_rows, stdout, watching
from .app import AsJson, Checkpoint, Method, Output, Words, app, must_be_student, recipe_of, split


@app.command("run")
def run_(
    words: Words = None,
    method: Method = None,
    output: Annotated[Path | None, typer.Option(help="The run's folder; the same as output=...")] = None,
    as_json: AsJson = False,
) -> None:
    """Convert, train, measure and save.

    By a recipe or for a model; nothing given: the embedded model, in minutes. A second call of the same
    command goes on where the first was stopped.
    """
    model, overrides = split(words)
    if output is not None:
        overrides.append(f"output={json.dumps(str(output))}")
    recipe = recipe_of(model, method, overrides)

    from ..run import run

    with watching() as watch:
        made = run(recipe, progress=watch)
    if as_json:
        print_json((made.folder / "results.json").read_text(encoding="utf-8"))
        return
    print_results(made.results)
    console = stdout()
    if made.continuation:
        console.print("Prompt:", style="bold")
        console.print(made.prompt, markup=False, highlight=False)
        console.print("\nThe student goes on:", style="bold")
        console.print(made.continuation, markup=False, highlight=False)
    total = sum(made.timings.values())
    spent = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in made.timings.items() if seconds >= 1)
    typer.echo(f"\nTime: {total:.0f} s ({spent})")
    typer.echo(f"Tables and numbers: {made.folder / 'table.md'}, {made.folder / 'results.json'}")
    if (page := made.folder / "report.html").is_file():
        typer.echo(f"Report: {page}")
    else:
        typer.echo(
            "Report: none, for want of matplotlib; pip install 'linearize[report]', then linearize report"
        )
    typer.echo(f"Student: {made.checkpoint}")
    typer.echo(f'  linearize generate {made.checkpoint} "Once upon a time"')
    typer.echo(f'  AutoModelForCausalLM.from_pretrained("{made.checkpoint}", trust_remote_code=True)')


@app.command("compare")
def compare_(
    words: Words = None,
    methods: Annotated[
        str, typer.Option(metavar="A,B", help="Methods to run side by side; see `linearize list methods`.")
    ] = "lolcats,liger,still,lawcat,salient,window",
    output: Annotated[
        Path | None, typer.Option(help="The folder of all runs; the same as output=...")
    ] = None,
    timed: Annotated[bool, typer.Option("--bench/--no-bench", help="Time every student, too.")] = True,
    bench_seconds: Annotated[
        float, typer.Option(help="For timing one student; points predicted to end later are not run.")
    ] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Run several methods on one teacher, and write one report.

    With the same data, tokens and seeds. What one method gets differently stands under `compare` in the recipe
    (compare.salient.method.budget=256). A second call of the same command goes on where the first was stopped.
    """
    model, overrides = split(words)
    if output is not None:
        overrides.append(f"output={json.dumps(str(output))}")
    recipe = recipe_of(model, None, overrides)

    from ..compare import compare

    with watching() as watch:
        names = [name.strip() for name in methods.split(",")]
        made = compare(recipe, names, timed=timed, bench_seconds=bench_seconds, progress=watch)
    if as_json:
        print_json((made.folder / "results.json").read_text(encoding="utf-8"))
        return
    print_results(made.results)
    typer.echo(f"Tables and numbers: {made.folder / 'table.md'}, {made.folder / 'results.json'}")
    typer.echo(f"Report: {made.page or 'none, for want of matplotlib; pip install linearize[report]'}")


@app.command()
def show(words: Words = None, method: Method = None, as_json: AsJson = False) -> None:
    """Print the recipe with every default.

    It is checked as far as it can be without loading a model.
    """
    model, overrides = split(words)
    recipe = recipe_of(model, method, overrides)
    if as_json:
        print_json(json.dumps(recipe.to_dict()))
    else:
        typer.echo(recipe.to_yaml(), nl=False)


@app.command("convert")
def convert_(output: Output, words: Words = None, method: Method = None, as_json: AsJson = False) -> None:
    """Write a converted, untrained model."""
    model, overrides = split(words)
    recipe = recipe_of(model, method, overrides)

    from ..checkpoint import save
    from ..convert import convert, describe
    from ..teacher import load_teacher

    loaded, tokenizer = load_teacher(recipe.teacher)
    convert(loaded, recipe.method, recipe.layers, convert_sliding=recipe.convert_sliding)
    save(loaded, tokenizer, output, extra={"recipe.yaml": recipe.to_yaml()})
    if as_json:
        print_json(json.dumps({"checkpoint": str(output)}))
        return
    print_rows(
        (
            f"layer {layer.index}",
            layer.method,
            f"{layer.parameters:,} new parameters, {layer.state_bytes:,} bytes of state"
            + (f", {layer.growth:,.0f} more with every token" if layer.growth else ""),
        )
        for layer in describe(loaded)
    )
    typer.echo(f"Converted, untrained: {output}")


@app.command("unconvert")
def unconvert_(checkpoint: Checkpoint, output: Output, as_json: AsJson = False) -> None:
    """Write the plain transformers model back.

    The projections stay as they were fine-tuned; the weights of the mixers are left out.
    """
    from ..checkpoint import load, quiet_transformers, replacing
    from ..convert import unconvert

    must_be_student(checkpoint)
    model, tokenizer = load(checkpoint)
    with replacing(output) as folder, quiet_transformers():
        unconvert(model).save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    if as_json:
        print_json(json.dumps({"model": str(output)}))
        return
    typer.echo(f"Plain model: {output}")
