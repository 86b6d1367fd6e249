"""Verbs that use a student: generate, push."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..terminal import print_json, watching
from .app import AsJson, Fields, app, fail


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
    state: Annotated[
        Path | None, typer.Option(help="Go on from a text read before: a file of `linearize state save`.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt."""
    from ..generate import generate
    from ..loading import load
    from ..methods import adjust, only_fields
    from ..state import load as load_state

    if not sample and (temperature is not None or seed is not None):
        fail("--temperature, --seed: nothing is sampled; add --sample")
    if prompt == "-":
        prompt = sys.stdin.read().rstrip("\n")
    fields = only_fields(words or [], "the prompt")
    model, tokenizer = load(checkpoint)
    adjust(model, **fields)
    defaults = {"do_sample": True, "temperature": 1.0, "seed": 0}
    given = {"temperature": temperature, "seed": seed}
    sampling = defaults | {k: v for k, v in given.items() if v is not None} if sample else {}
    read = None if state is None else load_state(state, model)
    text = generate(model, tokenizer, prompt, max_new_tokens, static=static, state=read, **sampling)
    if as_json:
        print_json(json.dumps({"prompt": prompt, "continuation": text}))
    else:
        typer.echo(text)


@app.command("push")
def push_(
    checkpoint: Annotated[
        Path, typer.Argument(help="The folder of a run, or of a saved student.", show_default=False)
    ],
    repo_id: Annotated[str, typer.Argument(help="owner/name on the Hugging Face Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch, created where it does not exist.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be uploaded.")] = False,
    adapter_only: Annotated[
        bool,
        typer.Option("--adapter-only", help="The adapters and the new layers alone, without the weights."),
    ] = False,
    allow_licence: Annotated[
        bool,
        typer.Option("--allow-licence", help="Go on although the teacher's licence forbids derivatives."),
    ] = False,
    allow_failed: Annotated[
        bool, typer.Option("--allow-failed", help="Go on although integrity gates of the student failed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a saved student to the Hub.

    With a card that says what it is and what was measured. A push that was interrupted goes on when it is repeated.
    """
    from ..hub import push

    with watching() as watch:
        made = push(
            checkpoint,
            repo_id,
            private=private,
            revision=revision,
            dry_run=dry_run,
            adapter_only=adapter_only,
            allow_licence=allow_licence,
            allow_failed=allow_failed,
            progress=watch,
        )
    if as_json:
        print_json(json.dumps({"url": made.url, "files": made.files, "dry_run": dry_run}))
        return
    for name in made.files:
        typer.echo(name)
    typer.echo(f"{'Would go to' if dry_run else 'Pushed to'} {made.url}")


@app.command("serve")
def serve_(
    checkpoint: Annotated[str, typer.Argument(help="A saved student: its folder, or its id on the Hub.")],
    state: Annotated[
        Path | None,
        typer.Option(help="What every request goes on from: a file of `linearize state save`."),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "localhost",
    port: Annotated[int, typer.Option(help="The port to listen at.")] = 8000,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")] = None,
) -> None:
    """Answer OpenAI's requests over HTTP.

    Completions and chat, streamed or not; needs `pip install 'linearize[serve]'`.
    """
    import torch

    from ..serve import serve

    found = "cuda" if torch.cuda.is_available() else "cpu"
    serve(checkpoint, state=state, host=host, port=port, device=device or found)
