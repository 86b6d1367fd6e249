"""Timing a student beside its teacher: what is planned, what is measured, where the student is ahead."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import student, tiny
from typer.testing import CliRunner

import linearize
from linearize.cli import app
from linearize.evaluate import TEACHER, speed, timing
from linearize.evaluate.memory import memory
from linearize.evaluate.speed import OUT_OF_MEMORY, Planned, Point, SpeedResults, crossovers
from linearize.modeling.errors import EvaluationError
from linearize.modeling.lolcats import LolcatsConfig
from linearize.recipe import Recipe
from linearize.report import speed_tables

LENGTHS, BATCHES = [32, 64, 80], [1, 2]


@pytest.fixture(scope="module")
def models():
    small = {"max_position_embeddings": 64, "num_hidden_layers": 1, "dtype": torch.float32}
    return {TEACHER: tiny("llama", **small), "student": student("llama", LolcatsConfig(window=8), **small)}


@pytest.fixture(scope="module")
def measured(models):
    seen = []
    planned = speed.plan(models, LENGTHS, BATCHES)
    return speed.measure(models, planned, runs=4, progress=seen.append), planned, seen


def test_every_point_of_the_grid_is_there_in_order(measured):
    results, planned, seen = measured
    where = [(p.length, p.batch, p.part, p.model) for p in results.points]
    assert where == [
        (n, b, part, m)
        for n in LENGTHS
        for b in BATCHES
        for part in ("prefill", "decode")
        for m in (TEACHER, "student")
    ]
    assert len(planned) == len(where)
    assert seen[-1].done == seen[-1].total
    assert all(a.done <= b.done for a, b in itertools.pairwise(seen))


def test_the_teacher_is_not_timed_beyond_its_context(measured):
    results, _, _ = measured
    for point in results.points:
        beyond = point.model == TEACHER and point.length > 64
        assert (point.not_run == "beyond its context of 64") == beyond
        assert (point.ms is None) == beyond
    assert results.up_to == 64


def test_a_point_is_a_median_with_quartiles_and_its_rate(measured):
    for point in measured[0].points:
        if point.ms is None:
            continue
        assert 0 < point.low <= point.ms <= point.high
        assert point.runs == 4
        tokens = point.batch * (point.length if point.part == "prefill" else 1)
        assert point.tokens_per_second == pytest.approx(1000 * tokens / point.ms)
        assert point.peak_bytes is None  # no GPU here


def test_bytes_are_those_of_the_geometry(measured, models):
    sizes = memory(models[TEACHER], {"student": models["student"]})
    for point in measured[0].points:
        if point.ms is None:
            continue
        assert point.state_bytes == sizes[point.model].bytes_at(point.length) * point.batch


def test_results_survive_json_and_have_a_row_a_point(measured):
    results = measured[0]
    tree = json.loads(json.dumps(results.to_dict(), allow_nan=False))
    assert SpeedResults.from_dict(tree) == results
    tables = speed_tables(results)
    assert [len(table.rows) for table in tables] == [12, 12, 2]
    assert all(len(row) == len(table.header) for table in tables for row in table.rows)


def test_what_cannot_fit_is_not_tried_unless_asked(models):
    planned = speed.plan(models, [32], [1], free=1)
    assert all(point.not_run.startswith(OUT_OF_MEMORY) for point in planned)
    results = speed.measure(models, planned)
    assert all(point.out_of_memory and point.ms is None for point in results.points)
    assert not any(point.not_run for point in speed.plan(models, [32], [1], free=1, force=True))
    late = speed.plan(models, [32], [1], seconds=0)
    assert all("after the 0 s given" in point.not_run for point in late)


def test_running_out_of_memory_is_a_point_and_the_rest_goes_on(models, monkeypatch):
    planned = speed.plan(models, [32], [1], parts=["prefill"])

    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(models[TEACHER], "forward", full)
    theirs, ours = speed.measure(models, planned, runs=3).points
    assert (theirs.not_run, theirs.ms) == (OUT_OF_MEMORY, None)
    assert ours.ms is not None
    assert crossovers([theirs, ours], 1, "student")["prefill"] == 32


@pytest.mark.parametrize(
    ("lengths", "batches", "parts", "word"),
    [
        ([4], [1], ["prefill"], "lengths: 4"),
        ([], [1], ["prefill"], "lengths: none"),
        ([32], [0], ["prefill"], "batch: 0"),
        ([32], [1], ["sprint"], "'sprint'"),
    ],
)
def test_an_impossible_grid_is_refused(models, lengths, batches, parts, word):
    with pytest.raises(EvaluationError, match=word):
        speed.plan(models, lengths, batches, parts=parts)


def test_models_of_different_types_are_not_compared(models):
    with pytest.raises(EvaluationError, match="float64"):
        speed.plan(models | {"student": student("llama")}, [32], [1])


def test_a_slow_point_has_fewer_runs_and_says_so(models, monkeypatch):
    monkeypatch.setattr(timing, "POINT_SECONDS", 0.0)
    results = speed.measure(models, [Planned("prefill", TEACHER, 32, 1, 0, 1.0)])
    assert results.points[0].runs == timing.FEWEST
    assert results.notes == ["slow points have 3 timed runs instead of 10, and one warm-up"]


outcomes = st.lists(
    st.tuples(
        st.sampled_from(["ran", "memory", "skipped"]), st.floats(1, 9), st.sampled_from(["ran", "memory"])
    ),
    min_size=1,
    max_size=6,
)


@given(outcomes)
@settings(max_examples=25, deadline=None)
def test_the_crossover_is_where_the_student_begins_to_stay_ahead(found):
    """Beside the definition read word by word: from there on every length that can be compared is won."""
    reasons = {"ran": None, "memory": OUT_OF_MEMORY, "skipped": "beyond its context of 9"}
    points, won = [], {}
    for index, (theirs, ms, ours) in enumerate(found):
        length = 512 << index
        for model, what, value in ((TEACHER, theirs, 5.0), ("student", ours, ms)):
            point = Point("decode", model, length, 1, not_run=reasons[what])
            if what == "ran":
                point = replace(point, ms=value, low=value * 0.9, high=value * 1.1)
            points.append(point)
        if theirs != "skipped":
            won[length] = ours == "ran" and (theirs == "memory" or ms * 1.1 < 4.5)
    stays = [n for n in won if all(won[m] for m in won if m >= n)]
    assert crossovers(points, 1, "student")["decode"] == min(stays, default=None)


def test_bench_on_the_command_line(tmp_path):
    """A student in a run: what is printed, the file beside the results, and what is refused."""
    run = tmp_path / "run"
    recipe = Recipe.resolve("books-5m", "window", ["method.window=16"])
    model, tokenizer = linearize.load("books-5m")
    linearize.convert(model, recipe.method, [0])
    linearize.save(model, tokenizer, run / "student", extra={"recipe.yaml": recipe.to_yaml()})
    words = ["bench", str(run / "student"), "--lengths", "32", "--parts", "prefill", "--device", "cpu"]

    (run / "results.json").write_text('{"results": {"gates": {"status": "failed"}}}')
    made = CliRunner().invoke(app, words)
    assert made.exit_code == 2
    assert "gates failed" in made.stderr
    assert not (run / "speed.json").exists()

    (run / "results.json").write_text('{"results": {}}')
    made = CliRunner().invoke(app, [*words, "--json"])
    assert made.exit_code == 0, made.output
    assert "2 points: about" in made.stderr
    record = json.loads(made.stdout.splitlines()[-1])
    assert json.loads((run / "speed.json").read_text()) == record
    assert record["teacher"] == "books-5m"
    assert [p["length"] for p in record["speed"]["points"]] == [32, 32]
    assert record["origin"]["versions"]["torch"] == torch.__version__

    for wrong in (["--lengths", "many"], ["--device", "tpu"], ["--dtype", "int4"]):
        made = CliRunner().invoke(app, [*words, *wrong])
        assert made.exit_code == 2
        assert made.stderr.startswith("error: ") and made.stderr.count("\n") == 1
