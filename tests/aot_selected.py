"""Cases of ``tests/aot.py``: the kernels of kept and routed attention as they are launched for Llama-3-8B's shapes."""

from aot import Case, most_spilled

from linearize.modeling import triton_selected as sets
from linearize.modeling import triton_selected_future as future
from linearize.modeling import triton_selected_kept as kept
from linearize.modeling import triton_selected_kept_backward as backward
from linearize.modeling import triton_selected_maps as maps
from linearize.modeling import triton_selected_routed as routed
from linearize.modeling import triton_selected_routed_backward as routed_backward
from linearize.modeling import triton_selected_states as states
from linearize.modeling.launches import CANDIDATES

WIDTHS = {128: dict(G=8, R=4, K=128, V=128, BK=128, BV=128), 64: dict(G=8, R=4, K=64, V=64, BK=64, BV=64)}
STRIDES = {f"{x}_{axis}": "i32:16" for x in "qkvx" for axis in "bth"}
SCALARS = dict(scale="fp32", back="fp32", eps="fp32", least="fp32", **STRIDES)
SETS = dict(index="*i32", leave="*i32", lists="*i64")
SCRATCH = {f"{x}_{y}": "*fp32" for x in ("carried", "entered") for y in "kv"}


# Bytes that may be spilled. A program of 4 warps that leaves 24 is 1.25 times as fast as any found that leaves none.
# Outputs spill outside of their loops, which leaves two programs a multiprocessor.
SPILLS = {"selected_states 128": 32, "selected_reverse 128": 64, "selected_outputs 128": 64}
OLDER = {"selected_outputs 128": 112}


def case(name, kernel, arguments, constants, setting, matrix=True):
    """A case of one kernel; every other parameter is an integer."""
    constants = {**constants, **setting.blocks}
    kinds = {
        parameter: arguments.get(parameter, "i32")
        for parameter in kernel.arg_names
        if parameter not in constants
    }
    spills = most_spilled(name, SPILLS, OLDER)
    return Case(name, kernel, kinds, constants, setting.warps, setting.stages, matrix, spills)


