"""What Salient's score can learn: every loss against its definition by T x T matrices, and that each teaches."""

import math

import pytest
import torch
from test_salient import Largest
from tiny import ids, student
from torch.nn.functional import logsigmoid, smooth_l1_loss, softplus

from linearize.methods import build_method
from linearize.modeling import objectives
from linearize.modeling.errors import ConversionError, RecipeError
from linearize.modeling.mixer import Geometry, MixerInput
from linearize.modeling.objectives import OBJECTIVES, decayed, over, shifts
from linearize.modeling.ring import final
from linearize.modeling.salient import SalientConfig, SalientMixer, placed, positions
from linearize.modeling.selection import future_attention, future_logit
from linearize.recipe import Transfer
from linearize.scan.oracle import Memo, OracleMixer
from linearize.train.transfer import TransferStage

C, H, G, K, V, M = 4, 4, 2, 6, 3, 10
SCALE, CAP = 0.7, 3.0
PADDED = [None, (23, 14), (17, 5)]


def layer(objective, **fields):
    torch.manual_seed(3)
    config = SalientConfig(chunk=C, objective=objective, **{"budget": 4, "score_dim": 7, **fields})
    return SalientMixer(config, Geometry(H, G, K, V, M)).double()


def given(time=23, lengths=None, *, batch=2, seed=0):
    """The input of a layer in stage 1, and its dense logits [B, H, T, T]; the rotation is some matrix."""
    torch.manual_seed(seed)
    q, k = (torch.randn(batch, time, n, K, dtype=torch.float64) for n in (H, G))
    v = torch.randn(batch, time, G, V, dtype=q.dtype)
    turn = torch.linalg.qr(torch.randn(K, K, dtype=q.dtype))[0]
    s = CAP * torch.tanh(SCALE * torch.einsum("bthk,bjhk->bhtj", q, k.repeat_interleave(H // G, 2)) / CAP)
    causal = torch.ones(time, time, dtype=torch.bool).tril()
    a = s.masked_fill(~causal, -torch.inf).softmax(-1)
    x = MixerInput(
        torch.randn(batch, time, M, dtype=q.dtype), q, k, v, SCALE, CAP, q @ turn, k @ turn,
        lengths=None if lengths is None else torch.tensor(lengths), transfer=True,
        teacher=torch.einsum("bhtj,bjhv->bthv", a, v.repeat_interleave(H // G, 2)),
    )  # fmt: skip
    return x, s, a


def ranked(mixer, x):
    """[B, T, G] what tokens from a text's beginning are ranked by."""
    position = positions(x, torch.zeros(len(x.q), dtype=torch.long))
    return placed(mixer._rank(mixer._read(x), mixer._tail(x), position)[0], position)


def largest(dense, lengths):
    """[B, T, G] the maximum of [B, H, T, T] over heads of a group and queries past the local span, or nan."""
    time = dense.shape[-1]
    at = torch.arange(time)
    asks = (at[:, None] // C >= at // C + 2).expand(len(dense), 1, time, time)
    if lengths is not None:
        asks = asks & (at < torch.tensor(lengths)[:, None])[:, None, :, None]
    found = dense.masked_fill(~asks, -torch.inf).unflatten(1, (G, -1)).amax((2, 3)).transpose(1, 2)
    return found.masked_fill(found == -torch.inf, torch.nan)


@pytest.mark.parametrize("lengths", PADDED)
@pytest.mark.parametrize("time", [23, 31])
def test_targets_are_the_dense_ones(time, lengths):
    x, s, a = given(time, lengths)
    how = dict(scale=SCALE, chunk=C, softcap=CAP, lengths=x.lengths)
    for target, dense in ((future_logit, s), (future_attention, a)):
        expected = largest(dense, lengths)
        torch.testing.assert_close(target(x.q, x.k, **how), expected.nan_to_num(0.0))
        assert torch.equal(objectives.asked(x, C)[..., 0], ~expected[..., 0].isnan())


def by_definition(name, x, rho, s, a, lengths, mixer):
    """(error, power) of an objective from dense matrices, with loops over rows where that is clearer."""
    config, time = mixer.config, rho.shape[1]
    target = largest(s if name == "locret" else a, lengths)
    target = target if name == "locret" else (target + config.target_floor).log()
    there = ~target.isnan()
    if name == "log_attention":
        return (rho - target)[there].square().mean(), target[there].var(correction=0)
    if name == "locret":
        mean = target[there].mean().expand_as(target)
        return smooth_l1_loss(rho[there], target[there]), smooth_l1_loss(mean[there], target[there])
    if name == "ranking":
        error, power = [], []
        for shift in shifts(time):
            for i in range(time):
                j = (i - shift) % time
                for b, g in ((b, g) for b in range(2) for g in range(G)):
                    if there[b, i, g] and there[b, j, g]:
                        gap = target[b, i, g] - target[b, j, g]
                        error.append(softplus(-(rho[b, i, g] - rho[b, j, g]) * gap.sign()) * gap.abs())
                        power.append(math.log(2) * gap.abs())
        count = int(there.sum()) * objectives.SHIFTS
        return torch.stack(error).sum() / count, torch.stack(power).sum() / count
    at = torch.arange(time)
    old = (at[:, None] // C >= at // C + 2) & (at > 0)
    rate = logsigmoid(rho + math.log(config.budget + 2 * C)).transpose(1, 2)
    decay = torch.where(old, (at[:, None] - at) * rate[:, :, None], 0.0)
    causal = at <= at[:, None]
    p = (s + decay.repeat_interleave(H // G, 1)).masked_fill(~causal, -torch.inf).softmax(-1)
    y = torch.einsum("bhtj,bjhv->bthv", p, x.v.repeat_interleave(H // G, 2))
    held = torch.where(old, decay.exp(), 0.0).sum(-1)  # [B, G, T]
    real = at < torch.tensor(lengths or (time, time))[:, None]
    power = x.teacher[real].square().mean()
    capacity = ((held - config.budget).clamp_min(0) / max(1, config.budget)).transpose(1, 2)[real].mean()
    return (y - x.teacher)[real].square().mean() + config.capacity_weight * power * capacity, power


@pytest.mark.parametrize("lengths", PADDED)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients_are_those_of_the_definition(monkeypatch, name, lengths):
    monkeypatch.setattr(objectives, "QUERIES", 10)  # no multiple of the chunk
    mixer, (x, s, a) = layer(name, budget=2, score_context=3, capacity_weight=0.7), given(23, lengths)
    rho = mixer._rank(mixer._read(x), mixer._tail(x), torch.arange(23).expand(2, -1))[0]
    error, power = by_definition(name, x, rho, s, a, lengths, mixer)
    fit = mixer(x)[0]
    assert not fit.power.requires_grad and error > 0
    torch.testing.assert_close(fit.error, error, rtol=1e-7, atol=0)
    torch.testing.assert_close(fit.power, power, rtol=1e-7, atol=0)
    wanted, found = (torch.autograd.grad(loss, [*mixer.parameters()]) for loss in (error, fit.error))
    for ours, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_and_the_state_of_the_generator_change_nothing(name):
    mixer, (x, *_) = layer(name), given(23, (19, 14))
    before = mixer(x)[0]
    torch.manual_seed(99)
    noise = {n: getattr(x, n).clone() for n in ("hidden", "q", "k", "v", "q_plain", "k_plain", "teacher")}
    for part in noise.values():
        part[0, 19:], part[1, 14:] = 5 * torch.randn_like(part[0, 19:]), 7.0
    assert all(
        torch.equal(one, other) for one, other in zip(before, mixer(x._replace(**noise))[0], strict=True)
    )
    short, _ = mixer(given(2 * C)[0])  # nobody asks
    assert short.error.detach() / short.power < (1 if name == "retention" else 1e-30)
    short.error.backward()
    assert all(not p.grad.any() for p in mixer.parameters())


def test_what_gates_hold_is_counted_by_hand():
    q, k, v = torch.randn(1, 3, H, K), torch.randn(1, 16, G, K), torch.randn(1, 16, G, V)
    for beta in (1.0, 0.5):
        rate = torch.full((1, 16, G), beta).log()
        held = decayed(q, k, v, rate, 11, SCALE, C)[1]  # queries 11, 12, 13 and the tokens before 4, 8, 8
        ages = [range(8, 11), range(5, 12), range(6, 13)]  # without the first one
        expected = torch.tensor([sum(beta**age for age in some) for some in ages])
        torch.testing.assert_close(held, expected[None, :, None].expand(1, 3, G))
    assert over(torch.tensor([0.0, 2.0, 5.0]), torch.tensor(2.0)).tolist() == [0.0, 0.0, 1.5]
    assert over(torch.tensor([0.0, 3.0]), torch.tensor(0.0)).tolist() == [0.0, 3.0]


def test_gates_that_never_forget_are_softmax_and_gates_that_forget_at_once_a_local_span():
    x, s, a = given(23)
    for rate, weights in ((0.0, a), (-1e4, None)):
        if weights is None:
            at = torch.arange(23)
            seen = (at <= at[:, None]) & ((at[:, None] // C <= at // C + 1) | (at == 0))
            weights = s.masked_fill(~seen, -torch.inf).softmax(-1)
        y = decayed(x.q, x.k, x.v, torch.full((2, 23, G), rate), 0, SCALE, C, CAP)[0]
        expected = torch.einsum("bhtj,bjhv->bthv", weights, x.v.repeat_interleave(H // G, 2))
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_memory_of_the_loss_is_linear_in_the_length(monkeypatch, name):
    monkeypatch.setattr(objectives, "QUERIES", 8)
    mixer = layer(name).float()

    def most(time):
        x = given(time, batch=1)[0]
        x = x._replace(**{n: p.float() for n, p in x._asdict().items() if isinstance(p, torch.Tensor)})
        with Largest() as seen:
            mixer(x)[0].error.backward()
        return seen.found

    assert most(256) <= 2.1 * most(128)


def planted(seed, batch=4, time=64):
    """Texts in which one feature of a token, in its input and its key, says how much it will be attended later."""
    torch.manual_seed(seed)
    hidden, v = torch.randn(batch, time, M), torch.randn(batch, time, G, V)
    k, q = 0.3 * torch.randn(batch, time, G, K), 0.3 * torch.randn(batch, time, H, K)
    k[..., 0] += 2 * hidden[..., :G]
    q[..., 0] += 2
    x = MixerInput(hidden, q, k, v, SCALE, None, q, k, transfer=True)
    return x._replace(teacher=Memo(0).softmax(x))


@torch.no_grad()
def found(mixer, x, size=8):
    """Share of the tokens that will be attended most that are among as many best by rho."""
    time = int(final(torch.tensor([x.q.shape[1]]), C, "terraced"))
    true = future_attention(x.q, x.k, scale=SCALE, chunk=C)[:, 1:time]
    rho = ranked(mixer, x)[:, 1:time]
    mine, theirs = (
        torch.zeros_like(true).scatter(1, y.topk(size, 1).indices, 1.0) for y in (rho.to(true), true)
    )
    return ((mine * theirs).sum() / theirs.sum()).item()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_finds_what_will_be_attended(name):
    mixer = layer(name, budget=8, score_dim=16).float()
    optimizer = torch.optim.AdamW(mixer.parameters(), lr=3e-2, weight_decay=0.0)
    unseen = planted(1000)
    losses, before = [], found(mixer, unseen)
    for step in range(41):
        fit = mixer(planted(step))[0]
        losses.append((fit.error / fit.power).item())
        optimizer.zero_grad()
        fit.error.backward()
        optimizer.step()
    after = found(mixer, unseen)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5]), losses
    assert after > 0.6 > 0.4 > before, (before, after)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_stage_of_a_padded_batch_reaches_the_score_alone(name):
    config = SalientConfig(budget=3, chunk=C, score_dim=5, objective=name)
    model = student("qwen3", config, dtype=torch.float32)
    mask = torch.ones(2, 33, dtype=torch.long)
    mask[1, :9] = 0
    stage = TransferStage(model, Transfer())
    with stage.training():
        readings = stage.backward({"input_ids": ids(2, 33), "attention_mask": mask}, 1.0)
        for parameter_name, parameter in model.named_parameters():
            assert (parameter.grad is None) == (".mixer." not in parameter_name), parameter_name
            assert parameter.grad is None or parameter.grad.isfinite().all()
    assert readings["relative_error"].isfinite().all() and len(readings["relative_error"]) == 3


def test_the_score_of_locret_reads_what_is_not_rotated():
    x, *_ = given()
    mixer = layer("locret", score_context=5)
    width = (H + G) * K + G * V
    assert mixer.inner.weight.shape == mixer.context.weight.shape == (7, width)
    score = ranked(mixer, x)
    turned = x._replace(q=x.q.flip(-1), k=x.k.flip(-1), hidden=x.hidden + 1)
    assert torch.equal(score, ranked(mixer, turned))
    assert [layer(name).wants_unrotated for name in OBJECTIVES] == [n == "locret" for n in OBJECTIVES]


def test_the_scan_measures_every_objective_by_the_same_stand_in():
    x = planted(0)._replace(q_plain=None, k_plain=None)
    outputs = [
        OracleMixer(layer(name).config, layer(name).geometry, Memo(1), 0.5)(x)[0] for name in OBJECTIVES
    ]
    assert all(torch.equal(outputs[0], y) for y in outputs)


def test_fields_of_the_score_come_from_a_recipe():
    fields = {"name": "salient", "objective": "ranking", "score_dim": "24", "score_context": 16}
    mixer = SalientMixer(build_method(fields), Geometry(H, G, K, V, M))
    assert mixer.config.objective == "ranking" and mixer.context.weight.shape == (24, M)
    assert build_method("salient").objective == "log_attention"
    with pytest.raises(RecipeError, match=r"^method\.objective: .*(locret|ranking)"):
        build_method({"name": "salient", "objective": "trimkv"})
    for field in ({"objective": "x"}, {"capacity_weight": -0.1}):
        with pytest.raises(
            ConversionError, match=rf"^method\.{next(iter(field))}: .* is (unknown|impossible)"
        ):
            SalientConfig(**field).check()
