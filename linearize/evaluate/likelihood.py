"""How far a student has drifted from its teacher, by position: perplexity, KL, agreement.

Teacher and students read the same windows in the same run, so every comparison is paired. Only the columns of
the tokenizer enter the softmaxes: a head padded to a round width changes nothing, whatever it holds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from ..modeling.errors import EvaluationError
from .heads import COLUMN_CHUNK, Parts, read_tokens, take_apart
from .statistics import Interval, Statistic, bootstrap, bootstrap_all, by_block

TEACHER = "teacher"

# Hidden states of one call, [rows, T, M], or its logits where they must be whole, stay below this many numbers
# (1 GiB in fp32); a row is never split.
MAX_LOGITS = 1 << 28
# Tokens whose logits exist at one time, COLUMN_CHUNK of them each.
TOKEN_CHUNK = 1024
IGNORED = -100
"""The label of a token that does not count."""
FEWEST_DOCUMENTS = 8
"""With fewer, an interval over documents says little; then windows are drawn, and `unit` says so."""


@dataclass(frozen=True)
class Bucket:
    """Positions [start, end) of every window; position t is the logits that predict token t + 1.

    `kl` is the mean, `top5` the share of positions whose teacher arg-max is among the model's five best. Borders
    double, except those of a bucket with a `label`, which is named by what the model sees from there.
    """

    start: int
    end: int
    tokens: int
    ppl: float
    kl: float
    top1: float
    kl_median: float = math.nan
    kl_p99: float = math.nan
    top5: float = math.nan
    intervals: dict[str, Interval] = field(default_factory=dict)
    """Of ppl, kl, top1 and ppl_difference, 95 %."""
    label: str = ""


@dataclass(frozen=True)
class Source:
    """One held-out text by its name: what a model does on its windows alone."""

    name: str
    tokens: int
    sequences: int
    ppl: float
    kl: float
    top1: float
    intervals: dict[str, Interval]


@dataclass(frozen=True)
class Likelihood:
    """One model on one length: totals, buckets, 95 % bootstrap intervals, sums of each window.

    `kl` is KL(teacher || model) in nats per token, `top1` the share of positions with the teacher's arg-max.
    `intervals` holds ppl, kl, top1 and ppl_difference (model - teacher, paired), drawn over `unit`.
    """

    ppl: float
    kl: float
    top1: float
    tokens: int
    sequences: int
    intervals: dict[str, Interval]
    buckets: list[Bucket]
    window_nll: list[float]
    window_kl: list[float]
    kl_median: float = math.nan
    kl_p99: float = math.nan
    top5: float = math.nan
    derived: list[Bucket] = field(default_factory=list)
    """Inside the window, from there to the training length, beyond it; as far as they are known and not empty."""
    sources: list[Source] = field(default_factory=list)
    window_tokens: list[int] = field(default_factory=list)
    """Empty where all windows have as many."""
    unit: str = "windows"
    """What the intervals draw: windows, or documents with all their windows."""
    blocks: list[int] = field(default_factory=list)
    """The unit that each window belongs to; empty where each is its own."""

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Likelihood":
        """Reads `dataclasses.asdict` back, after JSON; files of earlier versions lack the fields with defaults."""
        tree = {key: _number(value) for key, value in tree.items()}
        lists = {key: [_number(value) for value in tree[key]] for key in ("window_nll", "window_kl")}
        read: dict[str, Any] = {
            "buckets": [Bucket(**_with_intervals(bucket)) for bucket in tree["buckets"]],
            "derived": [Bucket(**_with_intervals(bucket)) for bucket in tree.get("derived", [])],
            "sources": [Source(**_with_intervals(source)) for source in tree.get("sources", [])],
        }
        return cls(**{**_with_intervals(tree), **lists, **read})


def edges(length: int) -> list[int]:
    """Bucket borders 0, 64, 128, 256, ... doubling to `length`."""
    borders = [0]
    border = 64
    while border < length:
        borders.append(border)
        border *= 2
    return [*borders, length]


def spans(length: int, window: int | None, train_len: int | None) -> dict[str, tuple[int, int]]:
    """The derived buckets of a length by name: inside the window, to the training length, beyond; empty ones left out.

    `window` is the number of positions that a student still sees exactly, None where it has none.
    """
    near, far = min(window or 0, length), min(train_len or length, length)
    middle = "window to training length" if near else "up to the training length"
    if train_len is None:
        middle = "beyond the window"
    named = {
        "inside the window": (0, near),
        middle: (near, max(near, far)),
        "beyond the training length": (max(near, far), length),
    }
    if near == 0 and train_len is None:
        return {}
    return {name: (start, end) for name, (start, end) in named.items() if end > start}


def rows_per_call(batch_size: int, length: int, width: int) -> int:
    """Rows of one forward call: `batch_size`, or fewer where `width` numbers a token would pass MAX_LOGITS."""
    return max(1, min(batch_size, MAX_LOGITS // max(1, length * width)))


@torch.no_grad()
def compare(
    teacher: nn.Module,
    students: dict[str, nn.Module],
    windows: Tensor,
    *,
    batch_size: int,
    vocab_size: int,
    labels: Tensor | None = None,
    named_spans: Mapping[str, tuple[int, int]] | None = None,
    sources: Sequence[str] | None = None,
    documents: Sequence[int] | None = None,
    token_chunk: int = TOKEN_CHUNK,
    column_chunk: int = COLUMN_CHUNK,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Likelihood]:
    """Likelihood of each model, the teacher first, on windows [N, T + 1] of token ids.

    `vocab_size` is len(tokenizer); columns from there on are padding. `labels` [N, T] are the next tokens, -100 where
    one does not count; without them every token does. `sources` and `documents` say of each window which text it is
    from and which document of all. Softmaxes are in fp32 (fp64 for fp64 models), `token_chunk` tokens and
    `column_chunk` columns at a time, and summed in fp64. `progress` hears (windows done, windows).
    """
    _check(students, windows, vocab_size)
    models = {TEACHER: teacher, **students}
    if labels is None:
        labels = windows[:, 1:]
    counted = labels != IGNORED
    if labels.shape != windows[:, 1:].shape or not bool(counted.any()):
        raise EvaluationError(
            f"labels: shape {tuple(labels.shape)} with {int(counted.sum())} tokens that count; "
            f"expected {tuple(windows[:, 1:].shape)}, and some"
        )
    count, length = labels.shape
    parts = [take_apart(model, windows[:, :-1], vocab_size, name) for name, model in models.items()]
    step = rows_per_call(batch_size, length, sum(part.width for part in parts))
    read = {name: _Readings.empty(count, length) for name in models}
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        _read_rows(
            parts, windows[rows, :-1], labels[rows], vocab_size, (token_chunk, column_chunk),
            [whole.rows(rows) for whole in read.values()],
        )  # fmt: skip
        if progress is not None:
            progress(rows.stop, count)
    blocks, unit = _blocks(documents, count)
    texts = list(sources) if sources is not None else []
    summary = _Summary(
        read[TEACHER], counted, edges(length), dict(named_spans or {}), texts, blocks, unit, seed
    )
    return {name: summary.of(readings) for name, readings in read.items()}


def difference(first: Likelihood, second: Likelihood, *, seed: int = 0) -> tuple[float, Interval]:
    """KL of `first` minus that of `second`, and its paired interval; below zero, `first` is closer."""
    if (first.tokens, first.sequences) != (second.tokens, second.sequences):
        raise ValueError("difference: the two models were not measured on the same windows")
    tokens = first.window_tokens or [first.tokens / first.sequences] * first.sequences
    rows = torch.tensor([first.window_kl, second.window_kl, tokens], dtype=torch.double).T
    if first.blocks:
        rows = by_block(rows, first.blocks)
    low, high = bootstrap(rows, lambda totals: (totals[:, 0] - totals[:, 1]) / totals[:, 2], seed=seed)
    return first.kl - second.kl, (low, high)


@dataclass(frozen=True)
class _Readings:
    """Per position [N, T], fp64: of one model. Zero where a token does not count."""

    nll: Tensor
    kl: Tensor
    top1: Tensor
    top5: Tensor

    @classmethod
    def empty(cls, count: int, length: int) -> "_Readings":
        return cls(*(torch.zeros(count, length, dtype=torch.double) for _ in range(4)))

    def rows(self, rows: slice) -> "_Readings":
        """A view: what is written to it is written here."""
        return _Readings(self.nll[rows], self.kl[rows], self.top1[rows], self.top5[rows])


def _read_rows(
    parts: Sequence[Parts],
    ids: Tensor,
    labels: Tensor,
    vocab_size: int,
    chunks: tuple[int, int],
    into: Sequence[_Readings],
) -> None:
    """One forward of every model on `ids` [B, T]; tokens that do not count are left out before the heads see them."""
    token_chunk, column_chunk = chunks
    features = [part.features(ids) for part in parts]
    row, column = torch.nonzero(labels != IGNORED, as_tuple=True)
    for start in range(0, len(row), token_chunk):
        at = row[start : start + token_chunk], column[start : start + token_chunk]
        found = read_tokens(parts, [_picked(x, at) for x in features], labels[at], vocab_size, column_chunk)
        for one, whole in zip(found, into, strict=True):
            for name in ("nll", "kl", "top1", "top5"):
                getattr(whole, name)[at] = getattr(one, name).double()


def _picked(features: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
    return features[at[0].to(features.device), at[1].to(features.device)]


def _blocks(documents: Sequence[int] | None, count: int) -> tuple[list[int], str]:
    """The blocks of the bootstrap, and what they are."""
    if documents is None or len(set(documents)) < min(FEWEST_DOCUMENTS, count):
        return [], "windows"
    return list(documents), "documents"


@dataclass(frozen=True)
class _Summary:
    """Turns one model's readings into what is reported of it."""

    teacher: _Readings
    counted: Tensor
    borders: list[int]
    named: dict[str, tuple[int, int]]
    texts: list[str]
    blocks: list[int]
    unit: str
    seed: int

    def of(self, read: _Readings) -> Likelihood:
        whole = self._part(read, slice(None), 0, self.borders[-1])
        assert whole is not None
        buckets = [self._part(read, slice(None), low, high) for low, high in pairwise(self.borders)]
        derived = [
            self._part(read, slice(None), low, high, label) for label, (low, high) in self.named.items()
        ]
        counts = self.counted.sum(1).tolist()
        figures = {key: getattr(whole, key) for key in ("ppl", "kl", "top1", "kl_median", "kl_p99", "top5")}
        return Likelihood(
            **figures,
            tokens=whole.tokens,
            sequences=len(self.counted),
            intervals=whole.intervals,
            buckets=[bucket for bucket in buckets if bucket is not None],
            derived=[bucket for bucket in derived if bucket is not None],
            sources=[self._source(read, name) for name in dict.fromkeys(self.texts)],
            window_nll=read.nll.sum(1).tolist(),
            window_kl=read.kl.sum(1).tolist(),
            window_tokens=[] if len(set(counts)) == 1 else counts,
            unit=self.unit,
            blocks=self.blocks,
        )

    def _source(self, read: _Readings, name: str) -> Source:
        rows = [index for index, text in enumerate(self.texts) if text == name]
        part = self._part(read, rows, 0, self.borders[-1])
        if part is None:
            return Source(name, 0, len(rows), math.nan, math.nan, math.nan, {})
        return Source(name, part.tokens, len(rows), part.ppl, part.kl, part.top1, part.intervals)

    def _part(
        self, read: _Readings, rows: slice | list[int], low: int, high: int, label: str = ""
    ) -> Bucket | None:
        """The figures of some windows between two positions; None where nothing counts."""
        counted = self.counted[rows, low:high]
        tokens = int(counted.sum())
        if tokens == 0:
            return None
        kl = read.kl[rows, low:high]
        sums = [
            x[rows, low:high].sum(1)
            for x in (read.nll, read.kl, read.top1, self.teacher.nll, self.counted.double(), read.top5)
        ]
        totals = torch.stack(sums, dim=1)  # [windows, 6]
        nll, mean, same, _, _, five = (totals.sum(0) / tokens).tolist()
        if self.blocks:
            totals = by_block(totals, torch.tensor(self.blocks)[rows].tolist())
        median, p99 = numpy.quantile(
            kl[counted].numpy(), [0.5, 0.99]
        ).tolist()  # torch's takes 16 million at most
        intervals = bootstrap_all(totals, STATISTICS, seed=self.seed)
        return Bucket(low, high, tokens, _exp(nll), mean, same, median, p99, five, intervals, label)


