"""Runs the tests of this folder on a GPU: every file in a pytest of its own, all at once, each with several workers and
a time limit; writes a log that says what passed, what failed and what was not reached.

    python tests/gpu/run.py                                  every file
    python tests/gpu/run.py --limit 300 --log gpu.log joint gated

Most of the time is compilation, which the workers share through Triton's cache: with 32 cores about two minutes from
nothing compiled.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHARES = {
    "candidates": 4,
    "decode": 4,
    "gated": 4,
    "selected": 4,
    "joint": 3,
}  # of the workers, by what there is
PLAIN = ["-v", "--tb=short", "--color=no", "-p", "no:cacheprovider", "--dist", "worksteal"]


def main() -> int:
    names = sorted(path.stem.removeprefix("test_") for path in HERE.glob("test_*.py"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds of each file")
    parser.add_argument(
        "--workers", type=int, default=max(5, os.cpu_count() or 1), help="of all files together"
    )
    parser.add_argument("--log", type=Path, default=Path("gpu_tests.log"))
    parser.add_argument("--commit", help="commit of the code, where there is no git")
    args, further = parser.parse_known_args()
    for name in set(args.names) - set(names):
        parser.error(f"{name!r} is unknown; choose from {', '.join(names)}")
    wanted = args.names or names
    whole = sum(SHARES.get(name, 1) for name in wanted)
    lines = [head(args.commit)]
    print(lines[0], flush=True)
    with ThreadPoolExecutor(len(wanted)) as pool:
        jobs = [
            pool.submit(run, name, max(1, args.workers * SHARES.get(name, 1) // whole), args.limit, further)
            for name in wanted
        ]
        outcomes = [job.result() for job in jobs]
    for _, said in outcomes:
        print(said, flush=True)
        lines.append(said)
    args.log.write_text("\n".join(lines) + "\n")
    return 0 if all(passed for passed, _ in outcomes) else 1


def head(commit: str | None) -> str:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: everything is skipped"
    if commit is None:
        asked = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(asked, cwd=HERE, capture_output=True, text=True).stdout.strip() or "unknown"
    versions = ", ".join(f"{name} {known(name)}" for name in ("torch", "triton", "transformers"))
    return f"Tests of tests/gpu on {device}, {versions}, commit {commit}, {datetime.now(UTC):%Y-%m-%d}"


def known(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "is missing"


def run(name: str, workers: int, limit: float, further: list[str]) -> tuple[bool, str]:
    """One file; whether all of it passed, and what became of it in words."""
    start = time.monotonic()
    file = HERE / f"test_{name}.py"
    command = [sys.executable, "-m", "pytest", *PLAIN, "-n", str(workers), *further, str(file)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, ended = process.communicate(timeout=limit)[0], True
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the workers too
        output, ended = process.communicate()[0], False
    return report(name, output, process.returncode if ended else None, time.monotonic() - start)


def report(name: str, output: str, code: int | None, seconds: float) -> tuple[bool, str]:
    """``code`` is pytest's, None where the limit ended it."""
    outcomes = re.findall(r"^\[gw\d+\].*? (PASSED|FAILED|ERROR|SKIPPED|XFAIL) (\S.*)$", output, re.MULTILINE)
    counts = Counter(outcome for outcome, _ in outcomes)
    told = ", ".join(f"{count} {outcome.lower()}" for outcome, count in counts.items()) or "none ran"
    text = f"  test_{name}.py: {told} in {seconds:.0f} s"
    if code is None:
        planned = re.search(r"\[(\d+) items\]|(\d+) workers \[(\d+) items\]", output)
        of = f" of {planned[1] or planned[3]}" if planned else ""
        text += f"; stopped by the time limit{of}"
    elif code not in (0, 1) or not outcomes:
        text += f"; pytest ended with code {code}: " + " ".join(output.split())[-300:]
    reasons = re.findall(r"^(?:FAILED|ERROR) (\S.*)$", output, re.MULTILINE)  # of pytest's summary
    failed = reasons or [test for outcome, test in outcomes if outcome in ("FAILED", "ERROR")]
    return code == 0, "\n".join([text, *(f"    failed: {test.strip()[:300]}" for test in failed)])


if __name__ == "__main__":
    raise SystemExit(main())
