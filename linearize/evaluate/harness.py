"""Tasks of lm-eval (the LM Evaluation Harness): teacher and students in one process, on the same prompts.

Every model goes through one adapter, one task object and one order of requests, so each sample is a pair. lm-eval
itself is imported when it is needed: `pip install 'linearize[eval]'`. Prompts are raw text, without a chat template.
The columns that pad a head are cut off, as in every other measure.

Log-likelihood batches come padded on the right without a mask, which a causal model cannot see; prompts to be continued
come padded on the left with one.
"""

# Decorators of lm-eval hide the signatures of what they wrap.
# pyright: reportCallIssue=false, reportArgumentType=false

import copy
import difflib
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from ..complaints import near
from ..modeling.errors import EvaluationError
from .export import export
from .harness_rows import LmEval, Named, Score, adjusted, score_rows
from .likelihood import TEACHER

__all__ = ["GROUPS", "LmEval", "Score", "check", "export", "measure"]
logger = logging.getLogger(__name__)
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
            rows += score_rows(one, loaded, found, seed)
    return LmEval(version("lm_eval"), adjusted(rows))


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
