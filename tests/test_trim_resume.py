"""Runs that end before their time: what they save, and that going on gives what an undisturbed run gives."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Digits

from onnxqt.data import DataSource
from onnxqt.errors import TrainingError
from onnxqt.numerics import Array
from onnxqt.schemes import parse_scheme
from onnxqt.trim import Subject, Trimmed, TrimSettings, scheme_regime, trim
from onnxqt.trim import job as jobs
from onnxqt.trim import state as states
from onnxqt.trim.history import before_step, read_history

STEPS, SAVE_EVERY = 24, 5
TIMES = ("ms", "seconds")  # what differs between two runs of the same steps


def make_subject(digits: Digits) -> Subject:
    """One scheme clips weights, and two bits gain from any training; the other has grids of both symmetries."""
    regimes = tuple(scheme_regime(parse_scheme(name), "mse") for name in ("w2a8-sym-pt", "w4a4-asym-pc"))
    source = DataSource(str(digits.calib))
    return Subject(digits.model, digits.model, digits.plan, digits.ranges, regimes, source)


def settings(**changes: Any) -> TrimSettings:
    chosen = {"steps": STEPS, "batch_size": 16, "accumulate": 2, "save_every": SAVE_EVERY, "learning_rate": 5e-3}
    return TrimSettings(**{**chosen, **changes})


def plain(history: tuple[dict[str, Any], ...]) -> list[dict[str, Any]]:
    """The reports without what no two runs share."""
    return [{key: value for key, value in report.items() if key not in TIMES} for report in history]


@pytest.fixture(scope="module", autouse=True)
def frequent_refreshes() -> Any:
    """So that clips and grids move within a short run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["onnxqt.trim"], "REFRESH_EVERY", 4)  # `onnxqt.trim` is a function too
        yield


@pytest.fixture(scope="module")
def subject(torch_digits: Digits) -> Subject:
    return make_subject(torch_digits)


class Undisturbed:
    """A run from its first step to its last."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.folder = folder
        self.result: Trimmed = trim(subject, settings(), folder)

    @property
    def files(self) -> dict[str, bytes]:
        return contents(self.folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (jobs.BEST, jobs.LAST)}


@pytest.fixture(scope="module")
def undisturbed(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(subject, tmp_path_factory.mktemp("undisturbed"))


def broken_off(subject: Subject, folder: Path, step: int, chosen: TrimSettings | None = None) -> None:
    """A run whose training process is killed when it has reported a step."""
    started: list[subprocess.Popen[str]] = []

    class Recorded(subprocess.Popen[str]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self)

    def progress(report: dict[str, Any]) -> None:
        if report["event"] == "step" and report["step"] == step:
            started[-1].kill()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", Recorded)
        with pytest.raises(TrainingError, match="was killed by SIGKILL"):
            trim(subject, chosen or settings(), folder, progress)


@pytest.fixture(scope="module")
def killed(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed after its step 7; it has saved its state after five updates."""
    folder = tmp_path_factory.mktemp("killed")
    broken_off(subject, folder, 7)
    return folder


def check_same(result: Trimmed, folder: Path, undisturbed: Undisturbed) -> None:
    assert contents(folder) == undisturbed.files
    assert plain(result.history) == plain(undisturbed.result.history)
    assert (result.best_step, result.steps) == (undisturbed.result.best_step, STEPS)
    assert (result.helped, result.tails) == (undisturbed.result.helped, undisturbed.result.tails)
    assert tuple(read_history(folder)) == result.history


def test_undisturbed_run_has_something_to_lose(undisturbed: Undisturbed) -> None:
    """Else the comparisons below would show little."""
    result = undisturbed.result
    assert result.best_step > 0
    saved = [report["step"] for report in result.history if report["event"] == "saved"]
    assert saved == [5, 10, 15, 20]
    assert any(before.clipped > 0 for before, _ in result.tails.values())
    assert not (undisturbed.folder / jobs.STATE).exists()


