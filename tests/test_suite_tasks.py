"""The suite's tasks: wordings, budgets, answers, depths and seeds, for more than one tokenizer."""

import json
import random
import re
import sys
from collections import Counter
from hashlib import sha256
from importlib.util import find_spec
from typing import get_args

import pytest
from test_tasks import byte_tokenizer
from transformers import AutoTokenizer

from linearize.measures import SuiteTask as SuiteNames
from linearize.modeling.errors import DataError
from linearize.tasks import ruler
from linearize.tasks.budget import Ask, Haystack, largest, noise
from linearize.tasks.recall import FILLER, generator
from linearize.tasks.suite import SUITE, questions, tokens_of
from linearize.tasks.words import ADJECTIVES, NOUNS, WORDS
from linearize.teacher import BUNDLED

FREE = [name for name in SUITE if not name.startswith("niah") and name not in ("vt", "cwe", "fwe")]
LINE = FILLER.strip()

# Templates of our own, with the places to fill that RULER's have: what is tested here is what is done with them.
NIAH = (
    "Some odd {type_needle_v} are below, and they are all odd.\n{context}\n"
    "Which are all the odd {type_needle_v} of {query}?"
)
TRACK = "Follow these.\n\n{context}\nAsked: which have the value {query}?"
TRACK_ANSWER = " Said: the {num_v} with {query} are: "
COUNTED = "Count these.\n{context}\nAsked: the ten?"
CODED = "Count those. {context}\nAsked: the three?"
ANSWER = " Said:"


def book(sentences: int = 1500) -> str:
    """Sentences of distinct invented words, so that any cut of them can be told from any other."""
    rng = random.Random(5)
    letters = "bcdfghlmnprstv"
    word = lambda: "".join(rng.choice(letters) + rng.choice("aeiou") for _ in range(3))  # noqa: E731
    made = [
        " ".join(word() for _ in range(rng.randrange(4, 15))).capitalize() + "." for _ in range(sentences)
    ]
    return "\n".join(made)


@pytest.fixture(scope="module")
def hay():
    return Haystack("an invented book", book())


@pytest.fixture(scope="module")
def bundled():
    return AutoTokenizer.from_pretrained(BUNDLED["books-5m"])


@pytest.fixture(scope="module", params=["bundled", "bytes"])
def tokenizer(request, bundled):
    return bundled if request.param == "bundled" else byte_tokenizer()


