"""Runs to make pages of: reports of any size, with what may lie beside them, and a reader of pages."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import html5lib
import numpy as np

from onnxqt.calibrate import observe
from onnxqt.files import file_sha256
from onnxqt.numerics import Array, Grid, QParams
from onnxqt.schemes import DEFAULT_SCHEMES
from onnxqt.table import Entry, Table, View, write_table
from onnxqt.table.form import Stats
from onnxqt.table.stats import constant_stats, stats_of

Json = dict[str, Any]

HTML = "{http://www.w3.org/1999/xhtml}"
SVG = "{http://www.w3.org/2000/svg}"
SCHEMES = tuple(str(scheme) for scheme in DEFAULT_SCHEMES)
ORIGINAL, CHECKPOINT = "1" * 64, "2" * 64
CLASSES = ("w8a8", "w4a8", "float")
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style></title></svg></table><iframe src=//evil.example>",
    "<!-- --> ]]> <![CDATA[ &lt;b&gt; &amp;",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)",
    "https://evil.example/x",
    "url(https://evil.example/x)",
    "\u202egnp.exe \u200b\u2028",
    "nul \x00 bell \x07 newline \n tab \t",
    "lone \ud800 surrogate \uffff",
    "long " + 3000 * "x" + " end",
    "",
)


# --- reports --------------------------------------------------------------------------------------------


def fidelity(rng: np.random.Generator) -> Json:
    snr = float(rng.uniform(3, 40))
    return {"mse": 10 ** (-snr / 10), "snr_db": snr, "cosine": 0.99, "agreement": float(rng.random()), "non_finite": 0}


def outcome(rng: np.random.Generator, classes: bool = True) -> Json:
    metrics = {"top1": float(rng.uniform(0.5, 0.9))} if classes else {}
    return {"metrics": metrics, "fidelity": fidelity(rng) | ({} if classes else {"agreement": None})}


def tails(rng: np.random.Generator) -> Json:
    quantiles = {share: float(rng.uniform(0.01, 0.5)) for share in ("0.5", "0.99", "0.999")}
    largest = float(rng.uniform(0.5, 2))
    kurtosis = float(rng.uniform(-1, 9))
    return {"largest": largest, "quantiles": quantiles, "kurtosis": kurtosis, "clipped": float(rng.uniform(0, 0.01))}


def scheme(rng: np.random.Generator, classes: bool) -> Json:
    return {
        **{kind: outcome(rng, classes) for kind in ("ptq", "baseline", "checkpoint", "trim")},
        "weights": str(rng.choice(["checkpoint", "original", "equalized", "rounded"])),
        "emulator": {
            **outcome(rng, classes),
            "max_lsb": int(rng.integers(5)),
            "mismatch_fraction": 0.01,
            "float_nodes": [{"node": "s", "op_type": "Softmax", "reason": "no integer form"}],
            "overflows": {"conv0": 3},
        },
        "self_check": {
            **{"tensors": 40, "codes": int(rng.integers(10**6, 10**8)), "one_lsb": int(rng.integers(300))},
            **{"tie_distance": 0.1, "max_lsb": int(rng.integers(3)), "mismatch_fraction": 0.0},
            **{"integer_kernels": int(rng.integers(30)), "all_integer": bool(rng.integers(2))},
        },
    }


def make_report(
    layers: int = 3, names: Sequence[str] = (), classes: bool = True, schemes: Sequence[str] = SCHEMES
) -> Json:
    """A report of as many layers, whose weights and nodes have these names first."""
    rng = np.random.default_rng(layers)
    weights = [*names, *(f"weight{i}" for i in range(len(names), layers))]
    nodes = [*names, *(f"/block{i}/conv" for i in range(len(names), layers))]
    steps = [int(step) for step in np.linspace(0, 2399, 200)]
    return {
        "schema_version": "1.1",
        "model": {
            "sha256": ORIGINAL,
            "opset": 17,
            "inputs": ["input"],
            "outputs": ["logits"],
            "changes": ["folded 5 constant node(s)", *names],
        },
        "settings": {
            "schemes": list(schemes),
            **{"robust_to": [], "ranges": "mse", "equalize": "auto", "robust_rounding": "auto", "ptq": ["round"]},
            **{"strip_qdq": False, "form": "qdq", "opset": None, "overrides": {}},
            "training": {
                **{"steps": 2400, "batch_size": 64, "accumulate": 1, "optimizer": "adamw", "learning_rate": 0.0015},
                "schedule": {"warmup": 0.02, "bend": 0.1, "full": 0.25, "knee": 0.2, "rise": 0.05, "floor": 0.01},
                **{"seed": 0, "losses": None, "prune": "tensor", "average": 0.2, "balance": 0.3, "augment": ["mixup"]},
                **{"freeze": list(names), "patience": 0, "save_every": 0, "save_minutes": 5.0, "resume": False},
                "tensorboard": False,
            },
        },
        "data": {
            "calibration": {"samples": 10000, "sha256": "3" * 64},
            "evaluation": {"samples": 5000, "sha256": "4" * 64, "held_out": False},
        },
        "environment": {
            "python": "3.11.7",
            "system": "Linux x86_64",
            "packages": {"onnxqt": "0.1.0", "onnx": "1.23.2"},
        },
        "plan": {
            "quantized_tensors": 2 * layers,
            "quantized_weights": layers,
            "unbounded_tensors": list(names),
            "integer_nodes": nodes,
            "float_nodes": [{"node": n, "op_type": n, "reason": n} for n in names]
            + [{"node": f"/gelu{i}", "op_type": "Gelu", "reason": "no integer form"} for i in range(3)],
        },
        "float": outcome(rng, classes),
        "checkpoint": outcome(rng, classes),
        "training": {
            **{"optimizer": "adamw", "learning_rate": 0.0015},
            "schedule": {"warmup": 0.02, "bend": 0.1, "full": 0.25, "knee": 0.2, "rise": 0.05, "floor": 0.01},
            "losses": {"weights": {"distill": 1.0}, "temperature": 1.0, "features": [], "graph": None},
            "regimes": ["w8a8-sym-pt", "w8a8-asym-pc", "w4a8-sym-pt", "float"],
            **{"steps": 2400, "best_step": 1920, "seconds": 995.06, "step_ms_median": 258.9},
            **{"reason": None, "diverged": None, "stopped": False},
            "untouched": dict.fromkeys((*names, "weight1"), "no gradient reaches it"),
            "curves": {
                "step": steps,
                "loss": [float(v) for v in rng.uniform(0.1, 1, len(steps))],
                "lambda": [min(1.0, step / 600) for step in steps],
                "lr": [float(v) for v in np.linspace(0.0015, 0, len(steps))],
                "tau": [1 - 0.2 * min(1.0, step / 400) for step in steps],
            },
            "evaluations": [
                {
                    "step": step,
                    "losses": {
                        **{"w8a8-sym-pt": float(rng.random()), "w8a8-asym-pc": float(rng.random())},
                        **{"w4a8-sym-pt": None if step == 960 else float(rng.random()), "float": 9.313e-10},
                    },
                    "best": step == 1920,
                }
                for step in (0, 960, 1920, 2400)
            ],
            "tails": {weight: {"before": tails(rng), "after": tails(rng)} for weight in weights},
        },
        "schemes": {name: scheme(rng, classes) for name in schemes},
        "files": {"checkpoint.onnx": CHECKPOINT, **{f"schemes/{name}.onnx": "5" * 64 for name in schemes}},
        "seconds": 1234.5,
    }


def with_layers(report: Json, layers: int, names: Sequence[str] = ()) -> Json:
    """The report with what a run may measure layer by layer, and operator by operator."""
    rng = np.random.default_rng(7)
    tensors = [*names, *(f"tensor{i}" for i in range(len(names), layers))]
    for found in report["schemes"].values():
        found["layers"] = [{"tensor": tensor, "snr_db": float(rng.uniform(-3, 40))} for tensor in tensors]
        found["sensitivity"] = {f"weight{i}": float(rng.lognormal(-9, 3)) for i in range(layers)}
    report["plan"]["operators"] = {
        "Conv": {"integer": layers, "fused": 0, "float": 0},
        "Relu": {"fused": 9, "float": 1},
    }
    report["model"]["file"] = "<b>net</b>.onnx"
    return report


def make_matrix(report: Json, names: Sequence[str] = ()) -> Json:
    """A matrix of the original and the checkpoint on three back ends, one of which fails and one lacks a precision."""
    rng = np.random.default_rng(3)
    classes = bool(report["float"]["metrics"])
    models = [("original.onnx", ORIGINAL), ("checkpoint.onnx", CHECKPOINT)]
    offered = {"tflite_ref": ["w8a8", "w4a8"], "cmsis_nn": ["w8a8"], "edgetpu": ["w8a8", "w4a8"]}
    evidence = {"tflite_ref": "validated", "cmsis_nn": "modelled", "edgetpu": "modelled"}
    results = {}
    for profile, columns in offered.items():
        for column in columns:
            for model, _ in models:
                results[model, profile, column] = {
                    **outcome(rng, classes),
                    **{"brier": 0.2, "ece": 0.05, "boundaries": int(rng.integers(40))},
                    "worst_layer": {"tensor": (names or ["/conv"])[0], "snr_db": float(rng.uniform(5, 30))},
                    "integer_macs": float(rng.random()),
                    "float_nodes": [{"node": n, "op_type": n, "reason": n} for n in (*names, "Softmax")],
                    **{"costliest": None, "overflows": {}},
                }
    failed = ("checkpoint.onnx", "edgetpu", "w4a8")
    return {
        "schema_version": "1.0",
        "environment": report["environment"],
        "models": [
            {"name": name, "sha256": digest, "float": {**report["float"], "brier": 0.2, "ece": 0.05}}
            for name, digest in models
        ],
        "data": {"calibration": {"samples": 9, "sha256": "3" * 64}, "evaluation": {"samples": 9, "sha256": "4" * 64}},
        "profiles": [
            {
                **{
                    "name": name,
                    "title": (names or [name])[0],
                    "evidence": evidence[name],
                    "source": "",
                    "assumed": "",
                },
                "columns": columns,
            }
            for name, columns in offered.items()
        ],
        "cells": [
            {
                **{"model": place[0], "profile": place[1], "column": place[2], "key": "6" * 64},
                "result": None if place == failed else result,
                "error": "it cannot be run" if place == failed else None,
            }
            for place, result in results.items()
        ],
        "summary": [],
    }


def make_cost(names: Sequence[str] = ()) -> Json:
    """Estimates of two devices; a source has an address."""
    sources = ["rate: see https://example.org/zoo?a=1&b=2, (table 3)", "energy: Horowitz, ISSCC 2014", *names]
    estimate = {
        **{"device": "Hailo-8", "batch": 1, "weight_bits": 8, "activation_bits": 8, "network_class": "dense"},
        **{"basis": "upper bound", "latency_s": 1.9219e-4, "throughput_hz": 5203.2, "throughput_band_hz": None},
        **{"median_error": None, "energy_j": 1.21647e-5, "board_energy_j": None, "price_usd": 130},
        **{"bound_by": "compute", "integer_share_of_macs": 0.75, "boundaries": 2, "host_layers": 1},
        **{"unknown": [], "sources": sources, "evidence": "modelled"},
    }
    other = {
        **estimate,
        "device": "Coral Edge TPU",
        "board_energy_j": 4.8e-4,
        "sources": sources[1:],
        "basis": "fitted",
    }
    load = {"macs": 40551040, "weight_bytes": 271128, "weight_bits": 8, "activation_bits": 8, "network_class": "dense"}
    return {
        "schema_version": "1.0",
        "environment": {"python": "3", "system": "x", "packages": {}},
        "model": {"name": "original.onnx", "sha256": ORIGINAL},
        "workload": {**load, "unknown": []},
        "batch": 1,
        "estimates": [estimate, other],
        "measured": [
            {
                **{"name": "original.onnx", "sha256": ORIGINAL, "times_as_fast": 1.0, "latency_s": 0.00325},
                **{"p10_s": 0.003, "p90_s": 0.004, "throughput_hz": 307.7, "batch": 1, "runs": 99},
                **{"processor": "Some CPU", "processors": 2, "evidence": "measured"},
            }
        ],
        "measured_on": "random numbers",
    }


# --- tables ---------------------------------------------------------------------------------------------


def activation(name: str, seed: int, schemes: Sequence[str]) -> Entry:
    """An activation with a histogram, 8-bit under the first half of the schemes, 4-bit under the others."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=4000).astype(np.float32)
    values = values if seed % 2 else np.maximum(values, 0)
    half = (len(schemes) + 1) // 2
    views = [
        View(tuple(group), QParams(np.asarray(scale, np.float32), np.asarray(zero, np.int32), grid))
        for group, scale, zero, grid in (
            (schemes[:half], 0.02, 0, Grid(8, signed=True)),
            (schemes[half:], 0.25, 3, Grid(4, signed=False)),
        )
        if group
    ]
    return Entry(name, "activation", (None, 16, 8, 8), views=tuple(views), stats=stats_of(observe(values)))


