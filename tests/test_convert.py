"""Conversion on every family: softmax mode is the model itself, geometry, choice of layers, refusals, the way back."""

import dataclasses

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from tiny import FAMILIES, UNSUPPORTED, ids, student, tiny
from tolerances import assert_near
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    Gemma3ForConditionalGeneration,
)

from linearize.convert import convert, describe, projections, unconvert
from linearize.modeling.attention import attention_mode
from linearize.modeling.errors import ConversionError, LinearizeError
from linearize.modeling.lolcats import LOLCATS, LolcatsConfig, LolcatsMixer
from linearize.modeling.mixer import Method
from linearize.modeling.registry import METHODS
from linearize.modeling.salient import SalientConfig
from linearize.modeling.still import StillConfig
from linearize.modeling.window import SoftmaxConfig, WindowConfig
from linearize.probe import probe

CONFIG = LolcatsConfig(window=8, window_kind="sliding")


@pytest.mark.parametrize("layers", ["all", [1]], ids=["all", "some"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_softmax_mode_is_the_original_bit_for_bit(family, layers):
    model, x = tiny(family), ids()
    mask = torch.ones_like(x)
    mask[0, :7] = 0
    expected = model(x).logits, model(x, attention_mask=mask).logits[:, 7:]
    tokens = model.generate(x, max_new_tokens=6, do_sample=False, attention_mask=mask)
    convert(model, CONFIG, layers)
    with attention_mode("softmax"):
        assert torch.equal(model(x).logits, expected[0])
        assert torch.equal(model(x, attention_mask=mask).logits[:, 7:], expected[1])
        assert torch.equal(model.generate(x, max_new_tokens=6, do_sample=False, attention_mask=mask), tokens)
    assert not torch.equal(model(x).logits, expected[0])


@pytest.mark.parametrize(
    "config",
    [WindowConfig(window=40), LolcatsConfig(window=40, window_kind="sliding"), LolcatsConfig(window=20)],
    ids=["window", "sliding", "terraced"],
)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_window_as_long_as_the_text_is_softmax(family, config):
    """T <= W, or 2 W terraced: nothing is linear, whatever the maps are."""
    model, x = tiny(family, dtype=torch.float64), ids()
    if family == "gemma2":
        model.set_attn_implementation("eager")  # transformers' sdpa leaves the soft-cap out
    expected = model(x).logits
    convert(model, config).double()
    assert_near(model(x).logits, expected, "logits", torch.float32 if family == "gemma2" else None)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_unconvert_gives_the_original_back(family):
    model, x = tiny(family), ids()
    expected, before = (
        model(x).logits,
        (type(model), type(model.config), model.config.to_dict(), set(model.state_dict())),
    )
    unconvert(convert(model, CONFIG))
    assert torch.equal(model(x).logits, expected)
    assert (type(model), type(model.config), model.config.to_dict(), set(model.state_dict())) == before


def test_geometry_is_what_the_attention_function_sees():
    shapes = {
        f: {dataclasses.astuple(p.geometry) for p in probe(tiny(f)).values()}
        for f in ("llama", "gpt2", "phi3")
    }
    assert shapes == {"llama": {(4, 2, 16, 16, 32)}, "gpt2": {(4, 4, 8, 8, 32)}, "phi3": {(4, 2, 8, 8, 32)}}


def test_layers_with_their_own_window_are_left_alone_unless_asked():
    assert list(student("gemma3_text", CONFIG).mixers()) == [1, 2]
    assert list(convert(tiny("gemma3_text"), CONFIG, convert_sliding=True).mixers()) == [0, 1, 2]
    assert list(convert(tiny("gemma3_text"), CONFIG, [0]).mixers()) == [0]
    with pytest.raises(ConversionError, match="convert_sliding"):
        convert(tiny("mistral", sliding_window=8), CONFIG)


def test_layers_can_have_different_methods():
    model = convert(tiny(), {0: CONFIG, 1: WindowConfig(window=4), 2: SoftmaxConfig()})
    assert [r.method for r in describe(model)] == ["lolcats", "window", "softmax"]


def test_layers_can_be_given_by_ranges():
    salient, softmax = SalientConfig(budget=3, chunk=4), SoftmaxConfig()
    model = convert(tiny(num_hidden_layers=5), CONFIG, {"1-2": salient, "4": softmax, "rest": CONFIG})
    assert [r.method for r in describe(model)] == ["lolcats", "salient", "salient", "lolcats", "softmax"]
    unnamed = convert(tiny(), CONFIG, {"1": salient})
    assert [r.method for r in describe(unnamed)] == ["softmax", "salient", "softmax"]
    own_windows = convert(tiny("gemma3_text"), CONFIG, {"2": salient, "rest": CONFIG})
    assert [r.method for r in describe(own_windows)] == ["softmax", "lolcats", "salient"]
    with pytest.raises(ConversionError, match="layers: 3 is not an attention layer; choose from 0 to 2"):
        convert(tiny(), CONFIG, {"2-3": salient, "rest": CONFIG})


def test_report_counts_bytes_of_what_a_cache_holds():
    model = student("llama", CONFIG, layers=[0, 2], dtype=torch.float32)
    with torch.no_grad():
        cache = model(ids(1, 50), use_cache=True).past_key_values
    reports = describe(model)
    for report, layer in zip(reports, cache.layers, strict=True):
        if report.method == "softmax":
            held = sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
            assert report.cache_bytes(50) == report.teacher_bytes(50) == held
        else:
            assert report.cache_bytes(50) == report.cache_bytes(10**6) == layer.state_bytes
    assert [r.parameters for r in reports] == [2 * 4 * 16 * 8 + 4, 0, 2 * 4 * 16 * 8 + 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_that_grows_is_not_reported_as_constant(dtype):
    """Four chunks of four leave the local span by token 24, and two tokens of each stay in every head."""
    config = StillConfig(chunk=4, salient_per_chunk=2, budget=None)
    model = student("llama", config, layers=[1], dtype=dtype)
    with torch.no_grad():
        held = model(ids(1, 24), use_cache=True).past_key_values.layers[1].state_bytes
    report = describe(model)[1]
    assert report.growth == 2 / 4 * 4 * ((16 + 16) * dtype.itemsize + 4)
    assert held == report.state_bytes + 4 * 4 * report.growth
    assert report.cache_bytes(24) == report.state_bytes + 24 * report.growth >= held
    assert report.cache_bytes(10**6) > 10**6 * report.growth
    bounded = describe(student("llama", StillConfig(chunk=4, budget=2), layers=[1], dtype=dtype))[1]
    assert bounded.growth == 0 and bounded.cache_bytes(10**6) == bounded.state_bytes


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ("phi3", ["o_proj", "qkv_proj"]),
        ("gpt_neox", ["query_key_value", "dense"]),
        ("gpt2", ["c_attn", "c_proj"]),
    ],
)
def test_projections_are_found_not_guessed(family, names):
    plain = projections(tiny(family))
    converted = projections(convert(tiny(family), CONFIG, [1]))
    assert plain == converted and list(plain) == [0, 1, 2]
    for paths in plain.values():
        assert [path.rpartition(".")[2] for path in paths] == names


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_families_off_the_interface_are_refused_by_name(family):
    with pytest.raises(ConversionError, match=rf"^{family}: .*attention interface"):
        convert(tiny(family), CONFIG)


def test_models_that_are_not_causal_are_refused():
    bert = AutoModelForMaskedLM.from_config(
        AutoConfig.for_model(
            "bert", hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8
        )
    )
    with pytest.raises(ConversionError, match=r"bert: .*causal"):
        convert(bert, CONFIG)
    t5 = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("t5", d_model=32, num_layers=1, num_heads=4, d_ff=8, d_kv=8, vocab_size=97)
    )
    with pytest.raises(ConversionError, match=r"t5: .*encoder-decoder"):
        convert(t5, CONFIG)