@pytest.fixture
def templates(tmp_path, monkeypatch):
    """A folder that is found as lm-eval, whose modules cannot be imported, and pins that fit it."""
    at = tmp_path / "lm_eval" / "tasks" / "ruler"
    at.mkdir(parents=True)
    (tmp_path / "lm_eval" / "__init__.py").write_text("raise RuntimeError('only read')\n")
    config = {
        "vt": {"variable_tracking": {"template": TRACK, "answer_prefix": TRACK_ANSWER}},
        "cwe": {"template": COUNTED, "answer_prefix": ANSWER},
        "fwe": {"template": CODED, "answer_prefix": ANSWER},
    }
    (at / "niah_utils.py").write_text(f"import nowhere\nTEMPLATE = {NIAH!r}\n")
    for name, fields in config.items():
        (at / f"{name}_utils.py").write_text(f"import nowhere\nCONFIG = {fields!r}\nTEMPLATE = CONFIG['x']\n")
    pins = {"niah": NIAH, "vt": TRACK + TRACK_ANSWER, "cwe": COUNTED + ANSWER, "fwe": CODED + ANSWER}
    monkeypatch.setattr(ruler, "PINS", {k: sha256(v.encode()).hexdigest()[:16] for k, v in pins.items()})
    monkeypatch.delitem(sys.modules, "lm_eval", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    ruler._read.cache_clear()
    yield at
    ruler._read.cache_clear()


def one(name, tokenizer, length, hay, *, depth=None, fill="grid", index=0):
    rng = generator(name, length, index, 42, depth)
    return SUITE[name].make(Ask(tokenizer, length, rng, depth, hay, fill, index))


def text_of(tokenizer, question):
    return tokenizer.decode(question.ids, skip_special_tokens=True)


def test_the_recipe_names_every_task_and_no_other():
    assert get_args(SuiteNames) == tuple(SUITE)


@pytest.mark.parametrize("fill", ["grid", "ruler"])
def test_prompts_and_answers_stay_within_the_length(tokenizer, hay, templates, fill):
    opens = tokenizer.bos_token_id != tokenizer.eos_token_id
    length = 6000 if opens else 2048
    skipped = ("1024", "256", "passkey_", "qa3", *(("qa", "niah_single_3") if fill == "ruler" else ()))
    for name, task in SUITE.items():
        if any(word in name for word in skipped) or (opens and fill == "ruler" and task.placed):
            continue
        asked = questions(task, tokenizer, length, samples=1, depths=[0.7], fill=fill, haystack=hay)
        assert len(asked) == 1
        for _, question in asked:
            room = tokens_of(task, question)
            assert room <= length, name
            assert fill == "ruler" or room > 0.95 * length, name
            if task.metric == "tokens" or name.startswith("qa"):
                assert room >= length - 2, name
            if opens:
                assert question.ids[0] == tokenizer.bos_token_id
                assert tokenizer.bos_token_id not in question.ids[1:]


def test_the_largest_fit_is_found_in_few_trials():
    rng = random.Random(0)
    for _ in range(200):
        costs = [rng.randrange(50)]
        while len(costs) < 400:
            costs.append(costs[-1] + rng.choice((0, 1, 1, 7)))
        room, most = rng.randrange(900), rng.choice((None, rng.randrange(400)))
        padded, tried = [*costs, *[10**6] * 100_000], []

        def cost(k, costs=padded, tried=tried):
            tried.append(k)
            return costs[k]

        found = largest(cost, room, most)
        fitting = [k for k, cost in enumerate(costs) if cost <= room and (most is None or k <= most)]
        assert found == (fitting[-1] if fitting else 0)
        assert len(tried) < 40


def test_a_question_depends_on_its_own_seed_and_on_nothing_else(bundled, hay, templates):
    for name in ("passkey", "kv_number", "qa2", "niah_multikey_1", "vt", "copying_natural_16"):
        kwargs = dict(depths=[0.3, 0.6], haystack=hay)
        first = questions(SUITE[name], bundled, 1024, samples=4, **kwargs)
        random.seed(0)
        one(name, bundled, 1200, hay)
        assert questions(SUITE[name], bundled, 1024, samples=2, **kwargs) == first[:2]
        assert questions(SUITE[name], bundled, 1024, samples=1, seed=43, **kwargs) != first[:2]
        assert len({tuple(question.ids) for _, question in first}) == 4


GOLDEN = {
    "passkey": "2ccb33b197c1471f",
    "passkey_legacy": "d0408d92649bc24f",
    "kv_number": "440b8f9e6debde23",
    "kv_uuid": "5b0c59be7b59667a",
    "copying_fresh_16": "4c7a34a8b2d584b0",
    "copying_fresh_64": "9cf9007a3033d66f",
    "copying_fresh_256": "83fd812e30374f43",
    "copying_natural_16": "65f25f62b9488fe1",
    "copying_natural_64": "c4af24a487765dd7",
    "copying_natural_256": "ce5f8600139818ec",
    "qa1": "eed586f9239e69c3",
    "qa2": "e771d5a229c7d94b",
    "qa3": "dc8be2c30cb34918",
}


# With RULER's own templates, as lm-eval 0.4.13 has them.
GOLDEN_RULER = {
    "niah_single_1": "1e3bcd1c85286b37",
    "niah_single_2": "621af4c1ddd8ae69",
    "niah_single_3": "5536119a77d39f4b",
    "niah_multikey_1": "582221c4297fd716",
    "niah_multikey_2": "6f4a4d84b8a77cde",
    "niah_multikey_3": "5644d3d11bc5382a",
    "niah_multivalue": "153054a907f5c412",
    "niah_multiquery": "a0f4d2900730c40c",
    "vt": "eb742790583f9013",
    "cwe": "db38fbaf95c33b0b",
    "fwe": "bdffb8cbe70c413e",
}
lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed: RULER's templates unread"
)


@pytest.mark.parametrize("name", [name for name in FREE if "1024" not in name])
def test_prompts_are_what_they_were(bundled, name):
    assert digest_of(name, bundled) == GOLDEN[name]


@lm_eval
@pytest.mark.parametrize("name", GOLDEN_RULER)
def test_prompts_of_ruler_are_what_they_were(bundled, name):
    assert digest_of(name, bundled) == GOLDEN_RULER[name]


def digest_of(name, bundled):
    hay = Haystack("an invented book", book(300))
    asked = questions(SUITE[name], bundled, 1300, samples=2, depths=[0.0, 0.5], haystack=hay, fill="ruler")
    told = json.dumps([[question.ids, question.references] for _, question in asked])
    return sha256(told.encode()).hexdigest()[:16]


