"""The files of a suite: one per task and length, a JSON line per question, written whole and read again.

A line holds id, prompt (sha256 of its token ids), references, depth, tokens, models (a fingerprint of all of
them), and per model its output and scores.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import write_text
from ..tasks.budget import Question
from ..tasks.suite import SuiteTask, tokens_of

SCORING = 2  # of the scorers; a change makes old files be measured again


@dataclass(frozen=True)
class Answer:
    """What one model answered to one question, and what it is worth."""

    text: str
    score: float
    contains: float
    strict: bool
    likelihood: bool | None
    prefix: float | None
    parts: float | None = None
    """Of several answers, the share that is right by likelihood."""


Asked = Sequence[tuple[float | None, Question]]


def file_name(label: str, length: int) -> str:
    """The label in lower case with its length, such as `s-niah-2-alternative-haystack-4096.jsonl`."""
    return f"{re.sub(r'[^a-z0-9]+', '-', label.lower()).strip('-')}-{length}.jsonl"


def digest(asked: Sequence[Question]) -> str:
    """sha256 of the prompts and references, in order."""
    return hashlib.sha256(
        "".join(prompt_digest(q) + "\0".join(q.references) for q in asked).encode()
    ).hexdigest()


def prompt_digest(question: Question) -> str:
    """sha256 of the token ids as JSON."""
    return digest_of_tokens(question.ids)


def digest_of_tokens(ids: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()


def fingerprint(models: dict[str, Any]) -> str:
    """Tells models apart whose weights or settings differ, without hashing every byte of them."""
    state = hashlib.sha256(str(SCORING).encode())
    for name, model in models.items():
        state.update(f"{name}\n{model.config.to_json_string(use_diff=False)}\n".encode())
        for key, tensor in model.state_dict().items():
            exact = tensor if tensor.is_floating_point() else tensor.double()
            sums = exact.sum(dtype=torch.double), torch.linalg.vector_norm(exact, dtype=torch.double)
            told = " ".join(f"{value.item():.17g}" for value in sums)
            state.update(f"{key} {tuple(tensor.shape)} {tensor.dtype} {told}\n".encode())
    return state.hexdigest()


def write(
    path: Path, task: SuiteTask, length: int, asked: Asked, models: str, given: dict[str, list[Answer]]
) -> None:
    """The file of a task and length, whole or not at all."""
    lines = []
    for index, (depth, question) in enumerate(asked):
        answers = {name: asdict(rows[index]) for name, rows in given.items()}
        line = {
            "id": f"{task.name}-{length}-{index}",
            "prompt": prompt_digest(question),
            "references": question.references,
            "asked_depth": depth,
            "depth": question.depth,
            "tokens": tokens_of(task, question),
            "models": models,
            "outputs": {name: row.pop("text") for name, row in answers.items()},
            "scores": answers,
        }
        lines.append(json.dumps(line, ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n")


def read(
    path: Path, task: SuiteTask, asked: Asked, models: str, names: Sequence[str]
) -> dict[str, list[Answer]] | None:
    """The answers of a file that was written for these models and questions; None where there is no such file."""
    if not path.is_file():
        return None
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if [line["prompt"] for line in lines] != [prompt_digest(question) for _, question in asked]:
            return None
        if any(line["models"] != models for line in lines):
            return None
        return {
            name: [Answer(text=line["outputs"][name], **line["scores"][name]) for line in lines]
            for name in names
        }
    except (ValueError, KeyError, TypeError):  # not one of ours, or of another version: measured again
        return None