def weight(name: str, seed: int, schemes: Sequence[str]) -> Entry:
    """A weight with a scale per channel."""
    rng = np.random.default_rng(seed)
    value = rng.normal(size=(16, 4, 3, 3)).astype(np.float32)
    scale = (np.abs(value).max(axis=(1, 2, 3)) / 7).astype(np.float32)
    params = QParams(scale, np.zeros(16, np.int32), Grid(4, signed=True, narrow=True), 0)
    return Entry(name, "weight", value.shape, views=(View(tuple(schemes), params),), stats=constant_stats(value))


def make_table(layers: int, names: Sequence[str] = (), schemes: Sequence[str] = SCHEMES) -> Table:
    """A table of as many layers, whose tensors have these names first."""
    names = [name for name in names if name and "\ud800" not in name]  # which no table can hold
    entries = [activation(name, i, schemes) for i, name in enumerate([*names, *(f"tensor{i}" for i in range(layers))])]
    entries += [weight(f"weight{i}", i, schemes) for i in range(layers)]
    entries.append(Entry("mask", "activation", reason="it takes infinite values", stats=Stats(4, -1.0, 1.0)))
    return Table(
        tuple(entries), tuple(schemes), "checkpoint.onnx", CHECKPOINT, "7" * 64, 17, 512, "mse", "onnxqt 0.1.0"
    )


