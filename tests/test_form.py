"""The recall suite in a chat template: the same words as in plain text, one turn of a user, a reply that has begun."""

import pytest
from test_suite_tasks import bundled, hay, templates  # noqa: F401  (fixtures)

from linearize.evaluate.suite import check, form_of
from linearize.measures import Suite
from linearize.modeling.errors import DataError, EvaluationError
from linearize.tasks.form import Counter, chat, plain
from linearize.tasks.suite import SUITE, questions, tokens_of

TEMPLATE = (
    "<|start|>system\nYou help.\n"
    "{% for turn in messages %}<|start|>{{ turn.role }}\n{{ turn.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
HEAD, TAIL = "<|start|>system\nYou help.\n<|start|>user\n", "<|end|>\n<|start|>assistant\n"
REPLIES = {
    "niah_multivalue": "The special magic numbers for ",
    "niah_single_1": "The special magic number for ",
    "passkey": "The pass key is",
    "vt": "Said: the 5 with ",
    "cwe": "Said:",
    "fwe": "Said:",
    "qa2": "Answer:",
}


@pytest.fixture
def talker(bundled):  # noqa: F811
    """The bundled tokenizer with a template."""
    bundled.chat_template = TEMPLATE
    yield bundled
    bundled.chat_template = None


@pytest.mark.parametrize("name", [*REPLIES, "kv_number", "copying_natural_16"])
def test_a_chat_asks_what_plain_text_asks(talker, hay, templates, name):  # noqa: F811
    """The same draws: what differs is the room that the template takes, and so how much haystack there is."""
    length, how = 1300, dict(samples=1, depths=[0.5], haystack=hay, fill="ruler")
    ((_, asked),) = questions(SUITE[name], talker, length, form=chat(talker), **how)
    ((_, bare),) = questions(SUITE[name], talker, length, **how)
    text = talker.decode(asked.ids)
    assert text.startswith(HEAD) and text.count(TAIL) == 1 and tokens_of(SUITE[name], asked) <= length
    question, reply = text.removeprefix(HEAD).split(TAIL)
    plain_text = talker.decode(bare.ids)
    if name.startswith("copying"):
        assert reply == talker.decode(bare.ids[-8:]) and question.strip()
        assert asked.answer == bare.answer
        return
    assert plain_text.endswith(reply) and reply.startswith(REPLIES.get(name, reply))
    assert name != "kv_number" or reply.count(":") == 1
    rest = plain_text.removesuffix(reply).rstrip()
    ends = 12 if name in ("cwe", "fwe") else 60  # words are counted out and shuffled between them
    assert question[:ends] == rest[:ends] and question[-ends:] == rest[-ends:]
    assert (asked.references, asked.answer, asked.choices) == (bare.references, bare.answer, bare.choices)


def test_a_chat_fills_its_length_with_the_template_counted(talker, hay):  # noqa: F811
    for name in ("passkey", "qa1", "copying_fresh_64"):
        task = SUITE[name]
        ((_, asked),) = questions(
            task, talker, 1024, samples=1, depths=[1.0], haystack=hay, form=chat(talker)
        )
        assert 0.97 * 1024 < tokens_of(task, asked) <= 1024
    count, needle = Counter(talker, chat(talker), "so:"), "needle"
    at = count.depth(f"one two {needle} three so:", needle)
    before = talker.encode(f"{HEAD}one two ", add_special_tokens=False)
    assert at == len(before) / count(f"one two {needle} three so:")


def test_a_tokenizer_that_cannot_chat_is_one_line(talker, hay):  # noqa: F811
    for template, told in (
        (None, "has no chat template"),
        ("{{ nothing.at.all }}", "cannot be used"),
        ("Hello", "does not show a user's turn once"),
        ("{{ messages[0].content }}", "does not show a user's turn once"),
    ):
        talker.chat_template = template
        with pytest.raises(DataError, match=told):
            chat(talker)
        with pytest.raises(EvaluationError, match=rf"^evaluate\.suite\.chat: .*{told}") as caught:
            check(talker, Suite(preset="smoke", tasks=["passkey"], chat=True), hay, 1024)
        assert "\n" not in str(caught.value)
    assert form_of(Suite(), talker) is None


def test_plain_text_is_what_it_was(bundled):  # noqa: F811
    assert Counter(bundled, plain(bundled), "b").ids("a b") == bundled.encode("a b")
