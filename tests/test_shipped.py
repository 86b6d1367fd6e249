"""Every shipped recipe but the quickstart, for two steps of each stage on a tiny model of its family."""

import pytest
import torch
from test_transfer import Text
from tiny import ids, tiny

from linearize.convert import convert
from linearize.recipe import Recipe, shipped_recipes
from linearize.train.finetune import finetune
from linearize.train.transfer import transfer

FAMILIES = {"llama": "llama", "smollm2": "llama", "qwen3": "qwen3", "mistral": "mistral"}
LENGTH = 200  # longer than two windows of 64


class Longer(Text):
    def batch(self, index, *, batch_size, stage):
        tokens = ids(batch_size, LENGTH + 1, seed=index)
        return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if "/" in name])
def test_a_shipped_recipe_trains_its_family(name, tmp_path):
    recipe = Recipe.resolve(name)
    few = {"batch_size": 2, "warmup_steps": 0}
    tokens = 2 * 2 * LENGTH
    model = convert(tiny(FAMILIES[name.partition("-")[0]]), recipe.method, recipe.layers)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    stage = recipe.transfer.model_copy(update=few | {"tokens": min(recipe.transfer.tokens, tokens)})
    learns = stage.tokens and any(True for m in model.mixers().values() for _ in m.parameters())
    assert transfer(model, Longer(), stage, folder=tmp_path / "transfer").steps == (2 if learns else 0)
    stage = recipe.finetune.model_copy(update=few | {"tokens": tokens})
    model, fitted = finetune(model, Longer(), stage, folder=tmp_path / "finetune")
    assert fitted.steps == 2
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert any(".mixer." in n for n in changed) == bool(learns)
    asked = recipe.finetune.lora.targets
    projections = {n.split(".")[-2] for n in changed if ".mixer." not in n}
    assert projections == ({"q_proj", "k_proj", "v_proj", "o_proj"} if asked == "attention" else set(asked))
