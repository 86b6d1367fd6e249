"""A saved student: bit-equal in a process without this package, complete or absent, damaged files refused in words."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, ids, randomise, student, tiny, variants
from transformers import AutoModelForCausalLM

from linearize import checkpoint
from linearize.convert import unconvert
from linearize.modeling.attention import SOURCE, attention_mode
from linearize.modeling.errors import CheckpointError
from linearize.modeling.lolcats import LolcatsConfig

CONFIG = LolcatsConfig(window=8)
WITHOUT_PACKAGE = """
import sys
sys.modules["linearize"] = None  # any import of the package fails
import torch
from transformers import AutoModelForCausalLM
once, *folders = sys.argv[1:]
for folder in folders:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    expected = torch.load(folder + ".pt")
    def check(model):
        x = expected["x"]
        with torch.no_grad():
            assert torch.equal(model(x).logits, expected["logits"]), "logits"
            tokens = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=6, do_sample=False)
        assert torch.equal(tokens, expected["tokens"]), "tokens"
    check(model)
    if once == "once":
        continue
    model.save_pretrained(folder + "-again")
    check(AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True, dtype="auto"))
print("equal")
"""


def run(script, *arguments, tmp_path):
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)


@torch.no_grad()
def save_with_answers(model, folder, **kwargs):
    x = ids(2, 20)
    checkpoint.save(model, None, folder, **kwargs)
    mask = torch.ones_like(x)
    tokens = model.generate(x, attention_mask=mask, max_new_tokens=6, do_sample=False)
    answers = {"x": x, "logits": model(x).logits, "tokens": tokens}
    torch.save(answers, f"{folder}.pt")
    return answers


def test_every_family_reloads_bit_equal_without_the_package(tmp_path):
    folders = []
    for family in FAMILIES:
        dtype = torch.bfloat16 if family == "qwen3" else torch.float32
        model = student(
            family, CONFIG, layers="all" if family in ("llama", "mixtral", "qwen3") else [1], dtype=dtype
        )
        folder = tmp_path / family
        answers = save_with_answers(
            model, folder, max_shard_size="20KB" if family in ("gpt2", "mixtral") else "5GB"
        )
        assert len(list(folder.glob("*.safetensors"))) > 1 or family not in ("gpt2", "mixtral")
        again, tokenizer = checkpoint.load(folder)
        assert tokenizer is None and again.dtype == dtype
        assert {p.dtype for m in again.mixers().values() for p in m.parameters()} == {torch.float32}
        with torch.no_grad():
            assert torch.equal(again(answers["x"]).logits, answers["logits"]), family
        folders.append(folder)
    result = run(WITHOUT_PACKAGE, "again", *folders, tmp_path=tmp_path)
    assert result.stdout.strip() == "equal", result.stderr[-2000:]


def test_every_method_reloads_bit_equal_without_the_package(tmp_path):
    """One folder with a layer of every variant: a layer that came back otherwise would change what leaves the last."""
    configs = dict(enumerate(variants().values()))
    folder = tmp_path / "student"
    model = student("llama", configs, dtype=torch.float32, num_hidden_layers=len(configs))
    answers = save_with_answers(model, folder)
    again, _ = checkpoint.load(folder)
    assert {index: mixer.config for index, mixer in again.mixers().items()} == configs
    with torch.no_grad():
        assert torch.equal(again(answers["x"]).logits, answers["logits"])
    result = run(WITHOUT_PACKAGE, "again", folder, tmp_path=tmp_path)
    assert result.stdout.strip() == "equal", result.stderr[-2000:]


def test_experts_survive_under_their_own_names(tmp_path):
    original = tiny("mixtral")
    original.save_pretrained(tmp_path / "base")
    checkpoint.save(student("mixtral", CONFIG, dtype=torch.float32), None, tmp_path / "student")
    base = load_file(tmp_path / "base" / "model.safetensors")
    saved = load_file(tmp_path / "student" / "model.safetensors")
    assert set(base) == {name for name in saved if ".mixer." not in name}
    assert all(torch.equal(saved[name], base[name]) for name in base)


@torch.no_grad()
def test_unconverting_a_loaded_student_gives_the_teacher(tmp_path):
    x = ids()
    expected = tiny().eval()(x).logits
    checkpoint.save(student(dtype=torch.float32), None, tmp_path / "student")
    plain = unconvert(checkpoint.load(tmp_path / "student")[0])
    assert torch.equal(plain(x).logits, expected)
    plain.save_pretrained(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["model_type"] == "llama"
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(x).logits, expected)


def test_without_permission_for_its_code_transformers_says_so(tmp_path):
    checkpoint.save(student(dtype=torch.float32), None, tmp_path / "student")
    result = run(
        "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])",
        tmp_path / "student",
        tmp_path=tmp_path,
    )
    assert result.returncode != 0 and "trust_remote_code" in result.stderr


TWO_AND_THE_PACKAGE = """
import sys
import torch
from transformers import AutoModelForCausalLM
from linearize import checkpoint
from linearize.convert import unconvert
from linearize.modeling.attention import NAME, attention_mode
loaded = []
for folder in sys.argv[1:]:
    loaded.append((folder, AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")))
    loaded.append((folder, checkpoint.load(folder)[0]))
classes = {type(model) for _, model in loaded}
assert len(classes) == 3, classes  # both packages' models share a class, each folder brings its own
for _ in range(2):
    for folder, model in loaded:
        expected = torch.load(folder + ".pt")
        with torch.no_grad():
            assert torch.equal(model(expected["x"]).logits, expected["logits"]), folder
            with attention_mode("softmax"):
                soft = model(expected["x"]).logits
            # Equal code shares the mode; another version does not hear of it.
            shares = model.config._attn_implementation == NAME
            assert torch.equal(soft, expected["logits"]) != shares, folder
            assert torch.equal(model(expected["x"]).logits, expected["logits"]), folder
names = {model.config._attn_implementation for _, model in loaded}
plain = {type(unconvert(model)).__module__ for _, model in loaded}
assert plain == {"transformers.models.llama.modeling_llama"}, plain
print(len(names), "names")
"""


def test_two_checkpoints_and_the_package_in_one_process(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    save_with_answers(student("llama", CONFIG, dtype=torch.float32), first)
    save_with_answers(student("llama", LolcatsConfig(window=None), dtype=torch.float32, seed=5), second)
    # The second was written by another version of the code.
    (second / "mixer.py").write_text((second / "mixer.py").read_text() + "\n# another version\n")
    result = run(TWO_AND_THE_PACKAGE, first, second, tmp_path=tmp_path)
    assert result.stdout.strip() == "2 names", result.stderr[-2000:]


@torch.no_grad()
def test_a_base_checkpoint_in_the_converted_class_starts_from_initial_values(tmp_path):
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    from linearize.convert import convert

    fresh = convert(tiny("llama"), CONFIG)
    loaded = type(fresh).from_pretrained(tmp_path / "base", config=fresh.config)
    for name, parameter in fresh.named_parameters():
        assert torch.equal(dict(loaded.named_parameters())[name], parameter), name


def test_the_folder_holds_what_a_reader_expects(tmp_path):
    folder = checkpoint.save(
        student(dtype=torch.float32),
        None,
        tmp_path / "new" / "student",
        extra={"recipe.yaml": "a: 1\n", "x.json": {"b": 2}},
    )
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "linearize_llama"
    assert config["architectures"] == ["LinearLlamaForCausalLM"]
    assert config["linearize"]["format"] == 1 and list(config["linearize"]["layers"]) == ["0", "1", "2"]
    assert not [key for key in config if key.startswith("_")]
    assert (folder / "recipe.yaml").read_text() == "a: 1\n" and json.loads(
        (folder / "x.json").read_text()
    ) == {"b": 2}
    assert [p.name for p in folder.parent.iterdir()] == ["student"]
    assert checkpoint.is_checkpoint(folder) and not checkpoint.is_checkpoint(folder.parent)


def change_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def set_format(config):
    config["linearize"]["format"] = 99


def set_method(config):
    config["linearize"]["layers"]["0"]["method"]["name"] = "lolcat"


def set_type(config):
    config["model_type"] = "llama"


def drop_spec(config):
    del config["linearize"]


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def corrupt(folder):
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


def drop_key(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.self_attn.mixer.window_logit"]
    save_file(weights, path, metadata={"format": "pt"})


def add_key(folder):
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"model.extra": torch.zeros(2)}, path, metadata={"format": "pt"})


def wrong_shape(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.self_attn.mixer.window_logit"] = torch.zeros(9)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change_config(f, set_format), "linearize.format: 99 is newer than 1"),
        (lambda f: change_config(f, set_method), "'lolcat' is unknown; choose from"),
        (lambda f: change_config(f, set_type), "model_type 'llama' is not a saved student"),
        (lambda f: change_config(f, drop_spec), "no conversion is described"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "weights cannot be read"),
        (truncate, "weights cannot be read"),
        (corrupt, "weights cannot be read"),
        (drop_key, "1 missing keys, model.layers.1.self_attn.mixer.window_logit"),
        (add_key, "1 unexpected keys, model.extra"),
        (wrong_shape, "window_logit"),
    ],
    ids=[
        "format",
        "method",
        "type",
        "spec",
        "json",
        "no-config",
        "no-weights",
        "truncated",
        "corrupt",
        "missing",
        "unexpected",
        "shape",
    ],
)
def test_damage_is_refused_in_one_line(tmp_path, damage, message):
    folder = checkpoint.save(student(dtype=torch.float32), None, tmp_path / "student")
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.load(folder)
    assert "\n" not in str(error.value)


def test_an_existing_folder_is_never_overwritten(tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already and is not empty"):
        checkpoint.save(student(dtype=torch.float32), None, tmp_path / "student")
    assert [p.name for p in (tmp_path / "student").iterdir()] == ["thesis.txt"]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoint.save(student(dtype=torch.float32), None, tmp_path / "student")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_is_removed_by_the_next_one(tmp_path):
    folder, other = tmp_path / "student", tmp_path / ".student.mine"
    other.mkdir()
    child = os.fork()
    if not child:
        with checkpoint.replacing(folder) as target:
            (target / "config.json").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (left,) = {*tmp_path.iterdir()} - {other}
    assert [p.name for p in left.iterdir()] == ["config.json"]
    with checkpoint.replacing(tmp_path / "another"):  # whose leftovers they are not
        assert left.exists()
    with checkpoint.replacing(folder):
        assert not left.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"student", "another", ".student.mine"}


def test_a_writer_at_work_is_not_disturbed(tmp_path):
    folder = tmp_path / "student"

    def race():
        with checkpoint.replacing(folder) as first:
            with checkpoint.replacing(folder) as second:
                assert first.exists()
                (second / "config.json").write_text("second")
            (first / "config.json").write_text("first")

    with pytest.raises(CheckpointError, match="student: could not be written"):
        race()
    assert [p.name for p in tmp_path.iterdir()] == ["student"]
    assert (folder / "config.json").read_text() == "second"


def test_saving_a_plain_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not a converted model"):
        checkpoint.save(tiny(), None, tmp_path / "student")
    wrapped = get_peft_model(student(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(
        CheckpointError, match="PeftModel: is a wrapper"
    ):  # whose own save keeps adapters only
        checkpoint.save(wrapped, None, tmp_path / "student")


def test_softmax_mode_reaches_a_loaded_student(tmp_path):
    x = ids()
    expected = tiny()(x).logits
    checkpoint.save(student(dtype=torch.float32), None, tmp_path / "student")
    model, _ = checkpoint.load(tmp_path / "student")
    assert model.config._attn_implementation == f"linearize_{SOURCE}"
    with torch.no_grad(), attention_mode("softmax"):
        assert torch.equal(model(x).logits, expected)


def test_randomise_reaches_every_parameter():
    model = tiny()
    before = [p.clone() for p in model.parameters()]
    randomise(model, seed=3)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
