"""The best student under a budget: what every layer gets, chosen from a scan, exactly.

A scan says what each candidate loses in each layer alone. A plan adds up: its cost is the sum of its layers' bytes (or
softmax layers, or measured microseconds), its expected loss the sum of their losses, KL plus ``recall_weight`` times
the nats lost per answer token, and its expected recall

    1 - (sum over layers of prompts lost with the layer's candidate alone) / (prompts that the teacher answers)

A prompt that the whole plan loses though no layer alone does is not foreseen, and one that two layers lose counts
twice; so the best few plans are measured whole, untrained, and the gap to the sums is told. The folder, beside the
scan's files: ``plan.yaml``, a recipe that a person can read and edit, and ``plan.json``.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .data import Corpus
from .data.pool import model_digest
from .files import write_json, write_text
from .knapsack import Choice, Option, pareto, solve
from .modeling.errors import RecipeError
from .offers import offers
from .planned import Budget, Choices, Figures, Planned, PlanResult, fragment_of, layers_map, words
from .probe import probe
from .progress import Progress, Watch
from .recipe import Plan, Recipe
from .scan.bench import Bench, above_zero, recalled
from .scan.candidates import SOFTMAX, Candidate, candidates, fields_of, layer_bytes, method_of
from .scan.measure import ScanResult, bench_of, read, require_recall, scan, scanned_layers, settings_of, train
from .scan.measure import check as check_scan

RESULT, FRAGMENT, SCANNED = "plan.json", "plan.yaml", "scan.json"
MEBIBYTE = 2**20
CURVE = 4
"""How many times the budget the curve reaches."""


def plan(
    model: Any,
    tokenizer: Any,
    corpus: Corpus,
    recipe: Recipe,
    *,
    folder: Path,
    progress: Watch | None = None,
) -> tuple[PlanResult, ScanResult]:
    """Scan what is not scanned yet, choose, verify; the model is the plain teacher before and after.

    Raises :class:`RecipeError` for a budget that no plan meets, or a recall that none is expected to keep.
    """
    tried = {candidate.name: candidate for candidate in candidates(recipe)}
    found = scanned_layers(model, recipe)
    budget, costs = check(model, recipe, own=folder)
    spec = recipe.plan
    assert spec is not None
    if spec.scan is None:
        result = scan(model, tokenizer, corpus, recipe, folder=folder, progress=progress)
    else:
        result = taken(Path(spec.scan), model, own=folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SCANNED, result.to_dict())  # so that a run goes on when the other folder is gone
    settings = {"scan": settings_of(model, corpus, recipe), "taken": result.settings,
                "plan": spec.model_dump(mode="json"), "candidates": result.candidates,
                "figures": _digest([[asdict(row) for row in result.rows], costs])}  # fmt: skip
    if (known := _read(folder / RESULT)) is not None and known.settings == json.loads(json.dumps(settings)):
        return known, result
    made = choose(result, costs, budget, spec)
    bench = bench_of(model, tokenizer, corpus, recipe, found)
    train(bench, corpus, recipe, tried, folder, progress)
    tried |= {name: Candidate(name, method) for name, method in made.by_head.items()}
    rivals = made.rivals(spec.verify)
    verified = [
        Planned(p.layers, p.cost, p.expected, _measured(bench, p, tried, spec, progress, i, len(rivals)))
        for i, p in enumerate(rivals)
    ]
    chosen = _best(verified, spec) if verified else made.best[0]
    layers = layers_map(recipe, {i: tried[name] for i, name in chosen.layers.items()})
    said = words(chosen, verified, made, budget, spec)
    fragment = fragment_of(recipe, layers, said)
    planned = PlanResult(budget, chosen, verified, made.curve, said, layers, fragment, settings)
    write_text(folder / FRAGMENT, fragment)
    write_json(folder / RESULT, _finite(planned.to_dict()))
    return planned, result


def check(model: Any, recipe: Recipe, *, own: Path | None = None) -> tuple[Budget, dict[int, dict[str, int]]]:
    """The budget, and each layer's candidates with their costs; refused here, before anything is measured, where the
    budget is none or below the smallest plan, or a length is beyond the teacher's context. ``own``: the folder of this
    plan, which keeps the scan that it was made from."""
    spec = recipe.plan
    if spec is None:
        raise RecipeError("plan: no budget; give one, such as plan.kv_share=6%")
    check_scan(model, recipe)
    tried = {candidate.name: candidate for candidate in candidates(recipe)}
    budget = budget_of(model, recipe)
    costs = _costs(tried, scanned_layers(model, recipe), next(model.parameters()).dtype, budget, spec)
    if spec.scan is not None:
        costs = _scanned(costs, taken(Path(spec.scan), model, own=own), tried)
    _refuse_impossible(costs, budget)
    return budget, costs


def taken(folder: Path, model: Any, *, own: Path | None = None) -> ScanResult:
    """The result of a scan made before, or what ``own`` keeps of it; refused where it is another teacher's."""
    gone = own is not None and (own / SCANNED).exists() and not (folder / SCANNED).exists()
    result = read(own if own is not None and gone else folder)
    if result.settings.get("teacher") != model_digest(model):
        raise RecipeError(
            f"plan.scan: {folder} is a scan of another teacher, or of this one in another dtype; leave it out to scan"
        )
    return result


