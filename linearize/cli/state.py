"""What a model keeps of a text: state save, state info."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..terminal import print_json, print_rows, watching
from .app import AsJson, Fields, app

states = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Read a text once, and go on from it any number of times.",
)
app.add_typer(states, name="state")


@states.command()
def save(
    checkpoint: Annotated[str, typer.Argument(help="A saved student, or any model that can be a teacher.")],
    text: Annotated[str, typer.Argument(help="The text to read; - reads it from stdin.")],
    output: Annotated[Path, typer.Option(help="The file to write.")],
    words: Fields = None,
    as_json: AsJson = False,
) -> None:
    """Have a student read a text, and keep its state in a file.

    `linearize generate --state FILE` goes on from there, at no cost for the text.
    """
    from ..loading import load
    from ..methods import adjust, only_fields
    from ..state import read
    from ..state import save as write

    if text == "-":
        text = sys.stdin.read().rstrip("\n")
    fields = only_fields(words or [], "the text")
    model, tokenizer = load(checkpoint)
    with watching() as watch:
        state = read(adjust(model, **fields), tokenizer, text, progress=watch)
    _show(output, write(state, output), as_json)


@states.command("info")
def info_(file: Annotated[Path, typer.Argument(show_default=False)], as_json: AsJson = False) -> None:
    """What a state file is of, and its bytes."""
    from ..state import info

    _show(file, info(file), as_json)


def _show(file: Path, info: Any, as_json: bool) -> None:
    size = file.stat().st_size
    if as_json:
        print_json(json.dumps({"file": str(file), "file_bytes": size, **info.to_dict()}))
        return
    saved = 100 * (1 - (info.state_bytes + info.kv_bytes) / info.teacher_bytes)
    print_rows(
        [
            ("file", f"{size:,} bytes"),
            ("tokens read", f"{info.tokens:,}"),
            ("state of the converted layers", f"{info.state_bytes:,} bytes"),
            ("KV cache of the softmax layers", f"{info.kv_bytes:,} bytes"),
            ("token ids", f"{info.token_bytes:,} bytes"),
            ("KV cache without conversion", f"{info.teacher_bytes:,} bytes; {saved:.0f} % are saved"),
            ("checkpoint", info.checkpoint[:16]),
            ("made", f"{info.date}, linearize {info.versions.get('linearize', '?')}"),
        ]
    )
