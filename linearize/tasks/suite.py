"""The recall suite: every task by its name, and the questions of one cell.

    from linearize.tasks.suite import SUITE, questions
    asked = questions(SUITE["niah_multikey_2"], tokenizer, 4096, samples=100)

A question depends on its task, length, depth, index and seed, and on nothing else that is asked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..modeling.errors import DataError
from .babi import TOKENS, Babi
from .budget import LEAST_FILL, Ask, Fill, Haystack, Question
from .form import Form
from .passages import CUE, PASSKEY_TOKENS, TABLE_TOKENS, Copying, Passkey, Table
from .recall import generator
from .ruler import (
    CWE_TOKENS,
    FWE_TOKENS,
    NIAH_TOKENS,
    VT_TOKENS,
    Niah,
    common_words,
    frequent_words,
    variable_tracking,
)
from .scorers import Kind, contains, place, strict, tokens

Metric = Literal["contains", "first", "place", "tokens"]
VERSION = 1  # of wordings and draws; part of every sample's seed
SEED = 42
GRID = tuple(i / 10 for i in range(11))
COUNTS = {"smoke": 50, "standard": 100, "publication": 500}
REPORTABLE = 50  # samples, below which a share says too little to be quoted

Make = Callable[[Ask], Question]


@dataclass(frozen=True)
class Score:
    """What one answer is worth: by the task's metric, by RULER's rule, and by the strict one."""

    value: float
    contains: float
    strict: bool
    prefix: float | None = None
    """Of a copy: the share before the first wrong token."""


@dataclass(frozen=True)
class SuiteTask:
    """One task: how it is made, how long its answers may get, and how they are scored."""

    name: str
    label: str
    """As every table, file and plot calls it; names the haystack where it is not the benchmark's own."""
    metric: Metric
    answer: Kind
    max_new_tokens: int
    make: Make
    several: bool = False
    """Whether an answer may be right in part."""
    placed: bool = False
    """Whether there is one needle, so that a depth can be asked for."""
    alone: bool = False
    """Whether it is also asked at length 0, without any haystack."""
    text: bool = False
    """Whether it is made with the haystack's text."""
    version: int = VERSION

    @property
    def chance(self) -> float:
        return 1 / 6 if self.metric == "place" else 0.0

    def score(self, question: Question, text: str, written: Sequence[int]) -> Score:
        """Of a generated answer, given as text and as token ids without end-of-sequence."""
        found = contains(text, question.references)
        if self.metric == "tokens":
            accuracy, prefix, exact = tokens(written, question.answer or [])
            return Score(accuracy, found, exact, prefix)
        if self.metric == "place":
            right = place(text, question.references[0], question.asked)
            return Score(float(right), found, right)
        exact = strict(text, question.references, self.answer)
        return Score(float(exact) if self.metric == "first" else found, found, exact)


