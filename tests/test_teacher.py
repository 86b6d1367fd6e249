"""Loading teachers: what comes back, and the one line that each mistake gives."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from linearize.modeling.errors import TeacherError
from linearize.teacher import BUNDLED, load_teacher, teacher_path

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
}


def spec(name, **changes):
    fields = {
        "name": str(name),
        "revision": None,
        "dtype": "auto",
        "trust_remote_code": False,
        "allow_pickle": False,
    }
    return SimpleNamespace(**(fields | changes))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with a tiny llama and a tiny tokenizer; each test spoils a copy."""
    folder = tmp_path_factory.mktemp("teacher")
    LlamaForCausalLM(LlamaConfig(**SIZES, dtype="bfloat16")).bfloat16().save_pretrained(folder)
    words = {word: i for i, word in enumerate(["<unk>", *"abcdefghijklmnopqrstuvwxyz"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "teacher")


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def remove(folder, pattern):
    for path in folder.glob(pattern):
        path.unlink()


@pytest.mark.parametrize(
    ("asked", "got"), [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float64", torch.float64)]
)
def test_a_teacher_comes_back_frozen_in_the_dtype_asked_for(folder, asked, got):
    model, tokenizer = load_teacher(spec(folder, dtype=asked))
    assert {p.dtype for p in model.parameters()} == {got}
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert tokenizer.encode("a b", add_special_tokens=False) == [1, 2]


def test_the_bundled_teacher_needs_only_its_name():
    model, tokenizer = load_teacher(spec("books-5m"))
    assert sum(p.numel() for p in model.parameters()) == 5_048_576
    assert len(tokenizer) == model.config.vocab_size == 8192
    assert teacher_path("books-5m") == BUNDLED["books-5m"]
    assert (BUNDLED["books-5m"] / "README.md").is_file()


def no_config(folder):
    remove(folder, "config.json")


def broken_config(folder):
    (folder / "config.json").write_text('{"model_type": "llama",')


def no_weights(folder):
    remove(folder, "*.safetensors")


def pickled_weights(folder):
    remove(folder, "*.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def garbage_weights(folder):
    (folder / "model.safetensors").write_bytes(b"x" * 1000)


def missing_weights(folder):
    edit(folder, num_hidden_layers=3)


def wrong_shapes(folder):
    edit(folder, intermediate_size=48)


def no_tokenizer(folder):
    remove(folder, "tokenizer*")


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version":')


def foreign_tokenizer(folder):
    edit(folder, vocab_size=20, tie_word_embeddings=False)
    LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 20})).save_pretrained(folder)


def encoder(folder):
    config = BertConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    BertForMaskedLM(config).save_pretrained(folder)


def encoder_decoder(folder):
    T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=32)
    ).save_pretrained(folder)


def headless(folder):
    LlamaModel(LlamaConfig(**SIZES)).save_pretrained(folder)


def remote_code(folder):
    edit(
        folder,
        model_type="novel",
        auto_map={"AutoConfig": "code.Novel", "AutoModelForCausalLM": "code.NovelForCausalLM"},
    )


def unknown_kind(folder):
    edit(folder, model_type="novel", architectures=["NovelForCausalLM"])


def student(folder):
    edit(folder, model_type="linearize_llama", auto_map={"AutoConfig": "code.Student"})


def quantised(folder):
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})


SPOILED = {
    no_config: "no config.json",
    broken_config: "config.json cannot be read",
    no_weights: "no weights",
    pickled_weights: "pickle files, which can hold code",
    truncated_weights: "weights cannot be read",
    garbage_weights: "weights cannot be read",
    missing_weights: "9 weights are missing, model.layers.2",
    wrong_shapes: "shapes do not match config.json",
    no_tokenizer: "no tokenizer",
    broken_tokenizer: "no tokenizer",
    foreign_tokenizer: "27 tokens and the model 20 embeddings",
    encoder: "bert is an encoder; give a decoder-only",
    encoder_decoder: "t5 is an encoder-decoder",
    headless: "LlamaModel is not a causal language model",
    remote_code: "teacher.trust_remote_code=true",
    unknown_kind: "'novel' is not one that transformers",
    student: "is already a student",
    quantised: "quantised",
}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_a_spoiled_folder_is_refused_in_one_line(folder, spoil):
    spoil(folder)
    with pytest.raises(TeacherError, match=SPOILED[spoil]) as caught:
        load_teacher(spec(folder))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(folder))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./nowhere", "no folder ./nowhere"),
        ("book-5m", "did you mean 'books-5m'?"),
        ("some one/their model!", "neither a folder nor a Hub id"),
        ("someone/some-model", "the Hub does not answer"),
    ],
)
def test_a_name_that_cannot_be_found_says_what_to_give(name, says, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TeacherError, match=says.replace("?", r"\?")) as caught:
        load_teacher(spec(name))
    assert "\n" not in str(caught.value)


def test_a_file_is_not_a_teacher(folder):
    with pytest.raises(TeacherError, match="is a file"):
        teacher_path(str(folder / "config.json"))
