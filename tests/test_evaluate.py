"""One evaluation of converted models: what is measured, beside whom, on what; and what it refuses."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from linearize.convert import convert
from linearize.data import build
from linearize.data import overlap as overlaps
from linearize.evaluate import Results, evaluate
from linearize.evaluate.memory import memory
from linearize.evaluate.vocabulary import refuse_other_vocabulary
from linearize.modeling.errors import EvaluationError
from linearize.modeling.registry import METHODS
from linearize.modeling.still import StillConfig
from linearize.recipe import Data, Evaluate
from linearize.report import markdown
from linearize.teacher import BUNDLED

CONFIG = Evaluate(seq_lens=[96, 160], sequences=3, batch_size=2, recall_lens=[160], recall_samples=4)


@dataclass
class Text:
    """Held-out tokens of a text that was never written."""

    held_out_tokens: torch.Tensor
    label: str = "a counted text"

    def held_out(self, length, sequences):
        count = min(sequences, len(self.held_out_tokens) // (length + 1))
        return self.held_out_tokens[: count * (length + 1)].view(count, length + 1)


def llama(vocab: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.2, attention_dropout=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED["books-5m"])


@pytest.fixture(scope="module")
def text():
    return Text(torch.randint(10, 8000, (2000,), generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def students(tokenizer):
    made = {}
    for name, method in METHODS.items():
        small = {"window": 8} if "window" in method.config.__dataclass_fields__ else {}
        made[name] = convert(llama(len(tokenizer)), method.config(**small))
    return made


@pytest.fixture(scope="module")
def results(students, tokenizer, text):
    return evaluate(students, llama(len(tokenizer)), tokenizer, text, CONFIG, seed=3)


def test_every_model_is_measured_everywhere(results, students):
    names = ["teacher", *students]
    assert results.models == names
    assert results.source == "a counted text"
    assert {length: list(by_model) for length, by_model in results.likelihood.items()} == {
        96: names,
        160: names,
    }
    assert [(c.task, c.length, c.model) for c in results.recall] == [
        (task, 160, name) for task in ("passkey", "number_in_text") for name in names
    ]
    assert results.likelihood[96]["teacher"].tokens == 3 * 96


def test_softmax_is_the_teacher_and_a_window_is_not(results):
    by_model = results.likelihood[160]
    same, window = by_model["softmax"], by_model["window"]
    assert same.kl == 0
    assert same.top1 == 1
    assert same.window_nll == by_model["teacher"].window_nll
    assert window.kl > 1e-4
    assert window.buckets[0].kl < window.kl  # the first positions still see nearly everything


def test_memory_of_converted_layers_does_not_grow(results):
    teacher, window, kept = (results.memory[name] for name in ("teacher", "window", "softmax"))
    assert (teacher.state, teacher.per_token) == (0, 2 * 1 * (16 + 16) * 4)
    assert window.per_token == 0
    assert window.bytes_at(100_000) == window.state > 0
    assert kept.bytes_at(1000) == teacher.bytes_at(1000)


def test_memory_of_states_that_grow_is_counted(tokenizer):
    teacher = llama(len(tokenizer))
    grows, bounded = (
        convert(llama(len(tokenizer)), StillConfig(chunk=8, salient_per_chunk=2, budget=budget))
        for budget in (None, 4)
    )
    found = memory(teacher, {"grows": grows, "bounded": bounded})
    a_token = 2 * 2 / 8 * 2 * ((16 + 16) * 4 + 4)  # layers, picks of a chunk, heads, key, value and score
    assert found["grows"].per_token == a_token
    assert found["grows"].bytes_at(1000) == found["grows"].state + 1000 * a_token
    assert found["bounded"].per_token == 0
    assert found["bounded"].bytes_at(1000) == found["bounded"].state


def test_results_are_a_function_of_their_seed(results, students, tokenizer, text):
    again = evaluate(students, llama(len(tokenizer)), tokenizer, text, CONFIG, seed=3)
    assert again == results
    other = evaluate({}, llama(len(tokenizer)), tokenizer, text, CONFIG, seed=4)
    assert {cell.digest for cell in other.recall}.isdisjoint(cell.digest for cell in results.recall)


def test_results_survive_json(results):
    again = Results.from_dict(json.loads(json.dumps(results.to_dict(), allow_nan=False)))
    assert again == results
    assert markdown(again) == markdown(results)


def test_progress_counts_up_to_its_total(students, tokenizer, text):
    seen = []
    teacher = llama(len(tokenizer)).train()
    evaluate({"window": students["window"]}, teacher, tokenizer, text, CONFIG, progress=seen.append)
    assert teacher.training
    done = [at.done for at in seen]
    assert done == sorted(done)
    assert {at.total for at in seen} == {done[-1]}
    assert {at.phase for at in seen} == {"evaluate"}


def test_lengths_beyond_the_teacher_are_refused(tokenizer, text):
    with pytest.raises(EvaluationError, match="seq_lens: 512 is longer than the teacher's context of 256"):
        evaluate({}, llama(len(tokenizer)), tokenizer, text, Evaluate(seq_lens=[512]))


def test_old_files_are_read(results):
    """Those without what was added later: medians, derived buckets, sources, overlap, tasks of lm-eval."""
    tree = json.loads(json.dumps(results.to_dict()))
    old = {"kl_median", "kl_p99", "top5", "derived", "sources", "window_tokens", "unit", "blocks"}
    for key in ("overlap", "lm_eval"):
        del tree[key]
    for by_model in tree["likelihood"].values():
        for entry in by_model.values():
            for key in old:
                del entry[key]
            for bucket in entry["buckets"]:
                for key in ("kl_median", "kl_p99", "top5", "intervals", "label"):
                    del bucket[key]
    again = Results.from_dict(tree)
    assert again.likelihood[160]["window"].window_kl == results.likelihood[160]["window"].window_kl
    assert again.likelihood[160]["window"].derived == []
    assert "passkey" in markdown(again)


def test_a_corpus_tells_sources_documents_and_what_was_trained_on(students, tokenizer, tmp_path):
    """Two held-out texts are measured apart; the one that repeats the training text is found out."""
    book = " ".join(f"The {n} old men went down to the sea and {n * 7} came back." for n in range(400))
    (tmp_path / "trained.txt").write_text(book)
    (tmp_path / "known.txt").write_text(book[: len(book) // 2] + " And so it ends.")
    (tmp_path / "new.txt").write_text(" ".join(f"Nobody knew {n} ships, or {n + 3}." for n in range(900)))
    held = [{"kind": "text", "path": str(tmp_path / name)} for name in ("known.txt", "new.txt")]
    sources = [{"kind": "text", "path": str(tmp_path / "trained.txt")}]
    spec = Data.model_validate({"seq_len": 64, "sources": sources, "held_out": held})
    corpus = build(spec, tokenizer)
    assert torch.equal(corpus.held_out(96, 6), corpus.held_out_windows(96, 6)[0])
    assert corpus.held_out_windows(96, 6)[1:] == (["known.txt"] * 3 + ["new.txt"] * 3, [0] * 3 + [1] * 3)
    config = Evaluate(seq_lens=[96], sequences=6, recall_lens=[], recall_tasks=[])
    found = evaluate({"window": students["window"]}, llama(len(tokenizer)), tokenizer, corpus, config)
    measured = found.likelihood[96]["window"]
    assert [(s.name, s.sequences, s.tokens) for s in measured.sources] == [
        ("known.txt", 3, 288),
        ("new.txt", 3, 288),
    ]
    assert measured.kl == pytest.approx(sum(s.kl for s in measured.sources) / 2)
    assert [(b.label, b.start, b.end) for b in measured.derived] == [
        ("inside the window", 0, 8), ("window to training length", 8, 64), ("beyond the training length", 64, 96),
    ]  # fmt: skip
    assert measured.derived[0].kl < 1e-6 < measured.derived[1].kl  # inside its window it is the teacher
    assert found.overlap["known.txt"].share > 0.95
    assert found.overlap["new.txt"].seen == 0 < found.overlap["new.txt"].grams
    text = markdown(found)
    assert "0 to 7, inside the window" in text
    assert "0 % of the runs of 13 tokens in new.txt stand in the training text too." in text
    assert "| 96 | new.txt | window |" in text


def test_overlap_counts_what_counting_words_counts(monkeypatch):
    rng = np.random.default_rng(0)
    text, trained = rng.integers(0, 4, 500), [rng.integers(0, 4, 300), rng.integers(0, 4, 3), text_of(rng)]
    known = {tuple(part[i : i + 5]) for part in trained for i in range(len(part) - 4)}
    expected = sum(tuple(text[i : i + 5]) in known for i in range(len(text) - 4))
    assert 0 < expected < 496
    for chunk in (7, 64, 1 << 20):  # runs that cross the border of a chunk are found too
        monkeypatch.setattr(overlaps, "CHUNK", chunk)
        assert overlaps.overlap(text, trained, 5) == (496, expected)
    assert overlaps.overlap(text[:3], trained, 5) == (0, 0)


def text_of(rng):
    return rng.integers(0, 4, 2000).astype(np.uint16)


def test_vocabularies_are_compared_token_by_token(tokenizer, caplog):
    other = AutoTokenizer.from_pretrained(BUNDLED["books-5m"])
    refuse_other_vocabulary(other, tokenizer, "student")
    other.add_tokens(["<new>"])
    with pytest.raises(
        EvaluationError, match=r"student: its vocabulary .* '<new>' is \d+ in the one and None"
    ):
        refuse_other_vocabulary(other, tokenizer, "student")
    refuse_other_vocabulary(None, tokenizer, "student")
    assert "unchecked" in caplog.text
