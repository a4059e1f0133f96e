"""What can be asked for, and what a model and its samples allow; every refusal."""

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from helpers import build, normal

from onnxqt.data import InputSpec, open_samples
from onnxqt.errors import DataError, TrainingError, UsageError
from onnxqt.model import Model, editable, infer_shapes, input_specs
from onnxqt.plan import make_plan
from onnxqt.trim.losses import (
    LOSS,
    Binding,
    Losses,
    Term,
    check_label_values,
    choose_features,
    find_kind,
    find_terms,
    insert_loss,
    parse_losses,
    read_losses,
    read_term,
    teacher_outputs,
    with_loss,
)
from onnxqt.trim.quantizers import QUANTIZED, insert

I64, F32 = np.dtype(np.int64), np.dtype(np.float32)


def model_of(text: str, **constants: Any) -> Model:
    proto = infer_shapes(build(text, constants))
    for index, node in enumerate(proto.graph.node):
        node.name = node.name or f"n{index}"
    return Model(proto, "")


HEADS = model_of(
    "(float[n,6] x) => (float[n,6] y, float[n,6] p, float[n,2,3] z, int64[n,1] i)"
    "{ y = Neg(x)\n p = Sigmoid(x)\n shape = Constant<value_ints = [-1, 2, 3]>()\n"
    "z = Reshape(x, shape)\n i = ArgMax<axis = 1>(x) }"
)


def labels(**shapes: Any) -> tuple[InputSpec, ...]:
    """Arrays of labels: `y=(dtype, ...)` is `labels:y`, and `labels` itself."""
    return tuple(
        InputSpec(name if name == "labels" else f"labels:{name}", np.dtype(dtype), (None, *shape))
        for name, (dtype, *shape) in shapes.items()
    )


def find(weights: dict[str, float], *specs: InputSpec, model: Model = HEADS, **settings: Any) -> tuple[Term, ...]:
    return find_terms(model, make_plan(model), Losses(weights, **settings), specs)


# --- what a user writes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("distill", {"distill": 1.0}),
        ("distill=1,cross-entropy=0.5", {"distill": 1.0, "cross-entropy": 0.5}),
        (" mse:box:0 = 2 , bce:mask", {"mse:box:0": 2.0, "bce:mask": 1.0}),
    ],
)
def test_text(text: str, weights: dict[str, float]) -> None:
    assert parse_losses(text) == Losses(weights)


def test_text_with_a_loss_graph() -> None:
    assert parse_losses("", "loss.onnx") == Losses({"graph": 1.0}, graph="loss.onnx")
    assert parse_losses("graph=0.5,l1", "loss.onnx") == Losses({"graph": 0.5, "l1": 1.0}, graph="loss.onnx")


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("distil", {}, "no part 'distil': use distill, features, cross-entropy, bce, mse, l1, graph"),
        ("", {}, "the loss has no part: name at least one of distill"),
        ("distill=much", {}, "'distill=much' has the weight 'much', which is no number: write NAME=0.5"),
        ("distill,mse,distill=2", {}, "has 'distill' twice: name each part once"),
        ("mse=0", {}, "weight of the loss 'mse' is 0: give a positive number, or leave the part out"),
        ("mse=nan", {}, "weight of the loss 'mse' is nan: give a positive number"),
        ("mse=-1", {}, "weight of the loss 'mse' is -1"),
        ("features:y", {}, "'features:y' names an output, but 'features' is not of one output: write 'features'"),
        ("graph", {}, "the loss graph has a weight but no file: give both --loss-graph and its part 'graph'"),
        ("distill", {"temperature": 0.0}, r"the temperature is 0\.0: give a positive number"),
        ("distill", {"features": ("h",)}, "'h' is named, but the loss has no part 'features': add it to --loss"),
    ],
)
def test_text_that_is_refused(text: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_losses(text, **settings)


def test_a_loss_graph_without_weight() -> None:
    with pytest.raises(UsageError, match="the loss graph has a file but no weight"):
        Losses({"distill": 1.0}, graph="loss.onnx")


def test_json() -> None:
    losses = Losses({"features": 0.1, "graph": 2.0}, 4.0, ("a", "b"), "loss.onnx")
    assert read_losses(json.loads(json.dumps(asdict(losses)))) == losses
    bindings = (Binding("y", "output", "y"), Binding("labels", "labels", "labels", integer=True))
    terms = [Term("graph", 0.5, bindings=bindings, path="loss.onnx"), *find({"distill": 1.0}, temperature=2.0)]
    plain = json.loads(json.dumps([asdict(term) for term in terms]))
    assert [read_term(fields) for fields in plain] == terms


# --- what outputs hold --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "shape", "kind"),
    [
        ("y = Neg(x)", "n,6", ("scores", 1)),
        ("y = Neg(x)", "n,1", ("values", -1)),
        ("y = Neg(x)", "n,m", ("values", -1)),
        ("y = Neg(x)", "n,3,4", ("values", -1)),
        ("y = Softmax(x)", "n,6", ("probabilities", 1)),
        ("y = Softmax<axis = 0>(x)", "n,6", ("values", -1)),
        ("y = Softmax<axis = 0>(x)", "4,6", ("values", -1)),
        ("y = Softmax<axis = -2>(x)", "n,5,7", ("probabilities", 1)),
        ("y = LogSoftmax(x)", "n,5,7", ("scores", 2)),
        ("h = Softmax<axis = 1>(x)\n y = Flatten(h)", "n,5,1,1", ("probabilities", 1)),
        ("h = Softmax<axis = 1>(x)\n y = Flatten(h)", "n,5,2,1", ("values", -1)),
        ("y = Sigmoid(x)", "n,6", ("binary", -1)),
        ("h = Sigmoid(x)\n y = Transpose<perm = [0, 2, 1]>(h)", "n,3,4", ("binary", -1)),
    ],
)
def test_kind_of_an_output(nodes: str, shape: str, kind: tuple[str, int]) -> None:
    model = model_of(f"(float[{shape}] x) => (float[] y) {{ {nodes} }}")
    assert find_kind(model, "y") == kind


