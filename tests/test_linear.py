"""Linear attention alone: its formula, that it is LoLCATs without a window, and what its state holds."""

import pytest
import torch
from test_lolcats import GEOMETRY, T, inputs
from test_lolcats import mixer as lolcats
from tiny import randomise
from tolerances import assert_near

from linearize.modeling.errors import ConversionError
from linearize.modeling.feature_maps import FEATURE_MAPS
from linearize.modeling.linear import LinearConfig, LinearMixer
from linearize.modeling.mixer import Geometry
from linearize.modeling.tiles import PURE_LINEAR_EPS


def mixer(**fields) -> LinearMixer:
    return randomise(LinearMixer(LinearConfig(**fields), GEOMETRY), seed=3).double()


def written_out(made: LinearMixer, x) -> torch.Tensor:
    """The sum over all earlier keys, with a T x T matrix of weights."""
    groups = GEOMETRY.heads // made.state_heads
    phi_q, phi_k = made.map_q(x.q), made._map_k(x.k).repeat_interleave(groups, 2)
    weights = torch.einsum("bihf,bjhf->bhij", phi_q, phi_k).tril()
    weights = weights / (weights.sum(-1, keepdim=True) + PURE_LINEAR_EPS)
    return torch.einsum("bhij,bjhv->bihv", weights, x.v.repeat_interleave(2, 2))


@pytest.mark.parametrize("fields", [{}, dict(kv_tied_map=True), dict(tie_qk_map=True), dict(feature_dim=4)])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_the_mixer_is_its_formula(name, fields):
    """Gradients too, over more than two tiles."""
    made, x = mixer(feature_map=name, **fields), inputs(150)
    y, expected = made(x)[0], written_out(made, x)
    assert_near(y, expected, "kernel")
    parameters = list(made.parameters())
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=y.dtype)
    pairs = (torch.autograd.grad((out * weights).sum(), parameters) for out in (y, expected))
    for gradient, want in zip(*pairs, strict=True):
        assert_near(gradient, want, "kernel")


def test_weights_sum_to_one():
    x = inputs()
    assert_near(mixer()(x._replace(v=torch.ones_like(x.v)))[0], torch.ones(1, T, 4, 5).double(), "kernel")


@pytest.mark.parametrize("fields", [{}, dict(kv_tied_map=True), dict(feature_map="t2r", feature_dim=4)])
def test_it_is_lolcats_without_a_window(fields):
    made, other = mixer(**fields), lolcats(window=None, **fields)
    other.load_state_dict(made.state_dict(), strict=False)
    assert set(other.state_dict()) - set(made.state_dict()) == {"window_logit"}
    x = inputs(use_cache=True)
    (y, state), (expected, same) = made(x), other(x)
    assert torch.equal(y, expected)
    assert torch.equal(state.kv, same.kv) and torch.equal(state.z, same.z)


def test_a_window_over_everything_weighs_nothing_linearly():
    """LoLCATs is linear attention and softmax attention at its two ends."""
    x = inputs()
    scores = 0.4 * torch.einsum("bihk,bjhk->bhij", x.q, x.k.repeat_interleave(2, 2))
    scores = scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)
    exact = torch.einsum("bhij,bjhv->bihv", scores.softmax(-1), x.v.repeat_interleave(2, 2))
    assert_near(lolcats(window=T)(x)[0], exact, "layer")
    assert not torch.allclose(mixer()(x)[0], exact, atol=1e-2)


def test_the_state_is_two_sums_and_holds_tokens_only_while_they_may_be_dropped():
    made, x = mixer(), inputs(use_cache=True)
    state = made(x)[1]
    phi = made.map_k(x.k)
    assert_near(state.z, phi.sum(1), "kernel")
    assert_near(state.kv, torch.einsum("bjhf,bjhv->bhfv", phi, x.v.repeat_interleave(2, 2)), "kernel")
    assert state.k.shape[1] == 0 and int(state.folded) == T
    recording = made(x._replace(pending=7))[1]
    assert recording.k.shape[1] == 7 and int(recording.folded) == T - 7
    assert_near(recording.z, phi[:, :-7].sum(1), "kernel")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (dict(feature_map="rbf"), r"method\.feature_map: 'rbf' is unknown; choose from hedgehog"),
        (dict(feature_dim=5), r"method\.feature_dim: 5; this feature map needs an even width"),
        (dict(tie_qk_map=True, kv_tied_map=True), r"drop one of tie_qk_map, kv_tied_map"),
    ],
)
def test_what_no_layer_can_have_is_refused(fields, told):
    with pytest.raises(ConversionError, match=told):
        LinearConfig(**fields).check(Geometry(heads=4, kv_heads=2, key_dim=6, value_dim=5, hidden=16))
