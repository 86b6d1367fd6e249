"""CONTRIBUTING.md: its worked example, in a copy of the package, is a method like any other."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
(IMPORT, NAME, RECORD) = re.findall(r"`(from \.(\w+) import (\w+))`", TEXT)[0]


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Runs a module in a copy of the package and the tests that has the method, and nothing else, added."""
    root = tmp_path_factory.mktemp("copy")
    for folder in ("linearize", "tests", "recipes"):
        shutil.copytree(
            ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "teachers")
        )
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / "linearize/modeling" / f"{NAME}.py").write_text(EXAMPLE, encoding="utf-8")
    registry = root / "linearize/modeling/registry.py"
    imports, last, end = registry.read_text(encoding="utf-8").rpartition("SOFTMAX")
    imports = imports.replace("\nfrom ", f"\n{IMPORT}\nfrom ", 1)
    registry.write_text(f"{imports}{last}, {RECORD}{end}", encoding="utf-8")

    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", *words],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
        )

    return run


def test_the_example_is_short_and_in_the_style_of_the_package(python):
    assert len(EXAMPLE.splitlines()) < 60
    for words in (["format", "--check"], ["check"]):
        made = python("ruff", *words, f"linearize/modeling/{NAME}.py")
        assert made.returncode == 0, made.stdout + made.stderr


def test_the_command_line_knows_it(python):
    made = python("linearize", "list", "methods")
    summary = re.findall(r'"(.*?)"', EXAMPLE)[-1]
    assert re.search(rf"^{NAME} +{re.escape(summary)}$", made.stdout, re.MULTILINE), made


def test_a_recipe_knows_its_fields(python):
    (word,) = re.findall(rf"linearize show MODEL --method {NAME} (\S+)`", TEXT)
    field, value = word.removeprefix("method.").split("=")
    made = python("linearize", "show", "some/model", "--method", NAME, word)
    assert f"  name: {NAME}\n  {field}: {float(value)}\n" in made.stdout, made
    wrong = python("linearize", "show", "some/model", "--method", NAME, f"method.{field}s=6")
    assert wrong.returncode == 2
    assert wrong.stderr == f"error: method.{field}s: unknown key; did you mean '{field}'?\n"


def test_the_contract_holds(python, tmp_path):
    """Every test of the contract, on this method, none of them skipped."""
    report = tmp_path / "report.xml"
    made = python("pytest", "-q", "tests/test_contract.py", "-k", NAME, f"--junitxml={report}")
    assert made.returncode == 0, made.stdout + made.stderr
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert not any(list(case) for case in cases)  # a failure, an error or a skip would be inside
    ran = {case.attrib["name"].partition("[")[0] for case in cases if NAME in case.attrib["name"]}
    contract = (ROOT / "tests/test_contract.py").read_text(encoding="utf-8")
    assert ran == set(re.findall(r"^def (test_\w+)", contract, re.MULTILINE))
