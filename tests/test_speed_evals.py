"""The speed benchmarks, tried on a CPU with invented cases: what they promise about rows, failures and tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SPEED = Path(__file__).parents[1] / "evals" / "speed"
SCRIPT = SPEED / "kernels.py"

CASES = """
import os
import time
import torch
from case import Case
from measure import NotRun

def product(batch, length):
    x = torch.ones(batch, length)
    return lambda: x @ x.T

def wrong():
    raise AssertionError("differs by 0.5\\nat [0, 0]")

def exhausted(batch, length):
    raise torch.cuda.OutOfMemoryError("no room")

def absent(batch, length):
    raise NotRun("its library is not installed")

{cases}
"""
PEERS = """
CASES = [
    Case("peers", "softmax, cuDNN, forward", product, peer=True, lengths=(2048, 8192)),
    Case("peers", "absent, forward", absent, peer=True, lengths=(2048,)),
    Case("decode", "softmax, cuDNN, KV cache, B=2", product, peer=True, lengths=(2048, 8192), batch=2),
    Case("decode", "softmax, cuDNN, KV cache, B=3", product, peer=True, lengths=(2048,), batch=3),
]
"""
GOOD = """
CASES = [
    Case("good", "ours, forward", product, lengths=(2048, 8192), target_ms=1e6, check=lambda: None),
    Case("good", "too slow, forward", product, lengths=(2048,), target_ms=1e-9),
    Case("good", "red, forward", product, lengths=(2048,), check=wrong),
    Case("good", "backward, forward+backward", product, lengths=(2048,)),
    Case("good", "large, forward+backward", exhausted, lengths=(2048,)),
    Case("decode", "ours, B=2", product, lengths=(2048,), batch=2),
]
"""
DYING = """
def die(batch, length):
    if length == 8192:
        os._exit(3)
    return product(batch, length)

CASES = [Case("dying", "theirs, forward", die, lengths=(2048, 8192))]
"""
SWEPT = """
from linearize.modeling.launches import CANDIDATES, Launch

CANDIDATES["invented"] = [Launch({"BLOCK": 64}, 4, 2, 1000), Launch({"BLOCK": 32}, 8, 1), Launch({"BLOCK": 1}, 1, 1)]
CASES = []

def trial(launch, batch, length):
    if launch.blocks["BLOCK"] == 1:
        raise ValueError("too small")
    return lambda: time.sleep(0.004 if launch.warps == 8 else 0.001)

