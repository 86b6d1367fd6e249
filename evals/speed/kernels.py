"""Times and memory of every kernel beside other attention on one GPU; one JSON line a case and length.

    python evals/speed/kernels.py --output kernels.jsonl              everything: under three minutes on one H100
    python evals/speed/kernels.py --quick --families joint            two lengths, and forward alone of the peers
    python evals/speed/kernels.py --sweep all --families joint        every candidate launch of the family's kernels
    python evals/speed/kernels.py --dry                               no GPU: imports every case and lists it
    python evals/speed/kernels.py --table kernels.jsonl --plot kernels.svg kernels.jsonl

A family is a file ``cases_<family>.py`` beside this one, and runs in a process of its own, so that a kernel that breaks
the GPU's context loses its own rows only. All families start at once: each compiles into a new cache, which is its cold
start, and runs its cases' checks. Then they are timed one after the other, the peers first. A case whose check is red
is not timed; its row says why.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import measure  # noqa: E402
from case import Case  # noqa: E402
from kernels_points import MARK, cases_of, compile_share, families, lengths_of, module_of, work  # noqa: E402
from measure import in_k, markdown, one_line, significant  # noqa: E402
from shown import plot, sweep_table, table  # noqa: E402

from linearize.modeling.launches import CANDIDATES  # noqa: E402

PREPARE_SECONDS, MEASURE_SECONDS = 150, 240


def main(words: list[str] | None = None) -> int:
    args = arguments(words)
    if args.worker:
        return work(args)
    if args.shard:
        return compile_share(args)
    if args.dry:
        return dry(args)
    if args.table or args.plot:
        rows = measure.read_lines(args.table or [args.plot[1]])
        if args.table:
            print(table(rows))
        if args.plot:
            plot(measure.read_lines([args.plot[1]]), args.plot[0])
        return 0
    if args.device == "cuda" and not measure.gpu():
        print("kernels.py: torch finds no GPU; --dry lists the cases", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="kernels-") as folder:
        if not args.warm:
            os.environ["TRITON_CACHE_DIR"] = str(Path(folder) / "triton")
        return sweep(args) if args.sweep else run(args)


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    listed = {"type": lambda text: text.split(","), "metavar": "A,B"}
    parser.add_argument("--families", **listed, help="those alone (and the peers, unless --no-peers)")
    parser.add_argument("--no-peers", action="store_true", help="no ratios then")
    parser.add_argument("--only", metavar="REGEX", default="", help="cases whose `group: name` it finds")
    parser.add_argument(
        "--skip", metavar="REGEX", default="flex_attention", help="cases left out; '' for none"
    )
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], metavar="T,T")
    parser.add_argument("--quick", action="store_true", help="T = 2K and 32K, peers forward only, few calls")
    parser.add_argument("--milliseconds", type=float, help="time spent on one point (default 100)")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds; points after them are not run")
    parser.add_argument("--sweep", **listed, help="kernels, or `all`")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile for --sweep")
    parser.add_argument("--warm", action="store_true", help="keep Triton's usual cache: no cold start")
    parser.add_argument("--output", type=Path, help="JSON lines; replaced")
    parser.add_argument("--commit", help="commit of the code, where there is no git")
    parser.add_argument("--dry", action="store_true", help="list the cases, without a GPU")
    parser.add_argument("--table", type=Path, nargs="+", metavar="JSONL", help="print the table of rows")
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("IMAGE", "JSONL"), help="needs matplotlib")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this script")
    parser.add_argument("--cases", type=Path, default=HERE, help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    args.milliseconds = args.milliseconds or (30.0 if args.quick else 100.0)
    return args


# What there is, without a GPU


def dry(args: argparse.Namespace) -> int:
    """Every case of every file, imported and listed."""
    broken, rows = 0, []
    for family in families(args):
        try:
            module = module_of(args, family)
            for case in cases_of(args, family):
                assert isinstance(case, Case) and callable(case.make), case
                points = ", ".join(in_k(length) for length in lengths_of(args, case))
                rows.append((family, case.group, case.name, points, case.target_ms or "", bool(case.check)))
            sweeps = getattr(module, "SWEEPS", {})
            rows.append((family, "sweeps", ", ".join(sweeps) or "none", "", "", ""))
            if missing := sweeps.keys() - CANDIDATES.keys():
                raise LookupError(f"SWEEPS names kernels without CANDIDATES: {', '.join(sorted(missing))}")
        except Exception as error:
            broken += 1
            rows.append((family, "broken", one_line(error), "", "", ""))
    print(markdown(("family", "group", "case", "lengths", "target, ms", "check"), rows))
    return 1 if broken else 0


# The run: one process a family


class Worker:
    """A family's process, and the lines that it says."""

    def __init__(self, args: argparse.Namespace, family: str) -> None:
        self.family = family
        self.process = subprocess.Popen(
            [*_self(args), "--worker", family],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                self.lines.put(json.loads(line[1:]))
        self.lines.put(None)

    def until(self, deadline: float) -> Iterator[dict[str, Any]]:
        """What the process says until it says that it is done with this part; a last line if it breaks off."""
        while True:
            try:
                line = self.lines.get(timeout=max(0.1, deadline - time.monotonic()))
            except queue.Empty:
                self.process.kill()
                yield {"broken": "its time was up"}
                return
            if line is None:
                yield {"broken": f"its process ended with code {self.process.wait()}"}
                return
            if "done" in line:
                return
            yield line

    def go(self, seconds: float) -> None:
        """Let it time, for so long."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{seconds}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended; until() says so

    def end(self) -> None:
        if self.process.poll() is None:
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()


def _self(args: argparse.Namespace) -> list[str]:
    """The command of a process that measures as this one was asked to."""
    words = [sys.executable, str(HERE / "kernels.py"), "--milliseconds", str(args.milliseconds)]
    words += ["--only", args.only, "--skip", args.skip, "--cases", str(args.cases), "--device", args.device]
    if args.quick:
        words.append("--quick")
    if args.lengths:
        words += ["--lengths", ",".join(map(str, args.lengths))]
    if args.sweep:
        words += ["--sweep", ",".join(args.sweep)]
    return words


def run(args: argparse.Namespace) -> int:
    """All families: prepared together, timed in turn."""
    start = time.monotonic()
    lines = measure.Lines(args.output, measure.provenance(args.commit))
    workers = [Worker(args, family) for family in families(args)]
    broken = {}
    deadline = time.monotonic() + PREPARE_SECONDS
    for worker in workers:
        for line in worker.until(deadline):
            if "broken" in line:
                broken[worker.family] = line["broken"]
            else:
                lines.add({"kind": "cold start", "family": worker.family, **line})
    print(f"prepared in {time.monotonic() - start:.0f} s", file=sys.stderr)
    for worker in workers:
        if worker.family not in broken:
            worker.go(start + args.budget - time.monotonic())
            for line in worker.until(time.monotonic() + MEASURE_SECONDS):
                if "broken" in line:
                    broken[worker.family] = line["broken"]
                else:
                    _tell(
                        lines.add({"kind": "time", "family": worker.family, **with_ratio(line, lines.rows)})
                    )
        if worker.family in broken:
            lines.add({"kind": "time", "family": worker.family, "not_run": broken[worker.family]})
            print(f"{worker.family}: {broken[worker.family]}", file=sys.stderr)
        worker.end()
    print(table(lines.rows))
    print(f"\n{time.monotonic() - start:.0f} s, compilation included", file=sys.stderr)
    return 1 if broken or any("red" in row.get("not_run", "") for row in lines.rows) else 0


def with_ratio(row: dict[str, Any], before: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The row beside softmax of cuDNN of the same pass in the same run: at its own length, and a decode step of ours,
    which takes as long at any, at every length too."""
    if "ms" not in row:
        return row
    decode = row["pass"] == "decode"
    time = "ms" if decode else "ms_32k"
    ratios = {
        other["T"]: significant(other[time] / row[time], 3)
        for other in before
        if "cuDNN" in other.get("name", "")
        and "ms" in other
        and other["pass"] == row["pass"]
        and (not decode or other["B"] == row["B"])
    }
    if row["T"] in ratios:
        row = {**row, "softmax_over_this": ratios[row["T"]]}
    if decode and not row["peer"]:
        row = {**row, "softmax_over_this_at": ratios}
    return row


def _tell(row: dict[str, Any]) -> None:
    what = f"{row['group']}: {row['name']}, T={in_k(row['T'])}"
    said = row.get("not_run") or f"{row['ms']} ms, x{row.get('softmax_over_this', '?')}"
    print(f"{what}: {said}", file=sys.stderr, flush=True)


# Launch settings


def sweep(args: argparse.Namespace) -> int:
    """Every candidate of the kernels that were asked for: compiled by several processes, timed by one."""
    start = time.monotonic()
    lines = measure.Lines(args.output, measure.provenance(args.commit))
    args.no_peers = True
    wanted = families(args)
    shards = [
        subprocess.Popen(
            [*_self(args), "--shard", f"{i}/{args.jobs}", "--families", ",".join(wanted)],
            stdout=subprocess.DEVNULL,
        )
        for i in range(args.jobs)
    ]
    for shard in shards:
        try:
            shard.wait(timeout=PREPARE_SECONDS)
        except subprocess.TimeoutExpired:
            shard.kill()
    print(f"compiled in {time.monotonic() - start:.0f} s", file=sys.stderr)
    broken = 0
    for family in wanted:
        worker = Worker(args, family)
        for part in range(2):
            if part:
                worker.go(start + args.budget - time.monotonic())
            for line in worker.until(time.monotonic() + MEASURE_SECONDS):
                broken += "broken" in line
                lines.add({"kind": "sweep", "family": family, **line})
        worker.end()
    print(sweep_table(lines.rows))
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
