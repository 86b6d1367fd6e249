"""Generation from a recorded step, with a recorder that runs what it recorded again: what a CUDA graph would replay."""

import pytest
import torch
import transformers.masking_utils
from test_generation import CONFIGS, generate, padded
from tiny import student
from typer.testing import CliRunner

from linearize.modeling import graph
from linearize.modeling.attention import MODE
from linearize.modeling.lolcats import LolcatsConfig
from linearize.modeling.still import StillConfig


class Recorder:
    """Stands for a CUDA graph on the CPU: Python runs while recording alone, the device's part at every replay."""

    def __init__(self, monkeypatch):
        self.runs, self.records, self.layers = 0, 0, []
        states = graph._states

        def remember(cache):
            self.layers = states(cache)
            return self.layers

        monkeypatch.setattr(graph, "_states", remember)
        monkeypatch.setattr(graph, "record", self.record)
        monkeypatch.setattr(graph, "_why_not_there", lambda model: None)
        monkeypatch.setattr("linearize.modeling.cache.interpreted", lambda: True)
        self.patch = monkeypatch

    def record(self, function):
        self.records += 1
        mode, layers = MODE.get(), self.layers
        clocks = [layer.clock for layer in layers]
        for layer in layers:
            layer._seen += 1

        def run():
            self.runs += 1
            counts = [layer._seen for layer in layers]
            for layer, clock in zip(layers, clocks, strict=True):
                layer.clock, layer._seen = clock, -1000  # what the host knows must not matter
            with self.patch.context() as patch, MODE.hold(mode):
                patch.setattr(transformers.masking_utils, "is_tracing", lambda *_: True)  # as while recording
                outputs = function()
            for layer, count in zip(layers, counts, strict=True):
                layer.clock, layer._seen = None, count
            return outputs

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


def test_the_command_has_the_switch():
    from linearize.cli import app

    assert "--static" in CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "200"}).output
