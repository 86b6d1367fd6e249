"""Recipes and folders that mean harm, or are merely broken: only our own errors come out, and no code of them runs."""

import copy
import json
import os
import struct
from pathlib import Path

import pytest
import torch
import yaml
from hostile import CAME_OUT, KEYS, SPECIAL, VALUES, WORDS, examples, log, only_ours  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st
from test_run import teacher  # noqa: F401  a fixture

import linearize
from linearize import checkpoint
from linearize.modeling.errors import CheckpointError, LinearizeError, RecipeError, TeacherError
from linearize.overrides import read_yaml
from linearize.recipe import Recipe, Teacher
from linearize.run import run
from linearize.teacher import load_teacher


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("hostile") / "student"
    model, tokenizer = load_teacher(Teacher(name=str(teacher)))
    linearize.convert(model, Recipe.resolve(teacher, "lolcats", ["method.window=8"]).method)
    return checkpoint.save(model, tokenizer, folder)


# Recipes


@examples(25)
@given(
    st.lists(st.one_of(WORDS, KEYS, VALUES.map(repr)), max_size=12),
    st.sampled_from(["", " ", ": ", "\n", ":\n  "]),
)
def test_any_text_as_a_recipe(tmp_path, words, between):
    path = tmp_path / "my.yaml"
    path.write_bytes(between.join(words).encode("utf-8", "surrogatepass"))
    only_ours("recipe text", lambda: Recipe.from_file(path).to_yaml())


@examples(30)
@given(st.dictionaries(KEYS, VALUES, max_size=3), VALUES)
def test_any_tree_as_a_recipe(leaves, top):
    tree = {}
    for key, value in leaves.items():
        node = tree
        *parents, last = key.split(".")
        for part in parents:
            node = node.setdefault(part, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict):
            node[last] = value
    only_ours("recipe tree", lambda: Recipe.from_dict(tree).to_yaml())
    if isinstance(top, dict):
        only_ours("recipe tree", lambda: Recipe.from_dict(top).to_yaml())


@examples(25)
@given(
    st.lists(st.tuples(st.one_of(KEYS, WORDS), st.one_of(WORDS, VALUES.map(repr))).map("=".join), max_size=3)
)
def test_any_words_as_overrides(words):
    only_ours("override words", lambda: Recipe.resolve(None, overrides=words).to_yaml())