# Needles


def test_a_needle_in_text_stands_before_the_sentence_of_its_depth(bundled, hay, templates):
    for depth in (0.0, 0.3, 1.0):
        question = one("niah_single_2", bundled, 1200, hay, depth=depth)
        head, context, rest = text_of(bundled, question).split("\n")
        assert head == "A odd number is below, and they is odd.".replace("are all", "is")
        key, value = re.search(r"One of the special magic numbers for (\S+) is: (\d{7})\.", context).groups()
        assert question.references == (value,)
        assert rest == (
            f"Which is the odd number of {key}? The special magic number for {key} mentioned in the provided text is"
        )
        assert bundled.decode(question.answer) == f" {value}"
        before, after = context.split(f"One of the special magic numbers for {key} is: {value}.")
        whole = " ".join((before.strip() + " " + after.strip()).split())
        assert " ".join(hay.text.split()).startswith(whole)
        count = len(hay.first(len(whole.split())))
        cut = not whole.endswith(".")  # the last sentence is cut to the budget
        assert before.count(".") + (cut and depth == 1) == int(count * depth + 1e-9)
        assert key.split("-")[0] in ADJECTIVES
        assert key.split("-")[1] in NOUNS
        needle = len(bundled.encode(f"{head}\n{before}", add_special_tokens=False))
        assert abs(question.depth - needle / len(question.ids)) < 0.01


def test_one_more_word_would_not_fit(bundled, hay, templates):
    question = one("niah_single_2", bundled, 1200, hay, depth=0.3)
    words = len(" ".join(text_of(bundled, question).split("\n")[1:2]).split()) - 10  # less the needle's
    longer = text_of(bundled, question).replace("\nWhich", " " + hay.text.split()[words] + "\nWhich")
    assert len(bundled.encode(longer)) + 128 > 1200


def test_several_needles(bundled, hay, templates):
    many = one("niah_multikey_1", bundled, 1200, hay, depth=1.0)
    text = text_of(bundled, many)
    needles = re.findall(r"for (\S+) is: (\d{7})\.", text)
    assert len(dict(needles)) == 4
    assert needles[-1][1] == many.references[0]
    assert text.endswith(f"for {needles[-1][0]} mentioned in the provided text is")

    values = one("niah_multivalue", bundled, 1200, hay)
    text = text_of(bundled, values)
    needles = re.findall(r"for (\S+) is: (\d{7})\.", text)
    assert len({key for key, _ in needles}) == 1
    assert {value for _, value in needles} == set(values.references)
    assert len(values.references) == 4
    assert text.startswith("Some odd numbers are below, and they are all odd.")
    assert values.answer is None

    asked = one("niah_multiquery", bundled, 1200, hay)
    text = text_of(bundled, asked)
    by_key = dict(re.findall(r"for (\S+) is: (\d{7})\.", text))
    keys = [key for value in asked.references for key in by_key if by_key[key] == value]
    listed = f"{keys[0]}, {keys[1]}, {keys[2]}, and {keys[3]}"
    assert text.endswith(f"The special magic numbers for {listed} mentioned in the provided text are")


def test_needles_among_needles_stand_one_per_line(bundled, templates):
    for name, key, value in (("niah_multikey_2", r"[a-z]+-[a-z]+", r"\d{7}"), ("niah_multikey_3", "U", "U")):
        uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
        key, value = key.replace("U", uuid), value.replace("U", uuid)
        question = one(name, bundled, 2048, None, depth=0.5)
        lines = text_of(bundled, question).split("\n")[1:-1]
        found = [
            re.fullmatch(rf"One of the special magic \w+ for ({key}) is: ({value})\.", line) for line in lines
        ]
        assert all(found)
        assert len({match[1] for match in found}) == len({match[2] for match in found}) == len(lines)
        at = [match[2] for match in found].index(question.references[0])
        assert at == (len(lines) - 1) // 2


def test_haystacks_that_give_needles_away_are_refused(bundled, templates):
    with pytest.raises(DataError, match="says 'special magic number' itself"):
        one("niah_single_2", bundled, 1024, Haystack("trap", book(50) + "A special magic number."), depth=0.0)
    with pytest.raises(DataError, match="none was given"):
        one("niah_single_2", bundled, 1024, None, depth=0.0)


def test_noise_is_a_haystack_too(bundled, templates):
    question = one("niah_single_2", bundled, 1024, noise(2000), depth=0.5)
    assert text_of(bundled, question).count(LINE) > 20