def test_same_settings_give_the_same_run(subject: Subject, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Also without saving: a save changes nothing."""
    result = trim(subject, settings(save_every=0), tmp_path)
    assert contents(tmp_path) == undisturbed.files
    events = [report for report in plain(undisturbed.result.history) if report["event"] != "saved"]
    assert plain(result.history) == events


def test_another_seed_gives_another_run(subject: Subject, undisturbed: Undisturbed, tmp_path: Path) -> None:
    result = trim(subject, settings(seed=1), tmp_path)
    assert contents(tmp_path)[jobs.LAST] != undisturbed.files[jobs.LAST]
    assert plain(result.history) != plain(undisturbed.result.history)


def test_resumed_run_is_the_undisturbed_one(
    subject: Subject, undisturbed: Undisturbed, killed: Path, tmp_path: Path
) -> None:
    """Killed in the float part: it goes on from update 5, so steps 5 to 7 are done twice and reported once."""
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    events: list[dict[str, Any]] = []
    result = trim(subject, settings(resume=True), folder, events.append)
    assert events[0] == {"event": "resume", "step": 5}
    check_same(result, folder, undisturbed)


def test_run_that_is_broken_off_twice_is_the_undisturbed_one(
    subject: Subject, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Killed on the ramp and, with an average and better weights kept, in the last part."""
    broken_off(subject, tmp_path, 13)
    broken_off(subject, tmp_path, 22, settings(resume=True))
    check_same(trim(subject, settings(resume=True), tmp_path), tmp_path, undisturbed)


def test_stopped_run_goes_on_as_if_nothing_had_been(subject: Subject, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """A stop saves, and its evaluation, which an undisturbed run has not, leaves no trace."""

    def progress(report: dict[str, Any]) -> None:
        if report["event"] == "step" and report["step"] == 12:
            (tmp_path / jobs.STOP).touch()

    stopped = trim(subject, settings(), tmp_path, progress)
    assert stopped.stopped
    assert 13 <= stopped.steps < STEPS
    result = trim(subject, settings(resume=True), tmp_path)
    assert not result.stopped
    assert contents(tmp_path) == undisturbed.files
    extra = {"event": "saved", "step": stopped.steps}
    kept = [report for report in plain(result.history) if report != extra or stopped.steps % SAVE_EVERY == 0]
    assert kept == plain(undisturbed.result.history)


CHANGES: Mapping[str, Any] = {
    "steps": 25,
    "batch_size": 5,
    "accumulate": 1,
    "optimizer": "sgd",
    "learning_rate": 0.01,
    "seed": 3,
    "average": 0.15,
    "prune": "none",
    "balance": 0.25,
    "patience": 4,
}


@pytest.mark.parametrize("name", CHANGES)
def test_run_of_other_settings_is_not_resumed(name: str, subject: Subject, killed: Path) -> None:
    before = {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}
    message = rf"^the run in '.*' has another {name.replace('_', ' ')}: give the settings and samples that it was"
    with pytest.raises(TrainingError, match=message):
        trim(subject, settings(resume=True, **{name: CHANGES[name]}), killed)
    assert {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()} == before


def test_run_of_another_model_is_not_resumed(subject: Subject, killed: Path) -> None:
    other = replace(subject, regimes=subject.regimes[:1])
    with pytest.raises(TrainingError, match=r"has another regimes: give the settings and samples"):
        trim(other, settings(resume=True), killed)


def test_nothing_to_resume_is_refused(subject: Subject, undisturbed: Undisturbed, tmp_path: Path) -> None:
    for folder in (tmp_path, undisturbed.folder):  # a run that ended well leaves no state
        with pytest.raises(TrainingError, match=r"^there is nothing to resume in '.*': run without --resume$"):
            trim(subject, settings(resume=True), folder)


@pytest.mark.parametrize("where", [jobs.STATE, f"{jobs.STATE}.new"])
def test_new_run_does_not_go_on_from_an_old_state(where: str, subject: Subject, killed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    (folder / jobs.STATE).rename(folder / where)
    result = trim(subject, settings(steps=2), folder)
    assert [report["step"] for report in result.history if report["event"] == "step"] == [0, 1]


# --- the state on disk ----------------------------------------------------------------------------------

ARRAYS: dict[str, dict[str, Array]] = {
    "clips": {"/0/Conv.weight": np.array([1, 2], np.float32), "a\tb": np.zeros((), np.float32)},
    "observed": {"counts": np.arange(6.0).reshape(2, 3)},
    "empty": {},
}


def save(folder: Path, step: int = 3) -> None:
    def write(path: Path) -> None:
        path.write_text("weights")

    states.save(folder, write, ARRAYS, {"step": step, "best": float("inf")})


def test_state_comes_back(tmp_path: Path) -> None:
    assert states.find(tmp_path) is None
    save(tmp_path, 3)
    save(tmp_path, 4)
    found = states.find(tmp_path)
    assert found is not None
    assert found.progress == {"step": 4, "best": float("inf")}
    assert found.trainer.read_text() == "weights"
    assert found.arrays.keys() == {"clips", "observed"}  # a group of nothing is no group
    for group, arrays in found.arrays.items():
        assert arrays.keys() == ARRAYS[group].keys()
        for name, value in arrays.items():
            np.testing.assert_array_equal(value, ARRAYS[group][name])
            assert (value.dtype, value.shape) == (ARRAYS[group][name].dtype, ARRAYS[group][name].shape)


def test_save_that_was_cut_off_leaves_the_last_state(tmp_path: Path) -> None:
    """At its start the old state counts; at its end, when the old one is gone, the new one."""
    save(tmp_path, 3)
    new = tmp_path / f"{jobs.STATE}.new"
    new.mkdir()
    (new / "arrays.npz").write_bytes(b"half")
    found = states.find(tmp_path)
    assert found is not None
    assert found.progress["step"] == 3
    shutil.rmtree(new)
    (tmp_path / jobs.STATE).rename(new)
    found = states.find(tmp_path)
    assert found is not None
    assert found.progress["step"] == 3


def test_best_weights_go_back_with_the_state(tmp_path: Path) -> None:
    (tmp_path / jobs.BEST).write_text("then")
    states.write_clips(tmp_path, {"/w": np.array([1, 2], np.float32)})
    save(tmp_path)
    (tmp_path / jobs.BEST).write_text("later")
    states.write_clips(tmp_path, {"/w": np.array([3, 4], np.float32)})
    states.restore_best(tmp_path)
    assert (tmp_path / jobs.BEST).read_text() == "then"
    np.testing.assert_array_equal(states.read_clips(tmp_path)["/w"], [1, 2])


def test_best_weights_of_later_are_gone_where_there_were_none(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / jobs.BEST).write_text("later")
    states.restore_best(tmp_path)
    assert not (tmp_path / jobs.BEST).exists()
    assert states.read_clips(tmp_path) == {}


# --- history --------------------------------------------------------------------------------------------


def test_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    assert read_history(tmp_path) == []
    reports = [{"event": "start", "losses": [0.1, 2.0]}, {"event": "step", "step": 0}]
    lines = "".join(json.dumps(report) + "\n" for report in reports)
    (tmp_path / jobs.HISTORY).write_text(lines + '{"event": "ste')
    assert read_history(tmp_path) == reports


def test_history_before_a_saved_state() -> None:
    reports = [{"event": event, "step": step} for step in (1, 2, 3) for event in ("step", "saved")]
    assert before_step(reports, 2) == reports[:4]


# --- the job on disk ------------------------------------------------------------------------------------


def test_job_comes_back(killed: Path, tmp_path: Path) -> None:
    job = jobs.read(killed)
    jobs.write(tmp_path, job)
    assert jobs.read(tmp_path) == job
    assert jobs.difference(tmp_path, job) is None
    assert (job.steps, job.refresh_every, len(job.regimes)) == (STEPS, 4, 3)


def test_checkpoint_is_complete_after_a_kill(killed: Path, subject: Subject) -> None:
    assert not (killed / jobs.BEST).exists()  # nothing was evaluated before step 17
    assert onnx.load(killed / jobs.START).graph.node[0].op_type == subject.model.proto.graph.node[0].op_type
