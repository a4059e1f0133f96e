"""The reports of the training process, kept as JSON lines and, where asked for, as TensorBoard events."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from onnxqt.errors import InstallationError
from onnxqt.trim import job as jobs

Report = dict[str, Any]

_CURVES = {"loss": "loss", "blend": "lambda", "lr": "learning rate", "ms": "step/ms"}


def read_history(folder: Path) -> list[Report]:
    """The reports of a run so far; a line that was cut off at the end is left out."""
    path = folder / jobs.HISTORY
    return list(_lines(path)) if path.exists() else []


def _lines(path: Path) -> Iterator[Report]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


class History:
    """Writes reports as they come.

    Args:
        folder: of the run.
        kept: reports of the part of the run before it was resumed.
        tensorboard: write TensorBoard's event files as well.

    Raises:
        InstallationError: if `tensorboard` is wanted and its writer is not installed.
    """

    def __init__(self, folder: Path, kept: list[Report], tensorboard: bool) -> None:
        self._writer = _tensorboard(folder) if tensorboard else None
        self._file = (folder / jobs.HISTORY).open("w")
        self.reports: list[Report] = []
        for report in kept:
            self.add(report)

    def __enter__(self) -> "History":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def add(self, report: Report) -> None:
        """Keep a report."""
        self.reports.append(report)
        self._file.write(json.dumps(report) + "\n")
        self._file.flush()
        if self._writer is None:
            return
        if report["event"] == "step":
            for field, curve in _CURVES.items():
                self._writer.add_scalar(curve, report[field], report["step"])
        elif report["event"] == "evaluate":
            self._writer.add_scalar("held out", sum(report["losses"]) / len(report["losses"]), report["step"])


def _tensorboard(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise InstallationError("--tensorboard needs the package tensorboardX: pip install tensorboardX") from error
    return SummaryWriter(str(folder / "tensorboard"))


def before_step(reports: list[Report], step: int) -> list[Report]:
    """The reports that a run had made when `step` updates were done."""
    kept = []
    for report in reports:
        kept.append(report)
        if report["event"] == "saved" and report["step"] == step:
            break
    return kept
