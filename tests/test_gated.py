"""Gated linear attention: chunked and recurrent are the quadratic meaning, at any length and any gate."""

import itertools

import pytest
import torch
from tolerances import assert_near
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from linearize.modeling.gated import (
    TILE,
    gated_chunked,
    gated_quadratic,
    gated_recurrent,
    joined_chunked,
    joined_quadratic,
    joined_recurrent,
)
from linearize.modeling.reference import joint_quadratic

FORMS = [gated_chunked, gated_recurrent]
HEADS, FEATURES, VALUES = 4, 6, 5
SIDES = [("key", None), ("key", 1e-10), ("value", None)]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(
    length: int,
    groups: int = 2,
    side: str = "key",
    eps: float | None = None,
    *,
    state: bool = False,
    sharpness: float = 3.0,
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
) -> tuple[list[Tensor], dict]:
    """[q, k, v, log_decay] and the keywords; features are positive, decays from nearly 1 to nearly 0."""
    width = FEATURES if side == "key" else VALUES
    q = draw(batch, length, HEADS, FEATURES, seed=0).abs()
    k = draw(batch, length, groups, FEATURES, seed=1).abs()
    v = draw(batch, length, groups, VALUES, seed=2)
    log_decay = torch.nn.functional.logsigmoid(sharpness * draw(batch, length, groups, width, seed=3))
    start = draw(batch, groups, FEATURES, VALUES + (eps is not None), seed=4).abs() if state else None
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v, log_decay)]
    start = None if start is None else start.to(dtype).requires_grad_()
    return leaves, dict(side=side, eps=eps, state=start)


def everything(form, arguments: list[Tensor], **kwargs) -> list[Tensor]:
    """y, the state, and the gradient of a random weighting of both in every argument and the first state."""
    y, state = form(*arguments, **kwargs)
    leaves = [*arguments, *([] if kwargs["state"] is None else [kwargs["state"]])]
    weighed = (y * draw(*y.shape, seed=5)).sum() + (state * draw(*state.shape, seed=6)).sum()
    return [y, state, *torch.autograd.grad(weighed, leaves)]


@pytest.mark.parametrize(("side", "eps"), SIDES)
@pytest.mark.parametrize("length", [1, 2, 3, 5, 17, 63, 64, 65, 130])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_quadratic_one_with_its_gradients(form, length, side, eps):
    for state in (False, True):
        arguments, kwargs = layer(length, side=side, eps=eps, state=state)
        expected = everything(gated_quadratic, arguments, **kwargs)
        for actual, wanted in zip(everything(form, arguments, **kwargs), expected, strict=True):
            assert_near(actual, wanted, "kernel")


