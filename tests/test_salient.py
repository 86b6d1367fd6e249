"""Salient: what is attended and kept, by definition; the stage-1 loss against a dense one; what learns from it."""

import itertools

import pytest
import torch
import yaml
from tiny import ids, student, tiny
from tolerances import assert_near
from torch.utils._python_dispatch import TorchDispatchMode

from linearize.convert import convert, describe
from linearize.modeling.attention import attention_mode
from linearize.modeling.errors import ConversionError, LinearizeError
from linearize.modeling.mixer import Fit, Geometry, MixerInput
from linearize.modeling.ops import Kept, kept_attention, kept_decode, merge_kept
from linearize.modeling.salient import SalientConfig, SalientMixer
from linearize.modeling.selection import GRID, future_attention, kept_mask, kept_quadratic
from linearize.modeling.window import WindowConfig
from linearize.recipe import Recipe, Transfer
from linearize.train.transfer import TransferStage, transfer

C, H, G, K, M = 4, 4, 2, 6, 10
LENGTHS = [1, 3, 4, 5, 8, 9, 12, 13, 31, 32, 47]


def inputs(time, *, batch=2, seed=0, heads=H, groups=G, ties=False, dtype=torch.float64):
    torch.manual_seed(seed)
    q, k, v = (torch.randn(batch, time, n, K, dtype=dtype) for n in (heads, groups, groups))
    score = torch.randn(batch, time, groups, dtype=dtype)
    if ties:
        score = score.mul(1.5).round()
    score[:, 0] = torch.inf
    return q, k, v, score


def terms(size, softcap=None):
    return dict(scale=0.7, chunk=C, size=size, softcap=softcap)


def by_steps(q, k, v, score, size, softcap=None):
    """The recurrent form from nothing: kept slots, and every earlier token in a slot of its own."""
    batch, time, groups = score.shape
    empty = (x.new_zeros(batch, size, groups, K) for x in (k, v))
    kept = Kept(*empty, score.new_full((batch, size, groups), -torch.inf))
    outputs = []
    for t in range(time):
        if t % C == 0 and t >= 2 * C:
            left = slice(t - 2 * C, t - C)
            kept = merge_kept(kept, k[:, left], v[:, left], score[:, left])
        outputs.append(
            kept_decode(
                q[:, t : t + 1],
                k[:, : t + 1],
                v[:, : t + 1],
                kept,
                key_positions=torch.arange(t + 1).expand(batch, -1),
                query_positions=torch.full((batch, 1), t),
                scale=0.7,
                chunk=C,
                softcap=softcap,
            )
        )
    return torch.cat(outputs, 1), kept


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", [0, 1, 3, 7, 100])
@pytest.mark.parametrize("time", LENGTHS)
def test_quadratic_chunked_and_recurrent_are_one_function(time, size, ties):
    given = inputs(time, ties=ties)
    expected = kept_quadratic(*given, **terms(size, softcap=2.0))
    assert_near(kept_attention(*given, **terms(size, softcap=2.0)), expected, "kernel")
    assert_near(by_steps(*given, size, softcap=2.0)[0], expected, "kernel")


@pytest.mark.parametrize("tiles", [1, 3])
def test_long_texts_are_attended_in_parts(monkeypatch, tiles):
    monkeypatch.setattr("linearize.modeling.selection.TILES_AT_ONCE", tiles)
    given = inputs(47)
    assert_near(kept_attention(*given, **terms(5)), kept_quadratic(*given, **terms(5)), "kernel")


@pytest.mark.parametrize("size", [0, 4])
def test_gradients_of_the_chunked_form_are_those_of_the_definition(size):
    def gradients(function):
        q, k, v, score = (x.requires_grad_() for x in inputs(31))
        y = function(q, k, v, score, **terms(size))
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        assert score.grad is None
        return q.grad, k.grad, v.grad

    for ours, expected in zip(gradients(kept_attention), gradients(kept_quadratic), strict=True):
        assert_near(ours, expected, "kernel")


