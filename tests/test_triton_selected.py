"""Kernels of kept and routed attention, in Triton's interpreter on a CPU: against the definitions, in fp64."""

import copy
import os

import pytest
import torch
from tolerances import assert_near

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton is not interpreted here", allow_module_level=True)

import triton
import triton.language as tl

from linearize.modeling import backend, triton_selected, triton_selected_states
from linearize.modeling import triton_selected_kept as kept
from linearize.modeling import triton_selected_kept_backward as kept_backward
from linearize.modeling.feature_maps import FEATURE_MAPS
from linearize.modeling.mixer import Geometry, MixerInput
from linearize.modeling.ops import routed_prefill
from linearize.modeling.routing import _routes, ranks_of
from linearize.modeling.routing import self_saliency as saliency_reference
from linearize.modeling.selection import GRID, kept_chunked, running_best
from linearize.modeling.selection import future_attention as future_reference
from linearize.modeling.still import StillConfig, StillMixer
from linearize.modeling.triton_common import to_grid
from linearize.modeling.triton_selected_future import future_attention, self_saliency
from linearize.modeling.triton_selected_maps import matrices

NEVER = 2**31 - 1


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that no kernel has written holds NaN, or a number that is no position."""
    empty = torch.empty

    def filled(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(-7)

    monkeypatch.setattr(torch, "empty", filled)
    monkeypatch.setattr(
        torch, "empty_like", lambda x, **kwargs: filled(x.shape, **{"dtype": x.dtype, **kwargs})
    )


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Segments and spans so short that small inputs have several."""
    monkeypatch.setattr(triton_selected, "CANDIDATES_A_SEGMENT", 32)
    monkeypatch.setattr(kept_backward, "SPANS", 2)
    monkeypatch.setattr(triton_selected_states, "PROGRAMS", 6)
    monkeypatch.setattr(triton_selected_states, "PIECE_BYTES", 60_000)
    monkeypatch.setenv("LINEARIZE_INTERPRET", "1")


