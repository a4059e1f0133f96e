"""Pages of runs: every number is that of the files, the HTML is valid, and nothing in a file can break out of it."""

import copy
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import jsonschema
import numpy as np
import pytest
from conftest import ROOT, Run
from html_cases import (
    HOSTILE,
    HTML,
    SCHEMES,
    SVG,
    Json,
    Shown,
    make_cost,
    make_matrix,
    make_report,
    make_table,
    parse,
    read_tables,
    text_of,
    with_layers,
    write_run,
)

from onnxqt.errors import UsageError
from onnxqt.html import make_page, read_run
from onnxqt.html.tensors import grid_values
from onnxqt.numerics import dequantize
from onnxqt.table import Table

LAYERS = 3
SIZE_LIMIT = 3_000_000  # bytes of the page of a model of 100 layers


def page_of(path: Path) -> str:
    return make_page(read_run(path))


def schema(name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads((ROOT / "onnxqt" / f"{name}.schema.json").read_text()))


class Full:
    """A run with everything beside its report, and its page."""

    def __init__(self, folder: Path, names: Sequence[str] = ()) -> None:
        self.report = with_layers(make_report(LAYERS, names), LAYERS, names)
        self.matrix, self.cost = make_matrix(self.report, names), make_cost(names)
        self.table = make_table(LAYERS, names)
        self.path = write_run(folder, self.report, self.table, matrix=self.matrix, cost=self.cost)
        self.page = page_of(self.path)
        self.tree = parse(self.page)
        self.tables = read_tables(self.tree)

    def one(self, caption: str) -> Shown:
        (found,) = self.tables[caption]
        return found


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Full:
    return Full(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Full:
    return Full(tmp_path_factory.mktemp("hostile"), HOSTILE)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Element:
    """The page of a report with nothing beside it."""
    return parse(page_of(write_run(tmp_path_factory.mktemp("bare"), make_report(LAYERS))))


# --- numbers: a cell is within half of its last digit of what the file holds -----------------------------

Expected = str | Callable[[str], bool]


def parsed(text: str) -> float:
    return float(text.replace("\N{MINUS SIGN}", "-").replace(",", ""))


def near(value: float, within: float) -> Callable[[str], bool]:
    """Whether a text is a number so near to a value; float64 adds 1e-12 of it."""

    def check(text: str) -> bool:
        return abs(parsed(text) - value) <= within + 1e-12 * abs(value)

    check.__doc__ = f"{value} within {within}"
    return check


def percent(share: float | None) -> Expected:
    return "n/a" if share is None else near(100 * share, 0.005)  # two digits behind the point


def decibel(fidelity: Json) -> Expected:
    return near(fidelity["snr_db"], 0.05)  # one digit behind the point


def four(value: float | None) -> Expected:
    """Four digits: half a unit of the fourth is at most 5e-4 of the number."""
    return "n/a" if value is None else near(value, 5e-4 * abs(value))


def count(value: int) -> Expected:
    return near(value, 0)


def check(found: Sequence[Sequence[str]], expected: Sequence[Sequence[Expected]]) -> None:
    assert len(found) == len(expected)
    for row, wanted in zip(found, expected, strict=True):
        assert len(row) == len(wanted), row
        for text, value in zip(row, wanted, strict=True):
            assert value == text if isinstance(value, str) else value(text), (
                row,
                text,
                getattr(value, "__doc__", value),
            )


def test_table_of_schemes(full: Full) -> None:
    shown = full.one("Each scheme")
    words = {
        "checkpoint": "trained",
        "original": "original",
        "equalized": "equalized original",
        "rounded": "rounded original",
    }
    expected = []
    for name, scheme in full.report["schemes"].items():
        before, better, after = (scheme[kind] for kind in ("ptq", "baseline", "trim"))
        top1 = [outcome["metrics"]["top1"] for outcome in (before, better, after)]
        expected.append(
            [
                name,
                *map(percent, top1),
                percent(top1[2] - top1[0]),
                decibel(before["fidelity"]),
                decibel(after["fidelity"]),
                percent(scheme["emulator"]["metrics"]["top1"]),
                count(scheme["emulator"]["max_lsb"]),
                words[scheme["weights"]],
            ]
        )
    check(shown.rows, expected)
    assert shown.header == [
        *("scheme", "PTQ %", "better PTQ %", "trim %", "gain, points", "PTQ dB", "trim dB", "emulator %", "LSB"),
        "made of",
    ]


def test_table_of_float_models(full: Full) -> None:
    check(
        full.one("The models in float").rows,
        [
            [name, percent(o["metrics"]["top1"]), decibel(o["fidelity"]), percent(o["fidelity"]["agreement"])]
            for name, o in (("original", full.report["float"]), ("checkpoint", full.report["checkpoint"]))
        ],
    )


def cells_of(matrix: Json) -> dict[tuple[str, str, str], float | None]:
    """Top-1 by model, back end and column; None where it failed."""
    return {
        (cell["model"], cell["profile"], cell["column"]): cell["result"] and cell["result"]["metrics"]["top1"]
        for cell in matrix["cells"]
    }


def test_heat_map(full: Full) -> None:
    cells, target = cells_of(full.matrix), full.report["float"]["metrics"]["top1"]
    shown = full.one("Back ends by precision or scheme")
    assert shown.header == ["back end", *("original", "trimmed") * 2]
    rows = [[row[0], *(cell.split(" / ") for cell in row[1:])] for row in shown.rows[:-2]]
    places = [(m, c) for c in ("w8a8", "w4a8") for m in ("original.onnx", "checkpoint.onnx")]
    for row, profile in zip(rows, full.matrix["profiles"], strict=True):
        assert row[0] == f"{profile['name']} / {profile['evidence']}"
        for (model, column), cell in zip(places, row[1:], strict=True):
            share = cells.get((model, profile["name"], column))
            if share is None:
                words = "failed" if column in profile["columns"] else "not offered"
                assert cell == ["", words]
            else:
                check([list(cell)], [[percent(target - share), percent(share)]])
    drops, spreads = shown.rows[-2:]
    expected: list[list[Expected]] = [["mean drop"], ["spread"]]
    for model, column in places:
        complete = [
            p for p in ("tflite_ref", "cmsis_nn", "edgetpu") if all(cells.get((m, p, column)) for m, _ in places)
        ]
        shares = [cells[model, p, column] or 0.0 for p in complete]
        expected[0].append(percent(target - float(np.mean(shares))))
        expected[1].append(percent(max(shares) - min(shares)))
    check([drops, spreads], expected)


def test_shade_of_each_cell_is_that_of_its_number(full: Full) -> None:
    (table,) = [t for t in full.tree.iter(f"{HTML}table") if "Back ends by precision" in text_of(t)]
    ends = (0.5, 1, 2, 5, 10)
    shades = 0
    for cell in table.iter(f"{HTML}td"):
        if found := re.search(r"heat-(\d)", cell.get("class", "")):
            assert int(found[1]) == sum(parsed(cell.text or "") > end for end in ends)
            shades += 1
    assert shades == 9 + 4  # cells with a result, and mean drops


def test_mean_drop_and_spread_by_evidence(full: Full) -> None:
    cells, target = cells_of(full.matrix), full.report["float"]["metrics"]["top1"]
    complete = [("tflite_ref", "w8a8"), ("tflite_ref", "w4a8"), ("cmsis_nn", "w8a8"), ("edgetpu", "w8a8")]
    expected: list[list[Expected]] = []
    for model, word in (("original.onnx", "original"), ("checkpoint.onnx", "trimmed")):
        for words, profiles in (
            ("all", ("tflite_ref", "cmsis_nn", "edgetpu")),
            ("validated", ("tflite_ref",)),
            ("modelled", ("cmsis_nn", "edgetpu")),
        ):
            shares = [cells[(model, *place)] or 0.0 for place in complete if place[0] in profiles]
            drop = target - float(np.mean(shares))
            spread = max(shares) - min(shares)
            expected.append([f"{word} / {model}", words, count(len(shares)), percent(drop), percent(spread)])
    check(full.one("Mean drop and spread, over the cells in which no model failed").rows, expected)


def test_shades_are_explained(full: Full) -> None:
    row = ["points", "to 0.5", "0.5 to 1", "1 to 2", "2 to 5", "5 to 10", "over 10"]
    assert full.one("Shades, in points lost").rows == [row]


def test_table_of_held_out_losses(full: Full) -> None:
    expected: list[list[Expected]] = []
    for evaluation in full.report["training"]["evaluations"]:
        losses, step = evaluation["losses"], f"{evaluation['step']:,}"
        mean = (losses["w8a8-sym-pt"] + losses["w8a8-asym-pc"]) / 2
        words = f"{step}, better than all before" if evaluation["best"] else step
        expected.append([words, four(mean), four(losses["w4a8-sym-pt"]), four(losses["float"])])
    caption = "Held-out loss above the least possible, mean over the schemes of the same bits"
    check(full.one(caption).rows, expected)
    assert full.one(caption).header == ["step", "w8a8", "w4a8", "float"]


def test_table_of_tails(full: Full) -> None:
    pairs = full.report["training"]["tails"]
    length = {name: pair["before"]["largest"] / pair["before"]["quantiles"]["0.999"] for name, pair in pairs.items()}
    expected = []
    for name in sorted(pairs, key=lambda name: -length[name]):
        both = [pairs[name]["before"], pairs[name]["after"]]
        expected.append(
            [
                name,
                *(four(tails["largest"]) for tails in both),
                *(four(tails["quantiles"]["0.999"]) for tails in both),
                *(four(tails["kurtosis"]) for tails in both),
                percent(both[0]["clipped"]),
            ]
        )
    check(full.one("Longest tails first").rows, expected)


def test_tables_of_layers(full: Full) -> None:
    schemes = full.report["schemes"]
    ratios = {n: {layer["tensor"]: layer["snr_db"] for layer in s["layers"]} for n, s in schemes.items()}
    errors = {n: s["sensitivity"] for n, s in schemes.items()}
    for caption, found, worst, shown in (
        ("Signal-to-noise ratio, dB, lowest first", ratios, min, lambda v: near(v, 0.05)),
        ("Sensitivity, highest first", errors, lambda values: -max(values), four),
    ):
        tensors = sorted(next(iter(found.values())), key=lambda t: worst([values[t] for values in found.values()]))
        table = full.one(caption)
        check(table.rows, [[t, *(shown(values[t]) for values in found.values())] for t in tensors])
        assert table.header == ["tensor", *schemes]


def test_table_of_worst_layers(full: Full) -> None:
    found = {
        cell["profile"]: cell["result"]["worst_layer"]["snr_db"]
        for cell in full.matrix["cells"]
        if cell["model"] == "checkpoint.onnx" and cell["column"] == "w8a8"
    }
    expected = [[p, "w8a8", "/conv", near(found[p], 0.05)] for p in sorted(found, key=lambda p: found[p])]
    check(full.one("Of checkpoint.onnx: the layer farthest from the float model").rows, expected)


def test_counts_and_reasons(full: Full) -> None:
    plan = full.report["plan"]
    check(
        full.one("Counts").rows,
        [
            ["tensors on a grid", count(plan["quantized_tensors"])],
            ["weights on a grid", count(plan["quantized_weights"])],
            ["nodes on integers", count(len(plan["integer_nodes"]))],
            ["nodes that stay float", count(len(plan["float_nodes"]))],
        ],
    )
    rows = full.one("What stays float, and why").rows
    assert rows == [["Gelu", "3", "no integer form", "/gelu0, /gelu1, /gelu2"]]
    assert full.one("What training left as it was").rows == [["no gradient reaches it", "1", "weight1"]]
    assert full.one("What was changed in the model before").rows == [["1", "folded 5 constant node(s)"]]
    expected: list[list[Expected]] = [
        ["Relu", count(0), count(9), count(1), percent(0.9)],
        ["Conv", count(LAYERS), count(0), count(0), percent(1)],
    ]
    check(full.one("Coverage by operator").rows, expected)


def test_table_of_files_run(full: Full) -> None:
    expected = []
    for name, scheme in full.report["schemes"].items():
        self_check = scheme["self_check"]
        expected.append(
            [
                name,
                count(self_check["integer_kernels"]),
                "yes" if self_check["all_integer"] else "no",
                *map(count, (1, 3, *(self_check[key] for key in ("codes", "one_lsb", "max_lsb")))),
            ]
        )
    check(full.one("How ONNX Runtime and the emulator run each file").rows, expected)


def test_tables_of_integer_shares(full: Full) -> None:
    done = [c for c in full.matrix["cells"] if c["model"] == "checkpoint.onnx" and c["result"]]
    evidence = {profile["name"]: profile["evidence"] for profile in full.matrix["profiles"]}
    expected: list[list[Expected]] = [
        [
            *(cell["profile"], cell["column"], percent(cell["result"]["integer_macs"])),
            *(count(cell["result"]["boundaries"]), count(1), evidence[cell["profile"]]),
        ]
        for cell in done
    ]
    check(full.one("Integer share").rows, expected)
    where = ", ".join(f"{cell['profile']} {cell['column']}" for cell in done)
    assert full.one("What stays float there, and why").rows == [["Softmax", "Softmax", "1", where]]


def test_tables_of_devices(full: Full) -> None:
    header = full.one("Modelled, not measured").header
    assert all("modelled" in words for words in header if words not in ("device", "price USD", "sources"))
    expected: list[list[Expected]] = []
    for found, sources in zip(full.cost["estimates"], ("1-2", "2"), strict=True):
        milli = [
            None if found[key] is None else 1e3 * found[key] for key in ("latency_s", "energy_j", "board_energy_j")
        ]
        expected.append(
            [
                f"{found['device']} / {found['basis']}",
                *(four(milli[0]), four(found["throughput_hz"]), four(milli[1]), four(milli[2])),
                *(four(found["price_usd"]), percent(found["integer_share_of_macs"]), sources),
            ]
        )
    check(full.one("Modelled, not measured").rows, expected)
    (timed,) = full.cost["measured"]
    row: list[Expected] = [
        "original.onnx / Some CPU",
        four(1e3 * timed["latency_s"]),
        four(timed["throughput_hz"]),
        four(1),
    ]
    check(full.one("Measured in ONNX Runtime on the processor named").rows, [row])
    notes = [
        text_of(item) for item in full.tree.iter(f"{HTML}li") if "Horowitz" in text_of(item) or "zoo" in text_of(item)
    ]
    assert notes == full.cost["estimates"][0]["sources"]


def test_tables_of_grids(full: Full) -> None:
    """Scale, zero point, clip and the share outside of it, for every tensor and every way of quantizing it."""
    entries = [entry for entry in full.table.entries if entry.views]
    shown = full.tables["Grids"]
    assert len(shown) == len(entries)
    for entry, table in zip(sorted(entries, key=lambda e: order(full, e.name)), shown, strict=True):
        expected: list[list[Expected]] = []
        for view in entry.views:
            low, high = (float(end(clip)) for end, clip in zip((np.min, np.max), view.clip, strict=True))
            grid = f"{view.params.grid.bits} {'signed' if view.params.grid.signed else 'unsigned'}"
            scales = view.params.scale
            outside: Expected = "n/a"
            if entry.stats and entry.stats.counts is not None:
                counts, limit = entry.stats.counts, entry.stats.limit
                centres = (np.arange(counts.size) + 0.5) * (2 * limit / counts.size) - limit
                outside = percent(float(counts[(centres < low) | (centres > high)].sum() / counts.sum()))
            expected.append(
                [
                    starting(view.schemes[0]),
                    *(grid, f"{scales.size} scale{'s' * (scales.size > 1)}"),
                    span(float(scales.min()), float(scales.max())),
                    count(int(view.params.zero_point.max())),
                    span(low, high),
                    outside,
                ]
            )
        check(table.rows, expected)


def order(full: Full, name: str) -> tuple[int, int]:
    """Where a tensor stands: by its lowest ratio, those without one behind, in the order of the table."""
    ratios = [
        layer["snr_db"] for s in full.report["schemes"].values() for layer in s["layers"] if layer["tensor"] == name
    ]
    names = [entry.name for entry in full.table.entries]
    if not ratios:
        return (1, names.index(name))
    lowest = {
        n: min(
            layer["snr_db"] for s in full.report["schemes"].values() for layer in s["layers"] if layer["tensor"] == n
        )
        for n in (layer["tensor"] for layer in next(iter(full.report["schemes"].values()))["layers"])
    }
    return (0, sorted(lowest, key=lambda n: lowest[n]).index(name))


def starting(words: str) -> Callable[[str], bool]:
    return lambda text: text.startswith(words)


def span(low: float, high: float) -> Callable[[str], bool]:
    def check(text: str) -> bool:
        ends = text.split(" to ")
        shown = [four(value) for value in ((low, high) if low != high else (low,))]
        return len(ends) == len(shown) and all(one(end) for one, end in zip(shown, ends, strict=True) if callable(one))

    return check


def test_tables_of_provenance(full: Full) -> None:
    report = full.report
    data = report["data"]
    inputs: list[list[Expected]] = [
        ["model", "", report["model"]["sha256"]],
        *([f"{name} samples", count(found["samples"]), found["sha256"]] for name, found in data.items()),
    ]
    check(full.one("Inputs").rows, inputs)
    written = json.loads(full.path.read_text())["files"]
    assert dict(full.one("Files of the run").rows) == written
    versions = dict(full.one("Versions").rows)
    assert versions == {
        **{"python": "3.11.7", "system": "Linux x86_64", **report["environment"]["packages"]},
        **{"opset of the model": "17", "form of the report": "1.1", "seconds of the run": "1,234"},
    }
    settings = dict(full.one("Settings").rows)
    assert settings["training.learning_rate"] == "0.0015"
    assert settings["training.schedule.knee"] == "0.2"
    assert settings["schemes"] == ", ".join(SCHEMES)
    leaves = sum(len(v) if isinstance(v, dict) else 1 for v in report["settings"]["training"].values())
    assert len(settings) == leaves + len(report["settings"]) - 1


def test_the_command_stands_line_by_line(full: Full) -> None:
    (command,) = full.tree.iter(f"{HTML}pre")
    lines = text_of(command).strip("\n").split("\n")
    assert lines[:3] == ["onnxqt trim '<b>net</b>.onnx' \\", "  --data DATA \\", "  --eval EVALUATION \\"]
    assert lines[-1] == "  --augment mixup"


COMPARED = {
    *("Each scheme", "The models in float", "Back ends by precision or scheme", "Shades, in points lost"),
    "Mean drop and spread, over the cells in which no model failed",
    "Held-out loss above the least possible, mean over the schemes of the same bits",
    *("Longest tails first", "Signal-to-noise ratio, dB, lowest first", "Sensitivity, highest first"),
    *("Of checkpoint.onnx: the layer farthest from the float model", "Counts", "What stays float, and why"),
    *("What training left as it was", "What was changed in the model before", "Coverage by operator"),
    *("How ONNX Runtime and the emulator run each file", "Integer share", "What stays float there, and why"),
    *("Modelled, not measured", "Measured in ONNX Runtime on the processor named", "Grids", "Inputs"),
    *("Files of the run", "Versions", "Settings"),
}


def test_every_table_of_the_page_is_compared(full: Full) -> None:
    assert full.tables.keys() == COMPARED


def test_verdict(full: Full) -> None:
    schemes = full.report["schemes"]
    after, before = ({n: s[k]["metrics"]["top1"] for n, s in schemes.items()} for k in ("trim", "ptq"))
    worst = min(after, key=lambda name: after[name])
    (verdict,) = [text_of(p) for p in full.tree.iter(f"{HTML}p") if p.get("class") == "verdict"]
    assert verdict.replace("\N{NO-BREAK SPACE}", " ") == (
        f"What was written for 8 schemes has a mean top-1 of {100 * np.mean(list(after.values())):.2f} %, against "
        f"{100 * np.mean(list(before.values())):.2f} % for the original model quantized without training and "
        f"{100 * full.report['float']['metrics']['top1']:.2f} % in float; the worst of them, {worst}, has "
        f"{100 * after[worst]:.2f} % against {100 * before[worst]:.2f} %; each file passed its check "
        "against ONNX Runtime."
    )


def test_verdict_of_one_scheme_without_classes(tmp_path: Path) -> None:
    report = make_report(1, classes=False, schemes=SCHEMES[:1])
    del report["schemes"][SCHEMES[0]]["self_check"]
    tree = parse(page_of(write_run(tmp_path, report, matrix=make_matrix(report))))
    ratios = [report["schemes"][SCHEMES[0]][kind]["fidelity"]["snr_db"] for kind in ("trim", "ptq")]
    (verdict,) = [text_of(p) for p in tree.iter(f"{HTML}p") if p.get("class") == "verdict"]
    assert verdict.replace("\N{NO-BREAK SPACE}", " ") == (
        f"What was written for the scheme {SCHEMES[0]} has a mean signal-to-noise ratio of {ratios[0]:.1f} dB, against "
        f"{ratios[1]:.1f} dB for the original model quantized without training."
    )
    tables = read_tables(tree)
    assert tables["Each scheme"][0].header == ["scheme", "PTQ dB", "trim dB", "emulator dB", "LSB", "made of"]
    (heat,) = tables["Back ends by precision or scheme"]
    first = next(cell for cell in make_matrix(report)["cells"])["result"]
    check([heat.rows[0][1:2]], [[decibel(first["fidelity"])]])


def test_a_real_run(short_run: Run) -> None:
    """Its report as the pipeline writes it today, with its table."""
    tree = parse(page_of(short_run.folder))
    tables = read_tables(tree)
    rows = {row[0]: row for row in tables["Each scheme"][0].rows}
    for name, scheme in short_run.report["schemes"].items():
        shares = [scheme[kind]["metrics"]["top1"] for kind in ("ptq", "trim")]
        check([rows[name][1:3]], [list(map(percent, shares))])
    assert len(tables["Grids"]) > 5
    assert not [p for p in tree.iter(f"{HTML}p") if p.get("class") == "warning"]


# --- what is not there ----------------------------------------------------------------------------------


def test_what_was_not_measured_is_said(bare: Element) -> None:
    said = [text_of(p).partition(":")[0] for p in bare.iter(f"{HTML}p") if p.get("class") == "absent"]
    assert said == [
        *("Accuracy on the back ends", "The signal-to-noise ratio of each tensor", "The sensitivity of each weight"),
        *("Ranges and grids", "Coverage by operator", "The integer share on the back ends"),
        "Speed, energy and price on devices",
    ]
    assert all("not measured in this run" in text_of(p) for p in bare.iter(f"{HTML}p") if p.get("class") == "absent")


def test_a_report_with_little_in_it(tmp_path: Path) -> None:
    little = {"schema_version": "1.0", "model": {"sha256": "a"}, "schemes": {"x": {}}, "float": {"metrics": {}, "n": 1}}
    tree = parse(page_of(write_run(tmp_path, {**little, "files": {}})))
    text = text_of(tree)
    assert "The report does not say how accurate its files are (1 scheme)." in text
    assert "Nothing was trained: no steps were asked for." in text
    assert "How many samples these figures are of is not in the report." in text


def test_runs_that_did_not_train_or_ended_early(tmp_path: Path) -> None:
    report = make_report()
    report["training"].update(diverged="the loss is not finite", stopped=True, best_step=0)
    text = text_of(parse(page_of(write_run(tmp_path, report))))
    assert "Training came to an early end: the loss is not finite" in text
    assert "the untouched model was best and was kept, and it was stopped early." in text
    report["training"].update(steps=0, reason="no weight can be trained")
    assert "Nothing was trained: no weight can be trained." in text_of(parse(page_of(write_run(tmp_path, report))))


def test_held_out_samples_are_mentioned(tmp_path: Path) -> None:
    report = make_report()
    report["data"]["evaluation"]["held_out"] = True
    text = text_of(parse(page_of(write_run(tmp_path, report))))
    assert "which training held out but which also chose the checkpoint" in text
    top1 = report["float"]["metrics"]["top1"]
    assert f"{100 * (top1 * (1 - top1) / 5000) ** 0.5:.2f} points" in text


# --- HTML -----------------------------------------------------------------------------------------------

FORBIDDEN = ("script", "link", "img", "iframe", "object", "embed", "form", "base", "audio", "video", "image", "use")


def pages(full: Full, hostile: Full, bare: Element) -> list[Element]:
    return [full.tree, hostile.tree, bare]


def test_pages_ask_for_nothing(full: Full, hostile: Full, bare: Element) -> None:
    for tree in pages(full, hostile, bare):
        links = []
        for element in tree.iter():
            tag = str(element.tag).rpartition("}")[2]
            assert tag not in FORBIDDEN
            for name, value in element.attrib.items():
                assert not name.startswith("on"), value
                assert name not in ("style", "src", "srcset", "action", "background", "poster", "data"), value
                assert "url(" not in value or name.startswith("aria-"), value
                if name.endswith("href"):
                    assert tag == "a"
                    links.append(value)
        assert all(link.startswith(("#", "https://", "http://")) for link in links)
        (style,) = tree.iter(f"{HTML}style")
        assert "url(" not in text_of(style)
        policies = [
            m.get("content") for m in tree.iter(f"{HTML}meta") if m.get("http-equiv") == "Content-Security-Policy"
        ]
        assert policies == ["default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"]


def test_links_lead_to_sections_and_sources_alone(full: Full, bare: Element) -> None:
    for tree, sources in ((full.tree, ["https://example.org/zoo?a=1&b=2"]), (bare, [])):
        ids = {element.get("id") for element in tree.iter()}
        links = [element.get("href") or "" for element in tree.iter(f"{HTML}a")]
        assert [link for link in links if not link.startswith("#")] == sources
        inner = [link[1:] for link in links if link.startswith("#")]
        assert len(inner) == 10
        assert set(inner) <= ids


def test_names_stay_text(full: Full, hostile: Full) -> None:
    """Hostile names add no kind of element or attribute to a page; those that can be seen stand there as they are."""
    kinds = [{(e.tag, *sorted(e.attrib)) for e in tree.iter() if "picture" not in str(e.attrib)} for tree in
             (full.tree, hostile.tree)]  # fmt: skip
    assert kinds[1] - kinds[0] <= {(f"{HTML}p", "class")}  # the warning about unbounded tensors
    text = text_of(hostile.tree)
    for name in HOSTILE[:9]:
        assert name in text
    for shown in (
        "\\u202egnp.exe \\u200b\\u2028",
        "nul \\x00 bell \\x07 newline \\x0a tab \\x09",
        "lone \\ud800 surrogate \\uffff",
    ):
        assert shown in text
    assert "49" not in [
        cell for rows in hostile.tables["What stays float, and why"] for row in rows.rows for cell in row
    ]
    (command,) = hostile.tree.iter(f"{HTML}pre")  # alone has names in full
    assert text_of(command).count("x" * 3000) == 1
    assert len(re.findall("x{200}", hostile.page)) == 3000 // 200
    assert "<script" not in hostile.page
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", hostile.page)
    hostile.page.encode()


def test_pages_can_be_read_by_everyone(full: Full, hostile: Full, bare: Element) -> None:
    for tree in pages(full, hostile, bare):
        assert tree.get("lang") == "en"
        levels = [int(str(e.tag)[-1]) for e in tree.iter() if re.fullmatch(r"h[1-6]", str(e.tag).rpartition("}")[2])]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
        ids = [e.get("id") for e in tree.iter() if e.get("id")]
        assert len(ids) == len(set(ids))
        for cell in tree.iter(f"{HTML}th"):
            assert cell.get("scope") in ("row", "col", "colgroup")
        for table in tree.iter(f"{HTML}table"):
            assert text_of(next(iter(table))).strip()
            widths = {sum(int(c.get("colspan", 1)) for c in row) for row in table.findall(f"{HTML}tbody/{HTML}tr")}
            assert len(widths) <= 1
            for row in table.findall(f"{HTML}tbody/{HTML}tr"):
                assert row[0].tag == f"{HTML}th"
        for region in tree.iter(f"{HTML}div"):
            assert region.get("role") != "region" or (region.get("aria-label") and region.get("tabindex") == "0")
        pictures = list(tree.iter(f"{SVG}svg"))
        assert pictures
        for picture in pictures:
            assert picture.get("role") == "img"
            title, description = picture[0], picture[1]
            assert (title.tag, description.tag) == (f"{SVG}title", f"{SVG}desc")
            assert text_of(title).strip()
            assert text_of(description).strip()
            assert picture.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"


def test_pictures_stay_inside(full: Full, hostile: Full) -> None:
    """No coordinate lies outside of its picture by more than the half width of a mark."""
    for tree in (full.tree, hostile.tree):
        for picture in tree.iter(f"{SVG}svg"):
            _, _, width, height = map(float, (picture.get("viewBox") or "").split())
            for element in picture:
                for name, limit in (("x", width), ("cx", width), ("y", height), ("cy", height)):
                    if (value := element.get(name)) is not None:
                        assert -5 <= float(value) <= limit + 5
                moves = re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", element.get("d") or "")
                for x, y in moves:
                    assert -5 <= float(x) <= width + 5
                    assert -5 <= float(y) <= height + 5


# --- files that somebody else made --------------------------------------------------------------------------


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Places of everything in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from leaves(item, (*path, key))


def put(content: Any, path: tuple[str | int, ...], value: Any) -> Any:
    changed = copy.deepcopy(content)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


@pytest.mark.parametrize("number", [1.7e308, -1.7e308, 5e-324, 0, -1, 10**18])
def test_any_numbers(tmp_path: Path, number: float) -> None:
    """All numbers of all files at once."""

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: changed(item) for key, item in value.items()}
        if isinstance(value, list):
            return list(map(changed, value))
        return number if isinstance(value, float | int) and not isinstance(value, bool) else value

    report = with_layers(make_report(LAYERS), LAYERS)
    beside = {"matrix": make_matrix(report), "cost": make_cost()}
    path = write_run(tmp_path, changed(report), None, **{name: changed(content) for name, content in beside.items()})
    with np.errstate(all="ignore"):
        parse(page_of(path))