def test_enough_slots_are_softmax_attention():
    q, k, v, score = inputs(30)
    mine = kept_attention(q, k, v, score, **terms(30))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=0.7, enable_gqa=True
    )
    assert_near(mine, expected.transpose(1, 2), "kernel")


def test_grouped_heads_equal_repeated_ones():
    q, k, v, score = inputs(30)
    repeated = (x.repeat_interleave(H // G, 2) for x in (k, v, score))
    assert_near(
        kept_attention(q, *repeated, **terms(4)), kept_attention(q, k, v, score, **terms(4)), "kernel"
    )


def test_the_kept_mask_is_the_best_of_the_past_and_ties_go_to_the_lower_position():
    *_, score = inputs(40, ties=True)
    kept, local = kept_mask(score, chunk=C, size=5)
    for t in range(40):
        past = max(0, (t // C - 1) * C)
        assert local[t].nonzero().flatten().tolist() == list(range(past, t + 1))
        for b in range(2):
            for g in range(G):
                order = sorted(range(past), key=lambda j: (-score[b, j, g].item(), j))
                assert set(kept[b, g, t].nonzero().flatten().tolist()) == set(order[:5])
    assert kept[:, :, 2 * C :, 0].all()


def test_a_larger_budget_keeps_a_superset():
    *_, score = inputs(40, ties=True)
    masks = [kept_mask(score, chunk=C, size=n)[0] for n in (0, 1, 2, 5, 11, 40)]
    for small, large in itertools.pairwise(masks):
        assert (large | ~small).all() and large.sum() > small.sum()


def test_what_is_kept_in_decode_is_the_best_of_the_past():
    q, k, v, score = inputs(43, ties=True)
    v = torch.arange(43, dtype=v.dtype)[None, :, None, None].expand_as(v)
    _, kept = by_steps(q, k, v, score, 5)
    mask = kept_mask(score, chunk=C, size=5)[0][:, :, -1]
    assert torch.equal(kept.v[..., 0].transpose(1, 2).sort(-1).values.long().flatten(), mask.nonzero()[:, 2])


def test_a_later_token_changes_neither_outputs_nor_what_is_kept_before():
    q, k, v, score = inputs(40)
    before, (kept, _) = kept_attention(q, k, v, score, **terms(3)), kept_mask(score, chunk=C, size=3)
    for x in (q, k, v, score):
        x[:, 21] += 9
    after, (again, _) = kept_attention(q, k, v, score, **terms(3)), kept_mask(score, chunk=C, size=3)
    assert torch.equal(before[:, :21], after[:, :21])
    seen_first = (21 // C + 2) * C  # the first query that the changed token can be kept for
    assert torch.equal(kept[:, :, :seen_first], again[:, :, :seen_first])
    assert not torch.equal(kept[:, :, seen_first:], again[:, :, seen_first:])


# Through the mixer and whole models.


@pytest.fixture(params=[None, 3], ids=["input", "mean"])
def mixer(request):
    config = SalientConfig(budget=4, chunk=C, score_dim=7, score_context=request.param)
    torch.manual_seed(3)
    return SalientMixer(config, Geometry(H, G, K, K, M)).double()


def mixer_input(time, lengths=None, **more):
    q, k, v, _ = inputs(time)
    hidden = torch.randn(2, time, M, dtype=q.dtype)
    return MixerInput(hidden, q, k, v, scale=0.7, softcap=2.0, lengths=lengths, **more)


@torch.no_grad()
def test_the_mixer_is_the_definition_with_its_own_score(mixer):
    x, width = mixer_input(45), mixer.config.score_context
    inner = x.hidden @ mixer.inner.weight.T + mixer.inner.bias
    if width:
        means = torch.stack([x.hidden[:, max(0, j - width + 1) : j + 1].mean(1) for j in range(45)], 1)
        inner = inner + means @ mixer.context.weight.T
    score = torch.nn.functional.gelu(inner) @ mixer.outer.weight.T + mixer.outer.bias
    score = (score / GRID).round() * GRID
    score[:, 0] = torch.inf
    expected = kept_quadratic(x.q, x.k, x.v, score, **terms(5, softcap=2.0))
    assert_near(mixer(x)[0], expected, "layer")
    y, state = mixer(x._replace(use_cache=True))
    assert_near(y, expected, "layer")
    mask = kept_mask(score, chunk=C, size=5)[0][:, :, -1]
    for b in range(2):
        for g in range(G):
            mine = state.kept_score[b, :, g]
            assert_near(mine[1:], score[b, mask[b, g], g].sort(descending=True).values[1:], "layer")
            assert mine[0] == torch.inf and torch.equal(state.kept_v[b, 0, g], x.v[b, 0, g])


HEADS = [(3, [9, 2, 2]), (3, [0, 5, 1]), (2, [30, 4]), (2, [6, 6])]


def own_budgets(groups, budgets):
    """A mixer of 2 query heads a kv head, its input of 45 tokens, and what each kv head must give."""
    torch.manual_seed(3)
    config = SalientConfig(budget=budgets, chunk=C, score_dim=7)
    mixer = SalientMixer(config, Geometry(2 * groups, groups, K, K, M)).double()
    q, k, v, _ = inputs(45, heads=2 * groups, groups=groups)
    x = MixerInput(torch.randn(2, 45, M, dtype=q.dtype), q, k, v, scale=0.7, softcap=2.0, use_cache=True)
    with torch.no_grad():
        score = mixer._rank(x.hidden, mixer._tail(x), torch.arange(45).expand(2, -1))[0]
    score = (score / GRID).round() * GRID
    score[:, 0] = torch.inf
    parts = [
        kept_quadratic(
            q[:, :, 2 * g : 2 * g + 2],
            *(t[:, :, g : g + 1] for t in (k, v, score)),
            **terms(n + 1, softcap=2.0),
        )
        for g, n in enumerate(budgets)
    ]
    return mixer, x, score, torch.cat(parts, 2)


@pytest.mark.parametrize(("groups", "budgets"), HEADS)
@torch.no_grad()
def test_every_kv_head_has_its_own_budget_in_every_form(groups, budgets):
    """Quadratic, chunked, recurrent from any split, and in place; the memory is the sum of the heads' own."""
    mixer, x, score, expected = own_budgets(groups, budgets)
    y, whole = mixer(x)
    assert_near(y, expected, "layer")
    assert whole.kept_score[0].numel() == sum(n + 1 for n in budgets)

    def cut(start, stop, **more):
        return x._replace(**{n: getattr(x, n)[:, start:stop] for n in ("hidden", "q", "k", "v")}, **more)

    for split in (1, 11, 20):
        y, state = mixer(cut(0, split))
        outputs = [y]
        y, state = mixer(cut(split, 31), state)
        outputs.append(y)
        for t in range(31, 45):
            y, state = mixer(cut(t, t + 1, in_place=t % 2 == 0), state)
            outputs.append(y)
        assert_near(torch.cat(outputs, 1), expected, "layer")
        for one, other in zip(state, whole, strict=True):
            assert one.shape == other.shape
    mask = [kept_mask(score, chunk=C, size=n + 1)[0][:, g, -1] for g, n in enumerate(budgets)]
    held = [kept for _, kept, _ in mixer.budgets.each(whole.kept)]
    mine = [part.score[:, :, i] for part in held for i in range(part.score.shape[2])]
    for g, n in enumerate(budgets):
        for b in range(2):
            found = mine[g][b, : int(mask[g][b].sum())]
            assert_near(found[1:], score[b, mask[g][b], g].sort(descending=True).values[1:], "layer")
            assert mine[g].shape[1] == n + 1 and found[0] == torch.inf


@torch.no_grad()
def test_a_larger_budget_of_one_head_changes_that_head_alone():
    small, large = (own_budgets(3, [4, n, 2])[:2] for n in (3, 11))
    before, after = (mixer(x)[0].unflatten(2, (3, 2)) for mixer, x in (small, large))
    assert torch.equal(before[:, :, [0, 2]], after[:, :, [0, 2]])
    assert not torch.equal(before[:, :, 1], after[:, :, 1])


def test_equal_budgets_are_one_budget():
    one, listed = (
        describe(student("llama", SalientConfig(budget=n, chunk=C), dtype=torch.float32)) for n in (5, [5, 5])
    )
    assert [x.state_bytes for x in one] == [x.state_bytes for x in listed]
    assert own_budgets(2, [6, 6])[0].budgets.shape == (7, 2)


def test_a_list_of_budgets_fits_its_layer_or_is_refused():
    for budget in ([3], [1, 2, 3]):
        with pytest.raises(
            ConversionError, match=r"layer 0: method\.budget: .* and the layer has 2 kv heads"
        ):
            convert(tiny("llama"), SalientConfig(budget=budget))
    recipe = Recipe.from_dict({"method": {"name": "salient", "budget": [9, 4]}})
    assert recipe.method.budget == (9, 4)
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe
    for given in ([], [4, -1], "many", [4, "x"]):
        with pytest.raises(LinearizeError, match=r"^method\.budget"):
            Recipe.from_dict({"method": {"name": "salient", "budget": given}})


def test_the_state_of_unequal_budgets_is_as_large_as_they_say():
    model = student("llama", SalientConfig(budget=[12, 3], chunk=C), dtype=torch.bfloat16)
    for layer in describe(model):
        tokens = 12 + 1 + 3 + 1 + 2 * 2 * C
        assert layer.state_bytes == tokens * (2 * 16 * 2 + 4) + 2 * 8


def dense_loss(mixer, x, lengths):
    """The loss by its definition, from T x T attention."""
    score, terms = mixer._rank(x.hidden, mixer._tail(x), torch.arange(x.q.shape[1]).expand(2, -1))[0], []
    targets = []
    for b, length in enumerate(lengths):
        for g in range(G):
            for j in range(length):
                attended = [0.0]
                for t in range((j // C + 2) * C, length):
                    for h in range(g * H // G, (g + 1) * H // G):
                        s = 2.0 * torch.tanh(0.7 * (x.k[b, : t + 1, g] @ x.q[b, t, h]) / 2.0)
                        attended.append(s.softmax(0)[j].item())
                if len(attended) > 1:
                    targets.append(torch.tensor(max(attended) + 1e-4).double().log())
                    terms.append((score[b, j, g] - targets[-1]).square())
    return torch.stack(terms).mean(), torch.stack(targets).var(correction=0)


@pytest.mark.parametrize("lengths", [(23, 23), (23, 14), (17, 5)])
def test_the_transfer_loss_is_the_dense_one(mixer, lengths):
    padded = None if lengths == (23, 23) else torch.tensor(lengths)
    x = mixer_input(23, padded, transfer=True)
    fit, state = mixer(x)
    assert isinstance(fit, Fit) and state is None and not fit.power.requires_grad
    error, power = dense_loss(mixer, x, lengths)
    torch.testing.assert_close(fit.error, error, rtol=1e-6, atol=0)
    torch.testing.assert_close(fit.power, power, rtol=1e-6, atol=0)
    for ours, expected in zip(
        *(torch.autograd.grad(loss, list(mixer.parameters())) for loss in (fit.error, error)), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


def test_a_text_of_two_chunks_has_nothing_to_fit(mixer):
    fit, _ = mixer(mixer_input(2 * C, transfer=True))
    assert fit.error == 0
    fit.error.backward()
    assert all(not p.grad.any() for p in mixer.parameters())


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside has."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.found = max(self.found, storage)
        return result


@pytest.mark.parametrize("transfers", [True, False], ids=["loss", "attention"])
def test_memory_is_linear_in_the_length(mixer, transfers):
    def largest(time):
        with Largest() as seen, torch.set_grad_enabled(not transfers):
            mixer(mixer_input(time, transfer=transfers))
        return seen.found

    assert largest(512) <= 2.1 * largest(256)


def test_future_attention_is_zero_where_no_query_looks_back():
    q, k, _, _ = inputs(23)
    paid = future_attention(q, k, scale=0.7, chunk=C, lengths=torch.tensor([23, 9]))
    assert (paid[0, :16] > 0).all() and not paid[0, 16:].any()
    assert (paid[1, :4] > 0).all() and not paid[1, 4:].any()


@torch.no_grad()
def test_a_budget_of_all_tokens_is_the_teacher():
    x = ids(2, 43)
    model = student("qwen3", SalientConfig(budget=43, chunk=C))
    assert_near(model(x).logits, tiny("qwen3", dtype=torch.float64)(x).logits, "logits")


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_no_budget_is_a_terraced_window_and_the_first_token(family):
    x, both = ids(2, 43), {"layers": [0, 1, 2]}
    salient = student(family, SalientConfig(budget=0, chunk=C), **both)
    window = student(family, WindowConfig(window=C, window_kind="terraced", sinks=1), **both)
    assert_near(salient(x).logits, window(x).logits, "logits")


def test_the_state_is_as_large_as_the_specification_says():
    config = SalientConfig(budget=12, chunk=C, score_dim=5, score_context=16)
    for layer in describe(student("llama", config, dtype=torch.bfloat16)):
        tokens = 12 + 1 + 2 * C
        kv = tokens * layer.geometry.kv_heads * 2 * 16 * 2
        scores, tail, counters = tokens * layer.geometry.kv_heads * 4, 15 * 5 * 4, 2 * 8
        assert layer.state_bytes == kv + scores + tail + counters


def test_in_training_on_its_own_output_the_score_gets_no_gradient():
    model = student("llama", SalientConfig(budget=3, chunk=C))
    model(ids(2, 43)).logits.logsumexp(-1).mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (".mixer." in name), name


def test_the_loss_of_the_stage_is_the_mixers_own():
    model, batch = student("llama", SalientConfig(budget=3, chunk=C)), {"input_ids": ids(2, 43)}
    fits = []
    with attention_mode("transfer", record=lambda layer, *given: fits.append(given[0])), torch.no_grad():
        model(batch["input_ids"])
    for loss, expected in (
        ("relative", torch.stack([fit.error / fit.power for fit in fits]).mean()),
        ("mse", 1000 * torch.stack([fit.error for fit in fits]).mean()),
    ):
        stage = TransferStage(model, Transfer(loss=loss))
        with stage.training():
            readings = stage.backward(batch, 1.0)
        torch.testing.assert_close(readings["loss"], expected)
        torch.testing.assert_close(
            readings["relative_error"], torch.stack([fit.error / fit.power for fit in fits])
        )


def test_the_score_learns_what_will_be_attended(tmp_path):
    class Text:
        fingerprint = "random tokens"

        def batch(self, index, *, batch_size, stage):
            return {"input_ids": ids(batch_size, 48, seed=index)}

    model = student("llama", SalientConfig(budget=3, chunk=C, score_dim=16), dtype=torch.float32)
    recipe = Transfer(tokens=120 * 4 * 48, batch_size=4, learning_rate=1e-2)
    transfer(model, Text(), recipe, folder=tmp_path)
    stage = TransferStage(model, recipe)
    with stage.training():
        unexplained = stage.backward(Text().batch(1000, batch_size=16, stage="transfer"), 1.0)
    assert (unexplained["relative_error"] < 0.97).all(), unexplained  # the mean of the targets has 1


@pytest.mark.parametrize(
    "field", [{"budget": -1}, {"chunk": 0}, {"score_dim": 0}, {"score_context": 1}, {"target_floor": 0.0}]
)
def test_impossible_values_are_refused_in_one_line(field):
    with pytest.raises(ConversionError, match=rf"^method\.{next(iter(field))}: .* is impossible; give"):
        SalientConfig(**field).check()
