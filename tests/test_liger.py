"""Liger: the golden arrays, and what its specification says must hold for every variant."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import FAMILIES, ids, student, tiny
from tolerances import assert_near
from torch import Tensor

from linearize.convert import convert, describe
from linearize.modeling.attention import attention_mode, base_attention
from linearize.modeling.errors import ConversionError
from linearize.modeling.gated import gated_chunked
from linearize.modeling.liger import LigerConfig, LigerMixer
from linearize.modeling.mixer import Geometry, MixerInput
from linearize.modeling.reference import joint_quadratic, window_quadratic

ARRAYS = {
    name: torch.from_numpy(array)
    for name, array in np.load(Path(__file__).parent / "golden" / "liger.npz").items()
}
GEOMETRY = Geometry(heads=4, kv_heads=2, key_dim=8, value_dim=8, hidden=32)
VARIANTS = {
    "gla": {},
    "hgrn2": {},
    "hgrn2 floor": dict(hgrn2_lower_bound=0.3),
    "gsa": {},
    "gsa 4": dict(gsa_slots=4),
}
variants = pytest.mark.parametrize("name", VARIANTS)


def config(name: str, **fields) -> LigerConfig:
    return LigerConfig(variant=name.split()[0], **VARIANTS[name], **fields)


def rotate(x: Tensor, offset: int = 0) -> Tensor:
    """RoPE, theta 10,000, halves rotated, from position ``offset``."""
    half = x.shape[-1] // 2
    frequency = 10_000 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = (offset + torch.arange(x.shape[1], dtype=torch.float64))[:, None, None] * frequency
    one, two = x.double().split(half, -1)
    turned = (one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin())
    return torch.cat(turned, -1).to(x.dtype)


def golden_input(dtype: torch.dtype = torch.float64) -> MixerInput:
    hidden = ARRAYS["x"].to(dtype)
    q, k, v = (
        (hidden @ ARRAYS[name].to(dtype).T).unflatten(-1, (-1, GEOMETRY.key_dim))
        for name in ("Wq", "Wk", "Wv")
    )
    scale = GEOMETRY.key_dim**-0.5
    return MixerInput(hidden, rotate(q), rotate(k), v, scale, q_plain=q, k_plain=k, use_cache=True)


def random_input(length: int = 150, *, seed: int = 0, spread: float = 2.0, dtype=torch.float64) -> MixerInput:
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> Tensor:
        x = spread * torch.randn(2, length, heads, 8, generator=generator, dtype=torch.float64)
        return x.to(dtype).requires_grad_()

    q, k, v = draw(4), draw(2), draw(2)
    hidden = q.detach().flatten(2)
    return MixerInput(hidden, rotate(q), rotate(k), v, 8**-0.5, q_plain=q, k_plain=k, use_cache=True)


def run(x: MixerInput, **fields) -> tuple[Tensor, object]:
    return LigerMixer(LigerConfig(**fields), GEOMETRY)(x)


# The golden arrays.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_golden_array(dtype):
    x = golden_input(dtype)
    y, state = run(x)
    found = {
        "gla.out": y.flatten(2) @ ARRAYS["Wo"].to(dtype).T,
        "gla.o_rec": run(x, window=None, mix_recurrent=1.0)[0].transpose(1, 2),
        "gla.y_window64": run(x, mix_window=1.0, mix_recurrent=0.0)[0].transpose(1, 2),
        "gla.final_state": state.kv.repeat_interleave(2, 1),
    }
    assert {name for name in ARRAYS if name.startswith("gla.")} == set(found)
    for name, actual in found.items():
        if dtype != torch.bfloat16:
            assert_near(actual, ARRAYS[name], "liger")
        assert_near(actual, ARRAYS[name], "norm", dtype)


def test_golden_token_by_token():
    x, mixer = golden_input(), LigerMixer(LigerConfig(), GEOMETRY)
    state, outputs = None, []
    for t in range(80):
        one = {n: getattr(x, n)[:, t : t + 1] for n in ("hidden", "q", "k", "v", "q_plain", "k_plain")}
        y, state = mixer(x._replace(**one), state)
        outputs.append(y)
    assert_near(torch.cat(outputs, 1).flatten(2) @ ARRAYS["Wo"].T, ARRAYS["gla.out"], "liger")
    assert_near(state.kv, ARRAYS["gla.final_state"][:, ::2], "liger")


# What the variants are: a loop over tokens, per query head, as the table of the specification has it.


def loop(x: MixerInput, config: LigerConfig) -> Tensor:
    """o [B, T, H, V] of the recurrence alone."""
    q = x.q_plain
    k, v = (t.repeat_interleave(2, 2) for t in (x.k_plain, x.v))
    slots = config.gsa_slots or 8
    steps = config.gate_normalizer or (1 if config.variant == "hgrn2" else 16)
    a = torch.sigmoid(k.unflatten(-1, (slots, -1)).mean(-1)) ** (1 / steps)
    a = config.hgrn2_lower_bound + (1 - config.hgrn2_lower_bound) * a
    phi_q, phi_k = q.softmax(-1), k.softmax(-1) if config.variant == "gla" else 1 - a
    memory = torch.zeros(2, 4, slots if config.variant == "gsa" else 8, 8, dtype=q.dtype)
    keys = torch.zeros(2, 4, 8, slots, dtype=q.dtype)
    outputs = []
    for t in range(q.shape[1]):
        memory = a[:, t, :, :, None] * memory + phi_k[:, t, :, :, None] * v[:, t, :, None]
        read = phi_q[:, t]
        if config.variant == "gsa":
            keys = a[:, t, :, None] * keys + k[:, t, :, :, None] * (1 - a[:, t, :, None])
            read = torch.einsum("bhkm,bhk->bhm", keys, q[:, t]).softmax(-1)
        outputs.append(torch.einsum("bhm,bhmv->bhv", read, memory))
    return torch.stack(outputs, 1)


@variants
def test_the_layer_is_the_loop_with_every_gradient(name):
    """The key projection's gradient has three paths: gate, key, window."""
    x = random_input(150)
    window = window_quadratic(x.q, x.k, x.v, scale=x.scale, window=64)
    expected = 0.3 * window + 0.6 * loop(x, config(name))
    y, _ = LigerMixer(config(name, mix_window=0.3, mix_recurrent=0.6), GEOMETRY)(x)
    assert_near(y, expected, "layer")
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    leaves = [x.q_plain, x.k_plain, x.v]
    found, wanted = (
        torch.autograd.grad((o * weights).sum(), leaves, retain_graph=True) for o in (y, expected)
    )
    for actual, gradient in zip(found, wanted, strict=True):
        assert_near(actual, gradient, "layer")