@pytest.mark.parametrize(("side", "eps"), SIDES)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("form", [gated_quadratic, *FORMS])
def test_a_state_per_kv_head_is_that_of_each_of_its_repeated_heads(form, groups, side, eps):
    (q, k, v, log_decay), kwargs = layer(70, groups, side, eps, state=True)
    y, state = form(q, k, v, log_decay, **kwargs)

    def repeat(x, axis):
        return x.repeat_interleave(HEADS // groups, dim=axis)

    start = repeat(kwargs.pop("state"), 1)
    repeated_y, repeated = form(q, *(repeat(x, 2) for x in (k, v, log_decay)), **kwargs, state=start)
    assert_near(y, repeated_y, "kernel")
    assert_near(repeat(state, 1), repeated, "kernel")


@pytest.mark.parametrize("form", [gated_quadratic, *FORMS])
def test_values_and_decays_may_serve_several_states(form):
    (q, k, v, log_decay), _ = layer(70, HEADS)
    few_v, few_decay = v[:, :, :2], log_decay[:, :, :1]
    shared = form(q, k, few_v, few_decay)
    apart = form(q, k, few_v.repeat_interleave(2, 2), few_decay.expand(-1, -1, HEADS, -1))
    for actual, wanted in zip(shared, apart, strict=True):
        assert_near(actual, wanted, "kernel")


@pytest.mark.parametrize(("side", "eps"), SIDES)
@pytest.mark.parametrize("form", [gated_quadratic, *FORMS])
def test_any_split_gives_the_same_output_and_state(form, side, eps):
    arguments, kwargs = layer(130, side=side, eps=eps, state=True)
    y, state = form(*arguments, **kwargs)
    pieces, carried, start = [], kwargs.pop("state"), 0
    for stop in (1, 3, 64, 65, 130):
        piece, carried = form(*(x[:, start:stop] for x in arguments), **kwargs, state=carried)
        pieces.append(piece)
        start = stop
    assert_near(torch.cat(pieces, 1), y, "kernel")
    assert_near(carried, state, "kernel")


@pytest.mark.parametrize(("side", "eps"), SIDES)
@pytest.mark.parametrize("form", [gated_quadratic, *FORMS])
def test_what_follows_the_stop_stays_out_of_the_state_whatever_it_is(form, side, eps):
    arguments, kwargs = layer(70, side=side, eps=eps, state=True)
    stop = torch.tensor([0, 41])
    with torch.no_grad():
        expected = [
            form(
                *(x[i : i + 1, :n] for x in arguments), side=side, eps=eps, state=kwargs["state"][i : i + 1]
            )[1]
            if n
            else kwargs["state"][i : i + 1]
            for i, n in enumerate(stop.tolist())
        ]
        for x in arguments[1:]:
            for row, n in enumerate(stop.tolist()):
                x[row, n:] = 1e30
        _, state = form(*arguments, **kwargs, stop=stop)
    assert_near(state, torch.cat(expected), "kernel")


@pytest.mark.parametrize(("side", "eps"), SIDES)
@pytest.mark.parametrize("form", FORMS)
def test_fp32_stays_near_fp64(form, side, eps):
    arguments, kwargs = layer(257, side=side, eps=eps, dtype=torch.float32)
    exact = [x.double() for x in arguments]
    for actual, wanted in zip(form(*arguments, **kwargs), form(*exact, **kwargs), strict=True):
        assert_near(actual, wanted.float(), "kernel")


@pytest.mark.parametrize("logit", [-40.0, 40.0, "mixed"])
@pytest.mark.parametrize(("side", "eps"), SIDES)
def test_extreme_gates_are_finite_forward_and_backward(side, eps, logit):
    """A gate of -40 without a divisor: e^-2560 over a tile, whose inverse no format holds."""
    arguments, kwargs = layer(4096, side=side, eps=eps, dtype=torch.float32, batch=1)
    with torch.no_grad():
        signs = 40 * draw(*arguments[3].shape, seed=9).sign()
        logits = signs if logit == "mixed" else torch.full_like(signs, logit)
        arguments[3].copy_(torch.nn.functional.logsigmoid(logits))
    for tensor in everything(gated_chunked, arguments, **kwargs):
        assert tensor.isfinite().all()
    exact = [x.double() for x in arguments]
    assert_near(
        gated_chunked(*arguments, **kwargs)[0], gated_recurrent(*exact, **kwargs)[0].float(), "kernel"
    )


def test_gates_of_one_are_plain_linear_attention():
    (q, k, v, log_decay), _ = layer(130)
    none = torch.zeros_like(log_decay)
    y = gated_chunked(q, k, v, none, eps=1e-12)[0]
    plain = joint_quadratic(q, k, v, q, k, torch.ones(HEADS), scale=1.0, window=None)
    assert_near(y, plain, "kernel")


def test_gates_of_zero_keep_the_newest_token_only():
    (q, k, v, log_decay), _ = layer(130)
    y = gated_chunked(q, k, v, torch.full_like(log_decay, -1e4), eps=1e-30)[0]
    assert_near(y, v.repeat_interleave(HEADS // 2, 2), "kernel")


@pytest.mark.parametrize("form", [gated_quadratic, *FORMS])
def test_the_dtypes_are_the_values_and_fp32(form):
    arguments, _ = layer(9, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = form(*arguments)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    exact, _ = form(*(x.float() for x in arguments))
    assert_near(y, exact.bfloat16(), "kernel")


@pytest.mark.parametrize("form", [gated_quadratic, *FORMS])
def test_a_side_that_is_none_is_refused(form):
    arguments, _ = layer(3)
    for side, eps in (("both", None), ("value", 1e-10)):
        with pytest.raises(ValueError, match="choose key or value"):
            form(*arguments, side=side, eps=eps)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor made inside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("side", ["key", "value"])
def test_no_tensor_of_the_chunked_form_outgrows_the_length(side):
    sizes = {}
    for length in (4 * TILE, 16 * TILE):
        arguments, kwargs = layer(length, side=side, batch=1)
        with Largest() as largest:
            everything(gated_chunked, arguments, **kwargs)
        sizes[length] = largest.elements
    small, large = itertools.islice(sizes.values(), 2)
    assert large <= 4.1 * small


# A window joined with given sums.


def join_arguments(length: int, groups: int) -> list[Tensor]:
    q, k = draw(2, length, HEADS, 6, seed=0), draw(2, length, groups, 6, seed=1)
    v, sums = draw(2, length, groups, VALUES, seed=2), draw(2, length, HEADS, VALUES + 1, seed=3).abs()
    return [x.requires_grad_() for x in (q, k, v, sums, draw(HEADS, seed=4).abs())]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("length", "window"), [(1, 4), (7, 4), (63, 64), (130, 64), (150, 5)])
def test_joined_forms_are_the_quadratic_one(length, window, groups, softcap):
    arguments = join_arguments(length, groups)
    terms = dict(scale=0.7, window=window, softcap=softcap)
    position = torch.arange(length).expand(2, -1)
    slots = dict(key_positions=position, query_positions=position)
    outputs = [joined_quadratic(*arguments, **terms), joined_chunked(*arguments, **terms)]
    outputs.append(joined_recurrent(*arguments, **terms, **slots))
    weights = draw(*outputs[0].shape, seed=5)
    expected = [outputs[0], *torch.autograd.grad((outputs[0] * weights).sum(), arguments)]
    for y in outputs[1:]:
        for actual, wanted in zip(
            [y, *torch.autograd.grad((y * weights).sum(), arguments)], expected, strict=True
        ):
            assert_near(actual, wanted, "kernel")
