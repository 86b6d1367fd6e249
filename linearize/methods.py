"""Methods as recipes write them: one, or a map from layers, ``{0-3: lolcats, 7: softmax, rest: {name: still}}``."""

import dataclasses
import functools
import operator
import re
from collections.abc import Collection, Iterable, Mapping
from types import UnionType
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from pydantic import BeforeValidator, ConfigDict, ValidationError, create_model

from .complaints import complaint, near
from .modeling.errors import LinearizeError, RecipeError
from .overrides import parse_override

STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)
DEFAULT_METHOD = "lolcats"
REST = "rest"
"""The key for every layer that no other key names and that ``layers: all`` would convert."""
Value = TypeVar("Value")


def read_whole(value: Any) -> Any:
    """PyYAML reads ``1e6`` as text; a count written so is still a count."""
    if isinstance(value, bool):
        raise ValueError("should be a whole number")
    if isinstance(value, str):
        try:
            value = float(value.replace("_", ""))
        except ValueError:
            raise ValueError("should be a whole number") from None
    if isinstance(value, float) and not value.is_integer():
        raise ValueError("should be a whole number")
    return int(value) if isinstance(value, float) else value


def read_number(value: Any) -> Any:
    """A truth value is not a number."""
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


def _lax(hint: Any) -> Any:
    """The type of a method's field, reading numbers as the rest of the recipe does."""
    if hint in (int, float):
        return Annotated[hint, BeforeValidator(read_whole if hint is int else read_number)]
    if hint == tuple[int, ...]:
        return tuple[_lax(int), ...]
    parts = get_args(hint) if isinstance(hint, UnionType) else ()
    return functools.reduce(operator.or_, map(_lax, parts)) if parts else hint


def build_method(given: Any, *, place: str = "method") -> Any:
    """The config for ``"lolcats"``, ``{"name": "lolcats", "window": 32}``, or a config itself; ``place`` is its key."""
    from .modeling.mixer import MethodConfig
    from .modeling.registry import METHODS

    if isinstance(given, MethodConfig):
        return given
    fields = {"name": given} if isinstance(given, str) else dict(given) if isinstance(given, Mapping) else {}
    name = fields.pop("name", DEFAULT_METHOD if isinstance(given, Mapping) else given)
    if not isinstance(name, str) or name not in METHODS:
        raise RecipeError(f"{place}.name: {name!r} is unknown{near(str(name), METHODS)}")
    config = METHODS[name].config
    hints = get_type_hints(config)
    schema: dict[str, Any] = {f.name: (_lax(hints[f.name]), f.default) for f in dataclasses.fields(config)}
    for key in fields.keys() - schema.keys():
        if owners := [n for n, m in METHODS.items() if key in {f.name for f in dataclasses.fields(m.config)}]:
            raise RecipeError(
                f"{place}.{key}: belongs to {' and '.join(owners)}, not to {name}; leave it out"
            )
    model = create_model(config.__name__, __config__=STRICT, **schema)
    try:
        values = model.model_validate(fields)
    except ValidationError as error:
        raise RecipeError(complaint(error, model, fields, prefix=place)) from None
    method = config(**values.model_dump())
    try:
        method.check(None)
    except LinearizeError as error:
        raise type(error)(str(error).replace("method.", f"{place}.", 1)) from None
    return method


def adjust(model: Any, **fields: Any) -> Any:
    """Set inference-time fields of a student anew, in place, in every layer whose method has them; returns the model.

    ``adjust(model, sparse_cache=256)``: only fields that no weight depends on (a method's ``adjustable``). Saving the
    model keeps them; caches made before belong to the student as it was.
    """
    mixers = model.mixers() if getattr(model.config, "linearize", None) else {}
    offered = {field for mixer in mixers.values() for field in mixer.config.adjustable}
    for field in fields.keys() - offered:
        if not mixers:
            raise RecipeError(
                f"method.{field}: the model has no converted layer; give a student, or leave it out"
            )
        choice = "what can be set anew is " + ", ".join(f"method.{name}" for name in sorted(offered))
        raise RecipeError(
            f"method.{field}: was settled when the student was made; {choice if offered else 'leave it out'}"
        )
    adjusted = {}
    for index, mixer in mixers.items():
        own = {field: value for field, value in fields.items() if field in mixer.config.adjustable}
        given = {"name": mixer.config.name, **dataclasses.asdict(mixer.config), **own}
        adjusted[index] = build_method(given) if own else mixer.config
    for index, config in adjusted.items():  # all are possible
        mixers[index].config = config
        method = {"name": config.name, **dataclasses.asdict(config)}
        model.config.linearize["layers"][str(index)]["method"] = method
    return model