def split(x: MixerInput, *stops: int) -> list[MixerInput]:
    names, start, parts = ("hidden", "q", "k", "v", "q_plain", "k_plain"), 0, []
    for stop in (*stops, x.q.shape[1]):
        parts.append(x._replace(**{n: getattr(x, n)[:, start:stop] for n in names}))
        start = stop
    return parts


@variants
@pytest.mark.parametrize("stops", [(15,), (16,), (17,), (1, 2, 3), (16, 17, 80), (40, 41)])
@pytest.mark.parametrize("pending", [0, 9])
@torch.no_grad()
def test_any_split_across_the_windows_border(name, stops, pending):
    x, mixer = random_input(100), LigerMixer(config(name, window=16), GEOMETRY)
    expected, whole = mixer(x)
    state, outputs = None, []
    for part in split(x, *stops):
        y, state = mixer(part._replace(pending=pending), state)
        outputs.append(y)
    assert_near(torch.cat(outputs, 1), expected, "layer")
    assert int(state.folded.max()) == 100 - pending
    if not pending:
        assert_near(state.kv, whole.kv, "layer")
        assert_near(state.slots, whole.slots, "layer")


def test_the_window_alone_is_the_teacher_until_it_is_full_and_then_a_band():
    x = random_input(100)
    band = window_quadratic(x.q, x.k, x.v, scale=x.scale, window=64)
    softmax = window_quadratic(x.q, x.k, x.v, scale=x.scale, window=100)
    y, state = run(x, mix_window=1.0, mix_recurrent=0.0)
    assert_near(y, band, "layer")
    assert_near(y[:, :64], softmax[:, :64], "layer")
    assert state.kv.numel() == state.slots.numel() == state.key.numel() == 0


def test_windows_of_64_and_65_part_at_index_64():
    x = random_input(100)
    one, other = (run(x, window=w)[0] for w in (64, 65))
    assert_near(one[:, :64], other[:, :64], "layer")
    assert (one - other).flatten(2).abs().amax((0, 2))[64:].min() > 1e-4


@variants
@torch.no_grad()
def test_the_recurrence_does_not_know_positions(name):
    model, x = student("llama", config(name, window=None)), ids(2, 40)
    places = torch.arange(40)[None].expand(2, -1)
    assert_near(model(x, position_ids=places + 100).logits, model(x, position_ids=places).logits, "logits")


def test_gla_is_linear_in_the_values():
    x = random_input(70)
    once = run(x, window=None)[0]
    assert_near(run(x._replace(v=-3 * x.v), window=None)[0], -3 * once, "layer")


