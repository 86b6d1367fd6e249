"""The certificate of a run: what it says, that it fails closed, and that every hashed thing is watched."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_run import WORDS, teacher  # noqa: F401  (a fixture)
from typer.testing import CliRunner

from linearize import certificate, identity, proof
from linearize.card import card
from linearize.cli import app
from linearize.convert import describe
from linearize.doubts import gates_after, reasons_of
from linearize.evaluate import Continuations, LmEval, Results, SuiteCell, SuiteResults
from linearize.evaluate.ablations import Row
from linearize.evaluate.continuation import Continued
from linearize.evaluate.gates import Gate, Gates
from linearize.evaluate.harness_rows import Score
from linearize.files import sha256_of
from linearize.loading import load
from linearize.modeling.errors import CheckpointError
from linearize.recipe import Recipe
from linearize.run import evaluate_checkpoint, run

OWN = [
    "control={enabled: true, methods: [window, matched_window, softmax]}",
    "evaluate.gates=true",
    "evaluate.ablations={enabled: true, per_layer: false}",
    "layers=[0]",
    "evaluate.recall_tasks=[passkey]",
]


BROKEN = Gates("failed", [Gate("batch", "failed", "layer 1, length 9", 1.0, 0.1), Gate("start", "passed")])


@pytest.fixture(scope="module")
def made(teacher, tmp_path_factory):  # noqa: F811
    output = tmp_path_factory.mktemp("certified") / "run"
    return run(Recipe.resolve(teacher, "lolcats", [*WORDS, *OWN, f"output={output}"]))


@pytest.fixture
def student(made, tmp_path):
    """A copy of the run's student, in a copy of the run."""
    left = shutil.ignore_patterns("control", "suite", "report*")
    return Path(shutil.copytree(made.folder, tmp_path / "run", ignore=left)) / "student"


def command(made, *words):
    return CliRunner().invoke(app, ["eval", str(made.checkpoint), *words])


def test_a_run_certifies_what_it_made(made, teacher):  # noqa: F811
    tree = certificate.read(made.checkpoint)
    assert tree["identity"]["student.weights"] == sha256_of(made.checkpoint / "model.safetensors")
    assert tree["identity"]["teacher.weights"] == sha256_of(teacher / "model.safetensors")
    assert tree["identity"]["student.recipe"] == sha256_of(made.checkpoint / "recipe.yaml")
    assert None not in tree["identity"].values()
    assert {"data.fingerprint", "data.files", "data.held-out windows of 64"} <= tree["identity"].keys()
    assert tree["training"]["tokens"] == {"transfer": 384, "finetune": 384}  # whole batches of 2 x 192
    mixer = sum(p.numel() for p in load(made.checkpoint)[0].mixers()[0].parameters() if p.requires_grad)
    assert tree["training"]["parameters"]["trained"]["transfer"] == mixer
    assert tree["training"]["device"] == "cpu" and tree["training"]["seconds"]["finetune"] > 0
    assert tree["plan"]["0"]["method"]["window"] == 8 and tree["plan"]["1"]["method"]["name"] == "softmax"
    assert tree["measured"] == json.loads(json.dumps(made.results.to_dict())) and tree["quoted"] == {}
    assert set(tree["controls"].values()) == {"measured"}
    assert tree["measured"]["gates"]["status"] == "passed"
    assert tree["not_run"] == ["suite", "continuation", "lm_eval", "speed"]
    assert tree["status"] == "incomplete"
    assert [r for r in tree["reasons"] if not r.startswith(("not run: ", "too few: "))] == []
    assert "too few: 5 figures of recall rest on 2 samples" in tree["reasons"]


def test_the_controls_are_what_their_names_say(made):
    below = made.folder / "control"
    student, matched = (
        {r.index: r for r in describe(load(at)[0])}
        for at in (made.checkpoint, below / "matched_window" / "student")
    )
    assert matched[0].method == "window" and {matched[1].method, matched[2].method} == {"softmax"}
    token = matched[0].kv_bytes_per_token
    assert (
        -token - 16 < matched[0].state_bytes - student[0].state_bytes <= 16
    )  # two counters beside the tokens
    softmax, _ = load(below / "softmax" / "student")
    assert not softmax.mixers()
    likelihood = made.results.likelihood[64]
    assert 0 < likelihood["softmax control"].kl < likelihood["window control"].kl
    done = json.loads((below / "softmax" / "finetune" / "done.json").read_text())
    assert done["tokens"] == 384
    for name in ("window", "matched_window", "softmax"):
        own = certificate.read(below / name / "student")
        assert own["training"]["tokens"]["finetune"] == 384 and own["measured"]["gates"] is None


