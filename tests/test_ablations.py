"""Branches left out are what they would be alone, and the verdict on the linear branch follows its rule."""

import json
import math

import pytest
import torch
from test_evaluate import Text
from tiny import ids, representatives, student, tiny, variants
from tolerances import assert_near
from transformers import AutoTokenizer, DynamicCache

from linearize.evaluate import Results, evaluate
from linearize.evaluate.ablations import NO_EVIDENCE, ablate, plan, verdict, window_of
from linearize.evaluate.recall import Cell
from linearize.evaluate.statistics import wilson
from linearize.modeling.attention import ablation
from linearize.modeling.errors import LinearizeError
from linearize.modeling.lawcat import LawcatConfig
from linearize.modeling.liger import LigerConfig
from linearize.modeling.lolcats import LolcatsConfig
from linearize.modeling.still import StillConfig
from linearize.modeling.window import WindowConfig
from linearize.recipe import Evaluate
from linearize.report import markdown
from linearize.teacher import BUNDLED


@torch.no_grad()
def logits(model, x, without=None, pieces=()):
    if not without:
        return model(x).logits
    with ablation(dict.fromkeys(model.mixers(), without)):
        if not pieces:
            return model(x, use_cache=False).logits
        cache, parts = DynamicCache(config=model.config), x.split(list(pieces), 1)
        return torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in parts], 1)


@pytest.mark.parametrize(
    ("config", "alone", "without"),
    [
        (LolcatsConfig(window=6, window_kind="sliding"), WindowConfig(window=6), "linear"),
        (LolcatsConfig(window=4), WindowConfig(window=4, window_kind="terraced"), "linear"),
        (LigerConfig(window=6), WindowConfig(window=6), "linear"),
        (LawcatConfig(window=6), WindowConfig(window=6), "linear"),
        (LigerConfig(window=6), LigerConfig(window=None, mix_recurrent=1.0), "window"),
        (
            LigerConfig(window=6, variant="gsa"),
            LigerConfig(window=None, variant="gsa", mix_recurrent=1.0),
            "window",
        ),
        (LawcatConfig(window=6), LawcatConfig(window=None, eps=0.0), "window"),
    ],
)
def test_what_is_left_is_the_other_branch_alone(config, alone, without):
    whole, part, x = student("qwen3", config), student("qwen3", alone), ids(2, 40)
    for mine, other in zip(whole.mixers().values(), part.mixers().values(), strict=True):
        other.load_state_dict({k: v for k, v in mine.state_dict().items() if k in other.state_dict()})
    found = logits(whole, x, without)
    assert_near(found, logits(part, x), "logits")
    assert not torch.allclose(found, logits(whole, x), atol=1e-3)


def test_still_without_its_sums_is_its_exact_tokens():
    config = StillConfig(chunk=4, budget=0, gate="none", eps_den=1e-300)
    local = student("llama", WindowConfig(window=4, window_kind="terraced"))
    assert_near(logits(student("llama", config), ids(2, 40), "linear"), logits(local, ids(2, 40)), "logits")


def test_lolcats_without_its_window_is_what_is_linear():
    """By the formula: queries that have nothing older than their window get 0."""
    model, x = student("llama", LolcatsConfig(window=4), num_hidden_layers=1), ids(1, 20)
    mixer, seen = model.mixers()[0], {}
    mixer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    mixer.register_forward_hook(lambda _, args, out: seen.update(y=out[0]))
    logits(model, x, "window")
    q, k, v = seen["x"].q, seen["x"].k, seen["x"].v.repeat_interleave(2, 2)
    weights = torch.einsum("bihf,bjhf->bhij", mixer.map_q(q), mixer.map_k(k))
    block = torch.arange(20) // 4
    weights = weights * (block[:, None] - block > 1)
    expected = torch.einsum("bhij,bjhv->bihv", weights / weights.sum(-1, keepdim=True).clamp_min(1e-300), v)
    assert_near(seen["y"], expected, "layer")
    assert not seen["y"][:, :8].any() and seen["y"][:, 8:].abs().min() > 0


@pytest.mark.parametrize("name", representatives())
def test_every_method_says_what_it_can_do_without_and_any_split_agrees(name):
    for config in (c for c in variants().values() if c.name == name):
        model, x = student("llama", config, num_hidden_layers=1), ids(2, 43)
        for branch in ("linear", "window"):
            reason = model.mixers()[0].why_not_without(branch)
            if reason is None:
                found = logits(model, x, branch)
                assert found.isfinite().all() and not torch.equal(found, logits(model, x))
                assert_near(logits(model, x, branch, [20, 1, 1, 21]), found, "logits")
            else:
                with pytest.raises(LinearizeError, match=r"^ablation: layer 0: .* leave the layer out"):
                    logits(model, x, branch)


