"""Text that means harm, or is merely broken: only our own errors come out."""

import copy
import gzip
import lzma
from pathlib import Path

import pytest
import torch
from hostile import KEYS, SPECIAL, VALUES, WORDS, examples, log, only_ours  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_run import teacher  # noqa: F401  a fixture
from tiny import tiny
from transformers import AutoTokenizer

from linearize.data import build, sources
from linearize.modeling.errors import DataError
from linearize.recipe import Data
from linearize.teacher import BUNDLED


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED["books-5m"])


@examples(25)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.lists(st.one_of(VALUES.map(repr), VALUES.map(str)), max_size=4).map("\n".join),
    ),
    st.sampled_from([".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.xz"]),
    st.sampled_from(["raw", "packed", "cut"]),
)
def test_any_bytes_as_text(tmp_path, tokenizer, content, suffix, how):
    content = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    packer = {".gz": gzip.compress, ".xz": lzma.compress}.get(Path(suffix).suffix)
    if packer and how != "raw":
        content = packer(content)[: -4 if how == "cut" else None]
    path = tmp_path / f"my{suffix}"
    path.write_bytes(content)
    spec = Data(seq_len=4, sources=[{"kind": "text", "path": str(path)}])
    only_ours("text files", lambda: build(spec, tokenizer))


@pytest.mark.parametrize("packer", [gzip, lzma])
@pytest.mark.parametrize("form", ["txt", "jsonl"])
def test_a_small_file_that_unpacks_to_very_much_is_not_unpacked(tmp_path, monkeypatch, packer, form):
    monkeypatch.setattr(sources, "UNPACKED", 2**20)
    suffix = {"gzip": "gz", "lzma": "xz"}[packer.__name__]
    path = tmp_path / f"bomb.{form}.{suffix}"
    with packer.open(path, "wb") as file:
        for _ in range(40):
            file.write(b" " * 2**20)
    with pytest.raises(DataError, match=r"unpacks to more than .* times its size"):
        list(sources.texts(str(path), "text", None))


def test_a_small_parquet_file_that_unpacks_to_very_much_is_not_unpacked(tmp_path, monkeypatch):
    import pyarrow
    from pyarrow import parquet

    def said(expected, **columns):
        path = tmp_path / "bomb.parquet"
        parquet.write_table(pyarrow.table(columns), path, compression="zstd", write_statistics=False)
        monkeypatch.setattr(sources, "UNPACKED", 2**20)
        assert path.stat().st_size * sources.TIMES < 2**20
        with pytest.raises(DataError, match=expected) as caught:
            list(sources.texts(str(path), "text", None))
        assert "\n" not in str(caught.value)

    much = r"unpacks to more than .* times its size"
    said(much, text=["a" * 2**22])  # one page that says how large it is
    said(much, text=pyarrow.array(["a" * 2000] * 9999).dictionary_encode())  # one text, said again and again
    said("is not text but list", text=[[0, 1]])


def test_archives_of_files_are_not_opened(tmp_path):
    for name in ("a.zip", "a.tar", "a.tar.gz", "a.tgz", "a.txt.zst", "a.jsonl.bz2", "a.parquet.gz", "a.7z"):
        (tmp_path / name).write_bytes(b"PK")
        with pytest.raises(DataError, match="not a text file that can be read"):
            list(sources.texts(str(tmp_path / name), "text", None))
    with pytest.raises(DataError, match="the folder has no"):
        list(sources.texts(str(tmp_path), "text", None))


def test_a_chat_template_that_fails_is_one_line(tmp_path, tokenizer):
    path = tmp_path / "my.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n')
    hostile = copy.deepcopy(tokenizer)
    for template in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('no') }}",
        "{% for %}",
    ):
        hostile.chat_template = template
        with pytest.raises(DataError, match="the chat template"):
            build(Data(seq_len=4, sources=[{"kind": "chat", "path": str(path)}]), hostile)


def test_a_damaged_pool_is_made_anew(tmp_path, tokenizer):
    path = tmp_path / "my.txt"
    path.write_text("The old man and the sea. " * 40)
    spec = Data(seq_len=8, sources=[{"kind": "text", "path": str(path)}])
    first = build(spec, tokenizer, cache_dir=tmp_path / "cache")
    (cached,) = (tmp_path / "cache").glob("*.safetensors")
    for content in (b"", b"\xff" * 40, cached.read_bytes()[:-8]):
        cached.write_bytes(content)
        assert build(spec, tokenizer, cache_dir=tmp_path / "cache").fingerprint == first.fingerprint
    save_file({"tokens": torch.zeros(3)}, cached)
    assert build(spec, tokenizer, cache_dir=tmp_path / "cache").fingerprint == first.fingerprint
    assert tiny is not None
