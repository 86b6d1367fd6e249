"""Plans: the memory goes where the loss is, budgets hold to the byte, and a run plans for itself."""

import dataclasses
import functools
import itertools
import json
import math
import random
from dataclasses import replace

import pytest
import torch
import yaml
from tiny import tiny
from transformers import AutoTokenizer

from linearize.convert import convert, describe
from linearize.evaluate import Results
from linearize.knapsack import Option, solve
from linearize.methods import build_method
from linearize.modeling.errors import EvaluationError, RecipeError
from linearize.plan import budget_of, check, choose, resolved
from linearize.plan import plan as plan_of
from linearize.planned import curve_rows, fragment_of, layers_map, words
from linearize.recipe import Recipe
from linearize.run import run
from linearize.scan.candidates import Candidate, candidates, fields_of, layer_bytes, name_of
from linearize.scan.measure import Row, ScanResult, scanned_layers
from linearize.teacher import BUNDLED, load_teacher

PLAN = "plan={kv_share: 20%, at: 4096}"


def recipe_of(*words):
    return Recipe.resolve("tiny", "salient", ["method.chunk=32", "scan.budgets=[8, 64, 512]", *words])


@functools.cache
def teacher_of():
    return tiny(max_position_embeddings=4096)


def scan_of(recipe, carrier=1, answered=20):
    """What a scan would find where layer ``carrier`` carries recall and layer 0 costs KL."""
    rows = []
    names = {c.name: {"name": c.method.name} for c in candidates(recipe)}
    for layer in range(3):
        for name in names:
            size = {"softmax": 10**6, "window 64": 1}.get(name) or int(name.split("+")[1])
            kl = 0.0 if name == "softmax" else (0.3 if layer == 0 else 0.05) / size
            lost = 0 if layer != carrier or size >= 512 else (4 if size == 64 else answered) * (answered > 0)
            cells = {"passkey 99": [20, answered, 0]}
            rows.append(Row(layer, None, name, kl, kl, kl, kl, kl, answered, lost, lost / 10, cells))
    return ScanResult("tiny", [0, 1, 2], names, rows, 1, 1, {"passkey 99": [20, answered]}, {}, {}, [], {})  # fmt: skip


def chosen(recipe, carrier=1):
    budget, costs = check(teacher_of(), recipe)
    return budget, choose(scan_of(recipe, carrier), costs, budget, recipe.plan)


@pytest.mark.parametrize("carrier", [1, 2])
def test_the_largest_budget_goes_to_the_layer_that_carries_recall(carrier):
    budget, made = chosen(recipe_of(PLAN), carrier)
    layers = made.best[0].layers
    assert layers[carrier] == "salient 32+512"
    assert made.best[0].cost <= budget.amount
    assert all(a.expected.loss <= b.expected.loss for a, b in zip(made.best, made.best[1:], strict=False))
    assert {r.lost for r in [made.best[0].expected]} == {0}


def test_a_budget_is_counted_in_bytes_to_the_last():
    recipe = recipe_of("plan={kv_share: 10%, at: 4k}")
    budget = budget_of(teacher_of(), recipe)
    assert budget.amount == 4096 * 3 * 2 * 32 * 4 // 10
    mib = budget_of(teacher_of(), recipe_of("plan={state_mb: 3, at: 4k, batch: 2}"))
    assert mib.amount == 3 * 2**20 // 2
    gemma = tiny("gemma2")  # its first layer has a window of its own, whose keys are not the plan's
    share = budget_of(gemma, recipe_of("plan={kv_share: 50%, at: 512}"))
    assert share.fixed > 0
    assert share.amount == share.teacher // 2 - share.fixed


