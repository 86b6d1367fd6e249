"""LAWCAT: the layer is its formulas as a loop, and what its specification says must hold."""

import pytest
import torch
from test_liger import GEOMETRY, assert_pieces_are_the_whole, random_input, split
from tiny import FAMILIES, ids, randomise, student, tiny
from tolerances import assert_near
from torch import Tensor

from linearize.convert import convert, describe
from linearize.modeling.attention import attention_mode
from linearize.modeling.errors import ConversionError
from linearize.modeling.lawcat import LawcatConfig, LawcatMixer
from linearize.modeling.mixer import Geometry, MixerInput
from linearize.modeling.reference import joint_quadratic, window_quadratic

OPTIONS = {
    "paper": {},
    "window": dict(window=16),
    "window excluded": dict(window=16, window_exclude=True),
    "shared": dict(kv_shared=True),
    "shared window excluded": dict(kv_shared=True, window=5, window_exclude=True, conv_size=2),
    "untied": dict(tie_qk_map=False, conv_tied=True, gate_rank=None),
    "no convolution": dict(conv_size=None, window=16, window_exclude=True),
    "q only": dict(conv_on="q", rope=True),
    "wide": dict(feature_dim=12, clamp_log_decay=-0.05),
    "values": dict(conv_on="qkv", conv_tied=True),
    "values window": dict(conv_on="v", window=3, conv_size=6),
    "values window excluded": dict(conv_on="kv", window=5, window_exclude=True, kv_shared=True, conv_size=3),
    "unnormalised": dict(normalize=False, conv_on="qv"),
}
options = pytest.mark.parametrize("fields", OPTIONS.values(), ids=OPTIONS)


def layer(geometry: Geometry = GEOMETRY, **fields) -> LawcatMixer:
    """A mixer with every parameter redrawn, in fp64, its gates neither open nor shut."""
    mixer = randomise(LawcatMixer(LawcatConfig(**fields), geometry).double(), seed=3)
    with torch.no_grad():
        mixer.gate_up.weight *= 2
    return mixer


