"""Time and peak memory of the chunked reference against the quadratic one, on CPU; one JSON line a point.

    python evals/speed/reference.py --output evals/speed/reference_cpu.jsonl

Every point runs in a process of its own, so that its peak memory is its own, and compares the two forms first: where
they differ nothing is measured. A point whose predicted memory is above the limit is recorded as not run. Wall times
ask for an idle machine; where it is busy, read the CPU seconds of a run with one thread (``OMP_NUM_THREADS=1``).
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"B": 1, "H": 4, "G": 2, "K": 64, "V": 64, "F": 64, "W": 64}
WINDOW_KIND = "sliding"
MODES = ("forward", "forward+backward")
FORMS = ("chunked", "quadratic")
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--memory-limit-mib", type=int, default=12_000)
    parser.add_argument(
        "--seconds", type=float, default=1.5, help="timed for at least this long, and three times"
    )
    parser.add_argument("--output", type=Path, help="JSON lines; replaced")
    parser.add_argument("--plot", type=Path, help="an image (needs matplotlib)")
    parser.add_argument("--point", nargs=3, metavar=("FORM", "MODE", "T"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        form, mode, length = args.point
        print(json.dumps(measure(form, mode, int(length), args.seconds)))
        return
    records = [
        {**point, **provenance()} for point in points(args.lengths, args.memory_limit_mib, args.seconds)
    ]
    if args.output:
        args.output.write_text("".join(json.dumps(record) + "\n" for record in records))
    print(table(records))
    if args.plot:
        plot(records, args.plot)


def points(lengths: list[int], limit: int, seconds: float) -> list[dict[str, Any]]:
    """Every form, mode and length, shortest first; memory is predicted from the length before."""
    measured = []
    for form in FORMS:
        for mode in MODES:
            last: dict[str, Any] = {}
            for length in sorted(lengths):
                point = {"form": form, "mode": mode, "T": length}
                growth = (length / last["T"]) ** (2 if form == "quadratic" else 1) if last else 0
                predicted = growth * last.get("peak_mib", 0)
                if predicted > limit:
                    point["not_run"] = f"{predicted:.0f} MiB predicted, limit {limit} MiB"
                else:
                    command = [sys.executable, __file__, "--seconds", str(seconds)]
                    command += ["--point", form, mode, str(length)]
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode:
                        point["not_run"] = f"exit code {done.returncode}: {done.stderr.strip()[-200:]}"
                    else:
                        point.update(json.loads(done.stdout))
                        last = point
                measured.append(point)
                print(json.dumps(point), file=sys.stderr)
    return measured


def measure(form: str, mode: str, length: int, seconds: float) -> dict[str, Any]:
    """Seconds of a call (wall: median and least; CPU: median) and its memory beyond the process with its inputs."""
    import torch  # here, because a child starts with its parent's peak memory

    sys.path.insert(0, str(ROOT))
    from linearize.modeling.reference import joint_chunked, joint_quadratic

    def inputs(length: int) -> list[torch.Tensor]:
        b, h, g, k, v, f, _ = SHAPE.values()
        shapes = [(b, length, h, k), (b, length, g, k), (b, length, g, v)]
        tensors = [torch.randn(shape) for shape in shapes] + [torch.rand(b, length, h, f) for _ in range(2)]
        return [x.requires_grad_(mode != "forward") for x in (*tensors, torch.full((h,), 0.1))]

    torch.manual_seed(0)
    terms = {"scale": SHAPE["K"] ** -0.5, "window": SHAPE["W"], "window_kind": WINDOW_KIND}
    small = inputs(257)
    torch.testing.assert_close(
        joint_chunked(*small, **terms), joint_quadratic(*small, **terms), atol=1e-5, rtol=0
    )

    attention = {"chunked": joint_chunked, "quadratic": joint_quadratic}[form]
    arguments = inputs(length)

    def call() -> tuple[float, float]:
        start, start_cpu = time.perf_counter(), time.process_time()
        y = attention(*arguments, **terms)
        if mode != "forward":
            y.sum().backward()
            for x in arguments:
                x.grad = None
        return time.perf_counter() - start, time.process_time() - start_cpu

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    call()  # also the warm-up
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    times: list[tuple[float, float]] = []
    while len(times) < 3 or sum(wall for wall, _ in times) < seconds:
        times.append(call())
    walls, cpus = zip(*times, strict=True)
    return {
        "median_s": round(statistics.median(walls), 5),
        "least_s": round(min(walls), 5),
        "cpu_s": round(statistics.median(cpus), 5),
        "repeats": len(times),
        "peak_mib": round(peak / MIB, 1),
        "threads": torch.get_num_threads(),
    }


def provenance() -> dict[str, Any]:
    """Where the numbers come from."""
    import importlib.metadata

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    model = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return {
        "shape": SHAPE,
        "window_kind": WINDOW_KIND,
        "dtype": "float32",
        "commit": git("rev-parse", "HEAD"),
        "modified": bool(
            git("status", "--porcelain", "linearize/modeling/reference.py", "evals/speed/reference.py")
        ),
        "cpu": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: seconds and MiB, a row a length."""
    found = {(record["form"], record["mode"], record["T"]): record for record in records}
    columns = [(form, mode) for form in FORMS for mode in MODES]
    lines = [
        "| T | " + " | ".join(f"{form} {mode}: s, CPU s, MiB" for form, mode in columns) + " |",
        "| --- " * 5 + "|",
    ]
    for length in sorted({record["T"] for record in records}):
        cells = []
        for column in columns:
            record = found[(*column, length)]
            figures = (record.get(key) for key in ("median_s", "cpu_s", "peak_mib"))
            cells.append("not run" if "not_run" in record else "{:.3f}, {:.3f}, {:.0f}".format(*figures))
        lines.append(f"| {length} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Seconds over T, both axes in doublings."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("plot: skipped, matplotlib is missing; pip install matplotlib", file=sys.stderr)
        return
    figure, axes = plt.subplots()
    for form in FORMS:
        for mode, style in zip(MODES, ("--", "-"), strict=True):
            done = [r for r in records if r["form"] == form and r["mode"] == mode and "not_run" not in r]
            axes.loglog(
                [r["T"] for r in done],
                [r["median_s"] for r in done],
                style,
                marker="o",
                base=2,
                label=f"{form} {mode}",
            )
    axes.set(xlabel="T", ylabel="seconds")
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
