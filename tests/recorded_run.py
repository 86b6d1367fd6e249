"""A run's folder with every section of a record in it, made up, for what reads such folders."""

import json
import math
import random
from pathlib import Path
from typing import Any

from linearize.evaluate import TEACHER, Bucket, Cell, LayerMemory, Likelihood, Memory, Results
from linearize.evaluate.likelihood import edges
from linearize.evaluate.speed import Point, SpeedResults, crossovers
from linearize.evaluate.statistics import wilson

MODELS = {TEACHER: 0.0, "student": 0.03, "window control": 0.06}


def make_run(
    folder: Path,
    *,
    bare: bool = False,
    note: str = "plain",
    seed: int = 0,
    layers: int = 4,
    gain: float = 1.0,
) -> Path:
    """Write results.json, speed.json and metrics; ``bare`` leaves out all that is optional, ``note`` is put wherever a
    record has free text."""
    rng = random.Random(seed)
    results = Results(
        source=f"held-out {note}",
        models=list(MODELS),
        seed=seed,
        likelihood={
            length: {name: _likelihood(name, kl * gain, length) for name, kl in MODELS.items()}
            for length in (512, 1024)
        },
        recall=[
            _cell(name, task, length, round(50 * share), rng)
            for task, shares in (("passkey", (1.0, 0.9, 0.1)), ("number_in_text", (0.7, 0.6, 0.5)))
            for length in (256, 512, 1024)
            for name, share in zip(MODELS, shares, strict=True)
        ],
        memory={
            TEACHER: Memory([LayerMemory(0, 1024, None)] * layers),
            "student": Memory([LayerMemory(132_000, 1024, 0)] * (layers - 1) + [LayerMemory(0, 1024, None)]),
            "window control": Memory(
                [LayerMemory(66_000, 1024, 0)] * (layers - 1) + [LayerMemory(0, 1024, None)]
            ),
        },
        windows={512: "ab" * 32, 1024: "cd" * 32},
    )
    tree = results.to_dict()
    if not bare:
        tree |= {"gates": _gates(note), "ablations": _ablations(note, layers), "suite": _suite(note, rng)}
        tree |= {"lm_eval": _lm_eval(note), "continuation": _continuation()}
    record = {
        "origin": {
            "date": "2026-11-25T20:57:19+00:00",
            "machine": {"system": f"Linux {note}", "cpus": 2, "gpu": None},
            "versions": {"linearize": "0.1.0", "torch": "2.13.0"},
        },
        "recipe": {
            "teacher": {"name": f"books-5m {note}" if note != "plain" else "books-5m"},
            "method": {"name": "lolcats", "window": 32, "window_kind": "terraced"},
            "layers": list(range(layers - 1)),
        },
        "timings": {"teacher": 0.5, "transfer": 60.25},
        "prompt": f"Once {note}",
        "continuation": f"upon {note}",
        "results": tree,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(record), encoding="utf-8")
    if not bare:
        (folder / "speed.json").write_text(json.dumps({"speed": speed_of(rng).to_dict()}))
        _metrics(folder, layers, rng)
    return folder


def speed_of(rng: random.Random, device: str = "CPU") -> SpeedResults:
    """Points in which the student is ahead from 2,048 tokens in prefill and nowhere in decode."""
    points = []
    for length in (512, 1024, 2048, 4096, 8192):
        for part in ("prefill", "decode"):
            for model in (TEACHER, "student"):
                if model == TEACHER and length > 4096:
                    points.append(Point(part, model, length, 1, not_run="beyond its context of 4,096"))
                    continue
                square = length**2 / 3000 if model == TEACHER else length * 0.45
                ms = (length / 10 + square) if part == "prefill" else 5 + (model == "student")
                low, high = ms * (0.97 - 0.02 * rng.random()), ms * (1.03 + 0.02 * rng.random())
                kept = 4096 * length if model == TEACHER else 528_000
                rate = 1000 * (length if part == "prefill" else 1) / ms
                points.append(Point(part, model, length, 1, ms, low, high, 10, rate, None, kept))
    found = crossovers(points, 1, "student")
    return SpeedResults(device, points, found, 4096, {1: found}, "float32", "sdpa", 1)


def _likelihood(name: str, kl: float, length: int) -> Likelihood:
    buckets = [
        Bucket(low, high, 8 * (high - low), 36.0 + kl, kl * (0.6 + 0.1 * i), 1 - kl)
        for i, (low, high) in enumerate(zip(edges(length), edges(length)[1:], strict=False))
    ]
    between = {
        "ppl": (34.0, 38.0),
        "kl": (kl * 0.9, kl * 1.1),
        "top1": (0.9, 1.0),
        "ppl_difference": (0.1, 0.3),
    }
    window_kl = [kl * length * (0.9 + 0.025 * i) for i in range(8)]
    return Likelihood(36 + kl, kl, 1 - kl, 8 * length, 8, between, buckets, [3.5 * length] * 8, window_kl)


def _cell(model: str, task: str, length: int, correct: int, rng: random.Random) -> Cell:
    low, high = wilson(correct, 50)
    hits = ["1"] * correct + ["0"] * (50 - correct)
    rng.shuffle(hits)
    return Cell(model, task, length, correct, 50, low, high, length - 3.0, "d" * 64, "".join(hits))


