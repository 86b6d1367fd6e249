"""The gates on how a student may be run: in chunks, step by step, by ``generate``, padded, in batches; and causality.

What they compare, and the tolerances, are those of ``subject.py``.
"""

from typing import Any

import torch
from transformers import GenerationConfig

from .gate import FAILED, PASSED, Gate
from .subject import Comparison, Seen, Subject

NEW_TOKENS = 8  # what ``generate`` writes


def _gate(check: Comparison, note: str = "") -> Gate:
    status = FAILED if check.failed else PASSED
    return Gate(check.name, status, check.where, check.worst, check.subject.bound, check.note or note)


def one_function(subject: Subject) -> list[Gate]:
    """Chunks and single steps against one forward, at lengths around every window."""
    wanted = sorted({1, 63, *(n for w in subject.windows for n in (w - 1, w, w + 1, 2 * w + 1) if n > 0)})
    lengths = [n for n in wanted if subject.limit is None or n <= subject.limit]
    ids = subject.ids(2, lengths[-1])
    chunks, steps = (Comparison(subject, f"one function: {how}") for how in ("chunks", "single steps"))
    stepped = subject.run(ids, [1] * lengths[-1])
    for length in lengths:
        whole = subject.run(ids[:, :length])
        steps.add(stepped.pick(lambda y, n=length: y[:, :n]), whole, length)
        for pieces in _splits(length):
            chunks.add(subject.run(ids[:, :length], pieces), whole, length)
    note = f"lengths {', '.join(map(str, lengths))}"
    if lengths != wanted:
        note += f"; its positions end at {subject.limit}"
    return [_gate(chunks, note), _gate(steps, note)]


def _splits(length: int) -> list[list[int]]:
    if length == 63:
        return [[63], [32, 1, 30]]
    third = length // 3
    return [
        [length],
        *([[third, 1, length - third - 1]] if third else []),
        *([[1, length - 1]] if length > 1 else []),
    ]


def generate(subject: Subject) -> Gate:
    """Greedy text with a cache, without one, and the logits of one forward over it."""
    check = Comparison(subject, "one function: generate")
    length = room(subject, subject.windows[-1] + 1, NEW_TOKENS)
    ids = subject.ids(2, length)

    def write(use_cache: bool) -> Any:
        config = GenerationConfig(
            max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=use_cache, return_dict_in_generate=True,
            output_logits=True, pad_token_id=0, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return subject.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)

    with subject.watched() as layers:
        cached = write(True)
    whole = subject.run(cached.sequences[:, :-1])
    expected = Seen(whole.logits[:, length - 1 :], whole.layers)
    logits = torch.stack(cached.logits, 1)[..., : subject.vocab]
    check.add(Seen(logits, {i: torch.cat(ys, 1) for i, ys in layers.items()}), expected, length + NEW_TOKENS)
    plain = write(False)
    same = (plain.sequences == cached.sequences).all(0).long()[length:].cumprod(0)
    alike = min(
        int(same.sum()) + 1, NEW_TOKENS
    )  # the logits before the first different choice, at a tie, still agree
    uncached = torch.stack(plain.logits, 1)[:, :alike, : subject.vocab]
    at = Seen(whole.logits[:, length - 1 : length - 1 + alike], whole.layers)
    check.add(Seen(uncached, whole.layers), at, length + NEW_TOKENS)
    return _gate(check, f"{NEW_TOKENS} tokens after {length}, greedy")


def room(subject: Subject, length: int, after: int = 0) -> int:
    return length if subject.limit is None else min(length, subject.limit - after)


def padding(subject: Subject, side: str) -> Gate:
    """Rows of unequal length beside each other against each alone; steps follow the padding."""
    check, steps = Comparison(subject, f"padding: {side}"), 3
    longest = room(subject, max(2 * subject.windows[-1] + 1, 24))
    lengths = [longest, longest - 5, longest // 2]
    rows = [subject.ids(1, length) for length in lengths]
    alone = [subject.run(row) for row in rows]
    for cached in (False, True):
        mask = torch.ones(len(rows), longest, dtype=torch.long, device=subject.device)
        for row, length in enumerate(lengths):
            pads = longest - length
            # With a cache, real tokens follow what stands on the right of the first ones.
            start = 0 if side == "left" else longest - pads - (steps if cached else 0)
            mask[row, start : start + pads] = 0
        padded = subject.ids(len(rows), longest)  # garbage, but where tokens are real
        for row, tokens in enumerate(rows):
            padded[row, mask[row].bool()] = tokens[0]
        seen = subject.run(padded, [longest - steps, *[1] * steps] if cached else (), mask)
        for row, length in enumerate(lengths):
            real = mask[row].bool()
            check.add(seen.pick(lambda y, r=row, m=real: y[r : r + 1, m.to(y.device)]), alone[row], length)
    return _gate(
        check, f"rows of {', '.join(map(str, lengths))} tokens, pads of random ids; {steps} steps after them"
    )


def batch(subject: Subject) -> Gate:
    """Rows in another order, one alone, and beams: reordered and repeated in the cache."""
    check = Comparison(subject, "batch")
    length = room(subject, 2 * subject.windows[-1] + 1, 2)
    ids, order = subject.ids(4, length + 2), torch.tensor([2, 0, 3, 1], device=subject.device)
    whole = subject.run(ids[:, :length])
    check.add(subject.run(ids[order, :length]), whole.pick(lambda y: y[order.to(y.device)]), length)
    check.add(subject.run(ids[1:2, :length]), whole.pick(lambda y: y[1:2]), length)
    beams = torch.tensor([2, 0, 2, 3], device=subject.device)
    repeated = torch.arange(4, device=subject.device).repeat_interleave(2)
    for chosen in (beams, repeated):
        cache = subject.cache()
        subject.run(ids[:, :length], [length], cache=cache)
        if chosen is beams:
            cache.reorder_cache(beams)
        else:
            cache.batch_repeat_interleave(2)
        after = subject.run(ids[chosen, length:], [1, 1], cache=cache)
        expected = subject.run(ids[chosen]).pick(lambda y: y[:, length:])
        check.add(after, expected, length + 2)
    return _gate(check, "rows permuted, alone, and beams reordered and repeated in the cache")


def causality(subject: Subject) -> Gate:
    """Another token at t, for some t: what comes before it stays."""
    check = Comparison(subject, "causality", every_token=True)
    length = room(subject, 2 * subject.windows[-1] + 8)
    ids = subject.ids(1, length)
    before, silent = subject.run(ids), []
    for at in sorted({1, length // 2, length - 1}):
        other = ids.clone()
        other[:, at] = (other[:, at] + 1) % subject.vocab
        after = subject.run(other)
        check.add(*(seen.pick(lambda y, t=at: y[:, :t]) for seen in (after, before)), length=at)
        if torch.equal(after.logits[:, at], before.logits[:, at]):
            silent.append(str(at))
    if silent:
        return Gate(
            check.name, FAILED, f"token {', '.join(silent)}", note="another token changes nothing at all"
        )
    return _gate(check, f"the tokens at {sorted({1, length // 2, length - 1})} of {length} changed")
