"""LoLA's sparse cache: its definition token by token, what it keeps and conserves, the switch on a saved student."""

import itertools

import pytest
import torch
from tiny import ids, randomise, student, tiny
from tolerances import assert_near
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

import linearize
from linearize.convert import convert, describe
from linearize.modeling.errors import ConversionError, RecipeError
from linearize.modeling.feature_maps import FEATURE_MAPS
from linearize.modeling.lola import (
    Sparse,
    hand_over_all,
    recall_rank,
    sparse_by_definition,
    sparse_chunked,
)
from linearize.modeling.lolcats import LolcatsConfig, LolcatsMixer
from linearize.modeling.mixer import Geometry, MixerInput
from linearize.modeling.reference import joint_quadratic
from linearize.modeling.salient import SalientConfig

W, H, G, K, V, F = 4, 4, 2, 6, 5, 8
GEOMETRY = Geometry(heads=H, kv_heads=G, key_dim=K, value_dim=V, hidden=10)
LENGTHS = [1, 3, 4, 5, 8, 9, 12, 13, 31, 32, 47]


def inputs(time, *, batch=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(H, K), (G, K), (G, V)]
    return [
        torch.randn(batch, time, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in shapes
    ]


def maps(heads=H, name="hedgehog", seed=0):
    """Random feature maps of queries and of keys."""
    made = [FEATURE_MAPS[name](n, K, F) for n in (H, heads)]
    return [randomise(m, seed + i).double() for i, m in enumerate(made)]


def nothing(size, *, batch=2, heads=H, dtype=torch.float64):
    shapes = [(size, heads, K), (size, heads, V), (heads, F, V), (heads, F)]
    sums = torch.promote_types(dtype, torch.float32)
    parts = [torch.zeros(batch, *shape, dtype=dtype if i < 2 else sums) for i, shape in enumerate(shapes)]
    return Sparse(*parts, torch.zeros(batch, dtype=torch.long))


def mixer(dtype=torch.float64, **fields):
    fields = dict(window=W, window_kind="terraced", sparse_cache=5, feature_dim=F) | fields
    return randomise(LolcatsMixer(LolcatsConfig(**fields), GEOMETRY), seed=3).to(dtype)


def given(q, k, v, **fields):
    return MixerInput(q.new_zeros(*q.shape[:2], 10), q, k, v, scale=0.7, **fields)


@pytest.mark.parametrize(
    ("heads", "affine", "softcap"), [(H, False, None), (G, True, 2.0)], ids=["faithful", "tied"]
)
@pytest.mark.parametrize("size", [0, 1, 5, 100])
@pytest.mark.parametrize("time", LENGTHS)
def test_walking_by_blocks_is_the_definition(time, size, heads, affine, softcap):
    """Outputs, every gradient, and which pairs stay."""
    map_q, map_k = maps(heads)
    x = [t.requires_grad_() for t in inputs(time)]
    g = torch.tensor([0.1, 0.4, 0.5, 0.9], dtype=torch.float64).requires_grad_()
    factors = (g, 1 - g if affine else None)
    terms = dict(scale=0.7, window=W, softcap=softcap)
    leaves = [*x, g, map_q.weight, map_k.weight]
    weights = inputs(time, seed=5)[2].repeat_interleave(H // G, 2)

    y, memory = sparse_chunked(*x, map_q(x[0]), map_k, *factors, memory=nothing(size, heads=heads), **terms)
    expected, kept = sparse_by_definition(*x, map_q(x[0]), map_k, *factors, size=size, **terms)
    assert_near(y, expected, "kernel")
    for row, head in itertools.product(range(2), range(heads)):
        positions = kept[row][head]
        assert positions == sorted(positions) and len(positions) <= size
        own = x[1][row, positions, head // (heads // G)]
        assert torch.equal(memory.k[row, size - len(positions) :, head], own)
    gradients = torch.autograd.grad((y * weights).sum(), leaves, allow_unused=True)
    wanted = torch.autograd.grad((expected * weights).sum(), leaves, allow_unused=True)
    for leaf, *pair in zip(leaves, gradients, wanted, strict=True):
        assert_near(*(torch.zeros_like(leaf) if x is None else x for x in pair), "kernel")


def test_pairs_are_ranked_by_what_the_sums_recall_of_them():
    map_k, (_, k, v) = maps()[1], inputs(40)
    phi, v = map_k(k), v.repeat_interleave(H // G, 2)
    kv, z = torch.einsum("bthf,bthv->bhfv", phi[:, :30], v[:, :30]), phi[:, :30].sum(1)
    rank = recall_rank(kv, z, phi, v)
    for row, head in itertools.product(range(2), range(H)):
        errors = [
            ((phi[row, j, head] @ kv[row, head]) / (phi[row, j, head] @ z[row, head]) - v[row, j, head])
            .square()
            .sum()
            for j in range(40)
        ]
        assert torch.equal(torch.stack(errors).argsort(), rank[row, :, head].argsort())
    assert torch.isposinf(recall_rank(0 * kv, 0 * z, phi, v)).all()


def test_no_gradient_passes_through_the_choice():
    phi = torch.rand(1, 3, 1, F, requires_grad=True)
    rank = recall_rank(torch.rand(1, 1, F, V), torch.rand(1, 1, F), phi, torch.rand(1, 3, 1, V))
    assert not rank.requires_grad


def tagged(time, *, same=False):
    """Keys whose last channel is their position and does not reach their features."""
    _, k, v = inputs(time, batch=1)
    if same:
        k, v = k[:, :1].expand_as(k).clone(), v[:, :1].expand_as(v)
    k[..., -1] = torch.arange(time)[None, :, None]
    return k, v, lambda key: key[..., : K - 1].repeat_interleave(H // key.shape[2], 2).exp()


def cached(memory):
    """Positions in the cache of every head, by the tag."""
    filled = min(int(memory.count), memory.k.shape[1])
    return [set(memory.k[0, memory.k.shape[1] - filled :, head, -1].long().tolist()) for head in range(H)]


def memory_of(size):
    memory = nothing(size, batch=1)
    return memory._replace(kv=memory.kv[:, :, : K - 1], z=memory.z[..., : K - 1])


def test_among_equal_tokens_the_first_stay():
    k, v, features = tagged(40, same=True)
    for until in range(W, 40, W):
        leaving = torch.tensor([until])
        memory = hand_over_all(k, v, features, memory=memory_of(6), leaving=leaving, window=W)
        assert cached(memory) == [set(range(min(6, until)))] * H


def test_who_is_evicted_never_returns_and_all_stay_while_there_is_room():
    k, v, features = tagged(80)
    before, gone, moved = memory_of(7), [set() for _ in range(H)], 0
    for start in range(0, 80, W):
        block = slice(start, start + W)
        after = hand_over_all(
            k[:, block], v[:, block], features, memory=before, leaving=torch.tensor([W]), window=W
        )
        for head, (old, new) in enumerate(zip(cached(before), cached(after), strict=True)):
            candidates = old | set(range(start, start + W))
            assert new <= candidates and len(new) == min(7, len(candidates))
            gone[head] |= candidates - new
            assert not new & gone[head]
            moved += bool(old - new)
        before = after
    assert moved > H  # later pairs do replace earlier ones
    assert len({frozenset(kept) for kept in cached(before)}) > 1  # every head has its own choice


@pytest.mark.parametrize("kv_tied_map", [False, True])
def test_what_is_kept_and_what_is_summed_are_all_that_left(kv_tied_map):
    made, (q, k, v) = mixer(kv_tied_map=kv_tied_map), inputs(43)
    _, state = made(given(q, k, v, use_cache=True, lengths=torch.tensor([43, 17])))
    heads = made.state_heads
    assert state.folded.tolist() == [36, 12]
    phi, value = made.map_k(k), v.repeat_interleave(heads // G, 2)
    kept, kept_v = made.map_k(state.kept_k), state.kept_v
    for row, left in enumerate(state.folded.tolist()):
        total = torch.einsum("thf,thv->hfv", phi[row, :left], value[row, :left])
        exact = torch.einsum("thf,thv->hfv", kept[row], kept_v[row])
        assert_near(state.kv[row] + exact, total, "kernel")
        assert_near(state.z[row] + kept[row].sum(0), phi[row, :left].sum(0), "kernel")


@pytest.mark.parametrize("fields", [{}, dict(kv_tied_map=True), dict(affine_factors=True)])
def test_a_cache_for_everything_is_softmax(fields):
    """All under one normaliser: where nothing is summed the window factor cancels."""
    q, k, v = inputs(43)
    made = mixer(sparse_cache=64, **fields)
    y = made(given(q, k, v))[0]
    exact = scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, scale=0.7, enable_gqa=True
    )
    assert_near(y, exact.transpose(1, 2), "layer")
    assert not torch.allclose(mixer(sparse_cache=30, **fields)(given(q, k, v))[0], exact.transpose(1, 2))


def test_without_room_it_is_lolcats():
    q, k, v = inputs(43)
    map_q, map_k = maps()
    phi_q, g = map_q(q), torch.tensor([0.1, 0.4, 0.5, 0.9], dtype=torch.float64)
    terms = dict(scale=0.7, window=W, softcap=None)
    y, memory = sparse_chunked(q, k, v, phi_q, map_k, g, memory=nothing(0), **terms)
    expected = joint_quadratic(q, k, v, phi_q, map_k(k), g, window_kind="terraced", **terms)
    assert_near(y, expected, "kernel")
    assert memory.k.shape[1] == 0
    plain, zero = (mixer(sparse_cache=n)(given(q, k, v))[0] for n in (None, 0))
    assert torch.equal(plain, zero)
    assert not torch.allclose(mixer(sparse_cache=3)(given(q, k, v))[0], plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_split_keeps_the_same_pairs_to_the_last_bit(dtype):
    """Not only nearly: another choice of pairs would be no rounding error."""
    made, x, states = mixer(torch.float32), inputs(90, dtype=dtype), []
    for pieces in ([90], [1] * 90, [7, 1, 40, 1, 1, 40], [50, 40]):
        state, start = None, 0
        for piece in pieces:
            part = (t[:, start : start + piece] for t in x)
            with torch.no_grad():
                _, state = made(given(*part, use_cache=True), state)
            start += piece
        states.append(state)
    for state in states[1:]:
        for name in ("kept_k", "kept_v", "kv", "z"):
            assert torch.equal(getattr(state, name), getattr(states[0], name)), name


def test_what_was_taken_back_was_never_cached():
    """Droppable tokens are ranked for the query alone; the memory has final blocks only."""
    made, x = mixer(), inputs(60)
    with torch.no_grad():
        expected = made(given(*x))[0]
        _, state = made(given(*(t[:, :30] for t in x), use_cache=True, pending=16))
        assert int(state.folded[0]) == 8  # one recorded or not, position 13 is the newest that must stay
        wrong = [t.flip(0) * 3 for t in inputs(16, seed=9)]
        for piece in (slice(0, 1), slice(1, 15), slice(15, 16)):
            _, state = made(given(*(t[:, piece] for t in wrong), use_cache=True, pending=16), state)
        state = state._replace(seen=state.seen - 16)
        outputs = []
        for piece in [*(slice(t, t + 1) for t in range(30, 50)), slice(50, 60)]:
            y, state = made(given(*(t[:, piece] for t in x), use_cache=True, pending=16), state)
            outputs.append(y)
    assert_near(torch.cat(outputs, 1), expected[:, 30:], "kernel")


def test_a_pair_that_the_sums_cannot_recall_is_found_again():
    """A needle among alike values, four hundred tokens later, where the exact part has nearly all the weight."""
    q, k, v = inputs(400)
    k, v = 0.3 * k, 0.1 * v
    k[:, 20], v[:, 20] = 4.0, 2.0
    q[:, -1] = 4.0

    def answer(size):
        made = mixer(sparse_cache=size, affine_factors=True)
        with torch.no_grad():
            made.window_logit.fill_(12.0)
            return made(given(q, k, v))[0][:, -1]

    assert (answer(5) - 2.0).abs().max() < 0.1
    assert (answer(None) - 2.0).abs().min() > 1.0


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (dict(sparse_cache=-1), r"method\.sparse_cache: -1 is impossible; give 0 or more"),
        (dict(sparse_cache=8, window_kind="sliding"), r"set method\.window_kind=terraced"),
        (dict(sparse_cache=8, window=None), r"give method\.window a length"),
    ],
)
def test_what_cannot_be_is_refused(fields, told):
    with pytest.raises(ConversionError, match=told):
        LolcatsConfig(**fields).check()


# The switch.

PLAIN = LolcatsConfig(window=4)
SPARSE = LolcatsConfig(window=4, sparse_cache=6)


@torch.no_grad()
def test_a_saved_student_takes_a_cache_without_training(tmp_path):
    """Set on the model, or in the configuration that plain transformers reads; it survives saving."""
    x = ids(2, 40)
    expected, before = (student("llama", c, dtype=torch.float32)(x).logits for c in (SPARSE, PLAIN))
    assert not torch.allclose(expected, before, atol=1e-3)
    linearize.save(student("llama", PLAIN, dtype=torch.float32), None, tmp_path / "student")
    model, _ = linearize.load(tmp_path / "student")
    small = describe(model)[0].state_bytes
    assert torch.equal(model(x).logits, before)
    assert linearize.adjust(model, sparse_cache=6) is model
    assert torch.equal(model(x).logits, expected)
    assert describe(model)[0].state_bytes == small + 6 * 4 * (16 + 16) * 4
    linearize.save(model, None, tmp_path / "sparse")
    assert torch.equal(linearize.load(tmp_path / "sparse")[0](x).logits, expected)
    assert torch.equal(linearize.adjust(model, sparse_cache=None)(x).logits, before)

    config = AutoConfig.from_pretrained(tmp_path / "student", trust_remote_code=True)
    for layer in config.linearize["layers"].values():
        layer["method"]["sparse_cache"] = 6
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student", config=config, trust_remote_code=True)
    assert torch.equal(plain(x).logits, expected)


def test_only_layers_that_have_the_field_are_adjusted():
    model = convert(tiny(), PLAIN, {"0": PLAIN, "1": SalientConfig(budget=3, chunk=4)})
    linearize.adjust(model, sparse_cache=6)
    methods = [layer["method"].get("sparse_cache") for layer in model.config.linearize["layers"].values()]
    assert methods == [6, None, None]
    assert model.mixers()[0].config == SPARSE


@pytest.mark.parametrize(
    ("config", "fields", "told"),
    [
        (PLAIN, dict(window=8), r"method\.window: was settled .* anew is method\.sparse_cache"),
        (PLAIN, dict(sparse_cache="many"), r"method\.sparse_cache: "),
        (LolcatsConfig(window=4, window_kind="sliding"), dict(sparse_cache=3), r"window_kind=terraced"),
        (SalientConfig(), dict(sparse_cache=3), r"method\.sparse_cache: was settled .*leave it out"),
    ],
)
def test_what_cannot_be_adjusted_is_refused_and_nothing_changes(config, fields, told):
    model = convert(tiny(), config, "all")
    before = [m.config for m in model.mixers().values()]
    with pytest.raises((RecipeError, ConversionError), match=told):
        linearize.adjust(model, **fields)
    assert [m.config for m in model.mixers().values()] == before


def test_an_ordinary_model_has_nothing_to_adjust():
    model = tiny()
    assert linearize.adjust(model) is model
    with pytest.raises(
        RecipeError, match=r"method\.sparse_cache: the model has no converted layer; .*leave it out"
    ):
        linearize.adjust(model, sparse_cache=3)
