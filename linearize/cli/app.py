"""The application that verbs join: errors as one line, logging, the words that several verbs take."""

import errno
import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..modeling.errors import LinearizeError
from ..terminal import stderr

FULL = (errno.ENOSPC, errno.EDQUOT)
NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)


class _Verbs(TyperGroup):
    """Turns what a user can mend into one line on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LinearizeError as error:
            fail(str(error))
        except OSError as error:
            if error.errno not in (*FULL, *NO_PLACE):
                raise
            place = f"{error.filename}: " if error.filename else ""
            remedy = (
                "free some space, then repeat the command"
                if error.errno in FULL
                else "choose another folder with output=... or --output"
            )
            fail(f"{place}{(error.strerror or 'cannot be written').lower()}; {remedy}")
        except KeyboardInterrupt as stopped:
            typer.echo(f"interrupted; the same command goes on from {_where(stopped)}", err=True)
            raise typer.Exit(130) from None


def _where(stopped: KeyboardInterrupt) -> str:
    """What is saved, where the work said so before it stopped."""
    return f"there ({stopped})" if str(stopped) else "the last step that was saved"


def fail(line: str) -> None:
    typer.echo(f"error: {' '.join(line.split())}", err=True)
    raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Convert pretrained causal language models to linear attention, and show what was kept.",
)

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL|RECIPE] [key.sub=value]",
        show_default=False,
        help="A Hub id, a folder, a bundled model, a recipe file or a shipped recipe's name; then overrides.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key.sub=value]", show_default=False, help="Recipe overrides."),
]
Fields = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[method.field=value]", show_default=False, help="As `linearize eval` takes them."
    ),
]
Method = Annotated[
    str | None, typer.Option(help="The method, with its defaults; see `linearize list methods`.")
]
Output = Annotated[Path, typer.Option(help="The folder to write; it must not hold anything yet.")]
Checkpoint = Annotated[Path, typer.Argument(help="A saved student's folder.", show_default=False)]
Student = Annotated[
    str, typer.Argument(help="A saved student: its folder, or its id on the Hub.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="End stdout with one JSON object instead of tables.")]


@app.callback()
def _root(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens, to stderr.")] = False,
) -> None:
    # What transformers and the Hub have to say is for developers, too; they read this when they are imported.
    for library in ("TRANSFORMERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "info" if verbose else "error")
    handler: logging.Handler = logging.StreamHandler()  # to stderr, one line a message
    if stderr().is_terminal:
        from rich.logging import RichHandler

        handler = RichHandler(console=stderr(), show_path=False, show_level=verbose, show_time=verbose)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("linearize").setLevel(logging.DEBUG if verbose else logging.INFO)
    # Warnings of libraries are for developers: shown with --verbose.
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.WARNING if verbose else logging.ERROR)


def must_be_student(folder: Path) -> None:
    """Said at once: transformers would look for such a name on the Hub first, for half a minute."""
    from ..checkpoint import is_checkpoint
    from ..modeling.errors import CheckpointError

    if not is_checkpoint(folder):
        raise CheckpointError(f"{folder}: not a saved student; give the `student` folder of a run")


def split(words: list[str] | None) -> tuple[str | None, list[str]]:
    """The model or recipe, if the first word is one, and the overrides."""
    words = list(words or [])
    model = words.pop(0) if words and "=" not in words[0] else None
    return model, words


def recipe_of(model: str | None, method: str | None, overrides: list[str]) -> Any:
    from ..recipe import Recipe

    return Recipe.resolve(model, method, overrides)
