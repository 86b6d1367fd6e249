"""What a run does, as one typed tree: read from YAML, mended by ``key.sub=value`` words, refused when wrong.

Only what differs from the defaults need be written. The method's fields are those of its config dataclass in
``modeling``; everything else is declared here. Nothing heavy is imported until a method has to be looked up.
"""

import copy
import dataclasses
import importlib.resources
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from .complaints import complaint, located, near
from .measures import Control, Evaluate
from .methods import (
    DEFAULT_METHOD,
    build_layers,
    build_method,
    leading,
    method_names,
    read_whole,
    spell_out,
)
from .modeling.errors import LinearizeError, RecipeError
from .overrides import flatten, merged, parse_override, read_yaml, set_dotted
from .sections import (
    Count,
    Plan,
    Positive,
    PositiveRate,
    Rate,
    Scan,
    Section,
    Share,
    read_plan,
)

QUICKSTART = "quickstart"

TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Turn the direction of writing, so that a name reads as another."""


def _printable(text: str) -> str:
    """A name of a file, a folder or a repository, without what a terminal or the system reads otherwise."""
    odd = (unicodedata.category(letter) in ("Cc", "Cs") or letter in TURNS for letter in text)
    if not text.strip() or any(odd):
        raise ValueError("is empty or holds control characters")
    return text


Name = Annotated[str, AfterValidator(_printable)]


Tracker = Literal["tensorboard", "wandb", "trackio"]


def _one_or_more(value: Any) -> Any:
    """``tracking: wandb`` is a list of one."""
    if value in (None, "none"):
        return []
    return [value] if isinstance(value, str) else value


class Teacher(Section):
    """The model to convert: a bundled name, a folder or a Hub id."""

    name: Name = "books-5m"
    revision: Name | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    trust_remote_code: bool = False
    allow_pickle: bool = False  # weights as .bin: read by torch's weights_only loader, which runs no code


class SelfSource(Section):
    """Text that the teacher samples itself, until the pool holds ``tokens``."""

    kind: Literal["self"] = "self"
    weight: PositiveRate = 1.0
    tokens: Positive = 1_000_000
    temperature: PositiveRate = 1.0
    top_p: Share = 1.0
    prompt_len: Positive = 1


class RecallSource(Section):
    """Generated documents whose answers lie far back; ``text`` haystacks are drawn from the other sources."""

    kind: Literal["recall"] = "recall"
    weight: PositiveRate = 1.0
    haystack: Literal["noise", "text", "mixed"] = "mixed"
    kinds: list[Literal["passkey", "numbers", "table"]] = Field(
        default=["passkey", "numbers", "table"], min_length=1
    )


class TextSource(Section):
    """Local ``.txt``, ``.jsonl`` or ``.parquet`` files, ``.gz`` and ``.xz`` too, or a folder of them."""

    kind: Literal["text"] = "text"
    weight: PositiveRate = 1.0
    path: Name
    field: str = "text"
    separator: str | None = "<|endoftext|>"


class HubSource(Section):
    """A text data set of the Hugging Face Hub."""

    kind: Literal["hub"] = "hub"
    weight: PositiveRate = 1.0
    dataset: Name
    subset: str | None = None
    split: str = "train"
    field: str = "text"
    revision: str | None = None
    max_documents: Positive | None = None


class ChatSource(Section):
    """Prompt and response pairs through the tokenizer's chat template; only the response is learnt.

    ``context`` names a field whose text, if there is any, follows the prompt after an empty line (Alpaca's ``input``).
    """

    kind: Literal["chat"] = "chat"
    weight: PositiveRate = 1.0
    path: Name | None = None
    dataset: Name | None = None
    split: str = "train"
    prompt: str = "instruction"
    context: str | None = None
    response: str = "output"

    @model_validator(mode="after")
    def _one_origin(self) -> "ChatSource":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("path: give exactly one of path and dataset")
        return self


Source = Annotated[
    SelfSource | RecallSource | TextSource | HubSource | ChatSource, Field(discriminator="kind")
]


class Data(Section):
    """Sequences of ``seq_len`` tokens, mixed from the sources by weight."""

    seq_len: Annotated[int, BeforeValidator(read_whole), Field(ge=2)] = 1024
    packing: Literal["cross", "separate"] = "cross"
    sources: list[Source] = Field(default=[SelfSource(), RecallSource(weight=0.15)], min_length=1)
    held_out: Annotated[list[Source], Field(min_length=1)] | None = None
    cache: bool = True

    @model_validator(mode="after")
    def _held_out_is_text(self) -> "Data":
        for source in self.held_out or []:
            if source.kind not in ("text", "hub"):
                raise ValueError(f"held_out: a {source.kind!r} source is not text; use kind 'text' or 'hub'")
        return self


class Stage(Section):
    """What both training stages share; ``tokens: 0`` skips the stage. Sizes are per process."""

    tokens: Count = 20_000_000
    batch_size: Positive = 8
    accumulate: Positive = 1
    learning_rate: PositiveRate = 1e-2
    weight_decay: Rate = 0.0
    warmup_steps: Count = 10
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    final_ratio: Share = 0.05
    clip: PositiveRate | None = 1.0
    save_every: Positive = 200


class Transfer(Stage):
    """Stage 1: each mixer learns its layer's softmax output, layer by layer inside one forward pass."""

    clip: PositiveRate | None = 0.01  # of each layer; with 1.0 LoLCATs and STILL end further from the teacher
    loss: Literal["relative", "mse"] = "relative"
    mse_factor: PositiveRate = 1000.0
    backward: Literal["immediate", "deferred"] = "immediate"


class Lora(Section):
    """Low-rank adapters; ``targets: attention`` is every projection that the attention probe found. Names given instead
    may be those of linear modules inside mixers too, such as STILL's ``output_gate``."""

    rank: Positive = 8
    alpha: PositiveRate = 16.0
    dropout: Annotated[Rate, Field(lt=1)] = 0.0
    targets: Literal["attention"] | Annotated[list[str], Field(min_length=1)] = "attention"


class Finetune(Stage):
    """Stage 2: LoRA on next-token loss, the KL from the teacher, or a weighted sum; merged at the end."""

    learning_rate: PositiveRate = 1e-4
    warmup_steps: Count = 20
    lora: Lora = Lora()
    next_token: Rate = 1.0
    kl: Rate = 0.0
    kl_chunk: Positive = 1024
    train_mixer: bool = False

    @model_validator(mode="after")
    def _some_loss(self) -> "Finetune":
        if self.next_token + self.kl == 0:
            raise ValueError("next_token: 0, and so is kl, which leaves no loss; set one of them above 0")
        return self


class Recipe(Section):
    """The whole run. Made by ``resolve``, ``from_file`` or ``from_dict``; changed by ``override``."""

    teacher: Teacher = Teacher()
    method: Any = Field(default=DEFAULT_METHOD, validate_default=True)
    layers: Literal["all"] | list[Count] | dict[str, Any] = "all"
    convert_sliding: bool = False
    data: Data = Data()
    transfer: Transfer = Transfer()
    finetune: Finetune = Finetune()
    control: Control = Control()
    evaluate: Evaluate = Evaluate()
    scan: Scan = Scan()
    plan: Annotated[Plan | None, BeforeValidator(read_plan)] = None
    compare: dict[str, dict[str, Any]] = {}
    """Method -> keys that `linearize compare` gives it; a run alone does not read them."""
    output: Name | None = None
    seed: Annotated[Count, Field(lt=2**32)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    tracking: Annotated[list[Tracker], BeforeValidator(_one_or_more)] = []

    # What the user wrote, which decides what a method's recommended values may fill.
    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    @field_validator("method", mode="before")
    @classmethod
    def _build_method(cls, value: Any) -> Any:
        return build_method(value)

    @field_validator("layers", mode="before")
    @classmethod
    def _build_layers(cls, value: Any, info: ValidationInfo) -> Any:
        return build_layers(value, info.data["method"]) if isinstance(value, Mapping) else value

    @field_serializer("method")
    def _dump_method(self, method: Any) -> dict[str, Any]:
        return {"name": method.name, **dataclasses.asdict(method)}

    @field_serializer("layers")
    def _dump_layers(self, layers: Any) -> Any:
        return (
            {key: self._dump_method(m) for key, m in layers.items()} if isinstance(layers, dict) else layers
        )

    @property
    def methods(self) -> dict[str, Any]:
        """The method of every key that says one: of ``method``, or of each entry of a map of layers."""
        if isinstance(self.layers, dict):
            return {f"layers.{key}": method for key, method in self.layers.items()}
        return {"method": self.method}

    @property
    def method_name(self) -> str:
        """The methods' names for a title."""
        return method_names(method.name for method in self.methods.values())

    @model_validator(mode="after")
    def _parts_fit(self) -> "Recipe":
        if self.plan is not None and self.layers != "all":
            raise ValueError("plan: chooses what every layer gets; leave out layers, or leave out plan")
        if isinstance(self.layers, list) and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise ValueError(
                f"layers: {self.layers} is not a list of distinct layer numbers, such as [0, 1, 2]"
            )
        for place, method in self.methods.items():
            # A query sees its own block of these tokens and the whole one before it.
            blocks = {"window": 2 if getattr(method, "window_kind", None) == "terraced" else 1, "chunk": 2}
            for field, spans in blocks.items():
                value = getattr(method, field, None)
                if value is not None and spans * value >= self.data.seq_len:
                    raise ValueError(
                        f"{place}.{field}: {value} covers all of data.seq_len={self.data.seq_len}, which leaves "
                        f"nothing to linearize; try {place}.{field}={max(1, self.data.seq_len // 8)}"
                    )
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.to_dict() == other.to_dict()

    @classmethod
    def from_dict(
        cls, given: Mapping[str, Any], *, place: str | None = None, overridden: Sequence[str] = ()
    ) -> "Recipe":
        """The validated recipe. Keys left out take the method's recommended values, then the defaults.

        ``place`` (a file name) leads the line of an error, except for the dotted keys in ``overridden``.
        """
        given = copy.deepcopy(dict(given))
        try:
            recipe = cls.model_validate(_with_recommended(given))
        except ValidationError as error:
            raise RecipeError(located(complaint(error, cls, given), place, overridden)) from None
        except LinearizeError as error:
            raise RecipeError(located(str(error), place, overridden)) from None
        recipe._given = given
        return recipe

    @classmethod
    def from_file(
        cls, path: str | Path, *, method: str | None = None, overrides: Sequence[str] = ()
    ) -> "Recipe":
        """The recipe of a YAML file; ``method`` replaces the file's, ``overrides`` have the last word."""
        return _assemble(read_yaml(path), method, overrides, place=str(path))

    @classmethod
    def resolve(
        cls,
        model_or_recipe: str | Path | None = None,
        method: str | None = None,
        overrides: Sequence[str] = (),
    ) -> "Recipe":
        """The recipe that a word means: a recipe file, a shipped recipe's name, or a model.

        A model (a folder, a bundled name, a Hub id) takes the defaults. No word means the quickstart recipe.
        """
        word = QUICKSTART if model_or_recipe is None else str(model_or_recipe)
        shipped = shipped_recipes()
        if word in shipped:
            return cls.from_file(shipped[word], method=method, overrides=overrides)
        if not word.endswith((".yaml", ".yml")):
            return _assemble({"teacher": {"name": word}}, method, overrides)
        if not Path(word).is_file():
            raise RecipeError(f"{word}: no such recipe file{near(Path(word).stem, shipped)}")
        recipe = cls.from_file(word, method=method, overrides=overrides)
        if not any(parse_override(override)[0] == "output" for override in overrides):
            _stays_below(recipe.output, word)
        return recipe

    def override(self, overrides: Sequence[str]) -> "Recipe":
        """A new recipe with words such as ``method.window=32`` applied; values are read as YAML."""
        return _assemble(self._given, None, overrides)

    def for_method(self, name: str) -> "Recipe":
        """The same data, tokens and seeds for a method, with what ``compare`` says of it.

        The method's fields, a map of layers and a plan stay only with the method that they were written for.
        """
        tree = copy.deepcopy(self._given)
        changes = copy.deepcopy(self.compare.get(name, {}))
        tree.pop("compare", None)
        if self.method.name != name or isinstance(self.layers, dict):
            tree["method"] = name
            tree.pop("plan", None)
            if isinstance(self.layers, dict):
                tree.pop("layers", None)
        for each in (tree, changes):
            if isinstance(each.get("method"), str):
                each["method"] = {"name": each["method"]}
        return Recipe.from_dict(merged(tree, changes), place=f"compare.{name}")

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, as plain data."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The resolved recipe, every default included; reading it back gives an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)

    def differences(self, other: "Recipe", *, ignore: Sequence[str] = ("output", "tracking")) -> list[str]:
        """The dotted keys in which another recipe differs, in recipe order; not those that change no result."""
        mine, theirs = flatten(self.to_dict()), flatten(other.to_dict())
        return [
            key
            for key in {**mine, **theirs}
            if mine.get(key, ...) != theirs.get(key, ...) and key.partition(".")[0] not in ignore
        ]


def _stays_below(output: str | None, file: str) -> None:
    """A recipe file that somebody sent may write below the working directory, or where it lies as a record.

    Any other place has to be said by who runs it.
    """
    if output is None:
        return
    place = Path(output).expanduser().resolve()
    if not place.is_relative_to(Path.cwd().resolve()) and place != Path(file).resolve().parent:
        raise RecipeError(
            f"{file}: output: {output} is outside the working directory, where a recipe file alone may not write; "
            f"if you mean it, say --output {output}"
        )


def _with_recommended(given: dict[str, Any]) -> dict[str, Any]:
    """``given`` with the method built, and its recommended values under the keys that nobody set."""
    method = build_method(given.get("method") or leading(given.get("layers")))
    tree = copy.deepcopy(given) | {"method": method}
    written = [key for key, value in flatten(given).items() if value not in ({}, None)]
    for key, value in method.recommended.items():
        if not any(w == key or w.startswith(f"{key}.") or key.startswith(f"{w}.") for w in written):
            set_dotted(tree, key, value)
    return tree


def _assemble(
    given: Mapping[str, Any], method: str | None, overrides: Sequence[str], *, place: str | None = None
) -> Recipe:
    tree = copy.deepcopy(dict(given))
    words = [parse_override(word) for word in overrides]
    if method is not None:
        tree["method"] = {"name": method}
    for key, value in words:
        spell_out(tree, key)
        if key.startswith("data.sources.") and not (tree.get("data") or {}).get("sources"):
            set_dotted(tree, "data.sources", [source.model_dump() for source in Data().sources])
        set_dotted(tree, key, value)
    overridden = [key for key, _ in words] + (["method"] if method is not None else [])
    return Recipe.from_dict(tree, place=place, overridden=overridden)


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the package's own recipes: ``quickstart``, ``smollm2-135m/lolcats``, ..."""
    package = Path(str(importlib.resources.files("linearize")))
    # A wheel carries the folder inside the package; in a checkout it stands beside it.
    folders = [folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir()]
    if not folders:
        return {}
    files = sorted(folders[0].rglob("*.yaml"))
    return {file.relative_to(folders[0]).with_suffix("").as_posix(): file for file in files}
