"""Ctrl-C that ends a step instead of tearing it: the first press asks, the second stops at once.

Long work asks :func:`asked` where all is consistent, saves what it has and raises :class:`Stopped`.
"""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .progress import Progress, Watch

logger = logging.getLogger(__name__)


class Stopped(KeyboardInterrupt):
    """The first Ctrl-C was answered; the message says what was saved and how to go on."""


class _Presses:
    """Ctrl-C so far, inside the outermost :func:`catching` block."""

    blocks = 0
    asked = False


@contextmanager
def catching() -> Iterator[None]:
    """Inside the block the first Ctrl-C only asks. Blocks may nest; the handler from before comes back at the end."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's alone
        yield
        return
    before: Any = None
    if not _Presses.blocks:
        _Presses.asked = False
        before = signal.signal(signal.SIGINT, _press)
    _Presses.blocks += 1
    try:
        yield
    finally:
        _Presses.blocks -= 1
        if not _Presses.blocks:
            _Presses.asked = False
            signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


def asked() -> bool:
    """Whether Ctrl-C was pressed and not yet answered."""
    return _Presses.asked


def stop_if_asked(line: str) -> None:
    """Raises :class:`Stopped` with ``line`` if Ctrl-C was pressed."""
    if _Presses.asked:
        raise Stopped(line)


def stopping(progress: Watch | None, line: str) -> Watch:
    """``progress``, and the end of the work at the next step after Ctrl-C; for work that saves nothing on its way."""

    def watch(at: Progress) -> None:
        if progress is not None:
            progress(at)
        stop_if_asked(line)

    return watch


def _press(*_: object) -> None:
    if _Presses.asked:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt
    _Presses.asked = True
    logger.warning("stopping at the end of this step; Ctrl-C again stops at once")