def loop(mixer: LawcatMixer, x: MixerInput) -> Tensor:
    """y [B, T, H, V] as the specification writes it: every head for itself, token by token, pair by pair."""
    config = mixer.config
    q, k = (x.q, x.k) if config.rope else (x.q_plain, x.k_plain)
    shared = 2 if config.kv_shared else 1  # query heads that have one row of parameters
    k, v, rotated = (t.repeat_interleave(2, 2) for t in (k, x.v, x.k))
    length = q.shape[1]

    def convolve(u: Tensor, name: str) -> Tensor:
        if config.conv_size is None or name not in config.conv_on:
            return u
        taps = getattr(mixer, "taps_k" if config.conv_tied and name == "q" else f"taps_{name}")
        taps = taps.repeat_interleave(4 // len(taps), 0)
        padded = torch.cat([torch.zeros_like(u[:, : config.conv_size]), u], 1)
        start = config.conv_size
        return sum(taps[..., i] * padded[:, start - i : start - i + length] for i in range(config.conv_size))

    def features(u: Tensor, map_: torch.nn.Module) -> Tensor:
        weight = map_.weight.repeat_interleave(4 // len(map_.weight), 0)
        a = torch.einsum("bthk,hkf->bthf", u, weight)
        return torch.cat([a.softmax(-1), (-a).softmax(-1)], -1).clamp(min=1e-12)

    assert mixer.map_k.weight.shape[0] == 4 // shared
    phi_q = features(convolve(q, "q"), mixer.map_k if config.tie_qk_map else mixer.map_q)
    phi_k = features(convolve(k, "k"), mixer.map_k)
    values = convolve(v, "v")
    a = x.hidden
    for linear in (mixer.gate_down, mixer.gate_up):
        a = a if linear is None else linear(a)
    log_decay = torch.nn.functional.logsigmoid(a.unflatten(-1, (2, -1)).repeat_interleave(2, 2)) / 16
    if config.clamp_log_decay is not None:
        log_decay = log_decay.clamp(min=config.clamp_log_decay)
    total = log_decay.cumsum(1)
    outputs = []
    for t in range(length):
        last = t + 1 - (config.window if config.window_exclude else 0)
        seen = slice(0, max(0, last))
        weights = torch.einsum(
            "bhf,bjhf,bjhf->bjh", phi_q[:, t], phi_k[:, seen], (total[:, t, None] - total[:, seen]).exp()
        )
        num, den = torch.einsum("bjh,bjhv->bhv", weights, values[:, seen]), weights.sum(1)[..., None]
        if not config.normalize:
            outputs.append(mixer.norm * num / (num.square().mean(-1, keepdim=True) + 1e-6).sqrt())
            continue
        if config.window is None:
            outputs.append(num / (den + 1e-10))
            continue
        near = slice(max(0, t + 1 - config.window), t + 1)
        scores = x.scale * torch.einsum("bhk,bjhk->bjh", x.q[:, t], rotated[:, near])
        exact = mixer.window_logit.sigmoid() * (scores - scores.amax(1, keepdim=True)).exp()
        num = num + torch.einsum("bjh,bjhv->bhv", exact, v[:, near])
        outputs.append(num / (den + exact.sum(1)[..., None]))
    return torch.stack(outputs, 1)


@options
def test_the_layer_is_the_loop_with_every_gradient(fields):
    x, mixer = random_input(100), layer(**fields)
    y, _ = mixer(x)
    expected = loop(mixer, x)
    assert_near(y, expected, "layer")
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    leaves = [x.q_plain, x.k_plain, x.v, *mixer.parameters()]
    found, wanted = (
        torch.autograd.grad((o * weights).sum(), leaves, retain_graph=True) for o in (y, expected)
    )
    for actual, gradient in zip(found, wanted, strict=True):
        assert_near(actual, gradient, "layer")


@options
@pytest.mark.parametrize("stops", [(1,), (2,), (3, 4), (15, 16, 17), (1, 2, 3, 60)])
@pytest.mark.parametrize("pending", [0, 9])
@torch.no_grad()
def test_any_split_carries_its_tails(fields, stops, pending):
    x, mixer = random_input(80), layer(**fields)
    expected, whole = mixer(x)
    state, outputs = None, []
    for part in split(x, *stops):
        y, state = mixer(part._replace(pending=pending), state)
        outputs.append(y)
    assert_near(torch.cat(outputs, 1), expected, "layer")
    assert int(state.folded.max()) == 80 - pending
    if not pending:
        assert_near(state.kv, whole.kv, "layer")


@pytest.mark.parametrize("fields", [{}, dict(window=8, window_exclude=True)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_decodes_what_it_computes(family, fields):
    assert_pieces_are_the_whole(family, LawcatConfig(**fields))


@options
@torch.no_grad()
def test_right_padding_leaves_the_state_alone(fields):
    x, mixer = random_input(60), layer(**fields)
    y, state = mixer(x._replace(lengths=torch.tensor([60, 2])))
    expected_y, expected = mixer(split(x, 2)[0])
    assert_near(y[1, :2], expected_y[1], "layer")
    assert_near(state.kv[1], expected.kv[1], "layer")


@pytest.mark.parametrize(
    "fields",
    [f for f in OPTIONS.values() if f.get("normalize", True) and "v" not in f.get("conv_on", "")],
    ids=str,
)
@torch.no_grad()
def test_constant_values_are_preserved(fields):
    """The weights of every output sum to one, the window's included."""
    x = random_input(70)
    x = x._replace(v=torch.full_like(x.v, -2.5))
    assert_near(
        layer(**fields)(x)[0], torch.full((2, 70, 4, 8), -2.5, dtype=torch.float64), "layer", torch.float32
    )


@pytest.mark.parametrize("fields", [{}, dict(kv_shared=True)], ids=str)
@torch.no_grad()
def test_without_a_window_positions_do_not_matter(fields):
    model, x = student("llama", LawcatConfig(**fields)), ids(2, 40)
    places = torch.arange(40)[None].expand(2, -1)
    assert_near(model(x, position_ids=places + 100).logits, model(x, position_ids=places).logits, "logits")


@torch.no_grad()
def test_the_convolution_starts_from_zeros():
    x, mixer = random_input(9), layer()
    zeros = {
        n: torch.cat([torch.zeros_like(getattr(x, n)[:, :3]), getattr(x, n)], 1)
        for n in ("q_plain", "k_plain")
    }
    for name in ("q", "k"):
        padded = mixer._convolve(zeros[f"{name}_plain"], name)
        again = mixer._convolve(
            torch.nn.functional.pad(getattr(x, f"{name}_plain"), (0, 0, 0, 0, 3, 0)), name
        )
        assert padded.shape[1] == 9 and torch.equal(padded, again)


@torch.no_grad()
def test_gates_of_one_and_a_bare_convolution_are_plain_linear_attention():
    x, mixer = random_input(100), layer()
    mixer.gate_up.bias.fill_(1e4)
    mixer.taps_q.zero_()[..., 0] = 1
    mixer.taps_k.zero_()[..., 0] = 1
    k = x.k_plain.repeat_interleave(2, 2)
    phi_q, phi_k = mixer.map_k(x.q_plain), mixer.map_k(k)
    plain = joint_quadratic(x.q, x.k, x.v, phi_q, phi_k, torch.ones(4), scale=1.0, window=None)
    assert_near(mixer(x)[0], plain, "layer", torch.float32)  # another eps


@pytest.mark.parametrize("fields", [{}, dict(window=9), dict(normalize=False)], ids=str)
@torch.no_grad()
def test_bare_taps_on_values_change_nothing(fields):
    x, plain, convolved = random_input(100), layer(**fields), layer(conv_on="qkv", **fields)
    convolved.load_state_dict(plain.state_dict(), strict=False)
    assert (convolved(x)[0] - plain(x)[0]).abs().max() > 0.1
    convolved.taps_v.zero_()[..., 0] = 1
    assert_near(convolved(x)[0], plain(x)[0], "layer")


@torch.no_grad()
def test_without_a_normaliser_outputs_have_the_size_of_the_norm():
    """Whatever the values' size; and there is one column less to remember."""
    x, mixer = random_input(70), layer(normalize=False)
    x = x._replace(v=100 * x.v)  # far above the epsilon
    y, state = mixer(x)
    assert_near((y / mixer.norm).square().mean(-1), torch.ones(2, 70, 4).double(), "layer", torch.float32)
    assert_near(mixer(x._replace(v=9 * x.v))[0], y, "layer", torch.float32)
    assert state.kv.shape == (2, 4, 8, 8)


@torch.no_grad()
def test_gates_of_zero_return_the_newest_value():
    x, mixer = random_input(100), layer(eps=1e-30)
    mixer.gate_up.bias.fill_(-1e6)
    assert_near(mixer(x)[0], x.v.repeat_interleave(2, 2), "layer", torch.float32)


@torch.no_grad()
def test_before_it_is_full_an_excluding_window_is_softmax():
    x, mixer = random_input(40), layer(window=16, window_exclude=True)
    softmax = window_quadratic(x.q, x.k, x.v, scale=x.scale, window=40)
    y = mixer(x)[0]
    assert_near(y[:, :16], softmax[:, :16], "layer")
    assert (y - softmax)[:, 16:].abs().flatten(2).amax((0, 2)).min() > 1e-4


@torch.no_grad()
def test_grouped_heads_are_explicit_repetition():
    """And ``kv_shared`` is the faithful model with equal taps and maps inside each group."""
    x = random_input(70)
    many = x._replace(**{n: getattr(x, n).repeat_interleave(2, 2) for n in ("k", "v", "k_plain")})
    for fields in ({}, dict(window=9)):
        shared, faithful = layer(kv_shared=True, **fields), layer(**fields)
        wide = layer(Geometry(4, 4, 8, 8, 32), **fields)
        for name, parameter in shared.named_parameters():
            per_group = name in ("taps_k", "map_k.weight")
            faithful.get_parameter(name).copy_(parameter.repeat_interleave(2, 0) if per_group else parameter)
        for name, parameter in faithful.named_parameters():
            if name.startswith("gate_up"):
                parameter = parameter.unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1)
            wide.get_parameter(name).copy_(parameter)
        y, state = shared(x)
        faithful_y, faithful_state = faithful(x)
        assert_near(y, faithful_y, "layer")
        assert_near(wide(many)[0], faithful_y, "layer")
        assert_near(state.kv.repeat_interleave(2, 1), faithful_state.kv, "layer")


@pytest.mark.parametrize("logit", [-40.0, 40.0])
@options
def test_extreme_gates_are_finite_forward_and_backward(fields, logit):
    x, mixer = random_input(2000, dtype=torch.float32), layer(**fields).float()
    with torch.no_grad():
        mixer.gate_up.bias.fill_(logit)
    y, state = mixer(x)
    gradients = torch.autograd.grad(y.square().sum(), [x.q_plain, x.k_plain, x.v, *mixer.parameters()])
    assert all(t.isfinite().all() for t in (y, state.kv, *gradients))


@torch.no_grad()
def test_a_long_decode_stays_finite_and_exact():
    """32,768 tokens at once, then one at a time, in fp32 beside fp64."""
    x = random_input(32_772, spread=1.0)
    x = x._replace(**{n: getattr(x, n)[:1] for n in ("hidden", "q", "k", "v", "q_plain", "k_plain")})
    start, *steps = split(x, *range(32_768, 32_772))
    ends = []
    for dtype in (torch.float64, torch.float32):
        mixer, state = layer().to(dtype), None
        for part in (start, *steps):
            cast = {n: getattr(part, n).to(dtype) for n in ("hidden", "q", "k", "v", "q_plain", "k_plain")}
            y, state = mixer(part._replace(**cast), state)
        ends.append(y)
    assert_near(ends[1], ends[0].float(), "layer")


def test_it_starts_as_the_paper_says():
    mixer = LawcatMixer(LawcatConfig(gate_bias=3.0), GEOMETRY)
    assert mixer.taps_q[..., 0].eq(1).all() and mixer.taps_k[..., 1:].eq(0.001).all()
    assert torch.equal(mixer.map_k.weight, torch.eye(8, 4).expand(4, -1, -1))
    assert mixer.gate_down.weight.shape == (16, 32) and mixer.gate_up.weight.shape == (16, 16)
    assert 0.003 < mixer.gate_up.weight.std() < 0.009
    assert mixer.gate_up.bias.eq(3).all()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.fill_(torch.nan)
    mixer.reset_parameters()
    assert all(p.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("start", ["delta", "xavier", "normal"])
def test_taps_start_as_asked(start):
    taps = LawcatMixer(LawcatConfig(conv_init=start, conv_older=0.0), GEOMETRY).taps_q
    assert taps.isfinite().all() and (taps[..., 1:].eq(0).all() == (start == "delta"))


def test_state_bytes_of_a_llama_3_2_1b_layer():
    """133,120 values of S and z, 7,680 of the tails with k stored per kv head."""
    geometry = Geometry(heads=32, kv_heads=8, key_dim=64, value_dim=64, hidden=2048)
    mixer = LawcatMixer(LawcatConfig(), geometry)
    state = mixer._start(random_like(geometry))
    assert state.kv.numel() == 133_120
    assert state.tail_q.numel() + state.tail_k.numel() == 7_680
    assert state.k.numel() == state.v.numel() == state.log_decay.numel() == 0


def random_like(geometry: Geometry) -> MixerInput:
    q, k, v = (
        torch.zeros(1, 1, heads, 64) for heads in (geometry.heads, geometry.kv_heads, geometry.kv_heads)
    )
    return MixerInput(torch.zeros(1, 1, geometry.hidden), q, k, v, 1.0, q_plain=q, k_plain=k)


def test_transfer_lowers_every_layers_error():
    model, x = student("llama", LawcatConfig(), dtype=torch.float32), ids(4, 40)
    for mixer in model.mixers().values():
        mixer.reset_parameters()
    optimiser = torch.optim.AdamW([p for m in model.mixers().values() for p in m.parameters()], lr=1e-2)
    history = []
    for _ in range(20):
        losses = []
        with attention_mode("transfer", record=lambda i, s, t, _: losses.append((s - t).square().mean())):  # noqa: B023
            model(x)
        optimiser.zero_grad()
        sum(losses).backward()
        optimiser.step()
        history.append(torch.stack(losses).detach())
    assert (history[-1] < 0.9 * history[0]).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(window=0), "window: 0 is impossible"),
        (dict(window_exclude=True), "window_exclude: there is no window"),
        (dict(conv_size=0), "conv_size: 0 is impossible"),
        (dict(gate_rank=0), "gate_rank: 0 is impossible"),
        (dict(gate_normalizer=0.0), "gate_normalizer"),
        (dict(clamp_log_decay=1.0), "clamp_log_decay"),
        (dict(feature_map="cosine"), "feature_map: 'cosine' is unknown"),
        (dict(feature_dim=7), "feature_dim: 7"),
        (dict(feature_dim=0), "feature_dim: 0"),
        (dict(gate_init_std=-1.0), "gate_init_std: -1"),
        (dict(conv_tied=True, conv_on="q"), "conv_tied"),
        (dict(conv_tied=True, kv_shared=True), "conv_tied"),
        (dict(normalize=False, window=8), "normalize: the window shares the denominator"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_in_one_line(fields, message):
    with pytest.raises(ConversionError, match=message) as error:
        convert(tiny(), LawcatConfig(**fields))
    assert "\n" not in str(error.value)


def test_what_conversion_adds():
    report = describe(convert(tiny("llama"), LawcatConfig()))[0]
    taps, maps, gate = 2 * 4 * 16 * 4, 4 * 16 * 8, 32 * 16 + 16 * 32 + 32
    assert report.parameters == taps + maps + gate