def test_learned_sinks_are_refused():
    fields = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    )
    config = AutoConfig.for_model(
        "gpt_oss", vocab_size=97, intermediate_size=32, num_local_experts=2, **fields
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConversionError, match="gpt_oss: layer 0 uses learned attention sinks"):
        convert(model, CONFIG)


def test_a_text_model_inside_another_is_refused():
    """Its layers read a configuration that ours does not reach: they would keep softmax without a word."""
    vision = dict(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=4,
        patch_size=2,
    )
    text = FAMILIES["gemma3_text"] | {"model_type": "gemma3_text"}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with pytest.raises(ConversionError, match=r"gemma3: its text layers have a configuration of their own"):
        convert(Gemma3ForConditionalGeneration._from_config(config), CONFIG)


def test_layers_that_look_ahead_are_refused():
    with pytest.raises(ConversionError, match=r"gemma3_text: layer 0 attends in both directions"):
        convert(tiny("gemma3_text", use_bidirectional_attention=True), CONFIG)


def test_layers_that_share_keys_or_keep_a_state_of_their_own_are_refused():
    fields = dict(num_kv_shared_layers=1, hidden_size_per_layer_input=8, vocab_size_per_layer_input=97)
    config = AutoConfig.for_model("gemma4_text", **FAMILIES["gemma3_text"] | fields)
    model = AutoModelForCausalLM.from_config(config)
    for layers in ([1], [2]):
        with pytest.raises(ConversionError, match=rf"gemma4_text: layer {layers[0]} shares its keys"):
            convert(model, CONFIG, layers)
    mamba = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)
    config = AutoConfig.for_model("falcon_h1", **FAMILIES["llama"] | mamba)
    with pytest.raises(ConversionError, match=r"falcon_h1: layer 0 keeps a linear state of its own"):
        convert(AutoModelForCausalLM.from_config(config), CONFIG)


