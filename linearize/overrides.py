"""Plain trees of dicts and lists: read from YAML, changed by ``key.sub=value`` words, flattened."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from .modeling.errors import RecipeError

MOST_BYTES = 1_000_000
"""Of a recipe file; the longest one that ships has a few hundred."""
MOST_NODES, MOST_LEVELS = 20_000, 40
"""Of a YAML text, with everything that aliases repeat: nine lines of them can stand for a billion nodes."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses tags, keys written twice (it keeps the last), and huge trees.

    Plain data needs no tag, and each is a constructor that somebody else chose.
    """

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        self.levels = getattr(self, "levels", 0) + 1
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise yaml.composer.ComposerError(
                None, None, f"the tag {event.tag} is not read", event.start_mark
            )
        if self.levels > MOST_LEVELS:
            raise yaml.composer.ComposerError(None, None, "too many levels", event.start_mark)
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _count(node, {}, ()) > MOST_NODES:
            raise yaml.composer.ComposerError(None, None, "its aliases repeat too much", node.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is not a word", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is written twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _count(node: yaml.Node, known: dict[int, int], above: tuple[int, ...]) -> int:
    """Nodes of the tree that ``node`` stands for, aliases written out; those of shared ones are counted once."""
    if id(node) in above:
        raise yaml.composer.ComposerError(None, None, "an alias holds itself", node.start_mark)
    if id(node) not in known:
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else []
        inner = node.value if isinstance(node, yaml.SequenceNode) else inner
        known[id(node)] = 1 + sum(_count(part, known, (*above, id(node))) for part in inner)
    return known[id(node)]


def _parse(text: str) -> Any:
    """A YAML text as plain data; whatever is wrong with it is a YAMLError."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, OverflowError, RecursionError, AttributeError, TypeError, KeyError) as error:
        # PyYAML's own constructors stumble over dates and numbers that only look like some.
        raise yaml.YAMLError(str(error)) from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        with Path(path).open("rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise RecipeError(f"{path}: has more than {MOST_BYTES:,} bytes; give a YAML recipe file")
        tree = _parse(text.decode("utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise RecipeError(f"{path}:{line} {error.problem or 'not YAML'}; mend the file") from None
    except (OSError, ValueError, yaml.YAMLError) as error:  # a name with a NUL byte is a ValueError
        reason = getattr(error, "strerror", None) or "not YAML text"
        raise RecipeError(f"{path}: cannot be read ({reason}); give a YAML recipe file") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: holds no keys and values; `linearize show` prints a whole recipe")
    return tree


def parse_override(word: str) -> tuple[str, Any]:
    """``"method.window=32"`` -> ``("method.window", 32)``; the value is read as YAML."""
    key, equals, text = word.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(f"{word!r}: not an override; write key=value, such as method.window=32")
    try:
        return key, _parse(text)
    except yaml.YAMLError:
        raise RecipeError(
            f"{key}: {text!r} is not a YAML value; put it in quotes, such as {key}='\"a: b\"'"
        ) from None


def set_dotted(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set ``a.0.b`` in the tree, in place, making the mappings that are missing."""
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        where = ".".join(parents[:depth]) or "recipe"
        if isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        elif isinstance(node, list):
            node = node[_index(node, part, where)]
        else:
            raise RecipeError(f"{key}: {where} is {node!r} and has no keys; set {where} as a whole")
    if isinstance(node, dict):
        node[last] = value
    elif isinstance(node, list):
        node[_index(node, last, ".".join(parents))] = value
    else:
        where = ".".join(parents)
        raise RecipeError(f"{key}: {where} is {node!r} and has no keys; set {where} as a whole")


def _index(items: list[Any], part: str, where: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise RecipeError(f"{where}.{part}: no such entry; {where} has {len(items)}, counted from 0")
    return int(part)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``; lists of mappings are entered, other lists are values."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(tree, dict) and tree:
        items = tree.items()
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        items = enumerate(tree)
    else:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``tree`` with the leaves of ``changes``; a list or a value is replaced whole."""
    found = dict(tree)
    for key, value in changes.items():
        old = found.get(key)
        found[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return found
