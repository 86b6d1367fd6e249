"""Whole models with random weights, teacher beside students: prefill, decode, memory and training on one GPU.

    python evals/speed/models.py --output models.jsonl              every shape and part
    python evals/speed/models.py --shapes 8b --parts prefill        in several calls
    python evals/speed/models.py --warm 60 --budget 150             compiled by a process a student and part, first
    python evals/speed/models.py --tiny                             the same road without a GPU, tiny shapes
    python evals/speed/models.py --table models-*.jsonl --plot models.svg models-8b.jsonl

One JSON line a point, written as it is measured; a point that does not fit, would take too long or comes after the
budget is a line that says so. What tells most comes first: prefill of every model, decode of 1 and 32 rows, other
batches and ``generate``, training. Weights are random: nothing here depends on what they are. The teacher is given the
best that torch has: SDPA with cuDNN before flash and grouped heads, and for decode a CUDA graph over a static cache
without a mask. Students are converted in place from it.

prefill  milliseconds of one row of T tokens, cache and last logits included; peak memory; bytes kept for decoding
decode   milliseconds of a step at T tokens of context; of students at --context tokens, since theirs is the same at any
train    tokens a second of a step of each stage, and what that is of the teacher's forward alone over the same tokens
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import measure  # noqa: E402
import torch  # noqa: E402
from models_points import ROUNDS, ends  # noqa: E402
from models_shown import plot, table  # noqa: E402

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
    if args.warm:
        warm(args)
        print(f"{time.monotonic() - start:5.0f} s  kernels are compiled", file=sys.stderr, flush=True)
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
        "--warm", type=float, default=0.0, help="seconds at most to compile first, all students at once"
    )
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
    """Every row, a round of points after the other; a model is built once and converted in place, once a round."""
    from linearize import convert, unconvert
    from linearize.methods import build_method

    for shape in args.shapes:
        measure.clear()
        model = build(shape, args.layers)
        of = {"shape": shape, "layers": model.config.num_hidden_layers}
        of["parameters"] = sum(p.numel() for p in model.parameters())
        for part, points in ROUNDS:
            if part not in args.parts:
                continue
            if not args.no_teacher:
                for row in points(args, model):
                    yield {"part": part, **of, "model": "teacher", **row}
            for name in args.students:
                measure.clear()
                student = convert(model, build_method({"name": name}))
                for row in points(args, student):
                    yield {"part": part, **of, "model": name, **row}
                model = unconvert(student)
        del model


def warm(args: argparse.Namespace) -> None:
    """Triton's cache filled: a process for every shape, student and part takes the same points with one layer. What it
    finds or breaks on is not looked at; the measuring process meets it again."""
    started = []
    for shape in args.shapes:
        for student in args.students:
            for part in args.parts:
                words = [sys.executable, str(HERE / "models.py"), "--no-teacher", "--layers", "1"]
                words += ["--shapes", shape, "--students", student, "--parts", part]
                words += ["--lengths", ",".join(str(n) for n in args.lengths if n <= 32768)]
                words += ["--batches", ",".join(map(str, args.batches)), "--context", str(args.context)]
                words += ["--train-lengths", ",".join(map(str, args.train_lengths))]
                words += ["--train-tokens", str(args.train_tokens), "--budget", str(args.warm)]
                words += ["--tiny"] * args.tiny
                none = subprocess.DEVNULL
                started.append(subprocess.Popen(words, stdout=none, stderr=none))
    end = time.monotonic() + args.warm
    for process in started:
        try:
            process.wait(timeout=max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


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


if __name__ == "__main__":
    raise SystemExit(main())
