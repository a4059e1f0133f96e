"""Slow and environment-bound checks; `nox -l` lists them."""

import itertools
import pathlib
import shutil
import sys

import nox
from nox.command import CommandFailed

nox.options.sessions = ["lint", "tests"]
nox.options.error_on_missing_interpreters = False

PYTHONS = ["3.10", "3.11", "3.12"]
SCHEMES = [
    f"w{weight}a{activation}-{symmetry}-{granularity}"
    for weight, activation, symmetry, granularity in itertools.product(
        range(8, 1, -1), (8, 4), ("sym", "asym"), ("pt", "pc")
    )
]

# Runtimes that the emulator is held against, each in an environment of its own (VALIDATION.md).
REFEREES = {
    "litert": ("ai-edge-litert==2.3.0",),
    "tosa": ("tosa-tools==2026.8.0",),
    "ncnn": ("ncnn==1.0.20261020",),
    "openvino": ("openvino==2026.4.1", "onnx>=1.17"),
    "ort": ("onnxruntime==1.32.0", "onnx>=1.17"),
}

# Vendors' readers of our files, each in an environment of its own (VENDORS.md): options and packages of pip.
READERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "ort": (("onnxruntime==1.32.0", "onnx>=1.17", "flatbuffers"),),
    "aimet": (("aimet-onnx==2.42.0", "torch==2.13.0"),),
    "modelopt": (("--no-deps", "nvidia-modelopt==0.47.0"), ("numpy",)),
    "mnn": (("MNN==3.6.1", "onnx>=1.17", "numpy", "protobuf"),),
    "ncnn": (("onnx>=1.17", "numpy", "protobuf"),),
    "protobuf": (("onnx>=1.17", "numpy", "protobuf"),),
    "sophgo": (
        ("--no-deps", "tpu_mlir==1.30.2"),
        (
            *("numpy<2", "onnx<1.17", "onnxruntime", "protobuf<5", "onnxsim", "opencv-python-headless", "scipy"),
            *("tqdm", "plotly", "psutil", "Pillow"),
        ),
    ),
}
OTHER_PYTHONS = {"sophgo": "python3.10"}  # for which a reader has wheels


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


@nox.session(default=False)
def validate(session: nox.Session) -> None:
    """The emulator against the runtimes themselves; writes VALIDATION.md. Takes minutes and 3 GB of disk."""
    session.install(".")
    pythons = [
        argument
        for name, packages in REFEREES.items()
        for argument in environment(session, name, (packages,), "the profiles it validates are skipped")
    ]
    session.run("python", "tools/validate.py", *pythons, "--output", "VALIDATION.md", *session.posargs)


@nox.session(default=False)
def consumers(session: nox.Session) -> None:
    """Current runtimes load and run every kind of file that we write; writes CONSUMERS.md. Takes 1 GB of disk."""
    session.install(".")
    pythons = [
        argument
        for name in ("ort", "openvino")
        for argument in environment(session, name, (REFEREES[name],), "it is skipped")
    ]
    models = [
        argument
        for model in ("torch", "keras")
        for argument in ("--model", f"fixtures/{model}/model.onnx", "--data", f"fixtures/{model}/calib")
    ]
    session.run("python", "tools/check_consumers.py", *pythons, *models, "--output", "CONSUMERS.md", *session.posargs)


@nox.session(default=False)
def vendors(session: nox.Session) -> None:
    """Vendors' own readers read the files of `onnxqt tables`; writes VENDORS.md. Takes minutes and 4 GB of disk."""
    session.install(".")
    pythons = [
        argument
        for name, packages in READERS.items()
        for argument in environment(session, name, packages, "its formats are skipped")
    ]
    session.run("python", "tools/check_vendors.py", *pythons, "--output", "VENDORS.md", *session.posargs)


def environment(session: nox.Session, name: str, packages: tuple[tuple[str, ...], ...], loss: str) -> list[str]:
    """A virtual environment with some packages, as `--python NAME=PATH`; nothing where they cannot be installed."""
    python = OTHER_PYTHONS.get(name, sys.executable)
    folder = pathlib.Path(session.create_tmp()) / name
    inside = str(folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))
    if shutil.which(python) is None:
        session.warn(f"there is no {python} for {name}: {loss}")
        return []
    try:
        session.run(python, "-m", "venv", str(folder), external=True)
        for together in packages:
            session.run(inside, "-m", "pip", "install", "--quiet", *together, external=True)
    except CommandFailed:
        session.warn(f"{name} cannot be installed here: {loss}")
        return []
    return ["--python", f"{name}={inside}"]
