"""Kernels of gated linear attention, interpreted: outputs, states and every gradient are the reference's."""

import pytest
import torch
from tolerances import assert_near
from torch import Tensor

pytest.importorskip("triton")

from linearize.modeling import triton_gated_lawcat, triton_gated_taps
from linearize.modeling.averaged import Averaged, averaged_composed
from linearize.modeling.convolved import convolved_composed
from linearize.modeling.launches import TABLE
from linearize.modeling.triton_gated import scan
from linearize.modeling.triton_gated_convolved import convolved_kernel
from linearize.modeling.triton_gated_liger import forward, shape_of
from linearize.modeling.triton_gated_liger_backward import averaged_kernel, backward
from linearize.modeling.triton_gated_mapped import half_logits, maps_launch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU, in tests/gpu")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that is not written holds NaN, and tiles and blocks are small."""
    empty, new_empty = torch.empty, Tensor.new_empty

    def fill(x: Tensor) -> Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(77)

    monkeypatch.setattr(torch, "empty", lambda *size, **more: fill(empty(*size, **more)))
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *size, **more: fill(new_empty(self, *size, **more)))
    for name, sizes in (("gated_liger_sums", {"C": 32}), ("gated_lawcat_states", {"C": 32, "CS": 64})):
        row = TABLE[name][0]
        monkeypatch.setitem(TABLE, name, [row._replace(blocks={**row.blocks, **sizes})])
    for name in ("gated_lawcat_maps", "gated_lawcat_maps_shared", "gated_lawcat_outputs"):
        row = TABLE[name][0]
        blocks = {key: 16 if key in ("BK", "FB") else size for key, size in row.blocks.items()}
        monkeypatch.setitem(TABLE, name, [row._replace(blocks=blocks)])
    monkeypatch.setattr(triton_gated_taps, "CHANNELS", 16)


