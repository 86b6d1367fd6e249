"""Cold starts: seconds of a layer's first call in a new process, nothing compiled and then with Triton's cache filled.

    python evals/speed/cold.py --output cold.jsonl                         one GPU, about 25 s a method and part
    python evals/speed/cold.py --methods lawcat --parts training           one of them
    python evals/speed/cold.py --table cold.jsonl

A part is a run of ``linearize tune``: Llama-3-8B's heads, bf16, 2,048 tokens. Every first call is in a process of its
own with a cache of its own and nothing before it, one process at a time; what importing torch and starting CUDA take is
not counted. The second process finds the first one's cache.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import measure  # noqa: E402

from linearize.modeling.registry import METHODS  # noqa: E402
from linearize.tune import WHOLE, Sizes, runs  # noqa: E402

TARGET = 15
"""Seconds that a first call may take."""
LONGEST = 300
TOKENS = 2048


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    listed = {"type": lambda text: text.split(","), "metavar": "A,B"}
    known = [name for name, method in METHODS.items() if method.mixer is not None]
    parser.add_argument("--methods", **listed, default=known, help=f"of {', '.join(known)}")
    parser.add_argument("--parts", **listed, default=list(WHOLE), help=f"of {', '.join(WHOLE)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this script")
    parser.add_argument("--output", type=Path, help="JSON lines; replaced")
    parser.add_argument("--commit", help="commit of the code, where there is no git")
    parser.add_argument("--table", type=Path, metavar="JSONL", help="print the table of rows")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    for given, all_of_them in ((args.methods, known), (args.parts, WHOLE)):
        if unknown := set(given) - set(all_of_them):
            parser.error(f"{', '.join(sorted(unknown))}: none of {', '.join(all_of_them)}")
    if args.table:
        print(table(measure.read_lines([args.table])))
        return 0
    if args.one:
        method, part = args.one.split(":")
        print(json.dumps(first_call(method, part, args.device)))
        return 0
    if args.device == "cuda" and not measure.gpu():
        print("cold.py: torch finds no GPU; --device cpu tries the script", file=sys.stderr)
        return 2
    lines = measure.Lines(args.output, measure.provenance(args.commit))
    for method in args.methods:
        for part in args.parts:
            print(json.dumps(lines.add(of(method, part, args.device))), flush=True)
    print(table(lines.rows))
    return 0


def of(method: str, part: str, device: str) -> dict[str, object]:
    """A row: the first call with an empty cache, and another process's with the cache that it left."""
    row: dict[str, object] = {"kind": "cold start", "method": method, "part": part, "cores": os.cpu_count()}
    words = [sys.executable, __file__, "--one", f"{method}:{part}", "--device", device]
    with tempfile.TemporaryDirectory(prefix="cold-") as folder:
        for name in ("seconds", "seconds_cached"):
            try:
                done = subprocess.run(
                    words,
                    env={**os.environ, "TRITON_CACHE_DIR": folder},
                    capture_output=True,
                    text=True,
                    timeout=LONGEST,
                )
            except subprocess.TimeoutExpired:
                return {**row, "not_run": f"over {LONGEST} s"}
            if done.returncode:
                said = done.stderr.strip().splitlines() or ["it said nothing"]
                return {**row, "not_run": f"exit code {done.returncode}: {said[-1][:200]}"}
            row[name] = json.loads(done.stdout.splitlines()[-1])
    return row


def first_call(method: str, part: str, device: str) -> float:
    """Seconds of the first call of a method's run, its inputs made and the device started before."""
    import torch

    sizes = Sizes(tokens=TOKENS) if device == "cuda" else Sizes(4, 2, 16, 256, 2, torch.float32)
    for run in runs(method, sizes, torch.device(device), [part]):
        measure.wait()
        start = time.perf_counter()
        run.call()
        measure.wait()
        return measure.significant(time.perf_counter() - start, 3)
    raise LookupError(f"{method} has no run {part!r}")


def table(rows: list[dict]) -> str:
    """Seconds of every method and part; `!` above the target."""

    def cell(row: dict | None) -> str:
        if row is None or "not_run" in row:
            return "" if row is None else row["not_run"]
        late = " !" if row["seconds"] > TARGET else ""
        return f"{row['seconds']:.1f}{late} ({row['seconds_cached']:.1f})"

    parts = list(dict.fromkeys(row["part"] for row in rows))
    found = {(row["method"], row["part"]): row for row in rows}
    methods = dict.fromkeys(row["method"] for row in rows)
    cells = [(method, *(cell(found.get((method, part))) for part in parts)) for method in methods]
    head = (f"first call, s, nothing compiled (and cached); target {TARGET}", *parts)
    return measure.markdown(head, cells)


if __name__ == "__main__":
    sys.exit(main())
