"""A table as files: `table.json`, and `table.safetensors` beside it for arrays of more than 256 values.

docs/table.md describes every field. The same table gives the same bytes, and a table that is read back is equal to
the one that was written, bit by bit.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from onnxqt.errors import ExportError, first_line
from onnxqt.files import file_sha256, write_bytes
from onnxqt.numerics import Array
from onnxqt.table.decode import decode_table
from onnxqt.table.encode import FORMAT, NUMERICS, VERSION, entry_json, json_text
from onnxqt.table.form import Table
from onnxqt.table.reading import parse_json, read_text

ARRAYS_LIMIT = 4 << 30  # bytes of the file of arrays
_DTYPES = (np.float32, np.float64, np.int32, np.uint32)


def write_table(table: Table, path: Path) -> list[Path]:
    """Write a table; returns the files written, the JSON file first.

    Raises:
        ExportError: if a file cannot be written.
    """
    sibling = _sibling(path)
    arrays: dict[str, Array] = {}
    tensors = [entry_json(entry, str(index), arrays) for index, entry in enumerate(table.entries)]
    if arrays:
        write_bytes(sibling, save(arrays), "file")
    name, _, version = table.producer.partition(" ")
    content = {
        "format": FORMAT,
        "version": VERSION,
        "producer": {"name": name, "version": version},
        "model": {
            "file": table.model_file,
            "sha256": table.model_sha256,
            "graph_sha256": table.graph_sha256,
            "opset": table.opset,
        },
        "calibration": {"samples": table.samples, "ranges": table.ranges},
        "numerics": NUMERICS,
        "schemes": list(table.schemes),
        "arrays_sha256": file_sha256(sibling) if arrays else None,
        "tensors": tensors,
    }
    write_bytes(path, (json_text(content) + "\n").encode(), "file")
    return [path, sibling] if arrays else [path]


def read_table(path: Path) -> Table:
    """A table from its files, perhaps edited since they were written.

    What a view says twice must agree. `clip`, `scale_f32_hex`, `pow2_exponent` and other fields that follow from the
    scale may be left out; where `scale` is left out, it follows from `clip`. The views of biases follow from those
    of their operands, whatever the file says of them.

    Raises:
        ExportError: naming the file, the tensor and the field that is wrong.
    """
    return decode_table(path, parse_json(path, read_text(path)), _Arrays(_sibling(path)))


class _Arrays(Mapping[str, Array]):
    """The arrays of a safetensors file, each read when it is asked for; `digest` is the file's SHA-256."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __getitem__(self, key: str) -> Array:
        try:
            array = np.asarray(self._file.get_tensor(key))
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._wrong(f"has no array '{key[:60]}' of numbers ({first_line(error)})") from error
        if array.dtype not in _DTYPES:
            raise self._wrong(f"has '{key[:60]}' as {array.dtype}, which a table has not")
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())

    @cached_property
    def digest(self) -> str:
        try:
            if self._path.stat().st_size > ARRAYS_LIMIT:
                raise self._wrong(f"is larger than {ARRAYS_LIMIT >> 30} GiB")
            return file_sha256(self._path)
        except OSError as error:
            raise self._wrong(f"cannot be read ({error.strerror})") from error

    @cached_property
    def _file(self) -> Any:
        try:
            return safe_open(self._path, framework="np")
        except (SafetensorError, OSError) as error:
            raise self._wrong(f"is no safetensors file ({first_line(error)})") from error

    def _wrong(self, problem: str) -> ExportError:
        return ExportError(f"'{self._path}' {problem}: give the file that was written with the table")


def _sibling(path: Path) -> Path:
    """The file of arrays of a table."""
    sibling = path.with_suffix(".safetensors")
    if sibling == path:
        raise ExportError(f"'{path}' cannot be the JSON file of a table: name it {path.stem}.json")
    return sibling
