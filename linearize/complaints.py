"""What is wrong with a recipe, as one line: the key, the value found, what to do."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails


def near(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'window'?"``, or the choices where nothing is near."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; choose from {', '.join(sorted(known))}" if known else ""


def located(line: str, place: str | None, overridden: Sequence[str]) -> str:
    """The line with the recipe file's name in front, unless its key came from the command line."""
    key = line.partition(":")[0]
    mine = any(key == k or key.startswith(f"{k}.") or k.startswith(f"{key}.") for k in overridden)
    return line if place is None or mine else f"{place}: {line}"


def complaint(error: ValidationError, model: type[BaseModel], given: Any, prefix: str = "") -> str:
    """One thing wrong in ``given``, the tree that ``model`` refused.

    An unknown key comes first, because it explains other errors; then the deepest, since a union that fails
    also complains at the key above.
    """
    details = error.errors(include_url=False)
    first = min(details, key=lambda e: (e["type"] != "extra_forbidden", -len(_path(e, given))))
    path = _path(first, given)
    same = [e for e in details if _path(e, given) == path]
    key = ".".join([prefix, *map(str, path)] if prefix else map(str, path))
    reason = _reason(first, same, path, model, given)
    # A check across keys names them itself, relative to its section.
    own = first["type"] == "value_error" and isinstance(first["input"], Mapping | BaseModel)
    return f"{key}{'.' if own and key else ': ' if key else ''}{reason}"


def _path(error: ErrorDetails, given: Any) -> tuple[str | int, ...]:
    """The keys that the user wrote. pydantic also names the members of unions, which nobody wrote."""
    path: list[str | int] = []
    node: Any = given
    for part in error["loc"]:
        inside = (isinstance(node, Mapping) and part in node) or (
            isinstance(node, list) and isinstance(part, int) and part < len(node)
        )
        if inside:
            path.append(part)
            node = node[part]  # type: ignore[index]
    if error["type"] == "missing":
        path.append(error["loc"][-1])
    return tuple(path)


def _reason(
    error: ErrorDetails,
    same: list[ErrorDetails],
    path: tuple[str | int, ...],
    model: type[BaseModel],
    given: Any,
) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        siblings = _fields(model, path[:-1], given)
        close = near(str(path[-1]), siblings)
        elsewhere = [k for k in _all_keys(model) if k.rpartition(".")[2] == path[-1]]
        listed = any(isinstance(part, int) for part in path)  # entries of a list have their own keys
        if "did you mean" not in close and elsewhere and not listed:
            close = f"; did you mean {' or '.join(map(repr, elsewhere[:3]))}?"
        return f"unknown key{close}"
    if kind == "invalid_key":
        return (
            f"{_shown(error)} is not a word; YAML reads on, yes, null and numbers as values; put it in quotes"
        )
    if kind == "missing":
        return "missing; give it a value"
    if kind == "union_tag_not_found":
        return f"'kind' is missing; choose from {context.get('expected_tags', _kinds(model, path))}"
    if kind == "union_tag_invalid":
        return f"kind {context['tag']!r} is unknown; choose from {context['expected_tags']}"
    if kind == "value_error" and isinstance(error["input"], Mapping | BaseModel):
        return str(context["error"])
    if kind == "literal_error":
        if empty := [e for e in same if e["type"] == "too_short"]:
            return f"{_shown(error)} {_sentence(empty[0])}"
        listed = any(e["type"] == "list_type" for e in same)
        expected = str(context["expected"]).replace(" or ", ", ")
        words = [word.strip().strip("'") for word in expected.split(",")]
        close = difflib.get_close_matches(str(error["input"]), words, n=1)
        meant = f"did you mean {close[0]!r}? " if close else ""
        return f"{_shown(error)} is unknown; {meant}choose from {expected}{' or a list' if listed else ''}"
    return f"{_shown(error)} " + " or ".join(dict.fromkeys(_sentence(e) for e in same))


def _shown(error: ErrorDetails) -> str:
    text = repr(error["input"])
    return text if len(text) <= 60 else f"{text[:57]}..."


_PLAIN = {
    "model_type": "should hold keys and values",
    "model_attributes_type": "should hold keys and values",
    "list_type": "should be a list",
    "too_short": "should have at least one entry",
    "int_type": "should be a whole number",
    "int_parsing": "should be a whole number",
    "float_type": "should be a number",
    "float_parsing": "should be a number",
    "string_type": "should be text",
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
}


def _sentence(error: ErrorDetails) -> str:
    if error["type"] in _PLAIN:
        return _PLAIN[error["type"]]
    text = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return text[:1].lower() + text[1:]


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _fields(model: type[BaseModel], path: Sequence[str | int], given: Any) -> list[str]:
    """The keys that the tree knows at ``path``; the entries of a list are told apart by their ``kind``."""
    models, node = [model], given
    for part in path:
        node = node[part]
        if isinstance(part, str):
            models = [m for owner in models for m in _models(owner.model_fields[part].annotation)]
        else:
            models = [m for m in models if m.model_fields["kind"].default == node.get("kind")]
    return [name for owner in models for name in owner.model_fields]


def _kinds(model: type[BaseModel], path: Sequence[str | int]) -> str:
    models = [model]
    for part in path:
        if isinstance(part, str):
            models = [m for owner in models for m in _models(owner.model_fields[part].annotation)]
    return ", ".join(repr(m.model_fields["kind"].default) for m in models)


def _all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(f"{prefix}{name}")
        inner = _models(field.annotation)
        if len(inner) == 1:
            keys += _all_keys(inner[0], f"{prefix}{name}.")
    return keys
