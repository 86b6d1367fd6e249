"""What a table is, in whatever it is written."""

import math
from dataclasses import dataclass

from ..evaluate.statistics import Interval


@dataclass(frozen=True)
class Table:
    """A title, one line on how it was measured, the names of the columns, and the cells row by row."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]


def bracketed(interval: Interval, form: str) -> str:
    """Both ends in brackets, or that they are not known."""
    low, high = interval
    if math.isnan(low):
        return "[not known]"
    return f"[{low:{form}}, {high:{form}}]"
