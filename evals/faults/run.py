"""Faults at random moments of a tiny run, each followed by a restart, and the end compared with an undisturbed run.

    OMP_NUM_THREADS=1 python evals/faults/run.py --chains 12 --jobs 2 --seed 0

A chain is one run that is disturbed again and again, then left to finish: by kill -9, by a full disk and by Ctrl-C, at
random operations below each of its folders and at random times; and by a file system that really has no more than so
many bytes left (a tmpfs, so this needs root). Writes ``results.json`` beside this file.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent.parent / "tests")]

import conftest  # noqa: E402, F401  offline, one thread
import torch  # noqa: E402
from faults import FOLDERS, KINDS, Fault, attempt, broken, differences, expected  # noqa: E402
from test_run import WORDS  # noqa: E402
from tiny import tiny  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

import linearize.data  # noqa: E402
import linearize.run  # noqa: E402, F401  imported before the forks
from linearize.provenance import origin  # noqa: E402
from linearize.teacher import BUNDLED  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=1, help="chains at once, a process each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE / "results.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    scratch = Path(tempfile.mkdtemp(prefix="faults-"))
    words = ["run", str(teacher(scratch)), *(w for w in WORDS if not w.startswith("control"))]
    words += ["transfer.save_every=2", "finetune.save_every=2"]
    whole = scratch / "whole"
    first = attempt([*words, f"output={whole}"], whole, None, scratch)
    assert first.code == 0, first
    seen = json.loads((scratch / "seen.json").read_text())
    one = functools.partial(chain, words=words, whole=whole, seen=seen, seed=args.seed)
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("fork")) as pool:
        records = [record for records in pool.map(one, range(args.chains)) for record in records]
    disturbed = [r for r in records if r.get("injected")]
    summary = {
        "origin": origin(),
        "seed": args.seed,
        "injected": len(disturbed),
        "by kind": Counter(r["kind"] for r in disturbed),
        "by folder": Counter(
            "a moment" if r["later"] else "the disk" if r["kind"] == "disk" else r["where"] or "run"
            for r in disturbed
        ),
        "not as they should": sum(not r["as it should"] for r in records if "as it should" in r),
        "left something half-written": sum(bool(r.get("half-written")) for r in records),
        "chains": args.chains,
        "runs that ended": sum("differences" in r for r in records),
        "runs that ended with other bits": sum(bool(r.get("differences")) for r in records),
    }
    lines = ",\n  ".join(json.dumps(record) for record in records)
    head = json.dumps(summary, indent=1)[:-2]
    args.output.write_text(f'{head},\n "records": [\n  {lines}\n ]\n}}\n')
    print(json.dumps(summary))
    shutil.rmtree(scratch)


def chain(number: int, words: list[str], whole: Path, seen: dict[str, int], seed: int) -> list[dict]:
    """One run, disturbed at each of its restarts and then left to finish; a record of every start."""
    scratch = whole.with_name(f"chain-{number}")
    scratch.mkdir()
    disk = small_disk(scratch / "disk")
    run, records, rng = disk / "run", [], random.Random(f"{seed} {number}")
    size = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    for where, kind in itertools.product(FOLDERS, (*KINDS, "later", "disk")):
        if kind == "later":
            fault = Fault(rng.choice(("kill", "press")), later=round(rng.uniform(0.3, 4), 2))
        elif kind == "disk":
            fault = Fault(kind, at=rng.randrange(size))
        else:
            fault = Fault(kind, where, rng.randint(1, max(1, seen[where] // (4 if kind == "full" else 2))))
        outcome = attempt([*words, f"output={run}"], run, fault, scratch)
        record = {"chain": number, **fault._asdict(), **outcome._asdict()}
        record["said"] = outcome.said.replace(str(whole.parent), "")
        record["as it should"] = expected(fault, outcome)
        record["half-written"] = broken(run)
        if outcome.code == 0:  # it is finished: the next fault needs a run of its own
            record["differences"] = differences(run, whole)
            shutil.rmtree(run)
        records.append(record)
        print(json.dumps(record), flush=True)
    last = attempt([*words, f"output={run}"], run, None, scratch)
    wrong = differences(run, whole) if last.code == 0 else [last.said]
    records.append({"chain": number, "kind": "none", "code": last.code, "differences": wrong})
    print(json.dumps(records[-1]), flush=True)
    subprocess.run(["umount", disk], check=True)
    return records


def small_disk(at: Path) -> Path:
    """A file system of its own, in memory; needs root."""
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", at], check=True)
    return at


def teacher(scratch: Path) -> Path:
    """A random llama of a few thousand parameters that reads with the bundled tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED["books-5m"])
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = tiny("llama", vocab_size=len(tokenizer), pad_token_id=None, **ends)
    model.save_pretrained(scratch / "teacher")
    tokenizer.save_pretrained(scratch / "teacher")
    return scratch / "teacher"


if __name__ == "__main__":
    main()
