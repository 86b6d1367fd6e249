"""Shipped recipes: all but the quickstart run two steps of each stage on a tiny model; what they say, and for whom."""

import contextlib
import copy

import pytest
import torch
from test_transfer import Text
from tiny import ids, tiny

from linearize.convert import convert
from linearize.modeling.errors import RecipeError
from linearize.modeling.registry import METHODS
from linearize.overrides import read_yaml
from linearize.recipe import Recipe, shipped_recipes
from linearize.train.finetune import finetune
from linearize.train.transfer import transfer

MODELS = ("llama-3.2-1b", "llama-3.1-8b", "qwen3-0.6b", "mistral-7b")
CONTROLS = {"linear", "softmax", "window"}  # nobody converts a model for their sake
FAMILIES = {"books": "llama", "llama": "llama", "smollm2": "llama", "qwen3": "qwen3", "mistral": "mistral"}
LENGTH = 200  # longer than two windows of 64


class Longer(Text):
    def batch(self, index, *, batch_size, stage):
        tokens = ids(batch_size, LENGTH + 1, seed=index)
        return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if "/" in name])
def test_a_shipped_recipe_trains_its_family(name, tmp_path):
    recipe = Recipe.resolve(name)
    few = {"batch_size": 2, "accumulate": 1, "warmup_steps": 0}
    tokens = 2 * 2 * LENGTH
    model = convert(tiny(FAMILIES[name.partition("-")[0]]), recipe.method, recipe.layers)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    stage = recipe.transfer.model_copy(update=few | {"tokens": min(recipe.transfer.tokens, tokens)})
    learns = stage.tokens and any(True for m in model.mixers().values() for _ in m.parameters())
    assert transfer(model, Longer(), stage, folder=tmp_path / "transfer").steps == (2 if learns else 0)
    learned = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert bool(learned) == bool(learns) and all(".mixer." in n for n in learned)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    stage = recipe.finetune.model_copy(update=few | {"tokens": tokens})
    model, fitted = finetune(model, Longer(), stage, folder=tmp_path / "finetune")
    assert fitted.steps == 2
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    asked = recipe.finetune.lora.targets
    assert {n.split(".")[-2] for n in changed} == (
        {"q_proj", "k_proj", "v_proj", "o_proj"} if asked == "attention" else set(asked)
    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", sorted(METHODS.keys() - CONTROLS))
def test_every_method_has_a_recipe_for_every_model(model, method):
    name = f"{model}/{method}"
    assert name in shipped_recipes(), f"recipes/{name}.yaml is missing"
    recipe = Recipe.resolve(name)
    assert recipe.method.name == method
    assert set(model.split("-")) <= set(recipe.teacher.name.partition("/")[2].lower().split("-"))


def entries(tree, *path):
    """The paths of all values of a recipe that hold no others."""
    if not isinstance(tree, dict | list):
        return [path]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return [found for key, value in items for found in entries(value, *path, key)]


def without(tree, *path):
    tree = inner = copy.deepcopy(tree)
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return tree


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_says_only_what_differs_from_the_defaults(name):
    """But for names: of the teacher and the method, which may be the defaults."""
    given, recipe = read_yaml(shipped_recipes()[name]), Recipe.resolve(name)
    for path in entries(given):
        if path[-1] == "name":
            continue
        with contextlib.suppress(RecipeError):  # where it cannot be left out
            assert Recipe.from_dict(without(given, *path)) != recipe, path


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_begins_with_a_sentence(name):
    """What ``linearize list recipes`` prints of it."""
    first = shipped_recipes()[name].read_text(encoding="utf-8").partition("\n")[0]
    assert first.startswith("# ") and first.endswith(".")
