"""The main plots of a run as PNG files for a card: recall by length, KL by position, memory over length."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluate import TEACHER, Results
from . import plots
from .heatmaps import answered, by_length
from .names import colours
from .record import CORE, Run
from .savings import KEPT, kept
from .sections import DRIFT, drift


@dataclass(frozen=True)
class Picture:
    """A PNG with its file's name, and what it shows in words."""

    name: str
    caption: str
    content: bytes


def pictures(results: Mapping[str, Any]) -> list[Picture]:
    """Of ``results`` as ``results.json`` has them; those that nothing was measured for are left out.

    Recall of every plain task by length, KL by position in the longest texts, memory over length. Raises
    KeyError, TypeError, ValueError or AttributeError where ``results`` are of another version.
    """
    tree = {key: results[key] for key in CORE}
    run = Run("", Path(), {"results": tree}, Results.from_dict(tree))
    series, made = colours([run]), []
    for task in dict.fromkeys(cell.task for cell in run.results.recall):
        plain = task.replace("_", " ")
        counts = sorted({cell.samples for cell in run.results.recall if cell.task == task})
        made.append(
            Picture(
                f"recall-{re.sub(r'[^a-z0-9]+', '-', task.lower()).strip('-')}.png",
                f"{plain}: prompts answered by length, {' or '.join(map(str, counts))} of each, "
                "with 95 % Wilson intervals",
                plots.picture(answered([run], series, task), **by_length(plain)),
            )
        )
    length = max(run.results.likelihood, default=0)
    measured = run.results.likelihood.get(length, {})
    if lines := [
        drift(run, name, length, series) for name, of in measured.items() if name != TEACHER and of.buckets
    ]:
        caption = f"KL to the original by position in texts of {length:,} tokens"
        made.append(Picture("kl.png", caption, plots.picture(lines, **DRIFT)))
    if lines := kept([run], series):
        made.append(
            Picture("memory.png", "states and KV caches of one sequence", plots.picture(lines, **KEPT))
        )
    return made
