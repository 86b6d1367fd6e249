"""What was kept: likelihood by position, recall by length, memory; the same text and prompts for all."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from ..data import Corpus
from ..data.overlap import Overlap
from ..measures import Evaluate
from ..modeling.errors import EvaluationError
from ..progress import Progress, Watch
from . import ablations, continuation, harness, likelihood, recall, suite
from .ablations import Ablations, Stage
from .continuation import Continuations
from .gates import Gates, GatesFailed
from .harness import LmEval
from .length_gate import LengthRow
from .likelihood import TEACHER, Bucket, Likelihood
from .memory import LayerMemory, Memory, memory
from .recall import Cell
from .speed import SpeedResults
from .suite import SuiteCell, SuiteResults
from .timing import in_eval_mode

__all__ = [
    "TEACHER",
    "Ablations",
    "Bucket",
    "Cell",
    "Continuations",
    "Gates",
    "GatesFailed",
    "HeldOut",
    "LayerMemory",
    "LengthRow",
    "Likelihood",
    "LmEval",
    "Memory",
    "Overlap",
    "Results",
    "SpeedResults",
    "Stage",
    "SuiteCell",
    "SuiteResults",
    "check",
    "digest_of_windows",
    "evaluate",
    "exact_reach",
]


class HeldOut(Protocol):
    """Text that no model was trained on; `data.Corpus` is one."""

    @property
    def label(self) -> str:
        """Where the text is from, in words, as tables quote it."""
        ...

    @property
    def held_out_tokens(self) -> Tensor:
        """[N] all of it, in order."""
        ...

    def held_out(self, length: int, sequences: int) -> Tensor:
        """[N, length + 1] windows that do not overlap."""
        ...


@dataclass(frozen=True)
class Results:
    """Everything measured in one run; `to_dict` is JSON-safe and `from_dict` reads it back."""

    source: str
    models: list[str]
    seed: int
    likelihood: dict[int, dict[str, Likelihood]]
    """Length -> model -> measurement, the teacher first."""
    recall: list[Cell]
    memory: dict[str, Memory]
    windows: dict[int, str] = field(default_factory=dict)
    """Length -> sha256 of the held-out windows."""
    gates: Gates | None = None
    """Of the first student; None where they were not run."""
    ablations: Ablations | None = None
    """Of the first student; None where they were not run."""
    suite: SuiteResults | None = None
    """The recall suite, where the recipe asks for it."""
    continuation: Continuations | None = None
    """What the models write on freely, where the recipe asks for it."""
    speed: SpeedResults | None = None
    """Where `linearize bench` has timed the run's student."""
    overlap: dict[str, Overlap] = field(default_factory=dict)
    """Held-out text by name -> its runs of 13 tokens that were trained on; empty where either is not at hand."""
    lm_eval: LmEval | None = None
    length_gate: list[LengthRow] | None = None
    """Students against the window control at multiples of the training length; None where it was not asked for."""

    def cell(self, model: str, task: str, length: int) -> Cell:
        for cell in self.recall:
            if (cell.model, cell.task, cell.length) == (model, task, length):
                return cell
        raise KeyError((model, task, length))

    def to_dict(self) -> dict[str, Any]:
        return _jsonable(asdict(self))

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Results":
        return cls(
            source=tree["source"],
            models=list(tree["models"]),
            seed=tree["seed"],
            likelihood={
                int(length): {name: Likelihood.from_dict(entry) for name, entry in by_model.items()}
                for length, by_model in tree["likelihood"].items()
            },
            recall=[Cell(**cell) for cell in tree["recall"]],
            memory={
                name: Memory([LayerMemory(**layer) for layer in entry["layers"]])
                for name, entry in tree["memory"].items()
            },
            windows={int(length): digest for length, digest in tree["windows"].items()},
            gates=Gates.from_dict(tree["gates"]) if tree.get("gates") else None,
            ablations=Ablations.from_dict(tree["ablations"]) if tree.get("ablations") else None,
            suite=SuiteResults.from_dict(tree["suite"]) if tree.get("suite") else None,
            continuation=Continuations.from_dict(tree["continuation"]) if tree.get("continuation") else None,
            speed=SpeedResults.from_dict(tree["speed"]) if tree.get("speed") else None,
            overlap={name: Overlap(**entry) for name, entry in tree.get("overlap", {}).items()},
            lm_eval=LmEval.from_dict(tree["lm_eval"]) if tree.get("lm_eval") else None,
            length_gate=None
            if tree.get("length_gate") is None
            else [LengthRow.from_dict(row) for row in tree["length_gate"]],
        )


