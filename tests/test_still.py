"""STILL's mixer against its definition: what it picks by, what its state holds, whole models, and what is refused."""

import math

import pytest
import torch
from test_salient import Largest
from tiny import ids, randomise, student, tiny
from tolerances import assert_near
from transformers import DynamicCache

from linearize.convert import convert, describe, unconvert
from linearize.modeling.attention import attention_mode
from linearize.modeling.errors import ConversionError
from linearize.modeling.feature_maps import FEATURE_MAPS
from linearize.modeling.mixer import Geometry, MixerInput
from linearize.modeling.registry import METHODS
from linearize.modeling.ring import final, write
from linearize.modeling.routing import routed_quadratic, routing_masks, self_saliency
from linearize.modeling.selection import GRID
from linearize.modeling.still import StillConfig, StillMixer, shuffled
from linearize.train.transfer import error_and_power

C, H, G, K, V, M, T = 4, 4, 2, 6, 5, 10, 45
GEOMETRY = Geometry(heads=H, kv_heads=G, key_dim=K, value_dim=V, hidden=M)
VARIANTS = {
    "release": dict(budget=None),
    "bounded": dict(gate="per_head", gate_bias=3.0),
    "shared": dict(share_selection=True, gate="none", feature_map="np_map_plain"),
    "tied": dict(share_selection=True, kv_tied_map=True, budget=None),
    "recency": dict(score="recency", feature_map="hedgehog"),
    "random": dict(score="random", keep_first=False),
}
each_variant = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)


def still(**fields):
    given = dict(chunk=C, salient_per_chunk=2, budget=3, feature_dim=8, eps_den=1e-3) | fields
    return randomise(StillMixer(StillConfig(**given), GEOMETRY), seed=3).double()


def given(time=T, *, rows=2, seed=0, **more):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(rows, time, *shape, generator=generator, dtype=torch.float64)

    return MixerInput(normal(M), normal(H, K), normal(G, K), normal(G, V), scale=0.7, softcap=2.0, **more)


