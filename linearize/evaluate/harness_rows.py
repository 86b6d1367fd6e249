"""Rows of what lm-eval measured: a value with its interval, and what a student kept of the teacher's, by samples."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..modeling.errors import EvaluationError
from .likelihood import TEACHER
from .statistics import Interval, bootstrap, holm, paired, retention, wilson


@dataclass(frozen=True)
class Named:
    """One task of a named group, the metric that papers quote of it, and its number of solved examples."""

    task: str
    metric: str
    num_fewshot: int | None = None


MAJORITY = ("boolq",)
"""Tasks whose chance is their most frequent answer: guessing it beats guessing evenly."""
# A metric that is a function of sums over samples, by the name of lm-eval's aggregation: its terms, and the function.
Terms = Callable[[Any], tuple[float, float]]
AGGREGATES: dict[str, tuple[Terms, Callable[[torch.Tensor], torch.Tensor]]] = {
    "mean": (lambda x: (float(x), 1.0), lambda t: t[:, 0] / t[:, 1]),
    "perplexity": (lambda x: (float(x), 1.0), lambda t: (-t[:, 0] / t[:, 1]).exp()),
    "weighted_perplexity": (lambda x: (float(x[0]), float(x[1])), lambda t: (-t[:, 0] / t[:, 1]).exp()),
    "bits_per_byte": (lambda x: (float(x[0]), float(x[1])), lambda t: -t[:, 0] / t[:, 1] / math.log(2)),
}


@dataclass(frozen=True)
class Score:
    """One model on one metric of one task, [95 %]: Wilson for right-or-wrong, bootstrap over samples elsewhere.

    What pairs with the teacher's samples (`wins` to `kept`) is None for the teacher, and where a metric is not a mean.
    """

    task: str
    metric: str
    model: str
    value: float | None
    low: float | None
    high: float | None
    samples: int
    chance: float | None = None
    """The score of guessing, from the number of choices; None where nobody knows it."""
    raw: float | None = None
    """Share of the teacher's score."""
    corrected: float | None = None
    """Share of what the teacher scores above chance; None where its interval reaches down to chance."""
    not_run: str | None = None
    """Why there is no value."""
    group: str | None = None
    """The group of tasks that this one is a part of, if that was asked for."""
    num_fewshot: int | None = None
    task_version: str | None = None
    wins: int | None = None
    ties: int | None = None
    losses: int | None = None
    p: float | None = None
    """Exact McNemar against the teacher, adjusted by Holm over all of the model's rows."""
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    kept: bool | None = None
    """Shown to be at most two points below the teacher: the lower bound of the difference is above that."""


@dataclass(frozen=True)
class LmEval:
    """What lm-eval measured, the teacher's row before its students', and the version of the library."""

    version: str
    tasks: list[Score]

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "LmEval":
        return cls(tree["version"], [Score(**row) for row in tree["tasks"]])


def score_rows(one: Named, loaded: Any, found: Mapping[str, Any], seed: int) -> list[Score]:
    """Rows of a task, or of a group over all samples of its tasks, and then of each of these."""
    names = list(loaded["tasks"])
    _refuse_other_prompts(names, found)
    group = one.task if one.task not in names else None
    rows = []
    if group is not None:
        rows += _metric_rows(one, group, names, loaded, found, seed, None)
    for name in names:
        rows += _metric_rows(one, name, [name], loaded, found, seed, group)
    return rows


def _metric_rows(
    one: Named,
    label: str,
    names: Sequence[str],
    loaded: Any,
    found: Mapping[str, Any],
    seed: int,
    group: str | None,
) -> list[Score]:
    """Each metric that all of `names` have, over all their samples; of a named task, the one it is quoted by."""
    any_model = next(iter(found.values()))
    keys = [
        {(metric, sample["filter"]) for sample in any_model["samples"][name] for metric in sample["metrics"]}
        for name in names
    ]
    shared = sorted(set.intersection(*keys))
    if one.metric:
        shared = [key for key in shared if key[0] == one.metric]
    if not shared:
        reason = f"it has no metric {one.metric}" if one.metric else "its tasks have no metric in common"
        return [
            Score(label, one.metric, name, None, None, None, 0, not_run=reason, group=group) for name in found
        ]
    shots = {any_model["n-shot"].get(name) for name in names}
    num_fewshot = shots.pop() if len(shots) == 1 else None
    task_version = any_model["versions"].get(label, any_model["versions"].get(names[0]))
    rows = []
    for metric, which in shared:
        how = {getattr(loaded["tasks"][n].aggregation().get(metric), "__name__", "mean") for n in names}
        chance = _chance(metric, names, loaded, any_model) if how == {"mean"} else None
        scores = {
            model: [sample[metric] for name in names for sample in _samples(result, name, which)]
            for model, result in found.items()
        }
        teacher: Score | None = None
        for model, values in scores.items():
            row = Score(
                label,
                metric if which == "none" else f"{metric},{which}",
                model,
                *_value(values, how, found[model]["results"].get(label, {}).get(f"{metric},{which}"), seed),
                samples=len(values),
                chance=chance,
                group=group,
                num_fewshot=num_fewshot,
                task_version=None if task_version is None else str(task_version),
            )
            if model == TEACHER:
                teacher = row
            elif teacher is not None and how == {"mean"}:
                row = _beside(row, teacher, values, scores[TEACHER], seed)
            rows.append(row)
    return rows


