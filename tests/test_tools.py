"""The verbs around a run: JSON from each of them, doctor, estimate, trackers."""

import importlib.util
import json
import sqlite3
from types import SimpleNamespace

import pytest
import torch
import typer
from test_run import teacher  # noqa: F401  a fixture
from typer.testing import CliRunner

from linearize import doctor, tracking
from linearize.cli import app
from linearize.convert import convert, describe
from linearize.estimate import LENGTHS, estimate
from linearize.modeling.errors import ConversionError, RecipeError, TeacherError, TrainingError
from linearize.modeling.registry import METHODS
from linearize.progress import Progress
from linearize.recipe import Recipe, Teacher
from linearize.teacher import load_teacher
from linearize.train.finetune import FinetuneStage

STUDENT = "{student}"
VERBS = {
    "show": (["show"], "teacher"),
    "list methods": (["list", "methods"], "lolcats"),
    "list recipes": (["list", "recipes"], "quickstart"),
    "list families": (["list", "families"], "families"),
    "convert": (["convert", "{teacher}", "--output", "{new}", "method.window=8"], "checkpoint"),
    "unconvert": (["unconvert", STUDENT, "--output", "{new}"], "model"),
    "generate": (["generate", STUDENT, "Once", "--max-new-tokens", "2"], "continuation"),
    "push": (["push", STUDENT, "me/mine", "--dry-run"], "files"),
    "run": (["run", "{teacher}"], "results"),
    "eval": (["eval", STUDENT], "measured"),
    "tune": (["tune"], "rows"),
    "doctor": (["doctor"], "versions"),
    "estimate": (["estimate", "{teacher}", "method.window=8"], "stages"),
    "version": (["version"], "version"),
}


def verbs(group=None, prefix=""):
    """Every verb of the application with its command, those of groups included."""
    found = {}
    for name, command in (group or typer.main.get_command(app)).commands.items():
        if hasattr(command, "commands"):
            found |= verbs(command, f"{prefix}{name} ")
        else:
            found[f"{prefix}{name}"] = command
    return found


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("tools") / "student"
    made = CliRunner().invoke(app, ["convert", str(teacher), "--output", str(folder), "method.window=8"])
    assert made.exit_code == 0, made.output
    return folder


def test_every_verb_offers_json():
    found = verbs()
    assert VERBS.keys() <= found.keys()
    without = [
        name for name, verb in found.items() if "--json" not in [o for p in verb.params for o in p.opts]
    ]
    assert without == ["serve"]  # which answers over HTTP until it is stopped


@pytest.mark.parametrize("verb", VERBS)
def test_json_is_one_object_on_the_last_line(verb, teacher, student, tmp_path, monkeypatch):  # noqa: F811
    # What these measure has its own tests, and takes its time.
    (tmp_path / "results.json").write_text('{\n "results": {}\n}')
    made = SimpleNamespace(folder=tmp_path)
    monkeypatch.setattr(importlib.import_module("linearize.run"), "run", lambda *_, **__: made)
    results = SimpleNamespace(to_dict=lambda: {"measured": 1})
    monkeypatch.setattr(
        importlib.import_module("linearize.run"), "evaluate_checkpoint", lambda *_, **__: results
    )

    monkeypatch.setattr(importlib.import_module("linearize.tune"), "tune", lambda *_, **__: [])
    words, key = VERBS[verb]
    places = {"teacher": teacher, "student": student, "new": tmp_path / "new"}
    answer = CliRunner().invoke(app, [*(word.format(**places) for word in words), "--json"])
    assert answer.exit_code == 0, answer.output
    assert key in json.loads(answer.stdout.splitlines()[-1])


def test_doctor_finds_what_does_not_go_together(monkeypatch):
    fine = dict.fromkeys(doctor.NEEDED, "99.0") | {"triton": "99.0"}
    assert doctor.mismatches(fine) == []
    for name, bad, _ in doctor.KNOWN_BAD:
        older = bad.lstrip("<")
        assert doctor.mismatches(fine | {name: older}) == []
        major, minor = map(int, older.split("."))
        (problem,) = doctor.mismatches(fine | {name: f"{major}.{minor - 1}.9+cpu"})
        assert problem.startswith(f"{name} {major}.")
    assert doctor.mismatches({k: v for k, v in fine.items() if k != "peft"}) == [
        "peft: missing; pip install peft"
    ]
    monkeypatch.setattr(
        doctor.importlib.metadata, "requires", lambda _: ["triton==3.9.1; python_version > '3'"]
    )
    assert doctor.mismatches(fine) == ["triton 99.0: torch 99.0 wants triton==3.9.1; install that one"]
    assert doctor.mismatches(fine | {"triton": "3.9.1"}) == []


def test_doctor_says_of_every_method_what_it_runs_on_and_exits_by_what_it_found(monkeypatch):
    found = doctor.diagnose()
    assert found.methods.keys() == METHODS.keys()
    if not torch.cuda.is_available():
        assert "plain torch" in found.methods["lolcats"]
    assert found.versions["torch"] == torch.__version__
    for problems in ([], ["triton: missing"]):
        made = doctor.Diagnosis(
            *(getattr(found, name) for name in ("versions", "gpu", "compiler", "methods", "folders")),
            problems,
        )
        monkeypatch.setattr(doctor, "diagnose", lambda made=made: made)
        told = CliRunner().invoke(app, ["doctor"])
        assert told.exit_code == len(problems), told.output
        assert (problems or ["Nothing is wrong."])[0] in told.stdout


