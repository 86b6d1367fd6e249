"""Free continuation: all models go on from the same held-out prompts, greedily, and the teacher reads what they wrote.

A text that turns in a circle is easy to foresee: its perplexity is low, so the share of repeated 4-grams stands beside,
and both of the held-out text's own continuation. How far a student writes what the teacher writes says when they part,
not which of them is right.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import write_text
from ..measures import Continuation
from ..modeling.errors import EvaluationError
from ..progress import Progress, Watch
from . import answers, cells
from .likelihood import TEACHER
from .statistics import Interval, Statistic, bootstrap, bootstrap_all, quartiles

GRAM = 4
TEXT = "the text itself"
"""The name of the held-out continuation in the place of a model."""


@dataclass(frozen=True)
class Continued:
    """What one model wrote."""

    model: str
    samples: int
    tokens: float
    """Mean length; a text ends with the model's end-of-sequence or where the room ends."""
    ppl: float
    """The teacher's, over all tokens that were written."""
    repeated: float
    """Share of 4-grams that stand in their own text before."""
    intervals: dict[str, Interval] = field(default_factory=dict)
    """95 % bootstrap over prompts, of ppl and repeated; of a student also, paired, ppl_difference and
    repeated_difference (student - teacher), and of the median divergence."""
    divergence: tuple[float, float, float] | None = None
    """Of a student: lower quartile, median and upper quartile of the tokens before the first that the teacher did not
    write. The end of a text counts as a token; a text that is the teacher's to the end counts as the whole room."""
    same: int | None = None
    """Of a student: texts that are the teacher's to the end."""


@dataclass(frozen=True)
class Continuations:
    """Every model, and the held-out text in a model's place."""

    rows: list[Continued]
    text: Continued
    prompt_tokens: int
    tokens: int
    """The most that could be written."""
    asked: int
    """Prompts that the recipe asks for; the text may have fewer."""
    digest: str
    """sha256 of the prompts."""

    def row(self, model: str) -> Continued:
        for row in self.rows:
            if row.model == model:
                return row
        raise KeyError(model)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Continuations":
        return cls(**{**tree, "rows": [_row(entry) for entry in tree["rows"]], "text": _row(tree["text"])})


def check(config: Continuation, held_out: Callable[[int, int], Tensor], limit: int | None) -> None:
    """Raise now where prompt and continuation pass the teacher's context `limit`, or no text is that long."""
    if not config.wanted:
        return
    length = config.prompt_tokens + config.tokens
    if limit and length > limit:
        raise EvaluationError(
            f"evaluate.continuation.tokens: {config.prompt_tokens} tokens of prompt and {config.tokens} more are "
            f"beyond the teacher's context of {limit}; give at most {max(GRAM, limit - config.prompt_tokens)}"
        )
    held_out(length - 1, 1)


def measure(
    models: dict[str, nn.Module],
    tokenizer: Any,
    config: Continuation,
    held_out: Callable[[int, int], Tensor],
    *,
    batch_size: int = 8,
    seed: int = 0,
    folder: Path | None = None,
    progress: Watch | None = None,
) -> Continuations | None:
    """Every model, the teacher first, on the first `config.prompts` held-out windows; None where it is not asked for.

    `held_out` takes a length and a count and gives [N, length + 1] tokens. With a `folder`, what a model wrote is a
    file of JSON lines there, and is not written again for the same model and prompts.
    """
    if not config.wanted:
        return None
    windows = held_out(config.prompt_tokens + config.tokens - 1, config.prompts).tolist()
    prompts = [window[: config.prompt_tokens] for window in windows]
    how: Any = {"batch_size": batch_size, "vocab_size": len(tokenizer)}
    each = len(prompts) * (config.prompt_tokens + config.tokens)
    done = 0

    def hear(tokens: int) -> None:
        nonlocal done
        done += tokens
        if progress is not None:
            progress(Progress("continuation", done, len(models) * each))

    written: dict[str, list[list[int]]] = {}
    for name, model in models.items():
        place = None if folder is None else folder / cells.file_name(f"continuation {name}", config.tokens)
        who = cells.fingerprint({name: model}) if place is not None else ""
        given = _read(place, prompts, who) if place is not None else None
        if given is None:
            end = answers.ends(model, tokenizer)
            given = answers.generate(model, prompts, config.tokens, end=end, heard=hear, **how)
            if place is not None:
                _write(place, prompts, given, who, tokenizer)
        else:
            hear(each)
        written[name] = given
    teacher = models[TEACHER]
    own = [window[config.prompt_tokens :] for window in windows]
    counted = {
        name: _counts(texts, answers.scores(teacher, prompts, [[text] for text in texts], **how))
        for name, texts in {**written, TEXT: own}.items()
    }
    rows = []
    for name, texts in written.items():
        row = _told(name, counted[name], seed)
        rows.append(
            row if name == TEACHER else _beside(row, counted, texts, written[TEACHER], config.tokens, seed)
        )
    return Continuations(
        rows,
        _told(TEXT, counted[TEXT], seed),
        config.prompt_tokens,
        config.tokens,
        config.prompts,
        hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
    )


