"""Decode on a GPU: kernels against the mixers' steps in fp64, long runs, and generation from a CUDA graph."""

import copy

import pytest
import torch
from test_generation import CONFIGS, generate, padded
from test_triton_decode import JOINT, STEPS, WINDOW, cast, compare, geometry, mixer_of, part, tokens
from tiny import ids, student
from tolerances import assert_near

from linearize.modeling.backend import ran
from linearize.modeling.lolcats import LolcatsConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("ignore:.*the slower reference runs.*:RuntimeWarning"),  # in fp64, for one
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
EVERY = {**JOINT, **WINDOW, **STEPS}
IN_FP16 = ("sliding", "terraced", "window and sinks", "gla", "lawcat", "salient", "still")
SMALL = [(name, dtype) for name in EVERY for dtype in DTYPES if dtype != torch.float16 or name in IN_FP16]
# Every step below compiles kernels of its own: where the dtype changes little, one stands for the others.
WIDE = [(n, dtype) for n in (1, 2, 3, 4, 8) for dtype in DTYPES if dtype == torch.bfloat16 or n == 3]


@pytest.mark.parametrize(("name", "dtype"), SMALL, ids=[f"{name}-{NAMES[dtype]}" for name, dtype in SMALL])
def test_small_steps(name, dtype):
    config, shape, lengths, count = EVERY[name]
    operation = f"{'joint' if name in JOINT else 'window' if name in WINDOW else config.name}_step"
    compare(config, shape, lengths, 40 + count, operation=operation, dtype=dtype, device="cuda")


@pytest.mark.parametrize(("per_group", "dtype"), WIDE, ids=[f"{n}-{NAMES[dtype]}" for n, dtype in WIDE])
@pytest.mark.parametrize("kind", ["sliding", "terraced"])
def test_wide_heads(kind, per_group, dtype):
    config = LolcatsConfig(window=64, window_kind=kind)
    compare(
        config,
        geometry(2 * per_group, 2, 128, 128),
        (200, 64, 1, 129),
        150,
        operation="joint_step",
        dtype=dtype,
        device="cuda",
    )


def test_many_programs():
    compare(
        LolcatsConfig(window=64),
        geometry(32, 8, 128, 128),
        [100 + i for i in range(16)],
        80,
        operation="joint_step",
        dtype=torch.bfloat16,
        device="cuda",
    )


@pytest.mark.parametrize(
    "config", [LolcatsConfig(), LolcatsConfig(window_kind="sliding")], ids=["terraced", "sliding"]
)
@torch.no_grad()
def test_thousands_of_steps_do_not_drift_and_repeat_bit_for_bit(config):
    shape = geometry(8, 2, 128, 128)
    exact = mixer_of(config, shape).cuda()
    mixer = copy.deepcopy(exact).float()
    x = tokens(shape, 2, 4096 + 64)
    x = cast(
        x._replace(**{n: t.cuda() for n, t in x._asdict().items() if isinstance(t, torch.Tensor)}),
        torch.bfloat16,
    )
    _, start = mixer(part(x, 0, 64))
    ends, sizes = [], set()
    for _ in range(2):
        state = mixer.with_room(start)
        state = type(state)(*(t.clone() for t in state))
        for t in range(64, x.q.shape[1]):
            y, state = mixer(part(x, t, t + 1, in_place=True), state)
            sizes.add(sum(t.numel() * t.element_size() for t in state))
        ends.append((y, state))
    assert len(sizes) == 1
    (y, state), (again, other) = ends
    assert torch.equal(y, again) and all(torch.equal(a, b) for a, b in zip(state, other, strict=True))
    folded = int(state.folded[0])
    phi = exact.map_k(x.k[:, :folded].double())
    expected = phi.sum(1)
    assert (state.z - expected).norm() / expected.norm() < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_a_replayed_step_equals_a_step(name):
    """Greedy tokens in fp32, left padding and two layers that keep softmax among them."""
    model = student("llama", CONFIGS[name], layers=[0, 2], dtype=torch.float32).cuda()
    x, mask = (t.cuda() for t in padded())
    options = dict(return_dict_in_generate=True, output_logits=True, steps=40)
    expected = generate(model, x, mask, **options)
    found = generate(model, x, mask, cache_implementation="static", **options)
    for one, other in zip(found.logits, expected.logits, strict=True):
        assert_near(one, other, "logits")
    assert torch.equal(found.sequences, expected.sequences)


def test_a_graph_is_recorded_and_replayed(monkeypatch):
    from linearize.modeling import graph

    replays, record = [], graph.record

    def counted(function):
        run = record(function)
        return lambda: (replays.append(1), run())[1]

    monkeypatch.setattr(graph, "record", counted)
    model = student("llama", CONFIGS["terraced"], dtype=torch.bfloat16).cuda()
    x, mask = (t.cuda() for t in padded())
    generate(model, x, mask, cache_implementation="static", steps=30)
    assert len(replays) == 28 and ran()["joint_step"] == "triton"


def test_sampling_is_the_same_from_a_graph():
    model = student("llama", CONFIGS["terraced"], dtype=torch.float32).cuda()
    x, mask = (t.cuda() for t in padded())
    found = []
    for options in ({}, {"cache_implementation": "static"}):
        torch.manual_seed(3)
        found.append(generate(model, x, mask, do_sample=True, top_k=20, num_return_sequences=2, **options))
    assert torch.equal(*found)


@torch.no_grad()
def test_a_prompt_and_steps_equal_a_whole_forward():
    model, x = student("llama", CONFIGS["sliding"], dtype=torch.float32).cuda(), ids(2, 90).cuda()
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=100)
    outputs = [model(x[:, :30], past_key_values=cache).logits]
    for t in range(30, 90):
        position = torch.full((2, 1), t, device="cuda")
        outputs.append(model(x[:, t : t + 1], position_ids=position, past_key_values=cache).logits)
    assert_near(torch.cat(outputs, 1), model(x, use_cache=False).logits, "logits")


def test_a_state_at_128k_is_small():
    """LoLCATs, 32 layers of Llama-3-8B's shape: at most 90 MB a sequence."""
    config = LolcatsConfig()
    shape = geometry(32, 8, 128, 128)
    mixer = mixer_of(config, shape).float().cuda()
    x = cast(tokens(shape, 1, 2), torch.bfloat16)
    x = x._replace(**{n: t.cuda() for n, t in x._asdict().items() if isinstance(t, torch.Tensor)})
    state = mixer.with_room(mixer(x)[1])
    assert 32 * sum(t.numel() * t.element_size() for t in state) <= 90e6