def test_any_kinds_of_values(tmp_path: Path) -> None:
    """A page is made, or one line says what is wrong; 80 places and values, drawn at random with a fixed seed."""
    report = with_layers(make_report(1, schemes=SCHEMES[:1]), 1)
    report["training"]["curves"] = {name: values[:3] for name, values in report["training"]["curves"].items()}
    files = {"report": report, "matrix": make_matrix(report), "cost": make_cost()}
    places = [(name, path) for name, content in files.items() for path in leaves(content)]
    rng = np.random.default_rng(0)
    values: list[Any] = [None, "", "x", 0, -7, True, [], [[]], {}, {"a": {"b": []}}, [None], 10**400]
    refused = []
    for number in rng.choice(len(places), 80, replace=False):
        name, path = places[int(number)]
        changed = {**files, name: put(files[name], path, values[int(rng.integers(len(values)))])}
        where = write_run(tmp_path, **changed)
        try:
            parse(page_of(where))
        except UsageError as error:
            refused.append(str(error))
    assert 15 < len(refused) < 70
    assert not any("\n" in message for message in refused)


# --- bytes ----------------------------------------------------------------------------------------------


def test_size_of_the_page_of_a_hundred_layers(tmp_path: Path) -> None:
    report = with_layers(make_report(100), 100)
    matrix = make_matrix(report)
    table = make_table(100, [f"sum{i}" for i in range(50)])  # with those of additions
    page = page_of(write_run(tmp_path, report, table, matrix=matrix, cost=make_cost()))
    assert len(page.encode()) < SIZE_LIMIT
    assert page.count("<caption><span>Grids</span></caption>") == 250


