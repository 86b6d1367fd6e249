"""Tasks of lm-eval (the LM Evaluation Harness): teacher and students in one process, on the same prompts.

Every model goes through one adapter, one task object and one order of requests, so each sample is a pair. lm-eval
itself is imported when it is needed: `pip install 'linearize[eval]'`. Prompts are raw text, without a chat template.
The columns that pad a head are cut off, as in every other measure.

Log-likelihood batches come padded on the right without a mask, which a causal model cannot see; prompts to be continued
come padded on the left with one.
"""

import copy
import difflib
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from ..complaints import near
from ..modeling.errors import EvaluationError
from .export import export
from .likelihood import TEACHER
from .statistics import Interval, bootstrap, holm, paired, retention, wilson

__all__ = ["GROUPS", "LmEval", "Score", "check", "export", "measure"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Named:
    """One task of a named group, the metric that papers quote of it, and its number of solved examples."""

    task: str
    metric: str
    num_fewshot: int | None = None


GROUPS: dict[str, list[Named]] = {
    "zero-shot": [
        Named("lambada_openai", "acc", 0),
        Named("piqa", "acc", 0),
        Named("hellaswag", "acc_norm", 0),
        Named("arc_easy", "acc", 0),
        Named("arc_challenge", "acc_norm", 0),
        Named("winogrande", "acc", 0),
    ],
    "mmlu": [Named("mmlu", "acc", 5)],
}
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


def check(tasks: Sequence[str], folder: str | Path | None = None) -> None:
    """Raise now what `measure` would raise later: no lm-eval, no such folder, no such task."""
    _manager(_asked(tasks), folder)


def measure(
    models: Mapping[str, nn.Module],
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    folder: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> LmEval:
    """Scores of every model, the one called "teacher" first, on lm-eval's tasks or those of a local `folder` of YAML.

    `tasks` are names of lm-eval or of `GROUPS`; `limit` takes the first samples of each task alone. A task whose data
    cannot be had is a row that says so. `progress` hears (models and tasks done, all of them).
    """
    asked = _asked(tasks)
    manager = _manager(asked, folder)
    rows: list[Score] = []
    with _quiet(), _same_randomness():
        adapters = {name: _adapter(model, tokenizer, models, batch_size) for name, model in models.items()}
        for index, one in enumerate(asked):
            shots = num_fewshot if num_fewshot is not None else one.num_fewshot
            try:
                loaded = manager.load([one.task])
            except Exception as error:  # of a hub, a file or a script: whatever it is, the data are not there
                reason = f"its data cannot be had ({type(error).__name__}: {_line(error)})"
                logger.warning("lm-eval: %s is not run: %s", one.task, reason)
                rows += [
                    Score(one.task, one.metric or "", name, None, None, None, 0, not_run=reason)
                    for name in models
                ]
                continue
            found = {}
            for place, (name, adapter) in enumerate(adapters.items()):
                found[name] = _run(adapter, loaded, one.task, manager, shots, limit, seed)
                if progress is not None:
                    progress(index * len(models) + place + 1, len(asked) * len(models))
            rows += _rows(one, loaded, found, seed)
    return LmEval(version("lm_eval"), _adjusted(rows))


def _asked(tasks: Sequence[str]) -> list[Named]:
    named = [one for task in tasks for one in GROUPS.get(task, [Named(task, "")])]
    return list({one.task: one for one in named}.values())


def _manager(asked: Sequence[Named], folder: str | Path | None) -> Any:
    """An index of tasks that has all those asked for, the folder's before lm-eval's own."""
    try:
        version("lm_eval")
        from lm_eval import tasks  # pyright: ignore[reportMissingImports]
    except (ImportError, PackageNotFoundError) as error:
        raise EvaluationError(
            f"evaluate.lm_eval: needs lm-eval ({_line(error)}); pip install 'linearize[eval]'"
        ) from None
    if folder is not None and not Path(folder).is_dir():
        raise EvaluationError(
            f"evaluate.lm_eval.folder: {folder} is no folder; give one with lm-eval's task YAML"
        )
    local = [] if folder is None else [str(folder)]
    with _quiet():
        # The whole of lm-eval is thousands of files, and a minute; most tasks stand in a folder of their first words.
        manager = tasks.TaskManager(include_path=local, include_defaults=False)
        missing = [one.task for one in asked if one.task not in manager.all_tasks]
        if missing:
            own = Path(next(iter(tasks.__path__)))
            likely = sorted(
                {str(own / start) for name in missing for start in _starts(name) if (own / start).is_dir()}
            )
            manager = tasks.TaskManager(include_path=[*likely, *local], include_defaults=False)
        if any(name not in manager.all_tasks for name in missing):
            manager = _everything(local)
    for name in missing:
        if name not in manager.all_tasks:
            names = [*GROUPS, *manager.all_tasks]
            hint = near(name, difflib.get_close_matches(name, names, n=1))
            raise EvaluationError(
                f"evaluate.lm_eval.tasks: lm-eval {version('lm_eval')} has no task {name!r}{hint}"
            )
    return manager


def _everything(local: list[str]) -> Any:
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    return TaskManager(include_path=local)


def _starts(name: str) -> list[str]:
    """ "arc_easy" -> "arc", "arc_easy"."""
    words = name.split("_")
    return ["_".join(words[:count]) for count in range(1, len(words) + 1)]


def _adapter(model: Any, tokenizer: Any, models: Mapping[str, Any], batch_size: int) -> Any:
    """lm-eval's own adapter of transformers models, without the columns that pad a head and without bars."""
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    columns = len(tokenizer)

    class Adapter(HFLM):
        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            return super()._model_call(inps, *args, **kwargs)[..., :columns]

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

    # One length for all, so that all are cut alike: what the teacher was made for.
    teacher = models.get(TEACHER, model)
    context = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)
    # It sets a pad token: on a copy, for the tokenizer is the caller's.
    return Adapter(
        pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, max_length=context
    )


def _run(
    adapter: Any, loaded: Any, task: str, manager: Any, shots: int | None, limit: int | None, seed: int
) -> Any:
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]

    groups = loaded.get("groups") or {}
    asked = [groups[task]] if task in groups else list(loaded["tasks"].values())
    return simple_evaluate(
        model=adapter,
        tasks=asked,
        num_fewshot=shots,
        limit=limit,
        bootstrap_iters=0,  # the intervals are ours
        log_samples=True,
        task_manager=manager,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )


def _rows(one: Named, loaded: Any, found: Mapping[str, Any], seed: int) -> list[Score]:
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


def _adjusted(rows: list[Score]) -> list[Score]:
    """p-values by Holm over each model's rows; parts of a group are rows of their own, not tests of the claim."""
    made = list(rows)
    for model in dict.fromkeys(row.model for row in rows):
        mine = [i for i, r in enumerate(rows) if r.model == model and r.p is not None and r.group is None]
        for index, value in zip(mine, holm([rows[i].p or 0.0 for i in mine]), strict=True):
            made[index] = replace(made[index], p=value)
    return made


@contextmanager
def _same_randomness() -> Iterator[None]:
    """lm-eval seeds every generator there is; the caller's are put back."""
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])


@contextmanager
def _quiet() -> Iterator[None]:
    """What lm-eval logs is about its own inner life, warnings included."""
    theirs = logging.getLogger("lm_eval")
    before = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        theirs.setLevel(before)


def _line(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return words if len(words) <= 200 else f"{words[:200]}..."
