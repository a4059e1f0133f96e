"""Models on back ends: what a cell holds, and that an interruption loses nothing."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from conftest import ROOT, Digits
from helpers import build, ingested, inputs_of, normal, snr_db

from onnxqt.calibrate import calibrate, make_quantizers
from onnxqt.compiler import compile_model, compiler_plan
from onnxqt.data import Batch, Samples, open_samples
from onnxqt.emulate import load_program
from onnxqt.emulate.logarithmic import nearest_levels
from onnxqt.errors import EmulatorError, ModelError, UsageError
from onnxqt.export import quantized_model
from onnxqt.matrix import DYNAMIC, Cell, Matrix, Subject, Task, advice_for, files, make_matrix, run
from onnxqt.matrix.advice import _ADVICE
from onnxqt.matrix.run import open_run
from onnxqt.model import GraphIndex, Model, input_specs
from onnxqt.numerics import Array, dequantize
from onnxqt.plan import make_plan
from onnxqt.profiles import PROFILES, Accumulator, Arithmetic, Policy, Precision, Profile
from onnxqt.runtime import Session, with_outputs
from onnxqt.schemes import parse_scheme

SCHEMA = json.loads((ROOT / "onnxqt" / "matrix.schema.json").read_text())
W8A8 = Precision(8, 8)
ORT = PROFILES["ort_cpu"]
TFLITE = PROFILES["tflite_ref"]


def profile(name: str, operators: tuple[str, ...] = ORT.policy.operators, **arithmetic: Any) -> Profile:
    policy = Policy(signed=False, operators=operators)
    return Profile(name, f"title of {name}", "modelled", "nowhere", policy, Arithmetic(**arithmetic), "all of it")


def task_of(
    subjects: Mapping[str, Model],
    samples: Samples,
    profiles: tuple[Profile, ...] = (ORT,),
    precisions: tuple[Precision, ...] = (W8A8,),
    **rest: Any,
) -> Task:
    models = tuple(Subject(name, model) for name, model in subjects.items())
    evaluation = rest.pop("evaluation", samples)

    def batches(chosen: Samples) -> Iterator[Batch]:
        return chosen.batches(16)

    return Task(models, samples, evaluation, batches, 32, profiles, precisions, **rest)


def samples_of(model: Model, seed: int = 1, count: int = 48) -> Samples:
    return open_samples(inputs_of(model.proto, count, seed), input_specs(model))


def noisy(model: Model) -> Model:
    """The model with other weights."""
    graph = model.graph
    weights = {name: graph.constant(name) for name in graph.initializers if graph.is_float(name)}
    moved = {name: value * np.float32(1.03) for name, value in weights.items() if value is not None and value.ndim > 1}
    return replace(model.with_weights(moved), sha256="f" * 64)


@pytest.fixture(scope="module")
def labelled(torch_digits: Digits) -> Samples:
    return open_samples(torch_digits.folder / "eval", input_specs(torch_digits.model)).take(80)


@pytest.fixture(scope="module")
def pair(torch_digits: Digits) -> dict[str, Model]:
    return {"before": torch_digits.model, "after": noisy(torch_digits.model)}


@pytest.fixture(scope="module")
def done(
    pair: dict[str, Model], torch_digits: Digits, labelled: Samples, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Matrix, Path]:
    """Two models on three back ends, at all that they do unasked."""
    path = tmp_path_factory.mktemp("matrix") / "matrix.json"
    profiles = (TFLITE, ORT, PROFILES["ncnn_sym"])
    task = task_of(pair, torch_digits.samples, profiles, (), evaluation=labelled)
    task.check()
    return make_matrix(task, path), path


def result(matrix: Matrix, model: str, name: str, column: str = "w8a8") -> dict[str, Any]:
    cell = matrix.cell(model, name, column)
    assert cell is not None
    assert cell.result is not None, cell.error
    return cell.result


# --- what a cell holds ----------------------------------------------------------------------------------


DYNAMIC_W8A8 = Precision(8, 8, True)
DONE = {
    f"{device.name}-{column}": (device, column)
    for device, columns in ((TFLITE, (W8A8, Precision(4, 8), DYNAMIC_W8A8)), (ORT, (W8A8, DYNAMIC_W8A8)))
    for column in columns
}


@pytest.mark.parametrize("name", DONE)
@pytest.mark.parametrize("model", ["before", "after"])
def test_cell_is_the_compilers_file_in_the_arithmetic_of_the_device(
    model: str,
    name: str,
    done: tuple[Matrix, Path],
    torch_digits: Digits,
    pair: dict[str, Model],
    labelled: Samples,
) -> None:
    device, column = DONE[name]
    subject, policy = pair[model], device.policy
    plan = compiler_plan(subject, policy)
    ranges = calibrate(subject, plan, torch_digits.samples)
    program = load_program(compile_model(subject, ranges, plan, policy, column), device.arithmetic)
    (batch,) = labelled.batches(80)
    expected = Session(pair["before"].proto).run(batch.inputs)["logits"]
    # Batches of the size that the cell is computed with: float sums and run-time scales depend on it.
    found = np.concatenate([program.run(part.inputs)["logits"] for part in labelled.batches(16)])
    assert batch.labels is not None
    cell = result(done[0], model, device.name, str(column))
    assert cell["metrics"] == {"top1": np.mean(found.argmax(axis=1) == batch.labels)}
    assert cell["fidelity"]["agreement"] == np.mean(found.argmax(axis=1) == expected.argmax(axis=1))
    # float32 sums of the float model depend on the size of its batches
    assert cell["fidelity"]["snr_db"] == pytest.approx(snr_db(found, expected), rel=0, abs=1e-3)
    assert 0 < cell["brier"] < 1
    assert 0 < cell["ece"] < 1


def test_defaults_are_the_first_precision_the_dynamic_ones_and_w4a8() -> None:
    task = Task((), None, None, None, 1, (), ())  # type: ignore[arg-type]
    columns = {name: list(map(str, task.columns_of(PROFILES[name]))) for name in PROFILES}
    assert columns["tflite_ref"] == ["w8a8", "w4a8", "w8a8-dyn"]
    assert columns["tidl_pow2"] == ["w8a8"]
    assert columns["htp"] == ["w8a8", "w4a8"]


def test_a_precision_is_asked_of_the_profiles_that_have_it() -> None:
    profiles = (PROFILES["ncnn_sym"], PROFILES["htp"])
    task = Task((), None, None, None, 1, profiles, (Precision(8, 16),))  # type: ignore[arg-type]
    assert task.columns == ((PROFILES["htp"], Precision(8, 16)),)


def test_scheme_is_the_exported_file_in_the_arithmetic_of_the_device(torch_digits: Digits, tmp_path: Path) -> None:
    scheme, model, samples = parse_scheme("w4a8-sym-pc"), torch_digits.model, torch_digits.samples
    task = task_of({"m": model}, samples, (ORT, TFLITE), (), schemes=(scheme,))
    matrix = make_matrix(task, tmp_path / "m.json")
    plan = make_plan(model)
    ranges = calibrate(model, plan, samples)
    file = quantized_model(model, plan, make_quantizers(model, plan, ranges, scheme, "mse"))
    expected = Session(model.proto).run(torch_digits.inputs)["logits"]
    for device in (ORT, TFLITE):
        found = load_program(file, device.arithmetic).run(torch_digits.inputs)["logits"]
        cell = result(matrix, "m", device.name, "w4a8-sym-pc")
        assert cell["fidelity"]["snr_db"] == pytest.approx(snr_db(found, expected), rel=0, abs=1e-3)
    assert len(matrix.cells) == 2


def test_worst_layer_is_the_tensor_with_the_least_ratio(
    done: tuple[Matrix, Path], torch_digits: Digits, labelled: Samples
) -> None:
    model, policy = torch_digits.model, ORT.policy
    plan = compiler_plan(model, policy)
    file = compile_model(model, calibrate(model, plan, torch_digits.samples), plan, policy, W8A8)
    program = load_program(file, ORT.arithmetic)
    names = [site.tensor for site in plan.activations]
    codes_of = {name: name if name in program.tensors else f"{name}.dequantized" for name in names}
    inside = [name for name in names if name not in model.graph.inputs]
    (batch,) = labelled.take(64).batches(64)
    real = {**batch.inputs, **Session(with_outputs(model.proto, inside)).run(batch.inputs)}
    codes = program.run_codes(batch.inputs, tuple(codes_of.values())).codes
    ratios = {
        name: snr_db(dequantize(codes[tensor].codes, codes[tensor].params), real[name])
        for name, tensor in codes_of.items()
    }
    worst = result(done[0], "before", "ort_cpu")["worst_layer"]
    assert worst["tensor"] == min(ratios, key=lambda name: ratios[name])
    assert worst["snr_db"] == pytest.approx(min(ratios.values()), rel=0, abs=1e-3)


GATED = """(float[n,2,6,6] x) => (float[] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w)  h = HardSwish(a)  b = Conv<strides = [2, 2]>(h, v)
    p = GlobalAveragePool(b)  f = Flatten(p)  y = Gemm(f, m)
}"""


@pytest.fixture
def gated() -> Model:
    weights = {"w": normal(3, 2, 3, 3, seed=1), "v": normal(5, 3, 3, 3, seed=2), "m": normal(5, 4, seed=3)}
    return ingested(build(GATED, weights))


def test_what_stays_float_and_what_it_costs(gated: Model, tmp_path: Path) -> None:
    operators = ("Conv", "GlobalAveragePool", "Clip")
    matrix = make_matrix(task_of({"m": gated}, samples_of(gated), (profile("npu", operators),)), tmp_path / "m.json")
    cell = result(matrix, "m", "npu")
    first, second, dense = 3 * 36 * 18, 5 * 4 * 27, 5 * 4
    assert cell["integer_macs"] == (first + second) / (first + second + dense)
    assert [node["op_type"] for node in cell["float_nodes"]] == ["HardSwish", "Flatten", "Gemm"]
    assert all("is not among the operators" in cell["float_nodes"][i]["reason"] for i in (0, 2))
    assert cell["boundaries"] == 3  # before and behind HardSwish, before Flatten
    costliest = cell["costliest"]
    assert (costliest["op_type"], costliest["values_per_sample"]) == ("HardSwish", 2 * 3 * 36)
    assert costliest["reason"] == cell["float_nodes"][0]["reason"]
    assert "Relu or Clip" in costliest["advice"]


def test_a_product_that_the_compiler_leaves_float_is_not_integer(tmp_path: Path) -> None:
    """Between codes it looks like an integer one."""
    text = """(float[n,3,6] x) => (float[] y) {
        a = Conv(x, w)  b = Conv(x, v)  c = MatMul(a, b)  y = Conv(c, m)
    }"""
    constants = {"w": normal(4, 3, 1, seed=1), "v": normal(6, 3, 1, seed=2), "m": normal(2, 4, 1, seed=3)}
    model = ingested(build(text, constants))
    task = task_of({"m": model}, samples_of(model), (profile("npu", ("Conv",)),))
    cell = result(make_matrix(task, tmp_path / "m.json"), "m", "npu")
    assert [node["op_type"] for node in cell["float_nodes"]] == ["MatMul"]
    convolutions, product = 4 * 6 * 3 + 6 * 6 * 3 + 2 * 6 * 4, 4 * 6 * 6
    assert cell["integer_macs"] == convolutions / (convolutions + product)
    assert cell["boundaries"] == 3


def test_the_costliest_island_is_named_by_what_can_be_changed(tmp_path: Path) -> None:
    """Transpose, Neg and Sigmoid are one island; what it reads and gives out crosses, not what is inside."""
    text = """(float[n,3,5] x) => (float[] y) {
        a = MatMul(x, w)  t = Transpose<perm = [0, 2, 1]>(a)  s = Neg(t)  u = Sigmoid(s)
        v = Transpose<perm = [0, 2, 1]>(u)  b = MatMul(v, m)  h = HardSwish(b)  y = MatMul(h, m)
    }"""
    model = ingested(build(text, {"w": normal(5, 8, seed=1), "m": normal(8, 8, seed=2)}))
    task = task_of({"m": model}, samples_of(model), (profile("npu", ("MatMul", "Clip")),))
    cell = result(make_matrix(task, tmp_path / "m.json"), "m", "npu")
    costliest = cell["costliest"]
    assert (costliest["op_type"], costliest["values_per_sample"]) == ("Sigmoid", 2 * 24)
    assert "Relu or Clip" in costliest["advice"]
    assert cell["boundaries"] == 4


TAIL = """(float[n,2,6,6] x) => (float[] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w)  g = Neg(a)  h = HardSwish(g)  b = Conv<strides = [2, 2]>(h, v)
    p = GlobalAveragePool(b)  f = Flatten(p)  y = Gemm(f, m)
}"""


@pytest.fixture
def tail() -> Model:
    weights = {"w": normal(3, 2, 3, 3, seed=1), "v": normal(5, 3, 3, 3, seed=2), "m": normal(5, 4, seed=3)}
    return ingested(build(TAIL, weights))


def test_a_back_end_that_stops_says_at_which_node(tail: Model, tmp_path: Path) -> None:
    """Advice for HardSwish, which comes behind, would not let it go on."""
    edgetpu = PROFILES["edgetpu"]
    cell = result(make_matrix(task_of({"m": tail}, samples_of(tail), (edgetpu,)), tmp_path / "m.json"), "m", "edgetpu")
    neg, *behind = cell["float_nodes"]
    assert neg["reason"] == "Neg is not among the operators that the back end runs on integers"
    assert [node["op_type"] for node in behind] == ["HardSwish", "Conv", "GlobalAveragePool", "Flatten", "Gemm"]
    assert {node["reason"] for node in behind} == {f"follows '{neg['node']}', where the back end stops"}
    assert cell["costliest"] == {**neg, "values_per_sample": 3 * 36, "advice": None}
    assert cell["boundaries"] == 1
    first, second, dense = 3 * 36 * 18, 5 * 4 * 27, 5 * 4
    assert cell["integer_macs"] == first / (first + second + dense)


def test_levels_that_are_no_codes_are_compared_like_codes(tail: Model, tmp_path: Path) -> None:
    nnie, samples = PROFILES["nnie_log"], samples_of(tail)
    cell = result(make_matrix(task_of({"m": tail}, samples, (nnie,)), tmp_path / "m.json"), "m", "nnie_log")
    plan = compiler_plan(tail, nnie.policy)
    file = compile_model(tail, calibrate(tail, plan, samples), plan, nnie.policy, W8A8)
    (batch,) = samples.batches(48)
    inside = [site.tensor for site in plan.activations if site.tensor not in tail.graph.inputs]
    real = {**batch.inputs, **Session(with_outputs(tail.proto, inside)).run(batch.inputs)}
    found = load_program(file, nnie.arithmetic).run(batch.inputs)["y"]
    assert cell["fidelity"]["snr_db"] == pytest.approx(snr_db(found, real["y"]), rel=0, abs=1e-3)
    assert cell["boundaries"] == 2  # before Neg, behind HardSwish
    assert cell["integer_macs"] == 1
    worst = cell["worst_layer"]
    assert worst["tensor"] in inside
    assert worst["snr_db"] <= cell["fidelity"]["snr_db"] + 1e-3  # the output is one of the tensors
    # What the first two tensors hold, by the formula of the levels.
    scales = {node.input[0]: node.input[1] for node in file.graph.node if node.op_type == "QuantizeLinear"}
    constants = {constant.name: onnx.numpy_helper.to_array(constant) for constant in file.graph.initializer}
    largest = {name: 127 * float(constants[scales[name]]) for name in ("x", "a")}
    weight = tail.graph.constant("w")
    assert weight is not None
    leveled = tail.with_weights({"w": nearest_levels(weight, float(np.abs(weight).max()))})
    x = nearest_levels(batch.inputs["x"], largest["x"])
    a = Session(with_outputs(leveled.proto, ["a"])).run({"x": x})["a"]
    values = open_run(file, plan, nnie, W8A8).values(batch.inputs, ("x", "a"))
    np.testing.assert_array_equal(values["x"], x)
    np.testing.assert_array_equal(values["a"], nearest_levels(a, largest["a"]))


def test_dynamic_scales_leave_all_but_products_float(gated: Model, tmp_path: Path) -> None:
    dynamic = (Precision(8, 8, True),)
    task = task_of({"m": gated}, samples_of(gated), (PROFILES["tflite_ref"],), dynamic)
    cell = result(make_matrix(task, tmp_path / "m.json"), "m", "tflite_ref", "w8a8-dyn")
    reasons = {node["op_type"]: node["reason"] for node in cell["float_nodes"]}
    assert reasons["GlobalAveragePool"] == DYNAMIC
    assert not reasons.keys() & {"Conv", "Gemm"}
    assert cell["integer_macs"] == 1
    assert cell["worst_layer"] is None
    assert cell["boundaries"] == 2 * 3  # before and behind each product
    assert cell["fidelity"]["snr_db"] > 20


def test_overflows_are_counted_by_node(gated: Model, tmp_path: Path) -> None:
    narrow = profile("npu", accumulator=Accumulator(16, "wrap"))
    samples = samples_of(gated)
    cell = result(make_matrix(task_of({"m": gated}, samples, (narrow,)), tmp_path / "m.json"), "m", "npu")
    plan = compiler_plan(gated, narrow.policy)
    file = compile_model(gated, calibrate(gated, plan, samples), plan, narrow.policy, W8A8)
    (batch,) = samples.batches(48)
    counts = load_program(file, narrow.arithmetic).run_codes(batch.inputs).overflows
    assert cell["overflows"] == {name: count for name, count in counts.items() if count}
    assert cell["overflows"]


def test_tensors_without_bounds_stay_float(tmp_path: Path) -> None:
    """Two of five keys are masked with minus infinity."""
    model = ingested(
        build(
            """(float[n,5,4] x, float[n,5,5] kept) => (float[] y) {
                mask = Log(kept)  q = MatMul(x, wq)  kt = Transpose<perm = [0, 2, 1]>(x)
                s = MatMul(q, kt)  m = Add(s, mask)  p = Softmax(m)  v = MatMul(p, x)  y = MatMul(v, wo)
            }""",
            {"wq": normal(4, 4, seed=1), "wo": normal(4, 4, seed=3)},
        )
    )
    kept = np.ones((24, 5, 5), np.float32)
    kept[..., 3:] = 0
    samples = open_samples({"x": normal(24, 5, 4), "kept": kept}, input_specs(model))
    cell = result(make_matrix(task_of({"m": model}, samples), tmp_path / "m.json"), "m", "ort_cpu")
    reasons = {node["op_type"]: node["reason"] for node in cell["float_nodes"]}
    assert "takes NaN or infinite values" in reasons["Add"]
    assert cell["metrics"] == {}
    assert cell["fidelity"]["snr_db"] > 20


# --- the summary ----------------------------------------------------------------------------------------


def cell_of(model: str, name: str, top1: float | None) -> Cell:
    found = None if top1 is None else {"metrics": {"top1": top1}}
    return Cell(model, name, "w8a8", "", found, "broken" if top1 is None else None)


def test_summary_is_over_the_cells_that_no_model_failed_in(torch_digits: Digits) -> None:
    devices = tuple(profile(name) for name in ("a", "b", "c"))
    task = task_of({"x": torch_digits.model, "y": torch_digits.model}, torch_digits.samples, devices)
    shares = {"x": (0.8, 0.5, 0.1), "y": (0.9, 0.7, None)}
    cells = tuple(
        cell_of(model, device.name, shares[model][i]) for i, device in enumerate(devices) for model in ("x", "y")
    )
    floats = {name: {"metrics": {"top1": share}} for name, share in (("x", 0.95), ("y", 0.5))}
    assert Matrix(task, floats, cells).summary == (
        {"model": "x", "cells": 2, "mean_gap": pytest.approx(0.95 - 0.65, abs=1e-12), "spread": pytest.approx(0.3)},
        {"model": "y", "cells": 2, "mean_gap": pytest.approx(0.95 - 0.8, abs=1e-12), "spread": pytest.approx(0.2)},
    )
    empty = {"cells": 0, "mean_gap": None, "spread": None}
    assert Matrix(task, floats, ()).summary == ({"model": "x", **empty}, {"model": "y", **empty})


# --- the file -------------------------------------------------------------------------------------------


def test_file_holds_the_matrix_and_fits_the_schema(done: tuple[Matrix, Path]) -> None:
    matrix, path = done
    content = json.loads(path.read_text())
    jsonschema.validate(content, SCHEMA)
    assert content == json.loads(json.dumps(matrix.as_json()))
    assert [model["name"] for model in content["models"]] == ["before", "after"]
    places = [(cell["profile"], cell["column"], cell["model"]) for cell in content["cells"]]
    assert places == [
        (name, column, model)
        for name, columns in (
            ("tflite_ref", ("w8a8", "w4a8", "w8a8-dyn")),
            ("ort_cpu", ("w8a8", "w8a8-dyn")),
            ("ncnn_sym", ("w8a8",)),
        )
        for column in columns
        for model in ("before", "after")
    ]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


BREAKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "both": lambda content: content["cells"][0].update(error="x"),
    "neither": lambda content: content["cells"][0].update(result=None),
    "share": lambda content: content["cells"][0]["result"].update(integer_macs=1.5),
    "column": lambda content: content["cells"][0].update(column="w8"),
    "unknown": lambda content: content.update(more=1),
    "no-key": lambda content: content["cells"][0].pop("key"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_schema_refuses(name: str, done: tuple[Matrix, Path]) -> None:
    content = json.loads(done[1].read_text())
    BREAKS[name](content)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, SCHEMA)


# --- resuming -------------------------------------------------------------------------------------------


@dataclass
class Counted:
    """`load_program`, counted; the calls named in `fails` raise."""

    calls: int = 0
    fails: dict[int, BaseException] | None = None

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.fails and self.calls in self.fails:
            raise self.fails[self.calls]
        return load_program(*arguments)


def counted(monkeypatch: pytest.MonkeyPatch, fails: dict[int, BaseException] | None = None) -> Counted:
    counter = Counted(fails=fails)
    monkeypatch.setattr(run, "load_program", counter)
    return counter


@pytest.fixture
def small(pair: dict[str, Model], torch_digits: Digits) -> Task:
    """Four cells."""
    return task_of(pair, torch_digits.samples.take(32), (ORT, PROFILES["ncnn_sym"]))


def test_a_finished_matrix_is_not_computed_again(small: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.json"
    make_matrix(small, path)
    before = path.read_bytes()
    counter = counted(monkeypatch)
    make_matrix(small, path)
    assert counter.calls == 0
    assert path.read_bytes() == before


def test_the_same_inputs_give_the_same_file(small: Task, tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        make_matrix(small, tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_the_digest_of_the_code_is_of_the_whole_package(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    read_bytes = Path.read_bytes

    def reading(path: Path) -> bytes:
        read.append(path.relative_to(ROOT / "onnxqt").as_posix())
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", reading)
    files._code_digest()
    assert {"numerics.py", "requantize.py", "matrix/bench.py", "emulate/engine.py", "emulate/kernels/add.py"} <= set(
        read
    )


def test_an_interruption_loses_nothing(small: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.json"
    counted(monkeypatch, {4: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        make_matrix(small, path)
    content = json.loads(path.read_text())
    jsonschema.validate(content, SCHEMA)
    assert len(content["cells"]) == 3
    counter = counted(monkeypatch)
    resumed = make_matrix(small, path)
    assert counter.calls == 1
    assert [cell.result for cell in resumed.cells[:3]] == [cell["result"] for cell in content["cells"]]
    assert len(resumed.cells) == 4
    fresh = make_matrix(small, tmp_path / "fresh.json")
    assert [cell.result for cell in fresh.cells] == [cell.result for cell in resumed.cells]


def test_a_failed_cell_says_why_and_the_others_go_on(
    small: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.json"
    counted(monkeypatch, {2: EmulatorError("node 'x' (Conv) failed: on purpose")})
    matrix = make_matrix(small, path)
    assert [cell.error for cell in matrix.cells] == [None, "node 'x' (Conv) failed: on purpose", None, None]
    assert [cell.result is None for cell in matrix.cells] == [False, True, False, False]
    jsonschema.validate(json.loads(path.read_text()), SCHEMA)
    assert [entry["cells"] for entry in matrix.summary] == [1, 1]
    counter = counted(monkeypatch)
    assert [cell.error for cell in make_matrix(small, path).cells] == [None] * 4
    assert counter.calls == 1


def test_a_failure_that_nobody_foresaw_does_not_take_the_others_with_it(
    small: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted(monkeypatch, {1: KeyError("ort")})
    matrix = make_matrix(small, tmp_path / "m.json")
    reason = "this should not happen (KeyError: 'ort'): report the model and the profile"
    assert [cell.error for cell in matrix.cells] == [reason, None, None, None]


CHANGES: dict[str, tuple[Callable[[Task], Task], int]] = {
    "arithmetic": (
        lambda task: replace(task, profiles=(replace(ORT, arithmetic=Arithmetic(table="away")), task.profiles[1])),
        2,
    ),
    "policy": (
        lambda task: replace(
            task, profiles=(replace(ORT, policy=replace(ORT.policy, ranges="percentile")), task.profiles[1])
        ),
        2,
    ),
    "evaluation": (lambda task: replace(task, evaluation=task.evaluation.take(31)), 4),
    "calibration": (lambda task: replace(task, calibration=task.calibration.take(31)), 4),
    "one model": (lambda task: replace(task, subjects=(task.subjects[0], renamed(task, 1, sha256="e" * 64))), 2),
    "the original": (lambda task: replace(task, subjects=(renamed(task, 0, sha256="e" * 64), task.subjects[1])), 4),
    "other packages": (lambda task: task, 4),
    "a name": (lambda task: replace(task, subjects=(Subject("new", task.subjects[0].model), task.subjects[1])), 0),
    "the order": (lambda task: replace(task, profiles=task.profiles[::-1]), 0),
}


def renamed(task: Task, index: int, **changes: Any) -> Subject:
    subject = task.subjects[index]
    return Subject(subject.name, replace(subject.model, **changes))


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_is_computed_again(
    name: str, small: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.json"
    make_matrix(small, path)
    change, calls = CHANGES[name]
    if name == "other packages":
        monkeypatch.setattr(files, "environment", lambda: {"packages": {"onnxruntime": "1.0"}})
    counter = counted(monkeypatch)
    task = change(small)
    matrix = make_matrix(task, path)
    assert counter.calls == calls
    places = [(device.name, subject.name) for device in task.profiles for subject in task.subjects]
    assert [(cell.profile, cell.model) for cell in matrix.cells] == places


def test_results_of_other_code_are_not_taken_over(small: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_matrix(small, tmp_path / "m.json")
    monkeypatch.setattr(files, "_code_digest", lambda: "other")
    counter = counted(monkeypatch)
    make_matrix(small, tmp_path / "m.json")
    assert counter.calls == 4


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cells": 3}', '{"cells": [{"model": "x"}]}', "[" * 100_000])
def test_a_file_that_is_no_matrix_is_replaced(text: str, small: Task, tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(text)
    task = replace(small, subjects=small.subjects[:1], profiles=(ORT,))
    assert len(make_matrix(task, path).cells) == 1
    jsonschema.validate(json.loads(path.read_text()), SCHEMA)


def test_progress_counts_cells_and_samples(small: Task, tmp_path: Path) -> None:
    told: list[tuple[int, str]] = []
    make_matrix(small, tmp_path / "m.json", lambda done, note: told.append((done, note)))
    assert (1, "ort_cpu w8a8 after 32") in told
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (4, "")


# --- what cannot be compared ----------------------------------------------------------------------------


def test_no_profile_with_the_precision(small: Task) -> None:
    with pytest.raises(UsageError, match="no profile has the precision w3a4: see 'onnxqt profiles' for those"):
        replace(small, precisions=(Precision(3, 4),)).check()


def other_model(text: str) -> Model:
    return ingested(build(text, {"w": normal(4, 1, 3, 3)}))


OTHERS = {
    "inputs": ("(float[n,1,8,8] picture) => (float[] y) { y = Conv(picture, w) }", r"'other' has other inputs \('pict"),
    "shape": ("(float[n,1,9,9] image) => (float[] y) { y = Conv(image, w) }", "or of other shapes: give models of the"),
    "outputs": (
        "(float[n,1,8,8] image) => (float[] y) { y = Conv(image, w) }",
        "'other' has no output 'logits', which",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_different_networks(name: str, small: Task) -> None:
    text, message = OTHERS[name]
    with pytest.raises(ModelError, match=message):
        replace(small, subjects=(small.subjects[0], Subject("other", other_model(text)))).check()


def test_a_model_without_float_outputs(small: Task) -> None:
    model = other_model("(float[n,1,8,8] image) => (int64[] y) { a = Conv(image, w) y = ArgMax(a) }")
    with pytest.raises(ModelError, match="'m' has no float output, so nothing can be compared"):
        replace(small, subjects=(Subject("m", model),)).check()


# --- advice ---------------------------------------------------------------------------------------------

ADVICE = [
    ("y = HardSwish(x)", ("Clip",), "Relu or Clip"),
    ("y = HardSwish(x)", (), None),
    ("y = Softmax(x)", (), "order of the classes"),
    ("s = Softmax(x) y = Relu(s)", (), None),
    ("y = Gather<axis = 1>(x, i)", (), "indices are a range, Slice"),
    ("y = Gather(c, j)", (), None),
    ("y = Sub(x, x)", ("Add",), "negated weights"),
    ("y = Sub(x, c)", ("Add",), "into the bias"),
    ("y = Mul(x, c)", (), "scale the weights"),
    ("y = Mul(x, x)", (), None),
    ("y = Add(x, c)", ("Concat", "Conv"), "into the bias"),
    ("y = Add(x, x)", ("Concat", "Conv"), "identity weights"),
    ("y = Add(x, x)", ("Conv",), None),
    ("y = ReduceMean(x)", ("GlobalAveragePool",), "GlobalAveragePool"),
    ("y = Neg(x)", ("Conv",), None),
]


@pytest.mark.parametrize(("text", "operators", "advice"), ADVICE)
def test_advice_is_what_the_back_end_can_do(text: str, operators: tuple[str, ...], advice: str | None) -> None:
    constants = {"c": normal(3), "i": np.array([0, 1])}
    graph = GraphIndex(build(f"(float[n,3] x, int64[n] j) => (float[] y) {{ {text} }}", constants))
    found = advice_for(graph.nodes[0], graph, Policy(operators=operators))
    assert found is None if advice is None else advice in str(found)


def test_advice_names_operators_of_onnx() -> None:
    for advice in _ADVICE:
        assert all(onnx.defs.has(operator) for operator in (*advice.operators, *advice.needs))


def test_a_sum_is_a_convolution_over_a_concat() -> None:
    """As the advice for Add says."""
    both = (
        "(float[n,3,4,4] x, float[n,3,4,4] z) => (float[] a, float[] b) "
        "{ a = Add(x, z) c = Concat<axis = 1>(x, z) b = Conv(c, w) }"
    )
    identity = np.concatenate([np.eye(3), np.eye(3)], axis=1)[..., np.newaxis, np.newaxis].astype(np.float32)
    model = build(both, {"w": identity})
    outputs: Mapping[str, Array] = Session(model).run(inputs_of(model))
    np.testing.assert_array_equal(outputs["a"], outputs["b"])
