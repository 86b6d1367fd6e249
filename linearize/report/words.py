"""The summary: what a run shows, in sentences, and first of all what it does not show."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..evaluate import TEACHER
from ..evaluate.likelihood import difference
from ..evaluate.speed import SpeedResults
from ..evaluate.statistics import bootstrap, wilson
from ..words import bytes_text
from .continuation import sentences
from .record import Run
from .tables import GATE

LENGTHS = (1024, 8192, 32768)
WINDOW = "window control"
LARGE_GAP = 10
"""Points between likelihood and generation from which a page speaks of them."""
OPTIONAL = {
    "gates": "integrity gates",
    "suite": "the recall suite by depth",
    "ablations": "ablations",
    "continuation": "free continuation",
    "lm_eval": "lm-eval tasks",
}


def summary(run: Run) -> list[str]:
    """The sentences of one run, the most important first."""
    beside = with_control(run)
    used, lines = (
        linear_branch(beside),
        [converted(run), *fidelity(run), *recall(run), *gaps(run), *written_on(run), *memory(run)],
    )
    lines += [*speed(run), *gates(run)]
    if used:
        lines.insert(0 if used.startswith("No evidence") else len(lines), used)
    if (ablations := run.section("ablations")) and not used and not is_window(run):
        lines.append(f"Ablations: {ablations.get('verdict') or 'no verdict'}")
    return [*lines, not_run(beside)]


def is_window(run: Run) -> bool:
    return (run.recipe.get("method") or {}).get("name") == "window"


def with_control(run: Run) -> Run:
    """The run with another's window control beside its student, where it has none of its own."""
    if run.control is None or WINDOW in run.results.models or "student" not in run.control.models:
        return run
    results, lent = run.results, run.control
    recall = [replace(cell, model=WINDOW) for cell in lent.recall if cell.model == "student"]
    likelihood = {
        length: by_model | {WINDOW: lent.likelihood[length]["student"]}
        for length, by_model in results.likelihood.items()
    }
    models = [*results.models, WINDOW]
    return replace(
        run,
        results=replace(results, models=models, recall=[*results.recall, *recall], likelihood=likelihood),
    )


def converted(run: Run) -> str:
    """What was converted, and with how much training."""
    recipe = run.recipe
    teacher = (recipe.get("teacher") or {}).get("name", "an unnamed teacher")
    layers = run.results.memory[TEACHER].layers if TEACHER in run.results.memory else []
    done = run.converted
    kept = [index for index in range(len(layers)) if index not in done]
    where = f"in all {len(layers)} layers" if not kept else f"in {len(done)} of {len(layers)} layers"
    rest = f"; {_numbers(kept)} {'keep' if len(kept) > 1 else 'keeps'} softmax" if kept else ""
    spent = [
        f"{stage.lines[-1].get('tokens', 0):,} tokens of {stage.name}"
        for stage in run.stages
        if stage.model == "student"
    ]
    learnt = f" It was taught with {' and '.join(spent)}." if spent else ""
    return f"{teacher} was converted with {methods(run)} {where}{rest}.{learnt}"


def methods(run: Run) -> str:
    """The methods' names."""
    recipe = run.recipe
    if isinstance(recipe.get("layers"), Mapping):
        names = [
            method.get("name", "?") if isinstance(method, Mapping) else str(method)
            for method in recipe["layers"].values()
        ]
    else:
        names = [(recipe.get("method") or {}).get("name", "an unnamed method")]
    return " and ".join(name for name in dict.fromkeys(names) if name != "softmax")


