"""Simulated bAbI, verified by a second simulation that shares no code."""

import random
import re
from collections import Counter

import pytest
from test_suite_tasks import book, bundled, hay, one, text_of  # noqa: F401  (two are fixtures)

from linearize.modeling.errors import DataError
from linearize.tasks import babi
from linearize.tasks.budget import Haystack


def places_of(lines):
    """Where everyone and everything has been, from the sentences alone: name -> places in order."""
    been, holder, holds = {}, {}, {}
    for line in lines:
        who, rest = line.removesuffix(".").split(" ", 1)
        verb, what = rest.rsplit(" the ", 1)
        if what in babi.PLACES:
            assert verb in babi.VERBS["move"]
            assert been.get(who, [None])[-1] != what
            been.setdefault(who, []).append(what)
            for thing in holds.get(who, ()):
                been[thing].append(what)
        elif verb in babi.VERBS["take"]:
            assert what not in holder
            here = been[who][-1]
            assert been.get(what, [here])[-1] == here
            been.setdefault(what, [here])
            holder[what] = who
            holds.setdefault(who, []).append(what)
        else:
            assert verb in babi.VERBS["drop"]
            assert holder.pop(what) == who
            holds[who].remove(what)
    return been


def facts_of(text):
    context = text.split("<context>\n")[1].split("\n</context>")[0]
    people = "|".join(babi.PEOPLE)
    return re.findall(rf"(?:{people}) [a-z ]+ the [a-z]+\.", context)


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_a_second_simulation_finds_the_answer(bundled, hay, hops):  # noqa: F811
    answers = Counter()
    for index in range(48):
        length = 0 if index else 900
        question = one(f"qa{hops}", bundled, length, hay, index=index)
        text = text_of(bundled, question)
        lines = facts_of(text)
        assert 2 <= len(lines) <= (10 if hops == 1 else 30)
        been = places_of(lines)
        asked = text.split("Question: ")[-1].split("\n")[0]
        words = asked.removesuffix("?").split()
        if hops < 3:
            expected = been[words[-1]][-1]
        else:
            thing, place = words[3], words[-1]
            assert been[thing].count(place) == 1
            expected = been[thing][been[thing].index(place) - 1]
        (reference,) = question.references
        assert reference == expected == babi.PLACES[index % 6]
        assert bundled.decode(list(question.choices[question.right])) == f" {expected}"
        said = [line.split(" the ")[1][:-1] for line in lines if line.split(" the ")[1][:-1] in babi.PLACES]
        assert question.guesses[babi.LAST] == said[-1]
        assert said.count(question.guesses[babi.MOST]) == max(Counter(said).values())
        answers[expected] += 1
    assert set(answers.values()) == {8}


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_exactly_the_supporting_facts_are_needed(hops):
    """A question is not answered, or otherwise, when any of its supports is taken away."""
    for seed in range(30):
        made = babi.story(random.Random(seed), hops, "garden")
        assert len(set(made.support)) == hops
        assert list(made.support) == sorted(made.support)
        kinds = [made.facts[i].action for i in made.support]
        assert kinds == {1: ["move"], 2: ["take", "move"], 3: ["take", "move", "move"]}[hops]
        people = {made.facts[i].person for i in made.support}
        assert len(people) == 1
        last = made.support[-1]
        mover = people.pop()
        assert not any(f.person == mover and f.action == "move" for f in made.facts[last + 1 :])


def test_the_background_says_nothing_of_the_task(hay):  # noqa: F811
    said = Haystack(
        "x", book(30) + "\nThen old Mary went into her kitchen to see what all the others did there."
    )
    assert babi.background(said, "qa1") == babi.background(Haystack("x", book(30)), "qa1")
    assert all(len(sentence.split()) >= 10 for sentence in babi.background(hay, "qa1"))
    with pytest.raises(DataError, match="no sentence of 10 words"):
        babi.background(Haystack("x", "Too short."), "qa1")
