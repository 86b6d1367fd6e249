"""Time the candidate launches of the kernels on this GPU, and keep the fastest for it.

Every method's layer is run as it is used: a decode step of many rows and of one, a prefill, a training step, and one
of the transfer. What its launches ask for says which kernels there are and at which widths; each kernel's candidates
(``launches.CANDIDATES``) are then timed in the first run that launches it, all else as it was, in turns with the
default, and the fastest is a row for ``launches.json``. Whole runs are timed, because settings may depend on each
other: one kernel's tile is another's scratch. Decode steps are timed from a CUDA graph, as ``generate`` runs them:
launched one by one they would wait for the host, whatever the kernel takes.
"""

import itertools
import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .complaints import near
from .modeling.errors import LinearizeError
from .modeling.graph import record
from .modeling.launches import CANDIDATES, Launch
from .modeling.mixer import Fit, Geometry, Mixer, MixerInput
from .modeling.registry import METHODS
from .modeling.tuned import Ask, Row, listening, read_rows, user_file, using, write_rows
from .progress import Progress, Watch

logger = logging.getLogger(__name__)

MARGIN = 0.02
"""A candidate must be faster than the setting in use by this share, and in every round, or that one stays."""
ROUNDS = 5
"""Every candidate is timed so often, each time beside the setting in use."""
PROMPT = 4608
"""Tokens before a decode step: a kept set of 256 that takes four of every 64 is full then."""
DENSE = torch.contiguous_format
WHOLE = ("prefill", "training", "transfer")
"""What a layer does with a text at once."""
FOLDING = 64
"""Steps of a text in which every state of the default configurations folds its window as often as any other."""


@dataclass(frozen=True)
class Tuned:
    """What was found for one kernel at its widths."""

    row: Row
    milliseconds: dict[int, float]
    """Of the run, by the candidate's number, the median of the rounds; those that could not be launched are absent."""
    run: str

    def words(self) -> tuple[str, ...]:
        """The kernel, its setting, the times of the run with it and with the default, and which run that was."""
        row, setting = self.row, self.row.launch
        widths = " ".join(f"{name}={value}" for name in "KVF" if (value := getattr(row, name)) is not None)
        blocks = " ".join(f"{name}={value}" for name, value in setting.blocks.items())
        before = "" if row.default_milliseconds is None else f"{row.default_milliseconds:.4g} ms by default"
        return (
            f"{row.kernel} {widths}".strip(),
            f"{blocks} warps={setting.warps} stages={setting.stages}".strip(),
            f"{row.milliseconds:.4g} ms",
            before,
            self.run,
        )


@dataclass(frozen=True)
class Sizes:
    """What the layers are run with."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    tokens: int = 32768
    """Of a prefill, and of a training step of rows of 2,048."""
    batch: int = 32
    """Rows of a decode step."""
    dtype: torch.dtype = torch.bfloat16


def tune(
    kernels: Sequence[str] = (),
    *,
    methods: Sequence[str] | None = None,
    sizes: Sizes | None = None,
    file: Path | None = None,
    progress: Watch | None = None,
) -> list[Tuned]:
    """Time the candidates of ``kernels`` (of all that methods launch) on this GPU; rows go into the user's ``file``.

    Raises :class:`LinearizeError` without a GPU, for an unknown kernel, and where no run launches what was asked for.
    """
    for name in kernels:
        if name not in CANDIDATES:
            raise LinearizeError(f"tune: {name!r} is no kernel with candidates{near(name, CANDIDATES)}")
    converting = [name for name, method in METHODS.items() if method.mixer is not None]
    for name in methods or ():
        if name not in converting:
            raise LinearizeError(f"tune: {name!r} is no method with a mixer{near(name, converting)}")
    device = _device()
    file = user_file() if file is None else file
    read_rows(file)  # a malformed file is told before minutes of timing
    found: list[Tuned] = []
    known: set[Ask] = set()
    chosen = methods or converting
    for number, method in enumerate(chosen):
        if progress is not None:
            progress(Progress("tune", number, len(chosen), "methods"))
        for run in runs(method, sizes or Sizes(), device):
            for ask in _asks(run):
                wanted = ask.kernel in (kernels or CANDIDATES)
                if wanted and ask not in known and (tuned := _best(ask, run)) is not None:
                    found.append(tuned)
                    write_rows(file, [tuned.row])
                known.add(ask)
    if progress is not None:
        progress(Progress("tune", len(chosen), len(chosen), "methods"))
    if not found:
        what = ", ".join(kernels) or "a kernel"
        raise LinearizeError(
            f"tune: no run of {', '.join(chosen)} launches {what} here; see why with --verbose"
        )
    return found


def _device() -> torch.device:
    """The GPU to time on."""
    if not torch.cuda.is_available():
        raise LinearizeError("tune: torch finds no GPU; run it on the machine whose GPU runs the kernels")
    return torch.device("cuda", torch.cuda.current_device())


@dataclass(frozen=True)
class Run:
    """One way to use a layer."""

    name: str
    call: Callable[[], Any]
    texts: int = 0
    """Of a decode step in place: calls take turns on the states of so many; 0 is another run."""


def _asks(run: Run) -> list[Ask]:
    """What a run's launches ask for, each once; nothing where the run fails, so that the others go on."""
    with listening() as asks:
        try:
            run.call()
        except Exception as error:
            logger.info("tune: %s is left out: %s", run.name, " ".join(str(error).split())[:200])
            return []
    return list(dict.fromkeys(asks))


