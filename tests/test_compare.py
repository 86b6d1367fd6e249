"""Several methods on one tiny teacher: the same data and prompts, what is resumed, what is refused."""

import json
import sys
from dataclasses import replace

import pytest
from test_run import WORDS, teacher  # noqa: F401  (a fixture)
from typer.testing import CliRunner

from linearize.cli import app
from linearize.compare import compare, recipes_of
from linearize.evaluate import TEACHER
from linearize.evaluate.beside import beside
from linearize.modeling.errors import EvaluationError, RecipeError
from linearize.recipe import Recipe

BENCH = sys.modules["linearize.compare"]  # linearize.compare may be the function
OWN = [
    "layers=all",
    "control.enabled=false",
    "evaluate.generate_tokens=0",
    "compare.window.method.window=16",
]


@pytest.fixture(scope="module")
def recipe(teacher, tmp_path_factory):  # noqa: F811
    output = tmp_path_factory.mktemp("compared") / "runs"
    return Recipe.resolve(teacher, "lolcats", [*WORDS, *OWN, f"output={output}"])


@pytest.fixture(scope="module")
def made(recipe):
    return compare(recipe, ["lolcats", "window"])


def test_students_stand_beside_one_teacher_on_the_same_data(made):
    assert made.results.models == [TEACHER, "lolcats", "window"]
    first, second = (made.runs[name].folder for name in ("lolcats", "window"))
    shared = [path.relative_to(first) for path in (first / "data").rglob("*") if path.is_file()]
    assert shared
    assert all((first / path).read_bytes() == (second / path).read_bytes() for path in shared)
    for name, done in made.runs.items():
        assert made.results.likelihood[64][name] == done.results.likelihood[64]["student"]
        assert (
            made.results.cell(name, "passkey", 128).hits == done.results.cell("student", "passkey", 128).hits
        )
        assert made.results.memory[name] == done.results.memory["student"]
    assert {"results.json", "table.md", "report.html", "report.md"} <= {p.name for p in made.folder.iterdir()}
    assert (
        "no evidence" in json.loads((made.folder / "results.json").read_text())["evidence"]["lolcats"].lower()
    )
    page = made.page.read_text()
    assert "lolcats" in page and "window" in page
    # Both were timed, shortly, and the page has what that says.
    record = json.loads((made.folder / "results.json").read_text())
    for name, done in made.runs.items():
        points = json.loads((done.folder / "speed.json").read_text())["speed"]["points"]
        assert record["speed"][name]["points"] == points and {p["batch"] for p in points} == {1}
        assert {(p["part"], p["model"], p["not_run"]) for p in points} == {
            (part, model, None) for part in ("prefill", "decode") for model in (TEACHER, "student")
        }
        tree = json.loads((done.checkpoint / "certificate.json").read_text())
        assert tree["measured"]["speed"]["points"] == points and "not run: speed" not in tree["reasons"]
        assert f"{name}: Crossover" in page and f"## {name}: Decode" in (made.folder / "table.md").read_text()
    assert "a step at 512 tokens" in page and "Not run: speed" not in page and "crossover" in page.lower()
    # The window is everyone's control there.
    assert "No evidence that the linear branch is used" in page
    assert page.count(", a window control") == 1  # which the window alone has not


def test_fields_belong_to_their_method(recipe):
    recipes = recipes_of(recipe, ["lolcats", "window", "salient"])
    assert recipes["lolcats"].method.window == 8
    assert recipes["window"].method.window == 16
    assert recipes["salient"] == recipe.for_method("salient").override(
        [f"output={recipes['salient'].output}"]
    )
    assert {one.transfer.tokens for one in recipes.values()} == {512}
    assert {json.dumps(one.to_dict()["data"]) for one in recipes.values()} == {
        json.dumps(recipe.to_dict()["data"])
    }


def test_what_is_done_stays(made, recipe):
    def times(runs):
        files = ("results.json", "speed.json")
        return [(d.folder / file).stat().st_mtime_ns for d in runs.values() for file in files]

    before = times(made.runs)
    again = compare(recipe, ["lolcats", "window"])
    assert times(again.runs) == before
    assert again.results.to_dict() == made.results.to_dict()


def test_other_measurements_are_not_put_side_by_side(made):
    parts = {name: done.results for name, done in made.runs.items()}
    assert beside(parts).to_dict() == made.results.to_dict()
    with pytest.raises(EvaluationError, match="window: was measured with another seed than lolcats"):
        beside(parts | {"window": replace(parts["window"], seed=1)})
    with pytest.raises(EvaluationError, match="window: was asked other recall prompts"):
        beside(parts | {"window": replace(parts["window"], recall=[])})


@pytest.mark.parametrize(
    ("methods", "words", "told"),
    [
        (["lolcats", "mamba"], [], "--methods: 'mamba' is no method"),
        (["lolcats", "softmax"], [], "--methods: 'softmax' is no method"),
        (["lolcats"], [], "name two or more"),
        (["lolcats", "lolcats"], [], "each once"),
        (["lolcats", "window"], ["compare.mamba.seed=1"], "compare: 'mamba' is no method"),
        (["lolcats", "window"], ["compare.window.seed=1"], "compare.window.seed: is what all methods share"),
        (["lolcats", "window"], ["compare.window.method.windw=1"], "windw"),
    ],
)
def test_what_cannot_be_compared_is_said(recipe, methods, words, told):
    with pytest.raises(RecipeError, match=told):
        recipes_of(recipe.override(words), methods)


def test_a_timing_that_cannot_be_short_is_said_before_it_begins(made, recipe, caplog, monkeypatch):
    (made.runs["window"].folder / "speed.json").unlink()
    caplog.set_level("INFO", "linearize.compare")
    again = compare(recipe, ["lolcats", "window"], bench_seconds=1e-6)
    assert not (made.runs["window"].folder / "speed.json").exists()
    estimate, missed = (record.getMessage() for record in caplog.records)
    assert estimate == "window: bench, 0 of 4 points will be timed"
    assert "not timed" in missed and "predicted to end after" in missed
    page = again.page.read_text()
    assert "lolcats: Crossover" in page and "window: Crossover" not in page
    # Nor are both models loaded again to hear the same; other seconds are another question.
    seconds = []
    real = BENCH.bench
    monkeypatch.setattr("linearize.report.available", lambda: False)  # without the page, which takes longest
    monkeypatch.setattr(
        BENCH, "bench", lambda *a, **terms: seconds.append(terms["seconds"]) or real(*a, **terms)
    )
    for given in (1e-6, 2e-6):
        compare(recipe, ["lolcats", "window"], bench_seconds=given)
    assert seconds == [2e-6] and "predicted to end after" in caplog.records[2].getMessage()
    assert caplog.records[2].getMessage().endswith("not-timed.json to try again")


def test_the_command_ends_with_one_object(made, recipe):
    words = ["compare", recipe.teacher.name, *WORDS, *OWN, "method.name=lolcats", f"output={recipe.output}"]
    result = CliRunner().invoke(app, [*words, "--methods", "lolcats,window", "--no-bench", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["results"]["models"] == [TEACHER, "lolcats", "window"]