@pytest.fixture(scope="module")
def rows():
    """Rows of a student of two methods beside its teacher, and what they were measured on."""
    model = student("llama", {0: LolcatsConfig(window=4), 2: WindowConfig(window=8)}, dtype=torch.float32)
    windows = ids(6, 65)
    return ablate(model, tiny("llama"), windows, batch_size=4, vocab_size=97), model, windows


def test_every_layer_and_all_of_them_have_a_row(rows):
    found, model, _ = rows
    by_name = {row.name: row for row in found}
    assert list(by_name) == [name for name, *_ in plan(model)]
    assert by_name["linear branch off, layers 0"].layers == [0]
    assert by_name["linear branch off, layer 2"].not_run == "window has no linear branch"
    assert by_name["window off, layer 2"].not_run == "the window is all there is"
    assert by_name["state zeroed, all layers"].layers == [0, 2]
    for row in found:
        assert (row.kl is None) == (row.not_run is not None) == row.structural and row.length == 64
        if row.kl is not None:
            assert (
                row.windows == 6
                and row.difference_interval[0] <= row.kl_difference <= row.difference_interval[1]
            )
            assert abs(row.kl_difference) > 1e-4 and math.isfinite(row.ppl)


def test_a_zeroed_state_is_measured_on_what_follows(rows):
    """Against the model run by hand: forget in the middle, and sum over the second half alone."""
    found, model, windows = rows
    row = next(row for row in found if row.name == "state zeroed, layer 0")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(windows[:, :32], past_key_values=cache)
        cache.layers[0].forget()
        after = model(windows[:, 32:64], past_key_values=cache).logits.double().log_softmax(-1)
        intact = model(windows[:, :64]).logits[:, 32:].double().log_softmax(-1)
        truth = tiny("llama")(windows[:, :64]).logits[:, 32:].double().log_softmax(-1)
    kl, before = ((truth.exp() * (truth - s)).sum(-1).mean().item() for s in (after, intact))
    assert row.kl == pytest.approx(kl, rel=1e-4)
    assert row.kl_difference == pytest.approx(kl - before, abs=1e-4 * kl)
    nll = -after.gather(-1, windows[:, 33:65, None]).mean()
    assert row.ppl == pytest.approx(nll.exp().item(), rel=1e-4)


def cell(model, length, right, samples=100, task="passkey"):
    hits = "1" * right + "0" * (samples - right)
    return Cell(model, task, length, right, samples, *wilson(right, samples), float(length), "x", hits)


@pytest.mark.parametrize(
    ("student_", "control", "teacher", "length", "used"),
    [
        (90, 40, 100, 512, True),
        (90, 40, 80, 512, False),  # the teacher is below the gate
        (90, 40, 100, 256, False),  # not longer than four windows
        (41, 40, 100, 512, False),  # within chance
        (40, 90, 100, 512, False),
    ],
)
def test_the_verdict_follows_its_rule(student_, control, teacher, length, used):
    found = {"teacher": teacher, "student": student_, "window control": control}
    cells = [cell(name, length, right) for name, right in found.items()]
    told = verdict(cells, 64)
    assert told.startswith(
        "the linear branch is used: passkey at 512: 90 % against 40 %" if used else NO_EVIDENCE
    )


def test_without_a_control_there_is_no_evidence():
    told = verdict([cell("teacher", 512, 100), cell("student", 512, 90)], 64)
    assert told == f"{NO_EVIDENCE}: no window-only control was measured beside the student"


def test_ablations_are_a_part_of_the_evaluation_where_they_are_asked_for():
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED["books-5m"])
    sizes = dict(vocab_size=len(tokenizer), dtype=torch.float32, num_hidden_layers=1)
    students = {
        "student": student("llama", LolcatsConfig(window=8), **sizes),
        "window control": student("llama", WindowConfig(window=8), **sizes),
    }
    text = Text(torch.randint(10, 8000, (900,), generator=torch.Generator().manual_seed(0)))
    words = dict(seq_lens=[48, 64], sequences=3, batch_size=3, recall_lens=[128], recall_samples=2)
    config = Evaluate(**words, ablations={"enabled": True, "per_layer": False})
    teacher = tiny("llama", vocab_size=len(tokenizer), num_hidden_layers=1)
    results = evaluate(students, teacher, tokenizer, text, config)
    found = results.ablations
    kinds = [row.kind for row in found.rows]
    assert kinds == ["linear_off", "window_off", "state_zeroed", "control"]
    measured = results.likelihood[64]
    control = found.rows[-1]
    assert control.kl == pytest.approx(measured["window control"].kl)
    assert control.kl_difference == pytest.approx(measured["window control"].kl - measured["student"].kl)
    # This student's window is its control's: without the linear branch it is the control, but for terraces.
    assert found.verdict.startswith(NO_EVIDENCE)
    assert window_of(students["student"]) == 8
    again = Results.from_dict(json.loads(json.dumps(results.to_dict())))
    assert again == results
    assert "What the student uses" in markdown(results) and NO_EVIDENCE[1:] in markdown(results)
