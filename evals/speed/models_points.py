"""Points of ``models.py``: prefill, decode and training of one model, teacher or student."""

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import measure
import torch
from measure import one_line, significant

from linearize.modeling.cache import CACHE

UNMASKED = "speed_unmasked"  # attention over every slot of a cache, which is then full


# Prefill


def prefill(args: argparse.Namespace, model: Any) -> Iterator[dict[str, Any]]:
    last: dict[str, Any] = {}
    attempt(measured, reader(model, min(args.lengths)))
    for length in sorted(args.lengths):
        row: dict[str, Any] = {"T": length, "B": 1}
        predicted = last["ms"] / 1000 * (length / last["T"]) ** 1.5 if last else 0
        if predicted > args.limit:
            yield row | {"not_run": f"{predicted:.0f} s predicted"}
            continue
        if time.monotonic() + predicted > ends[0]:
            yield row | {"not_run": "budget"}
            continue
        row |= attempt(measured, reader(model, length))
        if "ms" in row:
            row["tokens_per_second"] = significant(length / row["ms"] * 1000)
            last = row
        yield row
        measure.clear()


def reader(model: Any, length: int) -> Callable[[], Any]:
    ids = tokens(model, 1, length)

    def read() -> Any:
        with torch.no_grad(), best_softmax():
            return model(ids, use_cache=True, logits_to_keep=1)

    return read


def measured(call: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds of a call, its peak memory and what its cache keeps. A call of seconds is made once: a shorter one
    compiled and loaded what it needs."""
    kept: list[int] = []
    start = time.perf_counter()
    peak = measure.peak_mib(lambda: kept.append(bytes_of(call()[CACHE])))
    first = 1000 * (time.perf_counter() - start)
    spent = [first] if first > 4000 else [clock(call) for _ in range(1 if first > 1500 else 3)]
    found = {"ms": significant(statistics.median(spent)), "calls": len(spent), "kept_bytes": kept[0]}
    return found | ({} if peak is None else {"peak_mib": peak})


def clock(call: Callable[[], Any]) -> float:
    """Milliseconds until the device has done it."""
    measure.wait()
    start = time.perf_counter()
    result = call()
    measure.wait()
    spent = 1000 * (time.perf_counter() - start)
    del result
    return spent


def bytes_of(cache: Any) -> int:
    """Bytes of a cache: keys and values, or states."""
    total = 0
    for layer in cache.layers:
        state = getattr(layer, "state", None)
        held = [layer.keys, layer.values] if state is None else state
        total += sum(t.numel() * t.element_size() for t in held)
    return total


def tokens(model: Any, batch: int, length: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(3, model.config.vocab_size, (batch, length), device=model.device)


@contextmanager
def best_softmax() -> Iterator[None]:
    """SDPA's fastest kernel first."""
    if not measure.gpu():
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    order += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        yield


ends = [math.inf]  # when the run's time is up


def attempt(make: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """The fields of a row, or why there are none."""
    if time.monotonic() > ends[0]:
        return {"not_run": "budget"}
    try:
        return make(*given)
    except torch.cuda.OutOfMemoryError:
        return {"not_run": "out of memory"}
    except Exception as error:
        return {"not_run": one_line(error)}


# Decode


FIRST = (1, 32)  # rows of the steps that are timed before others


def decode_first(args: argparse.Namespace, model: Any) -> Iterator[dict[str, Any]]:
    yield from decode(args, model, [batch for batch in args.batches if batch in FIRST])


def decode_others(args: argparse.Namespace, model: Any) -> Iterator[dict[str, Any]]:
    if converted(model):
        row = {"T": args.context, "B": min(args.batches), "any_T": not growth(model)}
        yield row | {"how": "generate, static"} | attempt(generate, model, row["B"], args.context)
        measure.clear()
    yield from decode(args, model, [batch for batch in args.batches if batch not in FIRST])


def decode(args: argparse.Namespace, model: Any, batches: list[int]) -> Iterator[dict[str, Any]]:
    if converted(model):
        yield from decode_student(args, model, batches)
    else:
        yield from decode_teacher(args, model, batches)


def converted(model: Any) -> bool:
    return bool(getattr(model.config, "linearize", None))


def decode_teacher(args: argparse.Namespace, model: Any, batches: list[int]) -> Iterator[dict[str, Any]]:
    """A static cache that is full but for the steps that are timed."""
    register_unmasked()
    before = model.config._attn_implementation
    model.set_attn_implementation(UNMASKED)
    config = model.config
    per_token = (
        2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize * config.num_hidden_layers
    )
    try:
        for length, batch in itertools.product(args.lengths, batches):
            row = {"T": length, "B": batch, "kept_bytes": batch * length * per_token}
            free = torch.cuda.mem_get_info()[0] if measure.gpu() else math.inf
            if row["kept_bytes"] > 0.97 * free:
                need = row["kept_bytes"] / 2**30
                yield row | {"not_run": f"out of memory: {need:.0f} GiB of KV cache"}
                continue
            row |= attempt(step_of_teacher, model, batch, length)
            if "ms" in row:
                row["tokens_per_second"] = significant(batch / row["ms"] * 1000)
            yield row
            measure.clear()
    finally:
        model.set_attn_implementation(before)


STEPS = 16  # of a decode that is timed at once


def step_of_teacher(model: Any, batch: int, length: int) -> dict[str, Any]:
    from transformers import StaticCache

    config = model.config
    cache = StaticCache(config=config, max_cache_len=length + 4 * STEPS)
    cache.early_initialization(
        batch, config.num_key_value_heads, config.head_dim, dtype=model.dtype, device=model.device
    )
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()

    def rewind() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)

    return time_steps(model, cache, batch, length, rewind)


def decode_student(args: argparse.Namespace, model: Any, batches: list[int]) -> Iterator[dict[str, Any]]:
    """Steps after ``--context`` tokens: what a step costs does not depend on how many came before, unless the state
    grows, which the row then says."""
    grows = growth(model)
    for batch in batches:
        row = {"T": args.context, "B": batch, "any_T": not grows}
        row |= attempt(step_of_student, model, batch, args.context)
        if "ms" in row:
            row["tokens_per_second"] = significant(batch / row["ms"] * 1000)
            row["kept_bytes"] += int(batch * grows * args.context) if grows else 0
        yield row
        measure.clear()


def growth(model: Any) -> float:
    """Bytes that a row's state grows by with every token."""
    return sum(mixer.growth(model.dtype.itemsize) for mixer in model.mixers().values())


def step_of_student(model: Any, batch: int, context: int) -> dict[str, Any]:
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=context + 64 * STEPS)
    ids = tokens(model, batch, context)
    with torch.no_grad():
        model(ids, use_cache=True, **{CACHE: cache}, logits_to_keep=1)
    found = time_steps(model, cache, batch, context, lambda: None)
    return found | {"kept_bytes": bytes_of(cache)}


