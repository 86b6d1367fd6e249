"""What the options of LoLCATs mean, on one mixer: shared maps, the window factor, the precision of long sums."""

import pytest
import torch
from tiny import randomise
from tolerances import assert_near

from linearize.modeling.feature_maps import FEATURE_MAPS
from linearize.modeling.lolcats import LolcatsConfig, LolcatsMixer
from linearize.modeling.mixer import Geometry, MixerInput
from linearize.modeling.reference import joint_quadratic

GEOMETRY = Geometry(heads=4, kv_heads=2, key_dim=6, value_dim=5, hidden=16)
WINDOW = dict(window=8, window_kind="sliding")
T = 40


def mixer(dtype: torch.dtype = torch.float64, **fields) -> LolcatsMixer:
    made = LolcatsMixer(LolcatsConfig(**(WINDOW | fields)), GEOMETRY)
    return randomise(made, seed=3).to(dtype)


def inputs(length: int = T, *, dtype: torch.dtype = torch.float64, seed: int = 0, **fields) -> MixerInput:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(16,), (4, 6), (2, 6), (2, 5)]
    parts = (torch.randn(1, length, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return MixerInput(*(part.to(dtype) for part in parts), scale=0.4, **fields)


def test_a_map_shared_by_a_group_is_the_faithful_one_with_equal_rows():
    """And its state is as many times smaller as a group has heads."""
    tied, faithful, x = mixer(kv_tied_map=True), mixer(), inputs(use_cache=True)
    with torch.no_grad():
        faithful.map_k.weight.copy_(tied.map_k.weight.repeat_interleave(2, dim=0))
        (y, small), (expected, large) = tied(x), faithful(x)
    assert_near(y, expected, "kernel")
    assert_near(small.kv.repeat_interleave(2, dim=1), large.kv, "kernel")
    assert small.z.numel() * 2 == large.z.numel()


def test_one_map_for_queries_and_keys_is_two_equal_ones():
    tied, two = mixer(tie_qk_map=True), mixer()
    assert [name for name, _ in tied.named_parameters()] == ["window_logit", "map_q.weight"]
    with torch.no_grad():
        two.map_q.weight.copy_(tied.map_q.weight)
        two.map_k.weight.copy_(tied.map_q.weight)
    assert_near(tied(inputs())[0], two(inputs())[0], "kernel")


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_the_mixer_is_its_formula(name, affine):
    """The window weighs g, the rest 1, or 1 - g with affine factors."""
    made, x = mixer(feature_map=name, affine_factors=affine), inputs(softcap=2.0)
    g = made.window_logit.sigmoid()
    terms = dict(scale=x.scale, softcap=x.softcap, **WINDOW)
    phi = made.map_q(x.q), made.map_k(x.k)
    expected = joint_quadratic(x.q, x.k, x.v, *phi, g, 1 - g if affine else None, **terms)
    assert_near(made(x)[0], expected, "kernel")


def test_the_window_factor_starts_at_a_tenth_and_learns_only_where_asked():
    fresh = LolcatsMixer(LolcatsConfig(**WINDOW), GEOMETRY)
    assert_near(fresh.window_logit.sigmoid(), torch.full((4,), 0.1), "kernel")
    assert fresh.window_logit.requires_grad
    assert not mixer(train_window_logit=False).window_logit.requires_grad
    assert not mixer(window=None).window_logit.requires_grad  # nothing would depend on it


def test_a_long_bf16_decode_keeps_its_sums():
    """32K tokens, the last two thousand one by one; fp32 sums stay within 1e-3 of fp64 (bf16 ones lose most)."""
    made, length = mixer(torch.float32), 32768
    x = inputs(length, dtype=torch.bfloat16, use_cache=True)
    state, start = None, 0
    with torch.no_grad():
        while start < length:
            stop = start + (512 if start < length - 2048 else 1)
            _, state = made(x._replace(**{n: getattr(x, n)[:, start:stop] for n in "qkv"}), state)
            start = stop
        exact = made.double().map_k(x.k[:, : int(state.folded)].double()).sum(1)
    assert state.z.dtype == torch.float32 and int(state.seen) == length
    assert (state.z - exact).norm() <= 1e-3 * exact.norm()
