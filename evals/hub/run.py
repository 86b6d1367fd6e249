"""The way of a student to a Hub and back, every request written down: a server of this machine, the real clients.

    python evals/hub/run.py [RUN]

RUN is a finished run; without one a small run is made. Writes ``roundtrip.md`` beside this file.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import huggingface_hub  # noqa: E402
from hub_server import READER, TOKEN, serving  # noqa: E402

from linearize.files import sha256_of  # noqa: E402
from linearize.provenance import origin  # noqa: E402

SMALL = (
    *("data.seq_len=256", "data.sources=[{kind: self, tokens: 8000}]", "transfer.tokens=4096"),
    *(
        "finetune.tokens=4096",
        "evaluate.seq_lens=[256]",
        "evaluate.sequences=2",
        "evaluate.recall_lens=[256]",
    ),
    *("evaluate.recall_samples=4", "evaluate.generate_tokens=8", "control.enabled=false"),
)
NAME = "me/my-student"
HUB = "https://hub.example"
"""Stands for the server's address, whose port is another one every time."""
LIBRARY = ("/api/agent-harnesses",)
"""What huggingface_hub asks for itself, by the environment that it runs in."""
PLAIN = """
import sys
{snippet}
assert not [name for name in sys.modules if name.partition(".")[0] == "linearize"]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, serving() as hub:
        there = Path(scratch)
        run = args.run.resolve() if args.run else made(there)
        way = Way(hub, there)
        way.step("A dry run, which asks the Hub nothing", ["push", str(run), NAME, "--dry-run"])
        way.step("A token that the Hub does not know", ["push", str(run), NAME], token="hf_nobody", code=2)
        hub.drop = sha256_of(run / "student" / "model.safetensors")
        way.step("The connection breaks off in the middle of the weights", ["push", str(run), NAME], code=2)
        hub.drop = None
        way.step("The same command again", ["push", str(run), NAME])
        way.step("And again: everything is there", ["push", str(run), NAME])
        way.step("The same on a branch", ["push", str(run), NAME, "--revision", "next"])
        reader = ["push", str(run), NAME, "--revision", "other"]
        way.step("A token that may only read", reader, token=READER, code=2)
        hub.conflict = True
        way.step("Somebody else commits meanwhile", [*reader[:-1], "third"], code=2)
        hub.conflict = False
        way.step("Measured from the Hub", ["eval", NAME, "evaluate.recall_tasks=[]"])
        card = hub.repositories[NAME].files("main")[1]["README.md"].decode()
        snippet = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
        code = PLAIN.format(snippet=snippet)
        way.step("The card's own words, in plain transformers", [sys.executable, "-c", code], shown="python")
        way.write(HERE / "roundtrip.md")


def made(scratch: Path) -> Path:
    """A run of the embedded model, as small as runs are."""
    command = [
        sys.executable,
        "-m",
        "linearize",
        "run",
        "books-5m/lolcats",
        "--output",
        str(scratch / "run"),
        *SMALL,
    ]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return scratch / "run"


class Way:
    """Commands against one Hub, each with what it said and what it asked."""

    def __init__(self, hub, scratch: Path):
        self.hub, self.scratch, self.lines = hub, scratch, []
        self.totals: list[tuple[str, int, int, int]] = []

    def step(
        self, title: str, words: list[str], *, token: str = TOKEN, code: int = 0, shown: str = ""
    ) -> None:
        """Raises AssertionError where the exit code is another one."""
        plain = bool(shown)
        environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"} | {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.scratch / ("plain" if plain else "home")),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": token,
            "PYTHONPATH": "" if plain else str(ROOT),
        }
        first, command = len(self.hub.log), words if plain else [sys.executable, "-m", "linearize", *words]
        done = subprocess.run(command, cwd=self.scratch, env=environment, capture_output=True, text=True)
        assert done.returncode == code, (title, done.returncode, done.stderr)
        said = (done.stderr if code else done.stdout).strip().splitlines()
        assert not any(secret in done.stdout + done.stderr for secret in (TOKEN, READER, "signature"))
        asked = [exchange for exchange in self.hub.log[first:] if exchange.path not in LIBRARY]
        typed = shown or f"linearize {' '.join(words)}".replace(
            words[1], "RUN" if words[0] == "push" else NAME, 1
        )
        self.lines += [f"## {title}\n", f"`{typed}`, exit code {code}.", ""]
        shown_last = said[-1].replace(str(self.scratch), "").replace(self.hub.url, HUB) if said else ""
        self.lines += [f"> {shown_last}\n"] if shown_last else []
        if asked:
            self.lines += [
                "| method | path | status | bytes sent | bytes answered |",
                "| --- | --- | --- | --- | --- |",
            ]
            self.lines += [
                f"| {x.method} | `{short(x.path)}` | {x.status or 'cut'} | {x.sent:,} | {x.answered:,} |"
                for x in asked
            ]
            self.lines.append("")
        else:
            self.lines.append("No request.\n")
        sent, answered = sum(x.sent for x in asked if x.status), sum(x.answered for x in asked)
        self.totals.append((title, len(asked), sent, answered))

    def write(self, file: Path) -> None:
        versions = origin()["versions"]
        head = [
            "# A student's way to a Hub and back\n",
            "Written by `python evals/hub/run.py`: the clients of huggingface_hub and transformers, against a server "
            "on this machine that speaks the Hub's protocol (`tests/hub_server.py`) and checks hashes, sizes, tokens "
            f"and the card's metadata. {HUB} stands for its address; what huggingface_hub asks for itself "
            f"({', '.join(LIBRARY)}) is left out. huggingface_hub {huggingface_hub.__version__}, transformers "
            f"{versions['transformers']}, {origin()['date'][:10]}.\n",
            "| what | requests | bytes sent | bytes answered |",
            "| --- | --- | --- | --- |",
            *(f"| {title} | {count} | {sent:,} | {back:,} |" for title, count, sent, back in self.totals),
            "",
        ]
        file.write_text("\n".join([*head, *self.lines]).rstrip() + "\n")
        print(json.dumps(self.totals, indent=1))


def short(path: str) -> str:
    """Hashes by their first digits."""
    return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{32,56}\b", r"\1...", path)


if __name__ == "__main__":
    main()
