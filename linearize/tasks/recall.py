"""Recall documents: something to remember, hidden in a haystack, and asked for at the end.

One set of wordings serves both ends of a run. `TASKS` make evaluation prompts with one needle and its
answer; `training_row` makes training sequences with several needles, several questions, and look-up tables.
The magic-number sentence is RULER's (arXiv:2404.06654, always the plural "magic numbers"); filler and pass
key are those of Landmark Attention (arXiv:2305.16300).

How this differs from RULER: the haystack may be any text, lengths are filled to the token, and a needle goes
at a uniformly drawn token, not before one of forty sentences. A key is one word or two with a hyphen. Where
text is the haystack, say which text: such figures are not RULER's.

Everything is assembled from token lists, so that a length is exact for every tokenizer. Pure Python: no
tensors, no global randomness.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

from ..modeling.errors import DataError
from .words import WORDS

VERSION = 1  # of the wordings and of the order of random draws; part of every sample's seed

FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
PASSKEY_INTRO = "There is important info hidden inside a lot of irrelevant text. Find it and memorize it."
PASSKEY = " The pass key is {value}. Remember it. {value} is the pass key."
PASSKEY_QUESTION = " What is the pass key? The pass key is"
MAGIC_INTRO = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n"
)
MAGIC = " One of the special magic numbers for {key} is: {value}."
MAGIC_QUESTION = (
    " What is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)
GIVEAWAYS = ("special magic number", "pass key")  # a haystack that says these has needles of its own

Haystack = Callable[[int], list[int]]
Mix = Literal["noise", "text", "mixed"]

KINDS: dict[str, float] = {"passkey": 1.0, "numbers": 2.0, "table": 1.0}  # kind of training document: share
NOISE_SHARE: dict[str, float] = {"noise": 1.0, "text": 0.0, "mixed": 0.35}
SHORTEST_TEXT = 16  # tokens; a haystack with no clean piece of this length is given up


class Tokenizer(Protocol):
    """What is asked of a tokenizer; every one of transformers' has it."""

    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: list[int]) -> str: ...


@dataclass(frozen=True)
class Prompt:
    """A question with its evidence: `ids` end right before `answer`; `depth` is needle start / all `ids`."""

    ids: list[int]
    answer: list[int]
    depth: float


@dataclass(frozen=True)
class Task:
    """One question, and one needle or several, of which one is asked for. A "text" `haystack` is given by the caller,
    "noise" is our own filler."""

    name: str
    needle: Literal["passkey", "magic"]
    value: Literal["passkey", "number", "uuid"]
    haystack: Literal["noise", "text"]
    needles: int = 1

    def make(
        self,
        tokenizer: Tokenizer,
        length: int,
        rng: random.Random,
        haystack: Haystack | None = None,
        *,
        depth: float | None = None,
    ) -> Prompt:
        """A prompt that with its answer is exactly `length` tokens, begin-of-sequence token included.

        `haystack(n)` returns n tokens of text, other ones at each call. The needle goes at a uniformly drawn
        token of the haystack, or after the share `depth` of it. A haystack that holds the value, or needles
        of its own, is drawn again; the key may stand in it as a plain word.
        """
        key, value = draw_key(rng), VALUES[self.value](rng)
        intro, needle, question = WORDINGS[self.needle]
        start = prefix(tokenizer) + piece(tokenizer, intro)
        hidden = piece(tokenizer, needle.format(key=key, value=value))
        # The haystack of a magic number ends in a line break; that of a pass key runs on into the question.
        mark = "\n" if self.needle == "magic" else ""
        asked = piece(tokenizer, mark + question.format(key=key))
        answer = piece(tokenizer, f" {value}")
        others = self._others(tokenizer, rng, key, value)
        fixed = len(start) + len(hidden) + sum(map(len, others)) + len(asked) + len(answer)
        room = length - fixed
        if room < 0:
            what = "the needle" if self.needles == 1 else "its needles"
            raise DataError(
                f"{self.name}: a prompt of {length} tokens cannot hold {what}; ask for {fixed} or more"
            )
        if self.haystack == "noise":
            hay = filler(tokenizer, room)
        elif haystack is None:
            raise DataError(
                f"{self.name}: hides its needle in text, and none was given; give haystack tokens"
            )
        else:
            hay = _clean_text(tokenizer, haystack, room, (value, *GIVEAWAYS))
        cut = rng.randrange(room + 1) if depth is None else round(depth * room)
        # The others lie at uniform places of their own, in the order drawn where two fall together.
        cuts = sorted((rng.randrange(room + 1), index) for index in range(len(others)))
        ids, done, before = list(start), 0, 0
        for place, index in sorted([*cuts, (cut, -1)]):
            ids += hay[done:place]
            done = place
            if index < 0:
                before = len(ids)
            ids += hidden if index < 0 else others[index]
        ids += [*hay[done:], *asked]
        return Prompt(ids, answer, before / len(ids))

    def _others(self, tokenizer: Tokenizer, rng: random.Random, key: str, value: str) -> list[list[int]]:
        """The needles that nobody asks for, under keys and values of their own."""
        made: dict[str, str] = {key: value}
        while len(made) < self.needles:
            other, found = draw_key(rng), VALUES[self.value](rng)
            if other not in made and found not in made.values():
                made[other] = found
        needle = WORDINGS[self.needle][1]
        return [piece(tokenizer, needle.format(key=k, value=v)) for k, v in list(made.items())[1:]]


