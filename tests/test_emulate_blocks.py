"""Files with scales per block, as other tools write them too."""

import numpy as np
import pytest
from helpers import inputs_of, run
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxqt.emulate import load_program
from onnxqt.numerics import Array


def blocked(codes: Array, axis: int, op_type: str) -> ModelProto:
    """One operator that reads a constant in blocks of two along an axis, and float activations."""
    scales = [-(-size // 2) if i == axis else size for i, size in enumerate(codes.shape)]
    scale = np.linspace(0.1, 0.9, int(np.prod(scales)), dtype=np.float32).reshape(scales)
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["w"], axis=axis, block_size=2),
        helper.make_node(op_type, ["x", "w"], ["y"], name="product"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 5])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * max(2, codes.ndim))
    constants = [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scale, "scale")]
    graph = helper.make_graph(nodes, "blocks", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize(
    ("shape", "axis", "op_type"),
    [((5,), 0, "Mul"), ((5, 4), 0, "MatMul"), ((5, 4), 1, "MatMul"), ((2, 5, 4), 1, "MatMul")],
)
def test_constants_in_blocks_are_float(shape: tuple[int, ...], axis: int, op_type: str) -> None:
    model = blocked(np.random.default_rng(0).integers(-128, 128, shape).astype(np.int8), axis, op_type)
    inputs = inputs_of(model)
    program = load_program(model)
    np.testing.assert_array_equal(program.run(inputs)["y"], run(model, inputs, optimize=False)["y"])
    ((name, _, reason),) = program.float_nodes
    assert name == "product"
    assert reason
