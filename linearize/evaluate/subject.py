"""A student as the integrity gates see it: run in any way, every layer watched, two runs compared.

A difference is relative: the largest of a logit over the largest logit (at least 1). In half precision it is that of
the median token, by norms, and beside it :data:`AGREEMENT` of the tokens must choose alike: a near tie may fall
otherwise after rounding.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..modeling.cache import CACHE

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""The one table, by the dtype of the checkpoint; nothing relaxes it."""
AGREEMENT = 0.99
"""Least share of tokens with the same choice in half precision; one within the tolerance of the best is the same."""


class Seen(NamedTuple):
    """What a run gave: logits [B, T, vocab], and the attention outputs [B, T, M] of every layer."""

    logits: Tensor
    layers: dict[int, Tensor]

    def pick(self, function: Callable[[Tensor], Tensor]) -> "Seen":
        return Seen(function(self.logits), {index: function(y) for index, y in self.layers.items()})


class Subject:
    """A student, with what all gates need of it."""

    def __init__(self, model: Any, vocab_size: int | None, seed: int):
        self.model = model
        self.vocab = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
        self.device = model.get_input_embeddings().weight.device
        self.dtype = model.dtype
        self.bound = TOLERANCES[self.dtype]
        self.generator = torch.Generator().manual_seed(seed)
        self.spec = {int(i): layer for i, layer in model.config.linearize["layers"].items()}
        self.limit = _position_limit(model)

    @property
    def windows(self) -> list[int]:
        """W of the converted layers: windows, or chunks; 64 where there are none."""
        methods = [layer["method"] for layer in self.spec.values()]
        return sorted(
            {m.get("window") or m.get("chunk") or 64 for m in methods if m["name"] != "softmax"}
        ) or [64]

    def ids(self, batch: int, length: int) -> Tensor:
        """Random token ids [batch, length]."""
        return torch.randint(self.vocab, (batch, length), generator=self.generator).to(self.device)

    def cache(self) -> Any:
        return DynamicCache(config=self.model.config)

    @contextlib.contextmanager
    def watched(self) -> Iterator[dict[int, list[Tensor]]]:
        """Layer index -> what its attention put out in each forward inside the block."""
        found: dict[int, list[Tensor]] = {index: [] for index in self.spec}
        handles = []
        for index, layer in self.spec.items():

            def hook(_module: nn.Module, _args: Any, output: Any, index: int = index) -> None:
                found[index].append(output[0] if isinstance(output, tuple) else output)

            handles.append(self.model.get_submodule(layer["module"]).register_forward_hook(hook))
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def run(
        self, ids: Tensor, pieces: Sequence[int] = (), mask: Tensor | None = None, cache: Any = None
    ) -> Seen:
        """ids [B, T] in one forward without a cache, or in pieces through one."""
        logits, start = [], 0
        if pieces and cache is None:
            cache = self.cache()
        with self.watched() as layers:
            for piece in pieces or (ids.shape[1],):
                stop = start + piece
                terms: dict[str, Any] = {"use_cache": bool(pieces)}
                if pieces:
                    terms[CACHE] = cache
                if mask is not None:
                    positions = (mask.cumsum(1) - 1).clamp_min(0)
                    terms |= {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
                logits.append(self.model(input_ids=ids[:, start:stop], **terms).logits[..., : self.vocab])
                start = stop
        assert start == ids.shape[1]
        return Seen(torch.cat(logits, 1), {index: torch.cat(ys, 1) for index, ys in layers.items()})


def _position_limit(model: Any) -> int | None:
    """Most tokens of a model with learned positions; None where positions are computed."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    words = model.get_input_embeddings()
    learned = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module is not words and context
    ]
    return context if any(0 <= x.num_embeddings - context <= 2 for x in learned) else None


class Comparison:
    """The largest difference of all cases of one gate, and where it is."""

    def __init__(self, subject: Subject, name: str, *, every_token: bool = False):
        self.subject, self.name, self.every_token = subject, name, every_token
        self.worst, self.where, self.failed, self.note = 0.0, "", False, ""

    def add(self, actual: Seen, expected: Seen, length: int) -> None:
        subject = self.subject
        difference = self._difference(actual.logits, expected.logits)
        failed, note = difference > subject.bound, ""
        if not failed and self._is_half:
            agreement = _agreement(actual.logits, expected.logits, subject.bound)
            if agreement < AGREEMENT:
                failed, note = (
                    True,
                    f"{100 * agreement:.1f} % of the tokens chosen alike, {100 * AGREEMENT:.0f} % needed",
                )
        # A failure outweighs every difference: the median token of a failed case may not differ at all.
        if self.where and (failed, difference) <= (self.failed, self.worst):
            return
        self.failed, self.worst, self.note = failed, difference, note
        self.where = f"length {length}"
        if failed:
            self.where = f"layer {self._layer(actual, expected)}, {self.where}"

    @property
    def _is_half(self) -> bool:
        return self.subject.dtype.itemsize == 2 and not self.every_token

    def _difference(self, actual: Tensor, expected: Tensor) -> float:
        actual, expected = actual.double(), expected.double()
        if not (bool(actual.isfinite().all()) and bool(expected.isfinite().all())):
            return math.inf
        if not actual.numel():
            return 0.0
        if self._is_half:
            norms = (actual - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-12)
            return norms.median().item()
        return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1.0)).item()

    def _layer(self, actual: Seen, expected: Seen) -> int:
        """The first layer whose output differs by more than is allowed, else the one that differs most."""
        found = {}
        for index, y in actual.layers.items():
            size = expected.layers[index].double().abs().max().clamp_min(1e-12)
            # Outputs of a layer may be small: relative to themselves, not to 1.
            found[index] = self._difference(y.double() / size, expected.layers[index].double() / size)
        return next(
            (i for i, d in found.items() if d > self.subject.bound), max(found, key=found.__getitem__)
        )


def _agreement(actual: Tensor, expected: Tensor, bound: float) -> float:
    """Share of tokens whose arg-max is the expected one, or as good within ``bound`` of the largest logit."""
    best = expected.double().max(-1).values
    chosen = expected.double().gather(-1, actual.argmax(-1, keepdim=True))[..., 0]
    return (best - chosen <= bound * expected.double().abs().amax(-1)).double().mean().item()
