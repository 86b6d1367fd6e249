"""`linearize tune`: which kernels are timed in which run, what is kept, and what it says without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from linearize import tune as module_of  # the package gives its functions; the module is beside them
from linearize.cli import app
from linearize.modeling.errors import LinearizeError
from linearize.modeling.launches import CANDIDATES, TABLE, Launch, launch
from linearize.modeling.registry import METHODS
from linearize.modeling.tuned import forget_rows, listening, read_rows
from linearize.tune import Run, Sizes, runs, tune

CPU = torch.device("cpu")
SIZES = Sizes(heads=4, kv_heads=2, head_dim=16, tokens=160, batch=2, dtype=torch.float32)
FIRST, SECOND, BROKEN = Launch({"BLOCK": 64}, 4, 2), Launch({"BLOCK": 32}, 4, 2), Launch({"BLOCK": 256}, 4, 2)
CONVERTING = [name for name, method in METHODS.items() if method.mixer is not None]


@pytest.fixture
def invented(monkeypatch, tmp_path):
    """Two kernels, launched by a prefill and by both; a clock that reads a setting's block; the file of rows."""
    file = tmp_path / "launches.json"
    monkeypatch.setenv("LINEARIZE_LAUNCHES", str(file))
    forget_rows()
    for tables, one, two in (
        (TABLE, [FIRST], [FIRST]),
        (CANDIDATES, [FIRST, SECOND, BROKEN], [FIRST, SECOND]),
    ):
        monkeypatch.setitem(tables, "one", one)
        monkeypatch.setitem(tables, "two", two)
    taken: dict[str, Launch] = {}

    def use(*kernels: str, key_dim: int = 128) -> None:
        for kernel in kernels:
            taken[kernel] = launch(kernel, CPU, K=key_dim)
            if taken[kernel] == BROKEN:
                raise RuntimeError("too much\nshared memory")

    def fake_runs(method, sizes, device):
        yield Run(f"{method}: prefill", lambda: use("one"))
        yield Run(f"{method}: training", lambda: use("one", "two"))
        yield Run(f"{method}: other", lambda: use("two", key_dim=64) if method == "liger" else None)

    def clock(call, budget=20.0):
        call()
        return {"one": 1.0, "two": 2.0}[list(taken)[-1]] * taken[list(taken)[-1]].blocks["BLOCK"] / 64

    monkeypatch.setattr(module_of, "_device", lambda: CPU)
    monkeypatch.setattr(module_of, "runs", fake_runs)
    monkeypatch.setattr(module_of, "milliseconds", clock)
    yield file
    forget_rows()


def test_every_kernel_is_timed_once_at_its_widths_in_the_first_run_that_launches_it(invented):
    found = tune(methods=["lolcats", "liger"])
    assert [(t.row.kernel, t.row.K, t.run) for t in found] == [
        ("one", 128, "lolcats: prefill"),
        ("two", 128, "lolcats: training"),
        ("two", 64, "liger: other"),
    ]
    assert all(t.row.launch == SECOND for t in found)
    assert found[0].milliseconds == {0: 1.0, 1: 0.5}  # the candidate that cannot be launched is left out
    assert (found[0].row.milliseconds, found[0].row.default_milliseconds) == (0.5, 1.0)


def test_rows_are_kept_in_the_file_and_timed_anew_in_place(invented):
    tune(methods=["lolcats"])
    assert [row.kernel for row in tune(["two"], methods=["lolcats"]) for row in [row.row]] == ["two"]
    rows = read_rows(invented)
    assert [(row.kernel, row.device, row.launch) for row in rows] == [
        ("one", "cpu", SECOND),
        ("two", "cpu", SECOND),
    ]
    assert all(row.date and "torch" in row.versions for row in rows)


@pytest.mark.parametrize(
    ("pairs", "kept"),
    [
        ([(1.0, 0.985)] * 5, FIRST),  # by less than noise
        ([(1.0, 0.9)] * 4 + [(1.0, 1.01)], FIRST),  # not in every round
        (
            [(1.0, 0.97), (2.0, 1.9), (1.0, 0.9), (0.5, 0.45), (1.0, 0.97)],
            SECOND,
        ),  # beside a clock that drifts
        ([(1.0, 1.2)] * 5, FIRST),
    ],
)
def test_a_candidate_is_kept_for_a_gain_beyond_noise_in_every_round(invented, monkeypatch, pairs, kept):
    # The default alone, then just before the other.
    times = iter([time for pair in pairs for time in (pair[0], *pair)])
    monkeypatch.setattr(module_of, "milliseconds", lambda call: next(times))
    (found,) = tune(["two"], methods=["lolcats"])
    assert found.row.launch == kept and next(times, None) is None


