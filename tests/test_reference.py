"""Reference attention: chunked and recurrent are the quadratic meaning, and that is what the paper says."""

import itertools

import pytest
import torch
from tolerances import assert_near
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from linearize.modeling.reference import (
    fold,
    joint_chunked,
    joint_quadratic,
    joint_recurrent,
    window_chunked,
    window_mask,
    window_quadratic,
    window_recurrent,
)

LENGTHS = [1, 3, 63, 64, 65, 130, 257]
WINDOWS = [4, 16, 64, None]
KINDS = ["sliding", "terraced"]
HEADS = 4


def layer(
    length: int,
    groups: int = 2,
    *,
    tied: bool = False,
    state: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[list[Tensor], tuple[Tensor, Tensor] | None]:
    """[q, k, v, phi_q, phi_k, g, b] and a state, all leaves that ask for gradient."""
    generator = torch.Generator().manual_seed(seed)
    batch, key_dim, value_dim, features, state_heads = 2, 5, 6, 8, groups if tied else HEADS

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def positive(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype) + 0.05

    arguments = [
        normal(batch, length, HEADS, key_dim),
        normal(batch, length, groups, key_dim),
        normal(batch, length, groups, value_dim),
        positive(batch, length, HEADS, features),
        positive(batch, length, state_heads, features),
        positive(HEADS),
        positive(HEADS),
    ]
    sums = (
        (normal(batch, state_heads, features, value_dim), positive(batch, state_heads, features))
        if state
        else None
    )
    for leaf in (*arguments, *(sums or ())):
        leaf.requires_grad_()
    return arguments, sums


def terms(window: int | None = 16, kind: str = "sliding", **more) -> dict:
    return dict(scale=0.7, window=window, window_kind=kind, **more)


def outputs_and_gradients(attention, arguments: list[Tensor], leaves: list[Tensor], **kwargs) -> list[Tensor]:
    y = attention(*arguments, **kwargs)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        y.dtype
    )
    gradients = torch.autograd.grad((y * weights).sum(), leaves, allow_unused=True, materialize_grads=True)
    return [y, *gradients]


def assert_same(
    attention, other, arguments: list[Tensor], leaves: list[Tensor], kind: str = "kernel", **kwargs
) -> None:
    pairs = (outputs_and_gradients(f, arguments, leaves, **kwargs) for f in (attention, other))
    for actual, expected in zip(*pairs, strict=True):
        assert_near(actual, expected, kind)


# Chunked is quadratic, in outputs and every gradient.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_is_quadratic_at_odd_lengths(length, window, kind):
    """Grouped heads, a state from before, every gradient: q, k, v, phi_q, phi_k, g, b, S, z."""
    arguments, state = layer(length, state=True)
    leaves = [*arguments, *state]
    assert_same(joint_chunked, joint_quadratic, arguments, leaves, **terms(window, kind), state=state)


