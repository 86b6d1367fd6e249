"""The command line: what it prints where, how it exits, how soon it answers."""

import json
import re
import subprocess
import sys
import time

import pytest
import yaml
from typer.testing import CliRunner

import linearize
from linearize.cli import app
from linearize.modeling.registry import METHODS
from linearize.recipe import Recipe, shipped_recipes


def call(*words):
    return CliRunner().invoke(app, list(words))


def test_help_needs_nothing_heavy():
    code = (
        "import sys, linearize.cli; linearize.cli.app(['--help'], standalone_mode=False); "
        "print([m for m in ('torch', 'transformers', 'peft', 'datasets', 'pydantic') if m in sys.modules])"
    )
    started = time.perf_counter()
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.splitlines()[-1] == "[]"
    assert time.perf_counter() - started < 2  # 0.2 s on an idle machine; the promise is 0.5 s


def test_the_package_is_a_command():
    made = subprocess.run(
        [sys.executable, "-m", "linearize", "version"], capture_output=True, text=True, check=True
    )
    assert made.stdout.strip() == linearize.__version__


def test_show_prints_every_default_and_validates():
    made = call("show", "some/model", "--method", "window", "seed=3", "method.window=32")
    assert made.exit_code == 0
    assert Recipe.from_dict(yaml.safe_load(made.stdout)) == Recipe.resolve(
        "some/model", "window", ["seed=3", "method.window=32"]
    )


def test_a_first_word_with_an_equals_sign_is_an_override():
    made = call("show", "layers=all", "--json")
    shown = json.loads(made.stdout.splitlines()[-1])
    assert shown["layers"] == "all"
    assert shown["teacher"]["name"] == "books-5m"


def test_a_mistake_is_one_line_on_stderr_and_code_2():
    made = call("show", "books-5m", "method.widow=3")
    assert made.exit_code == 2
    assert made.stdout == ""
    assert made.stderr == "error: method.widow: unknown key; did you mean 'window'?\n"


@pytest.mark.parametrize(
    ("what", "names"),
    [("methods", list(METHODS)), ("recipes", list(shipped_recipes())), ("families", ["llama", "gpt2"])],
)
def test_lists_name_what_there_is(what, names):
    made = call("list", what)
    assert made.exit_code == 0
    first_words = [line.split()[0] for line in made.stdout.splitlines()]
    assert set(names) <= set(first_words)


def test_families_are_those_that_the_suite_converts():
    from tiny import FAMILIES as TESTED

    from linearize.cli import FAMILIES

    assert set(FAMILIES) == set(TESTED)


def test_an_interruption_says_how_to_go_on(monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("linearize.recipe.Recipe.resolve", interrupted)
    made = call("show")
    assert made.exit_code == 130
    assert made.stderr.startswith("interrupted; the same command goes on")


def test_convert_tells_what_every_layer_remembers(tmp_path):
    made = call(
        *("convert", "books-5m", "--method", "still", "--output", str(tmp_path / "student")),
        *("layers=[0,2]", "method.budget=null"),
    )
    assert made.exit_code == 0, made.output
    told = made.stdout.splitlines()
    assert re.search(
        r"layer 0 +still +[\d,]+ new parameters, [\d,]+ bytes of state, [\d,]+ more with every token$",
        told[0],
    )
    assert re.search(r"layer 1 +softmax +0 new parameters, 0 bytes of state$", told[1])


def test_convert_and_unconvert_are_inverse(tmp_path):
    import torch

    made = call(
        "convert", "books-5m", "--output", str(tmp_path / "student"), "layers=[0,2]", "method.window=16"
    )
    assert made.exit_code == 0, made.output
    made = call("unconvert", str(tmp_path / "student"), "--output", str(tmp_path / "plain"))
    assert (made.exit_code, made.stderr) == (0, "")
    plain, _ = linearize.load(tmp_path / "plain")
    teacher, _ = linearize.load("books-5m")
    weights = plain.state_dict()
    assert weights.keys() == teacher.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in teacher.state_dict().items())


def test_generate_continues_a_prompt():
    made = call("generate", "books-5m", "The old man", "--max-new-tokens", "3", "--json")
    assert made.exit_code == 0, made.output
    record = json.loads(made.stdout.splitlines()[-1])
    assert record["prompt"] == "The old man"
    assert record["continuation"]


def test_a_prompt_may_come_from_stdin():
    words = ["generate", "books-5m", "-", "--max-new-tokens", "2", "--json"]
    made = CliRunner().invoke(app, words, input="The old man\nand\n")
    assert json.loads(made.stdout)["prompt"] == "The old man\nand"


def test_sampling_follows_the_seed():
    words = ["generate", "books-5m", "The old man", "--max-new-tokens", "8", "--sample"]
    first, again, other = call(*words), call(*words, "--seed", "0"), call(*words, "--seed", "1")
    assert first.exit_code == 0
    assert first.stdout == again.stdout != other.stdout


def test_a_log_line_stays_one_line_where_there_is_no_terminal():
    import logging

    call("show")
    line = "a long line of words " * 20
    assert logging.getLogger().handlers[0].format(logging.makeLogRecord({"msg": line})) == line


def test_progress_draws_bars_without_touching_stdout():
    from linearize.progress import Progress
    from linearize.terminal import watching

    with watching() as watch:
        watch(Progress("transfer", 0, 100))
        watch(Progress("transfer", 50, 100, metrics={"loss": 0.5}))
        watch(Progress("evaluate", 1, 2, unit="prompts"))
