"""The options of training: each reaches the settings of the run, and what makes no sense is one line."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import Result
from conftest import invoke

import onnxqt.cli.quantize
from onnxqt.calibrate import RANGE_METHODS
from onnxqt.cli import main
from onnxqt.cli.training import TRAINING, regimes_named
from onnxqt.compiler import profile_regimes
from onnxqt.errors import UsageError
from onnxqt.pipeline import Settings
from onnxqt.profiles import PROFILES
from onnxqt.schemes import parse_scheme
from onnxqt.trim import TrimSettings, scheme_regime
from onnxqt.trim.losses import Losses

Invoke = Callable[..., Result]


class CapturedError(Exception):
    """Raised instead of the run."""


@dataclass
class Recorder:
    """Takes the place of the run."""

    settings: Settings | None = None

    def __call__(self, model: Path, data: Path, evaluation: Path, out: Path, settings: Settings, bar: Any) -> None:
        self.settings = settings
        raise CapturedError


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(onnxqt.cli.quantize, "run_trim", made)
    return made


def training(recorder: Recorder, *options: object) -> TrimSettings:
    result = invoke("trim", "model.onnx", "--data", "calib", *options)
    assert isinstance(result.exception, CapturedError), result.output
    assert recorder.settings is not None
    return recorder.settings.training


# Each option with a value that is not its default, and where it arrives.
OPTIONS: dict[str, tuple[list[object], str, object]] = {
    "--steps": ([7], "steps", 7),
    "--batch-size": ([9], "batch_size", 9),
    "--accumulate": ([3], "accumulate", 3),
    "--optimizer": (["sgd"], "optimizer", "sgd"),
    "--lr": (["3e-4"], "learning_rate", 3e-4),
    "--seed": ([5], "seed", 5),
    "--loss": (["distill=0.5,mse:y"], "losses", Losses({"distill": 0.5, "mse:y": 1.0})),
    "--loss-graph": (["loss.onnx"], "losses", Losses({"graph": 1.0}, graph="loss.onnx")),
    "--temperature": ([2.5], "losses", Losses(temperature=2.5)),
    "--prune": (["channel"], "prune", "channel"),
    "--balance": ([0.75], "balance", 0.75),
    "--augment": (["shift, mixup"], "augment", ("mixup", "shift")),
    "--freeze": (["head*"], "freeze", ("head*",)),
    "--average": ([0.25], "average", 0.25),
    "--warmup": ([0.05], "schedule.warmup", 0.05),
    "--bend": ([0.15], "schedule.bend", 0.15),
    "--full": ([0.85], "schedule.full", 0.85),
    "--knee": ([0.35], "schedule.knee", 0.35),
    "--patience": ([4], "patience", 4),
    "--save-every": ([50], "save_every", 50),
    "--save-minutes": ([1.5], "save_minutes", 1.5),
    "--resume": ([], "resume", True),
    "--tensorboard": ([], "tensorboard", True),
}
PAIRED = {"--feature"}  # means nothing without another option


def at(settings: object, path: str) -> object:
    """What a path leads to; where no schedule is asked for, that of weights that were not rounded."""
    if path.startswith("schedule") and isinstance(settings, TrimSettings):
        settings = settings.settled(rounds_well=False)
    for name in path.split("."):
        settings = getattr(settings, name)
    return settings


@pytest.mark.parametrize("name", OPTIONS)
def test_option_reaches_the_settings(name: str, recorder: Recorder) -> None:
    values, path, expected = OPTIONS[name]
    found = training(recorder, name, *values)
    assert at(found, path) == expected
    assert at(TrimSettings(), path) != expected
    # And nothing else: every other field is the default.
    changed = {field for field, value in vars(found).items() if value != getattr(TrimSettings(), field)}
    assert changed == {path.split(".")[0]}


def test_no_augmentation_and_an_unknown_one(recorder: Recorder) -> None:
    assert training(recorder, "--augment", "none").augment == ()
    result = invoke("trim", "model.onnx", "--data", "calib", "--augment", "mixup,zoom")
    assert result.exit_code == 2
    assert "--augment zoom is unknown: give none, or some of mixup, flip, shift" in result.stderr


def test_every_option_is_tested() -> None:
    @click.command()
    def command() -> None:
        """Has the options of training alone."""

    for option in TRAINING:
        command = option(command)
    assert {option.opts[0] for option in command.params} == {*OPTIONS, *PAIRED}
    assert {option.opts[0] for option in main.commands["trim"].params} >= {*OPTIONS, *PAIRED}


def test_every_setting_can_be_given(recorder: Recorder) -> None:
    assert {path.split(".")[0] for _, path, _ in OPTIONS.values()} == set(vars(TrimSettings()))


def test_without_options_everything_is_the_default(recorder: Recorder) -> None:
    assert training(recorder) == TrimSettings()
    assert recorder.settings == Settings()


def test_options_that_repeat(recorder: Recorder) -> None:
    assert training(recorder, "--freeze", "a*", "--freeze", "b").freeze == ("a*", "b")
    losses = training(recorder, "--loss", "features=2", "--feature", "a", "--feature", "b").losses
    assert losses == Losses({"features": 2.0}, features=("a", "b"))


def test_loss_graph_beside_other_parts(recorder: Recorder) -> None:
    losses = training(recorder, "--loss", "distill,graph=0.5", "--loss-graph", "loss.onnx", "--temperature", 3).losses
    assert losses == Losses({"distill": 1.0, "graph": 0.5}, temperature=3.0, graph="loss.onnx")


# --- --robust-to ----------------------------------------------------------------------------------------


def test_robust_to_schemes_and_back_ends(recorder: Recorder) -> None:
    options = ["--robust-to", "w3a8-asym-pt", "--robust-to", "ort_cpu", "--scheme", "w8a8-sym-pc"]
    assert training(recorder, *options) == TrimSettings()
    assert recorder.settings is not None
    scheme = scheme_regime(parse_scheme("w3a8-asym-pt"), "mse")
    assert recorder.settings.robust_to == (scheme, *profile_regimes(PROFILES["ort_cpu"]))
    names = [regime.name for regime in recorder.settings.regimes]
    assert names == ["w8a8-sym-pc", "w3a8-asym-pt", "ort_cpu/w8a8", "ort_cpu/w8a8-dyn"]


@pytest.mark.parametrize("ranges", RANGE_METHODS)
def test_own_schemes_have_the_ranges_that_are_asked_for(ranges: str, recorder: Recorder) -> None:
    training(recorder, "--ranges", ranges)
    assert recorder.settings is not None
    assert {regime.ranges for regime in recorder.settings.regimes} == {ranges}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nnie_log", "--robust-to nnie_log: training cannot round to its logarithmic levels: name another back end"),
        ("w9a8-sym-pc", "--robust-to w9a8-sym-pc is neither a scheme, such as w4a8-sym-pc, nor a back end"),
        ("no.toml", r"no\.toml"),
    ],
)
def test_what_nothing_can_become_robust_to(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        regimes_named([name], "mse")


# --- what makes no sense --------------------------------------------------------------------------------

BAD: dict[str, tuple[list[object], str]] = {
    "no-accumulation": (["--accumulate", 0], "--accumulate is 0: give a number of at least 1"),
    "patience": (["--patience", -1], "--patience is -1: give a number of at least 0"),
    "save-every": (["--save-every", -2], "--save-every is -2: give a number of at least 0"),
    "save-minutes": (["--save-minutes", -0.5], "--save-minutes is -0.5: give a number of at least 0"),
    "save-minutes-nan": (["--save-minutes", "nan"], "--save-minutes is nan: give"),
    "average": (["--average", 1.5], "--average is 1.5: give a number between 0 and 1"),
    "average-nan": (["--average", "nan"], "--average is nan: give"),
    "balance": (["--balance", -0.1], "--balance is -0.1: give a number between 0 and 1"),
    "schedule-order": (["--warmup", 0.6], "the schedule has warmup 0.6, bend 0.1, full 0.25: give"),
    "schedule-full": (["--full", 2], "the schedule has .* full 2: give"),
    "knee": (["--knee", 1.2], "the schedule has knee 1.2: give a number between 0 and 1"),
    "temperature": (["--temperature", 0], "the temperature is 0.0: give a positive number"),
    "unknown-loss": (["--loss", "hinge"], "the loss has no part 'hinge': use distill"),
    "weight-of-a-loss": (
        ["--loss", "distill=much"],
        "the loss 'distill=much' has the weight 'much', which is no number",
    ),
    "loss-twice": (["--loss", "mse,mse"], "the loss 'mse,mse' has 'mse' twice"),
    "empty-loss": (["--loss", ""], "the loss has no part: name at least one of"),
    "feature-alone": (["--feature", "a"], "the feature 'a' is named, but the loss has no part 'features'"),
    "graph-without-file": (["--loss", "graph"], "the loss graph has a weight but no file"),
    "optimizer": (["--optimizer", "lion"], "'lion' is not one of 'adamw', 'sgd'"),
    "prune": (["--prune", "all"], "'all' is not one of 'tensor', 'channel', 'none'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_value_is_one_line(name: str, recorder: Recorder) -> None:
    options, message = BAD[name]
    result = invoke("trim", "model.onnx", "--data", "calib", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert recorder.settings is None
    last = result.stderr.strip().splitlines()[-1]
    assert re.match(rf"Error: .*{message}", last)
    assert result.stderr.count("Error:") == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"optimizer": "lion"}, "--optimizer is 'lion': give one of adamw, sgd"), ({"prune": "all"}, "--prune is 'all'")],
)
def test_names_are_checked_without_the_command_line_too(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrimSettings(**wrong)
