"""Tasks of lm-eval: same prompts for all, scores by hand, what guessing gives, what was not run."""

import importlib
import importlib.util
import json
import random
import sys

import pytest
import torch
import yaml
from test_evaluate import llama
from transformers import AutoTokenizer
from typer.testing import CliRunner

from linearize.cli import app
from linearize.convert import convert
from linearize.evaluate import LmEval, Results, harness_rows, recall
from linearize.evaluate import harness as harness_module
from linearize.evaluate.harness import GROUPS, check, export, measure
from linearize.modeling.errors import EvaluationError, RecipeError
from linearize.modeling.window import WindowConfig
from linearize.recipe import Evaluate, Recipe
from linearize.report import markdown
from linearize.teacher import BUNDLED, load_teacher

WORDS = ["old man", "sea", "a house of stone", "day", "the white ship"]


def test_without_lm_eval_the_way_to_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(EvaluationError, match=r"needs lm-eval .*pip install 'linearize\[eval\]'"):
        check(["zero-shot"])


def test_the_recipe_names_tasks():
    words = ["evaluate.lm_eval.tasks=[zero-shot, mine]", "evaluate.lm_eval.folder=tasks"]
    found = Recipe.resolve(None, None, words).evaluate.lm_eval
    assert (found.tasks, found.folder, found.limit) == (["zero-shot", "mine"], "tasks", None)
    assert Evaluate().lm_eval.tasks == []


def test_the_command_line_names_tasks(monkeypatch):
    seen = []

    def stop(folder, overrides, **_):
        seen.append(overrides)
        raise EvaluationError("evaluate: stopped")

    monkeypatch.setattr(importlib.import_module("linearize.run"), "evaluate_checkpoint", stop)
    monkeypatch.setattr(importlib.import_module("linearize.cli.measure"), "must_be_student", lambda _: None)
    words = ["eval", "student", "seed=3", "--lm-eval", "piqa,mmlu", "--lm-eval-tasks", "mine"]
    made = CliRunner().invoke(app, words)
    assert (made.exit_code, made.stderr) == (2, "error: evaluate: stopped\n")
    found = Recipe.resolve(overrides=seen[0])
    assert (found.seed, found.evaluate.lm_eval.tasks, found.evaluate.lm_eval.folder) == (
        3,
        ["piqa", "mmlu"],
        "mine",
    )
    with pytest.raises(RecipeError, match=r"evaluate\.lm_eval\.folder: mine is given, but no tasks"):
        Recipe.resolve(overrides=["evaluate.lm_eval.folder=mine"])


lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed: pip install 'linearize[eval]'",
)
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's own, and of the libraries that it alone brings


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED["books-5m"])


@pytest.fixture(scope="module")
def models(tokenizer):
    """A teacher, the same model converted with a window of 4, and its twin with 64 columns of padding."""
    padded = llama(len(tokenizer) + 64)
    padded.load_state_dict(
        {
            key: torch.cat([value, 9 * value[:64]]) if value.shape[0] == len(tokenizer) else value
            for key, value in llama(len(tokenizer)).state_dict().items()
        }
    )
    return {
        "teacher": llama(len(tokenizer)),
        "near": convert(llama(len(tokenizer)), WindowConfig(window=4)),
        "padded": padded,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rng = random.Random(0)
    docs = [
        {
            "question": "The " + " ".join(rng.choices(["man", "went", "down", "to", "see", "her"], k=9)),
            "choices": rng.sample(WORDS, 4),
            "gold": rng.randrange(4),
        }
        for _ in range(40)
    ]
    data = folder / "docs.jsonl"
    data.write_text("\n".join(map(json.dumps, docs)))
    base = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}} and the",
        "metadata": {"version": 3},
    }
    accuracy = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
    specs = [
        base
        | {
            "task": "choose",
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": accuracy,
        },
        base
        | {
            "task": "last_word",
            "output_type": "loglikelihood",
            "doc_to_target": " {{choices[0]}}",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                accuracy[0],
            ],
        },
        base
        | {
            "task": "go_on",
            "output_type": "generate_until",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
        base | {"task": "absent", "output_type": "multiple_choice", "doc_to_choice": "choices",
                "doc_to_target": "gold", "metric_list": accuracy,
                "dataset_kwargs": {"data_files": {"test": str(folder / "nowhere.jsonl")}}},
        {"group": "both", "task": ["choose", "last_word"]},
    ]  # fmt: skip
    for spec in specs:
        name = spec.get("task") if isinstance(spec.get("task"), str) else spec["group"]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(spec))
    return folder