def fidelity(run: Run) -> Iterator[str]:
    """KL, perplexity and agreement at the longest length, of the first student."""
    if not run.results.likelihood or not run.students:
        return
    length = max(run.results.likelihood)
    by_model, name = run.results.likelihood[length], run.students[0]
    if name not in by_model or TEACHER not in by_model:
        return
    ours, theirs = by_model[name], by_model[TEACHER]
    yield (
        f"On {ours.sequences} x {length:,} tokens of text that it was not trained on, its KL to the teacher is "
        f"{ours.kl:.3f} nats a token{between(ours.intervals['kl'], '.3f')}; perplexity goes from {theirs.ppl:.2f} to "
        f"{ours.ppl:.2f}, and {100 * ours.top1:.1f} % of the likeliest next tokens are the teacher's."
    )


def recall(run: Run) -> Iterator[str]:
    """How much of what the teacher finds the student finds, over cells that the teacher masters."""
    cells = list(_cells(run))
    name = run.students[0] if run.students else None
    pairs = [(theirs, by[name]) for by in cells if (theirs := by.get(TEACHER)) and name in by]
    if not pairs:
        return
    good = [(theirs, ours) for theirs, ours in pairs if not theirs["gated"]]
    if not good:
        yield (
            f"In none of the {len(pairs)} recall cells does the lower end of the teacher's interval reach "
            f"{100 * GATE:.0f} %, so they say nothing of the student."
        )
        return
    # One prompt has no interval.
    kept = sum((ours["high"] or ours["share"]) >= theirs["share"] for theirs, ours in good)
    theirs, ours = min(good, key=lambda pair: pair[1]["share"] - pair[0]["share"])
    yield (
        f"Recall: of {len(good)} cells that the teacher masters (of {len(pairs)}), the student's interval reaches the "
        f"teacher's share in {kept}. Its weakest is {ours['task']} at {ours['length']:,} tokens: "
        f"{100 * ours['share']:.0f} %{between((100 * ours['low'], 100 * ours['high']), '.0f')} "
        f"where the teacher has {100 * theirs['share']:.0f} %."
    )


def gaps(run: Run) -> Iterator[str]:
    """Where being right by likelihood and writing the answer come apart, in lines of the suite that the teacher
    masters."""
    name = run.students[0] if run.students else None
    lines = [c for c in (run.section("suite") or {}).get("cells", []) if c.get("depth") is None]
    theirs = {(c["task"], c["length"]): c for c in lines if c["model"] == TEACHER}
    ours = [c for c in lines if c["model"] == name and not c.get("gated") and c.get("gap") is not None]
    if not ours:
        return
    wide = [c for c in ours if _comes_apart(c)]
    if not wide:
        yield (
            f"In all {len(ours)} lines of the suite that the teacher masters, the student's share wholly right "
            f"by likelihood is within {LARGE_GAP} points of what it writes, or within its interval."
        )
        return
    widest = max(wide, key=lambda c: abs(c["gap"]))
    low, high = wilson(widest["correct"], widest["samples"])
    written = f"{100 * widest['correct'] / widest['samples']:.0f} %{between((100 * low, 100 * high), '.0f')}"
    base = theirs.get((widest["task"], widest["length"])) or {}
    beside = "" if base.get("gap") is None else f", where the teacher's is {base['gap']:+.0f}"
    than = "better" if widest["gap"] > 0 else "worse"
    yield (
        f"By likelihood alone the student would look {than} than it writes: in {len(wide)} of {len(ours)} lines of "
        f"the suite the two come apart by {LARGE_GAP} points or more. The widest is "
        f"{widest.get('label') or widest['task']} at {widest['length']:,} tokens: "
        f"{100 * widest['likelihood']:.0f} % by likelihood, {written} written, over {widest['samples']} prompts: "
        f"a gap of {widest['gap']:+.0f} points{beside}."
    )


def _comes_apart(cell: Mapping[str, Any]) -> bool:
    """Whether the gap is large, and more than the count of prompts explains."""
    low, high = wilson(cell["correct"], cell["samples"])
    return abs(cell["gap"]) >= LARGE_GAP and not low <= cell["likelihood"] <= high


def written_on(run: Run) -> Iterator[str]:
    """What the student writes on freely, beside the teacher."""
    yield from sentences(run.continuation, run.students[0] if run.students else None)


