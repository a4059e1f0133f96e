"""The float model from a quantized one: what is recovered, what is refused, and what stays."""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from helpers import build, ingested, inputs_of, normal, operators, prepare, relative_error, run, save
from onnx import ModelProto, TensorProto, helper

from onnxqt.cli import main
from onnxqt.errors import ModelError
from onnxqt.ingest import ingest
from onnxqt.model import Model
from onnxqt.numerics import Array


def stripped(model: ModelProto) -> Model:
    with tempfile.TemporaryDirectory() as folder:
        return ingest(save(model, Path(folder)), strip_qdq=True)


def codes(dtype: type, *shape: int) -> Array:
    info = np.iinfo(dtype)
    return np.random.default_rng(0).integers(info.min, info.max, shape, dtype, endpoint=True)


PAIR = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
QUANTIZER: dict[str, Array] = {"s": np.array(0.05, np.float32), "z": np.array(3, np.int8)}


def test_a_pair_becomes_nothing() -> None:
    model = stripped(build(f"(float[n,4] x) => (float[] y) {{ {PAIR} y = Relu(d) }}", QUANTIZER))
    assert operators(model.proto) == ["Relu"]
    assert model.changes[0] == "removed 1 pair(s) of QuantizeLinear and DequantizeLinear"


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("y = Relu(x) q = QuantizeLinear(y, s, z) e = DequantizeLinear(q, s, z) z2 = Neg(e)", ["Relu", "Neg"]),
        (f"{PAIR} e = DequantizeLinear(q, s, z) a = Neg(e) b = Relu(d) y = Add(a, b)", ["Neg", "Relu", "Add"]),
        ("q = QuantizeLinear(x, s, z) k = Clip(q, low, high) d = DequantizeLinear(k, s, z) y = Relu(d)", ["Relu"]),
        ("q = QuantizeLinear(x, s, z) i = Identity(q) d = DequantizeLinear(i, s, z) y = Relu(d)", ["Relu"]),
        ("r = Relu(x) q = QuantizeLinear(r, s, z) y = DequantizeLinear(q, s, z)", ["Relu"]),
        ("q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)", ["Identity"]),
        (
            "q = com.microsoft.QuantizeLinear(x, s, z) d = com.microsoft.DequantizeLinear(q, s, z) y = Relu(d)",
            ["Relu"],
        ),
    ],
    ids=["between", "two-readers", "clip", "identity", "at-the-output", "alone", "contributed"],
)
def test_pairs_of_every_form(nodes: str, expected: list[str]) -> None:
    constants = {**QUANTIZER, "low": np.array(-8, np.int8), "high": np.array(7, np.int8)}
    outputs = "float[n,4] y, float[n,4] z2" if "z2" in nodes else "float[n,4] y"
    before = build(f"(float[n,4] x) => ({outputs}) {{ {nodes} }}", constants, domains=', "com.microsoft": 1')
    assert operators(stripped(before).proto) == expected


CONSTANT = {
    "per-tensor": ("w = DequantizeLinear(c, s, z)", codes(np.int8, 4, 6), np.array(0.1, np.float32), np.int8),
    "one-element": ("w = DequantizeLinear<axis = 0>(c, s, z)", codes(np.int8, 4, 6), normal(1) ** 2, np.int8),
    "no-zero-point": ("w = DequantizeLinear(c, s)", codes(np.int8, 4, 6), np.array(0.1, np.float32), np.int8),
    "per-channel": ("w = DequantizeLinear(c, s, z)", codes(np.uint8, 4, 6), normal(6) ** 2, np.uint8),
    "per-row": ("w = DequantizeLinear<axis = -2>(c, s, z)", codes(np.int8, 4, 6), normal(4) ** 2, np.int8),
    "bias": ("w = DequantizeLinear(c, s)", codes(np.int32, 4, 6), np.array(1e-7, np.float32), np.int32),
    "blocks": (
        "w = DequantizeLinear<axis = 0, block_size = 3>(c, s, z)",
        codes(np.int8, 4, 6),
        normal(2, 6) ** 2,
        np.int8,
    ),
}


