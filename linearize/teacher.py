"""Load the teacher: a bundled name, a local folder, or a Hub id.

Everything that can be wrong is looked at in order of cost: the list of files, the raw configuration, its
class, the tokenizer, the weights. Code from a model's folder runs only where the recipe says ``trust_remote_code``,
pickle files are opened only where it says ``allow_pickle``, and then by torch's ``weights_only`` loader.
"""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers.utils.logging as hf_logging
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from linearize import untrusted
from linearize.modeling.errors import TeacherError
from linearize.recipe import shipped_recipes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from linearize.recipe import Teacher

logger = logging.getLogger(__name__)

BUNDLED: dict[str, Path] = {"books-5m": Path(__file__).parent / "teachers" / "books-5m"}

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ONLY = "give a decoder-only model with a language-model head"
NO_CONFIG = "no config.json"
"""Stands in the error about a place that holds no model: what does may be adapters."""
STUDENT_PREFIX = "linearize_"  # how model_type begins in every checkpoint that this package writes


def teacher_path(name: str) -> Path | str:
    """Where a teacher is: the folder of a bundled name, an existing folder, or the Hub id unchanged."""
    if name in BUNDLED:
        return BUNDLED[name]
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise TeacherError(
            f"teacher.name: {name} is a file; give the folder that holds config.json and the weights"
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise TeacherError(
            f"teacher.name: no folder {name}; give a folder, a Hub id, or one of {', '.join(BUNDLED)}"
        )
    return name


def load_teacher(
    spec: Teacher, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The teacher on `device` (evaluation mode, frozen) and its tokenizer.

    `spec.dtype` "auto" is float32 on the CPU, where half precision is slow and coarse, and elsewhere the
    checkpoint's own.
    """
    source = teacher_path(spec.name)
    place = str(source) if isinstance(source, Path) else spec.name
    hub = {"revision": spec.revision} if isinstance(source, str) and spec.revision else {}
    with _quiet():
        pickled = _check_files(place, _files(source, spec.revision), spec.allow_pickle)
        config = _config(place, trust=spec.trust_remote_code, hub=hub)
        tokenizer = _tokenizer(place, trust=spec.trust_remote_code, hub=hub)
        dtype = _dtype(spec.dtype, torch.device(device))
        how = {"trust": spec.trust_remote_code, "pickled": pickled, "hub": hub}
        model: Any = _weights(place, config, dtype, **how)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise TeacherError(
            f"{place}: the tokenizer has {len(tokenizer)} tokens and the model {rows} embeddings; "
            "they do not belong together"
        )
    return model.to(device).eval().requires_grad_(False), tokenizer


def teacher_without_weights(spec: Teacher, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The teacher's shapes on the meta device, in the precision of a loaded one; only config.json is read.

    Raises :class:`TeacherError` for a configuration that is no causal language model.
    """
    source = teacher_path(spec.name)
    place = str(source) if isinstance(source, Path) else spec.name
    hub = {"revision": spec.revision} if isinstance(source, str) and spec.revision else {}
    if isinstance(source, str):
        _files(source, spec.revision)  # says what is wrong with a Hub id, sooner than transformers would
    elif not (source / "config.json").is_file():
        raise TeacherError(
            f"{place}: no config.json; give a folder or Hub id in the layout of save_pretrained"
        )
    with _quiet():
        config = _config(place, trust=spec.trust_remote_code, hub=hub)
        dtype = _dtype(spec.dtype, torch.device(device))
        own = getattr(config, "dtype", None) or torch.float32
        try:
            with torch.device("meta"):
                model: Any = AutoModelForCausalLM.from_config(
                    config, trust_remote_code=spec.trust_remote_code
                )
        except Exception as error:  # numbers and types that the family's own code stumbles over
            raise TeacherError(
                f"{place}: config.json does not describe a model ({_line(error, 80)}); fetch it again"
            ) from None
    return model.to(own if dtype == "auto" else dtype)


def _files(source: Path | str, revision: str | None) -> set[str] | None:
    """Names of the files of a folder or a Hub repository; None where only the Hub's cache can be asked."""
    if isinstance(source, Path):
        return {path.name for path in source.iterdir() if path.is_file()}
    from huggingface_hub import HfApi, errors, try_to_load_from_cache

    near = difflib.get_close_matches(source, [*BUNDLED, *shipped_recipes()], n=1)
    hint = (
        f"did you mean {near[0]!r}?" if near else f"give a folder, a Hub id, or one of {', '.join(BUNDLED)}"
    )
    try:
        # Asked first because from_pretrained retries for half a minute where there is no network.
        info = HfApi().model_info(source, revision=revision, timeout=20)
    except errors.HFValidationError:
        raise TeacherError(f"teacher.name: {source!r} is neither a folder nor a Hub id; {hint}") from None
    except errors.RevisionNotFoundError:
        raise TeacherError(f"teacher.revision: {source} has no revision {revision!r} on the Hub") from None
    except errors.GatedRepoError:
        raise TeacherError(
            f"{source}: access is gated; accept its terms on the Hub, then `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise TeacherError(
            f"teacher.name: no model {source!r} on the Hub (or it is private: `hf auth login`); {hint}"
        ) from None
    except Exception as error:  # the network fails in many ways (httpx, ssl, proxies), all with one remedy
        if isinstance(try_to_load_from_cache(source, "config.json", revision=revision), str):
            return None
        raise TeacherError(
            f"teacher.name: {source!r} is not on this machine and the Hub does not answer "
            f"({_line(error, 80)}); {hint}"
        ) from None
    return {file.rfilename for file in info.siblings or ()}


def _check_files(place: str, files: set[str] | None, allow_pickle: bool) -> bool:
    """Whether the weights are pickle files, which have to be allowed; a folder without weights is refused."""
    if files is None:
        return False
    if "config.json" not in files:
        raise TeacherError(f"{place}: {NO_CONFIG}; give a folder or Hub id in the layout of save_pretrained")
    top = {name for name in files if "/" not in name}
    if any(name.endswith(".safetensors") for name in top):
        return False
    if any(name.endswith(PICKLES) for name in top):
        if allow_pickle:
            return True
        raise TeacherError(
            f"{place}: the weights are pickle files, which can hold code; save the model again as safetensors, or read "
            "them all the same with teacher.allow_pickle=true"
        )
    raise TeacherError(
        f"{place}: no weights (*.safetensors) beside config.json; download or save the model whole"
    )


def _config(place: str, *, trust: bool, hub: dict[str, str]) -> PretrainedConfig:
    """The configuration of a causal language model; encoders, students and others are refused by name."""
    try:
        raw, _ = PretrainedConfig.get_config_dict(place, **hub)
    except Exception as error:  # unreadable JSON, an interrupted download
        raise TeacherError(
            f"{place}: config.json cannot be read ({_line(error)}); fetch or save it again"
        ) from None
    if reason := untrusted.refusal(raw, Path(place) if Path(place).is_dir() else None):
        raise TeacherError(f"{place}: {reason}")
    kind = raw.get("model_type", "")
    if kind.startswith(STUDENT_PREFIX):
        raise TeacherError(
            f"{place}: is already a student (model_type {kind}); "
            "give the teacher that it was made from, or load it with linearize.load"
        )
    if raw.get("quantization_config"):
        raise TeacherError(
            f"{place}: the weights are quantised, which cannot be converted; give the full-precision model"
        )
    if "auto_map" in raw and not trust and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise TeacherError(
            f"{place}: {kind or 'this model'} needs code from its own folder; "
            "read it, then set teacher.trust_remote_code=true"
        )
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust, **hub)
    except Exception as error:
        raise TeacherError(
            f"{place}: model_type {kind!r} is not one that transformers {_version()} can load "
            f"({_line(error, 80)})"
        ) from None
    if getattr(config, "is_encoder_decoder", False):
        raise TeacherError(f"{place}: {kind} is an encoder-decoder; {ONLY}")
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise TeacherError(f"{place}: {kind} is an encoder; {ONLY}")
    remote = "AutoModelForCausalLM" in raw.get("auto_map", {}) and trust
    names = raw.get("architectures")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if not remote and (kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (names and causal.isdisjoint(names))):
        raise TeacherError(f"{place}: {', '.join(names) or kind} is not a causal language model; {ONLY}")
    return config


def _tokenizer(place: str, *, trust: bool, hub: dict[str, str]) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust, **hub)
        usable = len(tokenizer.encode("One of the words", add_special_tokens=False)) > 0
    except Exception as error:
        raise TeacherError(
            f"{place}: no tokenizer that can be read ({_line(error, 80)}); "
            "save the tokenizer into the model's folder"
        ) from None
    if not usable:  # transformers builds an empty tokenizer where the files are absent
        raise TeacherError(
            f"{place}: the tokenizer has no vocabulary; save the tokenizer into the model's folder"
        )
    return tokenizer


