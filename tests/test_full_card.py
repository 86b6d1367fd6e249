"""Energy of a token, and both models at their own largest batch."""

import json
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import student, tiny

from linearize.evaluate import TEACHER, energy, largest, speed
from linearize.evaluate.bench import bench
from linearize.evaluate.energy import NoReading
from linearize.evaluate.points import OUT_OF_MEMORY, Point, SpeedResults
from linearize.modeling.errors import EvaluationError
from linearize.modeling.lolcats import LolcatsConfig
from linearize.report import speed_tables
from linearize.report.words import full_card

SMALL = {"max_position_embeddings": 64, "num_hidden_layers": 1, "dtype": torch.float32}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models():
    return {TEACHER: tiny("llama", **SMALL), "student": student("llama", LolcatsConfig(window=8), **SMALL)}


@given(st.integers(0, 5000), st.sampled_from([1, 64, 4096]))
def test_the_largest_batch_is_found_in_few_tries(limit, most):
    tried = []
    assert largest.largest(lambda batch: tried.append(batch) or batch <= limit, most) == min(limit, most)
    assert len(tried) == len(set(tried)) <= 2 * max(1, limit).bit_length() + 1
    assert max(tried) <= most


def test_what_does_not_run_says_why(models, monkeypatch):
    model = models["student"]
    assert largest.attempt(model, 3, 20, 0) is None
    whole = model.forward

    def forward(input_ids, **kwargs):
        if len(input_ids) > 3:
            raise RuntimeError("invalid configuration argument\nmore of it")
        if len(input_ids) > 2 and input_ids.shape[1] == 1:  # the step alone
            raise torch.OutOfMemoryError("no room")
        return whole(input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    found = [largest.attempt(model, batch, 20, 0) for batch in (2, 3, 4)]
    assert found == [None, OUT_OF_MEMORY, "invalid configuration argument"]


def test_matched_memory_is_a_table_of_its_own(models, monkeypatch):
    room = {id(models[TEACHER]): 3, id(models["student"]): 6}
    monkeypatch.setattr(
        largest, "attempt", lambda model, batch, *_: None if batch <= room[id(model)] else OUT_OF_MEMORY
    )
    seen = []
    full = largest.measure(models, 32, speed.timed, runs=3, progress=seen.append)
    assert [(x.model, x.batch, x.refused) for x in full.models] == [
        (TEACHER, 3, (4, OUT_OF_MEMORY)),
        ("student", 6, (7, OUT_OF_MEMORY)),
    ]
    assert full.models[1].tried == [
        (1, None),
        (2, None),
        (4, None),
        (8, OUT_OF_MEMORY),
        (6, None),
        (7, OUT_OF_MEMORY),
    ]
    assert [(p.part, p.batch, p.runs) for p in full.models[1].points] == [("prefill", 6, 3), ("decode", 6, 3)]
    assert (seen[-1].done, seen[-1].total) == (2, 2)
    point = Point("decode", "student", 32, 1, 1.0, 0.9, 1.1, 10, 1000.0)
    found = {"prefill": None, "decode": None, "memory": None}
    results = SpeedResults("a card", [point], found, 32, {1: found}, matched_memory=full)
    again = SpeedResults.from_dict(json.loads(json.dumps(results.to_dict())))
    assert again == results
    *others, table = speed_tables(again)
    assert (table.title, [row[:3] for row in table.rows]) == (
        "Matched memory",
        [[TEACHER, "3", "4: out of memory"], ["student", "6", "7: out of memory"]],
    )
    times = full.models[1].rate("decode") / full.models[0].rate("decode")
    assert table.rows[1][5] == f"{times:.2f} x"
    assert {len(row) for row in table.rows} == {len(table.header)}
    assert all("6" not in row[1] for other in others for row in other.rows)
    (told,) = full_card(again)
    assert f"holds 6 rows of the student and 3 of the teacher, which decodes {times:.2f} times" in told


def test_it_is_asked_of_a_gpu_alone(tmp_path):
    with pytest.raises(EvaluationError, match="largest-batch: needs a GPU"):
        bench(tmp_path / "student", device="cpu", largest_batch=64)


@pytest.mark.parametrize(("part", "tokens"), [("prefill", 2 * 60), ("decode", 2)])
def test_joules_are_watts_by_seconds_by_tokens(models, monkeypatch, part, tokens):
    def clock(call, device):
        call()
        time.sleep(0.01)
        return 0.01

    monkeypatch.setattr(energy, "clock", clock)
    for name, value in (("LEAD", 0.05), ("SPAN", 0.15), ("EVERY", 0.005)):
        monkeypatch.setattr(energy, name, value)
    ids = torch.randint(3, 90, (2, 60))
    with torch.no_grad():
        for model in models.values():
            found = energy.per_token(part, model, ids, power=lambda device: 80.0)
            assert found == pytest.approx(80 * 0.01 / tokens)
    monkeypatch.setattr(energy, "SPAN", 0.01)
    with torch.no_grad(), pytest.raises(NoReading, match="too short to read"):
        energy.per_token(part, models[TEACHER], ids, power=lambda device: 80.0)
    readings = iter([80.0])

    def stops(device):
        if (found := next(readings, None)) is None:
            raise NoReading("it stopped")
        return found

    monkeypatch.setattr(energy, "SPAN", 0.15)
    with torch.no_grad(), pytest.raises(NoReading, match="it stopped"):
        energy.per_token(part, models[TEACHER], ids, power=stops)


def test_a_row_without_energy_says_why(models, monkeypatch):
    planned = speed.plan(models, [32], [1], parts=["decode"])
    results = speed.measure(models, planned, runs=3, energy=True)
    assert {point.energy_not_run for point in results.points} == {"only a GPU tells its power"}
    table, _ = speed_tables(results)
    assert table.header[-2] == "J/token"
    assert table.rows[0][-2] == "not run: only a GPU tells its power"
    gpu = torch.device("cuda")
    for error, told in (
        (ModuleNotFoundError("pynvml"), "needs nvidia-ml-py"),
        (OSError("no"), r"its power \(no\)"),
    ):

        def fails(device, error=error):
            raise error

        monkeypatch.setattr(torch.cuda, "power_draw", fails)
        with pytest.raises(NoReading, match=told):
            energy.watts(gpu)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 71_500)
    assert energy.watts(gpu) == 71.5
