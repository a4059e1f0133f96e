"""What README.md says exists."""

import re
import shutil
import subprocess

import click
import pytest
from conftest import ROOT

from onnxqt.cli import main
from onnxqt.pipeline import CHECKPOINT, REPORT, SCHEMES_FOLDER, TABLE

README = (ROOT / "README.md").read_text()
INSTALLED = re.compile(r"pip install [^&\n]*")  # whose options are pip's
OPTION = re.compile(r"--[a-z][a-z-]*")


def block(name: str) -> str:
    """The fenced block between `<!-- name -->` and `<!-- end -->`."""
    (body,) = re.findall(rf"^<!-- {name} -->\n```sh\n(.*?)```\n<!-- end -->$", README, re.DOTALL | re.MULTILINE)
    return str(body).strip()


def options_of(command: str) -> set[str]:
    flags = (option for parameter in main.commands[command].params for option in parameter.opts)
    return {*flags, "--help"}


def command_lines() -> list[tuple[str, str]]:
    """Each `onnxqt COMMAND ...` of README, up to the end of its line or of its code span."""
    return [(command, rest) for command, rest in re.findall(r"\bonnxqt ([a-z-]+) ([^`\n|]*)", README)]


def test_commands_and_their_options_exist() -> None:
    found = command_lines()
    assert {command for command, _ in found} == set(main.commands)
    for command, rest in found:
        assert set(OPTION.findall(rest)) <= options_of(command), (command, rest)


def test_every_option_exists() -> None:
    known = {option for command in main.commands for option in options_of(command)}
    named = set(OPTION.findall(INSTALLED.sub("", README)))
    assert {"--data", "--eval", "--scheme", "--ranges"} <= named
    assert named <= known


def test_every_option_of_trim_is_in_its_help() -> None:
    command = main.commands["trim"]
    help_text = command.get_help(click.Context(command))
    assert all(option in help_text for option in options_of("trim"))


def test_files_of_the_demo_exist() -> None:
    paths = re.findall(r"\bfixtures/\S+", block("demo command"))
    assert len(paths) >= 2
    assert all((ROOT / path).exists() for path in paths)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


@pytest.mark.parametrize("name", ["demo command", "test command"])
def test_command_is_one_line_that_can_be_pasted(name: str) -> None:
    assert "\n" not in block(name)
    assert block(name).count("'") % 2 == 0


@pytest.mark.skipif(shutil.which("bash") is None, reason="the script of the continuous integration is for bash")
def test_continuous_integration_runs_the_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    (extract,) = (line for line in script.splitlines() if line.startswith("command="))
    process = subprocess.run(
        ["bash", "-euc", f'{extract}\nprintf %s "$command"'], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert process.stdout == block("test command")
    assert "pytest" in process.stdout


@pytest.mark.parametrize("name", [CHECKPOINT, TABLE, REPORT, f"{SCHEMES_FOLDER}/<id>.onnx"])
def test_every_file_of_a_run_is_explained(name: str) -> None:
    assert f"| `{name}` |" in README
