"""Generation from a recorded step, with a recorder that runs its operations again: what a CUDA graph would replay."""

import functools

import pytest
import torch
from recorded import recorded_on_cpu
from test_generation import CONFIGS, generate, padded
from tiny import representatives, student
from tolerances import assert_near
from typer.testing import CliRunner

from linearize.modeling import graph
from linearize.modeling.backend import ran
from linearize.modeling.lolcats import LolcatsConfig
from linearize.modeling.still import StillConfig


class Recorder:
    """Counts, and stands for a CUDA graph on the CPU."""

    def __init__(self, monkeypatch):
        self.runs, self.records = 0, 0
        monkeypatch.setattr(graph, "record", self.record)
        monkeypatch.setattr(graph, "_why_not_there", lambda model: None)
        monkeypatch.setattr("linearize.modeling.cache.interpreted", lambda: True)

    def record(self, function):
        self.records += 1
        replay = recorded_on_cpu(function)

        def run():
            self.runs += 1
            return replay()

        return run


@pytest.fixture
def recorder(monkeypatch):
    return Recorder(monkeypatch)


CASES = [("llama", name, "all") for name in CONFIGS] + [
    ("llama", "terraced", [0, 2]),
    ("llama", "sliding", [1]),
    ("qwen3", "liger", [1, 2]),
    ("gpt2", "terraced", "all"),
    ("gemma3_text", "sliding", [1, 2]),
]


@pytest.mark.parametrize(("family", "name", "layers"), CASES)
def test_replayed_steps_equal_steps(family, name, layers, recorder):
    model, (x, mask) = student(family, CONFIGS[name], layers=layers), padded()
    expected = generate(model, x, mask)
    if family == "gemma3_text":  # its first layer keeps a window, which its cache counts on the host
        assert torch.equal(generate(model, x, mask, cache_implementation="static"), expected)
        assert recorder.records == 0
        return
    assert torch.equal(generate(model, x, mask, cache_implementation="static"), expected)
    assert (recorder.records, recorder.runs) == (1, 12)  # 14 tokens: the prompt, a first step, and replays


@pytest.mark.parametrize(("name", "pads"), [(name, 5) for name in representatives()] + [("lolcats", 0)])
def test_samples_of_every_method_beside_kept_softmax(name, pads, recorder):
    model, (x, mask) = student("llama", representatives()[name], layers=[0, 2]), padded(pads=pads)
    mask = mask if pads else torch.ones_like(mask)
    kwargs = dict(do_sample=True, top_k=20, num_return_sequences=2, steps=24)
    kwargs |= dict(return_dict_in_generate=True, output_logits=True)
    torch.manual_seed(3)
    expected = generate(model, x, mask, **kwargs)
    torch.manual_seed(3)
    found = generate(model, x, mask, cache_implementation="static", **kwargs)
    assert (recorder.records, recorder.runs) == (1, 22)
    for one, other in zip(found.logits, expected.logits, strict=True):
        assert_near(one, other, "logits")
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_a_kernel_in_a_recorded_step(recorder, monkeypatch):
    pytest.importorskip("triton")
    model, (x, mask) = (
        student("llama", CONFIGS["salient"], layers=[0, 2], dtype=torch.float32),
        padded(2, 9, 3),
    )
    kwargs = dict(return_dict_in_generate=True, output_logits=True, steps=6)
    expected = generate(model, x, mask, **kwargs)
    monkeypatch.setenv("LINEARIZE_INTERPRET", "1")
    found = generate(model, x, mask, cache_implementation="static", **kwargs)
    assert recorder.runs == 4 and ran()["salient_step"] == "triton"
    for one, other in zip(found.logits, expected.logits, strict=True):
        assert_near(one, other, "logits")
    assert torch.equal(found.sequences, expected.sequences)


def test_sampling_stops_and_returned_caches(recorder):
    model, (x, mask) = student("llama", CONFIGS["terraced"], layers=[0, 1]), padded()
    kwargs = dict(
        do_sample=True, top_k=20, num_return_sequences=2, return_dict_in_generate=True, output_logits=True
    )
    torch.manual_seed(3)
    expected = generate(model, x, mask, **kwargs)
    torch.manual_seed(3)
    found = generate(model, x, mask, cache_implementation="static", **kwargs)
    assert torch.equal(found.sequences, expected.sequences) and recorder.runs
    for a, b in zip(found.logits, expected.logits, strict=True):
        assert torch.allclose(a, b)
    assert int(found.past_key_values.get_seq_length()) == expected.past_key_values.get_seq_length()
    stop = int(expected.sequences[0, -5])
    eos = dict(eos_token_id=stop, min_new_tokens=1)
    assert torch.equal(
        generate(model, x, mask, cache_implementation="static", **eos), generate(model, x, mask, **eos)
    )


def test_chunked_prompts_and_beams(recorder):
    model, (x, mask) = student("llama", CONFIGS["sliding"]), padded()
    expected = generate(model, x, mask)
    assert torch.equal(
        generate(model, x, mask, cache_implementation="static", prefill_chunk_size=6), expected
    )
    assert recorder.records == 1
    beams = dict(num_beams=3)
    assert torch.equal(
        generate(model, x, mask, cache_implementation="static", **beams), generate(model, x, mask, **beams)
    )


def test_what_cannot_be_recorded_runs_as_always(recorder, monkeypatch):
    model, (x, mask) = student("llama", CONFIGS["sliding"]), padded()

    def fail(function):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graph, "record", fail)
    with pytest.warns(RuntimeWarning, match="decoding without a CUDA graph, because CUDA error"):
        found = generate(model, x, mask, cache_implementation="static")
    assert torch.equal(found, generate(model, x, mask))


def test_reasons_are_given():
    model = student("llama", LolcatsConfig(window=4, sparse_cache=2))
    reason = next(iter(model.mixers().values())).why_not_in_place()
    assert reason == "a sparse cache is ranked by the host"
    model = student("llama", StillConfig(chunk=4, budget=None, feature_dim=8))
    assert "grows" in next(iter(model.mixers().values())).why_not_in_place()
    assert graph.why_no_graph(model, None) == "the model is on cpu"


def test_the_recorder_freezes_what_a_graph_freezes():
    place, total, count = torch.zeros(2), torch.zeros(2), [1.0]

    def step():
        total.add_(place[1:] * count[0])
        return total.clone()

    with torch.no_grad():
        replay = recorded_on_cpu(step)
        assert total.tolist() == [0, 0]
        place[1], count[0] = 3.0, 5.0
        assert replay().tolist() == [3, 3] and replay().tolist() == [6, 6]
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            recorded_on_cpu(lambda: total.add_(1) if total.sum() > 0 else None)
        gone = torch.ones(2)
        replay = recorded_on_cpu(functools.partial(torch.add, total, gone))
        del gone
        with pytest.raises(AssertionError, match="made before the recording and is gone"):
            replay()


def test_the_command_has_the_switch():
    from linearize.cli import app

    assert "--static" in CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "200"}).output
