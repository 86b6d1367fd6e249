"""Students planned under a share of the KV cache, beside their targets; one command, which goes on where it stopped.

    python evals/quality/plan.py --teacher DIR --data DIR --out evals/quality/plans.jsonl > evals/quality/plans.md

The folders are those of run.py. The students of plans.yaml are made one after the other, each line appended when it is
measured; the same command later makes what is missing. `--part targets|ranking|shapes` does a part. `shapes` times a
scan of a random model with the shapes of Llama-3.2-1B (`--shapes-layers` of its 16 layers).
"""

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import run as quality
import torch

from linearize.evaluate import Results
from linearize.evaluate.likelihood import TEACHER
from linearize.evaluate.statistics import mcnemar
from linearize.methods import spread
from linearize.overrides import merged, read_yaml
from linearize.recipe import Recipe
from linearize.run import device_of
from linearize.scan import ScanResult, scan
from linearize.scan.candidates import name_of
from linearize.scan.material import small_corpus
from linearize.scan.selectors import pearson, ranks
from linearize.teacher import load_teacher

HERE = Path(__file__).parent
TARGETS = {"share-6.3": [0.025, 0.035, 0.055], "share-10": [0.011, 0.018, 0.036]}
"""KL at 1,024, 2,048 and 4,096 tokens."""
LENGTHS = ["1024", "2048", "4096"]
KEPT = ("budget", "chosen", "verified", "words", "fragment", "layers")
"""Of a plan; its curve is on the run's own page."""
RANKING = [
    "transfer.tokens=1_300_000", "finetune.tokens=700_000", "evaluate.recall_samples=50", "method.score_dim=96",
    "finetune.lora={rank: 8, alpha: 16, targets: attention}",
]  # fmt: skip
LLAMA_1B = dict(
    vocab_size=128_256,
    hidden_size=2048,
    intermediate_size=8192,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=131_072,
    tie_word_embeddings=True,
)
RANKED = "ranking-scan"
WEIGHT = 0.1
"""Nats of KL that a nat lost per answer token counts as, as in plan.recall_weight."""


