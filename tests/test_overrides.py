"""Exceptions from a scheme: read from files, matched by name, and followed by plan, parameters and files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Prepared, build, inputs_of, normal, prepare, run

from onnxqt.calibrate import float_nodes, make_quantizers, overridden
from onnxqt.errors import UsageError
from onnxqt.export import quantized_model
from onnxqt.overrides import Override, Overrides, parse_overrides, read_overrides
from onnxqt.plan import QuantPlan, Rules, make_plan
from onnxqt.schemes import Grids, parse_scheme

TOML = """
[overrides."stem"]
float = true

[overrides."/head/*"]
weight_bits = 8
activation_bits = 16
granularity = "b32"
"""
EXPECTED = Overrides(
    (Override("stem", keeps_float=True), Override("/head/*", weight_bits=8, activation_bits=16, granularity="b32"))
)


def network() -> Prepared:
    text = """(float[n,4,6,6] x) => (float[] y) {
        c = Conv(x, w, b) r = Relu(c) d = Conv(r, v) e = MaxPool<kernel_shape = [2, 2]>(d) f = Flatten(e)
        y = Gemm(f, m, h) }"""
    constants = {
        "w": normal(18, 4, 3, 3),
        "b": normal(18, seed=1),
        "v": normal(3, 18, 2, 2, seed=2),
        "m": normal(12, 5, seed=3),
        "h": normal(5, seed=4),
    }
    model = build(text, constants)
    names = ("/stem/Conv", "/stem/Relu", "/body/Conv", "/body/Pool", "/body/Flatten", "/head/Gemm")
    for node, name in zip(model.graph.node, names, strict=True):
        node.name = name
    return prepare(model)


@pytest.fixture(scope="module")
def net() -> Prepared:
    return network()


def rules(**settings: Any) -> Overrides:
    """One override for each pattern; `_` stands for `/` in the names of the arguments."""
    return parse_overrides({pattern.replace("_", "/"): given for pattern, given in settings.items()})


# --- files ------------------------------------------------------------------------------------------------


def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(TOML)
    (tmp_path / "a.json").write_text(json.dumps({"overrides": EXPECTED.as_json()}))
    assert read_overrides(tmp_path / "a.toml") == EXPECTED
    assert read_overrides(tmp_path / "a.json") == EXPECTED


def test_no_override_says_nothing() -> None:
    assert parse_overrides({}) == Overrides()
    assert Overrides().as_json() == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 9}, r"^override 'a' has weight_bits = 9: expected one of 2, 3, 4, 5, 6, 7, 8$"),
        ({"weight_bits": True}, r"^override 'a' has weight_bits = True: expected one of "),
        ({"weight_bits": 8.5}, r"^override 'a' has weight_bits = 8.5: expected one of "),
        ({"weight_bits": "8"}, r"^override 'a' has weight_bits = '8': expected one of "),
        ({"activation_bits": 12}, r"^override 'a' has activation_bits = 12: expected one of 4, 8, 16$"),
        ({"granularity": "b8"}, r"^override 'a': unknown granularity 'b8': expected one of pt, pc, "),
        ({"granularity": 8}, r"^override 'a': unknown granularity '8'"),
        ({"float": 1}, r"^override 'a' has float = 1: expected true or false$"),
        ({"float": True, "weight_bits": 8}, r"^override 'a' keeps nodes float, which have no bits: leave the other"),
        ({"float": False}, r"^override 'a' says nothing: set one of weight_bits, activation_bits, float, granularity$"),
        ({}, r"^override 'a' says nothing"),
        ({"weights_bits": 8}, r"^override 'a' has a setting 'weights_bits': .*; did you mean 'weight_bits'\?$"),
        ({"colour": 8}, r"^override 'a' has a setting 'colour': expected one of [a-z_, ]*$"),
        (8, r"^override 'a' is 8: expected settings such as weight_bits = 8$"),
    ],
)
def test_what_cannot_be_is_refused(settings: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_overrides({"a": settings})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", "[overrides", r"^'.*a.toml' is neither TOML nor JSON \(.*\): correct it$"),
        ("a.json", "{", r"^'.*a.json' is neither TOML nor JSON \(.*\): correct it$"),
        ("a.json", "[" * 100_000, r"^'.*a.json' is neither TOML nor JSON \(.*\): correct it$"),
        ("a.json", b"\xff\xfe", r"^'.*a.json' is neither TOML nor JSON \(.*\): correct it$"),
        ("a.json", "[1]", r"^'.*a.json' has no table 'overrides', or has more than it"),
        ("a.toml", "weight_bits = 8", r"^'.*a.toml' has no table 'overrides', or has more than it"),
        ("a.toml", "other = 1\n[overrides]", r"^'.*a.toml' has no table 'overrides', or has more than it"),
        ("a.toml", "[overrides.x]\nweight_bits = 1", r"^'.*a.toml': override 'x' has weight_bits = 1"),
        ("a.toml", " " * (1 << 20) + "\n", r"^'.*a.toml' is larger than 1 MiB: give a file of overrides$"),
    ],
)
def test_hostile_files_are_refused_in_one_line(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UsageError, match=message) as refused:
        read_overrides(tmp_path / name)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^cannot read '.*none.toml' \(No such file or directory\): give a file of"):
        read_overrides(tmp_path / "none.toml")


def test_too_many_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^10001 overrides are more than 10000: use patterns$"):
        parse_overrides({str(i): {"weight_bits": 8} for i in range(10_001)})


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("/a/*", "/a/b/c", True),
        ("/a/?", "/a/b", True),
        ("/a/?", "/a/bc", False),
        ("A", "a", False),
        ("a[0]", "a[0]", True),  # a name as it is
        ("a[0]", "a0", True),  # and as a pattern
        ("a", "ab", False),
    ],
)
def test_patterns(pattern: str, name: str, expected: bool) -> None:
    assert Override(pattern, weight_bits=8).matches(name) is expected


# --- plan -----------------------------------------------------------------------------------------------------


def planned(net: Prepared, overrides: Overrides) -> QuantPlan:
    return make_plan(net.model, rules=Rules(floats=float_nodes(net.model, overrides)))


@pytest.mark.parametrize(
    ("pattern", "named", "others"),
    [
        ("/stem/Conv", {"/stem/Conv"}, {"/stem/Relu"}),
        ("/stem/Relu", {"/stem/Relu"}, set()),  # no longer fused into the Conv before it
        ("/head/*", {"/head/Gemm"}, {"/body/Flatten"}),
        ("m", {"/head/Gemm"}, {"/body/Flatten"}),  # the weight of the Gemm
        ("r", {"/stem/Relu", "/body/Conv"}, {"/body/Pool", "/body/Flatten"}),  # the nodes around a tensor
    ],
)
def test_nodes_that_stay_float(net: Prepared, pattern: str, named: set[str], others: set[str]) -> None:
    overrides = Overrides((Override(pattern, keeps_float=True),))
    assert float_nodes(net.model, overrides) == named
    reasons = {node.name: node.reason for node in planned(net, overrides).float_nodes}
    assert {name for name, reason in reasons.items() if reason == "an override keeps it float"} == named
    assert set(reasons) == named | others


def test_a_file_with_float_nodes_has_their_weights_as_they_are(net: Prepared) -> None:
    plan = planned(net, rules(_head_Gemm={"float": True}))
    file = quantized_model(
        net.model, plan, make_quantizers(net.model, plan, net.ranges, parse_scheme("w2a8-sym-pc"), "mse")
    )
    (gemm,) = (node for node in file.graph.node if node.op_type == "Gemm")
    assert gemm.input[1] == "m"
    assert run(file, inputs_of(net.original))["y"].shape == (2, 5)


def test_a_pattern_that_matches_nothing_is_refused(net: Prepared) -> None:
    with pytest.raises(
        UsageError, match=r"^override '/haed/Gemm' matches no node and no tensor .*mean '/head/Gemm'\?$"
    ):
        float_nodes(net.model, rules(_haed_Gemm={"float": True}))
    with pytest.raises(
        UsageError, match=r"^override 'zzz' matches no node and no tensor of the model: correct the p\w+$"
    ):
        float_nodes(net.model, rules(zzz={"weight_bits": 8}))


# --- grids ----------------------------------------------------------------------------------------------------


def bits(net: Prepared, scheme: str, overrides: Overrides) -> tuple[dict[str, int], dict[str, int]]:
    grids = overridden(parse_scheme(scheme).grids, net.plan, overrides)
    found = make_quantizers(net.model, net.plan, net.ranges, grids, "minmax")
    return (
        {name: params.grid.bits for name, params in found.weights.items()},
        {name: params.grid.bits for name, params in found.activations.items()},
    )


PLAIN = {"x": 8, "r": 4, "d": 4, "e": 4, "f": 4, "y": 8}  # d to f share one grid


@pytest.mark.parametrize(
    ("given", "weights", "activations"),
    [
        ({"*": {"weight_bits": 8}}, {"w": 8, "v": 8, "m": 8}, PLAIN),
        ({"/body/Conv": {"weight_bits": 6}}, {"w": 4, "v": 6, "m": 4}, PLAIN),
        ({"v": {"weight_bits": 6}}, {"w": 4, "v": 6, "m": 4}, PLAIN),
        ({"*": {"weight_bits": 8}, "m": {"weight_bits": 2}}, {"w": 8, "v": 8, "m": 2}, PLAIN),
        ({"m": {"weight_bits": 2}, "*": {"weight_bits": 8}}, {"w": 8, "v": 8, "m": 8}, PLAIN),  # the last one holds
        ({"/stem/Relu": {"activation_bits": 8}}, {"w": 4, "v": 4, "m": 4}, {**PLAIN, "r": 8}),
        (
            {"/head/Gemm": {"activation_bits": 16}},
            {"w": 4, "v": 4, "m": 4},
            {**PLAIN, "d": 16, "e": 16, "f": 16, "y": 16},
        ),
        ({"r": {"activation_bits": 16}}, {"w": 4, "v": 4, "m": 4}, {**PLAIN, "r": 16}),
        ({"x": {"activation_bits": 4}}, {"w": 4, "v": 4, "m": 4}, PLAIN),  # inputs keep 8 bits
    ],
)
def test_bits_of_single_tensors(
    net: Prepared, given: dict[str, Any], weights: dict[str, int], activations: dict[str, int]
) -> None:
    assert bits(net, "w4a4-sym-pc", parse_overrides(given)) == (weights, activations)


def test_tensors_of_one_grid_stay_on_one(net: Prepared) -> None:
    grids = overridden(parse_scheme("w4a8-asym-pc").grids, net.plan, rules(e={"activation_bits": 16}))
    found = make_quantizers(net.model, net.plan, net.ranges, grids, "minmax").activations
    assert len({(float(found[name].scale), int(found[name].zero_point)) for name in ("d", "e", "f")}) == 1


@pytest.mark.parametrize(
    ("granularity", "axes"), [("pt", (None, None)), ("pc", (0, None)), ("b16", (1, 16)), ("b32", (0, None))]
)
def test_granularity_of_single_weights(net: Prepared, granularity: str, axes: tuple[int | None, int | None]) -> None:
    """18 inputs are fewer than a block of 32: then it is per channel."""
    for scheme in ("w4a8-sym-pt", "w4a8-sym-pc"):
        grids = overridden(parse_scheme(scheme).grids, net.plan, rules(_body_Conv={"granularity": granularity}))
        found = make_quantizers(net.model, net.plan, net.ranges, grids, "minmax")
        assert (found.weights["v"].axis, found.weights["v"].block_size) == axes
        assert (found.weights["w"].axis is None) == scheme.endswith("pt")
        assert set(found.unblocked) == ({"v"} if granularity == "b32" else set())


def test_narrow_activations_of_16_bits_are_whole(net: Prepared) -> None:
    grids = overridden(parse_scheme("w8a8-sym-pc-narrow").grids, net.plan, rules(r={"activation_bits": 16}))
    found = make_quantizers(net.model, net.plan, net.ranges, grids, "minmax").activations
    assert (found["r"].grid.qmin, found["d"].grid.qmin) == (-32768, -127)


@pytest.mark.parametrize(
    ("pattern", "settings", "message"),
    [
        (
            "/body/Pool",
            {"weight_bits": 8},
            r"^override '/body/Pool' sets weight_bits but matches no quantized weight: ",
        ),
        ("b", {"granularity": "pc"}, r"^override 'b' sets granularity but matches no quantized weight: correct the"),
        ("h", {"activation_bits": 8}, r"^override 'h' sets activation_bits but matches no quantized activation: "),
    ],
)
def test_what_has_no_effect_is_refused(net: Prepared, pattern: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        overridden(parse_scheme("w4a8-sym-pc").grids, net.plan, parse_overrides({pattern: settings}))


def test_without_overrides_nothing_changes(net: Prepared) -> None:
    grids: Grids = parse_scheme("w4a8-sym-b16").grids
    assert overridden(grids, net.plan, Overrides()) == grids
    assert float_nodes(net.model, Overrides()) == frozenset()


@pytest.mark.parametrize(
    ("scheme", "given"),
    [
        ("w4a8-sym-pc", {"/head/Gemm": {"weight_bits": 8, "activation_bits": 16}}),
        ("w4a8-asym-b16", {"*": {"weight_bits": 8}, "v": {"granularity": "pt"}}),
        ("w8a4-asym-pt", {"r": {"activation_bits": 8}}),
    ],
)
def test_mixed_files_run_and_say_the_same_with_optimizations_on_and_off(
    net: Prepared, scheme: str, given: dict[str, Any]
) -> None:
    grids = overridden(parse_scheme(scheme).grids, net.plan, parse_overrides(given))
    quantizers = make_quantizers(net.model, net.plan, net.ranges, grids, "mse")
    model = quantized_model(net.model, net.plan, quantizers)
    inputs = inputs_of(net.original, batch=8)
    plain, optimized = (run(model, inputs, optimize)["y"] for optimize in (False, True))
    # Sums in another order move a value across a rounding tie, and a code by one, in each of three layers.
    assert np.abs(plain - optimized).max() <= 4 * max(p.scale for p in quantizers.activations.values()) + 1e-5


def test_products_of_8_bits_beside_16_bits_run() -> None:
    """16 bits take opset 21, for which ONNX Runtime 1.19 has no QLinearMatMul."""
    text = """(float[n,5,8] x) => (float[] y) {
        a = MatMul(x, w) t = Transpose<perm = [0, 2, 1]>(a) s = MatMul(a, t) y = MatMul(s, v) }"""
    net = prepare(build(text, {"w": normal(8, 8), "v": normal(5, 3)}))
    grids = overridden(parse_scheme("w8a8-asym-pc").grids, net.plan, rules(y={"activation_bits": 16}))
    quantizers = make_quantizers(net.model, net.plan, net.ranges, grids, "mse")
    widths = {name: params.grid.bits for name, params in quantizers.activations.items()}
    assert set(widths.values()) == {8, 16}
    model = quantized_model(net.model, net.plan, quantizers)
    inputs = inputs_of(net.original, batch=8)
    plain, optimized = (run(model, inputs, optimize)["y"] for optimize in (False, True))
    assert np.abs(plain - optimized).max() <= 4 * max(p.scale for p in quantizers.activations.values()) + 1e-5
