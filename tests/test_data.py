"""Batches: pure functions of their index; nothing held out is trained on; borders, masks, caches and errors."""

import gzip
import json
import lzma
from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tasks import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import linearize.data.assemble as assemble
from linearize import recipe
from linearize.data import Pool, build, load_pool
from linearize.data.corpus import pack
from linearize.data.sampling import sample_pool
from linearize.data.sources import Turn, pairs, text_pool
from linearize.modeling.errors import DataError
from linearize.tasks import TASKS, from_tokens, generator
from linearize.teacher import load_teacher

END = 0
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """One token per number word: w1 is 1, w2 is 2, ...; 0 ends a document."""
    vocab = {
        "</s>": END,
        **{f"w{i}": i for i in range(1, 5000)},
        "<user>": 5000,
        "<assistant>": 5001,
        "<unk>": 5002,
    }
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def teacher():
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=5100, max_position_embeddings=64, bos_token_id=END, eos_token_id=END,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def words(numbers):
    return " ".join(f"w{n}" for n in numbers)


def write(path, documents):
    """Documents of word numbers, in a .txt file."""
    path.write_text("<|endoftext|>".join(words(document) for document in documents))
    return str(path)


def counted(sizes, first=1):
    """Documents of the given sizes in which every word is another one."""
    out = []
    for size in sizes:
        out.append(list(range(first, first + size)))
        first += size
    return out


def data(*sources, **fields):
    return recipe.Data(sources=list(sources), **({"seq_len": 32} | fields))


def text(path, **fields):
    return recipe.TextSource(path=str(path), **fields)


@pytest.fixture
def book(tmp_path):
    return write(tmp_path / "book.txt", counted([40, 7, 300, 80, 25, 3, 500, 60, 90, 20]))


@pytest.mark.parametrize("packing", ["cross", "separate"])
def test_a_batch_is_a_pure_function_of_seed_stage_and_index(book, tokenizer, packing):
    spec = data(text(book), packing=packing)
    one, two = (build(spec, tokenizer, seed=5) for _ in range(2))
    later = [one.batch(i, batch_size=3, stage="transfer") for i in (7, 0, 3)]
    for i, batch in zip((7, 0, 3), later, strict=True):
        again = two.batch(i, batch_size=3, stage="transfer")
        assert all(torch.equal(batch[name], again[name]) for name in again)
        assert batch["input_ids"].shape == batch["labels"].shape == (3, 32)
    other = build(spec, tokenizer, seed=6)
    for corpus, stage in ((other, "transfer"), (two, "finetune")):
        assert not torch.equal(corpus.batch(7, batch_size=3, stage=stage)["input_ids"], later[0]["input_ids"])
    assert one.fingerprint == two.fingerprint != other.fingerprint


def test_a_larger_batch_holds_the_same_rows(book, tokenizer):
    corpus = build(data(text(book)), tokenizer)
    rows = torch.cat([corpus.batch(i, batch_size=2, stage="x")["input_ids"] for i in range(4)])
    assert torch.equal(rows, corpus.batch(0, batch_size=8, stage="x")["input_ids"])


def test_labels_are_the_next_tokens_of_a_window(book, tokenizer):
    batch = build(data(text(book)), tokenizer).batch(0, batch_size=8, stage="x")
    assert torch.equal(batch["labels"][:, :-1], batch["input_ids"][:, 1:])
    assert "position_ids" not in batch


def test_one_epoch_of_windows_gives_every_token_once(book, tokenizer):
    corpus = build(data(text(book)), tokenizer)
    pool = corpus.parts[0].train
    rows = (len(pool) - 1) // 32
    for epoch in range(3):
        seen = Counter(
            token
            for i in range(rows)
            for token in corpus.batch(epoch * rows + i, batch_size=1, stage="x")["input_ids"]
            .flatten()
            .tolist()
        )
        del seen[END]
        assert set(seen.values()) == {1}
        assert sum(seen.values()) > 0.9 * len(pool)


def test_one_epoch_of_packed_rows_predicts_every_token_of_every_document_once(book, tokenizer):
    corpus = build(data(text(book), packing="separate"), tokenizer)
    pool = corpus.parts[0].train
    rows = len(pack(pool, 33))
    seen = Counter()
    for i in range(rows):
        seen.update(corpus.batch(i, batch_size=1, stage="x")["labels"].flatten().tolist())
    del seen[-100]
    ends = seen.pop(END)
    assert set(seen.values()) == {1}
    assert ends == (pool.tokens == END).sum()
    assert len(seen) == len(pool) - ends - (len(pool.starts) - 1)  # all but the first word of each document


