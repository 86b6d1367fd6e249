"""Measures a teacher with some layers changed, against itself, on a scan's batches."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..evaluate.statistics import Interval, bootstrap
from ..modeling.mixer import Mixer
from ..modeling.model import FORMAT, convert_, layer_spec, unconvert_
from ..modeling.registry import METHODS
from ..modeling.salient import SalientConfig
from ..modeling.window import SoftmaxConfig
from ..probe import Probed, check_deferral
from ..recipe import Scan
from .candidates import Candidate
from .material import Batch
from .oracle import Memo, OneHead, OracleMixer
from .trunk import Trunk

PIECE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""fp32 logits that are compared at one time: on a CPU what its caches hold."""
ANSWERED = 0.5
"""A recall cell counts where the teacher itself answers at least this share."""


@dataclass
class Tally:
    """Sums of one student (or the teacher) over the batches."""

    windows: list[list[float]] = field(default_factory=list)
    """For each window: negative log-likelihood and KL, summed over its tokens."""
    tokens: int = 0
    error: float = 0.0
    power: float = 0.0
    """Squared difference of the changed layer's output from softmax, and the latter's square, on text."""
    hits: dict[tuple[str, int], list[bool]] = field(default_factory=dict)
    likelihood: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    """Mean log-probability of each answer's tokens."""
    waiting: list[Tensor] = field(default_factory=list)
    """Of the newest batch, on its device still: [B, 2] of text or prompts, and sums of the layer's output."""

    def settle(self, batch: Batch) -> None:
        """Takes over what waits, of ``batch``; until then nobody has to wait for the device."""
        rows, *sums = (x.tolist() for x in self.waiting)
        self.waiting = []
        if batch.cell is None:
            self.windows += rows
            self.tokens += batch.inputs.numel()
            for error, power in sums:
                self.error, self.power = self.error + error, self.power + power
            return
        self.hits.setdefault(batch.cell, []).extend(hit == 1 for hit, _ in rows)
        self.likelihood.setdefault(batch.cell, []).extend(chance for _, chance in rows)

    @property
    def kl(self) -> float:
        return sum(row[1] for row in self.windows) / self.tokens

    @property
    def nll(self) -> float:
        return sum(row[0] for row in self.windows) / self.tokens

    def kl_interval(self) -> Interval:
        rows = torch.tensor(self.windows, dtype=torch.double)
        return bootstrap(rows, lambda totals: totals[:, 1] / self.tokens, draws=2_000)