def memory(run: Run) -> Iterator[str]:
    """Bytes of one sequence at a few lengths."""
    sizes = run.results.memory
    name = run.students[0] if run.students else None
    if name not in sizes or TEACHER not in sizes:
        return
    told = [
        f"{bytes_text(sizes[name].bytes_at(n))} instead of {bytes_text(sizes[TEACHER].bytes_at(n))} "
        f"({100 * sizes[name].bytes_at(n) / sizes[TEACHER].bytes_at(n):.0f} %) at {n:,}"
        for n in LENGTHS
        if sizes[TEACHER].bytes_at(n)
    ]
    grows = sizes[name].per_token
    rest = f"every further token adds {bytes_text(grows)}" if grows else "further tokens add nothing"
    yield f"Memory of one sequence: {', '.join(told)} tokens; {rest}."


def speed(run: Run) -> Iterator[str]:
    """From where the student is ahead."""
    if run.speed is None:
        return
    found, up_to = run.speed.crossover, run.speed.up_to
    batch = min((point.batch for point in run.speed.points), default=1)
    ahead = [
        f"{part} from {found[part]:,} tokens"
        if found.get(part) is not None
        else f"{part} nowhere up to {up_to:,}"
        for part in ("prefill", "decode", "memory")
    ]
    yield f"Where it is ahead of the teacher, at batch {batch} on {run.speed.device}: {', '.join(ahead)}."
    yield from full_card(run.speed)


def full_card(speed: SpeedResults) -> Iterator[str]:
    """Both models at their own largest batch: a protocol, and so a sentence, of its own."""
    found = {entry.model: entry for entry in speed.matched_memory.models} if speed.matched_memory else {}
    ours, theirs = found.get("student"), found.get(TEACHER)
    if speed.matched_memory is None or ours is None or theirs is None:
        return
    rates = ours.rate("decode"), theirs.rate("decode")
    more = (
        f", which decodes {rates[0] / rates[1]:.2f} times its tokens a second"
        if rates[0] and rates[1]
        else ""
    )
    yield (
        f"By another protocol, matched memory on {speed.device}: at {speed.matched_memory.length:,} tokens the card "
        f"holds {ours.batch:,} rows of the student and {theirs.batch:,} of the teacher{more}."
    )


def gates(run: Run) -> Iterator[str]:
    """How many integrity gates passed, and the first that did not."""
    if not (found := run.section("gates")):
        return
    every = found.get("gates", [])
    bad = [gate for gate in every if gate.get("status") == "failed"]
    passed = sum(gate.get("status") == "passed" for gate in every)
    first = f" {bad[0]['name']} failed at {bad[0].get('where') or 'an unnamed place'}." if bad else ""
    yield f"Integrity gates: {found.get('status')}; {passed} of {len(every)} passed.{first}"


def not_run(run: Run) -> str:
    """What no number of the page speaks of."""
    absent = [words for key, words in OPTIONAL.items() if run.section(key) is None]
    absent += ["speed"] if run.speed is None else []
    absent += [] if WINDOW in run.results.models else ["a window control"]
    return f"Not run: {', '.join(absent)}." if absent else "Nothing of this page was left out."


