"""LoLCATs as its authors' code computes it: every array of golden/lolcats.npz."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import assert_near
from torch import Tensor

from linearize.modeling.feature_maps import FEATURE_MAPS
from linearize.modeling.reference import fold, joint_chunked, joint_quadratic, joint_recurrent, window_mask

ARRAYS = dict(np.load(Path(__file__).parent / "golden" / "lolcats.npz"))
WINDOW = int(ARRAYS["window_size"])
KINDS = {"sw": "sliding", "terrace": "terraced"}
CASES = [(name, int(length)) for name, length in (("sw", 3), ("sw", 13), ("terrace", 16))]


def golden(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """The array of this name, time before heads: [B, T, heads, D]."""
    return torch.from_numpy(ARRAYS[name]).to(dtype).transpose(1, 2)


def layer(length: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, phi_q, phi_k and g of the first ``length`` positions."""
    q, k, v = (golden(name, dtype)[:, :length] for name in ("q", "k", "v"))
    phi = []
    for x, name in ((q, "Wq"), (k, "Wk")):
        weight = torch.from_numpy(ARRAYS[name]).to(dtype)
        feature_map = FEATURE_MAPS["hedgehog"](weight.shape[0], weight.shape[1], 2 * weight.shape[2]).to(
            dtype
        )
        with torch.no_grad():
            feature_map.weight.copy_(weight)
            phi.append(feature_map(x))
    return [q, k, v, *phi, torch.from_numpy(ARRAYS["window_logit"]).to(dtype).flatten().sigmoid()]


def terms(name: str) -> dict:
    return {"scale": ARRAYS["q"].shape[-1] ** -0.5, "window": WINDOW, "window_kind": KINDS[name]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("attention", [joint_quadratic, joint_chunked])
@pytest.mark.parametrize(("name", "length"), CASES)
def test_outputs_are_the_authors(name, length, attention, dtype):
    y = attention(*layer(length, dtype), **terms(name))
    assert_near(y, golden(f"{name}.L{length}.y"), "golden")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("attention", [joint_quadratic, joint_chunked])
@pytest.mark.parametrize(("name", "length"), [case for case in CASES if case != ("sw", 3)])
def test_weights_are_the_authors(name, length, attention, dtype):
    """With unit vectors for values the output of a row is its weights."""
    q, k, _, *rest = layer(length, dtype)
    units = torch.eye(length, dtype=dtype)[None, :, None].expand(k.shape[0], -1, k.shape[2], -1)
    weights = attention(q, k, units, *rest, **terms(name)).transpose(1, 2)
    assert_near(weights, torch.from_numpy(ARRAYS[f"{name}.L{length}.weights"]), "golden")


@pytest.mark.parametrize(("name", "length"), CASES)
def test_masks_are_the_authors(name, length):
    masks = window_mask(length, WINDOW, KINDS[name])
    for mask, part in zip(masks, ("window", "linear"), strict=True):
        assert torch.equal(mask, torch.from_numpy(ARRAYS[f"{name}.L{length}.mask_{part}"]).bool())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_decoding_leaves_the_authors_window_and_state(dtype):
    """Prefill of three tokens, then single steps with a ring of W slots: caches, states and outputs."""
    q, k, v, phi_q, phi_k, g = layer(19, dtype)
    heads, start = q.shape[2], 3
    kv, z = q.new_zeros(2, heads, phi_q.shape[-1], v.shape[-1]), q.new_zeros(2, heads, phi_q.shape[-1])
    ring = torch.full((2, WINDOW), -1)  # the position in each slot
    ring[:, :start] = torch.arange(start)

    def check(when: str, seen: int) -> None:
        positions = ring[0][ring[0] >= 0].sort().values
        for cache, kept in (("k_cache", k), ("v_cache", v)):
            repeated = kept[:, positions].repeat_interleave(heads // kept.shape[2], dim=2)
            assert_near(repeated, golden(f"sw.decode_from3.{when}.{cache}"), "golden")
        assert positions[-1] == seen - 1
        assert_near(kv, torch.from_numpy(ARRAYS[f"sw.decode_from3.{when}.kv_state"]), "golden", dtype)
        assert_near(
            z[:, :, None], torch.from_numpy(ARRAYS[f"sw.decode_from3.{when}.k_state"]), "golden", dtype
        )

    check("after_prefill", start)
    rows = []
    for t in range(start, 19):
        leaving = max(t - WINDOW, 0)
        kv, z = fold(kv, z, phi_k[:, [leaving]], v[:, [leaving]], torch.full((2, 1), t >= WINDOW))
        ring[:, t % WINDOW] = t
        slots = ring[0].clamp(min=0)
        rows.append(
            joint_recurrent(
                q[:, [t]],
                k[:, slots],
                v[:, slots],
                phi_q[:, [t]],
                None,
                g,
                key_positions=ring,
                query_positions=torch.full((2, 1), t),
                state=(kv, z),
                **terms("sw"),
            )
        )
    check("final", 19)
    assert_near(torch.cat(rows, dim=1), golden("sw.decode_from3.y"), "golden")


def test_every_array_is_used():
    inputs = {"q", "k", "v", "Wq", "Wk", "window_logit", "window_size"}
    cases = {f"{n}.L{m}.{part}" for n, m in CASES for part in ("y", "mask_window", "mask_linear", "weights")}
    decode = {
        f"sw.decode_from3.{when}.{part}"
        for when in ("after_prefill", "final")
        for part in ("k_cache", "v_cache", "kv_state", "k_state")
    }
    assert set(ARRAYS) == inputs | (cases - {"sw.L3.weights"}) | decode | {"sw.decode_from3.y"}
