"""Known vulnerabilities of the versions in constraints.txt, looked up by pip-audit: python tests/audit.py

Exit code 0 where every version was looked up and none has a known one, 1 where some have, 3 where it was not run. A
database that does not answer is not run: pip-audit by itself then finds "no known vulnerabilities". Whether one answers
is seen from a version that has had a hole for years.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
CONTROL = "requests==2.19.0"  # CVE-2018-18074
DATABASES = ("pypi", "osv")


def main() -> int:
    for database in DATABASES:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write(f"{CONTROL}\n")
            file.flush()
            if answers(asked(database, Path(file.name))):
                code, words = verdict(asked(database, CONSTRAINTS), pins(CONSTRAINTS.read_text()))
                print(f"audit, by the database {database}: {words}")
                return code
    print(f"audit: not run: no database of vulnerabilities answers (asked: {', '.join(DATABASES)})")
    return 3


def asked(database: str, requirements: Path) -> list[dict[str, Any]]:
    """What pip-audit says of each version; empty where it says nothing."""
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "-f", "json", "-s", database]
    made = subprocess.run([*command, "-r", str(requirements)], capture_output=True, text=True)
    try:
        return json.loads(made.stdout)["dependencies"]
    except (ValueError, KeyError):
        return []


def pins(text: str) -> set[str]:
    """``name==version`` of every line that is one, names as the index spells them."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return {line.lower().replace("_", "-") for line in lines if "==" in line}


def answers(control: list[dict[str, Any]]) -> bool:
    return any(entry.get("vulns") for entry in control)


def verdict(found: list[dict[str, Any]], wanted: set[str]) -> tuple[int, str]:
    """The exit code and the line that goes with it."""
    looked = {f"{x['name']}=={x['version']}".lower().replace("_", "-") for x in found if "vulns" in x}
    bad = [
        f"{x['name']} {x['version']}: {', '.join(v['id'] for v in x['vulns'])}"
        for x in found
        if x.get("vulns")
    ]
    if bad:
        return 1, "\n  ".join([f"{len(bad)} of {len(wanted)} versions have known vulnerabilities", *bad])
    if missing := sorted(wanted - looked):
        return 3, f"not run for {len(missing)} of {len(wanted)} versions: {', '.join(missing)}"
    return 0, f"no known vulnerability in {len(wanted)} versions"


if __name__ == "__main__":
    sys.exit(main())