SWEEPS = {"invented": trial}
"""


def measured(tmp_path, words, **families):
    """Exit code, rows and output of a run over invented families."""
    for name, cases in families.items():
        (tmp_path / f"cases_{name}.py").write_text(CASES.format(cases=cases))
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, str(SCRIPT), "--device=cpu", f"--cases={tmp_path}", "--milliseconds=5"]
    done = subprocess.run([*command, f"--output={out}", *words], capture_output=True, text=True, timeout=300)
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return done, rows


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases")
    return measured(folder, [], peers=PEERS, good=GOOD, dying=DYING)


def row_of(rows, name, length=2048):
    (row,) = [r for r in rows if r["kind"] == "time" and r.get("name") == name and r["T"] == length]
    return row


def test_a_row_says_what_was_measured_and_where(benchmark):
    _, rows = benchmark
    row = row_of(rows, "ours, forward")
    assert (row["group"], row["B"], row["T"], row["pass"]) == ("good", 16, 2048, "forward")
    assert 0 < row["p20_ms"] <= row["ms"] <= row["p80_ms"] and row["calls"] >= 3
    assert row["ms_32k"] == row["ms"] and row["met"]
    assert row_of(rows, "ours, forward", 8192)["B"] == 4
    for key in ("device", "torch", "triton", "commit", "date"):
        assert row[key], key
    assert not row_of(rows, "too slow, forward")["met"]


def test_a_ratio_is_to_softmax_of_the_same_length_pass_and_batch(benchmark):
    done, rows = benchmark
    softmax = row_of(rows, "softmax, cuDNN, forward", 8192)
    ours = row_of(rows, "ours, forward", 8192)
    assert ours["softmax_over_this"] == pytest.approx(softmax["ms_32k"] / ours["ms_32k"], rel=0.02)
    assert "softmax_over_this" not in row_of(rows, "backward, forward+backward")
    # A decode step of ours takes as long at any length: one figure, beside softmax at every length.
    step = row_of(rows, "ours, B=2")
    for length in (2048, 8192):
        cached = row_of(rows, "softmax, cuDNN, KV cache, B=2", length)["ms"]
        assert step["softmax_over_this_at"][str(length)] == pytest.approx(cached / step["ms"], rel=0.02)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("| decode | ours, B=2")]
    assert line.count("(x") == 2


def test_what_cannot_be_timed_says_why(benchmark):
    done, rows = benchmark
    red = row_of(rows, "red, forward")
    assert red["not_run"] == "its check is red: AssertionError: differs by 0.5 at [0, 0]" and "ms" not in red
    assert row_of(rows, "large, forward+backward")["not_run"] == "out of memory"
    assert row_of(rows, "absent, forward")["not_run"] == "its library is not installed"
    assert done.returncode == 1


def test_a_family_that_takes_its_process_down_loses_its_own_rows_only(benchmark):
    _, rows = benchmark
    assert "ms" in row_of(rows, "ours, forward", 8192)
    dying = [r for r in rows if r["family"] == "dying" and r["kind"] == "time"]
    assert "ms" in dying[0] and dying[-1]["not_run"] == "its process ended with code 3"


def test_every_family_reports_its_cold_start(benchmark):
    _, rows = benchmark
    total = {
        row["name"]: row["seconds"] for row in rows if row["kind"] == "cold start" and row["group"] == "all"
    }
    assert set(total) == {"good", "dying"}  # others' kernels are not ours to start


def test_the_table_shows_every_row(benchmark, tmp_path):
    done, rows = benchmark
    for words in ("all its cases compiled", "out of memory", "microseconds a step", "| 2K | 8K |"):
        assert words in done.stdout
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(SCRIPT), "--table", str(tmp_path / "rows.jsonl")]
    assert subprocess.run(command, capture_output=True, text=True).stdout == done.stdout


def test_a_sweep_names_the_best_candidate(tmp_path):
    done, rows = measured(tmp_path, ["--sweep=all", "--jobs=1"], swept=SWEPT)
    assert [(row["number"], row["B"], "ms" in row) for row in rows] == [
        (n, b, n < 2) for b in (1, 16) for n in range(3)
    ]
    assert """    "invented": [Launch({'BLOCK': 64}, 4, 2, 1000)],""" in done.stdout
    assert "ValueError: too small" in done.stdout


def test_a_plot_is_made_or_said_to_be_missing(tmp_path, benchmark):
    _, rows = benchmark
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    image = tmp_path / "plot.svg"
    command = [sys.executable, str(SCRIPT), "--plot", str(image), str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert image.exists() or "matplotlib is missing" in done.stderr


def test_every_real_case_imports(tmp_path):
    done = subprocess.run([sys.executable, str(SCRIPT), "--dry"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "softmax, cuDNN, forward+backward" in done.stdout


def test_without_a_gpu_nothing_is_measured():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "kernels.py: torch finds no GPU; --dry lists the cases\n"


def test_a_cold_start_is_a_new_process_and_then_another(tmp_path):
    out = tmp_path / "rows.jsonl"
    words = ["--device=cpu", "--methods=lolcats", "--parts=training", f"--output={out}"]
    done = subprocess.run([sys.executable, SPEED / "cold.py", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["seconds"] > 0 and row["seconds_cached"] > 0 and "not_run" not in row
    assert f"| lolcats | {row['seconds']:.1f} ({row['seconds_cached']:.1f}) |" in done.stdout
    words = ["--device=cpu", "--methods=lolcat"]
    done = subprocess.run([sys.executable, SPEED / "cold.py", *words], capture_output=True, text=True)
    assert done.returncode == 2 and "lolcat: none of lolcats, liger" in done.stderr


MODELS = SPEED / "models.py"


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "rows.jsonl"
    command = [sys.executable, str(MODELS), "--tiny", "--students=lolcats", f"--output={out}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done, [json.loads(line) for line in out.read_text().splitlines()]


def test_models_are_measured_in_every_part(tiny_models):
    _, rows = tiny_models
    assert {(row["part"], row["model"]) for row in rows} == {
        (part, model) for part in ("prefill", "decode", "train") for model in ("teacher", "lolcats")
    }
    for row in rows:
        assert row["ms"] > 0 and row["tokens_per_second"] > 0, row
        assert row["device"] and row["torch"] and row["commit"] and row["date"] and row["layers"] == 2
    stages = {row["stage"]: row for row in rows if row["part"] == "train"}
    assert stages.keys() == {"forward alone", "transfer", "finetune"}
    assert 0 < stages["transfer"]["of_forward"] < 2


def test_what_models_keep_is_counted(tiny_models):
    _, rows = tiny_models
    kept = {(row["model"], row["T"]): row["kept_bytes"] for row in rows if row["part"] == "prefill"}
    assert (
        kept["teacher", 256] == 2 * kept["teacher", 128] == 256 * 2 * 2 * 2 * 16 * 4
    )  # layers, k and v, G, K, fp32
    assert kept["lolcats", 256] == kept["lolcats", 128]


def test_the_models_table_is_made_of_the_rows(tiny_models, tmp_path):
    done, rows = tiny_models
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(MODELS), "--table", str(tmp_path / "rows.jsonl")]
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.stdout == done.stdout and "faster from T =" in done.stdout


def test_a_crossover_lies_between_the_lengths_it_is_between(monkeypatch):
    monkeypatch.syspath_prepend(str(SPEED))
    from models_shown import crossover

    teacher = {1024: 1.0, 4096: 16.0}
    assert (
        crossover(teacher, {1024: 2.0, 4096: 8.0}) == "2,048"
    )  # straight lines of logarithms meet in the middle
    assert crossover(teacher, {1024: 0.5, 4096: 1.0}) == "below 1K"
    assert crossover(teacher, {1024: 0.5, 4096: 99.0}) == "below 1K, not throughout"
    assert crossover(teacher, {1024: 9.0, 4096: 99.0}) == "above 4K"
    assert crossover(teacher, {}) == ""
