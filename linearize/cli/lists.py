"""What there is to choose from: methods, recipes, families."""

import json
from pathlib import Path

import typer

from ..terminal import print_json, print_rows
from .app import AsJson, app

# Converted in the tests, with tiny random models. A constant, so that the list is printed without loading torch.
FAMILIES = (
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)

lists = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What there is to choose from.")
app.add_typer(lists, name="list")


@lists.command()
def methods(as_json: AsJson = False) -> None:
    """Methods that can replace softmax attention."""
    from ..modeling.registry import METHODS

    _print({name: method.summary for name, method in METHODS.items()}, as_json)


@lists.command()
def recipes(as_json: AsJson = False) -> None:
    """Recipes that come with the package."""
    from ..recipe import shipped_recipes

    _print({name: _first_comment(path) for name, path in shipped_recipes().items()}, as_json)


@lists.command()
def families(as_json: AsJson = False) -> None:
    """Model families that are tested.

    Others are tried, and refused with the reason where they do not fit.
    """
    if as_json:
        print_json(json.dumps({"families": FAMILIES}))
        return
    for name in FAMILIES:
        typer.echo(name)


def _print(rows: dict[str, str], as_json: bool) -> None:
    if as_json:
        print_json(json.dumps(rows))
    else:
        print_rows(rows.items())


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