@pytest.mark.parametrize(("node", "values", "scale", "dtype"), CONSTANT.values(), ids=CONSTANT)
def test_quantized_constants_are_what_onnx_runtime_makes_of_them(
    node: str, values: Array, scale: Array, dtype: type
) -> None:
    zero_point: Array = np.arange(scale.size, dtype=dtype).reshape(scale.shape)
    constants = {"c": values, "s": scale, **({"z": zero_point} if "z" in node else {})}
    before = build(f"(float[n,4] x) => (float[n,6] y, float[4,6] w) {{ {node} y = MatMul(x, w) }}", constants, opset=21)
    model = stripped(before)
    assert operators(model.proto) == ["MatMul"]
    np.testing.assert_array_equal(model.graph.constant("w"), run(before, inputs_of(before), optimize=False)["w"])


def test_weights_of_four_bits() -> None:
    before = build(
        "(float[n,4] x) => (float[n,6] y) { w = DequantizeLinear<axis = 1>(c, s) y = MatMul(x, w) }",
        {"s": normal(6) ** 2},
        opset=21,
    )
    values = np.random.default_rng(0).integers(-8, 8, (4, 6))
    before.graph.initializer.append(helper.make_tensor("c", TensorProto.INT4, (4, 6), values.reshape(-1).tolist()))
    weight = stripped(before).graph.constant("w")
    np.testing.assert_array_equal(weight, (values * (normal(6) ** 2)).astype(np.float32))


@pytest.mark.parametrize("scheme", ["w8a8-sym-pc", "w4a4-asym-pt"])
def test_what_this_package_exports_is_recovered(scheme: str) -> None:
    """Up to the rounding of the weights: the recovered model has the weights of the quantized one."""
    text = (
        "(float[n,4,6,6] x) => (float[n,3] y) { c = Conv<pads = [1, 1, 1, 1]>(x, w, b) r = Relu(c) "
        "p = GlobalAveragePool(r) f = Flatten(p) y = Gemm(f, v, d) }"
    )
    constants = {"w": normal(5, 4, 3, 3), "b": normal(5, seed=1), "v": normal(5, 3, seed=2), "d": normal(3, seed=3)}
    prepared = prepare(build(text, constants))
    quantized = prepared.quantized(scheme)
    assert "QuantizeLinear" in operators(quantized)
    model = stripped(quantized)
    assert operators(model.proto) == operators(prepared.original)
    assert not ingested(model.proto).changes
    weights = [
        model.graph.initializers[node.inputs[1]] for node in model.graph.nodes if node.op_type in ("Conv", "Gemm")
    ]
    assert [list(weight.dims) for weight in weights] == [[5, 4, 3, 3], [5, 3]]
    levels = {len(np.unique(onnx.numpy_helper.to_array(weight))) for weight in weights}
    assert max(levels) <= (16 if scheme.startswith("w4") else 5 * 256)


def test_float_weights_behind_a_pair_are_as_they_were() -> None:
    """Tools for quantization-aware training write the weight in float, with its quantizers behind it."""
    nodes = "q = QuantizeLinear<axis = 0>(w, s) k = DequantizeLinear<axis = 0>(q, s) y = Gemm(x, k)"
    before = build(f"(float[n,4] x) => (float[n,3] y) {{ {nodes} }}", {"w": normal(4, 3), "s": normal(4) ** 2})
    model = stripped(before)
    assert operators(model.proto) == ["Gemm"]
    np.testing.assert_array_equal(model.graph.constant("w"), normal(4, 3))


def test_quantizers_in_branches() -> None:
    before = build(
        "(float[n,4] x, bool c) => (float[n,4] y) { y = If(c) <"
        "then_branch = a () => (float[n,4] p) "
        "{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) p = Relu(d) }, "
        "else_branch = o () => (float[n,4] r) { r = Neg(x) }> }",
        QUANTIZER,
    )
    (node,) = stripped(before).proto.graph.node
    branch = next(attribute.g for attribute in node.attribute if attribute.name == "then_branch")
    assert [inner.op_type for inner in branch.node] == ["Relu"]


# --- codes at the ends of a model ---------------------------------------------------------------------------