def draw(batch, length, heads, groups, key_dim, value_dim, spread=1.0) -> list[Tensor]:
    """[q, k, v, q_plain, k_plain] in fp64; raw keys, which make the gates, times ``spread``."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(heads, key_dim), (groups, key_dim), (groups, value_dim), (heads, key_dim), (groups, key_dim)]
    tensors = [
        torch.randn(batch, length, *shape, generator=generator, dtype=torch.float64) for shape in shapes
    ]
    tensors[4] *= spread
    return tensors


GLA = Averaged(0.25, 20, False, 16.0, 0.3, 0.8, 0.4, 0.6)
HGRN2 = Averaged(0.25, 20, True, 1.0, 0.1, 1.0, 0.5, 0.5)
CASES = {
    "rows": (2, 33, 2, 1, 16, 16, 1.0, GLA),
    "two segments": (1, 67, 1, 1, 16, 16, 1.0, GLA),
    "groups of four": (1, 34, 4, 1, 16, 16, 1.0, GLA),
    "groups of two, wide values": (1, 35, 4, 2, 16, 24, 1.0, GLA),
    "no groups, odd widths": (1, 37, 2, 2, 24, 16, 1.0, GLA._replace(window=5)),
    "groups of three": (1, 33, 3, 1, 16, 16, 1.0, HGRN2),
    "one token": (1, 1, 2, 1, 16, 16, 1.0, GLA),
    "below a tile": (1, 31, 2, 1, 16, 16, 1.0, GLA._replace(window=64)),
    "a tile": (1, 32, 2, 1, 16, 16, 1.0, GLA),
    "a segment": (1, 64, 1, 1, 16, 16, 1.0, GLA._replace(window=1)),
    "no window": (1, 66, 1, 1, 16, 16, 1.0, GLA._replace(window=0)),
    "strong gates": (1, 67, 1, 1, 16, 16, 40.0, GLA),
    "fierce gates": (1, 40, 2, 1, 16, 16, 500.0, GLA),
    "hgrn2, strong gates": (1, 40, 2, 1, 16, 16, 20.0, HGRN2),
}


@pytest.mark.parametrize("name", CASES)
def test_liger_is_the_reference_with_every_gradient(name):
    *sizes, spread, terms = CASES[name]
    inputs = [x.requires_grad_() for x in draw(*sizes, spread)]
    used = inputs if terms.window else inputs[2:]
    y, _ = averaged_composed(*inputs, terms)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad(y, used, dy)
    exact = [x.detach().float() for x in inputs]
    made, _, before, strong = forward(*exact, terms)
    assert_near(made, y, "kernel")
    found = backward(*exact, before, strong, dy.float(), terms, shape_of(*exact[:3]))
    for gradient, truth in zip(found[-len(used) :], expected, strict=True):
        assert_near(gradient, truth, "kernel")


@pytest.mark.parametrize("stop", [[0, 67], [1, 32], [64, 63]])
@pytest.mark.parametrize("spread", [1.0, 500.0])
def test_liger_state_holds_the_tokens_before_stop(stop, spread):
    inputs = draw(2, 67, 2, 1, 16, 16, spread)
    stop = torch.tensor(stop)
    _, expected = averaged_composed(*inputs, GLA, stop=stop)
    _, state = averaged_kernel(*(x.float() for x in inputs), GLA, stop=stop)
    assert_near(state, expected, "kernel")


def test_liger_takes_strided_inputs():
    inputs = [x.float() for x in draw(1, 40, 4, 2, 16, 16)]
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    strided[2] = inputs[2].transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(averaged_kernel(*strided, GLA)[0], averaged_kernel(*inputs, GLA)[0])


def test_scan_starts_from_a_state():
    sums, totals = torch.randn(1, 2, 3, 16, 8), -torch.rand(1, 1, 3, 16)
    start = torch.randn(1, 2, 16, 8)
    states = scan(sums, totals, start=start)
    expected = start
    for n in range(3):
        assert_near(states[:, :, n], expected, "kernel")
        expected = expected * totals[:, :, n].exp()[..., None] + sums[:, :, n]
    assert_near(states[:, :, 3], expected, "kernel")


LAWCAT = {
    "rows": (2, 33, 1, 1, 16, 16, 16, 1.0),
    "two segments": (1, 67, 1, 1, 16, 16, 16, 1.0),
    "groups of two, narrow features, wide values": (1, 34, 4, 2, 16, 24, 8, 1.0),
    "no groups, odd widths": (1, 37, 2, 2, 24, 16, 12, 1.0),
    "two blocks of channels": (1, 33, 2, 1, 32, 16, 32, 1.0),
    "one token": (1, 1, 3, 1, 16, 16, 16, 1.0),
    "a tile": (1, 32, 2, 1, 16, 16, 16, 1.0),
    "a segment": (1, 64, 1, 1, 16, 16, 16, 1.0),
    "strong gates": (1, 37, 1, 1, 16, 16, 16, 100.0),
}


def draw_lawcat(batch, length, heads, groups, key_dim, value_dim, half, spread=1.0, taps="qk") -> list:
    """[q, k, v, logits, taps of q, taps of k, map of q, map of k] in fp64."""
    generator = torch.Generator().manual_seed(length)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    counts = (heads, key_dim), (groups, key_dim), (groups, value_dim), (groups, 2 * half)
    inputs = [random(batch, length, *count) for count in counts]
    inputs[3] *= spread
    inputs += [random(heads, key_dim, 4) if name in taps else None for name in "qk"]
    return [*inputs, *(random(heads, key_dim, half) / 2 for _ in range(2))]


def rounded(inputs: list) -> list:
    return [None if x is None else x.detach().float() for x in inputs]


def check_lawcat(inputs: list) -> None:
    """y, and every gradient."""
    exact = [None if x is None else x.requires_grad_() for x in inputs]
    some = [None if x is None else x.requires_grad_() for x in rounded(inputs)]
    expected, _ = convolved_composed(*exact, steps=16.0, eps=1e-10)
    made, _ = convolved_kernel(*some, steps=16.0, eps=1e-10)
    assert_near(made, expected, "kernel")
    dy = torch.randn(made.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, [x for x in exact if x is not None], dy)
    found = torch.autograd.grad(made, [x for x in some if x is not None], dy.float())
    for gradient, truth in zip(found, wanted, strict=True):
        assert_near(gradient, truth, "kernel")


@pytest.mark.parametrize("name", LAWCAT)
def test_lawcat_is_the_reference_with_every_gradient(name):
    check_lawcat(draw_lawcat(*LAWCAT[name]))


@pytest.mark.parametrize("taps", ["", "q", "k"])
def test_lawcat_convolves_what_has_taps(taps):
    check_lawcat(draw_lawcat(1, 33, 2, 1, 16, 16, 16, taps=taps))


@pytest.mark.parametrize("count", [0, 4])
def test_lawcat_maps_of_heads_that_share_an_input_are_those_of_heads_that_do_not(count):
    generator = torch.Generator().manual_seed(count)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, weight = random(2, 67, 2, 32).bfloat16(), random(8, 32, 12).bfloat16()
    taps = random(8, count, 32) if count else torch.empty(0)
    apart = x.repeat_interleave(4, dim=2)
    assert maps_launch(x, 8)[0] == 2
    assert maps_launch(apart, 8)[0] == 1
    for one, other in zip(half_logits(x, taps, weight), half_logits(apart, taps, weight), strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("stop", "programs"), [([0, 67], 256), ([1, 32], 256), ([64, 63], 256), ([64, 67], 1)]
)
def test_lawcat_state_holds_the_tokens_before_stop(stop, programs, monkeypatch):
    """Of a row cut into two, and of a whole one."""
    monkeypatch.setattr(triton_gated_lawcat, "PROGRAMS", programs)
    inputs, stop = draw_lawcat(2, 67, 2, 1, 16, 16, 16), torch.tensor(stop)
    _, expected = convolved_composed(*inputs, steps=16.0, eps=1e-10, stop=stop)
    _, state = convolved_kernel(*rounded(inputs), steps=16.0, eps=1e-10, stop=stop)
    assert_near(state, expected, "kernel")
