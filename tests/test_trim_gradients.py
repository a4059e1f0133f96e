"""Every gradient that training may use, as onnxruntime-training computes it, against differences of the forward graph.

The loss of a case is sum(r y) over its outputs y with random r. Its derivative by each element of each parameter
comes from ONNX Runtime's float32 inference: central differences D(h) of y, extrapolated (Richardson) as
(4 D(h/2) - D(h)) / 3, which leaves an error of h^4/480 times the fifth derivative.
"""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from gradient_cases import CASES as OTHER_CASES
from gradient_cases import Case, H, ints, random, signed, value_info
from gradient_cases_fast import CASES_FAST, LEFT, TAKEN
from gradient_cases_spatial import CASES_SPATIAL
from onnx import TensorProto, helper, numpy_helper

from onnxqt.calibrate import calibrate
from onnxqt.data import DataSource, open_samples
from onnxqt.ingest import ingest
from onnxqt.model import Model, input_specs
from onnxqt.numerics import Array
from onnxqt.plan import make_plan
from onnxqt.runtime import MAX_IR_VERSION, MAX_OPSET, Session
from onnxqt.schemes import parse_scheme
from onnxqt.trim import Reach, Subject, Trimmed, TrimSettings, reach, scheme_regime, trim
from onnxqt.trim import job as jobs
from onnxqt.trim.gradients.built_in import BUILT_IN, BuiltIn
from onnxqt.trim.gradients.faster import FASTER
from onnxqt.trim.gradients.flow import RULES, find_flow
from onnxqt.trim.gradients.rule import NoGradientError

# Inference is off by about four float32 roundings of the largest value (sums have at most 20 terms, and sqrt(20)
# is about 4); the differences divide that by h/2 with weight 4/3 and by h with weight 1/3, from two values each.
ROUNDING = 4 * 2.0**-24 * 3 / H
# Largest fifth derivative: that of a / x, 120 a / x^6, at a = 2 and x = 1. log has 24, exp 4.5, the others less.
TRUNCATION = 240 * H**4 / 480

