"""Answers of a model to many questions: greedy generation through its own cache, and choices by likelihood."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from ..tasks.budget import Question
from ..tasks.suite import SuiteTask
from . import recall
from .cells import Answer
from .likelihood import rows_per_call
from .recall import last_logits

Heard = Callable[[int], None]  # how many tokens were read or written since the last call


def answer(
    model: Any,
    tokenizer: Any,
    task: SuiteTask,
    asked: Sequence[Question],
    *,
    batch_size: int,
    heard: Heard | None = None,
) -> list[Answer]:
    """What one model answers, with its scores: generated, and by likelihood."""
    vocab = len(tokenizer)
    prompts = [question.ids for question in asked]
    how: Any = {"batch_size": batch_size, "vocab_size": vocab}
    written = generate(model, prompts, task.max_new_tokens, end=ends(model, tokenizer), heard=heard, **how)
    likely: list[bool | None] = [None] * len(asked)
    parts: list[float | None] = [None] * len(asked)
    if all(question.choices for question in asked):
        best = rank(model, prompts, [question.choices for question in asked], **how)
        likely = [index == question.right for index, question in zip(best, asked, strict=True)]
    elif all(question.answer is not None for question in asked):
        one = [recall.Prompt(question.ids, question.answer or [], 0.0) for question in asked]
        likely = list(recall.score(model, one, **how))
    elif all(question.series for question in asked):
        many = [_in_room(question, task.max_new_tokens) for question in asked]
        said = recall.forced(model, many, **how)
        found = [found_of(question.series, best) for question, best in zip(asked, said, strict=True)]
        likely, parts = [all(right) for right in found], [sum(right) / len(right) for right in found]
    out = []
    for question, ids, right, share in zip(asked, written, likely, parts, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        score = task.score(question, text, ids)
        out.append(Answer(text, score.value, score.contains, score.strict, right, score.prefix, share))
    return out


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    end: Sequence[int],
    batch_size: int,
    vocab_size: int,
    heard: Heard | None = None,
) -> list[list[int]]:
    """The greedy continuation of each prompt, without end-of-sequence; nothing else stops it.

    Prompts of a batch are padded on the left, under a mask. Columns of the head from `vocab_size` on are padding
    and never written. The model's own generation settings (sampling, penalties) do not count.
    """
    device = next(model.parameters()).device
    pad = end[0] if end else 0
    columns = model.get_output_embeddings().weight.shape[0]
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=list(end) or None,
        pad_token_id=pad,
        suppress_tokens=list(range(vocab_size, columns)) or None,
    )
    own, model.generation_config = model.generation_config, settings
    written: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids, mask = _left_padded([prompts[index] for index in batch], pad, device)
            made = model.generate(ids, attention_mask=mask, generation_config=settings)[:, ids.shape[1] :]
            for index, row in zip(batch, made.tolist(), strict=True):
                stops = [row.index(token) for token in end if token in row]
                written[index] = row[: min(stops)] if stops else row
            if heard is not None:
                heard(sum(len(prompts[index]) + max_new_tokens for index in batch))
    finally:
        model.generation_config = own
    return written


def rank(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int,
    vocab_size: int,
    heard: Heard | None = None,
) -> list[int]:
    """Index of the likeliest of each prompt's choices: the greatest sum of log-probabilities of its tokens."""
    found = scores(model, prompts, choices, batch_size=batch_size, vocab_size=vocab_size, heard=heard)
    return [max(range(len(many)), key=many.__getitem__) for many in found]


@torch.no_grad()
def scores(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int,
    vocab_size: int,
    heard: Heard | None = None,
) -> list[list[float]]:
    """The sum of log-probabilities of the tokens of each prompt's choices, in nats.

    Rows are padded on the right, which a causal model cannot see.
    """
    device = next(model.parameters()).device
    rows = [(i, j, [*prompts[i], *choice]) for i, many in enumerate(choices) for j, choice in enumerate(many)]
    rows.sort(key=lambda row: len(row[2]))
    sums = [[0.0] * len(many) for many in choices]
    longest = len(rows[-1][2]) if rows else 0
    step = rows_per_call(batch_size, longest, vocab_size)
    for start in range(0, len(rows), step):
        batch = rows[start : start + step]
        width = max(len(ids) for _, _, ids in batch)
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for _, _, row in batch], device=device)
        first = min(len(prompts[i]) for i, _, _ in batch) - 1
        logits = last_logits(model, ids, width - first)[..., :vocab_size].float()
        found = logits.log_softmax(-1)
        for row, (i, j, whole) in enumerate(batch):
            at = torch.arange(len(prompts[i]), len(whole), device=device)
            sums[i][j] = found[row, at - 1 - first, ids[row, at]].sum().item()
        if heard is not None:
            heard(sum(len(ids) for _, _, ids in batch))
    return sums


def found_of(series: Sequence[tuple[list[int], list[int]]], best: Sequence[int]) -> list[bool]:
    """Of several answers whose order is free, which are right by likelihood.

    ``best`` is the arg-max in the place of each token of the series, all before it forced; it may end early. An
    answer is right where each of its tokens is one that an answer still due goes on with, after the same tokens of it:
    whatever order a model would take, it never leaves the answers. The tokens between answers are given, not judged.
    """
    right, at = [], 0
    for index, (joint, answer) in enumerate(series):
        at += len(joint)
        said, due = best[at : at + len(answer)], [ids for _, ids in series[index:]]
        right.append(
            len(said) == len(answer)
            and all(
                token in {ids[k] for ids in due if ids[:k] == answer[:k] and len(ids) > k}
                for k, token in enumerate(said)
            )
        )
        at += len(answer)
    return right


def _in_room(question: Question, room: int) -> recall.Prompt:
    """A question with several answers, as many tokens of them forced as a model may write."""
    return recall.Prompt(
        question.ids, [t for pair in question.series for ids in pair for t in ids][:room], 0.0
    )


def _left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[*[pad] * (width - len(p)), *p] for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def ends(model: Any, tokenizer: Any) -> list[int]:
    """The end-of-sequence tokens of tokenizer and model, in that order."""
    found: list[int] = []
    for token in (tokenizer.eos_token_id, model.config.eos_token_id):
        found += token if isinstance(token, list) else [] if token is None else [token]
    return list(dict.fromkeys(found))