class Bench:
    """One copy of the teacher, its layers' places, and what is measured on it."""

    def __init__(
        self,
        model: Any,
        found: Mapping[int, Probed],
        batches: Sequence[Batch],
        scan: Scan,
        vocab: int,
        seed: int,
    ):
        self.model, self.found, self.batches, self.scan = model, dict(found), list(batches), scan
        self.vocab, self.seed = vocab, seed
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.trunk = Trunk(model, {index: layer.module for index, layer in self.found.items()})
        self.trunk.check(self.batches[0].inputs.to(self.device), max(self.found))
        self.trained: dict[str, dict[int, Mixer]] = {}
        """Candidate -> layer -> its mixer after transfer."""
        self.tokens = sum(batch.tokens for batch in self.batches)
        self._last: dict[int, Any] = {}  # batch -> entry of the last layer, in the teacher

    def seat(self, candidate: Candidate, layer: int, memo: Memo, head: int | None = None) -> Mixer:
        """A mixer for one layer: Salient's stand-in, what transfer taught, or fresh by the seed."""
        geometry, config = self.found[layer].geometry, candidate.method
        if isinstance(config, SalientConfig):
            return OracleMixer(config, geometry, memo, self.scan.score_fit, head)
        mixer: Mixer
        if candidate.name in self.trained:
            mixer = self.trained[candidate.name][layer]
        else:
            made = METHODS[config.name].mixer
            assert made is not None
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                mixer = made(config, geometry).float().to(self.device)
        return mixer if head is None else OneHead(mixer, head, memo)

    @contextlib.contextmanager
    def seated(self, seats: Mapping[int, Mixer]) -> Iterator[None]:
        """The model with these layers converted; the plain teacher again afterwards."""
        layers = {
            str(index): layer_spec(
                layer.module,
                layer.sliding_window,
                layer.geometry,
                seats[index].config if index in seats else SoftmaxConfig(),
            )
            for index, layer in self.found.items()
        }
        unrotated = {i: self.found[i] for i, seat in seats.items() if seat.wants_unrotated}
        if unrotated:
            check_deferral(self.model, unrotated)
        spec = {"format": FORMAT, "version": "", "family": self.model.config.model_type, "layers": layers}
        convert_(self.model, spec, METHODS)
        try:
            for index, attention in self.model.converted().items():
                attention.mixer = seats[index]
            yield
        finally:
            unconvert_(self.model)

    def memo_seed(self, layer: int, number: int) -> int:
        """Of the noise in one layer and batch, whoever asks."""
        return (self.seed * 1_000_003 + layer) * 10_007 + number

    @torch.no_grad()
    def alone(
        self, layer: int, seats: Mapping[Any, Mixer], memo: Memo, known: dict[int, tuple[int, Any]], hear: Any
    ) -> tuple[Tally, dict[Any, Tally]]:
        """The teacher and each of ``seats`` in ``layer`` alone. ``known`` holds entries of each batch, made newer."""
        teacher, tallies = Tally(), {key: Tally() for key in seats}
        for number, batch in enumerate(self.batches):
            ids = batch.inputs.to(self.device)
            entry = self.trunk.entry(ids, layer, known.get(number))
            if entry is not None:
                known[number] = (layer, entry)
            reference = self._teacher(number, ids)
            teacher.waiting.append(reference.told(None))
            with self.seated({layer: next(iter(seats.values()))}):
                attention = self.model.converted()[layer]
                memo.forget(self.memo_seed(layer, number), batch.lengths)
                for key, seat in seats.items():
                    attention.mixer = seat
                    sums: list[Tensor] = []
                    handle = seat.register_forward_hook(_error_into(sums, memo, batch))
                    try:
                        logits = self.trunk.logits(ids, batch.keep, layer, entry)[..., : self.vocab]
                    finally:
                        handle.remove()
                    tallies[key].waiting += [reference.told(logits), *sums]
            for tally in (teacher, *tallies.values()):
                tally.settle(batch)
            hear(batch.tokens)
        memo.forget(0)
        return teacher, tallies

    @torch.no_grad()
    def whole(
        self, chosen: Mapping[int, Candidate], hear: Any = None, *, recall: bool = True
    ) -> tuple[Tally, Tally]:
        """(teacher, student) with a candidate in every layer of ``chosen``; softmax in all others. Without ``recall``
        on text alone."""
        memos = {layer: Memo(0) for layer in chosen}
        seats = {
            layer: self.seat(candidate, layer, memos[layer])
            for layer, candidate in chosen.items()
            if candidate.method.name != "softmax"
        }
        teacher, student = Tally(), Tally()
        for number, batch in enumerate(self.batches):
            if batch.cell is not None and not recall:
                continue
            ids = batch.inputs.to(self.device)
            reference = self._teacher(number, ids)
            for layer, memo in memos.items():
                memo.forget(self.memo_seed(layer, number), batch.lengths)
            logits = None
            if seats:
                with self.seated(seats):
                    logits = self.trunk.logits(ids, batch.keep)[..., : self.vocab]
            for tally, own in ((teacher, None), (student, logits)):
                tally.waiting.append(reference.told(own))
                tally.settle(batch)
            if hear is not None:
                hear(batch.tokens)
        return teacher, student

    def _teacher(self, number: int, ids: Tensor) -> "Reference":
        """The teacher's logits of a batch, from its last layer on."""
        last, batch = max(self.found), self.batches[number]
        if number not in self._last:
            self._last[number] = self.trunk.entry(ids, last)
        logits = self.trunk.logits(ids, batch.keep, last, self._last[number])[..., : self.vocab]
        return Reference(logits, batch)


