"""The recall suite: teacher and students answer the same questions, by generating and by likelihood.

A cell is one task at one length for one model: a line over all depths (depth None), and one for each depth that
was asked for. Where the teacher fails, a cell says nothing of its students: it is gated.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..measures import Suite
from ..modeling.errors import DataError, EvaluationError
from ..progress import Progress, Watch
from ..tasks.budget import Haystack, Question, noise
from ..tasks.form import Form, chat
from ..tasks.suite import COUNTS, REPORTABLE, SUITE, SuiteTask, questions, tokens_of
from . import answers, cells
from .cells import Answer
from .statistics import Interval, bootstrap, wilson

GATE = 0.8  # the least lower bound of the teacher's score at which a cell can tell students apart
LENGTHS = tuple(1024 * 2**k for k in range(6))
HAYSTACK_TOKENS = 2**20  # of held-out text, decoded into a haystack
ALONE_TOKENS = 256  # what a question without haystack counts for in progress


@dataclass(frozen=True)
class SuiteCell:
    """One model at one task and length; `depth` is None over all depths."""

    task: str
    label: str
    length: int
    depth: float | None
    model: str
    samples: int
    score: float
    """Mean of the task's own score; a share where an answer is right or wrong."""
    low: float
    high: float
    """95 %: Wilson where answers are right or wrong, bootstrap of the mean where they are right in part."""
    correct: int
    """Answers that are wholly right."""
    strict: float
    """Share of answers whose first strings of the answer's kind are right: nothing gained by writing many."""
    likelihood: float | None
    """Share wholly right by likelihood: every token the arg-max under teacher forcing, or the likeliest choice.

    Several answers are forced one after another: see :func:`answers.found_of`.
    """
    gap: float | None
    """Points by which likelihood exceeds the share that is wholly right when generated."""
    gated: bool
    """The teacher fails here, so that nothing is said of its students."""
    tokens: float
    """Mean of prompt and room for the answer."""
    digest: str
    """sha256 of the questions: cells with one digest were asked the same."""
    hits: str
    """One digit per question, 1 where the answer is wholly right, for paired tests."""
    difference: float | None = None
    """Score minus the teacher's, over all depths, and its paired bootstrap interval."""
    difference_interval: Interval | None = None
    parts: float | None = None
    """Of several answers, the mean share that is right by likelihood, beside `score`; None where there is one."""
    parts_gap: float | None = None
    """Points by which it exceeds the score."""

    @property
    def reportable(self) -> bool:
        return self.samples >= REPORTABLE


@dataclass(frozen=True)
class NotRun:
    """A task that was not measured at a length, and why."""

    task: str
    label: str
    length: int
    reason: str


