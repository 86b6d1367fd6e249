"""Publishing: what would go, under which name, with which card; and the way to a Hub and back."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import READER, TOKEN, Repository, serving
from huggingface_hub import ModelCard, constants
from recorded_run import make_run
from safetensors.torch import load_file
from tiny import tiny
from typer.testing import CliRunner

from linearize import checkpoint
from linearize.card import card
from linearize.certificate import certify
from linearize.cli import app
from linearize.convert import convert
from linearize.evaluate import Gates, Results
from linearize.hub import push
from linearize.licence import Licence, licence_of
from linearize.loading import load
from linearize.methods import adjust
from linearize.modeling.errors import CheckpointError, HubError, RecipeError, TeacherError
from linearize.modeling.lolcats import LolcatsConfig
from linearize.modeling.window import WindowConfig
from linearize.recipe import Recipe, Teacher
from linearize.run import evaluate_checkpoint, run


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    model = convert(tiny("llama"), LolcatsConfig(window=4))
    extra = {"recipe.yaml": Recipe.resolve("owner/teacher").to_yaml()}
    folder = tmp_path_factory.mktemp("untrained") / "student"
    return checkpoint.save(model, None, folder, extra=extra, max_shard_size="60KB")


@pytest.fixture
def student(untrained, tmp_path):
    return Path(shutil.copytree(untrained, tmp_path / "run" / "student"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of this machine, which this process and those it starts use, with a token that may write."""
    with serving() as server:
        home = tmp_path / "home"
        for name, value in {
            "HF_HUB_OFFLINE": False,
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(home / "hub"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()


def large(folder):
    """sha256 of the weights' files."""
    from linearize.files import sha256_of

    return [sha256_of(path) for path in sorted(Path(folder).glob("*.safetensors"))]


def test_a_dry_run_names_every_file_and_needs_no_network(student):
    for given in (student, student.parent):
        made = push(given, "me/mine", dry_run=True)
        assert set(made.files) == {path.name for path in student.iterdir()} | {"README.md"}
        assert made.url == "https://huggingface.co/me/mine"


def test_the_card_tells_how_to_load_and_what_was_measured(student):
    (student.parent / "table.md").write_text("| measured |\n")
    made = card(student, "me/mine")
    # Without it the tokenizer asks on the terminal, too: it reads the configuration first.
    for kind in ("AutoModelForCausalLM", "AutoTokenizer"):
        assert f'{kind}.from_pretrained("me/mine", trust_remote_code=True)' in made.text
    assert "| measured |" in made.text
    assert made.data.base_model == "owner/teacher"
    assert "lolcats" in made.data.tags
    assert "Unknown" in made.text.partition("## Licence")[2]


def test_the_card_names_the_methods_of_the_folder_and_not_of_its_run(tmp_path):
    """A control is saved with the recipe of its run."""
    extra = {"recipe.yaml": Recipe.resolve("owner/teacher").to_yaml()}
    model = convert(tiny("llama"), WindowConfig(window=4), [0, 2])
    made = card(checkpoint.save(model, None, tmp_path / "control", extra=extra), "me/mine")
    assert "replaced by `window`" in made.text
    assert "window" in made.data.tags and "lolcats" not in made.data.tags


def test_the_card_says_when_the_student_is_not_as_it_was_measured(tmp_path):
    recipe = Recipe.resolve("owner/teacher", overrides=["method.window=4"])
    model, extra = convert(tiny("llama"), recipe.method, [0, 1]), {"recipe.yaml": recipe.to_yaml()}
    (tmp_path / "table.md").write_text("| measured |\n")
    before, after = (
        card(checkpoint.save(adjust(model, **fields), None, tmp_path / name, extra=extra), "me/mine").text
        for name, fields in {"student": {}, "sparse": {"sparse_cache": 6}}.items()
    )
    assert "| measured |" in before and "set anew" not in before
    assert "set anew" in after


def test_a_card_that_cannot_have_plots_says_why(student, monkeypatch, caplog):
    record = json.loads((make_run(student.parent / "recorded") / "results.json").read_text())
    odd = record["results"]["recall"][0] | {"task": "../x](y) <b>"}
    results = record["results"] | {"recall": [odd], "likelihood": {}}
    (student.parent / "table.md").write_text("| measured |\n")

    def assets(tree):
        (student.parent / "results.json").write_text(json.dumps({"results": tree}))
        return [name for name in push(student, "me/mine", dry_run=True).files if "/" in name]

    assert assets(results) == ["assets/memory.png", "assets/recall-x-y-b.png"]
    assert not caplog.messages
    assert assets(results | {"recall": [{"of": "another version"}]}) == []
    assert "the results are of another version" in caplog.text
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert assets(results) == []
    assert "which need matplotlib; pip install 'linearize[report]'" in caplog.text


def test_a_student_of_which_nothing_is_certified_says_so_and_a_broken_certificate_does_not_go(student):
    def first():
        return card(student, "me/mine").text.strip().split("\n\n")[1]

    assert first() == "> **No certificate: nothing was checked.**"
    assert "certificate.json" not in push(student, "me/mine", dry_run=True).files
    for broken in ("{", "[]", '{"format": 1, "identity": {}, "status": "complete"}'):
        (student / "certificate.json").write_text(broken)
        assert "complete; see" not in first() and first().startswith("> **Certificate: ")
        with pytest.raises(HubError, match=r"certificate\.json: .*measure the student again, or remove it"):
            push(student, "me/mine", dry_run=True, allow_failed=True)


def test_an_incomplete_certificate_comes_first_and_its_results_are_in_the_hubs_format(student):
    """Read from a file of another version: what is unknown or broken there is left out."""
    measured = {"ppl": 12.5, "kl": 0.25, "top1": None, "sequences": 20, "intervals": {"ppl": [12, 13]}}
    cell = {"task": "passkey", "length": 256, "correct": 30, "samples": 40, "low": 0.6, "high": 0.86}
    results = {
        "source": "books",
        "likelihood": {"512": {"student": measured, "teacher": {}}, "1024": None},
        "recall": [cell | {"model": "student"}, cell | {"model": "teacher", "correct": 40}, 7],
        "lm_eval": {"tasks": [{"task": "piqa", "model": "student", "metric": "acc", "value": 0.7}, None]},
    }
    certificate = {
        "status": "incomplete",
        "results": results,
        "gates": {"gates": [{"name": "leak", "status": "failed"}, 3]},
        "not_run": [{"name": "ablations"}, "speed"],
    }
    (student / "certificate.json").write_text(json.dumps(certificate))
    (student.parent / "table.md").write_text("| measured |\n")
    made = card(student, "me/mine", licence=Licence("apache-2.0", "the card of owner/teacher"))
    first = made.text.strip().partition("\n\n")[2].partition("\n\n")[0]
    assert "incomplete" in first and "leak" in first and "ablations, speed" in first
    read = ModelCard(str(made)).data  # as the Hub reads it
    assert read.license == "apache-2.0"
    found = {(r.dataset_name, r.metric_type): r for r in read.eval_results}
    assert found["books, 512 tokens", "perplexity"].metric_value == 12.5
    assert found["books, 512 tokens", "perplexity"].metric_args == {"windows": 20, "interval_95": [12, 13]}
    assert found["passkey, 256 tokens", "accuracy"].metric_value == 0.75
    assert found["piqa", "acc"].metric_value == 0.7 and len(found) == 4
    assert "passkey at 256 tokens: 75%, original 100%" in made.text
    for broken in ("{", "[]", '{"status": 3, "results": [], "gates": 1, "not_run": "x"}'):
        (student / "certificate.json").write_text(broken)
        assert (
            "# teacher" in card(student, "me/mine").text or "owner/teacher" in card(student, "me/mine").text
        )


@pytest.mark.parametrize(
    ("files", "found", "forbids"),
    [
        ({"README.md": "---\nlicense: mit\n---\n"}, "mit", False),
        ({"README.md": "---\nlicense: cc-by-nc-nd-4.0\n---\n"}, "cc-by-nc-nd-4.0", True),
        ({"README.md": "---\nlicense: other\nlicense_name: acme-no-derivatives\n---\n"}, "other", True),
        ({"README.md": "---\nlicense: other\nlicense_name: brand-new\n---\n"}, "other", False),
        ({"README.md": "# words\n", "LICENSE": "MIT\nPermission is hereby granted, free of charge"}, "mit", False),
        ({"LICENSE.txt": "Attribution-NoDerivatives 4.0 International"}, "other", True),
        ({}, None, False),
    ],
)  # fmt: skip
def test_the_licence_is_the_teachers(files, found, forbids, tmp_path, student):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for name, text in files.items():
        (teacher / name).write_text(text)
    licence = licence_of(Teacher(name=str(teacher)))
    assert (licence.id, bool(licence.forbids)) == (found, forbids)
    recipe = Recipe.from_file(student / "recipe.yaml").override([f"teacher.name={teacher}"])
    (student / "recipe.yaml").write_text(recipe.to_yaml())
    if forbids:
        with pytest.raises(HubError, match="forbids derivatives"):
            push(student, "me/mine", dry_run=True)
    assert push(student, "me/mine", dry_run=True, allow_licence=True).files


def test_a_push_that_broke_off_goes_on_where_it_was(student, hub):
    shards = large(student)
    assert len(shards) > 3
    hub.drop = shards[2]
    with pytest.raises(HubError, match=r"me/mine: the upload was interrupted .*push again") as error:
        push(student, "me/mine", private=True)
    assert "secret" not in str(error.value) and TOKEN not in str(error.value)
    assert hub.sent == shards[:2] and hub.repositories["me/mine"].private
    assert not hub.repositories["me/mine"].files("main")[1]  # nothing half-done is to be seen
    hub.drop = None
    pushed = push(student, "me/mine")
    assert hub.sent == shards  # each once
    there = hub.repositories["me/mine"].files("main")[1]
    assert set(there) == set(pushed.files)
    assert all(there[path.name] == path.read_bytes() for path in student.iterdir())
    before = len(hub.repositories["me/mine"].commits)
    push(student, "me/mine")
    assert hub.sent == shards and len(hub.repositories["me/mine"].commits) == before


def test_a_branch_of_its_own_and_an_older_student_that_makes_room(student, hub, tmp_path):
    push(student, "me/mine")
    model, _ = checkpoint.load(student)
    whole = checkpoint.save(model, None, tmp_path / "whole")
    push(whole, "me/mine", revision="next")
    repository = hub.repositories["me/mine"]
    assert {"model.safetensors.index.json", "recipe.yaml"} <= set(repository.files("main")[1])
    there = repository.files("next")[1]
    assert [name for name in there if ".safetensors" in name] == ["model.safetensors"]
    assert b'from_pretrained("me/mine", revision="next", ' in there["README.md"]


def test_what_the_hub_refuses_is_one_line_of_ours(student, hub, monkeypatch):
    def said():
        made = CliRunner().invoke(app, ["push", str(student), "me/mine"])
        *progress, line = made.output.splitlines()
        assert made.exit_code == 2 and line.startswith("error: me/mine: "), made.output
        assert all(words.startswith("upload: ") for words in progress)
        for secret in (TOKEN, READER, "hf_nobody"):
            assert secret not in made.output
        return made.output

    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    assert "(401); `hf auth login`" in said()
    monkeypatch.setenv("HF_TOKEN", READER)
    assert "may not write there (403)" in said()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push(student, "me/mine")
    monkeypatch.setenv("HF_TOKEN", READER)  # a repository that exists and is read-only
    (student / "new.txt").write_text("new")
    assert "may not write there (403)" in said()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for hub.conflict in (409, 412):
        assert f"somebody else is changing it ({hub.conflict})" in said()
    hub.conflict = 0
    for held, words in (
        ({"config.json": b'{"model_type": "bert"}'}, "a model of type 'bert'"),
        ({"data.bin": b"1"}, "other files (data.bin"),
    ):
        hub.repositories["me/mine"] = Repository(commits={"f" * 40: held}, branches={"main": "f" * 40})
        shutil.rmtree(constants.HF_HUB_CACHE)
        assert f"exists already and holds {words}" in said()
    assert hub.sent == large(student)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the embedded teacher, as small as runs are."""
    text = tmp_path_factory.mktemp("text") / "counting.txt"
    text.write_text("<|endoftext|>".join(f"{n} sheep and {n + 1} goats. " * 40 for n in range(90)))
    words = [
        "data.seq_len=128",
        f"data.sources=[{{kind: text, path: {text}}}]",
        "layers=[0, 1, 2]",
        "method.window=16",
        "transfer.tokens=512",
        "finetune.tokens=512",
        "evaluate.seq_lens=[64]",
        "evaluate.sequences=2",
        "evaluate.recall_lens=[128]",
        "evaluate.recall_samples=2",
        "evaluate.generate_tokens=0",
        "evaluate.gates=false",
    ]
    folder = tmp_path_factory.mktemp("runs") / "mine"
    run(Recipe.resolve("books-5m", "lolcats", [*words, f"output={folder}"]))
    return folder


ROUND_TRIP = """
import sys, torch
{snippet}
assert not any(name.split(".")[0] == "linearize" for name in sys.modules)
torch.save(model(torch.arange(3, 90)[None]).logits, "logits.pt")
"""


def test_there_and_back_again(finished, hub, tmp_path):
    """Pushed, then loaded by the card's own words in a process without this package, bit-equal; then measured."""
    planned = push(finished, "me/mine", dry_run=True).files
    pushed = CliRunner().invoke(app, ["push", str(finished), "me/mine", "--json"])
    assert pushed.exit_code == 0, pushed.output
    said = json.loads(pushed.stdout.splitlines()[-1])
    assert {"recipe.yaml", "README.md", "tokenizer.json"} <= set(said["files"])
    there = hub.repositories["me/mine"].files("main")[1]
    assert planned == said["files"] == sorted(there)
    read = ModelCard(there["README.md"].decode())
    assert read.data.license == "cc0-1.0"
    shown = re.findall(r"!\[[^]]+\]\((.*?)\)", read.text)
    assert shown == [
        f"assets/{name}.png" for name in ("recall-passkey", "recall-number-in-text", "kl", "memory")
    ]
    assert all(there[name].startswith(b"\x89PNG\r\n") for name in shown)
    before = len(hub.repositories["me/mine"].commits)
    push(finished, "me/mine")  # the same pictures, byte for byte: nothing to commit
    assert len(hub.repositories["me/mine"].commits) == before
    assert {"perplexity", "accuracy"} <= {result.metric_type for result in read.data.eval_results}
    snippet = re.findall(r"```python\n(.*?)```", read.text, re.DOTALL)[0]
    environment = {
        **{key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")},
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "fresh"),
        "PYTHONPATH": "",
    }
    made = subprocess.run(
        [sys.executable, "-c", ROUND_TRIP.format(snippet=snippet)],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "The old man" in made.stdout
    measured = CliRunner().invoke(app, ["eval", "me/mine", "evaluate.recall_tasks=[]", "--json"])
    assert measured.exit_code == 0, measured.output
    results = json.loads(measured.stdout.splitlines()[-1])
    ours = json.loads((finished / "results.json").read_text())["results"]
    assert results["windows"] == ours["windows"]
    assert results["likelihood"]["64"]["student"]["ppl"] == ours["likelihood"]["64"]["student"]["ppl"]
    model, _ = checkpoint.load(finished / "student")
    with torch.no_grad():
        expected = model(torch.arange(3, 90)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


def test_adapters_alone_are_the_student_and_stay_off_other_models(finished, hub, tmp_path):
    from peft import PeftModel

    made = push(finished, "me/adapters", adapter_only=True)
    assert "model.safetensors" not in made.files and "adapter_model.safetensors" in made.files
    assert "certificate.json" in made.files
    there = hub.repositories["me/adapters"].files("main")[1]
    weights = (finished / "student" / "model.safetensors").stat().st_size
    assert sum(len(content) for content in there.values()) < weights / 5
    assert b'linearize.load("me/adapters")' in there["README.md"]
    model, tokenizer = load("me/adapters")
    expected = load_file(finished / "student" / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert len(tokenizer) == len(load("books-5m")[1])
    folder = tmp_path / "adapters"
    folder.mkdir()
    for name, content in there.items():
        if "/" not in name:
            (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"load-with-linearize\.load"):
        PeftModel.from_pretrained(load("books-5m")[0], folder)
    record = json.loads((folder / "linearize_adapter.json").read_text())
    (folder / "linearize_adapter.json").write_text(json.dumps(record | {"base": "0"}))
    with pytest.raises(CheckpointError, match="belong to other weights than books-5m"):
        load(folder)
    for key in ("trust_remote_code", "allow_pickle"):
        asked = record | {"teacher": record["teacher"] | {key: True}}
        (folder / "linearize_adapter.json").write_text(json.dumps(asked))
        with pytest.raises(CheckpointError, match=f"teacher.{key}: nothing that is downloaded may ask"):
            load(folder)
    (folder / "mixers.safetensors").write_bytes(b"none")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(folder)


def test_adapters_that_no_run_kept_are_not_pushed(student):
    with pytest.raises(HubError, match="holds no finished adapters"):
        push(student, "me/mine", adapter_only=True, dry_run=True)


TRUST = "teacher.trust_remote_code=true"


def test_a_recipe_from_the_hub_cannot_run_its_teachers_code(student, hub, tmp_path, monkeypatch):
    """By no verb, and not again where its certificate is verified; who evaluates it may ask for it."""
    recipe = Recipe.from_file(student / "recipe.yaml").override([TRUST])
    (student / "recipe.yaml").write_text(recipe.to_yaml())
    certify(student, Results("books", [], 0, {}, [], {}), recipe, data={"data.fingerprint": "0" * 64})
    push(student, "me/mine")
    trusted, refusal = [], "the recipe of me/mine asks to run code of owner/teacher"

    def load_teacher(spec, *_):
        trusted.append(spec.trust_remote_code)
        raise TeacherError("was asked for")

    for module in ("proof", "run"):
        monkeypatch.setattr(sys.modules[f"linearize.{module}"], "load_teacher", load_teacher)
    monkeypatch.setattr("linearize.proof.integrity", lambda *_, **__: Gates("passed", []))
    with pytest.raises(RecipeError, match=refusal):
        evaluate_checkpoint("me/mine")
    for words in ([], ["--gates"], ["--ablations"], ["--suite", "smoke"]):
        said = CliRunner().invoke(app, ["eval", "me/mine", *words])
        assert said.exit_code == 2 and refusal in said.stderr and TRUST in said.stderr, said.output
    (tmp_path / "data").mkdir()
    monkeypatch.setattr("linearize.proof.data_folder", lambda _: tmp_path / "data")
    said = json.loads(CliRunner().invoke(app, ["eval", "me/mine", "--verify", "--json"]).stdout)
    assert refusal in said["not_checked"]["data.fingerprint"] and not trusted
    for words in ([], ["--gates"]):
        CliRunner().invoke(app, ["eval", "me/mine", TRUST, *words])
    assert trusted == [True, True]

    tasks = ["teacher.trust_remote_code=false", "evaluate.lm_eval={tasks: [x], folder: /somewhere}"]
    (student / "recipe.yaml").write_text(recipe.override(tasks).to_yaml())
    push(student, "me/tasks")
    with pytest.raises(
        RecipeError, match=r"recipe of me/tasks asks for the tasks in /somewhere, which may hold"
    ):
        evaluate_checkpoint("me/tasks")
    with pytest.raises(TeacherError):
        evaluate_checkpoint("me/tasks", ["evaluate.lm_eval.folder=null"])
    with pytest.raises(CheckpointError, match="me/nothing: no such folder, and the Hub does not give it"):
        evaluate_checkpoint("me/nothing")
