"""RULER's needles, variable tracking and word counts (arXiv:2404.06654), by rules of our own code.

The long templates are RULER's and are not kept here: they are read, as text, from an installed lm-eval
(`pip install 'linearize[eval]'`) and have to match a hash. Without them a task is not run, never replaced.

How this differs from RULER: keys and words come from our own lists, not from wonderwords; sentences are split
by a rule of ours, not by nltk; essays are whatever text is given, so those tasks say "alternative haystack";
each sample has a generator of its own; the answer prefix counts as a part of the prompt, and FWE's answer too;
CWE shows its solved example, which lm-eval builds and leaves out; the variable tracking prompt has no space
after its last colon, as lm-eval has it, since most tokenizers put the space before the answer.
"""

import ast
import hashlib
import importlib.util
import math
import random
import re
import string
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ..modeling.errors import DataError
from .budget import Ask, Haystack, Question, largest
from .form import Counter, plain
from .recall import FILLER, GIVEAWAYS
from .words import ADJECTIVES, NOUNS, WORDS

PINS = {
    "niah": "b373c00e238df12b",
    "vt": "d2f02a222818fb5f",
    "cwe": "c2426f94a28fc3a2",
    "fwe": "0bfad42dcc7b1cff",
}  # first 16 hexadecimal digits of the sha256 of template and answer prefix, in lm-eval 0.4.13

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
PREFIX_ONE = "The special magic {kind} for {query} mentioned in the provided text is"
PREFIX_MANY = "The special magic {kind} for {query} mentioned in the provided text are"
LINE = FILLER.strip()
DEPTHS = [round(100 * i / 39) for i in range(40)]
SHORT = 4096  # below this length RULER takes smaller steps and lighter lists
NIAH_TOKENS, VT_TOKENS, CWE_TOKENS, FWE_TOKENS = 128, 30, 120, 50
HOPS = 4
EXAMPLE_TOKENS = 500
PAIRS_FROM = (
    8192  # from here on a list of counted words may need more than there are, and takes pairs of words
)


class TemplateMissing(DataError):
    """A template of RULER's that is not installed, or is another one than this version was written for."""


def templates(name: str) -> tuple[str, str]:
    """Template and answer prefix ("" for needles) of "niah", "vt", "cwe" or "fwe", from the installed lm-eval."""
    spec = importlib.util.find_spec("lm_eval")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    if not places:
        raise TemplateMissing(
            f"{name}: RULER's template is read from lm-eval, which is not installed; pip install 'linearize[eval]'"
        )
    return _read(name, Path(places[0]) / "tasks" / "ruler" / f"{name}_utils.py")


@cache
def _read(name: str, path: Path) -> tuple[str, str]:
    if not path.is_file():
        raise TemplateMissing(f"{name}: the installed lm-eval has no tasks/ruler/{path.name}; install 0.4.13")
    found = dict(_constants(ast.parse(path.read_text(encoding="utf-8"))))
    config = found.get("CONFIG", {})
    config = config.get("variable_tracking", config)
    template = str(config.get("template", found.get("TEMPLATE", "")))
    answer = str(config.get("answer_prefix", ""))
    digest = hashlib.sha256((template + answer).encode()).hexdigest()[:16]
    if digest != PINS[name]:
        raise TemplateMissing(
            f"{name}: the installed lm-eval has another template ({digest} for {PINS[name]}); install 0.4.13"
        )
    return template, answer


