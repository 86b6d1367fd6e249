"""The only training loop. A stage says what trains and what the loss is; everything else happens here, in
view.

Exactness: a run that is killed and resumed ends with the same bits as one that was not. The batch of a step
is a function of its number, the learning rate likewise; weights, AdamW's moments and the random states come
from the checkpoint (see resume.py).

Several processes (`accelerate launch`): each takes every n-th batch; see processes.py.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor

from linearize import interrupt
from linearize.modeling.errors import TrainingError
from linearize.progress import Progress, Watch
from linearize.recipe import Finetune, Transfer
from linearize.tracking import MetricsWriter
from linearize.train import resume as disk
from linearize.train.processes import any_process, make_accelerator, sum_gradients, sum_of_processes

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]
Recipe = Transfer | Finetune


class Stage(Protocol):
    """What trains, and on which loss."""

    name: str

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The parameters that train; their names are the keys of the checkpoint."""
        ...

    def groups(self) -> list[list[torch.nn.Parameter]]:
        """The same parameters in the groups whose gradients are clipped separately."""
        ...

    def weight(self, batch: Batch) -> int:
        """How many tokens the batch's loss is the mean of; a step's loss is the mean over all its tokens."""
        ...

    def backward(self, batch: Batch, scale: float) -> Mapping[str, Tensor]:
        """Add the gradients of `scale` * loss; return `loss` and other readings (scalars or vectors)."""
        ...

    def settings(self) -> Mapping[str, Any]:
        """What, besides the recipe and the data, a resumed run must have in common with the first."""
        ...


class Corpus(Protocol):
    """Batches by number."""

    @property
    def fingerprint(self) -> str: ...

    def batch(self, index: int, *, batch_size: int, stage: str) -> Batch: ...


