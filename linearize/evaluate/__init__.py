"""What was kept: likelihood by position, recall by length, memory; the same text and prompts for all."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any, Protocol

from torch import Tensor, nn

from ..modeling.errors import EvaluationError
from ..progress import Progress, Watch
from ..recipe import Evaluate
from . import likelihood, recall
from .length_gate import LengthRow
from .likelihood import TEACHER, Bucket, Likelihood
from .memory import LayerMemory, Memory, memory
from .recall import Cell

__all__ = [
    "TEACHER",
    "Bucket",
    "Cell",
    "HeldOut",
    "LayerMemory",
    "LengthRow",
    "Likelihood",
    "Memory",
    "Results",
    "check",
    "digest_of_windows",
    "evaluate",
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
                int(length): {name: _likelihood(entry) for name, entry in by_model.items()}
                for length, by_model in tree["likelihood"].items()
            },
            recall=[Cell(**cell) for cell in tree["recall"]],
            memory={
                name: Memory([LayerMemory(**layer) for layer in entry["layers"]])
                for name, entry in tree["memory"].items()
            },
            windows={int(length): digest for length, digest in tree["windows"].items()},
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
) -> Results:
    """Measures teacher and students on the corpus' held-out text and on recall prompts drawn with `seed`."""
    models = {TEACHER: teacher, **students}
    check(teacher, tokenizer, corpus, config)
    windows = {length: corpus.held_out(length, config.sequences) for length in config.seq_lens}
    cells = len(config.recall_tasks) * config.recall_samples * sum(config.recall_lens)
    work = len(models) * (sum(batch[:, 1:].numel() for batch in windows.values()) + cells)
    meter = _Meter(progress, work)
    with _in_eval_mode(models.values()):
        measured = {
            length: likelihood.compare(
                teacher,
                students,
                batch,
                batch_size=config.batch_size,
                vocab_size=len(tokenizer),
                seed=seed,
                progress=meter.part(len(models) * length),
            )
            for length, batch in windows.items()
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
    return Results(
        source=corpus.label,
        models=list(models),
        seed=seed,
        likelihood=measured,
        recall=found,
        memory=memory(teacher, students),
        windows={length: digest_of_windows(batch) for length, batch in windows.items()},
    )


def check(teacher: nn.Module, tokenizer: Any, corpus: HeldOut, config: Evaluate) -> None:
    """Raise now what `evaluate` could not measure later: a context or text too short, needles that do not fit."""
    _check_lengths(teacher, config)
    for length in config.seq_lens:
        corpus.held_out(length, 1)
    text = corpus.held_out_tokens
    for task in config.recall_tasks:
        for length in config.recall_lens:
            recall.prompts(tokenizer, task, length, samples=1, seed=0, haystack_tokens=text)


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


@contextmanager
def _in_eval_mode(models: Any) -> Iterator[None]:
    """Dropout off while measuring, and as it was afterwards."""
    training = [model for model in models if model.training]
    for model in training:
        model.eval()
    try:
        yield
    finally:
        for model in training:
            model.train()


def _check_lengths(teacher: nn.Module, config: Evaluate) -> None:
    limit = getattr(teacher.config, "max_position_embeddings", None)
    for key, lengths in (("seq_lens", config.seq_lens), ("recall_lens", config.recall_lens)):
        if limit and max(lengths, default=0) > limit:
            raise EvaluationError(
                f"evaluate.{key}: {max(lengths)} is longer than the teacher's context of {limit}, "
                f"beyond which it is no reference; give at most {limit}"
            )


def digest_of_windows(windows: Tensor) -> str:
    """sha256 of the token ids, so that two runs can tell whether they read the same text."""
    return sha256(windows.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def _likelihood(tree: dict[str, Any]) -> Likelihood:
    tree = {key: _number(value) for key, value in tree.items()}
    intervals = {key: (_number(low), _number(high)) for key, (low, high) in tree["intervals"].items()}
    buckets = [Bucket(**{key: _number(value) for key, value in bucket.items()}) for bucket in tree["buckets"]]
    windows = {key: [_number(value) for value in tree[key]] for key in ("window_nll", "window_kl")}
    return Likelihood(**{**tree, **windows, "intervals": intervals, "buckets": buckets})


def _number(value: Any) -> Any:
    return math.nan if value is None else value


def _jsonable(value: Any) -> Any:
    """Keys as text; null for the numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {str(key): _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
