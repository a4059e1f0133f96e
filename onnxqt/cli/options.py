"""The options that several commands have, and what their values mean."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from onnxqt.calibrate import RANGE_METHODS
from onnxqt.data import InputSpec, Preprocessing, Samples, open_samples, parse_preprocessing
from onnxqt.errors import UsageError
from onnxqt.export import FORMS
from onnxqt.overrides import Overrides, read_overrides
from onnxqt.pipeline import WHEN, Settings, located
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


KINDS = "a folder or file of .npz, .npy, .csv or images, ONNX test data, or module:function"
DATA = click.option("--data", type=MODEL, required=True, help=f"Samples: {KINDS}.")
DATA_IF_NEEDED = click.option("--data", type=MODEL, help=f"Samples: {KINDS}. Not needed for af and -dyn schemes.")
PREPROCESS = click.option("--preprocess", metavar="NAME|FILE", help="Images: imagenet, cifar, none, or a TOML file.")
SCHEMES = click.option(
    "--scheme",
    "schemes",
    multiple=True,
    metavar="ID",
    help="w{2..8}a{4,8,16,f}-{sym,asym}-{pt,pc,b16,b32,b64,b128}[-pow2][-narrow][-dyn], repeatable. "
    "Default: w{8,4}a8-{sym,asym}-{pt,pc}.",
)
FORM = click.option(
    "--form",
    type=click.Choice(FORMS),
    default="qdq",
    show_default=True,
    help="Of quantized files: quantizers around float operators, or integer operators.",
)
OPSET = click.option("--opset", type=int, help="Of quantized files.  [default: the least that they take]")
OVERRIDES = click.option(
    "--overrides", type=MODEL, help="TOML or JSON file of exceptions: other bits, or float, for nodes and tensors."
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
    type=click.Choice(WHEN),
    default="auto",
    show_default=True,
    help="Cross-layer equalization first; auto: where it loses less on held-out samples.",
)
ROBUST_ROUNDING = click.option(
    "--robust-rounding",
    type=click.Choice(WHEN),
    default="auto",
    show_default=True,
    help="Then move weights so that they round well under all schemes; auto as for --equalize.",
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
    """The settings of a run with the named schemes, each once; without a name the default ones.

    Of the others, `preprocess` and `overrides` are as on the command line.
    """
    chosen = tuple(dict.fromkeys(parse_scheme(name) for name in schemes)) or DEFAULT_SCHEMES
    file = rest.pop("overrides", None)
    overrides = Overrides() if file is None else read_overrides(file)
    preprocessing = preprocessing_of(rest.pop("preprocess", None))
    return Settings(schemes=chosen, preprocessing=preprocessing, overrides=overrides, **rest)


def preprocessing_of(text: str | None) -> Preprocessing | None:
    """What --preprocess names; None where it is not given."""
    return None if text is None else parse_preprocessing(text)


@contextmanager
def opened(data: Path, preprocess: str | None, specs: list[InputSpec]) -> Iterator[Samples]:
    """The samples of --data; what a function makes lies in a temporary folder meanwhile."""
    with tempfile.TemporaryDirectory(prefix="onnxqt-", ignore_cleanup_errors=True) as folder:
        yield open_samples(located(data, specs, Path(folder), preprocessing_of(preprocess)), specs)


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
