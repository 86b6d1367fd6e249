"""Integrity gates: they pass what is sound, and see each way in which a mixer can be broken, in the layer that is."""

import copy
import itertools
import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny import student, tiny
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

from linearize import checkpoint
from linearize.adapter import merge_adapters
from linearize.cli import app
from linearize.convert import convert
from linearize.evaluate import gates, long_way, one_function, persistence
from linearize.evaluate.gates import Gate, Gates, integrity
from linearize.evaluate.merged import merged
from linearize.evaluate.subject import TOLERANCES, Comparison, Seen, Subject
from linearize.files import sha256_of
from linearize.modeling.errors import EvaluationError
from linearize.modeling.lolcats import LolcatsConfig
from linearize.modeling.still import StillConfig
from linearize.recipe import Recipe

CONFIG = LolcatsConfig(window=4)


@pytest.fixture
def subject():
    return Subject(student("llama", CONFIG, dtype=torch.float32), None, 0)


def breaks(subject, change, layer=1):
    """Have one layer's mixer do something else; ``change(forward, x, state) -> (y, state)``."""
    mixer = subject.model.mixers()[layer]
    forward = mixer.forward
    mixer.forward = lambda x, state=None: change(forward, x, state)


def forgetful(forward, x, state):
    """A decode step from which the older state is missing."""
    if state is not None:
        state = state._replace(kv=state.kv * 0)
    return forward(x, state)


def leaking_pads(forward, x, state):
    """Padding counts as tokens."""
    if x.lengths is not None:
        x = x._replace(lengths=torch.full_like(x.lengths, x.q.shape[1]))
    return forward(x, state)


def mixing_rows(forward, x, state):
    y, after = forward(x, state)
    return y + 0.01 * y.mean(0, keepdim=True), after


def seeing_ahead(forward, x, state):
    y, after = forward(x, state)
    return y + 0.01 * y.roll(-1, 1), after


def hoarding(forward, x, state):
    """The state keeps what it should have summed."""
    y, after = forward(x, state)
    if after is not None:
        held = after.kept_k if state is None else state.kept_k
        after = after._replace(kept_k=torch.cat([held, x.k.new_zeros(len(x.k), 1, *held.shape[2:])], 1))
    return y, after


def overflowing(forward, x, state):
    y, after = forward(x, state)
    if after is not None and int(after.seen.max()) > 600:
        y = y * torch.inf
    return y, after


@pytest.mark.parametrize(
    ("change", "run", "names"),
    [
        (forgetful, one_function.one_function, {"one function: chunks", "one function: single steps"}),
        (forgetful, one_function.generate, {"one function: generate"}),
        (
            leaking_pads,
            lambda s: [one_function.padding(s, "left"), one_function.padding(s, "right")],
            {"padding: right"},
        ),
        (mixing_rows, one_function.batch, {"batch"}),
        (seeing_ahead, one_function.causality, {"causality"}),
        (hoarding, lambda s: long_way.long_way(s, 8), {"constant state"}),
        (overflowing, lambda s: long_way.long_way(s, 100), {"finite"}),
    ],
)
def test_a_broken_mixer_is_seen_in_its_layer(subject, change, run, names):
    breaks(subject, change)
    found = run(subject)
    found = found if isinstance(found, list) else [found]
    failed = {gate.name: gate for gate in found if gate.status == "failed"}
    assert names <= failed.keys()
    for name in names:
        gate = failed[name]
        assert gate.where.startswith("layer 1, length "), gate
        assert gate.difference is None or gate.difference > gate.bound


def test_a_mixer_whose_softmax_is_not_the_models_is_seen(subject):
    attention = subject.model.converted()[2]
    attend = type(attention).attend
    type(attention).attend = lambda self, q, *a, **k: attend(
        self, q * (1.01 if self.layer_idx == 2 else 1), *a, **k
    )
    try:
        gate = persistence.start(subject, None)
    finally:
        type(attention).attend = attend
    assert gate.status == "failed" and gate.where.startswith("layer 2, length ")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = convert(tiny("gpt_neox"), CONFIG, [0, 2])
    return checkpoint.save(model, None, tmp_path_factory.mktemp("gates") / "student")


def test_a_sound_student_passes_every_gate_that_can_be_run(saved):
    """The one that cannot, a reload, is run by the whole road, and where it fails below."""
    seen = []
    found = integrity(checkpoint.load(saved)[0], teacher=tiny("gpt_neox"), train_len=64, progress=seen.append)
    by_name = {gate.name: gate for gate in found.gates}
    assert len(by_name) == len(found.gates) == 11
    assert {name for name, gate in by_name.items() if gate.status != "passed"} == {"reload"}
    assert found.status == "incomplete" and not found.failures()
    assert by_name["start"].note == "bit-equal to the teacher"
    assert "softmax stays in layers 1: 262,144 bytes at 1,024 tokens" in by_name["constant state"].note
    assert Gates.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert [at.done for at in seen] == list(range(1, seen[-1].total + 1))