def test_gla_without_forgetting_is_linear_attention():
    x = random_input(100)
    y, _ = run(x, window=None, gate_normalizer=1e12, normalize=True, mix_recurrent=1.0)
    phi_q, phi_k = x.q_plain.softmax(-1), x.k_plain.softmax(-1)
    plain = joint_quadratic(x.q, x.k, x.v, phi_q, phi_k, torch.ones(4), scale=1.0, window=None)
    assert_near(y, plain, "layer", torch.float32)  # the normaliser's eps, and gates of almost one


@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_hgrn2_writes_what_it_forgets(floor):
    x, mixer = random_input(20), LigerMixer(LigerConfig(variant="hgrn2", hgrn2_lower_bound=floor), GEOMETRY)
    log_decay = mixer._log_decay(x)
    alpha = torch.exp(log_decay)
    assert_near(mixer._key(x, log_decay) + alpha, torch.ones_like(alpha), "layer")
    assert_near(alpha, floor + (1 - floor) * torch.sigmoid(x.k_plain), "layer")


def test_gsa_of_constant_values_is_the_share_its_slots_have_filled():
    x = random_input(90)
    x = x._replace(v=torch.full_like(x.v, 1.7))
    y, _ = run(x, variant="gsa", window=None, mix_recurrent=1.0)
    log_a = torch.nn.functional.logsigmoid(x.k_plain) / 16
    share = -torch.expm1(log_a)
    p = gated_chunked(x.q_plain, x.k_plain, share, log_a, side="value")[0].softmax(-1)
    filled = 1 - torch.exp(log_a.cumsum(1)).repeat_interleave(2, 2)
    assert_near(y, (1.7 * (p * filled).sum(-1, keepdim=True)).expand_as(y), "layer")


@variants
@torch.no_grad()
def test_states_are_per_kv_head_and_equal_those_of_repeated_heads(name):
    x = random_input(90)
    y, state = LigerMixer(config(name), GEOMETRY)(x)
    many = x._replace(**{n: getattr(x, n).repeat_interleave(2, 2) for n in ("k", "v", "k_plain")})
    repeated_y, repeated = LigerMixer(config(name), Geometry(4, 4, 8, 8, 32))(many)
    assert_near(y, repeated_y, "layer")
    assert state.kv.shape[1] == 2
    assert_near(state.kv.repeat_interleave(2, 1), repeated.kv, "layer")


@variants
@pytest.mark.parametrize("logit", [-40.0, 40.0])
def test_extreme_keys_are_finite_forward_and_backward(name, logit):
    x = random_input(4096, dtype=torch.float32)
    k = torch.full_like(x.k_plain, logit).requires_grad_()
    y, state = LigerMixer(config(name), GEOMETRY)(x._replace(k_plain=k, k=rotate(k)))
    gradients = torch.autograd.grad(y.sum(), [k, x.q_plain, x.v])
    assert all(t.isfinite().all() for t in (y, state.kv, state.slots, *gradients))


@variants
@torch.no_grad()
def test_right_padding_leaves_the_state_alone(name):
    x, mixer = random_input(60), LigerMixer(config(name, window=8), GEOMETRY)
    lengths = torch.tensor([60, 37])
    y, state = mixer(x._replace(lengths=lengths))
    short = split(x, 37)[0]
    expected_y, expected = mixer(short)
    assert_near(y[1, :37], expected_y[1], "layer")
    for name in ("kv", "slots"):
        assert_near(getattr(state, name)[1], getattr(expected, name)[1], "layer")
    assert state.seen.tolist() == [60, 37]


def assert_pieces_are_the_whole(family: str, config) -> None:
    """Prefill, a step, a chunk and steps of a converted model of this family, against one forward."""
    model, x = student(family, config), ids(2, 30)
    expected, cache, outputs, start = model(x, use_cache=False).logits, None, [], 0
    for stop in (9, 10, 27, 28, 29, 30):
        output = model(x[:, start:stop], past_key_values=cache, use_cache=True)
        cache, start = output.past_key_values, stop
        outputs.append(output.logits)
    # Eager softmax, which transformers 5.24 takes for Gemma 2, is computed in fp32 in the layers that keep theirs.
    rounded = base_attention(model.config) == "eager"
    assert_near(torch.cat(outputs, 1), expected, "logits", torch.float32 if rounded else None)