def generator(
    task: str, length: int, index: int, seed: int, depth: float | None = None, version: int = VERSION
) -> random.Random:
    """The random numbers of one sample: adding a length, a task or a sample moves no other."""
    where = "random" if depth is None else f"{depth:g}"
    return random.Random(_digest(f"{task}|{version}|{length}|{where}|{index}|{seed}"))


def from_tokens(tokens: Sequence[int], rng: random.Random) -> Haystack:
    """A haystack of uniformly drawn windows of `tokens` (list, array, 1-D tensor), joined if few."""

    def draw(n: int) -> list[int]:
        out: list[int] = []
        while len(out) < n:
            size = min(n - len(out), len(tokens))
            start = rng.randrange(len(tokens) - size + 1)
            out += [int(token) for token in tokens[start : start + size]]
        return out

    if len(tokens) == 0:
        raise DataError("recall haystack: no tokens to draw from; give a longer text")
    return draw


def training_row(
    tokenizer: Tokenizer,
    length: int,
    rng: random.Random,
    haystack: Haystack | None,
    kinds: Sequence[str] = tuple(KINDS),
    mix: Mix = "mixed",
) -> list[int]:
    """Exactly `length` tokens: recall documents with answers, text in the rest, each opened and ended as a text is.

    `mix` says where needles hide: "noise", "text", or "mixed" (every pass key and 35 % of the rest in noise).
    Without a `haystack` all is noise.
    """
    mix = mix if haystack is not None else "noise"
    begin, end = prefix(tokenizer), separator(tokenizer)
    hay = haystack or (lambda n: filler(tokenizer, n))
    worthwhile = max(320, *(_least(tokenizer, kind) for kind in kinds))
    row: list[int] = []
    while (left := length - len(row) - len(begin) - len(end)) > 0:
        fill_up = bool(row) and (left < worthwhile or (haystack is not None and rng.random() < 0.5))
        row += begin + (hay(left) if fill_up else _document(tokenizer, left, rng, haystack, kinds, mix)) + end
    return (row + end * length)[:length]


def shortest_row(tokenizer: Tokenizer, kinds: Sequence[str] = tuple(KINDS)) -> int:
    """A length at which `training_row` can draw every kind: the longest one-needle document, opened and ended."""
    return max(_least(tokenizer, kind) for kind in kinds) + len(prefix(tokenizer)) + len(separator(tokenizer))


def draw_key(rng: random.Random) -> str:
    """One word, or two joined by a hyphen."""
    return rng.choice(WORDS) if rng.random() < 0.5 else f"{rng.choice(WORDS)}-{rng.choice(WORDS)}"


