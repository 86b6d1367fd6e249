"""Kill -9, a full disk and Ctrl-C leave old or new, never half; what goes on ends with the bits of an undisturbed run.

``evals/faults/run.py`` does the same at some hundred random moments.
"""

import os
import random
import signal

import pytest
import torch
from faults import Fault, attempt, broken, differences, expected
from test_run import WORDS, teacher  # noqa: F401  a fixture

import linearize.run  # noqa: F401  imported before the forks
from linearize import interrupt
from linearize.data import sampling
from linearize.modeling.errors import DataError
from linearize.teacher import load_teacher


def test_faults_in_every_part_of_a_run_cost_nothing_but_time(teacher, tmp_path):  # noqa: F811
    words = ["run", str(teacher), *(word for word in WORDS if not word.startswith("control"))]
    words += ["transfer.save_every=2", "finetune.save_every=2"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert attempt([*words, f"output={whole}"], whole, None, tmp_path).code == 0
    rng = random.Random()  # any moment will do; the message of a failure has it
    faults = [
        Fault("kill", "", rng.randint(1, 4)),
        Fault("full", "data", rng.randint(1, 3)),
        Fault("kill", "transfer", rng.randint(1, 12)),
        Fault("full", "transfer", 1),
        Fault("kill", "finetune", rng.randint(1, 12)),
        Fault("press", "finetune", 2),
        Fault("full", "student", rng.randint(1, 15)),
        Fault("kill", "student", rng.randint(1, 60)),
    ]
    for fault in faults:
        outcome = attempt([*words, f"output={run}"], run, fault, tmp_path)
        assert expected(fault, outcome), (faults, fault, outcome)
        assert outcome.injected, (faults, fault, outcome)
        assert broken(run) == [], (faults, fault, outcome)
    last = attempt([*words, f"output={run}"], run, None, tmp_path)
    assert last.code == 0, (faults, last)
    assert differences(run, whole) == [], faults


def test_samples_of_a_stopped_run_are_kept_and_gone_on_from(teacher, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sampling, "CPU_ROWS", 2)
    from linearize.recipe import Teacher

    model, tokenizer = load_teacher(Teacher(name=str(teacher)))
    sample = dict(tokens=96, row_len=16, seed=3)
    whole = sampling.sample_pool(model, tokenizer, **sample)
    pressed = []

    def press(at):
        if at.done > 32 and not pressed:
            pressed.append(at.done)
            os.kill(os.getpid(), signal.SIGINT)

    part = tmp_path / "self.part"
    with interrupt.catching(), pytest.raises(interrupt.Stopped, match="2 of 3 parts are kept"):
        sampling.sample_pool(model, tokenizer, **sample, part=part, progress=press)
    heard = []
    resumed = sampling.sample_pool(
        model, tokenizer, **sample, part=part, progress=lambda at: heard.append(at.done)
    )
    assert torch.equal(torch.from_numpy(resumed.tokens), torch.from_numpy(whole.tokens))
    assert min(heard) > 64  # the first two parts were not made again
    part.write_bytes(b"no tensors")
    with pytest.raises(DataError, match="remove the file to sample anew"):
        sampling.sample_pool(model, tokenizer, **sample, part=part)


def test_the_second_ctrl_c_stops_at_once_and_the_handler_comes_back():
    before = signal.getsignal(signal.SIGINT)
    with interrupt.catching(), interrupt.catching():
        assert not interrupt.asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert not interrupt.asked()
