"""What a page is made of, whatever it is written in: sections of words, tables, figures."""

from dataclasses import dataclass, field

from .tables import Table


@dataclass(frozen=True)
class Words:
    """A paragraph; ``kind`` is plain, note (how it was measured) or missing (what was not run)."""

    text: str
    kind: str = "plain"


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    lines: list[str]


@dataclass(frozen=True)
class Figure:
    """An SVG, what it shows in words, and its numbers, which Markdown has in its place."""

    svg: str
    caption: str
    table: Table | None = None


@dataclass(frozen=True)
class Figures:
    """Figures side by side where there is room, and their numbers."""

    figures: list[Figure]
    table: Table | None = None
    small: bool = False


@dataclass(frozen=True)
class Code:
    """Text as it is, folded away under a word."""

    title: str
    text: str


Block = Words | Points | Figures | Table | Code


@dataclass(frozen=True)
class Section:
    """A heading with its blocks; ``key`` is its place in the page's address."""

    key: str
    title: str
    blocks: list[Block] = field(default_factory=list)


def missing(what: str, command: str = "") -> Words:
    """The words of a section without data."""
    return Words(f"Not run: {what}" + (f" ({command})." if command else "."), "missing")