def _gates(note: str) -> dict[str, Any]:
    every = [
        ("one function", "passed", "layer 2, length 65", 3.2e-5, 1e-4),
        ("padding", "failed", "layer 1, length 32", 2.5e-2, 1e-4),
        ("persistence", "not run", "", None, None),
    ]
    names = ("name", "status", "where", "difference", "bound")
    return {
        "status": "failed",
        "gates": [dict(zip(names, gate, strict=True)) | {"note": note} for gate in every],
    }


def _ablations(note: str, layers: int) -> dict[str, Any]:
    rows = [
        {
            "name": f"linear branch off, {where}",
            "kind": "linear_off",
            "layers": [],
            "length": 1024,
            "kl": kl,
            "kl_interval": [kl * 0.9, kl * 1.1],
            "kl_difference": kl - 0.03,
            "difference_interval": [kl - 0.031, kl - 0.029],
            "ppl": 36 + kl,
            "windows": 8,
            "not_run": None,
        }
        for where, kl in [("everywhere", 0.21), *((f"layer {i}", 0.04 + 0.02 * i) for i in range(layers - 1))]
    ]
    rows.append(
        {"name": "state zeroed", "kind": "state_zeroed", "layers": [0], "length": 1024, "not_run": note}
    )
    return {"rows": rows, "verdict": f"The linear branch is used ({note})."}


def _suite(note: str, rng: random.Random) -> dict[str, Any]:
    cells = []
    for task, label in (("niah_single_1", "S-NIAH-1"), ("niah_single_2", "S-NIAH-2 (alternative haystack)")):
        for length in (256, 512, 1024):
            for depth in (0.0, 25.0, 50.0, 75.0, 100.0):
                gated = length == 1024 and task.endswith("2")
                for model, worse in MODELS.items():
                    share = 0.4 if gated else max(0.0, 1 - worse * length / 60)
                    correct = round(50 * share)
                    low, high = wilson(correct, 50)
                    hits = "".join(rng.sample("1" * correct + "0" * (50 - correct), 50))
                    cells.append(
                        {"task": task, "label": label, "length": length, "depth": depth, "model": model}
                        | {"samples": 50, "score": correct / 50, "low": low, "high": high, "correct": correct}
                        | {"strict": correct, "likelihood": share, "gap": 0.0, "gated": gated}
                        | {"tokens": length - 2.5, "digest": "e" * 64, "hits": hits}
                    )
    return {"cells": cells, "notes": [note], "seed": 42, "haystack": {"name": note, "sha256": "f" * 64}}


def _continuation() -> dict[str, Any]:
    def row(name: str, ppl: float, repeated: float, **beside: Any) -> dict[str, Any]:
        between = {"ppl": [ppl - 0.5, ppl + 0.5], "repeated": [repeated - 0.05, repeated + 0.05]}
        made = {"model": name, "samples": 100, "tokens": 512.0, "ppl": ppl, "repeated": repeated}
        return made | {"intervals": between, "divergence": None, "same": None} | beside

    rows = [row(TEACHER, 2.0, 0.6)]
    for name in [*MODELS][1:]:
        made = row(name, 2.5, 0.7, divergence=[9.0, 31.0, 80.5], same=3)
        made["intervals"] |= {"ppl_difference": [0.25, 0.75], "repeated_difference": [None, None]}
        rows.append(made | {"intervals": made["intervals"] | {"divergence": [20.0, 44.0]}})
    sizes = {"prompt_tokens": 64, "tokens": 512, "asked": 100, "digest": "a" * 64}
    return {"rows": rows, "text": row("the text itself", 30.0, 0.02)} | sizes


def _lm_eval(note: str) -> dict[str, Any]:
    tasks = [
        {"task": f"sciq {note}", "metric": "acc", "model": model, "value": 0.6, "low": 0.55, "high": 0.65}
        | {"samples": 500, "chance": 0.25, "raw": 0.9375, "corrected": 0.90, "not_run": None}
        for model in (TEACHER, "student")
    ]
    absent = {
        "task": "mmlu",
        "metric": "acc",
        "model": "student",
        "value": None,
        "not_run": f"no data {note}",
    }
    return {"version": "0.4.13", "tasks": [*tasks, absent]}


def _metrics(folder: Path, layers: int, rng: random.Random) -> None:
    for home, worse in ((folder, 1.0), (folder / "control" / "window", 2.0)):
        for stage in ("transfer", "finetune"):
            if stage == "transfer" and worse > 1:
                continue  # a window has nothing to learn there
            at = home / stage
            at.mkdir(parents=True, exist_ok=True)
            lines = []
            for step in range(1, 61):
                fall = worse * math.exp(-step / 15) + 0.02 * worse + 0.003 * rng.random()
                line: dict[str, Any] = {"step": step, "tokens": 1024 * step, "loss": fall}
                if stage == "transfer":
                    line["relative_error"] = [fall * (1 + 0.3 * i) for i in range(layers - 1)]
                else:
                    line |= {"kl": fall, "next_token": 0.0}
                lines.append(json.dumps(line))
            (at / "metrics.jsonl").write_text("\n".join(lines) + "\n")
