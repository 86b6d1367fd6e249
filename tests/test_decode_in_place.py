"""Steps that write into their state equal steps that return a new one, for every method and at every token."""

import copy

import pytest
import torch
from tiny import ids, student, variants
from tolerances import assert_near
from transformers import DynamicCache, StaticCache

from linearize.modeling.backend import ran, reference_only
from linearize.modeling.cache import StateLayer
from linearize.modeling.registry import METHODS

METHOD_VARIANTS = variants()
each_method = pytest.mark.parametrize("config", METHOD_VARIANTS.values(), ids=METHOD_VARIANTS.keys())


@pytest.fixture
def in_place(monkeypatch):
    """In-place states on the CPU too; their steps run the references."""
    monkeypatch.setattr("linearize.modeling.cache.interpreted", lambda: True)


def prompt(lengths, time):
    """Left-padded rows of different lengths, and their positions."""
    x, mask = ids(len(lengths), time), torch.ones(len(lengths), time, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, : time - length] = 0
    return x, mask


@torch.no_grad()
def steps(model, cache, x, mask, tokens):
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -x.shape[1] :]
    outputs = [model(x, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1:]]
    for t in range(tokens.shape[1]):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        position = mask.sum(1, keepdim=True) - 1
        outputs.append(
            model(
                tokens[:, t : t + 1], attention_mask=mask, position_ids=position, past_key_values=cache
            ).logits
        )
    return torch.cat(outputs, 1)


@each_method
def test_a_step_in_place_equals_a_step(config, in_place):
    model = student("llama", config, num_hidden_layers=2)
    (x, mask), tokens = prompt((5, 1, 3), 5), ids(3, 45, seed=7)
    expected = steps(model, DynamicCache(config=model.config), x, mask, tokens)
    cache = StaticCache(config=model.config, max_cache_len=80)
    assert_near(steps(model, cache, x, mask, tokens), expected, "logits")
    layer = cache.layers[0]
    assert isinstance(layer, StateLayer)
    if all(mixer.why_not_in_place() is None for mixer in model.mixers().values()):
        assert layer._owned and layer.get_seq_length() == 50


@each_method
def test_the_tensors_of_a_state_in_place_stay(config, in_place):
    model = student("llama", config, num_hidden_layers=1)
    if next(iter(model.mixers().values())).why_not_in_place() is not None:
        pytest.skip("this configuration's state does not keep its tensors")
    (x, mask), tokens = prompt((9, 9), 9), ids(2, 25, seed=7)
    cache = StaticCache(config=model.config, max_cache_len=80)
    steps(model, cache, x, mask, tokens[:, :1])
    before = [t.data_ptr() for t in cache.layers[0].state]
    rest = torch.cat([mask, torch.ones(2, 2, dtype=torch.long)], 1)
    steps(model, cache, tokens[:, 1:2], rest, tokens[:, 2:])
    assert [t.data_ptr() for t in cache.layers[0].state] == before


@each_method
def test_beams_reorder_a_state_in_place(config, in_place):
    model = student("llama", config, num_hidden_layers=2)
    (x, mask), tokens = prompt((6, 4), 6), ids(2, 22, seed=7)
    caches = (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=80))
    ends = []
    for cache in caches:
        steps(model, cache, x, mask, tokens[:, :9])
        cache.reorder_cache(torch.tensor([1, 0]))
        swapped = torch.cat([mask.flip(0), torch.ones(2, 10, dtype=torch.long)], 1)
        ends.append(steps(model, cache, tokens[:, 9:10], swapped, tokens[:, 10:]))
    assert_near(ends[1], ends[0], "logits")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("name", ["window", "lolcats"])
def test_kernels_write_into_the_states_of_any_cache(name, monkeypatch):
    """The default cache too; a copy of it goes its own way."""
    pytest.importorskip("triton")
    model = student("llama", METHODS[name].config(), num_hidden_layers=1, dtype=torch.float32)
    (x, mask), tokens = prompt((7, 5), 7), ids(2, 3, seed=7)

    def go_on(cache, start):
        shown = torch.cat([mask, torch.ones(2, start + 1, dtype=torch.long)], 1)
        return steps(model, cache, tokens[:, start : start + 1], shown, tokens[:, start + 1 :])

    caches = [DynamicCache(config=model.config) for _ in range(2)]
    with reference_only():
        expected = steps(model, caches[0], x, mask, tokens[:, :1]), go_on(caches[0], 1)
    monkeypatch.setenv("LINEARIZE_INTERPRET", "1")
    assert_near(steps(model, caches[1], x, mask, tokens[:, :1]), expected[0], "logits")
    assert ran()[{"lolcats": "joint"}.get(name, name) + "_step"] == "triton"
    layer = caches[1].layers[0]
    with torch.inference_mode():
        copies = [copy.deepcopy(caches[1]), DynamicCache()]
        copies[1].layers = [copy.copy(copies[0].layers[0])]
        go_on(copies[0], 1)
    assert_near(go_on(copies[1], 1), expected[1], "logits")  # a state that inference mode made
    before = [t.data_ptr() for t in layer.state]
    other = DynamicCache()
    other.layers = [copy.copy(layer)]
    assert_near(go_on(other, 1), expected[1], "logits")
    assert_near(go_on(caches[1], 1), expected[1], "logits")
    assert [t.data_ptr() for t in layer.state] != before and layer._owned
