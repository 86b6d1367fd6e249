"""Stage 1, attention transfer: every mixer learns the softmax output of its own layer (arXiv 2410.10254, Eq.
8).

One forward of the trunk carries the teacher's activations: each converted layer passes its softmax output
on, so the layers see teacher inputs and learn independently of each other, all in the same pass. The trunk
has no graph. With ``backward: immediate`` each layer's small graph is used up before the next layer begins,
so that memory does not grow with depth; ``deferred`` keeps them all and goes backward once. The gradients
are the same.

Departures. ``relative`` (the default) divides each layer's error by the power of its own teacher output,
because the raw error grows with depth (0.02 to 48.7 in a 126-layer model) and late layers would lead; each
layer then trains as if it were alone, and is clipped alone. ``mse`` is the paper's loss: 1000 times the
error, mean over the layers. The trunk stops at the last converted layer: neither the rest of the model nor
the vocabulary projection is computed.

A mixer may bring a loss of its own (:class:`linearize.modeling.mixer.Fit`): its error and what that is
relative to stand in for the output's error and power, and all else is the same.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize.modeling.attention import attention_mode
from linearize.modeling.mixer import Fit
from linearize.progress import Watch
from linearize.recipe import Transfer
from linearize.train.loop import Batch, Corpus, Fitted, fit
from linearize.train.processes import make_accelerator

logger = logging.getLogger(__name__)


def transfer(
    model: Any,
    corpus: Corpus,
    config: Transfer,
    *,
    folder: Path,
    seed: int = 0,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    progress: Watch | None = None,
    resume: bool = True,
) -> Fitted:
    """Train the mixers of a converted model, in place; a method without parameters learns nothing here."""
    place(model, make_accelerator(device, precision).device)
    stage = TransferStage(model, config)
    with stage.training():
        return fit(
            stage,
            config,
            corpus,
            folder=folder,
            seed=seed,
            device=device,
            precision=precision,
            progress=progress,
            resume=resume,
        )


class TransferStage:
    """The mixers' parameters, and the loss of each layer against its own softmax output."""

    name = "transfer"

    def __init__(self, model: Any, config: Transfer) -> None:
        self.model, self.config = model, config
        self.mixers: dict[int, nn.Module] = model.mixers()
        names = {id(p): name for name, p in model.named_parameters()}
        own = {index: [p for p in m.parameters() if p.requires_grad] for index, m in self.mixers.items()}
        self._groups = [group for group in own.values() if group]
        self._named = [(names[id(p)], p) for group in self._groups for p in group]
        self._learning = [index for index, group in own.items() if group]
        self._share = config.mse_factor / max(1, len(self._learning))
        # Offloading hooks bring a block back in after its forward: there the trunk runs to its end.
        self._stops = not hasattr(model, "hf_device_map")
        for _, parameter in self._named:
            parameter.data = exact(parameter.data)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return self._named

    def groups(self) -> list[list[nn.Parameter]]:
        return self._groups

    def settings(self) -> Mapping[str, Any]:
        return {"layers": self.model.config.linearize["layers"]}

    def weight(self, batch: Batch) -> int:
        mask = batch.get("attention_mask")
        return batch["input_ids"].numel() if mask is None else int(mask.sum())

    @contextmanager
    def training(self) -> Iterator[None]:
        """Only the mixers ask for gradients inside, and no dropout falls; outside all is as it was."""
        with only_training(self.model, [p for _, p in self._named]):
            yield

    def backward(self, batch: Batch, scale: float) -> dict[str, Tensor]:
        """Gradients of the batch; readings: ``loss``, and each layer's error over its output power."""
        losses: list[Tensor] = []
        errors: list[Tensor] = []
        waiting: list[Tensor] = []

        def record(layer: int, student: Tensor | Fit, teacher: Tensor, valid: Tensor | None) -> None:
            if layer not in self._learning:
                return
            error, power = error_and_power(student, teacher, valid)
            relative = error / power
            errors.append(relative.detach())
            loss = relative if self.config.loss == "relative" else self._share * error
            losses.append(loss.detach())
            # Inside what its mixer leaves exact a batch has nothing to teach, and makes no graph.
            if loss.requires_grad and self.config.backward == "immediate":
                backward(loss * scale)
            elif loss.requires_grad:
                waiting.append(loss)
            if layer == self._learning[-1] and self._stops:
                raise _TrunkDone

        try:
            with attention_mode("transfer", record=record), torch.no_grad():
                self.model.base_model(**inputs_of(batch), use_cache=False)
        except _TrunkDone:
            pass
        if waiting:
            backward(torch.stack(waiting).sum() * scale)
        loss = torch.stack(losses)
        return {
            "loss": loss.mean() if self.config.loss == "relative" else loss.sum(),
            "relative_error": torch.stack(errors),
        }


class _TrunkDone(Exception):
    """Raised through a forward whose remaining layers nobody would read."""


def error_and_power(student: Tensor | Fit, teacher: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean squared error, and mean square of the teacher's output [B, T, H, V], over valid tokens [B, T]; a mixer with
    a loss of its own has made both."""
    if not isinstance(student, Tensor):
        return student.error, student.power
    student, teacher = exact(student), exact(teacher)
    count = teacher.numel()
    if valid is not None:
        padding = ~valid.bool()[:, :, None, None]
        student, teacher = student.masked_fill(padding, 0), teacher.masked_fill(padding, 0)
        count = valid.sum() * (teacher[0, 0].numel())
    power = (teacher.square().sum() / count).clamp_min(torch.finfo(teacher.dtype).tiny)
    return (student - teacher).square().sum() / count, power


def backward(output: Tensor, gradient: Tensor | None = None) -> None:
    """Outside autocast: each operation's backward runs in the precision of its forward."""
    with torch.autocast(output.device.type, enabled=False):
        output.backward(gradient)


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}


def exact(tensor: Tensor) -> Tensor:
    """Half precision as fp32; fp32 and fp64 as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def place(model: Any, device: torch.device) -> None:
    """Move the model to where it trains, unless somebody has spread it over devices."""
    if not hasattr(model, "hf_device_map"):
        model.to(device)


@contextmanager
def only_training(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside, only `parameters` ask for gradients and nothing drops out; outside all is as it was."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    trained = {id(p) for p in parameters}
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in trained)
    model.eval()
    try:
        yield
    finally:
        for parameter, asked in before:
            parameter.requires_grad_(asked)
            parameter.grad = None
        for module, mode in modes:
            module.training = mode
