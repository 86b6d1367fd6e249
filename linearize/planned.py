"""A plan: its parts, and how people read it: sentences, the curve as rows, a recipe to edit."""

import json
import math
import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml

from .modeling.mixer import MethodConfig
from .recipe import Plan, Recipe
from .scan.candidates import SOFTMAX, Candidate, fields_of, method_of
from .words import bytes_text

POINTS = 12
"""Most points of the curve that are told."""


@dataclass(frozen=True)
class Budget:
    """What a plan may cost, in whole units of its kind."""

    kind: str
    amount: int
    """For the layers that are planned: bytes of one sequence, softmax layers, or nanoseconds a token."""
    words: str
    at: int
    teacher: int
    """Bytes of the teacher's cache at ``at`` tokens."""
    fixed: int
    """Bytes of layers that are left alone, already taken off ``amount``."""

    def told(self, cost: float) -> str:
        if self.kind == "softmax_layers":
            return f"{cost:.0f} softmax layer{'' if cost == 1 else 's'}"
        if self.kind == "decode_us":
            return f"{cost / 1000:.1f} us"
        return f"{bytes_text(cost)} ({100 * (cost + self.fixed) / self.teacher:.2f} %)"


@dataclass(frozen=True)
class Figures:
    """What a plan loses: the sum over its layers, or measured whole."""

    kl: float
    answer_loss: float
    lost: int
    answered: int
    loss: float

    @property
    def recall(self) -> float:
        return 1 - self.lost / self.answered if self.answered else math.nan


@dataclass(frozen=True)
class Planned:
    """One choice for all layers, what it costs and what is expected of it; ``measured`` where it was verified."""

    layers: dict[int, str]
    cost: int
    expected: Figures
    measured: Figures | None = None


@dataclass(frozen=True)
class PlanResult:
    """The plan, its rivals, the curve around it, and the recipe fragment."""

    budget: Budget
    chosen: Planned
    verified: list[Planned]
    curve: list[Planned]
    words: list[str]
    layers: dict[str, Any]
    """The recipe's ``layers`` map."""
    fragment: str
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "PlanResult":
        return cls(
            **{
                **tree,
                "budget": Budget(**tree["budget"]),
                "chosen": _planned(tree["chosen"]),
                "verified": [_planned(p) for p in tree["verified"]],
                "curve": [_planned(p) for p in tree["curve"]],
            }
        )


@dataclass(frozen=True)
class Choices:
    best: list[Planned]
    curve: list[Planned]
    more: Planned | None
    """The best with a mebibyte (or a tenth of another budget) more."""
    plain: Planned | None = None
    """The best in which all kv heads of a layer have one budget, where others may."""
    by_head: dict[str, MethodConfig] = field(default_factory=dict)
    """Name -> what a layer gets in plans whose kv heads have budgets of their own."""

    def rivals(self, count: int) -> list[Planned]:
        """What is measured whole: the ``count`` best, and ``plain`` if it is none of them."""
        chosen = self.best[:count]
        known = [rival.layers for rival in chosen]
        return chosen + ([self.plain] if chosen and self.plain and self.plain.layers not in known else [])


def _planned(tree: Mapping[str, Any]) -> Planned:
    measured = tree["measured"]
    return Planned(
        {int(i): name for i, name in tree["layers"].items()},
        tree["cost"],
        Figures(**tree["expected"]),
        None if measured is None else Figures(**measured),
    )


def layers_map(recipe: Recipe, chosen: Mapping[int, Candidate]) -> dict[str, Any]:
    """The recipe's ``layers``: neighbours of one kind share a key; what ``method`` says already is not said again."""
    own = fields_of(recipe.method)
    groups: list[tuple[list[int], Candidate]] = []
    for index in sorted(chosen):
        if groups and groups[-1][1].name == chosen[index].name and groups[-1][0][-1] == index - 1:
            groups[-1][0].append(index)
        else:
            groups.append(([index], chosen[index]))
    found: dict[str, Any] = {}
    for indices, candidate in groups:
        key = str(indices[0]) if len(indices) == 1 else f"{indices[0]}-{indices[-1]}"
        fields = fields_of(candidate.method)
        if candidate.name == SOFTMAX:
            found[key] = SOFTMAX
        elif fields["name"] == own["name"]:
            found[key] = {k: v for k, v in fields.items() if own[k] != v}
        else:
            plain = fields_of(method_of({"name": fields["name"]}))
            found[key] = {k: v for k, v in fields.items() if k == "name" or plain[k] != v}
    return found