def test_most_rows_and_tensors_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxqt.html.tensors.MOST_TENSORS", 2)
    report = make_report(203)
    tree = parse(page_of(write_run(tmp_path, report, make_table(2))))
    tables = read_tables(tree)
    assert len(tables["Longest tails first (3 more are in the file)"][0].rows) == 200
    assert "3 more tensors: see table.json." in text_of(tree)
    assert "163 weights with shorter tails are not drawn." in text_of(tree)


def test_the_same_run_gives_the_same_bytes(full: Full, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from onnxqt.html import make_page, read_run; "
    code += "sys.stdout.buffer.write(make_page(read_run(Path(sys.argv[1]))).encode())"
    seeds = [
        subprocess.run(
            [sys.executable, "-c", code, str(full.path)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert seeds[0] == seeds[1] == full.page.encode()
    moved = write_run(tmp_path / "elsewhere", full.report, full.table, matrix=full.matrix, cost=full.cost)
    assert page_of(moved) == full.page  # no folder is on the page


# --- the reports of these tests are reports ---------------------------------------------------------------


def test_synthetic_files_follow_their_schemas(full: Full, hostile: Full) -> None:
    report = make_report(4, [name for name in HOSTILE if name])
    schema("report").validate(report)
    schema("report").validate(make_report(4, classes=False))
    schema("matrix").validate(full.matrix)
    schema("cost").validate(full.cost)
    schema("matrix").validate(hostile.matrix)


def test_grids_hold_what_dequantize_gives(full: Full) -> None:
    table: Table = full.table
    checked = 0
    for entry in table.entries:
        for view in entry.views:
            if view.params.scale.size > 1:
                continue
            grid = view.params.grid
            every = np.arange(grid.qmin, grid.qmax + 1, dtype=np.int32)
            values = dequantize(every, view.params)
            found = grid_values(view)
            step = 1 if grid.bits == 4 else 8
            # dequantize multiplies in float32: half a unit of 24 bits
            np.testing.assert_allclose(found, [*values[:-1:step], values[-1]], rtol=2.0**-24, atol=0)
            checked += 1
    assert checked == 2 * LAYERS
