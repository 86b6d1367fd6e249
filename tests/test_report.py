"""Tables say what was measured, on what, with counts and intervals; results survive JSON."""

import json
import math
from dataclasses import replace

import pytest

from linearize.evaluate import Bucket, Cell, LayerMemory, Likelihood, Memory, Results
from linearize.report import markdown, tables
from linearize.words import bytes_text


def measured(ppl: float, kl: float) -> Likelihood:
    between = {
        "ppl": (ppl - 1, ppl + 1),
        "kl": (kl / 2, kl * 2),
        "top1": (0.8, 0.9),
        "ppl_difference": (-0.25, 0.5),
    }
    return Likelihood(
        ppl, kl, 0.85, 4096, 4, between, [Bucket(0, 64, 256, ppl, kl, 0.85)], [1.0] * 4, [kl * 1024] * 4
    )


@pytest.fixture
def results():
    names = ["teacher", "lolcats", "window"]
    return Results(
        source="held-out samples of the teacher",
        models=names,
        seed=0,
        likelihood={
            1024: dict(
                zip(names, (measured(30, 0), measured(31.5, 0.125), measured(33, math.nan)), strict=True)
            )
        },
        recall=[
            Cell(
                name, "passkey", 512, correct, 50, 0.1, 0.9, 500.0, "d", "1" * correct + "0" * (50 - correct)
            )
            for name, correct in zip(names[:2], (50, 25), strict=True)
        ],
        memory={
            "teacher": Memory([LayerMemory(0, 1024, None), LayerMemory(0, 1024, None)]),
            "lolcats": Memory([LayerMemory(100_000, 1024, 0), LayerMemory(0, 512, None)]),
            "window": Memory([LayerMemory(65_536, 1024, 0), LayerMemory(0, 1024, 512)]),
            "still": Memory([LayerMemory(65_536, 1024, 0, 63.5), LayerMemory(65_536, 1024, 0)]),
        },
        windows={1024: "abc"},
    )


def test_markdown_names_text_counts_and_intervals(results):
    text = markdown(results)
    assert "held-out samples of the teacher" in text
    assert (
        "| 1,024 | lolcats | 31.50 [30.50, 32.50] | [-0.25, +0.50] "
        "| 0.125 [0.062, 0.250] | 0.850 [0.800, 0.900] | 4 x 1,024 |" in text
    )
    assert "| passkey | 512 | 100 % [10, 90] | 50 % [10, 90] | not run | 50 |" in text
    assert "| teacher | 0 B | 2.0 KiB | 2.0 MiB | 16.0 MiB | 64.0 MiB |" in text
    assert "| window | 64.0 KiB | 0 B | 576 KiB (28 %) | 576 KiB (4 %) | 576 KiB (1 %) |" in text
    assert "| still | 128 KiB | 64 B | 192 KiB (9 %) | 636 KiB (4 %) | 2.1 MiB (3 %) |" in text
    assert "| 0 to 63 |" in text


def test_the_student_is_set_against_the_control_pair_by_pair(results):
    window = [
        measured(33, 0.25),
        Cell("window", "passkey", 512, 19, 50, 0.1, 0.9, 500.0, "d", "1" * 19 + "0" * 31),
    ]
    results.likelihood[1024]["window"] = window[0]
    results.recall.append(window[1])
    text = markdown(results)
    assert "| KL | 1,024 | window | -0.125 [-0.125, -0.125] | 4 windows |" in text
    told = "+12 points, 6 won, 0 lost, p = 0.031 (teacher below 80 %)"
    assert f"| passkey | 512 | window | {told} | 50 prompts |" in text
    results.recall[0] = replace(results.recall[0], low=0.93)
    assert "p = 0.031 | 50 prompts |" in markdown(results)


def test_every_row_is_as_wide_as_its_header(results):
    for table in tables(results, buckets=True):
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.header)}


def test_nothing_measured_no_table(results):
    bare = Results(results.source, ["teacher"], 0, {}, [], {})
    assert tables(bare) == []


def test_results_survive_json(results):
    text = json.dumps(results.to_dict(), allow_nan=False)
    again = Results.from_dict(json.loads(text))
    assert again.to_dict() == results.to_dict()
    assert markdown(again) == markdown(results)
    assert again.cell("lolcats", "passkey", 512).correct == 25
    with pytest.raises(KeyError):
        again.cell("window", "passkey", 512)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (200 << 20, "200 MiB"), (5 << 40, "5120 GiB")],
)
def test_bytes(count, text):
    assert bytes_text(count) == text
