"""What a CUDA graph does, on a CPU: Python runs once, while recording, and the operations alone at every replay.

As from a real graph, nothing that the host knew is looked at again: values that Python held are frozen, and so are the
addresses of tensors made before. The recording keeps none of these alive, and a replay fails where one is gone, whose
memory a GPU would meanwhile have given to another tensor. Reading a value on the host while recording fails too. What
recording computed is undone, as a GPU would not have computed it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

try:
    from triton.runtime.interpreter import GridExecutor
except ImportError:  # Triton is optional
    GridExecutor: Any = None

_launch: Any = None if GridExecutor is None else GridExecutor.__call__
HOST_READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "is_nonzero"}
MADE_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Outside:
    """A tensor made before the recording: an address that nothing keeps alive."""

    def __init__(self, tensor: Tensor, name: str):
        self.storage, self.name = StorageWeakRef(tensor.untyped_storage()), name
        self.dtype = tensor.dtype
        self.place = (tensor.storage_offset(), tensor.shape, tensor.stride())

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, (
            f"{self.name} of a replayed step takes a tensor {tuple(self.place[1])} of {self.dtype} that was made "
            "before the recording and is gone: a GPU would find there whatever came after it"
        )
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.place)


class Tape(TorchDispatchMode):
    """Runs every operation and remembers it."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Callable[..., Any], Any, Any, list[Any]]] = []
        self.inside: dict[int, Any] = {}  # storages made while recording, by address of their owner
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # those made before it, and what they held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        masks = [t for t in tree_leaves(args[1:2]) if isinstance(t, Tensor) and t.dtype == torch.bool]
        if name in HOST_READS or (name in ("index", "index_put_", "index_put") and masks):
            raise RuntimeError(f"aten.{name}: operation not permitted when stream is capturing")
        if name == "lift_fresh":  # what Python holds becomes a constant
            self._own(args[0])
        given = [*args, *(None for _ in func._schema.arguments[len(args) :])]
        for at, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(kwargs.get(argument.name, given[at]))
        result = func(*args, **kwargs)
        known = {_owner(t) for t in _tensors((args, kwargs))}
        fresh = [isinstance(t, Tensor) and _owner(t) not in known for t in tree_leaves(result)]
        for t, new in zip(tree_leaves(result), fresh, strict=True):
            if new:
                self._own(t)
        written = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        if name not in MADE_EMPTY and (written or any(fresh)):  # the rest are views, which stay what they are
            wanted = [t if new else None for t, new in zip(tree_leaves(result), fresh, strict=True)]
            self._remember(func, args, kwargs, wanted)
        return result

    def launch(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """An interpreted kernel, which may write whatever it is given."""
        self._keep((args, kwargs))
        with _disable_current_modes():
            result = _launch(executor, *args, **kwargs)
        self._remember(lambda *a, **k: _launch(executor, *a, **k), args, kwargs, [])
        return result

    def undo(self) -> None:
        """Give tensors made before the recording back what they held."""
        for whole, held in self.before.values():
            whole.copy_(held)
        self.before.clear()

    def replay(self) -> None:
        for func, args, kwargs, wanted in self.steps:
            args, kwargs = tree_map_only(Outside, Outside.tensor, (args, kwargs))
            found = tree_leaves(func(*args, **kwargs))
            for place, new in zip(wanted, found, strict=True) if wanted else ():
                if place is not None:
                    place.copy_(new)

    def _remember(self, func: Any, args: Any, kwargs: Any, wanted: list[Any]) -> None:
        leaves, spec = tree_flatten((args, kwargs))
        name = getattr(func, "__name__", "a kernel")
        leaves = [
            Outside(t, name) if isinstance(t, Tensor) and _owner(t) not in self.inside else t for t in leaves
        ]
        args, kwargs = tree_unflatten(leaves, spec)
        self.steps.append((func, args, kwargs, wanted))

    def _own(self, tensor: Tensor) -> None:
        self.inside[_owner(tensor)] = tensor.untyped_storage()

    def _keep(self, values: Any) -> None:
        for tensor in _tensors(values):
            if _owner(tensor) not in self.inside and _owner(tensor) not in self.before:
                storage = tensor.untyped_storage()
                with _disable_current_modes():
                    whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                    self.before[_owner(tensor)] = (whole, whole.clone())


def recorded_on_cpu(function: Callable[[], Any]) -> Callable[[], Any]:
    """Stands for ``graph.record``: records what ``function`` does, which leaves no trace; the result does it and
    returns the same outputs."""
    tape = Tape()
    with ExitStack() as stack:
        stack.enter_context(mock.patch("torch.cuda.is_current_stream_capturing", return_value=True))
        if GridExecutor is not None:
            launch = lambda *args, **kwargs: tape.launch(*args, **kwargs)  # noqa: E731
            stack.enter_context(mock.patch.object(GridExecutor, "__call__", launch))
        try:
            with tape:
                outputs = function()
        finally:
            tape.undo()

    def run() -> Any:
        with torch.no_grad():
            tape.replay()
        return outputs

    return run


def _tensors(values: Any) -> Iterator[Tensor]:
    return (t for t in tree_leaves(values) if isinstance(t, Tensor))


def _owner(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
