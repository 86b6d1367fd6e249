"""Answers of a model to many questions: greedy generation through its own cache, and choices by likelihood."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from .likelihood import rows_per_call
from .recall import last_logits

Heard = Callable[[int], None]  # how many tokens were read or written since the last call


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


@torch.no_grad()
def rank(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int,
    vocab_size: int,
    heard: Heard | None = None,
) -> list[int]:
    """Index of the likeliest of each prompt's choices: the greatest sum of log-probabilities of its tokens.

    Rows are padded on the right, which a causal model cannot see.
    """
    device = next(model.parameters()).device
    rows = [(i, j, [*prompts[i], *choice]) for i, many in enumerate(choices) for j, choice in enumerate(many)]
    rows.sort(key=lambda row: len(row[2]))
    scores = [[0.0] * len(many) for many in choices]
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
            scores[i][j] = found[row, at - 1 - first, ids[row, at]].sum().item()
        if heard is not None:
            heard(sum(len(ids) for _, _, ids in batch))
    return [max(range(len(many)), key=many.__getitem__) for many in scores]


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