def test_a_recall_that_is_asked_for_is_kept_or_refused():
    easy = recipe_of("plan={kv_share: 20%, at: 4096, recall_weight: 0, min_recall: 0.95}")
    assert chosen(easy)[1].best[0].expected.lost == 0
    tight = recipe_of("plan={kv_share: 4%, at: 4096, recall_weight: 0}")
    assert chosen(tight)[1].best[0].expected.lost > 1
    with pytest.raises(RecipeError, match=r"plan\.min_recall: 0\.95 allows 1 of 20 .* expected to lose 4"):
        chosen(recipe_of("plan={kv_share: 4%, at: 4096, min_recall: 95%}"))
    recipe = recipe_of("plan={kv_share: 20%, at: 4096, min_recall: 0.9}")
    budget, costs = check(teacher_of(), recipe)
    with pytest.raises(
        EvaluationError, match=r"the teacher fails the recall tasks itself \(0 of 20 at passkey 99\)"
    ):
        choose(scan_of(recipe, answered=0), costs, budget, recipe.plan)


def test_budgets_that_cannot_be_met_are_refused_with_what_is_needed(tmp_path):
    with pytest.raises(
        RecipeError, match=r"1 % of the KV cache at 4,096 tokens is .*, and the smallest plan needs"
    ):
        check(teacher_of(), recipe_of("plan={kv_share: 1%, at: 4096}"))
    with pytest.raises(
        RecipeError, match="give exactly one of kv_share, state_mb, softmax_layers, decode_us"
    ):
        recipe_of("plan={at: 4096}")
    with pytest.raises(RecipeError, match="kv_share and state_mb given"):
        recipe_of("plan={kv_share: 0.1, state_mb: 3}")
    with pytest.raises(RecipeError, match=r"plan\.kv_shar: unknown key; did you mean 'kv_share'\?"):
        recipe_of("plan={kv_shar: 6%}")
    with pytest.raises(RecipeError, match="leave out layers"):
        recipe_of(PLAN, "layers=[0]")
    with pytest.raises(RecipeError, match="longer than the teacher's context of 512"):
        check(tiny(), recipe_of(PLAN))
    with pytest.raises(RecipeError, match=r"plan\.times: .* cannot be read"):
        check(teacher_of(), recipe_of(f"plan={{decode_us: 9, times: {tmp_path / 'none.json'}}}"))
    assert recipe_of("plan=auto").plan.kv_share == 0.1


def test_layers_and_microseconds_are_budgets_too(tmp_path):
    words = ["plan={softmax_layers: 1}", "method.budget=64"]
    layers = chosen(recipe_of(*words), carrier=2)[1].best[0].layers
    assert layers == {0: "salient 32+64", 1: "salient 32+64", 2: "softmax"}
    table = tmp_path / "times.json"
    table.write_text(
        json.dumps({"layer_us": {"salient 32+8": 1.0, "salient 32+64": 2.5, "salient 32+512": 7}})
    )
    recipe = recipe_of(f"plan={{decode_us: 10.5, times: {table}}}")
    budget, made = chosen(recipe)
    assert (budget.amount, made.best[0].cost) == (10_500, 10_500)
    assert made.best[0].layers == {0: "salient 32+64", 1: "salient 32+512", 2: "salient 32+8"}


def test_the_fragment_reads_back_as_the_plan():
    recipe = recipe_of(PLAN, "method.score_dim=12")
    tried = {c.name: c for c in candidates(recipe)}
    picks = {0: "salient 32+8", 1: "salient 32+8", 2: "window 64", 3: "softmax"}
    layers = layers_map(recipe, {i: tried[name] for i, name in picks.items()})
    assert layers == {"0-1": {"budget": 8}, "2": {"name": "window", "sinks": 1}, "3": "softmax"}
    text = fragment_of(recipe, layers, ["Some words, 6 %: 'quoted'."])
    read = Recipe.from_dict(yaml.safe_load(text))
    assert read.layers == recipe.override(["plan=null", f"layers={json.dumps(layers)}"]).layers
    assert read.method == recipe.method
    assert text.startswith("# Some words")


