"""`metrics.jsonl`: one JSON object a training step, readable while the run goes on, and cut back on resume.

Keys of a line: `step` (1 is the first), `tokens` (seen so far), `loss`, `lr`, `grad_norm` (before clipping),
`tokens_per_second` (of this process group), `seconds` (training time so far), and what the stage adds
(`relative_error`, one number a layer).
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class MetricsWriter:
    """Appends lines to `path`, after dropping those beyond `step`: steps that a killed run had not saved."""

    def __init__(self, path: Path, *, step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read(path) if line["step"] <= step]
        beside = path.with_name(path.name + ".tmp")
        beside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(beside, path)
        self._file = path.open("a", buffering=1)  # by line: `tail -f` shows every step

    def write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a metrics file; a torn last line (the process died while writing) is left out."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