def words(chosen: Planned, verified: list[Planned], made: Choices, budget: Budget, spec: Plan) -> list[str]:
    """The plan in words: what, what for, how sure, and what more would buy."""
    told = [
        f"Budget: {budget.words} = {budget.told(budget.amount)}; the plan takes {budget.told(chosen.cost)}."
    ]
    told.append(f"Expected from layers alone: {_told(chosen.expected)}.")
    if chosen.measured is not None:
        gap = chosen.measured.kl - chosen.expected.kl
        told.append(
            f"Measured whole, untrained: {_told(chosen.measured)}; gap to the sum of layers {gap:+.4f} KL. "
            f"Best of {len(verified)} measured."
        )
        if spec.min_recall is not None and chosen.measured.recall < spec.min_recall:
            told.append(
                f"None of the plans measured keeps {100 * spec.min_recall:g} % of recall untrained; training may."
            )
    if made.more is not None:
        step = f"{1 / spec.batch:g} MiB" if budget.kind == "bytes" else "a tenth"
        if budget.kind == "softmax_layers":
            step = "one layer"
        gain = made.best[0].expected.loss - made.more.expected.loss
        changes = _changes(made.best[0], made.more)
        told.append(
            f"{step[0].upper()}{step[1:]} more a sequence would take {gain:.4f} off the loss: {changes}."
            if gain > 0
            else f"{step[0].upper()}{step[1:]} more a sequence would buy nothing that the scan tried."
        )
    return told


def _told(figures: Figures) -> str:
    kept = f", {figures.lost} of {figures.answered} prompts lost" if figures.answered else ""
    return f"KL {figures.kl:.4f}, {figures.answer_loss:.3f} nats an answer token{kept}"


def _changes(before: Planned, after: Planned) -> str:
    """What differs between two plans, layer by layer."""
    told = [
        f"layer {i} {before.layers[i]} to {after.layers[i]}"
        for i in before.layers
        if before.layers[i] != after.layers[i]
    ]
    return ", ".join(told[:4]) + (f" and {len(told) - 4} more" if len(told) > 4 else "") or "no layer"


def curve_rows(made: PlanResult) -> list[list[str]]:
    """The curve as text cells, thinned: cost, expected loss, KL, prompts lost, what changes from the row above."""
    points = made.curve
    if len(points) > POINTS:  # evenly by cost, the plan's own neighbour among them
        low, high = points[0].cost, points[-1].cost
        marks = [low + (high - low) * k / (POINTS - 1) for k in range(POINTS)] + [made.chosen.cost]
        points = [
            point for i, point in enumerate(points)
            if any(point.cost <= m and (i + 1 == len(points) or points[i + 1].cost > m) for m in marks)
        ]  # fmt: skip
    rows = []
    for i, point in enumerate(points):
        e = point.expected
        change = "" if i == 0 else _changes(points[i - 1], point)
        mark = "> " if point.layers == made.chosen.layers else ""
        rows.append(
            [mark + made.budget.told(point.cost), f"{e.loss:.4f}", f"{e.kl:.4f}", str(e.lost), change]
        )
    return rows


def fragment_of(recipe: Recipe, layers: dict[str, Any], words: list[str]) -> str:
    """A recipe that reads back: teacher, method and layers, under what was expected of them."""
    plain, own = fields_of(method_of({"name": recipe.method.name})), fields_of(recipe.method)
    method = {k: v for k, v in own.items() if k == "name" or plain[k] != v}
    head = "".join(
        f"# {line}\n" for sentence in words for line in textwrap.wrap(" ".join(sentence.split()), 106)
    )
    body: dict[str, Any] = {"teacher": {"name": recipe.teacher.name}, "method": method, "layers": layers}
    command = f"# linearize run {recipe.teacher.name} --method {recipe.method.name} "
    body["layers"] = {int(key) if key.isdigit() else key: value for key, value in layers.items()}
    flow = yaml.safe_dump(body["layers"], default_flow_style=True, sort_keys=False, width=10**6).strip()
    fields = "".join(f" method.{k}={json.dumps(v)}" for k, v in method.items() if k != "name")
    tree = yaml.safe_dump(body, sort_keys=False, default_flow_style=None)
    return f"{head}{command}{shlex.quote(f'layers={flow}')}{fields}\n{tree}"
