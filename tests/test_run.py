"""The road of a run on a tiny teacher: what it leaves, that it goes on, what it refuses."""

import itertools
import json
import shutil
import sys

import pytest
import torch
from tiny import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import linearize
from linearize.cli import app
from linearize.convert import describe
from linearize.modeling.errors import LinearizeError, RecipeError
from linearize.modeling.linear import LinearConfig
from linearize.recipe import Recipe
from linearize.run import control_methods, evaluate_checkpoint, run
from linearize.run_folder import folder_of
from linearize.teacher import BUNDLED

ROAD = sys.modules["linearize.run"]  # linearize.run itself is the function
WORDS = [
    "method.window=8",
    "layers=[0,1]",
    "data.seq_len=192",
    "data.sources=[{kind: self, tokens: 4000}, {kind: recall, weight: 0.2, kinds: [passkey]}]",
    "transfer.tokens=512",
    "transfer.batch_size=2",
    "finetune.tokens=512",
    "finetune.batch_size=2",
    "finetune.kl=1",
    "control={enabled: true, methods: [window, linear]}",
    "evaluate.seq_lens=[64]",
    "evaluate.sequences=2",
    "evaluate.recall_lens=[128]",
    "evaluate.recall_samples=2",
    "evaluate.generate_tokens=4",
    "evaluate.gates=false",
    "device=cpu",
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with a random llama that reads with the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-teacher")
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED["books-5m"])
    special = dict(
        pad_token_id=None, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    tiny("llama", vocab_size=len(tokenizer), **special).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(teacher, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    return Recipe.resolve(teacher, "lolcats", [*WORDS, f"output={output}"])


@pytest.fixture(scope="module")
def made(recipe):
    seen = []
    return run(recipe, progress=seen.append), seen


def test_a_run_leaves_what_its_folder_promises(made, recipe):
    result, _ = made
    left = {path.name for path in result.folder.iterdir()}
    assert {
        "recipe.yaml",
        "data",
        "transfer",
        "finetune",
        "student",
        "control",
        "results.json",
        "table.md",
    } <= left
    assert not [name for name in left if name.endswith(".tmp")]
    assert Recipe.from_file(result.folder / "recipe.yaml") == recipe
    assert Recipe.from_file(result.checkpoint / "recipe.yaml") == recipe
    record = json.loads((result.folder / "results.json").read_text())
    assert record["origin"]["versions"]["torch"] == torch.__version__
    assert result.continuation == record["continuation"]


def test_teacher_student_and_control_are_measured(made):
    result, _ = made
    assert result.results.models == ["teacher", "student", "window control", "linear control"]
    table = (result.folder / "table.md").read_text()
    for name in ("window control", "linear control"):
        assert f"| 64 | {name} |" in table and f"| KL | 64 | {name} |" in table


def test_every_long_phase_reports_to_its_end(made):
    _, seen = made
    last = {at.phase: at for at in seen}
    assert {"transfer", "finetune", "window control finetune", "evaluate"} <= set(last)
    assert {"linear control transfer", "linear control finetune"} <= set(last)
    assert all(at.done == at.total for at in last.values())
    assert all(a.done <= b.done for a, b in itertools.pairwise(seen) if a.phase == b.phase)


def test_the_student_was_trained_and_the_kept_layer_was_not_converted(made, teacher):
    result, _ = made
    student, _ = linearize.load(result.checkpoint)
    original, _ = linearize.load(teacher)
    assert list(student.mixers()) == [0, 1]
    weights = student.state_dict()
    changed = [name for name, value in original.state_dict().items() if not torch.equal(value, weights[name])]
    assert changed
    assert all("self_attn" in name for name in changed)


def test_a_finished_run_is_not_done_again(made, recipe, monkeypatch):
    def never(*_args, **_kwargs):
        raise AssertionError("loaded again")

    monkeypatch.setattr(ROAD, "load_teacher", never)
    again = run(recipe)
    assert again == made[0]


@pytest.mark.parametrize("step", ["finetune", "evaluate"])
def test_a_run_goes_on_after_the_last_finished_step(step, teacher, tmp_path, monkeypatch, made, recipe):
    whole = recipe.override([f"output={tmp_path / 'run'}"])

    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ROAD, step, stop)
        with pytest.raises(KeyboardInterrupt):
            run(whole)
    done = (tmp_path / "run" / "transfer" / "done.json").stat().st_mtime_ns
    result = run(whole)
    assert (tmp_path / "run" / "transfer" / "done.json").stat().st_mtime_ns == done
    assert result.results.to_dict() == made[0].results.to_dict()
    assert result.continuation == made[0].continuation


def test_another_recipe_is_refused_by_key_and_nothing_is_touched(made, recipe):
    folder = made[0].folder
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(RecipeError, match=r"another recipe \(method\.window, finetune\.tokens differ\)"):
        run(recipe.override(["method.window=16", "finetune.tokens=1024"]))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_run_that_cannot_begin_leaves_no_folder(recipe, tmp_path):
    for words in (
        ["teacher.name=nowhere"],
        ["layers=[7]"],
        ["data.sources=[{kind: text, path: nowhere.txt}]"],
    ):
        with pytest.raises(LinearizeError):
            run(recipe.override([*words, f"output={tmp_path / 'run'}"]))
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["evaluate.recall_lens=[40]", "control.enabled=false"], "cannot hold the needle"),
        (["evaluate.recall_lens=[1024]"], "recall_lens: 1024 is longer than the teacher's context of 512"),
        (["evaluate.seq_lens=[500]", "data.sources.0.tokens=600"], "fewer than one sequence of 500"),
        (["data.sources=[{kind: recall}]", "data.seq_len=400"], "leave no text to measure on"),
        (["data.seq_len=1024"], "data.seq_len: 1024 is longer than the teacher's context of 512"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(recipe, tmp_path, words, says):
    with pytest.raises(LinearizeError, match=says):
        run(recipe.override([*words, f"output={tmp_path / 'run'}"]))
    assert list(tmp_path.iterdir()) == []


def test_a_saved_student_is_measured_on_the_text_it_was_not_trained_on(made, tmp_path):
    folder = made[0].checkpoint
    again = evaluate_checkpoint(folder, ["seed=5"])
    assert again.windows == made[0].results.windows
    assert again.recall[0].digest != made[0].results.recall[0].digest
    for word in ("data.seq_len=256", "data.sources.0.tokens=8000"):
        with pytest.raises(RecipeError, match=rf"{word.split('=')[0]}.*data.held_out"):
            evaluate_checkpoint(folder, [word])
    other = tmp_path / "other.txt"
    other.write_text("The man and the dog went home. " * 300)
    named = f"data.held_out=[{{kind: text, path: {other}}}]"
    assert evaluate_checkpoint(folder, ["data.seq_len=256", named]).source == "other.txt"


def test_a_student_is_measured_on_other_text_without_what_it_was_trained_on(made, tmp_path):
    student = shutil.copytree(made[0].checkpoint, tmp_path / "student")
    (tmp_path / "my.txt").write_text("The old man went down to the sea. " * 40)
    seen = []
    words = [f"data.held_out=[{{kind: text, path: {tmp_path / 'my.txt'}}}]", "evaluate.recall_tasks=[]"]
    assert evaluate_checkpoint(student, words, progress=seen.append).source == "my.txt"
    assert {at.phase for at in seen} == {"evaluate"}  # nothing is sampled again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my.txt", "student"]


def test_a_sparse_cache_is_measured_without_training_again(made):
    """The state grows by the pairs, the KL changes, the checkpoint does not."""
    before = made[0].results
    after = evaluate_checkpoint(made[0].checkpoint, ["method.sparse_cache=24", "evaluate.recall_tasks=[]"])
    assert after.memory["student"].state == before.memory["student"].state + 2 * 24 * 4 * (16 + 16) * 4
    assert after.likelihood[64]["student"].kl != before.likelihood[64]["student"].kl
    assert after.likelihood[64]["teacher"].ppl == before.likelihood[64]["teacher"].ppl
    assert linearize.load(made[0].checkpoint)[0].mixers()[0].config.sparse_cache is None
    with pytest.raises(RecipeError, match=r"^method\.window: was settled .* is method\.sparse_cache"):
        evaluate_checkpoint(made[0].checkpoint, ["method.window=4"])


def test_a_sparse_cache_may_write(made):
    def write(*words):
        text = "The old man went down to the sea and " * 3
        return CliRunner().invoke(app, ["generate", str(made[0].checkpoint), text, *words])

    plain, sparse = write(), write("method.sparse_cache=16", "--max-new-tokens", "60")
    assert plain.exit_code == sparse.exit_code == 0, sparse.output
    assert plain.stdout != sparse.stdout
    wrong = write("man")
    assert wrong.exit_code == 2 and wrong.stderr.startswith("error: man: is not a method's field")


@pytest.mark.parametrize("word", ["layers=all", "transfer.tokens=1", "output=elsewhere"])
def test_measuring_does_not_change_what_training_has_settled(word, made):
    with pytest.raises(RecipeError, match=rf"^{word.partition('=')[0]}: was settled .* is teacher, data"):
        evaluate_checkpoint(made[0].checkpoint, [word])


def test_a_student_without_its_recipe_is_told_what_it_lacks(made, tmp_path):
    student = shutil.copytree(made[0].checkpoint, tmp_path / "student")
    (student / "recipe.yaml").unlink()
    with pytest.raises(RecipeError, match=r"has no recipe\.yaml"):
        evaluate_checkpoint(student)


def test_text_that_has_changed_since_training_is_not_held_out(teacher, tmp_path, recipe, monkeypatch):
    book = tmp_path / "book.txt"
    book.write_text("The man and the dog went home. " * 900)
    words = [f"data.sources=[{{kind: text, path: {book}}}]", f"output={tmp_path / 'run'}"]
    whole = recipe.override([*words, "control.enabled=false"])

    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ROAD, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            run(whole)
    book.write_text(book.read_text()[10_000:])
    with pytest.raises(RecipeError, match="other data"):
        run(whole)
    with pytest.raises(RecipeError, match="other data"):
        evaluate_checkpoint(tmp_path / "run" / "student")


def test_layers_of_different_methods_take_one_road(teacher, tmp_path):
    layers = "layers={0: {name: lolcats, window: 8}, 1: softmax, rest: {name: salient, budget: 5, chunk: 16}}"
    words = [word for word in WORDS if not word.startswith(("method", "layers"))]
    recipe = Recipe.resolve(teacher, overrides=[*words, layers, f"output={tmp_path / 'run'}"])
    done = run(recipe)
    assert done.results.models == ["teacher", "student", "window control", "linear control"]
    assert [r.method for r in describe(linearize.load(done.checkpoint)[0])] == [
        "lolcats",
        "softmax",
        "salient",
    ]
    for name in ("window", "linear"):
        control = linearize.load(done.folder / "control" / name / "student")[0]
        assert [r.method for r in describe(control)] == [name, "softmax", name]
    plain = AutoModelForCausalLM.from_pretrained(done.checkpoint, trust_remote_code=True)
    tokens = torch.arange(5, 60)[None]
    with torch.no_grad():
        expected = linearize.load(done.checkpoint)[0](tokens).logits
        assert torch.equal(plain(tokens).logits, expected)
    lines = (done.folder / "transfer" / "metrics.jsonl").read_text().splitlines()
    assert all(len(json.loads(line)["relative_error"]) == 2 for line in lines)


def test_the_folder_is_named_after_teacher_and_method():
    assert str(folder_of(Recipe.resolve("org/Some-Model"))) == "runs/some-model-lolcats"
    assert str(folder_of(Recipe.resolve("org/Some-Model", overrides=["output=x/y"]))) == "x/y"
    mapped = Recipe.resolve("org/Some-Model", overrides=["layers={0: salient, 1: softmax, rest: window}"])
    assert str(folder_of(mapped)) == "runs/some-model-salient+window"


@pytest.mark.parametrize(
    ("words", "window"),
    [
        (["method.window=48"], (48, "terraced")),
        (["method.window=48", "method.window_kind=sliding"], (48, "sliding")),
        (["control.window=16"], (16, "terraced")),
        (["method.window=null"], (64, "sliding")),
        (["method={name: still, chunk: 32}"], (32, "terraced")),
        (["method={name: liger, window: 24}"], (24, "sliding")),
    ],
)
def test_the_control_has_the_window_of_the_student_unless_told(words, window):
    (control,) = control_methods(Recipe.resolve("x/y", overrides=words))
    assert control.name == "window" and (control.window, control.window_kind) == window


def test_the_linear_control_has_the_maps_of_the_student():
    words = ["control.methods=[linear]", "method={name: lolcats, feature_map: exp, kv_tied_map: true}"]
    (control,) = control_methods(Recipe.resolve("x/y", overrides=words))
    assert control == LinearConfig(feature_map="exp", kv_tied_map=True)
    (control,) = control_methods(Recipe.resolve("x/y", "salient", words[:1]))
    assert control == LinearConfig()


def test_a_control_is_trained_once():
    made = control_methods(Recipe.resolve("x/y", overrides=["control.methods=[linear, window, linear]"]))
    assert [method.name for method in made] == ["linear", "window"]
