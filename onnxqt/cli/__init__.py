"""The command line: the only part that prints, exits, or imports click.

Results go to standard output (as JSON with --json), everything else to standard error.
Exit codes: 0 ok, 1 failed, 2 usage, 3 the emulator contradicts an exported file.
"""

from typing import Any

import click

from onnxqt import __version__
from onnxqt.cli.advise import advise
from onnxqt.cli.backends import list_profiles, verify
from onnxqt.cli.compare import compare
from onnxqt.cli.edge import cost
from onnxqt.cli.program import emulate
from onnxqt.cli.quantize import calibrate, export, trim
from onnxqt.cli.report import report
from onnxqt.cli.survey import inspect
from onnxqt.cli.tables import import_ranges, tables
from onnxqt.errors import OnnxqtError


class _Commands(click.Group):
    """Turns the package's errors into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OnnxqtError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("Interrupted: files already written are complete.", err=True)
            ctx.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="onnxqt")
def main() -> None:
    """Make any ONNX model accurate on low-bit hardware, without its framework."""


_COMMANDS = (
    *(trim, report, inspect, advise, compare, calibrate, export, tables, import_ranges),
    *(verify, list_profiles, emulate, cost),
)
for _command in _COMMANDS:
    main.add_command(_command)
