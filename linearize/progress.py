"""What a long step tells whoever watches: one small record, passed to a callback."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` units of ``phase`` are behind us; ``metrics`` are the newest readings."""

    phase: str
    done: int
    total: int
    unit: str = "tokens"
    metrics: Mapping[str, float] = field(default_factory=dict)


Watch = Callable[[Progress], None]
