"""The teacher's licence, which its student inherits: found, told, and refused where it forbids derivatives."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, try_to_load_from_cache

from .recipe import Teacher
from .teacher import teacher_path

FORBIDS = re.compile(r"(?<![a-z])nd(?![a-z])|no[-_ ]?deriv", re.IGNORECASE)
"""cc-by-nd-4.0 and its kin, and what says so in words."""
TEXTS = {
    "apache-2.0": r"Apache License\s+Version 2\.0",
    "mit": r"Permission is hereby granted, free of charge",
    "cc0-1.0": r"CC0 1\.0 Universal",
    "gpl-3.0": r"GNU GENERAL PUBLIC LICENSE\s+Version 3",
    "bsd-3-clause": r"Neither the name of .* nor the names of its\s+contributors",
}
"""How the texts of well-known licences are recognised where a folder holds nothing else."""


@dataclass(frozen=True)
class Licence:
    """An identifier as the Hub writes it; None where nothing was found, and ``source`` says where we looked."""

    id: str | None
    source: str
    name: str | None = None
    link: str | None = None
    forbids: str | None = None
    """The words that forbid derivatives, if any."""


def licence_of(teacher: Teacher, *, network: bool = True) -> Licence:
    """The licence that the teacher's own card, metadata or LICENSE file states."""
    place = teacher_path(teacher.name)
    if isinstance(place, Path):
        return _of_folder(place, teacher.name)
    if network:
        try:
            info = HfApi().model_info(place, revision=teacher.revision, timeout=20)
        except Exception:  # private, gone, or no network: unknown, and said to be
            return Licence(None, f"{teacher.name} cannot be asked on the Hub")
        data = info.card_data.to_dict() if info.card_data else {}
        tags = [tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")]
        return _of_metadata(data if data.get("license") else data | {"license": (tags or [None])[0]}, place)
    cached = try_to_load_from_cache(place, "README.md", revision=teacher.revision)
    if isinstance(cached, str):
        return _of_metadata(_metadata(Path(cached)), place)
    return Licence(None, f"the card of {teacher.name} was not asked for")


def _of_folder(folder: Path, name: str) -> Licence:
    found = Licence(None, f"{name} has no card that states one, and no LICENSE file")
    if (folder / "README.md").is_file():
        stated = _of_metadata(_metadata(folder / "README.md"), name)
        if stated.id or stated.forbids:
            return stated
    for path in sorted(folder.glob("LICEN[CS]E*")):
        text = path.read_text(encoding="utf-8", errors="replace")
        forbids = re.search(r"no[-_ ]?deriv\w*", text[:4000], re.IGNORECASE)
        known = [key for key, pattern in TEXTS.items() if re.search(pattern, text)]
        return Licence(
            known[0] if known else "other",
            f"{path.name} of {name}",
            name=None if known else path.name,
            forbids=forbids[0] if forbids else None,
        )
    return found


def _metadata(path: Path) -> dict[str, Any]:
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError):
        return {}


def _of_metadata(data: Mapping[str, Any], name: str) -> Licence:
    words = [data.get(key) for key in ("license", "license_name", "license_link")]
    first, label, link = (
        str(word[0] if isinstance(word, list) and word else word) if word else None for word in words
    )
    tags = data.get("tags")
    said = [first, label, link, *(map(str, tags) if isinstance(tags, list) else ())]
    forbids = next((text for text in said if text and FORBIDS.search(text)), None)
    if first is None:
        return Licence(None, f"the card of {name} states none", forbids=forbids)
    return Licence(first, f"the card of {name}", label, link, forbids)