def test_the_curve_tells_what_changes():
    budget, made = chosen(recipe_of(PLAN))
    told = words(made.best[0], [], made, budget, recipe_of(PLAN).plan)
    assert told[0].startswith("Budget: 20 % of the KV cache at 4,096 tokens")
    assert any("1 MiB more" in sentence for sentence in told)
    costs = [point.cost for point in made.curve]
    assert costs == sorted(costs)
    result = replace(_result(budget, made), curve=made.curve)
    assert any("layer 1 salient" in row[-1] for row in curve_rows(result))


def _result(budget, made):
    from linearize.planned import PlanResult

    return PlanResult(budget, made.best[0], [], made.curve, [], {}, "", {})


def test_a_run_plans_for_itself_and_says_what_it_did(tmp_path):
    folder, tokenizer = tmp_path / "teacher", AutoTokenizer.from_pretrained(BUNDLED["books-5m"])
    special = dict(
        pad_token_id=None, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    tiny("llama", vocab_size=len(tokenizer), **special).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    recipe = Recipe.resolve(
        folder,
        "salient",
        [
            "method.chunk=16", "plan={kv_share: 11%, at: 512, verify: 2}", "scan.budgets=[2, 8, 32]",
            "scan.windows=[]", "scan.heads=[1]", "scan.seq_len=96", "scan.sequences=2", "scan.selectors=false",
            "scan.recall_tasks=[passkey]", "scan.recall_lens=[120]", "scan.recall_samples=2", "data.seq_len=96",
            "data.sources=[{kind: self, tokens: 4500}]", "transfer.tokens=384", "transfer.batch_size=2",
            "finetune.tokens=384", "finetune.batch_size=2", "control.enabled=true", "evaluate.seq_lens=[64]",
            "evaluate.sequences=2", "evaluate.recall_lens=[]", "evaluate.generate_tokens=0",
            "evaluate.gates=false", "evaluate.length_gate=true", "device=cpu", f"output={tmp_path / 'run'}",
        ],
    )  # fmt: skip
    made = run(recipe)
    record = json.loads((made.folder / "results.json").read_text())
    layers = record["plan"]["layers"]
    assert resolved(recipe, type("Made", (), {"layers": layers})).layers != "all"
    assert record["plan"]["budget"]["amount"] >= record["plan"]["chosen"]["cost"]
    assert record["plan"]["chosen"]["measured"]["kl"] > 0
    tried = {"salient 16+2", "salient 16+8", "salient 16+32", "softmax"}
    assert {row["candidate"] for row in record["scan"]["rows"]} == tried
    memory = made.results.memory["student"]
    assert memory.per_token == 0
    assert memory.bytes_at(512) == record["plan"]["chosen"]["cost"]
    spec = json.loads((made.checkpoint / "config.json").read_text())["linearize"]["layers"]
    assert {(row["layer"], row["head"]) for row in record["scan"]["rows"]} >= {(1, 0), (1, 1), (2, None)}
    assert {index: name_of(build_method(layer["method"])) for index, layer in spec.items()} == (
        record["plan"]["chosen"]["layers"]
    )
    gate = made.results.length_gate
    assert [(row.length, row.factor) for row in gate] == [(96, 1), (192, 2), (384, 4), (768, 8)]
    assert gate[-1].note == "beyond the teacher's context of 512"
    assert gate[0].status in ("passed", "failed")
    assert (made.folder / "table.md").read_text().startswith("## Plan, by measurement")
    assert run(recipe).results.to_dict() == made.results.to_dict()
    assert Results.from_dict(record["results"]).length_gate == gate
    again = recipe.override(
        [f"plan.scan={made.folder / 'scan'}", "transfer.tokens=0", "finetune.tokens=0", "control.enabled=false",
         "evaluate.length_gate=false", f"output={tmp_path / 'again'}"]
    )  # fmt: skip
    other = json.loads((run(again).folder / "results.json").read_text())
    assert other["plan"]["layers"] == layers and not (tmp_path / "again" / "scan" / "scan.jsonl").exists()
    for changed, told in (
        (["scan.budgets=[3]"], "plan.scan: it has nothing that layer 0 may get"),
        (["method.score_dim=7"], "plan.scan: salient 16.2 was scanned with other fields of the method"),
        (["seed=1", f"teacher.name={tmp_path / 'other'}"], "is a scan of another teacher"),
    ):
        tiny("llama", seed=5, vocab_size=len(tokenizer), **special).save_pretrained(tmp_path / "other")
        tokenizer.save_pretrained(tmp_path / "other")
        with pytest.raises(RecipeError, match=told):
            run(again.override([*changed, f"output={tmp_path / 'refused'}"]))
        assert not (tmp_path / "refused").exists()
    gone = again.override([f"plan.scan={tmp_path / 'gone'}"])
    teacher = load_teacher(recipe.teacher)[0]
    with pytest.raises(RecipeError, match=r"gone.scan\.json: cannot be read"):
        check(teacher, gone)
    assert check(teacher, gone, own=tmp_path / "again" / "scan") == check(teacher, again)


def test_a_loss_that_is_no_number_is_never_chosen():
    row = Row(**{f.name: 0 for f in dataclasses.fields(Row)} | {"kl": math.nan})
    assert row.loss(0.1) == math.inf and replace(row, kl=-1e-9).loss(0.0) == 0.0


def test_a_plan_is_made_again_when_the_scan_has_more_to_offer(tmp_path):
    """The second call measures heads, and its figures are not those that the kept plan was made from."""
    model, tokenizer = teacher_of(), AutoTokenizer.from_pretrained(BUNDLED["books-5m"])
    recipe = recipe_of(PLAN, "plan.kv_share=8%")
    made, tried = {}, {c.name: json.loads(json.dumps(fields_of(c.method))) for c in candidates(recipe)}
    for name, carrier in (("first", 1), ("second", 2)):
        rows = replace(scan_of(recipe, carrier), candidates=tried)
        (tmp_path / "scan").mkdir(exist_ok=True)
        (tmp_path / "scan" / "scan.json").write_text(json.dumps(rows.to_dict()))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "linearize.plan.model_digest", lambda model, rows=rows: rows.settings.get("teacher")
            )
            patch.setattr("linearize.plan.settings_of", lambda *_: {})
            patch.setattr("linearize.plan.bench_of", lambda *_: None)
            words = ["plan.verify=0", f"plan.scan={tmp_path / 'scan'}"]
            made[name] = plan_of(model, tokenizer, None, recipe.override(words), folder=tmp_path / "plan")[0]
    assert made["first"].layers != made["second"].layers


