"""A failed integrity gate stops what would follow it: a run, a measurement, a timing, a push; what was made is kept."""

import errno
import json
import os
import shutil

import pytest
from test_run import WORDS, teacher  # noqa: F401  (a fixture)
from typer.testing import CliRunner

from linearize import certificate
from linearize.card import card
from linearize.cli import app
from linearize.evaluate import GatesFailed
from linearize.evaluate.gates import Gate, Gates
from linearize.hub import push
from linearize.modeling.errors import HubError
from linearize.run import evaluate_checkpoint

NAMED = "integrity gate failed: batch: layer 1, length 9, differs by 1, allowed 0.1"
BROKEN = Gates("failed", [Gate("batch", "failed", "layer 1, length 9", 1.0, 0.1), Gate("start", "passed")])
SOUND = Gates("passed", [Gate("batch", "passed", "layer 1, length 9", 0.01, 0.1), Gate("start", "passed")])
SHORT = ["evaluate.gates=true", "control.enabled=false", "evaluate.recall_tasks=[]"]


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(result, *names):
    assert result.exit_code == 2 and result.stderr.count("error: ") == 1, result.output
    line = result.stderr.splitlines()[-1]
    assert all(name in line for name in names), line


@pytest.fixture
def found(monkeypatch):
    """What the gates find from here on."""
    given = [BROKEN]
    monkeypatch.setattr("linearize.proof.integrity", lambda student, **terms: given[0])
    return given


def test_a_failed_gate_ends_a_run_and_all_that_would_rely_on_it(found, teacher, tmp_path, monkeypatch):  # noqa: F811
    words = ["run", teacher, "--method", "lolcats", *WORDS, *SHORT, f"output={tmp_path / 'run'}"]
    folder, student = tmp_path / "run", tmp_path / "run" / "student"
    for _ in range(2):  # a second call takes up what is there, and ends there too
        refused(call(*words), NAMED, "its certificate.json says so")
        left = {path.name for path in folder.iterdir()}
        assert {"transfer", "finetune", "student"} <= left and not {"results.json", "suite"} & left
    tree = certificate.read(student)
    assert tree["status"] == "failed" and "failed: batch, layer 1, length 9" in tree["reasons"]
    assert tree["measured"]["gates"] == BROKEN.to_dict() and not tree["measured"]["likelihood"]

    refused(call("eval", student), NAMED)
    refused(call("bench", student, "--lengths", "32"), "integrity gates failed", "--force")
    refused(call("push", folder, "me/mine", "--dry-run"), "integrity gates failed (batch)", "--allow-failed")
    assert push(folder, "me/mine", dry_run=True, allow_failed=True).files
    first = card(student, "me/mine").text.strip().split("\n\n")[1]
    assert "failed" in first and "batch" in first

    # The run goes on without gates, and its certificate still says so.
    words_on = ["evaluate.gates=false", f"output={shutil.copytree(folder, tmp_path / 'on')}"]
    for _ in range(2):
        going = call(*words[:-1], *words_on)
        assert going.exit_code == 0 and "integrity gate failed: batch" in going.stderr, going.output
        assert (tmp_path / "on" / "results.json").is_file()
        assert certificate.read(tmp_path / "on" / "student")["status"] == "failed"

    # Measured without gates, what they found stands.
    measured = call("eval", student, "evaluate.gates=false", "--json")
    assert json.loads(measured.stdout)["likelihood"]
    tree = certificate.read(student)
    assert tree["status"] == "failed" and tree["measured"]["likelihood"]
    with pytest.raises(HubError, match="integrity gates failed"):
        push(student, "me/mine", dry_run=True)

    found[0] = SOUND
    before = tree["measured"]
    assert call("eval", student, "--gates").exit_code == 0
    tree = certificate.read(student)
    assert tree["status"] == "incomplete" and not [r for r in tree["reasons"] if "failed" in r]
    assert tree["measured"] == before | {"gates": SOUND.to_dict()}
    assert call("eval", student, "--verify").exit_code == 0
    assert push(student, "me/mine", dry_run=True).files
    assert call(*words).exit_code == 0 and (folder / "results.json").is_file()

    found[0] = BROKEN
    assert call("eval", student, "--gates").exit_code == 2
    assert certificate.read(student)["status"] == "failed"
    refused(call(*words), NAMED, "its certificate.json says")  # finished as it is
    told = call(*words, "evaluate.gates=false")
    assert told.exit_code == 0 and "integrity gate failed: batch" in told.stderr

    # With other fields it is another student than the one that the certificate is of.
    before = certificate.read(student)
    with pytest.raises(GatesFailed, match="no certificate says so") as caught:
        evaluate_checkpoint(student, ["method.sparse_cache=4"])
    assert caught.value.gates == BROKEN and certificate.read(student) == before

    # A folder that nothing can be written in, with a certificate and without one.
    def read_only(path, tree):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(certificate, "write_json", read_only)
    for _ in range(2):
        refused(call("eval", student), NAMED, "it could not be written (Read-only file system)")
        refused(call("eval", student, "--gates"), "batch: layer 1, length 9, differs by 1")
        (student / "certificate.json").unlink(missing_ok=True)