def time_steps(model: Any, cache: Any, batch: int, length: int, rewind: Callable[[], None]) -> dict[str, Any]:
    """Milliseconds of a step, eager and from a CUDA graph; the graph's counts where there is one."""
    ids = tokens(model, batch, 1)
    positions = torch.full_like(ids, length)

    def step() -> Any:
        return model(ids, position_ids=positions, use_cache=True, **{CACHE: cache}).logits

    def series(one: Callable[[], Any], rounds: int) -> float:
        spent = []
        for _ in range(rounds):
            rewind()
            spent.append(clock(lambda: [one() for _ in range(STEPS)] and None) / STEPS)
        return statistics.median(spent)

    with torch.no_grad(), best_softmax():
        rewind()
        step()
        eager = series(step, 2)
        found: dict[str, Any] = {"ms": significant(eager), "how": "eager", "eager_ms": significant(eager)}
        if measure.gpu():
            try:
                rewind()
                inputs = {"input_ids": ids, "position_ids": positions}
                inputs |= {CACHE: cache, "use_cache": True}
                replay = recorded(model, inputs, step)
                rewind()
                replay()
                found |= {"ms": significant(series(replay, 5)), "how": "CUDA graph"}
            except Exception as error:
                found["no_graph"] = one_line(error)
        found["peak_mib"] = measure.peak_mib(lambda: (rewind(), step()))
    return found


def recorded(model: Any, inputs: dict[str, Any], step: Callable[[], Any]) -> Callable[[], Any]:
    """A step from a CUDA graph: a student's as ``generate`` makes it."""
    if not converted(model):
        return captured(step)
    from linearize.modeling.graph import StepGraph

    graph = StepGraph(model)
    for _ in range(3):  # as always, recorded, replayed
        graph(**inputs)
    if graph.refused is not None:
        raise RuntimeError(graph.refused)
    return lambda: graph(**inputs)


