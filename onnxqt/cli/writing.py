"""Files that commands write themselves: what was chosen, and files for vendors' tools."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from onnxqt.errors import ExportError
from onnxqt.overrides import Overrides


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it.

    Raises:
        ExportError: if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ExportError(f"cannot write '{path}' ({error.strerror}): free the disk or choose another --out") from error


def overrides_text(overrides: Overrides) -> str:
    """The TOML file of overrides, which --overrides takes; JSON writes text and numbers as TOML does."""
    content: dict[str, dict[str, Any]] = {}
    for rule in overrides.rules:
        for pattern, settings in Overrides((rule,)).as_json().items():
            content.setdefault(pattern, {}).update(settings)
    lines = ["[overrides]"]
    for pattern, settings in content.items():
        lines += ["", f"[overrides.{json.dumps(pattern, ensure_ascii=False)}]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    return "\n".join(lines) + "\n"
