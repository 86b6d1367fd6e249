"""The training loop on a toy stage: a linear regression in fp64."""

import json
import os
import signal

import pytest
import torch

from linearize.modeling.errors import TrainingError
from linearize.recipe import Finetune, Transfer
from linearize.tracking import read
from linearize.train import loop


class Rows:
    """Batch `index` is a function of the index; `poison` is the batch whose input holds a NaN."""

    fingerprint = "rows"

    def __init__(self, poison=None, masked=False):
        self.poison, self.masked = poison, masked

    def batch(self, index, *, batch_size, stage):
        rng = torch.Generator().manual_seed(index)
        x = torch.randn(batch_size, 4, generator=rng, dtype=torch.float64)
        keep = torch.rand(batch_size, generator=rng) > 0.4 if self.masked else torch.ones(batch_size) > 0
        if index == self.poison:
            x[0, 0] = float("nan")
        return {"input_ids": x, "keep": keep}


class Regression:
    """Two weight vectors of different scales, each its own group; the mean squared error over kept rows."""

    name = "transfer"

    def __init__(self):
        self.small, self.large = (torch.nn.Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(2))
        self.seen = []

    def named_parameters(self):
        return [("small", self.small), ("large", self.large)]

    def groups(self):
        return [[self.small], [self.large]]

    def settings(self):
        return {}

    def weight(self, batch):
        return int(batch["keep"].sum())

    def backward(self, batch, scale):
        x = batch["input_ids"][batch["keep"]]
        self.seen.append(x)
        target = x @ torch.arange(4.0, dtype=x.dtype)
        errors = [(x @ self.small - target).pow(2), (x @ self.large - 100 * target).pow(2)]
        loss = sum(errors).sum() / max(1, len(x))
        (loss * scale).backward()
        return {"loss": loss, "relative_error": torch.stack([e.mean() for e in errors])}


def recipe(**changes):
    """Ten steps of 4 sequences of 4 tokens."""
    given = {
        "tokens": 160,
        "batch_size": 4,
        "learning_rate": 0.1,
        "warmup_steps": 2,
        "save_every": 4,
        "clip": None,
    }
    return Transfer(**(given | changes))


def fit(folder, stage=None, config=None, corpus=None, **options):
    stage = stage or Regression()
    fitted = loop.fit(stage, config or recipe(), corpus or Rows(), folder=folder, **options)
    return stage, fitted


def weights(stage):
    return torch.cat([stage.small, stage.large]).detach().clone()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", [0.5, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15]),
        ("constant", [0.5] + [1.0] * 9),
        ("cosine", [0.5, 0.9792, 0.9188, 0.8248, 0.7063, 0.575, 0.4437, 0.3252, 0.2312, 0.1708]),
    ],
)
def test_learning_rate_follows_the_schedule(tmp_path, kind, expected):
    config = recipe(schedule=kind, final_ratio=0.15)
    if (
        kind == "linear"
    ):  # the prototype's formula: lr * min(1, (s + 1) / warm-up) * max(final_ratio, 1 - s / steps)
        assert [loop.schedule(config, s, 10) for s in range(10)] == [
            min(1, (s + 1) / 2) * max(0.15, 1 - s / 10) for s in range(10)
        ]
    fit(tmp_path, config=config)
    rates = [line["lr"] / 0.1 for line in read(tmp_path / "metrics.jsonl")]
    assert rates == pytest.approx(expected, abs=1e-4)


def test_no_warm_up_starts_at_the_full_rate():
    assert loop.schedule(recipe(warmup_steps=0), 0, 10) == 1.0


