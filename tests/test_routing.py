"""STILL's attention: three forms of one definition, what is exact, picked, evicted and conserved, and the score."""

import itertools

import pytest
import torch
from tolerances import assert_near
from torch.nn.functional import scaled_dot_product_attention

from linearize.modeling.feature_maps import FEATURE_MAPS
from linearize.modeling.reference import fold, joint_quadratic
from linearize.modeling.routing import (
    Kept,
    Past,
    picked_mask,
    route,
    routed_chunked,
    routed_quadratic,
    routed_recurrent,
    routing_masks,
    self_saliency,
    self_saliency_of,
)
from linearize.modeling.tiles import per_head

C, H, G, K, V, F, T = 4, 4, 2, 6, 5, 8, 31
LENGTHS = [1, 3, 4, 5, 8, 9, 12, 13, 31, 47]
SIZES = [None, 0, 1, 3]
HEADS = [(H, H), (G, H), (G, G)]  # that select, and that have a map of their own
MEANING = [routed_quadratic, routed_chunked]


def inputs(time=T, select=H, maps=H, *, gate=V, ties=False, seed=0):
    """q, k, v, phi_q, phi_k, score, and gates of a width (None for 0), in fp64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(2, time, *shape, generator=generator, dtype=torch.float64)

    qkv = normal(H, K), normal(G, K), normal(G, V)
    phi, score = (normal(H, F).abs() + 0.05, normal(maps, F).abs() + 0.05), normal(select)
    return [*qkv, *phi, score.round() if ties else score, normal(H, gate).sigmoid() if gate else None]


def cut(given, *ends):
    return [x if x is None else x[:, slice(*ends)] for x in given]


def terms(size=3, picks=2, **more):
    return dict(scale=0.7, chunk=C, picks=picks, size=size, softcap=2.0, eps=1e-3) | more


def beside(phi, select):
    """Features [B, n, Hs, F] in every head of their group, side by side: [B, n, Gs, R*F]."""
    return per_head(phi, H).unflatten(2, (select, -1)).flatten(3)


def of_maps(phi, maps):
    """The other way round."""
    return phi.unflatten(-1, (-1, F)).flatten(2, 3)[:, :, :: H // maps]


def hand_over(past, given, *, size, picks):
    """The past with one more chunk routed into it."""
    _, k, v, _, phi_k, score, _ = given
    select, maps = score.shape[2], phi_k.shape[2]
    v, phi = per_head(v, select), beside(phi_k, select)
    slots = past.kept.score.shape[1] + picks if size is None else size
    # Features travel with the values, so that those who leave have theirs.
    kept = past.kept._replace(v=torch.cat((past.kept.v, beside(past.phi, select)), -1))
    leaving = torch.full((2,), C)
    kept, left, loose = route(
        kept, k, torch.cat((v, phi), -1), score, leaving, chunk=C, picks=picks, size=slots
    )
    assert kept.score.shape[1] == slots
    sums = fold(past.kv, past.z, phi_k, v, loose)
    sums = fold(*sums, of_maps(left.v[..., V:], maps), left.v[..., :V], left.score > -torch.inf)
    return Past(kept._replace(v=kept.v[..., :V]), of_maps(kept.v[..., V:], maps), *sums)


def past_of(given, *, size=3, picks=2):
    """All of the given columns, whole chunks, routed one after the other."""
    select, maps, slots = given[5].shape[2], given[4].shape[2], size or 0
    zeros = given[0].new_zeros
    kept = Kept(zeros(2, slots, select, K), zeros(2, slots, select, V), zeros(2, slots, select) - torch.inf)
    past = Past(kept, zeros(2, slots, maps, F), zeros(2, maps, F, V), zeros(2, maps, F))
    for start in range(0, given[0].shape[1], C):
        past = hand_over(past, cut(given, start, start + C), size=size, picks=picks)
    return past


def by_steps(given, *, picks, size, chunk, **more):
    """The recurrent form from nothing, every earlier token in a slot; chunks are handed over as they leave."""
    past, outputs = past_of(cut(given, 0), size=size, picks=picks), []
    for t in range(given[0].shape[1]):
        if t % C == 0 and t >= 2 * C:
            past = hand_over(past, cut(given, t - 2 * C, t - C), size=size, picks=picks)
        q, _, _, phi_q, _, _, gate = cut(given, t, t + 1)
        _, k, v, *_ = cut(given, t + 1)
        place = dict(key_positions=torch.arange(t + 1).expand(2, -1), query_positions=torch.full((2, 1), t))
        outputs.append(
            routed_recurrent(q, k, v, phi_q, past.kept, past.kv, past.z, gate, **place, chunk=chunk, **more)
        )
    return torch.cat(outputs, 1)


@pytest.mark.parametrize(("select", "maps"), HEADS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("time", LENGTHS)
def test_quadratic_chunked_and_recurrent_are_one_function(time, size, select, maps):
    for gate, ties, picks in ((V, True, 2), (1, False, 1), (0, True, 3)):
        given = inputs(time, select, maps, gate=gate, ties=ties)
        expected = routed_quadratic(*given, **terms(size, picks))
        assert_near(routed_chunked(*given, **terms(size, picks)), expected, "kernel")
        assert_near(by_steps(given, **terms(size, picks)), expected, "kernel")


@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_long_texts_are_attended_in_parts(monkeypatch, tiles, size):
    monkeypatch.setattr("linearize.modeling.routing.TILES_AT_ONCE", tiles)
    given = inputs(47, G)
    assert_near(routed_chunked(*given, **terms(size)), routed_quadratic(*given, **terms(size)), "kernel")
    past, rest = past_of(cut(given, 2 * C), size=size), cut(given, 2 * C, None)
    y = routed_chunked(*rest, **terms(size), past=past)
    assert_near(y[:, C:], routed_quadratic(*given, **terms(size))[:, 3 * C :], "kernel")


@pytest.mark.parametrize(("select", "maps"), HEADS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("routed", [None, 1, 3], ids="past {}".format)
def test_gradients_are_those_of_the_definition(routed, size, select, maps):
    """And so is y, behind a past of so many chunks: they reach back through it."""
    given = inputs(T, select, maps, ties=True)
    leaves = [x.requires_grad_() for x in given]
    begin = 0 if routed is None else (routed + 1) * C  # the first query for which all of the past is past

    def chunked():
        if routed is None:
            return routed_chunked(*given, **terms(size))
        past = past_of(cut(given, routed * C), size=size)
        return routed_chunked(*cut(given, routed * C, None), **terms(size), past=past)[:, C:]

    found = []
    for y in (routed_quadratic(*given, **terms(size))[:, begin:], chunked()):
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
        found.append((y, torch.autograd.grad(loss, leaves, allow_unused=True)))
    (expected, slopes), (y, mine) = found
    assert_near(y, expected, "kernel")
    for name, ours, slope in zip(
        ("q", "k", "v", "phi_q", "phi_k", "score", "gate"), mine, slopes, strict=True
    ):
        if name == "score":
            assert ours is slope is None  # the selection is discrete
        else:
            assert slope.abs().max() > 1e-4, name
            assert_near(ours, slope, "kernel")


# What the definition says.


@pytest.mark.parametrize("attention", [*MEANING, by_steps])
@pytest.mark.parametrize(("time", "picks"), [(T, C), (2 * C, 0), (2 * C - 1, 1)])
def test_where_nothing_is_linear_it_is_softmax_attention(attention, time, picks):
    given = inputs(time)
    expected = scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in given[:3]), is_causal=True, scale=0.7, enable_gqa=True
    ).transpose(1, 2)
    given = (given,) if attention is by_steps else given
    assert_near(attention(*given, **terms(None, picks, softcap=None, eps=0.0)), expected, "kernel")


@pytest.mark.parametrize("attention", MEANING)
@pytest.mark.parametrize("size", [None, 3])
def test_without_its_exact_part_it_is_gated_linear_attention_of_old_chunks(attention, size):
    """Features so large that nothing else counts."""
    q, k, v, phi_q, phi_k, score, gate = inputs()
    y = attention(q, k, v, phi_q, 1e14 * phi_k, score, gate, **terms(size))
    *_, linear = routing_masks(score, chunk=C, picks=2, size=size)
    for t in range(2 * C, T):
        weights = torch.einsum("bhf,bjhf->bhj", phi_q[:, t], phi_k) * linear[:, :, t]
        expected = gate[:, t] * torch.einsum(
            "bhj,bjhv->bhv", weights / weights.sum(-1, keepdim=True), per_head(v, H)
        )
        assert_near(y[:, t], expected, "kernel")


@pytest.mark.parametrize("attention", MEANING)
def test_without_picks_and_gate_it_is_the_terrace_of_lolcats(attention):
    torch.manual_seed(0)
    q, k, v, *_, score, _ = inputs()
    phi = [FEATURE_MAPS["np_map"](H, K, F, "kaiming").double()(x) for x in (q, k)]
    given = dict(scale=0.7, softcap=2.0)
    expected = joint_quadratic(
        q, k, v, *phi, torch.ones(H), torch.ones(H), window=C, window_kind="terraced", **given
    )
    assert_near(attention(q, k, v, *phi, score, **terms(None, 0, eps=0.0)), expected, "kernel")


@pytest.mark.parametrize("attention", MEANING)
@pytest.mark.parametrize("size", SIZES)
def test_outputs_are_means_of_values(attention, size):
    """One-hot values give the weights: none is negative, they sum to one, and a gate of one changes nothing."""
    q, k, _, phi_q, phi_k, score, _ = inputs()
    v = torch.eye(T, dtype=q.dtype)[None, :, None].expand(2, -1, G, -1)
    weights = attention(q, k, v, phi_q, phi_k, score, **terms(size, eps=0.0))
    assert weights.min() >= 0
    assert_near(weights.sum(-1), torch.ones(2, T, H, dtype=q.dtype), "kernel")
    assert_near(weights.transpose(1, 2).triu(1), torch.zeros_like(weights.transpose(1, 2)), "kernel")
    gated = attention(q, k, v, phi_q, phi_k, score, torch.ones_like(q[..., :1]), **terms(size, eps=0.0))
    assert_near(gated, weights, "kernel")


@pytest.mark.parametrize("size", SIZES)
def test_local_kept_and_linear_part_the_causal_keys(size):
    score = inputs(ties=True)[5]
    local, kept, linear = routing_masks(score, chunk=C, picks=2, size=size)
    together = local.int() + kept.int() + linear.int()
    assert torch.equal(together, torch.ones(T, T, dtype=torch.int).tril().expand_as(together))
    for b, t, h in itertools.product(range(2), range(T), range(H)):
        past = max(0, (t // C - 1) * C)
        assert local[t].nonzero().flatten().tolist() == list(range(past, t + 1))

        def order(j, row=score[b, :, h]):
            return -row[j].item(), j

        picked = [j for at in range(0, past, C) for j in sorted(range(at, at + C), key=order)[:2]]
        assert set(kept[b, h, t].nonzero().flatten().tolist()) == set(sorted(picked, key=order)[:size])


def test_who_may_not_be_picked_turns_linear():
    given = inputs()
    given[5][:, 4:7] = -torch.inf
    mask = picked_mask(given[5].transpose(1, 2), chunk=C, picks=2)
    assert not mask[..., 4:7].any() and mask[..., 7].all() and mask[..., :4].sum(-1).eq(2).all()
    for size in SIZES:
        expected = routed_quadratic(*given, **terms(size))
        assert_near(routed_chunked(*given, **terms(size)), expected, "kernel")
        assert_near(by_steps(given, **terms(size)), expected, "kernel")


@pytest.mark.parametrize("size", SIZES)
def test_a_later_token_changes_nothing_before_it(size):
    given = inputs()
    before, masks = (
        routed_chunked(*given, **terms(size)),
        routing_masks(given[5], chunk=C, picks=2, size=size),
    )
    for length in (1, 2 * C, 21):
        assert_near(routed_chunked(*cut(given, length), **terms(size)), before[:, :length], "kernel")
    for x in given[:-1]:
        x[:, 21] += 9
    after, again = routed_chunked(*given, **terms(size)), routing_masks(given[5], chunk=C, picks=2, size=size)
    assert torch.equal(before[:, :21], after[:, :21]) and not torch.allclose(before[:, 21:], after[:, 21:])
    asked = (21 // C + 2) * C  # the first query in whose past the token is
    assert all(torch.equal(a[..., :asked, :], b[..., :asked, :]) for a, b in zip(masks, again, strict=True))


# What is handed over.


@pytest.mark.parametrize(("select", "maps"), HEADS)
@pytest.mark.parametrize("size", SIZES)
def test_whoever_is_not_kept_is_in_the_sums(size, select, maps):
    given = cut(inputs(32, select, maps, ties=True), 32)
    past, all_linear = past_of(given, size=size), past_of(given, size=0, picks=0)
    there = past.kept.score > -torch.inf
    sums = fold(past.kv, past.z, past.phi, past.kept.v, there)
    assert_near(sums[0], all_linear.kv, "kernel")
    assert_near(sums[1], all_linear.z, "kernel")
    assert there.sum(1).eq(16 if size is None else size).all()
    if size == 0:
        assert_near(past.kv, all_linear.kv, "kernel")
    else:
        assert not torch.allclose(past.kv, all_linear.kv)


@pytest.mark.parametrize("size", [None, 1, 3, 7])
def test_the_kept_set_is_the_best_of_all_picked(size):
    given = inputs(32, ties=True)
    given[2] = torch.arange(32.0)[None, :, None, None].expand(2, -1, G, V).double()
    kept, score = past_of(given, size=size).kept, given[5]
    picked = picked_mask(score.transpose(1, 2), chunk=C, picks=2)
    for b, h in itertools.product(range(2), range(H)):
        chosen = picked[b, h].nonzero().flatten().tolist()
        best = sorted(chosen, key=lambda j, row=score[b, :, h]: (-row[j].item(), j))[:size]
        assert kept.v[b, :, h, 0].long().tolist() == best
        assert torch.equal(kept.score[b, :, h], score[b, best, h])
        assert torch.equal(kept.k[b, :, h], given[1][b, best, h * G // H])


def test_rows_hand_over_as_much_as_has_left_them():
    """And what a row has not handed over, or has beyond its last chunk, is nowhere."""
    given, lengths = inputs(3 * C), (0, 2 * C)
    _, k, v, _, _, score, _ = given
    nothing = past_of(cut(given, 0)).kept
    best, left, loose = route(nothing, k, v, score, torch.tensor(lengths), chunk=C, picks=2, size=3)
    assert not loose[0].any() and (best.score[0] == -torch.inf).all() and (left.score[0] == -torch.inf).all()
    alone = route(
        nothing,
        k[:, : 2 * C],
        v[:, : 2 * C],
        score[:, : 2 * C],
        torch.tensor([2 * C] * 2),
        chunk=C,
        picks=2,
        size=3,
    )
    assert all(torch.equal(a[1], b[1]) for a, b in zip(best, alone[0], strict=True))
    assert torch.equal(loose[1, : 2 * C], alone[2][1]) and not loose[1, 2 * C :].any()
    assert (left.score[1] > -torch.inf).sum(0).eq(1).all()


# The score.


def share_of_own(q, k, *, softcap=None):
    """s [B, T, H]: the softmax weight that a query pays to its own token, over the last C tokens."""
    shares = torch.zeros(q.shape[:3], dtype=q.dtype)
    for b, t, h in itertools.product(*map(range, shares.shape)):
        scores = 0.7 * k[b, max(0, t - C + 1) : t + 1, h * G // H] @ q[b, t, h]
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        shares[b, t, h] = scores.softmax(0)[-1]
    return shares


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("time", LENGTHS)
def test_the_score_is_the_share_that_a_token_keeps_for_itself(time, softcap):
    q, k, *_ = inputs(time)
    rho = self_saliency(q, k, scale=0.7, window=C, softcap=softcap)
    assert_near(rho, share_of_own(q, k, softcap=softcap).log(), "kernel")
    assert not rho[:, 0].any() and rho.max() <= 0
    order = torch.randperm(time, generator=torch.Generator().manual_seed(0))
    for t in range(time):
        slots = torch.where(order <= t, order, -1).expand(2, -1)
        one = self_saliency_of(
            q[:, t : t + 1],
            k[:, order],
            key_positions=slots,
            query_positions=torch.full((2, 1), t),
            scale=0.7,
            window=C,
            softcap=softcap,
        )
        assert_near(one, rho[:, t : t + 1], "kernel")


def test_it_ranks_as_the_divergence_from_a_window_without_the_token():
    """Sum of a_j log((a_j + eps) / (a'_j + eps)), a' the softmax of the others."""
    q, k, *_ = inputs(40)
    shares, eps = share_of_own(q, k), 1e-9
    printed = torch.zeros_like(shares)
    for b, t, h in itertools.product(range(2), range(1, 40), range(H)):
        a = (0.7 * k[b, max(0, t - C + 1) : t + 1, h * G // H] @ q[b, t, h]).softmax(0)
        others = torch.cat((a[:-1] / a[:-1].sum(), a.new_zeros(1)))
        printed[b, t, h] = (a * ((a + eps) / (others + eps)).log()).sum()
    rho = self_saliency(q, k, scale=0.7, window=C)
    assert torch.equal(rho[:, 1:].argsort(1), printed[:, 1:].argsort(1))


def test_the_score_knows_nothing_that_comes_later_and_has_no_gradient():
    q, k, *_ = (x if x is None else x.requires_grad_() for x in inputs())
    before = self_saliency(q, k, scale=0.7, window=C)
    assert not before.requires_grad
    with torch.no_grad():
        q[:, 21] += 3
        k[:, 21] += 3
    after = self_saliency(q, k, scale=0.7, window=C)
    assert torch.equal(before[:, :21], after[:, :21]) and torch.equal(before[:, 21 + C :], after[:, 21 + C :])
    assert not torch.equal(before[:, 21], after[:, 21])


def test_a_share_too_small_for_its_type_can_still_be_picked():
    """Every token pays all its attention to the first; with all picked that is softmax attention none the less."""
    given = [x.float() for x in inputs(gate=V)]
    given[1][:, 0] = given[0][:, :, ::2].sum(1)
    given[0] = given[1].repeat_interleave(2, 2)[:, :1] * 3 + given[0]
    given[5] = self_saliency(*given[:2], scale=0.7, window=T)
    assert given[5].min() < -80 and given[5].isfinite().all()
    y = routed_chunked(*given, **terms(None, C, softcap=None, eps=0.0))
    expected = scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in given[:3]), is_causal=True, scale=0.7, enable_gqa=True
    )
    assert_near(y, expected.transpose(1, 2), "kernel")