def ranks(mixer, x):
    """What tokens are picked by, [B, T, Gs], one head that selects at a time."""
    config, time = mixer.config, x.q.shape[1]
    if config.score == "self_saliency":
        share = self_saliency(x.q, x.k, scale=x.scale, window=C, softcap=x.softcap).exp()
        if config.share_selection:
            share = share.unflatten(2, (G, H // G)).mean(-1)
        score = (share.log() / GRID).round() * GRID
    else:
        position = torch.arange(time)
        position = position if config.score == "recency" else shuffled(position)
        score = position.double()[None, :, None].repeat(len(x.q), 1, mixer.select_heads)
    if config.keep_first:
        score[:, 0] = torch.inf
    return score


def by_definition(mixer, x):
    config, gate = mixer.config, None
    if config.gate != "none":
        gate = (x.hidden @ mixer.output_gate.weight.T + config.gate_bias).sigmoid().unflatten(2, (H, -1))
    terms = dict(chunk=C, picks=config.salient_per_chunk, size=config.budget, eps=config.eps_den)
    phi = mixer.map_q(x.q), mixer.map_k(x.k)
    return routed_quadratic(
        x.q, x.k, x.v, *phi, ranks(mixer, x), gate, scale=x.scale, softcap=x.softcap, **terms
    )


def piece(x, start, stop):
    cut = {name: getattr(x, name)[:, start:stop] for name in ("hidden", "q", "k", "v")}
    return x._replace(**cut, use_cache=True)


@each_variant
@torch.no_grad()
def test_the_mixer_is_its_definition_at_any_split(fields):
    mixer, x = still(**fields), given()
    expected = by_definition(mixer, x)
    assert_near(mixer(x)[0], expected, "layer")
    for sizes in ([T], [1] * T, [5, 1, 17, 1, 1, 20], [2 * C, 2 * C, T - 4 * C]):
        state, outputs, start = None, [], 0
        for size in sizes:
            y, state = mixer(piece(x, start, start + size), state)
            outputs.append(y)
            start += size
        assert_near(torch.cat(outputs, 1), expected, "layer")


@each_variant
@torch.no_grad()
def test_the_state_keeps_the_best_picked_tokens_and_sums_up_the_others(fields):
    mixer, x = still(**fields), given()
    _, state = mixer(piece(x, 0, T))
    config, score = mixer.config, ranks(mixer, x)
    terms = dict(chunk=C, picks=config.salient_per_chunk, size=config.budget)
    _, kept, linear = (mask[..., -1, :] for mask in routing_masks(score, **terms))
    phi = mixer.map_k(x.k)
    for b in range(2):
        for h in range(mixer.state_heads):
            out = linear[b, h * mixer.select_heads // mixer.state_heads]
            v = x.v[b, out, h * G // mixer.state_heads]
            assert_near(state.kv[b, h], phi[b, out, h].T @ v, "layer")
            assert_near(state.z[b, h], phi[b, out, h].sum(0), "layer")
        for h in range(mixer.select_heads):
            best = score[b, :, h].masked_fill(~kept[b, h], -torch.inf).argsort(descending=True, stable=True)
            best = best[: kept[b, h].sum()]
            assert torch.equal(state.kept_k[b, :, h], x.k[b, best, h * G // mixer.select_heads])
            assert torch.equal(state.kept_v[b, :, h], x.v[b, best, h * G // mixer.select_heads])


@pytest.mark.parametrize("score", ["self_saliency", "recency", "random"])
@torch.no_grad()
def test_the_first_token_stays_as_long_as_any(score):
    x = given()
    for budget in (None, 1, 2):
        mixer = still(score=score, budget=budget, salient_per_chunk=1)
        _, state = mixer(piece(x, 0, T))
        assert torch.equal(state.kept_k[:, 0], x.k[:, 0].repeat_interleave(2, 1))
    mixer = still(score=score, keep_first=False, salient_per_chunk=1)
    first = ranks(mixer, x)[:, :C].argmax(1).eq(0).all()
    assert first == (score == "self_saliency")  # there it has the largest score of all, log 1


@torch.no_grad()
def test_equal_tokens_are_picked_by_their_position():
    """Also where the products of their scores are rounded in other orders."""
    x = given(6 * C, rows=1)
    x = x._replace(q=x.q[:, :1].repeat(1, 6 * C, 1, 1), k=x.k[:, :1].repeat(1, 6 * C, 1, 1))
    x = x._replace(v=torch.arange(6.0 * C, dtype=x.v.dtype)[None, :, None, None].expand_as(x.v))
    for dtype in (torch.float32, torch.float64):
        mixer = still(keep_first=False, budget=4).to(dtype)
        typed = x._replace(**{name: getattr(x, name).to(dtype) for name in ("hidden", "q", "k", "v")})
        for sizes in ([6 * C], [1] * 6 * C, [7, 6 * C - 7]):
            state, start = None, 0
            for size in sizes:
                _, state = mixer(piece(typed, start, start + size), state)
                start += size
            # Alone in their windows the first tokens have larger shares; from then on all are equal.
            assert state.kept_v[0, :, :, 0].T.tolist() == [[0, 1, C, C + 1]] * H


def test_random_ranks_are_fixed_and_without_order():
    found = shuffled(torch.arange(10_000))
    assert len(found.unique()) > 9_990 and found.min() >= 0 and found.max() < 2**24
    order = torch.corrcoef(torch.stack([found.double(), torch.arange(10_000.0).double()]))[0, 1]
    assert abs(order) < 0.03
    assert torch.equal(shuffled(torch.tensor([7, 0, 9_999])), found[[7, 0, 9_999]])


@torch.no_grad()
def test_one_selection_a_group_is_the_plain_model_where_its_heads_agree():
    x = given()
    x = x._replace(q=x.q[:, :, ::2].repeat_interleave(2, 2))
    plain, shared, tied = (
        still(share_selection=share, kv_tied_map=tie) for share, tie in ((0, 0), (1, 0), (1, 1))
    )
    for parameter in plain.map_k.parameters():
        parameter.copy_(parameter[::2].repeat_interleave(2, 0))
    for other in (shared, tied):
        other.load_state_dict(
            plain.state_dict() | {f"map_k.{n}": p for n, p in other.map_k.named_parameters()}
        )
        for ours, theirs in zip(other.map_k.parameters(), plain.map_k.parameters(), strict=True):
            ours.copy_(theirs[:: len(theirs) // len(ours)])
        assert_near(other(x)[0], plain(x)[0], "layer")
    assert tied.map_k.heads == G and shared.map_k.heads == H


@torch.no_grad()
def test_the_score_of_a_group_is_its_mean_share():
    mixer, x = still(share_selection=True), given()
    rho = self_saliency(x.q, x.k, scale=x.scale, window=C, softcap=x.softcap)
    assert rho.unflatten(2, (G, 2)).std(-1).mean() > 0.1  # the heads do not agree
    assert_near(mixer._score(x)[:, 1:], ranks(mixer, x)[:, 1:], "layer")


@pytest.mark.parametrize("lengths", [(0, 3), (9, 30), (30, 9), (31, 0)])
@pytest.mark.parametrize("budget", [None, 3])
@torch.no_grad()
def test_rows_of_different_lengths_grow_as_the_longest(lengths, budget):
    """Padding is never kept, and a row that has seen less continues as if it were alone."""
    mixer, x = still(budget=budget), given()
    more = torch.tensor([1, 12])
    y, state = mixer(piece(x, 0, 31)._replace(lengths=torch.tensor(lengths)))
    again, after = mixer(piece(x, 31, T)._replace(lengths=more), state)
    for row, length in enumerate(lengths):
        one = x._replace(**{name: getattr(x, name)[row : row + 1] for name in ("hidden", "q", "k", "v")})
        tokens = torch.cat((torch.arange(length), 31 + torch.arange(more[row])))
        alone = one._replace(**{name: getattr(one, name)[:, tokens] for name in ("hidden", "q", "k", "v")})
        expected = by_definition(mixer, alone)[0]
        assert_near(y[row, :length], expected[:length], "layer")
        assert_near(again[row, : more[row]], expected[length:], "layer")
        real = after.kept_score[row, :, 0].isfinite() | (after.kept_score[row, :, 0] == torch.inf)
        routed = max(0, (len(tokens) - 1) // C - 1)
        assert real.sum() == (2 * routed if budget is None else min(3, 2 * routed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("share", [False, True])
@torch.no_grad()
def test_without_a_budget_memory_grows_by_the_picks_of_every_chunk(dtype, share):
    config = StillConfig(chunk=C, salient_per_chunk=3, budget=None, share_selection=share)
    model, x = student("llama", config, dtype=dtype), ids(2, 60)
    cache, sizes = DynamicCache(config=model.config), []
    for t in range(60):
        model(x[:, t : t + 1], past_key_values=cache)
        sizes.append([layer.state_bytes for layer in cache.layers])
    prefilled = model(x, past_key_values=DynamicCache(config=model.config)).past_key_values
    assert sizes[-1] == [layer.state_bytes for layer in prefilled.layers]
    token = (16 + 16) * dtype.itemsize + max(4, dtype.itemsize)
    for layer, report in enumerate(describe(model)):
        assert report.growth == 3 / C * (2 if share else 4) * token
        for t in range(60):
            grown = 2 * report.growth * C * max(0, t // C - 1)
            assert sizes[t][layer] == sizes[0][layer] + grown
            assert sizes[t][layer] <= 2 * report.cache_bytes(t + 1)


def test_memory_is_linear_in_the_length_where_a_budget_is_set():
    mixer = still(chunk=8, budget=5)

    def largest(time):
        x = given(time)
        with Largest() as seen:
            mixer(x._replace(q=x.q.requires_grad_()))[0].sum().backward()
            mixer(x._replace(use_cache=True))
        return seen.found

    assert largest(1024) <= 2.1 * largest(512)


def test_no_gradient_passes_through_the_selection():
    """The gradient is that of attention with the picked tokens given."""
    mixer = still()
    x = given()
    leaves = [x.q.requires_grad_(), x.k.requires_grad_(), x.v.requires_grad_(), *mixer.parameters()]
    slope = torch.linspace(-1, 1, x.v.shape[1] * 2 * H * V, dtype=x.v.dtype).view(2, T, H, V)
    assert not ranks(mixer, x).requires_grad and not mixer._score(x).requires_grad
    for y in (mixer(x)[0], mixer(x._replace(use_cache=True))[0]):
        mine = torch.autograd.grad((y * slope).sum(), leaves)
        expected = torch.autograd.grad((by_definition(mixer, x) * slope).sum(), leaves)
        for ours, theirs in zip(mine, expected, strict=True):
            assert theirs.abs().max() > 1e-5
            assert_near(ours, theirs, "layer")


def test_gradients_are_the_same_in_every_run():
    """Rows that are gathered for several chunks get theirs added in a fixed order."""
    mixer, x = still(budget=None), given(120)
    leaves = [x.k.requires_grad_(), x.v.requires_grad_(), *mixer.parameters()]
    runs = [torch.autograd.grad(mixer(x)[0].square().sum(), leaves) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "implementation", "dtype"),
    [("qwen3", "sdpa", torch.float64), ("gemma2", "eager", torch.float32)],  # eager has the soft-cap, in fp32
)
@pytest.mark.parametrize(("chunk", "picks"), [(C, C), (22, 1)], ids=["all picked", "all local"])
def test_where_nothing_is_linear_the_model_is_its_teacher(family, implementation, dtype, chunk, picks):
    model, x = tiny(family, dtype=torch.float64), ids(2, 43)
    model.set_attn_implementation(implementation)
    expected = model(x).logits
    convert(model, StillConfig(chunk=chunk, salient_per_chunk=picks, budget=None, eps_den=0.0)).double()
    assert_near(model(x).logits, expected, "logits", dtype)
    convert(unconvert(model), StillConfig(chunk=C, salient_per_chunk=1)).double()
    assert not torch.allclose(model(x).logits, expected, atol=1e-2)


def test_stage_1_reaches_maps_and_gate_alone():
    model = student("llama", StillConfig(chunk=C, salient_per_chunk=1, budget=2))
    losses = []
    with attention_mode(
        "transfer",
        record=lambda _, mine, teacher, valid: losses.append(error_and_power(mine, teacher, valid)[0]),
    ):
        model(ids(2, 43))
    torch.stack(losses).sum().backward()
    learned = {name.rpartition("mixer.")[2] for name, p in model.named_parameters() if p.grad is not None}
    assert learned == {"map_q.weight", "map_q.reflect", "map_k.weight", "map_k.reflect", "output_gate.weight"}


def test_the_key_map_starts_as_the_query_map_and_the_gate_near_a_half():
    for fields in (dict(), dict(share_selection=True, kv_tied_map=True)):
        mixer = StillMixer(StillConfig(feature_init="kaiming", **fields), GEOMETRY)
        step = H // mixer.state_heads
        for ours, theirs in zip(mixer.map_k.parameters(), mixer.map_q.parameters(), strict=True):
            assert torch.equal(ours, theirs[::step])
        gate = mixer._gate(given()._replace(hidden=torch.ones(2, T, M)))
        assert gate.shape == (2, T, H, V) and (gate - 0.5).abs().max() < 0.1
    open_gate = StillMixer(StillConfig(gate="per_head", gate_bias=3.0), GEOMETRY)
    assert open_gate._gate(given()).mean().item() == pytest.approx(1 / (1 + math.exp(-3)), abs=0.02)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(chunk=0), r"chunk: 0 is impossible; give 1 or more"),
        (dict(salient_per_chunk=-1), r"salient_per_chunk: -1 is impossible; give 0 or more"),
        (dict(budget=-1), r"budget: -1 is impossible; give 0 or more, or null to keep every picked token"),
        (dict(eps_den=-1e-6), r"eps_den: -1e-06 is impossible; give 0 or more"),
        (
            dict(salient_per_chunk=65),
            r"salient_per_chunk: 65 is more than a chunk has; give at most method.chunk=64",
        ),
        (dict(score="sre"), r"score: 'sre' is unknown; choose from self_saliency, recency, random"),
        (dict(gate="scalar"), r"gate: 'scalar' is unknown; choose from per_channel, per_head, none"),
        (dict(feature_map="np"), rf"feature_map: 'np' is unknown; choose from {', '.join(FEATURE_MAPS)}"),
        (dict(feature_init="zeros"), r"feature_init: 'zeros' is unknown; choose from identity, kaiming"),
        (dict(feature_dim=7), r"feature_dim: 7; this feature map needs an even width, .*; try 6"),
        (dict(kv_tied_map=True), r"kv_tied_map: .*; add method.share_selection=true"),
    ],
)
def test_impossible_values_are_refused_in_one_line(fields, message):
    with pytest.raises(ConversionError, match=rf"^method\.{message}$"):
        StillConfig(**fields).check(GEOMETRY)


@pytest.mark.parametrize(("time", "size"), [(1, 4), (3, 4), (4, 4), (5, 4), (8, 4), (11, 4), (7, 0)])
def test_rows_of_known_length_are_written_without_counters(time, size):
    new, buffer = torch.randn(2, time, 3), torch.zeros(2, size, 3)
    seen = torch.zeros(2, dtype=torch.long)
    total = torch.full_like(seen, time)
    assert torch.equal(write(buffer, new, seen, total, whole=True), write(buffer, new, seen, total))
    for window, kind in ((None, "sliding"), (2, "sliding"), (2, "terraced")):
        assert (final(total, window, kind, pending=1) == final(time, window, kind, pending=1)).all()


@pytest.mark.parametrize("chunk", [4, 8])
@pytest.mark.parametrize("name", ["still", "salient", "lolcats", "liger", "window"])
@torch.no_grad()
def test_a_prefill_without_lengths_ends_in_the_state_of_one_with_them(name, chunk):
    torch.manual_seed(0)
    method = METHODS[name]
    given = dict(chunk=chunk, budget=5) if name in ("still", "salient") else dict(window=chunk)
    mixer = method.mixer(method.config(**given), Geometry(4, 2, 8, 8, 12))
    hidden, q, k, v = (torch.randn(2, 37, *shape) for shape in ((12,), (4, 8), (2, 8), (2, 8)))
    x = MixerInput(hidden, q, k, v, scale=0.3, q_plain=q, k_plain=k, use_cache=True)
    y, state = mixer(x)
    expected, wanted = mixer(x._replace(lengths=torch.tensor([37, 37])))
    assert torch.equal(y, expected)
    for one, other in zip(state, wanted, strict=True):
        assert torch.equal(one, other)
