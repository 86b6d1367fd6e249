"""The quality run, whole, with budgets of two steps: both recipes, their lines, and the table beside the marks."""

import importlib.util
import json
import lzma
import random
from pathlib import Path

import pytest

from linearize.evaluate import Results
from linearize.modeling.errors import LinearizeError
from linearize.recipe import Recipe
from linearize.tasks.words import WORDS
from linearize.teacher import BUNDLED

SCRIPT = Path(__file__).parents[1] / "evals" / "quality" / "run.py"
SMALL = [
    "method.window=16",
    "data.seq_len=320",
    "transfer.tokens=640",
    "transfer.batch_size=1",
    "finetune.tokens=640",
    "finetune.batch_size=1",
    "evaluate.seq_lens=[96, 200]",
    "evaluate.sequences=3",
    "evaluate.recall_lens=[160]",
    "evaluate.recall_samples=2",
    "evaluate.generate_tokens=0",
    "device=cpu",
]


@pytest.fixture(scope="module")
def quality():
    spec = importlib.util.spec_from_file_location("quality_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """Two invented books of a few thousand words."""
    folder, rng = tmp_path_factory.mktemp("books"), random.Random(0)
    for name in ("books-train.txt.xz", "books-eval.txt.xz"):
        documents = (" ".join(rng.choices(WORDS, k=600)) + ".\n" for _ in range(6))
        (folder / name).write_bytes(lzma.compress("<|endoftext|>".join(documents).encode()))
    return folder


@pytest.mark.parametrize("name", ["lolcats", "window"])
def test_recipes_follow_the_protocol_of_the_marks(name):
    recipe = Recipe.from_file(SCRIPT.with_name(f"{name}-books-19m.yaml"))
    assert recipe.method.name == name
    assert (recipe.method.window, recipe.method.window_kind, recipe.layers) == (64, "sliding", "all")
    assert recipe.transfer.tokens == (3_000_000 if name == "lolcats" else 0)
    assert (recipe.finetune.tokens, recipe.finetune.batch_size) == (3_000_000, 16)
    assert [(s.kind, s.weight) for s in recipe.data.sources] == [("text", 0.85), ("recall", 0.15)]
    assert (recipe.data.seq_len, recipe.evaluate.sequences, recipe.evaluate.recall_samples) == (1024, 32, 100)
    assert (recipe.precision, recipe.teacher.dtype) == ("fp32", "float32")


def test_the_recipe_of_salient_follows_its_own_protocol():
    recipe = Recipe.from_file(SCRIPT.with_name("salient-books-19m.yaml"))
    method = recipe.method
    assert (method.name, method.budget, method.chunk, recipe.layers) == ("salient", 256, 64, "all")
    assert (recipe.transfer.tokens, recipe.transfer.batch_size, recipe.transfer.learning_rate) == (
        3_000_000,
        16,
        3e-3,
    )
    assert (recipe.finetune.tokens, recipe.finetune.batch_size, recipe.finetune.learning_rate) == (
        3_000_000,
        16,
        5e-4,
    )
    assert (recipe.finetune.next_token, recipe.finetune.kl) == (0, 1)
    assert (recipe.finetune.lora.rank, recipe.finetune.lora.alpha) == (8, 16)
    assert [(s.kind, s.weight) for s in recipe.data.sources] == [("text", 0.85), ("recall", 0.15)]
    assert (recipe.data.seq_len, recipe.evaluate.sequences, recipe.evaluate.recall_samples) == (1024, 32, 100)


def test_both_students_are_measured_and_told_beside_their_marks(quality, books, tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    words = [
        f"--teacher={BUNDLED['books-5m']}",
        f"--data={books}",
        f"--out={out}",
        f"--work={tmp_path / 'work'}",
    ]
    quality.main([*words, *SMALL])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["method"] for line in lines] == ["lolcats", "window"]
    for line in lines:
        assert {"model.safetensors", "config.json", "books-train.txt.xz", "books-eval.txt.xz"} <= set(
            line["sha256"]
        )
        assert len(line["recipe_sha256"]) == 64
        assert all(line[key] for key in ("commit", "device", "date", "versions", "seconds", "recipe"))
        results = Results.from_dict(line["results"])
        assert results.models == ["teacher", "student"]
        assert list(results.likelihood) == [96, 200]
        assert results.likelihood[200]["student"].kl > 0
    teachers = [Results.from_dict(line["results"]).likelihood[96]["teacher"] for line in lines]
    assert teachers[0] == teachers[1]
    told = capsys.readouterr()
    assert "| lolcats, mark |" in told.out
    assert "| window |" in told.out
    assert "evaluate" in told.err


def test_other_windows_are_refused(quality, books):
    recipe = Recipe.from_dict({"teacher": {"name": str(BUNDLED["books-5m"])}})
    results = Results("x", ["teacher"], 0, {}, [], {}, windows={96: "0" * 64})
    with pytest.raises(LinearizeError, match="windows of 96 are not the text's first 32"):
        quality.check_windows(results, recipe, books / "books-eval.txt.xz")
