"""Kernels of kept and routed attention on a GPU, against the references in fp64."""

import copy

import pytest
import torch
from tolerances import assert_near

from linearize.modeling import backend
from linearize.modeling.feature_maps import FEATURE_MAPS
from linearize.modeling.mixer import Geometry, MixerInput
from linearize.modeling.ops import future_attention, kept_attention, routed_prefill, self_saliency
from linearize.modeling.salient import SalientConfig, SalientMixer
from linearize.modeling.selection import GRID, running_best
from linearize.modeling.still import StillConfig, StillMixer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

HALF = [torch.bfloat16, torch.float16]
COARSE = {torch.float16: torch.bfloat16}  # whose tolerance stands for it


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", dtype=torch.float32, generator=generator).to(dtype)


def scores(batch, time, groups, seed=1):
    score = (random(batch, time, groups, seed=seed) / GRID).round() * GRID
    score[:, 0] = torch.inf
    return score


def qkv(batch, time, heads, groups, width=128, dtype=torch.bfloat16, seed=0):
    return [
        random(batch, time, n, width, dtype=dtype, seed=seed + i)
        for i, n in enumerate((heads, groups, groups))
    ]


def gradients(function, tensors, dy):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    y = function(*leaves)
    return y.detach(), torch.autograd.grad(y, leaves, dy.to(y.dtype))


def agree(function, tensors):
    """Kernel and fp64 reference, forward and every gradient."""
    dtype = COARSE.get(tensors[0].dtype, tensors[0].dtype)
    dy = random(*tensors[0].shape[:3], tensors[-1].shape[-1], dtype=tensors[0].dtype, seed=9)
    y, found = gradients(function, tensors, dy)
    with backend.reference_only():
        expected, wanted = gradients(function, [x.double() for x in tensors], dy)
    assert_near(y, expected, "kernel", dtype)
    for one, other in zip(found, wanted, strict=True):
        if other.norm() == 0:  # of q and k where a token sees itself alone
            assert one.norm() <= 1e-4 * dy.norm()
        else:
            assert_near(one, other, "norm", dtype)


