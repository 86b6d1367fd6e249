"""Every registered method on every kind of attention, in fp64: what the contract of one family does not show.

The families differ in what stands around a mixer: a norm of q and k (qwen3), layers with windows of their own, a scale
of their own and capped logits (gemma2, which caps scores as well, and gemma3), a rotation of half the channels, one
fused projection and no groups of heads (gpt_neox), another fused one with groups (phi3). Methods and variants come from
the registry.
"""

import functools
import inspect
import sys

import pytest
import torch
from test_checkpoint import WITHOUT_PACKAGE, run, save_with_answers
from test_contract import in_pieces, logits
from test_finetune import batch, gradients, recipe, shaken
from test_generation import generate, recompute
from tiny import ids, pairs, representatives, student, tiny, variants
from tolerances import TOLERANCES, assert_near
from transformers import AutoConfig, AutoModelForCausalLM

from linearize import checkpoint
from linearize.convert import convert, describe
from linearize.modeling.attention import attention_mode, base_attention
from linearize.modeling.errors import ConversionError
from linearize.modeling.registry import METHODS
from linearize.modeling.window import SoftmaxConfig
from linearize.train.finetune import FinetuneStage
from linearize.train.transfer import error_and_power

OWN_WINDOWS = dict(layer_types=["sliding_attention", "full_attention"], final_logit_softcapping=8.0)
FAMILIES: dict[str, dict] = {
    "llama": {},
    "qwen3": {},
    "gemma2": OWN_WINDOWS,
    "gemma3_text": OWN_WINDOWS,
    "gpt_neox": {},
    "phi3": {},
}
UNGROUPED = {"gpt_neox"}
CONFIGS = variants()
METHOD_NAMES = list(representatives())
T = 21  # odd; longer than twice the largest window of variants()

each_family = pytest.mark.parametrize("family", FAMILIES)
each_method = pytest.mark.parametrize("method", METHOD_NAMES)


def each_pair(turn):
    """Every method on every family and every variant on one at least; each turn pairs them otherwise."""
    return pytest.mark.parametrize(("family", "variant"), pairs(FAMILIES, turn))


def build(family, config, **changes):
    return student(family, config, **{"num_hidden_layers": 2} | FAMILIES[family] | changes)


@functools.cache
def variant_of(family, variant):
    """Shared by tests that leave the model as it is."""
    return build(family, CONFIGS[variant])


@functools.cache
def method_of(family, method):
    return build(family, representatives()[method])


def precision(model):
    """fp32 where layers that keep softmax run transformers' eager one, which computes in that: gemma2's since 5.24."""
    return torch.float32 if base_attention(model.config) == "eager" else None


# What a forward computes, on every variant.


@each_pair(0)
def test_any_split_gives_the_same_output(family, variant):
    model, x = variant_of(family, variant), ids(2, T)
    expected = logits(model, x)
    for pieces in ([1] * T, [5, 9, 1, 1, T - 16]):
        assert_near(in_pieces(model, x, pieces)[0], expected, "logits", precision(model))


@each_pair(1)
def test_lengths_around_the_window(family, variant):
    """A single token, less than a window, exactly one, exactly two; each as a prefill and one step."""
    model, x = variant_of(family, variant), ids(2, 17)
    whole = logits(model, x)
    for length in (1, 3, 4, 8, 16):
        pieces, cache = in_pieces(model, x[:, :length], [length])
        assert_near(pieces, whole[:, :length], "logits", precision(model))
        last = logits(model, x[:, length : length + 1], past_key_values=cache)
        assert_near(last, whole[:, length : length + 1], "logits", precision(model))


EXACT = {
    "lolcats": dict(window=64, window_kind="sliding"),
    "liger": dict(window=64, mix_window=1.0, mix_recurrent=0.0),
    "lawcat": dict(window=64, window_exclude=True),
    "salient": dict(chunk=64),
    "window": dict(window=64),
}
"""Where a method has an exact part: fields that leave the whole text to it."""


@each_family
@pytest.mark.parametrize("method", EXACT)
def test_the_exact_part_is_the_familys_own_softmax(family, method):
    """Its scale, its soft-cap, its norms and its rotation reach the mixer."""
    model, x = build(family, METHODS[method].config(**EXACT[method])), ids(2, T)
    model.set_attn_implementation("eager")  # transformers' sdpa leaves the soft-cap of scores out
    with attention_mode("softmax"):
        expected = logits(model, x)
    assert_near(logits(model, x), expected, "logits", torch.float32)  # eager's softmax is fp32


