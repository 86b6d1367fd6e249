"""Scans of a tiny teacher: exact, resumable, harmless to the model; and what is read from them."""

import json
import random
from dataclasses import replace

import pytest
import torch
from tiny import student, tiny
from transformers import AutoTokenizer

from linearize.convert import convert, unconvert
from linearize.evaluate import likelihood
from linearize.modeling.errors import RecipeError
from linearize.modeling.mixer import MixerInput
from linearize.modeling.salient import SalientConfig
from linearize.modeling.window import WindowConfig
from linearize.probe import probe
from linearize.recipe import Recipe
from linearize.scan import page, read, scan, selectors
from linearize.scan.bench import Bench
from linearize.scan.material import small_corpus
from linearize.scan.measure import bench_of, scanned_layers
from linearize.scan.oracle import Memo, OracleMixer, far_mass
from linearize.tasks.words import WORDS
from linearize.teacher import BUNDLED

SMALL = [
    "method.chunk=16",
    "scan.budgets=[2, 16]",
    "scan.windows=[8]",
    "scan.seq_len=96",
    "scan.sequences=3",
    "scan.batch_size=2",
    "scan.recall_tasks=[passkey]",
    "scan.recall_lens=[120]",
    "scan.recall_samples=2",
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED["books-5m"])


@pytest.fixture(scope="module")
def teacher(tokenizer):
    return tiny(vocab_size=len(tokenizer))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("text") / "text.txt", random.Random(0)
    path.write_text("<|endoftext|>".join(" ".join(rng.choices(WORDS, k=400)) for _ in range(8)))
    return [*SMALL, f"data.sources=[{{kind: text, path: {path}}}]"]


@pytest.fixture(scope="module")
def recipe(words):
    return Recipe.resolve("tiny", "salient", words)


@pytest.fixture(scope="module")
def corpus(recipe, tokenizer):
    return small_corpus(recipe, tokenizer, None, None, "cpu")


