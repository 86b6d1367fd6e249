"""Rules by which layers are chosen elsewhere, side by side with what a plan adds up; and how far they agree.

Each gives a layer a score; the higher, the sooner the layer keeps its memory. ``r`` is the scan's reference candidate,
the one that keeps least.

    loss                what plans minimise: KL with r there alone, and a tenth of the nats lost per answer token
    KL                  KL with r there alone
    recall              nats lost per answer token with r there alone
    next token          gain of the next-token loss with r there alone
    HALO's ratio        (max R - R_i) / (max C - C_i + 1e-6), R recall and C common-sense reasoning with layer i alone
                        converted (arXiv 2601.22156, as we read it); here C is the negative next-token loss
    restore one         how much KL falls when every layer has r, and this one its softmax back (after arXiv 2512.20569)
    attention distance  share of attention beyond the local span on text, mean over heads: what DuoAttention (arXiv
                        2410.10819) calls attention profiling, and finds wanting beside its trained gates
    retrieval heads     attention that the tokens of an answer pay to the token of the needle that they copy, of the
                        layer's best head (arXiv 2404.15574; that page counts arg-max copies instead)
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..files import write_json
from ..modeling.attention import attention_mode
from ..modeling.window import WindowConfig
from ..progress import Progress, Watch
from .bench import Bench
from .candidates import Candidate
from .material import Batch
from .oracle import Profile

if TYPE_CHECKING:
    from .measure import Row

FILE = "selectors.json"
LOCAL = 64
"""Chunk of the local span beyond which attention counts as far."""
WEIGHT = 0.1


def scores(
    bench: Bench,
    rows: "Sequence[Row]",
    tried: Mapping[str, Candidate],
    folder: Path,
    progress: Watch | None = None,
) -> dict[str, dict[str, float]]:
    """Selector -> layer -> score. The two that need forwards of their own are kept in the folder."""
    from .measure import reference

    name = reference({key: {"name": candidate.method.name} for key, candidate in tried.items()})
    layers = list(bench.found)
    alone = {row.layer: row for row in rows if row.candidate == name and row.head is None}
    kept = {i: 1 - row.lost / max(1, row.answered) for i, row in alone.items()}
    gain = {i: row.next_token for i, row in alone.items()}
    halo = {i: (max(kept.values()) - kept[i]) / (gain[i] - min(gain.values()) + 1e-6) for i in layers}
    found = {
        "loss": {i: row.loss(WEIGHT) for i, row in alone.items()},
        "KL": {i: row.kl for i, row in alone.items()},
        "recall": {i: row.answer_loss for i, row in alone.items()},
        "next token": gain,
        "HALO's ratio": halo,
        **_measured(bench, name, tried[name], folder, progress),
    }
    return {key: {str(i): float(by_layer[i]) for i in layers} for key, by_layer in found.items()}


def _measured(
    bench: Bench, name: str, candidate: Candidate, folder: Path, progress: Watch | None
) -> dict[str, dict[int, float]]:
    path, layers = folder / FILE, list(bench.found)
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if known.get("reference") == name and known.get("layers") == layers:
        return {key: {int(i): x for i, x in by.items()} for key, by in known["scores"].items()}
    text = sum(batch.tokens for batch in bench.batches if batch.cell is None)
    total, done = text * (len(layers) + 1) + bench.tokens, 0

    def hear(tokens: int) -> None:
        nonlocal done
        done += tokens
        if progress is not None:
            progress(Progress("selectors", done, total))

    everywhere = dict.fromkeys(layers, candidate)
    worst = bench.whole(everywhere, hear, recall=False)[1].kl
    restored = {}
    for layer in layers:
        others = {i: c for i, c in everywhere.items() if i != layer}
        restored[layer] = worst - bench.whole(others, hear, recall=False)[1].kl
    found = {"restore one": restored, **_profiled(bench, hear)}
    tree = {"reference": name, "layers": layers, "scores": found}
    write_json(path, tree)
    return found


@torch.no_grad()
def _profiled(bench: Bench, hear: Any) -> dict[str, dict[int, float]]:
    seats = {i: Profile(WindowConfig(), layer.geometry, LOCAL) for i, layer in bench.found.items()}
    for batch in bench.batches:
        places = copies(batch)
        if places is None or len(places):
            for seat in seats.values():
                seat.places = None if places is None else places.to(bench.device)
            with bench.seated(seats), attention_mode("linear"):
                bench.trunk.logits(batch.inputs.to(bench.device), 1)
        hear(batch.tokens)
    far = {i: float(torch.stack(seat.far).mean()) for i, seat in seats.items()}
    found = {"attention distance": far}
    if all(seat.copied for seat in seats.values()):
        found["retrieval heads"] = {
            i: float((sum(n * x for n, x in seat.copied) / sum(n for n, _ in seat.copied)).max())
            for i, seat in seats.items()
        }
    return found


def copies(batch: Batch) -> Tensor | None:
    """[n, 3] rows of (batch row, position that predicts an answer token, position of that token in the needle)."""
    if batch.cell is None:
        return None
    places = []
    for row, prompt in enumerate(batch.prompts):
        count = len(prompt.answer)
        for start in range(len(prompt.ids) - count, -1, -1):
            if prompt.ids[start : start + count] == prompt.answer:
                places += [[row, len(prompt.ids) - 1 + t, start + t] for t in range(count)]
                break
    return torch.tensor(places, dtype=torch.long).reshape(-1, 3)


def correlations(found: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Spearman's rank correlation between selectors; those that rank nothing (all layers equal) are left out."""
    ranked = {name: ranks(list(by.values())) for name, by in found.items()}
    ranked = {name: order for name, order in ranked.items() if len(set(order)) > 1}
    return {a: {b: pearson(x, y) for b, y in ranked.items()} for a, x in ranked.items()}


def ranks(values: Sequence[float]) -> list[float]:
    """1 for the smallest; equal values share the mean of their ranks."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    found, start = [0.0] * len(values), 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for place in order[start:stop]:
            found[place] = (start + 1 + stop) / 2
        start = stop
    return found


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Correlation of two lists, neither of them constant."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))
