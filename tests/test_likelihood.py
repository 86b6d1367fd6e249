"""Perplexity, KL, agreement: equal to the dense definition, by bucket, whatever the padded columns hold."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from linearize.evaluate import likelihood
from linearize.evaluate.likelihood import compare, difference, edges, rows_per_call
from linearize.modeling.errors import EvaluationError

VOCAB = 53


def llama(seed: int, vocab: int = VOCAB, dtype: torch.dtype = torch.double) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.5, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def windows():
    return torch.randint(VOCAB, (5, 151), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def teacher():
    return llama(0)


def dense(teacher, student, windows):
    ids, targets = windows[:, :-1], windows[:, 1:]
    truth, scores = (model(ids).logits[..., :VOCAB].double().log_softmax(-1) for model in (teacher, student))
    nll = -scores.gather(-1, targets[..., None])[..., 0]
    return nll, (truth.exp() * (truth - scores)).sum(-1), (truth.argmax(-1) == scores.argmax(-1)).double()


@pytest.mark.parametrize("token_chunk", [1, 7, 64, 4096])
def test_equals_the_dense_definition(teacher, windows, token_chunk):
    student = llama(1)
    got = compare(
        teacher, {"student": student}, windows, batch_size=2, vocab_size=VOCAB, token_chunk=token_chunk
    )
    assert list(got) == ["teacher", "student"]
    for name, model in {"teacher": teacher, "student": student}.items():
        nll, kl, same = dense(teacher, model, windows)
        whole = got[name]
        assert (whole.tokens, whole.sequences) == (5 * 150, 5)
        assert whole.ppl == pytest.approx(nll.mean().exp().item(), rel=1e-10)
        assert whole.kl == pytest.approx(kl.mean().item(), abs=1e-10)
        assert whole.top1 == same.mean().item()
        assert [(b.start, b.end, b.tokens) for b in whole.buckets] == [
            (0, 64, 320),
            (64, 128, 320),
            (128, 150, 110),
        ]
        for bucket in whole.buckets:
            part = slice(bucket.start, bucket.end)
            assert bucket.ppl == pytest.approx(nll[:, part].mean().exp().item(), rel=1e-10)
            assert bucket.kl == pytest.approx(kl[:, part].mean().item(), abs=1e-10)
            assert bucket.top1 == pytest.approx(same[:, part].mean().item(), abs=1e-12)
    assert got["teacher"].kl == 0
    assert got["teacher"].top1 == 1
    assert got["student"].kl > 0.01


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_padded_columns_change_no_bit(windows, garbage):
    def pair(fill):
        models = [llama(seed, VOCAB + 11, torch.float32) for seed in (0, 1)]
        for model in models:
            model.lm_head.weight[VOCAB:] = fill
        return compare(models[0], {"student": models[1]}, windows, batch_size=4, vocab_size=VOCAB)

    assert pair(garbage) == pair(0.0)


def test_dtypes_may_differ(windows):
    student = llama(1)
    low = llama(1, dtype=torch.bfloat16)
    got = compare(student, {"bf16": low}, windows, batch_size=8, vocab_size=VOCAB)["bf16"]
    assert 0 < got.kl < 0.05
    assert got.top1 > 0.8


def test_a_teacher_may_rule_tokens_out(windows):
    def excluded(seed):
        model = llama(seed)
        forward = model.forward

        def masked(*args, **kwargs):
            out = forward(*args, **kwargs)
            out.logits[..., 3] = -math.inf
            return out

        model.forward = masked
        return model

    keep = windows.masked_fill(windows == 3, 4)
    got = compare(excluded(0), {"student": excluded(1)}, keep, batch_size=8, vocab_size=VOCAB)["student"]
    assert math.isfinite(got.kl)
    assert math.isfinite(got.ppl)


def test_intervals_hold_their_values_and_the_difference_is_paired(teacher, windows):
    got = compare(
        teacher, {"near": llama(1), "far": llama(2)}, windows, batch_size=8, vocab_size=VOCAB, seed=3
    )
    for result in got.values():
        for key in ("ppl", "kl", "top1"):
            low, high = result.intervals[key]
            assert low - 1e-9 <= getattr(result, key) <= high + 1e-9
    assert got["teacher"].intervals["ppl_difference"] == (0, 0)
    value, (low, high) = difference(got["near"], got["far"])
    assert value == pytest.approx(got["near"].kl - got["far"].kl)
    assert low <= value <= high
    assert got == compare(
        teacher, {"near": llama(1), "far": llama(2)}, windows, batch_size=8, vocab_size=VOCAB, seed=3
    )


def test_logits_of_one_call_are_bounded(teacher, windows, monkeypatch):
    assert rows_per_call(8, 1000, 50_000) == 5
    assert rows_per_call(8, 10**6, 10**6) == 1
    monkeypatch.setattr(likelihood, "MAX_LOGITS", 2 * 150 * VOCAB)
    seen, forward, done = [], teacher.forward, []
    monkeypatch.setattr(
        teacher, "forward", lambda *a, **k: (seen.append(k["input_ids"].shape[0]), forward(*a, **k))[1]
    )
    compare(teacher, {}, windows, batch_size=8, vocab_size=VOCAB, progress=lambda *at: done.append(at))
    assert seen == [2, 2, 1]
    assert done == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize(
    ("length", "borders"),
    [
        (1, [0, 1]),
        (64, [0, 64]),
        (65, [0, 64, 65]),
        (1024, [0, 64, 128, 256, 512, 1024]),
        (100, [0, 64, 100]),
    ],
)
def test_buckets_double_to_the_length(length, borders):
    assert edges(length) == borders


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"students": {"teacher": None}}, "own name"),
        ({"windows": torch.zeros(3, dtype=torch.long)}, "expected \\[windows, tokens \\+ 1\\]"),
        ({"windows": torch.zeros(0, 9, dtype=torch.long)}, "none of them 0"),
        ({"windows": torch.full((1, 9), VOCAB)}, "tokenizer of the teacher"),
        ({"vocab_size": VOCAB + 1}, "its head has 53 columns"),
    ],
)
def test_mistakes_are_named(teacher, windows, change, text):
    arguments = {"students": {}, "windows": windows, "batch_size": 2, "vocab_size": VOCAB} | change
    with pytest.raises(EvaluationError, match=text):
        compare(teacher, **arguments)


def test_the_length_gate_compares_pairs_as_far_as_the_teacher_goes():
    from linearize.evaluate import Results
    from linearize.evaluate.length_gate import gate_lengths, length_gate
    from linearize.evaluate.likelihood import Likelihood

    def at(window_kl):
        tokens = 10 * len(window_kl)
        return Likelihood(1.0, sum(window_kl) / tokens, 1.0, tokens, len(window_kl), {}, [], [], window_kl)

    better, worse, mixed = [1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0], [0.5, 3.0, 1.0, 6.0]
    measured = {
        10: {"teacher": at([0.0] * 4), "student": at(better), "window control": at(worse)},
        20: {"teacher": at([0.0] * 4), "student": at(worse), "window control": at(better)},
        40: {"teacher": at([0.0] * 4), "student": at(better), "window control": at(mixed)},
    }
    results = Results("x", ["teacher", "student", "window control"], 0, measured, [], {})
    rows = length_gate(results, 10, 50)
    assert [row.status for row in rows] == ["passed", "failed", "passed", "not run"]
    assert rows[1].difference == pytest.approx(0.1)
    assert rows[3].note == "beyond the teacher's context of 50"
    assert gate_lengths(10, 50) == [10, 20, 40]
    assert [row.note for row in length_gate(results, 20)] == ["", "", *["this length was not measured"] * 2]
    alone = Results(
        "x", ["teacher", "student"], 0, {10: {"teacher": at(better), "student": at(better)}}, [], {}
    )
    assert length_gate(alone, 10)[0].note == "no window control was trained"
