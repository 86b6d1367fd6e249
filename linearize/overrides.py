"""Plain trees of dicts and lists: read from YAML, changed by ``key.sub=value`` words, flattened."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from .modeling.errors import RecipeError


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader keeps the last of two equal keys in silence; this one refuses them."""

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


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise RecipeError(f"{path}:{line} {error.problem or 'not YAML'}; mend the file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
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
        return key, yaml.load(text, Loader=_Loader)
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
