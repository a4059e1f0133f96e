"""The command `onnxqt report`, and the command on the page that repeats a run."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from conftest import invoke
from html_cases import CHECKPOINT, make_cost, make_matrix, make_report, make_table, write_run

from onnxqt.cli import main
from onnxqt.cli.report import report as report_command
from onnxqt.compiler import profile_regimes
from onnxqt.errors import UsageError
from onnxqt.html import make_page, read_run
from onnxqt.html.command import command, command_lines
from onnxqt.html.source import Facts
from onnxqt.pipeline import Settings
from onnxqt.profiles import PROFILES
from onnxqt.schemes import parse_scheme
from onnxqt.trim import TrimSettings
from onnxqt.trim.losses import Losses
from onnxqt.trim.schedule import Schedule


def run_report(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


# --- onnxqt report --------------------------------------------------------------------------------------


def test_the_page_lies_beside_the_report(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", make_report())
    for source in (path, path.parent):
        result = run_report(source)
        page = path.with_name("report.html")
        assert (result.exit_code, result.stdout, result.stderr) == (0, f"wrote {page}\n", "")
        assert page.read_bytes() == make_page(read_run(path)).encode()
        page.unlink()


def test_the_page_goes_where_it_is_asked_to(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", make_report())
    result = run_report(path, "--out", tmp_path / "page.html")
    assert result.stdout == f"wrote {tmp_path / 'page.html'}\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "run"]
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_notes_go_to_standard_error(tmp_path: Path) -> None:
    path = write_run(tmp_path, make_report())
    (tmp_path / "cost.json").write_text("[]")
    result = run_report(path)
    assert result.exit_code == 0
    assert result.stderr == "cost.json is left out: 'cost.json' holds no JSON object: give the cost.json of a run.\n"
    assert "'cost.json' holds no JSON object".replace("'", "&#39;") in (tmp_path / "report.html").read_text()


def test_the_report_is_not_overwritten(tmp_path: Path) -> None:
    path = write_run(tmp_path, make_report())
    before = path.read_bytes()
    result = run_report(path, "--out", path)
    assert result.exit_code == 2
    assert "is the report itself: choose another file" in result.stderr
    assert path.read_bytes() == before


def test_help_has_examples_and_explains_every_option() -> None:
    text = run_report("--help").stdout
    assert "onnxqt report model-onnxqt/report.json" in text
    assert all(p.help and p.opts[0] in text for p in report_command.params if isinstance(p, click.Option))


# --- files that cannot be used --------------------------------------------------------------------------


def broken(**changes: Any) -> str:
    return json.dumps({**make_report(), **changes})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot read '.*report.json' \(No such file or directory\): give the report.json of a run"),
        ("", r"'.*report.json' is not JSON \(Expecting value.*\): give the report.json of a run"),
        ("[" * 100_000, r"'.*report.json' is not JSON \(.*recursion.*\): give"),
        (b"\xff\xfe\x00", r"is not JSON \(.*\): give"),
        ("[1]", r"'.*report.json' holds no JSON object: give the report.json of a run"),
        ('{"a": NaN}', r"is not JSON \(NaN is no number of JSON\)"),
        ("{}", r"has the version None, not 1.x: give the report.json of a run"),
        (broken(schema_version="2.0"), r"has the version 2.0, not 1.x"),
        (broken(schema_version=1), r"'report.json': 'schema_version' must be a text, not 1: give a file as onnxqt"),
        (broken(schemes={}), r"'report.json' has no 'schemes', so it is no report: give the report.json of a run"),
        (broken(schemes=[1]), r"'report.json': 'schemes' must be an object, not \[1\]: give a file as onnxqt"),
        (broken(schemes={"a\nb": 3}), r"'report.json', schemes: 'a\\x0ab' must be an object, not 3"),
        (broken(seconds="x" * 500), r"'report.json': 'seconds' must be a finite number, not 'x{25,30}\.\.\.x{25,30}'"),
        (broken(plan={"float_nodes": [1]}), r"'report.json', plan: 'float_nodes' must be a list of objects, not \[1\]"),
        (broken(training={"steps": 1, "curves": {"step": [0], "loss": [""]}}), r"'loss' must be a list of finite num"),
        ('{"schema_version": "1.0", "seconds": 1e999, "schemes": {"a": {}}, "float": {"a": 1}, "model": {"a": 1}}',
         r"'seconds' must be a finite number, not inf"),
    ],
    ids=lambda value: None if value is None or isinstance(value, bytes) or len(value) > 60 else value,
)  # fmt: skip
def test_reports_that_cannot_be_used(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UsageError, match=message) as caught:
        make_page(read_run(path))
    assert "\n" not in str(caught.value)


def test_reports_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxqt.html.source.FILE_LIMIT", 1 << 20)
    (tmp_path / "report.json").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(UsageError, match=r"is larger than 1 MiB: give the report.json of a run"):
        read_run(tmp_path)


# --- what lies beside -----------------------------------------------------------------------------------


def test_files_of_other_models_are_left_out(tmp_path: Path) -> None:
    report = make_report()
    matrix, cost = make_matrix(report), make_cost()
    matrix["models"][0]["sha256"] = cost["model"]["sha256"] = "8" * 64
    run = read_run(write_run(tmp_path, report, matrix=matrix, cost=cost))
    assert not run.matrix
    assert not run.cost
    assert run.notes == (
        "matrix.json is left out: its first model is not the original model of this run.",
        "cost.json is left out: it is about another model.",
    )


def test_other_checkpoints_in_a_matrix_are_noted(tmp_path: Path) -> None:
    report = make_report()
    matrix = make_matrix(report)
    matrix["models"][1]["sha256"] = "8" * 64
    run = read_run(write_run(tmp_path, report, matrix=matrix))
    assert run.matrix
    assert run.notes == ("matrix.json: 'checkpoint.onnx' is not the checkpoint of this run.",)
    assert ">checkpoint.onnx</th>" in make_page(run)
    assert ">trimmed</th>" not in make_page(run)


def test_cost_of_the_checkpoint_counts(tmp_path: Path) -> None:
    cost = make_cost()
    cost["model"]["sha256"] = CHECKPOINT
    assert read_run(write_run(tmp_path, make_report(), cost=cost)).cost


def test_tables_that_changed_or_are_broken_are_noted(tmp_path: Path) -> None:
    path = write_run(tmp_path, make_report(), make_table(2))
    table = tmp_path / "table.json"
    assert read_run(path).notes == ()
    table.write_bytes(table.read_bytes() + b"\n")
    run = read_run(path)
    assert run.table is not None
    assert run.notes == ("table.json is not as this run wrote it: it was edited since, or is of another run.",)
    table.write_text("{}")
    run = read_run(path)
    assert run.table is None
    (note,) = run.notes
    assert note.startswith("table.json is left out: ")
    assert str(tmp_path) not in note


def test_hidden_characters_of_notes_are_made_visible(tmp_path: Path) -> None:
    path = write_run(tmp_path, make_report(), make_table(1, ["\u202eabc"]))
    table = tmp_path / "table.json"
    table.write_text(table.read_text().replace('"role": "activation"', '"role": "x"', 1))
    run = read_run(path)
    (note,) = run.notes
    assert "\u202eabc" in note
    assert "\\u202eabc" in make_page(run)
    assert "\u202e" not in make_page(run)


# --- the command that repeats a run ---------------------------------------------------------------------

EVERYTHING = Settings(
    schemes=(parse_scheme("w8a8-sym-pc"), parse_scheme("w4a8-asym-b32")),
    training=TrimSettings(
        steps=7,
        batch_size=5,
        accumulate=2,
        optimizer="sgd",
        learning_rate=0.003,
        schedule=Schedule(warmup=0.1, bend=0.2, full=0.5, knee=0.3),
        seed=3,
        losses=Losses({"distill": 0.5, "features": 0.25, "cross-entropy:a b": 1e-3}, 2.5, ("x;y", "z")),
        prune="channel",
        average=0.1,
        balance=0.7,
        augment=(),
        freeze=("a*", "b?"),
        patience=4,
        save_every=9,
        save_minutes=1.5,
        tensorboard=True,
    ),
    robust_to=profile_regimes(PROFILES["tflite_ref"]),
    ranges="minmax",
    equalize="never",
    robust_rounding="always",
    ptq=("equalize", "round"),
    strip_qdq=True,
    form="qoperator",
    opset=19,
)
SETTINGS = {
    "defaults": Settings(),
    "everything": EVERYTHING,
    "augmented": Settings(training=TrimSettings(augment=("mixup", "flip"))),
    "at once": Settings(training=TrimSettings(schedule=Schedule(0, 0, 0), learning_rate=4e-4)),
}


def facts(settings: Settings, **data: Any) -> Facts:
    """A report of these settings, as they are when training begins."""
    settled = dataclasses.replace(settings, training=settings.training.settled(rounds_well=False))
    content = json.loads(json.dumps({"settings": settled.as_json(), "data": data, "model": {}}))
    return Facts("'report.json'", content)


class Captured(Exception):  # noqa: N818
    """Raised in place of a run, with its settings."""


@pytest.mark.parametrize("name", SETTINGS)
def test_the_command_gives_the_settings_of_the_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line reads them back, every one."""

    def capture(model: Path, data: Path, evaluation: Path | None, out: Path, settings: Settings, bar: object) -> None:
        raise Captured(model, data, evaluation, settings)

    monkeypatch.setattr("onnxqt.cli.quantize.run_trim", capture)
    report = facts(SETTINGS[name], evaluation={"held_out": False})
    program, *words = shlex.split("\n".join(command_lines(report)).replace("\\\n", ""))
    assert [program, *words] == command(report)
    caught = invoke(*words).exception
    assert isinstance(caught, Captured), caught
    model, data, evaluation, settings = caught.args
    assert (str(model), str(data), str(evaluation)) == ("MODEL", "DATA", "EVALUATION")
    read = dataclasses.replace(settings, training=settings.training.settled(rounds_well=False))
    assert json.loads(json.dumps(read.as_json())) == report.content["settings"]