@pytest.mark.parametrize("tied", [False, True], ids=["map_per_head", "map_per_group"])
@pytest.mark.parametrize("state", [False, True], ids=["fresh", "continued"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_chunked_is_quadratic_for_grouped_heads(groups, kind, state, tied):
    for window, softcap in ((4, None), (16, 2.0), (100, None), (None, None)):
        arguments, sums = layer(150, groups, tied=tied, state=state)
        kwargs = terms(window, kind, softcap=softcap, state=sums)
        assert_same(joint_chunked, joint_quadratic, arguments, [*arguments, *(sums or ())], **kwargs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", WINDOWS)
def test_chunked_is_quadratic_in_fp32(window, kind):
    arguments, state = layer(257, state=True, dtype=torch.float32)
    actual = joint_chunked(*arguments, **terms(window, kind), state=state)
    assert_near(actual, joint_quadratic(*arguments, **terms(window, kind), state=state), "kernel")


@pytest.mark.parametrize("sinks", [0, 1, 5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_window_is_quadratic(length, kind, sinks):
    for groups, window, softcap in ((1, 4, None), (2, 16, 2.0), (4, 64, None)):
        (q, k, v, *_), _ = layer(length, groups)
        kwargs = terms(window, kind, softcap=softcap, sinks=sinks)
        assert_same(window_chunked, window_quadratic, [q, k, v], [q, k, v], **kwargs)


def test_gradient_flows_through_the_row_maximum():
    """The maximum is part of the function: finite differences of q see it, a detached maximum would not."""
    (q, k, v, phi_q, phi_k, g, b), _ = layer(9, 1)
    fixed = [x.detach() for x in (v, phi_q, phi_k, g, b)]
    for attention, kind in itertools.product((joint_quadratic, joint_chunked), KINDS):
        assert torch.autograd.gradcheck(lambda q, k: attention(q, k, *fixed, **terms(2, kind)), (q, k))  # noqa: B023


def test_strided_inputs_are_welcome():
    """Projections arrive as transposed views."""
    arguments, _ = layer(130)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else x for x in arguments]
    assert not views[0].is_contiguous()
    assert torch.equal(joint_chunked(*views, **terms()), joint_chunked(*arguments, **terms()))


@pytest.mark.parametrize("attention", [joint_quadratic, joint_chunked])
def test_half_precision_is_summed_in_fp32(attention):
    """bf16 in and out, autocast or not; only the last rounding is seen."""
    arguments, _ = layer(257, dtype=torch.bfloat16)
    expected = joint_quadratic(*(x.double() for x in arguments), **terms())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = attention(*arguments, **terms())
    outside = attention(*arguments, **terms())
    assert outside.dtype == torch.bfloat16
    assert torch.equal(inside, outside)
    assert (outside.double() - expected).abs().max() <= 2**-8 * expected.abs().max()


# Recurrent is quadratic, row by row.


@pytest.mark.parametrize("tied", [False, True], ids=["map_per_head", "map_per_group"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [3, 4, 8, None])
def test_steps_are_quadratic_at_any_slot_order(window, kind, tied):
    """Keys in shuffled slots among empty ones; those before a fold border, wherever it is, in the state."""
    length, groups = 21, 2
    arguments, before = layer(length, groups, tied=tied, state=True)
    q, k, v, phi_q, phi_k, g, b = (x.detach() for x in arguments)
    before = tuple(x.detach() for x in before)
    expected = joint_quadratic(q, k, v, phi_q, phi_k, g, b, **terms(window, kind, softcap=2.0), state=before)
    generator = torch.Generator().manual_seed(0)
    for t in range(length):
        first = (
            0 if not window else max(0, t - window + 1 if kind == "sliding" else (t // window - 1) * window)
        )
        for folded in {0, first // 2, first}:
            keep = torch.arange(length).expand(2, -1) < folded
            state = fold(*before, phi_k, v, keep)
            order = torch.randperm(
                length, generator=generator
            )  # later tokens and folded ones are empty slots
            positions = torch.where((order >= folded) & (order <= t), order, -1).expand(2, -1)
            y = joint_recurrent(
                q[:, [t]], k[:, order], v[:, order], phi_q[:, [t]],
                phi_k[:, order] if folded < first or not window else None, g, b,
                key_positions=positions, query_positions=torch.full((2, 1), t), state=state,
                **terms(window, kind, softcap=2.0),
            )  # fmt: skip
            assert_near(y, expected[:, [t]], "kernel")


@pytest.mark.parametrize("kind", KINDS)
def test_several_queries_of_rows_at_different_positions(kind):
    (q, k, v, phi_q, phi_k, g, b), _ = layer(19)
    expected = joint_quadratic(q, k, v, phi_q, phi_k, g, b, **terms(4, kind))
    picked = torch.tensor([[3, 9, 18], [0, 17, 5]])
    rows = torch.arange(2)[:, None]
    y = joint_recurrent(
        q[rows, picked], k, v, phi_q[rows, picked], phi_k, g, b,
        key_positions=torch.arange(19).expand(2, -1), query_positions=picked, **terms(4, kind),
    )  # fmt: skip
    assert_near(y, expected[rows, picked], "kernel")


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_window_steps_are_quadratic_at_any_slot_order(kind, sinks):
    (q, k, v, *_), _ = layer(21)
    expected = window_quadratic(q, k, v, **terms(4, kind, softcap=2.0, sinks=sinks))
    order = torch.randperm(21, generator=torch.Generator().manual_seed(0))
    for t in range(21):
        y = window_recurrent(
            q[:, [t]], k[:, order], v[:, order],
            key_positions=torch.where(order <= t, order, -1).expand(2, -1),
            query_positions=torch.full((2, 1), t), **terms(4, kind, softcap=2.0, sinks=sinks),
        )  # fmt: skip
        assert_near(y, expected[:, [t]], "kernel")


def test_a_row_without_slots_stays_finite():
    """A batch row that has not begun must not spoil the others."""
    (q, k, v, phi_q, phi_k, g, b), _ = layer(4)
    positions = torch.tensor([[-1, -1, -1, -1], [0, 1, 2, 3]])
    where = {"key_positions": positions, "query_positions": torch.full((2, 1), 3)}
    assert joint_recurrent(q[:, [3]], k, v, phi_q[:, [3]], phi_k, g, b, **where, **terms(2)).isfinite().all()
    assert window_recurrent(q[:, [3]], k, v, **where, **terms(2)).isfinite().all()


@pytest.mark.parametrize("tied", [False, True], ids=["map_per_head", "map_per_group"])
def test_fold_adds_exactly_the_kept_keys(tied):
    (_, _, v, _, phi_k, _, _), (kv, z) = layer(7, tied=tied, state=True)
    keep = torch.rand(2, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    poisoned = [x.detach().masked_fill(~keep[:, :, None, None], torch.nan) for x in (phi_k, v)]
    actual = fold(kv, z, *poisoned, keep)
    phi = phi_k * keep[:, :, None, None]
    values = v.repeat_interleave(phi.shape[2] // v.shape[2], dim=2)
    assert_near(actual[0], kv + torch.einsum("bnhf,bnhv->bhfv", phi, values), "kernel")
    assert_near(actual[1], z + phi.sum(dim=1), "kernel")


def test_the_state_of_bf16_keys_is_fp32():
    (_, _, v, _, phi_k, _, _), (kv, z) = layer(7, state=True, dtype=torch.bfloat16)
    kv, z = fold(kv.float(), z.float(), phi_k, v, torch.ones(2, 7, dtype=torch.bool))
    assert kv.dtype == z.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_gives_the_same_output(kind):
    """A chunk that begins on the window grid continues from the sum of what lies before its window."""
    (q, k, v, phi_q, phi_k, g, b), _ = layer(200)
    whole = joint_chunked(q, k, v, phi_q, phi_k, g, b, **terms(8, kind))
    for start, first in ((24, 16), (120, 112), (64, 40)):  # first new token, first key still at hand
        zero = (q.new_zeros(2, HEADS, 8, 6), q.new_zeros(2, HEADS, 8))
        state = fold(*zero, phi_k, v, torch.arange(200).expand(2, -1) < first)
        rest = (x[:, first:] for x in (q, k, v, phi_q, phi_k))
        y = joint_chunked(*rest, g, b, **terms(8, kind), state=state)
        assert_near(y[:, start - first :], whole[:, start:], "kernel")


# What the function is.

FORMS = [joint_quadratic, joint_chunked]


@pytest.mark.parametrize("attention", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_output_does_not_depend_on_what_follows(kind, attention):
    """Prefix consistency and causality: blocks start at the first token, and a later token is never read."""
    arguments, _ = layer(150)
    whole = attention(*arguments, **terms(16, kind))
    for n in (1, 15, 17, 63, 65, 149):
        prefix = [x[:, :n] if x.dim() == 4 else x for x in arguments]
        assert_near(attention(*prefix, **terms(16, kind)), whole[:, :n], "kernel")
        poisoned = [torch.cat((x[:, :n], x[:, n:] * -3 + 1), dim=1) if x.dim() == 4 else x for x in arguments]
        assert_near(attention(*poisoned, **terms(16, kind))[:, :n], whole[:, :n], "kernel")


@pytest.mark.parametrize("attention", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_while_nothing_is_linear_it_is_softmax(kind, attention):
    """T <= W sliding, T <= 2W terraced, whatever the maps and the factor."""
    length = 32 if kind == "sliding" else 64
    (q, k, v, *rest), _ = layer(length)
    y = attention(q, k, v, *rest, **terms(32, kind))
    heads = (x.transpose(1, 2) for x in (q, k, v))
    softmax = torch.nn.functional.scaled_dot_product_attention(
        *heads, is_causal=True, scale=0.7, enable_gqa=True
    )
    assert_near(y, softmax.transpose(1, 2), "kernel")


@pytest.mark.parametrize("attention", FORMS)
@pytest.mark.parametrize(("kind", "window"), [*itertools.product(KINDS, [4, 64, None])])
def test_rows_sum_to_one(kind, window, attention):
    """A constant value is returned unchanged, and no weight is negative."""
    (q, k, v, *rest), _ = layer(130)
    y = attention(q, k, torch.full_like(v, 2.5), *rest, **terms(window, kind))
    assert (y - 2.5).abs().max() <= 1e-10
    units = torch.eye(130, dtype=v.dtype)[None, :, None].expand(2, -1, 2, -1)
    assert attention(q, k, units, *rest, **terms(window, kind)).min() >= 0


@pytest.mark.parametrize("attention", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_added_to_a_row_of_scores_changes_nothing(kind, attention):
    """c_i is the window's own exact maximum; a further channel adds the constant, the maps held fixed."""
    (q, k, *rest), _ = layer(130)
    shift = torch.randn(2, 130, HEADS, 1, generator=torch.Generator().manual_seed(1), dtype=q.dtype) * 5
    y = attention(
        torch.cat((q, shift), dim=-1),
        torch.cat((k, torch.ones_like(k[..., :1])), dim=-1),
        *rest,
        **terms(16, kind),
    )
    assert_near(y, attention(q, k, *rest, **terms(16, kind)), "kernel")


@pytest.mark.parametrize("attention", FORMS)
def test_large_scores_do_not_overflow(attention):
    (q, k, *rest), _ = layer(130, dtype=torch.float32)
    y, *gradients = outputs_and_gradients(attention, [1e3 * q, k, *rest], [q, k, *rest], **terms(16))
    assert all(x.isfinite().all() for x in (y, *gradients))


@pytest.mark.parametrize("attention", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_grouped_heads_are_repeated_heads(kind, attention):
    (q, k, v, phi_q, phi_k, g, b), _ = layer(130, 2, tied=True)
    repeated = [x.repeat_interleave(2, dim=2) for x in (k, v, phi_k)]
    y = attention(q, repeated[0], repeated[1], phi_q, repeated[2], g, b, **terms(16, kind))
    for keys in (phi_k, repeated[2]):
        assert_near(attention(q, k, v, phi_q, keys, g, b, **terms(16, kind)), y, "kernel")


@pytest.mark.parametrize("attention", FORMS)
def test_without_a_window_it_is_linear_attention(attention):
    """num / (den + 1e-12) over all causal keys, the query's own included; None and 0 are the same."""
    (q, k, v, phi_q, phi_k, g, b), _ = layer(65, 4)
    weights = torch.einsum("bihf,bjhf->bhij", phi_q, phi_k).tril()
    expected = torch.einsum("bhij,bjhv->bihv", weights / (weights.sum(-1, keepdim=True) + 1e-12), v)
    for window in (None, 0):
        assert_near(attention(q, k, v, phi_q, phi_k, g, b, **terms(window)), expected, "kernel")


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("window", [1, 4, 16])
def test_windows_hold_as_many_keys_as_they_say(window, length):
    row = torch.arange(length)
    sliding, terraced = (window_mask(length, window, kind) for kind in KINDS)
    assert torch.equal(sliding[0].sum(-1), (row + 1).clamp(max=window))
    assert torch.equal(terraced[0].sum(-1), torch.where(row < window, row + 1, window + 1 + row % window))
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    for inside, outside in (sliding, terraced):
        assert torch.equal(inside ^ outside, causal)


def test_an_unknown_window_kind_is_refused():
    with pytest.raises(ValueError, match="window_kind='terrace': choose sliding or terraced"):
        window_mask(4, 2, "terrace")


# Linear time and memory.


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def largest(length: int, joint: bool, **kwargs) -> int:
    (q, k, v, *rest), _ = layer(length, 2, dtype=torch.float32)
    with LargestTensor() as mode:
        (
            joint_chunked(q, k, v, *rest, **kwargs) if joint else window_chunked(q, k, v, **kwargs)
        ).sum().backward()
    return mode.elements


LINEAR_CASES = [*itertools.product([True, False], KINDS, [4, 64]), (True, "sliding", None)]


@pytest.mark.parametrize(("joint", "kind", "window"), LINEAR_CASES)
def test_no_tensor_grows_faster_than_the_length(joint, kind, window):
    """Forward and backward at T = 4096; the largest tensor is a score tile a token, and doubles with T."""
    half, full = (largest(length, joint, **terms(window, kind)) for length in (2048, 4096))
    assert full <= 2.01 * half
    assert full < 4096 * 4096
    assert full <= 2 * HEADS * 4096 * 2 * 68  # B H T 2C
