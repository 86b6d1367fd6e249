"""Kernels of gated linear attention on a GPU, against the fp64 reference."""

import pytest
import torch
from tolerances import assert_near
from torch import Tensor

from linearize.modeling import backend
from linearize.modeling.averaged import Averaged, averaged_composed
from linearize.modeling.convolved import convolved_composed
from linearize.modeling.ops import averaged_attention, convolved_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GLA = Averaged(128**-0.5, 64, False, 16.0)
HGRN2 = Averaged(128**-0.5, 64, True, 1.0)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def draw(batch, length, heads, groups, width, dtype, spread=1.0) -> list[Tensor]:
    """[q, k, v, q_plain, k_plain], rounded to ``dtype``, then in fp64."""
    generator = torch.Generator(device="cuda").manual_seed(length + heads)
    tensors = [
        torch.randn(batch, length, count, width, generator=generator, device="cuda")
        for count in (heads, groups, groups, heads, groups)
    ]
    tensors[4] *= spread
    return [x.to(dtype).double() for x in tensors]


def near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Of the whole tensor, in the norm; fp16 is held to what bf16 is, because gates are carried in it."""
    assert torch.isfinite(actual).all()
    assert_near(actual, expected, "norm", torch.float32 if dtype == torch.float32 else torch.bfloat16)


def check(inputs: list[Tensor], terms: Averaged, dtype: torch.dtype) -> None:
    exact = [x.clone().requires_grad_() for x in inputs]
    used = exact if terms.window else exact[2:]
    y, _ = averaged_composed(*exact, terms)
    dy = torch.randn(y.shape, device="cuda", generator=torch.Generator(device="cuda").manual_seed(1)).to(
        dtype
    )
    expected = torch.autograd.grad(y, used, dy.double())
    rounded = [x.to(dtype).requires_grad_() for x in inputs]
    made, _ = averaged_attention(*rounded, terms)
    rough = terms.hgrn2 and dtype != torch.float32  # which kernels do not compute closely enough
    assert backend.ran()["averaged_attention"].startswith("reference: hgrn2" if rough else "triton")
    near(made, y, dtype)
    found = torch.autograd.grad(made, rounded if terms.window else rounded[2:], dy)
    for gradient, truth in zip(found, expected, strict=True):
        near(gradient, truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("length", "heads", "groups"), [(1, 4, 4), (63, 4, 2), (65, 3, 1), (500, 8, 2), (257, 8, 1)]
)
def test_outputs_and_gradients(length, heads, groups, dtype):
    check(draw(2, length, heads, groups, 128, dtype), GLA, dtype)


@pytest.mark.parametrize("width", [64, 80])
@pytest.mark.parametrize("window", [0, 17, 64, 200])
def test_widths_and_windows(width, window):
    check(draw(1, 300, 4, 2, width, torch.bfloat16), GLA._replace(window=window), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("terms", "spread"), [(GLA, 30.0), (GLA, 400.0), (HGRN2, 1.0), (HGRN2, 30.0)])
def test_strong_gates(terms, spread, dtype):
    check(draw(1, 200, 4, 1, 128, dtype, spread), terms, dtype)


@pytest.mark.parametrize("length", [1000, 4097])
def test_longer(length):
    check(draw(1, length, 8, 2, 128, torch.bfloat16), GLA, torch.bfloat16)


def test_state():
    inputs = draw(2, 700, 4, 1, 128, torch.bfloat16)
    stop = torch.tensor([700, 333], device="cuda")
    _, expected = averaged_composed(*inputs, GLA, stop=stop)
    _, state = averaged_attention(*(x.bfloat16() for x in inputs), GLA, stop=stop)
    assert state.dtype == torch.float32
    near(state, expected, torch.bfloat16)


def test_twice_is_the_same_and_long_is_finite():
    inputs = [x.bfloat16().requires_grad_() for x in draw(1, 131072, 4, 1, 128, torch.bfloat16)]
    runs = []
    for _ in range(2):
        torch.full((2**28,), float("nan"), device="cuda")  # what the next call finds in memory
        y, _ = averaged_attention(*inputs, GLA)
        runs.append([y, *torch.autograd.grad(y, inputs, torch.ones_like(y))])
    for one, two in zip(*runs, strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, two)


def draw_lawcat(batch, length, heads, groups, width, dtype, spread=1.0) -> list[Tensor]:
    """[q, k, v, logits, taps, taps, map, map]: the first three rounded to ``dtype``, all in fp64."""
    generator = torch.Generator(device="cuda").manual_seed(length + heads)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    inputs = [random(batch, length, count, width).to(dtype) for count in (heads, groups, groups)]
    logits = spread * random(batch, length, groups, width)
    taps = [random(heads, width, 4) / 2 for _ in range(2)]
    weights = [(random(heads, width, width // 2) * width**-0.5).to(dtype) for _ in range(2)]
    return [x.double() for x in (*inputs, logits, *taps, *weights)]


def check_lawcat(inputs: list[Tensor], dtype: torch.dtype) -> None:
    exact = [x.clone().requires_grad_() for x in inputs]
    expected, _ = convolved_composed(*exact, steps=16.0, eps=1e-10)
    some = [x.to(dtype if i < 3 else torch.float32).requires_grad_() for i, x in enumerate(inputs)]
    y, _ = convolved_attention(*some, steps=16.0, eps=1e-10)
    assert backend.ran()["convolved_attention"] == "triton"
    near(y, expected, dtype)
    dy = torch.randn(y.shape, device="cuda", generator=torch.Generator(device="cuda").manual_seed(1)).to(
        dtype
    )
    wanted = torch.autograd.grad(expected, exact, dy.double())
    for gradient, truth in zip(torch.autograd.grad(y, some, dy), wanted, strict=True):
        near(gradient, truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "heads", "groups"), [(3, 4, 4), (63, 4, 2), (65, 3, 1), (1000, 8, 1)])
def test_lawcat(length, heads, groups, dtype):
    check_lawcat(draw_lawcat(2, length, heads, groups, 128, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lawcat_of_one_token(dtype):
    """Which is its value, whatever else there is: all other gradients are zero, and have no norm to be held to."""
    q, k, v, *others = draw_lawcat(2, 1, 4, 4, 128, dtype)
    y, _ = convolved_attention(
        *(x.to(dtype) for x in (q, k, v)), *(x.float() for x in others), steps=16.0, eps=1e-10
    )
    near(y, v, dtype)


@pytest.mark.parametrize("width", [64, 80])
def test_lawcat_widths(width):
    check_lawcat(draw_lawcat(1, 4097, 4, 2, width, torch.bfloat16), torch.bfloat16)


def test_lawcat_strong_gates():
    check_lawcat(draw_lawcat(1, 200, 4, 1, 128, torch.bfloat16, 60.0), torch.bfloat16)


def test_lawcat_state():
    inputs = draw_lawcat(2, 700, 4, 1, 128, torch.bfloat16)
    stop = torch.tensor([700, 333], device="cuda")
    _, expected = convolved_composed(*inputs, steps=16.0, eps=1e-10, stop=stop)
    some = [x.bfloat16() for x in inputs[:3]]
    with torch.no_grad():
        _, state = convolved_attention(
            *some, *(x.float() for x in inputs[3:]), steps=16.0, eps=1e-10, stop=stop
        )
    near(state, expected, torch.bfloat16)
