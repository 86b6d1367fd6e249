"""Any model by name: a saved student, its adapters, or a teacher."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from . import checkpoint
from .adapter import ADAPTER_CONFIG, load_adapter
from .modeling.errors import TeacherError
from .recipe import Teacher
from .teacher import NO_CONFIG, load_teacher

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def load(name: str | Path, *, device: str = "cpu") -> tuple[Any, Any]:
    """Model and tokenizer of a saved student, or of a teacher: a folder, a bundled name or a Hub id.

    Adapters pushed alone are put on their teacher, which is fetched too.
    """
    if checkpoint.is_checkpoint(name):
        return checkpoint.load(name, device=device)
    if (Path(name) / ADAPTER_CONFIG).is_file():
        return load_adapter(Path(name), device)
    try:
        return load_teacher(Teacher(name=str(name)), device)
    except TeacherError as error:
        hub_id = HUB_ID.fullmatch(str(name)) is not None
        if hub_id and NO_CONFIG in str(error):
            return load_adapter(checkpoint.fetch(name, marker=ADAPTER_CONFIG), device)
        # A student on the Hub: load_teacher has fetched its configuration and declined.
        config = try_to_load_from_cache(str(name), "config.json") if hub_id else None
        if not isinstance(config, str) or not checkpoint.is_checkpoint(Path(config).parent):
            raise
        return checkpoint.load(name, device=device)
