"""Documents of local files and of the Hub, as text, and how they become tokens."""

import gzip
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ..modeling.errors import DataError
from ..tasks.recall import prefix, separator
from .pool import Pool, file_digest

CHUNK = 100_000  # characters given to the tokenizer at a time
BATCH = 64  # chunks; a fast tokenizer works on them in parallel
OPENERS = {".gz": gzip.open, ".xz": lzma.open}
UNPACKED, TIMES = 64 * 2**20, 200
"""Characters that any packed file may unpack to, and how many times its size beyond them; text packs to a tenth."""
ROWS = 65536  # of a parquet file, read at a time
XZ_MEMORY = 256 * 2**20  # bytes; xz -9 asks for 65 MiB, a header may ask for 4 GiB
FORMATS = (".txt", ".jsonl", ".parquet")


def files_of(path: str) -> list[Path]:
    """The readable files of a path, sorted: the file itself, or all below a folder."""
    root = Path(path).expanduser()
    if root.is_file():
        if _format(root) is None:
            raise DataError(
                f"{path}: not a text file that can be read; give {', '.join(FORMATS)} (.gz, .xz too)"
            )
        return [root]
    if not root.is_dir():
        raise DataError(f"{path}: no such file or folder; data.sources needs one that exists")
    found = sorted(file for file in root.rglob("*") if file.is_file() and _format(file))
    if not found:
        raise DataError(
            f"{path}: the folder has no {', '.join(FORMATS)} file; put the text there or name another"
        )
    return found


def local_key(path: str) -> list[list[str]]:
    """Names and contents of the files, for the cache."""
    return [[file.name, file_digest(file)] for file in files_of(path)]


def texts(path: str, field: str, mark: str | None) -> Iterator[str]:
    """The documents of local files: whole lines' `field`, or the text between marks."""
    for file in files_of(path):
        if _format(file) == ".txt":
            text = _read(file)
            yield from text.split(mark) if mark else [text]
        else:
            yield from (_text(record, field, where) for record, where in _records(file, (field,)))


class Turn(NamedTuple):
    """The fields of a record that make a dialogue of one turn."""

    prompt: str
    response: str
    context: str | None = None
    """Follows the prompt after an empty line, where there is any."""

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(field for field in self if field is not None)

    def read(self, record: dict[str, Any], where: str) -> tuple[str, str]:
        """Prompt and response of a record."""
        prompt = _text(record, self.prompt, where)
        context = _text(record, self.context, where) if self.context else ""
        return f"{prompt}\n\n{context}" if context.strip() else prompt, _text(record, self.response, where)


def pairs(path: str, turn: Turn) -> Iterator[tuple[str, str]]:
    """Prompt and response of every line of local .jsonl or .parquet files."""
    for file in files_of(path):
        if _format(file) == ".txt":
            raise DataError(
                f"{file}: a chat source needs fields {turn.prompt!r} and {turn.response!r}; "
                "give .jsonl or .parquet"
            )
        for record, where in _records(file, turn.fields):
            yield turn.read(record, where)


def hub_records(
    dataset: str,
    subset: str | None,
    split: str,
    revision: str | None,
    limit: int | None,
    fields: tuple[str, ...],
) -> Iterator[tuple[dict[str, Any], str]]:
    """Records of a Hub data set; a `limit` streams them, so that no more than needed is downloaded."""
    import datasets

    try:
        rows = datasets.load_dataset(
            dataset, subset, split=split, revision=revision, streaming=limit is not None
        )
    except (
        Exception
    ) as error:  # unknown names, no network, unreadable files: the library's own words, one line
        line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(
            f"data set {dataset}: cannot be loaded ({line[:160]}); check name, split, network"
        ) from None
    for i, record in enumerate(rows):
        if limit is not None and i >= limit:
            return
        where = f"data set {dataset}, record {i}"
        _require(record, fields, where)
        yield record, where


def hub_texts(
    dataset: str, subset: str | None, split: str, revision: str | None, limit: int | None, field: str
) -> Iterator[str]:
    for record, where in hub_records(dataset, subset, split, revision, limit, (field,)):
        yield _text(record, field, where)