def write_run(folder: Path, report: Json, table: Table | None = None, **beside: Json) -> Path:
    """A run directory with a report, and what lies beside it by the stem of its file; returns the report's path."""
    folder.mkdir(parents=True, exist_ok=True)
    if table is not None:
        write_table(table, folder / "table.json")
        report = {**report, "files": {**report["files"], "table.json": file_sha256(folder / "table.json")}}
    for stem, content in {"report": report, **beside}.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder / "report.json"


# --- pages ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """A table of a page: texts of its header cells and of the cells of its rows, each with its second line."""

    header: list[str]
    rows: list[list[str]]


def parse(page: str) -> Element:
    """The page as a browser reads it; an error in its HTML raises."""
    tree: Element = html5lib.HTMLParser(strict=True).parse(page)
    return tree


def text_of(element: Element) -> str:
    return "".join(element.itertext())


def read_tables(tree: Element) -> Mapping[str, list[Shown]]:
    """The tables of a page by their captions; of a cell with two lines, " / " is between them."""
    found: dict[str, list[Shown]] = {}
    for table in tree.iter(f"{HTML}table"):
        caption = table.find(f"{HTML}caption")
        assert caption is not None
        *heads, last = table.findall(f"{HTML}thead/{HTML}tr")
        header = [cell_text(cell) for cell in last]
        if heads:
            (head,) = heads
            header.insert(0, cell_text(head[0]))
        rows = [
            [cell_text(cell) for cell in row]
            for part in ("tbody", "tfoot")
            for row in table.findall(f"{HTML}{part}/{HTML}tr")
        ]
        found.setdefault(text_of(caption), []).append(Shown(header, rows))
    return found


def cell_text(cell: Element) -> str:
    detail = cell.find(f"{HTML}small")
    own = (cell.text or "").strip()
    return own if detail is None else f"{own} / {text_of(detail)}"


def floats(values: Sequence[float]) -> Array:
    return np.array(values, np.float64)
