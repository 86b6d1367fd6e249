"""The road of a run: teacher, convert, data, transfer, finetune, save, control, evaluate; what is done stays.

<output>/
  recipe.yaml           resolved, every default included; a run of another recipe is refused here
  data/                 the tokens, sampled or read once
  scan/                 with `plan`: what each layer loses alone, and the plan made of it (see scan/, plan.py)
  transfer/ finetune/   metrics.jsonl, checkpoints while they run, then the weights (see train/resume.py)
  student/              the checkpoint: what is measured, and what may be published; certificate.json says what was
  control/<method>/     transfer/, finetune/ and student/ of each control that the recipe asks for
  timings.json          seconds per phase, over all the calls that it took
  suite/                the recall suite's answers and free continuations, where the recipe asks for them
  results.json table.md what was measured, with its origin; written last
  report.html report.md the same as a page, where matplotlib is installed
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import certificate, checkpoint, interrupt, report
from .convert import convert, describe, unconvert
from .data import Corpus, build
from .evaluate import GatesFailed, Results, check, evaluate
from .evaluate.length_gate import context_of, gate_lengths, gated
from .evaluate.vocabulary import refuse_other_vocabulary
from .files import write_text
from .generate import generate
from .methods import adjust, build_method, method_words
from .modeling.errors import RecipeError
from .modeling.linear import LinearConfig
from .modeling.mixer import MethodConfig
from .plan import PlanResult, plan, resolved
from .plan import check as check_plan
from .progress import Progress, Watch
from .proof import (
    certify,
    controls_of,
    device_of,
    gates_of,
    refuse_its_code,
    stop_where_failed,
    text_of,
)
from .provenance import origin
from .recipe import Evaluate, Recipe
from .run_folder import Clock, claimed, folder_of, refuse_other_data, refuse_other_run
from .scan import ScanResult
from .stages import converted, stages_of
from .teacher import load_teacher
from .tracking import check_trackers, tracked
from .train.finetune import finetune
from .train.transfer import transfer

logger = logging.getLogger(__name__)

PROMPT_TOKENS = 48
MEASURES = (  # what may change once the student exists
    "teacher",
    "data",
    "evaluate",
    "seed",
    "device",
    "tracking",
)


@dataclass(frozen=True)
class RunResult:
    """Where the run is, what it measured, a continuation by the student, and the seconds of each phase."""

    folder: Path
    checkpoint: Path
    results: Results
    prompt: str
    continuation: str
    timings: dict[str, float]


@interrupt.catching()
def run(recipe: Recipe, *, progress: Watch | None = None) -> RunResult:
    """Do what the recipe says, or the rest of it when its folder holds a part.

    Ctrl-C ends the step, saves what there is and raises :class:`linearize.interrupt.Stopped`; again, it stops at once.
    A failed integrity gate ends it with :class:`linearize.evaluate.GatesFailed` once the student is saved: its
    certificate says so, and nothing else is measured. The same recipe with ``evaluate.gates: false`` goes on from there
    without gates; the certificate still says that one failed, and so does a warning. A finished run whose certificate
    says so by now ends the same way.
    """
    folder = folder_of(recipe)
    refuse_other_run(folder, recipe)
    if (folder / "results.json").exists():
        _tell_failed_gates(folder / "student", recipe)
        return _finished(folder)
    check_trackers(recipe.tracking)
    with tracked(recipe.tracking, folder, recipe.to_dict(), progress) as watch:
        return _go(recipe, folder, watch)


def _go(recipe: Recipe, folder: Path, progress: Watch | None) -> RunResult:
    device = device_of(recipe)
    clock = Clock(folder)

    with clock("teacher"):
        model, tokenizer = load_teacher(recipe.teacher, device)
        unconvert(converted(model, recipe))  # refused, if at all, before any data is made
        _refuse_long_sequences(model, recipe)
        if recipe.plan is not None:
            check_plan(model, recipe, own=folder / "scan")
    with clock("data"), claimed(folder, recipe):
        at = folder / "data"
        corpus = build(
            recipe.data,
            tokenizer,
            teacher=model,
            cache_dir=at,
            seed=recipe.seed,
            device=device,
            progress=progress,
        )
        check(model, tokenizer, corpus, evaluated(recipe, model, corpus))
    planned: tuple[PlanResult, ScanResult] | None = None
    asked = recipe
    if recipe.plan is not None:
        with clock("plan"):
            planned = plan(model, tokenizer, corpus, recipe, folder=folder / "scan", progress=progress)
            recipe = resolved(recipe, planned[0])
    model = converted(model, recipe)
    _teach(model, tokenizer, corpus, recipe, folder, clock, progress)

    saved = {"student": folder / "student"}
    if recipe.control.enabled:
        for method in dict.fromkeys(recipe.control.methods):
            name, below = f"{method} control", folder / "control" / method
            model, _ = load_teacher(recipe.teacher, device)
            model = _control(model, recipe, method)
            _teach(model, tokenizer, corpus, recipe, below, clock.under(name), _under(name, progress))
            saved[name] = below / "student"

    with clock("evaluate"):
        students = {name: checkpoint.load(at, device=device)[0] for name, at in saved.items()}
        teacher, tokenizer = load_teacher(recipe.teacher, device)
        watch = interrupt.stopping(progress, f"evaluate: what was trained is saved in {folder}")
        gates = gates_of(students["student"], teacher, tokenizer, saved["student"], recipe, watch)
        stop_where_failed(gates, saved["student"], saved["student"], recipe, corpus, _chosen(asked, planned))
        config = evaluated(recipe, teacher, corpus)
        stages = stages_of(saved["student"], recipe, device)
        results = evaluate(
            students, teacher, tokenizer, corpus, config, recipe.seed, watch, folder / "suite", stages
        )
        if recipe.evaluate.length_gate:
            results = gated(results, recipe.data.seq_len, context_of(teacher))
        results = replace(results, gates=gates)
        prompt, text = _continuation(students["student"], tokenizer, corpus, recipe)
        for name, at in saved.items():
            own = results if name == "student" else replace(results, gates=None, ablations=None)
            certify(at, own, recipe, _chosen(asked, planned) if name == "student" else None)
    made = _finish(folder, asked, results, prompt, text, clock.seconds, planned)
    _tell_failed_gates(made.checkpoint, recipe)  # those of an earlier call, which could not be run again
    return made


def _chosen(recipe: Recipe, planned: "tuple[PlanResult, ScanResult] | None") -> dict[str, Any] | None:
    """What chose the layers, as the certificate records it."""
    if planned is None:
        return None
    made, scanned = planned
    return {"budget": recipe.to_dict()["plan"], "plan": made.to_dict(), "scan": scanned.to_dict()}


def _control(model: Any, recipe: Recipe, name: str) -> Any:
    """A control: the teacher converted to a part of the student's method, or to nothing (``softmax``)."""
    if name == "softmax":
        return convert(model, build_method({"name": name}))
    if name != "matched_window":
        method = next(method for method in control_methods(recipe) if method.name == name)
        return converted(model, recipe, method)
    student = [layer for layer in describe(converted(model, recipe)) if layer.method != "softmax"]
    unconvert(model)
    width = model.dtype.itemsize
    windows = {}
    for layer in student:
        shape = layer.geometry
        token = shape.kv_heads * (shape.key_dim + shape.value_dim) * width
        windows[layer.index] = build_method({"name": "window", "window": max(1, layer.state_bytes // token)})
    return convert(model, windows)


def _teach(
    model: Any,
    tokenizer: Any,
    corpus: Corpus,
    recipe: Recipe,
    folder: Path,
    clock: "Clock",
    progress: Watch | None,
) -> None:
    """Both training stages, and the checkpoint ``folder/student``; the student and the control have the same."""
    if (folder / "student").exists():  # it takes its name only when it is whole
        refuse_other_data(folder, corpus, recipe)
        return
    how = {
        "seed": recipe.seed,
        "device": device_of(recipe),
        "precision": precision_of(recipe),
        "progress": progress,
    }
    with clock("transfer"):
        transfer(model, corpus, recipe.transfer, folder=folder / "transfer", **how)
    with clock("finetune"):
        at, vocab = folder / "finetune", len(tokenizer)
        model, _ = finetune(model, corpus, recipe.finetune, folder=at, vocab_size=vocab, **how)
    with clock("save"):
        checkpoint.save(model, tokenizer, folder / "student", extra={"recipe.yaml": recipe.to_yaml()})


def evaluated(recipe: Recipe, teacher: Any, corpus: Corpus) -> Evaluate:
    """What is measured: with the length gate, at multiples of the training length too, as far as the text goes."""
    config = recipe.evaluate
    if not config.length_gate:
        return config
    longest = max((len(held.pool) for held in corpus.held), default=0)
    more = [n for n in gate_lengths(recipe.data.seq_len, context_of(teacher)) if n < longest]
    return config.model_copy(update={"seq_lens": sorted({*config.seq_lens, *more})})


@interrupt.catching()
def evaluate_checkpoint(
    folder: str | Path,
    overrides: Sequence[str] = (),
    *,
    progress: Watch | None = None,
    suite_folder: Path | None = None,
) -> Results:
    """The measurements of a saved student beside its teacher, by the recipe that was saved with it.

    A student on the Hub, named by its id, is fetched first.

    ``overrides`` change it: ``data.held_out=[{kind: text, path: my.txt}]`` for other text, say. Without other text,
    what was held out in training is found again: other sources or lengths would move its border. ``method.field=value``
    sets what no weight depends on (:func:`linearize.adjust`). The recall suite and free continuations are kept in
    ``suite_folder``.
    """
    given, folder = folder, checkpoint.fetch(folder)
    fields, overrides = method_words(overrides)
    student, own_tokenizer = checkpoint.load(folder)
    student = adjust(student, **fields)
    if not (folder / "recipe.yaml").is_file():
        raise RecipeError(
            f"{folder}: has no recipe.yaml, which names teacher and text; write one there with Recipe.to_yaml"
        )
    saved = Recipe.from_file(folder / "recipe.yaml")
    recipe = Recipe.from_file(folder / "recipe.yaml", overrides=overrides)
    refuse_its_code(given, folder, recipe, overrides)
    if fixed := saved.differences(recipe, ignore=MEASURES):
        raise RecipeError(
            f"{fixed[0]}: was settled when the student was made; what can be changed is {', '.join(MEASURES)}"
        )
    moved = [key for key in saved.differences(recipe) if key.startswith("data.") and key != "data.cache"]
    if moved and recipe.data.held_out is None:
        raise RecipeError(
            f"{moved[0]}: another value would take training text for held-out text; "
            "leave it, or name the text to measure on with data.held_out"
        )
    device = device_of(recipe)
    teacher, tokenizer = load_teacher(recipe.teacher, device)
    refuse_other_vocabulary(own_tokenizer, tokenizer, str(given))
    corpus = text_of(folder, recipe, saved.seed, teacher, tokenizer, progress)
    refuse_other_data(folder.parent, corpus, recipe)
    students = {"student": student.to(device)}
    if recipe.evaluate.ablations.enabled:  # whether the linear branch is used, the control says
        students |= {name: checkpoint.load(at, device=device)[0] for name, at in controls_of(folder).items()}
    at = folder if not fields else None  # with other fields it is another student than the folder's
    watch = interrupt.stopping(progress, f"evaluate: {folder} is as it was; nothing of a measurement is kept")
    gates = gates_of(students["student"], teacher, tokenizer, at, recipe, watch)
    stop_where_failed(gates, at, Path(given), recipe, corpus)
    # The length gate needs the control beside the student.
    config = recipe.evaluate.model_copy(update={"length_gate": False})
    made = saved.model_copy(update={"teacher": recipe.teacher})
    stages = stages_of(folder, made, device, fields)
    results = evaluate(students, teacher, tokenizer, corpus, config, recipe.seed, watch, suite_folder, stages)
    results = replace(results, gates=gates)
    if at is not None:
        try:
            certify(at, results, recipe)
        except OSError as error:
            logger.warning("%s: its certificate cannot be written (%s)", folder, error.strerror or error)
    return results


def control_methods(recipe: Recipe) -> list[MethodConfig]:
    """The controls made of the method's fields: the student's exact window and nothing behind it; its maps without a
    window. :func:`_control` makes the others."""
    method, window = recipe.method, {"sinks": recipe.control.sinks}
    if chunk := getattr(method, "chunk", None):  # a query sees its own and the one before
        window |= {"window": chunk, "window_kind": "terraced"}
    elif width := getattr(method, "window", None):
        window |= {"window": width, "window_kind": getattr(method, "window_kind", "sliding")}
    if recipe.control.window:
        window["window"] = recipe.control.window
    fields = {
        "window": window,
        "linear": {
            field.name: getattr(method, field.name)
            for field in dataclasses.fields(LinearConfig)
            if isinstance(method, LinearConfig)
        },
    }
    named = [name for name in dict.fromkeys(recipe.control.methods) if name in fields]
    return [build_method({"name": name, **fields[name]}) for name in named]


def precision_of(recipe: Recipe) -> str:
    """``auto`` is bf16 on a GPU and fp32 on a CPU, where half precision is slow."""
    if recipe.precision != "auto":
        return recipe.precision
    return "bf16" if device_of(recipe) == "cuda" else "fp32"


def _tell_failed_gates(student: Path, recipe: Recipe) -> None:
    """A run whose student failed an integrity gate does not end as if it had not."""
    gates = certificate.failed_gates(student)
    if gates is None:
        return
    if recipe.evaluate.gates:
        raise GatesFailed(
            student,
            gates,
            f"so its certificate.json says; `linearize eval {student} --gates` runs them again, and with "
            "evaluate.gates=false the run ends without them",
        )
    failed = "; ".join(gates.failures())
    logger.warning("%s: integrity gate failed: %s; so its certificate.json says", student, failed)


def _refuse_long_sequences(teacher: Any, recipe: Recipe) -> None:
    limit = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)
    if limit and recipe.data.seq_len > limit:
        raise RecipeError(
            f"data.seq_len: {recipe.data.seq_len} is longer than the teacher's context of {limit}; "
            f"give at most {limit}"
        )


def _continuation(student: Any, tokenizer: Any, corpus: Corpus, recipe: Recipe) -> tuple[str, str]:
    prompt = recipe.evaluate.prompt or tokenizer.decode(
        corpus.held_out_tokens[:PROMPT_TOKENS], skip_special_tokens=True
    )
    if not recipe.evaluate.generate_tokens:
        return prompt, ""
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "seed": recipe.seed}
    return prompt, generate(student, tokenizer, prompt, recipe.evaluate.generate_tokens, **sampling)


def _finish(
    folder: Path,
    recipe: Recipe,
    results: Results,
    prompt: str,
    text: str,
    seconds: dict[str, float],
    planned: tuple[PlanResult, ScanResult] | None,
) -> RunResult:
    made = RunResult(folder, folder / "student", results, prompt, text, seconds)
    record = {
        "origin": origin(),
        "recipe": recipe.to_dict(),
        "timings": seconds,
        "prompt": prompt,
        "continuation": text,
        "results": results.to_dict(),
    }
    told = report.markdown(results)
    if planned is not None:
        record |= {"plan": planned[0].to_dict(), "scan": planned[1].to_dict()}
        told = report.as_markdown(report.plan_table(planned[0], planned[1].words)) + "\n" + told
    write_text(folder / "table.md", told)
    write_text(folder / "results.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    if report.available():
        report.write_report([folder])
    return made


def _finished(folder: Path) -> RunResult:
    record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    results = Results.from_dict(record["results"])
    return RunResult(
        folder, folder / "student", results, record["prompt"], record["continuation"], record["timings"]
    )


def _under(name: str, progress: Watch | None) -> Watch | None:
    def watch(at: Progress) -> None:
        assert progress is not None
        progress(replace(at, phase=f"{name} {at.phase}"))

    return watch if progress is not None else None
