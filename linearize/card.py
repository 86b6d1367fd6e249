"""The model card of a student: what it is, what was measured, where its limits are; for people and for the Hub."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .certificate import CERTIFICATE, verify
from .checkpoint import CONFIG
from .licence import Licence
from .methods import build_method, method_names
from .modeling.errors import CheckpointError, RecipeError
from .modeling.window import SoftmaxConfig
from .recipe import Recipe

ASSETS = "assets"
LICENCE_UNKNOWN = Licence(None, "no recipe names the teacher")


@dataclass(frozen=True)
class Source:
    """A student's folder with what its run says about it."""

    folder: Path
    run: Path
    """The run's folder; the student's own where there is no run."""
    name: str
    """What the run's results call this model."""
    recipe: Recipe | None
    certificate: Mapping[str, Any] | None
    results: Mapping[str, Any]
    """As in ``results.json``; empty where nothing was measured."""

    @classmethod
    def of(cls, folder: Path) -> "Source":
        """``folder`` is a student's; its run is found above it."""
        above, name = folder.parent, "student"
        if above.parent.name == "control":
            above, name = above.parent.parent, f"{above.name} control"
        run = above if (above / "recipe.yaml").is_file() or (above / "table.md").is_file() else folder
        try:
            recipe = Recipe.from_file(folder / "recipe.yaml")
        except RecipeError:
            recipe = None
        certificate = _json(folder / CERTIFICATE) or _json(run / CERTIFICATE)
        results = _mapping(certificate, "results") or _mapping(_json(run / "results.json"), "results")
        return cls(folder, run, name, recipe, certificate, results or _mapping(certificate, "measured"))

    @property
    def failed_gates(self) -> list[str]:
        """Names of the integrity gates that its certificate says have failed."""
        tree = _mapping(self.certificate, "measured") or self.certificate
        gates = _mapping(tree, "gates").get("gates")
        rows = [_mapping(gate) for gate in gates] if isinstance(gates, list) else []
        found = [str(row.get("name")) for row in rows if row.get("status") == "failed"]
        said = self.certificate is not None and self.certificate.get("status") == "failed"
        return found or (["which ones cannot be read"] if said else [])

    @property
    def certificate_file(self) -> Path | None:
        """Where its certificate is, readable or not; None where there is none."""
        return next((at for at in (self.folder / CERTIFICATE, self.run / CERTIFICATE) if at.exists()), None)

    @property
    def teacher(self) -> str:
        return self.recipe.teacher.name if self.recipe else "its teacher"

    @property
    def layers(self) -> list[Mapping[str, Any]]:
        config = json.loads((self.folder / CONFIG).read_text(encoding="utf-8"))
        return list(config["linearize"]["layers"].values())


def card(
    folder: Path,
    repo_id: str,
    *,
    licence: Licence = LICENCE_UNKNOWN,
    revision: str | None = None,
    adapter: bool = False,
    pictures: Mapping[str, str] | None = None,
) -> ModelCard:
    """The card of a student's folder; ``adapter`` where only its adapters and mixers go.

    ``pictures`` maps the names of files below :data:`ASSETS` to what they show.
    """
    source = Source.of(folder)
    methods = [build_method(layer["method"]) for layer in source.layers]
    method = method_names(m.name for m in methods)
    name, own = source.teacher, source.teacher.startswith((".", "/", "~"))
    results = evaluations(source)
    data = ModelCardData(
        base_model=name if "/" in name and not own else None,
        license=licence.id,
        license_name=licence.name,
        license_link=licence.link,
        library_name="linearize" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["linearize", "linear-attention", method, *(["adapter"] if adapter else [])],
        model_name=repo_id.partition("/")[2] if results else None,
        eval_results=results or None,
    )
    title = Path(name).name if own else name
    converted = sum(m.name != "softmax" for m in methods)
    parts = [
        f"---\n{data.to_yaml()}\n---\n# {title}, with linear attention",
        _status(source),
        f"{converted} of {len(methods)} attention layers of `{title}` replaced by `{method}` and taught to imitate "
        "the original, with [linearize](https://pypi.org/project/linearize).",
        _usage(repo_id, revision, adapter),
        *_shown(pictures or {}),
        _measured(source, methods),
        _limits(source, methods, adapter),
        _licence(licence, title),
    ]
    return ModelCard("\n\n".join(part for part in parts if part) + "\n")


