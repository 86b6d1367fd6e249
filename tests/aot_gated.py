"""Kernels of gated linear attention as ``tests/aot.py`` compiles them: chosen settings, heads of 128 and of 64."""

import triton.language as tl
from aot import Case

from linearize.modeling import triton_gated as shared
from linearize.modeling import triton_gated_liger as liger
from linearize.modeling.launches import CANDIDATES, Launch

FP32 = {"eps", "factor", "scale", "bias", "inverse", "sharpness", "mix_window", "mix_recurrent"}
STRIDES = ("_b", "_t", "_h")
STATES = {
    "sums",
    "totals",
    "states",
    "last",
    "start",
    "lse",
    "delta",
    "dphi",
    "inner",
    "sums_z",
    "states_z",
    "fine_z",
    "last_z",
    "den",
    "logits",
    "taps",
    "taps_q",
    "taps_k",
}


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
    sizes = {"f": width // 2, "FP": width // 2, "TAPS": 4, "TAPS_Q": 4, "TAPS_K": 4, "SAVE": False}
    return liger_constants(width, per_group) | sizes


def typed(kernel, float_names=()) -> dict[str, str]:
    """Pointers: fp32 what is summed, the inputs' dtype everything else."""
    scalars = FP32 | {"time", "segments"}
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
            else "*bf16"
        )
    return pointers


def liger_case(name: str, kernel, row: Launch, width: int, per_group: int = 4, **more) -> Case:
    constants = liger_constants(width, per_group) | more
    return case(f"{name} {width}/{per_group} {more or ''}", kernel, typed(kernel), constants, row)


LIGER = {"gated_liger_states": liger.states_kernel, "gated_liger_outputs": liger.outputs_kernel}


def cases(candidates: bool = False):
    for name, kernel in LIGER.items():
        rows = CANDIDATES[name]
        for row in rows if candidates else rows[:1]:
            for width, per_group in ((128, 4),) if candidates else ((128, 4), (64, 4)):
                yield liger_case(name, kernel, row, width, per_group)
    for mode in ("fine", "last"):
        yield liger_case(
            "gated_liger_states", liger.states_kernel, CANDIDATES["gated_liger_states"][0], 128, MODE=mode
        )
    for row in CANDIDATES["gated_scan"]:
        constants = dict(SIZE=16384, V=128, F=128, HAS_START=False, REVERSED=False, SHARE=1)
        yield case("gated_scan", shared.scan_kernel, typed(shared.scan_kernel), constants, row, matrix=False)
