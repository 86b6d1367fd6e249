"""Kernels of gated linear attention as ``tests/aot.py`` compiles them: chosen settings, heads of 128 and of 64.

The suite has the first mode of every kernel at heads of 128: a minute. ``make aot`` has every mode at both widths, in
several.
"""

import os

import triton.language as tl
from aot import Case, most_spilled

from linearize.modeling import triton_gated as shared
from linearize.modeling import triton_gated_lawcat as lawcat
from linearize.modeling import triton_gated_lawcat_backward as lawcat_back
from linearize.modeling import triton_gated_liger as liger
from linearize.modeling import triton_gated_liger_backward as back
from linearize.modeling import triton_gated_liger_states as states
from linearize.modeling import triton_gated_liger_strong as by_runs
from linearize.modeling import triton_gated_mapped as mapped
from linearize.modeling import triton_gated_taps as taps
from linearize.modeling import triton_gated_window as window
from linearize.modeling.launches import CANDIDATES, Launch

FP32 = {"eps", "factor", "scale", "bias", "inverse", "sharpness", "mix_window", "mix_recurrent"}
# What does not fit beside running sums that are products; as scans they took longer without a spill.
SPILLS = {
    "gated_liger_back_sums 128": 160,
    "gated_liger_queries 128": 16,
    "gated_liger_queries_strong 128": 16,
    "gated_liger_keys 128": 16,
    "gated_liger_outputs_strong 128": 48,
    "gated_liger_keys_strong 128": 48,
    "gated_window_queries 128": 32,
    "gated_window_keys 128": 16,
    "gated_lawcat_keys": 72,
    "gated_lawcat_maps_shared 128": 16,
    "gated_lawcat_states_stop 128": 16,
    "gated_lawcat_values 128": 88,
}
OLDER = {
    "gated_liger_keys_strong 128": 96,
    "gated_lawcat_keys_strong 128": 96,
    "gated_lawcat_states_stop 128": 40,
}
STRIDES = ("_b", "_t", "_h")
STATES = {
    "sums",
    "totals",
    "states",
    "last",
    "start",
    "lse",
    "delta",
    "decays",
    "dphi",
    "change",
    "reached",
    "sums_z",
    "states_z",
    "fine_z",
    "before_z",
    "e",
    "last_z",
    "den",
    "logits",
    "taps",
    "running",
    "norms",
    "norms_q",
    "norms_k",
}
HALF = {"a", "a_q", "a_k"}


def arguments(kernel, constants, pointers: dict[str, str]) -> dict[str, str]:
    """Types of what is no constant."""
    kinds = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        if name in pointers:
            kinds[name] = pointers[name]
        else:
            kinds[name] = "fp32" if name in FP32 else "i32:16" if name[-2:] in STRIDES else "i32"
    return kinds


def case(
    name: str, kernel, pointers: dict[str, str], constants: dict, row: Launch, matrix: bool = True
) -> Case:
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    constants |= {key: value for key, value in row.blocks.items() if key in kernel.arg_names}
    kinds = arguments(kernel, constants, pointers)
    return Case(
        f"{name} {row.blocks} {row.warps} {row.stages}",
        kernel,
        kinds,
        constants,
        row.warps,
        row.stages,
        matrix,
        most_spilled(name, SPILLS, OLDER),
        row.blocks.get("maxnreg"),
    )


def liger_constants(width: int, per_group: int = 4, hgrn2: bool = False) -> dict:
    sizes = {
        "G": 8,
        "H": 32,
        "ADD": True,
        "R": per_group,
        "K": width,
        "KP": width,
        "V": width,
        "VP": width,
        "W": 64,
        "HGRN2": hgrn2,
    }
    return sizes | {
        "C": 64,
        "CS": 256,
        "DTYPE": tl.bfloat16,
        "PRECISION": "ieee",
        "MODE": "sums",
        "STRONG": False,
    }


