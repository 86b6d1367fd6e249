"""Launch settings of the kernels: the defaults, and those worth timing.

A launch never tunes: it takes a row that was measured for the device (``tuned.py``), else the first default that fits
the card. Shared memory is what a kernel takes at the row's widths, so that a smaller card skips rows that do not fit.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """How one kernel is launched: its compile-time block sizes, warps a program, and stages of its loops."""

    blocks: dict[str, int]
    warps: int
    stages: int
    shared: int = 0
    """Bytes of shared memory a program takes, as compiled for sm_90 at 16-bit inputs; 0 is unknown."""

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of a launch."""
        return {**self.blocks, "num_warps": self.warps, "num_stages": self.stages}


# kernel -> rows from the most to the least demanding; the first that fits is launched.
TABLE: dict[str, list[Launch]] = {}

# kernel -> settings worth timing on a device, the default first.
#
# Joint kernels: ``_near`` is for windows of one tile; ``_terraced`` where the windows of all rows of a tile begin at
# one key. Registers are capped where three programs or more then share a multiprocessor.
CANDIDATES: dict[str, list[Launch]] = {
    "joint_states": [
        Launch({"EVERY": every}, warps, stages)
        for every, warps, stages in ((1, 4, 2), (1, 4, 1), (1, 4, 3), (2, 4, 2), (4, 4, 2))
    ],
    "joint_outputs": [Launch({}, 4, stages) for stages in (1, 2)],
    "joint_outputs_near": [Launch({"maxnreg": most}, 4, 1) for most in (168, 255)],
    "joint_outputs_near_terraced": [Launch({"maxnreg": most}, 4, 1) for most in (168, 255)],
    "joint_queries_transfer": [Launch({"maxnreg": most}, 4, 1) for most in (168, 255)],
    "joint_queries_transfer_terraced": [Launch({"maxnreg": most}, 4, 1) for most in (168, 255)],
    "joint_queries_full": [Launch({"maxnreg": most}, 4, 1) for most in (168, 255)],
    "joint_queries_full_terraced": [Launch({"maxnreg": most}, 4, 1) for most in (168, 255)],
    "joint_keys": [Launch({"maxnreg": most}, 4, 1) for most in (168, 255)],
    "joint_keys_terraced": [Launch({"maxnreg": most}, 4, 1) for most in (128, 168)],
    "joint_inputs": [Launch({"STAGES": inner}, 4, outer) for outer, inner in ((1, 2), (1, 1))],
    "joint_inputs_terraced": [
        Launch({"STAGES": inner}, 4, outer) for outer, inner in ((3, 2), (1, 2), (1, 1))
    ],
    "joint_maps": [Launch({}, 4, stages) for stages in (2, 3)],
}
CANDIDATES["selected_ranks"] = [
    Launch({"rows": 128, "columns": 32}, 4, 2),
    Launch({"rows": 128, "columns": 64}, 4, 2),
    Launch({"rows": 64, "columns": 64}, 4, 2),
]
CANDIDATES["selected_replay"] = [
    Launch({"rows": 128}, 4, 2),
    Launch({"rows": 64}, 4, 2),
    Launch({"rows": 64}, 2, 2),
    Launch({"rows": 256}, 8, 2),
]
CANDIDATES["selected_kept_forward"] = [
    Launch({"heads": 2, "keys": 64}, 8, 2),
    Launch({"heads": 2, "keys": 64}, 8, 3),
    Launch({"heads": 2, "keys": 128}, 8, 2),
    Launch({"heads": 1, "keys": 64}, 4, 2),
    Launch({"heads": 1, "keys": 64}, 4, 3),
    Launch({"heads": 1, "keys": 32}, 4, 3),
]
CANDIDATES["selected_kept_dq"] = [
    Launch({"heads": 2, "keys": 32}, 8, 2),
    Launch({"heads": 2, "keys": 64}, 8, 2),
    Launch({"heads": 1, "keys": 64}, 4, 2),
    Launch({"heads": 1, "keys": 32}, 4, 2),
    Launch({"heads": 1, "keys": 64}, 8, 2),
]
CANDIDATES["selected_routed_dq"] = [
    Launch({"heads": 1, "keys": 32}, 4, 2),
    Launch({"heads": 1, "keys": 32}, 4, 3),
    Launch({"heads": 1, "keys": 64}, 8, 2),
]
CANDIDATES["selected_kept_dkv"] = [
    Launch({"tokens": 128, "queries": 32}, 8, 2),
    Launch({"tokens": 128, "queries": 64}, 8, 2),
    Launch({"tokens": 64, "queries": 32}, 4, 2),
    Launch({"tokens": 64, "queries": 64}, 4, 2),
    Launch({"tokens": 64, "queries": 32}, 4, 3),
]
CANDIDATES["selected_local_dkv"] = [
    Launch({"tokens": 64, "queries": 64}, 8, 2),
    Launch({"tokens": 64, "queries": 32}, 4, 2),
    Launch({"tokens": 64, "queries": 64}, 4, 2),
    Launch({"tokens": 64, "queries": 32}, 4, 3),
]
CANDIDATES["selected_row_sums"] = [
    Launch({"queries": 128, "keys": 64}, 8, 3),
    Launch({"queries": 128, "keys": 128}, 8, 2),
    Launch({"queries": 64, "keys": 64}, 4, 3),
]
CANDIDATES["selected_column_max"] = [
    Launch({"queries": 64, "keys": 128}, 8, 3),
    Launch({"queries": 128, "keys": 128}, 8, 2),
    Launch({"queries": 64, "keys": 64}, 4, 3),
]
CANDIDATES["selected_saliency"] = [
    Launch({"heads": 1}, 4, 1),
    Launch({"heads": 2}, 8, 1),
    Launch({"heads": 2}, 4, 1),
]
CANDIDATES["selected_states"] = [Launch({}, 4, 3), Launch({}, 4, 2), Launch({}, 4, 1)]
CANDIDATES["selected_reverse"] = [Launch({}, 4, 1), Launch({}, 4, 2)]
CANDIDATES["selected_outputs"] = [
    Launch({"keys": 64}, 4, 2),
    Launch({"keys": 64}, 4, 1),
    Launch({"keys": 64}, 4, 3),
]
CANDIDATES["selected_features"] = [Launch({}, 8, 2), Launch({}, 8, 1), Launch({}, 8, 3)]
CANDIDATES["selected_values"] = [Launch({}, 4, 2), Launch({}, 4, 1)]
for name, settings in CANDIDATES.items():
    TABLE.setdefault(name, settings[:1])


