"""Device, precision and the other processes: the loop's side of accelerate.

The gradients of all processes are summed by one explicit all-reduce, not by wrappers around the model,
because a stage may run its own backward passes in the middle of a forward one.
"""

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from linearize.modeling.errors import TrainingError


def make_accelerator(device: str | torch.device, precision: str) -> Accelerator:
    """Device and autocast. `auto` is the process's own GPU if there is one; `fp32` never autocasts."""
    gpu = torch.cuda.is_available()
    kind = torch.device(device).type if device != "auto" else ("cuda" if gpu else "cpu")
    if kind == "cuda" and not gpu:
        raise TrainingError(
            "device: 'cuda' was asked for and torch finds no GPU; use device=cpu or device=auto"
        )
    wanted = "bf16" if precision == "bf16" else "no"
    state = AcceleratorState._shared_state
    if state and (state["_mixed_precision"] != wanted or state["device"].type != kind):
        # One process may train on the CPU and then on a GPU, which accelerate's singleton forbids.
        AcceleratorState._reset_state(reset_partial_state=AcceleratorState().num_processes == 1)
    return Accelerator(cpu=kind == "cpu", mixed_precision=wanted)


def sum_gradients(
    accelerator: Accelerator, trained: list[torch.nn.Parameter], readings: dict[str, Tensor]
) -> None:
    """Replace gradients and readings by their sums over all processes, in one message.

    A sum, not a mean: each batch already carries its share of the step.
    """
    if accelerator.num_processes == 1:
        return
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    tensors = [p.grad for p in trained if p.grad is not None] + list(readings.values())
    flat = _sum(accelerator, torch.cat([t.reshape(-1) for t in tensors]))
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def sum_of_processes(accelerator: Accelerator, count: int) -> int:
    if accelerator.num_processes == 1:
        return count
    return int(_sum(accelerator, torch.tensor(count, device=accelerator.device)))


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    return sum_of_processes(accelerator, int(flag)) > 0


def _sum(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    total = accelerator.reduce(tensor, "sum")
    assert isinstance(total, Tensor)
    return total