STATISTICS: dict[str, Statistic] = {
    "ppl": lambda totals: (totals[:, 0] / totals[:, 4]).exp(),
    "kl": lambda totals: totals[:, 1] / totals[:, 4],
    "top1": lambda totals: totals[:, 2] / totals[:, 4],
    "ppl_difference": lambda totals: (
        (totals[:, 0] / totals[:, 4]).exp() - (totals[:, 3] / totals[:, 4]).exp()
    ),
}


def _exp(value: float) -> float:
    return torch.tensor(value, dtype=torch.double).exp().item()  # inf, not OverflowError


def _with_intervals(tree: dict[str, Any]) -> dict[str, Any]:
    """A record with null read as NaN, and its intervals as pairs."""
    tree = {key: _number(value) for key, value in tree.items()}
    if "intervals" in tree:
        pairs = {key: (_number(low), _number(high)) for key, (low, high) in tree["intervals"].items()}
        tree["intervals"] = pairs
    return tree


def _number(value: Any) -> Any:
    return math.nan if value is None else value


def _check(students: dict[str, nn.Module], windows: Tensor, vocab_size: int) -> None:
    if TEACHER in students:
        raise EvaluationError(
            f"students: {TEACHER!r} is the teacher's own name; call the student something else"
        )
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise EvaluationError(
            f"windows: shape {tuple(windows.shape)}; expected [windows, tokens + 1], none of them 0"
        )
    if windows.max() >= vocab_size or windows.min() < 0:
        raise EvaluationError(
            f"windows: token ids {windows.min().item()} to {windows.max().item()}, the tokenizer has "
            f"{vocab_size}; tokenize the text with the tokenizer of the teacher"
        )
