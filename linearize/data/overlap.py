"""How much of a text stands word for word in another: runs of tokens, compared by hash."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

# Tokens of the training text that are hashed at a time.
CHUNK = 1 << 20
_SPREAD, _BASE = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)


@dataclass(frozen=True)
class Overlap:
    """Of `grams` runs of `n` tokens in a held-out text, `seen` are in the training text as well."""

    n: int
    grams: int
    seen: int

    @property
    def share(self) -> float:
        return self.seen / self.grams if self.grams else 0.0


def overlap(text: np.ndarray, trained: Iterable[np.ndarray], n: int) -> tuple[int, int]:
    """Runs of `n` tokens in `text`, and how many of them any of `trained` has too.

    Runs are 64-bit hashes: two that differ are taken for one less than once in 2^40 comparisons of such texts.
    """
    hashes = grams(text, n)
    known, place = np.unique(hashes, return_inverse=True)
    seen = np.zeros(len(known), dtype=bool)
    for tokens in trained if len(known) else ():
        for start in range(0, len(tokens), CHUNK):
            theirs = grams(tokens[start : start + CHUNK + n - 1], n)
            at = np.searchsorted(known, theirs).clip(max=len(known) - 1)
            seen[at[known[at] == theirs]] = True
    return len(hashes), int(seen[place].sum())


def grams(tokens: np.ndarray, n: int) -> np.ndarray:
    """[max(0, N - n + 1)] uint64: a hash of every run of `n` tokens."""
    mixed = (tokens.astype(np.uint64) + np.uint64(1)) * _SPREAD
    mixed ^= mixed >> np.uint64(29)
    count = max(0, len(tokens) - n + 1)
    value = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        value = value * _BASE + mixed[offset : offset + count]
        value ^= value >> np.uint64(32)
    return value