def _weights(
    place: str,
    config: PretrainedConfig,
    dtype: torch.dtype | str,
    *,
    trust: bool,
    pickled: bool,
    hub: dict[str, str],
) -> PreTrainedModel:
    options: dict[str, Any] = {
        "use_safetensors": not pickled,
        "weights_only": True,
        "output_loading_info": True,
        "trust_remote_code": trust,
        **hub,
    }
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        if Path(place).is_dir() and not pickled:
            _refuse_excess(place, config, trust)
        model, info = load(place, config=config, dtype=dtype, **options)
    except torch.OutOfMemoryError as error:
        raise TeacherError(
            f"{place}: does not fit in memory ({_line(error, 80)}); use a smaller model or dtype"
        ) from None
    except TeacherError:
        raise
    except RuntimeError as error:
        mended = "the shapes do not match config.json" if "mismatched" in str(error) else _line(error)
        raise TeacherError(
            f"{place}: the weights cannot be loaded ({mended}); fetch the model again"
        ) from None
    except (
        Exception
    ) as error:  # safetensors: truncated or not safetensors at all; OSError: a shard is missing
        raise TeacherError(
            f"{place}: the weights cannot be read ({_line(error)}); fetch the model again"
        ) from None
    if missing := sorted(info["missing_keys"]):
        raise TeacherError(
            f"{place}: {len(missing)} weights are missing, {missing[0]} first; "
            "the checkpoint is not whole; fetch it again"
        )
    if unexpected := sorted(info["unexpected_keys"]):
        logger.warning(
            "%s: %d weights have no place in the model and are left out, %s first",
            place,
            len(unexpected),
            unexpected[0],
        )
    return model


def _refuse_excess(place: str, config: PretrainedConfig, trust: bool) -> None:
    def build() -> Any:
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust)

    try:
        reason = untrusted.excess(build, Path(place))
    except Exception as error:  # numbers and types that the family's own code stumbles over
        raise TeacherError(
            f"{place}: config.json does not describe a model ({_line(error, 80)}); fetch it again"
        ) from None
    if reason:
        raise TeacherError(f"{place}: {reason}; they do not belong together; fetch the model again")


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    if name != "auto":
        return DTYPES[name]
    return torch.float32 if device.type == "cpu" else "auto"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and load reports (our own errors say the same), restored on exit."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _line(error: BaseException, limit: int = 120) -> str:
    """The first line of a library's message, short enough to stand inside ours."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _version() -> str:
    import transformers

    return transformers.__version__