@pytest.mark.parametrize("masked", [False, True], ids=["equal batches", "unequal batches"])
def test_accumulated_batches_equal_one_large_batch(tmp_path, masked):
    class Joined(Rows):
        def batch(self, index, *, batch_size, stage):
            parts = [super(Joined, self).batch(3 * index + i, batch_size=4, stage=stage) for i in range(3)]
            return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    config = {"tokens": 480, "clip": 1.0}
    several, _ = fit(tmp_path / "a", config=recipe(accumulate=3, **config), corpus=Rows(masked=masked))
    joined, _ = fit(tmp_path / "b", config=recipe(batch_size=12, **config), corpus=Joined(masked=masked))
    assert len(several.seen) == 30
    assert len(joined.seen) == 10
    torch.testing.assert_close(weights(several), weights(joined), rtol=0, atol=1e-12)


def test_each_group_is_clipped_by_its_own_norm():
    stage = Regression()
    stage.backward(Rows().batch(0, batch_size=4, stage="transfer"), 1.0)
    before = [p.grad.clone() for _, p in stage.named_parameters()]
    norms = [loop.clip(group, 1.0) for group in stage.groups()]
    for (_, p), old, norm in zip(stage.named_parameters(), before, norms, strict=True):
        assert float(norm) == pytest.approx(float(old.norm()), rel=1e-6)
        assert float(p.grad.norm()) == pytest.approx(1.0, rel=1e-5)


def test_the_loss_falls_and_every_step_is_reported(tmp_path):
    seen = []
    _, fitted = fit(tmp_path, config=recipe(tokens=1600), progress=seen.append)
    lines = list(read(tmp_path / "metrics.jsonl"))
    assert [line["step"] for line in lines] == list(range(1, 101))
    assert [line["tokens"] for line in lines] == [16 * s for s in range(1, 101)]
    assert lines[-1]["relative_error"][0] < 0.1 * lines[0]["relative_error"][0]
    keys = {"step", "tokens", "loss", "relative_error", "lr", "grad_norm", "tokens_per_second", "seconds"}
    assert all(set(line) == keys for line in lines)
    assert (fitted.steps, fitted.tokens, fitted.metrics["loss"]) == (100, 1600, lines[-1]["loss"])
    assert [(p.done, p.total) for p in seen] == [(16 * s, 1600) for s in range(1, 101)]
    assert seen[-1].phase == "transfer"
    assert seen[-1].metrics["loss"] == lines[-1]["loss"]


@pytest.mark.parametrize(("accumulate", "place"), [(1, "step 7, batch 6;"), (2, "step 4, batch 6 to 7;")])
def test_a_nan_stops_before_the_step_and_names_the_batch(tmp_path, accumulate, place):
    config = recipe(accumulate=accumulate)
    stage, good = Regression(), Regression()
    with pytest.raises(TrainingError, match=f"transfer: loss is nan at {place} the step was not applied"):
        fit(tmp_path / "nan", stage, config, Rows(poison=6))

    good_steps = 6 // accumulate
    last = {}

    def stop_before(p):
        if p.done == good_steps * 16 * accumulate:
            last["weights"] = weights(good)

    fit(tmp_path / "good", good, config, progress=stop_before)
    assert torch.equal(weights(stage), last["weights"])
    assert stage.small.grad is None


def test_an_infinite_gradient_of_a_finite_loss_stops_too(tmp_path):
    class Steep(Regression):
        def backward(self, batch, scale):
            readings = super().backward(batch, scale)
            self.large.grad[0] = float("inf")
            return readings

    with pytest.raises(TrainingError, match=r"transfer: grad_norm is (inf|nan) at step 1, batch 0;"):
        fit(tmp_path, Steep())


def test_a_step_without_any_token_to_learn_is_named(tmp_path):
    class Masked(Rows):
        def batch(self, index, **options):
            batch = super().batch(index, **options)
            return batch | {"keep": batch["keep"] & (index != 3)}

    with pytest.raises(TrainingError, match="batch 3 has no token to learn from"):
        fit(tmp_path, corpus=Masked())


def test_a_finished_stage_is_loaded_and_not_run_again(tmp_path):
    first, fitted = fit(tmp_path)
    again, loaded = fit(tmp_path)
    assert again.seen == []
    assert torch.equal(weights(again), weights(first))
    assert loaded == fitted
    assert sorted(p.name for p in tmp_path.iterdir()) == ["done.json", "metrics.jsonl", "weights.safetensors"]


