"""What a student costs and saves: prefill and decode beside the teacher, over lengths and batch sizes.

One harness for both: same process, device, type and token ids. Every point has warm-ups that do not count, then timed
runs with the device synchronised around each; a point is their median and quartiles. What would not fit is left out
and says so, and so does what ran out of memory: both are points, and losing points stay.

prefill  a text of `length` tokens for every row of the batch: cache and the logits of the last token, from nothing
decode   one more token for every row; the timed steps are those that fill `length`, so that no position is beyond it

Ids are random, since no product of matrices depends on them. Both models decode step by step with a growing cache and
without a graph: what a step launches is in its time.
"""

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import psutil
import torch
from torch import nn

from ..modeling.cache import CACHE
from ..modeling.errors import EvaluationError
from ..probe import probe
from ..progress import Progress, Watch
from .likelihood import TEACHER
from .memory import Memory, memory
from .statistics import quartiles

PARTS = ("prefill", "decode")
RUNS, WARMUPS = 10, 3
FEWEST = 3
"""Timed runs of a point however slow; one warm-up precedes them."""
POINT_SECONDS = 6.0
"""A point whose runs would take longer has fewer of them."""
ROOM = 0.9
"""Share of the free memory that a point may be predicted to take."""
OUT_OF_MEMORY = "out of memory"
SHORTEST = WARMUPS + RUNS + 1
LONGEST = {"cuda": 131_072, "cpu": 4_096}
BATCHES = {"cuda": (1, 8), "cpu": (1,)}


@dataclass(frozen=True)
class Point:
    """One part, model, length and batch: milliseconds of a call as median and quartiles, or why there are none."""

    part: str
    model: str
    length: int
    batch: int
    ms: float | None = None
    low: float | None = None
    high: float | None = None
    runs: int = 0
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    """Most memory of the device that was taken at once, this model's weights included; None where torch does not
    count it."""
    state_bytes: int | None = None
    """What the whole batch keeps for its next token: states, and KV caches of layers that have them."""
    not_run: str | None = None

    @property
    def out_of_memory(self) -> bool:
        """Whether it did not fit, which is a result and not a gap."""
        return bool(self.not_run and self.not_run.startswith(OUT_OF_MEMORY))


@dataclass(frozen=True)
class SpeedResults:
    """All points, and the length from which the student stays ahead."""

    device: str
    points: list[Point]
    crossover: dict[str, int | None]
    """`prefill`, `decode` and `memory` at the smallest batch; None is none up to `up_to`."""
    up_to: int
    """The longest length at which both models could be compared; 0 where there is none."""
    crossovers: dict[int, dict[str, int | None]] = field(default_factory=dict)
    """The same for every batch."""
    dtype: str = ""
    attention: str = ""
    """How softmax was computed."""
    threads: int | None = None
    """Of the CPU; None on a GPU."""
    warmups: int = WARMUPS
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; `from_dict` reads it back."""
        tree = asdict(self)
        return tree | {"crossovers": {str(batch): found for batch, found in self.crossovers.items()}}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "SpeedResults":
        points = [Point(**point) for point in tree["points"]]
        crossovers = {int(batch): dict(found) for batch, found in tree.get("crossovers", {}).items()}
        return cls(**{**tree, "points": points, "crossovers": crossovers})


@dataclass(frozen=True)
class Planned:
    """A point to come: bytes that it takes at once beyond all weights, seconds with its warm-ups, and why not."""

    part: str
    model: str
    length: int
    batch: int
    bytes: int
    seconds: float
    not_run: str | None = None


def grid(teacher: nn.Module, device: str) -> list[int]:
    """512, 1024, ... doubling to the teacher's context, as far as the device does that in reasonable time."""
    longest = min(context_of(teacher) or math.inf, LONGEST.get(device, LONGEST["cpu"]))
    lengths = [512 << power for power in range(20) if 512 << power <= longest]
    return lengths or [int(longest)]


