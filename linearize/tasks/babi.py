"""Simulated bAbI questions 1 to 3 (arXiv:1502.05698) among sentences of other text, after BABILong (2406.10149).

People move, take things and drop them; the question needs one, two or three of the facts. The world, the wording
and the background are ours: these are "simulated, alternative book text" and never BABILong's own figures.
A world is kept only if exactly the right number of facts supports its answer; the six places are the answer
equally often, so guessing finds one in six.
"""

import random
import re
from collections import Counter as Tally
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..modeling.errors import DataError
from .budget import Ask, Haystack, Question

PEOPLE = ("Mary", "John", "Sandra", "Daniel")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
VERBS = {
    "move": ("moved to", "went to", "journeyed to", "travelled to", "went back to"),
    "take": ("took", "got", "picked up", "grabbed"),
    "drop": ("dropped", "put down", "left", "discarded"),
}
FACTS = {1: (2, 10), 2: (4, 30), 3: (5, 30)}
TOKENS = 20
LEAST_WORDS = 10  # of a background sentence
ATTEMPTS = 20_000
LAST, MOST = "last place", "most frequent place"

INSTRUCTION = {
    1: "The text holds facts about where people go, hidden among other sentences. Say where the person is now.",
    2: "The text holds facts about people and things, hidden among other sentences. Say where the thing is now.",
    3: "The text holds facts about people and things, hidden among other sentences. "
    "Say where the thing was before it came to the place that is named.",
}
EXAMPLES = {
    1: (
        ("John moved to the office. Mary went to the garden.", "Where is John?", "office"),
        ("Sandra went to the kitchen. Sandra travelled to the hallway.", "Where is Sandra?", "hallway"),
    ),
    2: (
        (
            "Mary went to the office. Mary got the milk. Mary moved to the garden.",
            "Where is the milk?",
            "garden",
        ),
        (
            "John went to the bedroom. John took the apple. Daniel moved to the office. John went to the kitchen.",
            "Where is the apple?",
            "kitchen",
        ),
    ),
    3: (
        (
            "John went to the kitchen. John got the milk. John moved to the office. John went to the garden.",
            "Where was the milk before the garden?",
            "office",
        ),
        (
            "Mary went to the garden. Mary took the apple. Mary went to the bathroom. Mary moved to the hallway.",
            "Where was the apple before the hallway?",
            "bathroom",
        ),
    ),
}
REPLY = "Answer:"
FORM = "Answer with the name of one place and a full stop."


@dataclass(frozen=True)
class Fact:
    """What a person did: "move" to a place, "take" or "drop" a thing."""

    person: str
    action: str
    what: str

    def say(self, verb: str) -> str:
        return f"{self.person} {verb} the {self.what}."


@dataclass(frozen=True)
class Story:
    """Facts in order, a question about them, and the indices of the facts that its answer needs."""

    facts: tuple[Fact, ...]
    question: str
    answer: str
    support: tuple[int, ...]


def simulate(rng: random.Random, steps: int) -> list[Fact]:
    """`steps` facts of a world in which everything is possible: things are taken where they lie."""
    at: dict[str, str] = {}
    lies = {thing: rng.choice(PLACES) for thing in THINGS}
    held: dict[str, str] = {}
    facts = []
    for _ in range(steps):
        person = rng.choice(PEOPLE)
        here = at.get(person)
        choices = [Fact(person, "move", rng.choice([place for place in PLACES if place != here]))]
        if here is not None:
            near = [t for t in THINGS if t not in held and lies[t] == here]
            mine = [t for t in THINGS if held.get(t) == person]
            choices += [Fact(person, "take", rng.choice(near))] if near else []
            choices += [Fact(person, "drop", rng.choice(mine))] if mine else []
        fact = rng.choice(choices)
        facts.append(fact)
        if fact.action == "move":
            at[person] = fact.what
        elif fact.action == "take":
            held[fact.what] = person
        else:
            del held[fact.what]
            lies[fact.what] = at[person]
    return facts