def test_what_the_budget_leaves_is_never_enough_for_a_better_choice():
    """The chosen plan is the knapsack's own best over the rows."""
    recipe = recipe_of("plan={kv_share: 15%, at: 4096}")
    budget, costs = check(teacher_of(), recipe)
    scanned = scan_of(recipe)
    places = [
        [Option(costs[i][n], scanned.row(i, n).loss(0.1), scanned.row(i, n).lost) for n in costs[i]]
        for i in costs
    ]
    best = solve(places, budget.amount)[0]
    made = choose(scanned, costs, budget, recipe.plan).best[0]
    assert (made.cost, made.expected.loss) == (best.cost, best.loss)


def with_heads(scanned, heads=2, carrier=(1, 1)):
    """Rows of kv heads that add up to their layers', one of them with all that its layer loses of recall."""
    rows = list(scanned.rows)
    for row in scanned.rows:
        if row.candidate != "softmax":
            mine = [replace(row, head=h, kl=row.kl / heads, lost=0, answer_loss=0.0) for h in range(heads)]
            if row.layer == carrier[0]:
                mine[carrier[1]] = replace(mine[carrier[1]], lost=row.lost, answer_loss=row.answer_loss)
            rows += mine
    return replace(scanned, rows=rows, candidates=fields(recipe_of()))


