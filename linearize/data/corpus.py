"""A corpus: pools of tokens, mixed into rows by weight; and the text that is held out from all training.

Row k of a stage is a pure function of (seed, stage, k), so training resumes at any batch without a saved position.

- **Mixture.** Rows come in blocks of 1,000, in which every source has its exact share, in a drawn order.
- **Windows** (packing "cross"). For each epoch of a source its documents are shuffled and joined into a ring, and the
  ring is cut at a drawn phase into windows of T + 1 tokens that overlap by one: each token is input once an epoch.
- **Packing** ("separate"). Documents are laid whole into rows of T + 1 tokens, best fit first; longer ones are cut into
  pieces of a row. The rows are shuffled anew for each epoch. Positions start again with every document, and nothing
  is predicted across a border or in what stays empty.
- **Recall** rows are generated when they are asked for, from their own row's random numbers.
"""

import hashlib
import json
import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..modeling.errors import DataError
from ..tasks.recall import Haystack, prefix, separator, training_row
from .overlap import Overlap, overlap
from .pool import Pool

BLOCK = 1000  # rows in which the mixture is exact
IGNORED = -100  # the label of a position without loss

Slice = tuple[int, int]  # start and end in a pool


@dataclass
class Part:
    """One source of the mixture. `train` is None for recall rows, which are made on the spot."""

    label: str
    weight: float
    train: Pool | None
    spec: Any
    packed: dict[int, list[list[Slice]]] = field(default_factory=dict)  # T -> rows, for packing "separate"
    plans: dict[tuple[str, int], tuple[int, Any]] = field(
        default_factory=dict
    )  # (stage, T) -> epoch, its plan


@dataclass(frozen=True)
class HeldOut:
    label: str
    weight: float
    pool: Pool


