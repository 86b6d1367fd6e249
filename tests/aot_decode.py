"""Decode kernels to compile ahead of time: the chosen settings, and with ``--all`` every candidate."""

import os
import sys

from aot import Case, most_spilled

from linearize.modeling.launches import CANDIDATES
from linearize.modeling.triton_decode import joint_step_kernel
from linearize.modeling.triton_decode_lawcat import lawcat_step_kernel
from linearize.modeling.triton_decode_liger import liger_step_kernel
from linearize.modeling.triton_decode_salient import salient_step_kernel
from linearize.modeling.triton_decode_still import still_step_kernel
from linearize.modeling.triton_decode_tools import MAPS

STRIDES = {f"{x}_{axis}": "i32" for x in "qkv" for axis in ("row", "head")}
# Bytes: STILL's step is a tenth slower at settings that spill none; for heads of 64 no other was measured.
SPILLS = {"joint_step 64": 64, "still_step 128": 64, "still_step 64": 64}
OLDER = {"joint_step_few 64": 8, "still_step 128": 136, "still_step 64": 136}
STATE = {"seen": "*i64", "folded": "*i64"}


def joint(name, settings, kind=2, feature_map="hedgehog", width=128, linear=True, sinks=0, dtype="*bf16"):
    half = {"np_map": width}.get(feature_map, width // 2)
    window, heads, groups = 64, 32, 8
    pointers = ("q", "k", "v", "ring_k", "ring_v", "sink_k", "sink_v", "y")
    sums = ("kv", "z", "map_q", "map_k", "extra_q", "extra_k", "logit")
    arguments = (
        dict.fromkeys(pointers, dtype)
        | dict.fromkeys(sums, "*fp32")
        | STATE
        | STRIDES
        | {"scale": "fp32", "cap": "fp32"}
    )
    constants = dict(
        H=heads, G=groups, K=width, V=width, F=half, KP=width, VP=width, FP=half,
        N=window * max(kind, 1) + 16, WINDOW=window, KIND=kind, SINKS=sinks, LINEAR=linear, HALVES=2,
        MAP=MAPS[feature_map], TIED=False, AFFINE=False, CAP=False, FOLD=1 if kind == 2 else 16, **settings.blocks,
    )  # fmt: skip
    constants |= {"BK": min(constants["BK"], width), "BV": min(constants["BV"], width)}
    constants["BF"] = min(constants["BF"], half)
    spills = most_spilled(name, SPILLS, OLDER)
    return Case(name, joint_step_kernel, arguments, constants, settings.warps, settings.stages, False, spills)


def liger(name, settings, width=128):
    arguments = dict.fromkeys(liger_step_kernel.arg_names, "i32") | STATE
    arguments |= dict.fromkeys(("q", "k", "v", "read_q", "read_k", "gate", "ring_k", "ring_v", "y"), "*bf16")
    arguments |= dict.fromkeys(("kv", "bias", "temperature", "mix"), "*fp32")
    numbers = (
        "scale",
        "cap",
        "bias_all",
        "temperature_all",
        "steps",
        "floor",
        "mix_window",
        "mix_recurrent",
        "eps",
    )
    arguments |= dict.fromkeys(numbers, "fp32")
    constants = dict(
        H=32, G=8, K=width, V=width, KP=width, N=64, WINDOW=64, RECURRENCE=True, HGRN=False, RAW=False, NORM=0,
        BIAS=False, TEMPERATURE=False, MIX=0, CAP=False, **settings.blocks,
    )  # fmt: skip
    return plain(name, liger_step_kernel, arguments, constants, settings)


def lawcat(name, settings, width=128):
    arguments = dict.fromkeys(lawcat_step_kernel.arg_names, "i32") | STATE
    arguments |= dict.fromkeys(
        ("q", "k", "v", "plain_q", "plain_k", "tail_q", "tail_k", "ring_k", "ring_v", "y"), "*bf16"
    )
    exact = ("logits", "kv", "taps_q", "taps_k", "map_q", "map_k", "extra_q", "extra_k", "logit")
    floats = ("scale", "cap", "eps", "inverse", "least")
    arguments |= dict.fromkeys(exact, "*fp32") | dict.fromkeys(floats, "fp32")
    constants = dict(
        H=32, G=8, K=width, V=width, F=width // 2, KP=width, VP=width, FP=width // 2, NQ=4, NK=4, N=1, NV=1,
        TAPS_Q=4, TAPS_K=4, WINDOW=0, HALVES=2, MAP=0, CAP=False, **settings.blocks,
    )  # fmt: skip
    constants |= {"BK": min(constants["BK"], width), "BV": min(constants["BV"], width)}
    return plain(name, lawcat_step_kernel, arguments, constants, settings)


def salient(name, settings, width=128):
    arguments = dict.fromkeys(salient_step_kernel.arg_names, "i32") | STATE
    arguments |= dict.fromkeys(("q", "k", "v", "ring_k", "ring_v", "kept_k", "kept_v", "y"), "*bf16")
    arguments |= dict.fromkeys(("score", "ring_score", "kept_score"), "*fp32") | dict.fromkeys(
        ("scale", "cap"), "fp32"
    )
    constants = dict(
        H=32, G=8, GR=8, K=width, V=width, KP=width, VP=width, N=128, SLOTS=257, SP=512, KEPT=8 * 257, CHUNK=64, CP=64,
        CAP=False, **settings.blocks,
    )  # fmt: skip
    return plain(name, salient_step_kernel, arguments, constants, settings)


def still(name, settings, width=128):
    arguments = dict.fromkeys(still_step_kernel.arg_names, "i32") | STATE
    arguments |= dict.fromkeys(("q", "k", "v", "ring_k", "ring_v", "kept_k", "kept_v", "y"), "*bf16")
    exact = ("score", "gate", "ring_score", "kept_score", "kv", "z", "map_q", "map_k", "extra_q", "extra_k")
    arguments |= dict.fromkeys(exact, "*fp32") | dict.fromkeys(("scale", "cap", "eps"), "fp32")
    constants = dict(
        H=32, G=8, K=width, V=width, F=width, KP=width, VP=width, FP=width, N=129, NS=129, SLOTS=256, SP=256,
        CHUNK=64, CP=64, PICKS=4, PP=16, GIVEN=False, FIRST=True, GATE=2, HALVES=2, MAP=MAPS["np_map"], CAP=False,
        **settings.blocks,
    )  # fmt: skip
    constants |= {"BK": min(constants["BK"], width), "BV": min(constants["BV"], width)}
    constants["BF"] = min(constants["BF"], width)
    return plain(name, still_step_kernel, arguments, constants, settings)


# Widths and variants that `make aot` has and the suite has not.
EVERY = os.environ.get("LINEARIZE_AOT") == "every"


def plain(name, kernel, arguments, constants, settings):
    """A case without matrix instructions of a warp group: a step has a few rows."""
    arguments = {n: kind for n, kind in arguments.items() if n not in constants}
    registers, spills = constants.pop("maxnreg", None), most_spilled(name, SPILLS, OLDER)
    return Case(name, kernel, arguments, constants, settings.warps, settings.stages, False, spills, registers)


def cases():
    for kernel in ("joint_step", "joint_step_few"):
        rows = CANDIDATES[kernel] if "--all" in sys.argv else CANDIDATES[kernel][:1]
        for i, settings in enumerate(rows):
            for kind, kind_name in ((2, "terraced"), (1, "sliding")):
                yield joint(f"{kernel} {kind_name} 128 #{i}", settings, kind)
        if EVERY:
            yield joint(f"{kernel} 64", rows[0], width=64)
            yield joint(f"{kernel} window 128", rows[0], 1, linear=False, sinks=4)
    yield joint("joint_step_wide np_map 128", CANDIDATES["joint_step_wide"][0], feature_map="np_map")
    if EVERY:
        yield joint("joint_step_few np_map 128", CANDIDATES["joint_step_few"][0], feature_map="np_map")
        yield joint("joint_step_wide 256", CANDIDATES["joint_step_wide"][0], width=256)
    for kernel, case in {
        "liger_step": liger,
        "lawcat_step": lawcat,
        "salient_step": salient,
        "still_step": still,
    }.items():
        for name in (kernel, f"{kernel}_few"):
            rows = CANDIDATES[name] if "--all" in sys.argv else CANDIDATES[name][:1]
            for i, settings in enumerate(rows):
                yield case(f"{name} 128 #{i}", settings)
            if EVERY:
                yield case(f"{name} 64", rows[0], 64)
