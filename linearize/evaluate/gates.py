"""Integrity gates: a student is one function, however it is run. Measured on the user's own checkpoint, in its dtype.

one function    prefill = chunks = single steps = ``generate`` with a cache = without, at lengths around the window
padding         left- and right-padded rows, pads of random ids, = rows without padding, with a cache and without
batch           rows in another order, alone, reordered or repeated in the cache = rows as they were
causality       another token at t changes no output before t
constant state  bytes of every state at 2 W, 1K and further on; methods that grow stay within what they declare
finite          every layer's output and every logit up to eight times the training length
reload          the folder, loaded by plain transformers in a clean process, gives the same bits
start           in softmax mode the student is the plain model of the same weights, bit for bit

``subject.py`` has the tolerances, and how two runs are compared. A failed gate names the first layer whose attention
output differs, the length and the difference.
"""

import copy
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig

from ..convert import describe, unconvert
from ..modeling.attention import attention_mode
from ..modeling.cache import CACHE
from ..modeling.errors import EvaluationError, LinearizeError
from ..modeling.model import write_code
from ..progress import Progress, Watch
from .subject import Comparison, Seen, Subject

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
NEW_TOKENS = 8  # what ``generate`` writes
STRIDE = 256  # tokens of a chunk on the long way
MARKS = (1024, 65536)  # lengths at which states are weighed, beside 2 W and the end


@dataclass(frozen=True)
class Gate:
    """One check: ``difference`` and ``bound`` are relative, but for states, where they are bytes."""

    name: str
    status: str
    """``passed``, ``failed`` or ``not run``."""
    where: str = ""
    """Of the largest difference, or of the failure: layer and length."""
    difference: float | None = None
    bound: float | None = None
    note: str = ""

    @property
    def measured(self) -> str:
        """Where, the difference, and what is allowed."""
        parts = [self.where]
        if self.difference is not None and self.bound is not None:
            parts.append(f"differs by {self.difference:.2g}, allowed {self.bound:.2g}")
        return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class Gates:
    """All gates; ``status`` is ``failed`` with one of them, ``incomplete`` where one was not run."""

    status: str
    gates: list[Gate]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Gates":
        return cls(tree["status"], [Gate(**gate) for gate in tree["gates"]])

    def failures(self) -> list[str]:
        """One line for each failed gate."""
        failed = [gate for gate in self.gates if gate.status == FAILED]
        return [f"{gate.name}: {', '.join(filter(None, (gate.measured, gate.note)))}" for gate in failed]


@torch.no_grad()
def integrity(
    student: Any,
    *,
    teacher: Any = None,
    folder: str | Path | None = None,
    train_len: int | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
    progress: Watch | None = None,
) -> Gates:
    """Every gate on a converted model, on random token ids below ``vocab_size``.

    ``folder`` is where the student was saved, ``train_len`` the tokens of its training sequences; gates that need what
    was not given are ``not run``. Raises :class:`EvaluationError` for a model without converted layers.
    """
    if not getattr(student.config, "linearize", None):
        raise EvaluationError(f"{type(student).__name__}: is not a converted model; gates are for students")
    subject = Subject(student, vocab_size, seed)
    checks: dict[str, Callable[[], list[Gate]]] = {
        "one function": lambda: _one_function(subject),
        "generate": lambda: [_generate(subject)],
        "padding": lambda: [_padding(subject, side) for side in ("left", "right")],
        "batch": lambda: [_batch(subject)],
        "causality": lambda: [_causality(subject)],
        "constant state": lambda: _long_way(subject, train_len),
        "reload": lambda: [_reload(subject, folder)],
        "start": lambda: [_start(subject, teacher)],
    }
    training, found = student.training, []
    student.eval()
    try:
        for done, (name, check) in enumerate(checks.items(), start=1):
            found += _guarded(name, check)
            if progress is not None:
                progress(Progress("gates", done, len(checks), unit="gates"))
    finally:
        student.train(training)
    return Gates(_status(found), found)


