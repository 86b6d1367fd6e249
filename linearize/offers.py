"""What a plan may give a layer: the scan's candidates, and where kv heads were measured alone, budgets by head.

A combination of budgets, one for every kv head and all with one chunk, costs what its heads cost together, to the byte.
Its loss is the sum of its heads' losses, each measured alone: an approximation like the sum over layers, and verified
with it. Equal budgets need none, since the scan has measured them in the whole layer. Of the combinations of a layer
and chunk only those are offered that can be part of a best plan, by the same knapsack, over heads (knapsack.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .knapsack import Option, front
from .modeling.mixer import MethodConfig
from .modeling.salient import SalientConfig
from .scan.candidates import method_of, name_of
from .scan.measure import Row, ScanResult
from .sections import Plan


@dataclass(frozen=True)
class Offer:
    """One thing that a layer may get, and what that loses in it alone."""

    name: str
    method: MethodConfig
    option: Option
    kl: float
    answer_loss: float


def offers(
    result: ScanResult, costs: Mapping[int, Mapping[str, int]], spec: Plan, *, by_head: bool
) -> dict[int, list[Offer]]:
    """Layer -> offers, the scan's own candidates first. ``by_head``: costs are bytes, so that they split by head."""
    rows = {(row.layer, row.head, row.candidate): row for row in result.rows}
    methods = {name: method_of(fields) for name, fields in result.candidates.items()}
    found: dict[int, list[Offer]] = {}
    for layer, by_name in costs.items():
        found[layer] = [
            _offer(name, methods[name], cost, [rows[layer, None, name]], spec)
            for name, cost in by_name.items()
        ]
        heads = sorted({row.head for row in result.rows if row.layer == layer and row.head is not None})
        if by_head and heads:
            found[layer] += _combined(layer, heads, by_name, methods, rows, spec)
    return found


def _offer(name: str, method: MethodConfig, cost: int, rows: Sequence[Row], spec: Plan) -> Offer:
    option = Option(cost, sum(row.loss(spec.recall_weight) for row in rows), _lost(rows))
    return Offer(name, method, option, sum(row.kl for row in rows), sum(row.answer_loss for row in rows))


def _lost(rows: Sequence[Row]) -> int:
    return min(rows[0].answered, sum(row.lost for row in rows))


def _combined(
    layer: int,
    heads: Sequence[int],
    costs: Mapping[str, int],
    methods: Mapping[str, MethodConfig],
    rows: Mapping[tuple[int, int | None, str], Row],
    spec: Plan,
) -> list[Offer]:
    """The combinations of unequal budgets that can be part of a best plan."""
    chunks: dict[int, dict[str, SalientConfig]] = {}
    for name in costs:
        method = methods[name]
        if isinstance(method, SalientConfig) and all((layer, head, name) in rows for head in heads):
            chunks.setdefault(method.chunk, {})[name] = method
    found = []
    for tried in chunks.values():
        names = list(tried)
        least = min(costs[name] for name in names)
        # Memory is linear in N, and the same for every head: an equal share of what a layer's budget adds.
        share = {name: (costs[name] - least) // len(heads) for name in names}
        places = [
            [
                Option(
                    share[name],
                    rows[layer, head, name].loss(spec.recall_weight),
                    rows[layer, head, name].lost,
                )
                for name in names
            ]
            for head in heads
        ]
        for choice in front(places, counted=spec.min_recall is not None, best=max(1, spec.verify)):
            picked = [names[pick] for pick in choice.picks]
            if len(set(picked)) == 1:
                continue
            method = replace(tried[picked[0]], budget=tuple(int(tried[name].budget) for name in picked))  # type: ignore[arg-type]
            mine = [rows[layer, head, name] for head, name in zip(heads, picked, strict=True)]
            found.append(_offer(name_of(method), method, least + choice.cost, mine, spec))
    return found
