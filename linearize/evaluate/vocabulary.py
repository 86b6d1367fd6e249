"""Teacher and student must mean the same by a token id: tokenizers are compared by the hash of their vocabularies."""

import hashlib
import json
import logging
from typing import Any

from ..modeling.errors import EvaluationError

logger = logging.getLogger(__name__)


def vocabulary_digest(tokenizer: Any) -> str:
    """sha256 of every token with its id, special and added ones included."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def refuse_other_vocabulary(student: Any, teacher: Any, name: str) -> None:
    """Raises EvaluationError unless the tokenizer of the student `name` has the teacher's tokens under the same ids.

    A student that was saved without a tokenizer cannot be checked, which the log says.
    """
    if student is None:
        logger.warning(
            "%s: was saved without a tokenizer, so its vocabulary is taken for the teacher's, unchecked", name
        )
        return
    ours, theirs = vocabulary_digest(student), vocabulary_digest(teacher)
    if ours == theirs:
        return
    mine, yours = student.get_vocab(), teacher.get_vocab()
    other = next(
        (
            t
            for t in sorted({*mine, *yours}, key=lambda t: (mine.get(t, yours.get(t)), t))
            if mine.get(t) != yours.get(t)
        ),
        None,
    )
    raise EvaluationError(
        f"{name}: its vocabulary ({len(mine)} tokens, sha256 {ours[:12]}) is not the teacher's ({len(yours)}, "
        f"{theirs[:12]}): {other!r} is {mine.get(other)} in the one and {yours.get(other)} in the other; "
        "evaluate it beside the teacher that it was made from"
    )
