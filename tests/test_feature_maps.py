"""Feature maps: what each computes, heads of a group, precision, and the widths that are refused."""

import pytest
import torch
from tolerances import assert_near
from torch import Tensor
from torch.nn.functional import elu

from linearize.modeling.errors import ConversionError
from linearize.modeling.feature_maps import FEATURE_MAPS

HEADS, KEY_DIM, WIDTH = 4, 6, 8


def random_map(name: str, heads: int = HEADS, width: int = WIDTH, dtype: torch.dtype = torch.float64):
    made = FEATURE_MAPS[name](heads, KEY_DIM, width, init="kaiming").to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


def inputs(heads: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 5, heads, KEY_DIM, generator=torch.Generator().manual_seed(1)).to(dtype)


def halves(a: Tensor) -> Tensor:
    return torch.cat((a.softmax(-1), (-a).softmax(-1)), dim=-1)


def reflected(x: Tensor, u: Tensor) -> Tensor:
    return x - 2 * u * (u @ x) / (u @ u)


def rescaled(a: Tensor, x: Tensor) -> Tensor:
    return a * x.norm() / a.norm()


MEANING = {
    "hedgehog": lambda x, phi, h: halves(x @ phi.weight[h]),
    "hedgehog_half": lambda x, phi, h: (x @ phi.weight[h]).softmax(-1),
    "t2r": lambda x, phi, h: torch.relu(x @ phi.weight[h] + phi.bias[h]),
    "elu": lambda x, phi, h: 1 + elu(x @ phi.weight[h]),
    "exp": lambda x, phi, h: torch.cat(
        [(s - s.max()).exp() for s in (x @ phi.weight[h], -x @ phi.weight[h])]
    ),
    "np_map": lambda x, phi, h: halves(rescaled(reflected(x, phi.reflect[h]) @ phi.weight[h], x)),
    "np_map_plain": lambda x, phi, h: halves(rescaled(x @ phi.weight[h], x)),
}
NORM_PRESERVED = ["np_map", "np_map_plain"]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_each_head_is_its_formula(name, groups):
    """One head and token at a time; map h reads kv head h // (H / G)."""
    phi, x = random_map(name), inputs(groups)
    actual = phi(x)
    assert actual.shape == (2, 5, HEADS, WIDTH)
    for batch, t, head in ((0, 0, 0), (1, 4, 3), (0, 2, 1), (1, 3, 2)):
        one = x[batch, t, head // (HEADS // groups)]
        assert_near(actual[batch, t, head], MEANING[name](one, phi, head), "kernel")


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_grouped_heads_are_repeated_heads_and_features_are_not_negative(name):
    phi, x = random_map(name), inputs(2)
    actual = phi(x)
    assert_near(actual, phi(x.repeat_interleave(2, dim=2)), "kernel")
    assert actual.min() >= 0


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_every_parameter_and_the_input_get_their_gradient(name):
    phi, x = random_map(name), inputs(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: phi(x), (x, *phi.parameters()))


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_features_are_fp32_or_higher(name):
    """Also inside autocast, which changes nothing."""
    x = inputs(2, torch.bfloat16)
    phi = random_map(name, dtype=torch.float32)
    expected = phi(x)
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(phi(x), expected)
    assert phi.to(torch.bfloat16)(x).dtype == torch.float32
    assert phi(x.double()).dtype == torch.float64


@pytest.mark.parametrize("name", ["hedgehog", *NORM_PRESERVED])
def test_both_halves_sum_to_one_and_never_vanish(name):
    phi = random_map(name)(inputs(2) * 100)
    assert_near(phi.unflatten(-1, (2, -1)).sum(-1), torch.ones(2, 5, HEADS, 2, dtype=torch.float64), "kernel")
    assert phi.min() >= 1e-12


@pytest.mark.parametrize("name", NORM_PRESERVED)
def test_the_size_of_the_weight_does_not_matter_and_the_size_of_the_input_does(name):
    phi, x = random_map(name), inputs(2)
    before = phi(x)
    with torch.no_grad():
        phi.weight.mul_(3)
    assert_near(phi(x), before, "kernel")
    assert not torch.allclose(phi(3 * x), before, atol=1e-2)
    uniform = torch.full_like(before, 2 / WIDTH)
    assert_near(phi(1e-12 * x), uniform, "kernel")
    assert_near(phi(0 * x), uniform, "kernel")


@pytest.mark.parametrize("name", NORM_PRESERVED)
@pytest.mark.parametrize("where", ["inputs", "weight", "reflect"])
def test_gradients_are_finite_at_zero(name, where):
    phi, x = random_map(name), inputs(2)
    if where == "inputs":
        x = torch.zeros_like(x)
    elif where == "weight" or name == "np_map":
        getattr(phi, where).data.zero_()
    x.requires_grad_()
    phi(x).square().sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in (x, *phi.parameters()))


def test_a_reflection_turns_the_input_and_keeps_its_norm():
    phi, x = random_map("np_map", width=2 * KEY_DIM), inputs(HEADS)
    with torch.no_grad():
        phi.weight.copy_(torch.eye(KEY_DIM))
    mirrored = torch.einsum("bthk,hkf->bthf", x, phi.matrix(torch.float64))
    explicit = torch.stack(
        [
            torch.stack([reflected(one, u) for one in x[:, :, h].flatten(0, 1)])
            for h, u in enumerate(phi.reflect)
        ]
    )
    assert_near(mirrored.flatten(0, 1).transpose(0, 1), explicit, "kernel")
    assert_near(mirrored.norm(dim=-1), x.norm(dim=-1), "kernel")
    assert not torch.allclose(mirrored, x, atol=0.1)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_identity_start_sees_the_first_channels(name):
    made = FEATURE_MAPS[name](HEADS, KEY_DIM, 4)
    assert torch.equal(made.weight, torch.eye(KEY_DIM, 4 // made.halves).expand(HEADS, -1, -1))
    assert made.weight.dtype == torch.float32


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_reset_brings_the_start_back(name):
    made = random_map(name, dtype=torch.float32)
    before = [parameter.clone() for parameter in made.parameters()]
    torch.manual_seed(5)
    made.reset_parameters()
    assert not any(map(torch.equal, before, made.parameters()))
    bound = 1.0  # (6 / K) ** 0.5
    assert made.weight.abs().max() <= bound
    assert made.weight.std() > 0.4 * bound
    assert not made.weight[0].equal(made.weight[1])
    if name == "t2r":
        assert not made.bias.any()


@pytest.mark.parametrize(
    ("name", "width", "init", "message"),
    [
        ("hedgehog", 7, "identity", "method.feature_dim: 7; this feature map needs an even width, .*; try 6"),
        ("exp", 1, "kaiming", "method.feature_dim: 1; .*; try 2"),
        ("elu", 0, "identity", "method.feature_dim: 0; this feature map needs a positive width; try 1"),
        (
            "hedgehog",
            14,
            "identity",
            "method.feature_dim: 14 is wider .*; use at most 12, or method.feature_init=kaiming",
        ),
        (
            "t2r",
            7,
            "identity",
            "method.feature_dim: 7 is wider .*; use at most 6, or method.feature_init=kaiming",
        ),
        ("t2r", 6, "zeros", "method.feature_init: 'zeros' is unknown; choose from identity, kaiming"),
    ],
)
def test_an_impossible_width_is_refused_with_a_remedy(name, width, init, message):
    with pytest.raises(ConversionError, match=message):
        FEATURE_MAPS[name](HEADS, KEY_DIM, width, init)
