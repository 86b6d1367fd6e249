"""Verbs about this machine and this package: tune, version."""

import json
from typing import Annotated

import typer

from ..terminal import print_json, print_rows, watching
from .app import AsJson, app, fail


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


@app.command()
def version() -> None:
    """Print the version."""
    from .. import __version__

    typer.echo(__version__)