def draw_uuid(rng: random.Random) -> str:
    """32 hexadecimal digits from 128 seeded bits, in the usual groups."""
    digits = f"{rng.getrandbits(128):032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def prefix(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that the tokenizer puts before a text, such as begin-of-sequence; often none."""
    plain, full = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def piece(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of `text` as they are inside a longer text: no special tokens, no mark of a start.

    A tokenizer of the SentencePiece kind opens a string with a space of its own; behind a letter it does not.
    """
    return behind_letter(tokenizer, text) if text[:1].isspace() else _encoded(tokenizer, text)


def behind_letter(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of white space or punctuation, and what follows, where a letter stands before it."""
    before, both = (_encoded(tokenizer, s) for s in ("a", f"a{text}"))
    return both[len(before) :] if both[: len(before)] == before else _encoded(tokenizer, text)


def _encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def separator(tokenizer: Tokenizer) -> list[int]:
    """What ends a document: the end-of-sequence token, or an empty line where the tokenizer has none."""
    if tokenizer.eos_token_id is not None:
        return [tokenizer.eos_token_id]
    return piece(tokenizer, "\n\n") or piece(tokenizer, ".")


def filler(tokenizer: Tokenizer, n: int) -> list[int]:
    """`n` tokens of the filler line, repeated."""
    line = piece(tokenizer, FILLER)
    return (line * (n // len(line) + 1))[:n]


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10**6, 10**7))


def _passkey(rng: random.Random) -> str:
    return str(rng.randrange(10**4, 10**5))


def _any_value(rng: random.Random) -> str:
    """What training documents hide: 65 % numbers of 4 to 7 digits, 15 % words, 20 % uuids."""
    kind = rng.random()
    if kind < 0.65:
        return "".join(rng.choice("0123456789") for _ in range(rng.choice((4, 5, 7, 7, 7))))
    return rng.choice(WORDS) if kind < 0.8 else draw_uuid(rng)


def _document(
    tokenizer: Tokenizer,
    room: int,
    rng: random.Random,
    haystack: Haystack | None,
    kinds: Sequence[str],
    mix: Mix,
) -> list[int]:
    """One recall document of at most `room` tokens, half of the time shorter than that."""
    fitting = [kind for kind in kinds if _least(tokenizer, kind) <= room]
    if not fitting:
        least = shortest_row(tokenizer, kinds)
        raise DataError(
            f"data.seq_len: {room + 1} tokens are too few for recall documents; use {least} or more"
        )
    kind = rng.choices(fitting, [KINDS[kind] for kind in fitting])[0]
    if kind == "table":
        return _table(tokenizer, room, rng)
    least = max(256, _least(tokenizer, kind))
    room = room if rng.random() < 0.5 or room <= least else rng.randrange(least, room)
    share = 1.0 if kind == "passkey" and mix == "mixed" else NOISE_SHARE[mix]
    hay = haystack if haystack is not None and rng.random() >= share else lambda n: filler(tokenizer, n)
    return (_passkey_document if kind == "passkey" else _magic_document)(tokenizer, room, rng, hay)


def _passkey_document(tokenizer: Tokenizer, room: int, rng: random.Random, hay: Haystack) -> list[int]:
    value = _any_value(rng)
    needles = [piece(tokenizer, PASSKEY.format(value=value))]
    asked = piece(tokenizer, f"{PASSKEY_QUESTION} {value}.")
    start = piece(tokenizer, PASSKEY_INTRO)
    return _hide(start, needles, asked, hay, room, rng)


def _magic_document(tokenizer: Tokenizer, room: int, rng: random.Random, hay: Haystack) -> list[int]:
    """1, 2, 4 or 8 needles and 1, 2 or 4 questions, fewer where they do not fit."""
    start = piece(tokenizer, MAGIC_INTRO)
    many = rng.choice((1, 1, 2, 4, 8))
    pairs = list({draw_key(rng): _any_value(rng) for _ in range(many)}.items())
    order = rng.sample(range(len(pairs)), len(pairs))
    questions = rng.choice((1, 2, 4))
    while True:
        needles = [piece(tokenizer, MAGIC.format(key=key, value=value)) for key, value in pairs]
        chosen = [pairs[i] for i in order if i < len(pairs)][:questions]
        text = "".join(f"{MAGIC_QUESTION.format(key=key)} {value}." for key, value in chosen)
        asked = piece(tokenizer, "\n" + text)
        if len(start) + sum(map(len, needles)) + len(asked) <= room or len(pairs) == 1:
            return _hide(start, needles, asked, hay, room, rng)
        pairs = pairs[: len(pairs) // 2]


def _table(tokenizer: Tokenizer, room: int, rng: random.Random) -> list[int]:
    """Lines of a key and three digits, then some of them again in another order, when they can be known."""
    many, asked = rng.choice((8, 16, 32, 64, 96)), rng.choice((8, 16, 32, 64))
    pairs = list({draw_key(rng): f"{rng.randrange(1000):03d}" for _ in range(many)}.items())
    while True:
        again = rng.sample(pairs, min(asked, len(pairs)))
        lines = ["\n".join(f"{key}: {value}" for key, value in part) for part in (pairs, again)]
        ids = piece(tokenizer, "\n\n".join(lines) + "\n")
        if len(ids) <= room or len(pairs) == 1:
            return ids
        pairs = pairs[: len(pairs) // 2]


def _hide(
    start: list[int], needles: list[list[int]], asked: list[int], hay: Haystack, room: int, rng: random.Random
) -> list[int]:
    """The needles at sorted uniform places of as much haystack as fits into `room`."""
    size = max(0, room - len(start) - sum(map(len, needles)) - len(asked))
    straw = hay(size)
    cuts = sorted(rng.randrange(size + 1) for _ in needles)
    out, done = list(start), 0
    for cut, needle in zip(cuts, needles, strict=True):
        out += straw[done:cut] + needle
        done = cut
    return out + straw[done:] + asked


@lru_cache(maxsize=64)
def _least(tokenizer: Tokenizer, kind: str) -> int:
    """Tokens that the smallest document of a kind can need, whatever key and value are drawn."""
    word = max(WORDS, key=lambda w: len(piece(tokenizer, f" {w}")))
    key, value = f"{word}-{word}", "00000000-0000-0000-0000-000000000000"
    magic = MAGIC.format(key=key, value=value) + f"\n{MAGIC_QUESTION.format(key=key)} {value}."
    texts = {
        "passkey": f"{PASSKEY_INTRO}{PASSKEY.format(value=value)}{PASSKEY_QUESTION} {value}.",
        "numbers": MAGIC_INTRO + magic,
        "table": f"{key}: 000\n\n{key}: 000\n",
    }
    return len(piece(tokenizer, texts[kind]))


def _clean_text(tokenizer: Tokenizer, haystack: Haystack, n: int, banned: Sequence[str]) -> list[int]:
    """`n` tokens of text in which nothing banned is said, in as few windows as the text allows."""
    out: list[int] = []
    size, draws = n, 0
    while len(out) < n:
        window = haystack(min(size, n - len(out)))
        text = tokenizer.decode(window)
        draws += 1
        if not any(word in text for word in banned):
            out += window
        elif draws % 8 == 0 and size > SHORTEST_TEXT:
            size //= 2
        elif draws > 1000:
            raise DataError("recall haystack: every window has a needle of its own; give another text")
    return out


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


WORDINGS = {
    "passkey": (PASSKEY_INTRO, PASSKEY, PASSKEY_QUESTION),
    "magic": (MAGIC_INTRO, MAGIC, MAGIC_QUESTION),
}
VALUES: dict[str, Callable[[random.Random], str]] = {
    "passkey": _passkey,
    "number": _number,
    "uuid": draw_uuid,
}
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("passkey", "passkey", "passkey", "noise"),
        Task("number_in_noise", "magic", "number", "noise"),
        Task("number_in_text", "magic", "number", "text"),
        Task("uuid_in_text", "magic", "uuid", "text"),
        Task("number_of_4_in_text", "magic", "number", "text", needles=4),
        Task("number_of_16_in_text", "magic", "number", "text", needles=16),
    )
}
