"""Recall prompts as a folder of lm-eval tasks, so that any harness that reads them can ask the same questions."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ..files import write_text
from ..modeling.errors import EvaluationError
from .recall import digest, prompts

GROUP = "linearize_recall"
LOADER = "prompts.py"
# Beside the task files: a path inside them would hold for one machine only.
SCRIPT = '''"""Reads the prompts that stand beside this file."""

import json
from pathlib import Path

import datasets


def load(file, **_):
    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    return datasets.DatasetDict({"test": datasets.Dataset.from_list([json.loads(line) for line in lines])})
'''


def export(
    folder: str | Path,
    tokenizer: Any,
    tasks: Sequence[str],
    lengths: Sequence[int],
    *,
    samples: int,
    seed: int = 0,
    haystack_tokens: Tensor | None = None,
) -> list[str]:
    """Writes the prompts of `recall.measure` with the same arguments to a new folder; returns the tasks' names.

    Each task and length is an lm-eval task of type loglikelihood, whose `acc` is whether greedy decoding gives the
    whole answer: the verdict of `recall.score`. `linearize_recall` is all of them. Prompts become text, which a
    tokenizer may cut anew at the seams of its parts: lengths are those of the token lists, to a few tokens.
    Raises EvaluationError for a folder that holds anything.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise EvaluationError(f"{folder}: exists already; export to a new folder")
    asked = {
        f"linearize_{task}_{length}": prompts(
            tokenizer, task, length, samples=samples, seed=seed, haystack_tokens=haystack_tokens
        )
        for task in tasks
        for length in lengths
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / LOADER, SCRIPT)
    for name, made in asked.items():
        lines = [
            json.dumps(
                {
                    # The adapter puts begin-of-sequence in front, as the tokenizer does.
                    "prompt": tokenizer.decode(prompt.ids, skip_special_tokens=True),
                    "answer": tokenizer.decode(prompt.answer),
                    "depth": round(prompt.depth, 4),
                },
                ensure_ascii=False,
            )
            for prompt in made
        ]
        write_text(folder / f"{name}.jsonl", "\n".join(lines) + "\n")
        spec = {
            "task": name,
            "custom_dataset": f"!function {LOADER.removesuffix('.py')}.load",
            "dataset_kwargs": {"file": f"{name}.jsonl"},
            "output_type": "loglikelihood",
            "test_split": "test",
            "doc_to_text": "prompt",
            "doc_to_target": "answer",
            "num_fewshot": 0,
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1, "prompts": digest(made)},
        }
        # A tag that plain YAML has no words for.
        text = yaml.safe_dump(spec, sort_keys=False).replace(
            f"'{spec['custom_dataset']}'", str(spec["custom_dataset"])
        )
        write_text(folder / f"{name}.yaml", text)
    group = {
        "group": GROUP,
        "task": list(asked),
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    write_text(folder / f"{GROUP}.yaml", yaml.safe_dump(group, sort_keys=False))
    return [*asked, GROUP]