CASES = {**OTHER_CASES, **CASES_SPATIAL, **CASES_FAST}
# The first case of each operator once more as it is in the newest opset, if it can be written the same way there.
CASES |= {
    f"{op}-opset-{MAX_OPSET}": replace(next(case for case in CASES.values() if case.op == op), opset=MAX_OPSET)
    for op in sorted({case.op for case in CASES.values()} - {"GridSample", "ReduceMean", "Split"})
}
FORWARD = "forward.onnx"

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
    results = session.run({**case.zeros, **case.parameters, **changed})
    return [results[f"y{i}"].astype(np.float64) for i in range(case.outputs)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    if sys.platform == "win32":
        pytest.skip("the training process of the tests forks")
    root = tmp_path_factory.mktemp("gradients")
    for name, case in CASES.items():
        shapes = [y.shape for y in outputs_of(case, Session(case.forward(), optimize=False), {})]
        write_case(root / name, case.training(shapes), weights(name, shapes), **case.zeros)
        if case.ingested:
            onnx.save(ingest(root / name / FORWARD).proto, root / name / FORWARD)
    for name, (case, _) in TIES.items():
        shapes = [y.shape for y in outputs_of(case, Session(case.forward(), optimize=False), {})]
        write_case(root / name, case.training(shapes), [np.ones(shape, np.float32) for shape in shapes], **case.zeros)
    write_case(root / "partly", partly_stopped_model(), [UPSTREAM])
    for blend in BLENDS:
        write_case(root / f"blend-{blend}", straight_through_model(), [UPSTREAM], blend=np.float32(blend))
    folders = [str(folder) for folder in root.iterdir()]
    subprocess.run([sys.executable, Path(__file__).with_name("trainer_process.py"), *folders], check=True)
    return Trained(root)


def write_case(folder: Path, model: onnx.ModelProto, r: list[Array], **feeds: Any) -> None:
    folder.mkdir()
    onnx.save(model, folder / FORWARD)
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


def way_of(name: str) -> str:
    """Whose gradient a case takes, as the flow through its forward graph decides."""
    case = CASES[name]
    shapes = [y.shape for y in outputs_of(case, Session(case.forward(), optimize=False), {})]
    proto = case.training(shapes)
    if case.ingested:
        return way_through(ingested_proto(proto), case)
    return way_through(proto, case)


def ingested_proto(proto: onnx.ModelProto) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(proto, Path(folder) / FORWARD)
        return ingest(Path(folder) / FORWARD).proto


def way_through(proto: onnx.ModelProto, case: Case) -> str:
    passage = find_flow(Model(proto, ""), case.parameters, ["loss"]).passages["case"]
    if isinstance(passage.gradient, BuiltIn):
        return "built in"
    with contextlib.suppress(KeyError, NoGradientError):
        if FASTER[case.op](passage.call) == passage.gradient:
            return "faster"
    return "rule"


@pytest.fixture(scope="module")
def ways() -> dict[str, str]:
    return {name: way_of(name) for name in CASES if CASES[name].op in {*BUILT_IN, *FASTER}}


@pytest.mark.parametrize("name", CASES)
def test_case_uses_the_rule_of_its_operator(name: str, trained: Trained) -> None:
    op = CASES[name].op
    if op in RULES and op not in BUILT_IN:
        assert trained.of(name)["rules"] == 1


def test_training_uses_what_the_flow_decided(ways: dict[str, str], trained: Trained) -> None:
    for name, way in ways.items():
        assert trained.of(name)["rules"] == (way != "built in"), name


def test_rules_that_help_out_are_used(ways: dict[str, str]) -> None:
    """Where the trainer's own gradient is right in some cases, or slow in some, all ways are compared."""
    used = {op: {way for name, way in ways.items() if CASES[name].op == op} for op in {*BUILT_IN, *FASTER}}
    helped_out = {op for op in BUILT_IN if {"built in", "rule"} <= used[op]}
    assert helped_out == set(BUILT_IN) & set(RULES)
    assert {op for op in used if "faster" in used[op]} == set(FASTER)


@pytest.mark.parametrize("name", CASES_FAST)
def test_faster_rules_are_used_where_they_can_be(name: str, ways: dict[str, str]) -> None:
    assert (name in TAKEN, name in LEFT) == (ways[name] == "faster", ways[name] != "faster")


# Where values are equal there is no derivative: (gradient of p0, gradient of p1) for the gradient 1 of each output.
EQUAL = np.full((2, 3), 0.5, np.float32)
TIES: dict[str, tuple[Case, tuple[float, ...]]] = {
    "tie-Max": (Case("Max", (EQUAL, EQUAL)), (1.0, 0.0)),
    "tie-Min": (Case("Min", (EQUAL, EQUAL)), (1.0, 0.0)),
    "tie-ReduceMax": (Case("ReduceMax", (EQUAL,), {"axes": [0]}), (1 / 2,)),
    "tie-ReduceMin": (Case("ReduceMin", (EQUAL,), {"axes": [1], "keepdims": 0}), (1 / 3,)),
    "tie-GlobalMaxPool": (Case("GlobalMaxPool", (EQUAL.reshape(1, 1, 2, 3),)), (1 / 6,)),
    "zero-ReduceL2": (Case("ReduceL2", (0 * EQUAL,), {"axes": [0]}), (0.0,)),
    "zero-LpNormalization": (Case("LpNormalization", (0 * EQUAL,)), (0.0,)),
}


@pytest.mark.parametrize("name", TIES)
def test_equal_values_share_as_documented(name: str, trained: Trained) -> None:
    case, expected = TIES[name]
    for parameter, share in zip(case.parameters, expected, strict=True):
        np.testing.assert_array_equal(trained.of(name)[parameter], np.full_like(case.parameters[parameter], share))


# --- straight-through -----------------------------------------------------------------------------------

BLENDS = (0.0, 0.5, 1.0)
QMIN, QMAX, TAU = -3, 3, 1.0
UPSTREAM = np.array([0.5, -1.25, 2.0, -0.75, 1.5, 3.0, -2.0], np.float32)
# Scale 0.5, zero point 1: the grid covers [-2, 1]. Inside, on a tie, and outside on both sides; beyond tau too.
INSIDE_AND_OUTSIDE = np.array([0.3, -0.25, 0.75, 1.2, 50.0, -2.3, -70.0], np.float32)


def straight_through_model() -> onnx.ModelProto:
    """loss = sum(r ProgressiveQDQ(p0)) + sum(r ReversePrune(p1))."""
    settings: dict[str, Array] = {
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
    return helper.make_model(
        graph,
        opset_imports=opsets,
        ir_version=MAX_IR_VERSION,
    )


def partly_stopped_model() -> onnx.ModelProto:
    """loss = sum(r Dropout(p0, ratio = mean of p0)), out of training: the ratio has no gradient."""
    nodes = [
        helper.make_node("ReduceMean", ["p0"], ["ratio"], keepdims=0),
        helper.make_node("Dropout", ["p0", "ratio"], ["y"], name="case"),
        helper.make_node("Mul", ["y", "r0"], ["weighted"]),
        helper.make_node("ReduceSum", ["weighted"], ["loss"], keepdims=0),
    ]
    weight = numpy_helper.from_array(np.abs(UPSTREAM) / 10, "p0")
    graph = helper.make_graph(nodes, "partly", [value_info("r0", UPSTREAM.shape)], [value_info("loss", ())], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=MAX_IR_VERSION)


def test_gradient_passes_one_operand_and_stops_at_another(trained: Trained) -> None:
    np.testing.assert_array_equal(trained.of("partly")["p0"], UPSTREAM)


@pytest.mark.parametrize("blend", BLENDS)
def test_straight_through_inside_and_outside_the_range(blend: float, trained: Trained) -> None:
    result = trained.of(f"blend-{blend}")
    np.testing.assert_array_equal(result["p0"], UPSTREAM)  # exactly: the rule is the identity
    np.testing.assert_array_equal(result["p1"], UPSTREAM)
    grid = np.clip(np.rint(INSIDE_AND_OUTSIDE / 0.5) + 1, QMIN, QMAX) - 1
    blended = (1 - blend) * INSIDE_AND_OUTSIDE.astype(np.float64) + blend * 0.5 * grid
    expected = np.dot(UPSTREAM, blended + np.clip(INSIDE_AND_OUTSIDE, -TAU, TAU))
    assert result["loss"] == pytest.approx(expected, rel=0, abs=300 * 2.0**-22)  # terms up to 300, a few roundings


# --- where gradients stop -------------------------------------------------------------------------------

Build = Callable[..., Model]


@pytest.fixture
def ingested(tmp_path: Path) -> Build:
    """Builds models of x (n, 2, 5, 5) -> y with the weights w (3, 2, 3, 3), v (3, 3, 1, 1) and others as given."""

    def build(*nodes: onnx.NodeProto, shape: tuple[int | str, ...] = ("n", 2, 5, 5), **constants: Array) -> Model:
        constants = {"w": signed(3, 2, 3, 3), "v": signed(3, 3, 1, 1), **constants}
        graph = helper.make_graph(
            nodes,
            "model",
            [value_info("x", shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", *[None] * 3])],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
            value_info=[value_info("b", ("n", 3, 3, 3))],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "model.onnx")
        return ingest(tmp_path / "model.onnx")

    return build


def conv(source: str, target: str, weight: str = "w") -> onnx.NodeProto:
    return helper.make_node("Conv", [source, weight], [target], name=f"conv_{target}")


def node(op: str, *inputs: str, **attributes: Any) -> onnx.NodeProto:
    """A node called "case" that computes b."""
    return helper.make_node(op, inputs, ["b"], name="case", **attributes)


def subgraph(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph(nodes, "part", [], [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)])


def branches(*nodes: onnx.NodeProto) -> dict[str, onnx.GraphProto]:
    return {"then_branch": subgraph(*nodes), "else_branch": subgraph(*nodes)}


def loop_body() -> onnx.GraphProto:
    """Doubles its state."""
    nodes = [helper.make_node("Identity", ["on"], ["still"]), helper.make_node("Add", ["state", "state"], ["next"])]
    value = helper.make_tensor_value_info
    inputs = [value("i", TensorProto.INT64, []), value("on", TensorProto.BOOL, []), value_info("state", (None,) * 4)]
    return helper.make_graph(
        nodes, "body", inputs, [value("still", TensorProto.BOOL, []), value_info("next", (None,) * 4)]
    )


def train(model: Model, folder: Path) -> Trimmed:
    """Two steps of two samples."""
    samples = {"x": signed(40, 2, 5, 5)}
    np.savez(folder / "data.npz", **samples)  # type: ignore[arg-type]  # numpy's stub takes names for options
    plan = make_plan(model)
    ranges = calibrate(model, plan, open_samples(samples, input_specs(model)), 20)
    regimes = (scheme_regime(parse_scheme("w4a8-sym-pt"), "mse"),)
    subject = Subject(model, model, plan, ranges, regimes, DataSource(str(folder / "data.npz")))
    return trim(subject, TrimSettings(steps=2, batch_size=2, learning_rate=1e-3, average=0), folder)


def values(proto: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


CONDITION = (
    helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
    helper.make_node("IsNaN", ["largest"], ["c"]),
)
ZERO_EVERYWHERE = "has a derivative of zero everywhere"
# Nodes that compute b from a = Conv(x, w), and why no gradient passes the one called "case".
STOPS = {
    "Round": ([node("Round", "a")], ZERO_EVERYWHERE),
    "foreign": ([node("Inverse", "a", domain="com.microsoft")], "is an operator of the domain 'com.microsoft'"),
    "If-captures": (
        [
            *CONDITION,
            helper.make_node("Neg", ["a"], ["seen"]),  # ONNX Runtime 1.19 aborts where an If captures a Conv's output
            node("If", "c", **branches(helper.make_node("Elu", ["seen"], ["inner"]))),
        ],
        "runs a subgraph",
    ),
    "Loop": (
        [
            *CONDITION,
            helper.make_node("Not", ["c"], ["go"]),
            node("Loop", "count", "go", "a", body=loop_body()),
        ],
        "runs a subgraph",
    ),
    "LSTM": (
        [
            helper.make_node("Reshape", ["a", "steps"], ["series"]),
            helper.make_node("LSTM", ["series", "gates", "states"], ["all"], name="case", hidden_size=9, clip=0.5),
            helper.make_node("Reshape", ["all", "images"], ["b"]),
        ],
        "has a state that no rule covers",
    ),
    "sequence": (
        [
            helper.make_node("SplitToSequence", ["a"], ["parts"], name="case", axis=1),
            helper.make_node("ConcatFromSequence", ["parts"], ["b"], axis=1),
        ],
        "works on a sequence or an optional value",
    ),
    "two-outputs": (
        [
            helper.make_node("Unique", ["a"], ["all", "first", "", "counts"], name="case"),
            helper.make_node("ReduceMax", ["all"], ["largest"]),
            helper.make_node("Cast", ["counts"], ["numbers"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMax", ["numbers"], ["most"]),
            helper.make_node("Add", ["largest", "most"], ["sum"]),
            helper.make_node("Expand", ["sum", "sizes"], ["b"]),
        ],
        "has no gradient rule",
    ),
}

OPERANDS = {
    "count": np.array(2),
    "sizes": ints(2, 3, 3, 3),
    "steps": ints(3, -1, 9),
    "images": ints(-1, 3, 3, 3),
    "gates": signed(1, 36, 9),
    "states": signed(1, 36, 9) / 3,
}


@pytest.mark.parametrize("name", STOPS)
def test_behind_a_stop_training_goes_on_and_before_it_weights_stay(name: str, ingested: Build, tmp_path: Path) -> None:
    nodes, reason = STOPS[name]
    (operator,) = [node.op_type for node in nodes if node.name == "case"]
    model = ingested(conv("x", "a"), *nodes, conv("b", "y", "v"), **OPERANDS)
    reached = reach(model, make_plan(model))
    assert reached.trained == ("v",)
    assert reached.untouched == {"w": f"no gradient passes {operator} 'case', because it {reason}"}
    assert reached.reason is None
    trimmed = train(model, tmp_path)
    assert trimmed.steps == 2
    assert trimmed.untouched == reached.untouched
    before, after = values(model.proto), values(onnx.load(tmp_path / jobs.LAST))
    np.testing.assert_array_equal(before["w"], after["w"])
    assert np.any(before["v"] != after["v"])


def test_a_stop_beside_another_way_stops_nothing(ingested: Build, tmp_path: Path) -> None:
    model = ingested(conv("x", "a"), node("Round", "a"), helper.make_node("Mul", ["a", "b"], ["y"], name="last"))
    assert reach(model, make_plan(model)) == Reach(("w",), {})
    train(model, tmp_path)
    assert np.any(values(model.proto)["w"] != values(onnx.load(tmp_path / jobs.LAST))["w"])


def test_operator_without_gradient_before_all_weights_is_no_stop(ingested: Build, tmp_path: Path) -> None:
    model = ingested(helper.make_node("Round", ["x"], ["a"], name="round"), conv("a", "y"))
    assert train(model, tmp_path).untouched == {}


def test_nothing_to_train_ends_without_a_step(ingested: Build, tmp_path: Path) -> None:
    model = ingested(conv("x", "a"), node("Round", "a"), node_y("b"))
    trimmed = train(model, tmp_path)
    why = "no gradient passes Round 'case', because it has a derivative of zero everywhere"
    assert (trimmed.model, trimmed.steps, trimmed.best_step) == (model, 0, 0)
    assert trimmed.helped == {"w4a8-sym-pt": False, "float": False}
    assert trimmed.untouched == {"w": why}
    assert trimmed.reason == f"no gradient reaches a weight: {why}"


def node_y(source: str) -> onnx.NodeProto:
    return helper.make_node("Relu", [source], ["y"], name="last")


def test_average_pool_over_unknown_sizes_is_a_stop(ingested: Build) -> None:
    pool = helper.make_node("AveragePool", ["a"], ["y"], name="pool", kernel_shape=[2, 2])
    model = ingested(conv("x", "a"), pool, shape=("n", 2, "height", "width"))
    reached = reach(model, make_plan(model))
    assert "AveragePool 'pool'" in reached.untouched["w"]


def test_model_without_weights_has_nothing_to_train(ingested: Build, tmp_path: Path) -> None:
    trimmed = train(ingested(node_y("x")), tmp_path)
    assert trimmed.steps == 0
    assert "no Conv, ConvTranspose, Gemm or MatMul" in str(trimmed.reason)