def ask(facts: Sequence[Fact], hops: int, rng: random.Random) -> Story | None:
    """A question that exactly `hops` of the facts answer, or None where this world has none."""
    found = {1: _persons, 2: _things, 3: _histories}[hops](facts)
    if not found:
        return None
    question, answer, support = rng.choice(found)
    return Story(tuple(facts), question, answer, support)


Asked = tuple[str, str, tuple[int, ...]]


def _persons(facts: Sequence[Fact]) -> list[Asked]:
    """Where is the person? The last move says it."""
    last = {fact.person: i for i, fact in enumerate(facts) if fact.action == "move"}
    return [(f"Where is {person}?", facts[i].what, (i,)) for person, i in last.items()]


def _things(facts: Sequence[Fact]) -> list[Asked]:
    """Where is the thing? It is held by someone who has moved since: taking it and the last move say so."""
    found = []
    for thing in THINGS:
        taken = _holding(facts, thing)
        if taken is None:
            continue
        moves = _moves(facts, facts[taken].person, taken)
        if moves:
            found.append((f"Where is the {thing}?", facts[moves[-1]].what, (taken, moves[-1])))
    return found


def _histories(facts: Sequence[Fact]) -> list[Asked]:
    """Where was the thing before a place? Its carrier took it, moved to the answer, then to that place."""
    found = []
    for thing in THINGS:
        taken = _holding(facts, thing)
        if taken is None:
            continue
        moves = _moves(facts, facts[taken].person, taken)
        if len(moves) < 2:
            continue
        before, now = moves[-2:]
        # The thing has come to the place that is named this once: otherwise "before" would have two answers.
        if facts[now].what not in _journey(facts, thing, now):
            asked = f"Where was the {thing} before the {facts[now].what}?"
            found.append((asked, facts[before].what, (taken, before, now)))
    return found


def _holding(facts: Sequence[Fact], thing: str) -> int | None:
    """Index of the fact since which someone holds the thing; None if it lies, or was never touched."""
    touched = [i for i, fact in enumerate(facts) if fact.what == thing]
    return touched[-1] if touched and facts[touched[-1]].action == "take" else None


def _moves(facts: Sequence[Fact], person: str, after: int) -> list[int]:
    return [i for i, f in enumerate(facts) if i > after and f.person == person and f.action == "move"]


def _journey(facts: Sequence[Fact], thing: str, until: int) -> set[str]:
    """The places where the thing is known to have been before fact `until`."""
    at: dict[str, str] = {}
    carrier, seen = None, set()
    for fact in facts[:until]:
        if fact.action == "move":
            at[fact.person] = fact.what
        elif fact.what == thing:
            carrier = fact.person if fact.action == "take" else None
            seen.add(at[fact.person])
        if carrier is not None:
            seen.add(at[carrier])
    return seen


def story(rng: random.Random, hops: int, answer: str) -> Story:
    """A world whose answer is the place `answer`. Places are renamed to make it so, which changes no odds."""
    low, high = FACTS[hops]
    for _ in range(ATTEMPTS):
        found = ask(simulate(rng, rng.randint(low, high)), hops, rng)
        if found is not None:
            others = [place for place in PLACES if place != answer]
            rng.shuffle(others)
            names = {found.answer: answer}
            names |= dict(zip([p for p in PLACES if p != found.answer], others, strict=True))
            return _renamed(found, names)
    raise AssertionError(f"no world with {hops} supporting facts in {ATTEMPTS} attempts")


def _renamed(found: Story, names: dict[str, str]) -> Story:
    facts = tuple(Fact(f.person, f.action, names.get(f.what, f.what)) for f in found.facts)
    question = re.sub(r"\w+", lambda m: names.get(m[0], m[0]), found.question)
    return Story(facts, question, names[found.answer], found.support)


