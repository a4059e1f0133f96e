"""Robust rounding: one set of float weights that rounds well on several grids."""

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from helpers import build, ingested, normal, run
from test_ptq_rounding import NETS, samples_of

from onnxqt.calibrate import weight_params
from onnxqt.model import Model
from onnxqt.numerics import Array, fake_quantize
from onnxqt.plan import make_plan
from onnxqt.ptq import Robust, RobustSettings, round_robustly
from onnxqt.runtime import with_outputs
from onnxqt.schemes import Grids, parse_scheme

SCHEMES = ("w8a8-sym-pc", "w4a8-sym-pc", "w4a8-asym-pc", "w4a8-sym-pt", "w3a8-sym-pt")
# Of the schemes, those that lay the same codes over weights count together; float is one more.
KINDS = ("w8a8-sym-pc", "w4a8-sym-pc", "w4a8-sym-pt", "w3a8-sym-pt")
SHARES = np.array([1, 1, 2, 1, 1]) / 6
EVERY_POSITION = RobustSettings(rows=10_000, sweeps=8)
EACH_NET = pytest.mark.parametrize("name", NETS)
# H is a sum in float32 of products of float32 values; the outputs compared with are such sums too.
FLOAT32_SUMS = 2e-3


def grids(*names: str) -> list[Grids]:
    return [parse_scheme(name).grids for name in names]


@functools.cache
def rounded(name: str) -> tuple[Model, Robust]:
    model = ingested(build(NETS[name].text, NETS[name].constants))
    return model, round_robustly(model, make_plan(model), grids(*SCHEMES), samples_of(model), EVERY_POSITION)


def weight_of(model: Model) -> Array:
    return np.asarray(model.graph.constant("w"))


def on_grid(model: Model, weight: Array, scheme: str | None) -> Array:
    """What a scheme makes of a weight; None is float."""
    if scheme is None:
        return weight
    params = weight_params(make_plan(model), lambda _: weight, parse_scheme(scheme).grids)["w"]
    quantized: Array = fake_quantize(weight, params)
    return quantized


def outputs(model: Model, weight: Array) -> Array:
    """What the layer gives out in ONNX Runtime, before its activation and without its bias."""
    zero = {name: np.zeros_like(model.graph.constant(name)) for name in ("b",) if name in model.graph.initializers}
    (layer,) = [node for node in model.graph.nodes if "w" in node.inputs]
    found = model.with_weights({"w": weight, **zero})
    batch = next(samples_of(model).batches(1000))
    return np.asarray(run(with_outputs(found.proto, [layer.outputs[0]]), batch.inputs)[layer.outputs[0]])


def errors_in_onnxruntime(model: Model, weight: Array) -> Array:
    """Mean squared error of the layer under float and each kind of codes, relative to its mean square."""
    expected = outputs(model, weight_of(model))
    found = [outputs(model, on_grid(model, weight, scheme)) for scheme in (None, *KINDS)]
    errors: Array = np.array([np.mean((y - expected) ** 2) for y in found]) / np.mean(expected**2)
    return errors


@EACH_NET
def test_errors_are_those_of_the_layer_in_onnxruntime(name: str) -> None:
    model, outcome = rounded(name)
    (error,) = outcome.errors.values()
    np.testing.assert_allclose(error.before, errors_in_onnxruntime(model, weight_of(model)), FLOAT32_SUMS, 1e-7)
    np.testing.assert_allclose(error.after, errors_in_onnxruntime(model, weight_of(outcome.model)), FLOAT32_SUMS, 1e-7)


@EACH_NET
def test_every_coarse_grid_gains_and_float_gives_little(name: str) -> None:
    _, outcome = rounded(name)
    (error,) = outcome.errors.values()
    assert SHARES @ error.after < 0.7 * (SHARES @ error.before)
    assert (error.after[2:] < error.before[2:]).all()  # 4 and 3 bits
    assert error.before[0] == 0
    assert error.after[0] < error.after[2:].min()


@EACH_NET
def test_extremes_of_each_output_stay(name: str) -> None:
    model, outcome = rounded(name)
    (site,) = make_plan(model).weights
    before, after = (
        np.moveaxis(weight_of(m), site.axis, 0).reshape(weight_of(m).shape[site.axis], -1)
        for m in (model, outcome.model)
    )
    np.testing.assert_array_equal(before.min(axis=1), after.min(axis=1))
    np.testing.assert_array_equal(before.max(axis=1), after.max(axis=1))
    assert (before != after).any()


def test_no_other_value_of_a_single_weight_is_better() -> None:
    model = ingested(build(NETS["gemm"].text, NETS["gemm"].constants))
    names = ("w4a8-sym-pc", "w3a8-sym-pc")
    settings = replace(EVERY_POSITION, sweeps=100)
    outcome = round_robustly(model, make_plan(model), grids(*names), samples_of(model), settings)
    start, found = weight_of(model), weight_of(outcome.model)
    x = next(samples_of(model).batches(1000)).inputs["x"].astype(np.float64)

    def cost(weight: Array) -> float:
        made = [on_grid(model, weight, scheme) for scheme in (None, *names)]
        return float(sum(np.sum((x @ (q - start).astype(np.float64)) ** 2) for q in made))

    least = cost(found)
    assert least < 0.7 * cost(start)
    step = np.abs(start).max(axis=0) / 3  # of 3 bits, the coarser grid
    fixed = (start == start.min(axis=0)) | (start == start.max(axis=0))
    for i, j in zip(*np.nonzero(~fixed), strict=True):
        for offset in np.linspace(-1, 1, settings.choices):
            other = found.copy()
            other[i, j] = np.clip(start[i, j] + np.float32(offset * step[j]), start[:, j].min(), start[:, j].max())
            assert cost(other) > least * (1 - 1e-4)  # equal costs differ by float32 sums


def test_the_same_twice() -> None:
    model = ingested(build(NETS["conv"].text, NETS["conv"].constants))
    found = [round_robustly(model, make_plan(model), grids(*SCHEMES), samples_of(model)) for _ in range(2)]
    first, second = (weight_of(outcome.model) for outcome in found)
    np.testing.assert_array_equal(first, second)


def test_progress_names_the_layers_and_errors_cover_them() -> None:
    told: list[tuple[int, str]] = []
    model = ingested(build(NETS["conv"].text, NETS["conv"].constants))
    note: Callable[[int, str], None] = lambda done, name: told.append((done, name))  # noqa: E731
    outcome = round_robustly(model, make_plan(model), grids("w4a8-sym-pc"), samples_of(model), progress=note)
    assert told == [(1, name) for name in outcome.errors]
    assert not outcome.skipped


def test_layers_that_are_no_matrix_product_are_left_with_a_reason() -> None:
    text = "(float[n,4,6,6] x) => (float[] y) { h = ConvTranspose(x, w) y = Relu(h) }"
    model = ingested(build(text, {"w": normal(4, 5, 3, 3)}))
    outcome = round_robustly(model, make_plan(model), grids("w4a8-sym-pc"), samples_of(model))
    assert list(outcome.skipped.values()) == ["no learned rounding for ConvTranspose"]
    np.testing.assert_array_equal(weight_of(outcome.model), weight_of(model))
