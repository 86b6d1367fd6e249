"""Any model by name: a saved student, or a teacher."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from . import checkpoint
from .modeling.errors import TeacherError
from .recipe import Teacher
from .teacher import load_teacher

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def load(name: str | Path, *, device: str = "cpu") -> tuple[Any, Any]:
    """Model and tokenizer of a saved student, or of a teacher: a folder, a bundled name or a Hub id."""
    if checkpoint.is_checkpoint(name):
        return checkpoint.load(name, device=device)
    try:
        return load_teacher(Teacher(name=str(name)), device)
    except TeacherError:
        # A student on the Hub: load_teacher has fetched its configuration and declined.
        config = try_to_load_from_cache(str(name), "config.json") if HUB_ID.fullmatch(str(name)) else None
        if not isinstance(config, str) or not checkpoint.is_checkpoint(Path(config).parent):
            raise
        return checkpoint.load(name, device=device)
