"""Robust rounding in a run: where it starts from, what it ends with, and what the files are made of."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
from conftest import Digits
from onnx import numpy_helper

from onnxqt.candidates import Candidate, Target, mean_error
from onnxqt.numerics import Array
from onnxqt.pipeline import Settings, When, calibrated, open_workspace, starting_point, trim
from onnxqt.schemes import parse_scheme
from onnxqt.trim import TrimSettings

SCHEMES = tuple(map(parse_scheme, ("w4a8-sym-pc", "w4a8-asym-pt")))
UNTRAINED = Settings(SCHEMES, TrimSettings(steps=0), equalize="never")


def weights(path: Path) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer if t.data_type == 1}


@pytest.mark.parametrize("when", get_args(When))
def test_files_are_made_of_what_the_setting_says(when: When, torch_digits: Digits, tmp_path: Path) -> None:
    settings = replace(UNTRAINED, robust_rounding=when)
    report = trim(torch_digits.file, torch_digits.calib, None, tmp_path, settings).content
    made_of = {scheme["weights"] for scheme in report["schemes"].values()}
    assert made_of == {"original" if when == "never" else "rounded"}
    assert report["settings"]["robust_rounding"] == when
    before = {scheme["ptq"]["fidelity"]["mse"] for scheme in report["schemes"].values()}
    after = {scheme["trim"]["fidelity"]["mse"] for scheme in report["schemes"].values()}
    assert after == before if when == "never" else max(after) < min(before)


def test_auto_takes_what_loses_least_on_held_out_samples(torch_digits: Digits, tmp_path: Path) -> None:
    work, ranges = calibrated(
        open_workspace(torch_digits.file, torch_digits.calib, None, tmp_path, replace(UNTRAINED, equalize="auto"))
    )
    source, original = work.source, Candidate(work.source.model, ranges)
    found = starting_point(work, original)
    target = Target(source.plan, SCHEMES, "mse")

    def error(candidate: Candidate) -> float:
        return mean_error(candidate, source.model, target, source.batches(source.held))

    fixed: tuple[When, ...] = ("always", "never")
    others = [
        starting_point(replace(work, settings=replace(work.settings, equalize=e, robust_rounding=r)), original)
        for e in fixed
        for r in fixed
    ]
    assert error(found) == min(map(error, others)) < error(original)


def test_training_from_rounded_weights_is_gentle_and_on_the_grid(torch_digits: Digits, tmp_path: Path) -> None:
    settings = replace(UNTRAINED, training=TrimSettings(steps=4, batch_size=16), robust_rounding="always")
    report = trim(torch_digits.file, torch_digits.calib, None, tmp_path, settings).content
    curves = report["training"]["curves"]
    assert set(curves["lambda"]) == {1.0}
    assert max(curves["lr"]) == report["training"]["learning_rate"] == settings.training.settled(True).learning_rate
    plain = trim(
        torch_digits.file, torch_digits.calib, None, tmp_path / "plain", replace(settings, robust_rounding="never")
    ).content
    assert plain["training"]["curves"]["lambda"][0] == 0
    assert plain["training"]["learning_rate"] > report["training"]["learning_rate"]


def test_extremes_of_the_checkpoint_are_those_of_the_original(torch_digits: Digits, tmp_path: Path) -> None:
    trim(torch_digits.file, torch_digits.calib, None, tmp_path, replace(UNTRAINED, robust_rounding="always"))
    work = open_workspace(torch_digits.file, torch_digits.calib, None, tmp_path / "plain", UNTRAINED)
    found = weights(tmp_path / "checkpoint.onnx")
    for site in work.source.plan.weights:
        start = np.asarray(work.source.model.graph.constant(site.tensor))
        assert not np.array_equal(found[site.tensor], start)
        assert (found[site.tensor].min(), found[site.tensor].max()) == (start.min(), start.max())
