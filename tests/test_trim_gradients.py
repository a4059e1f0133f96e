"""Every gradient that training may use, as onnxruntime-training computes it, against differences of the forward graph.

A case is one operator. Its loss is sum(r y) over its outputs y with random r, and the derivative of that by each
element of each parameter comes from ONNX Runtime's float32 inference: central differences D(h) of y, extrapolated
(Richardson) as (4 D(h/2) - D(h)) / 3, which leaves an error of h^4/480 times the fifth derivative.
"""

import itertools
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxqt.data import open_samples
from onnxqt.errors import TrainingError
from onnxqt.model import Model, ingest
from onnxqt.numerics import Array
from onnxqt.ops import OPS, Gradient
from onnxqt.pipeline import Settings, input_specs
from onnxqt.pipeline import trim as run_pipeline
from onnxqt.plan import make_plan
from onnxqt.runtime import MAX_IR_VERSION, Session
from onnxqt.trim import training_graph
from onnxqt.trim.losses import find_targets
from onnxqt.trim.quantizers import functions

H = 2.0**-4
# Inference is off by about four float32 roundings of the largest value (sums have at most 20 terms, and sqrt(20)
# is about 4); the differences divide that by h/2 with weight 4/3 and by h with weight 1/3, from two values each.
ROUNDING = 4 * 2.0**-24 * 3 / H
# Largest fifth derivative: 24 / x^5 of log, at x = 1. That of exp at 2 is 8, all others are smaller.
TRUNCATION = 24 * H**4 / 480


@dataclass(frozen=True, eq=False)
class Case:
    """One operator: its float32 inputs are parameters, except those in `fixed`; other inputs are constants."""

    op: str
    inputs: tuple[Array | None, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    fixed: tuple[int, ...] = ()
    outputs: int = 1
    opset: int = 17

    @cached_property
    def names(self) -> list[str]:
        return ["" if value is None else f"p{i}" if self._moves(i) else f"c{i}" for i, value in enumerate(self.inputs)]

    def _moves(self, index: int) -> bool:
        value = self.inputs[index]
        return index not in self.fixed and value is not None and value.dtype == np.float32

    @property
    def parameters(self) -> dict[str, Array]:
        named = zip(self.names, self.inputs, strict=True)
        return {name: value for name, value in named if value is not None and name.startswith("p")}

    def nodes(self) -> list[onnx.NodeProto]:
        raw = [f"raw{i}" for i in range(self.outputs)]
        casts = [helper.make_node("Cast", [name], [f"y{i}"], to=TensorProto.FLOAT) for i, name in enumerate(raw)]
        return [helper.make_node(self.op, self.names, raw, name="case", **self.attributes), *casts]

    def forward(self) -> onnx.ModelProto:
        """Parameters -> outputs y, as inference sees them."""
        inputs = [value_info(name, value.shape) for name, value in self.parameters.items()]
        return self._model(self.nodes(), inputs, [f"y{i}" for i in range(self.outputs)], {})

    def training(self, shapes: list[tuple[int, ...]]) -> onnx.ModelProto:
        """r -> loss, with the parameters as initializers."""
        nodes = self.nodes()
        for i in range(self.outputs):
            nodes.append(helper.make_node("Mul", [f"y{i}", f"r{i}"], [f"weighted{i}"]))
            nodes.append(helper.make_node("ReduceSum", [f"weighted{i}"], [f"loss{i}"], keepdims=0))
        nodes.append(helper.make_node("Sum", [f"loss{i}" for i in range(self.outputs)], ["loss"]))
        if self.outputs == 1:
            nodes[-1].op_type = "Identity"
        elif self.outputs == 2:
            nodes[-1].op_type = "Add"
        inputs = [value_info(f"r{i}", shape) for i, shape in enumerate(shapes)]
        model = self._model(nodes, inputs, ["loss"], self.parameters)
        return onnx.shape_inference.infer_shapes(model, strict_mode=True)

    def _model(
        self,
        nodes: list[onnx.NodeProto],
        inputs: list[onnx.ValueInfoProto],
        outputs: list[str],
        parameters: Mapping[str, Array],
    ) -> onnx.ModelProto:
        fixed = {n: v for n, v in zip(self.names, self.inputs, strict=True) if v is not None and n.startswith("c")}
        constants = [numpy_helper.from_array(value, name) for name, value in {**fixed, **parameters}.items()]
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        if outputs == ["loss"]:
            results = [value_info("loss", ())]
        graph = helper.make_graph(nodes, "case", inputs, results, constants)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=MAX_IR_VERSION
        )