@pytest.mark.parametrize("texts", [1, 3, 64])
def test_a_step_is_timed_from_a_graph_over_a_whole_period_of_every_text(invented, monkeypatch, texts):
    """The GPU is a counter: a step takes as many milliseconds as its setting's block has."""
    now, recorded = [0], []

    class Event:
        def __init__(self, enable_timing):
            self.at = 0

        def record(self):
            self.at = now[0]

        def synchronize(self): ...

        def elapsed_time(self, end):
            return float(end.at - self.at)

    def step():
        now[0] += launch("two", CPU, K=16).blocks["BLOCK"]

    def record(function):
        before = now[0]
        function()
        spent, now[0] = now[0] - before, before  # recording runs nothing
        recorded.append(spent)
        return lambda: now.__setitem__(0, now[0] + spent)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(module_of, "record", record)
    monkeypatch.setattr(module_of, "runs", lambda *_: iter([Run("decode", step, texts)]))
    (found,) = tune(["two"], methods=["lolcats"])
    assert found.milliseconds == {0: 64.0, 1: 32.0} and found.row.launch == SECOND
    steps = recorded[0] // 64
    assert steps % texts == 0 and module_of.FOLDING % (steps // texts) == 0


def test_a_run_that_fails_leaves_the_others(invented, monkeypatch):
    def failing(method, sizes, device):
        yield Run("fails", lambda: 1 / 0)
        yield Run("works", lambda: launch("two", CPU))

    monkeypatch.setattr(module_of, "runs", failing)
    monkeypatch.setattr(module_of, "milliseconds", lambda call: 1.0)
    assert [t.run for t in tune(methods=["lolcats"])] == ["works"]


@pytest.mark.parametrize(
    ("kernels", "methods", "line"),
    [
        (["on"], None, "'on' is no kernel with candidates; did you mean 'one'?"),
        ([], ["lolcat"], "'lolcat' is no method with a mixer; did you mean 'lolcats'?"),
        ([], ["softmax"], "'softmax' is no method with a mixer"),
    ],
)
def test_an_unknown_name_is_refused(invented, kernels, methods, line):
    with pytest.raises(LinearizeError, match=line.replace("?", r"\?")):
        tune(kernels, methods=methods)


def test_nothing_launched_is_said(invented, monkeypatch):
    monkeypatch.setattr(module_of, "runs", lambda *_: iter([Run("none", lambda: None)]))
    with pytest.raises(LinearizeError, match="no run of lolcats launches one here"):
        tune(["one"], methods=["lolcats"])


def test_a_malformed_file_is_told_before_anything_is_timed(invented):
    invented.write_text("{")
    with pytest.raises(LinearizeError, match="not a readable JSON file"):
        tune()
    assert invented.read_text() == "{"


@pytest.mark.parametrize("method", CONVERTING)
def test_every_method_runs_in_every_way(method):
    names = []
    for run in runs(method, SIZES, CPU):
        with listening():
            run.call()
            run.call()  # as often as it is timed
        names.append(run.name)
    assert names[:2] == [f"{method}: decode, B=2", f"{method}: decode, B=1"]
    assert [name.split(",")[0] for name in names[2:]] == [
        f"{method}: {kind}" for kind in ("prefill", "training", "transfer")
    ]


def test_the_verb_prints_its_rows(invented):
    done = CliRunner().invoke(app, ["tune", "--method", "lolcats"])
    assert done.exit_code == 0, done.output
    line = "one K=128  BLOCK=32 warps=4 stages=2  0.5 ms  1 ms by default  lolcats: prefill"
    assert line in done.output and f"Rows: {invented}" in done.output
    done = CliRunner().invoke(app, ["tune", "two", "--method", "lolcats", "--json"])
    tree = json.loads(done.output.splitlines()[-1])
    assert tree["file"] == str(invented) and [row["kernel"] for row in tree["rows"]] == ["two"]


def test_heads_that_do_not_divide_are_refused():
    done = CliRunner().invoke(app, ["tune", "--heads", "6", "--kv-heads", "4"])
    assert done.exit_code == 2 and "--kv-heads: 4 does not divide 6 heads" in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line_and_code_2():
    command = [sys.executable, "-m", "linearize", "tune"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2
    assert (
        done.stderr == "error: tune: torch finds no GPU; run it on the machine whose GPU runs the kernels\n"
    )
