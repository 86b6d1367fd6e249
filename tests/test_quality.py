"""The quality run, whole, with budgets of two steps: two students, their lines, and the table beside the marks."""

import importlib.util
import json
import lzma
import random
import sys
from pathlib import Path

import pytest
import yaml

from linearize.evaluate import Results
from linearize.modeling.errors import LinearizeError
from linearize.modeling.objectives import OBJECTIVES
from linearize.modeling.registry import METHODS
from linearize.recipe import Recipe
from linearize.scan.candidates import candidates
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
    "evaluate.gates=false",
    "device=cpu",
]


@pytest.fixture(scope="module")
def quality():
    sys.path.insert(0, str(SCRIPT.parent))  # its table lies beside it
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


def test_every_student_follows_the_protocol_of_the_marks(quality):
    options = quality.arguments(["--teacher=x", "--data=x", "--out=x"])
    marks = json.loads(options.marks.read_text())["rows"]
    recipes = {name: quality.recipe_of(name, options) for name in quality.students(options.students)}
    assert {recipe.method.name for recipe in recipes.values()} == set(METHODS) - {"softmax"}
    assert set(marks) <= {*recipes, "teacher"}
    for name, recipe in recipes.items():
        length = 2048 if name == "salient-by-layer" else 1024
        assert recipe.data.seq_len == length, name
        for stage in (recipe.transfer, recipe.finetune):
            assert stage.batch_size * length == 16 * 1024, name
        assert recipe.transfer.tokens in (0, 3_000_000) or name == "salient-by-layer"
        assert recipe.finetune.tokens == (6_000_000 if name == "liger-6M" else 3_000_000)
        assert (recipe.finetune.lora.rank, recipe.finetune.lora.alpha) == (8, 16)
        assert recipe.layers == "all" or isinstance(recipe.layers, dict)
        assert [(s.kind, s.weight) for s in recipe.data.sources] == [("text", 0.85), ("recall", 0.15)]
        assert (recipe.evaluate.sequences, recipe.evaluate.recall_samples) == (32, 100)
        assert (recipe.precision, recipe.teacher.dtype) == ("fp32", "float32")


def test_an_unknown_student_is_refused(quality):
    with pytest.raises(LinearizeError, match=r"--student lolcat: not in .* choose from window, "):
        quality.main(["--teacher=x", "--data=x", "--out=x", "--student=lolcat"])


def test_both_students_are_measured_and_told_beside_their_marks(quality, books, tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    words = [
        f"--teacher={BUNDLED['books-5m']}",
        f"--data={books}",
        f"--out={out}",
        f"--work={tmp_path / 'work'}",
        "--student=lolcats",
        "--student=window",
    ]
    quality.main([*words, *SMALL])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["student"] for line in lines] == ["lolcats", "window"]
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
    assert "- lolcats: perplexity at" not in told.out  # the marks have no such lengths
    assert "| lolcats, mark |" in told.out
    assert "| window |" in told.out
    assert "evaluate" in told.err


def test_other_windows_are_refused(quality, books):
    recipe = Recipe.from_dict({"teacher": {"name": str(BUNDLED["books-5m"])}})
    results = Results("x", ["teacher"], 0, {}, [], {}, windows={96: "0" * 64})
    with pytest.raises(LinearizeError, match="windows of 96 are not the text's first 32"):
        quality.check_windows(results, recipe, books / "books-eval.txt.xz")


def test_every_result_is_of_a_student_as_it_stands(quality):
    """The recipe in each committed line is the one that its student has now, but for keys that came later."""
    options = quality.arguments(["--teacher=x", "--data=x", "--out=x"])
    lines = [json.loads(line) for line in SCRIPT.with_name("results.jsonl").read_text().splitlines()]
    assert [line["student"] for line in lines] == list(quality.students(options.students))
    for line in lines:
        measured = Recipe.from_dict(yaml.safe_load(line["recipe"]))
        assert measured.differences(quality.recipe_of(line["student"], options)) == [], line["student"]


def test_what_falls_short_of_a_mark_is_named(quality):
    lines = quality.table.newest(SCRIPT.with_name("results.jsonl"), ["lolcats"])
    found = quality.table.figures(lines[0], "student")
    mark = {key: found[key] for key in ("ppl", "kl", "top1", "recall")}
    marks = {"prompts": 24, "other_windows": ["4096"], "rows": {"lolcats": mark}}
    assert quality.table.short_of_marks(lines, marks).endswith("Nothing.")
    kl = found["kl"]["1024"]
    mark["kl"] = {"1024": kl / 1.02, "2048": found["kl"]["2048"] / 1.009, "4096": 0.0}
    mark["recall"] = {"passkey": {"512": 0.5, "1024": 0.1}}
    told = quality.table.short_of_marks(lines, marks).splitlines()
    assert [line for line in told if line.startswith("-")] == [
        f"- lolcats: KL at 1,024 is {kl:.4g}, 2.0 % above {kl / 1.02:.4g}",
        "- lolcats: passkey at 512 is 7 % [3, 14], the mark 50 % [31, 69]",
    ]


