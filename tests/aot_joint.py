"""The joint kernels at the widths of Llama-3 (128) and of small heads (64), as they are launched on an H200."""

from collections.abc import Iterator
from typing import Any

from aot import Case, most_spilled

from linearize.modeling import triton_joint as forward
from linearize.modeling import triton_joint_backward as backward
from linearize.modeling import triton_joint_keys as keys
from linearize.modeling import triton_joint_sums as sums
from linearize.modeling.launches import TABLE


def cases() -> Iterator[Case]:
    # The kinds of a window differ in masks and in what a loop runs over: at small heads one of them will do.
    for width, half, terraced in ((128, 64, False), (128, 64, True), (64, 32, False)):
        yield from forward_cases(width, half, terraced)
        yield from backward_cases(width, half, terraced)


def common(width: int, half: int, terraced: bool) -> dict[str, Any]:
    shape = dict(D=width, V=width, F=half, FP=64, BD=width, BV=width, BT=64, GROUP=4, PRECISION="ieee")
    return shape | dict(EVERY=1, MIXED=not terraced, W=64, TERRACED=terraced, HAS_BASE=True, HAS_BETA=False)


def forward_cases(width: int, half: int, terraced: bool) -> Iterator[Case]:
    shape, kind = common(width, half, terraced), "terraced" if terraced else "sliding"
    if not terraced:
        for reverse in (False, True):
            wanted = shape | dict(REVERSE=reverse, HAS_STOP=not reverse, TOTALS=True)
            yield case(f"joint_states {width} {reverse=}", sums.joint_states, wanted, "joint_states")
        wanted = shape | dict(SAVE=True, TRANSFER=False, HAS_LENGTHS=False, W=512)
        yield case(f"joint_outputs {width}", forward.joint_outputs, wanted, "joint_outputs")
    setting = "joint_outputs_near" + "_terraced" * terraced
    for save, transfer in ((False, False), (True, False), (True, True)):
        wanted = shape | dict(SAVE=save, TRANSFER=transfer, HAS_LENGTHS=False)
        name = f"joint_outputs_near {width} {kind} {save=} {transfer=}"
        yield case(name, forward.joint_outputs_near, wanted, setting)


def backward_cases(width: int, half: int, terraced: bool) -> Iterator[Case]:
    shape, kind = common(width, half, terraced), "terraced" if terraced else "sliding"
    suffix = "_terraced" * terraced
    for mode in ("transfer", "full"):
        wanted = shape | dict(HAS_E=mode == "transfer", MAPS=True, INPUTS=mode == "full")
        setting = f"joint_queries_{mode}{suffix}"
        yield case(f"joint_queries {width} {kind} {mode}", backward.joint_queries, wanted, setting)
    for name in ("joint_keys", "joint_inputs"):
        yield case(f"{name} {width} {kind}", getattr(keys, name), shape, name + suffix)
    if not terraced:
        yield case(f"joint_maps {width}", backward.joint_maps, shape, "joint_maps")


# Bytes that a cap of registers costs: without it two programs share a multiprocessor, and take longer.
SPILLS = {
    "joint_outputs 128": 8,
    "joint_outputs_near 128 sliding save=True transfer=False": 72,
    "joint_outputs_near 128 sliding": 16,
    "joint_queries 128 sliding transfer": 96,
    "joint_queries 128 sliding": 120,
    "joint_queries 128 terraced full": 40,
    "joint_queries 64": 8,
    "joint_keys 128 sliding": 144,
    "joint_keys 64": 48,
    "joint_inputs 128 sliding": 96,
    "joint_inputs 128": 8,
}
OLDER = {
    "joint_outputs 128": 16,
    "joint_outputs_near 128 sliding save=True transfer=False": 120,
    "joint_outputs_near 128 sliding save=True transfer=True": 24,
}
HALF = {"y", "dx", "dq", "dk", "dv"}
NUMBERS = {"scale": "fp32", "stop": "*i64", "lengths": "*i64", "best": "*i32"}
COUNTS = ("T", "stored", "run", "runs")


def case(name: str, kernel: Any, shape: dict[str, Any], key: str) -> Case:
    setting = TABLE[key][0]
    constants = {n: value for n, value in (shape | setting.blocks).items() if n in kernel.arg_names}
    tile = f"[1, 1, {{}}, {shape['BD']}]"
    described = {
        **{name: tile.format(64) for name in ("k", "v", "q", "dy", "x", "val", "teacher")},
        **{name: tile.format(128) for name in ("both_k", "both_v")},
        **dict.fromkeys(("w", "w_q", "w_k"), f"[1, {shape['BD']}, {shape['FP']}]"),
        **dict.fromkeys(("S", "base_S", "R", "base_R"), f"[1, {shape['FP']}, {shape['BV']}]"),
    }
    if key.startswith("joint_queries"):
        described["y"] = described["dy"]
    if key.startswith(("joint_inputs", "joint_maps")):  # they read what others write
        described["dx"] = f"[1, 1, 64, {shape['FP']}]"
    arguments = {}
    for argument in kernel.arg_names:
        if argument in constants:
            continue
        if argument in described:
            arguments[argument] = f"tensordesc<bf16{described[argument]}>"
        elif argument in COUNTS:
            arguments[argument] = "i32"
        else:
            arguments[argument] = NUMBERS.get(argument, "*bf16" if argument in HALF else "*fp32")
    spills, most = most_spilled(name, SPILLS, OLDER), setting.blocks.get("maxnreg")
    return Case(name, kernel, arguments, constants, setting.warps, setting.stages, True, spills, most)