def hub_pairs(dataset: str, split: str, turn: Turn) -> Iterator[tuple[str, str]]:
    for record, where in hub_records(dataset, None, split, None, None, turn.fields):
        yield turn.read(record, where)


def text_pool(documents: Iterable[str], tokenizer: Any) -> Pool:
    """Documents as tokens, opened as the tokenizer opens a text and ended by end-of-sequence; no blank ones."""
    begin = np.array(prefix(tokenizer), dtype=np.uint32)
    end = np.array(separator(tokenizer), dtype=np.uint32)
    out: list[np.ndarray] = []
    chunks: list[tuple[str, bool]] = []  # a piece of text, and whether its document ends there
    parts: list[np.ndarray] = []

    def flush() -> None:
        for ids, (_, last) in zip(encode_batch(tokenizer, [text for text, _ in chunks]), chunks, strict=True):
            parts.append(np.array(ids, dtype=np.uint32))
            if last:
                out.append(np.concatenate([begin, *parts, end]))
                parts.clear()
        chunks.clear()

    for document in documents:
        if not document.strip():
            continue
        pieces = list(_pieces(document))
        for i, text in enumerate(pieces):
            chunks.append((text, i == len(pieces) - 1))
            if len(chunks) == BATCH:
                flush()
    flush()
    return Pool.join(out)


def chat_pool(dialogues: Iterable[tuple[str, str]], tokenizer: Any, place: str) -> Pool:
    """Prompt and response through the chat template; only the response, with what ends it, is learnt."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{place}: the tokenizer has no chat template; use a text source or an instruct model"
        )
    heads, tails = [], []
    for prompt, response in dialogues:
        turn = [{"role": "user", "content": prompt}]
        try:
            head = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            whole = tokenizer.apply_chat_template(
                [*turn, {"role": "assistant", "content": response}], tokenize=False
            )
        except Exception as error:  # a program of the tokenizer's maker, in a sandbox
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"{place}: the chat template of the tokenizer fails ({line[:120]}); mend it, or use a text source"
            ) from None
        # Some templates write into the generation prompt what a finished reply does not have; then the end is ours.
        tail = whole[len(head) :] if whole.startswith(head) else response + (tokenizer.eos_token or "")
        heads.append(head)
        tails.append(tail)
    given, learnt = encode_batch(tokenizer, heads), encode_batch(tokenizer, tails)
    # A response is tokenised behind its prompt, as it will be generated, unless a token spans the border.
    whole = encode_batch(tokenizer, [head + tail for head, tail in zip(heads, tails, strict=True)])
    learnt = [
        ids[len(a) :] if ids[: len(a)] == a else b for ids, a, b in zip(whole, given, learnt, strict=True)
    ]
    masks = [[False] * len(a) + [True] * len(b) for a, b in zip(given, learnt, strict=True)]
    return Pool.join([a + b for a, b in zip(given, learnt, strict=True)], masks)


def encode_batch(tokenizer: Any, strings: list[str]) -> list[list[int]]:
    """Token lists without special tokens; all at once where the tokenizer can."""
    if not strings:
        return []
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        return [encoding.ids for encoding in backend.encode_batch_fast(strings, add_special_tokens=False)]
    return [tokenizer.encode(text, add_special_tokens=False) for text in strings]


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of about CHUNK characters, cut where no tokenizer joins: at a space between two letters."""
    start = 0
    while len(text) - start > CHUNK:
        cut = start + CHUNK
        while cut < len(text) and not (
            text[cut] == " " and text[cut - 1].isalpha() and text[cut + 1 : cut + 2].isalpha()
        ):
            cut += 1
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def _format(file: Path) -> str | None:
    """.txt, .jsonl or .parquet, looked at beneath .gz and .xz; None for any other file."""
    packed = file.suffix.lower() in OPENERS
    suffix = (Path(file.stem).suffix if packed else file.suffix).lower()
    return suffix if suffix in FORMATS and not (packed and suffix == ".parquet") else None


def _open(file: Path) -> IO[str]:
    """Text as Unix editors write it: no byte-order mark, lines ended by a line feed."""
    return OPENERS.get(file.suffix.lower(), open)(file, "rt", encoding="utf-8-sig")  # type: ignore[operator]


