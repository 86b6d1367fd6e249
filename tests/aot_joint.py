"""The joint kernels at the widths of Llama-3 (128) and of small heads (64), as they are launched on an H200."""

from collections.abc import Iterator
from typing import Any

from aot import Case

from linearize.modeling import triton_joint as forward
from linearize.modeling import triton_joint_backward as backward
from linearize.modeling import triton_joint_keys as keys
from linearize.modeling import triton_joint_sums as sums
from linearize.modeling.launches import TABLE


def cases() -> Iterator[Case]:
    # The kinds of a window differ in masks and in what a loop runs over: at small heads one of them will do.
    for width, half, terraced in ((128, 64, False), (128, 64, True), (64, 32, False)):
        yield from forward_cases(width, half, terraced, TABLE)
        yield from backward_cases(width, half, terraced, TABLE)


def forward_cases(width: int, half: int, terraced: bool, table: dict[str, Any]) -> Iterator[Case]:
    shape = dict(D=width, V=width, F=half, FP=half, BD=width, BV=width, BT=64, GROUP=4, PRECISION="ieee")
    setting = table["joint_states"][0]
    kind = "terraced" if terraced else "sliding"
    for reverse in (False, True):
        if terraced:
            continue
        constants = shape | setting.blocks
        constants |= dict(REVERSE=reverse, HAS_STOP=not reverse, TOTALS=True)
        yield case(f"joint_states {width} {reverse=}", sums.joint_states, constants, setting)
    setting = table["joint_outputs"][0]
    for save, transfer in ((False, False),) if terraced else ((True, False), (True, True)):
        constants = (
            shape | setting.blocks | dict(EVERY=1, W=64, TERRACED=terraced, HAS_BASE=True, HAS_BETA=False)
        )
        constants |= dict(SAVE=save, TRANSFER=transfer, HAS_LENGTHS=False)
        name = f"joint_outputs {width} {kind} save={save} transfer={transfer}"
        yield case(name, forward.joint_outputs, constants, setting)


def backward_cases(width: int, half: int, terraced: bool, table: dict[str, Any]) -> Iterator[Case]:
    shape = dict(D=width, V=width, F=half, FP=half, BD=width, BV=width, BT=64, GROUP=4, PRECISION="ieee")
    kind = "terraced" if terraced else "sliding"
    shape |= dict(EVERY=1, W=64, TERRACED=terraced, HAS_BASE=True, HAS_BETA=False)
    for mode in ("transfer", "full"):
        setting = table[f"joint_queries_{mode}"][0]
        constants = shape | dict(MAPS=True, INPUTS=mode == "full") | setting.blocks
        yield case(f"joint_queries {width} {kind} {mode}", backward.joint_queries, constants, setting)
    for name in ("joint_keys", "joint_values", "joint_inputs"):
        kernel = getattr(keys, name)
        constants = {key: value for key, value in shape.items() if key in kernel.arg_names} | table[name][
            0
        ].blocks
        yield case(f"{name} {width} {kind}", kernel, constants, table[name][0])
    if not terraced:
        constants = {name: shape[name] for name in ("D", "F", "FP", "BD", "BT", "GROUP", "PRECISION")}
        yield case(f"joint_maps {width}", backward.joint_maps, constants, table["joint_maps"][0])


SPILLS = {
    "joint_states 128": 64,
    "joint_outputs 128": 128,
    "joint_queries 128 sliding full": 288,
    "joint_queries 128 terraced full": 288,
    "joint_values 128": 192,
    "joint_inputs 128": 32,
}
HALF = {
    "x",
    "w",
    "val",
    "q",
    "k",
    "v",
    "w_q",
    "w_k",
    "S",
    "base_S",
    "teacher",
    "y",
    "dy",
    "dq",
    "dk",
    "dv",
    "dx",
    "R",
    "base_R",
}
NUMBERS = {"scale": "fp32", "stop": "*i64", "lengths": "*i64", "best": "*i32"}


def case(name: str, kernel: Any, constants: dict[str, Any], setting: Any) -> Case:
    arguments = {}
    for argument in kernel.arg_names:
        if argument in constants:
            continue
        short = len(argument) == 2 and argument[1] in "bth" and argument not in ("dq", "dk", "dv", "dx")
        if argument in NUMBERS:
            arguments[argument] = NUMBERS[argument]
        elif argument in ("T", "stored", "run", "runs", "stored_r", "run_r", "runs_r"):
            arguments[argument] = "i32"
        elif short:
            arguments[argument] = "i32:16"
        else:
            arguments[argument] = "*bf16" if argument in HALF else "*fp32"
    # Two sums of 64 x 64 or one of 64 x 128 in fp32 fill half of a program's registers. What does not fit beside them
    # was timed against smaller tiles, which took longer.
    spills = next((most for kernel, most in SPILLS.items() if name.startswith(kernel)), 0)
    matrix = constants.get("FP", 64) >= 64 or not name.startswith(
        "joint_states"
    )  # else fewer rows than it takes
    return Case(name, kernel, arguments, constants, setting.warps, setting.stages, matrix, spills)
