"""From a recipe's `data` to a corpus: every source is sampled, read and tokenised, or found in the cache."""

from pathlib import Path
from typing import Any

import torch

from ..modeling.errors import DataError
from ..progress import Watch
from ..tasks.recall import shortest_row
from . import sources as read
from .corpus import Corpus, HeldOut, Part, long_enough
from .pool import Pool, cached, model_digest, tokenizer_digest
from .sampling import sample_pool


def build(
    spec: Any,
    tokenizer: Any,
    *,
    teacher: Any = None,
    cache_dir: Path | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: Watch | None = None,
) -> Corpus:
    """The corpus of a recipe's `data`: sources read, sampled and tokenised, or found in `cache_dir`.

    `teacher` is needed by a source of kind "self"; it is moved to `device` if one is given.
    """
    _refuse_overlap(spec)
    folder = Path(cache_dir) if cache_dir is not None and spec.cache else None
    if teacher is not None and device is not None:
        teacher = teacher.to(device)
    parts: list[Part] = []
    held: list[HeldOut] = []
    for source in spec.sources:
        if source.kind == "recall":
            _check_recall(source, spec, tokenizer)
            parts.append(Part(_label(source), source.weight, None, source))
            continue
        pool = load_pool(
            source,
            tokenizer,
            teacher=teacher,
            folder=folder,
            row_len=spec.seq_len + 1,
            seed=seed,
            progress=progress,
        )
        if spec.held_out is None:
            pool, tail = pool.split(spec.seq_len + 1)
            name = (
                f"held-out {_label(source)}"
                if source.kind == "self"
                else f"held-out part of {_label(source)}"
            )
            held.append(HeldOut(name, source.weight, tail))
        if spec.packing == "cross":
            long_enough(pool, spec.seq_len, _label(source))
        parts.append(Part(_label(source), source.weight, pool, source))
    for source in spec.held_out or ():
        pool = load_pool(source, tokenizer, folder=folder)
        held.append(HeldOut(_label(source), source.weight, pool))
    return Corpus(parts, held, tokenizer, spec, seed)


def load_pool(
    source: Any,
    tokenizer: Any,
    *,
    teacher: Any = None,
    folder: Path | None = None,
    row_len: int = 0,
    seed: int = 0,
    progress: Watch | None = None,
) -> Pool:
    """All tokens of one source, from the cache in `folder` where the same were made before.

    A Hub data set without a `revision` is known by its name only: give one to notice that it has changed.
    """
    key: dict[str, Any] = {
        "source": source.model_dump(mode="json", exclude={"weight"}),
        "tokenizer": tokenizer_digest(tokenizer),
    }
    if source.kind == "self":
        if teacher is None:
            raise DataError(
                "data.sources: a source of kind 'self' needs the teacher; load it, or name a text source"
            )
        where = teacher.get_input_embeddings().weight.device.type
        key |= {"teacher": model_digest(teacher), "row_len": row_len, "seed": seed, "device": where}
    elif getattr(source, "path", None):
        key["files"] = read.local_key(source.path)

    def make(part: Path | None) -> Pool:
        match source.kind:
            case "self":
                return sample_pool(
                    teacher,
                    tokenizer,
                    tokens=source.tokens,
                    row_len=row_len,
                    temperature=source.temperature,
                    top_p=source.top_p,
                    prompt_len=source.prompt_len,
                    seed=seed,
                    part=part,
                    progress=progress,
                )
            case "text":
                return read.text_pool(read.texts(source.path, source.field, source.separator), tokenizer)
            case "hub":
                origin = (source.dataset, source.subset, source.split, source.revision, source.max_documents)
                return read.text_pool(read.hub_texts(*origin, source.field), tokenizer)
            case "chat":
                turn = read.Turn(source.prompt, source.response, source.context)
                found = (
                    read.pairs(source.path, turn)
                    if source.path
                    else read.hub_pairs(source.dataset, source.split, turn)
                )
                return read.chat_pool(found, tokenizer, _label(source))
        raise DataError(f"data.sources: kind {source.kind!r} has no text of its own")

    pool = cached(folder, source.kind, key, make)
    if len(pool) == 0:
        raise DataError(f"{_label(source)}: no text in it; give a file or field with something to read")
    return pool


def _refuse_overlap(spec: Any) -> None:
    """Figures on text that was trained on say nothing."""

    def origins(source: Any) -> set[Any]:
        if getattr(source, "path", None):
            return {digest for _, digest in read.local_key(source.path)}
        dataset = getattr(source, "dataset", None)
        return {(dataset, getattr(source, "subset", None), source.split)} if dataset else set()

    trained = set().union(*map(origins, spec.sources)) if spec.held_out else set()
    for source in spec.held_out or ():
        if trained & origins(source):
            raise DataError(
                f"data.held_out: {_label(source)} is trained on too; name text that no source has"
            )


def _check_recall(source: Any, spec: Any, tokenizer: Any) -> None:
    least = shortest_row(tokenizer, source.kinds)
    if spec.seq_len + 1 < least:
        raise DataError(
            f"data.seq_len: {spec.seq_len} is too short for recall documents of kind {', '.join(source.kinds)}; "
            f"use {least - 1} or more, or fewer kinds"
        )
    if source.haystack == "text" and all(other.kind == "recall" for other in spec.sources):
        raise DataError(
            "data.sources: recall with haystack 'text' needs another source to draw text from; add one"
        )


def _label(source: Any) -> str:
    match source.kind:
        case "self":
            return "samples of the teacher"
        case "recall":
            return "recall documents"
    return Path(source.path).name if getattr(source, "path", None) else source.dataset