def evaluate(
    students: dict[str, nn.Module],
    teacher: nn.Module,
    tokenizer: Any,
    corpus: HeldOut,
    config: Evaluate,
    seed: int = 0,
    progress: Watch | None = None,
    suite_folder: Path | None = None,
    stages: Iterable[Stage] = (),
) -> Results:
    """Measures teacher and students on the corpus' held-out text and on recall prompts drawn with `seed`.

    The recall suite and what is written on freely, if asked for, are kept in `suite_folder`. `stages` are earlier
    states of the first student, which ablations are measured beside.
    """
    models = {TEACHER: teacher, **students}
    check(teacher, tokenizer, corpus, config)
    texts = {length: _windows(corpus, length, config.sequences) for length in config.seq_lens}
    windows = {length: given[0] for length, given in texts.items()}
    reach, train_len = exact_reach(next(iter(students.values()), None)), getattr(corpus, "seq_len", None)
    cells = len(config.recall_tasks) * config.recall_samples * sum(config.recall_lens)
    work = len(models) * (sum(batch[:, 1:].numel() for batch in windows.values()) + cells)
    meter = _Meter(progress, work)
    with in_eval_mode(models.values()):
        measured = {
            length: likelihood.compare(
                teacher,
                students,
                batch,
                batch_size=config.batch_size,
                vocab_size=len(tokenizer),
                named_spans=likelihood.spans(length, reach, train_len),
                sources=sources,
                documents=documents,
                seed=seed,
                progress=meter.part(len(models) * length),
            )
            for length, (batch, sources, documents) in texts.items()
        }
        found = [
            cell
            for task in config.recall_tasks
            for length in config.recall_lens
            for cell in recall.measure(
                models,
                tokenizer,
                [task],
                [length],
                config.recall_samples,
                seed,
                corpus.held_out_tokens,
                config.batch_size,
                progress=meter.part(config.recall_samples * length),
            )
        ]
        suited = _suite(models, tokenizer, corpus, config, progress, suite_folder)
        go_on = continuation.measure(
            models, tokenizer, config.continuation, corpus.held_out,
            batch_size=config.batch_size, seed=seed, folder=suite_folder, progress=progress,
        )  # fmt: skip
        by_task = _lm_eval(models, tokenizer, config, seed, progress)
    switched = None
    if config.ablations.enabled:
        switched = _ablations(
            students, teacher, tokenizer, windows, measured, found, config, seed, progress, stages
        )
    return Results(
        source=corpus.label,
        models=list(models),
        seed=seed,
        likelihood=measured,
        recall=found,
        memory=memory(teacher, students),
        windows={length: digest_of_windows(batch) for length, batch in windows.items()},
        overlap=corpus.overlaps() if isinstance(corpus, Corpus) else {},
        ablations=switched,
        suite=suited,
        continuation=go_on,
        lm_eval=by_task,
    )


def _ablations(
    students: dict[str, nn.Module],
    teacher: nn.Module,
    tokenizer: Any,
    windows: dict[int, Tensor],
    measured: dict[int, dict[str, Likelihood]],
    cells: list[Cell],
    config: Evaluate,
    seed: int,
    progress: Watch | None,
    stages: Iterable[Stage],
) -> Ablations | None:
    """Of the first student, which is the one in question, on the longest windows."""
    name, student = next(iter(students.items()), ("", None))
    if student is None or not windows:
        return None
    length = max(windows)

    def hear(done: int, total: int) -> None:
        if progress is not None:
            progress(Progress("ablations", done, total, unit="windows"))

    terms: dict[str, Any] = {"batch_size": config.batch_size, "vocab_size": len(tokenizer), "seed": seed}
    rows = ablations.ablate(
        student,
        teacher,
        windows[length],
        per_layer=config.ablations.per_layer,
        progress=hear,
        **terms,
    )
    rows += ablations.stage_rows(stages, teacher, windows[length], measured[length][name], **terms)
    rows += ablations.control_rows(measured[length], length, name, seed)
    told = ablations.verdict(cells, ablations.window_of(student), student=name, seed=seed)
    return Ablations(rows, told)


def _lm_eval(
    models: dict[str, nn.Module], tokenizer: Any, config: Evaluate, seed: int, progress: Watch | None
) -> LmEval | None:
    """The tasks of lm-eval that the recipe asks for, if any."""
    asked = config.lm_eval
    if not asked.tasks:
        return None

    def hear(done: int, total: int) -> None:
        if progress is not None:
            progress(Progress("lm-eval", done, total, unit="tasks"))

    return harness.measure(
        models,
        tokenizer,
        asked.tasks,
        folder=asked.folder,
        num_fewshot=asked.num_fewshot,
        limit=asked.limit,
        batch_size=asked.batch_size,
        seed=seed,
        progress=hear,
    )


