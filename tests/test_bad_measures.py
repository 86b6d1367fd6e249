"""Measurements that cannot be made, by every verb that makes them: one line that says what, exit code 2, nothing
written."""

import json
import shutil

import pytest
from test_run import WORDS, teacher  # noqa: F401  (a fixture)
from typer.testing import CliRunner

from linearize import checkpoint
from linearize.cli import app
from linearize.convert import convert
from linearize.loading import load
from linearize.recipe import Recipe

OFF = [
    "evaluate.seq_lens=[]",
    "evaluate.recall_tasks=[]",
    "control.enabled=false",
    "transfer.tokens=0",
    "finetune.tokens=0",
]
UNKNOWN = {
    "suite task": (
        "evaluate.suite.tasks=[mk4]",
        "evaluate.suite.tasks.0: 'mk4' is unknown; choose from 'niah",
    ),
    "recall task": (
        "evaluate.recall_tasks=[pass]",
        "evaluate.recall_tasks.0: 'pass' is unknown; did you mean 'passkey'?",
    ),
}
NONE = {
    "recall": ("evaluate.recall_samples=0", "evaluate.recall_samples: 0 should be greater"),
    "text": ("evaluate.sequences=0", "evaluate.sequences: 0 should be greater"),
    "suite": ("evaluate.suite={preset: smoke, samples: 0}", "evaluate.suite.samples: 0 should be greater"),
}


@pytest.fixture(scope="module")
def place(teacher, tmp_path_factory):  # noqa: F811
    """A teacher, one whose tokenizer has two tokens' ids exchanged, one with a token more, and a student."""
    folder = tmp_path_factory.mktemp("measures")
    shutil.copytree(teacher, folder / "teacher")
    (folder / "book.txt").write_text("The man and the dog went home. " * 900)
    tree = json.loads((teacher / "tokenizer.json").read_text())
    ids = tree["model"]["vocab"]
    one, other = sorted(ids, key=ids.get)[100:102]
    ids[one], ids[other] = ids[other], ids[one]
    shutil.copytree(teacher, folder / "swapped")
    (folder / "swapped" / "tokenizer.json").write_text(json.dumps(tree))
    model, tokenizer = load(teacher)
    recipe = Recipe.resolve(teacher, "lolcats", [*WORDS, *text(folder)])
    convert(model, recipe.method, recipe.layers)
    checkpoint.save(model, tokenizer, folder / "student", extra={"recipe.yaml": recipe.to_yaml()})
    return folder


def text(folder):
    return [f"data.sources=[{{kind: text, path: {folder / 'book.txt'}}}]"]


def run(folder, *words):
    words = [*WORDS, *text(folder), f"output={folder / 'run'}", *words]
    return ["run", folder / "teacher", "--method", "lolcats", *words]


def compare(folder, *words):
    words = [*WORDS, *text(folder), "control.enabled=false", f"output={folder / 'compared'}", *words]
    return ["compare", folder / "teacher", "--methods", "lolcats,window", "method.name=lolcats", *words]


def measure(folder, *words):
    return ["eval", folder / "student", *words]


def scan(folder, *words):
    return ["scan", folder / "teacher", *text(folder), f"output={folder / 'scanned'}", *words]


def plan(folder, *words):
    return ["plan", folder / "teacher", "--kv-share", "50%", *text(folder), *words]


def bench(folder, *words):
    return ["bench", folder / "student", *words]


CASES = {
    **{
        f"{verb.__name__}, unknown {what}": (verb, [word], told)
        for verb in (run, compare, measure, scan, plan)
        for what, (word, told) in UNKNOWN.items()
    },
    **{
        f"{verb.__name__}, no samples of {what}": (verb, [word], told)
        for verb in (run, compare, measure)
        for what, (word, told) in NONE.items()
    },
    "scan, unknown recall": (scan, ["scan.recall_tasks=[pass]"], "scan.recall_tasks.0: 'pass' is unknown"),
    "scan, no prompts": (scan, ["scan.recall_samples=0"], "scan.recall_samples: 0 should be"),
    "scan, no text": (scan, ["scan.sequences=0"], "scan.sequences: 0 should be"),
    "run, nothing": (run, OFF, "evaluate: nothing is to be measured"),
    "compare, nothing": (compare, OFF, "evaluate: nothing is to be measured"),
    "eval, nothing": (measure, OFF[:2], "evaluate: nothing is to be measured"),
    "compare, unknown method": (compare, ["--methods", "lolcats,mamba"], "--methods: 'mamba' is no method"),
    "bench, unknown part": (bench, ["--parts", "prefil"], "parts: 'prefil' is unknown; choose from"),
    "bench, no lengths": (bench, ["--lengths", ""], "--lengths: '' is not a list"),
    "bench, no rows": (bench, ["--batch", "0"], "batch: 0 is impossible"),
    "report, no run": (lambda f: ["report", f / "student"], [], "has no results.json"),
}
WORDS_OF_TEACHER = {
    "eval": lambda f: measure(f, f"teacher.name={f / 'swapped'}"),
    "gates": lambda f: measure(f, "--gates", f"teacher.name={f / 'swapped'}"),
    "ablations": lambda f: measure(f, "--ablations", f"teacher.name={f / 'swapped'}"),
    "suite": lambda f: measure(f, "--suite", "smoke", f"teacher.name={f / 'swapped'}"),
    "bench": lambda f: bench(f, "--teacher", f / "swapped", "--lengths", "32"),
}


def refused(folder, words):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    made = CliRunner().invoke(app, [str(word) for word in words])
    assert made.exit_code == 2 and not made.stdout, made.output
    assert made.stderr.startswith("error: ") and made.stderr.count("\n") == 1, made.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    return made.stderr


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_measured_is_one_line(place, case):
    verb, words, told = CASES[case]
    assert told in refused(place, verb(place, *words))


@pytest.mark.parametrize("verb", WORDS_OF_TEACHER)
def test_a_teacher_of_another_vocabulary_is_refused(place, verb):
    """Equally many tokens, two of which have each other's ids."""
    line = refused(place, WORDS_OF_TEACHER[verb](place))
    assert "its vocabulary (8192 tokens" in line and "is 100 in the one and 101 in the other" in line
