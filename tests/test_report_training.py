"""What the report and the terminal say of a training run."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from conftest import ROOT, Digits, invoke

from onnxqt.pipeline import Settings
from onnxqt.report import CURVE_POINTS, Findings, Report, build_report
from onnxqt.trim import Trimmed, TrimSettings
from onnxqt.trim.losses import Losses
from onnxqt.trim.prune import Tails
from onnxqt.trim.schedule import Schedule

SCHEMA = json.loads((ROOT / "onnxqt" / "report.schema.json").read_text())
REGIMES = ("w4a8-sym-pt", "w8a8-sym-pc", "float")
STEPS = 1000


def steps(count: int, **more: float) -> list[dict[str, Any]]:
    return [
        {"event": "step", "step": i, "loss": 2.0 * i, "blend": i / count, "lr": 1e-3 * i, "ms": 5.0, **more}
        for i in range(count)
    ]


def tails_of(largest: float, clipped: float) -> Tails:
    return Tails(largest, {"0.5": 0.2, "0.99": 0.8, "0.999": 1.0}, 3.5, clipped)


def findings(digits: Digits, history: list[dict[str, Any]], **settings: Any) -> Findings:
    trimmed = Trimmed(
        digits.model,
        steps=sum(report["event"] == "step" for report in history),
        best_step=0,
        seconds=1.0,
        step_ms_median=5.0,
        helped=dict.fromkeys(REGIMES, False),
        tails={
            "a": (tails_of(2.0, 0.0), tails_of(2.0, 0.0)),
            "b": (tails_of(8.25, 0.01), tails_of(3.0, 0.0)),
            "c": (tails_of(4.0, 0.02), tails_of(3.5, 0.0)),
        },
        history=tuple(history),
    )
    asked = Settings(training=TrimSettings(steps=STEPS, **settings).settled(rounds_well=False))
    return Findings(
        model=digits.model,
        plan=digits.plan,
        settings=asked.as_json(),
        data={},
        original={},
        checkpoint={},
        trimmed=trimmed,
        schemes={},
        files={},
        seconds=2.0,
        losses=Losses({"distill": 1.0, "features": 0.5}, temperature=2.0),
    )


def training(found: Findings) -> dict[str, Any]:
    content: dict[str, Any] = build_report(found).content["training"]
    return content


def check(content: dict[str, Any]) -> None:
    schema = {**SCHEMA["properties"]["training"], "$defs": SCHEMA["$defs"]}
    jsonschema.Draft202012Validator(schema).validate(json.loads(json.dumps(content, allow_nan=False)))


@pytest.mark.parametrize("count", [0, 1, 2, CURVE_POINTS - 1, CURVE_POINTS, CURVE_POINTS + 1, 999])
def test_curves_are_evenly_spaced_steps(count: int, torch_digits: Digits) -> None:
    content = training(findings(torch_digits, steps(count)))
    check(content)
    curves = content["curves"]
    at = curves["step"]
    assert len(at) == min(count, CURVE_POINTS)
    assert at[:1] == [0][:count]
    assert at[-1:] == list(range(count))[-1:]
    gaps = np.diff(at)
    # rounding moves each end of a gap by at most half a step
    assert not len(gaps) or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)
    assert curves["loss"] == [2.0 * i for i in at]
    assert curves["lambda"] == [i / count for i in at]
    assert curves["lr"] == [1e-3 * i for i in at]


def test_curves_have_the_clip_where_the_steps_have_it(torch_digits: Digits) -> None:
    content = training(findings(torch_digits, steps(3, tau=0.75)))
    check(content)
    assert content["curves"]["tau"] == [0.75] * 3
    assert "tau" not in training(findings(torch_digits, steps(3)))["curves"]


def test_evaluations_name_their_regimes(torch_digits: Digits) -> None:
    history = [
        {"event": "start", "losses": [0.5, 0.25, 0.0]},
        *steps(2),
        {"event": "evaluate", "step": 2, "losses": [0.25, float("inf"), float("nan")], "best": False},
    ]
    content = training(findings(torch_digits, history))
    check(content)
    assert content["regimes"] == list(REGIMES)
    assert content["evaluations"] == [
        {"step": 0, "losses": dict(zip(REGIMES, (0.5, 0.25, 0.0), strict=True)), "best": False},
        {"step": 2, "losses": dict(zip(REGIMES, (0.25, None, None), strict=True)), "best": False},
    ]


def test_settings_losses_and_tails(torch_digits: Digits) -> None:
    schedule = Schedule(0.2, 0.3, 0.4, 0.5)
    found = findings(torch_digits, steps(4), optimizer="sgd", schedule=schedule)
    content = training(replace(found, trimmed=replace(found.trimmed, stopped=True)))
    check(content)
    assert (content["optimizer"], content["learning_rate"], content["stopped"]) == ("sgd", 1e-2, True)
    assert content["schedule"] == {"warmup": 0.2, "bend": 0.3, "full": 0.4, "knee": 0.5, "rise": 0.05, "floor": 0.01}
    assert content["losses"]["weights"] == {"distill": 1.0, "features": 0.5}
    assert content["losses"]["temperature"] == 2.0
    before, after = found.trimmed.tails["b"]
    assert content["tails"]["b"] == {"before": asdict(before), "after": asdict(after)}
    assert training(replace(found, losses=None))["losses"] is None


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("optimizer",), "lion"),
        (("learning_rate",), 0),
        (("schedule", "knee"), 2),
        (("losses", "weights"), {}),
        (("curves", "lambda"), [1.5]),
        (("curves", "step"), list(range(CURVE_POINTS + 1))),
        (("evaluations",), [{"step": 0, "losses": [0.5], "best": False}]),
        (("tails", "a", "before", "clipped"), 2),
        (("tails", "a", "after", "quantiles"), {}),
        (("extra",), 1),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_schema_refuses_wrong_values(path: tuple[str, ...], value: object, torch_digits: Digits) -> None:
    content = training(findings(torch_digits, steps(4)))
    check(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(content)


# --- the terminal ---------------------------------------------------------------------------------------


def told(report: Report, monkeypatch: pytest.MonkeyPatch, digits: Digits, *options: object) -> tuple[str, list[str]]:
    """Standard output and the lines of standard error of `trim`, for a run with this report."""
    monkeypatch.setattr("onnxqt.cli.quantize.run_trim", lambda *arguments: report)
    result = invoke("trim", digits.file, "--data", digits.calib, "--out", Path("run"), "--steps", STEPS, *options)
    assert result.exit_code == 0, result.stderr
    return result.stdout, result.stderr.splitlines()


def test_terminal_tells_the_schedule_and_the_tails(torch_digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    report = build_report(findings(torch_digits, steps(STEPS), schedule=Schedule(0.2, 0.4, 0.7, 0.25)))
    out, lines = told(report, monkeypatch, torch_digits)
    assert lines == [
        "schedule: float until 200, quartic to 400 (lambda 0.25), quadratic to 700 (lambda 1), hold to 1000",
        "reverse pruning acted on 2 of 3 weights: the longest tail (max|W| / 0.999 quantile), of 'b', "
        "was 8.25 before, 3 after",
    ]
    assert "training.svg" in out
    assert "tails.svg" in out


def test_terminal_tells_that_lambda_is_one_from_the_start(
    torch_digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = build_report(findings(torch_digits, steps(STEPS), schedule=Schedule(0, 0, 0)))
    assert told(report, monkeypatch, torch_digits)[1][0] == "schedule: lambda is 1 from the start"


def test_terminal_tells_that_training_was_stopped(torch_digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    found = findings(torch_digits, steps(20))
    report = build_report(replace(found, trimmed=replace(found.trimmed, stopped=True)))
    _, lines = told(report, monkeypatch, torch_digits, "--prune", "none")
    assert lines[1:] == ["training was stopped after 20 of 1000 steps"]


def test_terminal_names_no_picture_of_a_run_without_steps(
    torch_digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = build_report(findings(torch_digits, []))
    out, lines = told(report, monkeypatch, torch_digits)
    assert lines == []
    assert "svg" not in out