def main(words: list[str] | None = None) -> None:
    options = arguments(words)
    tree = read_yaml(options.students)
    names = {"targets": list(tree["students"]), "ranking": list(tree["ranking"])}
    parts = options.part or ["targets", "ranking", "shapes"]
    asked = [
        name
        for part in parts
        if part in names
        for name in names[part]
        if not options.student or name in options.student
    ]
    for name in asked:
        recipe_of(name, options, tree)  # a word that is wrong is told before anything runs
    done = {line["student"]: line for line in read(options.out)}
    for name in asked:
        if name not in done:
            done[name] = measure(name, options, tree)
            remember(done[name], done, options.out)
    if RANKED not in done and any(name in tree["ranking"] for name in asked):
        done[RANKED] = {"student": RANKED, "rows": ranking_scan(options, tree)}
        append(options.out, done[RANKED])
    if "shapes" in parts and "shapes" not in done:
        done["shapes"] = shapes(options)
        append(options.out, done["shapes"])
    if options.plot:
        draw(done, names, options.plot)
    print(markdown(done, names))


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, required=True, help="folder of the teacher")
    parser.add_argument(
        "--data", type=Path, required=True, help=f"folder with {quality.TRAIN} and {quality.EVAL}"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended")
    parser.add_argument("--part", action="append", choices=["targets", "ranking", "shapes"])
    parser.add_argument("--student", action="append", help="may be repeated; default: every one of the parts")
    parser.add_argument("--students", type=Path, default=HERE / "plans.yaml")
    parser.add_argument("--work", type=Path, default=Path("runs/plans"), help="where the runs are kept")
    parser.add_argument("--commit", help="commit of the code, where there is no git")
    parser.add_argument("--plot", type=Path, help="an image of the targets and of what scans expect")
    parser.add_argument("--tf32", action="store_true", help="let matrix products of fp32 use TF32")
    parser.add_argument("--shapes-layers", type=int, default=16)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    return parser.parse_intermixed_args(words)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def append(file: Path, line: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.write(json.dumps(line) + "\n")


def remember(line: dict[str, Any], done: dict[str, dict[str, Any]], out: Path) -> None:
    """Append a student's line, and before it that of its scan, which is told once for all who share it."""
    if (scan := line["scan"]) is not None:
        told = json.dumps([scan["settings"], sorted(scan["candidates"])], sort_keys=True)
        line["scan"] = f"scan {hashlib.sha256(told.encode()).hexdigest()[:8]}"
        if line["scan"] not in done:
            done[line["scan"]] = {"student": line["scan"], "rows": scan}
            append(out, done[line["scan"]])
    append(out, line)


def recipe_of(name: str, options: argparse.Namespace, tree: dict[str, Any]) -> Recipe:
    changes = {**tree["students"], **tree["ranking"]}[name]
    cheap = RANKING if name in tree["ranking"] else []
    recipe = Recipe.from_dict(merged(tree["protocol"], changes), place=f"{options.students}: {name}")
    return recipe.override([*cheap, *options.overrides])


def measure(name: str, options: argparse.Namespace, tree: dict[str, Any]) -> dict[str, Any]:
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    folder = options.work / name
    plain = recipe_of(name, options, tree)  # without the folders of one machine
    planned = plain.plan
    before = () if planned is None or planned.scan else scan_before(name, options, tree)
    recipe = plain.override([*quality.folders(name, options), *before])
    done = quality.run(recipe, progress=quality.Reporter(name))
    quality.check_windows(done.results, recipe, options.data / quality.EVAL)
    record = json.loads((folder / "results.json").read_text())
    return {
        "student": name,
        "recipe": plain.to_yaml(),
        "tokens": recipe.transfer.tokens + recipe.finetune.tokens,
        "layers": None if not isinstance(plain.layers, dict) else chosen(plain),
        "plan": None if planned is None else {key: record["plan"][key] for key in KEPT},
        "scan": None if planned is None else record["scan"],
        "seconds": done.timings,
        "commit": options.commit or quality.commit(),
        "origin": record["origin"],
        "tf32": options.tf32,
        "results": done.results.to_dict(),
    }


def scan_before(name: str, options: argparse.Namespace, tree: dict[str, Any]) -> tuple[str, ...]:
    """The word that plans from the scan of a student earlier in the file, where one is there: all ask the same of it.

    Only earlier ones, so that a run that goes on has the word that it began with.
    """
    names = list(tree["students"])
    folders = [options.work / other / "scan" for other in names[: names.index(name)]]
    return tuple(f"plan.scan={folder}" for folder in folders if (folder / "scan.json").exists())[:1]


def chosen(recipe: Recipe) -> dict[str, str]:
    """Layer -> candidate's name, of a recipe with a map of layers."""
    return {str(i): name_of(method) for i, method in spread(recipe.layers, range(10)).items()}


def shapes(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a scan with the defaults at Llama-3.2-1B's shapes; its weights are random, and so are its figures."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = [
        "teacher.name=" + str(options.teacher), "scan.seq_len=2048",
        f"data.sources=[{{kind: text, path: {options.data / quality.TRAIN}}}]", *options.overrides,
    ]  # fmt: skip
    recipe = Recipe.resolve(str(options.teacher), "salient", words)
    device = device_of(recipe)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        made = LlamaForCausalLM(LlamaConfig(num_hidden_layers=options.shapes_layers, **LLAMA_1B))
    result, seconds = scanned("shapes", recipe, options, made.to(dtype))
    rows = len([row for row in result.rows if row.candidate != "softmax"])
    return {"student": "shapes", "seconds": round(seconds, 1), "rows": rows, "layers": options.shapes_layers,
            "origin": result.origin, "commit": options.commit or quality.commit()}  # fmt: skip


def ranking_scan(options: argparse.Namespace, tree: dict[str, Any]) -> dict[str, Any]:
    """The scan that tells what is expected of the students written by hand."""
    result, _ = scanned(
        RANKED, ranking_recipe(options, tree).override(quality.folders(RANKED, options)), options
    )
    return result.to_dict()


def ranking_recipe(options: argparse.Namespace, tree: dict[str, Any]) -> Recipe:
    found = merged(tree["protocol"], {"scan": tree["ranking_scan"]})
    return Recipe.from_dict(found, place=f"{options.students}: ranking_scan").override(options.overrides)


def scanned(
    name: str, recipe: Recipe, options: argparse.Namespace, model: Any = None
) -> tuple[ScanResult, float]:
    """A scan on text and prompts of its own, and its seconds; of the recipe's teacher, where no other is given."""
    folder, device = options.work / name, device_of(recipe)
    teacher, tokenizer = load_teacher(recipe.teacher, device)
    model = (teacher if model is None else model).eval().requires_grad_(False)
    corpus = small_corpus(recipe, tokenizer, None, folder / "data", device)
    started = time.perf_counter()
    result = scan(model, tokenizer, corpus, recipe, folder=folder, progress=quality.Reporter(name))
    return result, time.perf_counter() - started


def markdown(done: dict[str, Any], names: dict[str, list[str]]) -> str:
    targets = [done[name] for name in names["targets"] if name in done]
    parts = [
        fidelity(targets),
        recall(targets),
        plans(targets, done),
        ranking(done, names["ranking"]),
        times(done),
    ]
    return "\n\n".join(part for part in parts if part)


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def fidelity(lines: list[dict[str, Any]]) -> str:
    rows = []
    for line in lines:
        by_length = line["results"]["likelihood"]
        goals = dict(zip(LENGTHS, TARGETS.get(line["student"], []), strict=False))
        cells = []
        for n in LENGTHS:
            found = by_length[n]["student"]
            low, high = found["intervals"]["kl"]
            goal = (
                ""
                if n not in goals
                else f", {'met' if found['kl'] <= goals[n] else 'missed'} (<= {goals[n]})"
            )
            cells.append(f"{found['kl']:.4f} [{low:.4f}, {high:.4f}]{goal}")
        rows.append([line["student"], f"{100 * held(line['results']):.2f} %", f"{line['tokens']:,}", *cells])
    head = ["student", "memory at 4,096", "training tokens", *(f"KL {int(n):,}" for n in LENGTHS)]
    return f"## KL to the teacher\n\n{table(head, rows)}" if rows else ""


def held(results: dict[str, Any]) -> float:
    """The student's state as a share of the teacher's KV cache at 4,096 tokens."""
    memory = Results.from_dict(results).memory
    return memory["student"].bytes_at(4096) / memory[TEACHER].bytes_at(4096)


def recall(lines: list[dict[str, Any]]) -> str:
    """Share answered, teacher and student, and the exact McNemar p of the prompts that only one answers."""
    rows = []
    for line in lines:
        results = Results.from_dict(line["results"])
        for cell in results.recall:
            if cell.model != "student":
                continue
            truth = results.cell(TEACHER, cell.task, cell.length)
            won, lost = (
                sum(a > b for a, b in zip(x.hits, y.hits, strict=True))
                for x, y in ((cell, truth), (truth, cell))
            )
            p = mcnemar(won, lost)
            worse = "below the teacher" if lost > won and p < 0.05 else "not below"
            rows.append(
                [line["student"], cell.task, f"{cell.length:,}", f"{100 * truth.share:.0f} %",
                 f"{100 * cell.share:.0f} % [{100 * cell.low:.0f}, {100 * cell.high:.0f}]",
                 f"{won} won, {lost} lost, p = {p:.2g}", worse]
            )  # fmt: skip
    head = ["student", "task", "length", "teacher", "student", "paired", "verdict"]
    return f"## Recall\n\n{table(head, rows)}" if rows else ""


def plans(lines: list[dict[str, Any]], done: dict[str, Any]) -> str:
    told = []
    for line in lines:
        if line["plan"] is not None:
            words = "\n".join(
                f"- {sentence}" for sentence in [*done[line["scan"]]["rows"]["words"], *line["plan"]["words"]]
            )
            told.append(f"### {line['student']}\n\n{words}\n\n```yaml\n{line['plan']['fragment']}```")
    return "## Plans\n\n" + "\n\n".join(told) if told else ""


def ranking(done: dict[str, Any], names: list[str]) -> str:
    """How far the order that a scan expects is that of the trained students."""
    lines = expected_and_trained(done, names)
    if len(lines) < 3:
        return ""
    rows = [
        [name, f"{loss:.4f}", f"{kl:.4f}", *(f"{x:.4f}" for x in trained)]
        for name, loss, kl, trained in lines
    ]
    told = []
    for at, n in enumerate(LENGTHS):
        found = pearson(ranks([kl for _, _, kl, _ in lines]), ranks([trained[at] for *_, trained in lines]))
        told.append(f"{found:+.2f} at {int(n):,}")
    head = ["student", "expected loss", "expected KL", *(f"trained KL {int(n):,}" for n in LENGTHS)]
    return (
        f"## Expected and trained\n\n{table(head, rows)}\n\n"
        f"Spearman's rank correlation of expected and trained KL over {len(lines)} students: {', '.join(told)}."
    )


def expected_and_trained(
    done: dict[str, Any], names: list[str]
) -> list[tuple[str, float, float, list[float]]]:
    """(student, expected loss, expected KL, trained KL by length) of the students written by hand."""
    if RANKED not in done:
        return []
    found, rows = ScanResult.from_dict(done[RANKED]["rows"]), []
    for line in (done[name] for name in names if name in done):
        mine = [found.row(int(i), candidate) for i, candidate in line["layers"].items()]
        trained = [line["results"]["likelihood"][n]["student"]["kl"] for n in LENGTHS]
        loss, kl = sum(row.loss(WEIGHT) for row in mine), sum(row.kl for row in mine)
        rows.append((line["student"], loss, kl, trained))
    return rows


def draw(done: dict[str, Any], names: dict[str, list[str]], path: Path) -> None:
    """KL over memory, with the targets; expected over trained KL."""
    from matplotlib.figure import Figure

    figure = Figure((10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    targets = sorted(
        (done[name] for name in names["targets"] if name in done), key=lambda line: held(line["results"])
    )
    memory = [100 * held(line["results"]) for line in targets]
    for at, n in enumerate(LENGTHS):
        found = [line["results"]["likelihood"][n]["student"] for line in targets]
        low, high = zip(*(one["intervals"]["kl"] for one in found), strict=True)
        color = f"C{at}"
        left.plot(memory, [one["kl"] for one in found], "o-", color=color, label=f"{int(n):,} tokens")
        left.vlines(memory, low, high, color=color)
        goals = [(x, TARGETS[line["student"]][at]) for x, line in zip(memory, targets, strict=True)
                 if line["student"] in TARGETS]  # fmt: skip
        left.plot(*zip(*goals, strict=True), "_", color=color, markersize=14)
    left.set(
        xlabel="memory, % of the KV cache at 4,096 tokens", ylabel="KL to the teacher, nats", yscale="log"
    )
    left.set_title("Planned students; dashes: targets; bars: 95 %")
    left.legend()
    rows = expected_and_trained(done, names["ranking"])
    for at, n in enumerate(LENGTHS):
        right.plot([kl for _, _, kl, _ in rows], [t[at] for *_, t in rows], "o", label=f"{int(n):,} tokens")
    right.set(xlabel="expected of the untrained layers alone, nats", ylabel="KL after training, nats")
    right.set_title("Students with layers written by hand")
    right.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def times(done: dict[str, Any]) -> str:
    told = []
    for line in done.values():
        if line["student"] == "shapes":
            told.append(
                f"- shapes of Llama-3.2-1B, {line['layers']} layers: {line['seconds']} s for {line['rows']} rows"
            )
        elif line.get("plan"):
            told.append(
                f"- {line['student']}: scan, plan and verification {line['seconds'].get('plan', 0):.0f} s"
            )
    return "## Time\n\n" + "\n".join(told) if told else ""


if __name__ == "__main__":
    main()