def test_starting_again_is_possible(tmp_path):
    fit(tmp_path, config=recipe(learning_rate=1.0))
    stage, _ = fit(tmp_path, resume=False)
    fresh, _ = fit(tmp_path / "fresh")
    assert torch.equal(weights(stage), weights(fresh))


@pytest.mark.parametrize("finished", [True, False])
def test_another_recipe_or_corpus_is_refused_by_key(tmp_path, finished):
    if finished:
        fit(tmp_path)
    else:
        with pytest.raises(TrainingError):
            fit(tmp_path, corpus=Rows(poison=6))
    other = Rows()
    other.fingerprint = "other rows"
    with pytest.raises(TrainingError, match=r"transfer\.learning_rate was 0.1, now 0.2") as error:
        fit(tmp_path, config=recipe(learning_rate=0.2), corpus=other)
    assert 'corpus was "rows", now "other rows"' in str(error.value)
    assert "\n" not in str(error.value)
    fit(tmp_path, config=recipe(save_every=1))  # how often it is saved does not change a result


@pytest.mark.parametrize("why", ["tokens", "parameters"])
def test_a_stage_with_nothing_to_do_says_so(tmp_path, why):
    class Empty(Regression):
        def named_parameters(self):
            return []

    stage, fitted = fit(tmp_path, *((Empty(),) if why == "parameters" else (None, recipe(tokens=0))))
    assert (fitted.steps, stage.seen) == (0, [])
    assert json.loads((tmp_path / "done.json").read_text())["skipped"] is not None
    assert fit(tmp_path, *((Empty(),) if why == "parameters" else (None, recipe(tokens=0))))[1] == fitted


def test_ctrl_c_finishes_the_step_saves_and_resumes_exactly(tmp_path):
    whole, _ = fit(tmp_path / "whole")
    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell started the tests in the background

    def press(p):
        if p.done == 16 * 6:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", progress=press)
    assert [p.name for p in tmp_path.glob("cut/checkpoint-*")] == ["checkpoint-00000006"]
    assert signal.getsignal(signal.SIGINT) is before
    resumed, _ = fit(tmp_path / "cut")
    assert len(resumed.seen) == 4
    assert torch.equal(weights(resumed), weights(whole))
    assert len(list(read(tmp_path / "cut" / "metrics.jsonl"))) == 10


def test_metrics_beyond_the_checkpoint_are_dropped_on_resume(tmp_path):
    with pytest.raises(TrainingError):
        fit(tmp_path, corpus=Rows(poison=6))  # saved at 4, did 6
    path = tmp_path / "metrics.jsonl"
    assert len(list(read(path))) == 6
    with path.open("a") as file:
        file.write('{"step": 7, "los')  # the process died while writing
    fit(tmp_path)
    assert [line["step"] for line in read(path)] == list(range(1, 11))


def test_a_damaged_checkpoint_is_named(tmp_path):
    with pytest.raises(TrainingError):
        fit(tmp_path, corpus=Rows(poison=6))
    damaged = tmp_path / "checkpoint-00000004" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(TrainingError, match=r"optimizer\.safetensors: cannot be read .* to start again"):
        fit(tmp_path)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop.disk, "save_file", full)
    with pytest.raises(
        TrainingError, match=r"cannot be written \(No space left on device\); free some space"
    ):
        fit(tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_training_leaves_the_callers_random_state_alone(tmp_path):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    fit(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_cpu_run_after_a_bf16_run_in_one_process(tmp_path):
    fit(tmp_path / "a", precision="bf16")
    fit(tmp_path / "b", precision="fp32")


def test_finetune_recipe_is_as_good_as_transfer(tmp_path):
    class Second(Regression):
        name = "finetune"

    fit(tmp_path, Second(), Finetune(tokens=160, batch_size=4))
