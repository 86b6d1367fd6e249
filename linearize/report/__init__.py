"""What was measured, to be read: tables for terminals and Markdown, and one page for a run or several."""

from .costs import estimate, speed_tables
from .page import write_report
from .pictures import Picture, pictures
from .plots import available
from .tables import (
    GATE,
    MEMORY_LENS,
    Table,
    as_markdown,
    comparison,
    fidelity,
    markdown,
    memory,
    plan_table,
    positions,
    recall,
    tables,
)

__all__ = [
    "GATE",
    "MEMORY_LENS",
    "Picture",
    "Table",
    "as_markdown",
    "available",
    "comparison",
    "estimate",
    "fidelity",
    "markdown",
    "memory",
    "pictures",
    "plan_table",
    "positions",
    "recall",
    "speed_tables",
    "tables",
    "write_report",
]