class Corpus:
    """Deterministic training batches, and the held-out text beside them. Made by `build`."""

    def __init__(self, parts: Sequence[Part], held: Sequence[HeldOut], tokenizer: Any, spec: Any, seed: int):
        self.parts, self.held, self.tokenizer, self.seed = list(parts), list(held), tokenizer, seed
        self.seq_len: int = spec.seq_len
        self.separate: bool = spec.packing == "separate"
        self._end = separator(tokenizer)
        self._marks = {*prefix(tokenizer), *(self._end if len(self._end) == 1 else ())}
        self._blocks: dict[tuple[str, int], np.ndarray] = {}
        shares = np.array([part.weight for part in self.parts])
        # Without parts there is nothing to train on, only text to measure on.
        self._counts = _largest_remainder(shares / shares.sum(), BLOCK) if self.parts else shares

    def batch(
        self, index: int, *, batch_size: int, seq_len: int | None = None, stage: str
    ) -> dict[str, torch.Tensor]:
        """Batch `index` of a stage: input_ids and labels [B, T], position_ids [B, T] where documents are separate.

        labels[t] is the token after input_ids[t], or -100 where nothing is to be learnt.
        """
        length = seq_len or self.seq_len
        rows = [self._row(index * batch_size + i, length, stage) for i in range(batch_size)]
        names = ("input_ids", "labels", "position_ids") if self.separate else ("input_ids", "labels")
        return {name: torch.from_numpy(np.stack([row[i] for row in rows])) for i, name in enumerate(names)}

    def held_out(self, length: int, sequences: int) -> torch.Tensor:
        """The first windows of held-out tokens, [N, length + 1], without overlap; N may be less than asked.

        Several held-out texts share the windows by weight.
        """
        return self.held_out_windows(length, sequences)[0]

    def held_out_windows(self, length: int, sequences: int) -> tuple[torch.Tensor, list[str], list[int]]:
        """`held_out`, and of each window the label of its text and the number of the document that it begins in."""
        if not self.held:
            raise DataError(
                "data.held_out: recall documents alone leave no text to measure on; name a text source"
            )
        room = [len(held.pool) // (length + 1) for held in self.held]
        if not any(room):
            tokens = max(len(held.pool) for held in self.held)
            raise DataError(
                f"data: {self.label} has {tokens} tokens, fewer than one sequence of {length} + 1; "
                "give more text, or evaluate shorter sequences"
            )
        weights = np.array([held.weight * (n > 0) for held, n in zip(self.held, room, strict=True)])
        wanted = _largest_remainder(weights / weights.sum(), max(sequences, int((weights > 0).sum())))
        windows, labels, documents, before = [], [], [], 0
        for held, n, w in zip(self.held, room, wanted, strict=True):
            count = min(n, int(w))
            windows.append(held.pool.tokens[: (length + 1) * count].reshape(-1, length + 1))
            labels += [held.label] * count
            begins = np.arange(count) * (length + 1)
            documents += (before + np.searchsorted(held.pool.starts, begins, side="right") - 1).tolist()
            before += len(held.pool.starts) - 1
        ids = torch.from_numpy(np.concatenate(windows)[:sequences].astype(np.int64))
        return ids, labels[:sequences], documents[:sequences]

    def overlaps(self, n: int = 13) -> dict[str, Overlap]:
        """By held-out text, how many of its runs of `n` tokens stand in the text that is trained on too.

        Recall documents and what a fine-tuned teacher has read before are not looked at.
        """
        trained = [part.train.tokens for part in self.parts if part.train is not None]
        found = {}
        for held in self.held:
            grams, seen = overlap(held.pool.tokens, trained, n)
            found[held.label] = Overlap(n, grams, seen)
        return found if trained else {}

    @property
    def held_out_tokens(self) -> torch.Tensor:
        """All held-out tokens in a row, 1-D: the haystack of recall prompts."""
        pools = [held.pool.tokens.astype(np.int64) for held in self.held]
        return torch.from_numpy(np.concatenate(pools) if pools else np.zeros(0, dtype=np.int64))

    @property
    def label(self) -> str:
        """Where the held-out text is from, to stand beside every figure measured on it."""
        return " and ".join(held.label for held in self.held) or "no held-out text"

    @property
    def fingerprint(self) -> str:
        """sha256 of every token that can be drawn and of how it is drawn."""
        state = hashlib.sha256(json.dumps([self.seed, self.seq_len, self.separate]).encode())
        for part in self.parts:
            state.update(json.dumps(part.spec.model_dump(mode="json"), sort_keys=True).encode())
            state.update(b"" if part.train is None else part.train.digest().encode())
        for held in self.held:
            state.update(held.pool.digest().encode())
        return state.hexdigest()

    def _row(self, k: int, length: int, stage: str) -> tuple[np.ndarray, ...]:
        """Row k of a stage: inputs, labels and positions, each [T] int64."""
        part, rank = self._turn(k, stage)
        if part.train is None:
            rng = random.Random(_number(self.seed, stage, "recall", length, k))
            row = training_row(
                self.tokenizer,
                length + 1,
                rng,
                self._haystack(part.spec.haystack, rng),
                part.spec.kinds,
                part.spec.haystack,
            )
            tokens = np.array(row, dtype=np.int64)
            return self._finish(tokens, np.ones(len(tokens), dtype=bool), self._borders(tokens))
        pool = part.train
        slices = (self._packed if self.separate else self._window)(part, rank, length, stage)
        tokens = np.concatenate([pool.tokens[a:b] for a, b in slices]).astype(np.int64)
        learnt = np.ones(len(tokens), dtype=bool)
        if pool.learnt is not None:
            learnt = np.concatenate([pool.learnt[a:b] for a, b in slices])
        borders = np.cumsum([b - a for a, b in slices])
        empty = length + 1 - len(tokens)
        if empty > 0:
            tokens = np.concatenate([tokens, np.full(empty, self._end[0])])
            learnt = np.concatenate([learnt, np.zeros(empty, dtype=bool)])
        return self._finish(tokens, learnt, borders)

    def _finish(self, tokens: np.ndarray, learnt: np.ndarray, borders: np.ndarray) -> tuple[np.ndarray, ...]:
        """Inputs, shifted labels and positions of T + 1 tokens; `borders` are the places where documents begin."""
        labels = np.where(learnt, tokens, IGNORED)[1:]
        positions = np.arange(len(tokens) - 1)
        if self.separate:
            inner = borders[(borders > 0) & (borders < len(tokens))]
            labels[inner - 1] = IGNORED
            begins = np.zeros(len(tokens), dtype=np.int64)
            begins[inner] = inner
            positions = positions - np.maximum.accumulate(begins)[:-1]
        return tokens[:-1], labels, positions

    def _turn(self, k: int, stage: str) -> tuple[Part, int]:
        """The source whose turn row k is, and how many rows of the stage it has given before."""
        block, place = divmod(k, BLOCK)
        if (stage, block) not in self._blocks:
            order = np.repeat(np.arange(len(self.parts)), self._counts)
            self._blocks = {(stage, block): _numpy(self.seed, stage, "mixture", block).permutation(order)}
        order = self._blocks[stage, block]
        which = int(order[place])
        return self.parts[which], block * int(self._counts[which]) + int((order[:place] == which).sum())

    def _window(self, part: Part, rank: int, length: int, stage: str) -> list[Slice]:
        """The slices of a pool that make window `rank` of a source, T + 1 tokens in all."""
        pool = part.train
        assert pool is not None
        long_enough(pool, length, part.label)
        epoch, turn = divmod(rank, (len(pool) - 1) // length)
        order, ends, phase, turns = self._plan(part, epoch, length, stage)
        at = (phase + int(turns[turn]) * length) % len(pool)
        slices, missing = [], length + 1
        d = int(np.searchsorted(ends, at, side="right"))
        while missing > 0:
            document = order[d]
            a = int(pool.starts[document]) + at - (int(ends[d - 1]) if d else 0)
            b = min(int(pool.starts[document + 1]), a + missing)
            slices.append((a, b))
            missing -= b - a
            d = (d + 1) % len(order)
            at = int(ends[d - 1]) if d else 0
        return slices

    def _plan(
        self, part: Part, epoch: int, length: int, stage: str
    ) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
        """One epoch of windows: order of documents, their ends in the ring, the phase, the order of windows."""
        known = part.plans.get((stage, length))
        if known is None or known[0] != epoch:
            pool = part.train
            assert pool is not None
            rng = _numpy(self.seed, stage, "windows", length, epoch, self.parts.index(part))
            order = rng.permutation(len(pool.starts) - 1)
            ends = np.cumsum(np.diff(pool.starts)[order])
            plan = order, ends, int(rng.integers(len(pool))), rng.permutation((len(pool) - 1) // length)
            known = part.plans[stage, length] = epoch, plan
        return known[1]

    def _packed(self, part: Part, rank: int, length: int, stage: str) -> list[Slice]:
        """The documents, or pieces of long ones, that make packed row `rank` of a source."""
        assert part.train is not None
        if length not in part.packed:
            part.packed[length] = pack(part.train, length + 1)
        rows = part.packed[length]
        if not rows:
            raise DataError(
                f"data: {part.label} has nothing to learn in rows of {length} tokens; give longer text"
            )
        epoch, turn = divmod(rank, len(rows))
        known = part.plans.get((stage, length))
        if known is None or known[0] != epoch:
            rng = _numpy(self.seed, stage, "packed", length, epoch, self.parts.index(part))
            known = part.plans[stage, length] = epoch, rng.permutation(len(rows))
        return rows[int(known[1][turn])]

    def _haystack(self, mix: str, rng: random.Random) -> Haystack | None:
        """Text of the other sources, without what opens and ends documents: it would break a recall document in two."""
        texts = [
            (other.train, other.weight)
            for other in self.parts
            if other.train is not None and len(other.train)
        ]
        if not texts or mix == "noise":
            return None
        pools, weights = [pool for pool, _ in texts], [weight for _, weight in texts]

        def draw(n: int) -> list[int]:
            out: list[int] = []
            while len(out) < n:
                tokens = rng.choices(pools, weights)[0].tokens
                start = rng.randrange(max(1, len(tokens) - n))
                window = tokens[start : start + n - len(out)]
                out += [token for token in window.tolist() if token not in self._marks]
            return out

        return draw

    def _borders(self, tokens: np.ndarray) -> np.ndarray:
        """Where documents begin in a generated row: behind every end-of-sequence token."""
        if len(self._end) != 1:
            return np.zeros(0, dtype=np.int64)
        return np.flatnonzero(tokens == self._end[0]) + 1


def pack(pool: Pool, room: int) -> list[list[Slice]]:
    """Rows of at most `room` tokens: whole documents by best fit, those longer than a row cut into pieces.

    Pieces of one document overlap by one token, so that each token but the first is predicted once. A piece with
    nothing to learn is left out.
    """
    pieces: list[Slice] = []
    for start, end in zip(pool.starts[:-1].tolist(), pool.starts[1:].tolist(), strict=True):
        pieces += [(a, min(a + room, end)) for a in range(start, max(end - 1, start), room - 1)]
    if pool.learnt is not None:
        pieces = [(a, b) for a, b in pieces if pool.learnt[a + 1 : b].any()]
    pieces = [(a, b) for a, b in pieces if b - a > 1]
    pieces.sort(key=lambda piece: piece[0] - piece[1])
    rows: list[list[Slice]] = []
    left: list[tuple[int, int]] = []  # (room left, row), sorted
    for a, b in pieces:
        size = b - a
        at = bisect_left(left, (size, -1))
        if at < len(left):
            free, row = left.pop(at)
        else:
            free, row = room, len(rows)
            rows.append([])
        rows[row].append((a, b))
        if free - size > 1:
            insort(left, (free - size, row))
    return rows


def long_enough(pool: Pool, length: int, label: str) -> None:
    if len(pool) <= length:
        raise DataError(
            f"data: {label} has {len(pool)} tokens to train on, fewer than one sequence of {length} + 1; "
            "give more text or lower data.seq_len"
        )


def _largest_remainder(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers that sum to `total`, as near to `shares` as can be; every positive share gets at least one."""
    counts = np.where(shares > 0, np.maximum(1, np.floor(shares * total)), 0).astype(int)
    while counts.sum() > total:
        counts[np.argmax(counts)] -= 1
    while counts.sum() < total:
        counts[np.argmax(np.where(shares > 0, shares * total - counts, -np.inf))] += 1
    return counts


def _number(*words: Any) -> int:
    return int.from_bytes(hashlib.sha256("|".join(map(str, words)).encode()).digest()[:8])


def _numpy(*words: Any) -> np.random.Generator:
    return np.random.default_rng(_number(*words))