def test_inputs_and_outputs_that_are_codes_stay() -> None:
    before = build(
        "(int8[n,4] x) => (int8[n,3] y) { d = DequantizeLinear(x, s, z) g = Gemm(d, w) y = QuantizeLinear(g, s, z) }",
        {**QUANTIZER, "w": normal(4, 3)},
    )
    model = stripped(before)
    assert operators(model.proto) == ["DequantizeLinear", "Gemm", "QuantizeLinear"]
    assert model.changes == (
        "kept DequantizeLinear 'DequantizeLinear_0': input 'x' of the model is quantized",
        "kept QuantizeLinear 'QuantizeLinear_2': output 'y' of the model is quantized",
    )
    inputs = inputs_of(before)
    np.testing.assert_array_equal(run(model.proto, inputs)["y"], run(before, inputs)["y"])


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strip", [False, True])
@pytest.mark.parametrize(
    ("nodes", "what"),
    [
        ("u, v, w = DynamicQuantizeLinear(x) y = Cast<to = 1>(u)", "DynamicQuantizeLinear 'u'"),
        ("i = Cast<to = 3>(x) m = MatMulInteger(i, c) y = Cast<to = 1>(m)", "MatMulInteger 'm'"),
        (
            "q = QuantizeLinear(x, s, z) m = QLinearMatMul(q, s, z, c, s, z, s, z) y = DequantizeLinear(m, s, z)",
            "QLinear",
        ),
    ],
)
def test_integer_arithmetic_is_refused(tmp_path: Path, nodes: str, what: str, strip: bool) -> None:
    constants = {**QUANTIZER, "c": codes(np.int8, 4, 4)}
    names = nodes.replace("(", " ").replace(")", " ").replace(",", " ").split()
    before = build(
        f"(float[n,4] x) => (float[n,4] y) {{ {nodes} }}", {k: v for k, v in constants.items() if k in names}
    )
    expected = f"{what}.* computes with integers, .* give the float model"
    if not strip and "QLinear" in nodes and "Dynamic" not in nodes:
        expected = "QuantizeLinear 'q' shows that the model is already quantized"
    with pytest.raises(ModelError, match=expected):
        ingest(save(before, tmp_path), strip_qdq=strip)


def test_codes_that_something_else_computes_with_are_refused(tmp_path: Path) -> None:
    nodes = "q = QuantizeLinear(x, s, z) m = Transpose(q) y = DequantizeLinear(m, s, z)"
    before = build(f"(float[n,4] x) => (float[] y) {{ {nodes} }}", QUANTIZER)
    with pytest.raises(
        ModelError, match=r"QuantizeLinear 'QuantizeLinear_0' is not one of a pair: .* give the float model"
    ):
        ingest(save(before, tmp_path), strip_qdq=True)


# --- the command line ---------------------------------------------------------------------------------------


def test_the_command_line_offers_and_takes_the_option(tmp_path: Path) -> None:
    path = save(build(f"(float[n,4] x) => (float[n,4] y) {{ {PAIR} y = Relu(d) }}", QUANTIZER), tmp_path)
    refused = CliRunner().invoke(main, ["inspect", str(path)])
    assert refused.exit_code == 1
    assert "--strip-qdq" in refused.stderr
    taken = CliRunner().invoke(main, ["inspect", str(path), "--strip-qdq"])
    assert taken.exit_code == 0
    assert "removed 1 pair(s)" in taken.stdout


def test_every_command_that_reads_a_model_to_quantize_takes_the_option(tmp_path: Path) -> None:
    nodes = f"{PAIR} y = Gemm(d, w)"
    path = save(build(f"(float[n,4] x) => (float[n,3] y) {{ {nodes} }}", {**QUANTIZER, "w": normal(4, 3)}), tmp_path)
    samples = tmp_path / "calib"
    samples.mkdir()
    np.savez(samples / "samples.npz", x=normal(32, 4))
    options = ["--data", str(samples), "--scheme", "w8a8-sym-pt", "--strip-qdq", "--out"]
    for command in (["calibrate"], ["export"], ["trim", "--steps", "0"]):
        result = CliRunner().invoke(main, [*command, str(path), *options, str(tmp_path / command[0])])
        assert result.exit_code == 0, result.output
    exported = onnx.load(tmp_path / "export" / "schemes" / "w8a8-sym-pt.onnx")
    assert relative_error(run(exported, {"x": normal(32, 4)})["y"], normal(32, 4) @ normal(4, 3)) <= 0.05
