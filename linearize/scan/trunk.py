"""Forwards that begin at a layer: everything below it is as in the teacher, and is not computed again.

While a layer is measured, the blocks below it hand on what they gave once. Blocks are the entries of the list that
holds the attention layers. Where a model is not a plain chain of them, starting in the middle gives other logits than
starting at the front; then every forward starts at the front.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluate.recall import last_logits

logger = logging.getLogger(__name__)


class _Reached(Exception):
    """Ends a forward at the block whose output was wanted."""


class Trunk:
    """The blocks of a model, and forwards from one of them on."""

    def __init__(self, model: Any, modules: dict[int, str]):
        """``modules``: layer index -> path of its attention module."""
        self.model = model
        blocks = {index: path.rpartition(".")[0] for index, path in modules.items()}
        holder = {path.rpartition(".")[0] for path in blocks.values()}
        self.blocks: list[nn.Module] = []
        self.place: dict[int, int] = {}
        self.chain = len(holder) == 1 and all(path.rpartition(".")[2].isdigit() for path in blocks.values())
        if self.chain:
            self.blocks = list(model.get_submodule(holder.pop()).children())
            self.place = {index: int(path.rpartition(".")[2]) for index, path in blocks.items()}

    @torch.no_grad()
    def logits(self, ids: Tensor, keep: int, layer: int | None = None, entry: Any = None) -> Tensor:
        """[B, keep, vocab] logits of the last ``keep`` positions; from ``layer`` on where its ``entry`` is given."""
        with self._skipping(layer, entry):
            return last_logits(self.model, ids, keep)

    @torch.no_grad()
    def entry(self, ids: Tensor, layer: int, known: tuple[int, Any] | None = None) -> Any:
        """What the block before ``layer`` gives, to be handed to ``logits``; None for the first block or no chain.

        ``known`` is (an earlier layer, its entry), from which to go on.
        """
        if not self.chain or self.place[layer] == 0:
            return None
        found: list[Any] = []

        def catch(_module: nn.Module, _args: Any, output: Any) -> None:
            found.append(output)
            raise _Reached

        handle = self.blocks[self.place[layer] - 1].register_forward_hook(catch)
        try:
            with self._skipping(*(known or (None, None))), contextlib.suppress(_Reached):
                last_logits(self.model, ids, 1)
        finally:
            handle.remove()
        return found[0]

    def check(self, ids: Tensor, layer: int) -> None:
        """Whether starting at ``layer`` gives the logits of starting at the front; if not, nothing is skipped."""
        if not self.chain:
            logger.info("scan: blocks are not one list, so every forward starts at the first")
            return
        whole = self.logits(ids, 1)
        if not torch.equal(whole, self.logits(ids, 1, layer, self.entry(ids, layer))):
            self.chain = False
            logger.info("scan: blocks are not a plain chain, so every forward starts at the first")

    @contextlib.contextmanager
    def _skipping(self, layer: int | None, entry: Any) -> Iterator[None]:
        skipped = [] if layer is None or entry is None else self.blocks[: self.place[layer]]
        before = [vars(block).get("forward") for block in skipped]
        for block in skipped:
            block.forward = lambda *_args, **_kwargs: entry
        try:
            yield
        finally:
            for block, own in zip(skipped, before, strict=True):
                if own is None:
                    del block.forward
                else:
                    block.forward = own
