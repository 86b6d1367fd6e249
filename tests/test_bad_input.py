"""Every mistake a user can make, through the command line: one line that says what and how to mend it, exit code 2,
and nothing half-written."""

import errno
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_run import WORDS, teacher  # noqa: F401  a fixture
from tiny import UNSUPPORTED, tiny
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForMaskedLM, T5Config
from transformers import T5ForConditionalGeneration as T5
from typer.testing import CliRunner

from linearize.cli import app

SMALL = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=97)


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def run(folder, *words, model=None):
    """`linearize run` on a tiny teacher, in `folder`/run."""
    return call("run", model or folder / "teacher", *WORDS, f"output={folder / 'run'}", *words)


def convert(folder, *words, model=None):
    return call("convert", model or folder / "teacher", "--output", folder / "student", *words)


def saved(folder):
    """A saved student, to be spoilt."""
    made = convert(folder, "method.window=8")
    assert made.exit_code == 0, made.output
    return folder / "student"


def wrong_id(folder):
    return run(folder, model="nobody/no-such-model")


def no_weights(folder):
    (folder / "teacher" / "model.safetensors").unlink()
    return run(folder)


def no_config(folder):
    (folder / "teacher" / "config.json").unlink()
    return run(folder)


def other_model(folder, model):
    for path in ("config.json", "model.safetensors", "generation_config.json"):
        (folder / "teacher" / path).unlink(missing_ok=True)
    model.save_pretrained(folder / "teacher")
    return run(folder)


def encoder(folder):
    return other_model(folder, BertForMaskedLM(BertConfig(**SMALL)))


def encoder_decoder(folder):
    sizes = dict(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=97)
    return other_model(folder, T5(T5Config(**sizes)))


def family(name):
    def build(folder):
        fields = UNSUPPORTED[name] | {"vocab_size": 8192}
        return other_model(folder, AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **fields)))

    return build


def text(folder, content):
    (folder / "my.txt").write_text(content)
    return run(folder, f"data.sources=[{{kind: text, path: {folder / 'my.txt'}}}]")


def unreadable(folder):
    (folder / "my.parquet").write_bytes(b"not parquet at all")
    return run(folder, f"data.sources=[{{kind: text, path: {folder / 'my.parquet'}}}]")


def missing_field(folder):
    (folder / "my.jsonl").write_text('{"body": "words"}\n' * 10)
    return run(folder, f"data.sources=[{{kind: text, path: {folder / 'my.jsonl'}}}]")


def disk_full_on_save(folder):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        return convert(folder, "method.window=8")


def disk_full_on_run(folder):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "recipe.yaml")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["linearize.run_folder"], "write_text", full)
        return run(folder)


def occupied_output(folder):
    (folder / "run").mkdir()
    (folder / "run" / "thesis.txt").write_text("years of work")
    return run(folder)


def occupied_checkpoint(folder):
    (folder / "student").mkdir()
    (folder / "student" / "thesis.txt").write_text("years of work")
    return convert(folder, "method.window=8")


