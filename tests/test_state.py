"""A text read once: what is generated after its saved state is what is generated after the text."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ids, representatives, student, variants
from typer.testing import CliRunner

from linearize import checkpoint, state
from linearize.cli import app
from linearize.convert import convert
from linearize.generate import generate
from linearize.methods import adjust
from linearize.modeling.errors import CheckpointError, EvaluationError
from linearize.modeling.lolcats import LolcatsConfig

READ, ASKED, STEPS = 37, 5, 9


class Words:
    """A tokenizer of numbers: "5 17 3" is the ids 5, 17, 3, after a first token where special ones are asked for."""

    pad_token_id, eos_token_id = 0, None

    def __call__(self, text, return_tensors, add_special_tokens=True):
        numbers = [1] * add_special_tokens + [int(word) for word in text.split()]
        return type("Encoded", (), {"input_ids": torch.tensor([numbers])})

    def decode(self, row, skip_special_tokens):
        return "".join(f" {int(number)}" for number in row)


def words(tokens):
    return " ".join(str(int(t)) for t in tokens)


DOCUMENT, QUESTION = words(ids(1, READ, seed=3)[0]), words(ids(1, ASKED, seed=4)[0])


def logits(model, prompt, past=None):
    """Of every step of a greedy generation, and its tokens."""
    options = {} if past is None else {"past_key_values": past}
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return made.sequences, torch.stack(made.logits)


def saved(model, tmp_path, text=DOCUMENT):
    state.save(state.read(model, Words(), text), tmp_path / "text.state")
    return tmp_path / "text.state"


def complaint(look):
    try:
        look()
    except CheckpointError as error:
        return str(error)
    return None


# One of every method, and those whose states hold what the others do not: a sparse cache, slots, a growing budget.
ODD = ("sparse_cache=5", "gsa", "budget=None", "window_exclude")
CASES = representatives() | {n: c for n, c in variants().items() if any(word in n for word in ODD)}


@pytest.mark.parametrize("name", CASES)
def test_going_on_from_a_saved_state_is_going_on_from_the_text(name, tmp_path):
    model = student("llama", CASES[name], layers=[0, 2])
    read = state.load(saved(model, tmp_path), model)
    question = ids(1, ASKED, seed=4)
    whole, cache = read.before(question)
    expected, at_once = logits(model, torch.cat([read.tokens[None], question], 1))
    for _ in range(2):  # what was generated before leaves the state as it was
        tokens, again = logits(model, whole, read.cache())
        assert torch.equal(tokens, expected)
        torch.testing.assert_close(again, at_once, rtol=1e-9, atol=1e-9)
    assert cache.get_seq_length() == READ + 1


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "mistral"])
def test_layers_that_stay_softmax_keep_their_keys(family, tmp_path):
    """Sliding windows among them, which hold fewer tokens than they have seen."""
    own = {"sliding_window": 6} if family == "mistral" else {}
    model = student(family, LolcatsConfig(window=8), layers=[1], **own)
    read = state.load(saved(model, tmp_path), model)
    text = f"{words(read.tokens[1:])} {QUESTION}"
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "seed": 3, "repetition_penalty": 1.4}):
        after = generate(model, Words(), QUESTION, STEPS, state=read, **options)
        assert after == generate(model, Words(), text, STEPS, **options)


def test_the_file_costs_the_state_and_not_the_text(tmp_path):
    model = student("llama", LolcatsConfig(window=8), layers=[0, 1], dtype=torch.float32)
    short, long = (
        state.save(state.read(model, Words(), words(ids(1, n - 1)[0])), tmp_path / str(n)) for n in (40, 400)
    )
    assert long.state_bytes == short.state_bytes > 0
    # One softmax layer: two kv heads, keys and values of 16 numbers of four bytes.
    assert (short.kv_bytes, long.kv_bytes) == (40 * 2 * 2 * 16 * 4, 400 * 2 * 2 * 16 * 4)
    assert long.teacher_bytes == 3 * long.kv_bytes and long.token_bytes == 4 * 400
    extra = (tmp_path / "400").stat().st_size - long.state_bytes - long.kv_bytes - long.token_bytes
    assert 0 < extra < 4096
    assert state.info(tmp_path / "400") == long
    assert {path.name for path in tmp_path.iterdir()} == {"40", "400"}


def test_a_state_of_other_weights_or_fields_is_refused(tmp_path):
    model = student("llama", LolcatsConfig(window=4, window_kind="terraced"))
    file = saved(model, tmp_path)
    other = student("llama", LolcatsConfig(window=4, window_kind="terraced"))
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-9
    for wrong in (other, student("llama", LolcatsConfig(window=5, window_kind="terraced"))):
        with pytest.raises(CheckpointError, match=r"text\.state: is a state of another checkpoint"):
            state.load(file, wrong)
    state.load(file, model)
    adjust(model, sparse_cache=3)
    with pytest.raises(CheckpointError, match="another checkpoint"):
        state.load(file, model)


def test_a_damaged_file_is_refused_whatever_is_wrong_with_it(tmp_path):
    model = student("llama", representatives()["lolcats"], layers=[1])
    file = saved(model, tmp_path)
    data, broken = file.read_bytes(), tmp_path / "broken"
    whole = load_file(file)
    for place in range(0, len(data), len(data) // 25):
        flipped = bytearray(data)
        flipped[place] ^= 4
        for damaged in (bytes(flipped), data[:place]):
            broken.write_bytes(damaged)
            for look in (lambda: state.load(broken, model), lambda: state.info(broken)):
                refused = complaint(look)
                if refused is None:  # a date or a version: words on which nothing depends
                    kept = load_file(broken)
                    assert kept.keys() == whole.keys()
                    assert all(torch.equal(kept[name], tensor) for name, tensor in whole.items())
                else:
                    assert str(broken) in refused and "\n" not in refused
    save_file({"x": torch.zeros(1)}, broken)
    for path, words_ in ((broken, "is no saved state"), (tmp_path / "none", "no such file")):
        with pytest.raises(CheckpointError, match=words_):
            state.load(path, model)


def test_what_cannot_be_read_or_gone_on_from_is_one_line(tmp_path):
    model = student("gpt2", LolcatsConfig(window=8), layers=[1])
    read = state.read(model, Words(), DOCUMENT)
    with pytest.raises(EvaluationError, match="no tokens"):
        generate(model, Words(), "", state=read)
    with pytest.raises(EvaluationError, match="static"):
        generate(model, Words(), "3", state=read, static=True)
    with pytest.raises(EvaluationError, match="513 tokens pass the model's table of 512"):
        state.read(model, Words(), words(ids(1, 512)[0]))
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="could not be written"):
        state.save(read, tmp_path / "file" / "below")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded teacher, converted and untrained."""
    from linearize.loading import load

    model, tokenizer = load("books-5m")
    convert(model, LolcatsConfig(window=16), [0, 1, 2])
    return checkpoint.save(model, tokenizer, tmp_path_factory.mktemp("run") / "student")


def test_the_command_line_goes_on_from_a_file(folder, tmp_path):
    text, question, file = (
        "It was the best of times, " * 40 + "and",
        " it was the worst",
        tmp_path / "book.state",
    )
    made = CliRunner().invoke(
        app, ["state", "save", str(folder), "-", "--output", str(file), "--json"], input=text
    )
    assert made.exit_code == 0, made.output
    said = json.loads(made.stdout.splitlines()[-1])
    assert said["tokens"] > 200 and said["file_bytes"] == file.stat().st_size
    shown = CliRunner().invoke(app, ["state", "info", str(file)])
    assert f"{said['state_bytes']:,} bytes" in shown.output and f"{said['kv_bytes']:,} bytes" in shown.output
    model, tokenizer = checkpoint.load(folder)
    expected = generate(model, tokenizer, text + question, 12)
    after = CliRunner().invoke(
        app, ["generate", str(folder), question, "--state", str(file), "--max-new-tokens", "12"]
    )
    assert after.exit_code == 0, after.output
    assert after.stdout == expected + "\n"
    other = CliRunner().invoke(app, ["generate", "books-5m", question, "--state", str(file)])
    assert other.exit_code == 2 and "another checkpoint" in other.output
