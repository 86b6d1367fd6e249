"""Earlier stages of a student beside the finished one: what they measure, and why they cannot be had."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_run import WORDS, teacher  # noqa: F401  (a fixture)

from linearize.evaluate.likelihood import compare
from linearize.loading import load
from linearize.recipe import Recipe
from linearize.run import evaluate_checkpoint, run
from linearize.stages import TRANSFERRED, UNTRAINED, converted, stages_of

OWN = [
    "control.enabled=false",
    "evaluate.recall_tasks=[]",
    "evaluate.ablations={enabled: true, per_layer: false}",
]


@pytest.fixture(scope="module")
def made(teacher, tmp_path_factory):  # noqa: F811
    output = tmp_path_factory.mktemp("staged") / "run"
    return run(Recipe.resolve(teacher, "lolcats", [*WORDS, *OWN, f"output={output}"]))


def rows(results):
    return {row.name: row for row in results.ablations.rows if row.kind == "stage"}


def test_what_each_stage_bought_is_measured_on_the_same_windows(made, teacher):  # noqa: F811
    """Against models put together by hand: the converted teacher, and it with the weights of the transfer."""
    recipe = Recipe.from_file(made.folder / "recipe.yaml")
    base, tokenizer = load(teacher)
    model = converted(load(teacher)[0], recipe)
    learnt = load_file(made.folder / "transfer" / "weights.safetensors")
    assert learnt.keys() == {n for n, p in model.named_parameters() if "mixer" in n}
    from linearize.data import build

    corpus = build(recipe.data, tokenizer, cache_dir=made.folder / "data", seed=recipe.seed, teacher=base)
    windows = corpus.held_out(64, 2)
    for name, weights in ((UNTRAINED, {}), (TRANSFERRED, learnt)):
        model.load_state_dict(weights, strict=False)
        by_hand = compare(base, {"it": model}, windows, batch_size=4, vocab_size=len(tokenizer), seed=0)
        row, student = rows(made.results)[name], made.results.likelihood[64]["student"]
        assert row.kl == pytest.approx(by_hand["it"].kl, rel=1e-5) and row.windows == 2
        assert row.kl_difference == pytest.approx(by_hand["it"].kl - student.kl, abs=1e-6)
        assert row.difference_interval is not None
    assert abs(rows(made.results)[UNTRAINED].kl - rows(made.results)[TRANSFERRED].kl) > 1e-4
    assert f"| {TRANSFERRED} | 64 |" in (made.folder / "table.md").read_text()


def test_after_a_transfer_alone_a_student_is_what_it_was_then(made, teacher, tmp_path):  # noqa: F811
    words = [*WORDS, *OWN, "finetune.tokens=0", f"output={tmp_path / 'run'}"]
    found = rows(run(Recipe.resolve(teacher, "lolcats", words)).results)
    assert found[TRANSFERRED].kl_difference == 0 and found[TRANSFERRED].difference_interval == (0, 0)
    assert found[UNTRAINED].kl_difference != 0


def test_a_stage_that_cannot_be_had_says_why(made, tmp_path):
    home = tmp_path / "run"
    shutil.copytree(made.checkpoint, home / "student")
    shutil.copytree(made.folder / "data", home / "data")
    found = rows(evaluate_checkpoint(home / "student", ["evaluate.gates=false"]))
    assert found[UNTRAINED].kl == pytest.approx(rows(made.results)[UNTRAINED].kl, rel=1e-6)
    assert found[TRANSFERRED].kl is None
    assert found[TRANSFERRED].not_run == "the run's transfer folder is not beside the student"

    recipe = Recipe.from_file(home / "student" / "recipe.yaml")
    transfer = shutil.copytree(made.folder / "transfer", home / "transfer")
    with (transfer / "weights.safetensors").open("ab") as file:
        file.write(b"0")
    first, second = stages_of(home / "student", recipe, "cpu")
    assert not second.structural
    bare = recipe.override(["method={name: window, window: 8}"])
    assert list(stages_of(home / "student", bare, "cpu"))[1].structural  # it has nothing to learn
    assert first.model is not None and second.model is None and "not what the stage wrote" in second.not_run
    done = json.loads((transfer / "done.json").read_text())
    (transfer / "done.json").write_text(json.dumps(done | {"skipped": "tokens is 0"}))
    assert list(stages_of(home / "student", recipe, "cpu"))[1].not_run == (
        "there was no transfer: tokens is 0"
    )
    (transfer / "done.json").write_text("{")
    assert "cannot be read" in list(stages_of(home / "student", recipe, "cpu"))[1].not_run


def test_asking_for_an_earlier_stage_draws_no_number_of_ours(made):
    recipe = Recipe.from_file(made.folder / "recipe.yaml")
    before = torch.get_rng_state()
    assert [stage.not_run for stage in stages_of(made.checkpoint, recipe, "cpu")] == [None, None]
    assert torch.equal(torch.get_rng_state(), before)
