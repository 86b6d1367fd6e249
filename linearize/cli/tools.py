"""Verbs about this machine and this package: doctor, estimate, tune, version."""

import json
from typing import Annotated

import typer

from ..terminal import duration, print_json, print_rows, size, watching
from .app import AsJson, Method, Words, app, fail, recipe_of, split


@app.command("tune")
def tune_(
    kernels: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KERNEL]", show_default=False, help="Kernels' names; all if none is given."),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="May be repeated; the kernels of every method if not given.")
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="Query heads of a layer.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key/value heads, a divisor of them.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Width of a head.")] = 128,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prefill or a training step.")] = 32768,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a decode step.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Time the kernels' launch settings on this GPU.

    The fastest are kept in a file that every later run reads ($LINEARIZE_LAUNCHES, or one in the cache folder).
    """
    if heads % kv_heads:
        fail(f"--kv-heads: {kv_heads} does not divide {heads} heads")

    from ..modeling.tuned import json_of, user_file
    from ..tune import Sizes, tune

    with watching() as watch:
        sizes = Sizes(heads, kv_heads, head_dim, tokens, batch)
        found = tune(kernels or (), methods=method, sizes=sizes, progress=watch)
    if as_json:
        print_json(json.dumps({"file": str(user_file()), "rows": [json_of(tuned.row) for tuned in found]}))
        return
    print_rows(tuned.words() for tuned in found)
    typer.echo(f"Rows: {user_file()}")


@app.command("doctor")
def doctor_(as_json: AsJson = False) -> None:
    """Look whether this machine has what it takes.

    Versions, GPU, Triton, compiler, what each method runs on, caches. Exit code 1 where something is wrong.
    """
    from ..doctor import diagnose

    found = diagnose()
    if as_json:
        print_json(json.dumps(found.to_dict()))
    else:
        print_rows(found.versions.items())
        print_rows([("GPU", found.gpu or "none that torch sees"), ("compiler", found.compiler or "none")])
        for title, rows in (("Methods run on", found.methods), ("Folders", found.folders)):
            typer.echo(f"\n{title}")
            print_rows(rows.items())
        typer.echo("\n" + ("\n".join(found.problems) or "Nothing is wrong."))
    if found.problems:
        raise typer.Exit(1)


@app.command("estimate")
def estimate_(
    words: Words = None,
    method: Method = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="The training speed to reckon with.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Find the speed with one batch of each stage on random weights.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a run would cost and save.

    Parameters, tokens, memory, time and bytes of state, from the teacher's configuration; no weights are loaded.
    """
    if measure and tokens_per_second:
        fail("--measure, --tokens-per-second: give one of them")
    model, overrides = split(words)
    recipe = recipe_of(model, method, overrides)

    from ..estimate import estimate
    from ..run import device_of

    made = estimate(recipe, device=device_of(recipe), tokens_per_second=tokens_per_second, measure=measure)
    if as_json:
        print_json(json.dumps(made.to_dict()))
        return
    typer.echo(
        f"{made.teacher}: {made.parameters:,} parameters, {size(made.weights_bytes)}; {made.converted} of {made.layers}"
        f" attention layers converted, {made.new_parameters:,} new parameters\n"
    )
    head = ("stage", "trained parameters", "tokens", "memory, about", f"time, speed {made.speed}")
    print_rows(
        [
            head,
            *(
                (s.name, f"{s.trained:,}", f"{s.tokens:,}", size(s.memory), duration(s.seconds))
                for s in made.stages
            ),
        ]
    )
    typer.echo("\nOne sequence")
    print_rows(
        [
            ("tokens", "teacher's KV cache", "student", "share"),
            *(
                (f"{length:,}", size(before), size(after), f"{after / before:.1%}")
                for length, (before, after) in made.cache.items()
            ),
        ]
    )


@app.command()
def version(as_json: AsJson = False) -> None:
    """Print the version."""
    from .. import __version__

    if as_json:
        print_json(json.dumps({"version": __version__}))
    else:
        typer.echo(__version__)
