"""A process that is killed at any moment, and started again, ends with the bits of one that was left alone."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_finetune import BOTH
from test_transfer import Text, student

from linearize.recipe import Finetune, Transfer
from linearize.tracking import read
from linearize.train.finetune import finetune
from linearize.train.transfer import transfer

STEPS = 24


def train(stage: str, folder: Path, pause: float = 0.0) -> None:
    """One stage on a tiny model, saved every 5 steps; the recipe draws random numbers (dropout) and accumulates."""
    torch.set_num_threads(1)
    common = {"tokens": STEPS * 128, "batch_size": 2, "accumulate": 2, "save_every": 5}

    def watch(_progress):
        time.sleep(pause)  # long enough for the killer to hit any step

    if stage == "transfer":
        transfer(student(), Text(), Transfer(**common), folder=folder, seed=7, progress=watch)
    else:
        config = Finetune(**common, **BOTH, lora={"dropout": 0.1}, train_mixer=True)
        model, _ = finetune(student(), Text(), config, folder=folder, seed=7, progress=watch)
        model.save_pretrained(folder / "merged")


def spawn(stage: str, folder: Path, pause: float = 0.0) -> subprocess.Popen:
    code = f"import test_resume; test_resume.train({stage!r}, test_resume.Path({str(folder)!r}), {pause})"
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths})


@pytest.mark.parametrize("stage", ["transfer", "finetune"])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, stage):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(stage, whole)

    step = random.randrange(6, STEPS - 1)  # any step will do; the message of a failure names it
    process = spawn(stage, killed, pause=0.1)
    deadline = time.monotonic() + 120
    while sum(1 for _ in read(killed / "metrics.jsonl")) < step:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (killed / "done.json").exists()
    saved = sorted(p.name for p in killed.glob("checkpoint-*") if p.suffix != ".tmp")
    assert saved, f"killed at step {step}"

    seen = []
    train_here = spawn(stage, killed)
    assert train_here.wait() == 0, f"resuming after a kill at step {step}"
    lines, expected = (list(read(folder / "metrics.jsonl")) for folder in (killed, whole))
    for line, other in zip(lines, expected, strict=True):
        assert {k: v for k, v in line.items() if "second" not in k} == {
            k: v for k, v in other.items() if "second" not in k
        }, f"killed at step {step}"
        seen.append(line["step"])
    assert seen == list(range(1, STEPS + 1))
    for name in ["weights.safetensors"] + (["merged/model.safetensors"] if stage == "finetune" else []):
        ours, theirs = load_file(killed / name), load_file(whole / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), f"{name}, killed at step {step}"
    assert not list(killed.glob("checkpoint-*"))


@pytest.mark.parametrize("instant", ["mkdir", "rename", "rmtree"])
def test_a_kill_while_a_checkpoint_is_written_loses_at_most_that_checkpoint(tmp_path, monkeypatch, instant):
    """The process dies at the second checkpoint: before its folder, before its renaming, before the old one goes."""
    from linearize.train import resume as disk

    class Killed(BaseException):
        pass

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train("transfer", whole)
    calls = {"count": 0}

    def dying(name, real):
        def call(*given, **options):
            calls["count"] += 1
            if calls["count"] == 2:
                raise Killed(name)
            return real(*given, **options)

        return call

    with monkeypatch.context() as patch:
        if instant == "mkdir":
            patch.setattr(disk, "save_checkpoint", dying(instant, disk.save_checkpoint))
        elif instant == "rename":
            patch.setattr(disk.os, "rename", dying(instant, disk.os.rename))
        else:
            patch.setattr(disk, "drop_checkpoints", dying(instant, disk.drop_checkpoints))
        with pytest.raises(Killed):
            train("transfer", cut)
    train("transfer", cut)
    ours, theirs = load_file(cut / "weights.safetensors"), load_file(whole / "weights.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert sorted(p.name for p in cut.iterdir()) == ["done.json", "metrics.jsonl", "weights.safetensors"]