def swap_for_meaning(monkeypatch):
    """Put the quadratic twin in the place of every chunked operation, wherever a mixer finds it.

    Returns the names of the twins that are called, and of the operations called that have none: whose meaning is not
    dense, but goes token by token.
    """
    twins, alone = [], []

    def meaning(chunked):
        home, stem = vars(sys.modules[chunked.__module__]), chunked.__name__.removesuffix("_chunked")
        quadratic = home.get(f"{stem}_quadratic")
        assert quadratic or f"{stem}_by_definition" in home, f"{chunked.__name__} has no reference beside it"

        def call(*args, **kwargs):
            if quadratic is None:
                alone.append(stem)
                return chunked(*args, **kwargs)
            twins.append(stem)
            # A twin without a place for what came before is not given the None that says nothing did.
            places = inspect.signature(quadratic).parameters
            given = {name: value for name, value in kwargs.items() if name in places or value is not None}
            return quadratic(*args, **given)

        return call

    for path, module in list(sys.modules.items()):
        if path.startswith("linearize.modeling."):
            for name, operation in list(vars(module).items()):
                if getattr(operation, "__name__", "").endswith("_chunked") and operation.__module__ != path:
                    monkeypatch.setattr(module, name, meaning(operation))
    return twins, alone


@each_pair(2)
def test_the_forward_is_its_meaning(family, variant, monkeypatch):
    """The quadratic one, on more tokens than any tile holds; where there is none, that of steps, over many blocks."""
    model, x = variant_of(family, variant), ids(1, 151)
    expected = logits(model, x, use_cache=False)
    with monkeypatch.context() as patch:
        twins, alone = swap_for_meaning(patch)
        meant = logits(model, x, use_cache=False)
    assert len(twins) + len(alone) >= len(model.mixers())
    if alone:
        expected, meant = expected[:, :50], in_pieces(model, x[:, :50], [1] * 50)[0]
    assert_near(expected, meant, "logits", precision(model))


@each_pair(3)
def test_a_later_token_changes_no_earlier_output(family, variant):
    model, x = variant_of(family, variant), ids(1, T)
    other = x.clone()
    other[:, 17] = (other[:, 17] + 1) % 90 + 3
    before, after = logits(model, x), logits(model, other)
    assert torch.equal(before[:, :17], after[:, :17])
    assert not torch.equal(before[:, 17], after[:, 17])


@each_pair(4)
def test_padding_and_neighbours_change_nothing(family, variant):
    """Rows of different lengths, padded on the left, whole and in pieces, against each row alone."""
    model, x, pads = variant_of(family, variant), ids(3, T), (0, 5, 11)
    mask = torch.ones_like(x)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    x = x.masked_fill(mask == 0, 5)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    full = logits(model, x, attention_mask=mask, position_ids=positions)
    pieces, _ = in_pieces(model, x, [3, 1, 14, 1, T - 19], mask)
    for row, count in enumerate(pads):
        alone = logits(model, x[row : row + 1, count:])[0]
        assert_near(full[row, count:], alone, "logits", precision(model))
        assert_near(pieces[row, count:], alone, "logits", precision(model))