@dataclass(frozen=True)
class SuiteResults:
    """Every cell, the rules that were in force, and what was not run."""

    cells: list[SuiteCell]
    notes: list[str]
    seed: int
    haystack: dict[str, str]
    baselines: list[SuiteCell] = field(default_factory=list)
    """Rules that understand nothing, on the same questions, in the place of a model."""
    not_run: list[NotRun] = field(default_factory=list)

    def lines(self) -> list[SuiteCell]:
        """The cells over all depths."""
        return [cell for cell in self.cells if cell.depth is None]

    def cell(self, model: str, task: str, length: int, depth: float | None = None) -> SuiteCell:
        for cell in self.cells:
            if (cell.model, cell.task, cell.length, cell.depth) == (model, task, length, depth):
                return cell
        raise KeyError((model, task, length, depth))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; not-a-number stays for the caller to turn into null."""
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "SuiteResults":
        return cls(
            cells=[_cell(entry) for entry in tree["cells"]],
            notes=list(tree["notes"]),
            seed=tree["seed"],
            haystack=dict(tree["haystack"]),
            baselines=[_cell(entry) for entry in tree["baselines"]],
            not_run=[NotRun(**entry) for entry in tree["not_run"]],
        )


def haystack_of(config: Suite, tokenizer: Any, held_out_tokens: torch.Tensor, label: str) -> Haystack:
    """The text that needles are hidden in: held-out text, a file's, or the filler line."""
    if config.haystack == "noise":
        return noise()
    if config.haystack == "held_out":
        text = tokenizer.decode(held_out_tokens[:HAYSTACK_TOKENS].tolist(), skip_special_tokens=True)
        return Haystack(label, text)
    try:
        return Haystack(Path(config.haystack).name, Path(config.haystack).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(
            f"evaluate.suite.haystack: {config.haystack}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}; "
            "name a text file, or 'held_out', or 'noise'"
        ) from None


def form_of(config: Suite, tokenizer: Any) -> Form | None:
    """What stands around every prompt. Raises EvaluationError where a chat is asked for and there is no template."""
    if not config.chat:
        return None
    try:
        return chat(tokenizer)
    except DataError as error:
        raise EvaluationError(f"evaluate.suite.chat: {error}; leave it false") from None


def lengths_of(config: Suite, limit: int | None) -> list[int]:
    """The lengths asked for, or doublings from 1,024 to the teacher's context `limit`, at most 32,768.

    Raises EvaluationError for a length beyond the context.
    """
    if config.lengths:
        if limit and max(config.lengths) > limit:
            raise EvaluationError(
                f"evaluate.suite.lengths: {max(config.lengths)} is longer than the teacher's context of {limit}, "
                f"beyond which it is no reference; give at most {limit}"
            )
        return list(config.lengths)
    fitting = [length for length in LENGTHS if not limit or length <= limit]
    return fitting or [limit or LENGTHS[0]]


def check(tokenizer: Any, config: Suite, haystack: Haystack, limit: int | None = None) -> None:
    """Raise now what would leave `measure` with nothing to ask: one question of each task and length is made."""
    reason, form = "", form_of(config, tokenizer)
    for task in [SUITE[name] for name in config.tasks or SUITE]:
        for length in lengths_of(config, limit):
            try:
                asked = questions(
                    task, tokenizer, length,
                    samples=1, seed=config.seed, depths=config.depths, fill=config.fill, haystack=haystack, form=form,
                )  # fmt: skip
                _refuse_long(task, asked, limit)
                return
            except DataError as error:
                reason = reason or str(error)
    raise EvaluationError(f"evaluate.suite: nothing can be run; {reason}")


def measure(
    models: dict[str, nn.Module],
    tokenizer: Any,
    config: Suite,
    haystack: Haystack,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    folder: Path | None = None,
    progress: Watch | None = None,
) -> SuiteResults:
    """Every model, the teacher first, on every task and length of the recipe.

    With a `folder`, each task and length is one file of JSON lines there, a line per question, and what is
    there already for the same models and questions is not asked again. Raises EvaluationError where nothing
    can be run.
    """
    if not models:
        raise EvaluationError("evaluate.suite: no model to measure; give a teacher at least")
    samples, form = config.samples or COUNTS[config.preset or "standard"], form_of(config, tokenizer)
    tasks = [SUITE[name] for name in config.tasks or SUITE]
    lengths = lengths_of(config, limit)
    plan = [(task, length) for task in tasks for length in ([0] if task.alone else []) + lengths]
    meter = _Meter(progress, [len(models) * samples * (length or ALONE_TOKENS) for _, length in plan])
    who = cells.fingerprint(models) if folder is not None else ""
    found: list[SuiteCell] = []
    guessed: list[SuiteCell] = []
    skipped: list[NotRun] = []
    for at, (task, length) in enumerate(plan):
        meter.start(at)
        try:
            asked = questions(
                task, tokenizer, length,
                samples=samples, seed=config.seed, depths=config.depths, fill=config.fill, haystack=haystack, form=form,
            )  # fmt: skip
            _refuse_long(task, asked, limit)
        except DataError as error:
            skipped.append(NotRun(task.name, task.label, length, str(error)))
            continue
        place = None if folder is None else folder / cells.file_name(task.label, length)
        given = cells.read(place, task, asked, who, list(models)) if place is not None else None
        if given is None:
            given = {}
            for name, model in models.items():
                given[name] = answers.answer(
                    model, tokenizer, task, [question for _, question in asked],
                    batch_size=batch_size, heard=meter.hear,
                )  # fmt: skip
            if place is not None:
                cells.write(place, task, length, asked, who, given)
        found += _cells(task, length, asked, given)
        guessed += _guesses(task, length, asked)
    meter.start(len(plan))
    if not found:
        raise EvaluationError(f"evaluate.suite: nothing could be run; {skipped[0].reason}")
    return SuiteResults(
        found,
        notes(config, haystack, tasks, samples),
        config.seed,
        {"name": haystack.name, "sha256": haystack.sha256},
        guessed,
        skipped,
    )


def notes(config: Suite, haystack: Haystack, tasks: Sequence[SuiteTask], samples: int) -> list[str]:
    """The rules that a reader of the figures has to know."""
    form = "raw text, no chat template"
    if config.chat:
        form = "one turn in the tokenizer's chat template, and the answer's prefix begins the reply"
    told = [
        f"Prompts are {form}; greedy decoding; fill {config.fill}; seed {config.seed}; "
        f"{samples} prompts a task and length, rounded up to equally many at each depth.",
        f"Haystack of the tasks that need text: {haystack.name} (sha256 {haystack.sha256[:16]}); "
        "not RULER's essays, and not comparable with its figures.",
        "Keys and words are drawn from linearize's own lists, not from wonderwords.",
        "Likelihood: every answer token the arg-max under teacher forcing; of QA, the likeliest of the six places.",
    ]
    if several := [task.label for task in tasks if task.several and task.metric == "contains"]:
        told.append(
            f"Likelihood of several answers ({', '.join(several)}): they are forced one after another (MQ in the order "
            "asked, MV and CWE of first appearance, VT of the chain, FWE of frequency), with the commas or numbers "
            "between them given; an answer is right where every arg-max goes on with any answer still due, so that "
            "order does not count. Each: share of answers; the figure before it: all of them right."
        )
    if any(task.name == "cwe" for task in tasks):
        told.append("CWE: a solved list stands in front, which lm-eval leaves out.")
    return told


def _refuse_long(task: SuiteTask, asked: Any, limit: int | None) -> None:
    longest = max(tokens_of(task, question) for _, question in asked)
    if limit and longest > limit:
        raise DataError(f"{task.name}: {longest} tokens are more than the teacher's context of {limit}")


def _cells(
    task: SuiteTask,
    length: int,
    asked: Sequence[tuple[float | None, Question]],
    given: dict[str, list[Answer]],
) -> list[SuiteCell]:
    """The line of every model, then its depths; the first model is the teacher."""
    teacher = next(iter(given))
    groups: dict[float | None, list[int]] = {None: list(range(len(asked)))}
    for index, (depth, _) in enumerate(asked):
        if depth is not None:
            groups.setdefault(depth, []).append(index)
    line_gated = False
    out = []
    for depth, members in groups.items():
        questions_of = [asked[index][1] for index in members]
        base = [given[teacher][index].score for index in members]
        low = _interval(task, base)[0]
        fails = low <= task.chance if task.metric == "place" else low < GATE
        # A depth with too few prompts for a verdict of its own takes the line's.
        gated = line_gated if depth is not None and len(members) < REPORTABLE else fails
        line_gated = gated if depth is None else line_gated
        for name, rows in given.items():
            picked = [rows[index] for index in members]
            cell = _cell_of(task, length, depth, name, questions_of, picked, gated)
            if depth is None and name != teacher:
                cell = _beside(cell, [row.score for row in picked], base)
            out.append(cell)
    return out


def _cell_of(
    task: SuiteTask,
    length: int,
    depth: float | None,
    model: str,
    asked: Sequence[Question],
    rows: Sequence[Answer],
    gated: bool,
) -> SuiteCell:
    scores = [row.score for row in rows]
    hits = "".join(str(int(score == 1)) for score in scores)
    known = [row.likelihood for row in rows if row.likelihood is not None]
    likelihood = sum(known) / len(known) if known else None
    shares = [row.parts for row in rows if row.parts is not None]
    parts, score = (sum(shares) / len(shares) if shares else None), sum(scores) / len(rows)
    return SuiteCell(
        task.name, task.label, length, depth, model, len(rows), score, *_interval(task, scores),
        correct=hits.count("1"),
        strict=sum(row.strict for row in rows) / len(rows),
        likelihood=likelihood,
        gap=None if likelihood is None else 100 * (likelihood - hits.count("1") / len(rows)),
        gated=gated,
        tokens=sum(tokens_of(task, question) for question in asked) / len(rows),
        digest=cells.digest(asked),
        hits=hits,
        parts=parts,
        parts_gap=None if parts is None else 100 * (parts - score),
    )  # fmt: skip


def _interval(task: SuiteTask, scores: Sequence[float]) -> Interval:
    if task.several:
        column = torch.tensor(scores, dtype=torch.double)[:, None]
        return bootstrap(column, lambda totals: totals[:, 0] / len(scores))
    return wilson(sum(score == 1 for score in scores), len(scores))


def _beside(cell: SuiteCell, scores: Sequence[float], teacher: Sequence[float]) -> SuiteCell:
    apart = torch.tensor(scores, dtype=torch.double) - torch.tensor(teacher, dtype=torch.double)
    interval = bootstrap(apart[:, None], lambda totals: totals[:, 0] / len(scores))
    return SuiteCell(**{**cell.__dict__, "difference": apart.mean().item(), "difference_interval": interval})


def _guesses(task: SuiteTask, length: int, asked: Sequence[tuple[float | None, Question]]) -> list[SuiteCell]:
    """What the rules that understand nothing find of the same questions."""
    only = [question for _, question in asked]
    out = []
    for name in only[0].guesses:
        right = [question.guesses[name] == question.references[0] for question in only]
        rows = [Answer("", float(hit), float(hit), hit, None, None) for hit in right]
        out.append(_cell_of(task, length, None, name, only, rows, False))
    return out


def _cell(tree: dict[str, Any]) -> SuiteCell:
    def number(value: Any) -> Any:
        return math.nan if value is None else value

    interval = tree["difference_interval"]
    bounds = {"low": number(tree["low"]), "high": number(tree["high"])}
    return SuiteCell(
        **{
            **tree,
            **bounds,
            "difference_interval": interval and (number(interval[0]), number(interval[1])),
        }
    )


class _Meter:
    """Tokens of the parts that are behind us; a part counts as its own size, whatever was read of it."""

    def __init__(self, watch: Watch | None, parts: Sequence[int]):
        self.watch, self.parts, self.at, self.inside = watch, parts, 0, 0

    def start(self, part: int) -> None:
        self.at, self.inside = part, 0
        self._tell()

    def hear(self, tokens: int) -> None:
        self.inside += tokens
        self._tell()

    def _tell(self) -> None:
        if self.watch is not None:
            inside = min(self.inside, self.parts[self.at]) if self.at < len(self.parts) else 0
            self.watch(Progress("suite", sum(self.parts[: self.at]) + inside, sum(self.parts)))
