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
TABLE: dict[str, list[Launch]] = {
    "joint_states": [Launch({"EVERY": 1}, 8, 1)],
    "joint_outputs": [Launch({}, 4, 1)],
    "joint_queries_transfer": [Launch({}, 4, 1)],
    "joint_queries_full": [Launch({}, 8, 1)],
    "joint_keys": [Launch({}, 4, 1)],
    "joint_inputs": [Launch({}, 8, 1)],
    "joint_maps": [Launch({}, 4, 2)],
}

# kernel -> the settings that a sweep times, the default first.
CANDIDATES: dict[str, list[Launch]] = {}

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
CANDIDATES["selected_states"] = [Launch({}, 8, 2), Launch({}, 8, 1), Launch({}, 4, 1), Launch({}, 8, 3)]
CANDIDATES["selected_linear"] = [Launch({}, 4, 2), Launch({}, 4, 1), Launch({}, 8, 2), Launch({}, 4, 3)]
CANDIDATES["selected_outputs"] = [
    Launch({"heads": 1, "keys": 64}, 4, 2),
    Launch({"heads": 1, "keys": 64}, 4, 3),
    Launch({"heads": 1, "keys": 128}, 4, 2),
    Launch({"heads": 1, "keys": 32}, 4, 3),
]
CANDIDATES["selected_reverse"] = [Launch({}, 8, 2), Launch({}, 8, 1)]
CANDIDATES["selected_features"] = [Launch({}, 8, 2), Launch({}, 8, 1), Launch({}, 8, 3)]
CANDIDATES["selected_values"] = [Launch({}, 4, 2), Launch({}, 4, 1)]
for name, settings in CANDIDATES.items():
    TABLE.setdefault(name, settings[:1])


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
