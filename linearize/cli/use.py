"""Verbs that use a student: generate, push."""

import json
import sys
from typing import Annotated

import typer

from ..terminal import print_json
from .app import AsJson, Checkpoint, Fields, app, fail


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
    from ..generate import generate
    from ..loading import load
    from ..methods import adjust, method_words

    if not sample and (temperature is not None or seed is not None):
        fail("--temperature, --seed: nothing is sampled; add --sample")
    if prompt == "-":
        prompt = sys.stdin.read().rstrip("\n")
    fields, others = method_words(words or [])
    if others:
        fail(f"{others[0]}: is not a method's field; put the prompt in quotes, or write method.field=value")
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
    as_json: AsJson = False,
) -> None:
    """Upload a saved student to the Hub.

    With a card that says what it is and what was measured.
    """
    from ..hub import push

    made = push(checkpoint, repo_id, private=private, revision=revision, dry_run=dry_run)
    if as_json:
        print_json(json.dumps({"url": made.url, "files": made.files, "pushed": not dry_run}))
        return
    for name in made.files:
        typer.echo(name)
    typer.echo(f"{'Would go to' if dry_run else 'Pushed to'} {made.url}")
