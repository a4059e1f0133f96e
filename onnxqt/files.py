"""Writing files: under a temporary name, then renamed, so a killed run leaves no half file."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import onnx

from onnxqt.errors import ExportError


def make_folder(path: Path) -> Path:
    """Create a folder, with its parents, and make sure that files can be written into it.

    Raises:
        ExportError: if it cannot be created or written to.
    """
    probe = path / ".onnxqt-write-test"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ExportError(f"cannot write into '{path}' ({error.strerror}): choose another --out") from error
    return path


def write_model(path: Path, proto: onnx.ModelProto) -> None:
    """Write a model; the same model gives the same bytes.

    Raises:
        ExportError: if the file cannot be written.
    """
    _write(path, proto.SerializeToString(deterministic=True))


def write_json(path: Path, content: Any) -> None:
    """Write JSON, refusing NaN and infinity, which JSON does not have.

    Raises:
        ExportError: if the file cannot be written.
    """
    _write(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ExportError(f"cannot write '{path}' ({error.strerror}): free the disk or choose another --out") from error