def test_every_setting_has_its_option() -> None:
    """A new setting of training without an option on the page makes this fail."""
    words = command(facts(EVERYTHING))
    fields = {field.name for field in dataclasses.fields(TrimSettings)}
    renamed = {"learning_rate": "--lr", "losses": "--loss", "schedule": "--warmup"}
    assert all(renamed.get(f, f"--{f.replace('_', '-')}") in words for f in fields - {"resume"})
    others = {field.name for field in dataclasses.fields(Settings)}
    others -= {"training", "schemes", "preprocessing", "overrides"}  # see the other tests
    assert all(f"--{f.replace('_', '-')}" in words for f in others)


def test_defaults_need_no_options() -> None:
    words = command(facts(Settings()))
    options = [word for word in words if word.startswith("--")]
    assert options == ["--data", "--lr", "--warmup", "--bend", "--full", "--knee"]


def test_words_stand_for_files() -> None:
    report = facts(Settings(), calibration={"preprocessing": {"size": [32, 32]}}, evaluation={"held_out": True})
    report.content["settings"]["overrides"] = {"conv*": {"bits": 8}}
    words = command(report)
    assert words[:8] == [*("onnxqt", "trim", "MODEL", "--data", "DATA", "--preprocess", "PREPROCESSING"), "--overrides"]
    assert "--eval" not in words


def test_the_command_can_be_pasted(tmp_path: Path) -> None:
    """Names are quoted for the shell, and hidden characters do not come along."""
    report = make_report()
    report["model"]["file"] = "$(rm -rf ~); `id` 'x'\n\u202e.onnx"
    lines = command_lines(Facts("'report.json'", report))
    assert shlex.split("\n".join(lines).replace("\\\n", ""))[2] == "$(rm -rf ~); `id` 'x'\\x0a\\u202e.onnx"
    assert lines[0] == """onnxqt trim '$(rm -rf ~); `id` '"'"'x'"'"'\\x0a\\u202e.onnx' \\"""
