"""Convert pretrained causal language models to linear attention, and show what was kept.

    import linearize

    model, tokenizer = linearize.load("books-5m")
    linearize.convert(model, linearize.Recipe.resolve("books-5m", "lolcats").method)

Names are fetched when first used, so that importing the package costs nothing.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import save
    from .convert import convert, unconvert
    from .data import build
    from .evaluate import evaluate
    from .generate import generate
    from .hub import push
    from .loading import load
    from .methods import adjust
    from .recipe import Recipe
    from .run import run
    from .train.finetune import finetune
    from .train.transfer import transfer

__version__ = "0.1.0"

__all__ = [
    "Recipe",
    "__version__",
    "adjust",
    "build",
    "convert",
    "evaluate",
    "finetune",
    "generate",
    "load",
    "push",
    "run",
    "save",
    "transfer",
    "unconvert",
]

_HOME = {
    "Recipe": "recipe",
    "adjust": "methods",
    "build": "data",
    "convert": "convert",
    "evaluate": "evaluate",
    "finetune": "train.finetune",
    "generate": "generate",
    "load": "loading",
    "push": "hub",
    "run": "run",
    "save": "checkpoint",
    "transfer": "train.transfer",
    "unconvert": "convert",
}


def __getattr__(name: str) -> Any:
    if name == "state":  # a module of its own verbs: linearize.state.read, save, load, info
        return importlib.import_module("linearize.state")
    if name not in _HOME:
        raise AttributeError(f"module 'linearize' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"linearize.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """Importing the module ``linearize.convert`` must not hide the function of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOME or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
