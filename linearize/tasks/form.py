"""The form of a prompt: plain text, or one turn of a chat whose reply has begun; and the tokens that it takes.

Plain text is what a base model continues. A chat model gets the same words in its tokenizer's template: all up to the
answer's prefix is the user's turn, and the prefix begins the reply.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..modeling.errors import DataError
from .recall import Tokenizer, behind_letter, piece, prefix

_MARK = "(the question stands here)"


@dataclass(frozen=True)
class Form:
    """What stands around a question: token ids before all text, and the template's text before and behind a turn."""

    opening: tuple[int, ...] = ()
    head: str = ""
    tail: str = ""

    def text(self, question: str, reply: str) -> str:
        """A question that ends with ``reply``, the start of its answer, with what stands around it."""
        if not self.tail:
            return question
        assert question.endswith(reply), (question[-80:], reply)
        asked = question[: len(question) - len(reply)].strip()
        return f"{self.head}{asked}{self.tail}{reply.lstrip()}"


def plain(tokenizer: Tokenizer) -> Form:
    """No template: what the tokenizer puts before any text, such as begin-of-sequence."""
    return Form(tuple(prefix(tokenizer)))


def chat(tokenizer: Any) -> Form:
    """The tokenizer's chat template around one turn of the user, up to where the reply begins.

    Raises DataError for a tokenizer without a template, and for a template that does not show the turn as it is.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("the tokenizer has no chat template, so it asks nothing in the form of a chat")
    turn = [{"role": "user", "content": _MARK}]
    try:
        made = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # the template is the tokenizer's own code, in Jinja
        line = " ".join(str(error).split())[:200]
        raise DataError(f"the tokenizer's chat template cannot be used ({line})") from None
    head, *tails = made.split(_MARK)
    if len(tails) != 1 or not tails[0]:
        raise DataError(
            "the tokenizer's chat template does not show a user's turn once, with a reply behind it"
        )
    return Form((), head, tails[0])


class Counter:
    """Token ids of a whole prompt in its form, opened as the tokenizer opens a text, and never closed.

    ``reply`` is how every text ends that is counted: the start of the answer.
    """

    def __init__(self, tokenizer: Tokenizer, form: Form, reply: str = ""):
        self.tokenizer, self.form, self.reply = tokenizer, form, reply

    def ids(self, text: str) -> list[int]:
        return self._ids(self.form.text(text, self.reply))

    def __call__(self, text: str) -> int:
        """Tokens of a prompt."""
        return len(self.ids(text))

    def depth(self, text: str, needle: str) -> float:
        """Where `needle` starts, as a share of the tokens of the whole; the last of equal ones."""
        return len(self._ids(self.form.head + text[: text.rindex(needle)])) / self(text)

    def continuation(self, text: str) -> list[int]:
        return piece(self.tokenizer, f" {text}")

    def series(self, texts: Sequence[str], joints: Sequence[str]) -> tuple[tuple[list[int], list[int]], ...]:
        """Several continuations one after another: of each, the tokens of what stands before it, and its own."""
        pairs = zip(joints, texts, strict=True)
        return tuple(
            (behind_letter(self.tokenizer, joint) if joint else [], self.continuation(text))
            for joint, text in pairs
        )

    @property
    def opening(self) -> list[int]:
        """Token ids before the question, for prompts that are made of tokens."""
        return self._ids(self.form.head)

    @property
    def closing(self) -> list[int]:
        """Token ids behind it, up to where the reply begins."""
        return piece(self.tokenizer, self.form.tail) if self.form.tail else []

    def _ids(self, text: str) -> list[int]:
        more = self.tokenizer.encode(text, add_special_tokens=False) if text else []
        return [*self.form.opening, *more]