@lru_cache(maxsize=4)
def background(haystack: Haystack | None, name: str) -> tuple[str, ...]:
    """Sentences of ten words or more that speak of nothing the task speaks of."""
    sentences = haystack.sentences if haystack is not None else []
    banned = re.compile(rf"\b({'|'.join((*PEOPLE, *PLACES, *THINGS))})s?\b", re.IGNORECASE)
    clean = tuple(s for s in sentences if len(s.split()) >= LEAST_WORDS and not banned.search(s))
    if not clean:
        raise DataError(
            f"{name}: the haystack has no sentence of {LEAST_WORDS} words or more; give another text"
        )
    return clean


@dataclass(frozen=True)
class Babi:
    """The question with `hops` supporting facts; at length 0 the facts stand alone."""

    hops: int

    @property
    def name(self) -> str:
        return f"qa{self.hops}"

    def __call__(self, ask: Ask) -> Question:
        """Sample `index` has the answer PLACES[index % 6]."""
        rng = ask.rng
        made = story(rng, self.hops, PLACES[ask.index % len(PLACES)])
        facts = [fact.say(rng.choice(VERBS[fact.action])) for fact in made.facts]
        slots = sorted(rng.random() for _ in facts)
        count = ask.counter(REPLY)
        shift = rng.random()
        if ask.length:
            text = _Background(background(ask.haystack, self.name), shift)
            body = ask.filled(
                lambda n: self._prompt(_mixed(text.first(n), facts, slots), made.question),
                count,
                TOKENS,
                name=self.name,
                how="grid",  # the last sentence is cut to the budget, whatever the fill
            )
        else:
            body = self._prompt(" ".join(facts), made.question)
        said = [fact.what for fact in made.facts if fact.action == "move"]
        tally = Tally(said)
        most = max(tally.values())
        return Question(
            count.ids(body),
            (made.answer,),
            count.depth(body, facts[made.support[0]]),
            choices=tuple(tuple(count.continuation(place)) for place in PLACES),
            right=PLACES.index(made.answer),
            asked=made.question,
            # Of several equally frequent places the one that was named last.
            guesses={LAST: said[-1], MOST: next(p for p in reversed(said) if tally[p] == most)},
        )

    def _prompt(self, context: str, question: str) -> str:
        shown = "\n\n".join(
            f"<example>\n{facts}\nQuestion: {asked}\nAnswer: {place}.\n</example>"
            for facts, asked, place in EXAMPLES[self.hops]
        )
        return (
            f"{INSTRUCTION[self.hops]}\n\n{shown}\n\n{FORM}\n\n<context>\n{context}\n</context>\n\n"
            f"Question: {question}\n{REPLY}"
        )


class _Background:
    """Sentences from the share `start` of a list on, going round; `first` cuts them to a number of characters."""

    def __init__(self, sentences: Sequence[str], start: float):
        self.sentences, self.start = sentences, int(start * len(sentences))
        self.taken: list[str] = []
        self.ends: list[int] = []

    def first(self, characters: int) -> list[str]:
        while not self.ends or self.ends[-1] < characters:
            self.taken.append(self.sentences[(self.start + len(self.taken)) % len(self.sentences)])
            self.ends.append((self.ends[-1] if self.ends else 0) + len(self.taken[-1]))
        out = []
        for sentence, end in zip(self.taken, self.ends, strict=True):
            left = characters - (end - len(sentence))
            if left <= 0:
                break
            out.append(sentence[:left])
        return out


def _mixed(sentences: list[str], facts: list[str], slots: list[float]) -> str:
    """The facts, in order, each before the sentence at its share of all."""
    out: list[str] = []
    done = 0
    for fact, slot in zip(facts, slots, strict=True):
        place = int(slot * (len(sentences) + 1))
        out += [*sentences[done:place], fact]
        done = place
    return " ".join(out + sentences[done:])