@torch.no_grad()
def test_models_under_hooks_of_accelerate_are_converted_too():
    x = ids()
    expected = tiny()(x).logits, convert(tiny(), CONFIG)(x).logits
    model = dispatch_model(tiny(), {"": "cpu"}, force_hooks=True)
    assert torch.equal(convert(model, CONFIG)(x).logits, expected[1])
    assert torch.equal(unconvert(model)(x).logits, expected[0])
    with pytest.raises(ConversionError, match="weights of layer 0 are offloaded"):
        convert(cpu_offload(tiny(), execution_device="cpu"), CONFIG)


def test_wrapped_models_are_refused():
    wrapped = get_peft_model(student(), LoraConfig(target_modules=["q_proj"]))
    for change in (lambda: convert(wrapped, CONFIG), lambda: unconvert(wrapped)):
        with pytest.raises(ConversionError, match="PeftModel: is a wrapper"):
            change()


@pytest.mark.parametrize(
    ("config", "layers", "message"),
    [
        (CONFIG, [3], "layers: 3 is not an attention layer; choose from 0 to 2"),
        (CONFIG, "most", "layers: 'most' is unknown"),
        (LolcatsConfig(window=0), "all", "window: 0 is impossible"),
        (LolcatsConfig(window_kind="round"), "all", "window_kind: 'round' is unknown"),
        (LolcatsConfig(feature_dim=7), "all", "feature_dim: 7"),
        (LolcatsConfig(feature_dim=64), "all", "feature_dim: 64"),
        (LolcatsConfig(feature_dim=0), "all", "feature_dim: 0"),
        (LolcatsConfig(feature_map="cosine"), "all", "feature_map: 'cosine' is unknown"),
        (LolcatsConfig(tie_qk_map=True, kv_tied_map=True), "all", "tie_qk_map"),
        (WindowConfig(sinks=-1), "all", "sinks: -1 is impossible"),
    ],
)
def test_impossible_requests_are_one_line_and_change_nothing(config, layers, message):
    model = tiny()
    before = type(model)
    with pytest.raises(ConversionError, match=message) as error:
        convert(model, config, layers)
    assert "\n" not in str(error.value)
    assert type(model) is before and not hasattr(model.config, "linearize")


def test_converting_twice_is_refused():
    with pytest.raises(ConversionError, match="converted already"):
        convert(student(), CONFIG)


def test_switching_the_implementation_changes_softmax_only():
    model, x = student("llama", CONFIG, layers=[1]), ids()
    before = model(x).logits
    model.set_attn_implementation("eager")
    assert list(model.mixers()) == [1]
    assert_near(model(x).logits, before, "logits", torch.float32)  # eager softmax is fp32
    with attention_mode("softmax"):
        assert model(x, output_attentions=True).attentions[0] is not None


def test_a_dense_mask_is_refused_in_words():
    with pytest.raises(LinearizeError, match=r"attention_mask: .*give a \[batch, time\] mask"):
        student()(ids(1, 5), attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool))


class PlainLolcats(LolcatsMixer):
    """Reads q and k before the rotary embedding, and rotates nothing: only to see what reaches a mixer."""

    wants_unrotated = True
    seen: list = []  # noqa: RUF012

    def forward(self, x, state=None):
        self.seen.append((x.q, x.k, x.q_plain, x.k_plain))
        return super().forward(x, state)


@pytest.fixture
def plain_method(monkeypatch):
    PlainLolcats.seen = []
    monkeypatch.setitem(METHODS, "lolcats", Method("lolcats", LolcatsConfig, PlainLolcats, LOLCATS.summary))
    return PlainLolcats


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gpt2"])
@torch.no_grad()
def test_deferring_the_rotation_is_exact(family, plain_method):
    x = ids(1, 20)
    expected = student(family, CONFIG)(x).logits
    METHODS["lolcats"] = LOLCATS
    assert torch.equal(student(family, CONFIG)(x).logits, expected)
    assert plain_method.seen
    rotated = 0
    for q, k, q_plain, k_plain in plain_method.seen:
        rotated += not torch.equal(q, q_plain)
        assert q_plain.shape == q.shape and k_plain.shape == k.shape
    bare = (
        len(plain_method.seen) // 3 if family == "smollm3" else 0
    )  # one of its three layers has no rotation
    assert rotated == len(plain_method.seen) - bare


def test_a_family_that_does_not_rotate_last_is_refused(plain_method):
    fields = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    config = AutoConfig.for_model(
        "hunyuan_v1_dense", vocab_size=97, num_key_value_heads=2, head_dim=16, **fields
    )
    with pytest.raises(ConversionError, match=r"hunyuan_v1_dense: layer 0 .*rotary"):
        convert(AutoModelForCausalLM.from_config(config), CONFIG)
