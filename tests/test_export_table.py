"""The neutral table: ranges that give every scale back, and what they belong to."""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Prepared, build, normal, prepare

from onnxqt.calibrate import bias_scale
from onnxqt.errors import ExportError
from onnxqt.export import neutral_table, quantized_model, table_quantizers
from onnxqt.numerics import Array

SCHEMES = ("w8a8-sym-pc", "w8a8-asym-pc", "w4a8-sym-pc", "w8a8-asym-pt", "w4a4-asym-pc")
CONSTANTS: dict[str, Array] = {
    "w": normal(4, 3, 3, 3) * 0.3,
    "b": normal(6, seed=1),
    "v": normal(6, 5, seed=2),
    "one": normal(1, seed=3),
    "shared": normal(5, seed=4),
    "u": normal(6, 5, seed=5),
}
TEXT = """(float[n,4,5,5] x) => (float[] y, float[] z, float[] f) {
    c = ConvTranspose<group = 2>(x, w, b) r = Relu(c) m = MaxPool<kernel_shape = [3, 3]>(r)
    g = GlobalAveragePool(m) f = Flatten(g) y = Gemm(f, v, one)
    p = Gemm(f, v, shared) q = Gemm(f, u, shared) z = Add(p, q) }"""

Json = dict[str, Any]


@functools.cache
def net() -> Prepared:
    return prepare(build(TEXT, CONSTANTS))


@functools.cache
def table() -> Json:
    prepared = net()
    quantizers = {scheme: prepared.quantizers(scheme) for scheme in SCHEMES}
    found: Json = json.loads(json.dumps(neutral_table(prepared.model, prepared.plan, prepared.ranges, quantizers)))
    return found


def entries(role: str) -> list[Json]:
    return [entry for entry in table()["tensors"] if entry["role"] == role]


def entry_of(tensor: str) -> Json:
    (entry,) = (entry for entry in table()["tensors"] if entry["name"] == tensor)
    return dict(entry)


def view_of(entry: Json, scheme: str) -> Json:
    (view,) = (view for view in entry["qparams"] if scheme in view["schemes"])
    return dict(view)


def views() -> Iterator[Json]:
    return (view for entry in table()["tensors"] for view in entry["qparams"])


def test_the_file_says_what_it_is() -> None:
    assert (table()["format"], table()["version"]) == ("onnxqt.quant_table", "0.1")
    assert table()["model_sha256"] == net().model.sha256
    assert table()["num_samples"] == net().ranges.samples


def test_the_table_is_valid_json_without_nan() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = json.dumps(table(), allow_nan=False)
    assert json.loads(text, parse_constant=refuse) == table()


def test_every_tensor_has_its_role_range_and_shape() -> None:
    assert {role: [entry["name"] for entry in entries(role)] for role in ("input", "output", "weight")} == {
        "input": ["x"],
        "output": ["f", "y", "z"],
        "weight": ["w", "v", "u"],
    }
    assert {entry["name"] for entry in entries("activation")} == {"r", "m", "g", "p", "q"}
    for entry in (*entries("input"), *entries("output"), *entries("activation")):
        seen = net().ranges.tensors[entry["name"]]
        assert (entry["min"], entry["max"], entry["count"]) == (seen.min, seen.max, seen.count)
    for entry in (*entries("weight"), *entries("bias")):
        value = CONSTANTS[entry["name"]]
        assert (entry["min"], entry["max"], entry["count"]) == (value.min(), value.max(), value.size)
        assert entry["shape"] == list(value.shape)
    assert entry_of("x")["shape"] == [None, 4, 5, 5]
    assert entry_of("f")["shape"] == [None, 6]