def test_another_folder_than_the_students_is_seen_and_foreign_code_is_not_run(saved, tmp_path):
    model, _ = checkpoint.load(saved)
    assert persistence.code_is_ours(model, saved)
    with torch.no_grad():
        model.get_output_embeddings().weight[5] += 0.5
    other = checkpoint.save(model, None, tmp_path / "student")
    (other / "lolcats.py").write_text("raise SystemExit('this must not run')\n")
    subject = Subject(checkpoint.load(saved)[0], None, 0)
    gate = persistence.reload(subject, other)
    assert gate.status == "failed" and gate.difference > 0.1
    assert "its own" in gate.note and "must not run" not in gate.note


def test_code_is_ours_where_every_file_is_in_its_place_and_no_other_is_named(saved, tmp_path):
    model, _ = checkpoint.load(saved)
    stub, foreign = "modeling_linearize.py", "raise SystemExit\n"

    def spoilt(spoil):
        folder = Path(shutil.copytree(saved, tmp_path / spoil.__name__))
        spoil(folder)
        return not persistence.code_is_ours(model, folder)

    def hidden(folder):
        """The genuine file where nothing looks for it."""
        (folder / "sub").mkdir()
        (folder / "sub" / stub).write_bytes((folder / stub).read_bytes())
        (folder / stub).write_text(foreign)

    def below(folder):
        """transformers runs such a file as it loads."""
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(foreign)

    def linked(folder):
        (tmp_path / "outside").mkdir()
        (tmp_path / "outside" / "generate.py").write_text(foreign)
        (folder / "custom_generate").symlink_to(tmp_path / "outside")

    def elsewhere(folder):
        config = json.loads((folder / "config.json").read_text())
        own = config["auto_map"]["AutoModelForCausalLM"]
        config["auto_map"]["AutoModelForCausalLM"] = f"owner/name--{own}"
        (folder / "config.json").write_text(json.dumps(config))

    def as_the_hub_keeps_it(folder):
        """Files that are links to others."""
        for path in list(folder.glob("*.py")):
            path.rename(path.with_suffix(".blob"))
            path.symlink_to(path.with_suffix(".blob"))

    for spoil in (hidden, below, linked, elsewhere):
        assert spoilt(spoil), spoil
    assert not spoilt(as_the_hub_keeps_it)


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # one of them keeps its weights transposed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_in_the_weights_that_they_were_merged_into(family, dtype, tmp_path):
    teacher = tiny(family, dtype=dtype)
    model = convert(tiny(family, dtype=dtype), CONFIG, [0, 2])
    kind = Conv1D if family == "gpt2" else torch.nn.Linear
    targets = [
        n for n, m in model.named_modules() if type(m) is kind and ".mixer." not in n and "head" not in n
    ]
    assert len(targets) > 3
    wrapped = get_peft_model(
        model, LoraConfig(r=2, lora_alpha=8, target_modules=targets, fan_in_fan_out=family == "gpt2")
    )
    lora = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    with torch.no_grad():
        for p in lora.values():
            p.normal_(0, 0.05)
    (tmp_path / "student").mkdir()
    stage, student = tmp_path / "finetune", tmp_path / "student"

    def check(teacher=teacher):
        return merged(Subject(model, None, 0), teacher, student)

    unmerged = copy.deepcopy(model)
    merge_adapters(model)
    wrapped.unload()
    assert check() == []  # no adapters are held
    stage.mkdir()
    save_file({name: p.detach().contiguous() for name, p in lora.items()}, stage / "weights.safetensors")
    digest = sha256_of(stage / "weights.safetensors")
    (stage / "done.json").write_text(json.dumps({"weights": digest, "settings": {"lora_targets": targets}}))
    recipe = lambda alpha: Recipe.resolve(  # noqa: E731
        "books-5m", None, ["finetune.lora.rank=2", f"finetune.lora.alpha={alpha}"]
    ).to_yaml()
    (student / "recipe.yaml").write_text(recipe(8))
    (gate,) = check()
    assert (gate.status, gate.bound) == ("passed", 0.1) and gate.difference < 0.01
    assert gate.note.startswith(f"{len(targets)} projections")
    assert check(None)[0].note == "the teacher is not at hand"
    (student / "recipe.yaml").write_text(recipe(4))
    (gate,) = check()
    assert gate.status == "failed" and gate.where.removesuffix(".weight") in targets
    (student / "recipe.yaml").write_text(recipe(8))
    weight = model.get_submodule(targets[1]).weight
    whole = weight.data
    weight.data = unmerged.get_submodule(targets[1]).get_base_layer().weight.data  # one that was left out
    (gate,) = check()
    assert (gate.status, gate.where) == ("failed", f"{targets[1]}.weight") and gate.difference > 0.5
    weight.data = whole
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 2] += 0.5  # nobody trained it
    (gate,) = check()
    assert gate.status == "failed" and gate.difference == math.inf
    (stage / "weights.safetensors").write_bytes(b"other")
    assert (check()[0].status, check()[0].note[:11]) == ("not run", "the weights")


