"""What a generated answer is worth. Each scorer reads text alone and knows nothing of models.

`contains` is RULER's score (arXiv:2404.06654): the share of references that stand anywhere in the answer, which a
model earns by writing many numbers. `strict` reads the first strings of the answer's kind instead; where the two
differ, a student sprays.
"""

import re
from collections.abc import Sequence
from typing import Literal

from .babi import PLACES

Kind = Literal["number", "integer", "uuid", "name", "word", "code", "place", "tokens"]

SHAPES: dict[str, re.Pattern[str]] = {
    "number": re.compile(r"(?<!\d)\d{7}(?!\d)"),
    "integer": re.compile(r"\d+"),
    "uuid": re.compile(
        r"(?<![0-9a-f])[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}(?![0-9a-f])",
        re.IGNORECASE,
    ),
    "name": re.compile(r"(?<![A-Za-z])[A-Z]{5}(?![A-Za-z])"),
    "word": re.compile(r"[A-Za-z]+(?:-[A-Za-z]+)*"),
    "code": re.compile(r"(?<![a-z])[a-z]{6}(?![a-z])", re.IGNORECASE),
}
_CONTROL = re.compile(r"[\x00-\x1f]")
_PLACE = re.compile(rf"\b({'|'.join(PLACES)})\b")
_END_OF_ANSWER = re.compile(r"[.\n<]")


def contains(text: str, references: Sequence[str]) -> float:
    """Share of the references in the text, whatever their case; control characters are line breaks."""
    text = _CONTROL.sub("\n", text.strip()).strip().lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def strict(text: str, references: Sequence[str], kind: Kind) -> bool:
    """Whether the first strings of this kind, as many as there are references, are the references in any order."""
    found = list(dict.fromkeys(match.lower() for match in SHAPES[kind].findall(text)))
    return set(found[: len(references)]) == {reference.lower() for reference in references}


def place(text: str, target: str, question: str) -> bool:
    """BABILong's rule (2406.10149): the places of the first sentence, without the question's, are the target alone."""
    said = _END_OF_ANSWER.split(text.lower().lstrip(), maxsplit=1)[0]
    return set(_PLACE.findall(said)) - set(_PLACE.findall(question.lower())) == {target}


def tokens(written: Sequence[int], wanted: Sequence[int]) -> tuple[float, float, bool]:
    """Share of the wanted tokens that stand in their place, share before the first wrong one, and whether all do."""
    same = [a == b for a, b in zip(written, wanted, strict=False)]
    start = same.index(False) if False in same else len(same)
    return sum(same) / len(wanted), start / len(wanted), start == len(wanted)