BOMBS = {
    "a billion aliases": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "an alias of itself": "a: &a [*a]",
    "a deep nest": "a: " + "[" * 5000,
    "a tag": "teacher: !!python/object/apply:os.system ['true']",
    "a harmless tag": "seed: !!int 3",
    "a number of five thousand digits": "seed: " + "9" * 5000,
    "a date that is none": "seed: 2001-99-99",
    "a NUL byte in a name": 'output: "a\\0b"',
    "a name that turns around": 'output: "a\\u202Eb"',
    "too many bytes": "# " + "x" * 1_000_001,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_recipe_that_would_explode_is_one_line(tmp_path, bomb):
    (tmp_path / "my.yaml").write_text(BOMBS[bomb])
    with pytest.raises(RecipeError) as caught:
        Recipe.from_file(tmp_path / "my.yaml")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_plain_aliases_are_still_read(tmp_path):
    (tmp_path / "my.yaml").write_text("data: {held_out: &a [{kind: text, path: x.txt}], sources: *a}\n")
    tree = read_yaml(tmp_path / "my.yaml")
    assert tree["data"]["sources"] == tree["data"]["held_out"]


def test_a_recipe_file_writes_below_the_working_directory_alone(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "link").symlink_to(tmp_path)
    for output in (str(tmp_path / "there"), "../there", "link/there", "~/there"):
        Path("sent.yaml").write_text(yaml.safe_dump({"output": output}))
        with pytest.raises(RecipeError, match="outside the working directory"):
            Recipe.resolve("sent.yaml")
        assert Recipe.resolve("sent.yaml", overrides=[f"output={output}"]).output == output
    Path("sent.yaml").write_text("output: runs/mine")
    assert Recipe.resolve("sent.yaml").output == "runs/mine"
    (tmp_path / "run").mkdir()  # the record of a run elsewhere
    (tmp_path / "run" / "recipe.yaml").write_text(f"output: {tmp_path / 'run'}")
    assert Recipe.resolve(tmp_path / "run" / "recipe.yaml").output == str(tmp_path / "run")


def test_a_run_follows_no_link_out_of_its_folder(tmp_path, teacher):  # noqa: F811
    (tmp_path / "elsewhere").mkdir()
    recipe = Recipe.resolve(teacher, "lolcats", [f"output={tmp_path / 'run'}", "device=cpu"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.to_yaml())
    (tmp_path / "run" / "transfer").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecipeError, match="transfer is a link"):
        run(recipe)


def test_a_planted_link_is_replaced_and_not_followed(tmp_path):
    from linearize.files import write_text

    (tmp_path / "victim").write_text("years of work")
    for name in ("table.md", "table.md.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    write_text(tmp_path / "table.md", "new")
    assert (tmp_path / "victim").read_text() == "years of work"
    assert (tmp_path / "table.md").read_text() == "new" and not (tmp_path / "table.md").is_symlink()


# Folders of models


def spoilt(tree, steps, value):
    """The tree with one entry, reached by numbers that choose at each level, replaced or removed."""
    tree = copy.deepcopy(tree)
    node = tree
    for number, step in enumerate(steps):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = keys[step % len(keys)]
        inner = node[key]
        if not isinstance(inner, dict | list) or not inner or step % 3 == 0 or number + 1 == len(steps):
            break
        node = inner
    if value is ...:
        del node[key]
    else:
        node[key] = value
    return tree


STEPS = st.lists(st.integers(0, 60), min_size=1, max_size=5)
WRONG = st.one_of(st.just(...), st.sampled_from(SPECIAL), VALUES)


def copy_of(folder, place):
    """The folder again, its files linked, so that one of them may be replaced."""
    place.mkdir(exist_ok=True)
    for path in place.iterdir():
        path.unlink()
    for path in folder.iterdir():
        (place / path.name).symlink_to(path)
    return place


def replace(path, content):
    path.unlink()
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)


@pytest.mark.filterwarnings("ignore")  # transformers on odd configurations
@examples(8)
@given(STEPS, WRONG)
def test_any_configuration_of_a_student(student, tmp_path, steps, value):
    folder = copy_of(student, tmp_path / "student")
    config = json.loads((student / "config.json").read_text())
    replace(folder / "config.json", json.dumps(spoilt(config, steps, value)))
    only_ours("student's config.json", lambda: checkpoint.load(folder))


@pytest.mark.filterwarnings("ignore")
@examples(12)
@given(STEPS, WRONG)
def test_any_configuration_of_a_teacher(teacher, tmp_path, steps, value):  # noqa: F811
    folder = copy_of(teacher, tmp_path / "teacher")
    config = json.loads((teacher / "config.json").read_text())
    replace(folder / "config.json", json.dumps(spoilt(config, steps, value)))
    only_ours("teacher's config.json", lambda: load_teacher(Teacher(name=str(folder))))


def tampered(content, how, number):
    """A safetensors file with its header, lengths, offsets, types or bytes changed."""
    length = struct.unpack("<Q", content[:8])[0]
    if how == "short":
        return content[: number % len(content)]
    if how == "length":
        return struct.pack("<Q", number % 2**64) + content[8:]
    if how == "bytes":
        at = number % (8 + length)
        return content[:at] + os.urandom(1 + number % 7) + content[at:]
    if how == "garbage":
        return number.to_bytes(12, "little") * (number % 50)
    header = json.loads(content[8 : 8 + length])
    name = sorted(key for key in header if key != "__metadata__")[number % (len(header) - 1)]
    entry = header[name]
    if how == "offsets":
        entry["data_offsets"] = [number, number % 1000]
    elif how == "dtype":
        entry["dtype"] = ["F8_E9M9", "I64", "BOOL", "", 3][number % 5]
    elif how == "shape":
        entry["shape"] = [[-1], [2**62, 4], [number], [], "x"][number % 5]
    elif how == "renamed":
        header[f"{name}\0"] = header.pop(name)
    elif how == "overlapping":
        header[name] = dict(header[sorted(header)[-1]])
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


HOW = ("short", "length", "bytes", "garbage", "offsets", "dtype", "shape", "renamed", "overlapping")


@pytest.mark.filterwarnings("ignore")
@examples(12)
@given(st.sampled_from(HOW), st.integers(0, 2**70), st.booleans())
def test_any_header_of_a_tensor_file(student, teacher, tmp_path, how, number, of_student):  # noqa: F811
    folder = copy_of(student if of_student else teacher, tmp_path / "tampered")
    content = (folder / "model.safetensors").read_bytes()
    replace(folder / "model.safetensors", tampered(content, how, number))
    only_ours(
        "safetensors headers",
        lambda: checkpoint.load(folder) if of_student else load_teacher(Teacher(name=str(folder))),
    )


def marked(folder, module, body):
    """Code in a model's folder that leaves a mark where it runs."""
    (folder / f"{module}.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n{body}\n")


@pytest.mark.filterwarnings("ignore")
def test_code_in_a_folder_does_not_run_unless_it_is_trusted(student, tmp_path, teacher):  # noqa: F811
    import shutil

    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder)
    config = json.loads((folder / "config.json").read_text())
    # Classes of their own: transformers marks those that it loads so, and would save its own ones otherwise ever after.
    body = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class MyConfig(LlamaConfig): ...
