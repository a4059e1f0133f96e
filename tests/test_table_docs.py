"""docs/table.md: its example is what the code writes, and it describes every field."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from conftest import ROOT

from onnxqt.numerics import Grid, QParams
from onnxqt.table import Entry, NodeRef, Stats, Table, View, files, read_table, write_table

DOCS = (ROOT / "docs" / "table.md").read_text()
SCHEMA = json.loads((Path(files.__file__).parent / "table.schema.json").read_text())


def example() -> Table:
    """The output of a Relu behind a Conv, and the weight of the Conv."""
    activation = QParams(np.asarray(0.047058824, np.float32), np.asarray(0, np.int32), Grid(8, signed=False))
    scales = np.array([0.0078125, 0.015625], np.float32)
    weight = QParams(scales, np.zeros(2, np.int32), Grid(8, signed=True, narrow=True), 0)
    counts = np.array([0, 0, 0, 0, 90, 30, 7, 1], np.float64)
    return Table(
        (
            Entry(
                name="r",
                role="activation",
                shape=(None, 2, 4, 4),
                producer=NodeRef("relu", "Relu", 0),
                computed_by=NodeRef("conv", "Conv", 0),
                consumers=(NodeRef("pool", "GlobalAveragePool", 0),),
                fused_from=("c",),
                views=(View(("w8a8-asym-pc", "w4a8-asym-pc"), activation),),
                stats=Stats(128, 0.0, 15.09375, {0.5: 2.75, 0.9999: 15.09375}, counts, 16.0),
            ),
            Entry(
                name="w",
                role="weight",
                shape=(2, 3, 3, 3),
                consumers=(NodeRef("conv", "Conv", 1),),
                views=(View(("w8a8-asym-pc",), weight),),
                stats=Stats(54, -0.9921875, 1.984375),
                source="derived",
                sha256="9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            ),
        ),
        schemes=("w8a8-asym-pc", "w4a8-asym-pc"),
        model_file="model.onnx",
        model_sha256="2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae",
        graph_sha256="fcde2b2edba56bf408601fb721fe9b5c338d10ee429ea04fae5511b68fbf8fb9",
        opset=17,
        samples=512,
        ranges="mse",
        producer="onnxqt 0.1.0",
    )


def test_the_example_is_what_the_code_writes(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    assert write_table(example(), path) == [path]
    (shown,) = re.findall(r"<!-- example -->\n```json\n(.*?)```\n", DOCS, re.DOTALL)
    assert shown == path.read_text()
    assert read_table(path).entries[0].views[0].params.scale == np.float32(12 / 255)


def fields(schema: Any) -> Iterator[str]:
    """The names of all fields that a schema knows."""
    if isinstance(schema, dict):
        for name, value in schema.items():
            if name == "properties":
                yield from value
            yield from fields(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from fields(value)


def test_every_field_is_described_in_a_row() -> None:
    rows = "\n".join(line for line in DOCS.splitlines() if line.startswith("|"))
    described = {word for shown in re.findall(r"`([a-z0-9_.]+)`", rows) for word in shown.split(".")}
    assert set(fields(SCHEMA)) - {"$ref"} <= described