def test_packing_starts_positions_again_and_predicts_nothing_across_a_border(book, tokenizer):
    corpus = build(data(text(book), packing="separate"), tokenizer)
    follows = {
        a: b for document in counted([40, 7, 300, 80, 25, 3, 500, 60, 90, 20]) for a, b in pairwise(document)
    }
    restarts = 0
    for i in range(10):
        batch = corpus.batch(i, batch_size=4, stage="x")
        for row in zip(
            *(batch[name].tolist() for name in ("input_ids", "labels", "position_ids")), strict=True
        ):
            ids, labels, positions = row
            assert positions[0] == 0
            for t in range(32):
                if labels[t] not in (-100, END):
                    assert follows[ids[t]] == labels[t]
                if t and positions[t] == 0:
                    assert labels[t - 1] == -100
                    restarts += 1
                elif t:
                    assert positions[t] == positions[t - 1] + 1
    assert restarts > 10


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 70), min_size=1, max_size=30), room=st.integers(2, 33))
def test_packed_rows_fit_and_lose_only_lone_tokens(sizes, room):
    pool = Pool.join(counted(sizes))
    rows = pack(pool, room)
    borders = set(pool.starts.tolist())
    predicted = Counter()
    for row in rows:
        assert sum(b - a for a, b in row) <= room
        for a, b in row:
            assert not borders & set(range(a + 1, b))
            predicted.update(range(a + 1, b))
    assert set(predicted) == set(range(len(pool))) - borders
    assert set(predicted.values()) <= {1}


def test_weights_are_honoured(tmp_path, tokenizer):
    low = write(tmp_path / "low.txt", [range(1, 1000)])
    high = write(tmp_path / "high.txt", [range(2000, 3000)])
    corpus = build(data(text(low, weight=3), text(high, weight=1)), tokenizer)
    rows = corpus.batch(0, batch_size=1000, stage="x")["input_ids"]
    assert (rows.max(-1).values >= 2000).sum() == 250
    some = (rows[:100].max(-1).values >= 2000).sum()
    assert 10 <= some <= 40


@pytest.mark.parametrize("packing", ["cross", "separate"])
@pytest.mark.parametrize("sizes", [[40, 7, 300, 80, 25, 3, 500, 60, 90, 20], [1200], [50] * 30, [900, 300]])
def test_nothing_held_out_is_trained_on(tmp_path, tokenizer, packing, sizes):
    corpus = build(data(text(write(tmp_path / "b.txt", counted(sizes))), packing=packing), tokenizer)
    held = set(corpus.held_out_tokens.tolist()) - {END}
    trained = set()
    for i in range(60):
        trained |= set(corpus.batch(i, batch_size=4, stage="x")["input_ids"].flatten().tolist())
    assert held
    assert not held & trained
    assert 0.05 * sum(sizes) < len(held) < 0.3 * sum(sizes)


