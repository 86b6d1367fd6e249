"""The joint kernels on a GPU against the fp64 reference: outputs, every gradient, states, long and poisoned runs."""

import pytest
import torch
from tolerances import TOLERANCES

from linearize.modeling import backend
from linearize.modeling.feature_maps import Hedgehog
from linearize.modeling.ops import mapped_attention, mapped_error, ran

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HALF = (torch.bfloat16, torch.float16)


def near(found, expected, dtype):
    """By norms: single elements of half-precision sums lie about a rounding apart."""
    gap = (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    bound = {torch.float32: 2e-5}.get(dtype, TOLERANCES["norm"][torch.bfloat16])
    assert gap <= bound, f"differs by {gap:.3g} of its norm, {bound:.3g} is allowed"


def case(dtype, batch, time, heads, groups, key, value, features, affine=False, seed=0):
    torch.manual_seed(seed)
    q, k, v = (
        torch.randn(batch, time, n, d, device="cuda").to(dtype).requires_grad_()
        for n, d in ((heads, key), (groups, key), (groups, value))
    )
    maps = [Hedgehog(heads, key, features, "kaiming").cuda() for _ in range(2)]
    g = (0.1 + 0.8 * torch.rand(heads, device="cuda")).requires_grad_()
    b = (0.2 + torch.rand(heads, device="cuda")).requires_grad_() if affine else None
    return (q, k, v), maps, (g, b)


def exactly(tensors, maps, factors):
    """The same in fp64, maps included."""
    tensors = [x.detach().double().requires_grad_() for x in tensors]
    factors = [None if x is None else x.detach().double().requires_grad_() for x in factors]
    copies = []
    for m in maps:
        copy = Hedgehog(m.heads, m.weight.shape[1], m.feature_dim, "kaiming").cuda().double()
        copy.weight.data.copy_(m.weight.data)
        copies.append(copy)
    return tensors, copies, factors


def wanted(tensors, maps, factors, window):
    parameters = [m.weight for m in maps] + [x for x in factors if x is not None and window]
    return [*tensors, *parameters]


@pytest.mark.parametrize("kind", ["sliding", "terraced"])
@pytest.mark.parametrize(
    ("dtype", "time", "heads", "groups", "key", "value", "features", "window"),
    [
        (torch.bfloat16, 1, 4, 2, 128, 128, 128, 64),
        (torch.bfloat16, 63, 4, 4, 128, 128, 128, 64),
        (torch.bfloat16, 65, 8, 1, 128, 128, 128, 64),
        (torch.bfloat16, 500, 6, 2, 64, 64, 64, 64),
        (torch.bfloat16, 1000, 8, 2, 128, 128, 128, 64),
        (torch.bfloat16, 1000, 8, 2, 128, 128, 32, 37),
        (torch.bfloat16, 777, 3, 1, 96, 80, 64, 100),
        (torch.bfloat16, 1500, 4, 2, 128, 128, 128, 512),
        (torch.bfloat16, 700, 4, 2, 128, 128, 128, None),
        (torch.bfloat16, 4097, 4, 2, 128, 128, 128, 64),
        (torch.float16, 1000, 4, 2, 128, 128, 128, 64),
        (torch.bfloat16, 500, 4, 2, 32, 32, 32, 64),
        (torch.float32, 333, 4, 2, 64, 64, 64, 64),
        (torch.float32, 333, 4, 2, 128, 128, 128, None),
    ],
)
def test_outputs_and_every_gradient(dtype, time, heads, groups, key, value, features, window, kind):
    if window is None and kind == "terraced":
        pytest.skip("no window has no kind")
    given = case(dtype, 2, time, heads, groups, key, value, features, affine=time % 2 == 1)
    exact = exactly(*given)
    terms = dict(scale=key**-0.5, window=window, window_kind=kind)
    y, _ = mapped_attention(*given[0], *given[1], *given[2], **terms)
    assert ran()["mapped_attention"] == "triton"
    with backend.reference_only():
        expected, _ = mapped_attention(*exact[0], *exact[1], *exact[2], **terms)
    near(y, expected, dtype)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, wanted(*given, window), dy, allow_unused=True)
    wished = torch.autograd.grad(expected, wanted(*exact, window), dy.double(), allow_unused=True)
    scale = max(float(x.norm()) for x in wished if x is not None)
    for one, other in zip(found, wished, strict=True):
        if other is None or float(other.norm()) < 1e-6 * scale:  # inside the window the maps have no gradient
            assert one is None or float(one.norm()) < 1.5e-2 * scale
        else:
            near(one, other, dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ["sliding", "terraced"])