def not_run(reason: str) -> Gates:
    """No gate, and why."""
    return Gates("incomplete", [Gate("integrity gates", NOT_RUN, note=reason)])


def _status(gates: Sequence[Gate]) -> str:
    states = {gate.status for gate in gates}
    return FAILED if FAILED in states else "incomplete" if NOT_RUN in states or not states else PASSED


def _guarded(name: str, check: Callable[[], list[Gate]]) -> list[Gate]:
    """A student that cannot be run in one of the ways it must has failed; a machine that is too small has not."""
    try:
        return check()
    except torch.OutOfMemoryError:
        return [Gate(name, NOT_RUN, note="out of memory")]
    except (LinearizeError, RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        return [
            Gate(
                name, FAILED, note=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
            )
        ]


# The gates.


def _gate(check: Comparison, note: str = "") -> Gate:
    status = FAILED if check.failed else PASSED
    return Gate(check.name, status, check.where, check.worst, check.subject.bound, check.note or note)


def _one_function(subject: Subject) -> list[Gate]:
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


def _generate(subject: Subject) -> Gate:
    """Greedy text with a cache, without one, and the logits of one forward over it."""
    check = Comparison(subject, "one function: generate")
    length = _room(subject, subject.windows[-1] + 1, NEW_TOKENS)
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


def _room(subject: Subject, length: int, after: int = 0) -> int:
    return length if subject.limit is None else min(length, subject.limit - after)


def _padding(subject: Subject, side: str) -> Gate:
    """Rows of unequal length beside each other against each alone; steps follow the padding."""
    check, steps = Comparison(subject, f"padding: {side}"), 3
    longest = _room(subject, max(2 * subject.windows[-1] + 1, 24))
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


def _batch(subject: Subject) -> Gate:
    """Rows in another order, one alone, and beams: reordered and repeated in the cache."""
    check = Comparison(subject, "batch")
    length = _room(subject, 2 * subject.windows[-1] + 1, 2)
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


def _causality(subject: Subject) -> Gate:
    """Another token at t, for some t: what comes before it stays."""
    check = Comparison(subject, "causality", every_token=True)
    length = _room(subject, 2 * subject.windows[-1] + 8)
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


def _long_way(subject: Subject, train_len: int | None) -> list[Gate]:
    """One long text through the cache: bytes of the states on the way, and whether all stays finite."""
    first = 2 * subject.windows[-1]
    target = max(first + NEW_TOKENS, MARKS[0], 8 * (train_len or 0))
    end = _room(subject, target)
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
    """Every state against its size after the first token, and what its method says that a token adds."""
    name, notes, growing, worst = "constant state", [], [], (0.0, "", 0.0, 0.0)
    converted = [report for report in describe(subject.model) if report.method != "softmax"]
    if not converted:
        return Gate(name, NOT_RUN, note="no layer is converted")
    for report in converted:
        for length, sizes in weighed.items():
            allowed = report.state_bytes + math.ceil(report.growth * length)
            size = sizes[report.index]
            excess = size - allowed if report.growth else abs(size - allowed)
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


_CHILD = """
import sys, torch
from safetensors.torch import load_file, save_file
folder, given, made, device, dtype, threads, plain = sys.argv[1:]
torch.set_num_threads(int(threads))
if plain == "plain":
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=getattr(torch, dtype))
else:
    from linearize.checkpoint import load
    model, _ = load(folder, dtype=getattr(torch, dtype))
ids = load_file(given)["ids"].to(device)
with torch.no_grad():
    logits = model.to(device).eval()(input_ids=ids, use_cache=False).logits
save_file({"logits": logits.cpu().contiguous()}, made)
"""


def _reload(subject: Subject, folder: str | Path | None) -> Gate:
    """The saved folder in a process of its own; by plain transformers where its code is ours, which may be run."""
    name = "reload"
    if folder is None:
        return Gate(name, NOT_RUN, note="the student is not saved in a folder as it is")
    folder = Path(folder).resolve()
    own = _code_is_ours(subject.model, folder)
    ids = subject.ids(2, _room(subject, subject.windows[-1] + 1))
    with tempfile.TemporaryDirectory() as temporary:
        given, made = Path(temporary, "ids.safetensors"), Path(temporary, "logits.safetensors")
        save_file({"ids": ids.cpu().contiguous()}, given)
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        kind = str(subject.dtype).removeprefix("torch.")
        words = [str(folder), str(given), str(made), str(subject.device), kind, str(torch.get_num_threads())]
        ended = subprocess.run(
            [sys.executable, "-c", _CHILD, *words, "plain" if own else "package"],
            cwd=temporary,
            env=os.environ | {"HF_MODULES_CACHE": temporary, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        if ended.returncode or not made.is_file():
            last = (ended.stderr.strip().splitlines() or ["no message"])[-1][:200]
            return Gate(name, FAILED, note=f"the folder does not load in a clean process ({last})")
        logits = load_file(made)["logits"]
    here = subject.model(input_ids=ids, use_cache=False).logits.cpu()
    how = "plain transformers" if own else "this package, because the folder's code is not its own"
    if torch.equal(logits, here):
        return Gate(
            name, PASSED, f"length {ids.shape[1]}", 0.0, 0.0, f"bit-equal in a clean process, by {how}"
        )
    difference = (
        (logits.double() - here.double()).abs().max().item() if logits.shape == here.shape else math.inf
    )
    return Gate(name, FAILED, f"length {ids.shape[1]}", difference, 0.0, f"loaded by {how}")


def _code_is_ours(model: Any, folder: Path) -> bool:
    """Whether the folder holds exactly the code that this package writes, and so may be run unasked."""
    with tempfile.TemporaryDirectory() as temporary:
        fresh = Path(temporary)
        write_code(type(model), model.config, fresh)
        written = {path.name: path.read_bytes() for path in fresh.glob("*.py")}
    return written == {path.name: path.read_bytes() for path in folder.rglob("*.py")}


def _start(subject: Subject, teacher: Any) -> Gate:
    """Softmax mode against the plain model of the same weights; the teacher too, where it has the same."""
    ids = subject.ids(2, _room(subject, 2 * subject.windows[-1] + 1))
    with subject.watched() as layers, attention_mode("softmax"):
        logits = subject.model(input_ids=ids, use_cache=False).logits
    # Classes and configuration are copied, tensors are shared.
    tensors = [*subject.model.parameters(), *subject.model.buffers()]
    plain = unconvert(copy.deepcopy(subject.model, {id(t): t for t in tensors}))
    twin = Subject.__new__(Subject)
    twin.model, twin.spec = plain, subject.spec
    with twin.watched() as own:
        expected = plain(input_ids=ids, use_cache=False).logits
    note = "bit-equal to the same weights unconverted"
    if torch.equal(logits, expected):
        if teacher is None:
            return Gate("start", PASSED, f"length {ids.shape[1]}", 0.0, 0.0, note)
        if not _same_weights(plain, teacher):
            note += "; fine-tuning changed the teacher's"
            return Gate("start", PASSED, f"length {ids.shape[1]}", 0.0, 0.0, note)
        home = teacher.get_input_embeddings().weight.device
        expected = teacher(input_ids=ids.to(home), use_cache=False).logits.to(logits.device)
        note = "bit-equal to the teacher"
        if torch.equal(logits, expected):
            return Gate("start", PASSED, f"length {ids.shape[1]}", 0.0, 0.0, note)
    difference = (logits.double() - expected.double()).abs().max().item()
    odd = [i for i in own if not all(map(torch.equal, layers[i], own[i]))]
    where = f"layer {odd[0]}, length {ids.shape[1]}" if odd else f"length {ids.shape[1]}"
    return Gate("start", FAILED, where, difference, 0.0, "softmax mode is not the plain model")


def _same_weights(plain: nn.Module, teacher: nn.Module) -> bool:
    mine, theirs = plain.state_dict(), teacher.state_dict()
    return mine.keys() == theirs.keys() and all(
        x.dtype == theirs[name].dtype and torch.equal(x, theirs[name].to(x.device))
        for name, x in mine.items()
    )
