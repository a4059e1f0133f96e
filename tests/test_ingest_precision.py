"""Everything becomes float32: what a model computes in other precisions, and what is refused or left alone."""

from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from helpers import build, ingested, inputs_of, normal, operators, relative_error, run
from onnx import ModelProto, TensorProto

from onnxqt.errors import ModelError
from onnxqt.model import Model
from onnxqt.numerics import Array

# Each of a few float32 operations rounds by 2^-24 = 6e-8 of its result; 1e-5 leaves room for sums and cancellation.
FLOAT32_ERROR = 1e-5

TYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16, "double": TensorProto.DOUBLE}
NAMES = {"float16": "float16", "bfloat16": "bfloat16", "double": "float64"}


def typed(text: str, constants: dict[str, Array], kind: str, opset: int = 17, domains: str = "") -> ModelProto:
    """A model whose text says `T` for a type and 77 for its number, with constants of that type."""
    text = text.replace("T[", f"{kind}[").replace("77", str(TYPES[kind]))
    model = build(text, {}, opset, domains=domains)
    for name, value in constants.items():
        code = TYPES[kind] if value.dtype == np.float32 else onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        model.graph.initializer.append(onnx.helper.make_tensor(name, code, value.shape, value.reshape(-1).tolist()))
    for attribute in tensor_attributes(model.graph):
        values = onnx.numpy_helper.to_array(attribute.t)
        attribute.t.CopyFrom(onnx.helper.make_tensor("", TYPES[kind], values.shape, values.tolist()))
    return model


def tensor_attributes(graph: onnx.GraphProto) -> Iterator[onnx.AttributeProto]:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute
            if attribute.HasField("g"):
                yield from tensor_attributes(attribute.g)


def in_float32(text: str, constants: dict[str, Array], opset: int = 17) -> ModelProto:
    return build(text.replace("T[", "float[").replace("77", "1"), constants, opset)


def types_of(model: ModelProto) -> set[int]:
    """Element types of every constant, input, output and known tensor, in subgraphs too."""

    def of(graph: onnx.GraphProto) -> set[int]:
        values = (*graph.input, *graph.output, *graph.value_info)
        found = {value.type.tensor_type.elem_type for value in values} | {t.data_type for t in graph.initializer}
        for node in graph.node:
            for attribute in node.attribute:
                found |= of(attribute.g) if attribute.HasField("g") else set()
                found |= {attribute.t.data_type} if attribute.HasField("t") else set()
        return found

    return of(model.graph)


TEXTS = {
    "weights": "(T[n,4] x) => (T[n,3] y) { g = Gemm(x, w, b) y = Relu(g) }",
    "constant-node": "(T[n,4] x) => (T[n,4] y) { c = Constant<value = float[1] {2.5}>() y = Mul(x, c) }",
    "casts": "(float[n,4] x) => (float[n,4] y) { h = Cast<to = 77>(x) r = Tanh(h) y = Cast<to = 1>(r) }",
    "cast-like": "(float[n,4] x) => (float[n,4] y) { h = CastLike(x, w) r = Tanh(h) y = CastLike(r, x) }",
    "constant-of-shape": (
        "(T[n,4] x) => (T[n,4] y) { s = Shape(x) c = ConstantOfShape<value = float[1] {1.5}>(s) y = Add(x, c) }"
    ),
    "eye-like": "(T[n,4] x) => (T[n,4] y) { e = EyeLike<dtype = 77>(x) y = Add(x, e) }",
    "norm": "(T[n,4] x) => (T[n,4] y) { y = LayerNormalization(x, g) }",
    "branches": (
        "(T[n,4] x, bool c) => (T[n,4] y) { y = If(c) <"
        "then_branch = a () => (T[n,4] p) { k = Constant<value = float[1] {2.0}>() p = Mul(x, k) }, "
        "else_branch = o () => (T[n,4] q) { h = Cast<to = 1>(x) r = Tanh(h) q = Cast<to = 77>(r) }> }"
    ),
    "loop": (
        "(T[2,4] x, int64 m, bool c) => (T[2,4] y) "
        "{ y = Loop(m, c, x) <body = b (int64 i, bool g, T[2,4] s) => (bool k, T[2,4] t) "
        "{ k = Identity(g) u = Tanh(s) t = Add(u, x) }> }"
    ),
    "integers-stay": (
        "(T[n,4] x, int64[n,4] i) => (T[n,4] y, int64[n,4] j) { f = Cast<to = 77>(i) y = Mul(x, f) j = Neg(i) }"
    ),
}
CONSTANTS = {"w": normal(4, 3), "b": normal(3, seed=1), "g": normal(4, seed=2)}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_model_of_another_precision_is_the_same_model_in_float32(text: str, kind: str) -> None:
    constants: dict[str, Array] = {n: v for n, v in CONSTANTS.items() if f" {n})" in text or f" {n}," in text}
    # Values that all the types hold, so that the two models have the same weights.
    constants = {name: (np.round(4 * value) / 4).astype(np.float32) for name, value in constants.items()}
    model = ingested(typed(text, constants, kind))
    onnx.checker.check_model(model.proto, full_check=True)
    assert not types_of(model.proto) & set(TYPES.values())
    assert any(change.startswith(f"computes in float32 instead of {NAMES[kind]}") for change in model.changes)
    expected = in_float32(text, constants)
    inputs = {name: np.asarray(value) for name, value in inputs_of(expected).items()}
    for name, value in run(expected, inputs).items():
        assert run(model.proto, inputs)[name].dtype == value.dtype
        assert relative_error(run(model.proto, inputs)[name], value) <= FLOAT32_ERROR


