"""What happens inside a family's process of ``kernels.py``: which cases there are, cold starts, checks, times."""

import argparse
import importlib
import inspect
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import measure
from case import TOKENS, Case
from measure import NotRun, one_line, significant

from linearize.modeling.launches import CANDIDATES

QUICK = (2048, 32768)
SWEPT = ((1, 32768), (16, 2048))
MARK = "\x1e"  # begins a line that is ours: libraries print, too


def families(args: argparse.Namespace) -> list[str]:
    """Names of the case files, the peers first: the others' ratios are to them."""
    found = sorted(path.stem.removeprefix("cases_") for path in args.cases.glob("cases_*.py"))
    unknown = set(args.families or ()) - set(found)
    if unknown:
        raise SystemExit(f"--families: {unknown.pop()!r} is unknown; choose from {', '.join(found)}")
    wanted = [name for name in found if args.families is None or name in args.families or name == "peers"]
    if args.no_peers:
        wanted = [name for name in wanted if name != "peers"]
    return sorted(wanted, key=lambda name: (name != "peers", name))


def module_of(args: argparse.Namespace, family: str) -> Any:
    if str(args.cases) not in sys.path:
        sys.path.insert(0, str(args.cases))
    return importlib.import_module(f"cases_{family}")


def cases_of(args: argparse.Namespace, family: str) -> list[Case]:
    """The family's cases that were asked for."""
    cases = [
        case
        for case in module_of(args, family).CASES
        if re.search(args.only, f"{case.group}: {case.name}") or case.peer
    ]
    if args.skip:
        cases = [case for case in cases if not re.search(args.skip, f"{case.group}: {case.name}")]
    if args.quick:
        cases = [case for case in cases if not (case.peer and ("flash" in case.name or backward(case.name)))]
    return cases


def backward(name: str) -> bool:
    return "backward" in name


def pass_of(name: str) -> str:
    """Which of softmax's passes a case stands beside; a transfer has none of its own."""
    return "forward+backward" if backward(name) else "transfer" if "transfer" in name else "forward"


def lengths_of(args: argparse.Namespace, case: Case) -> list[int]:
    wanted = args.lengths or (QUICK if args.quick else None)
    return [length for length in case.lengths if wanted is None or length in wanted]


def batch_of(case: Case, length: int) -> int:
    return max(1, TOKENS // length) if case.batch is None else case.batch


def say(line: dict[str, Any]) -> None:
    print(MARK + json.dumps(line), flush=True)


def work(args: argparse.Namespace) -> int:
    import torch

    torch.zeros(1, device=args.device)  # its context is not a kernel's cold start
    if args.sweep:
        say({"done": True})
        end = time.monotonic() + float(sys.stdin.readline())
        for row in swept(args, end):
            say(row)
        say({"done": True})
        return 0
    cases = cases_of(args, args.worker)
    firsts = [(case, first_call(case, lengths_of(args, case))) for case in cases if not case.peer]
    for case, first in firsts:
        say({"group": case.group, "name": case.name, **first})
    if firsts:
        total = sum(first.get("seconds", 0.0) for _, first in firsts)
        say({"group": "all", "name": args.worker, "seconds": round(total, 2)})
    checks = dict.fromkeys(case.check for case in cases)
    found = {check: refused(check) for check in checks if check is not None}
    measure.clear()
    say({"done": True})
    if not (given := sys.stdin.readline()):
        return 1
    end = time.monotonic() + float(given)
    for case in cases:
        for length in lengths_of(args, case):
            why_not = found.get(case.check) or ("the time was up" if time.monotonic() > end else None)
            say(point(case, length, why_not, args.milliseconds))
    say({"done": True})
    return 0


def first_call(case: Case, lengths: list[int]) -> dict[str, Any]:
    """Seconds from nothing compiled to a result, of what the family's cases before it did not compile already."""
    if not lengths:
        return {"not_run": "no length was asked for"}
    start = time.perf_counter()
    try:
        case.make(batch_of(case, lengths[0]), lengths[0])()
        measure.wait()
    except Exception as error:
        return {"not_run": one_line(error)}
    return {"seconds": round(time.perf_counter() - start, 2)}


def refused(check: Callable[[], None]) -> str | None:
    """Why a case must not be timed, by its check; None where that is green."""
    try:
        check()
        measure.wait()
    except NotRun as error:
        return str(error)
    except Exception as error:
        return f"its check is red: {one_line(error)}"
    return None


def point(case: Case, length: int, why_not: str | None, milliseconds: float) -> dict[str, Any]:
    """One row."""
    import torch

    batch = batch_of(case, length)
    decode = case.batch is not None
    row: dict[str, Any] = {
        "group": case.group,
        "name": case.name,
        "peer": case.peer,
        "pass": "decode" if decode else pass_of(case.name),
        "T": length,
        "B": batch,
    }
    if why_not is not None:
        return {**row, "not_run": why_not}
    measure.clear()
    try:
        call = case.make(batch, length)
        call()  # compiled for this length, where that makes a difference
        row["peak_mib"] = measure.peak_mib(call)
        timed = (measure.times_of_step if decode else measure.times)(call, milliseconds)
    except NotRun as error:
        return {**row, "not_run": str(error)}
    except torch.cuda.OutOfMemoryError:
        return {**row, "not_run": "out of memory"}
    except Exception as error:
        return {**row, "not_run": one_line(error)}
    row |= timed.rounded()
    if not decode:
        row["ms_32k"] = significant(timed.median * TOKENS / (batch * length))
    if case.target_ms is not None:
        row["target_ms"] = case.target_ms
        row["met"] = (row["ms"] if decode else row["ms_32k"]) <= case.target_ms
    return row


def trials(
    args: argparse.Namespace, family: str
) -> Iterator[tuple[str, int, Any, tuple[int, int], Callable]]:
    """Kernel, candidate's number, candidate, shape and what makes the call."""
    for kernel, make in getattr(module_of(args, family), "SWEEPS", {}).items():
        if args.sweep != ["all"] and kernel not in args.sweep:
            continue
        shaped = len(inspect.signature(make).parameters) >= 3
        for shape in SWEPT if shaped else SWEPT[:1]:
            for number, candidate in enumerate(CANDIDATES.get(kernel, ())):
                yield kernel, number, candidate, shape, make


def call_of(make: Callable, candidate: Any, shape: tuple[int, int]) -> Callable[[], Any]:
    shaped = len(inspect.signature(make).parameters) >= 3
    return make(candidate, *shape) if shaped else make(candidate)


def compile_share(args: argparse.Namespace) -> int:
    """Make every n-th trial once, so that its kernel is in the cache."""
    mine, of = map(int, args.shard.split("/"))
    every = [trial for family in families(args) for trial in trials(args, family)]
    once = {(trial[0], trial[1]): trial for trial in reversed(every)}
    for _, _, candidate, shape, make in list(once.values())[mine::of]:
        try:
            call_of(make, candidate, shape)()
        except Exception:
            continue  # the timing process meets it again, and says so
        finally:
            measure.clear()
    return 0


def swept(args: argparse.Namespace, end: float) -> Iterator[dict[str, Any]]:
    for kernel, number, candidate, (batch, length), make in trials(args, args.worker):
        row = {"kernel": kernel, "number": number, "launch": candidate._asdict(), "B": batch, "T": length}
        measure.clear()
        try:
            if time.monotonic() > end:
                raise NotRun("the time was up")
            call = call_of(make, candidate, (batch, length))
            call()
            yield {**row, **measure.times(call, args.milliseconds).rounded()}
        except Exception as error:
            yield {**row, "not_run": one_line(error)}
