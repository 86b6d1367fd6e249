"""Stage 2 on tiny converted models."""

import logging

import pytest
import torch
from test_transfer import Text, student
from tiny import ids, tiny

from linearize.convert import convert
from linearize.modeling.attention import attention_mode
from linearize.modeling.errors import TrainingError
from linearize.modeling.registry import METHODS
from linearize.modeling.still import StillConfig
from linearize.recipe import Finetune
from linearize.tracking import read
from linearize.train.finetune import FinetuneStage, finetune, lora_targets

KL = {"next_token": 0.0, "kl": 1.0}
BOTH = {"next_token": 0.7, "kl": 0.4}


def recipe(**changes):
    return Finetune(**({"tokens": 30 * 128, "batch_size": 4, "learning_rate": 5e-3} | changes))


def shaken(stage, seed=0):
    """Adapters away from their zero start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return stage


def batch(masked=True):
    tokens = ids(2, 41)
    labels = tokens[:, 1:].clone()
    if masked:
        labels[0, :15] = -100
    return {"input_ids": tokens[:, :-1], "labels": labels}


def gradients(stage, given, scale=1.0):
    with stage.training():
        readings = stage.backward(given, scale)
        return readings, {name: p.grad.clone() for name, p in stage.named_parameters()}


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("phi3", {"qkv_proj", "o_proj"}),
        ("gpt_neox", {"query_key_value", "dense"}),
        ("gpt2", {"c_attn", "c_proj"}),
    ],
)
def test_targets_are_the_attention_projections_fused_ones_included(caplog, family, names):
    model = student(family=family)
    with caplog.at_level(logging.INFO, "linearize"):
        targets = lora_targets(model, recipe())
    assert {path.rpartition(".")[2] for path in targets} == names
    assert len(targets) == 3 * len(names)
    assert all("attn" in path or "attention" in path for path in targets)  # gpt2's MLP has a c_proj as well
    assert all(path in caplog.text for path in targets)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "gpt2"])
def test_merged_equals_unmerged(family):
    model, tokens = student(family=family, dtype=torch.float64), ids()
    plain = model(tokens).logits
    names = [name for name, _ in model.named_parameters()]
    stage = shaken(FinetuneStage(model, recipe()))
    assert len(stage.targets) == len([m for m in model.modules() if hasattr(m, "lora_A")])
    adapted = model(tokens).logits
    stage.merge()
    stage.remove()
    assert not torch.allclose(adapted, plain, atol=1e-2)
    torch.testing.assert_close(model(tokens).logits, adapted, rtol=0, atol=1e-6)
    assert [name for name, _ in model.named_parameters()] == names


WITH_GATE = {"targets": ["q_proj", "k_proj", "v_proj", "o_proj", "output_gate"], "alpha": 8}


def test_a_gate_inside_a_mixer_is_adapted_and_merged_like_a_projection(tmp_path):
    model = convert(tiny().requires_grad_(False), StillConfig(chunk=4, budget=3)).double()
    mixers = [layer.self_attn.mixer for layer in model.model.layers]
    before = [mixer.output_gate.weight.detach().clone() for mixer in mixers]
    finetune(model, Text(), recipe(tokens=2 * 128, lora=WITH_GATE), folder=tmp_path)
    assert not any(torch.equal(m.output_gate.weight, w) for m, w in zip(mixers, before, strict=True))
    tokens = ids()
    plain = model(tokens).logits
    stage = shaken(FinetuneStage(model, recipe(lora={"targets": ["output_gate"]})))
    adapted = model(tokens).logits
    stage.merge()
    stage.remove()
    assert not torch.allclose(adapted, plain, atol=1e-2)
    torch.testing.assert_close(model(tokens).logits, adapted, rtol=0, atol=1e-6)
    assert all(type(mixer.output_gate) is torch.nn.Linear for mixer in mixers)


def test_merging_into_bf16_rounds_once():
    model = student(dtype=torch.bfloat16)
    weight = model.model.layers[0].self_attn.q_proj.weight
    before = weight.detach().float()
    stage = shaken(FinetuneStage(model, recipe()))
    layer = model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.dtype == b.dtype == torch.float32
    expected = (before + 2.0 * (b @ a).detach()).bfloat16()  # alpha / rank = 2
    stage.merge()
    stage.remove()
    merged = model.model.layers[0].self_attn.q_proj.weight
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, expected)


@pytest.mark.parametrize("weights", [{"next_token": 1.0}, KL, BOTH], ids=["next token", "kl", "both"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_chunked_loss_equals_the_dense_one_and_padded_rows_take_no_part(weights, family):
    vocab, given, config = 90, batch(), recipe(kl_chunk=7, **weights)
    extra = {"final_logit_softcapping": 3.0} if family == "gemma2" else {}
    model = student(family=family, dtype=torch.float64, **extra)
    stage = shaken(FinetuneStage(model, config, vocab_size=vocab))
    with torch.no_grad():  # rows beyond the tokenizer's vocabulary hold whatever training left there
        stage.model.get_output_embeddings().weight[vocab:] = 50.0
    given["input_ids"], given["labels"] = given["input_ids"] % vocab, given["labels"].clamp_max(vocab - 1)
    readings, chunked = gradients(stage, given, scale=0.5)

    keep = given["labels"] != -100
    with torch.no_grad(), stage.peft.disable_adapter(), attention_mode("softmax"):
        teacher = model(given["input_ids"]).logits[keep][:, :vocab].log_softmax(-1)
    with stage.training():
        log_p = model(given["input_ids"]).logits[keep][:, :vocab].log_softmax(-1)
        next_token = -log_p.gather(1, given["labels"][keep][:, None]).mean()
        kl = (teacher.exp() * (teacher - log_p)).sum(-1).mean()
        loss = config.next_token * next_token + config.kl * kl
        (0.5 * loss).backward()
        for name, parameter in stage.named_parameters():
            torch.testing.assert_close(chunked[name], parameter.grad, rtol=0, atol=1e-10)
    assert float(readings["loss"]) == pytest.approx(float(loss.detach()), abs=1e-10)
    if "kl" in readings:
        assert float(readings["kl"]) == pytest.approx(float(kl.detach()), abs=1e-10)


def test_a_batch_without_labels_adds_nothing():
    stage = shaken(FinetuneStage(student(), recipe(**BOTH)))
    given = batch()
    _, alone = gradients(stage, given)
    with stage.training():
        stage.backward(given, 1.0)
        readings = stage.backward(given | {"labels": torch.full_like(given["labels"], -100)}, 0.0)
        assert {name: value.item() for name, value in readings.items()} == dict.fromkeys(readings, 0.0)
        assert all(torch.equal(p.grad, alone[name]) for name, p in stage.named_parameters())


def test_the_teacher_of_the_kl_is_the_original_model():
    stage = shaken(FinetuneStage(student("lolcats"), recipe(**KL)))
    given = batch(masked=False)
    with torch.no_grad(), stage.peft.disable_adapter(), attention_mode("softmax"):
        logits = stage.head(stage.features(given))
    assert torch.equal(logits, tiny()(given["input_ids"]).logits)


def test_the_kl_of_an_untouched_softmax_student_is_zero():
    readings, grads = gradients(FinetuneStage(student("softmax"), recipe(**KL)), batch())
    assert abs(float(readings["kl"])) < 1e-6
    assert max(float(g.abs().max()) for g in grads.values()) < 1e-6


@pytest.mark.parametrize("family", ["granite", "cohere"])
def test_a_family_with_its_own_logit_transform_falls_back_to_whole_logits(monkeypatch, caplog, family):
    import tiny as models

    own = {"granite": {"logits_scaling": 4.0}, "cohere": {"logit_scale": 0.25}}[family]
    monkeypatch.setitem(models.FAMILIES, family, models.COMMON | own)
    with caplog.at_level(logging.WARNING, "linearize"):
        stage = shaken(FinetuneStage(student(family=family, dtype=torch.float64), recipe(kl_chunk=7, **BOTH)))
    assert f"{family} changes its logits" in caplog.text
    given = batch()
    readings, _ = gradients(stage, given)
    keep = given["labels"] != -100
    with torch.no_grad():
        log_p = stage.model(given["input_ids"]).logits[keep].log_softmax(-1)
    loss = -log_p.gather(1, given["labels"][keep][:, None]).mean()
    assert float(readings["next_token"]) == pytest.approx(float(loss), abs=1e-10)


def test_dropout_of_the_base_model_is_off_and_not_taken_for_a_logit_transform(caplog):
    stage = FinetuneStage(student(family="gpt2").train(), recipe(**KL))  # gpt2 drops a tenth by default
    assert "changes its logits" not in caplog.text
    first, second = (gradients(stage, batch())[1] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert stage.model.training


@pytest.mark.parametrize("train_mixer", [False, True])
def test_only_adapters_and_if_asked_mixers_train(tmp_path, train_mixer):
    model = student()
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    given = {"folder": tmp_path, "seed": 3}
    same, fitted = finetune(model, Text(), recipe(tokens=3 * 128, train_mixer=train_mixer), **given)
    assert same is model
    assert fitted.steps == 3
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    adapted = {f"{path}.weight" for path in lora_targets(model, recipe())}
    assert changed == adapted | ({name for name in before if ".mixer." in name} if train_mixer else set())


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_falls_for_every_method(tmp_path, name):
    model, given = student(name), batch()
    before, _ = gradients(stage := FinetuneStage(model, recipe()), given)
    stage.remove()

    class Same(Text):
        def batch(self, index, **_):
            return given

    model, _ = finetune(model, Same(), recipe(tokens=30 * 80, batch_size=2), folder=tmp_path)
    after, _ = gradients(FinetuneStage(model, recipe()), given)
    assert after["loss"] < 0.9 * before["loss"]


def test_kl_makes_a_student_more_like_its_teacher(tmp_path):
    class Same(Text):
        def batch(self, index, **options):
            return super().batch(0, **options)

    config = recipe(**KL, lora={"dropout": 0.05})
    finetune(student("window"), Same(), config, folder=tmp_path)
    lines = list(read(tmp_path / "metrics.jsonl"))
    assert all(line["loss"] == line["kl"] for line in lines)
    assert lines[-1]["kl"] < 0.8 * lines[0]["kl"]


def test_a_finished_finetune_is_merged_into_a_new_conversion(tmp_path):
    config = recipe(tokens=3 * 128)
    first, _ = finetune(student(), Text(), config, folder=tmp_path, seed=1)
    again, _ = finetune(student(), Text(), config, folder=tmp_path, seed=1)
    assert torch.equal(first(ids()).logits, again(ids()).logits)


def test_other_mixers_than_those_it_began_with_are_refused(tmp_path):
    finetune(student(), Text(), recipe(tokens=3 * 128), folder=tmp_path)
    other = student()
    with torch.no_grad():
        other.mixers()[1].window_logit += 0.1
    with pytest.raises(TrainingError, match=r"other settings \(mixers was "):
        finetune(other, Text(), recipe(tokens=3 * 128), folder=tmp_path)


def test_a_stop_leaves_the_model_plain(tmp_path):
    class Poisoned(Text):
        def batch(self, index, **options):
            given = super().batch(index, **options)
            return given if index < 2 else given | {"labels": given["labels"] * 0 - 100}

    model = student()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(TrainingError, match="finetune: batch 2 has no token to learn from"):
        finetune(model, Poisoned(), recipe(), folder=tmp_path)
    assert {name for name, p in model.named_parameters() if torch.equal(p, before[name])} == set(before)


def test_bf16_autocast_trains(tmp_path):
    model = student(dtype=torch.bfloat16)
    finetune(model, Text(), recipe(**BOTH), folder=tmp_path, precision="bf16")
    lines = list(read(tmp_path / "metrics.jsonl"))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], "'q_prj' is no projection of this model; did you mean 'q_proj'?"),
        (["lm_head"], "'lm_head' is no projection of this model"),
    ],
)
def test_wrong_targets_are_named(targets, message):
    with pytest.raises(TrainingError) as error:
        lora_targets(student(), recipe(lora={"targets": targets}))
    assert message in str(error.value)


def test_the_users_own_targets():
    targets = lora_targets(student(), recipe(lora={"targets": ["v_proj", "model.layers.1.mlp.up_proj"]}))
    assert targets == [f"model.layers.{i}.self_attn.v_proj" for i in range(3)] + [
        "model.layers.1.mlp.up_proj"
    ]
