"""Faults for a run in a forked process: kill -9, a full disk, Ctrl-C, each at a chosen operation on a chosen folder.

Every operation that Python reports to audit hooks counts (a file opened, a folder made, a rename, a removal), and one
more in the middle of each tensor file, which is then half as long as it will be.
"""

import contextlib
import errno
import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from linearize.cli import app
from linearize.train.resume import damage

FOLDERS = ("", "data", "transfer", "finetune", "student")
"""Parts of a run's folder that faults are aimed at; the first is the folder itself."""
KINDS = ("kill", "full", "press")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
LEFTOVERS = ("*.tmp", "*.partial", "*.part", "checkpoint-*")


class Fault(NamedTuple):
    """``kind`` happens at operation ``at`` (1 is the first) below ``where``; ``later`` seconds after the start if set.

    Kind ``disk`` leaves ``at`` bytes of the file system that holds the run, which should be one of its own.
    """

    kind: str
    where: str = ""
    at: int = 0
    later: float = 0.0


class Outcome(NamedTuple):
    code: int  # of the process; -9 where it was killed
    injected: bool
    said: str  # its last line on stderr
    seconds: float


class _Moments:
    """Counts operations by folder, and lets the fault happen."""

    def __init__(self, run: Path, fault: Fault | None, told: Path):
        self.run, self.fault, self.told = run, fault, told
        self.seen: Counter[str] = Counter()
        self.busy = False

    def hook(self, event: str, args: tuple) -> None:
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and isinstance(
            args[0], str | Path
        ):
            writes = bool(args[2] & WRITES) if event == "open" else event in ("os.rename", "os.mkdir")
            if event == "os.mkdir" and os.path.isdir(args[0]):
                writes = False  # of a folder that is there nobody asks more
            self.reached(str(args[0]), writes, False)

    def reached(self, path: str, writes: bool, tensors: bool) -> None:
        if self.busy or not path.startswith(str(self.run)):
            return
        part = os.path.relpath(path, self.run).split(os.sep)[0]
        where = next((name for name in FOLDERS[1:] if part.lstrip(".").split(".")[0] == name), "")
        fault = self.fault
        if fault is not None and fault.kind == "full" and not writes:
            return
        self.seen[where] += 1
        if fault is None or fault.later or where != fault.where or self.seen[where] != fault.at:
            return
        self.busy = True
        self.told.write_text("injected")
        self.busy = False
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "press":
            os.kill(os.getpid(), signal.SIGINT)
        elif tensors:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        else:
            raise OSError(errno.ENOSPC, "No space left on device", path)

    def halfway(self, real):
        def save_file(tensors, path, *rest, **options):
            self.busy = True
            real(tensors, path, *rest, **options)
            os.truncate(path, os.path.getsize(path) // 2)
            self.busy = False
            self.reached(str(path), True, True)
            return real(tensors, path, *rest, **options)

        return save_file


def attempt(words: list[str], run: Path, fault: Fault | None, scratch: Path) -> Outcome:
    """``linearize WORDS`` in a fork of this process; ``run`` is the folder that it writes."""
    told, log = scratch / "injected", scratch / "stderr"
    told.unlink(missing_ok=True)
    injected = False
    ballast = run.parent / "ballast"
    if fault is not None and fault.kind == "disk":
        room = os.statvfs(run.parent)
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, room.f_bavail * room.f_frsize - fault.at))
        injected = True
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(words, _Moments(run, fault, told), log)
    if fault is not None and fault.later:
        time.sleep(fault.later)
        with contextlib.suppress(ProcessLookupError):
            injected = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
            os.kill(child, signal.SIGINT if fault.kind == "press" else signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    ballast.unlink(missing_ok=True)
    said = log.read_text().strip().splitlines()
    seconds = round(time.monotonic() - started, 2)
    return Outcome(
        os.waitstatus_to_exitcode(status), injected or told.exists(), said[-1] if said else "", seconds
    )


def _child(words: list[str], moments: _Moments, log: Path) -> None:
    code, begun = 70, False
    try:
        with log.open("w") as sink:
            os.dup2(sink.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        from linearize.data import pool
        from linearize.train import resume

        for module in (pool, resume):
            module.save_file = moments.halfway(module.save_file)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.addaudithook(moments.hook)
        begun = True
        app(words)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:
        import traceback

        moments.busy = True
        if isinstance(error, KeyboardInterrupt) and not begun:
            code = 130
            print("interrupted; the command had not begun", file=sys.stderr)
        else:
            traceback.print_exc()
    finally:
        moments.busy = True
        if moments.fault is None:  # so that faults can be aimed at all there is
            moments.told.with_name("seen.json").write_text(json.dumps(moments.seen))
        os._exit(code)


def broken(run: Path) -> list[str]:
    """What is half-written in a run's folder, whatever has happened to it: nothing should be."""
    wrong = [
        f"{path}: {harm}"
        for path in run.rglob("checkpoint-*")
        if path.suffix != ".tmp" and (harm := damage(path))
    ]
    for path in run.rglob("*.json"):
        if not any(part.endswith((".tmp", ".partial")) for part in path.relative_to(run).parts):
            try:
                json.loads(path.read_text())
            except ValueError as error:
                wrong.append(f"{path}: {error}")
    return wrong


def differences(run: Path, whole: Path) -> list[str]:
    """In what a finished run differs from one that was left alone: bits of weights, readings, leftovers."""
    wrong = [str(path.relative_to(run)) for mark in LEFTOVERS for path in run.rglob(mark)]
    for path in sorted(whole.rglob("*.safetensors")):
        name = path.relative_to(whole)
        if not (run / name).is_file() or (run / name).read_bytes() != path.read_bytes():
            wrong.append(f"{name} differs")
    for stage in ("transfer", "finetune"):
        if _readings(run / stage) != _readings(whole / stage):
            wrong.append(f"{stage}/metrics.jsonl differs")
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (run, whole))
    if (ours["results"], ours["continuation"]) != (theirs["results"], theirs["continuation"]):
        wrong.append("results.json differs")
    return wrong


def _readings(stage: Path) -> list[dict]:
    lines = map(json.loads, (stage / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def expected(fault: Fault, outcome: Outcome) -> bool:
    """Whether a disturbed run ended as it should: killed, or with one line and its exit code."""
    if not outcome.injected:
        return outcome.code == 0
    if fault.kind == "kill":
        return outcome.code == -signal.SIGKILL
    if fault.kind == "disk" and outcome.code == 0:  # there was room enough
        return True
    if fault.kind in ("full", "disk"):
        return outcome.code == 2 and outcome.said.startswith("error: ")
    # Ctrl-C in the last moments finds nothing left to stop.
    return outcome.code == 0 or (outcome.code == 130 and outcome.said.startswith("interrupted; "))
