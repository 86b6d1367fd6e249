"""How far a student has drifted from its teacher, by position: perplexity, KL, top-1 agreement.

Teacher and students read the same windows in the same run, so every comparison is paired. Only the columns of
the tokenizer enter the softmaxes: a head padded to a round width changes nothing, whatever it holds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..modeling.errors import EvaluationError
from .statistics import Interval, bootstrap

TEACHER = "teacher"

# Logits of one call, [rows, T, vocab], stay below this many numbers (1 GiB in fp32); a row is never split.
MAX_LOGITS = 1 << 28
# Tokens whose fp32 log-softmax exists at one time.
TOKEN_CHUNK = 1024


@dataclass(frozen=True)
class Bucket:
    """Positions [start, end) of every window; position t is the logits that predict token t + 1."""

    start: int
    end: int
    tokens: int
    ppl: float
    kl: float
    top1: float


@dataclass(frozen=True)
class Likelihood:
    """One model on one length: totals, buckets, 95 % bootstrap intervals over windows, sums of each window.

    `kl` is KL(teacher || model) in nats per token, `top1` the share of positions with the teacher's arg-max.
    `intervals` holds ppl, kl, top1 and ppl_difference (model - teacher, paired by window).
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


def edges(length: int) -> list[int]:
    """Bucket borders 0, 64, 128, 256, ... doubling to `length`."""
    borders = [0]
    border = 64
    while border < length:
        borders.append(border)
        border *= 2
    return [*borders, length]


def rows_per_call(batch_size: int, length: int, vocab: int) -> int:
    """Rows of one forward call: `batch_size`, or fewer where their logits would pass MAX_LOGITS."""
    return max(1, min(batch_size, MAX_LOGITS // max(1, length * vocab)))


@torch.no_grad()
def compare(
    teacher: nn.Module,
    students: dict[str, nn.Module],
    windows: Tensor,
    *,
    batch_size: int,
    vocab_size: int,
    token_chunk: int = TOKEN_CHUNK,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Likelihood]:
    """Likelihood of each model, the teacher first, on windows [N, T + 1] of token ids.

    `vocab_size` is len(tokenizer); columns from there on are padding. The softmax takes `token_chunk` tokens
    at a time in fp32 (fp64 for fp64 models) and summed in fp64. `progress` hears (windows done, windows).
    """
    _check(students, windows, vocab_size)
    names = [TEACHER, *students]
    count, length = windows.shape[0], windows.shape[1] - 1
    borders = edges(length)
    # [windows, buckets, (negative log-likelihood, KL, agreements)] per model
    sums = {name: torch.zeros(count, len(borders) - 1, 3, dtype=torch.double) for name in names}
    width = max(_width(model, vocab_size) for model in (teacher, *students.values()))
    step = rows_per_call(batch_size, length, width)
    for start in range(0, count, step):
        batch = windows[start : start + step]
        reference = _logits(teacher, batch[:, :-1], vocab_size, TEACHER)
        for name in names:
            model = teacher if name == TEACHER else students[name]
            logits = reference if name == TEACHER else _logits(model, batch[:, :-1], vocab_size, name)
            for index, (low, high) in enumerate(pairwise(borders)):
                for piece in _pieces(low, high, max(1, token_chunk // len(batch))):
                    sums[name][start : start + step, index] += token_sums(
                        reference[:, piece], logits[:, piece], batch[:, 1:][:, piece]
                    )
            del logits
        if progress is not None:
            progress(min(start + step, count), count)
    return {name: _summary(sums[name], sums[TEACHER], borders, seed) for name in names}


def difference(first: Likelihood, second: Likelihood, *, seed: int = 0) -> tuple[float, Interval]:
    """KL of `first` minus that of `second`, and its paired interval; below zero, `first` is closer."""
    if (first.tokens, first.sequences) != (second.tokens, second.sequences):
        raise ValueError("difference: the two models were not measured on the same windows")
    pairs = torch.tensor([first.window_kl, second.window_kl], dtype=torch.double).T
    low, high = bootstrap(pairs, lambda totals: (totals[:, 0] - totals[:, 1]) / first.tokens, seed=seed)
    return first.kl - second.kl, (low, high)


def token_sums(reference: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """[rows, 3] on the CPU, summed over tokens: negative log-likelihood, KL of the reference, agreements."""
    targets = targets.to(logits.device)
    scores, truth = _log_softmax(logits), _log_softmax(reference.to(logits.device))
    nll = -scores.gather(-1, targets[..., None]).double().sum((1, 2))
    # exp(-inf) * (-inf - s) is the limit 0, not NaN: a teacher may rule a token out
    kl = (truth.exp() * (truth - scores)).masked_fill(truth == -torch.inf, 0).double().sum((1, 2))
    same = (logits.argmax(-1) == reference.argmax(-1).to(logits.device)).double().sum(1)
    return torch.stack([nll, kl, same], dim=-1).cpu()


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _logits(model: nn.Module, ids: Tensor, vocab_size: int, name: str) -> Tensor:
    """Logits [B, T, vocab_size] in the model's own dtype, padded columns cut off."""
    logits = model(input_ids=ids.to(_device(model)), use_cache=False).logits
    if logits.shape[-1] < vocab_size:
        raise EvaluationError(
            f"{name}: its head has {logits.shape[-1]} columns, the tokenizer {vocab_size} tokens; "
            "evaluate a student with the tokenizer of its teacher"
        )
    return logits[..., :vocab_size]


def _pieces(low: int, high: int, size: int) -> Iterator[slice]:
    for start in range(low, high, size):
        yield slice(start, min(start + size, high))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _width(model: nn.Module, vocab_size: int) -> int:
    return max(vocab_size, getattr(model.config, "vocab_size", None) or 0)


def _summary(sums: Tensor, teacher: Tensor, borders: list[int], seed: int) -> Likelihood:
    count, length = sums.shape[0], borders[-1]
    buckets = []
    for index, (low, high) in enumerate(pairwise(borders)):
        tokens = count * (high - low)
        nll, kl, same = (sums[:, index].sum(0) / tokens).tolist()
        buckets.append(Bucket(low, high, tokens, _exp(nll), kl, same))
    rows = sums.sum(1)  # [windows, 3]
    nll, kl, same = (rows.sum(0) / (count * length)).tolist()
    return Likelihood(
        ppl=_exp(nll),
        kl=kl,
        top1=same,
        tokens=count * length,
        sequences=count,
        intervals=_intervals(rows, teacher.sum(1), length, seed),
        buckets=buckets,
        window_nll=rows[:, 0].tolist(),
        window_kl=rows[:, 1].tolist(),
    )


def _intervals(rows: Tensor, teacher: Tensor, length: int, seed: int) -> dict[str, Interval]:
    tokens = rows.shape[0] * length
    columns = torch.cat([rows, teacher[:, :1]], dim=1)  # nll, kl, agreements, teacher's nll
    statistics = {
        "ppl": lambda totals: (totals[:, 0] / tokens).exp(),
        "kl": lambda totals: totals[:, 1] / tokens,
        "top1": lambda totals: totals[:, 2] / tokens,
        "ppl_difference": lambda totals: (totals[:, 0] / tokens).exp() - (totals[:, 3] / tokens).exp(),
    }
    return {name: bootstrap(columns, statistic, seed=seed) for name, statistic in statistics.items()}


def _exp(value: float) -> float:
    return torch.tensor(value, dtype=torch.double).exp().item()  # inf, not OverflowError


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