def fields(recipe):
    return {c.name: fields_of(c.method) for c in candidates(recipe)}


@pytest.mark.parametrize("asked", ["kv_share: 11%", "kv_share: 11%, min_recall: 0.9", "state_mb: 0.25"])
@pytest.mark.parametrize("chunks", ["[32]", "[16, 32]"])
def test_budgets_by_head_are_the_best_of_all_combinations(asked, chunks):
    """Against brute force over every chunk and every budget of every head; costs are those of a layer as it is."""
    recipe = recipe_of(f"plan={{{asked}, at: 4096, verify: 2}}", f"scan.chunks={chunks}", "scan.windows=[]")
    teacher, spec = teacher_of(), recipe.plan
    budget, costs = check(teacher, recipe)
    rng, rows = random.Random(0), []
    for row in with_heads(scan_of(recipe)).rows:
        if row.head is not None:
            row = replace(row, kl=rng.random() / 9, lost=rng.choice([0, 0, 1]), answer_loss=rng.random())
        rows.append(row)
    scanned = replace(scan_of(recipe), rows=rows, candidates=fields(recipe))
    by_key = {(row.layer, row.head, row.candidate): row for row in rows}
    layers = scanned_layers(teacher, recipe)
    sizes = {(i, name_of(m)): layer_bytes(m, layers[i], torch.float32, 4096)
             for i in layers for c in candidates(recipe) if c.name != "softmax"
             for b in itertools.product([8, 64, 512], repeat=2)
             for m in [replace(c.method, budget=b if b[0] != b[1] else b[0])]}  # fmt: skip
    places = []
    for i in layers:
        options = {}
        for name in (n for at, n in sizes if at == i):
            chunk, budgets = name.removeprefix("salient ").split("+")
            each = budgets.split("/")
            mine = [by_key[i, h, f"salient {chunk}+{n}"] for h, n in enumerate(each)]
            mine = [by_key[i, None, name]] if len(each) == 1 else mine
            loss = sum(row.loss(spec.recall_weight) for row in mine)
            options[name] = Option(sizes[i, name], loss, min(20, sum(row.lost for row in mine)))
        places.append(options)
    most = 2 if spec.min_recall else None
    allowed = []
    for names in itertools.product(*places):
        mine = [options[name] for options, name in zip(places, names, strict=True)]
        if sum(o.cost for o in mine) <= budget.amount and (
            most is None or sum(o.count for o in mine) <= most
        ):
            allowed.append((sum(o.loss for o in mine), names))
    made = choose(scanned, costs, budget, spec)
    assert [p.expected.loss for p in made.best] == pytest.approx([loss for loss, _ in sorted(allowed)[:2]])
    for plan in made.best:
        assert plan.cost == sum(sizes[i, name] for i, name in plan.layers.items()) <= budget.amount
    assert made.by_head and not any("/" in name for name in made.plain.layers.values())
    assert made.plain in made.rivals(2) and made.rivals(0) == []


def test_the_memory_goes_to_the_head_that_carries_recall():
    recipe = recipe_of("plan={kv_share: 4.5%, at: 4096}")
    budget, costs = check(teacher_of(), recipe)
    made = choose(with_heads(scan_of(recipe)), costs, budget, recipe.plan)
    best = made.best[0].layers
    assert best[1] in ("salient 32+8/512", "salient 32+64/512")
    tried = {c.name: c for c in candidates(recipe)} | {n: Candidate(n, m) for n, m in made.by_head.items()}
    layers = layers_map(recipe, {i: tried[name] for i, name in best.items()})
    read = Recipe.from_dict(yaml.safe_load(fragment_of(recipe, layers, [])))
    assert read.layers["1"].budget == tried[best[1]].method.budget
    assert read.layers == recipe.override(["plan=null", f"layers={json.dumps(layers)}"]).layers
    student = convert(teacher_of(), read.method, read.layers)
    assert sum(layer.state_bytes for layer in describe(student)) == made.best[0].cost