def divergence(ours: Sequence[int], theirs: Sequence[int], room: int) -> int:
    """Tokens before the first that differs, of which the end of a text is one; `room` where there is none."""
    if list(ours) == list(theirs):
        return room
    same = [a == b for a, b in zip(ours, theirs, strict=False)]
    return same.index(False) if False in same else len(same)


def repeated(text: Sequence[int]) -> tuple[int, int]:
    """How many 4-grams of a text stand in it before, and how many it has."""
    grams = [tuple(text[at : at + GRAM]) for at in range(len(text) - GRAM + 1)]
    return len(grams) - len(set(grams)), len(grams)


def _counts(texts: Sequence[Sequence[int]], scores: Sequence[Sequence[float]]) -> Tensor:
    """[prompts, 4]: negative log-likelihood, tokens, 4-grams that repeat, 4-grams."""
    rows = [[-score, len(text), *repeated(text)] for text, (score,) in zip(texts, scores, strict=True)]
    return torch.tensor(rows, dtype=torch.double)


def _ppl(totals: Tensor) -> Tensor:
    return (totals[:, 0] / totals[:, 1]).exp()


def _repeated(totals: Tensor) -> Tensor:
    return totals[:, 2] / totals[:, 3].clamp(min=1)  # of texts too short for any, none


def _told(name: str, counts: Tensor, seed: int) -> Continued:
    whole = counts.sum(0, keepdim=True)
    found = bootstrap_all(counts, {"ppl": _ppl, "repeated": _repeated}, seed=seed)
    mean = (whole[0, 1] / len(counts)).item()
    return Continued(name, len(counts), mean, _ppl(whole).item(), _repeated(whole).item(), found)


def _beside(
    row: Continued,
    counted: dict[str, Tensor],
    ours: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]],
    room: int,
    seed: int,
) -> Continued:
    """The row of a student with what sets it against the teacher."""
    both = torch.cat([counted[row.model], counted[TEACHER]], 1)
    apart: dict[str, Statistic] = {
        "ppl_difference": lambda totals: _ppl(totals) - _ppl(totals[:, 4:]),
        "repeated_difference": lambda totals: _repeated(totals) - _repeated(totals[:, 4:]),
    }
    steps = [divergence(a, b, room) for a, b in zip(ours, theirs, strict=True)]
    intervals = (
        row.intervals | bootstrap_all(both, apart, seed=seed) | {"divergence": _of_median(steps, seed)}
    )
    same = sum(list(a) == list(b) for a, b in zip(ours, theirs, strict=True))
    fields = {**row.__dict__, "intervals": intervals, "divergence": quartiles(steps), "same": same}
    return Continued(**fields)


def _of_median(values: Sequence[int], seed: int) -> Interval:
    """Bootstrap interval of a median: each row a mark at its value, so that totals are counts of values."""
    levels = torch.tensor(sorted(set(values)), dtype=torch.double)
    marks = (torch.tensor(values)[:, None] == levels).double()

    def median(totals: Tensor) -> Tensor:
        below = totals.cumsum(1)
        middle = [levels[(below <= rank).sum(1)] for rank in ((len(values) - 1) // 2, len(values) // 2)]
        return (middle[0] + middle[1]) / 2

    return bootstrap(marks, median, seed=seed)


def _write(
    path: Path, prompts: Sequence[Sequence[int]], written: Sequence[Sequence[int]], model: str, tokenizer: Any
) -> None:
    lines = [
        {
            "prompt": cells.digest_of_tokens(prompt),
            "model": model,
            "ids": list(ids),
            "text": tokenizer.decode(ids, skip_special_tokens=True),
        }
        for prompt, ids in zip(prompts, written, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _read(path: Path, prompts: Sequence[Sequence[int]], model: str) -> list[list[int]] | None:
    """What was written by this model after these prompts; None where there is no such file."""
    if not path.is_file():
        return None
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        asked = [(cells.digest_of_tokens(prompt), model) for prompt in prompts]
        if [(line["prompt"], line["model"]) for line in lines] != asked:
            return None
        return [[int(token) for token in line["ids"]] for line in lines]
    except (ValueError, KeyError, TypeError):  # not one of ours, or cut: written again
        return None


def _row(tree: dict[str, Any]) -> Continued:
    """JSON has no word for numbers that are none."""

    def number(value: Any) -> Any:
        return math.nan if value is None else value

    intervals = {name: (number(low), number(high)) for name, (low, high) in tree["intervals"].items()}
    numbers = {key: number(tree[key]) for key in ("ppl", "repeated")}
    apart = tree["divergence"] and tuple(tree["divergence"])
    return Continued(**{**tree, **numbers, "intervals": intervals, "divergence": apart})