def context_of(model: Any) -> int | None:
    """Positions that the model was made for; None where its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def plan(
    models: Mapping[str, nn.Module],
    lengths: Sequence[int],
    batches: Sequence[int],
    *,
    parts: Sequence[str] = PARTS,
    force: bool = False,
    seconds: float | None = None,
    free: int | None = None,
) -> list[Planned]:
    """Every point with what it should take, from the models' geometry and one short timing of each.

    `free` are the bytes to be had (None: asked of the device). A point predicted not to fit is not run unless `force`,
    and neither is one that would end after `seconds`. Raises EvaluationError for an impossible grid.
    """
    _check(models, lengths, batches, parts)
    sizes = memory(models[TEACHER], {name: model for name, model in models.items() if name != TEACHER})
    free = _free(_device(models[TEACHER])) if free is None else free
    shortest, narrowest = min(lengths), min(batches)
    paces = {}
    for name, model in models.items():
        limit = context_of(model)
        sample = min(shortest, limit) if limit and name == TEACHER else shortest
        paces[name] = _pace(model, sample, narrowest)
    planned, total = [], 0.0
    for length, batch, part, (name, model) in _points(lengths, batches, parts, models):
        needed = sizes[name].bytes_at(length) * batch + _working_bytes(model, length, batch)
        spent = _seconds(paces[name], sizes[name], part, length, batch)
        reason = _why_not(name, model, length)
        if reason is None and needed > ROOM * free and not force:
            reason = f"{OUT_OF_MEMORY} predicted: {_gib(needed)} of {_gib(free)} that are free"
        if reason is None and seconds is not None and total + spent > seconds:
            reason = f"predicted to end after the {seconds:.0f} s given"
        total += 0.0 if reason else spent
        planned.append(Planned(part, name, length, batch, needed, spent, reason))
    return planned


@torch.no_grad()
def measure(
    models: Mapping[str, nn.Module],
    planned: Sequence[Planned],
    *,
    runs: int = RUNS,
    seed: int = 0,
    progress: Watch | None = None,
) -> SpeedResults:
    """Time the plan's points in their order; the first student is the one that crossovers are of."""
    teacher = models[TEACHER]
    total = sum(point.seconds for point in planned if point.not_run is None)
    done, points = 0.0, []
    with _in_eval_mode(models.values()), best_softmax(_device(teacher)):
        for at in planned:
            point = Point(at.part, at.model, at.length, at.batch, not_run=at.not_run)
            if at.not_run is None:
                point = _measured(models[at.model], point, runs, seed)
                done += at.seconds
            points.append(point)
            if progress is not None and total:
                progress(Progress("bench", round(1000 * done), round(1000 * total), "ms planned"))
    student = next((name for name in models if name != TEACHER), TEACHER)
    found = {batch: crossovers(points, batch, student) for batch in sorted({x.batch for x in points})}
    device = _device(teacher)
    few = sorted({x.runs for x in points if x.not_run is None and x.runs < runs})
    notes = [f"slow points have {', '.join(map(str, few))} timed runs instead of {runs}, and one warm-up"]
    return SpeedResults(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        points=points,
        crossover=found[min(found)],
        up_to=_up_to(points, student),
        crossovers=found,
        dtype=str(teacher.dtype).removeprefix("torch."),
        attention=_attention(teacher, device),
        threads=None if device.type == "cuda" else torch.get_num_threads(),
        notes=notes if few else [],
    )


def crossovers(points: Iterable[Point], batch: int, student: str) -> dict[str, int | None]:
    """Per measure the smallest length from which the student's upper quartile stays below the teacher's lower one.

    Running out of memory is worse than any number, and lengths at which either model was not run for another reason
    are passed over. Memory compares what is kept for the next token.
    """
    points = [point for point in points if point.batch == batch]
    measures = {"prefill": ("prefill", "time"), "decode": ("decode", "time"), "memory": ("prefill", "bytes")}
    return {
        name: _crossover([x for x in points if x.part == part], student, what == "bytes")
        for name, (part, what) in measures.items()
    }


@contextlib.contextmanager
def best_softmax(device: torch.device) -> Iterator[None]:
    """SDPA's fastest kernel first, where there is a choice: cuDNN, flash, memory-efficient, plain."""
    if device.type != "cuda":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    with sdpa_kernel([*order, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True):
        yield


def kept_bytes(cache: Any) -> int:
    """Bytes of a cache as it is: states, or keys and values."""
    total = 0
    for layer in cache.layers:
        state = getattr(layer, "state", None)
        held = (getattr(layer, "keys", None), getattr(layer, "values", None)) if state is None else state
        total += sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)
    return total


# Points


