"""A scan in words, and as a page that needs nothing else: a heat map of layers by candidates, then all figures."""

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .measure import Row, ScanResult

CARRIES = 0.2
"""Least share of the prompts that a layer must lose alone to be said to carry recall."""
STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: .5rem 0 1.5rem }
th, td { padding: .25rem .6rem; text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
th { font-weight: 600 } tbody th { text-align: left }
.wide { overflow-x: auto }
td.heat { color: #111 }
p.words { font-size: 1.1rem }
small { opacity: .75 }
"""


def words(result: "ScanResult") -> list[str]:
    """What the scan says, a sentence each, the most important first."""
    told = [_carriers(result)]
    rows = {row.layer: row for row in result.rows if row.candidate == result.reference and row.head is None}
    by_kl = sorted(rows.values(), key=lambda row: -row.kl)
    most = ", ".join(f"{row.layer} ({row.kl:.3f})" for row in by_kl[:3])
    total = sum(row.kl for row in by_kl)
    told.append(
        f"{result.reference} in one layer alone costs most KL in layers {most}; all of them add up to {total:.3f}."
    )
    return told


def _carriers(result: "ScanResult") -> str:
    rows = [row for row in result.rows if row.candidate == result.reference and row.head is None]
    answered = max((row.answered for row in rows), default=0)
    if not answered:
        return "The teacher fails the recall tasks itself, so they say nothing of its layers."
    most = max(row.lost for row in rows)
    carriers = [row for row in rows if row.lost >= max(CARRIES * answered, most / 2)]
    if not carriers:
        return (
            f"No single layer carries recall: {result.reference} in any one of them loses at most {most} of "
            f"{answered} prompts that the teacher answers."
        )
    others = max((row.lost for row in rows if row not in carriers), default=0)
    lost = " and ".join(str(row.lost) for row in carriers)
    names = " and ".join(str(row.layer) for row in carriers)
    one = len(carriers) == 1
    told = (
        f"{'Layer' if one else 'Layers'} {names} {'carries' if one else 'carry'} recall: with {result.reference} there "
        f"alone, {lost} of {answered} prompts that the teacher answers are lost"
    )
    told += f"; in any other layer {others if others else 'none'}{' at most' if others else ''}."
    for row in carriers:
        enough = next((c for c in _by_size(result) if result.row(row.layer, c).lost <= 0.05 * answered), None)
        if enough and enough != "softmax":
            told += f" {enough} in layer {row.layer} keeps them."
        told += _carrying_head(result, row)
    return told


def _carrying_head(result: "ScanResult", layer: "Row") -> str:
    """A sentence where one kv head of a layer that carries recall does so alone, as far as heads were measured."""
    heads = {
        row.head: row.lost
        for row in result.rows
        if row.layer == layer.layer and row.head is not None and row.candidate == layer.candidate
    }
    if not heads or max(heads.values()) < layer.lost / 2:
        return ""
    best = max(heads, key=lambda head: heads[head])
    others = max((lost for head, lost in heads.items() if head != best), default=0)
    if others > heads[best] / 4:
        return ""
    return (
        f" kv head {best} of layer {layer.layer} carries recall: {layer.candidate} in it alone loses {heads[best]}, "
        f"in any other head of the layer {f'{others} at most' if others else 'none'}."
    )


def _by_size(result: "ScanResult") -> list[str]:
    """Salient's candidates, the smallest budget first."""
    fields = {name: f for name, f in result.candidates.items() if f["name"] == "salient"}

    def size(field: dict[str, Any]) -> int:
        budget = field["budget"]
        return (budget if isinstance(budget, int) else max(budget)) + 2 * field["chunk"]

    return sorted(fields, key=lambda name: size(fields[name]))


def html(result: "ScanResult") -> str:
    """The page; every text from outside is escaped."""
    count = sum(cell[0] for cell in result.teacher_cells.values())
    measured = (
        f"{len(result.layers)} layers, {len(result.candidates)} candidates; {result.windows} windows of "
        f"{result.length:,} tokens, {count} recall prompts; {result.origin.get('date', '')}"
    )
    maps = [
        ("KL to the teacher, nats a token", lambda row: row.kl, ".4f"),
        ("Recall lost: prompts that only the teacher answers", lambda row: row.lost, "d"),
        ("Nats lost per answer token", lambda row: row.answer_loss, ".3f"),
        ("Gain of the next-token loss, nats", lambda row: row.next_token, "+.4f"),
        ("Relative error of the layer's output", lambda row: row.error, ".3f"),
    ]
    body = [
        f"<h1>What each layer of {escape(result.teacher)} carries</h1>",
        *(f'<p class="words">{escape(sentence)}</p>' for sentence in result.words),
        f"<p><small>{escape(measured)}</small></p>",
        *(f"<p><small>{escape(note)}</small></p>" for note in result.notes),
    ]
    for title, value, form in maps:
        body.append(f"<h2>{escape(title)}</h2>{_heat(result, value, form)}")
    if result.selectors:
        body.append("<h2>Rules for choosing layers, side by side</h2>")
        body.append(
            "<p>A higher score asks sooner for the layer to be kept; darker is higher within its rule.</p>"
        )
        body.append(_selectors(result))
        body.append("<h2>How far they agree</h2><p>Spearman's rank correlation over layers.</p>")
        names = list(result.correlations)
        cells = [[f"{result.correlations[a][b]:+.2f}" for b in names] for a in names]
        shades = [[max(0.0, result.correlations[a][b]) for b in names] for a in names]
        body.append(_table("", names, names, cells, shades))
    title = escape(f"Scan of {result.teacher}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        + "\n".join(body)
        + "</body></html>\n"
    )


def _heat(result: "ScanResult", value: Any, form: str) -> str:
    places: list[tuple[int, int | None]] = list(dict.fromkeys((row.layer, row.head) for row in result.rows))
    found: dict[tuple[int, int | None, str], Row] = {(r.layer, r.head, r.candidate): r for r in result.rows}
    names = list(result.candidates)
    values = [[_of(found.get((*place, name)), value) for name in names] for place in places]
    finite = [x for row in values for x in row if x is not None]
    # Figures span orders of magnitude; the root lets small ones be seen beside the largest.
    top = max([abs(x) for x in finite], default=0.0) or 1.0
    shades = [[0.0 if x is None else math.sqrt(max(0.0, x) / top) for x in row] for row in values]
    cells = [["" if x is None else format(x, form) for x in row] for row in values]
    labels = [f"layer {i}" if head is None else f"layer {i}, kv head {head}" for i, head in places]
    return _table("", labels, names, cells, shades)


def _of(row: "Row | None", value: Any) -> Any:
    return None if row is None else value(row)


def _selectors(result: "ScanResult") -> str:
    names, layers = list(result.selectors), [str(i) for i in result.layers]
    cells = [[f"{result.selectors[name][i]:.4g}" for name in names] for i in layers]
    top = {name: max(max(by.values()), 1e-12) for name, by in result.selectors.items()}
    shades = [[max(0.0, result.selectors[name][i]) / top[name] for name in names] for i in layers]
    return _table("", [f"layer {i}" for i in layers], names, cells, shades)


def _table(
    corner: str,
    labels: Sequence[str],
    names: Sequence[str],
    cells: Sequence[Sequence[str]],
    shades: Sequence[Sequence[float]],
) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = []
    for label, line, tints in zip(labels, cells, shades, strict=True):
        inner = "".join(
            f'<td class="heat" style="background:{_colour(tint)}">{escape(cell)}</td>'
            for cell, tint in zip(line, tints, strict=True)
        )
        rows.append(f"<tr><th>{escape(label)}</th>{inner}</tr>")
    return (
        f'<div class="wide"><table><thead><tr><th>{escape(corner)}</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _colour(share: float) -> str:
    """White at 0, orange at 1."""
    share = min(1.0, max(0.0, share))
    return f"rgb({255 - round(15 * share)},{255 - round(125 * share)},{255 - round(205 * share)})"
