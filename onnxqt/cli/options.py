"""The options that several commands have, and what their values mean."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from onnxqt.calibrate import RANGE_METHODS
from onnxqt.errors import UsageError
from onnxqt.pipeline import EQUALIZE, Settings
from onnxqt.profiles import PROFILES, Profile, read_profile
from onnxqt.ptq import STEPS, Step
from onnxqt.schemes import DEFAULT_SCHEMES, parse_scheme

MODEL = click.Path(path_type=Path)
Command = TypeVar("Command", bound=Callable[..., Any])


def options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Give a command these options, in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


DATA = click.option("--data", type=MODEL, required=True, help="Samples: a directory of .npz or .npy files.")
SCHEMES = click.option(
    "--scheme",
    "schemes",
    multiple=True,
    metavar="ID",
    help="w{2..8}a{4,8}-{sym,asym}-{pt,pc}, repeatable. Default: w{8,4}a8-{sym,asym}-{pt,pc}.",
)
RANGES = click.option(
    "--ranges",
    type=click.Choice(RANGE_METHODS),
    default="mse",
    show_default=True,
    help="How clips are chosen.",
)
EQUALIZE_OPTION = click.option(
    "--equalize",
    type=click.Choice(EQUALIZE),
    default="auto",
    show_default=True,
    help="Cross-layer equalization first; auto: where it loses less on calibration samples.",
)
PTQ = click.option(
    "--ptq",
    metavar="STEP,...",
    help="Post-training quantization: equalize, round (AdaRound), bias. For trim: a baseline for the report.",
)
STRIP_QDQ = click.option("--strip-qdq", is_flag=True, help="Take the quantizers out of a quantized MODEL first.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
OUT = click.option("--out", type=MODEL, help="Run directory.  [default: MODEL-onnxqt]")


def ptq_steps(text: str | None) -> tuple[Step, ...]:
    """The steps of post-training quantization that a text names, separated by commas, each once."""
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    for name in names:
        if name not in STEPS:
            raise UsageError(f"--ptq {text}: there is no step '{name}': name some of {', '.join(STEPS)}")
    return tuple(step for step in STEPS if step in names)


def settings_of(schemes: Sequence[str], **rest: Any) -> Settings:
    """The settings of a run with the named schemes, each once; without a name the default ones."""
    chosen = tuple(dict.fromkeys(parse_scheme(name) for name in schemes)) or DEFAULT_SCHEMES
    return Settings(schemes=chosen, **rest)


def profiles_named(names: Sequence[str]) -> tuple[Profile, ...]:
    """The profiles that are named, each once."""
    found: dict[str, Profile] = {}
    for name in names:
        profile = profile_named(name)
        if found.setdefault(profile.name, profile) != profile:
            raise UsageError(f"--profile {name}: another one is called '{profile.name}' too: change 'name' in the file")
    return tuple(found.values())


def profile_named(name: str) -> Profile:
    """A profile by its name or its file."""
    if name in PROFILES:
        return PROFILES[name]
    if name.endswith(".toml") or Path(name).is_file():
        return read_profile(name)
    raise UsageError(f"unknown profile '{name}': give a TOML file or one of {', '.join(PROFILES)}")
