"""What there is to choose from: methods, recipes, families."""

from pathlib import Path

import typer

from ..terminal import print_rows
from .app import app

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
def methods() -> None:
    """Methods that can replace softmax attention."""
    from ..modeling.registry import METHODS

    print_rows((name, method.summary) for name, method in METHODS.items())


@lists.command()
def recipes() -> None:
    """Recipes that come with the package."""
    from ..recipe import shipped_recipes

    print_rows((name, _first_comment(path)) for name, path in shipped_recipes().items())


@lists.command()
def families() -> None:
    """Model families that are tested.

    Others are tried, and refused with the reason where they do not fit.
    """
    for name in FAMILIES:
        typer.echo(name)


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