def linear_branch(run: Run) -> str | None:
    """Whether the student recalls more than a window alone could: the paired difference to the window control in cells
    that the teacher masters and that are longer than four windows, at 95 % over all of them together."""
    span = exact_span(run)
    if WINDOW not in run.results.models or not run.students or is_window(run):
        return None
    name, cells = run.students[0], []
    for by in _cells(run):
        if (
            {TEACHER, name, WINDOW} <= by.keys()
            and not by[TEACHER]["gated"]
            and by[name]["length"] > 4 * span
        ):
            ours, other = by[name]["hits"], by[WINDOW]["hits"]
            if ours and len(ours) == len(other):
                cells.append((by[name], ours, other))
    where = f"longer than four windows ({4 * span:,} tokens)" if span else "of any length"
    if not cells:
        return (
            f"No evidence that {branch(run)} is used: no recall cell that the teacher masters is {where} and was "
            "asked of the window control too."
        )
    level = 1 - 0.05 / len(cells)
    for cell, ours, other in sorted(cells, key=lambda found: -found[0]["length"]):
        pairs = torch.tensor([[int(a > "0"), int(b > "0")] for a, b in zip(ours, other, strict=True)])
        count = len(ours)
        low, high = bootstrap(
            pairs, lambda sums, n=count: (sums[:, 0] - sums[:, 1]) / n, level=level, seed=run.results.seed
        )
        if low > 0:
            gain = float((pairs[:, 0] - pairs[:, 1]).double().mean())
            more = f"{100 * gain:.0f} points{between((100 * low, 100 * high), '.0f')} more often"
            return (
                f"{branch(run).capitalize()} is used: {cell['task']} at {cell['length']:,} tokens is answered "
                f"{more} than by the window control."
            )
    return (
        f"No evidence that {branch(run)} is used: in none of {len(cells)} recall cells {where} does the student "
        f"answer more prompts than the window control does.{_kl_gain(run, name)}"
    )


def branch(run: Run) -> str:
    """What stands behind the window, in words."""
    name = (run.recipe.get("method") or {}).get("name")
    return "the exact memory behind the window" if name == "salient" else "the linear branch"


def exact_span(run: Run) -> int:
    """Tokens that the first student's exact window sees at most; 0 where the recipe does not say."""
    method = run.recipe.get("method") or {}
    width = method.get("chunk") or method.get("window") or 0
    return width * (2 if method.get("chunk") or method.get("window_kind") == "terraced" else 1)


def _kl_gain(run: Run, name: str) -> str:
    if not run.results.likelihood:
        return ""
    by_model = run.results.likelihood[max(run.results.likelihood)]
    if not {name, WINDOW} <= by_model.keys():
        return ""
    try:
        value, interval = difference(by_model[name], by_model[WINDOW], seed=run.results.seed)
    except ValueError:
        return ""
    return f" Its KL is {value:+.3f}{between(interval, '+.3f')} beside the control's."


def _cells(run: Run) -> Iterator[dict[str, dict[str, Any]]]:
    """Every recall cell by model, of the plain tasks and of the suite, in one form."""
    found: dict[Any, dict[str, dict[str, Any]]] = {}
    for cell in run.results.recall:
        found.setdefault((0, cell.task, cell.length), {})[cell.model] = {
            "task": cell.task,
            "length": cell.length,
            "share": cell.share,
            "low": cell.low,
            "high": cell.high,
            "hits": cell.hits,
            "gated": cell.low < GATE,
        }
    for cell in (run.section("suite") or {}).get("cells", []):
        key = (1, cell["task"], cell["length"], cell.get("depth"))
        depth = f" (depth {at})" if (at := run.depth(cell)) else ""
        found.setdefault(key, {})[cell["model"]] = {
            "task": f"{cell.get('label') or cell['task']}{depth}",
            "length": cell["length"],
            "share": cell["score"],
            "low": cell["low"],
            "high": cell["high"],
            "hits": hits if isinstance(hits := cell.get("hits"), str) else "",
            "gated": bool(cell.get("gated")),
        }
    yield from found.values()


def _numbers(indices: list[int]) -> str:
    one = "layers" if len(indices) > 1 else "layer"
    if len(indices) > 2 and indices == list(range(indices[0], indices[-1] + 1)):
        return f"{one} {indices[0]} to {indices[-1]}"
    return f"{one} {', '.join(map(str, indices))}"


def between(interval: Sequence[float | None] | None, form: str) -> str:
    """Both ends in brackets after a blank, or nothing where an end is not known."""
    if interval is None:
        return ""
    low, high = interval
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return ""
    return f" [{low:{form}}, {high:{form}}]"