def _scanned(
    costs: Mapping[int, Mapping[str, int]], result: ScanResult, tried: Mapping[str, Candidate]
) -> dict[int, dict[str, int]]:
    """The costs of what a scan made before has measured in every layer, with the fields that the recipe gives it."""
    for name, candidate in tried.items():
        known = result.candidates.get(name)
        if known is not None and known != json.loads(json.dumps(fields_of(candidate.method))):
            raise RecipeError(
                f"plan.scan: {name} was scanned with other fields of the method; scan again with those of this recipe"
            )
    there = {(row.layer, row.candidate) for row in result.rows if row.head is None}
    found = {i: {name: cost for name, cost in by.items() if (i, name) in there} for i, by in costs.items()}
    for layer, by in found.items():
        if not by:
            raise RecipeError(
                f"plan.scan: it has nothing that layer {layer} may get; give the recipe the scan's own keys"
            )
    return found


def resolved(recipe: Recipe, made: PlanResult) -> Recipe:
    """The recipe with the plan's layers in place of its budget."""
    return recipe.override(["plan=null", f"layers={json.dumps(made.layers)}"])


def budget_of(model: Any, recipe: Recipe) -> Budget:
    """The recipe's budget in whole units, for the layers that are planned."""
    spec = recipe.plan
    assert spec is not None
    every, mine = probe(model), scanned_layers(model, recipe)
    dtype = next(model.parameters()).dtype
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    at = spec.at or context or recipe.scan.seq_len
    softmax = Candidate(SOFTMAX, method_of({"name": SOFTMAX})).method
    held = {i: layer_bytes(softmax, layer, dtype, at) for i, layer in every.items()}
    teacher, fixed = sum(held.values()), sum(n for i, n in held.items() if i not in mine)
    if spec.softmax_layers is not None:
        words = f"{spec.softmax_layers} of {len(mine)} layers keep softmax"
        return Budget("softmax_layers", spec.softmax_layers, words, at, teacher, 0)
    if spec.decode_us is not None:
        words = f"{spec.decode_us:g} us a token in all attention layers, by {spec.times}"
        return Budget("decode_us", math.floor(spec.decode_us * 1000), words, at, teacher, 0)
    if spec.kv_share is not None:
        amount = math.floor(spec.kv_share * teacher)
        words = f"{100 * spec.kv_share:g} % of the KV cache at {at:,} tokens"
    else:
        assert spec.state_mb is not None
        amount = math.floor(spec.state_mb * MEBIBYTE / spec.batch)
        words = f"{spec.state_mb:g} MiB for {spec.batch} sequence{'s' * (spec.batch > 1)} of {at:,} tokens"
    return Budget("bytes", amount - fixed, words, at, teacher, fixed)