# Decode. HEADS: query heads of a program; BN: keys of the window at once; BO: tokens outside it at once; BK: channels
# of a feature map's weight at once; BV: channels of values that a fold adds at once; BF: features of a sum at once;
# DEPTH: tiles of a loop on their way. Few warps: what they tell each other takes longer than the loads.
def _step(heads: int, channels: int, features: int, depth: int, warps: int, keys: int = 64) -> Launch:
    blocks = {"HEADS": heads, "BN": keys, "BO": 16, "BK": channels, "BV": 32, "BF": features, "DEPTH": depth}
    return Launch(blocks, warps, 1)


CANDIDATES["joint_step"] = [
    _step(2, 64, 32, 2, 2),
    _step(2, 32, 32, 2, 2),
    _step(1, 64, 32, 2, 2),
    _step(1, 64, 32, 2, 4),
]
# Heads of more than 128 channels, or maps of as many features in each half: two warps have too few registers.
CANDIDATES["joint_step_wide"] = [_step(1, 32, 16, 2, 4), _step(1, 64, 16, 2, 4), _step(1, 64, 32, 2, 8)]
CANDIDATES["joint_step_few"] = [
    _step(1, 128, 64, 1, 4),
    _step(1, 64, 64, 1, 4),
    _step(1, 128, 64, 2, 4),
    _step(1, 128, 64, 1, 8),
]


# SPLITS: programs that share the columns of a key/value head's values.
def _fading(splits: int, values: int, depth: int, warps: int) -> Launch:
    return Launch({"SPLITS": splits, "BV": values, "BN": 64, "DEPTH": depth}, warps, 1)


CANDIDATES["liger_step"] = [
    _fading(1, 128, 1, 4),
    _fading(1, 128, 2, 4),
    _fading(2, 64, 2, 2),
    _fading(2, 64, 2, 4),
]
CANDIDATES["liger_step_few"] = [_fading(8, 16, 1, 4), _fading(4, 32, 1, 4), _fading(4, 32, 2, 4)]


def _lawcat(channels: int, values: int, warps: int) -> Launch:
    return Launch({"BK": channels, "BV": values, "BN": 64}, warps, 1)


CANDIDATES["lawcat_step"] = [_lawcat(64, 64, 2), _lawcat(64, 32, 2), _lawcat(64, 64, 4)]
CANDIDATES["lawcat_step_few"] = [_lawcat(128, 128, 8), _lawcat(64, 64, 4), _lawcat(64, 64, 8)]


# BS: slots of a kept set that are ranked and moved at once.
def _kept(keys: int, slots: int, depth: int, warps: int) -> Launch:
    return Launch({"BN": keys, "BS": slots, "DEPTH": depth}, warps, 1)