# --- which terms there are ----------------------------------------------------------------------------------


def test_distillation_of_every_float_output() -> None:
    terms = find({"distill": 2.0}, temperature=3.0)
    assert [(t.tensor, t.kind, t.weight, t.temperature) for t in terms] == [
        ("y", "scores", 2.0, 3.0),
        ("p", "binary", 2.0, 3.0),
        ("z", "values", 2.0, 3.0),
    ]
    assert teacher_outputs(terms) == ("y", "p", "z")


def test_distillation_of_one_output() -> None:
    assert [term.tensor for term in find({"distill:z": 1.0})] == ["z"]


def test_no_float_output_leaves_nothing_to_distil() -> None:
    model = model_of("(float[n,6] x) => (int64[n,1] i) { i = ArgMax<axis = 1>(x) }")
    assert find({"distill": 1.0}, model=model) == ()


def test_each_loss_takes_the_labels_that_fit() -> None:
    given = labels(labels=(I64,), p=(I64, 6), z=(F32, 2, 3))
    terms = find({"cross-entropy": 1.0, "bce:p": 0.5, "l1:z": 0.25}, *given)
    assert [(t.name, t.tensor, t.labels, t.integer) for t in terms] == [
        ("cross-entropy", "y", "labels", True),
        ("bce", "p", "labels:p", True),
        ("l1", "z", "labels:z", False),
    ]
    assert [(t.axis, t.classes) for t in terms[:1]] == [(1, 6)]
    assert [term.tensor for term in find({"mse": 1.0}, *given)] == ["p", "z"]
    assert teacher_outputs(terms) == ()


@pytest.mark.parametrize(("given", "axis"), [((I64, 3), 1), ((I64, 2), 2)])
def test_axis_of_the_classes_follows_from_the_labels(given: tuple[Any, ...], axis: int) -> None:
    (term,) = find({"cross-entropy": 1.0}, *labels(z=given))
    assert (term.axis, term.classes) == (axis, HEADS.graph.shape("z")[axis])  # type: ignore[index]


