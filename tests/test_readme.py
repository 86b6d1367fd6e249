"""The README: its commands exist, its recipe words are valid, its names are the public ones."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import linearize
from linearize.cli import app
from linearize.modeling.registry import METHODS
from linearize.recipe import Recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for kind, block in BLOCKS
    if kind == "bash"
    for line in block.splitlines()
]
PYTHON = [block for kind, block in BLOCKS if kind == "python"]


@pytest.mark.parametrize("words", [c for c in COMMANDS if c[0] == "linearize"], ids=" ".join)
def test_every_verb_exists_and_every_recipe_word_is_valid(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-recipe.yaml").write_text("teacher: {name: books-5m}\n")
    verb, *rest = words[1:]
    if verb == "run":
        made = CliRunner().invoke(app, ["show", *rest])
    elif verb in ("show", "list"):
        made = CliRunner().invoke(app, [verb, *rest])
    else:
        made = CliRunner().invoke(app, [verb, "--help"])
        Recipe.resolve("books-5m/lolcats", overrides=[word for word in rest if "=" in word])
    assert made.exit_code == 0, made.output


@pytest.mark.parametrize("words", [c for c in COMMANDS if c[0] == "make"], ids=" ".join)
def test_every_make_target_exists(words):
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_python_runs(tmp_path):
    """All blocks in one process, as they stand but for the budgets."""
    words = [
        "data.seq_len=256",
        "data.sources.0.tokens=3000",
        "transfer.tokens=512",
        "finetune.tokens=512",
        "evaluate.seq_lens=[64]",
        "evaluate.sequences=2",
        "evaluate.recall_lens=[128]",
        "evaluate.recall_samples=2",
        "evaluate.gates=false",
    ]
    small = f"""
import linearize
resolve = linearize.Recipe.resolve
linearize.Recipe.resolve = lambda *a, overrides=(), **k: resolve(*a, overrides=[*overrides, *{words}], **k)
"""
    blocks = "\n".join(PYTHON).replace("runs/quickstart/", "runs/mine/")
    made = subprocess.run(
        [sys.executable, "-c", f"{small}\n{blocks}\nassert 'student' in results.models"],
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip()
    # peft 0.21 reads a property that transformers 5.24 has renamed.
    told = [line for line in made.stderr.splitlines() if "is_gradient_checkpointing" not in line]
    assert not any("Warning" in line for line in told), made.stderr


@pytest.mark.parametrize("block", PYTHON)
def test_python_blocks_use_public_names(block):
    used = {
        node.attr
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "linearize"
    }
    assert used <= set(linearize.__all__)


def test_the_table_of_names_is_the_public_interface():
    table = README.partition("| name | gives |")[2].partition("## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == set(linearize.__all__) - {"__version__"}


def test_every_public_name_is_there_even_after_its_module_was_imported():
    import linearize.convert
    import linearize.evaluate
    import linearize.run

    for name in linearize.__all__:
        assert name == "__version__" or callable(getattr(linearize, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        linearize.nosuch  # noqa: B018


def test_nothing_of_a_student_is_loaded_with_a_question_on_the_terminal():
    """The tokenizer too reads the configuration, whose class is in the folder."""
    loads = re.findall(r"\.from_pretrained\((.*)\)", README)
    assert len(loads) > 1 and all("trust_remote_code=True" in given for given in loads)


def test_every_method_is_in_the_table():
    table = README.partition("## Methods")[2].partition("## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == set(METHODS)
