"""Stage 1 on tiny converted models."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import ids, tiny

from linearize.convert import convert
from linearize.modeling.attention import attention_mode
from linearize.modeling.errors import TrainingError
from linearize.modeling.registry import METHODS
from linearize.recipe import Transfer
from linearize.tracking import read
from linearize.train.transfer import TransferStage, error_and_power, transfer

WINDOW = 8


class Text:
    """Random tokens; batch `index` is a function of the index."""

    fingerprint = "random tokens"

    def batch(self, index, *, batch_size, stage):
        tokens = ids(batch_size, 33, seed=1000 + index)
        return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}


def student(name="lolcats", family="llama", layers="all", dtype=torch.float32, **overrides):
    config = METHODS[name].config
    fields = {"window": WINDOW} if "window" in config.__dataclass_fields__ else {}
    return convert(tiny(family, dtype=dtype, **overrides).requires_grad_(False), config(**fields), layers)


def recipe(**changes):
    return Transfer(**({"tokens": 60 * 128, "batch_size": 4, "save_every": 20} | changes))


def gradients(model, batch, **changes):
    stage = TransferStage(model, recipe(**changes))
    with stage.training():
        readings = stage.backward(batch, 0.5)
        asked = {name for name, p in model.named_parameters() if p.grad is not None}
        return readings, {name: p.grad.clone() for name, p in stage.named_parameters()}, asked


def test_student_logits_are_the_teachers_during_transfer():
    teacher, model, tokens = tiny("qwen3"), student(family="qwen3"), ids()
    recorded = []
    with attention_mode("transfer", record=lambda *given: recorded.append(given)), torch.no_grad():
        assert torch.equal(model(tokens).logits, teacher(tokens).logits)
    assert [layer for layer, *_ in recorded] == [0, 1, 2]


@pytest.mark.parametrize("loss", ["relative", "mse"])
@pytest.mark.parametrize("padded", [False, True])
def test_immediate_and_deferred_gradients_are_equal(loss, padded):
    batch = {"input_ids": ids(2, 40)}
    if padded:
        batch["attention_mask"] = torch.ones(2, 40, dtype=torch.long)
        batch["attention_mask"][0, :13] = 0
    results = [gradients(student(), batch, loss=loss, backward=b) for b in ("immediate", "deferred")]
    for readings, grads, asked in results:
        assert asked == set(grads)
        assert all(".mixer." in name for name in grads)
        torch.testing.assert_close(readings, results[0][0])
        torch.testing.assert_close(grads, results[0][1])


def test_mse_is_the_papers_loss_and_relative_is_each_layers_own():
    model, batch = student(), {"input_ids": ids()}
    pairs = []
    with attention_mode("transfer", record=lambda *given: pairs.append(given[1:])), torch.no_grad():
        model(batch["input_ids"])
    mse = [fit.error.detach() for fit, _, _ in pairs]
    relative = [fit.error.detach() / t.square().mean() for fit, t, _ in pairs]
    papers, _, _ = gradients(model, batch, loss="mse")
    assert float(papers["loss"]) == pytest.approx(1000 * float(sum(mse)) / 3, rel=1e-5)
    readings, _, _ = gradients(model, batch)
    torch.testing.assert_close(readings["relative_error"], torch.stack(relative))
    assert float(readings["loss"]) == pytest.approx(float(sum(relative)) / 3, rel=1e-5)


def test_a_layers_gradient_does_not_depend_on_which_others_are_converted():
    batch = {"input_ids": ids()}
    _, every, _ = gradients(student(), batch)
    _, alone, _ = gradients(student(layers=[1]), batch)
    assert alone
    for name, gradient in alone.items():
        torch.testing.assert_close(gradient, every[name])


def test_padding_takes_no_part():
    torch.manual_seed(0)
    s, t = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    valid = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    error, power = error_and_power(s.masked_fill(~valid[..., None, None], float("nan")), t, valid)
    assert float(error) == pytest.approx(float((s - t)[valid].square().mean()), rel=1e-5)
    assert float(power) == pytest.approx(float(t[valid].square().mean()), rel=1e-5)


@pytest.mark.parametrize("kept", ["all", [0, 1]])
def test_nothing_after_the_last_converted_layer_is_computed(kept):
    model, calls = student(layers=kept), []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: calls.append(index))
    model.lm_head.register_forward_hook(lambda *_: calls.append("head"))
    gradients(model, {"input_ids": ids()})
    assert calls == ([0, 1] if kept == "all" else [0])


def test_memory_does_not_grow_with_depth():
    """Live bytes saved for backward at the peak, with 2 and with 6 layers."""

    def peak(layers, backward):
        live = most = 0

        class Saved:
            def __init__(self, tensor):
                nonlocal live, most
                self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
                live += self.size
                most = max(most, live)

            def __del__(self):
                nonlocal live
                live -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            gradients(student(num_hidden_layers=layers), {"input_ids": ids()}, backward=backward)
        return most

    assert peak(6, "immediate") == peak(2, "immediate")
    assert peak(6, "deferred") > 2.5 * peak(2, "deferred")


def test_the_error_of_every_layer_falls_and_the_rest_stays(tmp_path):
    model = student()
    before = {name: p.clone() for name, p in model.named_parameters()}
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    first = gradients(model, Text().batch(0, batch_size=32, stage="transfer"))[0]["relative_error"]
    model.train()
    fitted = transfer(model, Text(), recipe(), folder=tmp_path)
    lines = list(read(tmp_path / "metrics.jsonl"))
    assert fitted.steps == len(lines) == 60
    after = gradients(model, Text().batch(0, batch_size=32, stage="transfer"))[0]["relative_error"]
    assert (after < 0.97 * first).all(), (first, after)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (".mixer." not in name), name
        assert parameter.requires_grad == asked[name]
        assert parameter.grad is None
    assert model.training


@pytest.mark.parametrize("name", METHODS)
def test_every_method_transfers_or_says_that_it_has_nothing_to_learn(tmp_path, name):
    model = student(name)
    fitted = transfer(model, Text(), recipe(tokens=3 * 128), folder=tmp_path)
    learns = any(p.requires_grad for m in model.mixers().values() for p in m.parameters())
    done = json.loads((tmp_path / "done.json").read_text())
    assert done["skipped"] == (None if learns else "nothing to train")
    assert fitted.steps == (3 if learns else 0)
    if not learns:
        assert torch.equal(model(ids()).logits, student(name)(ids()).logits)


def test_a_finished_transfer_is_loaded_into_a_new_conversion(tmp_path):
    first, again = student(), student()
    transfer(first, Text(), recipe(tokens=3 * 128), folder=tmp_path)
    transfer(again, Text(), recipe(tokens=3 * 128), folder=tmp_path)
    assert torch.equal(first(ids()).logits, again(ids()).logits)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_mixers_of_a_bf16_teacher_learn_in_fp32(tmp_path, precision):
    model = student(dtype=torch.bfloat16)
    transfer(model, Text(), recipe(), folder=tmp_path, precision=precision)
    assert {p.dtype for m in model.mixers().values() for p in m.parameters()} == {torch.float32}
    lines = list(read(tmp_path / "metrics.jsonl"))
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]


def test_packed_documents_learn_as_if_each_stood_in_its_own_row():
    tokens, model = ids(1, 40), student()
    positions = torch.cat([torch.arange(17), torch.arange(23)])[None]
    rows = torch.cat([torch.nn.functional.pad(tokens[:, :17], (0, 6)), tokens[:, 17:]])
    mask = torch.ones_like(rows)
    mask[0, 17:] = 0
    packed, grads, _ = gradients(model, {"input_ids": tokens, "position_ids": positions})
    apart, expected, _ = gradients(model, {"input_ids": rows, "attention_mask": mask})
    torch.testing.assert_close(packed, apart)
    torch.testing.assert_close(grads, expected)


def learn(folder, **changes):
    torch.set_num_threads(1)
    transfer(
        student(),
        Text(),
        recipe(tokens=6 * 128, batch_size=2, save_every=2, **changes),
        folder=folder,
        seed=5,
    )


class Cut(Text):
    """Batches from number `start` on, of `lengths[number]` tokens a row; the last of them from then on."""

    def __init__(self, *lengths, start=0):
        self.lengths, self.start = lengths, start

    def batch(self, index, *, batch_size, stage):
        index += self.start
        length = self.lengths[min(index, len(self.lengths) - 1)]
        return {k: t[:, :length] for k, t in super().batch(index, batch_size=batch_size, stage=stage).items()}


@pytest.mark.parametrize("way", ["immediate", "deferred"])
def test_a_step_whose_texts_are_all_inside_the_window_is_refused_in_words(tmp_path, way):
    """Two windows of a terraced mixer are exact: 16 tokens teach nothing, 17 do."""
    model = student()
    with pytest.raises(
        TrainingError, match=r"transfer: batch 0 reaches no parameter; .* raise data\.seq_len"
    ) as error:
        transfer(model, Cut(2 * WINDOW), recipe(backward=way), folder=tmp_path / "short")
    assert "\n" not in str(error.value)
    transfer(model, Cut(2 * WINDOW + 1), recipe(backward=way, tokens=4 * 17), folder=tmp_path / "long")


def test_a_short_batch_adds_nothing_to_a_step_that_has_longer_ones(tmp_path):
    results = []
    for start, accumulate in ((0, 2), (1, 1)):
        model, config = student(), recipe(accumulate=accumulate, tokens=1, clip=None)
        transfer(model, Cut(9, 32, start=start), config, folder=tmp_path / str(start))
        parameters = [p for mixer in model.mixers().values() for p in mixer.parameters()]
        results.append(torch.cat([p.detach().flatten() for p in parameters]))
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)  # AdamW's first step forgets the batch's share


def test_a_layer_that_is_exact_on_a_batch_lets_the_others_learn(tmp_path):
    lolcats = METHODS["lolcats"].config
    model = convert(tiny().requires_grad_(False), {0: lolcats(window=4), 1: lolcats(window=32)})
    before = [[p.clone() for p in mixer.parameters()] for mixer in model.mixers().values()]
    transfer(model, Text(), recipe(tokens=1), folder=tmp_path)
    moved = [
        any(not torch.equal(p, old) for p, old in zip(mixer.parameters(), values, strict=True))
        for mixer, values in zip(model.mixers().values(), before, strict=True)
    ]
    assert moved == [True, False]


def test_two_processes_learn_what_one_learns_from_the_same_batches(tmp_path):
    learn(tmp_path / "one", accumulate=2)
    here = Path(__file__).parent
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    code = f"import test_transfer as t; t.learn(t.Path({str(tmp_path / 'two')!r}))"
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], env=common | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(2)
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    lines = [list(read(tmp_path / name / "metrics.jsonl")) for name in ("one", "two")]
    for ours, theirs in zip(*lines, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["relative_error"] == pytest.approx(theirs["relative_error"], rel=1e-3)