def _measured(model: Any, point: Point, runs: int, seed: int) -> Point:
    device = _device(model)
    generator = torch.Generator().manual_seed(seed)
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(3, rows, (point.batch, point.length), generator=generator).to(device)
    weights = sum(p.numel() * p.element_size() for p in {*model.parameters(), *model.buffers()})
    before = _start_counting(device)
    try:
        made = _prefill(model, ids, runs) if point.part == "prefill" else _decode(model, ids, runs)
    except torch.OutOfMemoryError:
        return replace(point, not_run=OUT_OF_MEMORY)
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        return replace(point, not_run=OUT_OF_MEMORY)
    except IndexError:
        return replace(point, not_run=f"beyond its table of {context_of(model)} positions")
    finally:
        del ids
        _tidy(device)
    spent, kept = made
    low, middle, high = quartiles(spent)
    tokens = point.batch * (point.length if point.part == "prefill" else 1)
    return replace(
        point,
        ms=1000 * middle,
        low=1000 * low,
        high=1000 * high,
        runs=len(spent),
        tokens_per_second=tokens / middle,
        peak_bytes=None if before is None else torch.cuda.max_memory_allocated(device) - before + weights,
        state_bytes=kept,
    )


def _prefill(model: Any, ids: torch.Tensor, runs: int) -> tuple[list[float], int]:
    kept = []

    def read() -> None:
        kept[:] = [kept_bytes(_read(model, ids)[CACHE])]

    spent = _times(read, ids.device, runs)
    return spent, kept[0]


def _decode(model: Any, ids: torch.Tensor, runs: int) -> tuple[list[float], int]:
    """The last tokens one by one, after a prefill of those before them, which is not timed."""
    steps = min(WARMUPS + runs, ids.shape[1] - 1)
    cache = _read(model, ids[:, :-steps])[CACHE]
    at = iter(range(ids.shape[1] - steps, ids.shape[1]))

    def step() -> None:
        index = next(at)
        model(input_ids=ids[:, index : index + 1], use_cache=True, **{CACHE: cache})

    spent = _times(step, ids.device, steps - WARMUPS)
    return spent, kept_bytes(cache)


def _read(model: Any, ids: torch.Tensor) -> Any:
    # Without this every row would have [T, vocabulary] logits, which no reader of a prompt wants.
    return model(input_ids=ids, use_cache=True, logits_to_keep=1)


def _times(call: Callable[[], None], device: torch.device, runs: int) -> list[float]:
    """Seconds of `runs` calls after the warm-ups; fewer, after one warm-up, where calls are slow."""
    first = _clock(call, device)
    if first * (WARMUPS - 1 + runs) > POINT_SECONDS:
        first = _clock(call, device)  # the second says what a warm call takes
        if first * runs > POINT_SECONDS:
            more = max(FEWEST, min(runs, int(POINT_SECONDS / first))) - 1
            return [first, *(_clock(call, device) for _ in range(more))]
    else:
        _clock(call, device)
    _clock(call, device)
    return [_clock(call, device) for _ in range(runs)]