@dataclass(frozen=True)
class Fitted:
    """What a finished stage reports; `seconds` is training time over all its resumed parts."""

    steps: int
    tokens: int
    seconds: float
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Position:
    """Where a stage stands: what a checkpoint stores besides tensors."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)


def fit(
    stage: Stage,
    config: Recipe,
    corpus: Corpus,
    *,
    folder: Path,
    seed: int = 0,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    progress: Watch | None = None,
    resume: bool = True,
) -> Fitted:
    """Train `stage` by `config` (`recipe.transfer` or `.finetune`) in `folder`, or load it when it is done.

    A folder with a checkpoint is continued, one of another recipe is refused; `resume=False` starts again.
    Ctrl-C finishes the step, saves, and raises :class:`linearize.interrupt.Stopped`, a KeyboardInterrupt; a second
    Ctrl-C stops at once.
    """
    folder = Path(folder)
    accelerator = make_accelerator(device, precision)
    parameters = dict(stage.named_parameters())
    settings = {
        "stage": stage.name,
        "seed": seed,
        "precision": precision,
        "processes": accelerator.num_processes,
        "corpus": corpus.fingerprint,
        stage.name: recipe_of(config),
        **stage.settings(),
    }

    if not resume and accelerator.is_main_process:
        disk.forget(folder)
    accelerator.wait_for_everyone()
    if (folder / "done.json").exists():
        return _load_finished(folder, settings, parameters)
    if not parameters or not config.tokens:
        why = "nothing to train" if not parameters else "tokens is 0"
        logger.info("%s: skipped, %s", stage.name, why)
        return _finish(accelerator, folder, stage, settings, {}, _Position(), skipped=why)

    randomness = disk.own_randomness(seed + accelerator.process_index, accelerator.device)
    with randomness, interrupt.catching():
        return _train(stage, config, corpus, folder, accelerator, parameters, settings, progress)


def _train(
    stage: Stage,
    config: Recipe,
    corpus: Corpus,
    folder: Path,
    accelerator: Accelerator,
    parameters: dict[str, torch.nn.Parameter],
    settings: dict[str, Any],
    progress: Watch | None,
) -> Fitted:
    trained = list(parameters.values())
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    batches = _Batches(stage, config, corpus, accelerator)
    steps = max(1, config.tokens // batches.tokens_a_step)

    # Once: the first weights, or those of the checkpoint
    at = _resume(folder, settings, parameters, optimizer, accelerator)
    for parameter in trained if accelerator.num_processes > 1 else []:
        broadcast(parameter.data)

    def save() -> None:
        rng = gather_object([disk.rng_state(accelerator.device)])
        if accelerator.is_main_process:
            state = {"format": 1, **asdict(at), "steps": steps, "settings": settings, "rng": rng}
            disk.save_checkpoint(folder, state, parameters, optimizer)
        accelerator.wait_for_everyone()

    with _metrics_file(folder, at.step, accelerator) as write:
        while at.step < steps:
            started = time.perf_counter()

            # Learning rate: a function of the step alone
            lr = config.learning_rate * schedule(config, at.step, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # Gradients: of the mean over the tokens of all batches of the step
            readings: dict[str, Tensor] = {}
            for batch, scale in batches.of_step(at.step):
                with accelerator.autocast():
                    _add(readings, stage.backward(batch, scale), scale)
            if not any_process(accelerator, any(p.grad is not None for p in trained)):
                raise TrainingError(
                    f"{stage.name}: batch {batches.span(at.step)} reaches no parameter; a sequence within the window "
                    "of its method teaches nothing: give longer texts, raise data.seq_len or lower method.window"
                )
            sum_gradients(accelerator, trained, readings)

            # Clipping: each group by its own norm; nothing is applied unless everything is finite
            norms = [clip(group, config.clip) for group in stage.groups()]
            line = _read(readings | {"grad_norm": torch.stack(norms).norm()})
            if not (math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])):
                optimizer.zero_grad()
                raise TrainingError(_not_finite(stage, config, at, line, batches))

            # Step
            optimizer.step()
            optimizer.zero_grad()  # to None: a parameter without gradient is not stepped
            at.step += 1
            at.tokens += batches.tokens_a_step

            # Report
            seconds = time.perf_counter() - started
            at.seconds += seconds
            line |= {"lr": lr, "tokens_per_second": batches.tokens_a_step / seconds, "seconds": at.seconds}
            at.metrics = line
            write({"step": at.step, "tokens": at.tokens, **line})
            if progress is not None and accelerator.is_main_process:
                scalars = {k: v for k, v in line.items() if isinstance(v, float)}
                total = steps * batches.tokens_a_step
                progress(Progress(stage.name, at.tokens, total, "tokens", scalars))

            # Every save_every steps, and on Ctrl-C: the checkpoint
            stop = any_process(accelerator, interrupt.asked())
            if at.step < steps and (stop or at.step % config.save_every == 0):
                save()
            if at.step < steps and stop:
                raise interrupt.Stopped(f"{stage.name}: saved at step {at.step} of {steps} in {folder}")
    fitted = _finish(accelerator, folder, stage, settings, parameters, at)
    interrupt.stop_if_asked(f"{stage.name}: finished and saved in {folder}")
    return fitted


def schedule(config: Recipe, step: int, steps: int) -> float:
    """Learning rate of 0-based `step` over the highest: linear warm-up times a decay to final_ratio."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    gone = step / steps
    if config.schedule == "linear":
        return warm * max(config.final_ratio, 1 - gone)
    if config.schedule == "cosine":
        return warm * (config.final_ratio + (1 - config.final_ratio) * (1 + math.cos(math.pi * gone)) / 2)
    return warm


def clip(group: Sequence[torch.nn.Parameter], largest: float | None) -> Tensor:
    """Norm of the group's gradients, scaled down afterwards to `largest` if above; no wait for the device."""
    gradients = [p.grad for p in group if p.grad is not None]
    if not gradients:
        return torch.zeros((), device=group[0].device)
    norm = torch.nn.utils.get_total_norm(gradients)
    if largest is not None:
        torch.nn.utils.clip_grads_with_norm_(group, largest, norm)
    return norm.float()


def recipe_of(config: Recipe) -> dict[str, Any]:
    """The keys of a stage's recipe that decide its result; how often it is saved is not one."""
    return config.model_dump(mode="json", exclude={"save_every"})


