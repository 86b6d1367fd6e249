"""The gates on a long text read through the cache: states of constant size, and nothing that is not finite."""

import math
from typing import Any

from torch import Tensor

from ..convert import describe, state_bytes
from ..modeling.cache import CACHE
from .gate import FAILED, NOT_RUN, PASSED, Gate
from .one_function import NEW_TOKENS, room
from .subject import Subject

STRIDE = 256  # tokens of a chunk on the long way
MARKS = (1024, 65536)  # lengths at which states are weighed, beside 2 W and the end


def long_way(subject: Subject, train_len: int | None) -> list[Gate]:
    """One long text through the cache: bytes of the states on the way, and whether all stays finite."""
    first = 2 * subject.windows[-1]
    target = max(first + NEW_TOKENS, MARKS[0], 8 * (train_len or 0))
    end = room(subject, target)
    marks = sorted({first, *(m for m in MARKS if m <= end), end})
    cache, weighed, at, broken = subject.cache(), {}, 0, None
    while at < end:
        # After the window is full, single steps: so a generation goes on from a prompt.
        stepping = first <= at < first + NEW_TOKENS
        stop = min(at + 1 if stepping else at + STRIDE, *(m for m in [*marks, first] if m > at), end)
        with subject.watched() as layers:
            logits = subject.model(
                input_ids=subject.ids(1, stop - at), use_cache=True, **{CACHE: cache}
            ).logits[..., : subject.vocab]
        if broken is None:
            odd = [i for i, ys in layers.items() if not all(bool(y.isfinite().all()) for y in ys)]
            if odd or not bool(logits.isfinite().all()):
                place = f"layer {odd[0]}" if odd else "the logits"
                broken = f"{place}, length {stop}"
        at = stop
        if at in marks:
            weighed[at] = [layer_bytes(layer) for layer in cache.layers]
    return [_constant_state(subject, weighed), _finite(subject, broken, end, train_len)]


def layer_bytes(layer: Any) -> int:
    """Bytes that one layer of a cache holds: a mixer's state, or keys and values."""
    if getattr(layer, "is_linearize_state", False):
        return layer.state_bytes
    tensors = [getattr(layer, name, None) for name in ("keys", "values")]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def _constant_state(subject: Subject, weighed: dict[int, list[int]]) -> Gate:
    """Every state against its size after the first token, and what its method says that a token adds.

    Steps in place may have room for a few tokens more, which is of one size too.
    """
    name, notes, growing, worst = "constant state", [], [], (0.0, "", 0.0, 0.0)
    converted = [report for report in describe(subject.model) if report.method != "softmax"]
    if not converted:
        return Gate(name, NOT_RUN, note="no layer is converted")
    mixers, dtype = subject.model.mixers(), next(subject.model.parameters()).dtype
    for report in converted:
        room = state_bytes(mixers[report.index], dtype, room=True) - report.state_bytes
        for length, sizes in weighed.items():
            allowed = report.state_bytes + math.ceil(report.growth * length)
            size = sizes[report.index]
            excess = (
                size - allowed - room
                if report.growth
                else min(abs(size - allowed), abs(size - allowed - room))
            )
            if excess > worst[0]:
                worst = (excess, f"layer {report.index}, length {length}", size, allowed)
        if report.growth:
            growing.append(f"{report.index} ({report.growth:,.0f} bytes a token)")
    if growing:
        notes.append(f"layers {', '.join(growing)} grow as {converted[0].method} declares")
    last = max(weighed)
    kept = [i for i, layer in subject.spec.items() if layer["method"]["name"] == "softmax"]
    if kept:
        total = sum(weighed[last][i] for i in kept)
        notes.append(
            f"softmax stays in layers {', '.join(map(str, kept))}: {total:,} bytes at {last:,} tokens"
        )
    notes.insert(0, f"{sum(weighed[last][r.index] for r in converted):,} bytes in converted layers at "
                    f"{', '.join(f'{n:,}' for n in weighed)} tokens")  # fmt: skip
    status = FAILED if worst[0] else PASSED
    size, bound = (worst[2], worst[3]) if worst[0] else (None, None)
    return Gate(name, status, worst[1], size, bound, "; ".join(notes))


def _finite(subject: Subject, broken: str | None, end: int, train_len: int | None) -> Gate:
    name = "finite"
    if broken is not None:
        return Gate(name, FAILED, broken, note="an output is not finite")
    if train_len is None:
        return Gate(name, NOT_RUN, f"length {end:,}", note="the training length is not known")
    if end < 8 * train_len:
        reason = f"its learned positions end at {end:,}, before 8 x {train_len:,} tokens"
        return Gate(name, NOT_RUN, f"length {end:,}", note=reason)
    context = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None)
    note = f"8 x the training length of {train_len:,}"
    if context and end > context:
        note += f"; no measure of quality beyond the teacher's context of {context:,}"
    return Gate(name, PASSED, f"length {end:,}", note=note)