def _value(
    values: Sequence[Any], how: set[str], theirs: Any, seed: int
) -> tuple[float | None, float | None, float | None]:
    """The value of a metric and its interval; of an aggregation that is no function of sums, lm-eval's value alone."""
    kind = next(iter(how))
    if len(how) > 1 or kind not in AGGREGATES:
        return (float(theirs) if isinstance(theirs, int | float) else None), None, None
    terms, statistic = AGGREGATES[kind]
    rows = torch.tensor([terms(value) for value in values], dtype=torch.double)
    value = statistic(rows.sum(0, keepdim=True)).item()
    interval: Interval
    if kind == "mean" and {float(x) for x in values} <= {0.0, 1.0}:
        interval = wilson(int(rows[:, 0].sum()), len(values))
    else:
        interval = bootstrap(rows, statistic, seed=seed)
    low, high = (None if math.isnan(end) else end for end in interval)
    return value, low, high


def _beside(row: Score, teacher: Score, ours: Sequence[Any], theirs: Sequence[Any], seed: int) -> Score:
    """A student's row with what it kept of the teacher's."""
    pair = paired([float(x) for x in ours], [float(x) for x in theirs], seed=seed)
    row = replace(
        row,
        wins=pair.wins,
        ties=pair.ties,
        losses=pair.losses,
        p=pair.p,
        difference=pair.difference,
        difference_low=None if math.isnan(pair.low) else pair.low,
        difference_high=None if math.isnan(pair.high) else pair.high,
        kept=pair.non_inferior(),
    )
    if row.value is None or teacher.value is None or teacher.low is None:
        return row
    kept = retention(row.value, teacher.value, row.chance, teacher.low)
    return replace(row, raw=kept.raw, corrected=kept.corrected)


def _chance(metric: str, names: Sequence[str], loaded: Any, result: Any) -> float | None:
    """What guessing scores, over the very samples: one of the choices each, or nothing where a text is to be hit."""
    if metric not in ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"):
        return None
    shares: list[float] = []
    for name in names:
        task = loaded["tasks"][name]
        samples = _samples(result, name, None)
        if task.OUTPUT_TYPE in ("loglikelihood", "generate_until"):
            shares += [0.0] * len(samples)
        elif task.OUTPUT_TYPE != "multiple_choice":
            return None
        elif name in MAJORITY:
            targets = [str(sample["target"]) for sample in samples]
            shares += [max(map(targets.count, set(targets))) / len(targets)] * len(samples)
        else:
            shares += [1 / len(task.doc_to_choice(sample["doc"])) for sample in samples]
    return math.fsum(shares) / len(shares) if shares else None


def _samples(result: Any, name: str, which: str | None) -> list[Any]:
    """The samples of a task in the order of its documents; of one filter, or of the first."""
    samples = result["samples"][name]
    which = samples[0]["filter"] if which is None else which
    return sorted((s for s in samples if s["filter"] == which), key=lambda s: s["doc_id"])


def _refuse_other_prompts(names: Sequence[str], found: Mapping[str, Any]) -> None:
    """A comparison by samples needs the same ones; that they are is shown, not assumed."""

    def prompts(result: Any) -> list[Any]:
        return [(s["doc_id"], s["arguments"]) for name in names for s in _samples(result, name, None)]

    first, *others = found.items()
    for name, result in others:
        if prompts(result) != prompts(first[1]):
            raise EvaluationError(
                f"lm-eval: {name} and {first[0]} were asked different prompts of {names[0]}; the task draws at random "
                "without a seed and cannot be compared"
            )


def adjusted(rows: list[Score]) -> list[Score]:
    """p-values by Holm over each model's rows; parts of a group are rows of their own, not tests of the claim."""
    made = list(rows)
    for model in dict.fromkeys(row.model for row in rows):
        mine = [i for i, r in enumerate(rows) if r.model == model and r.p is not None and r.group is None]
        for index, value in zip(mine, holm([rows[i].p or 0.0 for i in mine]), strict=True):
            made[index] = replace(made[index], p=value)
    return made
