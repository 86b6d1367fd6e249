"""Whole models with random weights, teacher beside students: prefill, decode, memory and training on one GPU.

    python evals/speed/models.py --output models.jsonl              every shape and part
    python evals/speed/models.py --shapes 8b --parts prefill        in several calls
    python evals/speed/models.py --tiny                             the same road without a GPU, tiny shapes
    python evals/speed/models.py --table models-*.jsonl --plot models.svg models-8b.jsonl

One JSON line a point; a point that does not fit or would take too long is a line that says so. Weights are random:
nothing here depends on what they are. The teacher is given the best that torch has: SDPA with cuDNN before flash and
grouped heads, and for decode a CUDA graph over a static cache without a mask. Students are converted in place from it.

prefill  milliseconds of one row of T tokens, cache and last logits included; peak memory; bytes kept for decoding
decode   milliseconds of a step at T tokens of context; of students at --context tokens, since theirs is the same at any
train    tokens a second of a step of each stage, and what that is of the teacher's forward alone over the same tokens
"""

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import measure  # noqa: E402
import torch  # noqa: E402
from measure import MIB, in_k, markdown, one_line, short, significant  # noqa: E402

from linearize.modeling.cache import CACHE  # noqa: E402

PARTS = ("prefill", "decode", "train")
ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
COMMON = {"vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}
SHAPES: dict[str, dict[str, Any]] = {
    # Llama-3.2-1B and Llama-3.1-8B
    "1b": COMMON
    | HEADS
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
    | {"tie_word_embeddings": True, "rope_parameters": ROPE | {"factor": 32.0}},
    "8b": COMMON
    | HEADS
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128}
    | {"tie_word_embeddings": False, "rope_parameters": ROPE},
    "tiny": {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096},
}
UNMASKED = "speed_unmasked"  # attention over every slot of a cache, which is then full


