"""What the benchmarks of this folder share: timing, memory, where a number comes from, tables and plots."""

import gc
import importlib.metadata
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TextIO

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
FLUSHED = 256 * MIB
"""Written before every timed call, so that none finds its inputs in the L2 cache (50 MB on an H100)."""


class NotRun(Exception):
    """Why a case cannot be measured here; its row says so."""


class Times(NamedTuple):
    """Milliseconds of one call, and how many calls that is the median of."""

    median: float
    p20: float
    p80: float
    calls: int

    def rounded(self) -> dict[str, Any]:
        return {
            "ms": significant(self.median),
            "p20_ms": significant(self.p20),
            "p80_ms": significant(self.p80),
            "calls": self.calls,
        }


def gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def wait() -> None:
    """Until the GPU, where there is one, has done what it was given."""
    if gpu():
        import torch

        torch.cuda.synchronize()


def times(call: Callable[[], Any], milliseconds: float = 100.0, least: int = 3) -> Times:
    """Quantiles of a call's time, for about so many milliseconds, at least ``least`` calls; the caller has warmed up.

    On a GPU as ``triton.testing.do_bench`` does it (events around each call, the L2 cache overwritten before), but for
    calls of seconds, of which that would make eight.
    """
    if not gpu():
        spent: list[float] = []
        while len(spent) < least or (sum(spent) < milliseconds and len(spent) < 1000):
            start = time.perf_counter()
            call()
            spent.append(1000 * (time.perf_counter() - start))
        return _quantiles(spent)
    import torch

    flushed = torch.empty(FLUSHED // 4, dtype=torch.int32, device="cuda")

    def run(calls: int) -> list[float]:
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in marks:
            flushed.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in marks]

    first = run(1)[0]
    if first > milliseconds:  # a call of seconds: the first one counts already
        return _quantiles([first, *run(least - 1)])
    each = max(statistics.median(run(3)), 1e-3)
    return _quantiles(run(min(max(least, int(milliseconds / each)), 1000)))


def times_of_step(call: Callable[[], Any], milliseconds: float = 100.0, repeats: int = 20) -> Times:
    """The same of a decode step, without what launching costs: from a CUDA graph of ``repeats`` steps.

    A call that is a graph's replay already is timed in rows of ``repeats``. Nothing is flushed between steps: in a case
    that wants its state from memory, as it comes between the layers of a model, several take turns.
    """
    if not gpu():
        return times(call, milliseconds)
    import torch

    if isinstance(getattr(call, "__self__", None), torch.cuda.CUDAGraph) or getattr(call, "is_replay", False):

        def row() -> None:
            for _ in range(repeats):
                call()
    else:
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                call()
        row = graph.replay
    row()

    def run(rows: int) -> list[float]:
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rows)]
        for start, end in marks:
            start.record()
            row()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / repeats for start, end in marks]

    each = max(statistics.median(run(3)) * repeats, 1e-3)
    return _quantiles(run(min(max(5, int(milliseconds / each)), 200)))


def _quantiles(spent: Sequence[float]) -> Times:
    ordered = sorted(spent)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return Times(at(0.5), at(0.2), at(0.8), len(ordered))


def peak_mib(call: Callable[[], Any]) -> float | None:
    """Most memory that a call takes beyond what was there before; None without a GPU, where torch does not count."""
    import torch

    if not torch.cuda.is_available():
        call()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return round(peak / MIB, 1)


def clear() -> None:
    """Give unused memory back to the GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def one_line(error: BaseException, width: int = 200) -> str:
    """An exception as a cell of a table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:width] if text else type(error).__name__


def provenance(commit: str | None = None) -> dict[str, Any]:
    """Device, versions, commit and date of every row; ``commit`` where the files were copied without git's."""
    import torch

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    return {
        "device": torch.cuda.get_device_name() if gpu() else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpu() else None,
        "commit": commit or git("rev-parse", "--short=12", "HEAD") or "unknown",
        "modified": bool(git("status", "--porcelain", "linearize", "evals/speed/*.py"))
        if not commit
        else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class Lines:
    """JSON lines, written as they are made: what is there when a run breaks off is not lost."""

    def __init__(self, path: Path | None, every: Mapping[str, Any]) -> None:
        self.every, self.rows = dict(every), []
        self.file: TextIO | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("w")

    def add(self, row: Mapping[str, Any]) -> dict[str, Any]:
        whole = {**row, **self.every}
        self.rows.append(whole)
        if self.file is not None:
            self.file.write(json.dumps(whole) + "\n")
            self.file.flush()
        return whole


def read_lines(paths: Iterable[Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines() if line.strip()]


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def significant(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def short(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def in_k(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def pyplot() -> Any:
    """matplotlib's; None, and a word about it, where it is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("plot: skipped, matplotlib is missing; pip install matplotlib", file=sys.stderr)
        return None
    return plt