def selection():
    i64 = dict(keys="*i64", lists="*i64", merged="*i64", index="*i32", leave="*i32", left="*i32")
    i64 |= dict(score="*fp32")
    ranks, replay = CANDIDATES["selected_ranks"][0], CANDIDATES["selected_replay"][0]
    plain = ranks._replace(blocks={})
    yield case("keys", sets.keys_kernel, i64, dict(groups=8, chunk=64, block=64), plain, False)
    yield case("picks", sets.picks_kernel, i64, dict(groups=32, chunk=64, picks=4, block=64), plain, False)
    yield case("ranks", sets.ranks_kernel, i64, dict(length=1024), ranks, False)
    yield case("merge", sets.merge_kernel, i64, dict(rows=128, STEPS=9), plain, False)
    for per_chunk in (64, 4):
        constants = dict(per_chunk=per_chunk, padded=per_chunk, chunks=1024 // per_chunk, STEPS=9)
        constants["LEFT"] = per_chunk == 4
        yield case(f"replay {per_chunk}", sets.replay_kernel, i64, constants, replay, False)


def salient(every=False):
    half = dict.fromkeys(("q", "k", "v", "y", "dy", "dq", "dk", "dv"), "*bf16")
    types = {**half, **SCALARS, **SETS, **SCRATCH, "lse": "*fp32", "delta": "*fp32", "score": "*fp32"}
    types |= dict(listed="*i32", sizes="*i32", stars="*i32", sums="*fp32")
    for width, shape in WIDTHS.items():
        row = dict(**shape, C=64, TAIL=16)
        column = dict(**shape, C=64, SHARE=1, MAX=False)
        rows = [
            ("selected_kept_forward", kept.kept_forward_kernel, row),
            ("selected_kept_dq", backward.kept_dq_kernel, dict(**row, P=64, SHARE=1, MAX=False)),
            ("selected_kept_dkv", backward.kept_dkv_kernel, column),
            ("selected_local_dkv", backward.local_dkv_kernel, dict(**column, STEPS=9)),
        ]
        own = dict(**shape, C=64, SHARE=4, MAX=True) | dict(G=32, R=1)  # STILL's: every head selects
        rows += [
            ("selected_routed_dq", backward.kept_dq_kernel, dict(**own, P=4, TAIL=0)),
            ("selected_kept_dkv", backward.kept_dkv_kernel, own),
            ("selected_local_dkv", backward.local_dkv_kernel, dict(**own, STEPS=9)),
        ]
        for name, kernel, constants in rows:
            for setting in CANDIDATES[name][: None if every else 1]:
                label = f"{name} {width} {setting.blocks} {setting.warps} {setting.stages}"
                if constants.get("MAX"):
                    label += " with the maximum"
                yield case(label, kernel, types, constants, setting)
    yield case(
        "entrants", backward.entrants_kernel, types, dict(C=64, block=1024),
        CANDIDATES["selected_ranks"][0]._replace(blocks={}), False,
    )  # fmt: skip


def still(every=False):
    half = dict.fromkeys(
        (
            "q",
            "k",
            "v",
            "x",
            "w",
            "gate",
            "states",
            "bases",
            "base",
            "y",
            "linear",
            "room",
            "values",
            "da",
            "dv",
            "dy",
            "dgate",
        ),
        "*bf16",
    )
    types = {
        **half,
        **SCALARS,
        **SETS,
        "left": "*i32",
        "turns": "*i32",
        "sizes": "*i64",
        **dict.fromkeys(
            ("sums", "totals", "lengths", "weights", "e", "carry", "top", "den", "mass", "along"),
            "*fp32",
        ),
    }
    one = CANDIDATES["selected_ranks"][0]._replace(blocks={})
    for width, shape in WIDTHS.items():
        exact = dict(**shape, GS=32, C=64, P=4)
        mapped = dict(**shape, C=64, F=width, NORM=True)
        outputs = dict(**exact, HS=32, F=width, FP=width, NEAR=64, NORM=True, TAIL=0, GATE=width, SAVE=False)
        made = {name: x for name, x in mapped.items() if name not in ("G", "R")} | dict(H=32)
        sums = dict(**made, FP=width, HX=8, HV=8, HT=32, REVERSE=False)
        listed = dict(**made, GS=32, HM=32)
        by_map = dict(w=f"tensordesc<bf16[1, {width}, {width}]>")
        by_tile = by_map | dict.fromkeys(("near_k", "near_v"), f"tensordesc<bf16[1, 1, 64, {width}]>")
        by_tile |= dict.fromkeys(("states", "bases"), f"tensordesc<bf16[1, {width}, 1, {width}]>")
        described = dict(selected_states=by_map, selected_reverse=by_map, selected_outputs=by_tile)
        features = dict(**listed, HS=32, HX=32, HV=32, KEYS=False)
        gradient = routed_backward.features_kernel
        rows = [
            ("selected_states", states.states_kernel, sums),
            (
                "selected_reverse",
                states.states_kernel,
                {**sums, "REVERSE": True, "HX": 32, "HV": 32, "HT": 1},
            ),
            ("selected_outputs", routed.outputs_kernel, outputs),
            ("selected_outputs", routed.outputs_kernel, {**outputs, "SAVE": True}),
            ("selected_features", gradient, features),
            ("selected_features", gradient, {**features, "KEYS": True, "HX": 8, "HV": 8}),
            ("selected_values", routed_backward.values_kernel, dict(**listed, G=8)),
        ]
        for name, kernel, constants in rows:
            for setting in CANDIDATES[name][: None if every else 1]:
                label = f"{name} {width} {setting.blocks} {setting.warps} {setting.stages}"
                if constants.get("SAVE"):
                    label += " saving"
                yield case(label, kernel, types | described.get(name, {}), constants, setting)
    constants = dict(H=32, G=32, K=128, BK=128, rows=32)
    yield case(
        "selected_lengthen", routed_backward.lengthen_kernel, {**types, "dx": "*bf16"}, constants, one, False
    )
    yield case(
        "selected_turns", states.turns_kernel, types, dict(GS=32, C=64, P=4, FEW=4, SIZES=True), one, False
    )
    yield case(
        "selected_lengths", states.lengths_kernel, types, dict(H=8, K=128, BK=128, rows=32), one, False
    )
    scaled = dict(H=32, V=128, BV=128, GATE=128, rows=64)
    yield case("selected_scaled", routed_backward.scaled_kernel, types, scaled, one, False)
    scan = dict(F2=256, V=128, REVERSE=False)
    summed = {**types, "bases": "*bf16", "state": "*fp32", "z": "*fp32"}
    yield case("selected_scans", states.scans_kernel, summed, scan, one, False)
    ending = dict(**WIDTHS[128], GS=32, C=64, SIZES=True, rows=32)
    ending.pop("R")
    stored = {**types, "kept_k": "*bf16", "kept_v": "*bf16", "kept_score": "*fp32", "score": "*fp32"}
    yield case("selected_ending", routed.ending_kernel, stored, ending, one, False)
    made = {**{f"{x}_{y}": "*fp32" for x in "wu" for y in "qk"}, "made_q": "*bf16", "made_k": "*bf16"}
    constants = dict(HQ=32, K=128, BK=128, F=128, BF=32)
    yield case("selected_maps", maps.reflect_kernel, {**made, "least": "fp32"}, constants, one, False)


def values(every=False):
    types = dict(q="*bf16", k="*bf16", lse="*fp32", lengths="*i64", found="*fp32", rho="*fp32", **SCALARS)
    for width, shape in WIDTHS.items():
        constants = {x: shape[x] for x in ("G", "R", "K", "BK")}
        rows = [
            ("selected_row_sums", future.row_sums_kernel, {}),
            ("selected_column_max", future.column_max_kernel, dict(C=64)),
            ("selected_saliency", future.saliency_kernel, dict(C=64, GRID=4096, FIRST=True)),
        ]
        for name, kernel, more in rows:
            for setting in CANDIDATES[name][: None if every else 1]:
                label = f"{name} {width} {setting.blocks} {setting.warps} {setting.stages}"
                yield case(label, kernel, types, {**constants, **more}, setting)


def cases(every=False):
    return [*selection(), *salient(every), *still(every), *values(every)]
