"""The joint kernels through Triton's interpreter against the fp64 reference: outputs, every gradient, states."""

import pytest
import torch
from bounds import checked_accesses
from tolerances import assert_near

pytest.importorskip("triton")

from linearize.modeling import ops, triton_joint_sums
from linearize.modeling.feature_maps import Hedgehog
from linearize.modeling.mapped import mapped_composed, mapped_error_composed, mapped_refusal
from linearize.modeling.reference import joint_quadratic
from linearize.modeling.triton_mapped import mapped_error_kernel, mapped_kernel

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs tests/gpu/test_joint.py")


def case(batch=1, time=130, heads=2, groups=1, key=16, value=16, features=32, affine=False, seed=0):
    torch.manual_seed(seed)
    q, k, v = (
        torch.randn(batch, time, n, d).requires_grad_()
        for n, d in ((heads, key), (groups, key), (groups, value))
    )
    maps = [Hedgehog(heads, key, features, "kaiming") for _ in range(2)]
    g = (0.1 + 0.8 * torch.rand(heads)).requires_grad_()
    b = (0.2 + torch.rand(heads)).requires_grad_() if affine else None
    return (q, k, v), maps, (g, b)


def exactly(tensors, maps, factors):
    copies = []
    for m in maps:
        copies.append(Hedgehog(m.heads, m.weight.shape[1], m.feature_dim, "kaiming").double())
        copies[-1].weight.data.copy_(m.weight.data)
    tensors, factors = (
        [None if x is None else x.detach().double().requires_grad_() for x in group]
        for group in (tensors, factors)
    )
    return tensors, copies, factors


def parameters(tensors, maps, factors):
    return [*tensors, maps[0].weight, maps[1].weight, *(x for x in factors if x is not None)]


@pytest.mark.parametrize(
    ("window", "kind", "shape"),
    [
        (64, "sliding", dict(time=1)),
        (64, "terraced", dict(time=65, batch=2, affine=True)),
        (64, "sliding", dict(time=133, heads=4, groups=2)),
        (64, "terraced", dict(time=133, heads=2, groups=1)),
        (64, "terraced", dict(time=100, heads=2, key=10, value=6, features=12)),  # rows of no whole 16 bytes
        (37, "sliding", dict(time=140, heads=1, key=24, value=20, features=40, affine=True)),
        (37, "terraced", dict(time=140, heads=1, key=24, value=20, features=40, affine=True)),
        (100, "sliding", dict(time=203, heads=1)),
        (None, "sliding", dict(time=130, heads=2, groups=2)),
    ],
)
def test_outputs_and_every_gradient(window, kind, shape):
    given = case(**shape)
    exact = exactly(*given)
    terms = dict(scale=0.3, window=window, window_kind=kind)
    with checked_accesses():
        y, _ = mapped_kernel(*given[0], *given[1], *given[2], **terms)
        dy = torch.randn_like(y)
        found = torch.autograd.grad(y, parameters(*given), dy, allow_unused=True)
    tensors, maps, factors = exact
    phi = maps[0](tensors[0]), maps[1](tensors[1])
    expected = joint_quadratic(*tensors, *phi, *factors, **terms)
    assert_near(y, expected, "kernel")
    wished = torch.autograd.grad(expected, parameters(*exact), dy.double(), allow_unused=True)
    scale = max(float(x.norm()) for x in wished if x is not None)
    for one, other in zip(found[: 5 + 2 * bool(window)], wished, strict=False):
        if (
            other is None or float(other.norm()) < 1e-9 * scale
        ):  # inside the window maps and factors do nothing
            assert float(one.norm()) < 1e-5 * scale
        else:
            assert_near(one, other, "norm", torch.float32)


@pytest.mark.parametrize("kind", ["sliding", "terraced"])
def test_rows_that_are_cut_into_runs(kind, monkeypatch):
    """Long rows of a small batch: sums are scanned over runs of tiles, forward and backward."""
    monkeypatch.setattr(triton_joint_sums, "PROGRAMS", 10**6)
    given = case(time=390, heads=1)
    exact = exactly(*given)
    terms = dict(scale=0.3, window=64, window_kind=kind)
    with checked_accesses():
        y, _ = mapped_kernel(*given[0], *given[1], *given[2], **terms)
        dy = torch.randn_like(y)
        found = torch.autograd.grad(y, parameters(*given), dy)
    expected, _ = mapped_composed(*exact[0], *exact[1], *exact[2], **terms)
    assert_near(y, expected, "kernel")
    for one, other in zip(found, torch.autograd.grad(expected, parameters(*exact), dy.double()), strict=True):
        assert_near(one, other, "norm", torch.float32)


