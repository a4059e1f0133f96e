"""The digits classifiers, prepared once for every test that wants them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnx
import pytest

from onnxqt.calibrate import Quantizers, RangeTable, calibrate, make_quantizers
from onnxqt.data import Samples, open_samples
from onnxqt.export import quantized_model
from onnxqt.model import Model, ingest
from onnxqt.numerics import Array
from onnxqt.pipeline import input_specs
from onnxqt.plan import QuantPlan, make_plan
from onnxqt.schemes import Scheme

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ("torch", "keras")
CALIBRATED = 100  # samples


@dataclass(frozen=True, eq=False)
class Digits:
    """A fixture, planned and calibrated; `inputs` are the samples it was calibrated on."""

    folder: Path
    model: Model
    plan: QuantPlan
    samples: Samples
    ranges: RangeTable
    inputs: Mapping[str, Array]

    @property
    def file(self) -> Path:
        return self.folder / "model.onnx"

    @property
    def calib(self) -> Path:
        return self.folder / "calib"

    def quantizers(self, scheme: Scheme) -> Quantizers:
        return make_quantizers(self.model, self.plan, self.ranges, scheme, "minmax")

    def quantized(self, scheme: Scheme) -> onnx.ModelProto:
        return quantized_model(self.model, self.plan, self.quantizers(scheme))


@cache
def _load(name: str) -> Digits:
    folder = ROOT / "fixtures" / name
    model = ingest(folder / "model.onnx")
    plan = make_plan(model)
    samples = open_samples(folder / "calib", input_specs(model)).take(CALIBRATED)
    (batch,) = samples.batches(CALIBRATED)
    return Digits(folder, model, plan, samples, calibrate(model, plan, samples), batch.inputs)


@pytest.fixture(scope="session")
def load_digits() -> Callable[[str], Digits]:
    """A fixture by its name."""
    return _load


@pytest.fixture(scope="session", params=FIXTURES)
def digits(request: pytest.FixtureRequest) -> Digits:
    """Each fixture in turn."""
    return _load(str(request.param))


@pytest.fixture(scope="session")
def torch_digits() -> Digits:
    return _load("torch")
