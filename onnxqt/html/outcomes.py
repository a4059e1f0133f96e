"""What the outcome of a model says: a share of samples, and a signal-to-noise ratio."""

from onnxqt.html.source import Facts, Run
from onnxqt.html.text import decibel

_SHARES = {"top1": "top-1", "agreement": "agreement with the original"}


def share_name(run: Run) -> str | None:
    """What shares of this run are of; None for a model without classes."""
    metrics = run.report.inner("float").inner("metrics")
    return next((text for name, text in _SHARES.items() if metrics.number(name) is not None), None)


def share_of(outcome: Facts) -> float | None:
    """The share of right or agreeing samples of an outcome; None for a model without classes."""
    metrics = outcome.inner("metrics")
    return next((value for name in _SHARES if (value := metrics.number(name)) is not None), None)


def snr_of(outcome: Facts) -> float | None:
    """The signal-to-noise ratio of an outcome in dB; None where it has none, or no error."""
    return outcome.inner("fidelity").number("snr_db")


def decibel_of(outcome: Facts) -> str:
    """The signal-to-noise ratio of an outcome, in words."""
    return decibel(snr_of(outcome), outcome.inner("fidelity").number("mse"))
