"""The scan itself: lines for every layer and candidate, resumable, and what is read back from them."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..convert import convert, unconvert
from ..data import Corpus
from ..data.pool import model_digest
from ..evaluate.statistics import wilson
from ..files import write_json, write_text
from ..modeling.errors import EvaluationError, RecipeError
from ..probe import Probed, probe
from ..progress import Progress, Watch
from ..provenance import origin
from ..recipe import Recipe
from ..train.transfer import transfer
from . import page, selectors
from .bench import ANSWERED, Bench, Tally, above_zero, recalled
from .candidates import SOFTMAX, Candidate, candidates, fields_of
from .material import batches, lengths
from .oracle import Memo

RECORD, RESULT, PAGE = "scan.jsonl", "scan.json", "scan.html"
FREE = ("budgets", "chunks", "windows", "methods", "heads", "selectors")
"""Settings of a scan that only say which lines there are: another value adds lines to a folder."""


@dataclass(frozen=True)
class Row:
    """One candidate in one layer (or one kv head of it) alone; every figure against the teacher."""

    layer: int
    head: int | None
    candidate: str
    kl: float
    kl_low: float
    kl_high: float
    next_token: float
    """Nats that the loss on the next token has gained."""
    error: float
    """Squared error of the layer's output over the output's square, on text."""
    answered: int
    lost: int
    answer_loss: float
    cells: dict[str, list[int]]

    def loss(self, recall_weight: float) -> float:
        """What a plan adds up: KL, and the nats lost per answer token times a weight."""
        return above_zero(self.kl) + (recall_weight * self.answer_loss if recall_weight else 0.0)


@dataclass(frozen=True)
class ScanResult:
    """All rows with what they mean."""

    teacher: str
    layers: list[int]
    candidates: dict[str, dict[str, Any]]
    """Name -> fields of the method, in the order tried."""
    rows: list[Row]
    windows: int
    length: int
    teacher_cells: dict[str, list[int]]
    """``task length`` -> prompts, the teacher's answers."""
    selectors: dict[str, dict[str, float]]
    """Name -> layer -> score; a higher one asks for the layer to be kept."""
    correlations: dict[str, dict[str, float]]
    """Spearman's, between selectors."""
    words: list[str]
    settings: dict[str, Any]
    origin: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def row(self, layer: int, candidate: str, head: int | None = None) -> Row:
        for row in self.rows:
            if (row.layer, row.head, row.candidate) == (layer, head, candidate):
                return row
        raise KeyError((layer, head, candidate))

    @property
    def reference(self) -> str:
        """The candidate by which layers are compared: the one that keeps least."""
        return reference(self.candidates)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "ScanResult":
        return cls(**{**tree, "rows": [Row(**row) for row in tree["rows"]]})


def reference(known: Mapping[str, Mapping[str, Any]]) -> str:
    """The first window, else the candidate tried first."""
    return next((name for name, fields in known.items() if fields["name"] == "window"), next(iter(known)))