def _status(source: Source) -> str:
    """What the certificate says; first of all where something is missing. ``complete`` only with hashes that match."""
    if source.certificate_file is None:
        return "> **No certificate: nothing was checked.**"
    if source.certificate is None:
        return "> **Certificate: cannot be read.**"
    status = str(source.certificate.get("status", "unknown"))
    if status == "complete":
        return _complete(source)
    missing = source.certificate.get("not_run")
    names = [str(_mapping(x).get("name", x)) for x in missing] if isinstance(missing, list) else []
    lines = [f"> **Certificate: {status}.**"]
    lines += [f"> Failed: {', '.join(source.failed_gates)}."] if source.failed_gates else []
    lines += [f"> Not run: {', '.join(names)}."] if names else []
    return "\n".join(lines)


def _complete(source: Source) -> str:
    try:
        found = verify(source.folder)
    except CheckpointError:
        return "> **Certificate: says complete, and cannot be verified.**"
    if found.mismatched:
        return f"> **Certificate: says complete, and is of another student: {', '.join(found.mismatched)} differ.**"
    left = [name for name in found.not_checked if not name.startswith("data.")]
    told = f" {', '.join(left)} could not be checked when this card was written." if left else ""
    return f"Certificate: complete; see `certificate.json`.{told}"


def _usage(repo_id: str, revision: str | None, adapter: bool) -> str:
    at = f', revision="{revision}"' if revision else ""
    if adapter:
        return f"""These are the adapters of the projections and the weights of the new layers alone: they mean nothing
without the converted model, and peft refuses to put them on an unconverted one.

```python
import linearize

model, tokenizer = linearize.load("{repo_id}")
print(linearize.generate(model, tokenizer, "The old man"))
```"""
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo_id}"{at}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{repo_id}"{at}, trust_remote_code=True)
prompt = tokenizer("The old man", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))
```

`trust_remote_code` runs the inference code of this repository: read it first. `linearize.load("{repo_id}")` runs
none of it."""


def _shown(pictures: Mapping[str, str]) -> Iterator[str]:
    """Two side by side, each under its words."""
    left = [(_alt(caption), f"{ASSETS}/{name}") for name, caption in pictures.items()]
    while left:
        row, left = left[:2], left[2:]
        heads, rule = " | ".join(alt for alt, _ in row), " | ".join("---" for _ in row)
        yield f"| {heads} |\n| {rule} |\n| {' | '.join(f'![{alt}]({place})' for alt, place in row)} |"


def _alt(caption: str) -> str:
    """Words that end no link."""
    return " ".join(caption.translate({ord(mark): "" for mark in "[]()<>`|\\"}).split())


def _measured(source: Source, methods: list[Any]) -> str:
    table = source.run / "table.md"
    if not table.is_file():
        return "Nothing was measured."
    text = table.read_text(encoding="utf-8").strip()
    if source.name != "student":
        return f"This model is `{source.name}` in the tables.\n\n{text}"
    if source.recipe and not {*methods} <= {SoftmaxConfig(), *source.recipe.methods.values()}:
        return f"Measured before fields of its methods were set anew.\n\n{text}"
    return text