def questions(
    task: SuiteTask,
    tokenizer: Any,
    length: int,
    *,
    samples: int,
    seed: int = SEED,
    depths: Sequence[float] = GRID,
    fill: Fill = "grid",
    haystack: Haystack | None = None,
    form: Form | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[float | None, Question]]:
    """At least `samples` questions of a cell, with the depth that each was made for; equally many at each depth.

    ``form`` is what stands around each, plain text if not given. A depth is None where the task has no single needle,
    or where "ruler" draws it. `progress` hears (made, all).
    Raises DataError where the task does not fit, its template is missing, or "grid" fills less than 97 %.
    """
    if samples < 1:
        raise DataError(f"{task.name}: {samples} samples say nothing; ask for at least 1")
    places: list[float | None] = list(depths) if task.placed and fill == "grid" and depths else [None]
    rounds = -(-samples // len(places))
    made: list[tuple[float | None, Question]] = []
    for index in range(rounds):
        for depth in places:
            rng = generator(task.name, length, index, seed, depth, task.version)
            asked = Ask(tokenizer, length, rng, depth, haystack, fill, index, form)
            made.append((depth, task.make(asked)))
            if progress is not None:
                progress(len(made), rounds * len(places))
    filled = sum(tokens_of(task, question) for _, question in made) / len(made)
    if fill == "grid" and length and filled < LEAST_FILL * length:
        raise DataError(
            f"{task.name}: whole units of haystack fill {filled:.0f} of {length} tokens, under "
            f"{100 * LEAST_FILL:.0f} %; ask for a greater length, more text, or fill=ruler"
        )
    return made


def tokens_of(task: SuiteTask, question: Question) -> int:
    """Tokens of the prompt and those kept for the answer: what has to stay within the length."""
    return len(question.ids) + _room(task, question)


def _room(task: SuiteTask, question: Question) -> int:
    return len(question.answer or []) if task.metric == "tokens" else task.max_new_tokens


def _niah(name: str, label: str, haystack: Literal["noise", "essay", "needles"], **fields: Any) -> SuiteTask:
    make = Niah(name, haystack, **fields)
    essay, several = haystack == "essay", make.values * make.asked > 1
    return SuiteTask(
        name,
        f"{label} (alternative haystack)" if essay else label,
        "contains",
        "uuid" if make.value == "uuids" else "number",
        NIAH_TOKENS,
        make,
        several=several,
        placed=not several,
        text=essay,
    )


def _copy(kind: Literal["fresh", "natural"], size: int) -> SuiteTask:
    name = f"copying_{kind}_{size}"
    label = f"copying, {size} tokens, {'random words' if kind == 'fresh' else 'alternative text'}"
    make = Copying(name, kind, size)
    return SuiteTask(
        name, label, "tokens", "tokens", size - CUE, make, several=True, alone=True, text=kind == "natural"
    )


def _qa(hops: int) -> SuiteTask:
    label = f"QA{hops} (simulated, alternative book text)"
    return SuiteTask(f"qa{hops}", label, "place", "place", TOKENS, Babi(hops), alone=True, text=True)


SUITE: dict[str, SuiteTask] = {
    task.name: task
    for task in (
        _niah("niah_single_1", "S-NIAH-1", "noise"),
        _niah("niah_single_2", "S-NIAH-2", "essay"),
        _niah("niah_single_3", "S-NIAH-3", "essay", value="uuids"),
        _niah("niah_multikey_1", "MK1", "essay", keys=4),
        _niah("niah_multikey_2", "MK2", "needles"),
        _niah("niah_multikey_3", "MK3", "needles", key="uuids", value="uuids"),
        _niah("niah_multivalue", "MV", "essay", values=4),
        _niah("niah_multiquery", "MQ", "essay", keys=4, asked=4),
        SuiteTask("vt", "VT", "contains", "name", VT_TOKENS, variable_tracking, several=True),
        SuiteTask("cwe", "CWE", "contains", "word", CWE_TOKENS, common_words, several=True),
        SuiteTask("fwe", "FWE", "contains", "code", FWE_TOKENS, frequent_words, several=True),
        SuiteTask("passkey", "passkey", "first", "integer", PASSKEY_TOKENS, Passkey(), placed=True),
        SuiteTask(
            "passkey_legacy",
            "passkey (1 to 50000)",
            "first",
            "integer",
            PASSKEY_TOKENS,
            Passkey("passkey_legacy", 1, 50_000),
            placed=True,
        ),
        SuiteTask(
            "kv_number",
            "KV-retrieval, numbers",
            "first",
            "number",
            TABLE_TOKENS,
            Table("kv_number", "words", "numbers"),
            placed=True,
        ),
        SuiteTask(
            "kv_uuid",
            "KV-retrieval, UUIDs",
            "first",
            "uuid",
            TABLE_TOKENS,
            Table("kv_uuid", "uuids", "uuids"),
            placed=True,
        ),
        *(_copy(kind, size) for kind in ("fresh", "natural") for size in (16, 64, 256, 1024)),
        *(_qa(hops) for hops in (1, 2, 3)),
    )
}
