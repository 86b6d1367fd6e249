"""What a scan measures on: rows of training text and recall prompts, in batches of about one length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import Corpus, build
from ..evaluate.likelihood import rows_per_call
from ..evaluate.recall import prompts
from ..modeling.errors import RecipeError
from ..progress import Watch
from ..recipe import Recipe, Scan
from ..tasks import Prompt

SEED = 7_919
"""Added to the recipe's seed, so that no prompt of the scan is one of the evaluation."""
HAYSTACK = 2_000_000
"""Most tokens of training text that haystacks are cut from."""
LEAST_HAYSTACK = 16_384


@dataclass(frozen=True)
class Batch:
    """Rows of text, or the prompts of one recall cell with their answers."""

    ids: Tensor
    """[B, T], or [B, T + 1] for text: its last column is only predicted."""
    cell: tuple[str, int] | None
    """Task and length; None for text."""
    prompts: tuple[Prompt, ...] = ()

    @property
    def inputs(self) -> Tensor:
        return self.ids[:, :-1] if self.cell is None else self.ids

    @property
    def lengths(self) -> Tensor | None:
        """[B] tokens of each row that count, where shorter prompts are padded on the right; None where all do."""
        found = torch.tensor([len(p.ids) + len(p.answer) for p in self.prompts])
        return None if self.cell is None or bool((found == self.ids.shape[1]).all()) else found

    @property
    def keep(self) -> int:
        """How many of the last positions' logits are read."""
        return self.inputs.shape[1] - min((len(p.ids) - 1 for p in self.prompts), default=0)

    @property
    def answers(self) -> tuple[Tensor, Tensor]:
        """Of prompts: the columns among the last ``keep`` that predict the answers, and the answers' tokens, [B, m]
        each; -1 where an answer has fewer."""
        most, first = max(len(p.answer) for p in self.prompts), self.inputs.shape[1] - self.keep
        columns = [
            [len(p.ids) - 1 - first + min(i, len(p.answer) - 1) for i in range(most)] for p in self.prompts
        ]
        tokens = [[*p.answer, *[-1] * (most - len(p.answer))] for p in self.prompts]
        return torch.tensor(columns), torch.tensor(tokens)

    @property
    def tokens(self) -> int:
        return self.inputs.numel()


def small_data(recipe: Recipe) -> Any:
    """``data`` with no more self-made text than a scan reads, and no recall documents: prompts are made anyway."""
    scan = recipe.scan
    needed = max(
        LEAST_HAYSTACK, 2 * (scan.sequences + 2) * (scan.seq_len + 1), *(2 * n for n in lengths(scan))
    )
    kept = []
    for source in recipe.data.sources:
        if source.kind == "self":
            kept.append(source.model_copy(update={"tokens": min(source.tokens, needed)}))
        elif source.kind != "recall":
            kept.append(source)
    if not kept:
        raise RecipeError(
            "data.sources: recall documents alone leave a scan no text; name a text source, or 'self'"
        )
    return recipe.data.model_copy(
        update={"sources": kept, "held_out": None, "packing": "cross", "seq_len": scan.seq_len}
    )


def small_corpus(
    recipe: Recipe, tokenizer: Any, teacher: Any, folder: Any, device: str, progress: Watch | None = None
) -> Corpus:
    """The text of a scan that belongs to no run."""
    return build(
        small_data(recipe), tokenizer, teacher=teacher, cache_dir=folder, seed=recipe.seed, device=device,
        progress=progress,
    )  # fmt: skip


def lengths(scan: Scan) -> list[int]:
    return list(scan.recall_lens) if scan.recall_lens is not None else [scan.seq_len]


def training_tokens(corpus: Corpus) -> Tensor:
    """[N] text that may be trained on, at most ``HAYSTACK`` tokens of it: the haystack of the scan's prompts."""
    pools = [part.train.tokens for part in corpus.parts if part.train is not None]
    if not pools:
        raise RecipeError(
            "data.sources: recall documents alone leave a scan no text; name a text source, or 'self'"
        )
    share = HAYSTACK // len(pools)
    return torch.from_numpy(np.concatenate([pool[:share].astype(np.int64) for pool in pools]))


def batches(scan: Scan, corpus: Corpus, tokenizer: Any, seed: int, vocab: int) -> list[Batch]:
    """Text first, then every recall cell; the same for every layer and candidate."""
    rows = corpus.batch(0, batch_size=scan.sequences, seq_len=scan.seq_len + 1, stage="scan")["input_ids"]
    size = rows_per_call(scan.batch_size, scan.seq_len, vocab)
    made = [Batch(part, None) for part in rows.split(size)]
    haystack = training_tokens(corpus) if scan.recall_samples else None
    for task in scan.recall_tasks:
        for length in lengths(scan):
            asked = prompts(
                tokenizer,
                task,
                length,
                samples=scan.recall_samples,
                seed=seed + SEED,
                haystack_tokens=haystack,
            )
            made += [Batch(_ids(part), (task, length), part) for part in _split(asked, scan.batch_size)]
    return made


def _split(asked: Sequence[Prompt], size: int) -> list[tuple[Prompt, ...]]:
    """Groups of prompts of nearly one length, the shorter first."""
    ordered = sorted(asked, key=lambda prompt: len(prompt.ids) + len(prompt.answer))
    return [tuple(ordered[i : i + size]) for i in range(0, len(ordered), size)]


def _ids(asked: Sequence[Prompt]) -> Tensor:
    """Padded on the right, which a causal model cannot see; stand-ins that look ahead are told the lengths."""
    rows = [[*p.ids, *p.answer] for p in asked]
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])
