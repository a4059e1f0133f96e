"""Writing files: under a temporary name, then renamed, so a killed run leaves no half file."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from onnxqt.errors import ExportError
from onnxqt.tensors import is_external, raw_bytes, set_external

_ALIGNMENT = 4096  # of external values, so that they can be mapped into memory


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
    """Write a model; the same model gives the same bytes. Weights outside it go into `<name>.data` beside it.

    Raises:
        ExportError: if a file cannot be written.
    """
    external = [tensor for tensor in proto.graph.initializer if is_external(tensor)]
    if external:
        data = path.with_suffix(".data")
        with _replacing(data) as temporary:
            offsets = _copy_values(external, temporary)
        proto = _relocated(proto, data.name, offsets)
    write_bytes(path, proto.SerializeToString(deterministic=True))


def _copy_values(tensors: list[onnx.TensorProto], path: Path) -> dict[str, int]:
    """Write the values of external tensors one behind the other; returns where each begins, by name."""
    offsets = {}
    with path.open("wb") as file:
        for tensor in tensors:
            file.seek(-file.tell() % _ALIGNMENT, os.SEEK_CUR)
            offsets[tensor.name] = file.tell()
            file.write(raw_bytes(tensor))
    return offsets


def _relocated(proto: onnx.ModelProto, location: str, offsets: dict[str, int]) -> onnx.ModelProto:
    moved = onnx.ModelProto()
    moved.CopyFrom(proto)
    for tensor in moved.graph.initializer:
        if tensor.name in offsets:
            set_external(tensor, location, offsets[tensor.name])
    return moved


def write_json(path: Path, content: Any) -> None:
    """Write JSON, refusing NaN and infinity, which JSON does not have.

    Raises:
        ExportError: if the file cannot be written.
    """
    write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, content: bytes, another: str = "--out") -> None:
    """Write a file.

    Args:
        path: of the file.
        content: all of it.
        another: what to choose another of where it cannot be written.

    Raises:
        ExportError: if it cannot be written.
    """
    with _replacing(path, another) as temporary:
        temporary.write_bytes(content)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _replacing(path: Path, another: str = "--out") -> Iterator[Path]:
    """A temporary file that becomes `path` in the end."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        remedy = f"free the disk or choose another {another}"
        raise ExportError(f"cannot write '{path}' ({error.strerror}): {remedy}") from error