def test_held_out_windows_do_not_overlap_and_may_be_fewer(book, tokenizer):
    corpus = build(data(text(book)), tokenizer)
    windows = corpus.held_out(10, 100)
    assert windows.shape == (len(corpus.held_out_tokens) // 11, 11)
    assert torch.equal(windows.flatten(), corpus.held_out_tokens[: windows.numel()])
    assert torch.equal(corpus.held_out(10, 3), windows[:3])
    assert corpus.label == "held-out part of book.txt"
    with pytest.raises(DataError, match=r"fewer than one sequence of 4000 \+ 1"):
        corpus.held_out(4000, 2)


def test_a_text_named_for_evaluation_leaves_the_sources_whole(book, tmp_path, tokenizer):
    other = write(tmp_path / "other.txt", [range(3000, 3200)])
    corpus = build(data(text(book), held_out=[text(other)]), tokenizer)
    assert len(corpus.parts[0].train) == sum([40, 7, 300, 80, 25, 3, 500, 60, 90, 20]) + 10
    assert corpus.held_out_tokens.min() == END
    assert corpus.held_out_tokens[:200].tolist() == list(range(3000, 3200))
    assert corpus.label == "other.txt"


def test_two_held_out_texts_share_the_windows_by_weight(tmp_path, tokenizer):
    low = text(write(tmp_path / "low.txt", [range(1, 1000)]), weight=3)
    high = text(write(tmp_path / "high.txt", [range(2000, 3000)]), weight=1)
    other = text(write(tmp_path / "other.txt", [range(3000, 3100)]))
    windows = build(data(other, held_out=[low, high]), tokenizer).held_out(10, 40)
    assert len(windows) == 40
    assert (windows.max(-1).values >= 2000).sum() == 10


# ------------------------------------------------------------------------------------------------ recall rows


@pytest.mark.parametrize("packing", ["cross", "separate"])
def test_recall_rows_hide_needles_in_text_of_the_other_sources(tmp_path, packing):
    tokenizer = byte_tokenizer()
    path = tmp_path / "dull.txt"
    path.write_text("<|endoftext|>".join(["Zz zz zzz. " * 30] * 40))
    sources = text(path), recipe.RecallSource(weight=1.0, haystack="text", kinds=["numbers"])
    corpus = build(data(*sources, seq_len=1200, packing=packing), tokenizer)
    batch = corpus.batch(0, batch_size=8, stage="x")
    texts = [tokenizer.decode(row) for row in batch["input_ids"]]
    recalls = [i for i, row in enumerate(texts) if "special magic number" in row]
    assert len(recalls) in range(1, 8)
    for i in recalls:
        assert "Zz zz" in texts[i]
        assert "green" not in texts[i]
        if packing == "separate":
            ends = (batch["input_ids"][i] == tokenizer.eos_token_id).nonzero().flatten()
            assert all(batch["position_ids"][i][end + 1] == 0 for end in ends if end < 1199)
    again = build(data(*sources, seq_len=1200, packing=packing), tokenizer).batch(0, batch_size=8, stage="x")
    assert torch.equal(batch["input_ids"], again["input_ids"])


def test_recall_alone_trains_but_leaves_nothing_to_measure_on():
    tokenizer = byte_tokenizer()
    corpus = build(data(recipe.RecallSource(), seq_len=1200), tokenizer)
    assert corpus.batch(0, batch_size=2, stage="x")["input_ids"].shape == (2, 1200)
    with pytest.raises(DataError, match="name a text source"):
        corpus.held_out(10, 1)
    with pytest.raises(DataError, match="needs another source"):
        build(data(recipe.RecallSource(haystack="text"), seq_len=1200), tokenizer)
    with pytest.raises(
        DataError, match=r"data.seq_len: 32 is too short for recall documents .* use \d+ or more"
    ):
        build(data(recipe.RecallSource()), tokenizer)


# ------------------------------------------------------------------------------------------- reading and caching


def test_every_format_gives_the_same_documents(tmp_path, tokenizer):
    documents = counted([5, 9, 3])
    plain = [words(document) for document in documents]
    lines = "".join(json.dumps({"text": line, "id": 1}) + "\n" for line in plain)
    joined = "<|endoftext|>".join(plain)
    (tmp_path / "a.txt").write_text(joined)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(joined.encode()))
    (tmp_path / "c.txt.xz").write_bytes(lzma.compress(joined.encode()))
    (tmp_path / "d.jsonl").write_text(lines)
    (tmp_path / "e.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": plain}), tmp_path / "f.parquet")
    expected = [token for document in documents for token in [*document, END]]
    for file in sorted(tmp_path.iterdir()):
        pool = load_pool(text(file), tokenizer)
        assert pool.tokens.tolist() == expected, file
        assert pool.starts.tolist() == [0, 6, 16, 20]
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    assert load_pool(text(tmp_path), tokenizer).tokens.tolist() == expected * 6


def test_long_documents_become_the_tokens_of_the_whole_text():
    tokenizer = load_teacher(recipe.Teacher())[1]
    whole = "".join(
        f'Chapter {i}. He said, "no";\n\n  and   went -- home again, 12345 times.\n' for i in range(9000)
    )
    pool = text_pool([whole], tokenizer)
    assert pool.tokens[:-1].tolist() == tokenizer.encode(whole, verbose=False)


