"""Every error that a user can cause, one subclass per stage, each a single line.

A message names what is wrong, where, and what to do. The command line prints it and ends with `exit_code`.
"""

from collections.abc import Sequence


class OnnxqtError(Exception):
    """Base of all errors of this package; `str(error)` is one line that can be shown to a user."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """The first line of a foreign error's text; the name of its class if it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class UsageError(OnnxqtError):
    """An option or argument that cannot be used: unknown scheme, a number out of range."""

    exit_code = 2


class InstallationError(OnnxqtError):
    """The Python environment cannot do what was asked (missing or conflicting packages)."""


class ModelError(OnnxqtError):
    """The ONNX model cannot be read or handled."""


class DataError(OnnxqtError):
    """The samples cannot be read or do not fit the model."""


class CalibrationError(OnnxqtError):
    """No usable range could be found for a tensor."""


class UnboundedError(CalibrationError):
    """Tensors take NaN or infinite values, which no range holds."""

    def __init__(self, tensors: Sequence[str]) -> None:
        super().__init__(
            f"tensor '{tensors[0]}' takes NaN or infinite values on the samples: check the samples and the model"
        )
        self.tensors = tuple(tensors)


class TrainingError(OnnxqtError):
    """Fine-tuning could not start or did not finish."""


class ExportError(OnnxqtError):
    """A file could not be written."""


class EmulatorError(OnnxqtError):
    """The emulator cannot execute a file."""


class ContradictionError(OnnxqtError):
    """An exported file does not do what the emulator says it does; it must not be used."""

    exit_code = 3
