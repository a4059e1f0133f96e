"""The ablation trains what its rows say, counts right ones rightly, and goes on where it was."""

import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from bench_samples import write_samples
from conftest import Digits

from onnxqt.calibrate import calibrate, make_quantizers
from onnxqt.data import open_samples
from onnxqt.errors import OnnxqtError, TrainingError, UsageError
from onnxqt.export import quantized_model
from onnxqt.ingest import ingest
from onnxqt.model import Model, input_specs
from onnxqt.numerics import Array
from onnxqt.plan import make_plan
from onnxqt.runtime import Session
from onnxqt.schemes import parse_scheme
from onnxqt.trim import TrimSettings
from onnxqt.trim.losses import Losses

TOOLS = Path(__file__).parents[1] / "tools"
CALIBRATED, JUDGED = 96, 130  # samples; 130 are two batches of 64 and two samples
SCHEMES = ("w4a8-sym-pt", "w4a4-asym-pc")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    monkeypatch.delitem(sys.modules, "bench_ablation", raising=False)
    return importlib.import_module("bench_ablation")


@pytest.fixture(scope="session")
def data(torch_digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    counts = {"calib": CALIBRATED, "eval": JUDGED}
    return write_samples(torch_digits.folder, tmp_path_factory.mktemp("samples"), counts)


def right(model: onnx.ModelProto | Path, data: Path) -> float:
    """Share of the evaluation samples whose largest class score is the label."""
    with np.load(data / "eval" / "samples.npz") as file:
        (scores,) = Session(model).run({"image": file["image"]}).values()
        return float(np.mean(scores.argmax(axis=1) == file["labels"]))


def arguments(digits: Digits, data: Path, out: Path, *more: str) -> list[str]:
    given = ["--data", data, "--out", out, "--seeds", 1, "--steps", 2, "--schemes", *SCHEMES, *more]
    return [str(argument) for argument in (digits.file, *given)]


def untrained(subject: Any, **facts: Any) -> Any:
    """What `trim` returns after a run that changed nothing."""
    told = {"reason": None, "stopped": False, "steps": 2, "best_step": 0, "diverged": None}
    return SimpleNamespace(model=subject.model, seconds=0.0, step_ms_median=0.0, **{**told, **facts})


# --- rows and families ----------------------------------------------------------------------------------


def test_every_scheme_is_there_once_and_in_one_family(tool: ModuleType) -> None:
    assert len({str(scheme) for scheme in tool.ALL}) == len(tool.ALL) == 12
    members = {name: [str(s) for s in tool.ALL if belongs(s)] for name, belongs in tool.FAMILIES.items()}
    assert {name: len(found) for name, found in members.items()} == {
        "w8a8": 4, "w4a8 pc": 2, "w4a8 pt": 2, "w4a4 asym pc": 1, "w4a4 rest": 3,
    }  # fmt: skip
    assert sorted(name for found in members.values() for name in found) == sorted(map(str, tool.ALL))
    assert members["w4a8 pt"] == ["w4a8-sym-pt", "w4a8-asym-pt"]
    assert members["w4a4 asym pc"] == ["w4a4-asym-pc"]


def test_rows_differ_in_what_they_say(tool: ModuleType) -> None:
    bench = tool.Bench(None, None, None, None, None, tool.ALL, TrimSettings(steps=50))
    made = {name: bench.settings_of(row, 3) for name, row in tool.ROWS.items() if row.trained}
    assert {name for name, row in tool.ROWS.items() if not row.trained} == {"ptq", "rounded"}
    one, every = (parse_scheme("w4a8-sym-pt"),), tool.ALL
    trained_for = {name: bench.schemes_of(tool.ROWS[name]) for name in tool.ROWS}
    assert trained_for.pop("ptq") == trained_for.pop("rounded") == ()
    assert {name for name, found in trained_for.items() if found == one} == {"progressive", "reverse-pruning"}
    assert all(found == every for name, found in trained_for.items() if name not in ("progressive", "reverse-pruning"))
    assert {name for name, row in tool.ROWS.items() if row.rounded} == {"rounded", "full", "no-mixup", "no-average"}
    chosen = TrimSettings(steps=50, seed=3)
    full, mixup = made["full"], made["mixup"]
    assert full == chosen.settled(rounds_well=True)
    assert mixup == chosen.settled(rounds_well=False)
    assert full.learning_rate < mixup.learning_rate
    assert [full.schedule.blend(step, 50) for step in (0, 1, 49)] == [1, 1, 1]
    assert mixup.schedule.blend(0, 50) == 0
    both = replace(mixup, augment=())
    assert made["both"] == made["reverse-pruning"] == both
    assert made["scheme-robust"] == made["progressive"] == replace(both, prune="none")
    assert made["no-mixup"] == replace(full, augment=())
    assert made["no-average"] == replace(full, average=0.0)


def test_tables_have_means_and_what_the_seeds_differ_by(tool: ModuleType) -> None:
    schemes = tuple(map(parse_scheme, ("w8a8-sym-pc", "w8a8-sym-pt", "w4a4-asym-pc")))
    first = {"float": 0.9, "w8a8-sym-pc": 0.88, "w8a8-sym-pt": 0.84, "w4a4-asym-pc": 0.5}
    second = {"float": 0.88, "w8a8-sym-pc": 0.86, "w8a8-sym-pt": 0.82, "w4a4-asym-pc": 0.7}
    results = {"ptq": [first], "full": [first, second]}
    assert tool.family_table(results, 0.9, schemes).splitlines() == [
        "| row | float | w8a8 | w4a4 asym pc |",
        "|---|--:|--:|--:|",
        "| ptq | 0.00 | 4.00 | 40.00 |",
        "| full | 1.00 ± 1.00 | 5.00 ± 1.00 | 30.00 ± 10.00 |",
    ]
    lines = tool.scheme_table(results).splitlines()
    assert lines[0] == "| scheme | ptq | full |"
    assert lines[-1] == "| w4a4-asym-pc | 50.00 | 60.00 (50.00..70.00) |"


# --- a run ----------------------------------------------------------------------------------------------


def test_run_is_judged_by_top1_and_not_done_again(
    tool: ModuleType,
    torch_digits: Digits,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = arguments(torch_digits, data, tmp_path, "--rows", "ptq", "full")
    assert tool.main(given) == 0
    table = capsys.readouterr().out
    model = ingest(torch_digits.file)
    for name in ("ptq", "full"):
        stored = json.loads((tmp_path / f"{name}-0.json").read_text())
        proto = onnx.load(tmp_path / f"{name}-0.onnx")
        assert stored["top1"] == {"float": right(proto, data), **under_schemes(Model(proto, ""), data)}
        assert stored["made of"]["model"] == model.sha256
    assert json.loads((tmp_path / "full-0.json").read_text())["training"]["steps"] == 2
    assert f"Float {100 * right(model.proto, data):.2f} %, {JUDGED} evaluation samples; 2 steps of 64" in table
    assert not list(tmp_path.glob("*-1.*"))

    monkeypatch.setattr(tool, "trim", lambda *_: pytest.fail("trained again"))
    assert tool.main(given) == 0
    assert capsys.readouterr().out == table
    assert tool.main([*given, "--steps", "3"]) == UsageError.exit_code
    assert "full-0.json' has another training: give the same options" in capsys.readouterr().err


def under_schemes(model: Model, data: Path) -> Mapping[str, float]:
    """Top-1 of a checkpoint that is planned, calibrated and quantized from its file."""
    plan = make_plan(model)
    ranges = calibrate(model, plan, open_samples(data / "calib", input_specs(model)))
    quantizers = {name: make_quantizers(model, plan, ranges, parse_scheme(name), "mse") for name in SCHEMES}
    return {name: right(quantized_model(model, plan, found), data) for name, found in quantizers.items()}


def test_row_trains_on_its_schemes_and_goes_on_from_a_saved_state(
    tool: ModuleType, torch_digits: Digits, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def trim(subject: Any, settings: TrimSettings, folder: Path, progress: Any) -> Any:
        seen.append((folder.name, [regime.name for regime in subject.regimes], settings))
        return untrained(subject)

    monkeypatch.setattr(tool, "trim", trim)
    monkeypatch.setattr(tool.states, "find", lambda folder: object() if folder.name.startswith("full") else None)
    given = arguments(torch_digits, data, tmp_path, "--rows", "progressive", "full")
    assert tool.main([*given, "--seeds", "2"]) == 0
    assert [(name, names) for name, names, _ in seen] == [
        *((f"progressive-{seed}.training", ["w4a8-sym-pt"]) for seed in (0, 1)),
        *((f"full-{seed}.training", list(SCHEMES)) for seed in (0, 1)),
    ]
    assert [settings.seed for *_, settings in seen] == [0, 1, 0, 1]
    assert [settings.resume for *_, settings in seen] == [False, False, True, True]
    assert {settings.steps for *_, settings in seen} == {2}
    assert all(settings.losses == Losses() for *_, settings in seen)  # distillation, though there are labels


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"stopped": True}, "full 0 was stopped: give the same command"),
        ({"reason": "frozen"}, "can be trained: frozen"),
    ],
)
def test_run_that_did_not_end_is_no_result(
    tool: ModuleType,
    torch_digits: Digits,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    facts: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(tool, "trim", lambda subject, *_: untrained(subject, **facts))
    given = arguments(torch_digits, data, tmp_path, "--rows", "full")
    assert tool.main(given) == TrainingError.exit_code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("option", ["seeds", "steps"])
def test_counts_below_one_are_refused(
    tool: ModuleType, data: Path, torch_digits: Digits, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert tool.main([*arguments(torch_digits, data, tmp_path), f"--{option}", "0"]) == UsageError.exit_code
    assert f"--{option} is 0: give a number of at least 1" in capsys.readouterr().err


def test_samples_without_labels_are_refused(tool: ModuleType, torch_digits: Digits, data: Path, tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "calib").symlink_to(data / "calib")
    with np.load(data / "eval" / "samples.npz") as file:
        image: Array = file["image"]
    np.savez(tmp_path / "eval" / "samples.npz", image=image)
    with pytest.raises(OnnxqtError, match=r"eval' has no labels to judge by: add an array 'labels' to every file"):
        tool.open_bench(torch_digits.file, tmp_path, tmp_path / "out")
