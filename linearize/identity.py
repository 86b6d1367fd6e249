"""What a student is and comes from: sha256 of every file, and what its training left on record.

A certificate holds these and is judged by them (:mod:`linearize.certificate`).
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from .checkpoint import CONFIG
from .files import sha256_of, sha256_of_files
from .modeling.errors import LinearizeError
from .recipe import Recipe, Teacher
from .teacher import teacher_path

WINDOWS = "data.held-out windows of "
"""A window's hash is named so, and by its length."""
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*", "*.model",
)  # fmt: skip


def identity(folder: Path, teacher: Teacher) -> dict[str, str | None]:
    """Name -> sha256 of everything that a student is and comes from; None for what is not at hand."""
    own = {
        "student.weights": _files(folder, WEIGHTS),
        "student.tokenizer": _files(folder, TOKENIZER),
        "student.config": _files(folder, ("config.json", "generation_config.json")),
        "student.code": _files(folder, ("*.py",)),
        "student.recipe": _files(folder, ("recipe.yaml",)),
    }
    for index, layer in _layers(folder).items():
        own[f"plan.layer {index}"] = hash_of(layer)
    home = teacher_folder(teacher)
    parts = {"weights": WEIGHTS, "tokenizer": TOKENIZER, "config": ("config.json",)}
    theirs = {f"teacher.{name}": home and _files(home, patterns) for name, patterns in parts.items()}
    package = Path(__file__).parent
    return own | theirs | {"package": sha256_of_files(package.rglob("*.py"), package)}


def teacher_folder(teacher: Teacher) -> Path | None:
    """Where a teacher's files are on this machine: its folder, or the Hub's cache; None where they are not."""
    try:
        source = teacher_path(teacher.name)
        if isinstance(source, Path):
            return source
        found = try_to_load_from_cache(source, CONFIG, revision=teacher.revision)
    except (LinearizeError, OSError, RuntimeError, ValueError):
        return None  # no folder or repository can have such a name
    return Path(found).parent if isinstance(found, str) else None


def data_hashes(
    fingerprint: str | None, windows: Mapping[int, str], cache: Path | None = None
) -> dict[str, str | None]:
    """Hashes of the training data, of the held-out windows measured on, and of the token files in ``cache``."""
    found: dict[str, str | None] = {"data.fingerprint": fingerprint}
    found |= {f"{WINDOWS}{length}": digest for length, digest in windows.items()}
    return found | file_hashes(cache)


def file_hashes(cache: Path | None) -> dict[str, str]:
    """Hash of the tokens that were sampled or read once, where they were kept."""
    found = None if cache is None else _files(cache, ("*.safetensors",))
    return {} if found is None else {"data.files": found}


def trained_on(folder: Path) -> str | None:
    """The fingerprint of the data that a checkpoint's run was trained on, where it says so."""
    for stage in ("finetune", "transfer"):
        settings = _done(folder.parent / stage).get("settings") or {}
        if isinstance(found := settings.get("corpus"), str):
            return found
    return None


def _done(stage: Path) -> dict[str, Any]:
    """What a finished stage of training left; empty where there is none."""
    try:
        return json.loads((stage / "done.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def training(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Tokens, seconds and trained parameters of each stage, from the run that the checkpoint lies in."""
    tokens: dict[str, int | None] = {}
    seconds: dict[str, float | None] = {}
    trained: dict[str, int | None] = {}
    for stage in ("transfer", "finetune"):
        at = folder.parent / stage
        record = _done(at)
        tokens[stage], seconds[stage] = record.get("tokens"), record.get("seconds")
        trained[stage] = 0 if record.get("skipped") else _elements([at / "weights.safetensors"])
    total = _elements(sorted(folder.glob("*.safetensors")))
    mixers = trained["transfer"]
    return {
        "tokens": tokens,
        "seconds": seconds,
        "seed": recipe.seed,
        "parameters": {
            "student": total,
            "trained": trained,
            "frozen": None if total is None or mixers is None else total - mixers,
        },
    }


def _elements(paths: Iterable[Path]) -> int | None:
    """Numbers in safetensors files, read from their headers; None where one is not there."""
    total, found = 0, False
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
        found = True
    return total if found else None


def _layers(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return dict(config["linearize"]["layers"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def layer_plan(folder: Path) -> dict[str, Any]:
    """Method and geometry of every converted layer, as the checkpoint's configuration has them."""
    return {
        index: {
            "method": layer["method"],
            "sliding_window": layer.get("sliding_window"),
            "geometry": layer["geometry"],
        }
        for index, layer in _layers(folder).items()
    }


def _files(folder: Path, patterns: Iterable[str]) -> str | None:
    """sha256 of the files of these names, None where there is none."""
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    if len(paths) == 1:
        return sha256_of(paths[0])
    return sha256_of_files(paths, folder) if paths else None


def hash_of(tree: Any) -> str:
    return hashlib.sha256(
        json.dumps(tree, sort_keys=True, ensure_ascii=False).encode(errors="surrogatepass")
    ).hexdigest()
