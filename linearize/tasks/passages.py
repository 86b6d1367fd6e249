"""Pass keys, look-up tables and copies: recall tasks in wordings of our own, which need no other package.

The filler line is that of Landmark Attention (arXiv:2305.16300). The table is the in-context cousin of
associative recall (MQAR), which trains models of its own; it is not MQAR.
"""

import random
from dataclasses import dataclass
from typing import Any, Literal

from ..modeling.errors import DataError
from .budget import Ask, Haystack, Question, largest, short
from .recall import FILLER, filler, piece
from .ruler import Fresh
from .words import WORDS

PASSKEY_INTRO = "A pass key is hidden in the text below. Remember it; you will be asked for it."
PASSKEY = "The pass key is {value}. Remember it. {value} is the pass key."
PASSKEY_REPLY = "The pass key is"
PASSKEY_QUESTION = f"What is the pass key? {PASSKEY_REPLY}"
TABLE_INTRO = "Each line of this table has a key and its value."
TABLE_QUESTION = "Find the value of each key in the table."
SOLVED = 3  # pairs shown with their values before the one that is asked for
ROWS = [2**k for k in range(4, 11)]  # of a table under "ruler"
FEWEST = 5
CUE = 8  # tokens of a block that are given, to say which block goes on

PASSKEY_TOKENS, TABLE_TOKENS = 10, 48


@dataclass(frozen=True)
class Passkey:
    """One number among filler lines; `low` to `high` are the least and the greatest."""

    name: str = "passkey"
    low: int = 10_000
    high: int = 99_999

    def __call__(self, ask: Ask) -> Question:
        """The share `depth` of the lines stands before the number; None draws a share."""
        value = str(ask.rng.randrange(self.low, self.high + 1))
        share = ask.rng.random() if ask.depth is None else ask.depth
        needle = PASSKEY.format(value=value)
        count = ask.counter(PASSKEY_REPLY)

        def build(lines: int) -> str:
            before = int(lines * share + 1e-9)
            hay = [FILLER.strip()] * lines
            return "\n".join([PASSKEY_INTRO, *hay[:before], needle, *hay[before:], PASSKEY_QUESTION])

        body = ask.filled(build, count, PASSKEY_TOKENS, name=self.name)
        return Question(count.ids(body), (value,), count.depth(body, needle), count.continuation(value))


@dataclass(frozen=True)
class Table:
    """Key-value retrieval: a table of distinct lines, three of them solved, one asked for."""

    name: str
    key: Literal["words", "uuids"]
    value: Literal["numbers", "uuids"]

    def __call__(self, ask: Ask) -> Question:
        """As many lines as fit, or the largest power of two of them under "ruler"; `depth` is the line's place."""
        fresh, rng = Fresh(ask.rng), ask.rng
        share, order = rng.random() if ask.depth is None else ask.depth, rng.getrandbits(64)
        sought, solved = (fresh(self.key), fresh(self.value)), [self._pair(fresh) for _ in range(SOLVED)]
        others = [*solved]
        count = ask.counter(f"{sought[0]}:")
        shown = "\n".join(f"{key}: {value}" for key, value in solved)

        def build(lines: int) -> str:
            while len(others) < lines - 1:
                others.append(self._pair(fresh))
            table = others[: lines - 1]
            random.Random(order).shuffle(table)
            table.insert(round(share * (lines - 1)), sought)
            body = "\n".join(f"{key}: {value}" for key, value in table)
            return f"{TABLE_INTRO}\n\n{body}\n\n{TABLE_QUESTION}\n\n{shown}\n{sought[0]}:"

        body = ask.filled(
            build,
            count,
            TABLE_TOKENS,
            name=self.name,
            rung=lambda k: ([FEWEST, *ROWS])[k] if k <= len(ROWS) else ROWS[-1] * 2 ** (k - len(ROWS)),
        )
        needle = f"\n{sought[0]}: {sought[1]}"
        return Question(
            count.ids(body), (sought[1],), count.depth(body, needle), count.continuation(sought[1])
        )

    def _pair(self, fresh: Fresh) -> tuple[str, str]:
        return fresh(self.key), fresh(self.value)


@dataclass(frozen=True)
class Copying:
    """A block of `size` tokens, filler, an empty line and the block's first eight tokens, to be continued.

    "fresh" blocks are random words, "natural" ones are cut from the haystack. Blocks and filler are counted in
    tokens, so the prompt fills its length exactly; at length 0 there is no filler.
    """

    name: str
    kind: Literal["fresh", "natural"]
    size: int

    def __call__(self, ask: Ask) -> Question:
        tokenizer, length, count = ask.tokenizer, ask.length, ask.counter()
        opening, closing = count.opening, count.closing
        block = self._block(tokenizer, ask.rng, ask.haystack)
        blank = piece(tokenizer, "\n\n")
        fixed = len(opening) + self.size + len(blank) + len(closing) + self.size  # the cue and what follows
        if 0 < length < fixed:
            raise short(self.name, length, fixed)
        gap = filler(tokenizer, length - fixed) if length else []
        ids = [*opening, *block, *gap, *blank, *closing, *block[:CUE]]
        rest = block[CUE:]
        return Question(ids, (tokenizer.decode(rest),), len(opening) / len(ids), rest)

    def _block(self, tokenizer: Any, rng: random.Random, haystack: Haystack | None) -> list[int]:
        if self.kind == "fresh":
            words = [rng.choice(WORDS) for _ in range(self.size)]
            return piece(tokenizer, " " + " ".join(words))[: self.size]
        if haystack is None or not haystack.words:
            raise DataError(f"{self.name}: copies text, and none was given; name a haystack")
        sentences = haystack.sentences
        start = rng.randrange(len(sentences))
        many = largest(
            lambda k: len(piece(tokenizer, _run(sentences, start, k + 1))), self.size - 1, 4 * self.size
        )
        return piece(tokenizer, _run(sentences, start, many + 2))[: self.size]


def _run(sentences: list[str], start: int, count: int) -> str:
    """`count` sentences from `start` on, going round."""
    return " " + " ".join(sentences[(start + i) % len(sentences)] for i in range(count))
