"""What an integrity gate found: passed, failed or not run, where, and by how much."""

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from ..modeling.errors import EvaluationError

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
NO_MEMORY = re.compile(
    r"MemoryError|out of memory|OutOfMemory|(can.?t|cannot|could not|failed to) allocate|not enough memory",
    re.I,
)
"""How torch says it: on a CPU in a plain RuntimeError."""


@dataclass(frozen=True)
class Gate:
    """One check: ``difference`` and ``bound`` are relative, but for states, where they are bytes."""

    name: str
    status: str
    """``passed``, ``failed`` or ``not run``."""
    where: str = ""
    """Of the largest difference, or of the failure: layer and length."""
    difference: float | None = None
    bound: float | None = None
    note: str = ""

    @property
    def measured(self) -> str:
        """Where, the difference, and what is allowed."""
        parts = [self.where]
        if self.difference is not None and self.bound is not None:
            parts.append(f"differs by {self.difference:.2g}, allowed {self.bound:.2g}")
        return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class Gates:
    """All gates; ``status`` is ``failed`` with one of them, ``incomplete`` where one was not run."""

    status: str
    gates: list[Gate]

    def to_dict(self) -> dict[str, Any]:
        tree = asdict(self)
        for gate in tree["gates"]:  # JSON has no word for infinity
            if gate["difference"] is not None and not math.isfinite(gate["difference"]):
                gate["difference"] = None
        return tree

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Gates":
        return cls(tree["status"], [Gate(**gate) for gate in tree["gates"]])

    def failures(self) -> list[str]:
        """One line for each failed gate."""
        failed = [gate for gate in self.gates if gate.status == FAILED]
        return [f"{gate.name}: {', '.join(filter(None, (gate.measured, gate.note)))}" for gate in failed]


class GatesFailed(EvaluationError):
    """A student is not one function; ``gates`` has every check. The line names the first that failed, and where."""

    def __init__(self, place: Any, gates: Gates, remedy: str):
        first, *others = gates.failures() or [gates.status]
        more = f", and {len(others)} more" if others else ""
        super().__init__(f"{place}: integrity gate failed: {first}{more}; {remedy}")
        self.gates = gates


def lacks_memory(text: str) -> bool:
    """Whether an error's words are of a machine that is too small."""
    return NO_MEMORY.search(text) is not None
