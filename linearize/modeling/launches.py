"""Launch settings of the kernels: a tuned table, and the nearest safe setting where it has no row.

A row is measured on one class of device by an explicit tuning run; a launch never tunes. Shared memory is what the
kernel takes at the row's widths, so that a smaller card skips rows that do not fit.
"""

from typing import Any, NamedTuple

import torch


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

# kernel -> settings worth timing on a new device; the first is the table's.
CANDIDATES: dict[str, list[Launch]] = {}


# Decode. HEADS: query heads of a program; BN: keys of the window at once; BO: tokens outside it at once; BK: channels
# of a feature map's weight at once; BV: channels of values that a fold adds at once.
def _step(heads: int, keys: int, channels: int, warps: int, values: int = 64) -> Launch:
    return Launch({"HEADS": heads, "BN": keys, "BO": 16, "BK": channels, "BV": values}, warps, 1)


CANDIDATES["joint_step"] = [
    _step(1, 64, 32, 4, 32),
    _step(1, 64, 32, 4),
    _step(1, 64, 64, 4),
    _step(1, 64, 64, 8),
    _step(2, 64, 64, 8),
    _step(4, 64, 64, 8),
]
CANDIDATES["joint_step_few"] = [
    _step(1, 64, 128, 8),
    _step(1, 128, 128, 8),
    _step(1, 64, 64, 8),
    _step(1, 64, 64, 4),
]


# SPLITS: programs that share the columns of a key/value head's values.
def _fading(splits: int, values: int, warps: int, **blocks: int) -> Launch:
    return Launch({"SPLITS": splits, "BV": values, "BN": 64} | blocks, warps, 1)


CANDIDATES["liger_step"] = [_fading(4, 32, 4), _fading(2, 64, 4), _fading(8, 16, 4), _fading(1, 64, 8)]
CANDIDATES["liger_step_few"] = [_fading(8, 16, 4), _fading(4, 32, 4), _fading(4, 32, 8), _fading(2, 64, 8)]


def _lawcat(channels: int, values: int, warps: int) -> Launch:
    return Launch({"BK": channels, "BV": values, "BN": 64}, warps, 1)


CANDIDATES["lawcat_step"] = [_lawcat(64, 64, 4), _lawcat(64, 128, 8), _lawcat(64, 32, 4), _lawcat(64, 64, 8)]
CANDIDATES["lawcat_step_few"] = [_lawcat(64, 64, 8), _lawcat(128, 128, 8), _lawcat(64, 64, 4)]


# BS: slots of a kept set that are ranked and moved at once.
def _kept(keys: int, slots: int, warps: int) -> Launch:
    return Launch({"BN": keys, "BS": slots}, warps, 1)


CANDIDATES["salient_step"] = [_kept(64, 32, 4), _kept(128, 32, 8), _kept(64, 32, 8), _kept(32, 32, 4)]
CANDIDATES["salient_step_few"] = [_kept(128, 32, 8), _kept(64, 32, 4), _kept(64, 64, 8)]


def _routed(keys: int, slots: int, channels: int, values: int, warps: int) -> Launch:
    return Launch({"BN": keys, "BS": slots, "BK": channels, "BV": values}, warps, 1)


CANDIDATES["still_step"] = [
    _routed(64, 32, 64, 64, 8),
    _routed(64, 32, 32, 32, 8),
    _routed(32, 32, 64, 64, 8),
]
CANDIDATES["still_step_few"] = [_routed(128, 32, 64, 64, 8), _routed(64, 32, 64, 64, 8)]
for _name in (
    "still_step",
    "still_step_few",
    "salient_step",
    "salient_step_few",
    "joint_step",
    "joint_step_few",
    "liger_step",
    "liger_step_few",
    "lawcat_step",
    "lawcat_step_few",
):
    TABLE[_name] = CANDIDATES[_name][:1]


def launch(kernel: str, device: torch.device) -> Launch:
    """The settings of ``kernel`` on ``device``."""
    rows = TABLE[kernel]
    room = shared_memory(device)
    return next((row for row in rows if row.shared <= room), rows[-1])


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take; without a GPU, a data-centre card's."""
    if device.type != "cuda":
        return 227 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