def _clock(call: Callable[[], None], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _start_counting(device: torch.device) -> int | None:
    _tidy(device)
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _tidy(device: torch.device) -> None:
    """What the last point took is free for the next one."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


# The plan


def _points(
    lengths: Sequence[int], batches: Sequence[int], parts: Sequence[str], models: Mapping[str, nn.Module]
) -> Iterator[tuple[int, int, str, tuple[str, nn.Module]]]:
    """Short before long, and both models of a point one after the other."""
    for length in sorted(set(lengths)):
        for batch in sorted(set(batches)):
            for part in parts:
                for pair in models.items():
                    yield length, batch, part, pair


def _check(
    models: Mapping[str, nn.Module], lengths: Sequence[int], batches: Sequence[int], parts: Sequence[str]
) -> None:
    if TEACHER not in models:
        raise EvaluationError(f"bench: no model is called {TEACHER!r}, beside which students are timed")
    if not lengths or min(lengths) < SHORTEST:
        raise EvaluationError(
            f"lengths: {min(lengths, default='none')} is too short; warm-ups and runs of a decode take the last "
            f"{SHORTEST - 1} tokens, so give at least {SHORTEST}"
        )
    if not batches or min(batches) < 1:
        raise EvaluationError(f"batch: {min(batches, default='none')} is impossible; give at least 1")
    if unknown := set(parts) - set(PARTS):
        raise EvaluationError(f"parts: {unknown.pop()!r} is unknown; choose from {', '.join(PARTS)}")
    types = {name: (str(model.dtype), _device(model).type) for name, model in models.items()}
    if len(set(types.values())) > 1:
        told = ", ".join(f"{name} is {dtype} on {device}" for name, (dtype, device) in types.items())
        raise EvaluationError(f"bench: {told}; models are compared in one type on one device")


def _why_not(name: str, model: Any, length: int) -> str | None:
    limit = context_of(model)
    return f"beyond its context of {limit:,}" if name == TEACHER and limit and length > limit else None


@torch.no_grad()
def _pace(model: Any, length: int, batch: int) -> tuple[float, float, int, int]:
    """Seconds of a short prefill and of a decode step, warm, and the length and batch that they are of."""
    device = _device(model)
    ids = torch.full((batch, length), 3, device=device)
    last: list[Any] = []

    def read() -> None:
        last[:] = [_read(model, ids)]

    def step() -> None:
        model(input_ids=ids[:, :1], use_cache=True, **{CACHE: last[0][CACHE]})

    try:
        with _in_eval_mode([model]):
            read_seconds = [_clock(read, device) for _ in range(2)][1]
            last[:] = [_read(model, ids[:, :-2])]
            step_seconds = [_clock(step, device) for _ in range(2)][1]
    except torch.OutOfMemoryError:
        raise EvaluationError(
            f"bench: not even {batch} x {length} tokens fit in memory beside the weights; "
            "give shorter lengths or a smaller batch"
        ) from None
    return read_seconds, step_seconds, length, batch


def _seconds(pace: tuple[float, float, int, int], size: Memory, part: str, length: int, batch: int) -> float:
    """Of a whole point. Prefill grows with the tokens, and where a cache grows with their square at the far end;
    a step grows with what it reads."""
    read, step, short, narrow = pace
    bend = (length / short) ** 0.5 if size.per_token else 1.0
    read *= length / short * batch / narrow * bend
    step *= max(1.0, (batch / narrow) ** 0.5 * (size.bytes_at(length) / max(1, size.bytes_at(short))) ** 0.5)
    calls = WARMUPS + RUNS
    if read * calls > POINT_SECONDS:
        calls = max(FEWEST, int(POINT_SECONDS / read)) + 1
    return read * calls if part == "prefill" else read + step * (WARMUPS + RUNS)


def _working_bytes(model: Any, length: int, batch: int) -> int:
    """Activations of one layer at a time, which is what a forward without gradients holds at its widest."""
    config = model.config.get_text_config()
    hidden = getattr(config, "hidden_size", 0)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    heads = max((g.heads * (g.key_dim + g.value_dim) for g in _geometries(model)), default=0)
    return batch * length * (4 * hidden + 3 * inner + 2 * heads) * next(model.parameters()).element_size()


def _geometries(model: Any) -> list[Any]:
    spec = getattr(model.config, "linearize", None)
    if spec:
        from ..modeling.mixer import Geometry

        return [Geometry(**layer["geometry"]) for layer in spec["layers"].values()]
    return [layer.geometry for layer in probe(model).values()]


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


# Crossover


def _crossover(points: Sequence[Point], student: str, by_bytes: bool) -> int | None:
    found = None
    for length, (theirs, ours) in sorted(_pairs(points, student).items(), reverse=True):
        if not _beats(ours, theirs, by_bytes):
            break
        found = length
    return found


def _pairs(points: Iterable[Point], student: str) -> dict[int, tuple[Point, Point]]:
    """Length -> teacher's and student's point, where both ran or ran out of memory."""
    at: dict[int, dict[str, Point]] = {}
    for point in points:
        if point.not_run is None or point.out_of_memory:
            at.setdefault(point.length, {})[point.model] = point
    return {n: (by[TEACHER], by[student]) for n, by in at.items() if TEACHER in by and student in by}


def _beats(ours: Point, theirs: Point, by_bytes: bool) -> bool:
    if ours.out_of_memory or theirs.out_of_memory:
        return theirs.out_of_memory and not ours.out_of_memory
    if by_bytes:
        return (ours.state_bytes or 0) < (theirs.state_bytes or 0)
    return (ours.high or math.inf) < (theirs.low or 0.0)


def _up_to(points: Sequence[Point], student: str) -> int:
    lengths = [n for part in PARTS for n in _pairs([x for x in points if x.part == part], student)]
    return max(lengths, default=0)


# The machine


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"CPU, {names[0]}" if names else "CPU"


def _attention(teacher: Any, device: torch.device) -> str:
    name = teacher.config._attn_implementation
    order = ": cuDNN, flash, memory-efficient, plain, the first that can" if device.type == "cuda" else ""
    return f"{name}{order}" if name == "sdpa" else str(name)


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


@contextlib.contextmanager
def _in_eval_mode(models: Iterable[Any]) -> Iterator[None]:
    training = [model for model in models if model.training]
    for model in training:
        model.eval()
    try:
        yield
    finally:
        for model in training:
            model.train()
