"""Time the candidate launches of the kernels on this GPU, and keep the fastest for it.

Every method's layer is run as it is used: a decode step, a prefill, a training step, and one of the transfer. What its
launches ask for says which kernels there are and at which widths; each kernel's candidates (``launches.CANDIDATES``)
are then timed in the first run that launches it, all else as it was, and the fastest is a row for ``launches.json``.
Whole runs are timed, because settings may depend on each other: one kernel's tile is another's scratch.
"""

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
from .modeling.launches import CANDIDATES
from .modeling.mixer import Fit, Geometry, Mixer, MixerInput
from .modeling.registry import METHODS
from .modeling.tuned import Ask, Row, listening, read_rows, user_file, using, write_rows
from .progress import Progress, Watch

logger = logging.getLogger(__name__)

MARGIN = 0.01
"""A candidate must be faster than the setting in use by this share, or that one stays: less is noise."""


@dataclass(frozen=True)
class Tuned:
    """What was found for one kernel at its widths."""

    row: Row
    milliseconds: dict[int, float]
    """Of the run, by the candidate's number; those that could not be launched are absent."""
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


def _asks(run: Run) -> list[Ask]:
    """What a run's launches ask for, each once; nothing where the run fails, so that the others go on."""
    with listening() as asks:
        try:
            run.call()
        except Exception as error:
            logger.info("tune: %s is left out: %s", run.name, " ".join(str(error).split())[:200])
            return []
    return list(dict.fromkeys(asks))


def runs(method: str, sizes: Sizes, device: torch.device) -> Iterator[Run]:
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

    yield Run(f"{method}: decode, B={sizes.batch}", _decode(mixer, sizes, device))
    yield Run(f"{method}: prefill, T={sizes.tokens}", prefill(1, sizes.tokens))
    batch = max(1, sizes.tokens // length)
    for transfer in (False, True):
        x = _input(sizes, batch, length, device)
        if transfer:
            x = x._replace(transfer=True, teacher=torch.randn_like(x.q))
        else:
            x = x._replace(**{name: getattr(x, name).requires_grad_() for name in ("q", "k", "v")})
        kind = "transfer" if transfer else "training"
        yield Run(f"{method}: {kind}, B={batch}, T={length}", _step(mixer, x))


def _decode(mixer: Mixer, sizes: Sizes, device: torch.device) -> Callable[[], Any]:
    """A step after 256 tokens, in place where the mixer has such steps."""
    with torch.no_grad():
        _, state = mixer(_input(sizes, sizes.batch, 256, device)._replace(use_cache=True))
    x = _input(sizes, sizes.batch, 1, device)._replace(use_cache=True)
    if mixer.why_not_in_place() is None:
        x = x._replace(in_place=True)
        state = mixer.with_room(state)
        state = type(state)(*(t.clone(memory_format=torch.contiguous_format) for t in state))

    def call() -> Any:
        with torch.no_grad():
            return mixer(x, state)

    return call


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
    spent: dict[int, float] = {}
    candidates = CANDIDATES[ask.kernel]
    for number, candidate in enumerate(candidates):
        with using(ask.kernel, candidate):
            try:
                spent[number] = milliseconds(run.call)
            except Exception as error:  # too much shared memory, for one
                logger.info(
                    "tune: %s, candidate %d: %s", ask.kernel, number, " ".join(str(error).split())[:200]
                )
    if not spent:
        return None
    best = min(spent, key=spent.__getitem__)
    if 0 in spent and spent[best] > (1 - MARGIN) * spent[0]:
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


def milliseconds(call: Callable[[], Any], budget: float = 60.0) -> float:
    """Median time of a call on the GPU, the L2 cache overwritten before each, for about so many milliseconds."""
    flushed = torch.empty(2**26, dtype=torch.int32, device="cuda")
    call()

    def timed(count: int) -> float:
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in marks:
            flushed.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in marks)

    each = max(timed(3), 1e-3)
    return timed(min(max(5, int(budget / each)), 500))


def _versions() -> str:
    triton = version("triton") if find_spec("triton") else "none"
    return f"torch {torch.__version__}, triton {triton}"