@pytest.mark.parametrize("variant", ["gla", "hgrn2", "gsa"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_decodes_what_it_computes(family, variant):
    assert_pieces_are_the_whole(family, LigerConfig(variant=variant, window=8))


# Parameters and options.


def test_conversion_adds_no_parameter_and_the_state_is_small():
    model = convert(tiny("llama"), LigerConfig(window=8))
    assert [report.parameters for report in describe(model)] == [0, 0, 0]
    # S [2, 16, 16] in fp32, the rings of k and v [8, 2, 16] in fp32, two counters.
    assert describe(model)[0].state_bytes == 4 * 2 * 16 * 16 + 2 * 4 * 8 * 2 * 16 + 2 * 8


OPTIONS = {
    "train_mix": dict(train_mix="head", mix_window=0.4),
    "train_mix_layer": dict(train_mix="layer"),
    "train_gate_bias": dict(train_gate_bias=True, gate_bias=3.0),
    "train_key_temperature": dict(train_key_temperature=True, key_temperature=0.5),
}


@pytest.mark.parametrize("fields", OPTIONS.values(), ids=OPTIONS)
def test_a_learned_option_starts_as_the_fixed_one_and_learns(fields):
    x = random_input(80)
    fixed = {n: v for n, v in fields.items() if not n.startswith("train")}
    mixer = LigerMixer(LigerConfig(**fields), GEOMETRY).double()
    mixer.reset_parameters()
    y, _ = mixer(x)
    assert_near(y, run(x, **fixed)[0], "layer", torch.float32)
    y.square().sum().backward()
    (parameter,) = mixer.parameters()
    assert parameter.grad.abs().min() > 0


@pytest.mark.parametrize(
    "fields",
    [
        dict(gate_source="q"),
        dict(gate_source="v"),
        dict(gate_bias=2.0),
        dict(key_temperature=0.5),
        dict(feature_map="identity"),
        dict(rope_on_recurrent=True),
        dict(normalize=True),
        dict(gate_normalizer=4.0),
    ],
    ids=str,
)
@torch.no_grad()
def test_an_option_changes_the_layer_and_keeps_its_splits(fields):
    x, mixer = random_input(70), LigerMixer(LigerConfig(window=8, **fields), GEOMETRY)
    expected, _ = mixer(x)
    assert (expected - run(x, window=8)[0]).abs().max() > 1e-3
    state, outputs = None, []
    for part in split(x, 9, 10, 50):
        y, state = mixer(part._replace(pending=5), state)
        outputs.append(y)
    assert_near(torch.cat(outputs, 1), expected, "layer")


def test_half_life_of_a_gate_bias():
    """b = 3 with N = 16 halves an average key's weight in 228 tokens instead of 16."""
    x = random_input(1)
    x = x._replace(k_plain=torch.zeros_like(x.k_plain))
    for bias, tokens in ((0.0, 16), (3.0, 228)):
        decay = LigerMixer(LigerConfig(gate_bias=bias), GEOMETRY)._log_decay(x)
        assert round(float(torch.log(torch.tensor(0.5)) / decay.flatten()[0])) == tokens


def test_transfer_passes_softmax_on_and_has_nothing_to_learn():
    model, x = student("llama", LigerConfig(window=8)), ids(2, 30)
    seen = []
    with attention_mode("transfer", record=lambda *got: seen.append(got)):
        through = model(x).logits
    with attention_mode("softmax"):
        assert torch.equal(through, model(x).logits)
    assert len(seen) == 3 and not any(got[1].requires_grad for got in seen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@torch.no_grad()
def test_models_of_any_dtype_run(dtype):
    model, exact = (student("qwen3", LigerConfig(window=8), dtype=d) for d in (dtype, torch.float64))
    output, wanted = model(ids(1, 50)).logits, exact(ids(1, 50)).logits
    assert output.dtype == dtype and (output.double() - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(window=0), "window: 0 is impossible"),
        (dict(window=None, mix_recurrent=0.0), "leave nothing"),
        (dict(mix_window=-1.0), "mix_window"),
        (dict(mix_window=0.0, train_mix="head"), "train_mix"),
        (dict(gate_normalizer=0.0), "gate_normalizer"),
        (dict(variant="hgrn2", hgrn2_lower_bound=1.0), "hgrn2_lower_bound"),
        (dict(hgrn2_lower_bound=0.5), "no meaning for variant 'gla'; only for hgrn2"),
        (dict(gsa_slots=4), "no meaning for variant 'gla'; only for gsa"),
        (dict(variant="gsa", gsa_slots=5), "5 does not divide the key dim 16"),
        (dict(key_temperature=0.0), "key_temperature"),
        (dict(feature_map="identity", normalize=True), "feature_map: 'identity'"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_in_one_line(fields, message):
    with pytest.raises(ConversionError, match=message) as error:
        convert(tiny(), LigerConfig(**fields))
    assert "\n" not in str(error.value)