def _pieces_of(file: Path) -> Iterator[str]:
    """The text of a file in pieces; a small file that unpacks to very much is given up on the way."""
    packed = file.suffix.lower() in OPENERS
    limit, total = _most(file), 0
    try:
        if file.suffix.lower() == ".xz":
            with file.open("rb") as raw:
                lzma.LZMADecompressor(memlimit=XZ_MEMORY).decompress(raw.read(2**16), max_length=1)
        with _open(file) as stream:
            while piece := stream.read(2**20):
                total += len(piece)
                if packed and total > limit:
                    raise _too_much(file)
                yield piece
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text (byte {error.start}); convert it first") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:  # gzip raises the first two and the last
        raise DataError(
            f"{file}: cannot be read ({error or type(error).__name__}); fetch the file again"
        ) from None


def _most(file: Path) -> int:
    """Characters that a packed file may unpack to."""
    return max(UNPACKED, TIMES * file.stat().st_size)


def _too_much(file: Path) -> DataError:
    return DataError(
        f"{file}: unpacks to more than {TIMES} times its size; unpack it yourself if it is meant"
    )


def _read(file: Path) -> str:
    return "".join(_pieces_of(file))


def _lines(file: Path) -> Iterator[str]:
    """Lines ended by a line feed: JSON may hold the other line separators of Unicode inside a string."""
    rest: list[str] = []
    for piece in _pieces_of(file):
        first, *others = piece.split("\n")
        rest.append(first)
        for line in others:
            yield "".join(rest)
            rest = [line]
    yield "".join(rest)


def _records(file: Path, fields: tuple[str, ...]) -> Iterator[tuple[dict[str, Any], str]]:
    """Records of a .jsonl or .parquet file, each with the place to name when something is wrong with it."""
    if _format(file) == ".parquet":
        yield from _parquet(file, fields)
        return
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # or a number of five thousand digits, or very deep
            reason = getattr(error, "msg", None) or str(error).partition(":")[0]
            raise DataError(f"{where}: not JSON ({reason}); each line must be one object") from None
        if not isinstance(record, dict):
            raise DataError(f'{where}: not an object; write {{"{fields[0]}": "..."}}')
        _require(record, fields, where)
        yield record, where


def _parquet(file: Path, fields: tuple[str, ...]) -> Iterator[tuple[dict[str, Any], str]]:
    """A column of one text said a million times packs to almost nothing: it is read in batches that stay small even if
    every row held all that its part of the file unpacks to, and counted like a stream."""
    import pyarrow
    from pyarrow import parquet

    limit, total = _most(file), 0
    try:
        table = parquet.ParquetFile(file)
        _require(dict.fromkeys(table.schema_arrow.names), fields, str(file))
        for name in fields:
            kind = table.schema_arrow.field(name).type
            if pyarrow.types.is_nested(kind):
                raise DataError(f"{file}: field {name!r} is not text but {kind}; name a text field")
        largest = max((_unpacked(table.metadata, i, fields) for i in range(table.num_row_groups)), default=0)
        if largest > limit:
            raise _too_much(file)
        rows = max(1, min(ROWS, limit // max(1, largest)))
        for batch in table.iter_batches(columns=list(fields), batch_size=rows):
            for record in batch.to_pylist():
                total += sum(len(value) for value in record.values() if isinstance(value, str))
                if total > limit:
                    raise _too_much(file)
                yield record, str(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{file}: not a parquet file ({str(error).splitlines()[0]}); fetch it again"
        ) from None


def _unpacked(metadata: Any, group: int, fields: tuple[str, ...]) -> int:
    """Bytes of these columns in one row group, as the file says."""
    columns = map(metadata.row_group(group).column, range(metadata.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema in fields)


def _require(record: dict[str, Any], fields: tuple[str, ...], where: str) -> None:
    for field in fields:
        if field not in record:
            raise DataError(
                f"{where}: no field {field!r}; the fields are {', '.join(map(repr, record)) or 'none'}"
            )


def _text(record: dict[str, Any], field: str, where: str) -> str:
    value = record[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} is not text but {type(value).__name__}; name a text field")
    return value.encode(
        "utf-8", "replace"
    ).decode()  # JSON can spell half a character, which no tokenizer takes