def scores(time, *, batch=2, groups=2, ties=False, seed=0):
    torch.manual_seed(seed)
    score = torch.randn(batch, time, groups)
    if ties:
        score = score.mul(1.5).round()
    score[torch.rand_like(score) < 0.15] = -torch.inf
    score[:, 0] = torch.inf
    return score


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("time", "size"), [(1, 3), (33, 0), (33, 1), (100, 3), (135, 17), (135, 200)])
def test_kept_sets_are_those_of_the_loop_over_chunks(time, size, ties):
    score, chunk = scores(time, ties=ties), 16
    count = -(-time // chunk)
    sets = triton_selected.running_sets(score, chunk=chunk, size=size)
    expected = running_best(score.transpose(1, 2), 0, count=count, chunk=chunk, size=size)
    index = expected.index.masked_fill(expected.score == -torch.inf, -1)
    assert torch.equal(sets.index.long(), index)
    own = torch.arange(time) // chunk
    for c in range(count):
        inside = torch.zeros(2, 2, time + 1, dtype=torch.bool)
        inside.scatter_(2, index[:, :, c].where(index[:, :, c] >= 0, time), True)
        assert torch.equal(inside[..., :time], (own <= c - 2) & (sets.leave > c))


@pytest.mark.parametrize(("size", "picks"), [(0, 2), (1, 1), (5, 3), (17, 4), (100, 4)])
@pytest.mark.parametrize("time", [33, 50, 135])
def test_picked_tokens_turn_linear_as_the_loop_says(time, size, picks):
    score, chunk = scores(time, ties=picks == 3), 16
    count = -(-time // chunk)
    sets = triton_selected.running_sets(score, chunk=chunk, size=size, picks=picks, segment=3)
    expected, turning, turns = _routes(
        score.transpose(1, 2), 0, count=count, chunk=chunk, picks=picks, size=size
    )
    index = expected.index.masked_fill(expected.score == -torch.inf, -1)
    assert torch.equal(sets.index.long(), index)
    since = torch.full((2, 2, time + 1), NEVER)
    for c in range(count):
        since.scatter_(2, turning[:, :, c].where(turns[:, :, c], time), c)
    routed = max(0, count - 2) * chunk
    assert torch.equal(sets.leave[..., :routed].long(), since[..., :routed])


CALLS = [  # T, n, H, G, K, V, C
    (1, 3, 1, 1, 16, 16, 16),
    (33, 3, 2, 1, 16, 16, 16),
    (64, 0, 2, 2, 16, 16, 16),
    (101, 17, 4, 1, 16, 16, 16),
    (150, 40, 3, 1, 24, 40, 16),
    (170, 70, 2, 1, 16, 16, 32),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_kept_attention_and_its_gradients(call):
    time, size, heads, groups, key, value, chunk = call
    torch.manual_seed(time)
    given = [torch.randn(1, time, n, d) for n, d in ((heads, key), (groups, key), (groups, value))]
    score = scores(time, batch=1, groups=groups, ties=heads == 4)
    mine, theirs = (
        [x.to(dtype, copy=True).requires_grad_() for x in given] for dtype in (torch.float32, torch.float64)
    )
    y = kept.kept_attention(*mine, score, scale=0.3, chunk=chunk, size=size)
    expected = kept_chunked(*theirs, score.double(), scale=0.3, chunk=chunk, size=size)
    assert_near(y, expected, "kernel")
    dy = torch.randn(y.shape)
    found, wanted = torch.autograd.grad(y, mine, dy), torch.autograd.grad(expected, theirs, dy.double())
    for one, other in zip(found, wanted, strict=True):
        assert_near(one, other, "kernel", torch.float32)


@pytest.mark.parametrize(
    ("time", "heads", "groups", "chunk"), [(1, 2, 1, 16), (40, 2, 1, 16), (150, 3, 3, 32)]
)
def test_future_attention_and_self_saliency(time, heads, groups, chunk):
    torch.manual_seed(time)
    q, k = torch.randn(2, time, heads, 16), torch.randn(2, time, groups, 16)
    for lengths in (None, torch.tensor([time, max(1, time - 20)])):
        found = future_attention(q, k, scale=0.7, chunk=chunk, lengths=lengths)
        expected = future_reference(q.double(), k.double(), scale=0.7, chunk=chunk, lengths=lengths)
        assert_near(found, expected, "kernel")
    rho = self_saliency(q, k, scale=0.7, window=chunk)
    assert_near(rho, saliency_reference(q.double(), k.double(), scale=0.7, window=chunk), "kernel")
    for keep_first in (False, True):  # to the bit, ties to even included
        ranks = self_saliency(q, k, scale=0.7, window=chunk, rank=True, keep_first=keep_first)
        assert torch.equal(ranks[:, 1:], ranks_of(rho, heads)[:, 1:])
        assert (ranks[:, 0] == (torch.inf if keep_first else ranks_of(rho, heads)[:, 0])).all()


@triton.jit
def on_grid(x, y, STEPS: tl.constexpr):
    i = tl.arange(0, 16)
    tl.store(y + i, to_grid(tl.load(x + i), STEPS))


def test_scores_come_to_the_grid_as_torch_rounds_them():
    """Halves between two of its lines, which prefill and decode must send the same way, and what is far below 0."""
    score = torch.tensor([*(i / 2 for i in range(-9, 4)), -1e5 + 0.5, -0.49999997, -356_000.75]) * GRID
    made = torch.empty_like(score)
    on_grid[(1,)](score, made, STEPS=round(1 / GRID))
    assert torch.equal(made, (score / GRID).round() * GRID)


@torch.no_grad()
def test_matrices_of_two_maps_are_made_at_once():
    maps = [FEATURE_MAPS["np_map"](heads, 24, 40, "kaiming").to(torch.bfloat16) for heads in (4, 2)]
    for dtype in (torch.float32, torch.bfloat16):
        for made, one in zip(matrices(*maps, dtype), maps, strict=True):
            assert made.dtype == dtype
            assert_near(made, one.double().matrix(torch.float64), "kernel", dtype)


ROUTES = [  # T, n, p, H, G, heads that select, heads of the key map, gate, map
    (1, 4, 2, 1, 1, 1, 1, 0, "np_map"),
    (40, 4, 2, 2, 1, 2, 2, 16, "np_map"),
    (87, 5, 3, 4, 2, 2, 4, 16, "np_map_plain"),
    (39, 8, 0, 2, 1, 2, 2, 1, "hedgehog"),
    (71, 2, 1, 2, 1, 1, 1, 1, "np_map"),
    (37, 0, 2, 2, 2, 2, 2, 0, "hedgehog"),
]


@pytest.mark.parametrize("call", ROUTES, ids=str)
def test_routed_attention_and_its_gradients(call, monkeypatch):
    time, size, picks, heads, groups, select, mapped, gate, kind = call
    if time == 71:  # one run of chunks is the whole row
        monkeypatch.setattr(triton_selected_states, "PROGRAMS", 1)
        monkeypatch.setattr(triton_selected_states, "PIECE_BYTES", 1 << 30)
    torch.manual_seed(time)
    maps = [FEATURE_MAPS[kind](n, 16, 32, "kaiming") for n in (heads, mapped)]
    batch = 2 if time in (1, 40) else 1
    given = [torch.randn(batch, time, n, 16, requires_grad=True) for n in (heads, groups, groups)]
    score = scores(time, batch=batch, groups=select)
    gate = torch.rand(batch, time, heads, gate, requires_grad=True) if gate else None
    terms = dict(scale=0.3, chunk=16, picks=picks, size=size)
    y, sums = routed_prefill(*given, *maps, score, gate, **terms)
    assert backend.ran()["routed_prefill"] == "triton"
    exact = [None if x is None else x.detach().double() for x in (*given, score, gate)]
    twins = [copy.deepcopy(x).double() for x in maps]
    for x in (*exact[:3], *exact[4:]):
        if x is not None:
            x.requires_grad_()
    expected, none = routed_prefill(*exact[:3], *twins, *exact[3:], **terms)
    assert sums is not None and none is None
    assert_near(y, expected, "kernel")
    mine = [*given, *(x for m in maps for x in m.parameters()), *([] if gate is None else [gate])]
    theirs = [*exact[:3], *(x for m in twins for x in m.parameters()), *([] if gate is None else exact[4:])]
    dy = torch.randn(y.shape)
    found = torch.autograd.grad(y, mine, dy, materialize_grads=True)
    wanted = torch.autograd.grad(expected, theirs, dy.double(), materialize_grads=True)
    for one, other in zip(found, wanted, strict=True):
        assert_near(one, other, "kernel", torch.float32)


@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_a_prefill_of_still_ends_in_the_reference_s_state(shared):
    torch.manual_seed(3)
    config = StillConfig(chunk=16, salient_per_chunk=3, budget=7, share_selection=shared, kv_tied_map=shared)
    mixer = StillMixer(config, Geometry(4, 2, 16, 16, 12))
    x = MixerInput(
        torch.randn(3, 71, 12),
        *(torch.randn(3, 71, n, 16) for n in (4, 2, 2)),
        scale=0.3,
        lengths=torch.tensor([71, 53, 5]),
        use_cache=True,
    )
    y, state = mixer(x)
    assert backend.ran()["routed_prefill"] == "triton" == backend.ran()["self_saliency"]
    with backend.reference_only():
        expected, wanted = mixer(x)
    real = torch.arange(71) < x.lengths[:, None]
    assert_near(y[real], expected[real], "layer")
    for one, other in zip(state, wanted, strict=True):
        assert_near(one.nan_to_num(neginf=-1e3), other.nan_to_num(neginf=-1e3), "layer", torch.float32)
