"""What a student uses: branches switched off at evaluation, states emptied in the middle of a text, controls beside it.

linear off     the linear branch of a layer left out; what stays is normalised as the whole was
window off     its exact window left out, likewise
state zeroed   half a window of text is read, the layer forgets all of it (its window too), the other half is measured
stages         the student untrained, and after the transfer alone: what each stage of training bought

Branches and states for one layer alone and for all at once; all on the windows of the evaluation, without retraining.
KL is that of the teacher to the ablated student, and its difference from the intact one is paired by windows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutput

from ..modeling.attention import ablation
from ..modeling.cache import CACHE
from .likelihood import TEACHER, Likelihood, compare
from .recall import GATE, Cell
from .statistics import Interval, bootstrap

LINEAR_OFF, WINDOW_OFF, STATE_ZEROED, CONTROL = "linear_off", "window_off", "state_zeroed", "control"
STAGE = "stage"
BRANCHES = {LINEAR_OFF: "linear", WINDOW_OFF: "window"}
WORDS = {LINEAR_OFF: "linear branch off", WINDOW_OFF: "window off", STATE_ZEROED: "state zeroed"}
WINDOW_CONTROL = "window control"
NO_EVIDENCE = "no evidence that the linear branch is used"


@dataclass(frozen=True)
class Row:
    """One ablation, stage or control: KL to the teacher in nats a token, and that minus the intact student's."""

    name: str
    kind: str
    """``linear_off``, ``window_off``, ``state_zeroed``, ``stage`` or ``control``."""
    layers: list[int]
    length: int
    """Tokens of a window; with a zeroed state, the second half of them is measured."""
    kl: float | None = None
    kl_interval: Interval | None = None
    kl_difference: float | None = None
    difference_interval: Interval | None = None
    ppl: float | None = None
    windows: int = 0
    not_run: str | None = None
    """Why there is no number."""
    structural: bool = False
    """The student has no such part, so that no number is missing."""


@dataclass(frozen=True)
class Stage:
    """A student as it was earlier in its training, or why it cannot be had."""

    name: str
    model: nn.Module | None
    not_run: str | None = None
    structural: bool = False
    """There is no such state, whatever is at hand."""


@dataclass(frozen=True)
class Ablations:
    """All rows, and in words whether anything shows that the linear branch is used."""

    rows: list[Row]
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "Ablations":
        def row(fields: Mapping[str, Any]) -> Row:
            pairs = {k: fields[k] and tuple(fields[k]) for k in ("kl_interval", "difference_interval")}
            return Row(**{**fields, **pairs})

        return cls([row(fields) for fields in tree["rows"]], tree["verdict"])


