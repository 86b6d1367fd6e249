"""Files as people have them, tokenizers that open texts, and what training and evaluation must not share."""

import json
import random

import numpy as np
import pytest
from safetensors import SafetensorError
from test_data import counted, data, text, words, write
from test_data import tokenizer as word_tokenizer  # noqa: F401  (a fixture)
from test_tasks import byte_tokenizer, space_opening_tokenizer

from linearize import recipe
from linearize.data import build, load_pool, pool
from linearize.data.sampling import sample_pool
from linearize.data.sources import chat_pool, text_pool, texts
from linearize.evaluate.recall import prompts
from linearize.modeling.errors import DataError
from linearize.tasks import training_row
from linearize.teacher import load_teacher


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("lines.txt", b"one\r\ntwo", ["one\ntwo"]),
        ("marked.txt", b"\xef\xbb\xbfone", ["one"]),
        ("CAPITALS.TXT", b"one", ["one"]),
        ("windows.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}\r\n', ["one", "two"]),
        ("separators.jsonl", '{"text": "a\u2028b\x85c"}\n'.encode(), ["a\u2028b\x85c"]),
        ("half.jsonl", b'{"text": "a \\ud83d b"}', ["a ? b"]),
        ("null.jsonl", b'{"text": null}\n{"text": ""}\n{"text": "a"}', ["", "", "a"]),
    ],
)
def test_files_of_every_editor_are_read(tmp_path, name, content, documents):
    (tmp_path / name).write_bytes(content)
    assert list(texts(str(tmp_path / name), "text", "<|endoftext|>")) == documents


def test_a_tokenizer_that_opens_texts_opens_every_document():
    tokenizer = byte_tokenizer()
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    made = text_pool(["one", "", "two " * 60_000], tokenizer)
    assert (made.tokens[made.starts[:-1]] == start).all()
    assert (made.tokens[made.starts[1:] - 1] == end).all()
    assert (made.tokens == start).sum() == 2
    row = np.array(training_row(tokenizer, 9000, random.Random(0), None, ["passkey", "numbers"]))
    after = np.flatnonzero(row[:-1] == end) + 1
    assert row[0] == start
    assert len(after) > 1
    assert set(row[after]) <= {start, end}  # what is too short for a document is filled with ends


def test_a_haystack_holds_no_opening_token(tmp_path):
    tokenizer = byte_tokenizer()
    path = tmp_path / "short.txt"
    path.write_text("<|endoftext|>".join(["A man and a dog. "] * 400))
    corpus = build(data(text(path), recipe.RecallSource(weight=9, haystack="text"), seq_len=1200), tokenizer)
    (asked,) = prompts(
        tokenizer, "number_in_text", 1200, samples=1, seed=0, haystack_tokens=corpus.held_out_tokens
    )
    assert asked.ids.count(tokenizer.bos_token_id) == 1
    inputs = corpus.batch(0, batch_size=10, stage="x")["input_ids"]
    begins = inputs == tokenizer.bos_token_id
    recall = begins.sum(1) < 10  # rows of text have one every 18 tokens
    assert recall.sum() >= 8
    ends = inputs[recall, :-1] == tokenizer.eos_token_id
    assert (ends | ~begins[recall, 1:]).all()


def test_a_response_has_the_tokens_that_it_has_behind_its_prompt():
    tokenizer = space_opening_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[a]{% endif %}"
    )
    made = chat_pool([("Hi", "Hello")], tokenizer, "here")
    assert made.tokens.tolist() == tokenizer.encode("[u]Hi[a]Hello")
    assert tokenizer.decode(made.tokens[made.learnt].tolist()) == "Hello"


def test_drawn_prompts_of_samples_are_not_learnt():
    teacher, tokenizer = load_teacher(recipe.Teacher())
    made = sample_pool(teacher, tokenizer, tokens=24, row_len=12, prompt_len=5)
    assert made.learnt.reshape(2, 12).tolist() == [[False] * 5 + [True] * 7] * 2
    assert sample_pool(teacher, tokenizer, tokens=12, row_len=12).learnt is None


def test_text_to_measure_on_is_not_trained_on(tmp_path, word_tokenizer):  # noqa: F811
    book = write(tmp_path / "book.txt", counted([300, 200]))
    copy = tmp_path / "folder" / "copy.txt"
    copy.parent.mkdir()
    copy.write_text((tmp_path / "book.txt").read_text())
    for held in (book, copy.parent):
        with pytest.raises(DataError, match=r"data.held_out: .* is trained on too"):
            build(data(text(book), held_out=[text(held)]), word_tokenizer)
    one = recipe.HubSource(dataset="some/text")
    with pytest.raises(DataError, match=r"data.held_out: some/text is trained on too"):
        build(data(one, held_out=[one]), word_tokenizer)


def test_a_disk_that_fills_while_tokens_are_kept_is_one_line(tmp_path, word_tokenizer, monkeypatch):  # noqa: F811
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": words(range(1, 99))}))

    def full(*_):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(pool, "save_file", full)
    with pytest.raises(DataError, match=r"cannot be written .*No space left"):
        load_pool(text(path), word_tokenizer, folder=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