CANDIDATES["salient_step"] = [_kept(64, 32, 2, 4), _kept(64, 32, 3, 4), _kept(32, 32, 3, 4)]
CANDIDATES["salient_step_few"] = [_kept(64, 32, 3, 4), _kept(32, 32, 3, 4), _kept(128, 32, 2, 8)]


# Registers are capped: routing, which few steps do, would have those of programs that run beside this one.
def _routed(keys: int, channels: int, values: int, features: int, warps: int, registers: int) -> Launch:
    sizes = {"BN": keys, "BS": 32, "BO": 16, "BK": channels, "BV": values, "BF": features, "DEPTH": 2}
    return Launch(sizes | {"maxnreg": registers}, warps, 1)


CANDIDATES["still_step"] = [
    _routed(32, 32, 16, 16, 4, 128),
    _routed(64, 32, 32, 16, 2, 255),
    _routed(64, 32, 32, 16, 4, 168),
    _routed(64, 32, 32, 16, 4, 255),
]
CANDIDATES["still_step_few"] = [
    _routed(64, 64, 32, 32, 8, 255),
    _routed(128, 64, 32, 32, 8, 255),
    _routed(64, 32, 32, 16, 4, 255),
]
for _name in (
    "still_step",
    "still_step_few",
    "salient_step",
    "salient_step_few",
    "joint_step",
    "joint_step_wide",
    "joint_step_few",
    "liger_step",
    "liger_step_few",
    "lawcat_step",
    "lawcat_step_few",
):
    TABLE[_name] = CANDIDATES[_name][:1]