class Reference:
    """The teacher's logits of one batch, and what every comparison with them needs."""

    def __init__(self, logits: Tensor, batch: Batch):
        """logits [B, T, vocab] of the last positions of the batch's rows, as many as it keeps."""
        self.logits, self.text = logits, batch.cell is None
        if self.text:
            self.targets = batch.ids[:, 1:].to(logits.device)
            parts = logits.flatten(0, 1).split(_tokens(logits))
            self.totals = torch.cat([exact(part).logsumexp(-1) for part in parts])
            # A teacher may rule a token out: exp(-inf) (-inf - s) is the limit 0, not NaN.
            self.rules_out = bool(torch.isneginf(logits.amin()))
        else:
            self.columns, self.answers = (x.to(logits.device) for x in batch.answers)

    def told(self, logits: Tensor | None) -> Tensor:
        """[B, 2] in fp64 what logits [B, T, vocab] (None: the teacher's own) say of the batch, on their device.

        Text: negative log-likelihood and KL from the reference, summed over tokens. Prompts: 1 where all the answer's
        tokens are arg-max, and the mean of their log-probabilities.
        """
        return self._sums(logits) if self.text else self._answered(self.logits if logits is None else logits)

    def _answered(self, logits: Tensor) -> Tensor:
        rows = torch.arange(len(logits), device=logits.device)[:, None]
        predicted, asked = exact(logits[rows, self.columns]), self.answers >= 0  # [B, answer, vocab]
        chances = predicted.log_softmax(-1).gather(-1, self.answers.clamp_min(0)[..., None])[..., 0]
        hit = ((predicted.argmax(-1) == self.answers) | ~asked).all(1)
        return torch.stack([hit.double(), (chances * asked).double().sum(1) / asked.sum(1)], dim=-1)

    def _sums(self, logits: Tensor | None) -> Tensor:
        """The softmaxes are never laid out whole: with p the reference's, z its logits, s the others and l their
        log-sum-exp, KL = sum p (z - s) + l_s - l_z."""
        step, rows = _tokens(self.logits), self.logits.flatten(0, 1)
        totals, kl = self.totals, torch.zeros_like(self.totals)
        if logits is not None:
            others = logits.flatten(0, 1)
            parts = zip(rows.split(step), others.split(step), self.totals.split(step), strict=True)
            found = [self._compared(exact(z), exact(s), total) for z, s, total in parts]
            totals, kl = (torch.cat(each) for each in zip(*found, strict=True))
            rows = others
        nll = totals - rows.gather(-1, self.targets.reshape(-1, 1))[:, 0]
        return torch.stack([nll.double(), kl.double()], dim=-1).unflatten(0, self.targets.shape).sum(1)

    def _compared(self, z: Tensor, s: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Log-sum-exp of s [n, vocab], and KL(z || s): [n] each."""
        chances, gap = (z - total[:, None]).exp_(), z - s
        if self.rules_out:
            gap.masked_fill_(torch.isneginf(z), 0)
        mine = s.logsumexp(-1)
        return mine, torch.linalg.vecdot(chances, gap) + (mine - total)


def exact(logits: Tensor) -> Tensor:
    """In fp32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _tokens(logits: Tensor) -> int:
    """How many tokens' logits are compared at one time."""
    return max(1, PIECE_BYTES.get(logits.device.type, PIECE_BYTES["cpu"]) // (4 * logits.shape[-1]))


def _error_into(sums: list[Tensor], memo: Memo, batch: Batch) -> Any:
    """A hook that notes, on text, the squared difference of the layer's output from softmax, and softmax's square."""

    def hook(_module: Any, args: Any, output: Any) -> None:
        if batch.cell is None:
            truth = memo.softmax(args[0]).float()
            error = (output[0].float() - truth).square().sum()
            sums.append(torch.stack([error, truth.square().sum()]))

    return hook


@dataclass(frozen=True)
class Recalled:
    """What a student answers of the prompts that its teacher answers, over all cells that count."""

    answered: int
    """By the teacher."""
    lost: int
    """Of these, by the student no longer."""
    answer_loss: float
    """Mean over all prompts of the nats an answer token has lost, none below 0."""
    cells: dict[str, list[int]]
    """``task length`` -> prompts, the teacher's answers, the student's."""


def above_zero(loss: float) -> float:
    """A loss that is no number is the worst there is, not the best."""
    return math.inf if math.isnan(loss) else max(0.0, loss)


def recalled(teacher: Tally, student: Tally) -> Recalled:
    """Cells that the teacher mostly fails say nothing of its students, and count for nothing."""
    answered = lost = 0
    losses: list[float] = []
    cells = {}
    for cell, truth in teacher.hits.items():
        mine = student.hits[cell]
        cells[f"{cell[0]} {cell[1]}"] = [len(truth), sum(truth), sum(mine)]
        if sum(truth) < ANSWERED * len(truth):
            continue
        answered += sum(truth)
        lost += sum(t and not m for t, m in zip(truth, mine, strict=True))
        pairs = zip(teacher.likelihood[cell], student.likelihood[cell], strict=True)
        losses += [above_zero(t - m) for t, m in pairs]
    return Recalled(answered, lost, sum(losses) / max(1, len(losses)), cells)
