"""Recall: an answer counts when greedy decoding gives it, however prompts are batched."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from linearize.evaluate import likelihood, recall
from linearize.evaluate.recall import digest, measure, prompts, score
from linearize.evaluate.statistics import wilson
from linearize.modeling.errors import DataError, EvaluationError
from linearize.tasks import TASKS
from linearize.teacher import BUNDLED

VOCAB = 61


def llama(vocab: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED["books-5m"])


@pytest.fixture(scope="module")
def model():
    return llama(VOCAB)


@pytest.fixture(scope="module")
def greedy(model):
    """Prompts of many lengths with the answers that greedy decoding gives."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for length, count in [(5, 3), (40, 1), (12, 6), (12, 2), (90, 4), (1, 1)]:
        ids = torch.randint(VOCAB, (1, length), generator=generator)
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        made.append(SimpleNamespace(ids=ids[0].tolist(), answer=written[0, length:].tolist()))
    return made


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_what_greedy_decoding_gives_is_right(model, greedy, batch_size):
    assert score(model, greedy, batch_size=batch_size, vocab_size=VOCAB) == [True] * len(greedy)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_one_wrong_token_is_wrong(model, greedy, batch_size):
    for place in (0, -1):
        other = [SimpleNamespace(ids=p.ids, answer=list(p.answer)) for p in greedy]
        for prompt in other[::2]:
            prompt.answer[place] = (prompt.answer[place] + 1) % VOCAB
        hits = score(model, other, batch_size=batch_size, vocab_size=VOCAB)
        assert hits == [index % 2 == 1 for index in range(len(greedy))]


def test_padded_columns_and_a_model_without_logits_to_keep(model, greedy):
    class Padded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, input_ids, use_cache):
            logits = self.inner(input_ids, use_cache=use_cache).logits
            return SimpleNamespace(logits=torch.nn.functional.pad(logits, (0, 9), value=1e9))

    assert all(score(Padded(), greedy, batch_size=4, vocab_size=VOCAB))


def test_no_prompts_no_answers(model):
    assert score(model, [], batch_size=4, vocab_size=VOCAB) == []


@pytest.mark.parametrize("task", TASKS)
def test_prompts_fit_and_do_not_depend_on_what_else_is_asked(tokenizer, task):
    text, length = torch.arange(5000) % 4000 + 50, 192 + 64 * TASKS[task].needles
    made = prompts(tokenizer, task, length, samples=4, seed=7, haystack_tokens=text)
    assert all(len(p.ids) > 0 and len(p.ids) + len(p.answer) <= length for p in made)
    again = prompts(tokenizer, task, length, samples=2, seed=7, haystack_tokens=text)
    assert digest(again) == digest(made[:2]) != digest(made[2:])
    assert digest(prompts(tokenizer, task, length, samples=2, seed=8, haystack_tokens=text)) != digest(again)


def test_cells(tokenizer):
    text = torch.arange(3000) % 4000 + 50
    models = {"teacher": llama(len(tokenizer)), "student": llama(len(tokenizer), seed=1)}
    seen = []
    cells = measure(
        models,
        tokenizer,
        ["passkey", "number_in_text"],
        [192, 256],
        3,
        5,
        text,
        2,
        progress=lambda *at: seen.append(at),
    )
    assert [(c.task, c.length, c.model) for c in cells] == [
        (task, length, name)
        for task in ("passkey", "number_in_text")
        for length in (192, 256)
        for name in ("teacher", "student")
    ]
    for first, second in zip(cells[::2], cells[1::2], strict=True):
        assert first.digest == second.digest
        assert first.tokens == second.tokens <= first.length
    for cell in cells:
        assert (cell.samples, len(cell.hits), cell.hits.count("1")) == (3, 3, cell.correct)
        assert (cell.low, cell.high) == wilson(cell.correct, 3)
        assert cell.share == cell.correct / 3
    assert len({cell.digest for cell in cells}) == 4
    assert seen[-1] == (8, 8)


def test_mistakes_are_named(tokenizer):
    with pytest.raises(EvaluationError, match="'passkee' is unknown; choose from passkey"):
        prompts(tokenizer, "passkee", 256, samples=1, seed=0)
    with pytest.raises(DataError, match="cannot hold the needle"):
        prompts(tokenizer, "passkey", 20, samples=1, seed=0)
    with pytest.raises(EvaluationError, match="recall_samples: 0"):
        measure({}, tokenizer, ["passkey"], [256], 0, 0, None, 1)


def test_a_big_batch_is_split_to_bound_its_logits(model, greedy, monkeypatch):
    monkeypatch.setattr(likelihood, "MAX_LOGITS", 2 * 94 * VOCAB)
    rows, forward = [], model.forward
    monkeypatch.setattr(
        recall, "last_logits", lambda m, ids, keep: (rows.append(len(ids)), forward(ids).logits[:, -keep:])[1]
    )
    assert all(score(model, greedy, batch_size=16, vocab_size=VOCAB))
    assert max(rows) == 2
