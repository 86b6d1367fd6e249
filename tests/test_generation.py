"""Generation through transformers' own modes, in fp64, against recomputing the whole text at every step."""

import copy
import pickle

import pytest
import torch
from tiny import ids, student, tiny
from tolerances import assert_near
from transformers import DynamicCache

from linearize.convert import convert
from linearize.modeling.attention import LinearMask, attention_mode
from linearize.modeling.cache import CACHE, cache_in
from linearize.modeling.errors import LinearizeError
from linearize.modeling.lawcat import LawcatConfig
from linearize.modeling.liger import LigerConfig
from linearize.modeling.lolcats import LolcatsConfig
from linearize.modeling.salient import SalientConfig
from linearize.modeling.window import WindowConfig

FAMILIES = ["llama", "gemma3_text", "gpt2"]
CONFIGS = {
    "sliding": LolcatsConfig(window=8, window_kind="sliding"),
    "terraced": LolcatsConfig(window=4),
    "linear": LolcatsConfig(window=None),
    "window": WindowConfig(window=8, sinks=2),
    "salient": SalientConfig(budget=4, chunk=3, score_dim=6, score_context=5),
    "liger": LigerConfig(window=8),
    "liger gsa": LigerConfig(variant="gsa", window=4),
    "lawcat": LawcatConfig(),
    "lawcat window": LawcatConfig(window=8, window_exclude=True),
}
CASES = [("llama", name, "all") for name in CONFIGS] + [
    (family, name, layers)
    for family in FAMILIES[1:]
    for name, layers in (("sliding", [1]), ("terraced", [1, 2]), ("liger", [1]), ("lawcat window", [1, 2]))
]
# Windows of their own, in the layer that is converted and in those that stay: it sizes their masks.
OWN_WINDOW = {"mistral": {"sliding_window": 6}}
CASES += [("mistral", "terraced", [0])]
cases = pytest.mark.parametrize(("family", "name", "layers"), CASES)


def model_of(family, name, layers):
    return student(family, CONFIGS[name], layers=layers, **OWN_WINDOW.get(family, {}))


def padded(batch=3, length=21, pads=5):
    x = ids(batch, length)
    mask = torch.ones_like(x)
    mask[0, :pads] = 0
    mask[1, :2] = 0
    x[mask == 0] = 0
    return x, mask