def _constants(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """Names at the top of a module whose values are literals; nothing is run."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                yield node.targets[0].id, ast.literal_eval(node.value)
            except ValueError:
                continue


def draw_word(rng: random.Random) -> str:
    """An adjective and a noun with a hyphen."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def draw_number(rng: random.Random) -> str:
    """Seven digits, the first not 0."""
    return str(rng.randrange(10**6, 10**7))


def draw_uuid4(rng: random.Random) -> str:
    """A version 4 UUID from 128 seeded bits."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


DRAW: dict[str, Callable[[random.Random], str]] = {
    "words": draw_word,
    "numbers": draw_number,
    "uuids": draw_uuid4,
}


class Fresh:
    """Draws that never repeat, nor stand in a text."""

    def __init__(self, rng: random.Random, text: str = ""):
        self.rng, self.text, self.seen = rng, text, set()

    def __call__(self, kind: str) -> str:
        for _ in range(10_000):
            made = DRAW[kind](self.rng)
            if made not in self.seen and made not in self.text:
                self.seen.add(made)
                return made
        raise DataError(f"recall haystack: no {kind} left that its text does not say; give another text")


@dataclass(frozen=True)
class Niah:
    """Needles in a haystack: `keys` of them with `values` each, `asked` of the keys asked for."""

    name: str
    haystack: Literal["noise", "essay", "needles"]
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    asked: int = 1

    def __call__(self, ask: Ask) -> Question:
        """`depth` places the needle that is asked for; None draws it as RULER does."""
        template, _ = templates("niah")
        rng, depth, text = ask.rng, ask.depth, self._text(ask.haystack)
        fresh = Fresh(rng, text.text if text else "")
        pairs = [
            (k, fresh(self.value))
            for k in [fresh(self.key) for _ in range(self.keys)]
            for _ in range(self.values)
        ]
        queries = rng.sample(list(dict.fromkeys(k for k, _ in pairs)), self.asked)
        references = tuple(value for query in queries for key, value in pairs if key == query)
        needles = [NEEDLE.format(kind=self.value, key=key, value=value) for key, value in pairs]
        sought = NEEDLE.format(kind=self.value, key=queries[0], value=references[0])
        rng.shuffle(needles)
        if depth is not None:  # the needle that is asked for comes first, and takes the depth
            needles = [sought, *(needle for needle in needles if needle != sought)]
        where = rng.getrandbits(64)
        others = _Others(self, Fresh(random.Random(rng.getrandbits(64))), set(fresh.seen))
        head, tail, prefix = self._frame(template, queries, len(references))
        count = ask.counter(prefix)

        def build(units: int) -> str:
            hay, joint = self._hay(units, text, others)
            at = self._places(len(hay), len(needles), depth, random.Random(where))
            return f"{head}{_insert(hay, needles, at, joint)}{tail} {prefix}"

        body = ask.filled(
            build,
            count,
            NIAH_TOKENS,
            name=self.name,
            rung=self._rung(ask.length),
            extra=len(count.continuation(" ".join(references))),
            limit=text.words if text else None,
        )
        single = len(references) == 1
        order = references if self.asked > 1 else sorted(references, key=body.index)
        return Question(
            count.ids(body),
            references,
            count.depth(body, sought),
            count.continuation(references[0]) if single else None,
            () if single else count.series(order, _commas(len(order))),
        )

    def _text(self, haystack: Haystack | None) -> Haystack | None:
        if self.haystack != "essay":
            return None
        if haystack is None or not haystack.words:
            raise DataError(f"{self.name}: hides its needles in text, and none was given; name a haystack")
        if said := next((word for word in GIVEAWAYS if word in haystack.text), None):
            raise DataError(f"{self.name}: the haystack says {said!r} itself; give another text")
        return haystack

    def _rung(self, length: int) -> Callable[[int], int]:
        least = self.keys * self.values
        step = 500 if self.haystack == "essay" else 5 if length < SHORT else 25
        return lambda k: max(least, k * step)

    def _hay(self, units: int, text: Haystack | None, others: "_Others") -> tuple[list[str], str]:
        if text is not None:
            return text.first(units), " "
        return ([LINE] * units if self.haystack == "noise" else others.first(units)), "\n"

    def _places(self, units: int, needles: int, depth: float | None, rng: random.Random) -> list[int]:
        """Before which unit each needle stands, in the needles' order."""
        if depth is not None:
            drawn = rng.sample([d for d in DEPTHS if d != round(100 * depth)], needles - 1)
            return [int(units * depth + 1e-9), *(units * d // 100 for d in sorted(drawn))]
        if self.haystack == "essay":
            return [units * d // 100 for d in sorted(rng.sample(DEPTHS, needles))]
        return sorted(rng.sample(range(units), needles))

    def _frame(self, template: str, queries: list[str], answers: int) -> tuple[str, str, str]:
        """What stands before the haystack, after it, and the start of the answer."""
        kind = self.value
        if answers == 1:
            for many, one in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
                template = template.replace(many, one)
            kind = kind[:-1]
        query = ", ".join(queries[:-1]) + ", and " + queries[-1] if len(queries) > 1 else queries[0]
        head, tail = template.split("{context}")
        prefix = (PREFIX_ONE if answers == 1 else PREFIX_MANY).format(kind=kind, query=query)
        return (
            head.format(type_needle_v=kind, query=query),
            tail.format(type_needle_v=kind, query=query),
            prefix,
        )


def _commas(count: int) -> list[str]:
    """What stands before each of several answers, as RULER lists the keys that it asks for."""
    return ["", *[","] * (count - 2), ", and"]


class _Others:
    """Lines of needles that nobody asks for, as many as are wanted; a longer list starts with a shorter one."""

    def __init__(self, task: Niah, fresh: Fresh, taken: set[str]):
        self.task, self.fresh, self.lines = task, fresh, []
        fresh.seen |= taken

    def first(self, count: int) -> list[str]:
        while len(self.lines) < count:
            key, value = self.fresh(self.task.key), self.fresh(self.task.value)
            self.lines.append(NEEDLE.format(kind=self.task.value, key=key, value=value))
        return self.lines[:count]


def _insert(hay: list[str], needles: list[str], places: list[int], joint: str) -> str:
    """Every needle before the unit of its place; needles of one place keep their order."""
    out: list[str] = []
    order = sorted(range(len(needles)), key=lambda i: places[i])
    done = 0
    for i in order:
        out += [*hay[done : places[i]], needles[i]]
        done = places[i]
    return joint.join(out + hay[done:])


def variable_tracking(ask: Ask) -> Question:
    """VT: one chain of four hops among filler lines, after a solved example of its own; five names to find."""
    template, prefix = templates("vt")
    form = template + prefix
    solved, names = _Chain(ask.rng, 3, form), _Chain(ask.rng, 5, form)
    shown = Counter(ask.tokenizer, plain(ask.tokenizer))  # the example is a part of the question
    lines = largest(lambda k: shown(solved.shown(max(1, 5 * k))), EXAMPLE_TOKENS - VT_TOKENS)
    if not lines:  # fewer than five lines: one more while they fit
        lines = 1 + largest(lambda k: shown(solved.shown(1 + k)), EXAMPLE_TOKENS - VT_TOKENS, 3)
        example = solved.shown(lines)
    else:
        example = solved.shown(5 * lines)
    count = ask.counter(names.reply(prefix))
    body = ask.filled(
        lambda n: example + "\n\n" + names.asked(n).rstrip(),
        count,
        VT_TOKENS,
        name="vt",
        rung=lambda k: 10 * k if k else 1,
        extra=len(count.continuation(" ".join(names.names))),
    )
    series = count.series(names.names, [" ", *[""] * HOPS])  # spaced as the example's
    return Question(count.ids(body), tuple(names.names), count.depth(body, names.lines[0]), series=series)


class _Chain:
    """`VAR A = 12345`, `VAR B = VAR A `, ...: names of `letters` capitals."""

    def __init__(self, rng: random.Random, letters: int, form: str):
        self.form, self.value, self.names = form, str(rng.randrange(10000, 99999)), []
        while len(self.names) <= HOPS:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            if name not in self.names:
                self.names.append(name)
        pairs = zip(self.names[1:], self.names, strict=False)
        self.lines = [f"VAR {self.names[0]} = {self.value}", *(f"VAR {b} = VAR {a} " for b, a in pairs)]
        self.where = rng.getrandbits(64)

    def asked(self, noises: int) -> str:
        """The question with `noises` filler lines, which are split into sentences where they are too few."""
        hay = [f"{LINE}\n"] * noises
        if noises <= HOPS + 1:
            hay = [s + "." if s.strip() else s for line in hay for s in line.split(".")]
        at = sorted(random.Random(self.where).sample(range(len(hay)), len(self.lines)))
        context = _insert(hay, self.lines, at, " ").replace(". \n", ".\n")
        return self._filled_in(self.form, context)

    def reply(self, prefix: str) -> str:
        """The start of the answer, as :meth:`asked` ends."""
        return self._filled_in(prefix).rstrip()

    def _filled_in(self, form: str, context: str = "") -> str:
        return form.format(context=context, query=self.value, num_v=HOPS + 1)

    def shown(self, noises: int) -> str:
        return f"{self.asked(noises)} {' '.join(self.names)}\n\n"


def common_words(ask: Ask) -> Question:
    """CWE: ten words that a numbered list repeats more often than all others, after a solved list."""
    template, prefix = templates("cwe")
    rng, length, count = ask.rng, ask.length, ask.counter(prefix)
    often, seldom = (6, 1) if length < SHORT else (30, 3)
    shown = (20, 3, 1) if length < SHORT else (40, 10, 3)
    words = list(WORDS) if length < PAIRS_FROM else [f"{a}-{b}" for a in ADJECTIVES for b in NOUNS]
    example, solved = _numbered(rng.sample(words, shown[0]), *shown[1:], random.Random(rng.getrandbits(64)))
    rng.shuffle(words)
    where = rng.getrandbits(64)
    form = template + prefix
    head = form.format(context=example, query="") + " ".join(f"{i}. {w}" for i, w in enumerate(solved, 1))
    body = ask.filled(
        lambda n: (
            f"{head}\n{form.format(context=_numbered(words[:n], often, seldom, random.Random(where))[0], query='')}"
        ),
        count,
        CWE_TOKENS,
        name="cwe",
        rung=lambda k: 10 * (k + 1),
        extra=len(count.continuation(" ".join(f"{i}. {word}" for i, word in enumerate(words[:10], 1)))),
        limit=len(words),
    )
    listed = re.findall(r"\d+\. (\S+)", body[len(head) :])
    order = sorted(words[:10], key=listed.index)
    series = count.series(order, [f" {i}." for i in range(1, 11)])  # numbered, as the example's
    return Question(count.ids(body), tuple(words[:10]), series=series)


def _numbered(words: list[str], often: int, seldom: int, rng: random.Random) -> tuple[str, list[str]]:
    """The numbered list of a set of words, the first ten of which are the common ones."""
    listed = words[:10] * often + words[10:] * seldom
    rng.shuffle(listed)
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1)), words[:10]


def frequent_words(ask: Ask) -> Question:
    """FWE: invented words by a Zipf law of exponent 2; the second to fourth are asked for, the first is dots."""
    template, prefix = templates("fwe")
    rng, length, count = ask.rng, ask.length, ask.counter(prefix)
    names: dict[str, None] = {}
    while len(names) < max(4, length // 50):
        names["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    words = ["...", *list(names)[1:]]
    where = rng.getrandbits(64)

    def build(total: int) -> str:
        text = [w for k, w in enumerate(words, 1) for _ in range(int(total * k**-2 * 6 / math.pi**2))]
        random.Random(where).shuffle(text)
        return (template + prefix).format(context=" ".join(text), query="")

    step = max(1, length // 32)
    least = length // 6 % step
    while least * 6 / math.pi**2 < 32:  # with fewer, the fifth word may be as frequent as the fourth
        least += step
    body = ask.filled(
        build,
        count,
        FWE_TOKENS,
        name="fwe",
        rung=lambda k: least + k * step,
    )
    return Question(count.ids(body), tuple(words[1:4]), series=count.series(words[1:4], _commas(3)))