class MyModel(LlamaForCausalLM): config_class = MyConfig
class Mine(PreTrainedTokenizerFast): ...
"""
    marked(folder, "mine", body)
    mapped = {
        "AutoConfig": "mine.MyConfig",
        "AutoModelForCausalLM": "mine.MyModel",
        "AutoTokenizer": ["mine.Mine", None],
    }
    (folder / "custom_generate").mkdir()
    marked(folder / "custom_generate", "generate", "def generate(**_): ...")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(tokenizer | {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}})
    )
    for kind in ("llama", "their_own"):  # a family that transformers has, and one that only the folder has
        (folder / "config.json").write_text(json.dumps(config | {"model_type": kind, "auto_map": mapped}))
        try:
            load_teacher(Teacher(name=str(folder)))
        except TeacherError:
            CAME_OUT["code in a folder"]["TeacherError"] += 1
        else:
            CAME_OUT["code in a folder"]["loaded without it"] += 1
        assert not list(folder.rglob("ran")), kind
    copied = tmp_path / "student"
    shutil.copytree(student, copied)
    for path in list(copied.glob("*.py")):
        marked(copied, path.stem, "raise SystemExit")
    checkpoint.load(copied)
    assert not (copied / "ran").exists()
    # The trap is a trap: it does go off where it is trusted.
    with pytest.raises((LinearizeError, SystemExit)):
        load_teacher(Teacher(name=str(folder), trust_remote_code=True)) and (_ for _ in ()).throw(SystemExit)
    assert (folder / "ran").exists()


@pytest.mark.filterwarnings("ignore")
def test_pickled_weights_are_opened_where_that_is_asked_for_and_run_no_code_even_then(tmp_path, teacher):  # noqa: F811
    import shutil

    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder)
    (folder / "model.safetensors").unlink()
    weights = load_teacher(Teacher(name=str(teacher)))[0].state_dict()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(
        TeacherError, match=r"pickle files, which can hold code; .*teacher\.allow_pickle=true$"
    ):
        load_teacher(Teacher(name=str(folder)))
    model, _ = load_teacher(Teacher(name=str(folder), allow_pickle=True))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())

    class Evil:
        def __reduce__(self):
            return open, (str(folder / "ran"), "w")

    torch.save({"lm_head.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(TeacherError):
        load_teacher(Teacher(name=str(folder), allow_pickle=True))
    assert not (folder / "ran").exists()


def test_a_student_is_safetensors_alone(student, tmp_path):
    folder = copy_of(student, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"attn_implementation": "somebody/kernel"}, "names code of the Hub"),
        ({"_attn_implementation": "somebody/kernel:x"}, "names code of the Hub"),
        ({"num_hidden_layers": 10**9}, "more than the"),
        ({"vocab_size": 10**10}, "do not belong together"),
    ],
)
def test_a_configuration_cannot_fetch_code_or_take_all_memory(teacher, student, tmp_path, fields, words):  # noqa: F811
    for folder, load in ((teacher, lambda f: load_teacher(Teacher(name=str(f)))), (student, checkpoint.load)):
        here = copy_of(folder, tmp_path / "spoilt")
        config = json.loads((folder / "config.json").read_text())
        replace(here / "config.json", json.dumps(config | fields))
        with pytest.raises(LinearizeError, match=words):
            load(here)