def scan(
    model: Any,
    tokenizer: Any,
    corpus: Corpus,
    recipe: Recipe,
    *,
    folder: Path,
    progress: Watch | None = None,
) -> ScanResult:
    """Measure every candidate of the recipe in every layer alone; the model is the plain teacher, before and after.

    Writes ``scan.jsonl``, ``scan.json`` and ``scan.html`` into ``folder`` and goes on from lines that are there. Raises
    :class:`RecipeError` for a folder of another scan, or a length beyond the teacher's context.
    """
    check(model, recipe)
    found = scanned_layers(model, recipe)
    tried = candidates(recipe)
    settings = settings_of(model, corpus, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    done, teacher = _begin(folder / RECORD, settings)
    bench = bench_of(model, tokenizer, corpus, recipe, found)
    wanted = [
        (layer, head, candidate)
        for layer in found
        for candidate in tried
        for head in [None, *_heads(recipe, layer, found[layer])]
        if candidate.name != SOFTMAX
    ]
    missing = [key for key in wanted if (key[0], key[1], key[2].name) not in done]
    train(bench, corpus, recipe, {key[2].name: key[2] for key in missing}, folder, progress)
    meter = _Meter(progress, bench.tokens * len({layer for layer, *_ in missing}))
    known: dict[int, tuple[int, Any]] = {}
    for layer in found:
        mine = [(head, candidate) for at, head, candidate in missing if at == layer]
        if not mine:
            continue
        memo = Memo(0)
        seats = {(head, c.name): bench.seat(c, layer, memo, head) for head, c in mine}
        reference_tally, tallies = bench.alone(layer, seats, memo, known, meter.add)
        teacher = {f"{task} {n}": [len(hits), sum(hits)] for (task, n), hits in reference_tally.hits.items()}
        rows = [row_of(layer, head, name, reference_tally, tally) for (head, name), tally in tallies.items()]
        _append(folder / RECORD, teacher, rows)
        done |= {(row.layer, row.head, row.candidate): row for row in rows}
    rows = [done[layer, head, candidate.name] for layer, head, candidate in wanted]
    # Heads that an earlier call has measured stay, though this one does not ask for them.
    asked, names = {(row.layer, row.head, row.candidate) for row in rows}, {c.name for c in tried}
    heads = [row for key, row in done.items() if row.head is not None and key not in asked]
    rows += [row for row in heads if row.layer in found and row.candidate in names]
    rows += [_exact(layer, rows) for layer in found]
    scores = {}
    if recipe.scan.selectors and len(found) > 1:
        scores = selectors.scores(bench, rows, {c.name: c for c in tried}, folder, progress)
    result = ScanResult(
        teacher=recipe.teacher.name,
        layers=list(found),
        candidates={candidate.name: fields_of(candidate.method) for candidate in tried},
        rows=rows,
        windows=recipe.scan.sequences,
        length=recipe.scan.seq_len,
        teacher_cells=teacher,
        selectors=scores,
        correlations=selectors.correlations(scores),
        words=[],
        settings=settings,
        origin=origin(),
        notes=_notes(recipe, tried, teacher),
    )
    result.words.extend(page.words(result))
    write_json(folder / RESULT, result.to_dict())
    write_text(folder / PAGE, page.html(result))
    return result


def _heads(recipe: Recipe, layer: int, probed: Probed) -> range:
    """The kv heads of a layer that are measured alone; none where there is but one."""
    asked, count = recipe.scan.heads, probed.geometry.kv_heads
    mine = layer in asked if isinstance(asked, list) else asked
    return range(count if mine and count > 1 else 0)


def read(folder: Path) -> ScanResult:
    """The result in a scan's folder."""
    try:
        return ScanResult.from_dict(json.loads((folder / RESULT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RecipeError(
            f"{folder / RESULT}: cannot be read ({error}); run `linearize scan` again"
        ) from None


def check(model: Any, recipe: Recipe) -> None:
    """Refuse lengths at which the teacher is no reference."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for key, value in (
        ("seq_len", recipe.scan.seq_len),
        ("recall_lens", max(lengths(recipe.scan), default=0)),
    ):
        if limit and value > limit:
            raise RecipeError(
                f"scan.{key}: {value} is longer than the teacher's context of {limit}; give at most {limit}"
            )


def scanned_layers(model: Any, recipe: Recipe) -> dict[int, Probed]:
    """The layers that ``layers: all`` would convert; refused where ``scan.heads`` names another."""
    found = probe(model)
    chosen = {i: x for i, x in found.items() if recipe.convert_sliding or x.sliding_window is None}
    if not chosen:
        raise RecipeError(
            "scan: every layer has a sliding window of its own; set convert_sliding=true to scan them all the same"
        )
    if isinstance(recipe.scan.heads, list) and (others := sorted(set(recipe.scan.heads) - set(chosen))):
        raise RecipeError(
            f"scan.heads: {others} are no layers of this scan; choose from {', '.join(map(str, chosen))}"
        )
    return chosen


def bench_of(
    model: Any, tokenizer: Any, corpus: Corpus, recipe: Recipe, found: Mapping[int, Probed]
) -> Bench:
    """What a scan measures with; the same text and prompts every time."""
    made = batches(recipe.scan, corpus, tokenizer, recipe.seed, len(tokenizer))
    return Bench(model, found, made, recipe.scan, len(tokenizer), recipe.seed)


def settings_of(model: Any, corpus: Corpus, recipe: Recipe) -> dict[str, Any]:
    """What two scans must share for their lines to belong together."""
    return {
        "format": 2,
        "teacher": model_digest(model),
        "corpus": corpus.fingerprint,
        "seed": recipe.seed,
        "scan": recipe.scan.model_dump(mode="json", exclude=set(FREE)),
    }


def train(
    bench: Bench,
    corpus: Corpus,
    recipe: Recipe,
    tried: Mapping[str, Candidate],
    folder: Path,
    progress: Watch | None,
) -> None:
    """The short transfer of candidates that learn: all layers at once, each on the teacher's own inputs."""
    if not recipe.scan.transfer_tokens:
        return
    config = recipe.transfer.model_copy(update={"tokens": recipe.scan.transfer_tokens})
    for name, candidate in tried.items():
        if not candidate.trains or name in bench.trained:
            continue
        model: Any = convert(bench.model, dict.fromkeys(bench.found, candidate.method))
        try:
            below = folder / "transfer" / name.replace(" ", "-")
            transfer(
                model, corpus, config, folder=below, seed=recipe.seed, device=bench.device, progress=progress
            )
            bench.trained[name] = {i: mixer.requires_grad_(False) for i, mixer in model.mixers().items()}
        finally:
            unconvert(model)


def row_of(layer: int, head: int | None, name: str, teacher: Tally, student: Tally) -> Row:
    """The figures of one line."""
    found = recalled(teacher, student)
    low, high = student.kl_interval() if len(student.windows) > 1 else (student.kl, student.kl)
    return Row(
        layer,
        head,
        name,
        kl=student.kl,
        kl_low=low,
        kl_high=high,
        next_token=student.nll - teacher.nll,
        error=student.error / max(student.power, 1e-30),
        answered=found.answered,
        lost=found.lost,
        answer_loss=found.answer_loss,
        cells=found.cells,
    )


def _exact(layer: int, rows: list[Row]) -> Row:
    """Softmax kept: nothing is lost, and nothing has to be measured."""
    like = next(row for row in rows if row.layer == layer)
    cells = {name: [n, teacher, teacher] for name, (n, teacher, _) in like.cells.items()}
    return Row(layer, None, SOFTMAX, 0.0, 0.0, 0.0, 0.0, 0.0, like.answered, 0, 0.0, cells)


def _notes(recipe: Recipe, tried: list[Candidate], teacher: Mapping[str, list[int]]) -> list[str]:
    told = []
    if any(candidate.method.name == "salient" for candidate in tried):
        told.append(
            f"Salient is measured untrained: a stand-in for its score explains {100 * recipe.scan.score_fit:.0f} % "
            "of the variance of what the score is taught."
        )
    if any(candidate.trains for candidate in tried):
        spent = recipe.scan.transfer_tokens
        told.append(
            f"Other methods had {spent:,} tokens of transfer." if spent else "Other methods are untrained."
        )
    for cell, (count, right) in teacher.items():
        if right < ANSWERED * count:
            low, high = wilson(right, count)
            told.append(
                f"{cell}: the teacher answers {right} of {count} itself [{100 * low:.0f}, {100 * high:.0f} %]; "
                "not counted."
            )
    return told


def require_recall(result: ScanResult) -> None:
    """Raise where a least recall is asked for and the teacher has none to lose."""
    if not any(row.answered for row in result.rows):
        told = ", ".join(
            f"{right} of {count} at {cell}" for cell, (count, right) in result.teacher_cells.items()
        )
        raise EvaluationError(
            f"plan.min_recall: the teacher fails the recall tasks itself ({told or 'none was asked'}); "
            "leave min_recall out, or choose other scan.recall_tasks or shorter scan.recall_lens"
        )


def _begin(path: Path, settings: dict[str, Any]) -> tuple[dict[Any, Row], dict[str, list[int]]]:
    """Lines that are there already; a last line that was cut off by a crash is dropped."""
    rows: dict[Any, Row] = {}
    teacher: dict[str, list[int]] = {}
    if not path.exists():
        write_text(path, json.dumps({"settings": settings}) + "\n")
        return rows, teacher
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = []
    for line in lines:
        try:
            tree = json.loads(line)
        except ValueError:
            break
        if not line.endswith("\n"):
            break
        whole.append(line)
        if "settings" in tree and tree["settings"] != settings:
            changed = [key for key in settings if settings[key] != tree["settings"].get(key)]
            raise RecipeError(
                f"{path}: holds a scan with another {' and '.join(changed)}; choose another folder, or remove this one"
            )
        if "row" in tree:
            row = Row(**tree["row"])
            rows[row.layer, row.head, row.candidate] = row
        teacher = tree.get("teacher", teacher)
    if len(whole) < len(lines) or not whole:
        write_text(path, "".join(whole) or json.dumps({"settings": settings}) + "\n")
    return rows, teacher


def _append(path: Path, teacher: dict[str, list[int]], rows: list[Row]) -> None:
    with path.open("a", encoding="utf-8") as file:
        for tree in [{"teacher": teacher}, *({"row": asdict(row)} for row in rows)]:
            file.write(json.dumps(tree) + "\n")
        file.flush()
        os.fsync(file.fileno())


class _Meter:
    """Adds batches up to one count of tokens."""

    def __init__(self, watch: Watch | None, total: int):
        self.watch, self.total, self.done = watch, total, 0

    def add(self, tokens: int) -> None:
        self.done += tokens
        if self.watch is not None:
            self.watch(Progress("scan", self.done, self.total))