def test_what_cannot_be_run_says_why(subject):
    assert persistence.reload(subject, None).status == "not run"
    finite = long_way.long_way(subject, None)[1]
    assert (finite.status, finite.note) == ("not run", "the training length is not known")
    learned = Subject(student("gpt2", CONFIG, dtype=torch.float32, n_positions=40), None, 0)
    assert learned.limit == 40
    finite = long_way.long_way(learned, 8)[1]
    assert finite.status == "not run" and "positions end at 40" in finite.note
    assert "positions end at 40" in one_function.one_function(learned)[0].note
    with pytest.raises(EvaluationError, match="not a converted model"):
        integrity(tiny("llama"))


@pytest.mark.parametrize(
    ("error", "status", "note"),
    [
        (RuntimeError("no such kernel"), "failed", "RuntimeError: no such kernel"),
        (KeyError("layer 7"), "failed", "KeyError: 'layer 7'"),
        (AssertionError("x"), "failed", "AssertionError: x"),
        (MemoryError(), "not run", "out of memory (MemoryError: )"),
        (torch.OutOfMemoryError("CUDA out of memory."), "not run", "out of memory (OutOfMemoryError: "),
        (None, "not run", "out of memory (RuntimeError: "),  # what torch itself raises on a CPU
        (OSError(28, "No space left on device"), "not run", "OSError: [Errno 28] No space left"),
    ],
)
def test_a_student_that_raises_has_failed_and_a_machine_that_is_too_small_has_not(
    subject, error, status, note
):
    def raising(forward, x, state):
        if error is None:
            torch.empty(2**60, dtype=torch.int8)
        raise error

    breaks(subject, raising)
    (gate,) = gates._guarded("batch", lambda: [one_function.batch(subject)])
    assert gate.status == status and gate.note.startswith(note), gate


@pytest.mark.parametrize(
    ("code", "said", "status"),
    [
        (
            1,
            "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
            "not run",
        ),
        (-9, "", "not run"),
        (1, "KeyError: 'layers'", "failed"),
    ],
)
def test_a_reload_that_runs_out_of_memory_is_not_run(subject, saved, monkeypatch, code, said, status):
    ended = subprocess.CompletedProcess([], code, "", said)
    monkeypatch.setattr(persistence.subprocess, "run", lambda *_, **__: ended)
    gate = persistence.reload(subject, saved)
    assert gate.status == status and said[:90] in gate.note


def test_a_difference_without_bound_is_written_as_json():
    found = Gates("failed", [Gate("batch", "failed", "layer 1, length 9", torch.inf, 0.1)])
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["gates"][0]["difference"] is None


def test_a_state_that_grows_is_held_to_what_its_method_declares():
    model = student(
        "llama", StillConfig(chunk=4, salient_per_chunk=1, budget=None), dtype=torch.float32, layers=[1]
    )
    subject = Subject(model, None, 0)
    gate = long_way.long_way(subject, None)[0]
    assert gate.status == "passed" and "layers 1 (" in gate.note and "as still declares" in gate.note
    model.mixers()[1].growth = lambda itemsize: 1.0
    gate = long_way.long_way(subject, None)[0]
    assert gate.status == "failed" and gate.where == "layer 1, length 1024"


def test_half_precision_has_its_own_bound_and_asks_for_the_same_choices():
    subject = Subject(student("llama", CONFIG, dtype=torch.bfloat16), None, 0)
    assert subject.bound == TOLERANCES[torch.bfloat16] == 2e-2
    assert one_function.generate(subject).status == "passed"
    logits = torch.randn(1, 300, 97, dtype=torch.bfloat16)
    other = logits.clone()
    other[0, :9, 3] = 20.0  # 3 % of the tokens choose otherwise; the median token is untouched
    check = Comparison(subject, "x")
    check.add(Seen(other, {0: other}), Seen(logits, {0: logits}), 300)
    assert check.failed and check.worst == 0 and "97.0 % of" in check.note
    cases = {"same": logits, "near": logits * 1.01, "other": other}
    for order in itertools.permutations(cases):
        check = Comparison(subject, "x")
        for length, case in enumerate(order):
            check.add(Seen(cases[case], {0: cases[case]}), Seen(logits, {0: logits}), length)
        assert check.failed and check.where.endswith(f"length {order.index('other')}"), order
    check = Comparison(subject, "x")
    for length, case in enumerate(("same", "near", "same")):
        check.add(Seen(cases[case], {0: cases[case]}), Seen(logits, {0: logits}), length)
    assert not check.failed and check.worst > 0 and check.where == "length 1"


def test_the_gates_are_a_verb(saved):
    for words in (
        ["--gates", "--ablations"],
        ["--gates", "--suite", "smoke"],
        ["--verify", "--suite-folder", "x"],
        ["--gates", "--lm-eval", "piqa"],
        ["--gates", "--lm-eval-tasks", "x"],
    ):
        result = CliRunner().invoke(app, ["eval", str(saved), *words])
        assert result.exit_code == 2 and "give one of them" in result.stderr, result.output
        assert all(word in result.stderr for word in words if word.startswith("--"))