@pytest.fixture(scope="module")
def found(models, tokenizer, folder):
    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    seen = []
    made = measure(
        models,
        tokenizer,
        ["choose", "last_word", "go_on", "absent"],
        folder=folder,
        limit=25,
        batch_size=7,
        progress=lambda *at: seen.append(at),
    )
    assert seen == [(n, 12) for n in range(1, 10)]
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    return made


def rows(found, task, metric, model):
    return next(r for r in found.tasks if (r.task, r.metric, r.model) == (task, metric, model))


def by_hand(model, tokenizer, folder, count):
    """Accuracy of the likeliest choice, one row at a time."""
    right = []
    for line in (folder / "docs.jsonl").read_text().splitlines()[:count]:
        doc = json.loads(line)
        context = tokenizer(doc["question"] + " and the").input_ids
        scores = []
        for choice in doc["choices"]:
            ids = tokenizer(doc["question"] + " and the " + choice).input_ids
            logits = model(torch.tensor([ids])).logits[0, :, : len(tokenizer)].log_softmax(-1)
            scores.append(sum(logits[i - 1, ids[i]].item() for i in range(len(context), len(ids))))
        right.append(scores.index(max(scores)) == doc["gold"])
    return sum(right) / count


@lm_eval
def test_scores_are_those_of_reading_one_row_at_a_time(found, models, tokenizer, folder):
    for name in ("teacher", "near"):
        row = rows(found, "choose", "acc", name)
        assert row.value == by_hand(models[name], tokenizer, folder, 25)
        assert (row.samples, row.chance, row.num_fewshot, row.task_version) == (25, 0.25, 0, "3")
        assert row.low < row.value < row.high
    assert rows(found, "choose", "acc", "teacher").wins is None


@lm_eval
def test_padded_columns_change_nothing(found):
    for task, metric in (
        ("choose", "acc"),
        ("choose", "acc_norm"),
        ("last_word", "acc"),
        ("last_word", "perplexity"),
    ):
        ours, theirs = (rows(found, task, metric, name) for name in ("padded", "teacher"))
        assert ours.value == pytest.approx(theirs.value, rel=1e-6)
    row = rows(found, "choose", "acc", "padded")
    assert (row.wins, row.ties, row.losses, row.p, row.raw) == (0, 25, 0, 1, 1)
    assert row.kept is False  # 25 samples cannot show a loss of at most two points


@lm_eval
def test_every_metric_and_kind_of_request_is_there(found):
    assert {(row.task, row.metric) for row in found.tasks} == {
        ("choose", "acc"), ("choose", "acc_norm"), ("last_word", "acc"), ("last_word", "perplexity"),
        ("go_on", "exact_match"), ("absent", ""),
    }  # fmt: skip
    ppl = rows(found, "last_word", "perplexity", "near")
    assert ppl.low < ppl.value < ppl.high
    assert (ppl.chance, ppl.raw, ppl.p) == (None, None, None)
    assert rows(found, "go_on", "exact_match", "near").chance == 0


@lm_eval
def test_absent_data_are_not_run_and_not_zero(found):
    absent = [row for row in found.tasks if row.task == "absent"]
    assert [row.model for row in absent] == ["teacher", "near", "padded"]
    for row in absent:
        assert (row.value, row.low, row.samples) == (None, None, 0)
        assert "its data cannot be had" in row.not_run


