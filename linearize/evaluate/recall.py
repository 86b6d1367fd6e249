"""Recall: can the student still find the needle? A cell per model, task and length; the same prompts for all.

A prompt counts as answered when every token of the answer is the arg-max under teacher forcing. That is the
verdict of greedy decoding in one forward: while it has been right, it has fed itself exactly these tokens.
"""

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling.errors import EvaluationError
from ..tasks import TASKS, Prompt, from_tokens, generator
from ..tasks.recall import prefix
from .likelihood import rows_per_call
from .statistics import wilson

GATE = 0.8
"""The least lower bound of the teacher's own recall at which a cell can tell students apart."""


@dataclass(frozen=True)
class Cell:
    """One model, task and length; `low` and `high` bound the share of correct prompts (Wilson, 95 %)."""

    model: str
    task: str
    length: int
    correct: int
    samples: int
    low: float
    high: float
    tokens: float
    """Mean length of prompt and answer; at most `length`."""
    digest: str
    """sha256 of the prompts: two cells with one digest were asked the same questions."""
    hits: str
    """One digit per prompt, 1 where it was answered, for paired tests."""

    @property
    def share(self) -> float:
        return self.correct / self.samples


def prompts(
    tokenizer, task: str, length: int, *, samples: int, seed: int, haystack_tokens: Tensor | None = None
) -> list[Prompt]:
    """The `samples` prompts of a cell; sample i is the same in every run, whatever else is measured.

    `haystack_tokens` is the text, one row of token ids, that text haystacks are cut from.
    """
    if task not in TASKS:
        raise EvaluationError(f"evaluate.recall_tasks: {task!r} is unknown; choose from {', '.join(TASKS)}")
    text: Any = None
    if haystack_tokens is not None:
        opening = torch.tensor(prefix(tokenizer), dtype=torch.long)  # stands once, at the start of a prompt
        text = haystack_tokens[~torch.isin(haystack_tokens, opening)].numpy()
    made = []
    for index in range(samples):
        rng = generator(task, length, index, seed)
        haystack = None if text is None else from_tokens(text, rng)
        made.append(TASKS[task].make(tokenizer, length, rng, haystack))
    return made


def digest(asked: Sequence[Prompt]) -> str:
    """sha256 of the token ids of prompts and answers, in order."""
    return sha256(json.dumps([[prompt.ids, prompt.answer] for prompt in asked]).encode()).hexdigest()


def score(model: nn.Module, asked: Sequence[Prompt], *, batch_size: int, vocab_size: int) -> list[bool]:
    """Whether `model` answers each prompt; columns of its head from `vocab_size` on are padding."""
    found = forced(model, asked, batch_size=batch_size, vocab_size=vocab_size)
    return [best == list(prompt.answer) for best, prompt in zip(found, asked, strict=True)]


@torch.no_grad()
def forced(model: nn.Module, asked: Sequence[Prompt], *, batch_size: int, vocab_size: int) -> list[list[int]]:
    """The arg-max in the place of each answer token, with all before it as in the answer.

    Shorter rows are padded on the right, which a causal model cannot see.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(asked)), key=lambda index: _tokens(asked[index]))
    longest = _tokens(asked[order[-1]]) if order else 0
    step = rows_per_call(batch_size, longest, vocab_size)
    found: list[list[int]] = [[] for _ in asked]
    for start in range(0, len(order), step):
        batch = [asked[index] for index in order[start : start + step]]
        width = max(map(_tokens, batch))
        ids = torch.tensor([[*p.ids, *p.answer, *[0] * (width - _tokens(p))] for p in batch], device=device)
        first = min(len(p.ids) for p in batch) - 1  # the earliest position that predicts an answer token
        best = last_logits(model, ids, width - first)[..., :vocab_size].argmax(-1)  # [rows, width - first]
        for row, (index, prompt) in enumerate(zip(order[start : start + step], batch, strict=True)):
            at = len(prompt.ids) - 1 - first
            found[index] = best[row, at : at + len(prompt.answer)].tolist()
    return found


def measure(
    models: dict[str, nn.Module],
    tokenizer,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    seed: int,
    haystack_tokens: Tensor | None,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Cell]:
    """Every model on every task at every length, in the order given. `progress` hears (cells done, cells)."""
    if samples < 1:
        raise EvaluationError(f"evaluate.recall_samples: {samples} is impossible; give at least 1")
    cells: list[Cell] = []
    total = len(tasks) * len(lengths) * len(models)
    for task in tasks:
        for length in lengths:
            asked = prompts(
                tokenizer, task, length, samples=samples, seed=seed, haystack_tokens=haystack_tokens
            )
            name, tokens = digest(asked), sum(map(_tokens, asked)) / samples
            for model, module in models.items():
                hits = score(module, asked, batch_size=batch_size, vocab_size=len(tokenizer))
                low, high = wilson(sum(hits), samples)
                marks = "".join(str(int(hit)) for hit in hits)
                cells.append(Cell(model, task, length, sum(hits), samples, low, high, tokens, name, marks))
                if progress is not None:
                    progress(len(cells), total)
    return cells


def _tokens(prompt: Prompt) -> int:
    return len(prompt.ids) + len(prompt.answer)


def last_logits(model: nn.Module, ids: Tensor, keep: int) -> Tensor:
    """Logits of the last `keep` positions; models that can skip the head of all others do."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
    return model(input_ids=ids, use_cache=False).logits[:, -keep:]
