"""Decode kernels, through Triton's interpreter in fp32, against the mixers' own steps in fp64: many steps in a row."""

import copy

import pytest
import torch
from tolerances import assert_near

from linearize.modeling.backend import ran
from linearize.modeling.lawcat import LawcatConfig
from linearize.modeling.liger import LigerConfig
from linearize.modeling.linear import LinearConfig
from linearize.modeling.lolcats import LolcatsConfig
from linearize.modeling.mixer import Geometry, MixerInput
from linearize.modeling.registry import METHODS
from linearize.modeling.salient import SalientConfig
from linearize.modeling.still import StillConfig
from linearize.modeling.window import WindowConfig

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"
)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("LINEARIZE_INTERPRET", "1")


def mixer_of(config, geometry, seed=0):
    """A mixer in fp64 whose parameters are random, with scores wide enough to matter."""
    mixer = METHODS[config.name].mixer(config, geometry).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mixer.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise if parameter.ndim == 1 else noise * 1.5 / parameter.shape[-1] ** 0.5)
    return mixer.requires_grad_(False)


def tokens(geometry, rows, time, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(rows, time, *shape, generator=generator, dtype=torch.float64)

    heads, groups, width = geometry.heads, geometry.kv_heads, geometry.key_dim
    parts = dict(
        hidden=random(geometry.hidden),
        q=random(heads, width),
        k=random(groups, width),
        v=random(groups, geometry.value_dim),
        q_plain=random(heads, width),
        k_plain=random(groups, width),
    )
    return MixerInput(**parts, scale=width**-0.5, use_cache=True, **kwargs)


def part(x, start, stop, **changes):
    cut = {n: t[:, start:stop] for n, t in x._asdict().items() if isinstance(t, torch.Tensor) and t.ndim > 2}
    return x._replace(**cut, **changes)


def cast(items, dtype):
    changed = {
        n: t.to(dtype)
        for n, t in items._asdict().items()
        if isinstance(t, torch.Tensor) and t.is_floating_point()
    }
    return items._replace(**changed)


@torch.no_grad()
def compare(config, geometry, lengths, count, *, operation, softcap=None, dtype=torch.float32, device="cpu"):
    """``count`` steps in place after a ragged prompt, against steps in fp64; then a chunk goes on from the state."""
    exact = mixer_of(config, geometry).to(device)
    mixer = copy.deepcopy(exact).float()
    rows, longest, near = len(lengths), max(lengths), torch.bfloat16 if dtype == torch.float16 else dtype
    x = tokens(geometry, rows, longest + count + 7, softcap=softcap)
    x = cast(cast(x, dtype), torch.float64)  # both see the same rounded inputs
    x = x._replace(**{n: t.to(device) for n, t in x._asdict().items() if isinstance(t, torch.Tensor)})
    prompt = part(x, 0, longest, lengths=torch.tensor(lengths, device=device))
    _, state = exact(prompt)
    sums = {
        n: t.float() if n in FLOATS else t.to(dtype)
        for n, t in state._asdict().items()
        if t.is_floating_point()
    }
    held = mixer.with_room(state._replace(**sums))
    held = type(held)(*(t.clone(memory_format=torch.contiguous_format) for t in held))
    for t in range(longest, longest + count):
        expected, state = exact(part(x, t, t + 1), state)
        y, new = mixer(cast(part(x, t, t + 1, in_place=True), dtype), held)
        assert_near(y, expected, "kernel", near)
        for old, made in zip(
            held, new, strict=True
        ):  # what the kernel did not write, as a cache layer takes it over
            if made is not old:
                old.copy_(made)
    assert ran()[operation] == "triton"
    assert torch.equal(held.seen, state.seen)
    rest = part(x, longest + count, longest + count + 7)
    assert_near(mixer(cast(rest, dtype), held)[0], exact(rest, state)[0], "kernel", near)


FLOATS = {"kv", "z", "score", "kept_score", "log_decay", "key", "slots", "tail"}


def geometry(heads, groups, key_dim=16, value_dim=16):
    return Geometry(heads, groups, key_dim, value_dim, 24)


JOINT = {
    "sliding": (LolcatsConfig(window=8, window_kind="sliding"), geometry(2, 1), (11, 3), 20),
    "terraced": (LolcatsConfig(window=4), geometry(2, 1), (1, 7), 13),
    "wide terraces": (LolcatsConfig(window=24), geometry(2, 2), (70, 48), 6),
    "affine, odd widths": (
        LolcatsConfig(window=5, window_kind="sliding", affine_factors=True, feature_dim=12),
        geometry(3, 1, 20, 24),
        (9,),
        19,
    ),
    "linear": (LinearConfig(), geometry(2, 1), (2,), 18),
    "pure": (LolcatsConfig(window=None), geometry(2, 1), (1,), 18),
    "tied to the group": (LolcatsConfig(window=8, kv_tied_map=True), geometry(4, 2), (9,), 12),
    "tied to the group, sliding": (
        LolcatsConfig(window=8, window_kind="sliding", kv_tied_map=True),
        geometry(3, 1),
        (9,),
        19,
    ),
    "one map": (LolcatsConfig(window=4, tie_qk_map=True), geometry(2, 2), (5,), 12),
}
JOINT |= {
    name: (
        LolcatsConfig(window=4, window_kind="sliding", feature_map=name, feature_dim=16),
        geometry(1, 1),
        (7,),
        18,
    )
    for name in ("hedgehog_half", "t2r", "elu", "exp", "np_map", "np_map_plain")
}


@pytest.mark.parametrize("name", JOINT)
def test_window_and_sums(name):
    config, shape, lengths, count = JOINT[name]
    compare(config, shape, lengths, count, operation="joint_step")


def test_window_and_sums_with_a_softcap():
    compare(LolcatsConfig(window=4), geometry(2, 1), (6,), 10, operation="joint_step", softcap=3.0)


WINDOW = {
    "window sliding": (WindowConfig(window=8), geometry(4, 2), (7,), 10),
    "window terraced": (WindowConfig(window=4, window_kind="terraced"), geometry(4, 1), (13,), 8),
    "window and sinks": (WindowConfig(window=5, sinks=3), geometry(2, 2, 20, 12), (1, 5), 8),
    "more keys than a tile": (WindowConfig(window=70, sinks=2), geometry(1, 1), (90,), 4),
}


@pytest.mark.parametrize("name", WINDOW)
def test_window(name):
    config, shape, lengths, count = WINDOW[name]
    compare(config, shape, lengths, count, operation="window_step")


STEPS = {
    "gla": (LigerConfig(window=8), geometry(4, 2), (3, 11), 12),
    "hgrn2": (LigerConfig(variant="hgrn2", window=5, hgrn2_lower_bound=0.2), geometry(3, 1, 20, 24), (7,), 8),
    "gla, learnt and normalised": (
        LigerConfig(
            window=4,
            normalize=True,
            train_mix="head",
            train_gate_bias=True,
            train_key_temperature=True,
            rope_on_recurrent=True,
        ),
        geometry(4, 2, 16, 48),
        (3,),
        5,
    ),
    "no window": (LigerConfig(window=None, feature_map="identity", train_mix=None), geometry(2, 2), (4,), 4),
    "no recurrence": (LigerConfig(window=4, mix_recurrent=0.0), geometry(2, 1), (4,), 6),
    "lawcat": (LawcatConfig(), geometry(4, 2), (2, 9), 6),
    "lawcat beside a window": (
        LawcatConfig(window=8, tie_qk_map=False, conv_tied=True, gate_bias=2.0),
        geometry(3, 1, 20, 24),
        (6,),
        12,
    ),
    "lawcat, keys convolved": (LawcatConfig(conv_on="k", feature_map="np_map"), geometry(2, 2), (5,), 6),
    "salient": (SalientConfig(budget=6, chunk=4, score_dim=6), geometry(2, 1), (19,), 9),
    "salient, budgets by head": (
        SalientConfig(budget=(9, 2, 2), chunk=4, score_dim=6),
        geometry(6, 3),
        (19, 6),
        9,
    ),
    "salient with a context": (
        SalientConfig(budget=40, chunk=3, score_dim=6, score_context=5),
        geometry(3, 1, 20, 24),
        (130,),
        8,
    ),
    "still": (
        StillConfig(chunk=4, salient_per_chunk=2, budget=5, feature_dim=16),
        geometry(2, 1),
        (17,),
        9,
    ),
    "still, all kept": (
        StillConfig(chunk=3, salient_per_chunk=1, budget=20, gate="per_head", keep_first=False),
        geometry(2, 1, 20, 24),
        (7,),
        4,
    ),
    "still by position": (
        StillConfig(
            chunk=4, salient_per_chunk=3, budget=4, gate="none", score="random", feature_map="hedgehog"
        ),
        geometry(2, 2),
        (9,),
        12,
    ),
    "lawcat, nothing convolved": (LawcatConfig(conv_size=None, rope=True), geometry(2, 1), (5,), 4),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_of_other_methods(name):
    config, shape, lengths, count = STEPS[name]
    compare(config, shape, lengths, count, operation=f"{config.name}_step")
