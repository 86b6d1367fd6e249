"""Perplexity, KL, agreement: equal to the dense definition, by bucket, whatever the padded columns hold."""

import dataclasses
import math

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from linearize.evaluate import heads, likelihood
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


def test_one_call_is_bounded(teacher, windows, monkeypatch):
    assert rows_per_call(8, 1000, 50_000) == 5
    assert rows_per_call(8, 10**6, 10**6) == 1
    monkeypatch.setattr(likelihood, "MAX_LOGITS", 2 * 150 * 16)
    seen, forward, done = [], teacher.model.forward, []
    monkeypatch.setattr(
        teacher.model, "forward", lambda *a, **k: (seen.append(k["input_ids"].shape), forward(*a, **k))[1]
    )
    compare(teacher, {}, windows, batch_size=8, vocab_size=VOCAB, progress=lambda *at: done.append(at))
    assert seen[-3:] == [(2, 150), (2, 150), (1, 150)]
    assert all(shape == (1, heads.PROBE_TOKENS) for shape in seen[:-3])  # the model and its parts, compared
    assert done == [(2, 5), (4, 5), (5, 5)]


def gemma(seed: int) -> Gemma2ForCausalLM:
    """Logits far above their soft-cap, so that leaving it out could not pass."""
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=512, initializer_range=0.5,
        final_logit_softcapping=3.0, attn_implementation="eager",
    )  # fmt: skip
    return Gemma2ForCausalLM(config).double().eval().requires_grad_(False)


def granite(seed: int) -> GraniteForCausalLM:
    torch.manual_seed(seed)
    config = GraniteConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.5, logits_scaling=4.0,
    )  # fmt: skip
    return GraniteForCausalLM(config).double().eval().requires_grad_(False)


class Shifted(LlamaForCausalLM):
    """A family with a rule for logits that no configuration tells."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits.sign() * out.logits.abs().sqrt()
        return out


def shifted(seed: int) -> Shifted:
    model = llama(seed)
    model.__class__ = Shifted
    return model


@pytest.mark.parametrize(
    ("make", "chunked"), [(llama, True), (gemma, True), (granite, True), (shifted, False)]
)
@pytest.mark.parametrize("column_chunk", [3, 20, 8192])
def test_blocks_of_columns_equal_the_dense_definition(make, chunked, column_chunk, windows):
    """53 columns are a multiple of none of the chunks; heads that are more than linear are found out."""
    teacher, student = make(0), make(1)
    parts = [heads.take_apart(model, windows[:, :-1], VOCAB, "m") for model in (teacher, student)]
    assert [part.chunked for part in parts] == [chunked, chunked]
    got = compare(
        teacher, {"s": student}, windows, batch_size=3, vocab_size=VOCAB, token_chunk=64,
        column_chunk=column_chunk,
    )["s"]  # fmt: skip
    nll, kl, same = dense(teacher, student, windows)
    truth, scores = (model(windows[:, :-1]).logits for model in (teacher, student))
    five = (scores.topk(5).indices == truth.argmax(-1, keepdim=True)).any(-1).double()
    assert got.ppl == pytest.approx(nll.mean().exp().item(), rel=1e-10)
    assert got.window_nll == pytest.approx(nll.sum(1).tolist(), abs=1e-8)
    assert got.kl == pytest.approx(kl.mean().item(), abs=1e-10)
    assert got.top1 == same.mean().item()
    assert got.top5 == five.mean().item() > got.top1
    for bucket in got.buckets:
        part = kl[:, bucket.start : bucket.end].flatten()
        expected = torch.quantile(part, torch.tensor([0.5, 0.99], dtype=torch.double)).tolist()
        assert [bucket.kl_median, bucket.kl_p99] == pytest.approx(expected, abs=1e-10)
        for name in ("ppl", "kl", "top1"):
            low, high = bucket.intervals[name]
            assert low <= getattr(bucket, name) <= high


def test_no_more_columns_than_a_chunk_exist_at_a_time(windows, monkeypatch):
    """Neither model's whole logits are made, outside the one comparison of 32 tokens."""
    teacher, sizes, linear = llama(0), [], torch.nn.functional.linear
    teacher.lm_head.weight = torch.nn.Parameter(
        torch.randn(4099, 16, dtype=torch.double), requires_grad=False
    )

    def spy(*args):
        out = linear(*args)
        sizes.append(tuple(out.shape))
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    compare(teacher, {}, windows, batch_size=8, vocab_size=4099, token_chunk=100, column_chunk=512)
    wide = [shape for shape in sizes if shape[-1] > 100]
    assert [shape for shape in wide if shape[-1] > 512] == [(1, 32, 4099), (32, 4099)]
    assert max(shape[0] for shape in wide if shape[-1] == 512) == 100
    assert (50, 512) in wide