@pytest.mark.parametrize(
    ("loss", "given", "message"),
    [
        ("mse", {}, "'mse' needs labels of 'labels' or 'labels:p' or 'labels:z' in .* have no labels: add the array"),
        ("mse:p", {"z": (F32, 2, 3)}, r"needs labels of 'labels:p' in the samples, but they have \['labels:z'\]"),
        ("mse:q", {}, r"'mse:q' names an output that is not among the model's \['y', 'p', 'z'\]: name one of them"),
        ("mse:i", {}, "'mse:i' names an output that is not among"),
        ("distill:q", {}, "'distill:q' names an output that is not among"),
        (
            "mse",
            {"labels": (F32, 5)},
            r"'labels' has shape \(samples, 5\), but the output 'y' \(samples, 6\): the loss 'mse' takes labels of the",
        ),
        ("bce", {"labels": (F32,)}, r"'labels' has shape \(samples\), but .* 'bce' takes labels of the output's shape"),
        (
            "cross-entropy",
            {"labels": (I64, 6)},
            r"'labels' has shape \(samples, 6\), but the output 'y' \(samples, 6\): .* argmax of one-hot rows",
        ),
        ("cross-entropy", {"z": (I64,)}, r"'labels:z' has shape \(samples\), but the output 'z' \(samples, 2, 3\)"),
        (
            "cross-entropy",
            {"labels": (F32,)},
            "'labels' holds float32, but the loss 'cross-entropy' takes class numbers: save integers, or use .* 'bce'",
        ),
    ],
)
def test_labels_that_do_not_fit(loss: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        find({loss: 1.0}, *labels(**given))


def test_labels_of_a_model_without_float_output() -> None:
    model = model_of("(float[n,6] x) => (int64[n,1] i) { i = ArgMax<axis = 1>(x) }")
    with pytest.raises(TrainingError, match="needs labels of a float output, which the model lacks, in the samples"):
        find({"mse": 1.0}, *labels(labels=(F32, 1)), model=model)


def test_values_of_labels() -> None:
    x = np.zeros((3, 6), np.float32)
    arrays = {"x": x, "labels": np.array([0, 6, 1]), "labels:p": np.full((3, 6), 1.5)}
    samples = open_samples(arrays, input_specs(HEADS))
    with pytest.raises(DataError, match="label of sample 1 of the file is 6, but the model has 6 classes"):
        check_label_values(find({"cross-entropy": 1.0}, *samples.targets), samples)
    with pytest.raises(DataError, match=r"label of sample 0 .* is 1\.5, but the loss 'bce' takes probabilities betw"):
        check_label_values(find({"bce": 1.0}, *samples.targets), samples)
    check_label_values(find({"mse": 1.0, "distill": 1.0}, *samples.targets), samples)


# --- inner tensors ------------------------------------------------------------------------------------------


def residual(blocks: int, sums: bool) -> Model:
    """Blocks h <- h + relu(h w), or without the sum; then a last product."""
    nodes, h = [], "x"
    for i in range(blocks):
        nodes.append(f"m{i} = MatMul({h}, w)\n r{i} = Relu(m{i})")
        nodes += [f"h{i} = Add({h}, r{i})"] if sums else []
        h = f"h{i}" if sums else f"r{i}"
    return model_of(
        f"(float[n,4] x) => (float[n,4] y) {{ {chr(10).join(nodes)}\n y = MatMul({h}, v) }}",
        w=normal(4, 4, seed=1),
        v=normal(4, 4, seed=2),
    )


@pytest.mark.parametrize(
    ("blocks", "sums", "chosen"),
    [
        (8, True, ("h1", "h3", "h5", "h7")),
        (9, True, ("h1", "h3", "h5", "h8")),
        (4, True, ("h0", "h1", "h2", "h3")),
        (2, False, ("r0", "r1")),
        (8, False, ("r1", "r3", "r5", "r7")),
    ],
)
def test_chosen_features(blocks: int, sums: bool, chosen: tuple[str, ...]) -> None:
    model = residual(blocks, sums)
    assert choose_features(model, make_plan(model)) == chosen


def test_features_share_their_weight() -> None:
    terms = find({"features": 2.0}, model=residual(8, True))
    assert [(term.name, term.tensor, term.weight) for term in terms] == [
        ("features", f"h{i}", 0.5) for i in (1, 3, 5, 7)
    ]
    assert teacher_outputs(terms) == ("h1", "h3", "h5", "h7")


def test_named_features() -> None:
    (term,) = find({"features": 1.0}, model=residual(8, True), features=("m3",))
    assert term.tensor == "m3"


@pytest.mark.parametrize("name", ["nowhere", "x", "w"])
def test_feature_that_is_not_computed(name: str) -> None:
    with pytest.raises(TrainingError, match=f"the feature '{name}' is no float tensor .* name tensors such as .*'r0'"):
        find({"features": 1.0}, model=residual(2, False), features=(name,))


def test_no_features() -> None:
    with pytest.raises(TrainingError, match="'features', but the model has no inner integer node: leave it out"):
        find({"features": 1.0})


# --- in a graph with quantizers -----------------------------------------------------------------------------


def test_terms_read_quantized_tensors() -> None:
    model = residual(4, True)
    plan = make_plan(model)
    terms = find({"distill": 1.0, "features": 1.0}, model=model)
    graph = editable(model.proto)
    insert(graph, plan, {})
    insert_loss(graph, terms)
    assert [tensor.name for tensor in graph.outputs] == [LOSS]
    read = {tensor.name for node in graph.nodes if node.op == "Sub" for tensor in node.inputs}
    assert {f"{QUANTIZED}{name}" for name in ("y", "h0", "h1", "h2", "h3")} <= read


def test_names_of_loss_nodes_are_the_same_with_and_without_quantizers() -> None:
    """The way of the gradient is found on the float graph, by the names of nodes."""
    model = residual(4, True)
    terms = find({"distill": 1.0, "features": 1.0}, model=model)
    graph = editable(model.proto)
    insert(graph, make_plan(model), {})
    insert_loss(graph, terms)
    quantized = {node.name: node.op for node in graph.nodes}
    lossy = {node.name: node.op_type for node in with_loss(model, terms).graph.nodes}
    assert lossy.items() <= quantized.items()