def test_inputs_and_outputs_that_change_are_named() -> None:
    text = "(T[n,4] x, float[n,4] z) => (T[n,4] y, float[n,4] u) { y = Relu(x) u = Neg(z) }"
    model = ingested(typed(text, {}, "float16"))
    assert model.changes == ("computes in float32 instead of float16; input 'x' and output 'y' are float32",)


def test_casts_between_precisions_disappear() -> None:
    text = (
        "(float[n,4] x) => (float[n,4] y) { h = Cast<to = 77>(x) r = Tanh(h) d = Cast<to = 11>(r) y = Cast<to = 1>(d) }"
    )
    assert operators(ingested(typed(text, {}, "float16")).proto) == ["Tanh"]


def test_a_float32_model_is_left_alone() -> None:
    model = ingested(build("(float[n,4] x) => (float[n,3] y) { y = Gemm(x, w) }", {"w": normal(4, 3)}))
    assert not model.changes


def test_float64_is_computed_as_exactly_as_float32_can() -> None:
    before = build(
        "(double[n,4] x) => (double[] y) { g = Gemm<alpha = 0.3>(x, w) y = Tanh(g) }", {"w": np.ones((4, 3))}
    )
    after = ingested(before).proto
    inputs = inputs_of(before)
    actual = run(after, {"x": inputs["x"].astype(np.float32)})["y"]
    assert relative_error(actual, run(before, inputs)["y"]) <= FLOAT32_ERROR


@pytest.mark.parametrize("place", ["initializer", "node"])
def test_a_constant_beyond_float32_is_refused(place: str) -> None:
    if place == "node":
        before = build("(double[n,4] x) => (double[] y) { w = Constant<value = double[1] {1e39}>() y = Mul(x, w) }")
    else:
        before = build("(double[n,4] x) => (double[] y) { y = Mul(x, w) }", {"w": np.array([1, 2, 3, 1e39])})
    with pytest.raises(ModelError, match=r"constant 'w' holds the float64 value 1e\+39, beyond .* export the model"):
        ingested(before)


def test_infinity_is_no_overflow() -> None:
    before = build("(double[n,2] x) => (double[n,2] y) { y = Min(x, w) }", {"w": np.array([np.inf, -np.inf])})
    value = ingested(before).graph.constant("w")
    np.testing.assert_array_equal(value, np.array([np.inf, -np.inf], np.float32))


# --- operators of foreign domains -------------------------------------------------------------------------


def foreign(nodes: str, values: str = "") -> Model:
    text = f"(T[n,4] x) => (T[n,4] y) <{values}> {{ {nodes} }}" if values else f"(T[n,4] x) => (T[n,4] y) {{ {nodes} }}"
    return ingested(typed(text, {"w": normal(4)}, "float16", domains=', "vendor": 1'))


def test_foreign_operators_keep_their_precision_between_casts() -> None:
    model = foreign("a = Relu(x) f = vendor.Op(a, w) g = Neg(f) y = Add(g, w)", "T[n,4] f")
    assert operators(model.proto) == ["Relu", "Cast", "Op", "Cast", "Neg", "Add"]
    assert model.changes[1] == "kept Op 'Op_1' of the domain 'vendor' in float16"
    (op,) = (node for node in model.graph.nodes if node.op_type == "Op")
    kinds = {t.data_type for name, t in model.graph.initializers.items() if name in op.inputs}
    assert kinds == {TensorProto.FLOAT16}
    assert model.graph.is_float(model.graph.producer["y"].inputs[0])
    assert model.graph.is_float(model.graph.producer["y"].inputs[1])
    assert not ingested(model.proto).changes


def test_foreign_operators_hand_their_precision_to_each_other() -> None:
    model = foreign("f = vendor.Op(x) g = vendor.Op(f) y = Neg(g)", "T[n,4] f, T[n,4] g")
    assert operators(model.proto) == ["Cast", "Op", "Op", "Cast", "Neg"]
    assert not ingested(model.proto).changes


def test_what_a_foreign_operator_gives_out_is_left_alone_where_its_type_is_unknown() -> None:
    assert operators(foreign("f = vendor.Op(x) y = Neg(f)").proto) == ["Cast", "Op", "Neg"]


def test_contributed_operators_of_onnx_runtime_compute_in_float32() -> None:
    text = "(T[n,4] x) => (T[n,4] y) { g = com.microsoft.QuickGelu(x) y = Neg(g) }"
    model = ingested(typed(text, {}, "float16", domains=', "com.microsoft": 1'))
    assert operators(model.proto) == ["QuickGelu", "Neg"]
    assert run(model.proto, {"x": normal(2, 4)})["y"].dtype == np.float32
