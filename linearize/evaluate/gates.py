"""Integrity gates: a student is one function, however it is run. Measured on the user's own checkpoint, in its dtype.

one function    prefill = chunks = single steps = ``generate`` with a cache = without, at lengths around the window
padding         left- and right-padded rows, pads of random ids, = rows without padding, with a cache and without
batch           rows in another order, alone, reordered or repeated in the cache = rows as they were
causality       another token at t changes no output before t
constant state  bytes of every state at 2 W, 1K and further on; methods that grow stay within what they declare
finite          every layer's output and every logit up to eight times the training length
reload          the folder, loaded by plain transformers in a clean process, gives the same bits
start           in softmax mode the student is the plain model of the same weights, bit for bit
merged adapters its weights are the teacher's with the adapters added, where its run still holds these

``subject.py`` has the tolerances, and how two runs are compared. A failed gate names the first layer whose attention
output differs, the length and the difference.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..modeling.errors import EvaluationError
from ..progress import Progress, Watch
from .gate import FAILED, NOT_RUN, PASSED, Gate, Gates, GatesFailed, lacks_memory
from .long_way import long_way
from .merged import merged
from .one_function import batch, causality, generate, one_function, padding
from .persistence import reload, start
from .subject import Subject

__all__ = ["FAILED", "NOT_RUN", "PASSED", "Gate", "Gates", "GatesFailed", "integrity", "not_run"]


@torch.no_grad()
def integrity(
    student: Any,
    *,
    teacher: Any = None,
    folder: str | Path | None = None,
    train_len: int | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
    progress: Watch | None = None,
) -> Gates:
    """Every gate on a converted model, on random token ids below ``vocab_size``.

    ``folder`` is where the student was saved, ``train_len`` the tokens of its training sequences; gates that need what
    was not given are ``not run``. Raises :class:`EvaluationError` for a model without converted layers.
    """
    if not getattr(student.config, "linearize", None):
        raise EvaluationError(f"{type(student).__name__}: is not a converted model; gates are for students")
    subject = Subject(student, vocab_size, seed)
    checks: dict[str, Callable[[], list[Gate]]] = {
        "one function": lambda: one_function(subject),
        "generate": lambda: [generate(subject)],
        "padding": lambda: [padding(subject, side) for side in ("left", "right")],
        "batch": lambda: [batch(subject)],
        "causality": lambda: [causality(subject)],
        "constant state": lambda: long_way(subject, train_len),
        "reload": lambda: [reload(subject, folder)],
        "start": lambda: [start(subject, teacher)],
        "merged adapters": lambda: merged(subject, teacher, folder),
    }
    training, found = student.training, []
    student.eval()
    try:
        for done, (name, check) in enumerate(checks.items(), start=1):
            found += _guarded(name, check)
            if progress is not None:
                progress(Progress("gates", done, len(checks), unit="gates"))
    finally:
        student.train(training)
    return Gates(_status(found), found)


def not_run(reason: str) -> Gates:
    """No gate, and why."""
    return Gates("incomplete", [Gate("integrity gates", NOT_RUN, note=reason)])


def _status(gates: Sequence[Gate]) -> str:
    states = {gate.status for gate in gates}
    return FAILED if FAILED in states else "incomplete" if NOT_RUN in states or not states else PASSED


def _guarded(name: str, check: Callable[[], list[Gate]]) -> list[Gate]:
    """A student that cannot be run in one of the ways it must has failed; a machine that is too small has not."""
    try:
        return check()
    except Exception as error:  # whatever a forward raises
        line = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or lacks_memory(str(error)):
            return [Gate(name, NOT_RUN, note=f"out of memory ({line})")]
        if isinstance(error, OSError):  # a full disk, no process to be had
            return [Gate(name, NOT_RUN, note=line)]
        return [Gate(name, FAILED, note=line)]