def _limits(source: Source, methods: list[Any], adapter: bool) -> str:
    """What a user must know before relying on it, from what is known of this very model."""
    lines = []
    if source.recipe is not None:
        length = source.recipe.data.seq_len
        lines.append(
            f"Trained on sequences of {length:,} tokens. Longer texts run, at constant cost in the converted layers, "
            "but nothing was taught there; only lengths in the tables were measured."
        )
    kept = sum(m.name == "softmax" for m in methods)
    if kept:
        lines.append(
            f"{kept} {'layers keep' if kept > 1 else 'layer keeps'} softmax attention and a KV cache that grows with "
            "the text."
        )
    lines.append(
        "A state of bounded size cannot hold everything: expect less recall of single facts from far back than the "
        "original has, whatever the perplexity says."
    )
    worse = [
        f"{cell['task']} at {cell['length']:,} tokens: {cell['value']:.0%}, original {cell['teacher']:.0%}"
        for cell in _recall(source)
        if cell["teacher"] - cell["value"] >= 0.05
    ]
    if worse:
        lines.append(f"Measured losses: {'; '.join(worse)}.")
    if not source.results:
        lines.append("Nothing about its quality is known.")
    lines.append("What the original gets wrong or should not say, this model does too.")
    if adapter:
        lines.append("The original's weights are needed, at the revision that the adapters were made from.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _licence(licence: Licence, teacher: str) -> str:
    if licence.id is None:
        return (
            f"## Licence\n\nUnknown: {licence.source}. The terms of `{teacher}` apply; find them before use."
        )
    label = f" ({licence.name})" if licence.name else ""
    text = f"## Licence\n\n`{licence.id}`{label}, that of `{teacher}` by {licence.source}."
    if licence.forbids:
        text += f" It speaks of {licence.forbids!r}; whoever published this says that they may."
    return text


def evaluations(source: Source) -> list[EvalResult]:
    """What was measured of this model, in the Hub's format; intervals and counts stand in ``metric_args``."""
    results = source.results
    text = str(results.get("source") or "held-out text")
    found = []

    def add(dataset: str, kind: str, metric: str, value: Any, **args: Any) -> None:
        if _finite(value):
            args = {key: entry for key, entry in args.items() if entry is not None}
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=kind,
                    dataset_name=dataset,
                    metric_type=metric,
                    metric_name=metric.replace("_", " "),
                    metric_value=value,
                    metric_args=args or None,
                )
            )

    for length, by_model in _mapping(results, "likelihood").items():
        own = _mapping(by_model, source.name)
        intervals = _mapping(own, "intervals")
        for key, metric in {"ppl": "perplexity", "kl": "kl_to_teacher", "top1": "top1_agreement"}.items():
            interval = list(intervals.get(key) or []) or None
            counts = {"windows": own.get("sequences"), "interval_95": interval}
            add(f"{text}, {int(length):,} tokens", "text", metric, own.get(key), **counts)
    for cell in _recall(source):
        name = f"{cell['task']}, {cell['length']:,} tokens"
        interval = [cell.get("low"), cell.get("high")]
        add(name, "recall", "accuracy", cell["value"], prompts=cell["samples"], interval_95=interval)
    tasks = _mapping(results, "lm_eval").get("tasks")
    for task in map(_mapping, tasks if isinstance(tasks, list) else ()):
        if task.get("model") == source.name:
            interval = [task.get("low"), task.get("high")]
            add(
                str(task.get("task")), str(task.get("task")), str(task.get("metric")), task.get("value"),
                samples=task.get("samples"), interval_95=interval,
            )  # fmt: skip
    return found


def _recall(source: Source) -> Iterator[dict[str, Any]]:
    """Cells of this model with its and the teacher's share of right answers."""
    cells = source.results.get("recall")
    cells = [_mapping(cell) for cell in cells] if isinstance(cells, list) else []
    whole = [
        c for c in cells if {"task", "length", "model", "correct", "samples"} <= c.keys() and c["samples"]
    ]
    teachers = {
        (c["task"], c["length"]): c["correct"] / c["samples"] for c in whole if c["model"] == "teacher"
    }
    for cell in whole:
        if cell["model"] == source.name:
            share = cell["correct"] / cell["samples"]
            teacher = teachers.get((cell["task"], cell["length"]), share)
            yield {**cell, "value": share, "teacher": teacher}


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _mapping(tree: Any, key: str | None = None) -> Mapping[str, Any]:
    """``tree`` or its entry, where that is a mapping; else nothing: files of other versions are read too."""
    value = tree if key is None else tree.get(key) if isinstance(tree, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def _json(path: Path) -> Mapping[str, Any] | None:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, Mapping) else None