def runs(
    method: str, sizes: Sizes, device: torch.device, parts: Sequence[str] = ("decode", *WHOLE)
) -> Iterator[Run]:
    """A method's layer in use: decode first, then prefill, then training, the shorter before the longer."""
    entry = METHODS[method]
    assert entry.mixer is not None
    hidden = sizes.heads * sizes.head_dim
    geometry = Geometry(sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.head_dim, hidden)
    with device:
        mixer = entry.mixer(entry.config(), geometry).float()
    length = min(2048, sizes.tokens)

    def prefill(batch: int, time: int) -> Callable[[], Any]:
        x = _input(sizes, batch, time, device)._replace(use_cache=True)

        def call() -> Any:
            with torch.no_grad():
                return mixer(x)

        return call

    for rows in dict.fromkeys((sizes.batch, 1)) if "decode" in parts else ():
        yield _decode(f"{method}: decode, B={rows}", mixer, sizes, rows, device)
    if "prefill" in parts:
        yield Run(f"{method}: prefill, T={sizes.tokens}", prefill(1, sizes.tokens))
    batch = max(1, sizes.tokens // length)
    for kind in ("training", "transfer"):
        if kind not in parts:
            continue
        x = _input(sizes, batch, length, device)
        if kind == "transfer":
            x = x._replace(transfer=True, teacher=torch.randn_like(x.q))
        else:
            x = x._replace(**{name: getattr(x, name).requires_grad_() for name in ("q", "k", "v")})
        yield Run(f"{method}: {kind}, B={batch}, T={length}", _step(mixer, x))


def _decode(name: str, mixer: Mixer, sizes: Sizes, rows: int, device: torch.device) -> Run:
    """A step after a prompt that fills every window and kept set, in place where the mixer has such steps."""
    with torch.no_grad():
        _, state = mixer(_input(sizes, 1, min(PROMPT, sizes.tokens), device)._replace(use_cache=True))
    state = type(state)(*(t.expand(rows, *t.shape[1:]).clone(memory_format=DENSE) for t in state))
    x = _input(sizes, rows, 1, device)._replace(use_cache=True)
    if mixer.why_not_in_place() is not None:

        def once() -> Any:
            with torch.no_grad():
                return mixer(x, state)

        return Run(name, once)
    x = x._replace(in_place=True)
    first = mixer.with_room(state)
    states = [
        type(first)(*(t.clone(memory_format=DENSE) for t in first)) for _ in range(_texts(first, device))
    ]
    turns = itertools.cycle(states)

    def step() -> Any:
        held = next(turns)
        with torch.no_grad():
            y, made = mixer(x, held)
            for old, new in zip(held, made, strict=True):  # as a cache layer takes over what was not in place
                if new is not old:
                    old.copy_(new)
        return y, held

    return Run(name, step, len(states))


def _texts(state: Any, device: torch.device) -> int:
    """How many states are more than the GPU's cache holds, as between a model's layers none is found there."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    size = sum(t.numel() * t.element_size() for t in state)
    return min(max(2, -(-2 * cache // size)), FOLDING)


def _step(mixer: Mixer, x: MixerInput) -> Callable[[], Any]:
    """Forward and every gradient."""
    wanted: list[Tensor] = [t for t in (x.q, x.k, x.v) if t.requires_grad]
    wanted += [p for p in mixer.parameters() if p.requires_grad]

    def call() -> Any:
        y, _ = mixer(x)
        if isinstance(y, Fit):
            return torch.autograd.grad(y.error, wanted, allow_unused=True)
        if not y.requires_grad:
            return y
        return torch.autograd.grad(y, wanted, torch.ones_like(y), allow_unused=True)

    return call


def _input(sizes: Sizes, batch: int, time: int, device: torch.device) -> MixerInput:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, time, *shape, dtype=sizes.dtype, device=device, generator=generator)

    q, k, v = (draw(n, sizes.head_dim) for n in (sizes.heads, sizes.kv_heads, sizes.kv_heads))
    hidden = draw(sizes.heads * sizes.head_dim)
    return MixerInput(hidden, q, k, v, scale=sizes.head_dim**-0.5, q_plain=q, k_plain=k)


def _best(ask: Ask, run: Run) -> Tuned | None:
    """The fastest candidate; the one in use (the first) where none is faster by more than noise."""
    candidates = CANDIDATES[ask.kernel]
    clocks: dict[int, Callable[[], float]] = {}
    for number, candidate in enumerate(candidates):
        try:
            clocks[number] = _clock(ask.kernel, candidate, run)
        except Exception as error:  # too much shared memory, for one
            logger.info("tune: %s, candidate %d: %s", ask.kernel, number, " ".join(str(error).split())[:200])
    if not clocks:
        return None
    rounds = [_round(clocks) for _ in range(ROUNDS)]
    spent = {number: statistics.median(times[number] for times, _ in rounds) for number in clocks}
    best = min(spent, key=spent.__getitem__)
    if 0 in spent and best != 0:
        gains = [1 - shares[best] for _, shares in rounds]
        if statistics.median(gains) < MARGIN or min(gains) <= 0:
            best = 0
    row = Row(
        ask.kernel,
        candidates[best],
        ask.device,
        ask.K,
        ask.V,
        ask.F,
        ask.dtype,
        milliseconds=round(spent[best], 5),
        default_milliseconds=round(spent[0], 5) if 0 in spent else None,
        versions=_versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return Tuned(row, spent, run.name)


def _round(clocks: dict[int, Callable[[], float]]) -> tuple[dict[int, float], dict[int, float]]:
    """Milliseconds of every candidate, and their shares of the first one's just before."""
    times: dict[int, float] = {}
    shares: dict[int, float] = {}
    for number, clock in clocks.items():
        if number and 0 in clocks:
            before = clocks[0]()
            times[number] = clock()
            shares[number] = times[number] / before
        else:
            times[number] = clock()
    return times, shares


def _clock(kernel: str, setting: Launch, run: Run) -> Callable[[], float]:
    """What times a run under a launch setting; whatever has to be compiled is."""
    if run.texts:
        with using(kernel, setting):
            return clock_of_steps(run.call, run.texts)
    with using(kernel, setting):
        run.call()

    def clock() -> float:
        with using(kernel, setting):
            return milliseconds(run.call)

    return clock


def clock_of_steps(step: Callable[[], Any], texts: int) -> Callable[[], float]:
    """Times a decode step that takes turns on so many states: the mean over ``FOLDING`` steps of each, from a graph."""
    step()
    each = 1 << (max(1, 16 // texts).bit_length() - 1)  # steps of a state in one replay; it divides FOLDING

    def steps() -> None:
        for _ in range(texts * each):
            step()

    replay = record(steps)
    replays = FOLDING // each

    def clock() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        replay()
        start.record()
        for _ in range(replays):
            replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / (replays * texts * each)

    return clock


def milliseconds(call: Callable[[], Any], budget: float = 20.0) -> float:
    """Median time of a call on the GPU, the L2 cache overwritten before each, for about so many milliseconds."""
    flushed = torch.empty(2**26, dtype=torch.int32, device="cuda")

    def timed(count: int) -> float:
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in marks:
            flushed.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in marks)

    each = max(timed(2), 1e-3)
    return timed(min(max(3, int(budget / each)), 100))


def _versions() -> str:
    triton = version("triton") if find_spec("triton") else "none"
    return f"torch {torch.__version__}, triton {triton}"
