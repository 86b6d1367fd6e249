"""Write and read a saved student: an ordinary Hugging Face folder, complete or absent, never half of one."""

import contextlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from . import untrusted
from .files import locked, sync
from .modeling.errors import CheckpointError, LinearizeError
from .modeling.model import PREFIX, check_format, linear_model_class
from .modeling.registry import METHODS

CONFIG = "config.json"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""``owner/name``."""
PARTIAL = ".partial"
"""Ends the name of a folder that is being written."""


def is_checkpoint(folder: str | Path) -> bool:
    """Whether this folder holds a saved student (or claims to)."""
    try:
        config = json.loads((Path(folder) / CONFIG).read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and str(config.get("model_type", "")).startswith(PREFIX)


def fetch(name: str | Path, *, marker: str = CONFIG) -> Path:
    """The folder of a student: ``name`` itself, or where the Hub's files of that id are after a download.

    ``marker`` is the file without which the rest is not worth fetching. Raises :class:`CheckpointError`.
    """
    if Path(name).is_dir() or not HUB_ID.fullmatch(str(name)):
        return Path(name)
    try:
        found = Path(hf_hub_download(str(name), marker)).parent
        if marker == CONFIG and not is_checkpoint(found):
            raise CheckpointError(f"{name}: is on the Hub, but no saved student; give the id of one")
        return Path(snapshot_download(str(name)))
    except RemoteEntryNotFoundError:
        raise CheckpointError(f"{name}: has no {marker} on the Hub; give the id of a saved student") from None
    except CheckpointError:
        raise
    except Exception as error:  # the network fails in many ways (httpx, ssl, proxies), all with one remedy
        raise CheckpointError(
            f"{name}: no such folder, and the Hub does not give it ({_line(error)}); "
            "give a run's `student` folder or a student's id on the Hub, and `hf auth login` where it is private"
        ) from None


def save(
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    *,
    extra: Mapping[str, str | Mapping[str, Any]] | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a converted model, its tokenizer and the code that loads it; returns the folder.

    ``extra`` maps file names to text or to JSON content written beside the weights. The folder appears complete, by a
    rename, or not at all. Raises :class:`CheckpointError` when it exists and is not empty, or cannot be written.
    """
    if not isinstance(model, PreTrainedModel):
        raise CheckpointError(
            f"{type(model).__name__}: is a wrapper, not a transformers model; "
            "merge its adapter and save the model inside"
        )
    if not getattr(model.config, "linearize", None):
        raise CheckpointError(f"{type(model).__name__}: is not a converted model; use convert first")
    with replacing(Path(folder)) as target:
        with quiet_transformers():
            model.save_pretrained(target, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        for name, content in (extra or {}).items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
            (target / name).write_text(text)
    return Path(folder)


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its name when the block ends well and is removed otherwise.

    Those of writers that were killed are removed by the next one.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(
            f"{folder}: exists already and is not empty; choose another folder or remove it"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        target = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=PARTIAL, dir=folder.parent))
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be written ({error.strerror}); choose another place"
        ) from error
    try:
        with locked(target):
            yield target
            for path in target.rglob("*"):
                sync(path)
            sync(target)
            target.chmod(0o755)  # mkdtemp makes it private
            if folder.exists():
                folder.rmdir()
            target.rename(folder)
        sync(folder.parent)
    except Exception as error:
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise  # the plain ones are how tokenizers tell a full disk
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(
            f"{folder}: could not be written ({reason}); nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary folders of ``folder`` whose writers are gone, as far as they are ours to remove."""
    for path in folder.parent.iterdir():
        if path.name.startswith(f".{folder.name}.") and path.name.endswith(PARTIAL):
            with contextlib.suppress(OSError), locked(path) as abandoned:
                if abandoned:
                    shutil.rmtree(path)


def load(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """A saved student and its tokenizer, in evaluation mode, from a folder or a Hub id; runs no code from it.

    ``dtype`` is that of the model's own weights (``"auto"``: as saved); mixers keep theirs. Further keywords go to
    transformers' ``from_pretrained``. Raises :class:`CheckpointError` for a folder that is not a student, a newer
    format, a damaged file, and any missing or unexpected weight.
    """
    fields = _read_config(name)
    family = str(fields.get("model_type", ""))
    if not family.startswith(PREFIX):
        raise CheckpointError(f"{name}: model_type {family!r} is not a saved student; convert it first")
    check_format(fields.get("linearize"))
    cls = _class_of(name, fields, family.removeprefix(PREFIX))
    if Path(name).is_dir():
        _refuse_excess(name, cls)
    safe = {"use_safetensors": True, "trust_remote_code": False}
    try:
        with quiet_transformers():
            model, info = cls.from_pretrained(
                name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **safe, **kwargs
            )
    except LinearizeError:
        raise
    except Exception as error:  # a damaged folder fails in as many ways as there are lines that read it
        raise CheckpointError(
            f"{name}: weights cannot be read ({_line(error)}); save or download it again"
        ) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            example = min(key if isinstance(key, str) else key[0] for key in info[problem])
            raise CheckpointError(
                f"{name}: {len(info[problem])} {problem.replace('_', ' ')}, {example} for one; "
                "the weights do not belong to this configuration; save or download it again"
            )
    if device is not None:
        model.to(device)
    return model.eval(), _tokenizer(name, model.config)


def _read_config(name: str | Path) -> dict[str, Any]:
    if Path(name).is_dir() and not (Path(name) / CONFIG).is_file():
        raise CheckpointError(f"{name}: has no {CONFIG}, so it is not a saved model; give another folder")
    try:
        fields = PreTrainedConfig.get_config_dict(str(name))[0]
    except Exception as error:  # not JSON, JSON of another shape, no network
        raise CheckpointError(
            f"{name}: cannot be read ({_line(error)}); give a folder or a Hub id"
        ) from error
    reason = untrusted.refusal(fields, Path(name) if Path(name).is_dir() else None)
    if reason is None and fields.get("quantization_config"):
        reason = "config.json: quantization_config: no student is saved quantised; remove the key"
    if reason:
        raise CheckpointError(f"{name}: {reason}")
    return fields


def _refuse_excess(name: str | Path, cls: Any) -> None:
    """Refuse a configuration that describes no model, or one that would take more memory than the files fill."""
    try:
        with quiet_transformers():
            config = cls.config_class.from_pretrained(name)
            reason = untrusted.excess(lambda: cls(config), Path(name))
    except LinearizeError:
        raise
    except Exception as error:  # numbers and types that the family's own code, or a mixer's, stumbles over
        raise CheckpointError(
            f"{name}: config.json does not describe a student ({_line(error)}); save or download it again"
        ) from None
    if reason:
        raise CheckpointError(f"{name}: {reason}; they do not belong together; save or download it again")


def _class_of(name: str | Path, fields: Mapping[str, Any], family: str) -> Any:
    """The causal-LM class of a saved student, from the names in its configuration."""
    names = fields.get("architectures")
    architecture = names[0] if isinstance(names, list) and names else "?"
    base = getattr(transformers, str(architecture).removeprefix("Linear"), None)
    known = isinstance(base, type) and issubclass(base, PreTrainedModel) and base is not PreTrainedModel
    if family not in CONFIG_MAPPING or not known:
        raise CheckpointError(
            f"{name}: family {family!r} ({architecture}) is unknown to "
            f"transformers {transformers.__version__}; upgrade it"
        )
    return linear_model_class(base, tuple(METHODS.items()))


def _tokenizer(name: str | Path, config: Any) -> Any:
    folder = Path(name)
    if folder.is_dir() and not any(
        (folder / f).exists() for f in ("tokenizer.json", "tokenizer_config.json")
    ):
        return None
    try:
        with quiet_transformers():  # given the configuration, it need not ask for the folder's code
            return AutoTokenizer.from_pretrained(name, config=config, trust_remote_code=False)
    except Exception as error:  # its files are another's
        raise CheckpointError(f"{name}: the tokenizer cannot be read ({_line(error)})") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No warnings and bars from transformers while we read what it reports ourselves."""
    logger = logging.getLogger("transformers")
    level, bars = logger.level, transformers.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers.logging.enable_progress_bar()


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