def spread_groups(name, weight, shape, heads, groups):
    """A parameter of a model with ``groups`` kv heads, as ``shape`` of one where every query head has its own."""
    if weight.shape == shape:
        return weight
    if "qkv_proj" in name:
        width = weight.shape[0] // (heads + 2 * groups)
        q, *kv = weight.split([heads * width, groups * width, groups * width])
        return torch.cat([q, *(spread_groups("", t, (heads * width,), heads, groups) for t in kv)])
    if name.endswith(("inner.weight", "context.weight")):  # a score of q, k and v side by side
        width = weight.shape[1] // (heads + 2 * groups)
        q, *kv = weight.split([heads * width, groups * width, groups * width], dim=1)
        wide = (weight.shape[0], heads * width)
        kv = (spread_groups("", t, wide, heads, groups) * groups / heads for t in kv)
        return torch.cat([q, *kv], dim=1)
    (axis,) = (i for i, (old, new) in enumerate(zip(weight.shape, shape, strict=False)) if old != new)
    per_group = weight.unflatten(axis, (groups, -1))
    return per_group.repeat_interleave(heads // groups, axis).flatten(axis, axis + 1)


@each_pair(5)
@torch.no_grad()
def test_grouped_heads_equal_repeated_ones(family, variant):
    """Keys, values and whatever a mixer has for each kv head, repeated for the query heads that share them."""
    if getattr(CONFIGS[variant], "share_selection", False):
        pytest.skip(
            "heads that choose their tokens together choose others than alone; test_still.py has this case"
        )
    model, x = variant_of(family, variant), ids(2, T)
    geometry = next(iter(model.mixers().values())).geometry
    heads, groups = geometry.heads, geometry.kv_heads
    if family in UNGROUPED:
        assert groups == heads
        return
    assert groups < heads
    wide, given = build(family, CONFIGS[variant], num_key_value_heads=heads), model.state_dict()
    assert next(iter(wide.mixers().values())).geometry.kv_heads == heads
    assert wide.state_dict().keys() == given.keys()
    for name, weight in wide.state_dict().items():
        weight.copy_(spread_groups(name, given[name], weight.shape, heads, groups))
    assert_near(logits(model, x), logits(wide, x), "logits")


@each_pair(6)
def test_the_state_is_what_the_report_says_at_any_length(family, variant):
    model, x = variant_of(family, variant), ids(3, 40)
    reports = describe(model)
    assert any(report.state_bytes for report in reports)
    for pieces in ([1], [9], [9, 31]):
        cache = in_pieces(model, x[:, : sum(pieces)], pieces)[1]
        for report, layer in zip(reports, cache.layers, strict=True):
            if report.method == "softmax":
                assert report.kv_tokens == 6  # bounded by its own window
            else:
                constant = 3 * report.state_bytes
                assert constant <= layer.state_bytes <= 3 * report.cache_bytes(sum(pieces))
                assert (report.growth == 0) == (report.cache_bytes(10**6) == report.state_bytes)
                if not report.growth:
                    assert layer.state_bytes == constant


@each_pair(7)
def test_transfer_reaches_exactly_the_declared_parameters(family, variant):
    model, x = variant_of(family, variant), ids(2, T)
    declared = {name for name, p in model.named_parameters() if ".mixer." in name and p.requires_grad}
    losses = []

    def record(_layer, student_y, teacher_y, valid):
        losses.append(error_and_power(student_y, teacher_y, valid)[0])

    with attention_mode("transfer", record=record):
        model(x)
    assert len(losses) == len(model.mixers()) and all(loss.requires_grad == bool(declared) for loss in losses)
    if declared:
        sum(losses).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad()
    assert reached == declared


# Precision, training and generation, on one variant of every method.


@torch.no_grad()
def off_by(actual, expected):
    """The difference's norm over the expected one's, of the median token."""
    difference = actual.double() - expected
    return (difference.norm(dim=-1) / expected.norm(dim=-1)).median().item()


@each_family
@each_method
def test_bf16_is_near_fp64(family, method):
    """The same rounded weights, in both; whole and in pieces."""
    config, x = representatives()[method], ids(2, T)
    model = build(family, config, dtype=torch.bfloat16)
    exact = build(family, config)
    exact.load_state_dict(model.state_dict())
    expected = logits(exact, x)
    for actual in (logits(model, x), in_pieces(model, x, [9, 1, 1, T - 11])[0]):
        assert actual.dtype == torch.bfloat16 and actual.isfinite().all()
        assert off_by(actual, expected) <= TOLERANCES["logits"][torch.bfloat16]


@each_family
@each_method
def test_adapters_learn_alone_and_merge(family, method):
    """Gradients reach exactly the adapters; merged, the plain model gives the adapted one's logits."""
    model, x = build(family, representatives()[method]), ids(2, T)
    plain, names = logits(model, x), set(model.state_dict())
    stage = shaken(FinetuneStage(model, recipe()))
    assert len(stage.named_parameters()) == 2 * len(stage.targets)
    _, slopes = gradients(stage, batch())
    assert slopes and all(slope.any() for slope in slopes.values())
    with stage.training():
        stage.backward(batch(), 1.0)
        reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == set(slopes)
    adapted = logits(model, x)
    stage.merge()
    stage.remove()
    assert (adapted - plain).abs().max() > 1e-2
    assert_near(logits(model, x), adapted, "logits")
    assert set(model.state_dict()) == names


def prompts():
    """Two prompts, one shorter, padded on the left."""
    x = ids(2, 19)
    mask = torch.ones_like(x)
    mask[1, :6] = 0
    return x.masked_fill(mask == 0, 0), mask


@each_family
@each_method
def test_greedy_equals_recompute(family, method):
    model, (x, mask) = method_of(family, method), prompts()
    assert torch.equal(generate(model, x, mask, 10), recompute(model, x, mask, 10))


@each_family
@each_method
def test_beams_with_and_without_cache(family, method):
    model, (x, mask) = method_of(family, method), prompts()
    kept, recomputed = (
        generate(model, x, mask, 10, num_beams=3, num_return_sequences=2, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(kept, recomputed)


@each_family
@each_method
def test_assisted_equals_greedy(family, method):
    """By prompt lookup in a prompt that repeats, and by a model near enough to be believed at times."""
    model, x = method_of(family, method), ids(1, 9).repeat(1, 3)
    # A sliding layer in the assistant cannot take tokens back, in transformers' plain models neither.
    full = {"layer_types": ["full_attention"] * 2} if "layer_types" in FAMILIES[family] else {}
    assistant, mask = build(family, representatives()[method], **full), torch.ones_like(x)
    with torch.no_grad():
        for number, parameter in enumerate(assistant.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    expected = generate(model, x, mask, 12)
    assert torch.equal(generate(model, x, mask, 12, prompt_lookup_num_tokens=5), expected)
    assert torch.equal(generate(model, x, mask, 12, assistant_model=assistant), expected)


# Folders.


@each_family
@each_method
def test_saved_and_loaded_is_bit_equal(family, method, tmp_path):
    model, x = build(family, representatives()[method], dtype=torch.float32), ids(2, T)
    again, _ = checkpoint.load(checkpoint.save(model, None, tmp_path / "student"))
    assert torch.equal(logits(again, x), logits(model, x))
    assert [r.method for r in describe(again)] == [r.method for r in describe(model)]


def test_every_pair_reloads_bit_equal_without_the_package(tmp_path):
    """One folder a family, whose layers have a method each; that it may be saved again is test_checkpoint's."""
    folders = []
    for family, fields in FAMILIES.items():
        methods, changes = representatives(), {}
        if "layer_types" in fields:  # one layer keeps its own window
            methods = {"softmax": SoftmaxConfig()} | methods
            changes["layer_types"] = ["sliding_attention"] + ["full_attention"] * len(METHOD_NAMES)
        configs = dict(enumerate(methods.values()))
        model = build(family, configs, dtype=torch.float32, num_hidden_layers=len(methods), **changes)
        assert [r.method for r in describe(model)] == list(methods)
        save_with_answers(model, tmp_path / family)
        folders.append(tmp_path / family)
    result = run(WITHOUT_PACKAGE, "once", *folders, tmp_path=tmp_path)
    assert result.stdout.strip() == "equal", result.stderr[-2000:]


# Refusals. Every pair above converts; these families do not, or not with every method.

SMALL = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    head_dim=16,
)
REFUSED = {
    "hunyuan_v1_dense": (
        SMALL | dict(num_key_value_heads=2),
        "hunyuan_v1_dense: layer 0 does not apply its rotary embedding last, so q and k cannot be taken before it; "
        "choose a method that does not need them",
    ),
    "gpt_oss": (
        SMALL | dict(num_key_value_heads=2, num_local_experts=2),
        "gpt_oss: layer 0 uses learned attention sinks (s_aux), which no method honours",
    ),
}


@each_method
@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_a_method_cannot_have_is_refused_at_conversion(family, method):
    fields, message = REFUSED[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
    before, config = type(model), representatives()[method]
    mixer = METHODS[method].mixer
    if family == "hunyuan_v1_dense" and not mixer.wants_unrotated:
        assert list(convert(model, config).mixers()) == [0]
        return
    with pytest.raises(ConversionError) as error:
        convert(model, config)
    assert str(error.value) == message
    assert type(model) is before and not hasattr(model.config, "linearize")


@each_method
@each_family
def test_a_layer_that_does_not_exist_is_refused_and_nothing_changes(family, method):
    model = tiny(family, num_hidden_layers=2, **FAMILIES[family])
    expected = model.state_dict().keys()
    with pytest.raises(ConversionError, match="layers: 2 is not an attention layer; choose from 0 to 1"):
        convert(model, representatives()[method], [0, 2])
    assert model.state_dict().keys() == expected