def lawcat_constants(width: int, per_group: int = 4) -> dict:
    sizes = {
        "f": width // 2,
        "FP": max(64, width // 2),
        "TAPS": 4,
        "FB": 32,
        "HEADS": 1,
        "STARTS": False,
        "STOPS": False,
        "SAVE": False,
    }
    return liger_constants(width, per_group) | sizes


def typed(kernel, float_names=()) -> dict[str, str]:
    """Pointers: fp32 what is summed, the inputs' dtype everything else."""
    scalars = FP32 | {"time", "segments", "per", "rows"}
    pointers = {}
    for name in kernel.arg_names:
        if name in scalars or name.isupper() or name[-2:] in STRIDES:
            continue
        pointers[name] = (
            "*i64"
            if name == "stop"
            else "*i8"
            if name == "strong"
            else "*fp32"
            if name in STATES
            else "*fp16"
            if name in HALF
            else "*bf16"
        )
    return pointers


def cases(candidates: bool = False, every: bool = os.environ.get("LINEARIZE_AOT") == "every"):
    """Chosen settings; with ``candidates`` all of them, at the benchmark's shape alone; ``every`` mode and width."""
    for name, kernel, constants, more in KERNELS:
        for suffix, strong in (("", False), ("_strong", True)):
            if name + suffix not in CANDIDATES:
                continue
            rows = CANDIDATES[name + suffix] if candidates else CANDIDATES[name + suffix][:1]
            made = STRONG.get(name, kernel) if strong else kernel
            for row in rows:
                widths = {128: more if every or (candidates and not strong) else more[:1]}
                if every and name not in WIDE:
                    widths[64] = more
                for width, extra in ((w, e) for w, extras in widths.items() for e in extras):
                    fixed = constants(width) | extra | {"STRONG": strong}
                    label = f"{name}{suffix} {width} {extra or ''}"
                    yield case(label, made, typed(made), fixed, row, matrix=not strong and name not in PLAIN)
    for row in CANDIDATES["gated_scan"][: None if candidates else 1]:
        fixed = dict(SIZE=16384, V=128, F=128, HAS_START=False, REVERSED=False, SHARE=1)
        yield case("gated_scan", shared.scan_kernel, typed(shared.scan_kernel), fixed, row, matrix=False)

    kernel, row = lawcat_back.shares_kernel, Launch({}, 4, 3)
    fixed = dict(V=128, VP=128, BT=64)
    yield case("gated_lawcat_shares", kernel, typed(kernel), fixed, row, matrix=False)
    row = Launch({"BT": taps.LAUNCH["BT"]}, taps.LAUNCH["num_warps"], 3)
    for kernel in (taps.taps_forward_kernel, taps.taps_backward_kernel):
        fixed = dict(H=32, R=4, K=128, BK=taps.CHANNELS, TAPS=4, TILES=taps.TOGETHER)
        pointers = typed(kernel) | ({"dtaps": "*fp32"} if "dtaps" in kernel.arg_names else {})
        yield case("gated_taps", kernel, pointers, fixed, row, matrix=False)


WALKS = ({"MODE": "sums"}, {"MODE": "fine"})
SCANS = ({"HAS_STOP": False, "REVERSED": False}, {"HAS_STOP": True, "REVERSED": True})
KERNELS = [
    ("gated_liger_sums", states.sums_kernel, liger_constants, ({}, {"HGRN2": True})),
    ("gated_liger_scan", states.scan_kernel, liger_constants, SCANS),
    ("gated_liger_outputs", liger.outputs_kernel, liger_constants, ({}, {"HGRN2": True})),
    ("gated_window_queries", window.window_queries_kernel, liger_constants, ({},)),
    ("gated_window_keys", window.window_keys_kernel, liger_constants, ({},)),
    ("gated_liger_back_sums", back.back_sums_kernel, liger_constants, ({},)),
    ("gated_liger_queries", back.queries_kernel, liger_constants, ({}, {"HGRN2": True})),
    ("gated_liger_keys", back.keys_kernel, liger_constants, ({}, {"HGRN2": True})),
    ("gated_liger_gates", back.gates_kernel, liger_constants, ({}, {"HGRN2": True})),
    ("gated_liger_values", by_runs.strong_values_kernel, liger_constants, ({},)),
    ("gated_lawcat_maps", mapped.maps_kernel, lawcat_constants, ({},)),
    ("gated_lawcat_maps_shared", mapped.maps_kernel, lawcat_constants, ({"HEADS": 2},)),
    ("gated_lawcat_gates", mapped.gates_kernel, lawcat_constants, ({},)),
    (
        "gated_lawcat_states",
        lawcat.states_kernel,
        lawcat_constants,
        (*WALKS, {"MODE": "fine", "STARTS": True}, {"MODE": "last"}),
    ),
    (
        "gated_lawcat_states_stop",
        lawcat.states_kernel,
        lawcat_constants,
        ({"MODE": "fine", "STARTS": True, "STOPS": True},),
    ),
    ("gated_lawcat_outputs", lawcat.outputs_kernel, lawcat_constants, ({}, {"SAVE": True})),
    ("gated_lawcat_back_states", lawcat_back.back_states_kernel, lawcat_constants, WALKS),
    ("gated_lawcat_queries", lawcat_back.queries_kernel, lawcat_constants, ({},)),
    ("gated_lawcat_keys", lawcat_back.keys_kernel, lawcat_constants, ({},)),
    ("gated_lawcat_values", lawcat_back.values_kernel, lawcat_constants, ({},)),
]
STRONG = {
    "gated_liger_outputs": liger.strong_outputs_kernel,
    "gated_liger_queries": by_runs.strong_queries_kernel,
    "gated_liger_keys": by_runs.strong_keys_kernel,
}
"""Kernels of strong tiles, where they are not the same kernel; their products are smaller than a warp group's."""
WIDE = ("gated_lawcat_maps_shared",)
"""Kernels that heads of 64 do not launch."""
PLAIN = ("gated_liger_scan", "gated_liger_gates")
"""Kernels without products, or with small ones."""