@pytest.mark.parametrize(("time", "size"), [(1000, 64), (4097, 257), (8200, 1025)])
def test_kept_sets_are_exact(time, size):
    from linearize.modeling.triton_selected import running_sets

    score = scores(2, time, 2)
    sets = running_sets(score, chunk=64, size=size)
    expected = running_best(score.transpose(1, 2), 0, count=-(-time // 64), chunk=64, size=size)
    index = expected.index.masked_fill(expected.score == -torch.inf, -1)
    assert torch.equal(sets.index.long(), index)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize(("time", "heads", "groups", "width"), [
    (1, 2, 1, 128), (63, 2, 2, 64), (129, 4, 1, 128), (500, 8, 1, 64), (1000, 6, 2, 80), (4097, 4, 1, 128),
])  # fmt: skip
def test_kept_attention_and_its_gradients(time, heads, groups, width, dtype):
    score = scores(1, time, groups)

    def function(q, k, v):
        return kept_attention(q, k, v, score.to(q.dtype if q.dtype == torch.float64 else torch.float32),
                              scale=width**-0.5, chunk=64, size=257)  # fmt: skip

    agree(function, qkv(1, time, heads, groups, width, dtype))


def test_the_kernel_is_what_runs():
    q, k, v = qkv(1, 200, 4, 2)
    kept_attention(q, k, v, scores(1, 200, 2), scale=0.1, chunk=64, size=9)
    assert backend.ran()["kept_attention"] == "triton"


def test_two_runs_are_bitwise_equal():
    q, k, v = qkv(2, 3000, 8, 2)
    score, dy = scores(2, 3000, 2), random(2, 3000, 8, 128, dtype=torch.bfloat16)
    runs = [
        gradients(lambda *x: kept_attention(*x, score, scale=0.09, chunk=64, size=129), (q, k, v), dy)
        for _ in range(2)
    ]
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(*pair) for pair in zip(runs[0][1], runs[1][1], strict=True))


def test_unwritten_memory_does_not_matter(monkeypatch):
    q, k, v = qkv(1, 1500, 4, 2)
    score, dy = scores(1, 1500, 2), random(1, 1500, 4, 128, dtype=torch.bfloat16)

    def run():
        y, found = gradients(
            lambda *x: kept_attention(*x, score, scale=0.09, chunk=64, size=129), (q, k, v), dy
        )
        return y, *found

    clean, empty = run(), torch.empty

    def filled(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(-7)

    monkeypatch.setattr(torch, "empty", filled)
    assert all(torch.equal(*pair) for pair in zip(clean, run(), strict=True))


def test_a_hundred_thousand_tokens_are_finite():
    q, k, v = qkv(1, 131072, 4, 1)
    score = scores(1, 131072, 1)
    dy = torch.ones_like(q)
    y, found = gradients(lambda *x: kept_attention(*x, score, scale=0.09, chunk=64, size=257), (q, k, v), dy)
    assert all(x.isfinite().all() for x in (y, *found))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("time", "heads", "groups"), [(100, 2, 1), (1000, 8, 2), (2047, 3, 3)])
def test_future_attention_and_self_saliency(time, heads, groups, dtype):
    q, k, _ = qkv(2, time, heads, groups, dtype=dtype)
    lengths = torch.tensor([time, time - 70], device="cuda")
    found = future_attention(q, k, scale=0.09, chunk=64, lengths=lengths)
    rho = self_saliency(q, k, scale=0.09, window=64)
    with backend.reference_only():
        wanted = future_attention(q.double(), k.double(), scale=0.09, chunk=64, lengths=lengths)
        expected = self_saliency(q.double(), k.double(), scale=0.09, window=64)
    assert_near(found, wanted, "kernel", torch.bfloat16)
    assert_near(rho, expected, "kernel", torch.bfloat16)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize(("time", "heads", "groups", "select", "width", "kind", "size"), [
    (1, 2, 1, 2, 128, "np_map", 8), (129, 4, 2, 4, 64, "np_map", 3), (500, 6, 2, 2, 64, "hedgehog", 16),
    (1000, 4, 1, 4, 128, "np_map", 16), (4097, 2, 1, 2, 128, "np_map_plain", 100),
])  # fmt: skip
def test_routed_attention_and_its_gradients(time, heads, groups, select, width, kind, size, dtype):
    torch.manual_seed(0)
    maps = [FEATURE_MAPS[kind](heads, width, 2 * width, "kaiming").cuda() for _ in range(2)]
    score, gate = scores(1, time, select), random(1, time, heads, width).sigmoid().to(dtype)
    given, terms = (
        qkv(1, time, heads, groups, width, dtype),
        dict(scale=width**-0.5, chunk=64, picks=4, size=size),
    )
    dy = random(1, time, heads, width, dtype=dtype, seed=9)

    def run(kind):
        leaves = [x.detach().to(kind or x.dtype).requires_grad_() for x in (*given, gate)]
        twins = [copy.deepcopy(x).to(kind or torch.float32) for x in maps]
        y, sums = routed_prefill(*leaves[:3], *twins, score.to(kind or score.dtype), leaves[3], **terms)
        weights = [x for m in twins for x in m.parameters()]
        found = torch.autograd.grad(y, [*leaves, *weights], dy.to(y.dtype), materialize_grads=True)
        return y.detach(), found, sums

    y, found, sums = run(None)
    assert backend.ran()["routed_prefill"] == "triton" and sums is not None
    with backend.reference_only():
        expected, wanted, _ = run(torch.float64)
    assert_near(y, expected, "kernel", COARSE.get(dtype, dtype))
    for one, other in zip(found, wanted, strict=True):
        if (
            other.norm() > 1e-6 * dy.norm()
        ):  # nothing is linear in a short text, and nothing of it is zero exactly
            assert_near(one, other, "norm", COARSE.get(dtype, dtype))


@torch.no_grad()
def test_routed_attention_of_a_long_text_is_finite_and_repeats():
    torch.manual_seed(0)
    maps = [FEATURE_MAPS["np_map"](4, 128, 256, "kaiming").cuda() for _ in range(2)]
    score, given = scores(1, 131072, 4), qkv(1, 131072, 4, 1)
    terms = dict(scale=0.09, chunk=64, picks=4, size=256)
    one, other = (routed_prefill(*given, *maps, score, **terms) for _ in range(2))
    assert one[0].isfinite().all() and torch.equal(one[0], other[0])
    assert one[1].kept is None
    assert all(torch.equal(*pair) for pair in zip(one[1][1:], other[1][1:], strict=True))


def mixer_input(x, start, stop, **more):
    return MixerInput(**{name: value[:, start:stop] for name, value in x.items()}, scale=0.125, **more)


@pytest.mark.parametrize("method", ["salient", "still"])
@pytest.mark.parametrize("time", [200, 257])
def test_prefill_then_steps_are_one_pass(time, method):
    torch.manual_seed(0)
    geometry = Geometry(4, 2, 64, 64, 96)
    mixer = SalientMixer(SalientConfig(budget=32), geometry) if method == "salient" else None
    mixer = (mixer or StillMixer(StillConfig(budget=3), geometry)).cuda()
    q, k, v = qkv(1, time, 4, 2, 64)
    x = dict(hidden=random(1, time, 96, dtype=torch.bfloat16), q=q, k=k, v=v)
    with torch.no_grad():
        whole, _ = mixer(mixer_input(x, 0, time))
        part, state = mixer(mixer_input(x, 0, time - 70, use_cache=True))
        pieces = [part]
        for t in range(time - 70, time):
            y, state = mixer(mixer_input(x, t, t + 1, use_cache=True), state)
            pieces.append(y)
    assert_near(torch.cat(pieces, 1), whole, "kernel")


@torch.no_grad()
def test_sums_of_a_long_past_that_fp16_cannot_hold_are_averaged():
    q = torch.zeros(1, 256, 2, 16, dtype=torch.float16, device="cuda")
    q[..., 0] = 8
    v = torch.full((1, 256, 1, 16), 400.0, dtype=torch.float16, device="cuda")  # their sum is over 65,504
    maps = [FEATURE_MAPS["np_map"](2, 16, 32).cuda() for _ in range(2)]
    shape = dict(scale=0.25, chunk=16, picks=2, size=6)
    y, _ = routed_prefill(q, q[:, :, :1], v, *maps, torch.rand(1, 256, 2, device="cuda"), **shape)
    assert backend.ran()["routed_prefill"] == "triton"
    assert (y - 400).abs().max() <= 6