def cdiv(length: int, size: int) -> int:
    """How many tiles of ``size`` hold so much; Triton's own function is made for kernels, and slow on the host."""
    return -(-length // size)


def power_of_two(width: int, least: int = 1) -> int:
    """The power of two that holds a width."""
    return max(least, 1 << (width - 1).bit_length())


def launch(
    kernel: str,
    device: torch.device,
    *,
    K: int | None = None,
    V: int | None = None,
    F: int | None = None,
    dtype: torch.dtype | None = None,
) -> Launch:
    """The settings of ``kernel`` on ``device``, at the widths and the type of its inputs.

    Every launch gives those that its tiles grow with: a row measured without them is taken at any.
    """
    from .tuned import chosen  # here, because it reads the tables of this file

    if (found := chosen(kernel, device, K, V, F, dtype)) is not None:
        return found
    rows, factor = TABLE[kernel], 1 if dtype is None else dtype.itemsize / 2
    room = shared_memory(device)
    return next((row for row in rows if row.shared * factor <= room), rows[-1])


def widths_of(q: Tensor, v: Tensor | None = None, weight: Tensor | None = None) -> dict[str, Any]:
    """What :func:`launch` is told of queries or keys [..., K], values [..., V] and the weight [..., F] of a map."""
    V, F = (None if x is None else x.shape[-1] for x in (v, weight))
    return {"K": q.shape[-1], "V": V, "F": F, "dtype": q.dtype}


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take; without a GPU, a data-centre card's."""
    if device.type != "cuda":
        return HOPPER
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


HOPPER = 227 * 1024
# Kernels whose names begin so -> the most shared memory that one takes for 16-bit inputs and heads of 128, as compiled
# for sm_90. Kernels of other names take less than any of them.
MOST_SHARED = {
    "joint_step": 75_776,
    "joint": 99_616,
    "salient_step": 71_680,
    "selected_features": 131_072,
    "selected": 115_456,
    "gated_liger": 163_840,
    "gated_window": 98_304,
    "gated_lawcat": 132_096,
}
# Operation -> the families that it launches, forward and backward; of small steps, one that takes more than they do.
LAUNCHES_OF = {
    **dict.fromkeys(("mapped_attention", "mapped_error"), ("joint",)),
    **dict.fromkeys(("kept_attention", "future_attention", "self_saliency"), ("selected",)),
    "routed_prefill": ("selected", "selected_features"),
    "averaged_attention": ("gated_liger", "gated_window"),
    "convolved_attention": ("gated_lawcat",),
    **dict.fromkeys(
        ("window_step", "joint_step", "liger_step", "lawcat_step", "still_step"), ("joint_step",)
    ),
    "salient_step": ("salient_step",),
}


def no_room(operation: str, x: Tensor) -> str | None:
    """Why the GPU of x has too little shared memory for an operation's kernels, in words; None where it has enough."""
    if (
        torch.compiler.is_compiling()
        or x.device.type != "cuda"
        or (room := shared_memory(x.device)) >= HOPPER
    ):
        return None
    need = max(MOST_SHARED[family] for family in LAUNCHES_OF[operation]) * x.element_size() // 2
    if need <= room:
        return None
    return f"its kernels take {need // 1024} KB of shared memory, and the GPU gives a program {room // 1024}"


# Gated linear attention: C and CS, tokens of a tile and of a segment, are those of the row of sums or states for all
# kernels.
CANDIDATES |= {
    "gated_scan": [Launch({"BN": 512}, 4, 1), Launch({"BN": 256}, 2, 1), Launch({"BN": 1024}, 4, 1)],
    # Shared memory is what the greediest kernel of such tiles takes; fp32 has smaller ones.
    "gated_liger_sums": [
        Launch({"C": size}, warps, 1, 147456 * size // 64) for size, warps in ((64, 4), (64, 8), (32, 4))
    ],
    "gated_liger_scan": [
        Launch({"BV": size, "STAGES": stages}, 4, 1) for size, stages in ((4, 4), (4, 1), (2, 6), (8, 3))
    ],
    "gated_liger_outputs": [
        Launch({"HEADS": heads, "BK": 64}, warps, 1) for heads, warps in ((2, 8), (1, 4), (1, 8), (4, 8))
    ],
    "gated_liger_outputs_strong": [Launch({"BK": 32}, 8, 1)],
    "gated_window_queries": [
        Launch({"BT": 64, "BK": size}, 4, stages, shared)
        for size, stages, shared in ((64, 2, 131072), (32, 1, 0), (64, 1, 0), (32, 2, 0))
    ],
    "gated_window_keys": [
        Launch({"BT": 32, "BK": 64}, 4, 2),
        Launch({"BT": 32, "BK": 64}, 4, 1),
        Launch({"BT": 32, "BK": 128}, 8, 1),
    ],
    "gated_liger_back_sums": [
        Launch({"STAGES": stages}, warps, 1) for stages, warps in ((2, 4), (1, 4), (1, 8))
    ],
    "gated_liger_queries": [
        Launch({"STAGES": stages}, warps, 1, shared)
        for stages, warps, shared in ((2, 8, 163840), (1, 8, 0), (1, 4, 0))
    ],
    "gated_liger_keys": [
        Launch({"BT": size, "STAGES": stages}, warps, 1)
        for size, stages, warps in ((32, 2, 4), (32, 1, 4), (16, 1, 4), (32, 1, 8))
    ],
    "gated_liger_gates": [
        Launch({"BT": tokens, "BV": size}, warps, 1)
        for tokens, size, warps in ((32, 64, 4), (16, 64, 4), (32, 128, 4), (64, 64, 8))
    ],
    **{f"gated_liger_{kernel}_strong": [Launch({}, 8, 1)] for kernel in ("queries", "keys", "values")},
    "gated_lawcat_maps": [Launch({"BT": 64, "BK": 64}, 4, 2), Launch({"BT": 64, "BK": 32}, 4, 3)],
    # Registers are capped so that a multiprocessor has room for one program more.
    "gated_lawcat_maps_shared": [
        Launch({"BT": 64, "BK": size, "maxnreg": 168}, 4, stages) for size, stages in ((64, 2), (32, 3))
    ],
    "gated_lawcat_gates": [Launch({}, 4, 1)],
    "gated_lawcat_states": [
        Launch({"C": 64, "CS": 256, "maxnreg": registers}, 4, stages)
        for registers, stages in ((168, 2), (224, 3), (255, 2), (255, 1))
    ],
    "gated_lawcat_states_stop": [Launch({}, 4, 2)],
    "gated_lawcat_outputs": [
        Launch({"FB": 32, "HEADS": heads}, 4, stages) for heads, stages in ((2, 1), (1, 1), (4, 1), (1, 2))
    ],
    "gated_lawcat_outputs_strong": [Launch({"FB": 64}, 8, 1)],
    "gated_lawcat_back_states": [Launch({}, 4, stages) for stages in (2, 1, 3)],
    **{
        f"gated_lawcat_{kernel}{strong}": [Launch({}, 8 if strong else 4, 1)]
        for kernel in ("queries", "keys")
        for strong in ("", "_strong")
    },
    "gated_lawcat_values": [Launch({"maxnreg": 128}, 8, 1), Launch({"maxnreg": 255}, 4, 1)],
    "gated_lawcat_values_strong": [Launch({}, 8, 1)],
}
TABLE.update({kernel: [rows[0]] for kernel, rows in CANDIDATES.items() if kernel.startswith("gated")})
# Where fp32, or a smaller card, has no room for the first.
TABLE["gated_liger_sums"] = CANDIDATES["gated_liger_sums"]
for _name in ("gated_liger_queries", "gated_window_queries"):
    TABLE[_name] = CANDIDATES[_name][:2]
