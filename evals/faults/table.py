"""The tables of this folder's README, from ``results.json`` and ``fuzz.json``: python evals/faults/table.py"""

import json
from collections import Counter, defaultdict
from pathlib import Path

HERE = Path(__file__).parent
MEANING = {
    "kill": "kill -9",
    "full": "a writing refused: no space",
    "disk": "a disk that is full",
    "press": "Ctrl-C",
}


def main() -> None:
    records = [r for r in json.loads((HERE / "results.json").read_text())["records"] if r.get("injected")]
    print("| fault | injected | ended by it | as they should | left half-written | other bits at the end |")
    print(f"|{' --- |' * 6}")
    for kind, meaning in MEANING.items():
        mine = [r for r in records if r["kind"] == kind]
        ended = [r for r in mine if r["code"]]
        right, half = (sum(map(bool, (r[key] for r in mine))) for key in ("as it should", "half-written"))
        other = sum(bool(r.get("differences")) for r in mine)
        print(f"| {meaning} | {len(mine)} | {len(ended)} | {right} | {half} | {other} |")
    tried = defaultdict(Counter, json.loads((HERE / "fuzz.json").read_text()))
    print("\n| bad input | tried | accepted | refused by |")
    print(f"|{' --- |' * 4}")
    for name, came in sorted(tried.items()):
        refused = {
            error: count for error, count in came.items() if error not in ("accepted", "loaded without it")
        }
        words = ", ".join(f"{error} {count}" for error, count in sorted(refused.items()))
        total = sum(came.values())
        print(f"| {name} | {total} | {total - sum(refused.values())} | {words or 'none'} |")


if __name__ == "__main__":
    main()