def test_what_does_not_count_changes_no_bit(windows):
    """Masked tokens may be anything, NaN in their hidden states included."""
    models = [llama(seed, VOCAB + 11, torch.float32) for seed in (0, 1)]
    labels = windows[:, 1:].clone()
    labels[1, 40:] = labels[3] = labels[:, 100:110] = -100
    parts = [heads.take_apart(model, windows[:, :-1], VOCAB, "m") for model in models]
    ids = windows[:, :-1]

    def readings(garbage):
        found = []
        for part, model in zip(parts, models, strict=True):
            hidden = part.features(ids)
            hidden[labels == -100] = garbage
            model.lm_head.weight[VOCAB:] = garbage
            found.append(hidden)
        spoilt = [
            dataclasses.replace(p, features=lambda _, x=x: x) for p, x in zip(parts, found, strict=True)
        ]
        read = [likelihood._Readings.empty(5, 150) for _ in models]
        likelihood._read_rows(spoilt, ids, labels, VOCAB, (64, 20), read)
        return torch.stack([getattr(r, name) for r in read for name in ("nll", "kl", "top1", "top5")])

    clean = readings(0.0)
    assert clean.isfinite().all() and clean.abs().sum() > 0
    for garbage in (math.nan, math.inf, -1e30):
        assert torch.equal(readings(garbage), clean)
    got = compare(models[0], {"s": models[1]}, windows, batch_size=5, vocab_size=VOCAB, labels=labels)["s"]
    assert got.tokens == int((labels != -100).sum())
    assert got.window_tokens == (labels != -100).sum(1).tolist()
    assert (got.window_kl[3], [b.tokens for b in got.buckets]) == (0, [4 * 64 - 24, 3 * 54, 3 * 22])
    assert sum(b.kl * b.tokens for b in got.buckets) == pytest.approx(got.kl * got.tokens)
    with pytest.raises(EvaluationError, match="with 0 tokens that count"):
        compare(models[0], {}, windows, batch_size=5, vocab_size=VOCAB, labels=torch.full_like(labels, -100))


def test_derived_buckets_and_sources_are_parts_of_the_whole(teacher, windows):
    student = llama(1)
    got = compare(
        teacher, {"s": student}, windows, batch_size=5, vocab_size=VOCAB,
        named_spans=likelihood.spans(150, 16, 100), sources=["a", "b", "a", "a", "b"],
    )["s"]  # fmt: skip
    _, kl, _ = dense(teacher, student, windows)
    assert [(b.label, b.start, b.end, b.tokens) for b in got.derived] == [
        ("inside the window", 0, 16, 80),
        ("window to training length", 16, 100, 420),
        ("beyond the training length", 100, 150, 250),
    ]
    for bucket in got.derived:
        assert bucket.kl == pytest.approx(kl[:, bucket.start : bucket.end].mean().item(), abs=1e-10)
    assert [(s.name, s.sequences, s.tokens) for s in got.sources] == [("a", 3, 450), ("b", 2, 300)]
    assert got.sources[1].kl == pytest.approx(kl[[1, 4]].mean().item(), abs=1e-10)
    low, high = got.sources[1].intervals["kl"]
    assert [low, high] == pytest.approx(sorted(kl[[1, 4]].mean(1).tolist()))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((100, 200, 400), {"inside the window": (0, 100)}),
        ((100, None, 400), {"up to the training length": (0, 100)}),
        ((100, None, 40), {"up to the training length": (0, 40), "beyond the training length": (40, 100)}),
        ((100, 20, None), {"inside the window": (0, 20), "beyond the window": (20, 100)}),
        ((100, None, None), {}),
    ],
)
def test_spans_leave_out_what_is_empty_or_unknown(arguments, expected):
    assert likelihood.spans(*arguments) == expected


def test_documents_are_drawn_whole_where_there_are_enough(teacher):
    tokens = torch.randint(VOCAB, (16, 41), generator=torch.Generator().manual_seed(2))
    windows = tokens.repeat_interleave(3, 0)  # three equal windows a document
    given = {"batch_size": 48, "vocab_size": VOCAB}
    student = {"s": llama(1)}
    by_document = compare(teacher, student, windows, documents=[i // 3 for i in range(48)], **given)["s"]
    by_window = compare(teacher, student, windows, **given)["s"]
    once = compare(teacher, student, tokens, **given)["s"]
    assert (by_document.unit, by_window.unit, once.unit) == ("documents", "windows", "windows")
    assert by_document.intervals["kl"] == pytest.approx(once.intervals["kl"], abs=1e-9)
    value, interval = difference(by_document, by_document)
    assert [value, *interval] == pytest.approx([0, 0, 0], abs=1e-12)
    few = compare(teacher, student, windows, documents=[i // 24 for i in range(48)], **given)["s"]
    assert (few.unit, few.intervals) == ("windows", by_window.intervals)


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
