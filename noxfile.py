"""Slow and environment-bound checks; `nox -l` lists them."""

import itertools
import pathlib
import sys

import nox

nox.options.sessions = ["lint", "tests"]
nox.options.error_on_missing_interpreters = False

PYTHONS = ["3.10", "3.11", "3.12"]
SCHEMES = [
    f"w{weight}a{activation}-{symmetry}-{granularity}"
    for weight, activation, symmetry, granularity in itertools.product(
        range(8, 1, -1), (8, 4), ("sym", "asym"), ("pt", "pc")
    )
]


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The test suite."""
    session.install(".[test]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff and mypy --strict."""
    session.install(".[lint]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
@nox.parametrize("model", ["torch", "keras"])
def demo(session: nox.Session, model: str) -> None:
    """The main job on a fixture, from a fresh installation."""
    session.install(".")
    folder = f"fixtures/{model}"
    out = f"{session.create_tmp()}/{model}"
    data = ("--data", f"{folder}/calib", "--eval", f"{folder}/eval")
    session.run("onnxqt", "trim", f"{folder}/model.onnx", *data, "--out", out)


@nox.session(venv_backend="none")
@nox.parametrize("scheme", SCHEMES, ids=SCHEMES)
def schemes(session: nox.Session, scheme: str) -> None:
    """Every contract of one scheme, on every fixture: `nox -s "schemes(w4a8-sym-pc)"`."""
    folder = pathlib.Path(".nox/schemes")  # one environment for all of them: each would be 300 MB
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        session.run(sys.executable, "-m", "venv", str(folder))
    session.run(str(python), "-m", "pip", "install", "--quiet", ".[test]")
    session.run(str(python), "-m", "pytest", "tests/contracts/test_schemes.py", "-k", f"[{scheme}-")


@nox.session
def large(session: nox.Session) -> None:
    """A model of 3 GB: memory of inspect, calibrate and export. Takes 7 GB of disk."""
    session.install(".")
    session.run("python", "tools/large_model.py", "--out", f"{session.create_tmp()}/large", *session.posargs)