def beside(quality, name):
    """Another script of the folder, which takes run.py for its module."""
    spec = importlib.util.spec_from_file_location(f"quality_{name}", SCRIPT.with_name(f"{name}.py"))
    sys.modules["run"] = quality
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    del sys.modules["run"]
    return module


def test_planned_students_keep_to_their_tokens_and_hand_made_ones_are_scanned(quality, tmp_path):
    """Nothing runs: the recipes of plan.py, and the table of lines that hold nothing."""
    plan = beside(quality, "plan")
    options = plan.arguments(["--teacher=x", "--data=x", f"--out={tmp_path / 'out.jsonl'}"])
    tree = plan.read_yaml(options.students)
    shares = []
    for name in tree["students"]:
        recipe = plan.recipe_of(name, options, tree)
        assert recipe.transfer.tokens + recipe.finetune.tokens <= 10_000_000
        shares.append((recipe.plan.kv_share, recipe.plan.at))
    assert shares == [(0.063, 4096), (0.1, 4096), (0.03, 4096)]
    assert len(tree["ranking"]) >= 8
    tried = {c.name for c in candidates(plan.ranking_recipe(options, tree))}
    for name in tree["ranking"]:
        assert set(plan.chosen(plan.recipe_of(name, options, tree)).values()) <= tried, name
    assert plan.markdown({}, {"targets": [], "ranking": []}) == ""


def test_a_planned_student_that_goes_on_plans_from_the_scan_that_it_began_with(quality, tmp_path):
    plan = beside(quality, "plan")
    options = plan.arguments(["--teacher=x", "--data=x", "--out=x", f"--work={tmp_path}"])
    tree, given = plan.read_yaml(options.students), (f"plan.scan={tmp_path / 'share-6.3' / 'scan'}",)
    for name in ("share-6.3", "share-10"):
        assert plan.scan_before("share-6.3", options, tree) == ()
        assert plan.scan_before("share-10", options, tree) == (() if name == "share-6.3" else given)
        (tmp_path / name / "scan").mkdir(parents=True)
        (tmp_path / name / "scan" / "scan.json").write_text("{}")
    assert plan.scan_before("share-10", options, tree) == given
    assert plan.scan_before("share-3", options, tree) == given


def test_objectives_have_equal_tokens_and_bytes_and_one_table(quality, tmp_path):
    """Nothing runs: the recipes of objectives.py, a transfer handed on, and the table of two lines."""
    script = beside(quality, "objectives")
    options = script.arguments(["--teacher=x", "--data=x", f"--out={tmp_path}", f"--work={tmp_path}"])
    recipes = {name: quality.recipe_of(name, options) for name in quality.students(options.students)}
    assert set(recipes) == set(OBJECTIVES)
    for name, recipe in recipes.items():
        assert {method.objective for method in recipe.layers.values()} == {name}
        same = ("method.objective", "layers.7.objective", "layers.rest.objective")
        assert set(recipe.differences(recipes["log_attention"])) <= set(same)
    for part in ("transfer", "data"):
        (tmp_path / "before" / "locret" / part).mkdir(parents=True)
    script.take_transfer("locret", options, tmp_path / "before" / "locret")
    assert not (tmp_path / "locret").exists()  # that transfer is not done
    (tmp_path / "before" / "locret" / "transfer" / "done.json").write_text("{}")
    script.take_transfer("locret", options, tmp_path / "before" / "locret")
    assert (tmp_path / "locret" / "transfer" / "done.json").exists()
    assert Recipe.from_file(tmp_path / "locret" / "recipe.yaml").method.objective == "locret"
    results = quality.table.newest(SCRIPT.with_name("results.jsonl"), ["salient-256"])[0]["results"]
    lines = [{"student": "ranking", "stage": stage, "results": results} for stage in reversed(script.STAGES)]
    told = [row.split(" | ")[:5] for row in script.markdown(lines).splitlines()[2:]]
    assert [row[0:2] for row in told] == [
        ["| teacher", ""], ["| ranking", "without LoRA"], ["| ranking", "with LoRA"]
    ]  # fmt: skip
    assert [row[2] for row in told] == ["100.00 %", "9.47 %", "9.47 %"]
    kl = results["likelihood"]["2048"]["student"]["kl"]
    assert told[1][4].startswith(f"{kl:.4f} [") and script.markdown([]) == ""
