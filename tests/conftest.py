"""The digits classifiers and a short run on one of them, prepared once for every test that wants them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result

from onnxqt.calibrate import Quantizers, RangeTable, calibrate, make_quantizers
from onnxqt.cli import main
from onnxqt.data import Samples, open_samples
from onnxqt.export import quantized_model
from onnxqt.ingest import ingest
from onnxqt.model import Model, input_specs
from onnxqt.numerics import Array
from onnxqt.plan import QuantPlan, make_plan
from onnxqt.schemes import Scheme

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ("torch", "keras")
CALIBRATED = 100  # samples
RUN_SCHEMES = ("w8a8-sym-pc", "w2a8-asym-pt", "w4a4-asym-pc")  # two bits gain from any training
RUN_STEPS = 30


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


def invoke(*arguments: object) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def files(folder: Path) -> set[str]:
    """Every file below a folder, relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@dataclass(frozen=True, eq=False)
class Run:
    """A short run of `onnxqt trim --json` on the torch fixture, with labelled evaluation samples."""

    digits: Digits
    folder: Path
    result: Result

    @property
    def evaluation(self) -> Path:
        return self.digits.folder / "eval"

    @property
    def report(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "report.json").read_text())
        return content

    def scheme_file(self, name: str) -> Path:
        return self.folder / "schemes" / f"{name}.onnx"


@pytest.fixture(scope="session")
def short_run(torch_digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run") / "out"
    schemes = [argument for name in RUN_SCHEMES for argument in ("--scheme", name)]
    data = ["--data", torch_digits.calib, "--eval", torch_digits.folder / "eval"]
    options = ["--steps", RUN_STEPS, "--robust-rounding", "never", "--json"]  # that has tests of its own
    result = invoke("trim", torch_digits.file, *data, "--out", folder, *options, *schemes)
    assert result.exit_code == 0, result.stderr
    return Run(torch_digits, folder, result)
