"""The command that repeats a run, from the settings that its report has."""

import shlex
from collections.abc import Iterator

from onnxqt.html.source import Facts
from onnxqt.html.text import visible
from onnxqt.schemes import DEFAULT_SCHEMES
from onnxqt.trim import TrimSettings

MODEL, DATA, EVALUATION = "MODEL", "DATA", "EVALUATION"  # what a report knows by its hash alone

_DEFAULT = TrimSettings()
# Settings that are one text or number: their name, the option, and what it is without the option.
_OPTIONS = (
    ("ranges", "--ranges", "mse"),
    ("equalize", "--equalize", "auto"),
    ("robust_rounding", "--robust-rounding", "auto"),
    ("form", "--form", "qdq"),
    ("opset", "--opset", None),
)
_TRAINING = (
    *(("steps", "--steps"), ("batch_size", "--batch-size"), ("accumulate", "--accumulate")),
    *(("optimizer", "--optimizer"), ("seed", "--seed"), ("prune", "--prune"), ("average", "--average")),
    *(("balance", "--balance"), ("patience", "--patience"), ("save_every", "--save-every")),
    ("save_minutes", "--save-minutes"),
)
_ALWAYS = (("learning_rate", "--lr"),)  # their defaults depend on what training starts from
_SCHEDULE = (("warmup", "--warmup"), ("bend", "--bend"), ("full", "--full"), ("knee", "--knee"))


def command(report: Facts) -> list[str]:
    """The words of the command; those for files are `MODEL`, `DATA`, `EVALUATION` and such.

    Settings that the report lacks are those of the defaults.
    """
    data, settings = report.inner("data"), report.inner("settings")
    evaluation = data.inner("evaluation")
    words = ["onnxqt", "trim", report.inner("model").text("file") or MODEL, "--data", DATA]
    if evaluation.flag("held_out") is False:
        words += ["--eval", EVALUATION]
    if any(data.inner(name).inner("preprocessing") for name in ("calibration", "evaluation")):
        words += ["--preprocess", "PREPROCESSING"]
    if settings.inner("overrides"):
        words += ["--overrides", "OVERRIDES"]
    return [*words, *_quantization(settings), *_training(settings.inner("training"))]


def command_lines(report: Facts) -> list[str]:
    """The command as it is typed, one option a line; each but the last ends with a backslash."""
    words = [shlex.quote(visible(word)) for word in command(report)]
    lines = [" ".join(words[:3])]
    for word in words[3:]:
        if word.startswith("--"):
            lines.append(f"  {word}")
        else:
            lines[-1] += f" {word}"
    return [*(f"{line} \\" for line in lines[:-1]), lines[-1]]


def _quantization(settings: Facts) -> Iterator[str]:
    schemes = settings.names("schemes")
    if schemes != [str(scheme) for scheme in DEFAULT_SCHEMES]:
        for scheme in schemes:
            yield from ("--scheme", scheme)
    for name in dict.fromkeys(regime.partition("/")[0] for regime in settings.names("robust_to")):
        yield from ("--robust-to", name)
    for name, option, default in _OPTIONS:
        yield from _option(settings, name, option, default)
    if steps := settings.names("ptq"):
        yield from ("--ptq", ",".join(steps))
    if settings.flag("strip_qdq"):
        yield "--strip-qdq"


def _training(training: Facts) -> Iterator[str]:
    for name, option in _TRAINING:
        yield from _option(training, name, option, getattr(_DEFAULT, name))
    for name, option in _ALWAYS:
        yield from _option(training, name, option, None)
    for name, option in _SCHEDULE:
        yield from _option(training.inner("schedule"), name, option, None)
    yield from _losses(training.inner("losses"))
    if training.content.get("augment") is not None:
        yield from ("--augment", ",".join(training.names("augment")) or "none")
    for pattern in training.names("freeze"):
        yield from ("--freeze", pattern)
    if training.flag("tensorboard"):
        yield "--tensorboard"


def _losses(losses: Facts) -> Iterator[str]:
    if not losses:
        return
    weights = losses.inner("weights").known_numbers()
    yield from ("--loss", ",".join(f"{name}={weight!r}" for name, weight in weights.items()))
    yield from _option(losses, "temperature", "--temperature", 1.0)
    yield from _option(losses, "graph", "--loss-graph", None)
    for tensor in losses.names("features"):
        yield from ("--feature", tensor)


def _option(facts: Facts, name: str, option: str, default: object) -> Iterator[str]:
    """The option of a setting, where that is not what it is without the option."""
    value = facts.content.get(name)
    if value is None or value == default or not isinstance(value, str | int | float):
        return
    text = value if isinstance(value, str) else repr(value)
    yield from (option, text)
