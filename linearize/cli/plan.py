"""Verbs that choose: scan, plan."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..terminal import print_json, stdout, watching
from .app import AsJson, Method, Words, app, recipe_of, split

Folder = Annotated[
    Path | None,
    typer.Option(help="The scan's folder; runs/<teacher>-scan if not given. A second call goes on there."),
]
Heads = Annotated[
    bool, typer.Option("--heads", help="Also every kv head of a layer alone; of some layers: scan.heads=[7].")
]
MAIN = "salient"
"""What is scanned where neither a recipe nor --method says it."""


@app.command("scan")
def scan_(
    words: Words = None,
    method: Method = None,
    output: Folder = None,
    heads: Heads = False,
    transfer_tokens: Annotated[
        int | None, typer.Option(help="Tokens of transfer for methods that learn; 0, none, if not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what is lost when one layer alone is changed.

    Salient's budgets, windows and other methods in every layer by itself: KL, next-token loss, recall, output error. No
    training, unless asked for. Writes scan.json and a page.
    """
    model, overrides = split(words)
    overrides += ["scan.heads=true"] if heads else []
    overrides += [f"scan.transfer_tokens={transfer_tokens}"] if transfer_tokens is not None else []
    recipe = _recipe(model, method, ["plan=null", *overrides])
    folder = _folder(recipe, output)

    from ..scan import scan

    with watching() as watch:
        teacher, tokenizer, corpus = _ready(recipe, folder, watch)
        result = scan(teacher, tokenizer, corpus, recipe, folder=folder, progress=watch)
    if as_json:
        print_json((folder / "scan.json").read_text(encoding="utf-8"))
        return
    for sentence in [*result.words, *result.notes]:
        typer.echo(sentence)
    names = [name for name in result.candidates if name != "softmax"]
    _table(
        "KL with one layer changed, and prompts lost",
        ["layer", *names],
        [
            [place, *(f"{row.kl:.4f}, {row.lost}" for row in (result.row(i, name, head) for name in names))]
            for place, i, head in _places(result)
        ],
    )
    if result.selectors:
        _table(
            "Rules for choosing layers: a higher score asks sooner for the layer to be kept",
            ["layer", *result.selectors],
            [[str(i), *(f"{by[str(i)]:.4g}" for by in result.selectors.values())] for i in result.layers],
        )
    typer.echo(f"Page: {folder / 'scan.html'}")
    typer.echo(f"Numbers: {folder / 'scan.json'}")


@app.command("plan")
def plan_(
    words: Words = None,
    method: Method = None,
    kv_share: Annotated[
        str | None, typer.Option(help="Share of the KV cache at --at tokens, such as 6%.")
    ] = None,
    state_mb: Annotated[
        float | None, typer.Option(help="MiB of state for --batch sequences of --at tokens.")
    ] = None,
    softmax_layers: Annotated[int | None, typer.Option(help="How many layers keep softmax.")] = None,
    decode_us: Annotated[
        float | None, typer.Option(help="Microseconds a token in all layers; needs --times.")
    ] = None,
    times: Annotated[Path | None, typer.Option(help='JSON: {"layer_us": {candidate: microseconds}}.')] = None,
    at: Annotated[
        str | None, typer.Option(help="Tokens, such as 4096 or 32k; the teacher's context if not given.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences that share --state-mb.")] = None,
    min_recall: Annotated[
        float | None,
        typer.Option(help="Least share of the teacher's recall that the plan may be expected to keep."),
    ] = None,
    softmax: Annotated[
        bool, typer.Option("--softmax", help="Layers may keep softmax, whose memory grows.")
    ] = False,
    output: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Choose what every layer gets, under one budget, by a scan.

    Scans what is not scanned yet, solves exactly, and measures the best plans whole. Writes plan.yaml, which
    `linearize run` takes.
    """
    model, overrides = split(words)
    given = {
        "kv_share": kv_share, "state_mb": state_mb, "softmax_layers": softmax_layers, "decode_us": decode_us,
        "times": None if times is None else str(times), "at": at, "batch": batch, "min_recall": min_recall,
        "softmax": softmax or None,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value is not None}
    if given:
        overrides = [f"plan={json.dumps(given)}", *overrides]
    recipe = _recipe(model, method, overrides)
    if recipe.plan is None:
        from ..modeling.errors import RecipeError

        raise RecipeError(
            "plan: no budget; give --kv-share 6%, --state-mb 64, --softmax-layers 2 or --decode-us 500 --times FILE"
        )
    folder = _folder(recipe, output)

    from ..plan import plan
    from ..planned import curve_rows

    with watching() as watch:
        teacher, tokenizer, corpus = _ready(recipe, folder, watch)
        made, scanned = plan(teacher, tokenizer, corpus, recipe, folder=folder, progress=watch)
    if as_json:
        print_json((folder / "plan.json").read_text(encoding="utf-8"))
        return
    for sentence in [*scanned.words, *made.words]:
        typer.echo(sentence)
    header = ["cost", "expected loss", "KL", "prompts lost", "what changes from the row above"]
    _table("Along the budget (> is near the plan)", header, curve_rows(made))
    typer.echo(made.fragment, nl=False)
    typer.echo(f"Recipe: {folder / 'plan.yaml'}")


def _places(result: Any) -> list[tuple[str, int, int | None]]:
    """Layers, and under each its kv heads where they were measured alone: label, layer, head."""
    measured = dict.fromkeys((row.layer, row.head) for row in result.rows)
    order = sorted(measured, key=lambda place: (place[0], -1 if place[1] is None else place[1]))
    return [(str(i) if head is None else f"  kv head {head}", i, head) for i, head in order]


def _recipe(model: str | None, method: str | None, overrides: list[str]) -> Any:
    from ..recipe import shipped_recipes

    a_model = model is not None and not model.endswith((".yaml", ".yml")) and model not in shipped_recipes()
    chosen = method or (MAIN if a_model and not any(w.startswith("method=") for w in overrides) else None)
    return recipe_of(model, chosen, overrides)


def _folder(recipe: Any, output: Path | None) -> Path:
    return output or Path("runs") / f"{Path(recipe.teacher.name).name.lower()}-scan"


def _ready(recipe: Any, folder: Path, watch: Any) -> tuple[Any, Any, Any]:
    """The teacher, its tokenizer, and a little text."""
    from ..plan import check as check_plan
    from ..run import device_of
    from ..scan.material import small_corpus
    from ..scan.measure import check
    from ..teacher import load_teacher

    device = device_of(recipe)
    teacher, tokenizer = load_teacher(recipe.teacher, device)
    (check if recipe.plan is None else check_plan)(teacher, recipe)
    corpus = small_corpus(recipe, tokenizer, teacher, folder / "data", device, watch)
    return teacher, tokenizer, corpus


def _table(title: str, header: list[str], rows: list[list[str]]) -> None:
    from rich.table import Table

    table = Table(*header, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    stdout().print(table)