class _Batches:
    """The batches of a step and the share of the step's loss that each carries."""

    def __init__(self, stage: Stage, config: Recipe, corpus: Corpus, accelerator: Accelerator) -> None:
        self.stage, self.config, self.corpus, self.accelerator = stage, config, corpus, accelerator
        sequences = config.batch_size * config.accumulate * accelerator.num_processes
        self.tokens_a_step = sequences * self._load(0)["input_ids"].shape[1]

    def numbers(self, step: int) -> list[int]:
        """Batch numbers that this process takes in a step."""
        n, world = self.config.accumulate, self.accelerator.num_processes
        return [(step * n + i) * world + self.accelerator.process_index for i in range(n)]

    def span(self, step: int) -> str:
        """Batch numbers that all processes take in a step, for a message."""
        count = self.config.accumulate * self.accelerator.num_processes
        return str(step) if count == 1 else f"{step * count} to {(step + 1) * count - 1}"

    def of_step(self, step: int) -> Iterator[tuple[Batch, float]]:
        batches = [self._load(index) for index in self.numbers(step)]
        weights = [self.stage.weight(batch) for batch in batches]
        total = sum_of_processes(self.accelerator, sum(weights))
        if total == 0:
            raise TrainingError(
                f"{self.stage.name}: batch {self.span(step)} has no token to learn from; check data.sources "
                "(a chat prompt longer than data.seq_len masks everything)"
            )
        for batch, weight in zip(batches, weights, strict=True):
            yield {name: t.to(self.accelerator.device) for name, t in batch.items()}, weight / total

    def _load(self, index: int) -> Batch:
        return self.corpus.batch(index, batch_size=self.config.batch_size, stage=self.stage.name)


def _resume(folder, settings, parameters, optimizer, accelerator) -> _Position:
    found = disk.load_checkpoint(folder)
    if found is None:
        return _Position()
    checkpoint, state = found
    disk.check_settings(folder, state["settings"], settings)
    disk.restore(checkpoint, parameters, optimizer)
    disk.set_rng_state(state["rng"][accelerator.process_index], accelerator.device)
    logger.info("%s: goes on from step %d of %d", settings["stage"], state["step"], state["steps"])
    return _Position(state["step"], state["tokens"], state["seconds"], state["metrics"])


def _load_finished(folder: Path, settings: Mapping[str, Any], parameters: disk.Parameters) -> Fitted:
    record = disk.read_json(folder / "done.json")
    disk.check_settings(folder, record["settings"], settings)
    if record["skipped"] is None:
        weights = folder / "weights.safetensors"
        if not weights.is_file() or disk.sha256_of(weights) != record.get("weights"):
            raise TrainingError(f"{weights}: is not what the stage wrote; {disk.AGAIN}")
        disk.restore_weights(weights, parameters)
    logger.info("%s: already done in %s", settings["stage"], folder)
    return Fitted(record["steps"], record["tokens"], record["seconds"], record["metrics"])


def _finish(accelerator, folder, stage, settings, parameters, at: _Position, skipped=None) -> Fitted:
    """The weights, then `done.json`, then the checkpoint may go: in this order, whenever the power fails."""
    if accelerator.is_main_process:
        weights = None if skipped else disk.save_weights(folder / "weights.safetensors", parameters)
        result = {"steps": at.step, "tokens": at.tokens, "seconds": at.seconds, "metrics": at.metrics}
        made = {"stage": stage.name, "skipped": skipped, "weights": weights, **result}
        disk.write_done(folder, {**made, "settings": settings})
        disk.drop_checkpoints(folder)
    accelerator.wait_for_everyone()
    return Fitted(at.step, at.tokens, at.seconds, at.metrics)


@contextmanager
def _metrics_file(
    folder: Path, step: int, accelerator: Accelerator
) -> Iterator[Callable[[dict[str, Any]], None]]:
    if not accelerator.is_main_process:
        yield lambda line: None
        return
    with disk.writing(folder):
        writer = MetricsWriter(folder / "metrics.jsonl", step=step)

    def write(line: dict[str, Any]) -> None:
        with disk.writing(folder):
            writer.write(line)

    with writer:
        yield write


def _add(readings: dict[str, Tensor], new: Mapping[str, Tensor], scale: float) -> None:
    for name, value in new.items():
        part = value.detach().float() * scale
        readings[name] = readings[name] + part if name in readings else part


def _read(readings: Mapping[str, Tensor]) -> dict[str, Any]:
    """All readings as Python numbers, with a single wait for the device."""
    flat = torch.cat([value.reshape(-1) for value in readings.values()]).tolist()
    line, start = {}, 0
    for name, value in readings.items():
        line[name] = flat[start] if value.ndim == 0 else flat[start : start + value.numel()]
        start += value.numel()
    return line


def _not_finite(stage: Stage, config: Recipe, at: _Position, line: dict[str, Any], batches: _Batches) -> str:
    what = "loss" if not math.isfinite(line["loss"]) else "grad_norm"
    return (
        f"{stage.name}: {what} is {line[what]} at step {at.step + 1}, batch {batches.span(at.step)}; the "
        f"step was not applied; lower {stage.name}.learning_rate (now {config.learning_rate:g}), "
        f"set {stage.name}.clip, or use precision=fp32"
    )