def ablate(
    student: Any,
    teacher: nn.Module,
    windows: Tensor,
    *,
    batch_size: int,
    vocab_size: int,
    per_layer: bool = True,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """The rows of one student on windows [N, T + 1] of token ids; every layer that has a mixer, and all of them.

    What a method cannot do without is a row that says so.
    """
    length, count = windows.shape[1] - 1, len(windows)
    planned = list(plan(student, per_layer))
    models: dict[str, nn.Module] = {"intact": student}
    for name, kind, layers, refused in planned:
        if refused is None:
            models[name] = _Ablated(student, kind, layers)
    terms: dict[str, Any] = {"batch_size": batch_size, "vocab_size": vocab_size, "seed": seed}
    measured = compare(teacher, models, windows, progress=progress, **terms)
    half = length // 2
    before = (
        compare(teacher, {"intact": student}, windows[:, : half + 1], **terms)["intact"] if half else None
    )
    rows = []
    for name, kind, layers, refused in planned:
        if refused is not None:
            rows.append(Row(name, kind, layers, length, not_run=refused, structural=True))
            continue
        # Until its state was zeroed the student was intact: only what follows tells them apart.
        context = before if kind == STATE_ZEROED else None
        tokens = count * (length - (half if context else 0))
        own, intact = (_sums(measured[which], context) for which in (name, "intact"))
        rows.append(_row(name, kind, layers, length, own, intact, tokens, seed))
    return rows


def stage_rows(
    stages: Iterable[Stage],
    teacher: nn.Module,
    windows: Tensor,
    intact: Likelihood,
    *,
    batch_size: int,
    vocab_size: int,
    seed: int = 0,
) -> list[Row]:
    """Earlier states of a student whose finished one measures ``intact`` on the same windows, one after the other."""
    length, rows = windows.shape[1] - 1, []
    for stage in stages:
        if stage.model is None:
            reason = stage.not_run or "it cannot be had"
            rows.append(Row(stage.name, STAGE, [], length, not_run=reason, structural=stage.structural))
            continue
        found = compare(
            teacher,
            {stage.name: stage.model},
            windows,
            batch_size=batch_size,
            vocab_size=vocab_size,
            seed=seed,
        )[stage.name]
        sums = _sums(found, None), _sums(intact, None)
        rows.append(_row(stage.name, STAGE, [], length, *sums, found.tokens, seed))
    return rows


def control_rows(by_model: Mapping[str, Likelihood], length: int, student: str, seed: int = 0) -> list[Row]:
    """The controls measured beside ``student`` on the same windows, as rows."""
    rows = []
    for name, measured in by_model.items():
        if name not in (TEACHER, student):
            own, intact = (_sums(found, None) for found in (measured, by_model[student]))
            rows.append(_row(name, CONTROL, [], length, own, intact, measured.tokens, seed))
    return rows


def plan(student: Any, per_layer: bool = True) -> Iterator[tuple[str, str, list[int], str | None]]:
    """(name, kind, layers, why it cannot be run) of every ablation of a student."""
    mixers = student.mixers()
    for kind, words in WORDS.items():
        branch = BRANCHES.get(kind)
        refused = {i: mixer.why_not_without(branch) if branch else None for i, mixer in mixers.items()}
        able = [index for index, reason in refused.items() if reason is None]
        if not able:
            reason = "; ".join(dict.fromkeys(map(str, refused.values()))) or "no layer is converted"
            yield f"{words}, all layers", kind, list(mixers), reason
            continue
        whole = "all layers" if len(able) == len(mixers) else f"layers {', '.join(map(str, able))}"
        yield f"{words}, {whole}", kind, able, None
        for index, reason in refused.items() if per_layer and len(mixers) > 1 else ():
            yield f"{words}, layer {index}", kind, [index], reason


class _Ablated(nn.Module):
    """A student with something switched off, called as a model without a cache."""

    def __init__(self, student: Any, kind: str, layers: Sequence[int]):
        super().__init__()
        self.student, self.kind, self.layers = student, kind, layers
        self.config = student.config

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        if self.kind != STATE_ZEROED:
            with ablation(dict.fromkeys(self.layers, BRANCHES[self.kind])):
                return self.student(input_ids=input_ids, use_cache=False)
        cache, half = DynamicCache(config=self.student.config), input_ids.shape[1] // 2
        if not half:
            return self.student(input_ids=input_ids, use_cache=False)
        context = self.student(input_ids=input_ids[:, :half], use_cache=True, **{CACHE: cache}).logits
        for index in self.layers:
            cache.layers[index].forget()
        rest = self.student(input_ids=input_ids[:, half:], use_cache=True, **{CACHE: cache}).logits
        return CausalLMOutput(logits=torch.cat([context, rest], 1))  # type: ignore[arg-type]


def _sums(measured: Likelihood, context: Likelihood | None) -> Tensor:
    """[windows, 2] sums of negative log-likelihood and KL, after ``context`` where there is one."""
    whole = torch.tensor([measured.window_nll, measured.window_kl], dtype=torch.double)
    if context is not None:
        whole = whole - torch.tensor([context.window_nll, context.window_kl], dtype=torch.double)
    return whole.T


def _row(
    name: str,
    kind: str,
    layers: list[int],
    length: int,
    ablated: Tensor,
    intact: Tensor,
    tokens: int,
    seed: int,
) -> Row:
    columns = torch.cat([ablated, intact], 1)  # nll, kl of the one and of the other
    return Row(
        name,
        kind,
        list(layers),
        length,
        kl=(ablated[:, 1].sum() / tokens).item(),
        kl_interval=bootstrap(columns, lambda totals: totals[:, 1] / tokens, seed=seed),
        kl_difference=((ablated[:, 1] - intact[:, 1]).sum() / tokens).item(),
        difference_interval=bootstrap(
            columns, lambda totals: (totals[:, 1] - totals[:, 3]) / tokens, seed=seed
        ),
        ppl=(ablated[:, 0].sum() / tokens).exp().item(),
        windows=len(columns),
    )


def window_of(student: Any) -> int:
    """W, the widest exact window (or chunk) of a student's converted layers; 0 where none has one."""
    configs = [mixer.config for mixer in student.mixers().values()]
    return max((getattr(c, "window", None) or getattr(c, "chunk", None) or 0 for c in configs), default=0)


def verdict(
    cells: Sequence[Cell],
    window: int,
    *,
    student: str = "student",
    control: str = WINDOW_CONTROL,
    seed: int = 0,
) -> str:
    """Whether the linear branch is used, in words.

    Only a recall cell longer than four windows counts, in which the teacher's lower bound is at least 80 % and the
    student finds more than the window-only control: with a paired difference whose lower 95 % bound is above 0.
    """
    by_model = {(cell.task, cell.length, cell.model): cell for cell in cells}
    if not cells:
        return f"{NO_EVIDENCE}: no recall was measured"
    if not any(cell.model == control for cell in cells):
        return f"{NO_EVIDENCE}: no window-only control was measured beside the student"
    reach = [cell for cell in cells if cell.model == student and cell.length > 4 * window]
    gated = [cell for cell in reach if _teacher_passes(by_model.get((cell.task, cell.length, TEACHER)))]
    pairs = [(cell, by_model.get((cell.task, cell.length, control))) for cell in gated]
    told: list[tuple[float, float, str]] = []
    for mine, other in pairs:
        if other is None:
            continue
        hits = torch.tensor([[int(a), int(b)] for a, b in zip(mine.hits, other.hits, strict=True)])
        low, high = bootstrap(
            hits, lambda totals, n=mine.samples: (totals[:, 0] - totals[:, 1]) / n, seed=seed
        )
        points = 100 * (mine.share - other.share)
        words = (
            f"{mine.task} at {mine.length:,}: {100 * mine.share:.0f} % against {100 * other.share:.0f} % "
            f"of the window-only control, {points:+.0f} points [{100 * low:+.0f}, {100 * high:+.0f}], "
            f"{mine.samples} prompts"
        )
        told.append((low, points, words))
    if not told:
        return f"{NO_EVIDENCE}: no recall cell longer than 4 windows ({4 * window} tokens) in which the teacher passes"
    used = [words for low, _, words in told if low > 0]
    if used:
        return f"the linear branch is used: {'; '.join(used)}"
    return f"{NO_EVIDENCE}: of {len(told)} recall cells beyond 4 windows the best is {max(told)[2]}"


def _teacher_passes(cell: Cell | None) -> bool:
    return cell is not None and cell.low >= GATE


__all__ = [
    "NO_EVIDENCE",
    "Ablations",
    "Row",
    "Stage",
    "ablate",
    "control_rows",
    "plan",
    "stage_rows",
    "verdict",
    "window_of",
]