def method_words(words: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """The fields that ``method.field=value`` words name, for :func:`adjust`, and the other words."""
    mine = [word for word in words if word.startswith("method.")]
    fields = {key.removeprefix("method."): value for key, value in map(parse_override, mine)}
    return fields, [word for word in words if word not in mine]


def only_fields(words: Collection[str], quoted: str) -> dict[str, Any]:
    """As :func:`method_words`, where no other word belongs; ``quoted`` is what the user may have left unquoted."""
    fields, others = method_words(words)
    if others:
        raise RecipeError(
            f"{others[0]}: is not a method's field; put {quoted} in quotes, or write method.field=value"
        )
    return fields


def method_names(names: Iterable[str]) -> str:
    """Methods' names for a title, such as ``lolcats+still``; kept softmax layers go without saying."""
    once = dict.fromkeys(names)
    return "+".join([name for name in once if name != "softmax"] or once)


def spell_out(tree: dict[str, Any], key: str) -> None:
    """A method that stands as its name alone gets keys, in place, where ``key`` sets one of its fields."""
    if isinstance(tree.get("layers"), dict):  # YAML reads the key of one layer as a number
        tree["layers"] = {str(layer): method for layer, method in tree["layers"].items()}
    *parents, _ = key.split(".")
    if parents == ["method"]:
        above = tree
    elif len(parents) == 2 and parents[0] == "layers":
        above = tree.get("layers")
    else:
        return
    if isinstance(above, dict) and isinstance(name := above.get(parents[-1]), str):
        above[parents[-1]] = {"name": name}


def build_layers(given: Mapping[Any, Any], method: Any) -> dict[str, Any]:
    """The map with a config for every key; an entry without a name is ``method`` with other fields."""
    if not given:
        raise RecipeError(f"layers: {{}} names no layer; write a number, a range such as 0-3, or {REST}")
    own, built = {"name": method.name, **dataclasses.asdict(method)}, {}
    for key, value in given.items():
        if isinstance(value, Mapping) and "name" not in value:
            value = own | dict(value)
        built[str(key)] = build_method(value, place=f"layers.{key}")
    spread(built)
    return built


def leading(layers: Any) -> Any:
    """What ``method`` is when only a map of layers was written: its first one that trains, ``rest`` before all."""
    entries = dict(layers) if isinstance(layers, Mapping) else {}
    for entry in [entries.pop(REST, None), *entries.values()]:
        name = entry.get("name") if isinstance(entry, Mapping) else entry
        if name not in (None, "softmax"):
            return entry
    return DEFAULT_METHOD


def numbers(key: str) -> range:
    """The layers that ``"7"`` or ``"0-3"`` means, both ends included; nothing for ``rest``."""
    if key == REST:
        return range(0)
    parts = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", key)
    if parts is None:
        raise RecipeError(f"layers: {key!r} is no layer; write a number, a range such as 0-3, or {REST}")
    first, last = int(parts[1]), int(parts[2] or parts[1])
    if last < first:
        raise RecipeError(f"layers: {key!r} is empty; write {last}-{first}")
    return range(first, last + 1)


def spread(layers: Mapping[str, Value], rest: Collection[int] = ()) -> dict[int, Value]:
    """Layer number -> value, in order. ``rest`` are the layers that the key of that name may take."""
    found: dict[int, Value] = {}
    owner: dict[int, str] = {}
    for key, value in layers.items():
        for index in numbers(key):
            if index in owner:
                raise RecipeError(
                    f"layers: {index} is named by both {owner[index]!r} and {key!r}; drop it from one"
                )
            found[index], owner[index] = value, key
    if REST in layers:
        found = dict.fromkeys(rest, layers[REST]) | found
    return dict(sorted(found.items()))