def exact_reach(student: Any) -> int | None:
    """Positions up to which every mixer of a student still sees all tokens exactly; None where one has no window.

    A terraced or chunked query sees its own block and the whole one before it.
    """
    reaches = []
    for mixer in getattr(student, "mixers", dict)().values():
        method = mixer.config
        blocks = 2 if getattr(method, "window_kind", None) == "terraced" else 1
        reaches.append(
            blocks * (getattr(method, "window", None) or 0) or 2 * (getattr(method, "chunk", None) or 0)
        )
    return min(reaches, default=0) or None


def _windows(corpus: HeldOut, length: int, sequences: int) -> tuple[Tensor, list[str], list[int] | None]:
    """Held-out windows, and of each its text and document; a text that is no corpus is one source of one document."""
    if isinstance(corpus, Corpus):
        return corpus.held_out_windows(length, sequences)
    windows = corpus.held_out(length, sequences)
    return windows, [corpus.label] * len(windows), None


def check(teacher: nn.Module, tokenizer: Any, corpus: HeldOut, config: Evaluate) -> None:
    """Raise now what `evaluate` could not measure later: nothing at all, or where context or text are too short."""
    texts, recall_cells = config.seq_lens, config.recall_tasks and config.recall_lens
    generated = config.suite.wanted or config.continuation.wanted
    if not (texts or recall_cells or generated or config.lm_eval.tasks or config.gates):
        raise EvaluationError(
            "evaluate: nothing is to be measured: there are no seq_lens and no recall_tasks with recall_lens, and "
            "neither the suite nor continuation nor lm_eval nor gates are asked for; ask for one of them"
        )
    _check_lengths(teacher, config)
    for length in config.seq_lens:
        corpus.held_out(length, 1)
    continuation.check(config.continuation, corpus.held_out, _context(teacher))
    if config.lm_eval.tasks:
        harness.check(config.lm_eval.tasks, config.lm_eval.folder)
    text = corpus.held_out_tokens
    for task in config.recall_tasks:
        for length in config.recall_lens:
            recall.prompts(tokenizer, task, length, samples=1, seed=0, haystack_tokens=text)
    if config.suite.wanted:
        haystack = suite.haystack_of(config.suite, tokenizer, text, corpus.label)
        suite.check(tokenizer, config.suite, haystack, _context(teacher))


def _suite(
    models: dict[str, nn.Module],
    tokenizer: Any,
    corpus: HeldOut,
    config: Evaluate,
    progress: Watch | None,
    folder: Path | None,
) -> SuiteResults | None:
    if not config.suite.wanted:
        return None
    return suite.measure(
        models,
        tokenizer,
        config.suite,
        suite.haystack_of(config.suite, tokenizer, corpus.held_out_tokens, corpus.label),
        limit=_context(models[TEACHER]),
        batch_size=config.batch_size,
        folder=folder,
        progress=progress,
    )


class _Meter:
    """Adds the parts of an evaluation up to one count of tokens."""

    def __init__(self, watch: Watch | None, total: int):
        self.watch, self.total, self.base, self.done = watch, total, 0, 0

    def part(self, tokens_per_unit: int) -> Callable[[int, int], None]:
        self.base = self.done

        def hear(done: int, _: int) -> None:
            self.done = self.base + done * tokens_per_unit
            if self.watch is not None:
                self.watch(Progress("evaluate", self.done, self.total))

        return hear


def _context(teacher: nn.Module) -> int | None:
    return getattr(teacher.config, "max_position_embeddings", None)


def _check_lengths(teacher: nn.Module, config: Evaluate) -> None:
    limit = _context(teacher)
    if config.suite.wanted:
        suite.lengths_of(config.suite, limit)
    for key, lengths in (("seq_lens", config.seq_lens), ("recall_lens", config.recall_lens)):
        if limit and max(lengths, default=0) > limit:
            raise EvaluationError(
                f"evaluate.{key}: {max(lengths)} is longer than the teacher's context of {limit}, "
                f"beyond which it is no reference; give at most {limit}"
            )


def digest_of_windows(windows: Tensor) -> str:
    """sha256 of the token ids, so that two runs can tell whether they read the same text."""
    return sha256(windows.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def _jsonable(value: Any) -> Any:
    """Keys as text; null for the numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {str(key): _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