def test_the_error_and_its_gradients(dtype, kind):
    (q, k, v), maps, (g, _) = case(dtype, 3, 400, 8, 2, 128, 128, 128)
    q, k, v = (x.detach() for x in (q, k, v))
    teacher = torch.randn_like(q)
    lengths = torch.tensor([400, 77, 210], device="cuda")
    terms = dict(scale=0.1, window=64, window_kind=kind, lengths=lengths)
    parameters = [maps[0].weight, maps[1].weight, g]
    fit = mapped_error(q, k, v, *maps, g, teacher=teacher, **terms)
    assert ran()["mapped_error"] == "triton"
    found = torch.autograd.grad(3.0 * fit.error / fit.power, parameters)
    exact = [x.double() for x in (q, k, v)]
    with backend.reference_only():
        reference = mapped_error(*exact, *maps, g, teacher=teacher.double(), **terms)
    near(fit.error, reference.error, dtype)
    near(fit.power, reference.power, dtype)
    for one, other in zip(
        found, torch.autograd.grad(3.0 * reference.error / reference.power, parameters), strict=True
    ):
        near(one, other, dtype)


@pytest.mark.parametrize("window", [None, 64])
@torch.no_grad()
def test_the_state_after_some_tokens_goes_on(window):
    (q, k, v), maps, (g, _) = case(torch.bfloat16, 2, 3000, 4, 2, 128, 128, 128)
    terms = dict(scale=0.1, window=window)
    stop = torch.tensor([1792, 1792], device="cuda")
    whole, _ = mapped_attention(q, k, v, *maps, g, **terms)
    first = stop[0] + (window or 0)
    _, state = mapped_attention(*(x[:, :first] for x in (q, k, v)), *maps, g, stop=stop, **terms)
    with backend.reference_only():
        exact = mapped_attention(*(x[:, :first].double() for x in (q, k, v)), *maps, g, stop=stop, **terms)[1]
    near(state[0], exact[0], torch.bfloat16)
    near(state[1], exact[1], torch.bfloat16)
    rest, _ = mapped_attention(*(x[:, 1792:] for x in (q, k, v)), *maps, g, state=state, **terms)
    near(rest[:, window or 0 :], whole[:, first:], torch.bfloat16)


def test_gradients_are_the_same_in_every_run_and_read_nothing_unwritten():
    runs = []
    for _ in range(2):
        given = case(torch.bfloat16, 2, 2111, 8, 2, 128, 128, 128)
        poison = [torch.full((64, 2**20), float("nan"), device="cuda") for _ in range(8)]
        del poison  # what comes next is allocated there
        y, _ = mapped_attention(*given[0], *given[1], *given[2], scale=0.1, window=64)
        dy = torch.ones_like(y)
        runs.append([y, *torch.autograd.grad(y, wanted(*given, 64), dy)])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


def test_a_product_of_a_transposed_product_would_show_here():
    """Triton 3.4 to 3.7.0 compiles such a product wrongly on Hopper; gradients at many tiles are right on this one."""
    given = case(torch.bfloat16, 1, 1024, 4, 1, 128, 128, 128)
    exact = exactly(*given)
    y, _ = mapped_attention(*given[0], *given[1], *given[2], scale=0.1, window=64, window_kind="terraced")
    expected, _ = mapped_attention(
        *exact[0], *exact[1], *exact[2], scale=0.1, window=64, window_kind="terraced"
    )
    dy = torch.randn_like(y)
    for one, other in zip(
        torch.autograd.grad(y, wanted(*given, 64), dy),
        torch.autograd.grad(expected, wanted(*exact, 64), dy.double()),
        strict=True,
    ):
        near(one, other, torch.bfloat16)


@torch.no_grad()
def test_128k_tokens_stay_finite_and_right():
    (q, k, v), maps, (g, _) = case(torch.bfloat16, 1, 131_072, 4, 1, 128, 128, 128)
    y, _ = mapped_attention(q, k, v, *maps, g, scale=0.1, window=64)
    assert y.isfinite().all()
    with backend.reference_only():
        expected, _ = mapped_attention(q.float(), k.float(), v.float(), *maps, g, scale=0.1, window=64)
    near(y[:, -1000:], expected[:, -1000:], torch.bfloat16)