def main(words: list[str] | None = None) -> int:
    args = arguments(words)
    if args.table or args.plot:
        if args.table:
            print(table(measure.read_lines(args.table)))
        if args.plot:
            plot(measure.read_lines([args.plot[1]]), args.plot[0])
        return 0
    if not args.tiny and not measure.gpu():
        print("models.py: torch finds no GPU; --tiny tries the road without one", file=sys.stderr)
        return 2
    start = time.monotonic()
    ends[0] = start + args.budget
    lines = measure.Lines(args.output, measure.provenance(args.commit))
    for row in rows(args):
        whole = lines.add(row)
        said = whole.get("not_run") or ", ".join(
            f"{key} {whole[key]}" for key in ("ms", "tokens_per_second", "how", "of_forward") if key in whole
        )
        where = ", ".join(f"{key}={whole[key]}" for key in ("T", "B") if key in whole)
        line = f"{whole['shape']} {whole['part']} {whole['model']} {where}: {said}"
        print(f"{time.monotonic() - start:5.0f} s  {line}", file=sys.stderr, flush=True)
    print(table(lines.rows))
    return 0


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    listed = {"type": lambda text: text.split(","), "metavar": "A,B"}
    numbers = {"type": lambda text: [int(n) for n in text.split(",")], "metavar": "N,N"}
    parser.add_argument("--shapes", **listed, default=["1b", "8b"])
    parser.add_argument("--parts", **listed, default=list(PARTS))
    parser.add_argument(
        "--students", **listed, default=["lolcats", "liger", "salient"], help="methods' names"
    )
    parser.add_argument("--no-teacher", action="store_true")
    parser.add_argument("--lengths", **numbers, default=[2048, 8192, 32768, 131072])
    parser.add_argument("--batches", **numbers, default=[1, 8, 32, 64], help="of decode")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has; rows say so")
    parser.add_argument(
        "--context", type=int, default=1024, help="tokens that a student has read before it decodes"
    )
    parser.add_argument("--train-lengths", **numbers, default=[2048, 8192])
    parser.add_argument(
        "--train-tokens", type=int, default=8192, help="of a step of transfer; half of it finetunes"
    )
    parser.add_argument("--budget", type=float, default=500.0, help="seconds; points after them are not run")
    parser.add_argument(
        "--limit", type=float, default=20.0, help="seconds; a call predicted to be longer is not made"
    )
    parser.add_argument("--output", type=Path, help="JSON lines; replaced")
    parser.add_argument("--commit", help="commit of the code, where there is no git")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU too")
    parser.add_argument("--table", type=Path, nargs="+", metavar="JSONL", help="print the table of rows")
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("IMAGE", "JSONL"), help="needs matplotlib")
    args = parser.parse_args(words)
    for part in set(args.parts) - set(PARTS):
        parser.error(f"--parts: {part!r} is unknown; choose from {', '.join(PARTS)}")
    for shape in set(args.shapes) - set(SHAPES):
        parser.error(f"--shapes: {shape!r} is unknown; choose from {', '.join(SHAPES)}")
    if args.tiny:
        args.shapes, args.lengths, args.batches = ["tiny"], [128, 256], [1, 2]
        args.context, args.train_lengths, args.train_tokens = 150, [128], 256
    return args


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every row; each model is built once and converted in place."""
    from linearize import convert, unconvert
    from linearize.methods import build_method

    for shape in args.shapes:
        measure.clear()
        model = build(shape, args.layers)
        of = {"shape": shape, "layers": model.config.num_hidden_layers}
        of["parameters"] = sum(p.numel() for p in model.parameters())
        if not args.no_teacher:
            yield from model_rows(args, model, of | {"model": "teacher"})
        for name in args.students:
            student = convert(model, build_method({"name": name}))
            yield from model_rows(args, student, of | {"model": name})
            model = unconvert(student)
        del model


def model_rows(args: argparse.Namespace, model: Any, of: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    parts = {"prefill": prefill, "decode": decode, "train": train}
    for name in args.parts:
        for row in parts[name](args, model):
            yield {"part": name, **of, **row}
        measure.clear()


def build(shape: str, layers: int | None) -> Any:
    """A model of this shape, its weights drawn where they stay."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(**fields, attn_implementation="sdpa")
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(torch.bfloat16 if measure.gpu() else torch.float32)
        with torch.device("cuda" if measure.gpu() else "cpu"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


# Prefill


def prefill(args: argparse.Namespace, model: Any) -> Iterator[dict[str, Any]]:
    last: dict[str, Any] = {}
    attempt(measured, reader(model, min(args.lengths)))
    for length in sorted(args.lengths):
        row: dict[str, Any] = {"T": length, "B": 1}
        predicted = last.get("ms", 0) / 1000 * (length / last["T"]) ** 1.5 if last else 0
        if predicted > args.limit:
            yield row | {"not_run": f"{predicted:.0f} s predicted"}
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
        return {"not_run": "the time was up"}
    try:
        return make(*given)
    except torch.cuda.OutOfMemoryError:
        return {"not_run": "out of memory"}
    except Exception as error:
        return {"not_run": one_line(error)}


# Decode


def decode(args: argparse.Namespace, model: Any) -> Iterator[dict[str, Any]]:
    if getattr(model.config, "linearize", None):
        yield from decode_student(args, model)
    else:
        yield from decode_teacher(args, model)


def decode_teacher(args: argparse.Namespace, model: Any) -> Iterator[dict[str, Any]]:
    """A static cache that is full but for the steps that are timed."""
    register_unmasked()
    before = model.config._attn_implementation
    model.set_attn_implementation(UNMASKED)
    config = model.config
    per_token = (
        2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize * config.num_hidden_layers
    )
    try:
        for length in args.lengths:
            for batch in args.batches:
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


def decode_student(args: argparse.Namespace, model: Any) -> Iterator[dict[str, Any]]:
    """Steps after ``--context`` tokens: what a step costs does not depend on how many came before, unless the state
    grows, which the row then says."""
    growth = sum(mixer.growth(model.dtype.itemsize) for mixer in model.mixers().values())
    for batch in args.batches:
        row = {"T": args.context, "B": batch, "any_T": not growth}
        row |= attempt(step_of_student, model, batch, args.context)
        if "ms" in row:
            row["tokens_per_second"] = significant(batch / row["ms"] * 1000)
            row["kept_bytes"] += int(batch * growth * args.context) if growth else 0
        yield row
        measure.clear()
        if batch == min(args.batches):
            row = {"T": args.context, "B": batch, "any_T": not growth, "how": "generate, static"}
            yield row | attempt(generate, model, batch, args.context)
            measure.clear()


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
    if not getattr(model.config, "linearize", None):
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
    stages = ("transfer", "finetune") if getattr(model.config, "linearize", None) else ("forward alone",)
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


# What is shown


def crossover(teacher: Mapping[int, float], student: Mapping[int, float]) -> str:
    """The length from which on the student takes less time, between the measured ones by a line in logarithms."""
    lengths = sorted(teacher.keys() & student.keys())
    if not lengths:
        return ""
    gap = {length: math.log(student[length] / teacher[length]) for length in lengths}
    if gap[lengths[0]] <= 0:
        always = all(g <= 0 for g in gap.values())
        return f"below {in_k(lengths[0])}" + ("" if always else ", not throughout")
    for left, right in itertools.pairwise(lengths):
        if gap[right] <= 0:
            share = gap[left] / (gap[left] - gap[right])
            return f"{math.exp(math.log(left) + share * math.log(right / left)):,.0f}"
    return f"above {in_k(lengths[-1])}"


def table(rows: list[dict[str, Any]]) -> str:
    parts = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        mine = [row for row in rows if row["shape"] == shape]
        for make in (_prefill_table, _decode_table, _train_table):
            if text := make(mine):
                head = f"{shape}, {mine[0]['layers']} layers, {mine[0]['device']}: "
                parts.append(head + text)
    return "\n\n".join(parts)


def _prefill_table(rows: list[dict[str, Any]]) -> str:
    rows = [row for row in rows if row["part"] == "prefill"]
    lengths = sorted({row["T"] for row in rows})
    times = _times(rows)
    cells = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = {row["T"]: row for row in rows if row["model"] == model}
        shown = []
        for length in lengths:
            row = own.get(length, {"not_run": ""})
            ratio = times.get("teacher", {}).get(length, 0) / row["ms"] if "ms" in row else 0
            beside = f" (x{ratio:.2g})" if ratio and model != "teacher" else ""
            shown.append(row.get("not_run") or f"{short(row['ms'])}{beside}")
        last = own[max(own)]
        cells.append(
            (
                model,
                *shown,
                "" if model == "teacher" else crossover(times.get("teacher", {}), times.get(model, {})),
                last.get("peak_mib", ""),
                short(last["kept_bytes"] / MIB) if last.get("kept_bytes") else "",
            )
        )
    head = ("model", *(f"T={in_k(n)}" for n in lengths), "faster from T =", "peak MiB", "kept MiB")
    return "prefill of one row, ms\n\n" + markdown(head, cells) if cells else ""


def _times(rows: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Model -> length -> milliseconds."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if "ms" in row:
            found.setdefault(row["model"], {})[row["T"]] = row["ms"]
    return found


def _decode_table(rows: list[dict[str, Any]]) -> str:
    rows = [row for row in rows if row["part"] == "decode"]
    batches = sorted({row["B"] for row in rows})
    steps = [row for row in rows if row.get("how") != "generate, static"]
    lengths = sorted({row["T"] for row in steps if row["model"] == "teacher"})
    cells = []
    for length in lengths:
        own = {row["B"]: row for row in steps if row["model"] == "teacher" and row["T"] == length}
        cells.append((f"teacher, T={in_k(length)}", *(_step_cell(own.get(b)) for b in batches)))
    for model in dict.fromkeys(row["model"] for row in rows if row["model"] != "teacher"):
        own = {row["B"]: row for row in steps if row["model"] == model}
        cells.append((f"{model}, any T", *(_step_cell(own.get(b)) for b in batches)))
        met = []
        for batch in batches:
            teacher = {
                r["T"]: r["ms"] for r in steps if r["model"] == "teacher" and r["B"] == batch and "ms" in r
            }
            ours = own.get(batch, {}).get("ms")
            met.append(crossover(teacher, dict.fromkeys(teacher, ours)) if ours and teacher else "")
        if lengths:
            cells.append((f"{model} is faster from T =", *met))
        for row in rows:
            if row["model"] == model and row.get("how") == "generate, static":
                cells.append(
                    (f"{model}, generate", *(_step_cell(row if row["B"] == b else None) for b in batches))
                )
    head = ("model", *(f"B={b}: ms, tokens/s, kept MiB" for b in batches))
    return "decode, a step\n\n" + markdown(head, cells) if cells else ""


def _step_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "ms" not in row:
        return row["not_run"]
    kept = f", {short(row['kept_bytes'] / MIB)}" if row.get("kept_bytes") else ""
    eager = " eager" if row.get("how") == "eager" else ""
    return f"{short(row['ms'])}{eager}, {short(row['tokens_per_second'])}{kept}"


def _train_table(rows: list[dict[str, Any]]) -> str:
    rows = [row for row in rows if row["part"] == "train"]
    cells = []
    for row in rows:
        told = (row.get("not_run", ""), "", "")
        if "ms" in row:
            share = f"{100 * row['of_forward']:.0f} %" if "of_forward" in row else ""
            told = (short(row["tokens_per_second"]), share, row.get("peak_mib", ""))
        cells.append((row["model"], row["stage"], f"{row['B']} x {in_k(row['T'])}", *told))
    head = ("model", "stage", "batch", "tokens/s", "of the teacher's forward", "peak MiB")
    return "training\n\n" + markdown(head, cells) if cells else ""


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Prefill over length, and decode steps over length at every batch size; a row of panels a shape."""
    if (plt := measure.pyplot()) is None:
        return
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, panels = plt.subplots(len(shapes), 2, figsize=(13, 5 * len(shapes)), squeeze=False)
    for (left, right), shape in zip(panels, shapes, strict=True):
        mine = [row for row in rows if row["shape"] == shape and "ms" in row]
        read = [row for row in mine if row["part"] == "prefill"]
        for model, times in _times(read).items():
            left.plot(
                list(times),
                [times[t] for t in times],
                "--" if model == "teacher" else "-",
                marker="o",
                label=model,
            )
        left.set(title=f"{shape}: prefill of one row", xlabel="T", ylabel="ms")
        steps = [row for row in mine if row["part"] == "decode" and row.get("how") != "generate, static"]
        lengths = sorted({row["T"] for row in steps if row["model"] == "teacher"})
        for model, batch in dict.fromkeys((row["model"], row["B"]) for row in steps):
            own = {row["T"]: row["ms"] for row in steps if (row["model"], row["B"]) == (model, batch)}
            if model != "teacher" and lengths:  # the same at every length
                own = dict.fromkeys(lengths, next(iter(own.values())))
            style = "--" if model == "teacher" else "-"
            right.plot(
                list(own), list(own.values()), style, marker="o", markersize=3, label=f"{model}, B={batch}"
            )
        right.set(title=f"{shape}: a decode step", xlabel="T", ylabel="ms")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.grid(alpha=0.3)
            if axes.has_data():
                axes.legend(fontsize=6)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    print(path)


if __name__ == "__main__":
    raise SystemExit(main())