def test_the_cache_gives_identical_tokens_without_reading_again(book, tmp_path, tokenizer, monkeypatch):
    spec = data(text(book))
    first = build(spec, tokenizer, cache_dir=tmp_path / "cache")
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".safetensors"]
    monkeypatch.setattr(assemble.read, "text_pool", None)
    second = build(spec, tokenizer, cache_dir=tmp_path / "cache")
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.held_out_tokens, second.held_out_tokens)


def test_a_changed_file_or_a_broken_cache_is_read_again(book, tmp_path, tokenizer, caplog):
    cache = tmp_path / "cache"
    first = load_pool(text(book), tokenizer, folder=cache)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:50])
    assert load_pool(text(book), tokenizer, folder=cache).digest() == first.digest()
    assert "made anew" in caplog.text
    write(tmp_path / "book.txt", [range(1, 100)])
    assert len(load_pool(text(book), tokenizer, folder=cache)) == 100


def test_chat_learns_the_response_only(tmp_path, tokenizer):
    tokenizer.chat_template = TEMPLATE
    try:
        path = tmp_path / "chat.jsonl"
        rows = [
            {"instruction": words(range(i, i + 4)), "output": words(range(i + 4, i + 6))}
            for i in range(1, 2000, 6)
        ]
        path.write_text("\n".join(json.dumps(row) for row in rows))
        corpus = build(data(recipe.ChatSource(path=str(path)), packing="separate"), tokenizer)
        batch = corpus.batch(0, batch_size=20, stage="x")
        learnt = batch["labels"][batch["labels"] != -100]
        words_learnt = learnt[(learnt != END) & (learnt < 5000)]
        assert len(words_learnt) > 50
        assert ((words_learnt - 1) % 6 >= 4).all()
        assert len(learnt) == len(words_learnt) * 3 // 2  # two words and their end
        assert ((batch["input_ids"] - 1) % 6 < 4).any()
    finally:
        tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        build(data(recipe.ChatSource(path=str(path))), tokenizer)


def test_a_context_follows_the_prompt_where_there_is_one(tmp_path):
    path = tmp_path / "chat.jsonl"
    rows = [
        {"instruction": "Sum up.", "input": "A tale.", "output": "Short."},
        {"instruction": "Sing.", "input": "", "output": "La."},
        {"instruction": "Count.", "input": None, "output": "One."},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    turn = Turn("instruction", "output", "input")
    expected = [("Sum up.\n\nA tale.", "Short."), ("Sing.", "La."), ("Count.", "One.")]
    assert list(pairs(str(path), turn)) == expected
    assert next(pairs(str(path), turn._replace(context=None))) == ("Sum up.", "Short.")
    with pytest.raises(DataError, match=r"line 1: .*'story'"):
        list(pairs(str(path), turn._replace(context="story")))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.txt", None, "no such file or folder"),
        ("a.pdf", b"%PDF", "not a text file"),
        ("empty.txt", b"", "no text in it"),
        ("blank.txt", b" \n \n", "no text in it"),
        ("latin.txt", b"caf\xe9 w1 w2", "not UTF-8 text"),
        ("cut.txt.xz", lzma.compress(b"w1 w2 w3 " * 99)[:40], "cannot be read"),
        ("cut.txt.gz", gzip.compress(b"w1 w2 w3 " * 99, mtime=0)[:25], "cannot be read"),
        ("fake.txt.gz", b"w1 w2", "cannot be read"),
        ("cut.jsonl", b'{"text": "w1"}\n{"te', "line 2: not JSON"),
        ("list.jsonl", b'["w1"]', "not an object"),
        ("field.jsonl", b'{"body": "w1"}', "no field 'text'; the fields are 'body'"),
        ("type.jsonl", b'{"text": 3}', "is not text but int"),
        ("cut.parquet", b"PAR1xxxx", "not a parquet file"),
        ("short.txt", b"w1 w2 w3", "fewer than one sequence of 32"),
    ],
)
def test_text_that_cannot_be_used_is_refused_in_one_line(tmp_path, tokenizer, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match=says) as caught:
        build(data(text(tmp_path / name)), tokenizer, cache_dir=cache)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    assert says.startswith(("no text", "fewer")) or not cache.exists()


