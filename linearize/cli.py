"""The command line: each verb parses its words, calls the library, prints; heavy imports live inside verbs.

Results go to stdout, progress and logs to stderr; ``--json`` ends stdout with one JSON object. A user's
mistake is one line and exit code 2, an interruption is 130.
"""

import errno
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .modeling.errors import LinearizeError
from .terminal import print_json, print_results, print_rows, stderr, stdout, watching

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

FULL = (errno.ENOSPC, errno.EDQUOT)
NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)


class _Verbs(TyperGroup):
    """Turns what a user can mend into one line on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LinearizeError as error:
            _fail(str(error))
        except OSError as error:
            if error.errno not in (*FULL, *NO_PLACE):
                raise
            place = f"{error.filename}: " if error.filename else ""
            remedy = (
                "free some space, then repeat the command"
                if error.errno in FULL
                else "choose another folder with output=... or --output"
            )
            _fail(f"{place}{(error.strerror or 'cannot be written').lower()}; {remedy}")
        except KeyboardInterrupt:
            typer.echo("interrupted; the same command goes on from the last step that was saved", err=True)
            raise typer.Exit(130) from None


def _fail(line: str) -> None:
    typer.echo(f"error: {' '.join(line.split())}", err=True)
    raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
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
    model, overrides = _split(words)
    if output is not None:
        overrides.append(f"output={json.dumps(str(output))}")
    recipe = _recipe(model, method, overrides)

    from .run import run

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
    typer.echo(f"Student: {made.checkpoint}")
    typer.echo(f'  linearize generate {made.checkpoint} "Once upon a time"')
    typer.echo(f'  AutoModelForCausalLM.from_pretrained("{made.checkpoint}", trust_remote_code=True)')


@app.command()
def show(words: Words = None, method: Method = None, as_json: AsJson = False) -> None:
    """Print the recipe with every default.

    It is checked as far as it can be without loading a model.
    """
    model, overrides = _split(words)
    recipe = _recipe(model, method, overrides)
    if as_json:
        print_json(json.dumps(recipe.to_dict()))
    else:
        typer.echo(recipe.to_yaml(), nl=False)


lists = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What there is to choose from.")
app.add_typer(lists, name="list")


@lists.command()
def methods() -> None:
    """Methods that can replace softmax attention."""
    from .modeling.registry import METHODS

    print_rows((name, method.summary) for name, method in METHODS.items())


@lists.command()
def recipes() -> None:
    """Recipes that come with the package."""
    from .recipe import shipped_recipes

    print_rows((name, _first_comment(path)) for name, path in shipped_recipes().items())


@lists.command()
def families() -> None:
    """Model families that are tested.

    Others are tried, and refused with the reason where they do not fit.
    """
    for name in FAMILIES:
        typer.echo(name)


@app.command("convert")
def convert_(output: Output, words: Words = None, method: Method = None, as_json: AsJson = False) -> None:
    """Write a converted, untrained model."""
    model, overrides = _split(words)
    recipe = _recipe(model, method, overrides)

    from .checkpoint import save
    from .convert import convert, describe
    from .teacher import load_teacher

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
def unconvert_(checkpoint: Checkpoint, output: Output) -> None:
    """Write the plain transformers model back.

    The projections stay as they were fine-tuned; the weights of the mixers are left out.
    """
    from .checkpoint import load, quiet_transformers, replacing
    from .convert import unconvert

    _must_be_student(checkpoint)
    model, tokenizer = load(checkpoint)
    with replacing(output) as folder, quiet_transformers():
        unconvert(model).save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    typer.echo(f"Plain model: {output}")


@app.command("eval")
def eval_(checkpoint: Checkpoint, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Measure a saved student beside its teacher.

    By the recipe that was saved with it, changed by overrides, method.sparse_cache=256 among them.
    """
    from .run import evaluate_checkpoint

    _must_be_student(checkpoint)
    with watching() as watch:
        results = evaluate_checkpoint(checkpoint, overrides or [], progress=watch)
    if as_json:
        print_json(json.dumps(results.to_dict()))
    else:
        print_results(results)


@app.command("generate")
def generate_(
    checkpoint: Annotated[str, typer.Argument(help="A saved student, or any model that can be a teacher.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from stdin.")],
    words: Fields = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 60,
    sample: Annotated[
        bool, typer.Option("--sample", help="Sample instead of taking the likeliest token.")
    ] = False,
    temperature: Annotated[float | None, typer.Option(help="With --sample: 1 if not given.")] = None,
    seed: Annotated[int | None, typer.Option(help="With --sample: 0 if not given.")] = None,
    static: Annotated[
        bool,
        typer.Option("--static", help="Decode in place, on a GPU from a CUDA graph: the same text, sooner."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt."""
    from .generate import generate
    from .loading import load
    from .methods import adjust, method_words

    if not sample and (temperature is not None or seed is not None):
        _fail("--temperature, --seed: nothing is sampled; add --sample")
    if prompt == "-":
        prompt = sys.stdin.read().rstrip("\n")
    fields, others = method_words(words or [])
    if others:
        _fail(f"{others[0]}: is not a method's field; put the prompt in quotes, or write method.field=value")
    model, tokenizer = load(checkpoint)
    adjust(model, **fields)
    defaults = {"do_sample": True, "temperature": 1.0, "seed": 0}
    given = {"temperature": temperature, "seed": seed}
    sampling = defaults | {k: v for k, v in given.items() if v is not None} if sample else {}
    text = generate(model, tokenizer, prompt, max_new_tokens, static=static, **sampling)
    if as_json:
        print_json(json.dumps({"prompt": prompt, "continuation": text}))
    else:
        typer.echo(text)


@app.command("push")
def push_(
    checkpoint: Checkpoint,
    repo_id: Annotated[str, typer.Argument(help="owner/name on the Hugging Face Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch, created where it does not exist.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be uploaded.")] = False,
) -> None:
    """Upload a saved student to the Hub.

    With a card that says what it is and what was measured.
    """
    from .hub import push

    made = push(checkpoint, repo_id, private=private, revision=revision, dry_run=dry_run)
    for name in made.files:
        typer.echo(name)
    typer.echo(f"{'Would go to' if dry_run else 'Pushed to'} {made.url}")


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
        _fail(f"--kv-heads: {kv_heads} does not divide {heads} heads")

    from .modeling.tuned import json_of, user_file
    from .tune import Sizes, tune

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
    from . import __version__

    typer.echo(__version__)


def _must_be_student(folder: Path) -> None:
    """Said at once: transformers would look for such a name on the Hub first, for half a minute."""
    from .checkpoint import is_checkpoint
    from .modeling.errors import CheckpointError

    if not is_checkpoint(folder):
        raise CheckpointError(f"{folder}: not a saved student; give the `student` folder of a run")


def _split(words: list[str] | None) -> tuple[str | None, list[str]]:
    """The model or recipe, if the first word is one, and the overrides."""
    words = list(words or [])
    model = words.pop(0) if words and "=" not in words[0] else None
    return model, words


def _recipe(model: str | None, method: str | None, overrides: list[str]) -> Any:
    from .recipe import Recipe

    return Recipe.resolve(model, method, overrides)


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
