"""Files of numpy arrays: `.npz`, `.npy`, and a folder with one `.npy` file per input.

Nothing is ever unpickled, and the size that a header claims is compared with the file before anything is allocated.
"""

import io
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np

from onnxqt.data.content import ARRAY_LIMIT, Access, Stored, Take, Update, reading
from onnxqt.data.form import Index
from onnxqt.errors import DataError
from onnxqt.numerics import Array

_HEADER_LIMIT = 1 << 16
_CHUNK = 1 << 20
_READ_HEADER = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}

_Read = Callable[[Index], Array]  # rows of one array


@dataclass(frozen=True, slots=True)
class _InFile(Stored):
    """An array in a file: how its values are ordered, and the byte at which they begin."""

    fortran: bool
    offset: int


@dataclass(frozen=True, eq=False, slots=True)
class NpzContent:
    """A `.npz` file; its arrays may be compressed, so rows come in ascending order.

    Attributes:
        name: the file.
        path: the same.
        arrays: by name, with where they begin in their members of the archive.
        access: see `Content`.
    """

    name: str
    path: Path
    arrays: Mapping[str, _InFile]
    access: Access = "stream"

    @contextmanager
    def open(self, names: Sequence[str]) -> Iterator[Take]:
        """See `Content.open`."""
        with ExitStack() as stack:
            archive = stack.enter_context(zipfile.ZipFile(self.path))
            members = _members(archive)
            streams = {name: stack.enter_context(archive.open(members[name])) for name in names}
            readers = {name: _reader(self.arrays[name], stream, seek=False) for name, stream in streams.items()}
            yield lambda rows: {name: read(rows) for name, read in readers.items()}

    def digest(self, update: Update) -> None:
        """Hash name, size and bytes of the file."""
        digest_file(self.path, self.path.name, update)


@dataclass(frozen=True, eq=False, slots=True)
class NpyContent:
    """One `.npy` file per array; one in Fortran order is read whole.

    Attributes:
        name: of the file, or of the folder of several.
        files: by array.
        arrays: by name, with where they begin in their files.
    """

    name: str
    files: Mapping[str, Path]
    arrays: Mapping[str, _InFile]

    @property
    def access(self) -> Access:
        """See `Content.access`."""
        return "stream" if any(array.fortran for array in self.arrays.values()) else "seek"

    @contextmanager
    def open(self, names: Sequence[str]) -> Iterator[Take]:
        """See `Content.open`."""
        with ExitStack() as stack:
            streams = {name: stack.enter_context(self.files[name].open("rb")) for name in names}
            readers = {name: _reader(self.arrays[name], stream, seek=True) for name, stream in streams.items()}
            yield lambda rows: {name: read(rows) for name, read in readers.items()}

    def digest(self, update: Update) -> None:
        """Hash name, size and bytes of each file."""
        for path in self.files.values():
            digest_file(path, path.name, update)


def open_npz(path: Path) -> NpzContent:
    """Read the headers of a `.npz` file.

    Raises:
        DataError: if it is damaged, holds Python objects, or an array has more than `ARRAY_LIMIT` bytes.
    """
    name, arrays = str(path), {}
    with reading(name), zipfile.ZipFile(path) as archive:
        for key, info in _members(archive).items():
            with archive.open(info) as member:
                arrays[key] = _header(f"{name}: array {key!r}", member, info.file_size)
    return NpzContent(name, path, arrays)


def open_npy(name: str, files: Mapping[str, Path]) -> NpyContent:
    """Read the headers of `.npy` files by the name of the array; `name` is what messages call them together.

    Raises:
        DataError: as `open_npz`.
    """
    arrays = {}
    for key, path in files.items():
        with reading(str(path)), path.open("rb") as stream:
            arrays[key] = _header(str(path), stream, os.fstat(stream.fileno()).st_size)
    return NpyContent(name, files, arrays)


def digest_file(path: Path, name: str, update: Update) -> None:
    """Feed a hash with a file's name, size and bytes.

    Raises:
        DataError: if it cannot be read.
    """
    with reading(str(path)), path.open("rb") as stream:
        update(f"{name}\0{os.fstat(stream.fileno()).st_size}\0".encode())
        while chunk := stream.read(_CHUNK):
            update(chunk)


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The arrays of an `.npz` file by name."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name in members:
            raise ValueError(f"array {name!r} is in it twice")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"array {name!r} has zip compression {info.compress_type}, not 0 or 8")
        members[name] = info
    return members


def _header(where: str, stream: IO[bytes], size: int) -> _InFile:
    """Read and check the header of an array of `size` bytes, header included (NPY format 1.0 and 2.0)."""
    head = io.BytesIO(stream.read(_HEADER_LIMIT))
    version = np.lib.format.read_magic(head)
    if version not in _READ_HEADER:
        raise ValueError(f"NPY format version {version}, expected 1.0 or 2.0")
    shape, fortran, dtype = _READ_HEADER[version](head)
    if dtype.hasobject:
        raise DataError(f"{where} holds Python objects, which are never unpickled; save numbers instead")
    needed, found = math.prod(shape) * dtype.itemsize, size - head.tell()
    if needed != found:
        raise DataError(
            f"{where} has {found} bytes of values, but {dtype} of shape {shape} by its header, which needs "
            f"{needed}; the file is damaged, write it again"
        )
    if needed > ARRAY_LIMIT:
        raise DataError(f"{where} has {needed} bytes, more than {ARRAY_LIMIT} allowed; split it into smaller files")
    return _InFile(shape, dtype, fortran, head.tell())


def _reader(array: _InFile, stream: IO[bytes], seek: bool) -> _Read:
    """Reads rows of one array, in any order if the stream can `seek`, else only in ascending order."""
    _advance(stream, array.offset)
    if array.fortran:
        flat = np.empty(math.prod(array.shape), array.dtype)
        _advance(stream, flat.nbytes, flat.view(np.uint8))
        return flat.reshape(array.shape, order="F").__getitem__
    position = 0

    def read(rows: Index) -> Array:
        nonlocal position
        out = np.empty((len(rows), *array.shape[1:]), array.dtype)
        if not out.size:
            return out
        raw = out.reshape(len(rows), -1).view(np.uint8)
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        for first, last in pairwise([0, *breaks.tolist(), len(rows)]):
            run = raw[first:last].reshape(-1)
            if seek:
                stream.seek(array.offset + int(rows[first]) * raw.shape[1])
            else:
                _advance(stream, int(rows[first] - position) * raw.shape[1])
            _advance(stream, run.nbytes, run)
            position = int(rows[last - 1]) + 1
        return out

    return read


def _advance(stream: IO[bytes], size: int, target: Array | None = None) -> None:
    """Read the next `size` bytes, into `target` if given."""
    done = 0
    while done < size:
        chunk = stream.read(min(size - done, _CHUNK))
        if not chunk:
            raise EOFError("it ends early")
        if target is not None:
            target[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
        done += len(chunk)
