"""Recall documents: exact lengths, nothing random but the seed, and wordings that a teacher knows."""

import random
import re
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from linearize.modeling.errors import DataError
from linearize.tasks import TASKS, from_tokens, generator, training_row
from linearize.tasks.recall import KINDS, piece, separator, shortest_row
from linearize.tasks.words import WORDS
from linearize.teacher import BUNDLED, load_teacher

BOOK = "It was a dark night, and the old man sat by the fire with his dog. " * 100


def byte_tokenizer():
    """Every byte a token; a begin-of-sequence token opens each text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def space_opening_tokenizer():
    """A Metaspace tokenizer that opens every string with a space of its own, and has no end token."""
    characters = sorted({"▁", "\n", *map(chr, range(33, 127))})
    backend = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(characters)}, []))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


TOKENIZERS = {
    "bundled": lambda: AutoTokenizer.from_pretrained(BUNDLED["books-5m"]),
    "bytes": byte_tokenizer,
    "metaspace": space_opening_tokenizer,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@lru_cache
def book(tokenizer):
    return piece(tokenizer, BOOK)


def haystack_of(tokenizer, rng):
    return from_tokens(book(tokenizer), rng)


def sample(tokenizer, task, length, index=0, seed=42, depth=None):
    length += 200 * (task.needles - 1)  # of bytes, a needle has some 80
    rng = generator(task.name, length, index, seed, depth)
    return task.make(tokenizer, length, rng, haystack_of(tokenizer, rng), depth=depth)


@pytest.mark.parametrize("length", [700, 701, 1023])
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_prompt_and_answer_fill_the_length_to_the_token(tokenizer, task, length):
    for index in range(3):
        prompt = sample(tokenizer, task, length, index)
        assert len(prompt.ids) + len(prompt.answer) == length + 200 * (task.needles - 1)
        assert 0 <= prompt.depth < 1


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_answer_is_what_follows_and_stands_in_the_prompt(tokenizer, task):
    prompt = sample(tokenizer, task, 700)
    answer = tokenizer.decode(prompt.answer).strip()
    text = tokenizer.decode(prompt.ids)
    assert len(answer) == {"passkey": 5, "number": 7, "uuid": 36}[task.value]
    assert text.endswith(" is")
    assert text.count(answer) == (2 if task.needle == "passkey" else 1)
    assert tokenizer.decode(prompt.ids + prompt.answer).endswith(f" is {answer}")
    if task.needle == "magic":
        values = re.findall(r"special magic numbers for [\w-]+ is: ([\w-]+)\.", text)
        assert len(set(values)) == len(values) == task.needles
        key = re.search(r"for ([\w-]+) mentioned", text)[1]
        assert f"numbers for {key} is: {answer}." in text
        begin = text.index(f" One of the special magic numbers for {key} is")
        assert len(piece(tokenizer, text[:begin])) / len(prompt.ids) == pytest.approx(prompt.depth, abs=0.02)


def test_a_tokenizer_that_opens_with_special_tokens_opens_the_prompt_with_them():
    tokenizer = byte_tokenizer()
    ids = sample(tokenizer, TASKS["passkey"], 700).ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in ids[1:]


def test_pieces_join_to_the_tokens_of_the_whole_text(tokenizer):
    parts = ["The number is", " 1234567.", "\n What is it?", " Yes."]
    joined = [token for part in parts for token in piece(tokenizer, part)]
    assert joined == tokenizer.encode("".join(parts), add_special_tokens=False)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_sample_depends_on_its_own_seed_and_on_nothing_else(tokenizer, task):
    alone = sample(tokenizer, task, 800, index=3)
    random.seed(1)
    for length in (700, 900):
        sample(tokenizer, task, length, index=3)
    assert sample(tokenizer, task, 800, index=3) == alone
    assert sample(tokenizer, task, 800, index=4) != alone
    assert sample(tokenizer, task, 800, index=3, seed=43) != alone


def test_depth_places_the_needle(tokenizer):
    depths = [sample(tokenizer, TASKS["passkey"], 1500, depth=d).depth for d in (0.0, 0.5, 1.0)]
    assert depths == sorted(depths)
    assert depths[0] < 0.15
    assert depths[2] > 0.8


def test_a_haystack_with_needles_of_its_own_is_not_used(tokenizer):
    trap = piece(
        tokenizer, BOOK[:1500] + " One of the special magic numbers for trap is: 7654321." + BOOK[:1500]
    )
    rng = random.Random(0)
    prompt = TASKS["number_in_text"].make(tokenizer, 1200, rng, from_tokens(trap, rng))
    assert "trap" not in tokenizer.decode(prompt.ids)


def test_a_length_too_short_for_the_needle_names_one_that_fits(tokenizer):
    task = TASKS["uuid_in_text"]
    with pytest.raises(DataError, match=r"ask for \d+ or more") as caught:
        sample(tokenizer, task, 30)
    least = int(str(caught.value).split("ask for ")[1].split()[0])
    prompt = task.make(tokenizer, least, generator(task.name, 30, 0, 42), lambda n: [0] * n)
    assert len(prompt.ids) + len(prompt.answer) == least


def test_text_tasks_ask_for_text(tokenizer):
    with pytest.raises(DataError, match="give haystack tokens"):
        TASKS["number_in_text"].make(tokenizer, 700, random.Random(0))


@pytest.mark.parametrize("mix", ["noise", "text", "mixed"])
@pytest.mark.parametrize(
    "kinds", [["passkey"], ["numbers"], ["table"], list(KINDS)], ids=lambda kinds: "+".join(kinds)
)
def test_training_rows_have_exactly_the_length_asked_for(tokenizer, kinds, mix):
    shortest = shortest_row(tokenizer, kinds)
    for length in (shortest, shortest + 1, 1025):
        for seed in range(4):
            rng = random.Random(seed)
            row = training_row(tokenizer, length, rng, haystack_of(tokenizer, rng), kinds, mix)
            assert len(row) == length
            rng = random.Random(seed)
            assert row == training_row(tokenizer, length, rng, haystack_of(tokenizer, rng), kinds, mix)
            assert row[-len(separator(tokenizer)) :] == separator(tokenizer)


def test_what_a_training_row_asks_it_has_said(tokenizer):
    for seed in range(20):
        rng = random.Random(seed)
        row = training_row(tokenizer, 1500, rng, haystack_of(tokenizer, rng), ["numbers"])
        asked = tokenizer.decode(row).split("mentioned in the provided text is ")[1:]
        for value in (rest.split(".")[0] for rest in asked):
            assert f"is: {value}." in tokenizer.decode(row)


def test_a_row_too_short_for_any_document_names_one_that_fits(tokenizer):
    with pytest.raises(DataError, match=r"too few for recall documents; use \d+ or more"):
        training_row(tokenizer, 12, random.Random(0), None)


def test_words_are_plain_sorted_and_distinct():
    assert list(WORDS) == sorted(set(WORDS))
    assert all(word.isascii() and word.islower() and 4 <= len(word) <= 9 for word in WORDS)


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(
        SimpleNamespace(
            name="books-5m", revision=None, dtype="auto", trust_remote_code=False, allow_pickle=False
        )
    )


@pytest.mark.parametrize("name", ["passkey", "number_in_noise"])
def test_the_bundled_teacher_knows_the_wording(teacher, name):
    model, tokenizer = teacher
    prompts = [sample(tokenizer, TASKS[name], 300, index) for index in range(8)]
    batch = torch.tensor([prompt.ids + prompt.answer for prompt in prompts])
    with torch.no_grad():
        guesses = model(batch).logits.argmax(-1)
    right = sum(guesses[i, -len(p.answer) - 1 : -1].tolist() == p.answer for i, p in enumerate(prompts))
    assert right >= 6