def test_every_scheme_has_one_view_and_equal_views_are_merged() -> None:
    for entry in table()["tensors"]:
        assert sorted(scheme for view in entry["qparams"] for scheme in view["schemes"]) == sorted(SCHEMES)
    activation = entry_of("r")["qparams"]
    assert [view["schemes"] for view in activation] == [
        ["w8a8-sym-pc", "w4a8-sym-pc"],
        ["w8a8-asym-pc", "w8a8-asym-pt"],
        ["w4a4-asym-pc"],
    ]
    assert [(view["bits"], view["signed"]) for view in activation] == [(8, True), (8, False), (4, False)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scales_read_back_to_the_same_float32(scheme: str) -> None:
    quantizers = net().quantizers(scheme)
    for name, params in {**quantizers.activations, **quantizers.weights}.items():
        view = view_of(entry_of(name), scheme)
        np.testing.assert_array_equal(np.array(view["scale"], np.float32), np.atleast_1d(params.scale))
        assert view["zero_point"] == np.atleast_1d(params.zero_point).tolist()
        assert (view["qmin"], view["qmax"], view["axis"]) == (params.grid.qmin, params.grid.qmax, params.axis)


def test_the_ends_of_every_clip_give_the_scale_back() -> None:
    """Two roundings to float32 of up to half a unit each may move the quotient by one unit in the last place."""
    for view in views():
        lo, hi, scale = (np.array(values, np.float32) for values in (*view["clip"].values(), view["scale"]))
        steps = 2 * view["qmax"] if view["signed"] else view["qmax"] - view["qmin"]
        np.testing.assert_array_max_ulp(((hi.astype(np.float64) - lo) / steps).astype(np.float32), scale, maxulp=1)
        if view["signed"]:
            np.testing.assert_array_equal(lo, -hi)
            np.testing.assert_array_max_ulp((hi / np.float64(view["qmax"])).astype(np.float32), scale, maxulp=1)
        else:
            zero_point = np.array(view["zero_point"], np.float32)
            np.testing.assert_array_equal(lo, (view["qmin"] - zero_point) * scale)
            np.testing.assert_array_equal(hi, (view["qmax"] - zero_point) * scale)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_bias_is_listed_for_each_node_that_adds_it(scheme: str) -> None:
    quantizers = net().quantizers(scheme)
    nodes = {node.name: node for node in net().plan.integer_nodes if node.bias}
    assert {entry["node"]: entry["name"] for entry in entries("bias")} == {n: node.bias for n, node in nodes.items()}
    for entry in entries("bias"):
        node, view = nodes[entry["node"]], view_of(entry, scheme)
        assert node.weight is not None
        weight, source = quantizers.weights[node.weight.tensor], quantizers.activations[node.inputs[0]]
        expected = np.atleast_1d(bias_scale(weight, source.scale, CONSTANTS[entry["name"]].size))
        np.testing.assert_array_equal(np.array(view["scale"], np.float32), expected)
        assert (view["bits"], view["qmin"], view["qmax"]) == (32, -(2**31), 2**31 - 1)
        assert view["axis"] == (None if scheme.endswith("pt") else 0)


def test_lengths_of_the_scales_of_biases() -> None:
    """A grouped ConvTranspose repeats its scales, and a bias of one value has one for each channel."""
    lengths = {name: len(view_of(entry_of(name), "w8a8-sym-pc")["scale"]) for name in ("w", "b", "one")}
    assert lengths == {"w": 3, "b": 6, "one": 5}


# Read back


def written(folder: Path, change: Callable[[Json], object] = lambda content: None) -> Path:
    content = json.loads(json.dumps(table()))
    change(content)
    path = folder / "table.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_table_gives_every_quantizer_back(scheme: str, tmp_path: Path) -> None:
    plan, expected = net().plan, net().quantizers(scheme)
    found = table_quantizers(written(tmp_path), plan, scheme)
    for ours, theirs in ((found.activations, expected.activations), (found.weights, expected.weights)):
        assert ours.keys() == theirs.keys()
        for tensor, params in theirs.items():
            got = ours[tensor]
            assert (got.grid, got.axis) == (params.grid, params.axis)
            assert got.scale.dtype == np.float32
            np.testing.assert_array_equal(got.scale, params.scale)
            np.testing.assert_array_equal(got.zero_point, params.zero_point)
    file = quantized_model(net().model, plan, found)
    assert file.SerializeToString(deterministic=True) == net().quantized(scheme).SerializeToString(deterministic=True)


def edit(key: str, value: Any) -> Callable[[Json], object]:
    def change(content: Json) -> None:
        content["tensors"][0]["qparams"][0][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(format="other"), "is not a table of version 0.1 of onnxqt.quant_table"),
        (lambda content: content.update(version="9"), "is not a table of version 0.1"),
        (lambda content: content.update(tensors={}), "'tensors' must be a list of objects with name, qparams, role"),
        (lambda content: content["tensors"].pop(0), "has no tensor 'x', which the model quantizes"),
        (edit("schemes", []), "has no scheme w8a8-sym-pc for 'x': name one that it has"),
        (edit("scale", [-1.0]), "tensor 'x': scale must be finite and > 0"),
        (edit("scale", "big"), "tensor 'x': .*: correct the entry"),
        (edit("zero_point", [0, 1]), "tensor 'x': qmin and qmax must be those of the bits, scale and zero_point"),
        (edit("qmax", 99), "tensor 'x': qmin and qmax must be those of the bits"),
        (edit("bits", None), "tensor 'x': .*: correct the entry"),
    ],
)
def test_a_table_that_does_not_fit_is_one_line(change: Callable[[Json], object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        table_quantizers(written(tmp_path, change), net().plan, "w8a8-sym-pc")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("{")
    for name, message in (("text.json", "is not JSON"), ("absent.json", "cannot read '.*absent.json'")):
        with pytest.raises(ExportError, match=message):
            table_quantizers(tmp_path / name, net().plan, "w8a8-sym-pc")