def test_an_empty_folder_and_a_missing_data_set_are_refused(tmp_path, tokenizer, monkeypatch):
    with pytest.raises(DataError, match=r"has no .txt, .jsonl, .parquet file"):
        build(data(text(tmp_path)), tokenizer)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="data set nobody/nothing: cannot be loaded") as caught:
        build(data(recipe.HubSource(dataset="nobody/nothing")), tokenizer)
    assert "\n" not in str(caught.value)


def test_a_hub_data_set_is_read_by_its_field(tokenizer, monkeypatch):
    import datasets

    rows = datasets.Dataset.from_dict({"body": [words(range(i, i + 50)) for i in range(1, 1001, 50)]})
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: rows)
    source = recipe.HubSource(dataset="some/text", field="body", max_documents=12)
    assert len(load_pool(source, tokenizer)) == 12 * 51
    with pytest.raises(DataError, match="record 0: no field 'text'; the fields are 'body'"):
        load_pool(recipe.HubSource(dataset="some/text"), tokenizer)


# ------------------------------------------------------------------------------------------- the teacher's samples


def test_samples_are_the_models_own_and_repeat_with_the_seed(teacher, tokenizer):
    options = {"tokens": 300, "row_len": 33}
    one, two = (sample_pool(teacher, tokenizer, **options, seed=3) for _ in range(2))
    assert one.digest() == two.digest()
    assert one.digest() != sample_pool(teacher, tokenizer, **options, seed=4).digest()
    assert len(one) == 10 * 33
    assert (one.tokens[one.starts[:-1]] == END).all()
    assert one.tokens.max() < len(tokenizer)


def test_cold_samples_are_what_greedy_generation_gives(teacher, tokenizer):
    pool = sample_pool(teacher, tokenizer, tokens=20, row_len=20, temperature=1e-6)
    greedy = teacher.generate(
        torch.tensor([[END]]),
        max_new_tokens=19,
        min_new_tokens=19,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=1,
    )
    assert pool.tokens.tolist() == greedy[0].tolist()


def test_samples_follow_the_models_distribution(teacher, tokenizer):
    pool = sample_pool(teacher, tokenizer, tokens=20_000, row_len=2, temperature=0.05)
    with torch.no_grad():
        expected = (teacher(torch.tensor([[END]])).logits[0, -1, : len(tokenizer)] / 0.05).softmax(-1)
    share = np.bincount(pool.tokens[1::2], minlength=len(tokenizer)) / 10_000
    assert np.abs(share - expected.numpy()).max() < 0.02
    narrow = sample_pool(teacher, tokenizer, tokens=2000, row_len=2, temperature=0.05, top_p=0.1)
    nucleus = int((expected.sort(descending=True).values.cumsum(0) < 0.1).sum()) + 1
    assert len(set(narrow.tokens[1::2].tolist())) <= nucleus


def test_a_corpus_of_samples_says_so_and_reports_its_progress(teacher, tokenizer, tmp_path):
    seen = []
    spec = data(recipe.SelfSource(tokens=1500))
    corpus = build(
        spec, tokenizer, teacher=teacher, cache_dir=tmp_path, seed=1, device="cpu", progress=seen.append
    )
    assert corpus.label == "held-out samples of the teacher"
    assert seen[-1].done == seen[-1].total >= 1500
    assert [a.done <= b.done for a, b in pairwise(seen)]
    assert corpus.held_out(32, 4).shape[1] == 33
    seen.clear()
    build(spec, tokenizer, teacher=teacher, cache_dir=tmp_path, seed=1, progress=seen.append)
    assert not seen
    with pytest.raises(DataError, match="needs the teacher"):
        build(spec, tokenizer)


def test_the_bundled_teacher_finds_numbers_in_its_own_samples():
    model, tokenizer = load_teacher(recipe.Teacher())
    samples = sample_pool(model, tokenizer, tokens=8 * 257, row_len=257, seed=1)
    prompts = []
    for index in range(8):
        rng = generator("number_in_text", 300, index, 42)
        prompts.append(TASKS["number_in_text"].make(tokenizer, 300, rng, from_tokens(samples.tokens, rng)))
    with torch.no_grad():
        guesses = model(torch.tensor([p.ids + p.answer for p in prompts])).logits.argmax(-1)
    right = sum(guesses[i, -len(p.answer) - 1 : -1].tolist() == p.answer for i, p in enumerate(prompts))
    assert right >= 6