def test_a_length_too_short_names_one_that_fits(bundled, hay, templates):
    for name in ("passkey", "kv_number", "qa1", "niah_multikey_1", "vt", "cwe", "fwe", "copying_fresh_64"):
        with pytest.raises(DataError, match=r"give \d+ or more") as caught:
            one(name, bundled, 60, hay)
        least = int(str(caught.value).split("give ")[1].split()[0])
        assert least > 60


def test_too_little_text_is_said(bundled, templates):
    with pytest.raises(DataError, match="under 97 %"):
        questions(SUITE["niah_single_2"], bundled, 1024, samples=1, haystack=Haystack("short", book(20)))


# Templates


def test_without_lm_eval_or_with_another_a_task_is_not_made(bundled, templates, monkeypatch):
    monkeypatch.setitem(ruler.PINS, "niah", "0" * 16)
    ruler._read.cache_clear()
    with pytest.raises(ruler.TemplateMissing, match="another template"):
        one("niah_single_1", bundled, 1024, None, depth=0.0)
    (templates / "cwe_utils.py").unlink()
    with pytest.raises(ruler.TemplateMissing, match="no tasks/ruler/cwe_utils"):
        one("cwe", bundled, 1024, None)
    monkeypatch.setattr(ruler.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ruler.TemplateMissing, match="not installed; pip install 'linearize\\[eval\\]'"):
        one("vt", bundled, 1024, None)


@lm_eval
def test_the_pins_are_those_of_the_installed_lm_eval(bundled, hay):
    for name in ruler.PINS:
        template, _ = ruler.templates(name)
        assert "{context}" in template
    text = text_of(bundled, one("niah_single_2", bundled, 1024, hay, depth=0.5))
    assert text.startswith("A special magic number is hidden within the following text.")
    assert "wonderwords" not in sys.modules


# Tracking and counting


def test_variables_can_be_tracked(bundled, templates):
    question = one("vt", bundled, 1300, None)
    text = text_of(bundled, question)
    example, asked = text.split("\n\n\n\n")
    assert asked.startswith("Follow these.\n\n")
    assert asked.endswith("are:")
    value = re.search(r"have the value (\d{5})\?", asked)[1]
    for part, names, known in ((asked, "[A-Z]{5}", question.references), (example, "[A-Z]{3}", None)):
        set_to = dict(re.findall(rf"VAR ({names}) = (?:VAR )?(\w+)", part))
        reached = [name for name, source in set_to.items() if source.isdigit()]
        while (step := [n for n, source in set_to.items() if source == reached[-1]]) != []:
            reached += step
        assert len(reached) == 5
        if known:
            assert tuple(reached) == known
            assert set_to[reached[0]] == value
        else:
            assert example.endswith("are:  " + " ".join(reached))
    assert len(bundled.encode(example)) + 30 <= 500 + 4
    assert asked.count("The grass is green.") == asked.count("back again.\n")


def test_common_words_are_common(bundled, templates):
    for length, often, seldom, shown in ((1300, 6, 1, (20, 3, 1)), (4600, 30, 3, (40, 10, 3))):
        question = one("cwe", bundled, length, None)
        solved, asked = text_of(bundled, question).split("\nCount these.\n")
        for part, words, many, few in ((asked, None, often, seldom), (solved, shown[0], *shown[1:])):
            listed = re.findall(r"(\d+)\. ([a-z-]+)", part.split("\nAsked")[0])
            assert [int(i) for i, _ in listed] == list(range(1, len(listed) + 1))
            counts = Counter(word for _, word in listed)
            assert sorted(set(counts.values())) == [few, many]
            common = {word for word, count in counts.items() if count == many}
            assert len(common) == 10
            assert words is None or len(counts) == words
            if part is asked:
                assert common == set(question.references)
            else:
                assert solved.endswith(part.split(ANSWER)[1])
                assert set(re.findall(r"\d+\. ([a-z-]+)", part.split(ANSWER)[1])) == common
        assert asked.endswith(ANSWER)


def test_frequent_words_follow_the_law(bundled, templates):
    question = one("fwe", bundled, 1300, None)
    words = text_of(bundled, question).removeprefix("Count those. ").split("\n")[0].split()
    counts = Counter(words).most_common()
    assert counts[0][0] == "..."
    assert tuple(word for word, _ in counts[1:4]) == question.references
    assert counts[3][1] > counts[4][1]
    total = next(n for n in range(1, 3000) if int(n * 0.6079271) == counts[0][1])
    for rank, (_, count) in enumerate(counts[:6], 1):
        assert abs(count - total * 0.6079271 / rank**2) < 1.5
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in counts[1:])