def truncated(folder):
    weights = saved(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return call("generate", folder / "student", "Once")


def corrupted(folder):
    weights = saved(folder) / "model.safetensors"
    weights.write_bytes(b"\xff" * 64 + weights.read_bytes()[64:])
    return call("generate", folder / "student", "Once")


def tensor_missing(folder):
    path = saved(folder) / "model.safetensors"
    tensors = load_file(path)
    del tensors[next(name for name in tensors if "mixer" in name)]
    save_file(tensors, path, metadata={"format": "pt"})
    return call("generate", folder / "student", "Once")


def newer_format(folder):
    path = saved(folder) / "config.json"
    config = json.loads(path.read_text())
    config["linearize"]["format"] = 99
    path.write_text(json.dumps(config))
    return call("generate", folder / "student", "Once")


def output_below_a_file(folder):
    (folder / "my.txt").write_text("words")
    return run(folder, f"output={folder / 'my.txt' / 'run'}")


def other_recipe(folder):
    (folder / "run").mkdir()
    shown = call("show", folder / "teacher", *WORDS)
    (folder / "run" / "recipe.yaml").write_text(shown.stdout)
    return run(folder, "method.window=16")


BAD_INPUT = {
    "wrong model id": (wrong_id, "nobody/no-such-model"),
    "folder without weights": (no_weights, "no weights"),
    "folder without config": (no_config, "no config.json"),
    "misspelt name of a recipe": (lambda f: run(f, model="quickstrt"), "did you mean 'quickstart'?"),
    "folder that is not there": (lambda f: run(f, model="./nowhere"), "./nowhere"),
    "encoder": (encoder, "bert is an encoder"),
    "encoder-decoder": (encoder_decoder, "t5 is an encoder-decoder"),
    "unsupported family: bloom": (family("bloom"), "bloom:"),
    "unsupported family: mpt": (family("mpt"), "mpt:"),
    "unknown method": (
        lambda f: run(f, "--method", "lolcat"),
        "method.name: 'lolcat' is unknown; did you mean",
    ),
    "unknown key": (lambda f: run(f, "method.widow=8"), "method.widow: unknown key; did you mean 'window'?"),
    "unknown verb's word": (lambda f: run(f, "oops"), "'oops': not an override"),
    "impossible window": (lambda f: run(f, "method.window=0"), "window: 0"),
    "window as long as the sequence": (lambda f: run(f, "method.window=192"), "method.window: 192 covers"),
    "impossible feature width": (lambda f: run(f, "method.feature_dim=7"), "feature_dim: 7"),
    "feature width wider than the head": (lambda f: run(f, "method.feature_dim=4096"), "feature_dim: 4096"),
    "layer that is not there": (lambda f: run(f, "layers=[9]"), "layers: 9"),
    "empty data": (lambda f: text(f, ""), "my.txt"),
    "missing data": (lambda f: run(f, "data.sources=[{kind: text, path: nowhere.txt}]"), "nowhere.txt"),
    "unreadable data": (unreadable, "my.parquet"),
    "missing field": (missing_field, "body"),
    "text shorter than one sequence": (lambda f: text(f, "Too short."), "192"),
    "disk full while saving": (disk_full_on_save, "No space left"),
    "disk full in a run": (disk_full_on_run, "no space left on device; free some space"),
    "output below a file": (output_below_a_file, "not a directory; choose another folder"),
    "output folder that exists": (occupied_output, "exists and is not a run; choose another folder"),
    "checkpoint folder that exists": (occupied_checkpoint, "exists already"),
    "truncated checkpoint": (truncated, "cannot be read"),
    "corrupted checkpoint": (corrupted, "cannot be read"),
    "checkpoint with a tensor missing": (tensor_missing, "missing"),
    "checkpoint of a newer format": (newer_format, "newer"),
    "not a checkpoint": (lambda f: call("eval", f / "teacher"), "not a saved student"),
    "no such checkpoint": (lambda f: call("eval", "nowhere"), "nowhere: not a saved student"),
    "no such checkpoint to unconvert": (
        lambda f: call("unconvert", "nowhere", "--output", f / "student"),
        "nowhere: not a saved student",
    ),
    "temperature without sampling": (
        lambda f: call("generate", f / "teacher", "Once", "--temperature", "0.5"),
        "--temperature, --seed: nothing is sampled; add --sample",
    ),
    "impossible temperature": (
        lambda f: call("generate", f / "teacher", "Once", "--sample", "--temperature", "0"),
        "temperature: 0 is impossible",
    ),
    "not a repository": (
        lambda f: call("push", saved(f), "a/b/c", "--dry-run"),
        "a/b/c: not a repository id",
    ),
    "repository without owner": (lambda f: call("push", saved(f), "mine", "--dry-run"), "write owner/mine"),
    "upload without network": (
        lambda f: call("push", saved(f), "me/mine"),
        "me/mine: the upload was interrupted",
    ),
    "resume with a changed recipe": (other_recipe, "another recipe (method.window differ)"),
}


@pytest.fixture
def folder(teacher, tmp_path):  # noqa: F811
    shutil.copytree(teacher, tmp_path / "teacher")
    return tmp_path


@pytest.mark.parametrize("mistake", BAD_INPUT)
def test_a_mistake_gives_one_line_code_2_and_leaves_nothing_half_written(mistake, folder):
    act, expected = BAD_INPUT[mistake]
    made = act(folder)
    assert made.exit_code == 2, made.output
    assert not made.stdout
    assert made.stderr.count("\n") == 1
    assert made.stderr.startswith("error: ")
    assert expected in made.stderr
    # What the case itself put there may stand; of ours nothing may.
    allowed = {"teacher", "my.txt", "my.jsonl", "my.parquet", "student", "run"}
    assert {path.name for path in folder.iterdir()} <= allowed
    left = {path.name for path in (folder / "run").rglob("*")}
    assert left <= {"thesis.txt", "recipe.yaml"}
    if "recipe.yaml" in left:
        assert mistake == "resume with a changed recipe"
    if (folder / "student").exists() and not (folder / "student" / "thesis.txt").exists():
        assert (folder / "student" / "config.json").exists()


def test_the_tiny_teacher_itself_is_fine(folder):
    assert tiny is not None and torch.get_num_threads() >= 1
    assert convert(folder, "method.window=8").exit_code == 0