def test_an_untouched_student_verifies(made):
    result = command(made, "--verify", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["mismatched"] == [] and record["not_checked"] == {}
    assert {"seal", *certificate.read(made.checkpoint)["identity"]} == set(record["matched"])


def edited(path, old, new):
    content = path.read_bytes()
    assert old in content, path
    path.write_bytes(content.replace(old, new, 1))


def first(folder, pattern):
    return next(iter(sorted(folder.glob(pattern))))


def flip(path):
    """One bit of the last byte: the file still reads."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


TAMPERED = {
    "student.weights": lambda at, t: (at / "model.safetensors", None),
    "student.tokenizer": lambda at, t: (at / "tokenizer_config.json", (b"{", b"{ ")),
    "student.config": lambda at, t: (at / "config.json", (b"{", b"{ ")),
    "plan.layer 0": lambda at, t: (at / "config.json", (b'"window": 8', b'"window": 9')),
    "student.code": lambda at, t: (at / "lolcats.py", (b"\n", b"\n\n")),
    "student.recipe": lambda at, t: (at / "recipe.yaml", (b"seed: 0", b"seed: 1")),
    "teacher.weights": lambda at, t: (t / "model.safetensors", None),
    "teacher.tokenizer": lambda at, t: (t / "tokenizer_config.json", (b"{", b"{ ")),
    "teacher.config": lambda at, t: (t / "config.json", (b"{", b"{ ")),
    "data.files": lambda at, t: (first(at.parent / "data", "self*.safetensors"), None),
    "seal": lambda at, t: (at / "certificate.json", (b'"status": "incomplete"', b'"status": "complete"')),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_every_hashed_thing_is_watched(made, teacher, name):  # noqa: F811
    path, change = TAMPERED[name](made.checkpoint, teacher)
    before = path.read_bytes()
    try:
        flip(path) if change is None else edited(path, *change)
        result = command(made, "--verify")
    finally:
        path.write_bytes(before)
    assert result.exit_code == 2
    assert name in result.stderr and "measure it again" in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_data_that_has_changed_is_named(made, monkeypatch):
    """As where a text file of the recipe is another than the one that was read."""
    real = proof.data_hashes
    monkeypatch.setattr(proof, "data_hashes", lambda fingerprint, *rest: real(f"{fingerprint}0", *rest))
    result = command(made, "--verify")
    assert result.exit_code == 2 and "student: data.fingerprint: not what" in result.stderr


def test_the_packages_code_is_watched_for_as_long_as_its_version_stays(made, monkeypatch):
    real = identity.sha256_of_files
    other = lambda paths, root: "0" if root.name == "linearize" else real(paths, root)  # noqa: E731
    monkeypatch.setattr(identity, "sha256_of_files", other)
    assert certificate.verify(made.checkpoint).mismatched == ["package"]
    monkeypatch.setattr(certificate, "__version__", "9.9")
    found = certificate.verify(made.checkpoint)
    assert found.mismatched == [] and found.not_checked["package"].endswith("this is 9.9")
    assert found.not_checked["data.fingerprint"] == "the data is not at hand"


def test_what_is_not_at_hand_is_said_and_not_passed_over(made, teacher):  # noqa: F811
    away = teacher.rename(teacher.with_name("away"))
    try:
        found = command(made, "--verify", "--json")
    finally:
        away.rename(teacher)
    assert found.exit_code == 0
    record = json.loads(found.stdout)
    assert record["not_checked"]["teacher.weights"] == "the teacher is not at hand"
    assert "teacher" in record["not_checked"]["data.fingerprint"]
    assert not {"teacher.weights", "data.fingerprint"} & set(record["matched"])


def test_measuring_again_renews_the_certificate_and_keeps_what_it_did_not_measure(made):
    before = certificate.read(made.checkpoint)
    words = ["evaluate.gates=false", "evaluate.ablations.enabled=false", "evaluate.recall_tasks=[]", "seed=4"]
    evaluate_checkpoint(made.checkpoint, words)
    after = certificate.read(made.checkpoint)
    assert after["measured"]["recall"] == before["measured"]["recall"]
    assert after["measured"]["ablations"] == before["measured"]["ablations"]
    assert after["evaluation"]["seed"] == 4
    weights = ("student.weights", "student.config", "data.fingerprint")
    assert [after["identity"][n] for n in weights] == [before["identity"][n] for n in weights]
    evaluate_checkpoint(made.checkpoint, [*words, "method.sparse_cache=4"])
    assert certificate.read(made.checkpoint) == after  # that student is not the folder's
    assert command(made, "--verify").exit_code == 0


def whole(made) -> Results:
    """Results against which nothing can be said."""
    model = {
        name: replace(m, sequences=50, sources=[replace(source, sequences=50) for source in m.sources])
        for name, m in made.results.likelihood[64].items()
    }
    rows = [replace(row, windows=50) for row in made.results.ablations.rows]
    # A part that the method does not have, and depths with few questions each, are no gaps.
    rows += [Row("window off, layer 0", "window_off", [0], 64, not_run="it has none", structural=True)]
    line = SuiteCell("t", "T", 64, None, "student", 50, 1, 0.9, 1, 50, 1, 1, 0, False, 60, "x", "1" * 50)
    deep = [replace(line, depth=depth, samples=10) for depth in (0.1, 0.3, 0.5, 0.7, 0.9)]
    return replace(
        made.results,
        likelihood={64: model},
        recall=[replace(cell, samples=50) for cell in made.results.recall],
        gates=Gates("passed", [Gate("one function", "passed")]),
        ablations=replace(made.results.ablations, rows=rows),
        suite=SuiteResults([line, *deep], [], 0, {"name": "noise", "sha256": "x"}),
        continuation=Continuations([], Continued("the text itself", 50, 64, 9, 0.1), 64, 64, 50, "x"),
        lm_eval=LmEval("1", [Score("piqa", "acc", "student", 0.7, 0.5, 0.9, 50)]),
    )


def test_a_certificate_is_complete_only_without_any_doubt(made, student, teacher):  # noqa: F811
    recipe = Recipe.from_file(made.folder / "recipe.yaml")

    def doubts(results, data=None):
        (student / "certificate.json").unlink(missing_ok=True)  # nothing measured before
        data = {"data.fingerprint": "x"} if data is None else data
        tree = certificate.certify(student, results, recipe, data=data)
        failed = any(reason.startswith("failed: ") for reason in tree["reasons"])
        assert tree["status"] == ("failed" if failed else "incomplete" if tree["reasons"] else "complete")
        return [reason for reason in tree["reasons"] if reason != "not run: speed"]

    sound = whole(made)
    assert doubts(sound, {}) == ["not hashed: data.fingerprint"]
    failed = Gates("failed", [Gate("batch", "failed", "layer 1, length 9", 1.0, 0.1)])
    assert doubts(replace(sound, gates=failed)) == ["failed: batch, layer 1, length 9"]
    undone = Gates("incomplete", [Gate("reload", "not run", note="no folder")])
    assert doubts(replace(sound, gates=undone)) == ["not run: gates.gates: reload (no folder)"]
    assert doubts(replace(sound, gates=None)) == ["not run: gates"]
    few = [replace(sound.recall[0], samples=49), *sound.recall[1:]]
    assert doubts(replace(sound, recall=few)) == ["too few: 1 figures of recall rest on 49 samples"]
    few = replace(sound.suite, cells=[replace(sound.suite.cells[0], samples=49), *sound.suite.cells[1:]])
    assert doubts(replace(sound, suite=few)) == ["too few: 1 figures of suite rest on 49 samples"]
    gap = [replace(row, structural=False) for row in sound.ablations.rows]
    gap = replace(sound, ablations=replace(sound.ablations, rows=gap))
    assert doubts(gap) == ["not run: ablations.rows: window off, layer 0 (it has none)"]
    nan = {64: {n: replace(m, kl=torch.nan) for n, m in sound.likelihood[64].items() if n == "student"}}
    assert doubts(replace(sound, likelihood=nan)) == ["not finite: likelihood.64.student.kl"]
    named = [name for name in sound.models if name != "softmax control"]
    assert doubts(replace(sound, models=named)) == ["control absent: softmax control"]
    finetune = (student.parent / "finetune").rename(student.parent / "away")
    assert doubts(sound) == ["not known: tokens of finetune"]
    finetune.rename(student.parent / "finetune")

    # All of it, and timed by the command itself.
    assert doubts(sound) == [] and certificate.read(student)["reasons"] == ["not run: speed"]
    words = ["bench", str(student), "--lengths", "32,64", "--batch", "1"]
    assert CliRunner().invoke(app, words).exit_code == 0
    tree = certificate.read(student)
    assert (tree["status"], tree["reasons"], tree["not_run"]) == ("complete", [], [])
    assert (
        tree["measured"]["speed"]["device"].startswith("CPU")
        and len(tree["measured"]["speed"]["points"]) == 8
    )
    assert "Certificate: complete" in card(student, "me/mine").text
    for path in (student / "model.safetensors", teacher / "model.safetensors"):
        flip(path)
        first = card(student, "me/mine").text.strip().split("\n\n")[1]
        assert "> **Certificate: says complete, and is of another student: " in first
        flip(path)


def test_gates_run_again_vouch_for_no_file_that_has_changed_since(student, teacher):  # noqa: F811
    """Nor for one that is not at hand: what else was measured rests on the hashes that stand there."""
    before, recipe = certificate.read(student), Recipe.from_file(student / "recipe.yaml")
    sound, config, own = (
        Gates.from_dict(before["measured"]["gates"]),
        teacher / "config.json",
        "tokenizer_config.json",
    )
    texts = config.read_bytes(), (student / own).read_bytes()
    try:
        edited(config, b"{", b"{ ")
        edited(student / own, b"{", b"{ ")
        for _ in range(2):
            tree = certificate.certify_gates(student, sound, recipe)
            changed = [r for r in tree["reasons"] if r.startswith("changed since measured: ")]
            assert sorted(r.rpartition(" ")[2] for r in changed) == ["student.tokenizer", "teacher.config"]
        assert sorted(certificate.verify(student).mismatched) == ["student.tokenizer", "teacher.config"]
    finally:
        config.write_bytes(texts[0])
        (student / own).write_bytes(texts[1])
    away = teacher.rename(teacher.with_name("elsewhere"))
    try:
        assert certificate.certify_gates(student, sound, recipe)["identity"] == before["identity"]
    finally:
        away.rename(teacher)
    tree = certificate.certify_gates(student, sound, recipe)
    assert {**tree, "origin": 0, "seal": 0} == {**before, "origin": 0, "seal": 0}


def test_sections_of_another_teacher_or_text_do_not_survive(made, student, teacher, tmp_path):  # noqa: F811
    recipe = Recipe.from_file(student / "recipe.yaml")
    less = replace(made.results, recall=[], ablations=None, gates=None)
    data = {n: h for n, h in certificate.read(student)["identity"].items() if n.startswith("data.")}
    certified = (student / "certificate.json").read_bytes()
    other = shutil.copytree(teacher, tmp_path / "other")
    flip(other / "model.safetensors")
    text = "data.held_out=[{kind: text, path: my.txt}]"
    for words, hashes in (
        ([f"teacher.name={other}"], data),
        ([text], data),
        ([], data | {"data.held-out windows of 64": "0"}),
    ):
        (student / "certificate.json").write_bytes(certified)
        measured = certificate.certify(student, less, recipe.override(words), data=hashes)["measured"]
        assert (measured["recall"], measured["ablations"]) == ([], None), words
        assert measured["gates"]["status"] == "passed"  # the student's alone
    (student / "certificate.json").write_bytes(certified)
    measured = certificate.certify(student, less, recipe, data=data)["measured"]
    assert measured["recall"] and measured["ablations"]


def test_what_is_kept_keeps_its_doubts_and_its_text(made, student):
    recipe, nan = Recipe.from_file(student / "recipe.yaml"), "not finite: likelihood.64.student.kl"
    data = {n: h for n, h in certificate.read(student)["identity"].items() if n.startswith("data.")}
    model = {
        name: replace(m, kl=torch.nan) if name == "student" else m
        for name, m in made.results.likelihood[64].items()
    }
    certificate.certify(student, replace(made.results, likelihood={64: model}), recipe, data=data)
    windows = data.pop("data.held-out windows of 64")
    for _ in range(2):
        tree = certificate.certify(
            student, replace(made.results, likelihood={}, windows={}), recipe, data=data
        )
        assert tree["measured"]["likelihood"]["64"]["student"]["kl"] is None and nan in tree["reasons"]
        assert tree["identity"]["data.held-out windows of 64"] == windows
    tree = certificate.certify_gates(student, Gates("passed", [Gate("batch", "passed")]), recipe)
    assert nan in tree["reasons"]
    assert nan not in certificate.certify(student, made.results, recipe, data=data)["reasons"]


def test_running_out_of_memory_mends_no_gate(student):
    recipe, full = Recipe.from_file(student / "recipe.yaml"), Gate("batch", "not run", note="out of memory")
    certificate.certify_gates(student, BROKEN, recipe)
    tree = certificate.certify_gates(student, Gates("incomplete", [full, Gate("start", "passed")]), recipe)
    assert tree["status"] == tree["measured"]["gates"]["status"] == "failed"
    assert "failed: batch, layer 1, length 9" in tree["reasons"]
    assert [gate["name"] for gate in tree["measured"]["gates"]["gates"]] == ["start", "batch"]
    infinite = Gates("failed", [Gate("batch", "failed", "layer 1, length 9", torch.inf, 0.1)])
    tree = certificate.certify_gates(student, infinite, recipe)
    assert "not finite: gates.gates[0].difference" in tree["reasons"]
    tree = certificate.certify_gates(student, Gates("passed", [Gate("batch", "passed")]), recipe)
    assert tree["status"] == "incomplete" and not [r for r in tree["reasons"] if "finite" in r]


@pytest.mark.parametrize(
    ("before", "now", "mended"),
    [
        ("one function: chunks", {"one function": "not run"}, False),
        ("one function: chunks", {"one function: single steps": "passed"}, False),
        ("one function: chunks", {"one function: chunks": "passed"}, True),
        ("padding", {"padding: left": "passed", "padding: right": "not run"}, False),
        ("padding", {"padding: left": "passed", "padding: right": "passed"}, True),
        ("generate", {"one function: generate": "passed"}, True),
        ("batch", {"integrity gates": "not run"}, False),
    ],
)
def test_a_failed_gate_stays_until_all_of_its_name_pass(before, now, mended):
    """A check that raised failed under its own name, and its gates have longer ones."""
    earlier = Gates("failed", [Gate(before, "failed", note="x")]).to_dict()
    found = gates_after(
        earlier, Gates("incomplete", [Gate(n, status) for n, status in now.items()]).to_dict()
    )
    failed = [reason for reason in reasons_of({"gates": found}) if reason.startswith("failed: ")]
    assert failed == ([] if mended else [f"failed: {before}, x"])
    assert (found["status"] == "failed") is not mended


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=8), inner, max_size=2),
    max_leaves=4,
)
PLACES = [
    ("teacher",), ("teacher", "name"), ("teacher", "revision"), ("origin",), ("origin", "versions"), ("measured",),
    ("measured", "gates"), ("identity",), ("identity", "teacher.weights"), ("evaluation",), ("evaluation", "data"),
    ("reasons",), ("status",), ("format",), ("seal",),
]  # fmt: skip


@given(place=st.sampled_from(PLACES), value=anything, absent=st.booleans())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_malformed_certificate_is_refused_in_one_line(made, place, value, absent):
    """Whatever stands in it, and where a key is missing; never is it taken for one that matches."""
    path = made.checkpoint / "certificate.json"
    before = path.read_text()
    tree = at = json.loads(before)
    for key in place[:-1]:
        at = at[key]
    if absent:
        del at[place[-1]]
    else:
        at[place[-1]] = value
    path.write_text(json.dumps(tree))
    told = ""
    try:
        assert certificate.verify(made.checkpoint).mismatched or tree == json.loads(before)
    except CheckpointError as error:
        told = str(error)
    finally:
        path.write_text(before)
    assert "\n" not in told


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("teacher", "books"),
        ("teacher", {"name": "~nobody/x", "revision": ["main"]}),
        ("origin", []),
        ("measured", None),
    ],
)
def test_the_command_refuses_a_malformed_certificate(student, key, value):
    path = student / "certificate.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    result = CliRunner().invoke(app, ["eval", str(student), "--verify"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    assert f"certificate.json: {key} is not as linearize writes it" in result.stderr


def test_a_folder_without_a_certificate_is_told_how_to_get_one(made, tmp_path):
    (tmp_path / "config.json").write_text((made.checkpoint / "config.json").read_text())
    result = CliRunner().invoke(app, ["eval", str(tmp_path), "--verify"])
    assert result.exit_code == 2 and "has no certificate.json; `linearize eval" in result.stderr
    (tmp_path / "certificate.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is no certificate"):
        certificate.verify(tmp_path)


def test_the_verb_runs_the_gates_alone(made, monkeypatch):
    seen = []

    def integrity(student, **terms):
        seen.append(terms)
        return Gates(
            "failed", [Gate("batch", "failed", "layer 1, length 9", 1.0, 0.1), Gate("start", "passed")]
        )

    monkeypatch.setattr("linearize.proof.integrity", integrity)
    result = command(made, "--gates")
    assert result.exit_code == 2
    assert "batch: layer 1, length 9, differs by 1, allowed 0.1" in result.stderr
    assert "passed  start" in result.stdout and result.stdout.endswith("Integrity: failed\n")
    assert (
        seen[0]["folder"] == made.checkpoint
        and seen[0]["train_len"] == 192
        and seen[0]["teacher"] is not None
    )
    command(made, "--gates", "method.sparse_cache=4")
    assert seen[1]["folder"] is None