SERIES = {
    "niah_multivalue": (" {}, {}, {}, and {}", lambda text, found: sorted(found, key=text.index)),
    "niah_multiquery": (" {}, {}, {}, and {}", lambda _, found: found),
    "vt": ("  {} {} {} {} {}", lambda _, found: found),
    "cwe": (
        " " + " ".join(f"{i}. {{}}" for i in range(1, 11)),
        lambda text, found: sorted(
            found, key=[w.strip(".") for w in text.split("\nCount these.")[1].split()].index
        ),
    ),
    "fwe": (" {}, {}, and {}", lambda _, found: found),
}


@pytest.mark.parametrize("name", SERIES)
def test_several_answers_are_forced_as_the_task_would_write_them(name, tokenizer, hay, templates):
    form, order = SERIES[name]
    question = one(name, tokenizer, 3000, hay)
    text = text_of(tokenizer, question)
    flat = [token for pair in question.series for ids in pair for token in ids]
    said = form.format(*order(text, question.references))
    assert tokenizer.decode(flat) == said
    assert tokenizer.encode(text + said, add_special_tokens=False)[-len(flat) :] == flat
    answers = [tokenizer.decode(ids).strip() for _, ids in question.series]
    assert sorted(answers) == sorted(question.references)
    assert question.answer is None


# Pass keys, tables, copies


@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_a_pass_key_stands_among_filler_lines(tokenizer, depth):
    length = 3100
    question = one("passkey", tokenizer, length, None, depth=depth)
    (value,) = question.references
    lines = text_of(tokenizer, question).split("\n")
    count = len(lines) - 3
    needle = f"The pass key is {value}. Remember it. {value} is the pass key."
    at = int(count * depth + 1e-9)
    assert lines[0] == "A pass key is hidden in the text below. Remember it; you will be asked for it."
    assert lines[1:-1] == [LINE] * at + [needle] + [LINE] * (count - at)
    assert lines[-1] == "What is the pass key? The pass key is"
    assert 10_000 <= int(value) <= 99_999
    line = len(tokenizer.encode("a\n" + LINE, add_special_tokens=False))
    assert length - line < len(question.ids) + 10 <= length


@pytest.mark.parametrize(("name", "fill"), [("kv_number", "grid"), ("kv_uuid", "ruler")])
def test_a_table_holds_what_is_asked(bundled, name, fill):
    for depth in (0.0, 0.5, 1.0):
        question = one(name, bundled, 2048, None, depth=depth, fill=fill)
        _, table, _, asked = text_of(bundled, question).split("\n\n")
        rows = [line.split(": ") for line in table.split("\n")]
        *solved, last = asked.split("\n")
        key = last.removesuffix(":")
        assert dict(rows)[key] == question.references[0]
        assert [row[0] for row in rows].index(key) == round(depth * (len(rows) - 1))
        assert len({row[0] for row in rows}) == len({row[1] for row in rows}) == len(rows)
        assert len(solved) == 3
        assert all(line.split(": ") in rows and not line.startswith(key) for line in solved)
        assert fill == "grid" or len(rows) in (16, 32, 64)


def test_copies_are_continued(tokenizer, hay):
    for name in ("copying_fresh_64", "copying_natural_64"):
        alone, far = (one(name, tokenizer, length, hay) for length in (0, 777))
        start = len(far.ids) + len(far.answer) - 777 + (tokenizer.bos_token_id != tokenizer.eos_token_id)
        for question in (alone, far):
            block = question.ids[start : start + 64]
            assert question.ids[-8:] == block[:8]
            assert question.answer == block[8:]
        assert len(far.ids) + len(far.answer) == 777
        assert LINE in tokenizer.decode(far.ids)
        assert LINE not in tokenizer.decode(alone.ids)


def test_sentences_keep_their_quotes():
    said = Haystack("x", 'He said "No." Then he went. "Why?" she asked.  Mr. 5 left!')
    assert said.sentences == ['He said "No."', "Then he went.", '"Why?" she asked.', "Mr.", "5 left!"]
    assert said.first(4) == ['He said "No."', "Then"]
    assert said.words == 12


def test_the_word_lists_do_not_overlap():
    assert set(ADJECTIVES) | set(NOUNS) == set(WORDS)
    assert not set(ADJECTIVES) & set(NOUNS)