@pytest.fixture(scope="module")
def scanned(teacher, tokenizer, corpus, recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scan")
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    kind = type(teacher)
    result = scan(teacher, tokenizer, corpus, recipe, folder=folder)
    assert type(teacher) is kind
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    return folder, result


def bench(teacher, tokenizer, corpus, recipe) -> Bench:
    return bench_of(teacher, tokenizer, corpus, recipe, scanned_layers(teacher, recipe))


def test_a_row_is_what_converting_that_layer_alone_gives(scanned, teacher, tokenizer, corpus, recipe):
    """Skipped blocks, seats and the shared teacher change nothing: KL by the evaluation's own code."""
    made = bench(teacher, tokenizer, corpus, recipe)
    assert made.trunk.chain
    windows = torch.cat([batch.ids for batch in made.batches if batch.cell is None])
    for layer in (0, 2):
        other = convert(tiny(vocab_size=len(tokenizer)), WindowConfig(window=8, sinks=1), [layer])
        told = likelihood.compare(
            teacher, {"student": other}, windows, batch_size=2, vocab_size=len(tokenizer)
        )
        row = scanned[1].row(layer, "window 8")
        assert row.kl == pytest.approx(told["student"].kl, rel=1e-4, abs=1e-7)
        assert (row.kl_low, row.kl_high) != (0.0, 0.0)


def test_what_keeps_everything_loses_nothing_and_more_is_better(scanned, teacher, tokenizer, corpus, recipe):
    result = scanned[1]
    for layer in result.layers:
        assert result.row(layer, "softmax").kl == result.row(layer, "softmax").error == 0
        assert result.row(layer, "salient 16+16").error < result.row(layer, "salient 16+2").error
    full = recipe.override(["scan.budgets=[2]"])
    made = bench(teacher, tokenizer, corpus, full)
    memo = Memo(0)
    everything = OracleMixer(SalientConfig(budget=200, chunk=16), made.found[1].geometry, memo, 0.5)
    _, tallies = made.alone(1, {"all": everything}, memo, {}, lambda tokens: None)
    assert abs(tallies["all"].kl) < 1e-6
    assert tallies["all"].error / tallies["all"].power < 1e-9


def test_kv_heads_alone_add_up_to_the_layer(teacher, tokenizer, corpus, recipe, tmp_path):
    heads = recipe.override(
        ["scan.heads=true", "scan.budgets=[2]", "scan.windows=[]", "scan.selectors=false"]
    )
    result = scan(teacher, tokenizer, corpus, heads, folder=tmp_path)
    for layer in result.layers:
        parts = sum(result.row(layer, "salient 16+2", head).error for head in (0, 1))
        assert parts == pytest.approx(result.row(layer, "salient 16+2").error, rel=1e-4)


def test_a_scan_goes_on_from_its_lines_and_takes_more_candidates(
    scanned, teacher, tokenizer, corpus, recipe, tmp_path, monkeypatch
):
    folder, whole = scanned
    lines = (folder / "scan.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "scan.jsonl").write_text("".join(lines[:5]) + lines[5][:20])  # a crash in the second layer
    calls = []
    alone = Bench.alone
    monkeypatch.setattr(
        Bench, "alone", lambda self, layer, *rest: (calls.append(layer), alone(self, layer, *rest))[1]
    )
    again = scan(teacher, tokenizer, corpus, recipe, folder=tmp_path)
    assert calls == [1, 2]
    assert again.rows == whole.rows
    more = recipe.override(["scan.windows=[8, 32]"])
    assert {row.candidate for row in scan(teacher, tokenizer, corpus, more, folder=tmp_path).rows} > {
        "window 32"
    }
    with pytest.raises(RecipeError, match="holds a scan with another scan; choose another folder"):
        scan(teacher, tokenizer, corpus, recipe.override(["scan.sequences=2"]), folder=tmp_path)
    assert read(folder).rows == whole.rows


def test_trained_candidates_fit_better_than_untrained_ones(teacher, tokenizer, words, corpus, tmp_path):
    recipe = Recipe.resolve(
        "tiny", "lolcats",
        [*(w for w in words if "method" not in w), "method.window=8", "transfer.batch_size=2", "scan.windows=[]",
         "scan.selectors=false", "transfer.learning_rate=5e-2"],
    )  # fmt: skip
    errors = []
    for tokens in (0, 8_000):
        made = recipe.override([f"scan.transfer_tokens={tokens}"])
        result = scan(teacher, tokenizer, corpus, made, folder=tmp_path / str(tokens))
        errors.append(sum(result.row(layer, "lolcats").error for layer in result.layers))
    assert errors[1] < errors[0]
    assert not getattr(teacher.config, "linearize", None)


def test_the_stand_in_explains_the_share_of_variance_that_it_says():
    torch.manual_seed(0)
    model = student(config=WindowConfig(window=8), dtype=torch.float32)
    geometry = probe(unconvert(model))[0].geometry
    q, k, v = (torch.randn(4, 512, heads, 16) for heads in (4, 2, 2))
    x = MixerInput(torch.zeros(4, 512, 32), 3 * q, k, v, scale=0.25)
    memo = Memo(seed=1)
    config = SalientConfig(budget=8, chunk=16)
    target = memo.target(x, 16, 1e-4)
    kept = {}
    for fit in (1.0, 0.5):
        OracleMixer(config, geometry, memo, fit)(x)
        noisy = target + ((1 - fit) / fit) ** 0.5 * target[:, :480].std(1, keepdim=True) * memo.noise(target)
        mine, theirs = (t[:, :480, 0] - t[:, :480, 0].mean(1, keepdim=True) for t in (noisy, target))
        kept[fit] = (mine * theirs).sum() ** 2 / (mine**2).sum() / (theirs**2).sum()
    assert kept[1.0] == pytest.approx(1.0)
    assert kept[0.5] == pytest.approx(0.5, abs=0.05)


def test_a_layer_that_copies_is_a_retrieval_head():
    """Attention of hand-made keys: all on one far token, or all on the newest."""
    time = 256
    q = torch.zeros(1, time, 2, 8)
    k = torch.zeros(1, time, 1, 8)
    q[:, :, 0, 0], k[:, 10, :, 0] = 50.0, 1.0  # head 0 looks at token 10 wherever it is
    q[:, :, 1, 1], k[:, :, 0, 1] = 1.0, torch.arange(time).float() * 5  # head 1 looks at the newest
    x = MixerInput(torch.zeros(1, time, 4), q, k, torch.zeros(1, time, 1, 8), scale=1.0)
    places = torch.tensor([[0, 250, 10], [0, 251, 10]])
    far, copied = far_mass(x, 16, places)
    assert copied is not None
    assert copied[0] == pytest.approx(1.0, abs=1e-4)
    assert copied[1] == pytest.approx(0.0, abs=1e-4)
    assert far[0] > 0.8
    assert far[1] < 0.01


def test_ranks_and_their_correlation():
    assert selectors.ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]
    found = selectors.correlations(
        {
            "a": {"0": 1.0, "1": 2.0, "2": 9.0},
            "b": {"0": 0.1, "1": 0.2, "2": 0.3},
            "flat": dict.fromkeys("012", 1.0),
        }
    )
    assert found == {"a": {"a": 1.0, "b": 1.0}, "b": {"a": 1.0, "b": 1.0}}


def test_the_page_escapes_and_says_words_first(scanned):
    folder, result = scanned
    odd = replace(result, teacher="<script>alert(1)</script>", words=["a < b", *result.words])
    text = page.html(odd)
    assert "<script" not in text
    assert "a &lt; b" in text
    assert text.index("a &lt; b") < text.index("<table")
    assert "http" not in text.replace("http-equiv", "")
    for name in (*result.candidates, *result.selectors):
        assert page.escape(name) in text
    assert json.loads((folder / "scan.json").read_text())["words"] == result.words


def test_the_layer_that_carries_recall_is_named(scanned):
    result = scanned[1]

    def with_lost(lost):
        rows = [
            replace(row, answered=10, lost=lost[row.layer] if row.candidate == "window 8" else 0)
            for row in result.rows
        ]
        return page.words(replace(result, rows=rows))[0]

    assert with_lost([0, 9, 1]).startswith(
        "Layer 1 carries recall: with window 8 there alone, 9 of 10 prompts that the teacher answers are lost; "
        "in any other layer 1 at most."
    )
    assert with_lost([8, 9, 0]).startswith("Layers 0 and 1 carry recall")
    assert with_lost([1, 0, 1]).startswith("No single layer carries recall")