@torch.no_grad()
def recompute(model, x, mask, steps):
    for _ in range(steps):
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        token = (
            model(x, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1].argmax(-1)
        )
        x, mask = torch.cat([x, token[:, None]], 1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return x


def generate(model, x, mask, steps=14, **kwargs):
    kwargs = {
        "do_sample": False,
        "max_new_tokens": steps,
        "min_new_tokens": steps,
        "eos_token_id": None,
    } | kwargs
    return model.generate(x, attention_mask=mask, **kwargs)


@cases
def test_greedy_left_padded_equals_recompute(family, name, layers):
    model, (x, mask) = model_of(family, name, layers), padded()
    expected = recompute(model, x, mask, 14)
    assert torch.equal(generate(model, x, mask), expected)
    alone = generate(model, x[:1, 5:], mask[:1, 5:])
    assert torch.equal(alone, expected[:1, 5:])


@cases
def test_beams_with_and_without_cache(family, name, layers):
    model, (x, mask) = model_of(family, name, layers), padded()
    kwargs = dict(num_beams=3, num_return_sequences=2)
    assert torch.equal(
        generate(model, x, mask, **kwargs), generate(model, x, mask, use_cache=False, **kwargs)
    )


@cases
def test_sampling_two_sequences_with_and_without_cache(family, name, layers):
    model, (x, mask) = model_of(family, name, layers), padded()
    kwargs = dict(do_sample=True, num_return_sequences=2, top_k=20)
    torch.manual_seed(3)
    first = generate(model, x, mask, **kwargs)
    torch.manual_seed(3)
    assert torch.equal(first, generate(model, x, mask, use_cache=False, **kwargs))


@cases
def test_continued_chat_equals_one_prompt(family, name, layers):
    model, x = model_of(family, name, layers), ids(1, 19)
    cache = DynamicCache(config=model.config)
    first = generate(model, x, torch.ones_like(x), 9, past_key_values=cache)
    more = torch.cat([first, ids(1, 7, seed=9)], 1)
    continued = generate(model, more, torch.ones_like(more), 9, past_key_values=cache)
    assert torch.equal(continued, generate(model, more, torch.ones_like(more), 9))


@cases
def test_chunked_prefill_and_static_cache_equal_greedy(family, name, layers):
    model, (x, mask) = model_of(family, name, layers), padded()
    expected = generate(model, x, mask)
    assert torch.equal(generate(model, x, mask, prefill_chunk_size=6), expected)
    assert torch.equal(
        generate(model, x, mask, cache_implementation="static", disable_compile=True), expected
    )


@cases
def test_prompt_lookup_with_rejections_equals_greedy(family, name, layers):
    model = model_of(family, name, layers)
    x = ids(1, 9).repeat(1, 4)  # a repeating prompt: candidates are proposed, and mostly rejected
    mask = torch.ones_like(x)
    expected = generate(model, x, mask, 24)
    assert torch.equal(generate(model, x, mask, 24, prompt_lookup_num_tokens=5), expected)


@pytest.mark.parametrize(
    ("family", "name", "layers"), [case for case in CASES if case[0] in ("llama", "gpt2")]
)
def test_assistant_with_rejections_equals_greedy(family, name, layers):
    model, x = model_of(family, name, layers), ids(1, 23)
    assistant = model_of(family, name, layers)
    with torch.no_grad():  # close enough to be accepted at times, far enough to be rejected at others
        for parameter in assistant.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    mask = torch.ones_like(x)
    expected = generate(model, x, mask, 24)
    assert torch.equal(generate(model, x, mask, 24, assistant_model=assistant), expected)


def test_state_bytes_are_constant_while_generating():
    model, x = student("llama", CONFIGS["terraced"]), ids(2, 10)
    sizes = set()
    for steps in (1, 30, 60, 200):
        output = generate(model, x, torch.ones_like(x), steps, return_dict_in_generate=True)
        sizes.add(sum(layer.state_bytes for layer in output.past_key_values.layers))
    assert len(sizes) == 1


def test_long_decoding_stays_finite_and_its_sums_exact():
    model = student("llama", LolcatsConfig(window=8, window_kind="sliding"), dtype=torch.bfloat16, layers=[0])
    x = ids(1, 3000)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(x[:, :2000], past_key_values=cache)
        for start in range(2000, 3000, 1):
            model.model.layers[0](  # the layer alone: what follows does not touch its sums
                model.model.embed_tokens(x[:, start : start + 1]),
                attention_mask=None,
                position_embeddings=model.model.rotary_emb(x[:, :1].float(), torch.tensor([[start]])),
                past_key_values=cache,
            )
        whole = DynamicCache(config=model.config)
        model(x, past_key_values=whole)
    stepped, full = cache.layers[0].state, whole.layers[0].state
    assert int(stepped.seen) == int(full.seen) == 3000
    error = (stepped.z - full.z).norm() / full.z.norm()
    assert error < 1e-3, error


def test_a_cache_of_softmax_keys_is_refused():
    model, x = student(), ids(1, 8)
    with torch.no_grad(), attention_mode("softmax"):
        cache = model(x, use_cache=True).past_key_values
    with torch.no_grad(), pytest.raises(LinearizeError, match="layer 0 holds softmax keys of 8 tokens"):
        model(x[:, :1], past_key_values=cache)


@torch.no_grad()
def test_a_cache_of_states_is_refused_in_softmax_mode_until_it_is_emptied():
    model, x = student(), ids(1, 8)
    cache = model(x, use_cache=True).past_key_values
    with attention_mode("softmax"):
        with pytest.raises(LinearizeError, match="layer 0 holds a state of 8 tokens, not softmax keys"):
            model(x[:, :1], past_key_values=cache)
        cache.reset()
        first, rest = (model(part, past_key_values=cache).logits for part in (x[:, :5], x[:, 5:]))
        assert_near(torch.cat([first, rest], 1), model(x).logits, "logits")


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_softmax_mode_generates_with_a_static_cache(family):
    model, (x, mask) = tiny(family, dtype=torch.float64), padded()
    kwargs = dict(cache_implementation="static", disable_compile=True)
    expected = generate(model, x, mask, **kwargs)
    with attention_mode("softmax"):
        assert torch.equal(generate(convert(model, CONFIGS["sliding"]), x, mask, **kwargs), expected)


def test_a_cache_is_known_by_what_it_is_and_not_by_its_name():
    """gpt2 and gpt_neox call it otherwise than the others, and transformers 5.24 otherwise than 5.23."""
    cache = DynamicCache()
    for name in ("past_key_values", "layer_past", "cache", "whatever_is_next"):
        assert cache_in({"hidden_states": torch.ones(1), name: cache, "use_cache": True}) is cache
    assert cache_in({"hidden_states": torch.ones(1), "cache": None}) is None
    assert student()(ids(1, 3), use_cache=True)[CACHE].get_seq_length() == 3


def test_packed_documents_cannot_share_a_cache():
    ends = torch.tensor([0, 3, 8], dtype=torch.int32)
    with torch.no_grad(), pytest.raises(LinearizeError, match=r"2 packed documents .* pass use_cache=False"):
        student()(ids(1, 8), cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=5, max_length_k=5)


@torch.no_grad()
def test_taking_back_more_than_recorded_is_refused():
    model, x = student(), ids(1, 60)
    cache = model(x[:, :8], use_cache=True).past_key_values
    with pytest.raises(LinearizeError, match="activate_past_recording"):
        cache.crop(-2)
    cache.activate_past_recording()
    model(x[:, 8:20], past_key_values=cache)
    for layer in cache.layers:
        layer.record_past = False
    model(x[:, 20:], past_key_values=cache)
    with pytest.raises(LinearizeError, match="activate_past_recording"):  # what was recorded is long folded
        cache.crop(-2)


def test_the_mask_takes_no_quadratic_memory():
    model = student("llama", CONFIGS["sliding"])
    masks = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda m, a, k: masks.append(k["attention_mask"]), with_kwargs=True
    )
    x = ids(2, 300)
    real = torch.ones_like(x)
    real[0, :5] = 0
    with torch.no_grad():
        model(x, attention_mask=real)
    (mask,) = masks
    assert isinstance(mask, LinearMask) and mask.valid.shape == (2, 300) and not mask._base
    # A layer on another device gets what it needs there.
    elsewhere = torch.device("meta")
    assert mask.base(x.device).shape == mask.base(elsewhere).shape == (2, 1, 300, 300)
    assert mask.base(elsewhere).is_meta and mask.padding(elsewhere).is_meta