@pytest.mark.parametrize("kind", ["sliding", "terraced"])
def test_the_error_is_that_of_real_tokens_and_teaches_maps_and_factor(kind):
    given = case(batch=2, time=190, heads=2, affine=True)
    exact = exactly(*given)
    teacher, lengths = torch.randn_like(given[0][0]), torch.tensor([190, 101])
    terms = dict(scale=0.3, window=64, window_kind=kind, lengths=lengths)
    found, fits = [], []
    for operation, (tensors, maps, factors), target in (
        (mapped_error_kernel, given, teacher),
        (mapped_error_composed, exact, teacher.double()),
    ):
        fit = operation(*(x.detach() for x in tensors), *maps, *factors, teacher=target, **terms)
        found.append(torch.autograd.grad(3.0 * fit.error, [*(m.weight for m in maps), *factors]))
        fits.append(fit)
    assert_near(fits[0].error, fits[1].error, "kernel")
    assert_near(fits[0].power, fits[1].power, "kernel")
    for one, other in zip(*found, strict=True):
        assert_near(one, other, "norm", torch.float32)


@pytest.mark.parametrize("window", [None, 64])
@torch.no_grad()
def test_a_state_after_some_tokens_goes_on(window):
    (q, k, v), maps, (g, _) = case(batch=2, time=290)
    terms = dict(scale=0.3, window=window)
    whole, _ = mapped_kernel(q, k, v, *maps, g, **terms)
    stop = torch.tensor([192, 192])
    seen = 192 + (window or 0)
    _, state = mapped_kernel(*(x[:, :seen] for x in (q, k, v)), *maps, g, stop=stop, **terms)
    _, expected = mapped_composed(*(x[:, :seen] for x in (q, k, v)), *maps, g, stop=stop, **terms)
    for one, other in zip(state, expected, strict=True):
        assert_near(one, other, "kernel")
    rest, _ = mapped_kernel(*(x[:, 192:] for x in (q, k, v)), *maps, g, state=state, **terms)
    assert_near(rest[:, window or 0 :], whole[:, seen:], "kernel")


@torch.no_grad()
def test_rows_of_several_lengths_stop_where_they_end():
    (q, k, v), maps, (g, _) = case(batch=2, time=200)
    stop = torch.tensor([136, 30])  # what has left the window of rows of 200 and 94 tokens
    _, state = mapped_kernel(q, k, v, *maps, g, scale=0.3, window=64, stop=stop)
    _, expected = mapped_composed(q, k, v, *maps, g, scale=0.3, window=64, stop=stop)
    for one, other in zip(state, expected, strict=True):
        assert_near(one, other, "kernel")


def test_the_window_maximum_is_part_of_the_function():
    """A kernel that used the log-sum-exp in its place would compute another model."""
    (q, k, v), maps, (g, _) = case(time=200)
    q = q.detach() * 5
    y, _ = mapped_kernel(q, k, v, *maps, g, scale=1.0, window=64)
    phi = maps[0](q), maps[1](k)
    assert_near(y, joint_quadratic(q, k, v, *phi, g, scale=1.0, window=64), "kernel")
    scores = torch.einsum("bihk,bjk->bhij", q, k[:, :, 0])
    gap = torch.logsumexp(scores, -1) - scores.amax(-1)
    assert float(gap.detach().max()) > 0.1  # so that the difference would be seen


def test_what_is_not_fused_says_why():
    (_, k, v), maps, _ = case()
    assert mapped_refusal(k, v, *maps, None, None) is None
    assert "soft-cap" in mapped_refusal(k, v, *maps, 30.0, None)
    tied = Hedgehog(1, 16, 32, "kaiming")
    assert "kv_tied_map" in mapped_refusal(k, v, maps[0], tied, None, None)
    wide = [Hedgehog(2, 16, 256, "kaiming") for _ in range(2)]
    assert "256" in mapped_refusal(k, v, *wide, None, None)
    state = (torch.zeros(1, 2, 32, 16), torch.zeros(1, 2, 32))
    assert "state" in mapped_refusal(k, v, *maps, None, state)


def test_a_forward_that_keeps_a_state_still_has_gradients(monkeypatch):
    """As a model in training with its cache on: the kernels make states without gradients, and so do not run."""
    monkeypatch.setenv("LINEARIZE_INTERPRET", "1")
    (q, k, v), maps, (g, _) = case(time=80)
    stop = torch.tensor([16])
    y, _ = ops.mapped_attention(q, k, v, *maps, g, scale=0.3, window=64, stop=stop)
    assert ops.ran()["mapped_attention"] == "reference: a gradient may flow through the state"
    assert all(x is not None for x in torch.autograd.grad(y.sum(), [q, maps[0].weight]))
    with torch.no_grad():
        ops.mapped_attention(q, k, v, *maps, g, scale=0.3, window=64, stop=stop)
    assert ops.ran()["mapped_attention"] == "triton"