def captured(step: Callable[[], Any]) -> Callable[[], None]:
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        kept = step()

    def replay(_: Any = kept) -> None:
        graph.replay()

    return replay


def generate(model: Any, batch: int, context: int) -> dict[str, Any]:
    """What a user gets: the time of more tokens of ``generate`` with a static cache, greedy, over how many they are."""
    ids = tokens(model, batch, context)

    def write(count: int) -> float:
        terms = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        terms |= {"cache_implementation": "static", "attention_mask": torch.ones_like(ids)}
        return clock(lambda: model.generate(ids, **terms))

    short_one, long_one = STEPS, 5 * STEPS
    with torch.no_grad(), best_softmax():
        write(short_one)
        spent = (write(long_one) - write(short_one)) / (long_one - short_one)
    return {"ms": significant(spent), "tokens_per_second": significant(batch / spent * 1000)}


def register_unmasked() -> None:
    """SDPA over all of a cache, grouped heads, no mask: as little as a decode step of softmax can do."""
    from torch.nn.functional import scaled_dot_product_attention
    from transformers import AttentionInterface, AttentionMaskInterface

    def attention(
        module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float | None = None, **_: Any
    ) -> Any:
        y = scaled_dot_product_attention(q, k, v, scale=scaling, enable_gqa=True)
        return y.transpose(1, 2), None

    AttentionInterface.register(UNMASKED, attention)
    AttentionMaskInterface.register(UNMASKED, lambda *_, **__: None)


# Training


def train(args: argparse.Namespace, model: Any) -> Iterator[dict[str, Any]]:
    stages = ("transfer", "finetune") if converted(model) else ("forward alone",)
    for stage in stages:
        for length in args.train_lengths:
            batch = max(1, args.train_tokens // (2 if stage == "finetune" else 1) // length)
            row = {"T": length, "B": batch, "stage": stage}
            yield row | attempt(step_of_stage, stage, model, batch, length)
            measure.clear()


def step_of_stage(name: str, model: Any, batch: int, length: int) -> dict[str, Any]:
    """A step: gradients, AdamW; beside the teacher's forward over the same tokens, which is the most it could reach."""
    from linearize.modeling.attention import attention_mode
    from linearize.recipe import Finetune, Transfer
    from linearize.train.finetune import FinetuneStage
    from linearize.train.transfer import TransferStage

    ids = tokens(model, batch, length)

    def forward() -> Any:
        with torch.no_grad(), best_softmax(), attention_mode("softmax"):
            return model.base_model(ids, use_cache=False)

    alone = speed(forward, ids.numel())
    if name == "forward alone":
        return alone
    for mixer in model.mixers().values():
        mixer.requires_grad_(True)
    stage: Any = TransferStage(model, Transfer()) if name == "transfer" else FinetuneStage(model, Finetune())
    given = {"input_ids": ids, "labels": ids}
    try:
        with stage.training():
            trained = [p for _, p in stage.named_parameters()]
            if not trained:
                return {"not_run": "nothing to train"}
            optimizer = torch.optim.AdamW(trained, lr=1e-6)

            def step() -> None:
                with torch.autocast(ids.device.type, torch.bfloat16, enabled=measure.gpu()), best_softmax():
                    stage.backward(given, 1.0)
                optimizer.step()
                optimizer.zero_grad()

            found = speed(step, ids.numel())
    finally:
        if name == "finetune":
            stage.remove()
    limit = alone["tokens_per_second"]
    share = significant(found["tokens_per_second"] / limit, 3)
    return found | {"forward_tokens_per_second": limit, "of_forward": share}


def speed(call: Callable[[], Any], count: int) -> dict[str, Any]:
    """Tokens a second."""
    first = clock(call)
    spent = statistics.median([clock(call) for _ in range(1 if first > 5000 else 3)])
    found = {"ms": significant(spent), "tokens_per_second": significant(count / spent * 1000)}
    peak = measure.peak_mib(call)
    return found | ({} if peak is None else {"peak_mib": peak})


ROUNDS = (("prefill", prefill), ("decode", decode_first), ("decode", decode_others), ("train", train))
"""Parts in the order in which all models take them."""