@lm_eval
def test_a_group_is_all_samples_of_its_tasks(models, tokenizer, folder, found):
    two = {name: models[name] for name in ("teacher", "near")}
    made = measure(two, tokenizer, ["both"], folder=folder, limit=25, batch_size=3)
    for name in two:
        whole = rows(made, "both", "acc", name)
        parts = [rows(made, task, "acc", name) for task in ("choose", "last_word")]
        assert whole.samples == 50
        assert whole.value == pytest.approx(sum(part.value for part in parts) / 2)
        assert whole.chance == 0.125
        assert [part.group for part in parts] == ["both", "both"] and whole.group is None
        for part in parts:  # whatever the batch, and whatever else is asked
            assert part.value == rows(found, part.task, "acc", name).value


@lm_eval
def test_results_carry_it_through_json_into_the_report(found):
    again = LmEval.from_dict(
        json.loads(json.dumps({"version": found.version, "tasks": [vars(r) for r in found.tasks]}))
    )
    assert again == found
    results = Results("a text", ["teacher", "near", "padded"], 0, {}, [], {}, lm_eval=found)
    assert Results.from_dict(json.loads(json.dumps(results.to_dict(), allow_nan=False))) == results
    text = markdown(results)
    assert f"lm-eval {found.version}" in text
    assert "| choose | acc | 0 | near |" in text
    assert "| absent |  |  | near | not run: its data cannot be had" in text


@lm_eval
def test_exported_prompts_get_the_verdict_of_our_own_scoring(tmp_path):
    """The embedded teacher finds its pass keys in any harness, as it does in ours."""
    model, tokenizer = load_teacher(Recipe.resolve().teacher)
    text = torch.tensor(tokenizer("The old man went down to the sea. " * 60).input_ids)
    given = {"samples": 6, "seed": 4, "haystack_tokens": text}
    names = export(tmp_path / "out", tokenizer, ["passkey", "number_in_text"], [160], **given)
    assert names == ["linearize_passkey_160", "linearize_number_in_text_160", "linearize_recall"]
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    made = measure({"teacher": model}, tokenizer, ["linearize_recall"], folder=moved)
    hits = 0
    for task in ("passkey", "number_in_text"):
        asked = recall.prompts(tokenizer, task, 160, **given)
        ours = recall.score(model, asked, batch_size=6, vocab_size=len(tokenizer))
        row = rows(made, f"linearize_{task}_160", "acc", "teacher")
        assert (row.value, row.samples, row.chance) == (sum(ours) / 6, 6, 0)
        hits += sum(ours)
    assert hits > 0
    with pytest.raises(EvaluationError, match="exists already"):
        export(moved, tokenizer, ["passkey"], [160], samples=1)


@lm_eval
def test_mistakes_are_named(folder, tmp_path, monkeypatch):
    with pytest.raises(EvaluationError, match=r"folder: .*nowhere is no folder"):
        check(["choose"], tmp_path / "nowhere")
    whole = []

    def everything(local):  # lm-eval's own index takes a minute
        from lm_eval.tasks import TaskManager

        whole.append(local)
        return TaskManager(include_path=local, include_defaults=False)

    monkeypatch.setattr(harness_module, "_everything", everything)
    with pytest.raises(EvaluationError, match=r"has no task 'chose'; did you mean 'choose'\?"):
        check(["chose"], folder)
    assert whole == [[str(folder)]]
    check(
        [*GROUPS, "choose"], folder
    )  # the named sets are found in lm-eval's own folders, and without its index
    assert len(whole) == 1
    assert [one.metric for one in GROUPS["zero-shot"]] == ["acc", "acc", "acc_norm", "acc", "acc_norm", "acc"]


@lm_eval
def test_models_that_were_asked_different_things_are_not_compared():
    sample = {"doc_id": 0, "arguments": [("a", "b")], "filter": "none"}
    other = sample | {"arguments": [("a", "c")]}
    results = {name: {"samples": {"t": [s]}} for name, s in (("teacher", sample), ("student", other))}
    with pytest.raises(EvaluationError, match="student and teacher were asked different prompts of t"):
        harness_rows._refuse_other_prompts(["t"], results)