@pytest.mark.parametrize("method", ["lolcats", "window"])
def test_an_estimate_is_what_a_conversion_then_has(method):
    words = ["layers=[0,2]", "finetune.train_mixer=true", "transfer.tokens=1000", "finetune.tokens=3000"]
    recipe = Recipe.resolve("books-5m", method, words)
    made = estimate(recipe, device="cpu", tokens_per_second=50.0)
    model, _ = load_teacher(Teacher())
    assert made.parameters == sum(p.numel() for p in model.parameters())
    convert(model, recipe.method, recipe.layers)
    reports = describe(model)
    assert made.new_parameters == sum(report.parameters for report in reports)
    assert made.cache == {
        n: (sum(r.teacher_bytes(n) for r in reports), sum(r.cache_bytes(n) for r in reports)) for n in LENGTHS
    }
    transfer, finetune = made.stages
    stage = FinetuneStage(model, recipe.finetune)
    assert finetune.trained == sum(p.numel() for _, p in stage.named_parameters())
    assert (transfer.tokens, finetune.tokens) == (1000 if made.new_parameters else 0, 3000)
    assert finetune.seconds == 60
    assert finetune.memory > made.weights_bytes


def test_an_estimate_reads_no_weights_and_refuses_what_a_run_would(teacher, tmp_path):  # noqa: F811
    (tmp_path / "config.json").write_text((teacher / "config.json").read_text())
    made = estimate(Recipe.resolve(tmp_path, "lolcats"), device="cpu")
    assert made.stages[0].seconds is None
    assert made.parameters > 0
    measured = estimate(
        Recipe.resolve(tmp_path, "lolcats", ["data.seq_len=32", "method.window=8"]),
        device="cpu",
        measure=True,
    )
    assert all(stage.tokens_per_second > 0 for stage in measured.stages)
    with pytest.raises(ConversionError, match="layers: 9"):
        estimate(Recipe.resolve(tmp_path, "lolcats", ["layers=[9]"]), device="cpu")
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": "x"}'
    )
    with pytest.raises(TeacherError, match="hidden_size"):
        estimate(Recipe.resolve(tmp_path, "lolcats"), device="cpu")


# Trackers


def test_trackers_are_a_word_or_a_list_and_change_no_result():
    one, two = (
        Recipe.from_dict({"tracking": "wandb"}),
        Recipe.from_dict({"tracking": ["tensorboard", "trackio"]}),
    )
    assert (one.tracking, two.tracking) == (["wandb"], ["tensorboard", "trackio"])
    assert Recipe.from_dict({"tracking": "none"}) == Recipe.from_dict({})
    assert one.differences(two) == []
    with pytest.raises(RecipeError, match=r"tracking.*'wandbb' is unknown; did you mean 'wandb'"):
        Recipe.from_dict({"tracking": "wandbb"})


def test_a_missing_tracker_is_one_line_before_anything_is_done(monkeypatch, tmp_path):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda _: None)
    made = CliRunner().invoke(app, ["run", "tracking=trackio", f"output={tmp_path / 'run'}"])
    assert (made.exit_code, made.stderr) == (
        2,
        "error: tracking: trackio is not installed; pip install trackio\n",
    )
    assert not list(tmp_path.iterdir())


def test_trackers_hear_every_reading_and_are_finished(monkeypatch, tmp_path):
    import accelerate.tracking

    told = []

    class Recording:
        def __init__(self, run_name, **how):
            told.append((run_name, how["name"], how["resume"]))

        def start(self):
            told.append("start")

        def store_init_configuration(self, values):
            told.append(values["seed"])

        def log(self, values, **_):
            told.append(values)

        def finish(self):
            told.append("finish")

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", Recording)
    heard = []
    with tracking.tracked(["wandb"], tmp_path / "mine", {"seed": 3}, heard.append) as watch:
        watch(Progress("sample the teacher", 1, 2))
        watch(Progress("transfer", 10, 20, metrics={"loss": 0.5}))
    assert len(heard) == 2
    assert told == [
        *(("linearize", "mine", "allow"), "start", 3),
        *({"transfer/loss": 0.5, "transfer/tokens": 10}, "finish"),
    ]

    def broken(self):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(Recording, "start", broken)
    with (
        tracking.tracked(["wandb"], tmp_path, {}, None) as watch,
        pytest.raises(TrainingError, match=r"^tracking: wandb cannot start \(no network\); .*tracking=none$"),
    ):
        watch(Progress("transfer", 10, 20, metrics={"loss": 0.5}))


def tracked_by(name, folder):
    """By the real package, where it is installed; what it keeps goes below the folder."""
    pytest.importorskip(name, reason=f"{name} is not installed: pip install 'linearize[tracking]'")
    with tracking.tracked([name], folder, {"seed": 3}, None) as watch:
        for done in (10, 20):
            watch(Progress("transfer", done, 20, metrics={"loss": done / 2}))


@pytest.mark.filterwarnings("ignore")
def test_wandb_keeps_what_was_tracked_without_a_network(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracked_by("wandb", tmp_path)
    (kept,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"transfer/loss" in kept.read_bytes()
    assert capfd.readouterr().out == ""  # which belongs to results


@pytest.mark.filterwarnings("ignore")
def test_trackio_keeps_what_was_tracked_on_this_machine(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))
    tracked_by("trackio", tmp_path)
    with sqlite3.connect(tmp_path / "kept" / "linearize.db") as kept:
        rows = [json.loads(row) for (row,) in kept.execute("select metrics from metrics order by id")]
    assert [row["transfer/loss"] for row in rows if "transfer/loss" in row] == [5.0, 10.0]
    assert capfd.readouterr().out == ""


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_reads_what_was_tracked(tmp_path):
    tracked_by("tensorboard", tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tracking"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("transfer/loss")] == [(10, 5.0), (20, 10.0)]
