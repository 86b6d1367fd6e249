"""What every task of the suite shares: the question it makes, the text it hides things in, the exact budget.

A prompt and the tokens that the task may generate never pass the length asked for, counted with the tokenizer
under test. Two ways of filling: "grid" takes as much haystack as fits, to one unit; "ruler" takes the steps of
the reference implementations, which leave more room.
"""

import bisect
import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

from ..modeling.errors import DataError
from .form import Counter, Form, plain
from .recall import FILLER

Fill = Literal["grid", "ruler"]
LEAST_FILL = 0.97  # of the length, in "grid"; with less, two models' lengths would no longer mean the same

# The space between two sentences: after a stop and perhaps a closing quote, before a new start.
_BETWEEN = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]”’]))\s+(?=[\"'(\[“‘]?[A-Z0-9])")


@dataclass(frozen=True)
class Question:
    """One prompt and what is right. `ids` is all that a model sees before it answers."""

    ids: list[int]
    references: tuple[str, ...]
    """Every string that the answer has to contain; their order means nothing unless the task says so."""
    depth: float | None = None
    """Start of the needle that is asked for, as a share of the prompt's tokens."""
    answer: list[int] | None = None
    """The tokens of the one right continuation, where there is one."""
    series: tuple[tuple[list[int], list[int]], ...] = ()
    """Of several answers, in the order that they are forced in: the tokens before each, and its own."""
    choices: tuple[tuple[int, ...], ...] = ()
    """Continuations to rank, where the task is multiple choice; `right` is the index of the true one."""
    right: int = 0
    asked: str = ""
    """The words of the question itself, where the scorer must leave them out of the answer."""
    guesses: dict[str, str] = field(default_factory=dict)
    """What rules that understand nothing would answer, by their names."""


@dataclass(frozen=True)
class Haystack:
    """Text to hide needles in, as sentences of words; white space is collapsed to single spaces."""

    name: str
    text: str
    line: str = ""
    """What counts as one sentence where the text is one line again and again."""

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def sentences(self) -> list[str]:
        if self.line:
            return [self.line] * self.text.count(self.line)
        return [part for part in _BETWEEN.split(" ".join(self.text.split())) if part]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(len(sentence.split()) for sentence in self.sentences))

    @property
    def words(self) -> int:
        return self._ends[-1] if self._ends else 0

    def first(self, count: int) -> list[str]:
        """The sentences of the first `count` words; the last may be cut short."""
        whole = bisect.bisect_right(self._ends, count)
        rest = count - (self._ends[whole - 1] if whole else 0)
        cut = [" ".join(self.sentences[whole].split()[:rest])] if rest and whole < len(self.sentences) else []
        return self.sentences[:whole] + cut


def noise(words: int = 400_000) -> Haystack:
    """The filler line for ever: a haystack where there is no text."""
    line = FILLER.strip()
    return Haystack("the filler line, repeated", " ".join([line] * (words // len(line.split()) + 1)), line)


def largest(cost: Callable[[int], int], room: int, most: int | None = None, step: int = 8) -> int:
    """The largest k from 0 to `most` whose `cost`, which grows with k, is at most `room`; 0 where none is.

    By interpolation, with halves between: a cost is a tokenizer's work on a whole prompt. `step` is tried first.
    """
    low, at_low, high, at_high, turn = 0, cost(0), None, 0, 0
    while most is None or low < most:
        if high is None:
            guess = low + step if most is None else min(low + step, most)
        elif high - low == 1:
            break
        elif turn % 3 == 2:
            guess = (low + high) // 2
        else:
            share = (room - at_low) / max(1, at_high - at_low)
            guess = min(high - 1, max(low + 1, low + int(share * (high - low))))
        turn += 1
        found = cost(guess)
        if found <= room:
            pace = max(0.01, (found - at_low) / (guess - low))
            step = max(1, int((room - found) / pace) + 1)
            low, at_low = guess, found
        else:
            high, at_high = guess, found
    return low


def short(name: str, length: int, least: int) -> DataError:
    """What is said where not even the smallest prompt of a task fits."""
    return DataError(f"{name}: {length} tokens cannot hold its smallest prompt; give {least} or more")


@dataclass(frozen=True)
class Ask:
    """What one question is made of; its task is not told what else is asked."""

    tokenizer: Any
    length: int
    """Tokens that prompt and answer may take together; 0 is as many as the question alone needs."""
    rng: random.Random
    depth: float | None = None
    """Where the needle shall stand, as a share of the haystack's units; None lets the task draw it."""
    haystack: Haystack | None = None
    fill: Fill = "grid"
    index: int = 0
    """Of the question in its cell."""
    form: Form | None = None
    """None is plain text."""

    def counter(self, reply: str = "") -> Counter:
        """Of prompts that end with ``reply``, the start of the answer."""
        return Counter(self.tokenizer, self.form or plain(self.tokenizer), reply)

    def filled(
        self,
        build: Callable[[int], str],
        count: Counter,
        reserve: int,
        *,
        name: str,
        rung: Callable[[int], int] = lambda k: k,
        extra: int = 0,
        limit: int | None = None,
        how: Fill | None = None,
    ) -> str:
        """The longest prompt `build(n)` whose tokens and `reserve` stay within the length.

        "grid" takes every n from `rung(0)` on; "ruler" takes `rung(k)`, k = 0, 1, ..., and counts `extra` tokens
        (of the answers) too, as the reference does. `limit` is the most units that there are.
        """
        grid, least = (how or self.fill) == "grid", rung(0)
        size = (lambda k: least + k) if grid else rung
        room = self.length - reserve - (0 if grid else extra)
        smallest = count(build(least))
        if smallest > self.length - reserve:
            raise short(name, self.length, smallest + reserve)
        most = None if limit is None else largest(size, limit)
        step = 8 if grid else 1  # units are small and even, rungs are neither
        return build(size(largest(lambda k: count(build(size(k))), room, most, step)))