def test_copies_and_pickles_compute_the_same():
    model, x = student(), ids()
    expected = model(x).logits
    assert torch.equal(copy.deepcopy(model)(x).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x).logits, expected)


def test_a_state_is_never_offloaded():
    """``Cache.update`` offloads a layer before its mixer has read the state."""
    model, x = student(), ids(1, 12)
    with torch.no_grad():
        cache = model(x, use_cache=True).past_key_values
    layer = cache.layers[0]
    layer.state = layer.state._replace(k=layer.state.k.to("meta"))  # any device but the CPU
    layer.offload()
    assert layer.state.k.is_meta
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.state is None


def test_a_compiled_forward_is_one_graph_in_every_mode():
    model, x = student("llama", CONFIGS["sliding"], layers=[0, 2]), ids(1, 20)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for mode in ("linear", "softmax", "linear"):
        with torch.no_grad(), attention_mode(mode):
            assert torch.equal(compiled(x, use_cache=False).logits, model(x, use_cache=False).logits)
    packed = torch.cat([torch.arange(8), torch.arange(12)])[None]
    with torch.no_grad(), pytest.raises(RuntimeError, match="a compiled forward needs cu_seq_lens_q"):
        compiled(x, position_ids=packed, use_cache=False)


def test_two_rows_of_a_reordered_cache():
    model, x = student(), ids(2, 16)
    with torch.no_grad():
        cache = model(x, use_cache=True).past_key_values
        cache.reorder_cache(torch.tensor([1, 1]))
        token = ids(1, 1, seed=5).repeat(2, 1)
        moved = model(token, past_key_values=cache).logits
        expected = model(torch.cat([x[1:], token[:1]], 1)).logits[:, -1:]
    assert_near(moved, expected.repeat(2, 1, 1), "logits")


def test_tiny_is_what_it_says():
    assert {p.dtype for p in tiny("llama", dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