def value_info(name: str, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


# --- data: away from kinks by more than h ---------------------------------------------------------------


def random(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def above_one(*shape: int) -> Array:
    """In [1, 2]."""
    return random(f"above {shape}").uniform(1, 2, shape).astype(np.float32)


def signed(*shape: int) -> Array:
    """In [-1.5, -0.5] and [0.5, 1.5]."""
    rng = random(f"signed {shape}")
    return (rng.choice([-1, 1], shape) * rng.uniform(0.5, 1.5, shape)).astype(np.float32)


def around_clip(*shape: int) -> Array:
    """On both sides of -1 and of 1, at a distance of 0.25."""
    rng = random(f"clip {shape}")
    return (rng.choice([-1.5, -0.5, 0.5, 1.5], shape) + rng.uniform(-0.25, 0.25, shape)).astype(np.float32)


def distinct(*shape: int) -> Array:
    """In [-1, 1), every two values at least 1/4 of h apart in rank order: scaled so that neighbours differ by 3 h."""
    order = random(f"distinct {shape}").permutation(int(np.prod(shape))).reshape(shape)
    return ((order - order.size // 2) * 3 * H).astype(np.float32)


def scalar(value: float) -> Array:
    return np.array(value, np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


# --- the cases ------------------------------------------------------------------------------------------

X = signed(2, 4, 6, 7)


def convolutions() -> dict[str, Case]:
    def conv(x: Array, weight: tuple[int, ...], bias: bool = True, **attributes: Any) -> Case:
        return Case("Conv", (x, signed(*weight), *([signed(weight[0])] if bias else [])), attributes)

    return {
        "Conv-plain": conv(X, (3, 4, 3, 3)),
        "Conv-no-bias": conv(X, (3, 4, 1, 1), bias=False),
        "Conv-stride-2-remainder": conv(X, (3, 4, 3, 3), strides=[2, 2]),
        "Conv-asymmetric-pads": conv(X, (3, 4, 3, 2), pads=[1, 0, 2, 1], strides=[2, 1]),
        "Conv-dilated": conv(X, (3, 4, 2, 2), dilations=[2, 3]),
        "Conv-two-groups": conv(X, (6, 2, 3, 3), group=2, pads=[1, 1, 1, 1]),
        "Conv-depthwise": conv(X, (4, 1, 3, 3), group=4, pads=[1, 1, 1, 1], strides=[2, 2]),
        "Conv-same-upper": conv(X, (3, 4, 2, 3), auto_pad="SAME_UPPER", strides=[2, 2]),
        "Conv-same-lower": conv(X, (3, 4, 2, 3), auto_pad="SAME_LOWER"),
        "Conv-1d": conv(signed(2, 3, 8), (4, 3, 3), pads=[1, 1], strides=[2]),
        "Conv-3d": conv(signed(2, 2, 3, 4, 3), (2, 2, 2, 2, 2)),
    }


def matrices() -> dict[str, Case]:
    def gemm(a: Array, b: Array, *c: Array, **attributes: Any) -> Case:
        return Case("Gemm", (a, b, *c), attributes)

    def matmul(a: Array, b: Array) -> Case:
        return Case("MatMul", (a, b))

    return {
        "Gemm-plain": gemm(signed(3, 5), signed(5, 4), signed(4)),
        "Gemm-transposed": gemm(signed(5, 3), signed(4, 5), signed(1, 4), transA=1, transB=1),
        "Gemm-factors": gemm(signed(3, 5), signed(4, 5), signed(3, 1), transB=1, alpha=0.5, beta=2.0),
        "Gemm-no-bias": gemm(signed(3, 5), signed(5, 4)),
        "Gemm-scalar-bias": gemm(signed(3, 5), signed(5, 4), scalar(0.5)),
        "MatMul-2d": matmul(signed(3, 5), signed(5, 4)),
        "MatMul-batch": matmul(signed(2, 3, 5), signed(2, 5, 4)),
        "MatMul-batch-matrix": matmul(signed(2, 3, 5), signed(5, 4)),
        "MatMul-broadcast": matmul(signed(2, 1, 3, 5), signed(3, 5, 2)),
    }


def elementwise() -> dict[str, Case]:
    x, row, column = above_one(2, 3, 4), above_one(4), above_one(2, 1, 1)
    unary = {
        **{op: signed(3, 5) for op in ("Neg", "Abs", "Exp", "Erf", "Sigmoid", "Tanh", "Relu", "LeakyRelu", "Identity")},
        **{op: above_one(3, 5) for op in ("Sqrt", "Log")},
    }
    binary = ("Add", "Sub", "Mul", "Div", "Pow")
    return {
        **{op: Case(op, (values,)) for op, values in unary.items()},
        **{f"{op}-same-shape": Case(op, (x, above_one(2, 3, 4) + 1)) for op in binary},
        **{f"{op}-broadcast-right": Case(op, (x, row)) for op in binary},
        **{f"{op}-broadcast-both": Case(op, (column, row)) for op in binary},
        "Pow-square": Case("Pow", (signed(3, 5), scalar(2.0)), fixed=(1,)),
        "LeakyRelu-alpha": Case("LeakyRelu", (signed(3, 5),), {"alpha": 0.25}),
        "Clip": Case("Clip", (around_clip(4, 5), scalar(-1), scalar(1)), fixed=(1, 2)),
        "Clip-above": Case("Clip", (around_clip(4, 5), None, scalar(1)), fixed=(2,)),
        "Where": Case("Where", (np.array([[True], [False], [True]]), signed(3, 4), signed(4))),
        "Cast": Case("Cast", (signed(3, 4),), {"to": TensorProto.DOUBLE}),
        "Softmax": Case("Softmax", (signed(3, 5),), {"axis": -1}),
        "Softmax-inner-axis": Case("Softmax", (signed(2, 3, 4),), {"axis": 1}),
        "LogSoftmax": Case("LogSoftmax", (signed(3, 5),), {"axis": -1}),
        "LogSoftmax-inner-axis": Case("LogSoftmax", (signed(2, 3, 4),), {"axis": 1}),
    }


def reductions() -> dict[str, Case]:
    return {
        "GlobalAveragePool": Case("GlobalAveragePool", (X,)),
        "ReduceMean-attribute": Case("ReduceMean", (X,), {"axes": [-1, 2], "keepdims": 0}),
        "ReduceMean-input": Case("ReduceMean", (X, ints(1)), {"keepdims": 1}, opset=18),
        "ReduceMean-all": Case("ReduceMean", (X,), {"keepdims": 1}),
        "ReduceSum": Case("ReduceSum", (X, ints(1, -1)), {"keepdims": 0}),
        "ReduceSum-keep": Case("ReduceSum", (X, ints(2)), {"keepdims": 1}),
    }


def moves() -> dict[str, Case]:
    x = signed(2, 3, 4)
    return {
        "Reshape": Case("Reshape", (x, ints(0, -1))),
        "Transpose": Case("Transpose", (x,), {"perm": [2, 0, 1]}),
        "Flatten": Case("Flatten", (x,), {"axis": 2}),
        "Squeeze": Case("Squeeze", (signed(2, 1, 3, 1), ints(1, -1))),
        "Unsqueeze": Case("Unsqueeze", (x, ints(0, -1))),
        "Slice": Case("Slice", (x, ints(1, 0), ints(3, 9), ints(1, 2), ints(1, 3))),
        "Slice-backwards": Case("Slice", (x, ints(-1), ints(-5), ints(2), ints(-2))),
        "Pad": Case("Pad", (x, ints(0, 1, 0, 0, 0, 2))),
        "Pad-value": Case("Pad", (x, ints(0, 1, 0, 0, 0, 2), scalar(3.0)), fixed=(2,)),
        "Concat": Case("Concat", (x, signed(2, 1, 4), signed(2, 2, 4)), {"axis": 1}),
        "Expand": Case("Expand", (signed(3, 1), ints(2, 3, 4))),
        "Tile": Case("Tile", (x, ints(1, 2, 3))),
        "Gather": Case("Gather", (x, ints(2, 0, 2, -1)), {"axis": 1}),
        "Split": Case("Split", (x, ints(1, 3)), {"axis": 2}, outputs=2),
    }


def max_pools() -> dict[str, Case]:
    x = distinct(2, 2, 6, 7)

    def pool(kernel: list[int], values: Array = x, **attributes: Any) -> Case:
        return Case("MaxPool", (values,), {"kernel_shape": kernel, **attributes})

    return {
        "MaxPool-2": pool([2, 2], strides=[2, 2]),
        "MaxPool-overlap": pool([3, 3], strides=[1, 2]),
        "MaxPool-overlap-pads": pool([3, 3], strides=[2, 2], pads=[1, 0, 0, 1]),
        "MaxPool-ceil": pool([2, 2], strides=[2, 2], ceil_mode=1),
        "MaxPool-dilated": pool([2, 2], dilations=[2, 3]),
        "MaxPool-same-upper": pool([3, 2], strides=[2, 2], auto_pad="SAME_UPPER"),
        "MaxPool-same-lower": pool([2, 3], strides=[2, 1], auto_pad="SAME_LOWER"),
        "MaxPool-1d": pool([3], distinct(2, 3, 7), strides=[2], pads=[1, 0]),
        "MaxPool-3d": pool([2, 2, 2], distinct(1, 2, 3, 4, 3)),
    }


def average_pools() -> dict[str, Case]:
    x = signed(2, 2, 6, 7)  # an odd and an even size: every stride of 2 leaves a remainder somewhere

    def pool(kernel: list[int], values: Array = x, opset: int = 17, **attributes: Any) -> Case:
        return Case("AveragePool", (values,), {"kernel_shape": kernel, **attributes}, opset=opset)

    cases = {}
    for kernel, stride, pads, include, ceil in itertools.product(
        (2, 3), (1, 2), ([0, 0, 0, 0], [1, 0, 0, 1]), (0, 1), (0, 1)
    ):
        name = f"AveragePool-k{kernel}-s{stride}-p{''.join(map(str, pads))}-include{include}-ceil{ceil}"
        cases[name] = pool(
            [kernel] * 2, strides=[stride] * 2, pads=pads, count_include_pad=include, ceil_mode=ceil
        )
    for mode, kernel, stride, include in itertools.product(("SAME_UPPER", "SAME_LOWER"), (2, 3), (1, 2), (0, 1)):
        name = f"AveragePool-{mode.lower()}-k{kernel}-s{stride}-include{include}"
        cases[name] = pool([kernel] * 2, strides=[stride] * 2, auto_pad=mode, count_include_pad=include)
    return cases | {
        "AveragePool-valid": pool([3, 2], strides=[2, 2], auto_pad="VALID"),
        "AveragePool-1d": pool([3], signed(2, 3, 8), strides=[2], pads=[1, 1]),
        "AveragePool-3d": pool([2, 2, 2], signed(1, 2, 3, 4, 3), strides=[1, 2, 2]),
        "AveragePool-dilated": pool([2, 2], opset=19, dilations=[2, 3], strides=[2, 1], pads=[1, 0, 0, 1]),
    }


CASES = {
    **convolutions(),
    **matrices(),
    **elementwise(),
    **reductions(),
    **moves(),
    **max_pools(),
    **average_pools(),
}


# --- both sides -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Trained:
    """What the training process made of the cases, each in its folder."""

    root: Path

    def of(self, name: str) -> dict[str, Array]:
        folder = self.root / name
        log = (folder / "log").read_text(errors="replace").splitlines() if (folder / "log").exists() else []
        assert (folder / "gradients.npz").exists(), "\n".join(["training failed:", *log[-6:]])
        with np.load(folder / "gradients.npz") as file:
            return dict(file)


def weights(name: str, shapes: list[tuple[int, ...]]) -> list[Array]:
    """The r of each output: in [-1.5, -0.5] and [0.5, 1.5]."""
    rng = random(name)
    return [(rng.choice([-1, 1], s) * rng.uniform(0.5, 1.5, s)).astype(np.float32) for s in shapes]


def outputs_of(case: Case, session: Session, changed: Mapping[str, Array]) -> list[Array]:
    results = session.run({**case.parameters, **changed})
    return [results[f"y{i}"].astype(np.float64) for i in range(case.outputs)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    if sys.platform == "win32":
        pytest.skip("the training process of the tests forks")
    root = tmp_path_factory.mktemp("gradients")
    for name, case in CASES.items():
        shapes = [y.shape for y in outputs_of(case, Session(case.forward(), optimize=False), {})]
        write_case(root / name, case.training(shapes), weights(name, shapes))
    for blend in BLENDS:
        write_case(root / f"blend-{blend}", straight_through_model(), [UPSTREAM], blend=np.float32(blend))
    folders = [str(folder) for folder in root.iterdir()]
    subprocess.run([sys.executable, Path(__file__).with_name("trainer_process.py"), *folders], check=True)
    return Trained(root)


def write_case(folder: Path, model: onnx.ModelProto, r: list[Array], **feeds: Any) -> None:
    folder.mkdir()
    onnx.save(model, folder / "forward.onnx")
    np.savez(folder / "feeds.npz", **{f"r{i}": value for i, value in enumerate(r)}, **feeds)  # type: ignore[arg-type]


def differences(case: Case, r: list[Array], name: str) -> tuple[Array, Array]:
    """Derivative of sum(r y) by each element of a parameter, and how far off it may be."""
    session = Session(case.forward(), optimize=False)
    value = case.parameters[name]
    derivative, tolerance = np.zeros(value.shape), np.zeros(value.shape)

    def moved(index: tuple[int, ...], step: float) -> list[Array]:
        changed = value.copy()
        changed[index] += np.float32(step)
        return outputs_of(case, session, {name: changed})

    for index in np.ndindex(value.shape):
        wide, narrow = ([moved(index, step) for step in (h, -h)] for h in (H, H / 2))
        for i, weight in enumerate(r):
            coarse, fine = ((up[i] - down[i]) / (2 * h) for (up, down), h in ((wide, H), (narrow, H / 2)))
            derivative[index] += np.sum(weight * (4 * fine - coarse) / 3)
            reach = np.sum(np.abs(weight)[wide[0][i] != wide[1][i]])
            tolerance[index] += reach * (ROUNDING * np.abs(wide[0][i]).max() + TRUNCATION)
    return derivative, tolerance


@pytest.mark.parametrize("name", CASES)
def test_gradient_equals_differences(name: str, trained: Trained) -> None:
    case, result = CASES[name], trained.of(name)
    ys = outputs_of(case, Session(case.forward(), optimize=False), {})
    r = weights(name, [y.shape for y in ys])
    assert case.parameters.keys() <= result.keys()
    for parameter in case.parameters:
        derivative, tolerance = differences(case, r, parameter)
        assert np.any(derivative != 0)
        wrong = np.abs(result[parameter] - derivative) > tolerance
        assert not wrong.any(), f"{parameter}: {result[parameter][wrong][:5]} instead of {derivative[wrong][:5]}"


@pytest.mark.parametrize("name", CASES)
def test_training_graph_computes_the_same_loss(name: str, trained: Trained) -> None:
    case, result = CASES[name], trained.of(name)
    ys = outputs_of(case, Session(case.forward(), optimize=False), {})
    terms = [weight * y for weight, y in zip(weights(name, [y.shape for y in ys]), ys, strict=True)]
    # Each product and each partial sum in float32, and the operator itself as in `ROUNDING`.
    tolerance = sum(2.0**-22 * np.sum(np.abs(t)) for t in terms)
    expected = sum(float(np.sum(t)) for t in terms)
    assert result["loss"] == pytest.approx(expected, rel=0, abs=tolerance)
    assert result["evaluated"] == pytest.approx(expected, rel=0, abs=tolerance)


def test_every_operator_with_a_gradient_has_a_case() -> None:
    differentiable = {op for op, row in OPS.items() if row.gradient is not Gradient.NONE}
    assert {case.op for case in CASES.values()} == differentiable


# --- straight-through -----------------------------------------------------------------------------------

BLENDS = (0.0, 0.5, 1.0)
QMIN, QMAX, TAU = -3, 3, 1.0
UPSTREAM = np.array([0.5, -1.25, 2.0, -0.75, 1.5, 3.0, -2.0], np.float32)
# Scale 0.5, zero point 1: the grid covers [-2, 1]. Inside, on a tie, and outside on both sides; beyond tau too.
INSIDE_AND_OUTSIDE = np.array([0.3, -0.25, 0.75, 1.2, 50.0, -2.3, -70.0], np.float32)


def straight_through_model() -> onnx.ModelProto:
    """loss = sum(r ProgressiveQDQ(p0)) + sum(r ReversePrune(p1))."""
    settings = {
        "scale": np.array(0.5, np.float32),
        "zero_point": np.array(1, np.int8),
        "qmin": np.array(QMIN, np.int8),
        "qmax": np.array(QMAX, np.int8),
        "tau": np.array(TAU, np.float32),
        "p0": INSIDE_AND_OUTSIDE,
        "p1": INSIDE_AND_OUTSIDE,
    }
    quantizer = ["p0", "scale", "zero_point", "qmin", "qmax", "blend"]
    nodes = [
        helper.make_node("ProgressiveQDQ", quantizer, ["y0"], domain="onnxqt", axis=0),
        helper.make_node("ReversePrune", ["p1", "tau"], ["y1"], domain="onnxqt"),
        helper.make_node("Add", ["y0", "y1"], ["y"]),
        helper.make_node("Mul", ["y", "r0"], ["weighted"]),
        helper.make_node("ReduceSum", ["weighted"], ["loss"], keepdims=0),
    ]
    inputs = [value_info("r0", UPSTREAM.shape), value_info("blend", ())]
    constants = [numpy_helper.from_array(value, name) for name, value in settings.items()]
    graph = helper.make_graph(nodes, "straight through", inputs, [value_info("loss", ())], constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("onnxqt", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=MAX_IR_VERSION, functions=functions(17))


@pytest.mark.parametrize("blend", BLENDS)
def test_straight_through_inside_and_outside_the_range(blend: float, trained: Trained) -> None:
    result = trained.of(f"blend-{blend}")
    np.testing.assert_array_equal(result["p0"], UPSTREAM)  # exactly: the rule is the identity
    np.testing.assert_array_equal(result["p1"], UPSTREAM)
    grid = np.clip(np.rint(INSIDE_AND_OUTSIDE / 0.5) + 1, QMIN, QMAX) - 1
    blended = (1 - blend) * INSIDE_AND_OUTSIDE.astype(np.float64) + blend * 0.5 * grid
    expected = np.dot(UPSTREAM, blended + np.clip(INSIDE_AND_OUTSIDE, -TAU, TAU))
    assert result["loss"] == pytest.approx(expected, rel=0, abs=300 * 2.0**-22)  # terms up to 300, a few roundings


# --- what has no gradient -------------------------------------------------------------------------------

Build = Callable[[list[onnx.NodeProto], list[int | str]], Model]


@pytest.fixture
def ingested(tmp_path: Path) -> Build:
    def build(nodes: list[onnx.NodeProto], shape: list[int | str]) -> Model:
        constants = [
            numpy_helper.from_array(signed(3, 2, 3, 3), "w"),
            numpy_helper.from_array(signed(3, 3, 1, 1), "v"),
        ]
        graph = helper.make_graph(
            nodes,
            "model",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            constants,
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
        return ingest(tmp_path / "m.onnx")

    return build


def conv(source: str, target: str, weight: str = "w") -> onnx.NodeProto:
    return helper.make_node("Conv", [source, weight], [target], name=f"conv_{target}")


def run_trim(model: Model, folder: Path) -> None:
    onnx.save(model.proto, folder / "model.onnx")
    run_pipeline(folder / "model.onnx", {"x": signed(40, 2, 5, 5)}, out=folder / "out", settings=Settings(steps=1, batch_size=2))


def test_operator_without_gradient_behind_a_weight_is_refused(ingested: Build, tmp_path: Path) -> None:
    swish = helper.make_node("HardSwish", ["a"], ["b"], name="swish")
    model = ingested([conv("x", "a"), swish, conv("b", "y", "v")], ["n", 2, 5, 5])
    with pytest.raises(TrainingError, match=r"no gradient for operator HardSwish \(node 'swish'\).*onnxqt export"):
        run_trim(model, tmp_path)


def test_operator_without_gradient_before_all_weights_is_allowed(ingested: Build, tmp_path: Path) -> None:
    swish = helper.make_node("HardSwish", ["x"], ["a"], name="swish")
    model = ingested([swish, conv("a", "y")], ["n", 2, 5, 5])
    run_trim(model, tmp_path)


def test_operator_of_a_foreign_domain_is_named_with_it(ingested: Build, tmp_path: Path) -> None:
    gelu = helper.make_node("Gelu", ["a"], ["b"], name="gelu", domain="com.microsoft")
    model = ingested([conv("x", "a"), gelu, conv("b", "y", "v")], ["n", 2, 5, 5])
    with pytest.raises(TrainingError, match=r"com\.microsoft::Gelu \(node 'gelu'\)"):
        run_trim(model, tmp_path)


def test_average_pool_over_unknown_sizes_is_refused(ingested: Build) -> None:
    pool = helper.make_node("AveragePool", ["a"], ["y"], name="pool", kernel_shape=[2, 2])
    model = ingested([conv("x", "a"), pool], ["n", 2, "height", "width"])
    with pytest.raises(TrainingError, match=r"AveragePool 'pool' .*fixed height and width"):
        training_graph(model, make_plan(model), find_targets(model), "distill")


def test_model_without_weights_is_refused(ingested: Build, tmp_path: Path) -> None:
    model = ingested([helper.make_node("Relu", ["x"], ["y"])], ["n", 2, 5, 5])
    samples = open_samples({"x": signed(40, 2, 5, 5)}, input_specs(model))
    assert samples.count == 40
    with pytest.raises(TrainingError, match="no Conv, ConvTranspose, Gemm or MatMul"):
        run_trim(model, tmp_path)