def choose(result: ScanResult, costs: Mapping[int, Mapping[str, int]], budget: Budget, spec: Plan) -> Choices:
    """The best plans within the budget, and the curve around it, from a scan's rows."""
    offered = offers(result, costs, spec, by_head=budget.kind == "bytes")
    places = [[offer.option for offer in mine] for mine in offered.values()]
    answered = max(row.answered for row in result.rows)
    most = None
    if spec.min_recall is not None:
        require_recall(result)
        most = math.floor((1 - spec.min_recall) * answered + 1e-9)

    def told(choice: Choice) -> Planned:
        mine = {i: offered[i][pick] for i, pick in zip(offered, choice.picks, strict=True)}
        kl, answer = sum(o.kl for o in mine.values()), sum(o.answer_loss for o in mine.values())
        figures = Figures(kl, answer, choice.count, answered, choice.loss)
        return Planned({i: o.name for i, o in mine.items()}, choice.cost, figures)

    best = solve(places, budget.amount, most=most, best=max(1, spec.verify))
    if not best:
        least = min(sum(options[p].count for options, p in zip(places, c.picks, strict=True))
                    for c in solve(places, budget.amount, best=1) or solve(places))  # fmt: skip
        fewest = solve([[Option(o.cost, o.count) for o in options] for options in places], budget.amount)
        least = round(fewest[0].loss) if fewest else least
        raise RecipeError(
            f"plan.min_recall: {spec.min_recall} allows {most} of {answered} prompts to be lost, and within "
            f"{budget.words} the best plan is expected to lose {least}; raise the budget, or ask for at most "
            f"{max(0.0, 1 - least / answered):.2f}"
        )
    curve = pareto(places, CURVE * budget.amount if budget.kind != "softmax_layers" else None, most=most)
    step = MEBIBYTE // spec.batch if budget.kind == "bytes" else max(1, budget.amount // 10)
    more = solve(places, budget.amount + step, most=most)
    by_head = {o.name: o.method for i, mine in offered.items() for o in mine if o.name not in costs[i]}
    # Heads' losses are added up, a layer's are measured: the best plan without the former is a rival too.
    whole = [places[n][: len(costs[i])] for n, i in enumerate(offered)]
    plain = solve(whole, budget.amount, most=most) if by_head else []
    return Choices(
        [told(c) for c in best],
        [told(c) for c in curve],
        told(more[0]) if more else None,
        told(plain[0]) if plain else None,
        by_head,
    )


def _costs(
    tried: Mapping[str, Candidate], found: Mapping[int, Any], dtype: Any, budget: Budget, spec: Plan
) -> dict[int, dict[str, int]]:
    """Layer -> candidate -> cost. Softmax takes part where it is asked for, or is what the budget counts."""
    if budget.kind == "softmax_layers":
        return {i: {name: int(name == SOFTMAX) for name in tried} for i in found}
    names = [name for name in tried if name != SOFTMAX or spec.softmax]
    if budget.kind == "decode_us":
        times = _times(Path(str(spec.times)), names)
        return {i: dict(times) for i in found}
    return {
        i: {name: tried[name].cost(layer, dtype, budget.at) for name in names} for i, layer in found.items()
    }


def _times(path: Path, names: list[str]) -> dict[str, int]:
    """Nanoseconds a token of one layer, for every candidate; what was not measured is left out of the plan."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))["layer_us"]
        found = {name: round(1000 * float(table[name])) for name in names if name in table}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f'plan.times: {path} cannot be read ({error}); give {{"layer_us": {{"{names[0]}": 12.5}}}}'
        ) from None
    if not found:
        raise RecipeError(
            f"plan.times: {path} has none of the candidates; measure some of {', '.join(names)}"
        )
    return found


def _refuse_impossible(costs: Mapping[int, Mapping[str, int]], budget: Budget) -> None:
    least = sum(min(by.values()) for by in costs.values())
    if least > budget.amount:
        key = {"bytes": "kv_share or state_mb"}.get(budget.kind, budget.kind)
        raise RecipeError(
            f"plan.{key}: {budget.words} is {budget.told(max(0, budget.amount))}, and the smallest plan needs "
            f"{budget.told(least)}; raise the budget, or scan smaller scan.budgets, scan.chunks or scan.windows"
        )


def _measured(
    bench: Bench,
    rival: Planned,
    tried: Mapping[str, Candidate],
    spec: Plan,
    progress: Watch | None,
    number: int,
    count: int,
) -> Figures:
    done = number * bench.tokens

    def hear(tokens: int) -> None:
        nonlocal done
        done += tokens
        if progress is not None:
            progress(Progress("verify", done, count * bench.tokens))

    teacher, student = bench.whole({i: tried[name] for i, name in rival.layers.items()}, hear)
    found = recalled(teacher, student)
    loss = above_zero(student.kl) + (spec.recall_weight * found.answer_loss if spec.recall_weight else 0.0)
    return Figures(student.kl, found.answer_loss, found.lost, found.answered, loss)


def _best(verified: list[Planned], spec: Plan) -> Planned:
    """The least measured loss; where a recall is asked for, among those that keep it, or else of the fewest lost."""

    def order(rival: Planned) -> tuple[float, float]:
        assert rival.measured is not None
        lost, answered = rival.measured.lost, rival.measured.answered
        bound = 0 if spec.min_recall is None else (1 - spec.min_recall) * answered
        return (0 if spec.min_recall is None else max(0.0, lost - bound), rival.measured.loss)

    return min(verified, key=order)


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> PlanResult | None:
    if not path.exists():
        return None
    try:
        return PlanResult.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError):
        return None  # of another version: made again


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {str(k): _finite(v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_finite(v) for v in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
